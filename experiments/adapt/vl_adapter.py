"""VL-Adapter (Sung et al., CVPR 2022), in small: what adapters of several tasks should share.

    python experiments/adapt/vl_adapter.py            all of it: about twenty minutes on two cores
    python experiments/adapt/vl_adapter.py --smoke    every part once in small; writes nothing unless --out is given

A ViT (4 layers, width 64) is trained once on seven of Fashion-MNIST's classes, kept in the cache and frozen. Four tasks of
very unequal sizes are then trained together, batches drawn in proportion to the sizes: MNIST's digits (1,200 images), their
parity (600 others), the three classes of Fashion-MNIST that the base has not seen (1,200), and whether two digits, each shrunk
to half and set side by side, are the same (150 pairs; NLVR2's part in the paper). Every task has a head of its own, which
stands for the paper's text prefix, and all methods but the prompt and full fine-tuning train the layer norms too, as the
paper's do. r = d / 8. There is no language and no decoder in it, and images are 28 x 28.

Methods: full fine-tuning, adapters for each task (multiple), with shared down maps (half-shared), one for all (single), one
Compacter (n = 2), Hyperformer (embeddings of 64, p = 8), and one visual prompt of 8 vectors behind the class token, without the
paper's network around it. One rate for each out of a grid by the validation scores of two seeds that are not measured; five
seeds; one look at the test images. The score is the mean over tasks of a task's accuracy.

Stated before running, each to be reported as holding or not, by means of paired differences over seeds:
  1. With at most 0.3 of the adapters' parameters, the single adapter is at least as good as multiple adapters on the small
     task, and at most half a point worse in the mean.
  2. The prompt is at least 5 points below the single adapter.
  3. The single adapter is at most 2 points below full fine-tuning.
  4. The Compacter has fewer parameters than the single adapter and is at most 2 points below it.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import bases
import jax
import jax.numpy as jnp
import numpy as np
import record
import study

from jaxpeft import (
    Hook,
    Method,
    adapt,
    chain,
    compacter,
    full,
    head,
    hyperformer,
    on_hooks,
    per_task,
    train,
    trees,
    vl_adapter,
)

NAMES = ("digits", "parity", "fashion", "pairs")
CLASSES = (10, 2, 3, 2)
SMALL_TASK = NAMES.index("pairs")
HELD_OUT = (7, 8, 9)
NORMS, BACKBONE = "**/*norm/*", "**/backbone/**"


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    base: bases.Vit = dataclasses.field(
        default_factory=lambda: bases.Vit(layers=4, width=64, heads=4, classes=tuple(range(7)))
    )
    train: tuple[int, ...] = (1200, 600, 1200, 150)
    validation: int = 300
    test: int = 1000
    prompt: int = 8
    embedding: int = 64
    steps: int = 600
    batch: int = 32
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    full_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    tuning_seeds: int = 2
    seeds: int = 5


SMOKE = Setup(
    dataclasses.replace(bases.SMALL_VIT, layers=1, classes=tuple(range(7))),
    train=(24, 12, 24, 8),
    validation=12,
    test=12,
    prompt=2,
    embedding=4,
    steps=3,
    batch=8,
    rates=(3e-3,),
    full_rates=(1e-3,),
    tuning_seeds=1,
    seeds=2,
)


# ------------------------------------------------------------------------------------------------------------ the tasks


def pairs_of(part: Any, count: int, size: int, seed: int) -> Any:
    """`count` images of two digits side by side, half of them equal ones; 1 where they are equal."""
    images, labels = part
    rng = np.random.default_rng(seed)
    same = rng.permutation(np.arange(count) % 2)
    first = rng.integers(0, len(labels), count)
    equal = labels[first][:, None] == labels[None]
    fits = np.where(same[:, None] == 1, equal, ~equal)
    second = np.array([rng.choice(np.flatnonzero(row)) for row in fits])
    half = size // 2
    small = np.asarray(jax.image.resize(jnp.asarray(images), (len(labels), half, half, 1), "bilinear"))
    out = np.full((count, size, size, 1), -1, np.float32)
    out[:, size // 4 : size // 4 + half, :half] = small[first]
    out[:, size // 4 : size // 4 + half, half:] = small[second]
    return out, same


def joined(s: Setup) -> dict[str, Any]:
    """Split -> all tasks' examples, `task` included."""
    few = 10 * s.base.examples
    digits, fashion = (bases.images(name, s.base.size, examples=few) for name in ("mnist-5k", "fashion-mnist"))
    out = {}
    for number, split in enumerate(("train", "validation", "test")):
        sizes = s.train if split == "train" else (getattr(s, split),) * 4
        rng = np.random.default_rng(number)
        order = rng.permutation(len(digits[split][1]))
        # The tasks' training images are others; the few for validation and for the test serve all tasks.
        start = np.cumsum([0, sizes[0], sizes[1]]) if split == "train" else np.zeros(3, int)
        part = tuple(x[order] for x in digits[split])
        cut = lambda at, n, part=part: (part[0][at : at + n], part[1][at : at + n])
        clothes = bases.of_classes(fashion[split], HELD_OUT)
        chosen = rng.permutation(len(clothes[1]))[: sizes[2]]
        parity = cut(start[1], sizes[1])
        tasks = [
            cut(start[0], sizes[0]),
            (parity[0], parity[1] % 2),
            (clothes[0][chosen], clothes[1][chosen]),
            pairs_of(cut(start[2], len(order)), sizes[3], s.base.size, number),
        ]
        which = np.concatenate([np.full(len(y), t) for t, (_, y) in enumerate(tasks)])
        images, labels = (np.concatenate(arrays) for arrays in zip(*tasks))
        out[split] = study.images_of(images, labels, which)
    return out


# ---------------------------------------------------------------------------------------------------------- the methods


def prompt(length: int) -> Method:
    """Learned vectors behind the class token, for all tasks the same."""
    normal = lambda key, shape, dtype: 0.02 * jax.random.normal(key, shape, dtype)

    def around(site: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        x = call(*args, **kwargs)
        p = site.param("prompt", (length, x.shape[-1]), normal)
        return jnp.concatenate([x[:, :1], jnp.broadcast_to(p, (x.shape[0], *p.shape)), x[:, 1:]], axis=1)

    return on_hooks("prompt", [Hook("**/embeddings", around)], {"method": "prompt", "length": length})


def methods(s: Setup) -> dict[str, Method]:
    """What is trained beside the heads, under the name that its row has."""
    t = len(NAMES)
    norms = lambda m: chain(m, full(NORMS, name="norms"))
    return {
        "full": full([BACKBONE], name="full"),
        "multiple adapters": norms(vl_adapter(tasks=t, share="multiple")),
        "half-shared adapters": norms(vl_adapter(tasks=t, share="half_down")),
        "single adapter": norms(vl_adapter(tasks=t)),
        "single Compacter": norms(compacter(tasks=t)),
        "Hyperformer": norms(hyperformer(tasks=t, embedding=s.embedding)),
        "single prompt": prompt(s.prompt),
    }


def adapter_parameters(method: Method, problem: study.Problem) -> int:
    """Learned parameters without norms and heads."""
    image = problem.examples["train"].image[:1]
    delta = jax.eval_shape(adapt(problem.apply_fn, method).init, jax.random.key(0), problem.params, image)
    return trees.count({k: v for k, v in delta.items() if k != "norms"})


def main() -> None:
    args = study.arguments(__doc__.splitlines()[0])
    s = SMOKE if args.smoke else Setup()
    # Nearly all of a smoke run's time goes into programs that run twice.
    jax.config.update("jax_disable_most_optimizations", args.smoke)
    began = time.perf_counter()
    model, params, accuracy = bases.fashion_vit(s.base, keep=not args.smoke)
    print(f"base: {accuracy:.2%} on the seven classes it knows", flush=True)
    model, params = bases.with_new_head(model, params, max(CLASSES))
    task = train.classes_of_tasks(train.image_classification(), CLASSES)
    problem = study.Problem(model.apply, params, joined(s), task)
    budget = study.Budget(steps=s.steps, batch=s.batch, rates=s.rates, tuning_seeds=s.tuning_seeds, seeds=s.seeds)
    made = methods(s)
    arms = {
        name: study.Arm(chain(m, per_task(head(), len(NAMES))), s.full_rates if name == "full" else None)
        for name, m in made.items()
    }
    rows = study.measure(arms, problem, budget)
    for name, row in rows.items():
        row["adapters"] = adapter_parameters(made[name], problem)
        row |= {
            f"mean_{n}": float(np.mean([x[t] for x in row["details"]["test_by_task"]])) for t, n in enumerate(NAMES)
        }
    study.finish(
        "vl-adapter",
        args,
        paper="Sung et al., CVPR 2022",
        setup=s,
        rows=list(rows.values()),
        claims=verdicts(rows),
        began=began,
        figure=study.points(list(rows.values()), "adapters", "adapters' parameters", "mean accuracy of four tasks, %"),
        base_accuracy=accuracy,
    )


def verdicts(rows: dict[str, Any]) -> list[dict[str, str]]:
    """The docstring's claims against the rows."""
    single, multiple = rows["single adapter"], rows["multiple adapters"]
    own = lambda row: {"test": [x[SMALL_TASK] for x in row["details"]["test_by_task"]]}
    small, small_half = study.difference(own(single), own(multiple))
    mean, half = study.difference(single, multiple)
    share = single["adapters"] / multiple["adapters"]
    phm = rows["single Compacter"]
    behind, behind_half = study.difference(phm, single)
    return [
        record.claim(
            "One adapter for all tasks, with at most 0.3 of the parameters, is at least as good as one for each on the small "
            "task and at most half a point worse in the mean",
            share <= 0.3 and small >= 0 and mean >= -0.5,
            f"{share:.2f} of the parameters; small task {small:+.2f} ± {small_half:.2f}, mean {mean:+.2f} ± {half:.2f} points",
        ),
        study.at_least("The prompt is at least 5 points below the single adapter", single, rows["single prompt"], 5.0),
        study.at_least("The single adapter is at most 2 points below full fine-tuning", single, rows["full"], -2.0),
        record.claim(
            "The Compacter has fewer parameters than the single adapter and is at most 2 points below it",
            phm["adapters"] < single["adapters"] and behind >= -2,
            f"{phm['adapters']:,} against {single['adapters']:,}; {behind:+.2f} ± {behind_half:.2f} points",
        ),
    ]


if __name__ == "__main__":
    main()
