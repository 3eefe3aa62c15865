"""Networks that emit weights: what they are made of, and those that emit whole models.

    spec   = jax.eval_shape(model.init, key, x)
    hyper  = mip(spec, inputs=1)
    params = hyper.apply(hyper.init(key), gamma)

Methods that adapt a frozen model through such networks stand in `jaxpeft.adapt`.
"""

from jaxpeft.hyper.d2nwg import WeightDiffusion, d2nwg, d2nwg_schedule, weight_diffusion
from jaxpeft.hyper.graph import OPS, Graph, Slot, model_graph, pad_graph
from jaxpeft.hyper.hypernetwork import (
    HYPERNETWORKS,
    Hypernetwork,
    TargetError,
    per_example,
    register_hypernetwork,
)
from jaxpeft.hyper.kind import (
    Partition,
    kind,
    kind_factorize,
    kind_gate,
    kind_join,
    kind_mask,
    kind_partition,
    kind_select,
    kind_transfer,
)
from jaxpeft.hyper.layers import (
    Place,
    emitting,
    head,
    head_start,
    normal,
    places,
    trunk,
    trunk_start,
    zeros,
)
from jaxpeft.hyper.logah import SIZES, GraphHyperNetwork, frobenius, logah, logah_network, with_noise
from jaxpeft.hyper.mip import mip, mip_encode
from jaxpeft.hyper.stn import Responding, Tuner, Tuning, cutout, dropout, self_tuning, stn
from jaxpeft.hyper.tleg import depth_coefficients, tleg, tleg_expand, tleg_fit, tleg_kd_loss, tleg_r2
from jaxpeft.hyper.tunable_conv import balanced, multi_loss, sample_omega, tunable_conv

__all__ = [
    "HYPERNETWORKS",
    "OPS",
    "SIZES",
    "Graph",
    "GraphHyperNetwork",
    "Hypernetwork",
    "Partition",
    "Place",
    "Responding",
    "Slot",
    "TargetError",
    "Tuner",
    "Tuning",
    "WeightDiffusion",
    "balanced",
    "cutout",
    "d2nwg",
    "d2nwg_schedule",
    "depth_coefficients",
    "dropout",
    "emitting",
    "frobenius",
    "head",
    "head_start",
    "kind",
    "kind_factorize",
    "kind_gate",
    "kind_join",
    "kind_mask",
    "kind_partition",
    "kind_select",
    "kind_transfer",
    "logah",
    "logah_network",
    "mip",
    "mip_encode",
    "model_graph",
    "multi_loss",
    "normal",
    "pad_graph",
    "per_example",
    "places",
    "register_hypernetwork",
    "sample_omega",
    "self_tuning",
    "stn",
    "tleg",
    "tleg_expand",
    "tleg_fit",
    "tleg_kd_loss",
    "tleg_r2",
    "trunk",
    "trunk_start",
    "tunable_conv",
    "weight_diffusion",
    "with_noise",
    "zeros",
]
