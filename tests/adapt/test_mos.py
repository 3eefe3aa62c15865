"""Mixture of shards: the card's oracles on a tiny encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft import adapt, bake, lora, mos, trees
from jaxpeft.adapt.mos import assemble, indices
from jaxpeft.models import Decoder, SequenceClassifier
from jaxpeft.models.decoder import DecoderConfig
from jaxpeft.models.encoder import EncoderConfig

pytestmark = pytest.mark.usefixtures("quick")
LAYERS = 3
CONFIG = EncoderConfig(
    vocab=20, width=8, layers=LAYERS, heads=2, head_dim=4, mlp_width=16, max_positions=24, init_std=0.3, plain=True
)
IDS = np.random.default_rng(0).integers(2, 20, (4, 5)).astype(np.int32)
MASK = np.ones((4, 5), np.int32)
MODEL = SequenceClassifier(CONFIG, 3)
AT = "**/attention/query/kernel"
PATHS = [f"params/backbone/layers_{i}/attention/query/kernel" for i in range(LAYERS)]
KIND = "params/backbone/layers/attention/query/kernel"


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), IDS, MASK)


def started(params, method, by=0.3):
    adapted = adapt(MODEL.apply, method, on_dense="refuse")
    delta = adapted.init(jax.random.key(1), params, IDS, MASK)
    rng = np.random.default_rng(1)
    yes, no = trees.learned(delta)
    move = lambda x: x + by * jnp.asarray(rng.normal(size=x.shape), x.dtype)
    return adapted, trees.combine(jax.tree.map(move, yes), no)


def change(delta, path=PATHS[0]):
    """A' B of one layer."""
    _, own = bake(mos(4, 2, 1, 2, at=AT), delta)
    return own[path]["a"] @ own[path]["b"]


def test_a_vector_is_its_shards_in_a_row(key):
    pool = jax.random.normal(key, (12, 3))
    rows = jnp.array([[4, 0, 7, 11], [1, 2, 3, 0]])
    got = assemble(pool, rows, 2)
    assert got.shape == (2, 2, 6)
    for layer in range(2):
        for j in range(2):
            want = jnp.concatenate([pool[rows[layer, 2 * j]], pool[rows[layer, 2 * j + 1]]])
            assert (got[layer, j] == want).all()
    strided = jnp.concatenate([pool[rows[0]][c::2] for c in range(2)], axis=1)
    assert (got[0] == strided).all()


def test_lists_hold_distinct_public_rows_then_the_layers_own(key):
    layers, e, r, p, shards = 4, 3, 5, 1, 2
    rows = np.asarray(indices(key, layers, e, r, p, shards))
    public = (e - p) * layers * shards
    assert rows.shape == (layers, r * shards)
    for i, row in enumerate(rows):
        assert len(set(row)) == r * shards
        assert (row[: (r - p) * shards] < public).all()
        assert row[(r - p) * shards :].tolist() == list(range(public + i * p * shards, public + (i + 1) * p * shards))
    assert (rows[0] != rows[1]).any()


def test_all_private_is_lora_in_each_layer(params, close):
    adapted, delta = started(params, mos(2, 2, 2, 1, alpha=4.0, at=AT))
    plain = adapt(MODEL.apply, lora(2, 4.0, at=AT))
    pool = delta["pools"][KIND]
    own = {p: {"a": pool["a"][2 * i : 2 * i + 2].T, "b": pool["b"][2 * i : 2 * i + 2]} for i, p in enumerate(PATHS)}
    close(adapted.apply(params, delta, IDS, MASK), plain.apply(params, own, IDS, MASK))


def test_it_bakes_into_a_lora_of_the_assembled_rank(params, close):
    method = mos(4, 2, 1, 2, at=AT)
    adapted, delta = started(params, method)
    inner, own = bake(method, delta)
    assert inner.config["method"] == "lora"
    assert own[PATHS[1]]["a"].shape == (8, 4)
    close(adapt(MODEL.apply, inner).apply(params, own, IDS, MASK), adapted.apply(params, delta, IDS, MASK))


def test_it_has_the_parameters_of_the_equivalent_rank_for_any_rank(params):
    for rank, private, shards in ((2, 1, 1), (4, 1, 2), (5, 0, 4)):
        _, delta = started(params, mos(rank, 2, private, shards, at=AT))
        assert trees.count(trees.learned(delta)[0]) == 2 * LAYERS * (8 + 8)


def test_llama_2_7b_has_the_papers_counts():
    config = DecoderConfig(
        vocab=32000,
        width=4096,
        layers=32,
        heads=32,
        head_dim=128,
        mlp_width=11008,
        max_positions=4096,
        family="llama",
        gated=True,
    )
    model = Decoder(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    at = ("**/attention/{query,key,value,out}/kernel", "**/mlp/{gate,up,down}/kernel")

    def count(method):
        init = adapt(model.apply, method).init
        delta = jax.eval_shape(lambda k, p: init(k, p, jnp.zeros((1, 4), jnp.int32)), jax.random.key(0), shapes)
        return trees.count(trees.learned(delta)[0])

    assert count(mos(8, 2, 1, 1, at=at)) == 4_997_120
    assert count(mos(32, 8, 1, 2, at=at)) == 19_988_480
    assert count(lora(64, at=at)) == 159_907_840


def test_a_private_shard_serves_one_layer_and_a_public_one_all_that_drew_it(params):
    method = mos(4, 2, 1, 2, at=AT)
    adapted, delta = started(params, method)
    rows = {p: np.asarray(d["a"].value) for p, d in delta["indices"].items()}
    loss = lambda pool: jnp.sum(
        jnp.sin(adapted.apply(params, {**delta, "pools": {KIND: {**delta["pools"][KIND], "a": pool}}}, IDS, MASK))
    )
    pool = delta["pools"][KIND]["a"]
    drawn = set(np.concatenate(list(rows.values())))
    moved = {i for i, g in enumerate(jax.grad(loss)(pool)) if (g != 0).any()}
    assert moved == drawn
    private = rows[PATHS[0]][-1]
    for i, path in enumerate(PATHS):
        other = {**delta, "pools": {KIND: {**delta["pools"][KIND], "a": pool.at[private].add(1.0)}}}
        assert jnp.allclose(change(other, path), change(delta, path)) == (i > 0)


def test_pure_sharing_gives_every_layer_the_same_change(params):
    adapted, delta = started(params, mos(2 * LAYERS, 2, 0, 1, at=AT, subset=False))
    _, own = bake(adapted.method, delta)
    first = own[PATHS[0]]
    for path in PATHS[1:]:
        assert (own[path]["a"] == first["a"]).all()
        assert (own[path]["b"] == first["b"]).all()


def test_only_a_joint_order_of_a_and_b_is_irrelevant(key):
    pools = jax.random.normal(key, (2, 6, 4))
    rows, other = jnp.array([3, 1, 5]), jnp.array([1, 3, 5])
    change = lambda a, b: assemble(pools[0], a, 3).T @ assemble(pools[1], b, 3)
    assert jnp.allclose(change(rows, rows), change(other, other), atol=1e-5)
    assert not jnp.allclose(change(rows, rows), change(rows, other), atol=1e-2)


def test_one_list_serves_both_sides_unless_they_are_dissociated(params):
    for dissociate in (True, False):
        _, delta = started(params, mos(4, 2, 1, 2, at=AT, dissociate=dissociate))
        same = all((d["a"].value == d["b"].value).all() for d in delta["indices"].values())
        assert same != dissociate


def test_pools_start_as_lora_does(params):
    adapted, _ = started(params, mos(4, 2, 1, 2, at=AT))
    pool = adapted.init(jax.random.key(0), params, IDS, MASK)["pools"][KIND]
    assert (pool["b"] == 0).all()
    assert 0.8 / np.sqrt(8) < float(jnp.abs(pool["a"]).max()) <= 1 / np.sqrt(8)


def test_bad_arguments_are_refused(params):
    with pytest.raises(ValueError, match=r"rank 2, equivalent 4"):
        mos(2, 4)
    with pytest.raises(ValueError, match="private 3"):
        mos(4, 2, 3)
    with pytest.raises(ValueError, match="nothing of its own"):
        mos(4, 2, 1, subset=False)
    with pytest.raises(ValueError, match=r"needs 14 public shards, .* has 6"):
        started(params, mos(8, 2, 1, 2, at=AT))
    with pytest.raises(ValueError, match="3 shards divide"):
        started(params, mos(4, 2, 1, 3, at=AT))
    with pytest.raises(ValueError, match="take that rank"):
        started(params, mos(4, 2, 0, 1, at=AT, subset=False))
