"""Polyhistor and Polyhistor-Lite: the card's oracles on a small hierarchical transformer."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpeft import adapt, bake, hyperformer, polyhistor, polyhistor_lite, trees
from jaxpeft.adapt.polyhistor import decomposed, decomposed_start, generate, generate_lite
from jaxpeft.hyper import head
from jaxpeft.models import SequenceClassifier, stack_layers
from jaxpeft.models.encoder import EncoderConfig
from jaxpeft.models.hierarchical import HierarchicalClassifier, HierarchicalConfig
from jaxpeft.weights.factored import Factored
from jaxpeft.weights.kronecker import kronecker_dense, kronecker_matvec

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "polyhistor" / "golden.safetensors")
# Widths 32, 64, 128: in the last stage matrices of rank 2 are not formed, in the first ones they are.
CONFIG = HierarchicalConfig(
    width=32, depths=(1, 1, 1), heads=(1, 1, 1), window=2, mlp_ratio=1, image=(4, 4), patch=(1, 1), plain=True
)
MODEL = HierarchicalClassifier(CONFIG, 3)
WIDTHS = (32, 64, 128)
X = np.random.default_rng(0).normal(size=(3, 4, 4, 1)).astype(np.float32)
T, K, R, RHO = 3, 5, 2, 4
SIZES = dict(rank=R, tasks=T, embedding=K, reduction=RHO)
FEW = dict(SIZES, at="**/attention")  # where one kind of module shows it: there are many programs here
BOTH = {"full": polyhistor, "lite": polyhistor_lite}
GENERATE = {"full": generate, "lite": generate_lite}


@pytest.fixture(scope="module")
def params():
    return moved(jax.jit(MODEL.init)(jax.random.key(0), X), by=0.1)


def moved(tree, seed=1, by=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + by * jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def started(params, method, model=MODEL, inputs=(X,)):
    adapted = adapt(model.apply, method, on_dense="refuse")
    return adapted, jax.jit(adapted.init)(jax.random.key(2), params, *inputs)


def matrix(pair, v):
    return jnp.matmul(*decomposed(pair, v))


def test_a_head_is_that_of_the_reference(close):
    get = lambda n: jnp.asarray(GOLDEN[f"head.parameters.{n}"])
    z = jnp.asarray(GOLDEN["head.input"])
    weight = {
        "weight": get("weight_generator.0.weight").T.reshape(5, 4, 8),
        "bias": get("weight_generator.0.bias").reshape(4, 8),
    }
    close(head(weight, z), jnp.asarray(GOLDEN["head.weight"]))
    bias = {"weight": get("bias_generator.0.weight").T, "bias": get("bias_generator.0.bias")}
    close(head(bias, z), jnp.asarray(GOLDEN["head.bias"]))


def test_decomposed_heads_make_matrices_of_their_rank_and_at_full_rank_any(key, close):
    v = jax.random.normal(key, (K,))
    pair = decomposed_start(key, K, (8, 6), R)
    assert np.linalg.matrix_rank(matrix(pair, v), tol=1e-5) <= R
    want = jax.random.normal(key, (8, 6))
    whole = jax.tree.map(jnp.zeros_like, decomposed_start(key, K, (8, 6), 6))
    whole["a"]["bias"], whole["b"]["bias"] = want, jnp.eye(6)
    close(matrix(whole, v), want)


def test_linear_heads_are_bilinear_in_the_embedding(key, close):
    v = jax.random.normal(key, (K,))
    pair = decomposed_start(key, K, (8, 6), R, bias=False)
    close(matrix(pair, 3 * v), 9 * matrix(pair, v))
    assert trees.count(pair) == K * R * (8 + 6)
    assert trees.count(decomposed_start(key, K, (8, 6), R)) == (K + 1) * R * (8 + 6)


def test_the_starts_sizes_are_those_that_are_said(key):
    pair = decomposed_start(key, 64, (256, 128), 8)
    v = jax.random.normal(key, (64,))
    a, b = decomposed(pair, v)
    assert float(a.std()) == pytest.approx(1 / 16, rel=0.2)
    assert float(b.std()) == pytest.approx(8**-0.5, rel=0.2)
    assert (decomposed(decomposed_start(key, 64, (8, 8), 2, zero=True), v)[1] == 0).all()


@pytest.mark.parametrize("name", BOTH)
def test_it_starts_as_its_base_and_every_tasks_loss_moves_it(params, name, close):
    adapted, delta = started(params, BOTH[name](**FEW))
    base = jax.jit(MODEL.apply)(params, X)
    run = jax.jit(lambda d, t: adapted.apply(params, d, X, task=t))
    for t in range(T):
        close(run(delta, t), base)
    grads = jax.jit(jax.grad(lambda d: jnp.sum(jnp.sin(adapted.apply(params, d, X, task=1)))))(delta)
    moving = trees.by_path(grads)
    assert all(float(jnp.abs(g).max()) > 0 for p, g in moving.items() if p.startswith("heads") and "/up/b/weight" in p)


def test_parameters_are_counted_as_the_paper_counts_them(params):
    plain = dict(SIZES, head_bias=False, biases=False)
    pairs = [(d // RHO, d) for d in WIDTHS]
    embeddings, sites = T * K, 2
    init = lambda method: jax.eval_shape(adapt(MODEL.apply, method).init, jax.random.key(0), params, X)
    count = lambda method: trees.count(trees.learned(init(method))[0])
    assert count(polyhistor(**plain)) == embeddings + sites * sum(2 * K * R * (n + d) for n, d in pairs)
    n0, d0 = pairs[0]
    kernels = sites * sum(2 * (d // d0) ** 2 for d in WIDTHS)
    assert count(polyhistor_lite(**plain)) == embeddings + sites * 2 * K * R * (n0 + d0) + kernels
    assert count(polyhistor_lite(**plain, kernels="task")) == count(polyhistor_lite(**plain)) + (T - 1) * kernels
    assert count(polyhistor_lite(**plain, kernels="fixed")) == count(polyhistor_lite(**plain)) - kernels
    whole = dict(SIZES)
    own = sites * T * sum(n + d for n, d in pairs)
    heads = sites * sum(2 * (K + 1) * R * (n + d) for n, d in pairs)
    assert count(polyhistor(**whole)) == embeddings + heads + own


def test_lites_matrices_are_templates_times_kernels(params, close):
    adapted, delta = started(params, polyhistor_lite(**SIZES))
    delta = moved(delta)
    _, own = bake(adapted.method, delta, 2)
    v = delta["task"][2]
    for b, s in enumerate((1, 2, 4)):
        for part in ("attention", "mlp/down"):
            place = f"params/backbone/stages_{b}/layers_0/{part}"
            for side in ("down", "up"):
                t = matrix(delta["heads"]["params/backbone"][part][side], v)
                kernel = delta["kernels"][place][side]
                assert kernel.shape == (s, s)
                close(own[place][side], jnp.kron(t, kernel))
                close(own[place][side], kronecker_dense(t, kernel))
            close(own[place]["up_bias"], delta["biases"][place]["up_bias"][2])
    h = np.random.default_rng(3).normal(size=(6, 128)).astype(np.float32)
    place = "params/backbone/stages_2/layers_0/attention"
    t = matrix(delta["heads"]["params/backbone"]["attention"]["down"], v)
    close(kronecker_matvec(t.T, delta["kernels"][place]["down"].T, h), h @ own[place]["down"])


@pytest.mark.parametrize("kernels", ["task", "fixed"])
def test_kernels_are_each_tasks_or_none(params, kernels, close):
    adapted, delta = started(params, polyhistor_lite(**FEW, kernels=kernels))
    yes, no = trees.learned(delta)
    delta = trees.combine(moved(yes), no)
    place = "params/backbone/stages_1/layers_0/attention"
    t = matrix(delta["heads"]["params/backbone"]["attention"]["up"], delta["task"][1])
    held = trees.unmark(delta["kernels"])[place]["up"]
    s = held[1] if kernels == "task" else jnp.full((2, 2), 0.5)
    close(bake(adapted.method, delta, 1)[1][place]["up"], jnp.kron(t, s))
    assert ("kernels" in {p.split("/")[0] for p in trees.by_path(yes)}) == (kernels == "task")


@pytest.mark.parametrize("name", BOTH)
def test_what_is_not_formed_answers_as_what_is_and_takes_fewer_operations(params, name, close, monkeypatch):
    adapted, delta = started(params, BOTH[name](**FEW))
    delta = moved(delta)
    method, own = bake(adapted.method, delta, 1)
    plain = adapt(MODEL.apply, method)
    assert {type(x) for x in jax.tree.leaves(own)} == {type(jnp.ones(1))}
    loss = lambda adapted, **k: lambda d: jnp.sum(jnp.sin(adapted.apply(params, d, X, **k)))
    run = lambda adapted, d, **k: jax.jit(loss(adapted, **k)).lower(d).compile()
    lazy = run(adapted, delta, task=1)
    close(lazy(delta), run(plain, own)(own))
    made = GENERATE[name](delta, 1)
    widest, narrowest = (made[f"params/backbone/stages_{b}/layers_0/attention"] for b in (2, 0))
    assert all(isinstance(widest[side], Factored) for side in ("down", "up"))
    assert not any(isinstance(x, Factored) for x in narrowest.values())
    monkeypatch.setattr(sys.modules[polyhistor.__module__], "lazily", lambda w: w.dense())
    formed = run(adapted, delta, task=1)
    assert lazy.cost_analysis()["flops"] < formed.cost_analysis()["flops"]


def test_equal_embeddings_make_equal_adapters_and_rows_have_their_own(params, close):
    for factory in BOTH.values():
        adapted, delta = started(params, factory(**FEW, biases=False))
        delta = moved(delta)
        delta = {**delta, "task": delta["task"].at[2].set(delta["task"][0])}
        baked = jax.jit(lambda t, a=adapted, d=delta: bake(a.method, d, t)[1])
        made = [baked(jnp.int32(t)) for t in range(T)]
        assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), made[0], made[2]))
        tasks = np.array([1, 0, 2])
        run = jax.jit(lambda t, a=adapted, d=delta: a.apply(params, d, X, task=t))
        alone = [run(jnp.int32(t)) for t in range(T)]
        assert not np.allclose(alone[0], alone[1])
        close(run(jnp.asarray(tasks)), jnp.stack([alone[t][i] for i, t in enumerate(tasks)]))


@pytest.mark.parametrize("name", BOTH)
def test_unformed_matrices_go_through_scan_remat_and_strict_promotion(name, close):
    config = EncoderConfig(
        vocab=20, width=128, layers=2, heads=2, head_dim=4, mlp_width=16, max_positions=24, init_std=0.1, plain=True
    )
    ids, mask = np.ones((2, 4), np.int32), np.ones((2, 4), np.int32)
    model = SequenceClassifier(config, 3)
    params = jax.jit(model.init)(jax.random.key(0), ids, mask)
    # A rank of 1 at reduction 4 takes 25 times fewer operations, Lite's template alike (s = 1).
    method = BOTH[name](1, embedding=K, at="**/attention")
    adapted, delta = started(params, method, model, (ids, mask))
    delta = moved(delta)
    scanned = SequenceClassifier(EncoderConfig(**{**config.__dict__, "scan": True, "remat": True}), 3)
    stacked = stack_layers(params)
    both, shapes = started(stacked, method, scanned, (ids, mask))
    flat = trees.by_path(delta)
    pick = lambda p, i: flat[p.replace("/layers/", f"/layers_{i}/")]
    joined = {p: flat[p] if p in flat else jnp.stack([pick(p, 0), pick(p, 1)]) for p in trees.by_path(shapes)}
    together = trees.replace_leaves(shapes, joined)
    made = GENERATE[name](together, 0)["params/backbone/layers/attention"]
    assert isinstance(made["down"], Factored)
    assert made["down"].shape == (2, 128, 32)
    with jax.numpy_dtype_promotion("strict"):
        run = lambda a, p: jax.jit(jax.value_and_grad(lambda d: jnp.sum(jnp.sin(a.apply(p, d, ids, mask)))))
        value, grads = run(adapted, params)(delta)
        same, own = run(both, stacked)(together)
    close(value, same)
    close(grads["task"], own["task"], atol=1e-4)


def test_it_has_a_small_part_of_hyperformers_parameters(params):
    count = lambda method: trees.count(jax.eval_shape(adapt(MODEL.apply, method).init, jax.random.key(0), params, X))
    whole = count(hyperformer(tasks=4, embedding=32, projected=32, hidden=32, reduction=4))
    assert count(polyhistor(2, 4, embedding=32)) < 0.15 * whole
    assert count(polyhistor_lite(2, 4, embedding=32)) < 0.02 * whole


def test_what_does_not_fit_is_refused(params):
    for factory in BOTH.values():
        for wrong, words in (
            (dict(rank=0), "rank 0"),
            (dict(embedding=0), "embedding 0"),
            (dict(reduction=0), "reduction 0"),
            (dict(tasks=0), "tasks 0"),
            (dict(activation="swish"), "swish"),
        ):
            with pytest.raises(ValueError, match=words):
                factory(**wrong)
        with pytest.raises(ValueError, match="reduction 33 leaves nothing of a width of 32"):
            started(params, factory(reduction=33))
    with pytest.raises(ValueError, match="kernels 'none'"):
        polyhistor_lite(kernels="none")
    with pytest.raises(ValueError, match="has width 64 and bottleneck 21, the narrowest of its tower 32 and 10"):
        started(params, polyhistor_lite(reduction=3))
