"""Prompt transfer by distillation: the card's oracles."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from jaxpeft import PatternError, adapt, chain, data, head, prefix_tuning, train
from jaxpeft.adapt.panda import (
    distillation,
    overlap,
    panda_loss,
    prompt_similarity,
    task_embedding,
    transfer_init,
    transferability,
)
from jaxpeft.models import SequenceClassifier
from jaxpeft.models.encoder import EncoderConfig
from jaxpeft.train.step import create, make_step

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = EncoderConfig(
    vocab=20, width=8, layers=2, heads=2, head_dim=4, mlp_width=16, max_positions=24, init_std=0.3, plain=True
)
IDS = np.random.default_rng(0).integers(2, 20, (4, 5)).astype(np.int32)
MASK = np.ones((4, 5), np.int32)
MODEL = SequenceClassifier(CONFIG, 3)
BATCH = data.TextBatch(IDS, MASK, np.array([0, 1, 2, 0], np.int32), np.ones(4, np.float32), np.arange(4))


def test_weight_zero_is_prompt_tuning_step_by_step(key, close):
    params = MODEL.init(jax.random.key(0), IDS, MASK)
    adapted = adapt(MODEL.apply, chain(prefix_tuning(2, 0), head()))
    plain = train.text_classification()
    teacher = jax.random.normal(key, (4, 3))
    runs = {}
    for weight in (None, 0.0, 1.0):
        loss = plain.loss if weight is None else lambda z, b, w=weight: panda_loss(plain.loss(z, b), z, teacher, w)
        optimiser = optax.sgd(0.1)
        state = create(adapted.init(jax.random.key(1), params, IDS, MASK), optimiser)
        step = jax.jit(make_step(adapted, train.Task(plain.forward, loss), optimiser))
        for _ in range(3):
            state, _ = step(state, params, BATCH)
        runs[weight] = state.learned
    close(runs[0.0], runs[None])
    same = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, atol=1e-4)), runs[1.0], runs[None])
    assert not all(jax.tree.leaves(same))


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(key):
    z = jax.random.normal(key, (4, 3))
    value, grad = jax.value_and_grad(lambda s: distillation(s, z).mean())(z)
    assert value == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("norm", ["code", "mean"])
def test_gradients_are_those_of_the_formula_and_the_teacher_has_none(norm, key):
    s, t = jax.random.normal(key, (4, 3)), jax.random.normal(jax.random.fold_in(key, 1), (4, 3))
    gs, gt = jax.grad(lambda s, t: distillation(s, t, norm).mean(), (0, 1))(s, t)
    assert jnp.allclose(gs, 2 * (s - t) / (4 * 3 * (4 if norm == "code" else 1)), atol=1e-6)
    assert (gt == 0).all()


def test_weights_of_many_sources_are_one_program(key):
    s, t = jax.random.normal(key, (4, 3)), jnp.zeros((5, 4, 3))
    w = jnp.linspace(0, 1, 5)
    got = jax.vmap(lambda t, w: panda_loss(jnp.zeros(4), s, t, w).mean())(t, w)
    assert jnp.allclose(got, w * jnp.square(s).mean(), atol=1e-6)


def test_a_transfer_takes_the_prompt_and_leaves_the_head(close):
    params = MODEL.init(jax.random.key(0), IDS, MASK)
    adapted = adapt(MODEL.apply, chain(prefix_tuning(2, 0), head()))
    source, fresh = (adapted.init(jax.random.key(i), params, IDS, MASK) for i in (1, 2))
    source = jax.tree.map(lambda x: x + 1, source)
    made = transfer_init(source, fresh)
    close(made["prefix_tuning"], source["prefix_tuning"])
    close(made["head"], fresh["head"])
    longer = adapt(MODEL.apply, chain(prefix_tuning(3, 0), head())).init(jax.random.key(1), params, IDS, MASK)
    with pytest.raises(ValueError, match="prompts must be of one size"):
        transfer_init(longer, fresh)
    with pytest.raises(PatternError, match="matches no leaf"):
        transfer_init(source, fresh, "classifier/**")


def test_similarities_are_symmetric_with_a_diagonal_of_one_and_ignore_scale(key):
    e = jax.random.normal(key, (4, 6))
    sim = transferability(e, e)
    assert jnp.allclose(sim, sim.T, atol=1e-6)
    assert jnp.allclose(jnp.diag(sim), 1, atol=1e-6)
    assert (sim >= 0).all()
    assert jnp.allclose(transferability(5 * e, e), sim, atol=1e-6)
    assert transferability(e, -e, clip=False)[0, 0] == pytest.approx(-1)
    assert (transferability(jnp.zeros((1, 6)), e) == 0).all()
    p = jax.random.normal(key, (3, 2, 6))
    assert jnp.allclose(jnp.diag(prompt_similarity(p, p)), 1, atol=1e-6)


def test_overlap_of_patterns():
    a = jnp.array([[True, False], [True, True]])
    assert overlap(a, a) == pytest.approx(1)
    assert overlap(a, ~a) == 0
    assert overlap(a, jnp.zeros_like(a)) == 0


def test_a_tasks_embedding_is_the_mean_over_its_examples_less_the_bases(key):
    x = jax.random.normal(key, (4, 5, 6))
    batch = BATCH._replace(weight=np.array([1, 1, 0, 1], np.float32))
    got = task_embedding(lambda b: x, [batch], lambda b: jnp.ones((4, 5, 6)))
    assert jnp.allclose(got, x[jnp.array([0, 1, 3])].mean((0, 1)) - 1, atol=1e-6)
    pooled = task_embedding(lambda b: x[:, 0], [batch, batch])
    assert jnp.allclose(pooled, x[jnp.array([0, 1, 3]), 0].mean(0), atol=1e-6)
    with pytest.raises(ValueError, match="without examples"):
        task_embedding(lambda b: x, [])


def test_logits_of_other_tasks_are_refused():
    with pytest.raises(ValueError, match=r"logits \(4, 3\) of the student and \(4, 2\)"):
        panda_loss(jnp.zeros(4), jnp.zeros((4, 3)), jnp.zeros((4, 2)), 1.0)


@pytest.mark.parametrize("beta", ["0.1", "1"])
def test_the_loss_and_its_gradient_are_those_of_the_papers_code(beta, close):
    golden = load_file(Path(__file__).parents[2] / "third_party" / "panda" / "golden.safetensors")
    g = {n.removeprefix(f"{beta}/"): jnp.asarray(x) for n, x in golden.items() if n.startswith(f"{beta}/")}
    close(g["x"] @ g["w"], g["student"])

    def total(z):
        task = optax.softmax_cross_entropy_with_integer_labels(z, g["label"])
        return panda_loss(task, z, g["teacher"], 0.1 * float(beta), "code").mean()

    value, grad = jax.value_and_grad(total)(g["student"])
    close(value, g["loss"])
    close(grad, g["grad"], atol=1e-6)
