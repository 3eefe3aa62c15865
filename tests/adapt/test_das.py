"""Dynamic architecture skipping: the card's oracles, on pre-norm and post-norm models."""

import dataclasses
import itertools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpeft import PatternError, Study, adapt, chain, das, data, head, train, trees
from jaxpeft.adapt.das import search, supernet, with_mask
from jaxpeft.method import Call
from jaxpeft.models import ImageClassifier, SequenceClassifier, VisionConfig
from jaxpeft.models.encoder import EncoderConfig
from jaxpeft.models.layers import Block
from jaxpeft.tune.bandit import bandit_update

pytestmark = pytest.mark.usefixtures("quick")
TEXT = EncoderConfig(
    vocab=20, width=8, layers=4, heads=2, head_dim=4, mlp_width=16, max_positions=24, init_std=0.3, plain=True
)
IMAGE = VisionConfig(
    width=8,
    layers=4,
    heads=2,
    head_dim=4,
    mlp_width=16,
    pre_norm=True,
    image=(8, 8),
    patch=(4, 4),
    channels=1,
    plain=True,
)
IDS = np.random.default_rng(0).integers(2, 20, (4, 5)).astype(np.int32)
PIXELS = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
MODELS = {
    "post-norm": (SequenceClassifier(TEXT, 3), (IDS, np.ones_like(IDS))),
    "pre-norm": (ImageClassifier(IMAGE, 3), (PIXELS,)),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    model, inputs = MODELS[request.param]
    return model, model.init(jax.random.key(0), *inputs), inputs


def started(case, method, by=0.3):
    model, params, inputs = case
    adapted = adapt(model.apply, method, on_dense="refuse")
    delta = adapted.init(jax.random.key(1), params, *inputs)
    rng = np.random.default_rng(1)
    yes, no = trees.learned(delta)
    move = lambda x: x + by * jnp.asarray(rng.normal(size=x.shape), x.dtype)
    return adapted, trees.combine(jax.tree.map(move, yes), no)


def silent(delta):
    """The delta with every adapter at zero."""
    new = {p: jnp.zeros_like(x) for p, x in trees.by_path(delta).items() if "_up" in p.rpartition("/")[2]}
    return trees.replace_leaves(delta, new)


def test_silent_adapters_are_the_base_and_a_silent_skip_passes_its_input_on(case, close):
    model, params, inputs = case
    adapted, delta = started(case, das(()))
    close(adapted.apply(params, silent(delta), *inputs), model.apply(params, *inputs))
    adapted, delta = started(case, das((1,)))
    fewer = type(model)(dataclasses.replace(model.config, layers=3), 3)
    names = {"layers_0": "layers_0", "layers_1": "layers_2", "layers_2": "layers_3"}

    def without(tree):
        if not isinstance(tree, dict):
            return tree
        kept = {k: v for k, v in tree.items() if not k.startswith("layers_")}
        return {k: without(v) for k, v in kept.items()} | {a: tree[b] for a, b in names.items() if b in tree}

    close(adapted.apply(params, silent(delta), *inputs), fewer.apply(without(params), *inputs))


@pytest.mark.parametrize("mask", [(0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 0, 1)])
def test_the_masked_supernet_is_the_pruned_model(case, mask, close):
    _, params, inputs = case
    super_, delta = started(case, supernet(3, 5))
    flags = jnp.array(mask, bool)
    masked = super_.apply(params, with_mask(delta, flags), *inputs)
    skip = tuple(i for i, m in enumerate(mask) if m)
    adapted, shapes = started(case, das(skip, rank=3, skip_rank=5))
    own = {p: {n: delta[p][n] for n in d} for p, d in shapes.items()}
    close(adapted.apply(params, own, *inputs), masked)


def test_masks_are_traced_and_vmapped(case, close):
    _, params, inputs = case
    super_, delta = started(case, supernet(3, 5))
    masks = jnp.eye(4, dtype=bool)
    run = lambda mask: super_.apply(params, with_mask(delta, mask), *inputs)
    together = jax.jit(jax.vmap(run))(masks)
    close(together, jnp.stack([run(m) for m in masks]))
    yes, _ = trees.learned(delta)
    assert not any("skipped" in p for p in trees.by_path(yes))


def test_a_skipped_layer_saves_its_operations(case):
    _, params, inputs = case

    def flops(skip):
        adapted, delta = started(case, das(skip, rank=1, skip_rank=1))
        return jax.jit(adapted.apply).lower(params, delta, *inputs).compile().cost_analysis()["flops"]

    whole, one, two = flops(()), flops((2,)), flops((1, 2))
    block = whole - one
    assert block > 0.15 * whole
    assert whole - two == pytest.approx(2 * block, rel=0.05)


def test_adapters_have_the_cards_sizes(case):
    d, b = 8, 3
    count = 2 * d * b + b + d + 2 * d
    _, delta = started(case, das((0, 3), rank=3, skip_rank=3))
    assert trees.count(delta) == 2 * 2 * count + 2 * count
    for width, want in ((96, 149_856), (192, 297_408), (288, 444_960)):
        assert 2 * 768 * width + width + 768 + 2 * 768 == want


class Batches:
    """Batches of one split, as a study has them."""

    def __init__(self, inputs, label):
        n = len(label)
        weight, index = np.ones(n, np.float32), np.arange(n)
        kind = data.ImageBatch if len(inputs) == 1 else data.TextBatch
        self.one = kind(*inputs, label, weight, index)

    def __len__(self):
        return 6

    def batch(self, position):
        return self.one


def study_of(model, params, inputs):
    task = train.image_classification() if len(inputs) == 1 else train.text_classification()
    batches = Batches(inputs, np.array([0, 1, 2, 0], np.int32))

    def loss(apply, batch, key):
        return task.loss(task.forward(apply, batch, key), batch).mean()

    base = lambda p, *x, dropout_key=None, **k: model.apply(p, *x, **k)
    return Study(Call(base, params, inputs), loss, batches, batches, 1e-3, jax.random.key(0))


def test_the_search_finds_the_pair_that_trying_all_pairs_finds():
    """Two of four blocks have zero output projections; which pair is best is told by the losses of all six."""
    model, inputs = MODELS["pre-norm"]
    params = model.init(jax.random.key(0), *inputs)
    new = {
        p: jnp.zeros_like(x)
        for p, x in trees.by_path(params).items()
        if ("layers_1" in p or "layers_2" in p) and ("attention/out/" in p or "mlp/down/" in p)
    }
    params = trees.replace_leaves(params, new)
    params = jax.tree.map(lambda x: x * 3 if x.ndim == 2 else x, params)
    label = np.asarray(model.apply(params, *inputs).argmax(-1), np.int32)  # what the base answers is right
    study = study_of(model, params, inputs)
    study = study._replace(train=Batches(inputs, label), validation=Batches(inputs, label), rate=1e-6)
    adapted = adapt(model.apply, supernet(2, 2))
    delta = silent(adapted.init(jax.random.key(1), params, *inputs))
    losses = {}
    for pair in itertools.combinations(range(4), 2):
        mask = jnp.zeros(4, bool).at[jnp.array(pair)].set(True)
        run = lambda *x, dropout_key=None, mask=mask: adapted.apply(params, with_mask(delta, mask), *x)
        losses[pair] = float(study.loss(run, study.train.batch(0), None))
    found, blocks = search(study, supernet(2, 2), 2, epochs=80, warmup=0.2, turn=1, rate=5.0)
    assert [p.rpartition("/")[2] for p, _ in blocks] == [f"layers_{i}" for i in range(4)]
    best = min(losses, key=losses.__getitem__)
    assert set(np.argsort(-np.asarray(found))[:2].tolist()) == set(best), (losses, found)


def test_prepared_it_is_a_method_with_layers_gone(case):
    model, params, inputs = case
    method = chain(das(None, 2, 3, 3, epochs=2, warmup=0.5, turn=2), head())
    made = method.prepare(study_of(model, params, inputs))
    skip = made.config["methods"][0]["skip"]
    assert len(skip) == 2
    adapted = adapt(model.apply, made)
    shapes = jax.eval_shape(adapted.init, jax.random.key(0), params, *inputs)
    assert sum("skip_up" in d for d in shapes["das"].values()) == 2
    assert das(()).prepare is None


def test_bad_arguments_are_refused(case):
    for wrong in ({"rank": 0}, {"skip_rank": 0}, {"k": 0}, {"turn": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} 0"):
            das(**wrong)
    with pytest.raises(PatternError, match=r"layers_9.*near misses"):
        started(case, das((9,)))
    with pytest.raises(PatternError, match="attention_norm"):
        started(case, das(range(4)))
    _, delta = started(case, supernet(2, 2))
    with pytest.raises(ValueError, match=r"a mask of shape \(3,\) for 4 layers"):
        with_mask(delta, jnp.zeros(3, bool))


GOLDEN = {
    k: jnp.asarray(v)
    for k, v in load_file(Path(__file__).parents[2] / "third_party" / "das" / "golden.safetensors").items()
}


def part(prefix):
    return {k.removeprefix(prefix): v for k, v in GOLDEN.items() if k.startswith(prefix)}


class TwoBlocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Block(dataclasses.replace(IMAGE, norm_eps=1e-6), name=f"layers_{i}")(x, None, True)
        return x


def test_a_kept_and_a_skipped_block_are_those_of_the_reference(close):
    block, model = part("block."), TwoBlocks()
    linear = lambda w, b: {"kernel": w.T, "bias": b}
    dense = lambda name: linear(block[f"{name}.weight"], block[f"{name}.bias"])
    norm = lambda name: {"scale": block[f"{name}.weight"], "bias": block[f"{name}.bias"]}
    thirds = zip(jnp.split(block["attn.qkv.weight"], 3), jnp.split(block["attn.qkv.bias"], 3))
    own = {
        "attention_norm": norm("norm1"),
        "attention": {n: linear(w, b) for n, (w, b) in zip(("query", "key", "value"), thirds)}
        | {"out": dense("attn.proj")},
        "mlp_norm": norm("norm2"),
        "mlp": {"up": dense("mlp.fc1"), "down": dense("mlp.fc2")},
    }
    params = {"params": {"layers_0": own, "layers_1": own}}

    def adapter(prefix, label):
        p = part(prefix)
        return {
            f"{label}_norm_scale": p["adapter_layer_norm_before.weight"],
            f"{label}_norm_bias": p["adapter_layer_norm_before.bias"],
            f"{label}_down": p["down_proj.weight"].T,
            f"{label}_down_bias": p["down_proj.bias"],
            f"{label}_up": p["up_proj.weight"].T,
            f"{label}_up_bias": p["up_proj.bias"],
        }

    adapted = adapt(model.apply, das((1,), rank=4, skip_rank=6))
    delta = {
        "params/layers_0/attention": adapter("block.adapter0.", "beside"),
        "params/layers_0/mlp": adapter("block.adapter1.", "beside"),
        "params/layers_1": adapter("skip.", "skip"),
    }
    close(jax.tree.map(jnp.shape, adapted.init(jax.random.key(0), params, GOLDEN["x"])), jax.tree.map(jnp.shape, delta))
    close(adapted.apply(params, delta, GOLDEN["x"]), GOLDEN["y"])


def test_the_preferences_after_four_rounds_are_those_of_the_reference(close):
    g = part("bandit.")
    r = g["start"]
    for subsets, losses in zip(g["subsets"], g["losses"]):
        r = bandit_update(r, subsets, losses, 1.0)
    close(r, g["end"], atol=1e-6)
