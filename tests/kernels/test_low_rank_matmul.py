"""The fused low-rank product: kernel against reference in float64 by interpretation, its gradients, and where it runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxpeft.kernels import low_rank_matmul
from jaxpeft.kernels.low_rank_matmul import Blocks
from jaxpeft.kernels.platforms import KernelError
from jaxpeft.kernels.random_bits import below, kept, words

EDGE = st.sampled_from([1, 2, 7, 8, 13, 16, 31, 33])
KERNELS = ("tpu", "gpu")
pytestmark = pytest.mark.usefixtures("quick")


def operands(m, k, n, r, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(m, k), (k, n), (k, r), (r, n)]
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def plain(x, w, a, b, scale, keep=None, rate=0.0):
    seen = x if keep is None else jnp.where(keep, x, 0) / (1 - rate)
    return x @ w + scale * (seen @ a) @ b


def gradients(function, *arguments):
    """The value, and gradients of a sum that weighs every entry differently."""

    def loss(*arguments):
        y = function(*arguments)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum()

    return function(*arguments), jax.grad(loss, argnums=tuple(range(len(arguments))))(*arguments)


@given(m=EDGE, k=EDGE, n=EDGE, r=st.sampled_from([1, 2, 5, 16]), rate=st.sampled_from([0.0, 0.4]))
@example(m=1, k=1, n=1, r=1, rate=0.0)
@example(m=40, k=300, n=260, r=5, rate=0.4)
@settings(max_examples=6)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_and_its_gradients_equal_the_plain_product_in_float64(backend, m, k, n, r, rate):
    with jax.enable_x64(True):
        args, key = operands(m, k, n, r), jax.random.key(3)
        keep = jax.random.bernoulli(key, jnp.float32(1 - rate), (m, k)) if rate else None
        # Blocks under the sizes, so that sums over several blocks and their tails are met.
        blocks = Blocks(16, 128, 128) if backend == "tpu" and min(k, n) > 128 and m > 16 else None
        ours = functools.partial(low_rank_matmul, key=key, dropout=rate, backend=backend, blocks=blocks)
        got = jax.jit(functools.partial(gradients, ours))(*args, 0.7)
        want = gradients(functools.partial(plain, keep=keep, rate=rate), *args, 0.7)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            # Sums of up to 300 products in another order.
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-11 * max(1, float(jnp.abs(y).max())))


@pytest.mark.parametrize("backend", [*KERNELS, "xla"])
def test_gradients_agree_with_finite_differences(backend):
    with jax.enable_x64(True):
        check_grads(
            functools.partial(low_rank_matmul, backend=backend, key=jax.random.key(1), dropout=0.3),
            (*operands(5, 6, 7, 2), 1.3),
            order=1,
            modes=("rev",),
        )


@pytest.mark.parametrize("backend", KERNELS)
def test_blocks_that_do_not_divide_lose_nothing(backend):
    args = operands(33, 200, 150, 3, np.float32)
    blocks = Blocks(8, 128, 128) if backend == "tpu" else Blocks(16, 32, 64)
    got = low_rank_matmul(*args, 2.0, backend=backend, blocks=blocks)
    np.testing.assert_allclose(got, plain(*args, 2.0), atol=2e-4)


@pytest.mark.parametrize("backend", KERNELS)
def test_bfloat16_is_as_near_to_the_exact_product_as_plain_jax(backend):
    args = operands(16, 256, 128, 4, jnp.bfloat16)
    exact = plain(*(x.astype(jnp.float32) for x in args), 0.5)
    error = lambda y: float(jnp.abs(y.astype(jnp.float32) - exact).max())
    kernel = low_rank_matmul(*args, 0.5, backend=backend)
    assert kernel.dtype == jnp.bfloat16
    # One rounding of the result (2⁻⁹ of the largest entry), and those of h and b in the small term.
    assert error(kernel) <= 1.05 * error(low_rank_matmul(*args, 0.5, backend="xla")) + 1e-6
    assert error(kernel) <= 2**-7 * float(jnp.abs(exact).max())


@pytest.mark.parametrize("backend", KERNELS)
def test_a_vmapped_population_of_adapters_shares_the_weight(backend):
    x, w, *_ = operands(9, 24, 17, 3, np.float32)
    many = [operands(9, 24, 17, 3, np.float32, seed)[2:] for seed in range(3)]
    a, b = (jnp.stack(p) for p in zip(*many))
    scale = jnp.array([0.5, 1.0, -2.0])
    call = lambda a, b, s: gradients(lambda a, b, s: low_rank_matmul(x, w, a, b, s, backend=backend), a, b, s)
    together = jax.vmap(call)(a, b, scale)
    for i in range(3):
        alone = call(a[i], b[i], scale[i])
        for u, v in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
            np.testing.assert_allclose(u[i], v, atol=1e-4)


@pytest.mark.parametrize("backend", [*KERNELS, "xla"])
def test_rows_sharded_over_a_mesh_give_the_same_values_and_gradients(backend, mesh):
    x, w, a, b = operands(16, 12, 10, 2, np.float32)

    def loss(a, b, x, w):
        return (low_rank_matmul(x, w, a, b, 2.0, backend=backend) ** 2).sum()

    # Pallas' interpreter does not follow what varies over a mesh; the compiled kernels do (tests/aot).
    checked = backend == "xla"

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("d"), P()), out_specs=(P(), P()), check_vma=checked
    )
    def sharded(a, b, x, w):
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(a, b, x, w)
        return jax.lax.psum(value, "d"), grads if checked else jax.lax.psum(grads, "d")

    value, grads = jax.jit(sharded)(a, b, x, w)
    want, want_grads = jax.value_and_grad(loss, argnums=(0, 1))(a, b, x, w)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for u, v in zip(grads, want_grads):
        np.testing.assert_allclose(u, v, rtol=1e-4, atol=1e-3)


def test_dropped_inputs_are_those_of_jax_random():
    key = jax.random.key(7)
    index = jnp.arange(60, dtype=jnp.uint32).reshape(6, 10)
    for keep in (0.05, 0.5, 0.9):
        np.testing.assert_array_equal(kept(*words(key), below(keep), index), jax.random.bernoulli(key, keep, (6, 10)))


def shapes_made(function, *arguments):
    found = []

    def visit(jaxpr):
        for e in jaxpr.eqns:
            found.extend(v.aval.shape for v in e.outvars)
            for p in jax.tree.leaves(
                list(e.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            ):
                inner = getattr(p, "jaxpr", p)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


@pytest.mark.parametrize("backend", [*KERNELS, "xla"])
def test_nothing_of_the_weights_size_is_made_unless_its_gradient_is_asked_for(backend):
    x, w, a, b = operands(3, 150, 140, 2, np.float32)
    blocks = Blocks(3, 128, 128) if backend == "tpu" else None
    loss = lambda a, b, w: low_rank_matmul(x, w, a, b, backend=backend, blocks=blocks).sum()
    assert (150, 140) not in shapes_made(jax.grad(loss, argnums=(0, 1)), a, b, w)
    assert (150, 140) in shapes_made(jax.grad(loss, argnums=2), a, b, w)


def test_auto_runs_plain_jax_on_a_cpu():
    x, w, a, b = operands(3, 5, 4, 2, np.float32)
    text = jax.jit(low_rank_matmul).lower(x, w, a, b).as_text()
    assert "while" not in text  # what an interpreted kernel is made of
    np.testing.assert_array_equal(low_rank_matmul(x, w, a, b), low_rank_matmul(x, w, a, b, backend="xla"))


def test_leading_axes_and_empty_batches_keep_their_shape():
    x, w, a, b = operands(6, 5, 4, 2, np.float32)
    assert low_rank_matmul(x.reshape(2, 3, 5), w, a, b).shape == (2, 3, 4)
    assert low_rank_matmul(x[0], w, a, b).shape == (4,)
    assert low_rank_matmul(x[:0], w, a, b).shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(w=(6, 4)), "expected"),
        (dict(a=(5, 3)), "expected"),
        (dict(a=(5, 300), b=(300, 4)), "rank 300"),
        (dict(dropout=1.0), "dropout 1.0"),
        (dict(backend="metal"), "metal"),
        (dict(backend="tpu", blocks=Blocks(3, 5, 3)), "block n of 3"),
        (dict(backend="tpu", vmem_bytes=100), "fit 100 bytes"),
    ],
)
def test_a_call_that_cannot_run_says_why(change, message):
    shapes = dict(x=(3, 5), w=(5, 4), a=(5, 2), b=(2, 4))
    arrays = {n: jnp.ones(change.get(n, s)) for n, s in shapes.items()}
    rest = {n: v for n, v in change.items() if n not in shapes}
    with pytest.raises(KernelError, match=message):
        low_rank_matmul(*arrays.values(), key=jax.random.key(0), **rest)


def test_a_key_of_another_generator_is_refused():
    with pytest.raises(KernelError, match="rbg"):
        low_rank_matmul(*operands(2, 3, 4, 1, np.float32), key=jax.random.key(0, impl="rbg"), dropout=0.5)


def test_an_integer_input_is_refused():
    with pytest.raises(KernelError, match="int32"):
        low_rank_matmul(jnp.ones((2, 3), jnp.int32), *operands(2, 3, 4, 1, np.float32)[1:])
