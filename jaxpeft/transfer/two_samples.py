"""How far two sets of samples are apart: the maximum mean discrepancy (Gretton et al., JMLR 2012)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["mmd2", "rbf"]

Kernel = Callable[[Float[Array, "n d"], Float[Array, "m d"]], Float[Array, "n m"]]


def rbf(width: Any) -> Kernel:
    """exp(-|x - y|² / (2 width²)); `width` is over 0 and may be traced."""

    def kernel(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
        d2 = jnp.square(x).sum(-1)[:, None] + jnp.square(y).sum(-1) - 2 * jnp.matmul(x, y.T, precision="highest")
        return jnp.exp(-jnp.maximum(d2, 0) / (2 * jnp.square(jnp.asarray(width, d2.dtype))))

    return kernel


def mmd2(x: Float[Array, "n d"], y: Float[Array, "m d"], kernel: Kernel) -> Float[Array, ""]:
    """Squared maximum mean discrepancy, the biased estimate: never below 0 but by rounding, and 0 of equal samples.

        mean k(x, x') + mean k(y, y') - 2 mean k(x, y)

    Gretton et al., "A kernel two-sample test", JMLR 2012, eq. 5. Its bias is of order 1/n + 1/m: compare at equal numbers.

    Raises:
      ValueError: shapes that do not agree, or no samples.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not (x.shape[0] and y.shape[0]):
        raise ValueError(f"samples of shapes {x.shape} and {y.shape}: expected (n, d) and (m, d), at least one of each")
    return kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()
