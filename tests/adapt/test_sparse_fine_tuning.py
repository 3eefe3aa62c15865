"""LT-SFT: selection, the second training against masked updates, arithmetic of deltas, and the reference's numbers."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from jaxpeft import (
    PatternError,
    adapt,
    chain,
    from_config,
    from_nnx,
    head,
    mask_updates,
    sparse,
    sparse_fine_tuning,
    top_k_mask,
    trees,
)
from jaxpeft.adapt.sparse_fine_tuning import compose, densely_trained, diff, lt_select, modules, padded, places, revert
from jaxpeft.files import load_delta, save_delta
from jaxpeft.method import Call, Study
from jaxpeft.models import SequenceClassifier, stack_layers
from jaxpeft.models.encoder import EncoderConfig

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = EncoderConfig(
    vocab=20, width=8, layers=2, heads=2, head_dim=4, mlp_width=16, max_positions=8, init_std=0.3, plain=True
)
RNG = np.random.default_rng(0)
IDS = RNG.integers(2, 20, (3, 4, 5)).astype(np.int32)  # three batches
MASK = np.ones((4, 5), np.int32)
LABEL = RNG.integers(0, 3, (3, 4)).astype(np.int32)
MODEL = SequenceClassifier(CONFIG, 3)
AT = "**/layers*/{attention/query,mlp/up}/*"
# For trainings, which compile much: a plain function.
SMALL = {
    "body": {"kernel": jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32), "bias": jnp.zeros(5)},
    "head": {"kernel": jnp.asarray(RNG.normal(size=(5, 2)), jnp.float32)},
}
X = jnp.asarray(RNG.normal(size=(3, 8, 6)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(3, 8, 2)), jnp.float32)


def small(params, x):
    return jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"][None]) @ params["head"]["kernel"]


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), IDS[0], MASK)


BODY = {p: x for p, x in trees.by_path(SMALL).items() if p.startswith("body")}


def started(params, method, model=MODEL):
    adapted = adapt(model.apply, method, on_dense="refuse")
    return adapted, jax.jit(adapted.init)(jax.random.key(0), params, IDS[0], MASK)


class Data(list):
    def batch(self, i):
        return self[i % len(self)]


def loss(apply, batch, key):
    return optax.softmax_cross_entropy_with_integer_labels(apply(batch[0], MASK), batch[1]).mean()


def study(params, model=MODEL):
    call = Call(lambda p, *x, **k: model.apply(p, *x, **k), params, (IDS[0], MASK))
    return Study(call, loss, Data(zip(IDS, LABEL)), Data(), 1e-2, jax.random.key(5))


def square_loss(apply, batch, key):
    return jnp.square(apply(batch[0]) - batch[1]).mean()


def small_study(rate=1e-2):
    return Study(Call(small, SMALL, (X[0],)), square_loss, Data(zip(X, Y)), Data(), rate, jax.random.key(5))


def whole(x, batch):
    """The loss with some leaves of the small model in place."""
    return square_loss(lambda *i: small(trees.replace_leaves(SMALL, x), *i), batch, None)


def trained(run, start, optimiser, steps=4):
    """`start` after some updates on `run(start, batch)`."""

    @jax.jit
    def step(x, state, batch):
        grads = jax.grad(run)(x, batch)
        updates, state = optimiser.update(grads, state, x)
        return optax.apply_updates(x, updates), state

    state = optimiser.init(start)
    for i in range(steps):
        start, state = step(start, state, (X[i % 3], Y[i % 3]))
    return start


# ----------------------------------------------------------------------------------------------------------- selection


def test_the_entries_that_moved_most_are_chosen_over_all_leaves_together():
    before = {"a": jnp.zeros(3), "b": jnp.ones((2, 2))}
    after = {"a": jnp.array([0.1, -5.0, 0.0]), "b": jnp.array([[1.0, 4.0], [-1.0, 0.5]])}
    got = lt_select(before, after, 3)
    assert got["a"].tolist() == [False, True, False]
    assert got["b"].tolist() == [[False, True], [True, False]]
    none = lt_select(before, after, 0)
    assert not any(bool(m.any()) for m in none.values())
    traced = jax.jit(lt_select)(before, after, jnp.asarray(2))
    assert sum(int(m.sum()) for m in traced.values()) == 2


def test_more_entries_than_moved_are_refused():
    with pytest.raises(ValueError, match="k 3: only 2 of 4 entries moved"):
        lt_select(jnp.zeros(4), jnp.array([1.0, 0.0, 2.0, 0.0]), 3)


def test_of_equal_changes_exactly_k_are_taken_the_first_ones():
    assert lt_select(jnp.zeros(4), jnp.array([1.0, -2.0, 2.0, 2.0]), 2).tolist() == [False, True, True, False]


def test_prepare_trains_densely_selects_and_starts_anew(close):
    """The first training written out: Adam on all of P and the head, linear decay, clipped."""
    method = sparse_fine_tuning(8, "body/*", steps=5, l1=5.0).prepare(small_study())
    adapted = adapt(small, method, on_dense="refuse")
    delta = adapted.init(jax.random.key(0), SMALL, X[0])
    own = trees.by_path(SMALL)

    def run(x, batch):
        return whole(x, batch) + 5.0 / 45 * sum(jnp.abs(x[p] - own[p]).sum() for p in own)

    rate = optax.linear_schedule(1e-2, 0.0, 5)
    after = trained(run, own, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)), 5)
    close(densely_trained(small_study(), own, 5, 5.0, 1e-2), after)
    mask = top_k_mask({p: jnp.abs(after[p] - own[p]) for p in BODY}, 8)
    want = {p: np.flatnonzero(m).tolist() for p, m in mask.items() if m.any()}
    assert {p: d["indices"].value.tolist() for p, d in delta.items()} == want
    assert trees.count(trees.learned(delta)[0]) == 8
    close(adapted.apply(SMALL, delta, X[0]), small(SMALL, X[0]))


def test_a_strong_penalty_keeps_the_dense_training_near():
    far, near = (densely_trained(small_study(), BODY, 5, l1, 1e-2) for l1 in (0.0, 1e4))
    distance = lambda after: sum(float(jnp.abs(after[p] - BODY[p]).sum()) for p in BODY)
    assert distance(near) < 0.7 * distance(far)


def test_a_head_beside_it_is_trained_along_and_comes_back():
    method = chain(sparse_fine_tuning(0.3, steps=2), head())
    assert method.prepare is not None
    delta = adapt(small, method.prepare(small_study())).init(jax.random.key(0), SMALL, X[0])
    assert set(delta["sparse_fine_tuning"]) <= set(BODY)
    assert (delta["head"]["head/kernel"]["value"] == SMALL["head"]["kernel"]).all()
    with pytest.raises(ValueError, match="looks at the task's data"):
        adapt(small, method).init(jax.random.key(0), SMALL, X[0])


def test_scanned_layers_get_the_same_entries(params, close):
    model = SequenceClassifier(dataclasses.replace(CONFIG, scan=True), 3)
    stacked = stack_layers(params)
    (one, plain), (other, scanned) = (
        started(p, sparse_fine_tuning(40, AT, steps=3).prepare(study(p, m)), m)
        for p, m in ((params, MODEL), (stacked, model))
    )
    for path, d in scanned.items():
        for i in range(2):
            own = plain.get(path.replace("/layers/", f"/layers_{i}/"))
            entries = [] if own is None else own["indices"].value.tolist()
            found, size = d["indices"].value[i].tolist(), trees.by_path(stacked)[path][i].size
            assert found == entries + [size] * (len(found) - len(entries))
    # Entries of padding are out of range: what they learn does nothing.
    ones = lambda delta: {p: {**d, "values": jnp.ones_like(d["values"])} for p, d in delta.items()}
    close(
        jax.jit(other.apply)(stacked, ones(scanned), IDS[0], MASK),
        jax.jit(one.apply)(params, ones(plain), IDS[0], MASK),
    )


# --------------------------------------------------------------------------------------------------- the second training


def test_training_the_entries_is_masked_training_of_the_whole_model(close):
    """Adam with momentum: the mask stands after the optimiser. What it hides stays bit for bit."""
    rng = np.random.default_rng(1)
    mask = {p: jnp.asarray(rng.random(x.shape) < 0.3) for p, x in BODY.items()}
    adapted = adapt(small, sparse(indices={p: places(m, ()) for p, m in mask.items()}))
    yes, no = trees.learned(adapted.init(jax.random.key(0), SMALL, X[0]))
    run = lambda yes, batch: square_loss(lambda *x: adapted.apply(SMALL, trees.combine(yes, no), *x), batch, None)
    theta = trees.by_path(adapted.merge(SMALL, trees.combine(trained(run, yes, optax.adam(1e-2)), no)))
    masked = trained(whole, BODY, optax.chain(optax.adam(1e-2), mask_updates(mask)))
    close({p: theta[p] for p in BODY}, masked)
    kept = lambda after: [bool((jnp.where(mask[p], x, after[p]) == x).all()) for p, x in BODY.items()]
    assert all(kept(theta) + kept(masked))
    # The common mistake, masked gradients: decay moves everything.
    wrong = trained(whole, BODY, optax.chain(mask_updates(mask), optax.adamw(1e-2, weight_decay=0.1)))
    assert not all(kept(wrong))


def test_all_entries_are_plain_fine_tuning_and_none_leaves_the_head_alone(close):
    adapted = adapt(small, sparse(indices={p: np.arange(x.size) for p, x in BODY.items()}))
    yes, no = trees.learned(adapted.init(jax.random.key(0), SMALL, X[0]))
    run = lambda yes, batch: square_loss(lambda *x: adapted.apply(SMALL, trees.combine(yes, no), *x), batch, None)
    got = trees.by_path(adapted.merge(SMALL, trees.combine(trained(run, yes, optax.adam(1e-2)), no)))
    close({p: got[p] for p in BODY}, trained(whole, BODY, optax.adam(1e-2)))

    every = trees.by_path(SMALL)
    none = {p: jnp.full((1,) * x.ndim, p.startswith("head")) for p, x in every.items()}
    moved = trained(whole, every, optax.chain(optax.adam(1e-2), mask_updates(none)))
    assert {p for p in every if (moved[p] != every[p]).any()} == {"head/kernel"}


# ------------------------------------------------------------------------------------------------- arithmetic of deltas


@pytest.fixture
def deltas(params):
    """A language's and a ranking's delta, with some entries in common."""
    out = []
    for seed in (1, 2):
        made = sparse(0.1, AT, score="random").init(jax.random.key(seed), Call(MODEL.apply, params, (IDS[0], MASK)))
        rng = np.random.default_rng(seed)
        yes, no = trees.learned(made)
        move = lambda x, rng=rng: x + jnp.asarray(rng.normal(size=x.shape), x.dtype)
        out.append(trees.combine(jax.tree.map(move, yes), no))
    return out


def test_composing_is_a_sum_that_reverting_undoes(params, deltas, close):
    language, ranking = deltas
    both = compose(params, language, ranking)
    close(both, compose(params, ranking, language))
    close(both, compose(compose(params, language), ranking))
    close(revert(both, language), compose(params, ranking))
    close(revert(both, ranking, language), params)
    path = next(iter(language))
    flat = np.array(trees.by_path(params)[path]).reshape(-1)
    for d in deltas:
        np.add.at(flat, np.asarray(d[path]["indices"].value), np.asarray(d[path]["values"]))
    close(trees.by_path(both)[path].reshape(-1), flat)
    close(compose(params, language), adapt(MODEL.apply, sparse()).merge(params, language))


def test_where_masks_are_disjoint_each_entry_is_one_deltas(params, close):
    path = "params/head/kernel"
    w = params["params"]["head"]["kernel"]
    one, two = (
        {path: {"indices": trees.Fixed(jnp.array(i)), "values": jnp.array(v)}}
        for i, v in (([0, 4], [1.0, 2.0]), ([3, 5], [3.0, 4.0]))
    )
    got = compose(params, one, two)["params"]["head"]["kernel"] - w
    close(got.reshape(-1)[:6], jnp.array([1.0, 0.0, 0.0, 3.0, 2.0, 4.0]), atol=1e-6)


def test_another_language_takes_the_place_of_the_one_that_ranking_was_trained_on(params, deltas, close):
    english, ranking = deltas
    german = {p: {"indices": d["indices"], "values": -d["values"]} for p, d in english.items()}
    trained_on = compose(params, english, ranking)
    close(compose(revert(trained_on, english), german), compose(params, german, ranking))


def test_a_difference_is_what_its_training_changed(params, deltas, close):
    after = compose(params, deltas[0])
    found = diff(params, after)
    close(compose(params, found), after)
    assert set(found) == set(deltas[0])
    small = jax.tree.map(lambda x: x + 5e-8 * (x != 0), params)
    assert diff(params, small) == {}
    mask = jax.tree.map(lambda x: jnp.zeros(x.shape, bool).reshape(-1).at[0].set(True).reshape(x.shape), params)
    moved = jax.tree.map(lambda x: x + 1, params)
    assert all(d["indices"].value.tolist() == [0] for d in diff(params, moved, mask).values())


def test_languages_of_one_count_are_vmapped(params, deltas, close):
    few = dict(list(deltas[1].items())[:3])
    stacked = trees.stack(padded([deltas[0], few], params))
    got = jax.jit(jax.vmap(lambda d: compose(params, d)))(stacked)
    for i, d in enumerate((deltas[0], few)):
        close(jax.tree.map(lambda x, i=i: x[i], got), compose(params, d))


# ------------------------------------------------------------------------------------------------------------ the method


def test_a_prepared_method_comes_back_from_its_file(tmp_path, close):
    method = sparse_fine_tuning(20, steps=2).prepare(small_study())
    adapted = adapt(small, method)
    delta = adapted.init(jax.random.key(0), SMALL, X[0])
    delta = {p: {**d, "values": d["values"] + 1} for p, d in delta.items()}
    save_delta(tmp_path / "d", delta, method, SMALL)
    saved = load_delta(tmp_path / "d", SMALL)
    assert saved.method.name == "sparse_fine_tuning"
    again = adapt(small, saved.method)
    close(again.apply(SMALL, saved.delta, X[0]), adapted.apply(SMALL, delta, X[0]))
    shapes = jax.eval_shape(again.init, jax.random.key(0), SMALL, X[0])
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, delta)
    with pytest.raises(ValueError, match="made from a file"):
        again.init(jax.random.key(0), SMALL, X[0])
    with pytest.raises(Exception, match="made from a file"):
        jax.block_until_ready(jax.jit(again.init)(jax.random.key(0), SMALL, X[0]))


def test_magnitude_takes_the_largest_of_each_weight_and_random_any(params):
    made = {s: started(params, sparse(0.1, AT, score=s))[1] for s in ("magnitude", "random")}
    path = "params/backbone/layers_0/mlp/up/kernel"
    w = np.abs(np.asarray(trees.by_path(params)[path])).reshape(-1)
    largest = np.sort(np.argsort(-w, kind="stable")[:13])
    assert made["magnitude"][path]["indices"].value.tolist() == largest.tolist()
    assert len(set(made["random"][path]["indices"].value.tolist())) == 13
    assert made["random"][path]["indices"].value.tolist() != largest.tolist()


def test_half_precision_weights_under_strict_promotion(params):
    model = SequenceClassifier(dataclasses.replace(CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), 3)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    adapted = adapt(model.apply, sparse(0.1, AT), on_dense="refuse")
    with jax.numpy_dtype_promotion("strict"):
        delta = jax.eval_shape(adapted.init, jax.random.key(0), narrow, IDS[0], MASK)
        y = jax.eval_shape(adapted.apply, narrow, delta, IDS[0], MASK)
        merged = jax.eval_shape(adapted.merge, narrow, delta)
    assert y.dtype == jnp.bfloat16
    assert all(d["values"].dtype == jnp.float32 for d in delta.values())
    assert jax.tree.map(lambda x: x.dtype, merged) == jax.tree.map(lambda x: x.dtype, narrow)


def test_models_of_other_libraries_have_their_modules_found(key, close):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            for layer in self.layers:
                x = jnp.tanh(layer(x))
            return x

    apply, state = from_nnx(Net(nnx.Rngs(0)))
    x = jnp.ones((2, 4))
    found = modules(Call(apply, state, (x,)))
    assert {"layers/0", "layers/1"} <= set(found)
    adapted = adapt(apply, sparse(0.25), on_dense="refuse")
    delta = adapted.init(key, state, x)
    assert delta["layers/0/kernel"]["values"].shape == (4,)
    close(adapted.apply(state, delta, x), apply(state, x))
    assert modules(Call(lambda p, x: x @ p["w"], {"w": x.T}, (x,))) == {}


def test_bad_arguments_are_refused(params):
    call = Call(MODEL.apply, params, (IDS[0], MASK))
    for made, word in (
        (lambda: sparse(0), "k 0"),
        (lambda: sparse(score="largest"), "score 'largest'"),  # pyright: ignore
        (lambda: sparse(score="given"), "score 'given'"),
        (lambda: sparse_fine_tuning(steps=0), "steps 0"),
        (lambda: sparse_fine_tuning(score="given"), "score 'given'"),  # pyright: ignore
        (lambda: sparse(10**6).init(jax.random.key(0), call), r"k 1000000: that is 1000000 of \d+ entries"),
        (lambda: sparse(1, AT).init(jax.random.key(0), call), "leaves no weight an entry"),
        (lambda: sparse_fine_tuning(steps=1).prepare(small_study(float("nan"))), "diverged"),
    ):
        with pytest.raises(ValueError, match=word):
            made()
    with pytest.raises(PatternError, match="near misses"):
        sparse(0.1, "**/querry/kernel").init(jax.random.key(0), call)
    with pytest.raises(KeyError, match=r"moves 'params/heat/kernel'.*did you mean 'params/head/kernel'"):
        compose(params, {"params/heat/kernel": {}})
    assert from_config(sparse_fine_tuning(3, steps=2).config).config["steps"] == 2


# ---------------------------------------------------------------------------------------------------------------- golden

GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "pe-reranking" / "golden.safetensors")
NAMES = sorted(k.removeprefix("sft/start/") for k in GOLDEN if k.startswith("sft/start/"))


def recorded(part):
    return {n: jnp.asarray(GOLDEN[f"sft/{part.replace('*', n)}"]) for n in NAMES}


def test_selection_and_difference_are_those_of_the_papers_code(close):
    start = recorded("start/*")
    for which in ("language", "ranking"):
        mask = lt_select(start, recorded(f"{which}/*/after"), 30)
        assert all((mask[n] == (m != 0)).all() for n, m in recorded(f"{which}/*/mask").items())
        delta = diff(start, recorded(f"{which}/*/second"), mask)
        dense = compose(jax.tree.map(jnp.zeros_like, start), {n.replace(".", "."): d for n, d in delta.items()})
        close(dense, recorded(f"{which}/*/difference"), atol=1e-7)


def test_applying_and_reverting_are_those_of_the_papers_code(close):
    start = recorded("start/*")
    one, two = (diff(start, recorded(f"{w}/*/second")) for w in ("language", "ranking"))
    close(compose(start, one), recorded("one/*"), atol=1e-6)
    close(compose(start, one, two), recorded("both/*"), atol=1e-6)
    close(revert(compose(start, one, two), one), recorded("without/*"), atol=1e-6)
