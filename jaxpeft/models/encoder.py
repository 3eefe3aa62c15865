"""BERT, MiniLM and RoBERTa encoders, and a sequence classifier on top.

    x₀ = norm(word[ids] + position[p] + type[s])        post-norm blocks        hidden = x_L

BERT counts positions p = 0, 1, ...; RoBERTa counts the tokens that are not padding, from `pad_id + 1`, and gives
padding `pad_id` itself. Where virtual tokens stand in front, ids no longer tell the padding, and RoBERTa's positions
run on without a break, as in the reference implementation.

Reference: Devlin et al., "BERT", NAACL 2019; Liu et al., "RoBERTa", 2019; Wang et al., "MiniLM", NeurIPS 2020.
"""

import dataclasses
from collections.abc import Mapping, Sequence
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
    with_pooler,
    write_keys,
)
from jaxpeft.models.names import Row, dense_rows, embed_row, norm_rows, under

EncoderBlock = Block

BERT_KEYS = {
    **BLOCK_KEYS,
    "hidden_dropout_prob": ("dropout", 0.1),
    "vocab_size": ("vocab", 30522),
    "max_position_embeddings": ("max_positions", 512),
    "type_vocab_size": ("types", 2),
    "pad_token_id": ("pad_id", 0),
}
ROBERTA_KEYS = {**BERT_KEYS, "vocab_size": ("vocab", 50265), "pad_token_id": ("pad_id", 1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(BlockConfig):
    """A BERT-type encoder. `family` is "bert" or "roberta"; `pooler` adds BERT's dense layer on the first token.

    `narrow` lets a classifier that reads the first token alone compute nothing else in the last layer: the same logits
    for less, but no whole "final_hidden" for readers.
    """

    vocab: int
    max_positions: int = 512  # rows of the position table, RoBERTa's offset included
    types: int = 2
    pad_id: int = 0
    family: str = "bert"
    pooler: bool = False
    narrow: bool = False

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **overrides: Any) -> "EncoderConfig":
        """From the dictionary of a `config.json` of model_type bert or roberta."""
        if hf.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(
                f"position_embedding_type {hf['position_embedding_type']!r} is not supported, only 'absolute'"
            )
        if hf.get("is_decoder") or hf.get("add_cross_attention"):
            raise ValueError("an encoder with is_decoder or add_cross_attention is not supported")
        family = hf.get("model_type", "bert")
        if family not in ("bert", "roberta"):
            raise ValueError(f"model_type {family!r} is not an encoder known here; known: bert, roberta")
        keys = BERT_KEYS if family == "bert" else ROBERTA_KEYS
        fields = read_keys(hf, keys)
        if fields["pad_id"] is None:  # it may be written as null
            fields["pad_id"] = keys["pad_token_id"][1]
        return from_fields(cls, hf, {**fields, "family": family}, overrides)

    def to_hf(self) -> dict[str, Any]:
        """The dictionary for `config.json`, without `architectures`."""
        if self.head_dim * self.heads != self.width or (self.kv_heads or self.heads) != self.heads or self.pre_norm:
            raise ValueError("a BERT config needs width = heads · head_dim, as many key as query heads, and post-norm")
        return self.written({"model_type": self.family, **write_keys(self, BERT_KEYS)})


class EncoderEmbeddings(nn.Module):
    """Word, position and type embeddings, summed and normed; virtual tokens may arrive from a hook on `word`."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, input_ids: Int[Array, "b t"], token_type_ids: Int[Array, "b t"] | None, deterministic: bool
    ) -> Float[Array, "b t d"]:
        c = self.config
        x = embed(c, c.vocab, "word")(input_ids)
        length = x.shape[1]
        offset = c.pad_id + 1 if c.family == "roberta" else 0
        checked_length(length, c.max_positions - offset)
        positions = jnp.arange(offset, offset + length)[None]
        if c.family == "roberta" and length == input_ids.shape[1]:
            real = (input_ids != c.pad_id).astype(jnp.int32)
            positions = jnp.cumsum(real, axis=1) * real + c.pad_id
        types = extend_left(token_type_ids, length, 0)
        if types is None:
            types = jnp.zeros((1, length), jnp.int32)
        x = x + embed(c, c.types, "type")(types) + embed(c, c.max_positions, "position")(positions)
        return nn.Dropout(c.dropout)(norm(c, "norm")(x), deterministic=deterministic)


class Encoder(nn.Module):
    """Hidden states (b, t, d) of a BERT-type encoder.

    `attention_mask` is 1 at tokens and 0 at padding, `token_type_ids` the segment (None: 0). With `pooled=True` (the
    config's `pooler` must be set) the pair (hidden, pooled) is returned.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | None = None,
        token_type_ids: Int[Array, "b t"] | None = None,
        *,
        deterministic: bool = True,
        pooled: bool = False,
        first_only: bool = False,
    ) -> Any:
        c = self.config
        checked_mask(attention_mask, input_ids)
        x = EncoderEmbeddings(c, name="embeddings")(input_ids, token_type_ids, deterministic)
        x = checkpoint_name(x, "embedded")
        bias = attention_bias(extend_left(attention_mask, x.shape[1], 1), x.shape[1])
        x = run_layers(EncoderBlock, c, x, bias, deterministic=deterministic, first_only=first_only)
        if c.pre_norm:
            x = norm(c, "final_norm")(x)
        x = checkpoint_name(x, "final_hidden")
        return with_pooler(c, x, pooled, self.is_initializing())

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, ...]:
        return (jnp.zeros((1, 2), jnp.int32),)

    @nn.nowrap
    def name_rows(self) -> list[Row]:
        return BERT_ROWS

    @nn.nowrap
    def hf_config(self) -> dict[str, Any]:
        name = "BertModel" if self.config.family == "bert" else "RobertaModel"
        return {**self.config.to_hf(), "architectures": [name]}

    @nn.nowrap
    def reading(self) -> tuple[str, tuple[str, ...]]:
        """The prefix that files may or may not carry, and patterns of tensors that may be left unread."""
        pooler = () if self.config.pooler else (r"(bert\.|roberta\.)?pooler\..*",)
        return f"{self.config.family}.", (r"cls\..*", r"lm_head\..*", *pooler)


class RobertaHead(nn.Module):
    """RoBERTa's classification head on the first token's state: dropout, dense, tanh, dropout, projection."""

    config: EncoderConfig
    num_labels: int

    @nn.compact
    def __call__(self, x: Float[Array, "b d"], deterministic: bool = True) -> Float[Array, "b n"]:
        c = self.config
        drop = nn.Dropout(c.dropout)
        x = jnp.tanh(dense(c, c.width, use_bias=True, name="dense")(drop(x, deterministic=deterministic)))
        return dense(c, self.num_labels, use_bias=True, name="out")(drop(x, deterministic=deterministic))


class SequenceClassifier(nn.Module):
    """Logits (b, num_labels) from a pooled encoder.

    `pooling`: "mean" over the unmasked tokens (virtual ones too), "first" token, or "bert" (the backbone's pooler).
    `head_kind`: "linear", one Dense; or "roberta", the two-layer head of RobertaForSequenceClassification.
    """

    config: EncoderConfig
    num_labels: int
    pooling: str = "mean"
    head_kind: str = "linear"

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | None = None,
        token_type_ids: Int[Array, "b t"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b n"]:
        if self.pooling not in ("mean", "first", "bert"):
            raise ValueError(f"pooling must be 'mean', 'first' or 'bert', got {self.pooling!r}")
        if self.head_kind not in ("linear", "roberta"):
            raise ValueError(f"head_kind must be 'linear' or 'roberta', got {self.head_kind!r}")
        c = dataclasses.replace(self.config, pooler=self.pooling == "bert")
        backbone = Encoder(c, name="backbone")
        if self.pooling == "bert":
            own = {"pooled": True, "first_only": c.narrow}
            _, x = backbone(input_ids, attention_mask, token_type_ids, deterministic=deterministic, **own)
        else:
            first = c.narrow and self.pooling == "first"
            hidden = backbone(input_ids, attention_mask, token_type_ids, deterministic=deterministic, first_only=first)
            x = hidden[:, 0] if self.pooling == "first" else mean_pool(hidden, attention_mask)
        if self.head_kind == "roberta":
            return RobertaHead(c, self.num_labels, name="head")(x, deterministic)
        x = nn.Dropout(c.dropout)(x, deterministic=deterministic)
        return dense(c, self.num_labels, use_bias=True, name="head")(x)

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, ...]:
        return (jnp.zeros((1, 2), jnp.int32),)

    @nn.nowrap
    def name_rows(self) -> list[Row]:
        head = dense_rows("head", "classifier")
        if self.head_kind == "roberta":
            head = dense_rows("head/dense", "classifier.dense") + dense_rows("head/out", "classifier.out_proj")
        return under(BERT_ROWS, "backbone/", f"{self.config.family}.") + head

    @nn.nowrap
    def hf_config(self) -> dict[str, Any]:
        c = self.config
        plain = c.family == "bert" and self.pooling == "bert" and self.head_kind == "linear"
        plain |= c.family == "roberta" and self.pooling == "first" and self.head_kind == "roberta"
        hf = with_labels(c.to_hf(), self.num_labels)
        if plain:
            hf.pop("jaxpeft", None)
            name = {"bert": "BertForSequenceClassification", "roberta": "RobertaForSequenceClassification"}[c.family]
            return {**hf, "architectures": [name]}
        # No class there computes this; another name keeps it from being run as something else without a word.
        own = {"pooling": self.pooling, "head_kind": self.head_kind}
        return {**hf, "architectures": ["JaxpeftSequenceClassifier"], "jaxpeft": own}

    @nn.nowrap
    def reading(self) -> tuple[str, tuple[str, ...]]:
        config = dataclasses.replace(self.config, pooler=self.pooling == "bert")
        return Encoder(config).reading()


def mean_pool(hidden: Float[Array, "b t d"], mask: Int[Array, "b s"] | None) -> Float[Array, "b d"]:
    """The mean of the unmasked states in float32; tokens in front of the mask's first column count as unmasked.

    A row without any unmasked token gives zero.
    """
    if mask is None:
        return jnp.mean(hidden, axis=1)
    weights = jnp.asarray(extend_left(mask, hidden.shape[1], 1) != 0, jnp.float32)
    total = jnp.einsum("btd,bt->bd", hidden.astype(jnp.float32), weights, precision=jax.lax.Precision.HIGHEST)
    return (total / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)).astype(hidden.dtype)


def label_names(names: Sequence[str]) -> dict[str, Any]:
    """The names of classes as a `config.json` has them."""
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}


def with_labels(hf: dict[str, Any], num_labels: int) -> dict[str, Any]:
    """`hf` with label names for `num_labels` classes, the old names kept where their number fits."""
    if len(hf.get("id2label") or ()) != num_labels:
        hf |= label_names([f"LABEL_{i}" for i in range(num_labels)])
    hf.pop("num_labels", None)
    return hf


def _bert_rows() -> list[Row]:
    layer, there = "layers_{i}/", "encoder.layer.{i}."
    rows = [
        embed_row("embeddings/word", "embeddings.word_embeddings"),
        embed_row("embeddings/position", "embeddings.position_embeddings"),
        embed_row("embeddings/type", "embeddings.token_type_embeddings"),
        *norm_rows("embeddings/norm", "embeddings.LayerNorm"),
        *norm_rows(f"{layer}attention_norm", f"{there}attention.output.LayerNorm"),
        *norm_rows(f"{layer}mlp_norm", f"{there}output.LayerNorm"),
        *dense_rows("pooler", "pooler.dense"),
    ]
    for ours, name in {
        "attention/query": "attention.self.query",
        "attention/key": "attention.self.key",
        "attention/value": "attention.self.value",
        "attention/out": "attention.output.dense",
        "mlp/up": "intermediate.dense",
        "mlp/down": "output.dense",
    }.items():
        rows += dense_rows(layer + ours, there + name)
    return rows


BERT_ROWS = _bert_rows()


def build(hf: Mapping[str, Any], names: frozenset[str] | None, overrides: Mapping[str, Any]) -> nn.Module:
    """The module that a bert or roberta `config.json` names; `names` are the folder's tensors, if there are any.

    Language-model heads are left unread. Where the folder holds a pooler, it is kept.
    """
    config = EncoderConfig.from_hf(hf, **overrides)
    stem = {"bert": "Bert", "roberta": "Roberta"}[config.family]
    name = (hf.get("architectures") or [f"{stem}Model"])[0]
    if name == f"{stem}ForSequenceClassification":
        if config.family == "roberta":
            return SequenceClassifier(config, label_count(hf), "first", "roberta")
        return SequenceClassifier(dataclasses.replace(config, pooler=True), label_count(hf), "bert")
    if name == "JaxpeftSequenceClassifier":
        own = hf["jaxpeft"]
        config = dataclasses.replace(config, pooler=own["pooling"] == "bert")
        return SequenceClassifier(config, label_count(hf), own["pooling"], own["head_kind"])
    known = [f"{stem}{end}" for end in ("Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification")]
    if name not in known:
        raise ValueError(f"architecture {name!r} is not read here; known: {', '.join(known)}")
    if "pooler" not in overrides:
        pooler = name == f"{stem}Model" if names is None else any("pooler.dense." in tensor for tensor in names)
        config = dataclasses.replace(config, pooler=pooler)
    return Encoder(config)


def label_count(hf: Mapping[str, Any]) -> int:
    """The number of classes of a `config.json` (2 where it says nothing, the reference library's default)."""
    return len(hf.get("id2label") or ()) or hf.get("num_labels") or 2
