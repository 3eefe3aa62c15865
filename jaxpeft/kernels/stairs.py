"""A cache of keys and values quantised in stairs: the older a token, the fewer bits (SAQ; Li, 2024, arXiv 2410.18441).

The paper's pseudo-code, re-derived. The newest tokens, up to S of them, are kept as they are. When S are together they
become a segment of `levels[0]` bits, and every older segment goes down one stair: it is read and quantised again, at the
next level, down to the last, where it stays. (The paper quantises that tail again at equal bits, which is the identity up to
rounding; it is left out here.) Errors therefore add up along the stairs, by at most half a step each.

    step = (max - min) / (2^B - 1)        code = round((x - min) / step)        x' = code step + min

Keys share a step over G tokens of one channel, values over G channels of one token (KIVI; Liu et al., ICML 2024). Keys are
kept as they are given: after rotary positions, if there are any.

All levels are stored as one byte a number, so `average_bits` counts levels, not bytes held. Leading axes are sequences that
grow together, with one length; vmap the functions where lengths differ.

Letters: c capacity, g heads of keys, d width, S segment, G group.
"""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxpeft.kernels.platforms import KernelError

__all__ = ["Stairs", "average_bits", "saq_append", "saq_init", "saq_read"]


@jtu.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stairs:
    """A cache, oldest token first; see the module.

    Attributes:
      key_code, value_code: int8; a stored x is code * step + zero.
      key_step, key_zero: of G tokens, one a channel, float32.
      value_step, value_zero: of G channels of a token, float32.
      recent_key, recent_value: the newest tokens, of which `length % S` are live.
      length: tokens appended, one number or one a sequence.
      levels, segment, group: static.
    """

    key_code: Int[Array, "*b g c d"]
    value_code: Int[Array, "*b g c d"]
    key_step: Float[Array, "*b g c/G d"]
    key_zero: Float[Array, "*b g c/G d"]
    value_step: Float[Array, "*b g d/G c"]
    value_zero: Float[Array, "*b g d/G c"]
    recent_key: Float[Array, "*b g S d"]
    recent_value: Float[Array, "*b g S d"]
    length: Int[Array, "*#b"]
    levels: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    segment: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Tokens that the quantised part can hold; S - 1 more fit beside it."""
        return self.key_code.shape[-2]


def saq_init(
    capacity: int,
    heads: int,
    width: int,
    levels: tuple[int, ...] = (8, 4, 2),
    segment: int = 64,
    group: int = 32,
    dtype: Any = jnp.float32,
    batch: tuple[int, ...] = (),
) -> Stairs:
    """An empty cache.

    Args:
      capacity: tokens, a multiple of the segment.
      heads, width: of the keys, and of the values.
      levels: bits from the newest segment to the tail, falling, 1 to 8. With one level this is KIVI.
      segment: S, a multiple of the group.
      group: G, dividing the width.
      dtype: of the newest tokens.
      batch: leading axes: sequences that grow together.

    Raises:
      KernelError: sizes that do not divide, or other levels.
    """
    if group < 1 or segment < 1 or segment % group or width % group or capacity < 1 or capacity % segment or heads < 1:
        raise KernelError(
            f"capacity {capacity}, segment {segment}, group {group}, width {width}: the group divides the segment and the "
            "width, the segment the capacity"
        )
    falling = all(a > b for a, b in itertools.pairwise(levels))
    if not levels or not falling or not all(1 <= b <= 8 for b in levels):
        raise KernelError(f"levels {levels}: falling numbers of bits from 8 to 1")
    codes = jnp.zeros((*batch, heads, capacity, width), jnp.int8)
    of_keys = jnp.zeros((*batch, heads, capacity // group, width), jnp.float32)
    of_values = jnp.zeros((*batch, heads, width // group, capacity), jnp.float32)
    recent = jnp.zeros((*batch, heads, segment, width), dtype)
    return Stairs(
        codes,
        codes,
        of_keys,
        of_keys,
        of_values,
        of_values,
        recent,
        recent,
        jnp.zeros((), jnp.int32),
        tuple(levels),
        segment,
        group,
    )


def quantise(x: Float[Array, "*n G m"], bits: int) -> tuple[Array, Array, Array]:
    """`(code, step, zero)` of groups along the second axis from the end; |x - (code step + zero)| <= step / 2.

    A group of equal numbers has step 1, and zero holds the number.
    """
    x = x.astype(jnp.float32)
    low, high = x.min(-2), x.max(-2)
    step = (high - low) / (2**bits - 1)
    step = jnp.where(step > 0, step, jnp.ones((), jnp.float32))
    code = jnp.round((x - low[..., None, :]) / step[..., None, :])
    # Less half of their range: a sum of codes times steps must not be a small difference of large numbers.
    half = 2 ** (bits - 1)
    code = jnp.clip(code, 0, 2**bits - 1) - half
    return code.astype(jnp.int8), step, low + half * step


def _quantise_segment(k: Array, v: Array, bits: int, group: int) -> tuple[Array, ...]:
    """Codes, steps and zeros of a segment (..., S, d), as the cache holds them."""
    *lead, s, d = k.shape
    key_code, key_step, key_zero = quantise(k.reshape(*lead, s // group, group, d), bits)
    # Channels of one token: the group's axis second from the end, tokens last.
    value_code, value_step, value_zero = quantise(v.swapaxes(-1, -2).reshape(*lead, d // group, group, s), bits)
    return (
        key_code.reshape(*lead, s, d),
        value_code.reshape(*lead, d, s).swapaxes(-1, -2),
        key_step,
        key_zero,
        value_step,
        value_zero,
    )


def _dequantise(codes: tuple[Array, ...], group: int) -> tuple[Array, Array]:
    key_code, value_code, key_step, key_zero, value_step, value_zero = codes
    over_tokens = lambda x: jnp.repeat(x, group, axis=-2)
    over_channels = lambda x: jnp.repeat(x.swapaxes(-1, -2), group, axis=-1)
    return (
        key_code.astype(jnp.float32) * over_tokens(key_step) + over_tokens(key_zero),
        value_code.astype(jnp.float32) * over_channels(value_step) + over_channels(value_zero),
    )


def _held(cache: Stairs) -> tuple[Array, ...]:
    return (
        cache.key_code,
        cache.value_code,
        cache.key_step,
        cache.key_zero,
        cache.value_step,
        cache.value_zero,
    )


def saq_append(cache: Stairs, k: Float[Array, "*b g d"], v: Float[Array, "*b g d"]) -> Stairs:
    """The cache with one more token; where a segment fills up, everything goes down its stair.

    Segments past the capacity are lost: the caller counts. Under vmap every token pays for going down the stairs.
    """
    s = cache.segment
    at = cache.length % s
    put = lambda kept, new: lax.dynamic_update_slice_in_dim(
        kept, new[..., None, :].astype(kept.dtype), at, axis=kept.ndim - 2
    )
    recent = (put(cache.recent_key, k), put(cache.recent_value, v))
    held = lax.cond(at == s - 1, lambda: _descend(cache, *recent), lambda: _held(cache))
    names = ("key_code", "value_code", "key_step", "key_zero", "value_step", "value_zero")
    return dataclasses.replace(
        cache,
        recent_key=recent[0],
        recent_value=recent[1],
        length=cache.length + 1,
        **dict(zip(names, held)),
    )


def _descend(cache: Stairs, k: Array, v: Array) -> tuple[Array, ...]:
    """All segments one stair lower, and the newest tokens as a segment of the first level."""
    s, group = cache.segment, cache.group
    segments = cache.length // s  # before this one
    # Of each array: the axis of tokens, and how many entries a segment has there.
    rows, columns = k.ndim - 2, k.ndim - 1
    lengths = ((rows, s), (rows, s), (rows, s // group), (rows, s // group), (columns, s), (columns, s))

    def write(held: tuple[Array, ...], number: Array, new: tuple[Array, ...]) -> tuple[Array, ...]:
        fits = (number >= 0) & (number < cache.capacity // s)
        out = []
        for x, y, (axis, n) in zip(held, new, lengths):
            start = jnp.maximum(number, 0) * n
            old = lax.dynamic_slice_in_dim(x, start, n, axis)
            out.append(lax.dynamic_update_slice_in_dim(x, jnp.where(fits, y, old), start, axis))
        return tuple(out)

    held = _held(cache)
    for age, bits in enumerate(cache.levels[1:], 1):
        number = segments - age
        old = tuple(
            lax.dynamic_slice_in_dim(x, jnp.maximum(number, 0) * n, n, axis) for x, (axis, n) in zip(held, lengths)
        )
        held = write(held, number, _quantise_segment(*_dequantise(old, group), bits, group))
    return write(held, segments, _quantise_segment(k, v, cache.levels[0], group))


def saq_read(cache: Stairs) -> tuple[Float[Array, "*b g n d"], Float[Array, "*b g n d"], Bool[Array, "n"]]:
    """`(keys, values, live)` in float32, n = capacity + S: the quantised part, then the newest tokens."""
    k, v = _dequantise(_held(cache), cache.group)
    past, recent = cache.length // cache.segment * cache.segment, cache.length % cache.segment
    live = jnp.concatenate(
        [
            jnp.arange(cache.capacity, dtype=jnp.int32) < past,
            jnp.arange(cache.segment, dtype=jnp.int32) < recent,
        ]
    )
    join = lambda x, y: jnp.concatenate([x, y.astype(jnp.float32)], axis=-2)
    return join(k, cache.recent_key), join(v, cache.recent_value), live


def average_bits(cache: Stairs, *, scales: bool = False) -> Float[Array, ""]:
    """Bits a stored number takes, over the live tokens; with `scales` the steps and zeros count (64 bits a group).

    The segment of age i (newest 1) has `levels[min(i, last)]` bits, the newest tokens those of their type. 0 when empty.
    """
    s, last = cache.segment, len(cache.levels)
    segments, recent = cache.length // s, cache.length % s
    total = recent * jnp.dtype(cache.recent_key.dtype).itemsize * 8
    for age, bits in enumerate(cache.levels, 1):
        many = jnp.maximum(segments - (age - 1), 0)
        total += s * bits * (many if age == last else jnp.minimum(many, 1))
    total = total.astype(jnp.float32)
    if scales:
        total += (segments * s).astype(jnp.float32) * (64 / cache.group)
    return total / jnp.maximum(cache.length, 1).astype(jnp.float32)
