"""Attention by kernel: against plain JAX in float64 by interpretation, its gradients, and what each of its parts means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxpeft.kernels import attention, merge_attentions
from jaxpeft.kernels.attention_blocks import Blocks
from jaxpeft.kernels.block_selection import prflash_plan, select_blocks, select_drawn
from jaxpeft.kernels.platforms import KernelError
from jaxpeft.kernels.positions import Position, alibi_slopes, harmonic, position_bias

KERNELS = ("tpu", "gpu")
ALL = (*KERNELS, "xla")
STATIC = ("causal", "offset", "scale", "with_lse", "backend", "blocks")
pytestmark = pytest.mark.usefixtures("quick")
attend = jax.jit(attention, static_argnames=STATIC)
plan = jax.jit(prflash_plan, static_argnums=(1, 3))


def operands(b, t, s, h, g, d, p=0, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    q, k, v = draw(b, t, h, d), draw(b, s, g, d), draw(b, s, g, d)
    return q, k, v, (draw(1, p, g, d), draw(1, p, g, d)) if p else None, 0.3 * jnp.abs(draw(h))


def tables(n, d, frequency=0.5, dtype=np.float32):
    angle = np.arange(n)[:, None] * frequency ** np.tile(np.arange(d // 2), 2) * (frequency > 0)
    return jnp.asarray(np.cos(angle), dtype), jnp.asarray(np.sin(angle), dtype)


def weighed(outputs):
    """A sum that weighs every finite entry differently."""
    total = 0.0
    for y in jax.tree.leaves(outputs):
        y = jnp.where(jnp.isfinite(y), y, 0)
        total += (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum()
    return total


def everything(q, k, v, prefix, slopes, *, distance="linear", **options):
    position = None if slopes is None else Position(slopes=slopes, distance=distance)
    return attend(q, k, v, prefix=prefix, position=position, with_lse=True, **options)


def with_gradients(function, *args):
    """`(outputs, gradients of their weighed sum)`."""
    outputs, pull = jax.vjp(function, *args)
    return outputs, pull(jax.grad(weighed)(outputs))


@given(
    lengths=st.sampled_from([(1, 1), (2, 7), (13, 13), (31, 17)]),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    d=st.sampled_from([1, 5, 16]),
    p=st.sampled_from([0, 1, 3]),
    causal=st.booleans(),
    masked=st.booleans(),
    distance=st.sampled_from([None, "linear", "harmonic"]),
    offset=st.sampled_from([0, 3]),
)
@example(lengths=(150, 170), heads=(2, 1), d=3, p=20, causal=True, masked=True, distance="harmonic", offset=20)
@settings(max_examples=2)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_and_its_gradients_equal_plain_attention_in_float64(
    backend, lengths, heads, d, p, causal, masked, distance, offset
):
    with jax.enable_x64(True):
        t, s = lengths
        q, k, v, prefix, slopes = operands(2, t, s, *heads, d, p, np.float64)
        mask = jnp.asarray(np.random.default_rng(1).random((2, s)) < 0.6) if masked else None
        # Blocks under the lengths, so that several of them and their tails are met.
        blocks = (Blocks(128, 128) if backend == "tpu" else Blocks(16, 64)) if t > 128 else None
        args = (q, k, v, prefix, slopes if distance else None)
        options = dict(distance=distance or "linear", causal=causal, key_mask=mask, offset=offset)
        run = lambda backend, blocks: jax.jit(
            functools.partial(with_gradients, functools.partial(everything, backend=backend, blocks=blocks, **options))
        )(*args)
        for x, y in zip(jax.tree.leaves(run(backend, blocks)), jax.tree.leaves(run("xla", None)), strict=True):
            assert not jnp.isnan(x).any()
            # Sums of up to 300 terms in another order.
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-11 * max(1, float(jnp.abs(jnp.nan_to_num(y)).max())))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_selection_and_its_gradients_equal_plain_attention_in_float64(backend):
    with jax.enable_x64(True):
        q, k, v, _, slopes = operands(1, 300, 300, 2, 1, 4, dtype=np.float64)
        mask = jnp.asarray(np.random.default_rng(3).random((2, 3, 3)) < 0.4)
        run = lambda backend: jax.jit(
            lambda *a: with_gradients(
                functools.partial(everything, selection=select_blocks(mask, 128, 2), causal=True, backend=backend),
                *a,
            )
        )(q, k, v, None, slopes)
        for x, y in zip(jax.tree.leaves(run(backend)), jax.tree.leaves(run("xla")), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-10 * max(1, float(jnp.abs(y).max())))


@pytest.mark.parametrize("backend", ALL)
def test_gradients_agree_with_finite_differences(backend):
    with jax.enable_x64(True):
        args = operands(1, 5, 6, 2, 1, 4, 2, np.float64)
        check_grads(jax.jit(functools.partial(everything, causal=True, backend=backend)), args, order=1, modes=("rev",))


@pytest.mark.parametrize("backend", [*ALL, "auto"])
def test_it_equals_jax_where_both_apply(backend):
    q, k, v, *_ = operands(2, 9, 11, 4, 2, 8)
    mask = jnp.arange(11)[None] < jnp.array([11, 6])[:, None]
    got = attend(q, k, v, key_mask=mask, causal=True, scale=0.3, backend=backend)
    want = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None], is_causal=True, scale=0.3)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_auto_leaves_to_jax_what_jax_can_do():
    q, k, v, prefix, _ = operands(1, 3, 3, 1, 1, 4, 1)
    made = lambda **options: str(jax.make_jaxpr(functools.partial(attention, **options))(q, k, v))
    assert "pallas_call" not in made(causal=True)
    assert "pallas_call" in made(prefix=prefix)


def test_bias_slopes_equal_a_bias_array_given_to_jax():
    q, k, v, _, slopes = operands(2, 7, 9, 2, 2, 4)
    for distance in ("linear", "harmonic"):
        got = attend(q, k, v, position=Position(slopes=slopes, distance=distance), offset=2, backend="xla")
        bias = position_bias(7, 9, slopes, distance, 2)[None]
        np.testing.assert_allclose(got, jax.nn.dot_product_attention(q, k, v, bias=bias), atol=2e-6)


def test_a_prefix_is_attention_over_concatenated_keys_and_a_merge_of_two():
    q, k, v, prefix, _ = operands(2, 6, 6, 4, 2, 8, 3)
    spread = [jnp.broadcast_to(x, (2, *x.shape[1:])) for x in prefix]
    own = attend(q, k, v, prefix=prefix, causal=True, with_lse=True, backend="xla")
    joined = [jnp.concatenate([a, b], 1) for a, b in zip(spread, (k, v))]
    mask = jnp.concatenate([jnp.ones((6, 3), bool), jnp.tril(jnp.ones((6, 6), bool))], 1)
    np.testing.assert_allclose(own[0], jax.nn.dot_product_attention(q, *joined, mask=mask[None, None]), atol=2e-6)
    part = functools.partial(attend, q, with_lse=True, backend="xla")
    for a, b in zip(own, merge_attentions(part(k, v, causal=True), part(*spread))):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_prefix_before_the_keys_is_a_prefix_in_a_block_of_its_own(backend, causal):
    q, k, v, prefix, _ = operands(2, 5, 7, 2, 1, 4, 3)
    mask = jnp.arange(7) < jnp.array([[4], [7]])
    run = functools.partial(attend, key_mask=mask, causal=causal, offset=2, with_lse=True, backend=backend)
    call = lambda blocks: with_gradients(lambda q, k, v, p: run(q, k, v, prefix=p, blocks=blocks), q, k, v, prefix)
    apart = Blocks(5, 7) if backend == "tpu" else Blocks(16, 16)
    for x, y in zip(jax.tree.leaves(call(None)), jax.tree.leaves(call(apart))):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_equal_scores_give_the_prefix_its_share():
    q, k, v, prefix, _ = operands(1, 4, 5, 1, 1, 4, 3)
    v, ahead = jnp.zeros_like(v), (prefix[0], jnp.ones_like(prefix[1]))
    np.testing.assert_allclose(attend(0 * q, k, v, prefix=ahead, backend="xla"), 3 / 8, atol=1e-6)


@given(st.lists(st.sampled_from([-np.inf, -200.0, -1.0, 0.0, 3.0, 200.0]), min_size=3, max_size=3))
def test_merging_is_associative_and_commutative_and_nothing_is_its_unit(lses):
    parts = [(jnp.full((1, 2), float(i + 1)) * (l > -np.inf), jnp.full((1,), l)) for i, l in enumerate(lses)]
    a, b, c = parts
    merge = jax.jit(merge_attentions)
    whole = merge(merge(a, b), c)
    for other in (merge(a, merge(b, c)), merge(c, merge(b, a))):
        for x, y in zip(whole, other):
            np.testing.assert_allclose(x, y, rtol=1e-5)
    nothing = (jnp.zeros((1, 2)), jnp.full((1,), -jnp.inf))
    for x, y in zip(merge(a, nothing), a):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("backend", [*ALL, "auto"])
def test_queries_that_see_nothing_are_zero_and_give_no_gradient(backend):
    q, k, v, *_ = operands(2, 4, 4, 2, 1, 4)
    mask = jnp.array([[False, False, True, True], [False] * 4])
    run = functools.partial(attend, key_mask=mask, causal=True, backend=backend)
    if backend != "auto":
        o, lse = run(q, k, v, with_lse=True)
        assert (lse[0, :2] == -jnp.inf).all()
        assert (lse[1] == -jnp.inf).all()
        assert jnp.isfinite(lse[0, 2:]).all()
    loss = lambda *a: weighed(run(*a, with_lse=True) if backend != "auto" else run(*a))
    o, grads = run(q, k, v), jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert (o[0, :2] == 0).all()
    assert (o[1] == 0).all()
    assert (o[0, 2:] != 0).all()
    assert all(jnp.isfinite(g).all() for g in grads)
    assert (grads[0][0, :2] == 0).all()
    assert all((g[1] == 0).all() for g in grads)


def test_with_a_padded_batch_and_more_queries_than_keys_auto_hides_only_what_sees_nothing():
    q, k, v, *_ = operands(1, 5, 3, 1, 1, 4)
    mask = jnp.array([[False, True, True]])
    run = functools.partial(attend, q, k, v, key_mask=mask, causal=True)
    np.testing.assert_allclose(run(), run(backend="xla"), atol=2e-6)


def test_an_offset_makes_queries_the_last_of_a_longer_sequence():
    q, k, v, _, slopes = operands(1, 9, 9, 2, 1, 6)
    position = Position(tables(9, 6), slopes)
    whole = attend(q, k, v, position=position, causal=True, backend="xla")
    last = attend(q[:, 6:], k, v, position=position, causal=True, offset=6, backend="xla")
    np.testing.assert_allclose(last, whole[:, 6:], atol=2e-6)


def test_rotary_with_slopes_depends_on_differences_of_positions_only():
    q, k, v, _, slopes = operands(1, 8, 8, 2, 1, 6)
    at = lambda start: attend(
        q, k, v, position=Position(tuple(x[start:] for x in tables(40, 6)), slopes, "harmonic"), causal=True
    )
    np.testing.assert_allclose(at(0), at(29), atol=2e-5)


def test_the_factored_product_has_rotary_alone_and_slopes_alone_as_its_ends():
    q, k, v, _, slopes = operands(1, 8, 8, 2, 1, 6)
    run = lambda **p: attend(q, k, v, position=Position(**p), causal=True, backend="xla")
    np.testing.assert_array_equal(run(rotary=tables(8, 6), slopes=slopes, slope_weight=0.0), run(rotary=tables(8, 6)))
    np.testing.assert_allclose(run(rotary=tables(8, 6, 0.0), slopes=slopes), run(slopes=slopes), atol=2e-6)
    # With c_r = 0 only distances count.
    np.testing.assert_allclose(
        run(rotary=tables(8, 6), slopes=slopes, rotary_weight=0.0), run(slopes=slopes, rotary_weight=0.0), atol=1e-6
    )


def test_harmonic_numbers_are_sums_of_reciprocals():
    exact = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, 3000))])
    with jax.enable_x64(True):
        np.testing.assert_allclose(harmonic(jnp.arange(3000, dtype=jnp.float64)), exact, rtol=0, atol=5e-10)
    np.testing.assert_allclose(harmonic(jnp.arange(3000, dtype=jnp.float32)), exact, rtol=0, atol=2e-6)


def test_slopes_are_the_papers():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(6, "harmonic").sum(), 1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------- selected blocks


@given(sizes=st.sampled_from([(1, 0), (1, 3), (5, 0), (5, 2), (5, 7)]), seed=st.integers(0, 99))
def test_a_drawn_row_holds_distinct_earlier_blocks_up_to_its_budget_and_the_diagonal_last(sizes, seed):
    n, budget = sizes
    idx, valid = plan(jax.random.key(seed), n, -jnp.log1p(jnp.arange(n, dtype=jnp.float32)), budget)
    assert idx.shape == valid.shape == (n, budget + 1)
    for i, (row, live) in enumerate(zip(np.asarray(idx), np.asarray(valid))):
        assert row[-1] == i
        assert live[-1]
        drawn = row[:-1][live[:-1]]
        assert len(drawn) == min(budget, i)
        assert (np.diff(drawn) > 0).all()
        assert (drawn < i).all()


def test_blocks_are_drawn_with_the_distances_probabilities(key):
    p = jnp.array([1.0, 0.6, 0.3, 0.1])
    draws = jax.vmap(lambda k: prflash_plan(k, 4, jnp.log(p), 1)[0][3, 0])(jax.random.split(key, 4000))
    share = jnp.array([(draws == 3 - d).mean() for d in (1, 2, 3)])
    # Four standard deviations of a share of 4,000 draws.
    np.testing.assert_allclose(share, p[1:], atol=4 * 0.5 / 4000**0.5)


def test_a_full_budget_is_dense_causal_attention_in_values_and_gradients():
    q, k, v, *_ = operands(1, 12, 12, 2, 1, 4)
    selection = select_drawn(*prflash_plan(jax.random.key(0), 3, jnp.zeros(3), 2), 4)
    run = jax.jit(
        lambda selection: with_gradients(
            functools.partial(attend, causal=True, selection=selection, with_lse=True, backend="xla"), q, k, v
        )
    )
    for x, y in zip(jax.tree.leaves(run(selection)), jax.tree.leaves(run(None))):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_distances_of_no_probability_leave_a_sliding_window_and_no_budget_the_diagonal():
    window = jnp.where(jnp.arange(5) > 2, -jnp.inf, 0.0)
    mask = select_drawn(*prflash_plan(jax.random.key(1), 5, window, 4), 4).mask[0]
    rows, columns = np.indices((5, 5))
    np.testing.assert_array_equal(mask, (rows >= columns) & (rows - columns <= 2))
    np.testing.assert_array_equal(select_drawn(*prflash_plan(jax.random.key(1), 5, window, 0), 4).mask[0], np.eye(5))


@given(st.integers(0, 99))
@settings(max_examples=5)
def test_a_selection_is_a_mask_over_pairs(seed):
    q, k, v, *_ = operands(1, 11, 11, 2, 1, 4)
    blocks = jnp.asarray(np.random.default_rng(seed).random((2, 3, 3)) < 0.4)
    pairs = jnp.repeat(jnp.repeat(blocks | jnp.eye(3, dtype=bool), 4, 1), 4, 2)[None, :, :11, :11]
    got = attend(q, k, v, selection=select_blocks(blocks, 4), backend="xla")
    np.testing.assert_allclose(got, jax.nn.dot_product_attention(q, k, v, mask=pairs), atol=2e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_blocks_that_are_not_selected_are_not_read(backend):
    q, k, v, *_ = operands(1, 384, 384, 1, 1, 4)
    hole = jnp.zeros(384, bool).at[128:256].set(True)[None, :, None, None]
    mask = jnp.array([[1, 0, 0], [0, 0, 0], [1, 0, 1]], bool)
    run = functools.partial(attend, q, selection=select_blocks(mask, 128), backend=backend)
    o = run(jnp.where(hole, jnp.nan, k), jnp.where(hole, jnp.nan, v))
    assert jnp.isnan(o[:, 128:256]).all()
    assert jnp.isfinite(o[:, :128]).all()
    assert jnp.isfinite(o[:, 256:]).all()


def test_slots_keep_the_first_blocks_and_the_diagonal():
    mask = select_blocks(jnp.ones((4, 4), bool), 4, 2).mask[0]
    np.testing.assert_array_equal(mask, [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]])


# ------------------------------------------------------------------------------------------------- transformations, types


@pytest.mark.parametrize("backend", KERNELS)
def test_a_vmapped_population_of_prefixes_and_slopes_shares_queries_and_keys(backend):
    q, k, v, *_ = operands(1, 6, 6, 2, 1, 4)
    many = [operands(1, 6, 6, 2, 1, 4, 3, seed=i)[3:] for i in (1, 2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)
    call = lambda prefix, slopes: with_gradients(
        lambda *a: everything(q, k, v, *a, causal=True, backend=backend), prefix, slopes
    )
    call = jax.jit(call)
    together = jax.jit(jax.vmap(call))(*stacked)
    for i, one in enumerate(many):
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(call(*one))):
            np.testing.assert_allclose(x[i], y, atol=1e-5)


@pytest.mark.parametrize("backend", [*ALL, "auto"])
def test_a_batch_sharded_over_a_mesh_gives_the_same_values_and_gradients(backend, mesh):
    q, k, v, prefix, slopes = operands(8, 5, 5, 2, 1, 4, 2)
    # Pallas' interpreter does not follow what varies over a mesh; "auto" traces the kernels, which must.
    checked = backend not in KERNELS

    def loss(shared, q, k, v):
        return (everything(q, k, v, *shared, causal=True, backend=backend)[0] ** 2).sum()

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("d"), P("d"), P("d")), out_specs=(P(), P()), check_vma=checked
    )
    def sharded(shared, q, k, v):
        value, grads = jax.value_and_grad(loss)(shared, q, k, v)
        return jax.lax.psum(value, "d"), grads if checked else jax.lax.psum(grads, "d")

    got = jax.jit(sharded)((prefix, slopes), q, k, v)
    for x, y in zip(
        jax.tree.leaves(got), jax.tree.leaves(jax.jit(jax.value_and_grad(loss))((prefix, slopes), q, k, v))
    ):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", KERNELS)
def test_bfloat16_is_as_near_to_the_exact_attention_as_plain_jax(backend):
    args = jax.tree.map(lambda x: x.astype(jnp.bfloat16), operands(1, 32, 32, 2, 1, 16, 4))
    args = (*args[:4], args[4].astype(jnp.float32))
    exact = everything(*jax.tree.map(lambda x: x.astype(jnp.float32), args), causal=True, backend="xla")[0]
    error = lambda o: float(jnp.abs(o.astype(jnp.float32) - exact).max())
    o, lse = everything(*args, causal=True, backend=backend)
    assert o.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    # Weights and result are rounded once each: 2⁻⁹ of a number up to the largest value.
    assert error(o) <= 2 * error(everything(*args, causal=True, backend="xla")[0])
    assert error(o) <= 2**-7 * float(jnp.abs(args[2]).max().astype(jnp.float32))


@pytest.mark.parametrize("backend", KERNELS)
def test_all_scores_are_never_formed_and_only_wanted_gradients_computed(backend):
    q, k, v, prefix, slopes = operands(1, 300, 300, 1, 1, 4, 3)
    blocks = Blocks(128, 128) if backend == "tpu" else None
    loss = lambda prefix, q: weighed(everything(q, k, v, prefix, slopes, causal=True, backend=backend, blocks=blocks))
    of_prefix = str(jax.make_jaxpr(jax.grad(loss))(prefix, q))
    assert "300,300]" not in of_prefix
    assert "attention_dprefix" in of_prefix
    assert "attention_dq" not in of_prefix
    assert "attention_dkv" not in of_prefix
    assert "attention_dq" in str(jax.make_jaxpr(jax.grad(loss, argnums=1))(prefix, q))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=(1, 5, 3, 4), v=(1, 5, 3, 4)), "multiple of the keys' heads"),
        (dict(v=(1, 6, 1, 4)), "expected"),
        (dict(q=(1, 5, 2, 300), k=(1, 5, 1, 300), v=(1, 5, 1, 300)), "width 300"),
        (dict(prefix=(1, 1025, 1, 4)), "longer ones before the keys"),
        (dict(prefix=(1, 3, 2, 4)), "expected keys and values"),
        (dict(slopes=(3,)), "one for each of 2 heads"),
        (dict(key_mask=jnp.ones((1, 4), bool)), "key_mask"),
        (dict(selection=select_blocks(jnp.ones((2, 2), bool), 2)), "for 5 queries and 5 keys"),
        (dict(selection=select_blocks(jnp.ones((1, 1), bool), 8), blocks=Blocks(8, 8)), "beside a selection"),
        (dict(selection=select_blocks(jnp.ones((2, 2), bool), 4), backend="tpu"), "block q of 4"),
        (dict(selection=select_blocks(jnp.ones((2, 2), bool), 4), backend="gpu"), "block q of 4"),
        (dict(prefix=(1, 3, 1, 4), backend="metal"), "metal"),
        (dict(backend="tpu", blocks=Blocks(3, 5)), "block q of 3"),
        (dict(backend="tpu", vmem_bytes=100), "fit 100 bytes"),
        (dict(backend="tpu", blocks=Blocks(5, 5), vmem_bytes=100), "the limit is 100"),
        (dict(backend="gpu", blocks=Blocks(24, 16)), "a power of two"),
        (dict(q=(1, 0, 2, 4), with_lse=True), "at least one"),
        (dict(position=Position(rotary=tables(4, 4))), "4, 4"),
        (dict(position=Position(slopes=jnp.ones(2), distance="cubic")), "cubic"),
    ],
)
def test_a_call_that_cannot_run_says_why(change, message):
    shapes = dict(q=(1, 5, 2, 4), k=(1, 5, 1, 4), v=(1, 5, 1, 4))
    arrays = [jnp.ones(change.get(n, s)) for n, s in shapes.items()]
    rest = {n: x for n, x in change.items() if n not in shapes}
    if "prefix" in rest:
        rest["prefix"] = (jnp.ones(rest["prefix"]),) * 2
    if "slopes" in rest:
        rest["position"] = Position(slopes=jnp.ones(rest.pop("slopes")))
    with pytest.raises(KernelError, match=message):
        attention(*arrays, **rest)


def test_lists_beyond_the_scalar_memory_of_a_tpu_are_refused():
    q = jax.ShapeDtypeStruct((1, 2**17, 1, 8), jnp.float32)
    selection = select_blocks(jnp.ones((2**10, 2**10), bool), 128)
    with pytest.raises(KernelError, match="larger blocks"):
        jax.eval_shape(lambda q: attention(q, q, q, selection=selection, backend="tpu"), q)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention(*[jnp.ones((1, 2, 1, 4), jnp.int32)] * 3), "int32"),
        (lambda: alibi_slopes(0), "0 heads"),
        (lambda: alibi_slopes(2, "cubic"), "cubic"),
        (lambda: select_blocks(jnp.ones(3, bool), 4), "mask"),
        (lambda: select_blocks(jnp.ones((3, 3), bool), 0), "blocks of 0"),
        (lambda: prflash_plan(jax.random.key(0), 3, jnp.zeros(3), -1), "budget of -1"),
        (lambda: prflash_plan(jax.random.key(0), 3, jnp.zeros(2), 1), "log_p"),
    ],
)
def test_what_else_is_refused(call, message):
    with pytest.raises(KernelError, match=message):
        call()
