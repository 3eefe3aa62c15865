"""Distillation: the loss that teaches one model's answers to another."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

__all__ = ["check_alike", "kl_loss", "masked_mean"]


def kl_loss(
    z_s: Float[Array, "n C"], targets: Float[Array, "n C"], T: Any = 1.0, *, mask: Bool[Array, "n"] | None = None
) -> Float[Array, ""]:
    """T²/n Σ_i KL(softmax(targets_i / T) ‖ softmax(z_s,i / T)); its slope in z_s is T/n (p_s - p*), p at that temperature.

    Args:
      z_s: the student's logits.
      targets: logits; no gradient flows through.
      T: temperature, over 0; may be traced.
      mask: the mean is over these; 0 where there are none (padding).

    Raises:
      ValueError: shapes that do not agree.
    """
    check_alike(z_s, targets)
    z_s = jnp.asarray(z_s)
    T = jnp.asarray(T, z_s.dtype)
    log_s = jax.nn.log_softmax(z_s / T, -1)
    log_t = jax.nn.log_softmax(lax.stop_gradient(jnp.asarray(targets).astype(z_s.dtype)) / T, -1)
    # A class that the target rules out (-inf) adds nothing.
    each = jnp.where(jnp.isneginf(log_t), 0, jnp.exp(log_t) * (log_t - log_s)).sum(-1)
    return jnp.square(T) * masked_mean(each, mask)


def check_alike(a: Any, b: Any) -> None:
    """Raises ValueError unless both are logits (n, C) of one shape."""
    if jnp.shape(a) != jnp.shape(b) or len(jnp.shape(a)) != 2:
        raise ValueError(f"logits of shapes {jnp.shape(a)} and {jnp.shape(b)}: expected both (n, C)")


def masked_mean(each: Float[Array, "n"], mask: Any = None) -> Float[Array, ""]:
    """The mean of those that `mask` (n,) chooses, 0 where it chooses none."""
    if mask is None:
        return each.mean()
    kept = jnp.asarray(mask).astype(each.dtype)
    return jnp.where(kept > 0, each, 0).sum() / jnp.maximum(kept.sum(), 1)
