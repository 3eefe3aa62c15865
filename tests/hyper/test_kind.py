"""KIND: laws of its card, banks smaller and joined, a diffusion transformer whose examples use their class's tailors alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft import PatternError, mask_updates, trees
from jaxpeft.hyper import (
    Partition,
    TargetError,
    kind,
    kind_factorize,
    kind_gate,
    kind_join,
    kind_mask,
    kind_partition,
    kind_select,
    kind_transfer,
    per_example,
)
from jaxpeft.models import Dit, DitConfig

pytestmark = pytest.mark.usefixtures("quick")
PART = kind_partition(8, 4, 2)  # components 4, 5 are of class 0, and 6, 7 of class 1


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = jnp.tanh(nn.DenseGeneral((2, 5), name="heads")(x))
        return nn.DenseGeneral(3, axis=(-2, -1), name="out")(y)


X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
LABELS = jnp.array([0, 1, 1, 0, 2, 1])
AT = "**/kernel"


def start(key):
    return Net().init(key, X)


@pytest.fixture(scope="module")
def made():
    hyper = kind(start, 8, at=AT)
    return hyper, hyper.init(jax.random.key(0))


# --------------------------------------------------------------------------------------------------------------- the gate


def test_a_class_turns_on_the_learngenes_and_its_own_tailors():
    gates = kind_gate(PART, jnp.array([0, 1, 2]))
    assert gates.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]]


@given(st.integers(0, 6), st.integers(1, 4), st.integers(0, 4))
def test_tailors_are_divided_without_overlap_or_rest(learngenes, classes, each):
    part = kind_partition(learngenes + classes * each, learngenes, classes)
    assert part.tailors.sum(1).tolist() == [each] * classes
    assert part.tailors.sum(0).tolist() == [0] * learngenes + [1] * (classes * each)


# --------------------------------------------------------------------------------------------------------------- the bank


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_factors_are_the_nearest_kernel_of_their_rank(n, m, data):
    rank = data.draw(st.integers(1, min(n, m)))
    w = np.random.default_rng(n * 7 + m).normal(size=(n, m)).astype(np.float32)
    f = kind_factorize(jnp.asarray(w), rank)
    back = np.einsum("ir,r,ro->io", f["v"], f["s"], f["u"])
    rest = np.linalg.svd(w.astype(np.float64), compute_uv=False)[rank:]
    np.testing.assert_allclose(np.square(w - back).sum(), np.square(rest).sum(), atol=1e-4)


def test_a_full_rank_start_of_singular_values_is_the_model_itself(key):
    dense = nn.Dense(8)
    init = lambda k: dense.init(k, jnp.ones((1, 8)))
    hyper = kind(init, 8, start="svd", at=AT)
    weights = hyper.init(key)
    plain = init(jax.random.split(key)[0])
    np.testing.assert_allclose(
        hyper.apply(weights, jnp.ones(8))["params"]["kernel"], plain["params"]["kernel"], atol=1e-5
    )


def test_random_starts_have_an_ordinary_scale_with_the_gate_on(key):
    dense = nn.Dense(300)
    hyper = kind(lambda k: dense.init(k, jnp.ones((1, 200))), 64, active=40, at=AT)
    gate = kind_gate(kind_partition(64, 36, 7), jnp.array(3))
    kernel = hyper.apply(hyper.init(key), gate)["params"]["kernel"]
    np.testing.assert_allclose(jnp.square(kernel).mean(), 1 / 200, rtol=0.15)


def test_a_mixed_batch_equals_one_model_a_class(made):
    hyper, weights = made
    gates = kind_gate(PART, LABELS)
    whole = jax.jit(per_example(Net().apply, hyper))(weights, gates, X)
    each = jnp.stack([Net().apply(hyper.apply(weights, g), X[i : i + 1])[0] for i, g in enumerate(gates)])
    np.testing.assert_allclose(whole, each, atol=1e-5)
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), weights)
    run = per_example(Net().apply, hyper)
    np.testing.assert_allclose(jax.vmap(run, (0, None, None))(two, gates, X)[0], whole, atol=1e-5)


def test_no_kernel_is_formed_for_a_mixed_batch(key):
    dense, b, d, r = nn.Dense(256, use_bias=False), 64, 256, 8
    hyper = kind(lambda k: dense.init(k, jnp.ones((1, d))), r, at=AT)
    weights = jax.eval_shape(hyper.init, key)
    gates, x = jax.ShapeDtypeStruct((b, r), jnp.float32), jax.ShapeDtypeStruct((b, d), jnp.float32)
    program = jax.jit(per_example(dense.apply, hyper)).lower(weights, gates, x).compile()
    assert program.cost_analysis()["flops"] < 1.2 * 2 * b * r * (d + 256)
    assert program.memory_analysis().temp_size_in_bytes < 4 * d * 256


def test_a_class_does_not_depend_on_other_classes_tailors(made):
    hyper, weights = made
    gate = kind_gate(PART, jnp.array(0))
    loss = lambda w: jnp.square(Net().apply(hyper.apply(w, gate), X)).sum()
    grads = jax.grad(loss)(weights)["factors"]["params/heads/kernel"]
    for name, axis in (("u", 0), ("s", 0), ("v", -1)):
        other = jnp.take(grads[name], jnp.array([6, 7]), axis)
        own = jnp.take(grads[name], jnp.array([0, 4, 5]), axis)
        np.testing.assert_array_equal(other, 0)
        assert float(jnp.abs(own).max()) > 0
    moved = jax.tree.map(lambda x: x, weights)
    s = moved["factors"]["params/heads/kernel"]["s"]
    moved["factors"]["params/heads/kernel"]["s"] = s.at[6:].set(99.0)
    assert float(loss(moved)) == float(loss(weights))


def test_the_scale_may_stand_in_either_factor(made):
    hyper, weights = made
    f = weights["factors"]["params/out/kernel"]
    other = {**weights, "factors": {**weights["factors"], "params/out/kernel": {**f, "u": 3 * f["u"], "s": f["s"] / 3}}}
    a, b = (hyper.apply(w, jnp.ones(8))["params"]["out"]["kernel"] for w in (weights, other))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_of_orthonormal_components_the_norm_is_that_of_the_open_ones(key):
    dense = nn.Dense(8, use_bias=False)
    hyper = kind(lambda k: dense.init(k, jnp.ones((1, 8))), 8, start="svd", at=AT)
    weights, gate = hyper.init(key), kind_gate(PART, jnp.array(1))
    kernel = hyper.apply(weights, gate)["params"]["kernel"]
    s = weights["factors"]["params/kernel"]["s"]
    np.testing.assert_allclose(jnp.square(kernel).sum(), (gate * jnp.square(s)).sum(), rtol=1e-4)


# ------------------------------------------------------------------------------------------------- smaller, new, together


def test_the_components_of_a_class_alone_are_its_model_in_small(made):
    hyper, weights = made
    small = kind_select(weights, [0, 1, 2, 3, 6, 7])
    a = Net().apply(hyper.apply(weights, kind_gate(PART, jnp.array(1))), X)
    np.testing.assert_allclose(Net().apply(hyper.apply(small, jnp.ones(6)), X), a, atol=1e-5)
    assert trees.count(small["factors"]) * 8 == trees.count(weights["factors"]) * 6


def test_without_tailors_all_classes_share_one_model_and_without_learngenes_none():
    alone = kind_partition(8, 8, 3)
    assert (kind_gate(alone, jnp.arange(3)) == 1).all()
    apart = kind_gate(kind_partition(6, 0, 3), jnp.arange(3))
    np.testing.assert_array_equal(apart @ apart.T, 2 * jnp.eye(3))


def test_new_tailors_start_as_the_learngenes_alone_and_are_all_that_is_trained(made, key):
    hyper, weights = made
    frozen, fresh = kind_transfer(key, weights, PART, 3)
    assert trees.count(fresh) == 3 * ((4 + 10 + 1) + (10 + 3 + 1))
    alone = Net().apply(hyper.apply(weights, kind_gate(PART, jnp.array(2))), X)
    run = lambda fresh: Net().apply(hyper.apply(kind_join(frozen, fresh), jnp.ones(7)), X)
    np.testing.assert_allclose(run(fresh), alone, atol=1e-5)
    grads = jax.grad(lambda f: jnp.square(run(f)).sum())(fresh)
    assert float(jnp.abs(grads["params/heads/kernel"]["s"]).min()) > 0
    on = kind_transfer(key, weights, PART, 3, scale=1.0)[1]
    assert float(jnp.abs(run(on) - alone).max()) > 1e-3


def test_a_mask_keeps_tailors_still_that_momentum_would_move(made):
    hyper, weights = made
    rule = optax.chain(optax.adam(0.1), mask_updates(kind_mask(weights, kind_gate(PART, jnp.array(0)) > 0)))
    state, w = rule.init(weights), weights
    for label in (1, 0):  # a step of another class leaves moments behind
        gate = kind_gate(PART, jnp.array(label))
        grads = jax.grad(lambda w: jnp.square(Net().apply(hyper.apply(w, gate), X)).sum())(w)
        updates, state = rule.update(grads, state, w)
        w = optax.apply_updates(w, updates)
    before, after = (t["factors"]["params/out/kernel"]["v"] for t in (weights, w))
    np.testing.assert_array_equal(before[..., 6:], after[..., 6:])
    assert float(jnp.abs(before[..., :6] - after[..., :6]).min()) > 0


# --------------------------------------------------------------------------------------------------------- whole models


def test_a_scanned_diffusion_transformer_runs_gated_as_an_unrolled_one(key):
    sizes = dict(
        width=8,
        layers=2,
        heads=2,
        head_dim=4,
        mlp_width=16,
        image=(4, 4),
        patch=(2, 2),
        channels=1,
        classes=2,
        frequencies=4,
    )
    x, t = jax.random.normal(key, (3, 4, 4, 1)), jnp.array([1, 5, 9])
    label = jnp.array([0, 1, 2])
    outputs = []
    for scan in (False, True):
        model = Dit(DitConfig(**sizes, scan=scan))
        hyper = kind(lambda k: model.init(k, x, t, label), 8, stacked="**/layers/**" if scan else None)
        weights = hyper.init(key)
        # A fresh one answers 0: its last layers start there.
        weights["shared"] = jax.tree.map(lambda w: w + 0.1, weights["shared"])
        if not scan:
            unrolled = weights
        else:
            apart = unrolled["factors"]
            weights["factors"] = {
                p: {k: jnp.stack([apart[p.replace("layers/", f"layers_{i}/")][k] for i in range(2)]) for k in f}
                for p, f in weights["factors"].items()
            }
        outputs.append(jax.jit(per_example(model.apply, hyper))(weights, kind_gate(PART, label), x, t, label))
    assert len(unrolled["factors"]) == 12
    np.testing.assert_allclose(*outputs, atol=1e-5)


def test_examples_are_sharded_with_their_gates(made, mesh, key):
    hyper, weights = made
    x, gates = jax.random.normal(key, (8, 4)), kind_gate(PART, jnp.arange(8) % 2)
    rows = NamedSharding(mesh, PartitionSpec("d"))
    run = jax.jit(per_example(Net().apply, hyper))
    spread = run(weights, jax.device_put(gates, rows), jax.device_put(x, rows))
    np.testing.assert_allclose(spread, run(weights, gates, x), atol=1e-5)


def test_bad_input_is_named(made, key):
    hyper, weights = made
    with pytest.raises(ValueError, match="1 would be left over"):
        kind_partition(8, 3, 2)
    with pytest.raises(ValueError, match="9 learngenes of 8"):
        kind_partition(8, 9, 2)
    with pytest.raises(ValueError, match="expected 1 to 4"):
        kind_factorize(jnp.ones((4, 5)), 5)
    with pytest.raises(ValueError, match="1 <= active <= rank"):
        kind(start, 4, active=5, at=AT)
    with pytest.raises(ValueError, match="'random' or 'svd'"):
        kind(start, 4, start="pca", at=AT)  # type: ignore[arg-type]
    with pytest.raises(PatternError):
        kind(start, 4)
    with pytest.raises(TargetError, match="which is no kernel"):
        kind(start, 4, at="**/bias")
    with pytest.raises(ValueError, match="a batch of them goes through vmap"):
        hyper.apply(weights, jnp.ones((6, 8)))
    with pytest.raises(ValueError, match="from 0 to 7"):
        kind_select(weights, [8])
    with pytest.raises(ValueError, match="at least one of each"):
        kind_transfer(key, weights, Partition(0, PART.tailors), 3)
