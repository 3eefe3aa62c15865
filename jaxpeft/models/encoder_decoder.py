"""T5 and T5 v1.1: an encoder, and a decoder that attends to it.

    encoder:  x ← x + attention(norm(x); r_e)                     x ← x + mlp(norm(x))
    decoder:  y ← y + attention(norm(y); r_d, causal)    y ← y + cross(norm(y), x)    y ← y + mlp(norm(y))
    logits = head(y · d^(-1/2) if scaled)

Norms are root-mean-square without bias, no product has a bias, and q kᵀ is not scaled. A position enters only through
the biases r_e, r_d: a learned number per head for each bucket of the distance between key and query, shared by all
layers. Buckets are exact up to a quarter (decoder: half) of their number, then logarithmic up to `max_distance`.
v1.1 gates its feed-forward block with gelu and does not scale before the head.

A hook on `embeddings/word` (its `__call__`) puts virtual tokens in front of the encoder's input only: the decoder looks
its words up through `plain`.

Reference: Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer", JMLR
2020; Shazeer, "GLU variants improve transformer", 2020.
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

from jaxpeft.models.layers import (
    Attention,
    Block,
    BlockConfig,
    Mlp,
    attention_bias,
    checked_mask,
    dense,
    extend_left,
    from_fields,
    norm,
    read_keys,
    run_layers,
    write_keys,
)
from jaxpeft.models.names import Row, dense_rows, embed_row, norm_rows
from jaxpeft.trees import wide_dtype

T5_KEYS = {
    "d_model": ("width", 512),
    "num_layers": ("layers", 6),
    "num_decoder_layers": ("decoder_layers", None),
    "num_heads": ("heads", 8),
    "d_kv": ("head_dim", 64),
    "d_ff": ("mlp_width", 2048),
    "layer_norm_epsilon": ("norm_eps", 1e-6),
    "dropout_rate": ("dropout", 0.1),
    "vocab_size": ("vocab", 32128),
    "relative_attention_num_buckets": ("buckets", 32),
    "relative_attention_max_distance": ("max_distance", 128),
    "pad_token_id": ("pad_id", 0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(BlockConfig):
    """T5. `layers` are the encoder's; `tied` reads the logits off the word table, `scaled` after y · width^(-1/2)."""

    vocab: int
    decoder_layers: int
    buckets: int = 32
    max_distance: int = 128
    pad_id: int = 0
    tied: bool = True
    scaled: bool = True

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **overrides: Any) -> "EncoderDecoderConfig":
        """From the dictionary of a `config.json` of model_type t5."""
        kind = hf.get("feed_forward_proj", "relu")
        gated = kind.startswith("gated-")
        fields = read_keys(hf, T5_KEYS)
        fields |= {
            "decoder_layers": fields["decoder_layers"] or fields["layers"],
            # "gated-gelu" has always meant the tanh approximation.
            "activation": "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-"),
            "gated": gated,
            "norm": "rms",
            "pre_norm": True,
            "qkv_bias": False,
            "out_bias": False,
            "mlp_bias": False,
            "attention_scale": 1.0,
            "inner_dropout": True,
            "init_std": None,
            "pad_id": fields["pad_id"] or 0,
            "scaled": hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True)) is not False,
        }
        return from_fields(cls, hf, fields, overrides)

    def to_hf(self) -> dict[str, Any]:
        """The dictionary for `config.json`, without `architectures`."""
        kind = "gelu" if self.gated and self.activation == "gelu_new" else self.activation
        return self.written(
            {
                "model_type": "t5",
                "is_encoder_decoder": True,
                **write_keys(self, T5_KEYS),
                "feed_forward_proj": f"gated-{kind}" if self.gated else kind,
                # Readers take this as "scale before the head", and find out by the tensors whether it is tied.
                "tie_word_embeddings": self.scaled,
                "scale_decoder_outputs": self.scaled,
            }
        )


class WordTable(nn.Embed):
    """An embedding with a second door, `plain`, through which hooks on `__call__` do not see the look-up."""

    def plain(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        # Calling the parent's method instead would be intercepted under its name.
        return jnp.take(jnp.asarray(self.embedding, self.dtype), ids, axis=0)


class SharedEmbeddings(nn.Module):
    """The word table of encoder, decoder and, where tied, head."""

    config: EncoderDecoderConfig

    def setup(self) -> None:
        c = self.config
        self.word = WordTable(
            c.vocab,
            c.width,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            embedding_init=nn.initializers.normal(1.0),
        )

    def __call__(self, ids: Int[Array, "b t"]) -> Float[Array, "b s d"]:
        return self.word(ids)

    def plain(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        return self.word.plain(ids)

    def attend(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        return self.word.attend(x)


class CrossBlock(nn.Module):
    """A decoder's block: self-attention, attention to the encoder's states `memory`, feed-forward block."""

    config: BlockConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        bias: Float[Array, "#b #h #t t"] | None = None,
        deterministic: bool = True,
        memory: Float[Array, "b s d"] | None = None,
        memory_bias: Float[Array, "#b #h #t s"] | None = None,
    ) -> Float[Array, "b t d"]:
        c = self.config
        drop = nn.Dropout(c.dropout)
        y = Attention(c, name="attention")(norm(c, "attention_norm")(x), bias)
        x = x + drop(y, deterministic=deterministic)
        y = Attention(c, name="cross_attention")(norm(c, "cross_attention_norm")(x), memory_bias, memory)
        x = x + drop(y, deterministic=deterministic)
        return x + Mlp(c, name="mlp")(norm(c, "mlp_norm")(x), deterministic)


class Stack(nn.Module):
    """The encoder (`tap` "encoder_") or the decoder ("decoder_"): position bias, layers, final norm."""

    config: EncoderDecoderConfig
    tap: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Int[Array, "b t"] | None,
        memory: Float[Array, "b s d"] | None = None,
        memory_mask: Int[Array, "b s"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b t d"]:
        c = self.config
        causal = self.tap == "decoder_"
        drop = nn.Dropout(c.dropout)
        x = checkpoint_name(drop(x, deterministic=deterministic), f"{self.tap}embedded")
        length = x.shape[1]
        table = nn.Embed(
            c.buckets,
            c.heads,
            dtype=wide_dtype(c.param_dtype),
            param_dtype=c.param_dtype,
            embedding_init=nn.initializers.normal(c.width**-0.5),
            name="relative_bias",
        )
        buckets = relative_buckets(length, length, bidirectional=not causal, buckets=c.buckets, limit=c.max_distance)
        bias = table(jnp.asarray(buckets)).transpose(2, 0, 1)[None]
        masked = attention_bias(mask, length, causal=causal)
        bias = bias if masked is None else bias + masked.astype(bias.dtype)
        if causal:
            memory_bias = attention_bias(memory_mask, length)
            args = (bias, memory, memory_bias)
            x = run_layers(CrossBlock, c, x, *args, deterministic=deterministic, tap=self.tap, layers=c.decoder_layers)
        else:
            x = run_layers(Block, c, x, bias, deterministic=deterministic, tap=self.tap)
        x = drop(norm(c, "final_norm")(x), deterministic=deterministic)
        return checkpoint_name(x, f"{self.tap}final_hidden")


class EncoderDecoder(nn.Module):
    """Logits (b, t, vocab) of the decoder's next tokens.

    `attention_mask` belongs to `input_ids` (the encoder's), `decoder_attention_mask` to `decoder_input_ids`; training
    feeds `shift_right(labels, config.pad_id)` to the decoder.
    """

    config: EncoderDecoderConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "b s"],
        decoder_input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b s"] | None = None,
        decoder_attention_mask: Int[Array, "b t"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b t v"]:
        c = self.config
        checked_mask(attention_mask, input_ids)
        checked_mask(decoder_attention_mask, decoder_input_ids)
        embeddings = SharedEmbeddings(c, name="embeddings")
        x = embeddings(input_ids)
        mask = extend_left(attention_mask, x.shape[1], 1)
        memory = Stack(c, "encoder_", name="encoder")(x, mask, deterministic=deterministic)
        y = embeddings.plain(decoder_input_ids)
        y = Stack(c, "decoder_", name="decoder")(y, decoder_attention_mask, memory, mask, deterministic)
        if c.scaled:
            y = y * c.width**-0.5
        return embeddings.attend(y) if c.tied else dense(c, c.vocab, use_bias=False, name="lm_head")(y)

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, ...]:
        return (jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2), jnp.int32))

    @nn.nowrap
    def name_rows(self) -> list[Row]:
        return T5_ROWS[self.config.gated]

    @nn.nowrap
    def hf_config(self) -> dict[str, Any]:
        return {**self.config.to_hf(), "architectures": ["T5ForConditionalGeneration"]}

    @nn.nowrap
    def reading(self) -> tuple[str, tuple[str, ...]]:
        """The prefix that files may or may not carry (none), and patterns of tensors that may be left unread."""
        copies = (r"(encoder|decoder)\.embed_tokens\.weight",)
        # Old folders carry a bias table for the cross attention that was never used.
        dead = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)
        return "", (*copies, *dead, r"lm_head\.weight") if self.config.tied else (*copies, *dead)


def relative_buckets(tq: int, tk: int, *, bidirectional: bool, buckets: int, limit: int) -> np.ndarray:
    """The bucket of each (query, key) pair, (tq, tk) integers. In float32, as the trained models were."""
    distance = np.arange(tk)[None, :] - np.arange(tq)[:, None]
    offset = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0) * buckets
        distance = np.abs(distance)
    else:
        distance = -np.minimum(distance, 0)
    exact = buckets // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(limit / exact))
    far = exact + (ratio * np.float32(buckets - exact)).astype(np.int32)
    return offset + np.where(distance < exact, distance, np.minimum(far, buckets - 1))


def shift_right(labels: Int[Array, "b t"], start: int = 0, ignored: int = -100) -> Int[Array, "b t"]:
    """The decoder's input for `labels`: one place to the right behind `start`; ignored labels become `start`, too."""
    moved = jnp.concatenate([jnp.full_like(labels[:, :1], start), labels[:, :-1]], axis=1)
    return jnp.where(moved == ignored, start, moved)


def build(hf: Mapping[str, Any], names: frozenset[str] | None, overrides: Mapping[str, Any]) -> nn.Module:
    """The module that a t5 `config.json` names.

    The head is untied where the config does not scale before it (v1.1) and the folder holds one: the flag
    `tie_word_embeddings` itself has been rewritten by newer savers.
    """
    config = EncoderDecoderConfig.from_hf(hf, **overrides)
    name = (hf.get("architectures") or ["T5ForConditionalGeneration"])[0]
    if name not in ("T5ForConditionalGeneration", "T5WithLMHeadModel"):  # the second is its old name
        raise ValueError(f"architecture {name!r} is not read here; known: T5ForConditionalGeneration")
    if "tied" not in overrides and not config.scaled and "lm_head.weight" in (names or ()):
        config = dataclasses.replace(config, tied=False)
    return EncoderDecoder(config)


def _t5_rows(gated: bool) -> list[Row]:
    rows = [embed_row("embeddings/word", "shared"), *dense_rows("lm_head", "lm_head")]
    for side in ("encoder", "decoder"):
        layer, there = f"{side}/layers_{{i}}/", f"{side}.block.{{i}}.layer."
        last = 2 if side == "decoder" else 1
        parts = {"attention": "0.SelfAttention"}
        if side == "decoder":
            parts["cross_attention"] = "1.EncDecAttention"
        for ours, name in parts.items():
            for part in ("query", "key", "value", "out"):
                rows += dense_rows(f"{layer}{ours}/{part}", f"{there}{name}.{part[0]}")
            rows += norm_rows(f"{layer}{ours}_norm", f"{there}{name[0]}.layer_norm")
        rows += norm_rows(f"{layer}mlp_norm", f"{there}{last}.layer_norm")
        rows += dense_rows(f"{layer}mlp/up", f"{there}{last}.DenseReluDense.{'wi_1' if gated else 'wi'}")
        rows += dense_rows(f"{layer}mlp/gate", f"{there}{last}.DenseReluDense.wi_0")
        rows += dense_rows(f"{layer}mlp/down", f"{there}{last}.DenseReluDense.wo")
        rows += norm_rows(f"{side}/final_norm", f"{side}.final_layer_norm")
        rows.append(embed_row(f"{side}/relative_bias", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"))
    return rows


T5_ROWS = {gated: _t5_rows(gated) for gated in (False, True)}
