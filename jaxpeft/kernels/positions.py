"""Where queries and keys stand: rotary positions, linear biases (ALiBi), and their factored product.

    score(m, n) = c_r scale (R_m q_m) · (R_n k_n) - c_a slope_h g(|m - n|)        so the weight is e^rope e^bias, two factors

Rotary: Su et al., "RoFormer", 2021. ALiBi: Press et al., "Train short, test long", ICLR 2022, slope_h = 2^(-8 h / H),
g(d) = d. The harmonic forms are our reading of Li, 2024 (arXiv 2410.18441), which states no formula: slope_h = 1 / h, or
g(d) = H_d = 1 + 1/2 + ... + 1/d.

Rotations are applied before the kernel, where XLA fuses them with what writes q and k; inside, a block of keys would be
turned again for every block of queries, and dk and dq turned back. The bias is added inside: outside it would be an array
of all scores.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxpeft.kernels.platforms import KernelError, wide

__all__ = ["Position", "alibi_slopes", "distance_of", "harmonic", "position_bias", "rotate"]

Distance = Literal["linear", "harmonic"]


@jtu.register_dataclass
@dataclasses.dataclass(frozen=True)
class Position:
    """Positions of an attention; every array may be traced.

    Attributes:
      rotary: cos and sin, each (n, d) or (b, n, d): row m for position m, of which query i stands at `offset + i`.
      slopes: (heads,), one a query head; at least 0 for a weight that falls with the distance.
      distance: g, static.
      rotary_weight: c_r; where there are no rotary positions it weighs the plain product.
      slope_weight: c_a.
    """

    rotary: tuple[Array, Array] | None = None
    slopes: Array | None = None
    distance: Distance = dataclasses.field(default="linear", metadata={"static": True})
    rotary_weight: ArrayLike = 1.0
    slope_weight: ArrayLike = 1.0


def alibi_slopes(heads: int, kind: Literal["geometric", "harmonic"] = "geometric") -> Float[Array, "{heads}"]:
    """2^(-8 h / H) or 1 / h, for h = 1 .. H.

    Raises:
      KernelError: no heads, or another kind.
    """
    if heads < 1:
        raise KernelError(f"{heads} heads: at least 1")
    h = np.arange(1, heads + 1)
    if kind == "geometric":
        return jnp.asarray(2.0 ** (-8.0 * h / heads), jnp.float32)
    if kind == "harmonic":
        return jnp.asarray(1.0 / h, jnp.float32)
    raise KernelError(f"slopes {kind!r}: geometric or harmonic")


def harmonic(distance: Float[Array, "..."]) -> Float[Array, "..."]:
    """H_d = 1 + 1/2 + ... + 1/d for d >= 0, to 3e-10 (float32: its rounding).

    H_d = H_(d+4) less four terms (together one quotient), and H_x = ln y + γ + 1/(24 y²) - 7/(960 y⁴) + 31/(8064 y⁶)
    - 127/(30720 y⁸) + 511/(67584 y¹⁰) with y = x + 1/2.
    """
    d = distance
    below = (((4.0 * d + 30.0) * d + 70.0) * d + 50.0) / (((((d + 10.0) * d + 35.0) * d + 50.0) * d) + 24.0)
    y = d + 4.5
    z = 1.0 / (y * y)
    series = z * (1 / 24 + z * (-7 / 960 + z * (31 / 8064 + z * (-127 / 30720 + z * (511 / 67584)))))
    return jnp.log(y) + float(np.euler_gamma) + series - below


def distance_of(kind: Distance, steps: Array, dtype: Any) -> Array:
    """g(|steps|) in `dtype`, from whole steps."""
    d = jnp.abs(steps).astype(dtype)
    return harmonic(d) if kind == "harmonic" else d


def position_bias(
    t: int, s: int, slopes: Float[Array, "h"], distance: Distance = "linear", offset: int = 0
) -> Float[Array, "h {t} {s}"]:
    """`-slope_h g(|offset + m - n|)` for all pairs: what the kernels add without forming it."""
    steps = offset + jnp.arange(t, dtype=jnp.int32)[:, None] - jnp.arange(s, dtype=jnp.int32)
    return -slopes[:, None, None] * distance_of(distance, steps, slopes.dtype)[None]


def rotate(
    x: Float[Array, "b t h d"], cos: Float[Array, "#b t d"], sin: Float[Array, "#b t d"], weight: ArrayLike = 1.0
) -> Float[Array, "b t h d"]:
    """Turns the pairs (i, i + d/2) of each head by the angles of cos, sin, and multiplies by `weight`; summed wide."""
    dtype = wide(x.dtype)
    x_wide, cos, sin = x.astype(dtype), cos.astype(dtype)[:, :, None], sin.astype(dtype)[:, :, None]
    first, second = jnp.split(x_wide, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return ((x_wide * cos + turned * sin) * jnp.asarray(weight, dtype)).astype(x.dtype)


def rotated(q: Array, k: Array, position: Position, offset: int) -> tuple[Array, Array]:
    """q and k turned to their positions, q weighed by c_r.

    Raises:
      KernelError: tables that do not reach the last position or are of another width.
    """
    if position.rotary is None:
        plain = isinstance(position.rotary_weight, (int, float)) and position.rotary_weight == 1
        weight = jnp.asarray(position.rotary_weight, wide(q.dtype))
        return (q if plain else (q.astype(wide(q.dtype)) * weight).astype(q.dtype)), k
    t, d, s = q.shape[1], q.shape[3], k.shape[1]
    cos, sin = (x if x.ndim == 3 else x[None] for x in position.rotary)
    last = max(s, offset + t)
    if cos.shape != sin.shape or cos.shape[2] != d or cos.shape[1] < last or d % 2 or offset < 0:
        raise KernelError(
            f"rotary tables {cos.shape[1:]} for {last} positions of width {d} from {offset}: expected (n, {d}) with n at "
            f"least {last}, an even width, and no negative offset"
        )
    return (
        rotate(q, cos[:, offset : offset + t], sin[:, offset : offset + t], position.rotary_weight),
        rotate(k, cos[:, :s], sin[:, :s]),
    )
