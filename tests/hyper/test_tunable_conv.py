"""Tunable convolutions: laws of their card, the port's numbers, per-example weights, costs."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from jaxpeft import PatternError
from jaxpeft.hyper import (
    TargetError,
    balanced,
    multi_loss,
    per_example,
    sample_omega,
    tunable_conv,
)

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "tunable-conv" / "golden.safetensors")


class Net(nn.Module):
    """Convolutions, one with groups, a norm, a free scale and a dense layer."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
        y = nn.LayerNorm(name="norm")(y)
        y = nn.Conv(4, (3, 3), feature_group_count=2, name="second")(y) * self.param("beta", nn.initializers.ones, (4,))
        return nn.Dense(2, name="out")(jnp.tanh(y).mean((1, 2)))


X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6, 6, 2)), jnp.float32)


def start(key):
    return Net().init(key, X[:1])


@pytest.fixture(scope="module", params=["mlp", "linear"])
def made(request, moved):
    hyper = tunable_conv(start, mode=request.param, parameters="**/beta")
    return hyper, moved(hyper.init(jax.random.key(0)))


# ------------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("mode", ["mlp", "linear"])
def test_at_the_start_a_vertex_is_the_model_as_initialised(mode, key):
    hyper = tunable_conv(start, mode=mode)
    weights = hyper.init(key)
    plain = start(jax.random.split(key, 2)[1])["params"]
    made = hyper.apply(weights, jnp.array([0.0, 1.0]))["params"]
    np.testing.assert_allclose(made["first"]["kernel"], plain["first"]["kernel"], atol=1e-6)
    np.testing.assert_allclose(made["out"]["bias"], plain["out"]["bias"], atol=1e-6)


@given(st.floats(-1, 2, width=32), st.floats(-1, 2, width=32))
def test_the_kernels_are_affine_in_omega(moved, a, b):
    hyper = tunable_conv(start)
    weights = moved(hyper.init(jax.random.key(0)))
    kernel = lambda *omega: hyper.apply(weights, jnp.array(omega))["params"]["first"]["kernel"]
    mixed = a * kernel(1.0, 0.0) + b * kernel(0.0, 1.0) + (1 - a - b) * kernel(0.0, 0.0)
    np.testing.assert_allclose(kernel(a, b), mixed, atol=1e-4)


def test_a_linear_mixture_of_kernels_is_the_mixture_of_their_outputs(key, moved):
    conv = nn.Conv(3, (3, 3))
    hyper = tunable_conv(lambda k: conv.init(k, X[:1]), objectives=3, mode="linear")
    weights, omega = moved(hyper.init(key)), jnp.array([0.2, 0.5, -0.4])
    each = [conv.apply(hyper.apply(weights, e), X) for e in jnp.eye(3)]
    np.testing.assert_allclose(
        conv.apply(hyper.apply(weights, omega), X), sum(o * y for o, y in zip(omega, each)), atol=1e-5
    )


def test_equal_kernels_and_weights_that_sum_to_one_do_not_depend_on_omega(key):
    hyper = tunable_conv(start, mode="linear")
    weights = hyper.init(key)
    weights["bank"] = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), weights["bank"])
    a, b = (Net().apply(hyper.apply(weights, jnp.array([w, 1 - w])), X) for w in (0.1, 0.8))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_one_objective_is_the_model_itself(key):
    hyper = tunable_conv(start, objectives=1)
    params = hyper.apply(hyper.init(key), jnp.ones(1))
    plain = start(jax.random.split(key, 1)[0])
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(plain)):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_gradient_of_a_kernel_is_its_share_of_the_plain_kernels(made):
    hyper, weights = made
    omega = jnp.array([0.3, 0.6])
    loss = lambda params: jnp.square(Net().apply(params, X)).sum()
    bank = jax.grad(lambda w: loss(hyper.apply(w, omega)))(weights)["bank"]["params/first/kernel"]
    plain = jax.grad(loss)(hyper.apply(weights, omega))["params"]["first"]["kernel"]
    mix = weights["mix"].get("params/first")
    alpha = omega if mix is None else mix["matrix"] @ omega + mix["bias"]
    np.testing.assert_allclose(bank, jnp.stack([a * plain for a in alpha]), atol=1e-4)

    def with_first(omega):
        own = hyper.apply(weights, omega)["params"]["first"]
        return {"params": {**hyper.apply(weights, jnp.array([0.3, 0.6]))["params"], "first": own}}

    own = jax.grad(lambda o: loss(with_first(o)))(omega)
    inner = [
        sum(
            jnp.vdot(
                weights["bank"][f"params/first/{k}"][j],
                jax.grad(loss)(hyper.apply(weights, omega))["params"]["first"][k],
            )
            for k in ("kernel", "bias")
        )
        for j in range(2)
    ]
    expected = jnp.array(inner) if mix is None else mix["matrix"].T @ jnp.array(inner)
    np.testing.assert_allclose(own, expected, rtol=2e-3, atol=1e-3)


def test_free_parameters_start_equal_and_the_rest_is_shared(key):
    hyper = tunable_conv(start, parameters="**/beta")
    weights = hyper.init(key)
    assert weights["bank"]["params/beta"].tolist() == [[1.0] * 4] * 2
    assert set(weights["shared"]) == {"params/norm/scale", "params/norm/bias"}
    assert (
        float(jnp.abs(weights["bank"]["params/first/kernel"][0] - weights["bank"]["params/first/kernel"][1]).max()) > 0
    )


def test_expanded_kernels_start_as_the_mean_of_each_objectives(key):
    hyper = tunable_conv(start, expand=3)
    weights = hyper.init(key)
    bank = weights["bank"]["params/first/kernel"]
    assert bank.shape[0] == 6
    made = hyper.apply(weights, jnp.array([0.0, 1.0]))["params"]["first"]["kernel"]
    np.testing.assert_allclose(made, bank[3:].mean(0), atol=1e-6)


def test_layers_of_a_scanned_model_have_an_alpha_each(key, moved):
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = lambda layer, carry, _: (jnp.tanh(layer(carry)), None)
            run = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return run(nn.Dense(4, name="layers"), x, None)[0]

    x = jax.random.normal(key, (5, 4))
    hyper = tunable_conv(lambda k: Scanned().init(k, x), stacked="**/layers/**")
    weights, omegas = moved(hyper.init(key)), sample_omega(key, 5, 2)
    assert weights["mix"]["params/layers"]["matrix"].shape == (3, 2, 2)
    alpha = weights["mix"]["params/layers"]["matrix"] @ omegas[0] + weights["mix"]["params/layers"]["bias"]
    made = hyper.apply(weights, omegas[0])["params"]["layers"]["kernel"]
    np.testing.assert_allclose(
        made, jnp.einsum("lk,kl...->l...", alpha, weights["bank"]["params/layers/kernel"]), atol=1e-5
    )
    whole = per_example(Scanned().apply, hyper)(weights, omegas, x)
    each = jnp.stack([Scanned().apply(hyper.apply(weights, o), x[i : i + 1])[0] for i, o in enumerate(omegas)])
    np.testing.assert_allclose(whole, each, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ per example


def test_a_batch_of_different_omegas_equals_one_model_each(made, key):
    hyper, weights = made
    omegas = sample_omega(key, 5, 2)
    whole = jax.jit(per_example(Net().apply, hyper))(weights, omegas, X)
    each = jnp.stack([Net().apply(hyper.apply(weights, o), X[i : i + 1])[0] for i, o in enumerate(omegas)])
    np.testing.assert_allclose(whole, each, atol=1e-5)


def test_it_runs_under_vmap_and_grad(made, key):
    hyper, weights = made
    omegas = sample_omega(key, 5, 2)
    run = per_example(Net().apply, hyper)
    loss = lambda w: jnp.square(run(w, omegas, X)).sum()
    grads = jax.grad(loss)(weights)
    dense = jax.vmap(lambda o, x, w: Net().apply(hyper.apply(w, o), x[None])[0], (0, 0, None))
    plain = jax.grad(lambda w: jnp.square(dense(omegas, X, w)).sum())(weights)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain)):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1, float(jnp.abs(b).max())))
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), weights)
    np.testing.assert_allclose(jax.vmap(loss)(two)[0], loss(weights), rtol=1e-4)


def test_a_mixed_batch_costs_the_kernels_times_a_plain_one_and_one_omega_no_more(key):
    conv = nn.Conv(16, (3, 3))
    x = jax.ShapeDtypeStruct((8, 16, 16, 16), jnp.float32)
    hyper = tunable_conv(lambda k: conv.init(k, jnp.zeros((1, 16, 16, 16))))
    weights, spec = jax.eval_shape(hyper.init, key), hyper.target
    flops = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
    plain = flops(conv.apply, spec, x)
    one = flops(lambda w, o, x: conv.apply(hyper.apply(w, o), x), weights, jax.ShapeDtypeStruct((2,), jnp.float32), x)
    mixed = flops(per_example(conv.apply, hyper), weights, jax.ShapeDtypeStruct((8, 2), jnp.float32), x)
    assert one < 1.02 * plain
    assert mixed < 2.1 * plain


def test_examples_and_their_omegas_are_sharded_together(made, mesh, key):
    hyper, weights = made
    x, omegas = jnp.concatenate([X, X[:3]]), sample_omega(key, 8, 2)
    run = jax.jit(per_example(Net().apply, hyper))
    rows = NamedSharding(mesh, PartitionSpec("d"))
    spread = run(weights, jax.device_put(omegas, rows), jax.device_put(x, rows))
    np.testing.assert_allclose(spread, run(weights, omegas, x), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- objectives


def test_omegas_lie_where_their_kind_says(key):
    simplex = sample_omega(key, 4000, 3)
    np.testing.assert_allclose(simplex.sum(-1), 1, atol=1e-5)
    assert float(simplex.min()) >= 0
    # Uniform on the simplex: ω_1 is Beta(1, 2).
    np.testing.assert_allclose(simplex.mean(0), 1 / 3, atol=0.02)
    np.testing.assert_allclose(simplex.var(0), 1 / 18, rtol=0.1)
    box = sample_omega(key, 4000, 3, "box")
    np.testing.assert_allclose(box.var(0), 1 / 12, rtol=0.1)
    assert set(map(tuple, sample_omega(key, 50, 2, "vertices").tolist())) == {(1.0, 0.0), (0.0, 1.0)}


def test_with_squared_errors_the_best_answer_is_the_mean_of_the_targets(key):
    f, a, b = jax.random.normal(key, (3, 6, 4))
    omega = sample_omega(key, 6, 2)
    to = lambda i: lambda f, *targets: jnp.square(f - targets[i]).sum(-1)
    loss = multi_loss([to(0), to(1)], [1.0, 1.0])
    best = omega[:, :1] * a + omega[:, 1:] * b
    slope = jax.grad(lambda f: loss(omega, f, a, b).sum())(best)
    np.testing.assert_allclose(slope, 0, atol=1e-5)
    far = loss(omega, f, a, b) - jnp.square(f - best).sum(-1)
    np.testing.assert_allclose(far, loss(omega, best, a, b), rtol=1e-4, atol=1e-4)


def test_balanced_objectives_have_equal_means(key):
    x = jax.random.normal(key, (9, 3))
    losses = [lambda x: jnp.square(x).sum(-1), lambda x: 40 * jnp.abs(x).sum(-1)]
    scales = balanced(losses, x)
    means = [float(s * one(x).mean()) for s, one in zip(scales, losses)]
    assert means[0] == pytest.approx(means[1], rel=1e-4)
    assert float(scales[0]) == pytest.approx(1.0)


# -------------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("case", ["conv.mlp", "conv.linear", "grouped.mlp", "grouped.linear", "wide.mlp"])
def test_a_convolution_equals_the_ports(case):
    g = {k.removeprefix(f"{case}."): x for k, x in GOLDEN.items() if k.startswith(f"{case}.")}
    conv = nn.Conv(6, (3, 3), padding=1, feature_group_count=2 if "grouped" in case else 1)
    x = jnp.asarray(GOLDEN["x"]).transpose(0, 2, 3, 1)
    hyper = tunable_conv(lambda k: conv.init(k, x), mode=case.split(".")[1], expand=2 if "wide" in case else 1)
    weights = {
        "bank": {"params/kernel": g["weight"][0].transpose(0, 3, 4, 2, 1), "params/bias": g["bias"][0]},
        "mix": {"params": {"matrix": g["mlp.weight"], "bias": g["mlp.bias"]}} if "mlp.weight" in g else {},
        "shared": {},
    }
    weights = jax.tree.map(jnp.asarray, weights)
    y = per_example(conv.apply, hyper)(weights, GOLDEN["omega"], x)
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2), g["y"], atol=2e-5)


@pytest.mark.parametrize("mode", ["mlp", "linear"])
def test_a_free_parameter_equals_the_ports(mode):
    g = {k.removeprefix(f"parameter.{mode}."): x for k, x in GOLDEN.items() if k.startswith(f"parameter.{mode}.")}
    hyper = tunable_conv(
        lambda k: {"x": {"kernel": jnp.ones((1, 1))}, "beta": jnp.ones((3, 1, 1))}, parameters="beta", mode=mode
    )
    weights = hyper.init(jax.random.key(0))
    weights["bank"]["beta"] = jnp.asarray(g["data"][0])
    if mode == "mlp":
        weights["mix"]["beta"] = {"matrix": jnp.asarray(g["mlp.weight"]), "bias": jnp.asarray(g["mlp.bias"])}
    made = jax.vmap(lambda o: hyper.apply(weights, o)["beta"])(jnp.asarray(GOLDEN["omega"]))
    np.testing.assert_allclose(made, g["y"], atol=1e-5)


# ------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_named(made):
    hyper, weights = made
    with pytest.raises(ValueError, match="at least one"):
        tunable_conv(start, objectives=0)
    with pytest.raises(ValueError, match="'mlp', or 'linear'"):
        tunable_conv(start, mode="linear", expand=2)
    with pytest.raises(PatternError):
        tunable_conv(start, at="**/weights")
    with pytest.raises(TargetError, match="cannot be mixed"):
        tunable_conv(lambda k: {"kernel": jnp.zeros(3, jnp.int32)}, at="kernel")
    with pytest.raises(ValueError, match="a batch of them goes through vmap"):
        hyper.apply(weights, jnp.ones((5, 2)))
    with pytest.raises(ValueError, match="'simplex', 'box' or 'vertices'"):
        sample_omega(jax.random.key(0), 2, 2, "ball")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected as many"):
        multi_loss([lambda x: x], [1.0, 2.0])
    with pytest.raises(ValueError, match="for 1 objectives"):
        multi_loss([lambda x: x], [1.0])(jnp.ones((3, 2)), jnp.ones(3))
