"""DARE: Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch (Yu et al., ICML
2024, arXiv:2311.03099).

Entries of a task vector are dropped at random and the others rescaled, so that its expectation is what it was; then any
merge:

    z ~ Bernoulli(p),    tau' = (1 - z) * tau / (1 - p),    E tau' = tau,  Var tau' = tau^2 p / (1 - p)

Reference code: yule-BUAA/MergeLM @6d49ad9 (model_merging_methods/mask_weights_utils.py). mergekit's `dare_*` with
`rescale` fit the L1 norm of each tensor instead of dividing by 1 - p, which is not this method.

Letters: T models.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Key, PyTree

from jaxpeft import trees
from jaxpeft.merge.registry import register_merge
from jaxpeft.merge.stack import check_range, deltas, from_base, joined, widened
from jaxpeft.merge.task_arithmetic import task_arithmetic
from jaxpeft.method import site_key

__all__ = ["dare", "dropped"]

Params = PyTree


def dropped(key: Key[Array, ""], taus: PyTree, p: Any) -> PyTree:
    """Task vectors, leaves (T, *shape), with entries dropped and the rest rescaled; every task and leaf has draws of
    its own.

    Args:
      key: of the draws.
      taus: the task vectors.
      p: how probably an entry is dropped; may be traced. At 1 all are.
    """
    keep = 1 - jnp.asarray(p, jnp.float32)
    scale = jnp.where(keep > 0, 1 / jnp.where(keep > 0, keep, 1), 0)

    def leaf(path: Any, tau: Array) -> Array:
        own = site_key(key, trees.path_string(path))
        keys = jax.vmap(lambda t: jax.random.fold_in(own, t))(jnp.arange(tau.shape[0]))
        stays = jax.vmap(lambda k: jax.random.bernoulli(k, keep, tau.shape[1:]))(keys)
        return jnp.where(stays, tau * scale.astype(tau.dtype), jnp.zeros((), tau.dtype))

    return jtu.tree_map_with_path(leaf, taus)


@register_merge(
    paper="Yu et al., ICML 2024", needs_base=True, needs_key=True, hyper={"p": (0.0, 0.99)}, symmetric=False
)
def dare(
    base: Params,
    models: PyTree,
    *,
    key: Key[Array, ""],
    p: Any = 0.9,
    combine: Callable[..., Params] = task_arithmetic,
    exclude: trees.Pattern | None = None,
    **hyper: Any,
) -> Params:
    """Drops most of every task vector at random, rescales the rest, and merges by any other method.

    Args:
      base: theta0.
      models: T fine-tuned models, a list or a stack. Their places choose their draws.
      key: of the draws.
      p: the probability of dropping an entry, 0 to 1 (0.8 to 0.99 in the paper).
      combine: the merge, `(base, models, **hyper) -> params`: `ties`, `uniform_soup`, ...
      exclude: pattern of leaves that stay the base's.
      **hyper: what `combine` takes (`alpha`).

    Raises:
      ValueError: p out of range, and what `combine` raises.
      MergeInputError, PatternError: as `split`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> base, models = {"w": jnp.zeros(4)}, [{"w": jnp.ones(4)}]
      >>> sorted(set(dare(base, models, key=jax.random.key(0), p=0.5, alpha=1.0)["w"].tolist()))
      [0.0, 2.0]
    """
    check_range("p", p, 0, 1, ", a probability")
    parts = from_base(base, models, exclude)
    taus = dropped(key, deltas(parts), p)
    wide = jax.tree.map(lambda b, t: widened(b).astype(t.dtype) + t, parts.base, taus)
    # `combine` sees whole models, which a score may run, in float32: small changes would be lost in narrower ones.
    others = jax.tree.map(lambda x: jnp.broadcast_to(x, (parts.size, *jnp.shape(x))), parts.fixed)
    whole = trees.combine(jax.tree.map(widened, parts.base), parts.fixed)
    merged = combine(whole, trees.combine(wide, others), **hyper)
    moving = set(trees.by_path(parts.base))
    return joined(parts, trees.partition(merged, lambda path, _: path in moving)[0])
