"""Which blocks of keys a block of queries reads: given as a mask, or drawn by key with a probability of the distance.

Selection by chance follows PrFlashAttention (Li, 2024, arXiv 2410.18441), of which only the idea is public: a distribution
over block distances says how likely a block of keys takes part, and the diagonal always does. Our reading: of the blocks
before block i, min(K, i) are drawn without replacement with probabilities proportional to p_distance (Gumbel top-k), so
the budget is static. The softmax is over the keys selected.

The kernels read a selection as lists: for each block of queries the blocks of keys it sees, and for the backward pass the
reverse. What is not listed is neither fetched nor computed.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpeft.kernels.platforms import KernelError

__all__ = ["Selection", "prflash_plan", "select_blocks", "select_drawn"]


@jtu.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """Blocks seen, the same in forward and backward pass.

    Attributes:
      mask: True where a block of queries (row) sees a block of keys, for all heads (leading axis 1) or each.
      block: length of a block of queries and of keys, static.
      slots: the most blocks in a row, static: as many are visited, so a small number saves time.
    """

    mask: Bool[Array, "#h n m"]
    block: int = dataclasses.field(metadata={"static": True})
    slots: int = dataclasses.field(metadata={"static": True})


def select_blocks(mask: Bool[Array, "*h n m"], block: int, slots: int | None = None) -> Selection:
    """A selection from a mask (queries' blocks, keys' blocks) or (heads, ...); the diagonal is added.

    Args:
      mask: may be traced.
      block: length of a block; on TPU a multiple of 128 or the whole length, on GPU a multiple of 16.
      slots: the most blocks in a row, diagonal included; what a row has beyond them is not seen. All where None.

    Raises:
      KernelError: a mask of another rank, a block or slots below 1.
    """
    if mask.ndim not in (2, 3):
        raise KernelError(f"mask {mask.shape}: expected (n, m) or (heads, n, m) blocks")
    n, m = mask.shape[-2:]
    slots = m if slots is None else slots
    if block < 1 or slots < 1:
        raise KernelError(f"blocks of {block}, {slots} in a row: both are at least 1")
    diagonal = jnp.eye(n, m, dtype=bool)
    seen = (mask.astype(bool) | diagonal).reshape(-1, n, m)
    if slots < m:
        rank = jnp.cumsum(seen & ~diagonal, axis=-1, dtype=jnp.int32)
        seen &= (rank <= slots - diagonal.any(-1, keepdims=True).astype(jnp.int32)) | diagonal
    return Selection(seen, block, min(slots, m))


def prflash_plan(
    key: Key[Array, ""], n_blocks: int, log_p: Float[Array, "{n_blocks}"], budget: int
) -> tuple[Int[Array, "{n_blocks} {budget}+1"], Bool[Array, "{n_blocks} {budget}+1"]]:
    """Draws min(budget, i) blocks before each block i; see the module.

    Args:
      key: the draw.
      n_blocks: blocks of queries, and of keys.
      log_p: log probability, up to a constant, of the distance in blocks; of distance 0 it is not read. A distance of
        -inf is never drawn, even if that leaves slots empty.
      budget: K, at least 0.

    Returns:
      `(idx, valid)`: block numbers in increasing order, the diagonal last; an empty slot holds the diagonal's number and
      is not valid.

    Raises:
      KernelError: a negative budget, no blocks, or log_p of another length.
    """
    if n_blocks < 1 or budget < 0:
        raise KernelError(f"{n_blocks} blocks with a budget of {budget}: at least 1 and 0")
    if log_p.shape != (n_blocks,):
        raise KernelError(f"log_p {log_p.shape}: one number for each of {n_blocks} distances")
    rows = jnp.arange(n_blocks, dtype=jnp.int32)
    distance = rows[:, None] - rows
    noise = jax.random.gumbel(key, (n_blocks, n_blocks), log_p.dtype)
    score = jnp.where(distance > 0, log_p[jnp.maximum(distance, 0)] + noise, -jnp.inf)
    width = min(budget, n_blocks)
    best, chosen = lax.top_k(score, width)
    drawn = best > -jnp.inf
    chosen = jnp.sort(jnp.where(drawn, chosen.astype(jnp.int32), n_blocks), axis=-1)
    empty = jnp.full((n_blocks, budget - width), n_blocks, jnp.int32)
    chosen = jnp.concatenate([chosen, empty], -1)
    valid = chosen < n_blocks
    idx = jnp.where(valid, chosen, rows[:, None])
    return jnp.concatenate([idx, rows[:, None]], -1), jnp.concatenate([valid, jnp.ones((n_blocks, 1), bool)], -1)


def select_drawn(idx: Int[Array, "n k"], valid: Bool[Array, "n k"], block: int) -> Selection:
    """A selection from `prflash_plan`'s slots."""
    n, slots = idx.shape
    rows = lax.broadcasted_iota(jnp.int32, idx.shape, 0)
    mask = jnp.zeros((n, n), bool).at[rows, idx].max(valid)
    return select_blocks(mask, block, min(slots, n))


class Lists(NamedTuple):
    """For each block its partners; entries from `count` on repeat the last, so that nothing new is fetched for them."""

    index: Int[Array, "#h n slots"]
    count: Int[Array, "#h n"]


def lists(seen: Any, slots: int) -> Lists:
    """Each row's true columns, in order, as far as the slots reach; numpy stays numpy."""
    np_: Any = np if isinstance(seen, np.ndarray) else jnp
    order = np_.argsort(~seen, axis=-1, stable=True)[..., :slots].astype(np.int32)
    count = np_.minimum(seen.sum(-1), slots).astype(np.int32)
    slot = np.arange(order.shape[-1], dtype=np.int32)
    last = np_.maximum(count[..., None] - 1, 0)
    return Lists(np_.take_along_axis(order, np_.minimum(slot, last), axis=-1), count)


def reachable(t: int, s: int, block_q: int, block_k: int, causal: bool, offset: int) -> np.ndarray:
    """(n, m): where some query of a block may see some key of another."""
    n, m = -(-t // block_q), -(-s // block_k)
    if not causal:
        return np.ones((n, m), bool)
    last_query = np.minimum((np.arange(n) + 1) * block_q, t) - 1 + offset
    return last_query[:, None] >= np.arange(m) * block_k
