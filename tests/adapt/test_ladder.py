"""LST: the equations by hand, pruning against a port in numpy, a backward pass that stays out of the backbone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import adapt, bitfit, chain, from_config, head, houlsby, lora, prompt_tuning, read, trees
from jaxpeft.adapt.importance import magnitude, squared_gradients
from jaxpeft.adapt.ladder import lst, narrowed, towers_of
from jaxpeft.adapt.pruning import backbone_of, prune_products, structural_prune, top
from jaxpeft.files import load_delta, save_delta
from jaxpeft.models import (
    BlockConfig,
    Clip,
    ClipConfig,
    ClipTextConfig,
    Decoder,
    DecoderConfig,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    ImageClassifier,
    SequenceClassifier,
    TextTower,
    VisionConfig,
    mean_pool,
    stack_layers,
)
from jaxpeft.models.layers import Block, Norm, attention_bias
from jaxpeft.updates import descend

quick = pytest.mark.usefixtures("quick")
SMALL = dict(width=16, layers=3, heads=4, head_dim=4, mlp_width=32, init_std=0.3, plain=True)
RNG = np.random.default_rng(0)
IDS = RNG.integers(2, 20, (4, 6)).astype(np.int32)
MASK = np.ones((4, 6), np.int32)
MASK[1, 3:] = 0
T5 = dict(pre_norm=True, norm="rms", qkv_bias=False, out_bias=False, mlp_bias=False, attention_scale=1.0)


def bert(**more):
    return SequenceClassifier(EncoderConfig(vocab=20, max_positions=24, **{**SMALL, **more}), 3), (IDS, MASK)


def vit(**more):
    config = VisionConfig(image=(8, 8), patch=(4, 4), channels=1, pre_norm=True, **{**SMALL, **more})
    return ImageClassifier(config, 3), (RNG.normal(size=(4, 8, 8, 1)).astype(np.float32),)


def t5(**more):
    config = EncoderDecoderConfig(vocab=20, decoder_layers=2, buckets=8, max_distance=6, **{**SMALL, **T5, **more})
    return EncoderDecoder(config), (IDS, IDS[:, :5] - 1, MASK, MASK[:, :5])


def gpt(**more):
    return Decoder(DecoderConfig(vocab=20, pre_norm=True, fused_qkv=True, **{**SMALL, **more})), (IDS, MASK)


def llama(**more):
    own = dict(family="llama", pre_norm=True, gated=True, norm="rms", qkv_bias=False, out_bias=False, mlp_bias=False)
    return Decoder(DecoderConfig(vocab=20, **{**SMALL, **own, **more})), (IDS, MASK)


MODELS = {"bert": bert, "vit": vit, "t5": t5, "gpt": gpt, "llama": llama}


@functools.lru_cache
def made(kind):
    """A model away from its initial zeros and ones, its parameters and its inputs."""
    model, inputs = MODELS[kind]()
    params = jax.jit(model.init)(jax.random.key(0), *inputs)
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), params), inputs


def moved(delta, by=0.2):
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + jnp.asarray(by * rng.normal(size=x.shape), x.dtype), delta)


def with_gates(delta, value, only=None):
    """The delta with the gates at `value`, all or those of the layers in `only`."""
    leaves = trees.by_path(delta)
    gates = [p for p in leaves if p.endswith("gate") and leaves[p].shape == ()]
    chosen = [p for p in gates if only is None or any(f"layers_{i}/" in p for i in only)]
    assert chosen
    return trees.replace_leaves(delta, {p: jnp.full_like(leaves[p], value) for p in chosen})


def transparent(delta, width):
    """The delta with identities for all of D and U."""
    new = {}
    for path, x in trees.by_path(delta).items():
        if "/block/" not in path and path.endswith(("down/kernel", "up/kernel")):
            new[path] = jnp.eye(width, dtype=x.dtype)
        elif "/block/" not in path and path.endswith(("down/bias", "up/bias")):
            new[path] = jnp.zeros_like(x)
    return trees.replace_leaves(delta, new)


# ---------------------------------------------------------------------------------------------- the equations by hand


@quick
def test_the_side_network_is_the_cards_recursion(close):
    model, params, inputs = made("bert")
    adapted = adapt(model.apply, lst(2, keep=(0, 2), temperature=0.3), on_dense="refuse")
    delta = moved(jax.jit(adapted.init)(jax.random.key(1), params, *inputs))
    got = jax.jit(adapted.apply)(params, delta, *inputs)

    _, taps = read(model.apply, ["embedded", "hidden"])(params, *inputs)
    side = dataclasses.replace(model.config, width=8, head_dim=2, mlp_width=16)
    phi = delta["side"]
    s = taps["embedded"][0] @ phi["down"]["kernel"] + phi["down"]["bias"]
    for i in (0, 2):
        layer = phi[f"layers_{i}"]
        mu = 1 / (1 + jnp.exp(-layer["gate"] / 0.3))
        s = mu * s + (1 - mu) * (taps["hidden"][i] @ layer["down"]["kernel"] + layer["down"]["bias"])
        s = Block(side).apply({"params": layer["block"]}, s, attention_bias(jnp.asarray(MASK), 6))
    s = Norm(side).apply({"params": phi["norm"]}, s)
    y = s @ delta["up"]["kernel"] + delta["up"]["bias"]
    out = params["params"]["head"]
    close(got, mean_pool(y, jnp.asarray(MASK)) @ out["kernel"] + out["bias"])
    assert set(phi) == {"down", "layers_0", "layers_2", "norm"}


@quick
@pytest.mark.parametrize("kind", ["vit", "t5", "gpt", "llama"])
def test_at_r_1_with_open_gates_and_identities_the_side_network_is_the_backbone(kind, close):
    """D = U = I, the pruned copy is the full copy, mu = 1: it computes what the frozen model computes, masks, relative
    and rotary positions and cross-attention included. (A post-norm encoder has no last norm that could be copied.)"""
    model, params, inputs = made(kind)
    adapted = adapt(model.apply, lst(1), on_dense="refuse")
    delta = transparent(jax.jit(adapted.init)(jax.random.key(1), params, *inputs), 16)
    want = jax.jit(model.apply)(params, *inputs)
    run = jax.jit(adapted.apply)
    close(run(params, with_gates(delta, 100.0), *inputs), want)
    assert float(jnp.abs(run(params, delta, *inputs) - want).max()) > 1e-2, "half-open gates: a network fed by averages"


@quick
def test_at_r_1_a_closed_gate_feeds_the_block_with_its_own_index_output(close):
    model, params, inputs = made("vit")
    adapted = adapt(model.apply, lst(1), on_dense="refuse")
    delta = transparent(jax.jit(adapted.init)(jax.random.key(1), params, *inputs), 16)
    _, taps = read(model.apply, ["hidden"])(params, *inputs)
    p = params["params"]["backbone"]
    block = lambda i, x: Block(model.config).apply({"params": p[f"layers_{i}"]}, x)

    def answered(s):
        s = Norm(model.config).apply({"params": p["final_norm"]}, s)
        return s[:, 0] @ params["params"]["head"]["kernel"] + params["params"]["head"]["bias"]

    # Only gate 0 closed: s = h_0, then the blocks 0, 1, 2. Only gate 2: s = h_2, then block 2.
    first = with_gates(with_gates(delta, 100.0), -100.0, only=[0])
    close(jax.jit(adapted.apply)(params, first, *inputs), answered(block(2, block(1, block(0, taps["hidden"][0])))))
    last = with_gates(with_gates(delta, 100.0), -100.0, only=[2])
    close(jax.jit(adapted.apply)(params, last, *inputs), answered(block(2, taps["hidden"][2])))


@quick
def test_an_open_gate_shuts_the_backbone_out_and_a_closed_one_the_side_layers_before_it():
    model, params, inputs = made("bert")
    adapted = adapt(model.apply, lst(2), on_dense="refuse")
    run = jax.jit(adapted.apply)
    delta = moved(jax.jit(adapted.init)(jax.random.key(1), params, *inputs))
    rng = np.random.default_rng(3)
    layers = ["layers_0", "layers_1", "layers_2"]
    other = {
        **params["params"]["backbone"],
        **jax.tree.map(
            lambda x: x + jnp.asarray(rng.normal(size=x.shape), x.dtype),
            {n: params["params"]["backbone"][n] for n in layers},
        ),
    }
    other = {"params": {**params["params"], "backbone": other}}
    shut = with_gates(delta, 100.0)
    np.testing.assert_array_equal(run(params, shut, *inputs), run(other, shut, *inputs))
    assert float(jnp.abs(run(params, delta, *inputs) - run(other, delta, *inputs)).max()) > 1e-3

    forgetful = with_gates(delta, -100.0, only=[2])
    changed = moved({n: forgetful["side"][n] for n in ("down", "layers_0", "layers_1")}, by=1.0)
    np.testing.assert_array_equal(
        run(params, forgetful, *inputs),
        run(params, {**forgetful, "side": {**forgetful["side"], **changed}}, *inputs),
    )


@quick
def test_gates_start_at_a_half_for_any_temperature():
    model, params, inputs = made("bert")
    deltas = [adapt(model.apply, lst(2, temperature=t)).init(jax.random.key(1), params, *inputs) for t in (0.1, 5.0)]
    outs = [adapt(model.apply, lst(2, temperature=t)).apply(params, deltas[0], *inputs) for t in (0.1, 5.0)]
    assert all(float(deltas[0]["side"][f"layers_{i}"]["gate"]) == 0 for i in range(3))
    np.testing.assert_array_equal(*outs)
    np.testing.assert_array_equal(jax.nn.sigmoid(0 / 0.1), 0.5)
    # T is an array: a sweep is a vmap.
    start = with_gates(deltas[0], 0.1)
    sweep = lambda t: adapt(model.apply, lst(2, temperature=t)).apply(params, start, *inputs)
    both = jax.jit(jax.vmap(sweep))(jnp.array([0.1, 5.0]))
    np.testing.assert_allclose(both[1], sweep(5.0), atol=1e-5)
    assert float(jnp.abs(both[0] - both[1]).max()) > 1e-4


@quick
def test_without_ladders_only_the_embedding_is_read():
    model, params, inputs = made("bert")
    adapted = adapt(model.apply, lst(2, ladders=False), on_dense="refuse")
    delta = moved(jax.jit(adapted.init)(jax.random.key(1), params, *inputs))
    assert set(delta["side"]["layers_1"]) == {"block"}
    with_ladders = adapt(model.apply, lst(2), on_dense="refuse")
    full = with_gates(moved(jax.jit(with_ladders.init)(jax.random.key(1), params, *inputs)), 100.0)
    for i in range(3):
        full["side"][f"layers_{i}"]["block"] = delta["side"][f"layers_{i}"]["block"]
    same = {**delta, "side": {**full["side"], "down": delta["side"]["down"], "norm": delta["side"]["norm"]}}
    np.testing.assert_allclose(
        adapted.apply(params, delta, *inputs), with_ladders.apply(params, same, *inputs), atol=1e-5
    )


# ------------------------------------------------------------------------------------------------- models and layouts


@quick
@pytest.mark.parametrize("ladders", [True, False])
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_layout_of_every_model_gives_one_answer_and_gradient(kind, ladders, close):
    model, params, inputs = made(kind)
    classifier = kind in ("bert", "vit")
    own = lst(2 if kind == "llama" else None, ladders=ladders, dropout=0.2)
    method = chain(own, head()) if classifier else own
    outcomes = []
    for layout in ({}, {"scan": True, "remat": True}):
        own = type(model)(dataclasses.replace(model.config, **layout), **({"num_labels": 3} if classifier else {}))
        p = stack_layers(params) if "scan" in layout else params
        adapted = adapt(own.apply, method, on_dense="refuse")
        start = jax.jit(adapted.init)(jax.random.key(1), p, *inputs)
        where = moved(outcomes[0][0] if outcomes else start)
        where = stack_layers(where) if "scan" in layout else where
        loss = lambda d, **more: jnp.sin(adapted.apply(p, d, *inputs, **more)).sum()
        value, gradient = jax.jit(jax.value_and_grad(loss))(where)
        dropped = jax.jit(loss)(where, dropout_key=jax.random.key(3))
        outcomes.append((start, value, dropped, gradient))
    close(outcomes[1], tuple(map(stack_layers, outcomes[0])), atol=1e-4)
    assert abs(float(outcomes[0][1] - outcomes[0][2])) > 1e-3, "the side network drops out"
    sizes = {p: float(jnp.abs(g).max()) for p, g in trees.by_path(outcomes[0][3]).items()}
    assert not [p for p, size in sizes.items() if size == 0]


@quick
def test_a_delta_of_either_layout_runs_on_models_of_either_layout(close):
    model, params, inputs = made("bert")
    scanned = type(model)(dataclasses.replace(model.config, scan=True), num_labels=3)
    method = lst(2, keep=(0, 2))
    unrolled = moved(adapt(model.apply, method).init(jax.random.key(1), params, *inputs))
    side = {n: x for n, x in unrolled["side"].items() if not n.startswith("layers_")}
    kept = [unrolled["side"][f"layers_{i}"] for i in (0, 2)]
    stacked = {**unrolled, "side": {**side, "layers": jax.tree.map(lambda *x: jnp.stack(x), *kept)}}
    models = ((model, params), (scanned, stack_layers(params)))
    outs = [adapt(m.apply, method).apply(p, d, *inputs) for m, p in models for d in (unrolled, stacked)]
    for out in outs[1:]:
        close(out, outs[0])


@quick
def test_padding_is_seen_by_nobody():
    for kind in ("bert", "t5"):
        model, params, inputs = made(kind)
        adapted = adapt(model.apply, lst(2), on_dense="refuse")
        delta = moved(jax.jit(adapted.init)(jax.random.key(1), params, *inputs))
        other = IDS.copy()
        other[1, 3:] = 7
        got = [jax.jit(adapted.apply)(params, delta, ids, *inputs[1:]) for ids in (IDS, other)]
        np.testing.assert_allclose(*got, atol=1e-6)
        blind = adapted.apply(params, delta, IDS, *((None,) if kind == "bert" else (inputs[1], None, inputs[3])))
        assert float(jnp.abs(blind - got[0])[1].max()) > 1e-4, "the control: without the mask it is seen"


@quick
def test_the_side_decoder_is_causal_and_reads_the_side_encoder():
    model, params, inputs = made("t5")
    adapted = adapt(model.apply, lst(2), on_dense="refuse")
    delta = moved(jax.jit(adapted.init)(jax.random.key(1), params, *inputs))
    run = jax.jit(adapted.apply)
    later = inputs[1].copy()
    later[:, 3] = 9
    a, b = run(params, delta, *inputs), run(params, delta, inputs[0], later, *inputs[2:])
    np.testing.assert_allclose(a[:, :3], b[:, :3], atol=1e-6)
    assert float(jnp.abs(a - b)[:, 3].max()) > 1e-3
    encoder = {**delta, "encoder": moved(delta["encoder"], by=1.0)}
    assert float(jnp.abs(run(params, encoder, *inputs) - a).max()) > 1e-3


@quick
def test_relative_positions_start_as_the_backbones_and_are_shared_by_all_side_layers():
    model, params, inputs = made("t5")
    delta = adapt(model.apply, lst(2, drop_every=2)).init(jax.random.key(1), params, *inputs)
    for name in ("encoder", "decoder"):
        own = delta[name]["relative_bias"]["embedding"]
        np.testing.assert_array_equal(own, params["params"][name]["relative_bias"]["embedding"])
        assert [n for n in delta[name] if n.startswith("layers_")] == ["layers_1"]
    fresh = adapt(model.apply, lst(2, init="random")).init(jax.random.key(1), params, *inputs)
    assert jax.tree.map(jnp.shape, fresh["encoder"]["layers_1"]) == jax.tree.map(
        jnp.shape, delta["encoder"]["layers_1"]
    )


def test_every_fourth_layer_dropped_is_the_papers_choice_for_t5_base():
    config = EncoderDecoderConfig(
        vocab=9, decoder_layers=12, **{**T5, "width": 768, "layers": 12, "heads": 12, "head_dim": 64, "mlp_width": 3072}
    )
    assert [t.layers for t in towers_of(config, "", None, 4)] == [(1, 2, 3, 5, 6, 7, 9, 10, 11)] * 2
    side, r = narrowed(config, None)
    assert (r, side.width, side.mlp_width, side.head_dim, side.heads) == (8, 96, 384, 8, 12)


@quick
def test_it_stands_on_either_side_of_other_methods():
    model, params, inputs = made("bert")
    for method in (
        chain(bitfit(), lst(2)),
        chain(lst(2), bitfit()),
        chain(lora(2), lst(2), head()),
        chain(lst(2), lora(2)),
        chain(houlsby(2), lst(2)),
        chain(lst(2), houlsby(2)),
        chain(prompt_tuning(2), lst(2)),
    ):
        adapted = adapt(model.apply, method, on_dense="refuse")
        shapes = jax.eval_shape(adapted.init, jax.random.key(1), params, *inputs)
        for more in ({}, {"dropout_key": jax.random.key(0)}):
            assert jax.eval_shape(adapted.apply, params, shapes, *inputs, **more).shape == (4, 3)


@quick
def test_it_reads_what_the_methods_below_it_made_and_hooks_above_do_not_see_it(close):
    model, params, inputs = made("bert")
    plain = adapt(model.apply, lst(2), on_dense="refuse")
    phi = moved(plain.init(jax.random.key(1), params, *inputs))
    below = adapt(model.apply, chain(lora(2), lst(2)), on_dense="refuse")
    small = moved(
        lora(2).init(
            jax.random.key(2), type("C", (), dict(apply_fn=model.apply, params=params, inputs=inputs, kwargs={}))()
        )
    )
    merged = lora(2).merge(params, small)
    close(below.apply(params, {"lora": small, "lst": phi}, *inputs), plain.apply(merged, phi, *inputs))
    # Adapters above: they change the backbone's states, exactly as they do below; the side blocks have none.
    above = adapt(model.apply, chain(lst(2), houlsby(2)), on_dense="refuse")
    bottom = adapt(model.apply, chain(houlsby(2), lst(2)), on_dense="refuse")
    delta = moved(bottom.init(jax.random.key(3), params, *inputs))
    close(above.apply(params, delta, *inputs), bottom.apply(params, delta, *inputs))


@quick
def test_a_model_that_was_compiled_and_called_before_is_read_all_the_same(close):
    model, params, inputs = made("bert")
    jitted = jax.jit(model.apply)
    before = jitted(params, *inputs)
    plain, fast = adapt(model.apply, lst(2)), adapt(jitted, lst(2))
    delta = moved(fast.init(jax.random.key(1), params, *inputs))
    for _ in range(2):
        close(fast.apply(params, delta, *inputs), plain.apply(params, delta, *inputs))
        close(jitted(params, *inputs), before)
    wrapped = adapt(lambda p, batch: jitted(p, batch["ids"], attention_mask=batch["mask"]), lst(2))
    close(wrapped.apply(params, delta, {"ids": IDS, "mask": MASK}), plain.apply(params, delta, *inputs))


@quick
def test_a_function_that_is_no_linen_model_says_what_its_blocks_are(tmp_path, close):
    config = BlockConfig(**{**SMALL, "layers": 2, "pre_norm": True})

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
    method = lst(2, config=config, init="random")
    adapted = adapt(model, method)
    delta = moved(adapted.init(jax.random.key(0), params, x))
    out = adapted.apply(params, delta, x, attention_mask=MASK)
    assert out.shape == (4, 6, 2)
    assert float(jnp.abs(out - adapted.apply(params, delta, x))[1].max()) > 1e-4
    save_delta(tmp_path, delta, method, params)
    saved = load_delta(tmp_path, params)
    assert saved.method.config == method.config
    close(adapt(model, saved.method).apply(params, saved.delta, x, attention_mask=MASK), out)
    with pytest.raises(ValueError, match=r"no Linen module with a BlockConfig.*config="):
        adapt(model, lst(2)).init(jax.random.key(0), params, x)
    with pytest.raises(ValueError, match=r"found 0 backbones.*init='random'"):
        adapt(model, lst(2, config=config)).init(jax.random.key(0), params, x)


@quick
def test_one_tower_of_clip_is_adapted_and_both_at_once_are_refused():
    small = {k: v for k, v in SMALL.items() if k != "layers"}
    text = ClipTextConfig(vocab=20, max_positions=8, eos_id=19, layers=2, pre_norm=True, **small)
    vision = VisionConfig(image=(4, 4), patch=(2, 2), channels=1, layers=2, pre_norm=True, **small)
    tower = TextTower(text)
    params = tower.init(jax.random.key(0), IDS, MASK)
    adapted = adapt(tower.apply, lst(2), on_dense="refuse")
    shapes = jax.eval_shape(adapted.init, jax.random.key(0), params, IDS, MASK)
    assert jax.eval_shape(adapted.apply, params, shapes, IDS, MASK).shape == (4, 16)
    clip = Clip(ClipConfig(text=text, vision=vision, projection=4))
    images = np.ones((2, 4, 4, 1), np.float32)
    whole = jax.eval_shape(clip.init, jax.random.key(0), IDS, images)
    with pytest.raises(ValueError, match=r"the model has .* and .*: adapt one"):
        jax.eval_shape(adapt(clip.apply, lst(2)).init, jax.random.key(0), whole, IDS, images)


# ------------------------------------------------------------------------------------------- what it promises to save


def cost(step, *args):
    compiled = jax.jit(step).lower(*args).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def wide(**more):
    config = EncoderConfig(vocab=50, max_positions=64, width=64, layers=4, heads=4, head_dim=16, mlp_width=256, **more)
    return SequenceClassifier(config, 3), jnp.zeros((16, 64), jnp.int32)


@functools.lru_cache
def fine_tuning():
    """Operations of the forward pass and of the whole gradient, and the temporary bytes of the latter."""
    model, ids = wide()
    base = lambda params: jnp.square(model.apply(params, ids)).sum()
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    return cost(base, params)[0], *cost(jax.grad(base), params)


@pytest.mark.parametrize("layout", ["plain", "scan", "remat", "scan and remat"])
def test_the_backward_pass_stays_out_of_the_backbone_and_its_memory_free(layout):
    """Temporaries at least 60 % under full fine-tuning's; operations: one forward pass and three of the side network.
    Such a backward pass has no product of the backbone's left in it: each costs twice its forward product."""
    model, ids = wide(scan="scan" in layout, remat="remat" in layout)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    adapted = adapt(model.apply, chain(lst(), head()))
    delta = jax.eval_shape(adapted.init, jax.random.key(1), params, ids)
    loss = lambda delta, params: jnp.square(adapted.apply(params, delta, ids)).sum()
    forward, whole, memory = fine_tuning()
    assert whole >= 2.5 * forward
    ours, own_memory = cost(jax.grad(loss), delta, params)
    assert own_memory <= 0.4 * memory, f"{own_memory} of {memory} bytes"
    if layout == "plain":  # the count of a loop's operations is of one turn, and recomputation has more
        answered, _ = cost(loss, delta, params)
        assert ours <= forward + 3.2 * (answered - forward), (ours, forward, answered)


@quick
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_no_gradient_reaches_the_backbone(kind):
    model, inputs = bert() if kind == "bert" else t5(tied=False)
    params = jax.jit(model.init)(jax.random.key(0), *inputs)
    adapted = adapt(model.apply, lst(2))
    delta = moved(jax.jit(adapted.init)(jax.random.key(1), params, *inputs))
    grads = jax.jit(jax.grad(lambda p: jnp.sin(adapted.apply(p, delta, *inputs)).sum()))(params)
    alive = {p for p, g in trees.by_path(grads).items() if float(jnp.abs(g).max()) != 0}
    # All that lies above the answer is the model's head.
    above = {"bert": {"params/head/kernel", "params/head/bias"}, "t5": {"params/lm_head/kernel"}}
    assert alive == above[kind]
    assert len(jax.tree.leaves(grads)) > 30


def test_a_stack_of_side_networks_shares_one_forward_pass_of_the_backbone():
    model, params, inputs = made("bert")
    adapted = adapt(model.apply, lst(2, config=model.config))
    delta = jax.jit(adapted.init)(jax.random.key(1), params, *inputs)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 8), delta)
    one, _ = cost(adapted.apply, params, delta, *inputs)
    eight, _ = cost(jax.vmap(adapted.apply, (None, 0, None, None)), params, stacked, *inputs)
    backbone, _ = cost(model.apply, params, *inputs)
    assert eight <= 8.5 * one - 7 * 0.8 * backbone


# -------------------------------------------------------------------------------------------------- structural pruning


def test_two_products_by_hand():
    """4 inputs, 4 hidden, 2 outputs, r = 2. Inputs 1 and 3 are kept. Over these rows alone the hidden units weigh
    3, 9, 8, 1 (over all rows: 13, 9, 8, 11): 1 and 2 stay. Then rows 1 and 2 of the second product: outputs 5 and 6."""
    first = {"kernel": jnp.array([[5.0, 0, 0, 5], [1, -4, 5, 0], [5, 0, 0, 5], [2, 5, -3, 1]]), "bias": jnp.arange(4.0)}
    second = {"kernel": jnp.array([[9.0, 0], [2, 3], [3, -3], [9, 0]])}
    rank = jax.tree.map(jnp.abs, (first, second))
    keep = top(jnp.array([1.0, 7, 2, 3]), 2)
    assert keep.tolist() == [1, 3]
    (cut,), keep = prune_products([first], [rank[0]], keep, 2)
    assert keep.tolist() == [1, 2]
    np.testing.assert_array_equal(cut["kernel"], [[-4, 5], [5, -3]])
    np.testing.assert_array_equal(cut["bias"], [1, 2])
    (cut,), keep = prune_products([second], [rank[1]], keep, 2)
    assert keep.tolist() == [1]
    np.testing.assert_array_equal(cut["kernel"], [[3], [-3]])


def test_kept_indices_increase_ties_go_to_the_first_and_r_1_keeps_all():
    assert top(jnp.array([1.0, 9, 1, 5, 1, 1]), 2).tolist() == [0, 1, 3]
    assert top(jnp.ones(6), 3).tolist() == [0, 1]
    assert top(jnp.array([3.0, 1, 2]), 1).tolist() == [0, 1, 2]
    assert jax.jit(top, static_argnums=1)(jnp.array([0.0, 2, 3, 1]), 4).tolist() == [2]


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt"])
def test_r_1_gives_back_the_weights_in_their_order(kind):
    model, params, _ = made(kind)
    backbone = backbone_of(params)
    pruned = trees.by_path(structural_prune(backbone, magnitude(backbone), 1, pre_norm=model.config.pre_norm))
    own = trees.by_path(backbone)
    assert set(pruned) == {p for p in own if not p.startswith("embeddings")}
    for path, x in pruned.items():
        np.testing.assert_array_equal(x, own[path])


def port(params, importance, r, order):
    """The reference's walk over a flat dict in its own layout, (out, in): `order` lists names as it does."""
    own = {n: np.asarray(x).T for n, x in params.items()}
    rank = {n: np.asarray(x).T for n, x in importance.items()}

    def chosen(scores):
        n = len(scores)
        out = set(np.argsort(scores, kind="stable")[: round(n * (1 - 1 / r))].tolist())
        return [i for i in range(n) if i not in out]

    keep, out = None, {}
    for item in order:
        if isinstance(item, list):
            product = np.prod([rank[n][:, keep] for n in item], axis=0)
            rows = chosen(np.abs(product).sum(1))
            out |= {n: own[n][rows][:, keep].T for n in item}
            keep = rows
        elif ("embedding" in item and "relative" not in item) or "patch" in item:
            scores = np.abs(rank[item]).reshape(len(rank[item]), -1).sum(1)
            keep = chosen(scores)
        else:
            out[item] = own[item][keep]
    return out


def block_order(layer, pre_norm, parts=("attention", "mlp"), norms=("scale",)):
    order = []
    for part in parts:
        products = [["up"], ["down"]] if part == "mlp" else [["query", "key", "value"], ["out"]]
        walk = [[f"{layer}/{part}/{n}/kernel" for n in group] for group in products]
        norm = [f"{layer}/{part}_norm/{n}" for n in norms]
        order += [*norm, *walk] if pre_norm else [*walk, *norm]
    return order


@pytest.mark.parametrize("kind", ["bert", "vit", "t5"])
def test_the_walk_is_the_references_on_random_blocks(kind):
    model, params, _ = made(kind)
    backbone = backbone_of(params)
    pre_norm = model.config.pre_norm
    ranks = jax.tree.map(lambda x: jnp.square(jax.random.normal(jax.random.key(x.size), x.shape)), backbone)
    norms = ("scale",) if kind == "t5" else ("scale", "bias")
    order = ["embeddings/patch/kernel" if kind == "vit" else "embeddings/word/embedding"]
    if kind == "t5":
        order += [x for i in range(3) for x in block_order(f"encoder/layers_{i}", True)] + ["encoder/final_norm/scale"]
        cross = ("attention", "cross_attention", "mlp")
        order += [x for i in range(2) for x in block_order(f"decoder/layers_{i}", True, cross)]
        order += ["decoder/final_norm/scale"]
    else:
        order += [x for i in range(3) for x in block_order(f"layers_{i}", pre_norm, norms=norms)]
        order += [f"final_norm/{n}" for n in norms] if pre_norm else []
    for r in (2, 4):
        want = port(trees.by_path(backbone), trees.by_path(ranks), r, order)
        got = trees.by_path(
            jax.jit(functools.partial(structural_prune, reduction=r, pre_norm=pre_norm))(backbone, ranks)
        )
        for path, x in want.items():
            np.testing.assert_array_equal(got[path], x, err_msg=path)
        assert {p for p in got if "relative" not in p and not p.endswith("bias")} <= set(want)


def test_planted_importance_keeps_exactly_the_planted_rows():
    _, params, _ = made("bert")
    backbone = backbone_of(params)
    rng = np.random.default_rng(5)
    ranks = jax.tree.map(jnp.zeros_like, backbone)
    kernels = {p: x for p, x in trees.by_path(ranks).items() if p.endswith(("kernel", "word/embedding"))}
    picked = {p: np.sort(rng.choice(x.shape[-1], x.shape[-1] // 4, replace=False)) for p, x in kernels.items()}
    for layer in range(3):  # what meets elementwise is planted alike
        for part in ("key", "value"):
            picked[f"layers_{layer}/attention/{part}/kernel"] = picked[f"layers_{layer}/attention/query/kernel"]
    ranks = trees.replace_leaves(ranks, {p: kernels[p].at[..., picked[p]].set(1.0) for p in kernels})
    got = trees.by_path(structural_prune(backbone, ranks, 4, pre_norm=False))
    own = trees.by_path(backbone)
    before = picked["embeddings/word/embedding"]
    for i in range(3):
        for part in (
            ("attention", ["query", "key", "value"]),
            ("attention", ["out"]),
            ("mlp", ["up"]),
            ("mlp", ["down"]),
        ):
            names = [f"layers_{i}/{part[0]}/{n}" for n in part[1]]
            after = picked[f"{names[0]}/kernel"]
            for n in names:
                np.testing.assert_array_equal(got[f"{n}/kernel"], own[f"{n}/kernel"][before][:, after])
                np.testing.assert_array_equal(got[f"{n}/bias"], own[f"{n}/bias"][after])
            before = after


def test_a_fused_product_is_pruned_as_three_and_stacked_layers_as_their_own(close):
    _, params, _ = made("gpt")
    backbone = backbone_of(params)
    fused = structural_prune(backbone, magnitude(backbone), 2)

    def split(layer):
        q = {n: jnp.split(x, 3, axis=-1) for n, x in layer["attention"]["qkv"].items()}
        parts = {name: {n: x[i] for n, x in q.items()} for i, name in enumerate(("query", "key", "value"))}
        return {**layer, "attention": {**parts, "out": layer["attention"]["out"]}}

    apart = {n: split(x) if n.startswith("layers_") else x for n, x in backbone.items()}
    close(
        jax.tree.map(lambda x: x, {n: split(x) if n.startswith("layers_") else x for n, x in fused.items()}),
        structural_prune(apart, magnitude(apart), 2),
    )
    stacked = stack_layers(dict(backbone))
    close(structural_prune(stacked, magnitude(stacked), 2), fused)


def test_squared_gradients_are_summed_sample_by_sample():
    rng = np.random.default_rng(6)
    params = {"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), "n": jnp.arange(2)}
    x, y = rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=(6, 2)).astype(np.float32)
    loss = lambda p, s: 0.5 * jnp.square(s["x"] @ p["w"] - s["y"]).sum()
    want = sum(np.outer(a, a @ np.asarray(params["w"]) - b) ** 2 for a, b in zip(x, y))
    for chunk in (1, 2, 6):
        run = jax.jit(functools.partial(squared_gradients, loss, chunk=chunk))
        got = run(params, {"x": x, "y": y})
        np.testing.assert_allclose(got["w"], want, rtol=1e-5)
        assert got["n"].tolist() == [0, 0]
    with pytest.raises(ValueError, match="6 samples in chunks of 4"):
        squared_gradients(loss, params, {"x": x, "y": y}, chunk=4)
    with pytest.raises(ValueError, match="0 samples"):
        squared_gradients(loss, params, {"x": x[:0], "y": y[:0]})


@quick
def test_importances_from_data_choose_other_weights_and_are_not_kept_in_files(tmp_path, close):
    model, params, inputs = made("bert")
    loss = lambda p, s: optax.softmax_cross_entropy_with_integer_labels(model.apply(p, s[0][None], s[1][None])[0], s[2])
    fisher = jax.jit(functools.partial(squared_gradients, loss))(params, (IDS, MASK, np.arange(4) % 3))
    by_data, by_size = (
        adapt(model.apply, lst(2, importance=i)).init(jax.random.key(1), params, *inputs) for i in (fisher, "magnitude")
    )
    blocks = [trees.by_path(d["side"]["layers_1"]["block"]) for d in (by_data, by_size)]
    assert any(not np.array_equal(blocks[0][p], blocks[1][p]) for p in blocks[0])
    own = backbone_of(params)
    want = structural_prune(own, backbone_of(fisher), 2, pre_norm=False)
    close(by_data["side"]["layers_2"]["block"], want["layers_2"])

    adapted = adapt(model.apply, lst(2, importance=fisher))
    save_delta(tmp_path, by_data, adapted.method, params)
    saved = load_delta(tmp_path, params)
    close(adapt(model.apply, saved.method).apply(params, saved.delta, *inputs), adapted.apply(params, by_data, *inputs))
    with pytest.raises(ValueError, match="does not keep the importances"):
        adapt(model.apply, saved.method).init(jax.random.key(1), params, *inputs)
    wrong = {"params": {**fisher["params"], "head": {"kernel": jnp.ones((2, 2))}}}
    with pytest.raises(ValueError, match=r"importances have .* at 'params/head/.*'"):
        adapt(model.apply, lst(2, importance=wrong)).init(jax.random.key(1), params, *inputs)


# --------------------------------------------------------------------------------------- training, dropout, bad input


@quick
def test_it_learns_with_the_backbone_untouched():
    model, params, inputs = made("bert")
    adapted = adapt(model.apply, chain(lst(2), head()))
    delta = jax.jit(adapted.init)(jax.random.key(1), params, *inputs)
    labels = np.arange(4) % 3
    loss = lambda d: optax.softmax_cross_entropy_with_integer_labels(adapted.apply(params, d, *inputs), labels).mean()
    _, losses = jax.jit(lambda d: descend(lambda d, _: loss(d), d, optax.adam(1e-2), jnp.zeros(60)))(delta)
    assert float(losses[-1]) < 0.02 < 0.5 < float(losses[0])


@quick
def test_dropout_is_the_side_networks_and_the_configs_unless_given():
    model, params, inputs = made("t5")
    dropping = EncoderDecoder(dataclasses.replace(model.config, dropout=0.4))
    delta = moved(adapt(model.apply, lst(2)).init(jax.random.key(1), params, *inputs))
    plain = adapt(model.apply, lst(2)).apply(params, delta, *inputs)
    key = jax.random.key(0)
    cases = {
        "no rate": (adapt(model.apply, lst(2)).apply(params, delta, *inputs, dropout_key=key), False),
        "no key": (adapt(dropping.apply, lst(2)).apply(params, delta, *inputs), False),
        "the config's": (adapt(dropping.apply, lst(2)).apply(params, delta, *inputs, dropout_key=key), True),
        "switched off": (
            adapt(dropping.apply, lst(2, dropout=0.0)).apply(params, delta, *inputs, dropout_key=key),
            False,
        ),
        "its own": (adapt(model.apply, lst(2, dropout=0.4)).apply(params, delta, *inputs, dropout_key=key), True),
    }
    for name, (out, drops) in cases.items():
        assert np.allclose(out, plain, atol=1e-5) != drops, name
    again = adapt(dropping.apply, lst(2)).apply(params, delta, *inputs, dropout_key=key)
    np.testing.assert_array_equal(again, cases["the config's"][0])


@quick
def test_half_precision_stays_in_the_backbone(close):
    model, params, inputs = made("bert")
    half = SequenceClassifier(dataclasses.replace(model.config, dtype="bfloat16", param_dtype="bfloat16"), 3)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    adapted = adapt(half.apply, lst(2), on_dense="refuse")
    delta = jax.jit(adapted.init)(jax.random.key(1), rounded, *inputs)
    assert {x.dtype for x in jax.tree.leaves(delta)} == {jnp.dtype("float32")}
    out = jax.jit(adapted.apply)(rounded, delta, *inputs)
    assert out.dtype == jnp.bfloat16
    # Eight bits of mantissa through three blocks and back.
    close(out, adapt(model.apply, lst(2)).apply(params, delta, *inputs), atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(reduction=0), "reduction 0: expected 1 or more"),
        (dict(init="copied"), "init 'copied'"),
        (dict(keep=()), "at least one layer"),
        (dict(keep=(1,), drop_every=2), "drop_every alone"),
        (dict(drop_every=1), "drop_every 1"),
        (dict(dropout=1.0), "dropout 1.0"),
        (dict(temperature=0.0), "temperature 0.0"),
        (dict(importance="fisher"), "importance 'fisher'"),
    ],
)
def test_options_out_of_range_are_refused_before_any_model_is_seen(options, message):
    with pytest.raises(ValueError, match=message):
        lst(**options)


@quick
def test_what_a_model_cannot_give_is_refused_with_its_numbers():
    model, params, inputs = made("bert")

    def start(method, model=model, params=params, inputs=inputs):
        return jax.eval_shape(adapt(model.apply, method).init, jax.random.key(0), params, *inputs)

    with pytest.raises(ValueError, match=r"reduction 8 does not divide head_dim=4; .* one of \[1, 2, 4\]"):
        start(lst(8))
    with pytest.raises(ValueError, match=r"reduction 3 does not divide width=16"):
        start(lst(3))
    with pytest.raises(ValueError, match=r"leaves the layers \[0, 3\], expected .* 0\.\.2"):
        start(lst(2, keep=(0, 3)))
    grouped, _ = llama(kv_heads=2)
    p = jax.eval_shape(grouped.init, jax.random.key(0), *inputs)
    with pytest.raises(ValueError, match=r"cannot be ranked together.*init='random'"):
        start(lst(2), grouped, p)
    assert start(lst(2, init="random"), grouped, p)
    with pytest.raises(ValueError, match="heads of 1, which rotary positions cannot halve"):
        start(lst(4), grouped, p)
    narrow = SequenceClassifier(dataclasses.replace(model.config, narrow=True), 3, pooling="first")
    shapes = start(lst(2))
    with pytest.raises(ValueError, match=r"layer 2 gives .*narrow=False"):
        jax.eval_shape(adapt(narrow.apply, lst(2)).apply, params, shapes, *inputs)


def test_the_default_reduction_is_the_papers_where_the_model_is_wide_enough():
    sizes = lambda width, k, f: BlockConfig(width=width, layers=1, heads=2, head_dim=k, mlp_width=f)
    assert [narrowed(sizes(*s), None)[1] for s in ((384, 32, 1536), (16, 4, 32), (8, 4, 16), (48, 12, 96))] == [
        8,
        4,
        2,
        6,
    ]


def test_its_configuration_makes_it_again():
    config = DecoderConfig(vocab=20, family="llama", **SMALL)
    for method in (lst(), lst(2, keep=(1,), config=config, name="side"), lst(importance={"w": jnp.ones(2)})):
        again = from_config(method.config)
        assert again.config == method.config
        assert again.name == method.name
