"""What the experiments of UniPT and SHERL (unipt.py, sherl.py) share: two problems, baselines, what a gradient costs.

digits   a pre-norm ViT (6 blocks, width 96, 17 positions), trained on Fashion-MNIST, adapted to scikit-learn's digits; LST's
         too (side/lst.py), with a ViT of its own
R8       MiniLM (6 blocks, width 384) on 20 Reuters articles of each of 8 classes, their first 48 tokens
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import bases
import jax
import jax.numpy as jnp
import numpy as np
import record
import study

from jaxpeft import Method, adapt, chain, full, head, lora, lst, train
from jaxpeft.adapt import side
from jaxpeft.adapt.structure import structure
from jaxpeft.method import Call


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiments; `reduction` of LST and of the method under test, for each problem."""

    base: bases.Vit = bases.VIT
    reductions: tuple[int, int] = (8, 4)
    rank: int = 10
    budget: study.Budget = dataclasses.field(default_factory=lambda: study.Budget(steps=300, batch=32))
    text_reductions: tuple[int, int] = (8, 8)
    text_layers: int = 6
    text_rank: int = 16
    per_class: int = 20
    length: int = 48
    held: int = 400  # examples of R8's validation and test splits
    text_budget: study.Budget = dataclasses.field(
        default_factory=lambda: study.Budget(steps=100, batch=16, tuning_seeds=1)
    )
    cost_batch: int = 64


_FEW = study.Budget(steps=2, batch=4, rates=(1e-3,), tuning_seeds=1, seeds=2)
SMOKE = Setup(bases.SMALL_VIT, (4, 4), 2, _FEW, (8, 8), 2, 2, 2, 8, 8, _FEW, 4)


def setup(smoke: bool) -> Setup:
    """The sizes; a smoke run, which is all compiling, compiles carelessly."""
    jax.config.update("jax_disable_most_optimizations", smoke)
    return SMOKE if smoke else Setup()


# Each method's grid lies around where its kind is used to train: a probe and a network of few features take large
# steps, the whole model small ones.
LARGE, SMALL = (3e-3, 1e-2, 3e-2), (1e-4, 3e-4, 1e-3)


def digits(base: bases.Vit, keep: bool, split_seed: int = 2) -> study.Problem:
    """The ViT with a new head, and digits in splits of their own (the standard test split was seen by LST's first run)."""
    model, params, accuracy = bases.fashion_vit(base, keep)
    print(f"Fashion-MNIST validation accuracy {accuracy:.3f}", flush=True)
    model, params = bases.with_new_head(model, params, 10)
    parts = bases.images("digits", base.size, examples=base.examples, split_seed=split_seed)
    examples = {k: study.images_of(*p) for k, p in parts.items()}
    return study.Problem(model.apply, params, examples, train.image_classification())


def r8(s: Setup) -> study.Problem:
    """MiniLM, or its first layers, with a new head."""
    examples, model, params = bases.sentences("r8", per_class=s.per_class, length=s.length)
    model = model.clone(config=dataclasses.replace(model.config, layers=s.text_layers))
    above = tuple(f"layers_{i}" for i in range(s.text_layers, 6))
    backbone = {n: x for n, x in params["params"]["backbone"].items() if n not in above}
    params = {"params": {**params["params"], "backbone": backbone}}
    for split in ("validation", "test"):
        n = examples[split].label.shape[0]
        rows = np.sort(np.random.default_rng(0).permutation(n)[: s.held])
        examples[split] = jax.tree.map(lambda x, rows=rows: x[rows], examples[split])
    return study.Problem(model.apply, params, examples, train.text_classification())


def weighted_sum() -> Method:
    """A learned, softmax-weighted sum of all states in place of the last, as ELMo's: y = γ Σ_i softmax(s)_i h_i."""

    def stack_of(call: Call) -> Any:
        found = structure(call.apply_fn, call.params, call.inputs, call.kwargs)
        return found, side.stacks(found)[0]

    def init(key: Any, call: Call) -> Any:
        n = len(side.states(call, stack_of(call)[1]))
        return {"weights": jnp.zeros(n), "amount": jnp.ones(())}

    def wrap(apply_fn: Any, delta: Any, mode: Any) -> Any:
        def run(params: Any, *inputs: Any, **kwargs: Any) -> Any:
            found, stack = stack_of(Call(apply_fn, params, inputs, kwargs))

            def answer(taps: Any) -> Any:
                share = delta["amount"] * jax.nn.softmax(delta["weights"])
                return sum(w * x for w, x in zip(share, side.state_taps(taps, stack)))

            names = [f"{stack.tap}embedded", f"{stack.tap}hidden"]
            at = f"{stack.tap}final_hidden"
            return side.answering(apply_fn, found, names, [(at, answer)])(params, *inputs, **kwargs)

        return run

    return Method("weighted_sum", init, wrap, None, {"method": "weighted_sum"})


def baselines(s: Setup, text: bool, names: Sequence[str]) -> dict[str, study.Arm]:
    """Those of `names`, each with the head."""
    rank, last = (s.text_rank, s.text_layers - 1) if text else (s.rank, s.base.layers - 1)
    reduction = (s.text_reductions if text else s.reductions)[0]
    every = {
        "linear probe": study.Arm(head(), rates=LARGE),
        "weighted sum": study.Arm(chain(weighted_sum(), head()), rates=LARGE),
        "last layer": study.Arm(chain(full(at=f"**/layers_{last}/**"), head()), rates=SMALL),
        "LST": study.Arm(chain(lst(reduction), head()), rates=LARGE),
        "LoRA": study.Arm(chain(lora(rank), head())),
        "full": study.Arm(full(), rates=SMALL),
    }
    return {n: every[n] for n in names}


def measured(arms: Mapping[str, study.Arm], problem: study.Problem, budget: study.Budget, on: str) -> dict[str, Any]:
    """`study.measure` with the problem's name behind each arm's."""
    if len(budget.rates) == 1:  # a smoke run
        arms = {n: dataclasses.replace(a, rates=None) for n, a in arms.items()}
    return study.measure({f"{n}, {on}": a for n, a in arms.items()}, problem, budget)


def costs(arms: Mapping[str, study.Arm], problem: study.Problem, s: Setup, ours: str) -> dict[str, dict[str, float]]:
    """Temporaries and operations of a gradient, by the compiler, for each arm; a smoke run asks for two."""
    asked = {n: a for n, a in arms.items() if s is not SMOKE or n in ("LoRA", ours)}
    found = {n: study.memory_of(adapt(problem.apply_fn, a.method), problem, s.cost_batch) for n, a in asked.items()}
    for name, cost in found.items():
        print(f"{name:28} {cost['temporaries_mib']:8.1f} MiB  {cost['gflop']:.2f} GFLOP a gradient", flush=True)
    return found


def half_of_lora(name: str, cost: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The claim on memory."""
    share = cost[name]["temporaries_mib"] / cost["LoRA"]["temporaries_mib"]
    return record.claim(f"{name}'s temporaries are at most half of LoRA's", share <= 0.5, f"{share:.0%}")


def over(
    text: str, done: Mapping[str, Any], ours: str, other: str, on: Sequence[str], *, strictly: bool = False
) -> dict[str, str]:
    """The claim that `ours` is at least as good as `other` (or better), on the mean of each problem."""
    found = {task: study.difference(done[f"{ours}, {task}"], done[f"{other}, {task}"]) for task in on}
    evidence = "; ".join(f"{task}: {mean:+.2f} ± {half:.2f} points" for task, (mean, half) in found.items())
    holds = all(mean > 0 if strictly else mean >= 0 for mean, _ in found.values())
    return record.claim(text, holds, evidence)


def rows_of(done: Mapping[str, Any], cost: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """The table's rows, with what a gradient costs where it was asked."""
    return [{**row, **cost.get(name.removesuffix(", digits"), {})} for name, row in done.items()]


def figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Accuracy on digits over temporaries."""
    known = [{**r, "method": r["method"].removesuffix(", digits")} for r in rows if "temporaries_mib" in r]
    return study.points(
        known, "temporaries_mib", "temporaries of one gradient, batch 64 (MiB)", "test accuracy on digits (%)"
    )
