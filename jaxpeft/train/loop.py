"""The training loop: compiled steps over batches, validation, checkpoints, an orderly stop at Ctrl-C."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxpeft.train.checkpoints import Checkpoints
from jaxpeft.train.metrics import Metrics, accuracy, macro_f1
from jaxpeft.train.step import Step, TrainState


class NonFiniteError(FloatingPointError):
    """The loss or a gradient became NaN or infinite; the state before it was kept."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the running step was finished and a checkpoint saved."""


class Compiled:
    """A jitted function, compiled ahead for each shape of its last argument, so that its memory is known.

    Attributes:
      peak_bytes: of the largest program so far: arguments, outputs and temporaries, without what is donated twice.
      seconds: spent compiling.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        self._jit = jax.jit(function, **options)
        self._programs: dict[Any, Any] = {}
        self.peak_bytes = self.temporary_bytes = 0
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        return self.program(*args)(*args)

    @property
    def count(self) -> int:
        """Programs so far."""
        return len(self._programs)

    def program(self, *args: Any) -> Any:
        """The compiled program for these arguments, or for `jax.ShapeDtypeStruct`s in their places."""
        key = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(args[-1]))
        if key not in self._programs:
            start = time.perf_counter()
            program = self._programs[key] = self._jit.lower(*args).compile()
            self.seconds += time.perf_counter() - start
            memory = program.memory_analysis()
            if memory is not None:  # some backends do not say
                held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
                self.peak_bytes = max(self.peak_bytes, held + memory.temp_size_in_bytes)
                self.temporary_bytes = max(self.temporary_bytes, memory.temp_size_in_bytes)
        return self._programs[key]


class Scores(NamedTuple):
    """How well predictions fit a split."""

    accuracy: float
    macro_f1: float
    loss: float
    predictions: Any


def evaluate(evaluation: Callable[..., Any], delta: PyTree, params: PyTree, batches: Any, place: Any = None) -> Scores:
    """Scores over all of `batches` (made with `shuffle=False`); padding rows do not count.

    Args:
      evaluation: a compiled `make_evaluation`.
      delta, params: the model.
      batches: of this process.
      place: puts a batch on a mesh; predictions are then gathered from all processes.
    """
    n = batches.num_examples
    predicted, truth, losses = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n)
    for batch in batches.epoch():
        out = evaluation(delta, params, batch if place is None else place(batch))
        rows = {"prediction": out["prediction"], "loss": out["loss"], "label": batch.label, "index": batch.index}
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            rows = {k: multihost_utils.process_allgather(v, tiled=True) for k, v in rows.items()}
        index = np.asarray(rows["index"])
        real, index = index >= 0, index[index >= 0]
        predicted[index] = np.asarray(rows["prediction"])[real]
        truth[index] = np.asarray(rows["label"])[real]
        losses[index] = np.asarray(rows["loss"])[real]
    return Scores(accuracy(predicted, truth), macro_f1(predicted, truth), float(losses.mean()), predicted)


@dataclass
class Fit:
    """What a loop needs beside its data; all of it optional.

    Attributes:
      validate: `(state) -> Scores`, called every `validate_every` steps and at the end.
      checkpoints: where to save every `save_every` steps, at the end and at Ctrl-C.
      meta: `(position) -> plain data` for the checkpoint.
      metrics: where numbers go, every `log_every` steps.
      progress: `(step, rate, numbers)`, called at every step.
      place: puts a batch on a mesh.
    """

    validate: Callable[[TrainState], Scores] | None = None
    validate_every: int = 0
    checkpoints: Checkpoints | None = None
    save_every: int = 0
    meta: Callable[[int], dict[str, Any]] = field(default=lambda position: {"position": position})
    metrics: Metrics | None = None
    log_every: int = 10
    progress: Callable[[int, float, dict[str, float]], None] = field(default=lambda *_: None)
    place: Callable[[Any], Any] | None = None


def fit(step: Step, state: TrainState, params: PyTree, batches: Any, steps: int, how: Fit | None = None) -> TrainState:
    """Trains until `state.step` is `steps`; a state from a checkpoint goes on where it stood.

    The position in the data is the step, so a resumed run sees the batches that it would have seen.

    Raises:
      NonFiniteError: naming the step; the last good state is saved.
      Interrupted: Ctrl-C; the state is saved.
    """
    how = how or Fit()
    first = int(state.step)
    started, seen = time.perf_counter(), 0
    with _interrupt() as stop:
        for position, batch in zip(range(first, steps), batches.at(first)):
            rows = int(np.sum(batch.weight > 0)) * batches.process_count
            state, numbers = step(state, params, batch if how.place is None else how.place(batch))
            done = position + 1
            report = {k: float(v) for k, v in numbers.items()}
            if int(state.first_bad) >= 0:
                _save(how, state, done)
                raise NonFiniteError(
                    f"the loss or its gradient is not finite at step {int(state.first_bad)} (loss {report['loss']}); the "
                    "values before that step are kept. Lower the learning rate, clip gradients, or look at that batch"
                )
            seen += rows
            rate = seen / (time.perf_counter() - started)
            if position == first:  # the first step's time is the compiler's
                started, seen = time.perf_counter(), 0
            if how.validate is not None and (done == steps or (how.validate_every and done % how.validate_every == 0)):
                pause = time.perf_counter()
                scores = how.validate(state)
                started += time.perf_counter() - pause
                report |= {"validation_accuracy": scores.accuracy, "validation_macro_f1": scores.macro_f1}
                report |= {"validation_loss": scores.loss}
            if how.metrics and (done % how.log_every == 0 or done in (1, steps) or "validation_loss" in report):
                how.metrics.write(done, {**report, "examples_per_second": rate})
            how.progress(done, rate, report)
            if stop.is_set():
                _save(how, state, done)
                raise Interrupted(f"stopped after step {done}")
            if done == steps or (how.save_every and done % how.save_every == 0):
                _save(how, state, done)
    return state


def _save(how: Fit, state: TrainState, position: int) -> None:
    if how.checkpoints is not None:
        how.checkpoints.save(state, how.meta(position))


@contextmanager
def _interrupt() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into a flag that is read between steps; the second one stops at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        flag.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handler)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)
