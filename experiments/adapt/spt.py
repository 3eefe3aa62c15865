"""SPT (He et al., ICCV 2023), in small: do a task's gradients say where a budget of parameters should go?

    python experiments/adapt/spt.py            all of it: about half an hour on two cores
    python experiments/adapt/spt.py --smoke    every part once in small; writes nothing unless --out is given

A ViT (6 layers, width 96, patches of 7) is trained once on eight of Fashion-MNIST's ten classes and kept in the cache. It is
adapted to three targets, up to 800 training images each: scikit-learn's digits, MNIST, and by how many quarters a picture of
the two held-out classes is turned. All arms but the linear probe and full fine-tuning train the same number of parameters,
that of LoRA with r = 1 on every matrix (10,368), with the class token and the head beside: entries at random positions, of
the largest weights, of the largest sensitivities, and SPT (LoRA with r = 2 where a matrix has enough sensitive entries, whole
vectors, entries elsewhere). Sensitivities come from the first 16 batches of 32 training images, once a target, as in the
paper; random positions are new for each seed. For each arm and target one rate out of a grid by the validation images of two
tuning seeds; then five seeds, of which the test images are looked at once. What is compared is the mean over the targets.

Small about it: the model, one budget (the paper tries several and reports the best), 200 updates, no stochastic depth.

Stated before running, each to be reported as holding or not, by the mean of the paired differences over seeds:
  1. SPT is at least 3 points over the linear probe.
  2. SPT is at most 0.3 points under LoRA on every matrix.
  3. SPT is over it.
  4. Sensitive entries are at least 1 point over random ones.
  5. Sensitive entries are over those of the largest weights.
"""

import dataclasses
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import bases
import numpy as np
import study

from jaxpeft import chain, full, head, lora, spt, train, trees

MATRICES = "**/{attention,mlp}/*/kernel"
CLASS_TOKEN = "**/embeddings/cls"
HELD_OUT = (8, 9)


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    base: bases.Vit = dataclasses.field(default_factory=lambda: bases.Vit(classes=tuple(range(8))))
    rank: int = 2
    examples: int = 800
    held: int = 400  # of validation
    tested: int = 1000
    targets: tuple[str, ...] = ("digits", "mnist-5k", "rotations")
    budget: study.Budget = dataclasses.field(
        default_factory=lambda: study.Budget(steps=200, rates=(3e-3, 1e-2, 3e-2), tuning_seeds=2)
    )
    full_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)


SMOKE = Setup(
    dataclasses.replace(bases.SMALL_VIT, layers=1, classes=tuple(range(8))),
    1,
    40,
    16,
    16,
    ("rotations",),
    study.Budget(steps=2, batch=8, rates=(3e-3,), tuning_seeds=1, seeds=2),
    (1e-3,),
)


def rotated(part: Any, seed: int) -> Any:
    """Pictures of the held-out classes, turned by 0 to 3 quarters, which are the labels."""
    pictures, _ = bases.of_classes(part, HELD_OUT)
    quarters = np.random.default_rng(seed).integers(0, 4, len(pictures))
    return np.stack([np.rot90(x, k) for x, k in zip(pictures, quarters)]), quarters


def target(name: str, s: Setup) -> dict[str, Any]:
    """The examples of a target by split."""
    parts = bases.images("fashion-mnist" if name == "rotations" else name, s.base.size)
    if name == "rotations":
        parts = {k: rotated(p, i) for i, (k, p) in enumerate(parts.items())}
    few = {"train": s.examples, "validation": s.held, "test": s.tested}
    # At random: MNIST's splits are in the order of their classes.
    rows = {k: np.random.default_rng(7).permutation(len(y))[: few[k]] for k, (_, y) in parts.items()}
    return {k: study.images_of(x[rows[k]], y[rows[k]]) for k, (x, y) in parts.items()}


def arms(problem: study.Problem, s: Setup) -> dict[str, study.Arm]:
    """Every method for one target."""
    seen = study.study_of(problem, s.budget, 0)
    leaves = trees.by_path(problem.params)
    matrices = trees.matches(MATRICES, leaves)
    budget = sum(sum(leaves[p].shape) for p in matrices) + trees.count(
        [leaves[p] for p in trees.matches(CLASS_TOKEN, leaves)]
    )

    def chosen(**options: Any) -> Any:
        method = spt(budget, s.rank, **options)
        assert method.prepare is not None
        return method.prepare(seen)

    entries = dict(alpha=0.0, beta=0.0)
    methods = {
        "LoRA": chain(lora(1, 1.0, MATRICES), full(CLASS_TOKEN)),
        # Not prepared: positions are drawn for each seed, in every weight as many as its share.
        "random entries": spt(budget, s.rank, score="random", **entries)._replace(prepare=None),
        "largest weights": chosen(score="magnitude", **entries),
        "sensitive entries": chosen(**entries),
        "SPT": chosen(),
        "SPT, adapters": chosen(inner="adapter"),
    }
    out = {"linear probe": study.Arm(head())}
    out |= {n: study.Arm(chain(m, head())) for n, m in methods.items()}
    return out | {"full": study.Arm(full(), rates=s.full_rates)}


def described(plan: Any) -> dict[str, Any]:
    """Where a plan puts its parameters: how many modules of each kind, whole vectors, entries of each kind of weight."""
    kind = lambda p: "/".join(p.split("/")[-3:-1])
    entries: Counter[str] = Counter()
    for path, n in plan["counts"].items():
        entries[kind(path)] += n
    return {
        "modules": dict(Counter(map(kind, plan["modules"]))),
        "modules_by_layer": dict(Counter(p.split("/")[2] for p in plan["modules"])),
        "whole": dict(Counter(map(kind, plan["whole"]))),
        "entries": dict(entries),
        "tau": plan["tau"],
        "total": plan["total"],
    }


def over_targets(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row for all targets: each seed's mean over them."""
    test = [statistics.mean(seeds) for seeds in zip(*(r["test"] for r in rows))]
    return {
        "method": name,
        "trained": rows[0]["trained"],
        "test": test,
        "mean": statistics.mean(test),
        "std": statistics.stdev(test),
        "details": {"rates": [r["rate"] for r in rows], "by_target": [r["test"] for r in rows]},
    }


def main() -> None:
    args = study.arguments("SPT in small; see the file's first lines.")
    s, began = SMOKE if args.smoke else Setup(), time.perf_counter()
    model, params, accuracy = bases.fashion_vit(s.base, keep=not args.smoke)
    print(f"Fashion-MNIST, eight classes: validation accuracy {accuracy:.3f}", flush=True)

    by_target: dict[str, dict[str, Any]] = {}
    plans = {}
    for name in s.targets:
        examples = target(name, s)
        classes = int(max(e.label.max() for e in examples.values())) + 1
        made, own = bases.with_new_head(model, params, classes)
        problem = study.Problem(made.apply, own, examples, train.image_classification())
        print(f"-- {name}: {len(examples['train'].label)} training images, {classes} classes", flush=True)
        methods = arms(problem, s)
        plans[name] = {
            n: described(methods[n].method.config["methods"][0]["plan"]) for n in ("sensitive entries", "SPT")
        }
        by_target[name] = study.measure(methods, problem, s.budget)

    rows = [over_targets(name, [d[name] for d in by_target.values()]) for name in by_target[s.targets[0]]]
    by = {r["method"]: r for r in rows}
    claims = [
        study.at_least("SPT is at least 3 points over the linear probe", by["SPT"], by["linear probe"], 3.0),
        study.at_least("SPT is at most 0.3 points under LoRA on every matrix", by["SPT"], by["LoRA"], -0.3),
        study.at_least("SPT is over LoRA on every matrix", by["SPT"], by["LoRA"], 1e-9),
        study.at_least(
            "Sensitive entries are at least 1 point over random ones",
            by["sensitive entries"],
            by["random entries"],
            1.0,
        ),
        study.at_least(
            "Sensitive entries are over the largest weights", by["sensitive entries"], by["largest weights"], 1e-9
        ),
    ]
    study.finish(
        "spt",
        args,
        paper="SPT, He et al., ICCV 2023",
        setup=s,
        rows=rows,
        claims=claims,
        began=began,
        base_validation_accuracy=accuracy,
        plans=plans,
        by_target={
            t: {n: {k: v for k, v in r.items() if k != "details"} for n, r in d.items()} for t, d in by_target.items()
        },
    )


if __name__ == "__main__":
    main()
