"""The k largest of a tree: against sorting, at ties, under transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft import kth_largest, top_k_mask

values = st.lists(st.sampled_from([0.0, 1e-30, 0.5, 1.0, 1.0, 2.0, 3e38]), min_size=1, max_size=12)


@given(values, values, st.data())
def test_exactly_the_k_largest_are_chosen_and_of_equal_ones_the_first(a, b, data):
    k = data.draw(st.integers(0, len(a) + len(b)))
    tree = {"a": jnp.array(a, jnp.float32), "b": jnp.array(b, jnp.float32)[:, None]}
    mask = top_k_mask(tree, k)
    flat = np.array([*a, *b], np.float32)
    want = np.zeros(len(flat), bool)
    want[np.argsort(-flat, kind="stable")[:k]] = True
    got = np.concatenate([np.asarray(mask["a"]), np.asarray(mask["b"])[:, 0]])
    assert (got == want).all()
    if k:
        assert kth_largest(tree, k) == np.sort(flat)[::-1][k - 1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_every_float_orders_as_its_bits(dtype, key):
    x = jnp.abs(jax.random.normal(key, (257,), jnp.float32)).astype(dtype)
    want = jnp.sort(x)[::-1][jnp.array([0, 100, 256])]
    assert [kth_largest(x, k) for k in (1, 101, 257)] == want.tolist()


@pytest.mark.usefixtures("wide")
def test_float64_too(key):
    x = jnp.abs(jax.random.normal(key, (50,), jnp.float64))
    assert kth_largest(x, 7) == jnp.sort(x)[-7]


def test_k_may_be_traced_and_vmapped(key):
    x = jnp.abs(jax.random.normal(key, (40,)))
    masks = jax.jit(jax.vmap(lambda k: top_k_mask(x, k)))(jnp.array([0, 3, 40]))
    assert masks.sum(1).tolist() == [0, 3, 40]


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(ValueError, match="k 3: the tree has 2 entries"):
        top_k_mask(jnp.ones(2), 3)
    with pytest.raises(ValueError, match="expected some, all of one dtype"):
        kth_largest({}, 1)
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        kth_largest([jnp.ones(1), jnp.ones(1, jnp.bfloat16)], 1)
