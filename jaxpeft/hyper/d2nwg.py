"""D2NWG: diffusion-based neural network weights generation (Soro et al., ICLR 2025, arXiv:2402.18153).

The distribution of the weights of a zoo of trained networks, given the data each was trained on. Three stages:

    1. a variational autoencoder of weight vectors w               z ~ N(μ(w), σ²(w)),  ŵ = D(z)
         L = 1/B Σ_b Σ_j [|w - ŵ| / e^s + s] + 1e-6 · 1/B Σ_b KL + 1000 mean (w - ŵ)²,    s = 0
    2. an embedding d of data sets from samples' features, aligned with the latents like CLIP's two towers
         logits = W Dᵀ / τ,  targets = softmax((D Dᵀ + W Wᵀ) τ / 2),  L = mean ½ [CE(logits, targets) + CE(logitsᵀ, targetsᵀ)]
    3. diffusion of z / std(z), given the embedding                ε-prediction, β linear in its square root

For a data set, new ones included: embed some of its samples, sample z, decode, reshape; several, of which the best is kept. A
hypernetwork in this room's sense, whose condition is (features, key).

Letters: B batch, n numbers of a network (padded), z latent, c classes with m samples of f features each.

Reference code: sorobedio/DNNWG @ 97ce4b6 (stage1, clips, stage2). Departures: encoder, decoder and denoiser are arguments, by
default perceptrons on vectors where the reference has convolutions on latents folded to images and a UNet; padding is left
out of the loss (there the autoencoder learns zeros); the latents' std is that of the whole zoo, not of the first batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree

from jaxpeft import generate as diffusion
from jaxpeft.hyper.hypernetwork import Hypernetwork, TargetError, as_spec, register_hypernetwork, split_target
from jaxpeft.hyper.set_transformer import DatasetEncoder
from jaxpeft.models.dit import sinusoids

__all__ = [
    "Denoiser",
    "Flat",
    "SampleEncoder",
    "VectorVae",
    "WeightDiffusion",
    "align_loss",
    "d2nwg",
    "d2nwg_schedule",
    "flat",
    "kl_to_normal",
    "vae_loss",
    "weight_diffusion",
]

KL_WEIGHT, SQUARED_WEIGHT = 1e-6, 1000.0


# ---------------------------------------------------------------------------------------------------------------- vectors


class Flat(NamedTuple):
    """A tree as one vector and back.

    Attributes:
      flatten: `(params) -> (length,)`, leaves in their order, padded with zeros, divided by the scale.
      unflatten: the inverse.
      real: (length,), False where it is padding.
    """

    flatten: Callable[[PyTree], Float[Array, "n"]]
    unflatten: Callable[[Float[Array, "n"]], PyTree]
    real: Bool[np.ndarray, "n"]


def flat(spec: PyTree, length: int | None = None, scale: float = 1.0) -> Flat:
    """Vectors of this target's parameters.

    Args:
      spec: floating-point leaves, arrays or `jax.ShapeDtypeStruct`s.
      length: n, at least the target's size; None for that. Networks of several sizes share the largest.
      scale: what weights are divided by (reference: 1 for heads, 0.125 for whole ResNets).

    Raises:
      TargetError: as `split_target`, or a length under the target's size.
      ValueError: a scale that is not over 0.
    """
    spec = as_spec(spec)
    split_target(spec)
    leaves, structure = jtu.tree_flatten(spec)
    sizes = [int(np.prod(x.shape)) for x in leaves]
    count = sum(sizes)
    length = count if length is None else length
    if length < count:
        raise TargetError(f"length {length} for a target of {count} numbers: at least as many")
    if not scale > 0:
        raise ValueError(f"scale {scale}: over 0")
    cuts = np.cumsum(sizes)[:-1].tolist()

    def flatten(params: PyTree) -> Array:
        own = [jnp.ravel(x).astype(jnp.float32) for x in jtu.tree_leaves(params)]
        return jnp.pad(jnp.concatenate(own) / scale, (0, length - count))

    def unflatten(w: Array) -> PyTree:
        parts = jnp.split(w[:count] * scale, cuts)
        return jtu.tree_unflatten(structure, [p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, leaves)])

    return Flat(flatten, unflatten, np.arange(length) < count)


# ----------------------------------------------------------------------------------------------------------------- stages


class VectorVae(nn.Module):
    """An autoencoder of vectors: perceptrons to (μ, log σ²) and back."""

    length: int
    latent: int
    hidden: Sequence[int] = (512, 256)

    def setup(self) -> None:
        self.inward = [nn.Dense(h) for h in (*self.hidden, 2 * self.latent)]
        self.outward = [nn.Dense(h) for h in (*reversed(self.hidden), self.length)]

    def encode(self, w: Float[Array, "b n"]) -> tuple[Float[Array, "b z"], Float[Array, "b z"]]:
        """μ and log σ², the latter within [-30, 20]."""
        mean, log_variance = jnp.split(_perceptron(self.inward, w), 2, -1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, z: Float[Array, "b z"]) -> Float[Array, "b n"]:
        return _perceptron(self.outward, z)

    def __call__(self, w: Float[Array, "b n"]) -> Float[Array, "b n"]:
        return self.decode(self.encode(w)[0])


def _perceptron(layers: Sequence[Callable[..., Any]], x: Array) -> Array:
    for layer in layers[:-1]:
        x = nn.leaky_relu(layer(x))
    return layers[-1](x)


class SampleEncoder(nn.Module):
    """The alternative to a set encoder, which heeds the order of classes: a linear map of the c·m samples, then features.

    For fewer classes the map's first rows alone are used.
    """

    classes: int
    samples: int
    outputs: int = 1024
    channels: int = 4

    @nn.compact
    def __call__(self, x: Float[Array, "c m f"]) -> Float[Array, "o"]:
        c, m, f = x.shape
        if c > self.classes or m != self.samples:
            raise ValueError(f"{c} classes of {m} samples: expected at most {self.classes}, of {self.samples}")
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (self.classes * self.samples, self.channels))
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        # As in the reference, samples count slowest: fewer classes still take the first rows.
        rows = x.transpose(1, 0, 2).reshape(m * c, f)
        mixed = nn.leaky_relu(rows.T @ kernel[: m * c] + bias)
        return nn.Dense(self.outputs, name="head")(mixed.reshape(-1))


class Denoiser(nn.Module):
    """ε of noisy latents: residual perceptrons, shifted and scaled by time and condition."""

    width: int = 256
    depth: int = 3
    frequencies: int = 64

    @nn.compact
    def __call__(
        self, z: Float[Array, "b z"], t: Float[Array, "b"], condition: Float[Array, "b e"]
    ) -> Float[Array, "b z"]:
        time = nn.Dense(self.width, name="time")(sinusoids(t, self.frequencies))
        # Set encoders have no norm of their own, and alignment lets embeddings grow.
        condition = nn.LayerNorm(use_scale=False, use_bias=False)(condition)
        both = nn.silu(time + nn.Dense(self.width, name="condition")(condition))
        x = nn.Dense(self.width, name="in")(z)
        for i in range(self.depth):
            shift, scale = jnp.split(nn.Dense(2 * self.width, name=f"modulation_{i}")(both), 2, -1)
            y = nn.LayerNorm(use_scale=False, use_bias=False)(x) * (1 + scale) + shift
            x = x + nn.Dense(self.width, name=f"down_{i}")(nn.silu(nn.Dense(self.width, name=f"up_{i}")(y)))
        return nn.Dense(z.shape[-1], kernel_init=nn.initializers.zeros, name="out")(x)


def d2nwg_schedule(times: int = 1024) -> diffusion.Schedule:
    """β from 0.0015 to 0.0155, linear in the square root; with fewer times each is as many times larger."""
    low, high = (math.sqrt(x * 1024 / times) for x in (0.0015, 0.0155))
    return diffusion.schedule(np.linspace(low, high, times) ** 2)


def kl_to_normal(mean: Float[Array, "b z"], log_variance: Float[Array, "b z"]) -> Float[Array, "b"]:
    """½ Σ (μ² + σ² - 1 - log σ²)."""
    return 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).sum(-1)


def vae_loss(
    w: Float[Array, "b n"],
    decoded: Float[Array, "b n"],
    mean: Float[Array, "b z"],
    log_variance: Float[Array, "b z"],
    *,
    real: Bool[Array, "n"] | None = None,
    kl: Any = KL_WEIGHT,
    squared: Any = SQUARED_WEIGHT,
    log_scale: Any = 0.0,
) -> Float[Array, ""]:
    """L of stage 1: absolute errors summed over a vector, squared ones averaged over all numbers.

    Args:
      real: which numbers count; None for all. The reference counts the padding in.
      log_scale: s; a parameter that the reference never trains.
    """
    keep = jnp.ones(w.shape[-1]) if real is None else jnp.asarray(real, jnp.float32)
    error = (w - decoded) * keep
    absolute = (jnp.abs(error) / jnp.exp(log_scale) + log_scale * keep).sum(-1).mean()
    mean_square = jnp.square(error).sum() / (keep.sum() * w.shape[0])
    return absolute + kl * kl_to_normal(mean, log_variance).mean() + squared * mean_square


def align_loss(W: Float[Array, "b e"], D: Float[Array, "b e"], tau: Any = 1.0) -> Float[Array, ""]:
    """L of stage 2, of latents W and embeddings D of the same networks' data, without normalisation; targets have a slope.

    Raises:
      ValueError: shapes that differ.
    """
    if W.shape != D.shape or W.ndim != 2:
        raise ValueError(f"latents {W.shape} and embeddings {D.shape}: expected one shape (b, e)")
    logits = W @ D.T / tau
    targets = jax.nn.softmax((D @ D.T + W @ W.T) / 2 * tau, -1)
    ce = lambda logits, targets: -(targets * jax.nn.log_softmax(logits, -1)).sum(-1)
    return ((ce(logits, targets) + ce(logits.T, targets.T)) / 2).mean()


class WeightDiffusion(NamedTuple):
    """The stages of a generator: pure functions of its weights {"vae", "data", "denoiser", "latent_std"}.

    Attributes:
      vectors: `Flat` of the target.
      init: `(key) -> weights`.
      vae_loss: `(weights, w (b, n), key) -> scalar`, of "vae".
      latents: `(weights, w, key) -> z (b, z)`, drawn; without a key the means.
      calibrated: `(weights, w, key) -> weights` with the latents' std over a whole zoo. Between stages 1 and 3.
      embed: `(weights, features (b, c, m, f)) -> (b, e)`.
      align_loss: `(weights, w, features, key) -> scalar`, of "data": latents have no slope.
      diffusion_loss: `(weights, w, features, key) -> scalar`, of "denoiser" and "data"; features None is unconditional. The
        reference goes on training the last layer alone of an aligned encoder; it has no norms, and all of it may diverge.
      generate: `(weights, features (c, m, f), key) -> params`: one network.
    """

    vectors: Flat
    init: Callable[..., PyTree]
    vae_loss: Callable[..., Array]
    latents: Callable[..., Array]
    calibrated: Callable[..., PyTree]
    embed: Callable[..., Array]
    align_loss: Callable[..., Array]
    diffusion_loss: Callable[..., Array]
    generate: Callable[..., PyTree]


def weight_diffusion(
    spec: PyTree,
    features: tuple[int, int, int],
    *,
    latent: int = 64,
    length: int | None = None,
    scale: float = 1.0,
    times: int = 1024,
    vae: nn.Module | None = None,
    encoder: nn.Module | None = None,
    denoiser: nn.Module | None = None,
) -> WeightDiffusion:
    """The stages for a target.

    Args:
      spec: of one network of the zoo.
      features: (c, m, f): classes, samples of each, their features' size.
      latent: z.
      length, scale: as in `flat`.
      times: T of the diffusion.
      vae: a module with `encode` and `decode` as `VectorVae`'s, the default.
      encoder: `(c, m, f) -> (e,)`, e being z where it is to be aligned; None for `DatasetEncoder` of z outputs.
      denoiser: `(z (b, z), t (b,), condition (b, e)) -> (b, z)`; None for `Denoiser`.

    Raises:
      TargetError, ValueError: as `flat`, or sizes under 1.
    """
    if min(features) < 1 or latent < 1 or times < 1:
        raise ValueError(f"features {features}, latent {latent}, times {times}: at least 1 each")
    vectors = flat(spec, length, scale)
    n = len(vectors.real)
    vae = VectorVae(n, latent) if vae is None else vae
    encoder = DatasetEncoder(latent) if encoder is None else encoder
    denoiser = Denoiser() if denoiser is None else denoiser
    schedule = d2nwg_schedule(times)
    shown: Any = jax.eval_shape(encoder.init_with_output, jax.random.key(0), jnp.zeros(features))
    size = shown[0].shape[-1]

    def init(key: Key[Array, ""]) -> PyTree:
        first, second, third = jax.random.split(key, 3)
        one = jnp.zeros(1, jnp.int32)
        return {
            "vae": vae.init(first, jnp.zeros((1, n))),
            "data": encoder.init(second, jnp.zeros(features)),
            "denoiser": denoiser.init(third, jnp.zeros((1, latent)), one, jnp.zeros((1, size))),
            "latent_std": jnp.ones(()),
        }

    def encode(weights: PyTree, w: Array, key: Any) -> tuple[Array, Array, Array]:
        """μ, log σ², and z, which without a key is μ."""
        both: Any = vae.apply(weights["vae"], w, method="encode")
        mean, log_variance = both
        noise = 0.0 if key is None else jax.random.normal(key, mean.shape)
        return mean, log_variance, mean + jnp.exp(log_variance / 2) * noise

    def latents(weights: PyTree, w: Array, key: Any = None) -> Array:
        return encode(weights, w, key)[2]

    def own_vae_loss(weights: PyTree, w: Array, key: Key[Array, ""]) -> Array:
        mean, log_variance, z = encode(weights, w, key)
        decoded: Any = vae.apply(weights["vae"], z, method="decode")
        return vae_loss(w, decoded, mean, log_variance, real=jnp.asarray(vectors.real))

    def calibrated(weights: PyTree, w: Array, key: Any = None) -> PyTree:
        return {**weights, "latent_std": latents(weights, w, key).std()}

    def embed(weights: PyTree, x: Array) -> Any:
        return jax.vmap(lambda x: encoder.apply(weights["data"], x))(x)

    def own_align_loss(weights: PyTree, w: Array, x: Array, key: Any = None) -> Array:
        return align_loss(jax.lax.stop_gradient(latents(weights, w, key)), embed(weights, x))

    def condition(weights: PyTree, x: Any, examples: int) -> Array:
        return jnp.zeros((examples, size)) if x is None else embed(weights, x)

    def predict(weights: PyTree) -> Any:
        return lambda z, t, c: denoiser.apply(weights["denoiser"], z, t, c)

    def diffusion_loss(weights: PyTree, w: Array, x: Any, key: Key[Array, ""]) -> Array:
        drawn, noise = jax.random.split(key)
        z = jax.lax.stop_gradient(latents(weights, w, drawn)) / jax.lax.stop_gradient(weights["latent_std"])
        c = condition(weights, x, w.shape[0])
        return diffusion.epsilon_loss(predict(weights), schedule, noise, z, c).mean()

    def generate(weights: PyTree, x: Any, key: Key[Array, ""]) -> PyTree:
        start, steps = jax.random.split(key)
        c = condition(weights, None if x is None else x[None], 1)
        z = diffusion.ddpm(predict(weights), schedule, steps, jax.random.normal(start, (1, latent)), c)
        decoded: Any = vae.apply(weights["vae"], z * weights["latent_std"], method="decode")
        return vectors.unflatten(decoded[0])

    return WeightDiffusion(
        vectors, init, own_vae_loss, latents, calibrated, embed, own_align_loss, diffusion_loss, generate
    )


@register_hypernetwork(paper="Soro et al., ICLR 2025")
def d2nwg(spec: PyTree, features: tuple[int, int, int], **options: Any) -> Hypernetwork:
    """`weight_diffusion` as a hypernetwork: `apply(weights, (features (c, m, f), key))` returns parameters for that data set.

    `vmap` over keys gives several, of which the best on a few labelled examples is kept. Arguments and errors as in
    `weight_diffusion`, whose losses train the weights.
    """
    stages = weight_diffusion(spec, features, **options)
    plain = {k: v for k, v in options.items() if not isinstance(v, nn.Module)}
    modules = {k: repr(v) for k, v in options.items() if isinstance(v, nn.Module)}
    apply = lambda weights, condition: stages.generate(weights, *condition)
    return Hypernetwork("d2nwg", stages.init, apply, as_spec(spec), {"features": list(features), **plain, **modules})
