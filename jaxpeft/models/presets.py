"""Published configurations by name, as their `config.json` says: for planning and for models without weights.

    model = model_from_config(preset("llama-3-8b"), scan=True, remat=True)

Sources: the `config.json` beside each model's published weights (meta-llama, openai-community, google-bert, google).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpeft.models.folder import ModelFolderError, read_config
from jaxpeft.tensor_names import near_name


def _llama(**fields: Any) -> dict[str, Any]:
    shared = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5}
    return {**shared, "initializer_range": 0.02, "tie_word_embeddings": False, **fields}


def _llama3(**fields: Any) -> dict[str, Any]:
    shared = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0, "num_key_value_heads": 8}
    return _llama(**{**shared, **fields})


def _vit(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "qkv_bias": True,
        "num_labels": 1000,
    }


def _bert(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "vocab_size": 30522,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    }


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
    }


PRESETS: Mapping[str, dict[str, Any]] = {
    "llama-2-7b": _llama(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    ),
    "llama-3-8b": _llama3(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "llama-3-70b": _llama3(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "bert-base": _bert(768, 12, 12),
    "bert-large": _bert(1024, 24, 16),
    "vit-b-16": _vit(768, 12, 12),
    "vit-l-16": _vit(1024, 24, 16),
}


def preset(name: str | os.PathLike[str]) -> dict[str, Any]:
    """The `config.json` dictionary of a published model, or of a folder (or its config.json) of your own.

    Raises:
      ModelFolderError: neither a known name nor a readable `config.json`; the known names are listed.
    """
    if str(name) in PRESETS:
        return dict(PRESETS[str(name)])
    path = Path(name)
    if not path.exists():
        raise ModelFolderError(
            f"no model {str(name)!r}{near_name(str(name), list(PRESETS))}: there are {', '.join(PRESETS)}; or give the "
            "path of a config.json"
        )
    return read_config(path.parent if path.name == "config.json" else path)
