"""Linen backbones and their readers and writers of Hugging Face folders (safetensors, never pickle).

    model, params = load_model(folder, scan=True)
    hidden = model.apply(params, input_ids, attention_mask)
    save_model(new_folder, model, params, source=folder)

Parameter paths: blocks are `layers_{i}/...`, or `layers/...` with a leading axis where `scan` is set; inside a block
stand `attention/{query,key,value,out}`, `attention_norm`, `mlp/{up,down,gate}`, `mlp_norm`. Every block's output
carries the name "hidden", the embeddings "embedded", the last state "final_hidden" (`checkpoint_name`).
"""

from jaxpeft.models.encoder import Encoder, EncoderBlock, EncoderConfig, SequenceClassifier, mean_pool
from jaxpeft.models.folder import ModelFolderError
from jaxpeft.models.layers import (
    ACTIVATIONS,
    Attention,
    AttentionCore,
    Block,
    BlockConfig,
    Mlp,
    stack_layers,
    unstack_layers,
)
from jaxpeft.models.loading import hf_name, load_classifier, load_model, model_from_config, our_name, save_model
from jaxpeft.models.names import TRANSFORMS

__all__ = [
    "ACTIVATIONS",
    "Attention",
    "AttentionCore",
    "Block",
    "BlockConfig",
    "Encoder",
    "EncoderBlock",
    "EncoderConfig",
    "Mlp",
    "ModelFolderError",
    "SequenceClassifier",
    "TRANSFORMS",
    "hf_name",
    "load_classifier",
    "load_model",
    "mean_pool",
    "model_from_config",
    "our_name",
    "save_model",
    "stack_layers",
    "unstack_layers",
]
