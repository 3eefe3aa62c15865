"""Hyperformer: the reference code's numbers, what is shared by what, and how modules are told apart by their names."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpeft import adapt, bake, hyperformer, trees
from jaxpeft.adapt.hyperformer import generate
from jaxpeft.adapt.vl_adapter import adapters
from jaxpeft.hyper import places
from jaxpeft.models import EncoderDecoder, EncoderDecoderConfig, SequenceClassifier
from jaxpeft.models.encoder import EncoderConfig
from jaxpeft.models.hierarchical import HierarchicalConfig, HierarchicalTransformer

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "vl-adapter" / "golden.safetensors")
CONFIG = EncoderConfig(
    vocab=20, width=8, layers=2, heads=2, head_dim=4, mlp_width=16, max_positions=24, init_std=0.3, plain=True
)
IDS = np.random.default_rng(0).integers(2, 20, (4, 5)).astype(np.int32)
MASK = np.ones((4, 5), np.int32)
MODEL = SequenceClassifier(CONFIG, 3)
T, RANK = 3, 2
SMALL = dict(embedding=6, hidden=7, projected=5)
SITES = {"self_attention": "attention", "cross_attention": "cross_attention", "feed_forward": "mlp/down"}


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


@pytest.fixture(scope="module")
def seq2seq():
    config = EncoderDecoderConfig(
        vocab=20, width=8, layers=2, decoder_layers=2, heads=2, head_dim=4, mlp_width=16, activation="relu"
    )
    model = EncoderDecoder(config)
    return model, jax.eval_shape(model.init, jax.random.key(0), IDS, IDS)


def moved(delta, seed=1, by=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + by * jnp.asarray(rng.normal(size=x.shape), x.dtype), delta)


def started(params, method):
    adapted = adapt(MODEL.apply, method, on_dense="refuse")
    return adapted, moved(jax.jit(adapted.init)(jax.random.key(2), params, IDS, MASK))


def recorded(case, *, efficient=False, norms=False):
    """The reference's parameters as our delta of two unrolled layers of a decoder."""
    held = {k.removeprefix(f"hyperformer.{case}."): jnp.asarray(v) for k, v in GOLDEN.items()}
    own = lambda name: held[f"parameters.{name}"]

    def head(name, part, matrix):
        w, b = own(f"{name}.{part}.weight"), own(f"{name}.{part}.bias")
        if not matrix:
            return {"weight": w.T, "bias": b}
        rows, columns = (4, 8) if "down" in name else (8, 4)  # torch's (out, in)
        return {"weight": w.T.reshape(5, rows, columns).swapaxes(1, 2), "bias": b.reshape(rows, columns).T}

    def heads(prefix):
        out = {}
        for side in ("down", "up"):
            name = f"{prefix}{side}_sampler_hyper_net"
            out[side] = head(name, "weight_generator.0", True)
            out[f"{side}_bias"] = head(name, "bias_generator.0", False)
        if norms:
            name = f"{prefix}pre_layernorm_hypernet"
            out |= {
                f"norm_{n}": head(name, f"{w}_generator", False) for n, w in (("scale", "weight"), ("bias", "bias"))
            }
        return out

    base, trunk = "decoder/layers", "task_hypernet.task_embeding_generator"
    has = lambda t: f"parameters.{t}_down_sampler_hyper_net.weight_generator.0.weight" in held
    sites = {t: ours for t, ours in SITES.items() if efficient or has(t)}
    delta = {
        "task": jnp.stack([held[f"tasks.parameters.task_to_embeddings.{t}"] for t in "ab"]),
        "layer": {f"{base}_{i}": {"embedding": own("layer_id_embeddings.weight")[i]} for i in range(2)},
        "trunk": {
            "decoder": {
                "w1": own(f"{trunk}.0.weight").T,
                "b1": own(f"{trunk}.0.bias"),
                "w2": own(f"{trunk}.2.weight").T,
                "b2": own(f"{trunk}.2.bias"),
                "norm_scale": own("LayerNorm.weight"),
                "norm_bias": own("LayerNorm.bias"),
            }
        },
        "heads": {base: heads("") if efficient else {ours: heads(f"{t}_") for t, ours in sites.items()}},
    }
    if efficient:
        kinds = {"feed_forward": 0, "self_attention": 1, "cross_attention": 2}
        delta["part"] = {
            base: {SITES[t]: {"embedding": own("adapters_block_type.weight")[i]} for t, i in kinds.items()}
        }
    return delta, sites


@pytest.mark.parametrize(
    ("case", "options"),
    [("encoder", {}), ("decoder", {}), ("norms", {"norms": True}), ("efficient", {"efficient": True})],
)
def test_generated_adapters_and_their_output_are_the_references(case, options, close):
    delta, sites = recorded(case, **options)
    u, efficient = jnp.asarray(GOLDEN["adapter.input"]), "efficient" in options
    plain = adapt(Net().apply, adapters(4, 2, "attention", norm="in" if "norms" in options else "none", name="plain"))
    checked = 0
    for t, task in enumerate("ab"):
        made = generate(delta, t, efficient=efficient)
        for layer in range(2):
            for theirs, ours in sites.items():
                own = made[f"decoder/layers_{layer}/{ours}"]
                start = f"hyperformer.{case}.made.{task}.{layer}.{theirs}"
                for side in ("down", "up"):
                    close(own[side], jnp.asarray(GOLDEN[f"{start}.{side}.weight"]).T)
                    close(own[f"{side}_bias"], jnp.asarray(GOLDEN[f"{start}.{side}.bias"]))
                got = plain.apply({}, {"params/attention": own}, u)
                close(got, jnp.asarray(GOLDEN[f"hyperformer.{case}.output.{task}.{layer}.{theirs}"]))
                checked += 1
    assert checked == 4 * len(sites)


def test_equal_embeddings_make_equal_adapters(params):
    _, delta = started(params, hyperformer(RANK, T, **SMALL))
    twins = {**delta, "task": delta["task"].at[2].set(delta["task"][0])}
    made = [generate(twins, t) for t in range(T)]
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), made[0], made[2]))
    assert not np.allclose(*(m["params/backbone/layers_0/attention"]["down"] for m in made[:2]))
    one, other = (made[0][f"params/backbone/layers_{i}/attention"]["down"] for i in range(2))
    assert not np.allclose(one, other)


@pytest.mark.parametrize("efficient", [False, True])
def test_baked_adapters_give_the_same_numbers_and_rows_their_own_tasks(params, efficient, close):
    adapted, delta = started(params, hyperformer(RANK, T, efficient=efficient, **SMALL))
    method, own = bake(adapted.method, delta, 2)
    baked = adapt(MODEL.apply, method).apply(params, own, IDS, MASK)
    # Operation by operation, so that no compiler may sum in another order: to the last bit.
    np.testing.assert_array_equal(baked, adapted.apply(params, delta, IDS, MASK, task=2))
    tasks = np.array([2, 0, 1, 2])
    run = jax.jit(lambda t: adapted.apply(params, delta, IDS, MASK, task=t))
    alone = [run(jnp.int32(t)) for t in range(T)]
    close(alone[2], baked)
    close(run(jnp.asarray(tasks)), jnp.stack([alone[t][i] for i, t in enumerate(tasks)]))


def test_it_has_as_many_parameters_as_its_formula(params):
    e, h, p, d, r, layers, sites = 6, 7, 5, 8, RANK, 2, 2
    one_head = (p + 1) * (2 * r * d + r + d)
    trunk = lambda inputs: inputs * e * h + h + h * p + p + 2 * p
    count = lambda **options: trees.count(started(params, hyperformer(RANK, T, **SMALL, **options))[1])
    assert count() == T * e + layers * e + trunk(2) + sites * one_head
    assert count(efficient=True) == T * e + layers * e + sites * e + trunk(3) + one_head


def test_towers_share_the_tasks_embeddings_alone(seq2seq):
    model, shapes = seq2seq
    adapted = adapt(model.apply, hyperformer(RANK, T, **SMALL))
    delta = jax.eval_shape(adapted.init, jax.random.key(0), shapes, IDS, IDS)
    assert delta["task"].shape == (T, 6)
    assert set(delta["trunk"]) == {"params/encoder", "params/decoder"}
    assert {b: set(h) for b, h in delta["heads"].items()} == {
        "params/encoder/layers": {"attention", "mlp/down"},
        "params/decoder/layers": {"attention", "cross_attention", "mlp/down"},
    }
    assert len(delta["layer"]) == 4
    assert len(jax.eval_shape(lambda d: bake(adapted.method, d, 0)[1], delta)) == 2 * 2 + 2 * 3


def test_stages_of_other_widths_have_heads_of_their_own_and_one_trunk():
    config = HierarchicalConfig(width=8, depths=(2, 1), heads=(2, 2), window=2, image=(8, 8))
    model, x = HierarchicalTransformer(config), jnp.zeros((1, 8, 8, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    init = lambda **options: jax.eval_shape(
        adapt(model.apply, hyperformer(tasks=T, reduction=4, **SMALL, **options)).init, jax.random.key(0), shapes, x
    )
    delta = init()
    assert set(delta["trunk"]) == {"params"}
    assert set(delta["layer"]) == {"params/stages_0/layers_0", "params/stages_0/layers_1", "params/stages_1/layers_0"}
    sizes = {b: h["attention"]["down"]["bias"].shape for b, h in delta["heads"].items()}
    assert sizes == {"params/stages_0/layers": (8, 2), "params/stages_1/layers": (16, 4)}
    assert set(init(efficient=True)["heads"]) == set(sizes)


@pytest.mark.parametrize(
    ("paths", "layer", "part", "base", "tower"),
    [
        (
            ["params/decoder/layers_3/mlp/down"],
            "params/decoder/layers_3",
            "mlp/down",
            "params/decoder/layers",
            "params/decoder",
        ),
        (["params/layers/attention"], "params/layers", "attention", "params/layers", "params"),
        (["layers/3/attention", "layers/4/attention"], "layers/3", "attention", "layers", ""),
        (["params/stages_1/layers_0/mlp"], "params/stages_1/layers_0", "mlp", "params/stages_1/layers", "params"),
        (
            ["t/Block_0/Mlp_0/Dense_1", "t/Block_1/Mlp_0/Dense_1"],
            "t/Block_0",
            "Mlp_0/Dense_1",
            "t/Block",
            "t",
        ),
        (["params/feed"], "params", "feed", "params", "params"),
        (["feed"], "", "feed", "", ""),
    ],
)
def test_a_modules_layer_is_told_from_its_name(paths, layer, part, base, tower):
    place = places(paths)[paths[0]]
    assert (place.layer, place.part, place.base, place.tower) == (layer, part, base, tower)
    assert place.path == paths[0]


def test_a_model_without_numbered_layers_is_one_layer(key, close):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="second")(nn.Dense(8, name="first")(x))

    x = jax.random.normal(key, (3, 8))
    params = Two().init(key, x)
    adapted = adapt(Two().apply, hyperformer(RANK, at="{first,second}", **SMALL))
    delta = adapted.init(key, params, x)
    method, own = bake(adapted.method, delta, 0)
    assert set(own) == {"params/first", "params/second"}
    close(adapt(Two().apply, method).apply(params, own, x), adapted.apply(params, delta, x))


def test_what_cannot_be_made_is_refused(params):
    with pytest.raises(ValueError, match=r"projected 1: expected at least 1, 1 and 2 \(over one number"):
        hyperformer(projected=1)
    with pytest.raises(ValueError, match="tasks 0"):
        hyperformer(tasks=0)

    class Uneven(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="b")(nn.Dense(8, name="a")(x))

    class Net(nn.Module):
        second: bool

        @nn.compact
        def __call__(self, x):
            for i in range(2):
                x = Uneven(name=f"layers_{i}")(x)
            return x

    x = jnp.ones((2, 8))
    model = Net(True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    init = lambda **options: jax.eval_shape(
        adapt(model.apply, hyperformer(RANK, **options)).init, jax.random.key(0), shapes, x
    )
    assert len(init(at="layers_*/*")["heads"]["params/layers"]) == 2
    with pytest.raises(ValueError, match=r"a head makes arrays of one size: .*or take efficient=False"):
        init(at="layers_*/*", efficient=True)
    with pytest.raises(ValueError, match=r"\['a'\] of 'params/layers_1' is not adapted"):
        init(at=["layers_*/b", "layers_0/a"])
