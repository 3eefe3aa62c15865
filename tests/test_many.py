"""Many adapters over one base: every method of the registry, each example with its own delta, in one program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from test_promises import CONFIG, IDS, MASK, made, moved

import jaxpeft
from jaxpeft import METHODS, SlotError, trees
from jaxpeft.hoist import over_rows
from jaxpeft.models import SequenceClassifier, stack_layers

pytestmark = pytest.mark.usefixtures("quick")
SLOTS = 3
WHICH = np.array([0, 2, -1, 0, 1, 2, 2, -1], np.int32)  # slot 1 stays empty
ALIKE = {"sublayer", "scaled_parallel", "head", "full"}  # as `parallel` and `bitfit`
KINDS = sorted(n for n in set(METHODS) - ALIKE if METHODS[n].reads == "anything")
SMALLER = {"sherl": {"late": 0}}  # of one layer, none is left below a late one
PADDABLE = ["lora", "dora", "houlsby", "parallel"]


@functools.lru_cache
def encoder(**fields):
    """One layer: there are many programs here."""
    model = SequenceClassifier(dataclasses.replace(CONFIG, layers=1, **fields), 3)
    params = jax.jit(model.init)(jax.random.key(0), IDS, MASK)
    return model, moved(params, 1, 0.1)


def drawn(delta, seed):
    """A delta of these shapes with random learned leaves, far from any start."""
    rng = np.random.default_rng(seed)
    yes, no = trees.learned(delta)
    return trees.combine(jax.tree.map(lambda x: rng.normal(0.3, 0.3, x.shape).astype(x.dtype), yes), no)


class Case:
    """A method with two deltas in three slots, and its programs."""

    def __init__(self, name):
        self.name, self.traces = name, []
        model, self.params = encoder()
        self.model = model
        self.adapted = jaxpeft.adapt(model.apply, made(name, **SMALLER.get(name, {})), on_dense="refuse")
        self.many = jaxpeft.many(self.adapted, SLOTS)
        self.shapes = jax.eval_shape(self.adapted.init, jax.random.key(2), self.params, IDS, MASK)
        start = self.shapes
        if len(jax.tree.leaves(trees.learned(start)[0])) < len(jax.tree.leaves(start)):  # indices are not to be drawn
            start = jax.jit(self.adapted.init)(jax.random.key(2), self.params, IDS, MASK)
        self.deltas = {0: drawn(start, 1), 2: drawn(start, 2)}

        @jax.jit
        def insert(*args):
            self.traces.append("insert")
            return self.many.insert(*args)

        self.insert, self.remove = insert, jax.jit(self.many.remove)
        held = self.many.empty(self.shapes)
        for slot, delta in self.deltas.items():
            held = self.insert(held, slot, delta)
        self.held = held

        @jax.jit
        def mixed(held, which, ids, mask):
            self.traces.append("mixed")
            return self.many.apply(self.params, held, which, ids, mask)

        self.mixed = mixed

    @functools.cached_property
    def answers(self):
        """Of each slot on all examples: its delta's, or the base's."""

        @jax.jit
        def run(deltas):
            alone = jax.vmap(lambda delta: self.adapted.apply(self.params, delta, IDS, MASK))(deltas)
            return self.model.apply(self.params, IDS, MASK), alone

        plain, alone = run(jax.tree.map(lambda *x: np.stack(x), *self.deltas.values()))
        return {-1: np.asarray(plain), 1: np.asarray(plain), **dict(zip(self.deltas, np.asarray(alone)))}

    def want(self, which):
        return np.stack([self.answers[int(i)][row] for row, i in enumerate(which)])


one_of_each = functools.lru_cache(Case)


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    return one_of_each(request.param)


def test_a_mixed_batch_is_each_example_alone_with_its_delta(case, close):
    close(case.mixed(case.held, WHICH, IDS, MASK), case.want(WHICH))
    everyone = np.array([0, 2] * 4, np.int32)
    close(case.mixed(case.held, everyone, IDS, MASK), case.want(everyone))


def test_inserting_replacing_and_removing_compile_nothing(case, close):
    case.mixed(case.held, WHICH, IDS, MASK)
    programs = list(case.traces)
    held = case.insert(case.held, 1, case.deltas[0])
    close(case.mixed(held, np.ones(8, np.int32), IDS, MASK), case.answers[0])
    held = case.remove(case.insert(held, 1, case.deltas[2]), 0)
    moved_on = np.array([1, 0] * 4, np.int32)
    want = np.stack([case.answers[2 if i else -1][row] for row, i in enumerate(moved_on)])
    close(case.mixed(held, moved_on, IDS, MASK), want)
    assert case.traces == programs
    assert not any(np.any(x[0] != x[-1]) for x in jax.tree.leaves(held.delta)), "a removed delta leaves nothing behind"


def test_slots_and_ids_permuted_together_change_nothing(close):
    @given(st.permutations(range(SLOTS)), st.lists(st.integers(-1, SLOTS - 1), min_size=8, max_size=8))
    def law(order, which):
        case = one_of_each("lora")
        held = case.many.empty(case.shapes)
        for slot, delta in case.deltas.items():
            held = case.insert(held, order[slot], delta)
        ids = np.array([-1 if i < 0 else order[i] for i in which], np.int32)
        close(case.mixed(held, ids, IDS, MASK), case.mixed(case.held, np.array(which, np.int32), IDS, MASK), 1e-6)

    law()


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "pfeiffer", "prefix_tuning"])
def test_gradients_flow_to_the_slots_in_use_alone(name):
    case = one_of_each(name)
    yes, no = trees.learned(case.held.delta)
    which = np.array([0, -1] * 4, np.int32)

    def loss(yes):
        held = jaxpeft.Slots(trees.combine(yes, no), case.held.used)
        return jnp.sum(jnp.sin(case.many.apply(case.params, held, which, IDS, MASK)))

    leaves = jax.tree.leaves(jax.jit(jax.grad(loss))(yes))
    assert all(np.isfinite(g).all() for g in leaves)
    assert any(np.abs(g[0]).max() > 0 for g in leaves)
    assert all(np.abs(g[1:SLOTS]).max() == 0 for g in leaves)


@pytest.mark.parametrize("name", ["lora", "dora", "prefix_tuning"])
def test_eight_devices_each_with_its_examples_answer_the_same(name, mesh, close):
    case = one_of_each(name)
    spec = PartitionSpec("d")
    inputs = jax.device_put((WHICH, IDS, MASK), NamedSharding(mesh, spec))
    close(case.mixed(case.held, *inputs), case.want(WHICH))
    inside = jax.shard_map(
        functools.partial(case.many.apply, case.params),
        mesh=mesh,
        in_specs=(PartitionSpec(), spec, spec, spec),
        out_specs=spec,
    )
    close(jax.jit(inside)(case.held, *inputs), case.want(WHICH))


@pytest.mark.parametrize("name", PADDABLE)
def test_a_smaller_rank_in_larger_slots_has_the_same_effect(name, close):
    model, params = encoder()
    small, large = made(name), made(name, rank=4)
    if name in ("lora", "dora"):  # another alpha and another kind of scale
        small = METHODS[name].factory(rank=3, alpha=5, scaling="rslora")
    adapted = jaxpeft.adapt(model.apply, small)
    delta = drawn(jax.eval_shape(adapted.init, jax.random.key(2), params, IDS, MASK), 1)
    serving = jaxpeft.many(jaxpeft.adapt(model.apply, large), 2)
    held = serving.empty(jax.eval_shape(jaxpeft.adapt(model.apply, large).init, jax.random.key(2), params, IDS, MASK))
    held = serving.insert(held, 1, delta, small)
    got = jax.jit(serving.apply)(params, held, np.ones(8, np.int32), IDS, MASK)
    close(got, jax.jit(adapted.apply)(params, delta, IDS, MASK))
    with pytest.raises(SlotError, match="only a smaller rank"):
        jax.eval_shape(jaxpeft.many(adapted, 2).insert, jaxpeft.many(adapted, 2).empty(delta), 0, trees_row(held))


def trees_row(held):
    return jax.tree.map(lambda x: x[0], held.delta)


def test_a_chain_is_fitted_part_by_part(close):
    model, params = encoder()
    chains = [jaxpeft.chain(jaxpeft.bitfit(), jaxpeft.lora(rank=r, alpha=4)) for r in (2, 4)]
    small, large = (jaxpeft.adapt(model.apply, c) for c in chains)
    delta = drawn(jax.eval_shape(small.init, jax.random.key(2), params, IDS, MASK), 1)
    serving = jaxpeft.many(large, 2)
    held = serving.empty(jax.eval_shape(large.init, jax.random.key(2), params, IDS, MASK))
    held = serving.insert(held, 0, delta, chains[0])
    got = jax.jit(serving.apply)(params, held, np.array([0, -1] * 4, np.int32), IDS, MASK)
    close(got[::2], jax.jit(small.apply)(params, delta, IDS, MASK)[::2])
    close(got[1::2], jax.jit(model.apply)(params, IDS, MASK)[1::2])


def test_scanned_layers_serve_as_unrolled_ones_do(close):
    case = one_of_each("lora")
    model, params = encoder(scan=True)[0], stack_layers(case.params)
    adapted = jaxpeft.adapt(model.apply, made("lora"), on_dense="refuse")
    shapes = jax.eval_shape(adapted.init, jax.random.key(2), params, IDS, MASK)
    serving = jaxpeft.many(adapted, SLOTS)
    held = serving.empty(shapes)
    for slot, delta in case.deltas.items():
        stacked = {p.replace("layers_0", "layers"): {n: x[None] for n, x in d.items()} for p, d in delta.items()}
        held = serving.insert(held, slot, stacked)
    close(jax.jit(serving.apply)(params, held, WHICH, IDS, MASK), case.want(WHICH))


def test_dropout_draws_for_each_example():
    model, params = encoder()
    adapted = jaxpeft.adapt(model.apply, made("lora", dropout=0.5))
    serving = jaxpeft.many(adapted, 1)
    delta = drawn(jax.eval_shape(adapted.init, jax.random.key(2), params, IDS, MASK), 1)
    held = serving.insert(serving.empty(delta), 0, delta)
    same = jnp.broadcast_to(IDS[:1], IDS.shape)
    apply = jax.jit(lambda key: serving.apply(params, held, np.zeros(8, np.int32), same, None, dropout_key=key))
    y = apply(jax.random.key(0))
    assert len(np.unique(np.round(y[:, 0], 5))) == 8


def test_what_depends_on_a_delta_alone_is_computed_once_a_slot():
    """DoRA's column norms: by the count of the compiler, more examples cost what LoRA's do."""

    model, params = encoder()

    def grown(function):
        """Operations that 32 more examples take."""
        flops = [function(rows).compile().cost_analysis()["flops"] for rows in (32, 64)]
        return flops[1] - flops[0]

    def ids(rows):
        return np.ones((rows, 4), np.int32), np.ones((rows, 4), np.int32)

    def mixed(name):
        case = Case(name)
        run = jax.jit(lambda held, which, *x: case.many.apply(params, held, which, *x))
        return grown(lambda rows: run.lower(case.held, np.zeros(rows, np.int32), *ids(rows)))

    base = grown(lambda rows: jax.jit(model.apply).lower(params, *ids(rows)))  # which DoRA may have to run as well
    norms = 32 * 2 * (2 * 8 * 8 * 2)  # what a^T w alone would add at query and value, once an example
    assert mixed("dora") - mixed("lora") - base < norms / 2


def test_a_function_over_rows_is_the_loop_over_them(close):
    shared = jnp.arange(4.0)

    def f(tree, x, y):
        made = jnp.tanh(tree["a"] * 2) @ jnp.outer(shared, shared)
        return {"x": x @ made, "same": made, "wide": jnp.broadcast_to(tree["b"], (5,)) + y, "one": shared.sum()}

    @settings(max_examples=4)
    @given(st.integers(1, 5), st.lists(st.integers(0, 20), min_size=1, max_size=6))
    def law(n, which):
        rng = np.random.default_rng(n)
        stacked = {"a": jnp.asarray(rng.normal(size=(n, 4)), jnp.float32), "b": jnp.arange(n) * 1.0}
        which = jnp.array(which) % n
        rows = jnp.asarray(rng.normal(size=(len(which), 4, 1)), jnp.float32)[..., 0], jnp.arange(len(which)) * 1.0
        got = over_rows(lambda t, x, y: f(t, x[None], y), stacked, which, rows)
        pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
        close(got, trees.stack([f(pick(stacked, w), rows[0][i][None], rows[1][i]) for i, w in enumerate(which)]))

    law()


def test_what_does_not_fit_is_refused_with_its_value_and_the_remedy():
    case = one_of_each("lora")
    held, insert, apply = case.held, case.many.insert, functools.partial(case.many.apply, case.params)
    with pytest.raises(ValueError, match="0 slots"):
        jaxpeft.many(case.adapted, 0)
    for change in (case.many.remove, lambda h, s: insert(h, s, case.deltas[0])):
        for slot in (-1, SLOTS):
            with pytest.raises(SlotError, match=rf"slot {slot}: there are slots 0 to 2"):
                change(held, slot)
    with pytest.raises(SlotError, match=r"ids \[3, -2\].*-1 for the base"):
        apply(held, np.array([0, 3, -2, 0, 0, 0, 0, 0]), IDS, MASK)
    with pytest.raises(ValueError, match="one integer an example"):
        apply(held, np.zeros(8), IDS, MASK)
    with pytest.raises(ValueError, match=r"input 1 has shape \(7, 4\), for 8 ids.*by keyword"):
        apply(held, WHICH, IDS, MASK[:7])
    path = next(iter(case.deltas[0]))
    with pytest.raises(SlotError, match=r"lacks .*attention"):
        insert(held, 0, {p: d for p, d in case.deltas[0].items() if p != path})
    with pytest.raises(SlotError, match=r"float16, in the slots float32"):
        insert(held, 0, jax.tree.map(lambda x: x.astype(jnp.float16), case.deltas[0]))
    with pytest.raises(SlotError, match="a delta of dora for slots of lora"):
        insert(held, 0, case.deltas[0], jaxpeft.dora(rank=2))
    short = Case("prefix_tuning")
    cut = jax.tree.map(lambda x: x[:2] if x.ndim > 1 else x, short.deltas[0])
    with pytest.raises(SlotError, match="only a smaller rank"):
        short.many.insert(short.held, 0, cut)


def test_a_traced_slot_or_id_out_of_range_changes_nothing_and_is_the_base(close):
    case = one_of_each("lora")
    for slot in (-1, SLOTS, SLOTS + 1):
        close(case.insert(case.held, slot_array(slot), case.deltas[0]), case.held, 0)
    close(case.mixed(case.held, np.full(8, SLOTS + 4, np.int32), IDS, MASK), case.answers[-1])


def slot_array(slot):
    return jnp.asarray(slot, jnp.int32)
