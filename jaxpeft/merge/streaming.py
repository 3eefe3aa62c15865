"""Merging model folders of any size: tensors pass through once, a piece at a time, and nothing holds a whole model.

    merge_folders(load_recipe("recipe.yaml"), "merged")

Names and shapes are compared before anything is computed. Each worker has one tensor: it reads a piece of every model,
merges it in float32, casts it and writes it where it belongs in the file, whose layout is known beforehand. What ranks
entries (`density`) first walks through each model's tensor once for its thresholds, which takes one tensor of float32.
The file has a temporary name until it is whole; beside it stands a list of the tensors that are, so that a run that was cut
goes on where it stopped.

What is done to a piece, and where it departs from other programs, stands in `pieces`.
"""

import contextlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpeft.merge.pieces import NUMPY, SIZES, Reader, merger
from jaxpeft.merge.recipe import Numbers, Recipe, depths
from jaxpeft.merge.stack import MergeInputError
from jaxpeft.models.folder import FLOATS, INDEX, SINGLE, TOKENIZER_FILES, Entry, read_index

__all__ = ["merge_folders"]

SHARD = 5 * 10**9  # bytes of a file, at most
_OF_DTYPE = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Progress = Callable[[int, int, str], None]


class _Place(NamedTuple):
    """Where a tensor lies in the result."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]


def merge_folders(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    shard_bytes: int = SHARD,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Merges the folders of a recipe into a new one, with config and tokenizer.

    Args:
      recipe: from `load_recipe`.
      out: the new folder; must not exist, or hold what an earlier run of the same recipe left unfinished.
      workers: threads; None for as many as there are cores.
      shard_bytes: of a file, at most; a tensor is never cut.
      seed: of random drops. They depend on it, the tensor and the model alone.
      progress: `(tensors done, of how many, name)`.

    Returns:
      The folder.

    Raises:
      RecipeError: a parameter is missing or out of range.
      MergeInputError: models differ in names, shapes or kinds of tensors; a table lists them.
      ModelFolderError: a folder that is no model, or damaged.
      FileExistsError: there is something else at `out`.
    """
    out = Path(out)
    held = {folder: read_index(folder) for folder in recipe.folders}
    first = recipe.base or recipe.models[0].folder
    _compare(held, first)
    names, depth = sorted(held[first]), depths(list(held[first]))
    numbers = {name: recipe.numbers(name, depth[name]) for name in names}
    work = out.with_name(f".{out.name}.partial")
    if out.exists():
        raise FileExistsError(f"{out} exists already; give a new folder")
    places, files = _layout(held[first], names, recipe.dtype, shard_bytes, work)
    done = _begin(work, files, f"{recipe.digest()} {seed} {shard_bytes}")
    lock, finished = threading.Lock(), len(done)

    def one(name: str) -> None:
        nonlocal finished
        with contextlib.ExitStack() as stack:
            readers = {folder: stack.enter_context(Reader(index[name])) for folder, index in held.items()}
            _merge_tensor(recipe, name, numbers[name], readers, places[name], seed)
        with lock:
            finished += 1
            with (work / "done.txt").open("a") as log:
                log.write(name + "\n")
            if progress is not None:
                progress(finished, len(names), name)

    # The largest first, so that no thread is left with one at the end.
    left = sorted((n for n in names if n not in done), key=lambda n: -math.prod(places[n].shape))
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for _ in pool.map(one, left):
            pass
    _finish(recipe, work, out, places, names)
    return out


def _merge_tensor(
    recipe: Recipe, name: str, numbers: Numbers, readers: Mapping[Path, Reader], place: _Place, seed: int
) -> None:
    first = readers[recipe.base or recipe.models[0].folder]
    output = os.open(place.file, os.O_WRONLY)
    try:
        if place.dtype not in FLOATS:  # numbers that are not merged: as the base has them
            for at, count in first.pieces():
                os.pwrite(output, first.raw(at, count), place.start + at * first.item)
            return
        merged = merger(recipe, name, numbers, readers, seed)
        kind, item = NUMPY[place.dtype], SIZES[place.dtype]
        for at, count in first.pieces():
            y = merged(at, count)
            if not np.isfinite(y).all():
                who = [f.name for f, r in readers.items() if not np.isfinite(r.floats(at, count)).all()]
                raise MergeInputError(f"{name} is not finite in {', '.join(who) or 'the merge alone'}: leave that out")
            os.pwrite(output, y.astype(kind, copy=False).tobytes(), place.start + at * item)
    finally:
        os.close(output)


# ------------------------------------------------------------------------------------------------------- before merging


def _compare(held: Mapping[Path, Mapping[str, Entry]], first: Path) -> None:
    """Raises MergeInputError with a table of what differs."""
    names = dict.fromkeys(n for index in held.values() for n in index)
    kind = lambda e: "absent" if e is None else f"{'float' if e.dtype in FLOATS else e.dtype}{list(e.shape)}"
    rows = []
    for name in names:
        found = {folder: kind(index.get(name)) for folder, index in held.items()}
        if len(set(found.values())) > 1:
            rows.append(f"  {name}: " + ", ".join(f"{folder.name} {k}" for folder, k in found.items()))
    if rows:
        more = [f"  and {len(rows) - 12} more"] if len(rows) > 12 else []
        raise MergeInputError(
            f"the models do not fit together: {len(rows)} of {len(names)} tensors differ\n"
            + "\n".join(rows[:12] + more)
        )


def _layout(
    index: Mapping[str, Entry], names: list[str], dtype: str | None, limit: int, work: Path
) -> tuple[dict[str, _Place], dict[Path, tuple[bytes, int]]]:
    """Every tensor's place, and each file's header and length."""
    kinds = {n: _OF_DTYPE[dtype] if dtype and index[n].dtype in FLOATS else index[n].dtype for n in names}
    sizes = {n: math.prod(index[n].shape) * SIZES[kinds[n]] for n in names}
    shards: list[list[str]] = [[]]
    for n in names:
        if shards[-1] and sum(sizes[m] for m in shards[-1]) + sizes[n] > limit:
            shards.append([])
        shards[-1].append(n)
    places, files = {}, {}
    for i, shard in enumerate(shards):
        file = work / (SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors")
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for n in shard:
            header[n] = {"dtype": kinds[n], "shape": list(index[n].shape), "data_offsets": [at, at + sizes[n]]}
            at += sizes[n]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        whole = len(text).to_bytes(8, "little") + text
        for n in shard:
            start = len(whole) + header[n]["data_offsets"][0]
            places[n] = _Place(file, start, kinds[n], index[n].shape)
        files[file] = (whole, len(whole) + at)
    return places, files


def _begin(work: Path, files: Mapping[Path, tuple[bytes, int]], digest: str) -> set[str]:
    """Makes the unfinished folder, or takes up what an earlier run left: the tensors that are done."""
    note, log = work / "recipe.txt", work / "done.txt"
    if note.exists() and note.read_text() == digest and all(f.exists() for f in files):
        return set(log.read_text().splitlines()) if log.exists() else set()
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    for file, (header, length) in files.items():
        with file.open("wb") as stream:
            stream.write(header)
            stream.truncate(length)
    note.write_text(digest)
    return set()


def _finish(recipe: Recipe, work: Path, out: Path, places: Mapping[str, _Place], names: list[str]) -> None:
    """Index, config and tokenizer; then the folder gets its name."""
    files = sorted({p.file for p in places.values()})
    for file in files:
        descriptor = os.open(file, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
    if len(files) > 1:
        total = sum(math.prod(p.shape) * SIZES[p.dtype] for p in places.values())
        index = {"metadata": {"total_size": total}, "weight_map": {n: places[n].file.name for n in names}}
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    config = recipe.tokenizer / "config.json"
    if config.exists():
        held = json.loads(config.read_text())
        if recipe.dtype:
            held |= dict.fromkeys(("dtype", "torch_dtype"), recipe.dtype)  # what its readers call it now, and did
        (work / "config.json").write_text(json.dumps(held, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (recipe.tokenizer / name).exists():
            shutil.copyfile(recipe.tokenizer / name, work / name)
    for name in ("recipe.txt", "done.txt"):
        (work / name).unlink(missing_ok=True)
    work.rename(out)
