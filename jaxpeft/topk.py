"""The k largest of all entries of a tree, without sorting: what sparse tuning, pruning and sparse merging choose by.

Non-negative floats order as their bit patterns do, so the k-th largest is found by bisection on 31 bits (63 in float64):
exact, a few passes over the data, and far faster on CPUs than a sort. Of entries that equal the k-th largest, the first in
flattening order are taken, so that exactly k are chosen.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PyTree

__all__ = ["kth_largest", "top_k_mask"]


def kth_largest(scores: PyTree, k: Any) -> Float[Array, ""]:
    """The k-th largest of all entries of `scores`.

    Args:
      scores: non-negative floats, of one dtype; NaN counts as larger than all else.
      k: 1 to their number; may be traced.

    Returns:
      A scalar of the leaves' dtype: exactly k entries are at least as large, or more where some are equal.

    Raises:
      ValueError: no leaves, or leaves of several dtypes.
    """
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(scores)]
    if len({x.dtype for x in leaves}) != 1:
        raise ValueError(f"scores of dtypes {sorted({str(x.dtype) for x in leaves})}: expected some, all of one dtype")
    dtype = leaves[0].dtype
    bits = jnp.finfo(dtype).bits
    whole = {16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}[bits]
    patterns = [lax.bitcast_convert_type(jnp.abs(x), whole) for x in leaves]

    def step(i: Array, found: Array) -> Array:
        trial = found | (jnp.ones((), whole) << (bits - 2 - i).astype(whole))
        reached = sum(jnp.sum(p >= trial, dtype=jnp.int32) for p in patterns)
        return jnp.where(reached >= k, trial, found)

    found = lax.fori_loop(0, bits - 1, step, jnp.zeros((), whole))
    return lax.bitcast_convert_type(found, dtype)


def top_k_mask(scores: PyTree, k: Any) -> PyTree:
    """True at the k largest of all entries of `scores`, over all leaves together.

    Args:
      scores: non-negative floats, of one dtype (|w|, squared gradients).
      k: 0 to their number; may be traced.

    Returns:
      A tree of the structure of `scores` of booleans, exactly k of them True; of equal entries the first ones, by leaf
      and then in row-major order.

    Raises:
      ValueError: as `kth_largest`, or a k (where it is known at trace time) out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> mask = top_k_mask({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 2.0])}, 2)
      >>> mask["a"].tolist(), mask["b"].tolist()
      ([True, False], [True, False])
    """
    leaves, structure = jax.tree.flatten(scores)
    entries = sum(math.prod(jnp.shape(x)) for x in leaves)
    if not isinstance(k, Tracer) and not 0 <= int(k) <= entries:
        raise ValueError(f"k {int(k)}: the tree has {entries} entries to choose from")
    threshold = kth_largest(scores, jnp.maximum(k, 1))
    missing = k - sum(jnp.sum(x > threshold, dtype=jnp.int32) for x in leaves)
    out: list[Bool[Array, "..."]] = []
    for x in leaves:
        equal = (x == threshold).reshape(-1)
        rank = jnp.cumsum(equal, dtype=jnp.int32)
        out.append((x > threshold) | (equal & (rank <= missing)).reshape(x.shape))
        missing = missing - rank[-1] if x.size else missing
    return jax.tree.unflatten(structure, out)
