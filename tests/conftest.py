"""What all tests share: eight virtual devices, keys of their own, a compilation cache, figures without a screen."""

import functools
import os
import zlib

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from jax.sharding import Mesh

# Examples cost a trace each; the same ones in every run.
settings.register_profile("small", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("small")

if folder := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture
def key(request):
    """A key that depends on the test's name alone, so that tests do not share their draws."""
    return jax.random.key(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def counted():
    """counted(f): f with `.traces`, one entry for each time that JAX traces it.

    The size of a jitted function's own cache says the same in most cases, but JAX drops entries of it as it likes.
    """

    def wrap(f):
        @functools.wraps(f)
        def traced(*args):
            traced.traces.append(f)
            return f(*args)

        traced.traces = []
        return traced

    return wrap


@pytest.fixture
def quick():
    """Programs run once or twice here: compiling them carefully would take longer than running them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def wide():
    """float64 for the length of one test, where its tolerance says so."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def mesh():
    """Eight virtual devices in a row."""
    return Mesh(np.array(jax.devices()[:8]), ("d",))


@pytest.fixture
def close():
    """close(a, b, atol=1e-5): two trees agree, each leaf relative to its largest entry where that is over one."""

    def check(a, b, atol=1e-5):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for x, y in zip(map(jnp.asarray, jax.tree.leaves(a)), map(jnp.asarray, jax.tree.leaves(b))):
            x, y = (np.asarray(z, np.float64 if jnp.issubdtype(z.dtype, jnp.floating) else None) for z in (x, y))
            assert x.shape == y.shape
            np.testing.assert_allclose(x, y, rtol=0, atol=atol * max(1.0, float(np.abs(y).max(initial=0.0))))

    return check
