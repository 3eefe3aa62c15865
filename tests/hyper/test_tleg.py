"""TLEG: laws of its card, the reference's numbers, real models of several depths from one gene."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxpeft import PatternError
from jaxpeft.hyper import (
    TargetError,
    depth_coefficients,
    tleg,
    tleg_expand,
    tleg_fit,
    tleg_kd_loss,
    tleg_r2,
)
from jaxpeft.models import ImageClassifier, VisionConfig, unstack_layers

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "tleg" / "golden.safetensors")
CONFIG = VisionConfig(
    width=8, layers=4, heads=2, head_dim=4, mlp_width=16, pre_norm=True, norm_eps=1e-6, image=(8, 8), patch=(4, 4),
    channels=1, scan=True,
)  # fmt: skip
depths, terms = st.integers(1, 9), st.integers(1, 4)


def vit(depth, scan=True):
    return ImageClassifier(dataclasses.replace(CONFIG, layers=depth, scan=scan), 3)


def gene(seed, terms=2):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"layers": {"kernel": draw(terms, 3, 4), "bias": draw(terms, 4)}, "head": draw(4, 2)}


@given(depths, terms)
def test_the_line_is_of_i_over_L(depth, terms):
    expected = [[(i / depth) ** k for k in range(terms)] for i in range(depth)]
    np.testing.assert_allclose(depth_coefficients(depth, terms), expected, atol=1e-6)


@given(depths)
def test_layer_zero_is_the_offset_and_twice_the_depth_holds_the_same_layers(depth):
    g = gene(0)
    once, twice = tleg_expand(g, depth), tleg_expand(g, 2 * depth)
    np.testing.assert_allclose(once["layers"]["kernel"][0], g["layers"]["kernel"][0], atol=1e-6)
    np.testing.assert_allclose(once["layers"]["kernel"], twice["layers"]["kernel"][::2], atol=1e-6)
    np.testing.assert_array_equal(once["head"], g["head"])


@given(st.integers(3, 8))
def test_layers_lie_on_a_line_of_the_right_mean(depth):
    g = gene(1)
    x = tleg_expand(g, depth)["layers"]["kernel"]
    np.testing.assert_allclose(x[2:] - 2 * x[1:-1] + x[:-2], 0, atol=1e-5)
    offset, slope = g["layers"]["kernel"]
    np.testing.assert_allclose(x.mean(0), offset + slope * (depth - 1) / (2 * depth), atol=1e-5)


def test_expansion_is_linear_in_the_gene():
    a, b = gene(2), gene(3)
    mixed = jax.tree.map(lambda x, y: 0.3 * x - 2 * y, a, b)
    for x, y, z in zip(*(jax.tree.leaves(tleg_expand(g, 5)["layers"]) for g in (a, b, mixed))):
        np.testing.assert_allclose(0.3 * x - 2 * y, z, atol=1e-5)


def test_without_a_slope_all_layers_are_the_offset_and_with_one_term_they_are_shared():
    g = gene(4)
    flat = jax.tree.map(lambda x: x.at[1].set(0), g["layers"])
    for x, own in zip(jax.tree.leaves(tleg_expand({**g, "layers": flat}, 5)["layers"]), jax.tree.leaves(flat)):
        np.testing.assert_allclose(x, jnp.broadcast_to(own[0], x.shape), atol=1e-6)
    one = gene(5, terms=1)
    for x in jax.tree.leaves(tleg_expand(one, 3)["layers"]):
        np.testing.assert_array_equal(x[0], x[2])


@given(st.integers(2, 7), st.integers(1, 4))
def test_a_gene_is_recovered_from_what_it_expands_to(depth, terms):
    terms = min(terms, depth)
    g = gene(6, terms)
    back = tleg_fit(tleg_expand(g, depth), terms=terms)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(g)):
        np.testing.assert_allclose(a, b, atol=5e-3 * 4**terms / 16)


def test_what_a_line_explains_is_one_on_it_and_less_beside_it(key):
    g = gene(7)
    params = tleg_expand(g, 6)
    assert all(float(r) > 0.9999 for r in tleg_r2(params, tleg_fit(params)).values())
    off = jax.tree.map(lambda x: x + jax.random.normal(key, x.shape), params)
    fitted = tleg_r2(off, tleg_fit(off))
    assert set(fitted) == {"layers/kernel", "layers/bias"}
    assert all(0 <= float(r) < 0.9 for r in fitted.values())


def test_the_gradients_of_offset_and_slope_are_sums_over_layers(key):
    g, depth = gene(8), 5
    x = jax.random.normal(key, (7, 3))
    loss = lambda p: jnp.tanh(jnp.einsum("ni,lio->lno", x, p["layers"]["kernel"])).sum(0).std()
    own = jax.grad(lambda g: loss(tleg_expand(g, depth)))(g)["layers"]["kernel"]
    each = jax.grad(loss)(tleg_expand(g, depth))["layers"]["kernel"]
    np.testing.assert_allclose(own[0], each.sum(0), atol=1e-5)
    np.testing.assert_allclose(own[1], jnp.tensordot(jnp.arange(depth) / depth, each, 1), atol=1e-5)


def test_layers_equal_those_of_the_reference():
    g = {
        "layers": {
            "kernel": np.stack([GOLDEN[f"linear.weight_{k}"].T for k in ("base", "ilayer")]),
            "bias": np.stack([GOLDEN[f"linear.bias_{k}"] for k in ("base", "ilayer")]),
            "scale": np.stack([GOLDEN[f"norm.weight_{k}"] for k in ("base", "ilayer")]),
            "shift": np.stack([GOLDEN[f"norm.bias_{k}"] for k in ("base", "ilayer")]),
        }
    }
    p, x = tleg_expand(jax.tree.map(jnp.asarray, g), 6)["layers"], GOLDEN["x"]
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    for i in range(6):
        np.testing.assert_allclose(x @ p["kernel"][i] + p["bias"][i], GOLDEN[f"linear.y{i}"], atol=1e-5)
        np.testing.assert_allclose(normed * p["scale"][i] + p["shift"][i], GOLDEN[f"norm.y{i}"], atol=1e-5)


@pytest.mark.parametrize(("a", "tau"), [(1.0, 1.0), (0.5, 3.0), (0.0, 1.0)])
def test_the_loss_equals_that_of_the_reference(a, tau):
    found = tleg_kd_loss(GOLDEN["student"], GOLDEN["teacher"], GOLDEN["y"], a=a, tau=tau)
    np.testing.assert_allclose(found, GOLDEN[f"loss.{a}.{tau}"], rtol=1e-5)


def test_the_loss_is_zero_for_logits_equal_up_to_a_constant_a_row(key):
    z = jax.random.normal(key, (4, 5))
    np.testing.assert_allclose(tleg_kd_loss(z + jnp.arange(4.0)[:, None], z), 0, atol=1e-6)


def test_at_a_large_temperature_its_gradient_is_the_difference_of_the_logits(key):
    s, t = jax.random.normal(key, (2, 4, 5))
    s, t = s - s.mean(-1, keepdims=True), t - t.mean(-1, keepdims=True)
    grad = jax.grad(lambda s: tleg_kd_loss(s, t, tau=200.0))(s)
    np.testing.assert_allclose(grad, (s - t) / (5 * 4 * 5), rtol=0.05, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ whole models


@pytest.fixture(scope="module")
def made():
    hyper = tleg(jax.eval_shape(vit(4).init, jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
    return hyper, hyper.init(jax.random.key(1))


def test_one_gene_starts_models_of_every_depth_scanned_or_not(made, key):
    hyper, gene = made
    x = jax.random.normal(key, (2, 8, 8, 1))
    for depth in (1, 4, 6):
        params = hyper.apply(gene, depth)
        spec = jax.eval_shape(vit(depth).init, key, x)
        assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, spec)
        apart = vit(depth, scan=False).apply(unstack_layers(params), x)
        np.testing.assert_allclose(vit(depth).apply(params, x), apart, atol=1e-5)


def test_starts_are_the_references(made):
    _, gene = made
    layers = gene["params"]["backbone"]["layers"]
    kernel = layers["mlp"]["up"]["kernel"]
    assert kernel.shape[0] == 2
    np.testing.assert_allclose(kernel.std(axis=(1, 2)), 0.02, rtol=0.25)
    scale = layers["mlp_norm"]["scale"]
    assert scale[0].tolist() == [1.0] * 8
    assert scale[1].tolist() == [0.0] * 8
    assert not layers["attention"]["query"]["bias"].any()


def test_it_runs_under_jit_vmap_and_grad(made, key):
    hyper, gene = made
    x = jax.random.normal(key, (2, 8, 8, 1))
    loss = jax.jit(lambda g: jnp.square(vit(4).apply(hyper.apply(g), x)).sum())
    grads = jax.grad(loss)(gene)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    two = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), gene)
    np.testing.assert_allclose(jax.vmap(loss)(two)[0], loss(gene), rtol=1e-4)


def test_a_base_gives_what_stands_outside_of_the_layers(key):
    params = vit(4).init(key, jnp.zeros((1, 8, 8, 1)))
    gene = tleg(params, base=params).init(key)
    np.testing.assert_array_equal(gene["params"]["head"]["kernel"], params["params"]["head"]["kernel"])


def test_bad_input_is_named(made):
    _hyper, gene = made
    with pytest.raises(ValueError, match="0 layers"):
        tleg_expand(gene, 0)
    with pytest.raises(PatternError):
        tleg_expand({"w": jnp.ones((2, 3))}, 3)
    with pytest.raises(TargetError, match="first axes differ"):
        tleg_expand({"layers": {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}}, 3)
    with pytest.raises(ValueError, match="at most one each"):
        tleg_fit({"layers": {"a": jnp.ones((2, 3))}}, terms=3)
    with pytest.raises(ValueError, match="at least one"):
        tleg({"layers": {"a": jnp.ones((2, 3))}}, terms=0)
    with pytest.raises(TargetError, match="empty"):
        tleg({})
    with pytest.raises(ValueError, match="no labels"):
        tleg_kd_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), a=0.5)
    with pytest.raises(ValueError, match="expected both"):
        tleg_kd_loss(jnp.ones((2, 3)), jnp.ones((2, 4)))
