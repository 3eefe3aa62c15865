"""NSGA-II (Deb et al., IEEE Transactions on Evolutionary Computation 6(2), 2002): several objectives over bits and numbers.

A population of n is kept; each round asks for n children and keeps the best n of both by Pareto front and, within a front,
by crowding distance. Parents win binary tournaments by the same order. Children take each bit from either parent and flip it
with probability 1 / bits; numbers, in [0, 1], go through simulated binary crossover and polynomial mutation (eta = 20).

Candidates are `(bits (n, b) bool, numbers (n, m) in [0, 1])`; scale the numbers outside (a log learning rate, for instance).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpeft.tune.search import Search, pareto_ranks, worst_if_not_finite

__all__ = ["Candidates", "Nsga2State", "crowding", "nsga2"]

ETA = 20.0


class Candidates(NamedTuple):
    """A population."""

    bits: Bool[Array, "n b"]
    numbers: Float[Array, "n m"]


class Nsga2State(NamedTuple):
    """State of `nsga2`."""

    parents: Candidates
    scores: Float[Array, "n k"]  # infinite before the first `tell`
    round: Int[Array, ""]


def crowding(scores: Float[Array, "n k"], ranks: Int[Array, "n"]) -> Float[Array, "n"]:
    """Each candidate's crowding distance within its front: the sides of the box between its neighbours, summed; infinite
    at a front's ends."""
    finite = jnp.where(jnp.isfinite(scores), scores, jnp.nan)
    span = jnp.nanmax(finite, 0) - jnp.nanmin(finite, 0)
    span = jnp.where(jnp.isfinite(span) & (span > 0), span, 1.0)

    def along(values: Float[Array, "n"], span: Array) -> Float[Array, "n"]:
        order = jnp.lexsort((values, ranks))
        front, sorted_values = ranks[order], values[order]
        before = jnp.concatenate([front[:1] - 1, front[:-1]]) == front
        after = jnp.concatenate([front[1:], front[-1:] + 1]) == front
        gap = jnp.roll(sorted_values, -1) - jnp.roll(sorted_values, 1)
        gap = jnp.where(before & after, jnp.nan_to_num(gap / span, nan=0.0), jnp.inf)
        return jnp.zeros_like(values).at[order].set(gap)

    return sum((along(scores[:, i], span[i]) for i in range(scores.shape[1])), jnp.zeros(scores.shape[0]))


def _order(scores: Float[Array, "n k"]) -> Int[Array, "n"]:
    """Candidates from best to worst: by front, then the less crowded first."""
    ranks = pareto_ranks(scores)
    return jnp.lexsort((-crowding(worst_if_not_finite(scores), ranks), ranks))


def nsga2(
    bits: int, numbers: int = 0, *, population: int = 16, objectives: int = 2, start: Candidates | None = None
) -> Search:
    """NSGA-II; see the module.

    Args:
      bits, numbers: how many of each a candidate has; at least one in all.
      population: n, even and at least 4.
      objectives: k, at least 1.
      start: the first candidates; None draws them.

    Returns:
      A search whose candidates are `Candidates` of n rows, whose scores are (n, k), smaller better, and whose `best` are
      the parents on the first front, the others' rows repeated from it (`non_dominated` tells which are).

    Raises:
      ValueError: sizes out of range.
    """
    if bits < 0 or numbers < 0 or not bits + numbers or population < 4 or population % 2 or objectives < 1:
        raise ValueError(
            f"bits {bits}, numbers {numbers}, population {population}, objectives {objectives}: expected at least one "
            "variable and one objective, and an even population of 4 or more"
        )

    def init(key: Key[Array, ""]) -> Nsga2State:
        one, two = jax.random.split(key)
        drawn = Candidates(
            jax.random.bernoulli(one, 0.5, (population, bits)), jax.random.uniform(two, (population, numbers))
        )
        worst = jnp.full((population, objectives), jnp.inf)
        return Nsga2State(drawn if start is None else start, worst, jnp.zeros((), jnp.int32))

    def ask(state: Nsga2State, key: Key[Array, ""]) -> tuple[Candidates, Nsga2State]:
        first = state.round == 0
        children = _children(state.parents, state.scores, key, population)
        return jax.tree.map(lambda a, b: jnp.where(first, a, b), state.parents, children), state

    def tell(state: Nsga2State, candidates: Candidates, scores: Float[Array, "n k"]) -> Nsga2State:
        every = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), state.parents, candidates)
        both = jnp.concatenate([state.scores, worst_if_not_finite(scores)])
        kept = _order(both)[:population]
        return Nsga2State(jax.tree.map(lambda x: x[kept], every), both[kept], state.round + 1)

    def best(state: Nsga2State) -> Candidates:
        front = pareto_ranks(state.scores) == 0
        rows = jnp.where(front, jnp.arange(population), jnp.argmax(front))
        return jax.tree.map(lambda x: x[rows], state.parents)

    return Search(init, ask, tell, best)


def _children(parents: Candidates, scores: Float[Array, "n k"], key: Key[Array, ""], n: int) -> Candidates:
    keys = jax.random.split(key, 6)
    place = jnp.zeros(n, jnp.int32).at[_order(scores)].set(jnp.arange(n, dtype=jnp.int32))
    pairs = jax.random.randint(keys[0], (2, n, 2), 0, n)
    winner = jnp.where(place[pairs[..., 0]] <= place[pairs[..., 1]], pairs[..., 0], pairs[..., 1])
    mother, father = (jax.tree.map(lambda x, w=w: x[w], parents) for w in winner)
    from_mother = jax.random.bernoulli(keys[1], 0.5, mother.bits.shape)
    flip = jax.random.bernoulli(keys[2], 1 / max(mother.bits.shape[1], 1), mother.bits.shape)
    bits = jnp.where(from_mother, mother.bits, father.bits) ^ flip
    u = jax.random.uniform(keys[3], mother.numbers.shape)
    spread = jnp.where(u < 0.5, (2 * u) ** (1 / (ETA + 1)), (0.5 / (1 - u)) ** (1 / (ETA + 1)))
    mixed = 0.5 * ((1 + spread) * mother.numbers + (1 - spread) * father.numbers)
    v = jax.random.uniform(keys[4], mixed.shape)
    step = jnp.where(v < 0.5, (2 * v) ** (1 / (ETA + 1)) - 1, 1 - (2 * (1 - v)) ** (1 / (ETA + 1)))
    mutates = jax.random.bernoulli(keys[5], 1 / max(mixed.shape[1], 1), mixed.shape)
    return Candidates(bits, jnp.clip(mixed + jnp.where(mutates, step, 0.0), 0, 1))
