"""The same step on a mesh: the batch divided, the base divided or repeated, the delta repeated.

`place` puts arrays where they belong; jit then compiles one program for the mesh and inserts the communication. Nothing
about a step changes, and its numbers agree with one device's.

Axes of the mesh: "data" divides the batch; "fsdp" divides the batch and the base, each weight along its largest axis
that divides evenly (fully sharded data parallelism).
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxpeft.train.step import Step, TrainState


def make_mesh(data: int = 1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A (data, fsdp) mesh over all devices of all processes, or over those given.

    Raises:
      ValueError: data * fsdp is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data * fsdp != len(devices):
        raise ValueError(f"data={data} times fsdp={fsdp} is {data * fsdp}, but there are {len(devices)} devices")
    return Mesh(np.array(devices).reshape(data, fsdp), ("data", "fsdp"))


def base_spec(shape: Sequence[int], parts: int) -> P:
    """How a base weight of this shape is divided into `parts`: along its largest axis that divides, else not at all."""
    fits = [i for i, n in enumerate(shape) if n % parts == 0 and n >= parts]
    if parts == 1 or not fits:
        return P()
    widest = max(fits, key=lambda i: shape[i])
    return P(*(["fsdp" if i == widest else None for i in range(widest + 1)]))


def place_base(mesh: Mesh, params: PyTree) -> PyTree:
    """`params` divided over "fsdp"."""
    parts = mesh.shape["fsdp"]
    return jax.tree.map(lambda x: put(x, NamedSharding(mesh, base_spec(np.shape(x), parts))), params)


def place_state(mesh: Mesh, state: TrainState) -> TrainState:
    """The training state repeated on every device: a delta is small."""
    return jax.tree.map(lambda x: put(x, NamedSharding(mesh, P())), state)


def place_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """A batch's rows divided over all devices. Each process passes its own rows, in the order of the processes."""
    sharding = NamedSharding(mesh, P(("data", "fsdp")))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """A whole array that every process holds, as a global array with this sharding."""
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def pmap_step(step: Step, devices: Sequence[Any] | None = None) -> Step:
    """A step made with `axis="devices"` under `jax.pmap`: state and base replicated, batch (devices, rows, ...).

    The main road is jit with `place`; this is for training loops that are built on pmap already.
    """
    return jax.pmap(step, axis_name="devices", in_axes=(0, None, 0), devices=devices)
