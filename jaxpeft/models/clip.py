"""CLIP: an image tower and a text tower that meet in one space.

    u = normed(W_v · vision(pixels)[cls])       w = normed(W_t · text(ids)[eos])
    logits[i, j] = exp(logit_scale) · u_i · w_j          images in rows, texts in columns

The text tower is causal and is read at the end-of-text token. The image tower is the ViT of `vit.py`, normed once more
before its layers.

Reference: Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxpeft.models.layers import (
    BLOCK_KEYS,
    Block,
    BlockConfig,
    Keys,
    attention_bias,
    checked_length,
    checked_mask,
    dense,
    embed,
    extend_left,
    from_fields,
    norm,
    read_keys,
    run_layers,
    write_keys,
)
from jaxpeft.models.names import Row, dense_rows, embed_row, norm_rows, under
from jaxpeft.models.vit import CLIP_VISION_ROWS, VisionConfig, VisionTransformer, pair, unpair
from jaxpeft.trees import wide_dtype

_TOWER_KEYS = {**BLOCK_KEYS, "hidden_act": ("activation", "quick_gelu"), "layer_norm_eps": ("norm_eps", 1e-5)}
VISION_KEYS = {
    **_TOWER_KEYS,
    "image_size": ("image", 224),
    "patch_size": ("patch", 32),
    "num_channels": ("channels", 3),
}
TEXT_KEYS = {
    **_TOWER_KEYS,
    "hidden_size": ("width", 512),
    "num_attention_heads": ("heads", 8),
    "intermediate_size": ("mlp_width", 2048),
    "vocab_size": ("vocab", 49408),
    "max_position_embeddings": ("max_positions", 77),
    "eos_token_id": ("eos_id", 49407),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTextConfig(BlockConfig):
    """CLIP's text tower. `eos_id` 2 is what old configs say and means: read at the largest id."""

    vocab: int
    max_positions: int = 77
    eos_id: int = 49407


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Both towers; `scan`, `remat` and the dtypes here rule over the towers' own."""

    vision: VisionConfig
    text: ClipTextConfig
    projection: int = 512
    logit_scale: float = 2.6592  # its logarithm's initial value
    scan: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    extra: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, jnp.dtype(getattr(self, name)))
        shared = {name: getattr(self, name) for name in ("scan", "remat", "dtype", "param_dtype")}
        object.__setattr__(self, "vision", dataclasses.replace(self.vision, **shared))
        object.__setattr__(self, "text", dataclasses.replace(self.text, **shared))

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **overrides: Any) -> "ClipConfig":
        """From the dictionary of a `config.json` of model_type clip."""
        text, vision = hf.get("text_config") or {}, hf.get("vision_config") or {}
        image, words = read_keys(vision, VISION_KEYS), read_keys(text, TEXT_KEYS)
        image |= {"image": pair(image["image"]), "patch": pair(image["patch"]), "pre_norm": True}
        image |= {"patch_bias": False, "embedding_norm": True}
        fields = {
            "vision": from_fields(VisionConfig, vision, image, {}),
            "text": from_fields(ClipTextConfig, text, {**words, "pre_norm": True}, {}),
            "projection": hf.get("projection_dim", 512),
            "logit_scale": hf.get("logit_scale_init_value", 2.6592),
        }
        return from_fields(cls, hf, fields, overrides)

    def to_hf(self) -> dict[str, Any]:
        """The dictionary for `config.json`, without `architectures`."""
        v, t = self.vision, self.text
        sizes = {"image_size": unpair(v.image), "patch_size": unpair(v.patch)}
        return {
            **json.loads(self.extra or "{}"),
            "model_type": "clip",
            "projection_dim": self.projection,
            "logit_scale_init_value": self.logit_scale,
            "vision_config": _written(v, VISION_KEYS, model_type="clip_vision_model", **sizes),
            "text_config": _written(t, TEXT_KEYS, model_type="clip_text_model"),
            "dtype": str(self.param_dtype),
        }


def _written(config: BlockConfig, keys: Keys, **more: Any) -> dict[str, Any]:
    if config.head_dim * config.heads != config.width:
        raise ValueError(f"a CLIP config needs width = heads · head_dim, got {config}")
    return config.written({**write_keys(config, keys), **more})


class TextEmbeddings(nn.Module):
    """Word and position embeddings; virtual tokens may arrive from a hook on `word`."""

    config: ClipTextConfig

    @nn.compact
    def __call__(self, input_ids: Int[Array, "b t"]) -> Float[Array, "b s d"]:
        c = self.config
        x = embed(c, c.vocab, "word")(input_ids)
        checked_length(x.shape[1], c.max_positions)
        return x + embed(c, c.max_positions, "position")(jnp.arange(x.shape[1])[None])


class TextTower(nn.Module):
    """The state (b, d) at each text's end; `end_of_text` says where that is."""

    config: ClipTextConfig
    tap: str = "text_"

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b d"]:
        c = self.config
        checked_mask(attention_mask, input_ids)
        x = checkpoint_name(TextEmbeddings(c, name="embeddings")(input_ids), f"{self.tap}embedded")
        length = x.shape[1]
        bias = attention_bias(extend_left(attention_mask, length, 1), length, causal=True)
        x = run_layers(Block, c, x, bias, deterministic=deterministic, tap=self.tap)
        x = checkpoint_name(norm(c, "final_norm")(x), f"{self.tap}final_hidden")
        at = end_of_text(input_ids, c.eos_id) + (length - input_ids.shape[1])
        return jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]


def end_of_text(input_ids: Int[Array, "b t"], eos_id: int) -> Int[Array, "b"]:
    """The column of the first `eos_id`; for the old value 2, of the largest id (the table's last token ends texts).

    A text without the token is read at column 0, as in the reference implementation.
    """
    return jnp.argmax(input_ids if eos_id == 2 else (input_ids == eos_id).astype(jnp.int32), axis=-1)


class Clip(nn.Module):
    """logits (images, texts); `encode_image` and `encode_text` give the unit vectors they come from."""

    config: ClipConfig

    def setup(self) -> None:
        c = self.config
        self.vision = VisionTransformer(c.vision, tap="vision_")
        self.text = TextTower(c.text)
        self.visual_projection = dense(c.vision, c.projection, use_bias=False)
        self.text_projection = dense(c.text, c.projection, use_bias=False)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(c.logit_scale), (), c.param_dtype)

    def __call__(
        self,
        input_ids: Int[Array, "n t"],
        pixels: Float[Array, "m y x c"],
        attention_mask: Int[Array, "n t"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "m n"]:
        images = self.encode_image(pixels, deterministic=deterministic)
        texts = self.encode_text(input_ids, attention_mask, deterministic=deterministic)
        return jnp.asarray(jnp.exp(self.logit_scale), images.dtype) * jnp.einsum("md,nd->mn", images, texts)

    def encode_image(self, pixels: Float[Array, "m y x c"], *, deterministic: bool = True) -> Float[Array, "m p"]:
        hidden = self.vision(pixels, deterministic=deterministic)
        return _unit(self.visual_projection(hidden[:, 0]))

    def encode_text(
        self,
        input_ids: Int[Array, "n t"],
        attention_mask: Int[Array, "n t"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "n p"]:
        return _unit(self.text_projection(self.text(input_ids, attention_mask, deterministic=deterministic)))

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, ...]:
        return (jnp.zeros((1, 2), jnp.int32), *VisionTransformer(self.config.vision).dummy_inputs())

    @nn.nowrap
    def name_rows(self) -> list[Row]:
        return CLIP_ROWS

    @nn.nowrap
    def hf_config(self) -> dict[str, Any]:
        return {**self.config.to_hf(), "architectures": ["CLIPModel"]}

    @nn.nowrap
    def reading(self) -> tuple[str, tuple[str, ...]]:
        return "", ()


def _unit(x: Float[Array, "b p"]) -> Float[Array, "b p"]:
    wide = x.astype(wide_dtype(x.dtype))
    return (wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)).astype(x.dtype)


def contrastive_loss(logits: Float[Array, "n n"]) -> Float[Array, ""]:
    """The mean of both cross entropies of matching pairs: image i belongs to text i."""
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(f"as many images as texts are needed, got logits of shape {logits.shape}")
    wide = logits.astype(wide_dtype(logits.dtype))
    rows, columns = jax.nn.log_softmax(wide, axis=1), jax.nn.log_softmax(wide, axis=0)
    return -(jnp.trace(rows) + jnp.trace(columns)) / (2 * logits.shape[0])


def build(hf: Mapping[str, Any], names: frozenset[str] | None, overrides: Mapping[str, Any]) -> nn.Module:
    """The module that a clip `config.json` names."""
    del names
    name = (hf.get("architectures") or ["CLIPModel"])[0]
    if name != "CLIPModel":
        raise ValueError(f"architecture {name!r} is not read here; known: CLIPModel")
    return Clip(ClipConfig.from_hf(hf, **overrides))


def _clip_rows() -> list[Row]:
    layer, there = "layers_{i}/", "encoder.layers.{i}."
    tower = [
        *norm_rows(f"{layer}attention_norm", f"{there}layer_norm1"),
        *norm_rows(f"{layer}mlp_norm", f"{there}layer_norm2"),
        *dense_rows(f"{layer}mlp/up", f"{there}mlp.fc1"),
        *dense_rows(f"{layer}mlp/down", f"{there}mlp.fc2"),
    ]
    for ours, name in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}.items():
        tower += dense_rows(f"{layer}attention/{ours}", f"{there}self_attn.{name}")
    text = [
        embed_row("embeddings/word", "embeddings.token_embedding"),
        embed_row("embeddings/position", "embeddings.position_embedding"),
        *norm_rows("final_norm", "final_layer_norm"),
    ]
    return [
        *under(tower + CLIP_VISION_ROWS, "vision/", "vision_model."),
        *under(tower + text, "text/", "text_model."),
        *dense_rows("visual_projection", "visual_projection"),
        *dense_rows("text_projection", "text_projection"),
        Row("logit_scale", "logit_scale"),
    ]


CLIP_ROWS = _clip_rows()
