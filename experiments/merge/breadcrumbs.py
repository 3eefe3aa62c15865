"""Model Breadcrumbs (Davari and Belilovsky, ECCV 2024) in small: sparse task vectors; hyperparameters of few tasks for many.

    python experiments/merge/breadcrumbs.py            all of it: eight to twelve minutes on one core
    python experiments/merge/breadcrumbs.py --smoke    every part once in small; writes nothing unless --out is given

The time is an estimate from operation counts: four to six minutes of training, half of it for networks that `atlas.py`
trains as well and that are then in the cache, the rest for merges.

Eight domains of Fashion-MNIST (four turns, plain and inverted; `zoo.py`) and a perceptron (784-512-512) that saw 500
pictures of each; its encoder is fine-tuned on 6000 pictures of one domain at one of two rates, 3e-4 for large task vectors
and 1e-4 for small ones, with the common head frozen. T = 2, 4, 8 domains, drawn by the seed, the fewer among the more, are
merged; the measure is the mean over the merged tasks of accuracy over that of the domain's own network. Seeds draw the
pictures, the start, the networks and the tasks.

    base                nothing is merged: the bench is hard, and it comes close
    average             alpha = 1 / T
    task arithmetic     alpha
    DARE                alpha and p (0.5, 0.9), summed
    TIES                alpha and keep (0.1, 0.2, 0.4)
    breadcrumbs, leaf   alpha, keep (0.1, 0.2), drop_top (0.002, 0.01), ranked within each leaf: the paper's layer
    breadcrumbs, row    the same, ranked within each output's row of inputs, as the released code does

Every merge is a line theta0 + alpha d, with one grid of alpha for all. "Re-tuned": all hyperparameters by the 500 validation
pictures a task of the seed, at each T. "Frozen": those of T = 2 at the other T. Test pictures are looked at once for each.

Stated before running, each to be reported as holding or not, by the mean of the paired differences over five seeds (1 to 7
are of the card, which has one seed of this bench; there rows were ranked in the first two):
  1. Large vectors, re-tuned: breadcrumbs by rows are better than task arithmetic at T = 2, 4 and 8.
  2. This difference is larger at T = 8 than at T = 2.
  3. Large vectors, re-tuned: breadcrumbs by leaves are better than task arithmetic at T = 2, 4 and 8.
  4. Small vectors, frozen, T = 8: breadcrumbs by leaves are at least 5 points better than task arithmetic.
  5. There breadcrumbs by rows are worse than task arithmetic.
  6. There TIES, a mean and not a sum, is better than all the others.
  7. Large vectors, T = 8: frozen hyperparameters cost every method at least 10 points of its re-tuned accuracy.
  8. Small vectors, re-tuned, T = 8: breadcrumbs by leaves are within one point of task arithmetic.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import jax
import jax.numpy as jnp
import numpy as np
import record
import study
import zoo

from jaxpeft.merge import breadcrumbs, dare, task_arithmetic, ties
from jaxpeft.merge.sparsify import Axis

ARITHMETIC, DARE, TIES, LEAF, ROW = "task arithmetic", "DARE", "TIES", "breadcrumbs, leaf", "breadcrumbs, row"
TUNED = (ARITHMETIC, DARE, TIES, LEAF, ROW)


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    bench: zoo.Zoo = dataclasses.field(default_factory=zoo.Zoo)
    large: float = 3e-4  # rates of fine-tuning
    small: float = 1e-4
    counts: tuple[int, ...] = (2, 4, 8)
    alphas: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5)
    keeps: tuple[float, ...] = (0.1, 0.2)
    drops: tuple[float, ...] = (0.002, 0.01)
    trims: tuple[float, ...] = (0.1, 0.2, 0.4)  # what TIES keeps
    ps: tuple[float, ...] = (0.5, 0.9)
    seeds: int = 5


SMOKE = Setup(
    zoo.SMALL, counts=(2, 4), alphas=(0.3, 1.0), keeps=(0.2,), drops=(0.01,), trims=(0.2,), ps=(0.5,), seeds=2
)


class World(NamedTuple):
    """One seed's pictures and networks."""

    parts: dict[str, zoo.Images]
    base: Any
    encoders: Any  # leaves (8, ...)
    own: dict[str, Any]  # split -> (8,), accuracies of the domains' own networks


class Candidate(NamedTuple):
    """A merge but for alpha: its hyperparameters, and the encoder at alpha = 1."""

    hyper: dict[str, float]
    encoder: Any


class Choice(NamedTuple):
    """The places of a candidate and of an alpha."""

    candidate: int
    alpha: int


def world(s: Setup, rate: float, seed: int, keep: bool) -> World:
    bench = dataclasses.replace(s.bench, rate=rate)
    parts, runs = zoo.domains(bench, seed), zoo.one_each(bench)
    base = zoo.pretrained(bench, seed, parts, keep)
    models = zoo.fine_tuned(bench, seed, parts, base, runs, keep)
    # At least chance, which networks of the smallest size may miss.
    own = {k: jnp.maximum(zoo.own_accuracy(models, parts[k], runs), 0.1) for k in ("validation", "test")}
    return World(parts, base, models["encoder"], own)


# -------------------------------------------------------------------------------------------------------------- merges


@jax.jit
def summed(base: Any, models: Any) -> Any:
    return task_arithmetic(base, models, alpha=1.0)


@jax.jit
def dropped(base: Any, models: Any, key: Any, p: Any) -> Any:
    return dare(base, models, key=key, p=p, alpha=1.0)


@jax.jit
def elected(base: Any, models: Any, keep: Any) -> Any:
    return ties(base, models, keep=keep, alpha=1.0)


@partial(jax.jit, static_argnames="axis")
def crumbs(base: Any, models: Any, keep: Any, drop_top: Any, axis: Axis) -> Any:
    return breadcrumbs(base, models, keep=keep, drop_top=drop_top, alpha=1.0, axis=axis, row=0)


def candidates(s: Setup, base: Any, models: Any, seed: int) -> dict[str, list[Candidate]]:
    """Of each method, all hyperparameters but alpha."""
    key = jax.random.fold_in(jax.random.key(seed), 11)
    sparse = [{"keep": k, "drop_top": d} for k in s.keeps for d in s.drops]
    axes: dict[str, Axis] = {LEAF: "leaf", ROW: "row"}
    return {
        ARITHMETIC: [Candidate({}, summed(base, models))],
        DARE: [Candidate({"p": p}, dropped(base, models, key, p)) for p in s.ps],
        TIES: [Candidate({"keep": k}, elected(base, models, k)) for k in s.trims],
        **{n: [Candidate(h, crumbs(base, models, **h, axis=axis)) for h in sparse] for n, axis in axes.items()},
    }


@jax.jit
def along(base: Any, encoder: Any, part: zoo.Images, alphas: Any) -> jax.Array:
    """(A, T): networks at theta0 + alpha (encoder - theta0) on T tasks.

    The first layer, where most operations are, is affine in alpha: two products do for all.
    """
    start, change = base["encoder"], jax.tree.map(jnp.subtract, encoder, base["encoder"])

    def task(p: zoo.Images) -> Any:
        x = p.image.reshape(len(p.label), -1).astype(jnp.float32) / 255
        z, dz = (x @ layer["kernel"] + layer["bias"] for layer in (start["layer_0"], change["layer_0"]))

        def at(a: Any) -> Any:
            h = jax.nn.relu(z + a * dz)
            for i in range(1, len(start)):
                layer = jax.tree.map(lambda w, d: w + a * d, start[f"layer_{i}"], change[f"layer_{i}"])
                h = jax.nn.relu(h @ layer["kernel"] + layer["bias"])
            return ((h @ base["head"]["kernel"] + base["head"]["bias"]).argmax(-1) == p.label).mean()

        return jax.lax.map(at, alphas)

    return jax.lax.map(task, part).T


# ----------------------------------------------------------------------------------------------------------- measuring


class Measured(NamedTuple):
    """What one seed of one size of vectors gives.

    Attributes:
      scores: (method, T, "re-tuned" or "frozen") -> normalised test accuracy.
      chosen: (method, T) -> hyperparameters.
      curves: method -> validation accuracy over alpha (A,), at the most tasks and the candidate chosen there.
      points: method -> ((alpha, accuracy) re-tuned, the same frozen), there.
    """

    scores: dict[tuple[str, int, str], float]
    chosen: dict[tuple[str, int], dict[str, float]]
    curves: dict[str, np.ndarray]
    points: dict[str, tuple[tuple[float, float], tuple[float, float]]]


def measured(s: Setup, w: World, seed: int) -> Measured:
    out = Measured({}, {}, {}, {})
    few: dict[str, Choice] = {}
    order = np.random.default_rng([seed, 3]).permutation(len(s.bench.kinds))
    for count in s.counts:
        tasks = jnp.asarray(np.sort(order[:count]))
        of = lambda tree, tasks=tasks: jax.tree.map(lambda x: x[tasks], tree)
        # Rows over alpha: the mean over the tasks of the accuracy by that of the own networks.
        score = lambda encoder, split, alphas, of=of: np.asarray(
            (along(w.base, encoder, of(w.parts[split]), jnp.asarray(alphas, jnp.float32)) / of(w.own[split])).mean(1)
        )
        found = candidates(s, w.base["encoder"], of(w.encoders), seed)
        plain = found[ARITHMETIC][0].encoder
        for name, alpha in (("base", 0.0), ("average", 1 / count)):
            out.scores[name, count, "re-tuned"] = float(score(plain, "test", [alpha])[0])
        for name in TUNED:
            grid = np.stack([score(c.encoder, "validation", s.alphas) for c in found[name]])
            best = Choice(*(int(i) for i in np.unravel_index(grid.argmax(), grid.shape)))
            frozen = few.setdefault(name, best)
            at = {"re-tuned": best} if count == s.counts[0] else {"re-tuned": best, "frozen": frozen}
            for way, c in at.items():
                value = score(found[name][c.candidate].encoder, "test", [s.alphas[c.alpha]])[0]
                out.scores[name, count, way] = float(value)
            out.chosen[name, count] = {"alpha": s.alphas[best.alpha], **found[name][best.candidate].hyper}
            if count == s.counts[-1]:
                out.curves[name] = grid[best.candidate]
                first, second = ((s.alphas[c.alpha], float(grid[c])) for c in (best, frozen))
                out.points[name] = (first, second)
    return out


# -------------------------------------------------------------------------------------------------- tables and claims


def table(s: Setup, found: dict[str, list[Measured]]) -> list[dict[str, Any]]:
    """A row a method and size of vectors, T and ways side by side."""
    rows = []
    for size, seeds in found.items():
        for name in ("base", "average", *TUNED):
            scores = {
                f"T={n}{'' if way == 're-tuned' else ' frozen'}": [m.scores[name, n, way] for m in seeds]
                for way in ("re-tuned", "frozen")
                for n in s.counts
                if (name, n, way) in seeds[0].scores
            }
            chosen = {f"T={n}": [m.chosen[name, n] for m in seeds] for n in s.counts if name in TUNED}
            rows.append(
                {
                    "method": f"{name}, {size} vectors",
                    "mean": {k: statistics.mean(v) for k, v in scores.items()},
                    "std": {k: statistics.stdev(v) for k, v in scores.items()},
                    "details": {"test": scores, "chosen": chosen},
                }
            )
    # The first row's columns are the table's.
    columns = [f"T={n}" for n in s.counts] + [f"T={n} frozen" for n in s.counts[1:]]
    for row in rows:
        row["mean"], row["std"] = ({c: row[k].get(c) for c in columns} for k in ("mean", "std"))
    return rows


def claims(s: Setup, found: dict[str, list[Measured]]) -> list[dict[str, str]]:
    most, every = s.counts[-1], ", ".join(map(str, s.counts))
    of = lambda size, name, n=most, way="re-tuned": {"test": [m.scores[name, n, way] for m in found[size]]}
    frozen = lambda name: of("small", name, way="frozen")

    def all_over(text: str, name: str) -> dict[str, str]:
        gaps = {n: study.difference(of("large", name, n), of("large", ARITHMETIC, n)) for n in s.counts}
        told = "; ".join(f"T={n}: {m:+.2f} ± {h:.2f}" for n, (m, h) in gaps.items())
        return record.claim(text, all(m > 0 for m, _ in gaps.values()), f"{told} points")

    def gap(n: int) -> dict[str, list[float]]:
        rows = zip(of("large", ROW, n)["test"], of("large", ARITHMETIC, n)["test"])
        return {"test": [a - b for a, b in rows]}

    growth, growth_half = study.difference(gap(most), gap(s.counts[0]))
    under, under_half = study.difference(frozen(ARITHMETIC), frozen(ROW))
    best = {n: study.difference(frozen(TIES), frozen(n)) for n in TUNED if n != TIES}
    costs = {n: study.difference(of("large", n), of("large", n, way="frozen")) for n in TUNED}
    level, level_half = study.difference(of("small", LEAF), of("small", ARITHMETIC))
    told = lambda gaps: "; ".join(f"{n}: {m:+.2f} ± {h:.2f}" for n, (m, h) in gaps.items()) + " points"
    return [
        all_over(f"Large vectors, re-tuned: breadcrumbs by rows beat task arithmetic at T = {every}", ROW),
        record.claim(
            f"Their difference is larger at T = {most} than at T = {s.counts[0]}",
            growth > 0,
            f"{growth:+.2f} ± {growth_half:.2f} points",
        ),
        all_over(f"Large vectors, re-tuned: breadcrumbs by leaves beat task arithmetic at T = {every}", LEAF),
        study.at_least(
            f"Small vectors, frozen, T = {most}: breadcrumbs by leaves are at least 5 points over task arithmetic",
            frozen(LEAF),
            frozen(ARITHMETIC),
            5,
        ),
        record.claim(
            f"Small vectors, frozen, T = {most}: breadcrumbs by rows are under task arithmetic",
            under > 0,
            f"task arithmetic - breadcrumbs: {under:+.2f} ± {under_half:.2f} points",
        ),
        record.claim(
            f"Small vectors, frozen, T = {most}: TIES is better than all the others",
            all(m > 0 for m, _ in best.values()),
            f"TIES less {told(best)}",
        ),
        record.claim(
            f"Large vectors, T = {most}: frozen hyperparameters cost every method at least 10 points",
            all(m >= 10 for m, _ in costs.values()),
            told(costs),
        ),
        record.claim(
            f"Small vectors, re-tuned, T = {most}: breadcrumbs by leaves are within one point of task arithmetic",
            abs(level) <= 1,
            f"{level:+.2f} ± {level_half:.2f} points",
        ),
    ]


def drawing(s: Setup, found: dict[str, list[Measured]]) -> Callable[[Any], None]:
    """Accuracy over alpha at the most tasks: a dot where it was tuned there, a cross where at the fewest."""

    def draw(axes: Any) -> None:
        fig = axes.figure
        axes.remove()
        for panel, (size, seeds) in zip(fig.subplots(1, 2, sharey=True), found.items()):
            for name in TUNED:
                mean = 100 * np.mean([m.curves[name] for m in seeds], 0)
                (line,) = panel.plot(s.alphas, mean, label=name)
                for i, marker in enumerate("ox"):
                    at, value = np.mean([m.points[name][i] for m in seeds], 0)
                    panel.plot(at, 100 * value, marker, color=line.get_color())
            panel.set(title=f"{size} task vectors, T = {s.counts[-1]}", xlabel="alpha", xlim=(0, max(s.alphas)))
        fig.axes[0].set_ylabel("normalised accuracy, % (validation)")
        fig.axes[0].legend(title=f"o tuned here, x at T = {s.counts[0]}", fontsize=7, title_fontsize=7)

    return draw


def main() -> None:
    args = study.arguments("Model Breadcrumbs in small; see the file's first lines.")
    s, began = SMOKE if args.smoke else Setup(), time.perf_counter()
    found: dict[str, list[Measured]] = {}
    for size, rate in (("large", s.large), ("small", s.small)):
        for seed in range(s.seeds):
            found.setdefault(size, []).append(measured(s, world(s, rate, seed, keep=not args.smoke), seed))
            print(f"{size} vectors, seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    rows = table(s, found)
    for row in rows:
        print(f"{row['method']:34}", {k: v and round(100 * v, 2) for k, v in row["mean"].items()}, flush=True)
    study.finish(
        "breadcrumbs",
        args,
        paper="Model Breadcrumbs, Davari and Belilovsky, ECCV 2024",
        setup=s,
        rows=rows,
        claims=claims(s, found),
        began=began,
        figure=drawing(s, found),
    )


if __name__ == "__main__":
    main()
