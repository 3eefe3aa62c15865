"""A small robust teacher for a large pretrained student, after Jain et al. ("Efficiently Robustify Pre-Trained Models", ICCV
2023): few layers of the student are tuned, and it gets three heads, of which one is chosen for each input.

    1. the teacher R is trained on clean and augmented examples              `robust_loss`
    2. the student's chosen leaves and its heads K_c (clean), K_u (augmented, "unclean") and K_m (both) are tuned
         L = mean ℓ(K_c, x) + mean ℓ(K_u, x̃) + ½ [mean ℓ(K_m, x) + mean ℓ(K_m, x̃)]                      `robust_kd_loss`
         ℓ(K, v) = (1 - λ) CE(K(E(v)), y) + λ a(v) τ² KL(softmax(R(v)/τ) ‖ softmax(K(E(v))/τ))
         a(v) = 1 - H(p_R(v)) / log C                                                                   `teacher_weight`
    3. by the heads' mean predictions p over passes with dropout, U their entropies                    `select_head`
         |U_c - U_u| > δ                      the surer of K_c and K_u
         |KL(p_m ‖ p_c) - KL(p_m ‖ p_u)| > ε  whichever of them is nearer to K_m
         else                                 K_m

Verified (abstract, introduction, captions): a small robust teacher and a large student; few layers tuned on augmented data,
the others frozen; two heads beside the student's own; a distillation that heeds uncertainty; the head chosen by uncertainty
and by the KL divergences between heads. Reconstructed (section 4, with all formulas and values, could not be read, and no
code is public): every formula above, which head sees what, and every default below. Each is an argument: `consistency`,
`shares`, `lam`, `tau`, the weights a, `uncertainty`, `rule`. The paper's numbers are not to be expected of it.

Letters: n examples, C classes, d features, P passes; v an input, x a clean one, x̃ an augmented one, y labels; E the
student's encoder. Its tuned leaves are a delta (`full(at=...)`), the heads a small tree beside it. The teacher is worse on
clean inputs than the student: λ = 0 there is a baseline that must be tried. Encoders with batch norm need its statistics
frozen: augmented batches shift them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxpeft import trees
from jaxpeft.distillation import kl_loss
from jaxpeft.transfer.robust_heads import (
    CLEAN,
    COMBINED,
    UNCLEAN,
    Chosen,
    Heads,
    dense,
    each_of,
    entropy,
    head_logits,
    mc_forward,
    predict,
    select_head,
    three_heads,
    uncertainty_of,
)
from jaxpeft.updates import descend

__all__ = [
    "CLEAN",
    "COMBINED",
    "SHARES",
    "UNCLEAN",
    "Chosen",
    "Heads",
    "dense",
    "head_logits",
    "mc_forward",
    "partial_mask",
    "predict",
    "robust_kd_loss",
    "robust_loss",
    "select_head",
    "teacher_weight",
    "three_heads",
    "tune",
    "uncertainty_of",
]

SHARES = ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5))  # of K_c, K_u, K_m: weight of clean and of augmented inputs in L


# --------------------------------------------------------------------------------------------------------------- student


def partial_mask(params: PyTree, at: trees.Pattern | Callable[[str, Array], bool]) -> PyTree:
    """Booleans of the structure of `params`, True where a leaf is tuned, for `optax.masked` and `updates.mask_updates`.

    A delta of the same pattern (`full(at=...)`) trains the same leaves and has no gradients of the others at all.

    Raises:
      PatternError: nothing matches `at`.
    """
    flat = trees.by_path(params)
    if callable(at):
        chosen = {path for path, leaf in flat.items() if at(path, leaf)}
        if not chosen:
            raise trees.PatternError(
                "the predicate chooses no leaf: it gets a path and a leaf, and must be true of some"
            )
    else:
        chosen = set(trees.matches(at, flat))
    return trees.replace_leaves(params, {path: path in chosen for path in flat})


# ---------------------------------------------------------------------------------------------------------------- losses


def robust_loss(
    z: Float[Array, "n C"],
    z_augmented: Float[Array, "K n C"],
    y: Int[Array, "n"],
    *,
    consistency: Any = 12.0,
) -> Float[Array, ""]:
    """Step 1: cross-entropy of the clean and of the first augmented examples, and how far all their answers are apart.

        CE(R(x), y) + CE(R(x̃¹), y) + 12 JSD(R(x), R(x̃¹), ..., R(x̃ᴷ))

    JSD, the mean KL divergence of each from their mean, is AugMix's (with K = 2; there without the second term).

    Args:
      z, z_augmented: logits of the clean examples and of K augmented copies of them.
      consistency: the weight of JSD; may be traced.

    Raises:
      ValueError: shapes that do not agree.
    """
    z, z_augmented = jnp.asarray(z), jnp.asarray(z_augmented)
    if z_augmented.ndim != 3 or z_augmented.shape[1:] != z.shape or not z_augmented.shape[0]:
        raise ValueError(f"logits {z.shape} and, augmented, {z_augmented.shape}: expected (n, C) and (K, n, C)")
    y = each_of("labels", y, len(z))
    cross = optax.softmax_cross_entropy_with_integer_labels
    log_p = jax.nn.log_softmax(jnp.concatenate([z[None], z_augmented]), -1)
    log_mean = jax.nn.logsumexp(log_p, 0) - jnp.log(jnp.asarray(log_p.shape[0], log_p.dtype))
    apart = (jnp.exp(log_p) * (log_p - log_mean)).sum(-1).mean()
    return cross(z, y).mean() + cross(z_augmented[0], y).mean() + jnp.asarray(consistency, apart.dtype) * apart


def teacher_weight(probs: Float[Array, "*P n C"]) -> Float[Array, "n"]:
    """a(v) = 1 - H / log C in [0, 1], of the mean over P passes where there are such; no gradient flows through.

    1 for a one-hot teacher, 0 for one that knows nothing.

    Raises:
      ValueError: not (n, C) or (P, n, C), or a single class.
    """
    probs = lax.stop_gradient(jnp.asarray(probs))
    if probs.ndim not in (2, 3) or probs.shape[-1] < 2:
        raise ValueError(f"probabilities of shape {probs.shape}: expected (n, C) or (P, n, C), of at least two classes")
    mean = probs.mean(0) if probs.ndim == 3 else probs
    return jnp.clip(1 - entropy(mean) / jnp.log(jnp.asarray(probs.shape[-1], mean.dtype)), 0, 1)


def robust_kd_loss(
    z: Heads,
    y: Int[Array, "n"],
    z_teacher: Float[Array, "n C"],
    augmented: Bool[Array, "n"],
    weight: Float[Array, "n"] | float = 1.0,
    lam: Any = 0.5,
    tau: Any = 2.0,
    *,
    shares: Any = SHARES,
) -> Float[Array, ""]:
    """L, on a batch of clean and augmented inputs in any mixture.

    A head's loss is a mean over the clean inputs and one over the augmented ones, times its shares: where a batch has none of
    what a head sees, that head gets no gradient.

    Args:
      z: the three heads' logits (n, C) on all inputs.
      z_teacher: R's logits; no gradient flows through.
      augmented: which inputs are.
      weight: a(v), as from `teacher_weight`; 1 is plain distillation.
      lam: λ in [0, 1], or two: on clean inputs and on augmented ones. 0 is cross-entropy alone. May be traced.
      tau: τ over 0; may be traced.
      shares: (3, 2), weights of clean and augmented inputs of each head (in the order of `Heads`); may be traced. With
        ((0, 0), (0, 0), (0.5, 0.5)) there is one head.

    Raises:
      ValueError: shapes that do not agree.
    """
    z = Heads(*map(jnp.asarray, z))
    z_teacher = jnp.asarray(z_teacher)
    shapes = {x.shape for x in (*z, z_teacher)}
    if len(shapes) != 1 or z_teacher.ndim != 2:
        raise ValueError(f"logits of the heads and the teacher {sorted(shapes)}: expected one shape (n, C)")
    y = each_of("labels", y, len(z_teacher))
    dtype, side = z.clean.dtype, each_of("augmented", augmented, len(y)).astype(jnp.int32)
    lam = jnp.broadcast_to(jnp.asarray(lam, dtype), (2,))[side]
    weight = lax.stop_gradient(jnp.broadcast_to(jnp.asarray(weight, dtype), y.shape))
    shares = jnp.asarray(shares, dtype)
    if shares.shape != (3, 2):
        raise ValueError(f"shares of shape {shares.shape}: expected (3, 2), three heads on clean and augmented inputs")
    # What each input counts in a head's loss: its kind's share over how many there are of the kind.
    kinds = jax.nn.one_hot(side, 2, dtype=dtype)
    counts = kinds @ (shares / jnp.maximum(kinds.sum(0), 1)).T

    def each(z: Array) -> Array:
        apart = jax.vmap(lambda z, r: kl_loss(z[None], r[None], tau))(z, z_teacher)
        cross = optax.softmax_cross_entropy_with_integer_labels(z, y)
        return (1 - lam) * cross + lam * weight * apart

    return sum(((counts[:, i] * each(z)).sum() for i, z in enumerate(z)), jnp.zeros((), dtype))


# ---------------------------------------------------------------------------------------------------------------- tuning


def tune(
    encode: Callable[[PyTree, PyTree], Float[Array, "m d"]],
    teacher: Callable[[PyTree], Float[Array, "m C"]],
    augment: Callable[[Key[Array, ""], PyTree], PyTree],
    optimiser: optax.GradientTransformation,
    delta: PyTree,
    heads: Heads,
    x: PyTree,
    y: Int[Array, "n"],
    rows: Int[Array, "steps b"],
    key: Key[Array, ""],
    *,
    weigh: Callable[[Float[Array, "m C"], PyTree, Key[Array, ""]], Any] | None = None,
    lam: Any = 0.5,
    tau: Any = 2.0,
    shares: Any = SHARES,
    dropout: Any = 0.1,
    apply_head: Callable[[PyTree, Array], Array] = dense,
) -> tuple[PyTree, Heads, Float[Array, "steps"]]:
    """Step 2 as one scan: at each step the examples of its rows, clean and augmented anew.

    Under `vmap` over coefficients or deltas, frozen layers before the tuned ones and the teacher run once for all.

    Args:
      encode: `(delta, inputs) -> features`, the student with its frozen parameters inside.
      teacher: R, `inputs -> logits`.
      augment: `(key, inputs) -> inputs`.
      optimiser: of the pair (delta, heads).
      delta, heads: what is tuned, at the start.
      x, y: examples (leaves (n, ...)) and labels.
      rows: the examples of each step; a step sees 2 b inputs.
      weigh: `(teacher's logits, inputs, key) -> a`; None for `teacher_weight` of their softmax. For a teacher with dropout,
        of `mc_forward`'s passes.
      lam, tau, shares: as in `robust_kd_loss`.
      dropout: before the heads, while training.
      apply_head: as in `head_logits`.

    Returns:
      The delta and the heads after the last step, and each step's loss.

    Raises:
      ValueError: shapes that do not agree.
    """
    weigh = weigh or (lambda z, inputs, key: teacher_weight(jax.nn.softmax(z, -1)))
    x, y = jax.tree.map(jnp.asarray, (x, y))

    def loss(tuned: Any, at: Any) -> Array:
        rows, key = at
        changed, dropped, weighed = jax.random.split(key, 3)
        clean = jax.tree.map(lambda x: x[rows], x)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), clean, augment(changed, clean))
        labels, augmented = jnp.tile(y[rows], 2), jnp.arange(2 * rows.shape[0]) >= rows.shape[0]
        z_teacher = teacher(both)
        a = weigh(z_teacher, both, weighed)
        z = head_logits(tuned[1], encode(tuned[0], both), dropped, dropout=dropout, apply_head=apply_head)
        return robust_kd_loss(z, labels, z_teacher, augmented, a, lam, tau, shares=shares)

    steps = (jnp.asarray(rows), jax.random.split(key, len(rows)))
    (delta, heads), losses = descend(loss, (delta, heads), optimiser, steps)
    return delta, heads, losses
