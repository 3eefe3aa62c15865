"""Records what reference implementations compute on random inputs, for tests that run without them.

    python tests/parity/golden.py transformers                      needs the extra `parity`
    python tests/parity/golden.py peft
    python tests/parity/golden.py unified --repository FOLDER       a checkout of jxhe/unify-parameter-efficient-tuning

Each writes `third_party/<name>.json`: source, version or commit, licence, the call, inputs and outputs. Weights are not
kept where they can be made again: `fill(name, shape)` draws a tensor's values from its name. `third_party/README.md` says
what each file is.
"""

import argparse
import importlib.util
import json
import subprocess
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

TARGET = Path(__file__).parents[2] / "third_party"
T = 7
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**SMALL, "vocab_size": 40, "max_position_embeddings": 14}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 3}
NO_TOKENS = {"bos_token_id": 0, "eos_token_id": 1}
CONFIGS = {
    "BertForSequenceClassification": {"model_type": "bert", **TEXT, "num_labels": 3},
    "RobertaForSequenceClassification": {"model_type": "roberta", **TEXT, "num_labels": 3, "pad_token_id": 1},
    "GPT2LMHeadModel": {
        "model_type": "gpt2",
        **{"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 14},
        **NO_TOKENS,
    },
    "LlamaForCausalLM": {
        "model_type": "llama",
        **TEXT,
        **NO_TOKENS,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "T5ForConditionalGeneration": {
        "model_type": "t5",
        **{"vocab_size": 40, "d_model": 16, "d_kv": 4, "num_layers": 2, "num_heads": 4, "d_ff": 24},
    },
    "ViTForImageClassification": {"model_type": "vit", **SMALL, **IMAGE, "num_labels": 3},
}


def fill(name: str, shape) -> np.ndarray:
    """Values of the tensor `name`: normal, from a seed that is the name's checksum; a norm's scale is about one."""
    values = 0.3 * np.random.default_rng(zlib.crc32(name.encode())).normal(size=tuple(shape))
    around_one = name.endswith("weight") and len(shape) == 1
    return (values + around_one).astype(np.float32)


def inputs(model_type: str) -> dict:
    """One batch of two, the second row padded at the right."""
    rng = np.random.default_rng(0)
    if model_type == "vit":
        return {"pixel_values": np.round(rng.normal(size=(2, 3, 8, 8)), 3)}
    ids, mask = rng.integers(3, 40, (2, T)), np.array([[1] * T, [1] * 4 + [0] * (T - 4)])
    if model_type == "roberta":
        ids = np.where(mask == 1, ids, 1)
    more = {"decoder_input_ids": ids[:, ::-1][:, :5]} if model_type == "t5" else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def plain(x):
    """Nested lists with seven digits: what float32 knows."""
    return json.loads(json.dumps(np.asarray(x, np.float64).tolist()), parse_float=lambda s: float(f"{float(s):.7g}"))


def write(name, source, result):
    TARGET.mkdir(exist_ok=True)
    (TARGET / f"{name}.json").write_text(json.dumps({"source": source, **result}) + "\n")
    print(TARGET / f"{name}.json")


def record_transformers(_):
    import torch
    import transformers

    out = {}
    for name, fields in CONFIGS.items():
        fields = dict(fields)
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        model = getattr(transformers, name)(config).eval()
        with torch.no_grad():
            for key, value in model.named_parameters():
                value.copy_(torch.tensor(fill(key, value.shape)))
        given = inputs(CONFIGS[name]["model_type"])
        tensors = {k: torch.tensor(np.ascontiguousarray(v)) for k, v in given.items()}
        tensors = {k: v.float() if v.is_floating_point() else v.long() for k, v in tensors.items()}
        with torch.no_grad():
            logits = model(**tensors).logits
        shapes = {k: list(v.shape) for k, v in model.named_parameters()}
        out[name] = {"shapes": shapes, "config": json.loads(config.to_json_string()), "logits": plain(logits.numpy())}
    call = "logits of each class, parameters filled by name, evaluation mode"
    write(
        "transformers",
        {"package": "transformers", "version": transformers.__version__, "licence": "Apache-2.0", "call": call},
        {"models": out},
    )


def record_peft(_):
    import peft
    import torch

    rng = np.random.default_rng(0)
    cases = {
        "linear": (torch.nn.Linear(6, 5), rng.normal(size=(3, 6))),
        "embedding": (torch.nn.Embedding(7, 5), np.array([[0, 3, 6], [2, 2, 1]])),
        "conv": (torch.nn.Conv2d(3, 4, (2, 3), padding=1), rng.normal(size=(2, 3, 4, 5))),
    }
    settings = {
        "lora": {"r": 2, "lora_alpha": 3},
        "rslora": {"r": 2, "lora_alpha": 3, "use_rslora": True},
        "dora": {"r": 2, "lora_alpha": 3, "use_dora": True},
    }
    out = {}
    for kind, (layer, x) in cases.items():
        for setting, fields in [*settings.items(), ("ia3", None), ("ia3 feed-forward", None)]:
            if fields is None:
                if kind != "linear":
                    continue
                inner = ["layer"] if "feed" in setting else []
                config = peft.IA3Config(target_modules=["layer"], feedforward_modules=inner)
            else:
                config = peft.LoraConfig(target_modules=["layer"], **fields)
            net = torch.nn.Module()
            net.layer = type(layer)(*_arguments(layer))
            net.forward = lambda x, net=net: net.layer(x)
            model = peft.get_peft_model(net, config).eval()
            with torch.no_grad():
                for key, value in model.named_parameters():
                    value.copy_(torch.tensor(np.round(fill(f"{kind} {key}", value.shape), 4)))
                y = model(torch.tensor(x).float() if kind != "embedding" else torch.tensor(x).long())
            arrays = {k.replace("base_model.model.", ""): plain(v.detach()) for k, v in model.named_parameters()}
            out[f"{kind} {setting}"] = {"parameters": arrays, "input": plain(x), "output": plain(y.numpy())}
    call = "get_peft_model(one layer, LoraConfig(r=2, lora_alpha=3, ...) or IA3Config), evaluation mode"
    write(
        "peft",
        {"package": "peft", "version": peft.__version__, "licence": "Apache-2.0", "call": call},
        {"cases": out},
    )


def _arguments(layer):
    if hasattr(layer, "num_embeddings"):
        return layer.num_embeddings, layer.embedding_dim
    if hasattr(layer, "kernel_size"):
        return layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
    return layer.in_features, layer.out_features


def record_unified(arguments):
    import torch
    import transformers

    folder = arguments.repository
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()
    source = importlib.util.spec_from_file_location("petl_factory", folder / "petl" / "petl_factory.py")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)

    def filled(net, prefix):
        with torch.no_grad():
            for key, value in net.named_parameters():
                value.copy_(torch.tensor(np.round(fill(f"{prefix} {key}", value.shape), 4)))
        return {k: plain(v.detach()) for k, v in net.named_parameters()}

    rng = np.random.default_rng(0)
    x = np.round(rng.normal(size=(2, 4, 6)), 3).astype(np.float32)
    adapters = {}
    for norm in ("none", "in", "out"):
        for scale in ("1.0", "4.0", "learnable_scalar"):
            name = f"norm {norm}, scale {scale}"
            net = module.Adapter_Layer(
                SimpleNamespace(d_model=6, attn_bn=3), adapter_scalar=scale, adapter_layernorm_option=norm
            ).eval()
            parameters = filled(net, name)
            with torch.no_grad():
                y = net(torch.tensor(x), add_residual=False)
            adapters[name] = {"parameters": parameters, "output": plain(y.numpy())}

    a, b = (np.round(2 * rng.normal(size=(2, 3, n)), 3).astype(np.float32) for n in (4, 5))
    gates = [plain(w.numpy()) for w in module.softmax_gating(torch.tensor(a), torch.tensor(b))]

    config = transformers.RobertaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=2)
    net = module.Prefix(SimpleNamespace(mid_dim=5, attn_bn=3, prefix_dropout=0.0), config).eval()
    parameters = {k: v for k, v in filled(net, "prefix").items() if k.startswith(("wte_enc", "control_trans_enc"))}
    with torch.no_grad():
        layers = net(1, device="cpu")
    tables = [{k: plain(layer["encoder"][k].numpy()) for k in ("prev_key", "prev_value")} for layer in layers]
    write(
        "unified",
        {
            "repository": "jxhe/unify-parameter-efficient-tuning",
            "commit": commit,
            "licence": "Apache-2.0",
            "call": "petl/petl_factory.py: Adapter_Layer(x, add_residual=False), softmax_gating(a, b), Prefix(1)['encoder']",
        },
        {
            "adapters": {"input": plain(x), "cases": adapters},
            "gate": {"prefix_logits": plain(a), "context_logits": plain(b), "weights": gates},
            "prefix": {"parameters": parameters, "layers": tables},
        },
    )


RECORDERS = {"transformers": record_transformers, "peft": record_peft, "unified": record_unified}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=RECORDERS)
    parser.add_argument("--repository", type=Path)
    chosen = parser.parse_args()
    RECORDERS[chosen.what](chosen)
