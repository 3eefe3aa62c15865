"""The Set Transformer (Lee et al., ICML 2019), and two of them as an encoder of data sets.

    MAB(Q, K) = O + relu(O W_o),   O = Q' + heads of softmax(Q' K'ᵀ / √d) V'          Q', K', V' affine in Q, K, K
    ISAB(X)   = MAB(X, MAB(I, X))  I inducing points, learned                          linear in the size of the set
    PMA(X)    = MAB(S, X)          S seeds, learned: a set of any size becomes as many vectors

The scale is that of the whole width d, not of a head. Letters: n elements, f features, d width, s seeds; c classes with m
samples each.

Reference code: the copy in sorobedio/DNNWG @ 97ce4b6 (stage2/set_transformer, clips/modules/dataset_encoder.py).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["DatasetEncoder", "InducedAttention", "SeedPooling", "SetAttention", "SetTransformer"]


class SetAttention(nn.Module):
    """MAB: each query's vector of what it attends to in the keys. With keys = queries it is SAB."""

    width: int
    heads: int = 2

    @nn.compact
    def __call__(self, queries: Float[Array, "*b n f"], keys: Float[Array, "*b k e"]) -> Float[Array, "*b n d"]:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divided by {self.heads} heads")
        q = nn.Dense(self.width, name="query")(queries)
        k, v = nn.Dense(self.width, name="key")(keys), nn.Dense(self.width, name="value")(keys)
        apart = lambda x: x.reshape(*x.shape[:-1], self.heads, -1)
        scores = jnp.einsum("...nhd,...khd->...hnk", apart(q), apart(k)) / math.sqrt(self.width)
        o = q + jnp.einsum("...hnk,...khd->...nhd", jax.nn.softmax(scores, -1), apart(v)).reshape(q.shape)
        return o + nn.relu(nn.Dense(self.width, name="out")(o))


class InducedAttention(nn.Module):
    """ISAB."""

    width: int
    heads: int = 2
    points: int = 32

    @nn.compact
    def __call__(self, x: Float[Array, "*b n f"]) -> Float[Array, "*b n d"]:
        points = self.param("points", nn.initializers.xavier_uniform(), (self.points, self.width))
        wide = jnp.broadcast_to(points, (*x.shape[:-2], *points.shape))
        inner = SetAttention(self.width, self.heads, name="inner")(wide, x)
        return SetAttention(self.width, self.heads, name="outer")(x, inner)


class SeedPooling(nn.Module):
    """PMA."""

    width: int
    heads: int = 2
    seeds: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*b n f"]) -> Float[Array, "*b s d"]:
        seeds = self.param("seeds", nn.initializers.xavier_uniform(), (self.seeds, self.width))
        wide = jnp.broadcast_to(seeds, (*x.shape[:-2], *seeds.shape))
        return SetAttention(self.width, self.heads, name="attention")(wide, x)


class SetTransformer(nn.Module):
    """Two ISABs, PMA, two SABs, a linear map: (*b, n, f) -> (*b, seeds, outputs), whatever the order of the n."""

    outputs: int
    width: int = 128
    heads: int = 2
    points: int = 32
    seeds: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*b n f"]) -> Float[Array, "*b s o"]:
        for i in range(2):
            x = InducedAttention(self.width, self.heads, self.points, name=f"induced_{i}")(x)
        x = SeedPooling(self.width, self.heads, self.seeds, name="pool")(x)
        for i in range(2):
            x = SetAttention(self.width, self.heads, name=f"among_{i}")(x, x)
        return nn.Dense(self.outputs, name="head")(x)


class DatasetEncoder(nn.Module):
    """A data set's embedding from features of a few samples of each class: over samples, then over classes.

    It does not depend on the order of samples nor of classes: what it cannot tell is which class comes first.
    """

    outputs: int = 1024
    between: int = 512
    width: int = 128
    heads: int = 2
    points: int = 32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c m f"]) -> Float[Array, "*b o"]:
        own = SetTransformer(self.between, self.width, self.heads, self.points, name="intra")(x)
        whole = SetTransformer(self.between, self.width, self.heads, self.points, name="inter")(own.squeeze(-2))
        return nn.Dense(self.outputs, name="head")(whole.squeeze(-2))
