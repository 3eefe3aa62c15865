"""GPT-2 and Llama: decoders that predict the next token.

    x₀ = word[ids] (+ position[p])      pre-norm blocks, causal      logits = head(norm(x_L))

GPT-2 learns its positions, norms with mean and variance and keeps query, key and value in one product
(`attention/qkv`); Llama turns query and key by their positions (RoPE), norms by the root mean square, gates its
feed-forward block (SwiGLU) and shares key/value heads between query heads. Where `tied`, the head is the
word table.

RoPE: pair i of a head turns by p · θ^(-2i/k). "linear" scaling divides all frequencies by `factor`; "llama3" divides
those of a wavelength over `original / low`, keeps those under `original / high`, and blends between.

Reference: Radford et al., "Language models are unsupervised multitask learners", 2019; Touvron et al., "LLaMA", 2023;
Grattafiori et al., "The Llama 3 herd of models", 2024; Su et al., "RoFormer", 2021.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxpeft.models.cache import Cache, Cell, write
from jaxpeft.models.layers import (
    MASKED,
    Block,
    BlockConfig,
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
from jaxpeft.models.names import Row, dense_rows, embed_row, norm_rows

DecoderBlock = Block


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary frequencies: base `theta` and their scaling, `kind` "default", "linear" or "llama3"."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Rope":
        """From either form: `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling`."""
        given = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise ValueError(f"rope scaling {kind!r} is not read here; known: default, linear, llama3")
        theta = given.get("rope_theta") or hf.get("rope_theta") or cls.theta
        if kind == "default":
            return cls(theta)
        if kind == "linear":
            return cls(theta, kind, given["factor"])
        original = given.get("original_max_position_embeddings") or hf["max_position_embeddings"]
        return cls(theta, kind, given["factor"], given["low_freq_factor"], given["high_freq_factor"], original)

    def to_hf(self) -> dict[str, Any]:
        """Both forms at once, so that older and newer readers find the same frequencies."""
        scaling: dict[str, Any] = {"rope_type": self.kind}
        if self.kind != "default":
            scaling["factor"] = self.factor
        if self.kind == "llama3":
            scaling |= {"low_freq_factor": self.low, "high_freq_factor": self.high}
            scaling["original_max_position_embeddings"] = self.original
        old = None if self.kind == "default" else scaling
        return {
            "rope_theta": self.theta,
            "rope_scaling": old and {**old, "rope_theta": self.theta},
            "rope_parameters": {**scaling, "rope_theta": self.theta},
        }

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Angle per position of each pair, (head_dim / 2,) in float32."""
        plain = 1.0 / self.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
        if self.kind == "default":
            return plain.astype(np.float32)
        if self.kind == "linear":
            return (plain / self.factor).astype(np.float32)
        wavelength = 2 * math.pi / plain
        smooth = np.clip((self.original / wavelength - self.low) / (self.high - self.low), 0, 1)
        return ((1 - smooth) * plain / self.factor + smooth * plain).astype(np.float32)


GPT2_KEYS = {
    "n_embd": ("width", 768),
    "n_layer": ("layers", 12),
    "n_head": ("heads", 12),
    "n_inner": ("mlp_width", None),
    "activation_function": ("activation", "gelu_new"),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
    "resid_pdrop": ("dropout", 0.1),
    "initializer_range": ("init_std", 0.02),
    "vocab_size": ("vocab", 50257),
    "n_positions": ("max_positions", 1024),
    "tie_word_embeddings": ("tied", True),
}
LLAMA_KEYS = {
    "hidden_size": ("width", 4096),
    "num_hidden_layers": ("layers", 32),
    "num_attention_heads": ("heads", 32),
    "num_key_value_heads": ("kv_heads", None),
    "head_dim": ("head_dim", None),
    "intermediate_size": ("mlp_width", 11008),
    "hidden_act": ("activation", "silu"),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "attention_bias": ("qkv_bias", False),
    "mlp_bias": ("mlp_bias", False),
    "initializer_range": ("init_std", 0.02),
    "vocab_size": ("vocab", 32000),
    "max_position_embeddings": ("max_positions", 2048),
    "tie_word_embeddings": ("tied", False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(BlockConfig):
    """A GPT-2 or Llama decoder (`family`). `tied` reads the logits off the word table."""

    vocab: int
    family: str = "gpt2"
    max_positions: int = 1024
    tied: bool = True
    rope: Rope = Rope()

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **overrides: Any) -> "DecoderConfig":
        """From the dictionary of a `config.json` of model_type gpt2 or llama."""
        family = hf.get("model_type", "gpt2")
        if family not in ("gpt2", "llama"):
            raise ValueError(f"model_type {family!r} is not a decoder known here; known: gpt2, llama")
        fields = _gpt2_fields(hf) if family == "gpt2" else _llama_fields(hf)
        return from_fields(cls, hf, {**fields, "family": family}, overrides)

    def to_hf(self) -> dict[str, Any]:
        """The dictionary for `config.json`, without `architectures`."""
        if self.family == "gpt2":
            if self.head_dim * self.heads != self.width:
                raise ValueError(f"a GPT-2 config needs width = heads · head_dim, got {self}")
            keys, more = GPT2_KEYS, {"embd_pdrop": self.dropout}
        else:
            keys, more = LLAMA_KEYS, {"num_key_value_heads": self.kv_heads or self.heads, **self.rope.to_hf()}
        return self.written({"model_type": self.family, **write_keys(self, keys), **more})


def _gpt2_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    for name, wanted in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if bool(hf.get(name, wanted)) != wanted:
            raise ValueError(f"GPT-2 with {name}={hf[name]} is not read here")
    drops = {hf.get("resid_pdrop", 0.1), hf.get("embd_pdrop", 0.1)}
    if len(drops) > 1:
        raise ValueError(f"GPT-2 with different resid_pdrop and embd_pdrop ({sorted(drops)}) is not read here")
    fields = read_keys(hf, GPT2_KEYS)
    return {
        **fields,
        "mlp_width": fields["mlp_width"] or 4 * fields["width"],
        "pre_norm": True,
        "fused_qkv": True,
        "dropout": drops.pop(),
    }


def _llama_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    fields = read_keys(hf, LLAMA_KEYS)
    bias = bool(fields["qkv_bias"])
    return {
        **fields,
        "kv_heads": fields["kv_heads"] or fields["heads"],
        "gated": True,
        "norm": "rms",
        "pre_norm": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bool(fields["mlp_bias"]),
        "rope": Rope.from_hf(hf),
    }


class DecoderEmbeddings(nn.Module):
    """Word embeddings and GPT-2's learned positions; `attend` reads logits off the word table."""

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        self.word = embed(c, c.vocab)
        if c.family == "gpt2":
            self.position = embed(c, c.max_positions)
        self.drop = nn.Dropout(c.dropout)

    def __call__(
        self, input_ids: Int[Array, "b t"], positions: Int[Array, "#b t"] | None, deterministic: bool
    ) -> tuple[Float[Array, "b s d"], Int[Array, "#b s"]]:
        x = self.word(input_ids)
        length = x.shape[1]
        if positions is None:
            positions = jnp.arange(length)[None]
        elif positions.shape[1] != length:
            # Virtual tokens take the first positions and push the given ones up.
            extra = length - positions.shape[1]
            front = jnp.broadcast_to(jnp.arange(extra, dtype=positions.dtype), (positions.shape[0], extra))
            positions = jnp.concatenate([front, positions + extra], axis=1)
        if self.config.family == "gpt2":
            checked_length(length, self.config.max_positions)
            x = x + self.position(positions)
        return self.drop(x, deterministic=deterministic), positions

    def attend(self, x: Float[Array, "b s d"]) -> Float[Array, "b s v"]:
        return self.word.attend(x)


class Decoder(nn.Module):
    """Next-token logits (b, t, vocab).

    `attention_mask` is 1 at tokens, 0 at padding on either side. Positions run 0, 1, ... over the columns if not given;
    `positions_from_mask` gives those that do not count padding on the left. Logits at padding mean nothing.

    With a `cache` (see `cache.py`) the ids continue what it holds and the result is `(logits, cache)`; positions then
    run on from its length if not given. `last_only` computes the last column's logits alone, (b, 1, vocab).
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | None = None,
        *,
        positions: Int[Array, "#b t"] | None = None,
        deterministic: bool = True,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Float[Array, "b s v"] | tuple[Float[Array, "b s v"], Cache]:
        c = self.config
        checked_mask(attention_mask, input_ids)
        if positions is not None and positions.shape not in (input_ids.shape, (1, input_ids.shape[1])):
            raise ValueError(f"positions has shape {positions.shape}, input_ids {input_ids.shape}; they must be equal")
        if cache is not None and positions is None:
            positions = cache.length[:, None] + jnp.arange(input_ids.shape[1])[None]
        embeddings = DecoderEmbeddings(c, name="embeddings")
        x, positions = embeddings(input_ids, positions, deterministic)
        x = checkpoint_name(x, "embedded")
        rotary = rotary_angles(c.rope, positions, c.head_dim) if c.family == "llama" else None
        if cache is None:
            bias = attention_bias(extend_left(attention_mask, x.shape[1], 1), x.shape[1], causal=True)
            x = run_layers(DecoderBlock, c, x, bias, rotary, deterministic=deterministic)
        else:
            if x.shape[:2] != input_ids.shape:
                raise ValueError(
                    f"{input_ids.shape[1]} ids became {x.shape[1]} embeddings: virtual tokens would stand before every "
                    "continuation again. Generate without a cache, or with another method than prompt tuning"
                )
            cache, bias = _continued(c, cache, attention_mask, input_ids)
            x, cache = _run_cached(c, x, bias, rotary, deterministic, cache)
        x = x[:, -1:] if last_only else x
        x = checkpoint_name(norm(c, "final_norm")(x), "final_hidden")
        logits = embeddings.attend(x) if c.tied else dense(c, c.vocab, use_bias=False, name="lm_head")(x)
        if cache is None:
            return logits
        return logits, dataclasses.replace(cache, length=cache.length + input_ids.shape[1])

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, ...]:
        return (jnp.zeros((1, 2), jnp.int32),)

    @nn.nowrap
    def name_rows(self) -> list[Row]:
        return GPT2_ROWS if self.config.family == "gpt2" else LLAMA_ROWS

    @nn.nowrap
    def hf_config(self) -> dict[str, Any]:
        name = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[self.config.family]
        return {**self.config.to_hf(), "architectures": [name]}

    @nn.nowrap
    def reading(self) -> tuple[str, tuple[str, ...]]:
        """The prefix that files may or may not carry, and patterns of tensors that may be left unread."""
        prefix = {"gpt2": "transformer.", "llama": "model."}[self.config.family]
        return prefix, (r"lm_head\.weight",) if self.config.tied else ()


def _continued(
    config: DecoderConfig, cache: Cache, mask: Int[Array, "b t"] | None, input_ids: Int[Array, "b t"]
) -> tuple[Cache, Float[Array, "b 1 t c"]]:
    """The cache with the new columns marked, and the bias of the new queries over all columns."""
    b, t = input_ids.shape
    if cache.real.shape[0] != b or t > cache.capacity:
        raise ValueError(f"{b} rows of {t} columns for a cache of {cache.real.shape[0]} rows of {cache.capacity}")
    if len(cache.layers) != config.layers and not config.scan:
        raise ValueError(
            f"a cache of {len(cache.layers)} layers for a decoder of {config.layers}: make it by its config"
        )
    new = jnp.ones((b, t), bool) if mask is None else mask != 0
    real = write(cache.real, new, cache.length)
    column = jnp.arange(cache.capacity)[None, None, :]
    query = cache.length[:, None, None] + jnp.arange(t)[None, :, None]
    seen = real[:, None, :] & (column <= query)
    return dataclasses.replace(cache, real=real), jnp.where(seen, 0.0, MASKED).astype(jnp.float32)[:, None]


def _run_cached(
    config: DecoderConfig, x: Array, bias: Array, rotary: Any, deterministic: bool, cache: Cache
) -> tuple[Array, Cache]:
    """`run_layers` where each layer extends its store; inside a compact method."""

    def body(layer: nn.Module, x: Array, store: Any, bias: Array, rotary: Any, at: Array) -> tuple[Array, Any]:
        cell = Cell(cache.storage, store, at)
        y = layer(x, bias, deterministic, rotary, cell)  # pyright: ignore[reportCallIssue]
        return checkpoint_name(y, "hidden"), cell.store

    shared = (bias, rotary, cache.length)
    if config.scan:
        loop = nn.scan(
            body,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(1, *(nn.broadcast,) * len(shared)),  # pyright: ignore[reportArgumentType]
            out_axes=1,
            length=config.layers,
        )
        x, layers = loop(DecoderBlock(config, name="layers"), x, cache.layers, *shared)
        return x, dataclasses.replace(cache, layers=layers)
    stores = []
    for i in range(config.layers):
        x, store = body(DecoderBlock(config, name=f"layers_{i}"), x, cache.layers[i], *shared)
        stores.append(store)
    return x, dataclasses.replace(cache, layers=tuple(stores))


def rotary_angles(rope: Rope, positions: Int[Array, "b t"], head_dim: int) -> tuple[Array, Array]:
    """cos and sin (b, t, head_dim) of the angles of `positions`, in float32, each pair's angle twice."""
    angles = positions[:, :, None].astype(jnp.float32) * jnp.asarray(rope.frequencies(head_dim))[None, None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def positions_from_mask(mask: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """0, 1, ... over the tokens of each row, padding not counted (padding gets some valid position)."""
    return jnp.maximum(jnp.cumsum((mask != 0).astype(jnp.int32), axis=1) - 1, 0)


def build(hf: Mapping[str, Any], names: frozenset[str] | None, overrides: Mapping[str, Any]) -> nn.Module:
    """The module that a gpt2 or llama `config.json` names."""
    del names
    config = DecoderConfig.from_hf(hf, **overrides)
    known = {"gpt2": ("GPT2LMHeadModel", "GPT2Model"), "llama": ("LlamaForCausalLM", "LlamaModel")}[config.family]
    name = (hf.get("architectures") or known)[0]
    if name not in known:
        raise ValueError(f"architecture {name!r} is not read here; known: {', '.join(known)}")
    return Decoder(config)


def _gpt2_rows() -> list[Row]:
    layer, there = "layers_{i}/", "transformer.h.{i}."
    rows = [
        embed_row("embeddings/word", "transformer.wte"),
        embed_row("embeddings/position", "transformer.wpe"),
        *norm_rows(f"{layer}attention_norm", f"{there}ln_1"),
        *norm_rows(f"{layer}mlp_norm", f"{there}ln_2"),
        *norm_rows("final_norm", "transformer.ln_f"),
        *dense_rows("lm_head", "lm_head"),
    ]
    # GPT-2's Conv1D keeps its weight as (in, out), like ours.
    for ours, name in {
        "attention/qkv": "attn.c_attn",
        "attention/out": "attn.c_proj",
        "mlp/up": "mlp.c_fc",
        "mlp/down": "mlp.c_proj",
    }.items():
        rows += dense_rows(layer + ours, there + name, transform="same")
    return rows


def _llama_rows() -> list[Row]:
    layer, there = "layers_{i}/", "model.layers.{i}."
    rows = [
        embed_row("embeddings/word", "model.embed_tokens"),
        *norm_rows(f"{layer}attention_norm", f"{there}input_layernorm"),
        *norm_rows(f"{layer}mlp_norm", f"{there}post_attention_layernorm"),
        *norm_rows("final_norm", "model.norm"),
        *dense_rows("lm_head", "lm_head"),
    ]
    for ours, name in {
        "attention/query": "self_attn.q_proj",
        "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj",
        "attention/out": "self_attn.o_proj",
        "mlp/up": "mlp.up_proj",
        "mlp/gate": "mlp.gate_proj",
        "mlp/down": "mlp.down_proj",
    }.items():
        rows += dense_rows(layer + ours, there + name)
    return rows


GPT2_ROWS = _gpt2_rows()
LLAMA_ROWS = _llama_rows()
