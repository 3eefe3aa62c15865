"""LoGAH: laws of its card, the reference's numbers, one set of weights for many models, matrices that stay products."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxpeft import trees
from jaxpeft.files import load_hypernetwork, save_hypernetwork
from jaxpeft.hyper import TargetError
from jaxpeft.hyper.graph import OPS, Graph, Slot, model_graph
from jaxpeft.hyper.graphormer import channel_ids, encode, encoder_start, spatial_ids, vocabulary
from jaxpeft.hyper.logah import SIZES, frobenius, logah, logah_network, with_noise
from jaxpeft.interpret import lift
from jaxpeft.models.decoder import Decoder, DecoderConfig
from jaxpeft.models.vit import ImageClassifier, VisionConfig
from jaxpeft.weights.factored import Factored

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "logah" / "golden.safetensors")
D, RANK, REACH = 8, 4, 48
SMALL = (D, 1, 2, RANK)
X = jnp.ones((2, 4))


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def slot(sizes, op="linear", part=0):
    """A slot at node 0 whose tensor is (c_out, c_in, k_h, k_w), or a vector."""
    return Slot(op, "p", (), tuple(sizes), "oihw"[: len(sizes)], 0, part)


def plain(network, weights, x, sizes, **options: Any):
    """The tensor that one embedding gives."""
    return jax.jit(lambda w, x: network.decode(w, x[None], [slot(sizes, **options)])["p", ()])(weights, x)


def predicted(network, weights, graph, spec):
    return jax.jit(lambda w: network.predict(w, graph, spec))(weights)


NETWORK = logah_network(SMALL, reach=64)


@pytest.fixture(scope="module")
def weights():
    """The weights of `NETWORK`, which do not depend on a target."""
    return jax.jit(NETWORK.init)(jax.random.key(3))


def perceptron(*widths):
    spec = [{"kernel": shape(m, n), "bias": shape(n)} for m, n in itertools.pairwise(widths)]

    def apply(params, x):
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return x @ params[-1]["kernel"] + params[-1]["bias"]

    return spec, apply


def decoder(**change):
    sizes = {"width": 16, "layers": 2, "heads": 2, "head_dim": 8, "mlp_width": 32, "pre_norm": True}
    model = Decoder(DecoderConfig(vocab=50, fused_qkv=True, activation="gelu_new", **{**sizes, **change}))
    inputs = (jnp.array([[1, 2, 3]]),)
    spec = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return model, inputs, spec, model_graph(model.apply, spec, *inputs)


# -------------------------------------------------------------------------------------------------------------- reference


def linear(prefix):
    return {"kernel": GOLDEN[f"{prefix}.weight"].T, "bias": GOLDEN[f"{prefix}.bias"]}


LOW = {"decoder": {"mlp": [linear(f"low.mlp.fc.{i}") for i in (0, 2, 4)], "out": linear("low.l2")}}
EMBEDDINGS = jnp.asarray(GOLDEN["low.x"])
RAW = {"op": "embedding"}  # tables are not scaled, so that their tensors are the decoder's


@pytest.mark.parametrize("name", [k for k in GOLDEN if k.startswith("low.out.")])
def test_low_rank_tensors_equal_the_reference(name):
    sizes = tuple(map(int, name.split(".")[2].split("_")))
    network = logah_network(SMALL, reach=REACH)
    for x, expected in zip(EMBEDDINGS, GOLDEN[name]):
        np.testing.assert_allclose(plain(network, LOW, x, sizes, **RAW), expected, atol=1e-5)


def test_scaled_tensors_equal_the_reference():
    fan_in, std = (logah_network(SMALL, reach=REACH, scaling=s) for s in ("fan_in", "std"))
    x = EMBEDDINGS[0]
    for network, name, sizes in (
        (fan_in, "vit.conv", (5, 6, 3, 2)),
        (fan_in, "vit.depthwise", (5, 1, 3, 3)),
        (fan_in, "vit.wide", (5, 6, 1, 3)),
        (fan_in, "vit.matrix", (16, 12)),
        (std, "gpt.matrix", (16, 12)),
    ):
        np.testing.assert_allclose(plain(network, LOW, x, sizes), GOLDEN[name], atol=1e-5)
    for network, name in ((fan_in, "vit"), (std, "gpt")):
        for part, (op, kind) in enumerate((("norm", "scale"), ("bias", "bias"))):
            made = plain(network, LOW, x, (7,), op=op, part=part)
            np.testing.assert_allclose(made, GOLDEN[f"{name}.{kind}"], atol=1e-5)


@pytest.mark.parametrize("name", [k for k in GOLDEN if k.startswith("full.out.")])
def test_full_and_tiled_tensors_equal_the_reference(name):
    sizes = tuple(map(int, name.split(".")[2].split("_")))
    network = logah_network(SMALL, decoder="full", vectors="mlp", block=(6, 5))
    window = linear("full.fc.0")
    window = {"kernel": window["kernel"].reshape(D, -1, 5, 5), "bias": window["bias"].reshape(-1, 5, 5)}
    weights = {"decoder": {"window": window, "block": [linear("full.conv.0"), linear("full.conv.2")]}}
    for x, expected in zip(EMBEDDINGS, GOLDEN[name]):
        np.testing.assert_allclose(plain(network, weights, x, sizes, **RAW), expected, atol=1e-5)


@pytest.mark.parametrize("c", [4, 15])
def test_vectors_by_a_perceptron_equal_the_reference(c):
    network = logah_network(SMALL, decoder="full", vectors="mlp", block=(6, 5))
    weights = {"vectors": [linear("mlp.fc.0"), linear("mlp.fc.2")]}
    for x, (scale, bias) in zip(EMBEDDINGS, GOLDEN[f"mlp.vector.{c}"]):
        made = [plain(network, weights, x, (c,), op="norm", part=part) for part in (0, 1)]
        np.testing.assert_allclose(made[0], 2 / (1 + np.exp(-scale / 2)), atol=1e-5)
        np.testing.assert_allclose(made[1], np.tanh(0.2 * bias), atol=1e-5)


def encoder_of(kind):
    """The recorded encoder's weights in this one's layout."""
    g = lambda name: GOLDEN[f"enc.gnn.{name}"]
    norm = lambda name: {"scale": g(f"{name}.weight"), "bias": g(f"{name}.bias")}
    both = lambda name: {"kernel": g(f"{name}.weight").T, "bias": g(f"{name}.bias")}
    layers = [
        {
            "attention_norm": norm(f"{i}.ln1"),
            "qkv": {"kernel": g(f"{i}.attn.to_qkv.weight").T},
            "out": both(f"{i}.attn.to_out.0"),
            "mlp_norm": norm(f"{i}.ln2"),
            "up": both(f"{i}.ff.net.0"),
            "down": both(f"{i}.ff.net.3"),
        }
        for i in range(3)
    ]
    return {
        "op": GOLDEN["enc.op.weight"],
        "channel": GOLDEN[f"enc.{kind}.shape.embed_channel.weight"],
        "spatial": GOLDEN[f"enc.{kind}.shape.embed_spatial.weight"],
        "degree_in": g("0.centrality_embed_in.weight"),
        "degree_out": g("0.centrality_embed_out.weight"),
        "far": g("0.input_dist_embed.weight"),
        "edge": {
            "table": g("0.attn.edge_embed.embed.weight"),
            "first": both("0.attn.proj_e.0"),
            "second": both("0.attn.proj_e.2"),
        },
        "layers": trees.stack(layers),
        "norm": {"scale": GOLDEN["enc.ln.weight"], "bias": GOLDEN["enc.ln.bias"]},
    }


def recorded_graph(n=12):
    return Graph(
        GOLDEN["enc.ops"][:n], GOLDEN["enc.sizes"][:n], np.full(n, -1), GOLDEN["enc.distance"][:n, :n],
        np.arange(n) < 9, (),
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "more"), [("vit", ()), ("gpt", (32000, 50257, 128256))])
def test_embeddings_of_a_graph_equal_the_reference(kind, more):
    words = vocabulary(10, more)
    assert words.channels == tuple(GOLDEN[f"enc.{kind}.channels"])
    assert words.spatial == tuple(GOLDEN[f"enc.{kind}.spatial"])
    made = jax.jit(lambda p: encode(p, recorded_graph(), 4, words))(encoder_of(kind))
    np.testing.assert_allclose(made[:9], GOLDEN[f"enc.{kind}.out"], atol=2e-5)
    assert not made[9:].any()


def test_distances_start_as_the_references_sinusoids(key):
    made = jax.jit(lambda key: encoder_start(key, 16, 1, 4, vocabulary(10)))(key)
    np.testing.assert_allclose(made["edge"]["table"], GOLDEN["edge.start"], atol=1e-4)
    assert made["op"].shape == (len(OPS), 16)
    assert float(made["far"].std()) == pytest.approx(16**-0.5, rel=0.1)


def test_sizes_between_known_ones_take_the_nearest():
    words = vocabulary(10)
    sizes = jnp.array([1, 2, 4, 7, 9, 72, 9000, 0])
    expected = [1, 1, 8, 8, 8, 64, 8192]
    assert [words.channels[i] for i in channel_ids(sizes, words)[:-1]] == expected
    assert int(channel_ids(sizes, words)[-1]) == len(words.channels)
    windows = spatial_ids(jnp.array([2, 12, 40, 0]), words)
    assert [words.spatial[i] for i in windows[:-1]] == [3, 11, 16]
    assert int(windows[-1]) == len(words.spatial)


# ------------------------------------------------------------------------------------------------------- the decoder's laws

few = settings(max_examples=6)  # each is a program of its own


@few
@given(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)), st.integers(0, 2))
def test_kernels_are_products_read_window_by_window(sizes, i):
    z = np.asarray(EMBEDDINGS[i])
    for j, layer in enumerate(LOW["decoder"]["mlp"]):
        z = (z if j == 0 else np.maximum(z, 0)) @ layer["kernel"] + layer["bias"]
    out = LOW["decoder"]["out"]
    rows = np.maximum(z.reshape(2 * RANK, RANK), 0) @ out["kernel"] + out["bias"]
    a, b = rows.reshape(2, REACH, RANK)
    made = np.asarray(plain(logah_network(SMALL, reach=REACH), LOW, EMBEDDINGS[i], sizes, **RAW))
    for o, c, h, w in np.ndindex(*sizes):
        np.testing.assert_allclose(made[o, c, h, w], a[o * sizes[2] + h] @ b[c * sizes[3] + w], atol=1e-5)


@few
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2))
def test_ranks_are_bounded_and_smaller_matrices_are_corners_of_larger_ones(m, n, i):
    network = logah_network(SMALL, reach=REACH)
    large = plain(network, LOW, EMBEDDINGS[i], (REACH, REACH), **RAW)
    values = np.linalg.svd(large, compute_uv=False)
    assert (values[RANK:] <= 1e-5 * values[0]).all()
    assert values[RANK - 1] > 1e-4 * values[0]
    np.testing.assert_allclose(plain(network, LOW, EMBEDDINGS[i], (m, n), **RAW), large[:m, :n], atol=1e-5)


def test_channels_beyond_the_reach_repeat():
    network = logah_network(SMALL, reach=REACH)
    wide = plain(network, LOW, EMBEDDINGS[0], (100, 5), **RAW)
    np.testing.assert_array_equal(wide[REACH : 2 * REACH], wide[:REACH])
    kernel = plain(network, LOW, EMBEDDINGS[0], (20, 3, 3, 3), **RAW)
    np.testing.assert_array_equal(kernel[16:], kernel[:4])
    assert plain(network, LOW, EMBEDDINGS[0], (100,), op="bias").shape == (100,)


def test_numbers_of_parameters_are_the_papers(key):
    shapes = jax.eval_shape(logah_network(SMALL, reach=REACH).init, key)
    expected = (
        (D * 4 * D + 4 * D) + (4 * D * 8 * D + 8 * D) + (8 * D * 2 * RANK**2 + 2 * RANK**2) + RANK * REACH + REACH
    )
    assert trees.count(shapes["decoder"]) == expected
    full = logah_network(SMALL, decoder="full", vectors="mlp", block=(6, 5))
    made = trees.count(jax.eval_shape(full.init, key)["decoder"])
    assert made == (D + 1) * 4 * D * 25 + (4 * D + 1) * 8 * D + (8 * D + 1) * 36
    millions = {name: trees.count(jax.eval_shape(logah_network(name).init, key)) / 1e6 for name in SIZES}
    for name, count in {"tiny": 2.5, "small": 21.4, "base": 78.2, "large": 289}.items():
        assert millions[name] == pytest.approx(count, rel=0.03), millions


def test_matrices_have_the_energy_or_the_deviation_they_should(key):
    network = logah_network(SMALL, reach=REACH)
    unit = plain(network, LOW, EMBEDDINGS[0], (30, 20), **RAW)
    scaled = plain(network, LOW, EMBEDDINGS[0], (30, 20))
    p = jax.random.normal(key, (200, 30, 20)) * (scaled / unit)[0, 0]
    x = jax.random.normal(jax.random.split(key)[0], (20,))
    energy = jnp.square(p @ x).sum(-1).mean() / jnp.square(x).sum()
    np.testing.assert_allclose(energy, 2 * 30 / 20, rtol=0.05)
    std = logah_network(SMALL, reach=REACH, scaling="std", std=0.02)
    for x in EMBEDDINGS:
        assert float(jnp.std(plain(std, LOW, x, (30, 20)), ddof=1)) == pytest.approx(0.02, rel=1e-5)
    full = logah_network(SMALL, decoder="full", vectors="mlp", scaling="std", block=(6, 5))
    made = plain(full, jax.jit(full.init)(key), EMBEDDINGS[0], (9, 7, 3, 3))
    assert float(jnp.std(made, ddof=1)) == pytest.approx(0.02, rel=1e-4)


@given(st.floats(-50, 50, width=32), st.floats(-50, 50, width=32))
def test_scales_and_biases_stay_in_their_ranges(a, b):
    network = logah_network(SMALL, decoder="full", vectors="mlp", block=(1, 1))
    silent = [
        {"kernel": jnp.zeros((D, D)), "bias": jnp.zeros(D)},
        {"kernel": jnp.zeros((D, 2)), "bias": jnp.array([a, b])},
    ]
    scale, bias = (plain(network, {"vectors": silent}, EMBEDDINGS[0], (3,), op="norm", part=i) for i in (0, 1))
    assert 0 <= float(scale[0]) <= 2
    assert -1 <= float(bias[0]) <= 1
    assert a != 0 or float(scale[0]) == 1
    assert b != 0 or float(bias[0]) == 0


def test_the_deviation_is_differentiated(key):
    """A matrix of a fixed deviation does not change with the scale of what it is made from."""
    network = logah_network(SMALL, reach=REACH, scaling="std")
    target = jax.random.normal(key, (12, 9))

    def loss(c):
        out = {"kernel": c * LOW["decoder"]["out"]["kernel"], "bias": c * LOW["decoder"]["out"]["bias"]}
        made = plain(network, {"decoder": {**LOW["decoder"], "out": out}}, EMBEDDINGS[0], (12, 9))
        return (made * target).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(1.0)
    assert abs(float(gradient)) < 1e-5 < abs(float(value))


def test_noise_tells_units_apart_by_a_share_of_each_tensors_deviation(key):
    """A query and a key that the graph cannot tell apart are predicted alike; counters stay as they are."""
    x = 3 * jax.random.normal(key, (400, 50))
    params = {"q": x, "k": x, "step": jnp.asarray(3)}
    noisy = jax.jit(with_noise)(key, params, 1e-2)
    for a in (noisy["q"] - x, noisy["k"] - x, (noisy["q"] - noisy["k"]) / jnp.sqrt(2.0)):
        assert float(a.std()) == pytest.approx(3e-2, rel=0.03)
    assert int(noisy["step"]) == 3
    np.testing.assert_array_equal(with_noise(key, params, 0.0)["q"], x)


def test_the_penalty_is_a_sum_of_norms_with_a_gradient_everywhere():
    params = {"a": jnp.array([3.0, 4.0]), "zero": jnp.zeros((2, 2))}
    assert float(frobenius(params)) == pytest.approx(5)
    gradient = jax.grad(frobenius)(params)
    np.testing.assert_allclose(gradient["a"], [0.6, 0.8])
    assert not gradient["zero"].any()


# --------------------------------------------------------------------------------------------------------------- encoders


def test_relabelled_nodes_have_their_embeddings_relabelled():
    weights, graph = jax.tree.map(jnp.asarray, encoder_of("vit")), recorded_graph(9)
    order = np.array([0, 4, 2, 8, 1, 7, 3, 5, 6])  # the input stays first
    other = Graph(
        graph.op[order], graph.shape[order], graph.parameter[order], graph.distance[np.ix_(order, order)],
        graph.mask[order], (),
    )  # fmt: skip
    run = jax.jit(lambda g: encode(weights, g, 4, vocabulary(10)))
    np.testing.assert_allclose(run(other), run(graph)[order], atol=1e-5)


def test_padding_changes_nothing(weights):
    spec, apply = perceptron(4, 5, 3)
    run = jax.jit(NETWORK.encode)
    bare, padded = (run(weights, model_graph(apply, spec, X, nodes=n).arrays()) for n in (None, 9))
    np.testing.assert_allclose(padded[: len(bare)], bare, atol=1e-5)
    assert not padded[len(bare) :].any()


def test_graphs_of_one_size_share_a_program(weights, counted):
    once = counted(NETWORK.encode)
    run = jax.jit(once)
    graphs = [model_graph(apply, spec, X, nodes=9).arrays() for spec, apply in (perceptron(4, 5, 3), perceptron(4, 9))]
    each = [run(weights, g) for g in graphs]
    assert len(once.traces) == 1
    many = jax.jit(jax.vmap(NETWORK.encode, (None, 0)))(weights, trees.stack(graphs))
    np.testing.assert_allclose(many, jnp.stack(each), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ whole models


def test_a_decoder_runs_on_products_that_are_never_formed_however_its_layers_are_written(weights, close):
    made, lazy = [], lambda x: isinstance(x, Factored)
    for scan in (False, True):
        model, inputs, spec, graph = decoder(scan=scan)
        hyper = logah(spec, graph, NETWORK)
        params, factored = jax.jit(lambda w, h=hyper: (h.apply(w), h.factored(w)))(weights)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), spec)
        kept = {p for p, x in trees.by_path(factored, is_leaf=lazy).items() if lazy(x)}
        assert kept == {p for p in trees.by_path(spec) if p.endswith(("kernel", "embedding"))}
        close(jax.tree.map(lambda x: x.dense() if lazy(x) else x, factored, is_leaf=lazy), params)
        run = jax.jit(lift(model.apply, on_dense="refuse"))
        np.testing.assert_allclose(run(factored, *inputs), run(params, *inputs), atol=2e-5)
        made.append(params["params"])
    whole = made[1]["layers"]
    for i in range(2):
        close(jax.tree.map(lambda x, i=i: x[i], whole), made[0][f"layers_{i}"])
    first, second = whole["mlp"]["up"]["kernel"]
    assert float(jnp.abs(first - second).max()) > 1e-3


def test_products_have_the_deviation_of_what_they_stand_for(weights, close):
    spec, apply = perceptron(4, 8, 3)
    hyper = logah(spec, model_graph(apply, spec, X), logah_network(SMALL, reach=64, scaling="std"))
    params, factored = jax.jit(lambda w: (hyper.apply(w), hyper.factored(w)))(weights)
    assert float(jnp.std(params[0]["kernel"], ddof=1)) == pytest.approx(0.02, rel=1e-4)
    close([p["kernel"].dense() for p in factored], [p["kernel"] for p in params], atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"vectors": "mlp", "scaling": "std"}, {"decoder": "full", "vectors": "mlp", "block": (6, 2)}],
)
def test_it_predicts_a_vision_transformer_under_jit_vmap_and_grad(options, key):
    config = VisionConfig(
        width=8, layers=1, heads=2, head_dim=4, mlp_width=16, pre_norm=True, image=(4, 4), patch=(2, 2), channels=1
    )
    model, x = ImageClassifier(config, 10), jax.random.normal(key, (2, 4, 4, 1))
    spec = jax.eval_shape(model.init, key, x)
    network = logah_network(SMALL, reach=64, **options)
    hyper = logah(spec, model_graph(model.apply, spec, x), network)

    def loss(w):
        logits = model.apply(hyper.apply(w), x)
        return jnp.square(logits).mean(), logits

    draw = np.random.default_rng(0).normal
    weights = jax.tree.map(lambda x: 0.2 * draw(size=(2, *x.shape)).astype(np.float32), jax.eval_shape(hyper.init, key))
    grads, logits = jax.jit(jax.vmap(jax.grad(loss, has_aux=True)))(weights)
    assert logits.shape == (2, 2, 10)
    assert bool(jnp.isfinite(logits).all())
    for path, g in trees.by_path(grads).items():
        assert bool(jnp.isfinite(g).all()), path
    assert {p.split("/")[0] for p, g in trees.by_path(grads).items() if float(jnp.abs(g).max()) > 0} == set(weights)


def test_tables_of_positions_follow_the_grid_of_patches(weights):
    spec = {"position": shape(1, 17, 6)}
    graph = model_graph(lambda p, x: x + p["position"], spec, jnp.ones((1, 17, 6)))
    made = predicted(NETWORK, weights, graph, spec)["position"][0]
    whole = plain(NETWORK, weights, jax.jit(NETWORK.encode)(weights, graph.arrays())[1], (1, 6, 4, 4), **RAW)
    np.testing.assert_allclose(made[1:], whole[0].reshape(6, 16).T, atol=1e-6)
    np.testing.assert_array_equal(made[0], made[-1])


def test_a_model_is_predicted_part_by_part_as_at_once(weights, close):
    spec, apply = perceptron(4, 8, 8, 8, 3)
    graph = model_graph(apply, spec, X)

    @jax.jit
    def both(w):
        x, whole = NETWORK.encode(w, graph), NETWORK.predict(w, graph, spec)
        return [NETWORK.decode(w, x, [s])[s.path, s.index] for s in graph.slots], whole

    parts, whole = both(weights)
    for slot, part in zip(graph.slots, parts):
        close(part, trees.by_path(whole)[slot.path])


def test_what_is_not_floating_point_is_kept_from_a_base(weights):
    spec = {"w": shape(4, 3), "calls": jax.ShapeDtypeStruct((), jnp.int32)}
    graph = model_graph(lambda p, x: x @ p["w"], spec, X)
    base = {"w": jnp.ones((4, 3)), "calls": jnp.array(7)}
    made = jax.jit(logah(spec, graph, NETWORK, base=base).factored)(weights)
    assert int(made["calls"]) == 7
    assert isinstance(made["w"], Factored)
    with pytest.raises(TargetError, match="'calls' is int32"):
        logah(spec, graph)


def test_one_network_learns_to_write_several_models(weights):
    """Two perceptrons for exclusive or, from one set of weights, trained through what it predicts."""
    x = jnp.array([[0.0, 0, 1, 1], [0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]])
    y = jnp.array([0.0, 1, 1, 0])
    targets = [perceptron(4, 8, 1), perceptron(4, 12, 1)]
    graphs = [model_graph(apply, spec, x) for spec, apply in targets]
    rule = optax.adam(1e-2)

    def loss(weights):
        each = [
            jnp.square(apply(NETWORK.predict(weights, graph, spec), x)[:, 0] - y).mean()
            for graph, (spec, apply) in zip(graphs, targets)
        ]
        return jnp.stack(each).max()

    def step(state, _):
        weights, moments = state
        value, grads = jax.value_and_grad(loss)(weights)
        updates, moments = rule.update(grads, moments)
        return (optax.apply_updates(weights, updates), moments), value

    _, losses = jax.jit(lambda w: jax.lax.scan(step, (w, rule.init(w)), None, 200))(weights)
    assert float(losses[-1]) < 0.05 < 0.2 < float(losses[0])


# ------------------------------------------------------------------------------------------------------- files, bad input


def test_saved_weights_come_back(tmp_path, weights):
    spec, apply = perceptron(4, 3)
    hyper = logah(spec, model_graph(apply, spec, X), NETWORK)
    back = load_hypernetwork(save_hypernetwork(tmp_path / "h", hyper, weights), hyper)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(weights), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_input_is_named(key):
    spec, apply = perceptron(4, 3)
    graph = model_graph(apply, spec, X)
    for options, message in (
        ({"size": "huge"}, "expected one of"),
        ({"size": (6, 1, 1, 1)}, "4 and the heads divide"),
        ({"decoder": "tiled"}, "'low_rank' or 'full'"),
        ({"vectors": "linear"}, "'low_rank' or 'mlp'"),
        ({"scaling": "fan_out"}, "'fan_in' or 'std'"),
        ({"decoder": "full"}, "set vectors='mlp'"),
        ({"reach": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            logah_network(**options)
    with pytest.raises(TargetError, match=r"'0/bias' is \[3\], the specification has \[5\]"):
        logah(perceptron(4, 5)[0], graph)
    with pytest.raises(TargetError, match="the graph lacks '0/bias'"):
        logah(spec, graph.arrays())
    low, full = logah_network(SMALL, reach=8), logah_network(SMALL, decoder="full", vectors="mlp", block=(6, 5))
    for network, remedy in ((low, "reach"), (full, "block")):
        with pytest.raises(TargetError, match=f"raise the network's {remedy}"):
            plain(network, jax.eval_shape(network.init, key), EMBEDDINGS[0], (4, 4, 9, 9))
