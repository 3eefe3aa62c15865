"""The table of promises: every method in the registry, on one tiny encoder, against everything a method must do.

A new method enters by its registration; nothing here names one. `SPECIAL` is for arguments that a method cannot do
without on so small a model.
"""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxpeft
from jaxpeft import METHODS, MergeError, PatternError, trees
from jaxpeft.files import DeltaError, load_delta, save_delta
from jaxpeft.models import ImageClassifier, SequenceClassifier, VisionConfig, stack_layers
from jaxpeft.models.encoder import EncoderConfig
from jaxpeft.train.sweep_command import argument_of

pytestmark = pytest.mark.usefixtures("quick")
SPECIAL = {
    "scalearn": {"dropout": 0.0},  # its default drops scales
    "p_adapter": {"reduction": 2},  # divides the heads' width, which is 4
    # Rows of the embeddings that these inputs do not use have no gradient.
    "sparse": {"at": "**/layers*/**"},
    "sparse_fine_tuning": {"score": "magnitude", "at": "**/layers*/**"},
    "spt": {"score": "magnitude", "budget": 220},  # LoRA at the wide weights, entries of the others
}
MAY_BE_ZERO = {("dept", "rank")}
SMALL = {"rank": 2, "length": 3, "mlp": 5}  # instead of the defaults, where a method has such an argument
CONFIG = EncoderConfig(
    vocab=20, width=8, layers=2, heads=2, head_dim=4, mlp_width=16, max_positions=24, init_std=0.3, plain=True
)
IDS = np.random.default_rng(0).integers(2, 20, (8, 4)).astype(np.int32)
MASK = np.ones((8, 4), np.int32)
MASK[1, 2:] = 0
IMAGE = VisionConfig(
    width=8,
    layers=2,
    heads=2,
    head_dim=4,
    mlp_width=16,
    pre_norm=True,
    image=(8, 8),
    patch=(4, 4),
    channels=3,
    init_std=0.3,
    plain=True,
)
PIXELS = np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 3)).astype(np.float32)
# float32 and another order of sums, through two layers.
TOLERANCE = 1e-5


def made(name, **more):
    """The method `name` at a small size."""
    factory = METHODS[name].factory
    accepted = factory.__code__.co_varnames[: factory.__code__.co_argcount + factory.__code__.co_kwonlyargcount]
    small = {k: v for k, v in SMALL.items() if k in accepted}
    return factory(**{**small, **SPECIAL.get(name, {}), **{k: v for k, v in more.items() if k in accepted}})


def accepts(name, argument):
    factory = METHODS[name].factory
    return argument in factory.__code__.co_varnames[: factory.__code__.co_argcount + factory.__code__.co_kwonlyargcount]


def moved(delta, seed=1, by=0.2):
    """The learned leaves away from their start; the others as they are."""
    yes, no = trees.learned(delta)
    leaves, structure = jax.tree.flatten(yes)
    rng = np.random.default_rng(seed)
    new = [x + jnp.asarray(by * rng.normal(size=x.shape), x.dtype) for x in leaves]
    return trees.combine(structure.unflatten(new), no)


@functools.lru_cache
def base(name=""):
    """The tiny encoder and its inputs, or for methods that read pixels the tiny ViT."""
    image = name in METHODS and METHODS[name].reads == "images"
    model = ImageClassifier(IMAGE, 3) if image else SequenceClassifier(CONFIG, 3)
    inputs = (PIXELS,) if image else (IDS, MASK)
    params = jax.jit(model.init)(jax.random.key(0), *inputs)
    rng = np.random.default_rng(1)
    # Biases and norms start at zeros and ones: moved, so that a forgotten one shows.
    params = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), params)
    return model, params, inputs


class Case:
    """One method on the tiny encoder, and what several tests compare, computed by one program."""

    def __init__(self, name):
        self.name, self.entry, self.method = name, METHODS[name], made(name)
        model, self.params, self.inputs = base(name)
        self.model, self.apply_fn = model, model.apply
        self.adapted = jaxpeft.adapt(model.apply, self.method, on_dense="refuse")
        self.start = jax.jit(self.adapted.init)(jax.random.key(2), self.params, *self.inputs)
        self.delta = moved(self.start)

    def loss(self, delta, params, *inputs, **kwargs):
        return jnp.sum(jnp.sin(self.adapted.apply(params, delta, *(inputs or self.inputs), **kwargs)))

    def learned_loss(self, yes, no, params, *inputs, **kwargs):
        return self.loss(trees.combine(yes, no), params, *inputs, **kwargs)

    @functools.cached_property
    def step(self):
        """The training step's gradient: by the learned half alone."""
        self.traces = []

        def step(yes, no, params, *inputs):
            self.traces.append(1)
            return jax.value_and_grad(self.learned_loss)(yes, no, params, *inputs)

        return jax.jit(step)

    @functools.cached_property
    def reference(self):
        return self.step(*trees.learned(self.delta), self.params, *self.inputs)

    @functools.cached_property
    def outputs(self):
        params, adapted = self.params, self.adapted

        @jax.jit
        def run(start, delta):
            out = {
                "base": self.apply_fn(params, *self.inputs),
                "start": adapted.apply(params, start, *self.inputs),
                "jit": adapted.apply(params, delta, *self.inputs),
                "dropped": adapted.apply(params, delta, *self.inputs, dropout_key=jax.random.key(3)),
            }
            if self.entry.mergeable:
                out["merged"] = self.apply_fn(adapted.merge(params, delta), *self.inputs)
            return out

        return run(self.start, self.delta)


@pytest.fixture(scope="module", params=sorted(METHODS))
def case(request):
    return Case(request.param)


def test_it_starts_as_its_base_where_the_registry_says_so(case, close):
    if case.entry.exact_start:
        close(case.outputs["start"], case.outputs["base"])
    assert float(jnp.abs(case.outputs["jit"] - case.outputs["base"]).max()) > 1e-3, "a moved delta changes the answer"


def test_merged_weights_answer_as_the_adapted_model_or_merging_is_refused(case, close):
    if case.entry.mergeable:
        close(case.outputs["merged"], case.outputs["jit"])
        merged = jax.eval_shape(case.adapted.merge, case.params, case.delta)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), merged) == jax.tree.map(
            lambda x: (x.shape, x.dtype), case.params
        )
    else:
        assert case.method.merge is None
        with pytest.raises(MergeError, match="no merge"):
            case.adapted.merge(case.params, case.delta)


def test_on_a_base_in_half_precision_what_is_learned_is_float32_and_answers_and_merges_stay_half(case):
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), case.params)
    config = dataclasses.replace(case.model.config, dtype="bfloat16", param_dtype="bfloat16")
    adapted = jaxpeft.adapt(case.model.clone(config=config).apply, case.method, on_dense="refuse")
    delta = jax.eval_shape(adapted.init, jax.random.key(0), half, *case.inputs)
    assert {x.dtype for x in jax.tree.leaves(trees.learned(delta)[0])} == {jnp.dtype("float32")}
    assert jax.eval_shape(adapted.apply, half, delta, *case.inputs).dtype == jnp.bfloat16
    if case.entry.mergeable:
        assert {x.dtype for x in jax.tree.leaves(jax.eval_shape(adapted.merge, half, delta))} == {jnp.dtype("bfloat16")}


def test_every_learned_leaf_has_a_gradient_and_nothing_else_does(case):
    yes, no = trees.learned(case.delta)
    largest = dict.fromkeys(trees.by_path(yes), 0.0)
    # A narrow ReLU is dead for all tokens at some draws: a leaf is in use if it is felt at one of several.
    for seed in range(1, 6):
        _, grads = case.step(trees.learned(moved(case.start, seed))[0], no, case.params, *case.inputs)
        sizes = {p: float(jnp.abs(g).max()) for p, g in trees.by_path(grads).items()}
        assert sizes.keys() == largest.keys()
        assert all(np.isfinite(list(sizes.values())))
        largest = {p: max(size, sizes[p]) for p, size in largest.items()}
        if all(largest.values()):
            break
    unused = [p for p, size in largest.items() if size == 0]
    assert not unused, f"{unused} of {len(largest)} leaves are never used"


def test_without_jit_the_answer_is_the_same(case, close):
    with jax.disable_jit(False):
        close(case.adapted.apply(case.params, case.delta, *case.inputs), case.outputs["jit"])


def test_a_stack_of_deltas_is_vmapped(case, close):
    stacked = trees.stack([case.start, case.delta])
    got = jax.jit(jax.vmap(case.adapted.apply, (None, 0, *(None for _ in case.inputs))))(
        case.params, stacked, *case.inputs
    )
    close(got[0], case.outputs["start"])
    close(got[1], case.outputs["jit"])


def test_eight_devices_with_sharded_parameters_take_the_same_step(case, mesh, close):
    def spec(x):
        axis = next((i for i, n in enumerate(x.shape) if n % 8 == 0), None)
        return PartitionSpec(*["d" if i == axis else None for i in range(x.ndim)])

    params = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), case.params)
    replicated = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("d"))
    yes, no = jax.device_put(trees.learned(case.delta), replicated)
    loss, grads = jax.jit(case.step)(yes, no, params, *jax.device_put(case.inputs, rows))
    close((loss, grads), case.reference, atol=1e-4)


def test_the_second_step_compiles_nothing_and_keeps_dtypes(case):
    _, grads = case.reference
    yes, no = trees.learned(case.delta)
    traces = len(case.traces)
    new = jax.tree.map(lambda x, g: x - 0.1 * g, yes, grads)
    case.step(new, no, case.params, *case.inputs)
    assert len(case.traces) == traces
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), yes)


def test_abstract_initialisation_gives_the_real_shapes_without_computing(case):
    shapes = jax.eval_shape(case.adapted.init, jax.random.key(2), case.params, *case.inputs)
    assert jax.tree.structure(shapes) == jax.tree.structure(case.start)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), case.start)


def test_initialisation_is_a_function_of_its_key(case):
    init = jax.jit(case.adapted.init)
    again = init(jax.random.key(2), case.params, *case.inputs)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), again, case.start))


@pytest.mark.parametrize("layout", ["scan", "scan and remat"])
def test_scanned_and_recomputed_layers_give_the_same_answer_and_gradient(case, layout, close):
    config = dataclasses.replace(case.model.config, scan=True, remat="remat" in layout)
    model = case.model.clone(config=config)
    params = stack_layers(case.params)
    adapted = jaxpeft.adapt(model.apply, case.method, on_dense="refuse")
    shapes = jax.eval_shape(adapted.init, jax.random.key(2), params, *case.inputs)
    yes, no = trees.learned(restacked(case.delta, shapes))

    @jax.jit
    def run(yes):
        loss = lambda yes: jnp.sum(jnp.sin(adapted.apply(params, trees.combine(yes, no), *case.inputs)))
        return adapted.apply(params, trees.combine(yes, no), *case.inputs), jax.grad(loss)(yes)

    y, grads = run(yes)
    close(y, case.outputs["jit"])
    want, _ = trees.learned(restacked(trees.combine(case.reference[1], trees.learned(case.delta)[1]), shapes))
    close(grads, want, atol=1e-4)


def restacked(delta, shapes):
    """The delta of unrolled layers with the leaves of `layers_0`, `layers_1` ... stacked, in the form of `shapes`."""
    flat, want = trees.by_path(delta), trees.by_path(shapes)
    out = {}
    for path, shape in want.items():
        if path in flat:
            out[path] = flat[path]
            continue
        numbers = range(CONFIG.layers)
        parts = [unstacked_name(path, i) for i in numbers]
        found = [next(flat[p] for p in options if p in flat) for options in parts]
        out[path] = jnp.stack(found)
        assert out[path].shape == shape.shape
    leaves, structure = jax.tree.flatten(shapes)
    assert len(leaves) == len(out)
    return structure.unflatten([out[p] for p in want])


def unstacked_name(path, i):
    """What a scanned layer's leaf is called in layer i; IA3 writes the number of stacked axes into the name."""
    name = path.replace("/layers/", f"/layers_{i}/")
    return [name, name[:-1]] if name[-1] == "1" else [name]


def test_dropout_acts_where_there_is_a_key_and_a_rate(close):
    for name in sorted(n for n in METHODS if accepts(n, "dropout")):
        model, params, inputs = base(name)
        adapted = jaxpeft.adapt(model.apply, made(name, dropout=0.5), on_dense="refuse")
        delta = moved(jax.jit(adapted.init)(jax.random.key(2), params, *inputs))

        @jax.jit
        def run(delta, key, adapted=adapted, params=params, inputs=inputs):
            plain = adapted.apply(params, delta, *inputs)
            return plain, adapted.apply(params, delta, *inputs, dropout_key=key)

        plain, one = run(delta, jax.random.key(1))
        _, other = run(delta, jax.random.key(2))
        loss = lambda d: jnp.sum(jnp.sin(adapted.apply(params, d, *inputs, dropout_key=jax.random.key(1))))
        jax.eval_shape(jax.grad(loss, allow_int=True), delta)
        assert not np.allclose(plain, one), name
        assert not np.allclose(one, other), name


def test_a_key_without_a_rate_changes_nothing(case, close):
    close(case.outputs["dropped"], case.outputs["jit"])


def test_a_saved_delta_loads_as_it_was_with_its_method(case, tmp_path, close):
    save_delta(tmp_path / "d", case.delta, case.method, case.params, note="x")
    saved = load_delta(tmp_path / "d", case.params)
    assert jax.tree.structure(saved.delta) == jax.tree.structure(case.delta)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), saved.delta, case.delta))
    assert saved.extra == {"note": "x"}
    again = jaxpeft.adapt(case.apply_fn, saved.method, on_dense="refuse")
    close(jax.jit(again.apply)(case.params, saved.delta, *case.inputs), case.outputs["jit"])
    with pytest.raises(DeltaError, match="fingerprint"):
        load_delta(tmp_path / "d", {"other": jnp.ones(2)})


def test_its_configuration_makes_it_again(case):
    again = jaxpeft.from_config(case.method.config)
    assert again.config == case.method.config
    assert again.name == case.method.name
    shapes = jax.eval_shape(jaxpeft.adapt(case.apply_fn, again).init, jax.random.key(2), case.params, *case.inputs)
    assert jax.tree.structure(shapes) == jax.tree.structure(case.start)


@pytest.mark.parametrize("name", sorted(n for n in METHODS if accepts(n, "at")))
def test_a_pattern_that_matches_nothing_is_refused_with_near_misses(name):
    model, params, inputs = base(name)
    wrong = "**/layers_0/attention/querry/kernel" if METHODS[name].mechanism == "weights" else "**/attentionn"
    adapted = jaxpeft.adapt(model.apply, made(name, at=wrong))
    with pytest.raises(PatternError, match=r"matches no .*near misses: '.*attention"):
        jax.eval_shape(adapted.init, jax.random.key(0), params, *inputs)


@pytest.mark.parametrize("name", sorted(n for n in METHODS if accepts(n, "rank") or accepts(n, "length")))
def test_a_size_below_one_is_refused_before_any_model_is_seen(name):
    for argument in ("rank", "length"):
        if accepts(name, argument):
            for size in (-1,) if (name, argument) in MAY_BE_ZERO else (0, -1):
                with pytest.raises(ValueError, match=rf"{argument} {size}"):
                    made(name, **{argument: size})


def test_it_works_under_strict_promotion(case):
    with jax.numpy_dtype_promotion("strict"):
        shapes = jax.eval_shape(case.adapted.init, jax.random.key(2), case.params, *case.inputs)
        jax.eval_shape(
            jax.grad(lambda d: case.loss(d, case.params, dropout_key=jax.random.key(0)), allow_int=True), shapes
        )


def test_it_stands_in_a_chain_with_every_kind_of_neighbour(case):
    chained = jaxpeft.chain(jaxpeft.bitfit(name="biases"), case.method._replace(name="mine"))
    if case.entry.mechanism != "weights":  # a hook's parameters carry its name
        chained = jaxpeft.chain(jaxpeft.bitfit(name="biases"), case.method)
    adapted = jaxpeft.adapt(case.apply_fn, chained, on_dense="refuse")
    shapes = jax.eval_shape(adapted.init, jax.random.key(2), case.params, *case.inputs)
    assert len(shapes) == 2
    out = jax.eval_shape(adapted.apply, case.params, shapes, *case.inputs)
    assert out.shape == (8, 3)


@pytest.mark.parametrize(
    "pair", [("ia3", "bitfit"), ("full", "lora"), ("lora", "full"), ("ia3", "dora"), ("ia3", "lora")]
)
def test_a_chain_merges_in_the_order_in_which_it_is_applied(pair):
    model, params, inputs = base()
    adapted = jaxpeft.adapt(model.apply, jaxpeft.chain(*(made(name) for name in pair)))
    delta = moved(jax.jit(adapted.init)(jax.random.key(2), params, *inputs))
    want = adapted.apply(params, delta, *inputs)
    np.testing.assert_allclose(model.apply(adapted.merge(params, delta), *inputs), want, atol=TOLERANCE)


@pytest.mark.parametrize("axis", ["alpha", "dropout"])
def test_numbers_that_the_sweep_command_sets_may_be_traced(axis):
    named = {name: argument for name in sorted(METHODS) if (argument := argument_of(name, axis))}
    assert named.keys() >= {"alpha": {"lora", "dora", "mos", "mam"}, "dropout": {"lora", "dora", "mos"}}[axis]
    for name, argument in named.items():
        model, params, inputs = base(name)

        def step(value, name=name, argument=argument, model=model, params=params, inputs=inputs):
            adapted = jaxpeft.adapt(model.apply, made(name, **{argument: value}), on_dense="refuse")
            return adapted.apply(
                params, adapted.init(jax.random.key(0), params, *inputs), *inputs, dropout_key=jax.random.key(1)
            )

        jax.eval_shape(step, jnp.float32(0.5))


def test_the_registry_is_told_the_truth():
    assert METHODS
    for name, entry in METHODS.items():
        method = made(name)
        assert (method.merge is not None) == entry.mergeable, name
        assert entry.mechanism in ("weights", "hooks", "reader", "inputs", "chain"), name
        assert entry.paper, name
        assert 0 < entry.rate < 1, name
        room = importlib.import_module(f"jaxpeft.{entry.family}")  # `jaxpeft.adapt`, the name, is the function
        assert getattr(room, name) is entry.factory, name


def test_an_unknown_method_is_refused_with_near_names():
    with pytest.raises(ValueError, match=r"unknown method 'loraa'; did you mean 'lora'.*there are: "):
        jaxpeft.from_config({"method": "loraa"})
