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


def gpu_load(ref: Any, starts: Pair, lengths: Pair, *, swap: bool = False) -> Array:
    """A block of a matrix in a GPU's memory, zero beyond its edges; with `swap` both pairs are given for its transpose."""
    block, inside = _part(ref, *((starts[::-1], lengths[::-1]) if swap else (starts, lengths)))
    return pltriton.load(block, mask=inside, other=0.0)


def gpu_store(ref: Any, starts: Pair, value: Array) -> None:
    """Writes what of `value` lies within the matrix."""
    block, inside = _part(ref, starts, value.shape)
    pltriton.store(block, value.astype(ref.dtype), mask=inside)


def _part(ref: Any, starts: Pair, lengths: Any) -> tuple[Any, Array]:
    # One type for all indices: a Python number is 64 bits wide where JAX is told so.
    row, column = (jnp.asarray(s, jnp.int32) for s in starts)
    at_row = row + lax.broadcasted_iota(jnp.int32, tuple(lengths), 0)
    at_column = column + lax.broadcasted_iota(jnp.int32, tuple(lengths), 1)
    inside = (at_row < ref.shape[0]) & (at_column < ref.shape[1])
    return ref.at[pl.ds(row, lengths[0]), pl.ds(column, lengths[1])], inside
