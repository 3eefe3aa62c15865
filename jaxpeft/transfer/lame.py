"""LAME: Laplacian adjusted maximum likelihood, test-time adaptation of outputs alone (Boudiaf et al., CVPR 2022).

The network stays as it is. In each batch of the stream the probabilities q are moved so that examples with similar
features agree, by a few fixed-point steps; nothing is carried to the next batch.

    F(Z) = Σ_i KL(z_i ‖ q_i) - λ/2 Σ_ij w_ij z_iᵀ z_j            rows z_i on the simplex
    Z⁽⁰⁾ = q,      Z⁽ⁿ⁺¹⁾ = softmax(log(q + 1e-10) + λ W Z⁽ⁿ⁾)     all rows at once

Where W is symmetric and positive semi-definite, each step minimises a tight upper bound of F, which therefore never rises
(concave-convex procedure). Letters: N examples of a batch, C classes, d features, n examples of a stream, B batches.

It pays where neighbours in the stream share labels and where C is large against N. On shuffled streams it can only lose,
and a dense W (`rbf`, `linear`) with N over C draws a whole batch to one class: its rows sum to as much as N.

Reference code: fiveai/LAME @ d2e5f63 (src/adaptation/lame.py), from which the factor of W Z (1, not the 2 of the paper's
objective), the 1e-10 and the stop rule are taken. Departures: one's own place is kept out of the neighbours by its index,
not as the first of the sorted distances (the same but for duplicates); a width σ of zero is guarded; the stop rule's
energy has λ once, where the code, at λ other than 1, has its square.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

__all__ = ["Affinity", "Solution", "affinity", "lame", "lame_batch", "lame_predict", "lame_stream", "objective"]

Affinity = Literal["rbf", "knn", "linear"]
FLOOR = 1e-10  # added to q under the logarithm
NARROW = 1e-6  # the smallest width σ


class Solution(NamedTuple):
    """What `lame` found; of a stream, the last three are (B,)."""

    probs: Float[Array, "N C"]  # Z: its argmax is the prediction, its rows are probabilities
    steps: Int[Array, ""]  # updates made
    converged: Bool[Array, ""]  # whether the stop rule held at the last update; False where anything is NaN
    change: Float[Array, ""]  # the largest change of an entry in the last update


def affinity(
    features: Float[Array, "N d"],
    kind: Affinity = "rbf",
    k: int = 5,
    *,
    symmetric: bool = False,
    mask: Bool[Array, "N"] | None = None,
) -> Float[Array, "N N"]:
    """W, how strongly examples should agree, by their features φ, which are brought to length 1 here.

        knn     w_ij = 1 where j is among the k nearest of i, itself left out: not symmetric
        rbf     w_ij = exp(-|φ_i - φ_j|² / 2σ²), σ the mean over i of the k-th smallest of |φ_i - φ_j|, i itself counted
        linear  w_ij = φ_iᵀ φ_j, negative where the features' angle is obtuse

    Args:
      features: the input of the classifier's last layer; all zeros stay so.
      kind: as above.
      k: neighbours, at least 1; fewer where there are fewer. With rbf and k = 1 nobody but duplicates agree. Not used by
        linear.
      symmetric: takes (W + Wᵀ)/2 instead.
      mask: False for padding, which has no weight in any way.

    Returns:
      float32, or float64 of such features. A single example has no neighbours: knn and rbf give it W = 0.

    Raises:
      ValueError: an unknown kind, k below 1, or arrays of other shapes.
    """
    if kind not in get_args(Affinity):
        raise ValueError(f"affinity {kind!r}: expected one of {', '.join(map(repr, get_args(Affinity)))}")
    if k < 1:
        raise ValueError(f"k {k}: an example has at least one neighbour")
    features = jnp.asarray(features)
    if features.ndim != 2 or not features.shape[0]:
        raise ValueError(
            f"features of shape {features.shape}: expected (examples, features), with at least one example"
        )
    n = features.shape[0]
    x = features.astype(_wide(features.dtype))
    valid = _checked(mask, n)
    x = jnp.where(valid[:, None], x, 0)
    squares = jnp.square(x).sum(-1, keepdims=True)
    x = x * lax.rsqrt(jnp.maximum(squares, 1e-24))
    products = jnp.matmul(x, x.T, precision=lax.Precision.HIGHEST)
    if kind == "linear":
        w = products
    else:
        own = jnp.eye(n, dtype=bool)
        lengths = jnp.where(squares > 0, 1, 0).astype(x.dtype)
        # Not by N² d differences. Of duplicates, rounding leaves a tiny number of either sign: it must not become σ.
        d2 = lengths + lengths.T - 2 * products
        d2 = jnp.where(own | (d2 < 16 * jnp.finfo(x.dtype).eps), 0, d2)
        w = _nearest(d2, own, valid, k) if kind == "knn" else _gaussian(d2, valid, k)
    w = (w + w.T) / 2 if symmetric else w
    return jnp.where(valid[:, None] & valid, w, 0)


def objective(
    z: Float[Array, "N C"],
    probs: Float[Array, "N C"],
    w: Float[Array, "N N"],
    *,
    lam: Any = 1.0,
    mask: Bool[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """F(Z) of the module's first lines, over the rows that are not padding. Arguments and errors as in `lame`."""
    log_q, w, valid = _given(probs, w, mask)
    z = jnp.asarray(z).astype(log_q.dtype)
    if z.shape != log_q.shape:
        raise ValueError(f"z of shape {z.shape} with probs of shape {log_q.shape}: expected the same")
    return _energy(z, log_q, _pull(w, z, lam) / 2, valid)


def lame(
    probs: Float[Array, "N C"],
    w: Float[Array, "N N"],
    *,
    lam: Any = 1.0,
    max_steps: int = 100,
    rtol: Any = 1e-8,
    fixed_steps: int | None = None,
    mask: Bool[Array, "N"] | None = None,
) -> Solution:
    """The probabilities of a batch, adjusted; see the module.

    Stops, from the third update on, where |E_n - E_{n-1}| ≤ rtol |E_{n-1}|, with E_n = Σ_i [Σ_c z_ic log(z_ic / q_ic)
    - λ Σ_j w_ij z_j⁽ⁿ⁻¹⁾ᵀ z_i]: in float32 about when nothing changes any more. With a W that is not positive
    semi-definite (knn) there may be no end: then `converged` is False after `max_steps`.

    Args:
      probs: q, rows on the simplex.
      w: W, as from `affinity`, or any other.
      lam: λ; may be traced. 0 changes nothing.
      max_steps: updates at most, 0 or more.
      rtol: of the stop rule; may be traced.
      fixed_steps: exactly so many updates instead, as a scan: for reverse-mode gradients, which JAX does not have of a
        loop of unknown length (forward mode works either way), and for even times.
      mask: False for padding; its rows come back uniform.

    Returns:
      The solution, in float32 or float64.

    Raises:
      ValueError: arrays of shapes that do not fit, or a negative number of steps.

    Example:
      >>> w = affinity(jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), "knn", k=1)
      >>> found = lame(jnp.array([[0.9, 0.1], [0.45, 0.55], [0.3, 0.7]]), w)
      >>> found.probs.argmax(-1).tolist(), bool(found.converged)
      ([0, 0, 1], True)
    """
    for name, count in (("max_steps", max_steps), ("fixed_steps", fixed_steps or 0)):
        if count < 0:
            raise ValueError(f"{name} {count}: there is no negative number of updates")
    log_q, w, valid = _given(probs, w, mask)

    def update(state: Any) -> Any:
        steps, z, last, _, _ = state
        pull = _pull(w, z, lam)
        new = jax.nn.softmax(log_q + pull, -1)
        energy = _energy(new, log_q, pull, valid)
        small = jnp.abs(energy - last) <= jnp.asarray(rtol, energy.dtype) * jnp.abs(last)
        return steps + 1, new, energy, jnp.abs(new - z).max(), (steps >= 2) & small

    start = jax.nn.softmax(log_q, -1)
    zero = jnp.zeros((), log_q.dtype)
    state = (jnp.zeros((), jnp.int32), start, zero + jnp.inf, zero, jnp.zeros((), bool))
    if fixed_steps is not None:
        state, _ = lax.scan(lambda state, _: (update(state), None), state, length=fixed_steps)
    else:
        state = lax.while_loop(lambda state: (state[0] < max_steps) & ~state[4], update, state)
    steps, z, _, change, converged = state
    return Solution(z, steps, converged, change)


def lame_batch(
    probs: Float[Array, "N C"],
    features: Float[Array, "N d"],
    kind: Affinity = "rbf",
    k: int = 5,
    *,
    symmetric: bool = False,
    mask: Bool[Array, "N"] | None = None,
    **options: Any,
) -> Solution:
    """`affinity` of the features, then `lame` with it; `options` are those of `lame`. Errors of both."""
    w = affinity(features, kind, k, symmetric=symmetric, mask=mask)
    return lame(probs, w, mask=mask, **options)


def lame_stream(
    probs: Float[Array, "n C"],
    features: Float[Array, "n d"],
    batch: int,
    kind: Affinity = "rbf",
    k: int = 5,
    **options: Any,
) -> Solution:
    """A stream as its user would see it, `batch` examples at a time in their order; the last batch may be shorter.

    Batches do not depend on each other, so all are adjusted side by side; they need B N² numbers.

    Args:
      probs, features: of the whole stream, in order.
      batch: N, at least 1.
      kind, k: as in `affinity`.
      options: `symmetric`, and those of `lame` but for `mask`.

    Returns:
      Adjusted probabilities (n, C), and for each of the B = ⌈n / N⌉ batches its steps, convergence and last change.

    Raises:
      ValueError: a batch below 1, or as in `affinity` and `lame`.
    """
    if batch < 1:
        raise ValueError(f"batch {batch}: there is at least one example in a batch")
    probs, features = jnp.asarray(probs), jnp.asarray(features)
    if probs.ndim != 2 or features.ndim != 2 or probs.shape[0] != features.shape[0] or not probs.shape[0]:
        raise ValueError(f"probs {probs.shape} and features {features.shape}: expected (n, C) and (n, d), n at least 1")
    n = probs.shape[0]
    cut = lambda x: jnp.pad(x, ((0, -n % batch), (0, 0))).reshape(-1, batch, x.shape[1])
    mask = (jnp.arange(n + -n % batch) < n).reshape(-1, batch)
    one = lambda q, x, mask: lame_batch(q, x, kind, k, mask=mask, **options)
    found = jax.vmap(one)(cut(probs), cut(features), mask)
    return found._replace(probs=found.probs.reshape(-1, probs.shape[1])[:n])


def lame_predict(
    apply_features: Callable[[PyTree, Any], Float[Array, "N d"]],
    apply_head: Callable[[PyTree, Float[Array, "N d"]], Float[Array, "N C"]],
    params: PyTree,
    x: PyTree,
    **options: Any,
) -> Solution:
    """One batch through a network in two parts, adjusted. The network must not itself use statistics of the batch.

    Args:
      apply_features: `(params, x) -> features`, the input of the last layer, after pooling.
      apply_head: `(params, features) -> logits`, the last layer.
      params: the frozen network's.
      x: the batch, as `apply_features` takes it.
      options: those of `lame_batch`.

    Raises:
      ValueError: as in `affinity` and `lame`.
    """
    features = apply_features(params, x)
    logits = apply_head(params, features)
    probs = jax.nn.softmax(logits.astype(_wide(logits.dtype)), -1)
    return lame_batch(probs, features, **options)


# ------------------------------------------------------------------------------------------------------------- the parts


def _wide(*dtypes: Any) -> Any:
    return jnp.float64 if jnp.float64 in dtypes else jnp.float32


def _checked(mask: Any, n: int) -> Bool[Array, "N"]:
    if mask is None:
        return jnp.ones(n, bool)
    mask = jnp.asarray(mask)
    if mask.shape != (n,):
        raise ValueError(f"a mask of shape {mask.shape} for {n} examples: expected ({n},)")
    return mask.astype(bool)


def _given(probs: Any, w: Any, mask: Any) -> tuple[Array, Array, Array]:
    """log q, W without padding, and the mask."""
    probs, w = jnp.asarray(probs), jnp.asarray(w)
    if probs.ndim != 2 or not probs.size:
        raise ValueError(f"probs of shape {probs.shape}: expected (examples, classes), with at least one of each")
    n, classes = probs.shape
    if w.shape != (n, n):
        raise ValueError(f"an affinity of shape {w.shape} for {n} examples: expected ({n}, {n})")
    valid = _checked(mask, n)
    dtype = _wide(probs.dtype, w.dtype)
    q = jnp.where(valid[:, None], probs.astype(dtype), 1 / classes)
    return jnp.log(q + FLOOR), jnp.where(valid[:, None] & valid, w.astype(dtype), 0), valid


def _pull(w: Any, z: Any, lam: Any) -> Any:
    return jnp.asarray(lam, z.dtype) * jnp.matmul(w, z, precision=lax.Precision.HIGHEST)


def _energy(z: Any, log_q: Any, pull: Any, valid: Any) -> Any:
    # z log z is 0 at 0; the floor keeps its gradient finite.
    each = z * (jnp.log(jnp.maximum(z, 1e-20)) - log_q - pull)
    return jnp.where(valid[:, None], each, 0).sum()


def _nearest(d2: Any, own: Any, valid: Any, k: int) -> Any:
    """1 for the k nearest of each row, of equally near ones the first."""
    n = d2.shape[0]
    if n == 1:
        return jnp.zeros_like(d2)
    near, where = lax.top_k(-jnp.where(own | ~valid, jnp.inf, d2), min(k, n - 1))
    chosen = jax.nn.one_hot(where, n, dtype=d2.dtype) * jnp.isfinite(near)[..., None].astype(d2.dtype)
    return chosen.sum(1)


def _gaussian(d2: Any, valid: Any, k: int) -> Any:
    n, count = d2.shape[0], valid.sum(dtype=jnp.int32)
    near, _ = lax.top_k(-jnp.where(valid, d2, jnp.inf), min(k, n))
    at = jnp.clip(jnp.minimum(k, count) - 1, 0)
    kth = jnp.where(valid, -near[:, at], 0)
    # The root has no slope at 0, where every example's own distance is.
    kth = jnp.where(kth > 0, jnp.sqrt(jnp.where(kth > 0, kth, 1)), 0)
    sigma = jnp.maximum(kth.sum() / jnp.maximum(count, 1).astype(d2.dtype), NARROW)
    return jnp.where(count > 1, jnp.exp(-d2 / (2 * jnp.square(sigma))), 0)
