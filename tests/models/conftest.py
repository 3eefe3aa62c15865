"""Small models of every family, and strict promotion: what the models compute must be said, not promoted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_configs import HF

from jaxpeft.models import model_from_config, stack_layers


@pytest.fixture(autouse=True)
def strict():
    """Neither dtypes nor ranks are promoted silently."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(params=sorted(HF))
def family(request):
    return request.param


@pytest.fixture
def build():
    """build(family, **overrides) -> the small model of that family."""
    return lambda family, **overrides: model_from_config(HF[family], **overrides)


@pytest.fixture
def weights():
    """weights(model, seed=0) -> random variables in the model's structure: nothing is compiled for them."""

    def make(model, seed=0):
        rng = np.random.default_rng(seed)

        def leaf(shape):
            spread = 0.5 / np.sqrt(max(shape.shape[-2:-1], default=1))
            return jnp.asarray(rng.normal(size=shape.shape) * spread, shape.dtype)

        plain = model.clone(config=dataclasses.replace(model.config, scan=False))
        shapes = jax.eval_shape(plain.init, jax.random.key(0), *plain.dummy_inputs())
        tree = jax.tree.map(leaf, shapes)
        return stack_layers(tree) if model.config.scan else tree

    return make


@pytest.fixture
def inputs():
    """inputs(model, length=5) -> the positional inputs of a batch of two."""

    def make(model, length=5):
        arrays = []
        for i, example in enumerate(model.dummy_inputs()):
            if example.ndim == 2:
                arrays.append(jax.random.randint(jax.random.key(i), (2, length), 2, 19))
            else:
                arrays.append(jax.random.normal(jax.random.key(i), (2, *example.shape[1:]), jnp.float32))
        return tuple(arrays)

    return make


@pytest.fixture
def as_layout():
    """as_layout(model, scan=..., remat=...) -> the same model with another layer loop."""

    def change(model, **fields):
        return model.clone(config=dataclasses.replace(model.config, **fields))

    return change
