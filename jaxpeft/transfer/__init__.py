"""Which model, which data, which knowledge to move, and what to do with a model where it lands."""

from jaxpeft.transfer import fantastic_gains, robustify
from jaxpeft.transfer.lame import (
    Solution,
    affinity,
    lame,
    lame_batch,
    lame_predict,
    lame_stream,
    objective,
)

__all__ = [
    "Solution",
    "affinity",
    "fantastic_gains",
    "lame",
    "lame_batch",
    "lame_predict",
    "lame_stream",
    "objective",
    "robustify",
]
