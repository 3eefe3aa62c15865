"""SVDiff: Compact Parameter Space for Diffusion Fine-Tuning (Han et al., ICCV 2023, arXiv:2303.11305).

Only the singular values of a weight move (section 3.2, "spectral shifts"):

    W = U diag(σ) Vᵀ,      W(δ) = U diag(relu(σ + s δ)) Vᵀ,      δ = 0 at the start.

A kernel is the matrix of its inner by its outer axes (a convolution's window belongs to the inner ones). The scale w of a norm
is a matrix of one row: its only singular value is ‖w‖, and a single number moves it, at a rate of its own.

Computed as W + U diag(relu(σ + s δ) - σ) Vᵀ, in factors: at the start it is W to the bit, and no product forms W(δ). U, σ and V
are kept in the delta as fixed leaves, as the reference keeps them beside the weights: singular vectors are not unique, and
another machine might find others. A file is therefore as large as the weights it is for; what is learned is not.

Reference code of the form used here: Raman1121/Diffusion_Memorization_HPO @5a6afdd (svdiff/layers.py), after
mkshing/svdiff-pytorch: rate 1e-3 for the matrices, 1e-6 for the norms.

Shape letters: r = min(inner, outer); a weight's axes are (*stack, *inner, *outer).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpeft import trees
from jaxpeft.method import Method, chain, on_weights, register
from jaxpeft.roles import Role
from jaxpeft.weights.factored import Factor, Factored, Term, letters

__all__ = ["sv_diff"]

NORM_RATE = 1e-3  # of the norms, relative to the matrices


def spectrum(w: Array, role: Role) -> dict[str, Array]:
    """U (*stack, *inner, r), σ (*stack, r), V (*stack, r, *outer) of each matrix."""
    stack, inner, outer = w.shape[: role.stack], w.shape[role.stack : sum(role)], w.shape[sum(role) :]
    flat = w.astype(trees.wide_dtype(w.dtype)).reshape(*stack, math.prod(inner), math.prod(outer))
    u, sigma, v = jnp.linalg.svd(flat, full_matrices=False)
    return {"u": u.reshape(*stack, *inner, -1), "sigma": sigma, "v": v.reshape(*stack, -1, *outer)}


def shifted(sigma: Float[Array, "*r"], delta: Float[Array, "*r"], scale: Any) -> Float[Array, "*r"]:
    """relu(σ + s δ)."""
    return jnp.maximum(sigma + jnp.asarray(scale, sigma.dtype) * delta, 0)


@register(
    family="adapt", paper="Han et al., ICCV 2023", mechanism="weights", mergeable=True, exact_start=True, rate=1e-2
)
def sv_diff(
    at: trees.Pattern = "**/kernel",
    norms: trees.Pattern | None = "**/scale",
    *,
    scale: Any = 1.0,
    name: str = "sv_diff",
) -> Method:
    """SVDiff; see the module.

    Args:
      at: weights of two axes or more whose singular values are learned: kernels, convolutions, stacked layers.
      norms: scales of norms, whose length is learned (their last axis is the channels); None for none, as for a model whose
        norms have no scale.
      scale: s; may be an array.
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is `{"weights": {path: {"delta": (*stack, r), "u", "sigma", "v"}}, "norms": {path: {"delta":
      (*stack)}}}`. Its learned part is zero at the start, where the adapted model is its base. It merges.

    Raises:
      PatternError: nothing matches one of the patterns.
    """

    def start(key: Key[Array, ""], path: str, w: Array, role: Role) -> dict[str, Any]:
        parts = spectrum(w, role)
        return {"delta": jnp.zeros_like(parts["sigma"]), **{k: trees.Fixed(x) for k, x in parts.items()}}

    def build(path: str, w: Array, d: dict[str, Array], key: Key[Array, ""] | None) -> Factored:
        s, i, o = letters(w, d["u"], d["v"])
        change = shifted(d["sigma"], d["delta"], scale) - d["sigma"]
        moved = Term((Factor(d["u"], s + i + "r"), Factor(change, s + "r"), Factor(d["v"], s + "r" + o)))
        return Factored((Term((Factor(w, s + i + o),)), moved), (), tuple(s + i + o))

    def norm_start(key: Key[Array, ""], path: str, w: Array, role: Role) -> dict[str, Array]:
        return {"delta": jnp.zeros(w.shape[:-1], trees.wide_dtype(w.dtype))}

    def norm_build(path: str, w: Array, d: dict[str, Array], key: Key[Array, ""] | None) -> Array:
        wide = w.astype(d["delta"].dtype)
        length = jnp.linalg.norm(jax.lax.stop_gradient(wide), axis=-1)
        gain = shifted(length, d["delta"], scale) / jnp.where(length > 0, length, 1)
        return (wide * gain[..., None]).astype(w.dtype)

    parts = [on_weights("weights", at, start, build, {})]
    if norms is not None:
        own = on_weights("norms", norms, norm_start, norm_build, {}, factored=False)
        parts.append(own._replace(rates=(("**", NORM_RATE),)))
    config = dict(method="sv_diff", name=name, at=at, norms=norms, scale=scale)
    return chain(*parts, name=name)._replace(config=config)
