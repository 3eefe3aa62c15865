"""Where a kernel runs: the choice of backend, block arithmetic and compiler parameters, for all kernels in one place.

The GPU kernels are Triton's. Pallas will drop that in favour of Mosaic (Hopper and newer); `gpu_params` is the only place
that says which.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton

Backend = Literal["auto", "xla", "tpu", "gpu"]
BACKENDS = ("auto", "xla", "tpu", "gpu")

VMEM_BYTES = 16 * 2**20  # what a kernel may use on every TPU generation without asking for more
LANES = 128
GPU_ROWS = 8  # of tiles that are run through all columns together


class KernelError(ValueError):
    """A call that a kernel cannot run, with the value and the remedy."""


def on_platform(backend: Backend, xla: Callable[..., Any], kernel: Callable[..., Any], *operands: Any) -> Any:
    """Runs `xla(*operands)` or `kernel(*operands, platform="tpu" | "gpu", interpret=bool)`.

    Args:
      backend: see the package. With "auto" the choice is made when the program is lowered.
      xla: plain JAX.
      kernel: the same function by Pallas.
      operands: arrays.

    Raises:
      KernelError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise KernelError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if backend == "xla":
        return xla(*operands)
    on = functools.partial(functools.partial, kernel)
    if backend == "auto":
        return lax.platform_dependent(
            *operands, tpu=on(platform="tpu", interpret=False), cuda=on(platform="gpu", interpret=False), default=xla
        )
    real = {"tpu": "tpu", "gpu": "cuda"}[backend]
    return lax.platform_dependent(
        *operands,
        **{real: on(platform=backend, interpret=False)},
        default=on(platform=backend, interpret=True),
    )


def tpu_params(*semantics: Literal["parallel", "arbitrary"], vmem_bytes: int | None = None) -> Any:
    """What the Mosaic compiler is told: which grid axes may be split between cores, and how much VMEM is used."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem_bytes)


def gpu_params(warps: int = 4, stages: int = 3) -> Any:
    return pltriton.CompilerParams(num_warps=warps, num_stages=stages)


def wide(dtype: Any) -> Any:
    """What sums are kept in: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def sublanes(dtype: Any) -> int:
    """Rows of a TPU tile: 8 of 32 bits, 16 of 16, 32 of 8."""
    return 8 * max(1, 4 // jnp.dtype(dtype).itemsize)


def cut(size: int, want: int, unit: int) -> int:
    """A block length for an axis of `size`: the whole axis, or the largest multiple of `unit` up to `want`."""
    return size if size <= want else max(unit, want // unit * unit)


def check_block(name: str, block: int, size: int, unit: int) -> None:
    """Raises KernelError for a TPU's block of an axis that is neither a multiple of `unit` nor the whole axis."""
    if block != size and (block % unit or block > size):
        raise KernelError(f"block {name} of {block}: a multiple of {unit} up to {size}, or {size} itself")


def check_vmem(blocks: Any, need: int, limit: int) -> None:
    """Raises KernelError for blocks that need more VMEM than there may be used."""
    if need > limit:
        raise KernelError(f"{blocks} needs {need} bytes of VMEM, the limit is {limit}: smaller blocks")


def gpu_product(m: int, k: int, n: int, r: int) -> tuple[int, int, int]:
    """Lengths of a GPU's blocks for a product with an update of rank r; see `experiments/bench/device.py`.

    Few rows are a matter of reading the weight: narrow columns, so that all of the device reads.
    """
    if m <= 32:
        return power_of_two(m, 16, 32), power_of_two(k, 16, 128), power_of_two(n, 16, 32)
    rows, columns = (64, 128) if r > 64 else (128, 256)
    return power_of_two(m, 16, rows), power_of_two(k, 16, 32), power_of_two(n, 16, columns)


def gpu_product_params(m: int, n: int, dtype: Any) -> Any:
    """For blocks of m rows and n columns: as many warps as hold their sums, stages as shared memory holds."""
    return gpu_params(8 if m * n > 128 * 128 else 4, 4 if jnp.dtype(dtype).itemsize <= 2 else 2)


def gpu_tile(rows: int, columns: int) -> tuple[Any, Any]:
    """(row, column) of the tile of this program, of a grid of `rows * columns` programs.

    Programs that run at one time share rows and columns, which then are read from memory once: eight rows at a time go
    through all columns.
    """
    at, each = jnp.asarray(pl.program_id(0), jnp.int32), jnp.int32(GPU_ROWS * columns)
    first = lax.div(at, each) * GPU_ROWS
    high = jnp.minimum(jnp.int32(rows) - first, GPU_ROWS)
    within = lax.rem(at, each)
    return first + lax.rem(within, high), lax.div(within, high)


def power_of_two(size: int, low: int, high: int) -> int:
    """The power of two next over `size`, within `low` and `high`: Triton's blocks."""
    return max(low, min(high, pl.next_power_of_2(size)))


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int] = (1, 0), precision: Any = None) -> jax.Array:
    """`x y` over one axis of each, summed wide."""
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, numbers, precision=precision, preferred_element_type=wide(x.dtype))


def same_variance(*operands: jax.Array) -> tuple[jax.Array, ...]:
    """The operands, varying over the same axes of a surrounding `shard_map`: a kernel mixes them all."""
    axes = frozenset().union(*map(_varying, operands))
    return tuple(lax.pcast(x, tuple(sorted(axes - _varying(x))), to="varying") for x in operands)


def out_like(shape: tuple[int, ...], dtype: Any, operand: jax.Array) -> jax.ShapeDtypeStruct:
    """A kernel's result, varying over the axes that its operands vary over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(operand).manual_axis_type)


def _varying(x: jax.Array) -> frozenset[Any]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)
