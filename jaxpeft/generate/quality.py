"""How good samples are, and how much of them is memory.

    FD      ‖μ_r - μ_g‖² + tr(S_r + S_g - 2 (S_r S_g)^{1/2}) of features: whosever they are, say whose
    MIFID   FD over the distance to the nearest training features, where that is small

Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", NeurIPS 2017; Bai et al.,
KDD 2021; Carlini et al., USENIX Security 2023. Letters: n real samples, m made ones, f features, g images of a condition.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpeft import trees

__all__ = ["extraction", "frechet", "mifid", "nearest_distance", "tile_distance"]


def frechet(real: Float[Array, "n f"], made: Float[Array, "m f"], ridge: float = 0.0) -> Float[Array, ""]:
    """The Fréchet distance of two Gaussians with these samples' means and covariances (over n - 1).

    Biased upward for few samples: compare only what was computed from equal numbers of them.

    Args:
      real, made: two samples or more each.
      ridge: added to the diagonal of both covariances, where there are fewer samples than features.
    """

    product = lambda a, b: jnp.matmul(
        a, b, precision="highest"
    )  # accelerators' usual ten bits would be seen in the result

    def moments(x: Array) -> tuple[Array, Array, Array]:
        x = x.astype(trees.wide_dtype(x.dtype))
        mean = x.mean(0)
        s = product((x - mean).T, x - mean) / (x.shape[0] - 1) + ridge * jnp.eye(x.shape[1], dtype=x.dtype)
        values, vectors = jnp.linalg.eigh(s)
        return mean, jnp.trace(s), product(vectors * jnp.sqrt(jnp.maximum(values, 0)), vectors.T)

    (mu_r, trace_r, root_r), (mu_g, trace_g, root_g) = moments(real), moments(made)
    # S_r S_g has the eigenvalues of (S_g^½ S_r^½)ᵀ(S_g^½ S_r^½): their roots are its singular values. Taken so, and not from
    # the product of the covariances, as roots of small differences would lose half of float32's digits.
    both = jnp.linalg.svd(product(root_g, root_r), compute_uv=False).sum()
    return jnp.square(mu_r - mu_g).sum() + trace_r + trace_g - 2 * both


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0], -1).astype(trees.wide_dtype(x.dtype))


def _cosines(a: Float[Array, "m f"], b: Float[Array, "n f"]) -> Float[Array, "m n"]:
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return jnp.matmul(unit(a), unit(b).T, precision="highest")


def nearest_distance(
    made: Float[Array, "m ..."], train: Float[Array, "n ..."], metric: Literal["cosine", "euclidean"] = "cosine"
) -> Float[Array, "m"]:
    """The distance of each to the nearest of `train`. The mean of cosine ones of features is MemControl's AMD.

    Raises:
      ValueError: an unknown metric.
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric {metric!r}: expected 'cosine' or 'euclidean'")
    a, b = _flat(made), _flat(train)
    if metric == "cosine":
        return (1 - _cosines(a, b)).min(1)
    # Differences one image of `train` after another: the expanded square loses the small distances that matter here.
    nearer = lambda d, y: (jnp.minimum(d, jnp.square(a - y).sum(1)), None)
    return jnp.sqrt(jax.lax.scan(nearer, jnp.full(a.shape[0], jnp.inf, a.dtype), b)[0])


def mifid(fd: Array, made: Float[Array, "m f"], train: Float[Array, "n f"], threshold: float = 0.1) -> Float[Array, ""]:
    """FD, divided by the mean distance to the nearest training features (1 - |cosine|) where that is under the threshold.

    Reference: Bai et al., "On training sample memorization: lessons from benchmarking generative modeling with a large-scale
    competition", KDD 2021. torchmetrics takes the mean over the training features, each one's nearest generated one: exchange
    the two to have its number.
    """
    d = (1 - jnp.abs(_cosines(_flat(made), _flat(train)))).min(1).mean()
    return fd / (jnp.where(d < threshold, d, 1.0) + 1e-15)


def tile_distance(a: Float[Array, "m y x c"], b: Float[Array, "n y x c"], tiles: int = 4) -> Float[Array, "m n"]:
    """The largest Euclidean distance over tiles x tiles aligned tiles (Carlini et al., USENIX Security 2023).

    Raises:
      ValueError: a size that the number of tiles does not divide.
    """
    height, width = a.shape[1:3]
    if height % tiles or width % tiles:
        raise ValueError(f"images of {height} x {width} do not divide into {tiles} x {tiles} tiles")

    def cut(x: Array) -> Array:
        x = x.astype(trees.wide_dtype(x.dtype)).reshape(-1, tiles, height // tiles, tiles, width // tiles, x.shape[-1])
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], tiles * tiles, -1)

    p, q = cut(a), cut(b)
    one = lambda y: jnp.sqrt(jnp.square(p - y).sum(-1)).max(-1)
    return jax.lax.map(one, q).T


def extraction(
    made: Float[Array, "g y x c"], threshold: Any, *, tiles: int = 4, smallest: int = 3
) -> tuple[Bool[Array, ""], Int[Array, ""]]:
    """Whether several images of one condition show it to be memorised.

    Two images are alike if their `tile_distance` is under the threshold; of the connected components of that graph the
    largest counts (the first of equal ones).

    Args:
      made: generated for one condition, from different noise.
      threshold: may be traced; 20 in the reference, for pixels in [0, 1] at 512 x 512 x 3.
      tiles: along each side.
      smallest: images in a component that shows memorisation.

    Returns:
      Whether it is memorised, and the first image of the component. It is *extracted* if a training image of the condition
      is like that image.
    """
    g = made.shape[0]
    linked = (tile_distance(made, made, tiles) < threshold) | jnp.eye(g, dtype=bool)
    # Squaring doubles the length of the paths: log2 g times reach everything.
    for _ in range(max(1, math.ceil(math.log2(max(g, 2))))):
        linked = (linked.astype(jnp.float32) @ linked.astype(jnp.float32)) > 0
    sizes = linked.sum(1)
    first = jnp.argmax(sizes)
    return sizes[first] >= smallest, first
