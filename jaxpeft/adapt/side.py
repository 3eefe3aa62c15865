"""What side networks (LST, UniPT, SHERL) share: their linear layers and norms, and the way they answer for a model.

Letters: b batch, t positions, d width, n inputs of a product, m its outputs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxpeft.adapt.structure import ARGUMENTS, Structure, argument, marked, shapes_of
from jaxpeft.hooks import unhooked
from jaxpeft.method import ApplyFn, Call, Params, stacked_keys
from jaxpeft.models import fused
from jaxpeft.models.clip import ClipTextConfig
from jaxpeft.models.decoder import DecoderConfig
from jaxpeft.models.encoder_decoder import EncoderDecoderConfig
from jaxpeft.models.layers import extend_left
from jaxpeft.readers import At, Taps, read
from jaxpeft.trees import wide_dtype

__all__ = [
    "Stack",
    "answering",
    "drop",
    "layer_norm",
    "linear",
    "linear_start",
    "mask_of",
    "norm_start",
    "of",
    "picked",
    "stacks",
    "state_taps",
    "states",
]

# ------------------------------------------------------------------------------------------------------- small layers


def linear_start(
    key: Key[Array, ""], n: int, m: int, std: float | None, dtype: Any, stack: tuple[int, ...] = ()
) -> dict[str, Array]:
    """{"kernel": (*stack, n, m), "bias": (*stack, m)}: U(-1/√n, 1/√n) for both, or N(0, std²) and zeros."""
    if stack:
        start = lambda k: linear_start(k, n, m, std, dtype, stack[1:])
        return jax.vmap(start)(stacked_keys(key, stack[:1]))
    if std is not None:
        return {"kernel": std * jax.random.normal(key, (n, m), dtype), "bias": jnp.zeros((m,), dtype)}
    kernel, bias = jax.random.split(key)
    bound = 1 / math.sqrt(n)
    return {
        "kernel": jax.random.uniform(kernel, (n, m), dtype, -bound, bound),
        "bias": jax.random.uniform(bias, (m,), dtype, -bound, bound),
    }


def linear(p: Mapping[str, Array], x: Float[Array, "b t n"]) -> Float[Array, "b t m"]:
    """x W + b in the dtype of x."""
    return x @ p["kernel"].astype(x.dtype) + p["bias"].astype(x.dtype).reshape(1, 1, -1)


def norm_start(m: int, dtype: Any, stack: tuple[int, ...] = ()) -> dict[str, Array]:
    """A layer norm's {"scale": ones, "bias": zeros}."""
    return {"scale": jnp.ones((*stack, m), dtype), "bias": jnp.zeros((*stack, m), dtype)}


def layer_norm(
    p: Mapping[str, Array], x: Float[Array, "b t m"], eps: float = 1e-5, plain: bool = False
) -> Float[Array, "b t m"]:
    """Layer norm over the last axis in at least float32, the result in the dtype of x; `plain` for forward mode."""
    wide = wide_dtype(x.dtype)
    norm = fused.plain_layer_norm if plain else fused.layer_norm
    return norm(x, p["scale"].astype(wide), p["bias"].astype(wide), eps)


def drop(x: Array, rate: float, key: Key[Array, ""] | None) -> Array:
    """Dropout, where there is a key and a rate."""
    if key is None or not rate:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def of(p: Any, i: int) -> Any:
    """Layer i of stacked parameters."""
    return jax.tree.map(lambda x: x[i], p)


# ------------------------------------------------------------------------------------------- how they answer for a model


class Stack(NamedTuple):
    """A stack of layers as a side network sees it.

    Attributes:
      name: the key of its part of the delta.
      tap: what the names of its hidden states begin with.
      mask: the model's argument that tells its padding.
      causal: whether a position may see only those up to its own.
    """

    name: str
    tap: str
    mask: str
    causal: bool


def stacks(found: Structure | None) -> tuple[Stack, ...]:
    """One stack, "side", or an encoder-decoder's two; `found` is None where no Linen model's structure is known."""
    if found is not None and isinstance(found.config, EncoderDecoderConfig):
        return Stack("encoder", "encoder_", ARGUMENTS[0], False), Stack("decoder", "decoder_", ARGUMENTS[1], True)
    causal = found is not None and isinstance(found.config, DecoderConfig | ClipTextConfig)
    return (Stack("side", "" if found is None else found.tap, ARGUMENTS[0], causal),)


def states(call: Call, stack: Stack) -> list[Any]:
    """The shapes of a stack's hidden states, the embedding's output first.

    Raises:
      TapError: the model does not mark them.
    """
    names = [f"{stack.tap}embedded", f"{stack.tap}hidden"]
    seen = lambda p, *a, **k: read(call.apply_fn, names)(p, *a, **k)[1]
    return state_taps(shapes_of(seen, call.params, call.inputs, call.kwargs), stack)


def picked(seen: Sequence[Any], indices: Sequence[int] | None, stack: Stack, what: str) -> list[Any]:
    """The states of a stack that a side network reads: those at `indices` in their order, or all.

    Raises:
      ValueError: a state that there is not, or of which not all positions were computed.
    """
    at = range(len(seen)) if indices is None else sorted(set(indices))
    if not all(0 <= i < len(seen) for i in at):
        raise ValueError(
            f"states={list(at)}: the {stack.name} has {what} the states 0 (its embedding) to {len(seen) - 1}"
        )
    if odd := [i for i in at if seen[i].shape != seen[0].shape]:
        raise ValueError(
            f"state {odd[0]} has shape {seen[odd[0]].shape} where the embedding has {seen[0].shape}: a reader needs all "
            "positions (config narrow=False)"
        )
    return [seen[i] for i in at]


def state_taps(taps: Mapping[str, list[Any]], stack: Stack) -> list[Any]:
    """A stack's hidden states among the taps of a call, the embedding's output first."""
    return [*taps[f"{stack.tap}embedded"], *taps[f"{stack.tap}hidden"]]


def mask_of(taps: Taps, stack: Stack, length: int) -> Int[Array, "b t"] | None:
    """The stack's padding mask, 1 at virtual tokens in front; None where the call gives none."""
    return extend_left(taps.get(argument(stack.mask), [None])[0], length, 1)


def answering(
    apply_fn: ApplyFn,
    found: Structure | None,
    names: Sequence[str],
    answers: Sequence[tuple[At, Callable[[Taps], Array]]],
    inside: tuple[tuple[type[nn.Module], str], ...] = (),
) -> ApplyFn:
    """`apply_fn` with values exchanged by what the backbone has shown and the masks of the call.

    Args:
      apply_fn: the model.
      found: its structure, or None; then the call's keyword `attention_mask`, if there is one, is the mask.
      names: marks to read.
      answers: (place, answer) pairs as in `readers.read`; no hook sees what an answer runs.
      inside: see `structure.marked`.
    """
    given = () if found is None else found.given

    def run(params: Params, *inputs: Any, **kwargs: Any) -> Any:
        outside = {} if given else {argument(n): [kwargs[n]] for n in ARGUMENTS[:1] if kwargs.get(n) is not None}

        def exchanged(inner: ApplyFn, at: At, answer: Callable[[Taps], Array]) -> ApplyFn:
            def reply(taps: Taps) -> Array:
                with unhooked():
                    return answer({**outside, **taps})

            every = [*map(argument, given), *names]
            return lambda *a, **k: read(inner, every, answer_at=at, answer=reply)(*a, **k)[0]

        whole = apply_fn if found is None else marked(apply_fn, found, inside)
        for at, answer in answers:
            whole = exchanged(whole, at, answer)
        return whole(params, *inputs, **kwargs)

    return run
