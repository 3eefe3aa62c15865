"""aTLAS: Knowledge Composition using Task Vectors with Learned Anisotropic Scaling (Zhang et al., NeurIPS 2024,
arXiv:2407.02880). Here, what coefficients make of task vectors; `atlas_learning` learns them.

Task arithmetic has one coefficient a task vector; aTLAS learns one for each task vector and block of parameters, a block
being a weight or a bias. The base and the vectors stay frozen, and the result is one model:

    theta^(l) = theta0^(l) + sum_i lam_{i,l} tau_i^(l)                              blocks
    theta^(l) = theta0^(l) + sum_i sum_k lam_{i,l,k} 1[g^(l) = k] * tau_i^(l)       aTLAS x K: g assigns each entry to one
                                                                                    of K groups, at random, once
    f(x) = f(x; theta0) + J f(x; theta0) sum_i lam_i * tau_i                        linearised; tau of linearised tuning

Coefficients start at 0, the base. A fused or a stacked kernel is several blocks where `init_lam` is told its axes.

    lam    (T,)                            one a task vector
           {path: (T,)}                    blocks; a path may be that of a subtree, whose leaves then share coefficients.
                                           What no path covers stays the base's
           {path: (T, 1, 3, 1)}            several blocks in one leaf: the leaf's shape, or 1, behind T
           {path: (T, K)}, {path: (T, 1, 3, 1, K)}      with `ids`: groups of each block

Reference code: fredzzhang/atlas @557d7fb (src/composition.py). Groups are indices and a gather rather than K masks. By
default only leaves of two axes or more have groups, and of equal shapes the same ones, as there; a kernel of more than two
axes is adapted here, where the code leaves it out.

Letters: T task vectors, K groups.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PyTree

from jaxpeft import trees
from jaxpeft.merge.atlas_vectors import LowRank, is_low_rank
from jaxpeft.merge.registry import register_merge
from jaxpeft.merge.stack import UNROLLED, MergeInputError, task_vectors, widened
from jaxpeft.method import Params, site_key

__all__ = ["atlas", "compose", "compose_linearized", "init_lam", "partition_ids"]

Lam = Any  # (T,), or a tree of arrays whose paths are the base's or lead to them
Ids = Mapping[str, Array]


# ------------------------------------------------------------------------------------------------------- coefficients


def init_lam(
    base: Params,
    size: int,
    *,
    at: trees.Pattern | None = None,
    axes: Mapping[str, Sequence[int]] | None = None,
    groups: int | None = None,
    min_ndim: int | None = None,
) -> dict[str, Array]:
    """Coefficients that are 0: where learning starts, at the base.

    Args:
      base: theta0, or its shapes.
      size: T.
      at: pattern of the leaves to adapt; None for all floating-point ones. Frozen leaves (heads) are left out here, and
        what is left out costs no memory for its task vectors.
      axes: {pattern: axes of the leaf along which every index is a block of its own}; the first pattern that matches
        counts. {"**/layers/**": (0,)} for stacked layers, {"**/qkv/kernel": (1,)} for a fused projection (d, 3, h, e).
      groups: K, for `compose` with `ids`.
      min_ndim: leaves of fewer axes are left out; None is 0, and 2 with groups.

    Returns:
      {path: zeros}, (T,) or (T, *1s but for `axes`), and behind these K where there are groups.

    Raises:
      ValueError: T or K below one, an axis that a leaf lacks, or nothing left to adapt.
      PatternError: a pattern that matches nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> base = {"layers": {"kernel": jnp.ones((6, 4, 4)), "bias": jnp.ones((6, 4))}, "norm": jnp.ones(4)}
      >>> {p: x.shape for p, x in init_lam(base, 3, axes={"layers/*": (0,)}).items()}
      {'layers/bias': (3, 6, 1), 'layers/kernel': (3, 6, 1, 1), 'norm': (3,)}
    """
    if size < 1 or (groups is not None and groups < 1):
        raise ValueError(f"{size} task vectors, groups={groups}: at least one of each")
    leaves, out = _chosen(base, at, min_ndim, groups is not None), {}
    rules = [(set(trees.matches(p, leaves, "parameter")), tuple(cut)) for p, cut in (axes or {}).items()]
    for path, x in leaves.items():
        cut = next((cut for hits, cut in rules if path in hits), ())
        if wrong := [i for i in cut if not 0 <= i < x.ndim]:
            raise ValueError(f"axis {wrong[0]} for {path!r}, which has {x.ndim}: expected 0 to {x.ndim - 1}")
        spread = tuple(n if i in cut else 1 for i, n in enumerate(x.shape)) if cut else ()
        out[path] = jnp.zeros((size, *spread, *(() if groups is None else (groups,))))
    return out


def partition_ids(
    key: Key[Array, ""],
    base: Params,
    groups: int,
    *,
    at: trees.Pattern | None = None,
    share_by_shape: bool = True,
    min_ndim: int = 2,
) -> dict[str, Int[Array, "..."]]:
    """The group of every entry, uniformly at random: {path: integers from 0 to K - 1 of the leaf's shape}.

    Args:
      key: of everything random.
      base: theta0, or its shapes.
      groups: K; one byte an entry up to 128.
      at, min_ndim: as in `init_lam`.
      share_by_shape: leaves of equal shape have the same groups, as in the authors' code.

    Raises:
      ValueError, PatternError: as `init_lam`.
    """
    if groups < 1:
        raise ValueError(f"groups={groups}: at least one")
    dtype = jnp.int8 if groups <= 128 else jnp.int32
    site = lambda path, x: f"{x.shape}" if share_by_shape else path
    return {
        path: jax.random.randint(site_key(key, site(path, x)), x.shape, 0, groups, jnp.int32).astype(dtype)
        for path, x in _chosen(base, at, min_ndim, True).items()
    }


def _chosen(base: Params, at: trees.Pattern | None, min_ndim: int | None, grouped: bool) -> dict[str, Any]:
    leaves = {p: x for p, x in trees.by_path(base).items() if jnp.issubdtype(jnp.result_type(x), jnp.floating)}
    paths = list(leaves) if at is None else trees.matches(at, leaves, "floating-point parameter")
    least = (2 if grouped else 0) if min_ndim is None else min_ndim
    chosen = {p: leaves[p] for p in paths if jnp.ndim(leaves[p]) >= least}
    if not chosen:
        raise ValueError(f"nothing to adapt: none of {len(paths)} leaves has {least} axes or more")
    return chosen


# -------------------------------------------------------------------------------------------------------- composition


def compose(base: Params, vectors: PyTree, lam: Lam, *, ids: Ids | None = None) -> Params:
    """theta(lam): the base plus the task vectors, each block scaled by its own coefficients.

    Leaf by leaf, in float32 or wider and rounded once; no dense copy of a `LowRank` vector is kept.

    Args:
      base: theta0.
      vectors: tau, a tree like `base` as `task_vectors` makes them, or {path: value}; values are (T, *shape), of any
        floating-point dtype, or `LowRank`. Leaves without vectors stay the base's.
      lam: see the module. May be traced; its gradient is <dL/dtheta^(l), tau_i^(l)>.
      ids: {path: the group of each entry}, of `partition_ids`: then the coefficients of these leaves have K groups.

    Raises:
      MergeInputError: vectors or coefficients that the base, or each other, do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> base, tau = {"w": jnp.ones(2), "b": jnp.ones(1)}, {"w": jnp.array([[1.0, 2], [3, 4]]), "b": jnp.ones((2, 1))}
      >>> out = compose(base, tau, {"w": jnp.array([1.0, -1.0])})
      >>> out["w"].tolist(), out["b"].tolist()
      ([-1.0, -1.0], [1.0])
    """
    leaves = trees.by_path(base)
    add = lambda path, delta: (widened(leaves[path]).astype(delta.dtype) + delta).astype(leaves[path].dtype)
    return trees.replace_leaves(base, {p: add(p, d) for p, d in _deltas(leaves, vectors, lam, ids).items()})


def compose_linearized(
    apply_fn: Any, base: Params, vectors: PyTree, lam: Lam, *inputs: Any, ids: Ids | None = None
) -> PyTree:
    """The outputs of the model linearised at the base: f(x; theta0) + J f(x; theta0) (theta(lam) - theta0), one JVP.

    Args:
      apply_fn: `(params, *inputs) -> outputs`, all floating-point.
      base, vectors, lam, ids: as in `compose`.

    Raises:
      MergeInputError: as `compose`.
    """
    leaves = trees.by_path(base)
    delta = _deltas(leaves, vectors, lam, ids)
    moving = {p: leaves[p] for p in delta}
    tangent = {p: d.astype(leaves[p].dtype) for p, d in delta.items()}
    run = lambda moving: apply_fn(trees.replace_leaves(base, moving), *inputs)
    outputs, change = jax.jvp(run, (moving,), (tangent,))
    return jax.tree.map(jnp.add, outputs, change)


@register_merge(paper="Zhang et al., NeurIPS 2024", needs_base=True, needs=("lam",))
def atlas(
    base: Params, models: PyTree, *, lam: Lam, ids: Ids | None = None, exclude: trees.Pattern | None = None
) -> Params:
    """The base plus what each fine-tuning changed, every block scaled by coefficients of its own.

    Args:
      base: theta0.
      models: T fine-tuned models, a list or a stack.
      lam, ids: as in `compose`; `fit_lam` learns them.
      exclude: pattern of leaves that stay the base's, whatever `lam` says.

    Raises:
      MergeInputError, PatternError: as `split` and `compose`.
    """
    vectors = trees.by_path(task_vectors(base, models, exclude=exclude))
    if exclude is not None and not _is_one(lam):
        out = set(trees.matches(exclude, trees.by_path(base), "parameter"))
        lam = {path: x for path, x in trees.by_path(lam).items() if path not in out}
    return compose(base, vectors, lam, ids=ids)


def _deltas(leaves: Mapping[str, Any], vectors: PyTree, lam: Lam, ids: Ids | None) -> dict[str, Array]:
    """sum_i lam_i tau_i of every leaf that has coefficients."""
    taus = trees.by_path(vectors, is_leaf=is_low_rank)
    if lost := [p for p in taus if p not in leaves]:
        raise MergeInputError(f"task vectors of {lost[0]!r}, which the base lacks{trees.near(lost[0], leaves)}")
    scales = _by_leaf(lam, taus)
    if lost := [p for p in ids or {} if p not in scales]:
        raise MergeInputError(f"groups of {lost[0]!r}, which has no coefficients{trees.near(lost[0], scales)}")
    return {p: _delta(p, taus[p], c, (ids or {}).get(p), jnp.shape(leaves[p])) for p, c in scales.items()}


def _is_one(lam: Lam) -> bool:
    return list(trees.by_path(lam)) == [""]


def _by_leaf(lam: Lam, taus: Mapping[str, Any]) -> dict[str, Array]:
    """The coefficients of each leaf that has any: those of the longest path that leads to it."""
    if _is_one(lam):
        return dict.fromkeys(taus, jnp.asarray(lam))
    lam, out, used = trees.by_path(lam), {}, set()
    for path in taus:
        parts = path.split("/")
        above = ("/".join(parts[:i]) for i in range(len(parts), 0, -1))
        if (found := next((p for p in above if p in lam), None)) is not None:
            used.add(found)
            out[path] = jnp.asarray(lam[found])
    if lost := [p for p in lam if p not in used]:
        raise MergeInputError(f"coefficients of {lost[0]!r}, which has no task vectors{trees.near(lost[0], taus)}")
    return out


def _delta(path: str, tau: Any, lam: Array, ids: Array | None, shape: tuple[int, ...]) -> Array:
    low = isinstance(tau, LowRank)
    have = tau.shape(len(shape)) if low else jnp.shape(tau)
    if have[1:] != shape:
        raise MergeInputError(f"task vectors {have} of {path!r}, which is {shape}: expected (T, *{shape})")
    if ids is not None and jnp.shape(ids) != shape:
        raise MergeInputError(f"groups {jnp.shape(ids)} of {path!r}, which is {shape}")
    own = lam.shape[1:] if ids is None else lam.shape[1:-1]
    fits = len(own) in (0, len(shape)) and all(n in (1, m) for n, m in zip(own, shape))
    if lam.ndim < (1 if ids is None else 2) or lam.shape[0] != have[0] or not fits:
        told = f"({have[0]},), or that with {shape} or ones behind" + ("" if ids is None else ", and K last")
        raise MergeInputError(f"coefficients {lam.shape} of {path!r}: expected {told}")
    if low:
        return _of_factors(tau, lam, ids, shape)
    return _one_by_one(lam, ids, tau, widened, unroll=have[0] <= UNROLLED)


def _one_by_one(lam: Array, ids: Array | None, taus: Any, dense: Any, unroll: bool) -> Array:
    """sum_i lam_i tau_i, where `dense` makes tau_i of the i-th entries of `taus`.

    Unrolled, for XLA's CPU backend takes a hundred times as long for a product that is summed over its first axis.
    """

    def add(total: Any, i: Any) -> Any:
        tau = dense(jax.tree.map(lambda x: x[i], taus))
        return total + _spread(lam[i], ids, tau.shape, tau.dtype) * tau

    first = add(0, 0)
    if unroll:
        return functools.reduce(add, range(1, len(lam)), first)
    add = jax.checkpoint(add)  # or else every tau_i is kept for the gradient of lam
    return jax.lax.scan(lambda total, i: (add(total, i), None), first, jnp.arange(1, len(lam)))[0]


def _spread(lam: Array, ids: Array | None, shape: tuple[int, ...], dtype: Any) -> Array:
    """The coefficient of every entry of one vector, of its shape or ones: a gather where there are groups."""
    lam = lam.astype(dtype)
    if ids is None:
        return lam.reshape(lam.shape or (1,) * len(shape))
    *own, count = lam.shape
    place, block = ids.astype(jnp.int32), 1
    for axis in reversed(range(len(own))):  # row-major: the last axis counts fastest
        if own[axis] > 1:
            place = place + count * block * jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            block *= own[axis]
    return lam.ravel()[place]


def _of_factors(tau: LowRank, lam: Array, ids: Array | None, shape: tuple[int, ...]) -> Array:
    """sum_i lam_i a_i b_i: one product of rank T r where coefficients are for whole layers, else one task at a time."""
    a, b = widened(tau.a), widened(tau.b)
    s, i, o = tau.letters(len(shape))
    product = functools.partial(jnp.einsum, precision="highest")
    if ids is None and all(n == 1 for n in lam.shape[1 + len(s) :]):
        by = lam.astype(b.dtype).reshape(lam.shape[0], *lam.shape[1 : 1 + len(s)])
        b = b * by.reshape(*by.shape, *(1,) * (b.ndim - by.ndim))
        return product(f"y{s}{i}z,y{s}z{o}->{s}{i}{o}", a, b)

    return _one_by_one(lam, ids, (a, b), lambda ab: product(f"{s}{i}z,{s}z{o}->{s}{i}{o}", *ab), unroll=False)
