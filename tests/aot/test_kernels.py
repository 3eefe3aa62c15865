"""Every kernel through the real compilers of TPU v4, v5e, v5p, v6e and H100: what they refuse would be refused there.

Needs the extra `aot`; nothing runs. A kernel enters by a case: a name, a function of arrays, their shapes.
"""

import functools
import itertools
import re

import attention_cases
import grouped_cases
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpeft import aot
from jaxpeft.kernels import low_rank_matmul
from jaxpeft.kernels.workloads import PRODUCTS

pytestmark = pytest.mark.aot


def gradient_of(function):
    """The gradient with respect to all operands but the second, a frozen weight."""

    def loss(*operands):
        return (function(*operands).astype(jnp.float32) ** 2).sum()

    return lambda *operands: jax.grad(loss, argnums=tuple(i for i in range(len(operands)) if i != 1))(*operands)


def calls(program):
    """How many kernels a compiled program runs."""
    text = program.as_text()
    return text.count("tpu_custom_call") + text.count("__gpu$xla.gpu.triton")


def products():
    """Each product of a real layer, forward and backward."""
    for p, dtype in itertools.product(PRODUCTS, (jnp.bfloat16, jnp.float32)):
        shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((p.m, p.k), (p.k, p.n), (p.k, p.r), (p.r, p.n))]
        name = f"low_rank_matmul, {p.name}, {jnp.dtype(dtype).name}"
        yield f"{name}, backward", gradient_of(low_rank_matmul), shapes


def cases():
    """All of them; a forward pass that is part of another case's gradient is not compiled twice."""
    every = [*products(), *attention_cases.CASES, *grouped_cases.CASES]
    names = {name for name, *_ in every}
    for name, function, shapes in every:
        title, _, which = name.rpartition(", ")
        if which == "forward" and f"{title}, backward" in names:
            continue
        # A gradient takes the forward kernel and one more at least; on GPU the hashed product's is plain JAX.
        least = 2 if which == "backward" and not name.startswith("hashed") else 1
        yield pytest.param(function, shapes, least, id=name)


@pytest.mark.parametrize("kind", list(aot.TARGETS))
@pytest.mark.parametrize(("function", "shapes", "least"), cases())
def test_the_kernels_of_real_layers_compile(kind, function, shapes, least):
    assert calls(aot.compile_for(kind, function, *shapes)) >= least


@pytest.mark.parametrize("kind", list(aot.TARGETS))
def test_dropout_inside_the_kernel_compiles(kind):
    operands = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in [(256, 384), (384, 640), (384, 8), (8, 640)]]
    drop = functools.partial(low_rank_matmul, key=jax.random.key(0), dropout=0.1)
    assert calls(aot.compile_for(kind, gradient_of(drop), *operands)) >= 2


def test_a_kernel_stands_inside_shard_map_on_a_mesh_of_chips():
    mesh = aot.device_mesh("v5e", (4,), ("data",), "2x2")
    specs = (P("data"), P(), P(), P())

    def loss(x, w, a, b):
        return jax.lax.psum((low_rank_matmul(x, w, a, b, 2.0).astype(jnp.float32) ** 2).sum(), "data")

    gradients = jax.grad(loss, argnums=(0, 2, 3))  # with respect to x the kernel is read across
    step = jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=(P("data"), P(), P()))
    shapes = [(1024, 384), (384, 384), (384, 8), (8, 384)]
    operands = [
        jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for s, spec in zip(shapes, specs)
    ]
    program = aot.compile_lowered(jax.jit(step).lower(*operands))
    assert calls(program) >= 2
    assert "all-reduce" in program.as_text()


@pytest.mark.parametrize("kind", [k for k, t in aot.TARGETS.items() if t.platform == "tpu"])
def test_memory_and_devices_of_a_tpu_are_what_its_compiler_says(kind):
    target = aot.TARGETS[kind]
    assert len(aot.topology(kind).devices) == 4 * target.cores
    rows = target.memory // (4 * 8192)
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:  # a sort needs room beside what it sorts
        aot.compile_for(kind, lambda x: jnp.sort(x, axis=0), jax.ShapeDtypeStruct((rows, 8192), jnp.float32))
    (gib,) = re.findall(r"available HBM \(([\d.]+)G\)", str(refused.value))
    assert target.memory == int(float(gib) * 2**30)


def test_an_unknown_device_or_slice_is_named():
    with pytest.raises(aot.AotError, match="v5e"):
        aot.topology("v5")
    with pytest.raises(aot.AotError, match="7x7"):
        aot.topology("v5e", "7x7")
    with pytest.raises(aot.AotError, match="needs 9"):
        aot.device_mesh("v5e", (9,))


@pytest.mark.parametrize("kind", ["v5e", "h100"])
def test_a_persistent_cache_neither_keeps_nor_gives_what_only_a_device_could_read(kind, tmp_path):
    options = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
        for _ in range(2):
            aot.compile_for(kind, lambda x: jnp.sin(x) @ x.T, shape)
        assert not list(tmp_path.iterdir())
        jax.jit(lambda x: jnp.cos(x) + 3)(jnp.ones(5)).block_until_ready()
        assert list(tmp_path.iterdir())  # for the machine's own device it is on again
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
