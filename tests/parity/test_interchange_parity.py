"""PEFT adapters against the reference library itself, on small random models.

Logits agree to 1e-4 in float32 (observed: under 1e-5), since the sums run in other orders.
"""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.interchange import InterchangeError, load_peft, save_peft
from jaxpeft.models import load_model, model_from_config, save_model, stack_layers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    # Third parties: their own notices say nothing about our code.
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to.*"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`.*:UserWarning"),
]

TOLERANCE = 1e-4
T, L = 7, 3  # tokens, virtual tokens
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
LABELS = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
TEXT = {**SMALL, "vocab_size": 40, "max_position_embeddings": 20, "initializer_range": 0.3}
NO_TOKENS = {"bos_token_id": 0, "eos_token_id": 1}
MODELS = {
    "bert": {"model_type": "bert", **TEXT, **LABELS, "architectures": ["BertForSequenceClassification"]},
    "roberta": {
        "model_type": "roberta",
        **TEXT,
        **LABELS,
        "pad_token_id": 1,
        "architectures": ["RobertaForSequenceClassification"],
    },
    "gpt2": {
        "model_type": "gpt2",
        **{"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 20, "initializer_range": 0.3},
        **NO_TOKENS,
        "architectures": ["GPT2LMHeadModel"],
    },
    "llama": {
        "model_type": "llama",
        **TEXT,
        **NO_TOKENS,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "architectures": ["LlamaForCausalLM"],
    },
    "t5": {
        "model_type": "t5",
        **{"vocab_size": 40, "d_model": 16, "d_kv": 4, "num_layers": 2, "num_heads": 4, "d_ff": 24},
        "architectures": ["T5ForConditionalGeneration"],
    },
    "vit": {
        "model_type": "vit",
        **SMALL,
        **LABELS,
        "image_size": 8,
        "patch_size": 4,
        "initializer_range": 0.3,
        "architectures": ["ViTForImageClassification"],
    },
}
QV = {
    "bert": "**/attention/{query,value}/kernel",
    "roberta": "**/attention/{query,value}/kernel",
    "gpt2": "**/attention/qkv/kernel",
    "llama": "**/attention/{query,value}/kernel",
    "t5": "**/{attention,cross_attention}/{query,value}/kernel",
    "vit": "**/attention/{query,value}/kernel",
}
# What every model takes, in evaluation.
WEIGHT_METHODS = {
    "lora": lambda at: jaxpeft.lora(rank=3, alpha=5, at=at),
    "rslora": lambda at: jaxpeft.lora(rank=3, alpha=5, at=at, scaling="rslora", dropout=0.1),
    "dora": lambda at: jaxpeft.dora(rank=2, alpha=3, at=at),
    "patterns": lambda at: jaxpeft.lora(
        rank=4,
        at=at,
        rank_pattern={"**/layers_0/**": 2, "**/layers_1/attention/value/kernel": 3},
        alpha_pattern={"**/layers_1/**": 2.5},
    ),
    "ia3": lambda at: jaxpeft.ia3(at, "**/mlp/down/kernel"),
    "ia3_outputs": lambda at: jaxpeft.ia3(at, None),
}


def base(kind, tmp_path, scan=False):
    """Our model with random weights, and the same model there."""
    model = model_from_config(MODELS[kind])
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.dummy_inputs())

    def leaf(x):
        # Norms' scales near one, everything else wide enough that no layer drowns.
        centre = 1.0 if x.ndim == 1 and x.shape == (16,) else 0.0
        return jnp.asarray(centre + 0.4 * rng.normal(size=x.shape), x.dtype)

    params = jax.tree.map(leaf, shapes)
    folder = tmp_path / "base"
    save_model(folder, model, params)
    theirs = there(kind, folder)
    if scan:
        model = model.clone(config=dataclasses.replace(model.config, scan=True))
        params = {"params": stack_layers(params["params"])}
    return model, params, theirs, folder


def there(kind, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, MODELS[kind]["architectures"][0]).from_pretrained(folder).eval()


def batch(kind, masked=True):
    """Inputs for our model (positional) and for theirs (by keyword)."""
    rng = np.random.default_rng(1)
    if kind == "vit":
        pixels = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
        return (jnp.asarray(pixels),), {"pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2))}
    ids = rng.integers(3, 40, (2, T))
    mask = np.array([[1] * T, [1] * (T - 2) + [0] * 2]) if masked else np.ones((2, T), int)
    ids = np.where(mask, ids, 1) if kind == "roberta" else ids
    if kind == "t5":
        other = rng.integers(3, 40, (2, 4))
        ours = (jnp.asarray(ids), jnp.asarray(other), jnp.asarray(mask))
        return ours, {
            "input_ids": torch.tensor(ids),
            "decoder_input_ids": torch.tensor(other),
            "attention_mask": torch.tensor(mask),
        }
    return (jnp.asarray(ids), jnp.asarray(mask)), {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def noisy(delta, seed=0):
    """Every leaf moved, so that nothing is at its start."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), delta)


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def agree(ours, theirs, change_from=None):
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)
    if change_from is not None:
        assert ours.shape != change_from.shape or np.abs(ours - change_from).max() > 0.01, "the adapter does nothing"


def compared(kind, method, tmp_path, scan=False, masked=True):
    """Saves a noisy delta of `method`, runs it there, reads it back and runs it here again."""
    model, params, theirs, _ = base(kind, tmp_path, scan)
    ours, inputs = batch(kind, masked)
    adapted = jaxpeft.adapt(model.apply, method)
    delta = noisy(adapted.init(jax.random.key(1), params, *ours))
    before = logits(theirs, **inputs)
    save_peft(tmp_path / "adapter", delta, method, model, params)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys.*")
        wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    want = logits(wrapped, **inputs)
    real = np.ones(want.shape, bool) if want.ndim < 3 or kind == "t5" else None
    got = np.asarray(adapted.apply(params, delta, *ours))
    again = load_peft(tmp_path / "adapter", model, params)
    back = np.asarray(jaxpeft.adapt(model.apply, again.method).apply(params, again.delta, *ours))
    if real is None:  # decoders: what stands at padding means nothing
        mask = inputs["attention_mask"].numpy().astype(bool)
        mask = np.pad(mask, ((0, 0), (want.shape[1] - T, 0)), constant_values=True)
        want, got, back = want[mask], got[mask], back[mask]
    agree(got, want, before)
    agree(back, want)
    return again


@pytest.mark.parametrize("name", WEIGHT_METHODS)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "vit"])
def test_weights_saved_here_run_there(kind, name, tmp_path):
    method = WEIGHT_METHODS[name](QV[kind])
    if name == "patterns" and kind == "gpt2":
        method = jaxpeft.lora(rank=4, at="**/{attention,mlp}/*/kernel", rank_pattern={"**/mlp/**": 2})
    compared(kind, method, tmp_path)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("heads", [1, 4])
def test_routed_layers_run_there_for_each_rows_task(heads, scan, tmp_path):
    at = "**/attention/{query,value}/kernel"
    method = jaxpeft.poly(2, 3, 5, 3.0, at) if heads == 1 else jaxpeft.mhr(2, 3, heads, 5, 3.0, at)
    model, params, theirs, _ = base("bert", tmp_path, scan)
    ours, inputs = batch("bert")
    adapted, tasks = jaxpeft.adapt(model.apply, method), np.array([4, 1])
    delta = noisy(adapted.init(jax.random.key(1), params, *ours))
    before = logits(theirs, **inputs)
    save_peft(tmp_path / "adapter", delta, method, model, params)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys.*")
        wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    want = logits(wrapped.base_model, **inputs, task_ids=torch.tensor(tasks))
    agree(adapted.apply(params, delta, *ours, task=tasks), want, before)
    again = load_peft(tmp_path / "adapter", model, params)
    agree(jaxpeft.adapt(model.apply, again.method).apply(params, again.delta, *ours, task=tasks), want)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_scanned_layers_run_there(kind, name, tmp_path):
    compared(kind, WEIGHT_METHODS[name](QV[kind]), tmp_path, scan=True)


@pytest.mark.parametrize("method", [jaxpeft.lora, jaxpeft.dora])
def test_embeddings_and_convolutions(method, tmp_path):
    compared("bert", method(rank=2, at=["**/embeddings/{word,position}/embedding", "**/pooler/kernel"]), tmp_path / "a")
    compared("vit", method(rank=2, at="**/patch/kernel"), tmp_path / "b")
    compared("llama", method(rank=2, at=["**/word/embedding", "**/lm_head/kernel"]), tmp_path / "c")
    compared("t5", method(rank=2, at="**/relative_bias/embedding"), tmp_path / "d")


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama", "t5"])
def test_prompts_run_there(kind, tmp_path):
    compared(kind, jaxpeft.prompt_tuning(L), tmp_path)


@pytest.mark.parametrize("mlp", [0, 5])
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
def test_prefixes_run_there(kind, mlp, tmp_path):
    again = compared(kind, jaxpeft.prefix_tuning(L, mlp), tmp_path)
    assert again.method.config["method"] == "prefix_tuning"
    assert again.method.config["mlp"] == 0


def test_scanned_prefixes_run_there(tmp_path):
    compared("llama", jaxpeft.prefix_tuning(L, 5), tmp_path / "a", scan=True)
    compared("gpt2", jaxpeft.prefix_tuning(L, 0), tmp_path / "b", scan=True)


@pytest.mark.parametrize(
    "part",
    [
        jaxpeft.lora(rank=2),
        jaxpeft.dora(rank=2),
        jaxpeft.ia3(),
        jaxpeft.prompt_tuning(L),
        jaxpeft.prefix_tuning(L, 0),
    ],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("kind", ["bert", "roberta", "vit"])
def test_a_trained_head_goes_along(part, kind, tmp_path):
    if kind == "vit" and part.name.startswith("pr"):
        pytest.skip("PEFT has no virtual tokens for images")
    again = compared(kind, jaxpeft.chain(part, jaxpeft.head()), tmp_path)
    assert set(again.delta) == {part.name, "head"}


def test_biases_and_norms_go_along(tmp_path):
    """A bias of an adapted layer, a layer norm, and one layer of a scanned stack's."""
    part = jaxpeft.lora(rank=2, at="**/query/kernel")
    compared("bert", jaxpeft.chain(part, jaxpeft.bitfit()), tmp_path / "a")
    compared("bert", jaxpeft.chain(part, jaxpeft.full("**/layers_1/mlp_norm/*", form="difference")), tmp_path / "b")
    compared(
        "gpt2", jaxpeft.chain(jaxpeft.lora(rank=2, at="**/qkv/kernel"), jaxpeft.bitfit()), tmp_path / "c", scan=True
    )


# --------------------------------------------------------------------------------------------------- made there


def made_there(kind, config, tmp_path, scannable=True):
    """An adapter of PEFT's with all its tensors random, saved there, read here, unrolled and scanned: logits of all."""
    model, params, theirs, _ = base(kind, tmp_path)
    ours, inputs = batch(kind)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(theirs, config).eval()
    for _, p in wrapped.named_parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    want = logits(wrapped, **inputs)
    wrapped.save_pretrained(tmp_path / "adapter")
    real = np.ones(want.shape[:1], bool)
    if kind in ("gpt2", "llama"):
        real = inputs["attention_mask"].numpy().astype(bool)
        real = np.pad(real, ((0, 0), (want.shape[1] - T, 0)), constant_values=True)

    def check(model, params):
        delta, method, _ = load_peft(tmp_path / "adapter", model, params)
        got = np.asarray(jaxpeft.adapt(model.apply, method).apply(params, delta, *ours))
        agree(got[real], want[real])
        return delta

    if scannable:
        check(
            model.clone(config=dataclasses.replace(model.config, scan=True)), {"params": stack_layers(params["params"])}
        )
    return check(model, params)


TASKS = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
MODULES = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "t5": ["q", "v"]}
MODULES |= {"vit": ["q_proj", "v_proj"], "roberta": ["query", "value"]}


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True, "lora_alpha": 3}, {"use_dora": True}, {"bias": "lora_only"}, {"bias": "all"}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "vit"])
def test_lora_made_there(kind, settings, tmp_path):
    config = peft.LoraConfig(task_type=TASKS.get(kind), r=2, target_modules=MODULES[kind], **settings)
    made_there(kind, config, tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bert", {"target_modules": ["query", "word_embeddings"], "rank_pattern": {r"layer.1.*query": 3}}),
        ("bert", {"target_modules": r".*\.layer\.1\..*(query|intermediate\.dense)", "alpha_pattern": {"query": 5}}),
        ("bert", {"target_modules": ["dense"], "layers_to_transform": [1]}),
        ("bert", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
        ("gpt2", {"target_modules": ["c_proj"], "rank_pattern": {"mlp.c_proj": 1}}),
        ("vit", {"target_modules": ["projection", "fc1"], "modules_to_save": ["classifier", "layernorm"]}),
    ],
    ids=str,
)
def test_targets_are_found(kind, settings, tmp_path):
    config = peft.LoraConfig(task_type=TASKS.get(kind), r=2, **settings)
    # Layers that differ have no scanned layout.
    equal = not {"rank_pattern", "layers_to_transform", "alpha_pattern"} & set(settings)
    made_there(kind, config, tmp_path, scannable=equal)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_ia3_made_there(kind, tmp_path):
    # With the defaults there: their names, and on BERT their match of two modules at once.
    made_there(kind, peft.IA3Config(task_type=TASKS[kind]), tmp_path)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama", "t5"])
def test_prompts_made_there(kind, tmp_path):
    made_there(kind, peft.PromptTuningConfig(task_type=TASKS[kind], num_virtual_tokens=L), tmp_path)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
def test_prefixes_made_there(kind, projection, tmp_path):
    config = peft.PrefixTuningConfig(task_type=TASKS[kind], num_virtual_tokens=L, prefix_projection=projection)
    delta = made_there(kind, config, tmp_path)
    assert ("positions" in delta) == (kind != "llama")


def test_t5_prefixes_differ_and_are_refused(tmp_path):
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=L)
    with pytest.raises(InterchangeError, match="relative position bias"):
        made_there("t5", config, tmp_path)


@pytest.mark.parametrize(("kind", "module"), [("gpt2", "wte"), ("t5", "shared")])
def test_shared_tables_differ_and_are_refused(kind, module, tmp_path):
    with pytest.raises(InterchangeError, match="table"):
        made_there(kind, peft.LoraConfig(task_type=TASKS[kind], r=2, target_modules=[module]), tmp_path)


# ------------------------------------------------------------------------------------------------------------- merged


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_merged_models_load_there(kind, name, tmp_path):
    model, params, _, _ = base(kind, tmp_path)
    ours, inputs = batch(kind, masked=False)
    adapted = jaxpeft.adapt(model.apply, WEIGHT_METHODS[name](QV[kind]))
    delta = noisy(adapted.init(jax.random.key(1), params, *ours))
    save_model(tmp_path / "merged", model, adapted.merge(params, delta))
    want = logits(there(kind, tmp_path / "merged"), **inputs)
    agree(adapted.apply(params, delta, *ours), want)
    again, merged = load_model(tmp_path / "merged")
    agree(again.apply(merged, *ours), want)


def test_names_are_exactly_those_that_peft_writes(tmp_path):
    """Tensor names and shapes of our folder and of PEFT's own save of the same adapter."""
    from safetensors.numpy import load_file

    for i, (kind, method) in enumerate(
        [
            ("bert", jaxpeft.chain(jaxpeft.dora(rank=2, at=["**/query/kernel", "**/word/embedding"]), jaxpeft.head())),
            ("vit", jaxpeft.dora(rank=2, at=["**/patch/kernel", "**/query/kernel"])),
            ("gpt2", jaxpeft.ia3("**/qkv/kernel")),
            ("llama", jaxpeft.prefix_tuning(L, 0)),
            ("bert", jaxpeft.chain(jaxpeft.prefix_tuning(L, 0), jaxpeft.head())),
            ("t5", jaxpeft.prompt_tuning(L)),
        ]
    ):
        at = tmp_path / str(i)
        compared(kind, method, at)
        theirs = peft.PeftModel.from_pretrained(there(kind, at / "base"), at / "adapter")
        theirs.save_pretrained(at / "theirs", save_embedding_layers=False)
        own, other = (load_file(at / d / "adapter_model.safetensors") for d in ("adapter", "theirs"))
        assert {k: x.shape for k, x in own.items()} == {k: x.shape for k, x in other.items()}
        for k, x in own.items():
            np.testing.assert_array_equal(x, other[k])
        written = json.loads((at / "adapter" / "adapter_config.json").read_text())
        theirs = json.loads((at / "theirs" / "adapter_config.json").read_text())
        assert set(written) <= set(theirs)
