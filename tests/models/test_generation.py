"""A cache changes nothing but the time: token for token what full forward passes give, alone, padded, adapted, mixed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_configs import HF

import jaxpeft
from jaxpeft.models import (
    FULL,
    INT8,
    Sampling,
    decoding,
    generate,
    model_from_config,
    new_cache,
    positions_from_mask,
    stack_layers,
)
from jaxpeft.models.cache import dequantise, quantise, write
from jaxpeft.models.generation import cut, draw

pytestmark = pytest.mark.usefixtures("quick")
FAMILIES = ["gpt2", "llama"]
PROMPT = np.array([[3, 7, 11, 5], [0, 0, 9, 4], [0, 8, 2, 6]], np.int32)
MASK = np.array([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]], np.int32)
NEW = 5


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@functools.lru_cache
def decoder(family, scan=False):
    plain = model_from_config(HF[family])
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), *plain.dummy_inputs())
    params = jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype(x.dtype), shapes)
    return model_from_config(HF[family], scan=scan), stack_layers(params) if scan else params


def cached(model, apply, ids=PROMPT, mask=MASK, storage=FULL, **kwargs):
    """`generate` with one model as one program; `apply` is called as `decoding(model)` without the parameters."""
    capacity = ids.shape[1] + NEW - 1
    run = lambda ids, mask: generate(
        apply, new_cache(model.config, ids.shape[0], capacity, storage), ids, mask, new_tokens=NEW, **kwargs
    )
    return jax.jit(run)(ids, mask)


@functools.lru_cache
def greedy(family, scan=False, storage=FULL):
    """The plain case of a family, which several tests compare with."""
    model, params = decoder(family, scan)
    return cached(model, functools.partial(decoding(model), params), storage=storage)


def by_full_passes(apply, ids=PROMPT, mask=MASK):
    """Greedy tokens, each from a forward pass over all before it: `apply(ids, mask, positions) -> logits`."""
    at = ids.shape[1]
    ids, mask = (np.pad(x, ((0, 0), (0, NEW))) for x in (ids, mask))
    run = jax.jit(lambda ids, mask, last: apply(ids, mask, positions_from_mask(mask))[:, last].argmax(-1))
    for i in range(at, at + NEW):
        ids[:, i], mask[:, i] = run(ids, mask, i - 1), 1
    return ids[:, at:]


def full(model, params):
    return lambda ids, mask, positions: model.apply(params, ids, mask, positions=positions)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_with_a_cache_is_greedy_by_full_passes_token_for_token(family, scan):
    out = greedy(family, scan)
    np.testing.assert_array_equal(out.tokens, by_full_passes(full(*decoder(family))))
    np.testing.assert_array_equal(out.lengths, NEW)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_pieces_are_the_logits_of_the_whole(family, scan, close):
    model, params = decoder(family, scan)
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    want = jax.jit(model.apply)(params, ids)
    step = jax.jit(lambda ids, cache: model.apply(params, ids, cache=cache))
    cache, got = new_cache(model.config, 2, 8), []
    for piece in (ids[:, :3], ids[:, 3:5], ids[:, 5:]):
        logits, cache = step(piece, cache)
        got.append(logits)
    close(jnp.concatenate(got, 1), want)
    np.testing.assert_array_equal(cache.length, 6)
    np.testing.assert_array_equal(cache.real, np.arange(8)[None].repeat(2, 0) < 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_is_each_row_alone(family, close):
    model, params = decoder(family)
    out, i = greedy(family), 1
    alone = cached(model, functools.partial(decoding(model), params), PROMPT[i : i + 1, MASK[i] == 1], None)
    np.testing.assert_array_equal(out.tokens[i], alone.tokens[0])
    close(out.log_probs[i], alone.log_probs[0])


METHODS = {
    "lora": jaxpeft.lora(rank=2, at="**/attention/{qkv,query,value}/kernel"),
    "houlsby": jaxpeft.houlsby(rank=2),
    "prefix_tuning": jaxpeft.prefix_tuning(2, mlp=3),
}


@functools.lru_cache
def two_deltas(name, family):
    model, params = decoder(family)
    adapted = jaxpeft.adapt(model.apply, METHODS[name], on_dense="refuse")
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(adapted.init, jax.random.key(0), params, PROMPT, MASK)
    return [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes) for _ in range(2)]


@pytest.mark.parametrize(("name", "family"), [("lora", "gpt2"), ("houlsby", "llama"), ("prefix_tuning", "gpt2")])
def test_each_sequence_with_its_own_adapter_is_each_adapter_alone_by_full_passes(name, family):
    """Every mechanism acts on a call with a cache as on one without, and a mixed batch as separate runs."""
    model, params = decoder(family)
    deltas = two_deltas(name, family)
    serving = jaxpeft.many(jaxpeft.adapt(decoding(model), METHODS[name], on_dense="refuse"), 2)
    held, insert = serving.empty(deltas[0]), jax.jit(serving.insert)
    for slot, delta in enumerate(deltas):
        held = insert(held, slot, delta)
    which = jnp.array([1, -1, 0])
    out = cached(model, lambda *inputs: serving.apply(params, held, which, *inputs))
    adapted = jaxpeft.adapt(model.apply, METHODS[name])
    np.testing.assert_array_equal(out.tokens[1], greedy(family).tokens[1])
    for row, delta in ((0, deltas[1]), (2, deltas[0])):
        alone = lambda ids, mask, p, delta=delta: adapted.apply(params, delta, ids, mask, positions=p)
        np.testing.assert_array_equal(out.tokens[row], by_full_passes(alone)[row])


def test_a_stop_token_ends_a_row_and_is_its_last():
    model, params = decoder("gpt2")
    step = functools.partial(decoding(model), params)
    free = greedy("gpt2")
    stop = int(free.tokens[0, 2])
    out = cached(model, step, stop=(stop, 99), pad=17)
    for row, tokens in enumerate(np.asarray(free.tokens)):
        hits = np.flatnonzero(tokens == stop)
        n = hits[0] + 1 if len(hits) else NEW
        assert out.lengths[row] == n
        np.testing.assert_array_equal(out.tokens[row], [*tokens[:n], *[17] * (NEW - n)])
        np.testing.assert_allclose(out.log_probs[row, :n], free.log_probs[row, :n], atol=1e-6)
        assert not np.any(out.log_probs[row, n:])


def test_log_probabilities_are_the_models_own(close):
    model, params = decoder("llama")
    ids = PROMPT[:1]
    out = cached(model, functools.partial(decoding(model), params), ids, None, key=jax.random.key(1))
    logits = jax.jit(model.apply)(params, jnp.concatenate([ids, out.tokens], 1))
    scores = jax.nn.log_softmax(logits[0, ids.shape[1] - 1 : -1])
    close(out.log_probs[0], jnp.take_along_axis(scores, out.tokens[0][:, None], 1)[:, 0])


def test_a_key_decides_what_is_sampled():
    model, params = decoder("gpt2")
    step = functools.partial(decoding(model), params)
    run = jax.jit(
        lambda key: generate(step, new_cache(model.config, 3, 8), PROMPT, MASK, new_tokens=NEW, key=key).tokens
    )
    a, b, c = (run(jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert np.any(a != c)


# ------------------------------------------------------------------------------------------------------ several models


def test_a_model_combined_with_itself_is_itself(close):
    model, params = decoder("gpt2")
    step = functools.partial(decoding(model), params)
    cache = new_cache(model.config, 3, 8)
    pair = jax.jit(
        lambda: generate([step, step], [cache, cache], PROMPT, MASK, new_tokens=NEW, combine=lambda x: sum(x) / len(x))
    )()
    close(pair, greedy("gpt2"))


def test_two_models_side_by_side_are_their_logits_joined():
    """Product of experts, of two families: each keeps its own cache."""
    (a, p), (b, q) = decoder("gpt2"), decoder("llama")
    steps = [functools.partial(decoding(a), p), functools.partial(decoding(b), q)]
    caches = [new_cache(m.config, 3, 8) for m in (a, b)]
    out = jax.jit(lambda: generate(steps, caches, PROMPT, MASK, new_tokens=NEW, combine=lambda x: x[0] + 0.5 * x[1]))()
    both = lambda *x: full(a, p)(*x) + 0.5 * full(b, q)(*x)
    np.testing.assert_array_equal(out.tokens, by_full_passes(both))


# ------------------------------------------------------------------------------------------------------------ sampling

ROWS = st.lists(st.integers(-6, 6), min_size=6, max_size=6).map(lambda x: np.array([x], np.float32))
cutting = jax.jit(cut)


@given(ROWS, st.integers(1, 8))
def test_top_k_keeps_the_k_largest_and_what_ties_with_the_last(row, k):
    kept = np.isfinite(cutting(row, k))[0]
    threshold = np.sort(row[0])[::-1][min(k, 6) - 1]
    np.testing.assert_array_equal(kept, row[0] >= threshold)


@given(ROWS, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_p(row, p):
    kept = np.isfinite(cutting(row, None, p))[0]
    mass = np.exp(row[0] - row[0].max()).astype(np.float64)
    mass /= mass.sum()
    assert mass[kept].sum() >= p - 1e-5
    assert kept[row[0].argmax()]
    smallest = row[0][kept].min()
    assert kept[row[0] >= smallest].all(), "nothing less probable is kept instead"
    assert mass[row[0] > smallest].sum() < p + 1e-5, "without the last ones p is not reached"


def test_cutting_nothing_keeps_everything():
    row = jax.random.normal(jax.random.key(0), (1, 50)) * 20
    np.testing.assert_array_equal(cutting(row, 50, 1.0), row)


def test_each_row_may_be_cut_in_its_own_way():
    row = np.tile(np.arange(4, dtype=np.float32), (3, 1))
    kept = np.isfinite(cutting(row, np.array([1, 2, 4]))).sum(1)
    np.testing.assert_array_equal(kept, [1, 2, 4])


def test_samples_are_distributed_as_the_softmax_at_that_temperature():
    logits, n = np.array([0.0, 1.0, 2.0, -1.0, 0.5], np.float32), 20000
    for sampling, temperature, cut_at in (
        (Sampling(), 1.0, -9),
        (Sampling(0.5), 0.5, -9),
        (Sampling(2.0, top_k=3), 2.0, 0.5),
    ):
        draws = jax.jit(draw, static_argnums=2)(jax.random.key(0), np.tile(logits, (n, 1)), sampling)
        p = np.where(logits >= cut_at, np.exp(logits / temperature), 0.0)
        p /= p.sum()
        seen = np.bincount(np.asarray(draws), minlength=5)
        assert not seen[p == 0].any()
        squares = ((seen - n * p)[p > 0] ** 2 / (n * p[p > 0])).sum()
        assert squares < 23.5, "chi-square with 4 degrees of freedom passes this once in ten thousand draws"


# ------------------------------------------------------------------------------------------------------------- storage


@given(st.integers(0, 1000), st.sampled_from([1e-3, 1.0, 1e3]), st.sampled_from(["float32", "bfloat16"]))
def test_a_quantised_number_is_off_by_half_a_step_at_most(seed, size, dtype):
    x = size * np.random.default_rng(seed).normal(size=(3, 4))
    x[0] = 0
    x = jnp.asarray(x, dtype)
    q = jax.jit(quantise)(x)
    assert q["code"].dtype == jnp.int8
    step = np.asarray(q["scale"], np.float64)[:, None]
    kept = np.asarray(q["code"], np.float64) * step
    assert np.all(np.abs(kept - np.asarray(x, np.float64)) <= 0.501 * step)
    np.testing.assert_allclose(
        np.asarray(dequantise(q), np.float64), kept, rtol=2.0**-8 if dtype == "bfloat16" else 1e-6
    )


@pytest.mark.parametrize("scan", [False, True])
def test_a_quantised_cache_is_near_the_full_one_and_a_quarter_of_its_size(scan):
    model, _ = decoder("llama", scan)
    exact, rough = (greedy("llama", scan, storage).log_probs[:, :2] for storage in (FULL, INT8))
    assert 0 < np.abs(exact - rough).max() < 0.1
    sizes = {}
    for name, storage in (("full", FULL), ("int8", INT8)):
        wide = dataclasses.replace(model.config, head_dim=64)
        sizes[name] = jaxpeft.nbytes(jax.eval_shape(lambda s=storage: new_cache(wide, 2, 16, s).layers))
    assert sizes["int8"] == sizes["full"] * (64 + 4) / (4 * 64)


@given(st.integers(0, 3), st.lists(st.integers(0, 5), min_size=2, max_size=2))
def test_columns_are_written_where_they_belong_and_never_over_the_end(t, at):
    kept, new = np.zeros((2, 5, 1), np.float32), np.ones((2, t, 1), np.float32)
    got = write(jnp.asarray(kept), jnp.asarray(new), jnp.array(at))
    for row, a in enumerate(at):
        if a + t <= 5:
            kept[row, a : a + t] = 1
    np.testing.assert_array_equal(got, kept)


# -------------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_generated_is_refused_before_anything_is_compiled():
    model, params = decoder("gpt2")
    step = functools.partial(decoding(model), params)
    room = new_cache(model.config, 3, 8)
    wrong = {
        "new_tokens 0": dict(new_tokens=0),
        r"cache of 8 columns for 4 of the prompt and 6 new: it needs 9": dict(new_tokens=6),
        r"mask has shape \(3, 3\)": dict(mask=MASK[:, 1:]),
        "pad prompts on the left": dict(mask=MASK[:, ::-1]),
        "temperature 0": dict(sampling=Sampling(0)),
        "top_k 0": dict(sampling=Sampling(top_k=0)),
        r"top_p 1\.5": dict(sampling=Sampling(top_p=1.5)),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            generate(step, room, PROMPT, **{"mask": MASK, "new_tokens": 5, **arguments})
    with pytest.raises(ValueError, match="2 models need combine="):
        generate([step, step], [room, room], PROMPT, MASK, new_tokens=5)
    with pytest.raises(ValueError, match="2 models and 1 caches"):
        generate([step, step], [room], PROMPT, MASK, new_tokens=5)
    with pytest.raises(ValueError, match="0 columns"):
        new_cache(model.config, 1, 0)
    with pytest.raises(ValueError, match="3 rows of 4 columns for a cache of 2 rows of 8"):
        jax.eval_shape(step, PROMPT, MASK, MASK, new_cache(model.config, 2, 8))
    more = dataclasses.replace(model.config, layers=3)
    with pytest.raises(ValueError, match="a cache of 3 layers for a decoder of 2"):
        jax.eval_shape(step, PROMPT, MASK, MASK, new_cache(more, 3, 8))


@pytest.mark.parametrize(
    ("method", "message"),
    [(jaxpeft.prompt_tuning(2), "4 ids became 6 embeddings"), (jaxpeft.lst(2), "a side network has no cache")],
)
def test_a_method_that_a_cache_would_make_wrong_is_refused(method, message):
    model, params = decoder("gpt2")
    adapted = jaxpeft.adapt(model.apply, method)
    delta = jax.eval_shape(adapted.init, jax.random.key(0), params, PROMPT)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(adapted.apply, cache=new_cache(model.config, 3, 8)), params, delta, PROMPT)
