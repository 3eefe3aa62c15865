"""How `x (w + s a b)` is computed: as two products, as one kernel, or with the sum formed first.

    two products   x w + s (x a) b: nothing of w's size is made
    kernel         the same in one pass over x and w (`kernels.low_rank_matmul`)
    merged         x (w + s a b): fewer operations where the rows outnumber k n / (k + n), at the cost of one dense copy
                   of the weight while the product runs; its gradients still take the low-rank way

`experiments/bench/products.py` measures them on a CPU, with two more that concatenate [w a] or [x h]: those are slower to
train, as their gradients take that of w along. What several sites that share x (query, key, value) could save by one
product with all their a is measured there too, and not done: a weight knows nothing of its neighbours.
"""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpeft.kernels.low_rank_matmul import MAX_RANK

Backend = Literal["auto", "xla", "pallas", "merged"]
Product = Literal["two products", "kernel", "merged"]


def checked(backend: Backend) -> Backend:
    """Raises ValueError for a backend that there is not."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r}: expected one of {', '.join(get_args(Backend))}")
    return backend


def chosen(m: int, k: int, n: int, r: int, backend: Backend, platform: str, *, local: bool) -> Product:
    """The product of (m, k) inputs with a (k, n) weight and an update of rank r on `platform` ("cpu", "tpu", "cuda").

    With "auto" the kernel is taken on TPU where it fills the matrix unit and the compiler need not split it between
    devices (`local`: one device, or inside shard_map). On GPU nothing has shown it faster than XLA's product yet.
    """
    if backend == "merged":
        return "merged"
    fits = backend != "xla" and r <= MAX_RANK
    if fits and backend == "pallas" and platform in ("tpu", "cuda", "gpu"):
        return "kernel"
    if fits and backend == "auto" and platform == "tpu" and local and m >= 8 and k >= 128 and n >= 128:
        return "kernel"
    return "two products"


def is_local(x: Array) -> bool:
    """Whether a kernel on `x` stays on one device."""
    return bool(jax.typeof(x).manual_axis_type.varying) or jax.device_count() == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def merged(
    precision: Any, x: Float[Array, "m k"], w: Float[Array, "k n"], a: Float[Array, "k r"], b: Float[Array, "r n"]
) -> Float[Array, "m n"]:
    """`x (w + a b)` with the sum formed, and gradients that never form w's."""
    return jnp.dot(x, _sum(w, a, b), precision=precision)


def _sum(w: Array, a: Array, b: Array) -> Array:
    wide = jnp.promote_types(w.dtype, jnp.float32)
    return (w.astype(wide) + jnp.dot(a, b, preferred_element_type=wide)).astype(w.dtype)


def _merged_forward(precision: Any, x: Array, w: Array, a: Array, b: Array) -> tuple[Array, Any]:
    return merged(precision, x, w, a, b), (x, w, a, b)


def _merged_backward(precision: Any, saved: Any, g: Array) -> tuple[Array, ...]:
    x, w, a, b = saved
    dot = functools.partial(jnp.dot, precision=precision)
    t = dot(g, b.T)
    return dot(g, _sum(w, a, b).T), dot(x.T, g), dot(x.T, t), dot(dot(x, a).T, g)


merged.defvjp(_merged_forward, _merged_backward)
