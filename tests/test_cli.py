"""The command, from the outside, on the real model and data at the smallest size."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft import cli
from jaxpeft.models import ImageClassifier, VisionConfig, load_classifier, save_model
from jaxpeft.train.compare import parse, summarise
from jaxpeft.train.run import Config, ConfigError, check, config_from, parse_options

SMALL = ["--per-class", "2", "--steps", "3", "--batch-size", "8", "--max-length", "16", "--accumulate", "1"]


def run(*arguments):
    return cli.main(list(map(str, arguments)))


def test_options_are_json_values_or_strings_and_unknown_ones_are_listed():
    assert parse_options("lora", ("rank=4", "at=**/kernel", "alpha=2.5")) == {
        "rank": 4,
        "at": "**/kernel",
        "alpha": 2.5,
    }
    with pytest.raises(ConfigError, match=r"option 'rnk=4' for lora.*rank=8"):
        parse_options("lora", ("rnk=4",))
    with pytest.raises(ConfigError, match="option 'rank' for lora has no value: write name=value, as rank=8"):
        parse_options("lora", ("rank",))
    for option in ("rank=abc", "alpha=x"):
        with pytest.raises(ConfigError, match=r"is a word; expected a number, true or false"):
            parse_options("lora", (option,))
    assert parse_options("spt", ("score=magnitude",)) == {"score": "magnitude"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": -3}, "steps=-3: expected 0 or more"),
        ({"rate": -1.0}, "rate=-1.0: expected 0 or more"),
        ({"rate": float("nan")}, "rate=nan"),
        ({"warmup": 7.0}, r"warmup=7.0: it is a share of the steps, in \[0, 1\)"),
        ({"epochs": 0.0}, "nothing would be trained"),
        ({"fsdp": 3}, "fsdp=3 does not divide the 8 devices"),
        ({"max_length": 0}, "max_length=0: expected 1 or more"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused_before_anything_is_read(fields, message):
    with pytest.raises(ConfigError, match=message):
        check(Config(**fields))


def test_a_comparison_names_options_and_rates_in_one_word():
    assert parse("lora:rank=4,rate=2e-3") == ("lora", ("rank=4",), 2e-3)
    with pytest.raises(ValueError, match="unknown method 'lroa'; did you mean 'lora'"):
        parse("lroa")


def test_a_config_survives_json_and_refuses_foreign_fields():
    config = Config(options=("rank=4",), seed=3)
    assert config_from(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(ConfigError, match="no field 'colour'"):
        config_from({"colour": 1})


def test_spreads_are_over_seeds():
    same = {"trained_parameters": 1, "trained_percent": 1.0, "step_temporary_bytes": 1, "train_seconds": 1.0}
    rows = [{"method": "m", "test_accuracy": a, "test_macro_f1": a, **same} for a in (0.8, 0.9)]
    (row,) = summarise(rows, ["m"])
    assert row["mean"] == pytest.approx(0.85)
    assert row["std"] == pytest.approx(np.std([0.8, 0.9], ddof=1))


@pytest.mark.network
def test_an_unknown_method_and_data_set_are_said_in_one_line(capsys):
    assert run("finetune", "--method", "lroa", "--quiet") == 1
    assert "unknown method 'lroa'; did you mean 'lora'" in capsys.readouterr().err
    assert run("finetune", "--dataset", "r88", "--quiet") == 1
    assert "r8" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.network
def test_finetune_evaluate_predict_merge_and_resume(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run("finetune", "--out", folder, "--quiet", *SMALL) == 0
    result = json.loads((folder / "result.json").read_text())
    assert 0 <= result["test_accuracy"] <= 1
    assert result["trained_parameters"] > 0
    held = {p.name for p in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "result.json", "curve.png", "delta", "checkpoints"} <= held
    capsys.readouterr()
    assert run("evaluate", folder) == 0
    assert f"accuracy {result['test_accuracy']:.4f}" in capsys.readouterr().out
    assert run("predict", folder, "oil prices rose as opec cut output") == 0
    label, probability, _ = capsys.readouterr().out.split("\t")
    assert label in {"acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"}
    assert 0 < float(probability) <= 1
    assert run("predict", folder, " ") == 1
    assert "text 0 is empty" in capsys.readouterr().err
    assert run("merge", folder, tmp_path / "merged") == 0
    assert "transformers has no class that pools by 'mean'" in capsys.readouterr().out
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"]["0"] == "acq"
    assert run("merge", folder, folder) == 1
    assert "exists already and is not empty" in capsys.readouterr().err
    # A finished run resumed has nothing left to do and says the same.
    assert run("finetune", "--resume", folder, "--quiet") == 0
    again = json.loads((folder / "result.json").read_text())
    assert again["test_accuracy"] == result["test_accuracy"]


@pytest.mark.slow
@pytest.mark.network
def test_pictures_are_finetuned_evaluated_and_merged_like_texts(tmp_path, capsys):
    """A model of another size and with another head: pictures are brought to it, the head is new."""
    config = VisionConfig(
        width=8, layers=1, heads=2, head_dim=4, mlp_width=8, pre_norm=True, image=(12, 12), patch=(6, 6), channels=3
    )
    model = ImageClassifier(config, 3)
    save_model(tmp_path / "vit", model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 12, 12, 3))))
    run_folder, small = tmp_path / "run", ["--model", tmp_path / "vit", "--dataset", "digits", "--options", "rank=2"]
    assert run("finetune", "--out", run_folder, "--quiet", *small, *SMALL) == 0
    assert "jaxpeft evaluate" in capsys.readouterr().out
    result = json.loads((run_folder / "result.json").read_text())
    assert run("evaluate", run_folder) == 0
    assert f"accuracy {result['test_accuracy']:.4f}" in capsys.readouterr().out
    assert run("predict", run_folder, "a text") == 1
    assert "classifies images" in capsys.readouterr().err
    assert run("merge", run_folder, tmp_path / "merged") == 0
    merged, _ = load_classifier(tmp_path / "merged")
    assert merged.num_labels == 10


@pytest.mark.slow
@pytest.mark.network
def test_sweep_trains_each_setting_as_it_would_alone(tmp_path):
    out = tmp_path / "sweep.json"
    assert run("sweep", "--rates", "1e-3", "1e-2", "--alphas", "4", "--out", out, *SMALL) == 0
    rows = json.loads(out.read_text())
    alone = tmp_path / "alone.json"
    assert run("sweep", "--rates", "1e-2", "--alphas", "4", "--out", alone, *SMALL) == 0
    assert rows[1]["loss"] == pytest.approx(json.loads(alone.read_text())[0]["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.network
def test_sweep_over_ranks_and_dropouts_halves_and_tells_where_each_stopped(tmp_path, capsys):
    out = tmp_path / "sweep.json"
    axes = ["--rates", "1e-3", "--ranks", "2", "4", "--dropouts", "0", "0.1", "--halve-at", "2"]
    assert run("sweep", *axes, "--out", out, *SMALL) == 0
    rows = json.loads(out.read_text())
    assert [(r["rank"], r["dropout"]) for r in rows] == [
        (2, 0.0),
        (2, pytest.approx(0.1)),
        (4, 0.0),
        (4, pytest.approx(0.1)),
    ]
    assert sorted((r["steps"], r["ended"]) for r in rows) == [(2, "halved")] * 2 + [(3, "finished")] * 2
    assert sorted(r["rank_in_sweep"] for r in rows) == [1, 2, 3, 4]
    assert "2 halved" in capsys.readouterr().out
