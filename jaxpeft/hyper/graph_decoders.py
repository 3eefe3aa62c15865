"""From a node's embedding to the tensor it holds: LoGAH's factors, GHN-3's block, and vectors; see `logah`."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from jaxpeft.hyper.graphormer import dense, dense_start
from jaxpeft.hyper.hypernetwork import TargetError

__all__ = ["Sizes", "factors", "full", "full_start", "kernel", "low_rank_start", "vector"]

Sizes = tuple[int, int, int, int]  # (c_out, c_in, k_h, k_w)


def low_rank_start(key: Key[Array, ""], d: int, rank: int, reach: int) -> PyTree:
    """The low-rank decoder's weights."""
    keys, widths = jax.random.split(key, 4), (d, 4 * d, 8 * d, 2 * rank * rank)
    mlp = [dense_start(k, m, n) for k, m, n in zip(keys, widths, widths[1:])]
    return {"mlp": mlp, "out": dense_start(keys[3], rank, reach)}


def factors(p: PyTree, x: Float[Array, "d"], sizes: Sizes, rank: int) -> tuple[Array, Array]:
    """A (c_out k_h, r) and B (c_in k_w, r) for a tensor of these sizes; channels beyond K / k repeat."""
    h = jax.nn.relu(dense(p["mlp"][1], jax.nn.relu(dense(p["mlp"][0], x))))
    (c_out, c_in, k_h, k_w), reach = sizes, p["out"]["kernel"].shape[1]
    if max(k_h, k_w) > reach:
        raise TargetError(f"a window of {k_h} x {k_w} for a reach of {reach}: raise the network's reach")

    def half(first: int, channels: int, window: int) -> Array:
        known = min(channels, reach // window)
        count = known * window
        rows = -(-count * rank // reach)  # of Y, that these rows of A or B lie in
        part = slice(first * rank, (first + rows) * rank)
        z = h @ p["mlp"][2]["kernel"][:, part] + p["mlp"][2]["bias"][part]
        y = dense(p["out"], jax.nn.relu(z.reshape(rows, rank))).reshape(-1)[: count * rank]
        return tiled(y.reshape(known, window, rank), 0, channels).reshape(channels * window, rank)

    return half(0, c_out, k_h), half(rank, c_in, k_w)


def tiled(x: Array, axis: int, size: int) -> Array:
    """`x` repeated, or cut, to a size along an axis."""
    return x if x.shape[axis] == size else jnp.take(x, np.arange(size) % x.shape[axis], axis=axis)


def kernel(a: Array, b: Array, sizes: Sizes) -> Float[Array, "c_out c_in k_h k_w"]:
    """A Bᵀ as a kernel, which is read window by window."""
    c_out, c_in, k_h, k_w = sizes
    return (a @ b.T).reshape(c_out, k_h, c_in, k_w).swapaxes(1, 2)


def full_start(key: Key[Array, ""], d: int, block: tuple[int, int]) -> PyTree:
    """The full decoder's weights, the last layer small."""
    (b, side), (first, second, third) = block, jax.random.split(key, 3)
    window = dense_start(first, d, 4 * d * side * side)
    return {
        "window": {
            "kernel": window["kernel"].reshape(d, 4 * d, side, side),
            "bias": window["bias"].reshape(4 * d, side, side),
        },
        "block": [dense_start(second, 4 * d, 8 * d), dense_start(third, 8 * d, b * b, small=True)],
    }


def full(p: PyTree, x: Float[Array, "d"], sizes: Sizes, block: tuple[int, int]) -> Float[Array, "c_out c_in k_h k_w"]:
    """GHN-3's decoder: a window's middle, a block (b, b) at each place of it, tiled over the channels."""
    (c_out, c_in, k_h, k_w), (b, side) = sizes, block
    if max(k_h, k_w) > side:
        raise TargetError(f"a window of {k_h} x {k_w} for a decoder of {side} x {side}: raise the network's block")
    at = [slice(side // 2 - k // 2, side // 2 + -(-k // 2)) for k in (k_h, k_w)]
    h = jnp.tensordot(x, p["window"]["kernel"][:, :, at[0], at[1]], 1) + p["window"]["bias"][:, at[0], at[1]]
    h = jax.nn.relu(dense(p["block"][0], jnp.moveaxis(jax.nn.relu(h), 0, -1)))
    w = jnp.moveaxis(dense(p["block"][1], h), -1, 0).reshape(b, b, k_h, k_w)[:c_out, :c_in]
    return tiled(tiled(w, 0, c_out), 1, c_in)


def vector(weights: PyTree, x: Float[Array, "d"], c: int) -> Float[Array, "2 c"]:
    """A scale and a bias of c numbers."""
    if "vectors" in weights:
        first, second = weights["vectors"]
        both = dense(second, jax.nn.relu(dense(first, x))).reshape(2, -1)
        both = tiled(both[:, :c], 1, c)
    else:
        p = weights["decoder"]
        known = min(c, p["out"]["kernel"].shape[1] // 2)
        a, b = factors(p, x, (2 * known, 1, 1, 1), p["out"]["kernel"].shape[0])
        both = tiled((a @ b[0]).reshape(2, known), 1, c)
    return jnp.stack([2 * jax.nn.sigmoid(0.5 * both[0]), jnp.tanh(0.2 * both[1])])
