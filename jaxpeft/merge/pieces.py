"""Merging one tensor of several files, a piece at a time: what `streaming` does with each.

Definitions are those of this room's functions with axis="leaf", which work on stacked trees, differentiate and vmap; this is
their form for files, in NumPy. One departs: of votes that cancel `ties` asks the majority of the whole model, which nobody
holds here; such an entry stays the base's. Departures from mergekit 0.1.5, each with a test: that one (there it goes to the
positive votes); `rescale` is division by the density, as DARE defines it (there sums of magnitudes are matched); random
drops are of other generators; sums are float32 whatever `dtype` says.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.merge.recipe import Numbers, Recipe, Source
from jaxpeft.models.folder import Entry

__all__ = ["NUMPY", "SIZES", "Reader", "merger"]

PIECE = 2**16  # entries that are merged at a time: those of a few models stay in a core's cache
NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.dtype(jnp.bfloat16)}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
SIZES |= {"U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


class Reader:
    """Pieces of one tensor of a file, in float32 (float64 where it is)."""

    def __init__(self, entry: Entry):
        self.entry, self.size = entry, math.prod(entry.shape)
        self.item = SIZES.get(entry.dtype, 0)

    def __enter__(self) -> "Reader":
        self.file = os.open(self.entry.file, os.O_RDONLY)
        return self

    def __exit__(self, *error: Any) -> None:
        os.close(self.file)

    def raw(self, at: int, count: int) -> bytes:
        return os.pread(self.file, count * self.item, self.entry.start + at * self.item)

    def floats(self, at: int, count: int) -> np.ndarray:
        found = np.frombuffer(self.raw(at, count), NUMPY[self.entry.dtype])
        return found if found.dtype in (np.float32, np.float64) else found.astype(np.float32)

    def pieces(self) -> Iterator[tuple[int, int]]:
        for at in range(0, self.size, PIECE):
            yield at, min(PIECE, self.size - at)


def merger(
    recipe: Recipe, name: str, numbers: Numbers, readers: Mapping[Path, Reader], seed: int
) -> Callable[[int, int], np.ndarray]:
    """`(first entry, how many) -> merged`, called in order."""
    models = [readers[m.folder] for m in recipe.models]
    if recipe.rule.kind == "mean":
        total = sum(numbers.weight) if numbers.normalize else 1.0

        def mean(at: int, count: int) -> np.ndarray:
            y = np.zeros(count, np.float32)
            for w, model in zip(numbers.weight, models):
                y = y + np.float32(w / total) * model.floats(at, count)
            return y

        return mean
    base = readers[recipe.base]  # pyright: ignore[reportArgumentType]
    if recipe.rule.kind == "sphere":
        a, b = _slerp_weights(base, models[0], numbers.t)
        return lambda at, count: np.float32(a) * base.floats(at, count) + np.float32(b) * models[0].floats(at, count)
    choose = [_chooser(recipe, m, name, numbers, i, base, readers[m.folder], seed) for i, m in enumerate(recipe.models)]

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
        if recipe.rule.elects:
            return theta + np.float32(numbers.scale) * _elected(taus, numbers)
        total = sum(taus[1:], taus[0])
        weight = sum(numbers.weight)
        if numbers.normalize and abs(weight) >= 1e-8:
            total = total / np.float32(weight)
        return theta + np.float32(numbers.scale) * total

    return arithmetic


def _elected(taus: list[np.ndarray], numbers: Numbers) -> np.ndarray:
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
    recipe: Recipe, source: Source, name: str, numbers: Numbers, i: int, base: Reader, model: Reader, seed: int
) -> Callable[[np.ndarray, int], None]:
    """`(tau, first entry) -> None` zeroes what goes, in place; pieces come in order."""
    if not numbers.density or (density := numbers.density[i]) >= 1:
        return lambda tau, at: None
    gain = np.float32(1 / density if numbers.rescale and density > 0 else 1)
    if recipe.rule.keeps == "random":
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


def _cuts(base: Reader, model: Reader, *counts: int) -> list[_Cut]:
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
    first, last = math.floor(at - slack), math.ceil(at + slack)
    low = sample[first] if first >= 0 else np.float32(0)
    high = sample[last] if last < sample.size else np.float32(np.inf)
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


def _slerp_weights(base: Reader, other: Reader, t: float) -> tuple[float, float]:
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
