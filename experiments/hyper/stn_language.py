"""Self-tuning networks (MacKay et al., ICLR 2019) on a small recurrent language model, and what a schedule of dropout is worth.

    python experiments/hyper/stn_language.py            all of it: 15 to 25 minutes on one core, by operations
    python experiments/hyper/stn_language.py --smoke    every part once in small; writes nothing unless --out is given

English manual pages, 80/10/10 by whole pages in each seed's order, as lower-case words (all numbers are one) in windows of 32:
512 to train on (16,400 words, so that regularisation matters), 128 for validation, 256 for the test. The 999 most frequent
words of training are told apart, all others are one. An LSTM of width 64 between an embedding and an output layer of its own,
each window from an empty state. Tuned are three dropout rates (0 to 0.9, from 0.05), each with one mask for a whole window: of
the embeddings, of the state that goes back into the cell and of the output; and the logarithms of two penalties' weights (from
-3), on the squared output and on its squared change from word to word. STN: 256 cycles of two training steps and one
validation step of 16 windows, a twentieth of them without validation steps (warm-up); noise of scale 1, not tuned, as in the
reference's LSTM. "λ held" is the same run with λ at its start: a response has twice the parameters, and gates times λ learn
faster than weights, which is no tuning. The others train ordinary networks of that size for as many training steps:

    start values      fixed throughout
    final values      fixed at STN's last ones
    schedule          STN's values, replayed step by step
    random, grid, Bayes    8 runs of an eighth of STN's steps each: values drawn; two of each of three kinds (dropouts are one);
                           proposed one by one (Gaussian process, expected improvement) after four at random

Then once more with the output's dropout as the only one tuned, the others at their starts: STN; its last value; its schedule;
rates fixed at 0.05, 0.2, 0.4 and 0.6, the best of which by validation is "best fixed".

Adam, clipped, a cosine; its rate for whole and for short runs each out of a grid, and STN's with that of λ (Adam) out of
another, by the validation loss of a seed that is not measured. Whole runs are evaluated 16 times, short ones as densely; what
counts is the test loss, in nats a word, where a run's validation loss is least (of a search, over all its runs). Five seeds
draw pages, windows, starts and noise.

Stated before running, each to be reported as holding or not, by means over seeds (paired differences of test losses):
  1. STN is below the start values, its 95 % interval without zero.
  2. STN is below itself with λ held.
  3. STN is at most random search at equal steps.
  4. STN is at most grid and Bayesian search at equal steps.
  5. The schedule replayed is better than its last values fixed. (Fragile, as in stn.py.)
  6. The output's dropout alone: STN is below the best fixed rate.
  7. Alone: the schedule replayed is better than its last value fixed. (The paper's finding on this model; fragile.)
  8. Alone: a plain network with the schedule has at most 1.02 of STN's perplexity. (In the paper 1.01.)

Small against the paper's: two layers of 650 on a million words, tied embeddings, a state carried along the text, DropConnect on
the recurrent weights (here dropout of the state, of which each example has a rate), SGD, and many more steps. Its validation
loss has the penalties in it, without a slope; this one has not.
"""

import collections
import dataclasses
import math
import re
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

from jaxpeft.hyper import dropout, self_tuning, stn
from jaxpeft.tune import Hyperparameter, constrain, unconstrain

SPECS = {
    "input": Hyperparameter(0.05, 0.0, 0.9),
    "hidden": Hyperparameter(0.05, 0.0, 0.9),
    "output": Hyperparameter(0.05, 0.0, 0.9),
    "log activation": Hyperparameter(-3.0, shared=True),
    "log change": Hyperparameter(-3.0, shared=True),
}
DROPOUTS, PENALTIES = ("input", "hidden", "output"), ("log activation", "log change")
ALONE = {"output": SPECS["output"]}
STARTS = np.array([h.start for h in SPECS.values()], np.float32)
SPACE = Space(
    SPECS,
    dict.fromkeys(DROPOUTS, 0.01) | dict.fromkeys(PENALTIES, -6.0),
    dict.fromkeys(DROPOUTS, 0.7) | dict.fromkeys(PENALTIES, 1.0),
    DROPOUTS,
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    width: int = 64
    words: int = 1000  # the first stands for all that are not among them
    length: int = 32
    windows: tuple[int, int, int] = (512, 128, 256)  # training, validation, test
    rows: int = 64  # windows evaluated at a time
    cycles: int = 256  # of two training steps and one validation step
    batch: int = 16
    evaluations: int = 16
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    own_rates: tuple[float, ...] = (3e-3, 1e-2)  # STN's
    lam_rates: tuple[float, ...] = (1e-2, 3e-2)
    fixed: tuple[float, ...] = (0.2, 0.4, 0.6)  # of the output's dropout alone, beside its start
    search: int = 8
    scale: float = 1.0
    seeds: int = 5


SMOKE = Setup(
    width=8, words=20, length=5, windows=(16, 4, 4), rows=2, cycles=8, batch=4, evaluations=2, rates=(1e-2,), own_rates=(1e-2,),
    lam_rates=(1e-2,), fixed=(0.4,), search=4, seeds=2,
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- the network


def draw(s: Setup) -> Any:
    """`key -> params`."""

    def init(key: Any) -> Any:
        h, v = s.width, s.words
        shapes = {"embedding": (v, h), "in": (h, 4 * h), "back": (h, 4 * h), "out": (h, v)}
        bound = lambda name: 0.1 if name == "embedding" else h**-0.5
        w = {
            n: jax.random.uniform(k, shape, minval=-bound(n), maxval=bound(n))
            for (n, shape), k in zip(shapes.items(), jax.random.split(key, len(shapes)))
        }
        return {
            "table": {"embedding": w["embedding"]},
            "in": {"kernel": w["in"], "bias": jnp.zeros(4 * h)},
            "back": {"kernel": w["back"]},
            "out": {"kernel": w["out"], "bias": jnp.zeros(v)},
        }

    return init


def apply(params: Any, ids: Any, masks: Any = None) -> Any:
    """Of words (b, t): logits (b, t, v), the masked outputs and the outputs (b, t, h); `masks` (b, 3, h) by `DROPOUTS`."""
    width = params["back"]["kernel"].shape[0]
    masks = jnp.ones((len(ids), 3, width)) if masks is None else masks
    x = jnp.take(params["table"]["embedding"], ids, axis=0) * masks[:, None, 0]
    gates = x @ params["in"]["kernel"] + params["in"]["bias"]

    def step(state: Any, gates: Any) -> Any:
        h, c = state
        read, forget, new, write = jnp.split(gates + (h * masks[:, 1]) @ params["back"]["kernel"], 4, -1)
        c = jax.nn.sigmoid(forget + 1) * c + jax.nn.sigmoid(read) * jnp.tanh(new)
        h = jax.nn.sigmoid(write) * jnp.tanh(c)
        return (h, c), h

    empty = jnp.zeros((len(ids), width))
    outputs = jax.lax.scan(step, (empty, empty), gates.swapaxes(0, 1))[1].swapaxes(0, 1)
    masked = outputs * masks[:, None, 2]
    return masked @ params["out"]["kernel"] + params["out"]["bias"], masked, outputs


def cross_entropy(logits: Any, y: Any) -> Any:
    """In nats a word. (By a product: the gradient of a look-up is a loop on CPUs.)"""
    return optax.softmax_cross_entropy(logits, jax.nn.one_hot(y, logits.shape[-1])).mean()


def regularised(s: Setup, run: Any, batch: Any, values: Any, key: Any) -> Any:
    """The training loss; `run(ids, masks)` is the network. What has no value is at its start."""
    ids, targets = batch
    strength = {n: values.get(n, jnp.full(len(ids), h.start)) for n, h in SPECS.items()}
    whole = jnp.ones((len(ids), s.width))
    masks = [dropout(k, whole, strength[n]) for n, k in zip(DROPOUTS, jax.random.split(key, 3))]
    logits, masked, outputs = run(ids, jnp.stack(masks, 1))
    penalties = jnp.square(masked).mean(), jnp.square(jnp.diff(outputs, axis=1)).mean()
    return cross_entropy(logits, targets) + sum(jnp.exp(strength[n][0]) * p for n, p in zip(PENALTIES, penalties))


def evaluated(s: Setup) -> Any:
    """`(params, data) -> (2,)`, the losses on validation and test windows."""

    def loss(params: Any, part: Any) -> Any:
        rows = jax.tree.map(lambda x: x.reshape(-1, s.rows, s.length), part)
        return jax.lax.map(lambda b: cross_entropy(apply(params, b[0])[0], b[1]), rows).mean()

    return lambda params, data: jnp.stack([loss(params, data[k]) for k in ("validation", "test")])


# ------------------------------------------------------------------------------------------------------------------- runs


def rule(rate: Any, steps: int) -> Any:
    schedule = optax.cosine_decay_schedule(1.0, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lambda n: rate * schedule(n)))


def tuned_run(s: Setup, specs: Any) -> Any:
    """`(λ_0, rate, λ's rate, key, data) -> (values at every training step, evaluations (e, 2), last values)`, compiled."""
    hyper = stn(draw(s), len(specs), embeddings="**/embedding", scale=False)

    def tuner(rate: Any, lam_rate: Any) -> Any:
        return self_tuning(
            apply, hyper, specs,
            train_loss=lambda m, b, values, k: regularised(s, m.apply, b, values, k),
            valid_loss=lambda m, b: cross_entropy(m.apply(b[0])[0], b[1]),
            optimisers=(rule(rate, 2 * s.cycles), optax.adam(lam_rate), optax.identity()), scale=s.scale, tune_scales=False,
        )  # fmt: skip

    run = stn_bench.tuned_run(tuner, specs, evaluated(s), cycles=s.cycles, batch=s.batch, evaluations=s.evaluations)
    return jax.jit(run)


def plain_runs(s: Setup, steps: int) -> Any:
    """`(values (r, steps, n), rates (r,), key, data) -> evaluations (r, e, 2)`, compiled; runs side by side."""
    loss = lambda p, batch, values, key: regularised(s, lambda *x: apply(p, *x), batch, values, key)
    count = max(1, s.evaluations * steps // (2 * s.cycles))
    run = stn_bench.plain_run(draw(s), rule, loss, SPECS, evaluated(s), steps=steps, batch=s.batch, evaluations=count)
    return jax.jit(jax.vmap(run, (0, 0, None, None)))


def held(values: Any, steps: int) -> np.ndarray:
    """The schedule (steps, n) that stays at `values`."""
    return np.tile(np.asarray(values, np.float32), (steps, 1))


def with_output(values: Any, steps: int) -> np.ndarray:
    """The schedule (steps, n) with these dropout rates of the output, the others at their starts."""
    schedule = held(STARTS, steps)
    schedule[:, list(SPECS).index("output")] = values
    return schedule


def at(lam: Any) -> np.ndarray:
    """The values that λ means."""
    return np.asarray(constrain(SPECS, jnp.asarray(lam, jnp.float32)))


# ------------------------------------------------------------------------------------------------------------------ all


def windows_of(stream: np.ndarray, length: int, count: int, rng: Any) -> np.ndarray:
    """Words (count, length): windows of the stream side by side, at random."""
    found = re.findall(r"[a-z]+|\d+", stream.tobytes().decode().lower())
    words = np.array(["0" if w[0].isdigit() else w for w in found])
    windows = words[: len(words) // length * length].reshape(-1, length)
    if len(windows) < count:
        raise ValueError(f"{len(windows)} windows of {length} words, and {count} wanted")
    return windows[rng.permutation(len(windows))[:count]]


def data_of(s: Setup, seed: int) -> Any:
    """Split -> (words (n, t), the words that follow (n, t)), numbered by how frequent they are in training."""
    rng, pages = np.random.default_rng([seed, 5]), bases.pages("en", seed)
    parts = {k: windows_of(pages[k], s.length + 1, n, rng) for k, n in zip(("train", "validation", "test"), s.windows)}
    common = collections.Counter(parts["train"].ravel().tolist()).most_common(s.words - 1)
    number = {w: i for i, (w, _) in enumerate(common, 1)}
    out = {}
    for name, part in parts.items():
        ids = np.array([number.get(w, 0) for w in part.ravel().tolist()], np.int32).reshape(part.shape)
        out[name] = jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:])
    return out


def main() -> None:
    began, args = time.perf_counter(), study.arguments((__doc__ or "").splitlines()[0])
    jax.config.update("jax_disable_most_optimizations", args.smoke)  # a smoke run is all compiling
    s = SMOKE if args.smoke else Setup()
    steps, short = 2 * s.cycles, 3 * s.cycles // s.search
    tune, tune_alone, whole, eighth = (
        tuned_run(s, SPECS),
        tuned_run(s, ALONE),
        plain_runs(s, steps),
        plain_runs(s, short),
    )
    key_of = lambda seed: jax.random.fold_in(jax.random.key(29), seed)
    first, first_alone = unconstrain(SPECS), unconstrain(ALONE)

    data, key = data_of(s, 1000), key_of(1000)
    rates = stn_bench.rates_of(
        s.rates,
        s.own_rates,
        s.lam_rates,
        lambda rates: whole(np.stack([held(STARTS, steps)] * len(rates)), jnp.array(rates), key, data),
        lambda rates: eighth(np.stack([held(STARTS, short)] * len(rates)), jnp.array(rates), key, data),
        lambda r, q: tune(first, r, q, key, data)[1],
    )

    losses: dict[str, list[float]] = {}
    paths, paths_alone, ends, best_rates, unknown = [], [], [], [], []
    for seed in range(s.seeds):
        data, key = data_of(s, seed), key_of(seed)
        unknown.append({k: float((y == 0).mean()) for k, (_, y) in data.items()})
        path, found, last = tune(first, rates.own, rates.lam, key, data)
        path_alone, found_alone, last_alone = tune_alone(first_alone, rates.own, rates.lam, key, data)
        paths.append(np.asarray(path[::2]))
        paths_alone.append(np.asarray(path_alone[::2, 0]))
        ends.append(dict(zip(SPECS, map(float, last))) | {"output, alone": float(last_alone[0])})

        outputs = {f"output {r:g}": with_output(r, steps) for r in s.fixed}
        schedules = {
            "start values": held(STARTS, steps),
            "final values": held(last, steps),
            "schedule": np.asarray(path),
            "final value, alone": with_output(last_alone[0], steps),
            "schedule, alone": with_output(np.asarray(path_alone[:, 0]), steps),
            **outputs,
        }
        evaluations = whole(np.stack([*schedules.values()]), jnp.full(len(schedules), rates.plain), key, data)
        plain = {n: chosen(e) for n, e in zip(schedules, evaluations)}
        short_runs = lambda points, k=key, d=data: eighth(
            np.stack([held(at(p), short) for p in points]), jnp.full(len(points), rates.short), k, d
        )
        best = min(("start values", *outputs), key=lambda n, plain=plain: plain[n])
        best_rates.append(best)
        here = {
            "STN": chosen(found),
            "λ held": chosen(tune(first, rates.own, 0.0, key, data)[1]),
            **{n: plain[n] for n in ("start values", "final values", "schedule")},
            "random": min(map(chosen, short_runs(SPACE.random(s.search, seed)))),
            "grid": min(map(chosen, short_runs(SPACE.grid(s.search)))),
            "Bayes": SPACE.bayes(lambda p, f=short_runs: f([p])[0], s.search, seed, worst=math.log(s.words)),
            "STN, alone": chosen(found_alone),
            **{n: plain[n] for n in ("final value, alone", "schedule, alone", *outputs)},
            "best fixed": plain[best],
        }
        for name, (_, test) in here.items():
            losses.setdefault(name, []).append(test)
        print(f"seed {seed}:", {n: round(t, 4) for n, (_, t) in here.items()}, flush=True)

    rows = [{**row, "perplexity": math.exp(row["test_loss"])} for row in stn_bench.rows_of(losses)]
    gap = lambda name: below(losses, "STN", name)
    alone = below(losses, "STN, alone", "best fixed")
    replay, replay_alone = (
        below(losses, f"schedule{end}", final)
        for end, final in (("", "final values"), (", alone", "final value, alone"))
    )
    ratio = math.exp(statistics.mean(losses["schedule, alone"]) - statistics.mean(losses["STN, alone"]))
    over_start, over_held = gap("start values"), gap("λ held")
    claims = [
        record.claim("STN is below the start values", over_start[0] - over_start[1] > 0, f"by {told(over_start)}"),
        record.claim("STN is below itself with λ held", over_held[0] > 0, f"by {told(over_held)}"),
        record.claim(
            "STN is at most random search at equal steps", gap("random")[0] >= 0, f"below by {told(gap('random'))}"
        ),
        record.claim(
            "STN is at most grid and Bayesian search at equal steps",
            min(gap("grid")[0], gap("Bayes")[0]) >= 0,
            f"below grid by {told(gap('grid'))}, below Bayes by {told(gap('Bayes'))}",
        ),
        record.claim("The schedule replayed is better than its last values fixed", replay[0] > 0, f"by {told(replay)}"),
        record.claim("The output's dropout alone: STN is below the best fixed rate", alone[0] > 0, f"by {told(alone)}"),
        record.claim(
            "Alone: the schedule replayed is better than its last value fixed",
            replay_alone[0] > 0,
            f"by {told(replay_alone)}",
        ),
        record.claim(
            "Alone: a plain network with the schedule has at most 1.02 of STN's perplexity",
            ratio <= 1.02,
            f"{ratio:.3f} of it",
        ),
    ]

    def figure(axes: Any) -> None:
        of = lambda name: np.stack([p[:, list(SPECS).index(name)] for p in paths])
        stn_bench.bands(axes, {n: of(n) for n in DROPOUTS} | {"output, tuned alone": np.stack(paths_alone)})
        other = axes.twinx()
        for name, style in zip(PENALTIES, ("k:", "k--")):
            other.plot(of(name).mean(0), style, label=name)
        axes.set(xlabel="cycle", ylabel="dropout rate")
        other.set(ylabel="log weight of a penalty")
        axes.legend(fontsize=7, loc="upper left")
        other.legend(fontsize=7, loc="lower right")

    study.finish(
        "stn-language", args, paper="MacKay et al.: Self-Tuning Networks, ICLR 2019", setup=s, rows=rows, claims=claims,
        began=began, figure=figure, last_values=ends, best_fixed=best_rates, unknown_words=unknown,
        rates=rates._asdict(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
