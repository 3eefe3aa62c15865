"""Batches of several tasks: one after another at random, or together in each batch.

    several = mixture([digits, fashion], temperature=2.0, seed=1)      # each batch of one task
    several = together([digits, fashion])                              # each batch holds rows of both

Both are pure functions of (seed, position), as the batches they are made of (`data.batches`). Every batch says its task
in the field `task`: a number for the whole batch, or one for each row.

**Temperature.** Task t comes up with probability p_t ~ n_t^(1/T), n_t its number of examples: T = 1 is proportional to the
sizes, a large T is even. An epoch has as many steps as its parts together; each part gets its share of them exactly
(largest remainders), in a random order. A part that gets more steps than it has begins its next epoch.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxpeft.data._order import order
from jaxpeft.data.batches import Batches, TextBatch

__all__ = ["Mixture", "mixture", "of_task", "shares", "together"]


class Mixture:
    """All batches of all epochs, with the face of `Batches`: `len`, `batch`, `at`, `epoch`.

    Attributes:
      parts: the tasks' own batches, each with its task's number in the field `task`: to evaluate by task.
      batch_size, process_count: as in `Batches`.
      num_examples: of all parts together.
    """

    def __init__(self, parts: Sequence[Any], steps: int, make: Callable[[int], Any], batch_size: int):
        self.parts, self._steps, self._make, self.batch_size = tuple(parts), steps, make, batch_size
        self.process_count = parts[0].process_count
        self.num_examples = sum(p.num_examples for p in parts)

    def __len__(self) -> int:
        """Steps in an epoch."""
        return self._steps

    def batch(self, position: int) -> Any:
        """The batch at `position` (0, 1, 2, ... through all epochs).

        Raises:
          ValueError: a negative position.
        """
        if position < 0:
            raise ValueError(f"position is {position}; it counts batches from 0")
        return self._make(int(position))

    def at(self, position: int) -> Iterator[Any]:
        """Batches from `position` on, without end."""
        return (self.batch(p) for p in itertools.count(position))

    def epoch(self, number: int = 0) -> Iterator[Any]:
        """The batches of epoch `number`."""
        return (self.batch(p) for p in range(number * len(self), (number + 1) * len(self)))


class _OfTask:
    """Batches with a task's number in them; all else is theirs."""

    def __init__(self, batches: Batches[Any], task: int):
        self._batches, self.task = batches, np.int32(task)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, position: int) -> Any:
        return self._batches.batch(position)._replace(task=self.task)

    def at(self, position: int) -> Iterator[Any]:
        return (b._replace(task=self.task) for b in self._batches.at(position))

    def epoch(self, number: int = 0) -> Iterator[Any]:
        return (b._replace(task=self.task) for b in self._batches.epoch(number))


def of_task(batches: Batches[Any], task: int) -> Any:
    """`batches`, each with `task` in its field `task`."""
    return _OfTask(batches, task)


def shares(sizes: Sequence[int], steps: int, temperature: float = 1.0) -> Int[np.ndarray, "t"]:
    """How many of `steps` each task gets: p_t ~ n_t^(1/T), by largest remainders.

    Raises:
      ValueError: no tasks, a size below 1, or a temperature that is not positive.
    """
    if not len(sizes) or min(sizes) < 1 or not temperature > 0:
        raise ValueError(f"sizes {list(sizes)} at temperature {temperature}: both must be positive")
    logs: Float[np.ndarray, "t"] = np.log(np.asarray(sizes, np.float64)) / temperature
    p = np.exp(logs - logs.max())
    exact = steps * p / p.sum()
    out = np.floor(exact).astype(np.int64)
    out[np.argsort(out - exact, kind="stable")[: steps - out.sum()]] += 1
    return out


def mixture(parts: Sequence[Batches[Any]], *, temperature: float = 1.0, seed: int = 0) -> Mixture:
    """Each batch from one task, drawn by size and temperature; see the module.

    Args:
      parts: one a task, all for the same process.
      temperature: T, above 0; infinity draws all tasks alike.
      seed: of the order, 0 or more.

    Returns:
      Batches whose `task` is a scalar.

    Raises:
      ValueError: no parts, a temperature that is not positive, a negative seed.
    """
    if not parts or seed < 0:
        raise ValueError(f"{len(parts)} parts with seed {seed}: there is at least one part, and the seed is 0 or more")
    steps = sum(len(p) for p in parts)
    counts = shares([p.num_examples for p in parts], steps, temperature)
    ends = np.cumsum(counts)
    own = [of_task(p, t) for t, p in enumerate(parts)]

    def make(position: int) -> Any:
        epoch, step = divmod(position, steps)
        place = int(order(steps, seed, epoch)[step])
        task = int(np.searchsorted(ends, place, side="right"))
        rank = place - int(ends[task] - counts[task])
        return own[task].batch(epoch * int(counts[task]) + rank)

    return Mixture(own, steps, make, parts[0].batch_size)


def together(parts: Sequence[Batches[Any]]) -> Mixture:
    """Each batch holds one batch of every part, their rows one after another; the parts' batch sizes say the shares.

    An epoch lasts as long as the longest part's; the others begin anew. Texts are padded to the longest part's length.

    Args:
      parts: one a task, all for the same process.

    Returns:
      Batches whose `task` is (b,).

    Raises:
      ValueError: no parts.
    """
    if not parts:
        raise ValueError("0 parts: there is at least one")
    own = [of_task(p, t) for t, p in enumerate(parts)]
    first = np.cumsum([0, *(p.num_examples for p in parts)])[:-1]

    def make(position: int) -> Any:
        batches = [p.batch(position) for p in own]
        if isinstance(batches[0], TextBatch):
            batches = _padded(batches)
        rows = [
            b._replace(
                index=np.where(b.index >= 0, b.index + n, -1).astype(np.int32),
                task=np.full(len(b.weight), b.task, np.int32),
            )
            for b, n in zip(batches, first)
        ]
        return rows[0]._make(np.concatenate(fields) for fields in zip(*rows))

    return Mixture(own, max(len(p) for p in parts), make, sum(p.batch_size for p in parts))


def _padded(batches: Sequence[TextBatch]) -> list[TextBatch]:
    length = max(b.input_ids.shape[1] for b in batches)
    # What a masked position holds does not matter.
    pad = lambda x: np.pad(x, [(0, 0), (0, length - x.shape[1])])
    return [b._replace(input_ids=pad(b.input_ids), attention_mask=pad(b.attention_mask)) for b in batches]
