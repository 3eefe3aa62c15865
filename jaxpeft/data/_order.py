"""Random orders and fixed splits that are the same numbers on every machine and with every numpy.

numpy promises the raw stream of a bit generator for ever, the methods of `Generator` not; so orders are made by sorting
raw Philox words.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def words(count: int, *seed: int) -> np.ndarray:
    """`count` random uint64, a pure function of the seed's integers (each >= 0)."""
    if any(s < 0 for s in seed):
        raise ValueError(f"seeds are integers from 0 on, not {seed}")
    return np.random.Philox(np.random.SeedSequence([int(s) for s in seed])).random_raw(count)


def order(count: int, *seed: int) -> Int[np.ndarray, "n"]:
    """A random order of range(count), a pure function of the seed's integers."""
    return np.argsort(words(count, *seed), kind="stable")


def held_out(labels: Int[np.ndarray, "n"], count: int, seed: int) -> Int[np.ndarray, "count"]:
    """Indices of a stratified random part: each class gives its share, the largest remainders give one more.

    No class gives its last example, so rare classes stay in the other part; where that leaves too few, larger classes
    give more.

    Args:
      labels: the class of each example.
      count: how many to take; at most n minus the number of classes that occur.
      seed: an integer >= 0.

    Returns:
      The indices taken, ascending.

    Raises:
      ValueError: `count` is negative or leaves a class without examples.
    """
    classes, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if not 0 <= count <= len(labels) - len(classes):
        raise ValueError(
            f"cannot hold out {count} of {len(labels)} examples: each of the {len(classes)} classes must keep one"
        )
    if count == 0:
        return np.zeros(0, np.int64)
    # Integers only: count * size / n split in quotient and remainder, so that no rounding decides.
    quota, remainder = np.divmod(sizes * count, len(labels))
    quota = np.minimum(quota, sizes - 1)
    by_remainder = np.argsort(-remainder, kind="stable")
    while (missing := count - int(quota.sum())) > 0:
        room = by_remainder[quota[by_remainder] < sizes[by_remainder] - 1]
        quota[room[:missing]] += 1
    shuffled = order(len(labels), seed)
    shuffled = shuffled[np.argsort(inverse[shuffled], kind="stable")]  # by class, random within
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(shuffled[rank < np.repeat(quota, sizes)])
