"""Self-tuning networks: laws of their card, the reference's layers, steps that move what they should."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from jaxpeft import PatternError
from jaxpeft.hyper import (
    Responding,
    TargetError,
    cutout,
    dropout,
    per_example,
    self_tuning,
    stn,
)
from jaxpeft.tune import Hyperparameter, constrain, entropy, perturb

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "stn" / "golden.safetensors")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
        y = nn.LayerNorm(name="norm")(y)
        return nn.Dense(3, name="out")(y.mean((1, 2)))


X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6, 6, 2)), jnp.float32)


def start(key):
    return Net().init(key, X[:1])


@pytest.fixture(scope="module")
def made(moved):
    hyper = stn(start, 2)
    return hyper, moved(hyper.init(jax.random.key(0)))


# --------------------------------------------------------------------------------------------------------------- response


def test_without_hyperparameters_or_at_zero_it_is_the_elementary_network(made, key):
    hyper, weights = made
    plain = hyper.apply(weights, jnp.zeros(2))["params"]
    e, s = weights["elementary"], weights["scale"]["params/conv"]
    np.testing.assert_allclose(plain["conv"]["kernel"], s * e["params/conv/kernel"], atol=1e-6)
    np.testing.assert_allclose(plain["conv"]["bias"], s * e["params/conv/bias"], atol=1e-6)
    np.testing.assert_array_equal(plain["norm"]["scale"], e["params/norm/scale"])
    none = stn(start, 0)
    own = none.init(key)
    np.testing.assert_allclose(
        none.apply(own, jnp.zeros(0))["params"]["out"]["kernel"], own["elementary"]["params/out/kernel"]
    )


def test_a_batch_of_examples_equals_one_network_each(made, key):
    hyper, weights = made
    u = jax.random.normal(key, (5, 2))
    whole = jax.jit(per_example(Net().apply, hyper))(weights, u, X)
    each = jnp.stack([Net().apply(hyper.apply(weights, v), X[i : i + 1])[0] for i, v in enumerate(u)])
    np.testing.assert_allclose(whole, each, atol=1e-5)
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), weights)
    np.testing.assert_allclose(
        jax.vmap(per_example(Net().apply, hyper), (0, None, None))(two, u, X)[0], whole, atol=1e-5
    )


def test_its_gradient_is_that_of_the_formed_weights(made, key):
    hyper, weights = made
    u = jax.random.normal(key, (5, 2))
    lazy = lambda w, u: jnp.square(per_example(Net().apply, hyper)(w, u, X)).sum()
    one = lambda u, x, w: Net().apply(hyper.apply(w, u), x[None])[0]
    dense = lambda w, u: jnp.square(jax.vmap(one, (0, 0, None))(u, X, w)).sum()
    for a, b in zip(*(jax.tree.leaves(jax.grad(f, (0, 1))(weights, u)) for f in (lazy, dense))):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1, float(jnp.abs(b).max())))


def test_a_mixed_batch_costs_two_products_a_layer(key):
    dense = nn.Dense(64)
    hyper = stn(lambda k: dense.init(k, jnp.ones((1, 64))), 3)
    weights = jax.eval_shape(hyper.init, key)
    u, x = jax.ShapeDtypeStruct((32, 3), jnp.float32), jax.ShapeDtypeStruct((32, 64), jnp.float32)
    flops = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
    plain = flops(dense.apply, hyper.target, x)
    assert flops(per_example(dense.apply, hyper), weights, u, x) < 2.3 * plain


def test_tables_and_recurrent_layers_respond_too(key, moved):
    class Reader(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(7, 4, name="table")(ids)
            return nn.RNN(nn.LSTMCell(4, name="cell"), name="rnn")(x)

    ids = jax.random.randint(key, (3, 5), 0, 7)
    hyper = stn(lambda k: Reader().init(k, ids), 2, embeddings="**/embedding", scale=False)
    weights, u = moved(hyper.init(key)), jax.random.normal(key, (3, 2))
    assert weights["scale"] == {}
    table = hyper.apply(weights, u[0])["params"]["table"]["embedding"]
    name = "params/table/embedding"
    gate = weights["gates"][name] @ u[0]
    np.testing.assert_allclose(table, weights["elementary"][name] + gate * weights["response"][name], atol=1e-5)
    whole = per_example(Reader().apply, hyper)(weights, u, ids)
    each = jnp.stack([Reader().apply(hyper.apply(weights, v), ids[i : i + 1])[0] for i, v in enumerate(u)])
    np.testing.assert_allclose(whole, each, atol=1e-5)


def test_a_tied_table_is_read_and_multiplied_without_one_of_each_example(key, moved):
    """Its gate lies along the axis that the output layer sums: it goes into the input, not into the table."""

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            table = nn.Embed(50, 16, name="table")
            return table.attend(nn.Dense(16, name="inner")(table(ids)))

    ids = jax.random.randint(key, (5, 3), 0, 50)
    hyper = stn(lambda k: Tied().init(k, ids), 2, embeddings="**/embedding", scale=False)
    weights, u = moved(hyper.init(key)), jax.random.normal(key, (5, 2))
    run = per_example(Tied().apply, hyper)
    each = jnp.stack([Tied().apply(hyper.apply(weights, v), ids[i : i + 1])[0] for i, v in enumerate(u)])
    np.testing.assert_allclose(run(weights, u, ids), each, atol=1e-5)
    tables = 5 * 50 * 16 * 4
    program = jax.jit(lambda w, u, ids: run(w, u, ids).sum()).lower(weights, u, ids).compile()
    assert program.memory_analysis().temp_size_in_bytes < tables


def test_scanned_layers_have_gates_of_their_own(key, moved):
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = lambda layer, carry, _: (jnp.tanh(layer(carry)), None)
            run = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return run(nn.Dense(4, name="layers"), x, None)[0]

    x = jax.random.normal(key, (5, 4))
    hyper = stn(lambda k: Scanned().init(k, x), 2, stacked="**/layers/**")
    weights, u = moved(hyper.init(key)), jax.random.normal(key, (5, 2))
    assert weights["gates"]["params/layers/kernel"].shape == (3, 4, 2)
    assert weights["scale"]["params/layers"].shape == (3,)
    whole = per_example(Scanned().apply, hyper)(weights, u, x)
    each = jnp.stack([Scanned().apply(hyper.apply(weights, v), x[i : i + 1])[0] for i, v in enumerate(u)])
    np.testing.assert_allclose(whole, each, atol=1e-5)


def test_starts_are_the_references(key):
    dense = nn.Dense(200)
    weights = stn(lambda k: dense.init(k, jnp.ones((1, 100))), 3).init(key)
    for branch in ("elementary", "response"):
        for name in ("params/kernel", "params/bias"):
            assert float(jnp.abs(weights[branch][name]).max()) <= 0.1
        np.testing.assert_allclose(weights[branch]["params/kernel"].std(), 0.1 / 3**0.5, rtol=0.05)
    np.testing.assert_allclose(weights["gates"]["params/kernel"].std(), 0.01, rtol=0.1)
    assert float(weights["scale"]["params"]) == 1.0


@pytest.mark.parametrize("case", ["linear", "unbiased", "conv"])
def test_a_layer_equals_the_references(case):
    g = {k.removeprefix(f"{case}."): x for k, x in GOLDEN.items() if k.startswith(f"{case}.")}
    image = case == "conv"
    layer = nn.Conv(6, (3, 3), padding=1) if image else nn.Dense(6, use_bias=case == "linear")
    x = jnp.asarray(g["x"].transpose(0, 2, 3, 1) if image else g["x"])
    turn = lambda w: jnp.asarray(w.transpose(2, 3, 1, 0) if image else w.T)
    hyper = stn(lambda k: layer.init(k, x[:1]), 4)
    gates = g["htensor_to_scalars.weight"]
    biased = case != "unbiased"
    both = lambda branch: (
        {"params/kernel": turn(g[f"{branch}_weight"])}
        | ({"params/bias": jnp.asarray(g[f"{branch}_bias"])} if biased else {})
    )
    weights = {
        "elementary": both("elem"),
        "response": both("hnet"),
        "gates": {"params/kernel": gates[:6]} | ({"params/bias": gates[6:]} if biased else {}),
        "scale": {"params": jnp.asarray(g["elem_scalar"][0])},
    }
    y = per_example(layer.apply, hyper)(jax.tree.map(jnp.asarray, weights), jnp.asarray(GOLDEN["u"]), x)
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2) if image else y, g["y"], atol=2e-5)


def test_values_and_entropy_equal_the_references():
    specs = {
        "drop": Hyperparameter(0.5, 0.0, 0.9), "weight": Hyperparameter(1.0, low=0.0), "top": Hyperparameter(0.0, high=2.0),
        "holes": Hyperparameter(1.0, 0.0, 5.0, discrete=True),
    }  # fmt: skip
    np.testing.assert_allclose(constrain(specs, jnp.asarray(GOLDEN["u"])), GOLDEN["values"], atol=1e-5)
    value, slope = jax.value_and_grad(entropy)(jnp.asarray(GOLDEN["xi"]))
    np.testing.assert_allclose(value, GOLDEN["entropy"], rtol=1e-5)
    np.testing.assert_allclose(slope, GOLDEN["entropy_slope"], rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- what it converges to


def test_row_gates_give_the_exact_ridge_solution_for_every_penalty(wide):
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(20, 4)), rng.normal(size=20)
    u, d, r = np.linalg.svd(x, full_matrices=False)
    for lam in (-3.0, 0.0, 2.0):
        gates = jax.nn.sigmoid(jnp.log(d**2) - lam)
        q, s = gates[:, None] * r, u.T @ t / d  # Q*(λ) = diag(gates) Q_0 with Q_0 = Rᵀ, s* = s_0
        expected = np.linalg.solve(x.T @ x + np.exp(lam) * np.eye(4), x.T @ t)
        np.testing.assert_allclose(q.T @ s, expected, atol=1e-8)


def test_on_a_quadratic_the_response_learned_under_noise_gives_the_implicit_gradient(wide, key):
    rng = np.random.default_rng(1)
    b, c, root = rng.normal(size=(3, 2)), rng.normal(size=3), rng.normal(size=(3, 3))
    a = root @ root.T + np.eye(3)
    lam, target = jnp.array([0.4, -0.7]), rng.normal(size=3)
    noise = lam + 0.5 * jax.random.normal(key, (256, 2))

    def inner(p):
        off = noise @ p["W"].T + p["c"] - noise @ b.T - c
        return 0.5 * jnp.einsum("bi,ij,bj->b", off, a, off).mean()

    p, rule = {"W": jnp.zeros((3, 2)), "c": jnp.zeros(3)}, optax.adam(optax.cosine_decay_schedule(0.1, 3000))
    step = lambda s, _: (lambda u, m: ((optax.apply_updates(s[0], u), m), None))(
        *rule.update(jax.grad(inner)(s[0]), s[1])
    )
    (p, _), _ = jax.lax.scan(step, (p, rule.init(p)), None, length=3000)
    np.testing.assert_allclose(p["W"], b, atol=1e-3)
    np.testing.assert_allclose(p["c"], c, atol=1e-3)
    outer = lambda w: jnp.square(w - target).sum()
    through = jax.grad(lambda lam: outer(p["W"] @ lam + p["c"]))(lam)
    np.testing.assert_allclose(through, b.T @ jax.grad(outer)(b @ lam + c), atol=1e-2)


# ------------------------------------------------------------------------------------------------------------------ tuning

SPECS = {"drop": Hyperparameter(0.2, 0.0, 0.9), "hole": Hyperparameter(2.5, 0.0, 5.0, discrete=True)}
RULES = (optax.sgd(0.05, 0.9), optax.adam(0.03), optax.adam(0.03))


def train_loss(model, batch, values, key):
    images, labels = batch
    first, second = jax.random.split(key)
    logits = model.apply(dropout(first, cutout(second, images, values["hole"]), values["drop"]))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def valid_loss(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(batch[0]), batch[1]).mean()


def tuner(**more):
    return self_tuning(
        Net().apply, stn(start, 2), SPECS, train_loss=train_loss, valid_loss=valid_loss, optimisers=RULES, **more
    )


BATCH = (X, jnp.array([0, 1, 2, 0, 1]))


def test_each_kind_of_step_moves_its_own_parameters_alone(key):
    t = tuner()
    state = t.init(key)
    trained, loss = jax.jit(t.train_step)(state, BATCH, key)
    assert np.isfinite(loss)
    np.testing.assert_array_equal(trained.lam, state.lam)
    np.testing.assert_array_equal(trained.xi, state.xi)
    moves = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), trained.weights, state.weights)
    assert min(jax.tree.leaves(moves["gates"])) > 0
    tuned, loss = jax.jit(t.valid_step)(trained, BATCH, key)
    assert np.isfinite(loss)
    for a, b in zip(jax.tree.leaves(tuned.weights), jax.tree.leaves(trained.weights)):
        np.testing.assert_array_equal(a, b)
    assert float(jnp.abs(tuned.lam - state.lam).min()) > 0
    assert float(jnp.abs(tuned.xi - state.xi).min()) > 0


def test_the_training_loss_has_no_slope_in_the_hyperparameters(key):
    t = tuner()
    state = t.init(key)
    slope = jax.grad(lambda lam: t.train_step(state._replace(lam=lam), BATCH, key)[1])(state.lam)
    np.testing.assert_array_equal(slope, 0)


def test_noise_shrinks_without_entropy_and_grows_with_much_of_it(key, moved):
    # One linear layer: the loss is convex in λ, so that noise can only cost.
    dense, batch = nn.Dense(3), (jax.random.normal(key, (64, 6)), jnp.arange(64) % 3)
    hyper = stn(lambda k: dense.init(k, batch[0]), 2)
    weights = moved(hyper.init(key), by=1.0)

    def scales(tau):
        t = self_tuning(
            dense.apply, hyper, SPECS, train_loss=train_loss, valid_loss=valid_loss, optimisers=RULES, tau=tau
        )
        state = t.init(key)._replace(weights=weights)
        step = lambda s, k: t.valid_step(s, batch, k)
        return jax.lax.scan(step, state, jax.random.split(key, 60))[0].xi - state.xi

    assert (scales(0.0) < 0).all()
    assert (scales(10.0) > 0).all()


def test_without_tuned_scales_the_noise_stays_and_validation_has_none(key):
    t = tuner(tune_scales=False)
    state = t.init(key)
    a, one = t.valid_step(state, BATCH, key)
    _, other = t.valid_step(state, BATCH, jax.random.fold_in(key, 1))
    assert float(one) == float(other)
    np.testing.assert_array_equal(a.xi, state.xi)
    plain = valid_loss(Responding(lambda x: Net().apply(t.params(state), x), None), BATCH)
    np.testing.assert_allclose(one, plain, rtol=1e-5)


def test_a_cycle_is_its_steps_and_the_result_an_ordinary_network(key):
    t = tuner()
    state = t.init(key)
    train = jax.tree.map(lambda x: jnp.stack([x, x]), BATCH)
    valid = jax.tree.map(lambda x: x[None], BATCH)
    run = jax.jit(t.cycle)
    after, (losses, validated, values) = run(state, train, valid, key)
    assert losses.shape == (2,)
    assert validated.shape == (1,)
    first, second = jax.random.split(key)
    by_hand = state
    for k in jax.random.split(first, 2):
        by_hand, _ = t.train_step(by_hand, BATCH, k)
    by_hand, _ = t.valid_step(by_hand, BATCH, jax.random.split(second, 1)[0])
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(by_hand)):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert t.values(after) == {name: pytest.approx(float(v)) for name, v in zip(SPECS, values)}
    assert jax.tree.map(jnp.shape, t.params(after)) == jax.tree.map(jnp.shape, start(key))
    several = jax.vmap(run, (0, None, None, 0))(
        jax.vmap(t.init)(jax.random.split(key, 2)), train, valid, jax.random.split(key, 2)
    )
    assert several[1][2].shape == (2, 2)


def test_centred_responses_are_the_elementary_network_at_the_start(key):
    t = tuner(centre=True)
    state = t.init(key)
    np.testing.assert_allclose(
        t.params(state)["params"]["out"]["kernel"], state.weights["elementary"]["params/out/kernel"], atol=1e-7
    )


def test_a_penalty_is_of_the_first_examples_weights_and_trains_the_response(key):
    specs = {"penalty": Hyperparameter(0.5, low=0.0, shared=True)}
    hyper = stn(start, 1)
    penalty = lambda m, b, values, k: (
        values["penalty"][0] * sum(jnp.square(w).sum() for w in jax.tree.leaves(m.params()))
    )
    t = self_tuning(Net().apply, hyper, specs, train_loss=penalty, valid_loss=valid_loss, optimisers=RULES)
    state = t.init(key)
    after, loss = t.train_step(state, BATCH, key)
    u = perturb(jax.random.split(key)[0], specs, state.lam, state.xi, 5)
    own = sum(jnp.square(w).sum() for w in jax.tree.leaves(hyper.apply(state.weights, u[0])))
    np.testing.assert_allclose(loss, constrain(specs, u)[0, 0] * own, rtol=1e-5)
    assert (
        float(jnp.abs(after.weights["gates"]["params/out/kernel"] - state.weights["gates"]["params/out/kernel"]).max())
        > 0
    )


def test_examples_are_sharded_with_their_weights(mesh, key):
    t = tuner()
    state, batch = t.init(key), (jnp.concatenate([X, X[:3]]), jnp.arange(8) % 3)
    rows = NamedSharding(mesh, PartitionSpec("d"))
    spread = jax.jit(t.valid_step)(state, jax.device_put(batch, rows), key)
    np.testing.assert_allclose(spread[1], jax.jit(t.valid_step)(state, batch, key)[1], rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ regularisers


def test_dropout_has_each_examples_rate_and_keeps_the_mean(key):
    y = dropout(key, jnp.ones((3, 20000)), jnp.array([0.0, 0.3, 0.8]))
    np.testing.assert_allclose((y == 0).mean(1), [0.0, 0.3, 0.8], atol=0.02)
    np.testing.assert_allclose(y.mean(1), 1, atol=0.03)


def test_holes_have_each_images_size_and_number(key):
    images = jnp.ones((4, 40, 40, 1))
    out = jax.vmap(lambda k: cutout(k, images, jnp.array([0.0, 3.7, 3.7, 100.0]), jnp.array([1, 1, 0, 1])))(
        jax.random.split(key, 50)
    )
    gone = (out == 0).sum((2, 3, 4))
    assert gone[:, 0].max() == 0
    assert gone[:, 2].max() == 0
    assert gone[:, 1].max() == 9  # the floor of 3.7 squared, less at a border
    assert (gone[:, 3] == 1600).all()
    several = cutout(key, images, jnp.full(4, 3.0), 4)
    assert ((several == 0).sum((1, 2, 3)) > 9).all()


# ------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_named(made):
    hyper, weights = made
    with pytest.raises(ValueError, match="-1 hyperparameters"):
        stn(start, -1)
    with pytest.raises(PatternError):
        stn(start, 1, at="**/weights")
    with pytest.raises(TargetError, match="cannot respond"):
        stn(lambda k: {"kernel": jnp.zeros((2, 3), jnp.int32)}, 1, at="kernel")
    with pytest.raises(ValueError, match="a batch goes through vmap"):
        hyper.apply(weights, jnp.ones((5, 2)))
    with pytest.raises(ValueError, match="nothing to tune"):
        self_tuning(Net().apply, hyper, {}, train_loss=train_loss, valid_loss=valid_loss, optimisers=RULES)
    few = {"drop": SPECS["drop"]}
    with pytest.raises(ValueError, match="and 1 of them to tune"):
        self_tuning(Net().apply, hyper, few, train_loss=train_loss, valid_loss=valid_loss, optimisers=RULES)
