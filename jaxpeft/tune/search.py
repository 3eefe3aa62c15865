"""One interface for searches whose objective is a black box: ask for candidates, tell their scores.

    search = bandit(...) or nsga2(...)
    state  = search.init(key)
    for _ in range(rounds):
        candidates, state = search.ask(state, key)          # a tree with a leading axis: vmap over it
        state = search.tell(state, candidates, scores)      # (n,) or (n, objectives), smaller is better

All three are pure functions of arrays; a round, or the whole search, may stand in one compiled program. A score that is
not finite loses to every finite one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

__all__ = ["Search", "non_dominated", "pareto_ranks", "worst_if_not_finite"]


class Search(NamedTuple):
    """A search as three pure functions.

    Attributes:
      init: `(key) -> state`.
      ask: `(state, key) -> (candidates, state)`.
      tell: `(state, candidates, scores) -> state`.
      best: `(state) -> candidate`, what the search holds for best so far.
    """

    init: Callable[..., Any]
    ask: Callable[..., tuple[PyTree, Any]]
    tell: Callable[..., Any]
    best: Callable[..., PyTree]


def worst_if_not_finite(scores: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """NaN and infinities as +inf."""
    return jnp.where(jnp.isfinite(scores), scores, jnp.inf)


def dominates(scores: Float[Array, "n m"]) -> Bool[Array, "n n"]:
    """Whether i is nowhere worse than j and somewhere better (smaller)."""
    a, b = scores[:, None], scores[None]
    return jnp.all(a <= b, axis=-1) & jnp.any(a < b, axis=-1)


def non_dominated(scores: Float[Array, "n m"]) -> Bool[Array, "n"]:
    """The Pareto front: candidates that no other dominates."""
    return ~dominates(worst_if_not_finite(scores)).any(0)


def pareto_ranks(scores: Float[Array, "n m"]) -> Array:
    """The front of each candidate: 0 for those that none dominates, 1 for those that only rank 0 dominates, ..."""
    beaten_by = dominates(worst_if_not_finite(scores))
    n = scores.shape[0]

    def peel(state: Any) -> Any:
        ranks, left, front = state
        now = left & ~(beaten_by & left[:, None]).any(0)
        return jnp.where(now, front, ranks), left & ~now, front + 1

    start = (jnp.zeros(n, jnp.int32), jnp.ones(n, bool), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(lambda s: s[1].any(), peel, start)[0]
