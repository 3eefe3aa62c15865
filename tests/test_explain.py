"""How low-rank sums are multiplied, which product is chosen where, and how `explain` tells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_promises import CONFIG, IDS, MASK, moved

import jaxpeft
from jaxpeft.models import SequenceClassifier
from jaxpeft.weights import products

pytestmark = pytest.mark.usefixtures("quick")


def weights():
    rng = np.random.default_rng(0)
    shapes = {"square": (24, 16), "heads": (24, 2, 8), "out": (2, 8, 24)}
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


def model(p, x):
    """Products as models write them: a matrix, a split result, two contracted axes."""
    h = jnp.einsum("btd,dhk->bthk", jnp.tanh(x), p["heads"])
    return jnp.einsum("bthk,hkd->btd", h, p["out"]) @ p["square"]


def adapted_to(backend, method=None):
    method = method or jaxpeft.lora(rank=2, at="*")
    adapted = jaxpeft.adapt(model, method, backend=backend, on_dense="refuse")
    x = jax.random.normal(jax.random.key(1), (3, 5, 24))
    delta = moved(adapted.init(jax.random.key(0), weights(), x))
    return adapted, delta, x


def value_and_gradient(adapted, delta, x, key=None):
    def loss(delta, x):
        return (adapted.apply(weights(), delta, x, dropout_key=key) ** 2).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(delta, x)


@pytest.mark.parametrize(
    "method", [jaxpeft.lora(rank=2, at="*"), jaxpeft.dora(rank=2, at="square")], ids=lambda m: m.name
)
def test_the_merged_product_has_the_values_and_gradients_of_two_products(method, close):
    answers = [value_and_gradient(*adapted_to(backend, method)) for backend in ("xla", "merged")]
    close(*answers, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_kernel_in_a_models_products_has_the_values_and_gradients_of_two_products(dropout, close, monkeypatch, key):
    method = jaxpeft.lora(rank=2, at="*", dropout=dropout)
    want = value_and_gradient(*adapted_to("xla", method), key=key)
    asked = []

    def kernel_everywhere(m, k, n, r, backend, platform, *, local):
        asked.append((m, k, n, r))
        return "kernel"

    monkeypatch.setattr(products, "chosen", kernel_everywhere)
    close(value_and_gradient(*adapted_to("auto", method), key=key), want, atol=1e-4)
    assert set(asked) == {(15, 24, 16, 2), (15, 16, 24, 2)}  # of all three sites


def test_the_merged_products_gradient_takes_no_product_of_the_weights_size():
    x, w, a, b = jnp.ones((64, 150)), jnp.ones((150, 140)), jnp.ones((150, 2)), jnp.ones((2, 140))
    gradient = jax.jit(jax.grad(lambda a: products.merged(None, x, w, a, b).sum()))
    assert gradient.lower(a).compile().cost_analysis()["flops"] < 0.1 * 2 * 64 * 150 * 140


@pytest.mark.parametrize(
    ("backend", "platform", "local", "shape", "product"),
    [
        ("auto", "cpu", True, (2048, 384, 384, 8), "two products"),
        ("auto", "tpu", True, (2048, 384, 384, 8), "kernel"),
        ("auto", "tpu", False, (2048, 384, 384, 8), "two products"),
        ("auto", "tpu", True, (2048, 64, 384, 8), "two products"),
        ("auto", "cuda", True, (2048, 384, 384, 8), "two products"),
        ("pallas", "cuda", False, (2048, 384, 384, 8), "kernel"),
        ("pallas", "tpu", True, (2048, 384, 384, 300), "two products"),
        ("pallas", "cpu", True, (2048, 384, 384, 8), "two products"),
        ("xla", "tpu", True, (2048, 384, 384, 8), "two products"),
        ("merged", "tpu", True, (2048, 384, 384, 8), "merged"),
    ],
)
def test_the_product_is_chosen_by_backend_platform_and_size(backend, platform, local, shape, product):
    assert products.chosen(*shape, backend, platform, local=local) == product


def test_an_unknown_backend_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="cuda"):
        jaxpeft.adapt(model, jaxpeft.lora(at="*"), backend="cuda")


def test_explain_tells_path_shape_product_operations_and_bytes_of_each_site():
    adapted, delta, x = adapted_to("auto")
    found = {s.path: s for s in jaxpeft.explain(adapted, weights(), delta, x).sites}
    assert set(found) == {"square", "heads", "out"}
    square = found["square"]
    assert (square.kind, square.shape, square.product, square.uses) == ("low rank", (24, 16), "two products", 1)
    assert square.operations == 2 * 15 * (24 * 16 + 24 * 2 + 2 * 16)
    assert square.bytes == 4 * (15 * 24 + 15 * 16 + 24 * 16 + 24 * 2 + 2 * 16 + 1)
    assert found["out"].operations == found["heads"].operations == square.operations
    merged = jaxpeft.explain(adapted_to("merged")[0], weights(), delta, x)
    assert {s.operations for s in merged.sites} == {2 * (15 + 2) * 24 * 16}


def test_explain_counts_the_layers_of_a_scan_and_names_modules(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    big = jaxpeft.models.EncoderConfig(vocab=20, width=128, layers=3, heads=2, head_dim=64, mlp_width=128, scan=True)
    classifier = SequenceClassifier(big, 3)
    ids = jax.ShapeDtypeStruct((8, 4), jnp.int32)
    params = jax.eval_shape(classifier.init, jax.random.key(0), ids)
    method = jaxpeft.chain(jaxpeft.lora(rank=2), jaxpeft.pfeiffer(rank=3))
    adapted = jaxpeft.adapt(classifier.apply, method)
    delta = jax.eval_shape(adapted.init, jax.random.key(0), params, ids)
    found = jaxpeft.explain(adapted, params, delta, ids, platform="tpu")
    query = next(s for s in found.sites if s.path.endswith("query/kernel"))
    assert (query.product, query.uses) == ("kernel", 3)
    assert [s.kind for s in found.sites if s.kind == "module"] == ["module"]
    assert found.operations > found.base_operations
    text = str(found)
    assert query.path in text
    assert "GFLOP" in text


def test_explain_runs_on_every_method_of_the_registry():
    classifier = SequenceClassifier(CONFIG, 3)
    params = jax.eval_shape(classifier.init, jax.random.key(0), IDS, MASK)
    from test_promises import made

    for name, entry in jaxpeft.METHODS.items():
        if entry.reads == "images":
            continue
        adapted = jaxpeft.adapt(classifier.apply, made(name))
        delta = jax.eval_shape(adapted.init, jax.random.key(0), params, IDS, MASK)
        assert jaxpeft.explain(adapted, params, delta, IDS, MASK).sites, name
