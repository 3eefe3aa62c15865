"""Folders: what is written is read back bit for bit, and every way a folder can be wrong has its message."""

import json
import os
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from small_configs import HF

from jaxpeft.models import (
    EncoderConfig,
    ModelFolderError,
    hf_name,
    load_classifier,
    load_model,
    model_from_config,
    our_name,
    save_model,
    stack_layers,
    unstack_layers,
)
from jaxpeft.models.folder import read_header, write_folder


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def folder(tmp_path, build, weights):
    """A small BERT, saved."""
    model = build("bert")
    save_model(tmp_path / "bert", model, weights(model))
    return tmp_path / "bert"


def rewrite(folder, change):
    """Change the folder's tensors by `change(dict)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(("scan", "limit"), [(False, None), (True, 700)])
def test_round_trip(tmp_path, family, build, weights, scan, limit):
    model = build(family, scan=scan)
    params = weights(model)
    save_model(tmp_path, model, params, max_shard_bytes=limit)
    again, read = load_model(tmp_path, scan=scan)
    assert again == model
    same(read, params)
    _, other = load_model(tmp_path, scan=not scan)
    same((unstack_layers if not scan else stack_layers)(other), params)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert ("model.safetensors" in names) == (limit is None)
    assert not [name for name in names if name.endswith(".tmp")]


def test_config_keeps_what_it_does_not_use(family):
    config = {**HF[family], "bos_token_id": 3, "dtype": "float16"}
    model = model_from_config(config)
    written = model.hf_config()
    assert written["bos_token_id"] == 3
    assert written["dtype"] == "float32"
    assert model_from_config(written) == model
    if family == "vit":
        assert written["id2label"] == HF["vit"]["id2label"]


def test_unknown_overrides_are_refused(family):
    with pytest.raises(ValueError, match="has no field widht"):
        model_from_config(HF[family], widht=3)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_half_precision_round_trip(tmp_path, build, weights, family):
    model = build(family, param_dtype="bfloat16")
    params = weights(model)
    save_model(tmp_path, model, params)
    same(load_model(tmp_path, param_dtype="bfloat16")[1], params)
    _, wide = load_model(tmp_path)
    same(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_strided_and_scalar_arrays_are_written_right(tmp_path):
    """The numpy writer of safetensors 0.8.0 saves transposed and strided views as garbage."""
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {"t": base.T, "s": base[:, ::2], "f": np.asfortranarray(base), "n": np.float32(3.0).reshape(())}
    arrays["b"] = base.astype(ml_dtypes.bfloat16).T
    write_folder(tmp_path, {}, arrays)
    for name, array in load_file(tmp_path / "model.safetensors").items():
        assert array.shape == arrays[name].shape
        np.testing.assert_array_equal(array, arrays[name])


def test_a_second_save_replaces_the_first(folder, build, weights):
    model = build("bert")
    params = weights(model, 5)
    save_model(folder, model, params, max_shard_bytes=700)
    assert not (folder / "model.safetensors").exists()
    same(load_model(folder)[1], params)
    save_model(folder, model, params)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_an_interrupted_save_leaves_the_old_folder(folder, build, monkeypatch):
    model, old = load_model(folder)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_model(folder, model, jax.tree.map(lambda leaf: leaf + 1, old))
    monkeypatch.undo()
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    same(load_model(folder)[1], old)


def test_tokenizer_files_come_along(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("not a tokenizer's")
    save_model(tmp_path / "new", *load_model(folder), source=folder)
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "new" / "notes.txt").exists()


def test_prefix_and_old_norm_names_are_understood(folder):
    def old(tensors):
        for name in list(tensors):
            new = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors["bert." + new] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = np.arange(12)[None]
        tensors["cls.predictions.bias"] = np.zeros(20, np.float32)

    want = load_model(folder)[1]
    rewrite(folder, old)
    same(load_model(folder)[1], want)


# ------------------------------------------------------------------------------------------------ classifiers


def test_fresh_classifier(folder, key, inputs):
    model, params = load_classifier(folder, 3, key=key, scan=True)
    assert model.pooling == "mean"
    assert model.apply(params, *inputs(model)).shape == (2, 3)
    _, plain = load_model(folder, pooler=False)
    same(unstack_layers(params)["params"]["backbone"], plain["params"])
    _, params = load_classifier(folder, 3, pooling="bert", key=key)
    assert "pooler" in params["params"]["backbone"]
    for how in ("bert", "mean"):
        model, params = load_classifier(folder, 3, pooling=how, key=key)
        save_model(folder.parent / f"pooled_{how}", model, params)
        again, read = load_model(folder.parent / f"pooled_{how}")
        assert again == model
        same(read, params)
    assert json.loads((folder.parent / "pooled_bert/config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]


def test_pooler_is_fresh_where_the_folder_has_none(folder, key):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "pooler" in name])
    assert not load_model(folder)[0].config.pooler
    _, params = load_classifier(folder, 2, pooling="bert", key=key)
    assert params["params"]["backbone"]["pooler"]["kernel"].shape == (8, 8)


@pytest.mark.parametrize("family", ["roberta", "vit"])
def test_stored_heads(tmp_path, family, build, weights, key):
    model = build(family)
    params = weights(model)
    save_model(tmp_path, model, params)
    again, read = load_classifier(tmp_path)
    assert again == model
    same(read, params)
    with pytest.raises(ModelFolderError, match="fresh_head=True"):
        load_classifier(tmp_path, 7)
    _, read = load_classifier(tmp_path, 7, fresh_head=True, key=key)
    assert read["params"]["head"]["kernel"].shape == (8, 7)
    same(read["params"]["backbone"], params["params"]["backbone"])


def test_classifier_arguments_are_checked(folder, tmp_path, build, weights, key):
    with pytest.raises(ValueError, match="pass key"):
        load_classifier(folder, 3)
    with pytest.raises(ValueError, match="num_labels"):
        load_classifier(folder, key=key)
    model, params = load_classifier(folder, 3, pooling="bert", key=key)
    save_model(tmp_path / "c", model, params)
    with pytest.raises(ModelFolderError, match="'mean'"):
        load_classifier(tmp_path / "c", pooling="mean")
    gpt2 = build("gpt2")
    save_model(tmp_path / "g", gpt2, weights(gpt2))
    with pytest.raises(ValueError, match="Decoder has no classifier"):
        load_classifier(tmp_path / "g", 3, key=key)
    vit = build("vit")
    save_model(tmp_path / "v", vit, weights(vit))
    with pytest.raises(ValueError, match="always reads the first token"):
        load_classifier(tmp_path / "v", 3, key=key, fresh_head=True, pooling="mean")


# ------------------------------------------------------------------------------------------------ layouts, names


def test_stack_and_unstack():
    tree = {f"layers_{i}": {"a": jnp.full((2,), i), "b": {"c": jnp.ones(())}} for i in range(11)}
    nested = {"params": {"encoder": tree, "decoder": tree, "head": jnp.ones(3)}}
    stacked = stack_layers(nested)
    assert stacked["params"]["encoder"]["layers"]["a"].shape == (11, 2)
    np.testing.assert_array_equal(stacked["params"]["decoder"]["layers"]["a"][:, 0], np.arange(11))
    same(unstack_layers(stacked), nested)
    same(stack_layers({"head": jnp.ones(3)}), {"head": jnp.ones(3)})
    with pytest.raises(ValueError, match="without a gap"):
        stack_layers({"layers_0": {}, "layers_2": {}})
    with pytest.raises(ValueError, match="another structure"):
        stack_layers({"layers_0": {"a": jnp.ones(1)}, "layers_1": {"b": jnp.ones(1)}})
    with pytest.raises(ValueError, match="different leading axes"):
        unstack_layers({"layers": {"a": jnp.ones(1), "b": jnp.ones(2)}})


def test_every_parameter_has_a_name_and_back(family, build, key):
    model = build(family)
    shapes = jax.eval_shape(model.init, key, *model.dummy_inputs())
    names = set()
    for path in flatten_dict(shapes["params"], sep="/"):
        name, transform = hf_name(model, "params/" + path)
        names.add(name)
        assert our_name(model, name) == (path, transform)
        assert our_name(model, hf_name(model, path, stored=True)[0]) == (path, transform)
    assert len(names) == len(jax.tree.leaves(shapes))


def test_names_of_modules_stacks_and_configs(build):
    bert, vit = build("bert"), build("vit")
    assert isinstance(bert.config, EncoderConfig)
    assert hf_name(bert.config, "layers_1/attention/query") == ("encoder.layer.1.attention.self.query", "transpose")
    assert hf_name(bert, "layers/mlp/up/kernel")[0] == "encoder.layer.{i}.intermediate.dense.weight"
    assert our_name(bert, "encoder.layer.1.attention.self.query")[0] == "layers_1/attention/query"
    assert hf_name(bert, "embeddings/word") == ("embeddings.word_embeddings", "same")
    path = "backbone/layers_0/attention/query/kernel"
    assert hf_name(vit, path)[0] == "vit.layers.0.attention.q_proj.weight"
    assert hf_name(vit, path, stored=True)[0] == "vit.encoder.layer.0.attention.attention.query.weight"
    with pytest.raises(ValueError, match="near"):
        hf_name(bert, "embeddings/words/embedding")
    with pytest.raises(ValueError, match="near"):
        our_name(bert, "embeddings.word_embedding.weight")


# ------------------------------------------------------------------------------------------------ faults


def test_missing_left_over_and_misshapen(folder):
    def change(tensors):
        tensors["encoder.layer.0.attention.self.querry.weight"] = tensors.pop(
            "encoder.layer.0.attention.self.query.weight"
        )
        tensors["pooler.dense.weight"] = tensors["pooler.dense.weight"][:, :3].copy()
        tensors["embeddings.LayerNorm.bias"] = np.ones(8, np.int32)

    rewrite(folder, change)
    with pytest.raises(ModelFolderError) as error:
        load_model(folder)
    assert error.value.missing == ("encoder.layer.0.attention.self.query.weight",)
    assert error.value.left_over == ("encoder.layer.0.attention.self.querry.weight",)
    assert len(error.value.misshapen) == 2
    text = str(error.value)
    assert "(near: encoder.layer.0.attention.self.querry.weight)" in text
    assert "shape (8, 3), the config wants (8, 8)" in text
    assert "type I32" in text


def test_the_same_parameter_twice(folder):
    rewrite(folder, lambda tensors: tensors.update({"bert.pooler.dense.bias": tensors["pooler.dense.bias"]}))
    with pytest.raises(ModelFolderError, match="the same parameter as"):
        load_model(folder)


def test_long_lists_are_cut(folder):
    reconfigure(folder, num_hidden_layers=9)
    with pytest.raises(ModelFolderError, match=r"and \d+ more"):
        load_model(folder)


def test_pickle_only(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"no model\.safetensors"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ModelFolderError, match="save_pretrained"):
        load_model(folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: data[:-4], "its header promises"),
        (lambda data: data + b"1234", "its header promises"),
        (lambda data: data[:5], "too few"),
        (lambda data: b"\xff" * 8 + data[8:], "too few"),
        (lambda data: data[:8] + b"x" * (len(data) - 8), "unreadable header"),
    ],
)
def test_broken_files(folder, spoil, words):
    file = folder / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ModelFolderError, match=words):
        read_header(file)
    with pytest.raises(ModelFolderError, match="fetch the file again"):
        load_model(folder)


def test_broken_shards(folder):
    model, params = load_model(folder)
    save_model(folder, model, params, max_shard_bytes=700)
    shards = sorted(folder.glob("model-*.safetensors"))
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    shards[1].rename(folder / "away")
    with pytest.raises(ModelFolderError, match=f"lacks the shards {shards[1].name}"):
        load_model(folder)
    (folder / "away").rename(shards[1])
    wrong = {**good, "weight_map": {**good["weight_map"], "embeddings.extra": shards[0].name}}
    index.write_text(json.dumps(wrong))
    with pytest.raises(ModelFolderError, match=r"embeddings\.extra"):
        load_model(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ModelFolderError, match="outside its folder"):
        load_model(folder)
    index.write_text("{}")
    with pytest.raises(ModelFolderError, match="no 'weight_map'"):
        load_model(folder)
    index.unlink()
    with pytest.raises(ModelFolderError, match="joins them"):
        load_model(folder)


def test_bad_configs(folder, tmp_path):
    with pytest.raises(ModelFolderError, match="is not a folder"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ModelFolderError, match=r"no config\.json$"):
        load_model(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="holds an adapter"):
        load_model(tmp_path / "adapter")
    reconfigure(folder, model_type="mamba")
    with pytest.raises(ModelFolderError, match="'mamba'; known: bert"):
        load_model(folder)
    reconfigure(folder, model_type="bert", architectures=["BertForTokenClassification"])
    with pytest.raises(ValueError, match="known: BertModel"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelFolderError, match="not valid JSON"):
        load_model(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="model_type"):
        load_model(folder)


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"hidden_act": "mish"}, "unknown activation 'mish'"),
        ("bert", {"num_hidden_layers": 0}, "layers must be at least 1"),
        ("bert", {"hidden_dropout_prob": 1.5}, "dropout must lie"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"resid_pdrop": 0.2}, "different resid_pdrop"),
        ("gpt2", {"architectures": ["GPT2ForTokenClassification"]}, "is not read here"),
        ("llama", {"num_key_value_heads": 3}, "must divide"),
        ("llama", {"rope_scaling": {"type": "llama3"}}, "cannot be read: KeyError"),
        ("llama", {"hidden_size": "wide"}, "cannot be read: TypeError"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn'"),
        ("t5", {"architectures": ["T5EncoderModel"]}, "is not read here"),
        ("vit", {"patch_size": 9}, "do not fit"),
        ("vit", {"architectures": ["ViTForMaskedImageModeling"]}, "is not read here"),
        ("vit", {"architectures": ["ViTModel"], "pooler_act": "relu"}, "another activation"),
        ("clip", {"architectures": ["CLIPTextModel"]}, "is not read here"),
    ],
)
def test_unsupported_variants(family, fields, words):
    with pytest.raises(ModelFolderError, match=words):
        model_from_config({**HF[family], **fields})


def test_wrong_dtypes_are_refused(build):
    with pytest.raises(ValueError, match="must be a float type"):
        build("bert", dtype="int32")


def test_saving_other_params_is_refused(tmp_path, build, weights):
    model = build("bert")
    params = weights(model)
    bad = jax.tree.map(lambda leaf: leaf, params)
    bad["params"]["embeddings"]["wrod"] = bad["params"]["embeddings"].pop("word")
    bad["params"]["pooler"]["bias"] = jnp.zeros(3)
    bad["params"]["pooler"]["kernel"] = jnp.zeros((8, 8), jnp.int32)
    with pytest.raises(ModelFolderError, match="near: embeddings/wrod") as error:
        save_model(tmp_path / "new", model, bad)
    assert error.value.left_over == ("embeddings/wrod/embedding",)
    assert len(error.value.misshapen) == 2
    assert not (tmp_path / "new").exists()
    bad = jax.tree.map(lambda leaf: leaf, params)
    bad["params"]["pooler"]["bias"] = "delta"
    with pytest.raises(ModelFolderError, match="merge the delta first"):
        save_model(tmp_path / "new", model, bad)
    with pytest.raises(ValueError, match="max_shard_bytes"):
        save_model(tmp_path / "new", model, params, max_shard_bytes=0)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "vit"])
def test_a_config_comes_back_with_its_nulls(family, build):
    config = build(family, init_std=None).config
    assert config.to_hf()["initializer_range"] is None
    assert type(config).from_hf(config.to_hf()).init_std is None


def test_configs_without_a_counterpart_are_refused(build):
    for family in ("bert", "gpt2", "vit"):
        with pytest.raises(ValueError, match="width = heads"):
            build(family, head_dim=5).config.to_hf()
