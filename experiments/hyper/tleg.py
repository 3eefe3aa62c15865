"""TLEG (Xia et al., AAAI 2024) in small: transformers of several depths from two blocks.

    python experiments/hyper/tleg.py            all of it: about half an hour on one core
    python experiments/hyper/tleg.py --smoke    every part once in small; writes nothing unless --out is given

Fashion-MNIST, 10,000 training images, patches of 7, a ViT of width 64 with a class token (the paper's have none), scanned over
its layers. Stage 1: an auxiliary network of depth 6 learns from the logits of a small CNN alone (a = 1, as released), 1,000
steps of 64. Three of them: tied to the line (TLEG), to one block for all layers (shared, K = 1), and not tied (plain), all by
the same distillation on the same batches. Stage 2: networks of depths 3, 4, 6 and 8 are trained on labels, nothing tied, for
one epoch (156 steps), from TLEG's gene; from the shared block; from the plain network's first layers (beyond the sixth, its
layers from the first on again); from scratch, for 1, 2, 4 and 8 epochs. Then scikit-learn's digits, 200 of them made larger,
at depth 4 for 100 steps, heads new.

One peak rate out of three for each start, by 1,000 validation images at depth 4 and a seed that is not measured. Three seeds
(a seed takes over ten minutes), which draw starts, images and their order; test images are looked at once for each network.

Stated before running, each to be reported as holding or not, by means of paired differences over seeds:
  1. After one epoch TLEG is at least 3 points over scratch at every depth.
  2. TLEG is at least as good as the plain network's layers, in the mean over depths 3, 4 and 8.
  3. TLEG is over the shared block, in the mean over all depths: the slope matters.
  4. All four networks by TLEG (stage 1 once, an epoch each) take fewer steps than from scratch to the same accuracies, by the
     least number of epochs tried that reaches them (8 where none does).
  5. On digits TLEG is at least 3 points over scratch.
Beside it: how much of the plain network's layers a line explains (R²), and the numbers stored for the four networks.
"""

import dataclasses
import functools
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

from jaxpeft import trees
from jaxpeft.hyper import tleg, tleg_expand, tleg_fit, tleg_kd_loss, tleg_r2
from jaxpeft.models import ImageClassifier, VisionConfig
from jaxpeft.updates import descend

STARTS = ("TLEG", "shared", "plain layers", "scratch")


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    width: int = 64
    heads: int = 4
    patch: int = 7
    depth: int = 6
    depths: tuple[int, ...] = (3, 4, 6, 8)
    images: int = 10000
    stage_1: int = 1000
    epochs: tuple[int, ...] = (1, 2, 4, 8)
    batch: int = 64
    rate_1: float = 1e-3
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    teacher_steps: int = 500
    validation: int = 1000
    digits: int = 200
    digits_steps: int = 100
    seeds: int = 3


SMOKE = Setup(
    width=16, heads=2, patch=14, depth=2, depths=(1, 2), images=32, stage_1=2, epochs=(1, 2), batch=16, rates=(1e-3,),
    teacher_steps=2, validation=16, digits=20, digits_steps=2, seeds=2,
)  # fmt: skip


class Cnn(nn.Module):
    """The teacher."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for c in (16, 32):
            x = nn.max_pool(nn.relu(nn.Conv(c, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x.reshape(len(x), -1))))


def vit(s: Setup, depth: int) -> ImageClassifier:
    config = VisionConfig(
        width=s.width, layers=depth, heads=s.heads, head_dim=s.width // s.heads, mlp_width=4 * s.width, pre_norm=True,
        norm_eps=1e-6, image=(28, 28), patch=(s.patch, s.patch), channels=1, scan=True,
    )  # fmt: skip
    return ImageClassifier(config, 10)


@functools.cache
def initialiser(s: Setup, depth: int) -> Any:
    """`(key, images) -> params`, compiled once."""
    return jax.jit(vit(s, depth).init)


class Trainer:
    """One compiled program for each function trained: starts, rates, examples and their order are arguments."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def __call__(self, name: Any, loss: Any, start: Any, rate: float, examples: Any, rows: np.ndarray) -> Any:
        """`loss(params, batch) -> scalar`; returns the parameters after a warm-up and a cosine."""
        if name not in self._made:

            def run(params: Any, rate: Any, examples: Any, rows: Any) -> Any:
                steps = rows.shape[0]
                shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), max(2, steps))
                rule = optax.chain(
                    optax.clip_by_global_norm(1.0), optax.adamw(lambda n: rate * shape(n), weight_decay=0.05)
                )

                return descend(lambda p, at: loss(p, jax.tree.map(lambda x: x[at], examples)), params, rule, rows)

            self._made[name] = jax.jit(run)
        params, losses = self._made[name](start, rate, examples, rows)
        assert np.isfinite(np.asarray(losses)).all(), f"{name} diverged"
        return params


def label_loss(apply: Any) -> Any:
    return lambda p, b: optax.softmax_cross_entropy_with_integer_labels(apply(p, b["image"]), b["label"]).mean()


class Bench:
    """Data, and what is trained once for a seed."""

    def __init__(self, s: Setup, seed: int, parts: Any, train: Trainer):
        self.s, self.seed, self.train = s, seed, train
        rng = np.random.default_rng(seed)
        x, y = parts["train"]
        own = rng.permutation(len(y))[: s.images]
        self.examples = {"image": jnp.asarray(x[own]), "label": jnp.asarray(y[own], jnp.int32)}
        self.key = jax.random.fold_in(jax.random.key(5), seed)
        cnn = Cnn()
        start = jax.jit(cnn.init)(self.key, self.examples["image"][:1])
        rows = study.rows_of(s.images, s.teacher_steps, s.batch, seed)
        teacher = train("teacher", label_loss(cnn.apply), start, 2e-3, self.examples, rows)
        logits = jax.jit(lambda x: jax.lax.map(lambda one: cnn.apply(teacher, one[None])[0], x, batch_size=200))
        self.examples["teacher"] = logits(self.examples["image"])
        self.genes = {
            name: self._auxiliary(terms) for name, terms in (("TLEG", 2), ("shared", 1), ("plain layers", None))
        }

    def _auxiliary(self, terms: int | None) -> Any:
        """Stage 1: a gene of K terms, or an untied network."""
        s, model = self.s, vit(self.s, self.s.depth)
        params = initialiser(self.s, self.s.depth)(self.key, self.examples["image"][:1])
        hyper = None if terms is None else tleg(params, terms=terms, base=params)
        apply = model.apply if hyper is None else lambda w, x: model.apply(hyper.apply(w), x)
        loss = lambda w, b: tleg_kd_loss(jnp.asarray(apply(w, b["image"])), b["teacher"])
        start = params if hyper is None else hyper.init(self.key)
        rows = study.rows_of(s.images, s.stage_1, s.batch, 10 + self.seed)
        return self.train(("stage 1", terms), loss, start, s.rate_1, self.examples, rows)

    def start(self, name: str, depth: int) -> Any:
        """A network of this depth before stage 2."""
        if name == "scratch":
            image = self.examples["image"][:1]
            return initialiser(self.s, depth)(jax.random.fold_in(self.key, depth), image)
        gene = self.genes[name]
        if name != "plain layers":
            return tleg_expand(gene, depth)
        chosen = np.arange(depth) % self.s.depth
        flat = trees.by_path(gene)
        return trees.replace_leaves(gene, {p: flat[p][chosen] for p in trees.matches("**/layers/**", flat)})

    def trained(self, name: str, depth: int, epochs: int, rate: float) -> Any:
        steps = epochs * (self.s.images // self.s.batch)
        rows = study.rows_of(self.s.images, steps, self.s.batch, 20 + self.seed)
        loss = label_loss(vit(self.s, depth).apply)
        return self.train((depth, steps), loss, self.start(name, depth), rate, self.examples, rows)


def accuracy(s: Setup) -> Any:
    """`(depth, params, (images, labels)) -> share right`."""

    def program(depth: int) -> Any:
        answer = lambda p, x: jax.lax.map(lambda one: vit(s, depth).apply(p, one[None])[0], x, batch_size=250).argmax(
            -1
        )
        return jax.jit(lambda p, x, y: (answer(p, x) == y).mean())

    programs = {depth: program(depth) for depth in {*s.depths, s.depth}}
    return lambda depth, params, part: float(programs[depth](params, *map(jnp.asarray, part)))


def main() -> None:
    began, args = time.perf_counter(), study.arguments((__doc__ or "").splitlines()[0])
    s = SMOKE if args.smoke else Setup()
    parts = bases.images("fashion-mnist", examples=200 if args.smoke else 0)
    digits = bases.images("digits", examples=60 if args.smoke else 0)
    rng = np.random.default_rng(0)
    held = rng.permutation(len(parts["validation"][1]))[: s.validation]
    validation = tuple(x[held] for x in parts["validation"])
    train, score, middle = Trainer(), accuracy(s), s.depths[1]

    tuning = Bench(s, 1000, parts, train)
    tried = {
        name: {r: score(middle, tuning.trained(name, middle, s.epochs[0], r), validation) for r in s.rates}
        for name in STARTS
    }
    rate = {name: max(found, key=found.__getitem__) for name, found in tried.items()}
    print("rates:", rate, flush=True)

    accuracies: dict[tuple[str, int, int], list[float]] = {}
    transfer: dict[str, list[float]] = {name: [] for name in STARTS}
    explained = []
    for seed in range(s.seeds):
        bench = Bench(s, seed, parts, train)
        plain = bench.genes["plain layers"]
        explained.append({p: float(r) for p, r in tleg_r2(plain, tleg_fit(plain)).items()})
        for depth in s.depths:
            for name in STARTS:
                for epochs in s.epochs if name == "scratch" else s.epochs[:1]:
                    found = score(depth, bench.trained(name, depth, epochs, rate[name]), parts["test"])
                    accuracies.setdefault((name, depth, epochs), []).append(found)
                    print(f"seed {seed}, depth {depth}, {name}, {epochs} epochs: {100 * found:.2f} %", flush=True)
        few = np.random.default_rng(seed).permutation(len(digits["train"][1]))[: s.digits]
        own = {"image": jnp.asarray(digits["train"][0][few]), "label": jnp.asarray(digits["train"][1][few], jnp.int32)}
        model = vit(s, middle)
        fresh = initialiser(s, middle)(jax.random.fold_in(bench.key, 99), own["image"][:1])["params"]["head"]
        rows = study.rows_of(len(few), s.digits_steps, min(s.batch, len(few)), seed)
        for name in STARTS:
            start = bench.start(name, middle)
            start = {"params": {**start["params"], "head": fresh}}
            params = train(("digits", middle), label_loss(model.apply), start, rate[name], own, rows)
            transfer[name].append(score(middle, params, digits["test"]))

    first = s.epochs[0]
    row = lambda name, test, **more: {
        "method": name, "test": test, "mean": statistics.mean(test), "std": statistics.stdev(test), **more
    }  # fmt: skip
    rows = [
        row(f"{name}, depth {d}, {e} epoch{'s' * (e > 1)}", accuracies[name, d, e], rate=rate[name])
        for d in s.depths
        for name in STARTS
        for e in (s.epochs if name == "scratch" else (first,))
    ]
    rows += [row(f"digits, {name}", transfer[name], rate=rate[name]) for name in STARTS]
    mean_over = lambda name, depths: [statistics.mean(x) for x in zip(*(accuracies[name, d, first] for d in depths))]
    points = lambda a, b: study.interval([100 * (x - y) for x, y in zip(a, b, strict=True)])
    told = lambda pair: f"{pair[0]:+.2f} ± {pair[1]:.2f} points"
    by_depth = {d: points(accuracies["TLEG", d, first], accuracies["scratch", d, first]) for d in s.depths}
    others = [d for d in s.depths if d != s.depth]
    over_plain = points(mean_over("TLEG", others), mean_over("plain layers", others))
    over_shared = points(mean_over("TLEG", s.depths), mean_over("shared", s.depths))
    epoch, mean = s.images // s.batch, lambda *which: statistics.mean(accuracies[which])
    needed = {
        d: next(
            (e for e in s.epochs if mean("scratch", d, e) >= mean("TLEG", d, first)),
            s.epochs[-1],
        )
        for d in s.depths
    }
    ours, scratch = s.stage_1 + len(s.depths) * epoch, epoch * sum(needed.values())
    on_digits = points(transfer["TLEG"], transfer["scratch"])
    claims = [
        record.claim(
            "After one epoch TLEG is at least 3 points over scratch at every depth",
            all(mean >= 3 for mean, _ in by_depth.values()),
            "; ".join(f"{d}: {told(pair)}" for d, pair in by_depth.items()),
        ),
        record.claim("TLEG is at least as good as the plain network's layers", over_plain[0] >= 0, told(over_plain)),
        record.claim("TLEG is over the shared block", over_shared[0] > 0, told(over_shared)),
        record.claim(
            "Four networks by TLEG take fewer steps than from scratch to the same accuracies",
            ours < scratch,
            f"{ours:,} and {scratch:,} steps ({', '.join(f'depth {d}: {e} epochs' for d, e in needed.items())})",
        ),
        record.claim("On digits TLEG is at least 3 points over scratch", on_digits[0] >= 3, told(on_digits)),
    ]
    shapes = lambda d: jax.eval_shape(vit(s, d).init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    stored = {
        "gene": trees.count(jax.eval_shape(tleg(shapes(s.depth)).init, jax.random.key(0))),
        "networks": sum(trees.count(shapes(d)) for d in s.depths),
    }
    r2 = {p: statistics.mean(e[p] for e in explained) for p in explained[0]}

    def draw(axes: Any) -> None:
        for name in STARTS:
            for e in s.epochs if name == "scratch" else (first,):
                means = [100 * statistics.mean(accuracies[name, d, e]) for d in s.depths]
                spread = [100 * statistics.stdev(accuracies[name, d, e]) for d in s.depths]
                style = ":" if e > first else "-"
                axes.errorbar(s.depths, means, spread, fmt=f"o{style}", capsize=2, markersize=3,
                              label=f"{name}, {e} epoch{'s' * (e > 1)}")  # fmt: skip
        axes.set(xlabel="layers", ylabel="test accuracy, %")
        axes.legend(fontsize=7)

    study.finish(
        "tleg", args, paper="Xia et al.: Transformer as Linear Expansion of Learngene, AAAI 2024", setup=s, rows=rows,
        claims=claims, began=began, figure=draw, stored=stored, r2=r2, validation_by_rate=tried,
    )  # fmt: skip


if __name__ == "__main__":
    main()
