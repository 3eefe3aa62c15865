"""What attention's kernels share: the static plan, block sizes, and a block's scores, the same forward and backward.

For a block of queries and one of keys, in either orientation (queries along `axis`, 0 or 1):

    s = scale q·k - slope g(|i - j|)   where j is seen by i     p = exp(s - lse)     dv += pᵀ do
    ds = p (do·v - delta)              dq += scale ds k         dk += scale dsᵀ q    dslope -= ds g

with i = offset + m the query's position, and delta = rowsum(do o) less the cotangent of lse (Dao, "FlashAttention-2",
ICLR 2024, algorithms 1 and 2; a cotangent of lse adds p dlse to ds).
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxpeft.kernels.block_selection import Lists, lists, reachable
from jaxpeft.kernels.platforms import (
    LANES,
    VMEM_BYTES,
    Backend,
    KernelError,
    check_block,
    check_vmem,
    cut,
    dot,
    power_of_two,
    wide,
)
from jaxpeft.kernels.positions import Distance, distance_of

HIDDEN = -1e30  # a score that is not seen: finite, so that differences of two of them are no NaN
MAX_PREFIX = 1024
MAX_WIDTH = 256
SMEM_BYTES = 2**18  # what the lists of blocks may take of a TPU's scalar memory


class Operands(NamedTuple):
    """Of a kernel; b batch, t queries, s keys, h heads, g heads of keys, d width, p prefix.

    Attributes:
      q: (b, t, h, d).
      k, v: (b, s, g, d).
      prefix: None or keys and values (1 or b, p, g, d).
      slopes: None or (h,), of the sums' type.
      key_mask: None or (b, s) int32, 0 where a key is not seen.
      selected: None or (1 or h, blocks of queries, blocks of keys), where one sees the other.
    """

    q: Array
    k: Array
    v: Array
    prefix: tuple[Array, Array] | None
    slopes: Array | None
    key_mask: Array | None
    selected: Array | None

    @property
    def sizes(self) -> "Sizes":
        (b, t, h, d), (_, s, g, _) = self.q.shape, self.k.shape
        return Sizes(b, t, s, h, g, d, 0 if self.prefix is None else self.prefix[0].shape[1])


class Sizes(NamedTuple):
    """As the letters of `Operands`."""

    b: int
    t: int
    s: int
    h: int
    g: int
    d: int
    p: int

    @property
    def group(self) -> int:
        return self.h // self.g


def product(x: Array, y: Array, contract: tuple[int, int], precision: Any) -> Array:
    """`dot`, of a single row in float32: Mosaic fails to compile that of 16-bit types."""
    if 1 in (*x.shape, *y.shape):
        x, y = x.astype(wide(x.dtype)), y.astype(wide(y.dtype))
    return dot(x, y, contract, precision)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Lengths of a block of queries and of keys; `for_tpu` and `for_gpu` choose, `check_tpu` and `check_gpu` refuse."""

    q: int
    k: int

    @classmethod
    def for_tpu(cls, t: int, s: int, d: int, p: int, dtype: Any, vmem_bytes: int = VMEM_BYTES) -> "Blocks":
        """The largest blocks up to 512 that fit: every block of queries reads all keys."""
        for want in (512, 256, 128):
            found = cls(cut(t, want, LANES), cut(s, want, LANES))
            if found.vmem(d, p, dtype) <= 5 * vmem_bytes // 8:
                return found
        raise KernelError(
            f"no blocks for {t} queries, {s} keys of width {d}, prefix {p} fit {vmem_bytes} bytes of VMEM"
        )

    @classmethod
    def for_gpu(cls, t: int, s: int, d: int, dtype: Any) -> "Blocks":
        want = 64 if jnp.dtype(dtype).itemsize * d <= 256 else 32
        return cls(power_of_two(t, 16, want), power_of_two(s, 16, want))

    def check_tpu(self, t: int, s: int, d: int, p: int, dtype: Any, vmem_bytes: int) -> None:
        """Raises KernelError for blocks that Mosaic would refuse."""
        check_block("q", self.q, t, LANES)
        check_block("k", self.k, s, LANES)
        check_vmem(self, self.vmem(d, p, dtype), vmem_bytes)

    def check_gpu(self) -> None:
        """Raises KernelError for blocks that Triton would refuse."""
        for name, block in (("q", self.q), ("k", self.k)):
            if block < 16 or block & (block - 1):
                raise KernelError(f"block {name} of {block}: a power of two from 16")

    def vmem(self, d: int, p: int, dtype: Any) -> int:
        """Bytes of VMEM of the hungriest pass (dk and dv): operands twice, sums, and three arrays of scores."""
        size, sums = jnp.dtype(dtype).itemsize, wide(dtype).itemsize
        width = pl.cdiv(d, LANES) * LANES
        q, k = pl.cdiv(self.q, LANES) * LANES, pl.cdiv(self.k, LANES) * LANES
        rows = 2 * size * (2 * q + 4 * max(k, p) + 2 * p) * width + 4 * sums * 8 * q
        return rows + 2 * sums * max(q, k, p) * width + 3 * sums * q * max(k, p)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in a call.

    Attributes:
      selection: None, or the length of a selection's blocks and the most of them in a row.
    """

    scale: float
    causal: bool
    offset: int
    distance: Distance
    backend: Backend
    blocks: Blocks | None
    selection: tuple[int, int] | None
    precision: Any
    vmem_bytes: int

    def blocks_on(self, platform: str, sizes: Sizes, dtype: Any) -> Blocks:
        """Given, or chosen for the platform; raises KernelError for what it would refuse."""
        _, t, s, _, _, d, p = sizes
        if platform == "gpu":
            found = self.blocks or self._within_selection(Blocks.for_gpu(t, s, d, dtype))
            found.check_gpu()
            return found
        found = self.blocks or Blocks.for_tpu(t, s, d, p, dtype, self.vmem_bytes)
        if self.selection is not None:
            found = Blocks(min(self.selection[0], t), min(self.selection[0], s))
        found.check_tpu(t, s, d, p, dtype, self.vmem_bytes)
        return found

    def _within_selection(self, blocks: Blocks) -> Blocks:
        """Powers of two that divide a selection's blocks."""
        if self.selection is None:
            return blocks
        most = self.selection[0] & -self.selection[0]
        return Blocks(min(blocks.q, most), min(blocks.k, most))

    def lists(self, sizes: Sizes, blocks: Blocks, selected: Array | None, *, columns: bool = False) -> Lists:
        """Of each block of queries the blocks of keys, or with `columns` the reverse."""
        seen: Any = reachable(sizes.t, sizes.s, blocks.q, blocks.k, self.causal, self.offset)[None]
        slots = seen.shape[2]
        if selected is not None and self.selection is not None:
            length, most = self.selection
            parts_q, parts_k = max(1, length // blocks.q), max(1, length // blocks.k)
            spread = jnp.repeat(jnp.repeat(selected, parts_q, axis=1), parts_k, axis=2)
            seen = spread[:, : seen.shape[1], :slots] & jnp.asarray(seen)
            slots = min(slots, most * parts_k)
        return lists(seen.swapaxes(1, 2), seen.shape[1]) if columns else lists(seen, slots)

    def pairs(self, sizes: Sizes) -> float:
        """(query, key) pairs that a head computes, about."""
        every = sizes.t * sizes.s / (2 if self.causal else 1)
        return every if self.selection is None else min(every, sizes.t * self.selection[0] * self.selection[1])


@dataclasses.dataclass(frozen=True)
class Tile:
    """One block of scores: where it lies, and what of it is seen.

    Attributes:
      row, column: the first query and key; may be traced.
      queries, keys: sizes of the whole axes.
      axis: of the scores' array, along which queries run.
      prefix: the keys are the prefix: no bias, and all are seen.
    """

    plan: Plan
    row: Any
    column: Any
    queries: int
    keys: int
    axis: int = 0
    prefix: bool = False

    def _at(self, shape: tuple[int, ...]) -> tuple[Array, Array]:
        m = lax.broadcasted_iota(jnp.int32, shape, self.axis) + self.row
        n = lax.broadcasted_iota(jnp.int32, shape, 1 - self.axis) + self.column
        return m, n

    def distance(self, shape: tuple[int, ...], dtype: Any) -> Array:
        m, n = self._at(shape)
        return distance_of(self.plan.distance, m - n + self.plan.offset, dtype)

    def scores(self, q: Array, k: Array, slope: Array | None, key_mask: Array | None) -> Array:
        """Scores, HIDDEN where not seen; q and k as (rows, d), `key_mask` broadcasts along the queries."""
        x, y = (q, k) if self.axis == 0 else (k, q)
        s = product(x, y, (1, 1), self.plan.precision) * self.plan.scale
        if slope is not None and not self.prefix:
            s = s - slope * self.distance(s.shape, s.dtype)
        seen = self._seen(s.shape, key_mask)
        return s if seen is None else jnp.where(seen, s, jnp.asarray(HIDDEN, s.dtype))

    def _seen(self, shape: tuple[int, ...], key_mask: Array | None) -> Array | None:
        plan, (q_length, k_length) = self.plan, (shape[self.axis], shape[1 - self.axis])
        conditions = []
        m, n = self._at(shape)
        if self.keys % k_length:
            conditions.append(n < self.keys)
        if self.queries % q_length:
            conditions.append(m < self.queries)
        if plan.causal and not self.prefix:
            conditions.append(m + plan.offset >= n)
        if key_mask is not None and not self.prefix:
            conditions.append(jnp.broadcast_to(key_mask != 0, shape))
        if not conditions:
            return None
        seen = conditions[0]
        for c in conditions[1:]:
            seen &= c
        return seen


def online(
    tile: Tile, q: Array, k: Array, v: Array, slope: Any, key_mask: Any, state: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """One more block of keys into (largest score, sum of weights, weighted sum of values): (rows, 1), (rows, 1), (rows, d)."""
    top, total, mean = state
    s = tile.scores(q, k, slope, key_mask)
    new = jnp.maximum(top, s.max(axis=1, keepdims=True))
    p = jnp.where(s <= HIDDEN / 2, jnp.zeros((), s.dtype), jnp.exp(s - new))
    shrink = jnp.exp(top - new)
    return (
        new,
        total * shrink + p.sum(axis=1, keepdims=True),
        mean * shrink + product(p.astype(v.dtype), v, (1, 0), tile.plan.precision),
    )


def finished(state: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """`(o, lse)` of a row: 0 and -inf where it saw nothing."""
    top, total, mean = state
    safe = jnp.where(total > 0, total, jnp.ones((), total.dtype))
    return mean / safe, jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)


def weights_and_slant(
    tile: Tile, q: Array, k: Array, v: Array, do: Array, lse: Array, delta: Array, slope: Any, key_mask: Any
) -> tuple[Array, Array]:
    """`(p, ds)` of a block in the tile's orientation; lse and delta broadcast along the keys."""
    s = tile.scores(q, k, slope, key_mask)
    hidden, zero = s <= HIDDEN / 2, jnp.zeros((), s.dtype)
    p = jnp.where(hidden, zero, jnp.exp(s - lse))
    x, y = (do, v) if tile.axis == 0 else (v, do)
    # Chosen again: beyond the last query delta is whatever lies there.
    return p, jnp.where(hidden, zero, p * (product(x, y, (1, 1), tile.plan.precision) - delta))


def cost(sizes: Sizes, dtype: Any, pairs: float, products: int) -> pl.CostEstimate:
    """Of `products` matrix products over so many (query, key) pairs a head."""
    b, t, s, h, g, d, p = sizes
    size, pairs = jnp.dtype(dtype).itemsize, pairs + t * p
    return pl.CostEstimate(
        flops=int(2 * products * b * h * pairs * d),
        transcendentals=int(b * h * pairs),
        bytes_accessed=int(size * b * d * ((products + 2) // 2 * t * h + products * (s + p) * g)),
    )
