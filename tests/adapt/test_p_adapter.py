"""The p-adapter: the card's oracles, and recorded numbers of the reference."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpeft import adapt, p_adapter, trees
from jaxpeft.adapt.p_adapter import E, p_reweight, p_step, pooling
from jaxpeft.models import SequenceClassifier
from jaxpeft.models.encoder import EncoderConfig
from jaxpeft.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from jaxpeft.models.layers import Attention, BlockConfig, Mlp, attention_bias, norm

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = EncoderConfig(
    vocab=20, width=8, layers=2, heads=2, head_dim=4, mlp_width=16, max_positions=24, init_std=0.3, plain=True
)
IDS = np.random.default_rng(0).integers(2, 20, (4, 5)).astype(np.int32)
MASK = np.ones((4, 5), np.int32)
MODEL = SequenceClassifier(CONFIG, 3)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), IDS, MASK)


def graph(key, q=4, n=6, c=3):
    k = jax.random.split(key, 3)
    a = jax.nn.softmax(jax.random.normal(k[0], (q, n)))
    return a, jax.random.normal(k[1], (q, c)), jax.random.normal(k[2], (n, c))


def explicit(a, rows, nodes, p):
    """Every edge's difference, formed."""
    g = jnp.sqrt(a + E)[..., None] * (nodes[None] - rows[:, None]) + E
    return a * jnp.linalg.norm(g, axis=-1) ** (p - 2)


@pytest.mark.parametrize("p", [1.25, 1.5, 2.0, 2.5])
def test_weights_are_those_of_the_differences_themselves(p, key):
    a, rows, nodes = graph(key)
    got, want = p_reweight(a, rows, nodes, p, same=False), explicit(a, rows, nodes, p)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    grad = lambda f: jax.grad(lambda r: jnp.sum(jnp.sin(f(a, r, nodes, p))))(rows)
    np.testing.assert_allclose(grad(lambda *x: p_reweight(*x, same=False)), grad(explicit), rtol=2e-3, atol=1e-5)


def test_a_node_is_at_distance_zero_from_itself(key):
    a, _, nodes = graph(key, 6, 6, 8)
    for p in (1.25, 1.5, 1.75):
        m = p_reweight(a, nodes, nodes, p, same=True)
        np.testing.assert_allclose(jnp.diag(m), jnp.diag(a) * (E * np.sqrt(8)) ** (p - 2), rtol=1e-4)
    dropped = p_reweight(a, nodes, nodes, 1.5, same=True, self_loops="drop")
    assert (jnp.diag(dropped) == 0).all()
    off = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(np.asarray(dropped)[off], np.asarray(p_reweight(a, nodes, nodes, 1.5, same=True))[off])


def test_at_two_it_is_attention_with_a_restart_and_its_limits(key):
    a, _, f = graph(key, 6, 6, 3)
    m = p_reweight(a, f, f, 2.0, same=True)
    np.testing.assert_allclose(m, a, rtol=1e-6)
    np.testing.assert_allclose(p_step(m, f, f, 2.0, 0.3), (a @ f + 0.3 * f) / 1.3, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(p_step(m, f, f, 2.0, 1e-9), a @ f, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(p_step(m, f, f, 2.0, 1e7), f, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(p_step(m, f, f, 2.0, 1e9, 0.0), jnp.zeros_like(f), atol=1e-6)


def test_constant_features_are_a_fixed_point(key):
    a, _, _ = graph(key, 6, 6, 3)
    f = jnp.broadcast_to(jnp.array([1.0, -2.0, 0.5]), (6, 3))
    m = p_reweight(a, f, f, 1.5, same=True)
    np.testing.assert_allclose(p_step(m, f, f, 1.5, 0.1), f, rtol=1e-5)


def test_scaling_features_scales_weights_by_the_power(key):
    a, rows, nodes = graph(key)
    one, other = (p_reweight(a, s * rows, s * nodes, 1.5, same=False) for s in (1.0, 4.0))
    np.testing.assert_allclose(other, one * 4.0 ** (1.5 - 2), rtol=1e-4)


def test_masked_nodes_count_for_nothing_and_order_does_not_matter(key):
    a, rows, nodes = graph(key)
    a = a.at[:, 4:].set(0.0)
    run = lambda a, nodes: p_step(p_reweight(a, rows, nodes, 1.5, same=False), rows, nodes, 1.5, 0.1)
    np.testing.assert_allclose(run(a, nodes), run(a[:, :4], nodes[:4]), rtol=1e-5)
    order = jnp.array([3, 1, 5, 0, 2, 4])
    np.testing.assert_allclose(run(a[:, order], nodes[order]), run(a, nodes), rtol=1e-4, atol=1e-6)


def test_equal_tokens_give_finite_gradients(key):
    a, _, f = graph(key, 6, 6, 3)
    f = f.at[1].set(f[0])
    grad = jax.grad(lambda f: jnp.sum(p_step(p_reweight(a, f, f, 1.25, same=True), f, f, 1.25, 0.1)))(f)
    assert jnp.isfinite(grad).all()


def test_pooling_is_adaptive_average_pooling():
    for n, s in ((6, 3), (7, 3), (5, 5), (4, 1)):
        x = np.arange(n, dtype=np.float32)
        want = [x[i * n // s : -(-(i + 1) * n // s)].mean() for i in range(s)]
        np.testing.assert_allclose(x @ pooling(n, s), want, rtol=1e-6)


def test_with_nothing_added_it_is_the_base(params, close):
    adapted = adapt(MODEL.apply, p_adapter(2))
    delta = adapted.init(jax.random.key(1), params, IDS, MASK)
    none = {p: jnp.zeros_like(x) if "up" in p.rpartition("/")[2] else x for p, x in trees.by_path(delta).items()}
    close(adapted.apply(params, trees.replace_leaves(delta, none), IDS, MASK), MODEL.apply(params, IDS, MASK))


def test_it_has_the_cards_parameters(params):
    d, r = 8, 4
    _, delta = (
        adapt(MODEL.apply, p_adapter(2)),
        adapt(MODEL.apply, p_adapter(2)).init(jax.random.key(1), params, IDS, MASK),
    )
    attention = 2 * (d * r + r) + r * d + d + 2
    assert trees.count(delta) == 2 * (attention + 2 * d * r + r + d)
    fixed = adapt(MODEL.apply, p_adapter(2, learn_p=False)).init(jax.random.key(1), params, IDS, MASK)
    assert trees.count(fixed) == trees.count(delta) - 2


def test_padding_does_not_reach_real_tokens(params, close):
    adapted = adapt(MODEL.apply, p_adapter(2))
    delta = jax.tree.map(lambda x: x + 0.2, adapted.init(jax.random.key(1), params, IDS, MASK))
    longer, mask = np.pad(IDS, [(0, 0), (0, 3)], constant_values=9), np.pad(MASK, [(0, 0), (0, 3)])
    close(adapted.apply(params, delta, longer, mask), adapted.apply(params, delta, IDS, MASK), atol=1e-4)


@pytest.mark.parametrize("restart", ["code", "theory"])
def test_cross_attention_has_queries_and_pooled_values_for_nodes(restart):
    config = EncoderDecoderConfig(
        vocab=20, width=8, layers=1, decoder_layers=1, heads=2, head_dim=4, mlp_width=16, plain=True
    )
    model = EncoderDecoder(config)
    out = IDS[:, :3]
    params = model.init(jax.random.key(0), IDS, out, MASK)
    method = p_adapter(2, samples=2, restart=restart, scale=1.0)
    adapted = adapt(model.apply, method)
    delta = jax.tree.map(lambda x: x + 0.3, adapted.init(jax.random.key(1), params, IDS, out, MASK))
    assert any("cross_attention" in place for place in delta)
    y = adapted.apply(params, delta, IDS, out, MASK)
    assert jnp.isfinite(y).all()
    other = adapt(model.apply, p_adapter(2, samples=2, restart="code" if restart == "theory" else "theory", scale=1.0))
    assert not jnp.allclose(y, other.apply(params, delta, IDS, out, MASK), atol=1e-4)
    whole = adapt(model.apply, p_adapter(2, restart=restart, scale=1.0))
    assert not jnp.allclose(y, whole.apply(params, delta, IDS, out, MASK), atol=1e-5)


def test_the_gate_alone_needs_no_graph(params):
    adapted = adapt(MODEL.apply, p_adapter(2, message=False))
    delta = adapted.init(jax.random.key(1), params, IDS, MASK)
    assert jnp.isfinite(adapted.apply(params, delta, IDS, MASK)).all()


def test_bad_arguments_are_refused(params):
    for wrong in ({"reduction": 0}, {"p": 0.0}, {"mu": -1.0}):
        with pytest.raises(ValueError, match="expected 1 or more, and positive numbers"):
            p_adapter(**wrong)
    with pytest.raises(ValueError, match="samples 0"):
        p_adapter(samples=0)
    with pytest.raises(ValueError, match="restart 'none'"):
        p_adapter(restart="none")
    with pytest.raises(ValueError, match="reduction 3 does not divide the heads' width 4"):
        adapt(MODEL.apply, p_adapter(3)).init(jax.random.key(0), params, IDS, MASK)


GOLDEN = {
    k: jnp.asarray(v)
    for k, v in load_file(Path(__file__).parents[2] / "third_party" / "p-adapter" / "golden.safetensors").items()
}


class Part(nn.Module):
    """One sub-layer of a post-norm block with the norm that follows it."""

    kind: str
    config = BlockConfig(width=16, layers=1, heads=2, head_dim=8, mlp_width=24, plain=True)

    @nn.compact
    def __call__(self, x, bias=None, memory=None):
        c = self.config
        y = Mlp(c, name="mlp")(x) if self.kind == "mlp" else Attention(c, name=self.kind)(x, bias, memory)
        return norm(c, "norm")(x + y)


def recorded(place):
    """The reference's weights at a place, its kernels laid out as ours are."""
    start = f"weights/{place}."
    found = {k.removeprefix(start): v for k, v in GOLDEN.items() if k.startswith(start)}
    return {k: v.T if k.endswith("weight") else v for k, v in found.items()}


def linear(g, name):
    return {"kernel": g[f"{name}.weight"], "bias": g[f"{name}.bias"]}


def layer_norm(g, name):
    return {"scale": g[f"{name}.weight"], "bias": g[f"{name}.bias"]}


def attention_of(place):
    """Parameters of the attention and its norm, and the adapter's delta."""
    g = recorded(place)
    params = {n: linear(g, f"self.{n}") for n in ("query", "key", "value")} | {"out": linear(g, "output.dense")}
    delta = {}
    for ours, theirs in (("inner", "i"), ("gate", "gate"), ("up", "o")):
        name = f"output.text_laplacian_adapter_{theirs}"
        delta |= {ours: g[f"{name}.weight"], f"{ours}_bias": g[f"{name}.bias"]}
    delta |= {"p": g["output.laplacian_adapter_p"][0], "m": g["output.laplacian_adapter_mu"][0]}
    return params, layer_norm(g, "output.LayerNorm"), delta


def test_self_attention_is_the_references(close):
    params, after, delta = attention_of("attention")
    adapted = adapt(Part("attention").apply, p_adapter(2, feed_forward=False))
    y = adapted.apply(
        {"params": {"attention": params, "norm": after}},
        {"params/attention/out": delta},
        GOLDEN["x"],
        attention_bias(GOLDEN["mask"], 5),
    )
    close(y, GOLDEN["self"], atol=1e-4)


@pytest.mark.parametrize(
    ("samples", "name"), [(3, "cross"), (7, "cross without pooling"), (None, "cross without pooling")]
)
def test_cross_attention_is_the_references(samples, name, close):
    params, after, delta = attention_of("crossattention")
    adapted = adapt(Part("cross_attention").apply, p_adapter(2, samples=samples, feed_forward=False))
    y = adapted.apply(
        {"params": {"cross_attention": params, "norm": after}},
        {"params/cross_attention/out": delta},
        GOLDEN["self"],
        None,
        GOLDEN["memory"],
    )
    close(y, GOLDEN[name], atol=1e-4)


def test_the_bottleneck_beside_the_network_is_the_references(close):
    g, up = recorded("output"), recorded("intermediate")
    params = {"mlp": {"up": linear(up, "dense"), "down": linear(g, "dense")}, "norm": layer_norm(g, "LayerNorm")}
    down, out = linear(g, "text_ffn_adapter.0"), linear(g, "text_ffn_adapter.2")
    delta = {"down": down["kernel"], "down_bias": down["bias"], "up": out["kernel"], "up_bias": out["bias"]}
    adapted = adapt(Part("mlp").apply, p_adapter(2, at="none"))
    close(adapted.apply({"params": params}, {"params/mlp": delta}, GOLDEN["cross"]), GOLDEN["feed forward"], atol=1e-4)
