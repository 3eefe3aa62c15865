"""Prefix-Tuning: Optimizing Continuous Prompts for Generation (Li and Liang, ACL 2021, arXiv:2101.00190).

l learned keys and values stand before the context's in every attention sub-layer, visible to all queries:

    head = softmax(q [P_k; K]^T / sqrt(d_h)) [P_v; V]

In training they come from a network on an embedding E (l, d), one for each kind of attention (self, decoder self,
cross): Z = tanh(E W_1 + b_1) W_2 + b_2, viewed as (l, 2L, heads, d_h), layer i taking slot 2i as keys and 2i + 1 as
values. `mlp=0` learns the tables themselves. `fold` computes Z once for use.

Reference code: jxhe/unify-parameter-efficient-tuning @3222ce2 (E ~ N(0, 1), linear layers U(±1/sqrt(fan_in)), m = 800,
free tables N(0, 0.02²)). It prepends a prefix at each decoding step instead of keeping it in the cache; so do we.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpeft import trees
from jaxpeft.adapt.unified import ATTENTION, DESIGNS, hooks_of
from jaxpeft.hooks import Slots, on_hooks
from jaxpeft.method import Call, Delta, Method, register, site_key

__all__ = ["fold", "prefix_tuning"]


@register(
    family="adapt", paper="Li and Liang, ACL 2021", mechanism="hooks", mergeable=False, exact_start=False, rate=1.5e-3
)
def prefix_tuning(
    length: int = 16, mlp: int = 800, *, at: trees.Pattern = f"{ATTENTION}/core", name: str = "prefix_tuning"
) -> Method:
    """Prefix tuning.

    Args:
      length: l, virtual keys and values per attention, at least 1.
      mlp: m, the width of the reparameterising network; 0 for none.
      at: pattern of attention cores, modules called as `(q, k, v, bias)`.
      name: the key of its delta in a chain.

    Returns:
      A method on hooks. With a network its delta is `{kind: {"embedding" (l, d), "w1" (d, m), "b1", "w2" (m, 2 L d),
      "b2"}}`; without, `{module path: {"key", "value"}}` of (*stack, l, heads, d_h). It does not merge.

    Raises:
      ValueError: a length below 1 or a negative width.
      PatternError: no module matches.
    """
    if length < 1 or mlp < 0:
        raise ValueError(f"length {length}, mlp {mlp}: a prefix has at least one position, a network no negative width")
    hooks = hooks_of(DESIGNS["prefix_tuning"][0], length, at, 0.0, None)
    config = dict(method="prefix_tuning", length=length, mlp=mlp, at=at, name=name)
    if not mlp:
        return on_hooks(name, hooks, config)

    def init(key: Key[Array, ""], slots: Slots, call: Call) -> Delta:
        return {
            kind: _network(site_key(key, kind), slots, places, length, mlp) for kind, places in _kinds(slots).items()
        }

    return on_hooks(name, hooks, config, init=init, emit=tables)


def tables(delta: Delta, slots: Slots) -> dict[str, dict[str, Array]]:
    """The keys and values that the networks of `delta` generate, by module path."""
    out: dict[str, dict[str, Array]] = {}
    for kind, places in _kinds(slots).items():
        p = delta[kind]
        z = jnp.tanh(p["embedding"] @ p["w1"] + p["b1"][None]) @ p["w2"] + p["b2"][None]
        length, heads, width = slots[places[0]]["key"].shape
        layers = jnp.moveaxis(z.reshape(length, -1, 2, heads, width), 0, 2)  # (L, 2, l, heads, d_h)
        start = 0
        for place in places:
            stack = slots[place]["key"].stack
            n = math.prod(stack)
            mine = layers[start : start + n].reshape(*stack, 2, length, heads, width)
            out[place] = {"key": mine[..., 0, :, :, :], "value": mine[..., 1, :, :, :]}
            start += n
    return out


def fold(delta: Delta, slots: Slots) -> Delta:
    """The delta of `prefix_tuning(mlp=0)` with the same effect: the networks are needed in training only."""
    return tables(delta, slots)


def _kinds(slots: Slots) -> dict[str, list[str]]:
    """Sites by kind: the path with its layer numbers left out, so that towers and cross attention are kept apart."""
    kinds: dict[str, list[str]] = {}
    for place in slots:
        segments = [s.rstrip("0123456789").rstrip("_") for s in place.split("/")]
        kinds.setdefault("/".join(s for s in segments if s), []).append(place)
    return kinds


def _network(
    key: Key[Array, ""], slots: Slots, places: list[str], length: int, mlp: int
) -> dict[str, Float[Array, "..."]]:
    _, heads, width = slots[places[0]]["key"].shape
    d = heads * width
    layers = sum(math.prod(slots[p]["key"].stack) for p in places)
    k = jax.random.split(key, 5)

    def linear(key: Any, bias_key: Any, n: int, m: int) -> tuple[Array, Array]:
        bound = 1 / math.sqrt(n)
        return jax.random.uniform(key, (n, m), minval=-bound, maxval=bound), jax.random.uniform(
            bias_key, (m,), minval=-bound, maxval=bound
        )

    (w1, b1), (w2, b2) = linear(k[1], k[2], d, mlp), linear(k[3], k[4], mlp, 2 * layers * d)
    return {"embedding": jax.random.normal(k[0], (length, d)), "w1": w1, "b1": b1, "w2": w2, "b2": b2}
