"""A sweep trains each setting as it would train alone: whatever the others are, in chunks, on a mesh, under halving."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

import jaxpeft
from jaxpeft import train, trees
from jaxpeft.train.chunks import chunk_size
from jaxpeft.train.run import Config, ConfigError
from jaxpeft.train.sweep_command import settings_of

pytestmark = pytest.mark.usefixtures("quick")
STEPS = 4


class Batch(NamedTuple):
    x: np.ndarray
    label: np.ndarray
    weight: np.ndarray


def batch_of(seed, rows=8):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 6)).astype(np.float32)
    return Batch(x, (x.sum(1) > 0).astype(np.int32), np.ones(rows, np.float32))


BATCHES = [batch_of(i) for i in range(STEPS)]
HELD_OUT = [batch_of(100), batch_of(101)]
PARAMS = {
    name: jnp.asarray(np.random.default_rng(7).normal(size=shape), jnp.float32)
    for name, shape in {"in": (6, 16), "out": (16, 2)}.items()
}
TASK = train.Task(
    lambda apply, batch, key: apply(batch.x, dropout_key=key),
    lambda logits, batch: train.cross_entropy(logits, batch.label),
)
FIELDS = ("rate", "alpha", "rank", "dropout", "decay", "seed")


def settings(count, seed=0):
    """Settings that differ in everything that may differ."""
    rng = np.random.default_rng(seed)
    columns = dict(
        rate=rng.uniform(1e-3, 0.1, count).astype(np.float32),
        alpha=rng.uniform(1, 8, count).astype(np.float32),
        rank=rng.integers(1, 4, count).astype(np.int32),
        dropout=rng.choice([0.0, 0.1, 0.5], count).astype(np.float32),
        decay=rng.uniform(0, 0.5, count).astype(np.float32),
        seed=np.arange(count, dtype=np.int32),
    )
    return {name: columns[name] for name in FIELDS}


def make(s):
    method = jaxpeft.lora(rank=3, alpha=s["alpha"], dropout=s["dropout"], at="in")
    adapted = jaxpeft.adapt(
        lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"], jaxpeft.with_rank(method, s["rank"])
    )
    return train.run_of(adapted, optax.adamw(s["rate"], weight_decay=s["decay"]), TASK, BATCHES[0].x, seed=s["seed"])


def sweep(chosen, **options):
    options = dict(steps=STEPS, validation=HELD_OUT) | options
    return train.sweep(make, chosen, PARAMS, options.pop("batches", BATCHES), **options)


def pick(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


def rows_close(a, b, close, order=slice(None)):
    """Two sweeps agree, the second one's settings read in `order`."""
    close(a.states, pick(b.states, order))
    for name in a.history:
        np.testing.assert_allclose(a.history[name], b.history[name][:, order], atol=1e-5, rtol=1e-5)
    scores = np.array([r.score for r in b.results])[order]
    np.testing.assert_allclose([r.score for r in a.results], scores, atol=1e-5)


@pytest.fixture(scope="module")
def ten():
    """Ten settings side by side: what the other ways to train them are compared with."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield sweep(settings(10), chunk=10)
    jax.config.update("jax_disable_most_optimizations", before)


def test_each_run_equals_the_same_run_alone(ten, close):
    chosen = settings(10)

    @jax.jit
    def start(s):
        return make(s).init(PARAMS)

    @jax.jit
    def step(s, state, batch):
        return make(s).step(state, PARAMS, batch)

    for i in range(10):
        one = pick(chosen, i)
        state = start(one)
        for t, batch in enumerate(BATCHES):
            state, metrics = step(one, state, batch)
            np.testing.assert_allclose(metrics["loss"], ten.history["loss"][t, i], atol=1e-5)
        close(state, ten.state(i))


def test_numbers_of_the_program_are_the_numbers_of_a_script(ten, close):
    """Setting 3 with Python's numbers, rank and dropout static where they can be."""
    one = {name: x[3].item() for name, x in settings(10).items()}
    run = make(one)
    state = run.init(PARAMS)
    method = jaxpeft.with_rank(jaxpeft.lora(rank=3, at="in"), one["rank"])
    start = jaxpeft.adapt(lambda params, x: x @ params["in"], method).init(
        jax.random.key(one["seed"]), PARAMS, BATCHES[0].x
    )
    close(state.delta, start)
    for batch in BATCHES:
        state, _ = jax.jit(run.step)(state, PARAMS, batch)
    close(state.learned, ten.state(3).learned)
    means = [run.evaluate(state, PARAMS, batch) for batch in HELD_OUT]
    loss = sum(m["loss"] for m in means) / sum(m["weight"] for m in means)
    assert ten.results[3].score == pytest.approx(-float(loss), abs=1e-5)
    assert ten.results[3].means["accuracy"] == pytest.approx(np.mean([m["accuracy"] / 8 for m in means]), abs=1e-6)


RUNS = train.side_by_side(make)


@jax.jit
def three_steps(chosen):
    population = RUNS.init(chosen, PARAMS)
    for batch in BATCHES[:3]:
        population, metrics = RUNS.step(population, PARAMS, batch)
    return population, metrics


@given(st.permutations(range(5)))
def test_permuted_settings_give_permuted_results(order):
    chosen = settings(5)
    whole, permuted = three_steps(chosen), three_steps(pick(chosen, np.array(order)))
    for a, b in zip(jax.tree.leaves(pick(whole, np.array(order))), jax.tree.leaves(permuted)):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_arguments_grow_by_a_delta_and_its_optimiser_state_alone():
    step = jax.jit(RUNS.step)

    def arguments(count):
        population = jax.eval_shape(RUNS.init, settings(count), PARAMS)
        one = trees.nbytes(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), population))
        return step.lower(population, PARAMS, BATCHES[0]).compile().memory_analysis().argument_size_in_bytes, one

    (two, one), (seven, _) = arguments(2), arguments(7)
    assert seven - two == 5 * one
    # Nothing but AdamW's two moments, the delta, the numbers: no copy of the base or of the batch per run.
    delta = trees.nbytes(jax.eval_shape(make(pick(settings(1), 0)).init, PARAMS).learned)
    assert one - 3 * delta < 100


def test_one_program_trains_all_steps_and_settings(ten, counted):
    assert (ten.chunk, ten.programs) == (10, 1)
    assert sorted((r.score for r in ten.results), reverse=True) == [ten.results[i].score for i in ten.order]
    assert ten.compile_seconds > 0
    once = counted(RUNS.step)
    step = jax.jit(once, donate_argnums=0)
    for chosen in (settings(4), settings(4, seed=1)):
        population = jax.jit(RUNS.init)(chosen, PARAMS)
        for batch in BATCHES[:2]:
            population, _ = step(population, PARAMS, batch)
    assert len(once.traces) == 1


def test_the_chunk_found_from_memory_fits_and_changes_no_number(close):
    long = dict(batches=[batch_of(i, rows=200) for i in range(2)], steps=2)  # activations take more than states
    whole = sweep(settings(10), chunk=10, **long)
    limit = whole.peak_bytes * 7 // 10
    limited = sweep(settings(10), memory_limit=limit, **long)
    assert 1 < limited.chunk < 10
    assert limited.programs <= 4, "all, one, and the size that fits, at the second try at most"
    assert limited.peak_bytes <= limit
    rows_close(limited, whole, close)


def test_a_chunk_that_does_not_divide_the_runs_is_filled_up(ten, close):
    assert ten.chunk == 10
    rows_close(sweep(settings(10), chunk=4), ten, close)


def test_alone_the_functions_want_runs_that_divide():
    runs = train.side_by_side(make, chunk=4)
    with pytest.raises(ValueError, match="10 runs do not divide into chunks of 4"):
        jax.eval_shape(runs.init, settings(10), PARAMS)


def test_one_run_at_a_time_that_does_not_fit_is_refused():
    with pytest.raises(train.MemoryLimitError, match=r"one run at a time needs [\d,]+ bytes.*; the limit is 100"):
        sweep(settings(2), memory_limit=100)


@pytest.mark.parametrize("devices", [8, 3])
def test_runs_divided_over_a_mesh_give_the_same_numbers(ten, devices, close):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("run",))
    divided = sweep(settings(10), mesh=mesh, chunk=2 * devices)
    assert divided.chunk == 2 * devices
    assert divided.peak_bytes < ten.peak_bytes
    rows_close(divided, ten, close)


def test_devices_do_not_talk_to_each_other():
    mesh = Mesh(np.array(jax.devices()[:4]), ("run",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("run"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.eval_shape(RUNS.init, settings(8), PARAMS)
    put = lambda tree, to: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), tree)
    runs = train.side_by_side(make, chunk=4, axis="run")
    program = jax.jit(runs.step, out_shardings=where).lower(
        put(shapes, where), put(PARAMS, everywhere), put(BATCHES[0], everywhere)
    )
    text = program.compile().as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "collective-permute", "all-to-all"))


def test_survivors_of_halving_are_what_they_would_be_without_it(ten, close):
    halved = sweep(settings(10), halve_at=(1, 3), keep=0.5, chunk=10)
    steps = [r.steps for r in halved.results]
    assert sorted(steps) == [1] * 5 + [3] * 2 + [4] * 3
    finished = [i for i, n in enumerate(steps) if n == STEPS]
    close(pick(halved.states, np.array(finished)), pick(ten.states, np.array(finished)))
    for i, r in enumerate(halved.results):
        assert r.ended == ("finished" if r.steps == STEPS else "halved")
        np.testing.assert_allclose(halved.history["loss"][: r.steps, i], ten.history["loss"][: r.steps, i], atol=1e-5)
        assert np.isnan(halved.history["loss"][r.steps :, i]).all()
    assert halved.programs == 3, "ten runs, five, three"
    # Those that went on were the best at that time.
    scores = [r.score for r in sweep(settings(10), steps=1, chunk=10).results]
    assert min(x for x, n in zip(scores, steps) if n > 1) > max(x for x, n in zip(scores, steps) if n == 1)
    assert set(halved.order[:3].tolist()) == set(finished)


def test_a_run_that_diverges_touches_no_other_and_comes_last(ten, close):
    broken = settings(10)
    broken["rate"] = np.where(np.arange(10) == 4, np.float32(np.inf), broken["rate"])
    found = sweep(broken)
    others = np.array([i for i in range(10) if i != 4])
    close(pick(found.states, others), pick(ten.states, others))
    assert [r.first_bad for r in found.results] == [1 if i == 4 else -1 for i in range(10)]
    assert found.results[4].ended == "not finite"
    assert found.order[-1] == 4


def minimise(setting):
    """w (64,) minimises (w - batch)²; the state holds a typed key."""

    def init(params):
        return {"w": jnp.zeros(64), "key": jax.random.key(setting["seed"])}

    def step(state, params, batch):
        key, now = jax.random.split(state["key"])
        w = state["w"] - setting["rate"] * (state["w"] - batch + 0.01 * jax.random.normal(now))
        return {"w": w, "key": key}, {"loss": jnp.square(w - batch).mean()}

    def evaluate(state, params, batch):
        return {"weight": jnp.ones(()), "loss": jnp.square(state["w"] - batch).mean()}

    return train.Run(init, step, evaluate)


def test_any_init_and_step_can_be_swept_and_states_may_hold_keys():
    three = [jnp.array(3.0)] * 8
    chosen = train.grid(rate=[0.05, 0.5], seed=range(3))
    plain = jaxpeft.sweep(minimise, chosen, None, three, steps=8, validation=three[:1])
    assert np.abs(plain.states["w"][3:] - 3).max() < 0.1 < np.abs(plain.states["w"][:3] - 3).min()
    halved = jaxpeft.sweep(minimise, chosen, None, three, steps=8, validation=three[:1], halve_at=(2, 4))
    assert [r.steps for r in halved.results][:3] == [2, 2, 2]
    best = halved.order[0]
    np.testing.assert_allclose(halved.states["w"][best], plain.states["w"][best], atol=1e-6)
    same = jax.random.key_data(halved.states["key"][best]) == jax.random.key_data(plain.states["key"][best])
    assert same.all()


def test_halving_takes_chunks_and_diverged_runs_first():
    three = [jnp.array(3.0)] * 6
    chosen = train.grid(rate=[0.1, np.inf, 0.2, 0.3, 0.4], seed=range(2))
    go = lambda **options: train.sweep(
        minimise, chosen, None, three, steps=6, validation=three[:1], halve_at=(2,), keep=0.8, **options
    )
    whole = go()
    assert [r.steps for r in whole.results] == [6, 6, 2, 2, 6, 6, 6, 6, 6, 6]
    assert {r.ended for r in whole.results[2:4]} == {"not finite"}
    chunked = go(chunk=4)
    assert [r[1:4] for r in chunked.results] == [r[1:4] for r in whole.results]
    np.testing.assert_allclose(chunked.states["w"], whole.states["w"], atol=1e-6)
    np.testing.assert_allclose(chunked.history["loss"], whole.history["loss"], atol=1e-5)


def test_batches_are_read_once_and_progress_is_told_of_each(ten, close):
    told = []
    found = sweep(
        settings(10),
        batches=itertools.chain(BATCHES),
        halve_at=(2,),
        chunk=10,
        progress=lambda step, of, numbers: told.append((step, of, numbers["loss"].shape)),
    )
    assert told == [(1, 4, (10,)), (2, 4, (10,)), (3, 4, (5,)), (4, 4, (5,))]
    best = found.order[0]
    close(found.state(best), ten.state(best))


def test_a_grid_is_all_combinations_in_order():
    found = train.grid(rate=[0.1, 0.2], seed=range(3))
    assert found["seed"].tolist() == [0, 1, 2, 0, 1, 2]
    np.testing.assert_allclose(found["rate"], [0.1] * 3 + [0.2] * 3)
    assert (found["rate"].dtype, found["seed"].dtype) == (np.float32, np.int32)
    with pytest.raises(train.SweepError, match="no values of 'seed'"):
        train.grid(rate=[0.1], seed=[])
    with pytest.raises(train.SweepError, match="a grid of no settings"):
        train.grid()


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"rank": np.array([1, 9])}, {}, "setting 1, .*rank=9.*: rank 9: expected 1 to 3"),
        ({"dropout": np.array([0.1, 1.5])}, {}, "setting 1, .*dropout=1.5.*expected a probability"),
        ({"rate": np.array([0.1])}, {}, "settings disagree on their number: .*'rate': 1"),
        ({"rate": 0.1}, {}, "arrays with a leading axis"),
        (dict.fromkeys(FIELDS, np.zeros(0)), {}, "every array of them is empty"),
        ({}, {"halve_at": (2, 2)}, r"halve_at=\(2, 2\): expected increasing steps"),
        ({}, {"halve_at": (STEPS,)}, r"between 1 and steps=4"),
        ({}, {"halve_at": (2,), "keep": 1.0}, "keep=1.0: expected a share"),
        ({}, {"halve_at": (2,), "validation": ()}, "give validation batches"),
        ({}, {"steps": 0}, "steps=0: expected one"),
        ({}, {"batches": []}, "nothing to train on"),
        ({}, {"mesh": Mesh(np.array(jax.devices()[:2]), ("d",))}, "an axis named 'run'"),
    ],
)
def test_what_cannot_work_is_said_before_anything_compiles(change, options, words, monkeypatch):
    monkeypatch.setattr(train.Compiled, "program", lambda *_: pytest.fail("a program was compiled"))
    with pytest.raises(train.SweepError, match=words):
        sweep(settings(2) | change, **options)


def test_runs_that_cannot_be_scored_are_refused():
    three = [jnp.array(3.0)]
    chosen = train.grid(rate=[0.1], seed=[0])
    go = lambda change: train.sweep(
        lambda s: minimise(s)._replace(evaluate=change), chosen, None, three, steps=1, validation=three
    )
    with pytest.raises(train.SweepError, match="no `evaluate`"):
        go(None)
    with pytest.raises(train.SweepError, match=r"gives \['loss'\]; it lacks 'weight'"):
        go(lambda state, params, batch: {"loss": state["w"]})
    with pytest.raises(train.SweepError, match=r"`score` asks for 'acc'; `Run.evaluate` gives \['loss', 'weight'\]"):
        train.sweep(minimise, chosen, None, three, steps=1, validation=three, score=lambda m: m["acc"])
    table = lambda state, params, batch: {"hits": jnp.full((2, 2), state["w"][0]), "weight": jnp.ones(())}
    scored = lambda s: minimise(s)._replace(evaluate=table)
    result = train.sweep(
        scored, chosen, None, three, steps=1, validation=three, score=lambda m: float(m["hits"][0, 1].item())
    )
    assert result.results[0].score == result.results[0].means["hits"][0, 1], "what is summed may have axes of its own"
    population = jax.eval_shape(train.side_by_side(minimise).init, chosen, None)
    with pytest.raises(ValueError, match="no `evaluate`"):
        jax.eval_shape(
            train.side_by_side(lambda s: minimise(s)._replace(evaluate=None)).evaluate, population, None, three[0]
        )


def test_too_few_batches_are_an_error():
    with pytest.raises(train.SweepError, match="the batches end after 2 of 4 steps"):
        sweep(settings(2), batches=BATCHES[:2])


@given(st.integers(1, 60), st.integers(1, 1000), st.integers(1, 200), st.integers(0, 20_000))
def test_chunks_are_as_few_as_fit_and_found_in_three_compiles_where_memory_is_affine(count, shared, each, limit):
    tried = []

    def bytes_of(size):
        tried.append(size)
        return shared + each * size

    fits = [n for n in range(1, count + 1) if shared + each * n <= limit]
    if not fits:
        with pytest.raises(train.MemoryLimitError):
            chunk_size(count, limit, bytes_of)
        return
    size = chunk_size(count, limit, bytes_of)
    assert size in tried
    assert size in fits
    assert -(-count // size) == -(-count // max(fits))
    assert len(tried) <= 3


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 600))
def test_a_chunk_fits_whatever_the_memorys_shape(increments, limit):
    memory = np.cumsum([1, *increments])
    if memory[1] > limit:
        return
    size = chunk_size(len(increments), limit, lambda n: int(memory[n]))
    assert memory[size] <= limit


def test_the_commands_axes_are_what_the_method_has():
    axes = {"rate": [0.1], "alpha": [1.0, 2.0], "rank": [], "dropout": [], "weight_decay": [], "seed": [0]}
    assert list(settings_of(Config(), axes)) == ["rate", "alpha", "seed"]
    with pytest.raises(ConfigError, match="ia3 has no alpha to sweep"):
        settings_of(Config(method="ia3"), axes)
    with pytest.raises(ConfigError, match="pfeiffer has no rank to sweep"):
        settings_of(Config(method="pfeiffer"), axes | {"alpha": [], "rank": [2]})
    with pytest.raises(ConfigError, match="at least one seed"):
        settings_of(Config(), axes | {"seed": []})
