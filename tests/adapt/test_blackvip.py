"""Black-box prompting: the card's oracles, and learning from values alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft import adapt, blackvip, border_prompt, data, train, trees
from jaxpeft.adapt.blackvip import _doubled, coordinate, coordinator, pooled_pixels
from jaxpeft.tune import gain, spsa_gc, value_and_spsa

pytestmark = pytest.mark.usefixtures("quick")


def model(params, x):
    return x.reshape(x.shape[0], -1) @ params["w"]


def case(size=8, channels=3, **options):
    x = np.random.default_rng(0).uniform(-1, 1, (6, size, size, channels)).astype(np.float32)
    params = {"w": 0.3 * jax.random.normal(jax.random.key(0), (size * size * channels, 3))}
    adapted = adapt(model, blackvip(**options))
    return adapted, params, adapted.init(jax.random.key(1), params, x), x


def test_the_papers_decoder_has_9920_numbers():
    phi = jax.eval_shape(lambda k: coordinator(k, 224, 3, 768, 800), jax.random.key(0))
    assert trees.count(phi) == 9920
    assert phi["trigger"].shape == (800,)
    image = jax.eval_shape(lambda p: coordinate(p, jnp.zeros((2, 768)), 224), phi)
    assert image.shape == (2, 224, 224, 3)


def test_without_strength_it_is_the_model_itself():
    adapted, params, delta, x = case(eps=0.0)
    assert (adapted.apply(params, delta, x) == model(params, x)).all()
    loud, _, _, _ = case(eps=5.0)
    assert not jnp.allclose(loud.apply(params, delta, x), model(params, x), atol=1e-2)


def test_pixels_stay_in_their_range():
    seen = []

    def watching(params, x):
        seen.append(x)
        return model(params, x)

    _, params, delta, x = case()
    low = (-0.5, -0.2, -1.0)
    adapt(watching, blackvip(eps=50.0, low=low, high=0.3)).apply(params, delta, x)
    assert (seen[-1] >= jnp.array(low)).all()
    assert float(seen[-1].max()) <= np.float32(0.3)


def test_doubling_is_a_transposed_convolution(key):
    x = jax.random.normal(key, (2, 3, 3, 4))
    w = jax.random.normal(jax.random.fold_in(key, 1), (4, 5, 2, 2))
    got = _doubled(x, w, mixing=True)
    for i, j, p, q in ((0, 0, 0, 0), (2, 1, 1, 0), (1, 2, 0, 1)):
        want = jnp.einsum("bi,ik->bk", x[:, i, j], w[:, :, p, q])
        np.testing.assert_allclose(got[:, 2 * i + p, 2 * j + q], want, rtol=1e-4, atol=1e-5)
    apart = _doubled(x, w, mixing=False)
    np.testing.assert_allclose(apart[:, 3, 4], (x[:, 1, 2][..., None] * w[:, :, 1, 0]).reshape(2, -1), rtol=1e-5)


def test_the_encoder_is_frozen_and_the_trigger_is_shared():
    calls = []

    def encoder(x):
        calls.append(x.shape)
        return x.mean((1, 2))

    adapted, params, delta, x = case(encoder=encoder)
    assert delta["trigger"].size % 1 == 0
    loss = lambda d, x: jnp.sum(jnp.sin(adapted.apply(params, d, x)))
    assert jnp.abs(jax.grad(loss)(delta, x)["trigger"]).max() > 0
    assert calls


def test_it_learns_from_values_alone():
    """Labels are those of the images shifted by a constant that the prompt can add back."""
    rng = np.random.default_rng(0)
    clean = rng.uniform(-0.5, 0.5, (24, 4, 4, 1)).astype(np.float32)
    params = {"w": jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)}
    label = np.asarray(model(params, clean).argmax(-1), np.int32)
    shifted = clean + 0.4
    batch = data.ImageBatch(shifted, label, np.ones(24, np.float32), np.arange(24))
    adapted = adapt(model, blackvip(0.5, low=-2.0, high=2.0))
    step = train.make_step(
        adapted,
        train.image_classification(),
        spsa_gc(0.03, 1.0, 0.4, 0.9),
        gradient=value_and_spsa(gain(0.02, 0.1), 4, vectorised=True),
    )
    state = train.create(adapted.init(jax.random.key(1), params, shifted), spsa_gc(0.03, 1.0, 0.4, 0.9))
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: step(s, params, batch), s, None, length=150))
    state, numbers = run(state)
    assert int(state.first_bad) < 0
    assert float(numbers["loss"][-10:].mean()) < 0.8 * float(numbers["loss"][:3].mean())


def test_a_frame_is_added_at_the_border_alone():
    x = np.zeros((2, 6, 6, 1), np.float32)
    seen = []

    def watching(params, x):
        seen.append(x)
        return x.mean((1, 2))

    adapted = adapt(watching, border_prompt(2))
    delta = adapted.init(jax.random.key(0), {}, x)
    assert delta["frame"].shape == (36 - 4, 1)
    adapted.apply({}, delta, x)
    assert (seen[-1][:, 2:4, 2:4] == 0).all()
    assert (seen[-1][0, :2].ravel() == delta["frame"][:12, 0]).all()
    assert (seen[-1] != 0).sum() == 2 * 32


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="encoder 'clip'"):
        blackvip(encoder="clip")
    with pytest.raises(ValueError, match=r"square images .* shape \(2, 5\)"):
        adapt(model, blackvip()).init(jax.random.key(0), {}, np.zeros((2, 5)))
    with pytest.raises(ValueError, match="side must be even"):
        adapt(model, blackvip()).init(jax.random.key(0), {}, np.zeros((2, 5, 5, 1)))
    with pytest.raises(ValueError, match="do not fill channels"):
        coordinator(jax.random.key(0), 224, 3, 768, 801)
    with pytest.raises(ValueError, match="width 0"):
        border_prompt(0)
    with pytest.raises(ValueError, match="width 4: the images are 6 pixels wide"):
        adapt(model, border_prompt(4)).init(jax.random.key(0), {}, np.zeros((2, 6, 6, 1)))
    made = blackvip(encoder=lambda x: x.mean((1, 2))).config
    assert made["encoder"] == "given"
    assert pooled_pixels(jnp.ones((2, 8, 8, 3))).shape == (2, 48)
