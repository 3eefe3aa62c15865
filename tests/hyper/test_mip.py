"""MIP: laws of its card, the reference's numbers, targets of every kind."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from jaxpeft import trees
from jaxpeft.hyper import TargetError, mip, mip_encode

pytestmark = pytest.mark.usefixtures("quick")
SPEC = {
    "kernel": jax.ShapeDtypeStruct((6, 4), jnp.float32),
    "bias": jax.ShapeDtypeStruct((4,), jnp.float32),
    "scale": jax.ShapeDtypeStruct((4,), jnp.float32),
}
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "mip" / "golden.safetensors")
units = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=5)


# --------------------------------------------------------------------------------------------------------------- encoding


@given(units)
def test_the_encoding_has_the_same_norm_for_every_input(gamma):
    e = mip_encode(jnp.array(gamma, jnp.float32))
    assert e.shape == (2 * len(gamma),)
    np.testing.assert_allclose(jnp.square(e).sum(), len(gamma), rtol=1e-5)


def test_the_encoding_at_its_ends_and_its_middle():
    root = 0.5**0.5
    for gamma, expected in ((0.0, [1, 0]), (1.0, [0, 1]), (0.5, [root, root])):
        np.testing.assert_allclose(mip_encode(jnp.array([gamma])), expected, atol=1e-6)
    assert mip_encode(jnp.array([0.2, 0.7]), "complement").tolist() == pytest.approx([0.2, 0.7, 0.8, 0.3])
    # All cosines before all sines.
    np.testing.assert_allclose(mip_encode(jnp.array([0.0, 1.0])), [1, 0, 0, 1], atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------- laws


@given(units, st.sampled_from([0.1, 2.0, 10.0]))
def test_without_both_changes_the_network_is_homogeneous(gamma, c):
    hyper = mip(SPEC, inputs=len(gamma), encoding="none", residual=False, hidden=(5, 7))
    weights, gamma = hyper.init(jax.random.key(0)), jnp.array(gamma)
    once, scaled = hyper.apply(weights, gamma), hyper.apply(weights, c * gamma)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(scaled)):
        np.testing.assert_allclose(c * a, b, rtol=1e-4, atol=1e-5)


def test_different_inputs_give_different_weights(key):
    hyper = mip(SPEC, inputs=1)
    weights = hyper.init(key)
    a, b = (hyper.apply(weights, jnp.array([g])) for g in (0.2, 0.3))
    assert all(float(jnp.abs(x - y).max()) > 1e-4 for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_with_heads_at_zero_it_is_an_ordinary_network(key):
    hyper = mip(SPEC, inputs=2)
    weights = hyper.init(key)
    weights["heads"] = jax.tree.map(jnp.zeros_like, weights["heads"])
    x, gammas = jax.random.normal(key, (3, 6)), jax.random.uniform(key, (5, 2))
    loss = lambda p: jnp.square(jnp.tanh(x @ p["kernel"]) * p["scale"] + p["bias"]).sum()
    for p in (hyper.apply(weights, g) for g in gammas):
        for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(weights["base"])):
            np.testing.assert_array_equal(a, b)
    through = jax.grad(lambda w: loss(hyper.apply(w, gammas[0])))(weights)["base"]
    for a, b in zip(jax.tree.leaves(through), jax.tree.leaves(jax.grad(loss)(weights["base"]))):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_the_base_gets_the_sum_of_the_gradients_of_all_conditions(key):
    hyper = mip(SPEC, inputs=2)
    weights, gammas = hyper.init(key), jax.random.uniform(key, (5, 2))
    loss = lambda p: sum(jnp.square(x).sum() for x in jax.tree.leaves(p))
    own = jax.grad(lambda w: loss(hyper.apply(w, gammas)))(weights)["base"]
    each = jax.grad(loss)(hyper.apply(weights, gammas))
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(each)):
        np.testing.assert_allclose(a, b.sum(0), rtol=1e-5, atol=1e-6)


def test_the_spread_of_the_change_does_not_depend_on_the_input(key):
    def spread(encoding, gamma):
        hyper = mip(SPEC, inputs=1, encoding=encoding, residual=False, hidden=(16, 16))
        draws = jax.vmap(lambda k: hyper.apply(hyper.init(k), jnp.array([gamma]))["kernel"])(
            jax.random.split(key, 2000)
        )
        return float(jnp.square(draws).mean())

    same = [spread("cos_sin", g) for g in (0.0, 0.3, 1.0)]
    np.testing.assert_allclose(same, same[0], rtol=0.15)
    np.testing.assert_allclose(spread("none", 0.5) / spread("none", 1.0), 0.25, rtol=1e-3)


def test_starts_are_by_the_numbers_that_each_tensor_has(key):
    spec = {
        "stack": jax.ShapeDtypeStruct((3, 40, 50), jnp.float32),
        "kernel": jax.ShapeDtypeStruct((40, 50), jnp.float32),
    }
    weights = mip(spec, inputs=3, hidden=(400,), stacked="stack").init(key)
    np.testing.assert_allclose(weights["trunk"]["0"]["kernel"].std(), (2 / 400) ** 0.5, rtol=0.1)
    for name in spec:
        np.testing.assert_allclose(weights["heads"][name].std(), (2 / 2000) ** 0.5, rtol=0.02)
        np.testing.assert_allclose(weights["base"][name].std(), (2 / 40) ** 0.5, rtol=0.1)
    fan_in = mip(spec, inputs=3, hidden=(400,), start="fan_in").init(key)
    np.testing.assert_allclose(fan_in["heads"]["kernel"].std(), (2 / 400) ** 0.5, rtol=0.02)


def test_the_first_layers_spread_is_that_of_the_norm(key):
    weights = jax.vmap(mip(SPEC, inputs=3, hidden=(8, 4)).init)(jax.random.split(key, 3000))
    first = jnp.einsum("i,kij->kj", mip_encode(jnp.array([0.1, 0.5, 0.9])), weights["trunk"]["0"]["kernel"])
    np.testing.assert_allclose(jnp.square(first).mean(), 2 * 3 / 8, rtol=0.1)


def test_without_hidden_layers_weights_are_affine_in_the_encoding(key):
    hyper = mip(SPEC, inputs=2, hidden=())
    weights, gamma = hyper.init(key), jnp.array([0.3, 0.6])
    expected = weights["base"]["kernel"] + jnp.tensordot(mip_encode(gamma), weights["heads"]["kernel"], 1)
    np.testing.assert_allclose(hyper.apply(weights, gamma)["kernel"], expected, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("encoding", ["cos_sin", "none", "complement"])
def test_outputs_equal_those_of_hyperlight(encoding):
    g = {k.removeprefix(f"{encoding}."): x for k, x in GOLDEN.items() if k.startswith(f"{encoding}.")}
    spec = {k.removeprefix("out."): jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in g.items() if "out." in k}
    order = {"a.weight": (3, 4), "a.bias": (3,), "b.scale": (5,)}
    hyper = mip(spec, inputs={"rate": 2, "angle": 1}, hidden=(6, 7), encoding=encoding)
    trunk = {
        str(i): {"kernel": g[f"backbone.block{i}_lin.weight"].T, "bias": g[f"backbone.block{i}_lin.bias"]}
        for i in (0, 1)
    }
    cuts = np.cumsum([np.prod(s) for s in order.values()])[:-1]
    rows = dict(zip(order, np.split(g["backbone.output.weight"], cuts)))
    biases = dict(zip(order, np.split(g["backbone.output.bias"], cuts)))
    heads = {k: rows[k].T.reshape(7, *s) for k, s in order.items()}
    base = {k: biases[k].reshape(s) for k, s in order.items()}
    made = hyper.apply({"trunk": trunk, "heads": heads, "base": base}, {"rate": g["rate"], "angle": g["angle"]})
    for name in order:
        np.testing.assert_allclose(made[name], g[f"out.{name}"], atol=2e-6)


# ---------------------------------------------------------------------------------------------------------------- targets


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.LayerNorm()(nn.gelu(nn.Dense(5)(x))))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def linen():
    x = jnp.ones((4, 3))
    return jax.eval_shape(Linen().init, jax.random.key(0), x), Linen().apply, None


def nnx_model():
    graph, state = nnx.split(Nnx(nnx.Rngs(0)))
    return state, lambda params, x: nnx.merge(graph, params)(x), state


def by_hand():
    apply = lambda p, x: jnp.tanh(x @ p[0]) @ p[1]["out"] + p[1]["bias"]
    make = lambda key: (jax.random.normal(key, (3, 5)), {"out": jax.random.normal(key, (5, 2)), "bias": jnp.zeros(2)})
    return jax.eval_shape(make, jax.random.key(0)), apply, None


@pytest.mark.parametrize("target", [linen, nnx_model, by_hand])
def test_it_emits_the_weights_of_any_model_under_jit_vmap_and_grad(target, key):
    spec, apply, base = target()
    hyper = mip(spec, inputs=2, base=base)
    weights = jax.jit(hyper.init)(key)
    x, gammas = jax.random.normal(key, (4, 3)), jax.random.uniform(key, (6, 2))
    run = jax.jit(lambda w, g: apply(hyper.apply(w, g), x))
    one = run(weights, gammas[0])
    many = jax.vmap(run, (None, 0))(weights, gammas)
    np.testing.assert_allclose(many[0], one, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(apply, (0, None))(hyper.apply(weights, gammas), x), many, atol=1e-5)
    grads = jax.grad(lambda w: jnp.square(run(w, gammas[1])).sum())(weights)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    assert float(jnp.abs(jax.tree.leaves(grads["heads"])[0]).max()) > 0
    made = hyper.apply(weights, gammas[0])
    assert jax.tree.structure(made) == jax.tree.structure(spec)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(lambda a: (a.shape, a.dtype), spec)


def test_a_scanned_model_of_three_times_the_depth_has_as_many_equations(key):
    class Scanned(nn.Module):
        layers: int

        @nn.compact
        def __call__(self, x):
            body = lambda layer, carry, _: (jnp.tanh(layer(carry)), None)
            run = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
            return run(nn.Dense(4, name="layers"), x, None)[0]

    def equations(layers):
        spec = jax.eval_shape(Scanned(layers).init, key, jnp.ones((2, 4)))
        hyper = mip(spec, inputs=1, stacked="**/layers/**")
        shapes = jax.eval_shape(hyper.init, key)
        run = lambda w, g, x: Scanned(layers).apply(hyper.apply(w, g), x)
        return len(jax.make_jaxpr(run)(shapes, jnp.ones(1), jnp.ones((2, 4))).jaxpr.eqns)

    assert equations(2) == equations(6)


def test_a_trained_base_is_what_comes_out_of_heads_at_zero(key):
    x = jnp.ones((4, 3))
    params = Linen().init(key, x)
    hyper = mip(params, inputs=1, base=params)
    weights = hyper.init(key)
    for a, b in zip(jax.tree.leaves(weights["base"]), jax.tree.leaves(params)):
        np.testing.assert_array_equal(a, b)


def test_weights_are_sharded_as_the_target_is(mesh, key):
    spec = {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32)}
    hyper = mip(spec, inputs=1)
    weights = hyper.init(key)
    expected = hyper.apply(weights, jnp.array([0.4]))["kernel"]
    rows = NamedSharding(mesh, PartitionSpec("d"))
    heads = NamedSharding(mesh, PartitionSpec(None, "d"))
    weights["base"]["kernel"] = jax.device_put(weights["base"]["kernel"], rows)
    weights["heads"]["kernel"] = jax.device_put(weights["heads"]["kernel"], heads)
    made = jax.jit(hyper.apply)(weights, jnp.array([0.4]))["kernel"]
    np.testing.assert_allclose(made, expected, atol=1e-6)
    assert made.sharding.is_equivalent_to(rows, 2)


def test_low_precision_targets_are_rounded_once(key):
    spec = {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)}
    hyper = mip(spec, inputs=1)
    weights = hyper.init(key)
    wide = mip({"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}, inputs=1)
    made = hyper.apply(weights, jnp.array([0.4]))["kernel"]
    np.testing.assert_array_equal(made, wide.apply(weights, jnp.array([0.4]))["kernel"].astype(jnp.bfloat16))


# ------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_named():
    with pytest.raises(TargetError, match="empty specification"):
        mip({}, inputs=1)
    with pytest.raises(TargetError, match="no leaf of the specification is floating"):
        mip({"n": jax.ShapeDtypeStruct((), jnp.int32)}, inputs=1)
    with pytest.raises(TargetError, match=r"'n' is int32.*give a base"):
        mip({"n": jax.ShapeDtypeStruct((), jnp.int32), **SPEC}, inputs=1)
    with pytest.raises(TargetError, match="differ in names or shapes"):
        mip(SPEC, inputs=1, base={"kernel": jnp.ones((6, 4))})
    with pytest.raises(trees.PatternError):
        mip(SPEC, inputs=1, stacked="layers/**")
    with pytest.raises(ValueError, match="at least 1"):
        mip(SPEC, inputs=0)
    with pytest.raises(ValueError, match="'cos_sin', 'complement' or 'none'"):
        mip(SPEC, inputs=1, encoding="sin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'fan_out' or 'fan_in'"):
        mip(SPEC, inputs=1, start="fan")  # type: ignore[arg-type]
    hyper = mip(SPEC, inputs={"a": 1, "b": 2})
    weights = hyper.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"\['a'\], expected \['a', 'b'\]"):
        hyper.apply(weights, {"a": jnp.ones(1)})
    with pytest.raises(ValueError, match="should have 2"):
        hyper.apply(weights, {"a": jnp.ones(1), "b": jnp.ones(3)})
