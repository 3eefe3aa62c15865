"""The cache in stairs and attention over it: levels, errors and bits as the method states, kernel against plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxpeft.kernels import average_bits, quantised_attention, saq_append, saq_init, saq_read
from jaxpeft.kernels.platforms import KernelError
from jaxpeft.kernels.stairs import quantise

KERNELS = ("tpu", "gpu")
pytestmark = pytest.mark.usefixtures("quick")
append = jax.jit(saq_append)
attend = jax.jit(functools.partial(quantised_attention, with_lse=True), static_argnames=("backend", "block"))


def tokens(n, *shape, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in "kv") for _ in range(n)]


def filled(given, cache):
    for k, v in given:
        cache = append(cache, k, v)
    return cache


def small(**options):
    """Segments of 4 tokens, groups of 2, up to 24 tokens, 2 heads of width 4."""
    return saq_init(24, 2, 4, **(dict(levels=(8, 4, 2), segment=4, group=2) | options))


def plain_quantise(x, bits, axis):
    """A group along `axis`, as the formula says."""
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    step = np.where(high > low, (high - low) / (2**bits - 1), 1)
    return np.round((x - low) / step) * step + low


def plain_stairs(given, levels, segment, group):
    """The method token by token, everything requantised at every boundary as the paper writes it, in numpy."""
    past, recent = [], []
    for k, v in given:
        recent.append((np.asarray(k, np.float64), np.asarray(v, np.float64)))
        if len(recent) < segment:
            continue
        past.append(tuple(np.stack(x, 1) for x in zip(*recent)))
        recent = []
        for age, number in enumerate(range(len(past) - 1, -1, -1)):
            bits, (k, v) = levels[min(age, len(levels) - 1)], past[number]
            g, s, d = k.shape
            k = plain_quantise(k.reshape(g, s // group, group, d), bits, 2).reshape(g, s, d)
            v = plain_quantise(v.reshape(g, s, d // group, group), bits, 3).reshape(g, s, d)
            past[number] = k, v
    return past, recent


def live_part(cache):
    k, v, live = saq_read(cache)
    return np.asarray(k[:, live]), np.asarray(v[:, live])


@pytest.mark.parametrize("n", [0, 3, 4, 8, 23, 24])
def test_the_cache_holds_what_the_method_written_out_holds(n):
    given = tokens(n, 2, 4)
    cache = filled(given, small())
    past, recent = plain_stairs(given, cache.levels, cache.segment, cache.group)
    for i, got in enumerate(live_part(cache)):
        parts = [x[i] for x in past] + [x[i][:, None] for x in recent]
        want = np.concatenate(parts, 1) if parts else np.zeros((2, 0, 4))
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_newest_tokens_are_kept_as_they_are():
    given = tokens(7, 2, 4)
    k, v = live_part(filled(given, small()))
    np.testing.assert_array_equal(k[:, 4:], jnp.stack([k for k, _ in given[4:]], 1))
    np.testing.assert_array_equal(v[:, 4:], jnp.stack([v for _, v in given[4:]], 1))


@given(bits=st.integers(1, 8), seed=st.integers(0, 99), size=st.sampled_from([1e-3, 1.0, 1e3]))
@settings(max_examples=10)
def test_a_number_is_kept_to_half_a_step_and_again_to_itself(bits, seed, size):
    x = size * jnp.asarray(np.random.default_rng(seed).normal(size=(3, 4, 5)), jnp.float32)
    read = lambda code, step, zero: code.astype(jnp.float32) * step[..., None, :] + zero[..., None, :]
    code, step, zero = quantise(x, bits)
    once = read(code, step, zero)
    assert (jnp.abs(once - x) <= step[..., None, :] * 0.5 + 4e-5 * size).all()
    assert len(np.unique(np.asarray(code[0, :, 0]))) <= 2**bits
    # The tail's second quantisation, which is left out.
    np.testing.assert_allclose(read(*quantise(once, bits)), once, rtol=0, atol=4e-5 * size)


def test_a_group_of_equal_numbers_is_kept_exactly():
    code, step, zero = quantise(jnp.full((1, 4, 1), 3.25), 2)
    np.testing.assert_allclose(code.astype(jnp.float32) * step + zero, 3.25)


def test_errors_grow_down_the_stairs_by_at_most_half_a_step_each():
    given = tokens(4, 2, 4)
    first = jnp.stack([k for k, _ in given], 1)
    spread = first.max(1) - first.min(1)
    cache, bound = filled(given, small(group=4)), 0.0
    for bits in (8, 4, 2):
        # What is read lies within the spread of what was written, so no step is larger than the first's.
        bound += spread / (2**bits - 1) / 2
        error = jnp.abs(saq_read(cache)[0][:, :4] - first).max(1)
        assert (error <= bound + 1e-5).all()
        assert (error > 0).any()
        cache = filled(tokens(4, 2, 4, seed=1), cache)


def test_one_level_never_quantises_again():
    given = tokens(24, 2, 4)
    early, late = filled(given[:4], small(levels=(4,))), filled(given, small(levels=(4,)))
    np.testing.assert_array_equal(saq_read(early)[0][:, :4], saq_read(late)[0][:, :4])


def test_average_bits_have_their_closed_form():
    cache = small()
    for n, (k, v) in enumerate(tokens(24, 2, 4), 1):
        cache = append(cache, k, v)
        segments, recent = divmod(n, 4)
        bits = 32 * recent + 4 * sum((8, 4, 2)[min(i, 2)] for i in range(segments))
        np.testing.assert_allclose(average_bits(cache), bits / n, rtol=1e-6)
        np.testing.assert_allclose(average_bits(cache, scales=True), (bits + 4 * segments * 32) / n, rtol=1e-6)
    assert average_bits(small()) == 0


def test_tokens_past_the_capacity_leave_what_is_held_alone():
    given = tokens(28, 2, 4)
    full, over = filled(given[:24], small(levels=(4,))), filled(given, small(levels=(4,)))
    np.testing.assert_array_equal(full.key_code, over.key_code)


def test_sequences_that_grow_together_equal_each_alone_and_vmapped_ones_too():
    given = tokens(9, 3, 2, 4)
    together = filled(given, small(batch=(3,)))
    vmapped = jax.vmap(lambda _: small())(jnp.arange(3))
    each = jax.jit(jax.vmap(saq_append))
    for k, v in given:
        vmapped = each(vmapped, k, v)
    for i in range(3):
        alone = filled([(k[i], v[i]) for k, v in given], small())
        for other in (jax.vmap(saq_read)(vmapped), saq_read(together)):
            np.testing.assert_allclose(other[0][i], saq_read(alone)[0], atol=1e-6)
            np.testing.assert_allclose(other[1][i], saq_read(alone)[1], atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ attention


def test_before_anything_is_quantised_it_is_exact_attention(key):
    given = tokens(3, 1, 2, 4)
    q = jax.random.normal(key, (1, 4, 4))
    k, v = (jnp.stack(x, 1) for x in zip(*given))
    got = quantised_attention(q, filled(given, small(batch=(1,))))
    np.testing.assert_allclose(got, jax.nn.dot_product_attention(q[:, None], k, v)[:, 0], atol=2e-6)


@given(
    n=st.sampled_from([0, 1, 3, 4, 13, 24]),
    sizes=st.sampled_from([(4, 2, 6), (3, 1, 2)]),
)
@settings(max_examples=8)
@pytest.mark.parametrize("backend", KERNELS)
def test_the_kernel_equals_reading_and_attending_in_float64(backend, n, sizes):
    with jax.enable_x64(True):
        h, g, d = sizes
        cache = filled(tokens(n, 2, g, d), saq_init(24, g, d, (8, 4, 2), 4, 2, batch=(2,)))
        q = jnp.asarray(np.random.default_rng(1).normal(size=(2, h, d)))
        for x, y in zip(attend(q, cache, backend=backend), attend(q, cache, backend="xla")):
            assert not jnp.isnan(x).any()
            # Codes times steps are float32 in the reference.
            np.testing.assert_allclose(x, y, rtol=0, atol=3e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_several_blocks_of_rows_of_different_lengths_lose_nothing(backend):
    rows = [filled(tokens(n, 1, 16, seed=n), saq_init(512, 1, 16, segment=32, group=16)) for n in (300, 40, 0)]
    cache = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    q = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 16)), jnp.float32)
    got, want = attend(q, cache, backend=backend, block=128), attend(q, cache, backend="xla")
    for x, y in zip(got, want):
        np.testing.assert_allclose(x, y, atol=3e-6)
    assert (got[0][2] == 0).all()
    assert (got[1][2] == -jnp.inf).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_bfloat16_queries_are_answered_in_bfloat16_with_float32_sums(backend):
    cache = filled(tokens(9, 1, 2, 4), small(batch=(1,), dtype=jnp.bfloat16))
    q = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2, 4)), jnp.bfloat16)
    o, lse = quantised_attention(q, cache, with_lse=True, backend=backend)
    want = quantised_attention(q.astype(jnp.float32), cache, backend="xla")
    assert o.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(o.astype(jnp.float32), want, atol=2**-7 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("backend", KERNELS)
def test_it_vmaps_over_queries_and_shards_over_a_batch(backend, mesh):
    cache = filled(tokens(9, 8, 1, 4), saq_init(24, 1, 4, segment=4, group=2, batch=(8,)))
    q = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 2, 4)), jnp.float32)
    run = functools.partial(quantised_attention, backend=backend)
    want = jnp.stack([quantised_attention(x, cache, backend="xla") for x in q])
    np.testing.assert_allclose(jax.vmap(run, (0, None))(q, cache), want, atol=3e-6)
    specs = jax.tree.map(lambda x: P("d") if x.ndim else P(), cache)
    # Pallas' interpreter does not follow what varies over a mesh.
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(P("d"), specs), out_specs=P("d"), check_vma=False)
    np.testing.assert_allclose(jax.jit(sharded)(q[0], cache), want[0], atol=3e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: saq_init(24, 1, 4, segment=3, group=2), "the group divides"),
        (lambda: saq_init(25, 1, 4, segment=4, group=2), "the group divides"),
        (lambda: saq_init(24, 1, 5, segment=4, group=2), "the group divides"),
        (lambda: small(levels=(4, 8)), "falling"),
        (lambda: small(levels=(16, 4)), "falling"),
        (lambda: quantised_attention(jnp.ones((2, 4)), small()), "batch of 1"),
        (lambda: quantised_attention(jnp.ones((1, 3, 4)), small(batch=(1,))), "multiple of g"),
        (lambda: quantised_attention(jnp.ones((1, 2, 4)), small(batch=(1,)), block=5), "a divisor"),
        (
            lambda: quantised_attention(jnp.ones((1, 2, 4)), small(batch=(1,)), block=12, backend="tpu"),
            "whole capacity",
        ),
        (
            lambda: quantised_attention(jnp.ones((1, 2, 4)), small(batch=(1,)), vmem_bytes=9, backend="tpu"),
            "limit is 9",
        ),
        (lambda: quantised_attention(jnp.ones((1, 1, 512)), saq_init(4, 1, 512, (8,), 4, 2, batch=(1,))), "width 512"),
        (lambda: quantised_attention(jnp.ones((1, 2, 4)), small(batch=(1,)), backend="metal"), "metal"),
    ],
)
def test_what_cannot_run_says_why(call, message):
    with pytest.raises(KernelError, match=message):
        call()
