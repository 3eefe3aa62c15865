"""Mask tuning: the card's oracles."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from jaxpeft import adapt, data, r_amt, train, trees
from jaxpeft.adapt.r_amt import gdr, pack, penalty, regularised, straight_through, switched_off, unpack
from jaxpeft.models import SequenceClassifier
from jaxpeft.models.encoder import EncoderConfig
from jaxpeft.train.step import create, make_step

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = EncoderConfig(
    vocab=20, width=8, layers=2, heads=2, head_dim=4, mlp_width=16, max_positions=24, init_std=0.3, plain=True
)
IDS = np.random.default_rng(0).integers(2, 20, (4, 5)).astype(np.int32)
MASK = np.ones((4, 5), np.int32)
MODEL = SequenceClassifier(CONFIG, 3)


def test_until_something_flips_it_is_the_base_bit_for_bit():
    params = MODEL.init(jax.random.key(0), IDS, MASK)
    adapted = adapt(MODEL.apply, r_amt(), on_dense="refuse")
    delta = adapted.init(jax.random.key(1), params, IDS, MASK)
    down = jax.tree.map(lambda r: r - 0.004, delta)
    want = MODEL.apply(params, IDS, MASK)
    assert (adapted.apply(params, down, IDS, MASK) == want).all()
    assert float(switched_off(down)) == 0
    off = jax.tree.map(lambda r: r - 0.005, delta)  # exactly the threshold: off
    assert float(switched_off(off)) == 1
    assert not jnp.allclose(adapted.apply(params, off, IDS, MASK), want)
    assert len(delta) == 8


def test_a_scores_gradient_is_the_weights_gradient_times_the_weight(key):
    w, x, g = (jax.random.normal(jax.random.fold_in(key, i), s) for i, s in enumerate([(3, 4), (5, 3), (5, 4)]))
    adapted = adapt(lambda p, x: x @ p["w"], r_amt("w"))
    delta = {"w": {"scores": jnp.where(jnp.arange(12).reshape(3, 4) % 5 == 0, 0.0, 0.01)}}
    got = jax.grad(lambda d: jnp.sum(adapted.apply({"w": w}, d, x) * g))(delta)["w"]["scores"]
    assert jnp.allclose(got, (x.T @ g) * w, atol=1e-5)


def test_the_mask_is_exactly_zero_or_one_and_strict():
    m = straight_through(jnp.array([0.004, 0.005, 0.0050001]), jnp.float32(0.005))
    assert m.tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_what_disagrees_is_dropped_by_its_share(rate, key):
    a, b = jnp.full(200_000, 2.0), jnp.full(200_000, -1.0)
    g = gdr(key, a, b, rate)
    share = 2 / 3
    assert set(np.unique(np.asarray(g)).round(5)) == {np.float32(round(2 * (1 - rate), 5)), np.float32(2.0)}
    # Five standard errors of the mean of a Bernoulli variable.
    assert float(g.mean()) == pytest.approx(2 * ((1 - rate) + rate * share), abs=5 * 2 * rate * 0.5 / np.sqrt(len(a)))


def test_what_agrees_stays_and_signs_never_turn(key):
    a = jax.random.normal(key, (1000,))
    other = jax.random.normal(jax.random.fold_in(key, 1), (1000,))
    same = jnp.abs(other) * jnp.sign(a)
    assert (gdr(key, a, same, 1.0) == a).all()
    assert (gdr(key, a, jnp.zeros(1000), 1.0) == a).all()
    assert (gdr(key, a, other, 0.0) == a).all()
    assert (gdr(key, jnp.zeros(1000), other, 1.0) == 0).all()
    g = gdr(key, a, other, 1.0)
    assert set(np.unique(np.asarray(jnp.sign(g) * jnp.sign(a)))) <= {0.0, 1.0}


def test_a_common_factor_changes_nothing_without_eps(key):
    a, b = jax.random.normal(key, (500,)), jax.random.normal(jax.random.fold_in(key, 1), (500,))
    assert jnp.allclose(gdr(key, a, b, 1.0, eps=0.0) * 4, gdr(key, 4 * a, 4 * b, 1.0, eps=0.0))


def test_far_below_eps_the_signs_no_longer_matter(key):
    a = jnp.full(20_000, 1e-12)
    kept = float((gdr(key, a, a, 1.0) > 0).mean())
    assert kept == pytest.approx(0.5, abs=0.02)


def test_each_leaf_has_draws_of_its_own(key):
    a, b = {"x": jnp.ones(100), "y": jnp.ones(100)}, {"x": -jnp.ones(100), "y": -jnp.ones(100)}
    g = gdr(key, a, b, 1.0)
    assert (g["x"] != g["y"]).any()


def test_the_penalty_is_the_plain_norm_and_has_a_gradient_at_zero():
    tree = {"a": {"scores": jnp.array([3.0, 4.0])}, "b": {"scores": jnp.zeros(2)}, "c": {"value": jnp.ones(3)}}
    value, grad = jax.value_and_grad(penalty)(tree)
    assert float(value) == 5
    assert jnp.allclose(grad["a"]["scores"], jnp.array([0.6, 0.8]))
    assert (grad["b"]["scores"] == 0).all()


def step_of(rate, **options):
    params = MODEL.init(jax.random.key(0), IDS, MASK)
    adapted, task = adapt(MODEL.apply, r_amt()), train.text_classification()
    delta = adapted.init(jax.random.key(1), params, IDS, MASK)
    rng = np.random.default_rng(0)
    delta = jax.tree.map(lambda r: r - jnp.asarray(rng.uniform(0, 0.01, r.shape), r.dtype), delta)
    batch = data.TextBatch(
        IDS, MASK, np.array([0, 1, 2, 0], np.int32), np.array([1, 1, 1, 0], np.float32), np.arange(4)
    )
    gradient = jax.value_and_grad if rate is None else regularised(adapted, task, rate, **options)
    step = make_step(adapted, task, optax.sgd(1.0), gradient=gradient)
    state = create(delta, optax.sgd(1.0))
    return state, step(state, params, batch)


def test_at_rate_zero_and_without_the_norm_it_is_the_ordinary_step(close):
    _, (plain, numbers) = step_of(None)
    _, (own, same) = step_of(0.0, norm=0.0)
    close(own.learned, plain.learned, atol=1e-6)
    close(same, numbers)


def test_the_distillation_is_never_descended_and_entries_are_dropped():
    before, (free, _) = step_of(0.0)
    _, (strict, _) = step_of(1.0)
    a, g = (jax.tree.map(lambda x, y: x - y, s.learned, before.learned) for s in (free, strict))
    a, g = (np.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (a, g))
    kept = g != 0
    np.testing.assert_allclose(g[kept], a[kept], rtol=1e-4, atol=1e-9)
    assert 0.05 < (~kept[a != 0]).mean() < 0.6


def test_bits_come_back(key):
    scores = 0.01 * jax.random.uniform(key, (3, 5))
    assert (unpack(pack(scores), (3, 5)) == np.asarray(scores > 0.005)).all()
    assert len(pack(scores)) == 2
    with pytest.raises(ValueError, match="2 bytes for a mask of shape \\(3, 9\\), which takes 4"):
        unpack(pack(scores), (3, 9))


def test_scores_may_start_spread_and_must_start_on():
    params = {"w": jnp.ones((20, 20))}
    delta = adapt(lambda p, x: x @ p["w"], r_amt("w", spread=True)).init(jax.random.key(0), params, jnp.ones((1, 20)))
    assert 0.3 < float(switched_off(delta)) < 0.7
    with pytest.raises(ValueError, match=r"start 0\.005 is not over the threshold 0\.005"):
        r_amt(start=0.005)


def test_it_merges_into_weights_with_zeros(key):
    w = jax.random.normal(key, (4, 4))
    adapted = adapt(lambda p, x: x @ p["w"], r_amt("w"))
    scores = jnp.where(jnp.eye(4, dtype=bool), 0.0, 0.01)
    merged = adapted.merge({"w": w}, {"w": {"scores": scores}})["w"]
    assert (merged == jnp.where(jnp.eye(4, dtype=bool), 0, w)).all()
    assert trees.count(merged) == 16


# ---------------------------------------------------------------------------------------------------------------- golden

GOLDEN = {
    n: jnp.asarray(x)
    for n, x in load_file(Path(__file__).parents[2] / "third_party" / "r-amt" / "golden.safetensors").items()
}


@pytest.mark.parametrize("rate", ["0.3", "1"])
@pytest.mark.parametrize("temperature", ["1", "2"])
def test_losses_and_regularised_gradients_are_those_of_the_papers_code(rate, temperature, monkeypatch, close):
    g = {n.removeprefix(f"{rate}/{temperature}/"): x for n, x in GOLDEN.items()}
    params = {f"w{i}": g[f"w{i}"] for i in (0, 1)}
    delta = {f"w{i}": {"scores": g[f"scores{i}"]} for i in (0, 1)}
    adapted = adapt(lambda p, x: jnp.tanh(x @ p["w0"]) @ p["w1"], r_amt("*"), on_dense="refuse")
    close(adapted.apply(params, delta, g["x"]), g["logits"], atol=1e-5)
    close(penalty(delta), g["norms"])

    label = g["label"].astype(jnp.int32)
    batch = data.ImageBatch(g["x"], label, jnp.ones(len(label)), jnp.arange(len(label)))
    task = train.image_classification()
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype: g["u0" if shape == (5, 8) else "u1"])
    run = regularised(adapted, task, float(rate), norm=1e-2, temperature=float(temperature))(lambda: None)
    state = create(delta, optax.sgd(1.0))
    (loss, _), grads = run(state.learned, state, params, batch, jax.random.key(0))
    close(loss / len(label), g["loss"])
    for i in (0, 1):  # the step divides by the batch
        close(grads[f"w{i}"]["scores"] / len(label), g[f"grad{i}"], atol=1e-6)
