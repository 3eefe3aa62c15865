"""ScaLearn and AdapterFusion: the cards' oracles on a tiny encoder."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpeft import adapt, adapter_fusion, bake, chain, head, pfeiffer, scalearn, trees
from jaxpeft.adapt.scalearn import combined, fold, value_regulariser
from jaxpeft.models import SequenceClassifier
from jaxpeft.models.encoder import EncoderConfig

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = EncoderConfig(
    vocab=20, width=8, layers=2, heads=2, head_dim=4, mlp_width=16, max_positions=24, init_std=0.3, plain=True
)
IDS = np.random.default_rng(0).integers(2, 20, (4, 5)).astype(np.int32)
MASK = np.ones((4, 5), np.int32)
MODEL = SequenceClassifier(CONFIG, 3)
T, RANK = 3, 2


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), IDS, MASK)


def moved(delta, seed=1, by=0.5):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + by * jnp.asarray(rng.normal(size=x.shape), x.dtype), delta)


@pytest.fixture(scope="module")
def sources(params):
    """T trained adapters, as runs save them: with a head beside."""
    adapted = adapt(MODEL.apply, chain(pfeiffer(RANK), head()))
    start = adapted.init(jax.random.key(1), params, IDS, MASK)
    return [moved(start, seed) for seed in range(T)]


def started(params, method):
    adapted = adapt(MODEL.apply, method, on_dense="refuse")
    return adapted, adapted.init(jax.random.key(2), params, IDS, MASK)


def with_scale(delta, value):
    return {
        **delta,
        "scale": {k: jnp.broadcast_to(jnp.asarray(value).reshape(T, 1), w.shape) for k, w in delta["scale"].items()},
    }


def test_a_one_hot_scale_is_that_source_and_zero_is_the_base(params, sources, close):
    adapted, delta = started(params, scalearn(sources, RANK))
    single = adapt(MODEL.apply, pfeiffer(RANK))
    for t in range(T):
        got = adapted.apply(params, with_scale(delta, np.eye(T, dtype=np.float32)[t]), IDS, MASK)
        close(got, single.apply(params, sources[t]["pfeiffer"], IDS, MASK))
    close(adapted.apply(params, with_scale(delta, np.zeros(T, np.float32)), IDS, MASK), MODEL.apply(params, IDS, MASK))


def test_the_folded_adapter_is_the_scaled_sum(sources, key, close):
    place = next(iter(sources[0]["pfeiffer"]))
    adapters = trees.stack([s["pfeiffer"][place] for s in sources])
    w, h = jax.random.normal(key, (T, 8)), jax.random.normal(jax.random.fold_in(key, 1), (5, 8))
    run = lambda p: jax.nn.relu(h @ p["down"] + p["down_bias"]) @ p["up"] + p["up_bias"]
    want = sum(w[t] * run(jax.tree.map(lambda x, t=t: x[t], adapters)) for t in range(T))
    folded = fold(adapters, w)
    assert folded["down"].shape == (8, T * RANK)
    close(run(folded), want)
    # The output is linear in w_t, and its derivative is u_t.
    slope = jax.jacobian(lambda w: run(fold(adapters, w)))(w)
    close(
        jnp.einsum("btd->btd", jnp.stack([slope[:, j, :, j] for j in range(8)], axis=-1)).swapaxes(0, 1),
        jnp.stack([run(jax.tree.map(lambda x, t=t: x[t], adapters)) for t in range(T)]),
    )


def test_it_bakes_into_one_wide_adapter(params, sources, close):
    method = scalearn(sources, RANK)
    adapted, delta = started(params, method)
    inner, own = bake(method, delta)
    close(adapt(MODEL.apply, inner).apply(params, own, IDS, MASK), adapted.apply(params, delta, IDS, MASK))


@pytest.mark.parametrize(("uniform", "share", "count"), [(0, 0, T * 8 * 2), (1, 0, T * 2), (0, 1, T * 8), (1, 1, T)])
def test_each_variant_learns_what_the_card_counts(params, sources, uniform, share, count):
    _, delta = started(params, scalearn(sources, RANK, uniform=bool(uniform), share_layers=bool(share)))
    yes, _ = trees.learned(delta)
    assert trees.count(yes) == count
    for w in jax.tree.leaves(yes):
        assert jnp.allclose(w, 2 / T, atol=6e-3)
    if not uniform:
        assert float(jnp.std(jnp.concatenate([w.ravel() for w in jax.tree.leaves(yes)]))) == pytest.approx(
            1e-3, rel=0.5
        )


def test_roberta_base_has_the_papers_share_of_adapter_fusion():
    ours, d, layers, tasks = 8 * 768 * 12, 768, 12, 8
    assert ours == tasks * d * layers == 73_728
    assert layers * (3 * d * d + 2 * d) == 21_252_096
    assert ours / 21_252_096 == pytest.approx(0.00347, abs=1e-5)


def test_narrow_and_shared_scales_are_constant_ones(params, sources, close):
    full, delta = started(params, scalearn(sources, RANK))
    values = jnp.array([0.3, -0.4, 1.2])
    want = full.apply(params, with_scale(delta, values), IDS, MASK)
    for options in ({"uniform": True}, {"share_layers": True}, {"uniform": True, "share_layers": True}):
        adapted, delta = started(params, scalearn(sources, RANK, **options))
        close(adapted.apply(params, with_scale(delta, values), IDS, MASK), want)


def test_constraints_make_shares(key):
    w = jnp.abs(jax.random.normal(key, (2, T, 8)))
    assert jnp.allclose(combined(w, "mean").sum(1), 1, atol=1e-5)
    assert jnp.allclose(combined(w, "softmax").sum(1), 1, atol=1e-5)
    assert (combined(w, "none") == w).all()


def test_held_scales_are_the_plain_average(params, sources):
    _, delta = started(params, scalearn(sources, RANK, train=False, init_scale=1.0))
    assert trees.count(trees.learned(delta)[0]) == 0
    assert all((w == np.float32(1 / T)).all() for w in jax.tree.leaves(trees.unmark(delta["scale"])))


def test_dropout_acts_on_the_scales_and_keeps_their_mean(params, sources):
    adapted, delta = started(params, scalearn(sources, RANK))
    run = jax.jit(lambda key: adapted.apply(params, delta, IDS, MASK, dropout_key=key))
    assert not jnp.allclose(run(jax.random.key(0)), run(jax.random.key(1)))
    calm, delta = started(params, scalearn(sources, RANK, uniform=True, share_layers=True))
    run = lambda key: calm.apply(params, delta, IDS, MASK, dropout_key=key)
    assert jnp.allclose(run(jax.random.key(0)), run(jax.random.key(1)))


def test_fusion_without_preferences_takes_the_mean_and_starts_with_identity_values(params, sources, close):
    adapted, delta = started(params, adapter_fusion(sources, RANK))
    even = {p: {n: jnp.zeros_like(x) if n in ("query", "key") else x for n, x in d.items()} for p, d in delta.items()}
    average, mean = started(params, scalearn(sources, RANK, train=False, init_scale=1.0))
    close(adapted.apply(params, even, IDS, MASK), average.apply(params, mean, IDS, MASK), atol=1e-4)
    assert float(value_regulariser(delta)) == pytest.approx(2 * 56e-12, rel=1e-3)
    yes, _ = trees.learned(delta)
    assert trees.count(yes) == 2 * (3 * 64 + 16)


def test_what_does_not_fit_is_refused(params, sources):
    with pytest.raises(ValueError, match="0 sources"):
        scalearn([])
    with pytest.raises(ValueError, match="rank 0"):
        adapter_fusion(2, 0)
    with pytest.raises(ValueError, match="constraint 'sum'"):
        scalearn(sources, RANK, constraint="sum")
    with pytest.raises(ValueError, match=r"dropout 1\.0"):
        scalearn(sources, RANK, dropout=1.0)
    with pytest.raises(ValueError, match=r"the sources have \(8, 2\).*where this model's adapters have \(8, 5\)"):
        started(params, scalearn(sources, 5))
    other = adapt(MODEL.apply, pfeiffer(4)).init(jax.random.key(0), params, IDS, MASK)
    with pytest.raises(ValueError, match="one model and one rank"):
        started(params, scalearn([sources[0], other], RANK))


GOLDEN = {
    k: jnp.asarray(v)
    for k, v in load_file(Path(__file__).parents[2] / "third_party" / "scalearn" / "golden.safetensors").items()
}


@pytest.mark.parametrize("name", ["plain", "mean", "softmax", "uniform"])
def test_the_combination_is_that_of_the_reference(name, close):
    w = combined(GOLDEN[f"{name}.omega"], name if name in ("mean", "softmax") else "none")
    close((w * GOLDEN["ups"]).sum(2) + GOLDEN["residual"], GOLDEN[f"{name}.output"])


class Twice(nn.Module):
    """Where a block's norm would stand, called first for the adapters' input and then on the sum: what comes second is
    handed out as it is."""

    @nn.compact
    def __call__(self, z):
        return z


class Block(nn.Module):
    @nn.compact
    def __call__(self, z):
        return Twice(name="mlp_norm")(z)


def test_fusion_is_that_of_the_reference(close):
    """T adapters that give the recorded outputs: from the recorded h, by ReLU units that are one for one token each."""
    h, ups = GOLDEN["h"].reshape(6, 6), GOLDEN["ups"].reshape(6, 4, 6)
    inverse = jnp.linalg.inv(h)  # h @ inverse is the identity: unit i sees token i alone
    method = adapter_fusion(4, 6, at="mlp_norm")
    down = jnp.broadcast_to(inverse, (4, 6, 6))
    up = jnp.moveaxis(ups, 1, 0)  # (T, unit, d)
    own = {
        "down": down,
        "down_bias": jnp.zeros((4, 6)),
        "up": up,
        "up_bias": jnp.zeros((4, 6)),
        "query": GOLDEN["fusion.query.weight"].T,
        "query_bias": GOLDEN["fusion.query.bias"],
        "key": GOLDEN["fusion.key.weight"].T,
        "key_bias": GOLDEN["fusion.key.bias"],
        "value": GOLDEN["fusion.value.weight"].T,
    }
    adapted = adapt(Block().apply, method)
    out = adapted.apply({"params": {}}, {"params/mlp_norm": own}, h[None])[0]
    want = (GOLDEN["fusion.output"] - GOLDEN["residual"]).reshape(6, 6)
    close(out - h, want, atol=1e-4)
