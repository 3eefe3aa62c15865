"""Compiling for TPU pods and GPUs on a machine that has neither: the platforms' own compilers need no device.

What they refuse would be refused there, and their memory counts are the real ones; nothing runs. Install with
`pip install "jaxpeft[aot]"` (libtpu and the CUDA plugin, no driver needed).
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpeft import trees

__all__ = ["TARGETS", "AotError", "Target", "compile_for", "compile_lowered", "device_mesh", "topology"]


class AotError(ValueError):
    """A target that cannot be compiled for, and why."""


@dataclass(frozen=True)
class Target:
    """One kind of device: peaks as its maker states them.

    Attributes:
      name: "v5e", "h100", ...
      platform: "tpu" or "cuda".
      topology: of the smallest slice, as the compiler names it.
      flops: bf16 operations per second of one device.
      bandwidth: bytes per second to its memory.
      memory: bytes of it that a program may use.
      cores: devices of one chip.
    """

    name: str
    platform: str
    topology: str
    flops: float
    bandwidth: float
    memory: int
    cores: int = 1


# TPU: peaks as `pltpu.get_tpu_info` tells them of a core; a v5p device is both cores of its chip, a v4 device one of two.
# Memory is what the compilers say is available (a test asks them); H100's is the card's.
TARGETS = {
    t.name: t
    for t in (
        Target("v4", "tpu", "2x2x1", 137.5e12, 0.615e12, int(15.25 * 2**30), cores=2),
        Target("v5e", "tpu", "2x2", 197e12, 0.82e12, int(15.75 * 2**30)),
        Target("v5p", "tpu", "2x2x1", 459e12, 2.46e12, int(95.74 * 2**30)),
        Target("v6e", "tpu", "2x2", 920e12, 1.64e12, int(31.25 * 2**30)),
        Target("h100", "cuda", "1x1x1", 989e12, 3.35e12, 80 * 10**9),
    )
}

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def topology(kind: str, shape: str = "") -> topologies.TopologyDescription:
    """A slice that is not there: `topology("v5e", "16x16")`, `topology("h100", "1x1x8")`; the smallest by default.

    Raises:
      AotError: an unknown kind, a shape that the compiler does not know, or a compiler that is not installed.
    """
    if kind not in TARGETS:
        raise AotError(f"{kind!r} is not known{trees.near(kind, TARGETS)}; there are: {', '.join(TARGETS)}")
    target = TARGETS[kind]
    shape = shape or target.topology
    try:
        if target.platform == "tpu":
            # Without these libtpu looks for a TPU host's metadata and waits.
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
            os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
            os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
            # A chip serves one process; here is no chip, and several may compile at once.
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
            return topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}")
        return topologies.get_topology_desc(kind, "cuda", target_config=H100, topology=shape)
    except Exception as error:
        raise AotError(
            f"cannot compile for {kind} {shape}: {str(error).splitlines()[0]}. The compilers come with the extra "
            "`aot`; shapes are written 2x2 (v5e, v6e), 2x2x1 (v4, v5p), slices x hosts x devices (h100)"
        ) from error


def device_mesh(kind: str, shape: Sequence[int] = (1,), axes: Sequence[str] = ("data",), slice_shape: str = "") -> Mesh:
    """A mesh of devices that are not there: `device_mesh("v5e", (4, 4), ("data", "model"), "4x4")`.

    Raises:
      AotError: as `topology`, and for a mesh of more devices than the slice has.
    """
    found = topology(kind, slice_shape)
    count = math.prod(shape)
    if count > len(found.devices):
        raise AotError(f"{kind} {slice_shape} has {len(found.devices)} devices; a mesh of {tuple(shape)} needs {count}")
    if count == len(found.devices):
        # A 16 x 16 slice as 32 x 8 splits an axis of the torus; as 16 x 16 it splits none.
        laid = mesh_utils.create_device_mesh(tuple(shape), list(found.devices), allow_split_physical_axes=True)
        return Mesh(laid, tuple(axes))
    return Mesh(np.array(found.devices[:count]).reshape(shape), tuple(axes))


def compile_for(kind: str, function: Callable[..., Any], *shapes: Any, **options: Any) -> Any:
    """`function` compiled for one device of `kind`; `shapes` are pytrees of arrays or `ShapeDtypeStruct`.

    Returns:
      The compiled program: `memory_analysis()`, `cost_analysis()`, `as_text()`.
    """
    whole = NamedSharding(device_mesh(kind), PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
    return compile_lowered(jax.jit(function, **options).lower(*placed))


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """`lowered.compile()` past JAX's persistent cache: a compiler without a device writes entries that it cannot read back.

    The cache is switched for the process, not for a thread: do not compile for devices at the same time.
    """
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    compilation_cache.reset_cache()  # whether it is used is decided once, at the first compilation
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return lowered.compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
