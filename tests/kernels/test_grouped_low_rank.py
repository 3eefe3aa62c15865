"""The grouped low-rank product: kernel against a plain sum in float64 by interpretation, its gradients, and its ids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxpeft.kernels import grouped_low_rank, low_rank_matmul
from jaxpeft.kernels.grouped_blocks import GroupedBlocks, slots
from jaxpeft.kernels.platforms import KernelError

KERNELS = ("tpu", "gpu")
SIDE = st.sampled_from([1, 2, 7, 8, 13, 33])
pytestmark = pytest.mark.usefixtures("quick")


def operands(b, t, k, n, r, groups, dtype=np.float64, seed=0):
    """x, w, a, b, ids (some of no group, some groups empty) and scales; t of None is one row an example, without an axis."""
    rng = np.random.default_rng(seed)
    lead = (b,) if t is None else (b, t)
    x, w, a, up, scale = (
        jnp.asarray(rng.normal(size=s), dtype) for s in [(*lead, k), (k, n), (groups, k, r), (groups, r, n), (groups,)]
    )
    return x, w, a, up, jnp.asarray(rng.integers(-1, groups + 1, size=b), jnp.int32), scale


def plain(x, w, a, b, scale, group):
    rows = [x[i] @ w for i in range(x.shape[0])]
    for i, g in enumerate(np.asarray(group)):
        if 0 <= g < a.shape[0]:
            rows[i] += scale[g] * (x[i] @ a[g]) @ b[g]
    return jnp.stack(rows)


def gradients(function, *arguments):
    """The value, and gradients of a sum that weighs every entry differently."""

    def loss(*arguments):
        y = function(*arguments)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum()

    return function(*arguments), jax.grad(loss, argnums=tuple(range(len(arguments))))(*arguments)


def with_ids(group, **options):
    return lambda x, w, a, b, scale: grouped_low_rank(x, w, a, b, group, scale, **options)


@given(
    b=st.sampled_from([1, 2, 5, 9]),
    t=st.sampled_from([None, 1, 2, 3, 8, 13]),
    k=SIDE,
    n=SIDE,
    r=st.sampled_from([1, 3, 16]),
    groups=st.sampled_from([1, 3, 40]),
)
@example(b=1, t=1, k=1, n=1, r=1, groups=1)
@example(b=5, t=7, k=200, n=150, r=3, groups=3)
@settings(max_examples=2)
@pytest.mark.parametrize("backend", [*KERNELS, "xla"])
def test_product_and_gradients_equal_a_sum_example_by_example_in_float64(backend, b, t, k, n, r, groups):
    with jax.enable_x64(True):
        *arrays, group, scale = operands(b, t, k, n, r, groups)
        # Blocks under the sizes, so that sums over several blocks, their tails and examples across a border are met.
        small = backend == "tpu" and min(k, n) > 128
        ours = with_ids(group, backend=backend, blocks=GroupedBlocks(16, 128, 128) if small else None)
        got = jax.jit(functools.partial(gradients, ours))(*arrays, scale)
        want = jax.jit(functools.partial(gradients, functools.partial(plain, group=group)))(*arrays, scale)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            # Sums of up to 200 products in another order.
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-11 * max(1, float(jnp.abs(y).max())))


@pytest.mark.parametrize("backend", [*KERNELS, "xla"])
def test_gradients_agree_with_finite_differences(backend):
    with jax.enable_x64(True):
        *arrays, group, scale = operands(3, 2, 5, 4, 2, 2)
        check_grads(jax.jit(with_ids(group, backend=backend)), (*arrays, scale), order=1, modes=("rev",))


@pytest.mark.parametrize("backend", KERNELS)
def test_bfloat16_is_as_near_to_the_exact_product_as_plain_jax(backend):
    x, w, a, b, group, scale = operands(4, 8, 96, 64, 4, 3, jnp.bfloat16)
    exact = plain(*(z.astype(jnp.float32) for z in (x, w, a, b, scale)), group)
    error = lambda y: float(jnp.abs(y.astype(jnp.float32) - exact).max())
    got = grouped_low_rank(x, w, a, b, group, scale, backend=backend)
    assert got.dtype == jnp.bfloat16
    # One rounding of the result (2⁻⁹ of the largest entry), and that of s h in the small term.
    assert error(got) <= 1.05 * error(grouped_low_rank(x, w, a, b, group, scale, backend="xla")) + 1e-6
    assert error(got) <= 2**-7 * float(jnp.abs(exact).max())


@pytest.mark.parametrize("backend", [*KERNELS, "xla"])
def test_one_group_for_all_is_the_low_rank_product(backend):
    x, w, a, b, *_ = operands(3, 5, 12, 10, 2, 1, np.float32)
    got = grouped_low_rank(x, w, a, b, jnp.zeros(3, int), 0.5, backend=backend)
    np.testing.assert_allclose(got, low_rank_matmul(x, w, a[0], b[0], 0.5, backend="xla"), atol=1e-5)


@pytest.mark.parametrize("backend", [*KERNELS, "xla"])
def test_ids_outside_the_groups_take_the_base_alone_and_leave_factors_untouched(backend):
    x, w, a, b, *_ = operands(4, 2, 12, 10, 2, 3, np.float32)
    broken = jnp.full_like(a, jnp.nan)
    run = lambda a, b: grouped_low_rank(x, w, a, b, jnp.array([-1, -7, 3, 1000]), backend=backend)
    np.testing.assert_allclose(run(broken, broken.swapaxes(1, 2)[..., :10]), x @ w, atol=1e-5)
    assert not np.any(jax.grad(lambda a: run(a, b).sum())(a))


@pytest.mark.parametrize("backend", [*KERNELS, "xla"])
def test_a_group_that_diverged_spoils_its_own_examples_only(backend):
    x, w, a, b, *_ = operands(4, 3, 12, 10, 2, 3, np.float32)
    group = jnp.array([0, 1, 2, 0])
    bad = lambda z: z.at[1].set(jnp.nan)
    y = grouped_low_rank(x, w, bad(a), bad(b), group, bad(jnp.ones(3)), backend=backend)
    assert np.isnan(y[1]).all()
    np.testing.assert_allclose(
        y[jnp.array([0, 2, 3])], plain(x, w, a, b, jnp.ones(3), group)[np.array([0, 2, 3])], atol=1e-4
    )


@pytest.mark.parametrize("backend", [*KERNELS, "xla"])
def test_the_order_of_examples_and_padded_ranks_change_nothing(backend):
    x, w, a, b, group, scale = operands(5, 3, 12, 10, 2, 3, np.float32)
    y = grouped_low_rank(x, w, a, b, group, scale, backend=backend)
    order = jnp.argsort(group)
    np.testing.assert_allclose(
        grouped_low_rank(x[order], w, a, b, group[order], scale, backend=backend), y[order], atol=1e-5
    )
    wider = jnp.pad(a, [(0, 0), (0, 0), (0, 3)]), jnp.pad(b, [(0, 0), (0, 3), (0, 0)])
    np.testing.assert_allclose(grouped_low_rank(x, w, *wider, group, scale, backend=backend), y, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_vmapped_population_of_groups_shares_the_weight(backend):
    x, w, a, b, group, scale = operands(3, 2, 12, 10, 2, 3, np.float32)
    many = jnp.stack([a, 2 * a])
    ids = jnp.stack([group, jnp.flip(group)])
    call = lambda a, group: gradients(lambda a: grouped_low_rank(x, w, a, b, group, scale, backend=backend), a)
    together = jax.vmap(call)(many, ids)
    for i in range(2):
        for u, v in zip(jax.tree.leaves(together), jax.tree.leaves(call(many[i], ids[i]))):
            np.testing.assert_allclose(u[i], v, atol=1e-4)


@pytest.mark.parametrize("backend", [*KERNELS, "xla"])
def test_examples_sharded_over_a_mesh_give_the_same_values_and_gradients(backend, mesh):
    x, w, a, b, group, scale = operands(16, 2, 12, 10, 2, 3, np.float32)

    def loss(a, b, x, group):
        return (grouped_low_rank(x, w, a, b, group, scale, backend=backend) ** 2).sum()

    # Pallas' interpreter does not follow what varies over a mesh; the compiled kernels do (tests/aot).
    checked = backend == "xla"

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("d"), P("d")), out_specs=(P(), P()), check_vma=checked
    )
    def sharded(a, b, x, group):
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(a, b, x, group)
        return jax.lax.psum(value, "d"), grads if checked else jax.lax.psum(grads, "d")

    value, grads = jax.jit(sharded)(a, b, x, group)
    want, want_grads = jax.value_and_grad(loss, argnums=(0, 1))(a, b, x, group)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for u, v in zip(grads, want_grads):
        np.testing.assert_allclose(u, v, rtol=1e-4, atol=1e-3)


@given(m=st.integers(1, 12), block=st.integers(1, 300), t=st.integers(1, 40))
@settings(max_examples=100)
def test_slots_are_the_most_examples_that_a_block_touches(m, block, t):
    m = m * t
    touched = [len({row // t for row in range(i, min(m, i + block))}) for i in range(0, m, block)]
    assert max(touched) <= slots(m, block, t) <= max(touched) + 1


def test_auto_is_plain_jax_on_a_cpu_also_where_no_kernel_could_run():
    x, w, a, b, group, scale = operands(3, 2, 12, 10, 2, 3, np.float32)
    auto = functools.partial(grouped_low_rank, x, w, a, b, group, scale)
    np.testing.assert_array_equal(auto(), auto(backend="xla"))
    np.testing.assert_array_equal(auto(vmem_bytes=100), auto(backend="xla"))


def test_empty_batches_keep_their_shape():
    x, w, a, b, group, _ = operands(3, 2, 12, 10, 2, 3, np.float32)
    assert grouped_low_rank(x[:0], w, a, b, group[:0]).shape == (0, 2, 10)
    assert grouped_low_rank(x[:, :0], w, a, b, group).shape == (3, 0, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(w=(6, 4)), "expected"),
        (dict(x=(5,)), "expected"),
        (dict(a=(3, 2)), "expected"),
        (dict(b=(2, 2, 4)), "expected"),
        (dict(group=(2,)), "expected"),
        (dict(scale=jnp.ones(2)), "expected"),
        (dict(a=(0, 5, 2), b=(0, 2, 4)), "no groups"),
        (dict(a=(3, 5, 300), b=(3, 300, 4)), "rank 300"),
        (dict(backend="metal"), "metal"),
        (dict(backend="tpu", blocks=GroupedBlocks(3, 5, 3)), "block n of 3"),
        (dict(backend="tpu", vmem_bytes=100), "fit 100 bytes"),
    ],
)
def test_a_call_that_cannot_run_says_why(change, message):
    shapes = dict(x=(3, 5), w=(5, 4), a=(3, 5, 2), b=(3, 2, 4), group=(3,))
    arrays = {n: jnp.zeros(change.get(n, s), int if n == "group" else float) for n, s in shapes.items()}
    rest = {n: v for n, v in change.items() if n not in shapes}
    with pytest.raises(KernelError, match=message):
        grouped_low_rank(**arrays, **rest)


@pytest.mark.parametrize(
    ("m", "t", "blocks", "message"),
    [
        (64, 1, GroupedBlocks(64, 8, 8), "touches 64 examples"),
        (2**18, 1, GroupedBlocks(16, 8, 8), "table"),
        (1024, 1024, GroupedBlocks(1024, 4096, 4096), "VMEM"),
    ],
)
def test_blocks_that_the_platform_would_refuse_say_why(m, t, blocks, message):
    with pytest.raises(KernelError, match=message):
        blocks.check_tpu(m, blocks.k, blocks.n, 2, t, jnp.float32, 2**24)


def test_dtypes_that_do_not_fit_are_refused():
    x, w, a, b, group, _ = operands(3, 2, 12, 10, 2, 3, np.float32)
    with pytest.raises(KernelError, match="int32"):
        grouped_low_rank(x.astype(jnp.int32), w, a, b, group)
    with pytest.raises(KernelError, match="float32"):
        grouped_low_rank(x, w, a, b, group.astype(jnp.float32))
