"""DAS's bandit: the card's oracles."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxpeft.tune.bandit import bandit, bandit_update, sample_subset, sample_subsets


def test_equal_preferences_draw_all_subsets_alike(key):
    draws = jax.vmap(lambda k: sample_subset(k, jnp.zeros(5), 2))(jax.random.split(key, 4000))
    assert (draws.sum(1) == 2).all()
    codes = np.asarray(draws) @ (2 ** np.arange(5))
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == 10
    assert stats.chisquare(counts).pvalue > 1e-3


def test_the_law_is_that_of_sequential_draws_without_replacement(key):
    r = jnp.array([2.0, 0.0, -1.0, -3.0])
    p = np.asarray(jax.nn.sigmoid(r), np.float64)
    want = np.zeros(4)  # how often each arm is among two
    for i, j in itertools.permutations(range(4), 2):
        chance = p[i] / p.sum() * p[j] / (p.sum() - p[i])
        want[[i, j]] += chance
    draws = jax.vmap(lambda k: sample_subset(k, r, 2))(jax.random.split(key, 20000))
    # Five standard errors of a frequency.
    assert (np.abs(np.asarray(draws).mean(0) - want) < 5 * np.sqrt(0.25 / 20000)).all()


def test_a_rounds_subsets_are_distinct(key):
    for k in jax.random.split(key, 20):
        drawn = np.asarray(sample_subsets(k, jnp.zeros(3), 2, 3))
        assert len({tuple(row) for row in drawn}) == 3
    with pytest.raises(ValueError, match="4 distinct subsets of 2 of 3 arms: there are 3"):
        sample_subsets(key, jnp.zeros(3), 2, 4)
    with pytest.raises(ValueError, match="distinct subsets of 3 of 3"):
        sample_subsets(key, jnp.zeros(3), 3, 1)


SUBSETS = jnp.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]], bool)


def test_the_update_is_the_formula(key):
    r, losses = jnp.array([0.3, -0.2, 0.1, 0.5]), jnp.array([0.2, 0.9, 0.4])
    p, rewards = jax.nn.sigmoid(r), jnp.exp(-losses)
    want = np.array(r)
    for j, row in enumerate(np.asarray(SUBSETS)):
        for i in np.flatnonzero(row):
            want[i] += 0.7 * (rewards[j] - rewards.mean()) * p[i] * (1 - p[i])
    got = bandit_update(r, SUBSETS, losses, 0.7)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert got[0] == pytest.approx(float(r[0]), abs=1e-6), "an arm in all subsets"
    assert got[3] == r[3], "an arm in none"
    changes = (got - r) / (p * (1 - p))
    assert float(changes.sum()) == pytest.approx(
        0.7 * float(((rewards - rewards.mean()) * SUBSETS.sum(1)).sum()), abs=1e-6
    )


def test_equal_losses_or_no_rate_change_nothing():
    r = jnp.array([0.3, -0.2, 0.1, 0.5])
    np.testing.assert_allclose(bandit_update(r, SUBSETS, jnp.full(3, 0.4), 1.0), r, atol=1e-7)
    assert (bandit_update(r, SUBSETS, jnp.array([0.1, 0.2, 0.3]), 0.0) == r).all()
    assert jnp.isfinite(bandit_update(r, SUBSETS, jnp.array([0.1, jnp.nan, jnp.inf]), 1.0)).all()


def test_it_finds_planted_arms_in_one_compiled_program():
    useless = jnp.array([0, 1, 0, 0, 1, 0, 0, 0], bool)
    search = bandit(8, 2, rate=5.0)

    @jax.jit
    def run(key):
        def round_(state, key):
            candidates, state = search.ask(state, key)
            losses = (candidates & ~useless).sum(1) * 0.5 + 0.3
            return search.tell(state, candidates, losses), None

        state, _ = jax.lax.scan(round_, search.init(), jax.random.split(key, 150))
        return search.best(state)

    found = [bool((run(jax.random.key(i)) == useless).all()) for i in range(10)]
    assert sum(found) >= 9


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="subsets 1"):
        bandit(4, 2, subsets=1)
    with pytest.raises(ValueError, match="3 distinct subsets of 0 of 4"):
        bandit(4, 0)
