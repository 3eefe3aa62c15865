"""SHERL: the card's laws, the papers' code's numbers, every model, a backward pass through the late layers alone."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name
from safetensors.numpy import load_file
from test_ladder import IDS, MASK, cost, made, wide
from test_unipt import deep, drawn, gradient

from jaxpeft import adapt, bitfit, chain, from_config, head, houlsby, lora, prompt_tuning, read, trees
from jaxpeft.adapt.sherl import down, mtsa, redundancy, shares, sherl
from jaxpeft.models import SequenceClassifier, stack_layers
from jaxpeft.models.encoder_decoder import CrossBlock, relative_buckets
from jaxpeft.models.layers import Block, Norm, attention_bias
from jaxpeft.readers import TapError
from jaxpeft.updates import descend

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "sherl" / "golden.safetensors")


@pytest.fixture
def careful(quick):
    """Programs as they are compiled outside of tests: what they cost is asked."""
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def draw(key):
    """draw(*shape), another array at each call."""
    count = iter(range(100))
    return lambda *shape: jax.random.normal(jax.random.fold_in(key, next(count)), shape)


def phi_of(draw, n, d=6, m=4, kind="vqa"):
    """One stack's parameters, all at random."""
    norm = lambda *s: {"scale": 1 + draw(*s), "bias": draw(*s)}
    linear = lambda i, o, *s: {"kernel": draw(*s, i, o), "bias": draw(*s, o)}
    first = {"down": linear(d, m, n)}
    first |= {"inner": linear(m, m, n), "gate": linear(m, m, n)} if kind == "vqa" else {"norm": norm(n, m)}
    return {"down": first, "score": linear(m, 1), "out": linear(m, d), "gate": draw()}


def transparent(delta, stack="side"):
    """The delta whose u is x_L' itself: O = 0 and an open gate."""
    own = {**delta[stack], "out": jax.tree.map(jnp.zeros_like, delta[stack]["out"]), "gate": jnp.asarray(100.0)}
    return {**delta, stack: own}


def layer_of(params, i, stack=None):
    p = params["params"]
    return (p.get("backbone", p) if stack is None else p[stack])[f"layers_{i}"]


# ------------------------------------------------------------------------------------------------------ the card's laws

# Compiled whole: one by one its operations would take longer to compile.
RUN = jax.jit(mtsa, static_argnames="kind")


def test_redundancy_counts_the_layers_that_say_the_same(draw):
    one = draw(2, 3, 1, 8)
    np.testing.assert_allclose(redundancy(jnp.repeat(one, 4, axis=2), 1e-12), 4, rtol=1e-5)
    orthogonal = jnp.broadcast_to(3 * jnp.eye(4, 8), (2, 3, 4, 8))
    np.testing.assert_allclose(redundancy(orthogonal, 1e-12), 1, rtol=1e-5)
    any_four = redundancy(draw(5, 7, 4, 3))
    assert float(any_four.min()) >= 1 - 1e-5
    assert float(any_four.max()) <= 4 + 1e-5


def test_a_state_of_zeros_is_like_itself_and_has_a_gradient(draw):
    x = jnp.zeros((1, 1, 2, 3)).at[0, 0, 1].set(1.0)
    np.testing.assert_allclose(redundancy(x), 1, atol=1e-5)
    assert bool(jnp.isfinite(jax.grad(lambda x: redundancy(x).sum())(x)).all())


def test_identical_layers_share_evenly_and_a_twin_is_discounted(draw):
    s, q = draw(2, 3, 1, 5), draw(2, 3, 5)
    phi = {"kernel": draw(5, 1), "bias": jnp.full((1,), 20.0)}  # positive scores
    np.testing.assert_allclose(shares(phi, jnp.repeat(s, 4, axis=2), q), 0.25, atol=1e-5)
    twins = jnp.concatenate([s, s, draw(2, 3, 1, 5)], axis=2)
    both = lambda **k: shares(phi, twins, q, **k)[..., :2].sum(-1)
    assert bool(jnp.all(both() < both(discount=False)))


def test_shares_sum_to_one_or_to_zero_and_do_not_depend_on_the_scores_scale(draw):
    s, q = draw(4, 6, 2, 5), draw(4, 6, 5)
    phi = {"kernel": draw(5, 1), "bias": draw(1)}
    a = shares(phi, s, q, eps=1e-12)
    sums = np.asarray(a.sum(-1))
    assert np.all((np.abs(sums - 1) < 1e-4) | (sums == 0))
    assert {0.0, 1.0} == set(np.round(sums, 3).ravel().tolist()), "both occur"
    np.testing.assert_allclose(shares(jax.tree.map(lambda x: 3 * x, phi), s, q, eps=1e-12), a, atol=1e-5)


def test_without_a_positive_score_the_guide_is_alone(draw, close):
    phi, states = phi_of(draw, 3), [draw(2, 4, 6) for _ in range(3)]
    phi["score"]["bias"] = jnp.full((1,), -1e3)
    z = down(jax.tree.map(lambda x: x[2], phi["down"]), states[2])
    want = jax.nn.relu(z) @ phi["out"]["kernel"] + phi["out"]["bias"] + jnp.tanh(phi["gate"] / 0.1) * states[2]
    close(RUN(phi, states, states[2]), want)


def test_the_gate_lets_the_residual_in_from_nothing_to_all(draw, close):
    phi, states, x = phi_of(draw, 3), [draw(2, 4, 6) for _ in range(3)], draw(2, 4, 6)
    shut = {**phi, "gate": jnp.zeros(())}
    np.testing.assert_array_equal(RUN(shut, states, x), RUN(shut, states, 5 * x))
    opened = transparent({"side": phi})["side"]
    close(RUN(opened, states, x), x)
    half = {**phi, "gate": jnp.asarray(0.05)}
    close(RUN(half, states, x) - RUN(shut, states, x), np.tanh(0.5) * x)


def test_shallow_layers_may_be_permuted_with_their_parameters_and_tokens_as_they_are(draw, close):
    phi, states = phi_of(draw, 4), [draw(2, 4, 6) for _ in range(4)]
    want = RUN(phi, states, states[3])
    order = np.array([2, 0, 1, 3])
    mixed = {**phi, "down": jax.tree.map(lambda x: x[order], phi["down"])}
    close(RUN(mixed, [states[i] for i in order], states[3]), want)
    tokens = np.array([3, 1, 0, 2])
    moved_states = [s[:, tokens] for s in states]
    close(RUN(phi, moved_states, moved_states[3]), want[:, tokens])


def test_the_gradient_is_finite_differences(draw, wide_floats):
    phi, states = phi_of(draw, 3), [draw(1, 2, 6) for _ in range(3)]
    phi, states = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (phi, states))
    phi["score"]["bias"] = jnp.full((1,), 3.0)
    loss = jax.jit(lambda p: jnp.sin(mtsa(p, states, states[2])).sum())
    grads, h = jax.jit(jax.grad(loss))(phi), 1e-6
    rng = np.random.default_rng(0)
    way = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), phi)
    step = lambda s: jax.tree.map(lambda x, d: x + s * h * d, phi, way)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), grads, way)))
    # Central differences in float64: h² and rounding over h, 1e-9 together.
    np.testing.assert_allclose((loss(step(1)) - loss(step(-1))) / (2 * h), slope, rtol=1e-6)


@pytest.fixture
def wide_floats():
    with jax.enable_x64(True):
        yield


# ------------------------------------------------------------------------------------------------ the reference's numbers


def golden(part, *path):
    """The named module's parameters in our layout, stacked where there are several."""

    def one(name):
        w, b = (GOLDEN[f"{part}.parameters.{name}.{n}"] for n in ("weight", "bias"))
        return {"kernel": w.T, "bias": b} if w.ndim == 2 else {"scale": w, "bias": b}

    parts = [one(name) for name in path]
    return jax.tree.map(lambda *x: np.stack(x), *parts) if len(parts) > 1 else parts[0]


def blocks(part, name):
    return golden(part, *(f"hor_block.{i}.{name}" for i in range(4)))


@pytest.mark.parametrize("kind", ["vqa", "retrieval", "grounding"])
def test_the_forms_are_those_of_the_papers_code(kind, close):
    out = "fc_out.1" if kind == "retrieval" else "fc_out"
    phi = {
        "score": golden(kind, "guide_block.fc_attn"),
        "out": golden(kind, out),
        "gate": GOLDEN[f"{kind}.parameters.gate_params"].reshape(()),
    }
    if kind == "vqa":
        phi["down"] = {n: blocks(kind, f"fc{i}") for i, n in ((1, "down"), (2, "inner"), (3, "gate"))}
    else:
        names = ("fc.0", "fc.1") if kind == "retrieval" else ("fc", "norm")
        phi["down"] = {n: blocks(kind, name) for n, name in zip(("down", "norm"), names)}
        phi["out_norm"] = golden(kind, "fc_out.2" if kind == "retrieval" else "norm_out")
    if kind == "grounding":
        phi |= {n: golden(kind, f"guide_block.mlp.{i}") for n, i in (("merge_in", 0), ("merge", 2), ("merge_norm", 3))}
    states = list(jnp.asarray(GOLDEN[f"{kind}.features"]))
    # float32 sums in another order, through two norms.
    got = RUN(phi, states, jnp.asarray(GOLDEN[f"{kind}.last"]), kind=kind)
    close(got, GOLDEN[f"{kind}.output"], atol=2e-6)
    z = jnp.stack([down(jax.tree.map(lambda x: x[i], phi["down"]), x) for i, x in enumerate(states[:3])], axis=2)
    close(redundancy(z, 1e-8 if kind == "retrieval" else 1e-6), GOLDEN[f"{kind}.redundancy"], atol=2e-6)


# ------------------------------------------------------------------------------------------------- models and layouts


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("bert", "plain"),
        ("bert", "scan and remat"),
        ("vit", "scan"),
        ("vit", "remat"),
        ("llama", "plain"),
        ("llama", "scan and remat"),
    ],
)
def test_with_an_open_gate_and_no_output_the_late_layers_are_the_pretrained_ones(kind, layout, close):
    model, params, inputs = made(kind)
    own = dataclasses.replace(model.config, scan="scan" in layout, remat="remat" in layout)
    own = type(model)(own, **({} if kind == "llama" else {"num_labels": 3}))
    p = stack_layers(params) if "scan" in layout else params
    late = {"plain": 1, "scan": 2, "remat": 1, "scan and remat": 0}[layout]
    adapted = adapt(own.apply, sherl(late=late), on_dense="refuse")
    delta = drawn(adapted, p, *inputs)
    want = jax.jit(model.apply)(params, *inputs)
    both = jax.jit(lambda *d: [adapted.apply(p, x, *inputs) for x in d])(transparent(delta), delta)
    close(both[0], want)
    assert float(jnp.abs(both[1] - want).max()) > 1e-2, "the control"


def test_it_feeds_the_frozen_last_block_what_the_adapter_gives(close):
    model, params, inputs = made("bert")
    adapted = adapt(model.apply, chain(sherl(2, states=(0, 1, 2)), head()), on_dense="refuse")
    delta = drawn(adapted, params, *inputs)

    @jax.jit
    def by_hand(params, delta):
        _, taps = read(model.apply, ["embedded", "hidden"])(params, *inputs)
        states = [taps["embedded"][0], *taps["hidden"][:2]]
        u = mtsa(delta["sherl"]["side"], states, states[2])
        y = Block(model.config).apply({"params": layer_of(params, 2)}, u, attention_bias(jnp.asarray(MASK), 6))
        pooled = (y * MASK[..., None]).sum(1) / MASK.sum(1)[:, None]
        own = {n: delta["head"][f"params/head/{n}"]["value"] for n in ("kernel", "bias")}
        return pooled @ own["kernel"] + own["bias"]

    close(jax.jit(adapted.apply)(params, delta, *inputs), by_hand(params, delta))


def test_t5s_late_layer_reads_the_side_memory_and_the_layers_before_it_the_frozen_one(close):
    model, params, inputs = made("t5")
    c = model.config
    adapted = adapt(model.apply, sherl(2), on_dense="refuse")
    delta = transparent(drawn(adapted, params, *inputs), "decoder")
    mask = jnp.asarray(MASK)

    @jax.jit
    def by_hand(params, delta):
        _, taps = read(model.apply, ["encoder_embedded", "encoder_hidden", "decoder_hidden"])(params, *inputs)
        states = [*taps["encoder_embedded"], *taps["encoder_hidden"]]
        memory = mtsa(delta["encoder"], states, states[-1])
        memory = Norm(c).apply({"params": delta["encoder"]["memory_norm"]}, memory)
        buckets = relative_buckets(5, 5, bidirectional=False, buckets=c.buckets, limit=c.max_distance)
        table = params["params"]["decoder"]["relative_bias"]["embedding"]
        bias = table[buckets].transpose(2, 0, 1)[None] + attention_bias(mask[:, :5], 5, causal=True)
        args = (bias, True, memory, attention_bias(mask, 5))
        y = CrossBlock(c).apply({"params": layer_of(params, 1, "decoder")}, taps["decoder_hidden"][0], *args)
        y = Norm(c).apply({"params": delta["decoder"]["final_norm"]}, y) * c.width**-0.5
        return y @ params["params"]["embeddings"]["word"]["embedding"].T

    close(jax.jit(adapted.apply)(params, delta, *inputs), by_hand(params, delta))
    assert delta["encoder"]["score"]["kernel"].shape == (8, 1)
    assert [delta[n]["down"]["down"]["kernel"].shape[0] for n in ("encoder", "decoder")] == [4, 2]


@pytest.mark.parametrize("late", [1, 2])
def test_t5_with_open_gates_and_its_own_norms_is_the_pretrained_model(late, close):
    model, params, inputs = made("t5")
    deep = dataclasses.replace(model.config, decoder_layers=3, scan=late == 2, remat=late == 2)
    deep = type(model)(deep)
    decoder = {**params["params"]["decoder"], "layers_2": params["params"]["decoder"]["layers_0"]}
    params = {"params": {**params["params"], "decoder": decoder}}
    want = jax.jit(type(model)(dataclasses.replace(model.config, decoder_layers=3)).apply)(params, *inputs)
    p = stack_layers(params) if late == 2 else params
    adapted = adapt(deep.apply, sherl(late=late), on_dense="refuse")
    delta = transparent(transparent(drawn(adapted, p, *inputs), "encoder"), "decoder")
    delta["encoder"]["memory_norm"] = params["params"]["encoder"]["final_norm"]
    delta["decoder"]["final_norm"] = params["params"]["decoder"]["final_norm"]
    close(jax.jit(adapted.apply)(p, delta, *inputs), want)


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt"])
def test_every_layout_of_a_model_gives_one_answer_and_gradient(kind, close):
    model, params, inputs = made(kind)
    classifier = kind == "bert"
    options = {"bert": {}, "t5": {}, "gpt": {"kind": "grounding"}}[kind]
    outcomes = []
    for layout in ({}, {"scan": True, "remat": True}):
        own = type(model)(dataclasses.replace(model.config, **layout), **({"num_labels": 3} if classifier else {}))
        p = stack_layers(params) if "scan" in layout else params
        adapted = adapt(own.apply, sherl(**options), on_dense="refuse")
        loss = lambda d: jnp.sin(adapted.apply(p, d, *inputs)).sum()
        outcomes.append(jax.jit(jax.value_and_grad(loss))(drawn(adapted, p, *inputs)))
    close(outcomes[1], outcomes[0], atol=1e-4)
    assert not [p for p, g in trees.by_path(outcomes[0][1]).items() if float(jnp.abs(g).max()) == 0]


@pytest.mark.parametrize("kind", ["gpt", "t5"])
def test_a_causal_model_stays_causal(kind):
    model, params, inputs = made(kind)
    adapted = adapt(model.apply, sherl(), on_dense="refuse")
    delta = drawn(adapted, params, *inputs)
    answer = jax.jit(adapted.apply)
    later = [np.array(x) for x in inputs]
    later[0 if kind == "gpt" else 1][:, 3] = 9
    a, b = answer(params, delta, *inputs), answer(params, delta, *later)
    np.testing.assert_allclose(a[:, :3], b[:, :3], atol=1e-5)
    assert float(jnp.abs(a - b)[:, 3].max()) > 1e-3


def test_padding_is_seen_by_nobody():
    model, params, inputs = made("bert")
    adapted = adapt(model.apply, sherl(), on_dense="refuse")
    delta = drawn(adapted, params, *inputs)
    other = IDS.copy()
    other[1, 3:] = 7
    run = jax.jit(adapted.apply)
    np.testing.assert_allclose(run(params, delta, IDS, MASK), run(params, delta, other, MASK), atol=1e-5)


def test_the_late_layer_runs_as_the_methods_below_it_made_it(close):
    model, params, inputs = made("bert")
    below = adapt(model.apply, chain(lora(2), sherl()), on_dense="refuse")
    delta = drawn(below, params, *inputs)
    merged = lora(2).merge(params, delta["lora"])
    plain = adapt(model.apply, sherl(), on_dense="refuse")
    want = jax.jit(plain.apply)(merged, delta["sherl"], *inputs)
    close(jax.jit(below.apply)(params, delta, *inputs), want)
    for method in (
        chain(houlsby(2), sherl()),
        chain(sherl(), houlsby(2)),
        chain(prompt_tuning(2), sherl()),
        chain(sherl(), bitfit()),
    ):
        adapted = adapt(model.apply, method, on_dense="refuse")
        shapes = jax.eval_shape(adapted.init, jax.random.key(1), params, *inputs)
        assert jax.eval_shape(adapted.apply, params, shapes, *inputs).shape == (4, 3)


def test_a_late_layer_that_computes_the_first_position_alone_is_passed_through(close):
    model, params, inputs = made("bert")
    outs = []
    for narrow in (False, True):
        own = SequenceClassifier(dataclasses.replace(model.config, narrow=narrow), 3, pooling="first")
        adapted = adapt(own.apply, sherl(), on_dense="refuse")
        outs.append(jax.jit(adapted.apply)(params, drawn(adapted, params, *inputs), *inputs))
    close(outs[1], outs[0])
    with pytest.raises(ValueError, match=r"state 3 has shape .*narrow=False"):
        jax.eval_shape(adapt(own.apply, sherl(late=0)).init, jax.random.key(0), params, *inputs)


def test_a_function_that_is_no_linen_model_needs_its_marks_only(draw, close):
    def model(params, x):
        x = checkpoint_name(x @ params["in"], "embedded")
        for w in params["blocks"]:
            x = checkpoint_name(x + jnp.tanh(x @ w), "hidden")
        return x @ params["head"]

    params = {"in": draw(5, 16), "blocks": [draw(16, 16) for _ in range(3)], "head": draw(16, 2)}
    x = draw(4, 6, 5)
    adapted = adapt(model, sherl())
    delta = transparent(drawn(adapted, params, x))
    close(jax.jit(adapted.apply)(params, delta, x), jax.jit(model)(params, x))
    with pytest.raises(TapError, match="marks no"):
        jax.eval_shape(adapt(lambda p, x: x @ p["in"], sherl()).init, jax.random.key(0), params, x)


def test_half_precision_stays_in_the_backbone(close):
    model, params, inputs = made("bert")
    half = SequenceClassifier(dataclasses.replace(model.config, dtype="bfloat16", param_dtype="bfloat16"), 3)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    adapted = adapt(half.apply, sherl(), on_dense="refuse")
    shapes = jax.eval_shape(adapted.init, jax.random.key(1), rounded, *inputs)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    delta = drawn(adapted, rounded, *inputs)
    with jax.numpy_dtype_promotion("strict"):
        out = jax.jit(adapted.apply)(rounded, delta, *inputs)
    assert out.dtype == jnp.bfloat16
    # Eight bits of mantissa through three blocks; a score near zero may round to the other side of its relu.
    close(out, jax.jit(adapt(model.apply, sherl()).apply)(params, delta, *inputs), atol=0.2)


def test_the_temperature_may_be_traced(draw):
    phi, states = phi_of(draw, 3), [draw(2, 4, 6) for _ in range(3)]
    sweep = jax.jit(jax.vmap(lambda t: mtsa(phi, states, states[2], temperature=t)))(jnp.array([0.1, 5.0]))
    np.testing.assert_allclose(sweep[1], mtsa(phi, states, states[2], temperature=5.0), atol=1e-5)
    assert float(jnp.abs(sweep[0] - sweep[1]).max()) > 1e-3


def test_it_learns_on_a_vit_with_the_backbone_untouched():
    model, params, inputs = made("vit")
    adapted = adapt(model.apply, chain(sherl(), head()))
    delta = jax.jit(adapted.init)(jax.random.key(1), params, *inputs)
    labels = np.arange(4) % 3
    loss = lambda d: optax.softmax_cross_entropy_with_integer_labels(adapted.apply(params, d, *inputs), labels).mean()
    _, losses = jax.jit(lambda d: descend(lambda d, _: loss(d), d, optax.adam(1e-2), jnp.zeros(60)))(delta)
    assert float(losses[-1]) < 0.02 < 0.5 < float(losses[0])


# ------------------------------------------------------------------------------------------- what it promises to save


@pytest.mark.usefixtures("careful")
@pytest.mark.parametrize("late", [1, 3])
def test_a_loop_that_is_cut_copies_only_the_weights_of_the_layers_it_was_cut_for(late):
    """Of eight layers XLA:CPU holds the slice that its loop is at, the answered layer's and the late ones'."""
    model, _ = wide(scan=True)
    model, ids = SequenceClassifier(dataclasses.replace(model.config, layers=8), 3), jnp.zeros((1, 2), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    layer = trees.nbytes(params["params"]["backbone"]["layers"]) / 8
    _, reserved = cost(*gradient(model, ids, sherl(16, late=late)))
    assert reserved < (late + 2.2) * layer, (reserved, layer)


@pytest.mark.usefixtures("careful")
@pytest.mark.parametrize("layout", ["plain", "scan"])
def test_the_activations_of_the_layers_below_the_late_one_are_not_kept(layout):
    """Half of LoRA's temporaries at most. Operations: one forward pass, three of the side module, and once more the late
    layer's (its gradient by its input; that of attention costs twice its products)."""
    model, ids, forward, lora_bytes = deep()
    own = SequenceClassifier(dataclasses.replace(model.config, scan=layout == "scan"), 3)
    method = chain(sherl(), head())
    operations, reserved = cost(*gradient(own, ids, method))
    assert reserved <= 0.5 * lora_bytes, f"{reserved} of {lora_bytes} bytes"
    if layout == "plain":  # the count of a loop's operations is of one turn
        answered, _ = cost(*gradient(own, ids, method, of=lambda loss: loss))
        assert operations <= forward + 3.2 * (answered - forward) + 1.3 * forward / 6, (operations, forward, answered)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_gradients_reach_the_late_layer_and_what_is_above_it_and_nothing_else(kind):
    """Nobody asks for them in training: the layer is frozen. That they exist is the way to u."""
    model, params, inputs = made(kind)
    adapted = adapt(model.apply, sherl())
    delta = drawn(adapted, params, *inputs)
    grads = jax.jit(jax.grad(lambda p: jnp.sin(adapted.apply(p, delta, *inputs)).sum()))(params)
    alive = {p.removeprefix("params/") for p, g in trees.by_path(grads).items() if float(jnp.abs(g).max()) > 0}
    last = {"bert": "backbone/layers_2/", "t5": "decoder/layers_1/"}[kind]
    above = {
        "bert": {"head/kernel", "head/bias"},
        "t5": {"embeddings/word/embedding", "decoder/relative_bias/embedding"},
    }
    assert {p for p in alive if not p.startswith(last)} == above[kind]
    assert len([p for p in alive if p.startswith(last)]) > 8


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(reduction=0), "reduction 0: expected 1 or more"),
        (dict(kind="text"), "kind 'text'"),
        (dict(late=-1), "late -1"),
        (dict(temperature=0.0), "temperature 0.0"),
        (dict(dropout=1.0), "dropout 1.0"),
    ],
)
def test_options_out_of_range_are_refused_before_any_model_is_seen(options, message):
    with pytest.raises(ValueError, match=message):
        sherl(**options)


def test_what_a_model_cannot_give_is_refused_with_its_numbers():
    def start(method, kind="bert"):
        model, params, inputs = made(kind)
        return jax.eval_shape(adapt(model.apply, method).init, jax.random.key(0), params, *inputs)

    with pytest.raises(ValueError, match="reduction 17 leaves nothing of the model's width 16"):
        start(sherl(17))
    with pytest.raises(ValueError, match=r"states=\[1, 3\].* before its late layers the states 0 .* to 2"):
        start(sherl(states=(1, 3)))
    for method in (sherl(late=3), sherl(states=(1,))):
        with pytest.raises(ValueError, match="at least two are needed"):
            start(method)
    with pytest.raises(ValueError, match="only late layers read"):
        start(sherl(late=0), "t5")
    shapes = start(sherl(states=(0, 1, 3)), "t5")
    assert [shapes[n]["down"]["down"]["kernel"].shape[0] for n in ("encoder", "decoder")] == [3, 2]


def test_its_configuration_makes_it_again():
    for method in (sherl(), sherl(4, kind="retrieval", late=2, states=[0, 1], discount=False, name="mine")):
        again = from_config(method.config)
        assert (again.config, again.name) == (method.config, method.name)


def test_dropout_acts_on_the_output_and_the_memory(draw):
    model, params, inputs = made("t5")
    adapted = adapt(model.apply, sherl(dropout=0.5))
    delta = drawn(adapted, params, *inputs)
    run = jax.jit(lambda delta, key: adapted.apply(params, delta, *inputs, dropout_key=key))
    shut = transparent(transparent(delta, "encoder"), "decoder")  # both O are zero: what is left is the memory's
    a, b, again = (run(shut, jax.random.key(i)) for i in (1, 2, 1))
    assert float(jnp.abs(a - b).max()) > 1e-3
    np.testing.assert_array_equal(a, again)
