"""The hierarchical transformer: windows against brute force, one answer in all settings, and what others find in it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft import adapt, chain, head, houlsby, per_task, read, trees
from jaxpeft.models.hierarchical import (
    DenseModel,
    HierarchicalClassifier,
    HierarchicalConfig,
    HierarchicalTransformer,
    WindowBlock,
    offset_numbers,
    shift_mask,
    unwindowed,
    windows,
)

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = HierarchicalConfig(
    width=8, depths=(2, 1), heads=(2, 2), window=2, image=(8, 12), patch=(2, 1), mlp_ratio=2, init_std=0.3, plain=True
)
X = np.random.default_rng(0).normal(size=(2, 8, 12, 1)).astype(np.float32)


def made(model, *inputs):
    """Random variables, norms and tables included."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(0.4 * rng.normal(size=s.shape), s.dtype), shapes)


def test_windows_are_cut_row_by_row_and_put_back():
    x = jnp.arange(2 * 4 * 6).reshape(2, 4, 6, 1)
    cut = windows(x, 2)
    assert cut.shape == (12, 4, 1)
    for b in range(2):
        for i in range(2):
            for j in range(3):
                want = x[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(4, 1)
                assert (cut[b * 6 + i * 3 + j] == want).all()
    assert (unwindowed(cut, (4, 6), 2) == x).all()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_offsets_are_numbered_by_what_they_are(size):
    at = [(i, j) for i in range(size) for j in range(size)]
    numbers = offset_numbers(size)
    found = {}
    for a, p in enumerate(at):
        for b, q in enumerate(at):
            found.setdefault((p[0] - q[0], p[1] - q[1]), set()).add(int(numbers[a, b]))
    assert all(len(n) == 1 for n in found.values())
    assert {n for (n,) in found.values()} == set(range((2 * size - 1) ** 2))


@pytest.mark.parametrize(("grid", "size", "shift"), [((4, 6), 2, (1, 1)), ((8, 4), 4, (2, 0)), ((6, 6), 3, (1, 1))])
def test_a_shifted_window_joins_only_what_stood_together(grid, size, shift):
    rows, columns = np.meshgrid(*map(range, grid), indexing="ij")
    at = np.stack([np.roll(x, (-shift[0], -shift[1]), (0, 1)) for x in (rows, columns)], -1)
    cut = np.asarray(windows(jnp.asarray(at)[None], size))
    near = np.abs(cut[:, :, None] - cut[:, None]).max(-1) < size
    assert (shift_mask(grid, size, shift) == near).all()


@pytest.mark.parametrize("shift", [0, 1])
def test_a_block_is_attention_over_all_with_other_windows_masked(shift, key, close):
    c, grid, w = CONFIG.stage(0), (4, 6), 2
    block = WindowBlock(c, grid, w, shift)
    x = jax.random.normal(key, (2, 24, 8))
    p = made(block, x)["params"]

    numbers = jax.tree.map(np.asarray, p)  # numpy, which broadcasts
    x = np.asarray(x)

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        unit = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + c.norm_eps)
        return unit * numbers[name]["scale"] + numbers[name]["bias"]

    linear = lambda a, x: x @ a["kernel"] + a["bias"]
    own = numbers["attention"]
    q, k, v = (linear(own[n], norm("attention_norm", x)).reshape(2, 24, 2, 4) for n in ("query", "key", "value"))
    at = np.array([(i, j) for i in range(grid[0]) for j in range(grid[1])])
    window = (at - shift) // w
    together = (window[:, None] == window[None]).all(-1)
    apart = np.clip(at[:, None] - at[None], 1 - w, w - 1) + w - 1
    bias = np.moveaxis(numbers["offsets"][apart[..., 0] * (2 * w - 1) + apart[..., 1]], -1, 0)
    logits = np.where(together, np.einsum("bqhe,bkhe->bhqk", q, k) / 2 + bias, -np.inf)
    y = np.einsum("bhqk,bkhe->bqhe", np.asarray(jax.nn.softmax(logits, -1)), v).reshape(2, 24, 8)
    y = x + linear(own["out"], y)
    hidden = np.asarray(jax.nn.gelu(linear(numbers["mlp"]["up"], norm("mlp_norm", y)), approximate=False))
    close(block.apply({"params": p}, x), y + linear(numbers["mlp"]["down"], hidden), atol=2e-5)


def test_shapes_names_and_marks():
    model = HierarchicalTransformer(CONFIG)
    params = made(model, X)
    maps = jax.eval_shape(model.apply, params, X)
    assert [m.shape for m in maps] == [(2, 4, 12, 8), (2, 2, 6, 16)]
    paths = trees.by_path(params)
    for name in (
        "attention/query/kernel",
        "attention/out/kernel",
        "mlp/up/kernel",
        "mlp/down/kernel",
        "mlp_norm/scale",
    ):
        assert f"params/stages_0/layers_1/{name}" in paths
        assert f"params/stages_1/layers_0/{name}" in paths
    assert paths["params/stages_1/merge/kernel"].shape == (32, 16)
    _, taps = jax.eval_shape(read(model.apply, ["embedded", "hidden", "final_hidden"]), params, X)
    assert [t.shape for t in taps["hidden"]] == [(2, 48, 8), (2, 48, 8), (2, 12, 16)]
    assert [t.shape for t in taps["final_hidden"]] == [(2, 2, 6, 16)]
    dense = DenseModel(CONFIG, 3, head_width=4)
    assert jax.eval_shape(dense.apply, made(dense, X), X).shape == (2, 8, 12, 3)
    classes = HierarchicalClassifier(CONFIG, 5)
    assert jax.eval_shape(classes.apply, made(classes, X), X).shape == (2, 5)


def test_after_one_block_a_pixels_answer_comes_from_its_window():
    model = DenseModel(dataclasses.replace(CONFIG, depths=(1,), heads=(2,)), 1, head_width=4)
    params = made(model, X)
    run = lambda x: model.apply(params, x)[0, ..., 0]
    felt = jnp.abs(jax.jacobian(run)(jnp.asarray(X[:1]))[:, :, 0, :, :, 0]) > 0
    for i in range(8):
        for j in range(12):
            # Windows of 2 x 2 patches of 2 x 1 pixels.
            assert {(a // 4, b // 2) for a, b in np.argwhere(felt[i, j]).tolist()} == {(i // 4, j // 2)}


def test_recomputed_layers_fused_ones_and_half_precision_give_the_same_answer(close):
    model = DenseModel(CONFIG, 2, head_width=4)
    params = made(model, X)
    loss = lambda m: jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(m.apply(p, X)))))
    want = loss(model)(params)
    for fields in ({"remat": True}, {"plain": False}):
        other = DenseModel(dataclasses.replace(CONFIG, **fields), 2, head_width=4)
        close(loss(other)(params), want, atol=1e-4)
    half = DenseModel(dataclasses.replace(CONFIG, dtype=jnp.bfloat16), 2, head_width=4)
    y = jax.jit(half.apply)(params, X)
    assert y.dtype == jnp.bfloat16
    full = jax.jit(model.apply)(params, X)
    assert float(jnp.abs(y.astype(jnp.float32) - full).mean()) < 0.03 * float(jnp.abs(full).max())


def test_dropout_acts_where_it_is_asked_for():
    model = HierarchicalClassifier(dataclasses.replace(CONFIG, dropout=0.5), 3)
    params = made(model, X)
    run = lambda k: model.apply(params, X, deterministic=False, rngs={"dropout": jax.random.key(k)})
    assert not np.allclose(run(0), run(1))
    np.testing.assert_allclose(model.apply(params, X), HierarchicalClassifier(CONFIG, 3).apply(params, X), atol=1e-5)


def test_adapters_and_heads_of_several_tasks_hook_into_it():
    model = DenseModel(CONFIG, 2, head_width=4)
    params = made(model, X)
    adapted = adapt(model.apply, chain(houlsby(2), per_task(head(), 3)), on_dense="refuse")
    delta = jax.eval_shape(adapted.init, jax.random.key(0), params, X)
    assert len(delta["houlsby"]) == 2 * 3
    out = jax.eval_shape(lambda d: adapted.apply(params, d, X, task=jnp.array([2, 0])), delta)
    assert out.shape == (2, 8, 12, 2)


def test_what_does_not_fit_is_refused():
    make = lambda **fields: dataclasses.replace(CONFIG, **fields)
    with pytest.raises(ValueError, match=r"depths \(2, 1\) and heads \(2,\)"):
        make(heads=(2,))
    with pytest.raises(ValueError, match="3 heads do not divide stage 0's width, 8"):
        make(heads=(3, 2))
    with pytest.raises(ValueError, match="makes no whole windows of 2 in stage 1"):
        make(image=(8, 10))
    with pytest.raises(ValueError, match="makes no whole windows of 2 in stage 0"):
        make(image=(7, 12))
    with pytest.raises(ValueError, match=r"expected \(batch, 8, 12, 1\)"):
        jax.eval_shape(HierarchicalTransformer(CONFIG).init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
