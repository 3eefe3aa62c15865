"""Pieces of optimisers that sparse and masked methods need, as optax transformations."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxpeft import trees

__all__ = ["anchor_l1", "descend", "mask_updates", "relative_rates"]


def mask_updates(mask: PyTree) -> optax.GradientTransformation:
    """Updates where `mask` is true, zero elsewhere. The last of a chain: masked gradients would still decay, and move
    by stale momentum, what should stay.

    Args:
      mask: a tree whose structure is a prefix of the updates', of booleans or floats (0 and 1) that broadcast to them; may
        be traced, so that a population of masks is one program under `vmap`.
    """

    def init(params: PyTree) -> optax.EmptyState:
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        def part(m: Array, own: PyTree) -> PyTree:
            return jax.tree.map(lambda u: jnp.where(jnp.asarray(m) != 0, u, jnp.zeros_like(u)), own)

        return jax.tree.map(part, mask, updates), state

    return optax.GradientTransformation(init, update)


def relative_rates(rules: Sequence[tuple[trees.Pattern, Any]]) -> optax.GradientTransformation:
    """Updates times the factor of the first rule whose pattern matches their path: several learning rates under one
    schedule. After the optimiser in a chain (Adam's update does not depend on its gradient's scale).

    Args:
      rules: (pattern, factor) pairs; what no pattern matches is left as it is. Factors may be traced.

    Raises:
      PatternError: at `init`, a pattern that matches nothing.
    """

    def init(params: PyTree) -> optax.EmptyState:
        for pattern, _ in rules:
            trees.matches(pattern, trees.by_path(params))
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        def factor(path: str) -> Any:
            return next((f for pattern, f in rules if trees.is_match(pattern, path)), 1.0)

        new = {p: u * jnp.asarray(factor(p), u.dtype) for p, u in trees.by_path(updates).items()}
        return trees.replace_leaves(updates, new), state

    return optax.GradientTransformation(init, update)


def anchor_l1(params: PyTree, anchor: PyTree) -> Array:
    """The sum of |params - anchor| over all leaves, in float32: multiply by lambda / N (N numbers of the whole model)."""
    parts = jax.tree.map(lambda x, y: jnp.abs((x - y).astype(jnp.float32)).sum(), params, anchor)
    return jax.tree.reduce(jnp.add, parts, jnp.zeros(()))


def descend(
    loss: Callable[[PyTree, Any], Any],
    start: PyTree,
    optimiser: optax.GradientTransformation,
    xs: PyTree,
    *,
    has_aux: bool = False,
) -> tuple[PyTree, Any]:
    """A step of gradient descent for each entry of `xs`, as one scan.

    Args:
      loss: `(weights, x) -> scalar`, with `has_aux` a pair of that and more; static.
      start: the weights.
      optimiser: optax; it may hold traced numbers.
      xs: leaves (steps, ...): keys, rows, batches.
      has_aux: as in `jax.grad`.

    Returns:
      The weights after the last step, and each step's loss before it (steps,), with `has_aux` a pair of those and what else
      each step gave.
    """

    def one(state: Any, x: Any) -> Any:
        weights, moments = state
        value, grads = jax.value_and_grad(loss, has_aux=has_aux)(weights, x)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its count of steps
            updates, moments = optimiser.update(grads, moments, weights)
            return (optax.apply_updates(weights, updates), moments), value

    (weights, _), values = jax.lax.scan(one, (start, optimiser.init(start)), xs)
    return weights, values
