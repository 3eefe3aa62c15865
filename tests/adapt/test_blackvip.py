"""Black-box prompting: the card's oracles, and learning from values alone."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from jaxpeft import adapt, blackvip, border_prompt, data, train, trees
from jaxpeft.adapt.blackvip import _doubled, coordinate, coordinator, pooled_pixels
from jaxpeft.tune import gain, spsa, spsa_gc, value_and_spsa

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


GOLDEN = {
    k: jnp.asarray(v)
    for k, v in load_file(Path(__file__).parents[2] / "third_party" / "blackvip" / "golden.safetensors").items()
}


def part(prefix):
    return {k.removeprefix(prefix): v for k, v in GOLDEN.items() if k.startswith(prefix)}


def test_the_decoder_is_that_of_the_reference_with_group_norms(close):
    g = part("decoder.")
    stage = lambda i: {
        "up": g[f"body.{4 * i}.weight"],
        "up_bias": g[f"body.{4 * i}.bias"],
        "mix": g[f"body.{4 * i + 1}.weight"][..., 0, 0],
        "scale": g[f"body.{4 * i + 2}.weight"],
        "shift": g[f"body.{4 * i + 2}.bias"],
    }
    phi = {
        "trigger": g["p_trigger"][0],
        "stages": {str(i): stage(i) for i in range(4)},
        "last": g["body.16.weight"],
    }
    own = jax.eval_shape(lambda k: coordinator(k, 224, 3, 24, 1544), jax.random.key(0))
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, phi)
    y = coordinate(phi, g["z"], 224)
    close(jnp.moveaxis(y, -1, 1)[:, :, 3::7, 3::7], g["y"])  # every seventh pixel: all places in the blocks occur
    close(y.mean((1, 2)), g["mean"])
    close(jnp.square(y).mean((1, 2)), g["square"])


@pytest.mark.parametrize("kind", ["spsa-gc", "spsa"])
def test_six_updates_are_those_of_the_reference(kind, close, monkeypatch):
    """Three perturbations an update, those that the reference drew."""
    g = part(f"{kind}.")
    w = g["w"][0]
    optimiser = spsa_gc(0.05, 1.0, 0.4, 0.9 if kind == "spsa-gc" else 0.0)
    state, size = optimiser.init(w), gain(0.02, 0.1)

    def loss(w):
        logits = jnp.sin(g["x"] * w) @ jnp.tril(jnp.ones((5, 3)))
        return optax.softmax_cross_entropy_with_integer_labels(logits, g["label"]).mean()

    for k, draws in enumerate(g["perturbations"]):
        estimates = []
        for d in draws:
            monkeypatch.setattr(importlib.import_module("jaxpeft.tune.spsa"), "perturbation", lambda *_, d=d: d)
            estimates.append(spsa(loss, jax.random.key(0), w, size(k))[1])
        updates, state = optimiser.update(jnp.stack(estimates).mean(0), state)
        w = optax.apply_updates(w, updates)
        close(w, g["w"][k + 1], atol=1e-4)  # differences of losses over 2 c = 0.04


def test_the_frame_is_that_of_the_reference(close):
    g = part("frame.")
    last = lambda x: jnp.moveaxis(x, 1, -1)
    left, right = last(g["pad_left"])[0], last(g["pad_right"])[0]
    sides = jnp.concatenate([left, right], axis=1)  # the library keeps pixels row by row
    rows = [last(g["pad_up"])[0].reshape(-1, 3), sides.reshape(-1, 3), last(g["pad_down"])[0].reshape(-1, 3)]
    adapted = adapt(lambda params, x: x, border_prompt(2))
    close(last(g["y"]), adapted.apply({}, {"frame": jnp.concatenate(rows)}, last(g["x"])))
