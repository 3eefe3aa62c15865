"""Examples and their classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int, Int32, UInt8

__all__ = ["DatasetError", "Kind", "Split"]


class DatasetError(ValueError):
    """A data set that is unknown, or whose content cannot be trained or scored on."""


Kind = Literal["text", "image"]


@dataclass(frozen=True, eq=False)
class Split:
    """Examples and their classes.

    Attributes:
      inputs: n texts, or images (n, height, width, channels) uint8 with values 0..`Dataset.pixel_max`.
      labels: (n,) int32 in [0, number of classes).
    """

    inputs: tuple[str, ...] | UInt8[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int] | Int[np.ndarray, "m"]) -> "Split":
        """The examples at `indices`, in that order."""
        at = np.asarray(indices, np.int64)
        inputs = self.inputs
        part = inputs[at] if isinstance(inputs, np.ndarray) else tuple(inputs[i] for i in at.tolist())
        return Split(part, self.labels[at])
