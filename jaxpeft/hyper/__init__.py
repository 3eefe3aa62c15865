"""Networks that emit weights: what they are made of, and those that emit whole models.

    spec   = jax.eval_shape(model.init, key, x)
    hyper  = mip(spec, inputs=1)
    params = hyper.apply(hyper.init(key), gamma)

Methods that adapt a frozen model through such networks stand in `jaxpeft.adapt`.
"""

from jaxpeft.hyper.hypernetwork import (
    HYPERNETWORKS,
    Hypernetwork,
    TargetError,
    load_hypernetwork,
    register_hypernetwork,
    save_hypernetwork,
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
from jaxpeft.hyper.mip import mip, mip_encode

__all__ = [
    "HYPERNETWORKS",
    "Hypernetwork",
    "Place",
    "TargetError",
    "emitting",
    "head",
    "head_start",
    "load_hypernetwork",
    "mip",
    "mip_encode",
    "normal",
    "places",
    "register_hypernetwork",
    "save_hypernetwork",
    "trunk",
    "trunk_start",
    "zeros",
]
