"""DiT: a diffusion transformer with adaptive layer norms that start at zero.

    x₀ = patch(pixels) + position,    c = time(sinusoids(t)) + label[class],
    (b₁, s₁, g₁, b₂, s₂, g₂) = modulation(silu(c))                           six vectors a block; zeros at the start
    x ← x + g₁ · attention(norm(x)(1 + s₁) + b₁)
    x ← x + g₂ · mlp(norm(x)(1 + s₂) + b₂)
    ε = unpatch(out(norm(x_L)(1 + s) + b)),    (b, s) = final_modulation(silu(c))                 norms have no parameters

Labels are 0 ... n-1; n is the empty class, the condition that means none. A new model answers zero, and its blocks are the
identity. Pixels are (b, height, width, channels), and so is the answer.

Parameter paths: `patch`, `position/embedding`, `time/{up,down}`, `label/embedding`, `layers_{i}/{modulation, attention/...,
mlp/...}` (or `layers/...` where `scan` is set), `final_modulation`, `out`.

Reference: Peebles and Xie, "Scalable diffusion models with transformers", ICCV 2023 (arXiv:2212.09748). Not taken over: the
fixed sinusoidal positions (learned here), and the second half of the output that predicts variances.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxpeft.models.layers import Attention, BlockConfig, Mlp, dense, embed, run_layers
from jaxpeft.trees import wide_dtype

__all__ = ["Dit", "DitBlock", "DitConfig", "patches", "sinusoids", "unpatched"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DitConfig(BlockConfig):
    """A diffusion transformer. Sizes are (height, width); `frequencies` is the number of sines and cosines of the time."""

    image: tuple[int, int] = (32, 32)
    patch: tuple[int, int] = (2, 2)
    channels: int = 3
    classes: int = 10
    frequencies: int = 64
    norm_eps: float = 1e-6
    activation: str = "gelu_pytorch_tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        for side, piece in zip(self.image, self.patch, strict=True):
            if piece < 1 or side < piece or side % piece:
                raise ValueError(f"patches of {self.patch} do not divide an image of {self.image}")
        if self.classes < 1:
            raise ValueError(f"classes {self.classes}: at least 1; an unconditional model is one of one class")
        if self.frequencies < 2 or self.frequencies % 2:
            raise ValueError(f"frequencies {self.frequencies}: an even number of 2 or more, half sines, half cosines")

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (self.image[0] // self.patch[0]) * (self.image[1] // self.patch[1])


def patches(x: Float[Array, "b y x c"], patch: tuple[int, int]) -> Float[Array, "b t p"]:
    """Each patch's pixels in a row, patches by rows."""
    b, height, width, c = x.shape
    rows, columns = height // patch[0], width // patch[1]
    x = x.reshape(b, rows, patch[0], columns, patch[1], c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * columns, patch[0] * patch[1] * c)


def unpatched(x: Float[Array, "b t p"], image: tuple[int, int], patch: tuple[int, int]) -> Float[Array, "b y x c"]:
    """Undoes `patches`."""
    rows, columns = image[0] // patch[0], image[1] // patch[1]
    x = x.reshape(x.shape[0], rows, columns, *patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(x.shape[0], *image, -1)


def sinusoids(t: Int[Array, "b"] | Float[Array, "b"], size: int) -> Float[Array, "b f"]:
    """Cosines, then sines of t at `size / 2` frequencies from 1 down to nearly 1 / 10000."""
    rates = jnp.asarray(np.exp(-np.log(10000.0) * np.arange(size // 2) / (size // 2)), jnp.float32)
    angle = t.astype(jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def modulated(
    x: Float[Array, "b t d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"], eps: float
) -> Float[Array, "b t d"]:
    """Layer norm without parameters, then the condition's; statistics in at least float32."""
    y = x.astype(wide_dtype(x.dtype))
    y = y - y.mean(-1, keepdims=True)
    y = y * jnp.reciprocal(jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + eps))
    return y.astype(x.dtype) * (1 + scale[:, None]) + shift[:, None]


def zeros(c: DitConfig, features: int, name: str) -> nn.Dense:
    """A dense layer whose answer is zero at the start."""
    return nn.Dense(features, dtype=c.dtype, param_dtype=c.param_dtype, kernel_init=nn.initializers.zeros, name=name)


class DitBlock(nn.Module):
    """A pre-norm block whose norms and residual branches the condition sets."""

    config: DitConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        bias: Float[Array, "#b #h #t t"] | None = None,
        deterministic: bool = True,
        condition: Float[Array, "b d"] | None = None,
    ) -> Float[Array, "b t d"]:
        c = self.config
        assert condition is not None
        six = jnp.split(zeros(c, 6 * c.width, "modulation")(nn.silu(condition)), 6, axis=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = six
        y = Attention(c, name="attention")(modulated(x, shift, scale, c.norm_eps), bias)
        x = x + gate[:, None] * nn.Dropout(c.dropout)(y, deterministic=deterministic)
        y = Mlp(c, name="mlp")(modulated(x, mlp_shift, mlp_scale, c.norm_eps), deterministic)
        return x + mlp_gate[:, None] * y


class _Time(nn.Module):
    """The embedding of the time."""

    config: DitConfig

    @nn.compact
    def __call__(self, t: Array) -> Float[Array, "b d"]:
        c = self.config
        x = dense(c, c.width, use_bias=True, name="up")(sinusoids(t, c.frequencies).astype(c.dtype))
        return dense(c, c.width, use_bias=True, name="down")(nn.silu(x))


class Dit(nn.Module):
    """ε (b, height, width, channels) of noisy pixels, their times (b,) and classes (b,), `config.classes` for none."""

    config: DitConfig
    tap: str = ""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b y x c"],
        t: Int[Array, "b"],
        label: Int[Array, "b"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b y x c"]:
        c = self.config
        if x.ndim != 4 or x.shape[1:] != (*c.image, c.channels):
            raise ValueError(f"x has shape {x.shape}, expected (batch, {c.image[0]}, {c.image[1]}, {c.channels})")
        for name, value in (("t", t), ("label", label)):
            if value.shape != x.shape[:1]:
                raise ValueError(f"{name} has shape {value.shape}, expected {x.shape[:1]}: one an example")
        condition = _Time(c, name="time")(t) + embed(c, c.classes + 1, "label")(label)
        tokens = dense(c, c.width, use_bias=True, name="patch")(patches(x.astype(c.dtype), c.patch))
        tokens = tokens + embed(c, c.tokens, "position")(jnp.arange(c.tokens)[None])
        tokens = checkpoint_name(tokens, f"{self.tap}embedded")
        tokens = run_layers(DitBlock, c, tokens, None, condition, deterministic=deterministic, tap=self.tap)
        shift, scale = jnp.split(zeros(c, 2 * c.width, "final_modulation")(nn.silu(condition)), 2, axis=-1)
        tokens = checkpoint_name(modulated(tokens, shift, scale, c.norm_eps), f"{self.tap}final_hidden")
        return unpatched(zeros(c, int(np.prod(c.patch)) * c.channels, "out")(tokens), c.image, c.patch)

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, ...]:
        c = self.config
        one = jnp.zeros(1, jnp.int32)
        return jnp.zeros((1, *c.image, c.channels), c.dtype), one, one
