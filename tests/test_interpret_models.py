"""Models nobody wrote for the engine, and every transformation of JAX around it; nothing goes dense on the way.

Comparisons are in float32 with 1e-5: the adapted product sums in another order.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jaxpeft
from jaxpeft import trees

pytestmark = pytest.mark.usefixtures("quick")
LAYERS, WIDTH = 3, 8


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        q = nn.relu(nn.DenseGeneral((2, 4), name="q")(nn.LayerNorm()(x)))
        return x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="o")(q), None


class Tower(nn.Module):
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        if self.scan:
            rules = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            x, _ = nn.scan(block, **rules)(name="layers")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = block(name=f"layers_{i}")(x, None)
        return nn.Dense(3, name="head")(x)


@jax.custom_vjp
def squash(x):
    return jnp.tanh(x)


squash.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))


def by_hand(params, ids, flag):
    """Einsum, a tied embedding, a branch and an activation with a gradient of its own."""
    x = params["embed"][ids]
    x = squash(jnp.einsum("btd,dhe->bthe", x, params["in"]))
    x = lax.cond(flag, lambda x: jnp.einsum("bthe,hed->btd", x, params["out"]), lambda x: x.reshape(*ids.shape, -1), x)
    return jnp.einsum("btd,vd->btv", x, params["embed"])


def hand_params(key):
    shapes = {"embed": (11, WIDTH), "in": (WIDTH, 2, 4), "out": (2, 4, WIDTH)}
    return {n: jax.random.normal(jax.random.fold_in(key, i), s) / 2 for i, (n, s) in enumerate(shapes.items())}


def moved(delta, key, by=0.3):
    """A delta away from its start."""
    leaves, structure = jax.tree.flatten(delta)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([x + by * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)])


def lora(model, params, key, *inputs, at, rank=2):
    adapted = jaxpeft.adapt(model, jaxpeft.lora(rank, at=at), on_dense="refuse")
    return adapted, moved(jax.jit(adapted.init)(key, params, *inputs), key)


def check(adapted, model, params, delta, *inputs, close):
    """Value and gradient of the adapted model against the merged one."""

    @jax.jit
    def both(delta):
        lazy = jax.value_and_grad(lambda d: jnp.sum(jnp.sin(adapted.apply(params, d, *inputs))))(delta)
        dense = jax.value_and_grad(lambda d: jnp.sum(jnp.sin(model(adapted.merge(params, d), *inputs))))(delta)
        return lazy, dense

    close(*both(delta))


@pytest.fixture
def tower(key):
    model, x = Tower(), jax.random.normal(key, (2, 4, WIDTH))
    params = jax.jit(model.init)(key, x)
    return (model.apply, params, x, *lora(model.apply, params, key, x, at="**/{q,o}/kernel"))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_linen_scan_over_remat(scan, remat, key, close):
    model, x = Tower(scan, remat), jax.random.normal(key, (2, 4, WIDTH))
    params = jax.jit(model.init)(key, x)
    adapted, delta = lora(model.apply, params, key, x, at=["**/{q,o}/kernel", "**/head/kernel"])
    where = "params/layers/q/kernel" if scan else "params/layers_1/q/kernel"
    stack = (LAYERS,) if scan else ()
    assert delta[where]["a"].shape == (*stack, WIDTH, 2)
    assert delta[where]["b"].shape == (*stack, 2, 2, 4)
    check(adapted, model.apply, params, delta, x, close=close)


@pytest.mark.parametrize("flag", [True, False])
def test_einsum_branch_tied_embedding_and_custom_gradient(flag, key, close):
    params, ids = hand_params(key), jnp.array([[1, 4, 10], [0, 4, 4]])
    adapted, delta = lora(by_hand, params, key, ids, jnp.asarray(flag), at="**")
    check(adapted, by_hand, params, delta, ids, jnp.asarray(flag), close=close)


def test_shard_map_inside_the_model(mesh, key, close):
    spec = PartitionSpec("d")
    inner = jax.shard_map(lambda x: x - lax.pmean(x, "d"), mesh=mesh, in_specs=spec, out_specs=spec)
    model = lambda params, x: inner(jnp.tanh(x @ params["a"])) @ params["b"]
    params = {"a": jax.random.normal(key, (4, 6)), "b": jax.random.normal(key, (6, 3))}
    x = jax.random.normal(key, (8, 4))
    adapted, delta = lora(model, params, key, x, at="**")
    check(adapted, model, params, delta, x, close=close)


def test_nnx_through_split_and_merge(key, close):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.b(nnx.relu(self.a(x)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    model = lambda state, x: nnx.merge(graph, state)(x)
    x = jax.random.normal(key, (2, 4))
    adapted, delta = lora(model, state, key, x, at="**/kernel")
    assert sorted(delta) == ["a/kernel", "b/kernel"]
    check(adapted, model, state, delta, x, close=close)


def test_a_convolutional_linen_model(key, close):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(6, (3, 3), name="first")(x))
            x = nn.Conv(6, (3, 3), strides=2, feature_group_count=2, name="grouped")(x)
            return nn.Dense(2, name="head")(nn.ConvTranspose(4, (2, 2), name="up")(x).mean((1, 2)))

    model, x = Net(), jax.random.normal(key, (2, 6, 6, 4))
    params = jax.jit(model.init)(key, x)
    adapted, delta = lora(model.apply, params, key, x, at="**/kernel")
    assert delta["params/first/kernel"]["a"].shape == (3, 3, 4, 2)
    check(adapted, model.apply, params, delta, x, close=close)


# ------------------------------------------------------------------------------------------------------ transformations


def test_forward_mode_and_hessian(tower, close):
    model, params, x, adapted, delta = tower
    only = lambda d: {**delta, "params/layers_0/q/kernel": d}
    part = delta["params/layers_0/q/kernel"]
    lazy = lambda d: jnp.sum(jnp.sin(adapted.apply(params, only(d), x)))
    dense = lambda d: jnp.sum(jnp.sin(model(adapted.merge(params, only(d)), x)))
    tangent = jax.tree.map(jnp.ones_like, part)
    close(*jax.jit(lambda d: tuple(jax.jvp(f, (d,), (tangent,)) for f in (lazy, dense)))(part))
    along = lambda f: lambda s: f(jax.tree.map(lambda p: p + s.sum() * p + s[0] * s[1], part))
    close(*jax.jit(lambda s: tuple(jax.hessian(along(f))(s) for f in (lazy, dense)))(jnp.ones(2) * 0.1), atol=1e-4)


def test_a_stack_of_deltas_is_vmapped_with_the_base_held_once(tower, key, close):
    _, params, x, adapted, delta = tower
    stacked = trees.stack([moved(delta, k) for k in jax.random.split(key, 3)])
    many = jax.vmap(adapted.apply, (None, 0, None))
    got = jax.jit(many)(params, stacked, x)
    one = jax.jit(adapted.apply)
    close(got, jnp.stack([one(params, d, x) for d in trees.unstack(stacked)]))
    text = str(jax.make_jaxpr(many)(params, stacked, x))
    assert f"f32[3,{WIDTH},{WIDTH}]" not in text
    assert f"f32[3,{WIDTH},2,4]" not in text, "no kernel is copied for every member"


def test_pmap_over_deltas(tower, key, close):
    _, params, x, adapted, delta = tower
    stacked = trees.stack([moved(delta, k) for k in jax.random.split(key, 8)])
    got = jax.pmap(adapted.apply, in_axes=(None, 0, None))(params, stacked, x)
    close(got, jax.jit(jax.vmap(adapted.apply, (None, 0, None)))(params, stacked, x))


@pytest.mark.parametrize("axis", [0, -1])
def test_a_sharded_base_stays_sharded_and_answers_the_same(axis, mesh, key, close):
    model = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
    params = {"a": jax.random.normal(key, (16, 24)), "b": jax.random.normal(key, (24, 8))}
    x = jax.random.normal(key, (4, 16))
    adapted, delta = lora(model, params, key, x, at="**")
    want = jax.jit(adapted.apply)(params, delta, x)
    spec = PartitionSpec("d", None) if axis == 0 else PartitionSpec(None, "d")
    sharded = jax.device_put(params, NamedSharding(mesh, spec))
    step = jax.jit(jax.value_and_grad(lambda d, p: jnp.sum(jnp.sin(adapted.apply(p, d, x)))))
    close(jax.jit(adapted.apply)(sharded, delta, x), want)
    close(step(delta, sharded), step(delta, params))
    assert sharded["a"].sharding.spec == spec


def test_the_second_call_compiles_nothing(tower, key, counted):
    _, params, x, adapted, delta = tower
    once = counted(adapted.apply)
    apply = jax.jit(once)
    apply(params, delta, x)
    apply(jax.tree.map(lambda p: 2 * p, params), moved(delta, key), x + 1)
    assert len(once.traces) == 1


def test_a_scale_is_swept_without_recompiling(key, close):
    model, x = lambda p, x: x @ p["w"], jax.random.normal(key, (2, 6))
    params = {"w": jax.random.normal(key, (6, 4))}
    delta = moved(jaxpeft.adapt(model, jaxpeft.lora(2, at="w")).init(key, params, x), key)

    def run(alpha):
        return jaxpeft.adapt(model, jaxpeft.lora(2, alpha, at="w"), on_dense="refuse").apply(params, delta, x)

    got = jax.jit(jax.vmap(run))(jnp.array([0.0, 2.0, 4.0]))
    update = got[1] - got[0]
    close(got[0], x @ params["w"])
    close(got[2] - got[0], 2 * update)


def test_mixed_precision_keeps_the_base_dtype(key):
    model = lambda p, x: x @ p["w"]
    params = {"w": jax.random.normal(key, (6, 4), jnp.bfloat16)}
    x = jax.random.normal(key, (2, 6), jnp.bfloat16)
    adapted, delta = lora(model, params, key, x, at="w")
    assert delta["w"]["a"].dtype == jnp.float32, "what is learned is kept wide"
    y = adapted.apply(params, delta, x)
    assert y.dtype == jnp.bfloat16
    merged = adapted.merge(params, delta)
    assert merged["w"].dtype == jnp.bfloat16
    # Three significant digits of bfloat16, a few sums deep.
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(x @ merged["w"], np.float32), atol=0.1)


def test_leaked_tracers_are_none(key):
    model, x = Tower(), jnp.ones((1, 2, WIDTH))
    params = jax.eval_shape(model.init, key, x)
    with jax.checking_leaks():
        adapted = jaxpeft.adapt(model.apply, jaxpeft.lora(2, at="**/q/kernel"), on_dense="refuse")
        delta = jax.eval_shape(adapted.init, key, params, x)
        jax.eval_shape(jax.grad(lambda d, p: adapted.apply(p, d, x).sum()), delta, params)
