"""The PEFT layout from this side: names as literals, round trips, scanned and unrolled alike, every refusal.

Whether the reference library computes the same is asked in tests/parity/test_interchange_parity.py.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft.files import load_delta, save_delta
from jaxpeft.interchange import InterchangeError, load_peft, save_peft
from jaxpeft.models import model_from_config, stack_layers

WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**WIDE, "vocab_size": 20, "max_position_embeddings": 12}
LABELS = {"id2label": {"0": "a", "1": "b", "2": "c"}}
HF = {
    "bert": {"model_type": "bert", **TEXT, **LABELS, "architectures": ["BertForSequenceClassification"]},
    "encoder": {"model_type": "bert", **TEXT, "architectures": ["BertModel"]},
    "roberta": {
        "model_type": "roberta",
        **TEXT,
        **LABELS,
        "pad_token_id": 1,
        "architectures": ["RobertaForSequenceClassification"],
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 20, "n_positions": 12},
    "llama": {"model_type": "llama", **TEXT, "num_key_value_heads": 2},
    "t5": {"model_type": "t5", "vocab_size": 20, "d_model": 16, "d_kv": 4, "num_layers": 2, "num_heads": 4, "d_ff": 24},
    "vit": {
        "model_type": "vit",
        **WIDE,
        **LABELS,
        "image_size": 8,
        "patch_size": 4,
        "architectures": ["ViTForImageClassification"],
    },
    "clip": {
        "model_type": "clip",
        "projection_dim": 6,
        "text_config": {**TEXT, "eos_token_id": 19},
        "vision_config": {**WIDE, "image_size": 4, "patch_size": 2},
    },
}
QUERY = "**/attention/query/kernel"


@pytest.fixture(autouse=True)
def strict():
    """No dtype is promoted silently."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def base():
    """base(kind, scan=False) -> a small model and random variables, the same numbers in both layouts."""

    def make(kind, scan=False):
        model = model_from_config(HF[kind])
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(model.init, jax.random.key(0), *model.dummy_inputs())
        params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)
        if scan:
            model = model.clone(config=dataclasses.replace(model.config, scan=True))
            params = {"params": stack_layers(params["params"])}
        return model, params

    return make


def start(key, model, params, method):
    """A delta with no leaf at its start."""
    delta = jaxpeft.adapt(model.apply, method).init(key, params, *model.dummy_inputs())
    leaves, structure = jax.tree.flatten(delta)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(structure, [x + jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves])


def label(x):
    """A test's name from its parameters."""
    return getattr(x, "name", None) or str(x)


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


def lora(**fields):
    return jaxpeft.lora(**{"rank": 2, "at": QUERY, **fields})


# The layout, written out: {tensor name: shape}, and some settings.
B, G, M, T5, V, C = (
    "base_model.model.bert.encoder.layer.",
    "base_model.model.transformer.h.",
    "base_model.model.model.layers.",
    "base_model.model.",
    "base_model.model.vit.",
    "base_model.model.text_model.encoder.layers.",
)
LAYOUT = {
    "lora": (
        "bert",
        lora(alpha=3),
        {
            B + "0.attention.self.query.lora_A.weight": (2, 16),
            B + "0.attention.self.query.lora_B.weight": (16, 2),
            B + "1.attention.self.query.lora_A.weight": (2, 16),
            B + "1.attention.self.query.lora_B.weight": (16, 2),
        },
        {
            "peft_type": "LORA",
            "task_type": None,
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["query"],
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_rslora": False,
            "use_dora": False,
            "fan_in_fan_out": False,
            "bias": "none",
            "modules_to_save": None,
            "lora_dropout": 0.0,
            "inference_mode": True,
        },
    ),
    "rslora on some modules, whose last name others share": (
        "bert",
        lora(at="**/{mlp/down,attention/out}/kernel", scaling="rslora", dropout=0.1, rank_pattern={"**/mlp/**": 1}),
        {
            B + "0.attention.output.dense.lora_A.weight": (2, 16),
            B + "0.attention.output.dense.lora_B.weight": (16, 2),
            B + "0.output.dense.lora_A.weight": (1, 24),
            B + "0.output.dense.lora_B.weight": (16, 1),
            B + "1.attention.output.dense.lora_A.weight": (2, 16),
            B + "1.attention.output.dense.lora_B.weight": (16, 2),
            B + "1.output.dense.lora_A.weight": (1, 24),
            B + "1.output.dense.lora_B.weight": (16, 1),
        },
        {
            "use_rslora": True,
            "lora_dropout": 0.1,
            "target_modules": ["output.dense"],
            "r": 2,
            "lora_alpha": 4,
            # `output.dense` alone would choose the attention's, too.
            "rank_pattern": {"0.output.dense": 1, "1.output.dense": 1},
        },
    ),
    "dora on an embedding and a head": (
        "bert",
        jaxpeft.chain(jaxpeft.dora(rank=2, at=["**/word/embedding", "**/pooler/kernel"]), jaxpeft.head()),
        {
            "base_model.model.bert.embeddings.word_embeddings.lora_embedding_A": (2, 20),
            "base_model.model.bert.embeddings.word_embeddings.lora_embedding_B": (16, 2),
            "base_model.model.bert.embeddings.word_embeddings.lora_magnitude_vector": (16,),
            "base_model.model.bert.pooler.dense.lora_A.weight": (2, 16),
            "base_model.model.bert.pooler.dense.lora_B.weight": (16, 2),
            "base_model.model.bert.pooler.dense.lora_magnitude_vector": (16,),
            "base_model.model.classifier.weight": (3, 16),
            "base_model.model.classifier.bias": (3,),
        },
        {
            "use_dora": True,
            "task_type": "SEQ_CLS",
            "modules_to_save": ["classifier"],
            "target_modules": ["word_embeddings", "pooler.dense"],
        },
    ),
    "Conv1D with its bias": (
        "gpt2",
        jaxpeft.chain(lora(at="**/layers_0/attention/qkv/kernel"), jaxpeft.bitfit("**/layers_0/attention/qkv/bias")),
        {
            G + "0.attn.c_attn.lora_A.weight": (2, 16),
            G + "0.attn.c_attn.lora_B.weight": (48, 2),
            G + "0.attn.c_attn.base_layer.bias": (48,),
        },
        {"fan_in_fan_out": True, "bias": "lora_only", "task_type": "CAUSAL_LM", "target_modules": ["0.attn.c_attn"]},
    ),
    "convolution": (
        "vit",
        jaxpeft.dora(rank=2, at=["**/patch/kernel", "**/layers_0/mlp/up/kernel"]),
        {
            V + "embeddings.patch_embeddings.projection.lora_A.weight": (2, 3, 4, 4),
            V + "embeddings.patch_embeddings.projection.lora_B.weight": (16, 2, 1, 1),
            V + "embeddings.patch_embeddings.projection.lora_magnitude_vector": (1, 16, 1, 1),
            V + "layers.0.mlp.fc1.lora_A.weight": (2, 16),
            V + "layers.0.mlp.fc1.lora_B.weight": (24, 2),
            V + "layers.0.mlp.fc1.lora_magnitude_vector": (24,),
        },
        {"target_modules": ["projection", "0.mlp.fc1"]},
    ),
    "ia3": (
        "llama",
        jaxpeft.ia3("**/layers_0/attention/{key,value}/kernel", "**/layers_0/mlp/down/kernel"),
        {
            M + "0.self_attn.k_proj.ia3_l": (8, 1),
            M + "0.self_attn.v_proj.ia3_l": (8, 1),
            M + "0.mlp.down_proj.ia3_l": (1, 24),
        },
        {
            "peft_type": "IA3",
            "target_modules": ["0.self_attn.k_proj", "0.self_attn.v_proj", "0.mlp.down_proj"],
            "feedforward_modules": ["0.mlp.down_proj"],
        },
    ),
    "mhr": (
        "llama",
        jaxpeft.mhr(2, 3, 4, 5, at="**/layers_0/attention/query/kernel"),
        {
            M + "0.self_attn.q_proj.poly_lora_A": (4, 3, 4, 2),
            M + "0.self_attn.q_proj.poly_lora_B": (4, 3, 2, 4),
            M + "0.self_attn.q_proj.poly_router.module_logits": (5, 12),
        },
        {
            "peft_type": "POLY",
            "r": 2,
            "n_tasks": 5,
            "n_skills": 3,
            "n_splits": 4,
            "target_modules": ["0.self_attn.q_proj"],
        },
    ),
    "t5": (
        "t5",
        lora(at="**/cross_attention/value/kernel"),
        {
            T5 + "decoder.block.0.layer.1.EncDecAttention.v.lora_A.weight": (2, 16),
            T5 + "decoder.block.0.layer.1.EncDecAttention.v.lora_B.weight": (16, 2),
            T5 + "decoder.block.1.layer.1.EncDecAttention.v.lora_A.weight": (2, 16),
            T5 + "decoder.block.1.layer.1.EncDecAttention.v.lora_B.weight": (16, 2),
        },
        {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["EncDecAttention.v"]},
    ),
    "clip": (
        "clip",
        lora(at="**/text/layers_*/attention/query/kernel"),
        {
            C + "0.self_attn.q_proj.lora_A.weight": (2, 16),
            C + "0.self_attn.q_proj.lora_B.weight": (16, 2),
            C + "1.self_attn.q_proj.lora_A.weight": (2, 16),
            C + "1.self_attn.q_proj.lora_B.weight": (16, 2),
        },
        {"task_type": None},
    ),
    "prompt": (
        "gpt2",
        jaxpeft.prompt_tuning(3),
        {"prompt_embeddings": (3, 16)},
        {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": 3,
            "token_dim": 16,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_transformer_submodules": 1,
        },
    ),
    "prompt on a classifier": (
        "bert",
        jaxpeft.prompt_tuning(3),
        {"prompt_embeddings": (3, 16), "base_model.classifier.weight": (3, 16), "base_model.classifier.bias": (3,)},
        {"task_type": "SEQ_CLS", "modules_to_save": None},
    ),
    "prefix": (
        "llama",
        jaxpeft.prefix_tuning(3, 0),
        {"prompt_embeddings": (3, 2 * 2 * 8)},
        {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": 3,
            "token_dim": 8,
            "num_attention_heads": 2,
            "num_layers": 2,
            "prefix_projection": False,
        },
    ),
    "prefix before learned positions": (
        "encoder",
        jaxpeft.prefix_tuning(3, 0),
        {"prompt_embeddings": (3, 2 * 2 * 16), "base_model.embeddings.position_embeddings.weight": (12, 16)},
        {"task_type": "FEATURE_EXTRACTION", "modules_to_save": ["position_embeddings"]},
    ),
}


@pytest.mark.parametrize("case", LAYOUT)
def test_names_shapes_and_settings(case, base, key, tmp_path):
    kind, method, shapes, settings = LAYOUT[case]
    model, params = base(kind)
    save_peft(tmp_path, start(key, model, params, method), method, model, params, base="org/base")
    assert {name: x.shape for name, x in tensors_of(tmp_path).items()} == shapes
    config = config_of(tmp_path)
    assert {k: config[k] for k in settings} == settings
    assert config["base_model_name_or_path"] == "org/base"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


METHODS = {
    "lora": ("bert", lora(alpha=1.5, dropout=0.25, init="gaussian")),
    "rslora": ("llama", lora(scaling="rslora", at="**/{query,down,word,lm_head}/{kernel,embedding}")),
    "dora": ("vit", jaxpeft.dora(rank=2, at="**/{query,patch}/kernel")),
    "ia3": ("t5", jaxpeft.ia3()),
    "poly": ("bert", jaxpeft.poly(2, 3, 2, 1.0)),
    "mhr": ("llama", jaxpeft.mhr(2, 3, 4, 2, 1.0, at="**/attention/{query,value}/kernel")),
    "inputs only": ("bert", jaxpeft.ia3("**/mlp/down/kernel", "**/mlp/down/kernel")),
    "prompt": ("t5", jaxpeft.prompt_tuning(2)),
    "prompt, classifier": ("roberta", jaxpeft.prompt_tuning(2)),
    "prefix": ("gpt2", jaxpeft.prefix_tuning(2, 0)),
    "prefix, roberta": ("roberta", jaxpeft.prefix_tuning(2, 0)),
    "head": ("roberta", jaxpeft.chain(lora(), jaxpeft.head())),
    "head, prompt": ("bert", jaxpeft.chain(jaxpeft.prompt_tuning(2), jaxpeft.head())),
    "full": ("gpt2", jaxpeft.chain(lora(at="**/qkv/kernel"), jaxpeft.full("**/{mlp/up,attention_norm}/*"))),
    "clip": ("clip", lora(at="**/vision/**/query/kernel")),
}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("case", METHODS)
def test_round_trip(case, scan, base, key, tmp_path):
    """What comes back has the same numbers and the same configuration but for patterns, and its method is whole."""
    kind, method = METHODS[case]
    model, params = base(kind, scan)
    delta = start(key, model, params, method)
    save_peft(tmp_path, delta, method, model, params)
    again = load_peft(tmp_path, model, params)
    if "prefix" in case:  # learned positions: rows move and move back, numbers as they are
        assert again.method.config["method"] == "prefix_tuning"
    same(again.delta, delta)
    fresh = jaxpeft.adapt(model.apply, again.method)
    shapes = jax.eval_shape(fresh.init, key, params, *model.dummy_inputs())
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, delta)
    config, old = again.method.config, method.config
    for field in ("rank", "scaling", "dropout", "init", "length"):
        if field in old and old["method"] != "prompt_tuning":
            assert config[field] == old[field]


@pytest.mark.parametrize("case", METHODS)
def test_scanned_and_unrolled_write_the_same_names(case, base, key, tmp_path):
    kind, method = METHODS[case]
    plain, params = base(kind)
    scanned, stacked = base(kind, scan=True)
    delta = start(key, scanned, stacked, method)
    save_peft(tmp_path / "scanned", delta, method, scanned, stacked)
    # Read into the unrolled layout and written from there: the same file, bit by bit.
    again = load_peft(tmp_path / "scanned", plain, params)
    save_peft(tmp_path / "plain", again.delta, again.method, plain, params)
    a, b = tensors_of(tmp_path / "scanned"), tensors_of(tmp_path / "plain")
    assert set(a) == set(b)
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name])
    assert config_of(tmp_path / "scanned") == config_of(tmp_path / "plain")


def test_the_function_comes_back(base, key, tmp_path):
    """Scales included: logits of a loaded adapter, unrolled and scanned, with ranks and alphas by pattern."""
    method = lora(
        rank=3,
        at="**/{query,word}/{kernel,embedding}",
        rank_pattern={"**/word/*": 2},
        alpha_pattern={"**/query/*": 0.5},
        scaling="rslora",
    )
    model, params = base("encoder", scan=True)
    ids = jnp.arange(6).reshape(1, 6)
    delta = start(key, model, params, method)
    want = jaxpeft.adapt(model.apply, method).apply(params, delta, ids)
    save_peft(tmp_path, delta, method, model, params)
    for scan in (False, True):
        model, params = base("encoder", scan)
        again = load_peft(tmp_path, model, params)
        got = jaxpeft.adapt(model.apply, again.method).apply(params, again.delta, ids)
        np.testing.assert_allclose(got, want, atol=1e-5)  # float32 in another order
        assert again.extra == {"task_type": "FEATURE_EXTRACTION"}


def test_a_network_is_folded(base, key, tmp_path):
    model, params = base("llama")
    ids = jnp.arange(6).reshape(1, 6)
    method = jaxpeft.prefix_tuning(2, 5)
    delta = start(key, model, params, method)
    save_peft(tmp_path, delta, method, model, params)
    again = load_peft(tmp_path, model, params)
    assert again.method.config["mlp"] == 0
    want = jaxpeft.adapt(model.apply, method).apply(params, delta, ids)
    # float32: rotary keys are turned by l positions and back.
    np.testing.assert_allclose(
        jaxpeft.adapt(model.apply, again.method).apply(params, again.delta, ids), want, atol=1e-4
    )


def test_alpha_may_be_an_array_or_one_number_a_layer(base, key, tmp_path):
    model, params = base("encoder", scan=True)
    for alpha, pattern in ((jnp.asarray(0.5), {}), (jnp.asarray([0.5, 3.0]), {"1.attention.self.query": 3})):
        method = lora(alpha=alpha)
        save_peft(tmp_path, start(key, model, params, method), method, model, params)
        config = config_of(tmp_path)
        assert (config["lora_alpha"], config["alpha_pattern"]) == (0.5, pattern)
    plain, params = base("encoder")
    assert load_peft(tmp_path, plain, params).method.config["alpha_pattern"] == {
        "params/layers_1/attention/query/kernel": 3
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept(dtype, base, key, tmp_path):
    model, params = base("encoder")
    delta = jax.tree.map(lambda x: x.astype(dtype), start(key, model, params, lora()))
    save_peft(tmp_path, delta, lora(), model, params)
    same(load_peft(tmp_path, model, params).delta, delta)


def test_a_loaded_prefix_keeps_its_positions_fixed(base, key, tmp_path):
    """A prefix made elsewhere, before learned positions: its moved table is kept, used, not learned, and moved back."""
    model, params = base("gpt2")
    method = jaxpeft.prefix_tuning(2, 0)
    save_peft(tmp_path, start(key, model, params, method), method, model, params)
    arrays = tensors_of(tmp_path)
    name = "base_model.transformer.wpe.weight"
    table = np.asarray(params["params"]["embeddings"]["position"]["embedding"])
    np.testing.assert_array_equal(arrays[name][2:], table[:-2])
    del arrays[name]  # as PEFT writes it, which leaves the table as it is
    save_file(arrays, tmp_path / "adapter_model.safetensors")
    edit(tmp_path, modules_to_save=None)
    delta, method, _ = load_peft(tmp_path, model, params)
    assert set(delta) == {"prefix_tuning", "positions"}
    assert not any("position/" in p for p in jaxpeft.trees.by_path(jaxpeft.learned(delta)[0]))
    save_delta(tmp_path / "own", delta, method, params)
    same(load_delta(tmp_path / "own", params).delta, delta)
    save_peft(tmp_path / "again", delta, method, model, params)
    np.testing.assert_array_equal(tensors_of(tmp_path / "again")[name], table)
    same(load_peft(tmp_path / "again", model, params).delta, delta)


# ------------------------------------------------------------------------------------------------ refusals in writing


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("encoder", jaxpeft.houlsby(2), r"houlsby.*save_delta"),
        ("encoder", jaxpeft.mam(2, 2), "scaled_parallel"),
        ("bert", jaxpeft.head(), "holds one adapter"),
        ("encoder", jaxpeft.chain(lora(), jaxpeft.prompt_tuning(2)), "holds one adapter"),
        ("gpt2", lora(at="**/word/embedding"), "the head shares this table"),
        ("t5", lora(at="**/word/embedding"), "copies of this table"),
        ("gpt2", jaxpeft.chain(lora(at="**/qkv/kernel"), jaxpeft.full("**/word/*")), "the head shares"),
        ("vit", lora(at="**/embeddings/position/embedding"), "linear, embedding and convolution"),
        ("vit", jaxpeft.chain(lora(), jaxpeft.full("**/cls")), "bare parameter"),
        ("vit", jaxpeft.ia3("**/patch/kernel", None), "only on linear"),
        ("vit", jaxpeft.prefix_tuning(2, 0), "no prefix tuning for ImageClassifier"),
        ("t5", jaxpeft.prefix_tuning(2, 0), "relative position bias"),
        ("llama", jaxpeft.prefix_tuning(2, 0, at="**/layers_0/attention/core"), "every layer"),
        ("bert", jaxpeft.chain(lora(at="**/head/kernel"), jaxpeft.full("**/head/kernel")), "does one or the other"),
        ("roberta", jaxpeft.chain(lora(at="**/head/out/kernel"), jaxpeft.head("**/head/dense/*")), "saved whole"),
        ("encoder", jaxpeft.chain(jaxpeft.ia3(), jaxpeft.bitfit("**/key/bias")), "does one or the other"),
        ("bert", jaxpeft.chain(lora(), jaxpeft.head(), jaxpeft.bitfit()), "two parts"),
    ],
    ids=label,
)
def test_what_cannot_be_written(kind, method, message, base, key, tmp_path):
    model, params = base(kind)
    delta = jaxpeft.adapt(model.apply, method).init(key, params, *model.dummy_inputs())
    with pytest.raises(InterchangeError, match=message):
        save_peft(tmp_path / "adapter", delta, method, model, params)
    assert not (tmp_path / "adapter").exists()


def test_deltas_and_models_that_do_not_fit(base, key, tmp_path):
    model, params = base("encoder")
    delta = start(key, model, params, lora())
    gpt2, other = base("gpt2")
    with pytest.raises(InterchangeError, match="which the model lacks"):
        save_peft(tmp_path, delta, lora(), gpt2, other)
    with pytest.raises(InterchangeError, match=r"holds \['a', 'b'\]"):
        save_peft(tmp_path, delta, jaxpeft.dora(rank=2, at=QUERY), model, params)
    with pytest.raises(InterchangeError, match="another chain"):
        save_peft(tmp_path, delta, jaxpeft.chain(lora(), jaxpeft.head()), model, params)
    with pytest.raises(InterchangeError, match="no Hugging Face names"):
        save_peft(tmp_path, delta, lora(), object(), params)
    with pytest.raises(InterchangeError, match="single weight"):
        save_peft(tmp_path, delta, lora(alpha=jnp.ones(2)), model, params)
    with pytest.raises(InterchangeError, match="no parameter of"):
        save_peft(tmp_path, delta, lora(), gpt2, {"params": {"strange": jnp.ones(2)}})
    with pytest.raises(InterchangeError, match="traced"):
        jax.jit(lambda a: save_peft(tmp_path, delta, lora(alpha=a), model, params) and a)(2.0)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_the_old_adapter(base, key, tmp_path, monkeypatch):
    model, params = base("encoder")
    delta = start(key, model, params, lora())
    save_peft(tmp_path, delta, lora(), model, params)
    before = tensors_of(tmp_path)
    monkeypatch.setattr(
        "jaxpeft.interchange.folder.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        save_peft(tmp_path, jax.tree.map(jnp.zeros_like, delta), lora(), model, params)
    assert len(list(tmp_path.iterdir())) == 2
    for name, x in tensors_of(tmp_path).items():
        np.testing.assert_array_equal(x, before[name])


# ------------------------------------------------------------------------------------------------ refusals in reading


def edit(folder, **settings):
    config = {**config_of(folder), **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def saved(base, key, tmp_path):
    """saved(method, kind) -> (folder, model, params) with a written adapter."""

    def make(method=None, kind="encoder", scan=False):
        method = method or lora()
        model, params = base(kind, scan)
        save_peft(tmp_path, start(key, model, params, method), method, model, params)
        return tmp_path, model, params

    return make


def test_missing_left_over_and_misshapen_tensors_are_listed(saved):
    folder, model, params = saved()
    arrays = tensors_of(folder)
    zero, one = (f"base_model.model.encoder.layer.{i}.attention.self.query.lora_" for i in (0, 1))
    arrays["base_model.model.encoder.layer.0.attention.self.qvery.lora_A.weight"] = arrays.pop(zero + "A.weight")
    arrays[one + "A.weight"] = np.ones((3, 16), np.float32)
    arrays[one + "B.weight"] = np.ones((16, 2), np.int32)
    save_file(arrays, folder / "adapter_model.safetensors")
    with pytest.raises(InterchangeError) as error:
        load_peft(folder, model, params)
    assert error.value.missing == (zero + "A.weight",)
    assert error.value.left_over == ("base_model.model.encoder.layer.0.attention.self.qvery.lora_A.weight",)
    assert error.value.misshapen == (one + "A.weight", one + "B.weight")
    for text in ("missing (1)", "near:", "left over (1)", "expected (2, 16)", "expected a float type"):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "VERA"}, "VERA.*known: LORA, IA3, POLY, PROMPT_TUNING, PREFIX_TUNING"),
        ({"peft_type": None}, "known: LORA"),
        ({"lora_bias": True}, "lora_bias=True.*bias inside"),
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 2]]}, "layers twice"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"trainable_token_indices": [3]}, "single rows"),
        ({"alora_invocation_tokens": [3]}, "certain tokens"),
        ({"a_setting_of_tomorrow": 3}, "a_setting_of_tomorrow=3.*not known here"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights"),
        ({"init_lora_weights": "olora"}, "changes the base's weights"),
        ({"target_modules": ["nothing"]}, "chooses no weight"),
        ({"layers_to_transform": [7]}, "chooses no weight"),
        ({"layers_to_transform": [1]}, "left over"),
        ({"exclude_modules": ["0.attention.self.query"]}, "left over"),
        ({"target_modules": ["query", "key"]}, "missing"),
        ({"r": 4}, "expected"),
        ({"rank_pattern": {"query": 0}}, "at least 1"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"bias": "some"}, "expected 'none'"),
        ({"bias": "lora_only"}, "base_layer.bias"),
        ({"bias": "all"}, "LayerNorm.bias"),
        ({"modules_to_save": ["pooler"]}, "pooler.dense.weight"),
        ({"modules_to_save": ["strange"]}, "no such module"),
    ],
    ids=label,
)
def test_settings_that_are_refused(settings, message, saved):
    folder, model, params = saved()
    edit(folder, **settings)
    with pytest.raises(InterchangeError, match=f"(?s){message}"):
        load_peft(folder, model, params)


def test_settings_that_are_read_or_mean_nothing(saved, base):
    folder, model, params = saved()
    want = load_peft(folder, model, params)
    for settings in (
        {"target_modules": r".*\.layer\.[01]\.attention\.self\.query"},
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"target_modules": ["query", "key"], "exclude_modules": r".*key"},
        {"layers_to_transform": [0, 1], "layers_pattern": "layer"},
        {"rank_pattern": {r"layer.\d.*query": 2}, "r": 64, "alpha_pattern": {"query": 4}, "lora_alpha": 1},
        {"fan_in_fan_out": True, "megatron_core": "megatron.core", "qalora_group_size": 16, "peft_version": "9"},
        {"loftq_config": {"loftq_bits": 4}, "init_lora_weights": False, "a_setting_of_tomorrow": None},
    ):
        edit(folder, **settings)
        delta, method, _ = load_peft(folder, model, params)
        same(delta, want.delta)
        ids = jnp.arange(4).reshape(1, 4)
        np.testing.assert_allclose(
            jaxpeft.adapt(model.apply, method).apply(params, delta, ids),
            jaxpeft.adapt(model.apply, want.method).apply(params, delta, ids),
            atol=1e-6,
        )
    # The smallest configuration, with the defaults of a missing alpha.
    smallest = {"peft_type": "LORA", "r": 2, "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(smallest))
    assert load_peft(folder, model, params).method.config["alpha"] == 8


def test_biases_written_twice_are_read_once(saved):
    """`bias="all"` with a head: PEFT repeats the head's bias under two more names."""
    folder, model, params = saved(jaxpeft.chain(lora(), jaxpeft.head(), jaxpeft.full("**/backbone/**/bias")), "bert")
    arrays = tensors_of(folder)
    for name in ("modules_to_save", "original_module"):
        arrays[f"base_model.model.classifier.{name}.bias"] = arrays["base_model.model.classifier.bias"]
    whole = [n for n in arrays if n.endswith(".weight") and "lora" not in n and "classifier" not in n]
    save_file({n: x for n, x in arrays.items() if n not in whole}, folder / "adapter_model.safetensors")
    edit(folder, bias="all", modules_to_save=["classifier", "score"])
    delta, _, _ = load_peft(folder, model, params)
    assert set(delta) == {"lora", "full"}
    assert {p.rpartition("/")[2] for p in delta["full"] if "/head/" not in p} == {"bias"}
    np.testing.assert_array_equal(
        delta["full"]["params/backbone/layers_0/attention/query/bias"]["value"],
        arrays["base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.bias"],
    )


@pytest.mark.parametrize(
    ("method", "kind", "settings", "message"),
    [
        (jaxpeft.prompt_tuning(2), "gpt2", {"num_virtual_tokens": 3}, r"expected \(3, 16\)"),
        (jaxpeft.prompt_tuning(2), "gpt2", {"num_virtual_tokens": None}, "num_virtual_tokens=None"),
        (jaxpeft.prompt_tuning(2), "gpt2", {"num_transformer_submodules": 2}, "Decoder has one"),
        (jaxpeft.prefix_tuning(2, 0), "llama", {"num_layers": 3}, "num_layers=3, the model has 2"),
        (jaxpeft.prefix_tuning(2, 0), "llama", {"num_attention_heads": 4}, "num_attention_heads=4, the model has 2"),
        (jaxpeft.prefix_tuning(2, 0), "llama", {"num_transformer_submodules": 2}, "has one"),
        (jaxpeft.ia3(), "llama", {"feedforward_modules": []}, "expected"),
    ],
    ids=label,
)
def test_other_types_settings_that_are_refused(method, kind, settings, message, saved):
    folder, model, params = saved(method, kind)
    edit(folder, **settings)
    with pytest.raises(InterchangeError, match=message):
        load_peft(folder, model, params)


def test_adapters_for_other_models_are_refused(saved, base):
    folder, _, _ = saved(jaxpeft.prompt_tuning(2), "gpt2")
    with pytest.raises(InterchangeError, match="no prompt tuning for ImageClassifier"):
        load_peft(folder, *base("vit"))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lora(at="**/layers_0/attention/query/kernel"), "scan=False"),
        (lora(rank_pattern={"**/layers_0/**": 1}), "differ in rank"),
        (lora(alpha_pattern={"**/layers_0/**": 1}), "differ in alpha"),
        (jaxpeft.ia3("**/mlp/down/kernel", "**/layers_0/mlp/down/kernel"), "at its inputs in some layers"),
    ],
    ids=label,
)
def test_layers_that_cannot_be_stacked_are_refused(method, message, saved, base):
    folder, _, _ = saved(method)
    with pytest.raises(InterchangeError, match=message):
        load_peft(folder, *base("encoder", scan=True))


def test_one_saved_layer_of_a_scanned_stack_is_filled_from_the_base(saved, base):
    folder, _, _ = saved(jaxpeft.chain(lora(), jaxpeft.full("**/layers_1/mlp_norm/*")))
    model, params = base("encoder", scan=True)
    delta, _, _ = load_peft(folder, model, params)
    found = delta["full"]["params/layers/mlp_norm/scale"]["value"]
    own = params["params"]["layers"]["mlp_norm"]["scale"]
    np.testing.assert_array_equal(found[0], own[0])
    assert not np.array_equal(found[1], own[1])


def test_folders_that_hold_no_adapter(saved, tmp_path):
    folder, model, params = saved()
    with pytest.raises(InterchangeError, match=r"no adapter_config\.json"):
        load_peft(tmp_path / "none", model, params)
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "german").mkdir()
    (tmp_path / "outer" / "german" / "adapter_config.json").write_text("{}")
    with pytest.raises(InterchangeError, match="sub-folders german"):
        load_peft(tmp_path / "outer", model, params)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-9])
    with pytest.raises(InterchangeError, match="cut short"):
        load_peft(folder, model, params)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InterchangeError, match="tensors are missing"):
        load_peft(folder, model, params)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(InterchangeError, match=r"can run code.*save_pretrained"):
        load_peft(folder, model, params)
    for text in ("{", "[]"):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(InterchangeError, match=r"JSON|not the configuration"):
            load_peft(folder, model, params)
