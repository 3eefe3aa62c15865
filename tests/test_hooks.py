"""Hooks: where they stand, what they ask for, and the same delta in Linen and NNX, unrolled and scanned."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpeft import Fixed, Hook, MergeError, PatternError, adapt, chain, from_nnx, lora, on_hooks
from jaxpeft.hooks import Slot, discover
from jaxpeft.method import Call

pytestmark = pytest.mark.usefixtures("quick")
LAYERS, WIDTH = 3, 4


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.Dense(WIDTH, name="inner")(x)), None


class Net(nn.Module):
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        if self.scan:
            rules = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            return nn.scan(block, **rules)(name="layers")(x, None)[0]
        for i in range(LAYERS):
            x, _ = block(name=f"layers_{i}")(x, None)
        return x


def normal(key, shape, dtype):
    return jax.random.normal(key, shape, dtype)


def bottleneck(site, call, x):
    down, up = site.param("down", (WIDTH, 2), normal), site.param("up", (2, WIDTH), normal)
    return call(x) + site.dropout(jnp.tanh(x @ down), 0.5) @ up


INNER = Hook("**/inner", bottleneck)


def by_hand(params, delta, x):
    """The hooked `Net` from its formula; a tree of unrolled layers."""
    for i in range(LAYERS):
        p, d = params["params"][f"layers_{i}"]["inner"], delta[f"params/layers_{i}/inner"]
        x = x + jax.nn.relu(x @ p["kernel"] + p["bias"] + jnp.tanh(x @ d["down"]) @ d["up"])
    return x


@pytest.fixture
def x(key):
    return jax.random.normal(key, (2, 3, WIDTH))


@pytest.mark.parametrize("remat", [False, True])
def test_a_hooked_linen_model_is_its_formula_unrolled_and_scanned(remat, key, x, close):
    model = Net(remat=remat)
    params = jax.jit(model.init)(key, x)
    adapted = adapt(model.apply, on_hooks("h", [INNER], {}))
    delta = jax.jit(adapted.init)(key, params, x)
    assert sorted(delta) == [f"params/layers_{i}/inner" for i in range(LAYERS)]
    assert jax.tree.map(jnp.shape, delta["params/layers_0/inner"]) == {"down": (WIDTH, 2), "up": (2, WIDTH)}
    want = by_hand(params, delta, x)
    close(jax.jit(adapted.apply)(params, delta, x), want)

    scanned = Net(scan=True, remat=remat)
    layers = [params["params"][f"layers_{i}"] for i in range(LAYERS)]
    stacked = {"params": {"layers": jax.tree.map(lambda *a: jnp.stack(a), *layers)}}
    adapted = adapt(scanned.apply, on_hooks("h", [INNER], {}))
    shapes = jax.eval_shape(adapted.init, key, stacked, x)
    assert jax.tree.map(jnp.shape, shapes) == {
        "params/layers/inner": {"down": (LAYERS, WIDTH, 2), "up": (LAYERS, 2, WIDTH)}
    }
    parts = [delta[f"params/layers_{i}/inner"] for i in range(LAYERS)]
    together = {"params/layers/inner": jax.tree.map(lambda *a: jnp.stack(a), *parts)}
    close(jax.jit(adapted.apply)(stacked, together, x), want)
    one, other = (jax.jit(adapted.apply)(stacked, together, x, dropout_key=k) for k in jax.random.split(key))
    assert not np.allclose(one, other)


def test_the_model_and_its_parameters_are_not_changed(key, x, close):
    model = Net()
    params = model.init(key, x)
    before = jax.tree.map(jnp.array, params)
    adapted = adapt(model.apply, on_hooks("h", [INNER], {}))
    delta = adapted.init(key, params, x)
    plain = model.apply(params, x)
    adapted.apply(params, delta, x)
    close(model.apply(params, x), plain)
    close(params, before)
    with pytest.raises(MergeError, match="h has no merge"):
        adapted.merge(params, delta)


def test_layers_of_a_scan_start_apart_and_a_site_starts_the_same_whatever_else_is_hooked(key, x):
    model = Net(scan=True)
    params = model.init(key, x)
    down = adapt(model.apply, on_hooks("h", [INNER], {})).init(key, params, x)["params/layers/inner"]["down"]
    assert not np.allclose(down[0], down[1])
    more = on_hooks("h", [Hook("layers", lambda site, call, *a: call(*a)), INNER], {})
    again = adapt(model.apply, more).init(key, params, x)["params/layers/inner"]["down"]
    np.testing.assert_array_equal(down, again)


def test_a_model_deep_inside_a_function_is_found_by_its_parameters(key, x, close):
    model = Net()
    params = {"one": model.init(key, x), "two": model.init(jax.random.fold_in(key, 1), x)}
    apply_fn = lambda p, x: model.apply({"params": p["two"]["params"]}, model.apply(p["one"], x))
    delta = adapt(apply_fn, on_hooks("h", [INNER], {})).init(key, params, x)
    assert sorted(delta)[0] == "one/params/layers_0/inner"
    assert sorted(delta)[-1] == f"two/params/layers_{LAYERS - 1}/inner"
    half = by_hand(params["one"], {k[4:]: v for k, v in delta.items() if k.startswith("one")}, x)
    want = by_hand(params["two"], {k[4:]: v for k, v in delta.items() if k.startswith("two")}, half)
    close(adapt(apply_fn, on_hooks("h", [INNER], {})).apply(params, delta, x), want)


def test_hooks_stand_on_what_a_method_on_weights_below_made(key, x, close):
    model = Net()
    params = jax.jit(model.init)(key, x)
    method = chain(lora(2, at="**/inner/kernel"), on_hooks("h", [INNER], {}))
    adapted = adapt(model.apply, method, on_dense="refuse")
    delta = jax.tree.map(lambda a: a + 0.1, jax.jit(adapted.init)(key, params, x))
    merged = adapt(model.apply, method).method  # the chain as a whole has no merge, its first part has
    assert merged.merge is None
    dense = adapt(model.apply, lora(2, at="**/inner/kernel")).merge(params, delta["lora"])
    close(jax.jit(adapted.apply)(params, delta, x), by_hand(dense, delta["h"], x))


def test_a_call_made_twice_sees_the_module_itself_the_second_time(key, x, close):
    model = Net()
    params = model.init(key, x)
    twice = Hook("layers_1/inner", lambda site, call, x: call(x) + call(2 * x))
    got = adapt(model.apply, on_hooks("h", [twice], {})).apply(params, {}, x)
    for i in range(LAYERS):
        p = params["params"][f"layers_{i}"]["inner"]
        f = lambda x, p=p: x @ p["kernel"] + p["bias"]
        x = x + jax.nn.relu(f(x) + f(2 * x) if i == 1 else f(x))
    close(got, x)


def test_later_hooks_stand_outside_earlier_ones_and_share_a_stash(key, x, close):
    model = Net()
    params = model.init(key, x)
    seen = []

    def first(site, call, x):
        site.stash[site.path] = x
        return call(x) + 1

    def second(site, call, *args):
        seen.append((site.path, site.parent, sorted(site.stash)))
        return call(*args)

    hooks = [Hook("**/inner", first), Hook("**/inner", lambda site, call, x: 10 * call(x)), Hook("layers_2", second)]
    got = adapt(model.apply, on_hooks("h", hooks, {})).apply(params, {}, x)
    for i in range(LAYERS):
        p = params["params"][f"layers_{i}"]["inner"]
        x = x + jax.nn.relu(10 * (x @ p["kernel"] + p["bias"] + 1))
    close(got, x)
    assert seen == [("layers_2", "", ["layers_0/inner", "layers_1/inner"])]


def test_a_hook_that_meets_no_module_is_refused_with_near_misses(key, x):
    model = Net()
    params = model.init(key, x)
    with pytest.raises(PatternError, match=r"'\*\*/iner' matches no module; near misses: 'layers_./inner'"):
        adapt(model.apply, on_hooks("h", [Hook("**/iner", bottleneck)], {})).init(key, params, x)
    with pytest.raises(PatternError, match="calls no modules"):
        adapt(lambda p, x: x, on_hooks("h", [INNER], {})).init(key, params, x)


def test_disagreeing_shapes_foreign_deltas_and_taken_names_are_refused(key, x):
    model = Net()
    params = model.init(key, x)
    other = Hook("**/inner", lambda site, call, x: call(x) * site.param("down", (3,), normal).sum())
    with pytest.raises(ValueError, match=r"two hooks ask for 'down'.*shapes \(3,\)"):
        adapt(model.apply, on_hooks("h", [INNER, other], {})).init(key, params, x)
    with pytest.raises(KeyError, match=r"no 'down' at 'layers_0/inner'"):
        adapt(model.apply, on_hooks("h", [INNER], {})).apply(params, {}, x)
    method = on_hooks("h", [INNER], {})
    adapted = adapt(model.apply, chain(method, method))
    with pytest.raises(ValueError, match=r"'h\.(down|up)' is taken"):
        adapted.apply(
            params, jax.tree.map(lambda s: jnp.zeros(s.shape), jax.eval_shape(adapted.init, key, params, x)), x
        )


def test_a_method_may_fill_its_slots_itself_and_generate_them(key, x, close):
    model = Net(scan=True)
    params = jax.jit(model.init)(key, x)
    hook = Hook("**/inner", lambda site, call, x: call(x) + site.param("shift", (WIDTH,), None))
    slots = discover([hook], Call(model.apply, params, (x,)))
    assert slots == {"params/layers/inner": {"shift": Slot((WIDTH,), (LAYERS,), jnp.float32, None)}}
    with pytest.raises(ValueError, match="without an initialiser"):
        slots["params/layers/inner"]["shift"].start(key)
    emit = lambda delta, slots: {p: {"shift": jnp.outer(delta["u"], delta["v"])} for p in slots}
    init = lambda key, slots, call: {"u": jnp.arange(1.0, 4.0), "v": jnp.ones(WIDTH), "fixed": Fixed(jnp.ones(2))}
    adapted = adapt(model.apply, on_hooks("h", [hook], {}, init=init, emit=emit))
    delta = adapted.init(key, params, x)
    got = jax.jit(adapted.apply)(params, delta, x)
    for i in range(LAYERS):
        p = jax.tree.map(lambda a, i=i: a[i], params["params"]["layers"]["inner"])
        x = x + jax.nn.relu(x @ p["kernel"] + p["bias"] + i + 1)
    close(got, x)


# ------------------------------------------------------------------------------------------------------------------ NNX


class Two(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))


class One(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.inner(x))


class Scanned(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.vmap(One, in_axes=(0,))(rngs.fork(split=LAYERS))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return layer(x)

        return run(self.layers, x)


def test_nnx_modules_are_hooked_on_copies(key, x, close):
    model = Two(nnx.Rngs(0))
    apply_fn, state = from_nnx(model)
    adapted = adapt(apply_fn, chain(on_hooks("h", [Hook("{a,b}", bottleneck)], {}), lora(2, at="**/kernel")))
    delta = jax.tree.map(lambda a: a + 0.1, adapted.init(key, state, x))
    assert sorted(delta["h"]) == ["a", "b"]
    got = jax.jit(adapted.apply)(state, delta, x)

    def layer(module, name, x):
        d, low = delta["h"][name], delta["lora"][f"{name}/kernel"]
        w = module.kernel[...] + 2 * low["a"] @ low["b"]
        return x @ w + module.bias[...] + jnp.tanh(x @ d["down"]) @ d["up"]

    close(got, layer(model.b, "b", jax.nn.relu(layer(model.a, "a", x))))
    assert type(model.a) is nnx.Linear
    close(apply_fn(state, x), model(x))
    grads = jax.jit(jax.grad(lambda d: adapted.apply(state, d, x, dropout_key=key).sum()))(delta)
    assert all(float(jnp.abs(g).sum()) > 0 for g in jax.tree.leaves(grads))


def test_nnx_layers_under_scan_get_their_slices(key, x, close):
    apply_fn, state = from_nnx(Scanned(nnx.Rngs(0)))
    method = chain(on_hooks("h", [Hook("layers/inner", bottleneck)], {}), lora(2, at="**/kernel"))
    adapted = adapt(apply_fn, method, on_dense="refuse")
    delta = jax.tree.map(lambda a: a + 0.1, jax.jit(adapted.init)(key, state, x))
    assert delta["h"]["layers/inner"]["down"].shape == (LAYERS, WIDTH, 2)
    got = jax.jit(adapted.apply)(state, delta, x)
    kernel, bias = state["layers"]["inner"]["kernel"][...], state["layers"]["inner"]["bias"][...]
    d, low = delta["h"]["layers/inner"], delta["lora"]["layers/inner/kernel"]
    for i in range(LAYERS):
        w = kernel[i] + 2 * low["a"][i] @ low["b"][i]
        x = x + jax.nn.relu(x @ w + bias[i] + jnp.tanh(x @ d["down"][i]) @ d["up"][i])
    close(got, x)
