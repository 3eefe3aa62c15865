"""Which keys of `adapter_config.json` are read, which mean nothing to a loaded adapter, and which are refused.

A key that is in neither list is refused unless it is off (null, false, empty): a setting unknown here could change what
the adapter computes, and PEFT itself only warns of settings that it does not know.
"""

from collections.abc import Mapping
from typing import Any

from jaxpeft.interchange.errors import InterchangeError

IMPLIED = ("classifier", "score")
SUPPORTED = ("LORA", "IA3", "POLY", "PROMPT_TUNING", "PREFIX_TUNING")

_TARGETS = {"target_modules", "exclude_modules", "modules_to_save"}
_VIRTUAL = {
    "num_virtual_tokens",
    "token_dim",
    "num_transformer_submodules",
    "num_attention_heads",
    "num_layers",
    "modules_to_save",
}
READ = {
    "LORA": _TARGETS
    | {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "rank_pattern", "alpha_pattern"}
    | {"layers_to_transform", "layers_pattern", "init_lora_weights"},
    "IA3": _TARGETS | {"feedforward_modules"},
    "POLY": _TARGETS | {"r", "n_tasks", "n_skills", "n_splits", "poly_type"},
    "PROMPT_TUNING": _VIRTUAL | {"prompt_tuning_init"},
    "PREFIX_TUNING": _VIRTUAL,
}
# Where an adapter comes from and how it was started; nothing of it acts once the tensors are there.
_ANY = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
}
HARMLESS = {
    "LORA": _ANY
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}  # of initialisations that are refused by name
    | {"megatron_core", "qalora_group_size", "runtime_config"}  # act with megatron_config, use_qalora, never
    # Both shapes are written alike, and PEFT corrects a wrong flag by the layer's class when it loads.
    | {"fan_in_fan_out", "ensure_weight_tying"},  # the second: shared tables are refused, whatever it says
    "IA3": _ANY | {"fan_in_fan_out", "init_ia3_weights"},
    "POLY": _ANY | {"init_weights"},
    "PROMPT_TUNING": _ANY | {"prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"},
    # The file holds the tables themselves, whether or not a network made them.
    "PREFIX_TUNING": _ANY | {"encoder_hidden_size", "prefix_projection", "init_weights"},
}
# These start from random or zero factors; all others take something out of the base's weights.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_WHY = {
    "lora_bias": "there is a bias inside the low-rank branch",
    "layer_replication": "the base has layers twice",
    "trainable_token_indices": "single rows of a table are trained",
    "target_parameters": "bare parameters are adapted",
    "use_qalora": "inputs are pooled in groups",
    "alora_invocation_tokens": "the adapter acts from certain tokens on",
    "megatron_config": "layers are split between processes",
}


def saved_modules(config: Mapping[str, Any]) -> list[str]:
    """`modules_to_save`, and what PEFT adds to it by itself where the task is to classify."""
    implied = IMPLIED if config.get("task_type") == "SEQ_CLS" else ()
    return list(dict.fromkeys((*(config.get("modules_to_save") or []), *implied)))


def check_keys(config: Mapping[str, Any]) -> str:
    """The adapter's type, if all of its settings are understood.

    Raises:
      InterchangeError: another type, or a setting that is not understood.
    """
    kind = str(config.get("peft_type"))
    if kind not in SUPPORTED:
        raise InterchangeError(f"peft_type {config.get('peft_type')!r} is not read here; known: {', '.join(SUPPORTED)}")
    for key, value in config.items():
        if key not in READ[kind] | HARMLESS[kind] and value not in (None, False, "", [], {}):
            raise InterchangeError(
                f"{key}={value!r} is not supported for {kind}: {_WHY.get(key, 'its effect is not known here')}. "
                "Merge the adapter into its base there and load the merged model"
            )
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise InterchangeError(
            f"init_lora_weights={start!r} changes the base's weights as well: the factors alone are not the adapter. "
            "Save it there with path_initial_model_for_weight_conversion, or merge it"
        )
    return kind
