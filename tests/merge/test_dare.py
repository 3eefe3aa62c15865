"""DARE: identity, expectation, independence, any merge behind it; numbers of its code."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpeft.merge import breadcrumbs, dare, greedy_soup, task_arithmetic, ties, uniform_soup
from jaxpeft.merge.dare import dropped

GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "merge" / "golden.safetensors")
BASE = {k: jnp.asarray(GOLDEN[f"base/{k}"]) for k in "bd"} | {"n": jnp.arange(2)}
MODELS = {k: jnp.asarray(GOLDEN[f"models/{k}"]) for k in "bd"} | {"n": jnp.zeros((3, 2), int)}
pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("merge", [task_arithmetic, ties, breadcrumbs, uniform_soup])
def test_dropping_nothing_is_the_merge_itself(merge, key, close):
    close(dare(BASE, MODELS, key=key, p=0.0, combine=merge), merge(BASE, MODELS), atol=1e-6)


def test_dropping_all_is_the_base(key, close):
    close(dare(BASE, MODELS, key=key, p=1.0), BASE, atol=0)


def test_the_expectation_is_the_task_vector_and_the_variance_the_papers(key):
    tau, p, n = {"w": jnp.array([[1.0, -2.0, 0.5]])}, 0.75, 4000
    draws = np.asarray(jax.jit(jax.vmap(lambda k: dropped(k, tau, p)["w"][0]))(jax.random.split(key, n)))
    variance = np.square(tau["w"][0]) * p / (1 - p)
    # Four standard errors; of a variance, about sqrt(2 / n) of it for so skewed a coin.
    np.testing.assert_allclose(draws.mean(0), tau["w"][0], atol=4 * np.sqrt(variance.max() / n))
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.1)


def test_every_task_and_every_leaf_has_draws_of_its_own(key):
    ones = {"u": jnp.ones((2, 200)), "v": jnp.ones((2, 200))}
    got = dropped(key, ones, 0.5)
    masks = [np.asarray(got[k][t] > 0) for k in "uv" for t in range(2)]
    for i in range(4):
        for j in range(i):
            assert 60 < (masks[i] == masks[j]).sum() < 140
    assert all((np.unique(x) == [0, 2]).all() for x in got.values())
    # A leaf's draws do not depend on what other leaves there are.
    assert (dropped(key, {"u": ones["u"]}, 0.5)["u"] == got["u"]).all()


def test_excluded_leaves_are_untouched_and_scores_see_whole_models(key):
    got = dare(BASE, MODELS, key=key, p=0.5, exclude="b", alpha=1.0)
    assert (got["b"] == BASE["b"]).all()
    assert (got["n"] == BASE["n"]).all()
    score = lambda params: -jnp.square(params["d"]).sum() + 0 * params["b"].sum() + 0 * params["n"].sum()
    whole = dare(BASE, MODELS, key=key, p=0.5, combine=functools.partial(greedy_soup, score_fn=score), exclude="b")
    assert jax.tree.structure(whole) == jax.tree.structure(BASE)
    assert (whole["b"] == BASE["b"]).all()


def test_survivors_are_rescaled_as_in_the_reference_code_and_not_as_by_mergekit(key):
    tau = GOLDEN["models/d"][0] - GOLDEN["base/d"]
    for p in (0.0, 0.5, 0.9):
        theirs = GOLDEN[f"dare/{p}"]
        ours = np.asarray(dropped(key, {"d": tau[None]}, p)["d"][0])
        for got in (theirs, ours):
            np.testing.assert_allclose(got[got != 0], tau[got != 0] / (1 - p), rtol=1e-6)
            assert abs((got != 0).mean() - (1 - p)) < 4 * np.sqrt(0.25 / tau.size)
    norm = lambda x: np.abs(x).sum()
    np.testing.assert_allclose(norm(GOLDEN["mergekit/bernoulli"]), norm(tau), rtol=1e-5)
    ratio = GOLDEN["mergekit/bernoulli"][GOLDEN["mergekit/bernoulli"] != 0] / tau[GOLDEN["mergekit/bernoulli"] != 0]
    assert abs(ratio.mean() - 2) > 1e-3  # it fits each tensor's norm, which 1 / (1 - p) does not


def test_a_probability_out_of_range_is_refused(key):
    with pytest.raises(ValueError, match="p 90: expected 0 to 1, a probability"):
        dare(BASE, MODELS, key=key, p=90)
