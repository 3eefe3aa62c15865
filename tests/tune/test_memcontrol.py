"""MemControl: masked training, its population, the rewards against closed forms and recorded numbers; SV-DIFF and DiffFit."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxpeft import PatternError, adapt, chain, diff_fit, full, generate, sv_diff, trees
from jaxpeft.models.dit import Dit, DitConfig
from jaxpeft.tune import memcontrol as mc
from jaxpeft.tune import non_dominated, pareto_ranks
from jaxpeft.tune.nsga2 import crowding

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "memcontrol" / "golden.safetensors")
N, B, S = 12, 4, 6
RNG = np.random.default_rng(0)
DATA = (RNG.normal(size=(N, 5)).astype(np.float32), RNG.normal(size=(N, 3)).astype(np.float32))
ROWS = np.stack([RNG.permutation(N)[:B] for _ in range(S)])


def model(params, x):
    for i in range(2):
        x = jnp.tanh(x @ params[f"layers_{i}"]["kernel"] + params[f"layers_{i}"]["bias"]) * params["norm"]["scale"]
    return x @ params["out"]["kernel"]


def loss_of(adapted):
    return lambda params, delta, batch, key: jnp.square(adapted.apply(params, delta, batch[0]) - batch[1]).mean()


@pytest.fixture(scope="module")
def params():
    draw = lambda *shape: jnp.asarray(RNG.normal(size=shape) / 2, jnp.float32)
    return {f"layers_{i}": {"kernel": draw(5, 5), "bias": draw(5)} for i in range(2)} | {
        "norm": {"scale": 1 + draw(5)},
        "out": {"kernel": draw(5, 3)},
    }


GAMMAS = "layers_*/kernel"
CASES = {
    "sv_diff": (sv_diff(), ("weights/layers_0/**", "weights/layers_1/**")),
    "diff_fit": (diff_fit(at=GAMMAS, branches=None), ("gammas/layers_0/**", "gammas/layers_1/**")),
    "full": (full(at="layers_*/**"), ("layers_0/**", "layers_1/**")),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, params):
    method, patterns = CASES[request.param]
    adapted = adapt(model, method, on_dense="refuse")
    delta = adapted.init(jax.random.key(0), params, DATA[0])
    return adapted, params, delta, mc.block_map(delta, patterns)


def moved(a, b):
    """The learned leaves that differ, by path."""
    a, b = (trees.by_path(trees.learned(x)[0]) for x in (a, b))
    return {p: bool((a[p] != b[p]).any()) for p in a}


# ------------------------------------------------------------------------------------------------------ blocks, training


def test_blocks_are_by_pattern_and_the_rest_is_always_or_never_trained(case):
    adapted, _, delta, blocks = case
    ids = {p: int(b) for p, b in trees.by_path(blocks).items()}
    assert ids.keys() == trees.by_path(trees.learned(delta)[0]).keys()
    for path, block in ids.items():
        gated = "gammas" in path or adapted.method.name != "diff_fit"
        want = int(path.split("layers_")[1][0]) if "layers_" in path and gated else mc.ALWAYS
        assert block == want, path
    got = trees.by_path(mc.leaf_mask(blocks, jnp.array([0.0, 1.0])))
    assert all(float(m) == (0.0 if ids[p] == 0 else 1.0) for p, m in got.items())
    frozen = mc.block_map(delta, [], frozen="**")
    assert all(int(b) == mc.NEVER for b in jax.tree.leaves(frozen))
    assert all(float(m) == 0 for m in jax.tree.leaves(mc.leaf_mask(frozen, jnp.ones(2))))


def test_a_stacked_leaf_has_a_block_for_each_layer():
    delta = {"layers": {"a": jnp.ones((3, 2))}, "out": jnp.ones(2)}
    blocks = mc.block_map(delta, [], stack="layers")
    assert blocks["layers"]["a"].tolist() == [0, 1, 2]
    loss = lambda params, delta, batch, key: sum(jnp.square(x).sum() for x in jax.tree.leaves(delta))
    train = mc.inner(loss, blocks, optax.sgd)
    new, _ = train(jax.random.key(0), None, delta, jnp.array([1, 0, 1]), 0.1, DATA, jnp.asarray(ROWS[:1]))
    np.testing.assert_allclose(new["layers"]["a"], [[0.8] * 2, [1.0] * 2, [0.8] * 2])
    np.testing.assert_allclose(new["out"], 0.8)


def test_a_pattern_without_leaves_and_a_mask_that_is_too_short_are_refused(case):
    _, _, delta, blocks = case
    with pytest.raises(PatternError, match="matches no leaf"):
        mc.block_map(delta, ["**/layers_7/**"])
    with pytest.raises(ValueError, match="a mask of 1 bits for 2 blocks"):
        mc.leaf_mask(blocks, jnp.ones(1))


def test_all_ones_is_plain_training(case, close):
    adapted, params, delta, blocks = case
    loss, key = loss_of(adapted), jax.random.key(3)
    got, losses = mc.inner(loss, blocks)(key, params, delta, jnp.ones(2), 1e-2, DATA, jnp.asarray(ROWS))
    learned, fixed = trees.learned(delta)
    optimiser = mc.reference_optimiser(1e-2)
    moments = optimiser.init(learned)
    for rows, k in zip(ROWS, jax.random.split(key, S)):
        batch = jax.tree.map(lambda x: x[rows], DATA)
        grads = jax.grad(lambda d: loss(params, trees.combine(d, fixed), batch, k))(learned)
        updates, moments = optimiser.update(grads, moments, learned)
        learned = optax.apply_updates(learned, updates)
    close(trees.learned(got)[0], learned)
    assert losses.shape == (S,)
    assert all(moved(got, delta).values())


def test_a_masked_block_keeps_its_start_to_the_bit_under_decay_and_the_others_do_not_feel_it(case, close):
    adapted, params, delta, blocks = case
    run = lambda m, b=blocks, d=delta: mc.inner(loss_of(adapted), b)(
        jax.random.key(3), params, d, jnp.asarray(m), 1e-2, DATA, jnp.asarray(ROWS)
    )[0]
    ids = {p: int(b) for p, b in trees.by_path(blocks).items()}
    for mask in ([0, 0], [1, 0], [0, 1]):
        changed = moved(run(mask), delta)
        assert changed == {p: ids[p] < 0 or bool(mask[ids[p]]) for p in changed}
    nothing = jax.tree.map(lambda b: np.minimum(np.abs(b), 1), blocks)  # every leaf gated
    frozen = run([0, 0], nothing)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), frozen, delta))
    # As if the block's parameters had no gradient at all: the clipped norm is of the others alone.
    never = jax.tree.map(lambda b: np.asarray(mc.NEVER) if b == 1 else b, blocks)
    close(trees.learned(run([1, 0]))[0], trees.learned(run([1, 1], never))[0])


def test_what_is_frozen_does_not_count_in_the_clipped_norm():
    delta = {"a": jnp.ones(1), "b": jnp.ones(1)}
    loss = lambda params, d, batch, key: 0.5 * d["a"].sum() + 1000 * d["b"].sum()
    step = lambda m: mc.inner(
        loss, mc.block_map(delta, ["a", "b"]), lambda r: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(r))
    )(jax.random.key(0), None, delta, jnp.asarray(m), 1.0, DATA, jnp.asarray(ROWS[:1]))[0]
    assert float(step([1, 0])["a"][0]) == pytest.approx(0.5)
    assert float(step([1, 1])["a"][0]) == pytest.approx(1 - 0.0005, abs=1e-6)


@pytest.mark.parametrize("chunk", [0, 3])
def test_a_population_is_a_loop_over_its_masks(case, chunk, close):
    adapted, params, delta, blocks = case
    train = mc.inner(loss_of(adapted), blocks)
    masks, rates = jnp.asarray(mc.all_masks(2)), jnp.array([1e-3, 3e-3, 1e-2, 3e-2])
    keys = jax.random.split(jax.random.key(1), 4)
    run = jax.jit(lambda *a: mc.population(train, *a, DATA, jnp.asarray(ROWS), chunk=chunk))
    got, losses = run(keys, params, delta, masks, rates)
    assert losses.shape == (4, S)
    one = jax.jit(train)
    for i in range(4):
        alone, _ = one(keys[i], params, delta, masks[i], rates[i], DATA, jnp.asarray(ROWS))
        close(jax.tree.map(lambda x: x[i], trees.learned(got)[0]), trees.learned(alone)[0])


def test_all_masks_are_all_and_rates_are_logarithmic():
    masks = mc.all_masks(3)
    assert {tuple(m) for m in masks.tolist()} == set(itertools.product([False, True], repeat=3))
    assert masks[0].sum() == 0
    assert masks[-1].all()
    np.testing.assert_allclose(mc.rates_of(jnp.array([0.0, 0.5, 1.0])), [1e-5, 1e-4, 1e-3], rtol=1e-5)
    for bits in (0, 17):
        with pytest.raises(ValueError, match=f"bits {bits}"):
            mc.all_masks(bits)
    with pytest.raises(ValueError, match="rates from 0 to 1"):
        mc.rates_of(jnp.ones(1), 0, 1)


def test_everything_works_under_strict_promotion(case, key):
    adapted, params, delta, blocks = case
    with jax.numpy_dtype_promotion("strict"):
        train = mc.inner(loss_of(adapted), blocks, optax.sgd)  # optax's Adam itself is not strict
        jax.eval_shape(train, key, params, delta, jnp.ones(2, bool), jnp.float32(0.1), DATA, jnp.asarray(ROWS))
        x, half = jnp.ones((6, 4, 4, 1)), jnp.ones((6, 4, 4, 1), jnp.bfloat16)
        predict, s, c = (lambda x, t, c: x * c[:, None, None, None].astype(x.dtype)), generate.cosine(5), jnp.arange(6)
        for images in (x, half):
            mem = jax.eval_shape(lambda x: mc.memorisation(predict, s, key, x, c, 0, jnp.array([[1]])), images)
            assert mem.dtype == jnp.float32
            for sample in (generate.ddpm, lambda *a: generate.ddim(*a, steps=3, eta=0.5)):
                drawn = jax.eval_shape(lambda x: sample(generate.guided(predict, 2.0, 0), s, key, x, c), images)
                assert drawn.dtype == images.dtype
            jax.eval_shape(lambda x: generate.epsilon_loss(predict, s, key, x, c, 0, 0.1), images)
            jax.eval_shape(
                lambda x: (
                    generate.extraction(x, 0.5),
                    *(generate.nearest_distance(x, x, m) for m in ("cosine", "euclidean")),
                ),
                images,
            )
        jax.eval_shape(
            lambda x: (
                generate.frechet(x, x, 0.1),
                generate.mifid(jnp.float32(1), x, x),
                mc.hypervolume(x, x[0]),
                mc.pareto_filter(x),
                mc.select(x, 1.0),
                mc.rates_of(x),
            ),
            jnp.ones((5, 2)),
        )


# ------------------------------------------------------------------------------------------------------- what is gated


def test_sv_diff_moves_singular_values_and_nothing_else(params, close):
    adapted = adapt(model, sv_diff(norms=None), on_dense="refuse")
    delta = adapted.init(jax.random.key(0), params, DATA[0])
    same = adapted.merge(params, delta)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), same, params)), "δ = 0 is the base to the bit"
    own = delta["weights"]["layers_0/kernel"]
    sigma = own["sigma"].value
    w = np.asarray(params["layers_0"]["kernel"], np.float64)
    u, s, v = np.linalg.svd(w)
    for d in (jnp.asarray(RNG.normal(size=5), jnp.float32), -sigma, -sigma - 1):
        new = adapted.merge(params, {"weights": {"layers_0/kernel": {**own, "delta": d}}})["layers_0"]["kernel"]
        close(new, jnp.asarray(u @ np.diag(np.maximum(s + np.asarray(d), 0)) @ v, jnp.float32), atol=1e-5)
        got = np.sort(np.linalg.svd(np.asarray(new), compute_uv=False))
        np.testing.assert_allclose(got, np.sort(np.maximum(s + np.asarray(d), 0)), atol=1e-5)


def test_sv_diff_is_the_reference_codes(close):
    g = {k.removeprefix("svd_"): jnp.asarray(x) for k, x in GOLDEN.items() if k.startswith("svd_")}
    f = lambda p, x: x @ p["kernel"] + p["bias"]
    adapted = adapt(f, sv_diff(at="kernel", norms=None, scale=0.7), on_dense="refuse")
    p = {"kernel": g["kernel"], "bias": g["bias"]}
    delta = adapted.init(jax.random.key(0), p, g["x"])
    delta["weights"]["kernel"]["delta"] = g["delta"]
    close(adapted.apply(p, delta, g["x"]), g["y"])
    p = {"kernel": jnp.eye(6), "scale": g["norm"]}
    adapted = adapt(lambda p, x: (x * p["scale"]) @ p["kernel"], sv_diff(at="kernel", norms="scale", scale=0.7))
    delta = adapted.init(jax.random.key(0), p, g["norm_x"])
    assert adapted.method.rates == (("norms/**", 1e-3),)
    delta["norms"]["scale"]["delta"] = jnp.asarray(-0.5)
    close(adapted.apply(p, delta, g["norm_x"]), g["norm_moved"])


def test_sv_diff_takes_convolutions_and_stacked_layers(close):
    x = jnp.asarray(RNG.normal(size=(2, 6, 6, 3)), jnp.float32)
    f = lambda p, x: jax.lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    p = {"kernel": jnp.asarray(RNG.normal(size=(3, 3, 3, 4)), jnp.float32)}
    adapted = adapt(f, sv_diff(norms=None), on_dense="refuse")
    delta = adapted.init(jax.random.key(0), p, x)
    assert delta["weights"]["kernel"]["delta"].shape == (4,)
    d = jnp.array([0.3, -0.2, -9.0, 1.0])
    delta["weights"]["kernel"]["delta"] = d
    u, s, v = np.linalg.svd(np.asarray(p["kernel"], np.float64).reshape(27, 4), full_matrices=False)
    want = jnp.asarray((u * np.maximum(s + np.asarray(d), 0) @ v).reshape(3, 3, 3, 4), jnp.float32)
    close(adapted.apply(p, delta, x), f({"kernel": want}, x), atol=1e-4)


def test_diff_fit_rescales_outputs_with_their_trained_biases(params, close):
    method = diff_fit(at=GAMMAS, branches="layers_1/kernel", rest="**/{bias,scale}")
    adapted = adapt(model, method, on_dense="refuse")
    delta = adapted.init(jax.random.key(0), params, DATA[0])
    close(adapted.apply(params, delta, DATA[0]), model(params, DATA[0]))
    rng = np.random.default_rng(5)
    delta = jax.tree.map(lambda x: x + 0.3 * jnp.asarray(rng.normal(size=x.shape), x.dtype), delta)
    g, t = delta["gammas"], delta["trained"]
    assert set(g) == {"layers_0/kernel", "layers_1/kernel"}
    assert set(t) == {"layers_0/bias", "layers_1/bias", "norm/scale"}
    x = DATA[0]
    for i in range(2):
        own = g[f"layers_{i}/kernel"]
        gain = own["gamma"] * own.get("branch", 1.0)
        y = x @ params[f"layers_{i}"]["kernel"] + t[f"layers_{i}/bias"]["value"]
        x = jnp.tanh(gain * y) * t["norm/scale"]["value"]
    close(adapted.apply(params, delta, DATA[0]), x @ params["out"]["kernel"])
    close(model(adapted.merge(params, delta), DATA[0]), x @ params["out"]["kernel"])
    with pytest.raises(ValueError, match="neither at nor branches"):
        diff_fit(None, None)


# -------------------------------------------------------------------------------------------------------------- rewards


def test_mem_is_zero_without_a_condition_and_the_size_of_what_it_adds(key):
    s, x, c = generate.cosine(20), jnp.ones((5, 4, 4, 1)), jnp.arange(5)
    times = jnp.array([[2], [10], [19]])
    run = lambda f, **k: float(mc.memorisation(f, s, key, x, c, 9, times, **k))
    assert run(lambda x, t, c: jnp.sin(x) + t[:, None, None, None]) == 0
    moves = lambda x, t, c: x + jnp.where(c == 9, 0, c)[:, None, None, None].astype(jnp.float32)
    assert run(moves) == pytest.approx(4 * 2)  # 16 entries; classes 0 to 4
    assert run(moves, reduce="max") == pytest.approx(4 * 4)
    # The noise enters where the condition's part depends on it, and is fixed by the key.
    mixed = lambda x, t, c: x * (c != 9)[:, None, None, None]
    assert run(mixed) == run(mixed) > 0
    each = jnp.array([[0, 1, 2, 3, 4]])
    by_time = lambda x, t, c: t[:, None, None, None] * (c != 9)[:, None, None, None] * jnp.ones_like(x)
    assert float(mc.memorisation(by_time, s, key, x, c, 9, each)) == pytest.approx(8)
    with pytest.raises(ValueError, match="reduce 'sum'"):
        run(mixed, reduce="sum")


def test_guidance_scales_what_is_sampled_from_and_mem_is_of_the_bare_network(key):
    """Mem of the guided prediction would be w times as large: it must be given the network itself."""
    s, x, c = generate.cosine(20), jnp.ones((5, 4, 4, 1)), jnp.arange(5)
    bare = lambda x, t, c: x * (1 + c)[:, None, None, None]
    run = lambda f: float(mc.memorisation(f, s, key, x, c, 9, jnp.array([[5]])))
    assert run(generate.guided(bare, 3.0, 9)) == pytest.approx(3 * run(bare), rel=1e-5)


def test_a_masked_model_draws_what_its_base_draws(key):
    sizes = dict(
        width=8, layers=2, heads=2, head_dim=4, mlp_width=16, image=(4, 4), patch=(2, 2), channels=1, classes=2
    )
    dit, s = Dit(DitConfig(**sizes, init_std=0.3)), generate.cosine(10)
    x, c = jax.random.normal(key, (6, 4, 4, 1)), jnp.arange(6) % 2
    params = jax.tree.map(lambda p: p + 0.1, jax.jit(dit.init)(key, x, c, c))
    method = chain(sv_diff(norms=None), full(at="**/label/embedding"))
    adapted = adapt(dit.apply, method)
    delta = jax.jit(adapted.init)(key, params, x, c, c)
    patterns = [f"**/layers_{i}/**" for i in range(2)]
    blocks = mc.block_map(delta, patterns)
    gated = jax.tree.map(lambda b: np.maximum(b, 0), blocks)

    def loss(params, delta, batch, key):
        predict = lambda *a: adapted.apply(params, delta, *a)
        return generate.epsilon_loss(predict, s, key, *batch, 2, 0.1).mean()

    @jax.jit
    def trained(mask):
        new, _ = mc.inner(loss, gated)(key, params, delta, mask, 1e-2, (x, c), jnp.zeros((3, 4), jnp.int32))
        return adapted.merge(params, new)

    draw = jax.jit(lambda p: generate.ddim(lambda *a: dit.apply(p, *a), s, key, x, c, steps=4))
    nothing, everything = trained(jnp.zeros(2)), trained(jnp.ones(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), nothing, params))
    assert (draw(nothing) == draw(params)).all()
    assert float(jnp.abs(draw(everything) - draw(params)).max()) > 1e-4


def test_frechet_is_torchmetrics_and_the_closed_forms(key, close):
    real, made = (jnp.asarray(GOLDEN[k]) for k in ("real", "made"))
    assert float(generate.frechet(real, made)) == pytest.approx(float(GOLDEN["fid"][0]), rel=1e-4)
    assert float(generate.mifid(generate.frechet(real, made), real, made)) == pytest.approx(
        float(GOLDEN["mifid"][0]), rel=1e-3
    )
    near = made[:25]
    fd = generate.frechet(real, near)
    assert float(generate.mifid(fd, real, near)) == pytest.approx(float(GOLDEN["mifid_near"][0]), rel=1e-3)
    # It was made of training features.
    assert float(generate.mifid(fd, near, real)) > 10 * float(generate.mifid(fd, real, near))
    assert abs(float(generate.frechet(real, real))) < 1e-3  # of a trace of about 60
    shift = jnp.arange(6.0)
    assert float(generate.frechet(real, real + shift)) == pytest.approx(55, rel=1e-4)
    a, b = 3 + 2 * jax.random.normal(key, (50, 1)), jax.random.normal(key, (40, 1))
    want = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert float(generate.frechet(a, b)) == pytest.approx(float(want), rel=1e-4)
    assert float(generate.frechet(real, made)) == pytest.approx(float(generate.frechet(made, real)), rel=1e-4)
    few = made[:3]
    assert np.isfinite(float(generate.frechet(real, few, ridge=1e-3)))
    cov = lambda x: np.cov(np.asarray(x, np.float64).T) + 0.1 * np.eye(6)
    root = scipy.linalg.sqrtm(cov(real) @ cov(few)).real
    gap = np.square(np.asarray(real.mean(0) - few.mean(0), np.float64)).sum()
    want = gap + np.trace(cov(real) + cov(few) - 2 * root)
    assert float(generate.frechet(real, few, ridge=0.1)) == pytest.approx(want, rel=1e-4)


def test_distances_to_the_nearest(key):
    made, train = jax.random.normal(key, (2, 7, 2, 2, 1))
    train = train.at[3].set(2 * made[1]).at[4].set(made[5])
    a, b = (np.asarray(x, np.float64).reshape(7, 4) for x in (made, train))
    want = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).min(1)
    got = generate.nearest_distance(made, train, "euclidean")
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert float(got[5]) == 0
    cosine = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(generate.nearest_distance(made, train), 1 - cosine.max(1), atol=1e-5)
    with pytest.raises(ValueError, match="metric 'l1'"):
        generate.nearest_distance(made, train, "l1")


def brute_attack(images, threshold, smallest, tiles):
    """Connected components by search, as the reference does; tiles by slicing."""
    n, side = len(images), images.shape[1] // tiles

    def alike(a, b):
        cuts = itertools.product(range(0, images.shape[1], side), repeat=2)
        return max(np.linalg.norm((a - b)[y : y + side, x : x + side]) for y, x in cuts) < threshold

    seen, best = set(), []
    for start in range(n):
        if start in seen:
            continue
        component, todo = {start}, [start]
        while todo:
            i = todo.pop()
            more = {j for j in range(n) if j not in component and alike(images[i], images[j])}
            component |= more
            todo += more
        seen |= component
        best = sorted(component) if len(component) > len(best) else best
    return best[0] if len(best) >= smallest else -1


def test_the_extraction_attack_is_the_reference_codes():
    attack = jax.jit(jax.vmap(lambda x: generate.extraction(x, 1.6)))
    memorised, first = attack(jnp.asarray(GOLDEN["images"]))
    assert jnp.where(memorised, first, -1).tolist() == GOLDEN["attack"].tolist()
    for images, want in zip(GOLDEN["images"], GOLDEN["attack"]):
        assert brute_attack(images, 1.6, 3, 4) == want
    rng = np.random.default_rng(1)
    for smallest in (2, 3, 4):
        images = rng.normal(size=(30, 5, 4, 4, 1)).astype(np.float32) * 0.45
        memorised, first = jax.vmap(lambda x: generate.extraction(x, 1.3, tiles=2, smallest=smallest))(
            jnp.asarray(images)
        )
        want = [brute_attack(x, 1.3, smallest, 2) for x in images]
        assert jnp.where(memorised, first, -1).tolist() == want
        assert -1 in want
        assert max(want) >= 0
    with pytest.raises(ValueError, match="8 x 8 do not divide into 3 x 3"):
        generate.tile_distance(jnp.asarray(GOLDEN["images"][0]), jnp.asarray(GOLDEN["images"][0]), 3)


# --------------------------------------------------------------------------------------------------------- the front


def brute_front(scores):
    worse = lambda a, b: (b <= a).all() and (b < a).any()
    return [not any(worse(a, b) for b in scores) for a in scores]


@pytest.mark.parametrize("name", ["random", "ties", "few"])
def test_fronts_ranks_and_hypervolumes_are_optunas(name):
    scores = jnp.asarray(GOLDEN[f"{name}_scores"])
    assert (
        non_dominated(scores).tolist()
        == GOLDEN[f"{name}_best"].astype(bool).tolist()
        == brute_front(np.asarray(scores))
    )
    assert pareto_ranks(scores).tolist() == GOLDEN[f"{name}_ranks"].tolist()
    area = float(mc.hypervolume(scores, jnp.array([1.1, 1.1])))
    assert area == pytest.approx(float(GOLDEN[f"{name}_hypervolume"][0]), rel=1e-5)


def test_crowding_is_optunas():
    got = crowding(jnp.asarray(GOLDEN["front_scores"]), jnp.zeros(12, jnp.int32))
    np.testing.assert_allclose(got, GOLDEN["front_crowding"], rtol=1e-5)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=8, max_size=8))
def test_the_filter_keeps_the_front_and_what_ties_with_it_in_the_second_score(points):
    scores = np.array(points, np.float32)
    kept = np.asarray(mc.pareto_filter(jnp.asarray(scores)))
    assert (kept >= brute_front(scores)).all()
    for s in scores[kept & ~np.array(brute_front(scores))]:
        assert any(f[1] == s[1] and f[0] < s[0] for f in scores[brute_front(scores)])
    best, want = np.inf, {}
    for i in sorted(range(8), key=lambda i: tuple(scores[i])):  # as the reference's loop
        if scores[i, 1] <= best:
            best, want[i] = scores[i, 1], True
    assert [want.get(i, False) for i in range(8)] == kept.tolist()


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=6, max_size=6))
def test_the_hypervolume_counts_cells(points):
    scores = np.array(points, np.float32)
    cells = sum(any(a <= x and b <= y for a, b in points) for x in range(5) for y in range(5))
    assert float(mc.hypervolume(jnp.asarray(scores), jnp.array([5.0, 5.0]))) == pytest.approx(cells)


def test_scores_that_are_not_finite_lose_everywhere():
    scores = jnp.array([[jnp.nan, 0.0], [1.0, 1.0], [0.0, jnp.inf]])
    assert mc.pareto_filter(scores).tolist() == [False, True, False]
    assert float(mc.hypervolume(scores, jnp.array([2.0, 2.0]))) == 1
    assert int(mc.select(scores, 2.0)) == 1


def test_the_choice_is_the_best_fd_under_plain_tunings_mem():
    scores = jnp.array([[0.1, 9.0], [0.4, 3.0], [0.5, 2.0], [0.9, 1.0]])
    assert int(mc.select(scores, 0.5)) == 1
    assert int(mc.select(scores, 0.6)) == 2
    assert int(mc.select(scores, 0.05)) == 0
