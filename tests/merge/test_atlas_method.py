"""aTLAS as a method: learned coefficients over frozen task vectors, in factors and dense, as `compose` has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft import PatternError, adapt, lora, trees
from jaxpeft.merge import MergeInputError, task_vectors
from jaxpeft.merge.atlas import compose
from jaxpeft.merge.atlas_method import anisotropic_scaling
from jaxpeft.merge.atlas_vectors import blocks_within, lora_task_vectors

pytestmark = pytest.mark.usefixtures("quick")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([*shape, seed]).normal(size=shape), jnp.float32)


BASE = {"layers": {"kernel": normal(2, 4, 4), "bias": normal(2, 4)}, "out": normal(4, 2, 3)}
X = normal(7, 4, seed=9)


def model(params, x):
    layer = lambda x, p: (jnp.tanh(x @ p["kernel"] + p["bias"]), None)
    x, _ = jax.lax.scan(layer, x, params["layers"])
    return jnp.einsum("bd,dhe->bhe", x, params["out"])


METHODS = [lora(rank=2, at=("layers/kernel", "out")), lora(rank=3, alpha=1.0, at="layers/kernel")]


@pytest.fixture(scope="module")
def low():
    deltas = [jax.jit(adapt(model, m).init)(jax.random.key(1), BASE, X) for m in METHODS]
    deltas = [jax.tree.map(lambda x, i=i: x + normal(*x.shape, seed=i), d) for i, d in enumerate(deltas)]
    return lora_task_vectors(METHODS, deltas, BASE)


def started(vectors, **options):
    adapted = adapt(model, anisotropic_scaling(vectors, **options), on_dense="refuse")
    delta = jax.jit(adapted.init)(jax.random.key(0), BASE, X)
    return adapted, delta, {p: {**d, "lam": normal(*d["lam"].shape)} for p, d in delta.items()}


def test_factors_answer_as_the_composed_model_without_forming_a_weight(low, close):
    adapted, delta, moved = started(low)
    assert {p: d["lam"].shape for p, d in delta.items()} == {"layers/kernel": (2, 2), "out": (2,)}
    assert trees.count(trees.learned(delta)[0]) == 6
    lam = {"layers/kernel": moved["layers/kernel"]["lam"].T[..., None, None], "out": moved["out"]["lam"]}
    want = compose(BASE, low, lam)
    close(jax.jit(adapted.apply)(BASE, moved, X), model(want, X))
    close(adapted.merge(BASE, moved), want)
    close(adapted.apply(BASE, delta, X), model(BASE, X))


def test_dense_vectors_answer_as_the_composed_model(close):
    models = [jax.tree.map(lambda x, i=i: x + 0.3 * normal(*x.shape, seed=i), BASE) for i in range(1, 4)]
    tau = task_vectors(BASE, models)
    adapted, delta, moved = started(tau, stacked="layers/*")
    assert {p: d["lam"].shape for p, d in delta.items()} == {
        "layers/bias": (2, 3),
        "layers/kernel": (2, 3),
        "out": (3,),
    }
    lam = {p: moved[p]["lam"].T.reshape(3, 2, *(1,) * n) for p, n in (("layers/bias", 1), ("layers/kernel", 2))}
    want = compose(BASE, tau, {**lam, "out": moved["out"]["lam"]})
    close(adapted.merge(BASE, moved), want)
    close(jax.jit(adapted.apply)(BASE, moved, X), model(want, X))
    chosen = blocks_within(tau, 4 * 3 * 8)
    assert chosen == ["layers/bias"]
    assert set(started(tau, at=chosen)[1]) == {"layers/bias"}


def test_bad_vectors_are_told(low):
    with pytest.raises(ValueError, match="rank 16, 0 task vectors"):
        anisotropic_scaling(0)
    with pytest.raises(ValueError, match=r"sizes \[2, 3\]"):
        anisotropic_scaling({"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))})
    with pytest.raises(MergeInputError, match=r"task vectors \(2, 4, 3\) of 'out': expected \(2, 4, 2, 3\)"):
        started({"out": jnp.ones((2, 4, 3))})
    with pytest.raises(ValueError, match=r"no task vectors for 'layers/bias'.*narrow the pattern"):
        started(low, at="**")
    with pytest.raises(PatternError, match="matches no task vector"):
        anisotropic_scaling(low, stacked="layer/*")
