"""Attention, GELU and layer norm with backward passes of their own: the same numbers, less to keep and to move.

Measured on XLA:CPU (MiniLM, 12 heads of 32, batch 16 x 128, float32) in a stand-alone step with the same formulations,
one change at a time, as ratios of a step's time; the machine's noise was about 5 %:

- attention as batched products over (b, h, t, d) with what the backward pass needs saved, and the output divided by the
  softmax's sum instead of the (t, t) weights: 1.1 to 1.3 times as fast, and 22 MB of temporaries instead of 57;
- in attention's backward pass, dk and dv made transposed, so that the small operand is the one whose rows are summed: in
  a profile of the LoRA step (about 600 ms) the two products took 27 ms instead of 44;
- GELU that keeps its input only: 1.08 (the barrier against keeping more was not timed by itself);
- layer norm that keeps its input and two numbers a row: 1.10; its backward pass behind a fence (see `_fenced`): in
  that profile its loops took about 8 ms instead of 53.

All work under jit, vmap, scan, remat and reverse mode. Forward mode (`jax.jvp`) does not pass a custom_vjp; models take
`plain=True` in their config for it.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float

from jaxpeft import trees


def _along(rows: Array, shape: tuple[int, ...]) -> Array:
    """One number a row, spread over the last axis.

    Not `rows[..., None]`: XLA:CPU gives that axis of size one a layout of its own and copies into it inside the loop it
    fuses. (The copies are gone from the compiled program; what that saves in time has not been told from noise.)
    """
    return lax.broadcast_in_dim(rows, shape, tuple(range(rows.ndim)))


def _fenced(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function`, whose result XLA:CPU forms once instead of computing it again in every loop that reads it.

    Where the gradient of a residual stream meets a product and the next norm, the loop for each of them would repeat
    the whole chain of norms above it: operations that grow with the square of the depth. XLA:CPU drops optimisation
    barriers before it fuses, but leaves a call alone that is marked as not to be inlined.
    """
    call = jax.jit(function)

    def fenced(*args: Array) -> Array:
        with set_xla_metadata(inlineable="false"):
            return call(*args)

    return lambda *args: lax.platform_dependent(*args, cpu=fenced, default=function)


def _heads_first(x: Array, groups: int) -> Array:
    """(b, t, h, d) -> (b, groups, h / groups * t, d): heads that share keys are rows of one product."""
    b, t, h, d = x.shape
    return x.reshape(b, t, groups, h // groups, d).transpose(0, 2, 3, 1, 4).reshape(b, groups, h // groups * t, d)


def _heads_last(x: Array, heads: int) -> Array:
    b, g, rows, d = x.shape
    per = heads // g
    return x.reshape(b, g, per, rows // per, d).transpose(0, 3, 1, 2, 4).reshape(b, rows // per, heads, d)


def _product(a: Array, b: Array, over: tuple[int, int], wide: bool = False) -> Array:
    kind = trees.wide_dtype(a.dtype) if wide else None
    return lax.dot_general(a, b.astype(a.dtype), ((over[:1], over[1:]), ((0, 1), (0, 1))), preferred_element_type=kind)


def _forward(q: Array, k: Array, v: Array, bias: Array | None, scale: float) -> tuple[Array, tuple[Array, ...]]:
    (b, tq, h, _), (_, tk, g, _) = q.shape, k.shape
    q, k, v = _heads_first(q * jnp.asarray(scale, q.dtype), g), _heads_first(k, g), _heads_first(v, g)
    s = _product(q, k, (3, 3), wide=True)
    if bias is not None:
        s = (s.reshape(b, h, tq, tk) + bias.astype(s.dtype)).reshape(s.shape)
    e = jnp.exp(s - _along(s.max(-1), s.shape))
    z = 1 / e.sum(-1)
    o = _product(e.astype(v.dtype), v, (3, 2), wide=True)
    o = (o * _along(z, o.shape)).astype(v.dtype)
    return _heads_last(o, h), (q, k, v, e, z, o)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(
    q: Float[Array, "b tq h d"],
    k: Float[Array, "b tk g d"],
    v: Float[Array, "b tk g d"],
    bias: Float[Array, "#b #h #tq tk"] | None,
    scale: float,
) -> Float[Array, "b tq h d"]:
    """softmax(scale q k^T + bias) v per head, softmax in float32; query head i reads key head i // (h / g)."""
    return _forward(q, k, v, bias, scale)[0]


def _attention_forward(q: Array, k: Array, v: Array, bias: Array | None, scale: float) -> tuple[Array, tuple]:
    y, saved = _forward(q, k, v, bias, scale)
    return y, (*saved, bias)


def _attention_backward(scale: float, saved: tuple, dy: Array) -> tuple[Array, Array, Array, Array | None]:
    q, k, v, e, z, o, bias = saved
    b, tq, h, _ = dy.shape
    g = k.shape[1]
    dy = _heads_first(dy, g)
    wide = dy.astype(z.dtype) * _along(z, dy.shape)
    ds = _product(wide.astype(v.dtype), v, (3, 3), wide=True)
    ds = e * (ds - _along((wide * o.astype(z.dtype)).sum(-1), ds.shape))
    low = ds.astype(q.dtype)
    dq = _product(low, k, (3, 2)) * jnp.asarray(scale, q.dtype)
    dk, dv = _product(q, low, (2, 2)), _product(wide.astype(v.dtype), e.astype(v.dtype), (2, 2))  # (b, g, d, t)
    db = None
    if bias is not None:
        full = ds.reshape(b, h, tq, -1)
        kept = [i for i, n in enumerate(bias.shape) if n == 1 and full.shape[i] != 1]
        db = full.sum(kept, keepdims=True).astype(bias.dtype)  # dead code where nobody learns the bias
    return _heads_last(dq, h), dk.transpose(0, 3, 1, 2), dv.transpose(0, 3, 1, 2), db


attention.defvjp(_attention_forward, _attention_backward)


def _cdf(x: Array) -> Array:
    return 0.5 * lax.erf(x * math.sqrt(0.5)) + 0.5


@jax.custom_vjp
def gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """x Phi(x), exact."""
    return x * _cdf(x)


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    x, dy = lax.optimization_barrier((x, dy))
    return (dy * (_cdf(x) + x * (jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5)),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*b d"], gain: Float[Array, "d"], shift: Float[Array, "d"], eps: float
) -> Float[Array, "*b d"]:
    """(x - mean) / sqrt(var + eps) * gain + shift over the last axis, in float32, result in the dtype of `x`."""
    return _norm(x, gain, shift, eps)[0]


def _norm(x: Array, gain: Array, shift: Array, eps: float) -> tuple[Array, tuple[Array, ...]]:
    wide = x.astype(trees.wide_dtype(x.dtype))
    mean = wide.mean(-1)
    centred = wide - _along(mean, x.shape)  # two passes: E[x²] - E[x]² loses digits where a feature has a large mean
    inverse = lax.rsqrt(jnp.square(centred).mean(-1) + eps)
    row = (1,) * (x.ndim - 1) + gain.shape
    y = centred * _along(inverse, x.shape) * gain.reshape(row) + shift.reshape(row)
    return y.astype(x.dtype), (x, mean, inverse, gain)


def plain_layer_norm(
    x: Float[Array, "*b d"], gain: Float[Array, "d"], shift: Float[Array, "d"], eps: float
) -> Float[Array, "*b d"]:
    """`layer_norm`, differentiated as it stands."""
    return _norm(x, gain, shift, eps)[0]


def _unit(x: Array, mean: Array, inverse: Array) -> Array:
    return (x.astype(mean.dtype) - _along(mean, x.shape)) * _along(inverse, x.shape)


@_fenced
def _norm_backward_to_input(x: Array, mean: Array, inverse: Array, gain: Array, dy: Array) -> Array:
    unit = _unit(x, mean, inverse)
    w = dy.astype(mean.dtype) * gain.reshape((1,) * (x.ndim - 1) + gain.shape)
    dx = w - _along(w.mean(-1), x.shape) - unit * _along((w * unit).mean(-1), x.shape)
    return (dx * _along(inverse, x.shape)).astype(x.dtype)


def _norm_backward(eps: float, saved: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    x, mean, inverse, gain = saved
    dx = _norm_backward_to_input(x, mean, inverse, gain, dy)
    dy, unit = dy.astype(mean.dtype), _unit(x, mean, inverse)
    rows = tuple(range(dy.ndim - 1))
    return dx, (dy * unit).sum(rows).astype(gain.dtype), dy.sum(rows).astype(gain.dtype)


layer_norm.defvjp(lambda x, gain, shift, eps: _norm(x, gain, shift, eps), _norm_backward)
