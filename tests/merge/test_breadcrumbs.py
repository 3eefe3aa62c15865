"""Model Breadcrumbs: the card's oracles, and numbers of its code and of mergekit."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxpeft.merge import breadcrumbs, middle_masks, task_arithmetic

GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "merge" / "golden.safetensors")
BASE = {k: jnp.asarray(GOLDEN[f"base/{k}"]) for k in "abcd"}
MODELS = {k: jnp.asarray(GOLDEN[f"models/{k}"]) for k in "abcd"}
TAU = GOLDEN["models/d"][0] - GOLDEN["base/d"]


pytestmark = pytest.mark.usefixtures("quick")


run = jax.jit(breadcrumbs, static_argnames=("axis", "remove_first", "row"))


@jax.jit
def merged(keep, drop_top, alpha):
    return breadcrumbs(BASE, MODELS, keep=keep, drop_top=drop_top, alpha=alpha)


def test_all_of_it_is_task_arithmetic_and_nothing_of_it_the_base(close):
    close(merged(1.0, 0.0, 0.3), task_arithmetic(BASE, MODELS, alpha=0.3), atol=1e-6)
    close(merged(0.0, 0.1, 0.3), BASE, atol=0)
    close(merged(0.5, 0.1, 0.0), BASE, atol=0)
    one = jax.tree.map(lambda x: x[:1], MODELS)
    close(breadcrumbs(BASE, one, keep=1.0, drop_top=0.0, alpha=1.0), jax.tree.map(lambda x: x[0], one), atol=1e-7)


@jax.jit
def row(tau, keep, top):
    return [middle_masks([tau[None]], keep, top, axis="leaf", remove_first=first)[0][0] for first in (True, False)]


shares = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
distinct = st.permutations(list(range(1, 13)))


@given(distinct, shares, shares, st.sampled_from([0.5, -3.0, 100.0]))
def test_masks_count_and_follow_permutations_signs_and_scales(order, keep, top, c):
    d, tau = 12, np.array(order, np.float32)
    n_top, n_keep = int(d * top + 1e-6), int(d * keep + 1e-6)
    mask, fewer = map(np.asarray, row(tau, keep, top))
    assert mask.sum() == min(n_keep, d - n_top)
    assert fewer.sum() == max(n_keep - n_top, 0)
    # 12 is the largest: the entry v has rank 12 - v, wherever it stands.
    assert (mask == ((12 - tau >= n_top) & (12 - tau < n_top + n_keep))).all()
    assert (fewer == ((12 - tau >= n_top) & (12 - tau < n_keep))).all()
    assert (np.asarray(row(c * tau, keep, top)[0]) == mask).all()


def test_a_second_time_changes_nothing_only_without_a_top():
    for top, same in ((0.0, True), (0.1, False)):
        first = TAU * np.asarray(row(TAU, 0.25, top)[0])
        assert (np.asarray(first * row(first, 0.25, top)[0]) == first).all() == same


def test_a_linear_models_answers_move_by_those_of_its_masked_tasks():
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    got = x @ (merged(0.25, 0.1, 0.3)["d"])
    taus = GOLDEN["models/d"] - GOLDEN["base/d"]
    want = x @ BASE["d"] + 0.3 * sum(x @ (t * np.asarray(row(t, 0.25, 0.1)[0])) for t in taus)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_rows_are_masked_as_in_the_reference_code(first, close):
    got = run(BASE, MODELS, keep=0.25, drop_top=0.1, alpha=0.3, axis="row", remove_first=first)
    close(got, {k: GOLDEN[f"breadcrumbs/{'remove' if first else 'keep'}_first/{k}"] for k in "abcd"}, atol=1e-6)
    # The same model with (in, out) kernels: rows run over inputs there.
    turn = lambda tree, lead: {k: jnp.moveaxis(x, -1, lead) if x.ndim > lead + 1 else x for k, x in tree.items()}
    again = run(
        turn(BASE, 0), turn(MODELS, 1), keep=0.25, drop_top=0.1, alpha=0.3, axis="row", remove_first=first, row=0
    )
    close(again, turn(got, 0), atol=1e-6)


def test_granularity_matters():
    by = {axis: run(BASE, MODELS, keep=0.25, drop_top=0.1, axis=axis) for axis in ("row", "leaf", "global")}
    assert not np.allclose(by["row"]["a"], by["leaf"]["a"])
    assert not np.allclose(by["leaf"]["a"], by["global"]["a"])
    # A convolution whose rows have three entries loses them all, as in the reference code.
    kernel = {"w": jnp.arange(27.0).reshape(3, 3, 3)}
    stack = jax.tree.map(lambda x: 2 * x[None], kernel)
    lost = run(kernel, stack, keep=0.15, axis="row")
    assert (lost["w"] == kernel["w"]).all()


def test_leaves_are_masked_as_by_mergekit_but_where_it_leaves_its_own_definition():
    for want, (keep, top) in zip(GOLDEN["mergekit/outliers"], [(0.25, 0.1), (0.25, 0.001), (0.5, 0.01)]):
        np.testing.assert_array_equal(TAU * np.asarray(row(TAU, keep, top)[0]), want)
    # Where keep + drop_top > 1 it removes fewer outliers; ours keeps fewer entries.
    assert np.count_nonzero(GOLDEN["mergekit/outliers_much"]) == int(600 * 0.95)
    assert row(TAU, 0.95, 0.1)[0].sum() == 600 - 60
    # At a density of one it removes none.
    assert (GOLDEN["mergekit/outliers_whole"] == TAU).all()
    assert row(TAU, 1.0, 0.1)[0].sum() == 540


def test_shares_out_of_range_are_refused():
    with pytest.raises(ValueError, match="keep 15: expected 0 to 1"):
        breadcrumbs(BASE, MODELS, keep=15)
    with pytest.raises(ValueError, match=r"drop_top -0\.1: expected 0 to 1"):
        breadcrumbs(BASE, MODELS, drop_top=-0.1)
