"""Networks that emit weights: what they are made of. Methods that act through them stand in `jaxpeft.adapt`."""

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

__all__ = [
    "Place",
    "emitting",
    "head",
    "head_start",
    "normal",
    "places",
    "trunk",
    "trunk_start",
    "zeros",
]
