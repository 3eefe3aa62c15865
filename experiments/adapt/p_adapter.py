"""The p-adapter (Wu et al., AAAI 2024) in small: an adapter after attention that passes messages by the p-Laplacian.

    python experiments/adapt/p_adapter.py            all of it: about half an hour on two cores
    python experiments/adapt/p_adapter.py --smoke    every part once in small; writes nothing unless --out is given

A ViT (4 layers, width 64) is trained once on Fashion-MNIST, kept in the cache, and frozen. Two targets on 500 MNIST images:
which digit it is, and whether it is even. All arms but BitFit and the linear probe train as many numbers, within 3 %: the
p-adapter with a bottleneck of 16, beside the feed-forward network a bottleneck of 16 as well; in the place of the first a plain
adapter of 24 (one projection less), or only the gate (`message=False`: the projected attention output where the message would
be); or LoRA on queries and values alone. Each arm has for each target one rate out of four by the validation split, then five
seeds of starts and data orders, for each of which the test split is looked at once. What is compared is the mean over targets.

Stated before running, each to be reported as holding or not, by the mean of the paired differences over seeds:
  1. The p-adapter (p learned, from 1.5) is at least as good as the plain adapter.
  2. It is at least as good as with p fixed at 2, where edges keep their attention.
  3. The gain is the message's: it is better than the gate alone.
  4. It is at least as good as LoRA.
  5. Queries and values differ, as the paper says of cross-attention: on the base's attention edges (no self-loops), the mean
     cosine of a query and a value is within 0.1 of zero and under that of two values, in the mean over layers and heads.
The learned p is reported, and an arm without self-loops: with them, the reference's step is close to the identity.

Departure: the paper's models are generative, with text attending to images; here image patches attend to each other, so that
the graph is that of self-attention (nodes are values), the weaker case for the paper's argument. No such claim is tested here
for cross-attention.
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
import record
import study

from jaxpeft import bitfit, chain, head, lora, p_adapter, train, trees
from jaxpeft.adapt.unified import Design, sublayer

QUESTIONS = {"which digit": (lambda y: y, 10), "is it even": (lambda y: 1 - y % 2, 2)}
OURS = "p-adapter"


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment; the ranks make the arms equally large."""

    base: bases.Vit = dataclasses.field(default_factory=lambda: bases.Vit(layers=4, width=64, heads=4))
    reduction: int = 4
    adapter_rank: int = 24
    lora_rank: int = 21
    p: float = 1.5
    mu: float = 0.1
    per_class: int = 50
    probes: int = 200
    questions: tuple[str, ...] = ("which digit", "is it even")
    budget: study.Budget = dataclasses.field(
        default_factory=lambda: study.Budget(steps=300, rates=(1e-3, 3e-3, 1e-2, 3e-2), tuning_seeds=1)
    )
    limit: int = 0  # of validation and test examples


SMOKE = Setup(
    dataclasses.replace(bases.SMALL_VIT, examples=60),
    adapter_rank=12,
    lora_rank=11,
    per_class=2,
    probes=8,
    questions=("which digit",),
    budget=study.Budget(steps=2, batch=8, rates=(3e-3,), tuning_seeds=1, seeds=2),
    limit=40,
)


def arms(s: Setup) -> dict[str, study.Arm]:
    def ours(**options: Any) -> Any:
        return p_adapter(s.reduction, **{"p": s.p, "mu": s.mu, **options})

    beside = sublayer("parallel_adapter", rank=s.base.width // s.reduction)
    after = sublayer(Design(site="attention", activation="gelu"), s.adapter_rank, name="adapter")
    every = {
        "linear probe": (),
        "BitFit": (bitfit(("**/bias", "!**/head/**")),),
        "LoRA": (lora(s.lora_rank, float(s.lora_rank), "**/attention/{query,value}/kernel"),),
        "adapter": (after, beside),
        "gate alone": (ours(message=False),),
        "p-adapter, p = 2": (ours(p=2.0, learn_p=False),),
        OURS: (ours(),),
        "p-adapter, no self-loops": (ours(self_loops="drop"),),
    }
    return {name: study.Arm(chain(*methods, head())) for name, methods in every.items()}


def difference_of_nodes(model: Any, params: Any, images: Any) -> list[dict[str, float]]:
    """Each layer's mean cosine, over attention's edges between different tokens, of query and value and of two values."""

    @jax.jit
    def run(params: Any, images: Any) -> Any:
        seen = []

        def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.module.name == "core" and context.method_name == "__call__":
                q, k, v = (jnp.moveaxis(x, 2, 1) for x in args[:3])  # (b, h, t, width of a head)
                edges = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2) / q.shape[-1] ** 0.5)
                edges = edges * (1 - jnp.eye(edges.shape[-1]))
                unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
                mean = lambda x: jnp.sum(edges * (unit(x) @ jnp.swapaxes(unit(v), -1, -2))) / jnp.sum(edges)
                seen.append((mean(q), mean(v)))
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            model.apply(params, images)
        return seen

    found = run(params, images)
    return [{"layer": i, "query_value": float(a), "value_value": float(b)} for i, (a, b) in enumerate(found)]


def over_targets(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One row for all targets (target -> row): each seed's mean over them."""
    parts = list(rows.values())
    test = [statistics.mean(seeds) for seeds in zip(*(r["test"] for r in parts))]
    return {
        "method": parts[0]["method"],
        "trained": parts[0]["trained"],
        "rate": {t: r["rate"] for t, r in rows.items()},
        "test": test,
        "mean": statistics.mean(test),
        "std": statistics.stdev(test),
        "details": {t: {"test": r["test"], **r["details"]} for t, r in rows.items()},
    }


def learned(deltas: dict[str, Any], seeds: int) -> list[dict[str, Any]]:
    """p at the end, by layer: the mean over seeds, and over all its range."""
    out = []
    for name in (OURS, "p-adapter, no self-loops"):
        powers = [
            [float(x) for path, x in trees.by_path(deltas[name][seed]).items() if path.endswith("/p")]
            for seed in range(seeds)
        ]
        mean = {f"layer {i}": statistics.mean(v) for i, v in enumerate(zip(*powers))}
        every = [x for v in powers for x in v]
        out.append({"method": name, **mean, "lowest": min(every), "highest": max(every)})
    return out


def main() -> None:
    args = study.arguments("The p-adapter in small; see the file's first lines.")
    s, began = SMOKE if args.smoke else Setup(), time.perf_counter()
    model, params, _ = bases.fashion_vit(s.base, keep=not args.smoke)
    mnist = bases.images("mnist-5k", s.base.size, examples=s.limit)
    mnist["train"] = bases.per_class(bases.images("mnist-5k", s.base.size)["train"], s.per_class, 0)
    done: dict[str, dict[str, dict[str, Any]]] = {}
    powers: list[dict[str, Any]] = []
    for question in s.questions:
        answer, classes = QUESTIONS[question]
        print(question, flush=True)
        made, own = bases.with_new_head(model, params, classes)
        examples = {k: study.images_of(x, answer(np.asarray(y))) for k, (x, y) in mnist.items()}
        problem = study.Problem(made.apply, own, examples, train.image_classification())
        deltas: dict[str, dict[int, Any]] = {}
        done[question] = study.measure(arms(s), problem, s.budget, deltas)
        powers += [{"target": question, **row} for row in learned(deltas, s.budget.seeds)]
    rows = {n: over_targets({q: d[n] for q, d in done.items()}) for n in arms(s)}
    sizes = {n: r["trained"] for n, r in rows.items() if n not in ("BitFit", "linear probe")}
    assert max(sizes.values()) <= 1.03 * min(sizes.values()), sizes
    # drawn, for the rows of the split stand in the order of their classes
    probes = np.random.default_rng(0).permutation(len(mnist["train"][0]))[: s.probes]
    nodes = difference_of_nodes(model, params, jnp.asarray(mnist["train"][0][probes]))

    ours = rows[OURS]
    over, half = study.difference(ours, rows["gate alone"])
    cosines = [statistics.mean(n[k] for n in nodes) for k in ("query_value", "value_value")]
    claims = [
        study.at_least("The p-adapter is at least as good as the plain adapter", ours, rows["adapter"]),
        study.at_least("Learned p is at least as good as p = 2", ours, rows["p-adapter, p = 2"]),
        record.claim("The p-adapter is better than its gate alone", over > 0, f"{over:+.2f} ± {half:.2f} points"),
        study.at_least("It is at least as good as LoRA", ours, rows["LoRA"]),
        record.claim(
            "On attention's edges queries and values have a cosine within 0.1 of zero, under that of two values",
            abs(cosines[0]) <= 0.1 and cosines[0] < cosines[1],
            f"{cosines[0]:+.3f}; two values {cosines[1]:+.3f}",
        ),
    ]
    study.finish(
        "p-adapter",
        args,
        paper="p-adapter, Wu et al., AAAI 2024",
        setup=s,
        rows=list(rows.values()),
        claims=claims,
        began=began,
        figure=study.points(list(rows.values()), "trained", "trained parameters", "test accuracy, %"),
        tables=["learned p", "nodes"],
        **{"learned p": powers},
        nodes=nodes,
    )


if __name__ == "__main__":
    main()
