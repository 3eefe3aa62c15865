"""A weight and a dense difference to it. The difference is as large as the weight: there is nothing to be lazy about."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def difference(w: Float[Array, "*axes"], d: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """`w + d` in the dtype of `w`, summed in the wider of the two.

    Raises:
      ValueError: the shapes differ.
    """
    if w.shape != d.shape:
        raise ValueError(f"a difference of shape {d.shape} for a weight of shape {w.shape}")
    wide = max(w.dtype, d.dtype, key=lambda t: jnp.finfo(t).bits)
    return (w.astype(wide) + d.astype(wide)).astype(w.dtype)
