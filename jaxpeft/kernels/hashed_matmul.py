"""`x W` where W is read from a small memory by a hash and never formed whole (see `random_fold` for the mapping).

    y = x W          dx = g Wᵀ          dmemory = xᵀ g, summed into the memory's places with W's signs

On TPU the memory stands in VMEM whole, as rows of 128: a tile of the weight is copied from it row by row, each row's place
told by the chunk's rotation, and signed by hashes made for the whole tile at once. The tiles of one block of columns are
kept for all blocks of rows, so that the weight is made once in each pass. The memory's gradient is a kernel of its own: a
tile of xᵀ g is summed over the rows and then added to the memory in VMEM, row by row.

On GPU every program gathers its tiles from memory by index arrays; the memory's gradient is plain JAX there: a scan over
slabs of the weight's rows, as both passes are in plain JAX.

Shape letters: m rows of x, k inner, n outer, M length of the memory.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, ArrayLike, Float

from jaxpeft.kernels.blocks import gpu_load, gpu_store, zero_beyond
from jaxpeft.kernels.platforms import (
    LANES,
    VMEM_BYTES,
    Backend,
    KernelError,
    check_block,
    check_vmem,
    cut,
    dot,
    gpu_params,
    on_platform,
    out_like,
    power_of_two,
    same_variance,
    sublanes,
    tpu_params,
    wide,
)
from jaxpeft.kernels.random_fold import Fold, as_seed, sign_key

__all__ = ["HashedBlocks", "hashed_matmul", "reference"]

SLAB = 2**18  # elements of the weight that plain JAX forms at a time
ROWS = 8  # of a tile, copied in one turn of a loop
MAX_CHUNKS = 2**16  # rotations that are read ahead on TPU, 4 bytes each of a memory of 1 MiB


@dataclass(frozen=True)
class HashedBlocks:
    """Lengths of a block of x's rows, and of the weight's rows and columns."""

    m: int
    k: int
    n: int

    @classmethod
    def for_tpu(cls, m: int, fold: Fold, dtype: Any, across: bool, vmem_bytes: int = VMEM_BYTES) -> "HashedBlocks":
        """The blocks that read x least often within `vmem_bytes`."""
        check_tpu(fold)
        k, n = fold.shape
        rows = {cut(m, want, sublanes(dtype)) for want in (128, 256, 512)}
        inner, outer = _parts(k), _parts(n)
        if not inner:
            raise KernelError(f"a weight of {k} rows: a multiple of {LANES}, or at most 2,048, so that tiles fit")
        choices = [cls(i, j, o) for i in rows for j in inner for o in outer]
        fitting = [c for c in choices if c.vmem(fold, dtype, across) <= 3 * vmem_bytes // 4]
        if not fitting:
            raise KernelError(
                f"a memory of {fold.size} and tiles of a weight {fold.shape} do not fit {vmem_bytes} bytes of VMEM: "
                "allow more, or backend='xla'"
            )
        columns = lambda c: c.k if across else c.n
        return min(fitting, key=lambda c: (-columns(c), -c.m, -c.k * c.n))

    @classmethod
    def for_gpu(cls, m: int, fold: Fold) -> "HashedBlocks":
        return cls(power_of_two(m, 16, 128), power_of_two(fold.shape[0], 16, 32), power_of_two(fold.shape[1], 16, 128))

    def check_tpu(self, m: int, fold: Fold, dtype: Any, across: bool, vmem_bytes: int) -> None:
        """Raises KernelError for blocks that Mosaic would refuse."""
        check_tpu(fold)
        check_block("m", self.m, m, sublanes(dtype))
        for name, block, size in (("k", self.k, fold.shape[0]), ("n", self.n, fold.shape[1])):
            if size % block or (block != size and block % LANES):
                raise KernelError(
                    f"block {name} of {block}: a divisor of {size} that is a multiple of {LANES}, or {size}"
                )
        check_vmem(self, self.vmem(fold, dtype, across), vmem_bytes)

    def vmem(self, fold: Fold, dtype: Any, across: bool) -> int:
        """Bytes of VMEM: the memory, a tile as it is made, the kept tiles, blocks of x and y twice, the sums."""
        size, sums = jnp.dtype(dtype).itemsize, wide(dtype).itemsize
        (inner, outer, whole) = (self.n, self.k, fold.shape[1]) if across else (self.k, self.n, fold.shape[0])
        return sums * (fold.size + self.k * self.n + 2 * self.m * outer) + size * (
            whole * outer + 2 * self.m * (inner + outer)
        )


def _parts(size: int) -> list[int]:
    """Divisors of a weight's side that may be a tile's."""
    parts = [p for p in range(LANES, min(size, 1024) + 1, LANES) if not size % p]
    return parts or ([size] if size <= 2048 else [])


def check_tpu(fold: Fold) -> None:
    """Raises KernelError for a weight that the TPU kernel cannot read by rows of 128."""
    if fold.unit % LANES:
        raise KernelError(
            f"a weight {fold.shape} at offset {fold.offset}, align {fold.align}: columns, offset and align are "
            f"multiples of {LANES} on TPU; pad the columns, or backend='xla'"
        )
    if fold.chunks > MAX_CHUNKS:
        raise KernelError(f"a weight {fold.shape} from {fold.size} elements: over {MAX_CHUNKS} times the memory")


def hashed_matmul(
    x: Float[Array, "*b k"],
    memory: Float[Array, "M"],
    seed: ArrayLike,
    shape: tuple[int, int],
    *,
    offset: int = 0,
    scale: ArrayLike = 1.0,
    align: int = 128,
    backend: Backend = "auto",
    blocks: HashedBlocks | None = None,
    precision: Any = None,
    vmem_bytes: int = VMEM_BYTES,
) -> Float[Array, "*b n"]:
    """`x materialise(memory, seed, shape)` without forming the weight; see the module.

    Args:
      x: inputs with any leading axes.
      memory: what is learned. Its gradient is summed in float32 (float64 for float64).
      seed: of rotations and signs: a number of 32 bits, or an integer array without axes, which may be traced.
      shape: (k, n) of the weight; static.
      offset: of the weight's first element in the flat model; static.
      scale: lambda, which multiplies the weight; may be traced.
      align: rotations are multiples of it; divides M. The TPU kernel needs multiples of 128; 1 is the paper's mapping.
      backend: "auto", "xla", "tpu" or "gpu"; see the package. "auto" is plain JAX on TPU too where the kernel cannot
        run: a memory over VMEM (about 2 Mi elements with the default), or n, offset or align not in multiples of 128.
      blocks: block sizes; chosen from the shapes where None.
      precision: of the products, as `jax.lax.dot` takes it.
      vmem_bytes: what the TPU kernel may use of VMEM.

    Returns:
      The product in x's dtype, of the scaled memory in x's dtype; sums are kept in float32 (float64 for float64).

    Raises:
      KernelError: shapes that do not fit, a memory that is no multiple of `align`, 2³⁰ elements or more, a seed that is no
        number of 32 bits; with backend "tpu" what that kernel cannot run.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxpeft.kernels.random_fold import materialise
      >>> x, memory = jnp.ones((2, 3)), jnp.arange(4.0)
      >>> w = materialise(memory, 7, (3, 4), align=1)
      >>> bool(jnp.array_equal(hashed_matmul(x, memory, 7, (3, 4), align=1), x @ w))
      True
    """
    if memory.ndim != 1 or x.ndim < 1 or len(shape) != 2 or x.shape[-1] != shape[0]:
        raise KernelError(f"x {x.shape}, memory {memory.shape}, weight {shape}: expected (..., k), (M,), (k, n)")
    if not jnp.issubdtype(x.dtype, jnp.floating) or not jnp.issubdtype(memory.dtype, jnp.floating):
        raise KernelError(f"x of {x.dtype}, memory of {memory.dtype}: expected floating-point types")
    fold = Fold(memory.size, (shape[0], shape[1]), offset, align)
    lead, rows = x.shape[:-1], x.reshape(-1, shape[0])
    if not rows.size:
        return jnp.zeros((*lead, shape[1]), x.dtype)
    kept = wide(x.dtype)
    scaled = memory.astype(kept) * jnp.asarray(scale, kept)
    plan = _Plan(fold, backend, blocks, precision, vmem_bytes)
    y: Any = _hashed_matmul(plan, *same_variance(rows, scaled, as_seed(seed)))
    return y.reshape(*lead, shape[1])


def reference(
    x: Float[Array, "m k"], memory: Float[Array, "M"], seed: Array, fold: Fold, *, across: bool, precision: Any = None
) -> Float[Array, "m n"]:
    """`x W`, across `x Wᵀ`, in plain JAX, slab after slab of W's rows."""
    memory = memory.astype(x.dtype)
    k, n = fold.shape
    count = _slab_rows(fold)
    if count == k:
        return dot(x, fold.rows(memory, seed, 0, k), (1, 1 if across else 0), precision).astype(x.dtype)

    def into(dx: Array, slab: Array) -> tuple[Array, None]:
        row, w = _slab(memory, seed, fold, slab)
        return lax.dynamic_update_slice_in_dim(dx, dot(x, w, (1, 1), precision).astype(x.dtype), row, 1), None

    def add(y: Array, slab: Array) -> tuple[Array, None]:
        row, w = _slab(memory, seed, fold, slab)
        new = row + jnp.arange(count) >= slab * count
        mine = jnp.where(new, lax.dynamic_slice_in_dim(x, row, count, 1), jnp.zeros((), x.dtype))
        return y + dot(mine, w, precision=precision), None

    zeros = lambda width, dtype: jnp.zeros_like(x, dtype, shape=(x.shape[0], width))
    slabs = jnp.arange(pl.cdiv(k, count), dtype=jnp.int32)
    if across:
        return lax.scan(into, zeros(k, x.dtype), slabs)[0]
    return lax.scan(add, zeros(n, wide(x.dtype)), slabs)[0].astype(x.dtype)


def reference_memory(
    x: Float[Array, "m k"], g: Float[Array, "m n"], seed: Array, fold: Fold, *, precision: Any = None
) -> Float[Array, "M"]:
    """`xᵀ g` summed into the memory's places, in plain JAX, slab after slab."""
    k, count = fold.shape[0], _slab_rows(fold)

    def add(sums: Array, slab: Array) -> tuple[Array, None]:
        row = jnp.minimum(slab * count, k - count)
        new = row + jnp.arange(count) >= slab * count
        mine = jnp.where(new, lax.dynamic_slice_in_dim(x, row, count, 1), jnp.zeros((), x.dtype))
        return sums + fold.gather_back(dot(mine, g, (0, 0), precision), seed, row), None

    zeros = jnp.zeros_like(x, wide(x.dtype), shape=(fold.size,))
    return lax.scan(add, zeros, jnp.arange(pl.cdiv(k, count), dtype=jnp.int32))[0]


def _slab_rows(fold: Fold) -> int:
    return min(fold.shape[0], max(1, SLAB // fold.shape[1]))


def _slab(memory: Array, seed: Array, fold: Fold, slab: Array) -> tuple[Array, Array]:
    """The first row of a slab and its rows; the last slab begins early enough to be whole."""
    count = _slab_rows(fold)
    row = jnp.minimum(slab * count, fold.shape[0] - count)
    return row, fold.rows(memory, seed, row, count)


# --------------------------------------------------------------------------------------------------- differentiation


@dataclass(frozen=True)
class _Plan:
    """What is static in a call."""

    fold: Fold
    backend: Backend
    blocks: HashedBlocks | None
    precision: Any
    vmem_bytes: int

    def tpu_blocks(self, m: int, dtype: Any, across: bool) -> HashedBlocks:
        blocks = self.blocks or HashedBlocks.for_tpu(m, self.fold, dtype, across, self.vmem_bytes)
        blocks.check_tpu(m, self.fold, dtype, across, self.vmem_bytes)
        return blocks

    def falls_back(self, platform: str, m: int, dtype: Any, across: bool) -> bool:
        """Whether "auto" runs plain JAX although there is a kernel for the platform."""
        if platform != "tpu" or self.backend != "auto" or self.blocks is not None:
            return False
        try:
            self.tpu_blocks(m, dtype, across)
        except KernelError:
            return True
        return False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hashed_matmul(plan: _Plan, x: Array, memory: Array, seed: Array) -> Array:
    return _product(plan, x, memory, seed, across=False)


def _forward(plan: _Plan, x: Any, memory: Any, seed: Any) -> tuple[Array, Any]:
    # A pytree without leaves says which gradients are wanted: a bool would become an array.
    wanted = tuple(() if p.perturbed else None for p in (x, memory))
    y = _product(plan, x.value, memory.value, seed.value, across=False)
    return y, (x.value, memory.value, seed.value, wanted)


def _backward(plan: _Plan, saved: Any, g: Any) -> tuple[Any, ...]:
    x, memory, seed, (want_x, want_memory) = saved
    if isinstance(g, SymbolicZero):
        return None, None, None
    dx = None if want_x is None else _product(plan, g, memory, seed, across=True)
    dmemory = None if want_memory is None else _memory_gradient(plan, x, g, seed)
    return dx, dmemory, None


_hashed_matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def _product(plan: _Plan, x: Array, memory: Array, seed: Array, *, across: bool) -> Array:
    def xla(x: Array, memory: Array, seed: Array) -> Array:
        return reference(x, memory, seed, plan.fold, across=across, precision=plan.precision)

    def kernel(x: Array, memory: Array, seed: Array, *, platform: str, interpret: bool) -> Array:
        if plan.falls_back(platform, x.shape[0], x.dtype, across):
            return xla(x, memory, seed)
        run = _on_tpu if platform == "tpu" else _on_gpu
        return run(plan, x, memory, seed, across=across, interpret=interpret)

    return on_platform(plan.backend, xla, kernel, x, memory, seed)


def _memory_gradient(plan: _Plan, x: Array, g: Array, seed: Array) -> Array:
    def xla(x: Array, g: Array, seed: Array) -> Array:
        return reference_memory(x, g, seed, plan.fold, precision=plan.precision)

    def kernel(x: Array, g: Array, seed: Array, *, platform: str, interpret: bool) -> Array:
        if platform == "gpu" or plan.falls_back(platform, x.shape[0], x.dtype, False):
            return xla(x, g, seed)
        return _memory_on_tpu(plan, x, g, seed, interpret=interpret)

    return on_platform(plan.backend, xla, kernel, x, g, seed)


def _cost(m: int, fold: Fold, dtype: Any, reads: int) -> pl.CostEstimate:
    k, n = fold.shape
    return pl.CostEstimate(
        flops=2 * m * k * n,
        transcendentals=0,
        bytes_accessed=jnp.dtype(dtype).itemsize * m * (reads * k + n) + wide(dtype).itemsize * fold.size,
    )


# ------------------------------------------------------------------------------------------------------------ the TPU


def _ahead(plan: _Plan, seed: Array) -> tuple[Array, Array]:
    """What is read ahead: every chunk's rotation in rows of 128, and the key of the signs."""
    turns = plan.fold.rotation(seed, jnp.arange(plan.fold.chunks, dtype=jnp.int32))
    return lax.div(turns, jnp.full(turns.shape, LANES, jnp.int32)), sign_key(seed).astype(jnp.int32).reshape(1)


def _on_tpu(plan: _Plan, x: Array, memory: Array, seed: Array, *, across: bool, interpret: bool) -> Array:
    m, (k, n) = x.shape[0], plan.fold.shape
    blocks = plan.tpu_blocks(m, x.dtype, across)
    (inner, outer, length, width) = (blocks.n, blocks.k, n, k) if across else (blocks.k, blocks.n, k, n)
    grid = (width // outer, pl.cdiv(m, blocks.m), length // inner)
    whole = (plan.fold.size // LANES, LANES)
    return pl.pallas_call(
        functools.partial(_tpu_kernel, plan=plan, blocks=blocks, across=across),
        out_shape=out_like((m, width), x.dtype, x),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[
                pl.BlockSpec((blocks.m, inner), lambda j, i, l, *_: (i, l)),
                pl.BlockSpec(whole, lambda *_: (0, 0), pipeline_mode=pl.Buffered(1)),
            ],
            out_specs=pl.BlockSpec((blocks.m, outer), lambda j, i, l, *_: (i, j)),
            scratch_shapes=[
                pltpu.VMEM((blocks.n // LANES, blocks.k, LANES), wide(x.dtype)),
                pltpu.VMEM((grid[2], blocks.k, blocks.n), x.dtype),
                pltpu.VMEM((blocks.m, outer), wide(x.dtype)),
            ],
        ),
        compiler_params=tpu_params("parallel", "arbitrary", "arbitrary", vmem_bytes=max(plan.vmem_bytes, VMEM_BYTES)),
        cost_estimate=_cost(m, plan.fold, x.dtype, grid[0]),
        interpret=interpret,
        name="hashed_matmul_across" if across else "hashed_matmul",
    )(*_ahead(plan, seed), x, memory.reshape(whole))


def _tpu_kernel(
    turns_ref: Any,  # (chunks,) in rows of 128
    key_ref: Any,  # (1,)
    x_ref: Any,  # (bm, bk), across (bm, bn)
    memory_ref: Any,  # (M / 128, 128)
    y_ref: Any,  # (bm, bn), across (bm, bk)
    tile_ref: Any,  # (bn / 128, bk, 128), of which single rows may be written
    kept_ref: Any,  # (steps, bk, bn)
    y_sum: Any,  # as y
    *,
    plan: _Plan,
    blocks: HashedBlocks,
    across: bool,
) -> None:
    j, i, l = (pl.program_id(axis) for axis in range(3))
    row, column = (j, l) if across else (l, j)

    @pl.when(i == 0)
    def _():
        at = (row * blocks.k, column * blocks.n)

        def copy(i: Any, g: int, place: Any) -> None:
            tile_ref[g, pl.ds(i, 1), :] = memory_ref[pl.ds(place, 1), :]

        _for_pieces(plan.fold, turns_ref, at, blocks, copy)
        for g, columns in _groups(blocks):
            kept_ref[l, :, columns] = _signed(plan.fold, key_ref, at, g, tile_ref[g]).astype(kept_ref.dtype)

    @pl.when(l == 0)
    def _():
        y_sum[...] = jnp.zeros_like(y_sum)

    y_sum[...] += dot(x_ref[...], kept_ref[l], (1, 1 if across else 0), plan.precision)

    @pl.when(l == pl.num_programs(2) - 1)
    def _():
        y_ref[...] = y_sum[...].astype(y_ref.dtype)


def _memory_on_tpu(plan: _Plan, x: Array, g: Array, seed: Array, *, interpret: bool) -> Array:
    m, (k, n) = x.shape[0], plan.fold.shape
    blocks = plan.tpu_blocks(m, x.dtype, False)
    whole = (plan.fold.size // LANES, LANES)
    grid = (k // blocks.k, n // blocks.n, pl.cdiv(m, blocks.m))
    return pl.pallas_call(
        functools.partial(_tpu_memory_kernel, plan=plan, m=m, blocks=blocks),
        out_shape=out_like(whole, wide(x.dtype), x),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[
                pl.BlockSpec((blocks.m, blocks.k), lambda i, j, l, *_: (l, i)),
                pl.BlockSpec((blocks.m, blocks.n), lambda i, j, l, *_: (l, j)),
            ],
            out_specs=pl.BlockSpec(whole, lambda *_: (0, 0), pipeline_mode=pl.Buffered(1)),
            scratch_shapes=[pltpu.VMEM((blocks.n // LANES, blocks.k, LANES), wide(x.dtype))],
        ),
        # Every tile adds to the one memory.
        compiler_params=tpu_params("arbitrary", "arbitrary", "arbitrary", vmem_bytes=max(plan.vmem_bytes, VMEM_BYTES)),
        cost_estimate=_cost(m, plan.fold, x.dtype, grid[1]),
        interpret=interpret,
        name="hashed_matmul_memory",
    )(*_ahead(plan, seed), x, g).reshape(-1)


def _tpu_memory_kernel(
    turns_ref: Any,  # (chunks,) in rows of 128
    key_ref: Any,  # (1,)
    x_ref: Any,  # (bm, bk)
    g_ref: Any,  # (bm, bn)
    memory_ref: Any,  # (M / 128, 128), the gradient
    tile_ref: Any,  # (bn / 128, bk, 128), of which single rows may be written
    *,
    plan: _Plan,
    m: int,
    blocks: HashedBlocks,
) -> None:
    i, j, l = (pl.program_id(axis) for axis in range(3))

    @pl.when((i == 0) & (j == 0) & (l == 0))
    def _():
        memory_ref[...] = jnp.zeros_like(memory_ref)

    @pl.when(l == 0)
    def _():
        tile_ref[...] = jnp.zeros_like(tile_ref)

    inside = zero_beyond(m, blocks.m, l)
    product = dot(inside(x_ref[...], 0), inside(g_ref[...], 0), (0, 0), plan.precision)
    for g, columns in _groups(blocks):
        tile_ref[g] += product[:, columns]

    @pl.when(l == pl.num_programs(2) - 1)
    def _():
        at = (i * blocks.k, j * blocks.n)
        for g, _ in _groups(blocks):
            tile_ref[g] = _signed(plan.fold, key_ref, at, g, tile_ref[g])

        def add(i: Any, g: int, place: Any) -> None:
            memory_ref[pl.ds(place, 1), :] += tile_ref[g, pl.ds(i, 1), :]

        _for_pieces(plan.fold, turns_ref, at, blocks, add)


def _for_pieces(fold: Fold, turns_ref: Any, at: tuple[Any, Any], blocks: HashedBlocks, visit: Any) -> None:
    """`visit(row, group, place)` for every 128 columns of every row of the tile at (row, column) of the weight."""
    in_row, size = fold.shape[1] // LANES, fold.size // LANES
    number = lambda value: jnp.int32(value)
    first = at[0] * in_row + lax.div(at[1], number(LANES))
    rest = lax.rem(first, number(size)) + fold.phase // LANES
    chunk = lax.div(first, number(size))
    chunks_a_row, rest_a_row = divmod(in_row, size)

    def moved(chunk: Any, rest: Any, chunks: int, rests: int) -> tuple[Any, Any]:
        over = rest + rests >= size
        return jnp.where(over, chunk + (chunks + 1), chunk + chunks), jnp.where(over, rest + rests - size, rest + rests)

    # Several rows in a turn: finding the next place is a chain of scalar operations, which other rows' chains fill.
    together = next(n for n in (ROWS, 4, 2, 1) if not blocks.k % n)

    def some_rows(turn: Any, here: tuple[Any, Any]) -> tuple[Any, Any]:
        for row in range(together):
            piece = here
            for g in range(blocks.n // LANES):
                place = piece[1] + turns_ref[piece[0]]
                visit(turn * together + row, g, jnp.where(place >= size, place - size, place))
                piece = moved(*piece, *divmod(1, size))
            here = moved(*here, chunks_a_row, rest_a_row)
        return here

    lax.fori_loop(number(0), number(blocks.k // together), some_rows, moved(chunk, rest, 0, 0))


def _groups(blocks: HashedBlocks) -> list[tuple[int, slice]]:
    """The 128 columns of a tile after each other."""
    return [(g, slice(g * LANES, (g + 1) * LANES)) for g in range(blocks.n // LANES)]


def _signed(fold: Fold, key_ref: Any, at: tuple[Any, Any], group: int, tile: Array) -> Array:
    """128 columns of the tile at (row, column) of the weight, signed."""
    row = at[0] + lax.broadcasted_iota(jnp.int32, tile.shape, 0)
    element = row * fold.shape[1] + (at[1] + group * LANES + lax.broadcasted_iota(jnp.int32, tile.shape, 1))
    return jnp.where(fold.negative(key_ref[0].astype(jnp.uint32), element), -tile, tile)


# ------------------------------------------------------------------------------------------------------------ the GPU


def _on_gpu(plan: _Plan, x: Array, memory: Array, seed: Array, *, across: bool, interpret: bool) -> Array:
    m, (k, n) = x.shape[0], plan.fold.shape
    blocks = plan.blocks or HashedBlocks.for_gpu(m, plan.fold)
    width, outer = (k, power_of_two(k, 16, 128)) if across else (n, blocks.n)
    grid = (pl.cdiv(m, blocks.m), pl.cdiv(width, outer))
    return pl.pallas_call(
        functools.partial(_gpu_kernel, plan=plan, blocks=(blocks.m, blocks.k, outer), across=across),
        out_shape=out_like((m, width), x.dtype, x),
        grid=grid,
        compiler_params=gpu_params(),
        cost_estimate=_cost(m, plan.fold, x.dtype, grid[1]),
        interpret=interpret,
        name="hashed_matmul_across" if across else "hashed_matmul",
    )(seed.reshape(1), x, memory.astype(x.dtype))


def _gpu_kernel(
    seed_ref: Any,  # (1,)
    x_ref: Any,  # (m, k), across (m, n)
    memory_ref: Any,  # (M,)
    y_ref: Any,  # (m, n), across (m, k)
    *,
    plan: _Plan,
    blocks: tuple[int, int, int],
    across: bool,
) -> None:
    rows, inner, outer = blocks
    fold, length = plan.fold, x_ref.shape[1]
    i, j = (jnp.asarray(pl.program_id(axis), jnp.int32) for axis in range(2))
    seed = seed_ref[0]
    shape = (outer, inner) if across else (inner, outer)

    def step(l: Any, y_sum: Array) -> Array:
        start = jnp.asarray(l, jnp.int32) * inner
        x = gpu_load(x_ref, (i * rows, start), (rows, inner))
        at = (j * outer, start) if across else (start, j * outer)
        row, column = (a + lax.broadcasted_iota(jnp.int32, shape, axis) for axis, a in enumerate(at))
        element = row * fold.shape[1] + column
        inside = (row < fold.shape[0]) & (column < fold.shape[1])
        w = pltriton.load(memory_ref.at[fold.place(seed, element)], mask=inside, other=0.0)
        w = jnp.where(fold.negative(sign_key(seed), element), -w, w)
        return y_sum + dot(x, w, (1, 1 if across else 0), plan.precision)

    y = lax.fori_loop(0, pl.cdiv(length, inner), step, jnp.zeros((rows, outer), wide(x_ref.dtype)))
    gpu_store(y_ref, (i * rows, j * outer), y)
