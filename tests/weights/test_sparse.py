"""Sparse differences: against the dense sum, in every use of a weight, and what they keep in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpeft import lift
from jaxpeft.weights import sparse

INDICES = jnp.array([0, 5, 11, 12, 99])  # the last two are padding of a 3 x 4 weight
VALUES = jnp.array([1.0, -2.0, 3.0, 4.0, 5.0])


def dense(w, indices, values):
    flat = np.array(w).reshape(-1)
    for i, v in zip(np.asarray(indices), np.asarray(values)):
        if i < flat.size:
            flat[i] += v
    return jnp.asarray(flat.reshape(w.shape))


USES = {
    "product": lambda w, x: x @ w,
    "on the left": lambda w, x: w.T @ x.T,
    "heads": lambda w, x: jnp.einsum("bi,ihe->bhe", x, w.reshape(3, 2, 2)),
    "look-up": lambda w, x: w[jnp.array([2, 0, 2])],
    "cast": lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
    "convolution": lambda w, x: lax.conv_general_dilated(
        x[:, :, None], w.reshape(3, 1, 4), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
}


@pytest.mark.parametrize("use", USES)
def test_every_use_is_that_of_the_dense_sum_with_its_gradient(use, key, close):
    w, x = jax.random.normal(key, (3, 4)), jax.random.normal(jax.random.fold_in(key, 1), (5, 3))
    run = lift(USES[use], "refuse")
    loss = lambda v, w, x: jnp.sum(jnp.sin(run(sparse(w, INDICES, v), x).astype(jnp.float32)))
    want = lambda v, w, x: jnp.sum(
        jnp.sin(USES[use](w.reshape(-1).at[INDICES].add(v, mode="drop").reshape(3, 4), x).astype(jnp.float32))
    )
    tolerance = 2e-2 if use == "cast" else 1e-5
    close(run(sparse(w, INDICES, VALUES), x), USES[use](dense(w, INDICES, VALUES), x), atol=tolerance)
    close(jax.grad(loss, (0, 1, 2))(VALUES, w, x), jax.grad(want, (0, 1, 2))(VALUES, w, x), atol=tolerance)


def test_stacked_layers_have_entries_of_their_own(key, close):
    w, x = jax.random.normal(key, (2, 3, 3)), jnp.ones((4, 3))
    indices, values = jnp.array([[0, 4], [8, 9]]), jnp.array([[1.0, 2.0], [3.0, 4.0]])
    model = lambda w, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]
    full = jnp.stack([dense(w[i], indices[i], values[i]) for i in range(2)])
    close(lift(model, "refuse")(sparse(w, indices, values), x), model(full, x))
    close(sparse(w, indices, values).dense(), full)


def test_a_narrow_weight_is_added_to_in_the_wider_dtype():
    w = jnp.full((2,), 256.0, jnp.bfloat16)
    got = sparse(w[None], jnp.array([0]), jnp.array([0.75], jnp.float32)).dense()
    assert got.dtype == jnp.bfloat16
    assert got[0, 0] == jnp.float32(256.75).astype(jnp.bfloat16)


@pytest.mark.parametrize("entries", [3, 40])
def test_few_entries_form_no_copy_of_a_weight_and_many_form_one(entries, key, close):
    layers, n = 6, 256
    w = [jax.random.normal(jax.random.fold_in(key, i), (n, n)) / 16 for i in range(layers)]
    v, indices, x = [jnp.ones(entries)] * layers, jnp.arange(entries) * 7, jnp.ones((32 * 64, n))

    def loss(v, w, x):
        for w_i, v_i in zip(w, v):
            x = lift(lambda w, x: jnp.tanh(x @ w))(sparse(w_i, indices, v_i), x)
        return x.sum()

    def dense(v, w, x):
        for w_i, v_i in zip(w, v):
            x = jnp.tanh(x @ w_i.reshape(-1).at[indices].add(v_i).reshape(n, n))
        return x.sum()

    close(jax.grad(loss)(v, w, x), jax.grad(dense)(v, w, x), atol=1e-4)
    text = jax.jit(jax.grad(loss)).lower(v, w, x).as_text()
    forms = text.count(f"tensor<{n * n}xf32>") > 0
    assert forms == (entries * len(x) > n * n)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"indices \(2,\) and values \(3,\)"):
        sparse(jnp.ones((3, 3)), jnp.arange(2), jnp.ones(3))
    with pytest.raises(ValueError, match="stacked axes"):
        sparse(jnp.ones((3, 3)), jnp.zeros((2, 2), int), jnp.ones((2, 2)))
