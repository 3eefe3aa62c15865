"""GHN-3's encoder: a Transformer over the nodes of a computational graph, whose attention sees how far apart they are.

    x⁰ = op + [ch(c_out); ch(c_in); sp(k_h); sp(k_w)] + in(degree) + out(degree) + far(distance from the input)
    x ← x + W_o softmax(q kᵀ / √(d / H) + e) v,    x ← x + MLP(x)          pre-norm, M times, a last norm
    e_ij = W_2 relu(W_1 [T[s_ij + 2]; T[s_ji + 2]])                        made once, used by every layer

Letters: N nodes, d width, H heads, M layers, s_ij the distance from i to j, 0 where there is no path.

A graph is acyclic, so that of s_ij and s_ji one at least is 0: e depends on a signed distance, and W_1, W_2 are applied to the
rows of T instead of to N² pairs.

Reference: Knyazev, Hwang, Lacoste-Julien, "Can we scale Transformers to predict parameters of diverse ImageNet models?", ICML
2023; code SamsungSAILMontreal/ghn3 @ b3289ac, which overwrites its sinusoidal T by draws when the other embeddings start;
here T stays sinusoidal, as the code means it to be. Its padding gets some embedding, ours zeros.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxpeft.hyper.graph import OPS, Graph
from jaxpeft.models.fused import plain_layer_norm

__all__ = ["Vocabulary", "channel_ids", "dense", "dense_start", "encode", "encoder_start", "spatial_ids", "vocabulary"]

DEGREES, FAR, REACH = 100, 1000, 254  # what is told apart of degrees, of distances from the input, and of distances
MASKED = -(2.0**15)
EPS = 1e-5


class Vocabulary(NamedTuple):
    """Sizes that have an embedding of their own; others take the nearest one's."""

    channels: tuple[int, ...]
    spatial: tuple[int, ...] = (1, 3, 5, 7, 9, 11, 13, 14, 15, 16)


def vocabulary(classes: int, more: tuple[int, ...] = ()) -> Vocabulary:
    """Channels 1, 3, the number of classes, and steps of 8 up to 64, 16 up to 4096, 32 up to 8192; `more` for sizes of word
    lists, which GPT's and Llama's are in the reference code (32000, 50257, 128256)."""
    steps = {1, 3, classes, *more, *range(8, 64, 8), *range(64, 4096, 16), *range(4096, 8193, 32)}
    return Vocabulary(tuple(sorted(steps)))


def _nearest(sizes: Int[Array, "n"], known: tuple[int, ...]) -> Int[Array, "n"]:
    table = jnp.asarray(known, jnp.int32)
    nearest = jnp.abs(sizes[:, None] - table[None]).argmin(1)  # of two as near, the smaller
    return jnp.where(sizes == 0, len(known), nearest)


def channel_ids(sizes: Int[Array, "n"], words: Vocabulary) -> Int[Array, "n"]:
    """Positions of channel counts in the vocabulary, 4 to 7 being taken for 8; its length for a node without parameter."""
    return _nearest(jnp.where((sizes >= 4) & (sizes < 8), 8, sizes), words.channels)


def spatial_ids(sizes: Int[Array, "n"], words: Vocabulary) -> Int[Array, "n"]:
    """Positions of window sizes in the vocabulary, 2 being taken for 3; its length for a node without parameter."""
    return _nearest(jnp.where(sizes == 2, 3, sizes), words.spatial)


# ------------------------------------------------------------------------------------------------------------ starts


def dense_start(key: Key[Array, ""], rows: int, columns: int, small: bool = False) -> dict[str, Array]:
    """A linear layer as torch starts it, uniform within ±rows^-1/2; `small` divides by 5 and leaves the bias at zero."""
    kernel, bias = jax.random.split(key)
    draw = lambda key, shape: jax.random.uniform(key, shape, minval=-(rows**-0.5), maxval=rows**-0.5)
    if small:
        return {"kernel": draw(kernel, (rows, columns)) / 5, "bias": jnp.zeros(columns)}
    return {"kernel": draw(kernel, (rows, columns)), "bias": draw(bias, (columns,))}


def dense(p: PyTree, x: Float[Array, "*n a"]) -> Float[Array, "*n b"]:
    """x W + b."""
    return x @ p["kernel"] + p["bias"]


def encoder_start(key: Key[Array, ""], width: int, layers: int, heads: int, words: Vocabulary) -> PyTree:
    """The encoder's weights; the layers are stacked on a leading axis."""
    keys = iter(jax.random.split(key, 16))
    table = lambda rows, d: d**-0.5 * jax.random.truncated_normal(next(keys), -2 * d**0.5, 2 * d**0.5, (rows, d))
    norm = lambda: {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def layer(key: Key[Array, ""]) -> PyTree:
        qkv, out, up, down = jax.random.split(key, 4)
        return {
            "attention_norm": norm(),
            "qkv": {"kernel": dense_start(qkv, width, 3 * width)["kernel"]},
            "out": dense_start(out, width, width),
            "mlp_norm": norm(),
            "up": dense_start(up, width, 4 * width),
            "down": dense_start(down, 4 * width, width),
        }

    return {
        "op": table(len(OPS), width),
        "channel": table(len(words.channels) + 1, width // 4),
        "spatial": table(len(words.spatial) + 1, width // 4),
        "degree_in": table(DEGREES + 1, width),
        "degree_out": table(DEGREES + 1, width),
        "far": table(FAR + 1, width),
        "edge": {
            "table": _sinusoids(REACH + 3, width),
            "first": dense_start(next(keys), 2 * width, width),
            "second": dense_start(next(keys), width, heads),
        },
        "layers": jax.vmap(layer)(jax.random.split(next(keys), layers)),
        "norm": norm(),
    }


def _sinusoids(rows: int, width: int) -> Float[Array, "rows width"]:
    """Sines and cosines in turn, the first row zeros."""
    rates = jnp.exp(jnp.arange(0, width, 2) * (-jnp.log(10000.0) / width))
    angles = jnp.arange(rows, dtype=jnp.float32)[:, None] * rates
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(rows, -1)[:, :width]
    return waves.at[0].set(0.0)


# --------------------------------------------------------------------------------------------------------- the encoder


def encode(p: PyTree, graph: Graph, heads: int, words: Vocabulary) -> Float[Array, "N d"]:
    """Embeddings of a graph's nodes; zeros at padding, which nothing else depends on.

    Args:
      p: as `encoder_start` makes them.
      graph: whose arrays may be traced; distances over 254 count as 254. Node 0 is the input.
      heads: H.
    """
    distance = jnp.minimum(jnp.asarray(graph.distance), REACH)
    mask, shape = jnp.asarray(graph.mask), jnp.asarray(graph.shape)
    edge = distance == 1
    sizes = [p["channel"][channel_ids(shape[:, i], words)] for i in (0, 1)]
    windows = [p["spatial"][spatial_ids(shape[:, i], words)] for i in (2, 3)]
    x = p["op"][jnp.asarray(graph.op)] + jnp.concatenate([*sizes, *windows], 1)
    x = x + p["degree_in"][jnp.minimum(edge.sum(0), DEGREES)] + p["degree_out"][jnp.minimum(edge.sum(1), DEGREES)]
    x = (x + p["far"][jnp.minimum(jnp.asarray(graph.distance)[0], FAR)]) * mask[:, None]
    bias, both = _edge_bias(p["edge"], distance), mask[:, None] & mask[None]

    def step(x: Array, layer: PyTree) -> tuple[Array, None]:
        x = x + dense(layer["out"], _attention(layer, _norm(layer["attention_norm"], x), bias, both, heads))
        return x + dense(layer["down"], _gelu(dense(layer["up"], _norm(layer["mlp_norm"], x)))), None

    x, _ = jax.lax.scan(step, x, p["layers"])
    return _norm(p["norm"], x) * mask[:, None]


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def _norm(p: PyTree, x: Array) -> Array:
    return plain_layer_norm(x, p["scale"], p["bias"], EPS)


def _edge_bias(p: PyTree, distance: Int[Array, "N N"]) -> Float[Array, "H N N"]:
    width = p["table"].shape[1]
    there, back = p["table"] @ p["first"]["kernel"][:width], p["table"] @ p["first"]["kernel"][width:]
    second = lambda rows: dense(p["second"], jax.nn.relu(rows + p["first"]["bias"]))
    ahead, behind = second(there + back[2]), second(there[2] + back)  # row 2 stands for no path
    chosen = jnp.where((distance > 0)[..., None], ahead[distance + 2], behind[distance.T + 2])
    return jnp.moveaxis(chosen, -1, 0)


def _attention(p: PyTree, x: Array, bias: Array, both: Array, heads: int) -> Array:
    n, width = x.shape
    q, k, v = jnp.moveaxis((x @ p["qkv"]["kernel"]).reshape(n, 3, heads, width // heads), 1, 0)
    logits = jnp.einsum("ihk,jhk->hij", q, k) * (width // heads) ** -0.5 + bias
    share: Any = jax.nn.softmax(jnp.where(both, logits, MASKED), -1)
    return jnp.einsum("hij,jhk->ihk", share, v).reshape(n, width)
