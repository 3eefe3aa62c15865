"""Attentions of real layers, forward and backward, to compile for devices that are not here: (name, function, shapes)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.kernels.attention import attention
from jaxpeft.kernels.block_selection import Selection
from jaxpeft.kernels.positions import Position
from jaxpeft.kernels.quantised_attention import quantised_attention
from jaxpeft.kernels.stairs import saq_init
from jaxpeft.kernels.workloads import ATTENTION, Attention

Case = tuple[str, Any, tuple[Any, ...]]


def _full(w: Attention, q: Any, k: Any, v: Any, pk: Any, pv: Any, slopes: Any, mask: Any) -> Any:
    """Everything at once: a shared prefix, biases, padding, log-sum-exp."""
    position = Position(slopes=slopes, distance="harmonic")
    return attention(q, k, v, prefix=(pk, pv), position=position, key_mask=mask, causal=w.causal, with_lse=True)


def _prefix(w: Attention, q: Any, k: Any, v: Any, pk: Any, pv: Any) -> Any:
    return attention(q, k, v, prefix=(pk, pv), causal=w.causal, with_lse=True)


def _selected(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return attention(q, k, v, selection=Selection(mask, 128, 5), causal=True, with_lse=True)


def _gradients(function: Any, floats: int) -> Any:
    def loss(*args: Any) -> Any:
        o, lse = function(*args)
        return o.astype(jnp.float32).sum() + lse.sum()

    return jax.grad(loss, argnums=tuple(range(floats)))


def _cases() -> list[Case]:
    found: list[Case] = []
    for dtype in (jnp.float32, jnp.bfloat16):
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
        for w in ATTENTION:
            q, kv = shape((w.b, w.t, w.heads, w.head_dim)), shape((w.b, w.s, w.kv_heads, w.head_dim))
            prefix = shape((1, w.prefix, w.kv_heads, w.head_dim))
            slopes, mask = jax.ShapeDtypeStruct((w.heads,), jnp.float32), jax.ShapeDtypeStruct((w.b, w.s), bool)
            few, many = (q, kv, kv, prefix, prefix), (q, kv, kv, prefix, prefix, slopes, mask)
            name = f"{w.name}, {jnp.dtype(dtype).name}"
            plain, full = functools.partial(_prefix, w), functools.partial(_full, w)
            found += [
                (f"attention, prefix, {name}, forward", plain, few),
                (f"attention, prefix, {name}, backward", _gradients(plain, 5), few),
                (f"attention, all, {name}, forward", full, many),
                (f"attention, all, {name}, backward", _gradients(full, 6), many),
            ]
        w = ATTENTION[0]
        q, kv = shape((w.b, w.t, w.heads, w.head_dim)), shape((w.b, w.s, w.kv_heads, w.head_dim))
        blocks = jax.ShapeDtypeStruct((1, w.t // 128, w.s // 128), bool)
        name = f"{w.name}, {jnp.dtype(dtype).name}"
        found += [
            (f"attention, selected, {name}, forward", _selected, (q, kv, kv, blocks)),
            (f"attention, selected, {name}, backward", _gradients(_selected, 3), (q, kv, kv, blocks)),
        ]
        # Products of a single row are a case of their own to the TPU's compiler.
        one_query = _gradients(functools.partial(_prefix, w._replace(causal=False)), 5)
        pair = shape((1, w.prefix, w.kv_heads, w.head_dim))
        found.append(
            (
                f"attention, one query, {name}, backward",
                one_query,
                (shape((1, 1, w.heads, w.head_dim)), kv, kv, pair, pair),
            )
        )
        for sequences in (1, 16):
            cache = jax.eval_shape(
                functools.partial(saq_init, 4096, w.kv_heads, w.head_dim, segment=128, dtype=dtype, batch=(sequences,))
            )
            one = shape((sequences, w.heads, w.head_dim))
            name = f"quantised attention, Llama-3-8B, {sequences} sequences, {jnp.dtype(dtype).name}"
            found.append((name, functools.partial(quantised_attention, with_lse=True), (one, cache)))
    return found


CASES = _cases()
