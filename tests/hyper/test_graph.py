"""Graphs from jaxprs: what becomes a node, which parameter it holds and how, and that a model's form does not matter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csgraph

from jaxpeft import trees
from jaxpeft.hyper.graph import OPS, model_graph, pad_graph
from jaxpeft.hyper.hypernetwork import TargetError
from jaxpeft.models.decoder import Decoder, DecoderConfig
from jaxpeft.models.vit import ImageClassifier, VisionConfig

SIZES = {"width": 16, "layers": 2, "heads": 2, "head_dim": 8, "mlp_width": 32, "pre_norm": True}
VIT = VisionConfig(**{**SIZES, "layers": 1}, image=(8, 8), patch=(2, 2), channels=1)
X = jnp.ones((2, 4))


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def of(model, **options):
    inputs = model.dummy_inputs()
    return model_graph(model.apply, jax.eval_shape(model.init, jax.random.key(0), *inputs), *inputs, **options)


def ops(graph):
    return [OPS[i] for i in graph.op]


def before(graph, node):
    return np.flatnonzero(graph.adjacency[:, node]).tolist()


def roles(graph):
    return {slot.path: slot.roles for slot in graph.slots}


# ------------------------------------------------------------------------------------------------------------ whole models


def test_a_vision_transformer_is_drawn_as_in_papers():
    block = [
        "norm", *["linear", "bias"] * 3, "product", "softmax", "product", "linear", "bias", "sum",
        "norm", "linear", "bias", "activation", "linear", "bias", "sum",
    ]  # fmt: skip
    graph = of(ImageClassifier(VIT, 10))
    start = ["input", "conv", "bias", "token", "concat", "position"]
    assert ops(graph) == [*start, *block, "norm", "linear", "bias"]
    by = {OPS[o]: tuple(s) for o, s in zip(graph.op, graph.shape)}
    assert by["conv"] == (16, 1, 2, 2)
    assert by["position"] == (17, 16, 1, 1)
    assert by["softmax"] == (0, 0, 0, 0)
    assert by["linear"] == (10, 16, 1, 1)
    norm = [s for s in graph.slots if "attention_norm" in s.path]
    assert len({s.node for s in norm}) == 1
    assert {s.path[-5:]: s.part for s in norm} == {"scale": 0, "/bias": 1}
    assert graph.slots[graph.parameter[norm[0].node]].path.endswith("scale")
    assert before(graph, 15 + 3) == [5, 17]  # the residual sum reads what the block got and what it made


@pytest.mark.parametrize("change", [{"scan": True}, {"plain": True}, {"remat": True}, {"scan": True, "remat": True}])
def test_the_graph_does_not_depend_on_how_layers_are_written(change):
    config = DecoderConfig(vocab=50, fused_qkv=True, activation="gelu_new", **SIZES)
    plain, other = of(Decoder(config)), of(Decoder(DecoderConfig(**{**vars(config), **change})))
    for a, b in zip(jax.tree.leaves(plain.arrays()), jax.tree.leaves(other.arrays())):
        if a is not plain.parameter:
            np.testing.assert_array_equal(a, b)
    if "scan" in change:
        layers = {(s.path, s.index): s for s in other.slots}
        for slot in plain.slots:
            number = [int(x[7:]) for x in slot.path.split("/") if x.startswith("layers_")]
            path = slot.path.replace(f"layers_{number[0]}", "layers") if number else slot.path
            assert layers[path, tuple(number)]._replace(path="", index=()) == slot._replace(path="")
    tied = np.flatnonzero(graph_of_word(plain))
    assert len(tied) == 2
    assert [OPS[plain.op[i]] for i in tied] == ["embedding", "linear"]
    assert [s.node for s in plain.slots if s.path.endswith("word/embedding")] == [tied[0]]


def graph_of_word(graph):
    return np.array([i >= 0 and graph.slots[i].path.endswith("word/embedding") for i in graph.parameter])


def test_llama_has_turned_queries_and_gates():
    config = DecoderConfig(vocab=50, family="llama", kv_heads=1, activation="silu", gated=True, norm="rms",
                           tied=False, **{**SIZES, "layers": 1})  # fmt: skip
    found = ops(of(Decoder(config)))
    assert found.count("rotary") == 2
    assert found.count("gate") == 1
    assert found.count("activation") == 1


def test_distances_are_those_of_shortest_paths_up_to_the_cutoff():
    graph = of(ImageClassifier(VIT, 10))
    np.testing.assert_array_equal(graph.distance, np.triu(graph.distance, 1))
    far = csgraph.shortest_path(graph.adjacency, unweighted=True)
    far = np.where(np.isfinite(far), far, 0)
    np.testing.assert_array_equal(graph.distance, far)
    np.testing.assert_array_equal(of(ImageClassifier(VIT, 10), cutoff=3).distance, np.where(far > 3, 0, far))


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 5))(x))
        x = nn.max_pool(nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False)(x)), (2, 2))
        return nn.Dense(3)(x.mean((1, 2)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def test_linen_nnx_and_plain_functions_are_read():
    x = jnp.ones((1, 8, 8, 2))
    spec = jax.eval_shape(Convolutions().init, jax.random.key(0), x)
    graph = model_graph(Convolutions().apply, spec, x)
    assert {"conv", "depthwise", "pool", "activation", "mean", "linear"} <= set(ops(graph))
    sizes = {s.path: s.sizes for s in graph.slots}
    assert sizes["params/Conv_0/kernel"] == (8, 2, 3, 5)
    assert sizes["params/Conv_1/kernel"] == (8, 1, 3, 3)
    assert {p for p, x in trees.by_path(spec).items()} == set(sizes)
    static, state = nnx.split(Nnx(nnx.Rngs(0)))
    graph = model_graph(lambda params, x: nnx.merge(static, params)(x), state, X)
    assert ops(graph) == ["input", "linear", "bias", "activation", "linear", "bias"]
    assert "calls" not in roles(graph)


# --------------------------------------------------------------------------------------------------------- single nodes


@given(st.lists(st.integers(2, 6), min_size=1, max_size=4), st.integers(0, 5))
def test_a_perceptron_has_three_nodes_a_layer(widths, more):
    spec = [{"kernel": shape(m, n), "bias": shape(n)} for m, n in zip([4, *widths], widths)]

    def apply(params, x):
        for layer in params:
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return x

    n = 1 + 3 * len(widths)
    graph = model_graph(apply, spec, X, nodes=n + more)
    assert ops(graph)[:n] == ["input", *["linear", "bias", "activation"] * len(widths)]
    assert graph.mask.sum() == n
    assert len(graph.mask) == n + more
    np.testing.assert_array_equal(graph.distance[0, :n], np.arange(n))
    assert [tuple(graph.shape[1 + 3 * i]) for i in range(len(widths))] == [
        (n, m, 1, 1) for m, n in zip([4, *widths], widths)
    ]


@pytest.mark.parametrize(
    ("apply", "sizes", "expected", "roles"),
    [
        (lambda p, x: x @ p, (4, 3), (3, 4, 1, 1), "io"),
        (lambda p, x: x @ p.T, (3, 4), (3, 4, 1, 1), "oi"),
        (lambda p, x: p @ x.T, (3, 4), (3, 4, 1, 1), "oi"),
        (lambda p, x: jnp.einsum("bd,dhk->bhk", x, p), (4, 3, 5), (15, 4, 1, 1), "ioo"),
        (lambda p, x: x @ p.reshape(4, 15), (4, 3, 5), (15, 4, 1, 1), "ioo"),
        (lambda p, x: x.reshape(2, 2, 2) @ p[None], (2, 7), (7, 2, 1, 1), "io"),
        (lambda p, x: x * p, (1, 4), (4, 1, 1, 1), ".o"),
        (lambda p, x: x + p, (2, 4), (1, 4, 1, 1), "ni"),
        (lambda p, x: jnp.concatenate([x, p]), (1, 4), (4, 1, 1, 1), ".o"),
        (lambda p, x: p[x.astype(int)], (9, 5), (9, 5, 1, 1), "oi"),
        (lambda p, x: x + p[jnp.arange(2)], (9, 4), (9, 4, 1, 1), "oi"),
        (lambda p, x: jnp.where(x > 0, p, x), (), (1, 1, 1, 1), ""),
    ],
)
def test_roles_of_axes_are_told_from_the_use(apply, sizes, expected, roles):
    (slot,) = model_graph(apply, shape(*sizes), X).slots
    assert (slot.sizes, slot.roles) == (expected, roles)


def test_parameters_that_meet_that_repeat_or_are_never_read():
    spec = {"w": shape(4, 3), "a": shape(4, 2), "b": shape(2, 3), "unread": shape(5)}
    graph = model_graph(lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), spec, X)
    assert sorted(ops(graph)) == ["input", "linear", "parameter", "parameter", "parameter"]
    (linear,) = np.flatnonzero(graph.op == OPS.index("linear"))
    assert len(before(graph, linear)) == 3
    (unread,) = (s.node for s in graph.slots if s.path == "unread")
    assert not graph.distance[unread].any()
    assert not graph.distance[:, unread].any()
    shared = model_graph(lambda p, x: x @ p @ p, shape(4, 4), X)
    assert ops(shared) == ["input", "linear", "linear"]
    assert len(shared.slots) == 1
    assert shared.slots[0].node == 1


def test_loops_without_parameters_of_their_own_are_one_step():
    def recurrent(p, x):
        return jax.lax.scan(lambda h, x: (jnp.tanh(h @ p + x), h), jnp.zeros(4), x)[0]

    loop = lambda p, x: jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p), x)
    ways = lambda p, x: jax.lax.cond(x.sum() > 0, lambda x: x @ p, lambda x: x, x)
    assert ops(model_graph(recurrent, shape(4, 4), X)).count("linear") <= 1
    assert ops(model_graph(loop, shape(4, 4), X)) == ["input", "linear", "activation"]
    assert ops(model_graph(ways, shape(4, 4), X))[-1] == "select"


def test_scans_over_parameters_nest_and_run_backwards():
    def apply(p, x):
        outer = lambda x, w: jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)
        return jax.lax.scan(outer, x, p, reverse=True)[0]

    graph = model_graph(apply, shape(2, 3, 4, 4), X)
    assert [s.index for s in sorted(graph.slots, key=lambda s: s.node)] == [(i, j) for i in (1, 0) for j in range(3)]
    assert all(s.shape == (4, 4) for s in graph.slots)


def test_what_leads_nowhere_is_left_out():
    def apply(p, x):
        jnp.tanh(x @ p["aside"]).sum()
        return x @ p["w"]

    graph = model_graph(apply, {"w": shape(4, 3), "aside": shape(4, 3)}, X)
    assert sorted(ops(graph)) == ["input", "linear", "linear"]


# -------------------------------------------------------------------------------------------------- the form, bad input


def test_padded_graphs_stack_and_go_through_jit(counted):
    spec = lambda n: {"w": shape(4, n), "b": shape(n)}
    apply = lambda p, x: x @ p["w"] + p["b"]
    graphs = [model_graph(apply, spec(n), X, nodes=5) for n in (3, 6)]
    stack = trees.stack([g.arrays() for g in graphs])
    assert stack.distance.shape == (2, 5, 5)
    np.testing.assert_array_equal(stack.shape[:, 1, 0], [3, 6])
    once = counted(lambda g: g.mask.sum())
    count = jax.jit(once)
    assert [int(count(g.arrays())) for g in graphs] == [3, 3]
    assert len(once.traces) == 1
    np.testing.assert_array_equal(pad_graph(model_graph(apply, spec(3), X), 5).distance, graphs[0].distance)


def test_an_unknown_operation_is_named_or_other():
    apply = lambda p, x: jnp.linalg.cholesky(x @ p)
    spec, x = shape(4, 4), jnp.eye(4)
    with pytest.raises(TargetError, match=r"'cholesky' is not in the vocabulary.*unknown='other'"):
        model_graph(apply, spec, x)
    assert "other" in ops(model_graph(apply, spec, x, unknown="other"))


def test_bad_input_is_named():
    apply = lambda p, x: x @ p
    with pytest.raises(TargetError, match="no leaf of the specification is floating"):
        model_graph(apply, jax.ShapeDtypeStruct((4, 3), jnp.int32), X)
    with pytest.raises(TargetError, match="2 nodes does not fit 1"):
        model_graph(apply, shape(4, 3), X, nodes=1)
    with pytest.raises(ValueError, match="at least 1, and 'refuse' or 'other'"):
        model_graph(apply, shape(4, 3), X, cutoff=0)
    with pytest.raises(ValueError, match="unknown 'ignore'"):
        model_graph(apply, shape(4, 3), X, unknown="ignore")  # type: ignore[arg-type]
