"""Self-tuning networks (MacKay et al., ICLR 2019) in small: regularisers tuned while the network trains.

    python experiments/hyper/stn.py            all of it: about half an hour on one core
    python experiments/hyper/stn.py --smoke    every part once in small; writes nothing unless --out is given

Fashion-MNIST with 2,000 training and 2,000 validation images, so that regularisation matters, and the 10,000 of the test. A
perceptron 784-256-256-10; tuned are the dropout rates of the input and of both hidden layers (0 to 0.9, from 0.05), the
side of a hole in the image (whole pixels, 0 to 15, from 4) and the logarithm of the L2 penalty's weight (from -9). STN: cycles
of two training steps and one validation step of 64 images, 6,000 steps in all, a twentieth of them without validation steps
(warm-up); scales of the noise tuned, τ = 1e-3. The others train ordinary networks of that size for as many training steps:

    λ held            STN itself without a step of λ: what its twice as many parameters do (no claim; to read claim 1 by)
    start values      fixed throughout
    final values      fixed at STN's last ones
    schedule          STN's values, replayed step by step
    random, grid, Bayes    8 runs of an eighth of STN's steps each: values drawn; two of each of three kinds (dropouts are one);
                           proposed one by one (Gaussian process, expected improvement) after four at random
    random, full      8 whole runs: eight times the cost

SGD with momentum 0.9, a cosine; its rate for STN with that of λ (Adam), for whole and for short runs each out of a grid, by the
validation loss of a seed that is not measured. Every run is evaluated 40 times; what counts is the test loss where its
validation loss is least (of a search, over all its runs). Five seeds draw images, starts and noise. Two more STN runs of three
seeds begin with dropouts at 0.3 and 0.6.

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
import stn_bench
import study
from stn_bench import Space, below, chosen, told

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
SPACE = Space(SPECS, LOW, HIGH, DROPOUTS)


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    widths: tuple[int, ...] = (784, 256, 256, 10)
    examples: int = 2000
    cycles: int = 2000  # of two training steps and one validation step
    batch: int = 64
    evaluations: int = 40
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of ordinary networks
    own_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)  # of STN
    lam_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    starts: tuple[float, ...] = (0.3, 0.6)
    start_seeds: int = 3
    search: int = 8
    tau: float = 1e-3
    seeds: int = 5


SMOKE = Setup(
    widths=(784, 8, 8, 10), examples=40, cycles=8, batch=4, evaluations=2, rates=(0.01,), own_rates=(0.01,), lam_rates=(1e-2,),
    starts=(0.6,), search=4, seeds=2, start_seeds=2,
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


# ------------------------------------------------------------------------------------------------------------------- runs


def rule(rate: Any, steps: int) -> Any:
    return optax.sgd(lambda n: rate * optax.cosine_decay_schedule(1.0, steps)(n), 0.9)


def tuned_run(s: Setup) -> Any:
    """`(λ_0, rate, λ's rate, key, data) -> (values at every training step, evaluations (e, 2), last values)`, compiled."""
    hyper = stn(draw(s.widths), len(SPECS))

    def tuner(rate: Any, lam_rate: Any) -> Any:
        return self_tuning(
            apply, hyper, SPECS,
            train_loss=lambda m, b, values, k: regularised(m.apply, b, values, k, squares(m.params())),
            valid_loss=lambda m, b: cross_entropy(m.apply(b[0]), b[1]),
            optimisers=(rule(rate, 2 * s.cycles), optax.adam(lam_rate), optax.adam(lam_rate)), tau=s.tau,
        )  # fmt: skip

    run = stn_bench.tuned_run(tuner, SPECS, evaluated, cycles=s.cycles, batch=s.batch, evaluations=s.evaluations)
    return jax.jit(run)


def plain_run(s: Setup, steps: int) -> Any:
    """`(values (steps, n), rate, key, data) -> evaluations (e, 2)`, compiled."""
    loss = lambda p, batch, values, key: regularised(lambda *x: apply(p, *x), batch, values, key, squares(p))
    run = stn_bench.plain_run(
        draw(s.widths), rule, loss, SPECS, evaluated, steps=steps, batch=s.batch, evaluations=s.evaluations
    )
    return jax.jit(run)


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
    rates = stn_bench.rates_of(
        s.rates,
        s.own_rates,
        s.lam_rates,
        lambda rates: [whole(fixed(at(first), steps), r, key, data) for r in rates],
        lambda rates: [eighth(fixed(at(first), short), r, key, data) for r in rates],
        lambda r, q: tune(first, r, q, key, data)[1],
    )

    losses: dict[str, list[float]] = {}
    paths, ends = [], []
    for seed in range(s.seeds):
        data, key = data_of(s, seed, parts), key_of(seed)
        path, found, last = tune(first, rates.own, rates.lam, key, data)
        paths.append(np.asarray(path[::2]))
        ends.append({"0.05": dict(zip(SPECS, map(float, last)))})
        if seed < s.start_seeds:
            for start in s.starts:
                begun = unconstrain(SPECS, {n: h.start for n, h in SPECS.items()} | dict.fromkeys(DROPOUTS, start))
                ends[-1][f"{start:g}"] = dict(zip(SPECS, map(float, tune(begun, rates.own, rates.lam, key, data)[2])))
        short_run = lambda lam, d=data, k=key: eighth(fixed(at(lam), short), rates.short, k, d)
        whole_run = lambda values, d=data, k=key: whole(values, rates.plain, k, d)
        here = {
            "STN": chosen(found),
            "λ held": chosen(tune(first, rates.own, 0.0, key, data)[1]),
            "start values": chosen(whole_run(fixed(at(first), steps))),
            "final values": chosen(whole_run(fixed(last, steps))),
            "schedule": chosen(whole_run(path[:steps])),
            "random": min(chosen(short_run(p)) for p in SPACE.random(s.search, seed)),
            "grid": min(chosen(short_run(p)) for p in SPACE.grid(s.search)),
            "Bayes": SPACE.bayes(short_run, s.search, seed, worst=3.0),
            "random, full": min(chosen(whole_run(fixed(at(p), steps))) for p in SPACE.random(s.search, seed)),
        }
        for name, (_, test) in here.items():
            losses.setdefault(name, []).append(test)
        print(f"seed {seed}:", {n: round(t, 4) for n, (_, t) in here.items()}, flush=True)

    rows = stn_bench.rows_of(losses)
    gap = lambda name: below(losses, "STN", name)
    over_start, replay = gap("start values"), below(losses, "schedule", "final values")
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
        stn_bench.bands(axes, {n: np.stack([p[:, i] for p in paths]) for i, n in enumerate(DROPOUTS)})
        other = axes.twinx()
        other.plot(np.stack([p[:, 3] for p in paths]).mean(0), "k:", label="hole, pixels")
        axes.set(xlabel="cycle", ylabel="dropout rate")
        other.set(ylabel="pixels")
        axes.legend(fontsize=7, loc="upper left")
        other.legend(fontsize=7, loc="lower right")

    study.finish(
        "stn", args, paper="MacKay et al.: Self-Tuning Networks, ICLR 2019", setup=s, rows=rows, claims=claims, began=began,
        figure=figure, last_values=ends, rates=rates._asdict(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
