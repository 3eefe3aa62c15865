"""Which model, which data, which knowledge to move, and what to do with a model where it lands."""

from jaxpeft.transfer import fantastic_gains, robustify, trans_lora
from jaxpeft.transfer.lame import (
    Solution,
    affinity,
    lame,
    lame_batch,
    lame_predict,
    lame_stream,
    objective,
)
from jaxpeft.transfer.two_samples import mmd2, rbf

__all__ = [
    "Solution",
    "affinity",
    "fantastic_gains",
    "lame",
    "lame_batch",
    "lame_predict",
    "lame_stream",
    "mmd2",
    "objective",
    "rbf",
    "robustify",
    "trans_lora",
]
