"""`w + scale a b`: the low-rank update of LoRA (Hu et al., 2022) as a weight that is never formed."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key

from jaxpeft.weights.factored import Dropout, Factor, Factored, Term, letters


def low_rank(
    w: Float[Array, "*stack_inner_outer"],
    a: Float[Array, "*stack_inner r"],
    b: Float[Array, "*stack_r_outer"],
    scale: ArrayLike = 1.0,
    *,
    key: Key[Array, "*stack"] | None = None,
    dropout: ArrayLike = 0.0,
) -> Factored:
    """A weight that equals `w + scale * a @ b` and is multiplied as `x w + scale (x a) b`.

    Args:
      w: the frozen weight. Its axes are stacked layers (or experts), then those that `a` spans, then those of `b`;
        how many of each follows from the ranks of the three arrays.
      a, b: the factors.
      scale: a scalar, or one number per stacked layer.
      key: turns dropout on for the input of the low-rank product, one key per stacked layer.
      dropout: the probability that an input is dropped there; a number or, in a sweep, a traced scalar. Only the number
        0 leaves dropout out of the program.
    """
    s, i, o = letters(w, a, b)
    scale = jnp.asarray(scale)
    on = not (isinstance(dropout, int | float) and dropout == 0)
    update = Term(
        (Factor(a, s + i + "r"), Factor(scale, s[: scale.ndim]), Factor(b, s + "r" + o)),
        Dropout(key, s, jnp.asarray(dropout, jnp.float32)) if key is not None and on else None,
    )
    return Factored((Term((Factor(w, s + i + o),)), update), (), tuple(s + i + o))
