"""Hyperparameters as unconstrained reals: inverses, bounds, noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft.tune import Hyperparameter, constrain, entropy, inverse_softplus, named, perturb, unconstrain

SPECS = {
    "rate": Hyperparameter(0.05, 0.0, 0.9),
    "decay": Hyperparameter(0.1, low=0.0),
    "top": Hyperparameter(-1.0, high=2.0),
    "free": Hyperparameter(0.3),
    "holes": Hyperparameter(2.5, 0.0, 5.0, discrete=True),
    "penalty": Hyperparameter(1.0, low=0.0, shared=True),
}


def test_starts_come_back_and_whole_numbers_are_floored():
    values = named(SPECS, constrain(SPECS, unconstrain(SPECS)))
    expected = {name: s.start for name, s in SPECS.items()} | {"holes": 2.0}
    for name, value in values.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5)


@given(st.lists(st.floats(-30, 30, width=32), min_size=6, max_size=6))
def test_values_stay_within_their_bounds(lam):
    for s, value in zip(SPECS.values(), constrain(SPECS, jnp.array(lam)).tolist()):
        assert s.low is None or value >= s.low
        assert s.high is None or value <= s.high
        assert not s.discrete or value == round(value)


@given(st.floats(2**-10, 50, width=32))
def test_softplus_undoes_its_inverse(x):
    np.testing.assert_allclose(jax.nn.softplus(inverse_softplus(x)), x, rtol=1e-4)


def test_the_entropys_slope_is_sigmoid_over_softplus(key):
    xi = jax.random.normal(key, (5,))
    np.testing.assert_allclose(jax.grad(entropy)(xi), jax.nn.sigmoid(xi) / jax.nn.softplus(xi), rtol=1e-4)


def test_noise_is_for_each_example_but_where_it_is_shared(key):
    lam = unconstrain(SPECS)
    noisy = perturb(key, SPECS, lam, jnp.full(6, inverse_softplus(0.5)), 2000)
    np.testing.assert_allclose(noisy.std(0)[:5], 0.5, rtol=0.1)
    np.testing.assert_allclose(noisy.mean(0)[:5], lam[:5], atol=0.06)
    assert (noisy[:, 5] == noisy[0, 5]).all()
    assert float(noisy[0, 5]) != float(lam[5])


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="nothing to tune"):
        unconstrain({})
    with pytest.raises(ValueError, match=r"rate 0\.9: expected a number between 0 and 0\.9"):
        unconstrain(SPECS, {name: s.start for name, s in SPECS.items()} | {"rate": 0.9})
    with pytest.raises(ValueError, match="for 6 hyperparameters"):
        constrain(SPECS, jnp.ones(3))
