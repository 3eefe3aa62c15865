"""Polyhistor (Liu et al., NeurIPS 2022), in small: hypernetworks for dense tasks in a network whose widths double.

    python experiments/adapt/polyhistor.py            all of it: about thirty minutes on two cores
    python experiments/adapt/polyhistor.py --smoke    every part once in small; writes nothing unless --out is given

A hierarchical transformer (widths 16, 32, 64, 128, two blocks each, windows of 4 x 4, patches of 4 x 4 pixels, images of
32 x 32) is trained once on Fashion-MNIST's classes, kept in the cache and frozen. Four dense tasks on noisy MNIST digits are
then trained together, each with a small decoder of its own: the digit's class for each pixel (PASCAL's segmentation), the
digit's area (saliency), the edges of the clean image, and the direction of its gradient (normals). 600 images train, each for
every task. Scores, all larger better: intersection over union of the digit's pixels with its class; of its area; one minus the
edges' squared error over their variance; the mean cosine of the directions, weighted by the gradient. A method's result is
the mean over tasks of its score's relative difference to full fine-tuning of a network for each task, in percent, as the
paper's; "encoder" counts what is learned outside of the decoders.

Methods (k = 32, r = 2, rho = 4): the decoders alone, all biases (each task its own), adapters for each task, adapters for all,
Hyperformer (embeddings of 64, p = 32; heads for each stage), Polyhistor, Polyhistor-Lite, and Lite with its kernels held at
ones / s. Full fine-tuning for a task takes as many steps on as many of its examples. One rate for each out of a grid by the
validation scores of a seed that is not measured; five seeds; one look at the test images.

Stated before running, each to be reported as holding or not, by means of paired differences over seeds:
  1. Polyhistor's encoder has at most 25 % of Hyperformer's learned parameters, Lite's at most 2 %. (The paper's shares are 9
     and 0.6 %. Here Hyperformer's heads serve both blocks of a stage and Polyhistor's one.)
  2. Polyhistor is at most one point below Hyperformer.
  3. Lite is above the decoders alone, and at least as good as the biases.
  4. Lite is at most 3 points below adapters for each task, with at most a tenth of their parameters.
  5. Lite is above Lite with its kernels held.
If adapters for each task are best, that will be said: what the paper gains there comes from tasks that help each other.
"""

import dataclasses
import statistics
import sys
import time
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
from pretraining import kept

from jaxpeft import (
    Method,
    adapt,
    bitfit,
    chain,
    full,
    head,
    hyperformer,
    per_task,
    polyhistor,
    polyhistor_lite,
    train,
    trees,
    vl_adapter,
)
from jaxpeft.models.hierarchical import DenseModel, HierarchicalClassifier, HierarchicalConfig

NAMES = ("segmentation", "area", "edges", "directions")
CLASSES = 11  # ten digits and what is none
BACKBONE = "**/backbone/**"


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    width: int = 16
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (1, 2, 4, 4)
    pretraining: int = 2000
    pretraining_batch: int = 64
    pretraining_examples: int = 0  # of each split; 0 for all
    train: int = 600
    validation: int = 100
    test: int = 300
    noise: float = 0.3
    decoder: int = 32
    rank: int = 2
    embedding: int = 32
    reduction: int = 4
    steps: int = 500
    batch: int = 32
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    full_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    seeds: int = 5


SMOKE = Setup(
    width=4,
    depths=(1, 1),
    heads=(1, 1),
    pretraining=2,
    pretraining_batch=8,
    pretraining_examples=40,
    train=8,
    validation=4,
    test=4,
    decoder=4,
    embedding=4,
    steps=2,
    batch=8,
    rates=(3e-3,),
    full_rates=(1e-3,),
    seeds=2,
)


def config(s: Setup) -> HierarchicalConfig:
    return HierarchicalConfig(width=s.width, depths=s.depths, heads=s.heads, patch=(4, 4))


# ------------------------------------------------------------------------------------------------------------ the tasks


class Dense(NamedTuple):
    """Images with a target for each pixel. `label` is the digit."""

    image: Any
    label: Any
    target: Any  # (n, y, x, 2)
    weight: Any
    index: Any
    task: Any


def targets_of(clean: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """(n, y, x, 2) of each task, out of clean images in [0, 1]."""
    x = clean[..., 0]
    area = (x > 0.5).astype(np.float32)
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1)])
    smooth = lambda a: a[..., :-2] + 2 * a[..., 1:-1] + a[..., 2:]
    swap = lambda a: np.swapaxes(a, 1, 2)
    across = smooth(swap(padded))  # (n, x + 2, y), smoothed along y
    dx = swap(across[:, 2:] - across[:, :-2]) / 8
    down = smooth(padded)
    dy = (down[:, 2:] - down[:, :-2]) / 8
    size = np.hypot(dx, dy)
    zero = np.zeros_like(x)
    classes = area * (1 + labels[:, None, None])
    return [np.stack(pair, -1) for pair in ((classes, zero), (area, zero), (size, zero), (dx, dy))]


def examples(s: Setup) -> dict[str, Dense]:
    """Split -> every image once for each task, with noise of its own."""
    found = bases.images("mnist-5k", 32)
    out = {}
    for number, (split, count) in enumerate((("train", s.train), ("validation", s.validation), ("test", s.test))):
        rng = np.random.default_rng(number)
        images, labels = found[split]
        rows = rng.permutation(len(labels))[:count]
        clean, digit = (images[rows] + 1) / 2, labels[rows]
        noisy = 2 * clean - 1 + s.noise * rng.normal(size=(4, *clean.shape))
        image = jnp.asarray(noisy.reshape(-1, *clean.shape[1:]), jnp.float32)
        target = jnp.asarray(np.concatenate(targets_of(clean, digit)), jnp.float32)
        n = 4 * count
        out[split] = Dense(
            image,
            jnp.asarray(np.tile(digit, 4), jnp.int32),
            target,
            jnp.ones(n),
            jnp.arange(n),
            jnp.repeat(jnp.arange(4), count),
        )
    return out


def of_task(every: Dense, task: int) -> Dense:
    """One task's examples, without the field that says so."""
    rows = np.flatnonzero(np.asarray(every.task) == task)
    return Dense(*(x[rows] for x in every[:-1]), None)


def chosen(batch: Dense, task: int | None, of_each: list[Any]) -> Any:
    """(b,) of each row's own task."""
    if task is not None:
        return of_each[task]
    which = jnp.broadcast_to(batch.task, of_each[0].shape)
    return jnp.take_along_axis(jnp.stack(of_each), which[None], axis=0)[0]


def losses(task: int | None) -> Any:
    """The loss of a row: cross-entropy (the digit's pixels and the others with half the weight each), that of two classes,
    squared error, one minus the weighted cosine."""

    def run(outputs: Any, batch: Dense) -> Any:
        t = batch.target
        mean = lambda x: x.mean((1, 2))
        own = optax.softmax_cross_entropy_with_integer_labels(outputs, t[..., 0].astype(jnp.int32))
        inside = (t[..., 0] > 0).astype(own.dtype)
        share = inside.mean((1, 2), keepdims=True)
        own = own * (inside / jnp.maximum(share, 1e-3) + (1 - inside) / (1 - share)) / 2
        area = optax.sigmoid_binary_cross_entropy(outputs[..., 0], t[..., 0])
        edges = 100 * jnp.square(outputs[..., 0] - t[..., 0])
        return chosen(batch, task, [mean(own), mean(area), mean(edges), 1 - cosine(outputs, t)])

    return run


def cosine(outputs: Any, target: Any) -> Any:
    """(b,): between two directions a pixel, in proportion to the target's size."""
    inner = (outputs[..., :2] * target).sum(-1)
    size = jnp.sqrt(jnp.square(outputs[..., :2]).sum(-1) + 1e-6)
    return (inner / size).sum((1, 2)) / (jnp.sqrt(jnp.square(target).sum(-1) + 1e-12).sum((1, 2)) + 1e-6)


def scores(task: int | None) -> Any:
    """Of a row, larger is better."""

    def overlap(a: Any, b: Any) -> Any:
        return (a & b).sum((1, 2)) / jnp.maximum((a | b).sum((1, 2)), 1)

    def run(outputs: Any, batch: Dense) -> Any:
        t = batch.target
        digit = 1 + batch.label[:, None, None]
        own = overlap(outputs.argmax(-1) == digit, t[..., 0] == digit)
        area = overlap(outputs[..., 0] > 0, t[..., 0] > 0.5)
        spread = jnp.square(t[..., 0] - t[..., 0].mean((1, 2), keepdims=True)).sum((1, 2))
        edges = 1 - jnp.square(outputs[..., 0] - t[..., 0]).sum((1, 2)) / jnp.maximum(spread, 1e-6)
        return chosen(batch, task, [own, area, edges, cosine(outputs, t)])

    return run


def problem_of(model: DenseModel, params: Any, parts: dict[str, Dense], task: int | None = None) -> study.Problem:
    forward = train.image_classification().forward
    own = parts if task is None else {split: of_task(part, task) for split, part in parts.items()}
    return study.Problem(model.apply, params, own, train.Task(forward, losses(task)), scores(task))


# -------------------------------------------------------------------------------------------------------- base, methods


def base(s: Setup, keep: bool) -> tuple[DenseModel, Any, float]:
    """The dense model on the pretrained backbone, and what the backbone's classifier scored on validation images."""
    classifier = HierarchicalClassifier(config(s), 10)
    found = bases.images("fashion-mnist", 32, examples=s.pretraining_examples)
    parts = {split: study.images_of(*part) for split, part in found.items() if split != "test"}
    start = jax.jit(classifier.init)(jax.random.key(0), parts["train"].image[:1])
    problem = study.Problem(classifier.apply, start, parts, train.image_classification())
    adapted, steps, batch = adapt(classifier.apply, full()), s.pretraining, s.pretraining_batch

    def run(params: Any) -> Any:
        delta = adapted.init(jax.random.key(0), params, parts["train"].image[:1])
        fit = study.trainer(adapted, problem, study.Arm(full()), study.Budget(steps=steps, batch=batch))
        rows = study.rows_of(len(parts["train"].label), steps, batch, 0)
        delta, bad, _ = fit(params, delta, 2e-3, 0, parts["train"], rows)
        assert int(bad) < 0, f"pretraining diverged at step {int(bad)}"
        return adapted.merge(params, delta)

    what = {**dataclasses.asdict(config(s)), "dtype": "", "param_dtype": "", "steps": steps, "batch": batch}
    params = kept("hierarchical", what, start, run, keep)
    right = jax.jit(lambda x: classifier.apply(params, x).argmax(-1))
    images, labels = parts["validation"].image[:1000], parts["validation"].label[:1000]
    accuracy = float((right(images) == labels).mean())
    model = DenseModel(config(s), CLASSES, s.decoder)
    fresh = jax.jit(model.init)(jax.random.key(1), images[:1])["params"]
    return model, {"params": {**fresh, "backbone": params["params"]["backbone"]}}, accuracy


def methods(s: Setup) -> dict[str, Method | None]:
    """What is learned beside the decoders."""
    sizes = dict(tasks=len(NAMES), embedding=s.embedding, reduction=s.reduction)
    adapters = lambda share: vl_adapter(tasks=len(NAMES), share=share, reduction=s.reduction, init="lora")
    return {
        "decoders": None,
        "biases": per_task(bitfit(at="**/backbone/**/bias"), len(NAMES)),
        "adapters": adapters("multiple"),
        "shared adapters": adapters("single"),
        "Hyperformer": hyperformer(
            tasks=len(NAMES), embedding=2 * s.embedding, projected=s.embedding, reduction=s.reduction
        ),
        "Polyhistor": polyhistor(s.rank, **sizes),
        "Polyhistor-Lite": polyhistor_lite(s.rank, **sizes),
        "Lite without kernels": polyhistor_lite(s.rank, **sizes, kernels="fixed"),
    }


def main() -> None:
    args = study.arguments(__doc__.splitlines()[0])
    s = SMOKE if args.smoke else Setup()
    # Nearly all of a smoke run's time goes into programs that run twice.
    jax.config.update("jax_disable_most_optimizations", args.smoke)
    began = time.perf_counter()
    model, params, accuracy = base(s, keep=not args.smoke)
    print(f"base: {accuracy:.2%} on Fashion-MNIST", flush=True)
    parts = examples(s)
    budget = study.Budget(steps=s.steps, batch=s.batch, rates=s.rates, tuning_seeds=1, seeds=s.seeds)
    heads = per_task(head(), len(NAMES))
    arms = {n: study.Arm(heads if m is None else chain(m, heads)) for n, m in methods(s).items()}
    rows = study.measure(arms, problem_of(model, params, parts), budget)
    alone = dataclasses.replace(budget, batch=max(1, s.batch // len(NAMES)), rates=s.full_rates)
    singles = [
        study.measure({f"full, {name}": study.Arm(full())}, problem_of(model, params, parts, t), alone)[f"full, {name}"]
        for t, name in enumerate(NAMES)
    ]
    image = parts["train"].image[:1]
    for row, (_, method) in zip(rows.values(), methods(s).items()):
        shapes = (
            {} if method is None else jax.eval_shape(adapt(model.apply, method).init, jax.random.key(0), params, image)
        )
        row["encoder"] = trees.count(trees.learned(shapes)[0])
    rows["full"] = together(singles, trees.count(params["params"]["backbone"]))
    reference = [statistics.mean(row["test"]) for row in singles]
    for row in rows.values():
        by_task = row["details"]["test_by_task"]
        row["relative"] = [100 * statistics.mean((m - f) / f for m, f in zip(x, reference)) for x in by_task]
        row["mean_relative"] = statistics.mean(row["relative"])
        row |= {f"mean_{n}": float(np.mean([x[t] for x in by_task])) for t, n in enumerate(NAMES)}

    def draw(axes: Any) -> None:
        for name, row in rows.items():
            at = max(row["encoder"], 100), row["mean_relative"]
            axes.errorbar(*at, statistics.stdev(row["relative"]), fmt="o", capsize=3)
            axes.annotate(name, at, xytext=(5, 5), textcoords="offset points", fontsize=7)
        axes.set(xscale="log", xlabel="parameters learned in the encoder (none: 100)", ylabel="% from full fine-tuning")
        axes.margins(x=0.2)

    study.finish(
        "polyhistor",
        args,
        paper="Liu et al., NeurIPS 2022",
        setup=s,
        rows=list(rows.values()),
        claims=verdicts(rows),
        began=began,
        figure=draw,
        base_accuracy=accuracy,
    )


def together(singles: list[dict[str, Any]], encoder: int) -> dict[str, Any]:
    """The row of one network a task."""
    by_task = [list(x) for x in zip(*(row["test"] for row in singles))]
    test = [statistics.mean(x) for x in by_task]
    return {
        "method": "full",
        "trained": sum(row["trained"] for row in singles),
        "rate": max(row["rate"] for row in singles),
        "test": test,
        "mean": statistics.mean(test),
        "std": statistics.stdev(test),
        "last_loss": statistics.mean(row["last_loss"] for row in singles),
        "encoder": len(singles) * encoder,
        "details": {
            "test_by_task": by_task,
            **{row["method"]: row["details"] | {"rate": row["rate"]} for row in singles},
        },
    }


def verdicts(rows: dict[str, Any]) -> list[dict[str, str]]:
    """The docstring's claims against the rows."""
    gap = lambda a, b: study.interval([x - y for x, y in zip(rows[a]["relative"], rows[b]["relative"])])
    said = lambda a, b: f"{a} - {b}: {gap(a, b)[0]:+.2f} ± {gap(a, b)[1]:.2f}"
    share = lambda a, b: rows[a]["encoder"] / rows[b]["encoder"]
    lite, own, every = "Polyhistor-Lite", "Polyhistor", "adapters"
    best = max(rows, key=lambda n: rows[n]["mean_relative"])
    return [
        record.claim(
            "Of Hyperformer's learned parameters Polyhistor has at most 25 %, Lite at most 2 %",
            share(own, "Hyperformer") <= 0.25 and share(lite, "Hyperformer") <= 0.02,
            f"{share(own, 'Hyperformer'):.1%} and {share(lite, 'Hyperformer'):.2%}",
        ),
        record.claim(
            "Polyhistor is at most one point below Hyperformer",
            gap(own, "Hyperformer")[0] >= -1,
            said(own, "Hyperformer"),
        ),
        record.claim(
            "Lite is above the decoders alone and at least as good as the biases",
            gap(lite, "decoders")[0] > 0 and gap(lite, "biases")[0] >= 0,
            said(lite, "decoders") + "; " + said(lite, "biases"),
        ),
        record.claim(
            "Lite is at most 3 points below adapters for each task, with at most a tenth of their parameters",
            gap(lite, every)[0] >= -3 and share(lite, every) <= 0.1,
            f"{said(lite, every)}, with {share(lite, every):.1%}; the best is: {best}",
        ),
        record.claim(
            "Lite is above Lite with its kernels held",
            gap(lite, "Lite without kernels")[0] > 0,
            said(lite, "Lite without kernels"),
        ),
    ]


if __name__ == "__main__":
    main()
