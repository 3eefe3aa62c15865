"""Compacter: PHM layers against their definition, the reference code, and what they cost."""

import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpeft import adapt, bake, compacter, trees
from jaxpeft.adapt.compacter import phm, phm_linear, phm_parameters, phm_start
from jaxpeft.models import SequenceClassifier, stack_layers
from jaxpeft.models.encoder import EncoderConfig
from jaxpeft.weights.kronecker import lazily

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "vl-adapter" / "golden.safetensors")
# Wide enough that factors of rank 1 are not multiplied out (a saving of 8 times and more).
CONFIG = EncoderConfig(
    vocab=20, width=64, layers=2, heads=2, head_dim=4, mlp_width=16, max_positions=24, init_std=0.1, plain=True
)
IDS = np.random.default_rng(0).integers(2, 20, (4, 5)).astype(np.int32)
MASK = np.ones((4, 5), np.int32)
MODEL = SequenceClassifier(CONFIG, 3)
T = 2
NAMES = {"phm_rule": "rule", "W": "blocks", "W_left": "left", "W_right": "right", "b": "bias"}


class Nothing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Nothing(name="attention")(x)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), IDS, MASK)


def moved(delta, seed=1, by=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + by * jnp.asarray(rng.normal(size=x.shape), x.dtype), delta)


def started(params, method, model=MODEL):
    adapted = adapt(model.apply, method, on_dense="refuse")
    return adapted, jax.jit(adapted.init)(jax.random.key(2), params, IDS, MASK)


def layer(key, i, o, n, k=0):
    p = phm_start(key, (i, o), n, k, 1.0)
    return {**p, "bias": jax.random.normal(key, (o,))}


@pytest.mark.parametrize("case", ["n2", "n4", "n2_rank1", "n4_rank2"])
def test_a_layer_is_that_of_the_reference(case, close):
    start = f"phm.{case}.parameters."
    p = {NAMES[k.removeprefix(start)]: jnp.asarray(v) for k, v in GOLDEN.items() if k.startswith(start)}
    x, want = jnp.asarray(GOLDEN["phm.input"]), jnp.asarray(GOLDEN[f"phm.{case}.output"])
    close(phm_linear(p, x), want)
    close(x @ phm(p).dense() + p["bias"][None], want)


@pytest.mark.parametrize(
    ("case", "options"),
    [("multiple", dict(share="multiple")), ("tasks_rule", dict(share="multiple", rule="tasks", factors=1))],
)
def test_an_adapter_is_that_of_the_reference(case, options, close):
    start = f"compacter.{case}.parameters.adapters."
    held = {k.removeprefix(start): v for k, v in GOLDEN.items() if k.startswith(start)}
    u = jnp.asarray(GOLDEN["adapter.input"])
    adapted = adapt(Net().apply, compacter(4, 2, tasks=2, at="attention", **options))
    ((place, shapes),) = jax.eval_shape(adapted.init, jax.random.key(0), {}, u)["sites"].items()

    def own(name, s):
        side, _, kind = name.partition("_")
        theirs = {v: k for k, v in NAMES.items()}[kind]
        a = held[f"a.{side}_sampler.{theirs}"]
        return jnp.asarray(np.stack([a, held[f"b.{side}_sampler.{theirs}"]]) if s.ndim > a.ndim else a)

    delta = {"sites": {place: {name: own(name, s) for name, s in shapes.items()}}}
    assert jax.tree.map(jnp.shape, delta["sites"][place]) == {n: s.shape for n, s in shapes.items()}
    for t, name in enumerate("ab"):
        close(adapted.apply({}, delta, u, task=t), jnp.asarray(GOLDEN[f"compacter.{case}.output.{name}"]))


@pytest.mark.parametrize(("n", "k"), [(1, 0), (2, 0), (4, 0), (2, 1), (4, 3)])
def test_the_factored_product_is_that_of_the_sum_of_kronecker_products(n, k, key, close):
    p = layer(key, 8, 12, n, k)
    blocks = p["blocks"] if "blocks" in p else p["left"] @ p["right"]
    dense = sum(jnp.kron(p["rule"][i], blocks[i]) for i in range(n))
    x = jax.random.normal(key, (3, 5, 8))
    close(phm(p).dense(), dense)
    close(phm_linear(p, x), x @ dense + p["bias"][None, None])
    assert trees.count(p) == phm_parameters(8, 12, n, k)
    assert phm_parameters(8, 12, n, k) == n**3 + (k * (8 + 12) if k else 8 * 12 // n) + 12
    if k:
        assert np.linalg.matrix_rank(dense, tol=1e-4) <= n**2 * k


def test_one_division_is_a_linear_map_times_a_number(key, close):
    p = layer(key, 8, 4, 1)
    x = jax.random.normal(key, (3, 8))
    close(phm_linear(p, x), p["rule"][0, 0, 0] * (x @ p["blocks"][0]) + p["bias"][None])


def test_hamiltons_table_gives_hamiltons_product(key, close):
    # unit i times unit a is sign * unit c
    table = np.zeros((4, 4, 4), np.float32)
    for i, row in enumerate([[(0, 1), (1, 1), (2, 1), (3, 1)], [(1, 1), (0, -1), (3, 1), (2, -1)],
                             [(2, 1), (3, -1), (0, -1), (1, 1)], [(3, 1), (2, 1), (1, -1), (0, -1)]]):  # fmt: skip
        for a, (c, sign) in enumerate(row):
            table[i, a, c] = sign
    q, x = jax.random.normal(key, (2, 4))
    got = phm_linear({"rule": jnp.asarray(table), "blocks": q[:, None, None]}, x)
    (w, u), (v, z) = ((x[0], x[1:]) for x in (q, x))
    close(got, jnp.concatenate([(w * v - u @ z)[None], w * z + v * u + jnp.cross(u, z)]))


def test_the_start_is_the_references(key):
    p = phm_start(key, (64, 32), 4, 2, 0.01)
    assert float(p["rule"].std()) == pytest.approx(0.01, rel=0.3)
    for name, size in (("left", 16 + 2), ("right", 2 + 8)):
        bound = math.sqrt(2) * math.sqrt(6 / size)
        assert 0.9 * bound < float(jnp.abs(p[name]).max()) <= bound
    blocks = phm_start(key, (64, 32), 4, 0, 0.01)["blocks"]
    assert 0.95 * math.sqrt(12 / 24) < float(jnp.abs(blocks).max()) <= math.sqrt(12 / 24)


def test_whose_the_rule_is_says_how_many_there_are(params):
    n, sites = 2, 4
    count = lambda **options: trees.count(started(params, compacter(8, n, tasks=T, **options))[1])
    layer = compacter(8, n, tasks=T, share="multiple")
    _, delta = started(params, layer)
    blocks = 2 * T * sites * 64 * 8 // n + T * sites * (64 + 8)
    assert trees.count(delta) == blocks + 2 * T * sites * n**3
    assert count(share="multiple", rule="tasks") == blocks + 2 * sites * n**3
    assert count(share="multiple", rule="model") == blocks + n**3
    assert count(share="single") == (blocks + 2 * T * sites * n**3) // T
    half = started(params, compacter(8, n, tasks=T, share="half_down"))[1]["sites"]
    assert {d["up_rule"].shape for d in half.values()} == {(T, n, n, n)}
    assert {d["down_rule"].shape for d in half.values()} == {(n, n, n)}


def test_factors_of_rank_one_are_not_multiplied_out_and_answer_alike(params, close):
    adapted, delta = started(params, compacter(32, 2, 1, tasks=T, share="multiple", rule="model"))
    delta = moved(delta)
    named = next(iter(delta["sites"].values()))
    weight = phm({"rule": delta["rule"], "left": named["down_left"][0], "right": named["down_right"][0]})
    assert lazily(weight) is weight
    method, own = bake(adapted.method, delta, 1)
    assert next(iter(own.values()))["down"].shape == (64, 32)
    plain = adapt(MODEL.apply, method)
    close(adapted.apply(params, delta, IDS, MASK, task=1), plain.apply(params, own, IDS, MASK))
    tasks = jnp.array([1, 0, 0, 1])
    mixed = adapted.apply(params, delta, IDS, MASK, task=tasks)
    alone = [adapted.apply(params, delta, IDS, MASK, task=t) for t in range(T)]
    close(mixed, jnp.stack([alone[t][i] for i, t in enumerate(tasks.tolist())]))
    flops = lambda a, d, **k: (
        jax.jit(lambda p, d: a.apply(p, d, IDS, MASK, **k)).lower(params, d).compile().cost_analysis()["flops"]
    )
    rows = IDS.size * 2 * 2 * 2  # sites, matrices, layers
    saved = flops(plain, own) - flops(adapted, delta, task=1)
    assert saved > 0.8 * 2 * rows * 64 * 32


def test_factored_weights_go_through_scan_remat_and_strict_promotion(params, close):
    method = compacter(32, 2, 1, rule="model")
    adapted, delta = started(params, method)
    delta = moved(delta)
    loss = lambda adapted, params: lambda d: jnp.sum(jnp.sin(adapted.apply(params, d, IDS, MASK)))
    want, grads = jax.jit(jax.value_and_grad(loss(adapted, params)))(delta)
    scanned = SequenceClassifier(EncoderConfig(**{**CONFIG.__dict__, "scan": True, "remat": True}), 3)
    stacked = stack_layers(params)
    both, shapes = started(stacked, method, scanned)
    own = {p.replace("layers_0", "layers"): p for p in delta["sites"] if "layers_0" in p}
    join = lambda tree: {
        new: jax.tree.map(lambda *x: jnp.stack(x), *(tree[p.replace("layers_0", f"layers_{i}")] for i in range(2)))
        for new, p in own.items()
    }
    assert set(own) == set(shapes["sites"])
    with jax.numpy_dtype_promotion("strict"):
        got, new = jax.jit(jax.value_and_grad(loss(both, stacked)))({**delta, "sites": join(delta["sites"])})
    close(got, want)
    close(new, {**grads, "sites": join(grads["sites"])}, atol=1e-4)


def test_half_precision_states_form_nothing(params):
    half = SequenceClassifier(EncoderConfig(**{**CONFIG.__dict__, "dtype": jnp.bfloat16}), 3)
    adapted, delta = started(params, compacter(32, 2, 1, rule="model"), half)
    with jax.numpy_dtype_promotion("strict"):
        y = jax.eval_shape(adapted.apply, params, delta, IDS, MASK)
    assert y.dtype == jnp.bfloat16


def test_what_has_no_meaning_is_refused(params):
    for wrong, words in (
        (dict(division=0), "division 0"),
        (dict(factors=-1), "factors -1"),
        (dict(rule="none"), "rule 'none'"),
        (dict(share="all"), "share 'all'"),
        (dict(tasks=0), "tasks 0"),
    ):
        with pytest.raises(ValueError, match=words):
            compacter(**wrong)
    with pytest.raises(ValueError, match="division 3 does not divide a map from 64 to 8: take a divisor of 8"):
        started(params, compacter(division=3))
