"""Self-tuning networks (MacKay et al., ICLR 2019) in small: regularisers tuned while the network trains.

    python experiments/hyper/stn.py            all of it: about half an hour on one core
    python experiments/hyper/stn.py --smoke    every part once in small; writes nothing unless --out is given

Fashion-MNIST with 2,000 training and 2,000 validation images, so that regularisation matters, and the 10,000 of the test. A
perceptron 784-256-256-10; tuned are the dropout rates of the input and of both hidden layers (0 to 0.9, from 0.05), the
side of a hole in the image (whole pixels, 0 to 15, from 4) and the logarithm of the L2 penalty's weight (from -9). STN: cycles
of two training steps and one validation step of 64 images, 6,000 steps in all, a twentieth of them without validation steps
(warm-up); scales of the noise tuned, τ = 1e-3. The others train ordinary networks of that size for as many training steps:

    start values      fixed throughout
    final values      fixed at STN's last ones
    schedule          STN's values, replayed step by step
    random, grid, Bayes    8 runs of an eighth of STN's steps each: values drawn; two of each of three kinds (dropouts are one);
                           proposed one by one (Gaussian process, expected improvement) after four at random
    random, full      8 whole runs: eight times the cost

SGD with momentum 0.9, a cosine; its rate, and that of λ (Adam), out of a grid by the validation loss of a seed that is not
measured. Every run is evaluated 40 times; what counts is the test loss where its validation loss is least (of a search, over
all its runs). Five seeds draw images, starts and noise. Two more STN runs of three seeds begin with dropouts at 0.3 and 0.6.

Stated before running, each to be reported as holding or not, by means over seeds (paired differences of test losses):
  1. STN is below the start values, its 95 % interval without zero.
  2. STN is at most random search at equal steps.
  3. STN is at most grid and Bayesian search at equal steps.
  4. STN is within 5 % of random search with whole runs.
  5. Begun at 0.05, 0.3 and 0.6, the input's dropout rates end less than half as far apart (their range, at three seeds).
  6. The schedule replayed is better than its last values fixed. (The paper's finding; fragile.)
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import bases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import study
from scipy import stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern, WhiteKernel

from jaxpeft.hyper import cutout, dropout, self_tuning, stn
from jaxpeft.tune import Hyperparameter, constrain, unconstrain

SPECS = {
    "input": Hyperparameter(0.05, 0.0, 0.9),
    "hidden 1": Hyperparameter(0.05, 0.0, 0.9),
    "hidden 2": Hyperparameter(0.05, 0.0, 0.9),
    "hole": Hyperparameter(4.5, 0.0, 16.0, discrete=True),
    "log penalty": Hyperparameter(-9.0, shared=True),
}
DROPOUTS = ("input", "hidden 1", "hidden 2")
LOW = dict.fromkeys(DROPOUTS, 0.01) | {"hole": 0.1, "log penalty": -11.0}
HIGH = dict.fromkeys(DROPOUTS, 0.7) | {"hole": 14.0, "log penalty": -5.0}


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    widths: tuple[int, ...] = (784, 256, 256, 10)
    examples: int = 2000
    cycles: int = 2000  # of two training steps and one validation step
    batch: int = 64
    evaluations: int = 40
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    lam_rates: tuple[float, ...] = (3e-3, 1e-2)
    starts: tuple[float, ...] = (0.3, 0.6)
    start_seeds: int = 3
    search: int = 8
    tau: float = 1e-3
    seeds: int = 5


SMOKE = Setup(
    widths=(784, 8, 8, 10), examples=40, cycles=8, batch=4, evaluations=2, rates=(0.01,), lam_rates=(1e-2,), starts=(0.6,),
    start_seeds=1, search=4, seeds=2,
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- the network


def draw(widths: tuple[int, ...]) -> Any:
    """`key -> params`."""

    def init(key: Any) -> Any:
        keys = jax.random.split(key, len(widths))
        return {
            f"layer_{i}": {"kernel": (2 / m) ** 0.5 * jax.random.normal(k, (m, n)), "bias": jnp.zeros(n)}
            for i, (m, n, k) in enumerate(zip(widths, widths[1:], keys))
        }

    return init


def apply(params: Any, x: Any, keys: Any = None, rates: Any = None) -> Any:
    """Logits of images (b, 28, 28, 1); dropout before every layer at each example's `rates` (b, 3)."""
    h = x.reshape(len(x), -1)
    for i in range(len(params)):
        if keys is not None:
            one = lambda k, h, r, i=i: dropout(jax.random.fold_in(k, i), h[None], r[None])[0]
            h = jax.vmap(one)(keys, h, rates[:, i])
        layer = params[f"layer_{i}"]
        h = h @ layer["kernel"] + layer["bias"]
        h = jax.nn.relu(h) if i < len(params) - 1 else h
    return h


def cross_entropy(logits: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def regularised(run: Any, batch: Any, values: Any, key: Any, penalty: Any) -> Any:
    """The training loss; `run(x, keys, rates)` is the network."""
    (x, y), (first, second) = batch, jax.random.split(key)
    rates = jnp.stack([values[n] for n in DROPOUTS], -1)
    logits = run(cutout(first, x, values["hole"], most=1), jax.random.split(second, len(x)), rates)
    return cross_entropy(logits, y) + jnp.exp(values["log penalty"][0]) * penalty


def squares(tree: Any) -> Any:
    return sum(jnp.square(x).sum() for x in jax.tree.leaves(tree) if x.ndim > 1)


def evaluated(params: Any, data: Any) -> Any:
    """Losses on validation and test images."""
    return jnp.stack([cross_entropy(apply(params, x), y) for x, y in (data["validation"], data["test"])])


def batch_of(key: Any, part: Any, size: int) -> Any:
    rows = jax.random.randint(key, (size,), 0, part[1].shape[0])
    return part[0][rows], part[1][rows]


# ------------------------------------------------------------------------------------------------------------------- runs


def tuned_run(s: Setup) -> Any:
    """`(λ_0, rate, λ's rate, key, data) -> (values at every training step, evaluations (e, 2))`, compiled."""
    hyper = stn(draw(s.widths), len(SPECS))

    def run(lam: Any, rate: Any, lam_rate: Any, key: Any, data: Any) -> Any:
        rule = optax.sgd(lambda n: rate * optax.cosine_decay_schedule(1.0, 2 * s.cycles)(n), 0.9)
        tuner = self_tuning(
            apply, hyper, SPECS,
            train_loss=lambda m, b, values, k: regularised(m.apply, b, values, k, squares(m.params())),
            valid_loss=lambda m, b: cross_entropy(m.apply(b[0]), b[1]),
            optimisers=(rule, optax.adam(lam_rate), optax.adam(lam_rate)), tau=s.tau,
        )  # fmt: skip
        state = tuner.init(jax.random.fold_in(key, 1))._replace(lam=lam)

        def cycle(state: Any, at: Any) -> Any:
            key, number = at
            a, b, c, *noise = jax.random.split(key, 6)
            before = constrain(SPECS, state.lam)
            for k, n in ((a, noise[0]), (b, noise[1])):
                state, _ = tuner.train_step(state, batch_of(k, data["train"], s.batch), n)
            tuned, _ = tuner.valid_step(state, batch_of(c, data["validation"], s.batch), noise[2])
            warm = number < s.cycles // 20
            return jax.tree.map(lambda x, y: jnp.where(warm, x, y), state, tuned), before

        def stretch(state: Any, at: Any) -> Any:
            state, values = jax.lax.scan(cycle, state, at)
            return state, (values, evaluated(tuner.params(state), data))

        keys = jax.random.split(jax.random.fold_in(key, 2), (s.evaluations, s.cycles // s.evaluations))
        numbers = jnp.arange(keys.size).reshape(keys.shape)
        state, (values, found) = jax.lax.scan(stretch, state, (keys, numbers))
        return jnp.repeat(values.reshape(-1, len(SPECS)), 2, 0), found, constrain(SPECS, state.lam)

    return jax.jit(run)


def plain_run(s: Setup, steps: int) -> Any:
    """`(values (steps, n), rate, key, data) -> evaluations (e, 2)`, compiled."""

    def run(schedule: Any, rate: Any, key: Any, data: Any) -> Any:
        params = draw(s.widths)(jax.random.fold_in(key, 1))
        rule = optax.sgd(lambda n: rate * optax.cosine_decay_schedule(1.0, steps)(n), 0.9)

        def step(state: Any, at: Any) -> Any:
            (params, moments), (key, values) = state, at
            rows, noise = jax.random.split(key)
            batch = batch_of(rows, data["train"], s.batch)
            named = {n: jnp.full(s.batch, values[i]) for i, n in enumerate(SPECS)}
            loss = lambda p: regularised(lambda *x: apply(p, *x), batch, named, noise, squares(p))
            updates, moments = rule.update(jax.grad(loss)(params), moments)
            return (optax.apply_updates(params, updates), moments), None

        def stretch(state: Any, at: Any) -> Any:
            state, _ = jax.lax.scan(step, state, at)
            return state, evaluated(state[0], data)

        each = steps // s.evaluations
        keys = jax.random.split(jax.random.fold_in(key, 2), (s.evaluations, each))
        values = schedule[: s.evaluations * each].reshape(s.evaluations, each, -1)
        return jax.lax.scan(stretch, (params, rule.init(params)), (keys, values))[1]

    return jax.jit(run)


def chosen(evaluations: Any) -> tuple[float, float]:
    """(validation loss, test loss) where the former is least; a run that broke off has none."""
    e = np.nan_to_num(np.asarray(evaluations).reshape(-1, 2), nan=1e9)
    return tuple(map(float, e[e[:, 0].argmin()]))  # type: ignore[return-value]


# --------------------------------------------------------------------------------------------------------------- searches


def bounds() -> tuple[np.ndarray, np.ndarray]:
    """Of the searches, in λ."""
    return tuple(np.asarray(unconstrain(SPECS, v)) for v in (LOW, HIGH))  # type: ignore[return-value]


def random_points(count: int, seed: int) -> np.ndarray:
    low, high = bounds()
    return low + (high - low) * np.random.default_rng([seed, 3]).random((count, len(low)))


def grid_points(count: int) -> np.ndarray:
    """Dropouts, hole and penalty at a third and two thirds of their ranges; the first `count`."""
    low, high = bounds()
    share = np.array([[d, d, d, h, p] for d in (1 / 3, 2 / 3) for h in (1 / 3, 2 / 3) for p in (1 / 3, 2 / 3)])
    return low + (high - low) * share[:count]


def bayes(evaluate: Any, count: int, seed: int) -> tuple[float, float]:
    """Four points at random, then those of the largest expected improvement out of 2,000."""
    low, high = bounds()
    points = list(random_points(min(4, count), 100 + seed))
    found = [chosen(evaluate(p)) for p in points]
    rng = np.random.default_rng([seed, 4])
    while len(points) < count:
        x, y = (np.array(points) - low) / (high - low), np.minimum(np.array([v for v, _ in found]), 3.0)
        kernel = Matern(0.5, (0.1, 10), nu=2.5) + WhiteKernel(1e-3, (1e-6, 1))
        model = GaussianProcessRegressor(kernel, normalize_y=True)
        model.fit(x, y)
        some = rng.random((2000, len(low)))
        mean, std = model.predict(some, return_std=True)
        z = (y.min() - mean) / np.maximum(std, 1e-9)
        gain = (y.min() - mean) * stats.norm.cdf(z) + std * stats.norm.pdf(z)
        points.append(low + (high - low) * some[gain.argmax()])
        found.append(chosen(evaluate(points[-1])))
    return min(found)


# ------------------------------------------------------------------------------------------------------------------ all


def data_of(s: Setup, seed: int, parts: Any) -> Any:
    rng = np.random.default_rng([seed, 5])
    rows = rng.permutation(len(parts["train"][1]))[: 2 * s.examples]
    own = {"train": rows[: s.examples], "validation": rows[s.examples :]}
    out = {k: tuple(jnp.asarray(x[r]) for x in parts["train"]) for k, r in own.items()}
    return out | {"test": tuple(map(jnp.asarray, parts["test"]))}


def main() -> None:
    began, args = time.perf_counter(), study.arguments((__doc__ or "").splitlines()[0])
    s = SMOKE if args.smoke else Setup()
    parts = bases.images("fashion-mnist", examples=100 if args.smoke else 0)
    steps, short = 2 * s.cycles, 3 * s.cycles // s.search
    tune, whole, eighth = tuned_run(s), plain_run(s, steps), plain_run(s, short)
    key_of = lambda seed: jax.random.fold_in(jax.random.key(23), seed)
    first = unconstrain(SPECS)
    fixed = lambda values, n: jnp.broadcast_to(jnp.asarray(values), (n, len(SPECS)))
    at = lambda lam: np.asarray(constrain(SPECS, jnp.asarray(lam, jnp.float32)))

    data, key = data_of(s, 1000, parts), key_of(1000)
    tried = {f"{r:g}": chosen(whole(fixed(at(first), steps), r, key, data))[0] for r in s.rates}
    rate = min(s.rates, key=lambda r: tried[f"{r:g}"])
    both = {(r, q): chosen(tune(first, r, q, key, data)[1])[0] for r in s.rates for q in s.lam_rates}
    own_rate, lam_rate = min(both, key=both.__getitem__)
    print(f"rates: plain {rate:g} {tried}; STN {own_rate:g}, λ {lam_rate:g}", flush=True)

    losses: dict[str, list[float]] = {}
    paths, ends = [], []
    for seed in range(s.seeds):
        data, key = data_of(s, seed, parts), key_of(seed)
        path, found, last = tune(first, own_rate, lam_rate, key, data)
        paths.append(np.asarray(path[::2]))
        ends.append({"0.05": dict(zip(SPECS, map(float, last)))})
        if seed < s.start_seeds:
            for start in s.starts:
                begun = unconstrain(SPECS, {n: h.start for n, h in SPECS.items()} | dict.fromkeys(DROPOUTS, start))
                ends[-1][f"{start:g}"] = dict(zip(SPECS, map(float, tune(begun, own_rate, lam_rate, key, data)[2])))
        short_run = lambda lam, d=data, k=key: eighth(fixed(at(lam), short), rate, k, d)
        whole_run = lambda values, d=data, k=key: whole(values, rate, k, d)
        here = {
            "STN": chosen(found),
            "start values": chosen(whole_run(fixed(at(first), steps))),
            "final values": chosen(whole_run(fixed(last, steps))),
            "schedule": chosen(whole_run(path[:steps])),
            "random": min(chosen(short_run(p)) for p in random_points(s.search, seed)),
            "grid": min(chosen(short_run(p)) for p in grid_points(s.search)),
            "Bayes": bayes(short_run, s.search, seed),
            "random, full": min(chosen(whole_run(fixed(at(p), steps))) for p in random_points(s.search, seed)),
        }
        for name, (_, test) in here.items():
            losses.setdefault(name, []).append(test)
        print(f"seed {seed}:", {n: round(t, 4) for n, (_, t) in here.items()}, flush=True)

    rows = [
        {"method": n, "test_loss": statistics.mean(x), "std": statistics.stdev(x), "details": {"test_loss": x}}
        for n, x in losses.items()
    ]
    gap = lambda name: study.interval([b - a for a, b in zip(losses["STN"], losses[name], strict=True)])
    told = lambda pair: f"{pair[0]:+.4f} ± {pair[1]:.4f}"
    over_start, replay = gap("start values"), study.interval(
        [f - r for f, r in zip(losses["final values"], losses["schedule"], strict=True)]
    )  # fmt: skip
    full = statistics.mean(losses["STN"]) / statistics.mean(losses["random, full"])
    begun = [0.05, *s.starts]
    apart = statistics.mean(max(x) - min(x) for x in ([v["input"] for v in e.values()] for e in ends[: s.start_seeds]))
    claims = [
        record.claim("STN is below the start values", over_start[0] - over_start[1] > 0, f"by {told(over_start)}"),
        record.claim(
            "STN is at most random search at equal steps", gap("random")[0] >= 0, f"below by {told(gap('random'))}"
        ),
        record.claim(
            "STN is at most grid and Bayesian search at equal steps",
            min(gap("grid")[0], gap("Bayes")[0]) >= 0,
            f"below grid by {told(gap('grid'))}, below Bayes by {told(gap('Bayes'))}",
        ),
        record.claim("STN is within 5 % of random search with whole runs", full <= 1.05, f"{full:.3f} of its loss"),
        record.claim(
            "Begun apart, the input's dropout rates end less than half as far apart",
            apart < (max(begun) - min(begun)) / 2,
            f"{max(begun) - min(begun):.2f} apart at the start, {apart:.2f} at the end",
        ),
        record.claim("The schedule replayed is better than its last values fixed", replay[0] > 0, f"by {told(replay)}"),
    ]

    def figure(axes: Any) -> None:
        for i, name in enumerate(DROPOUTS):
            curve = np.stack([p[:, i] for p in paths])
            axes.plot(curve.mean(0), color=f"C{i}", label=name)
            axes.fill_between(np.arange(curve.shape[1]), curve.min(0), curve.max(0), color=f"C{i}", alpha=0.2)
        other = axes.twinx()
        other.plot(np.stack([p[:, 3] for p in paths]).mean(0), "k:", label="hole, pixels")
        axes.set(xlabel="cycle", ylabel="dropout rate")
        other.set(ylabel="pixels")
        axes.legend(fontsize=7, loc="upper left")
        other.legend(fontsize=7, loc="lower right")

    study.finish(
        "stn", args, paper="MacKay et al.: Self-Tuning Networks, ICLR 2019", setup=s, rows=rows, claims=claims, began=began,
        figure=figure, last_values=ends, rates={"plain": rate, "STN": own_rate, "λ": lam_rate},
    )  # fmt: skip


if __name__ == "__main__":
    main()
