"""Ranks inside larger arrays, and dropout as a traced number: the same methods, one program for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft
from jaxpeft.weights import Dropout

pytestmark = pytest.mark.usefixtures("quick")
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
PARAMS = {"in": jnp.asarray(np.random.default_rng(1).normal(size=(6, 7)), jnp.float32), "out": jnp.ones((7, 5))}


def model(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def trained(adapted, delta, steps=4):
    """AdamW with decay and clipping on a square loss."""
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1))

    def loss(delta):
        return jnp.mean(jnp.square(adapted.apply(PARAMS, delta, X) - 1))

    def step(carry, _):
        delta, state = carry
        updates, state = optimiser.update(jax.grad(loss)(delta), state, delta)
        return (optax.apply_updates(delta, updates), state), None

    return jax.lax.scan(step, (delta, optimiser.init(delta)), length=steps)[0][0]


@pytest.mark.parametrize(
    ("factory", "scaling", "alpha"),
    [
        (jaxpeft.lora, "standard", None),
        (jaxpeft.lora, "standard", 3.0),
        (jaxpeft.lora, "rslora", None),
        (jaxpeft.dora, "rslora", 3.0),
    ],
)
def test_a_masked_rank_trains_as_the_method_of_that_rank(factory, scaling, alpha, close):
    options = dict(alpha=alpha, at="*", scaling=scaling, alpha_pattern={"out": 5.0})
    wide = lambda r: jaxpeft.adapt(model, jaxpeft.with_rank(factory(rank=4, **options), r))

    @jax.jit
    def masked(r):
        adapted = wide(r)
        delta = trained(adapted, adapted.init(jax.random.key(0), PARAMS, X))
        return delta, adapted.apply(PARAMS, delta, X)

    @jax.jit
    def narrow():
        own = jaxpeft.adapt(model, factory(rank=2, **options))
        start = wide(2).init(jax.random.key(0), PARAMS, X)
        delta = trained(own, jaxpeft.trim_rank(start, PARAMS, 2))
        return delta, own.apply(PARAMS, delta, X)

    delta, outputs = masked(2)
    close((jaxpeft.trim_rank(delta, PARAMS, 2), outputs), narrow())
    for d in delta.values():
        assert not d["a"][..., 2:].any()
        assert not d["b"][2:].any()
        assert d["b"][:2].any(), "the rank's own rows are trained"


def test_the_largest_rank_is_the_method_itself(close):
    method = jaxpeft.lora(rank=3, at="*", init="gaussian")
    start = [
        m.init(jax.random.key(1), jaxpeft.method.Call(model, PARAMS, (X,)))
        for m in (method, jaxpeft.with_rank(method, 3))
    ]
    close(*start)


def test_gaussian_columns_have_the_deviation_of_their_own_rank():
    params = {"w": jnp.zeros((4000, 8))}
    for rank in (2, 8):
        method = jaxpeft.with_rank(jaxpeft.lora(rank=8, at="w", init="gaussian"), rank)
        delta = jaxpeft.adapt(lambda p, x: x @ p["w"], method).init(jax.random.key(0), params, jnp.ones((1, 4000)))
        # 8,000 draws or more: their deviation is within 4 % of the true one.
        assert float(delta["w"]["a"][:, :rank].std()) == pytest.approx(1 / rank, rel=0.04)


def test_stacked_layers_are_trimmed_along_their_rank():
    params = {"w": jnp.zeros((3, 6, 5))}
    scanned = lambda p, x: jax.lax.scan(lambda h, w: (h @ w @ jnp.ones((5, 6)), None), x, p["w"])[0]
    method = jaxpeft.with_rank(jaxpeft.lora(rank=4, at="w"), 2)
    delta = jaxpeft.adapt(scanned, method).init(jax.random.key(0), params, X)
    assert delta["w"]["b"].shape == (3, 4, 5)
    trimmed = jaxpeft.trim_rank(delta, params, 2)["w"]
    assert (trimmed["a"].shape, trimmed["b"].shape) == ((3, 6, 2), (3, 2, 5))


def test_what_has_no_masked_rank_is_refused():
    with pytest.raises(ValueError, match="rank 5: expected 1 to 4"):
        jaxpeft.with_rank(jaxpeft.lora(rank=4), 5)
    with pytest.raises(ValueError, match="rank 0: expected 1 to 4"):
        jaxpeft.with_rank(jaxpeft.dora(rank=4), 0)
    with pytest.raises(ValueError, match="this is 'ia3'"):
        jaxpeft.with_rank(jaxpeft.ia3(), 2)
    with pytest.raises(ValueError, match=r"rank_pattern=\{'out': 1\}"):
        jaxpeft.with_rank(jaxpeft.lora(rank=4, rank_pattern={"out": 1}), 2)
    delta = jaxpeft.adapt(model, jaxpeft.lora(rank=4, at="in")).init(jax.random.key(0), PARAMS, X)
    with pytest.raises(ValueError, match=r"rank 5 of 'in'.* rank 4"):
        jaxpeft.trim_rank(delta, PARAMS, 5)


@pytest.mark.parametrize("factory", [jaxpeft.lora, jaxpeft.dora])
def test_a_traced_dropout_drops_what_a_number_drops(factory, close):
    def gradient(rate):
        adapted = jaxpeft.adapt(model, factory(rank=2, at="*", dropout=rate))
        delta = adapted.init(jax.random.key(0), PARAMS, X)
        delta = jax.tree.map(lambda x: x + 0.1, delta)
        return jax.grad(lambda d: jnp.sum(adapted.apply(PARAMS, d, X, dropout_key=jax.random.key(3)) ** 2))(delta)

    both = jax.jit(jax.vmap(gradient))(jnp.array([0.0, 0.4], jnp.float32))
    close(jax.tree.map(lambda x: x[0], both), jax.jit(lambda: gradient(0.0))())
    close(jax.tree.map(lambda x: x[1], both), jax.jit(lambda: gradient(0.4))())
    assert float(jnp.abs(both["in"]["a"][0] - both["in"]["a"][1]).max()) > 1e-3


def test_a_traced_dropout_drops_its_share_and_keeps_the_mean():
    drop = lambda rate: Dropout(jax.random.key(0), "", rate)(jnp.ones(10_000))
    none, some = jax.jit(jax.vmap(drop))(jnp.array([0.0, 0.4], jnp.float32))
    assert (none == 1).all()
    # 10,000 draws: five deviations of a share of 0.4 are 0.025.
    assert float((some == 0).mean()) == pytest.approx(0.4, abs=0.025)
    np.testing.assert_allclose(some[some != 0], 1 / 0.6, rtol=1e-6)


def test_no_dropout_draws_nothing():
    adapted = jaxpeft.adapt(model, jaxpeft.lora(rank=2, at="*"))
    delta = adapted.init(jax.random.key(0), PARAMS, X)
    program = jax.make_jaxpr(lambda d: adapted.apply(PARAMS, d, X, dropout_key=jax.random.key(0)))(delta)
    assert "random_bits" not in str(program)


def test_a_number_that_is_no_probability_is_refused():
    for rate in (1.0, -0.1, float("nan"), np.float32(1.5)):
        with pytest.raises(ValueError, match="expected a probability"):
            jaxpeft.lora(dropout=rate)
