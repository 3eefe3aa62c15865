"""Configurations of the smallest models of every family, as `config.json` holds them."""

HF = {
    "bert": {
        "model_type": "bert",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "vocab_size": 20,
        "max_position_embeddings": 12,
        "architectures": ["BertModel"],
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20, "n_positions": 12},
    "llama": {
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 12,
        "vocab_size": 20,
    },
    "t5": {
        "model_type": "t5",
        "d_model": 8,
        "d_kv": 3,
        "num_layers": 2,
        "num_heads": 2,
        "d_ff": 12,
        "vocab_size": 20,
        "feed_forward_proj": "gated-gelu",
    },
    "vit": {
        "model_type": "vit",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "image_size": [4, 8],
        "patch_size": 4,
        "architectures": ["ViTForImageClassification"],
        "id2label": {"0": "cat", "1": "dog", "2": "eel"},
    },
}
HF["roberta"] = {
    **HF["bert"],
    "model_type": "roberta",
    "pad_token_id": 1,
    "architectures": ["RobertaForSequenceClassification"],
}
_TOWER = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
HF["clip"] = {
    "model_type": "clip",
    "projection_dim": 6,
    "text_config": {**_TOWER, "vocab_size": 20, "max_position_embeddings": 12, "eos_token_id": 19},
    "vision_config": {**_TOWER, "image_size": 4, "patch_size": 2},
}
