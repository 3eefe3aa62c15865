"""PANDA: Prompt Transfer Meets Knowledge Distillation for Efficient Model Adaptation (Zhong et al., IEEE TKDE 2024,
arXiv:2208.10160).

Starting a target's prompt from a source task's (PoT, as SPoT does) hurts where the two differ, and forgets the source.
PANDA starts at random and learns from a teacher instead: the source's prompt, adapted to the target.

    0. source    a prompt and a head on the source's data
    1. teacher   the prompt starts from the source's (`transfer_init`), the head afresh; trained on the target: that is PoT
    2. student   prompt and head start afresh; L = L_task + w KD(z_student, z_teacher), the teacher held fixed
       KD = mean over examples and classes of the squared difference; in the reference code over the batch's size once more
       w = λ sim(source, target): how transferable the source is predicted to be

    sim = cosine of task embeddings: the mean output of the prompted model over a task's examples, less that of the model
    without the prompt

The prompt is any method of this library (the paper's is prefix tuning without a network, `prefix_tuning(l, 0)`). Measures
that it is compared with: the cosine of the prompts themselves averaged over positions (SPoT), and the overlap of activated
feed-forward units (Su et al., NAACL 2022).

Reference code: WHU-ZQH/PANDA @5efc6dc (p-tuning-v2/training/trainer_base.py): w = 0.1 β, β = 0.1; its teacher runs with
dropout on, ours never. The metric is not in it; its definition here follows the published heat maps (symmetric, diagonal one)
and is our reading: outputs averaged over tokens, prompted minus unprompted, negative similarities cut at zero.

Letters: b batch, c classes, n examples, t tokens, d width, S sources, T targets, L layers, u units.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxpeft import trees

__all__ = [
    "distillation",
    "overlap",
    "panda_loss",
    "prompt_similarity",
    "task_embedding",
    "transfer_init",
    "transferability",
]

Norm = Literal["code", "mean"]


def distillation(student: Float[Array, "b c"], teacher: Float[Array, "b c"], norm: Norm = "mean") -> Float[Array, "b"]:
    """Each example's part of KD, whose mean over the batch is KD; the teacher's logits get no gradient.

    Args:
      student, teacher: logits.
      norm: "mean", or "code": divided by the batch's size once more, as in the reference.
    """
    square = jnp.square(student.astype(jnp.float32) - jax.lax.stop_gradient(teacher).astype(jnp.float32)).mean(-1)
    return square / square.shape[0] if norm == "code" else square


def panda_loss(
    task_loss: Float[Array, "b"],
    student: Float[Array, "b c"],
    teacher: Float[Array, "b c"],
    weight: Any,
    norm: Norm = "mean",
) -> Float[Array, "b"]:
    """L of each example. `weight` is w: a number, traced (vmapped over sources), or one an example; 0 is prompt tuning.

    Raises:
      ValueError: logits of different shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"logits {student.shape} of the student and {teacher.shape} of the teacher: not of one task")
    return task_loss + jnp.asarray(weight, jnp.float32) * distillation(student, teacher, norm)


def transfer_init(source: PyTree, fresh: PyTree, keep_fresh: trees.Pattern = "head/**") -> PyTree:
    """`fresh` with the source's leaves, but for those that `keep_fresh` chooses: the head, whose classes are others.

    Raises:
      ValueError: a leaf to be taken over that the source lacks or has in another shape.
      PatternError: `keep_fresh` chooses nothing.
    """
    own, theirs = trees.by_path(fresh), trees.by_path(source)
    kept = set(trees.matches(keep_fresh, own))
    taken = {p: theirs.get(p) for p in own if p not in kept}
    if wrong := [p for p, x in taken.items() if x is None or jnp.shape(x) != jnp.shape(own[p])]:
        path = wrong[0]
        has = jnp.shape(theirs[path]) if path in theirs else "nothing"
        raise ValueError(
            f"the source has {has} at {path!r}, the target {jnp.shape(own[path])}: their prompts must be of one size"
        )
    return trees.replace_leaves(fresh, taken)


def task_embedding(
    features: Callable[[Any], Float[Array, "b *t d"]],
    batches: Iterable[Any],
    unprompted: Callable[[Any], Float[Array, "b *t d"]] | None = None,
) -> Float[Array, "d"]:
    """The mean of a task's features over its examples and tokens.

    Args:
      features: batch -> outputs of the model with the task's prompt.
      batches: of the task; rows with `weight` 0 do not count.
      unprompted: the same without the prompt, taken off; None for the outputs themselves.

    Raises:
      ValueError: no examples.
    """

    def total(batch: Any) -> tuple[Array, Array]:
        f = features(batch).astype(jnp.float32)
        if unprompted is not None:
            f = _pooled(f) - _pooled(unprompted(batch).astype(jnp.float32))
        return (_pooled(f) * batch.weight[:, None]).sum(0), batch.weight.sum()

    sums = [total(batch) for batch in batches]
    if not sums or sum(float(n) for _, n in sums) == 0:
        raise ValueError("a task without examples has no embedding")
    return sum((s for s, _ in sums), jnp.zeros(())) / sum((n for _, n in sums), jnp.zeros(()))


def _pooled(x: Float[Array, "b *t d"]) -> Float[Array, "b d"]:
    return x.mean(tuple(range(1, x.ndim - 1))) if x.ndim > 2 else x


def transferability(
    sources: Float[Array, "S d"], targets: Float[Array, "T d"], *, clip: bool = True
) -> Float[Array, "S T"]:
    """Cosines of task embeddings; with `clip` cut at zero, to be used as weights. An embedding of zeros is like nothing."""
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    cosine = unit(sources.astype(jnp.float32)) @ unit(targets.astype(jnp.float32)).T
    return jnp.maximum(cosine, 0) if clip else cosine


def prompt_similarity(sources: Float[Array, "S l d"], targets: Float[Array, "T l d"]) -> Float[Array, "S T"]:
    """SPoT's measure: the cosine of prompts averaged over their positions."""
    return transferability(sources.mean(1), targets.mean(1), clip=False)


def overlap(source: Bool[Array, "L u"], target: Bool[Array, "L u"]) -> Float[Array, ""]:
    """Su et al.'s measure: the cosine of the patterns of activated units, all layers end to end."""
    a, b = (x.astype(jnp.float32).ravel() for x in (source, target))
    return a @ b / jnp.maximum(jnp.linalg.norm(a) * jnp.linalg.norm(b), 1e-12)
