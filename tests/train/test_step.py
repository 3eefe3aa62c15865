"""The train step: only the delta learns, accumulation and sharding change no number, NaN stops the clock."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft
from jaxpeft import data, train
from jaxpeft.models import EncoderConfig, SequenceClassifier

CONFIG = EncoderConfig(vocab=50, width=16, layers=2, heads=4, head_dim=4, mlp_width=32, max_positions=32)


def batch_of(rows=8, length=6, seed=0):
    rng = np.random.default_rng(seed)
    mask = (np.arange(length) < rng.integers(2, length + 1, (rows, 1))).astype(np.int32)
    return data.TextBatch(
        rng.integers(1, 50, (rows, length)).astype(np.int32) * mask,
        mask,
        rng.integers(0, 3, rows).astype(np.int32),
        np.ones(rows, np.float32),
        np.arange(rows, dtype=np.int32),
    )


@pytest.fixture(scope="module")
def parts():
    model = SequenceClassifier(CONFIG, 3)
    batch = batch_of()
    params = model.init(jax.random.key(0), batch.input_ids, batch.attention_mask)
    method = jaxpeft.chain(jaxpeft.lora(rank=2, dropout=0.1), jaxpeft.head())
    adapted = jaxpeft.adapt(model.apply, method)
    delta = adapted.init(jax.random.key(1), params, batch.input_ids, batch.attention_mask)
    return adapted, params, delta, optax.adam(1e-2)


def close(a, b, tolerance=1e-5):
    chex.assert_trees_all_close(a, b, atol=tolerance, rtol=tolerance)


def without_dropout(adapted):
    return jaxpeft.adapt(SequenceClassifier(CONFIG, 3).apply, jaxpeft.chain(jaxpeft.lora(rank=2), jaxpeft.head()))


def test_a_step_lowers_the_loss_and_leaves_the_base_alone(parts):
    adapted, params, delta, optimiser = parts
    before = jax.tree.map(jnp.copy, params)
    step = jax.jit(train.make_step(adapted, train.text_classification(), optimiser))
    state, losses = train.create(delta, optimiser), []
    for _ in range(30):
        state, numbers = step(state, params, batch_of())
        losses.append(float(numbers["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    assert int(state.step) == 30
    chex.assert_trees_all_equal(before, params)


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(parts):
    _, params, delta, _ = parts
    adapted, optimiser = without_dropout(None), optax.sgd(1.0)
    batch = batch_of()._replace(weight=np.array([1, 1, 0, 1, 1, 1, 0, 1], np.float32))
    one, four = (
        jax.jit(train.make_step(adapted, train.text_classification(), optimiser, accumulate=k))(
            train.create(delta, optimiser), params, batch
        )
        for k in (1, 4)
    )
    close(one[0].learned, four[0].learned)
    close(one[1], four[1])


def test_parts_that_do_not_divide_the_batch_are_refused(parts):
    adapted, params, delta, optimiser = parts
    step = train.make_step(adapted, train.text_classification(), optimiser, accumulate=3)
    with pytest.raises(ValueError, match="8 rows does not divide into accumulate=3"):
        step(train.create(delta, optimiser), params, batch_of())


def test_rows_of_weight_zero_do_not_count(parts):
    _, params, delta, _ = parts
    adapted, optimiser = without_dropout(None), optax.sgd(1.0)
    step = jax.jit(train.make_step(adapted, train.text_classification(), optimiser))
    batch = batch_of()
    padded = jax.tree.map(lambda x: np.concatenate([x, x[:1]]), batch)._replace(
        weight=np.array([1.0] * 8 + [0], np.float32)
    )
    close(
        step(train.create(delta, optimiser), params, batch)[0].learned,
        step(train.create(delta, optimiser), params, padded)[0].learned,
    )


@pytest.mark.parametrize(("data_devices", "fsdp"), [(8, 1), (4, 2), (1, 8)])
def test_a_mesh_gives_the_numbers_of_one_device(parts, data_devices, fsdp):
    _, params, delta, optimiser = parts
    adapted = without_dropout(None)
    step = train.make_step(adapted, train.text_classification(), optimiser)
    single = train.create(delta, optimiser)
    mesh = train.make_mesh(data_devices, fsdp)
    many, base = train.place_state(mesh, single), train.place_base(mesh, params)
    if fsdp == 8:
        kernel = base["params"]["backbone"]["layers_0"]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 8
    run = jax.jit(step)
    for seed in range(3):
        single, a = run(single, params, batch_of(seed=seed))
        many, b = run(many, base, train.place_batch(mesh, batch_of(seed=seed)))
    close(a, b)
    close(single.learned, jax.device_get(many.learned))


def test_pmap_gives_the_numbers_of_one_device(parts):
    _, params, delta, optimiser = parts
    adapted = without_dropout(None)
    task = train.text_classification()
    state, _ = jax.jit(train.make_step(adapted, task, optimiser))(train.create(delta, optimiser), params, batch_of())
    step = train.pmap_step(train.make_step(adapted, task, optimiser, axis="devices"))
    many = jax.tree.map(lambda x: jnp.stack([x] * 8), train.create(delta, optimiser))
    cut = jax.tree.map(lambda x: x.reshape(8, 1, *x.shape[1:]), batch_of())
    many, _ = step(many, params, cut)
    close(state.learned, jax.tree.map(lambda x: x[3], many.learned))


def test_a_mesh_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match="data=3 times fsdp=2 is 6"):
        train.make_mesh(3, 2)


def test_nothing_changes_from_the_first_step_that_is_not_finite(parts):
    adapted, params, delta, optimiser = parts
    step = jax.jit(train.make_step(adapted, train.text_classification(), optimiser))
    good, _ = step(train.create(delta, optimiser), params, batch_of())
    broken = batch_of()._replace(weight=np.full(8, np.nan, np.float32))
    bad, _ = step(good, params, broken)
    later, _ = step(bad, params, batch_of())
    assert int(bad.first_bad) == int(later.first_bad) == 1
    chex.assert_trees_all_equal(good.learned, later.learned)
    chex.assert_trees_all_equal(good.optimiser, later.optimiser)


def test_the_second_step_does_not_compile_again(parts, counted):
    adapted, params, delta, optimiser = parts
    once = counted(train.make_step(adapted, train.text_classification(), optimiser))
    step, state = jax.jit(once), train.create(delta, optimiser)
    for _ in range(3):
        state, _ = step(state, params, batch_of())
    assert len(once.traces) == 1


def test_two_rates_by_label_move_the_parts_at_their_own_speed(parts):
    adapted, params, delta, _ = parts
    optimiser = optax.multi_transform(
        {"head": optax.sgd(0.0), "delta": optax.sgd(1.0)},
        lambda tree: jaxpeft.labels(tree, {"head": "**/head/**"}, default="delta"),
    )
    step = jax.jit(train.make_step(adapted, train.text_classification(), optimiser))
    state, _ = step(train.create(delta, optimiser), params, batch_of())
    chex.assert_trees_all_equal(state.learned["head"], delta["head"])
    assert any(
        bool((a != b).any()) for a, b in zip(jax.tree.leaves(state.learned["lora"]), jax.tree.leaves(delta["lora"]))
    )


def test_half_precision_compute_keeps_the_delta_in_float32(parts):
    _, params, _, optimiser = parts
    model = SequenceClassifier(dataclasses.replace(CONFIG, dtype=jnp.bfloat16), 3)
    adapted = jaxpeft.adapt(model.apply, jaxpeft.lora(rank=2))
    batch = batch_of()
    delta = adapted.init(jax.random.key(0), params, batch.input_ids, batch.attention_mask)
    state, numbers = jax.jit(train.make_step(adapted, train.text_classification(), optimiser))(
        train.create(delta, optimiser), params, batch
    )
    assert {x.dtype for x in jax.tree.leaves(state.learned)} == {jnp.dtype("float32")}
    assert np.isfinite(numbers["loss"])


def test_a_language_models_loss_is_the_mean_over_each_rows_real_next_tokens():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 5)), jnp.float32)  # two virtual tokens in front
    ids = np.array([[1, 2, 3, 4, 0], [4, 3, 1, 0, 0]], np.int32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)
    batch = data.TextBatch(ids, mask, np.zeros(2, np.int32), np.ones(2, np.float32), np.arange(2, dtype=np.int32))
    got = train.language_modelling().loss(logits, batch)
    log_p = np.asarray(jax.nn.log_softmax(logits[:, 2:]))
    want = [-np.mean([log_p[b, t, ids[b, t + 1]] for t in range(n - 1)]) for b, n in enumerate((5, 3))]
    np.testing.assert_allclose(got, want, rtol=1e-5)
