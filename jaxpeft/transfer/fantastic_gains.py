"""Transfer between any two trained classifiers by data partitioning, KL+DP (Roth, Thede et al., ICLR 2024).

Each of two trained models is right on examples where the other is wrong. To move that knowledge into a trained student
without overwriting its own, each example is distilled from whoever is surer of it: the teacher, or a frozen copy of the
student as it was.

    m_i = [p_t,i[y_i] > p_st,i[y_i]]                supervised           a tie is the student copy's
    m_i = [max_c p_t,i[c] > max_c p_st,i[c]]        unsupervised
    L = T²/n Σ_i KL(softmax(z*_i / T) ‖ softmax(z_s,i / T)),      z*_i = z_t,i where m_i, else z_st,i

Several teachers at once ("parallel"): the surest of the student copy and all of them. One after another ("sequential", the
continual form): the copy is renewed and the optimiser begins anew with each. Letters: K teachers, n examples, C classes;
z logits, p their softmax; t teacher, s student, st its frozen copy.

Reference code: ExplainableML/FantasticGains @ f756c18 (main_distillation.py, distillation/dist_utils.py, flip_study.py,
contrastive/CRDloss.py). Departures: cross-entropy is of logits (there, of probabilities, once more through a softmax:
`released=True`); its transfer rate counts one class too many, one in which the teacher has nothing to give.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxpeft.distillation import check_alike, kl_loss
from jaxpeft.updates import descend

__all__ = [
    "Flips",
    "Transferred",
    "dp_mask",
    "dp_targets",
    "ema_update",
    "flip_masks",
    "flips",
    "order_of",
    "sequential",
    "success_rate",
    "top_classes",
    "transfer",
    "transfer_metrics",
    "xe_kl_loss",
]


# ----------------------------------------------------------------------------------------------------------- partitions


def dp_mask(z_t: Float[Array, "n C"], z_st: Float[Array, "n C"], y: Int[Array, "n"] | None = None) -> Bool[Array, "n"]:
    """m, True where the teacher is the surer: of the label y, or without y each of its own best class.

    Unsupervised, an over-confident teacher takes most examples, weak or not: look at the mean of the mask.

    Raises:
      ValueError: shapes that do not agree.
    """
    return dp_targets(jnp.asarray(z_t)[None], z_st, y)[1] == 0


def dp_targets(
    z_teachers: Float[Array, "K n C"], z_st: Float[Array, "n C"], y: Int[Array, "n"] | None = None
) -> tuple[Float[Array, "n C"], Int[Array, "n"]]:
    """The logits to distil, and whose they are: a teacher's number, or -1 for the student copy. No gradient flows through.

    Of equally sure ones the student copy comes first, then the teachers in their order.

    Args:
      z_teachers: of all teachers, on the same examples.
      z_st: of the student as it was at the start.
      y: labels: supervised partition. None: unsupervised.

    Raises:
      ValueError: shapes that do not agree, or no teacher.
    """
    z_teachers, z_st = jnp.asarray(z_teachers), jnp.asarray(z_st)
    if z_teachers.ndim != 3 or z_teachers.shape[1:] != z_st.shape or not z_teachers.shape[0]:
        raise ValueError(
            f"teachers' logits {z_teachers.shape}, the student's {z_st.shape}: expected (K, n, C), K at least 1, and (n, C)"
        )
    z = lax.stop_gradient(jnp.concatenate([z_st.astype(z_teachers.dtype)[None], z_teachers]))
    p = jax.nn.softmax(z, -1)
    sure = p.max(-1) if y is None else jnp.take_along_axis(p, _labels(y, z_st)[None, :, None], -1)[..., 0]
    best = sure.argmax(0)
    return jnp.take_along_axis(z, best[None, :, None], 0)[0], best.astype(jnp.int32) - 1


def flip_masks(
    z_s: Float[Array, "n C"], z_t: Float[Array, "n C"], y: Int[Array, "n"]
) -> tuple[Bool[Array, "n"], Bool[Array, "n"], Bool[Array, "n"]]:
    """Positive (teacher right, student wrong), negative (the other way round) and neutral: partitions of the baselines.

    Raises:
      ValueError: shapes that do not agree.
    """
    check_alike(z_s, z_t)
    y = _labels(y, z_s)
    s, t = (jnp.asarray(z).argmax(-1) == y for z in (z_s, z_t))
    return t & ~s, s & ~t, s == t


# --------------------------------------------------------------------------------------------------------------- losses


def xe_kl_loss(
    z_s: Float[Array, "n C"],
    targets: Float[Array, "n C"],
    y: Int[Array, "n"],
    alpha: Any = 0.5,
    T: Any = 1.0,
    *,
    topk: int | None = None,
    mask: Bool[Array, "n"] | None = None,
    released: bool = False,
) -> Float[Array, ""]:
    """α L + (1 - α) cross-entropy of the labels: the paper's XE-KL (0.5), the KL part of XE-KL+MCL (0.68).

    Args:
      z_s, targets, y: as above.
      alpha: α in [0, 1]; may be traced.
      T: of L alone.
      topk: L over the classes of the largest targets only, so many.
      mask: of L alone (XE-KL+MCL leaves out negative flips).
      released: the cross-entropy of the reference's code, of softmax(softmax(z)).

    Raises:
      ValueError: shapes that do not agree, or `topk` out of 1 to C.
    """
    check_alike(z_s, targets)
    few_s, few_t = (z_s, targets) if topk is None else top_classes(targets, topk, z_s, targets)
    outputs = jax.nn.softmax(z_s, -1) if released else z_s
    log_p = jax.nn.log_softmax(outputs, -1)
    xe = -jnp.take_along_axis(log_p, _labels(y, z_s)[:, None], -1)[:, 0].mean()
    alpha = jnp.asarray(alpha, xe.dtype)
    return alpha * kl_loss(few_s, few_t, T, mask=mask) + (1 - alpha) * xe


def top_classes(z: Float[Array, "n C"], k: int, *logits: Float[Array, "n C"]) -> tuple[Float[Array, "n k"], ...]:
    """Of each of `logits`, those of the k classes with the largest z, example by example.

    Raises:
      ValueError: k out of 1 to C.
    """
    if not 1 <= k <= jnp.shape(z)[-1]:
        raise ValueError(f"topk {k} of {jnp.shape(z)[-1]} classes")
    where = lax.top_k(jnp.asarray(z), k)[1]
    return tuple(jnp.take_along_axis(jnp.asarray(x), where, -1) for x in logits)


def ema_update(slow: PyTree, fast: PyTree, tau: Any) -> PyTree:
    """τ slow + (1 - τ) fast, of all leaves: the weights that XE-KL+MCL answers with (τ = 0.9999 in the reference)."""
    return jax.tree.map(lambda a, b: jnp.asarray(tau, a.dtype) * a + (1 - jnp.asarray(tau, a.dtype)) * b, slow, fast)


# -------------------------------------------------------------------------------------------------------------- metrics


class Flips(NamedTuple):
    """In percent of the examples."""

    positive: Float[Array, ""]  # ρ_pos: a wrong, b right
    negative: Float[Array, ""]  # ρ_neg: a right, b wrong


class Transferred(NamedTuple):
    """What a student gained from a teacher; all in percent of the examples but for the rate."""

    delta: Float[Array, ""]  # accuracy after less before: gain - loss
    gain: Float[Array, ""]  # wrong before, right after
    loss: Float[Array, ""]  # right before, wrong after
    complementary: Float[Array, ""]  # ρ_pos: what there was to gain, teacher right and student wrong before
    rate: Float[Array, ""]  # gained in the classes where there was something to gain, in percent of that; 0 of nothing


def flips(pred_a: Int[Array, "n"], pred_b: Int[Array, "n"], y: Int[Array, "n"]) -> Flips:
    """How much b knows that a does not, and the other way round; their difference is b's accuracy less a's.

    Raises:
      ValueError: lengths that differ, or no examples.
    """
    a, b = (x == jnp.asarray(y) for x in _equally_many(pred_a, pred_b, y)[:2])
    return Flips(_percent(b & ~a), _percent(a & ~b))


def transfer_metrics(
    before: Int[Array, "n"], after: Int[Array, "n"], teacher: Int[Array, "n"], y: Int[Array, "n"], classes: int
) -> Transferred:
    """Of predictions: the student's before and after, and the teacher's.

    Raises:
      ValueError: lengths that differ, or no examples.
    """
    before, after, teacher, y = _equally_many(before, after, teacher, y)
    r0, r1, rt = before == y, after == y, teacher == y
    own = jax.nn.one_hot(y, classes, dtype=jnp.float32)
    count = lambda x: (own * x.astype(jnp.float32)[:, None]).sum(0)
    there = count(rt & ~r0)
    got = jnp.where(there > 0, count(r1 & ~r0), 0).sum()
    gain, loss = _percent(r1 & ~r0), _percent(r0 & ~r1)
    return Transferred(gain - loss, gain, loss, _percent(rt & ~r0), 100 * got / jnp.maximum(there.sum(), 1))


def success_rate(deltas: Float[Array, "pairs"]) -> Float[Array, ""]:
    """Percent of student-teacher pairs of which the student gained."""
    return _percent(jnp.asarray(deltas) > 0)


# ------------------------------------------------------------------------------------------------------------- transfer


def transfer(
    apply_fn: Callable[[PyTree, PyTree], Float[Array, "b C"]],
    optimiser: optax.GradientTransformation,
    params: PyTree,
    x: PyTree,
    z_teachers: Float[Array, "K n C"],
    rows: Int[Array, "steps b"],
    y: Int[Array, "n"] | None = None,
    *,
    T: Any = 1.0,
) -> tuple[PyTree, Float[Array, "steps"], Float[Array, "steps"]]:
    """KL+DP from all teachers at once, as one scan; one teacher is K = 1.

    Args:
      apply_fn: the student; static, without randomness.
      optimiser: static. The reference's is SGD, momentum 0.9, of a very small rate: a large one destroys any student.
      params: the student's, its start and its frozen copy.
      x: the examples, leaves (n, ...).
      z_teachers: the teachers' logits on them, made once.
      rows: the examples of each step.
      y: labels, or None for the unsupervised partition.
      T: temperature; may be traced.

    Returns:
      The new parameters, and of each step its loss and the share of examples that a teacher had.

    Raises:
      ValueError: shapes that do not agree.
    """

    def loss(new: Any, rows: Any) -> Any:
        some = jax.tree.map(lambda x: x[rows], x)
        targets, source = dp_targets(z_teachers[:, rows], apply_fn(params, some), None if y is None else y[rows])
        return kl_loss(apply_fn(new, some), targets, T), (source >= 0).mean()

    x, z_teachers, y = jax.tree.map(jnp.asarray, (x, z_teachers, y))
    if z_teachers.ndim != 3:
        raise ValueError(f"teachers' logits {z_teachers.shape}: expected (K, n, C)")
    new, (losses, shares) = descend(loss, params, optimiser, rows, has_aux=True)
    return new, losses, shares


def sequential(
    apply_fn: Callable[[PyTree, PyTree], Float[Array, "b C"]],
    optimiser: optax.GradientTransformation,
    params: PyTree,
    x: PyTree,
    z_teachers: Float[Array, "K n C"],
    rows: Int[Array, "K steps b"],
    y: Int[Array, "n"] | None = None,
    *,
    T: Any = 1.0,
) -> tuple[PyTree, Float[Array, "K steps"], Float[Array, "K steps"]]:
    """`transfer` from one teacher after another, in the order given; each finds the student that the last one left.

    Returns:
      The student after each teacher (leaves (K, ...)), the losses and the shares. Arguments and errors as in `transfer`.
    """

    def one(params: Any, teacher: Any) -> Any:
        z, rows = teacher
        new, losses, shares = transfer(apply_fn, optimiser, params, x, z[None], rows, y, T=T)
        return new, (new, losses, shares)

    return lax.scan(one, params, (jnp.asarray(z_teachers), jnp.asarray(rows)))[1]


def order_of(z_teachers: Float[Array, "K n C"], y: Int[Array, "n"], *, descending: bool = False) -> Int[Array, "K"]:
    """The teachers by their accuracy, the worst first as in the reference."""
    right = (jnp.asarray(z_teachers).argmax(-1) == jnp.asarray(y)).mean(-1)
    return jnp.argsort(-right if descending else right)


# ------------------------------------------------------------------------------------------------------------- the parts


def _labels(y: Any, z: Any) -> Array:
    y = jnp.asarray(y)
    if y.shape != jnp.shape(z)[:1]:
        raise ValueError(f"labels of shape {y.shape} for logits of shape {jnp.shape(z)}: expected ({jnp.shape(z)[0]},)")
    return y


def _equally_many(*arrays: Any) -> tuple[Array, ...]:
    shapes = {jnp.shape(x) for x in arrays}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or not next(iter(shapes))[0]:
        raise ValueError(f"predictions and labels of shapes {sorted(shapes)}: expected (n,) each, n at least 1")
    return tuple(map(jnp.asarray, arrays))


def _percent(x: Any) -> Array:
    return 100 * x.astype(jnp.float32).mean()
