"""Blocks inside a kernel: what of them lies beyond an array's edge is zeroed on the way in and never written."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array

Pair = tuple[Any, Any]


def zero_beyond(size: int, block: int, index: Any) -> Callable[[Array, int], Array]:
    """`(array, axis) -> array` with what lies beyond the end of an axis zeroed; nothing is done where blocks fit.

    Args:
      size: of the whole axis.
      block: of a block; `array` is block number `index`.
    """
    if not size % block:
        return lambda x, axis: x

    def inside(x: Array, axis: int) -> Array:
        at = index * block + lax.broadcasted_iota(jnp.int32, x.shape, axis)
        return jnp.where(at < size, x, jnp.zeros((), x.dtype))

    return inside


def gpu_load(ref: Any, starts: Pair, lengths: Pair, *, swap: bool = False, anywhere: bool = False) -> Array:
    """A block of a matrix in a GPU's memory, zero beyond its edges.

    Args:
      ref: the matrix.
      starts, lengths: of the block's rows and columns; starts are multiples of lengths.
      swap: both pairs are given for the transpose of `ref`.
      anywhere: starts may be any.
    """
    block, inside = _part(ref, *((starts[::-1], lengths[::-1]) if swap else (starts, lengths)), anywhere)
    return pltriton.load(block, mask=inside, other=None if inside is None else 0.0)


def gpu_store(ref: Any, starts: Pair, value: Array) -> None:
    """Writes what of `value` lies within the matrix."""
    block, inside = _part(ref, starts, value.shape, False)
    pltriton.store(block, value.astype(ref.dtype), mask=inside)


def _part(ref: Any, starts: Pair, lengths: Any, anywhere: bool) -> tuple[Any, Array | None]:
    # One type for all indices: a Python number is 64 bits wide where JAX is told so.
    row, column = (jnp.asarray(s, jnp.int32) for s in starts)
    block = ref.at[pl.ds(row, lengths[0]), pl.ds(column, lengths[1])]
    if not (anywhere or ref.shape[0] % lengths[0] or ref.shape[1] % lengths[1]):
        return block, None  # no block crosses an edge, and a mask keeps Triton from fetching wide and ahead
    at_row = row + lax.broadcasted_iota(jnp.int32, tuple(lengths), 0)
    at_column = column + lax.broadcasted_iota(jnp.int32, tuple(lengths), 1)
    return block, (at_row < ref.shape[0]) & (at_column < ref.shape[1])
