"""The formulations with backward passes of their own: the plain ones' numbers, and no more work than they owe."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.models import fused


def arguments(dtype, width=6):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, width)) + 2.0
    return tuple(jnp.asarray(a, dtype) for a in (x, rng.normal(size=width), rng.normal(size=width)))


def test_a_layer_norms_gradients_are_those_of_its_formula():
    with jax.enable_x64(True):
        args = arguments(jnp.float64)
        loss = lambda norm: lambda *a: jnp.sin(norm(*a, 1e-5)).sum()
        want = jax.value_and_grad(loss(fused.plain_layer_norm), (0, 1, 2))(*args)
        got = jax.jit(jax.value_and_grad(loss(fused.layer_norm), (0, 1, 2)))(*args)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), got, want)
        many = jax.vmap(jax.grad(loss(fused.layer_norm)), (0, None, None))(args[0][:, None], *args[1:])
        np.testing.assert_allclose(many[:, 0], want[1][0], rtol=1e-9)


def test_the_backward_pass_through_residual_norms_grows_with_the_depth_not_its_square():
    """XLA:CPU would compute the whole chain of norms above again in every loop that reads the residual's gradient."""

    def operations(depth, norm):
        def loss(x, w, gain, shift):
            for _ in range(depth):
                x = norm(x + x @ w, gain, shift, 1e-5)
            return jnp.square(x).sum()

        x, gain, shift = arguments(jnp.float32, 16)
        program = jax.jit(jax.grad(loss)).lower(x, jnp.eye(16), gain, shift).compile()
        return program.cost_analysis()["flops"]

    assert operations(16, fused.layer_norm) < 2.2 * operations(8, fused.layer_norm)
    if jax.default_backend() == "cpu":
        plain = operations(16, fused.plain_layer_norm) / operations(8, fused.plain_layer_norm)
        assert plain > 3, "the compiler has learned it: the fence can go"
