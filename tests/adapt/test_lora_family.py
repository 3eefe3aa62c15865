"""LoRA, DoRA, IA3 and the trained-leaves methods against their formulas.

float64 where a norm or a scale is compared to 1e-10; the rest in float32 to 1e-5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft
from jaxpeft import adapt, bitfit, dora, full, head, ia3, lora, prompt_tuning
from jaxpeft.models import Encoder
from jaxpeft.models.encoder import EncoderConfig
from jaxpeft.weights import column_norm
from jaxpeft.weights import dora as dora_value

pytestmark = pytest.mark.usefixtures("quick")


def dense(params, x):
    for name in ("one", "two"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return x


@pytest.fixture
def params(key):
    k = jax.random.split(key, 4)
    sizes = {"one": (6, 8), "two": (8, 4)}
    return {
        n: {"kernel": jax.random.normal(k[i], s), "bias": jax.random.normal(k[i + 2], s[1:])}
        for i, (n, s) in enumerate(sizes.items())
    }


@pytest.fixture
def x(key):
    return jax.random.normal(key, (5, 6))


def moved(delta, seed=0, by=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + jnp.asarray(by * rng.normal(size=a.shape), a.dtype), delta)


def by_hand(params, x, kernels, biases=None):
    for n in ("one", "two"):
        x = jnp.tanh(x @ kernels.get(n, params[n]["kernel"]) + (biases or {}).get(n, params[n]["bias"]))
    return x


# ---------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize(("rank", "alpha"), [(1, None), (3, None), (4, 2.0)])
def test_the_scale_is_alpha_over_the_rank_or_over_its_root(scaling, rank, alpha, params, x, key, close):
    adapted = adapt(dense, lora(rank, alpha, at="*/kernel", scaling=scaling), on_dense="refuse")
    delta = moved(adapted.init(key, params, x))
    s = (2 * rank if alpha is None else alpha) / (np.sqrt(rank) if scaling == "rslora" else rank)
    kernels = {n: params[n]["kernel"] + s * delta[f"{n}/kernel"]["a"] @ delta[f"{n}/kernel"]["b"] for n in params}
    close(adapted.apply(params, delta, x), by_hand(params, x, kernels))
    merged = adapted.merge(params, delta)
    close({n: merged[n]["kernel"] for n in params}, kernels)


def test_exceptions_by_pattern_set_rank_and_scale_of_their_weights(params, x, key, close):
    method = lora(2, 4.0, at="*/kernel", rank_pattern={"one/*": 5, "**": 1}, alpha_pattern={"two/**": 8.0})
    adapted = adapt(dense, method, on_dense="refuse")
    delta = moved(adapted.init(key, params, x))
    assert delta["one/kernel"]["a"].shape == (6, 5)
    assert delta["two/kernel"]["a"].shape == (8, 1)
    scales = {"one": 4.0 / 5, "two": 8.0 / 1}
    kernels = {
        n: params[n]["kernel"] + s * delta[f"{n}/kernel"]["a"] @ delta[f"{n}/kernel"]["b"] for n, s in scales.items()
    }
    close(adapted.apply(params, delta, x), by_hand(params, x, kernels))


def test_the_start_is_as_the_reference_code_or_the_paper_has_it(key):
    params, x = {"w": jnp.ones((400, 300))}, jnp.ones((1, 400))
    model = lambda p, x: x @ p["w"]
    start = lambda init: adapt(model, lora(100, at="w", init=init)).init(key, params, x)["w"]
    kaiming, gaussian, zeros = start("kaiming")["a"], start("gaussian")["a"], start("zeros")["a"]
    assert float(jnp.abs(kaiming).max()) <= 1 / 20
    # 40,000 draws: the standard deviation is known to half a percent.
    assert float(kaiming.std()) == pytest.approx(1 / 20 / np.sqrt(3), rel=0.02)
    assert float(gaussian.std()) == pytest.approx(1 / 100, rel=0.02)
    assert not zeros.any()
    assert not start("kaiming")["b"].any()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (dict(rank=0), "rank 0"),
        (dict(dropout=1.0), "dropout 1.0"),
        (dict(scaling="rs"), "rslora"),
        (dict(init="he"), "kaiming"),
    ],
)
@pytest.mark.parametrize("factory", [lora, dora])
def test_arguments_that_no_model_makes_right_are_refused_at_once(factory, arguments, word):
    with pytest.raises(ValueError, match=word):
        factory(**arguments)


def test_a_rank_over_the_matrix_and_weights_that_are_no_matrices_are_refused(params, x, key):
    with pytest.raises(ValueError, match=r"rank 5 for 'two/kernel', a 8 x 4 matrix.*at most 4"):
        adapt(dense, lora(5, at="two/kernel")).init(key, params, x)
    with pytest.raises(ValueError, match=r"'one/bias' is float32\[8\].*Narrow the pattern"):
        adapt(dense, lora(1, at="**")).init(key, params, x)
    integers = {"one": {"kernel": jnp.ones((2, 2), jnp.int32)}}
    with pytest.raises(ValueError, match=r"int32\[2, 2\]"):
        adapt(dense, lora(1, at="**")).init(key, integers, x)


def test_a_delta_of_another_model_is_refused_with_near_names(params, x, key):
    adapted = adapt(dense, lora(2, at="*/kernel"))
    delta = adapted.init(key, params, x)
    with pytest.raises(KeyError, match=r"'one/kernel', which the model lacks; did you mean 'once/kernel'"):
        adapted.apply({"once": params["one"], "two": params["two"]}, delta, x)
    wrong = {**params, "one": {**params["one"], "kernel": jnp.ones((6, 9))}}
    with pytest.raises(ValueError, match=r"shapes \(6, 2\) and \(2, 8\).*\(6, 9\)"):
        adapted.apply(wrong, delta, x)


def test_low_rank_parts_alone_learn_exclusive_or_on_a_frozen_random_network(key):
    """Two bits, one output: the base cannot, rank 2 of its weights can, in forty steps."""
    k = jax.random.split(key, 3)
    params = {
        "one": {"kernel": jax.random.normal(k[0], (2, 16)), "bias": jax.random.normal(k[1], (16,))},
        "two": {"kernel": jax.random.normal(k[2], (16, 1)) / 4, "bias": jnp.zeros(1)},
    }
    x = jnp.array([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    y = jnp.array([[-0.5], [0.5], [0.5], [-0.5]])
    adapted = adapt(dense, lora(1, at="*/kernel"), on_dense="refuse")
    delta = adapted.init(key, params, x)
    assert jaxpeft.count(delta) == 2 + 16 + 16 + 1
    optimiser = optax.adam(0.05)
    loss = lambda d: jnp.mean((adapted.apply(params, d, x) - y) ** 2)

    @jax.jit
    def train(delta):
        def step(carry, _):
            delta, state = carry
            value, grads = jax.value_and_grad(loss)(delta)
            updates, state = optimiser.update(grads, state)
            return (optax.apply_updates(delta, updates), state), value

        return jax.lax.scan(step, (delta, optimiser.init(delta)), None, length=150)

    (learned, _), losses = train(delta)
    assert float(losses[0]) > 0.1
    assert float(losses[-1]) < 1e-3
    assert bool((jnp.sign(adapted.apply(params, learned, x)) == jnp.sign(y)).all())


# ---------------------------------------------------------------------------------------------------------------- DoRA


@pytest.mark.parametrize(
    ("shape", "stack", "inner"), [((6, 5), 0, 1), ((3, 6, 5), 1, 1), ((2, 3, 5), 0, 2), ((6, 2, 3), 0, 1)]
)
def test_column_norms_through_the_factors_are_those_of_the_sum(shape, stack, inner, wide):
    rng = np.random.default_rng(0)
    s, i, o = shape[:stack], shape[stack : stack + inner], shape[stack + inner :]
    w, a, b = rng.normal(size=shape), rng.normal(size=(*s, *i, 2)), rng.normal(size=(*s, 2, *o))
    total = w + 0.7 * np.einsum(
        "sir,sro->sio", a.reshape(-1, int(np.prod(i)), 2), b.reshape(int(np.prod(s)), 2, -1)
    ).reshape(shape)
    want = np.sqrt((total**2).sum(tuple(range(stack, stack + inner))))
    np.testing.assert_allclose(column_norm(*map(jnp.asarray, (w, a, b)), 0.7), want, atol=1e-10)


def test_columns_that_an_update_cancels_stay_finite():
    w = jnp.ones((4, 3))
    norm = column_norm(w, -jnp.ones((4, 1)), jnp.ones((1, 3)))
    assert bool(jnp.isfinite(norm).all())
    assert bool(jnp.isfinite(dora_value(w, -jnp.ones((4, 1)), jnp.ones((1, 3)), jnp.ones(3)).dense()).all())


def test_dora_by_hand_with_magnitudes_of_the_base_at_the_start(wide):
    rng = np.random.default_rng(1)
    params, x = {"w": jnp.asarray(rng.normal(size=(6, 5)))}, jnp.asarray(rng.normal(size=(2, 6)))
    model = lambda p, x: x @ p["w"]
    adapted = adapt(model, dora(2, 3.0, at="w"), on_dense="refuse")
    delta = adapted.init(jax.random.key(0), params, x)
    np.testing.assert_allclose(delta["w"]["magnitude"], np.linalg.norm(params["w"], axis=0), atol=1e-12)
    np.testing.assert_allclose(adapted.apply(params, delta, x), model(params, x), atol=1e-10)
    delta = moved(delta)
    d = delta["w"]
    v = params["w"] + 1.5 * d["a"] @ d["b"]
    want = d["magnitude"] * v / jnp.linalg.norm(v, axis=0)
    np.testing.assert_allclose(adapted.apply(params, delta, x), x @ want, atol=1e-10)
    np.testing.assert_allclose(adapted.merge(params, delta)["w"], want, atol=1e-10)


def test_the_norm_of_dora_is_a_constant_to_the_gradient(wide):
    rng = np.random.default_rng(2)
    params, x = {"w": jnp.asarray(rng.normal(size=(6, 5)))}, jnp.asarray(rng.normal(size=(2, 6)))
    adapted = adapt(lambda p, x: x @ p["w"], dora(2, 2.0, at="w"))
    d = moved(adapted.init(jax.random.key(0), params, x))["w"]
    fixed = jnp.linalg.norm(params["w"] + d["a"] @ d["b"], axis=0)
    want = jax.grad(lambda d: jnp.sum(jnp.sin(x @ (d["magnitude"] * (params["w"] + d["a"] @ d["b"]) / fixed))))(d)
    got = jax.grad(lambda d: jnp.sum(jnp.sin(adapted.apply(params, {"w": d}, x))))(d)
    for name in d:
        np.testing.assert_allclose(got[name], want[name], atol=1e-10)


# ----------------------------------------------------------------------------------------------------------------- IA3


def test_ia3_rescales_outputs_with_their_bias_and_the_inputs_of_the_last_product(params, x, key, close):
    adapted = adapt(dense, ia3(at="one/kernel", feed_forward="two/kernel"), on_dense="refuse")
    delta = adapted.init(key, params, x)
    assert jax.tree.map(jnp.shape, delta) == {"one/kernel": {"out": (8,)}, "two/kernel": {"in": (8,)}}
    assert all(bool((g == 1).all()) for g in jax.tree.leaves(delta))
    delta = moved(delta)
    out, inside = delta["one/kernel"]["out"], delta["two/kernel"]["in"]
    h = jnp.tanh(out * (x @ params["one"]["kernel"] + params["one"]["bias"]))
    want = jnp.tanh((inside * h) @ params["two"]["kernel"] + params["two"]["bias"])
    close(adapted.apply(params, delta, x), want)
    close(dense(adapted.merge(params, delta), x), want)


def test_ia3_without_a_feed_forward_part_leaves_it_alone(params, x, key):
    delta = adapt(dense, ia3(at="*/kernel", feed_forward=None)).init(key, params, x)
    assert [next(iter(d)) for d in delta.values()] == ["out", "out"]


# ------------------------------------------------------------------------------------------------------- trained leaves


@pytest.mark.parametrize("form", ["value", "difference"])
def test_full_tuning_is_the_model_at_the_new_weights(form, params, x, key, close):
    adapted = adapt(dense, full(form=form), on_dense="refuse")
    delta = adapted.init(key, params, x)
    close(adapted.apply(params, delta, x), dense(params, x), atol=0)
    delta = moved(delta)
    get = lambda path: delta[path][form]
    new = {
        n: {k: get(f"{n}/{k}") + (0 if form == "value" else v) for k, v in leaves.items()}
        for n, leaves in params.items()
    }
    close(adapted.apply(params, delta, x), dense(new, x))
    close(adapted.merge(params, delta), new)


def test_full_tuning_copies_the_base_and_passes_over_integers(params, x, key):
    delta = adapt(dense, full()).init(key, params, x)
    assert delta["one/kernel"]["value"] is not params["one"]["kernel"]
    mixed = {**params, "steps": jnp.arange(3)}
    adapted = adapt(lambda p, x: dense(p, x) + p["steps"].sum(), full())
    delta = adapted.init(key, mixed, x)
    assert delta["steps"] == {}
    assert adapted.apply(mixed, delta, x).shape == (5, 4)
    with pytest.raises(ValueError, match="form 'sum'"):
        full(form="sum")


def test_bitfit_and_head_train_what_their_names_say(params, x, key):
    assert sorted(adapt(dense, bitfit("*/bias")).init(key, params, x)) == ["one/bias", "two/bias"]
    assert sorted(adapt(dense, head("two/**")).init(key, params, x)) == ["two/bias", "two/kernel"]


# -------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("init", ["vocabulary", "normal", "uniform"])
def test_a_prompt_is_embeddings_in_front_that_every_token_sees(init, key, close):
    config = EncoderConfig(
        vocab=9, width=8, layers=1, heads=2, head_dim=4, mlp_width=8, max_positions=8, init_std=0.3, plain=True
    )
    model, ids = Encoder(config), jnp.array([[1, 2, 3]])
    params = jax.jit(model.init)(key, ids)
    adapted = adapt(model.apply, prompt_tuning(2, init=init))
    ((place, d),) = adapted.init(key, params, ids).items()
    assert d["prompt"].shape == (2, 8)
    table = params["params"]["embeddings"]["word"]["embedding"]
    if init == "vocabulary":
        assert all(bool((table == row).all(1).any()) for row in d["prompt"])
    # A prompt of two words' embeddings is those two words.
    got = jax.jit(adapted.apply)(params, {place: {"prompt": table[jnp.array([4, 7])]}}, ids)
    close(got, jax.jit(model.apply)(params, jnp.array([[4, 7, 1, 2, 3]])))
    with pytest.raises(ValueError, match="init 'words'"):
        prompt_tuning(init="words")
