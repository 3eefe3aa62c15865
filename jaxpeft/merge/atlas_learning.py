"""Learning the coefficients of aTLAS (Zhang et al., NeurIPS 2024, arXiv:2407.02880): losses, and the fit of lam as one scan.

    addition     sum_t CE_t, one batch of every task through the same encoder, each with its own frozen head
    negation     - CE of the task to forget + CE of a control task
    few-shot     CE on a few examples; the task's own vector must not be among the T
    test time    UFM, unsupervised FixMatch: weak and strong views x_w, x_s of unlabelled examples,
                     q = softmax(f(x_w)), constant; for trusted examples, the one-hot initial prediction instead
                     w = 1[max q > 0.99],   loss = sum w CE(f(x_s), q) / max(sum w, 1)
    R            0.5 mean_l |lam_{.,l}|_p, p = 1 or 2, over tasks in each block; the authors' default is none

AdamW with decay 0.1 on lam, which pulls towards the base and is part of the method, gradients clipped at 1. Rates: 1e-3,
constant, for addition, negation and UFM, and 1e-1 with a cosine for few-shot and full data (CLIP, 8 to 22 task vectors).

    learn = lambda lam, batch: addition_loss(run(compose(base, vectors, lam), batch[0]), batch[1])
    fit = fit_lam(learn, init_lam(base, 8), batches, adamw(1e-3), steps=2000, every=100)
    scores = jax.lax.map(lambda lam: validate(compose(base, vectors, lam)), fit.path)
    best = jax.tree.map(lambda x: x[best_epoch(scores)], fit.path)

Reference code: fredzzhang/atlas @557d7fb (src/learn_*.py). Departures: the released UFM takes every example for trusted (an
index of the last class alone) and its sharpening is none, so that it is self-training on the initial predictions, which is
`mode="released"`; the sum of w has a floor of 1, where the code gives NaN; batches of two streams draw with replacement.

Letters: T task vectors or tasks, b batch, C classes, n examples, e epochs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxpeft.merge.stack import check_range

__all__ = [
    "Fit",
    "Trusted",
    "adamw",
    "addition_loss",
    "best_epoch",
    "best_negation",
    "fit_lam",
    "multi_head",
    "negation_loss",
    "regulariser",
    "trusted_set",
    "two_streams",
    "ufm_loss",
]

Lam = Any


# -------------------------------------------------------------------------------------------------------------- losses


def regulariser(lam: Lam, p: int = 2, weight: float = 0.5) -> Float[Array, ""]:
    """R = weight * mean over blocks of the p-norm over tasks. Its gradient at 0, where lam starts, is 0.

    Raises:
      ValueError: another p than 1 and 2.
    """
    if p not in (1, 2):
        raise ValueError(f"p={p}: expected 1 or 2")
    columns = jnp.concatenate([x.reshape(x.shape[0], -1) for x in jax.tree.leaves(lam)], axis=1)
    if p == 1:
        return weight * (columns * jnp.sign(columns)).sum(0).mean()  # abs has slope 1 at 0
    square = jnp.square(columns).sum(0)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)  # sqrt has no slope at 0
    return weight * norm.mean()


def multi_head(
    encode: Callable[[PyTree, Any], Float[Array, "n d"]], heads: Sequence[Callable[[Float[Array, "b d"]], Array]]
) -> Callable[[PyTree, Sequence[Any]], list[Array]]:
    """`(params, inputs of each task) -> logits of each task`: all tasks in one call of the encoder.

    Args:
      encode: `(params, inputs) -> features`.
      heads: one function of features a task; they may have different classes, and tasks different numbers of inputs.
    """

    def run(params: PyTree, inputs: Sequence[Any]) -> list[Array]:
        if len(inputs) != len(heads):
            raise ValueError(f"inputs of {len(inputs)} tasks for {len(heads)} heads")
        sizes = [len(jax.tree.leaves(x)[0]) for x in inputs]
        features = encode(params, jax.tree.map(lambda *x: jnp.concatenate(x), *inputs))
        cuts = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
        return [head(x) for head, x in zip(heads, jnp.split(features, cuts))]

    return run


def _cross_entropy(logits: Float[Array, "b C"], labels: Int[Array, "b"]) -> Float[Array, "b"]:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def addition_loss(logits: Sequence[Array], labels: Sequence[Array]) -> Float[Array, ""]:
    """The sum over tasks of the mean cross-entropy: logits (b, C_t) and labels (b,) of each."""
    return sum((_cross_entropy(x, y).mean() for x, y in zip(logits, labels, strict=True)), jnp.zeros(()))


def negation_loss(
    target: tuple[Float[Array, "b C"], Int[Array, "b"]], control: tuple[Float[Array, "c K"], Int[Array, "c"]]
) -> Float[Array, ""]:
    """Ascent on the task to forget, descent on the control: (logits, labels) of both."""
    return _cross_entropy(*control).mean() - _cross_entropy(*target).mean()


def ufm_loss(
    weak: Float[Array, "b C"],
    strong: Float[Array, "b C"],
    trusted: Bool[Array, "b"],
    labels: Int[Array, "b"],
    threshold: Any = 0.99,
    mode: Literal["intended", "released"] = "intended",
) -> Float[Array, ""]:
    """Unsupervised FixMatch; see the module.

    Args:
      weak, strong: logits of the two views. No gradient goes through the weak one.
      trusted: of `trusted_set`.
      labels: initial predictions; read where trusted.
      threshold: an example counts where its target's largest probability is above.
      mode: "released" takes every example for trusted, as the authors' code does in effect.

    Raises:
      ValueError: an unknown mode.
    """
    if mode not in ("intended", "released"):
        raise ValueError(f"mode {mode!r}: expected 'intended' or 'released'")
    strong = strong.astype(jnp.float32)
    if mode == "released":
        return _cross_entropy(strong, labels).mean()
    guess = jax.lax.stop_gradient(jax.nn.softmax(weak.astype(jnp.float32), axis=-1))
    target = jnp.where(trusted[:, None], jax.nn.one_hot(labels, weak.shape[-1], dtype=guess.dtype), guess)
    counts = (target.max(-1) > threshold).astype(guess.dtype)
    each = -(target * jax.nn.log_softmax(strong, axis=-1)).sum(-1)
    return (counts * each).sum() / jnp.maximum(counts.sum(), 1)


class Trusted(NamedTuple):
    """Unlabelled examples with what the base predicts of them.

    Attributes:
      chosen: which are trusted.
      labels: the initial prediction of each example.
    """

    chosen: Bool[Array, "n"]
    labels: Int[Array, "n"]


def trusted_set(logits: Float[Array, "n C"], most: int = 100) -> Trusted:
    """For every class the k examples with the highest initial probability of it, k = min(floor(n / (10 C)), most).

    An example that is among the best of a class and yet predicted as another keeps its prediction as label, as in the
    authors' code.

    Args:
      logits: of the base (lam = 0) on all examples.

    Raises:
      ValueError: fewer than 10 examples a class: k would be 0.
    """
    n, classes = logits.shape
    k = min(n // (10 * classes), most)
    if k < 1:
        raise ValueError(f"{n} examples of {classes} classes: a trusted one a class takes 10 examples a class or more")
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    _, rows = jax.lax.top_k(probabilities.T, k)
    return Trusted(jnp.zeros(n, bool).at[rows.ravel()].set(True), probabilities.argmax(-1).astype(jnp.int32))


def two_streams(key: Key[Array, ""], trusted: Bool[Array, "n"], steps: int, batch: int) -> Int[Array, "steps batch"]:
    """Rows of batches, a quarter of them trusted and the others not, each drawn with replacement.

    Raises:
      ValueError: a batch that has no quarter.
    """
    if batch < 4 or batch % 4:
        raise ValueError(f"a batch of {batch}: expected a multiple of 4")
    few, many = jax.random.split(key)
    draw = lambda key, mask, size: jax.random.choice(key, mask.shape[0], (steps, size), p=mask / mask.sum())
    others = draw(many, ~trusted, batch - batch // 4)
    return jnp.concatenate([others, draw(few, trusted, batch // 4)], axis=1)


# ------------------------------------------------------------------------------------------------------------ learning


def adamw(rate: Any, decay: Any = 0.1, clip: Any = 1.0) -> optax.GradientTransformation:
    """What the paper learns lam with. Numbers may be traced; `rate` may be an optax schedule."""
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(rate, weight_decay=decay))


class Fit(NamedTuple):
    """What `fit_lam` gives.

    Attributes:
      lam: after the last step.
      path: leaves (e + 1, ...), lam at the start and after every epoch: coefficients are few, so that all are kept and
        the choice among them is a function of scores.
      losses: (steps,), before each step.
    """

    lam: Lam
    path: Lam
    losses: Float[Array, "steps"]


def fit_lam(
    loss_fn: Callable[[Lam, Any], Float[Array, ""]],
    lam: Lam,
    batches: PyTree,
    optimiser: optax.GradientTransformation,
    *,
    steps: int,
    every: int | None = None,
) -> Fit:
    """Learns coefficients by gradient descent, as one scan. `vmap` over what the optimiser or the batches are made of
    (rates, decays, keys) learns many side by side.

    Args:
      loss_fn: `(lam, batch) -> scalar`: a loss of `compose(base, vectors, lam)`, and R where wanted.
      lam: the start, of `init_lam`.
      batches: leaves (n, ...); step i sees batch i mod n. Rows to gather are batches too.
      optimiser: `adamw(...)`, or any of optax.
      steps: how many.
      every: steps of an epoch, which divide `steps`; None for one epoch.

    Raises:
      ValueError: no step, epochs that do not fill `steps`, or batches of different number.
    """
    every = steps if every is None else every
    if steps < 1 or every < 1 or steps % every:
        raise ValueError(f"{steps} steps, every={every}: expected whole epochs, of one step or more")
    sizes = {x.shape[0] for x in jax.tree.leaves(batches)}
    if len(sizes) != 1:
        raise ValueError(f"batches whose first axes have sizes {sorted(sizes)}: expected one number of batches")
    count, batches = sizes.pop(), jax.tree.map(jnp.asarray, batches)

    def step(state: Any, i: Array) -> tuple[Any, Array]:
        lam, moments = state
        value, grads = jax.value_and_grad(loss_fn)(lam, jax.tree.map(lambda x: x[i % count], batches))
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its count of steps
            updates, moments = optimiser.update(grads, moments, lam)
            return (optax.apply_updates(lam, updates), moments), value

    def epoch(state: Any, at: Array) -> tuple[Any, Any]:
        state, losses = jax.lax.scan(step, state, at)
        return state, (state[0], losses)

    order = jnp.arange(steps).reshape(-1, every)
    (last, _), (path, losses) = jax.lax.scan(epoch, (lam, optimiser.init(lam)), order)
    whole = jax.tree.map(lambda x, xs: jnp.concatenate([jnp.asarray(x)[None], xs]), lam, path)
    return Fit(last, whole, losses.ravel())


def best_epoch(scores: Float[Array, "e"]) -> Int[Array, ""]:
    """The epoch with the best validation score (the mean normalised accuracy, for addition); the first of equal ones.

    Args:
      scores: of `Fit.path`, the start included; NaN is never chosen.
    """
    return jnp.argmax(jnp.where(jnp.isnan(scores), -jnp.inf, scores))


def best_negation(target: Float[Array, "e"], control: Float[Array, "e"], keep: Any = 0.95) -> Int[Array, ""]:
    """The epoch that forgets most: the lowest target score before the control first falls under `keep` of its start.

    Args:
      target, control: scores of `Fit.path`, the start (lam = 0) first; the start is the answer where no epoch will do.
      keep: 0 to 1.

    Raises:
      ValueError: `keep` out of range.
    """
    check_range("keep", keep, 0, 1)
    allowed = jnp.cumprod(control >= keep * control[0]) > 0
    return jnp.argmin(jnp.where(allowed & ~jnp.isnan(target), target, jnp.inf).at[0].set(target[0]))
