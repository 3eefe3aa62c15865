"""`jax.random.bernoulli`'s bits inside a kernel: each element's are a function of the key and its index alone.

Threefry-2x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), as `jax.random` counts it: element
i of an array takes the exclusive or of the two words of threefry(key, (0, i)). A kernel that drops elements and the plain
code beside it, or the backward pass that drops them again, therefore agree without storing a mask.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Key, UInt32

from jaxpeft.kernels.platforms import KernelError

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def words(key: Key[Array, ""]) -> UInt32[Array, "2"]:
    """The key's two words.

    Raises:
      KernelError: a key of another generator than threefry2x32.
    """
    name = str(jax.random.key_impl(key))
    if name != "threefry2x32":
        raise KernelError(f"a key of {name}: kernels draw with threefry2x32; make it by jax.random.key(seed, impl=...)")
    return jax.random.key_data(key)


def threefry(k0: Array, k1: Array, index: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """32 random bits an index."""
    keys = (k0, k1, k0 ^ k1 ^ jnp.uint32(0x1BD11BDA))
    x, y = jnp.zeros_like(index) + keys[0], index + keys[1]
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x = x + y
            y = lax.shift_left(y, jnp.uint32(r)) | lax.shift_right_logical(y, jnp.uint32(32 - r))
            y = x ^ y
        x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x ^ y


def kept(k0: Array, k1: Array, below: Array, index: UInt32[Array, "..."]) -> Bool[Array, "..."]:
    """Where `jax.random.bernoulli(key, keep)` is true, for elements of these indices (row-major), `below(keep)` given."""
    # A uniform number is 23 bits over 2²³; compared as integers, exactly and without a bit cast.
    return lax.shift_right_logical(threefry(k0, k1, index), jnp.uint32(9)) < below


def below(keep: ArrayLike) -> UInt32[Array, ""]:
    """How many of the 2²³ values of a uniform float32 lie below `keep`."""
    return jnp.ceil(jnp.asarray(keep, jnp.float32) * 2**23).astype(jnp.uint32)
