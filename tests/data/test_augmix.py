"""AugMix: the operations against Pillow's numbers, and what mixing keeps."""

import re
from collections import defaultdict
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpeft.data.augmix import AUGMIX_OPS, augmix, operate

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "augmix" / "golden.safetensors")
SIDED = [n for n in AUGMIX_OPS if n.startswith(("rotate", "shear", "translate"))]
one = jax.jit(operate, static_argnames=("name", "bounds"))
mixed = jax.jit(augmix, static_argnames=("ops", "width", "depth", "bounds"))


def drawn(seed=0, n=6, channels=1):
    """Images whose grey levels are exact."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, 256, (n, 8, 7, channels)) / 255, jnp.float32)


@pytest.mark.parametrize("name", AUGMIX_OPS)
def test_operations_are_the_reference_codes(name):
    by_channels = defaultdict(list)
    for key, want in GOLDEN.items():
        image, *rest = key.split("/")
        if rest[0] == name:
            by_channels[want.shape[-1]].append((GOLDEN[f"{image}/image"], float(rest[1]), want))
    assert set(by_channels) == {1, 3}
    for cases in by_channels.values():
        images, strengths, want = (np.stack(x) for x in zip(*cases))
        got = np.asarray(one(name, jnp.asarray(images / 255, jnp.float32), jnp.asarray(strengths))) * 255
        apart = np.abs(got - want)
        # Where float32 and float64 fall on two sides of a whole number, the level is the next one.
        assert apart.max() < 1.001
        assert (apart > 0.01).mean() < 0.002
        if name not in ("rotate", "shear_x", "shear_y"):
            assert apart.max() < 0.01


@pytest.mark.parametrize("name", SIDED)
def test_what_moves_goes_both_ways_and_stands_still_at_zero(name):
    x = drawn()
    np.testing.assert_allclose(one(name, x, jnp.zeros(6)), x, atol=1e-6)
    there, back = one(name, x, jnp.full(6, 9.0)), one(name, x, jnp.full(6, -9.0))
    assert not np.allclose(there, back)
    assert not np.allclose(there, x)


def test_a_shift_is_whole_pixels_with_black_behind():
    x = drawn()
    got = one("translate_x", x, jnp.full(6, 9.0))  # ⌊9 / 10 · 7 / 3⌋ = 2
    np.testing.assert_allclose(got[:, :, :-2], x[:, :, 2:], atol=1e-6)
    assert not got[:, :, -2:].any()


@pytest.mark.parametrize("options", [dict(width=1, depth=0), dict(width=3, depth=0)])
def test_chains_of_nothing_leave_images_as_they_are(key, options):
    x = 2 * jax.random.uniform(key, (4, 8, 7, 1)) - 1  # not of 256 levels
    assert np.array_equal(mixed(key, x, bounds=(-1.0, 1.0), **options), x)


def test_a_mixture_stays_within_bounds_and_changes_each_image_on_its_own(key):
    x = jnp.broadcast_to(drawn(1)[:1], (6, 8, 7, 1))
    low, high = (mixed(key, x, severity=s) for s in (0.2, 9.0))
    for got in (low, high):
        assert got.shape == x.shape
        assert float(got.min()) >= -1e-6
        assert float(got.max()) <= 1 + 1e-6
    assert len({bytes(np.asarray(a)) for a in high}) == 6
    assert float(jnp.abs(high - x).mean()) > float(jnp.abs(low - x).mean()), "severity is strength"


def test_a_mixture_lies_between_the_image_and_its_only_chain(key):
    x = jnp.round(50 + 0.4 * 255 * drawn(2)) / 255
    got = mixed(key, x, ("autocontrast",), width=1, depth=1)
    want = one("autocontrast", x, jnp.ones(6))
    for image, share, changed in zip(np.asarray(got - x), np.asarray(want - x), np.abs(want - x) > 0.02):
        assert changed.any()
        part = image[changed] / share[changed]
        np.testing.assert_allclose(part, part[0], atol=1e-3)
        assert 0 <= part[0] <= 1


def test_bounds_only_move_the_scale(key):
    x = drawn(3)
    np.testing.assert_allclose(2 * mixed(key, x) - 1, mixed(key, 2 * x - 1, bounds=(-1.0, 1.0)), atol=1e-5)


@pytest.mark.parametrize("width", [1, 2])
def test_the_images_share_follows_its_distribution(key, width):
    # A severity of 0.1 leaves one strength, at which solarising turns white into black: of white, x̃ is 1 - m.
    x = jnp.ones((4000, 1, 1, 1))
    for alpha in (0.5, 1.0, 4.0):
        got = mixed(key, x, ("solarise",), width=width, depth=1, severity=0.1, alpha=alpha)
        m = 1 - np.asarray(got).ravel()
        assert m.mean() == pytest.approx(0.5, abs=0.03)
        assert m.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)  # Beta(α, α)'s


def test_vmap_over_keys_and_coefficients_is_one_after_another(key):
    x = drawn(4, 4)
    keys = jax.random.split(key, 2)
    run = partial(augmix, ops=("rotate", "autocontrast"), width=2)
    severities, alphas = jnp.array([1.0, 9.0]), jnp.array([0.5, 2.0])
    together = jax.jit(jax.vmap(lambda k, s, a: run(k, x, severity=s, alpha=a)))(keys, severities, alphas)
    single = jax.jit(lambda k, s, a: run(k, x, severity=s, alpha=a))
    for i, got in enumerate(together):
        np.testing.assert_allclose(got, single(keys[i], severities[i], alphas[i]), atol=1e-5)


def test_types_under_strict_promotion(key):
    with jax.numpy_dtype_promotion("strict"):
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jax.ShapeDtypeStruct((2, 8, 8, 3), dtype)
            assert jax.eval_shape(augmix, key, x).dtype == dtype
            assert jax.eval_shape(partial(operate, "rotate"), x, jnp.ones(2)).dtype == dtype


X = np.zeros((2, 4, 4, 1), np.float32)
BAD = {
    "operations ('blur',): expected some of autocontrast": lambda k: augmix(k, X, ("blur",)),
    "operations (): expected": lambda k: augmix(k, X, ()),
    "width 0: there is at least one chain": lambda k: augmix(k, X, width=0),
    "depth -1": lambda k: augmix(k, X, depth=-1),
    "images are float32[4, 4, 1]": lambda k: augmix(k, X[0]),
    "images are uint8[2, 4, 4, 1]": lambda k: augmix(k, X.astype(np.uint8)),
    "strength of shape (3,) for 2 images": lambda k: operate("rotate", X, np.ones(3)),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_is_said(message, key):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(BAD[message], key)
