"""Keys and values that a decoder has computed, as an explicit pytree: argument and result of its call.

    cache = new_cache(config, batch, capacity)
    logits, cache = model.apply(params, prompt, mask, positions=positions, cache=cache)
    logits, cache = model.apply(params, token, positions=next_position, cache=cache)

How keys and values are kept is a `Storage`, three functions on any pytree whose leaves have the batch first: `FULL` as
they are, `INT8` as one byte a number. A row's columns are written in order from `length`; `real` says which of them hold
tokens (padding on the left is kept and never seen).

Letters: b batch, t new columns, c capacity, g key/value heads, e head width, L layers.

int8, per token and head: s = max |x| / 127, code = round(x / s), x' = s code, so |x - x'| <= s / 2. Keys are kept as
they are read, after rotary positions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxpeft.models.layers import BlockConfig


class Storage(NamedTuple):
    """How one layer's keys and values are kept; leaves of a store have the batch as their first axis.

    Attributes:
      init: `(batch, capacity, heads, width, dtype) -> store`, empty.
      append: `(store, k (b, t, g, e), v, at (b,)) -> store` with the new columns at `at .. at + t` of each row. Writing
        the same columns again replaces them.
      read: `(store) -> (k (b, c, g, e), v)` in the order of the columns; columns not yet written may hold anything
        finite.
    """

    init: Callable[[int, int, int, int, Any], PyTree]
    append: Callable[[PyTree, Array, Array, Array], PyTree]
    read: Callable[[PyTree], tuple[Array, Array]]


@jtu.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a decoder remembers of a batch.

    Attributes:
      layers: a store for each layer, or where layers are scanned one whose leaves are (b, L, ...).
      real: which columns hold tokens.
      length: columns written, one number a row.
      storage: static.
    """

    layers: PyTree
    real: Bool[Array, "b c"]
    length: Int[Array, "b"]
    storage: Storage = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        return self.real.shape[1]


def write(kept: Array, new: Array, at: Int[Array, "b"]) -> Array:
    """`kept` (b, c, ...) with `new` (b, t, ...) at columns `at .. at + t`; a row without room for it stays as it was."""
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, kept.ndim)),
        inserted_window_dims=(),
        scatter_dims_to_operand_dims=(1,),
        operand_batching_dims=(0,),
        scatter_indices_batching_dims=(0,),
    )
    return lax.scatter(
        kept, at[:, None], new.astype(kept.dtype), numbers, unique_indices=True, mode=lax.GatherScatterMode.FILL_OR_DROP
    )


def _full_init(batch: int, capacity: int, heads: int, width: int, dtype: Any) -> PyTree:
    shape = (batch, capacity, heads, width)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def _full_append(store: PyTree, k: Array, v: Array, at: Array) -> PyTree:
    return {"k": write(store["k"], k, at), "v": write(store["v"], v, at)}


FULL = Storage(_full_init, _full_append, lambda store: (store["k"], store["v"]))


def quantise(x: Float[Array, "*n e"]) -> dict[str, Array]:
    """`{"code": int8 (*n, e), "scale": (*n,)}`; a row of zeros has scale 0."""
    wide = x.astype(jnp.float32)
    scale = (jnp.abs(wide).max(-1) / 127).astype(x.dtype)
    step = scale.astype(jnp.float32)  # as it will be read: a rounded scale adds no error of its own
    code = jnp.round(wide / jnp.where(step > 0, step, 1)[..., None])
    return {"code": jnp.clip(code, -127, 127).astype(jnp.int8), "scale": scale}


def dequantise(q: dict[str, Array]) -> Float[Array, "*n e"]:
    """What `quantise` kept, to half a step; in the dtype of the scale."""
    return q["code"].astype(q["scale"].dtype) * q["scale"][..., None]


def _int8_init(batch: int, capacity: int, heads: int, width: int, dtype: Any) -> PyTree:
    return jax.tree.map(quantise, _full_init(batch, capacity, heads, width, dtype))


def _int8_append(store: PyTree, k: Array, v: Array, at: Array) -> PyTree:
    new = {"k": quantise(k), "v": quantise(v)}
    return jax.tree.map(lambda kept, x: write(kept, x, at), store, new)


INT8 = Storage(_int8_init, _int8_append, lambda store: (dequantise(store["k"]), dequantise(store["v"])))


def new_cache(config: BlockConfig, batch: int, capacity: int, storage: Storage = FULL) -> Cache:
    """An empty cache for a decoder of this config.

    Args:
      config: the decoder's.
      batch: rows.
      capacity: columns: prompt, padding, and all that is to be generated. Columns written past it are lost, so whoever
        writes counts (`generate` refuses beforehand).
      storage: how keys and values are kept.

    Raises:
      ValueError: no rows or columns.
    """
    if batch < 1 or capacity < 1:
        raise ValueError(f"a cache of {batch} rows and {capacity} columns: both are at least 1")
    heads = config.kv_heads or config.heads
    stores = [storage.init(batch, capacity, heads, config.head_dim, config.dtype) for _ in range(config.layers)]
    layers = jax.tree.map(lambda *xs: jnp.stack(xs, 1), *stores) if config.scan else tuple(stores)
    return Cache(layers, jnp.zeros((batch, capacity), bool), jnp.zeros(batch, jnp.int32), storage)


class Cell:
    """One layer's store while that layer runs: attention extends it once and sees all of it.

    It lives within the trace of one layer, so the layer's function stays pure. Modules hand it on as they do the bias:
    what they return is what they return without a cache, which hooks around them count on.
    """

    def __init__(self, storage: Storage, store: PyTree, at: Int[Array, "b"]) -> None:
        self._storage, self._before, self.store, self._at = storage, store, store, at

    def extend(self, k: Float[Array, "b t g e"], v: Float[Array, "b t g e"]) -> tuple[Array, Array]:
        """The new keys and values put behind those kept, and then all that is kept, (b, c, g, e)."""
        self.store = self._storage.append(self._before, k, v, self._at)
        return self._storage.read(self.store)
