"""`x w + scale[g] (x a[g]) b[g]`, each example of a batch with the factors of its own group g: many adapters at once.

    h = x a[g]        y = x w + s[g] h b[g]         s the scale
    t = e b[g]ᵀ       dx = e wᵀ + s[g] t a[g]ᵀ      e the gradient of y
    da[g] = Σ s[g] xᵀ t,  db[g] = Σ s[g] hᵀ e,  ds[g] = Σ h · t  over the examples of the group g

Nothing is sorted and no row is copied: the batch is a matrix of rows, cut into blocks whatever the examples' lengths are,
and a block knows which examples it touches. Groups may come in any order, some may be empty, and ranks may be padded with
zeros. The factors are read as they are, those of the batch's groups alone: the scale is multiplied into h. The backward
pass is the forward kernel with its weights read across; da and db are XLA's, one product an example, summed by group.

On TPU every example that a block of rows touches has a slot: the factors of all slots stand side by side, one product
makes the h of all rows with all slots, and what is not a row's own is zeroed. Slots times rank within the width of the
matrix unit cost what one slot costs. Which factors are fetched, a table says that is read ahead (scalar prefetch). On GPU
the examples of a block are visited one after another; every block of columns makes its own h, as in `low_rank_matmul`.

Shape letters: m = b t rows of b examples, k inner, n outer, r rank, G groups.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, ArrayLike, Float, Int

from jaxpeft.kernels.blocks import gpu_load, gpu_store, zero_beyond
from jaxpeft.kernels.grouped_blocks import GroupedBlocks, slots
from jaxpeft.kernels.low_rank_matmul import MAX_RANK
from jaxpeft.kernels.platforms import (
    VMEM_BYTES,
    Backend,
    KernelError,
    dot,
    gpu_params,
    on_platform,
    out_like,
    power_of_two,
    same_variance,
    tpu_params,
    wide,
)

__all__ = ["GroupedBlocks", "grouped_low_rank", "reference"]


def grouped_low_rank(
    x: Float[Array, "b *t k"],
    w: Float[Array, "k n"],
    a: Float[Array, "G k r"],
    b: Float[Array, "G r n"],
    group: Int[Array, "b"],
    scale: ArrayLike = 1.0,
    *,
    backend: Backend = "auto",
    blocks: GroupedBlocks | None = None,
    precision: Any = None,
    vmem_bytes: int = VMEM_BYTES,
) -> Float[Array, "b *t n"]:
    """`x w + scale[g] (x a[g]) b[g]` with g = group[i] for example i; see the module.

    Args:
      x: (b, k) or (b, t, k): b examples, in decoding of one row each.
      w: the weight; it gets a gradient only where it is differentiated.
      a, b: the factors of G groups, of rank 1 to 256 (smaller ones padded with zeros), best kept in x's dtype: others are
        converted, all groups of them. Numbers that are not finite reach the examples of their own group only.
      group: the group of each example, in any order, taken as int32. An id outside 0..G-1 has no factors: its example
        gets the base product alone, and no factor a gradient from it.
      scale: a scalar or (G,); may be traced. It is multiplied into x a in float32.
      backend: "auto", "xla", "tpu" or "gpu"; see the package. "auto" is plain JAX on TPU too where no blocks fit.
      blocks: block sizes; chosen from the shapes where None.
      precision: of the products, as `jax.lax.dot` takes it.
      vmem_bytes: what the TPU kernel may use of VMEM.

    Returns:
      The product in x's dtype; sums are kept in float32 (float64 for float64).

    Raises:
      KernelError: shapes that do not fit, no groups, ids that are not integers, a rank outside 1..256, blocks that the
        platform refuses; with backend "tpu" sizes for which there are none.

    Example:
      >>> import jax.numpy as jnp
      >>> a, b = jnp.ones((2, 4, 1)), jnp.stack([jnp.ones((1, 3)), 2 * jnp.ones((1, 3))])
      >>> grouped_low_rank(jnp.ones((3, 4)), jnp.ones((4, 3)), a, b, jnp.array([1, -1, 0]))[:, 0]
      Array([12.,  4.,  8.], dtype=float32)
    """
    _check(x, w, a, b, group, scale)
    n, groups = w.shape[1], a.shape[0]
    if not x.size:
        return jnp.zeros((*x.shape[:-1], n), x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    own = group.astype(jnp.int32)
    own = jnp.where((own >= 0) & (own < groups), own, -1)
    gain = jnp.broadcast_to(jnp.asarray(scale, wide(x.dtype)), (groups,))[jnp.maximum(own, 0)]
    plan = _Plan(rows.shape[0] // x.shape[0], backend, blocks, precision, vmem_bytes)
    operands = same_variance(*(z.astype(x.dtype) for z in (rows, w, a, b)), gain, own)
    y: Any = _grouped_low_rank(plan, *operands)
    return y.reshape(*x.shape[:-1], n)


def _check(x: Array, w: Array, a: Array, b: Array, group: Array, scale: Any) -> None:
    shapes = f"x {x.shape}, w {w.shape}, a {a.shape}, b {b.shape}, group {group.shape}, scale {jnp.shape(scale)}"
    wanted = "expected (b, [t,] k), (k, n), (G, k, r), (G, r, n), (b,), () or (G,)"
    if x.ndim not in (2, 3) or (w.ndim, a.ndim, b.ndim, group.ndim) != (2, 3, 3, 1):
        raise KernelError(f"{shapes}: {wanted}")
    (k, n), (groups, _, r) = w.shape, a.shape
    fits = x.shape[-1] == k and a.shape == (groups, k, r) and b.shape == (groups, r, n) and group.shape == x.shape[:1]
    if not fits or jnp.shape(scale) not in ((), (groups,)):
        raise KernelError(f"{shapes}: {wanted}")
    if not groups:
        raise KernelError("no groups: there is at least one; for the base alone pass ids of -1")
    if not 1 <= r <= MAX_RANK:
        raise KernelError(f"rank {r}: the kernel takes 1 to {MAX_RANK}; multiply w + a b out for more")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise KernelError(f"x of {x.dtype}: expected a floating-point type")
    if not jnp.issubdtype(group.dtype, jnp.integer):
        raise KernelError(f"group of {group.dtype}: expected integers")


def reference(
    x: Float[Array, "m k"],
    w: Float[Array, "k n"],
    a: Float[Array, "G k r"],
    b: Float[Array, "G r n"],
    gain: Float[Array, "b"],
    own: Int[Array, "b"],
    *,
    across: bool = False,
    precision: Any = None,
) -> tuple[Float[Array, "m n"], Float[Array, "m r"]]:
    """`(x w + gain h b[g], h)` with h = x a[g], in plain JAX; across, x is (m, n) and w, b and a are read across.

    An example's factors are gathered, which moves what its product needs anyway where it has as many rows as the rank,
    or where few examples share a group. (`jax.lax.ragged_dot` over sorted rows serves less: XLA makes G dense products of
    it on a CPU.)
    """
    into, out, axis = (b, a, 2) if across else (a, b, 1)
    h = low_rows(x, into, own, axis, precision)
    low = low_rows(by_example(h, gain).astype(x.dtype), out, own, axis, precision)
    return (dot(x, w, (1, axis - 1), precision) + low).astype(x.dtype), h.astype(x.dtype)


def low_rows(
    x: Float[Array, "m i"], factor: Float[Array, "G _ _"], own: Int[Array, "b"], axis: int, precision: Any
) -> Float[Array, "m o"]:
    """Each example's rows times its group's factor over this axis of it, as summed; zero for one without a group."""
    examples = x.reshape(own.shape[0], -1, x.shape[1])
    formula = "bti,bio->bto" if axis == 1 else "bti,boi->bto"
    mine = factor[jnp.maximum(own, 0)]
    y = jnp.einsum(formula, examples, mine, precision=precision, preferred_element_type=wide(x.dtype))
    return jnp.where((own >= 0)[:, None, None], y, jnp.zeros((), y.dtype)).reshape(x.shape[0], -1)


def by_example(h: Float[Array, "m r"], gain: Float[Array, "b"]) -> Float[Array, "m r"]:
    """Each example's rows times its gain, multiplied wide."""
    examples = h.reshape(gain.shape[0], -1, h.shape[1])
    return (examples.astype(gain.dtype) * gain[:, None, None]).reshape(h.shape).astype(h.dtype)


# --------------------------------------------------------------------------------------------------- differentiation


@dataclass(frozen=True)
class _Plan:
    """What is static in a call."""

    t: int
    backend: Backend
    blocks: GroupedBlocks | None
    precision: Any
    vmem_bytes: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_low_rank(plan: _Plan, x: Array, w: Array, a: Array, b: Array, gain: Array, own: Array) -> Array:
    return _product(plan, x, w, a, b, gain, own, across=False, with_h=False)[0]


def _forward(plan: _Plan, x: Any, w: Any, a: Any, b: Any, gain: Any, own: Any) -> tuple[Array, Any]:
    operands = (x.value, w.value, a.value, b.value, gain.value, own.value)
    y, h = _product(plan, *operands, across=False, with_h=True)
    # A pytree without leaves says which gradients are wanted: a bool would become an array.
    wanted = tuple(() if p.perturbed else None for p in (x, w))
    return y, (*operands, h, wanted)


def _backward(plan: _Plan, saved: Any, g: Any) -> tuple[Any, ...]:
    x, w, a, b, gain, own, h, (want_x, want_w) = saved
    if isinstance(g, SymbolicZero):
        return (None,) * 6
    if want_x is None:
        dx, t = None, low_rows(g, b, own, 2, plan.precision).astype(g.dtype)
    else:
        dx, t = _product(plan, g, w, a, b, gain, own, across=True, with_h=True)
    da = _by_group(plan, x, by_example(t, gain), own, a)
    db = _by_group(plan, by_example(h, gain), g, own, b)
    dgain = (h.astype(gain.dtype) * t.astype(gain.dtype)).reshape(gain.shape[0], -1).sum(1)
    dw = None if want_w is None else dot(x, g, (0, 0), plan.precision).astype(w.dtype)
    return dx, dw, da, db, dgain, None


_grouped_low_rank.defvjp(_forward, _backward, symbolic_zeros=True)


def _by_group(plan: _Plan, x: Array, y: Array, own: Array, like: Array) -> Array:
    """`Σ xᵀ y` over the examples of each group; one such product an example is made on the way."""
    x, y = (z.reshape(own.shape[0], -1, z.shape[1]) for z in (x, y))
    each = jnp.einsum("bti,btj->bij", x, y, precision=plan.precision, preferred_element_type=wide(x.dtype))
    groups = like.shape[0]
    return jax.ops.segment_sum(each, jnp.where(own < 0, groups, own), groups).astype(like.dtype)


def _product(
    plan: _Plan, x: Array, w: Array, a: Array, b: Array, gain: Array, own: Array, *, across: bool, with_h: bool
) -> Any:
    """`(y, h)`, or with `across` `(dx, t)`, h and t before the gain; None where they are not wanted."""

    def xla(*operands: Array) -> tuple[Array, Array | None]:
        y, h = reference(*operands, across=across, precision=plan.precision)
        return y, h if with_h else None

    def kernel(*operands: Array, platform: str, interpret: bool) -> Any:
        if platform == "tpu" and plan.backend == "auto" and not _fits_tpu(plan, across, *operands):
            return xla(*operands)
        run = _on_tpu if platform == "tpu" else _on_gpu
        y, *h = run(plan, *operands, across=across, with_h=with_h, interpret=interpret)
        return y, h[0] if with_h else None

    return on_platform(plan.backend, xla, kernel, x, w, a, b, gain, own)


def _sizes(x: Array, w: Array, a: Array, across: bool) -> tuple[int, int, int, int]:
    """(m, inner, outer, r) of the product at hand: across, the contracted axis is w's second."""
    k, n = w.shape
    return (x.shape[0], n, k, a.shape[2]) if across else (x.shape[0], k, n, a.shape[2])


def _fits_tpu(plan: _Plan, across: bool, x: Array, w: Array, a: Array, *_: Array) -> bool:
    if plan.blocks is not None:
        return True
    m, k, n, r = _sizes(x, w, a, across)
    try:
        GroupedBlocks.for_tpu(m, k, n, r, plan.t, x.dtype, plan.vmem_bytes)
    except KernelError:
        return False
    return True


def _cost(m: int, k: int, n: int, r: int, t: int, blocks: GroupedBlocks, dtype: Any) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=2 * m * (k * n + k * r + r * n),
        transcendentals=0,
        bytes_accessed=blocks.traffic(m, k, n, r, t, dtype),
    )


# ------------------------------------------------------------------------------------------------------------ the TPU


def _table(gain: Array, own: Array, m: int, block: int, t: int) -> tuple[Array, Array, Array]:
    """For each block of rows and slot, flat: the group to fetch, the row of the block where its example begins, its gain.

    The beginning may be negative. A slot without factors, or whose example belongs to the slot before, begins behind
    every row.
    """
    begins = np.arange(pl.cdiv(m, block))[:, None] * block
    last = (np.minimum(begins + block, m) - 1) // t
    wanted = begins // t + np.arange(slots(m, block, t))
    example = np.minimum(wanted, last)
    ids = own[example.reshape(-1)]
    starts = np.where(wanted <= last, example * t - begins, block).reshape(-1)
    starts = jnp.where(ids >= 0, jnp.asarray(starts, jnp.int32), jnp.int32(block))
    return jnp.maximum(ids, 0), starts, gain[example.reshape(-1)]


def _on_tpu(
    plan: _Plan,
    x: Array,
    w: Array,
    a: Array,
    b: Array,
    gain: Array,
    own: Array,
    *,
    across: bool,
    with_h: bool,
    interpret: bool,
) -> Any:
    m, k, n, r = _sizes(x, w, a, across)
    blocks = plan.blocks or GroupedBlocks.for_tpu(m, k, n, r, plan.t, x.dtype, plan.vmem_bytes)
    blocks.check_tpu(m, k, n, r, plan.t, x.dtype, plan.vmem_bytes)
    count = slots(m, blocks.m, plan.t)
    # The TPU's compilers keep a matrix of few columns transposed: this moves nothing there.
    down = a.swapaxes(1, 2)
    into, out = (b, down) if across else (down, b)
    grid = (pl.cdiv(m, blocks.m), pl.cdiv(n, blocks.n), pl.cdiv(k, blocks.k))
    last = grid[2] - 1
    many = last > 0
    # The factor that makes h is needed for the first columns only; afterwards its block stays where it is.
    held = lambda j, l: jnp.where(j == 0, l, last)
    fetch_into = lambda s: pl.BlockSpec((1, r, blocks.k), lambda i, j, l, ids, *_: (ids[i * count + s], 0, held(j, l)))
    fetch_out = lambda s: pl.BlockSpec((1, r, blocks.n), lambda i, j, l, ids, *_: (ids[i * count + s], 0, j))
    if across:
        weight = pl.BlockSpec((blocks.n, blocks.k), lambda i, j, l, *_: (j, l))
    else:
        weight = pl.BlockSpec((blocks.k, blocks.n), lambda i, j, l, *_: (l, j))
    shapes = [out_like((m, n), x.dtype, x), out_like((m, count * r), x.dtype, x)]
    specs = [
        pl.BlockSpec((blocks.m, blocks.n), lambda i, j, l, *_: (i, j)),
        pl.BlockSpec((blocks.m, count * r), lambda i, j, l, *_: (i, 0)),
    ]
    scratch = [pltpu.VMEM((blocks.m, count * r), wide(x.dtype))]
    scratch += [pltpu.VMEM((blocks.m, blocks.n), wide(x.dtype))] if many else []
    y, *h = pl.pallas_call(
        functools.partial(_tpu_kernel, plan=plan, k=k, count=count, blocks=blocks, across=across, with_h=with_h),
        out_shape=shapes if with_h else shapes[:1],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[
                pl.BlockSpec((blocks.m, blocks.k), lambda i, j, l, *_: (i, l)),
                weight,
                *map(fetch_into, range(count)),
                *map(fetch_out, range(count)),
            ],
            out_specs=specs if with_h else specs[:1],
            scratch_shapes=scratch,
        ),
        compiler_params=tpu_params("parallel", "arbitrary", "arbitrary", vmem_bytes=max(plan.vmem_bytes, VMEM_BYTES)),
        cost_estimate=_cost(m, k, n, r, plan.t, blocks, x.dtype),
        interpret=interpret,
        name="grouped_low_rank_across" if across else "grouped_low_rank",
    )(*_table(gain, own, m, blocks.m, plan.t), x, w, *[into] * count, *[out] * count)
    # Each row has one slot at most that is not zero.
    return y, *(z.reshape(m, count, r).sum(1) for z in h)


def _tpu_kernel(
    _: Any,
    starts_ref: Any,  # where the slots' examples begin
    gain_ref: Any,
    x_ref: Any,  # (bm, bk)
    w_ref: Any,  # (bk, bn), across (bn, bk)
    *rest: Any,  # slots times (1, r, bk), slots times (1, r, bn), y (bm, bn), [h (bm, slots r)], sum of h, [sum of y]
    plan: _Plan,
    k: int,
    count: int,
    blocks: GroupedBlocks,
    across: bool,
    with_h: bool,
) -> None:
    into_refs, out_refs, (y_ref, *others) = rest[:count], rest[count : 2 * count], rest[2 * count :]
    (h_ref,), (h_sum, *y_sum) = (others[:1], others[1:]) if with_h else ((None,), others)
    i, j, l = (pl.program_id(axis) for axis in range(3))
    first_columns = j == 0
    inside = zero_beyond(k, blocks.k, l)

    # Sums start at zero in a part of their own, so that adding to them shares its instructions with the products.
    if y_sum:

        @pl.when(l == 0)
        def _():
            y_sum[0][...] = jnp.zeros_like(y_sum[0])

    @pl.when(first_columns & (l == 0))
    def _():
        h_sum[...] = jnp.zeros_like(h_sum)

    @pl.when(first_columns)
    def _():
        h_sum[...] += dot(inside(x_ref[...], 1), inside(_stacked(into_refs), 1), (1, 1), plan.precision)

    product = dot(
        inside(x_ref[...], 1), inside(w_ref[...], 1 if across else 0), (1, 1 if across else 0), plan.precision
    )
    if y_sum:
        y_sum[0][...] += product

    def mine() -> Array:
        """Which columns of h belong to the slot of the row's own example."""
        begin = _by_slot(starts_ref, i * count, count, h_sum.shape[1])
        row = lax.broadcasted_iota(jnp.int32, h_sum.shape, 0)
        return (row >= begin) & (row < begin + plan.t)

    def finish() -> None:
        @pl.when(first_columns)
        def _():
            own, h, zero = mine(), h_sum[...], jnp.zeros((), h_sum.dtype)
            h_sum[...] = jnp.where(own, h * _by_slot(gain_ref, i * count, count, h.shape[1]), zero)
            if h_ref is not None:
                h_ref[...] = jnp.where(own, h, zero).astype(h_ref.dtype)

        y = y_sum[0][...] if y_sum else product
        out = _stacked(out_refs)
        # An infinite factor spoils its own examples, but zero times infinity would spoil those of the other slots.
        if count == 1:
            out = jnp.where(starts_ref[i] < blocks.m, out, jnp.zeros((), out.dtype))
        else:
            # Compared and chosen in 32 bits: Mosaic does not lay a comparison's result out for narrower numbers.
            full = out.astype(h_sum.dtype)
            zero, one = jnp.zeros((), full.dtype), jnp.ones((), full.dtype)
            finite = jnp.abs(full) < jnp.inf
            ones, broken = (z.astype(out.dtype) for z in (jnp.where(mine(), one, zero), jnp.where(finite, zero, one)))
            y = jnp.where(dot(ones, broken) > 0, jnp.nan, y)
            out = jnp.where(finite, full, zero).astype(out.dtype)
        y_ref[...] = (y + dot(h_sum[...].astype(out.dtype), out, (1, 0), plan.precision)).astype(y_ref.dtype)

    if y_sum:
        pl.when(l == pl.num_programs(2) - 1)(finish)
    else:
        finish()


def _stacked(refs: Any) -> Array:
    """The factors of all slots, (slots r, length)."""
    return refs[0][0] if len(refs) == 1 else jnp.concatenate([ref[0] for ref in refs], axis=0)


def _by_slot(ref: Any, base: Any, count: int, width: int) -> Array:
    """The slots' numbers, each over its columns of h: (1, slots r)."""
    column = lax.broadcasted_iota(jnp.int32, (1, width), 1)
    numbers = jnp.full((1, width), ref[base])
    for s in range(1, count):
        numbers = jnp.where(column >= s * (width // count), ref[base + s], numbers)
    return numbers


# ------------------------------------------------------------------------------------------------------------ the GPU


def _on_gpu(
    plan: _Plan,
    x: Array,
    w: Array,
    a: Array,
    b: Array,
    gain: Array,
    own: Array,
    *,
    across: bool,
    with_h: bool,
    interpret: bool,
) -> Any:
    m, k, n, r = _sizes(x, w, a, across)
    blocks = plan.blocks or GroupedBlocks.for_gpu(m, k, n, r)
    shapes = [out_like((m, n), x.dtype, x), out_like((m, r), x.dtype, x)]
    return pl.pallas_call(
        functools.partial(_gpu_kernel, plan=plan, sizes=(m, k, n, r), blocks=blocks, across=across),
        out_shape=shapes if with_h else shapes[:1],
        grid=(pl.cdiv(m, blocks.m), pl.cdiv(n, blocks.n)),
        compiler_params=gpu_params(),
        cost_estimate=_cost(m, k, n, r, plan.t, blocks, x.dtype),
        interpret=interpret,
        name="grouped_low_rank_across" if across else "grouped_low_rank",
    )(gain, own, x, w, *(z.reshape(-1, z.shape[2]) for z in ((b, a) if across else (a, b))))


def _gpu_kernel(
    gain_ref: Any,  # (b,)
    own_ref: Any,  # (b,)
    x_ref: Any,  # (m, k)
    w_ref: Any,  # (k, n), across (n, k)
    into_ref: Any,  # (G k, r), across (G r, k)
    out_ref: Any,  # (G r, n), across (G n, r)
    y_ref: Any,  # (m, n)
    *h_ref: Any,  # [(m, r)]
    plan: _Plan,
    sizes: tuple[int, int, int, int],
    blocks: GroupedBlocks,
    across: bool,
) -> None:
    m, k, n, r = sizes
    axis = 1 if across else 0  # of the weights, that is contracted
    rank = power_of_two(r, 16, MAX_RANK)
    i, j = pl.program_id(0), pl.program_id(1)
    row, column = jnp.asarray(i * blocks.m, jnp.int32), j * blocks.n
    steps = pl.cdiv(k, blocks.k)
    zeros = lambda *shape: jnp.zeros(shape, wide(x_ref.dtype))

    def part(l: Any) -> tuple[Any, Array]:
        start = jnp.asarray(l, jnp.int32) * blocks.k
        return start, gpu_load(x_ref, (row, start), (blocks.m, blocks.k))

    # What follows a group's factor belongs to the next group: ranks are loaded to a power of two, lengths to a block.
    def tall(ref: Any, group: Any, start: Any, length: int, size: int) -> Array:
        z = gpu_load(ref, (group * size + start, 0), (length, rank), anywhere=True)
        return jnp.where(start + lax.broadcasted_iota(jnp.int32, z.shape, 0) < size, z, jnp.zeros((), z.dtype))

    def flat(ref: Any, group: Any, start: Any, length: int, _: int) -> Array:
        z = gpu_load(ref, (group * r, start), (rank, length), anywhere=True)
        return jnp.where(lax.broadcasted_iota(jnp.int32, z.shape, 0) < r, z, jnp.zeros((), z.dtype))

    into_of, out_of = (flat, tall) if across else (tall, flat)

    def base(l: Any, y_sum: Array) -> Array:
        start, x = part(l)
        w = gpu_load(w_ref, (start, column), (blocks.k, blocks.n), swap=across)
        return y_sum + dot(x, w, (1, axis), plan.precision)

    def example(e: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        y_sum, h_all = sums
        e = jnp.asarray(e, jnp.int32)
        group = own_ref[e]
        real = jnp.maximum(group, 0)

        def add(l: Any, h_sum: Array) -> Array:
            start, x = part(l)
            return h_sum + dot(x, into_of(into_ref, real, start, blocks.k, k), (1, axis), plan.precision)

        h = lax.fori_loop(0, steps, add, zeros(blocks.m, rank))
        out = out_of(out_ref, real, column, blocks.n, n)
        low = dot((h * gain_ref[e]).astype(x_ref.dtype), out, (1, axis), plan.precision)

        def mine(z: Array) -> Array:
            at = row + lax.broadcasted_iota(jnp.int32, z.shape, 0)
            own = (at >= e * plan.t) & (at < (e + 1) * plan.t) & (group >= 0)
            return jnp.where(own, z, jnp.zeros((), z.dtype))

        return y_sum + mine(low), h_all + mine(h)

    y_sum = lax.fori_loop(0, steps, base, zeros(blocks.m, blocks.n))
    # All of one type: a Python number is 64 bits wide where JAX is told so.
    begin = lax.div(row, jnp.int32(plan.t))
    end = lax.div(jnp.minimum(row + blocks.m, m) - 1, jnp.int32(plan.t)) + 1
    y_sum, h = lax.fori_loop(begin, end, example, (y_sum, zeros(blocks.m, rank)))
    gpu_store(y_ref, (row, column), y_sum)
    if h_ref:

        @pl.when(j == 0)
        def _():
            gpu_store(h_ref[0], (row, 0), h)
