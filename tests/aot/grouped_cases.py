"""Grouped and hashed products of real layers, to compile for devices that are not here: (name, function, shapes)."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.kernels import grouped_low_rank, hashed_matmul
from jaxpeft.kernels.workloads import GROUPED, HASHED, Grouped, Hashed

Case = tuple[str, Any, tuple[Any, ...]]

# Sizes that are no multiple of anything, beside the layers of real models.
ODD_GROUPED = Grouped("3 x 50 tokens, rank 5", 3, 50, 384, 384, 5, 4)
ODD_HASHED = Hashed("35 rows of 7", 35, 7, 256, 128)


def _gradient(function: Any, of: tuple[int, ...]) -> Any:
    return jax.grad(lambda *operands: (function(*operands).astype(jnp.float32) ** 2).sum(), argnums=of)


def _grouped(x: Any, w: Any, a: Any, b: Any, group: Any, scale: Any) -> Any:
    return grouped_low_rank(x, w, a, b, group, scale)


def _hashed(shape: tuple[int, int], x: Any, memory: Any) -> Any:
    return hashed_matmul(x, memory, 7, shape, scale=0.5)


def _cases() -> Iterator[Case]:
    for dtype in (jnp.bfloat16, jnp.float32):
        array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
        for name, b, t, k, n, r, groups in (*GROUPED, ODD_GROUPED):
            factors = array((groups, k, r)), array((groups, r, n))
            ids, scale = jax.ShapeDtypeStruct((b,), jnp.int32), jax.ShapeDtypeStruct((groups,), jnp.float32)
            shapes = (array((b, t, k)), array((k, n)), *factors, ids, scale)
            title = f"grouped_low_rank, {name}, {jnp.dtype(dtype).name}"
            yield f"{title}, forward", _grouped, shapes
            yield f"{title}, backward", _gradient(_grouped, (0, 2, 3, 5)), shapes
        for name, m, k, n, size in (*HASHED, ODD_HASHED):
            run, shapes = functools.partial(_hashed, (k, n)), (array((m, k)), array((size,)))
            title = f"hashed_matmul, {name}, {jnp.dtype(dtype).name}"
            yield f"{title}, forward", run, shapes
            yield f"{title}, backward", _gradient(run, (0, 1)), shapes


CASES = list(_cases())
