"""Pallas kernels for what XLA does not fuse; beside each its plain-JAX reference, which is what runs where no kernel does.

`backend` means the same everywhere: "auto" is the kernel on TPU and GPU and plain JAX elsewhere, chosen when the program
is lowered, so one traced program serves all; "xla" is plain JAX; "tpu" and "gpu" are the kernel of that platform,
interpreted on others.
"""

from jaxpeft.kernels.attention import attention, merge_attentions
from jaxpeft.kernels.block_selection import Selection, prflash_plan, select_blocks, select_drawn
from jaxpeft.kernels.grouped_low_rank import grouped_low_rank
from jaxpeft.kernels.hashed_matmul import hashed_matmul
from jaxpeft.kernels.low_rank_matmul import low_rank_matmul
from jaxpeft.kernels.positions import Position, alibi_slopes
from jaxpeft.kernels.quantised_attention import quantised_attention
from jaxpeft.kernels.stairs import Stairs, average_bits, saq_append, saq_init, saq_read

__all__ = [
    "Position",
    "Selection",
    "Stairs",
    "alibi_slopes",
    "attention",
    "average_bits",
    "grouped_low_rank",
    "hashed_matmul",
    "low_rank_matmul",
    "merge_attentions",
    "prflash_plan",
    "quantised_attention",
    "saq_append",
    "saq_init",
    "saq_read",
    "select_blocks",
    "select_drawn",
]
