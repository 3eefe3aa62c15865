"""Which entries of a task vector stay: ranks by magnitude within rows, leaves or the whole model.

Ranks rather than thresholds: of equal magnitudes (parameters that no task touched are exactly zero) the first in
row-major order count as larger, so that every mask has the number of entries that it should.

Letters: T models, d entries that are ranked together.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxpeft.topk import top_k_mask

__all__ = ["Axis", "rank_masks", "share_of"]

Axis = Literal["row", "leaf", "global"]


def share_of(share: Any, size: int) -> Int[Array, ""]:
    """floor(size * share), 0 to `size`, of a share that may be traced.

    It is counted in float32 (of 10^9 entries, to some hundred), where 0.53 * 100 is under 53: what misses a whole
    number by rounding alone counts as it. (In float64, `int(100 * 0.29)` is 28.)
    """
    whole = jnp.floor(jnp.asarray(share, jnp.float32) * jnp.float32(size) * jnp.float32(1 + 2**-22))
    number = jnp.clip(whole, 0, np.float32(2**31 - 128)).astype(jnp.int32).clip(0, size)
    return jnp.where(jnp.asarray(share) >= 1, size, number)


def rank_masks(deltas: PyTree, bounds: Callable[[int], tuple[Any, Any]], axis: Axis, row: int = -1) -> PyTree:
    """True where an entry's rank by magnitude, 0 the largest, is in [low, high).

    Args:
      deltas: leaves (T, *shape); each model is ranked by itself.
      bounds: `(d) -> (low, high)`, which may be traced; low is None for 0.
      axis: what is ranked together: each "row", each "leaf", or "global", all leaves of a model. Leaves without axes
        are kept whole by the first two.
      row: the axis of a leaf along which rows run; of one-axis leaves the whole is a row.

    Raises:
      ValueError: an unknown axis, a leaf without the axis `row`, 2**31 entries or more that are ranked together.
    """
    if axis not in ("row", "leaf", "global"):
        raise ValueError(f"axis {axis!r}: expected 'row', 'leaf' or 'global'")
    sizes = jax.tree.map(lambda x: jax.lax.stop_gradient(jnp.abs(x)), deltas)
    if axis == "global":
        widest = np.result_type(*(x.dtype for x in jtu.tree_leaves(sizes)))
        return jax.vmap(lambda x: _ranked(x, bounds))(jax.tree.map(lambda x: x.astype(widest), sizes))

    def leaf(x: Float[Array, "T *shape"]) -> Bool[Array, "T *shape"]:
        if x.ndim == 1 or x.size == 0:
            return jnp.ones(x.shape, bool)
        if axis == "leaf" or x.ndim == 2:
            return jax.vmap(lambda x: _ranked(x, bounds))(x)
        if not -(x.ndim - 1) <= row < x.ndim - 1:
            raise ValueError(f"row {row}: a leaf of shape {x.shape[1:]} has no such axis")
        at = row % (x.ndim - 1) + 1
        last = jnp.moveaxis(x, at, -1)
        mask = jax.vmap(lambda x: _ranked(x, bounds))(last.reshape(-1, last.shape[-1]))
        return jnp.moveaxis(mask.reshape(last.shape), -1, at)

    return jax.tree.map(leaf, sizes)


def _ranked(sizes: PyTree, bounds: Callable[[int], tuple[Any, Any]]) -> PyTree:
    entries = sum(math.prod(x.shape) for x in jtu.tree_leaves(sizes))
    if entries >= 2**31:
        raise ValueError(
            f"{entries} entries ranked together: at most 2**31 - 1; rank each leaf by itself (axis='leaf')"
        )
    low, high = bounds(entries)
    mask = top_k_mask(sizes, high)
    return mask if low is None else jax.tree.map(lambda m, n: m & ~n, mask, top_k_mask(sizes, low))
