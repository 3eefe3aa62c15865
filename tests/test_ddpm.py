"""DDPM and DDIM against what is known in closed form, and the small diffusion transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpeft import generate, trees
from jaxpeft.models import stack_layers
from jaxpeft.models.dit import Dit, DitConfig

T = 50
SCHEDULES = {"linear": generate.linear(T), "cosine": generate.cosine(T)}
both = pytest.mark.parametrize("s", SCHEDULES.values(), ids=SCHEDULES)


def gaussian(s, mean, deviation):
    """The true ε of data from N(mean, deviation²): the expectation of the noise given x_t."""

    def predict(x, t, condition):
        a = s.alpha_bar[t].reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * mean) / (a * deviation**2 + 1 - a)

    return predict


@both
def test_a_schedule_is_its_betas(s):
    beta, a, before = (np.asarray(x, np.float64) for x in s)
    assert s.times == T
    assert ((beta > 0) & (beta < 1)).all()
    assert before[0] == 1
    np.testing.assert_array_equal(before[1:], a[:-1])
    np.testing.assert_allclose(np.cumprod(1 - beta), a, rtol=1e-4)  # 1 - β loses digits where β is near 1
    assert (np.diff(a) < 0).all()
    assert a[-1] < 1e-3


def test_the_papers_schedules():
    s = generate.linear(1000)
    np.testing.assert_allclose(np.asarray(s.beta)[[0, -1]], [1e-4, 0.02], rtol=1e-6)
    assert np.ptp(np.diff(np.linspace(1e-4, 0.02, 1000))) < 1e-12
    s, t = generate.cosine(1000), np.arange(1, 1001)
    f = np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(np.asarray(s.alpha_bar)[:-1], f[:-1], rtol=2e-4)
    assert float(s.beta[-1]) == pytest.approx(0.999)


def test_bad_schedules_and_steps_are_refused():
    for wrong in ([], [0.0], [0.5, 1.0], [[0.5]]):
        with pytest.raises(ValueError, match=r"each is in \(0, 1\)"):
            generate.schedule(wrong)
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        generate.linear(10)
    with pytest.raises(ValueError, match=r"offset -1"):
        generate.cosine(10, -1.0)
    s, x = SCHEDULES["linear"], jnp.zeros((1, 1))
    for steps in (0, T + 1):
        with pytest.raises(ValueError, match=f"steps {steps}: expected 1 to {T}"):
            generate.ddim(gaussian(s, 0, 1), s, jax.random.key(0), x, steps=steps)
    with pytest.raises(ValueError, match="variance 'large'"):
        generate.ddpm(gaussian(s, 0, 1), s, jax.random.key(0), x, variance="large")


@both
def test_q_sample_has_the_mean_and_the_variance_of_the_forward_steps(s, key):
    """Of the chain x <- sqrt(1 - β) x + sqrt(β) z, whose moments follow by recursion, and of draws."""
    x0, mean, variance, n = 1.7, 1.7, 0.0, 40000
    for t in range(T):
        beta = float(s.beta[t])
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        one = jnp.full(1, t)
        assert float(generate.q_sample(s, jnp.full(1, x0), one, jnp.zeros(1))[0]) == pytest.approx(mean, abs=1e-5)
        spread = generate.q_sample(s, jnp.zeros(1), one, jnp.ones(1))[0]
        assert float(spread) == pytest.approx(np.sqrt(variance), abs=1e-5)
        if t in (0, T // 2, T - 1):
            x = generate.q_sample(s, jnp.full(n, x0), jnp.full(n, t), jax.random.normal(key, (n,)))
            # Four standard errors.
            assert abs(float(x.mean()) - mean) < 4 * np.sqrt(variance / n)
            assert abs(float(x.var()) / variance - 1) < 4 * np.sqrt(2 / n)


@both
def test_start_and_noise_undo_q_sample(s, key, close):
    x0, noise = jax.random.normal(key, (2, T, 3, 2))
    t = jnp.arange(T)
    x = generate.q_sample(s, x0, t, noise)
    close(generate.predict_noise(s, x, t, x0), noise, atol=1e-4)
    inner = slice(0, T - 4)  # where ᾱ is nearly 0, the division by it magnifies the rounding
    close(generate.predict_start(s, x, t, noise)[inner], x0[inner], atol=1e-3)


@both
def test_the_posterior_is_bayes_rule(s):
    """N(x_t; sqrt(α) x, β) N(x; sqrt(ᾱ_{t-1}) x_0, 1 - ᾱ_{t-1}): precisions add."""
    x0, x, t = jnp.full(T, 0.6), jnp.full(T, -1.1), jnp.arange(T)
    mean, variance = generate.posterior(s, x0, x, t)
    assert float(variance[0]) == 0
    assert float(mean[0]) == pytest.approx(0.6, abs=1e-5)
    beta, _, before = (np.asarray(v, np.float64)[1:] for v in s)
    precision = (1 - beta) / beta + 1 / (1 - before)
    want = (np.sqrt(1 - beta) / beta * -1.1 + np.sqrt(before) / (1 - before) * 0.6) / precision
    np.testing.assert_allclose(variance[1:], 1 / precision, rtol=1e-4)
    np.testing.assert_allclose(mean[1:], want, atol=2e-5)


@both
@pytest.mark.parametrize("steps", [1, 2, 7, T])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_recovers_a_point(s, steps, eta, key):
    x = jax.random.normal(key, (6, 2))
    y = generate.ddim(gaussian(s, 0.8, 0.0), s, key, x, steps=steps, eta=eta)
    np.testing.assert_allclose(y, 0.8, atol=2e-4)


@both
def test_ddim_without_noise_is_the_affine_map_of_its_steps_and_ends_at_the_gaussian(s):
    """Each step is affine in x: run on 0 and 1 it gives the mean and the deviation of what comes of N(0, 1)."""
    mean, deviation = -0.4, 0.3
    ends = {}
    for steps in (5, T):
        y = generate.ddim(gaussian(s, mean, deviation), s, jax.random.key(0), jnp.array([0.0, 1.0]), steps=steps)
        a = np.asarray(s.alpha_bar, np.float64)[np.round(np.linspace(T - 1, 0, steps)).astype(int)]
        x = np.array([0.0, 1.0])
        for now, then in zip(a, np.append(a[1:], 1.0)):
            e = np.sqrt(1 - now) * (x - np.sqrt(now) * mean) / (now * deviation**2 + 1 - now)
            x = np.sqrt(then) * (x - np.sqrt(1 - now) * e) / np.sqrt(now) + np.sqrt(1 - then) * e
        np.testing.assert_allclose(y, x, atol=1e-4)
        ends[steps] = float(y[0]), float(y[1] - y[0])
    errors = {n: abs(m - mean) + abs(d - deviation) for n, (m, d) in ends.items()}
    assert errors[T] < errors[5]
    assert errors[T] < 0.06  # of order 1 / S, and x_T is not quite N(0, 1)


def test_ddim_ends_at_the_gaussian_as_the_steps_become_many():
    for make in (generate.linear, generate.cosine):
        s = make(2000)
        y = generate.ddim(gaussian(s, -0.4, 0.3), s, jax.random.key(0), jnp.array([0.0, 1.0]), steps=2000)
        assert float(y[0]) == pytest.approx(-0.4, abs=5e-3)
        assert float(y[1] - y[0]) == pytest.approx(0.3, abs=5e-3)


@both
def test_ancestral_sampling_is_exact_for_a_point_and_for_the_standard_normal(s, key):
    x, n = jax.random.normal(key, (20000,)), 20000
    y = generate.ddpm(gaussian(s, 0.8, 0.0), s, key, x)
    np.testing.assert_allclose(y, 0.8, atol=2e-4)
    y = generate.ddpm(gaussian(s, 0.0, 1.0), s, jax.random.fold_in(key, 1), x, variance="beta")
    # The last step adds no noise, as is usual: it takes β_0 of the variance away. Four standard errors.
    assert abs(float(y.mean())) < 4 / np.sqrt(n)
    assert abs(float(y.var()) - (1 - float(s.beta[0]))) < 4 * np.sqrt(2 / n)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ancestral_sampling_with_the_true_score_has_the_gaussians_moments(variance, key):
    s, n = generate.cosine(400), 20000
    y = generate.ddpm(
        gaussian(s, 0.5, 0.4), s, key, jax.random.normal(jax.random.fold_in(key, 1), (n,)), variance=variance
    )
    assert float(y.mean()) == pytest.approx(0.5, abs=0.015)
    assert float(y.std()) == pytest.approx(0.4, abs=0.015)  # discretisation; sampling error is 0.003


def test_ddim_at_eta_one_and_every_time_is_ddpm(key, close):
    s = SCHEDULES["cosine"]
    x = jax.random.normal(key, (5, 3))
    predict = lambda x, t, c: jnp.sin(x) * 0.5 + 0.01 * t[:, None]
    close(
        generate.ddim(predict, s, key, x, steps=T, eta=1.0, clip=2.0),
        generate.ddpm(predict, s, key, x, clip=2.0),
        atol=1e-3,
    )


def test_clipping_keeps_samples_within(key):
    s = SCHEDULES["linear"]
    y = generate.ddim(lambda x, t, c: -x, s, key, jax.random.normal(key, (8, 4)), steps=10, clip=1.0)
    assert float(jnp.abs(y).max()) <= 1 + 1e-6


def test_guidance_is_linear_in_its_weight(key, close):
    predict = lambda x, t, c: x * (1.0 + c[:, None]) + t[:, None]
    x, t, c = jax.random.normal(key, (4, 3)), jnp.arange(4), jnp.array([0, 1, 2, 3])
    run = lambda w: generate.guided(predict, w, 9)(x, t, c)
    close(run(0.0), predict(x, t, jnp.full(4, 9)))
    close(run(1.0), predict(x, t, c))
    close(jax.jit(run)(4.0), 4 * run(1.0) - 3 * run(0.0), atol=1e-5)


def test_labels_are_dropped_at_their_rate(key):
    labels = jnp.arange(4000) % 10
    for rate in (0.0, 0.25, 1.0):
        got = generate.drop_labels(key, labels, 10, rate)
        assert ((got == labels) | (got == 10)).all()
        assert float((got == 10).mean()) == pytest.approx(rate, abs=0.03)
    two = generate.drop_labels(key, {"a": labels, "b": jnp.ones((4000, 2))}, {"a": -1, "b": 0.0}, 0.5)
    assert ((two["a"] == -1) == (two["b"] == 0).all(1)).all()
    assert ((two["a"] == -1) == (two["b"] == 0).any(1)).all()


def test_the_loss_is_zero_for_the_noise_itself_and_one_for_none(key):
    """A network that knows x_0 (it is the condition) finds the noise; one that answers 0 leaves all of it."""
    s, x0 = SCHEDULES["cosine"], jax.random.normal(key, (2000, 4))
    knows = lambda x, t, c: generate.predict_noise(s, x, t, c)
    assert float(generate.epsilon_loss(knows, s, key, x0, x0, 0.0).max()) < 1e-6
    none = generate.epsilon_loss(lambda x, t, c: jnp.zeros_like(x), s, key, x0)
    assert none.shape == (2000,)
    assert float(none.mean()) == pytest.approx(1, abs=0.06)
    # The true ε of N(0, 1) data leaves ᾱ_t, on average over times.
    best = generate.epsilon_loss(gaussian(s, 0.0, 1.0), s, key, x0)
    assert float(best.mean()) == pytest.approx(float(s.alpha_bar.mean()), abs=0.05)


# ----------------------------------------------------------------------------------------------------- the transformer


def config(**more):
    sizes = dict(
        width=16, layers=2, heads=2, head_dim=8, mlp_width=32, image=(8, 8), patch=(2, 2), channels=1, classes=3
    )
    return DitConfig(**{**sizes, **more})


@pytest.fixture(scope="module")
def dit():
    model = Dit(config())
    x, t, c = jnp.ones((2, 8, 8, 1)), jnp.array([3, 40]), jnp.array([0, 3])
    return model, jax.jit(model.init)(jax.random.key(0), x, t, c), (x, t, c)


def moved(params):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), params)


@pytest.mark.usefixtures("quick")
def test_a_new_transformer_answers_zero_and_its_blocks_are_the_identity(dit):
    model, params, inputs = dit
    y, seen = model.apply(
        params, *inputs, capture_intermediates=lambda m, _: m.name in ("layers_0", "layers_1", "patch")
    )
    assert (y == 0).all()
    states = trees.by_path(seen)
    first, last = (next(x for p, x in states.items() if n in p) for n in ("layers_0", "layers_1"))
    assert (first == last).all()


def test_time_and_label_reach_the_answer_and_the_empty_class_is_one_of_its_own(dit):
    model, params, (x, t, c) = dit
    params = moved(params)
    y = model.apply(params, x, t, c)
    assert y.shape == x.shape
    for other in ((x, t + 5, c), (x, t, jnp.array([1, 2])), (x, t, jnp.array([0, 0]))):
        assert float(jnp.abs(model.apply(params, *other) - y).max()) > 1e-3
    assert params["params"]["label"]["embedding"].shape == (4, 16)


def test_patches_go_back_where_they_came_from():
    """With the identity between them: the last layer's outputs of a token are its patch."""
    from jaxpeft.models.dit import patches, unpatched

    x = jnp.arange(2 * 8 * 6 * 3.0).reshape(2, 8, 6, 3)
    p = patches(x, (2, 3))
    assert p.shape == (2, 8, 18)
    assert (p[0, 1].reshape(2, 3, 3) == x[0, :2, 3:]).all()
    assert (unpatched(p, (8, 6), (2, 3)) == x).all()


@pytest.mark.usefixtures("quick")
def test_scanned_and_recomputed_blocks_give_the_same(dit, close):
    _, params, inputs = dit
    params = moved(params)
    want = Dit(config()).apply(params, *inputs)
    for more in (dict(scan=True), dict(scan=True, remat=True), dict(plain=True)):
        own = stack_layers(params) if "scan" in more else params
        close(Dit(config(**more)).apply(own, *inputs), want)


def test_it_learns_two_images_by_their_labels(key):
    model, s = Dit(config(image=(4, 4), layers=1, init_std=0.1)), generate.cosine(T)
    x0 = jnp.sign(jax.random.normal(key, (2, 4, 4, 1)))
    params = model.init(key, x0, jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32))
    optimiser = optax.adam(1e-2)
    x, c = jnp.repeat(x0, 16, 0), jnp.repeat(jnp.arange(2), 16)

    def loss(params, key):
        return generate.epsilon_loss(lambda *a: model.apply(params, *a), s, key, x, c, 3, 0.1).mean()

    @jax.jit
    def run(params, key):
        def step(state, key):
            params, moments = state
            value, grads = jax.value_and_grad(loss)(params, key)
            updates, moments = optimiser.update(grads, moments)
            return (optax.apply_updates(params, updates), moments), value

        (params, _), losses = jax.lax.scan(step, (params, optimiser.init(params)), jax.random.split(key, 300))
        predict = generate.guided(lambda *a: model.apply(params, *a), 2.0, 3)
        noise = jax.random.normal(key, (8, 4, 4, 1))
        return losses, generate.ddim(predict, s, key, noise, jnp.arange(8) % 2, steps=20, clip=1.0)

    losses, y = run(params, key)
    assert float(losses[0]) == pytest.approx(1, abs=0.2)
    assert float(losses[-20:].mean()) < 0.25
    agree = jnp.sign(y) == x0[jnp.arange(8) % 2]
    assert float(agree.mean()) > 0.95


def test_bad_inputs_and_sizes_are_refused(dit):
    model, params, (x, t, c) = dit
    with pytest.raises(ValueError, match=r"x has shape \(2, 8, 4, 1\)"):
        model.apply(params, x[:, :, :4], t, c)
    with pytest.raises(ValueError, match=r"t has shape \(1,\)"):
        model.apply(params, x, t[:1], c)
    with pytest.raises(ValueError, match=r"patches of \(3, 2\)"):
        config(patch=(3, 2))
    with pytest.raises(ValueError, match="classes 0"):
        config(classes=0)
    with pytest.raises(ValueError, match="frequencies 3"):
        config(frequencies=3)
