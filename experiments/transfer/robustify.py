"""Robustify, after Jain et al. (ICCV 2023), in small: a small robust teacher, a larger student of which one block is tuned.

    python experiments/transfer/robustify.py            all of it: about a quarter of an hour on one core
    python experiments/transfer/robustify.py --smoke    every part once in small; writes nothing unless --out is given

Fashion-MNIST. The student is a ViT of 1.06M parameters (6 layers, width 120, patches of 7), trained on clean images in 1500
steps of 64, about the most that four minutes of one core allow; it is kept in the cache and one for all seeds. The teacher is
a CNN of 48,000 parameters, trained in 800 steps of 64 on clean images and two AugMix copies of each, also one for all seeds.
Seeds draw the images, augmentations and dropout of the tuning, and intervals are of these alone. Arms, each tuned in 200
steps of 32 clean images and their AugMix copies, but for the first and the last two:

    student               as it is
    full tuning           all parameters, cross-entropy
    last block            the last block, the final norm and one head (17 % of the parameters), cross-entropy
    last block, KD        and plain distillation from the teacher (half of the loss, temperature 2)
    one head              and distillation weighted by the teacher's certainty
    Robustify             three heads, weighted distillation, the head chosen for each image (10 passes, dropout 0.1)
    ..., clean λ = 0      no distillation on clean images
    ..., λ = 0            no distillation
    WiSE                  halfway between the student and full tuning
    teacher               alone

Arms that tune the last block run side by side on the same batches. Each has one of three rates by the mean accuracy on clean
and on AugMix images of the validation split, of one tuning seed; δ and ε likewise, from the same images. The test: clean
images, and corruptions that no augmentation contains (Gaussian noise, blur, contrast, pixelation, occlusion, each at three
severities), touched once for each arm and seed. (Autocontrast and equalising widen what the contrast corruption narrows, so
that one is the least foreign; accuracies are reported by kind.) The probe is a linear one (least squares, its penalty by
validation) of 8x8 digits made larger, on the encoders' features.

Costs are operations counted by the compiler: of the tuning, and of training the teacher. Their ratio follows from the sizes
chosen here and was known when they were: about two thirds. What a run can tell is what is gained for them.

The method's formulas are a reconstruction (see `jaxpeft.transfer.robustify`), so this is no test of the paper's numbers.
Stated before running, each to be reported as holding or not, by means over the five seeds (1 to 5 are those of the card):
  1. Robustify's accuracy on corrupted images is at least 3 points above the student's.
  2. Its accuracy on clean images is at least the student's less 0.5 points.
  3. On clean images it is not behind full tuning, nor behind any of the one-headed arms (no interval lies below zero).
  4. With the teacher's training it takes at most three quarters of full tuning's operations and has at least 90 % of its
     gain on corrupted images.
  5. The probe on its features is no worse than on those of full tuning.
  6. Distillation helps: on corrupted images it is above the same with λ = 0.
  7. Choosing heads helps: the mean of clean and corrupted accuracy is above that of one head.
  8. Without distillation on clean images (λ = 0 there) clean accuracy is not lower.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import bases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import record
import study
from pretraining import kept
from scipy import ndimage

from jaxpeft import adapt, full, trees
from jaxpeft.data.augmix import augmix
from jaxpeft.models.vit import VisionTransformer
from jaxpeft.transfer import robustify as rb
from jaxpeft.updates import descend

CLASSES = 10
ONE_HEAD = ((0.0, 0.0), (0.0, 0.0), (0.5, 0.5))
# Arms of the last block: shares of the heads, λ on clean and on augmented images in parts of the setup's, plain weights.
TUNED = {
    "last block": (ONE_HEAD, (0.0, 0.0), True),
    "last block, KD": (ONE_HEAD, (1.0, 1.0), True),
    "one head": (ONE_HEAD, (1.0, 1.0), False),
    "Robustify": (rb.SHARES, (1.0, 1.0), False),
    "Robustify, clean λ = 0": (rb.SHARES, (0.0, 1.0), False),
    "Robustify, λ = 0": (rb.SHARES, (0.0, 0.0), False),
}
FULL = {"full tuning": (ONE_HEAD, (0.0, 0.0), True)}
CHOOSING = tuple(name for name, (shares, *_) in TUNED.items() if shares == rb.SHARES)


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    base: bases.Vit = dataclasses.field(
        default_factory=lambda: bases.Vit(layers=6, width=120, heads=6, steps=1500, batch=64, rate=1e-3)
    )
    teacher_channels: tuple[int, ...] = (8, 16, 64, 64)
    teacher_steps: int = 800
    teacher_batch: int = 64
    teacher_rate: float = 3e-3
    steps: int = 200
    batch: int = 32
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    full_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    lam: float = 0.5
    tau: float = 2.0
    dropout: float = 0.1
    passes: int = 10
    deltas: tuple[float, ...] = (
        0.1,
        0.0,
        0.05,
        0.2,
        0.4,
        1.0,
    )  # of log C, which no entropies differ by; of equals the first
    epsilons: tuple[float, ...] = (0.05, 0.0, 0.2, 100.0)  # the last is over any divergence in float32
    validation: int = 1000
    clean: int = 2000
    corrupted: int = 500  # of each corruption and severity
    chunk: int = 250
    penalties: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    seeds: int = 5


SMOKE = Setup(
    bases.Vit(layers=2, width=16, heads=2, patch=14, steps=2, batch=4, examples=60),
    teacher_channels=(2, 2), teacher_steps=2, teacher_batch=4, steps=2, batch=2, rates=(1e-3,), full_rates=(1e-3,),
    passes=2, deltas=(0.1, 0.0), epsilons=(0.05,), validation=10, clean=10, corrupted=5, chunk=25, seeds=2,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- images


def shaken(key: Any, x: Any) -> Any:
    return augmix(key, x, bounds=(-1.0, 1.0))


def occluded(x: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """A grey square anywhere in each image."""
    y, at = rng.integers(0, x.shape[1] - side + 1, (2, len(x), 1))
    rows, columns = ((p <= i) & (i < p + side) for p, i in ((y, np.arange(x.shape[1])), (at, np.arange(x.shape[2]))))
    return np.where((rows[:, :, None] & columns[:, None])[..., None], 0.0, x)


def pixelated(x: np.ndarray, size: int) -> np.ndarray:
    small = jax.image.resize(x, (len(x), size, size, x.shape[-1]), "linear")
    return np.asarray(jax.image.resize(small, x.shape, "nearest"))


def faded(x: np.ndarray, part: float) -> np.ndarray:
    mean = x.mean((1, 2, 3), keepdims=True)
    return mean + part * (x - mean)


def corruptions(x: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Images in [-1, 1], corrupted in five ways at three severities each."""
    rng = np.random.default_rng(seed)
    out = {}
    for i in range(3):
        noise = (0.2, 0.4, 0.6)[i] * rng.standard_normal(x.shape)
        out[f"noise {i + 1}"] = np.clip(x + noise, -1, 1)
        out[f"blur {i + 1}"] = ndimage.gaussian_filter(x, (0, (0.7, 1.2, 1.8)[i], (0.7, 1.2, 1.8)[i], 0))
        out[f"contrast {i + 1}"] = faded(x, (0.6, 0.4, 0.2)[i])
        out[f"pixelate {i + 1}"] = pixelated(x, (14, 10, 7)[i])
        out[f"occlusion {i + 1}"] = occluded(x, (6, 10, 14)[i], rng)
    return {name: np.asarray(v, np.float32) for name, v in sorted(out.items())}


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of several conditions one after another."""

    images: np.ndarray
    labels: np.ndarray
    spans: dict[str, slice]

    @classmethod
    def of(cls, parts: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> "Images":
        ends = np.cumsum([len(labels) for _, labels in parts.values()])
        spans = {k: slice(int(e) - len(parts[k][1]), int(e)) for k, e in zip(parts, ends)}
        joined = (np.concatenate(x) for x in zip(*parts.values()))
        return cls(*joined, spans)

    def accuracy(self, predicted: np.ndarray) -> dict[str, float]:
        right = predicted == self.labels
        return {name: float(right[span].mean()) for name, span in self.spans.items()}


def in_chunks(run: Callable[..., Any], images: np.ndarray, size: int, axis: int) -> np.ndarray:
    """`run` on so many images at a time, joined on `axis`; the last ones stand in for a rest."""
    n = len(images)
    padded = np.concatenate([images, np.repeat(images[-1:], -n % size, 0)])
    parts = [np.asarray(run(jnp.asarray(padded[i : i + size]))) for i in range(0, n, size)]
    return np.take(np.concatenate(parts, axis), np.arange(n), axis)


# ---------------------------------------------------------------------------------------------------------------- models


class Cnn(nn.Module):
    """Convolutions that halve the image, the mean over it, one layer."""

    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for width in self.channels:
            x = nn.relu(nn.Conv(width, (3, 3), strides=(2, 2))(x))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def teacher_of(s: Setup, part: Any, keep: bool) -> tuple[Cnn, Any, float]:
    """Step 1: the model, its parameters, and the operations (GFLOP) of training it."""
    model, (images, labels) = Cnn(s.teacher_channels), map(jnp.asarray, part)
    start = jax.jit(model.init)(jax.random.key(0), images[:1])
    optimiser = study.adam(0.06)(s.teacher_rate, s.teacher_steps)
    rows = study.rows_of(len(labels), s.teacher_steps, s.teacher_batch, 0)

    def loss(params: Any, at: Any, images: Any, labels: Any) -> Any:
        rows, key = at
        x, y = images[rows], labels[rows].astype(jnp.int32)
        changed = shaken(key, jnp.concatenate([x, x]))
        z = model.apply(params, jnp.concatenate([x, changed])).reshape(3, -1, CLASSES)
        return rb.robust_loss(z[0], z[1:], y)

    fit = jax.jit(lambda p, at, *data: descend(lambda p, at: loss(p, at, *data), p, optimiser, at))
    at = jnp.asarray(rows), jax.random.split(jax.random.key(1), s.teacher_steps)

    def run(params: Any) -> Any:
        params, losses = fit(params, at, images, labels)
        print(f"teacher: loss {float(losses[0]):.3f} to {float(losses[-20:].mean()):.3f}", flush=True)
        return params

    what = {"channels": s.teacher_channels, "steps": s.teacher_steps, "batch": s.teacher_batch, "rate": s.teacher_rate}
    what |= {"examples": s.base.examples, "size": s.base.size}
    params = kept("robustify-teacher", what, start, run, keep)
    one = fit.lower(start, jax.tree.map(lambda x: x[:1], at), images, labels).compile()
    return model, params, s.teacher_steps * study.counted(one)["gflop"]


@dataclasses.dataclass(frozen=True)
class Student:
    """The encoder as a function of its parameters, and the head."""

    features: Callable[[Any, Any], Any]
    params: Any
    head: Any


def student_of(s: Setup, keep: bool) -> tuple[Student, float]:
    model, params, accuracy = bases.fashion_vit(s.base, keep)
    backbone = VisionTransformer(model.config)
    features = lambda params, x: backbone.apply({"params": params}, x)[:, 0]
    return Student(features, params["params"]["backbone"], params["params"]["head"]), accuracy


def as_arrays(part: tuple[np.ndarray, np.ndarray]) -> tuple[Any, Any]:
    return jnp.asarray(part[0]), jnp.asarray(part[1], jnp.int32)


class Tuner:
    """Step 2 for arms that tune the same leaves, side by side on the same batches."""

    def __init__(self, s: Setup, student: Student, teacher: Cnn, taught: Any, arms: Mapping[str, Any], at: Any):
        self.s, self.student, self.names = s, student, list(arms)
        self.adapted = adapt(student.features, full(at=at))
        shares, lam, plain = (jnp.asarray(x) for x in zip(*arms.values()))
        self.arms = (shares, s.lam * lam, plain)
        start = self.adapted.init(jax.random.key(0), student.params, jnp.zeros((1, s.base.size, s.base.size, 1)))
        self.start = (start, rb.three_heads(student.head))
        self.trained = trees.count(start) + trees.count(student.head)

        def fit(params: Any, taught: Any, start: Any, part: Any, rows: Any, key: Any, rate: Any, arm: Any) -> Any:
            shares, lam, plain = arm
            certain = lambda z: rb.teacher_weight(jax.nn.softmax(z, -1))
            return rb.tune(
                lambda delta, x: self.adapted.apply(params, delta, x),
                lambda x: teacher.apply(taught, x),
                shaken,
                study.adam(0.06)(rate, s.steps),
                *start,
                *part,
                rows,
                key,
                weigh=lambda z, x, key: jnp.where(plain, 1.0, certain(z)),
                lam=lam,
                tau=s.tau,
                shares=shares,
                dropout=s.dropout,
            )

        self._fit, self._taught = fit, taught
        self._all = jax.jit(jax.vmap(fit, (None,) * 6 + (0, 0)))
        many = jax.vmap(lambda params, delta, x: self.adapted.apply(params, delta, x), (None, 0, None))
        self._features = jax.jit(many)

    def fit(self, part: Any, rates: list[float], seed: int) -> Any:
        """Deltas and heads of all arms, with a leading axis."""
        rows = jnp.asarray(study.rows_of(len(part[1]), self.s.steps, self.s.batch, seed))
        args = self.student.params, self._taught, self.start, as_arrays(part), rows, jax.random.key(seed)
        deltas, heads, losses = self._all(*args, jnp.asarray(rates), self.arms)
        last = ", ".join(f"{v:.3f}" for v in np.asarray(losses)[:, -20:].mean(1))
        print(f"tuned {len(rates)} of {self.trained:,} numbers, seed {seed}: losses {last}", flush=True)
        return deltas, heads

    def features(self, deltas: Any, images: np.ndarray) -> np.ndarray:
        """(arms, n, d)."""
        return in_chunks(lambda x: self._features(self.student.params, deltas, x), images, self.s.chunk, 1)

    def gflop(self, part: Any, name: str) -> float:
        """Operations of an arm's tuning, by those of one step."""
        rows = jnp.zeros((1, self.s.batch), jnp.int32)
        arm = jax.tree.map(lambda v: v[self.names.index(name)], self.arms)
        args = self.student.params, self._taught, self.start, as_arrays(part), rows, jax.random.key(0), 1e-3, arm
        return self.s.steps * study.counted(jax.jit(self._fit).lower(*args).compile())["gflop"]


# --------------------------------------------------------------------------------------------------------------- answers


class Answers:
    """What arms say of images, by features and heads with a leading axis."""

    def __init__(self, s: Setup):
        run = lambda heads, h, key: rb.head_logits(heads, h, key, dropout=s.dropout)
        passes = lambda heads, h: rb.mc_forward(run, heads, jax.random.key(2), h, s.passes)
        self._mean = jax.jit(jax.vmap(lambda heads, h: jax.tree.map(lambda p: p.mean(0), passes(heads, h))))
        self._plain = jax.jit(jax.vmap(rb.dense))
        self._select = jax.jit(rb.select_head)

    def one_head(self, heads: Any, h: np.ndarray) -> np.ndarray:
        """(arms, n): of the combined head, without dropout."""
        return np.asarray(self._plain(heads.combined, h).argmax(-1))

    def means(self, heads: Any, h: np.ndarray) -> Any:
        """The heads' mean probabilities (arms, n, C)."""
        return self._mean(heads, h)

    def chosen(self, means: Any, arm: int, delta: float, eps: float) -> tuple[np.ndarray, np.ndarray]:
        """(n,) classes and heads."""
        found = self._select(*(p[arm] for p in means), delta=delta * np.log(CLASSES), eps=eps)
        return np.asarray(found.probs.argmax(-1)), np.asarray(found.choice)


def probe(s: Setup, features: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> float:
    """Test accuracy of least squares on one-hot labels, its penalty by validation."""
    mean, scale = features["train"].mean(0), features["train"].std(0) + 1e-6
    h = {k: np.hstack([(v - mean) / scale, np.ones((len(v), 1))]) for k, v in features.items()}
    gram, target = h["train"].T @ h["train"], h["train"].T @ np.eye(CLASSES)[labels["train"]]
    right = []
    for penalty in s.penalties:
        w = np.linalg.solve(gram + penalty * len(h["train"]) * np.eye(len(gram)), target)
        right.append([float(((h[k] @ w).argmax(1) == labels[k]).mean()) for k in ("validation", "test")])
    return max(right, key=lambda x: x[0])[1]


# ------------------------------------------------------------------------------------------------------------------ main


def balance(found: Mapping[str, float]) -> float:
    """Of clean and augmented validation images."""
    return (found["clean"] + found["augmented"]) / 2


def choices(s: Setup, tuner: Tuner, rates: tuple[float, ...], part: Any, seen: Images, answers: Answers) -> Any:
    """Each arm's rate, δ and ε, on validation images; and what was tried."""
    tried: dict[str, dict[float, Any]] = {name: {} for name in tuner.names}
    for rate in rates:
        deltas, heads = tuner.fit(part, [rate] * len(tuner.names), 1000)
        h = tuner.features(deltas, seen.images)
        plain, means = answers.one_head(heads, h), answers.means(heads, h)
        for i, name in enumerate(tuner.names):
            if name not in CHOOSING:
                tried[name][rate] = {(0.0, 0.0): balance(seen.accuracy(plain[i]))}
                continue
            score = lambda delta, eps: balance(seen.accuracy(answers.chosen(means, i, delta, eps)[0]))
            tried[name][rate] = {(d, e): score(d, e) for d in s.deltas for e in s.epsilons}
    # The rate by the first δ and ε, which are the defaults; then these, at that rate.
    rate = {name: max(t, key=lambda r: next(iter(t[r].values()))) for name, t in tried.items()}
    bounds = {name: max(t[rate[name]], key=t[rate[name]].get) for name, t in tried.items()}
    return (
        rate,
        bounds,
        {n: {str(r): {str(k): v for k, v in x.items()} for r, x in t.items()} for n, t in tried.items()},
    )


def row(name: str, found: list[dict[str, float]], **more: Any) -> dict[str, Any]:
    """Of each seed's accuracies by condition: `test` is the mean over the corruptions."""
    corrupted = [statistics.mean(v for k, v in f.items() if k != "clean") for f in found]
    clean = [f["clean"] for f in found]
    kinds = sorted({k.split()[0] for k in found[0]} - {"clean"})
    by_kind = {k: statistics.mean(v for f in found for c, v in f.items() if c.startswith(k)) for k in kinds}
    print(f"{name:24} clean {100 * statistics.mean(clean):.2f}  corrupted {100 * statistics.mean(corrupted):.2f}  "
          + "  ".join(f"{k} {100 * v:.1f}" for k, v in by_kind.items()), flush=True)  # fmt: skip
    spread = statistics.stdev(corrupted) if len(corrupted) > 1 else 0.0
    return {
        "method": name,
        **more,
        "clean": statistics.mean(clean),
        "test": corrupted,
        "mean": statistics.mean(corrupted),
        "std": spread,
        **by_kind,
        "details": {"clean": clean, "by_condition": found},
    }


def main() -> None:
    args = study.arguments("Robustify in small; see the file's first lines.")
    s, began = SMOKE if args.smoke else Setup(), time.perf_counter()
    parts = bases.images("fashion-mnist", s.base.size, examples=s.base.examples)
    student, accuracy = student_of(s, not args.smoke)
    teacher, taught, teacher_gflop = teacher_of(s, parts["train"], not args.smoke)
    print(f"student: validation {100 * accuracy:.2f}", flush=True)

    last = (f"layers_{s.base.layers - 1}/**", "final_norm/**")
    tuners = {
        "last": Tuner(s, student, teacher, taught, TUNED, last),
        "full": Tuner(s, student, teacher, taught, FULL, "**"),
    }
    answers = Answers(s)

    # Choices, on clean and augmented validation images alone.
    x, y = (v[: s.validation] for v in parts["validation"])
    augmented = np.asarray(jax.jit(shaken)(jax.random.key(3), jnp.asarray(x)))
    seen = Images.of({"clean": (x, y), "augmented": (augmented, y)})
    rate, bounds, tried = {}, {}, {}
    for which, rates in (("last", s.rates), ("full", s.full_rates)):
        found = choices(s, tuners[which], rates, parts["train"], seen, answers)
        for own, new in zip((rate, bounds, tried), found):
            own.update(new)
    print(f"chosen: rates {rate}, δ / log C and ε { ({n: bounds[n] for n in CHOOSING}) }", flush=True)

    # The test, once.
    x, y = (v[: s.clean] for v in parts["test"])
    few = corruptions(x[: s.corrupted])
    test = Images.of({"clean": (x, y)} | {name: (v, y[: s.corrupted]) for name, v in few.items()})
    digits = bases.images("digits", s.base.size, examples=s.base.examples)
    labels = {k: v[1] for k, v in digits.items()}
    every = Images.of(digits)
    images = np.concatenate([test.images, every.images])
    seeds, n = range(s.seeds), len(test.images)
    probed = lambda h: probe(s, {k: h[span] for k, span in every.spans.items()}, labels)

    found: dict[str, list[Any]] = {name: [] for name in (*TUNED, *FULL, "WiSE", "combined", "oracle")}
    probes: dict[str, list[float]] = {name: [] for name in (*TUNED, *FULL, "WiSE")}
    used: list[Any] = []
    clean = np.arange(n) < s.clean
    for seed in seeds:
        for tuner in tuners.values():
            deltas, heads = tuner.fit(parts["train"], [rate[name] for name in tuner.names], seed)
            h = tuner.features(deltas, images)
            plain, means = answers.one_head(heads, h[:, :n]), answers.means(heads, h[:, :n])
            for i, name in enumerate(tuner.names):
                probes[name].append(probed(h[i, n:]))
                predicted = plain[i]
                if name in CHOOSING:
                    predicted, choice = answers.chosen(means, i, *bounds[name])
                if name == "Robustify":
                    used.append([np.bincount(choice[at], minlength=3) / at.sum() for at in (clean, ~clean)])
                    known = np.where(clean, means.clean[i].argmax(-1), means.unclean[i].argmax(-1))
                    found["oracle"].append(test.accuracy(known))
                    found["combined"].append(test.accuracy(plain[i]))
                found[name].append(test.accuracy(predicted))
            if tuner is tuners["full"]:
                half = lambda a, b: jax.tree.map(lambda a, b: (a + b) / 2, a, b)
                between = half(tuner.start[0], jax.tree.map(lambda v: v[0], deltas))
                head = half(student.head, jax.tree.map(lambda v: v[0], heads.combined))
                h = tuner.features(jax.tree.map(lambda v: v[None], between), images)[0]
                found["WiSE"].append(test.accuracy(np.asarray(rb.dense(head, h[:n]).argmax(-1))))
                probes["WiSE"].append(probed(h[n:]))
    start = jax.tree.map(lambda v: v[None], tuners["full"].start[0])
    h = tuners["full"].features(start, images)[0]
    as_it_is = [test.accuracy(np.asarray(rb.dense(student.head, h[:n]).argmax(-1)))] * s.seeds
    alone = in_chunks(jax.jit(partial(teacher.apply, taught)), test.images, s.chunk, 0).argmax(-1)

    one, all_of = tuners["last"].trained, tuners["full"].trained
    gflop = {name: tuners["last"].gflop(parts["train"], name) for name in ("Robustify",)}
    gflop |= {"full tuning": tuners["full"].gflop(parts["train"], "full tuning")}
    rows = [row("student", as_it_is, trained=0, probe=probed(h[n:]))]
    for name in (*FULL, *TUNED):
        trained = all_of if name in FULL else one + (2 * trees.count(student.head) if name in CHOOSING else 0)
        more = {"rate": rate[name], "probe": statistics.mean(probes[name])}
        rows.append(row(name, found[name], trained=trained, **more))
        rows[-1]["details"] |= {"probe": probes[name], "validation": tried[name]}
    rows.append(row("WiSE", found["WiSE"], trained=all_of, probe=statistics.mean(probes["WiSE"])))
    rows.append(row("teacher", [test.accuracy(alone)] * s.seeds, trained=trees.count(taught)))

    by = {r["method"]: r for r in rows}
    ours, whole = by["Robustify"], by["full tuning"]
    say = lambda m, h: f"{m:+.2f} ± {h:.2f} points"
    of = lambda name, key: {"test": by[name]["details"][key]}
    in_clean = lambda a, b: study.difference(of(a, "clean"), of(b, "clean"))
    behind = {name: in_clean("Robustify", name) for name in ("full tuning", "last block", "last block, KD", "one head")}
    gain = {r["method"]: r["mean"] - rows[0]["mean"] for r in (ours, whole)}
    cost = (gflop["Robustify"] + teacher_gflop) / gflop["full tuning"]
    both = lambda name: {"test": [(a + b) / 2 for a, b in zip(by[name]["test"], by[name]["details"]["clean"])]}
    probing = study.difference(of("Robustify", "probe"), of("full tuning", "probe"))
    helped = study.difference(ours, by["Robustify, λ = 0"])
    selected = study.difference(both("Robustify"), both("one head"))
    spared = in_clean("Robustify, clean λ = 0", "Robustify")
    kept_clean = in_clean("Robustify", "student")
    claims = [
        study.at_least("On corrupted images Robustify is at least 3 points above the student", ours, rows[0], 3.0),
        record.claim(
            "On clean images it is at least the student less 0.5 points", kept_clean[0] >= -0.5, say(*kept_clean)
        ),
        record.claim(
            "On clean images it is not behind full tuning or any one-headed arm",
            all(m + half >= 0 for m, half in behind.values()),
            "; ".join(f"{name} {say(*v)}" for name, v in behind.items()),
        ),
        record.claim(
            "With the teacher it takes at most 3/4 of full tuning's operations and has at least 90 % of its gain",
            cost <= 0.75 and gain["Robustify"] >= 0.9 * gain["full tuning"] > 0,
            f"operations {cost:.0%}, of which the teacher {teacher_gflop / gflop['full tuning']:.0%}; gains "
            f"{100 * gain['Robustify']:+.2f} and {100 * gain['full tuning']:+.2f} points",
        ),
        record.claim("The probe is no worse than after full tuning", probing[0] >= 0, say(*probing)),
        record.claim("On corrupted images it is above the same without distillation", helped[0] > 0, say(*helped)),
        record.claim(
            "Over clean and corrupted images, choosing heads is above one head", selected[0] > 0, say(*selected)
        ),
        record.claim("Without distillation on clean images, clean accuracy is not lower", spared[0] >= 0, say(*spared)),
    ]

    def figure(axes: Any) -> None:
        for r in rows:
            axes.plot(100 * r["clean"], 100 * r["mean"], "o")
            axes.annotate(r["method"], (100 * r["clean"], 100 * r["mean"]), (4, 4), textcoords="offset points", size=7)
        axes.set(xlabel="clean accuracy (%)", ylabel="mean corrupted accuracy (%)")
        axes.margins(0.15)

    middle = lambda found: {k: statistics.mean(f[k] for f in found) for k in found[0]}
    study.finish(
        "robustify",
        args,
        paper="after Efficiently Robustify Pre-Trained Models, Jain et al., ICCV 2023",
        setup=s,
        rows=rows,
        claims=claims,
        began=began,
        figure=figure,
        student_on_validation=accuracy,
        bounds={name: bounds[name] for name in CHOOSING},
        rate_at_the_grids_edge={
            n: r in (min(map(float, tried[n])), max(map(float, tried[n]))) for n, r in rate.items()
        },
        gflop=gflop | {"teacher": teacher_gflop},
        heads_used=dict(zip(("clean", "corrupted"), np.mean(used, 0).tolist())),
        combined_head_alone=middle(found["combined"]),
        heads_by_knowing_the_corruption=middle(found["oracle"]),
    )


if __name__ == "__main__":
    main()
