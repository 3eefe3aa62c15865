"""KIND (Xie et al., ICML 2025) in small: a diffusion transformer of learngenes and tailors, moved to classes it has not seen.

    python experiments/hyper/kind.py            all of it: about three quarters of an hour on one core
    python experiments/hyper/kind.py --smoke    every part once in small; writes nothing unless --out is given

Fashion-MNIST and 5,000 images of MNIST, each for itself, brought to 8 x 8 pixels: classes 0 to 5 for pretraining, 6 to 9 new.
A class-conditional DiT (3 blocks, width 48,
patches of 2, 200 times) is trained for 3,000 steps of 64 in three forms: plain; KIND, every attention and MLP kernel a bank
of 44 components, 20 learngenes and 4 tailors for each of six classes; and that bank without a gate, all components on. Each
is then adapted to the new classes from 200 images, 50 a class, in 600 steps of 32:

    KIND             learngenes frozen, 8 new tailors for every kernel, on for all new classes
    no gate          the same from the ungated bank: its first 20 components frozen, the others dropped
    LoRA             on the plain model, rank 8, same kernels: as many numbers but for σ
    full             the plain model

Embeddings of labels are trained by all. One rate out of four for each by the Fréchet distance to validation images, of a seed
that is not measured; three seeds (a seed takes over ten minutes) draw starts, images, noise. Quality is the Fréchet distance in
the 32 features of a small CNN trained on all ten classes at 8 x 8: our own classifier's, no Inception and no FID of anybody
else's; of 2,000 samples (DDIM, 25 steps, 500 of each new class) to the new classes' test images (4,000; of MNIST 400, which
lifts all distances alike), at 100, 300 and 600 steps, and the share of samples that the CNN takes for the class asked for.

Stated before running, for each set of images, each to be reported as holding or not, by means over seeds:
  1. After 600 steps KIND's distance is at most LoRA's.
  2. It is below that without a gate.
  3. After 100 steps KIND's distance is below LoRA's: what is transferred helps early.
  4. On the six classes of pretraining KIND's distance is at most 1.25 times the plain model's.
  5. A class's 24 components alone make the same images as the whole bank gated to it, to 1e-3.
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import bases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import study

from jaxpeft import adapt, chain, full, generate, lora, trees
from jaxpeft.hyper import kind, kind_gate, kind_join, kind_partition, kind_select, kind_transfer, per_example
from jaxpeft.models import Dit, DitConfig
from jaxpeft.updates import descend

KERNELS = "**/layers*/**/{query,key,value,out,up,down}/kernel"
LABEL = "**/label/embedding"
ARMS = ("KIND", "no gate", "LoRA", "full")


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    width: int = 48
    layers: int = 3
    heads: int = 4
    times: int = 200
    rank: int = 44
    learngenes: int = 20
    sets: tuple[str, ...] = ("fashion-mnist", "mnist-5k")
    known: int = 6  # classes of pretraining
    pretraining: int = 3000
    pretraining_batch: int = 64
    pretraining_rate: float = 2e-3
    tailors: int = 8
    lora: int = 8
    images: int = 50  # a new class
    steps: tuple[int, ...] = (100, 300, 600)
    batch: int = 32
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    sampling: int = 25
    samples: int = 500  # a class
    validation: int = 1000
    feature_steps: int = 1500
    examples: int = 0
    seeds: int = 3


SMOKE = Setup(
    width=8, layers=1, heads=2, times=40, rank=8, learngenes=2, pretraining=2, pretraining_batch=4, tailors=2, lora=2, images=2,
    steps=(1, 2), batch=4, rates=(1e-3,), sampling=2, samples=8, validation=40, feature_steps=2, examples=300, seeds=2,
)  # fmt: skip


class Cnn(nn.Module):
    """Logits, and the features before them."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for c in (16, 32):
            x = nn.relu(nn.Conv(c, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        h = jnp.tanh(nn.Dense(32)(x.reshape(len(x), -1)))
        return nn.Dense(10)(h), h


def trained(loss: Any, start: Any, rate: Any, steps: int, key: Any) -> Any:
    """`loss(weights, key)`, Adam, clipped, a warm-up and then a constant rate: the state may be looked at anywhere."""
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lambda n: rate * jnp.minimum(1.0, (n + 1) / 50)))
    return descend(loss, start, rule, jax.random.split(key, steps))


class Bench:
    """Data, classifier, and the programs of every form of the model."""

    def __init__(self, s: Setup, images: str):
        self.s = s
        config = DitConfig(
            width=s.width, layers=s.layers, heads=s.heads, head_dim=s.width // s.heads, mlp_width=4 * s.width, image=(8, 8),
            patch=(2, 2), channels=1, classes=10, init_std=None,
        )  # fmt: skip
        self.model = Dit(config)
        self.start = lambda key: self.model.init(key, *self.model.dummy_inputs())
        self.schedule = generate.linear(s.times)
        self.parts = {k: tuple(map(jnp.asarray, p)) for k, p in bases.images(images, 8, examples=s.examples).items()}
        part = kind_partition(s.rank, s.learngenes, s.known)
        active = s.learngenes + (s.rank - s.learngenes) // s.known
        self.partition = part
        self.banks = {"KIND": kind(self.start, s.rank, active=active), "no gate": kind(self.start, s.rank)}
        self.gates = {"KIND": lambda y: kind_gate(part, y), "no gate": lambda y: jnp.ones((*y.shape, s.rank))}
        self.plain = {
            "LoRA": adapt(self.model.apply, chain(lora(s.lora, float(s.lora), at=KERNELS), full(at=LABEL))),
            "full": adapt(self.model.apply, full()),
        }
        self._classifier()
        self._sampled = {n: jax.jit(self._sample(n)) for n in (*ARMS, "plain", "bank", "bank, no gate", "open")}
        self._trained = {n: jax.jit(self._train(n), static_argnums=4) for n in ARMS}
        self._pretrain = {n: jax.jit(self._pretrained(n)) for n in ("plain", "KIND", "no gate")}

    def _classifier(self) -> None:
        cnn, (x, y) = Cnn(), self.parts["train"]

        def loss(w: Any, key: Any) -> Any:
            rows = jax.random.randint(key, (64,), 0, len(y))
            noisy = x[rows] + 0.1 * jax.random.normal(key, (64, *x.shape[1:]))
            logits: Any = cnn.apply(w, noisy)
            return optax.softmax_cross_entropy_with_integer_labels(logits[0], y[rows]).mean()

        start = cnn.init(jax.random.key(0), x[:1])
        w, _ = jax.jit(lambda w: trained(loss, w, 2e-3, self.s.feature_steps, jax.random.key(1)))(start)
        self.read = jax.jit(lambda x: cnn.apply(w, x))
        tested: Any = self.read(self.parts["test"][0])
        self.accuracy = float((tested[0].argmax(-1) == self.parts["test"][1]).mean())

    # ------------------------------------------------------------------------------------------------ the forms

    def predict(self, name: str, weights: Any, frozen: Any = None) -> Any:
        """ε of noisy images, times and classes, in one of the forms; `frozen` is what is not trained."""
        if name == "plain":
            return lambda x, t, y: self.model.apply(weights, x, t, y)
        if name in ("LoRA", "full"):
            return lambda x, t, y: self.plain[name].apply(frozen, weights, x, t, y)
        bank = self.banks["no gate" if "no gate" in name else "KIND"]
        run = per_example(self.model.apply, bank)
        if name.startswith("bank"):  # in pretraining
            gates = self.gates["no gate" if "no gate" in name else "KIND"]
            return lambda x, t, y: run(weights, gates(y), x, t, y)
        if name != "open":  # adapted: the frozen bank with new tailors, and labels of its own
            shared = {**frozen["shared"], **weights["shared"]}
            weights = kind_join({"factors": frozen["factors"], "shared": shared}, weights["tailors"])
        # One gate for all: ordinary parameters.
        rank = next(iter(weights["factors"].values()))["s"].shape[-1]
        params = bank.apply(weights, jnp.ones(rank))
        return lambda x, t, y: self.model.apply(params, x, t, y)

    def _sample(self, name: str) -> Any:
        def run(weights: Any, frozen: Any, labels: Any, key: Any) -> Any:
            noise = jax.random.normal(key, (len(labels), 8, 8, 1))
            predict = self.predict(name, weights, frozen)
            return generate.ddim(predict, self.schedule, key, noise, labels, steps=self.s.sampling, clip=1.0)

        return run

    def _loss(self, predict: Any, x: Any, y: Any, key: Any) -> Any:
        return generate.epsilon_loss(predict, self.schedule, key, x, y).mean()

    def _pretrained(self, name: str) -> Any:
        s, form = self.s, {"plain": "plain", "KIND": "bank", "no gate": "bank, no gate"}[name]

        def run(start: Any, x: Any, y: Any, key: Any) -> Any:
            def loss(w: Any, key: Any) -> Any:
                draw, key = jax.random.split(key)
                rows = jax.random.randint(draw, (s.pretraining_batch,), 0, len(y))
                return self._loss(self.predict(form, w), x[rows], y[rows], key)

            return trained(loss, start, s.pretraining_rate, s.pretraining, key)

        return run

    def _train(self, name: str) -> Any:
        def run(weights: Any, frozen: Any, rate: Any, key: Any, steps: int, x: Any, y: Any) -> Any:
            def loss(w: Any, key: Any) -> Any:
                draw, key = jax.random.split(key)
                rows = jax.random.randint(draw, (self.s.batch,), 0, len(y))
                return self._loss(self.predict(name, w, frozen), x[rows], y[rows], key)

            return trained(loss, weights, rate, steps, key)[0]

        return run

    # ------------------------------------------------------------------------------------------------ a seed

    def of_classes(self, split: str, classes: range) -> Any:
        x, y = self.parts[split]
        rows = np.flatnonzero(np.isin(np.asarray(y), list(classes)))
        return x[rows], y[rows]

    def bases(self, seed: int) -> dict[str, Any]:
        """The three pretrained forms."""
        x, y = self.of_classes("train", range(self.s.known))
        key, out = jax.random.fold_in(jax.random.key(41), seed), {}
        for name in ("plain", "KIND", "no gate"):
            start = jax.jit(self.start if name == "plain" else self.banks[name].init)(key)
            out[name], losses = self._pretrain[name](start, x, y, key)
            print(f"seed {seed}, {name}: {float(losses[0]):.3f} to {float(losses[-100:].mean()):.4f}", flush=True)
        return out

    def begin(self, name: str, made: dict[str, Any], key: Any) -> tuple[Any, Any]:
        """(what is trained, what is frozen) for the new classes."""
        if name in ("LoRA", "full"):
            return self.plain[name].init(key, made["plain"], *self.model.dummy_inputs()), made["plain"]
        frozen, fresh = kind_transfer(key, made[name], self.partition, self.s.tailors)
        labels = {p: x for p, x in frozen["shared"].items() if trees.is_match(LABEL, p)}
        return {"tailors": fresh, "shared": labels}, frozen

    def judged(self, name: str, weights: Any, frozen: Any, classes: range, real: Any, key: Any) -> tuple[float, float]:
        """The Fréchet distance to `real`, and the share of samples that are taken for what they should be."""
        labels = jnp.repeat(jnp.asarray(list(classes)), self.s.samples)
        logits, features = self.read(self._sampled[name](weights, frozen, labels, key))  # type: ignore[misc]
        return float(generate.frechet(self.read(real)[1], features)), float((logits.argmax(-1) == labels).mean())  # type: ignore[index]

    def adapted(self, name: str, made: Any, rate: float, seed: int, key: Any) -> list[tuple[Any, Any]]:
        """[(weights, frozen)] after each number of steps; a longer run goes on as the shorter one."""
        x, y = self.of_classes("train", range(self.s.known, 10))
        rng, few = np.random.default_rng([seed, 8]), []
        for c in range(self.s.known, 10):
            few.append(rng.permutation(np.flatnonzero(np.asarray(y) == c))[: self.s.images])
        rows = np.concatenate(few)
        start, frozen = self.begin(name, made, key)
        return [(self._trained[name](start, frozen, rate, key, n, x[rows], y[rows]), frozen) for n in self.s.steps]


@dataclasses.dataclass
class Found:
    """What one set of images gave."""

    accuracy: float
    tried: dict[str, dict[float, float]]
    own: dict[str, list[float]]
    distance: dict[tuple[str, int], list[float]]
    rows: list[dict[str, Any]]
    claims: list[dict[str, str]]

    def mean(self, name: str, steps: int) -> float:
        return statistics.mean(self.distance[name, steps])


def measured(s: Setup, images: str) -> Found:
    """Everything on one set of images."""
    bench, fresh, known = Bench(s, images), range(s.known, 10), range(s.known)
    validation = bench.of_classes("validation", fresh)[0][: s.validation]
    test, test_known = bench.of_classes("test", fresh)[0], bench.of_classes("test", known)[0]
    print(f"{images}; classifier: {100 * bench.accuracy:.1f} % of the test images", flush=True)

    made, key = bench.bases(1000), jax.random.key(1000)
    tried: dict[str, dict[float, float]] = {}
    for name in ARMS:
        for rate in s.rates:
            last = bench.adapted(name, made, rate, 1000, key)[-1]
            tried.setdefault(name, {})[rate] = bench.judged(name, *last, fresh, validation, key)[0]
    rates = {name: min(found, key=found.__getitem__) for name, found in tried.items()}
    print("rates:", rates, flush=True)

    distance: dict[tuple[str, int], list[float]] = {}
    right: dict[str, list[float]] = {}
    own: dict[str, list[float]] = {"plain": [], "KIND": []}
    apart, sizes = [], {}
    for seed in range(s.seeds):
        made, key = bench.bases(seed), jax.random.fold_in(jax.random.key(43), seed)
        own["plain"].append(bench.judged("plain", made["plain"], None, known, test_known, key)[0])
        own["KIND"].append(bench.judged("bank", made["KIND"], None, known, test_known, key)[0])
        labels = jnp.full(16, seed % s.known)
        gate = np.asarray(kind_gate(bench.partition, labels[0]))
        alone = kind_select(made["KIND"], np.flatnonzero(gate))
        a = bench._sampled["bank"](made["KIND"], None, labels, key)
        b = bench._sampled["open"](alone, None, labels, key)
        apart.append(float(jnp.abs(a - b).max()))
        for name in ARMS:
            runs = bench.adapted(name, made, rates[name], seed, key)
            sizes[name] = trees.count(trees.learned(runs[0][0])[0])
            for n, run in zip(s.steps, runs):
                fd, hit = bench.judged(name, *run, fresh, test, key)
                distance.setdefault((name, n), []).append(fd)
            right.setdefault(name, []).append(hit)
            print(
                f"seed {seed}, {name}:",
                [round(distance[name, n][-1], 3) for n in s.steps],
                f"{100 * hit:.0f} %",
                flush=True,
            )

    mean = lambda name, n: statistics.mean(distance[name, n])
    rows = [
        {
            "method": f"{images}, {name}",
            "trained": sizes[name],
            "rate": rates[name],
            **{
                f"distance, {n} steps": f"{mean(name, n):.3f} ± {statistics.stdev(distance[name, n]):.3f}"
                for n in s.steps
            },
            "taken for the class": statistics.mean(right[name]),
            "details": {"distance": {n: distance[name, n] for n in s.steps}, "right": right[name]},
        }
        for name in ARMS
    ]
    kept = {k: statistics.mean(v) for k, v in own.items()}

    def below(text: str, other: str, n: int) -> dict[str, str]:
        a, b = mean("KIND", n), mean(other, n)
        return record.claim(f"{images}: {text}", a <= b, f"KIND {a:.3f}, {other} {b:.3f}")

    claims = [
        below("after all steps KIND's distance is at most LoRA's", "LoRA", s.steps[-1]),
        below("it is below that without a gate", "no gate", s.steps[-1]),
        below("after the first steps it is below LoRA's", "LoRA", s.steps[0]),
        record.claim(
            f"{images}: on the classes of pretraining its distance is at most 1.25 times the plain model's",
            kept["KIND"] <= 1.25 * kept["plain"],
            f"{kept['KIND']:.3f} and {kept['plain']:.3f}",
        ),
        record.claim(
            f"{images}: a class's components alone make the same images",
            max(apart) <= 1e-3,
            f"at most {max(apart):.1e} apart",
        ),
    ]
    return Found(bench.accuracy, tried, own, distance, rows, claims)


def main() -> None:
    began, args = time.perf_counter(), study.arguments((__doc__ or "").splitlines()[0])
    s = SMOKE if args.smoke else Setup()
    found = {images: measured(s, images) for images in s.sets}

    def draw(axes: Any) -> None:
        for (images, f), line in zip(found.items(), ("o-", "s--")):
            for i, name in enumerate(ARMS):
                means, spread = zip(*((f.mean(name, n), statistics.stdev(f.distance[name, n])) for n in s.steps))
                axes.errorbar(s.steps, means, spread, fmt=line, color=f"C{i}", capsize=2, label=f"{name}, {images}")
        axes.set(xlabel="steps on 200 images of new classes", ylabel="Fréchet distance in our classifier's features")
        axes.set(yscale="log")
        axes.legend(fontsize=7)

    each = lambda field: {images: getattr(f, field) for images, f in found.items()}
    study.finish(
        "kind", args, paper="Xie et al.: KIND: Knowledge Integration and Diversion for Training Decomposable Models, ICML 2025",
        setup=s, rows=[r for f in found.values() for r in f.rows], claims=[c for f in found.values() for c in f.claims],
        began=began, figure=draw, validation_by_rate=each("tried"), known_classes=each("own"),
        classifier_accuracy=each("accuracy"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
