"""A user's own examples, texts or pictures, from files.

    texts       .tsv, .csv (columns text, label), .jsonl (fields text, label)
    pictures    .npz (arrays image (n, height, width[, channels]) uint8 and label (n,)); or a folder of .png, .jpg, .jpeg, .bmp
                for each class, named as it

One file, or a folder with a file or folder of each split: train, and if there are validation and test. A folder of folders of
pictures without "train" is one split.
"""

import csv
import difflib
import io
import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpeft.data.splits import DatasetError, Kind, Split

__all__ = ["SUFFIXES", "is_own", "near", "read"]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
SPLITS = ("train", "validation", "test")


class Examples(NamedTuple):
    """What a file holds; labels are their names."""

    inputs: Any
    labels: list[str]


def is_own(name: str | Path) -> bool:
    """Whether it says a path rather than a data set's name."""
    return isinstance(name, Path) or Path(name).expanduser().exists() or name.endswith(SUFFIXES)


def read(path: Path) -> tuple[dict[str, Split], tuple[str, ...], Kind, int]:
    """The splits there are, the classes' names (integers in their order), what the examples are, a white pixel's value.

    Raises:
      DatasetError: no such path, another kind of file, what cannot be read, a class that the train split never has, texts and
        pictures in one set, pictures of several shapes.
    """
    files = _files(path)
    parts = {split: _examples(file) for split, file in files.items()}
    kinds = {isinstance(p.inputs, np.ndarray) for p in parts.values()}
    if len(kinds) > 1:
        raise DatasetError(f"{path}: some of its splits are texts, some are pictures")
    if kinds == {True} and len({p.inputs.shape[1:] for p in parts.values()}) > 1:
        shapes = ", ".join(f"{split} {p.inputs.shape[1:]}" for split, p in parts.items())
        raise DatasetError(f"{path}: pictures of the splits differ in shape ({shapes}); bring them to one")
    known = set(parts["train"].labels)
    for split, part in parts.items():
        for number, label in enumerate(part.labels):
            if label not in known:
                raise DatasetError(
                    f"{files[split]}: example {number} has the label {label!r}, which the train split never has "
                    f"({', '.join(sorted(known)[:8])}{', ...' if len(known) > 8 else ''}){near(label, known)}"
                )
    try:
        names = sorted(known, key=int)  # "10" after "9"
    except ValueError:
        names = sorted(known)
    index = {label: i for i, label in enumerate(names)}
    splits = {s: Split(p.inputs, np.array([index[x] for x in p.labels], np.int32)) for s, p in parts.items()}
    pictures = kinds == {True}
    return splits, tuple(names), "image" if pictures else "text", 255 if pictures else 0


def near(name: str, names: Iterable[str]) -> str:
    """A hint at what may have been meant."""
    close = difflib.get_close_matches(name.lower(), list(names), n=3, cutoff=0.5)
    return f"; near: {', '.join(close)}" if close else ""


def _files(path: Path) -> dict[str, Path]:
    """The file or folder of each split."""
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise DatasetError(f"there is no file or folder {path}")
    files: dict[str, Path] = {}
    for split in SPLITS:
        found = [path / (split + end) for end in _READERS if (path / (split + end)).is_file()]
        found += [path / split] if (path / split).is_dir() else []
        if len(found) > 1:
            raise DatasetError(f"{path}: which of {', '.join(f.name for f in found)} is the {split} split?")
        if found:
            files[split] = found[0]
    if "train" in files:
        return files
    if files or not _classes(path):
        raise DatasetError(
            f"{path} has no {', '.join('train' + end for end in _READERS)} and no folder train with a folder of pictures "
            "for each class"
        )
    return {"train": path}


def _examples(path: Path) -> Examples:
    if path.is_dir():
        return _folder(path)
    if path.suffix not in _READERS:
        raise DatasetError(f"{path}: files are {', '.join(_READERS)}")
    found = _READERS[path.suffix](path)
    if not len(found.labels):
        raise DatasetError(f"{path} has no examples")
    return found


# ------------------------------------------------------------------------------------------------------------------- texts


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error


def _told(rows: list[tuple[str, str]]) -> Examples:
    return Examples(tuple(text for text, _ in rows), [label for _, label in rows])


def _table(delimiter: str) -> Callable[[Path], Examples]:
    def read(path: Path) -> Examples:
        reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=delimiter)
        missing = {"text", "label"} - set(reader.fieldnames or ())
        if missing:
            raise DatasetError(
                f"{path}: no column {' and no column '.join(sorted(missing))}; its header is {reader.fieldnames}"
            )
        rows = []
        for row in reader:
            if row["text"] is None or not row["label"]:
                raise DatasetError(f"{path}, line {reader.line_num}: a text or label is missing")
            rows.append((row["text"], row["label"].strip()))
        return _told(rows)

    return read


def _json_lines(path: Path) -> Examples:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, label = row["text"], row["label"]
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{path}, line {number}: not an object with text and label ({error!r})") from error
        if not isinstance(text, str) or not isinstance(label, str | int):
            raise DatasetError(f"{path}, line {number}: text must be a string, label a string or an integer")
        rows.append((text, str(label).strip()))
    return _told(rows)


# ---------------------------------------------------------------------------------------------------------------- pictures


def _arrays(path: Path) -> Examples:
    try:
        with np.load(path, allow_pickle=False) as held:
            image, label = held["image"], held["label"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path}: no arrays image and label that can be read ({error})") from error
    image = image[..., None] if image.ndim == 3 else image
    if image.ndim != 4 or image.dtype != np.uint8 or label.shape != image.shape[:1]:
        raise DatasetError(
            f"{path}: image {image.dtype}{list(image.shape)}, label {list(label.shape)}; expected uint8 pictures "
            "(n, height, width[, channels]) and (n,)"
        )
    return Examples(image, [str(x) for x in label.tolist()])


def _classes(path: Path) -> list[Path]:
    """Its folders with pictures in them."""
    return sorted(f for f in path.iterdir() if f.is_dir() and any(p.suffix.lower() in PICTURES for p in f.iterdir()))


def _folder(path: Path) -> Examples:
    from PIL import Image, UnidentifiedImageError

    images, labels = [], []
    for folder in _classes(path):
        for file in sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES):
            try:
                with Image.open(file) as image:
                    images.append(np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB")))
            except (OSError, UnidentifiedImageError) as error:
                raise DatasetError(f"{file} cannot be read: {error}") from error
            labels.append(folder.name)
    if not images:
        raise DatasetError(f"{path} has no folder with pictures ({', '.join(PICTURES)})")
    coloured = any(x.ndim == 3 for x in images)
    images = [x[..., None] if x.ndim == 2 else x for x in images]
    images = [np.repeat(x, 3, -1) if coloured and x.shape[-1] == 1 else x for x in images]
    if len(shapes := sorted({x.shape for x in images})) > 1:
        raise DatasetError(f"{path}: pictures differ in shape ({len(shapes)} shapes, {shapes[:3]}); bring them to one")
    return Examples(np.stack(images), labels)


_READERS: dict[str, Callable[[Path], Examples]] = {
    ".tsv": _table("\t"),
    ".csv": _table(","),
    ".jsonl": _json_lines,
    ".npz": _arrays,
}
SUFFIXES = tuple(_READERS)
