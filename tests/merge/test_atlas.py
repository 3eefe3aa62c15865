"""aTLAS: the card's oracles, and numbers of the authors' code."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxpeft import adapt, lora, trees
from jaxpeft.merge import MergeInputError, task_arithmetic, task_vectors
from jaxpeft.merge.atlas import atlas, compose, compose_linearized, init_lam, partition_ids
from jaxpeft.merge.atlas_learning import (
    adamw,
    addition_loss,
    best_epoch,
    best_negation,
    fit_lam,
    multi_head,
    negation_loss,
    regulariser,
    trusted_set,
    two_streams,
    ufm_loss,
)
from jaxpeft.merge.atlas_vectors import LowRank, blocks_within, lora_task_vectors

GOLDEN = {
    k: jnp.asarray(x) for k, x in load_file(Path(__file__).parents[2] / "third_party/atlas/golden.safetensors").items()
}
NAMES = ("a.weight", "a.bias", "n.weight", "n.bias", "b.weight", "c.weight", "c.bias")
THEIRS = {n: GOLDEN[f"base/{n}"] for n in NAMES}
THEIR_VECTORS = {n: GOLDEN[f"vectors/{n}"] for n in NAMES}
T, RNG = 3, np.random.default_rng(0)
pytestmark = pytest.mark.usefixtures("quick")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([*shape, seed]).normal(size=shape), jnp.float32)


BASE = {
    "layers": {"kernel": normal(2, 4, 6), "bias": normal(2, 6)},
    "qkv": normal(6, 3, 5),
    "head": normal(5, 2),
    "steps": jnp.asarray(3, jnp.int32),
}
MODELS = [jax.tree.map(lambda x, i=i: x + 0.3 * normal(*x.shape, seed=i + 1) if x.ndim else x, BASE) for i in range(T)]
TAU = task_vectors(BASE, MODELS)
X = normal(7, 4, seed=9)


def apply_fn(params, x):
    for kernel, bias in zip(params["layers"]["kernel"], params["layers"]["bias"]):
        x = jnp.tanh(x @ kernel + bias)[..., :4]
    x = jnp.concatenate([x, x[..., :2]], -1)
    return jnp.einsum("bd,dke->be", x, jnp.tanh(params["qkv"])) @ params["head"]


def drawn(lam, seed=0):
    return jax.tree.map(lambda x: normal(*x.shape, seed=seed), lam)


# --------------------------------------------------------------------------------------------------------- composition


def test_zero_is_the_base_and_one_hot_is_that_model(close):
    lam = init_lam(BASE, T)
    close(compose(BASE, TAU, lam), BASE, atol=0)
    for j in range(T):
        close(compose(BASE, TAU, jax.tree.map(lambda x, j=j: x.at[j].set(1.0), lam)), MODELS[j], atol=1e-6)


def test_one_number_everywhere_is_task_arithmetic_and_a_vector_is_its_broadcast(close):
    alpha = jnp.array([0.3, -0.2, 0.9])
    want = task_arithmetic(BASE, MODELS, alpha=alpha)
    close(compose(BASE, TAU, alpha), want)
    close(compose(BASE, TAU, jax.tree.map(lambda x: alpha, init_lam(BASE, T))), want)
    close(atlas(BASE, MODELS, lam=alpha), want)


def test_a_subtree_is_one_block_and_what_no_path_covers_stays(close):
    alpha = jnp.array([0.5, 0.0, 1.0])
    got = compose(BASE, TAU, {"layers": alpha})
    close(got, compose(BASE, TAU, {"layers": {"kernel": alpha, "bias": alpha}}), atol=0)
    close(got["layers"], compose(BASE, TAU, alpha)["layers"], atol=0)
    assert (got["qkv"] == BASE["qkv"]).all()
    assert int(got["steps"]) == 3


def test_stacked_and_fused_leaves_are_several_blocks(close):
    lam = init_lam(BASE, T, axes={"layers/*": (0,), "qkv": (1,)})
    assert {p: x.shape for p, x in lam.items()} == {
        "head": (T,),
        "layers/bias": (T, 2, 1),
        "layers/kernel": (T, 2, 1, 1),
        "qkv": (T, 1, 3, 1),
    }
    lam = drawn(lam)
    got = compose(BASE, TAU, lam)
    for i in range(2):
        want = BASE["layers"]["kernel"][i] + sum(
            lam["layers/kernel"][t, i, 0, 0] * TAU["layers"]["kernel"][t, i] for t in range(T)
        )
        close(got["layers"]["kernel"][i], want)
    for k in range(3):
        want = BASE["qkv"][:, k] + sum(lam["qkv"][t, 0, k, 0] * TAU["qkv"][t, :, k] for t in range(T))
        close(got["qkv"][:, k], want)


def test_one_group_is_a_block_and_equal_groups_are_too(key, close):
    lam = init_lam(BASE, T, min_ndim=2)
    ids = partition_ids(key, BASE, 1)
    assert set(ids) == set(init_lam(BASE, T, groups=1)) == set(lam)
    lam = drawn(lam)
    close(compose(BASE, TAU, jax.tree.map(lambda x: x[:, None], lam), ids=ids), compose(BASE, TAU, lam), atol=0)
    ids = partition_ids(key, BASE, 5)
    many = jax.tree.map(lambda x: jnp.repeat(x[:, None], 5, 1), lam)
    close(compose(BASE, TAU, many, ids=ids), compose(BASE, TAU, lam), atol=0)


@pytest.mark.parametrize("axes", [None, {"layers/*": (0,), "qkv": (0, 1)}])
def test_groups_are_masks_that_sum_to_one(axes, key, close):
    k = 4
    ids, lam = partition_ids(key, BASE, k), drawn(init_lam(BASE, T, groups=k, axes=axes))
    got = trees.by_path(compose(BASE, TAU, lam, ids=ids))
    for path, tau in trees.by_path(TAU).items():
        by = lam[path].reshape(T, *(lam[path].shape[1:-1] or (1,) * (tau.ndim - 1)), k)
        masks = [(ids[path] == j).astype(jnp.float32) for j in range(k)]
        assert (sum(masks) == 1).all()
        want = trees.by_path(BASE)[path] + sum((by[..., j] * masks[j] * tau).sum(0) for j in range(k))
        close(got[path], want)


def test_groups_are_random_and_equal_shapes_share_them(key):
    base = {"a": jnp.ones((50, 40)), "b": jnp.ones((50, 40)), "c": jnp.ones((40, 50)), "bias": jnp.ones(40)}
    ids = partition_ids(key, base, 4)
    assert set(ids) == {"a", "b", "c"}
    assert ids["a"].dtype == jnp.int8
    np.testing.assert_allclose(jnp.bincount(ids["a"].ravel().astype(jnp.int32)) / 2000, 0.25, atol=0.05)
    assert (ids["a"] == ids["b"]).all()
    assert not (ids["a"] == ids["c"].T).all()
    own = partition_ids(key, base, 4, share_by_shape=False)
    assert not (own["a"] == own["b"]).all()


def test_the_gradient_is_the_inner_product_with_the_task_vectors(close):
    loss = lambda params: jnp.sum(jnp.sin(apply_fn(params, X)))
    lam = drawn(init_lam(BASE, T))
    got = jax.jit(jax.grad(lambda lam: loss(compose(BASE, TAU, lam))))(lam)
    moving = jax.jit(jax.grad(loss, allow_int=True))(compose(BASE, TAU, lam))
    flat = trees.by_path(moving)
    want = {p: (flat[p] * tau).reshape(T, -1).sum(1) for p, tau in trees.by_path(TAU).items()}
    close(got, want, atol=1e-5)


@given(st.permutations(range(T)), st.floats(0.1, 10))
def test_order_and_scale_of_the_task_vectors_are_the_coefficients(order, c):
    order, lam = jnp.array(order), drawn(init_lam(BASE, T))
    want = compose(BASE, TAU, lam)
    same = compose(BASE, jax.tree.map(lambda x: x[order], TAU), jax.tree.map(lambda x: x[order], lam))
    scaled = compose(BASE, jax.tree.map(lambda x: c * x, TAU), jax.tree.map(lambda x: x / c, lam))
    for got in (same, scaled):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, want)


def test_narrow_vectors_are_summed_in_float32_and_rounded_once():
    base, tau = jnp.ones(64, jnp.bfloat16), normal(T, 64).astype(jnp.bfloat16)
    lam = jnp.array([0.1, 0.2, 0.3])
    got = compose({"w": base}, {"w": tau}, lam)["w"]
    assert got.dtype == jnp.bfloat16
    want = 1 + np.einsum("t,tn->n", np.asarray(lam, np.float64), np.asarray(tau, np.float64))
    # Half a unit in the last of bfloat16's eight digits.
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-6)


def test_the_linearised_model_is_the_tangent_and_exact_where_the_model_is_linear(close):
    lam, h = jax.tree.map(lambda x: 0.1 * x, drawn(init_lam(BASE, T))), 1e-2
    run = jax.jit(lambda lam: compose_linearized(apply_fn, BASE, TAU, lam, X))
    at = jax.jit(lambda h: apply_fn(compose(BASE, TAU, jax.tree.map(lambda x: h * x, lam)), X))
    # float32 leaves 1e-7 / h of a few units, and the third derivative h squared of it.
    np.testing.assert_allclose(run(lam) - at(0.0), (at(h) - at(-h)) / (2 * h), atol=2e-3)
    linear = lambda params, x: jnp.einsum("bi,lio->bo", x, params["layers"]["kernel"]) + params["layers"]["bias"].sum(0)
    close(compose_linearized(linear, BASE, TAU, lam, X), linear(compose(BASE, TAU, lam), X))


def test_least_squares_of_a_linearised_model_are_found():
    y, lam = normal(7, 2, seed=3), init_lam(BASE, T, at=("qkv", "head"))
    flat, unravel = jax.flatten_util.ravel_pytree(lam)
    out = jax.jit(lambda flat: compose_linearized(apply_fn, BASE, TAU, unravel(flat), X).ravel())
    design = jax.jacobian(out)(flat)  # the columns J tau_i^(l)
    assert jnp.allclose(out(flat + 1) - out(flat), design.sum(1), atol=1e-4), "the loss is quadratic in lam"
    best = jnp.linalg.lstsq(design, y.ravel() - out(flat))[0]
    loss = lambda lam, y: jnp.mean(jnp.square(compose_linearized(apply_fn, BASE, TAU, lam, X) - y))
    optimiser = adamw(optax.cosine_decay_schedule(0.1, 1000), decay=0.0)
    fit = jax.jit(lambda lam: fit_lam(loss, lam, y[None], optimiser, steps=1000))(lam)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(fit.lam)[0], best, atol=0.02)


@pytest.mark.parametrize("form", ["isotropic", "blocks", "groups", "linearised"])
def test_every_form_is_the_same_under_jit_vmap_and_has_gradients(form, key, close):
    ids = partition_ids(key, BASE, 4) if form == "groups" else None
    lam = jnp.ones(T) if form == "isotropic" else init_lam(BASE, T, groups=4 if ids else None)
    lams = jax.tree.map(lambda x: normal(2, *x.shape), lam)
    if form == "linearised":
        run = lambda lam: compose_linearized(apply_fn, BASE, TAU, lam, X)
    else:
        run = lambda lam: apply_fn(compose(BASE, TAU, lam, ids=ids), X)
    plain = jnp.stack([run(jax.tree.map(lambda x, i=i: x[i], lams)) for i in range(2)])
    close(jax.jit(jax.vmap(run))(lams), plain)
    grads = jax.jit(jax.grad(lambda lam: jnp.sum(jnp.sin(run(lam)))))(jax.tree.map(lambda x: x[0], lams))
    assert all(bool(jnp.isfinite(g).all()) and bool((g != 0).any()) for g in jax.tree.leaves(grads))
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(run, lam)


# --------------------------------------------------------------------------------------------------- LoRA, block choice


@pytest.fixture(scope="module")
def tuned():
    """Two LoRA fine-tunings of ranks 2 and 3, the second of the stacked kernel alone."""
    base = {"layers": {"kernel": normal(2, 4, 4)}, "out": normal(4, 2, 3)}

    def model(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["kernel"])
        return jnp.einsum("bd,dhe->bhe", x, params["out"])

    methods = [lora(rank=2, at=("layers/kernel", "out")), lora(rank=3, alpha=1.0, at="layers/kernel")]
    deltas = [jax.jit(adapt(model, m).init)(jax.random.key(1), base, X) for m in methods]
    deltas = [jax.tree.map(lambda x, i=i: x + normal(*x.shape, seed=i), d) for i, d in enumerate(deltas)]
    models = [jax.jit(adapt(model, m).merge)(base, d) for m, d in zip(methods, deltas)]
    return base, methods, deltas, models


def test_task_vectors_in_factors_compose_as_those_of_the_merged_models(tuned, key, close):
    base, methods, deltas, models = tuned
    low, dense = lora_task_vectors(methods, deltas, base), task_vectors(base, models)
    assert {p: (x.a.shape, x.b.shape) for p, x in low.items()} == {
        "layers/kernel": ((2, 2, 4, 3), (2, 2, 3, 4)),
        "out": ((2, 4, 2), (2, 2, 2, 3)),
    }
    lams = [jnp.array([0.5, -1.0]), *(init_lam(base, 2, axes=a) for a in (None, {"layers/*": (0,), "out": (1,)}))]
    for lam in lams:
        lam = drawn(lam)
        close(compose(base, low, lam), compose(base, dense, lam))
    ids, lam = partition_ids(key, base, 3), drawn(init_lam(base, 2, groups=3, axes={"layers/*": (0,)}))
    close(compose(base, low, lam, ids=ids), compose(base, dense, lam, ids=ids))


def test_factored_vectors_are_never_formed_one_by_one():
    n, count = 64, 16
    base = {"w": jnp.zeros((n, n))}
    low = {"w": LowRank(normal(count, n, 1), normal(count, 1, n))}
    biggest = lambda jaxpr: max(v.aval.size for e in jaxpr.eqns for v in e.outvars)
    assert biggest(jax.make_jaxpr(lambda lam: compose(base, low, lam))(jnp.ones(count)).jaxpr) == n * n


def test_many_vectors_are_summed_in_a_loop_to_the_same(monkeypatch, close):
    lam, loss = drawn(init_lam(BASE, T)), lambda lam: jnp.sum(jnp.sin(apply_fn(compose(BASE, TAU, lam), X)))
    want = jax.jit(jax.value_and_grad(loss))(lam)
    monkeypatch.setattr(sys.modules["jaxpeft.merge.atlas"], "UNROLLED", 1)
    close(jax.jit(jax.value_and_grad(lambda lam: loss(lam)))(lam), want)


def test_blocks_that_fit_are_chosen_by_score():
    tau = {"big": jnp.ones((T, 10, 10)), "small": 3 * jnp.ones((T, 4)), "weak": 0.1 * jnp.ones((T, 4))}
    assert blocks_within(tau, 4 * T * 104) == ["big", "small"]
    assert blocks_within(tau, 4 * T * 100) == ["small", "weak"]  # the large one no longer fits
    assert blocks_within(tau, 4 * T * 4, {"big": 0.0, "small": 1.0, "weak": 2.0}) == ["weak"]
    low = {"w": LowRank(jnp.ones((T, 4, 1)), jnp.ones((T, 1, 4))), **tau}
    assert blocks_within(low, 4 * T * 8) == ["w"] or blocks_within(low, 4 * T * 8) == ["small", "weak"]
    with pytest.raises(ValueError, match="a budget of 3 bytes: the smallest block takes 48"):
        blocks_within(tau, 3)


# ------------------------------------------------------------------------------------------------------------- learning


def test_learned_blocks_fit_what_one_number_a_vector_cannot():
    base, tau = {"w": jnp.zeros(3), "b": jnp.zeros(3)}, {"w": normal(T, 3), "b": normal(T, 3, seed=1)}
    target = compose(base, tau, {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array([-4.0, 0.0, 3.0])})
    loss = lambda lam, _: sum(
        jnp.square(x - y).sum() for x, y in zip(*map(jax.tree.leaves, (compose(base, tau, lam), target)))
    )
    learn = lambda lam: fit_lam(loss, lam, np.zeros(1), adamw(0.05, decay=0.0), steps=1500)
    assert learn(init_lam(base, T)).losses[-1] < 1e-4
    assert learn(jnp.zeros(T)).losses[-1] > 1


def test_rates_decays_and_batches_are_learned_side_by_side(close):
    batches = normal(4, 7, 2)
    loss = lambda lam, y: jnp.mean(jnp.square(apply_fn(compose(BASE, TAU, lam), X) - y)) + regulariser(lam)

    def run(rate, decay, batches):
        return fit_lam(loss, init_lam(BASE, T), batches, adamw(rate, decay), steps=6, every=2)

    rates, decays = jnp.array([1e-2, 1e-1]), jnp.array([0.0, 0.5])
    many = jax.jit(jax.vmap(run))(rates, decays, jnp.stack([batches, -batches]))
    assert many.losses.shape == (2, 6)
    assert many.path["qkv"].shape == (2, 4, T)
    one = run(rates[1], decays[1], -batches)
    close(jax.tree.map(lambda x: x[1], many), one)
    close(jax.tree.map(lambda x: x[-1], one.path), one.lam, atol=0)
    assert not jax.tree.map(lambda x: x[0], one.path)["qkv"].any()


def test_decay_draws_to_the_base():
    loss = lambda lam, _: 0.0 * lam.sum()
    fit = fit_lam(loss, jnp.ones(T), jnp.zeros(1), adamw(0.1, decay=0.1), steps=10)
    np.testing.assert_allclose(fit.lam, (1 - 0.01) ** 10, rtol=1e-5)


def test_several_heads_share_one_call_of_the_encoder(close):
    calls = []

    def encode(params, x):
        calls.append(x.shape)
        return jnp.tanh(x @ params)

    params, heads = normal(4, 5), [normal(5, 2), normal(5, 3, seed=1)]
    run = multi_head(encode, [lambda z, h=h: z @ h for h in heads])
    inputs, labels = [X, X[:3]], [jnp.zeros(7, jnp.int32), jnp.array([0, 1, 2])]
    logits = run(params, inputs)
    assert calls == [(10, 4)]
    close(logits, [jnp.tanh(x @ params) @ h for x, h in zip(inputs, heads)])
    each = [-jax.nn.log_softmax(y)[jnp.arange(len(t)), t].mean() for y, t in zip(logits, labels)]
    close(addition_loss(logits, labels), sum(each))
    close(negation_loss((logits[0], labels[0]), (logits[1], labels[1])), each[1] - each[0])


def test_the_epoch_is_chosen_as_in_the_paper():
    nan = jnp.nan
    assert best_epoch(jnp.array([0.5, 0.7, nan, 0.7])) == 1
    assert best_epoch(jnp.array([0.5, 0.4])) == 0, "the start where nothing is better"
    control = jnp.array([1.0, 0.99, 0.96, 0.9, 1.0])
    assert best_negation(jnp.array([0.8, 0.6, 0.5, 0.1, 0.0]), control) == 2, "nothing after the first violation"
    assert best_negation(jnp.array([0.8, 0.6, 0.5, 0.1, 0.0]), control, keep=0.9) == 4
    assert best_negation(jnp.array([0.8, 0.9, 0.9, 0.1, 0.0]), control) == 0
    assert best_negation(jnp.array([0.8, nan, 0.5, 0.1, 0.0]), control) == 2


def test_ufm_is_cross_entropy_where_all_are_trusted_and_nothing_where_none_is_sure():
    weak, strong, labels = normal(6, 3), normal(6, 3, seed=1), jnp.array([0, 1, 2, 0, 1, 2])
    want = optax.softmax_cross_entropy_with_integer_labels(strong, labels).mean()
    yes, no = jnp.ones(6, bool), jnp.zeros(6, bool)
    assert ufm_loss(weak, strong, yes, labels) == pytest.approx(float(want), rel=1e-6)
    assert ufm_loss(weak, strong, no, labels) == 0
    assert ufm_loss(weak, strong, no, labels, mode="released") == pytest.approx(float(want), rel=1e-6)
    assert not jax.grad(lambda w: ufm_loss(w, strong, no, labels, 0.1))(weak).any()


def test_trusted_examples_are_the_surest_of_each_class():
    logits = normal(60, 2) + 3 * jnp.where(jnp.arange(60)[:, None] % 2 == jnp.arange(2), 1.0, 0.0)
    found = jax.jit(trusted_set)(logits)
    p = jax.nn.softmax(logits)
    for c in range(2):
        assert set(np.argsort(-np.asarray(p[:, c]))[:3]) <= set(np.flatnonzero(found.chosen))
    assert found.chosen.sum() == 6
    assert (found.labels == logits.argmax(1)).all()
    assert trusted_set(logits, most=1).chosen.sum() == 2


def test_a_quarter_of_a_batch_is_trusted(key):
    trusted = jnp.arange(40) < 5
    rows = two_streams(key, trusted, 9, 8)
    assert rows.shape == (9, 8)
    assert (trusted[rows].sum(1) == 2).all()


# --------------------------------------------------------------------------------------------------- the authors' code


def theirs(params, x):
    h = jnp.tanh(x @ params["a.weight"].T + params["a.bias"])
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
    h = jnp.tanh((h * params["n.weight"] + params["n.bias"]) @ params["b.weight"].T)
    return h @ params["c.weight"].T + params["c.bias"]


@pytest.mark.parametrize("form", ["isotropic", "blocks", "groups", "linearized"])
def test_outputs_and_gradients_are_those_of_the_authors_code(form, close):
    lam, ids = GOLDEN[f"{form}/lam"], None
    if form == "groups":
        ids = {n: GOLDEN[f"groups/ids/{n}"] for n in NAMES if THEIRS[n].ndim == 2}
    blocks = lambda x: x if form == "isotropic" else {n: x[:, i] for i, n in enumerate(NAMES) if not ids or n in ids}

    def run(lam):
        if form == "linearized":
            return compose_linearized(theirs, THEIRS, THEIR_VECTORS, lam, GOLDEN["x"])
        return theirs(compose(THEIRS, THEIR_VECTORS, lam, ids=ids), GOLDEN["x"])

    outputs, pull = jax.vjp(jax.jit(run), blocks(lam))
    close(outputs, GOLDEN[f"{form}/outputs"])
    (gradient,) = pull(GOLDEN["weights"])
    close(gradient, blocks(GOLDEN[f"{form}/gradient"]), atol=2e-5)
    if ids:
        others = [i for i, n in enumerate(NAMES) if n not in ids]
        assert not GOLDEN["groups/gradient"][:, jnp.array(others)].any(), "they leave these blocks out"


def test_losses_and_steps_are_those_of_the_authors_code():
    ufm = {k: GOLDEN[f"ufm/{k}"] for k in ("weak", "strong", "trusted", "labels")}
    assert ufm_loss(**ufm) == pytest.approx(float(GOLDEN["ufm/loss"][0]), rel=1e-5)
    assert ufm_loss(**ufm, threshold=0.6) == pytest.approx(float(GOLDEN["ufm/loss_low"][0]), rel=1e-5)
    assert ufm_loss(**ufm, mode="released") == pytest.approx(float(GOLDEN["ufm/released"][0]), rel=1e-5)
    for p in (1, 2):
        value, gradient = jax.value_and_grad(lambda x, p=p: regulariser(x, p))(GOLDEN["regulariser/lam"])
        assert value == pytest.approx(float(GOLDEN[f"regulariser/{p}"][0]), rel=1e-6)
        np.testing.assert_allclose(gradient, GOLDEN[f"regulariser/{p}_gradient"], atol=1e-7)
    fit = fit_lam(lambda lam, g: (lam * g).sum(), jnp.zeros(3), GOLDEN["adamw/gradients"], adamw(0.1), steps=6, every=1)
    # torch adds 1e-6 to the norm that it clips by.
    np.testing.assert_allclose(fit.path[1:], GOLDEN["adamw/path"], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: compose(BASE, TAU, {"qvk": jnp.zeros(T)}), r"'qvk', which has no task vectors; did you mean 'qkv'"),
        (lambda: compose(BASE, {"qvk": TAU["qkv"]}, jnp.zeros(T)), "task vectors of 'qvk', which the base lacks"),
        (lambda: compose(BASE, {"qkv": TAU["head"]}, jnp.zeros(T)), r"task vectors \(3, 5, 2\) of 'qkv'"),
        (lambda: compose(BASE, TAU, jnp.zeros(T + 1)), r"coefficients \(4,\) of 'head': expected \(3,\)"),
        (lambda: compose(BASE, TAU, {"qkv": jnp.zeros((T, 2, 1, 1))}), r"coefficients \(3, 2, 1, 1\) of 'qkv'"),
        (lambda: compose(BASE, TAU, {"qkv": jnp.zeros(T)}, ids={"head": jnp.zeros((5, 2))}), "groups of 'head', which"),
        (
            lambda: compose(BASE, TAU, {"head": jnp.zeros((T, 2))}, ids={"head": jnp.zeros((2, 5), int)}),
            r"groups \(2, 5\)",
        ),
        (lambda: init_lam(BASE, 0), "0 task vectors"),
        (lambda: init_lam(BASE, T, at="layers/bias", groups=2, min_ndim=3), "nothing to adapt: none of 1 leaves has 3"),
        (lambda: init_lam(BASE, T, axes={"qkv": (3,)}), "axis 3 for 'qkv', which has 3: expected 0 to 2"),
        (lambda: init_lam(BASE, T, axes={"qvk": (3,)}), "matches no parameter.*near misses: 'qkv'"),
        (lambda: partition_ids(jax.random.key(0), BASE, 0), "groups=0"),
        (lambda: regulariser(jnp.ones(T), 3), "p=3"),
        (lambda: ufm_loss(X, X, X[:, 0] > 0, X[:, 0], mode="paper"), "mode 'paper'"),
        (lambda: trusted_set(X), "7 examples of 4 classes"),
        (lambda: two_streams(jax.random.key(0), X[:, 0] > 0, 1, 6), "a batch of 6"),
        (lambda: fit_lam(lambda x, b: x.sum(), jnp.zeros(T), X, adamw(1.0), steps=5, every=2), "5 steps, every=2"),
        (lambda: fit_lam(lambda x, b: x.sum(), jnp.zeros(T), (X, X[1:]), adamw(1.0), steps=5), r"sizes \[6, 7\]"),
        (lambda: best_negation(X[:, 0], X[:, 0], keep=2.0), "keep 2.0"),
        (lambda: multi_head(lambda p, x: x, [lambda z: z])(None, [X, X]), "2 tasks for 1 heads"),
        (lambda: lora_task_vectors([], [], BASE), "0 methods for 0 deltas"),
    ],
)
def test_bad_input_is_told(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_factors_that_do_not_fit_are_told(tuned):
    base, methods, deltas, _ = tuned
    wrong = {**deltas[1], "layers/kernel": jax.tree.map(lambda x: x[:1], deltas[1]["layers/kernel"])}
    with pytest.raises(MergeInputError, match="factors of 'layers/kernel' that differ in more than the rank"):
        lora_task_vectors(methods, [deltas[0], wrong], base)
    with pytest.raises(MergeInputError, match="which the model lacks"):
        lora_task_vectors(methods, deltas, {"out": base["out"]})


def test_the_merge_keeps_what_is_excluded():
    lam = {"layers": jnp.ones(T), "head": jnp.ones(T)}
    got = atlas(BASE, MODELS, lam=lam, exclude="head")
    assert (got["head"] == BASE["head"]).all()
    assert not (got["layers"]["bias"] == BASE["layers"]["bias"]).all()
    with pytest.raises(MergeInputError, match="no base"):
        atlas(None, MODELS, lam=lam)
