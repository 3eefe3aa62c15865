"""Reading and writing model folders: `config.json` and safetensors, one file or several shards. Never pickle.

What is wrong with a folder is said before anything is compiled, in a `ModelFolderError` that names the file or tensor
and the remedy. Files are written under a temporary name, flushed to disk and renamed, so that an interrupted save
leaves the old folder or the new one.

Reference: the safetensors format (an 8-byte little-endian header length, a JSON header with dtype, shape and offsets of
each tensor, then the bytes).
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxpeft.tensor_names import TensorNamesError, listed

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F64", "F32", "F16", "BF16"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
)
_MAX_HEADER = 100_000_000  # the format's own limit
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class ModelFolderError(TensorNamesError):
    """A model folder that cannot be read or written as asked."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies and what its header says of it; `start` counts bytes from the beginning of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int


# ------------------------------------------------------------------------------------------------ reading


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The folder's `config.json`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelFolderError(f"{folder} is not a folder; give the one that holds config.json and model.safetensors")
    file = folder / "config.json"
    if not file.is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = ": it holds an adapter, not a model; load the base model it was trained on"
        raise ModelFolderError(f"{folder} has no config.json{hint}")
    config = _json(file)
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelFolderError(f"{file} names no 'model_type'; it is not a model's configuration")
    return config


def read_index(folder: str | os.PathLike[str]) -> dict[str, Entry]:
    """Every tensor of the folder by name, from the headers alone; each file's length is checked against its header."""
    folder = Path(folder)
    if (folder / INDEX).is_file():
        return _read_sharded(folder)
    single = folder / SINGLE
    if not single.is_file():
        others = [file for file in sorted(folder.glob("*.safetensors")) if file.name != "adapter_model.safetensors"]
        if len(others) == 1:
            single = others[0]
        elif others:
            raise ModelFolderError(
                f"{folder} holds {', '.join(file.name for file in others)} and no {INDEX} that joins them"
            )
        else:
            _refuse_pickle(folder)
            raise ModelFolderError(f"{folder} holds no {SINGLE} and no {INDEX}")
    return read_header(single)


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, from its header; a truncated or padded file is refused."""
    size = file.stat().st_size
    remedy = "the copy is incomplete or not safetensors; fetch the file again"
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ModelFolderError(f"{file} has {size} bytes, too few for its header of {length}: {remedy}")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: Entry(file, tuple(info["shape"]), info["dtype"], 8 + length + info["data_offsets"][0])
                for name, info in header.items()
            }
            end = max((info["data_offsets"][1] for info in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelFolderError(f"{file} has an unreadable header: {remedy}") from error
    if size != 8 + length + end:
        raise ModelFolderError(f"{file} has {size} bytes, its header promises {8 + length + end}: {remedy}")
    return entries


def read_tensors(
    index: Mapping[str, Entry], names: Sequence[str], convert: Callable[[str, np.ndarray], Any]
) -> Iterator[tuple[str, Any]]:
    """Yield (name, convert(name, array)), file by file and tensor by tensor, so that no more than one is held twice."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(index[name].file, []).append(name)
    for file, wanted in by_file.items():
        with safe_open(file, framework="numpy") as stream:
            for name in wanted:
                yield name, convert(name, stream.get_tensor(name))


def _read_sharded(folder: Path) -> dict[str, Entry]:
    weight_map = _json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFolderError(f"{folder / INDEX} has no 'weight_map'")
    shards = sorted(set(weight_map.values()))
    foreign = [shard for shard in shards if Path(shard).name != shard]
    if foreign:
        raise ModelFolderError(f"{folder / INDEX} points outside its folder: {', '.join(foreign)}")
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise ModelFolderError(f"{folder} lacks the shards {', '.join(absent)} that {INDEX} names; fetch them again")
    entries: dict[str, Entry] = {}
    for shard in shards:
        entries.update(read_header(folder / shard))
    missing = sorted(
        name for name, shard in weight_map.items() if name not in entries or entries[name].file.name != shard
    )
    if missing:
        raise ModelFolderError(
            f"{folder}: {INDEX} names tensors its shards do not hold; index and shards are of different models."
            + listed("missing", missing),
            missing=missing,
        )
    return entries


def _refuse_pickle(folder: Path) -> None:
    pickles = sorted(file.name for end in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(end))
    if pickles:
        raise ModelFolderError(
            f"{folder} holds only pickled weights ({', '.join(pickles)}), which can run code when opened and are not "
            "read here. Convert them once where you trust them: transformers' AutoModel.from_pretrained(folder)"
            ".save_pretrained(new_folder) writes safetensors."
        )


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{file} is not valid JSON: {error}") from error


# ------------------------------------------------------------------------------------------------ writing


def write_folder(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    max_shard_bytes: int | None = None,
    source: str | os.PathLike[str] | None = None,
) -> None:
    """Write `tensors` and `config`, and copy the tokenizer's files from `source` if given.

    More than `max_shard_bytes` are split over several files with an index. All files are complete under temporary
    names before the first is renamed; weights of an earlier save that the new index does not name are removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(tensors, max_shard_bytes)
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    written: list[tuple[Path, Path]] = []
    try:
        for file, names in zip(files, shards, strict=True):
            # safetensors 0.8.0 saves strided or transposed numpy views as garbage; contiguous copies are safe.
            # (np.ascontiguousarray would make a scalar a vector.)
            arrays = {name: np.asarray(tensors[name], order="C") for name in names}
            target = _temporary(folder, file, written)
            save_file(arrays, target, metadata={"format": "pt"})
            _flush(target)
        texts = {"config.json": dict(config)}
        if count > 1:
            total = sum(array.nbytes for array in tensors.values())
            where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            texts[INDEX] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        for file, content in texts.items():
            target = _temporary(folder, file, written)
            target.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            _flush(target)
        if source is not None and Path(source).resolve() != folder.resolve():
            for file in TOKENIZER_FILES:
                if (Path(source) / file).is_file():
                    target = _temporary(folder, file, written)
                    shutil.copyfile(Path(source) / file, target)
                    _flush(target)
        for temporary, final in written:
            os.replace(temporary, final)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)
    for file in folder.iterdir():
        stale = file.name in (SINGLE, INDEX) or _SHARD.fullmatch(file.name)
        if stale and file.name not in {final.name for _, final in written}:
            file.unlink()
    _flush(folder)


def _split(tensors: Mapping[str, np.ndarray], limit: int | None) -> list[list[str]]:
    """Names in order, cut where a shard would grow past `limit`; a tensor over the limit stands alone."""
    if limit is not None and limit < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {limit}")
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors):
        if limit is not None and shards[-1] and size + tensors[name].nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensors[name].nbytes
    return shards


def _temporary(folder: Path, name: str, written: list[tuple[Path, Path]]) -> Path:
    target = folder / f".{name}.{os.getpid()}.tmp"
    written.append((target, folder / name))
    return target


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
