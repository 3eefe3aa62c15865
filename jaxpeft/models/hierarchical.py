"""A small hierarchical vision transformer with windows, Swin's, for dense tasks.

    stage b:  width d 2^b, a grid of half the side of stage b - 1's, attention inside windows of w x w tokens
    merge:    4 neighbours side by side -> norm -> linear map to twice the width, between stages
    block:    x ← x + attention(norm(x)),  x ← x + mlp(norm(x)),  every second block's windows shifted by w / 2
    attention logits get a learned bias for each offset of two tokens of a window

`HierarchicalTransformer` gives each stage's normed states as a map; `DenseModel` puts an all-linear decoder on them, which
answers for each pixel, and `HierarchicalClassifier` a linear map on the last stage's mean.

Paths: `stages_{b}/layers_{i}/{attention, attention_norm, mlp, mlp_norm, offsets}`, inside as in `layers`. Blocks are marked
"hidden", each (b, t, d 2^b); layers are not scanned, since they alternate.

Reference: Liu et al., "Swin transformer: hierarchical vision transformer using shifted windows", ICCV 2021 (its published
weights are not read here); Xie et al., "SegFormer", NeurIPS 2021, for the decoder.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxpeft.models.layers import MASKED, Attention, BlockConfig, Mlp, dense, kernel_init, norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class HierarchicalConfig:
    """Sizes of all stages; `width` is the first one's. Sizes of images and patches are (height, width).

    `remat`, `plain`, `dtype` and `param_dtype` are as in `BlockConfig`.
    """

    width: int = 16
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (1, 2, 4, 8)
    window: int = 4
    mlp_ratio: int = 4
    image: tuple[int, int] = (32, 32)
    patch: tuple[int, int] = (2, 2)
    channels: int = 1
    activation: str = "gelu"
    norm_eps: float = 1e-5
    dropout: float = 0.0
    init_std: float | None = 0.02
    remat: bool = False
    plain: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if not self.depths or len(self.heads) != len(self.depths):
            raise ValueError(f"depths {self.depths} and heads {self.heads}: expected one of each for every stage")
        for b in range(len(self.depths)):
            c, (y, x) = self.stage(b), self.grid(b)
            if c.width % c.heads:
                raise ValueError(f"{c.heads} heads do not divide stage {b}'s width, {c.width}")
            whole = all(n >= 1 and n * (p << b) == side for n, p, side in zip((y, x), self.patch, self.image))
            if not whole or any(n % min(self.window, y, x) for n in (y, x)):
                raise ValueError(
                    f"an image of {self.image} in patches of {self.patch} makes no whole windows of {self.window} in stage "
                    f"{b}: each side is a multiple of patch x window x {2**b}, or the grid one window"
                )

    def grid(self, stage: int) -> tuple[int, int]:
        """Tokens of a stage, (rows, columns)."""
        y, x = (side // (p << stage) for side, p in zip(self.image, self.patch))
        return y, x

    def stage(self, stage: int) -> BlockConfig:
        """The configuration of a stage's blocks."""
        width = self.width << stage
        return BlockConfig(
            width=width,
            layers=self.depths[stage],
            heads=self.heads[stage],
            head_dim=max(1, width // self.heads[stage]),
            mlp_width=self.mlp_ratio * width,
            activation=self.activation,
            norm_eps=self.norm_eps,
            pre_norm=True,
            dropout=self.dropout,
            init_std=self.init_std,
            remat=self.remat,
            plain=self.plain,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )


# ------------------------------------------------------------------------------------------------------------- windows


def windows(x: Array, size: int) -> Array:
    """(b, y, x, *c) -> (b * windows, size * size, *c)."""
    b, rows, columns, *c = x.shape
    cut = x.reshape(b, rows // size, size, columns // size, size, *c)
    return jnp.moveaxis(cut, 3, 2).reshape(-1, size * size, *c)


def unwindowed(x: Float[Array, "bw t d"], grid: tuple[int, int], size: int) -> Float[Array, "b y x d"]:
    """Undoes `windows`."""
    (rows, columns), d = grid, x.shape[-1]
    cut = x.reshape(-1, rows // size, columns // size, size, size, d)
    return jnp.moveaxis(cut, 3, 2).reshape(-1, rows, columns, d)


def offset_numbers(size: int) -> np.ndarray:
    """(t, t): which of the (2 size - 1)² offsets two tokens of a window have."""
    at = np.stack(np.meshgrid(range(size), range(size), indexing="ij"), -1).reshape(-1, 2)
    apart = at[:, None] - at[None] + size - 1
    return apart[..., 0] * (2 * size - 1) + apart[..., 1]


def shift_mask(grid: tuple[int, int], size: int, shift: tuple[int, int]) -> np.ndarray:
    """(windows, t, t): whether two tokens of a window stood beside each other before the grid was rolled by `shift`."""
    region = [np.digitize(range(n), [n - size, n - s]) for n, s in zip(grid, shift)]
    own = 3 * region[0][:, None] + region[1][None]
    cut = own.reshape(grid[0] // size, size, grid[1] // size, size).transpose(0, 2, 1, 3).reshape(-1, size * size)
    return cut[:, :, None] == cut[:, None]


class WindowBlock(nn.Module):
    """A pre-norm block over windows of a grid, which is rolled by `shift` first along axes of more than one window."""

    config: BlockConfig
    grid: tuple[int, int]
    window: int
    shift: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], deterministic: bool = True) -> Float[Array, "b t d"]:
        c, w = self.config, self.window
        down, right = (self.shift if n > w else 0 for n in self.grid)
        s = (down, right)
        b, t, d = x.shape
        table = self.param("offsets", nn.initializers.normal(0.02), ((2 * w - 1) ** 2, c.heads), c.param_dtype)
        bias = jnp.moveaxis(table[offset_numbers(w)], -1, 0)[None].astype(jnp.float32)
        if any(s):
            apart = np.where(shift_mask(self.grid, w, s), 0.0, MASKED).astype(np.float32)[None, :, None]
            bias = jnp.broadcast_to(bias[None] + apart, (b, apart.shape[1], *bias.shape[1:])).reshape(
                -1, *bias.shape[1:]
            )
        y = norm(c, "attention_norm")(x).reshape(b, *self.grid, d)
        y = windows(jnp.roll(y, (-down, -right), (1, 2)), w)
        y = Attention(c, name="attention")(y, bias)
        y = jnp.roll(unwindowed(y, self.grid, w), s, (1, 2)).reshape(b, t, d)
        x = x + nn.Dropout(c.dropout)(y, deterministic=deterministic)
        return x + Mlp(c, name="mlp")(norm(c, "mlp_norm")(x), deterministic)


# -------------------------------------------------------------------------------------------------------------- models


class Stage(nn.Module):
    """One stage: merging where it is not the first, blocks, and the norm of what it hands out."""

    config: HierarchicalConfig
    number: int
    tap: str = ""

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"], deterministic: bool) -> tuple[Array, Array]:
        h, grid = self.config, self.config.grid(self.number)
        c = h.stage(self.number)
        if self.number:
            b, _, d = x.shape
            x = windows(x.reshape(b, *h.grid(self.number - 1), d), 2).reshape(b, -1, 4 * d)
            x = dense(c, c.width, use_bias=False, name="merge")(norm(c, "merge_norm")(x))
        window = min(h.window, *grid)

        def body(layer: nn.Module, x: Array) -> Array:
            return checkpoint_name(layer(x, deterministic), self.tap + "hidden")  # pyright: ignore[reportCallIssue]

        run = nn.remat(body) if h.remat else body
        for i in range(c.layers):
            x = run(WindowBlock(c, grid, window, window // 2 * (i % 2), name=f"layers_{i}"), x)
        return x, norm(c, "final_norm")(x).reshape(x.shape[0], *grid, c.width)


class HierarchicalTransformer(nn.Module):
    """Normed states of every stage, (b, y, x, d) each, the widest grid first."""

    config: HierarchicalConfig
    tap: str = ""

    @nn.compact
    def __call__(self, pixels: Float[Array, "b y x c"], *, deterministic: bool = True) -> list[Array]:
        h, c = self.config, self.config.stage(0)
        if pixels.ndim != 4 or pixels.shape[1:] != (*h.image, h.channels):
            raise ValueError(
                f"pixels has shape {pixels.shape}, expected (batch, {h.image[0]}, {h.image[1]}, {h.channels})"
            )
        x = nn.Conv(
            c.width,
            h.patch,
            strides=h.patch,
            padding="VALID",
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            kernel_init=kernel_init(c),
            name="patch",
        )(pixels.astype(c.dtype))
        x = norm(c, "norm")(x.reshape(x.shape[0], -1, c.width))
        x = checkpoint_name(nn.Dropout(c.dropout)(x, deterministic=deterministic), f"{self.tap}embedded")
        maps = []
        for b in range(len(h.depths)):
            x, out = Stage(h, b, self.tap, name=f"stages_{b}")(x, deterministic)
            maps.append(out)
        maps[-1] = checkpoint_name(maps[-1], f"{self.tap}final_hidden")
        return maps

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, ...]:
        return (jnp.zeros((1, *self.config.image, self.config.channels), self.config.dtype),)


class DenseHead(nn.Module):
    """The decoder: every stage's map brought to one width and the first one's grid, summed, and each token to its pixels."""

    config: HierarchicalConfig
    outputs: int
    width: int

    @nn.compact
    def __call__(self, maps: list[Array]) -> Float[Array, "b y x o"]:
        c, (rows, columns), (p, q) = self.config.stage(0), self.config.grid(0), self.config.patch
        parts = [dense(c, self.width, use_bias=b == 0, name=f"stage_{b}")(x) for b, x in enumerate(maps)]
        wide = [jax.image.resize(y, (y.shape[0], rows, columns, self.width), "bilinear") for y in parts[1:]]
        total = sum(wide, parts[0])
        y = dense(c, p * q * self.outputs, use_bias=True, name="out")(jax.nn.gelu(total))
        y = y.reshape(-1, rows, columns, p, q, self.outputs)
        return jnp.moveaxis(y, 3, 2).reshape(-1, rows * p, columns * q, self.outputs)


class DenseModel(nn.Module):
    """Numbers for each pixel, (b, y, x, outputs)."""

    config: HierarchicalConfig
    outputs: int
    head_width: int = 32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b y x c"], *, deterministic: bool = True) -> Float[Array, "b y x o"]:
        maps = HierarchicalTransformer(self.config, name="backbone")(pixels, deterministic=deterministic)
        return DenseHead(self.config, self.outputs, self.head_width, name="head")(maps)

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, ...]:
        return HierarchicalTransformer(self.config).dummy_inputs()


class HierarchicalClassifier(nn.Module):
    """Logits (b, num_labels) from the mean of the last stage."""

    config: HierarchicalConfig
    num_labels: int

    @nn.compact
    def __call__(self, pixels: Float[Array, "b y x c"], *, deterministic: bool = True) -> Float[Array, "b n"]:
        maps = HierarchicalTransformer(self.config, name="backbone")(pixels, deterministic=deterministic)
        return dense(self.config.stage(0), self.num_labels, use_bias=True, name="head")(maps[-1].mean((1, 2)))

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, ...]:
        return HierarchicalTransformer(self.config).dummy_inputs()
