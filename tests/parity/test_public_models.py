"""Public JAX models as their packages ship them, unchanged, with LoRA through `adapt`: Haiku's and flaxmodels'.

No weights are downloaded: the models are initialised at random. Merged and lazy answers agree to 1e-4 in float32,
through some twenty convolutions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def moved(delta):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: a + jnp.asarray(0.05 * rng.normal(size=a.shape), a.dtype), delta)


def agree(model, params, x, at, rank=2):
    adapted = jaxpeft.adapt(model, jaxpeft.lora(rank, at=at), on_dense="refuse")
    start = jax.jit(adapted.init)(jax.random.key(1), params, x)
    delta = moved(start)
    base, same, lazy, dense = jax.jit(
        lambda d: (
            model(params, x),
            adapted.apply(params, start, x),
            adapted.apply(params, d, x),
            model(adapted.merge(params, d), x),
        )
    )(delta)
    size = float(jnp.abs(dense).max())
    np.testing.assert_allclose(same, base, atol=1e-4 * size)
    np.testing.assert_allclose(lazy, dense, atol=1e-4 * size)
    assert float(jnp.abs(lazy - base).max()) > 1e-3 * size
    grads = jax.jit(jax.grad(lambda d: jnp.sum(jnp.sin(adapted.apply(params, d, x)))))(delta)
    assert all(float(jnp.abs(g).sum()) > 0 for g in jax.tree.leaves(grads))
    return start


def test_haiku_resnet():
    haiku = pytest.importorskip("haiku")
    net = haiku.transform_with_state(lambda x, training: haiku.nets.ResNet18(5)(x, training))
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    params, state = jax.jit(lambda k, x: net.init(k, x, True))(jax.random.key(0), x)
    model = lambda params, x: net.apply(params, state, None, x, False)[0]
    # Haiku starts the last layer at zero, where nothing below would have a gradient.
    params = jax.tree.map(lambda a: a + 0.02 * jax.random.normal(jax.random.key(2), a.shape), params)
    delta = agree(model, params, x, at="**/{conv_*,shortcut_conv,initial_conv,logits}/w")
    assert len(delta) == 21


def test_haiku_attention_and_perceptron():
    haiku = pytest.importorskip("haiku")

    def forward(x):
        y = haiku.MultiHeadAttention(2, 4, w_init=haiku.initializers.VarianceScaling(1.0), model_size=8)(x, x, x)
        return haiku.nets.MLP([16, 8])(x + y)

    net = haiku.without_apply_rng(haiku.transform(forward))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    params = net.init(jax.random.key(0), x)
    assert len(agree(net.apply, params, x, at="**/w")) == 6


def test_flaxmodels_resnet():
    flaxmodels = pytest.importorskip("flaxmodels")
    model = flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=5, normalize=False)
    x = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    variables = jax.jit(lambda k, x: model.init(k, x, train=False))(jax.random.key(0), x)
    delta = agree(lambda v, x: model.apply(v, x, train=False), variables, x, at="params/**/kernel")
    assert len(delta) == 21
