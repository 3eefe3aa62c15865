"""Kronecker products and sums of them: against `jnp.kron`, in every use of a weight, and what they cost."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxpeft import lift
from jaxpeft.weights import kronecker, kronecker_dense, kronecker_matvec
from jaxpeft.weights.kronecker import lazily, operations

GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "polyhistor" / "golden.safetensors")


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


@given(*[st.integers(1, 4)] * 4)
def test_the_dense_form_is_numpys(m, n, p, q):
    a, b = drawn(m, n), drawn(p, q, seed=1)
    np.testing.assert_allclose(kronecker_dense(a, b), np.kron(a, b), atol=1e-6)


@given(*[st.integers(1, 4)] * 4)
def test_a_vector_meets_the_factors_one_by_one(m, n, p, q):
    a, b, h = drawn(m, n), drawn(p, q, seed=1), drawn(3, n * q, seed=2)
    want = np.einsum("ij,bj->bi", np.kron(a, b), h)
    np.testing.assert_allclose(kronecker_matvec(a, b, h), want, atol=1e-5)
    np.testing.assert_allclose(kronecker_matvec(a, b, h[0]), want[0], atol=1e-5)


def test_leading_axes_are_those_of_the_reference():
    a, b = jnp.asarray(GOLDEN["kronecker.outer"]), jnp.asarray(GOLDEN["kronecker.inner"])
    got = kronecker_dense(a, b)
    np.testing.assert_allclose(got, GOLDEN["kronecker.einsum"], atol=1e-6)
    np.testing.assert_allclose(got, GOLDEN["kronecker.product"], atol=1e-6)
    np.testing.assert_allclose(kronecker(a, b, terms=True).dense(), GOLDEN["kronecker.einsum"].sum(0), atol=1e-6)


def test_norm_and_singular_values_are_products(close):
    a, b = drawn(3, 4), drawn(2, 2)
    w = kronecker_dense(a, b)
    assert float(jnp.linalg.norm(w)) == pytest.approx(float(jnp.linalg.norm(a) * jnp.linalg.norm(b)), rel=1e-5)
    s = lambda x: jnp.linalg.svd(x, compute_uv=False)
    close(s(w), jnp.sort(jnp.outer(s(a), s(b)).ravel())[::-1])


def test_an_inner_identity_applies_the_outer_factor_to_each_interleaved_group(close):
    t, h = drawn(3, 4), drawn(8)
    y = kronecker_matvec(t, jnp.eye(2), h)
    close(y[0::2], t @ h[0::2])
    close(y[1::2], t @ h[1::2])
    close(kronecker_matvec(t, jnp.ones((1, 1)), h[:4]), t @ h[:4])


FORMS = {
    "plain": lambda: (kronecker(drawn(3, 2), drawn(4, 5)), np.kron(drawn(3, 2), drawn(4, 5))),
    "a factored side": lambda: (
        kronecker((drawn(3, 1), drawn(1, 2)), drawn(4, 5)),
        np.kron(drawn(3, 1) @ drawn(1, 2), drawn(4, 5)),
    ),
    "both factored": lambda: (
        kronecker([drawn(3, 1), drawn(1, 2)], [drawn(4, 2), drawn(2, 5)]),
        np.kron(drawn(3, 1) @ drawn(1, 2), drawn(4, 2) @ drawn(2, 5)),
    ),
    "a sum": lambda: (
        kronecker(drawn(2, 3, 2), drawn(2, 4, 5), terms=True),
        sum(np.kron(drawn(2, 3, 2)[i], drawn(2, 4, 5)[i]) for i in range(2)),
    ),
    "a factored sum": lambda: (
        kronecker(drawn(2, 3, 2), (drawn(2, 4, 1), drawn(2, 1, 5)), terms=True),
        sum(np.kron(drawn(2, 3, 2)[i], (drawn(2, 4, 1) @ drawn(2, 1, 5))[i]) for i in range(2)),
    ),
}
USES = {
    "product": (lambda w, x: x @ w, 12),
    "on the left": (lambda w, x: w @ x.T, 10),
    "transposed": (lambda w, x: jnp.einsum("bo,io->bi", x, w), 10),
    "cast": (lambda w, x: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32), 12),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("form", FORMS)
def test_every_use_is_that_of_the_formed_weight_with_its_gradient(form, use, close):
    weight, dense = FORMS[form]()
    assert weight.shape == dense.shape == (12, 10)
    close(weight.dense(), jnp.asarray(dense))
    function, width = USES[use]
    x = drawn(6, width, seed=3)
    loss = lambda run: jax.jit(jax.value_and_grad(lambda w, x: jnp.sum(jnp.sin(run(w, x))), (0, 1)))
    value, (by_parts, by_x) = loss(lift(function, "refuse"))(weight, x)
    want, (by_formed, want_x) = loss(lambda w, x: function(w.dense(), x))(weight, x)
    # bfloat16 has eight bits, and the order of the products differs.
    atol = 0.1 if use == "cast" else 1e-4
    close(value, want, atol)
    close(by_x, want_x, atol)
    close(by_parts, by_formed, atol)


def test_stacked_layers_may_share_a_factor_and_are_scanned(close):
    t, s, x = drawn(3, 2), drawn(5, 4, 4), drawn(6, 12)
    weight = kronecker((t, drawn(2, 3)), s)
    assert weight.shape == (5, 12, 12)

    def run(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    want = x
    for i in range(5):
        want = jnp.tanh(want @ jnp.kron(t @ drawn(2, 3), s[i]))
    close(jax.jit(lift(run, "refuse"))(weight, x), want)
    close(weight.dense()[2], jnp.kron(t @ drawn(2, 3), s[2]))


@pytest.mark.parametrize("form", FORMS)
def test_its_operations_are_those_the_compiler_counts(form):
    weight, _ = FORMS[form]()
    x = drawn(64, 12)
    counted = jax.jit(lift(lambda x, w: x @ w, "refuse")).lower(x, weight).compile().cost_analysis()["flops"]
    # The compiler also counts what is not a product (a cast, a sum over one number).
    assert counted == pytest.approx(2 * 64 * operations(weight), rel=0.25)


def test_it_is_formed_where_that_is_cheaper():
    blocks = kronecker(drawn(2, 2, 2), drawn(2, 48, 12), terms=True)
    assert operations(blocks) > 96 * 24
    assert isinstance(lazily(blocks), jax.Array)
    small = kronecker((drawn(96, 8), drawn(8, 24)), drawn(2, 2))
    assert 192 * 48 / operations(small) < 8
    assert isinstance(lazily(small), jax.Array)
    large = kronecker((drawn(96, 8), drawn(8, 24)), drawn(8, 8))
    assert lazily(large) is large
    assert lazily(blocks, saving=0.5) is blocks


def test_it_works_under_strict_promotion_and_vmap(close):
    a, b, x = drawn(4, 3, 2), drawn(4, 4, 5), drawn(6, 12)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        one = lambda a, b: lift(lambda w, x: x @ w, "refuse")(kronecker(a, b), x)
        got = jax.jit(jax.vmap(one))(a, b)
    close(got[1], x @ jnp.kron(a[1], b[1]))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"h has 7 entries, and \(2 x 3\) ⊗ \(4 x 5\) takes 15"):
        kronecker_matvec(drawn(2, 3), drawn(4, 5), drawn(7))
    with pytest.raises(ValueError, match="3 factors of one side"):
        kronecker((drawn(2, 2),) * 3, drawn(2, 2))
    with pytest.raises(ValueError, match="one axis is 2 and 3 long"):
        kronecker((drawn(4, 2), drawn(3, 4)), drawn(2, 2))
    with pytest.raises(ValueError, match="expected 3 axes each"):
        kronecker(drawn(2, 3, 4), drawn(4, 5), terms=True)
