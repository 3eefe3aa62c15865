"""MAD-X: the card's oracles, and the outputs of the package `adapters`."""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpeft import PatternError, adapt, chain, head, language_adapter, mad_x, pfeiffer, trees
from jaxpeft.adapt.mad_x import adapter_stack, nice, nice_inverse, with_language
from jaxpeft.models import Encoder, SequenceClassifier, load_model, stack_layers
from jaxpeft.models.encoder import EncoderConfig

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = EncoderConfig(
    vocab=20, width=8, layers=2, heads=2, head_dim=4, mlp_width=16, max_positions=24, init_std=0.3, plain=True
)
IDS = np.random.default_rng(0).integers(2, 20, (3, 6)).astype(np.int32)
MASK = np.ones((3, 6), np.int32)
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]], np.int32)
MODEL = Encoder(CONFIG)
INPUTS = (IDS, MASK, SEGMENTS)


@pytest.fixture(scope="module")
def params():
    made = jax.jit(MODEL.init)(jax.random.key(0), *INPUTS)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), made)


def moved(delta, seed=1, by=0.3):
    rng = np.random.default_rng(seed)
    yes, no = trees.learned(delta)
    return trees.combine(jax.tree.map(lambda x: x + by * jnp.asarray(rng.normal(size=x.shape), x.dtype), yes), no)


def started(params, method, seed=1, model=MODEL):
    adapted = adapt(model.apply, method, on_dense="refuse")
    return adapted, moved(jax.jit(adapted.init)(jax.random.key(2), params, *INPUTS), seed)


@pytest.fixture(scope="module")
def languages(params):
    """Two languages' adapters, of width 4."""
    return [started(params, language_adapter(4), seed)[1] for seed in (3, 4)]


def with_zero_up(delta, prefix=""):
    zero = lambda p, x: jnp.zeros_like(x) if p.rpartition("/")[2] in (f"{prefix}up", f"{prefix}up_bias") else x
    return trees.replace_leaves(delta, {p: zero(p, x) for p, x in trees.by_path(delta).items()})


# ------------------------------------------------------------------------------------------------------------- NICE


def coupling(key, d=8, n=3):
    shapes = {"down": (d // 2, n), "down_bias": (n,), "up": (n, d // 2), "up_bias": (d // 2,)}
    names = [(f"{w}_{m}", s) for w in ("f", "g") for m, s in shapes.items()]
    return {n: jax.random.normal(jax.random.fold_in(key, i), s) for i, (n, s) in enumerate(names)}


def test_the_inverse_undoes_the_map_and_no_volume_changes(key, close):
    p, e = coupling(key), jax.random.normal(key, (2, 5, 8))
    close(nice_inverse(p, nice(p, e)), e)
    close(nice(p, nice_inverse(p, e)), e)
    sign, log = jnp.linalg.slogdet(jax.jacobian(lambda x: nice(p, x))(e[0, 0]))
    assert float(sign) == 1
    assert abs(float(log)) < 1e-5
    assert float(jnp.abs(nice(p, e) - e).max()) > 0.1


def test_the_inverse_stands_before_the_projection_to_the_vocabulary(params, key, close):
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, *inputs):
            return nn.Dense(20, name="decoder")(Encoder(CONFIG, name="backbone")(*inputs))

    model = Masked()
    own = {"params": {"backbone": params["params"], **model.init(key, *INPUTS)["params"]}}
    own["params"]["backbone"] = params["params"]
    method = language_adapter(4, inverse_at="**/decoder")
    adapted, delta = started(own, method, model=model)
    backbone, _ = started(params, language_adapter(4))
    inner = {p.replace("/backbone", ""): d for p, d in delta.items()}
    hidden = backbone.apply(params, inner, *INPUTS)
    back = nice_inverse(delta["params/backbone/embeddings"], hidden)
    decoder = own["params"]["decoder"]
    close(adapted.apply(own, delta, *INPUTS), back @ decoder["kernel"] + decoder["bias"])


# ------------------------------------------------------------------------------------------------------------- stacks


def test_the_stack_is_the_cards_recursion(key, close):
    h, r = jax.random.normal(key, (2, 3, 8))
    scale = jnp.arange(1.0, 9.0)
    norm = lambda x: scale * (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    one, two = (lambda x, k=k: jnp.tanh(k * x) for k in (0.5, 2.0))
    o1 = one(norm(h + r)) + h
    close(adapter_stack(h + r, norm, [one]), norm(o1 + r))
    o2 = two(norm(o1 + r)) + o1
    close(adapter_stack(h + r, norm, [one, two]), norm(o2 + r))
    assert float(jnp.abs(adapter_stack(h + r, norm, [two, one]) - norm(o2 + r)).max()) > 1e-2, "the order counts"


def test_adapters_that_say_nothing_leave_every_layer_as_it_is(params, languages, close):
    base = MODEL.apply(params, *INPUTS)
    adapted, delta = started(params, language_adapter(4, invertible=False))
    assert float(jnp.abs(adapted.apply(params, delta, *INPUTS) - base).max()) > 1e-2
    close(adapted.apply(params, with_zero_up(delta), *INPUTS), base)
    adapted, delta = started(params, mad_x(2, 4, language=with_zero_up(languages[0]), invertible=False))
    close(adapted.apply(params, with_zero_up(with_zero_up(delta), "language_"), *INPUTS), base)


def test_a_silent_task_leaves_the_language_and_a_silent_language_the_task(params, languages, close):
    language, of_language = adapt(MODEL.apply, language_adapter(4)), languages[0]
    adapted = adapt(MODEL.apply, mad_x(2, 4, language=of_language))
    delta = adapted.init(jax.random.key(3), params, *INPUTS)
    close(adapted.apply(params, with_zero_up(delta), *INPUTS), language.apply(params, of_language, *INPUTS))
    # The task adapter's parameters are a Pfeiffer adapter's.
    adapted = adapt(MODEL.apply, mad_x(2, 4, invertible=False))
    delta = moved(adapted.init(jax.random.key(3), params, *INPUTS))
    own = {p: {n: d[n] for n in ("down", "down_bias", "up", "up_bias")} for p, d in delta.items()}
    alone = adapt(MODEL.apply, pfeiffer(2)).apply(params, own, *INPUTS)
    close(adapted.apply(params, with_zero_up(delta, "language_"), *INPUTS), alone)
    assert float(jnp.abs(adapted.apply(params, delta, *INPUTS) - alone).max()) > 1e-2


def test_only_the_task_adapter_is_learned_and_the_language_is_the_one_given(params, languages):
    delta = adapt(MODEL.apply, mad_x(2, 4, language=languages[0])).init(jax.random.key(3), params, *INPUTS)
    learned, _ = trees.learned(delta)
    assert {p.rpartition("/")[2] for p in trees.by_path(learned)} == {"down", "down_bias", "up", "up_bias"}
    for place, named in languages[0].items():
        for n, x in named.items():
            assert (delta[place][f"language_{n}"].value == x).all()


def test_another_language_takes_the_place_and_the_task_stays(params, languages, close):
    adapted = adapt(MODEL.apply, mad_x(2, 4, language=languages[0]))
    delta = moved(adapted.init(jax.random.key(3), params, *INPUTS), 5)
    swapped = with_language(delta, {"language_adapter": languages[1], "head": {}})
    other = adapt(MODEL.apply, mad_x(2, 4, language=languages[1])).init(jax.random.key(3), params, *INPUTS)
    for place, named in swapped.items():
        for n, x in named.items():
            if n.startswith("language_"):
                assert (x.value == other[place][n].value).all()
            else:
                assert (x == delta[place][n]).all()
    got = adapted.apply(params, swapped, *INPUTS)
    assert float(jnp.abs(got - adapted.apply(params, delta, *INPUTS)).max()) > 1e-2
    # The invertible part left out: the same delta under a method without it.
    without = adapt(MODEL.apply, mad_x(2, 4, language=languages[1], invertible=False))
    bare = {p: d for p, d in swapped.items() if "down" in d}
    close(without.apply(params, swapped, *INPUTS), without.apply(params, bare, *INPUTS))
    assert float(jnp.abs(got - without.apply(params, swapped, *INPUTS)).max()) > 1e-2


# -------------------------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize("invertible", [True, False])
def test_a_split_with_the_same_adapter_on_both_sides_is_that_adapter(params, languages, invertible, close):
    one = adapt(MODEL.apply, mad_x(2, 4, language=languages[0], invertible=invertible))
    two = adapt(MODEL.apply, mad_x(2, 4, language=languages[0], query=languages[0], split=True, invertible=invertible))
    delta = one.init(jax.random.key(3), params, *INPUTS)
    both = with_language(delta, query=languages[0])
    close(two.init(jax.random.key(3), params, *INPUTS), both)
    close(two.apply(params, both, *INPUTS), one.apply(params, delta, *INPUTS))


def test_a_split_follows_each_rows_segments(params, languages, close):
    """With all tokens in one segment it is that side's adapter; a row's answer does not depend on the others'."""
    method = mad_x(2, 4, language=languages[0], query=languages[1], split=True)
    adapted = adapt(MODEL.apply, method, on_dense="refuse")
    delta = moved(adapted.init(jax.random.key(3), params, *INPUTS), 5)
    run = lambda segments: adapted.apply(params, delta, IDS, MASK, segments)
    one = adapt(MODEL.apply, mad_x(2, 4))
    task = {p: {n: x for n, x in d.items() if not n.startswith(("language_", "query_"))} for p, d in delta.items()}
    for segment, language in ((0, languages[1]), (1, languages[0])):
        own = adapt(MODEL.apply, mad_x(2, 4, language=language)).init(jax.random.key(3), params, *INPUTS)
        own = {p: {**d, **task[p]} for p, d in own.items()}
        full = np.full_like(SEGMENTS, segment)
        close(run(full), one.apply(params, own, IDS, MASK, full))
    mixed = run(SEGMENTS)
    for i in range(3):
        close(mixed[i : i + 1], adapted.apply(params, delta, IDS[i : i + 1], MASK[i : i + 1], SEGMENTS[i : i + 1]))
    # Segments that no argument gives are those the model counts: all 0.
    close(adapted.apply(params, delta, IDS, MASK), run(np.zeros_like(SEGMENTS)))


@pytest.mark.parametrize("layout", [{"scan": True}, {"scan": True, "remat": True}])
def test_scanned_layers_see_the_segments_too(params, languages, layout, close):
    method = mad_x(2, 4, split=True)
    adapted, delta = started(params, method)
    model = Encoder(dataclasses.replace(CONFIG, **layout))
    stacked = stack_layers(params)
    scanned = adapt(model.apply, method, on_dense="refuse")
    shapes = jax.eval_shape(scanned.init, jax.random.key(2), stacked, *INPUTS)
    parts = [delta[f"params/layers_{i}/mlp_norm"] for i in range(2)]
    own = {"params/embeddings": delta["params/embeddings"], "params/layers/mlp_norm": trees.stack(parts)}
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, shapes)
    loss = lambda adapted, params: lambda d: jnp.sin(adapted.apply(params, d, *INPUTS)).sum()
    close(jax.jit(loss(scanned, stacked))(own), jax.jit(loss(adapted, params))(delta))
    a, b = (
        jax.grad(lambda yes, no, run=run: run(trees.combine(yes, no)))(*trees.learned(d))
        for run, d in ((loss(scanned, stacked), own), (loss(adapted, params), delta))
    )
    close(
        trees.by_path(a)["params/layers/mlp_norm/up"],
        jnp.stack([trees.by_path(b)[f"params/layers_{i}/mlp_norm/up"] for i in range(2)]),
        atol=1e-4,
    )


def test_a_narrow_last_layer_gives_the_same_scores(params, languages, close):
    whole = SequenceClassifier(CONFIG, 1, "first")
    narrow = SequenceClassifier(dataclasses.replace(CONFIG, narrow=True), 1, "first")
    own = whole.init(jax.random.key(0), *INPUTS)
    method = chain(mad_x(2, 4, split=True), head())
    adapted, delta = started(own, method, model=whole)
    close(adapt(narrow.apply, method).apply(own, delta, *INPUTS), adapted.apply(own, delta, *INPUTS))


# -------------------------------------------------------------------------------------------------- counts, dtype, errors


def test_the_papers_numbers_of_parameters():
    model = Encoder(EncoderConfig(vocab=30, width=768, layers=12, heads=12, head_dim=64, mlp_width=3072))
    ids = jnp.ones((1, 4), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)

    def count(method):
        made = jax.eval_shape(lambda k, p: adapt(model.apply, method).init(k, p, ids), jax.random.key(0), shapes)
        return trees.count(trees.learned(made)[0])

    ranks = {1: 14_174_208, 2: 7_091_712, 32: 451_872}
    for factor, parameters in ranks.items():
        assert count(mad_x(768 // factor, 384)) == parameters
    assert count(language_adapter(384)) - count(language_adapter(384, invertible=False)) == 296_064
    assert count(language_adapter(384)) == 7_387_776


def test_half_precision_activations_keep_their_dtype(params, languages):
    model = Encoder(dataclasses.replace(CONFIG, dtype=jnp.bfloat16))
    adapted = adapt(model.apply, mad_x(2, 4, split=True))
    with jax.numpy_dtype_promotion("strict"):
        y = jax.jit(lambda: adapted.apply(params, adapted.init(jax.random.key(0), params, *INPUTS), *INPUTS))()
    assert y.dtype == jnp.bfloat16
    assert bool(jnp.isfinite(y.astype(jnp.float32)).all())


def test_bad_arguments_are_refused(params, languages):
    for made in (lambda: language_adapter(0), lambda: mad_x(2, 0), lambda: language_adapter(2, invertible_rank=0)):
        with pytest.raises(ValueError, match=r"rank 0: a bottleneck is at least 1"):
            made()
    with pytest.raises(ValueError, match="split=True"):
        mad_x(2, 4, query=languages[0])
    with pytest.raises(ValueError, match=r"language adapter has \(8, 4\) as 'down' .* \(8, 5\) is expected"):
        started(params, mad_x(2, 5, language=languages[0]))
    with pytest.raises(ValueError, match=r"has nothing as 'f_down'"):
        started(params, mad_x(2, 4, language={p: d for p, d in languages[0].items() if "down" in d}))
    with pytest.raises(ValueError, match=r"before 'embeddings': does `segments_at` match"):
        started(params, mad_x(2, 4, split=True, segments_at="**/embeddings/typ"))
    with pytest.raises(PatternError, match=r"near misses: .*layers_0/mlp_norm"):
        started(params, mad_x(2, 4, at="**/mlpnorm"))
    odd = Encoder(dataclasses.replace(CONFIG, width=9))
    with pytest.raises(ValueError, match="9 is odd"):
        started(odd.init(jax.random.key(0), IDS), language_adapter(2), model=odd)


# ------------------------------------------------------------------------------------------------------------- golden

GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "pe-reranking" / "golden.safetensors")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The recorded BERT, and its adapters in our names."""
    folder = tmp_path_factory.mktemp("bert")
    tensors = {k.removeprefix("base/"): v for k, v in GOLDEN.items() if k.startswith("base/")}
    config = dict(model_type="bert", vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    config |= dict(intermediate_size=12, max_position_embeddings=16, architectures=["BertModel"])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    model, params = load_model(folder)
    inputs = tuple(GOLDEN[n] for n in ("ids", "mask", "types"))

    def arrays(stem, down, up):
        p = {"down": GOLDEN[f"{stem}{down}.weight"].T, "down_bias": GOLDEN[f"{stem}{down}.bias"]}
        p |= {"up": GOLDEN[f"{stem}{up}.weight"].T, "up_bias": GOLDEN[f"{stem}{up}.bias"]}
        return jax.tree.map(jnp.asarray, p)

    def adapter(name):
        return {f"params/layers_{i}/mlp_norm": arrays(f"{name}/{i}/", "adapter_down.0", "adapter_up") for i in range(2)}

    def invertible(name):
        parts = {w: arrays(f"{name}/nice/{w.upper()}.", "0", "2") for w in ("f", "g")}
        return {"params/embeddings": {f"{w}_{n}": x for w, p in parts.items() for n, x in p.items()}}

    return model, params, inputs, adapter, invertible


def test_the_invertible_adapter_is_that_of_the_package(bert, close):
    _, _, _, _, invertible = bert
    p, x = invertible("en")["params/embeddings"], jnp.asarray(GOLDEN["inverse/input"])
    close(nice(p, x), GOLDEN["forward/output"])
    close(nice_inverse(p, x), GOLDEN["inverse/output"])


def test_one_adapter_and_a_language_alone_are_those_of_the_package(bert, close):
    model, params, inputs, adapter, invertible = bert
    close(adapt(model.apply, pfeiffer(2)).apply(params, adapter("ir"), *inputs), GOLDEN["hidden/task"], atol=2e-5)
    language = {**adapter("en"), **invertible("en")}
    close(
        adapt(model.apply, language_adapter(4, invertible_rank=2)).apply(params, language, *inputs),
        GOLDEN["hidden/language"],
        atol=2e-5,
    )


@pytest.mark.parametrize("case", ["stack", "stack without nice", "split", "split without nice"])
def test_stacks_and_splits_are_those_of_the_package(case, bert, close):
    """The package's split applies the first adapter's NICE to all tokens: so both sides are given it."""
    model, params, inputs, adapter, invertible = bert
    en, de = ({**adapter(n), **invertible("en")} for n in ("en", "de"))
    split = {"language": de, "query": en, "split": True} if "split" in case else {"language": en}
    adapted = adapt(model.apply, mad_x(2, 4, **split, invertible="without" not in case, invertible_rank=2))
    delta = adapted.init(jax.random.key(0), params, *inputs)
    task = adapter("ir")
    delta = {p: {**d, **task.get(p, {})} for p, d in delta.items()}
    close(adapted.apply(params, delta, *inputs), GOLDEN[f"hidden/{case}"], atol=2e-5)
