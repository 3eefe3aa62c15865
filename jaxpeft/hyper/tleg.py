"""Linear expansion of learngene, TLEG (Xia et al., AAAI 2024): transformers of any depth from two blocks.

What each layer of a trained transformer holds changes about linearly with its depth. So two blocks are kept, and the layers
of a network of L of them lie on the line between:

    θ^(i) = θ_B + (i / L) θ_A,      i = 0 ... L - 1             the last layer's coefficient is (L - 1) / L

Stage 1 trains the two blocks through an auxiliary network tied to that line, by distillation. Stage 2 makes the start of a
network of any depth from them and trains it with nothing tied. Embeddings, final norm and head are passed on as they are.

A *gene* is a tree like the parameters of a model whose layers are stacked (`scan=True`, or `models.stack_layers`): its
stacked leaves have a first axis of K instead of L, for the coefficients (i / L)^0, ..., (i / L)^(K - 1). K = 2 is TLEG, with
θ_B first and θ_A second; K = 1 shares one block among all layers. `scan` runs all depths on one compiled block.

Letters: L layers, K terms, C classes, n examples; a the share of distillation, τ its temperature.

Reference code: AlphaXia/TLEG @ 6e30a5c (modules_with_LE.py, aux_models.py, utils.py, losses.py). Its auxiliary network pools
norm(tokens) and its descendants norm(pooled tokens), with another ε: the same depth is not quite the same function there. A
gene here is expanded for one model, so that it is. Its truncated normals are cut at ±2, a hundred standard deviations.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxpeft import trees
from jaxpeft.distillation import kl_loss
from jaxpeft.hyper.hypernetwork import Hypernetwork, TargetError, as_spec, register_hypernetwork, split_target

__all__ = ["LAYERS", "depth_coefficients", "tleg", "tleg_expand", "tleg_fit", "tleg_kd_loss", "tleg_r2"]

LAYERS = "**/layers/**"
STD = 0.02


def depth_coefficients(depth: int, terms: int = 2) -> Float[Array, "L K"]:
    """(i / L)^k of every layer i and term k.

    Raises:
      ValueError: no layers or no terms.
    """
    if depth < 1 or terms < 1:
        raise ValueError(f"{depth} layers of {terms} terms: there is at least one of each")
    return jnp.vander(jnp.arange(depth) / depth, terms, increasing=True)


def tleg_expand(gene: PyTree, depth: int, *, at: trees.Pattern = LAYERS) -> PyTree:
    """The parameters of a network of `depth` layers.

    Args:
      gene: see the module; the leaves that `at` chooses are (K, *shape), the others stay as they are.
      depth: L, any number over 0; static.
      at: pattern of the layers' leaves.

    Returns:
      A tree of the gene's structure with leaves (L, *shape). It is linear in the gene, layer 0 is the gene's first block, and
      layer 2 i of twice the depth is layer i.

    Raises:
      PatternError: nothing matches `at`. ValueError: no layers.
      TargetError: leaves of different K.
    """
    flat = trees.by_path(gene)
    chosen = trees.matches(at, flat, "parameter")
    terms = _one_size({p: flat[p] for p in chosen})
    line = depth_coefficients(depth, terms)

    def one(x: Array) -> Array:
        wide = trees.wide_dtype(x.dtype)
        return jnp.tensordot(line.astype(wide), x.astype(wide), 1, precision="highest").astype(x.dtype)

    return trees.replace_leaves(gene, {p: one(jnp.asarray(flat[p])) for p in chosen})


def tleg_fit(params: PyTree, *, terms: int = 2, at: trees.Pattern = LAYERS) -> PyTree:
    """The gene next to a network's layers, by least squares entry by entry; `tleg_expand` gives back what is on a line.

    Args:
      params: with stacked layers, leaves (L, *shape).
      terms: K, at most L.

    Raises:
      PatternError: nothing matches `at`. TargetError: leaves of different L.
      ValueError: more terms than layers.
    """
    flat = trees.by_path(params)
    chosen = trees.matches(at, flat, "parameter")
    depth = _one_size({p: flat[p] for p in chosen})
    if terms > depth:
        raise ValueError(f"{terms} terms for {depth} layers: at most one each")
    solve = jnp.linalg.pinv(depth_coefficients(depth, terms))

    def one(x: Array) -> Array:
        wide = trees.wide_dtype(x.dtype)
        return jnp.tensordot(solve.astype(wide), x.astype(wide), 1, precision="highest").astype(x.dtype)

    return trees.replace_leaves(params, {p: one(jnp.asarray(flat[p])) for p in chosen})


def tleg_r2(params: PyTree, gene: PyTree, *, at: trees.Pattern = LAYERS) -> dict[str, Float[Array, ""]]:
    """How much of the layers' variation a gene explains: 1 - Σ(θ - line)² / Σ(θ - mean over layers)², for each leaf."""
    depth = _one_size({p: x for p, x in trees.by_path(params).items() if trees.is_match(at, p)})
    line = trees.by_path(tleg_expand(gene, depth, at=at))

    def one(path: str, x: Array) -> Array:
        around = jnp.square(x - x.mean(0)).sum()
        return 1 - jnp.square(x - line[path]).sum() / jnp.maximum(around, jnp.finfo(x.dtype).tiny)

    return {p: one(p, jnp.asarray(x)) for p, x in trees.by_path(params).items() if trees.is_match(at, p)}


@register_hypernetwork(paper="Xia et al., AAAI 2024")
def tleg(spec: PyTree, *, terms: int = 2, base: PyTree = None, at: trees.Pattern = LAYERS) -> Hypernetwork:
    """The auxiliary network as one whose weights are a gene: `apply(gene)` has the target's depth, `apply(gene, L)` any.

    Args:
      spec: the target's parameters, with stacked layers.
      terms: K.
      base: where given, parameters outside of the layers start from it.
      at: pattern of the layers' leaves.

    Returns:
      A hypernetwork whose weights are a gene. Starts of the reference: kernels N(0, 0.02²) in all terms, norms' scales 1 in
      the first and 0 in the others, biases 0; outside of the layers likewise.

    Raises:
      TargetError: as `split_target`, or leaves of different L. PatternError: nothing matches `at`.
      ValueError: no terms.
    """
    spec = as_spec(spec)
    split_target(spec, base)
    flat = trees.by_path(spec)
    chosen = set(trees.matches(at, flat, "parameter"))
    layers = _one_size({p: flat[p] for p in chosen})
    if terms < 1:
        raise ValueError(f"{terms} terms: there is at least one")
    given = {} if base is None else trees.by_path(base)

    def start(path: str, x: Any, key: Key[Array, ""]) -> Array:
        inner = x.shape[path in chosen :]
        shape = (terms, *inner) if path in chosen else inner
        if path in given and path not in chosen:
            return jnp.asarray(given[path])
        name = path.rpartition("/")[2]
        if name not in ("scale", "bias"):
            return (STD * jax.random.normal(key, shape)).astype(x.dtype)
        one = jnp.full(inner, float(name == "scale"), x.dtype)
        return jnp.zeros(shape, x.dtype).at[0].set(one) if path in chosen else one

    def init(key: Key[Array, ""]) -> PyTree:
        keys = jax.random.split(key, len(flat))
        return trees.replace_leaves(spec, {p: start(p, x, k) for (p, x), k in zip(flat.items(), keys)})

    def apply(gene: PyTree, depth: int = layers) -> PyTree:
        return tleg_expand(gene, depth, at=at)

    return Hypernetwork("tleg", init, apply, spec, {"terms": terms, "at": at})


def tleg_kd_loss(
    student: Float[Array, "n C"],
    teacher: Float[Array, "n C"],
    y: Int[Array, "n"] | None = None,
    *,
    a: Any = 1.0,
    tau: Any = 1.0,
) -> Float[Array, ""]:
    """(1 - a) CE + a τ² Σ KL(softmax(teacher / τ) ‖ softmax(student / τ)) / (n C): over entries, not examples.

    Args:
      student, teacher: logits; no gradient flows into the teacher's.
      y: labels; needed where a is not 1.
      a: in [0, 1]; the released commands use 1, so that labels play no part. May be traced, with labels.
      tau: over 0; may be traced.

    Raises:
      ValueError: shapes that do not agree, or no labels where a is not the number 1.
    """
    soft = kl_loss(student, teacher, tau) / student.shape[-1]
    if y is None:
        if isinstance(a, Tracer) or a != 1:
            raise ValueError("no labels: cross-entropy needs them unless a is 1")
        return soft
    log_p = jax.nn.log_softmax(student, -1)
    hard = -jnp.take_along_axis(log_p, jnp.asarray(y)[:, None], -1).mean()
    return (1 - a) * hard + a * soft


def _one_size(leaves: Any) -> int:
    """The first axis of all of them."""
    sizes = {p: jnp.shape(x)[0] if jnp.ndim(x) else 0 for p, x in leaves.items()}
    if len(set(sizes.values())) != 1:
        told = ", ".join(f"{p} {n}" for p, n in list(sizes.items())[:4])
        raise TargetError(
            f"the layers' first axes differ ({told}): stack them, as scanned models and `stack_layers` do"
        )
    return next(iter(sizes.values()))
