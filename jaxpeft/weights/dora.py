"""Weight-decomposed low-rank update: direction by low rank, length of each column by a vector (Liu et al., 2024)."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Key

from jaxpeft import trees
from jaxpeft.weights.factored import Factor, Factored, letters
from jaxpeft.weights.low_rank import low_rank


def column_norm(
    w: Float[Array, "*stack_inner_outer"],
    a: Float[Array, "*stack_inner r"],
    b: Float[Array, "*stack_r_outer"],
    scale: ArrayLike = 1.0,
) -> Float[Array, "*stack_outer"]:
    """The Euclidean norm of `w + scale a b` over the inner axes, through its factors, in float32.

    |w + s a b|² = |w|² + 2 s (aᵀw) · b + s² b · (aᵀa) b per column: O(outer r) memory, the sum is never formed.
    """
    s, i, o = letters(w, a, b)
    wide = trees.wide_dtype(w.dtype)
    w, a, b = (x.astype(wide) for x in (w, a, b))
    scale = jnp.asarray(scale, wide)
    scale = scale.reshape(scale.shape + (1,) * (len(s + o) - scale.ndim))
    base = jnp.einsum(f"{s}{i}{o},{s}{i}{o}->{s}{o}", w, w)
    cross = jnp.einsum(f"{s}r{o},{s}r{o}->{s}{o}", jnp.einsum(f"{s}{i}r,{s}{i}{o}->{s}r{o}", a, w), b)
    gram = jnp.einsum(f"{s}{i}r,{s}{i}q->{s}rq", a, a)
    update = jnp.einsum(f"{s}r{o},{s}r{o}->{s}{o}", jnp.einsum(f"{s}rq,{s}q{o}->{s}r{o}", gram, b), b)
    # Rounding can push a column that the update cancels below zero.
    return jnp.sqrt(jnp.maximum(base + 2 * scale * cross + scale**2 * update, jnp.finfo(wide).tiny))


def dora(
    w: Float[Array, "*stack_inner_outer"],
    a: Float[Array, "*stack_inner r"],
    b: Float[Array, "*stack_r_outer"],
    magnitude: Float[Array, "*stack_outer"],
    scale: ArrayLike = 1.0,
    *,
    key: Key[Array, "*stack"] | None = None,
    dropout: ArrayLike = 0.0,
) -> Factored:
    """A weight that equals `magnitude * (w + scale a b) / |w + scale a b|`, columns along the outer axes.

    The norm is a constant to the gradient, as the paper's section 4.3 proposes and its reference code does.
    """
    s, _, o = letters(w, a, b)
    norm = lax.stop_gradient(column_norm(w, a, b, scale))
    gain = Factor((magnitude.astype(norm.dtype) / norm).astype(w.dtype), s + o)
    return dataclasses.replace(low_rank(w, a, b, scale, key=key, dropout=dropout), gain=(gain,))
