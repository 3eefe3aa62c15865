"""jaxpeft: adapt, merge, generate, score and tune models in JAX; every method a pure function over parameter pytrees.

adapted = jaxpeft.adapt(model.apply, jaxpeft.lora(rank=8, at="**/attention/{query,value}/kernel"))
delta   = adapted.init(key, params, *inputs)
logits  = adapted.apply(params, delta, *inputs)
dense   = adapted.merge(params, delta)
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxpeft import trees
from jaxpeft.adapt.adapters import houlsby, parallel, pfeiffer, scaled_parallel
from jaxpeft.adapt.dora import dora
from jaxpeft.adapt.full import bitfit, full, head
from jaxpeft.adapt.ia3 import ia3
from jaxpeft.adapt.importance import squared_gradients
from jaxpeft.adapt.ladder import lst
from jaxpeft.adapt.lora import lora
from jaxpeft.adapt.mam import mam
from jaxpeft.adapt.prefix_tuning import prefix_tuning
from jaxpeft.adapt.prompt_tuning import prompt_tuning
from jaxpeft.adapt.ranks import trim_rank, with_rank
from jaxpeft.adapt.unified import DESIGNS, Design, sublayer
from jaxpeft.explain import Explanation, explain
from jaxpeft.generated import generated, per_task
from jaxpeft.hooks import Hook, from_nnx, on_hooks
from jaxpeft.interpret import DenseError, DenseWarning, lift
from jaxpeft.many import Many, SlotError, Slots, many
from jaxpeft.merge.atlas_method import anisotropic_scaling
from jaxpeft.method import (
    METHODS,
    Adapted,
    MergeError,
    Method,
    Study,
    TaskError,
    adapt,
    bake,
    chain,
    from_config,
    on_weights,
    register,
)
from jaxpeft.readers import named, read
from jaxpeft.topk import kth_largest, top_k_mask
from jaxpeft.trees import Fixed, PatternError, combine, count, fingerprint, labels, learned, mix, nbytes, stack, unstack
from jaxpeft.updates import mask_updates, relative_rates

if TYPE_CHECKING:
    from jaxpeft.train.sweep import sweep

__version__ = "0.1.0"

ROOMS = ("data", "files", "generate", "hyper", "interchange", "merge", "models", "train", "transfer", "tune")
"""Attributes that need no import of their own; most are read when they are first asked for."""

__all__ = [
    "DESIGNS",
    "METHODS",
    "Adapted",
    "DenseError",
    "DenseWarning",
    "Design",
    "Explanation",
    "Fixed",
    "Hook",
    "Many",
    "MergeError",
    "Method",
    "PatternError",
    "SlotError",
    "Slots",
    "Study",
    "TaskError",
    "adapt",
    "anisotropic_scaling",
    "bake",
    "bitfit",
    "chain",
    "combine",
    "count",
    "dora",
    "explain",
    "fingerprint",
    "from_config",
    "from_nnx",
    "full",
    "generated",
    "head",
    "houlsby",
    "ia3",
    "kth_largest",
    "labels",
    "learned",
    "lift",
    "lora",
    "lst",
    "mam",
    "many",
    "mask_updates",
    "mix",
    "named",
    "nbytes",
    "on_hooks",
    "on_weights",
    "parallel",
    "per_task",
    "pfeiffer",
    "prefix_tuning",
    "prompt_tuning",
    "read",
    "register",
    "relative_rates",
    "scaled_parallel",
    "squared_gradients",
    "stack",
    "sublayer",
    "sweep",
    "top_k_mask",
    "trees",
    "trim_rank",
    "unstack",
    "with_rank",
]


def __getattr__(name: str) -> Any:
    # Methods are there by their registration, with no list to keep. The training loop brings data readers and checkpoints
    # with it: imported when asked for.
    if name in METHODS:
        return METHODS[name].factory
    if name in ROOMS:
        return importlib.import_module(f"jaxpeft.{name}")
    if name != "sweep":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{trees.near(name, METHODS)}")
    from jaxpeft.train.sweep import sweep

    return sweep


def __dir__() -> list[str]:
    return sorted({*globals(), *METHODS, *ROOMS, "sweep"})
