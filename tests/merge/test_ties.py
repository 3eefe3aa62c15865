"""TIES: the card's oracles, and numbers of its code and of mergekit."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxpeft.merge import elected_signs, ties
from jaxpeft.merge.ties import trimmed

GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "merge" / "golden.safetensors")
BASE = {k: jnp.asarray(GOLDEN[f"base/{k}"]) for k in "abcd"}
MODELS = {k: jnp.asarray(GOLDEN[f"models/{k}"]) for k in "abcd"}
SIZE = sum(x.size for x in BASE.values())
pytestmark = pytest.mark.usefixtures("quick")


run = jax.jit(ties, static_argnames=("agg", "axis", "row"))


def vector(*taus, **hyper):
    """The merged task vector of tasks on a base of zeros."""
    stack = jnp.asarray(np.stack(taus), jnp.float32)
    return run(jnp.zeros(stack.shape[1:]), stack, **hyper)


TAU = np.random.default_rng(0).normal(size=40).astype(np.float32)
TRIMMED = TAU * (np.abs(TAU) >= np.sort(np.abs(TAU))[-10])


def test_agreeing_tasks_give_their_trimmed_vector_and_opposed_ones_the_larger():
    np.testing.assert_allclose(vector(TAU, TAU, TAU, keep=0.25), TRIMMED, atol=1e-7)
    np.testing.assert_allclose(vector(TAU, -0.5 * TAU, keep=0.25), TRIMMED, atol=1e-7)
    np.testing.assert_allclose(vector(TAU, keep=1.0), TAU, atol=1e-7)
    assert not vector(TAU, keep=0.0).any()


@jax.jit
def whole(taus):
    kept = trimmed([taus], 0.5)[0]
    signs = elected_signs([kept])[0]
    return kept, signs, *(ties(jnp.zeros(8), taus, keep=0.5, agg=agg) for agg in ("mean", "sum", "max"))


@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, 0.5]), min_size=24, max_size=24))
def test_every_entry_is_what_the_definition_says(values):
    taus = np.array(values, np.float32).reshape(3, 8)
    kept, signs, mean, total, largest = (np.asarray(x) for x in whole(taus))
    assert (np.count_nonzero(kept, axis=1) <= 4).all()
    s = np.sign(kept.sum(0))
    s = np.where(s == 0, np.sign(s.sum()), s)
    assert (signs == s).all()
    for j in range(8):
        agreeing = [x for x in kept[:, j] if x * s[j] > 0]
        assert mean[j] == pytest.approx(np.mean(agreeing) if agreeing else 0, abs=1e-6)
        assert total[j] == pytest.approx(sum(agreeing), abs=1e-6)
        assert largest[j] == (max(agreeing, key=abs) if agreeing else 0)
        assert mean[j] == 0 or np.sign(mean[j]) == s[j]


@pytest.mark.parametrize("agg", ["mean", "sum", "max"])
def test_numbers_are_those_of_the_reference_code(agg):
    for percent, kept in zip((20, 50), GOLDEN["ties/kept"]):
        # The code keeps one entry more than int(K D).
        assert kept == SIZE * percent // 100 + 1
        got = run(BASE, MODELS, keep=kept / SIZE, agg=agg)
        flat = np.concatenate([np.asarray(got[k] - BASE[k]).reshape(-1) for k in "abcd"])
        np.testing.assert_allclose(flat, GOLDEN[f"ties/{agg}/{percent}"], atol=1e-6)
    if agg == "mean":
        cut = jax.jit(trimmed)(MODELS, 0.2)
        flat = np.concatenate([np.asarray(cut[k]).reshape(3, -1) for k in "abcd"], 1)
        assert (np.count_nonzero(flat, axis=1) == SIZE * 20 // 100).all()


def test_a_vote_that_ends_in_a_draw_moves_nothing_where_the_code_takes_the_negative_entries():
    assert GOLDEN["ties/draw"].tolist() == [-1, -2]
    assert vector([1.0, 2.0], [-1.0, -2.0], keep=1.0).tolist() == [0, 0]


def test_trimming_by_leaf_is_mergekits_but_for_entries_that_cancel():
    taus = {"d": MODELS["d"] - BASE["d"]}
    zero = {"d": jnp.zeros_like(BASE["d"])}
    for agg, name in (("sum", "ties_sum"), ("mean", "ties_normalised")):
        got = run(zero, taus, keep=0.3, agg=agg, axis="leaf")
        np.testing.assert_allclose(got["d"], GOLDEN[f"mergekit/{name}"], atol=1e-6)
    # It takes a sum of zero for positive; here the majority of entries decides.
    assert GOLDEN["mergekit/cancelled_sign"][:, 0].tolist() == [1, 0]
    assert vector([1.0, -1.0, -1.0], [-1.0, -1.0, -1.0], keep=1.0).tolist() == [-1, -1, -1]
    # Densities are exact here; it keeps one entry at least.
    assert np.count_nonzero(GOLDEN["mergekit/magnitude_small"]) == 1
    assert not trimmed([jnp.ones((1, 3))], 0.1, "leaf")[0].any()
    for q, want in zip((0.0, 0.1, 0.25, 1.0), GOLDEN["mergekit/magnitude"]):
        got = trimmed({"d": taus["d"][:1]}, q, "leaf")["d"][0]
        np.testing.assert_allclose(got, want, atol=1e-7)


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"keep 20: expected 0 to 1, a share \(20 % is 0.2\)"):
        ties(BASE, MODELS, keep=20)
    with pytest.raises(ValueError, match="agg 'median': expected"):
        ties(BASE, MODELS, agg="median")
