"""NSGA-II: crowding, elitism, and a problem with a known front."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.tune import non_dominated
from jaxpeft.tune.nsga2 import Candidates, crowding, nsga2


def test_crowding_is_the_box_between_neighbours_and_infinite_at_the_ends():
    scores = jnp.array([[0.0, 4.0], [1.0, 3.0], [3.0, 1.0], [4.0, 0.0], [9.0, 9.0]])
    got = crowding(scores, jnp.array([0, 0, 0, 0, 1]))
    assert np.isinf(np.asarray(got)[[0, 3, 4]]).all()
    # Both objectives span 9 over the whole population.
    np.testing.assert_allclose(np.asarray(got)[[1, 2]], [3 / 9 + 3 / 9] * 2, rtol=1e-6)


def run(search, objective, rounds, seed=0):
    @jax.jit
    def one(state, key):
        candidates, state = search.ask(state, key)
        return search.tell(state, candidates, objective(candidates))

    state = search.init(jax.random.key(seed))
    for key in jax.random.split(jax.random.key(seed + 1), rounds):
        state = one(state, key)
    return state


def test_it_finds_the_front_of_opposite_objectives():
    """Ones cost, zeros cost: every number of ones is on the front, if the ones stand first."""
    weight = jnp.arange(1.0, 9.0)

    def objective(c):
        return jnp.stack([(c.bits * weight).sum(1), (~c.bits).sum(1) * 1.0], 1)

    state = run(nsga2(8, population=24), objective, 60)
    front = np.unique(np.asarray(state.scores)[np.asarray(non_dominated(state.scores))], axis=0)
    best = {k: weight[:k].sum() for k in range(9)}
    hit = sum(float(cost) == float(best[8 - int(zeros)]) for cost, zeros in front)
    assert hit >= 8, front


def test_numbers_move_to_where_the_objective_is_least():
    def objective(c):
        return jnp.stack([jnp.square(c.numbers - 0.3).sum(1), jnp.square(c.numbers - 0.3).sum(1)], 1)

    state = run(nsga2(0, 3, population=20), objective, 60)
    np.testing.assert_allclose(state.parents.numbers[0], 0.3, atol=0.05)


def test_the_best_are_never_lost_and_nan_never_stays():
    def objective(c):
        ones = c.bits.sum(1) * 1.0
        return jnp.stack([jnp.where(ones > 4, jnp.nan, -ones), jnp.zeros_like(ones)], 1)

    search = nsga2(6, population=8)
    state, least = search.init(jax.random.key(0)), []
    for key in jax.random.split(jax.random.key(1), 12):
        candidates, state = search.ask(state, key)
        state = search.tell(state, candidates, objective(candidates))
        least.append(float(state.scores[:, 0].min()))
    assert all(b <= a for a, b in itertools.pairwise(least))
    assert least[-1] == -4
    assert jnp.isfinite(state.scores).all()


def test_the_first_candidates_may_be_given():
    start = Candidates(jnp.eye(4, dtype=bool), jnp.zeros((4, 1)))
    search = nsga2(4, 1, population=4, start=start)
    asked, _ = search.ask(search.init(jax.random.key(0)), jax.random.key(1))
    assert (asked.bits == start.bits).all()


def test_bad_sizes_are_refused():
    for wrong in ((0, 0, 8), (3, 0, 5), (3, 0, 2)):
        with pytest.raises(ValueError, match=f"bits {wrong[0]}, numbers 0, population {wrong[2]}"):
            nsga2(wrong[0], wrong[1], population=wrong[2])
