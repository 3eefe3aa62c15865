"""The table of promises of merges: every one in the registry, on a tiny model, against everything that a merge must do.

A new merge enters by its registration; `EXTRA` is for arguments that it cannot do without.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxpeft.merge
from jaxpeft import PatternError, trees
from jaxpeft.merge import MERGES, MergeInputError, merge, stacked, ties

pytestmark = pytest.mark.usefixtures("quick")
T = 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 4, 8)).astype(np.float32)
Y = RNG.integers(0, 3, (2, 4))


def model(seed, by=0.3, dtype=np.float32):
    rng, start = np.random.default_rng(seed), np.random.default_rng(100)
    draw = lambda *shape: jnp.asarray(start.normal(size=shape) + by * rng.normal(size=shape), dtype)
    return {
        "layer": {"kernel": draw(8, 16), "bias": draw(16)},
        "head": draw(16, 3),
        "steps": jnp.asarray(seed, jnp.int32),
    }


BASE, MODELS = model(0, by=0), [model(t) for t in range(1, T + 1)]


def apply_fn(params, x):
    return jnp.tanh(x @ params["layer"]["kernel"] + params["layer"]["bias"]) @ params["head"]


def score_fn(params):
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return -jnp.mean(jnp.square(apply_fn(wide, jnp.asarray(X[0]))))


def extra(name, n=T):
    """What a merge cannot do without, for n models."""
    rng = np.random.default_rng(7)
    like = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0, 1e-4, (T, *x.shape)), jnp.float32), BASE)
    grams = {
        "layer/kernel": jnp.stack([jaxpeft.merge.gram(RNG.normal(size=(20, 8)).astype(np.float32)) for _ in range(T)])
    }
    have = {
        "fishers": jax.tree.map(lambda x: x[:n], like),
        "grams": jax.tree.map(lambda x: x[:n], grams),
        "lam": jnp.linspace(0.2, 0.8, T)[:n],
        "score_fn": score_fn,
        "apply_fn": apply_fn,
        "batches": (jnp.asarray(X), jnp.asarray(Y)),
    }
    out = {k: have[k] for k in MERGES[name].needs}
    if MERGES[name].needs_key:
        out["key"] = jax.random.key(5)
    if name == "learned_soup":
        out["steps"] = 3
    if name == "dare":  # of other combiners its own tests
        out["p"] = 0.5
    return out


class Case:
    def __init__(self, name):
        self.name, self.entry, self.extra = name, MERGES[name], extra(name)
        self.hyper = {k: 0.3 * a + 0.7 * b for k, (a, b) in self.entry.hyper.items()}
        self.run = jax.jit(lambda base, models, **hyper: self(base, models, **hyper))

    def __call__(self, base, models, **more):
        return self.entry.function(base, models, **{**self.extra, **self.hyper, **more})

    @functools.cached_property
    def reference(self):
        return self.run(BASE, MODELS)


@pytest.fixture(scope="module", params=sorted(MERGES))
def case(request):
    return Case(request.param)


def floats(tree):
    return {p: x for p, x in trees.by_path(tree).items() if jnp.issubdtype(x.dtype, jnp.floating)}


def test_it_gives_a_model_of_the_same_kind_with_and_without_jit(case, close):
    plain = case(BASE, MODELS)
    close(plain, case.reference)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), plain) == jax.tree.map(lambda x: (x.shape, x.dtype), BASE)
    assert all(bool(jnp.isfinite(x).all()) for x in floats(plain).values())
    assert any(float(jnp.abs(x - y).max()) > 1e-3 for x, y in zip(floats(plain).values(), floats(BASE).values()))


def test_a_stack_is_a_list_of_models(case, close):
    close(case.run(BASE, stacked(MODELS)), case.reference, atol=1e-6)
    close(case.run(BASE, tuple(MODELS)), case.reference, atol=1e-6)


def test_hyperparameters_are_swept_by_vmap_and_have_gradients(case, close):
    for name, (low, high) in case.entry.hyper.items():
        values = jnp.linspace(low, high, 3)
        curve = jax.jit(jax.vmap(lambda v: case(BASE, MODELS, **{name: v})))(values)
        for i, v in enumerate(values):
            close(jax.tree.map(lambda x: x[i], curve), case.run(BASE, MODELS, **{name: v}))
        total = lambda v: sum(jnp.sum(jnp.sin(x)) for x in floats(case(BASE, MODELS, **{name: v})).values())
        slope = jax.jit(jax.grad(total))(jnp.float32(case.hyper[name]))
        assert jnp.isfinite(slope)
        if name == "alpha":
            h = 0.01  # float32 sums of 200 terms leave 1e-3 of a central difference
            finite = (total(case.hyper[name] + h) - total(case.hyper[name] - h)) / (2 * h)
            np.testing.assert_allclose(slope, finite, atol=1e-2, rtol=1e-2)


def test_models_have_gradients(case):
    def total(models):
        return sum(jnp.sum(jnp.sin(x)) for x in floats(case(BASE, models)).values())

    grads = jax.jit(jax.grad(total, allow_int=True))(MODELS)
    moving = [x for x in jax.tree.leaves(grads) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(moving) == 3 * T
    assert all(bool(jnp.isfinite(x).all()) for x in moving)
    assert any(bool((x != 0).any()) for x in moving)


def test_eight_devices_with_sharded_parameters_give_the_same(case, mesh, close):
    def spec(x):
        axis = next((i for i, n in enumerate(x.shape) if n % 8 == 0), None)
        return PartitionSpec(*["d" if i == axis else None for i in range(x.ndim)])

    put = lambda tree: jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), tree)
    close(case.run(put(BASE), [put(m) for m in MODELS]), case.reference)


def test_narrow_models_are_merged_in_float32_and_rounded_once(case):
    narrow = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, tree)
    base, models = narrow(BASE), [narrow(m) for m in MODELS]
    got = case.run(base, models)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, base)
    if case.name in ("greedy_soup", "learned_soup"):  # what a score sees is rounded, too
        return
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)
    want = case.run(wide(base), [wide(m) for m in models])
    for x, y in zip(floats(got).values(), floats(want).values()):
        # Half a unit in the last of bfloat16's eight digits, and what another order of sums adds.
        np.testing.assert_allclose(np.asarray(x, np.float32), y, rtol=2**-8 * 1.01, atol=1e-6)


def test_one_model_is_enough(case):
    got = jax.jit(lambda m: case.entry.function(BASE, m, **{**extra(case.name, 1), **case.hyper}))(MODELS[:1])
    assert all(bool(jnp.isfinite(x).all()) for x in floats(got).values())


def test_the_order_of_models_does_not_matter_where_the_registry_says_so(case, close):
    order = [2, 0, 1]
    more = {
        k: jax.tree.map(lambda x: x[jnp.array(order)], case.extra[k])
        for k in case.entry.needs
        if k in ("fishers", "grams", "lam")
    }
    got = case.run(BASE, [MODELS[i] for i in order], **more)
    if case.entry.symmetric:
        close(got, case.reference)
    else:
        assert not all(bool(jnp.allclose(x, y)) for x, y in zip(floats(got).values(), floats(case.reference).values()))


def test_models_that_are_their_base_give_it_back(case, close):
    close(case.run(BASE, [{**BASE, "steps": m["steps"]} for m in MODELS]), BASE, atol=2e-6)


def test_what_is_no_float_or_excluded_is_the_bases_or_the_first_models(case):
    got = case(BASE, MODELS, exclude="head")
    assert int(got["steps"]) == 0
    assert (got["head"] == BASE["head"]).all()
    assert not (got["layer"]["kernel"] == BASE["layer"]["kernel"]).all()
    with pytest.raises(PatternError, match=r"matches no parameter.*near misses"):
        case(BASE, MODELS, exclude="haed")
    if case.entry.needs_base:
        with pytest.raises(MergeInputError, match="no base"):
            case(None, MODELS)
    else:
        got = case(None, MODELS, exclude="head")
        assert int(got["steps"]) == 1
        assert (got["head"] == MODELS[0]["head"]).all()


def test_models_that_do_not_fit_are_named_with_their_leaves(case):
    wrong = [*MODELS[:2], {**MODELS[2], "head": jnp.ones((16, 4))}]
    with pytest.raises(
        MergeInputError, match=r"1 of 4 leaves differ\n.*\n  head  float32\[16, 3\]  base, 0, 1\n.*float32\[16, 4\]  2"
    ):
        jax.eval_shape(case, BASE, wrong)
    with pytest.raises(MergeInputError, match="no models"):
        case(BASE, [])


def test_it_works_under_strict_promotion(case):
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(case, BASE, MODELS)
        jax.eval_shape(lambda hyper: case(BASE, MODELS, **hyper), {k: jnp.float32(v) for k, v in case.hyper.items()})


def test_the_registry_is_told_the_truth():
    assert MERGES
    for name, entry in MERGES.items():
        assert getattr(jaxpeft.merge, name) is entry.function, name
        assert entry.paper, name
        assert entry.summary.endswith("."), name
        accepted = entry.function.__kwdefaults__ or {}
        assert set(entry.hyper) <= set(accepted), name
        assert not set(entry.needs) & set(accepted), name
    assert merge("ties").function is ties
    with pytest.raises(ValueError, match=r"unknown merge 'tise'; did you mean 'ties'.*there are: "):
        merge("tise")
