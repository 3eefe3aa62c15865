"""UniPT: the card's laws, the papers' code's numbers, every model, a backward pass that stays out of the backbone."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name
from safetensors.numpy import load_file
from test_ladder import IDS, MASK, cost, made, moved, wide

from jaxpeft import adapt, chain, from_config, head, lora, prompt_tuning, read, trees
from jaxpeft.adapt.unipt import confidence, interaction, parallel, unipt, up, weights
from jaxpeft.models import Encoder, SequenceClassifier, mean_pool, stack_layers
from jaxpeft.readers import TapError
from jaxpeft.updates import descend

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "unipt" / "golden.safetensors")


@pytest.fixture
def draw(key):
    """draw(*shape), another array at each call."""
    count = iter(range(100))
    return lambda *shape: jax.random.normal(jax.random.fold_in(key, next(count)), shape)


def phi_of(draw, n, d=6, m=4, hidden=True):
    """One stack's parameters, all at random."""
    norm = lambda *s: {"scale": 1 + draw(*s), "bias": draw(*s)}
    linear = lambda i, o, *s: {"kernel": draw(*s, i, o), "bias": draw(*s, o)}
    phi = {"down": linear(d, m, n + 1), "down_norm": norm(n + 1, m), "gate": draw(m), "merge_norm": norm(m)}
    return phi | ({"merge_in": linear(m, d), "merge": linear(d, m)} if hidden else {"merge": linear(m, m)})


@pytest.fixture
def careful(quick):
    """Programs as they are compiled outside of tests: what they cost is asked."""
    jax.config.update("jax_disable_most_optimizations", False)


def run(phi, states, mask=None, memory=None, **options):
    """`parallel`, compiled whole: one by one its operations would take longer to compile."""
    return jax.jit(functools.partial(parallel, **options))(phi, states, mask, memory)


def drawn(adapted, params, *inputs, seed=1):
    """A delta away from its start, without compiling that."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(adapted.init, jax.random.key(0), params, *inputs)
    around = lambda path, x: 1.0 if path.endswith("scale") else 0.0
    new = {p: around(p, x) + 0.3 * rng.normal(size=x.shape) for p, x in trees.by_path(shapes).items()}
    return trees.replace_leaves(shapes, {p: jnp.asarray(x, jnp.float32) for p, x in new.items()})


# ------------------------------------------------------------------------------------------------------ the card's laws


def test_rows_of_the_weights_sum_to_one_or_to_zero(draw):
    a = weights(draw(2, 5, 3), draw(2, 5, 3), jnp.asarray(MASK[:2, :5]), eps=1e-8)
    sums = np.asarray(a.sum(-1))
    assert np.all((np.abs(sums - 1) < 1e-5) | (sums == 0))
    assert float(a[1, :, 3:].max()) == 0, "padded keys"
    far = weights(-jnp.abs(draw(1, 4, 3)), jnp.abs(draw(1, 4, 3)), eps=1e-8)
    assert float(jnp.abs(far).max()) == 0


def test_with_one_position_the_feature_is_kept_or_doubled():
    guide = jnp.array([[[1.0, 2.0]], [[-1.0, -1.0]]])
    feature = jnp.array([[[3.0, 1.0]], [[3.0, 1.0]]])
    got = interaction(guide, feature, eps=1e-12)
    np.testing.assert_allclose(got, [[[6, 2]], [[3, 1]]], atol=1e-6)


def test_where_nothing_is_similar_features_stay_and_their_gradients_are_finite(draw):
    guide, feature = -jnp.abs(draw(2, 4, 3)), jnp.abs(draw(2, 4, 3))
    np.testing.assert_array_equal(interaction(guide, feature), feature)
    grads = jax.grad(lambda g, f: interaction(g, f).sum(), (0, 1))(guide, feature)
    assert all(bool(jnp.isfinite(g).all()) for g in grads)


def test_the_guides_length_does_not_matter_to_the_weights(draw):
    guide, feature = draw(2, 5, 3), draw(2, 5, 3)
    a = weights(guide, feature, eps=1e-12)
    np.testing.assert_allclose(weights(7 * guide, feature, eps=1e-12), a, atol=1e-6)
    assert float(jnp.abs(weights(guide, feature, eps=1.0) - a).max()) > 1e-2, "the control: a large eps"


def test_confidences_sum_to_one_and_are_even_for_identical_layers_and_for_no_gate(draw):
    guide, f = draw(2, 5, 3), [draw(2, 5, 3) for _ in range(3)]
    c = confidence(draw(3), guide, f)
    assert c.shape == (2, 1, 3)
    np.testing.assert_allclose(c.sum(-1), 1, atol=1e-6)
    assert float(jnp.ptp(c)) > 0.05
    np.testing.assert_allclose(confidence(draw(3), guide, [f[0]] * 3), 1 / 3, atol=1e-6)
    np.testing.assert_allclose(confidence(jnp.zeros(3), guide, f), 1 / 3, atol=1e-6)
    # A row without valid positions has the mean zero.
    np.testing.assert_allclose(confidence(draw(3), guide, f, jnp.zeros((2, 5), jnp.int32)), 1 / 3, atol=1e-6)


def test_identical_layers_give_one_layers_sum(draw, close):
    phi, h, last = phi_of(draw, 3), draw(2, 5, 6), draw(2, 5, 6)
    same = {**phi, **{n: jax.tree.map(lambda x: x.at[1:3].set(x[:1]), phi[n]) for n in ("down", "down_norm")}}
    few = {**same, **{n: jax.tree.map(lambda x: x[2:], same[n]) for n in ("down", "down_norm")}}
    close(run(same, [h, h, h, last]), run(few, [h, last]))


def test_without_its_merge_it_is_a_probe_of_the_guide(draw, close):
    phi = phi_of(draw, 2)
    phi["merge_norm"] = jax.tree.map(jnp.zeros_like, phi["merge_norm"])
    states = [draw(2, 5, 6) for _ in range(3)]
    alone = {**phi, **{n: jax.tree.map(lambda x: x[2:], phi[n]) for n in ("down", "down_norm")}}
    close(run(phi, states), run(alone, states[2:]))
    x, w = draw(2, 5, 4), {"up": {"kernel": draw(4, 6), "bias": draw(6)}}
    close(up(w, x, "vqa"), x @ w["up"]["kernel"] + w["up"]["bias"])
    close(up(w, x, "retrieval"), jax.nn.relu(x) @ w["up"]["kernel"] + w["up"]["bias"])


def test_tokens_may_be_permuted(draw, close):
    phi, states = phi_of(draw, 2), [draw(2, 5, 6) for _ in range(3)]
    order = np.array([3, 0, 4, 1, 2])
    close(run(phi, [s[:, order] for s in states]), run(phi, states)[:, order])


def test_padding_changes_nothing_at_valid_positions(draw, close):
    phi, states = phi_of(draw, 2), [draw(2, 4, 6) for _ in range(3)]
    longer = [jnp.concatenate([s, draw(2, 3, 6)], axis=1) for s in states]
    mask = jnp.asarray(np.repeat([[1] * 4 + [0] * 3], 2, 0))
    close(run(phi, longer, mask)[:, :4], run(phi, states))
    assert float(jnp.abs(run(phi, longer)[:, :4] - run(phi, states)).max()) > 1e-3


def test_causal_positions_see_what_a_shorter_text_would_show_them(draw, close):
    phi, states = phi_of(draw, 2), [draw(2, 5, 6) for _ in range(3)]
    whole = run(phi, states, causal=True)
    for t in range(1, 6):
        close(whole[:, t - 1], run(phi, [s[:, :t] for s in states])[:, -1])


def test_without_interaction_and_confidence_it_is_the_mean_of_the_layers(draw, close):
    phi, states = phi_of(draw, 2, hidden=False), [draw(2, 5, 6) for _ in range(3)]
    got = run(phi, states, interact=False, confident=False)
    plain = lambda i: run({n: jax.tree.map(lambda x: x[i : i + 1], phi[n]) for n in ("down", "down_norm")}, [states[i]])
    merged = (plain(0) + plain(1)) / 2 @ phi["merge"]["kernel"] + phi["merge"]["bias"]
    mean, var = merged.mean(-1, keepdims=True), merged.var(-1, keepdims=True)
    normed = (merged - mean) / jnp.sqrt(var + 1e-5) * phi["merge_norm"]["scale"] + phi["merge_norm"]["bias"]
    close(got, plain(2) + normed)


def test_recomputed_maps_change_no_number(draw, close):
    phi, states = phi_of(draw, 2), [draw(2, 5, 6) for _ in range(3)]
    grad = lambda remat: jax.jit(jax.grad(lambda p: jnp.sin(parallel(p, states, remat=remat)).sum()))(phi)
    close(grad(True), grad(False))


# ------------------------------------------------------------------------------------------------ the reference's numbers


def golden(part, *path):
    """The named module's parameters in our layout; `{}` in a path stands for the numbers it is stacked over."""
    held = {k.removeprefix(f"{part}.parameters."): v for k, v in GOLDEN.items() if k.startswith(f"{part}.parameters.")}

    def one(name):
        w, b = held[f"{name}.weight"], held[f"{name}.bias"]
        return {"kernel": w.T, "bias": b} if w.ndim == 2 else {"scale": w, "bias": b}

    parts = [one(name) for name in path]
    return jax.tree.map(lambda *x: np.stack(x), *parts) if len(parts) > 1 else parts[0]


# float32 sums in another order, through two norms.
TOLERANCE = 2e-6


def test_the_retrieval_form_is_that_of_the_papers_code(close):
    take = functools.partial(golden, "retrieval")
    phi = {
        "down": take(*(f"downsample_layers.{i}.0" for i in range(4))),
        "down_norm": take(*(f"downsample_layers.{i}.1" for i in range(4))),
        "gate": GOLDEN["retrieval.parameters.gate_layer.weight"][0],
        "merge": take("projection_layer.0"),
        "merge_norm": take("projection_layer.1"),
    }
    mask = np.arange(5)[None] < GOLDEN["retrieval.lengths"][:, None]
    x = run(phi, list(jnp.asarray(GOLDEN["retrieval.features"])), jnp.asarray(mask, jnp.int32), eps=1e-8)
    close(up({"up": take("upsample_layer.1")}, x, "retrieval"), GOLDEN["retrieval.output"], atol=TOLERANCE)


def test_the_vqa_form_is_that_of_the_papers_code(close):
    take = functools.partial(golden, "vqa")
    downs = ["side_downsamples_l.0", "side_downsamples_l.1", "side_downsamples_l.2"]
    phi = {
        "down": take(*(f"{n}.0" for n in ("side_first_downsample_l", *downs))),
        "down_norm": take(*(f"{n}.1" for n in ("side_first_downsample_l", *downs))),
        "gate": GOLDEN["vqa.parameters.side_gate_layer_l.weight"][0],
        "merge_in": take("side_projection_l.0"),
        "merge": take("side_projection_l.2"),
        "merge_norm": take("side_projection_l.3"),
    }
    x = run(phi, list(jnp.asarray(GOLDEN["vqa.features"])), jnp.asarray(GOLDEN["vqa.mask"]))
    close(up({"up": take("side_final_upsample_l.0")}, x, "vqa"), GOLDEN["vqa.output"], atol=TOLERANCE)


def test_the_grounding_form_and_its_memory_are_those_of_the_papers_code(close):
    take = functools.partial(golden, "grounding")

    def stack(name):
        order = [f"side_downsamples_{name}.{i}" for i in range(3)] + [f"side_downsample0_{name}"]
        return {
            "down": take(*(f"{n}.0" for n in order)),
            "down_norm": take(*(f"{n}.1" for n in order)),
            "gate": GOLDEN[f"grounding.parameters.side_gate_layer_{name}.weight"][0],
            "merge_in": take(f"side_projection_{name}.0"),
            "merge": take(f"side_projection_{name}.2"),
            "merge_norm": take(f"side_projection_{name}.3"),
        }

    cross = {
        f"cross{end}": take(*(f"side_projection_crosser.{i}.{j}" for i in range(3)))
        for j, end in enumerate(("", "_norm"))
    }
    chosen = lambda name: [jnp.asarray(GOLDEN[f"grounding.{name}"][i]) for i in (1, 3, 5, 6)]
    mask = jnp.asarray(GOLDEN["grounding.mask"])
    memory = run(stack("encoder"), chosen("encoder"), mask, eps=1e-7)
    close(memory, GOLDEN["grounding.memory"], atol=TOLERANCE)
    x = run(stack("decoder") | cross, chosen("decoder"), None, (memory, mask), eps=1e-7)
    ends = {"up": take("side_final_upsample.1"), "up_norm": take("side_final_upsample.2")}
    close(up(ends, x, "grounding"), GOLDEN["grounding.output"], atol=TOLERANCE)


# ------------------------------------------------------------------------------------------------- models and layouts


def test_it_answers_by_all_states_in_place_of_the_last(close):
    model, params, inputs = made("bert")
    adapted = adapt(model.apply, unipt(2, states=(0, 2)), on_dense="refuse")
    delta = drawn(adapted, params, *inputs)
    _, taps = jax.jit(read(model.apply, ["embedded", "hidden"]))(params, *inputs)
    states = [taps["embedded"][0], taps["hidden"][1], taps["hidden"][2]]
    y = up(delta, run(delta["side"], states, jnp.asarray(MASK)))
    out = params["params"]["head"]
    close(jax.jit(adapted.apply)(params, delta, *inputs), mean_pool(y, jnp.asarray(MASK)) @ out["kernel"] + out["bias"])
    assert delta["side"]["down"]["kernel"].shape == (3, 16, 8)


@pytest.mark.parametrize("kind", ["bert", "t5", "llama"])
def test_every_layout_of_a_model_gives_one_answer_and_gradient(kind, close):
    model, params, inputs = made(kind)
    classifier = kind == "bert"
    method = chain(unipt(), head()) if classifier else unipt(kind="grounding")
    outcomes = []
    for layout in ({}, {"scan": True, "remat": True}):
        own = type(model)(dataclasses.replace(model.config, **layout), **({"num_labels": 3} if classifier else {}))
        p = stack_layers(params) if "scan" in layout else params
        adapted = adapt(own.apply, method, on_dense="refuse")
        loss = lambda d: jnp.sin(adapted.apply(p, d, *inputs)).sum()
        outcomes.append(jax.jit(jax.value_and_grad(loss))(drawn(adapted, p, *inputs)))
    close(outcomes[1], outcomes[0], atol=1e-4)
    assert not [p for p, g in trees.by_path(outcomes[0][1]).items() if float(jnp.abs(g).max()) == 0]


def test_padding_is_seen_by_nobody_and_virtual_tokens_count_as_valid():
    for kind in ("bert", "t5"):
        model, params, inputs = made(kind)
        adapted = adapt(model.apply, unipt(), on_dense="refuse")
        delta = drawn(adapted, params, *inputs)
        other = IDS.copy()
        other[1, 3:] = 7
        got = [jax.jit(adapted.apply)(params, delta, ids, *inputs[1:]) for ids in (IDS, other)]
        np.testing.assert_allclose(*got, atol=1e-5)
    model, params, inputs = made("bert")
    both = adapt(model.apply, chain(prompt_tuning(2), unipt()), on_dense="refuse")
    shapes = jax.eval_shape(both.init, jax.random.key(1), params, *inputs)
    assert jax.eval_shape(both.apply, params, shapes, *inputs).shape == (4, 3)


@pytest.mark.parametrize("kind", ["gpt", "t5"])
def test_a_causal_model_stays_causal(kind):
    model, params, inputs = made(kind)
    adapted = adapt(model.apply, unipt(), on_dense="refuse")
    delta = drawn(adapted, params, *inputs)
    answer = jax.jit(adapted.apply)
    at = 0 if kind == "gpt" else 1
    later = [np.array(x) for x in inputs]
    later[at][:, 3] = 9
    a, b = answer(params, delta, *inputs), answer(params, delta, *later)
    np.testing.assert_allclose(a[:, :3], b[:, :3], atol=1e-5)
    assert float(jnp.abs(a - b)[:, 3].max()) > 1e-3
    if kind == "t5":
        encoder = {**delta, "encoder": moved(delta["encoder"], by=1.0)}
        assert float(jnp.abs(answer(params, encoder, *inputs) - a).max()) > 1e-3
    else:
        open_eyed = jax.jit(adapt(model.apply, unipt(causal=False)).apply)
        a, b = open_eyed(params, delta, *inputs), open_eyed(params, delta, *later)
        assert float(jnp.abs(a - b)[:, :3].max()) > 1e-3, "the control"


def test_it_reads_what_the_methods_below_it_made(close):
    model, params, inputs = made("bert")
    below = adapt(model.apply, chain(lora(2), unipt()), on_dense="refuse")
    delta = drawn(below, params, *inputs)
    merged = lora(2).merge(params, delta["lora"])
    plain = adapt(model.apply, unipt(), on_dense="refuse")
    close(jax.jit(below.apply)(params, delta, *inputs), jax.jit(plain.apply)(merged, delta["unipt"], *inputs))


def test_a_function_that_is_no_linen_model_needs_its_marks_only():
    def model(params, x, *, attention_mask=None):
        del attention_mask
        x = checkpoint_name(x @ params["in"], "embedded")
        for w in params["blocks"]:
            x = checkpoint_name(x + jnp.tanh(x @ w), "hidden")
        return checkpoint_name(x, "final_hidden") @ params["head"]

    rng = np.random.default_rng(4)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"in": draw(5, 16), "blocks": [draw(16, 16), draw(16, 16)], "head": draw(16, 2)}
    x = draw(4, 6, 5)
    adapted = adapt(model, unipt())
    delta = drawn(adapted, params, x)
    masked, out = adapted.apply(params, delta, x, attention_mask=MASK), adapted.apply(params, delta, x)
    assert out.shape == (4, 6, 2)
    assert float(jnp.abs(out - masked)[1].max()) > 1e-4
    causal = adapt(model, unipt(causal=True)).apply(params, delta, x)
    assert float(jnp.abs(out - causal).max()) > 1e-4
    with pytest.raises(TapError, match="marks no"):
        adapt(lambda p, x: x @ p["in"], unipt()).init(jax.random.key(0), params, x)


def test_half_precision_stays_in_the_backbone(close):
    model, params, inputs = made("bert")
    half = SequenceClassifier(dataclasses.replace(model.config, dtype="bfloat16", param_dtype="bfloat16"), 3)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    adapted = adapt(half.apply, unipt(), on_dense="refuse")
    delta = jax.jit(adapted.init)(jax.random.key(1), rounded, *inputs)
    assert {x.dtype for x in jax.tree.leaves(delta)} == {jnp.dtype("float32")}
    with jax.numpy_dtype_promotion("strict"):
        out = jax.jit(adapted.apply)(rounded, delta, *inputs)
    assert out.dtype == jnp.bfloat16
    # Eight bits of mantissa through three blocks and two norms.
    close(out, jax.jit(adapt(model.apply, unipt()).apply)(params, delta, *inputs), atol=0.1)


def test_it_learns_on_a_vit_with_the_backbone_untouched():
    model, params, inputs = made("vit")
    adapted = adapt(model.apply, chain(unipt(), head()))
    delta = jax.jit(adapted.init)(jax.random.key(1), params, *inputs)
    labels = np.arange(4) % 3
    loss = lambda d: optax.softmax_cross_entropy_with_integer_labels(adapted.apply(params, d, *inputs), labels).mean()
    _, losses = jax.jit(lambda d: descend(lambda d, _: loss(d), d, optax.adam(1e-2), jnp.zeros(60)))(delta)
    assert float(losses[-1]) < 0.02 < 0.5 < float(losses[0])


# ------------------------------------------------------------------------------------------- what it promises to save


@functools.lru_cache
def deep():
    """A model of six blocks, operations of its forward pass, and the bytes a gradient by LoRA reserves."""
    model, ids = wide()
    model = SequenceClassifier(dataclasses.replace(model.config, layers=6), 3)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    forward, _ = cost(lambda params: jnp.square(model.apply(params, ids)).sum(), params)
    return model, ids, forward, cost(*gradient(model, ids, chain(lora(4), head())))[1]


def gradient(model, ids, method, of=jax.grad):
    """The gradient (or what else `of` makes of the loss) by the delta, and the shapes it takes."""
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    adapted = adapt(model.apply, method)
    delta = jax.eval_shape(adapted.init, jax.random.key(1), params, ids)
    return of(lambda delta, params: jnp.square(adapted.apply(params, delta, ids)).sum()), delta, params


@pytest.mark.usefixtures("careful")
@pytest.mark.parametrize("layout", ["plain", "scan"])
def test_the_backbones_activations_are_not_kept(layout):
    """Half of LoRA's temporaries at most. Operations: one forward pass, and three of the side module: a product of the
    backbone's in the backward pass would cost as much again as its forward product."""
    model, ids, forward, lora_bytes = deep()
    own = SequenceClassifier(dataclasses.replace(model.config, scan=layout == "scan"), 3)
    method = chain(unipt(), head())
    operations, reserved = cost(*gradient(own, ids, method))
    assert reserved <= 0.5 * lora_bytes, f"{reserved} of {lora_bytes} bytes"
    if layout == "plain":  # the count of a loop's operations is of one turn
        answered, _ = cost(*gradient(own, ids, method, of=lambda loss: loss))
        assert operations <= forward + 3.2 * (answered - forward), (operations, forward, answered)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_no_gradient_reaches_the_backbone(kind):
    model, params, inputs = made(kind)
    adapted = adapt(model.apply, unipt())
    delta = drawn(adapted, params, *inputs)
    grads = jax.jit(jax.grad(lambda p: jnp.sin(adapted.apply(p, delta, *inputs)).sum()))(params)
    alive = {p for p, g in trees.by_path(grads).items() if float(jnp.abs(g).max()) != 0}
    # All that lies above the answer is the model's head: T5's is its word table.
    above = {"bert": {"params/head/kernel", "params/head/bias"}, "t5": {"params/embeddings/word/embedding"}}
    assert alive == above[kind]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"), [(dict(reduction=0), "reduction 0: expected 1 or more"), (dict(kind="text"), "kind 'text'")]
)
def test_options_out_of_range_are_refused_before_any_model_is_seen(options, message):
    with pytest.raises(ValueError, match=message):
        unipt(**options)


def test_what_a_model_cannot_give_is_refused_with_its_numbers():
    model, params, inputs = made("bert")
    init = lambda model, method: functools.partial(jax.eval_shape, adapt(model.apply, method).init, jax.random.key(0))
    start = lambda method: init(model, method)(params, *inputs)
    with pytest.raises(ValueError, match="reduction 17 leaves nothing of the model's width 16"):
        start(unipt(17))
    with pytest.raises(ValueError, match=r"states=\[3, 4\].* the states 0 .* to 3"):
        start(unipt(states=(4,)))
    with pytest.raises(ValueError, match=r"state 3, the last, is the guide"):
        start(unipt(states=(1, 3)))
    narrow = SequenceClassifier(dataclasses.replace(model.config, narrow=True), 3, pooling="first")
    with pytest.raises(ValueError, match=r"state 3 has shape .*narrow=False"):
        jax.eval_shape(adapt(narrow.apply, unipt()).apply, params, start(unipt()), *inputs)
    t5, t5_params, t5_inputs = made("t5")
    with pytest.raises(ValueError, match="take at least one"):
        init(t5, unipt(states=()))(t5_params, *t5_inputs)
    alone = start(unipt(states=()))
    assert set(alone["side"]) == {"down", "down_norm"}


def test_its_configuration_makes_it_again():
    for method in (unipt(), unipt(4, kind="grounding", states=[1, 2], causal=True, name="mine")):
        again = from_config(method.config)
        assert (again.config, again.name) == (method.config, method.name)


def test_a_stack_of_side_modules_is_vmapped_and_a_backbone_alone_is_read(close):
    model, params, inputs = made("bert")
    encoder = Encoder(model.config)
    params = {"params": params["params"]["backbone"]}
    adapted = adapt(encoder.apply, unipt(kind="retrieval"), on_dense="refuse")
    deltas = [drawn(adapted, params, *inputs, seed=i) for i in (1, 2)]
    both = jax.jit(jax.vmap(adapted.apply, (None, 0, None, None)))(params, trees.stack(deltas), *inputs)
    for i in range(2):
        close(both[i], jax.jit(adapted.apply)(params, deltas[i], *inputs))
