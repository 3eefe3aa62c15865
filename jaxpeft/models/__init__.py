"""Linen backbones and their readers and writers of Hugging Face folders (safetensors, never pickle).

    model, params = load_model(folder, scan=True)
    hidden = model.apply(params, input_ids, attention_mask)
    save_model(new_folder, model, params, source=folder)

Parameter paths: blocks are `layers_{i}/...`, or `layers/...` with a leading axis where `scan` is set; inside a block
stand `attention/{query,key,value,out}`, `attention_norm`, `mlp/{up,down,gate}`, `mlp_norm`. Every block's output
carries the name "hidden", the embeddings "embedded", the last state "final_hidden" (`checkpoint_name`).
"""

from jaxpeft.models.cache import FULL, INT8, Cache, Storage, new_cache
from jaxpeft.models.clip import Clip, ClipConfig, ClipTextConfig, TextTower, contrastive_loss
from jaxpeft.models.decoder import Decoder, DecoderBlock, DecoderConfig, Rope, positions_from_mask
from jaxpeft.models.dit import Dit, DitConfig
from jaxpeft.models.encoder import Encoder, EncoderBlock, EncoderConfig, SequenceClassifier, mean_pool
from jaxpeft.models.encoder_decoder import CrossBlock, EncoderDecoder, EncoderDecoderConfig, shift_right
from jaxpeft.models.folder import ModelFolderError
from jaxpeft.models.generation import Generated, Sampling, decoding, generate
from jaxpeft.models.hierarchical import HierarchicalClassifier, HierarchicalConfig, HierarchicalTransformer
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
from jaxpeft.models.vit import ImageClassifier, VisionConfig, VisionTransformer

__all__ = [
    "HierarchicalTransformer",
    "HierarchicalConfig",
    "HierarchicalClassifier",
    "DitConfig",
    "Dit",
    "ACTIVATIONS",
    "Attention",
    "AttentionCore",
    "Block",
    "BlockConfig",
    "Cache",
    "Clip",
    "ClipConfig",
    "ClipTextConfig",
    "CrossBlock",
    "Decoder",
    "DecoderBlock",
    "DecoderConfig",
    "Encoder",
    "EncoderBlock",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "FULL",
    "Generated",
    "INT8",
    "ImageClassifier",
    "Mlp",
    "ModelFolderError",
    "Rope",
    "Sampling",
    "SequenceClassifier",
    "Storage",
    "TRANSFORMS",
    "TextTower",
    "VisionConfig",
    "VisionTransformer",
    "contrastive_loss",
    "decoding",
    "generate",
    "hf_name",
    "load_classifier",
    "load_model",
    "mean_pool",
    "model_from_config",
    "new_cache",
    "our_name",
    "positions_from_mask",
    "save_model",
    "shift_right",
    "stack_layers",
    "unstack_layers",
]
