"""The table of promises of hypernetworks: every one in the registry, on a tiny target, against everything that each must do.

A new one enters by its registration and a line in `CASES`: what makes it, and a condition.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft import lift, trees
from jaxpeft.files import load_hypernetwork, save_hypernetwork
from jaxpeft.hyper import (
    HYPERNETWORKS,
    TargetError,
    d2nwg,
    kind,
    logah,
    logah_network,
    mip,
    model_graph,
    stn,
    tleg,
    tunable_conv,
)
from jaxpeft.hyper.d2nwg import Denoiser, SampleEncoder

pytestmark = pytest.mark.usefixtures("quick")
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)


def start(key):
    """A target with stacked layers, a bias and a scale."""
    a, b, c = jax.random.split(key, 3)
    return {
        "layers": {"kernel": jax.random.normal(a, (2, 8, 8)) / 3, "bias": jax.random.normal(b, (2, 8))},
        "out": {"kernel": jax.random.normal(c, (8, 8)) / 3, "bias": jnp.zeros(8)},
        "norm": {"scale": jnp.ones(8)},
    }


def model(params, x):
    body = lambda h, layer: (jnp.tanh(h @ layer["kernel"] + layer["bias"]), None)
    h, _ = jax.lax.scan(body, x * params["norm"]["scale"], params["layers"])
    return h @ params["out"]["kernel"] + params["out"]["bias"]


SPEC, STACK = jax.eval_shape(start, jax.random.key(0)), "layers/**"
CASES = {
    "mip": lambda: (mip(SPEC, inputs=2, hidden=(4, 8), stacked=STACK), (jnp.array([0.2, 0.7]),)),
    "tleg": lambda: (tleg(SPEC, at=STACK), ()),
    "tunable_conv": lambda: (tunable_conv(start, stacked=STACK), (jnp.array([0.2, 0.8]),)),
    "stn": lambda: (stn(start, 2, stacked=STACK), (jnp.array([0.2, -0.7]),)),
    "kind": lambda: (kind(start, 4, at="**/kernel", stacked=STACK), (jnp.array([1.0, 1.0, 0.0, 1.0]),)),
    "d2nwg": lambda: (
        d2nwg(SPEC, (2, 3, 5), latent=4, times=20, encoder=SampleEncoder(2, 3, 4), denoiser=Denoiser(8, 1, 4)),
        ((jnp.ones((2, 3, 5)), jax.random.key(3)),),
    ),
    "logah": lambda: (logah(SPEC, model_graph(model, SPEC, X), logah_network((8, 1, 2, 4), reach=32)), ()),
}


class Case:
    def __init__(self, name):
        self.name = name
        self.hyper, self.condition = CASES[name]()

    @functools.cached_property
    def weights(self):
        """Away from the start, where some parts do nothing."""
        flat, structure = jax.tree.flatten(jax.jit(self.hyper.init)(jax.random.key(1)))
        keys = jax.random.split(jax.random.key(2), len(flat))
        return jax.tree.unflatten(structure, [w + 0.05 * jax.random.normal(k, w.shape) for w, k in zip(flat, keys)])

    @functools.cached_property
    def run(self):
        return jax.jit(lambda w: model(self.hyper.apply(w, *self.condition), X))

    @functools.cached_property
    def output(self):
        return self.run(self.weights)


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request):
    return Case(request.param)


def test_every_registered_hypernetwork_is_in_the_table():
    assert set(CASES) == set(HYPERNETWORKS)
    assert all(e.paper and e.summary for e in HYPERNETWORKS.values())


def test_what_is_emitted_is_a_tree_of_the_targets_shapes_and_dtypes(case):
    made = jax.eval_shape(lambda w: case.hyper.apply(w, *case.condition), case.weights)
    told = lambda tree: jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)
    assert jax.tree.structure(made) == jax.tree.structure(case.hyper.target)
    assert told(made) == told(case.hyper.target) == told(SPEC)


def test_compiled_and_not_agree(case, close):
    close(model(case.hyper.apply(case.weights, *case.condition), X), case.output, 1e-4)


def test_a_population_of_weights_is_one_program(case, close):
    two = jax.tree.map(lambda w: jnp.stack([w, 0.9 * w]), case.weights)
    many = jax.jit(jax.vmap(case.run))(two)
    close(many[0], case.output, 1e-4)
    assert float(jnp.abs(many[1] - many[0]).max()) > 1e-4


def test_all_that_is_trained_has_a_finite_gradient_and_most_of_it_one_that_is_not_zero(case):
    grads = jax.jit(jax.grad(lambda w: jnp.square(case.run(w)).sum()))(case.weights)
    sizes = {p: float(jnp.abs(g).max()) for p, g in trees.by_path(grads).items() if g.size}
    assert all(np.isfinite(list(sizes.values())))
    idle = {p for p, n in sizes.items() if n == 0}
    # The encoder of D2NWG's autoencoder does not serve to generate, and a graph has few of LoGAH's distances and sizes.
    assert all(p.startswith(("vae/params/inward", "encoder/")) for p in idle), idle


def test_weights_may_lie_on_several_devices(case, close, mesh):
    def spread(x):
        axis = next((i for i, n in enumerate(x.shape) if n and n % 8 == 0), None)
        spec = PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, "d")
        return jax.device_put(x, NamedSharding(mesh, spec))

    close(
        jax.jit(lambda w: model(case.hyper.apply(w, *case.condition), X))(jax.tree.map(spread, case.weights)),
        case.output,
        1e-4,
    )


def test_factored_weights_have_the_same_effect(case, close):
    if case.hyper.factored is None:
        pytest.skip("emits plain arrays alone")
    lazy = jax.jit(lambda w: lift(model, "refuse")(case.hyper.factored(w, *case.condition), X))
    close(lazy(case.weights), case.output, 1e-4)


def test_what_is_saved_is_loaded_by_the_same_hypernetwork_alone(case, tmp_path):
    folder = save_hypernetwork(tmp_path / "h", case.hyper, case.weights, note="kept")
    back = load_hypernetwork(folder, case.hyper)
    assert jax.tree.structure(back) == jax.tree.structure(case.weights)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(case.weights)):
        np.testing.assert_array_equal(a, b)
    other = case.hyper._replace(config={**case.hyper.config, "more": 1})
    with pytest.raises(TargetError, match="config"):
        load_hypernetwork(folder, other)
    with pytest.raises(TargetError, match="target"):
        load_hypernetwork(folder, case.hyper._replace(target={"w": jnp.ones(2)}))


def test_a_folder_that_is_not_whole_is_refused(case, tmp_path):
    with pytest.raises(TargetError, match="cannot be read"):
        load_hypernetwork(tmp_path / "nowhere", case.hyper)
    folder = save_hypernetwork(tmp_path / "h", case.hyper, case.weights)
    path = folder / "hypernetwork.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(TargetError, match="cannot be read"):
        load_hypernetwork(folder, case.hyper)
