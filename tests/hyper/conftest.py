"""What tests of hypernetworks share."""

import jax
import pytest


@pytest.fixture(scope="session")
def moved():
    """moved(weights, by=0.3): the same weights away from their start, where some parts do nothing."""

    def move(weights, by=0.3):
        flat, structure = jax.tree.flatten(weights)
        keys = jax.random.split(jax.random.key(3), len(flat))
        return jax.tree.unflatten(structure, [w + by * jax.random.normal(k, w.shape) for w, k in zip(flat, keys)])

    return move
