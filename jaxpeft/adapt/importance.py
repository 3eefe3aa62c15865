"""How much each weight matters, as a tree of the shapes of `params`: what pruning and sparse tuning rank by.

    I = |W|                                          magnitude
    I = Σ_n (∂ loss(params, sample_n) / ∂W)²         squared gradients of single samples: the diagonal Fisher where
                                                     the loss is a negative log-likelihood with the true labels
    I = Σ_b (∂ mean loss of batch b / ∂W)²           the same with batches for samples: SPT's sensitivity

Letters: n samples (or batches), c of them whose gradients are held at once.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxpeft import trees

__all__ = ["magnitude", "sensitivity", "squared_gradients"]


def _wide(x: Array) -> Array:
    return x.astype(trees.wide_dtype(x.dtype))


def magnitude(params: PyTree) -> PyTree:
    """|W| of every leaf, in float32 or wider."""
    return jax.tree.map(lambda w: jnp.abs(_wide(jnp.asarray(w))), params)


def squared_gradients(
    loss_fn: Callable[[PyTree, Any], Array], params: PyTree, samples: PyTree, *, chunk: int = 1
) -> PyTree:
    """The sum over samples of each one's squared gradient: not the square of a batch's gradient.

    Args:
      loss_fn: `(params, sample) -> scalar` of one sample, a leaf of `samples` without its first axis.
      params: leaves that are not floating-point have no gradient and get zeros.
      samples: leaves of shape (n, ...).
      chunk: c, which divides n. More of them are faster and hold c gradients in memory.

    Returns:
      A tree of the structure of `params`, in float32 or wider. Divide by n for the mean.

    Raises:
      ValueError: no samples, or a chunk that does not divide their number.
    """
    n = jax.tree.leaves(samples)[0].shape[0] if jax.tree.leaves(samples) else 0
    if n < 1 or chunk < 1 or n % chunk:
        raise ValueError(
            f"{n} samples in chunks of {chunk}: there must be some, and the chunk must divide their number"
        )
    moving, fixed = trees.partition(params, lambda _, w: jnp.issubdtype(jnp.result_type(w), jnp.inexact))

    def gradient(sample: Any) -> PyTree:
        return jax.grad(lambda m: loss_fn(trees.combine(m, fixed), sample))(moving)

    def add(total: PyTree, part: Any) -> tuple[PyTree, None]:
        grads = jax.vmap(gradient)(part)
        return jax.tree.map(lambda t, g: t + jnp.square(_wide(g)).sum(0), total, grads), None

    parts = jax.tree.map(lambda x: x.reshape(n // chunk, chunk, *x.shape[1:]), samples)
    zero = jax.tree.map(lambda w: jnp.zeros_like(_wide(w)), moving)
    total, _ = lax.scan(add, zero, parts)
    return trees.combine(total, jax.tree.map(lambda w: jnp.zeros(jnp.shape(w), jnp.float32), fixed))


def sensitivity(
    loss_fn: Callable[[PyTree, Any], Array], params: PyTree, batches: Iterable[Any], where: trees.Pattern = "**"
) -> dict[str, Array]:
    """The sum over batches of the squared gradient of each one's loss: SPT's score, Σ_b (∂ L_b / ∂W)².

    What a step of a small rate along the batch's gradient would gain by each weight alone, to first order. Unlike
    `squared_gradients` it takes batches of different shapes (each shape compiles once), and no other leaf's gradient.

    Args:
      loss_fn: `(params, batch) -> scalar`, the mean loss of a batch.
      params: the model's; nothing is updated between batches.
      batches: pytrees of arrays.
      where: pattern of the leaves that are scored; those that are not floating-point are left out.

    Returns:
      `{path: scores}` of the shapes of the leaves, in float32 or wider.

    Raises:
      ValueError: no batches.
      PatternError: nothing matches.
    """
    chosen = set(trees.matches(where, trees.by_path(params), "parameter"))
    inexact = lambda path, w: path in chosen and jnp.issubdtype(jnp.result_type(w), jnp.inexact)
    moving, fixed = trees.partition(params, inexact)

    @jax.jit
    def add(total: PyTree, moving: PyTree, fixed: PyTree, batch: Any) -> PyTree:
        grads = jax.grad(lambda m: loss_fn(trees.combine(m, fixed), batch))(moving)
        return jax.tree.map(lambda t, g: t + jnp.square(_wide(g)), total, grads)

    total, count = jax.tree.map(lambda w: jnp.zeros_like(_wide(w)), moving), 0
    for batch in batches:
        total, count = add(total, moving, fixed, batch), count + 1
    if not count:
        raise ValueError("no batches: a sensitivity is a sum over some")
    return trees.by_path(total)
