"""LAME against its reference code's numbers, closed forms, and the laws of its fixed point."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from jaxpeft.transfer import affinity, lame, lame_batch, lame_predict, lame_stream, objective

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "lame" / "golden.safetensors")
RUNS = sorted(k.removesuffix("/z") for k in GOLDEN if k.endswith("/z"))
BATCHES = ("small", "few", "saturated", "signed")
KINDS = ("rbf", "knn", "linear")
N, C, D = 6, 4, 5

# Programs shared by all tests, so that each shape compiles once.
solve = jax.jit(lame, static_argnames=("max_steps", "fixed_steps"))
weigh = jax.jit(affinity, static_argnames=("kind", "k", "symmetric"))
whole = jax.jit(lame_batch, static_argnames=("kind", "k", "symmetric", "max_steps", "fixed_steps"))
energy = jax.jit(objective)


def drawn(seed, n=N, dtype=np.float32):
    """Probabilities and non-negative features."""
    rng = np.random.default_rng(seed)
    q = rng.dirichlet(np.full(C, 0.7), n)
    return jnp.asarray(q, dtype), jnp.asarray(np.abs(rng.normal(size=(n, D))), dtype)


def step_by_hand(q, w, z, lam=1.0):
    raw = np.log(np.asarray(q, np.float64) + 1e-10) + lam * np.asarray(w, np.float64) @ np.asarray(z, np.float64)
    raw = np.exp(raw - raw.max(-1, keepdims=True))
    return raw / raw.sum(-1, keepdims=True)


seeds = st.integers(0, 2**31)


# -------------------------------------------------------------------------------------------------- the reference's numbers


@pytest.mark.parametrize("name", BATCHES)
def test_affinities_are_the_reference_codes(name):
    features = jnp.asarray(GOLDEN[f"{name}/features"])
    for key in (k for k in GOLDEN if k.startswith(f"{name}/") and k.endswith("/affinity")):
        _, kind, k, symmetric, _ = key.split("/")
        got = weigh(features, kind, int(k), symmetric=symmetric == "1")
        # Squared distances by products lose what differences keep: 1e-7 of 2, over 2σ² of about 0.1.
        np.testing.assert_allclose(got, GOLDEN[key], atol=5e-6, err_msg=key)


@pytest.mark.parametrize("name", BATCHES)
def test_solutions_are_the_reference_codes(name):
    probs = jnp.asarray(GOLDEN[f"{name}/probs"])
    seen = set()
    for run in (r for r in RUNS if r.startswith(f"{name}/")):
        _, kind, k, symmetric, lam, steps = run.split("/")
        w = jnp.asarray(GOLDEN[f"{name}/{kind}/{k}/{symmetric}/affinity"])
        found = solve(probs, w, lam=float(lam), max_steps=int(steps))
        # Where the approach is slow, a rounding stays for many updates and the stop comes some of them apart.
        atol = 2e-6 if steps == "3" else 5e-5
        np.testing.assert_allclose(found.probs, GOLDEN[f"{run}/z"], atol=atol, err_msg=run)
        last, count = int(GOLDEN[f"{run}/last"][0]), int(found.steps)
        if steps == "3":
            assert count == 3
            assert bool(found.converged) == (last == 2)
        else:  # in float32 the rule is met where rounding lets it: sooner or later, with the same z to 5e-5
            assert count >= 3
            assert bool(found.converged) == (count < 100 or last == 99)
        seen.add(last >= 0)
        if lam == "1":
            z = jnp.asarray(GOLDEN[f"{run}/z"])
            want = float(GOLDEN[f"{run}/energy"][0])
            half = float(jnp.sum(z * (w @ z))) / 2  # theirs has W whole, the objective its half
            np.testing.assert_allclose(float(energy(z, probs, w)) - half, want, rtol=2e-5, atol=1e-5, err_msg=run)
    assert True in seen


@pytest.mark.parametrize("name", BATCHES)
def test_from_features_to_the_answer(name):
    probs, features = (jnp.asarray(GOLDEN[f"{name}/{k}"]) for k in ("probs", "features"))
    for kind, k in (("rbf", 5), ("knn", 3), ("linear", 5)):
        got = whole(probs, features, kind, k).probs
        np.testing.assert_allclose(got, GOLDEN[f"{name}/{kind}/{k}/0/1/100/z"], atol=5e-5)


# ------------------------------------------------------------------------------------------------------------- affinities


@given(seeds, st.integers(1, 7))
def test_affinities_are_their_definitions(seed, k):
    _, features = drawn(seed)
    x = np.asarray(features, np.float64)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    d = np.linalg.norm(x[:, None] - x[None], axis=-1)
    np.testing.assert_allclose(weigh(features, "linear", k), x @ x.T, atol=1e-6)
    knn = np.zeros((N, N))
    for i in range(N):
        knn[i, [j for j in np.argsort(d[i]) if j != i][:k]] = 1
    assert np.array_equal(weigh(features, "knn", k), knn)
    assert (np.asarray(weigh(features, "knn", k, symmetric=True)) == (knn + knn.T) / 2).all()
    sigma = np.sort(d, -1)[:, min(k, N) - 1].mean()
    want = np.eye(N) if k == 1 else np.exp(-np.square(d) / (2 * sigma**2))
    np.testing.assert_allclose(weigh(features, "rbf", k), want, atol=5e-6)


def test_rbf_and_linear_are_positive_semi_definite():
    with jax.enable_x64(True):
        _, features = drawn(3, dtype=np.float64)
        for kind in ("rbf", "linear"):
            w = weigh(features, kind)
            assert w.dtype == jnp.float64
            np.testing.assert_allclose(w, w.T, atol=1e-14)
            np.testing.assert_allclose(jnp.diag(w), 1, atol=1e-12)
            assert np.linalg.eigvalsh(w).min() > -1e-12


def test_the_length_of_features_does_not_matter_and_zeros_stay_zeros():
    _, features = drawn(1)
    scale = jnp.asarray([0.1, 3, 10, 1e-3, 1, 7])[:, None]
    for kind in KINDS:
        np.testing.assert_allclose(weigh(features * scale, kind, 3), weigh(features, kind, 3), atol=2e-6)
    none = features.at[2].set(0)
    assert not np.asarray(weigh(none, "linear"))[2].any()
    x = np.asarray(none, np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    d = np.linalg.norm(x[:, None] - x[None], axis=-1)
    sigma = np.sort(d, -1)[:, 2].mean()
    np.testing.assert_allclose(weigh(none, "rbf", 3), np.exp(-(d**2) / (2 * sigma**2)), atol=5e-6)


def test_duplicates_are_neighbours_and_never_oneself():
    features = jnp.asarray([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0.1]])
    w = np.asarray(weigh(features, "knn", 2))
    assert not np.diag(w).any()
    assert (w.sum(-1) == 2).all()
    assert w[0, [1, 2]].all()
    assert w[3, 4] == w[4, 3] == 1
    same = jnp.ones((4, 3))
    assert np.array_equal(weigh(same, "rbf", 3), np.ones((4, 4)))
    assert np.isfinite(np.asarray(weigh(features, "rbf", 1))).all()
    assert np.array_equal(weigh(features, "rbf", 2)[:3, :3], np.ones((3, 3)))


@pytest.mark.parametrize("kind", ["rbf", "knn"])
def test_one_example_keeps_its_probabilities(kind):
    q, features = drawn(0, n=1)
    assert not weigh(features, kind).any()
    np.testing.assert_allclose(whole(q, features, kind).probs, q, atol=1e-6)


@pytest.mark.parametrize(("kind", "k"), [("rbf", 1), ("rbf", 3), ("knn", 3), ("linear", 1)])
def test_duplicates_and_single_examples_have_finite_gradients(kind, k):
    features = jnp.stack([jnp.ones((N, D)), jnp.zeros((N, D)), jnp.ones((N, D)).at[1].set(2.0)])
    masks = jnp.ones((3, N), bool).at[2, 1:].set(False)
    loss = lambda x, mask: jnp.square(affinity(x, kind, k, mask=mask)).sum()
    assert np.isfinite(np.asarray(jax.jit(jax.vmap(jax.grad(loss)))(features, masks))).all()


# ------------------------------------------------------------------------------------------------------- the fixed point


@given(seeds)
def test_what_changes_nothing(seed):
    q, features = drawn(seed)
    w = weigh(features)
    for found in (solve(q, jnp.zeros((N, N))), solve(q, w, lam=0.0), solve(q, w, max_steps=0)):
        np.testing.assert_allclose(found.probs, q, atol=1e-6)
    assert solve(q, w, max_steps=0).steps == 0
    assert not solve(q, w, max_steps=0).converged
    assert solve(q, jnp.zeros((N, N))).steps == 3  # the rule is asked from the third update on
    uniform = jnp.full((N, C), 1 / C)
    np.testing.assert_allclose(solve(uniform, jnp.full((N, N), 0.5)).probs, uniform, atol=1e-6)


@given(seeds, st.floats(0.1, 3))
def test_one_example_alone_solves_its_scalar_equation(seed, weight):
    q, _ = drawn(seed, n=1)
    z = np.asarray(q, np.float64)
    for _ in range(2000):
        z = step_by_hand(q, [[weight]], z)
    # Near a point where two solutions part the approach is slow: many steps, and a tolerance of its own.
    np.testing.assert_allclose(solve(q, jnp.asarray([[weight]]), fixed_steps=2000).probs, z, atol=2e-3)


@given(seeds, st.sampled_from(KINDS), st.floats(0.0, 2.0), st.integers(0, 7))
def test_each_update_is_the_formula(seed, kind, lam, steps):
    q, features = drawn(seed)
    w = weigh(features, kind, 3)
    z = np.asarray(q, np.float64)
    for _ in range(steps):
        before, z = z, step_by_hand(q, w, z, lam)
    found = solve(q, w, lam=lam, max_steps=7, rtol=-1.0) if steps == 7 else solve(q, w, lam=lam, fixed_steps=steps)
    np.testing.assert_allclose(found.probs, z, atol=3e-5)
    assert int(found.steps) == steps
    if steps:
        np.testing.assert_allclose(float(found.change), np.abs(z - before).max(), atol=3e-5)


@pytest.mark.parametrize("kind", ["rbf", "linear", "symmetric"])
def test_the_objective_never_rises_and_the_end_is_stationary(kind):
    with jax.enable_x64(True):
        q, features = drawn(5, n=20, dtype=np.float64)
        if kind == "symmetric":
            a = jnp.asarray(np.random.default_rng(2).normal(size=(20, 8)))
            w = a @ a.T / 8
        else:
            w = weigh(features, kind)
        value = lambda z: energy(z, q, w)
        once = jax.jit(lambda z: jax.nn.softmax(jnp.log(q + 1e-10) + w @ z, -1))
        z, values = q, [float(value(q))]
        for _ in range(60):
            z = once(z)
            values.append(float(value(z)))
        assert np.diff(values).max() < 1e-12
        assert values[-1] < values[0] - 1e-3
        found = solve(q, w, max_steps=3000, rtol=1e-15)
        assert found.converged
        assert found.change < 1e-6
        end = found.probs
        assert float(jnp.abs(once(end) - end).max()) < 1e-6
        # On the simplex, the gradient is the same for all classes of a row; so is F's own, by differentiation.
        slope = jax.jit(jax.grad(objective))(end, q, w)
        each = jnp.log(end) - jnp.log(q + 1e-10) - w @ end
        for g in (slope, each):
            where = end > 1e-12
            spread = jnp.where(where, g, -jnp.inf).max(-1) - jnp.where(where, g, jnp.inf).min(-1)
            assert float(spread.max()) < 1e-4


def test_a_strong_pull_of_all_on_all_is_the_collapse():
    q, _ = drawn(7)
    best = int(q.sum(0).argmax())
    one = jnp.eye(C)[jnp.full(N, best)]
    w = jnp.full((N, N), 1e4)
    for steps in (1, 5):
        np.testing.assert_allclose(solve(q, w, fixed_steps=steps).probs, one, atol=1e-6)


def test_an_indefinite_affinity_swaps_labels_for_ever_and_says_so():
    q = jnp.asarray([[0.9, 0.1], [0.2, 0.8]])
    w = jnp.asarray([[0.0, 50], [50, 0]])
    np.testing.assert_allclose(solve(q, w, fixed_steps=1).probs, [[0, 1], [1, 0]], atol=1e-6)
    np.testing.assert_allclose(solve(q, w, fixed_steps=2).probs, [[1, 0], [0, 1]], atol=1e-6)
    # The energy of a swap is that of the next: the stop rule cannot see it, the last change does.
    assert solve(q, w).change > 0.99
    never = solve(q, w, rtol=-1.0)
    assert not never.converged
    assert never.steps == 100


def test_identical_examples_stay_identical():
    q, features = drawn(2)
    q, features = q.at[3].set(q[0]), features.at[3].set(features[0])
    for kind in ("rbf", "linear"):
        z = whole(q, features, kind, 3).probs
        np.testing.assert_allclose(z[0], z[3], atol=1e-6)


@given(seeds, st.sampled_from(KINDS), st.permutations(range(N)), st.permutations(range(C)))
def test_the_order_of_examples_and_of_classes_does_not_matter(seed, kind, rows, columns):
    q, features = drawn(seed)
    run = partial(whole, kind=kind, k=3, fixed_steps=8)
    rows, columns = jnp.asarray(rows), jnp.asarray(columns)
    want = run(q, features).probs
    np.testing.assert_allclose(run(q[rows], features[rows]).probs, want[rows], atol=3e-5)
    np.testing.assert_allclose(run(q[:, columns], features).probs, want[:, columns], atol=3e-5)


def test_a_constant_on_a_rows_logits_changes_nothing():
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(D, C)), jnp.float32)
    x = jnp.asarray(np.abs(rng.normal(size=(N, D))), jnp.float32)
    row = jnp.arange(N, dtype=jnp.float32)[:, None]
    features, head = (lambda params, x: x), (lambda params, h: h @ params)
    predict = lambda head: jax.jit(lambda p, x: lame_predict(features, head, p, x, kind="knn", k=2))(params, x)
    got, want = predict(lambda p, h: head(p, h) + row), predict(head)
    np.testing.assert_allclose(got.probs, want.probs, atol=1e-5)
    by_parts = whole(jax.nn.softmax(x @ params, -1), x, "knn", 2)
    np.testing.assert_allclose(want.probs, by_parts.probs, atol=1e-6)
    half = (params.astype(jnp.bfloat16), x.astype(jnp.bfloat16))
    low = jax.eval_shape(lambda *a: lame_predict(features, head, *a), *half)
    assert low.probs.dtype == jnp.float32


# ------------------------------------------------------------------------------------------------------ padding, streams


@given(seeds)
def test_blocks_that_do_not_touch_are_solved_apart(seed):
    q, features = drawn(seed)
    w = weigh(features, "rbf", 3)
    block = w.at[:2, 2:].set(0).at[2:, :2].set(0)
    got = solve(q, block, fixed_steps=9).probs
    for part in (slice(0, 2), slice(2, N)):
        np.testing.assert_allclose(got[part], solve(q[part], w[part, part], fixed_steps=9).probs, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("real", "k"), [(1, 3), (4, 3), (4, 5)])
def test_padding_is_as_if_it_were_not_there(kind, real, k):
    q, features = drawn(11)
    rows = jnp.asarray([0, 2, 3, 5][:real])
    mask = jnp.zeros(N, bool).at[rows].set(True)
    trash = jnp.nan if k == 5 else 1e3
    dirty, wild = jnp.where(mask[:, None], q, trash), jnp.where(mask[:, None], features, trash)
    w, small = weigh(wild, kind, k, mask=mask), weigh(features[rows], kind, k)
    np.testing.assert_allclose(w[rows][:, rows], small, atol=2e-6)
    assert float(jnp.abs(w).sum()) == pytest.approx(float(jnp.abs(small).sum()), abs=1e-5)
    got, want = whole(dirty, wild, kind, k, mask=mask), whole(q[rows], features[rows], kind, k)
    np.testing.assert_allclose(got.probs[rows], want.probs, atol=2e-5)
    assert bool(got.converged) == bool(want.converged)
    np.testing.assert_allclose(got.probs[~np.asarray(mask)], 1 / C, atol=1e-6)
    value = energy(want.probs, q[rows], small)
    np.testing.assert_allclose(energy(got.probs, dirty, w, mask=mask), value, rtol=1e-4, atol=1e-4)
    nobody = whole(dirty, wild, kind, k, mask=jnp.zeros(N, bool))
    assert nobody.converged
    assert np.isfinite(np.asarray(nobody.probs)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_its_batches_one_after_another(kind):
    q, features = drawn(4, n=16)  # the last batch has 4 of 6
    run = jax.jit(partial(lame_stream, batch=N, kind=kind, k=3))
    got = run(q, features)
    assert got.probs.shape == (16, C)
    assert got.steps.shape == got.converged.shape == got.change.shape == (3,)
    for b, i in enumerate(range(0, 16, N)):
        one = whole(q[i : i + N], features[i : i + N], kind, 3)
        np.testing.assert_allclose(got.probs[i : i + N], one.probs, atol=2e-5)
        assert bool(got.converged[b]) == bool(one.converged)
    assert len(set(got.steps.tolist())) > 1, "batches stop on their own"
    broken = run(q.at[2, 1].set(jnp.nan), features)
    assert broken.converged.tolist() == [False, *got.converged[1:].tolist()]
    np.testing.assert_allclose(broken.probs[N:], got.probs[N:], atol=1e-6)


# ------------------------------------------------------------------------------------------- jit, vmap, grad, shards, types


@pytest.mark.parametrize("kind", ["rbf", "knn"])
def test_plain_jit_vmap_and_scan_agree(kind):
    many = [drawn(i) for i in range(3)]
    q, features = (jnp.stack(x) for x in zip(*many))
    lam = jnp.asarray([0.5, 1.0, 0.0])
    run = jax.jit(lambda q, x, lam: lame_batch(q, x, kind, 3, lam=lam))
    together = jax.jit(jax.vmap(run))(q, features, lam)
    _, scanned = jax.lax.scan(lambda _, args: (None, run(*args)), None, (q, features, lam))
    for i in range(3):
        plain = run(q[i], features[i], lam[i])
        for got in (together, scanned):
            np.testing.assert_allclose(got.probs[i], plain.probs, atol=1e-5)
            assert abs(int(got.steps[i]) - int(plain.steps)) <= 3  # where rounding meets the stop rule


@pytest.mark.parametrize("kind", ["rbf", "linear"])
def test_gradients_are_those_of_finite_differences(kind):
    with jax.enable_x64(True):
        q, features = drawn(9, dtype=np.float64)
        label = jnp.arange(N) % C

        @jax.jit
        def loss(q, x, lam):
            z = lame_batch(q, x, kind, 3, lam=lam, fixed_steps=5).probs
            return -jnp.log(z[jnp.arange(N), label]).mean()

        args = (q, features, jnp.asarray(0.7))
        grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*args)
        rng = np.random.default_rng(0)
        for i, (x, g) in enumerate(zip(args, grads)):
            v = jnp.asarray(rng.normal(size=x.shape))
            moved = lambda h: loss(*(a + h * v if j == i else a for j, a in enumerate(args)))
            assert float(jnp.abs(g).max()) > 1e-4
            assert float((g * v).sum()) == pytest.approx(float(moved(1e-6) - moved(-1e-6)) / 2e-6, rel=1e-5)
        # Forward mode also of the loop of unknown length.
        free = jax.jit(lambda lam: lame_batch(q, features, kind, 3, lam=lam).probs[0, 0])
        _, slope = jax.jit(lambda lam: jax.jvp(free, (lam,), (jnp.ones(()),)))(args[2])
        want = (free(args[2] + 1e-4) - free(args[2] - 1e-4)) / 2e-4
        assert float(slope) == pytest.approx(float(want), rel=1e-2)


def test_a_stream_over_eight_devices_is_the_same(mesh):
    q, features = drawn(6, n=8 * N)
    want = jax.jit(partial(lame_stream, batch=N, k=3))(q, features)
    over = NamedSharding(mesh, PartitionSpec("d"))
    got = jax.jit(partial(lame_stream, batch=N, k=3))(jax.device_put(q, over), jax.device_put(features, over))
    np.testing.assert_allclose(got.probs, want.probs, atol=1e-5)
    assert got.converged.tolist() == want.converged.tolist()


def test_types_under_strict_promotion():
    q, features = drawn(0)
    with jax.numpy_dtype_promotion("strict"):
        for dtype, want in ((jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32)):
            for kind in KINDS:
                run = partial(lame_batch, kind=kind, symmetric=True, lam=jnp.float32(0.5))
                found = jax.eval_shape(run, q.astype(dtype), features.astype(dtype), mask=jnp.ones(N, bool))
                assert found.probs.dtype == want
                assert found.steps.dtype == jnp.int32
        assert jax.eval_shape(objective, q, q, jnp.eye(N)).dtype == jnp.float32
        jax.eval_shape(lambda q, x: lame_stream(q, x, 4, fixed_steps=3), q, features)


# ------------------------------------------------------------------------------------------------------------- errors


Q, X, W = np.full((N, C), 1 / C, np.float32), np.ones((N, D), np.float32), np.eye(N, dtype=np.float32)
BAD = {
    "affinity 'cosine': expected one of 'rbf', 'knn', 'linear'": lambda: affinity(X, "cosine"),
    "k 0: an example has at least one neighbour": lambda: affinity(X, k=0),
    "features of shape (5,)": lambda: affinity(X[0]),
    "features of shape (0, 5)": lambda: affinity(X[:0]),
    "a mask of shape (2,) for 6 examples": lambda: affinity(X, mask=np.ones(2)),
    "max_steps -1": lambda: lame(Q, W, max_steps=-1),
    "fixed_steps -2": lambda: lame(Q, W, fixed_steps=-2),
    "probs of shape (4,)": lambda: lame(Q[0], W),
    "probs of shape (0, 4)": lambda: lame(Q[:0], W[:0, :0]),
    "an affinity of shape (6, 5) for 6 examples": lambda: lame(Q, W[:, :5]),
    "a mask of shape (7,) for 6 examples": lambda: lame(Q, W, mask=np.ones(7)),
    "z of shape (6, 3) with probs of shape (6, 4)": lambda: objective(Q[:, :3], Q, W),
    "batch 0": lambda: lame_stream(Q, X, 0),
    "probs (6, 4) and features (5, 5)": lambda: lame_stream(Q, X[:5], 2),
    "an affinity of shape (5, 5) for 6 examples": lambda: lame_batch(Q, X[:5]),
    "affinity 'euclid'": lambda: lame_predict(lambda p, x: x, lambda p, h: h, None, X, kind="euclid"),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_is_said(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(BAD[message])
