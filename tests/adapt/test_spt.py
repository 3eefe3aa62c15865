"""SPT: sensitivities in closed form, the allocation against its definition and the reference's, exact parts."""

import dataclasses
import math
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpeft import PatternError, adapt, chain, from_config, head, sparse, spt, sublayer, trees
from jaxpeft.adapt.importance import sensitivity
from jaxpeft.adapt.lora import lora
from jaxpeft.adapt.spt import PARALLEL, Tensor, allocate, by_score, cost, found_tau, survey
from jaxpeft.files import load_delta, save_delta
from jaxpeft.method import Call, Study
from jaxpeft.models import ImageClassifier, VisionConfig, stack_layers
from jaxpeft.topk import top_k_mask
from jaxpeft.train import cross_entropy
from jaxpeft.weights import sparse as sparse_weight

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = VisionConfig(
    width=8, layers=2, heads=2, head_dim=4, mlp_width=16, image=(8, 8), patch=(4, 4), channels=1, pre_norm=True,
    init_std=0.3, plain=True,
)  # fmt: skip
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 4, 8, 8, 1)).astype(np.float32)  # three batches
LABELS = RNG.integers(0, 3, (3, 4)).astype(np.int32)
MODEL = ImageClassifier(CONFIG, 3)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), IMAGES[0])


class Data(list):
    def batch(self, i):
        return self[i]


def loss(apply, batch, key):
    return cross_entropy(apply(batch[0]), batch[1]).mean()


def study(params, model=MODEL, scale=1.0):
    run = lambda apply, batch, key: scale * loss(apply, batch, key)
    batches = Data(zip(IMAGES, LABELS))
    return Study(Call(model.apply, params, (IMAGES[0],)), run, batches, batches, 1e-3, jax.random.key(0))


def scores_of(params, model=MODEL):
    run = lambda p, batch: loss(lambda *x: model.apply(p, *x), batch, None)
    return sensitivity(run, params, zip(IMAGES, LABELS), "**/{layers*,final_norm}/**")


@pytest.fixture(scope="module")
def scores(params):
    return scores_of(params)


def moved(delta, by=0.3):
    rng = np.random.default_rng(1)
    yes, no = trees.learned(delta)
    return trees.combine(jax.tree.map(lambda x: x + by * jnp.asarray(rng.normal(size=x.shape), x.dtype), yes), no)


def started(params, method, model=MODEL):
    adapted = adapt(model.apply, method, on_dense="refuse")
    return adapted, jax.jit(adapted.init)(jax.random.key(1), params, IMAGES[0])


def start_of(params, method):
    """The delta, without a program: indices are given, the rest is zeros."""
    return method.init(jax.random.key(1), Call(MODEL.apply, params, (IMAGES[0],)))


@pytest.fixture(scope="module")
def prepared(params):
    """LoRA, whole vectors and entries side by side."""
    made = spt(450, 2, score="magnitude", batches=3).prepare(study(params))
    return made, *started(params, made)


# --------------------------------------------------------------------------------------------------------- sensitivities


def linear(key):
    x, y = jax.random.normal(key, (3, 5, 4)), jax.random.normal(jax.random.fold_in(key, 1), (3, 5))
    return {"w": jax.random.normal(jax.random.fold_in(key, 2), (4,))}, x, y


def square(params, batch):
    x, y = batch
    return jnp.square(x @ params["w"] - y).mean() / 2


def test_a_linear_layers_sensitivity_is_the_sum_of_its_squared_batch_gradients(key, close):
    params, x, y = linear(key)
    got = sensitivity(square, params, zip(x, y))["w"]
    want = sum(np.square(np.asarray(x[b].T @ (x[b] @ params["w"] - y[b])) / 5) for b in range(3))
    close(got, want)
    halves = [(x[0, :2], y[0, :2]), (x[0, 2:], y[0, 2:])]  # batches of other sizes
    small = [np.square(np.asarray(a.T @ (a @ params["w"] - b)) / len(b)) for a, b in halves]
    close(sensitivity(square, params, halves)["w"], sum(small))


def test_order_does_not_matter_and_a_factor_of_the_loss_is_squared(key, close):
    params, x, y = linear(key)
    want = sensitivity(square, params, zip(x, y))
    close(sensitivity(square, params, zip(x[::-1], y[::-1])), want)
    close(sensitivity(square, params, zip(x[:, ::-1], y[:, ::-1])), want)
    close(sensitivity(lambda p, b: 3 * square(p, b), params, zip(x, y)), jax.tree.map(lambda s: 9 * s, want))


def test_half_precision_gradients_do_not_vanish_when_squared():
    params = {"w": jnp.ones((2,), jnp.float16)}
    got = sensitivity(lambda p, b: (p["w"] * b).sum(), params, [jnp.full((2,), 1e-4, jnp.float16)])["w"]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 1e-8, rtol=1e-2)


def test_a_sensitivity_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no batches"):
        sensitivity(square, {"w": jnp.ones(2)}, [])
    with pytest.raises(PatternError, match="near misses"):
        sensitivity(square, {"w": jnp.ones(2)}, [], "v")


# ----------------------------------------------------------------------------------------------------------- allocation

TENSORS = {"q": Tensor((), 8, 8), "up": Tensor((), 8, 16), "stack": Tensor((2,), 8, 8), "bias": Tensor((), 0, 8)}


def test_costs_are_the_papers_at_its_widths():
    square, up, down = Tensor((), 768, 768), Tensor((), 768, 3072), Tensor((), 3072, 768)
    assert [cost(t, "lora", 8) for t in (square, up, down)] == [12_288, 30_720, 30_720]
    assert [cost(t, "adapter", 8) for t in (square, up)] == [13_064, 52_232]
    for t, enough in ((square, 1229), (up, 3072)):
        for n in (enough - 1, enough):
            kinds, total = allocate({"w": n}, {"w": t}, "lora", 8, 10.0, 5.0)
            assert (kinds["w"] == "module") == (n == enough)
            assert total == (cost(t, "lora", 8) if n == enough else n)


def test_a_tensor_gets_a_module_its_whole_vector_or_its_entries():
    counts = {"q": 4, "up": 4, "stack": 7, "bias": 2}
    kinds, total = allocate(counts, TENSORS, "lora", 2, 10.0, 5.0)
    assert kinds == {"q": "module", "up": "sparse", "stack": "module", "bias": "whole"}
    assert total == 32 + 4 + 64 + 8
    none, _ = allocate(dict.fromkeys(TENSORS, 0), TENSORS, "lora", 2, 10.0, 5.0)
    assert none == {}


def test_alpha_and_beta_reach_from_entries_alone_to_structure_alone():
    one = dict.fromkeys(TENSORS, 1)
    assert set(allocate(one, TENSORS, "lora", 2, 0.0, 0.0)[0].values()) == {"sparse"}
    kinds, total = allocate(one, TENSORS, "lora", 2, math.inf, math.inf)
    assert kinds == {"q": "module", "up": "module", "stack": "module", "bias": "whole"}
    assert total == 32 + 48 + 64 + 8
    assert allocate(one, {**TENSORS, "q": Tensor((), 8, 1)}, "lora", 2, math.inf, 0.0)[0]["q"] == "sparse", (
        "rank over it"
    )


@pytest.mark.parametrize(("alpha", "beta"), [(10.0, 5.0), (1.0, 1.0), (0.0, 0.0), (math.inf, math.inf)])
def test_costs_never_fall_with_tau_and_the_nearest_is_found(alpha, beta, key):
    scores = {
        p: jax.random.exponential(jax.random.fold_in(key, i), (t.size,)) for i, (p, t) in enumerate(TENSORS.items())
    }
    counts = by_score(scores)
    every = sum(t.size for t in TENSORS.values())
    total = [allocate(counts(tau), TENSORS, "lora", 2, alpha, beta)[1] for tau in range(1, every + 1)]
    assert (np.diff(total) >= 0).all()
    for budget in (1, 40, 100, 10_000):
        tau = found_tau(lambda t: total[t - 1], budget, every)
        best = min(abs(t - budget) for t in total)
        assert abs(total[tau - 1] - budget) == best
        if tau < every and total[tau] != total[tau - 1]:
            assert abs(total[tau] - budget) > best, "of two equally near ones the larger tau"


def test_a_factor_of_the_loss_changes_no_allocation(params):
    plans = [spt(300, 2).prepare(study(params, scale=c)).config["plan"] for c in (1.0, 3.0)]
    assert plans[0] == plans[1]


def test_the_budget_is_met_and_the_class_token_is_in_it(params):
    for budget in (60, 450, 0.2):
        method = spt(budget, 2, score="magnitude").prepare(study(params))
        delta = start_of(params, method)
        plan = method.config["plan"]
        learned = trees.count(trees.learned(delta)[0])
        wanted = budget if budget > 1 else round(budget * trees.count(params))
        assert learned == plan["total"]
        assert abs(learned - wanted) <= 48, "the largest step: a module's cost"
        assert "params/backbone/embeddings/cls" in plan["whole"]
        assert not any("head" in p or "patch" in p for p in [*plan["modules"], *plan["whole"], *plan["counts"]])


def test_entries_are_the_global_top_tau_of_what_stays_sparse(params, scores):
    method = spt(60, 2, alpha=0.0, beta=0.0).prepare(study(params))
    delta = start_of(params, method)
    tau = method.config["plan"]["tau"]
    mask = top_k_mask(scores, tau)
    want = {p: np.flatnonzero(m).tolist() for p, m in mask.items() if m.any()}
    assert {p: d["indices"].value.tolist() for p, d in delta["sparse"].items()} == want
    assert tau == 60 - 8, "the class token is paid for first"


def test_a_matrix_is_surveyed_as_it_is_used(params):
    tensors, names = survey(Call(MODEL.apply, params, (IMAGES[0],)), "**/layers_0/**")
    assert tensors["params/backbone/layers_0/mlp/up/kernel"] == Tensor((), 8, 16)
    assert tensors["params/backbone/layers_0/mlp/up/bias"] == Tensor((), 0, 16)
    assert names["params/backbone/layers_0/mlp/up/kernel"] == "backbone/layers_0/mlp/up"
    heads = {"w": jnp.ones((4, 2, 3))}
    tensors, _ = survey(Call(lambda p, x: jnp.einsum("bi,ihe->bhe", x, p["w"]), heads, (jnp.ones((1, 4)),)), "w")
    assert tensors["w"] == Tensor((), 4, 6)


# ------------------------------------------------------------------------------------------------------------ the method


def test_it_starts_as_its_base_bit_for_bit_and_merges(params, prepared, close):
    _, adapted, start = prepared
    run = jax.jit(adapted.apply)
    np.testing.assert_array_equal(run(params, start, IMAGES[0]), jax.jit(MODEL.apply)(params, IMAGES[0]))
    delta = moved(start)
    assert set(delta) == {"lora", "full", "sparse"}
    close(jax.jit(MODEL.apply)(adapted.merge(params, delta), IMAGES[0]), run(params, delta, IMAGES[0]))
    # LoRA has no factor: W + A B.
    path, d = next(iter(delta["lora"].items()))
    close(trees.by_path(adapted.merge(params, delta))[path] - trees.by_path(params)[path], d["a"] @ d["b"])


def test_a_matrix_has_a_module_or_entries_and_its_bias_decides_for_itself(prepared):
    method, _, delta = prepared
    parts = [set(delta[n]) for n in ("lora", "full", "sparse")]
    assert not parts[0] & parts[2]
    assert not parts[1] & (parts[0] | parts[2])
    assert method.prepare is None
    kinds, _ = allocate({"w": 1, "b": 5}, {"w": Tensor((), 8, 8), "b": Tensor((), 0, 8)}, "lora", 2, 10.0, 5.0)
    assert kinds == {"w": "sparse", "b": "whole"}


def test_with_all_entries_the_gradient_is_that_of_full_fine_tuning(params, close):
    method = spt(tau=10**6, rank=2, score="magnitude", alpha=0.0, beta=0.0).prepare(study(params))
    adapted, delta = adapt(MODEL.apply, method), start_of(params, method)
    yes, no = trees.learned(delta["sparse"])
    run = lambda yes: loss(
        lambda x: adapted.apply(params, {**delta, "sparse": trees.combine(yes, no)}, x), (IMAGES[0], LABELS[0]), None
    )
    got = jax.jit(jax.grad(run))(yes)
    plain = lambda p: loss(lambda x: MODEL.apply(p, x), (IMAGES[0], LABELS[0]), None)
    want = trees.by_path(jax.jit(jax.grad(plain))(params))
    for path, d in got.items():
        assert (delta["sparse"][path]["indices"].value == jnp.arange(want[path].size)).all()
        close(d["values"], want[path].reshape(-1))
    assert sum(d["values"].size for d in got.values()) == sum(
        x.size for p, x in trees.by_path(params).items() if "/layers_" in p or "final_norm" in p
    )


def test_infinite_alpha_is_lora_on_every_matrix(params):
    method = spt(tau=10**6, rank=2, score="magnitude", alpha=math.inf, beta=math.inf).prepare(study(params))
    plan = method.config["plan"]
    matrices = {p for p, x in trees.by_path(params).items() if "/layers_" in p and x.ndim == 2}
    assert set(plan["modules"]) == matrices
    assert plan["counts"] == {}


def test_adapters_follow_each_matrix_and_stand_beside_the_output_projection(params, close):
    at = "**/layers*/**/kernel"
    every = dict(score="magnitude", alpha=math.inf, beta=0.0, tau=10**6)
    method = spt(rank=2, inner="adapter", at=at, **every).prepare(study(params))
    adapted, start = started(params, method)
    assert method.merge is None
    np.testing.assert_array_equal(
        jax.jit(adapted.apply)(params, start, IMAGES[0]), jax.jit(MODEL.apply)(params, IMAGES[0])
    )
    delta = moved(start)
    assert {p.rpartition("/")[2] for p in delta["adapter"]} == {"query", "key", "value", "up", "down"}
    assert {p.rpartition("/")[2] for p in delta["adapter_out"]} == {"out"}

    def bottleneck(d, z):
        return jax.nn.gelu(z @ d["down"] + d["down_bias"], approximate=False) @ d["up"] + d["up_bias"]

    import flax.linen as nn

    def intercept(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        place = "params/" + "/".join(context.module.path)
        if context.method_name == "__call__" and place in delta["adapter"]:
            y = y + bottleneck(delta["adapter"][place], y)
        if context.method_name == "__call__" and place in delta["adapter_out"]:
            y = y + bottleneck(delta["adapter_out"][place], args[0])
        return y

    @jax.jit
    def by_hand(params, x):
        params = trees.replace_leaves(
            params, {p: trees.by_path(params)[p] + d["difference"] for p, d in delta["full"].items()}
        )
        with nn.intercept_methods(intercept):
            return MODEL.apply(params, x)

    close(jax.jit(adapted.apply)(params, delta, IMAGES[0]), by_hand(params, IMAGES[0]))


def test_scanned_layers_are_one_tensor_each(params, scores, close):
    model = ImageClassifier(dataclasses.replace(CONFIG, scan=True), 3)
    stacked = stack_layers(params)
    for path, s in scores_of(stacked, model).items():
        if "/layers/" in path:
            close(s, jnp.stack([scores[path.replace("/layers/", f"/layers_{i}/")] for i in range(2)]), atol=1e-4)
    method = spt(400, 2, score="magnitude").prepare(study(stacked, model))
    adapted, delta = started(stacked, method, model)
    assert set(delta) == {"lora", "full", "sparse"}
    tensors, _ = survey(Call(model.apply, stacked, (IMAGES[0],)), "**/{layers*,final_norm}/**")
    assert tensors["params/backbone/layers/mlp/up/kernel"] == Tensor((2,), 8, 16)
    assert tensors["params/backbone/layers/mlp/up/bias"] == Tensor((2,), 0, 16)
    delta = moved(delta)
    close(
        jax.jit(model.apply)(adapted.merge(stacked, delta), IMAGES[0]),
        jax.jit(adapted.apply)(stacked, delta, IMAGES[0]),
    )


def test_a_prepared_method_comes_back_from_its_file(params, prepared, tmp_path, close):
    method, adapted, start = prepared
    delta = moved(start)
    save_delta(tmp_path / "d", delta, method, params)
    saved = load_delta(tmp_path / "d", params)
    again = adapt(MODEL.apply, saved.method, on_dense="refuse")
    close(jax.jit(again.apply)(params, saved.delta, IMAGES[0]), jax.jit(adapted.apply)(params, delta, IMAGES[0]))
    assert from_config(saved.method.config).config == saved.method.config
    shapes = jax.eval_shape(again.init, jax.random.key(0), params, IMAGES[0])
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, start)
    with pytest.raises(ValueError, match="made from a file"):
        again.init(jax.random.key(0), params, IMAGES[0])


def test_other_scores_need_no_data_and_choose_other_entries(params, scores):
    made = {}
    for score in ("sensitivity", "magnitude", "random"):
        method = spt(80, 2, score=score, alpha=0.0, beta=0.0).prepare(study(params))
        delta = start_of(params, method)
        made[score] = {(p, int(i)) for p, d in delta["sparse"].items() for i in d["indices"].value}
        assert len(made[score]) == 72
    assert len(made["sensitivity"] & made["magnitude"]) < 60
    assert len(made["sensitivity"] & made["random"]) < 30
    largest = top_k_mask({p: jnp.abs(x) for p, x in trees.by_path(params).items() if p in scores}, 72)
    assert made["magnitude"] == {(p, int(i)) for p, m in largest.items() for i in np.flatnonzero(m)}
    assert spt().prepare is not None
    with_head = chain(spt(80, 2), head())
    assert with_head.prepare is not None
    assert with_head.prepare(study(params)).prepare is None


def test_scores_that_say_nothing_are_refused(params):
    zero = trees.replace_leaves(params, {"params/head/kernel": jnp.zeros((8, 3))})
    with pytest.raises(ValueError, match=r"all sensitivities are zero.*head of zeros"):
        spt(80, 2).prepare(study(zero))
    with pytest.raises(ValueError, match="not finite"):
        spt(80, 2).prepare(study(params, scale=float("nan")))


def test_bad_arguments_are_refused(params):
    for made, word in (
        (lambda: spt(rank=0), "rank 0"),
        (lambda: spt(score="fisher"), "score 'fisher'"),  # pyright: ignore
        (lambda: spt(inner="dora"), "inner 'dora'"),  # pyright: ignore
        (lambda: spt(alpha=0.5), "alpha 0.5"),
        (lambda: spt(beta=-1.0), "beta -1.0"),
        (lambda: spt(0), "budget 0"),
        (lambda: spt(tau=0), "tau 0"),
        (lambda: spt(batches=0), "batches 0"),
        (lambda: started(params, spt(80, 2)), "looks at the task's data"),
        (lambda: spt(10**7, 2).prepare(study(params)), r"budget 10000000: that is 10000000 of"),
    ):
        with pytest.raises(ValueError, match=word):
            made()
    with pytest.raises(PatternError, match="near misses"):
        spt(80, 2, at="**/attentoin/**").prepare(study(params))
    three = adapt(lambda p, x: x @ p["u"] @ p["v"] @ p["w"], spt(rank=2, score="random", at="*", tau=1))
    with pytest.raises(ValueError, match="not one of the weights gets a sensitive entry"):
        three.init(jax.random.key(0), {n: jnp.ones((4, 4)) for n in "uvw"}, jnp.ones((1, 4)))


# ---------------------------------------------------------------------------------------------------------------- golden

GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "spt" / "golden.safetensors")


def golden(part):
    return {k.removeprefix(f"{part}/"): jnp.asarray(v) for k, v in GOLDEN.items() if k.startswith(f"{part}/")}


def test_sparse_products_and_their_gradients_are_those_of_the_papers_code(close):
    """Its own autograd function, against a value that jax differentiates by itself; weights are transposed there."""
    g = golden("linear")
    params = {"kernel": g["weight"].T, "bias": g["bias"]}
    method = sparse(indices={"kernel": g["columns"] * 4 + g["rows"], "bias": g["bias_indices"]})
    adapted = adapt(lambda p, x: x @ p["kernel"] + p["bias"][None, None], method, on_dense="refuse")
    delta = adapted.init(jax.random.key(0), params, g["x"])

    def run(x, values, bias_values):
        own = {n: {**delta[n], "values": v} for n, v in (("kernel", values), ("bias", bias_values))}
        return adapted.apply(params, own, x)

    inputs = (g["x"], g["values"], g["bias_values"])
    y, back = jax.vjp(run, *inputs)
    close(y, g["y"])
    close(back(g["up"]), (g["x_gradient"], g["values_gradient"], g["bias_values_gradient"]))
    dense = sparse_weight(params["kernel"], g["columns"] * 4 + g["rows"], g["values"]).dense()
    close(dense, params["kernel"].at[g["columns"], g["rows"]].add(g["values"]))


def test_modules_are_those_of_the_papers_code(close):
    g = golden("lora")
    own = {"kernel": {"a": g["learnable.0.weight"].T, "b": g["learnable.1.weight"].T}}
    zero = {"kernel": jnp.zeros((6, 4))}
    close(adapt(lambda p, x: x @ p["kernel"], lora(3, 3.0, "kernel")).apply(zero, own, g["x"]), g["y"])

    import flax.linen as nn

    class Nothing(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.zeros((*x.shape[:-1], 4))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Nothing(name="out")(x)

    g = golden("adapter")
    adapted = adapt(Net().apply, sublayer([PARALLEL], 3, at="out"))
    ((place, _),) = adapted.init(jax.random.key(0), {}, g["x"]).items()
    own = {"down": g["learnable.0.weight"].T, "down_bias": g["learnable.0.bias"]}
    own |= {"up": g["learnable.2.weight"].T, "up_bias": g["learnable.2.bias"]}
    close(adapted.apply({}, {place: own}, g["x"]), g["y"])


def recorded_tensors():
    """The recorded run's tensors in their order: {name: shape}, weights (outputs, inputs)."""
    d, h = 128, 512
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, 5, d)}
    shapes |= {"patch_embed.proj.weight": (d, 3, 2, 2), "patch_embed.proj.bias": (d,)}
    for i in range(12):
        p = f"blocks.{i}."
        shapes |= {f"{p}norm1.weight": (d,), f"{p}norm1.bias": (d,)}
        for n in ("q", "k", "v", "proj"):
            shapes |= {f"{p}attn.{n}.weight": (d, d), f"{p}attn.{n}.bias": (d,)}
        shapes |= {f"{p}norm2.weight": (d,), f"{p}norm2.bias": (d,)}
        shapes |= {f"{p}mlp.fc1.weight": (h, d), f"{p}mlp.fc1.bias": (h,)}
        shapes |= {f"{p}mlp.fc2.weight": (d, h), f"{p}mlp.fc2.bias": (d,)}
    return shapes | {"norm.weight": (d,), "norm.bias": (d,), "head.weight": (7, d), "head.bias": (7,)}


@pytest.fixture(scope="module")
def recorded_scores():
    """The recorded run's sensitivities, of gradients that are made from names."""

    def gradient(name, shape, batch):
        code = zlib.crc32(name.encode())
        spread = np.exp(2 * np.random.default_rng(code).normal())
        return (np.random.default_rng([code, batch]).normal(size=shape) * spread).astype(np.float32)

    skipped = ("head", "cls_token", "patch_embed", "pos_embed")
    return {
        n: sum(np.square(gradient(n, s, b)) for b in range(2))
        for n, s in recorded_tensors().items()
        if not any(word in n for word in skipped)
    }


@pytest.mark.parametrize("inner", ["lora", "adapter"])
@pytest.mark.parametrize("budget", ["0.05", "0.1", "0.2", "1.0"])
def test_the_allocation_is_that_of_the_papers_code(inner, budget, recorded_scores):
    """On the code's own grid of tau; it counts 768 for the class token whatever the width, and sums in float32."""
    tensors = {
        n: Tensor((), s.shape[1], s.shape[0]) if s.ndim == 2 else Tensor((), 0, s.shape[0])
        for n, s in recorded_scores.items()
    }
    order = np.argsort(-np.concatenate([s.reshape(-1) for s in recorded_scores.values()]), kind="stable")
    owner = np.repeat(np.arange(len(tensors)), [s.size for s in recorded_scores.values()])[order]

    def counts(tau):
        return dict(zip(tensors, np.bincount(owner[:tau], minlength=len(tensors))))

    best, kept = 0.0, {}
    for j in range(1, 80):
        kinds, total = allocate(counts(math.ceil(0.02 * j * 1e6)), tensors, inner, 8, 10.0, 5.0)
        total = (total + 768) / 1e6
        if abs(total - float(budget)) <= abs(best - float(budget)):
            best, kept, tau = total, kinds, math.ceil(0.02 * j * 1e6)
    g = golden(f"allocation/{inner}/{budget}")
    names = list(recorded_tensors())
    assert float(g["total"][0]) == pytest.approx(best * 1e6, abs=2)
    operations = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    modules = [[int(kept.get(f"blocks.{i}.{n}.weight") == "module") for n in operations] for i in range(12)]
    assert g["matrices"].tolist() == modules
    assert g["vectors"].tolist() == [int(kept.get(n) == "whole") for n in names]
    entries = counts(tau)
    sparse_ones = {n: int(entries[n]) for n in tensors if kept.get(n) not in ("module", "whole")}
    assert g["sparse"].tolist() == [sparse_ones.get(n, -1) for n in names]
