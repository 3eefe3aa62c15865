"""AugMix: several short chains of simple operations on an image, mixed with each other and with the image itself.

    x̃ = (1 - m) x + m Σ_i w_i chain_i(x),      w ~ Dirichlet(α, ..., α),  m ~ Beta(α, α)

A chain is one to three operations drawn with repetition, each at a strength level ~ U(0.1, severity), of 10. The nine
operations are those that do not occur among ImageNet-C's corruptions. Everything is drawn anew for each image.

    autocontrast, equalise    each channel's grey levels stretched, or made equally frequent
    posterise, solarise       4 bits a level or fewer; levels from a threshold on inverted
    rotate                    by up to 30 degrees at level 10, either way, about the middle
    shear_x, shear_y          by up to 0.3, either way, about the corner
    translate_x, translate_y  by up to a third of the side, either way, in whole pixels

Reference: Hendrycks, Mu et al., "AugMix: a simple data processing method to improve robustness and uncertainty", ICLR 2020;
code google-research/augmix @ 9b9824c (augment_and_mix.py, augmentations.py), which works through Pillow on 8 bits, as is done
here without it. Departure: grey levels are rounded to 256 before an operation where the reference cuts off, by which a level
read back from its float may become the one below.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

__all__ = ["AUGMIX_OPS", "augmix", "operate"]

LEVELS = 255.0
LONGEST = 3  # operations in a chain of random length
WHOLE = 1e-3  # added before cutting off, for whole numbers that rounding left just below themselves


class _Op(NamedTuple):
    """An operation on one image: either where each pixel is read, or what becomes of its grey levels 0..255."""

    place: Callable[[Any, float, float], tuple[Any, ...]] | None = None  # (strength, height, width) -> a, b, c, d, e, f
    grey: Callable[[Any, Any], Any] | None = None  # (levels (y, x, c), strength) -> levels


def augmix(
    key: Key[Array, ""],
    x: Float[Array, "b y x c"],
    ops: Sequence[str] | None = None,
    *,
    severity: Any = 3.0,
    width: int = 3,
    depth: int | None = None,
    alpha: Any = 1.0,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Float[Array, "b y x c"]:
    """x̃ of each image; see the module. Compiles, and vmaps over keys.

    Args:
      key: of everything drawn.
      x: images within `bounds`; what lies outside is cut off where an operation is applied.
      ops: names out of `AUGMIX_OPS`; None for all nine.
      severity: 0.1 to 10: the largest strength that may be drawn; may be traced.
      width: chains, at least 1.
      depth: operations in each; None draws 1 to 3 for each chain. 0 leaves the images as they are.
      alpha: over 0, of both distributions; may be traced. Small ones take one chain, and either it or the image.
      bounds: black and white. What moves in from outside is black.

    Returns:
      Images of x's shape and type. No useful gradient: grey levels are rounded.

    Raises:
      ValueError: an unknown operation or none, a width below 1, a negative depth, or an `x` of another rank.

    Example:
      >>> x = jnp.linspace(0.0, 1.0, 2 * 8 * 8).reshape(2, 8, 8, 1)
      >>> augmix(jax.random.key(0), x).shape, bool((augmix(jax.random.key(0), x, width=1, depth=0) == x).all())
      ((2, 8, 8, 1), True)
    """
    names, x = _named(ops), _images(x)
    if width < 1:
        raise ValueError(f"width {width}: there is at least one chain")
    if depth is not None and depth < 0:
        raise ValueError(f"depth {depth}: a chain has no negative number of operations; 0 leaves images as they are")
    low, high = bounds
    b, longest = x.shape[0], LONGEST if depth is None else depth
    mix, others = jax.random.split(key)
    # Both distributions are shares of gamma variables. All is drawn in two calls: it is they that compile slowly.
    gammas = jax.random.loggamma(mix, jnp.asarray(alpha, jnp.float32), (b, width + 2))
    w, m = jax.nn.softmax(gammas[:, 2:]), jax.nn.sigmoid(gammas[:, 0] - gammas[:, 1])
    level, side, pick, long = jax.random.uniform(others, (4, b, width, max(longest, 1)))
    strength = jnp.where(side < 0.5, -1.0, 1.0) * (0.1 + (jnp.asarray(severity, jnp.float32) - 0.1) * level)
    which = (len(names) * pick).astype(jnp.int32)
    length = 1 + (LONGEST * long[..., 0]).astype(jnp.int32) if depth is None else jnp.full((b, width), depth)
    wide = x.astype(jnp.float32)
    levels = (wide - low) * (LEVELS / (high - low))

    def chain(u: Any, length: Any, which: Any, strength: Any) -> Any:
        def one(u: Any, at: Any) -> Any:
            i, which, strength = at
            return jnp.where(i < length, _operated(names, which, strength, u), u), None

        steps = jnp.arange(longest), which[:longest], strength[:longest]
        return jax.lax.scan(one, u, steps)[0]

    def change(u: Any, w: Any, *drawn: Any) -> Any:
        return jnp.tensordot(w, jax.vmap(chain, (None, 0, 0, 0))(u, *drawn) - u, 1)

    moved = jax.vmap(change)(levels, w, length, which, strength)
    return (wide + m[:, None, None, None] * moved * ((high - low) / LEVELS)).astype(x.dtype)


def operate(
    name: str, x: Float[Array, "b y x c"], strength: Float[Array, "b"], *, bounds: tuple[float, float] = (0.0, 1.0)
) -> Float[Array, "b y x c"]:
    """One operation on each image, as a chain applies it.

    Args:
      name: out of `AUGMIX_OPS`.
      x: images within `bounds`.
      strength: -10 to 10 each. The sign is which way, for what turns, shears or shifts; for the others it says nothing.

    Raises:
      ValueError: an unknown name, or arrays of other shapes.
    """
    names, x = _named((name,)), _images(x)
    strength = jnp.asarray(strength, jnp.float32)
    if strength.shape != x.shape[:1]:
        raise ValueError(f"strength of shape {strength.shape} for {x.shape[0]} images: expected ({x.shape[0]},)")
    low, high = bounds
    levels = (x.astype(jnp.float32) - low) * (LEVELS / (high - low))
    new = jax.vmap(lambda u, s: _operated(names, jnp.zeros((), jnp.int32), s, u))(levels, strength)
    return (low + new * ((high - low) / LEVELS)).astype(x.dtype)


# ----------------------------------------------------------------------------------------------------------- operations


def _part(strength: Any, most: float) -> Any:
    return jnp.abs(strength) * (most / 10)


def _whole(strength: Any, most: float) -> Any:
    return jnp.floor(_part(strength, most))


def _rotate(strength: Any, y: float, x: float) -> tuple[Any, ...]:
    angle = -jnp.deg2rad(_whole(strength, 30) * jnp.sign(strength))
    c, s = jnp.cos(angle), jnp.sin(angle)
    return c, s, x / 2 - (c * x + s * y) / 2, -s, c, y / 2 + (s * x - c * y) / 2


def _shear_x(strength: Any, y: float, x: float) -> tuple[Any, ...]:
    return 1, _part(strength, 0.3) * jnp.sign(strength), 0, 0, 1, 0


def _shear_y(strength: Any, y: float, x: float) -> tuple[Any, ...]:
    return 1, 0, 0, _part(strength, 0.3) * jnp.sign(strength), 1, 0


def _translate_x(strength: Any, y: float, x: float) -> tuple[Any, ...]:
    return 1, 0, _whole(strength, x / 3) * jnp.sign(strength), 0, 1, 0


def _translate_y(strength: Any, y: float, x: float) -> tuple[Any, ...]:
    return 1, 0, 0, 0, 1, _whole(strength, y / 3) * jnp.sign(strength)


def _autocontrast(u: Any, strength: Any) -> Any:
    low, high = u.min((0, 1)), u.max((0, 1))
    stretched = jnp.floor((u - low) * (LEVELS / jnp.maximum(high - low, 1)) + WHOLE)
    return jnp.where(high > low, stretched, u)


def _equalise(u: Any, strength: Any) -> Any:
    """A level becomes the number of pixels below it, in steps of a 255th of those below the highest level."""

    def channel(u: Int[Array, "n"]) -> Any:
        counts = jnp.zeros(256, jnp.int32).at[u].add(1)
        below = jnp.cumsum(counts) - counts
        step = below[u.max()] // 255
        made = (step // 2 + below) // jnp.maximum(step, 1)
        return jnp.where(step > 0, jnp.clip(made, 0, 255)[u], u)

    flat = u.astype(jnp.int32).reshape(-1, u.shape[-1])
    return jax.vmap(channel, 1, 1)(flat).reshape(u.shape).astype(u.dtype)


def _posterise(u: Any, strength: Any) -> Any:
    step = jnp.exp2(4 + _whole(strength, 4))
    return jnp.floor(u / step) * step


def _solarise(u: Any, strength: Any) -> Any:
    return jnp.where(u < 256 - _whole(strength, 256), u, LEVELS - u)


_OPS = {
    "autocontrast": _Op(grey=_autocontrast),
    "equalise": _Op(grey=_equalise),
    "posterise": _Op(grey=_posterise),
    "rotate": _Op(_rotate),
    "solarise": _Op(grey=_solarise),
    "shear_x": _Op(_shear_x),
    "shear_y": _Op(_shear_y),
    "translate_x": _Op(_translate_x),
    "translate_y": _Op(_translate_y),
}
AUGMIX_OPS = tuple(_OPS)


# ------------------------------------------------------------------------------------------------------------ the parts


def _named(ops: Sequence[str] | None) -> tuple[str, ...]:
    names = AUGMIX_OPS if ops is None else tuple(ops)
    unknown = [n for n in names if n not in _OPS]
    if unknown or not names:
        raise ValueError(f"operations {names!r}: expected some of {', '.join(AUGMIX_OPS)}")
    return names


def _images(x: Any) -> Array:
    x = jnp.asarray(x)
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"images are {x.dtype}{list(x.shape)}: expected floats (batch, height, width, channels)")
    return x


def _operated(names: tuple[str, ...], which: Any, strength: Any, u: Any) -> Any:
    """Operation number `which` on one image's levels (y, x, c). All places are read at once: a choice under `vmap` would
    compute each branch for each image, and sampling is what costs."""
    y, x = float(u.shape[0]), float(u.shape[1])
    u = jnp.clip(jnp.round(u), 0, LEVELS)
    still = (1, 0, 0, 0, 1, 0)
    ops = [_OPS[n] for n in names]
    if any(op.place for op in ops):
        rows = [op.place(strength, y, x) if op.place else still for op in ops]
        place = jnp.stack([jnp.stack([jnp.asarray(v, jnp.float32) for v in row]) for row in rows])[which]
        u = jnp.floor(_sampled(u, place) + WHOLE)
    for i, op in enumerate(ops):
        if op.grey is not None:
            u = jnp.where(which == i, op.grey(u, strength), u)
    return u


def _sampled(u: Float[Array, "y x c"], place: Float[Array, "6"]) -> Float[Array, "y x c"]:
    """The image at (a x + b y + c, d x + e y + f) for each pixel's middle, between pixels linearly; black outside."""
    height, width, channels = u.shape
    y, x = jnp.indices((height, width), jnp.float32) + 0.5
    a, b, c, d, e, f = place
    at_x, at_y = a * x + b * y + c, d * x + e * y + f
    inside = (at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < height)
    left, top = jnp.floor(at_x - 0.5), jnp.floor(at_y - 0.5)
    to_x, to_y = (at_x - 0.5 - left)[..., None], (at_y - 0.5 - top)[..., None]
    flat = u.reshape(-1, channels)

    def read(down: int, right: int) -> Any:
        row = jnp.clip(top.astype(jnp.int32) + down, 0, height - 1)
        return flat[row * width + jnp.clip(left.astype(jnp.int32) + right, 0, width - 1)]

    upper = read(0, 0) * (1 - to_x) + read(0, 1) * to_x
    lower = read(1, 0) * (1 - to_x) + read(1, 1) * to_x
    return jnp.where(inside[..., None], upper * (1 - to_y) + lower * to_y, 0)
