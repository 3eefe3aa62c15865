"""Training deltas: the step, the loop, sharding, checkpoints, metrics, and whole runs."""

from jaxpeft.train.activations import shard_activations
from jaxpeft.train.checkpoints import CheckpointError, Checkpoints
from jaxpeft.train.chunks import MemoryLimitError
from jaxpeft.train.loop import Compiled, Fit, Interrupted, NonFiniteError, Scores, evaluate, fit
from jaxpeft.train.metrics import Metrics, accuracy, f1_by_class, macro_f1
from jaxpeft.train.population import Population, Run, Runs, run_of, side_by_side
from jaxpeft.train.programs import SweepError
from jaxpeft.train.run import Config, ConfigError, finetune, load, open_run, predict
from jaxpeft.train.sharding import (
    base_spec,
    base_specs,
    make_mesh,
    place_base,
    place_batch,
    place_state,
    pmap_step,
    state_specs,
)
from jaxpeft.train.step import (
    Task,
    TrainState,
    classes_of_tasks,
    create,
    cross_entropy,
    image_classification,
    language_modelling,
    make_evaluation,
    make_step,
    text_classification,
)
from jaxpeft.train.sweep import Result, Swept, grid, sweep

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Compiled",
    "Config",
    "ConfigError",
    "Fit",
    "Interrupted",
    "MemoryLimitError",
    "Metrics",
    "NonFiniteError",
    "Population",
    "Result",
    "Run",
    "Runs",
    "Scores",
    "SweepError",
    "Swept",
    "Task",
    "TrainState",
    "accuracy",
    "base_spec",
    "base_specs",
    "classes_of_tasks",
    "create",
    "cross_entropy",
    "evaluate",
    "f1_by_class",
    "finetune",
    "fit",
    "grid",
    "image_classification",
    "language_modelling",
    "load",
    "macro_f1",
    "make_evaluation",
    "make_mesh",
    "make_step",
    "open_run",
    "place_base",
    "place_batch",
    "place_state",
    "pmap_step",
    "predict",
    "run_of",
    "shard_activations",
    "side_by_side",
    "state_specs",
    "sweep",
    "text_classification",
]
