"""Scores of predictions, and where a run's numbers are written."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int


def accuracy(predicted: Int[np.ndarray, "n"], truth: Int[np.ndarray, "n"]) -> float:
    """The share of equal entries, in [0, 1]. Raises ValueError on nothing."""
    _check(predicted, truth)
    return float(np.mean(predicted == truth))


def macro_f1(predicted: Int[np.ndarray, "n"], truth: Int[np.ndarray, "n"]) -> float:
    """The mean over the classes of `truth` of 2 tp / (2 tp + fp + fn), in [0, 1]: rare classes count like common ones.

    Raises:
      ValueError: no entries, or different numbers of them.
    """
    return float(np.mean(f1_by_class(predicted, truth)))


def f1_by_class(predicted: Int[np.ndarray, "n"], truth: Int[np.ndarray, "n"]) -> Float[np.ndarray, "c"]:
    """F1 of each class that occurs in `truth` or is predicted."""
    _check(predicted, truth)
    scores = []
    for c in np.union1d(truth, predicted):
        hit = np.sum((predicted == c) & (truth == c))
        wrong = np.sum((predicted == c) != (truth == c))
        scores.append(2 * hit / (2 * hit + wrong))
    return np.array(scores)


def _check(predicted: Any, truth: Any) -> None:
    if len(predicted) != len(truth) or not len(truth):
        raise ValueError(f"{len(predicted)} predictions for {len(truth)} labels")


class Metrics:
    """Appends numbers to `metrics.jsonl`, one object a line, and to TensorBoard where `tensorboardX` is installed."""

    def __init__(self, folder: Path, *, tensorboard: bool = True, keep_until: int | None = None):
        """Args:
        folder: of the run, made if missing.
        tensorboard: whether to write event files too, if that package is there.
        keep_until: of a file that exists, keeps the lines up to this step (a resumed run writes the rest anew); None
          starts afresh.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [] if keep_until is None else [r for r in self.read(folder) if r["step"] <= keep_until]
        self.path.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self._board = _board(folder) if tensorboard else None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        with self.path.open("a") as f:
            f.write(json.dumps({"step": step, "time": round(time.time(), 3), **scalars}) + "\n")
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    @staticmethod
    def read(folder: Path) -> list[dict[str, Any]]:
        """The rows of a run; a last line cut short by a crash is left out."""
        path, rows = folder / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows


def _board(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))
