"""Poly and multi-head routing: the card's oracles on a tiny encoder."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpeft import adapt, bake, lora, mhr, poly, trees
from jaxpeft.adapt.mhr import compose, new_tasks, routing, to_average
from jaxpeft.models import SequenceClassifier
from jaxpeft.models.encoder import EncoderConfig

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = EncoderConfig(
    vocab=20, width=8, layers=2, heads=2, head_dim=4, mlp_width=16, max_positions=24, init_std=0.3, plain=True
)
IDS = np.random.default_rng(0).integers(2, 20, (4, 5)).astype(np.int32)
MASK = np.ones((4, 5), np.int32)
MODEL = SequenceClassifier(CONFIG, 3)
PATH = "params/backbone/layers_0/attention/query/kernel"


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), IDS, MASK)


def started(params, method, seed=1, by=0.0):
    adapted = adapt(MODEL.apply, method, on_dense="refuse")
    delta = adapted.init(jax.random.key(seed), params, IDS, MASK)
    rng = np.random.default_rng(seed)
    if by:
        yes, no = trees.learned(delta)
        move = lambda x: x + by * jnp.asarray(rng.normal(size=x.shape), x.dtype)
        delta = trees.combine(jax.tree.map(move, yes), no)
    return adapted, delta


def test_shares_of_a_block_sum_to_one_and_a_large_logit_is_a_choice():
    z = jnp.array([[[0.3, -0.2, 4.0]], [[-60.0, 60.0, -60.0]]])
    alpha = routing(z)
    assert jnp.allclose(alpha.sum(-1), 1, atol=1e-6)
    assert jnp.allclose(alpha[1, 0], jnp.array([0.0, 1.0, 0.0]), atol=1e-6)
    assert jnp.allclose(routing(jnp.zeros((2, 4))), 0.25)
    drawn = routing(jnp.zeros((2, 4)), jax.random.key(0))
    assert not jnp.allclose(drawn, 0.25, atol=0.01)
    assert jnp.allclose(drawn.sum(-1), 1, atol=1e-6)


def test_blocks_stand_one_under_another_in_a_and_side_by_side_in_b(key):
    a = jax.random.normal(key, (2, 3, 4, 5))  # h, m, i/h, r
    b = jax.random.normal(jax.random.fold_in(key, 1), (2, 3, 5, 6))  # h, m, r, o/h
    alpha = routing(jax.random.normal(jax.random.fold_in(key, 2), (2, 3)))
    made = compose(a, b, alpha)
    blocks = [
        (sum(alpha[k, j] * a[k, j] for j in range(3)), sum(alpha[k, j] * b[k, j] for j in range(3))) for k in (0, 1)
    ]
    assert jnp.allclose(made["a"], jnp.concatenate([x for x, _ in blocks], axis=0), atol=1e-6)
    assert jnp.allclose(made["b"], jnp.concatenate([y for _, y in blocks], axis=1), atol=1e-6)


def test_with_one_row_for_all_blocks_heads_change_nothing(key, close):
    row = routing(jax.random.normal(key, (3,)))
    a, b = jax.random.normal(key, (2, 3, 4, 5)), jax.random.normal(key, (2, 3, 5, 6))
    joined = lambda x, at: jnp.concatenate([x[0], x[1]], axis=at)[None]
    one = compose(joined(a, 1), joined(b, 2), row[None])
    close(compose(a, b, jnp.stack([row, row])), one)


def test_one_head_is_poly_and_one_skill_is_lora_for_any_router(params, close):
    single, delta = started(params, mhr(2, 3, heads=1, tasks=2), by=0.3)
    plain, _ = started(params, poly(2, 3, tasks=2))
    for task in (0, 1):
        close(single.apply(params, delta, IDS, MASK, task=task), plain.apply(params, delta, IDS, MASK, task=task))
    shared, delta = started(params, mhr(2, skills=1, heads=4, tasks=2), by=0.3)
    close(shared.apply(params, delta, IDS, MASK, task=0), shared.apply(params, delta, IDS, MASK, task=1))
    skill = delta["skills"][PATH]
    as_lora = compose(skill["a"], skill["b"], jnp.ones((4, 1)))
    assert jax.tree.map(jnp.shape, as_lora) == {"a": (8, 2), "b": (2, 8)}


def test_equal_skills_make_the_router_irrelevant(params, close):
    adapted, delta = started(params, mhr(2, 3, heads=2, tasks=2), by=0.3)
    same = lambda x: jnp.broadcast_to(x[:, :1], x.shape)
    delta = {**delta, "skills": jax.tree.map(same, delta["skills"])}
    close(adapted.apply(params, delta, IDS, MASK, task=0), adapted.apply(params, delta, IDS, MASK, task=1))


def test_factors_are_averaged_and_not_products(params):
    _, delta = started(params, poly(2, 3), by=0.3)
    skill, alpha = delta["skills"][PATH], routing(delta["router"][PATH][0])[0]
    made = compose(skill["a"], skill["b"], alpha[None])
    products = sum(alpha[j] * skill["a"][0, j] @ skill["b"][0, j] for j in range(3))
    assert not jnp.allclose(made["a"] @ made["b"], products, atol=1e-3)


def test_at_the_start_only_b_moves(params):
    adapted, delta = started(params, mhr(2, 3, heads=2, tasks=2))
    loss = lambda d: jnp.sum(jnp.sin(adapted.apply(params, d, IDS, MASK, task=1)))
    grad = jax.grad(loss)(delta)
    assert all((z == 0).all() for z in grad["router"].values())
    for d in grad["skills"].values():
        assert (d["a"] == 0).all()
        assert (d["b"] != 0).any()
        assert jnp.allclose(d["b"][:, :1], d["b"], atol=1e-3 * float(jnp.abs(d["b"]).max())), (
            "nearly alike for all skills"
        )


def test_parameters_are_counted_as_the_card_says(params):
    r, m, h, t, layers = 2, 3, 4, 5, 2
    _, delta = started(params, mhr(r, m, heads=h, tasks=t))
    assert trees.count(delta) == 2 * layers * (m * r * (8 + 8) + t * h * m)
    a = delta["skills"][PATH]["a"]
    assert a.shape == (h, m, 2, r)
    assert float(jnp.abs(a).max()) <= 1 / np.sqrt(3 * 8)
    assert float(jnp.abs(a).max()) > 0.9 / np.sqrt(3 * 8)
    assert all(float(jnp.abs(z).max()) <= 1e-3 for z in delta["router"].values())


def test_without_a_router_it_is_the_lora_of_the_mean_skill(params, close):
    adapted, delta = started(params, mhr(2, 3, heads=2), by=0.3)
    even = {**delta, "router": jax.tree.map(jnp.zeros_like, delta["router"])}
    plain = adapt(MODEL.apply, lora(2))
    average = to_average(delta)
    close(plain.apply(params, average, IDS, MASK), adapted.apply(params, even, IDS, MASK))
    a = delta["skills"][PATH]["a"]
    close(average[PATH]["a"], a.mean(1).reshape(8, 2))


def test_a_new_task_starts_even_and_keeps_the_skills(params, close):
    _, delta = started(params, mhr(2, 3, heads=2, tasks=4), by=0.3)
    fresh = new_tasks(jax.random.key(5), delta, 2)
    assert {z.shape for z in fresh["router"].values()} == {(2, 2, 3)}
    close(fresh["skills"], delta["skills"])
    adapted = adapt(MODEL.apply, mhr(2, 3, heads=2, tasks=2))
    even = adapt(MODEL.apply, lora(2)).apply(params, to_average(delta), IDS, MASK)
    close(adapted.apply(params, fresh, IDS, MASK, task=1), even, atol=1e-2)  # U(±1e-3): nearly even


def test_the_router_alone_is_trained_where_asked(params):
    _, delta = started(params, mhr(2, 3, heads=2, train="router"))
    yes, _ = trees.learned(delta)
    assert trees.count(yes) == 4 * 2 * 3
    assert mhr(train="router").rates == ()
    assert mhr().rates == (("router/**", 100.0),)


@pytest.mark.parametrize(("router", "groups"), [("weight", 4), ("layer", 2), ("model", 1)])
def test_weights_share_routers_as_asked(params, router, groups, close):
    adapted, delta = started(params, mhr(2, 3, heads=2, tasks=2, router=router), by=0.3)
    assert len(delta["router"]) == groups
    method, own = bake(adapted.method, delta, 1)
    assert method.name == "mhr"
    close(adapt(MODEL.apply, lora(2)).apply(params, own, IDS, MASK), adapted.apply(params, delta, IDS, MASK, task=1))


def test_the_router_is_drawn_in_training_where_asked(params):
    adapted, delta = started(params, poly(2, 3, sample=True), by=0.3)
    run = lambda key: adapted.apply(params, delta, IDS, MASK, dropout_key=key)
    assert not jnp.allclose(run(jax.random.key(0)), run(jax.random.key(1)))
    assert jnp.allclose(run(None), run(None))


def test_bad_arguments_are_refused(params):
    for wrong in ({"skills": 0}, {"heads": 0}, {"tasks": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} 0"):
            mhr(**wrong)
    with pytest.raises(ValueError, match="router 'block'"):
        mhr(router="block")
    with pytest.raises(ValueError, match=r"heads 3 do not divide .*take a divisor of 8"):
        started(params, mhr(2, 3, heads=3))


GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "mhr" / "golden.safetensors")


@pytest.mark.parametrize("name", ["poly", "mhr"])
def test_shares_and_layer_are_those_of_the_reference(name, close):
    g = {k.removeprefix(f"{name}."): jnp.asarray(v) for k, v in GOLDEN.items() if k.startswith(f"{name}.")}
    heads, skills, _, rank = g["a"].shape
    logits = g["logits"].reshape(5, heads, skills)
    close(routing(logits[g["tasks"]]), g["shares"], atol=1e-6)
    adapted = adapt(lambda p, x: x @ p["w"] + p["b"], mhr(rank, skills, heads, 5, 6.0, "w"))
    delta = {"skills": {"w": {"a": g["a"], "b": g["b"]}}, "router": {"w": logits}}
    close(adapted.apply({"w": g["weight"].T, "b": g["bias"]}, delta, g["x"], task=g["tasks"]), g["y"])
