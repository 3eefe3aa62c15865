"""Gradients from values: unbiasedness, variance, and the optimiser against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpeft.tune import gain, rgf, spsa, spsa_gc

A = jnp.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 3.0]])
B = jnp.array([1.0, -2.0, 0.5])
W = jnp.array([0.3, -0.7, 1.1])
quadratic = lambda w: 0.5 * w @ A @ w + B @ w
GRADIENT = A @ W + B


@pytest.mark.parametrize(("distribution", "factor"), [("rademacher", 1.0), ("segmented", 7 / 6)])
def test_a_quadratics_estimate_is_unbiased_with_the_known_variance(distribution, factor, key):
    keys = jax.random.split(key, 40000)
    run = jax.jit(jax.vmap(lambda k: spsa(quadratic, k, W, 0.7, distribution=distribution)[1]))
    g = np.asarray(run(keys))
    others = np.sum(GRADIENT**2) - GRADIENT**2
    # Five standard errors of a mean, and of a variance of moderate kurtosis.
    assert (np.abs(g.mean(0) - GRADIENT) < 5 * np.sqrt(factor * others / len(g))).all()
    np.testing.assert_allclose(g.var(0), factor * others, rtol=0.06)


def test_more_draws_divide_the_variance(key):
    keys = jax.random.split(key, 4000)
    spread = lambda q: np.asarray(jax.vmap(lambda k: spsa(quadratic, k, W, 0.1, q)[1])(keys)).var(0).sum()
    assert 6 < spread(1) / spread(8) < 10


def test_in_one_dimension_a_linear_loss_has_its_slope(key):
    value, g = spsa(lambda w: 3.0 * w["x"][0] + 1, key, {"x": jnp.array([2.0])}, 0.3)
    assert jnp.allclose(g["x"], 3.0, atol=1e-5)
    assert jnp.allclose(value, 7.0)


def test_one_after_another_or_together_the_estimate_is_the_same(key, close):
    one, many = (spsa(quadratic, key, W, 0.1, 4, vectorised=v) for v in (False, True))
    close(one, many)


def test_the_loss_may_stand_outside(key):
    outside = lambda w: jax.pure_callback(lambda x: np.float32(np.sum(x**2)), jax.ShapeDtypeStruct((), jnp.float32), w)
    _, g = jax.jit(lambda k: spsa(outside, k, W, 0.1))(key)
    assert jnp.allclose(g, spsa(lambda w: jnp.sum(w**2), key, W, 0.1)[1], atol=1e-4)


def test_random_directions_are_unbiased_for_a_linear_loss(key):
    keys = jax.random.split(key, 40000)
    g = np.asarray(jax.jit(jax.vmap(lambda k: rgf(lambda w: B @ w, k, W, 0.01)[1]))(keys))
    assert (np.abs(g.mean(0) - B) < 5 * g.std(0) / np.sqrt(len(g)) + 1e-3).all()


def test_without_correction_it_is_sgd_with_the_gain(close):
    update, state = spsa_gc(0.1, 1.0, 0.4, beta=0.0), None
    state = update.init(W)
    for k in (1, 2, 3):
        got, state = update.update(GRADIENT, state)
        close(got, -0.1 / (k + 1) ** 0.4 * GRADIENT)


def test_with_a_constant_gain_it_is_nesterovs_momentum(close):
    ours, theirs = spsa_gc(0.05, 0.0, 0.0, beta=0.8), optax.sgd(0.05, momentum=0.8, nesterov=True)
    a, b, sa, sb = W, W, ours.init(W), theirs.init(W)
    for _ in range(5):
        ua, sa = ours.update(A @ a + B, sa)
        ub, sb = theirs.update(A @ b + B, sb)
        a, b = a + ua, b + ub
    close(a, b)


def test_the_papers_look_ahead_stands_in_the_shifted_variable(close):
    beta, rate, velocity, w = 0.8, 0.05, jnp.zeros(3), W
    update = spsa_gc(rate, 0.0, 0.0, beta=beta)
    shifted, state = W, update.init(W)
    for _ in range(5):
        velocity = beta * velocity - rate * (A @ (w + beta * velocity) + B)
        w = w + velocity
        u, state = update.update(A @ shifted + B, state)
        shifted = shifted + u
    close(shifted, w + beta * velocity)


def test_gains_count_from_one():
    assert [float(gain(2.0, 1.0, 1)(k)) for k in (0, 1)] == [1.0, pytest.approx(2 / 3)]


def test_bad_arguments_are_refused(key):
    with pytest.raises(ValueError, match="q 0"):
        spsa(quadratic, key, W, 0.1, 0)
    with pytest.raises(ValueError, match="q 0"):
        rgf(quadratic, key, W, 0.1, 0)
    with pytest.raises(ValueError, match="distribution 'normal'"):
        spsa(quadratic, key, W, 0.1, distribution="normal")
