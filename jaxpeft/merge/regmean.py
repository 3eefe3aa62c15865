"""RegMean: Dataless Knowledge Fusion by Merging Weights of Language Models (Jin et al., ICLR 2023, arXiv:2212.09849).

The linear layer whose outputs are nearest, in squares, to every model's own outputs on its own inputs X_i:

    W = (sum_i G_i)^-1 sum_i G_i W_i,      G_i = X_i^T X_i / N_i with its off-diagonal entries multiplied by `scale`

in closed form, from the inputs' second moments alone. Leaves without G are averaged.

Letters: T models, i inputs, o outputs, N examples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import jax.scipy as jsp
from jaxtyping import Array, Float, PyTree

from jaxpeft import trees
from jaxpeft.merge.registry import register_merge
from jaxpeft.merge.stack import MergeInputError, check_range, joined, split, widened

__all__ = ["gram", "regmean"]

Params = PyTree


def gram(x: Float[Array, "*N i"]) -> Float[Array, "i i"]:
    """A layer's inputs' second moments, x^T x / N, in float32 or wider: G."""
    x = widened(x).reshape(-1, jnp.shape(x)[-1])
    return jnp.matmul(x.T, x, precision="highest") / x.shape[0]


@register_merge(paper="Jin et al., ICLR 2023", needs_base=False, needs=("grams",), hyper={"scale": (0.0, 1.0)})
def regmean(
    base: Params | None,
    models: PyTree,
    *,
    grams: Mapping[str, Float[Array, "T i i"]] | Sequence[Mapping[str, Float[Array, "i i"]]],
    scale: Any = 0.9,
    ridge: Any = 1e-6,
    exclude: trees.Pattern | None = None,
) -> Params:
    """Merges linear layers by least squares on their inputs, the rest by averaging.

    Args:
      base: gives dtypes and what is not merged; None for the first model.
      models: T models, a list or a stack.
      grams: `gram` of each model's inputs to each kernel (i, o), by path: of stacks, or one dict a model.
      scale: of the off-diagonal entries, 0 to 1; may be traced. 0 weighs rows by their inputs' energy alone.
      ridge: added to every G's diagonal, relative to its mean: inputs that no example uses are averaged.
      exclude: pattern of leaves that are not merged.

    Raises:
      ValueError: a scale out of range.
      MergeInputError: as `split`; a G that fits no kernel.
      PatternError: as `split`.
    """
    check_range("scale", scale, 0, 1)
    parts = split(base, models, exclude)
    if not isinstance(grams, Mapping):
        if len(grams) != parts.size:
            raise MergeInputError(f"{len(grams)} sets of grams for {parts.size} models: expected one each")
        grams = {p: jnp.stack([g[p] for g in grams]) for p in grams[0]}
    leaves = trees.by_path(parts.models)
    if unknown := sorted(set(grams) - set(leaves)):
        raise MergeInputError(
            f"grams for {unknown[0]!r}, which is no leaf that is merged{trees.near(unknown[0], leaves)}"
        )

    def solved(path: str, w: Float[Array, "T i o"]) -> Float[Array, "i o"]:
        g = grams[path].astype(w.dtype)
        if w.ndim != 3 or g.shape != (*w.shape[:2], w.shape[1]):
            raise MergeInputError(
                f"grams of shape {g.shape} for {path!r}, {w.shape[1:]}: expected an (in, out) kernel's"
            )
        eye = jnp.eye(g.shape[-1], dtype=g.dtype)
        energy = jnp.trace(g, axis1=1, axis2=2)[:, None, None] / g.shape[-1]
        factor = jnp.asarray(scale).astype(g.dtype)
        g = g * (factor + (1 - factor) * eye) + jnp.asarray(ridge).astype(g.dtype) * energy * eye
        # Differences to the mean are solved for: equal models come out as they went in.
        mean = w.sum(0) / parts.size
        right = jnp.einsum("tij,tjo->io", g, w - mean, precision="highest")
        return mean + jsp.linalg.solve(g.sum(0), right, assume_a="pos")

    merged = {p: solved(p, w) if p in grams else w.sum(0) / parts.size for p, w in leaves.items()}
    return joined(parts, trees.replace_leaves(parts.base, merged))
