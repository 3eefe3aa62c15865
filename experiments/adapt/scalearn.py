"""ScaLearn (Frohmann et al., Findings of ACL 2024), in small: a few scales over adapters of other tasks.

    python experiments/adapt/scalearn.py            all of it: about half an hour on two cores
    python experiments/adapt/scalearn.py --smoke    every part once in small; writes nothing unless --out is given

A ViT (4 layers, width 64) is trained once on Fashion-MNIST and kept in the cache. Six source tasks train a Pfeiffer adapter
(r = 8) each, for every seed anew: MNIST's digits, their parity, whether they are under five, whether they have a loop, and two
groups of Fashion-MNIST's classes. Targets are small: scikit-learn's digits (other pictures, 8 x 8) by class, parity, under
five, loop, from 60 or 120 examples. Each target trains an adapter of its own; then, with that one and the six sources frozen,
the methods of the paper learn how to combine them, with a new head. For each arm and target one rate out of a grid by a tuning
seed; then five seeds, of which the test split is looked at once. What is compared is the mean over targets.

Stated before running, each to be reported as holding or not, by the mean of the paired differences over seeds:
  1. ScaLearn is at least as good as the target's own adapter.
  2. It is at most 0.3 points under AdapterFusion, with T / (3 d + 2) of its parameters: 3.6 % at this width, 0.35 % at
     RoBERTa's with eight adapters.
  3. ScaLearnUniform++, seven numbers, is at least as good as the target's own adapter.
  4. Unconstrained scales are at least as good as their softmax.
Transfer must exist for any of it: the same questions on MNIST are related sources.
"""

import dataclasses
import statistics
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

from jaxpeft import adapter_fusion, chain, head, pfeiffer, scalearn, train, trees

QUESTIONS = {
    "class": lambda y: y,
    "parity": lambda y: y % 2,
    "under five": lambda y: (y < 5).astype(int),
    "loop": lambda y: np.isin(y, (0, 6, 8, 9)).astype(int),
}
GROUPS = {"tops": (0, 2, 4, 6), "shoes": (5, 7, 9)}


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    base: bases.Vit = dataclasses.field(default_factory=lambda: bases.Vit(layers=4, width=64, heads=4))
    rank: int = 8
    source_examples: int = 3600
    source: study.Budget = dataclasses.field(
        default_factory=lambda: study.Budget(steps=300, rates=(3e-3,), tuning_seeds=1)
    )
    targets: tuple[tuple[str, int], ...] = (("class", 120), ("parity", 60), ("under five", 120), ("loop", 60))
    budget: study.Budget = dataclasses.field(
        default_factory=lambda: study.Budget(steps=150, rates=(1e-3, 3e-3, 1e-2), tuning_seeds=1)
    )
    scale_rates: tuple[float, ...] = (6e-3, 2e-2, 6e-2)


SMOKE = Setup(
    dataclasses.replace(bases.SMALL_VIT, examples=60),
    2,
    40,
    study.Budget(steps=2, batch=8, rates=(3e-3,), tuning_seeds=1, seeds=2),
    (("parity", 12),),
    study.Budget(steps=2, batch=8, rates=(3e-3,), tuning_seeds=1, seeds=2),
    (6e-3,),
)


def source_tasks(s: Setup) -> dict[str, Any]:
    """Name -> (examples by split, number of classes)."""
    mnist = bases.images("mnist-5k", s.base.size, examples=s.source_examples)
    fashion = bases.images("fashion-mnist", s.base.size, examples=4 * s.source_examples)
    out = {
        f"MNIST {q}": {k: study.images_of(x, f(np.asarray(y))) for k, (x, y) in mnist.items()}
        for q, f in QUESTIONS.items()
    }
    for name, classes in GROUPS.items():
        out[name] = {k: study.images_of(*bases.of_classes(p, classes)) for k, p in fashion.items()}
    return out


def target_task(question: str, count: int, s: Setup) -> dict[str, Any]:
    """Examples by split: `count` to train on, half as many to validate."""
    digits = bases.images("digits", s.base.size)
    few = {"train": count, "validation": len(digits["validation"][1]), "test": len(digits["test"][1])}
    return {
        k: study.images_of(x[: few[k]], QUESTIONS[question](np.asarray(y[: few[k]]))) for k, (x, y) in digits.items()
    }


def combining(s: Setup, count: int) -> dict[str, study.Arm]:
    """The arms of the second stage, their adapters still to come (`start`)."""

    def scaled(**options: Any) -> study.Arm:
        method = scalearn(count, s.rank, **options)
        return study.Arm(chain(method._replace(name="combined"), head()), rates=s.scale_rates)

    return {
        "average": study.Arm(chain(scalearn(count, s.rank, train=False, init_scale=1.0, name="combined"), head())),
        "AdapterFusion": study.Arm(chain(adapter_fusion(count, s.rank, name="combined"), head())),
        "ScaLearn": scaled(),
        "ScaLearnUniform": scaled(uniform=True),
        "ScaLearn++": scaled(share_layers=True),
        "ScaLearnUniform++": scaled(uniform=True, share_layers=True),
        "ScaLearn, mean": scaled(constraint="mean", dropout=0.0),
        "ScaLearn, softmax": scaled(constraint="softmax", dropout=0.0),
    }


def with_adapters(delta: Any, adapters: list[Any]) -> Any:
    """The start of a second stage with these adapters in place of the drawn ones."""
    stacked = trees.stack(adapters)
    own = delta["combined"]
    fixed = {p: jax.tree.map(lambda x: trees.Fixed(jnp.asarray(x)), d) for p, d in stacked.items()}
    if "scale" in own:
        return {**delta, "combined": {**own, "adapters": fixed}}
    return {**delta, "combined": {p: {**d, **fixed[p]} for p, d in own.items()}}


def problem_of(model: Any, params: Any, examples: dict[str, Any]) -> study.Problem:
    classes = int(max(e.label.max() for e in examples.values())) + 1
    made, own = bases.with_new_head(model, params, classes)
    return study.Problem(made.apply, own, examples, train.image_classification())


def main() -> None:
    args = study.arguments("ScaLearn in small; see the file's first lines.")
    s, began = SMOKE if args.smoke else Setup(), time.perf_counter()
    model, params, _ = bases.fashion_vit(s.base, keep=not args.smoke)
    adapter = {"adapter": study.Arm(chain(pfeiffer(s.rank), head()))}

    sources, source_rows = {}, []
    for name, examples in source_tasks(s).items():
        kept: dict[str, Any] = {}
        done = study.measure(adapter, problem_of(model, params, examples), s.source, kept)
        sources[name] = kept["adapter"]
        source_rows.append({**done["adapter"], "method": name})

    by_target: dict[str, dict[str, Any]] = {}
    for question, count in s.targets:
        print(f"-- digits, {question}, {count} examples", flush=True)
        problem = problem_of(model, params, target_task(question, count, s))
        kept = {}
        done = study.measure({"own adapter": adapter["adapter"]}, problem, s.budget, kept)

        def start(seed: int, params: Any, delta: Any, own: Any = kept["own adapter"]) -> Any:
            every = [*(d[seed]["pfeiffer"] for d in sources.values()), own[seed]["pfeiffer"]]
            return with_adapters(delta, every)

        arms = {n: dataclasses.replace(a, start=start) for n, a in combining(s, len(sources) + 1).items()}
        arms["head alone"] = study.Arm(head())
        by_target[question] = done | study.measure(arms, problem, s.budget)

    rows = [over_targets(name, [d[name] for d in by_target.values()]) for name in next(iter(by_target.values()))]
    by = {r["method"]: r for r in rows}
    fusion, ours = by["AdapterFusion"], by["ScaLearn"]
    heads = by["head alone"]["trained"]
    share = (ours["trained"] - heads) / (fusion["trained"] - heads)
    gap = study.difference(ours, fusion)
    claims = [
        study.at_least("ScaLearn is at least as good as the target's own adapter", ours, by["own adapter"]),
        record.claim(
            "It is at most 0.3 points under AdapterFusion, with T / (3 d + 2) of its parameters",
            gap[0] >= -0.3 and share < 0.04,
            f"{gap[0]:+.2f} ± {gap[1]:.2f} points with {share:.2%} of the parameters",
        ),
        study.at_least(
            "ScaLearnUniform++ is at least as good as the target's own adapter",
            by["ScaLearnUniform++"],
            by["own adapter"],
        ),
        study.at_least("Unconstrained scales are at least as good as their softmax", ours, by["ScaLearn, softmax"]),
    ]
    study.finish(
        "scalearn",
        args,
        paper="ScaLearn, Frohmann et al., Findings of ACL 2024",
        setup=s,
        rows=rows,
        claims=claims,
        began=began,
        tables=["sources"],
        sources=[{k: v for k, v in r.items() if k != "details"} for r in source_rows],
        by_target={
            q: {n: {k: v for k, v in r.items() if k != "details"} for n, r in d.items()} for q, d in by_target.items()
        },
    )


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


if __name__ == "__main__":
    main()
