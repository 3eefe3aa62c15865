"""jaxpeft: adapt, merge, generate, score and tune models in JAX; every method a pure function over parameter pytrees.

adapted = jaxpeft.adapt(model.apply, jaxpeft.lora(rank=8, at="**/attention/{query,value}/kernel"))
delta   = adapted.init(key, params, *inputs)
logits  = adapted.apply(params, delta, *inputs)
dense   = adapted.merge(params, delta)
"""

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
from jaxpeft.adapt.unified import DESIGNS, Design, sublayer
from jaxpeft.hooks import Hook, from_nnx, on_hooks
from jaxpeft.interpret import DenseError, DenseWarning, lift
from jaxpeft.method import METHODS, Adapted, MergeError, Method, adapt, chain, from_config, on_weights, register
from jaxpeft.readers import named, read
from jaxpeft.trees import Fixed, PatternError, combine, count, fingerprint, labels, learned, mix, nbytes, stack, unstack

__version__ = "0.1.0"

__all__ = [
    "DESIGNS",
    "METHODS",
    "Adapted",
    "DenseError",
    "DenseWarning",
    "Design",
    "Fixed",
    "Hook",
    "MergeError",
    "Method",
    "PatternError",
    "adapt",
    "bitfit",
    "chain",
    "combine",
    "count",
    "dora",
    "fingerprint",
    "from_config",
    "from_nnx",
    "full",
    "head",
    "houlsby",
    "ia3",
    "labels",
    "learned",
    "lift",
    "lora",
    "lst",
    "mam",
    "mix",
    "named",
    "nbytes",
    "on_hooks",
    "on_weights",
    "parallel",
    "pfeiffer",
    "prefix_tuning",
    "prompt_tuning",
    "read",
    "register",
    "scaled_parallel",
    "squared_gradients",
    "stack",
    "sublayer",
    "trees",
    "unstack",
]
