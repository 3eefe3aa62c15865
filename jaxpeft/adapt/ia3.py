"""(IA)³: Infused Adapter by Inhibiting and Amplifying Inner Activations (Liu et al., NeurIPS 2022, arXiv:2205.05638).

Learned vectors rescale the keys, the values, and the hidden units of the feed-forward network (section 3.3):

    K <- l_k * K,    V <- l_v * V,    h <- l_ff * act(x W_up),    all l = 1 at the start.

Keys and values are rescaled with their bias, as in the paper's formula and in `peft`; l_ff is the input side of the
down-projection.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxpeft import trees
from jaxpeft.method import Method, on_weights, register
from jaxpeft.roles import Role
from jaxpeft.weights import scaled
from jaxpeft.weights.factored import Factored

__all__ = ["ia3"]


@register(
    family="adapt", paper="Liu et al., NeurIPS 2022", mechanism="weights", mergeable=True, exact_start=True, rate=1e-2
)
def ia3(
    at: trees.Pattern = "**/{attention,cross_attention}/{key,value}/kernel",
    feed_forward: trees.Pattern | None = "**/mlp/down/kernel",
    *,
    name: str = "ia3",
) -> Method:
    """IA3.

    Args:
      at: weights whose outputs are rescaled (their bias too).
      feed_forward: weights whose inputs are rescaled; None for none.
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is `{path: {"out": (*stack, *outer)}}` or `{path: {"in": (*stack, *inner)}}`, ones at the
      start. It merges, and starts as its base.

    Raises:
      PatternError: nothing matches one of the patterns.
    """
    both = [*([at] if isinstance(at, str) else at)]
    inner_patterns = [feed_forward] if isinstance(feed_forward, str) else list(feed_forward or [])

    def start(key: Key[Array, ""], path: str, w: Array, role: Role) -> dict[str, Array]:
        stack, inner, outer = w.shape[: role.stack], w.shape[role.stack : sum(role)], w.shape[sum(role) :]
        inside = bool(inner_patterns) and trees.is_match(inner_patterns, path)
        ones = jnp.ones((*stack, *(inner if inside else outer)), trees.wide_dtype(w.dtype))
        # The number of stacked axes cannot be told from one vector: the name of the leaf says it.
        return {f"{'in' if inside else 'out'}{role.stack or ''}": ones}

    def build(path: str, w: Array, d: dict[str, Array], key: Key[Array, ""] | None) -> Factored:
        side, stack, gain = _read(d)
        return scaled(w, gain, side, stack)

    def beside(path: str, leaves: Mapping[str, Array], d: dict[str, Array]) -> dict[str, Any]:
        side, _, gain = _read(d)
        bias = path.rpartition("/")[0] + "/bias"
        if side == "in" or bias not in leaves:
            return {}
        return {bias: leaves[bias] * gain.astype(leaves[bias].dtype)}

    return on_weights(
        name,
        [*both, *inner_patterns],
        start,
        build,
        dict(method="ia3", name=name, at=at, feed_forward=feed_forward),
        beside=beside,
    )


def _read(d: dict[str, Array]) -> tuple[Any, int, Array]:
    if len(d) != 1 or not next(iter(d)).startswith(("in", "out")):
        raise KeyError("in or out")
    ((label, gain),) = d.items()
    side = "in" if label.startswith("in") else "out"
    return side, int(label.removeprefix(side) or 0), gain
