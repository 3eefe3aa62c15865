"""Merging deltas: LoRA sums are exact in factors, for every scale, rank and layout; others go through the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxpeft
from jaxpeft import MergeError, adapt, trees
from jaxpeft.files import load_delta, save_delta
from jaxpeft.merge import MergeInputError, merge_adapted, merge_deltas, task_arithmetic, ties, uniform_soup
from jaxpeft.method import TaskError

pytestmark = pytest.mark.usefixtures("quick")
RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {"table": draw(9, 4), "layers": {"kernel": draw(2, 4, 2, 3)}, "out": {"kernel": draw(6, 5), "bias": draw(5)}}
X = jnp.array([[1, 2], [3, 8]])


def apply_fn(params, ids):
    """An embedding, stacked layers with split outputs, and a head: the layouts that weights come in."""
    x = params["table"][ids]

    def layer(x, kernel):
        y = jnp.einsum("...i,ihd->...hd", x, kernel)
        return jnp.tanh(y[..., 0, :1] + x), y

    x, y = jax.lax.scan(layer, x, params["layers"]["kernel"])
    return y[-1].reshape(*ids.shape, 6) @ params["out"]["kernel"] + params["out"]["bias"]


def made(seed, **options):
    """A method and a delta away from its start."""
    method = jaxpeft.lora(**{"rank": 2, "at": ["table", "**/kernel"], **options})
    delta = adapt(apply_fn, method).init(jax.random.key(seed), PARAMS, X)
    rng = np.random.default_rng(seed)
    return method, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), delta)


CASES = {
    "equal": [{}, {}],
    "ranks": [{"rank": 1}, {"rank": 3, "alpha": 5.0}],
    "rslora": [{"rank": 1, "scaling": "rslora", "alpha": 3.0}, {"rank": 3}, {"rank": 4, "scaling": "rslora"}],
    "places": [{"at": "out/kernel"}, {"at": ["table", "out/kernel"], "alpha": 1.0}],
    "patterns": [{"rank_pattern": {"table": 1}, "alpha_pattern": {"out/*": 7.0}}, {}],
    "scales a layer": [{"at": "layers/kernel", "alpha": jnp.array([1.0, 3.0])}, {"at": "layers/kernel"}],
}


def effect(method, delta):
    """What a delta adds to each leaf."""
    merged = trees.by_path(adapt(apply_fn, method).merge(PARAMS, delta))
    return {p: merged[p] - x for p, x in trees.by_path(PARAMS).items()}


@pytest.mark.parametrize("name", CASES)
def test_the_sum_of_deltas_has_the_sum_of_their_effects(name, close):
    pairs = [made(i, **options) for i, options in enumerate(CASES[name])]
    weights = [0.5, -1.5, 2.0][: len(pairs)]
    method, delta = merge_deltas([m for m, _ in pairs], [d for _, d in pairs], PARAMS, weights=weights)
    effects = [effect(m, d) for m, d in pairs]
    want = {p: sum(w * e[p] for w, e in zip(weights, effects)) for p in effects[0]}
    close(effect(method, delta), want, atol=2e-6)
    merged = adapt(apply_fn, method).merge(PARAMS, delta)
    adapted = adapt(apply_fn, method, on_dense="refuse")
    close(jax.jit(adapted.apply)(PARAMS, delta, X), apply_fn(merged, X), atol=1e-5)


@pytest.mark.parametrize("options", [o for case in CASES.values() for o in case])
def test_one_delta_at_weight_one_is_itself_bit_for_bit(options, close):
    method, delta = made(3, **options)
    got, same = merge_deltas(method, [delta], PARAMS)
    close(same, delta, atol=0)
    assert got is method
    # In company of weight zero it keeps its effect.
    got, with_other = merge_deltas(method, [delta, delta], PARAMS, weights=[1.0, 0.0])
    close(effect(got, with_other), effect(method, delta), atol=1e-6)


@given(st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3))
def test_sums_are_linear_in_their_weights_and_know_no_order(weights):
    pairs = [
        made(i, rank=r, at="out/kernel", scaling=s)
        for i, (r, s) in enumerate([(1, "rslora"), (2, "standard"), (3, "rslora")])
    ]
    methods, deltas = zip(*pairs)
    w = jnp.array(weights, jnp.float32)
    one = lambda order: effect(
        *merge_deltas([methods[i] for i in order], [deltas[i] for i in order], PARAMS, weights=w[jnp.array(order)])
    )
    got = one([0, 1, 2])["out/kernel"]
    want = sum(w[i] * effect(m, d)["out/kernel"] for i, (m, d) in enumerate(pairs))
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_allclose(one([2, 0, 1])["out/kernel"], got, atol=1e-4)


def test_a_delta_less_itself_is_the_base(close):
    method, delta = made(0)
    got, none = merge_deltas(method, [delta, delta], PARAMS, weights=[1.0, -1.0])
    close(adapt(apply_fn, got).apply(PARAMS, none, X), apply_fn(PARAMS, X), atol=1e-6)


def test_weights_are_swept_by_vmap_and_have_gradients():
    method, one = made(0)
    _, two = made(1)
    summed, _ = merge_deltas(method, [one, two], PARAMS)
    answer = lambda w: adapt(apply_fn, summed).apply(PARAMS, merge_deltas(method, [one, two], PARAMS, weights=w)[1], X)
    curve = jax.jit(jax.vmap(answer))(jnp.array([[1.0, 0.0], [0.5, 0.5]]))
    np.testing.assert_allclose(curve[0], adapt(apply_fn, method).apply(PARAMS, one, X), atol=1e-5)
    grads = jax.grad(lambda w: answer(w).sum())(jnp.ones(2))
    assert jnp.isfinite(grads).all()
    assert (grads != 0).all()


def test_a_sum_is_saved_and_loaded_and_keeps_its_dtype(tmp_path, close):
    method, one = made(0)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), made(1)[1])
    summed, delta = merge_deltas(method, [one, narrow], PARAMS, weights=[1.0, -2.0])
    assert {x.dtype for x in jax.tree.leaves(delta)} == {jnp.dtype(jnp.float32)}
    save_delta(tmp_path / "d", delta, summed, PARAMS)
    saved = load_delta(tmp_path / "d", PARAMS)
    close(adapt(apply_fn, saved.method).apply(PARAMS, saved.delta, X), adapt(apply_fn, summed).apply(PARAMS, delta, X))


def test_what_does_not_sum_in_factors_is_refused():
    method, delta = made(0)
    dora = jaxpeft.dora(rank=2, at="out/kernel")
    other = adapt(apply_fn, dora).init(jax.random.key(0), PARAMS, X)
    with pytest.raises(ValueError, match=r"a delta of dora: only those of lora.*merge_adapted"):
        merge_deltas([method, dora], [delta, other], PARAMS)
    with pytest.raises(MergeInputError, match="no deltas"):
        merge_deltas(method, [], PARAMS)
    with pytest.raises(MergeInputError, match="2 methods for 1 deltas"):
        merge_deltas([method, method], [delta], PARAMS)
    with pytest.raises(MergeInputError, match=r"weights of shape \(3,\) for 2 deltas"):
        merge_deltas(method, [delta, delta], PARAMS, weights=jnp.ones(3))
    with pytest.raises(MergeInputError, match="adapts 'missing', which the model lacks"):
        merge_deltas(method, [{"missing": delta["table"]}] * 2, PARAMS)
    wrong = {**delta, "table": {**delta["table"], "b": jnp.ones((2, 5))}}
    with pytest.raises(MergeInputError, match="factors of 'table' that differ in more than the rank"):
        merge_deltas(method, [delta, wrong], PARAMS)
    poly = jaxpeft.poly(tasks=2, rank=2, at="out/kernel")
    with pytest.raises(TaskError, match="serves 2 tasks"):
        merge_deltas(poly, [adapt(apply_fn, poly).init(jax.random.key(0), PARAMS, X)], PARAMS)


def test_any_merge_goes_through_the_weights_that_change(close):
    lora, one = made(0, at="out/kernel")
    dora = jaxpeft.dora(rank=2, at="layers/kernel")
    two = adapt(apply_fn, dora).init(jax.random.key(1), PARAMS, X)
    two = jax.tree.map(lambda x: x + 0.1 * draw(*x.shape), two)
    seen = []

    def watched(base, models, **hyper):
        seen.append(set(base))
        return ties(base, models, **hyper)

    got = merge_adapted(watched, PARAMS, [lora, dora], [one, two], keep=0.5)
    assert seen == [{"out/kernel", "layers/kernel"}]
    dense = [adapt(apply_fn, m).merge(PARAMS, d) for m, d in ((lora, one), (dora, two))]
    changed = lambda tree: {p: trees.by_path(tree)[p] for p in seen[0]}
    want = ties(changed(PARAMS), [changed(m) for m in dense], keep=0.5)
    close(changed(got), want, atol=1e-5)
    assert got["table"] is PARAMS["table"]
    # Sums through the weights are those in factors.
    _, other = made(1, at="out/kernel")
    summed = adapt(apply_fn, merge_deltas(lora, [one, other], PARAMS)[0])
    through = merge_adapted(task_arithmetic, PARAMS, lora, [one, other], alpha=1.0)
    close(through, summed.merge(PARAMS, merge_deltas(lora, [one, other], PARAMS)[1]), atol=1e-5)


def test_narrow_weights_are_merged_wide(close):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    method, delta = made(0)
    got = merge_adapted(uniform_soup, narrow, method, [delta, delta])
    close(got, adapt(apply_fn, method).merge(narrow, delta), atol=0)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}


def test_deltas_that_no_weights_express_or_that_change_none_are_refused():
    method, delta = made(0)
    with pytest.raises(MergeError, match="has no merge"):
        merge_adapted(ties, PARAMS, jaxpeft.blackvip(), [delta])
    with pytest.raises(MergeInputError, match="change no weight"):
        merge_adapted(ties, PARAMS, method, [{}])
    with pytest.raises(MergeInputError, match="no deltas"):
        merge_adapted(ties, PARAMS, method, [])
    with pytest.raises(MergeInputError, match="2 methods for 1 deltas"):
        merge_adapted(ties, PARAMS, [method, method], [delta])
