"""The hashed product: its mapping against the paper's words, kernel against a dense weight in float64, its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxpeft.kernels import hashed_matmul, random_fold
from jaxpeft.kernels.hashed_matmul import HashedBlocks
from jaxpeft.kernels.platforms import KernelError
from jaxpeft.kernels.random_fold import Fold, materialise

KERNELS = ("tpu", "gpu")
pytestmark = pytest.mark.usefixtures("quick")
made = jax.jit(materialise, static_argnames=("shape", "offset", "align"))


def mix(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> shift) * factor % 2**32
    return x ^ x >> 16


def in_words(memory, seed, shape, offset, align):
    """The mapping as the module states it, element by element, in numbers without a limit."""
    size, w = len(memory), np.zeros(shape)
    for e in range(w.size):
        i = offset + e
        turn = align * (mix(i // size % 2**32 ^ mix(seed ^ 0x9E3779B9)) % (size // align))
        sign = -1 if mix(i % 2**32 ^ mix(seed ^ 0x85EBCA6B)) % 2 else 1
        w.flat[e] = sign * memory[(turn + i % size) % size]
    return w


def operands(m, k, size, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(m, k)), dtype), jnp.asarray(rng.normal(size=size), dtype)


def gradients(function, *arguments):
    """The value, and gradients of a sum that weighs every entry differently."""

    def loss(*arguments):
        y = function(*arguments)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum()

    return function(*arguments), jax.grad(loss, argnums=tuple(range(len(arguments))))(*arguments)


def dense(shape, **options):
    return lambda x, memory, scale: x @ materialise(memory, 5, shape, scale=scale, **options)


def hashed(shape, backend, **options):
    return lambda x, memory, scale: hashed_matmul(x, memory, 5, shape, scale=scale, backend=backend, **options)


def same(got, want, atol):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol * max(1, float(jnp.abs(y).max())))


# --------------------------------------------------------------------------------------------------------- the mapping


@given(
    k=st.integers(1, 9),
    n=st.integers(1, 9),
    blocks=st.integers(1, 12),
    align=st.sampled_from([1, 2, 4]),
    offset=st.sampled_from([0, 1, 8, 12, 1000, 2**32 - 16, 5 * 2**33]),
    seed=st.sampled_from([0, 7, 2**32 - 1]),
)
@settings(max_examples=12)
def test_the_weight_is_what_the_mapping_says_in_words(k, n, blocks, align, offset, seed):
    memory = jnp.arange(1.0, blocks * align + 1)
    got = made(memory, jnp.uint32(seed), (k, n), offset=offset, align=align)
    np.testing.assert_array_equal(got, in_words(np.asarray(memory), seed, (k, n), offset, align))


@pytest.mark.parametrize(("size", "align"), [(12, 4), (35, 1), (128, 128)])
def test_every_place_is_read_equally_often_within_one(size, align):
    w = jnp.abs(made(jnp.arange(1.0, size + 1), 3, (10, 12), align=align))
    reads = np.bincount(np.asarray(w, int).ravel(), minlength=size + 1)[1:]
    assert set(reads) <= {120 // size, -(-120 // size)}
    assert reads.sum() == 120


def test_a_memory_of_the_models_length_is_a_permutation_with_signs():
    w = made(jnp.arange(1.0, 121), 3, (10, 12), align=1)
    np.testing.assert_array_equal(np.sort(np.abs(w).ravel()), np.arange(1, 121))
    assert 30 < (w < 0).sum() < 90


def test_weights_behind_one_another_are_one_flat_model():
    memory = jnp.arange(1.0, 33)
    whole = made(memory, 9, (12, 10), align=1)
    parts = [made(memory, 9, (4, 10), offset=40 * i, align=1) for i in range(3)]
    np.testing.assert_array_equal(jnp.concatenate(parts), whole)


def test_seeds_give_other_rotations_and_signs():
    memory = jnp.arange(1.0, 257)
    one, two = (made(memory, s, (16, 64), align=1) for s in (1, 2))
    assert (jnp.abs(one) == jnp.abs(two)).mean() < 0.3
    assert 0.4 < (jnp.sign(one) == jnp.sign(two)).mean() < 0.6


# --------------------------------------------------------------------------------------------------------- the product


@given(
    m=st.sampled_from([1, 2, 9, 33]),
    k=st.sampled_from([1, 7, 16, 29]),
    n=st.sampled_from([1, 5, 64, 130]),
    size=st.sampled_from([1, 3, 40, 1000]),
    offset=st.sampled_from([0, 11]),
)
@settings(max_examples=3)
@pytest.mark.parametrize("backend", ["gpu", "xla"])
def test_any_shape_equals_the_dense_weight_in_float64(backend, m, k, n, size, offset):
    with jax.enable_x64(True):
        x, memory = operands(m, k, size)
        options = dict(offset=offset, align=1)
        got = jax.jit(functools.partial(gradients, hashed((k, n), backend, **options)))(x, memory, 0.7)
        same(got, jax.jit(functools.partial(gradients, dense((k, n), **options)))(x, memory, 0.7), 1e-11)


# A memory far under a row's length and one over the weight's; one tile and many, a tail of rows, rows that are no block.
@example(m=20, k=256, n=384, size=640, offset=1280, blocks=HashedBlocks(8, 128, 128))
@given(
    m=st.sampled_from([1, 5]),
    k=st.sampled_from([1, 7, 13]),
    n=st.sampled_from([128, 256]),
    size=st.sampled_from([128, 384, 4096]),
    offset=st.sampled_from([0, 384]),
    blocks=st.none(),
)
@settings(max_examples=3)
def test_the_tpu_kernel_equals_the_dense_weight_in_float64(m, k, n, size, offset, blocks):
    with jax.enable_x64(True):
        x, memory = operands(m, k, size)
        ours = hashed((k, n), "tpu", offset=offset, blocks=blocks)
        got = jax.jit(functools.partial(gradients, ours))(x, memory, 0.7)
        same(got, jax.jit(functools.partial(gradients, dense((k, n), offset=offset)))(x, memory, 0.7), 1e-11)


@pytest.mark.parametrize("backend", [*KERNELS, "xla"])
def test_gradients_agree_with_finite_differences(backend):
    with jax.enable_x64(True):
        check_grads(jax.jit(hashed((3, 128), backend)), (*operands(2, 3, 128), 1.3), order=1, modes=("rev",))


@pytest.mark.parametrize("backend", KERNELS)
def test_bfloat16_is_as_near_to_the_exact_product_as_plain_jax(backend):
    x, memory = operands(8, 32, 256, jnp.bfloat16)
    exact = dense((32, 128))(x.astype(jnp.float32), memory.astype(jnp.float32), 1.0)
    error = lambda y: float(jnp.abs(y.astype(jnp.float32) - exact).max())
    got = hashed((32, 128), backend)(x, memory, 1.0)
    assert got.dtype == jnp.bfloat16
    # One rounding of the result, 2⁻⁹ of the largest entry.
    assert error(got) <= 1.05 * error(hashed((32, 128), "xla")(x, memory, 1.0)) + 1e-6
    assert error(got) <= 2**-8 * float(jnp.abs(exact).max())


@pytest.mark.parametrize("backend", [*KERNELS, "xla"])
def test_a_vmapped_population_of_memories_and_seeds_is_each_of_them(backend):
    x, memory = operands(4, 6, 256, np.float32)
    many, seeds = jnp.stack([memory, 2 * memory]), jnp.array([3, 4])
    run = lambda memory, seed: gradients(lambda z: hashed_matmul(x, z, seed, (6, 128), backend=backend), memory)
    together = jax.vmap(run)(many, seeds)
    for i in range(2):
        same(jax.tree.map(lambda z: z[i], together), run(many[i], seeds[i]), 1e-5)


@pytest.mark.parametrize("backend", [*KERNELS, "xla"])
def test_rows_sharded_over_a_mesh_give_the_same_values_and_gradients(backend, mesh):
    x, memory = operands(16, 6, 256, np.float32)

    def loss(memory, x):
        return (hashed_matmul(x, memory, 3, (6, 128), backend=backend) ** 2).sum()

    # Pallas' interpreter does not follow what varies over a mesh; the compiled kernels do (tests/aot).
    checked = backend == "xla"

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("d")), out_specs=(P(), P()), check_vma=checked)
    def sharded(memory, x):
        value, grad = jax.value_and_grad(loss)(memory, x)
        return jax.lax.psum(value, "d"), grad if checked else jax.lax.psum(grad, "d")

    value, grad = jax.jit(sharded)(memory, x)
    want, want_grad = jax.value_and_grad(loss)(memory, x)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    same(grad, want_grad, 1e-5)


def test_plain_jax_goes_by_slabs_and_loses_no_row():
    # 2¹⁸ elements a slab: three slabs of 4,096 columns, the last of them overlapping the second.
    shape = (150, 4096)
    x, memory = operands(2, shape[0], 1280, np.float32)
    ours = functools.partial(gradients, hashed(shape, "xla"))
    same(jax.jit(ours)(x, memory, 0.5), gradients(dense(shape), x, memory, 0.5), 1e-5)
    assert "150,4096" not in jax.jit(ours).lower(x, memory, 0.5).compile().as_text()


def test_auto_is_plain_jax_on_a_cpu_also_where_no_kernel_could_run():
    for shape, align, options in (((3, 128), 128, {}), ((3, 5), 1, {}), ((3, 128), 128, dict(vmem_bytes=100))):
        x, memory = operands(2, 3, 256, np.float32)
        auto = functools.partial(hashed_matmul, x, memory, 3, shape, align=align)
        np.testing.assert_array_equal(auto(**options), auto(backend="xla"))


def test_leading_axes_and_empty_batches_keep_their_shape():
    x, memory = operands(6, 3, 128, np.float32)
    run = lambda x: hashed_matmul(x, memory, 3, (3, 4))
    assert run(x.reshape(2, 3, 3)).shape == (2, 3, 4)
    assert run(x[0]).shape == (4,)
    assert run(x[:0]).shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(shape=(6, 128)), "expected"),
        (dict(memory=jnp.ones((2, 64))), "expected"),
        (dict(memory=jnp.ones(0)), "0 elements"),
        (dict(memory=jnp.ones(100)), "multiple of align"),
        (dict(memory=jnp.ones(128, int)), "floating-point"),
        (dict(offset=-1), "offset -1"),
        (dict(seed=-1), "seed -1"),
        (dict(seed=2**32), "seed 4294967296"),
        (dict(seed=jnp.ones(2, int)), "one integer"),
        (dict(seed=1.5), "one integer"),
        (dict(backend="metal"), "metal"),
        (dict(backend="tpu", shape=(3, 100)), "multiples of 128"),
        (dict(backend="tpu", offset=64), "multiples of 128"),
        (dict(backend="tpu", align=64), "multiples of 128"),
        (dict(backend="tpu", vmem_bytes=1000), "1000 bytes of VMEM"),
        (dict(backend="tpu", blocks=HashedBlocks(2, 2, 128)), "block k of 2"),
        (dict(backend="tpu", blocks=HashedBlocks(1, 3, 128)), "block m of 1"),
        (dict(backend="tpu", blocks=HashedBlocks(2, 3, 128), vmem_bytes=1000), "limit is 1000"),
    ],
)
def test_a_call_that_cannot_run_says_why(change, message):
    call = dict(x=jnp.ones((2, 3)), memory=jnp.ones(128), seed=3, shape=(3, 128)) | change
    with pytest.raises(KernelError, match=message):
        hashed_matmul(**call)


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (lambda: Fold(2**30, (2, 2)), "under 2³⁰"),
        (lambda: Fold(128, (2**15, 2**15)), "under 2³⁰"),
        (lambda: HashedBlocks.for_tpu(8, Fold(128, (2**14, 2**10)), jnp.float32, False), "over 65536 times"),
        (lambda: HashedBlocks.for_tpu(8, Fold(2**14, (4099, 128)), jnp.float32, False), "4099 rows"),
    ],
)
def test_weights_over_the_limits_are_refused(fold, message):
    with pytest.raises(KernelError, match=message):
        fold()


def test_the_mixing_is_one_to_one():
    x = jnp.arange(2**16, dtype=jnp.uint32) * jnp.uint32(65521)
    assert len(np.unique(random_fold.mix(x))) == 2**16
