"""Merging folders: what mergekit gives, what this room's functions give, in little memory, and on after an interruption."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxpeft.merge import breadcrumbs, ties
from jaxpeft.merge.pieces import _Cut
from jaxpeft.merge.recipe import RecipeError, depths, load_recipe, read_recipe
from jaxpeft.merge.stack import MergeInputError
from jaxpeft.merge.streaming import merge_folders
from jaxpeft.models.folder import ModelFolderError, read_index

GOLDEN = Path(__file__).parents[2] / "third_party" / "mergekit" / "golden.safetensors"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "torch_dtype": "float32",
}


def model(name, *parameters):
    return {"model": name, "parameters": dict(*parameters)}


def either(part, value, other):
    return [{"filter": part, "value": value}, {"value": other}]


RECIPES = {
    "linear": {
        "merge_method": "linear",
        "models": [
            model("a", {"weight": [0.2, 0.9]}),
            model("b", {"weight": either("mlp", 0.3, 0.7)}),
            model("c", {"weight": 1}),
        ],
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "a",
        "slices": [{"sources": [{"model": "a", "layer_range": [0, 3]}, {"model": "b", "layer_range": [0, 3]}]}],
        "parameters": {"t": either("self_attn", [0, 0.5, 1], 0.4)},
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [model("a", {"weight": 0.6}), model("b", {"weight": [0.1, -0.4]})],
        "parameters": {"lambda": 0.8},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            model("a", {"weight": [0.2, 0.9], "density": 0.4}),
            model("b", {"weight": 0.5, "density": 0.6}),
            model("c", {"weight": 0.7, "density": [0.3, 0.5]}),
        ],
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": [
            model("a", {"weight": 0.5, "density": 0.6, "gamma": 0.1}),
            model("b", {"weight": 0.5, "density": 0.7, "gamma": 0.05}),
        ],
        "parameters": {"lambda": 0.9},
    },
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties",
        "base_model": "base",
        "models": [
            model("a", {"weight": 0.5, "density": 0.6, "gamma": 0.1}),
            model("b", {"weight": 0.3, "density": 0.7, "gamma": 0.05}),
            model("c", {"weight": 0.4, "density": 0.5}),
        ],
        "parameters": {"normalize": True},
    },
}


def tensors(seed, base=None):
    rng, out = np.random.default_rng(seed), {}

    def add(name, *shape):
        x = rng.normal(size=shape).astype(np.float32)
        out[name] = x if base is None else (base[name] + 0.1 * x).astype(np.float32)

    add("model.embed_tokens.weight", 20, 8)
    for i in range(3):
        p = f"model.layers.{i}."
        for name, shape in {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8)}.items():
            add(f"{p}self_attn.{name}_proj.weight", *shape)
        for name, shape in {"gate": (12, 8), "up": (12, 8), "down": (8, 12)}.items():
            add(f"{p}mlp.{name}_proj.weight", *shape)
        add(p + "input_layernorm.weight", 8)
        add(p + "post_attention_layernorm.weight", 8)
    add("model.norm.weight", 8)
    add("lm_head.weight", 20, 8)
    return out


def write(folder, held, config=LLAMA):
    folder.mkdir(parents=True)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    base = tensors(0)
    for name, seed in (("base", 0), ("a", 1), ("b", 2), ("c", 3)):
        write(root / name, base if name == "base" else tensors(seed, base))
    (root / "base" / "tokenizer.json").write_text("{}")
    return root


def merged(zoo, out, recipe, **options):
    return load_file(merge_folders(read_recipe(recipe, zoo), out, **options) / "model.safetensors")


@pytest.mark.parametrize("name", RECIPES)
def test_mergekits_recipes_give_mergekits_tensors(name, zoo, tmp_path):
    golden = load_file(GOLDEN)
    found = merged(zoo, tmp_path / "out", {**RECIPES[name], "dtype": "float32"})
    assert {f"{name}/{k}" for k in found} == {k for k in golden if k.startswith(name + "/")}
    for k, x in found.items():
        np.testing.assert_allclose(x, golden[f"{name}/{k}"], atol=1e-6, err_msg=k)


@pytest.mark.parametrize(
    ("recipe", "function"),
    [
        ("ties", lambda base, models: ties(base, models, keep=0.4, axis="leaf")),
        ("breadcrumbs", lambda b, m: breadcrumbs(b, m, keep=0.4, drop_top=0.1, alpha=1.0, axis="leaf")),
    ],
)
def test_files_are_merged_as_trees_are(recipe, function, zoo, tmp_path):
    own = {"weight": 1, "density": 0.4} | ({"gamma": 0.1} if recipe == "breadcrumbs" else {})
    held = {"merge_method": recipe, "base_model": "base", "models": [model(n, own) for n in "abc"]}
    found = merged(zoo, tmp_path / "out", held)
    base, *models = (
        {k: jnp.asarray(x) for k, x in load_file(zoo / n / "model.safetensors").items()} for n in ("base", *"abc")
    )
    want = function(base, models)
    for k, x in found.items():
        np.testing.assert_allclose(x, want[k], atol=2e-6, err_msg=k)


def test_dare_keeps_the_change_in_the_mean_and_differs_by_seed(zoo, tmp_path):
    held = {"merge_method": "dare_linear", "base_model": "base", "models": [model("a", {"weight": 1, "density": 0.5})]}
    base, a = (load_file(zoo / n / "model.safetensors")["lm_head.weight"] for n in ("base", "a"))
    drawn = [merged(zoo, tmp_path / str(s), held, seed=s)["lm_head.weight"] for s in range(40)]
    again = merged(zoo, tmp_path / "again", held, seed=3)["lm_head.weight"]
    np.testing.assert_array_equal(again, drawn[3])
    assert not np.array_equal(drawn[0], drawn[1])
    # An entry is dropped, or doubled: DARE's rescale is 1 / density, where mergekit matches sums of magnitudes.
    moved = (drawn[0] - base) / (a - base)
    assert np.all(np.isclose(moved, 0, atol=1e-3) | np.isclose(moved, 2, atol=1e-3))
    mean = np.mean(drawn, axis=0) - base
    assert abs((mean * (a - base)).sum() / ((a - base) ** 2).sum() - 1) < 0.1


def test_votes_that_cancel_leave_the_bases_entry(tmp_path):
    """mergekit counts a sum of zero as positive: there the result would be 1."""
    write(tmp_path / "base", {"w": np.zeros(2, np.float32)})
    write(tmp_path / "up", {"w": np.array([1, 1], np.float32)})
    write(tmp_path / "down", {"w": np.array([-1, 1], np.float32)})
    held = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [model("up", {"weight": 1}), model("down", {"weight": 1})],
    }
    assert merged(tmp_path, tmp_path / "out", held)["w"].tolist() == [0, 1]


def test_of_equal_magnitudes_the_first_stay_across_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxpeft.merge.pieces.PIECE", 4)
    write(tmp_path / "base", {"w": np.zeros(10, np.float32)})
    write(tmp_path / "a", {"w": np.array([1, 2, 1, 1, 1, 1, 3, 1, 1, 1], np.float32)})
    held = {"merge_method": "ties", "base_model": "base", "models": [model("a", {"weight": 1, "density": 0.6})]}
    assert merged(tmp_path, tmp_path / "out", held)["w"].tolist() == [1, 2, 1, 1, 1, 0, 3, 0, 0, 0]


@given(n=st.integers(1, 5000), share=st.floats(0, 1), kinds=st.integers(1, 2**20), seed=st.integers(0, 99))
@example(n=2048, share=0.01, kinds=2**20, seed=0)  # the place of the cut lies behind the last entry by a fraction
@example(n=384, share=0.05, kinds=2**20, seed=0)
def test_a_cut_keeps_what_sorting_would_and_of_equal_ones_the_first(n, share, kinds, seed):
    sizes = np.random.default_rng(seed).integers(0, kinds, n).astype(np.float32)
    k = int(share * n)
    kept = _Cut(k, n, sizes).within(sizes)
    want = np.zeros(n, bool)
    want[np.argsort(-sizes, kind="stable")[:k]] = True
    np.testing.assert_array_equal(kept, want)


def test_dtypes_shards_whole_numbers_config_and_tokenizer_come_along(zoo, tmp_path):
    held = {k: x.astype(jnp.bfloat16) for k, x in tensors(0).items()} | {"steps": np.arange(3)}
    write(tmp_path / "a", held)
    write(tmp_path / "b", held | {"steps": np.arange(3) + 5})
    (tmp_path / "a" / "tokenizer.json").write_text('{"a": 1}')
    recipe = {"merge_method": "linear", "models": [model("a", {"weight": 1}), model("b", {"weight": 3})]}
    out = merge_folders(read_recipe(recipe, tmp_path), tmp_path / "same", shard_bytes=1000)
    index = read_index(out)
    assert len({e.file for e in index.values()}) > 3
    assert {e.dtype for e in index.values()} == {"BF16", "I64"}
    assert (out / "tokenizer.json").read_text() == '{"a": 1}'
    whole = load_file(index["steps"].file)["steps"]
    np.testing.assert_array_equal(whole, np.arange(3))  # the first model's
    cast = merge_folders(read_recipe({**recipe, "dtype": "float16"}, tmp_path), tmp_path / "cast")
    assert json.loads((cast / "config.json").read_text())["torch_dtype"] == "float16"
    assert json.loads((cast / "config.json").read_text())["dtype"] == "float16"
    np.testing.assert_allclose(
        load_file(cast / "model.safetensors")["lm_head.weight"], held["lm_head.weight"].astype(np.float16), atol=2e-3
    )


def test_a_cut_run_goes_on_and_gives_the_same_file(zoo, tmp_path):
    recipe = read_recipe({**RECIPES["ties"], "dtype": "float32"}, zoo)
    want = (merge_folders(recipe, tmp_path / "whole") / "model.safetensors").read_bytes()
    seen = []

    def stop(done, total, name):
        seen.append(name)
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_folders(recipe, tmp_path / "cut", workers=1, progress=stop)
    assert not (tmp_path / "cut").exists()
    first = set((tmp_path / ".cut.partial" / "done.txt").read_text().split())
    later = []
    merge_folders(recipe, tmp_path / "cut", progress=lambda done, total, name: later.append(name))
    assert first & set(later) == set()
    assert len(first) + len(later) == len(tensors(0))
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == want
    assert not (tmp_path / ".cut.partial").exists()


def test_another_recipe_does_not_go_on_with_what_is_left(zoo, tmp_path):
    def stop(done, total, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_folders(read_recipe(RECIPES["ties"], zoo), tmp_path / "out", workers=1, progress=stop)
    names = []
    other = read_recipe(RECIPES["linear"], zoo)
    merge_folders(other, tmp_path / "out", progress=lambda done, total, name: names.append(name))
    assert len(names) == len(tensors(0))


def test_memory_is_a_few_pieces_and_one_tensor(tmp_path):
    """Four models of 160 MB, two workers: the largest tensor is 40 MB of float32."""
    rng = np.random.default_rng(0)
    for name in ("base", "a", "b", "c"):
        write(tmp_path / name, {f"w{i}": rng.standard_normal((1000, 10_000), np.float32) for i in range(4)})
    program = """
import sys
from jaxpeft.merge.recipe import read_recipe
from jaxpeft.merge.streaming import merge_folders
models = [{"model": m, "parameters": {"weight": 0.5, "density": 0.2}} for m in "abc"]
recipe = read_recipe({"merge_method": "ties", "base_model": "base", "models": models}, sys.argv[1])
# Not `ru_maxrss`, which begins with the parent's: this process's own.
most = lambda: int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
before = most()
merge_folders(recipe, sys.argv[1] + "/out", workers=2)
print((most() - before) / 1024)
"""
    ran = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert 20 < float(ran.stdout) < 160, "MiB: two tensors, twice while they are partitioned, and pieces"


def test_depth_goes_from_the_first_layer_to_the_last():
    names = ["embed.weight", "model.layers.0.w", "model.layers.2.w", "model.layers.4.w", "transformer.h.1.w"]
    assert list(depths(names).values()) == [0, 0, 0.5, 1, 0.25]
    assert depths(["layers.0.w"]) == {"layers.0.w": 1}


def test_yaml_files_are_read_and_folders_stand_beside_them(zoo, tmp_path):
    (zoo / "recipe.yaml").write_text(
        "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1e-1}}\n  - {model: b, parameters: {weight: 0.9}}\n"
    )
    recipe = load_recipe(zoo / "recipe.yaml")
    assert recipe.number("weight", "x", 0, recipe.models[0]) == 0.1
    assert recipe.folders == [zoo / "a", zoo / "b"]


LINEAR = {"merge_method": "linear", "models": [model("a", {"weight": 1}), model("b", {"weight": 1})]}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([], "a recipe is a mapping"),
        ({**LINEAR, "merge_method": "tys"}, "merge_method 'tys'.*known: linear"),
        ({**LINEAR, "modules": {}}, "'modules' is not done here"),
        ({**LINEAR, "models": ["a"]}, "a list of mappings"),
        ({**LINEAR, "models": []}, "linear needs one"),
        ({**LINEAR, "models": [model("z", {"weight": 1})]}, "no folder .*z"),
        ({**LINEAR, "dtype": "int4"}, "dtype 'int4'"),
        ({**LINEAR, "parameters": {"density": 1}}, "parameter 'density' of linear"),
        ({**LINEAR, "tokenizer_source": "union"}, "vocabularies are not joined"),
        ({"merge_method": "ties", "models": LINEAR["models"]}, "base_model is not given"),
        ({**LINEAR, "merge_method": "slerp", "base_model": "base"}, "one other model, 2 are given"),
        (
            {"merge_method": "linear", "slices": [{"sources": [{"model": "a", "layer_range": [1, 2]}]}]},
            "put together are not done",
        ),
    ],
)
def test_recipes_that_are_refused(recipe, message, zoo):
    with pytest.raises(RecipeError, match=message):
        read_recipe(recipe, zoo)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "parameter 'weight' is not given for a"),
        ({"weight": "much"}, "a: weight is 'much': expected a number"),
        ({"weight": 1, "density": 1.5}, "density of .* a share"),
    ],
)
def test_parameters_that_are_refused(parameters, message, zoo, tmp_path):
    held = {"merge_method": "ties", "base_model": "base", "models": [model("a", parameters)]}
    with pytest.raises(RecipeError, match=message):
        merge_folders(read_recipe(held, zoo), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_that_sum_to_nothing_are_refused(zoo, tmp_path):
    held = {"merge_method": "linear", "models": [model("a", {"weight": 1}), model("b", {"weight": -1})]}
    with pytest.raises(RecipeError, match=r"sum to 0.*normalize: false"):
        merge_folders(read_recipe(held, zoo), tmp_path / "out")


def test_models_that_differ_are_told_in_a_table(zoo, tmp_path):
    held = tensors(0)
    held["lm_head.weight"] = held["lm_head.weight"][:, :4].copy()
    del held["model.norm.weight"]
    write(tmp_path / "other", held)
    recipe = {"merge_method": "linear", "models": [model(zoo / "a", {"weight": 1}), model("other", {"weight": 1})]}
    with pytest.raises(
        MergeInputError, match=r"2 of 30 tensors differ\n.*lm_head.weight: a float\[20, 8\], other float\[20, 4\]"
    ):
        merge_folders(read_recipe(recipe, tmp_path), tmp_path / "out")


def test_what_is_not_finite_is_named(zoo, tmp_path):
    held = tensors(0)
    held["model.norm.weight"][3] = np.nan
    write(tmp_path / "bad", held)
    recipe = {"merge_method": "linear", "models": [model(zoo / "a", {"weight": 1}), model("bad", {"weight": 1})]}
    with pytest.raises(MergeInputError, match=r"model\.norm\.weight is not finite in bad"):
        merge_folders(read_recipe(recipe, tmp_path), tmp_path / "out")


def test_there_must_be_models_and_nothing_at_the_place(zoo, tmp_path):
    with pytest.raises(FileExistsError, match="give a new folder"):
        merge_folders(read_recipe(LINEAR, zoo), zoo / "c")
    (tmp_path / "empty").mkdir()
    recipe = {"merge_method": "linear", "models": [model("empty", {"weight": 1})]}
    with pytest.raises(ModelFolderError):
        merge_folders(read_recipe(recipe, tmp_path), tmp_path / "out")
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(tmp_path / "broken.yaml")


def test_the_command_merges_by_a_recipe(zoo, tmp_path, capsys):
    from jaxpeft.cli import main

    (zoo / "two.yaml").write_text(json.dumps({**RECIPES["task_arithmetic"], "dtype": "float32"}))
    assert main(["merge", "--recipe", str(zoo / "two.yaml"), "--out", str(tmp_path / "out")]) == 0
    assert "merged into" in capsys.readouterr().out
    want = merged(zoo, tmp_path / "want", {**RECIPES["task_arithmetic"], "dtype": "float32"})
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(found[k], want[k]) for k in want)
    assert main(["merge", "--recipe", str(zoo / "two.yaml")]) == 1
    assert "--out FOLDER" in capsys.readouterr().err
