"""Robustify: losses and their slopes, the choice of heads, passes with dropout, what tuning moves and leaves."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft import adapt, full, trees
from jaxpeft.transfer import robustify as rb
from jaxpeft.updates import mask_updates

pytestmark = pytest.mark.usefixtures("quick")
N, C, D, P = 8, 5, 6, 4
LOG_C = float(np.log(C))
seeds = st.integers(0, 2**31)
loss_of = jax.jit(rb.robust_kd_loss)
slopes_of = jax.jit(jax.grad(rb.robust_kd_loss))
select = jax.jit(rb.select_head, static_argnames=("rule",))
weight_of = jax.jit(rb.teacher_weight)
unsure_of = jax.jit(rb.uncertainty_of, static_argnames=("kind",))
AUGMENTED = jnp.arange(N) % 3 > 0
ONE_HEAD = ((0.0, 0.0), (0.0, 0.0), (0.5, 0.5))


def drawn(seed, *shape):
    return jnp.asarray(2 * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def batch(seed):
    """Heads' logits, labels and the teacher's logits."""
    z = drawn(seed, 4, N, C)
    return rb.Heads(*z[:3]), jnp.asarray(np.random.default_rng(seed).integers(0, C, N)), z[3]


def probs(seed, sharp=1.0):
    return rb.Heads(*jax.nn.softmax(sharp * drawn(seed, 3, 6, C), -1))


# --------------------------------------------------------------------------------------------------------------- losses


def by_hand(z, y, r, augmented, a, lam, tau, shares):
    soft = lambda z: np.exp(z - z.max(-1, keepdims=True)) / np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)
    r, total = np.asarray(r, np.float64), 0.0
    for head, (clean, other) in zip(z, shares):
        k = np.asarray(head, np.float64)
        cross = -np.log(soft(k)[np.arange(N), y])
        target, own = soft(r / tau), soft(k / tau)
        kl = (target * (np.log(target) - np.log(own))).sum(-1)
        each = (1 - lam) * cross + lam * np.asarray(a) * tau**2 * kl
        flags = np.asarray(augmented)
        total += clean * each[~flags].mean() + other * each[flags].mean()
    return total


@given(seeds, st.floats(0, 1), st.floats(0.5, 4))
def test_the_loss_is_the_formula(seed, lam, tau):
    z, y, r = batch(seed)
    a = weight_of(jax.nn.softmax(r, -1))
    for shares in (rb.SHARES, ONE_HEAD):
        want = by_hand(z, y, r, AUGMENTED, a, lam, tau, shares)
        np.testing.assert_allclose(loss_of(z, y, r, AUGMENTED, a, lam, tau, shares=shares), want, rtol=2e-4)


@given(seeds)
def test_without_lambda_or_with_a_clueless_teacher_there_is_cross_entropy_alone(seed):
    z, y, r = batch(seed)
    log_p = [np.asarray(k, np.float64) - np.log(np.exp(np.asarray(k, np.float64)).sum(-1, keepdims=True)) for k in z]
    clean, other = ([-x[np.arange(N), y][at].mean() for x in log_p] for at in map(np.asarray, (~AUGMENTED, AUGMENTED)))
    want = clean[0] + other[1] + 0.5 * (clean[2] + other[2])
    np.testing.assert_allclose(loss_of(z, y, r, AUGMENTED, 1.0, 0.0), want, rtol=1e-5)
    flat = jnp.zeros_like(r)
    a = weight_of(jax.nn.softmax(flat, -1))
    np.testing.assert_allclose(a, 0, atol=1e-6)
    np.testing.assert_allclose(loss_of(z, y, flat, AUGMENTED, a, 0.5), 0.5 * want, rtol=1e-5)
    two = loss_of(z, y, r, AUGMENTED, 1.0, jnp.array([0.0, 0.7]))
    np.testing.assert_allclose(
        two, by_hand(z, y, r, AUGMENTED, 1, np.where(AUGMENTED, 0.7, 0), 2, rb.SHARES), rtol=2e-4
    )


@given(seeds, st.floats(0.5, 4))
def test_the_slope_of_distillation_is_weight_tau_and_difference(seed, tau):
    z, y, r = batch(seed)
    a = jnp.asarray(np.random.default_rng(seed).random(N), jnp.float32)
    slopes = slopes_of(z, y, r, AUGMENTED, a, 1.0, tau)
    soft = lambda x: jax.nn.softmax(x / tau, -1)
    counts = jnp.where(AUGMENTED, 1 / AUGMENTED.sum(), 1 / (~AUGMENTED).sum())
    want = (a * tau * counts)[:, None] * (soft(z.combined) - soft(r))
    np.testing.assert_allclose(slopes.combined, 0.5 * want, atol=1e-6)
    same = slopes_of(rb.Heads(r, r, r), y, r, AUGMENTED, a, 1.0, tau)
    assert max(float(jnp.abs(x).max()) for x in same) < 1e-6


def test_a_head_gets_no_slope_from_inputs_that_it_does_not_see():
    z, y, r = batch(0)
    none = lambda g: not np.asarray(g).any()
    clean_only = slopes_of(z, y, r, jnp.zeros(N, bool))
    assert none(clean_only.unclean)
    assert not none(clean_only.clean)
    assert not none(clean_only.combined)
    augmented_only = slopes_of(z, y, r, jnp.ones(N, bool))
    assert none(augmented_only.clean)
    assert not none(augmented_only.unclean)
    mixed = slopes_of(z, y, r, AUGMENTED)
    assert none(mixed.clean[AUGMENTED])
    assert none(mixed.unclean[~AUGMENTED])
    single = slopes_of(z, y, r, AUGMENTED, shares=ONE_HEAD)
    assert none(single.clean)
    assert none(single.unclean)


def test_teacher_and_weight_are_constants():
    z, y, r = batch(1)
    g = jax.jit(jax.grad(lambda r, a: rb.robust_kd_loss(z, y, r, AUGMENTED, a), (0, 1)))(r, jnp.ones(N))
    assert not any(np.asarray(x).any() for x in g)
    assert not jax.jit(jax.grad(lambda p: rb.teacher_weight(p).sum()))(jax.nn.softmax(r, -1)).any()


def test_the_weight_is_one_of_certainty_and_zero_of_none():
    assert weight_of(jnp.eye(C)).tolist() == [1.0] * C
    np.testing.assert_allclose(weight_of(jnp.full((3, C), 1 / C)), 0, atol=1e-6)
    p = jax.nn.softmax(drawn(0, P, N, C), -1)
    np.testing.assert_allclose(weight_of(p), weight_of(p.mean(0)), rtol=1e-6)
    half = jnp.array([[0.5, 0.5, 0, 0, 0]])
    np.testing.assert_allclose(weight_of(half), 1 - np.log(2) / LOG_C, rtol=1e-6)


def test_the_teachers_loss_is_two_cross_entropies_and_the_divergence_from_the_mean():
    z, y, _ = batch(2)
    run = jax.jit(rb.robust_loss)
    cross = lambda k: optax.softmax_cross_entropy_with_integer_labels(k, y).mean()
    same = run(z.clean, jnp.stack([z.clean, z.clean]), y)
    np.testing.assert_allclose(same, 2 * cross(z.clean), rtol=1e-5)
    p = np.asarray(jax.nn.softmax(jnp.stack(z), -1), np.float64)
    jsd = (p * np.log(p / p.mean(0))).sum(-1).mean()
    want = cross(z.clean) + cross(z.unclean) + 12 * jsd
    np.testing.assert_allclose(run(z.clean, jnp.stack(z[1:]), y), want, rtol=1e-5)
    np.testing.assert_allclose(run(z.clean, z.unclean[None], y, consistency=0.0), cross(z.clean) + cross(z.unclean))


# ------------------------------------------------------------------------------------------------------------- inference


@given(seeds)
def test_without_delta_the_surer_of_the_two_answers(seed):
    p = probs(seed)
    found = select(*p, delta=0.0)
    h = lambda q: -(np.asarray(q, np.float64) * np.log(np.asarray(q, np.float64))).sum(-1)
    assert found.choice.tolist() == np.where(h(p.clean) < h(p.unclean), rb.CLEAN, rb.UNCLEAN).tolist()


@given(seeds, st.floats(0, 0.5), st.floats(0, 0.5))
def test_the_choice_is_the_rule_and_swapping_heads_swaps_it(seed, delta, eps):
    p = probs(seed, 0.5)
    found = select(*p, delta=delta, eps=eps)
    pc, pu, pm = (np.asarray(x, np.float64) for x in p)
    h, kl = lambda q: -(q * np.log(q)).sum(-1), lambda a, b: (a * np.log(a / b)).sum(-1)
    for i, choice in enumerate(found.choice.tolist()):
        gap, near = h(pc[i]) - h(pu[i]), kl(pm[i], pc[i]) - kl(pm[i], pu[i])
        if min(abs(abs(gap) - delta), abs(abs(near) - eps)) > 1e-5:  # else rounding may choose
            want = gap > 0 if abs(gap) > delta else near > 0 if abs(near) > eps else rb.COMBINED
            assert choice == int(want)
        assert np.array_equal(found.probs[i], p[choice][i])
    swapped = select(p.unclean, p.clean, p.combined, delta=delta, eps=eps).choice
    assert swapped.tolist() == [{0: 1, 1: 0, 2: 2}[c] for c in found.choice.tolist()]


def test_without_bounds_the_combined_head_answers_and_ties_are_its():
    p = probs(0)
    assert (select(*p, delta=jnp.inf, eps=jnp.inf).choice == rb.COMBINED).all()
    assert (select(*p, delta=jnp.inf, eps=0.0, rule="entropy").choice == rb.COMBINED).all()
    same = select(p.clean, p.clean, p.clean, delta=0.0, eps=0.0)
    assert (same.choice == rb.COMBINED).all()
    assert np.array_equal(same.probs, p.clean)
    hard = jnp.eye(C)[:3], jnp.eye(C)[1:4], jnp.full((3, C), 1 / C)
    found = select(*hard, delta=0.0)  # infinite divergences are no numbers to compare: neither is nearer
    assert (found.choice == rb.COMBINED).all()
    assert np.isfinite(np.asarray(found.probs)).all()
    default = select(*p)
    assert np.array_equal(default.choice, select(*p, delta=LOG_C / 10, eps=0.05).choice)


def test_rules_and_uncertainties_can_be_replaced():
    p = probs(1)
    always = lambda pc, pu, pm, unsure, delta, eps: jnp.full(len(pc), rb.UNCLEAN)
    assert np.array_equal(rb.select_head(*p, rule=always).probs, p.unclean)
    up, down = jnp.arange(6.0), jnp.arange(6.0)[::-1]
    found = select(*p, delta=0.0, uncertainty=(up, down))
    assert found.choice.tolist() == [0, 0, 0, 1, 1, 1]


def test_uncertainties_are_their_formulas():
    p = jax.nn.softmax(drawn(3, P, N, C), -1)
    q = np.asarray(p, np.float64)
    h = lambda q: -(q * np.log(q)).sum(-1)
    np.testing.assert_allclose(unsure_of(p), h(q.mean(0)), rtol=1e-5)
    np.testing.assert_allclose(unsure_of(p, "information"), h(q.mean(0)) - h(q).mean(0), atol=1e-6)
    top = q[:, np.arange(N), q.mean(0).argmax(-1)]
    np.testing.assert_allclose(unsure_of(p, "variance"), top.var(0), atol=1e-6)
    same = jnp.broadcast_to(p[:1], p.shape)
    for kind in ("information", "variance"):
        np.testing.assert_allclose(unsure_of(same, kind), 0, atol=1e-6)


def some_heads(seed=0):
    kernel, bias = drawn(seed, 3, D, C), drawn(seed + 1, 3, C)
    return rb.Heads(*({"kernel": k, "bias": b} for k, b in zip(kernel, bias)))


def test_without_dropout_all_passes_are_the_plain_softmax(key):
    heads, h = some_heads(), drawn(5, N, D)
    plain = rb.head_logits(heads, h)
    for dropout, alike in ((0.0, True), (0.5, False)):
        run = jax.jit(
            lambda key: rb.mc_forward(lambda p, h, k: rb.head_logits(p, h, k, dropout=dropout), heads, key, h, P)
        )
        passes = run(key)
        for p, z in zip(passes, plain):
            assert p.shape == (P, N, C)
            want = jax.nn.softmax(z, -1)
            assert bool(jnp.abs(p - want).max() < 1e-6) == alike
            if alike:
                np.testing.assert_allclose(unsure_of(p), -(want * jnp.log(want)).sum(-1), rtol=1e-4)
    p = jax.jit(lambda key: rb.predict(heads, h, key, dropout=0.0, passes=2, delta=0.2, eps=0.1))(key)
    want = select(*(jax.nn.softmax(z, -1) for z in plain), delta=0.2, eps=0.1)
    assert np.array_equal(p.choice, want.choice)
    np.testing.assert_allclose(p.probs, want.probs, atol=1e-6)


def test_dropout_keeps_the_mean_and_is_one_for_all_heads(key):
    heads = rb.three_heads({"kernel": jnp.eye(D), "bias": jnp.zeros(D)})
    z = jax.jit(lambda key: rb.head_logits(heads, jnp.ones((4000, D)), key, dropout=0.25))(key)
    assert np.array_equal(z.clean, z.unclean)
    assert np.array_equal(z.clean, z.combined)
    assert set(np.unique(np.round(np.asarray(z.clean), 4))) == {0.0, np.float32(1.3333)}
    assert float(z.clean.mean()) == pytest.approx(1, abs=0.02)


def test_what_comes_before_dropout_runs_once_for_all_passes(key):
    w = jnp.eye(256)

    def apply(w, x, key):
        h = x @ w @ w @ w @ w
        return jnp.where(jax.random.bernoulli(key, 0.9, h.shape), h, 0)[:, :C]

    cost = lambda passes: (
        jax.jit(lambda x: rb.mc_forward(apply, w, key, x, passes)).lower(jnp.ones((32, 256))).compile().cost_analysis()
    )["flops"]
    products = 4 * 2 * 32 * 256 * 256
    assert cost(8) - cost(1) < 0.5 * 7 * products


# ---------------------------------------------------------------------------------------------------------------- tuning


def student(params, x):
    h = x
    for name in ("a", "b", "c"):
        h = jnp.tanh(h @ params[name]["kernel"] + params[name]["bias"])
    return h


def base(seed=0):
    return {n: {"kernel": drawn(seed + i, D, D) / 3, "bias": drawn(seed + 9, D) / 9} for i, n in enumerate("abc")}


# As a user has them: arrays of NumPy.
X, Y = np.asarray(drawn(7, 16, D)), np.random.default_rng(7).integers(0, C, 16).astype(np.int32)
ROWS = np.stack([np.random.default_rng(i).permutation(16)[:4] for i in range(5)]).astype(np.int32)
TEACHER = drawn(8, D, C)
shake = lambda key, x: x + 0.3 * jax.random.normal(key, x.shape)
SGD = optax.sgd(0.05, 0.9)


def tuned(params, key, **options):
    adapted = adapt(student, full(at="c/**"))
    delta = adapted.init(jax.random.key(0), params, X)
    heads = rb.three_heads({"kernel": TEACHER / 2, "bias": jnp.zeros(C)})
    encode = lambda delta, x: adapted.apply(params, delta, x)
    return adapted, rb.tune(encode, lambda x: x @ TEACHER, shake, SGD, delta, heads, X, Y, ROWS, key, **options)


def test_only_the_chosen_leaves_move_and_merge_puts_them_back(key):
    params = base()
    adapted, (delta, heads, losses) = tuned(params, key)
    assert losses.shape == (5,)
    assert {p.rsplit("/", 1)[0] for p in trees.by_path(delta)} == {
        "c/kernel",
        "c/bias",
    }  # no slope for the others at all
    merged = adapted.merge(params, delta)
    for name in "ab":
        assert all(np.array_equal(merged[name][k], params[name][k]) for k in params[name])
    assert not np.allclose(merged["c"]["kernel"], params["c"]["kernel"])
    np.testing.assert_allclose(student(merged, X), adapted.apply(params, delta, X), atol=1e-6)
    kernels = [np.asarray(h["kernel"]) for h in heads]
    assert not any(np.allclose(kernels[i], kernels[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_tuning_is_the_loop(key, close):
    params = base()
    options = dict(lam=jnp.array([0.2, 0.6]), tau=3.0, dropout=0.2)
    adapted, (delta, heads, losses) = tuned(params, key, **options)
    state = (
        adapted.init(jax.random.key(0), params, X),
        rb.three_heads({"kernel": TEACHER / 2, "bias": jnp.zeros(C)}),
    )
    moments = SGD.init(state)

    @jax.jit
    def step(state, moments, x, y, k):
        changed, dropped, _ = jax.random.split(k, 3)
        both, y = jnp.concatenate([x, shake(changed, x)]), jnp.tile(y, 2)
        r = both @ TEACHER
        a = rb.teacher_weight(jax.nn.softmax(r, -1))

        def loss(state):
            z = rb.head_logits(state[1], adapted.apply(params, state[0], both), dropped, dropout=0.2)
            return rb.robust_kd_loss(z, y, r, jnp.arange(8) >= 4, a, options["lam"], options["tau"])

        value, grads = jax.value_and_grad(loss)(state)
        updates, moments = SGD.update(grads, moments, state)
        return optax.apply_updates(state, updates), moments, value

    for i, k in enumerate(jax.random.split(key, 5)):
        state, moments, value = step(state, moments, X[ROWS[i]], Y[ROWS[i]], k)
        np.testing.assert_allclose(losses[i], value, rtol=1e-4)
    close((delta, heads), state)


def test_coefficients_are_vmapped_and_the_weights_can_be_replaced(key, close):
    params = base()
    run = lambda lam, shares: tuned(params, key, lam=lam, shares=shares)[1]
    lams, shares = jnp.array([[0.0, 0.0], [0.5, 0.5]]), jnp.array([rb.SHARES, ONE_HEAD])
    many, single = jax.jit(jax.vmap(run))(lams, shares), jax.jit(run)
    for i in range(2):
        close(jax.tree.map(lambda x: x[i], many), single(lams[i], shares[i]))
    assert np.array_equal(many[1].clean["kernel"][1], TEACHER / 2), "a head without a share does not move"
    nothing = jax.jit(lambda: tuned(params, key, lam=0.5, weigh=lambda z, x, key: 0.0)[1][2])()
    np.testing.assert_allclose(nothing[0], 0.5 * many[2][0, 0], rtol=1e-5)


def test_the_mask_and_the_delta_choose_the_same_leaves():
    params = base()
    mask = rb.partial_mask(params, "c/**")
    assert jax.tree.map(bool, mask) == {n: {"kernel": n == "c", "bias": n == "c"} for n in "abc"}
    assert rb.partial_mask(params, lambda path, leaf: leaf.ndim == 1)["a"] == {"kernel": False, "bias": True}
    optimiser = optax.chain(optax.adam(0.1), mask_updates(mask))
    updates, _ = optimiser.update(jax.tree.map(jnp.ones_like, params), optimiser.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert np.array_equal(moved["a"]["kernel"], params["a"]["kernel"])
    assert not np.array_equal(moved["c"]["kernel"], params["c"]["kernel"])


# --------------------------------------------------------------------------------------------------------- types, errors


def test_heads_are_copies_and_vmap_over_examples_is_the_batch():
    head = {"kernel": jnp.ones((D, C)), "bias": jnp.zeros(C)}
    made = rb.three_heads(head)
    assert len({id(h["kernel"]) for h in (head, *made)}) == 4
    p = probs(4)
    each = jax.jit(jax.vmap(lambda c, u, m: rb.select_head(c[None], u[None], m[None]).choice[0]))(*p)
    assert np.array_equal(each, select(*p).choice)


def test_types_under_strict_promotion(key):
    z, y, r = batch(0)
    with jax.numpy_dtype_promotion("strict"):
        half = rb.Heads(*(x.astype(jnp.bfloat16) for x in z))
        for k in (z, half):
            got = jax.eval_shape(lambda k: rb.robust_kd_loss(k, y, r, AUGMENTED, jnp.ones(N), jnp.float32(0.5), 2.0), k)
            assert got.dtype == k.clean.dtype
        p = jax.eval_shape(lambda h: rb.predict(some_heads(), h, key, delta=jnp.float32(0.1)), jnp.ones((N, D)))
        assert (p.probs.dtype, p.choice.dtype) == (jnp.float32, jnp.int32)
        jax.eval_shape(lambda z: rb.robust_loss(z, z[None], y), z.clean)
        jax.eval_shape(lambda key: tuned(base(), key, lam=jnp.float32(0.5))[1], key)


Z, L, F, Q = np.zeros((N, C), np.float32), np.zeros(N, int), np.zeros(N, bool), np.full((N, C), 1 / C, np.float32)
HEADS = rb.Heads(Z, Z, Z)
BAD = {
    "logits of the heads and the teacher [(8, 4), (8, 5)]": lambda: rb.robust_kd_loss(HEADS, L, Z[:, :4], F),
    "labels of shape (3,) for 8 examples": lambda: rb.robust_kd_loss(HEADS, L[:3], Z, F),
    "augmented of shape (7,) for 8 examples": lambda: rb.robust_kd_loss(HEADS, L, Z, F[:7]),
    "shares of shape (2, 3): expected (3, 2)": lambda: rb.robust_kd_loss(HEADS, L, Z, F, shares=np.ones((2, 3))),
    "logits (8, 5) and, augmented, (8, 5)": lambda: rb.robust_loss(Z, Z, L),
    "logits (8, 5) and, augmented, (0, 8, 5)": lambda: rb.robust_loss(Z, Z[None][:0], L),
    "probabilities of shape (5,): expected (n, C) or (P, n, C)": lambda: rb.teacher_weight(Q[0]),
    "probabilities of shape (8, 1)": lambda: rb.teacher_weight(Q[:, :1]),
    "uncertainty 'margin': expected one of 'entropy', 'variance', 'information'": lambda: rb.uncertainty_of(
        Q[None], "margin"
    ),
    "probabilities of shape (8, 5): expected (P, n, C)": lambda: rb.uncertainty_of(Q),
    "rule 'vote': expected a function or one of 'entropy+kl', 'entropy'": lambda: rb.select_head(Q, Q, Q, rule="vote"),
    "probabilities (8, 5), (7, 5), (8, 5)": lambda: rb.select_head(Q, Q[:7], Q),
    "uncertainty of shape (8, 5) for 8 examples": lambda: rb.select_head(Q, Q, Q, uncertainty=(L + 0.0, Q)),
    "0 passes": lambda: rb.mc_forward(lambda p, x, k: x, None, jax.random.key(0), Q, 0),
    "the pattern 'd/**' matches no leaf": lambda: rb.partial_mask(base(), "d/**"),
    "the predicate chooses no leaf": lambda: rb.partial_mask(base(), lambda path, leaf: False),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_is_said(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(BAD[message])
