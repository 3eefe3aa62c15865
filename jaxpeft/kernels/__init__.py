"""Pallas kernels for what XLA does not fuse; beside each its plain-JAX reference, which is what runs where no kernel does.

`backend` means the same everywhere: "auto" is the kernel on TPU and GPU and plain JAX elsewhere, chosen when the program
is lowered, so one traced program serves all; "xla" is plain JAX; "tpu" and "gpu" are the kernel of that platform,
interpreted on others.
"""

from jaxpeft.kernels.low_rank_matmul import low_rank_matmul

__all__ = ["low_rank_matmul"]
