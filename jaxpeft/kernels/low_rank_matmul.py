"""`x w + scale (x a) b` in one pass over x and w: the product of a weight with a low-rank update (LoRA, Hu et al., 2022).

    h = drop(x) a                      y = x w + h b'                 b' = scale b / (1 - p)
    t = g b'ᵀ                          dx = g wᵀ + drop(t aᵀ)         da = drop(x)ᵀ t         db' = hᵀ g

The backward pass is the forward kernel with its weights read across: g takes x's place and (w, b', a) are contracted over
their outer axis. Neither pass forms a b, and w is read once in each. The tall thin products da and db' are XLA's; dw is
computed only where w itself is differentiated. drop zeroes elements with probability p by `jax.random.bernoulli(key)`'s
own bits, made again wherever they are needed.

On TPU the grid is (rows, columns, inner): h is summed while the first columns are made and kept in VMEM for the others.
On GPU every block of columns sums its own h beside its product.

Shape letters: m rows, k inner, n outer, r rank.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, ArrayLike, Float, Key, UInt32

from jaxpeft.kernels import random_bits
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
    gpu_product,
    gpu_product_params,
    gpu_tile,
    on_platform,
    out_like,
    power_of_two,
    same_variance,
    sublanes,
    tpu_params,
    wide,
)

__all__ = ["Blocks", "low_rank_matmul", "reference"]

MAX_RANK = 256


@dataclass(frozen=True)
class Blocks:
    """Lengths of a block of rows, inner and outer axis; `for_tpu` and `for_gpu` choose, `check_tpu` refuses."""

    m: int
    k: int
    n: int

    @classmethod
    def for_tpu(cls, m: int, k: int, n: int, r: int, dtype: Any, vmem_bytes: int = VMEM_BYTES) -> "Blocks":
        """The blocks that move the fewest bytes within `vmem_bytes`."""
        rows = {cut(m, want, sublanes(dtype)) for want in (256, 512, 1024, 2048)}
        inner = {cut(k, want, LANES) for want in (512, 1024, 2048, k)}
        outer = {cut(n, want, LANES) for want in (256, 512, 1024, 2048)}
        choices = [cls(i, j, o) for i in rows for j in inner for o in outer]
        # The compiler needs room of its own: values that do not fit its registers.
        fitting = [c for c in choices if c.vmem(r, dtype) <= 5 * vmem_bytes // 8]
        if not fitting:
            raise KernelError(f"no blocks for ({m}, {k}) x ({k}, {n}) at rank {r} fit {vmem_bytes} bytes of VMEM")
        return min(fitting, key=lambda c: (c.traffic(m, k, n, r, dtype), -c.m * c.k * c.n))

    @classmethod
    def for_gpu(cls, m: int, k: int, n: int, r: int) -> "Blocks":
        return cls(*gpu_product(m, k, n, r))

    def check_tpu(self, m: int, k: int, n: int, r: int, dtype: Any, vmem_bytes: int) -> None:
        """Raises KernelError for blocks that Mosaic would refuse."""
        check_block("m", self.m, m, sublanes(dtype))
        check_block("k", self.k, k, LANES)
        check_block("n", self.n, n, LANES)
        check_vmem(self, self.vmem(r, dtype), vmem_bytes)

    def vmem(self, r: int, dtype: Any) -> int:
        """Bytes of VMEM: each block twice, so that the next is fetched meanwhile, and the sums."""
        size, sums = jnp.dtype(dtype).itemsize, wide(dtype).itemsize
        rank = pl.cdiv(r, LANES) * LANES
        blocks = (
            self.m * self.k + self.k * self.n + self.k * rank + max(r, 16) * self.n + self.m * self.n + self.m * rank
        )
        return 2 * size * blocks + sums * (2 * self.m * self.n + self.m * rank)

    def traffic(self, m: int, k: int, n: int, r: int, dtype: Any) -> int:
        """Bytes moved to and from memory."""
        rows, inner, outer = pl.cdiv(m, self.m), pl.cdiv(k, self.k), pl.cdiv(n, self.n)
        x = m * k * (1 if inner == 1 else outer)
        w = k * n * (1 if inner == outer == 1 else rows)
        a = k * r * (1 if inner == 1 else rows)
        b = r * n * (1 if outer == 1 else rows)
        return (x + w + a + b + m * n) * jnp.dtype(dtype).itemsize


def low_rank_matmul(
    x: Float[Array, "*b k"],
    w: Float[Array, "k n"],
    a: Float[Array, "k r"],
    b: Float[Array, "r n"],
    scale: ArrayLike = 1.0,
    *,
    key: Key[Array, ""] | None = None,
    dropout: ArrayLike = 0.0,
    backend: Backend = "auto",
    blocks: Blocks | None = None,
    precision: Any = None,
    vmem_bytes: int = VMEM_BYTES,
) -> Float[Array, "*b n"]:
    """`x w + scale drop(x) a b`, without forming a b; see the module.

    Args:
      x: inputs with any leading axes.
      w: the weight; it gets a gradient only where it is differentiated.
      a, b: the factors, of rank 1 to 256; taken in x's dtype. The scale is multiplied into b in float32.
      scale: a scalar; may be traced.
      key: turns dropout on, of the input of the low-rank product alone.
      dropout: the probability of dropping an element of x there, in [0, 1); may be traced.
      backend: "auto", "xla", "tpu" or "gpu"; see the package.
      blocks: block sizes; chosen from the shapes where None.
      precision: of the products, as `jax.lax.dot` takes it.
      vmem_bytes: what the TPU kernel may use of VMEM.

    Returns:
      The product in x's dtype; sums are kept in float32 (float64 for float64).

    Raises:
      KernelError: shapes that do not fit, a rank outside 1..256, dropout outside [0, 1), 2³² or more inputs with dropout,
        blocks that the platform refuses.

    Example:
      >>> import jax.numpy as jnp
      >>> low_rank_matmul(jnp.ones((2, 4)), jnp.ones((4, 3)), jnp.ones((4, 1)), jnp.ones((1, 3)), 0.5)[0]
      Array([6., 6., 6.], dtype=float32)
    """
    _check(x, w, a, b, dropout, key)
    lead, (k, n) = x.shape[:-1], w.shape
    rows = x.reshape(-1, k)
    if not rows.size:
        return jnp.zeros((*lead, n), x.dtype)
    drops = key is not None and not (isinstance(dropout, int | float) and dropout == 0)
    drop, gain = jnp.zeros(3, jnp.uint32), 1.0
    if key is not None and drops:
        keep = 1.0 - jnp.asarray(dropout, wide(x.dtype))
        drop, gain = jnp.append(random_bits.words(key), random_bits.below(keep)), 1.0 / keep
    scaled = b.astype(wide(b.dtype)) * jnp.asarray(scale, wide(b.dtype)) * jnp.asarray(gain, wide(b.dtype))
    plan = _Plan(drops, backend, blocks, precision, vmem_bytes)
    operands = same_variance(rows, w.astype(x.dtype), a.astype(x.dtype), scaled.astype(x.dtype), drop.reshape(1, 3))
    y: Any = _low_rank_matmul(plan, *operands)
    return y.reshape(*lead, n)


def _check(x: Array, w: Array, a: Array, b: Array, dropout: Any, key: Any) -> None:
    if x.ndim < 1 or (w.ndim, a.ndim, b.ndim) != (2, 2, 2):
        raise KernelError(
            f"x {x.shape}, w {w.shape}, a {a.shape}, b {b.shape}: expected (..., k), (k, n), (k, r), (r, n)"
        )
    (k, n), r = w.shape, a.shape[1]
    if x.shape[-1] != k or a.shape[0] != k or b.shape != (r, n):
        raise KernelError(
            f"x {x.shape}, w {w.shape}, a {a.shape}, b {b.shape}: expected (..., k), (k, n), (k, r), (r, n)"
        )
    if not 1 <= r <= MAX_RANK:
        raise KernelError(f"rank {r}: the kernel takes 1 to {MAX_RANK}; multiply w + a b out for more")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise KernelError(f"x of {x.dtype}: expected a floating-point type")
    if not isinstance(dropout, Tracer) and not 0.0 <= float(dropout) < 1.0:
        raise KernelError(f"dropout {dropout}: expected a probability in [0, 1)")
    if key is not None and x.size >= 2**32:
        raise KernelError(f"a dropout key over {x.size} inputs: the kernel numbers them with 32 bits; split the batch")


def reference(
    x: Float[Array, "m k"],
    w: Float[Array, "k n"],
    a: Float[Array, "k r"],
    b: Float[Array, "r n"],
    *,
    keep: Any = None,
    precision: Any = None,
) -> tuple[Float[Array, "m n"], Float[Array, "m r"]]:
    """`(x w + h b, h)` with h = (x where keep) a, in plain JAX."""
    seen = x if keep is None else jnp.where(keep, x, jnp.zeros((), x.dtype))
    h = dot(seen, a, precision=precision).astype(x.dtype)
    return (dot(x, w, precision=precision) + dot(h, b, precision=precision)).astype(x.dtype), h


def reference_across(
    g: Float[Array, "m n"],
    w: Float[Array, "k n"],
    a: Float[Array, "k r"],
    b: Float[Array, "r n"],
    *,
    keep: Any = None,
    precision: Any = None,
) -> tuple[Float[Array, "m k"], Float[Array, "m r"]]:
    """`(g wᵀ + (t aᵀ where keep), t)` with t = g bᵀ: the input's gradient, in plain JAX."""
    t = dot(g, b, (1, 1), precision).astype(g.dtype)
    low = dot(t, a, (1, 1), precision)
    low = low if keep is None else jnp.where(keep, low, jnp.zeros((), low.dtype))
    return (dot(g, w, (1, 1), precision) + low).astype(g.dtype), t


# --------------------------------------------------------------------------------------------------- differentiation


@dataclass(frozen=True)
class _Plan:
    """What is static in a call."""

    drops: bool
    backend: Backend
    blocks: Blocks | None
    precision: Any
    vmem_bytes: int

    def keep(self, drop: UInt32[Array, "1 3"], m: int, k: int) -> Any:
        """Which inputs the low-rank product sees; None for all."""
        if not self.drops:
            return None
        index = lax.broadcasted_iota(jnp.uint32, (m, k), 0) * jnp.uint32(k) + lax.broadcasted_iota(
            jnp.uint32, (m, k), 1
        )
        return random_bits.kept(drop[0, 0], drop[0, 1], drop[0, 2], index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_rank_matmul(plan: _Plan, x: Array, w: Array, a: Array, b: Array, drop: Array) -> Array:
    return _product(plan, x, w, a, b, drop, across=False, with_h=False)[0]


def _forward(plan: _Plan, x: Any, w: Any, a: Any, b: Any, drop: Any) -> tuple[Array, Any]:
    y, h = _product(plan, x.value, w.value, a.value, b.value, drop.value, across=False, with_h=True)
    # A pytree without leaves says which gradients are wanted: a bool would become an array.
    wanted = tuple(() if p.perturbed else None for p in (x, w))
    return y, (x.value, w.value, a.value, b.value, drop.value, h, wanted)


def _backward(plan: _Plan, saved: Any, g: Any) -> tuple[Any, ...]:
    x, w, a, b, drop, h, (want_x, want_w) = saved
    if isinstance(g, SymbolicZero):
        return None, None, None, None, None
    if want_x is None:
        dx, t = None, dot(g, b, (1, 1), plan.precision).astype(g.dtype)
    else:
        dx, t = _product(plan, g, w, a, b, drop, across=True, with_h=True)
    keep = plan.keep(drop, *x.shape)
    seen = x if keep is None else jnp.where(keep, x, jnp.zeros((), x.dtype))
    da = dot(seen, t, (0, 0), plan.precision).astype(a.dtype)
    db = dot(h, g, (0, 0), plan.precision).astype(b.dtype)
    dw = None if want_w is None else dot(x, g, (0, 0), plan.precision).astype(w.dtype)
    return dx, dw, da, db, None


_low_rank_matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def _product(plan: _Plan, x: Array, w: Array, a: Array, b: Array, drop: Array, *, across: bool, with_h: bool) -> Any:
    """`(y, h)`, or with `across` `(dx, t)`; h is None where the kernel runs and it is not wanted."""

    def xla(x: Array, w: Array, a: Array, b: Array, drop: Array) -> tuple[Array, Array | None]:
        keep = plan.keep(drop, x.shape[0], w.shape[0])
        y, h = (reference_across if across else reference)(x, w, a, b, keep=keep, precision=plan.precision)
        return y, h if with_h else None

    def kernel(*operands: Array, platform: str, interpret: bool) -> tuple[Array, Array | None]:
        run = _on_tpu if platform == "tpu" else _on_gpu
        y, *h = run(plan, *operands, across=across, with_h=with_h, interpret=interpret)
        return y, h[0] if with_h else None

    return on_platform(plan.backend, xla, kernel, x, w, a, b, drop)


def _sizes(x: Array, w: Array, a: Array, across: bool) -> tuple[int, int, int, int]:
    """(m, inner, outer, r) of the product at hand: across, the contracted axis is w's second."""
    k, n = w.shape
    return (x.shape[0], n, k, a.shape[1]) if across else (x.shape[0], k, n, a.shape[1])


def _cost(m: int, k: int, n: int, r: int, blocks: Blocks, dtype: Any) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=2 * m * (k * n + k * r + r * n),
        transcendentals=0,
        bytes_accessed=blocks.traffic(m, k, n, r, dtype),
    )


# ------------------------------------------------------------------------------------------------------------ the TPU


def _on_tpu(
    plan: _Plan, x: Array, w: Array, a: Array, b: Array, drop: Array, *, across: bool, with_h: bool, interpret: bool
) -> Any:
    m, k, n, r = _sizes(x, w, a, across)
    blocks = plan.blocks or Blocks.for_tpu(m, k, n, r, x.dtype, plan.vmem_bytes)
    blocks.check_tpu(m, k, n, r, x.dtype, plan.vmem_bytes)
    grid = (pl.cdiv(m, blocks.m), pl.cdiv(n, blocks.n), pl.cdiv(k, blocks.k))
    last = grid[2] - 1
    # The factor that makes h is needed for the first columns only; afterwards its block stays where it is.
    held = lambda j, l: jnp.where(j == 0, l, last)
    if across:
        into, out, weight = b, a, pl.BlockSpec((blocks.n, blocks.k), lambda i, j, l: (j, l))
        into_spec = pl.BlockSpec((r, blocks.k), lambda i, j, l: (0, held(j, l)))
        out_spec = pl.BlockSpec((blocks.n, r), lambda i, j, l: (j, 0))
    else:
        into, out, weight = a, b, pl.BlockSpec((blocks.k, blocks.n), lambda i, j, l: (l, j))
        into_spec = pl.BlockSpec((blocks.k, r), lambda i, j, l: (held(j, l), 0))
        out_spec = pl.BlockSpec((r, blocks.n), lambda i, j, l: (0, j))
    shapes = [out_like((m, n), x.dtype, x), out_like((m, r), x.dtype, x)]
    specs = [
        pl.BlockSpec((blocks.m, blocks.n), lambda i, j, l: (i, j)),
        pl.BlockSpec((blocks.m, r), lambda i, j, l: (i, 0)),
    ]
    many = last > 0
    scratch = [pltpu.VMEM((blocks.m, r), wide(x.dtype))]
    scratch += [pltpu.VMEM((blocks.m, blocks.n), wide(x.dtype))] if many else []
    return pl.pallas_call(
        functools.partial(_tpu_kernel, plan=plan, k=k, n=n, blocks=blocks, across=across, with_h=with_h, many=many),
        out_shape=shapes if with_h else shapes[:1],
        grid=grid,
        in_specs=[
            pl.BlockSpec((1, 3), lambda i, j, l: (0, 0)),
            pl.BlockSpec((blocks.m, blocks.k), lambda i, j, l: (i, l)),
            weight,
            into_spec,
            out_spec,
        ],
        out_specs=specs if with_h else specs[:1],
        scratch_shapes=scratch,
        compiler_params=tpu_params("parallel", "arbitrary", "arbitrary", vmem_bytes=max(plan.vmem_bytes, VMEM_BYTES)),
        cost_estimate=_cost(m, k, n, r, blocks, x.dtype),
        interpret=interpret,
        name="low_rank_matmul_across" if across else "low_rank_matmul",
    )(drop, x, w, into, out)


def _tpu_kernel(
    drop_ref: Any,  # (1, 3) the key's two words, and what bits must lie below
    x_ref: Any,  # (bm, bk)
    w_ref: Any,  # (bk, bn), across (bn, bk)
    into_ref: Any,  # (bk, r), across (r, bk)
    out_ref: Any,  # (r, bn), across (bn, r)
    y_ref: Any,  # (bm, bn)
    *rest: Any,  # [h (bm, r)], sum of h (bm, r), [sum of y (bm, bn)]
    plan: _Plan,
    k: int,
    n: int,
    blocks: Blocks,
    across: bool,
    with_h: bool,
    many: bool,
) -> None:
    refs: tuple[Any, ...] = rest if with_h else (None, *rest)
    h_ref, h_sum, *y_sum = refs
    i, j, l = (pl.program_id(axis) for axis in range(3))
    first_columns = j == 0
    axis = 1 if across else 0  # of the weights, that is contracted
    inside = zero_beyond(k, blocks.k, l)

    # Sums start at zero in a part of their own, so that adding to them shares its instructions with the products.
    if many:

        @pl.when(l == 0)
        def _():
            y_sum[0][...] = jnp.zeros_like(y_sum[0])

    @pl.when(first_columns & (l == 0))
    def _():
        h_sum[...] = jnp.zeros_like(h_sum)

    @pl.when(first_columns)
    def _():
        seen = inside(x_ref[...], 1)
        if plan.drops and not across:
            kept = _kept(drop_ref, i * blocks.m, l * blocks.k, seen.shape, k)
            seen = jnp.where(kept, seen, jnp.zeros((), seen.dtype))
        h_sum[...] += dot(seen, inside(into_ref[...], axis), (1, axis), plan.precision)

    product = dot(inside(x_ref[...], 1), inside(w_ref[...], axis), (1, axis), plan.precision)
    if many:
        y_sum[0][...] += product

    def finish() -> None:
        h = h_sum[...].astype(x_ref.dtype)
        low = dot(h, out_ref[...], (1, axis), plan.precision)
        if plan.drops and across:
            low = jnp.where(_kept(drop_ref, i * blocks.m, j * blocks.n, low.shape, n), low, jnp.zeros((), low.dtype))
        y_ref[...] = ((y_sum[0][...] if many else product) + low).astype(y_ref.dtype)
        if h_ref is not None:

            @pl.when(first_columns)
            def _():
                h_ref[...] = h

    if many:
        pl.when(l == pl.num_programs(2) - 1)(finish)
    else:
        finish()


def _kept(drop_ref: Any, row: Any, column: Any, shape: tuple[int, ...], k: int) -> Array:
    """Which elements of a block at (row, column) of the (m, k) inputs are kept."""
    rows = (row + lax.broadcasted_iota(jnp.int32, shape, 0)).astype(jnp.uint32)
    columns = (column + lax.broadcasted_iota(jnp.int32, shape, 1)).astype(jnp.uint32)
    k0, k1, below = (drop_ref[:, c : c + 1] for c in range(3))
    return random_bits.kept(k0, k1, below, rows * jnp.uint32(k) + columns)


# ------------------------------------------------------------------------------------------------------------ the GPU


def _on_gpu(
    plan: _Plan, x: Array, w: Array, a: Array, b: Array, drop: Array, *, across: bool, with_h: bool, interpret: bool
) -> Any:
    m, k, n, r = _sizes(x, w, a, across)
    blocks = plan.blocks or Blocks.for_gpu(m, k, n, r)
    shapes = [out_like((m, n), x.dtype, x), out_like((m, r), x.dtype, x)]
    return pl.pallas_call(
        functools.partial(_gpu_kernel, plan=plan, sizes=(m, k, n, r), blocks=blocks, across=across),
        out_shape=shapes if with_h else shapes[:1],
        grid=(pl.cdiv(m, blocks.m) * pl.cdiv(n, blocks.n),),
        compiler_params=gpu_product_params(blocks.m, blocks.n, x.dtype),
        cost_estimate=_cost(m, k, n, r, blocks, x.dtype),
        interpret=interpret,
        name="low_rank_matmul_across" if across else "low_rank_matmul",
    )(drop, x, w, *((b, a) if across else (a, b)))


def _gpu_kernel(
    drop_ref: Any,  # (1, 3)
    x_ref: Any,  # (m, k)
    w_ref: Any,  # (k, n), across (n, k)
    into_ref: Any,  # (k, r), across (r, k)
    out_ref: Any,  # (r, n), across (n, r)
    y_ref: Any,  # (m, n)
    *h_ref: Any,  # [(m, r)]
    plan: _Plan,
    sizes: tuple[int, int, int, int],
    blocks: Blocks,
    across: bool,
) -> None:
    m, k, n, r = sizes
    rank = power_of_two(r, 16, MAX_RANK)
    i, j = gpu_tile(pl.cdiv(m, blocks.m), pl.cdiv(n, blocks.n))
    axis = 1 if across else 0
    row, column = i * blocks.m, j * blocks.n

    def step(l: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        l = jnp.asarray(l, jnp.int32)
        y_sum, h_sum = sums
        x = gpu_load(x_ref, (row, l * blocks.k), (blocks.m, blocks.k))
        w = gpu_load(w_ref, (l * blocks.k, column), (blocks.k, blocks.n), swap=across)
        into = gpu_load(into_ref, (l * blocks.k, 0), (blocks.k, rank), swap=across)
        seen = x
        if plan.drops and not across:
            seen = jnp.where(_kept(drop_ref, row, l * blocks.k, x.shape, k), x, jnp.zeros((), x.dtype))
        return (
            y_sum + dot(x, w, (1, axis), plan.precision),
            h_sum + dot(seen, into, (1, axis), plan.precision),
        )

    zeros = lambda *shape: jnp.zeros(shape, wide(x_ref.dtype))
    y_sum, h_sum = lax.fori_loop(0, pl.cdiv(k, blocks.k), step, (zeros(blocks.m, blocks.n), zeros(blocks.m, rank)))
    h = h_sum.astype(x_ref.dtype)
    low = dot(h, gpu_load(out_ref, (0, column), (rank, blocks.n), swap=across), (1, axis), plan.precision)
    if plan.drops and across:
        low = jnp.where(_kept(drop_ref, row, column, low.shape, n), low, jnp.zeros((), low.dtype))
    gpu_store(y_ref, (row, column), y_sum + low)
    if h_ref:

        @pl.when(j == 0)
        def _():
            gpu_store(h_ref[0], (row, 0), h)
