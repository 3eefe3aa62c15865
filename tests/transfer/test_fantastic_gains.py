"""KL+DP: partitions, losses and their slopes, metrics' identities, transfer from one teacher and from several."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from jaxpeft.distillation import kl_loss
from jaxpeft.transfer import fantastic_gains as fg

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "fantastic-gains" / "golden.safetensors")
N, C, K, D = 8, 5, 3, 4
seeds = st.integers(0, 2**31)
targets_of = jax.jit(fg.dp_targets)
mask_of = jax.jit(fg.dp_mask)
loss_of = jax.jit(fg.kl_loss)
slope_of = jax.jit(jax.grad(fg.kl_loss))
metrics_of = jax.jit(fg.transfer_metrics, static_argnames="classes")
flips_of = jax.jit(fg.flips)


def drawn(seed, ties=False):
    """Logits (K + 2, n, C) and labels; with `ties`, of few values, so that many are equally sure."""
    rng = np.random.default_rng(seed)
    z = rng.integers(0, 3, (K + 2, N, C)) if ties else 2 * rng.normal(size=(K + 2, N, C))
    return jnp.asarray(z, jnp.float32), jnp.asarray(rng.integers(0, C, N))


# ----------------------------------------------------------------------------------------------------------- partitions


@given(seeds, st.booleans(), st.booleans())
def test_the_surest_is_taken_and_of_equals_the_first(seed, ties, supervised):
    z, y = drawn(seed, ties)
    st_, teachers = z[0], z[1 : K + 1]
    label = y if supervised else None
    targets, source = targets_of(teachers, st_, label)
    p = np.asarray(jax.nn.softmax(z[: K + 1], -1))
    sure = p[:, np.arange(N), y] if supervised else p.max(-1)
    best = sure.argmax(0)
    assert np.array_equal(source, best - 1)
    assert np.array_equal(targets, np.asarray(z)[best, np.arange(N)])
    one, whose = targets_of(teachers[:1], st_, label)
    mask = mask_of(teachers[0], st_, label)
    assert np.array_equal(mask, sure[1] > sure[0])
    assert np.array_equal(whose >= 0, mask)
    assert np.array_equal(one, jnp.where(mask[:, None], teachers[0], st_))
    same, whose = targets_of(jnp.stack([teachers[0]] * K), st_, label)
    assert np.array_equal(same, one)
    assert set(whose.tolist()) <= {-1, 0}


@given(seeds)
def test_a_constant_on_an_examples_logits_changes_nothing(seed):
    z, y = drawn(seed)
    move = jnp.asarray(np.random.default_rng(seed).normal(size=(2, N, 1)), jnp.float32)
    for label in (y, None):
        assert np.array_equal(mask_of(z[0] + move[0], z[1] + move[1], label), mask_of(z[0], z[1], label))
    np.testing.assert_allclose(loss_of(z[0] + move[0], z[1] + move[1]), loss_of(z[0], z[1]), atol=1e-5)


@given(seeds)
def test_a_teacher_over_one_half_has_the_examples_that_the_student_has_wrong(seed):
    z, y = drawn(seed)
    z = z.at[0].multiply(2)
    p = jax.nn.softmax(z[0], -1)[jnp.arange(N), y]
    must = (p > 0.5) & (z[1].argmax(-1) != y)
    assert not (must & ~mask_of(z[0], z[1], y)).any()
    certain = jnp.where(jax.nn.one_hot(y, C) > 0, 1e4, 0.0)
    assert mask_of(certain, z[1], y).all()
    assert not mask_of(certain, certain, y).any()


@given(seeds)
def test_flip_masks_part_the_examples(seed):
    z, y = drawn(seed, ties=True)
    positive, negative, neutral = fg.flip_masks(z[0], z[1], y)
    assert (positive.astype(int) + negative + neutral == 1).all()
    s, t = (np.asarray(x.argmax(-1) == y) for x in z[:2])
    assert np.array_equal(positive, t & ~s)
    assert np.array_equal(negative, s & ~t)


# --------------------------------------------------------------------------------------------------------------- losses

# Of the reference's `DistillKL(T)(s, t)`, float64, at commit f756c18.
S = [[0.3, -0.3, 1.3, 0.2], [-1.1, 0.7, 2.6, 1.9], [-1.4, -2.5, -1.2, 0.1]]
T = [[-4.7, -0.4, -2.5, -1.5], [-1.1, -0.6, 0.8, 2.1], [-0.3, 2.7, -1.3, 0.7]]


@pytest.mark.parametrize(
    ("temperature", "want"), [(1.0, 1.219282202929208), (2.0, 1.4464748783141756), (4.0, 1.4788769343227919)]
)
def test_the_loss_is_the_reference_codes(temperature, want):
    assert float(loss_of(jnp.asarray(S), jnp.asarray(T), temperature)) == pytest.approx(want, rel=1e-6)


@given(seeds, st.floats(0.5, 4))
def test_its_slope_is_the_difference_of_probabilities(seed, temperature):
    z, _ = drawn(seed)
    soft = lambda z: jax.nn.softmax(z / temperature, -1)
    want = temperature / N * (soft(z[0]) - soft(z[1]))
    np.testing.assert_allclose(slope_of(z[0], z[1], temperature), want, atol=1e-6)
    assert float(loss_of(z[0], z[1], temperature)) >= 0


def test_a_teacher_like_the_student_teaches_nothing():
    z, y = drawn(0)
    for label in (y, None):
        targets, source = targets_of(z[:1], z[0], label)
        assert (source == -1).all()
        assert abs(float(loss_of(z[0], targets))) < 1e-6
        assert float(jnp.abs(slope_of(z[0], targets)).max()) < 1e-7
    # Targets and the student copy are constants, however they are made.
    student = z[1]
    g = jax.jit(jax.grad(lambda z: fg.kl_loss(student, fg.dp_targets(z[None], z)[0])))
    assert not g(z[0]).any()


def test_classes_that_a_target_rules_out_do_not_make_nan():
    z, _ = drawn(1)
    hard = jnp.where(jnp.arange(C) == 2, 0.0, -jnp.inf) + jnp.zeros((N, 1))
    want = -jax.nn.log_softmax(z[0], -1)[:, 2].mean()
    np.testing.assert_allclose(loss_of(z[0], hard), want, rtol=1e-6)
    assert np.isfinite(np.asarray(slope_of(z[0], hard))).all()


def test_masks_choose_the_mean_and_an_empty_one_is_zero():
    z, _ = drawn(2)
    mask = jnp.arange(N) % 3 == 0
    np.testing.assert_allclose(loss_of(z[0], z[1], mask=mask), loss_of(z[0][mask], z[1][mask]), rtol=1e-6)
    assert loss_of(z[0], z[1], mask=jnp.zeros(N, bool)) == 0
    assert not slope_of(z[0], z[1], mask=jnp.zeros(N, bool)).any()


def test_the_general_loss_has_both_ends_and_its_options():
    z, y = drawn(3)
    f = jax.jit(fg.xe_kl_loss, static_argnames=("topk", "released"))
    xe = optax.softmax_cross_entropy_with_integer_labels(z[0], y).mean()
    np.testing.assert_allclose(f(z[0], z[1], y, 1.0, 2.0), loss_of(z[0], z[1], 2.0), rtol=1e-6)
    np.testing.assert_allclose(f(z[0], z[1], y, 0.0), xe, rtol=1e-6)
    np.testing.assert_allclose(f(z[0], z[1], y, 0.25), 0.25 * loss_of(z[0], z[1]) + 0.75 * xe, rtol=1e-6)
    np.testing.assert_allclose(f(z[0], z[1], y, 0.7, topk=C), f(z[0], z[1], y, 0.7), rtol=1e-5)
    few = np.argsort(-np.asarray(z[1]), -1)[:, :2]
    a, b = (jnp.take_along_axis(x, few, -1) for x in z[:2])
    np.testing.assert_allclose(f(z[0], z[1], y, 1.0, topk=2), loss_of(a, b), rtol=1e-5)
    twice = optax.softmax_cross_entropy_with_integer_labels(jax.nn.softmax(z[0], -1), y).mean()
    np.testing.assert_allclose(f(z[0], z[1], y, 0.0, released=True), twice, rtol=1e-6)


def test_slow_weights_stand_still_follow_and_mix():
    slow, fast = {"a": jnp.ones(2), "b": jnp.zeros(())}, {"a": jnp.full(2, 3.0), "b": jnp.ones(())}
    same = lambda a, b: jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))
    assert same(fg.ema_update(slow, fast, 1.0), slow)
    assert same(fg.ema_update(slow, fast, 0.0), fast)
    assert fg.ema_update(slow, fast, 0.75)["a"].tolist() == [1.5, 1.5]


# -------------------------------------------------------------------------------------------------------------- metrics


def test_flips_are_the_reference_codes():
    a = [0, 1, 2, 1, 1, 2, 2, 2, 1, 2, 2, 1, 2, 2, 2, 1, 2, 0, 1, 2]
    b = [2, 1, 1, 0, 1, 1, 2, 2, 0, 2, 1, 1, 2, 1, 0, 0, 2, 1, 1, 1]
    y = [2, 1, 0, 2, 0, 0, 2, 1, 0, 0, 1, 2, 1, 2, 0, 0, 2, 2, 0, 0]
    found = flips_of(*map(jnp.asarray, (a, b, y)))  # `get_flips(a, b, y)` gives pos_rel 25, neg_rel 5
    assert (float(found.positive), float(found.negative)) == (25, 5)


labels = st.lists(st.integers(0, 2), min_size=10, max_size=10).map(jnp.asarray)


@given(labels, labels, labels, labels)
def test_gain_less_loss_is_the_difference_of_accuracies(before, after, teacher, y):
    right = lambda p: 100 * float((p == y).mean())
    m, f = metrics_of(before, after, teacher, y, 3), flips_of(before, teacher, y)
    assert float(m.delta) == pytest.approx(right(after) - right(before), abs=1e-3)
    assert float(m.delta) == pytest.approx(float(m.gain - m.loss), abs=1e-3)
    assert float(f.positive - f.negative) == pytest.approx(right(teacher) - right(before), abs=1e-3)
    assert float(m.complementary) == float(f.positive)
    some = [c for c in range(3) if any(t == c == k and b != c for b, t, k in zip(before, teacher, y))]
    got = sum(bool(a == c == k and b != c) for c in some for b, a, k in zip(before, after, y))
    there = round(float(f.positive) / 10)
    assert float(m.rate) == pytest.approx(100 * got / there if there else 0, rel=1e-5)
    taught = metrics_of(before, teacher, teacher, y, 3)
    assert float(taught.rate) == (100 if there else 0)


def test_success_is_what_gains_and_teachers_come_by_accuracy():
    assert float(fg.success_rate(jnp.array([0.5, 0.0, -1, 2]))) == 50
    y = jnp.arange(4)
    good, half, bad = jnp.eye(4), jnp.eye(4)[jnp.array([0, 1, 3, 2])], jnp.eye(4)[jnp.array([1, 2, 3, 0])]
    z = jnp.stack([half, bad, good])
    assert fg.order_of(z, y).tolist() == [1, 0, 2]
    assert fg.order_of(z, y, descending=True).tolist() == [2, 0, 1]


# ------------------------------------------------------------------------------------------------------------- transfer


def apply(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def problem(seed=0, n=16):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"a": draw(D, 6), "b": draw(6, C)}
    return params, draw(n, D), 2 * draw(K, n, C), jnp.asarray(rng.integers(0, C, n))


ROWS = jnp.asarray(np.stack([np.random.default_rng(i).permutation(16)[:6] for i in range(5)]))
SGD = optax.sgd(0.05, 0.9)


@pytest.mark.parametrize("supervised", [True, False])
def test_transfer_is_the_loop_with_a_copy_that_stays(supervised, close):
    params, x, z, y = problem()
    label = y if supervised else None
    got, losses, shares = jax.jit(lambda *a: fg.transfer(apply, SGD, *a, ROWS, label, T=2.0))(params, x, z)
    p, moments = params, SGD.init(params)
    step = jax.jit(jax.value_and_grad(lambda p, x, t: fg.kl_loss(apply(p, x), t, 2.0)))
    for i, rows in enumerate(ROWS):
        targets, source = targets_of(z[:, rows], apply(params, x[rows]), None if label is None else label[rows])
        loss, grads = step(p, x[rows], targets)
        np.testing.assert_allclose(losses[i], loss, rtol=1e-4)
        assert float(shares[i]) == pytest.approx(float((source >= 0).mean()))
        updates, moments = SGD.update(grads, moments, p)
        p = optax.apply_updates(p, updates)
    close(got, p)


def test_a_student_is_not_moved_by_a_teacher_who_knows_nothing_more(close):
    params, x, _, y = problem()
    same = apply(params, x)[None]
    flat = jnp.zeros_like(same)  # never surer than the copy, by its best class
    for z, label in ((same, y), (same, None), (flat, None)):
        new, losses, shares = fg.transfer(apply, SGD, params, x, z, ROWS, label)
        if z is flat:  # of equals, rounding may choose either
            assert not shares.any()
        assert float(losses[0]) == pytest.approx(0, abs=1e-6)
        close(new, params, atol=1e-4)


def test_one_after_another_renews_the_copy_and_the_moments(close):
    params, x, z, y = problem(1)
    rows = jnp.stack([ROWS, ROWS[::-1], ROWS])
    students, losses, shares = jax.jit(lambda *a: fg.sequential(apply, SGD, *a, rows, y))(params, x, z)
    assert losses.shape == shares.shape == (K, 5)
    single = jax.jit(lambda p, z, rows: fg.transfer(apply, SGD, p, x, z[None], rows, y))
    p = params
    for i in range(K):
        p, loss, _ = single(p, z[i], rows[i])
        close(jax.tree.map(lambda x: x[i], students), p)
        np.testing.assert_allclose(losses[i], loss, atol=1e-5)


def test_sweeps_are_vmapped_and_shards_do_not_matter(close, mesh):
    params, x, z, y = problem()
    run = lambda T: fg.transfer(apply, SGD, params, x, z, ROWS, y, T=T)[0]
    temperatures = jnp.array([1.0, 3.0])
    many = jax.jit(jax.vmap(run))(temperatures)
    for i, T in enumerate(temperatures):
        close(jax.tree.map(lambda x: x[i], many), jax.jit(run)(T))
    z8, y8 = drawn(5)
    over = NamedSharding(mesh, PartitionSpec("d"))
    put = lambda x: jax.device_put(x, over)
    value = jax.jit(lambda s, t, st, y: fg.kl_loss(s, fg.dp_targets(t[None], st, y)[0]))
    one = value(z8[0], z8[1], z8[2], y8)
    np.testing.assert_allclose(value(put(z8[0]), put(z8[1]), put(z8[2]), put(y8)), one, rtol=1e-5)


def test_types_under_strict_promotion():
    params, x, z, y = problem()
    with jax.numpy_dtype_promotion("strict"):
        for z_s in (z[0], z[0].astype(jnp.bfloat16)):
            assert jax.eval_shape(lambda s, t: fg.kl_loss(s, t, jnp.float32(2)), z_s, z[1]).dtype == z_s.dtype
            jax.eval_shape(lambda s, t: fg.xe_kl_loss(s, t, y, jnp.float32(0.5), topk=2), z_s, z[1])
        jax.eval_shape(lambda p: fg.transfer(apply, optax.sgd(0.1), p, x, z, ROWS, y), params)
        jax.eval_shape(lambda y: fg.transfer_metrics(y, y, y, y, C), y)
        jax.eval_shape(lambda p: fg.ema_update(p, p, jnp.float32(0.5)), params)


Z, Y = np.zeros((N, C), np.float32), np.zeros(N, int)
BAD = {
    "teachers' logits (1, 8, 4), the student's (8, 5)": lambda: fg.dp_mask(Z[:, :4], Z),
    "teachers' logits (8, 5), the student's (8, 5)": lambda: fg.dp_targets(Z, Z),
    "teachers' logits (0, 8, 5)": lambda: fg.dp_targets(Z[None][:0], Z),
    "labels of shape (3,) for logits of shape (8, 5)": lambda: fg.dp_mask(Z, Z, Y[:3]),
    "logits of shapes (8, 5) and (7, 5)": lambda: fg.kl_loss(Z, Z[:7]),
    "logits of shapes (8, 5) and (6, 5)": lambda: fg.flip_masks(Z, Z[:6], Y),
    "logits of shapes (8, 5) and (5, 5)": lambda: fg.xe_kl_loss(Z, Z[:5], Y),
    "topk 6 of 5 classes": lambda: fg.xe_kl_loss(Z, Z, Y, topk=6),
    "topk 0 of 5 classes": lambda: fg.top_classes(Z, 0),
    "predictions and labels of shapes [(7,), (8,)]": lambda: fg.flips(Y, Y[:7], Y),
    "predictions and labels of shapes [(0,)]": lambda: fg.transfer_metrics(Y[:0], Y[:0], Y[:0], Y[:0], 2),
    "teachers' logits (8, 5): expected (K, n, C)": lambda: fg.transfer(apply, SGD, {}, Z, Z, ROWS),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_is_said(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(BAD[message])


# ------------------------------------------------------------------------------------------- the numbers of the paper's code


def golden(case):
    """A recorded step; see third_party/fantastic-gains."""
    return {k.rpartition(".")[2]: x for k, x in GOLDEN.items() if k.rpartition(".")[0] == case}


@pytest.mark.parametrize(
    ("case", "supervised", "T"),
    [("supervised", True, 1.5), ("unsupervised.", False, 1.0), ("several", True, 1.0), ("several.unsup", False, 2.0)],
)
def test_a_step_of_transfer_is_that_of_the_papers_code(case, supervised, T):
    g = golden(case)
    apply = lambda w, x: x @ w.T
    x, rows = g["x"], np.arange(len(g["x"]))[None]
    said = np.stack([x @ w.T for w in g["teachers"]])
    # The code's student and its frozen copy are apart here, so that the copy counts: by a step from another start.
    targets, source = fg.dp_targets(said, apply(g["copy"], x), g["y"] if supervised else None)
    loss, slope = jax.value_and_grad(lambda w: kl_loss(apply(w, x), targets, T))(jnp.asarray(g["student"]))
    np.testing.assert_allclose(loss, g["kl_loss"], rtol=2e-6)
    assert float(100 * (source >= 0).mean()) == pytest.approx(float(g["teacher_input"]), rel=1e-5)
    np.testing.assert_allclose(g["student"] - 0.5 * slope, g["new"], atol=3e-6)
    np.testing.assert_allclose(
        fg.ema_update(jnp.asarray(g["student"]), jnp.asarray(g["new"]), 0.9), g["slow"], atol=1e-6
    )
    # `transfer` is such steps, with the student's own start as its copy.
    new, _, shares = fg.transfer(
        apply, optax.sgd(0.5), jnp.asarray(g["copy"]), x, said, rows, g["y"] if supervised else None, T=T
    )
    assert float(100 * shares[0]) == pytest.approx(float(g["teacher_input"]), rel=1e-5)
    own = jax.grad(lambda w: kl_loss(apply(w, x), targets, T))(jnp.asarray(g["copy"]))
    np.testing.assert_allclose(new, g["copy"] - 0.5 * own, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "options"),
    [("mixed", {"alpha": 0.6}), ("few", {"alpha": 0.6, "topk": 3}), ("kept.", {"alpha": 1.0})],
)
def test_the_mixed_losses_are_those_of_the_papers_code(case, options):
    g = golden(case)
    z_t = g["x"] @ g["teachers"][0].T
    mask = ~fg.flip_masks(g["x"] @ g["student"].T, z_t, g["y"])[1] if case == "kept." else None
    loss = lambda w: fg.xe_kl_loss(g["x"] @ w.T, z_t, g["y"], T=2.0, mask=mask, released=True, **options)
    value, slope = jax.value_and_grad(loss)(jnp.asarray(g["student"]))
    np.testing.assert_allclose(value, g["dist_loss"], rtol=2e-6)
    np.testing.assert_allclose(g["student"] - 0.5 * slope, g["new"], atol=3e-6)


def test_metrics_and_masks_are_those_of_the_papers_code():
    g = golden("metrics")
    found = fg.transfer_metrics(g["before"], g["after"], g["teacher"], g["y"], 9)
    names = {"delta": "dist_delta", "gain": "knowledge_gain", "loss": "knowledge_loss", "rate": "transfer_rate"}
    for ours, theirs in names.items():
        assert float(getattr(found, ours)) == pytest.approx(float(g[theirs]), rel=1e-5), ours
    after = fg.flips(g["after"], g["teacher"], g["y"])
    assert [float(x) for x in after] == pytest.approx(
        [float(g["positive_flips"]), float(g["negative_flips"])], rel=1e-5
    )
    assert float(after.positive - found.complementary) == pytest.approx(float(g["pos_flips_delta"]), rel=1e-5)
    m = golden("masks")
    for ours, theirs in zip(fg.flip_masks(m["student"], m["teacher"], m["y"]), ("positive", "negative", "neutral")):
        np.testing.assert_array_equal(ours, m[theirs])
