"""RegMean: the least squares that it solves, its limits, inputs that nobody uses."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.merge import MergeInputError, gram, regmean, uniform_soup

pytestmark = pytest.mark.usefixtures("quick")
RNG = np.random.default_rng(0)
XS = [RNG.normal(size=(20, 5)).astype(np.float32) * RNG.uniform(0.5, 2, 5).astype(np.float32) for _ in range(3)]
MODELS = [{"w": jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32), "b": jnp.full(4, float(i))} for i in range(3)]
GRAMS = [{"w": gram(x)} for x in XS]


def test_outputs_are_the_nearest_to_every_models_own():
    got = regmean(None, MODELS, grams=GRAMS, scale=1.0, ridge=0.0)
    stacked = np.concatenate(XS), np.concatenate([x @ np.asarray(m["w"]) for x, m in zip(XS, MODELS)])
    np.testing.assert_allclose(got["w"], np.linalg.lstsq(*stacked, rcond=None)[0], atol=1e-4)
    assert got["b"].tolist() == [1.0] * 4  # averaged


def test_equal_inputs_give_the_average_and_no_cross_terms_a_mean_weighted_by_energy(close):
    close(regmean(None, MODELS, grams=[GRAMS[0]] * 3), uniform_soup(None, MODELS), atol=1e-5)
    energy = jnp.stack([jnp.diag(g["w"]) for g in GRAMS])[:, :, None]
    want = (energy * jnp.stack([m["w"] for m in MODELS])).sum(0) / energy.sum(0)
    np.testing.assert_allclose(regmean(None, MODELS, grams=GRAMS, scale=0.0, ridge=0.0)["w"], want, atol=1e-5)


def test_inputs_that_nobody_uses_are_averaged():
    grams = [{"w": gram(x.copy() * np.array([1, 1, 0, 1, 1], np.float32))} for x in XS]
    got = regmean(None, MODELS, grams=grams)
    assert jnp.isfinite(got["w"]).all()
    np.testing.assert_allclose(got["w"][2], uniform_soup(None, MODELS)["w"][2], atol=0.2)


def test_inputs_of_any_layout_have_the_same_moments(close):
    np.testing.assert_allclose(gram(XS[0].reshape(4, 5, 5)), XS[0].T @ XS[0] / 20, atol=1e-5)


def test_what_fits_no_kernel_is_refused():
    with pytest.raises(MergeInputError, match="grams for 'v', which is no leaf"):
        regmean(None, MODELS, grams=[{"v": g["w"]} for g in GRAMS])
    with pytest.raises(MergeInputError, match=r"expected an \(in, out\) kernel's"):
        regmean(None, MODELS, grams=[{"b": g["w"]} for g in GRAMS])
    with pytest.raises(MergeInputError, match="2 sets of grams for 3 models"):
        regmean(None, MODELS, grams=GRAMS[:2])
    with pytest.raises(ValueError, match="scale 2"):
        regmean(None, MODELS, grams=GRAMS, scale=2)
