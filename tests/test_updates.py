"""Pieces of optimisers: masks on updates, relative rates, the anchor."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxpeft import PatternError, mask_updates, relative_rates
from jaxpeft.updates import anchor_l1, descend

PARAMS = {"a": jnp.ones(3), "b": {"c": jnp.full(2, 2.0)}}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)


def run(transformation, steps=3):
    params, state = PARAMS, transformation.init(PARAMS)
    for _ in range(steps):
        updates, state = transformation.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_masked_entries_stay_bit_for_bit_under_momentum_and_decay():
    mask = {"a": jnp.array([1, 0, 1]), "b": False}
    got = run(optax.chain(optax.adamw(0.1, weight_decay=0.5), mask_updates(mask)))
    free = run(optax.adamw(0.1, weight_decay=0.5))
    assert got["a"][1] == 1
    assert (got["b"]["c"] == 2).all()
    assert got["a"][0] == free["a"][0] != 1


def test_masked_gradients_alone_would_move_what_should_stay():
    masked = lambda g: {"a": g["a"] * jnp.array([1, 0, 1]), "b": g["b"]}
    before = optax.stateless(lambda g, p: masked(g))
    assert run(optax.chain(before, optax.adamw(0.1, weight_decay=0.5)))["a"][1] != 1


def test_a_population_of_masks_is_one_program():
    masks = jnp.eye(3)
    moved = jax.vmap(lambda m: run(optax.chain(optax.sgd(1.0), mask_updates({"a": m, "b": 1})))["a"])(masks)
    assert (moved == 1 - 3 * masks).all()


def test_a_relative_rate_is_the_rate_times_its_factor():
    got = run(optax.chain(optax.adam(0.1), relative_rates([("b/*", 3.0), ("**", 0.5)])))
    assert jnp.allclose(got["b"]["c"], run(optax.adam(0.3))["b"]["c"])
    assert jnp.allclose(got["a"], run(optax.adam(0.05))["a"])
    with pytest.raises(PatternError, match="matches no leaf"):
        relative_rates([("x", 2.0)]).init(PARAMS)


def test_the_anchor_counts_what_moved():
    assert anchor_l1(PARAMS, GRADS) == 2


def test_a_descent_is_its_steps_one_after_another():
    loss = lambda w, x: jnp.square(w["a"] - x).sum()
    start, xs, rule = {"a": jnp.array([1.0, -2.0])}, jnp.arange(8.0).reshape(4, 2), optax.adamw(0.1, weight_decay=0.3)
    weights, losses = jax.jit(lambda w, xs: descend(loss, w, rule, xs))(start, xs)
    by_hand, moments = start, rule.init(start)
    for x, told in zip(xs, losses, strict=True):
        value, grads = jax.value_and_grad(loss)(by_hand, x)
        assert float(told) == pytest.approx(float(value), rel=1e-5)
        updates, moments = rule.update(grads, moments, by_hand)
        by_hand = optax.apply_updates(by_hand, updates)
    assert weights["a"].tolist() == pytest.approx(by_hand["a"].tolist(), rel=1e-5)
