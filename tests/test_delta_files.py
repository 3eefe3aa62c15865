"""A delta's folder: whole or refused, never half-written."""

import json
import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft import Fixed, trees
from jaxpeft import files as module
from jaxpeft.files import ARRAYS, CONFIG, DeltaError, load_delta, save_delta, to_plain, write_atomically

PARAMS = {"in": {"kernel": jnp.ones((4, 6))}, "out": {"kernel": jnp.ones((6, 3))}}
METHOD = jaxpeft.lora(2, at="**/kernel")


@pytest.fixture
def delta(key):
    apply_fn = lambda p, x: x @ p["in"]["kernel"] @ p["out"]["kernel"]
    return jaxpeft.adapt(apply_fn, METHOD).init(key, PARAMS, jnp.ones((1, 4)))


@pytest.fixture
def folder(delta, tmp_path):
    return save_delta(tmp_path / "d", delta, METHOD, PARAMS)


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((np.asarray(x) == np.asarray(y)).all()), a, b)
    )


def test_what_was_saved_is_what_is_loaded_and_nothing_else_lies_beside_it(delta, folder):
    assert sorted(p.name for p in folder.iterdir()) == [ARRAYS, CONFIG]
    saved = load_delta(folder, PARAMS)
    assert equal(saved.delta, delta)
    assert saved.method.config == METHOD.config
    assert saved.extra == {}
    assert stat.S_IMODE((folder / ARRAYS).stat().st_mode) == 0o644


def test_plain_data_beside_the_delta_is_kept(delta, tmp_path):
    save_delta(tmp_path, delta, METHOD, PARAMS, labels=["a", "b"], accuracy=0.5)
    assert load_delta(tmp_path).extra == {"labels": ["a", "b"], "accuracy": 0.5}


def test_fixed_leaves_come_back_fixed_and_uncounted(delta, tmp_path):
    more = {**delta, "table": {"indices": Fixed(jnp.arange(5)), "half": Fixed(jnp.ones((2, 2), jnp.bfloat16))}}
    save_delta(tmp_path, more, METHOD, PARAMS)
    again = load_delta(tmp_path).delta
    assert isinstance(again["table"]["indices"], Fixed)
    assert equal(again, more)
    assert json.loads((tmp_path / CONFIG).read_text())["parameters"] == trees.count(delta)


def test_strided_and_transposed_arrays_are_saved_as_they_read(tmp_path):
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    delta = {"a": {"t": whole.T, "strided": whole[::2, ::3], "reversed": whole[::-1], "scalar": np.float32(3)}}
    save_delta(tmp_path, delta, METHOD, PARAMS)
    again = load_delta(tmp_path).delta
    for name, x in delta["a"].items():
        np.testing.assert_array_equal(again["a"][name], x)
        assert again["a"][name].shape == np.shape(x)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "uint8", "bool"])
def test_dtypes_are_kept(dtype, tmp_path):
    delta = {"x": jnp.arange(4).astype(dtype)}
    save_delta(tmp_path, delta, METHOD, PARAMS)
    assert equal(load_delta(tmp_path).delta, delta)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_of_arrays_is_refused(folder, keep):
    data = (folder / ARRAYS).read_bytes()
    (folder / ARRAYS).write_bytes(data[:keep])
    with pytest.raises(DeltaError, match="missing or cut short"):
        load_delta(folder, PARAMS)


def test_missing_and_unreadable_parts_are_named(folder, tmp_path):
    with pytest.raises(DeltaError, match=rf"no {CONFIG}"):
        load_delta(tmp_path / "nowhere")
    config = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(config[: len(config) // 2])
    with pytest.raises(DeltaError, match="not the configuration"):
        load_delta(folder)
    (folder / CONFIG).write_text("{}")
    with pytest.raises(DeltaError, match=r"lacks \['fingerprint', 'fixed', 'keys', 'method'\]"):
        load_delta(folder)
    for foreign in ("[]", "3", "null"):
        (folder / CONFIG).write_text(foreign)
        with pytest.raises(DeltaError):
            load_delta(folder)
    (folder / CONFIG).write_text(config)
    (folder / ARRAYS).unlink()
    with pytest.raises(DeltaError, match="missing or cut short"):
        load_delta(folder)


def test_another_base_is_refused_before_anything_is_used(folder):
    other = {"in": {"kernel": jnp.ones((4, 7))}, "out": {"kernel": jnp.ones((7, 3))}}
    with pytest.raises(DeltaError, match=rf"{trees.fingerprint(PARAMS)}.*{trees.fingerprint(other)}"):
        load_delta(folder, other)
    renamed = {"inn": PARAMS["in"], "out": PARAMS["out"]}
    with pytest.raises(DeltaError, match=r"in/kernel.*did you mean 'inn/kernel'"):
        load_delta(folder, renamed)
    same_shapes = jax.tree.map(lambda x: 5 * x.astype(jnp.bfloat16), PARAMS)
    assert load_delta(folder, same_shapes).delta, "values and dtypes are the user's business"


def test_arrays_that_the_configuration_does_not_describe_are_refused(folder):
    arrays = load_file(folder / ARRAYS)
    name = sorted(arrays)[0]
    save_file({**{k: v for k, v in arrays.items() if k != name}, "stranger": arrays[name]}, folder / ARRAYS)
    with pytest.raises(DeltaError, match=r"missing \['in/kernel/a'\], left over \['stranger'\]"):
        load_delta(folder)


def test_a_crash_while_writing_leaves_the_old_file_and_no_rubbish(folder, delta):
    before = (folder / ARRAYS).read_bytes()

    def crash(path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(folder / ARRAYS, crash)
    assert (folder / ARRAYS).read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [ARRAYS, CONFIG]


def test_a_crash_before_the_rename_leaves_the_old_file(folder, monkeypatch):
    before = (folder / CONFIG).read_text()

    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_atomically(folder / CONFIG, lambda path: path.write_text("new"))
    assert (folder / CONFIG).read_text() == before
    assert sorted(p.name for p in folder.iterdir()) == [ARRAYS, CONFIG]


def test_a_crash_between_the_two_files_of_a_first_save_is_no_delta(delta, tmp_path, monkeypatch):
    whole = module.write_atomically

    def arrays_only(path, write):
        if path.name == CONFIG:
            raise KeyboardInterrupt
        whole(path, write)

    monkeypatch.setattr(module, "write_atomically", arrays_only)
    with pytest.raises(KeyboardInterrupt):
        save_delta(tmp_path / "d", delta, METHOD, PARAMS)
    with pytest.raises(DeltaError, match=rf"no {CONFIG}"):
        load_delta(tmp_path / "d")


def test_a_crash_between_the_two_files_of_another_save_is_noticed(folder, delta, monkeypatch):
    """A new delta's arrays beside an old one's configuration: names that differ are refused."""
    whole = module.write_atomically

    def arrays_only(path, write):
        if path.name == CONFIG:
            raise KeyboardInterrupt
        whole(path, write)

    monkeypatch.setattr(module, "write_atomically", arrays_only)
    other = {"in/kernel": {"c": jnp.ones(2)}}
    with pytest.raises(KeyboardInterrupt):
        save_delta(folder, other, METHOD, PARAMS)
    with pytest.raises(DeltaError, match="differ"):
        load_delta(folder)


def test_configurations_are_plain_data():
    got = to_plain({"a": jnp.float32(2.0), "b": (1, np.int64(3)), "c": np.arange(2), 4: None, "d": {"e": "x"}})
    assert got == {"a": 2.0, "b": [1, 3], "c": [0, 1], "4": None, "d": {"e": "x"}}
    json.dumps(got)
