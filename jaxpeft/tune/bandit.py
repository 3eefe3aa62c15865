"""Which k of n arms can go: the bandit of DAS (Wu et al., Parameter and Computation Efficient Transfer Learning for
Vision-Language Pre-trained Models, NeurIPS 2023, arXiv:2309.01479).

Each arm i (a layer that may be skipped) has a preference r_i, p_i = sigmoid(r_i). Subsets of size k are drawn without
replacement with probabilities proportional to p; c distinct ones make a round, and after their losses

    R_j = exp(-loss_j),    r_i <- r_i + lambda (R_j - mean R) p_i (1 - p_i)      for every j and i in S_j

with p from before the round. This is neither the exact policy gradient of sampling without replacement nor the Bernoulli
score function: it is what the reference does (DoubtedSteam/DAS @1d6a0d6). Rewards vanish where losses are over five: scale
the loss or lambda.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxpeft.tune.search import Search, worst_if_not_finite

__all__ = ["BanditState", "bandit", "bandit_update", "sample_subset", "sample_subsets"]


class BanditState(NamedTuple):
    """State of `bandit`."""

    preferences: Float[Array, "n"]  # r


def sample_subset(key: Key[Array, ""], preferences: Float[Array, "n"], k: int) -> Bool[Array, "n"]:
    """k of n arms, as drawn one after another without replacement with probability proportional to sigmoid(r).

    Gumbel noise on log p and the k largest: the same law as sequential draws.
    """
    noisy = jax.nn.log_sigmoid(preferences) + jax.random.gumbel(key, preferences.shape)
    chosen = jnp.argsort(-noisy)[:k]
    return jnp.zeros(preferences.shape, bool).at[chosen].set(True)


def sample_subsets(key: Key[Array, ""], preferences: Float[Array, "n"], k: int, count: int) -> Bool[Array, "c n"]:
    """`count` distinct subsets, each drawn until it is none of those before it.

    Raises:
      ValueError: fewer than `count` subsets of size k exist.
    """
    n = preferences.shape[0]
    exist = 1
    for i in range(min(k, n - k)):
        exist = exist * (n - i) // (i + 1)
    if not 1 <= k < n or exist < count:
        raise ValueError(f"{count} distinct subsets of {k} of {n} arms: there are {exist if 0 <= k <= n else 0}")
    drawn = jnp.zeros((count, n), bool)

    def one(i: Array, state: Any) -> Any:
        def again(state: Any) -> Any:
            key, _ = state
            key, draw = jax.random.split(key)
            return key, sample_subset(draw, preferences, k)

        def repeated(state: Any) -> Array:
            return ((drawn_so_far == state[1]).all(1) & (jnp.arange(count) < i)).any()

        key, drawn_so_far = state
        key, subset = jax.lax.while_loop(repeated, again, again((key, jnp.zeros(n, bool))))
        return key, drawn_so_far.at[i].set(subset)

    return jax.lax.fori_loop(0, count, one, (key, drawn))[1]


def bandit_update(
    preferences: Float[Array, "n"], subsets: Bool[Array, "c n"], losses: Float[Array, "c"], rate: Any
) -> Float[Array, "n"]:
    """r after one round; see the module. A loss that is not finite is a reward of zero."""
    rewards = jnp.exp(-worst_if_not_finite(losses.astype(jnp.float32)))
    p = jax.nn.sigmoid(preferences)
    return preferences + rate * p * (1 - p) * ((rewards - rewards.mean()) @ subsets.astype(jnp.float32))


def bandit(arms: int, k: int, *, subsets: int = 3, rate: Any = 1.0) -> Search:
    """The bandit as a search over subsets (masks) of size k; `best` are the arms whose going hurts least.

    Args:
      arms: n.
      k: 1 to n - 1.
      subsets: c, asked for at a time, at least 2 (a single one is always the mean).
      rate: lambda; may be traced.

    Raises:
      ValueError: sizes out of range, or fewer than c subsets.
    """
    if subsets < 2:
        raise ValueError(f"subsets {subsets}: rewards are compared, so there are at least two")
    sample_shape = jax.ShapeDtypeStruct((arms,), jnp.float32)
    jax.eval_shape(lambda r: sample_subsets(jax.random.key(0), r, k, subsets), sample_shape)

    def init(key: Any = None) -> BanditState:
        return BanditState(jnp.zeros(arms))

    def ask(state: BanditState, key: Key[Array, ""]) -> tuple[Bool[Array, "c n"], BanditState]:
        return sample_subsets(key, state.preferences, k, subsets), state

    def tell(state: BanditState, candidates: Bool[Array, "c n"], scores: Float[Array, "c"]) -> BanditState:
        return BanditState(bandit_update(state.preferences, candidates, scores, rate))

    def best(state: BanditState) -> Bool[Array, "n"]:
        chosen = jnp.argsort(-state.preferences, stable=True)[:k]
        return jnp.zeros(arms, bool).at[chosen].set(True)

    return Search(init, ask, tell, best)
