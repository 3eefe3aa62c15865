"""KIND: knowledge integration and diversion (Xie et al., ICML 2025, arXiv:2408.07337): weights as a bank of components with
a gate.

Every kernel of a transformer is a sum of rank-1 components from the first training step on. The first N_G of them, the
learngenes, are always on and gather what all classes share; the others, the tailors, are divided among the classes, and an
example uses and trains those of its own class alone:

    W_c = U diag(σ ⊙ g_c) Vᵀ = Σ_i g_{c,i} σ_i u_i v_iᵀ        g_{c,i} = 1 if i < N_G or i ∈ T_c, else 0
    y   = ((x V) ⊙ (σ ⊙ g_c)) Uᵀ                                a batch of many classes, without a matrix for any

Afterwards a class's learngenes and tailors alone are a smaller model (`kind_select`), and for new classes the learngenes stay
frozen while fresh tailors are trained (`kind_transfer`). One gate serves all layers; any vector may be one, so that soft
gates are gates too.

Letters: r components, C classes, m outputs and n inputs of a kernel; σ is `s`, U and V are `u` and `v`.

What is verified: the decomposition, the partition and the objective (in the text of the group's follow-up); the gate's form,
starts and numbers are this module's specification: no code could be read. The paper's group announced Te4P0t/KIND. U, σ, V
are free: no orthogonality, no order of σ, which may turn negative. Without a label (guidance's empty class) learngenes are on
alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxpeft import trees
from jaxpeft.hyper.hypernetwork import (
    Hypernetwork,
    TargetError,
    as_spec,
    output_shape,
    register_hypernetwork,
    stacked_paths,
)
from jaxpeft.weights.factored import Factor, Factored, Term, names

__all__ = [
    "Partition",
    "kind",
    "kind_factorize",
    "kind_gate",
    "kind_join",
    "kind_mask",
    "kind_partition",
    "kind_select",
    "kind_transfer",
]

KERNELS = "**/layers*/**/{query,key,value,out,up,down}/kernel"
Start = Literal["random", "svd"]


# --------------------------------------------------------------------------------------------------------------- the gate


class Partition(NamedTuple):
    """Which components are whose.

    Attributes:
      learngenes: N_G; they come first.
      tailors: (C, r), True where a tailor is a class's.
    """

    learngenes: int
    tailors: Bool[np.ndarray, "C r"]


def kind_partition(rank: int, learngenes: int, classes: int) -> Partition:
    """The same number of tailors for every class, side by side.

    Raises:
      ValueError: more learngenes than components, no classes, or tailors that cannot be divided evenly.
    """
    if not 0 <= learngenes <= rank or classes < 1:
        raise ValueError(f"{learngenes} learngenes of {rank} components, {classes} classes")
    each, rest = divmod(rank - learngenes, classes)
    if rest:
        raise ValueError(f"{rank - learngenes} tailors for {classes} classes: {rest} would be left over")
    owner = (np.arange(rank) - learngenes) // max(each, 1)
    return Partition(learngenes, (owner == np.arange(classes)[:, None]) & (np.arange(rank) >= learngenes))


def kind_gate(partition: Partition, classes: Int[Array, "*b"]) -> Float[Array, "*b r"]:
    """g of each class; a number that is no class (C, for none) turns learngenes on alone. May be traced."""
    count, rank = partition.tailors.shape
    tailors = jax.nn.one_hot(classes, count) @ jnp.asarray(partition.tailors, jnp.float32)
    return jnp.where(jnp.arange(rank) < partition.learngenes, 1.0, tailors)


# --------------------------------------------------------------------------------------------------------------- the bank


def kind_factorize(
    w: Float[Array, "*stack_inner_outer"], rank: int, *, inner: int = 1, stack: int = 0
) -> dict[str, Array]:
    """U, σ, V of the largest singular values of a kernel: the nearest one of that rank, or itself if the rank is full.

    Args:
      w: axes (*stack, *inner, *outer), `stack` and `inner` telling how many.
      rank: 1 to min(m, n).

    Returns:
      {"u": (*stack, r, *outer), "s": (*stack, r), "v": (*stack, *inner, r)}.

    Raises:
      ValueError: a rank out of range.
    """
    lead, ins, outs = w.shape[:stack], w.shape[stack : stack + inner], w.shape[stack + inner :]
    n, m = math.prod(ins), math.prod(outs)
    if not 1 <= rank <= min(n, m):
        raise ValueError(f"rank {rank} of a kernel of {n} by {m}: expected 1 to {min(n, m)}")
    flat = w.astype(trees.wide_dtype(w.dtype)).reshape(*lead, n, m)
    v, s, u = jnp.linalg.svd(flat, full_matrices=False)
    parts = {
        "u": u[..., :rank, :].reshape(*lead, rank, *outs),
        "s": s[..., :rank],
        "v": v[..., :rank].reshape(*lead, *ins, rank),
    }
    return {k: x.astype(w.dtype) for k, x in parts.items()}


@register_hypernetwork(paper="Xie et al., ICML 2025")
def kind(
    init_fn: Callable[[Key[Array, ""]], PyTree],
    rank: int,
    *,
    active: int | None = None,
    start: Start = "random",
    at: trees.Pattern = KERNELS,
    stacked: trees.Pattern | None = None,
) -> Hypernetwork:
    """Any model whose kernels are banks of gated components.

    Args:
      init_fn: `key -> params`, the model's own initialisation.
      rank: r, in all kernels.
      active: how many components a gate turns on (N_G and a class's tailors), None for all: what the scale of random starts
        is matched to, or else a gated layer starts too small.
      start: "random": u ~ N(0, 1/m), v ~ N(0, 1/n), σ = √(m / active), so that a gated kernel has variance 1/n. "svd": of
        what `init_fn` draws, exactly it with every gate open where the rank is full.
      at: pattern of the kernels; outputs are their last axes, as many as the bias beside one has, else one.
      stacked: pattern of leaves whose first axis counts layers (of a scanned model).

    Returns:
      A hypernetwork whose condition is a gate (r,): `apply(weights, gate)` returns ordinary parameters, `per_example` runs a
      batch with a gate (b, r) each. Both take banks of any rank, as `kind_select` and `kind_join` make them.

      weights: {"factors": {path: {"u", "s", "v"}}, "shared": {path: array}}, as in `kind_factorize`; biases, norms, embeddings
      and modulations are shared.

    Raises:
      PatternError: nothing matches a pattern.
      TargetError: a chosen leaf that is not floating point or has no two axes.
      ValueError: an unknown start, `active` out of 1 to r, a rank over a kernel (with "svd") or under one; in `apply`, a
        gate of another length.
    """
    active = rank if active is None else active
    if start not in ("random", "svd") or rank < 1 or not 1 <= active <= rank:
        raise ValueError(
            f"rank {rank}, active {active}, start {start!r}: expected 1 <= active <= rank, 'random' or 'svd'"
        )
    spec = as_spec(jax.eval_shape(init_fn, jax.random.key(0)))
    flat = trees.by_path(spec)
    layers = stacked_paths(spec, stacked)
    shapes = {}
    for path in trees.matches(at, flat, "parameter"):
        x, lead = flat[path], int(path in layers)
        outer = len(output_shape(path, flat, layers))
        if not trees.is_learned(path, x) or x.ndim - lead - outer < 1:
            raise TargetError(f"{path!r} is {x.dtype}{list(x.shape)}, which is no kernel: leave it out of the pattern")
        shapes[path] = (x.shape[:lead], x.shape[lead : x.ndim - outer], x.shape[x.ndim - outer :])

    def init(key: Key[Array, ""]) -> PyTree:
        own, bank = jax.random.split(key)
        params = trees.by_path(init_fn(own))
        factors = {}
        for (path, (lead, ins, outs)), k in zip(shapes.items(), jax.random.split(bank, len(shapes))):
            dtype = flat[path].dtype
            if start == "svd":
                factors[path] = kind_factorize(params[path], rank, inner=len(ins), stack=len(lead))
            else:
                factors[path] = _random(k, lead, ins, outs, rank, (math.prod(outs) / active) ** 0.5, dtype)
        return {"factors": factors, "shared": {p: x for p, x in params.items() if p not in factors}}

    def emit(weights: PyTree, gate: Any, factored: bool) -> PyTree:
        gate = jnp.asarray(gate)

        def leaf(path: str) -> Any:
            if path not in shapes:
                return weights["shared"][path]
            f = weights["factors"][path]
            if gate.shape != f["s"].shape[-1:]:
                raise ValueError(
                    f"a gate of shape {gate.shape} for {f['s'].shape[-1]} components: `apply` takes one; a batch of them "
                    "goes through vmap or `per_example`"
                )
            value = _gated(f, f["s"] * gate.astype(f["s"].dtype), *map(len, shapes[path]))
            return value if factored else value.dense()

        return jtu.tree_unflatten(jtu.tree_structure(spec), [leaf(p) for p in flat])

    config = {"rank": rank, "active": active, "start": start, "at": at, "stacked": stacked}
    return Hypernetwork("kind", init, lambda w, g: emit(w, g, False), spec, config, lambda w, g: emit(w, g, True))


def _random(
    key: Key[Array, ""], lead: Sequence[int], ins: Sequence[int], outs: Sequence[int], rank: int, s: float, dtype: Any
) -> dict[str, Array]:
    ku, kv = jax.random.split(key)
    return {
        "u": jax.random.normal(ku, (*lead, rank, *outs), dtype) / math.prod(outs) ** 0.5,
        "s": jnp.full((*lead, rank), s, dtype),
        "v": jax.random.normal(kv, (*lead, *ins, rank), dtype) / math.prod(ins) ** 0.5,
    }


def _gated(f: dict[str, Array], s: Array, stack: int, inner: int, outer: int) -> Factored:
    """V diag(s) Uᵀ as factors: what is multiplied with it meets V, then s, then U."""
    axes = names(stack + inner + outer)
    lead, ins, outs = axes[:stack], axes[stack : stack + inner], axes[stack + inner :]
    term = Term((Factor(f["v"], lead + ins + "r"), Factor(s, lead + "r"), Factor(f["u"], lead + "r" + outs)))
    return Factored((term,), (), tuple(axes))


# ------------------------------------------------------------------------------------------------- smaller, new, together


def kind_select(weights: PyTree, components: Sequence[int] | Int[np.ndarray, "k"]) -> PyTree:
    """A bank of these components alone: a smaller model, which a gate of ones turns on.

    Raises:
      ValueError: none, or a number that is no component.
    """
    index = np.asarray(components, np.int64)
    rank = _rank(weights)
    if index.ndim != 1 or not index.size or index.min() < 0 or index.max() >= rank:
        raise ValueError(f"components {index.tolist()} of {rank}: expected numbers from 0 to {rank - 1}, at least one")
    return _with_components(weights, lambda x, axis: jnp.take(x, index, axis=axis))


def kind_transfer(
    key: Key[Array, ""], weights: PyTree, partition: Partition, count: int, *, scale: float = 0.0
) -> tuple[PyTree, PyTree]:
    """What a new task begins with: the learngenes, to be frozen, and new tailors, to be trained.

    Args:
      count: of new tailors in each kernel, N_T' (m + n + 1) numbers.
      scale: σ of the new tailors. 0 starts as the learngenes alone.

    Returns:
      (frozen, tailors): weights of rank N_G, and {path: {"u", "s", "v"}} of rank `count`; `kind_join` puts them together, and a
      gate of ones turns all on. A new label's embedding, and whatever else of "shared" is to move, is the caller's choice.

    Raises:
      ValueError: no learngenes, or no new tailors.
    """
    if partition.learngenes < 1 or count < 1:
        raise ValueError(f"{partition.learngenes} learngenes and {count} new tailors: at least one of each")
    frozen = kind_select(weights, np.arange(partition.learngenes))
    fresh = {}
    for (path, f), k in zip(weights["factors"].items(), jax.random.split(key, len(weights["factors"]))):
        stack = f["s"].ndim - 1
        lead, ins, outs = f["s"].shape[:-1], f["v"].shape[stack:-1], f["u"].shape[stack + 1 :]
        fresh[path] = _random(k, lead, ins, outs, count, scale, f["s"].dtype)
    return frozen, fresh


def kind_join(weights: PyTree, tailors: PyTree) -> PyTree:
    """The bank with more components behind its own."""
    factors = {}
    for path, f in weights["factors"].items():
        stack, other = f["s"].ndim - 1, tailors[path]
        at = {"u": stack, "s": stack, "v": f["v"].ndim - 1}
        factors[path] = {k: jnp.concatenate([f[k], other[k]], axis) for k, axis in at.items()}
    return {**weights, "factors": factors}


def kind_mask(weights: PyTree, on: Bool[Array, "r"]) -> PyTree:
    """1 where an update may act, for `updates.mask_updates`: components that are on, and all that is shared.

    A tailor that no example of a batch turns on has no gradient, but momentum, Adam's moments and weight decay would move it.
    """

    def spread(x: Array, axis: int) -> Array:
        return jnp.asarray(on).astype(x.dtype).reshape(*(-1 if i == axis else 1 for i in range(x.ndim)))

    masks = _with_components(weights, spread)
    return {**masks, "shared": jax.tree.map(lambda x: jnp.ones((), jnp.float32), weights["shared"])}


def _rank(weights: PyTree) -> int:
    return next(iter(weights["factors"].values()))["s"].shape[-1]


def _with_components(weights: PyTree, one: Callable[[Array, int], Array]) -> PyTree:
    """`one(array, its axis of components)` of every factor."""
    factors = {}
    for path, f in weights["factors"].items():
        stack = f["s"].ndim - 1
        factors[path] = {"u": one(f["u"], stack), "s": one(f["s"], stack), "v": one(f["v"], f["v"].ndim - 1)}
    return {**weights, "factors": factors}
