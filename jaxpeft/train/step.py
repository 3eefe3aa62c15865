"""One training step as a pure function: gradients of the delta alone, accumulated, guarded against NaN.

    state, metrics = step(state, params, batch)

`state` holds what changes (the learned leaves, the optimiser's state for them, the step), `params` the frozen base. The
step is the same on one device, on a mesh (the arrays' shardings decide), under `pmap`, and under `vmap` over a stack of
states with one base.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree, UInt32

from jaxpeft import trees
from jaxpeft.method import Adapted


@jtu.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What training changes.

    Attributes:
      step: updates made, bad ones included.
      learned: the delta's trained leaves; the others are `Absent`.
      fixed: the delta's other leaves.
      optimiser: optax state for `learned`.
      seed: all randomness of the run comes from it and the step, so that a resumed run repeats it.
      first_bad: the first step whose loss or gradient was not finite, -1 while there is none. From then on nothing
        changes: the last good values are kept.
    """

    step: Int[Array, ""]
    learned: PyTree
    fixed: PyTree
    optimiser: PyTree
    seed: UInt32[Array, ""]
    first_bad: Int[Array, ""]

    @property
    def delta(self) -> PyTree:
        return trees.combine(self.learned, self.fixed)


class Task(NamedTuple):
    """What a model is trained for.

    Attributes:
      forward: `(apply, batch, key) -> outputs`, where `apply(*inputs, **kwargs)` is the adapted model and `key` is None
        in evaluation.
      loss: `(outputs, batch) -> (b,)` losses. Batches have a field `weight` (b,), 0 for rows that are padding.
    """

    forward: Callable[[Callable[..., Any], Any, Any], Any]
    loss: Callable[[Any, Any], Float[Array, "b"]]


def cross_entropy(logits: Float[Array, "b c"], labels: Int[Array, "b"]) -> Float[Array, "b"]:
    """Softmax cross-entropy against integer labels, in float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def _forward(*fields: str, model_dropout: bool) -> Callable[[Callable[..., Any], Any, Any], Any]:
    """The model on these fields of a batch, its own dropout on where asked for and where there is a key."""

    def forward(apply: Callable[..., Any], batch: Any, key: Any) -> Any:
        own = {"deterministic": False, "rngs": {"dropout": key}} if model_dropout and key is not None else {}
        if getattr(batch, "task", None) is not None:
            own["task"] = batch.task
        return apply(*(getattr(batch, f) for f in fields), dropout_key=key, **own)

    return forward


def text_classification(model_dropout: bool = False) -> Task:
    """Logits from (input_ids, attention_mask); `model_dropout` turns the base's own dropout on in training."""

    return Task(
        _forward("input_ids", "attention_mask", model_dropout=model_dropout),
        lambda logits, batch: cross_entropy(logits, batch.label),
    )


def image_classification(model_dropout: bool = False) -> Task:
    """Logits from images."""

    return Task(
        _forward("image", model_dropout=model_dropout), lambda logits, batch: cross_entropy(logits, batch.label)
    )


def language_modelling(model_dropout: bool = False) -> Task:
    """Next-token logits from (input_ids, attention_mask); a row's loss is the mean over its real next tokens."""

    def loss(logits: Array, batch: Any) -> Float[Array, "b"]:
        ids, real = batch.input_ids[:, 1:], batch.attention_mask[:, 1:].astype(jnp.float32)
        logits = logits[:, -batch.input_ids.shape[1] : -1]  # virtual tokens in front predict nothing
        each = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), ids)
        return (each * real).sum(1) / jnp.maximum(real.sum(1), 1.0)

    return Task(_forward("input_ids", "attention_mask", model_dropout=model_dropout), loss)


def classes_of_tasks(task: Task, classes: Sequence[int]) -> Task:
    """`task` for batches of several classification tasks whose heads are as wide as the widest: each task's logits are
    those of its own classes, the others cannot be chosen.

    Args:
      task: its outputs are (b, c) logits.
      classes: how many classes each task has, at most c.
    """
    known = np.asarray(classes)

    def forward(apply: Callable[..., Any], batch: Any, key: Any) -> Any:
        logits = task.forward(apply, batch, key)
        own = jnp.arange(logits.shape[-1])[None] < jnp.take(known, jnp.reshape(batch.task, (-1, 1)))
        return jnp.where(own, logits, jnp.finfo(logits.dtype).min)

    return Task(forward, task.loss)


def create(delta: PyTree, optimiser: optax.GradientTransformation, seed: Any = 0) -> TrainState:
    """The state at step 0."""
    learned, fixed = trees.learned(delta)
    # Every leaf an array of its own: a step donates the state's buffers.
    return TrainState(
        jnp.zeros((), jnp.int32),
        learned,
        fixed,
        optimiser.init(learned),
        jnp.array(seed, jnp.uint32),
        jnp.array(-1, jnp.int32),
    )


Step = Callable[[TrainState, PyTree, Any], tuple[TrainState, dict[str, Array]]]


def make_step(
    adapted: Adapted,
    task: Task,
    optimiser: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    axis: str | None = None,
    gradient: Callable[..., Any] = jax.value_and_grad,
) -> Step:
    """A pure `(state, params, batch) -> (state, {"loss", "gradient_norm", "accuracy"})`.

    Args:
      adapted: model and method.
      task: what to minimise.
      optimiser: any optax transformation; it sees the learned leaves only.
      accumulate: splits the batch's rows into this many parts, one after another, with the gradient of the whole.
      axis: the mapped axis to average over, under `pmap` or `shard_map`; under jit, shardings do it.
      gradient: how the gradient is found, called as `jax.value_and_grad(f, has_aux=True)`, where f takes the learned
        leaves first and a key last: an estimate from values, for instance (`tune.spsa`).

    Raises:
      ValueError: the batch's rows do not divide into `accumulate` parts.
    """

    def losses(learned: PyTree, state: TrainState, params: PyTree, batch: Any, key: Any) -> tuple[Array, Array]:
        delta = trees.combine(learned, state.fixed)
        outputs = task.forward(lambda *x, **k: adapted.apply(params, delta, *x, **k), batch, key)
        hits = (
            (outputs.argmax(-1) == batch.label)
            if hasattr(batch, "label") and getattr(outputs, "ndim", 0) == 2
            else batch.weight * 0
        )
        return jnp.sum(task.loss(outputs, batch) * batch.weight), jnp.sum(hits * batch.weight)

    found = gradient(losses, has_aux=True)

    def step(state: TrainState, params: PyTree, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        if axis is not None:  # each device draws its own dropout
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        if accumulate == 1:
            (loss, hits), grads = found(state.learned, state, params, batch, key)
        else:
            loss, hits, grads = _accumulated(found, state, params, batch, key, accumulate)
        weight = jnp.sum(batch.weight)
        if axis is not None:
            loss, hits, weight, grads = jax.lax.psum((loss, hits, weight, grads), axis)
        weight = jnp.maximum(weight, 1)
        loss, grads = loss / weight, jax.tree.map(lambda g: g / weight, grads)
        norm = optax.tree.norm(grads)
        updates, optimiser_state = optimiser.update(grads, state.optimiser, state.learned)
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm)) | (state.first_bad >= 0)
        new = dataclasses.replace(state, learned=optax.apply_updates(state.learned, updates), optimiser=optimiser_state)
        kept = jax.tree.map(lambda a, b: jnp.where(bad, a, b), state, new)
        first_bad = jnp.where(bad & (state.first_bad < 0), state.step, state.first_bad)
        kept = dataclasses.replace(kept, step=state.step + 1, first_bad=first_bad)
        return kept, {"loss": loss, "gradient_norm": norm, "accuracy": hits / weight}

    return step


def _accumulated(gradient: Any, state: TrainState, params: PyTree, batch: Any, key: Any, parts: int) -> Any:
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % parts:
        raise ValueError(f"a batch of {rows} rows does not divide into accumulate={parts} parts")

    # Part i takes the rows i, i + parts, ...: on a mesh every part then has rows of every device.
    def rows_of_parts(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(rows // parts, parts, *x.shape[1:]), 1, 0) if jnp.ndim(x) else jnp.full(parts, x)

    cut = jax.tree.map(rows_of_parts, batch)

    def one(total: Any, part: Any) -> Any:
        i, piece = part
        (loss, hits), grads = gradient(state.learned, state, params, piece, jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, total, (loss, hits, grads)), None

    zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.learned))
    return jax.lax.scan(one, zero, (jnp.arange(parts), cut))[0]


def make_evaluation(adapted: Adapted, task: Task) -> Callable[[PyTree, PyTree, Any], dict[str, Array]]:
    """A pure `(delta, params, batch) -> {"prediction" (b,), "loss" (b,), "outputs"}`, without dropout."""

    def evaluation(delta: PyTree, params: PyTree, batch: Any) -> dict[str, Array]:
        outputs = task.forward(lambda *x, **k: adapted.apply(params, delta, *x, **k), batch, None)
        return {"prediction": outputs.argmax(-1), "loss": task.loss(outputs, batch), "outputs": outputs}

    return evaluation
