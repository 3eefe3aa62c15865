"""Fisher merging (Matena and Raffel, NeurIPS 2022) in small: means of models, every parameter weighted by its information.

    python experiments/merge/fisher_merging.py            all of it: four to seven minutes on one core (an estimate)
    python experiments/merge/fisher_merging.py --smoke    every part once in small; writes nothing unless --out is given

Fashion-MNIST; a perceptron (784-128-128) with a head, trained on 3000 pictures. Its encoder is then fine-tuned, the common
head frozen, and encoders are merged: isotropic (F = 1) or by the diagonal of the exact Fisher information, from 200 of each
model's own training pictures, normalised, with the floor of 1e-6 for the target (`jaxpeft.merge.fisher_merging`). Two models
have 25 weights from the target alone to the donor alone; "best" is that of the highest accuracy on 500 validation pictures,
the nearest to the target where several are. The test is 5000 pictures of all ten classes, touched once a seed and arm.

    skills        A learned classes 0 to 4 (the target), B 5 to 9, each from 3000 pictures: "short", 6 epochs at 1e-3, and
                  "long", 12 at 3e-3. Arms: A, B, isotropic and Fisher at the best weight and at one half, logit ensemble.
    ensembling    five models of all classes from 2000 pictures each that no two share, 6 epochs at 1e-3, weights of 1/5.
                  Arms: the mean of single models, isotropic, Fisher, logit ensemble.
    stranger      the first of the five (the target) and a model of 2000 pictures turned by a quarter of a circle. Arms: the
                  target alone, isotropic and Fisher at the best weight.

Rates and epochs belong to the bench and are the card's; the only thing that is chosen is the weight, on validation pictures.
Ten seeds, each with pictures, a start and models of its own.

Stated before running, each to be reported as holding or not, by the mean of the paired differences over seeds:
  1. Skills, at the best weight: Fisher is better than isotropic, short and long.
  2. At one half it is more than 5 points better, short and long.
  3. At one half the difference is larger after long training than after short.
  4. At the best weight isotropic merging is at least 10 points better than both A and B, short and long.
  5. Ensembling: isotropic and Fisher are both better than the mean single model.
  6. There Fisher and isotropic do not differ: the 95 % interval of the difference contains zero (the paper has a clear gain
     on BERT; one seed on this bench has none).
  7. Stranger: neither merge is more than half a point better than the target alone.
"""

import dataclasses
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))
import jax
import jax.numpy as jnp
import numpy as np
import record
import study
import zoo

from jaxpeft import trees
from jaxpeft.merge import diagonal_fisher, fisher_merging, isotropic_merging, logit_ensemble, pair_grid

WAYS: tuple[Literal["isotropic", "Fisher"], ...] = ("isotropic", "Fisher")
LENGTHS = ("short", "long")


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    bench: zoo.Zoo = dataclasses.field(
        default_factory=lambda: zoo.Zoo(
            turns=(0,),
            inverted=False,
            start=3000,
            train=12000,
            validation=500,
            selection=0,
            test=5000,
            widths=(128, 128),
        )
    )
    skill: int = 3000  # pictures of a model that learns half of the classes
    member: int = 2000
    members: int = 5  # and one more, the stranger, from the last pictures
    short: tuple[float, float] = (1e-3, 6)  # rate and epochs
    long: tuple[float, float] = (3e-3, 12)
    fisher: int = 200
    floor: float = 1e-6
    points: int = 25  # odd: one half is among them
    seeds: int = 10


SMOKE = Setup(
    zoo.Zoo(
        turns=(0,), inverted=False, start=32, train=96, validation=16, selection=0, test=16, widths=(16, 16),
        start_epochs=1, batch=8,
    ),
    skill=24, member=16, short=(1e-3, 1), long=(3e-3, 2), fisher=8, points=3, seeds=2,
)  # fmt: skip

# -------------------------------------------------------------------------------------------------------------- models


def fine_tuned(s: Setup, seed: int, base: Any, part: zoo.Images, length: tuple[float, float]) -> Any:
    """Encoders, leaves (M, ...), one for each (n, 28, 28) of the pictures (M, n, 28, 28)."""
    rate, epochs = length
    bench = dataclasses.replace(s.bench, train=part.label.shape[1], rate=rate, epochs=epochs)
    runs = [zoo.Run(i) for i in range(len(part.label))]
    return zoo.fine_tuned(bench, seed, {"train": part}, base, runs, keep=False)["encoder"]


def skills(s: Setup, pool: zoo.Images) -> zoo.Images:
    """(2, n, ...): the lower classes and the upper ones."""
    label = np.asarray(pool.label[0])
    rows = np.stack([np.flatnonzero(half)[: s.skill] for half in (label < 5, label >= 5)])
    return jax.tree.map(lambda x: x[0][rows], pool)


def members(s: Setup, pool: zoo.Images) -> zoo.Images:
    """(members + 1, n, ...) that no two share; the last are turned."""
    parts = jax.tree.map(lambda x: x[0, -(s.members + 1) * s.member :].reshape(-1, s.member, *x.shape[2:]), pool)
    return parts._replace(image=parts.image.at[-1].set(jnp.rot90(parts.image[-1], 1, (1, 2))))


@partial(jax.jit, static_argnames="count")
def fishers(head: Any, encoders: Any, part: zoo.Images, count: int) -> Any:
    """The models' Fishers, as a stack, from the first so many of their own pictures."""
    apply = lambda encoder, x: zoo.logits({"encoder": encoder, "head": head}, x[None])[0]
    return jax.lax.map(lambda m: diagonal_fisher(apply, *m), (encoders, part.image[:, :count]))


# -------------------------------------------------------------------------------------------------------------- merges


@partial(jax.jit, static_argnames="way")
def over_weights(head: Any, encoders: Any, fishers: Any, weights: Any, part: zoo.Images, floor: Any, way: str) -> Any:
    """(K,): accuracies of the merges by each of the weights (K, M)."""

    def at(w: Any) -> Any:
        if way == "isotropic":
            merged = isotropic_merging(None, encoders, weights=w)
        else:
            merged = fisher_merging(None, encoders, fishers=fishers, weights=w, floor=floor)
        return zoo.accuracy({"encoder": merged, "head": head}, part)[0]

    return jax.lax.map(at, weights)


@jax.jit
def single(head: Any, encoders: Any, part: zoo.Images) -> Any:
    """(M,): accuracies of the models."""
    return jax.lax.map(lambda e: zoo.accuracy({"encoder": e, "head": head}, part)[0], encoders)


@jax.jit
def together(head: Any, encoders: Any, part: zoo.Images) -> Any:
    """The accuracy of the mean logits."""
    apply = lambda encoder, x: zoo.logits({"encoder": encoder, "head": head}, x)
    return (logit_ensemble(apply, encoders, part.image[0]).argmax(-1) == part.label[0]).mean()


class Seed:
    """One seed's arms: `test` by arm, `curves` over the donor's weight on validation pictures, `more` to look at."""

    def __init__(self, s: Setup, seed: int, keep: bool):
        self.s, self.seed = s, seed
        self.parts = zoo.domains(s.bench, seed)
        self.base = zoo.pretrained(s.bench, seed, self.parts, keep)
        self.head, self.pool = self.base["head"], self.parts["train"]
        self.test: dict[str, float] = {}
        self.curves: dict[str, np.ndarray] = {}
        self.more: dict[str, float] = {}
        self.grid = pair_grid(s.points)
        for length in LENGTHS:
            self._skills(length, getattr(s, length))
        self._ensembling()

    def _of(self, way: str, encoders: Any, information: Any, weights: Any, split: str) -> np.ndarray:
        part = self.parts[split]
        return np.asarray(over_weights(self.head, encoders, information, weights, part, self.s.floor, way))

    def _best(self, name: str, way: str, encoders: Any, information: Any) -> None:
        """The arm of two models at the weight that validation chooses."""
        curve = self._of(way, encoders, information, self.grid, "validation")
        at = int(curve.argmax())
        self.curves[f"{name}: {way}"] = curve
        self.more[f"{name}: {way}, the donor's weight"] = float(self.grid[at, 1])
        self.test[f"{name}: {way}"] = float(self._of(way, encoders, information, self.grid[at][None], "test")[0])

    def _skills(self, length: str, how: tuple[float, float]) -> None:
        name, part = f"skills, {length}", skills(self.s, self.pool)
        encoders = fine_tuned(self.s, self.seed, self.base, part, how)
        information = fishers(self.head, encoders, part, self.s.fisher)
        a, b = single(self.head, encoders, self.parts["test"])
        self.test |= {f"{name}: A": float(a), f"{name}: B": float(b)}
        half = self.grid[len(self.grid) // 2][None]
        for way in WAYS:
            self._best(name, way, encoders, information)
            self.test[f"{name}: {way} at 1/2"] = float(self._of(way, encoders, information, half, "test")[0])
        self.test[f"{name}: ensemble"] = float(together(self.head, encoders, self.parts["test"]))
        values = np.concatenate([np.ravel(x[0]) for x in trees.by_path(information).values()])
        self.more[f"{name}: share of the target's Fisher under the floor"] = float((values < self.s.floor).mean())

    def _ensembling(self) -> None:
        part, count = members(self.s, self.pool), self.s.members
        encoders = fine_tuned(self.s, self.seed, self.base, part, self.s.short)
        information = fishers(self.head, encoders, part, self.s.fisher)
        of = lambda tree, rows: jax.tree.map(lambda x: x[jnp.asarray(rows)], tree)
        five = (of(encoders, range(count)), of(information, range(count)))
        alone = np.asarray(single(self.head, five[0], self.parts["test"]))
        self.test["ensembling: mean single"] = float(alone.mean())
        for way in WAYS:
            self.test[f"ensembling: {way}"] = float(self._of(way, *five, jnp.full((1, count), 1 / count), "test")[0])
        self.test["ensembling: ensemble"] = float(together(self.head, five[0], self.parts["test"]))
        self.test["stranger: target"] = float(alone[0])
        for way in WAYS:
            self._best("stranger", way, of(encoders, [0, count]), of(information, [0, count]))


# -------------------------------------------------------------------------------------------------- tables and claims


def claims(rows: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    told = lambda gaps: "; ".join(f"{n}: {m:+.2f} ± {h:.2f}" for n, (m, h) in gaps.items()) + " points"
    less = lambda a, b: study.difference(rows[a], rows[b])
    best = {n: less(f"skills, {n}: Fisher", f"skills, {n}: isotropic") for n in LENGTHS}
    half = {n: less(f"skills, {n}: Fisher at 1/2", f"skills, {n}: isotropic at 1/2") for n in LENGTHS}
    gap = lambda n: [
        x - y for x, y in zip(*(rows[f"skills, {n}: {way} at 1/2"]["test"] for way in ("Fisher", "isotropic")))
    ]
    growth, growth_half = study.difference({"test": gap("long")}, {"test": gap("short")})
    over = {f"{n}, {x}": less(f"skills, {n}: isotropic", f"skills, {n}: {x}") for n in LENGTHS for x in "AB"}
    mean = {way: less(f"ensembling: {way}", "ensembling: mean single") for way in WAYS}
    apart, apart_half = less("ensembling: Fisher", "ensembling: isotropic")
    strange = {way: less(f"stranger: {way}", "stranger: target") for way in WAYS}
    every = lambda gaps, points=0.0: all(m > points for m, _ in gaps.values())
    return [
        record.claim("Skills, best weight: Fisher is better than isotropic, short and long", every(best), told(best)),
        record.claim(
            "Skills, one half: Fisher is more than 5 points better, short and long", every(half, 5), told(half)
        ),
        record.claim(
            "Skills, one half: the difference is larger after long training",
            growth > 0,
            f"{growth:+.2f} ± {growth_half:.2f} points",
        ),
        record.claim(
            "Skills, best weight: isotropic is at least 10 points better than A and B, short and long",
            all(m >= 10 for m, _ in over.values()),
            told(over),
        ),
        record.claim("Ensembling: isotropic and Fisher are better than the mean single model", every(mean), told(mean)),
        record.claim(
            "Ensembling: Fisher and isotropic do not differ (the interval contains zero)",
            abs(apart) <= apart_half,
            f"{apart:+.2f} ± {apart_half:.2f} points",
        ),
        record.claim(
            "Stranger: neither merge is more than half a point better than the target alone",
            all(m <= 0.5 for m, _ in strange.values()),
            told(strange),
        ),
    ]


def main() -> None:
    args = study.arguments("Fisher merging in small; see the file's first lines.")
    s, began = SMOKE if args.smoke else Setup(), time.perf_counter()
    seeds = []
    for seed in range(s.seeds):
        seeds.append(Seed(s, seed, keep=not args.smoke))
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    rows = {}
    for name in seeds[0].test:
        test = [x.test[name] for x in seeds]
        rows[name] = {"method": name, "test": test, "mean": statistics.mean(test), "std": statistics.stdev(test)}
        print(f"{name:34} {100 * rows[name]['mean']:.2f} ± {100 * rows[name]['std']:.2f}", flush=True)

    def figure(axes: Any) -> None:
        donor = np.asarray(pair_grid(s.points))[:, 1]
        for length, style in zip(LENGTHS, ("-", "--")):
            for way, colour in zip(WAYS, ("tab:grey", "tab:red")):
                curves = 100 * np.stack([x.curves[f"skills, {length}: {way}"] for x in seeds])
                axes.plot(donor, curves.mean(0), style, color=colour, label=f"{way}, {length} training")
                low, high = curves.mean(0) - curves.std(0), curves.mean(0) + curves.std(0)
                axes.fill_between(donor, low, high, color=colour, alpha=0.1)
        axes.set(
            xlabel="weight of B (classes 5 to 9) against A (0 to 4)", ylabel="accuracy, % (validation, all classes)"
        )
        axes.legend()

    study.finish(
        "fisher-merging",
        args,
        paper="Fisher merging, Matena and Raffel, NeurIPS 2022",
        setup=s,
        rows=list(rows.values()),
        claims=claims(rows),
        began=began,
        figure=figure,
        curves={name: [x.curves[name] for x in seeds] for name in seeds[0].curves},
        looked_at={name: [x.more[name] for x in seeds] for name in seeds[0].more},
    )


if __name__ == "__main__":
    main()
