"""One call per data set: texts or images with labels, in three splits that never change.

    data = jaxpeft.data.load("r8")
    data.train.inputs, data.train.labels        # 4,937 texts and their classes
    data.validation, data.test                  # 548 and 2,189

The validation part is held out of train once, stratified, by a seed of its own: runs with other training seeds see the
same validation examples, so nothing is ever chosen on the test part or on examples that another run trained on.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from jaxpeft.data import _raw, own
from jaxpeft.data._files import cache_dir, locked, offline
from jaxpeft.data._order import held_out, order
from jaxpeft.data.assets import fetch
from jaxpeft.data.splits import DatasetError, Kind, Split

__all__ = ["NAMES", "TEXTS", "Dataset", "DatasetError", "Split", "TextSet", "load", "load_text", "subsample"]

NAMES = ("r8", "r52", "20ng", "digits", "mnist-5k", "fashion-mnist")
"""The built-in labelled sets; `jaxpeft.data.builders` tells what each is."""

TEXTS = ("friends-transcripts", "book-excerpts")
"""The built-in sets of running text, for language modelling."""

_TEST_SHARE = 0.2  # of a user's own examples when no test file is given


@dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled data set.

    Attributes:
      name: what `load` was asked for.
      kind: "text" or "image".
      train, validation, test: the splits; validation has no examples with `validation=0`.
      labels: the classes' names; a label is an index into it.
      pixel_max: the value of a white pixel (255; 16 for `digits`); 0 for texts.
      dropped: how many empty texts `drop_empty` removed, per split.
    """

    name: str
    kind: Kind
    train: Split
    validation: Split
    test: Split
    labels: tuple[str, ...]
    pixel_max: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.labels)

    @property
    def splits(self) -> dict[str, Split]:
        """The three splits by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def counts(self) -> dict[str, int]:
        """How many examples each split has."""
        return {name: len(split) for name, split in self.splits.items()}

    def class_counts(self, split: str = "train") -> Int[np.ndarray, "classes"]:
        """How many examples of each class `split` has."""
        return np.bincount(self.splits[split].labels, minlength=self.num_classes)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {count:,}" for name, count in self.counts.items())
        return f"Dataset({self.name!r}, {self.kind}, {self.num_classes} classes, {sizes})"


@dataclass(frozen=True)
class TextSet:
    """Texts without labels, in three fixed splits.

    Attributes:
      name: what `load_text` was asked for.
      train, validation, test: whole documents; none has parts in two splits.
    """

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def load(
    name: str | Path,
    *,
    validation: float | int = 0.1,
    seed: int = 0,
    drop_empty: bool = False,
    keys: tuple[str, str] | None = None,
) -> Dataset:
    """Loads a data set; fetches and prepares it in the cache the first time.

    Args:
      name: one of `NAMES`; any tensorflow-datasets name ("mnist", "glue/sst2"); or the path of the user's own examples, see
        `jaxpeft.data.own`: texts in `.tsv`, `.csv` or `.jsonl`, pictures in `.npz` or in a folder for each class; one file or
        folder, or one of each split. Without a test split 20 % are held out (stratified, seed 0).
      validation: what is held out of train, as a share in [0, 1) or a count (an int, 1 and more); ignored where the
        source has a validation split of its own.
      seed: chooses the validation examples, and nothing else. Keep it when the training seed changes.
      drop_empty: removes texts of nothing but white space (and counts them in `dropped`) instead of refusing them.
      keys: the names of the input and the label feature, for a tensorflow-datasets set that does not declare them.

    Returns:
      The data set. Arrays are read-only.

    Raises:
      DatasetError: unknown name (near names are told), wrong counts, empty text, labels out of range, a single class,
        a held-out part that would empty a class.
      AssetError: the source cannot be fetched.

    Example:
      >>> load("digits").counts
      {'train': 1293, 'validation': 144, 'test': 360}
    """
    text = str(name)
    if text in NAMES:
        splits, labels, kind, pixel_max = _built_in(text)
    elif own.is_own(name):
        splits, labels, kind, pixel_max = own.read(Path(text).expanduser())
    else:
        splits, labels, kind, pixel_max = _from_tfds(text, keys)

    dropped: dict[str, int] = {}
    for split, part in splits.items():
        _check_labels(text, split, part, labels)
        splits[split], removed = _without_empty(text, split, part, drop_empty)
        if removed:
            dropped[split] = removed
    if len(labels) < 2 or len(np.unique(splits["train"].labels)) < 2:
        raise DatasetError(f"{text}: the train split has a single class; there is nothing to tell apart")
    if "test" not in splits:
        splits["train"], splits["test"] = _hold_out(text, splits["train"], _TEST_SHARE, 0)
    if "validation" not in splits:
        splits["train"], splits["validation"] = _hold_out(text, splits["train"], validation, seed)
    for part in splits.values():
        for array in (part.inputs, part.labels):
            if isinstance(array, np.ndarray):
                array.setflags(write=False)
    return Dataset(text, kind, splits["train"], splits["validation"], splits["test"], labels, pixel_max, dropped)


def load_text(name: str) -> TextSet:
    """Loads running text for language modelling, split 80/10/10 by whole documents (fixed, seed 0).

    Args:
      name: `friends-transcripts` (227 episodes of dialogue, a line "Speaker: words" each, about 4 million letters) or
        `book-excerpts` (140 texts from books for children and adults, half each in every split).

    Returns:
      The texts.

    Raises:
      DatasetError: an unknown name.
      AssetError: the source cannot be fetched.
    """
    if name not in TEXTS:
        raise DatasetError(f"no text set is named {name!r}; there are {', '.join(TEXTS)}{own.near(name, TEXTS)}")
    documents: list[str] = []
    groups: list[str] = []
    if name == "friends-transcripts":
        rows = _raw.tab_rows(fetch("orange-text") / "friends-transcripts.tab")
        for _, episode in itertools.groupby(rows, key=lambda row: row["Season & Episode"]):
            # The source has no-break spaces and runs of blanks from its web pages.
            lines = ((_plain(row["Author"]), _plain(row["Quote"])) for row in episode)
            documents.append("\n".join(f"{speaker}: {words}" for speaker, words in lines if words))
            groups.append("")
    else:
        for row in _raw.tab_rows(fetch("orange-text") / "book-excerpts.tab"):
            documents.append(row["Text"].strip())
            groups.append(row["Category"])
    everything = Split(tuple(documents), np.unique(groups, return_inverse=True)[1].astype(np.int32))
    count = len(everything) // 10
    rest, test = _hold_out(name, everything, count, 0)
    train, held = _hold_out(name, rest, count, 0)
    return TextSet(name, tuple(train.inputs), tuple(held.inputs), tuple(test.inputs))


def subsample(dataset: Dataset, *, per_class: int, seed: int, short: Literal["error", "keep"] = "error") -> Dataset:
    """The same set with `per_class` training examples of each class, for low-data budgets.

    Budgets nest: with one seed, a smaller one's examples are among a larger one's. Validation and test stay.

    Args:
      dataset: the whole set.
      per_class: examples of each class, 1 or more.
      seed: chooses them.
      short: what to do with a class that has fewer: refuse, or keep all it has.

    Returns:
      A new data set.

    Raises:
      DatasetError: `per_class` under 1, or a class with too few examples.
    """
    if per_class < 1:
        raise DatasetError(f"per_class is {per_class}; it must be 1 or more")
    if short not in ("error", "keep"):
        raise DatasetError(f"short is {short!r}; it must be 'error' or 'keep'")
    labels = dataset.train.labels
    counts = dataset.class_counts()
    if short == "error" and (counts < per_class).any():
        rare = ", ".join(f"{dataset.labels[i]} ({counts[i]})" for i in np.flatnonzero(counts < per_class)[:5])
        raise DatasetError(
            f"{dataset.name}: {int((counts < per_class).sum())} classes have fewer than {per_class} training examples: "
            f"{rare}; take fewer, or short='keep'"
        )
    shuffled = order(len(labels), seed)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return replace(dataset, train=dataset.train.take(np.sort(by_class[rank < per_class])))


def _plain(text: str) -> str:
    return " ".join(text.split())


# --- sources ---------------------------------------------------------------------------------------------------------

_Source = tuple[dict[str, Split], tuple[str, ...], Kind, int]


def _built_in(name: str) -> _Source:
    from jaxpeft.data.builders import BUILDERS

    cls = BUILDERS[name]
    with _quiet():
        builder = _prepared(lambda: cls(data_dir=str(cache_dir() / "tfds"), file_format="array_record"), name)
        try:
            splits = {split: _read(builder, split, cls.KIND, "label", cls.KIND) for split in cls.COUNTS}
        except Exception as error:  # whatever the reader of a damaged file raises
            raise DatasetError(
                f"{name}: {builder.data_dir} cannot be read ({error}); remove that folder and load again"
            ) from error
    found = {split: len(part) for split, part in splits.items()}
    if found != cls.COUNTS:
        raise DatasetError(
            f"{name}: {builder.data_dir} holds {found}, expected {cls.COUNTS}; remove that folder and load again"
        )
    return splits, cls.LABELS, cls.KIND, {"text": 0, "image": 16 if name == "digits" else 255}[cls.KIND]


def _from_tfds(name: str, keys: tuple[str, str] | None) -> _Source:
    import tensorflow_datasets as tfds

    config = name.partition(":")[0].partition("/")[0]
    if not re.fullmatch(r"[a-z0-9_]+", config):
        raise _unknown(name)

    def make() -> Any:
        return tfds.builder(name, data_dir=str(cache_dir() / "tfds"), file_format="array_record", try_gcs=False)

    with _quiet():
        try:
            make()
        except tfds.core.DatasetNotFoundError as error:
            raise _unknown(name) from error
        except ImportError as error:
            raise DatasetError(f"{name}: its tensorflow-datasets builder needs {error.name or error}") from error
        except (ValueError, RuntimeError) as error:  # an unknown config or version
            raise DatasetError(f"{name}: {error}") from error
    builder = _prepared(make, name)
    features: Any = builder.info.features
    content, label = _guess(name, builder, keys)
    if not isinstance(features[label], tfds.features.ClassLabel):
        raise DatasetError(f"{name}: the feature {label!r} is {features[label]}, not a class label")
    if isinstance(features[content], tfds.features.Text):
        kind: Kind = "text"
    elif isinstance(features[content], tfds.features.Image):
        kind = "image"
    else:
        raise DatasetError(f"{name}: the feature {content!r} is {features[content]}, neither text nor an image")
    if "train" not in builder.info.splits:
        raise DatasetError(f"{name}: there is no train split, only {', '.join(builder.info.splits)}")
    with _quiet():
        splits = {
            split: _read(builder, split, content, label, kind)
            for split in ("train", "validation", "test")
            if split in builder.info.splits
        }
    if "test" in splits and (splits["test"].labels < 0).all():
        del splits["test"]  # a contest's hidden labels (all -1) can score nothing: hold out a part as for own files
    return splits, tuple(features[label].names), kind, 0 if kind == "text" else 255


def _guess(name: str, builder: Any, keys: tuple[str, str] | None) -> tuple[str, str]:
    features = builder.info.features
    chosen = keys or builder.info.supervised_keys
    if chosen is None:
        content = next((key for key in ("text", "sentence", "image") if key in features), None)
        chosen = (content, "label") if content else None
    if chosen is None or len(chosen) != 2 or any(not isinstance(key, str) or key not in features for key in chosen):
        raise DatasetError(
            f"{name}: which features are the input and the label? Say keys=(input, label); "
            f"there are {', '.join(sorted(features))}"
        )
    return chosen[0], chosen[1]


def _prepared(make: Callable[[], Any], name: str) -> Any:
    """The builder of a set that is prepared; one process does it, others wait."""
    import tensorflow_datasets as tfds

    with _quiet():
        builder = make()
    if builder.is_prepared():
        return builder
    built_in = name in NAMES
    if offline() and not built_in:
        raise DatasetError(
            f"{name} is not prepared in {builder.data_dir} and JAXPEFT_OFFLINE forbids fetching it; copy a prepared "
            "folder there"
        )
    with locked("tfds-" + re.sub(r"\W+", "-", name)):
        with _quiet():
            builder = make()  # a builder reads what is prepared when it is made, and others may have prepared it since
        if builder.is_prepared():
            return builder
        # Our own sets take seconds; a foreign one may download for long, so its progress stays visible.
        with _quiet() if built_in else contextlib.nullcontext():
            try:
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False), file_format="array_record"
                )
            except Exception as error:  # a foreign builder may fail in any way: no network, TensorFlow missing, ...
                if built_in:
                    raise
                raise DatasetError(f"{name}: tensorflow-datasets cannot prepare it: {error}") from error
    return builder


def _read(builder: Any, split: str, content: str, label: str, kind: Kind) -> Split:
    try:
        source = builder.as_data_source(split=split)
    except NotImplementedError as error:  # prepared elsewhere, as TFRecord
        raise DatasetError(f"{builder.name}: {error}; remove {builder.data_dir} and load again") from error
    rows = source.__getitems__(list(range(len(source)))) if len(source) else []
    labels = np.fromiter((int(row[label]) for row in rows), np.int32, len(rows))
    if kind == "text":
        return Split(
            tuple(row[content].decode() if isinstance(row[content], bytes) else row[content] for row in rows), labels
        )
    shapes = {row[content].shape for row in rows}
    if len(shapes) > 1:
        raise DatasetError(
            f"{builder.name}: images of {split} differ in shape ({len(shapes)} shapes, e.g. {sorted(shapes)[:3]}); "
            "only sets of one shape are loaded whole"
        )
    images = np.stack([row[content] for row in rows])
    if images.dtype != np.uint8:
        raise DatasetError(f"{builder.name}: pixels are {images.dtype}; only sets of uint8 images are loaded")
    return Split(images, labels)


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_labels(name: str, split: str, part: Split, labels: tuple[str, ...]) -> None:
    wrong = np.flatnonzero((part.labels < 0) | (part.labels >= len(labels)))
    if wrong.size:
        raise DatasetError(
            f"{name}: {split} example {wrong[0]} has label {part.labels[wrong[0]]}, outside 0..{len(labels) - 1} "
            f"({wrong.size} such examples)"
        )


def _without_empty(name: str, split: str, part: Split, drop: bool) -> tuple[Split, int]:
    if isinstance(part.inputs, np.ndarray):
        return part, 0
    empty = [index for index, text in enumerate(part.inputs) if not text.strip()]
    if not empty:
        return part, 0
    if not drop:
        raise DatasetError(
            f"{name}: {split} example {empty[0]} is empty ({len(empty)} such texts); load with drop_empty=True to "
            "leave them out"
        )
    return part.take(np.setdiff1d(np.arange(len(part)), empty)), len(empty)


def _hold_out(name: str, part: Split, share: float | int, seed: int) -> tuple[Split, Split]:
    """(what stays, what is held out)."""
    whole = isinstance(share, int | np.integer) and not isinstance(share, bool) and share != 0
    if not whole and not 0 <= share < 1:
        raise DatasetError(f"validation is {share}; it must be a share in [0, 1) or a count as an int")
    count = int(share) if whole else round(share * len(part))
    try:
        chosen = held_out(part.labels, count, seed)
    except ValueError as error:
        raise DatasetError(f"{name}: {error}") from error
    return part.take(np.setdiff1d(np.arange(len(part)), chosen)), part.take(chosen)


def _unknown(name: str) -> DatasetError:
    import tensorflow_datasets as tfds

    try:
        listed = tfds.list_builders(with_community_datasets=False)
    except Exception:  # only a hint; the error below must come through whatever tfds thinks of this machine
        listed = []
    return DatasetError(
        f"no data set is named {name!r}; built in are {', '.join(NAMES)}; else a tensorflow-datasets name, or a path "
        f"to {', '.join(own.SUFFIXES)} files or folders of pictures{own.near(name, [*NAMES, *listed])}"
    )


@contextlib.contextmanager
def _quiet():
    """Without tensorflow-datasets' notes on standard output, its progress bars, and its warning about a new folder."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils import tqdm_utils

    active = getattr(tqdm_utils, "_active", True)
    logger = logging.getLogger("absl")
    level = logger.level
    tfds.display_progress_bar(False)
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(active)
        logger.setLevel(level)
