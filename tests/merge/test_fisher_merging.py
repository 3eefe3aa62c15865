"""Fisher merging: closed forms, the information identity, invariances, numbers of the official code."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxpeft import squared_gradients
from jaxpeft.merge import (
    MergeInputError,
    diagonal_fisher,
    dirichlet_grid,
    fisher_merging,
    isotropic_merging,
    pair_grid,
    soup,
)

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "merge" / "golden.safetensors")
MODELS = {k: jnp.asarray(GOLDEN[f"models/{k}"]) for k in "abcd"}
FISHERS = {k: jnp.asarray(GOLDEN[f"fisher/information/{k}"]) for k in "abcd"}
LAM = jnp.array([0.5, 0.2, 0.3])
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(7, 3)), jnp.float32)
SOFTMAX = {"w": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32), "b": jnp.asarray(RNG.normal(size=4), jnp.float32)}


run = jax.jit(fisher_merging, static_argnames=("favor_target", "normalize", "target", "exclude"))


def regression(params, x):
    return x @ params["w"] + params["b"]


# --------------------------------------------------------------------------------------------------------- the diagonal


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_softmax_regression_has_its_closed_form_for_any_chunk(chunk, close):
    p = jax.nn.softmax(regression(SOFTMAX, X))
    got = diagonal_fisher(regression, SOFTMAX, X, chunk=chunk)
    want = {"w": jnp.einsum("nj,nk->jk", X**2, p * (1 - p)) / 7, "b": (p * (1 - p)).mean(0)}
    close(got, want, atol=1e-6)


def test_logistic_regression_has_its_closed_form():
    w = jnp.array([0.3, -1.0, 0.5])
    got = diagonal_fisher(lambda w, x: jnp.stack([jnp.zeros(()), x @ w]), w, X)
    p = jax.nn.sigmoid(X @ w)
    np.testing.assert_allclose(got, ((p * (1 - p))[:, None] * X**2).mean(0), atol=1e-6)


@pytest.mark.usefixtures("wide")
def test_the_exact_diagonal_is_that_of_the_expected_hessian_for_any_smooth_model():
    shapes = {"u": (3, 4), "v": (4, 3)}
    flat = jnp.asarray(RNG.normal(size=24))
    tree = lambda f: {"u": f[:12].reshape(3, 4), "v": f[12:].reshape(4, 3)}
    net = lambda params, x: jnp.tanh(x @ params["u"]) @ params["v"]
    x = jnp.asarray(X, jnp.float64)
    got = diagonal_fisher(net, tree(flat), x)
    p = jax.nn.softmax(jax.vmap(lambda x: net(tree(flat), x))(x))
    log_likelihood = lambda f: (p * jax.nn.log_softmax(jax.vmap(lambda x: net(tree(f), x))(x))).sum(1).mean()
    want = tree(-jnp.diag(jax.hessian(log_likelihood)(flat)))
    for k in shapes:
        np.testing.assert_allclose(got[k], want[k], atol=1e-10)


def test_drawn_labels_give_it_on_average_and_true_ones_the_squared_gradients(key, close):
    exact = diagonal_fisher(regression, SOFTMAX, X)
    sample = jax.jit(lambda k: diagonal_fisher(regression, SOFTMAX, X, mode="sample", key=k))
    many = jax.jit(jax.vmap(sample))(jax.random.split(key, 2000))
    for k, x in many.items():
        # Five standard errors of each entry.
        assert (jnp.abs(x.mean(0) - exact[k]) < 5 * x.std(0) / np.sqrt(2000) + 1e-6).all()
    labels = jnp.array([0, 1, 2, 3, 0, 1, 2])
    loss = lambda params, xy: -jax.nn.log_softmax(regression(params, xy[0]))[xy[1]]
    want = jax.tree.map(lambda g: g / 7, squared_gradients(loss, SOFTMAX, (X, labels)))
    got = diagonal_fisher(regression, SOFTMAX, X, mode="empirical", labels=labels, chunk=4)
    close(got, want, atol=1e-6)


def test_integers_and_excluded_leaves_have_none_and_narrow_ones_are_summed_wide():
    params = {**jax.tree.map(lambda x: x.astype(jnp.bfloat16), SOFTMAX), "n": jnp.arange(2)}
    got = diagonal_fisher(lambda p, x: regression(p, x.astype(jnp.bfloat16)), params, X, exclude="b")
    assert not got["n"].any()
    assert not got["b"].any()
    assert got["w"].dtype == jnp.float32
    np.testing.assert_allclose(got["w"], diagonal_fisher(regression, SOFTMAX, X)["w"], rtol=0.1, atol=1e-3)


def test_what_a_mode_lacks_is_told():
    with pytest.raises(ValueError, match="mode 'sample' needs a key"):
        diagonal_fisher(regression, SOFTMAX, X, mode="sample")
    with pytest.raises(ValueError, match="mode 'empirical' needs labels"):
        diagonal_fisher(regression, SOFTMAX, X, mode="empirical")
    with pytest.raises(ValueError, match="mode 'true': expected"):
        diagonal_fisher(regression, SOFTMAX, X, mode="true")
    with pytest.raises(ValueError, match="0 examples"):
        diagonal_fisher(regression, SOFTMAX, X[:0])
    with pytest.raises(ValueError, match=r"logits of shape \(1, 4\): expected \(classes,\)"):
        diagonal_fisher(lambda p, x: regression(p, x[None]), SOFTMAX, X)


# ------------------------------------------------------------------------------------------------------------ the merge


@pytest.mark.parametrize(
    ("name", "options"),
    [("default", {}), ("all_floored", {"favor_target": False}), ("raw", {"normalize": False})],
)
def test_numbers_are_those_of_the_official_code(name, options, close):
    got = run(None, MODELS, fishers=FISHERS, weights=LAM, **options)
    close(got, {k: GOLDEN[f"fisher/{name}/{k}"] for k in "abcd"}, atol=1e-5)


def test_a_constant_fisher_is_the_isotropic_merge(close):
    want = {k: GOLDEN[f"fisher/isotropic/{k}"] for k in "abcd"}
    close(isotropic_merging(None, MODELS, weights=LAM), want, atol=1e-5)
    ones = jax.tree.map(lambda x: jnp.full_like(x, 0.3), FISHERS)
    close(run(None, MODELS, fishers=ones, weights=LAM), want, atol=1e-5)
    close(run(None, MODELS, fishers=[None] * 3, weights=LAM), want, atol=1e-5)
    close(soup(None, MODELS, weights=LAM), want, atol=1e-5)


def test_a_model_without_a_fisher_counts_as_isotropic(close):
    known = [jax.tree.map(lambda x: x[i], FISHERS) for i in range(3)]
    flat = jax.tree.map(jnp.ones_like, known[1])
    got = run(None, MODELS, fishers=[known[0], None, known[2]], weights=LAM)
    close(got, run(None, MODELS, fishers=[known[0], flat, known[2]], weights=LAM), atol=1e-6)


@jax.jit
def pair(x, f, lam, a, floor, options):
    """Three models of four entries, their Fishers times a number each, in four ways."""
    f = {"w": f * a[:, None]}
    out = [
        run(None, {"w": x}, fishers=f, weights=lam, floor=floor, normalize=n, favor_target=t)["w"]
        for n in (True, False)
        for t in (True, False)
    ]
    return jnp.stack(out)


sizes = st.lists(st.sampled_from([0.0, 1e-9, 1e-6, 1e-3, 1.0]), min_size=12, max_size=12)
lams = st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=3, max_size=3)


@given(sizes, lams, st.sampled_from([0.0, 1e-6]), st.integers(0, 2**16))
def test_every_entry_is_within_the_models_range_and_never_nan(values, lam, floor, seed):
    x = np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32)
    f, lam = np.array(values, np.float32).reshape(3, 4), np.array(lam, np.float32)
    one = np.ones(3, np.float32)
    got = np.asarray(pair(x, f, lam, one, floor, None))
    assert np.isfinite(got).all()
    assert (got >= x.min(0) - 1e-5).all()
    assert (got <= x.max(0) + 1e-5).all()
    # Only ratios of lambda matter.
    np.testing.assert_allclose(np.asarray(pair(x, f, 3 * lam, one, floor, None)), got, atol=1e-5)
    # Without a floor, a factor common to all Fishers does not matter; with norms, not one for each.
    exact = np.asarray(pair(x, f, lam, one, 0.0, None))
    np.testing.assert_allclose(np.asarray(pair(x, f, lam, 7 * one, 0.0, None)), exact, atol=1e-5)
    each = np.asarray(pair(x, f, lam, np.array([1, 10, 0.01], np.float32), 0.0, None))
    np.testing.assert_allclose(each[:2], exact[:2], atol=1e-5)
    # Where no target is favoured the order does not matter, but for entries that nobody knows.
    order = [2, 0, 1]
    turned = np.asarray(pair(x[order], f[order], lam[order], one, 1e-6, None))[[1, 3]]
    kept = np.asarray(pair(x, f, lam, one, 1e-6, None))[[1, 3]]
    if lam.any():
        np.testing.assert_allclose(turned, kept, atol=1e-5)


def test_one_model_and_equal_models_come_back_whatever_they_know(close):
    first = jax.tree.map(lambda x: x[:1], MODELS)
    one = jax.tree.map(lambda x: x[0], MODELS)
    close(run(None, first, fishers=jax.tree.map(lambda x: x[:1], FISHERS)), one, atol=0)
    close(run(None, [one] * 3, fishers=FISHERS), one, atol=1e-6)


def test_where_nobody_knows_anything_the_target_stands_and_where_one_does_that_one():
    models = [{"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}]
    know = lambda a, b: [{"w": jnp.array([a])}, {"w": jnp.array([b])}]
    assert run(None, models, fishers=know(0.0, 0.0))["w"] == 1
    assert run(None, models, fishers=know(0.0, 0.0), target=1)["w"] == 2
    donor = run(None, models, fishers=know(0.0, 1.0), normalize=False)
    np.testing.assert_allclose(donor["w"], 2, atol=2e-6)  # up to floor / Fisher
    # The official code: no weight for the target and nothing known by the donor is NaN.
    assert np.isnan(GOLDEN["fisher/unknown"]).all()
    assert run(None, models, fishers=know(1.0, 0.0), weights=jnp.array([0.0, 1.0]))["w"] == 1
    # Squares of such Fishers are zero in float32, and so are products with small weights.
    tiny = run(None, models, fishers=know(3e-30, 1e-30), floor=0.0, normalize=False)
    np.testing.assert_allclose(tiny["w"], 1.25, rtol=1e-6)
    tiny = run(None, models, fishers=know(3e-30, 1e-30), floor=0.0)
    np.testing.assert_allclose(tiny["w"], 1.5, rtol=1e-6)


def test_a_diverged_model_without_weight_has_no_say():
    models = [{"w": jnp.array([1.0])}, {"w": jnp.array([jnp.nan])}]
    got = run(None, models, fishers=[{"w": jnp.ones(1)}] * 2, weights=jnp.array([1.0, 0.0]))
    assert got["w"] == 1


@pytest.mark.usefixtures("wide")
def test_fits_to_parts_of_an_orthogonal_design_merge_into_the_fit_to_all():
    rng = np.random.default_rng(3)
    xs, ys = [], []
    for n in (8, 16):
        q, _ = np.linalg.qr(rng.normal(size=(n, 3)))
        xs.append(q * rng.uniform(1, 3, 3))
        ys.append(rng.normal(size=n))
    fits = [np.linalg.lstsq(x, y, rcond=None)[0] for x, y in zip(xs, ys)]
    fishers = [{"w": jnp.asarray((x**2).mean(0))} for x in xs]  # unit noise: mean x_j^2
    got = fisher_merging(
        None,
        [{"w": jnp.asarray(f)} for f in fits],
        fishers=fishers,
        weights=jnp.array([8.0, 16.0]),
        floor=0.0,
        normalize=False,
    )
    pooled = np.linalg.lstsq(np.concatenate(xs), np.concatenate(ys), rcond=None)[0]
    np.testing.assert_allclose(got["w"], pooled, atol=1e-6)


def test_a_grid_is_merged_by_vmap(close, key):
    np.testing.assert_allclose(pair_grid(5), GOLDEN["fisher/grid"], atol=1e-6)
    two = jax.tree.map(lambda x: x[:2], (MODELS, FISHERS))
    curve = jax.jit(jax.vmap(lambda lam: run(None, two[0], fishers=two[1], weights=lam)))(pair_grid(3))
    close(jax.tree.map(lambda x: x[0], curve), jax.tree.map(lambda x: x[0], MODELS), atol=1e-6)
    close(jax.tree.map(lambda x: x[1], curve), run(None, *two[:1], fishers=two[1], weights=0.5), atol=1e-6)
    draws = dirichlet_grid(key, 6, 3)
    assert draws.shape == (6, 3)
    np.testing.assert_allclose(draws.sum(1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="1 points"):
        pair_grid(1)


def test_a_head_that_is_excluded_is_the_targets():
    got = run(None, MODELS, fishers={k: FISHERS[k] for k in "abc"}, exclude="d", target=2)
    assert (got["d"] == MODELS["d"][2]).all()


def test_fishers_that_do_not_fit_are_refused():
    with pytest.raises(MergeInputError, match="no Fisher for 'd'"):
        fisher_merging(None, MODELS, fishers={k: FISHERS[k] for k in "abc"})
    with pytest.raises(MergeInputError, match="2 Fishers for 3 models"):
        fisher_merging(None, MODELS, fishers=[None, None])
    with pytest.raises(MergeInputError, match=r"a Fisher of shape \(2, 40\) for 'b', whose shape is \(3, 40\)"):
        fisher_merging(None, MODELS, fishers={**FISHERS, "b": FISHERS["b"][:2]})
    with pytest.raises(ValueError, match="target 3: there are models 0 to 2"):
        fisher_merging(None, MODELS, fishers=FISHERS, target=3)
    with pytest.raises(ValueError, match="weights"):
        fisher_merging(None, MODELS, fishers=FISHERS, weights=[-1.0, 1.0, 1.0])
