"""Task arithmetic: sums, analogies, forgetting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft.merge import MERGES, MergeInputError, negation, task_arithmetic

BASE = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
RNG = np.random.default_rng(0)
MODELS = [jax.tree.map(lambda x: x + RNG.normal(size=x.shape).astype(np.float32), BASE) for _ in range(3)]
X = RNG.normal(size=(5, 2)).astype(np.float32)
pytestmark = pytest.mark.usefixtures("quick")


def linear(params, x=X):
    return x @ params["w"] + params["b"]


@jax.jit
def merged(alpha):
    return task_arithmetic(BASE, MODELS, alpha=alpha)


@given(st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3))
def test_a_linear_models_answers_move_by_the_weighted_sum_of_its_tasks(alpha):
    want = linear(BASE) + sum(a * (linear(m) - linear(BASE)) for a, m in zip(alpha, MODELS))
    np.testing.assert_allclose(linear(merged(jnp.array(alpha, jnp.float32))), want, atol=1e-4)


def test_nothing_of_the_tasks_is_the_base_and_all_of_one_is_its_model(close):
    close(merged(0.0), BASE, atol=0)
    for t, m in enumerate(MODELS):
        close(merged(jax.nn.one_hot(t, 3)), m, atol=1e-7)  # theta0 + (theta - theta0), one rounding
    close(task_arithmetic(BASE, MODELS[:1], alpha=1.0), MODELS[0], atol=1e-7)


def test_a_scale_of_one_over_t_is_the_average(close):
    close(merged(1 / 3), MERGES["uniform_soup"].function(BASE, MODELS), atol=1e-6)


def test_an_analogy_adds_to_c_what_b_has_over_a(close):
    want = jax.tree.map(lambda a, b, c: c + b - a, *MODELS)
    close(merged(jnp.array([-1.0, 1.0, 1.0])), want, atol=1e-6)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"weights of shape \(2,\) for 3 models"):
        task_arithmetic(BASE, MODELS, alpha=jnp.ones(2))


def test_forgetting_goes_as_far_as_the_control_task_allows(close):
    score = lambda p: 1 - 0.1 * jnp.abs(p["w"] - BASE["w"]).sum()
    tau = jnp.abs(MODELS[0]["w"] - BASE["w"]).sum()
    found = jax.jit(lambda models: negation(BASE, models, score_fn=score, keep=0.9))(MODELS[:1])
    want = np.floor(20 * 1.0 / tau) / 20  # 1 - 0.1 lambda |tau| >= 0.9
    np.testing.assert_allclose(found.alpha, want, atol=1e-6)
    close(found.params, task_arithmetic(BASE, MODELS[:1], alpha=-found.alpha), atol=1e-6)
    assert found.kept.sum() == round(want * 20) + 1
    assert found.scores.shape == (21,)
    # Where nothing is kept, nothing is forgotten.
    none = negation(BASE, MODELS[:1], score_fn=lambda p: jnp.float32((p["w"] == BASE["w"]).all()), grid=[0.5, 1.0])
    assert none.alpha == 0
    close(none.params, BASE, atol=0)


def test_what_cannot_be_forgotten_is_refused():
    with pytest.raises(ValueError, match=r"keep 95: expected 0 to 1"):
        negation(BASE, MODELS, score_fn=lambda p: 1.0, keep=95)
    with pytest.raises(ValueError, match="grid"):
        negation(BASE, MODELS, score_fn=lambda p: 1.0, grid=[-0.5])
    with pytest.raises(MergeInputError, match="no base"):
        task_arithmetic(None, MODELS)
