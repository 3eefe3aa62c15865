"""D2NWG: laws of its card, the reference's numbers, a generator that learns a small zoo."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxpeft.generate import ddpm, q_sample
from jaxpeft.hyper import TargetError, d2nwg, d2nwg_schedule, weight_diffusion
from jaxpeft.hyper.d2nwg import Denoiser, SampleEncoder, VectorVae, align_loss, flat, kl_to_normal, vae_loss
from jaxpeft.hyper.set_transformer import DatasetEncoder, InducedAttention, SeedPooling, SetAttention, SetTransformer

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "d2nwg" / "golden.safetensors")
SPEC = {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.float32), "bias": jax.ShapeDtypeStruct((3,), jnp.float32)}


# ---------------------------------------------------------------------------------------------------------------- vectors


@given(st.integers(0, 9), st.sampled_from([0.125, 1.0, 3.0]))
def test_a_tree_comes_back_from_its_vector(padding, scale):
    vectors = flat(SPEC, 15 + padding, scale)
    params = {"kernel": jnp.arange(12.0).reshape(4, 3), "bias": jnp.array([5.0, -1.0, 2.0])}
    w = vectors.flatten(params)
    assert w.shape == (15 + padding,)
    assert vectors.real.sum() == 15
    np.testing.assert_array_equal(w[15:], 0)
    for a, b in zip(jax.tree.leaves(vectors.unflatten(w)), jax.tree.leaves(params)):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ set encoder


def attention_of(g, prefix):
    names = {"query": "fc_q", "key": "fc_k", "value": "fc_v", "out": "fc_o"}
    return {k: {"kernel": g[f"{prefix}{n}.weight"].T, "bias": g[f"{prefix}{n}.bias"]} for k, n in names.items()}


def of(case):
    return {k.removeprefix(f"{case}."): x for k, x in GOLDEN.items() if k.startswith(f"{case}.")}


def test_attention_between_sets_equals_the_references():
    g = of("mab")
    y = SetAttention(8).apply({"params": attention_of(g, "")}, GOLDEN["x"], GOLDEN["k"])
    np.testing.assert_allclose(y, g["y"], atol=2e-5)


def induced(g, prefix):
    return {
        "points": g[f"{prefix}I"][0],
        "inner": attention_of(g, f"{prefix}mab0."),
        "outer": attention_of(g, f"{prefix}mab1."),
    }


def test_induced_attention_and_pooling_equal_the_references():
    g = of("isab")
    y = InducedAttention(8, points=4).apply({"params": induced(g, "")}, GOLDEN["x"])
    np.testing.assert_allclose(y, g["y"], atol=2e-5)
    g = of("pma")
    y = SeedPooling(6, seeds=2).apply(
        {"params": {"seeds": g["S"][0], "attention": attention_of(g, "mab.")}}, GOLDEN["x"]
    )
    np.testing.assert_allclose(y, g["y"], atol=2e-5)


def test_a_set_transformer_equals_the_references():
    g = of("set")
    params = {f"induced_{i}": induced(g, f"enc.enc.{i}.") for i in range(2)}
    params |= {"pool": {"seeds": g["dec.dec.0.S"][0], "attention": attention_of(g, "dec.dec.0.mab.")}}
    params |= {f"among_{i}": attention_of(g, f"dec.dec.{i + 1}.mab.") for i in range(2)}
    params["head"] = {"kernel": g["dec.dec.3.weight"].T, "bias": g["dec.dec.3.bias"]}
    y = SetTransformer(5, width=8, points=4).apply({"params": params}, GOLDEN["x"])
    np.testing.assert_allclose(y, g["y"], atol=2e-5)


def test_a_data_sets_embedding_heeds_no_order_and_that_of_the_alternative_does(key):
    x = jax.random.normal(key, (3, 5, 6))
    encoder = DatasetEncoder(7, between=8, width=8, points=4)
    params = encoder.init(key, x)
    e = encoder.apply(params, x)
    assert e.shape == (7,)
    np.testing.assert_allclose(encoder.apply(params, x[::-1]), e, atol=1e-5)
    np.testing.assert_allclose(encoder.apply(params, x[:, ::-1]), e, atol=1e-5)
    # Every sample twice: softmax means stay what they are.
    np.testing.assert_allclose(encoder.apply(params, jnp.concatenate([x, x], 1)), e, atol=1e-5)
    other = SampleEncoder(4, 5, outputs=7)
    params = other.init(key, jnp.ones((4, 5, 6)))
    few = other.apply(params, x)
    assert few.shape == (7,)
    assert float(jnp.abs(other.apply(params, x[::-1]) - few).max()) > 1e-3


# ----------------------------------------------------------------------------------------------------------------- losses


def test_the_autoencoders_loss_equals_the_references():
    mean, log_variance = np.split(GOLDEN["gauss"], 2, -1)
    np.testing.assert_allclose(kl_to_normal(mean, log_variance), GOLDEN["gauss.kl"], rtol=1e-5)
    found = vae_loss(GOLDEN["w"], GOLDEN["decoded"], mean, log_variance, log_scale=0.3)
    np.testing.assert_allclose(found, GOLDEN["loss"], rtol=1e-5)


def test_a_standard_normal_latent_costs_nothing_and_padding_does_not_count(key):
    np.testing.assert_array_equal(kl_to_normal(jnp.zeros((2, 3)), jnp.zeros((2, 3))), 0)
    w, decoded = jax.random.normal(key, (2, 3, 9))
    own = vae_loss(w[:, :6], decoded[:, :6], jnp.zeros((3, 2)), jnp.zeros((3, 2)))
    padded = vae_loss(w, decoded, jnp.zeros((3, 2)), jnp.zeros((3, 2)), real=jnp.arange(9) < 6)
    np.testing.assert_allclose(own, padded, rtol=1e-6)


def test_alignment_equals_the_references_and_vanishes_for_far_equal_pairs():
    np.testing.assert_allclose(align_loss(GOLDEN["W"], GOLDEN["D"], 0.7), GOLDEN["align"], rtol=1e-5)
    far = 20.0 * jnp.eye(4, 6)
    assert float(align_loss(far, far)) < 1e-3
    assert float(align_loss(far, far[::-1])) > 1.0


def test_a_linear_autoencoder_learns_the_principal_subspace(key):
    w = jax.random.normal(key, (64, 2)) @ jax.random.normal(jax.random.fold_in(key, 1), (2, 8))
    w = w + 0.01 * jax.random.normal(jax.random.fold_in(key, 2), w.shape)
    vae = VectorVae(8, 2, hidden=())
    params, rule = vae.init(key, w), optax.adam(optax.cosine_decay_schedule(3e-2, 600))
    loss = lambda p: jnp.square(vae.apply(p, w) - w).mean()

    def step(state, _):
        p, m = state
        u, m = rule.update(jax.grad(loss)(p), m)
        return (optax.apply_updates(p, u), m), None

    (params, _), _ = jax.lax.scan(step, (params, rule.init(params)), None, length=600)
    main = jnp.linalg.svd(w - w.mean(0))[2][:2]
    spanned = jnp.linalg.qr(params["params"]["outward_0"]["kernel"].T)[0]
    np.testing.assert_allclose(jnp.linalg.svd(main @ spanned, compute_uv=False), 1, atol=1e-2)


# -------------------------------------------------------------------------------------------------------------- diffusion


def test_the_schedule_is_the_papers():
    s = d2nwg_schedule()
    np.testing.assert_allclose([s.beta[0], s.beta[-1]], [0.0015, 0.0155], rtol=1e-5)
    np.testing.assert_allclose(jnp.diff(jnp.sqrt(s.beta)), (0.0155**0.5 - 0.0015**0.5) / 1023, rtol=2e-2)
    assert (jnp.diff(s.alpha_bar) < 0).all()
    few = d2nwg_schedule(64)
    np.testing.assert_allclose(jnp.log(few.alpha_bar[-1]), jnp.log(s.alpha_bar[-1]), rtol=0.1)


def test_with_the_best_denoiser_samples_have_the_latents_mean_and_variance(key):
    s, m, v = d2nwg_schedule(256), 1.5, 0.25
    best = lambda z, t, c: jnp.sqrt(1 - s.alpha_bar[t])[:, None] * (z - jnp.sqrt(s.alpha_bar[t])[:, None] * m) / (
        s.alpha_bar[t] * v + 1 - s.alpha_bar[t]
    )[:, None]  # fmt: skip
    z = ddpm(best, s, key, jax.random.normal(key, (4000, 1)))
    np.testing.assert_allclose(z.mean(), m, atol=0.05)
    np.testing.assert_allclose(z.var(), v, rtol=0.15)
    np.testing.assert_allclose(q_sample(s, z, jnp.zeros(4000, int), 0 * z), z, rtol=5e-3)


# ------------------------------------------------------------------------------------------------------------ the stages


@pytest.fixture(scope="module")
def stages():
    encoder = DatasetEncoder(4, between=8, width=8, points=4)
    return weight_diffusion(
        SPEC, (2, 3, 5), latent=4, length=20, times=24, vae=VectorVae(20, 4, (16,)), encoder=encoder,
        denoiser=Denoiser(32, 2, 8),
    )  # fmt: skip


def test_a_trained_generator_gives_each_data_set_its_own_weights(stages, key):
    # A zoo of two kinds of data sets, each with its own network.
    rng = np.random.default_rng(0)
    kinds = np.repeat([0, 1], 16)
    centre = rng.normal(size=(2, 15)).astype(np.float32)
    w = jnp.asarray(np.pad(centre[kinds] + 0.05 * rng.normal(size=(32, 15)), ((0, 0), (0, 5))), jnp.float32)
    x = jnp.asarray(2.0 * kinds[:, None, None, None] - 1 + 0.1 * rng.normal(size=(32, 2, 3, 5)), jnp.float32)

    def fit(loss, weights, parts, steps, rate=3e-3):
        rule = optax.adam(rate)
        own = {k: weights[k] for k in parts}

        def step(state, key):
            own, m = state
            g = jax.grad(lambda own: loss({**weights, **own}, key))(own)
            u, m = rule.update(g, m)
            return (optax.apply_updates(own, u), m), None

        (own, _), _ = jax.lax.scan(step, (own, rule.init(own)), jax.random.split(key, steps))
        return {**weights, **own}

    weights = stages.init(key)
    weights = fit(lambda p, k: stages.vae_loss(p, w, k), weights, ("vae",), 400)
    weights = stages.calibrated(weights, w, key)
    before = float(stages.align_loss(weights, w, x))
    weights = fit(lambda p, k: stages.align_loss(p, w, x, k), weights, ("data",), 60)
    assert float(stages.align_loss(weights, w, x)) < before
    weights = fit(lambda p, k: stages.diffusion_loss(p, w, x, k), weights, ("denoiser", "data"), 800)
    make = jax.jit(jax.vmap(lambda x, k: stages.vectors.flatten(stages.generate(weights, x, k))))
    made = np.asarray(make(x, jax.random.split(key, 32)))[:, :15]
    away = np.linalg.norm(made[:, None] - centre, axis=-1)
    assert (away.argmin(1) == kinds).mean() > 0.9
    assert np.median(away[np.arange(32), kinds]) < 0.5 * np.linalg.norm(centre[0] - centre[1])


def test_losses_move_only_their_own_stage(stages, key):
    weights, w, x = stages.init(key), jnp.ones((3, 20)), jnp.ones((3, 2, 3, 5))
    moved = lambda loss: {
        k for k, g in jax.grad(loss)(weights).items() if any(jnp.abs(v).max() > 0 for v in jax.tree.leaves(g))
    }
    assert moved(lambda p: stages.vae_loss(p, w, key)) == {"vae"}
    assert moved(lambda p: stages.align_loss(p, w + jnp.arange(3.0)[:, None], x, key)) == {"data"}
    weights["denoiser"] = jax.tree.map(lambda p: p + 0.1, weights["denoiser"])
    assert moved(lambda p: stages.diffusion_loss(p, w, x, key)) == {"data", "denoiser"}
    assert moved(lambda p: stages.diffusion_loss(p, w, None, key)) == {"denoiser"}


def test_several_keys_give_several_networks_for_one_data_set(key):
    hyper = d2nwg(SPEC, (2, 3, 5), latent=4, times=32, encoder=SampleEncoder(2, 3, 4), denoiser=Denoiser(8, 1, 4))
    weights, x = hyper.init(key), jnp.ones((2, 3, 5))
    several = jax.vmap(lambda k: hyper.apply(weights, (x, k)))(jax.random.split(key, 3))
    assert float(several["kernel"].std(0).max()) > 0


def test_a_denoiser_of_ones_own_also_works_without_a_data_set(key):
    class Own(nn.Module):
        @nn.compact
        def __call__(self, z, t, condition):
            return nn.Dense(z.shape[-1])(jnp.concatenate([z, t[:, None] / 32, condition], -1))

    own = weight_diffusion(SPEC, (2, 3, 5), latent=4, times=32, encoder=SampleEncoder(2, 3, 6), denoiser=Own())
    weights = own.init(key)
    loss = own.diffusion_loss(weights, jnp.ones((3, 15)), None, key)
    assert np.isfinite(float(loss))
    assert own.generate(weights, None, key)["kernel"].shape == (4, 3)


def test_bad_input_is_named(key):
    with pytest.raises(TargetError, match="length 10 for a target of 15"):
        flat(SPEC, 10)
    with pytest.raises(TargetError, match="empty"):
        flat({})
    with pytest.raises(ValueError, match="over 0"):
        flat(SPEC, scale=0.0)
    with pytest.raises(ValueError, match="at least 1 each"):
        weight_diffusion(SPEC, (2, 0, 5))
    with pytest.raises(ValueError, match="expected one shape"):
        align_loss(jnp.ones((2, 3)), jnp.ones((3, 3)))
    with pytest.raises(ValueError, match="expected at most 2"):
        SampleEncoder(2, 3).init(key, jnp.ones((3, 3, 4)))
    with pytest.raises(ValueError, match="not divided by 2 heads"):
        nn.init(lambda m, x: m(x, x), SetAttention(7))(key, jnp.ones((1, 2, 3)))
