"""Merging model folders of any size: tensors pass through once, a piece at a time, and nothing holds a whole model.

    merge_folders(load_recipe("recipe.yaml"), "merged")

Names and shapes are compared before anything is computed. Each worker has one tensor: it reads a piece of every model,
merges it in float32, casts it and writes it where it belongs in the file, whose layout is known beforehand. What ranks
entries (`density`) first walks through each model's tensor once for its thresholds, which takes one tensor of float32.
The file has a temporary name until it is whole; beside it stands a list of the tensors that are, so that a run that was cut
goes on where it stopped.

Definitions are those of this room's functions with axis="leaf", which work on stacked trees, differentiate and vmap; this is
their form for files, in NumPy. One departs: of votes that cancel `ties` asks the majority of the whole model, which nobody
holds here; such an entry stays the base's. Departures from mergekit 0.1.5, each with a test: that one (there it goes to the
positive votes); `rescale` is division by the density, as DARE defines it (there sums of magnitudes
are matched); random drops are of other generators; sums are float32 whatever `dtype` says.

Letters: T models, n entries of a tensor.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxpeft.merge.recipe import METHODS, Recipe, RecipeError, Source, depths
from jaxpeft.merge.stack import MergeInputError
from jaxpeft.models.folder import FLOATS, INDEX, SINGLE, TOKENIZER_FILES, Entry, read_index

__all__ = ["merge_folders"]

PIECE = 2**16  # entries that are merged at a time: those of a few models stay in a core's cache
SHARD = 5 * 10**9  # bytes of a file, at most
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.dtype(jnp.bfloat16)}
_OF_DTYPE = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SIZES |= {"U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1}

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
    numbers = {name: _numbers(recipe, name, depth[name]) for name in names}
    work = out.with_name(f".{out.name}.partial")
    if out.exists():
        raise FileExistsError(f"{out} exists already; give a new folder")
    places, files = _layout(held[first], names, recipe.dtype, shard_bytes, work)
    done = _begin(work, files, f"{recipe.digest()} {seed} {shard_bytes}")
    lock, finished = threading.Lock(), len(done)

    def one(name: str) -> None:
        nonlocal finished
        with contextlib.ExitStack() as stack:
            readers = {folder: stack.enter_context(_Reader(index[name])) for folder, index in held.items()}
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


class _Numbers(NamedTuple):
    """A tensor's parameters, by model where they are the models' own."""

    weight: tuple[float, ...]
    density: tuple[float, ...]
    gamma: tuple[float, ...]
    scale: float
    t: float
    normalize: bool
    rescale: bool


def _numbers(recipe: Recipe, name: str, depth: float) -> _Numbers:
    own, normalize, rescale = METHODS[recipe.method]

    def each(parameter: str, default: float | None) -> tuple[float, ...]:
        return tuple(recipe.number(parameter, name, depth, m, default) for m in recipe.models)

    density = each("density", 1.0) if "density" in own else ()
    gamma = each("gamma", 0.01) if "gamma" in own else ()
    for parameter, values in (("density", density), ("gamma", gamma)):
        if any(not 0 <= v <= 1 for v in values):
            raise RecipeError(f"parameter {parameter} of {name} is {values}: a share, 0 to 1")
    weight = each("weight", None) if recipe.method != "slerp" else ()
    normalize = recipe.flag("normalize", name, depth, normalize)
    if recipe.method == "linear" and normalize and abs(sum(weight)) < 1e-8:
        raise RecipeError(f"the weights of {name} sum to 0: nothing to divide by; set normalize: false")
    return _Numbers(
        weight,
        density,
        gamma,
        recipe.number("lambda", name, depth, default=1.0) if "lambda" in own else 1.0,
        recipe.number("t", name, depth) if "t" in own else 0.0,
        normalize,
        recipe.flag("rescale", name, depth, rescale),
    )


def _layout(
    index: Mapping[str, Entry], names: list[str], dtype: str | None, limit: int, work: Path
) -> tuple[dict[str, _Place], dict[Path, tuple[bytes, int]]]:
    """Every tensor's place, and each file's header and length."""
    kinds = {n: _OF_DTYPE[dtype] if dtype and index[n].dtype in FLOATS else index[n].dtype for n in names}
    sizes = {n: math.prod(index[n].shape) * _SIZES[kinds[n]] for n in names}
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
        total = sum(math.prod(p.shape) * _SIZES[p.dtype] for p in places.values())
        index = {"metadata": {"total_size": total}, "weight_map": {n: places[n].file.name for n in names}}
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    config = recipe.tokenizer / "config.json"
    if config.exists():
        held = json.loads(config.read_text())
        if recipe.dtype:
            held["torch_dtype"] = recipe.dtype
        (work / "config.json").write_text(json.dumps(held, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (recipe.tokenizer / name).exists():
            shutil.copyfile(recipe.tokenizer / name, work / name)
    for name in ("recipe.txt", "done.txt"):
        (work / name).unlink(missing_ok=True)
    work.rename(out)


# ------------------------------------------------------------------------------------------------------------ one tensor


class _Reader:
    """Pieces of one tensor of a file, in float32 (float64 where it is)."""

    def __init__(self, entry: Entry):
        self.entry, self.size = entry, math.prod(entry.shape)
        self.item = _SIZES.get(entry.dtype, 0)

    def __enter__(self) -> "_Reader":
        self.file = os.open(self.entry.file, os.O_RDONLY)
        return self

    def __exit__(self, *error: Any) -> None:
        os.close(self.file)

    def raw(self, at: int, count: int) -> bytes:
        return os.pread(self.file, count * self.item, self.entry.start + at * self.item)

    def floats(self, at: int, count: int) -> np.ndarray:
        found = np.frombuffer(self.raw(at, count), _NUMPY[self.entry.dtype])
        return found if found.dtype in (np.float32, np.float64) else found.astype(np.float32)

    def pieces(self) -> Iterator[tuple[int, int]]:
        for at in range(0, self.size, PIECE):
            yield at, min(PIECE, self.size - at)


def _merge_tensor(
    recipe: Recipe, name: str, numbers: _Numbers, readers: Mapping[Path, _Reader], place: _Place, seed: int
) -> None:
    first = readers[recipe.base or recipe.models[0].folder]
    output = os.open(place.file, os.O_WRONLY)
    try:
        if place.dtype not in FLOATS:  # numbers that are not merged: as the base has them
            for at, count in first.pieces():
                os.pwrite(output, first.raw(at, count), place.start + at * first.item)
            return
        merged = _merger(recipe, name, numbers, readers, seed)
        kind, item = _NUMPY[place.dtype], _SIZES[place.dtype]
        for at, count in first.pieces():
            y = merged(at, count)
            if not np.isfinite(y).all():
                who = [f.name for f, r in readers.items() if not np.isfinite(r.floats(at, count)).all()]
                raise MergeInputError(f"{name} is not finite in {', '.join(who) or 'the merge alone'}: leave that out")
            os.pwrite(output, y.astype(kind, copy=False).tobytes(), place.start + at * item)
    finally:
        os.close(output)


def _merger(
    recipe: Recipe, name: str, numbers: _Numbers, readers: Mapping[Path, _Reader], seed: int
) -> Callable[[int, int], np.ndarray]:
    """`(first entry, how many) -> merged`, called in order."""
    models = [readers[m.folder] for m in recipe.models]
    if recipe.method == "linear":
        total = sum(numbers.weight) if numbers.normalize else 1.0

        def linear(at: int, count: int) -> np.ndarray:
            y = np.zeros(count, np.float32)
            for w, model in zip(numbers.weight, models):
                y = y + np.float32(w / total) * model.floats(at, count)
            return y

        return linear
    base = readers[recipe.base]  # pyright: ignore[reportArgumentType]
    if recipe.method == "slerp":
        a, b = _slerp_weights(base, models[0], numbers.t)
        return lambda at, count: np.float32(a) * base.floats(at, count) + np.float32(b) * models[0].floats(at, count)
    choose = [_chooser(recipe, m, name, numbers, i, base, readers[m.folder], seed) for i, m in enumerate(recipe.models)]
    elects = recipe.method.endswith("ties")

    def arithmetic(at: int, count: int) -> np.ndarray:
        theta = base.floats(at, count)
        taus = []
        for w, model, own in zip(numbers.weight, models, choose):
            tau = model.floats(at, count) - theta
            own(tau, at)
            tau *= np.float32(w)
            taus.append(tau)
        if not taus:
            return theta
        if elects:
            return theta + np.float32(numbers.scale) * _elected(taus, numbers)
        total = sum(taus[1:], taus[0])
        weight = sum(numbers.weight)
        if numbers.normalize and abs(weight) >= 1e-8:
            total = total / np.float32(weight)
        return theta + np.float32(numbers.scale) * total

    return arithmetic


def _elected(taus: list[np.ndarray], numbers: _Numbers) -> np.ndarray:
    """The sum, or the mean by weights, of what has the sign of the sum."""
    # No masked writes: they branch at every entry, and take most of a merge's time.
    sign = taus[0].copy()
    for tau in taus[1:]:
        sign += tau
    np.sign(sign, out=sign)
    total, weight = np.zeros_like(sign), np.zeros_like(sign)
    for w, tau in zip(numbers.weight, taus):
        agreeing = np.maximum(tau * sign, 0)
        total += agreeing
        if numbers.normalize:
            weight += (agreeing > 0) * np.float32(w)
    if numbers.normalize:
        total /= weight + (weight == 0)
    return total * sign


def _chooser(
    recipe: Recipe, source: Source, name: str, numbers: _Numbers, i: int, base: _Reader, model: _Reader, seed: int
) -> Callable[[np.ndarray, int], None]:
    """`(tau, first entry) -> None` zeroes what goes, in place; pieces come in order."""
    if not numbers.density or (density := numbers.density[i]) >= 1:
        return lambda tau, at: None
    gain = np.float32(1 / density if numbers.rescale and density > 0 else 1)
    if recipe.method.startswith("dare"):
        key = hashlib.sha256(f"{seed} {name} {source.folder.name} {i}".encode()).digest()
        draws = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))

        def drop(tau: np.ndarray, at: int) -> None:
            tau *= (draws.random(tau.size, np.float32) < density) * gain

        return drop
    n = model.size
    keep = max(1, int(density * n)) if density > 0 and n and not numbers.gamma else int(density * n)
    top = min(int(numbers.gamma[i] * n), n - keep) if numbers.gamma else 0
    below, above = _cuts(base, model, top + keep, top)

    def cut(tau: np.ndarray, at: int) -> None:
        size = np.abs(tau)
        stays = below.within(size) & ~above.within(size) if top else below.within(size)
        tau *= stays * gain

    return cut


class _Cut:
    """Which entries are among the k largest in magnitude; of equal ones the first."""

    def __init__(self, k: int, size: int, sizes: np.ndarray | None):
        self.k, self.size = k, size
        if sizes is not None and 0 < k < size:
            self.least, self.equal = _least_of(sizes, k)

    def within(self, sizes: np.ndarray) -> np.ndarray:
        """Of the tensor's next entries."""
        if not 0 < self.k < self.size:
            return np.full(sizes.shape, self.k > 0)
        inside = sizes >= self.least
        same = np.flatnonzero(sizes == self.least)
        inside[same[self.equal :]] = False
        self.equal -= min(self.equal, same.size)
        return inside


def _cuts(base: _Reader, model: _Reader, *counts: int) -> list[_Cut]:
    """A cut of |model - base| for each count, from one walk through it."""
    if not any(0 < k < model.size for k in counts):
        return [_Cut(k, model.size, None) for k in counts]
    sizes = np.empty(model.size, np.float32)
    for at, count in model.pieces():
        part = sizes[at : at + count]
        np.abs(np.subtract(model.floats(at, count), base.floats(at, count), out=part, casting="same_kind"), out=part)
    return [_Cut(k, model.size, sizes) for k in counts]


def _least_of(sizes: np.ndarray, k: int) -> tuple[np.float32, int]:
    """The k-th largest, and how many that equal it are among the k largest.

    A sample tells nearly where it is: what is surely larger is counted, and only what is near is sorted.
    """
    n = sizes.size
    step = max(1, n // 65536)
    sample = np.sort(sizes[::step])
    at, slack = sample.size * (1 - k / n), 4 * math.sqrt(sample.size * (k / n) * (1 - k / n)) + 2
    low = sample[max(0, math.floor(at - slack))] if at - slack >= 0 else np.float32(0)
    high = sample[math.ceil(at + slack)] if at + slack < sample.size else np.float32(np.inf)
    above, near = 0, []
    for start in range(0, n, PIECE):
        part = sizes[start : start + PIECE]
        over = part > high
        above += int(np.count_nonzero(over))
        near.append(part[(part >= low) ^ over])
    middle = np.concatenate(near)
    if not above < k <= above + middle.size:  # the sample misled: entries come in an order of their own
        middle, above = sizes, 0
    rank = middle.size - (k - above)
    middle = np.partition(middle, rank)
    least = middle[rank]
    return least, k - above - int(np.count_nonzero(middle[rank:] > least))


def _slerp_weights(base: _Reader, other: _Reader, t: float) -> tuple[float, float]:
    """sin((1 - t) angle) / sin(angle) and sin(t angle) / sin(angle); the line's where the two nearly point one way."""
    dot = norm_a = norm_b = 0.0
    for at, count in base.pieces():
        a, b = base.floats(at, count).astype(np.float64), other.floats(at, count).astype(np.float64)
        dot, norm_a, norm_b = dot + float(a @ b), norm_a + float(a @ a), norm_b + float(b @ b)
    length = math.sqrt(norm_a * norm_b)
    cosine = max(-1.0, min(1.0, dot / length)) if length > 0 else 1.0
    if abs(cosine) > 0.9995:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
