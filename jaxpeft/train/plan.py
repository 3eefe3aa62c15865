"""What a train step needs on devices that are not here: compiled for them from shapes alone, nothing runs.

    plan(PlanConfig(model="llama-3-8b", pod="v5e:4x4", method="lora", rows=16, length=2048))

The step is `make_step`'s (in a sweep that of `side_by_side`), the model the one that `load_model` makes, the compiler
the platform's own (extra `aot`): bytes per device are those that the program would take there. Everything is the
compiler's prediction; nothing was timed. Base in bfloat16, delta and optimiser (AdamW) in float32, layers scanned and
recomputed in the backward pass.
"""

import math
import re
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxpeft import aot, data, trees
from jaxpeft.adapt.full import head
from jaxpeft.method import Adapted, Method, adapt, chain, entry
from jaxpeft.models import model_from_config
from jaxpeft.models.decoder import Decoder
from jaxpeft.models.encoder import SequenceClassifier
from jaxpeft.models.presets import preset
from jaxpeft.models.vit import ImageClassifier
from jaxpeft.train import hlo
from jaxpeft.train.activations import ALL, Divided, shard_activations
from jaxpeft.train.population import run_of, side_by_side
from jaxpeft.train.programs import AXIS
from jaxpeft.train.run import parse_options
from jaxpeft.train.sharding import BATCH, base_specs, fitting, state_specs
from jaxpeft.train.step import (
    Task,
    create,
    image_classification,
    language_modelling,
    make_step,
    text_classification,
)

# Cycles per second: the peak operations of `aot.TARGETS` over those of one cycle of the matrix units.
# The compiler counts 456,000 operations a cycle for a large product on a v6e: four units of 256 x 256, not two.
CLOCK = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}


class PlanError(ValueError):
    """A plan that cannot be made."""


@dataclass(frozen=True)
class PlanConfig:
    """What to compile.

    Attributes:
      model: a published one by name (`models.presets`), or the path of a config.json.
      pod: kind and shape of the slice: v5e:4x4, v5e:16x16, v5p:2x4x4, h100:1, h100:8.
      method: any registered method.
      options: of the method, `name=value` each: rank=16.
      rows: of the batch, over all devices.
      length: tokens of a row; images have their own size.
      data: devices along which the base is repeated; the batch is divided over them.
      fsdp: devices that divide batch and base; 0 for all that are left.
      tensor: devices that divide the products; 0 for a power of two up to the root of their number that divides the
        model's key/value heads.
      runs: above 0, a sweep of so many runs with a learning rate each, divided over `run_groups`; every run sees the
        whole batch.
      run_groups: of devices, each with runs of its own and a copy of the base.
      accumulate: parts that a batch is computed in.
      activations: what `shard_activations` divides.
      place_delta: whether the delta is divided with its weights, or repeated.
    """

    model: str = "llama-3-8b"
    pod: str = "v5e:4x4"
    method: str = "lora"
    options: tuple[str, ...] = ()
    rows: int = 16
    length: int = 2048
    data: int = 1
    fsdp: int = 0
    tensor: int = 0
    runs: int = 0
    run_groups: int = 1
    accumulate: int = 1
    activations: tuple[Divided, ...] = ALL
    place_delta: bool = True


@dataclass(frozen=True)
class Plan:
    """What the compiler says; bytes are those of one device.

    Attributes:
      config: what was asked.
      mesh: sizes of the axes.
      base, delta, optimiser, batch: bytes of the step's arguments as they are divided; a leaf that the step does not
        read (a base that full fine-tuning replaces) counts nothing.
      arguments: the same as the compiler counts them, padding included.
      temporaries: activations, gradients, gathered weights.
      total: what the program takes: arguments, results that are no donated argument, temporaries, code. Where the
        compiler refused it, the bytes that it wanted.
      limit: what the device has.
      fits: whether the compiler took it and the total is within the limit.
      collectives: by kind, in one step.
      cycles: the compiler's estimate of the step without waiting for other devices (TPU; 0 where there is none).
      seconds: the cycles at the device's clock; 0 where either is unknown.
      compile_seconds: lowering and compiling.
    """

    config: PlanConfig
    mesh: dict[str, int]
    base: int
    delta: int
    optimiser: int
    batch: int
    arguments: int
    temporaries: int
    total: int
    limit: int
    fits: bool
    collectives: dict[str, hlo.Collective]
    cycles: int
    seconds: float
    compile_seconds: float


class Pod(NamedTuple):
    """A slice: kind of device, shape as the compiler writes it, number of devices."""

    kind: str
    shape: str
    count: int


def read_pod(text: str) -> Pod:
    """`v5e:16x16`, `v5p:2x4x4`, `h100:8`.

    Raises:
      PlanError: another form, or a kind that is not in `aot.TARGETS`.
    """
    kind, _, shape = text.partition(":")
    if kind not in aot.TARGETS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise PlanError(
            f"pod {text!r}{trees.near(kind, aot.TARGETS)}: write kind:shape, as v5e:16x16, v5p:2x4x4 or h100:8; kinds: "
            f"{', '.join(aot.TARGETS)}"
        )
    count = math.prod(map(int, shape.split("x")))
    if count < 1:
        raise PlanError(f"pod {text!r} has no devices")
    if count > 1:
        count *= aot.TARGETS[kind].cores
    if aot.TARGETS[kind].platform == "cuda" and "x" not in shape:
        shape = f"1x1x{shape}"
    return Pod(kind, shape, count)


def mesh_of(config: PlanConfig, model: Any) -> Mesh:
    """The (run,) data, fsdp, tensor mesh of devices that are not here.

    Raises:
      PlanError: axes whose product is not the number of devices.
      AotError: a slice or compiler that there is not.
    """
    pod = read_pod(config.pod)
    groups = config.run_groups if config.runs else 1
    each = pod.count // groups
    heads = getattr(model.config, "kv_heads", None) or model.config.heads
    tensor = config.tensor or max(n for n in (1, 2, 4, 8, 16) if n * n <= each and heads % n == 0 and each % n == 0)
    fsdp = config.fsdp or max(each // (config.data * tensor), 1)
    sizes = {AXIS: groups, "data": config.data, "fsdp": fsdp, "tensor": tensor}
    if math.prod(sizes.values()) != pod.count:
        asked = ", ".join(f"{name}={n}" for name, n in sizes.items())
        raise PlanError(f"{asked} make {math.prod(sizes.values())} devices; {config.pod} has {pod.count}")
    if not config.runs:
        del sizes[AXIS]
    return aot.device_mesh(pod.kind, tuple(sizes.values()), tuple(sizes), pod.shape if pod.count > 1 else "")


# ------------------------------------------------------------------------------------------------ the step's arguments


class Parts(NamedTuple):
    """The step and its arguments as shapes with their places."""

    step: Any
    state: PyTree
    params: PyTree
    batch: Any


def model_for(config: PlanConfig) -> tuple[Any, Task]:
    """The model without parameters, and what it is trained for.

    Raises:
      PlanError: no decoder and no classifier.
      ModelFolderError: as `presets.preset`.
    """
    hf = preset(config.model)
    model = model_from_config(hf, scan=True, remat=True, dtype="bfloat16", param_dtype="bfloat16")
    if isinstance(model, Decoder):
        return model, language_modelling()
    if isinstance(model, ImageClassifier):
        return model, image_classification()
    if isinstance(model, SequenceClassifier):
        return model, text_classification()
    raise PlanError(
        f"{config.model} is a {type(model).__name__}: plans are made for decoders and for text and image classifiers; "
        "name such a class under `architectures`"
    )


def batch_for(config: PlanConfig, model: Any) -> Any:
    """A batch as shapes."""

    def of(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    n = config.rows
    rest: Any = (of(jnp.int32, n), of(jnp.float32, n), of(jnp.int32, n))
    if isinstance(model, ImageClassifier):
        return data.ImageBatch(of(jnp.float32, n, *model.config.image, model.config.channels), *rest)
    ids: Any = of(jnp.int32, n, config.length)
    return data.TextBatch(ids, ids, *rest)


def parts_of(config: PlanConfig, model: Any, task: Task, mesh: Mesh) -> Parts:
    """Everything that is compiled, as shapes.

    Raises:
      PlanError: rows that the mesh does not divide.
      ConfigError, ValueError: as the method's factory and `make_step`.
    """
    divided = math.prod(mesh.shape[a] for a in BATCH)
    if config.rows < 1 or config.rows % (divided * config.accumulate):
        raise PlanError(
            f"{config.rows} rows do not divide over data x fsdp = {divided} devices and {config.accumulate} parts: take a "
            f"multiple of {divided * config.accumulate}, or another mesh"
        )
    batch = batch_for(config, model)
    inputs = batch[:1] if isinstance(batch, data.ImageBatch) else batch[:2]
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), inputs)
    params = jax.eval_shape(model.init, jax.random.key(0), *model.dummy_inputs())
    # What "auto" would choose there: the kernel on one TPU; the compiler cannot divide it between several.
    alone = mesh.size == 1 and aot.TARGETS[read_pod(config.pod).kind].platform == "tpu"
    adapted = adapt(model.apply, method_for(config, model), backend="pallas" if alone else "xla")
    adapted = adapted._replace(apply=shard_activations(adapted.apply, mesh, config.activations))

    def start(params: PyTree) -> PyTree:
        return adapted.init(jax.random.key(0), params, *jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example))

    if config.runs:
        step, state = _sweep(config, adapted, task, start, params)
        specs = jax.tree.map(lambda x: P(AXIS), state)
    else:
        optimiser = optax.adamw(1e-4)
        state = jax.eval_shape(lambda p: create(start(p), optimiser), params)
        step = make_step(adapted, task, optimiser, accumulate=config.accumulate)
        specs = state_specs(mesh, state, params) if config.place_delta else jax.tree.map(lambda x: P(), state)
    rows = jax.tree.map(lambda x: fitting(mesh, (BATCH, *[None] * (x.ndim - 1)), x.shape), batch)
    return Parts(
        step,
        _placed(mesh, state, specs),
        _placed(mesh, params, base_specs(mesh, params)),
        _placed(mesh, batch, rows),
    )


def method_for(config: PlanConfig, model: Any) -> Method:
    """The method; a classifier's new head is trained along."""
    method = entry(config.method).factory(**parse_options(config.method, config.options))
    return method if isinstance(model, Decoder) or config.method in ("full", "head") else chain(method, head())


def _sweep(config: PlanConfig, adapted: Adapted, task: Task, start: Any, params: PyTree) -> tuple[Any, PyTree]:
    """The step of `runs` runs that differ in their learning rate, and their states as shapes."""
    if config.runs % config.run_groups:
        raise PlanError(f"{config.runs} runs do not divide over {config.run_groups} groups of devices")

    def make(setting: Any) -> Any:
        run = run_of(adapted, optax.adamw(setting["rate"]), task, accumulate=config.accumulate)
        return run._replace(init=lambda p: create(start(p), optax.adamw(setting["rate"])))

    runs = side_by_side(make, axis=AXIS)
    settings = {"rate": jax.ShapeDtypeStruct((config.runs,), jnp.float32)}
    return runs.step, jax.eval_shape(runs.init, settings, params)


def _placed(mesh: Mesh, tree: PyTree, specs: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree, specs
    )


# ------------------------------------------------------------------------------------------------ compiling


def prepare() -> None:
    """For a process that only plans: no device is looked for, and no program kept, since one for a device that is not here
    cannot be read back. To be called before anything is computed."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)


def plan(config: PlanConfig) -> Plan:
    """Compiles the step for the pod.

    Raises:
      PlanError: rows, axes or a model that do not fit together.
      AotError: a slice that there is not, or a compiler that is not installed.
      ModelFolderError, ConfigError, PatternError: as the model's and the method's makers.
    """
    model, task = model_for(config)
    mesh = mesh_of(config, model)
    parts = parts_of(config, model, task, mesh)
    kind = read_pod(config.pod).kind
    limit = aot.TARGETS[kind].memory
    begin = time.perf_counter()
    places = jax.tree.map(lambda x: x.sharding, parts.state)
    metrics = NamedSharding(mesh, P(AXIS) if config.runs else P())
    traced = jax.jit(parts.step, donate_argnums=0, out_shardings=(places, metrics)).trace(*parts[1:])
    sizes = _argument_bytes(parts, traced.jaxpr.jaxpr)
    fixed: Any = dict(config=config, mesh=dict(mesh.shape), limit=limit, **sizes)
    try:
        program = aot.compile_lowered(traced.lower())
    except jax.errors.JaxRuntimeError as error:
        arguments = sum(sizes.values())
        wanted = wanted_bytes(str(error), arguments)
        if wanted is None:
            raise
        none: Any = dict(collectives={}, cycles=0, seconds=0.0, compile_seconds=time.perf_counter() - begin)
        return Plan(**fixed, arguments=arguments, temporaries=wanted - arguments, total=wanted, fits=False, **none)
    spent = time.perf_counter() - begin
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None
    assert text is not None
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    cycles = hlo.estimated_cycles(text)
    return Plan(
        **fixed,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        total=total,
        fits=total <= limit,
        collectives=hlo.collectives(text),
        cycles=cycles,
        seconds=cycles / CLOCK[kind] if kind in CLOCK else 0.0,
        compile_seconds=spent,
    )


def wanted_bytes(message: str, arguments: int) -> int | None:
    """The bytes that a compiler wanted when it refused a program; None where it refused for another reason.

    The message says `Used 23.54G of 15.75G hbm` of all, or, where they alone are too much, `temporaries (4.05T)` of
    those; G is 2^30.
    """
    size = r"([\d.]+)([KMGT]?)"
    whole, part = re.search(rf"Used {size} of \S+ hbm", message), re.search(rf"temporaries \({size}\)", message)
    if not (found := whole or part):
        return None
    wanted = round(float(found.group(1)) * 2 ** {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[found.group(2)])
    return wanted if whole else wanted + arguments


def _argument_bytes(parts: Parts, jaxpr: Any) -> dict[str, int]:
    """Bytes on one device of what the program reads: jit leaves out arguments that it does not."""
    read = {id(v) for e in jaxpr.eqns for v in e.invars} | {id(v) for v in jaxpr.outvars}
    out: dict[str, int] = {"base": 0, "delta": 0, "optimiser": 0, "batch": 0}
    leaves = jax.tree_util.tree_flatten_with_path(tuple(parts[1:]))[0]
    for variable, (path, x) in zip(jaxpr.invars, leaves, strict=True):
        if id(variable) not in read:
            continue
        argument = ("delta", "base", "batch")[path[0].idx]
        if "optimiser" in trees.path_string(path).split("/"):
            argument = "optimiser"
        out[argument] += math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
    return out
