"""The oracles of He et al. (2022): the design table against formulas written out here.

float32; tolerances of 1e-5 cover sums in another order.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp

import jaxpeft
from jaxpeft import DESIGNS, Design, Hook, PatternError, adapt, chain, lora, on_hooks, sublayer
from jaxpeft.adapt.prefix_tuning import fold, prefix_tuning
from jaxpeft.adapt.unified import compose, hooks_of, joined, parameters, prefix_attention
from jaxpeft.hooks import discover
from jaxpeft.method import Call
from jaxpeft.models import AttentionCore, Encoder
from jaxpeft.models.encoder import EncoderConfig

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = EncoderConfig(
    vocab=20, width=8, layers=2, heads=2, head_dim=4, mlp_width=16, max_positions=12, init_std=0.3, plain=True
)
IDS = np.random.default_rng(0).integers(2, 20, (2, 5)).astype(np.int32)
MASK = np.array([[1] * 5, [1, 1, 1, 0, 0]], np.int32)


@pytest.fixture(scope="module")
def net():
    model = Encoder(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), IDS, MASK)
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), params)


def moved(tree, seed=2, by=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(by * rng.normal(size=x.shape), x.dtype), tree)


def start(net, method, seed=0):
    model, params = net
    adapted = adapt(model.apply, method)
    return adapted, jax.jit(adapted.init)(jax.random.key(seed), params, IDS, MASK)


def run(net, adapted, delta):
    return jax.jit(adapted.apply)(net[1], delta, IDS, MASK)


@pytest.fixture(scope="module")
def plain(net):
    return jax.jit(net[0].apply)(net[1], IDS, MASK)


# ------------------------------------------------------------------------------------------ prefixes: a gated merge


def attention(q, k, v, bias):
    """softmax(q kᵀ / √d + bias) v and the logits' log-sum-exp, (b, t, h, e) and (b, h, t)."""
    logits = jnp.einsum("bthe,bshe->bhts", q, k) / math.sqrt(q.shape[-1])
    logits = logits if bias is None else logits + bias
    return jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(logits), v), logsumexp(logits, -1)


def gated(q, k, v, bias, pk, pv):
    """(1 - λ) Attn(context) + λ Attn(prefix) with λ = sigmoid(lse(prefix) - lse(context))."""
    b = q.shape[0]
    own, context = attention(q, k, v, bias)
    other, prefix = attention(q, *(jnp.broadcast_to(x, (b, *x.shape)) for x in (pk, pv)), None)
    weight = jax.nn.sigmoid(prefix - context).transpose(0, 2, 1)[..., None]
    return (1 - weight) * own + weight * other, weight


def masks(b, t):
    low = -1e30
    causal = jnp.where(jnp.tril(jnp.ones((t, t), bool)), 0.0, low)[None, None]
    padding = jnp.where(jnp.arange(t) < t - 2, 0.0, low)[None, None, None]
    random = jnp.where(jax.random.bernoulli(jax.random.key(5), 0.6, (b, 2, t, t)), 0.0, low)
    return {
        "none": None,
        "causal": causal,
        "padding": padding,
        "both": causal + padding,
        "soft": jax.random.normal(jax.random.key(6), (b, 2, t, t)),
        "any": random,
        "nothing visible": jnp.full((1, 1, 1, t), low),
    }


@pytest.fixture
def qkv(key):
    return jax.random.normal(key, (3, 2, 5, 2, 4))


def core(q, k, v, bias=None):
    return AttentionCore().apply({}, q, k, v, bias)


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "both", "soft", "any", "nothing visible"])
def test_attention_over_a_joined_prefix_is_the_gated_merge_for_any_mask(mask, qkv, key, close):
    q, k, v = qkv
    bias = masks(2, 5)[mask]
    pk, pv = jax.random.normal(key, (2, 3, 2, 4))
    got = core(q, *joined(k, v, bias, pk, pv))
    want, _ = gated(q, k, v, bias, pk, pv)
    close(got, want)
    # The library's pieces make the same merge: its prefix attention, composed with λ.
    own = core(q, k, v, bias)
    close(compose("gated", own, prefix_attention(q, pk, pv), gated(q, k, v, bias, pk, pv)[1]), want)


def test_a_prefix_of_no_length_is_no_prefix(qkv, close):
    q, k, v = qkv
    bias = masks(2, 5)["causal"]
    close(core(q, *joined(k, v, bias, jnp.zeros((0, 2, 4)), jnp.zeros((0, 2, 4)))), core(q, k, v, bias))


def test_the_gate_closes_with_its_logits_and_is_a_share_where_all_are_equal(qkv, close):
    q, k, v = qkv
    q = jnp.abs(q)
    pv = jnp.ones((3, 2, 4))
    closed = jnp.full((3, 2, 4), -1e4)
    close(core(q, *joined(k, v, None, closed, pv)), core(q, k, v))
    opened = -closed
    close(core(q, *joined(k, v, None, opened, pv)), jnp.ones_like(q))
    nought = jnp.zeros_like(k)
    got = core(q, *joined(nought, jnp.zeros_like(v), None, jnp.zeros((3, 2, 4)), pv))
    close(got, jnp.full_like(q, 3 / (3 + 5)))


def test_key_heads_that_serve_groups_of_query_heads(key, close):
    q = jax.random.normal(key, (2, 5, 4, 3))
    k, v = jax.random.normal(key, (2, 2, 5, 2, 3))
    pk, pv = jax.random.normal(key, (2, 3, 2, 3))
    twice = lambda x: jnp.repeat(x, 2, axis=-2)
    close(core(q, *joined(k, v, None, pk, pv)), gated(q, *map(twice, (k, v)), None, *map(twice, (pk, pv)))[0])


def test_the_gate_survives_half_precision_logits_of_any_size():
    q = jnp.full((1, 1, 1, 4), 100.0, jnp.bfloat16)
    y = core(q, *joined(q, q, None, jnp.full((2, 1, 4), 90.0), jnp.ones((2, 1, 4))))
    assert bool(jnp.isfinite(y).all())


def test_a_prefix_without_a_norm_composed_by_its_gate_is_the_joined_prefix_in_a_model(net, close):
    """`_noln` + gate == concat, with the gate taken from the formula in a hook of our own."""
    _, params = net
    adapted, delta = start(net, prefix_tuning(3, 0))
    delta = moved(delta)

    def around(site, call, q, k, v, bias=None):
        shape = (3, k.shape[2], k.shape[3])
        pk, pv = site.param("key", shape, None), site.param("value", shape, None)
        return compose("gated", call(q, k, v, bias), prefix_attention(q, pk, pv), gated(q, k, v, bias, pk, pv)[1])

    by_hand = adapt(net[0].apply, on_hooks("h", [Hook("**/attention/core", around)], {}))
    close(run(net, adapted, delta), run(net, by_hand, delta))
    assert params is net[1]


def test_folding_the_network_of_a_prefix_keeps_the_answer_and_needs_the_tables_only(net, close):
    model, params = net
    adapted, delta = start(net, prefix_tuning(3, 7))
    delta = moved(delta)
    (kind,) = delta
    assert jax.tree.map(jnp.shape, delta[kind]) == {
        "embedding": (3, 8),
        "w1": (8, 7),
        "b1": (7,),
        "w2": (7, 2 * 2 * 8),
        "b2": (32,),
    }
    hooks = hooks_of(DESIGNS["prefix_tuning"][0], 3, None, 0.0, None)
    slots = discover(hooks, Call(model.apply, params, (IDS, MASK)))
    tables = fold(delta, slots)
    free, shapes = start(net, prefix_tuning(3, 0))
    assert jax.tree.map(jnp.shape, tables) == jax.tree.map(jnp.shape, shapes)
    close(run(net, free, tables), run(net, adapted, delta))
    # Layer i takes slot 2i as keys and 2i + 1 as values of Z viewed as (l, 2L, heads, d_h).
    p = delta[kind]
    z = (jnp.tanh(p["embedding"] @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]).reshape(3, 4, 2, 4)
    for i in range(2):
        close(tables[f"params/layers_{i}/attention/core"], {"key": z[:, 2 * i], "value": z[:, 2 * i + 1]})


# ---------------------------------------------------------------------------------------------------- bottlenecks

FFN = Design(insertion="parallel", composition="scaled", scale=1.0)


def test_the_lora_initialisation_starts_at_the_base_for_every_design(net, close, plain):
    for name, designs in DESIGNS.items():
        if name == "prefix_tuning":
            continue
        zeroed = [dataclasses.replace(d, init="lora") for d in designs]
        adapted, delta = start(net, sublayer(zeroed, 2))
        close(run(net, adapted, delta), plain)


def test_scale_nought_is_the_base_and_scale_moves_into_the_up_projection(net, close, plain):
    adapted, delta = start(net, sublayer(FFN, 2))
    delta = moved(delta)
    with_scale = lambda s: adapt(net[0].apply, sublayer(FFN, 2, scale=s))
    close(run(net, with_scale(0.0), delta), plain)
    inverse = {p: {**d, "up": d["up"] / 4, "up_bias": d["up_bias"] / 4} for p, d in delta.items()}
    close(run(net, with_scale(4.0), inverse), run(net, adapted, delta))
    unscaled = adapt(net[0].apply, sublayer(Design(insertion="parallel"), 2))
    close(run(net, unscaled, delta), run(net, adapted, delta))


def test_a_learned_scale_starts_at_one_and_learns(net, close):
    learned, delta = start(net, sublayer(dataclasses.replace(FFN, scale=None), 2))
    assert all(d["amount"].shape == () and float(d["amount"]) == 1 for d in delta.values())
    fixed, _ = start(net, sublayer(FFN, 2))
    close(
        run(net, learned, delta),
        run(net, fixed, {p: {k: v for k, v in d.items() if k != "amount"} for p, d in delta.items()}),
    )
    grads = jax.jit(jax.grad(lambda d: jnp.sum(jnp.sin(learned.apply(net[1], d, IDS, MASK)))))(moved(delta))
    assert all(float(jnp.abs(d["amount"])) > 0 for d in grads.values())


@pytest.mark.parametrize("module", ["attention/query", "attention/value", "mlp/up", "mlp/down"])
def test_without_activation_and_biases_a_parallel_adapter_at_a_linear_sublayer_is_lora_and_merges(module, net, close):
    model, params = net
    site = {"attention/query": "query", "attention/value": "value", "mlp/up": "ffn_up", "mlp/down": "ffn_down"}[module]
    bottleneck = Design(
        "bottleneck", "parallel", site, "scaled", init="bert", scale=3.0, activation="identity", biases=False
    )
    linear = dataclasses.replace(bottleneck, form="linear")
    adapted, delta = start(net, sublayer(bottleneck, 2))
    delta = moved(delta)
    low = adapt(model.apply, lora(2, 6.0, at=f"**/{module}/kernel"), on_dense="refuse")
    factors = {f"{p}/kernel": {"a": d["down"], "b": d["up"]} for p, d in delta.items()}
    want = run(net, low, factors)
    close(run(net, adapted, delta), want)
    close(run(net, adapt(model.apply, sublayer(linear, 2)), delta), want)
    close(jax.jit(model.apply)(low.merge(params, factors), IDS, MASK), want)


@pytest.mark.parametrize("module", ["mlp", "attention"])
def test_a_sequential_adapter_is_a_parallel_one_that_reads_the_sublayers_output(module, net, close):
    design = Design(site="ffn" if module == "mlp" else "attention")
    adapted, delta = start(net, sublayer(design, 2))
    delta = moved(delta)

    def around(site, call, x, *args, **kwargs):
        h = call(x, *args, **kwargs)
        p = {n: site.param(n, s, None) for n, s in SHAPES.items()}
        return h + jax.nn.relu(h @ p["down"] + p["down_bias"]) @ p["up"] + p["up_bias"]

    by_hand = adapt(net[0].apply, on_hooks("h", [Hook(f"**/{module}", around)], {}))
    close(run(net, adapted, delta), run(net, by_hand, delta))


SHAPES = {"down": (8, 2), "down_bias": (2,), "up": (2, 8), "up_bias": (8,)}


def norm(x, scale, bias, eps):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def blocks(net, change):
    """The encoder of `net` by hand; `change` holds what a design does to it, by place."""
    p = net[1]["params"]
    c = CONFIG
    dense = lambda q, x: x @ q["kernel"] + q["bias"]
    e = p["embeddings"]
    x = e["word"]["embedding"][IDS] + e["position"]["embedding"][:5] + e["type"]["embedding"][0]
    ln = lambda q, x: norm(x, q["scale"], q["bias"], c.norm_eps)
    x = ln(e["norm"], x)
    bias = jnp.where(MASK[:, None, None] != 0, 0.0, -1e30)
    for i in range(c.layers):
        layer = p[f"layers_{i}"]
        a, m, path = layer["attention"], layer["mlp"], f"params/layers_{i}"
        q, k, v = (dense(a[n], x).reshape(2, 5, 2, 4) for n in ("query", "key", "value"))
        heads = attention(q, k, v, bias)[0].reshape(2, 5, 8)
        heads = change.get("heads", lambda path, x, h: h)(f"{path}/attention/core", x, heads)
        o = change.get("attention", lambda path, h: h)(f"{path}/attention", dense(a["out"], heads))
        x = ln(layer["attention_norm"], x + o)
        f = dense(m["down"], jax.nn.gelu(dense(m["up"], x), approximate=False))
        f = change.get("ffn", lambda path, x, f: f)(f"{path}/mlp", x, f)
        z = x + f
        out = ln(layer["mlp_norm"], z)
        if "last" in change:
            out = ln(layer["mlp_norm"], z + change["last"](f"{path}/mlp_norm", out))
        x = out
    return x


def adapter(d, z):
    z = norm(z, d["norm_scale"], d["norm_bias"], 1e-5) if "norm_scale" in d else z
    return jax.nn.relu(z @ d["down"] + d["down_bias"]) @ d["up"] + d["up_bias"]


def test_every_place_in_the_block_by_hand(net, close, plain):
    """Houlsby, Pfeiffer (the last norm twice), parallel at the feed-forward network and at attention before W_o."""
    close(blocks(net, {}), plain)
    cases = {
        "houlsby": lambda d: {
            "attention": lambda path, h: h + adapter(d[path], h),
            "ffn": lambda path, x, f: f + adapter(d[path], f),
        },
        "pfeiffer": lambda d: {"last": lambda path, u: adapter(d[path], u)},
        "parallel_adapter": lambda d: {"ffn": lambda path, x, f: f + adapter(d[path], x)},
        "scaled_parallel_adapter": lambda d: {"ffn": lambda path, x, f: f + 4 * adapter(d[path], x)},
        "sequential_attention_adapter": lambda d: {"attention": lambda path, h: h + adapter(d[path], h)},
        "parallel_attention_adapter": lambda d: {"heads": lambda path, x, h: h + adapter(d[path], x)},
    }
    for name, change in cases.items():
        adapted, delta = start(net, sublayer(name, 2))
        delta = moved(delta)
        got, want = run(net, adapted, delta), blocks(net, change(delta))
        np.testing.assert_allclose(got, want, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", ["multi_head_parallel_adapter", "prefix_without_gating"])
def test_prefixes_added_without_a_gate_by_hand(name, net, close):
    adapted, delta = start(net, sublayer(name, 3))
    delta = moved(delta)

    def heads(path, x, h):
        i = path.split("/")[1]
        a, d = net[1]["params"][i]["attention"], delta[f"params/{i}/attention/core"]
        n = delta[f"params/{i}/attention/query"]
        x = norm(x, n["norm_scale"], n["norm_bias"], 1e-5)
        q = (x @ a["query"]["kernel"] + a["query"]["bias"]).reshape(2, 5, 2, 4)
        logits = jnp.einsum("bthe,lhe->bhtl", q, d["key"])
        weights = jax.nn.relu(logits) if "multi" in name else jax.nn.softmax(logits / 2)
        return h + jnp.einsum("bhtl,lhe->bthe", weights, d["value"]).reshape(h.shape)

    close(run(net, adapted, delta), blocks(net, {"heads": heads}), atol=2e-5)


def test_a_pre_norm_block_may_read_the_residual_stream(close):
    model = Encoder(dataclasses.replace(CONFIG, pre_norm=True))
    params = jax.jit(model.init)(jax.random.key(0), IDS, MASK)
    for site, norm_name in (("ffn", "mlp_norm"), ("attention", "attention_norm")):
        design = Design(insertion="parallel", site=site, reads="residual")
        adapted = adapt(model.apply, sublayer(design, 2))
        delta = moved(jax.jit(adapted.init)(jax.random.key(1), params, IDS, MASK))

        def keep(s, call, x, *a, **k):
            s.stash[s.parent] = x
            return call(x, *a, **k)

        def add(s, call, x, *a, **k):
            z = s.stash[s.parent if s.path.endswith("mlp") else s.parent.rpartition("/")[0]]
            p = {n: s.param(n, shape, None) for n, shape in SHAPES.items()}
            y = call(x, *a, **k)
            return y + (jax.nn.relu(z @ p["down"] + p["down_bias"]) @ p["up"] + p["up_bias"]).reshape(y.shape)

        place = "**/mlp" if site == "ffn" else "**/attention/core"
        by_hand = adapt(model.apply, on_hooks("h", [Hook(f"**/{norm_name}", keep), Hook(place, add)], {}))
        got, want = (jax.jit(a.apply)(params, delta, IDS, MASK) for a in (adapted, by_hand))
        close(got, want)
        reading = adapt(model.apply, sublayer(dataclasses.replace(design, reads="input"), 2))
        assert not np.allclose(got, jax.jit(reading.apply)(params, delta, IDS, MASK), atol=1e-3)


def test_a_norm_on_the_output_by_hand(net, close):
    adapted, delta = start(net, sublayer(dataclasses.replace(FFN, norm="out", scale=3.0), 2))
    delta = moved(delta)

    def ffn(path, x, f):
        d = {k: v for k, v in delta[path].items() if not k.startswith("norm")}
        return f + norm(3 * adapter(d, x), delta[path]["norm_scale"], delta[path]["norm_bias"], 1e-5)

    close(run(net, adapted, delta), blocks(net, {"ffn": ffn}), atol=2e-5)


# ------------------------------------------------------------------------------------------------------------- counts


def test_parameters_per_sublayer_are_those_of_the_paper(net):
    """2ld, 2rd, 4rd (two square projections), 10rd (both feed-forward matrices at four times the width)."""
    d, r, layers = 8, 2, 2
    count = lambda method: jaxpeft.count(start(net, method)[1])
    assert count(prefix_tuning(r, 0)) == layers * 2 * r * d
    for name in ("parallel_adapter", "scaled_parallel_adapter", "pfeiffer"):
        bare = [dataclasses.replace(x, biases=False, norm="none") for x in DESIGNS[name]]
        assert count(sublayer(bare, r)) == layers * 2 * r * d == layers * parameters(bare[0], d, r)
    assert count(sublayer("lora_projections", r)) == layers * 4 * r * d
    assert count(lora(r)) == layers * 4 * r * d
    wide = Encoder(dataclasses.replace(CONFIG, mlp_width=4 * d))
    shapes = jax.eval_shape(wide.init, jax.random.key(0), IDS)
    at = adapt(wide.apply, lora(r, at="**/mlp/{up,down}/kernel"))
    assert jaxpeft.count(jax.eval_shape(at.init, jax.random.key(0), shapes, IDS)) == layers * 10 * r * d
    assert 2 * parameters(Design("linear", "parallel", "ffn_up"), d, r, wide=4 * d) == 10 * r * d


def test_mam_is_a_prefix_and_a_scaled_parallel_adapter(net, close):
    adapted, delta = start(net, jaxpeft.mam(3, 2, 4.0, mlp=0))
    assert sorted(delta) == ["prefix_tuning", "scaled_parallel"]
    assert jaxpeft.count(delta) == 2 * (2 * 3 * 8 + 2 * 2 * 8 + 2 + 8)
    delta = moved(delta)
    prefix, scaled = delta["prefix_tuning"], delta["scaled_parallel"]
    by_hand = chain(prefix_tuning(3, 0), sublayer("scaled_parallel_adapter", 2, scale=4.0))
    again = {"prefix_tuning": prefix, "scaled_parallel_adapter": scaled}
    close(run(net, adapted, delta), run(net, adapt(net[0].apply, by_hand), again))


# -------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        (dict(form="softmax_prefix", insertion="parallel"), "head"),
        (dict(site="head"), "prefix forms"),
        (dict(form="softmax_prefix", site="head"), "parallel"),
        (dict(composition="gated"), "softmax_prefix"),
        (dict(insertion="parallel", site="ffn_norm"), "sequential"),
        (dict(activation="swish"), r"swish.*silu"),
    ],
)
def test_a_design_without_a_meaning_is_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        Design(**fields)


def test_unknown_designs_and_places_are_refused_with_near_names(net):
    with pytest.raises(ValueError, match=r"'pfeifer'; did you mean 'pfeiffer'"):
        sublayer("pfeifer")
    with pytest.raises(PatternError, match=r"near misses: '.*mlp"):
        start(net, sublayer("parallel_adapter", 2, at="**/mlpp"))


def test_designs_go_through_plain_data(net, close):
    for name in DESIGNS:
        method = sublayer(name, 2)
        again = jaxpeft.from_config(jaxpeft.from_config(method.config).config)
        assert again.config == method.config


def test_a_scale_is_swept_by_vmap(net, close, plain):
    _, delta = start(net, sublayer(FFN, 2))
    delta = moved(delta)
    one = lambda s: adapt(net[0].apply, sublayer(FFN, 2, scale=s)).apply(net[1], delta, IDS, MASK)
    got = jax.jit(jax.vmap(one))(jnp.array([0.0, 1.0]))
    close(got[0], plain)
    close(got[1], jax.jit(one)(1.0))


def test_a_linen_model_of_other_names_is_reached_by_pattern(key, close):
    class Other(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="feed")(x)

    model, x = Other(), jax.random.normal(key, (2, 8))
    params = model.init(key, x)
    adapted = adapt(model.apply, sublayer(FFN, 2, at="feed"))
    delta = moved(adapted.init(key, params, x))
    d = delta["params/feed"]
    close(adapted.apply(params, delta, x), model.apply(params, x) + adapter(d, x))
