"""The same step on a mesh: the batch divided, the base divided or repeated, the delta placed with it or repeated.

`place_base`, `place_state` and `place_batch` put arrays where they belong; jit then compiles one program for the mesh and
inserts the communication. Nothing about a step changes, and its numbers agree with one device's.

Axes of the mesh: "data" divides the batch; "fsdp" divides the batch and the base (fully sharded data parallelism: a
weight is gathered where it is used); "tensor" divides the products themselves (Shoeybi et al., "Megatron-LM", 2019,
section 3): query, key, value, up and gate by their outputs, out and down by their inputs, so that between the two
nothing travels. Which axis of a weight goes where is told by its path (`RULES`); a weight without a rule is divided over
"fsdp" along its largest axis.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxpeft import trees
from jaxpeft.train.step import Step, TrainState

BATCH = ("data", "fsdp")

RULES: Mapping[str, tuple[str | None, ...]] = {
    "**/{query,key,value,qkv,up,gate,lm_head}/kernel": ("fsdp", "tensor"),
    "**/{query,key,value,qkv,up,gate}/bias": ("tensor",),
    "**/{out,down}/kernel": ("tensor", "fsdp"),
    "**/embedding": ("tensor", "fsdp"),
}
"""Mesh axes of a weight's last axes, by pattern of its path; the first that matches counts. Axes before those (stacked
layers) are whole, and so is an axis that the mesh axis does not divide."""


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices of all processes, or over those given.

    Raises:
      ValueError: data * fsdp * tensor is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data * fsdp * tensor != len(devices):
        asked = f"data={data} times fsdp={fsdp}" + (f" times tensor={tensor}" if tensor > 1 else "")
        raise ValueError(f"{asked} is {data * fsdp * tensor}, but there are {len(devices)} devices")
    return Mesh(np.array(devices).reshape(data, fsdp, tensor), (*BATCH, "tensor"))


# ------------------------------------------------------------------------------------------------ what goes where


def base_spec(shape: Sequence[int], parts: int) -> P:
    """How a base weight of this shape is divided into `parts`: along its largest axis that divides, else not at all."""
    fits = [i for i, n in enumerate(shape) if n % parts == 0 and n >= parts]
    if parts == 1 or not fits:
        return P()
    widest = max(fits, key=lambda i: shape[i])
    return P(*(["fsdp" if i == widest else None for i in range(widest + 1)]))


def weight_spec(mesh: Mesh, path: str, shape: Sequence[int]) -> P:
    """How the weight at `path` is divided: by the first rule that matches, else over "fsdp" as `base_spec` says."""
    for pattern, axes in RULES.items():
        if len(shape) >= len(axes) and trees.is_match(pattern, path):
            spec = fitting(mesh, (*[None] * (len(shape) - len(axes)), *axes), shape)
            if any(spec):
                return spec
    return base_spec(shape, mesh.shape.get("fsdp", 1))


def fitting(mesh: Mesh, axes: Sequence[Any], shape: Sequence[int]) -> P:
    """`axes` without those that the mesh lacks or that do not divide their axis of `shape`."""

    def one(axis: Any, size: int) -> Any:
        names = [a for a in (axis if isinstance(axis, tuple) else (axis,)) if mesh.shape.get(a, 1) > 1]
        if not names or size % math.prod(mesh.shape[a] for a in names):
            return None
        return names[0] if len(names) == 1 else tuple(names)

    return P(*map(one, axes, shape))


def base_specs(mesh: Mesh, params: PyTree) -> PyTree:
    """`weight_spec` of every leaf (an array or its shape)."""
    return jtu.tree_map_with_path(lambda p, x: weight_spec(mesh, trees.path_string(p), np.shape(x)), params)


def state_specs(mesh: Mesh, state: PyTree, params: PyTree) -> PyTree:
    """How a training state (or a delta) is divided along with the base.

    What a method keeps for the weight at a path is placed with it: an array of the weight's shape like the weight, a
    factor (*weight's first axes, r) like those axes, a factor (*stack, r, *weight's last axes) like those; the same for
    what the optimiser keeps. Other arrays of two axes or more are divided as weights of their own path (a side network's
    blocks carry the names of the model's); vectors are repeated.
    """
    base = trees.by_path(params)

    def leaf(path: Sequence[Any], x: Any) -> P:
        shape, kept = np.shape(x), next((k.key for k in path if isinstance(k, jtu.DictKey) and k.key in base), None)
        if kept is not None:
            return beside(shape, np.shape(base[kept]), weight_spec(mesh, kept, np.shape(base[kept])))
        return weight_spec(mesh, trees.path_string(path), shape) if len(shape) > 1 else P()

    return jtu.tree_map_with_path(leaf, state)


def beside(shape: Sequence[int], weight: Sequence[int], spec: P) -> P:
    """How an array that belongs to a weight is divided, told by the axes that it shares with the weight."""
    shape, weight = tuple(shape), tuple(weight)
    whole = (*spec, *[None] * (len(weight) - len(spec)))
    if shape == weight:
        return P(*whole)
    if len(shape) < 2:
        return P()
    if shape[:-1] == weight[: len(shape) - 1]:
        return P(*whole[: len(shape) - 1], None)
    for stack in range(len(shape) - 1):
        after = len(shape) - stack - 1
        if shape[:stack] == weight[:stack] and shape[stack + 1 :] == weight[len(weight) - after :]:
            return P(*whole[:stack], None, *whole[len(weight) - after :])
    return P()


# ------------------------------------------------------------------------------------------------ putting it there


def place_base(mesh: Mesh, params: PyTree) -> PyTree:
    """`params` divided by `base_specs`."""
    return jax.tree.map(lambda x, spec: put(x, NamedSharding(mesh, spec)), params, base_specs(mesh, params))


def place_state(mesh: Mesh, state: TrainState, params: PyTree | None = None) -> TrainState:
    """The training state repeated on every device: a delta is small. With `params` it is divided by `state_specs`."""
    specs = jax.tree.map(lambda _: P(), state) if params is None else state_specs(mesh, state, params)
    return jax.tree.map(lambda x, spec: put(x, NamedSharding(mesh, spec)), state, specs)


def place_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """A batch's rows divided over "data" and "fsdp". Each process passes its own rows, in the order of the processes.

    A scalar (the task of a whole batch) is the same everywhere.
    """

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(NamedSharding(mesh, P(BATCH) if x.ndim else P()), x)

    return jax.tree.map(put, batch)


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """A whole array that every process holds, as a global array with this sharding."""
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def pmap_step(step: Step, devices: Sequence[Any] | None = None) -> Step:
    """A step made with `axis="devices"` under `jax.pmap`: state and base replicated, batch (devices, rows, ...).

    The main road is jit on arrays that were placed; this is for training loops that are built on pmap already.
    """
    return jax.pmap(step, axis_name="devices", in_axes=(0, None, 0), devices=devices)
