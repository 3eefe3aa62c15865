"""Model soups (Wortsman et al., ICML 2022) in small: many fine-tunings of one start, averaged instead of chosen among.

    python experiments/merge/model_soups.py            all of it: ten to twelve minutes on one core (an estimate)
    python experiments/merge/model_soups.py --smoke    every part once in small; writes nothing unless --out is given

Two benches, five pools of models each; a pool is a seed, with examples, recipes and orders of its own, and
a start: of clothes the whole network, of digits the head.

    clothes   A perceptron (784-512-512) trained on 16,000 pictures of Fashion-MNIST in four turns, then 16 fine-tunings of all
              its weights on 400 upright ones: rates 10^U(-4, -2.8), decay 10^U(-4, -1), 60 to 240 steps of 64, label smoothing
              0, 0.1 or 0.2, input noise 0, 0.1 or 0.2. 2500 held-out pictures, 4000 test ones, and four shifts of 1000 of
              these: noise, blur, contrast, two pixels aside. Four more models with rates of 10^U(-2.2, -1.8) are added
              afterwards ("with large rates").
    digits    A ViT (6 layers, width 96; `bases.fashion_vit`) that knows clothes, with a head trained first on the features of
              ten digits a class and common to all, then 8 fine-tunings of all weights on these 100: rates 10^U(-4, -2.9), 30
              to 80 steps of 16, the rest as above. 300 held-out digits, 1000 test ones. The ViT is taken from the cache.

Steps rise and fall by a warm-up and a cosine of AdamW's rate, clipped. Of a pool, all chosen on the held-out examples:

    mean single, best single   of the models; the best by the held-out score
    uniform, greedy            soups; greedy takes what does not lower the score ("ge")
    learned, learned by leaf   mixtures taught on the first half of the held-out examples, their rate (0.05, 0.2) by the other
                               half; of digits the latter alone
    WiSE-FT                    between the start and the best single model, eleven weights
    ensemble, greedy ensemble  of logits, at k and up to k times the cost
    start                      before fine-tuning

(A first run had noise of 0, 0.3 and 0.6, as the card: on held-out pictures models with 0.6 were eight points under the others,
under the start even, and what was averaged was damage. Noise was lowered for that; the claims were not changed.)

The test is touched once a pool and arm. The figure shows the test error in the plane of the first pool's start and the
two models of clothes that are best on held-out pictures; nothing is chosen by it.

Stated before running, each to be reported as holding or not, by the mean of the paired differences over five pools (1 to 4
are of the card, from three pools of a pilot; "best" is the best single model):
  1. Clothes: uniform is at least 0.3 points over the mean single model.
  2. Clothes: uniform is within 0.3 points of the ensemble, at a sixteenth of its cost.
  3. Clothes: greedy is within 0.3 points of the best. No gain is claimed: on such networks there is no room for one.
  4. Large rates cost uniform at least one point, and greedy at most 0.3.
  5. Clothes: learned by leaf is at least as good as uniform.
  6. Clothes, shifted: greedy is better than the best.
  7. Clothes, shifted: WiSE-FT is better than the best.
  8. Digits: greedy is at least 0.5 points over the best, the paper's gain.
  9. Digits: uniform is at least 0.5 points over the mean single model.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import bases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import study
import zoo
from scipy import ndimage

from jaxpeft import data
from jaxpeft.merge import greedy_selection, learned_mixture, soup, stacked, uniform_soup, wise_ft
from jaxpeft.models.vit import VisionTransformer
from jaxpeft.updates import descend

CLASSES = 10
LEARNED, BY_LEAF = "learned", "learned by leaf"


@dataclasses.dataclass(frozen=True)
class Pool:
    """How models are drawn. Ranges are of powers of ten."""

    size: int = 16
    rates: tuple[float, float] = (-4.0, -2.8)
    decays: tuple[float, float] = (-4.0, -1.0)
    steps: tuple[int, int] = (60, 240)
    smoothing: tuple[float, ...] = (0.0, 0.1, 0.2)
    noise: tuple[float, ...] = (0.0, 0.1, 0.2)
    batch: int = 64


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    start: zoo.Zoo = dataclasses.field(
        default_factory=lambda: zoo.Zoo(
            inverted=False, start=4000, train=400, validation=1, selection=1, test=1, start_epochs=3
        )
    )
    clothes: Pool = Pool()
    large: Pool = Pool(size=4, rates=(-2.2, -1.8))
    held: int = 2500
    test: int = 4000
    shifted: int = 1000
    vit: bases.Vit = bases.VIT
    digits: Pool = Pool(size=8, rates=(-4.0, -2.9), steps=(30, 80), batch=16)
    shots: int = 10
    probe_steps: int = 300
    held_digits: int = 300
    test_digits: int = 1000
    learning_rates: tuple[float, ...] = (0.05, 0.2)
    learning_steps: int = 60
    learning_batch: int = 64
    digits_learning_steps: int = 30
    weights: int = 11  # of WiSE-FT
    plane: int = 15  # points a side
    seeds: int = 5


SMOKE = Setup(
    dataclasses.replace(zoo.SMALL, inverted=False, validation=1, selection=1, test=1),
    Pool(3, steps=(2, 3), batch=4), Pool(1, (-2.2, -1.8), steps=(2, 3), batch=4), held=20, test=20, shifted=10,
    vit=bases.SMALL_VIT, digits=Pool(2, steps=(2, 3), batch=4), shots=2, probe_steps=3, held_digits=20, test_digits=20,
    learning_rates=(0.1,), learning_steps=2, learning_batch=5, digits_learning_steps=2, weights=3, plane=3, seeds=2,
)  # fmt: skip


class Part(NamedTuple):
    """Examples x (n, ...), of whatever range the model reads, and labels y (n,)."""

    x: Any
    y: Any


class Bench(NamedTuple):
    """One pool's start and examples.

    Attributes:
      apply: `(params, x) -> logits`.
      start: theta0, head included.
      train, held: to fine-tune; to choose by.
      test: of all conditions one after another; `spans` tells where.
    """

    apply: Callable[[Any, Any], Any]
    start: Any
    train: Part
    held: Part
    test: Part
    spans: dict[str, slice]


# ---------------------------------------------------------------------------------------------------------- the benches


def mlp(params: Any, x: Any) -> Any:
    """Pictures in [0, 1]: `zoo.logits` reads bytes."""
    return zoo.logits(params, 255 * x)


def shifts(x: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Pictures (n, 28, 28) in [0, 1], each changed in four ways."""
    mean = x.mean((1, 2), keepdims=True)
    moved = np.zeros_like(x)
    moved[:, 2:, 2:] = x[:, :-2, :-2]
    return {
        "noise": np.clip(x + 0.3 * rng.standard_normal(x.shape), 0, 1).astype(np.float32),
        "blur": ndimage.gaussian_filter(x, (0, 1.0, 1.0)),
        "contrast": mean + np.float32(0.4) * (x - mean),
        "aside": moved,
    }


def clothes(s: Setup, seed: int, keep: bool) -> Bench:
    domains = zoo.domains(s.start, seed)
    start = zoo.pretrained(s.start, seed, domains, keep)
    rng, splits, drawn = np.random.default_rng([seed, 14]), data.load("fashion-mnist").splits, {}
    for split, n in (("validation", s.held), ("test", s.test)):
        rows = rng.permutation(len(splits[split]))[:n]
        image, label = np.asarray(splits[split].inputs)[rows, ..., 0], np.asarray(splits[split].labels)[rows]
        drawn[split] = (image.astype(np.float32) / 255, label.astype(np.int32))
    x, y = drawn["test"]
    conditions = {"clean": x, **shifts(x[: s.shifted], rng)}
    ends = np.cumsum([len(c) for c in conditions.values()])
    spans = {name: slice(int(e) - len(c), int(e)) for e, (name, c) in zip(ends, conditions.items())}
    labels = np.concatenate([y[: len(c)] for c in conditions.values()])
    test = Part(jnp.asarray(np.concatenate(list(conditions.values()))), jnp.asarray(labels))
    upright = Part(domains["train"].image[0].astype(jnp.float32) / 255, domains["train"].label[0])
    return Bench(mlp, start, upright, Part(*map(jnp.asarray, drawn["validation"])), test, spans)


class Digits:
    """What the pools of digits share: the ViT, and its one `apply`, so that programs are compiled once."""

    def __init__(self, s: Setup, keep: bool):
        self.s = s
        base, params, _ = bases.fashion_vit(s.vit, keep)
        self.model, self.params = bases.with_new_head(base, params, CLASSES)
        self.apply: Callable[[Any, Any], Any] = lambda params, x: self.model.apply(params, x)
        self.probed = jax.jit(self._probed)
        parts = bases.images("digits", s.vit.size)
        self.x, self.y = (np.concatenate(arrays) for arrays in zip(*parts.values()))

    def pool(self, seed: int) -> Bench:
        s, rng = self.s, np.random.default_rng([seed, 15])
        order = rng.permutation(len(self.y))
        few = np.concatenate([order[self.y[order] == c][: s.shots] for c in range(CLASSES)])
        rest = order[~np.isin(order, few)]
        cut = lambda rows: Part(jnp.asarray(self.x[rows]), jnp.asarray(self.y[rows], jnp.int32))
        train, held = cut(few), cut(rest[: s.held_digits])
        test = cut(rest[s.held_digits : s.held_digits + s.test_digits])
        head = self.probed(self.params["params"], train, jax.random.key(seed))
        start = {"params": {**self.params["params"], "head": head}}
        return Bench(self.apply, start, train, held, test, {"clean": slice(0, len(test.y))})

    def _probed(self, params: Any, train: Part, key: Any) -> Any:
        """A head drawn anew and trained on the features: the common start (LP-FT)."""
        h = jnp.asarray(VisionTransformer(self.model.config).apply({"params": params["backbone"]}, train.x))[:, 0]
        optimiser = study.adam(0.06)(1e-2, self.s.probe_steps)

        def loss(w: Any, _: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(h @ w["kernel"] + w["bias"], train.y).mean()

        like = params["head"]
        head = {**like, "kernel": 0.02 * jax.random.normal(key, like["kernel"].shape)}
        return descend(loss, head, optimiser, jnp.arange(self.s.probe_steps))[0]


# ---------------------------------------------------------------------------------------------------------- fine-tuning


class Recipe(NamedTuple):
    """One number a model."""

    rate: Any
    decay: Any
    steps: Any
    smoothing: Any
    noise: Any
    seed: Any


def recipes(pool: Pool, seed: int) -> Recipe:
    rng, k = np.random.default_rng([seed, pool.size, 16]), pool.size
    numbers = (
        10 ** rng.uniform(*pool.rates, k),
        10 ** rng.uniform(*pool.decays, k),
        rng.integers(*pool.steps, k, endpoint=True),
        rng.choice(pool.smoothing, k),
        rng.choice(pool.noise, k),
        1000 * seed + 100 * pool.size + np.arange(k),
    )
    return Recipe(*(jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else jnp.float32) for x in numbers))


@partial(jax.jit, static_argnames=("apply", "batch"))
def fine_tuned(apply: Callable[..., Any], start: Any, train: Part, drawn: Recipe, batch: int) -> Any:
    """A stack of models, one after another; each takes its own number of steps."""

    def one(r: Recipe) -> Any:
        def shape(count: Any) -> Any:
            part = count / r.steps
            return r.rate * jnp.minimum(16 * part, 1) * (1 + jnp.cos(jnp.pi * jnp.minimum(part, 1))) / 2

        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(shape, weight_decay=r.decay))

        def step(i: Any, state: Any) -> Any:
            params, moments = state
            rows, shaken = jax.random.split(jax.random.fold_in(jax.random.key(r.seed), i))
            at = jax.random.randint(rows, (batch,), 0, len(train.y))
            x = train.x[at] + r.noise * jax.random.normal(shaken, (batch, *train.x.shape[1:]))
            y = optax.smooth_labels(jax.nn.one_hot(train.y[at], CLASSES), r.smoothing)
            grads = jax.grad(lambda p: optax.softmax_cross_entropy(apply(p, x), y).mean())(params)
            updates, moments = optimiser.update(grads, moments, params)
            return optax.apply_updates(params, updates), moments

        return jax.lax.fori_loop(0, r.steps, step, (start, optimiser.init(start)))[0]

    return jax.lax.map(one, drawn)


# ---------------------------------------------------------------------------------------------------------------- soups


def said(apply: Callable[..., Any], params: Any, x: Any) -> Any:
    """Logits (n, C), some examples at a time."""
    return jax.lax.map(lambda one: apply(params, one[None])[0], x, batch_size=500)


def right(apply: Callable[..., Any], params: Any, part: Part) -> Any:
    return (said(apply, params, part.x).argmax(-1) == part.y).mean()


@partial(jax.jit, static_argnames="apply")
def all_said(apply: Callable[..., Any], models: Any, x: Any) -> Any:
    """(k, n, C)."""
    return jax.lax.map(lambda p: said(apply, p, x), models)


@partial(jax.jit, static_argnames="apply")
def greedily(apply: Callable[..., Any], models: Any, held: Part) -> Any:
    return greedy_selection(None, models, score_fn=lambda p: right(apply, p, held))


@jax.jit
def greedy_ensemble(z: Any, y: Any) -> Any:
    """Which of the models' logits (k, n, C), whose mean is taken as a soup's weights are."""
    return greedy_selection(None, {"z": z}, score_fn=lambda m: (m["z"].argmax(-1) == y).mean()).chosen


@partial(jax.jit, static_argnames=("apply", "steps", "per_leaf"))
def taught(
    apply: Callable[..., Any], models: Any, batches: Any, check: Part, rate: Any, steps: int, per_leaf: bool
) -> Any:
    """A learned soup and its score on `check`."""
    found = learned_mixture(None, models, apply_fn=apply, batches=batches, steps=steps, rate=rate, per_leaf=per_leaf)
    return found.params, right(apply, found.params, check)


@partial(jax.jit, static_argnames="apply")
def on_the_way(apply: Callable[..., Any], start: Any, model: Any, held: Part, alphas: Any) -> Any:
    """(A,): held-out scores between the start and a model."""
    return jax.lax.map(lambda a: right(apply, wise_ft(start, [model], alpha=a), held), alphas)


def pick(tree: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def learned(s: Setup, bench: Bench, models: Any, steps: int, per_leaf: bool) -> tuple[Any, float]:
    """The soup of the better rate, and that rate."""
    half = len(bench.held.y) // 2
    count = half // s.learning_batch
    cut = lambda x: x[: count * s.learning_batch].reshape(count, s.learning_batch, *x.shape[1:])
    batches, check = (cut(bench.held.x), cut(bench.held.y)), Part(*(x[half:] for x in bench.held))
    found = {r: taught(bench.apply, models, batches, check, r, steps, per_leaf) for r in s.learning_rates}
    best = max(found, key=lambda r: float(found[r][1]))
    return found[best][0], best


class Cooked(NamedTuple):
    """Of one pool.

    Attributes:
      test: arm -> condition -> accuracy.
      scores: (k,), of the models on held-out examples.
      more: what was chosen.
    """

    test: dict[str, dict[str, float]]
    scores: np.ndarray
    more: dict[str, Any]


def cooked(s: Setup, bench: Bench, models: Any, steps: int, lessons: Sequence[str] = (), wise: bool = True) -> Cooked:
    """All arms, of those that learn `lessons`; the start and what lies on the way from it where `wise`."""
    z = all_said(bench.apply, models, bench.held.x)
    found = greedily(bench.apply, models, bench.held)
    scores = np.asarray(found.scores)
    best = pick(models, int(scores.argmax()))
    one = {"best single": best, "uniform": uniform_soup(None, models), "greedy": found.params}
    more: dict[str, Any] = {"greedy": np.flatnonzero(found.chosen).tolist(), "best": int(scores.argmax())}
    for name in lessons:
        one[name], more[name] = learned(s, bench, models, steps, per_leaf=name == BY_LEAF)
    if wise:
        one["start"] = bench.start
        alphas = np.linspace(1, 0, s.weights, dtype=np.float32)  # of equals the nearest to the model
        alpha = alphas[int(np.argmax(on_the_way(bench.apply, bench.start, best, bench.held, alphas)))]
        one["WiSE-FT"], more["WiSE-FT"] = wise_ft(bench.start, [best], alpha=alpha), float(alpha)
    few = np.asarray(greedy_ensemble(z, bench.held.y))
    more["greedy ensemble"] = np.flatnonzero(few).tolist()
    every = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), models, stacked(list(one.values())))
    z_test = np.asarray(all_said(bench.apply, every, bench.test.x))
    each, answers = z_test[: len(scores)], dict(zip(one, z_test[len(scores) :]))
    answers |= {"ensemble": each.mean(0), "greedy ensemble": each[few].mean(0)}
    label = np.asarray(bench.test.y)
    accuracy = lambda z: {k: float((z[at].argmax(-1) == label[at]).mean()) for k, at in bench.spans.items()}
    test = {name: accuracy(z) for name, z in answers.items()}
    singles = [accuracy(z) for z in each]
    test["mean single"] = {k: statistics.mean(a[k] for a in singles) for k in bench.spans}
    return Cooked(test, scores, more)


# ---------------------------------------------------------------------------------------------------------------- plane


class Plane(NamedTuple):
    """Test errors (G, G), per cent, at (x, y) of two directions at right angles; and where the three networks are."""

    x: np.ndarray
    y: np.ndarray
    error: np.ndarray
    corners: np.ndarray


@partial(jax.jit, static_argnames="apply")
def errors(apply: Callable[..., Any], three: Any, weights: Any, part: Part) -> Any:
    return jax.lax.map(lambda w: 100 * (1 - right(apply, soup(None, three, weights=w), part)), weights)


def plane_of(s: Setup, bench: Bench, models: Any, scores: np.ndarray) -> Plane:
    """Through the start and the two best models, as weights (1 - a - b, a, b)."""
    first, second = (pick(models, int(i)) for i in np.argsort(-scores, kind="stable")[:2])
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    origin = flat(bench.start)
    u, v = flat(first) - origin, flat(second) - origin
    length = float(np.linalg.norm(u))
    along = float(u @ v) / length
    across = float(np.linalg.norm(v - along * u / length))
    corners = np.array([[0, 0], [length, 0], [along, across]])
    low, high = corners.min(0), corners.max(0)
    margin = 0.4 * (high - low)
    x, y = (np.linspace(a, b, s.plane) for a, b in zip(low - margin, high + margin))
    grid_x, grid_y = np.meshgrid(x, y)
    b = grid_y / across
    a = (grid_x - along * b) / length
    weights = jnp.asarray(np.stack([1 - a - b, a, b], -1).reshape(-1, 3), jnp.float32)
    some = Part(*(v[bench.spans["clean"]][: s.shifted] for v in bench.test))
    found = errors(bench.apply, stacked([bench.start, first, second]), weights, some)
    return Plane(x, y, np.asarray(found).reshape(grid_x.shape), corners)


def drawing(plane: Plane) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        shown = axes.contourf(plane.x, plane.y, plane.error, 20, cmap="viridis")
        axes.figure.colorbar(shown, label="test error, %")
        for name, at in zip(("start", "best model", "second model"), plane.corners):
            axes.plot(*at, "o", color="white", markeredgecolor="black")
            axes.annotate(name, at, xytext=(5, 5), textcoords="offset points", color="white")
        axes.plot(*plane.corners[1:].mean(0), "x", color="white")
        axes.annotate("soup", plane.corners[1:].mean(0), xytext=(5, 5), textcoords="offset points", color="white")
        axes.set(xlabel="distance in weights", ylabel="distance in weights", aspect="equal")

    return draw


# -------------------------------------------------------------------------------------------------- tables and claims


def table(pools: dict[str, list[Cooked]]) -> dict[str, dict[str, Any]]:
    """A row an arm: the clean test, and the mean over shifts where there are any."""
    rows = {}
    for bench, found in pools.items():
        for arm in found[0].test:
            name, test = f"{bench}: {arm}", [c.test[arm]["clean"] for c in found]
            moved = [[v for k, v in c.test[arm].items() if k != "clean"] for c in found]
            shifted = [statistics.mean(v) for v in moved] if moved[0] else []
            rows[name] = {
                "method": name,
                "test": test,
                "mean": statistics.mean(test),
                "std": statistics.stdev(test),
                "shifted": statistics.mean(shifted) if shifted else None,
                "details": {"shifted": shifted, "by_condition": [c.test[arm] for c in found]},
            }
            print(f"{name:44} {100 * rows[name]['mean']:.2f} ± {100 * rows[name]['std']:.2f}", flush=True)
    return rows


def claims(rows: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    more = "clothes, with large rates"
    shifted = lambda name: {"test": rows[name]["details"]["shifted"]}
    cost = {arm: study.difference(rows[f"clothes: {arm}"], rows[f"{more}: {arm}"]) for arm in ("uniform", "greedy")}

    def within(text: str, a: str, b: str) -> dict[str, str]:
        mean, half = study.difference(rows[a], rows[b])
        return record.claim(text, abs(mean) <= 0.3, f"{mean:+.2f} ± {half:.2f} points")

    def above(text: str, a: str) -> dict[str, str]:
        mean, half = study.difference(shifted(f"clothes: {a}"), shifted("clothes: best single"))
        return record.claim(text, mean > 0, f"{mean:+.2f} ± {half:.2f} points")

    return [
        study.at_least(
            "Clothes: uniform is at least 0.3 points over the mean single model",
            rows["clothes: uniform"],
            rows["clothes: mean single"],
            0.3,
        ),
        within("Clothes: uniform is within 0.3 points of the ensemble", "clothes: uniform", "clothes: ensemble"),
        within("Clothes: greedy is within 0.3 points of the best model", "clothes: greedy", "clothes: best single"),
        record.claim(
            "Large rates cost uniform at least one point and greedy at most 0.3",
            cost["uniform"][0] >= 1 and cost["greedy"][0] <= 0.3,
            "; ".join(f"{n}: {m:.2f} ± {h:.2f}" for n, (m, h) in cost.items()) + " points",
        ),
        study.at_least(
            "Clothes: learned by leaf is at least as good as uniform",
            rows["clothes: learned by leaf"],
            rows["clothes: uniform"],
        ),
        above("Clothes, shifted: greedy is better than the best model", "greedy"),
        above("Clothes, shifted: WiSE-FT is better than the best model", "WiSE-FT"),
        study.at_least(
            "Digits: greedy is at least 0.5 points over the best model",
            rows["digits: greedy"],
            rows["digits: best single"],
            0.5,
        ),
        study.at_least(
            "Digits: uniform is at least 0.5 points over the mean single model",
            rows["digits: uniform"],
            rows["digits: mean single"],
            0.5,
        ),
    ]


def main() -> None:
    args = study.arguments("Model soups in small; see the file's first lines.")
    s, began, keep = SMOKE if args.smoke else Setup(), time.perf_counter(), not args.smoke
    pools: dict[str, list[Cooked]] = {"clothes": [], "clothes, with large rates": [], "digits": []}
    plane: Plane | None = None
    for seed in range(s.seeds):
        bench = clothes(s, seed, keep)
        models, hot = (
            fine_tuned(bench.apply, bench.start, bench.train, recipes(p, seed), p.batch) for p in (s.clothes, s.large)
        )
        pools["clothes"].append(cooked(s, bench, models, s.learning_steps, (LEARNED, BY_LEAF)))
        every = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), models, hot)
        pools["clothes, with large rates"].append(cooked(s, bench, every, 0, wise=False))
        plane = plane or plane_of(s, bench, models, pools["clothes"][0].scores)
        print(f"clothes, pool {seed}: {pools['clothes'][-1].more}, {time.perf_counter() - began:.0f} s", flush=True)
    digits = Digits(s, keep)
    for seed in range(s.seeds):
        bench = digits.pool(seed)
        models = fine_tuned(bench.apply, bench.start, bench.train, recipes(s.digits, seed), s.digits.batch)
        pools["digits"].append(cooked(s, bench, models, s.digits_learning_steps, (BY_LEAF,)))
        print(f"digits, pool {seed}: {pools['digits'][-1].more}, {time.perf_counter() - began:.0f} s", flush=True)
    rows = table(pools)
    assert plane is not None
    study.finish(
        "model-soups",
        args,
        paper="Model soups, Wortsman et al., ICML 2022",
        setup=s,
        rows=list(rows.values()),
        claims=claims(rows),
        began=began,
        figure=drawing(plane),
        chosen={name: [c.more for c in found] for name, found in pools.items()},
        held_out_scores={name: [c.scores for c in found] for name, found in pools.items()},
        plane=plane._asdict(),
    )


if __name__ == "__main__":
    main()
