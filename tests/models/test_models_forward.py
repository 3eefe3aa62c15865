"""What every family promises: shapes, one answer in all layouts, padding that does not matter, virtual tokens."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxpeft.models import (
    AttentionCore,
    Block,
    BlockConfig,
    Encoder,
    SequenceClassifier,
    contrastive_loss,
    mean_pool,
    positions_from_mask,
    shift_right,
    stack_layers,
)

SHAPES = {
    "bert": (2, 5, 8),
    "roberta": (2, 2),
    "gpt2": (2, 5, 20),
    "llama": (2, 5, 20),
    "t5": (2, 5, 20),
    "vit": (2, 3),
    "clip": (2, 2),
}
TEXT = ["bert", "gpt2", "llama"]  # hidden states or logits per token, one input


def run(model, params, args, **kwargs):
    """model.apply, compiled as a whole: op by op it takes longer."""
    return jax.jit(lambda p, a, k: model.apply(p, *a, **k))(params, args, kwargs)


def test_shapes_and_paths(family, build, inputs, weights):
    model = build(family)
    params = weights(model)
    assert run(model, params, inputs(model)).shape == SHAPES[family]
    paths = {"/".join(path) for path in flatten_dict(params["params"])}
    qkv = "qkv" if family == "gpt2" else "query"
    assert any(path.endswith(f"layers_0/attention/{qkv}/kernel") for path in paths)
    assert any(path.endswith("layers_1/mlp/up/kernel") for path in paths)
    assert any(path.endswith("layers_1/mlp_norm/scale") for path in paths)


def test_layouts_agree(family, build, inputs, as_layout, weights, key):
    """Scanned and recomputed layers give the plain answer and gradient (1e-5: another order of the same sums)."""
    plain = build(family)
    args = inputs(plain)
    params = weights(plain)

    def loss(model, params):
        return jnp.sum(model.apply(params, *args).astype(jnp.float32) ** 2)

    def graded(model, params):
        return jax.jit(jax.value_and_grad(lambda p: loss(model, p)))(params)

    want, slope = graded(plain, params)
    both = as_layout(plain, scan=True, remat=True)
    got, other_slope = graded(both, stack_layers(params))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), other_slope, stack_layers(slope))
    shapes = jax.eval_shape(both.init, key, *args)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, stack_layers(params))
    if family in ("bert", "t5"):
        for fields, tree in (({"scan": True}, stack_layers(params)), ({"remat": True}, params)):
            out = run(as_layout(plain, **fields), tree, args)
            np.testing.assert_allclose(jnp.sum(out**2), want, rtol=1e-5)


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_reach_tokens(family, build, inputs, side, weights):
    model = build(family)
    (ids,) = inputs(model)
    params = weights(model)
    keep = slice(2, 5) if side == "left" else slice(0, 3)
    mask = jnp.zeros((2, 5), jnp.int32).at[:, keep].set(1)
    other = jnp.where(mask == 1, ids, (ids + 7) % 20)
    a, b = (run(model, params, (x, mask)) for x in (ids, other))
    np.testing.assert_allclose(a[:, keep], b[:, keep], atol=1e-6)
    assert np.isfinite(np.asarray(a)).all()
    if family != "bert":  # positions that skip the padding give the answer without it
        out = run(model, params, (ids, mask), positions=positions_from_mask(mask))
        np.testing.assert_allclose(out[:, keep], run(model, params, (ids[:, keep],)), atol=1e-5)


def test_padding_in_t5_and_causality(build, inputs, weights):
    model = build("t5")
    ids, targets = inputs(model)
    params = weights(model)
    mask = jnp.ones((2, 5), jnp.int32).at[:, 3:].set(0)
    want = run(model, params, (ids, targets, mask))
    np.testing.assert_allclose(want, run(model, params, (ids.at[:, 3:].set(3), targets, mask)), atol=1e-6)
    later = run(model, params, (ids, targets.at[:, 4].set(3), mask))
    np.testing.assert_allclose(want[:, :4], later[:, :4], atol=1e-6)


def test_roberta_positions_skip_padding(build, weights):
    """Left padding with the pad id leaves the answer as it is without padding."""
    model = build("roberta")
    ids = jnp.array([[5, 6, 7]])
    params = weights(model)
    padded, mask = jnp.array([[1, 1, 5, 6, 7]]), jnp.array([[0, 0, 1, 1, 1]])
    hidden = [
        run(Encoder(model.config), {"params": params["params"]["backbone"]}, args) for args in ((ids,), (padded, mask))
    ]
    np.testing.assert_allclose(hidden[0], hidden[1][:, 2:], atol=1e-6)


def test_a_row_without_tokens_stays_finite(build, inputs, weights):
    for family in TEXT:
        model = build(family)
        (ids,) = inputs(model)
        out = run(model, weights(model), (ids, jnp.zeros((2, 5), jnp.int32)))
        assert np.isfinite(np.asarray(out)).all(), family
    assert (mean_pool(jnp.ones((1, 2, 3)), jnp.zeros((1, 2), jnp.int32)) == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(family, build, inputs, dtype, weights):
    model = build(family, dtype=dtype, param_dtype=dtype)
    args = inputs(model)
    params = weights(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    out = run(model, params, args)
    assert out.dtype == jnp.dtype(dtype)
    wide = build(family)
    want = run(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), args)
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=0.1, rtol=0.1)  # 8 bits of mantissa


def test_dropout_only_on_request(family, build, inputs, weights, key):
    field = {"vit": {"dropout": 0.5}, "clip": None}.get(family, {"dropout": 0.5})
    if field is None:
        pytest.skip("CLIP has no hidden dropout")
    model = build(family, **field, scan=True, remat=True)
    args = inputs(model)
    params = weights(model)
    still = run(model, params, args)
    noisy = jax.jit(lambda key: model.apply(params, *args, deterministic=False, rngs={"dropout": key}))
    loose = [noisy(jax.random.key(i)) for i in (0, 0, 1)]
    np.testing.assert_array_equal(loose[0], loose[1])
    assert not np.allclose(loose[0], loose[2])
    assert not np.allclose(loose[0], still)


def in_front(prompt):
    """A hook that puts `prompt` (l, d) in front of what `embeddings/word` returns."""

    def hook(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if context.module.path[-2:] == ("embeddings", "word") and context.method_name == "__call__":
            return jnp.concatenate([jnp.broadcast_to(prompt[None], (y.shape[0], *prompt.shape)), y], axis=1)
        return y

    return nn.intercept_methods(hook)


@pytest.mark.parametrize("family", [*TEXT, "roberta", "t5"])
@pytest.mark.parametrize("scan", [False, True])
def test_virtual_tokens(family, build, inputs, scan, weights):
    """Two virtual tokens equal two real ones whose embeddings they are (positions and masks follow)."""
    model = build(family, scan=scan, **({"dropout": 0.0} if family == "t5" else {}))
    args = inputs(model)
    params = weights(model)
    table = params["params"].get("backbone", params["params"])["embeddings"]["word"]["embedding"]
    real = jnp.concatenate([jnp.full((2, 1), 4), jnp.full((2, 1), 9), args[0]], axis=1)
    mask = jnp.ones((2, 5), jnp.int32).at[0, 3:].set(0)
    longer = jnp.pad(mask, ((0, 0), (2, 0)), constant_values=1)
    rest = args[1:]
    with in_front(table[jnp.array([4, 9])]):
        got = run(model, params, (args[0], *rest, mask))
    want = run(model, params, (real, *rest, longer))
    if family in TEXT:
        assert got.shape[1] == 7
        got, want = got[longer == 1], want[longer == 1]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_virtual_tokens_with_given_positions(build, inputs, weights):
    model = build("llama")
    (ids,) = inputs(model)
    params = weights(model)
    prompt = jnp.ones((2, 8))
    with in_front(prompt):
        a = run(model, params, (ids,))
        b = run(model, params, (ids,), positions=jnp.arange(5)[None])
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_taps_are_named(family, build, inputs, weights):
    """Readers find hidden states by these names."""
    prefixes = {"t5": ("encoder_", "decoder_"), "clip": ("vision_", "text_")}.get(family, ("",))
    for scan in (False, True):
        model = build(family, scan=scan)
        args = inputs(model)
        params = weights(model)
        text = str(jax.make_jaxpr(model.apply)(params, *args))
        for prefix in prefixes:
            count = 1 if scan else 2
            assert text.count(f"name={prefix}hidden]") == count
            assert text.count(f"name={prefix}embedded]") == 1
            assert text.count(f"name={prefix}final_hidden]") == 1


def test_core_can_be_hooked(family, build, inputs, weights, key):
    """A hook prepends a key and a value to every self-attention, masks and causality included, under scan and remat."""

    def prefix(call, args, kwargs, context):
        if isinstance(context.module, AttentionCore):
            q, k, v, bias = args
            ones = jnp.ones_like(k[:, :1])
            bias = None if bias is None else jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (1, 0)))
            args = (q, jnp.concatenate([ones, k], 1), jnp.concatenate([ones, v], 1), bias)
        return call(*args, **kwargs)

    model = build(family, scan=True, remat=True)
    arrays = inputs(model)
    params = weights(model)
    plain = run(model, params, arrays)
    with nn.intercept_methods(prefix):
        out = run(model, params, arrays)
    assert out.shape == plain.shape
    assert not np.allclose(out, plain)


def test_grouped_heads_equal_repeated_ones(key):
    q, k, v = (jax.random.normal(jax.random.fold_in(key, i), (2, 3, h, 5)) for i, h in enumerate((6, 2, 2)))
    core = AttentionCore()
    want = core.apply({}, q, jnp.repeat(k, 3, 2), jnp.repeat(v, 3, 2), None)
    np.testing.assert_allclose(core.apply({}, q, k, v, None), want, atol=1e-6)
    np.testing.assert_allclose(want, jax.nn.dot_product_attention(q, k, v), atol=1e-6)


def test_block_alone_with_free_head_size(key):
    """A side network may use a narrower block whose heads do not fill the width."""
    config = BlockConfig(width=6, layers=1, heads=2, head_dim=5, mlp_width=7)
    x = jnp.ones((1, 3, 6))
    params = Block(config).init(key, x)
    assert params["params"]["attention"]["query"]["kernel"].shape == (6, 10)
    assert Block(config).apply(params, x, None, True).shape == x.shape


@pytest.mark.parametrize("pooling", ["mean", "first", "bert"])
def test_classifier_poolings(build, inputs, pooling, weights):
    config = build("bert").config
    model = SequenceClassifier(config, 4, pooling)
    (ids,) = inputs(model)
    mask = jnp.ones((2, 5), jnp.int32).at[:, 3:].set(0)
    params = weights(model)
    assert ("pooler" in params["params"]["backbone"]) == (pooling == "bert")
    out = run(model, params, (ids, mask))
    np.testing.assert_allclose(out, run(model, params, (ids.at[:, 3:].set(0), mask)), atol=1e-6)


def test_small_helpers():
    labels = jnp.array([[5, 6, -100]])
    np.testing.assert_array_equal(shift_right(labels, 0), [[0, 5, 6]])
    np.testing.assert_array_equal(shift_right(jnp.array([[5, -100, 7]]), 1), [[1, 5, 1]])
    np.testing.assert_array_equal(positions_from_mask(jnp.array([[0, 0, 1, 1]])), [[0, 0, 0, 1]])
    np.testing.assert_allclose(contrastive_loss(jnp.zeros((4, 4))), np.log(4.0), rtol=1e-6)


# ------------------------------------------------------------------------------------------------ errors


def test_bad_inputs_are_refused(build, inputs, weights, key):
    bert, gpt2, vit, t5 = (build(name) for name in ("bert", "gpt2", "vit", "t5"))
    (ids,) = inputs(bert)
    params = weights(bert)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 4\)"):
        bert.apply(params, ids, jnp.ones((2, 4), jnp.int32))
    with pytest.raises(ValueError, match="input_ids must have shape"):
        bert.apply(params, ids[0])
    with pytest.raises(ValueError, match="13 positions, but the model has 12"):
        bert.apply(params, jnp.zeros((1, 13), jnp.int32))
    with pytest.raises(ValueError, match="13 positions"):
        jax.eval_shape(gpt2.init, key, jnp.zeros((1, 13), jnp.int32))
    with pytest.raises(ValueError, match="positions has shape"):
        jax.eval_shape(lambda k: gpt2.init(k, ids, positions=jnp.zeros((2, 3), jnp.int32)), key)
    with pytest.raises(ValueError, match="channels stand last"):
        jax.eval_shape(vit.init, key, jnp.zeros((1, 3, 4, 8)))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        jax.eval_shape(t5.init, key, ids, ids, None, jnp.ones((2, 3), jnp.int32))
    plain = Encoder(dataclasses.replace(bert.config, pooler=False))
    with pytest.raises(ValueError, match="no pooler"):
        plain.apply(params, ids, pooled=True)
    with pytest.raises(ValueError, match="pooling must be"):
        jax.eval_shape(SequenceClassifier(bert.config, 2, "max").init, key, ids)
    with pytest.raises(ValueError, match="head_kind must be"):
        jax.eval_shape(SequenceClassifier(bert.config, 2, "mean", "deep").init, key, ids)
    with pytest.raises(ValueError, match="as many images as texts"):
        contrastive_loss(jnp.zeros((2, 3)))
