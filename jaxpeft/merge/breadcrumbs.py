"""Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks (Davari and Belilovsky, ECCV 2024,
arXiv:2312.06795).

Of each task vector tau_t = theta_t - theta0 both tails of |tau| are set to zero, the many negligible changes and the
few outliers; what stays in the middle is summed:

    theta = theta0 + alpha sum_t m_t * tau_t,      m = 1 where n_top <= rank < n_top + n_keep,
    n_top = floor(d drop_top),  n_keep = floor(d keep),    rank 0 is the largest |tau| of the d that are ranked together

Names: the paper's beta is the share removed at the bottom and its gamma that at the top; the code's beta is the share
kept; mergekit's density is the share kept and its gamma that removed at the top. Here: `keep` and `drop_top`.

What is ranked together is a layer in the paper (axis="leaf", the default), in the code each row of the last axis
(axis="row"), and may be the whole model ("global"). Rows of torch's (out, in) kernels run over inputs, which is `row=0`
for (in, out) kernels. Rows of fewer than 1 / drop_top entries lose no outlier and those of fewer than 1 / keep lose all
(convolutions).

Reference code: rezazzr/breadcrumbs @f89fc66 (src/task_vectors.py, TaskVectorMiddleKeep). Departures: of equal
magnitudes the first counts as larger, and `share_of` takes 100 * 0.29 for 29, where torch's order and Python's rounding
are by chance.

Letters: T models, d entries that are ranked together.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxpeft import trees
from jaxpeft.merge.registry import register_merge
from jaxpeft.merge.sparsify import Axis, rank_masks, share_of
from jaxpeft.merge.stack import check_range, deltas, from_base, moved, weighted_sum

__all__ = ["breadcrumbs", "middle_masks"]

Params = PyTree


def middle_masks(
    taus: PyTree, keep: Any, drop_top: Any, *, axis: Axis = "leaf", remove_first: bool = True, row: int = -1
) -> PyTree:
    """True at the entries that stay, of task vectors with leaves (T, *shape); arguments as in `breadcrumbs`.

    min(n_keep, d - n_top) of d stay, or max(n_keep - n_top, 0) with `remove_first` off.
    """

    def bounds(d: int) -> tuple[Any, Any]:
        top, kept = share_of(drop_top, d), share_of(keep, d)
        return top, kept + jnp.minimum(top, d - kept) if remove_first else kept

    return rank_masks(taus, bounds, axis, row)


@register_merge(
    paper="Davari and Belilovsky, ECCV 2024",
    needs_base=True,
    hyper={"alpha": (0.01, 1.0), "keep": (0.05, 0.2), "drop_top": (0.001, 0.01)},
)
def breadcrumbs(
    base: Params,
    models: PyTree,
    *,
    keep: Any = 0.15,
    drop_top: Any = 0.006,
    alpha: Any = 0.2,
    axis: Axis = "leaf",
    remove_first: bool = True,
    row: int = -1,
    exclude: trees.Pattern | None = None,
) -> Params:
    """The base plus the scaled sum of task vectors without their smallest and largest entries.

    Args:
      base: theta0.
      models: T fine-tuned models, a list or a stack.
      keep: the share of entries that stay, 0 to 1; may be traced, as the next two.
      drop_top: the share of the largest entries that go, 0 to 1.
      alpha: of the sum; (T,) for one a task.
      axis: what is ranked together, see the module. Leaves without axes stay whole.
      remove_first: take the outliers out and keep the largest of the rest (the code's default), or keep the largest and
        take the outliers out of them, which leaves fewer.
      row: the axis along which rows run, for axis="row".
      exclude: pattern of leaves that stay the base's.

    Raises:
      ValueError: a share out of range, an unknown `axis`.
      MergeInputError, PatternError: as `split`.

    Example:
      >>> import jax.numpy as jnp
      >>> base, models = {"w": jnp.zeros(4)}, [{"w": jnp.array([8.0, 4.0, 2.0, 1.0])}]
      >>> breadcrumbs(base, models, keep=0.5, drop_top=0.25, alpha=1.0)["w"].tolist()
      [0.0, 4.0, 2.0, 0.0]
    """
    check_range("keep", keep, 0, 1)
    check_range("drop_top", drop_top, 0, 1)
    parts = from_base(base, models, exclude)
    taus = deltas(parts)
    masks = middle_masks(taus, keep, drop_top, axis=axis, remove_first=remove_first, row=row)
    left = jax.tree.map(lambda t, m: jnp.where(m, t, jnp.zeros((), t.dtype)), taus, masks)
    return moved(parts, weighted_sum(left, alpha))
