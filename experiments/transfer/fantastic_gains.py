"""KL+DP (Roth, Thede et al., "Fantastic gains", ICLR 2024) in small: what one trained classifier can give another.

    python experiments/transfer/fantastic_gains.py            all of it: eight to twelve minutes on one core (an estimate)
    python experiments/transfer/fantastic_gains.py --smoke    every part once in small; writes nothing unless --out is given

Fashion-MNIST. Four classifiers, perceptrons of 8 and of 256-128 hidden units and CNNs of 8-16 and of 16-32 channels, are
trained on the same 6000 pictures for 20 epochs of Adam, its rate falling to zero: they should have converged, which the
control tells. In each of the 12 ordered pairs the student is then trained on those pictures for 3 epochs of 128 by SGD
(momentum 0.9, decay 1e-4, constant rate) with logits of teacher and student copy that were made once:

    XE          labels alone, the control: what any further training brings
    KL          distillation from the teacher on every example
    XE-KL       half of each
    XE-KL+MCL   0.68 of distillation, without negative flips, and slow weights that answer
    KL+DP       distillation from the surer of teacher and student copy, of the label
    KL+DP, unsupervised    the same, each sure of its own best class
    parallel, sequential   KL+DP from all three teachers at once, and one after another, the worst first

The reference's slow weights keep 0.6 of their start after 20 epochs (0.9999 in 5000 updates). Here they are updated at every
step, with the tau that leaves 0.6 after the run's steps; its 100 of 1000 classes are all ten here. Each method has one rate
out of three for all pairs, by the students' mean accuracy on 2000 validation pictures in one tuning seed with models of its
own, where each student has one teacher, the next in the list (the last two methods use KL+DP's rate); then three seeds,
each with pictures and models of its own, measured on 5000 test pictures, once each.

Of a pair: rho_pos, the share of test pictures on which the teacher is right and the student, before, wrong; delta, the
student's accuracy after less before, which is what it gained less what it lost. A teacher is weaker or stronger where its
test accuracy is more than one point under or over the student's. Success is the share of pairs (of all seeds) with delta
over zero.

Stated before running, each to be reported as holding or not, by means over three seeds, paired where methods are compared:
  1. rho_pos is at least 2 % in every pair of every seed.
  2. From weaker teachers delta is at least one point higher with KL+DP than with KL.
  3. From weaker teachers delta is below zero with KL, and not under -0.2 points with KL+DP: no forgetting, not a gain.
  4. KL+DP succeeds in more pairs than KL.
  5. From stronger teachers KL is not behind KL+DP.
  6. The students had converged: the control's mean delta is within 0.3 points of zero.
  7. Unsupervised KL+DP is within 0.3 points of KL+DP in the mean over all pairs.
  8. Three teachers in sequence bring at least as much as the three in parallel.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import study
from pretraining import kept

from jaxpeft import data
from jaxpeft.transfer.fantastic_gains import (
    dp_targets,
    ema_update,
    flip_masks,
    flips,
    order_of,
    success_rate,
    transfer_metrics,
    xe_kl_loss,
)
from jaxpeft.updates import descend

CLASSES, TUNING = 10, 1000
XE, KL, XE_KL, MCL, DP, FREE = "XE", "KL", "XE-KL", "XE-KL+MCL", "KL+DP", "KL+DP, unsupervised"
METHODS = (XE, KL, XE_KL, MCL, DP, FREE)
ALPHA = {XE: 0.0, XE_KL: 0.5, MCL: 0.68}  # the others are distillation alone
SEVERAL = ("parallel", "sequential")


class Net(nn.Module):
    """Convolutions that halve the picture, if any, and a perceptron on what they leave."""

    channels: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x.astype(jnp.float32)[..., None] / 255
        for width in self.channels:
            x = nn.relu(nn.Conv(width, (3, 3), strides=(2, 2))(x))
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(CLASSES)(x)


ZOO = {
    "MLP 8": Net(widths=(8,)),
    "MLP 256": Net(widths=(256, 128)),
    "CNN 8": Net((8, 16)),
    "CNN 16": Net((16, 32)),
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    train: int = 6000
    validation: int = 2000
    test: int = 5000
    batch: int = 128
    epochs: int = 20  # of the models' own training
    rate: float = 2e-3
    transfer_epochs: int = 3
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    slow_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)  # of XE-KL+MCL, a hundred times the others' in the reference
    slow_keep: float = 0.6  # of the start in the slow weights, at the end
    seeds: int = 3


SMOKE = Setup(24, 16, 16, 8, 1, rates=(1e-3,), slow_rates=(1e-2,), transfer_epochs=1, seeds=2)


class Part(NamedTuple):
    """Pictures (n, 28, 28) as bytes, labels (n,)."""

    image: Any
    label: Any


def pictures(s: Setup, seed: int) -> dict[str, Part]:
    rng, out, splits = np.random.default_rng([seed, 12]), {}, data.load("fashion-mnist").splits
    for split, n in (("train", s.train), ("validation", s.validation), ("test", s.test)):
        found = splits[split]
        rows = rng.permutation(len(found))[:n]
        image, label = np.asarray(found.inputs)[rows, ..., 0], np.asarray(found.labels)[rows]
        out[split] = Part(jnp.asarray(image), jnp.asarray(label, jnp.int32))
    return out


# ------------------------------------------------------------------------------------------------------------ programs


def run(name: str, params: Any, image: Any) -> jax.Array:
    return jnp.asarray(ZOO[name].apply(params, image))


@partial(jax.jit, static_argnames=("name", "steps"))
def trained(name: str, params: Any, part: Part, rows: Any, rate: Any, steps: int) -> Any:
    """A model of the zoo after its own training, and its losses."""
    optimiser = study.adam(0.06)(rate, steps)

    def loss(params: Any, row: Any) -> Any:
        z = run(name, params, part.image[row])
        return optax.softmax_cross_entropy_with_integer_labels(z, part.label[row]).mean()

    return descend(loss, params, optimiser, rows)


@partial(jax.jit, static_argnames="name")
def logits(name: str, params: Any, image: Any) -> Any:
    return run(name, params, image)


class Way(NamedTuple):
    """What a method is made of, all of it traced: one program a student.

    Attributes:
      alpha: the share of distillation.
      skip: whether negative flips are left out of it.
      tau: of the slow weights; 0 for none.
      rate: of SGD.
    """

    alpha: Any
    skip: Any
    tau: Any
    rate: Any


@partial(jax.jit, static_argnames="name")
def taught(name: str, params: Any, part: Part, targets: Any, z_t: Any, rows: Any, way: Way) -> Any:
    """The student after the transfer: the weights that answer."""
    optimiser = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(way.rate, momentum=0.9))

    def step(state: Any, row: Any) -> Any:
        params, moments, slow = state
        y = part.label[row]

        def loss(p: Any) -> Any:
            z = run(name, p, part.image[row])
            mask = ~(flip_masks(z, z_t[row], y)[1] & way.skip)
            return xe_kl_loss(z, targets[row], y, way.alpha, mask=mask)

        grads = jax.grad(loss)(params)
        updates, moments = optimiser.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        return (params, moments, ema_update(slow, params, way.tau)), None

    return jax.lax.scan(step, (params, optimiser.init(params), params), rows)[0][2]


# ------------------------------------------------------------------------------------------------------------ one seed


class World:
    """One seed's pictures and models, what they say, and the transfers between them."""

    def __init__(self, s: Setup, seed: int, keep: bool):
        self.s, self.seed, self.parts = s, seed, pictures(s, seed)
        self.params = {name: self._model(name, i, keep) for i, name in enumerate(ZOO)}
        self.z = {name: logits(name, p, self.parts["train"].image) for name, p in self.params.items()}
        epochs = range(s.transfer_epochs)
        rng, n = np.random.default_rng([seed, 13]), s.train // s.batch * s.batch
        self.rows = np.concatenate([rng.permutation(s.train)[:n].reshape(-1, s.batch) for _ in epochs])

    def _model(self, name: str, number: int, keep: bool) -> Any:
        s, part = self.s, self.parts["train"]
        steps = s.epochs * (s.train // s.batch)
        rows = study.rows_of(s.train, steps, s.batch, 10 * self.seed + number)
        start = jax.jit(ZOO[name].init)(jax.random.key(10 * self.seed + number), part.image[:1])

        def fit(params: Any) -> Any:
            params, losses = trained(name, params, part, rows, s.rate, steps)
            print(f"{name}: loss {float(losses[0]):.3f} to {float(losses[-20:].mean()):.3f}", flush=True)
            return params

        what = {"net": repr(ZOO[name]), "steps": steps, "train": s.train, "batch": s.batch, "rate": s.rate}
        return kept("gains", {**what, "seed": self.seed, "number": number}, start, fit, keep)

    def said(self, name: str, split: str, params: Any = None) -> jax.Array:
        """(n,) predictions."""
        params = self.params[name] if params is None else params
        return logits(name, params, self.parts[split].image).argmax(-1)

    def accuracy(self, name: str, split: str, params: Any = None) -> float:
        return float((self.said(name, split, params) == self.parts[split].label).mean())

    def transfer(self, student: str, teachers: Sequence[str], method: str, rate: float) -> Any:
        """The student's new parameters; all teachers are one for every method but KL+DP."""
        return self._taught(student, self.params[student], self.z[student], teachers, method, rate)

    def in_sequence(self, student: str, teachers: Sequence[str], rate: float) -> Any:
        """KL+DP from one teacher after another, the worst on the training pictures first, each with a new copy."""
        params, part = self.params[student], self.parts["train"]
        for i in np.asarray(order_of(jnp.stack([self.z[t] for t in teachers]), part.label)):
            copy = logits(student, params, part.image)
            params = self._taught(student, params, copy, [teachers[int(i)]], DP, rate)
        return params

    def _taught(self, student: str, params: Any, copy: Any, teachers: Sequence[str], method: str, rate: float) -> Any:
        z, part = jnp.stack([self.z[t] for t in teachers]), self.parts["train"]
        targets = z[0]
        if method in (DP, FREE):
            targets, _ = dp_targets(z, copy, part.label if method == DP else None)
        tau = self.s.slow_keep ** (1 / len(self.rows)) if method == MCL else 0.0
        numbers = (jnp.float32(x) for x in (tau, rate))
        way = Way(jnp.float32(ALPHA.get(method, 1.0)), jnp.asarray(method == MCL), *numbers)
        return taught(student, params, part, targets, z[0], self.rows, way)


def others(student: str) -> list[str]:
    return [name for name in ZOO if name != student]


def chosen_rates(s: Setup, keep: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Each method's rate by validation, and what was tried; each student has the next model for a teacher."""
    w, tried, names = World(s, TUNING, keep), {}, list(ZOO)
    pairs = list(zip(names, [*names[1:], names[0]]))
    for method in METHODS:
        for rate in s.slow_rates if method == MCL else s.rates:
            found = [w.accuracy(a, "validation", w.transfer(a, [b], method, rate)) for a, b in pairs]
            tried.setdefault(method, {})[rate] = statistics.mean(found)
        print(f"{method}: {tried[method]}", flush=True)
    return {m: max(t, key=t.get) for m, t in tried.items()}, tried


class Pair(NamedTuple):
    """A student and its teachers in one seed.

    Attributes:
      apart: the teacher's accuracy less the student's before, in points; 0 of all teachers.
      rho: rho_pos, per cent; 0 of all teachers.
      found: method -> {"delta", "gain", "loss", "rate"}.
    """

    seed: int
    student: str
    teacher: str
    apart: float
    rho: float
    found: dict[str, dict[str, float]]


def pairs_of(s: Setup, w: World, rates: dict[str, float]) -> tuple[list[Pair], list[Pair]]:
    """One teacher each, and all three of each student."""
    y, test = w.parts["test"].label, {name: w.said(name, "test") for name in ZOO}

    def numbers(student: str, teacher: str, params: Any) -> dict[str, float]:
        after = w.said(student, "test", params)
        return {
            k: float(v) for k, v in transfer_metrics(test[student], after, test[teacher], y, CLASSES)._asdict().items()
        }

    single, several = [], []
    for student in ZOO:
        alone = w.transfer(student, others(student)[:1], XE, rates[XE])
        for teacher in others(student):
            found = {XE: numbers(student, teacher, alone)}
            for method in METHODS[1:]:
                found[method] = numbers(student, teacher, w.transfer(student, [teacher], method, rates[method]))
            f = flips(test[student], test[teacher], y)
            apart = float(f.positive - f.negative)
            single.append(Pair(w.seed, student, teacher, apart, float(f.positive), found))
        at_once = w.transfer(student, others(student), DP, rates[DP])
        in_turn = w.in_sequence(student, others(student), rates[DP])
        both = {n: numbers(student, student, p) for n, p in zip(SEVERAL, (at_once, in_turn))}
        several.append(Pair(w.seed, student, "all", 0.0, 0.0, both))
    return single, several


# -------------------------------------------------------------------------------------------------- tables and claims


def weaker(p: Pair) -> bool:
    return p.apart < -1


def stronger(p: Pair) -> bool:
    return p.apart > 1


def by_seed(pairs: list[Pair], method: str, where: Any = lambda p: True) -> dict[str, list[float]]:
    """A seed's mean delta over its pairs, as a share; seeds without such pairs are left out."""
    seeds = dict.fromkeys(p.seed for p in pairs if where(p))
    mean = lambda seed: statistics.mean(p.found[method]["delta"] for p in pairs if p.seed == seed and where(p))
    return {"test": [mean(seed) / 100 for seed in seeds]}


def mean_of(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def table(single: list[Pair], several: list[Pair], rates: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for method in (*METHODS, *SEVERAL):
        pairs = several if method in SEVERAL else single
        delta = lambda where, pairs=pairs, method=method: mean_of([p.found[method]["delta"] for p in pairs if where(p)])
        each = by_seed(pairs, method)["test"]
        rows.append(
            {
                "method": method,
                "rate": rates[DP if method in SEVERAL else method],
                "delta": {
                    "mean": 100 * statistics.mean(each),
                    "std": 100 * statistics.stdev(each),
                    "weaker": delta(weaker),
                    "stronger": delta(stronger),
                },
                "gained": mean_of([p.found[method]["gain"] for p in pairs]),
                "lost": mean_of([p.found[method]["loss"] for p in pairs]),
                "success": float(success_rate(jnp.asarray([p.found[method]["delta"] for p in pairs]))),
                "test": each,
            }
        )
        print({k: v for k, v in rows[-1].items() if k != "test"}, flush=True)
    return rows


def pair_table(single: list[Pair]) -> list[dict[str, Any]]:
    """Means over seeds."""
    rows = []
    for student, teacher in dict.fromkeys((p.student, p.teacher) for p in single):
        found = [p for p in single if (p.student, p.teacher) == (student, teacher)]
        mean = {m: statistics.mean(p.found[m]["delta"] for p in found) for m in METHODS}
        apart, rho = (statistics.mean(x) for x in zip(*((p.apart, p.rho) for p in found)))
        rows.append({"student": student, "teacher": teacher, "apart": apart, "rho_pos": rho, "delta": mean})
    return rows


def claims(single: list[Pair], several: list[Pair], rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    least = min(single, key=lambda p: p.rho)
    of = lambda method, where=lambda p: True: by_seed(single, method, where)
    none = {"test": [0.0]}
    level = lambda a: study.interval([100 * x for x in (a["test"] or none["test"])])
    told = lambda found: f"{found[0]:+.2f} ± {found[1]:.2f}"
    worse = {m: level(of(m, weaker)) for m in (KL, DP)}
    success = {r["method"]: r["success"] for r in rows}
    control = level(of(XE))
    free, free_half = study.difference(of(FREE), of(DP))
    # At the smallest size there may be no such pair.
    pairs = {
        where: [of(m, where) if any(map(where, single)) else none for m in (DP, KL)] for where in (weaker, stronger)
    }
    return [
        record.claim(
            "rho_pos is at least 2 % in every pair of every seed",
            least.rho >= 2,
            f"least {least.rho:.2f} %: {least.student} from {least.teacher}; mean {mean_of([p.rho for p in single]):.2f} %",
        ),
        study.at_least(
            "From weaker teachers KL+DP is at least one point better than KL", pairs[weaker][0], pairs[weaker][1], 1
        ),
        record.claim(
            "From weaker teachers delta is below zero with KL and not under -0.2 points with KL+DP",
            worse[KL][0] < 0 and worse[DP][0] >= -0.2,
            f"KL {told(worse[KL])}, KL+DP {told(worse[DP])} points",
        ),
        record.claim(
            "KL+DP succeeds in more pairs than KL",
            success[DP] > success[KL],
            "; ".join(f"{m} {success[m]:.0f} %" for m in METHODS),
        ),
        study.at_least("From stronger teachers KL is not behind KL+DP", pairs[stronger][1], pairs[stronger][0]),
        record.claim(
            "Students had converged: the control's mean delta is within 0.3 points of zero",
            abs(control[0]) <= 0.3,
            f"{told(control)} points",
        ),
        record.claim(
            "Unsupervised KL+DP is within 0.3 points of KL+DP",
            abs(free) <= 0.3,
            f"{free:+.2f} ± {free_half:.2f} points",
        ),
        study.at_least(
            "Three teachers in sequence bring at least as much as in parallel",
            by_seed(several, SEVERAL[1]),
            by_seed(several, SEVERAL[0]),
        ),
    ]


def main() -> None:
    args = study.arguments("KL+DP in small; see the file's first lines.")
    s, began, keep = SMOKE if args.smoke else Setup(), time.perf_counter(), not args.smoke
    rates, tried = chosen_rates(s, keep)
    single: list[Pair] = []
    several: list[Pair] = []
    accuracies = {}
    for seed in range(s.seeds):
        w = World(s, seed, keep)
        accuracies[seed] = {name: w.accuracy(name, "test") for name in ZOO}
        one, many = pairs_of(s, w, rates)
        single, several = single + one, several + many
        print(f"seed {seed}: {accuracies[seed]}, {time.perf_counter() - began:.0f} s", flush=True)
    rows = table(single, several, rates)

    def figure(axes: Any) -> None:
        for method, marker in ((KL, "o"), (XE_KL, "^"), (DP, "s")):
            points = [(p.apart, p.found[method]["delta"]) for p in single]
            axes.plot(*zip(*points), marker, alpha=0.6, label=method)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(xlabel="teacher's accuracy less the student's, points", ylabel="delta, points")
        axes.legend()

    study.finish(
        "fantastic-gains",
        args,
        paper="Fantastic gains, Roth, Thede et al., ICLR 2024",
        setup=s,
        rows=rows,
        claims=claims(single, several, rows),
        began=began,
        figure=figure,
        tables=["pairs"],
        pairs=pair_table(single),
        accuracies=accuracies,
        validation_by_rate=tried,
        by_pair_and_seed=[p._asdict() for p in (*single, *several)],
    )


if __name__ == "__main__":
    main()
