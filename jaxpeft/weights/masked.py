"""A weight with a mask: elementwise, or over whole rows, columns or layers."""

from jaxtyping import Array, Float, Num

from jaxpeft.weights.factored import Factor, Factored, Term, names


def masked(w: Float[Array, "*axes"], mask: Num[Array, "*axes_or_1"]) -> Factored:
    """`w * mask`, where axes of size one in `mask` broadcast.

    A mask that has one row or column is applied to the activations and `w` is never copied; a full mask is multiplied
    into the weight at each product (no product could avoid it) and not kept for the backward pass of `w`.

    Raises:
      ValueError: `mask` has another rank or does not broadcast to `w`.
    """
    if mask.ndim != w.ndim or any(m not in (1, n) for m, n in zip(mask.shape, w.shape)):
        raise ValueError(f"a mask of shape {mask.shape} does not broadcast to a weight of shape {w.shape}")
    axes = names(w.ndim)
    own = "".join(c for c, m, n in zip(axes, mask.shape, w.shape) if m == n != 1)
    m = Factor(mask.reshape([m for m, n in zip(mask.shape, w.shape) if m == n != 1]).astype(w.dtype), own)
    if len(own) == w.ndim:
        return Factored((Term((Factor(w, axes), m)),), (), tuple(axes))
    return Factored((Term((Factor(w, axes),)),), (m,), tuple(axes))
