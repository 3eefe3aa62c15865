"""aTLAS (Zhang et al., NeurIPS 2024), in small: one learned coefficient for each task vector and block of parameters.

    python experiments/merge/atlas.py            all of it: about ten minutes on one core
    python experiments/merge/atlas.py --smoke    every part once in small; writes nothing unless --out is given

Eight domains of Fashion-MNIST (four turns, plain and inverted; `zoo.py`). A perceptron (784-512-512) with a head is trained on
500 pictures of each; its encoder, of four blocks, is then fine-tuned on 6000 pictures of one domain, at a rate that makes
large task vectors, with the common head frozen. What is compared is normalised accuracy: a model's accuracy on a domain's
test pictures over that of the domain's own network, the mean over domains.

Addition: T = 2, 4, 8 task vectors (domains drawn by the seed). 500 validation pictures a task choose task arithmetic's
coefficient (0, 0.05, ... 1) or teach coefficients by AdamW (decay 0.1, clipped at 1, cosine, 150 steps of 64 pictures a task)
and choose among five epochs and the start. Few-shot: the target's own vector is left out of the eight; 1 to 64 pictures a
class teach the coefficients of the other seven, or the whole encoder, in 100 steps of 64; the epoch is chosen on the target's
validation pictures, in every arm. For each arm one rate of a grid by a tuning seed, on pictures kept for that; then five
seeds, each with a start and task vectors of its own, of which the test pictures are looked at once.

Stated before running, each to be reported as holding or not, by the mean of the paired differences over seeds:
  1. Addition: at T = 2, 4 and 8 aTLAS is better than learned isotropic coefficients.
  2. It is over one point better than tuned task arithmetic, at each T.
  3. It is better than the base without any merging, at each T.
  4. It makes more of biases than of weights: the mean |lam| of bias blocks is at least twice that of weights at T = 8.
  5. aTLAS x 8, eight random groups in each weight and no biases, is at least as good as isotropic coefficients at T = 8.
  6. Few-shot: with 1, 2 and 4 pictures a class aTLAS is better than fine-tuning the whole encoder.
  7. With 64 pictures a class fine-tuning is better.
"""

import dataclasses
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import study
import zoo

from jaxpeft import trees
from jaxpeft.merge import task_vectors
from jaxpeft.merge.atlas import compose, init_lam, partition_ids
from jaxpeft.merge.atlas_learning import adamw, addition_loss, best_epoch, fit_lam, multi_head

TUNING = 1000  # the seed that rates are chosen by


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    bench: zoo.Zoo = dataclasses.field(default_factory=lambda: zoo.Zoo(rate=3e-4))
    counts: tuple[int, ...] = (2, 4, 8)
    groups: int = 8
    shots: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
    targets: int = 2  # of each seed
    steps: int = 150
    few_steps: int = 100
    epochs: int = 5
    batch: int = 64
    rates: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    full_rates: tuple[float, ...] = (1e-5, 5e-5, 2.5e-4)
    seeds: int = 5


SMOKE = Setup(zoo.SMALL, (2,), 2, (1,), 1, 4, 4, 2, 8, (0.05,), (1e-4,), 2)


class World(NamedTuple):
    """One seed's pictures and networks; vectors are of the encoder, (8, ...)."""

    parts: dict[str, zoo.Images]
    base: Any
    vectors: Any
    own: dict[str, Any]  # split -> (8,), accuracies of the domains' own networks


def world(s: Setup, seed: int, keep: bool) -> World:
    parts, runs = zoo.domains(s.bench, seed), zoo.one_each(s.bench)
    base = zoo.pretrained(s.bench, seed, parts, keep)
    models = zoo.fine_tuned(s.bench, seed, parts, base, runs, keep)
    own = {split: zoo.own_accuracy(models, parts[split], runs) for split in ("validation", "selection", "test")}
    return World(parts, base, task_vectors(base["encoder"], models["encoder"]), own)


def of(tree: Any, rows: Any) -> Any:
    return jax.tree.map(lambda x: x[jnp.asarray(rows)], tree)


# ------------------------------------------------------------------------------------------------------------ learning


@functools.partial(jax.jit, static_argnames=("full", "epochs"))
def learned(
    start: Any,
    base: Any,
    vectors: Any,
    ids: Any,
    train: Any,
    rows: Any,
    check: Any,
    own: Any,
    rate: Any,
    full: bool,
    epochs: int,
) -> tuple[Any, Any]:
    """Coefficients, or with `full` the encoder itself, at the epoch that is best on `check`; and the network.

    `train` and `check` are pictures (T, n, ...) of T tasks, `rows` (steps, T, b) of the former; `own` (T,) normalises.
    """
    tasks, steps = rows.shape[1], rows.shape[0]
    head = lambda z: z @ base["head"]["kernel"] + base["head"]["bias"]
    run = multi_head(zoo.features, [head] * tasks)
    encoder = lambda x: x if full else compose(base["encoder"], vectors, x, ids=ids)

    def loss(x: Any, rows: Any) -> Any:
        image, label = ([part[t, rows[t]] for t in range(tasks)] for part in train)
        return addition_loss(run(encoder(x), image), label)

    fit = fit_lam(
        loss, start, rows, adamw(optax.cosine_decay_schedule(rate, steps)), steps=steps, every=steps // epochs
    )
    score = lambda x: (zoo.accuracy({**base, "encoder": encoder(x)}, check) / own).mean()
    best = of(fit.path, best_epoch(jax.lax.map(score, fit.path)))
    return best, {**base, "encoder": encoder(best)}


def normalised(w: World, params: Any, split: str, tasks: Any) -> float:
    return float((zoo.accuracy(params, of(w.parts[split], tasks)) / of(w.own[split], tasks)).mean())


class Learner(NamedTuple):
    """A way to learn: `start` and `ids` for T task vectors of a base, and its rates."""

    start: Any
    ids: Any
    rates: tuple[float, ...]
    full: bool = False


def learners(s: Setup, base: Any, count: int) -> dict[str, Learner]:
    encoder = base["encoder"]
    groups = partition_ids(jax.random.key(count), encoder, s.groups)
    return {
        "isotropic": Learner(jnp.zeros(count), None, s.rates),
        "aTLAS": Learner(init_lam(encoder, count), None, s.rates),
        f"aTLAS x {s.groups}": Learner(init_lam(encoder, count, groups=s.groups), groups, s.rates),
        "full fine-tuning": Learner(encoder, None, s.full_rates, full=True),
    }


def chosen_rate(scores: dict[float, float]) -> float:
    return max(scores, key=lambda r: scores[r])


# ------------------------------------------------------------------------------------------------------------ addition


def drawn_tasks(s: Setup, seed: int, count: int) -> np.ndarray:
    return np.sort(np.random.default_rng([seed, 3]).permutation(len(s.bench.kinds))[:count])


def added(s: Setup, w: World, seed: int, count: int, name: str, rate: float) -> tuple[Any, Any]:
    """Coefficients and the network of T task vectors learned together."""
    tasks, way = drawn_tasks(s, seed, count), learners(s, w.base, count)[name]
    n, rng = w.parts["validation"].label.shape[1], np.random.default_rng([seed, 4])
    rows = rng.integers(0, n, (s.steps, count, s.batch), np.int32)
    part = of(w.parts["validation"], tasks)
    return learned(
        way.start, w.base, of(w.vectors, tasks), way.ids, part, rows, part, of(w.own["validation"], tasks), rate, way.full,
        s.epochs,
    )  # fmt: skip


@jax.jit
def by_arithmetic(base: Any, vectors: Any, part: Any, own: Any, alphas: Any) -> tuple[Any, Any]:
    """The best of these coefficients for all vectors, and its network."""
    count = own.shape[0]
    at = lambda a: {**base, "encoder": compose(base["encoder"], vectors, jnp.full(count, a))}
    best = jnp.argmax(jax.lax.map(lambda a: (zoo.accuracy(at(a), part) / own).mean(), alphas))
    return alphas[best], at(alphas[best])


def addition(s: Setup, worlds: dict[int, World]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows by "method, T=n", and the mean |lam| of weights and biases."""
    rows, sizes = {}, {}
    for count in s.counts:
        test: dict[str, list[float]] = {}
        rates: dict[str, float] = {}
        for name in [n for n in learners(s, worlds[0].base, count) if n != "full fine-tuning"]:
            w, tasks = worlds[TUNING], drawn_tasks(s, TUNING, count)
            rates[name] = chosen_rate(
                {r: normalised(w, added(s, w, TUNING, count, name, r)[1], "selection", tasks) for r in s.rates}
            )
            for seed in range(s.seeds):
                lam, params = added(s, worlds[seed], seed, count, name, rates[name])
                got = normalised(worlds[seed], params, "test", drawn_tasks(s, seed, count))
                test.setdefault(name, []).append(got)
                if name == "aTLAS":
                    mean = lambda kind, lam=lam: float(
                        np.mean([np.abs(x).mean() for p, x in lam.items() if p.endswith(kind)])
                    )
                    sizes.setdefault(count, []).append({k: mean(k) for k in ("kernel", "bias")})
        for seed in range(s.seeds):
            w, tasks = worlds[seed], drawn_tasks(s, seed, count)
            plain = (w.base, of(w.vectors, tasks), of(w.parts["validation"], tasks), of(w.own["validation"], tasks))
            grids = {"base": [0.0], "average": [1 / count], "task arithmetic": np.arange(21) / 20}
            for name, grid in grids.items():
                _, params = by_arithmetic(*plain, jnp.asarray(grid, jnp.float32))
                test.setdefault(name, []).append(normalised(w, params, "test", tasks))
        for name, scores in test.items():
            way = learners(s, worlds[0].base, count).get(name)
            trained = 0 if way is None else trees.count(way.start)
            rows[f"{name}, T={count}"] = row(f"{name}, T={count}", scores, trained, rates.get(name))
    return rows, sizes


def row(name: str, scores: list[float], trained: int, rate: float | None) -> dict[str, Any]:
    std = statistics.stdev(scores) if len(scores) > 1 else 0.0
    mean = statistics.mean(scores)
    print(f"{name:32} {trained:>9,} trained  rate {rate or 0:<7g} {100 * mean:.2f} ± {100 * std:.2f}", flush=True)
    return {"method": name, "trained": trained, "rate": rate, "test": scores, "mean": mean, "std": std}


# ------------------------------------------------------------------------------------------------------------ few-shot


def few_shot(s: Setup, w: World, seed: int, target: int, shots: int, name: str, rate: float) -> Any:
    """The network for a target that has so many pictures a class, out of the other domains' task vectors."""
    others = [i for i in range(len(s.bench.kinds)) if i != target]
    way, part = learners(s, w.base, len(others))[name], of(w.parts["train"], [target])
    rng, label = np.random.default_rng([seed, target, 5]), np.asarray(part.label[0])
    # More shots hold the fewer: one order of each class, of which the first are taken.
    pool = np.concatenate([rng.permutation(np.flatnonzero(label == c))[:shots] for c in np.unique(label)])
    rows = rng.choice(pool, (s.few_steps, 1, s.batch)).astype(np.int32)
    check, own = of(w.parts["validation"], [target]), of(w.own["validation"], [target])
    return learned(
        way.start, w.base, of(w.vectors, others), way.ids, part, rows, check, own, rate, way.full, s.epochs
    )[1]  # fmt: skip


def few_shots(s: Setup, worlds: dict[int, World]) -> dict[str, Any]:
    """Rows by "method, k shots"; a seed's score is the mean over its targets."""
    kinds, rows = len(s.bench.kinds), {}
    targets = {seed: [(s.targets * seed + i) % kinds for i in range(s.targets)] for seed in worlds}
    start = [
        statistics.mean(normalised(worlds[seed], worlds[seed].base, "test", [t]) for t in targets[seed])
        for seed in range(s.seeds)
    ]
    rows["base, few-shot"] = row("base, few-shot", start, 0, None)
    for shots in s.shots:
        for name in ("isotropic", "aTLAS", "full fine-tuning"):
            way = learners(s, worlds[0].base, kinds - 1)[name]
            score = lambda seed, split, rate, name=name, shots=shots: statistics.mean(
                normalised(worlds[seed], few_shot(s, worlds[seed], seed, t, shots, name, rate), split, [t])
                for t in targets[seed]
            )
            rate = chosen_rate({r: score(TUNING, "selection", r) for r in way.rates})
            test = [score(seed, "test", rate) for seed in range(s.seeds)]
            rows[f"{name}, {shots} shots"] = row(f"{name}, {shots} shots", test, trees.count(way.start), rate)
    return rows


# -------------------------------------------------------------------------------------------------------------- claims


def compared(text: str, pairs: list[tuple[Any, Any]], points: float = 0.0) -> dict[str, str]:
    """The claim that in every pair of rows the first is better by more than so many points."""
    found = [(a["method"], *study.difference(a, b)) for a, b in pairs]
    return record.claim(
        text, all(m > points for _, m, _ in found), "; ".join(f"{n}: {m:+.2f} ± {h:.2f}" for n, m, h in found)
    )


def claims(s: Setup, rows: dict[str, Any], sizes: dict[Any, Any]) -> list[dict[str, str]]:
    every = ", ".join(map(str, s.counts))
    against = lambda other: [(rows[f"aTLAS, T={n}"], rows[f"{other}, T={n}"]) for n in s.counts]
    few = [n for n in s.shots if n <= 4]
    pair = lambda a, b, n: (rows[f"{a}, {n} shots"], rows[f"{b}, {n} shots"])
    last, most = s.counts[-1], s.shots[-1]
    kernels, biases = ([x[k] for x in sizes[last]] for k in ("kernel", "bias"))
    return [
        compared(f"Addition: aTLAS is better than isotropic coefficients at T = {every}", against("isotropic")),
        compared(
            f"It is over one point better than tuned task arithmetic at T = {every}", against("task arithmetic"), 1
        ),
        compared(f"It is better than the base at T = {every}", against("base")),
        record.claim(
            f"The mean |lam| of biases is at least twice that of weights at T = {last}",
            statistics.mean(biases) >= 2 * statistics.mean(kernels) > 0,
            f"{statistics.mean(biases):.2f} and {statistics.mean(kernels):.2f}",
        ),
        study.at_least(
            f"aTLAS x {s.groups}, without biases, is at least as good as isotropic coefficients at T = {last}",
            rows[f"aTLAS x {s.groups}, T={last}"],
            rows[f"isotropic, T={last}"],
        ),
        compared(
            f"Few-shot: aTLAS is better than fine-tuning the encoder with {', '.join(map(str, few))} pictures a class",
            [pair("aTLAS", "full fine-tuning", n) for n in few],
        ),
        compared(f"With {most} pictures a class fine-tuning is better", [pair("full fine-tuning", "aTLAS", most)]),
    ]


def main() -> None:
    args = study.arguments("aTLAS in small; see the file's first lines.")
    s, began = SMOKE if args.smoke else Setup(), time.perf_counter()
    worlds = {seed: world(s, seed, keep=not args.smoke) for seed in (*range(s.seeds), TUNING)}
    rows, sizes = addition(s, worlds)
    rows |= few_shots(s, worlds)

    def figure(axes: Any) -> None:
        for name in ("base", "task arithmetic", "isotropic", "aTLAS", f"aTLAS x {s.groups}"):
            found = [rows[f"{name}, T={n}"] for n in s.counts]
            means, stds = ([100 * r[k] for r in found] for k in ("mean", "std"))
            axes.errorbar(s.counts, means, stds, marker="o", capsize=3, label=name)
        axes.set(
            xscale="log", xlabel="task vectors", ylabel="normalised accuracy, %", xticks=s.counts, xticklabels=s.counts
        )
        axes.legend()

    study.finish(
        "atlas",
        args,
        paper="aTLAS, Zhang et al., NeurIPS 2024",
        setup=s,
        rows=list(rows.values()),
        claims=claims(s, rows, sizes),
        began=began,
        figure=figure,
        coefficients={str(n): x for n, x in sizes.items()},
    )


if __name__ == "__main__":
    main()
