"""A weight with its inputs or outputs rescaled by a vector: IA3 (Liu et al., 2022)."""

from typing import Literal

from jaxtyping import Array, Float

from jaxpeft.weights.factored import Factor, Factored, Term, names


def scaled(
    w: Float[Array, "*stack_inner_outer"],
    gain: Float[Array, "*stack_side"],
    side: Literal["in", "out"],
    stack: int = 0,
) -> Factored:
    """`w` with `gain` over its inner axes (`side="in"`: the input is rescaled) or its outer ones.

    Args:
      w: the frozen weight.
      gain: one number per inner or outer position.
      side: which.
      stack: how many leading axes of `w` are stacked layers.
    """
    axes = names(w.ndim)
    n = gain.ndim - stack
    own = axes[stack : stack + n] if side == "in" else axes[w.ndim - n :]
    return Factored((Term((Factor(w, axes),)),), (Factor(gain, axes[:stack] + own),), tuple(axes))
