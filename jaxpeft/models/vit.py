"""ViT: an image as a sequence of patches; also CLIP's image tower.

    x₀ = [cls; conv(pixels)] + position (CLIP: then normed)      pre-norm blocks      hidden = norm(x_L)
    logits = head(hidden[:, 0])

Pixels are (b, height, width, channels), as convolutions are laid out here; the reference implementation's are channels
first. Folders are read by the tensor names of transformers 4 and 5 alike and written by those that both read.

Reference: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxpeft.models.encoder import label_count, with_labels
from jaxpeft.models.layers import (
    BLOCK_KEYS,
    Block,
    BlockConfig,
    dense,
    embed,
    from_fields,
    kernel_init,
    norm,
    read_keys,
    run_layers,
    with_pooler,
    write_keys,
)
from jaxpeft.models.names import Row, dense_rows, embed_row, norm_rows, under

VIT_KEYS = {
    **BLOCK_KEYS,
    "qkv_bias": ("qkv_bias", True),
    "hidden_dropout_prob": ("dropout", 0.0),
    "image_size": ("image", 224),
    "patch_size": ("patch", 16),
    "num_channels": ("channels", 3),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(BlockConfig):
    """An image tower. Sizes are (height, width); `embedding_norm` and no `patch_bias` make it CLIP's."""

    image: tuple[int, int] = (224, 224)
    patch: tuple[int, int] = (16, 16)
    channels: int = 3
    patch_bias: bool = True
    embedding_norm: bool = False
    pooler: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for side, piece in zip(self.image, self.patch, strict=True):
            if piece < 1 or side < piece:
                raise ValueError(f"patches of {self.patch} do not fit an image of {self.image}")

    @property
    def tokens(self) -> int:
        """Patches and the class token. A rest at the border that fills no patch is left out, as in the reference."""
        return 1 + (self.image[0] // self.patch[0]) * (self.image[1] // self.patch[1])

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **overrides: Any) -> "VisionConfig":
        """From the dictionary of a `config.json` of model_type vit."""
        fields = read_keys(hf, VIT_KEYS)
        fields |= {"image": pair(fields["image"]), "patch": pair(fields["patch"]), "pre_norm": True}
        return from_fields(cls, hf, fields, overrides)

    def to_hf(self) -> dict[str, Any]:
        """The dictionary for `config.json`, without `architectures`."""
        if self.head_dim * self.heads != self.width:
            raise ValueError(f"a ViT config needs width = heads · head_dim, got {self}")
        sizes = {"image_size": unpair(self.image), "patch_size": unpair(self.patch)}
        return self.written({"model_type": "vit", **write_keys(self, VIT_KEYS), **sizes})


class VisionEmbeddings(nn.Module):
    """Patches by a strided convolution, the class token in front, learned positions."""

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "b y x c"], deterministic: bool) -> Float[Array, "b t d"]:
        c = self.config
        if pixels.ndim != 4 or pixels.shape[1:] != (*c.image, c.channels):
            raise ValueError(
                f"pixels has shape {pixels.shape}, expected (batch, {c.image[0]}, {c.image[1]}, {c.channels}): "
                "channels stand last here; transpose(0, 2, 3, 1) turns channels-first arrays"
            )
        x = nn.Conv(
            c.width,
            c.patch,
            strides=c.patch,
            padding="VALID",
            use_bias=c.patch_bias,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            kernel_init=kernel_init(c),
            name="patch",
        )(pixels.astype(c.dtype))
        x = x.reshape(x.shape[0], -1, c.width)
        cls = self.param("cls", nn.initializers.normal(c.init_std or 0.02), (1, c.width), c.param_dtype)
        first = jnp.broadcast_to(jnp.asarray(cls, c.dtype), (x.shape[0], 1, c.width))
        x = jnp.concatenate([first, x], axis=1)
        x = x + embed(c, c.tokens, "position")(jnp.arange(c.tokens)[None])
        if c.embedding_norm:
            x = norm(c, "norm")(x)
        return nn.Dropout(c.dropout)(x, deterministic=deterministic)


class VisionTransformer(nn.Module):
    """Normed hidden states (b, 1 + patches, d); with `pooled=True` also the pooler's output (config `pooler`)."""

    config: VisionConfig
    tap: str = ""

    @nn.compact
    def __call__(self, pixels: Float[Array, "b y x c"], *, deterministic: bool = True, pooled: bool = False) -> Any:
        c = self.config
        x = checkpoint_name(VisionEmbeddings(c, name="embeddings")(pixels, deterministic), f"{self.tap}embedded")
        x = run_layers(Block, c, x, None, deterministic=deterministic, tap=self.tap)
        x = checkpoint_name(norm(c, "final_norm")(x), f"{self.tap}final_hidden")
        return with_pooler(c, x, pooled, self.is_initializing())

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, ...]:
        return (jnp.zeros((1, *self.config.image, self.config.channels), self.config.dtype),)

    @nn.nowrap
    def name_rows(self) -> list[Row]:
        return VIT_ROWS

    @nn.nowrap
    def hf_config(self) -> dict[str, Any]:
        return {**self.config.to_hf(), "architectures": ["ViTModel"]}

    @nn.nowrap
    def reading(self) -> tuple[str, tuple[str, ...]]:
        """The prefix that files may or may not carry, and patterns of tensors that may be left unread."""
        return "vit.", () if self.config.pooler else (r"(vit\.)?pooler\..*",)


class ImageClassifier(nn.Module):
    """Logits (b, num_labels) from the class token."""

    config: VisionConfig
    num_labels: int

    @nn.compact
    def __call__(self, pixels: Float[Array, "b y x c"], *, deterministic: bool = True) -> Float[Array, "b n"]:
        hidden = VisionTransformer(self.config, name="backbone")(pixels, deterministic=deterministic)
        return dense(self.config, self.num_labels, use_bias=True, name="head")(hidden[:, 0])

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, ...]:
        return VisionTransformer(self.config).dummy_inputs()

    @nn.nowrap
    def name_rows(self) -> list[Row]:
        return under(VIT_ROWS, "backbone/", "vit.") + dense_rows("head", "classifier")

    @nn.nowrap
    def hf_config(self) -> dict[str, Any]:
        return {**with_labels(self.config.to_hf(), self.num_labels), "architectures": ["ViTForImageClassification"]}

    @nn.nowrap
    def reading(self) -> tuple[str, tuple[str, ...]]:
        return VisionTransformer(self.config).reading()


def pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def unpair(size: tuple[int, int]) -> int | list[int]:
    """One number for a square, else two."""
    return size[0] if size[0] == size[1] else list(size)


def build(hf: Mapping[str, Any], names: frozenset[str] | None, overrides: Mapping[str, Any]) -> nn.Module:
    """The module that a vit `config.json` names; `names` are the folder's tensors, if there are any."""
    config = VisionConfig.from_hf(hf, **overrides)
    name = (hf.get("architectures") or ["ViTModel"])[0]
    if name == "ViTForImageClassification":
        return ImageClassifier(config, label_count(hf))
    if name != "ViTModel":
        raise ValueError(f"architecture {name!r} is not read here; known: ViTModel, ViTForImageClassification")
    if "pooler" not in overrides:
        pooler = names is None or any("pooler.dense." in tensor for tensor in names)
        if pooler and (hf.get("pooler_act", "tanh"), hf.get("pooler_output_size") or config.width) != (
            "tanh",
            config.width,
        ):
            raise ValueError("a ViT pooler of another activation than tanh or another width is not read here")
        config = dataclasses.replace(config, pooler=pooler)
    return VisionTransformer(config)


def _vit_rows() -> list[Row]:
    # (ours, transformers 5's module, the name in files)
    layer, there, filed = "layers_{i}/", "layers.{i}.", "encoder.layer.{i}."
    rows = [
        Row("embeddings/cls", "embeddings.cls_token", "drop_axis"),
        Row("embeddings/position/embedding", "embeddings.position_embeddings", "drop_axis"),
        Row("embeddings/patch/kernel", "embeddings.patch_embeddings.projection.weight", "conv"),
        Row("embeddings/patch/bias", "embeddings.patch_embeddings.projection.bias"),
        *norm_rows(f"{layer}attention_norm", f"{there}layernorm_before", stored=f"{filed}layernorm_before"),
        *norm_rows(f"{layer}mlp_norm", f"{there}layernorm_after", stored=f"{filed}layernorm_after"),
        *norm_rows("final_norm", "layernorm"),
        *dense_rows("pooler", "pooler.dense"),
    ]
    for ours, name, old in (
        ("attention/query", "attention.q_proj", "attention.attention.query"),
        ("attention/key", "attention.k_proj", "attention.attention.key"),
        ("attention/value", "attention.v_proj", "attention.attention.value"),
        ("attention/out", "attention.o_proj", "attention.output.dense"),
        ("mlp/up", "mlp.fc1", "intermediate.dense"),
        ("mlp/down", "mlp.fc2", "output.dense"),
    ):
        rows += dense_rows(layer + ours, there + name, stored=filed + old)
    return rows


def _clip_vision_rows() -> list[Row]:
    return [
        Row("embeddings/cls", "embeddings.class_embedding", "add_axis"),
        embed_row("embeddings/position", "embeddings.position_embedding"),
        Row("embeddings/patch/kernel", "embeddings.patch_embedding.weight", "conv"),
        *norm_rows("embeddings/norm", "pre_layrnorm"),  # so spelt there
        *norm_rows("final_norm", "post_layernorm"),
    ]


VIT_ROWS = _vit_rows()
CLIP_VISION_ROWS = _clip_vision_rows()
