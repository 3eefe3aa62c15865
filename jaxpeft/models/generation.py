"""Greedy and sampled generation with a cache: prefill and all steps in one program.

    step = lambda *inputs: decoding(model)(params, *inputs)
    out = jax.jit(lambda ids, mask: generate(step, new_cache(model.config, b, t + n), ids, mask, new_tokens=n))(ids, mask)

A model is here a *step*, `(ids, mask, positions, cache) -> (logits, cache)`: any function that closes over its own
parameters, adapted or not, `many` adapters included. Several models side by side share the tokens and have a cache each;
`combine` makes one row of logits of theirs.

Top-k (Fan et al., "Hierarchical neural story generation", 2018) and top-p (Holtzman et al., "The curious case of neural
text degeneration", 2020) keep the tokens above a threshold, found exactly by bisection over the bit patterns of the
logits (32 steps; sorts are slow on CPUs). Tokens tied with the last one kept are kept too.

Letters: b batch, t prompt columns, n new tokens, v vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, PyTree, UInt32

from jaxpeft.models.cache import Cache
from jaxpeft.models.decoder import positions_from_mask

Step = Callable[[Array, Array, Array, Cache], tuple[Array, Cache]]
Combine = Callable[[list[Float[Array, "b v"]]], Float[Array, "b v"]]


class Sampling(NamedTuple):
    """How tokens are drawn; each a number or one number a row (b,), traced or not.

    Attributes:
      temperature: logits are divided by it; over 0.
      top_k: the k most probable tokens, at least 1; None for all.
      top_p: the fewest most probable tokens whose probabilities sum to p, over 0 to 1; None for all. Acts on what top_k
        left, after the temperature.
    """

    temperature: Any = 1.0
    top_k: Any = None
    top_p: Any = None


PLAIN = Sampling()


class Generated(NamedTuple):
    """What was generated.

    Attributes:
      tokens: padding after a row's stop token.
      lengths: tokens of each row, the stop token included.
      log_probs: of each token under the (combined) logits, before temperature, top-k and top-p; 0 at padding.
    """

    tokens: Int[Array, "b n"]
    lengths: Int[Array, "b"]
    log_probs: Float[Array, "b n"]


def decoding(model: nn.Module) -> Callable[..., tuple[Array, Cache]]:
    """The model as `(params, ids, mask, positions, cache) -> (logits (b, 1, v) of the last column, cache)`.

    All inputs have the batch first: `jaxpeft.many` takes it as it is.
    """

    def apply(params: PyTree, ids: Array, mask: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
        return model.apply(params, ids, mask, positions=positions, cache=cache, last_only=True)  # pyright: ignore[reportReturnType]

    return apply


def generate(
    step: Step | Sequence[Step],
    cache: Cache | Sequence[Cache],
    ids: Int[Array, "b t"],
    mask: Int[Array, "b t"] | None = None,
    *,
    new_tokens: int,
    key: Key[Array, ""] | None = None,
    sampling: Sampling = PLAIN,
    stop: int | Sequence[int] = (),
    pad: int = 0,
    combine: Combine | None = None,
) -> Generated:
    """Continues each row by up to `new_tokens` tokens. Pure; jit it as a whole.

    Args:
      step: a model with its parameters, `(ids, mask, positions, cache) -> (logits, cache)`, or several: `decoding(model)`,
        adapted or not, with what comes before the ids closed over.
      cache: the empty cache of each, with room for t + new_tokens - 1 columns.
      ids: prompts, padded on the left.
      mask: 1 at tokens, 0 at padding; all ones if not given. The last column must be a token in every row.
      new_tokens: n, at least 1.
      key: draws tokens; without it the most probable one is taken.
      sampling: how they are drawn.
      stop: ids that end a row.
      pad: what stands after its end.
      combine: `(logits of each model, (b, v) float32) -> (b, v)`; needed where there are several.

    Raises:
      ValueError: no new tokens, too small a cache, padding in the last column, several models without `combine` or not
        a cache each, sampling values out of range. (Values are checked where they are not traced.)
    """
    steps = (step,) if callable(step) else tuple(step)
    caches = (cache,) if isinstance(cache, Cache) else tuple(cache)
    stop = (stop,) if isinstance(stop, int) else tuple(stop)
    mask = jnp.ones_like(ids) if mask is None else mask
    _check(steps, caches, ids, mask, new_tokens, sampling, combine)
    join = combine or (lambda logits: logits[0])

    def ask(caches: Any, ids: Array, mask: Array, positions: Array) -> tuple[Array, Any]:
        answers = [s(ids, mask, positions, c) for s, c in zip(steps, caches)]
        return join([logits[:, -1].astype(jnp.float32) for logits, _ in answers]), tuple(c for _, c in answers)

    def choose(logits: Array, done: Array, i: Any) -> tuple[Array, Array, Array]:
        token = logits.argmax(-1) if key is None else draw(jax.random.fold_in(key, i), logits, sampling)
        score = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], 1)[:, 0]
        token = jnp.where(done, pad, token).astype(ids.dtype)
        ends = functools.reduce(jnp.logical_or, [token == s for s in stop], jnp.zeros_like(done))
        return token, jnp.where(done, 0.0, score), done | ends

    positions = positions_from_mask(mask)
    logits, caches = ask(caches, ids, mask, positions)
    start = choose(logits, jnp.zeros(ids.shape[0], bool), 0)

    def one(state: Any, i: Array) -> tuple[Any, Any]:
        caches, token, position, done = state
        logits, caches = ask(caches, token[:, None], jnp.ones_like(token)[:, None], position[:, None])
        token, score, now = choose(logits, done, i)
        return (caches, token, position + 1, now), (token, score, done)

    state = (caches, start[0], positions[:, -1] + 1, start[2])
    _, (tokens, scores, done) = lax.scan(one, state, jnp.arange(1, new_tokens))
    first = lambda x, rest: jnp.concatenate([x[None], rest]).T
    lengths = new_tokens - done.sum(0, dtype=jnp.int32)
    return Generated(first(start[0], tokens), lengths, first(start[1], scores))


def _check(
    steps: tuple[Step, ...],
    caches: tuple[Cache, ...],
    ids: Array,
    mask: Array,
    new_tokens: int,
    sampling: Sampling,
    combine: Combine | None,
) -> None:
    if new_tokens < 1:
        raise ValueError(f"new_tokens {new_tokens}: at least 1")
    if len(steps) != len(caches) or not steps:
        raise ValueError(f"{len(steps)} models and {len(caches)} caches: each model needs its own")
    if len(steps) > 1 and combine is None:
        raise ValueError(f"{len(steps)} models need combine=, a function of the list of their logits")
    if mask.shape != ids.shape:
        raise ValueError(f"mask has shape {mask.shape}, ids {ids.shape}; they must be equal")
    need = ids.shape[1] + new_tokens - 1
    for c in caches:
        if c.capacity < need:
            raise ValueError(
                f"a cache of {c.capacity} columns for {ids.shape[1]} of the prompt and {new_tokens} new: it needs {need}"
            )
    if not isinstance(mask, Tracer) and not np.all(np.asarray(mask)[:, -1]):
        raise ValueError("the last column of mask must be a token in every row: pad prompts on the left")
    for name, value, within in (
        ("temperature", sampling.temperature, lambda x: x > 0),
        ("top_k", sampling.top_k, lambda x: x >= 1),
        ("top_p", sampling.top_p, lambda x: (x > 0) & (x <= 1)),
    ):
        if value is not None and not isinstance(value, Tracer) and not np.all(within(np.asarray(value))):
            raise ValueError(f"{name} {value}: temperature is over 0, top_k at least 1, top_p over 0 and at most 1")


# ------------------------------------------------------------------------------------------------------------ sampling


def draw(key: Key[Array, ""], logits: Float[Array, "b v"], sampling: Sampling) -> Int[Array, "b"]:
    """One token a row from softmax(logits / temperature), cut by top-k and then by top-p."""
    logits = cut(logits / _column(sampling.temperature), sampling.top_k, sampling.top_p)
    return jax.random.categorical(key, logits, axis=-1)


def cut(logits: Float[Array, "b v"], top_k: Any = None, top_p: Any = None) -> Float[Array, "b v"]:
    """The logits with -inf at tokens that top-k and then top-p leave out; see `Sampling`."""
    if top_k is not None:
        ones = jnp.ones_like(logits)
        logits = jnp.where(_at_top(logits, ones, _column(top_k)), logits, -jnp.inf)
    if top_p is not None:
        p = _column(top_p)
        # Rounding must not cut the tail where nothing is to be cut.
        logits = jnp.where(_at_top(logits, jax.nn.softmax(logits), p) | (p >= 1), logits, -jnp.inf)
    return logits


def _column(x: Any) -> Float[Array, "#b 1"]:
    return jnp.asarray(x, jnp.float32).reshape(-1, 1)


def _at_top(x: Float[Array, "b v"], weight: Float[Array, "b v"], amount: Float[Array, "#b 1"]) -> Array:
    """Where the weights of all that is larger sum to less than `amount`."""
    code = _ordered(x)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        less = jnp.where(code > middle, weight, 0.0).sum(-1, keepdims=True) < amount
        return jnp.where(less, low, middle + 1), jnp.where(less, middle, high)

    low = jnp.zeros((x.shape[0], 1), jnp.uint32)
    return code >= lax.fori_loop(0, 32, halve, (low, jnp.full_like(low, 2**32 - 1)))[1]


def _ordered(x: Float[Array, "*n"]) -> UInt32[Array, "*n"]:
    """Bit patterns of float32 as unsigned integers in the order of the numbers."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(2**31)
    return jnp.where(bits >= sign, ~bits, bits | sign)
