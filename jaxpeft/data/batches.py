"""Batches as a pure function of (seed, position): resumable anywhere, the same on every process, few shapes.

The one integer to checkpoint is the position: the number of batches taken since the start of training.

    batches = text_batches(tokens, labels, batch_size=32, seed=1)
    for position, batch in enumerate(batches.at(resumed), start=resumed):
        ...                                                   # then save position + 1

**Order.** In each epoch the examples get random numbers from (seed, epoch), are sorted by (bucket, random number), cut
into batches, and the batches are shuffled. So a batch holds examples of one bucket, except where two buckets meet; the
padded lengths come from a short fixed list, so a train step compiles a few times; there is one incomplete batch an
epoch, not one a bucket; and every epoch has the same number of steps, so a position splits into epoch and step by
division.

**Shards.** A global batch is cut into `process_count` equal runs of rows. Every process computes the same global order,
hence the same padded length, with no communication. Averages over a batch must divide by the sum of `weight` over all
processes.

Letters: b rows of this process, t the bucket's length, n examples.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32, Int, Int32, Shaped, UInt8

from jaxpeft.data._order import order
from jaxpeft.data.tokens import Ragged

__all__ = ["BUCKETS", "Batches", "ImageBatch", "TextBatch", "image_batches", "restore_order", "text_batches"]

BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512)
"""Padded lengths unless told otherwise; those past the longest example's are never used, so never compiled."""


class TextBatch(NamedTuple):
    """Token rows. Padding rows hold one visible padding token, so that no softmax is over nothing, and weigh 0.

    Attributes:
      input_ids: (b, t) int32.
      attention_mask: (b, t) int32, 1 where a token is.
      label: (b,) int32; 0 in padding rows.
      weight: (b,) float32, 1 for an example, 0 for padding.
      index: (b,) int32, which example the row is; -1 for padding.
      task: () or (b,) int32, where there are several tasks (`data.mixture`).
    """

    input_ids: Int32[np.ndarray, "b t"]
    attention_mask: Int32[np.ndarray, "b t"]
    label: Int32[np.ndarray, "b"]
    weight: Float32[np.ndarray, "b"]
    index: Int32[np.ndarray, "b"]
    task: Int32[np.ndarray, "*b"] | None = None


class ImageBatch(NamedTuple):
    """Images. Padding rows are black and weigh 0.

    Attributes:
      image: (b, h, w, c) float32 in [0, 1].
      label: (b,) int32; 0 in padding rows.
      weight: (b,) float32, 1 for an example, 0 for padding.
      index: (b,) int32, which example the row is; -1 for padding.
      task: () or (b,) int32, where there are several tasks (`data.mixture`).
    """

    image: Float32[np.ndarray, "b h w c"]
    label: Int32[np.ndarray, "b"]
    weight: Float32[np.ndarray, "b"]
    index: Int32[np.ndarray, "b"]
    task: Int32[np.ndarray, "*b"] | None = None


B = TypeVar("B", TextBatch, ImageBatch)


class Batches(Generic[B]):
    """All batches of all epochs. Made by `text_batches` and `image_batches`.

    `len(batches)` is the steps of an epoch, `batches.at(position)` an endless iterator from there,
    `batches.batch(position)` one of them, `batches.epoch(number)` those of one epoch.
    """

    def __init__(
        self,
        gather: Callable[[Int[np.ndarray, "b"], int], B],
        buckets: Int[np.ndarray, "n"],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        last: Literal["pad", "drop"],
        process_index: int,
        process_count: int,
        sort_by: Int[np.ndarray, "n"] | None = None,
    ):
        """Args:
        gather: (indices (b,) with -1 for padding rows, padded length) to a batch.
        buckets: (n,) the padded length of each example.
        batch_size: rows of a global batch, over all processes.
        seed, shuffle, last, process_index, process_count: as in `text_batches`.
        sort_by: (n,) the order without shuffling is by this, then by index.
        """
        count = len(buckets)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        if count == 0:
            raise ValueError("there are no examples to make batches of")
        if process_count < 1 or not 0 <= process_index < process_count:
            raise ValueError(f"process {process_index} of {process_count} does not exist")
        if batch_size % process_count:
            raise ValueError(f"batch_size {batch_size} does not divide among {process_count} processes")
        if last not in ("pad", "drop"):
            raise ValueError(f"last is {last!r}; it must be 'pad' or 'drop'")
        if last == "drop" and count < batch_size:
            raise ValueError(f"{count} examples do not fill one batch of {batch_size}, and last='drop' leaves none")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be 0 or more")
        self.batch_size, self.seed, self.shuffle, self.last = batch_size, seed, shuffle, last
        self.process_index, self.process_count, self.num_examples = process_index, process_count, count
        self._gather, self._buckets = gather, np.asarray(buckets)
        self._sort_by = np.zeros(count, np.int64) if sort_by is None else np.asarray(sort_by)
        # Two: at the turn of an epoch, whoever looks back one batch does not sort again.
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)

    def __len__(self) -> int:
        """Steps in an epoch, every epoch the same."""
        whole, rest = divmod(self.num_examples, self.batch_size)
        return whole + (rest > 0 and self.last == "pad")

    @property
    def local_batch_size(self) -> int:
        """Rows of this process in each batch."""
        return self.batch_size // self.process_count

    def batch(self, position: int) -> B:
        """The batch at `position` (0, 1, 2, ... through all epochs).

        Raises:
          ValueError: a negative position.
        """
        if position < 0:
            raise ValueError(f"position is {position}; it counts batches from 0")
        epoch, step = divmod(int(position), len(self))
        rows = self._plan(epoch if self.shuffle else 0)[step]
        length = int(self._buckets[rows[rows >= 0]].max())
        size = self.local_batch_size
        return self._gather(rows[self.process_index * size : (self.process_index + 1) * size], length)

    def at(self, position: int) -> Iterator[B]:
        """Batches from `position` on, without end.

        Raises:
          ValueError: a negative position, at once.
        """
        if position < 0:
            raise ValueError(f"position is {position}; it counts batches from 0")
        return (self.batch(p) for p in itertools.count(position))

    def epoch(self, number: int = 0) -> Iterator[B]:
        """The batches of epoch `number`, from its first to its last."""
        steps = len(self)
        return (self.batch(p) for p in range(number * steps, (number + 1) * steps))

    def _make_plan(self, epoch: int) -> Int[np.ndarray, "steps batch"]:
        """Which example stands where in each global batch; -1 is padding."""
        steps, size = len(self), self.batch_size
        if not self.shuffle:
            chosen = np.lexsort((np.arange(self.num_examples), self._sort_by))
            if self.last == "drop":
                return chosen[: steps * size].reshape(steps, size)
            # The padding stands at the end, after the longest.
            return np.append(chosen, np.full(steps * size - chosen.size, -1)).reshape(steps, size)
        chosen = order(self.num_examples, self.seed, epoch, 0)
        if self.last == "drop":
            chosen = chosen[: steps * size]  # before sorting: what is left out is random, not the longest examples
        chosen = chosen[np.argsort(self._buckets[chosen], kind="stable")]
        # The padding joins the shortest bucket, where a row costs least; after the examples, as models may expect.
        padding = steps * size - chosen.size
        first = np.append(chosen[: size - padding], np.full(padding, -1))
        plan = np.append(first, chosen[size - padding :]).reshape(steps, size)
        return plan[order(steps, self.seed, epoch, 1)]


def text_batches(
    tokens: Ragged,
    labels: Int[np.ndarray, "n"] | None = None,
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    last: Literal["pad", "drop"] = "pad",
    buckets: Sequence[int] = BUCKETS,
    pad_id: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches[TextBatch]:
    """Batches of token sequences, padded to a few lengths.

    Args:
      tokens: n sequences, each of at least one token.
      labels: (n,) integers; None gives zeros.
      batch_size: rows of a global batch; a multiple of `process_count`.
      seed: of the order, 0 or more; with the epoch's number it decides everything.
      shuffle: False, for evaluation: examples by length, then by index, the same in each epoch (`restore_order`
        undoes it).
      last: "pad" fills the last batch with rows of weight 0; "drop" leaves other random examples out in each epoch.
      buckets: the padded lengths allowed.
      pad_id: fills rows.
      process_index, process_count: which slice of each global batch this process gets.

    Returns:
      Batches whose rows are `TextBatch`.

    Raises:
      ValueError: no examples, an empty sequence, a sequence over the longest bucket, labels of another number, a batch
        size that does not divide, a process that does not exist.
    """
    lengths = tokens.lengths
    label = np.zeros(len(tokens), np.int32) if labels is None else np.asarray(labels).astype(np.int32)
    _check_count(label, len(tokens))
    allowed = np.unique(np.asarray(buckets, np.int64))
    if allowed.size == 0 or allowed[0] < 1:
        raise ValueError(f"buckets are {tuple(buckets)}; they must be lengths of 1 or more")
    if len(tokens) and lengths.min() < 1:
        raise ValueError(f"sequence {int(lengths.argmin())} has no tokens")
    if len(tokens) and lengths.max() > allowed[-1]:
        raise ValueError(
            f"sequence {int(lengths.argmax())} has {lengths.max()} tokens, the longest bucket {allowed[-1]}: encode "
            "with a smaller max_length, or allow a longer bucket"
        )

    def gather(rows: Int[np.ndarray, "b"], length: int) -> TextBatch:
        real = rows >= 0
        input_ids = np.full((len(rows), length), pad_id, np.int32)
        mask = np.zeros((len(rows), length), np.int32)
        mask[:, 0] = 1
        input_ids[real], mask[real] = tokens.padded(rows[real], length, pad_id)
        return TextBatch(input_ids, mask, *_tail(rows, label))

    return Batches(
        gather,
        allowed[np.searchsorted(allowed, lengths)],
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        last=last,
        process_index=process_index,
        process_count=process_count,
        sort_by=lengths,
    )


def image_batches(
    images: UInt8[np.ndarray, "n h w c"] | Float32[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n"] | None = None,
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    last: Literal["pad", "drop"] = "pad",
    pixel_max: float = 255,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches[ImageBatch]:
    """Batches of images, scaled to [0, 1].

    Args:
      images: (n, h, w, c), values 0..`pixel_max`.
      pixel_max: `Dataset.pixel_max`; 1 for images that are scaled already.
      labels, batch_size, seed, shuffle, last, process_index, process_count: as in `text_batches`; without shuffling the
        order is by index.

    Returns:
      Batches whose rows are `ImageBatch`.

    Raises:
      ValueError: as `text_batches`; images of another rank; `pixel_max` not positive.
    """
    images = np.asarray(images)
    if images.ndim != 4:
        raise ValueError(f"images have shape {images.shape}; expected (n, height, width, channels)")
    if not pixel_max > 0:
        raise ValueError(f"pixel_max is {pixel_max}; it must be positive")
    label = np.zeros(len(images), np.int32) if labels is None else np.asarray(labels).astype(np.int32)
    _check_count(label, len(images))

    def gather(rows: Int[np.ndarray, "b"], length: int) -> ImageBatch:
        del length
        image = np.zeros((len(rows), *images.shape[1:]), np.float32)
        real = rows >= 0
        image[real] = images[rows[real]] / np.float32(pixel_max)
        return ImageBatch(image, *_tail(rows, label))

    return Batches(
        gather,
        np.ones(len(images), np.int64),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        last=last,
        process_index=process_index,
        process_count=process_count,
    )


def restore_order(
    index: Int[np.ndarray, "m"], values: Shaped[np.ndarray, "m ..."], count: int
) -> Shaped[np.ndarray, "count ..."]:
    """Rows of many batches back in the data set's order, padding left out.

    Args:
      index: (m,) the batches' `index` fields, end to end (of all processes, when there are several).
      values: (m, ...) one row each, for instance logits.
      count: the number of examples.

    Returns:
      (count, ...): row i belongs to example i.

    Raises:
      ValueError: an example is missing, comes twice, or does not exist.
    """
    index, values = np.asarray(index), np.asarray(values)
    if index.shape != values.shape[:1]:
        raise ValueError(f"{index.shape} indices for values of shape {values.shape}")
    real = index >= 0
    rows = index[real]
    if rows.size and rows.max() >= count:
        raise ValueError(f"example {rows.max()} does not exist among {count}")
    times = np.bincount(rows, minlength=count)
    if (times != 1).any():
        wrong = int(np.flatnonzero(times != 1)[0])
        raise ValueError(f"example {wrong} occurs {times[wrong]} times; each of the {count} must occur once")
    result = np.empty((count, *values.shape[1:]), values.dtype)
    result[rows] = values[real]
    return result


def _check_count(label: np.ndarray, count: int) -> None:
    if label.shape != (count,):
        raise ValueError(f"labels have shape {label.shape}; there are {count} examples")


def _tail(
    rows: Int[np.ndarray, "b"], label: Int32[np.ndarray, "n"]
) -> tuple[Int32[np.ndarray, "b"], Float32[np.ndarray, "b"], Int32[np.ndarray, "b"]]:
    """label, weight and index of the rows."""
    real = rows >= 0
    return np.where(real, label[rows], 0).astype(np.int32), real.astype(np.float32), rows.astype(np.int32)
