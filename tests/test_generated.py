"""Deltas that generate deltas, and deltas that serve several tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft import TaskError, adapt, bake, chain, head, lora, per_task, trees
from jaxpeft.files import load_delta, save_delta
from jaxpeft.generated import generated
from jaxpeft.models import SequenceClassifier
from jaxpeft.models.encoder import EncoderConfig

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = EncoderConfig(
    vocab=20, width=8, layers=2, heads=2, head_dim=4, mlp_width=16, max_positions=24, init_std=0.3, plain=True
)
IDS = np.random.default_rng(0).integers(2, 20, (6, 4)).astype(np.int32)
MASK = np.ones((6, 4), np.int32)
TASKS = np.array([2, 0, 0, 1, 2, 1])


@pytest.fixture(scope="module")
def model():
    made = SequenceClassifier(CONFIG, 3)
    return made, made.init(jax.random.key(0), IDS, MASK)


def moved(delta):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.3 * jnp.asarray(rng.normal(size=x.shape), x.dtype), delta)


def case(model, method):
    made, params = model
    adapted = adapt(made.apply, method, on_dense="refuse")
    return adapted, params, moved(adapted.init(jax.random.key(1), params, IDS, MASK))


def test_a_batch_of_several_tasks_gives_each_row_what_its_own_task_gives(model, close):
    adapted, params, delta = case(model, chain(per_task(lora(2), 3), per_task(head(), 3)))
    mixed = jax.jit(lambda t: adapted.apply(params, delta, IDS, MASK, task=t))(jnp.asarray(TASKS))
    alone = [adapted.apply(params, delta, IDS, MASK, task=t) for t in range(3)]
    close(mixed, jnp.stack([alone[t][i] for i, t in enumerate(TASKS)]))
    plain = adapt(model[0].apply, chain(lora(2), head()))
    one = {name: trees.unstack(part)[1] for name, part in delta.items()}
    close(alone[1], plain.apply(params, one, IDS, MASK))


def test_gradients_of_a_mixed_batch_reach_the_tasks_in_it_alone(model):
    adapted, params, delta = case(model, per_task(lora(2), 3))
    loss = lambda d: jnp.sum(jnp.sin(adapted.apply(params, d, IDS, MASK, task=jnp.array([0, 0, 2, 2, 0, 2]))))
    for g in jax.tree.leaves(jax.grad(loss)(delta)):
        sizes = jnp.abs(g).max(tuple(range(1, g.ndim)))
        assert sizes[1] == 0
        assert (sizes[jnp.array([0, 2])] > 0).all()


def test_a_mixed_batch_is_one_product_with_the_base_for_all_its_rows(model):
    adapted, params, delta = case(model, per_task(lora(2), 3))
    compiled = lambda f: jax.jit(f).lower(params, delta, IDS, MASK).compile().cost_analysis()["flops"]
    mixed = compiled(lambda p, d, i, m: adapted.apply(p, d, i, m, task=jnp.asarray(TASKS)))
    single = compiled(lambda p, d, i, m: adapted.apply(p, d, i, m, task=1))
    assert mixed < 1.15 * single


def test_baked_for_a_task_it_is_the_plain_method_and_merges(model, close):
    adapted, params, delta = case(model, chain(per_task(lora(2), 3), per_task(head(), 3)))
    want = adapted.apply(params, delta, IDS, MASK, task=2)
    method, own = bake(adapted.method, delta, 2)
    assert method.tasks is None
    close(adapt(model[0].apply, method).apply(params, own, IDS, MASK), want)
    close(model[0].apply(adapted.merge(params, delta, 2), IDS, MASK), want)
    same, kept = bake(lora(2), delta)
    assert same.bake is None
    assert kept is delta


def test_tasks_are_traced_and_swapped_without_compiling_again(model, counted):
    adapted, params, delta = case(model, per_task(lora(2), 3))
    once = counted(lambda task: adapted.apply(params, delta, IDS, MASK, task=task))
    run = jax.jit(once)
    assert not np.allclose(run(jnp.int32(0)), run(jnp.int32(1)))
    assert len(once.traces) == 1


def test_dropout_is_drawn_for_each_row_of_a_mixed_batch(model):
    adapted, params, delta = case(model, per_task(lora(2, dropout=0.5), 3))
    same = np.repeat(IDS[:1], 6, 0)
    run = jax.jit(lambda key: adapted.apply(params, delta, same, MASK, task=jnp.zeros(6, int), dropout_key=key))
    y = run(jax.random.key(0))
    assert not np.allclose(y[0], y[1])
    assert not np.allclose(y, run(jax.random.key(1)))


def test_a_wrong_task_is_refused_with_what_there_is(model):
    adapted, params, delta = case(model, per_task(lora(2), 3))
    run = lambda **k: adapted.apply(params, delta, IDS, MASK, **k)
    with pytest.raises(TaskError, match=r"serves 3 tasks: say which, task=0..2"):
        run()
    with pytest.raises(TaskError, match=r"task 3: .*serves tasks 0 to 2"):
        run(task=np.array([0, 3, 1, 0, 0, 0]))
    with pytest.raises(TaskError, match=r"float32.*expected an integer"):
        run(task=jnp.ones(6))
    with pytest.raises(TaskError, match="baked for one task"):
        bake(adapted.method, delta, np.zeros(6, int))
    with pytest.raises(TaskError, match="bake it for one"):
        adapted.method.merge(params, delta)
    plain = adapt(model[0].apply, lora(2))
    with pytest.raises(TaskError, match="knows no tasks"):
        plain.apply(params, plain.init(jax.random.key(0), params, IDS, MASK), IDS, MASK, task=0)
    with pytest.raises(ValueError, match="3 and 4 tasks in one chain"):
        chain(per_task(lora(2), 3), per_task(head(), 4))
    with pytest.raises(ValueError, match="tasks 0"):
        per_task(lora(2), 0)
    with pytest.raises(ValueError, match="serves 3 tasks already"):
        per_task(per_task(lora(2), 3), 2)


def test_one_task_need_not_be_named(model, close):
    adapted, params, delta = case(model, per_task(lora(2), 1))
    close(adapted.apply(params, delta, IDS, MASK), adapted.apply(params, delta, IDS, MASK, task=0))


def test_its_configuration_and_its_file_make_it_again(model, tmp_path, close):
    method = chain(per_task(lora(2), 3), per_task(head(), 3))
    adapted, params, delta = case(model, method)
    assert jaxpeft.from_config(method.config).config == method.config
    save_delta(tmp_path / "d", delta, method, params)
    saved = load_delta(tmp_path / "d", params)
    again = adapt(model[0].apply, saved.method)
    close(again.apply(params, saved.delta, IDS, MASK, task=1), adapted.apply(params, delta, IDS, MASK, task=1))


def test_fixed_leaves_stay_out_of_the_gradient_and_reach_emit_unmarked(model):
    inner = lora(2, at="**/query/kernel")

    def init(key, shapes, call):
        small = jax.tree.map(lambda s: jnp.ones(s.shape), shapes)
        return {"factor": jnp.ones(()), "rest": jax.tree.map(trees.Fixed, small)}

    def emit(delta, task, key):
        assert not any(isinstance(x, trees.Fixed) for x in jax.tree.leaves(delta["rest"]))
        return jax.tree.map(lambda x: x * delta["factor"], delta["rest"])

    method = generated(inner, init, emit, {"method": "x"}, name="x")
    adapted = adapt(model[0].apply, method)
    delta = adapted.init(jax.random.key(0), model[1], IDS, MASK)
    yes, no = trees.learned(delta)
    assert trees.count(yes) == 1
    grad = jax.grad(lambda y: jnp.sum(adapted.apply(model[1], trees.combine(y, no), IDS, MASK)[:, 0]))(yes)
    assert abs(float(jax.tree.leaves(grad)[0])) > 0


def test_a_chain_prepares_its_parts_each_with_a_key_of_its_own(model):
    seen = []

    def prepare(study):
        seen.append(jax.random.key_data(study.key).tolist())
        return lora(3, at="**/query/kernel")

    method = chain(lora(2)._replace(prepare=prepare, name="a"), lora(2)._replace(prepare=prepare, name="b"), head())
    study = jaxpeft.Study(None, None, None, None, 1e-3, jax.random.key(0))
    made = method.prepare(study)
    assert made.prepare is None
    assert seen[0] != seen[1]
    shapes = jax.eval_shape(adapt(model[0].apply, made).init, jax.random.key(0), model[1], IDS, MASK)
    assert {x["a"].shape[-1] for x in shapes["a"].values()} == {3}
    assert chain(lora(2), head()).prepare is None


def test_rates_of_a_chain_name_its_parts():
    method = chain(lora(2)._replace(rates=(("**/a", 2.0),)), head())
    assert method.rates == (("lora/**/a", 2.0),)
