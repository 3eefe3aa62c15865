"""Every rule of the engine against the dense weight, in value and gradient; the fallback whatever the function.

Comparisons run in float64: both sides compute the same sums in another order, so 1e-9 tells a wrong rule from rounding.
"""

import dataclasses
import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxpeft import DenseError, DenseWarning, lift
from jaxpeft.weights import ArrayLike, Dropout, Factor, Factored, Term, densify, dora, low_rank, masked, scaled

pytestmark = pytest.mark.usefixtures("quick")
TOLERANCE = 1e-9


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


def low(shape, stack=0, inner=1, r=2, **more):
    """A low-rank value of this shape."""
    s, i, o = shape[:stack], shape[stack : stack + inner], shape[stack + inner :]
    return low_rank(draw(*shape), draw(*s, *i, r, seed=1), draw(*s, r, *o, seed=2), 0.7, **more)


def plain(w):
    """A weight that is one factor: every rule acts on it and none may change it."""
    axes = "abcdefg"[: w.ndim]
    return Factored((Term((Factor(w, axes),)),), (), tuple(axes))


def kronecker(shape):
    """A frozen weight and the Kronecker product of two small matrices."""
    rows, columns = shape
    w = Factor(draw(2, rows // 2, 2, columns // 2), "acbd")
    update = Term((Factor(draw(2, 2, seed=1), "ab"), Factor(draw(rows // 2, columns // 2, seed=2), "cd")))
    return Factored((Term((w,)), update), (), ("ac", "bd"))


def agree(function, value, *xs, on_dense="refuse", gradients=True):
    """`function` on the value equals it on the dense weight, and so do the gradients in the value's parts and in xs."""
    lifted = lift(function, on_dense)
    dense = lambda v, *x: function(densify(v), *x)
    if not gradients:
        got, want = jax.jit(lambda v, *x: (lifted(v, *x), dense(v, *x)))(value, *xs)
        return jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=TOLERANCE), got, want)

    @jax.jit
    def pairs(value, *xs):
        got, back = jax.vjp(lambda v, *x: lifted(v, *x), value, *xs)
        want, dense_back = jax.vjp(dense, value, *xs)
        cotangent = jax.tree.map(lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape), want)
        return (got, want), (back(cotangent), dense_back(cotangent))

    for x, y in pairs(value, *xs):
        assert jax.tree.structure(x) == jax.tree.structure(y)
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y)):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=TOLERANCE)
    return None


# ------------------------------------------------------------------------------------------------- every kind x every op

SHAPE = (8, 6)
KINDS = {
    "low_rank": lambda: low(SHAPE),
    "dora": lambda: dora(draw(*SHAPE), draw(8, 2, seed=1), draw(2, 6, seed=2), draw(6, seed=3), 0.7),
    "scaled_in": lambda: scaled(draw(*SHAPE), draw(8, seed=1), "in"),
    "scaled_out": lambda: scaled(draw(*SHAPE), draw(6, seed=1), "out"),
    "masked_rows": lambda: masked(draw(*SHAPE), jnp.arange(8).reshape(8, 1) % 3 > 0),
    "masked_columns": lambda: masked(draw(*SHAPE), jnp.arange(6).reshape(1, 6) % 3 > 0),
    "masked_fully": lambda: masked(draw(*SHAPE), jnp.arange(48).reshape(8, 6) % 3 > 0),
    "kronecker": lambda: kronecker(SHAPE),
}
X, Y, BATCH = (np.random.default_rng(i).normal(size=n) for i, n in enumerate([(3, 8), (6, 3), (2, 3, 8)]))


def loop(w, x):
    return lax.fori_loop(0, 3, lambda i, c: (jnp.tanh(c[0] @ c[1]) @ c[1].T, c[1]), (x, w))[0]


def until(w, x):
    """The weight is in the condition, in the body and in the carry."""
    return lax.while_loop(
        lambda c: (c[0] < 3) & (jnp.sum(x @ w) < 1e6), lambda c: (c[0] + 1, jnp.tanh(c[1] @ w) @ w.T), (0, x)
    )[1]


def scan_carry(w, x):
    def step(c, _):
        h, w = c
        return (jnp.tanh(h @ w) @ w.T, w), h.sum()

    (h, _), sums = lax.scan(step, (x, w), None, length=3)
    return h, sums


OPS = {
    "x @ w": lambda w: X @ w,
    "w @ y": lambda w: w @ Y,
    "w.T @ x": lambda w: w.T @ X.T,
    "vector @ w": lambda w: X[0] @ w,
    "batched x @ w": lambda w: BATCH @ w,
    "einsum on the left": lambda w: jnp.einsum("io,bti->bto", w, BATCH),
    "summed on both axes": lambda w: jnp.einsum("bio,io->b", draw(3, 8, 6), w),
    "summed on its outer axis": lambda w: jnp.einsum("bo,io->bi", draw(3, 6), w),
    "batched over its inner axis": lambda w: jnp.einsum("ib,io->ibo", X.T, w),
    "batched over its outer axis": lambda w: jnp.einsum("bio,io->bo", draw(3, 8, 6), w),
    "nothing summed": lambda w: jnp.einsum("b,io->bio", X[0], w),
    "transposed": lambda w: Y.T @ w.transpose(1, 0),
    "scaled by a number": lambda w: X @ (w * 3.0),
    "divided": lambda w: X @ (w / 3.0),
    "negated": lambda w: X @ -w,
    "stopped": lambda w: X @ lax.stop_gradient(w),
    "rows weighted": lambda w: X @ (w * X[0][:, None]),
    "columns weighted": lambda w: X @ (Y[:, 0][None, :] * w),
    "axis added and removed": lambda w: X @ jnp.squeeze(w[None, :, None], (0, 2)),
    "input split": lambda w: jnp.einsum("bhi,hio->bo", X.reshape(3, 2, 4), w.reshape(2, 4, 6)),
    "output split": lambda w: jnp.einsum("bi,iho->bho", X, w.reshape(8, 2, 3)),
    "both split": lambda w: jnp.einsum("bij,ijho->bho", X.reshape(3, 4, 2), w.reshape(4, 2, 3, 2)),
    "flattened and back": lambda w: X @ w.reshape(-1).reshape(8, 6),
    "rows cut": lambda w: X[:, 2:5] @ w[2:5],
    "every second column": lambda w: X @ w[:, 1:6:2],
    "one row": lambda w: w[3] @ Y,
    "row by a traced index": lambda w: lax.dynamic_index_in_dim(w, jnp.asarray(3), keepdims=False) @ Y,
    "rows looked up": lambda w: w[jnp.array([[1, 7], [0, 1]])],
    "columns looked up": lambda w: w[:, jnp.array([5, 0, 5])],
    "rows taken": lambda w: jnp.take(w, jnp.array([1, 7]), axis=0),
    "tied": lambda w: jnp.tanh(w[jnp.array([1, 2])]) @ w.T,
    "jit": lambda w: jax.jit(lambda w: jax.jit(lambda w: X @ w)(w) @ Y)(w),
    "remat": lambda w: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, X),
    "jit of remat of scan": lambda w: jax.jit(jax.checkpoint(scan_carry))(w, X),
    "cond": lambda w: lax.cond(X[0, 0] > 0, lambda w: X @ w, lambda w: -(X @ w), w),
    "switch": lambda w: lax.switch(jnp.asarray(1), [lambda w: X @ w, lambda w: 2 * X @ w, lambda w: 3 * X @ w], w),
    "scan over inputs": lambda w: lax.scan(lambda c, x: (c + x @ w, x @ w), jnp.zeros(6), X),
    "scan with the weight carried": lambda w: scan_carry(w, X),
    "map": lambda w: lax.map(lambda x: x @ w, X),
    "custom_jvp around": lambda w: jax.nn.relu(X @ w),
    "custom_vjp beside": lambda w: ours(X @ w),
    "cast": lambda w: (X.astype(jnp.float32) @ w.astype(jnp.float32)).astype(jnp.float64) * 0,
    "precision": lambda w: jnp.dot(X, w, precision="highest", preferred_element_type=jnp.float64),
}
FORWARD_ONLY = {"fori_loop": lambda w: loop(w, X), "while": lambda w: until(w, X)}
# A gain on an axis that is split or cut, and a mask on an axis of a Kronecker product, are rare: they go dense.
DENSE = {
    ("kronecker", op)
    for op in (
        "rows weighted",
        "columns weighted",
        "rows cut",
        "every second column",
        "one row",
        "row by a traced index",
        "rows looked up",
        "columns looked up",
        "rows taken",
        "tied",
        "both split",
    )
}


@jax.custom_vjp
def ours(x):
    return jnp.tanh(x)


ours.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (2 * g,))


def refuses(op, value):
    try:
        jax.eval_shape(lift(op, "refuse"), value)
    except DenseError:
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_acts_as_its_dense_weight_in_every_operation(kind):
    value, ops = KINDS[kind](), OPS | FORWARD_ONLY
    assert value.shape == SHAPE
    assert {(kind, name) for name, op in ops.items() if refuses(op, value)} == {x for x in DENSE if x[0] == kind}
    got = jax.jit(lambda w: {name: lift(op, "allow")(w) for name, op in ops.items()})(value)
    want = jax.jit(lambda w: {name: op(w) for name, op in ops.items()})(value.dense())
    for name in ops:
        for x, y in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
            np.testing.assert_allclose(x, y, atol=TOLERANCE, rtol=TOLERANCE, err_msg=name)
            assert x.dtype == y.dtype


@pytest.mark.parametrize("kind", ["low_rank", "masked_fully"])
def test_gradients_in_the_parts_of_a_value_are_those_through_the_dense_weight(kind):
    value = KINDS[kind]()

    def gradients(run):
        def loss(w, op):
            return sum(jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y) for y in jax.tree.leaves(run(op, w)))

        return jax.jit(lambda w: {name: jax.grad(loss)(w, op) for name, op in OPS.items()})(value)

    got = gradients(lambda op, w: lift(op, "allow")(w))
    want = gradients(lambda op, w: op(w.dense()))
    for name in OPS:
        for x, y in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
            np.testing.assert_allclose(x, y, atol=TOLERANCE, rtol=TOLERANCE, err_msg=name)


def test_dense_is_the_formula_of_each_kind():
    w, a, b, m = np.asarray(draw(8, 6)), np.asarray(draw(8, 2, seed=1)), np.asarray(draw(2, 6, seed=2)), draw(6, seed=3)
    np.testing.assert_allclose(KINDS["low_rank"]().dense(), w + 0.7 * a @ b, atol=1e-12)
    v = w + 0.7 * a @ b
    np.testing.assert_allclose(KINDS["dora"]().dense(), m * v / np.linalg.norm(v, axis=0), atol=1e-12)
    np.testing.assert_allclose(KINDS["scaled_in"]().dense(), w * np.asarray(draw(8, seed=1))[:, None], atol=1e-12)
    np.testing.assert_allclose(KINDS["scaled_out"]().dense(), w * np.asarray(draw(6, seed=1)), atol=1e-12)
    np.testing.assert_allclose(KINDS["masked_fully"]().dense(), w * (np.arange(48).reshape(8, 6) % 3 > 0), atol=1e-12)
    p, q, base = draw(2, 2, seed=1), draw(4, 3, seed=2), draw(2, 4, 2, 3)
    want = base.reshape(8, 6) + jnp.kron(p, q)
    np.testing.assert_allclose(kronecker(SHAPE).dense(), want, atol=1e-12)


# ------------------------------------------------------------------------------------------------- stacks, heads, experts


@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_stacked_weight_is_scanned_layer_by_layer(unroll, reverse):
    value = low((3, 4, 4), stack=1)

    def run(w, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), h.sum()), x, w, unroll=unroll, reverse=reverse)

    agree(run, value, draw(2, 4))


def test_a_stack_of_stacks_and_a_factor_that_all_layers_share():
    value = low((2, 3, 4, 4), stack=2)
    step = lambda h, w: (jnp.tanh(h @ w), None)
    agree(lambda w, x: lax.scan(lambda h, ws: lax.scan(step, h, ws), x, w)[0], value, draw(2, 4))
    shared = Factored(
        (
            Term((Factor(draw(3, 4, 4), "Lio"),)),
            Term((Factor(draw(4, 2), "ir"), Factor(draw(3, 2), "Lr"), Factor(draw(2, 4), "ro"))),
        ),
        (),
        ("L", "i", "o"),
    )
    agree(lambda w, x: lax.scan(step, x, w)[0], shared, draw(2, 4))
    agree(lambda w, x: x @ w[1], shared, draw(2, 4))


def test_scales_and_gains_of_a_stack_differ_by_layer():
    w, a, b = draw(3, 4, 5), draw(3, 4, 2), draw(3, 2, 5)
    value = low_rank(w, a, b, jnp.array([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(value.dense(), w + jnp.arange(3.0)[:, None, None] * (a @ b), atol=1e-12)
    for kind in (value, scaled(w, draw(3, 5), "out", 1), scaled(w, draw(3, 4), "in", 1)):
        agree(lambda w, x: lax.scan(lambda c, w: (c, x @ w), 0, w)[1], kind, draw(2, 4))
        agree(lambda w, x: jnp.einsum("lbi,lio->lbo", x, w), kind, draw(3, 2, 4))


@pytest.mark.parametrize(
    ("equation", "shape", "stack", "inner", "x"),
    [
        ("btd,dhe->bthe", (6, 2, 3), 0, 1, (2, 3, 6)),
        ("bthe,hed->btd", (2, 3, 6), 0, 2, (2, 3, 2, 3)),
        ("btd,hde->bhte", (2, 6, 3), 1, 1, (2, 3, 6)),
        ("bthe,dhe->btd", (6, 2, 3), 0, 1, (2, 3, 2, 3)),
        ("ebi,eio->ebo", (3, 4, 5), 1, 1, (3, 2, 4)),
        ("bei,eio->bo", (3, 4, 5), 1, 1, (2, 3, 4)),
        ("be,eio->bio", (3, 4, 5), 1, 1, (2, 3)),
        ("abij,jiba->ab", (3, 2, 4, 5), 2, 1, (5, 4, 2, 3)),
    ],
)
def test_einsum_over_heads_and_experts(equation, shape, stack, inner, x):
    agree(lambda w, x: jnp.einsum(equation, x, w), low(shape, stack, inner), draw(*x))
    left, right, out = *equation.split("->")[0].split(","), equation.split("->")[1]
    agree(lambda w, x: jnp.einsum(f"{right},{left}->{out}", w, x), low(shape, stack, inner), draw(*x))


@pytest.mark.parametrize("sizes", [(2, 0, 3), (5, 0, 0), (1, 2, 1)])
def test_ragged_products_give_every_expert_its_rows(sizes):
    value = low((3, 4, 6), stack=1)
    groups = jnp.array(sizes, jnp.int32)
    agree(lambda w, x: lax.ragged_dot(x, w, groups), value, draw(5, 4))


def test_two_adapted_weights_multiplied_form_the_smaller_one():
    formed = []
    f = lift(lambda w, x: x @ (w["a"] @ w["b"]), lambda primitive, value: formed.append(value.shape))
    w = {"a": low((8, 3)), "b": low((3, 4))}
    got = f(w, draw(2, 8))
    np.testing.assert_allclose(got, draw(2, 8) @ w["a"].dense() @ w["b"].dense(), atol=TOLERANCE)
    assert formed == [(3, 4)]


# -------------------------------------------------------------------------------------------------- hypothesis: products


@st.composite
def products(draw_from):
    """A weight with stacked, inner and outer axes in any order, and a product that sums, batches or keeps any of them."""
    sizes = draw_from(st.lists(st.integers(1, 3), min_size=2, max_size=4))
    stack = draw_from(st.integers(0, len(sizes) - 2))
    inner = draw_from(st.integers(1, len(sizes) - stack - 1))
    order = draw_from(st.permutations(range(len(sizes))))
    uses = draw_from(st.lists(st.sampled_from("cbf"), min_size=len(sizes), max_size=len(sizes)))
    free = draw_from(st.lists(st.integers(1, 2), max_size=2))
    contract = draw_from(st.permutations([i for i, u in enumerate(uses) if u == "c"]))
    batch = draw_from(st.permutations([i for i, u in enumerate(uses) if u == "b"]))
    return sizes, stack, inner, order, contract, batch, free, draw_from(st.randoms(use_true_random=False))


@settings(max_examples=15)
@given(products(), st.booleans(), st.sampled_from(["low_rank", "gain", "in", "out"]))
def test_dot_general_over_any_axes_on_either_side(case, left, kind):
    sizes, stack, inner, order, contract, batch, free, random = case
    with jax.enable_x64(True):
        value = low(tuple(sizes), stack, inner)
        if kind == "gain":
            value = value.times(draw(*[1 if i % 2 else n for i, n in enumerate(sizes)], seed=5))
        elif kind in ("in", "out"):
            side = sizes[:stack] + (sizes[stack : stack + inner] if kind == "in" else sizes[stack + inner :])
            value = scaled(draw(*sizes), draw(*side, seed=6), kind, stack)
        value = value.transpose(tuple(order))
        # x has the weight's summed and batched axes and free ones of its own, in any order.
        axes = [("w", i) for i in (*contract, *batch)] + [("x", n) for n in free]
        random.shuffle(axes)
        x = draw(*[value.shape[n] if k == "w" else n for k, n in axes], seed=7)
        where = lambda dims: tuple(axes.index(("w", i)) for i in dims)
        numbers = ((where(contract), tuple(contract)), (where(batch), tuple(batch)))
        if left:
            numbers = tuple((r, l) for l, r in numbers)
        dot = lambda w, x: lax.dot_general(*((w, x) if left else (x, w)), numbers)
        # An elementwise gain over summed and kept axes at once goes dense.
        agree(dot, value, x, gradients=False, on_dense="allow" if kind == "gain" else "refuse")


@settings(max_examples=15)
@given(
    st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=3),
    st.data(),
    st.sampled_from(["low_rank", "in", "out"]),
)
def test_reshaping_and_transposing_rename_axes_or_go_dense(sizes, data, kind):
    with jax.enable_x64(True):
        value = low(tuple(sizes)) if kind == "low_rank" else scaled(draw(*sizes), draw(sizes[0], seed=1), "in")
        if kind == "out":
            value = scaled(draw(*sizes), draw(*sizes[1:], seed=1), "out")
        want = value.dense()
        for _ in range(3):
            order = data.draw(st.permutations(range(value.ndim)))
            value, want = value.transpose(tuple(order)), want.transpose(tuple(order))
            primes = [p for n in value.shape for p in {1: [1], 2: [2], 3: [3], 4: [2, 2]}.get(n, [n])]
            cuts = data.draw(st.lists(st.integers(0, len(primes)), max_size=3).map(sorted))
            bounds = [0, *cuts, len(primes)]
            shape = tuple(int(np.prod(primes[i:j])) for i, j in itertools.pairwise(bounds))
            new = value.reshape(shape)
            if new is NotImplemented:
                break
            value, want = new, want.reshape(shape)
            assert value.shape == shape
            np.testing.assert_allclose(value.dense(), want, atol=TOLERANCE)
            x = draw(*shape, seed=3)
            agree(lambda w, x: jnp.tensordot(x, w, axes=w.ndim), value, x, gradients=False)


# ---------------------------------------------------------------------------------------------------------- convolutions

CONVS = {
    "1-D": ((3, 4, 5), (2, 7, 4), {}),
    "2-D same": ((3, 2, 4, 5), (2, 5, 6, 4), dict(padding="SAME")),
    "2-D strided and dilated": ((3, 3, 4, 6), (1, 9, 9, 4), dict(window_strides=(2, 1), rhs_dilation=(1, 2))),
    "3-D": ((2, 2, 2, 3, 4), (1, 4, 3, 3, 3), {}),
    "grouped": ((3, 2, 6), (2, 7, 4), dict(feature_group_count=2)),
    "depthwise": ((3, 1, 4), (2, 7, 4), dict(feature_group_count=4)),
    "transposed": ((3, 3, 4, 5), (1, 4, 4, 4), dict(lhs_dilation=(2, 2), padding=((2, 2), (2, 2)))),
    "one by one": ((1, 1, 4, 5), (1, 3, 3, 4), {}),
    "patches": ((2, 2, 3, 5), (1, 4, 4, 3), dict(window_strides=(2, 2))),
}


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("kind", ["low_rank", "gain", "mask"])
def test_convolutions_factor_through_their_channels(case, kind):
    shape, x, options = CONVS[case]
    n = len(shape) - 2
    space = "DHW"[-n:]
    numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
    options = {"window_strides": (1,) * n, "padding": "VALID"} | options
    value = low(shape, inner=n + 1)
    if kind == "gain":
        value = scaled(draw(*shape), draw(shape[-1], seed=4), "out")
    elif kind == "mask":
        value = masked(draw(*shape), jnp.arange(shape[-1]).reshape((1,) * (n + 1) + (-1,)) % 2)
    agree(lambda w, x: lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options), value, draw(*x))


def test_convolutions_in_other_layouts_and_the_library_transpose():
    value = low((3, 2, 4, 5), inner=3).transpose((3, 2, 0, 1))
    agree(lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME"), value, draw(2, 4, 5, 6))
    agree(lambda w, x: lax.conv_transpose(x, w, (2,), "SAME"), low((3, 4, 5), inner=2), draw(1, 4, 4))


# -------------------------------------------------------------------------------------------------------------- dropout


def test_dropout_acts_on_the_input_of_the_update_alone(key):
    x, value = draw(5, 8), low(SHAPE, key=key, dropout=0.5)
    w, a, b = draw(*SHAPE), draw(8, 2, seed=1), draw(2, 6, seed=2)
    kept = jax.random.bernoulli(key, jnp.float32(0.5), x.shape)
    got = lift(jnp.dot, "refuse")(x, value)
    np.testing.assert_allclose(got, x @ w + 0.7 * jnp.where(kept, 2 * x, 0) @ a @ b, atol=TOLERANCE)
    np.testing.assert_allclose(value.dense(), w + 0.7 * a @ b, atol=TOLERANCE), "there is no input to drop"


def test_dropout_keeps_the_mean_and_layers_draw_apart(key):
    x, keys = jnp.ones((1, 8)), jax.random.split(key, 4000)
    value = low(SHAPE)
    drop = lambda k: lift(jnp.dot, "refuse")(x, low(SHAPE, key=k, dropout=0.3))
    mean = jax.vmap(drop)(keys).mean(0)
    # Standard error: |x a b| sqrt(0.3/0.7/4000) is about 0.03 here.
    np.testing.assert_allclose(mean, x @ value.dense(), atol=0.15)
    w = low_rank(jnp.zeros((2, 8, 8)), jnp.ones((2, 8, 1)), jnp.ones((2, 1, 8)), key=keys[:2], dropout=0.5)
    _, sums = lift(lambda w: lax.scan(lambda c, w: (c, draw(3, 8) @ w), 0, w), "refuse")(w)
    assert not np.allclose(sums[0], sums[1])


def test_key_and_rate_of_dropout_are_arrays_and_a_rate_of_zero_leaves_it_out(key):
    value = low(SHAPE, key=key, dropout=0.5)
    assert isinstance(value.terms[1].dropout, Dropout)
    assert any(jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(value))
    assert low(SHAPE, key=key, dropout=0.0).terms[1].dropout is None


# ------------------------------------------------------------------------------------------------------------- policies


def test_warn_says_once_what_is_formed():
    with pytest.warns(DenseWarning, match=r"'sin' has no rule.*Factored\[8, 6\] is formed in full"):
        y = lift(jnp.sin)(low(SHAPE))
    np.testing.assert_allclose(y, jnp.sin(low(SHAPE).dense()))


def test_refuse_raises_before_anything_is_computed_and_names_the_operation():
    with pytest.raises(DenseError, match=r"'sin'.*\[8, 6\]"):
        jax.eval_shape(lift(lambda w: jnp.sin(w), "refuse"), low(SHAPE))
    with pytest.raises(DenseError, match="return"):
        lift(lambda w: w, "refuse")(low(SHAPE))
    with pytest.raises(DenseError, match="loop's state"):
        lift(lambda w: lax.fori_loop(0, 2, lambda i, w: w * 2, w), "refuse")(low(SHAPE))
    with pytest.raises(DenseError, match="branch's result"):
        lift(lambda w: lax.cond(True, lambda w: w, lambda w: 2 * w, w), "refuse")(low(SHAPE))


def test_allow_is_silent_and_a_function_is_told():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lift(jnp.sin, "allow")(low(SHAPE))
    seen = []
    lift(lambda w: jnp.sin(w) + jnp.cos(w), lambda *a: seen.append(a))(low(SHAPE))
    assert [name for name, _ in seen] == ["sin", "cos"]
    assert all(value.shape == SHAPE for _, value in seen)
    with pytest.raises(ValueError, match=r"on_dense='no'.*allow"):
        lift(jnp.sin, "no")


def test_without_array_like_arguments_nothing_is_traced():
    calls = []
    f = lift(lambda x, flag: calls.append(type(x)) or x, "refuse")
    assert f(np.ones(2), flag=True).tolist() == [1, 1]
    assert calls == [np.ndarray]


def test_python_arguments_stay_static_and_results_keep_their_tree():
    def f(w, x, *, flag, name, none):
        assert flag is True
        assert name == "n"
        assert none is None
        return {"y": (x @ w if flag else x), "n": None, "t": (1.0, x)}

    y = lift(f, "refuse")(low(SHAPE), X, flag=True, name="n", none=None)
    assert sorted(y) == ["n", "t", "y"]
    assert y["n"] is None
    assert lift(f).__name__ == "f"


# ------------------------------------------------------------------------------------------------- the do-nothing probe


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Probe(ArrayLike):
    """An array-like value with no rule of its own: whatever meets it must form it, and nothing else may change."""

    value: jax.Array

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)

    def dense(self):
        return self.value


# fmt: off
UNARY = [
    "abs", "all", "any", "argmax", "argmin", "argsort", "array", "atleast_3d", "cbrt", "ceil", "column_stack",
    "conj", "copy", "cos", "cosh", "cumprod", "cumsum", "deg2rad", "diag", "diagonal", "diff", "ediff1d", "exp",
    "exp2", "expm1", "flip", "fliplr", "flipud", "floor", "gradient", "i0", "imag", "isfinite", "isinf", "isnan",
    "log1p", "logical_not", "max", "mean", "median", "min", "moveaxis", "nanmax", "nanmean", "nansum", "negative",
    "nonzero_size", "ones_like", "positive", "prod", "ptp", "ravel", "reciprocal", "rint", "rot90", "round", "sign",
    "signbit", "sin", "sinc", "sinh", "sort", "sqrt", "square", "squeeze", "std", "sum", "swapaxes", "tan", "tanh",
    "trace", "transpose", "tril", "triu", "trunc", "unwrap", "var", "zeros_like",
]
# fmt: on
SPECIAL = {
    "array": lambda w: jnp.array(w),
    "atleast_3d": lambda w: jnp.atleast_3d(w),
    "column_stack": lambda w: jnp.column_stack((w, w)),
    "gradient": lambda w: jnp.stack(jnp.gradient(w)),
    "moveaxis": lambda w: jnp.moveaxis(w, 0, 1),
    "nonzero_size": lambda w: jnp.nonzero(w > 0, size=4)[0],
    "swapaxes": lambda w: jnp.swapaxes(w, 0, 1),
}
BINARY = ["add", "subtract", "multiply", "divide", "maximum", "minimum", "arctan2", "hypot", "power", "less", "equal"]
BINARY += ["logaddexp", "floor_divide", "fmod", "copysign", "nextafter", "heaviside", "dot", "matmul", "inner", "kron"]
BINARY += ["outer", "vdot", "cross3", "append", "isclose", "tensordot", "where", "vstack", "hstack", "concatenate"]
BINARIES = {
    "power": lambda a, b: jnp.power(jnp.abs(a), b),
    "cross3": lambda a, b: jnp.cross(a[:, :3], b[:, :3]),
    "where": lambda a, b: jnp.where(a > b, a, b),
    **{n: (lambda a, b, n=n: getattr(jnp, n)((a, b))) for n in ("vstack", "hstack", "concatenate")},
}
OTHERS = {
    "broadcast": lambda w: jnp.broadcast_to(w, (3, 4, 4)) * 1,
    "broadcast a new middle axis": lambda w: jnp.broadcast_to(w[:, None], (4, 3, 4)).sum(1),
    "einsum with itself": lambda w: jnp.einsum("ij,kj->ik", w, w),
    "trace by einsum": lambda w: jnp.einsum("ii->", w),
    "pad": lambda w: jnp.pad(w, 1),
    "reshape in Fortran's order": lambda w: w.reshape(2, 8, order="F"),
    "reshape to one": lambda w: w[:1, :1].reshape(()),
    "reversed": lambda w: w[::-1],
    "strided rows": lambda w: w[::2] @ jnp.ones(4),
    "negative index": lambda w: w[-1],
    "boolean rows": lambda w: w[np.array([True, False, True, False])],
    "pairs looked up": lambda w: w[jnp.array([0, 1]), jnp.array([1, 2])],
    "out of range filled": lambda w: w.at[jnp.array([9])].get(mode="fill", fill_value=7.0),
    "out of range clipped": lambda w: w.at[jnp.array([9])].get(mode="clip"),
    "out of range wrapped": lambda w: jnp.take(w, jnp.array([9, -3]), axis=1, mode="wrap"),
    "take along": lambda w: jnp.take_along_axis(w, jnp.array([[0, 1, 2, 3]]), 0),
    "embedding by one-hot": lambda w: jax.nn.one_hot(jnp.array([1, 3]), 4, dtype=w.dtype) @ w,
    "dynamic block": lambda w: lax.dynamic_slice(w, (jnp.asarray(1), jnp.asarray(2)), (2, 2)),
    "updated": lambda w: w.at[1].set(0.0),
    "updated by it": lambda w: jnp.zeros((6, 6), w.dtype).at[1:5, 1:5].set(w),
    "scatter by it": lambda w: jnp.zeros((4, 4), w.dtype).at[jnp.array([0, 0, 1, 2])].add(w),
    "cast to integers": lambda w: w.astype(jnp.int32),
    "cast to half": lambda w: w.astype(jnp.bfloat16).astype(jnp.float64),
    "bits": lambda w: lax.bitcast_convert_type(w, jnp.uint64),
    "scaled by an integer": lambda w: w * 2,
    "divided into": lambda w: 1.0 / (1.0 + jnp.abs(w)),
    "times itself": lambda w: w * w,
    "times a transposed": lambda w: w * w.T,
    "times rows": lambda w: w * jnp.arange(4.0),
    "times a larger one": lambda w: w[None] * jnp.ones((3, 4, 4)),
    "times of size one": lambda w: w[:1] * jnp.arange(4.0)[:, None],
    "softmax": lambda w: jax.nn.softmax(w),
    "norm": lambda w: jnp.linalg.norm(w, axis=0),
    "solve": lambda w: jnp.linalg.solve(w + 9 * jnp.eye(4), w),
    "fft": lambda w: jnp.abs(jnp.fft.fft(w)),
    "convolved as an input": lambda w: lax.conv_general_dilated(
        w[None, None], jnp.ones((1, 1, 2, 2), w.dtype), (1, 1), "SAME"
    ),
    "convolved with itself": lambda w: lax.conv_general_dilated(w[None, None], w[None, None], (1, 1), "SAME"),
    "top k": lambda w: lax.top_k(w, 2)[0],
    "reduced": lambda w: lax.reduce_window(w, 0.0, lax.add, (2, 2), (1, 1), "VALID"),
    "associative scan": lambda w: lax.associative_scan(jnp.add, w),
    "vmapped inside": lambda w: jax.vmap(lambda r: r @ r)(w),
    "differentiated inside": lambda w: jax.grad(lambda w: jnp.sum(jnp.tanh(w @ w)))(w),
    "forward differentiated inside": lambda w: jax.jvp(lambda w: w @ w.T, (w,), (w,))[1],
    "scanned over": lambda w: lax.scan(lambda c, r: (c + r, c @ r), jnp.zeros(4, w.dtype), w),
    "grown in a loop": lambda w: lax.fori_loop(0, 3, lambda i, c: c @ w, w),
    "both results of a branch": lambda w: lax.cond(w[0, 0] > 0, lambda: (w, w.T), lambda: (w.T, w)),
    "jitted": lambda w: jax.jit(lambda w, s: (w * s, w @ w))(w, 2.0),
    "swapped in a loop": lambda w: lax.fori_loop(0, 3, lambda i, c: (c[1], c[0]), (w, 2 * w))[0],
    "random of its shape": lambda w: jax.random.normal(jax.random.key(0), w.shape, w.dtype) + w,
    "returned twice": lambda w: (w, w),
    "put out unused": lambda w: jnp.ones(2),
    "expanded in front and behind": lambda w: w[None, :, :, None] * 1.0,
    "squeezed": lambda w: w[:, :1].squeeze(1) @ w,
    "complex": lambda w: w.astype(jnp.complex128) * 1j,
    "clipped": lambda w: jnp.clip(w, -1, 1),
    "callback": lambda w: jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(w.shape, w.dtype), w),
}


def unchanged(function, *values):
    """Whether the lifted function traces to the very same program; else the values are compared."""
    dense = [densify(v) for v in values]
    lifted = jax.make_jaxpr(lift(function, "allow"))(*values)
    if str(lifted) != str(jax.make_jaxpr(function)(*dense)):
        same(jax.jit(lift(function, "allow"))(*values), jax.jit(function)(*dense))


def same(got, want):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for x, y in zip(got, want):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("probe", [Probe, plain])
def test_a_do_nothing_weight_changes_no_function_of_one_array(probe):
    w = draw(4, 4)
    functions = {n: SPECIAL.get(n) or (lambda w, n=n: getattr(jnp, n)(w)) for n in UNARY if n != "imag"} | OTHERS
    for name, function in functions.items():
        try:
            unchanged(function, probe(w))
        except Exception as e:
            raise AssertionError(f"{name}: {type(e).__name__}: {e}") from e


@pytest.mark.parametrize("probe", [Probe, plain])
def test_a_do_nothing_weight_changes_no_function_of_two_arrays(probe):
    a, b = draw(4, 4), draw(4, 4, seed=1)
    for name in BINARY:
        function = BINARIES.get(name) or (lambda a, b, n=name: getattr(jnp, n)(a, b))
        try:
            for x, y in ((probe(a), b), (a, probe(b)), (probe(a), probe(b))):
                unchanged(function, x, y)
        except Exception as e:
            raise AssertionError(f"{name}: {type(e).__name__}: {e}") from e


def test_a_factored_value_of_another_size_of_mask_or_gain_is_refused_with_the_shapes():
    with pytest.raises(ValueError, match=r"\(8, 2\) and \(3, 6\).*\(8, 6\)"):
        low_rank(draw(8, 6), draw(8, 2), draw(3, 6))
    with pytest.raises(ValueError, match=r"mask of shape \(4, 6\)"):
        masked(draw(8, 6), draw(4, 6))


def test_lifted_functions_nest():
    inner = lift(lambda w, x: x @ w, "refuse")
    outer = lift(lambda v, w, x: inner(w, x) @ v, "refuse")
    v, w, x = low((6, 3)), low((8, 6)), draw(2, 8)
    np.testing.assert_allclose(outer(v, w, x), x @ w.dense() @ v.dense(), atol=TOLERANCE)
