"""Editing Models with Task Arithmetic (Ilharco et al., ICLR 2023, arXiv:2212.04089).

A task vector is what fine-tuning changed, tau_t = theta_t - theta0. Tasks are added, forgotten and transferred by
arithmetic:

    addition   theta0 + lambda sum_t tau_t                one lambda by validation, in {0, 0.05, ..., 1}
    negation   theta0 - lambda tau                        the largest lambda that leaves 95 % of a control task's score
    analogy    theta0 + lambda (tau_C + tau_B - tau_A)    alpha=lambda * [-1, 1, 1] for the models A, B, C

A sum, not a mean: lambda = 1 / T of T tasks is their average.

Letters: T models, g values of lambda.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jaxpeft import trees
from jaxpeft.merge.registry import register_merge
from jaxpeft.merge.stack import check_range, deltas, from_base, moved, weighted_sum

__all__ = ["Negation", "negation", "task_arithmetic"]

Params = PyTree
GRID = tuple(i / 20 for i in range(21))


@register_merge(paper="Ilharco et al., ICLR 2023", needs_base=True, hyper={"alpha": (0.0, 1.0)})
def task_arithmetic(base: Params, models: PyTree, *, alpha: Any = 0.4, exclude: trees.Pattern | None = None) -> Params:
    """The base plus the scaled sum of what each fine-tuning changed.

    Args:
      base: theta0.
      models: T fine-tuned models, a list or a stack.
      alpha: lambda, for all or (T,); negative ones forget. The default is a start for two to eight tasks, to be tuned:
        what is right for two is too much for eight.
      exclude: pattern of leaves that stay the base's.

    Raises:
      MergeInputError, PatternError: as `split`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> base, models = {"w": jnp.ones(2)}, [{"w": jnp.zeros(2)}, {"w": jnp.full(2, 3.0)}]
      >>> jax.vmap(lambda a: task_arithmetic(base, models, alpha=a))(jnp.array([0.0, 0.5]))["w"].tolist()
      [[1.0, 1.0], [1.5, 1.5]]
    """
    parts = from_base(base, models, exclude)
    return moved(parts, weighted_sum(deltas(parts), alpha))


class Negation(NamedTuple):
    """What `negation` found.

    Attributes:
      params: theta0 - lambda sum_t tau_t.
      alpha: lambda; 0 where no value kept the control score.
      scores: (g,), the control score at each value of the grid.
      kept: (g,), whether it was high enough.
    """

    params: Params
    alpha: Float[Array, ""]
    scores: Float[Array, "g"]
    kept: Bool[Array, "g"]


def negation(
    base: Params,
    models: PyTree,
    *,
    score_fn: Callable[[Params], Array],
    keep: Any = 0.95,
    grid: Any = GRID,
    exclude: trees.Pattern | None = None,
) -> Negation:
    """Forgets the models' tasks as far as a control task allows: the largest lambda of the grid.

    Args:
      base: theta0.
      models: the models of the tasks to forget, one or several.
      score_fn: `(params) -> scalar`, larger is better and not negative: the control task's accuracy on validation data.
        Traced once, and run for one value after another.
      keep: the share of the base's score that must be left, 0 to 1.
      grid: (g,) values of lambda, 0 or more.
      exclude: as in `task_arithmetic`.

    Raises:
      ValueError: `keep` or the grid out of range.
      MergeInputError, PatternError: as `split`.
    """
    check_range("keep", keep, 0, 1)
    check_range("grid", grid, 0, np.inf)
    parts = from_base(base, models, exclude)
    total = weighted_sum(deltas(parts), 1.0)
    at = lambda a: moved(parts, jax.tree.map(lambda t: -a.astype(t.dtype) * t, total))
    values = jnp.asarray(grid, jnp.float32)
    scores = jax.lax.map(lambda a: score_fn(at(a)), values)
    kept = scores >= keep * score_fn(at(jnp.zeros(())))
    alpha = jnp.max(jnp.where(kept, values, 0.0))
    return Negation(at(alpha), alpha, scores, kept)
