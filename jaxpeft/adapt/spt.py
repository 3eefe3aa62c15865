"""SPT: Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning (He, Cai, Zhang, Tao and Zhuang, ICCV 2023,
arXiv:2303.08566).

A budget of trained parameters goes where the task's data say that it counts. Each weight has a score, and the top tau of
all, over all tensors together, are the sensitive ones; n_t of them lie in tensor t:

    S = Σ_b (∂ L_b / ∂W)²           over mini-batches b, nothing updated between them (`importance.sensitivity`)
    vector of length m              tuned whole (cost m) if n_t >= m / beta, else its n_t entries alone
    matrix i x o                    a module of rank r (cost c) if n_t >= c / alpha, in the place of its entries; else those
    c = r (i + o) for LoRA,         2 r o + r + o for an adapter on the matrix's output
    tau                             such that the costs sum to the budget as nearly as they can; the class token is trained
                                    and counted, the head is trained and not counted

    LoRA      y = x (W + A B) + b                                   merges with all the rest
    adapter   y = z + gelu(z D + d) U + u,   z = x W + b            on the output projection of attention: from x, in parallel

LoRA has no factor alpha / r here; A, D start as linear layers do, B, U and u at zero, sparse values too: at its start the
model is its base. So `spt` is a plan, and the plan a chain of methods that are there: `lora`, `sublayer`, `full`, `sparse`.

Reference code: ziplab/SPT @e385f67 (engine.py: get_sensitivity; model/vision_transformer_timm.py). Departures: scores are
taken with dropout off and from as many batches as asked for, where the reference has its backbone's stochastic depth on;
modules have dropout on their input, where one is asked for, but no stochastic depth of their own (0.1 there); d starts at
zero; tau is found by bisection, where the reference tries 79 multiples of 20,000; entries of norms are trained like others
(the reference counts, but never trains them); stacked layers, and a query-key-value product in one kernel, are one tensor
with one decision. Without data ("magnitude", "random" in the place of S) and without `prepare`, tensors have n_t in
proportion to their sizes, since a structure cannot depend on values.

Letters: i inputs and o outputs of a matrix, r rank, n_t sensitive entries of a tensor, tau of all.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxpeft import trees
from jaxpeft.adapt.full import full
from jaxpeft.adapt.importance import magnitude, sensitivity
from jaxpeft.adapt.lora import lora
from jaxpeft.adapt.sparse_fine_tuning import amount, modules, movable, places, sparse
from jaxpeft.adapt.unified import Design, sublayer
from jaxpeft.method import ApplyFn, Call, Delta, Method, Mode, Params, Study, chain, register, site_key
from jaxpeft.roles import roles
from jaxpeft.topk import top_k_mask

__all__ = ["Plan", "Tensor", "allocate", "spt", "survey"]

Score = Literal["sensitivity", "magnitude", "random"]
Inner = Literal["lora", "adapter"]
AT = "**/{layers*,final_norm}/**"
CLASS_TOKEN = "**/embeddings/cls"
SEQUENTIAL = Design("bottleneck", "sequential", "ffn_up", "add", init="lora", activation="gelu")
PARALLEL = dataclasses.replace(SEQUENTIAL, insertion="parallel")


class Tensor(NamedTuple):
    """What the allocation has to know of a weight: the stack of layers it stands in, and its sides; 0 inputs for a vector."""

    stack: tuple[int, ...]
    inner: int
    outer: int

    @property
    def size(self) -> int:
        """Of all layers."""
        return math.prod(self.stack) * max(self.inner, 1) * self.outer


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which weights are tuned how; plain data.

    Attributes:
      modules: path of each matrix that has a LoRA or an adapter, to the path of the module that applies it.
      whole: paths of the vectors (and of the class token) that are tuned whole.
      counts: sparse entries of each other weight (of each of its layers, the most of any).
      tau: how many entries count as sensitive.
      total: trained parameters.
    """

    modules: Mapping[str, str]
    whole: tuple[str, ...]
    counts: Mapping[str, int]
    tau: int
    total: int


# ------------------------------------------------------------------------------------------------------- allocation


def survey(call: Call, at: trees.Pattern) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights that may be tuned, and for each the path of its module as hooks know it.

    Raises:
      PatternError: nothing matches.
      RoleError: a weight of three axes or more that this call does not use in any product.
    """
    leaves, seen = movable(call.params, at), modules(call)
    found = {p: seen.get(p.rpartition("/")[0], (p.rpartition("/")[0], ())) for p in leaves}
    matrices = [p for p, w in leaves.items() if w.ndim - len(found[p][1]) >= 2]
    known = roles(call.apply_fn, call.params, matrices, call.inputs, call.kwargs)
    out = {}
    for path, w in leaves.items():
        if path in known:
            n = known[path].stack
            cut = n + known[path].inner
            out[path] = Tensor(tuple(w.shape[:n]), math.prod(w.shape[n:cut]), math.prod(w.shape[cut:]))
        else:
            n = len(found[path][1])
            out[path] = Tensor(tuple(w.shape[:n]), 0, math.prod(w.shape[n:]))
    return out, {p: module for p, (module, _) in found.items()}


def cost(t: Tensor, inner: Inner, rank: int) -> float:
    """Parameters of a matrix's module, in all of its layers; infinite where the rank exceeds a side."""
    if rank > min(t.inner, t.outer):
        return math.inf
    one = rank * (t.inner + t.outer) if inner == "lora" else 2 * rank * t.outer + rank + t.outer
    return math.prod(t.stack) * one


def allocate(
    counts: Mapping[str, int], tensors: Mapping[str, Tensor], inner: Inner, rank: int, alpha: float, beta: float
) -> tuple[dict[str, str], int]:
    """How each tensor is tuned, given how many of its entries are sensitive.

    Args:
      counts: n_t of every tensor, over all of its layers.
      tensors: from `survey`.
      inner, rank: of the modules.
      alpha: 0 makes no modules, infinity one for every matrix with a sensitive entry.
      beta: 0 tunes no vector whole, infinity every one with a sensitive entry.

    Returns:
      `{path: "module", "whole" or "sparse"}` of the tensors that are tuned, and what that costs.
    """
    out, total = {}, 0
    for path, t in tensors.items():
        n, is_vector = int(counts[path]), t.inner == 0
        price, share = (t.size, beta) if is_vector else (cost(t, inner, rank), alpha)
        if n and math.isfinite(price) and share and n >= price / share:
            out[path], total = ("whole" if is_vector else "module"), total + int(price)
        elif n:
            out[path], total = "sparse", total + n
    return out, total


def found_tau(total_at: Callable[[int], int], budget: int, most: int) -> int:
    """The tau, 1 to `most`, whose total is nearest to the budget; of two the larger. `total_at` does not fall."""
    low, high = 1, most  # the first tau that reaches the budget
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if total_at(middle) < budget else (low, middle)
    before = max(low - 1, 1)
    return before if abs(total_at(before) - budget) < abs(total_at(low) - budget) else low


def by_size(tensors: Mapping[str, Tensor], tau: int) -> dict[str, int]:
    """Counts where nothing is known of the weights: in proportion to their sizes, the same in each layer."""
    total = sum(t.size for t in tensors.values())
    layers = {p: math.prod(t.stack) for p, t in tensors.items()}
    return {p: layers[p] * round(tau * t.size / layers[p] / total) for p, t in tensors.items()}


def by_score(scores: Mapping[str, Array]) -> Callable[[int], dict[str, int]]:
    """`tau -> counts` of the global top tau of the scores.

    Raises:
      ValueError: scores that are not finite, or all zero.
    """
    every = dict(scores)
    found = _state(every)
    if bad := [p for p, (finite, _) in found.items() if not finite]:
        raise ValueError(f"scores of {bad[0]!r} are not finite: does the loss diverge on the untrained model?")
    if not any(some for _, some in found.values()):
        raise ValueError(
            "all sensitivities are zero: no gradient reaches the backbone. A head of zeros does that: draw it at random first"
        )
    return lambda tau: {p: int(n) for p, n in _counts(every, jnp.asarray(tau)).items()}


# Outside of the method, so that every model of these shapes compiles them once.
_mask = jax.jit(top_k_mask)


@jax.jit
def _state(scores: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
    return {p: (jnp.isfinite(s).all(), (s != 0).any()) for p, s in scores.items()}


@jax.jit
def _counts(scores: dict[str, Array], tau: Array) -> dict[str, Array]:
    return {p: jnp.sum(m, dtype=jnp.int32) for p, m in top_k_mask(scores, tau).items()}


# ------------------------------------------------------------------------------------------------------ the method


@register(
    family="adapt", paper="He et al., ICCV 2023", mechanism="weights", mergeable=True, exact_start=True, rate=2e-3
)
def spt(
    budget: float = 0.005,
    rank: int = 8,
    *,
    score: Score = "sensitivity",
    inner: Inner = "lora",
    alpha: float = 10.0,
    beta: float = 5.0,
    tau: int | None = None,
    at: trees.Pattern = AT,
    batches: int = 16,
    dropout: Any = 0.0,
    plan: Mapping[str, Any] | None = None,
    name: str = "spt",
) -> Method:
    """Sensitivity-aware tuning; see the module for the equations. Train the head along: `chain(spt(), head())`.

    Args:
      budget: trained parameters without the head, or their share of the model's where it is below 1. The paper tries 0.2 to
        1 million on ViT-B and reports the best.
      rank: r of the modules.
      score: what ranks the weights: "sensitivity", which needs the task's data (`prepare`), or, to compare with,
        "magnitude" (|W|) or "random".
      inner: "lora", which merges, or "adapter", which does not.
      alpha: 0 (no modules, sparse entries alone), 1 or more, or infinity.
      beta: 0 (no vector is tuned whole), 1 or more, or infinity.
      tau: in the place of the budget.
      at: pattern of the weights that are scored: all but embeddings and head by default.
      batches: how many batches of the training data the sensitivity is taken from; 512 examples are the paper's.
      dropout: on the modules' inputs, where `apply` is given a `dropout_key` (0.1 in the paper).
      plan: a `Plan` as plain data, as files have it: nothing is looked for.
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is `{"lora": ..., "full": ..., "sparse": ...}`, parts that are empty left out, and "adapter" and
      "adapter_out" in the place of "lora". At its start the adapted model equals the base.

    Raises:
      ValueError: an option out of range; at `init`, "sensitivity" without `prepare`, a budget too small for anything; in
        `prepare`, scores that are all zero or not finite.
      PatternError: nothing matches `at`.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: a rank is at least 1")
    if score not in ("sensitivity", "magnitude", "random") or inner not in ("lora", "adapter"):
        raise ValueError(
            f"score {score!r}, inner {inner!r}: expected sensitivity, magnitude or random; lora or adapter"
        )
    if any(0 < x < 1 or x < 0 or math.isnan(x) for x in (alpha, beta)):
        raise ValueError(f"alpha {alpha}, beta {beta}: expected 0, or 1 and more: below 1 more entries would cost less")
    if not budget > 0 or (tau is not None and tau < 1) or batches < 1:
        raise ValueError(f"budget {budget}, tau {tau}, batches {batches}: all are positive")
    config = dict(
        method="spt",
        name=name,
        budget=budget,
        rank=rank,
        score=score,
        inner=inner,
        alpha=alpha,
        beta=beta,
        tau=tau,
        at=at,
        batches=batches,
        dropout=dropout,
        plan=None if plan is None else dict(plan),
    )

    def tuned(plan: Plan, indices: Mapping[str, Any] | None = None, choice: str = "given") -> Method:
        """The chain of methods that a plan stands for."""
        parts = []
        if plan.modules and inner == "lora":
            parts.append(lora(rank, float(rank), list(plan.modules), dropout=dropout))
        elif plan.modules:
            behind = {m: trees.is_match("**/out", m) for m in plan.modules.values()}
            for label, design, out in (("adapter", SEQUENTIAL, False), ("adapter_out", PARALLEL, True)):
                own = [m for m, is_out in behind.items() if is_out == out]
                if own:
                    parts.append(sublayer([design], rank, at=own, dropout=dropout, name=label))
        if plan.whole:
            parts.append(full(list(plan.whole), form="difference"))
        if plan.counts:
            parts.append(sparse(counts=plan.counts, indices=indices, score=choice))
        if not parts:
            raise ValueError(f"budget {budget}: not one of the weights gets a sensitive entry; take more")
        return chain(*parts, name=name)

    def planned(tensors: Any, names: Any, extra: Any, counts_at: Any, parameters: int) -> tuple[Plan, dict[str, str]]:
        def decided(tau: int) -> tuple[dict[str, str], int]:
            return allocate(counts_at(tau), tensors, inner, rank, alpha, beta)

        most, added = sum(t.size for t in tensors.values()), sum(extra.values())
        if tau is not None:
            chosen = min(tau, most)
        else:
            wanted = amount(budget, parameters, "budget")
            chosen = found_tau(lambda t: decided(t)[1] + added, wanted, most)
        kinds, total = decided(chosen)
        of = lambda kind: [p for p, own in kinds.items() if own == kind]
        counts = counts_at(chosen)
        each = {p: counts[p] // math.prod(tensors[p].stack) for p in of("sparse")}
        whole = (*of("whole"), *extra)
        return Plan({p: names[p] for p in of("module")}, whole, each, chosen, total + added), kinds

    def class_token(params: Params) -> dict[str, int]:
        return {p: w.size for p, w in trees.by_path(params).items() if trees.is_match(CLASS_TOKEN, p)}

    def by_shapes(call: Call) -> Method:
        """Without data: each tensor's share by size, the entries within it by magnitude or at random."""
        tensors, names = survey(call, at)
        counts_at = lambda tau: by_size(tensors, tau)
        made, _ = planned(tensors, names, class_token(call.params), counts_at, trees.count(call.params))
        return tuned(dataclasses.replace(made, counts={p: n for p, n in made.counts.items() if n}), None, score)

    def prepare(study: Study) -> Method:
        call = study.call
        tensors, names = survey(call, at)
        leaves = {p: trees.by_path(call.params)[p] for p in tensors}
        if score == "sensitivity":
            count = min(batches, len(study.train))
            loss = lambda params, batch: study.loss(lambda *x, **k: call.apply_fn(params, *x, **k), batch, None)
            own = sensitivity(loss, call.params, (study.train.batch(i) for i in range(count)), list(tensors))
        elif score == "magnitude":
            own = magnitude(leaves)
        else:
            own = {p: jax.random.uniform(site_key(study.key, p), w.shape, minval=1e-6) for p, w in leaves.items()}
        scores = {p: own[p].astype(jnp.float32) for p in tensors}
        made, kinds = planned(tensors, names, class_token(call.params), by_score(scores), trees.count(call.params))
        mask = _mask(scores, jnp.asarray(made.tau))
        indices = {p: places(mask[p], tensors[p].stack) for p, kind in kinds.items() if kind == "sparse"}
        made = dataclasses.replace(made, counts={p: int(np.shape(x)[-1]) for p, x in indices.items()})
        return tuned(made, indices)._replace(config={**config, "plan": plain(made)})

    if plan is not None:
        return tuned(Plan(**{**plan, "whole": tuple(plan["whole"])}))._replace(config=config)

    def init(key: Key[Array, ""], call: Call) -> Delta:
        if score == "sensitivity":
            raise ValueError(
                f"{name} looks at the task's data before it starts: train it through `finetune`, call `prepare(study)` and "
                "take what it answers, or choose without data (score='magnitude' or 'random')"
            )
        return by_shapes(call).init(key, call)

    def wrap(apply_fn: ApplyFn, delta: Delta, mode: Mode) -> ApplyFn:
        def run(params: Params, *inputs: Any, **kwargs: Any) -> Any:
            method = by_shapes(Call(apply_fn, params, inputs, kwargs))
            return method.wrap(apply_fn, delta, mode)(params, *inputs, **kwargs)

        return run

    def merge(params: Params, delta: Delta) -> Params:
        # What each part does to the weights is in its delta; which weights it was meant for does not matter any more.
        parts = {"lora": lora(rank, float(rank)), "full": full(form="difference"), "sparse": sparse()}
        made = chain(*(parts[n] for n in delta)).merge
        assert made is not None
        return made(params, delta)

    return Method(name, init, wrap, None if inner == "adapter" else merge, config, prepare=prepare)


def plain(plan: Plan) -> dict[str, Any]:
    """A plan as files have it."""
    return {**dataclasses.asdict(plan), "whole": list(plan.whole)}
