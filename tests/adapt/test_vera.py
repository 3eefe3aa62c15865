"""VeRA: its equation, what weights share, numbers recorded from PEFT."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpeft import PatternError, adapt, bake, trees, vera

pytestmark = pytest.mark.usefixtures("quick")
GOLDEN = load_file(Path(__file__).parents[2] / "third_party" / "vera" / "golden.safetensors")
NAMES = ("wide", "narrow")
RANK = 5


def apply(params, x):
    x = jnp.tanh(x @ params["wide"]["kernel"] + params["wide"]["bias"])
    return x @ params["narrow"]["kernel"] + params["narrow"]["bias"]


PARAMS = {n: {"kernel": GOLDEN[f"{n}/weight"].T, "bias": GOLDEN[f"{n}/bias"]} for n in NAMES}
X = GOLDEN["x"]
ADAPTED = adapt(apply, vera(RANK, at="**/kernel"), on_dense="refuse")


@pytest.fixture(scope="module")
def delta():
    return ADAPTED.init(jax.random.key(0), PARAMS, X)


def sizes(name):
    return " to ".join(map(str, PARAMS[name]["kernel"].shape))


def with_vectors(delta, of):
    """`delta` with d and b of each weight from `of(name, "d" or "b")`."""
    vectors = {sizes(n): {f"{n}/kernel": {k: jnp.asarray(of(n, k)) for k in "db"}} for n in NAMES}
    return {**delta, "vectors": vectors}


def recorded(delta):
    shared = {
        sizes(n): {
            "a": trees.Fixed(GOLDEN["a"][:, : PARAMS[n]["kernel"].shape[0]].T),
            "b": trees.Fixed(GOLDEN["b"][: PARAMS[n]["kernel"].shape[1]].T),
        }
        for n in NAMES
    }
    return {**with_vectors(delta, lambda n, k: GOLDEN[f"{n}/{k}"]), "shared": shared}


def test_outputs_and_gradients_are_pefts(delta):
    delta = recorded(delta)
    np.testing.assert_allclose(ADAPTED.apply(PARAMS, delta, X), GOLDEN["y"], rtol=1e-4, atol=1e-5)
    loss = lambda vectors: jnp.sum(ADAPTED.apply(PARAMS, {**delta, "vectors": vectors}, X) * GOLDEN["up"])
    grads = jax.grad(loss)(delta["vectors"])
    for name in NAMES:
        for k in "db":
            want = GOLDEN[f"{name}/{k}_grad"]
            np.testing.assert_allclose(grads[sizes(name)][f"{name}/kernel"][k], want, rtol=1e-4, atol=1e-4)


def test_a_weight_moves_by_its_scaled_slices_of_the_shared_matrices(delta, close):
    rng = np.random.default_rng(1)
    vectors = {n: {k: rng.normal(size=GOLDEN[f"{n}/{k}"].shape).astype(np.float32) for k in "db"} for n in NAMES}
    moved = with_vectors(delta, lambda n, k: vectors[n][k])
    merged = ADAPTED.merge(PARAMS, moved)
    for n in NAMES:
        a, b = (delta["shared"][sizes(n)][k].value for k in "ab")
        want = PARAMS[n]["kernel"] + a @ np.diag(vectors[n]["d"]) @ b @ np.diag(vectors[n]["b"])
        close(merged[n]["kernel"], want)


def test_weights_take_slices_of_one_draw(delta):
    wide, narrow = (delta["shared"][sizes(n)] for n in NAMES)
    assert (wide["a"].value == narrow["a"].value[:4]).all()
    assert (narrow["b"].value == wide["b"].value[:, :3]).all()
    assert np.abs(narrow["a"].value).max() <= np.sqrt(6 / 6)  # fan in 6
    assert np.abs(wide["b"].value).max() <= np.sqrt(6 / RANK)
    assert np.std(wide["b"].value) > 0.4


def test_only_the_vectors_are_learned_and_it_starts_as_its_base(delta, close):
    assert trees.count(trees.learned(delta)[0]) == (RANK + 6) + (RANK + 3)
    assert {float(x) for d in trees.learned(delta)[0]["vectors"].values() for v in d.values() for x in v["d"]} == {
        np.float32(0.1).item()
    }
    close(ADAPTED.apply(PARAMS, delta, X), apply(PARAMS, X))


def test_stacked_weights_share_matrices_and_have_vectors_each(close):
    rng = np.random.default_rng(2)
    stack = {"kernel": rng.normal(size=(3, 4, 4)).astype(np.float32)}

    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["kernel"])[0]

    adapted = adapt(scanned, vera(2, at="kernel"), on_dense="refuse")
    delta = adapted.init(jax.random.key(0), stack, X)
    own = delta["vectors"]["4 to 4"]["kernel"]
    assert (own["d"].shape, own["b"].shape) == ((3, 2), (3, 4))
    assert delta["shared"]["4 to 4"]["a"].value.shape == (4, 2)
    own = {k: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for k, x in own.items()}
    delta = {**delta, "vectors": {"4 to 4": {"kernel": own}}}
    a, b = (delta["shared"]["4 to 4"][k].value for k in "ab")
    want = X
    for i in range(3):
        want = jnp.tanh(want @ (stack["kernel"][i] + (a * own["d"][i]) @ (b * own["b"][i])))
    close(adapted.apply(stack, delta, X), want)


def test_it_bakes_into_a_lora_of_scale_one_though_its_rank_is_over_a_side(delta, close):
    delta = recorded(delta)
    inner, own = bake(ADAPTED.method, delta)
    assert inner.config["method"] == "lora"
    assert own["narrow/kernel"]["b"].shape == (RANK, 3)  # rank 5 of a 6 x 3 matrix
    close(adapt(apply, inner).apply(PARAMS, own, X), ADAPTED.apply(PARAMS, delta, X))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="rank 0: a rank is at least 1"):
        vera(0)
    with pytest.raises(ValueError, match=r"dropout 1.0: expected"):
        vera(dropout=1.0)
    with pytest.raises(PatternError, match="kernl"):
        adapt(apply, vera(at="**/kernl")).init(jax.random.key(0), PARAMS, X)
