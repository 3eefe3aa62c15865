"""Model soups: the card's oracles, the two recipes' differences, soups against ensembles."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxpeft.merge import (
    MergeInputError,
    greedy_selection,
    greedy_soup,
    learned_mixture,
    logit_ensemble,
    soup,
    uniform_soup,
    wise_ft,
)

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "merge" / "golden.safetensors")
RNG = np.random.default_rng(0)
K = 4


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


MODELS = {"w": draw(K, 3, 5), "v": draw(K, 5, 2)}
X, Y = draw(2, 6, 3), jnp.asarray(RNG.integers(0, 2, (2, 6)))


def linear(params, x):
    return x @ params["w"][:, :2]


def net(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def one(i):
    return jax.tree.map(lambda x: x[i], MODELS)


# -------------------------------------------------------------------------------------------------- sums and ensembles


def test_equal_models_and_one_model_come_back(close):
    same = [one(0)] * 3
    score = lambda p: -jnp.square(net(p, X[0])).sum()
    for merged in (
        uniform_soup(None, same),
        greedy_soup(None, same, score_fn=score),
        learned_mixture(None, same, apply_fn=net, batches=(X, Y), steps=3).params,
        wise_ft(one(0), same),
    ):
        close(merged, one(0), atol=1e-6)
    close(uniform_soup(None, [one(0)]), one(0), atol=0)


@given(st.lists(st.floats(-2, 2, width=32), min_size=K, max_size=K))
def test_a_linear_models_soup_is_its_ensemble(weights):
    w = jnp.array(weights, jnp.float32)
    got = linear(soup(None, MODELS, weights=w), X[0])
    np.testing.assert_allclose(got, logit_ensemble(linear, MODELS, X[0], weights=w), atol=1e-5)


def test_the_uniform_soup_has_weights_of_one_over_k_and_no_order(close):
    close(uniform_soup(None, MODELS), soup(None, MODELS, weights=1 / K), atol=1e-6)
    close(uniform_soup(None, [one(i) for i in (2, 0, 3, 1)]), uniform_soup(None, MODELS), atol=1e-6)
    assert jnp.allclose(
        logit_ensemble(net, MODELS, X[0]), jnp.stack([net(one(i), X[0]) for i in range(K)]).mean(0), atol=1e-6
    )


def test_the_line_to_a_model_has_both_as_its_ends(close):
    close(wise_ft(one(0), [one(1)], alpha=0.0), one(0), atol=0)
    close(wise_ft(one(0), [one(1)], alpha=1.0), one(1), atol=0)
    curve = jax.vmap(lambda a: wise_ft(one(0), [one(1)], alpha=a))(jnp.linspace(0, 1, 3))
    close(jax.tree.map(lambda x: x[1], curve), uniform_soup(None, [one(0), one(1)]), atol=1e-6)
    with pytest.raises(MergeInputError, match="no base"):
        wise_ft(None, [one(1)])


@pytest.mark.usefixtures("wide")
def test_a_soup_and_an_ensemble_differ_by_the_papers_formula_to_third_order():
    """Section 4: a (1-a)/2 (-d2 L_soup/da2 + beta^2 E Var_{Y ~ softmax(beta f)}[f_Y(theta_1) - f_Y(theta_0)])."""
    wide = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)
    start, move, x = wide(one(0)), wide(one(1)), wide(X[0])
    beta, a = 1.7, 0.4

    def loss(logits):
        return -jnp.take_along_axis(jax.nn.log_softmax(beta * logits), Y[0][:, None], 1).mean()

    def residual(apply_fn, eps):
        end = jax.tree.map(lambda s, m: s + eps * m, start, move)
        at = lambda a: wise_ft(start, [end], alpha=a)
        on_line = lambda a: loss(apply_fn(at(a), x))
        ensemble = loss((1 - a) * apply_fn(start, x) + a * apply_fn(end, x))
        p = jax.nn.softmax(beta * apply_fn(at(a), x))
        d = apply_fn(end, x) - apply_fn(start, x)
        variance = ((p * d**2).sum(1) - (p * d).sum(1) ** 2).mean()
        curvature = jax.grad(jax.grad(on_line))(jnp.float64(a))
        return on_line(a) - ensemble - a * (1 - a) / 2 * (beta**2 * variance - curvature), curvature, beta**2 * variance

    steps = np.array([0.04, 0.02, 0.01])
    left = np.array([abs(float(jax.jit(lambda e: residual(net, e)[0])(e))) for e in steps])
    slope = np.polyfit(np.log(steps), np.log(left), 1)[0]
    assert 2.7 < slope < 3.3
    # Of a linear model the curvature is that variance and both sides are zero.
    rest, curvature, variance = residual(linear, 1.0)
    assert abs(rest) < 1e-12
    np.testing.assert_allclose(curvature, variance, rtol=1e-9)


# -------------------------------------------------------------------------------------------------------------- greedy

HOT = [{"x": jax.nn.one_hot(i, K)} for i in range(K)]
SIZE = lambda p: jnp.count_nonzero(p["x"]).astype(jnp.float32)


@pytest.mark.parametrize("host", [False, True])
def test_scores_that_rise_choose_all_and_scores_that_fall_the_first(host, close):
    assert greedy_selection(None, HOT, score_fn=SIZE, host=host).chosen.all()
    fewest = greedy_selection(None, HOT, score_fn=lambda p: -SIZE(p), host=host)
    assert fewest.chosen.tolist() == [True, False, False, False]
    close(fewest.params, HOT[0], atol=0)


@pytest.mark.parametrize(("accept", "size"), [("ge", K), ("gt", 1)])
def test_a_score_that_stays_is_taken_by_the_paper_and_not_by_its_code(accept, size):
    found = greedy_selection(None, HOT, score_fn=lambda p: jnp.float32(1), accept=accept)
    assert found.chosen.sum() == size
    assert found.order.tolist() == [0, 1, 2, 3]  # of equal ones the lower index first


def test_selection_is_that_of_a_plain_loop_in_a_program_or_outside_of_one(close):
    score = lambda p: -jnp.square(net(p, X[0]) - 0.3).mean()
    scores = [float(score(one(i))) for i in range(K)]
    order = sorted(range(K), key=lambda i: -scores[i])
    members, best = [order[0]], scores[order[0]]
    for i in order[1:]:
        mean = jax.tree.map(lambda x: x[jnp.array([*members, i])].mean(0), MODELS)
        if (new := float(score(mean))) >= best:
            members, best = [*members, i], new
    inside = jax.jit(lambda m: greedy_selection(None, m, score_fn=score))(MODELS)
    outside = greedy_selection(None, MODELS, score_fn=lambda p: float(score(p)), host=True)
    for found in (inside, outside):
        assert np.flatnonzero(found.chosen).tolist() == sorted(members)
        assert found.order.tolist() == order
        np.testing.assert_allclose(found.score, best, atol=1e-6)
        assert found.score >= max(scores) - 1e-6
        close(found.params, jax.tree.map(lambda x: x[jnp.array(members)].mean(0), MODELS), atol=1e-6)


def test_a_diverged_model_never_enters():
    models = [*HOT[:2], {"x": jnp.full(K, jnp.nan)}, HOT[3]]
    found = greedy_selection(None, models, score_fn=lambda p: p["x"].sum())
    assert found.chosen.tolist() == [True, True, False, True]
    assert jnp.isfinite(found.params["x"]).all()
    assert jnp.isnan(found.scores[2])
    assert found.order.tolist() == [0, 1, 3, 2]
    lost = greedy_selection(None, models[2:3] * 2, score_fn=lambda p: p["x"].sum())
    assert jnp.isnan(lost.score)


def test_an_order_of_ones_own():
    found = greedy_selection(None, HOT, score_fn=lambda p: -SIZE(p), order=[2, 1, 0, 3])
    assert found.chosen.tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match=r"an order of shape \(3,\) for 4 models"):
        greedy_selection(None, HOT, score_fn=SIZE, order=[0, 1, 2])
    with pytest.raises(ValueError, match="accept 'more': expected 'ge' or 'gt'"):
        greedy_selection(None, HOT, score_fn=SIZE, accept="more")


def test_the_greedy_ensemble_is_a_selection_of_logits():
    logits = jnp.stack([net(one(i), X[0]) for i in range(K)])
    accuracy = lambda mean: (mean.argmax(-1) == Y[0]).mean()
    found = greedy_selection(None, logits, score_fn=accuracy)
    np.testing.assert_allclose(
        found.params, logit_ensemble(net, MODELS, X[0], weights=found.chosen / found.chosen.sum()), atol=1e-6
    )


def test_the_published_models_are_tried_in_the_published_order():
    """The 72 accuracies that the authors released; theirs has equal ones reversed."""
    scores = jnp.asarray(GOLDEN["soups/imagenet_2p"], jnp.float32)
    found = greedy_selection(None, jnp.arange(72, dtype=jnp.float32), score_fn=lambda i: scores[i.astype(jnp.int32)])
    names = GOLDEN["soups/names"]
    assert names[found.order[0]] == 43
    np.testing.assert_allclose(GOLDEN["soups/imagenet"][found.order[0]], 0.80386, atol=1e-6)
    theirs = sorted(range(72), key=lambda i: GOLDEN["soups/imagenet_2p"][i])[::-1]
    np.testing.assert_array_equal(scores[found.order], scores[jnp.array(theirs)])
    np.testing.assert_allclose(GOLDEN["soups/greedy"], [0.83977, 0.81026], atol=1e-5)
    np.testing.assert_allclose(GOLDEN["soups/uniform"], [0.82704, 0.79972], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- learned


@pytest.mark.parametrize("per_leaf", [False, True])
def test_learned_weights_start_uniform_and_lower_the_loss_within_the_models_range(per_leaf, close):
    learn = lambda steps: learned_mixture(None, MODELS, apply_fn=net, batches=(X, Y), steps=steps, per_leaf=per_leaf)
    start, end = learn(0), learn(40)
    close(start.params, uniform_soup(None, MODELS), atol=1e-6)
    assert start.losses.shape == (0,)
    assert start.beta == 1
    assert abs(end.beta - 1) > 1e-3
    assert end.losses[-2:].mean() < end.losses[:2].mean()
    for alpha in jax.tree.leaves(end.alpha):
        np.testing.assert_allclose(alpha.sum(), 1, atol=1e-6)
    for x, many in zip(jax.tree.leaves(end.params), jax.tree.leaves(MODELS)):
        assert ((x >= many.min(0) - 1e-6) & (x <= many.max(0) + 1e-6)).all()
    weights = end.alpha if per_leaf else {"w": end.alpha, "v": end.alpha}
    close(end.params, {k: jnp.tensordot(weights[k], MODELS[k], 1) for k in MODELS}, atol=1e-5)


def test_a_weights_gradient_is_the_inner_product_of_its_model_and_the_loss(close):
    loss = lambda params: jnp.sum(jnp.sin(net(params, X[0])))
    w = jnp.array([0.1, 0.2, 0.3, 0.4])
    got = jax.grad(lambda w: loss(soup(None, MODELS, weights=w)))(w)
    grads = jax.grad(loss)(soup(None, MODELS, weights=w))
    want = [sum(jnp.vdot(g, m) for g, m in zip(jax.tree.leaves(grads), jax.tree.leaves(one(i)))) for i in range(K)]
    np.testing.assert_allclose(got, want, atol=1e-4)
