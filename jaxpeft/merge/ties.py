"""TIES-Merging: Resolving Interference When Merging Models (Yadav et al., NeurIPS 2023, arXiv:2306.01708).

    1. trim    tau'_t = tau_t at its K D largest entries of all D of the model, 0 elsewhere
    2. elect   s_j = sign(sum_t tau'_tj); where that is 0, the sign of sum_j s_j
    3. merge   tau_j = mean of the tau'_tj with the sign s_j (those that are 0 do not count)
    theta = theta0 + lambda tau

Reference code: prateeky2806/ties-merging @44e7891 (src/utils/merge_utils.py). Departures: exactly floor(K D) entries
stay, where the code keeps all that reach a threshold, one more and ties, and cannot do K = 1; where even the vote of
all entries ends in a draw, entries that cancel stay the base's, where the code takes the negative ones. A K over 1 is
refused, where the code reads a percentage.

Letters: T models.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from jaxpeft import trees
from jaxpeft.merge.registry import register_merge
from jaxpeft.merge.sparsify import Axis, rank_masks, share_of
from jaxpeft.merge.stack import check_range, deltas, from_base, moved

__all__ = ["elected_signs", "ties", "trimmed"]

Params = PyTree
Aggregate = Literal["mean", "sum", "max"]


def trimmed(taus: PyTree, keep: Any, axis: Axis = "global", row: int = -1) -> PyTree:
    """The task vectors, leaves (T, *shape), with all but the share `keep` of their largest entries set to zero."""
    masks = rank_masks(taus, lambda d: (None, share_of(keep, d)), axis, row)
    return jax.tree.map(lambda t, m: jnp.where(m, t, jnp.zeros((), t.dtype)), taus, masks)


def elected_signs(taus: PyTree) -> PyTree:
    """The sign of each entry's sum over tasks, -1 or 1 (int32); where that is zero, the sign that most entries have."""
    signs = jax.tree.map(lambda t: jnp.sign(t.sum(0)).astype(jnp.int32), taus)
    majority = jnp.sign(sum((s.sum(dtype=jnp.int32) for s in jtu.tree_leaves(signs)), jnp.zeros((), jnp.int32)))
    return jax.tree.map(lambda s: jnp.where(s == 0, majority, s), signs)


@register_merge(paper="Yadav et al., NeurIPS 2023", needs_base=True, hyper={"keep": (0.05, 1.0), "alpha": (0.0, 2.0)})
def ties(
    base: Params,
    models: PyTree,
    *,
    keep: Any = 0.2,
    alpha: Any = 1.0,
    agg: Aggregate = "mean",
    axis: Axis = "global",
    row: int = -1,
    exclude: trees.Pattern | None = None,
) -> Params:
    """Trims task vectors, elects a sign for every entry and averages those that agree with it.

    Args:
      base: theta0.
      models: T fine-tuned models, a list or a stack.
      keep: K, the share of entries that stay, 0 to 1: exactly floor(K · D) of D; of equal ones the first.
      alpha: lambda.
      agg: step 3: "mean", "sum", or "max", the largest.
      axis: what is trimmed together: "global", the whole model, as in the paper; each "leaf" or "row" of its own.
      row: the axis along which rows run, for axis="row".
      exclude: pattern of leaves that stay the base's.

    Raises:
      ValueError: `keep` out of range, an unknown `agg` or `axis`.
      MergeInputError, PatternError: as `split`.

    Example:
      >>> import jax.numpy as jnp
      >>> base, models = {"w": jnp.zeros(3)}, [{"w": jnp.array([1.0, 2.0, 0.1])}, {"w": jnp.array([3.0, -1.0, 0.0])}]
      >>> ties(base, models, keep=2 / 3)["w"].tolist()
      [2.0, 2.0, 0.0]
    """
    check_range("keep", keep, 0, 1, ", a share (20 % is 0.2)")
    if agg not in ("mean", "sum", "max"):
        raise ValueError(f"agg {agg!r}: expected 'mean', 'sum' or 'max'")
    parts = from_base(base, models, exclude)
    taus = trimmed(deltas(parts), keep, axis, row)

    def merge(t: Any, s: Any) -> Any:
        s = s.astype(t.dtype)
        agreeing = jnp.where(t * s > 0, t, jnp.zeros((), t.dtype))
        if agg == "max":
            total = jnp.abs(agreeing).max(0) * s
        else:
            total = agreeing.sum(0)
        if agg == "mean":
            total = total / jnp.maximum((agreeing != 0).sum(0), 1).astype(t.dtype)
        return jnp.asarray(alpha).astype(t.dtype) * total

    return moved(parts, jax.tree.map(merge, taus, elected_signs(taus)))
