"""Prompt tuning and prefix tuning in the PEFT layout: one bare tensor `prompt_embeddings`.

Prompts (l, d) stand before the embedded tokens in both libraries, take positions 0 to l - 1 and are pooled where the
first state is pooled. T5's are the encoder's; PEFT by default keeps l more rows for the decoder and never reads them.

Prefixes are (l, L 2 g e): layer i's keys in slot 2i, its values in slot 2i + 1, each (g, e). There they are a cache of
past tokens, so that the tokens' positions start at l; here at 0. Both compute the same after a conversion:

- rotary positions (Llama): q at position t + l meets a key k as q at t meets k turned back by l. Keys are turned.
- learned positions (BERT, RoBERTa, GPT-2): the position table moves by l rows. There it is a module to save; here a
  fixed part of the chain. Either side can then take l tokens less than the table has rows.

T5 is refused: PEFT prefixes its decoder's self-attention alone, and with a relative position bias; ours every attention
without one.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft import trees
from jaxpeft.adapt.prefix_tuning import fold, prefix_tuning
from jaxpeft.adapt.prompt_tuning import prompt_tuning
from jaxpeft.adapt.unified import DESIGNS, hooks_of
from jaxpeft.hooks import discover
from jaxpeft.interchange.errors import InterchangeError
from jaxpeft.interchange.layout import Part, Plan, Written
from jaxpeft.interchange.view import Leaf, View, contiguous
from jaxpeft.method import Call, Method
from jaxpeft.models.decoder import Decoder
from jaxpeft.models.encoder import Encoder, SequenceClassifier
from jaxpeft.models.encoder_decoder import EncoderDecoder

TENSOR = "prompt_embeddings"
_TEXT = (Encoder, SequenceClassifier, Decoder, EncoderDecoder)


def write_prompt(part: Part, view: View) -> Written:
    """The settings and the tensor of a `prompt_tuning` part."""
    place = _word_table(view)
    if set(part.delta) != {place}:
        raise InterchangeError(f"PEFT keeps one prompt, at {place!r}; the delta has prompts at {sorted(part.delta)}")
    prompt = np.asarray(part.delta[place]["prompt"])
    config = view.model.config
    settings = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": prompt.shape[0],
        "token_dim": config.width,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }
    return Written(settings, {TENSOR: prompt}, frozenset())


def read_prompt(config: Mapping[str, Any], view: View, names: frozenset[str]) -> Plan:
    """What a PROMPT_TUNING folder must hold, and how it becomes a method and a delta."""
    place, length, width = _word_table(view), _length(config), view.model.config.width
    copies = _copies(config)
    if copies > 1 and not isinstance(view.model, EncoderDecoder):
        raise InterchangeError(f"num_transformer_submodules={copies}, and {type(view.model).__name__} has one")

    def build(tensors: Mapping[str, np.ndarray]) -> tuple[Method, dict[str, Any]]:
        method = prompt_tuning(length, init="normal" if config.get("prompt_tuning_init") == "RANDOM" else "vocabulary")
        # Only the encoder's rows are ever looked up.
        return method, {place: {"prompt": jnp.asarray(tensors[TENSOR][:length])}}

    return Plan({TENSOR: (length * copies, width)}, build, frozenset())


def write_prefix(part: Part, view: View) -> Written:
    """The settings and the tensor of a `prefix_tuning` part; its network is folded into the table that it makes."""
    _check_prefix(view)
    config, delta = part.config, part.delta
    places = _cores(view)
    if config["mlp"]:
        hooks = hooks_of(DESIGNS["prefix_tuning"][0], config["length"], config["at"], 0.0, None)
        slots = discover(hooks, Call(view.model.apply, view.params, view.model.dummy_inputs()))
        delta = fold(trees.unmark(delta), slots)
    if set(delta) != set(places):
        absent, other = sorted(set(places) - set(delta)), sorted(set(delta) - set(places))
        raise InterchangeError(
            f"PEFT gives every layer a prefix; the delta lacks {absent[:3]} and has {other[:3]} besides. Use save_delta"
        )
    slots_of = []  # (2, l, g, e) of each layer
    for place in places:
        pair = np.stack([np.asarray(delta[place]["key"]), np.asarray(delta[place]["value"])], axis=-4)
        slots_of += list(pair) if pair.ndim == 5 else [pair]
    table = np.concatenate(slots_of).astype(np.float32)  # (2 L, l, g, e)
    length, heads, size = table.shape[1:]
    table[0::2] = _turned(view, table[0::2], length)
    settings = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": length,
        "token_dim": heads * size,
        "num_attention_heads": heads,
        "num_layers": len(slots_of),
        "num_transformer_submodules": 1,
        "encoder_hidden_size": heads * size,
        "prefix_projection": False,
    }
    return Written(settings, {TENSOR: contiguous(table.transpose(1, 0, 2, 3)).reshape(length, -1)}, frozenset())


def read_prefix(config: Mapping[str, Any], view: View, names: frozenset[str]) -> Plan:
    """What a PREFIX_TUNING folder must hold, and how it becomes a method and a delta."""
    _check_prefix(view)
    length, own = _length(config), view.model.config
    heads, size, layers = own.kv_heads or own.heads, own.head_dim, own.layers
    for key, value in (("num_attention_heads", heads), ("token_dim", heads * size), ("num_layers", layers)):
        if config.get(key) not in (None, value):
            raise InterchangeError(f"{key}={config[key]}, the model has {value}: the prefix is for another model")
    if _copies(config) != 1:
        raise InterchangeError(f"num_transformer_submodules={_copies(config)}, the model has one")

    def build(tensors: Mapping[str, np.ndarray]) -> tuple[Method, dict[str, Any]]:
        table = tensors[TENSOR].reshape(length, layers, 2, heads, size).transpose(1, 2, 0, 3, 4)
        keys, tables = _turned(view, table[:, 0], -length), table[:, 1]
        delta = {
            place: {"key": jnp.asarray(keys[at]), "value": jnp.asarray(tables[at])}
            for place, at in _cores(view).items()
        }
        return prefix_tuning(length, mlp=0), delta

    return Plan({TENSOR: (length, layers * 2 * heads * size)}, build, frozenset())


# ----------------------------------------------------------------------------------------------------------- positions


def position_table(view: View) -> Leaf | None:
    """The learned position table that a prefix moves, if the model has one."""
    return next((leaf for leaf in view.leaves if leaf.path.endswith("embeddings/position/embedding")), None)


def moved(view: View, table: np.ndarray, by: int) -> np.ndarray:
    """The position table with row t at t + `by`. Rows that fall off come in at the other end, where none is looked up.

    RoBERTa's positions start behind the padding's row, which stays.
    """
    config = view.model.config
    first = config.pad_id + 1 if config.family == "roberta" else 0
    return np.concatenate([table[:first], np.roll(table[first:], by, axis=0)])


def _turned(view: View, keys: np.ndarray, by: int) -> np.ndarray:
    """`keys` (..., e) turned on by `by` rotary positions; as they are where the model has no such positions."""
    config = view.model.config
    if getattr(config, "family", "") != "llama":
        return keys
    # In float64: the turn there and back is then exact to float32's last digit.
    angles = by * config.rope.frequencies(config.head_dim).astype(np.float64)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = np.split(keys.astype(np.float64), 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(keys.dtype)


# -------------------------------------------------------------------------------------------------------------- places


def _word_table(view: View) -> str:
    """The module before which a prompt stands."""
    if not isinstance(view.model, _TEXT):
        raise InterchangeError(f"PEFT has no prompt tuning for {type(view.model).__name__}. Use save_delta")
    path = next(p for p in view.values if p.endswith("embeddings/word/embedding"))
    return path.rpartition("/")[0]


def _cores(view: View) -> dict[str, Any]:
    """The attention cores by path in order, each with the layers that it takes of a table of all."""
    places = {}
    for leaf in view.leaves:
        block, _, rest = leaf.path.rpartition("/attention/")
        if rest in ("query/kernel", "qkv/kernel"):
            number = block.rpartition("layers")[2].removeprefix("_")
            places[f"{block}/attention/core"] = slice(None) if leaf.layer is not None else int(number)
    return dict(sorted(places.items(), key=lambda x: 0 if isinstance(x[1], slice) else x[1]))


def _check_prefix(view: View) -> None:
    if isinstance(view.model, EncoderDecoder):
        raise InterchangeError(
            "PEFT prefixes T5's decoder self-attention alone, under a relative position bias; here each attention has "
            "a prefix without one. No table makes the two equal. Use save_delta"
        )
    if not isinstance(view.model, _TEXT):
        name = type(view.model).__name__
        raise InterchangeError(f"PEFT has no prefix tuning for {name}: it has no cache of past keys. Use save_delta")


def _length(config: Mapping[str, Any]) -> int:
    length = config.get("num_virtual_tokens")
    if not isinstance(length, int) or length < 1:
        raise InterchangeError(f"num_virtual_tokens={length!r}: expected a number of at least 1")
    return length


def _copies(config: Mapping[str, Any]) -> int:
    """How many times the rows of the tensor hold the virtual tokens."""
    given = config.get("num_transformer_submodules")
    return given if given is not None else 2 if config.get("task_type") == "SEQ_2_SEQ_LM" else 1
