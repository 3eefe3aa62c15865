"""Masks by rank: against sorting, counts, ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft.merge.sparsify import rank_masks, share_of

SHAPES = {"a": (2, 3, 4), "b": (2, 5), "c": (2,)}
entries = st.lists(st.sampled_from([0.0, -1.0, 1.0, 0.5, -3.0, 2.0]), min_size=36, max_size=36)
pytestmark = pytest.mark.usefixtures("quick")


def brute(rows, low, high):
    """By a stable sort, row by row."""
    mask = np.zeros(rows.shape, bool)
    for m, r in zip(mask, rows):
        m[np.argsort(-np.abs(r), kind="stable")[low(len(r)) : high(len(r))]] = True
    return mask


@jax.jit
def masks(taus, low, high):
    bounds = lambda d: (share_of(low, d), share_of(high, d))
    return [
        rank_masks(taus, bounds, axis, row) for axis, row in (("row", -1), ("row", 0), ("leaf", -1), ("global", -1))
    ]


@given(entries, st.sampled_from([0.0, 0.25, 0.5]), st.sampled_from([0.0, 0.3, 0.75, 1.0]))
def test_masks_are_those_of_a_stable_sort(values, low, high):
    flat = np.array(values, np.float32)
    taus = {"a": flat[:24].reshape(2, 3, 4), "b": flat[24:34].reshape(2, 5), "c": flat[34:]}
    last, first, leaf, whole = masks(taus, low, high)
    lo, hi = (lambda d: int(np.floor(d * low + 1e-6))), (lambda d: int(np.floor(d * high + 1e-6)))
    assert (last["a"] == brute(taus["a"].reshape(6, 4), lo, hi).reshape(2, 3, 4)).all()
    across = brute(taus["a"].swapaxes(1, 2).reshape(8, 3), lo, hi).reshape(2, 4, 3).swapaxes(1, 2)
    assert (first["a"] == across).all()
    assert (leaf["a"] == brute(taus["a"].reshape(2, 12), lo, hi).reshape(2, 3, 4)).all()
    for got in (last, first, leaf):
        assert (got["b"] == brute(taus["b"], lo, hi)).all()
        assert got["c"].all()  # a leaf without axes stays
    together = np.concatenate([x.reshape(2, -1) for x in taus.values()], 1)
    got = np.concatenate([np.asarray(x).reshape(2, -1) for x in whole.values()], 1)
    assert (got == brute(together, lo, hi)).all()


@pytest.mark.parametrize("size", [1, 7, 10, 100, 1000, 2**24 + 1, 2**31 - 1])
def test_a_share_of_all_is_all_and_decimals_count_as_they_are_written(size):
    assert share_of(1.0, size) == size
    assert share_of(0.0, size) == 0
    for thousandths in range(0, 1001, 7) if size < 2000 else ():
        assert share_of(thousandths / 1000, size) == size * thousandths // 1000
    if size == 100:
        assert [int(share_of(x, size)) for x in (0.29, 0.53, 0.58, 0.999)] == [29, 53, 58, 99]
        # As they are computed without care:
        assert int(100 * 0.29) == 28
        assert jnp.floor(jnp.float32(0.53) * 100) == 52


def test_what_has_no_such_rows_is_refused():
    bounds = lambda d: (None, d)
    with pytest.raises(ValueError, match="axis 'layer': expected 'row', 'leaf' or 'global'"):
        rank_masks({"a": jnp.ones((1, 2))}, bounds, "layer")
    with pytest.raises(ValueError, match=r"row 2: a leaf of shape \(2, 3\) has no such axis"):
        rank_masks({"a": jnp.ones((1, 2, 3))}, bounds, "row", 2)
    with pytest.raises(ValueError, match="4294967296 entries ranked together"):
        jax.eval_shape(lambda x: rank_masks([x], bounds, "leaf"), jax.ShapeDtypeStruct((1, 2**32), jnp.float32))
    empty = rank_masks({"a": jnp.ones((2, 0))}, bounds, "leaf")
    assert empty["a"].shape == (2, 0)
