"""MemControl: Mitigating Memorization in Diffusion Models via Automated Parameter Selection (WACV 2025).

What a fine-tuned diffusion model memorises grows with what is tuned. So it is searched which blocks of a small delta to train:

    outer   min over masks m in {0,1}^K and rates η of  (Mem(ψ*), FD(ψ*)),  both smaller better
    inner   ψ*(m, η) = train the delta ψ from its start, of block j only where m_j = 1; else it stays at its start, which
            is neutral (δ = 0, γ = 1): the block is not removed
    Mem     ‖ε(z_t, t, c) - ε(z_t, t, ∅)‖ on the training images: large where the condition alone tells what to draw (Wen et
            al., ICLR 2024); the mean over draws of the mean, or the maximum, over images
    FD      the Fréchet distance of features (`generate.quality`, as are the measures of what was memorised)

The outer search is `nsga2` or all 2^K masks; a population of masks is one program, as the mask is traced: `population`. What
is found is retrained from the start, with fresh seeds, before it is believed.

    blocks = block_map(delta, [f"**/layers_{i}/**" for i in range(6)])
    train = inner(loss, blocks)
    deltas, losses = population(train, keys, params, delta, masks, rates, examples, rows, chunk=8)

Reference code: Raman1121/Diffusion_Memorization_HPO @5a6afdd (train_text_to_image_HPO.py, extraction_attack.py). There masked
weights have no gradient; here their gradients and their updates are multiplied by zero, which leaves them, and the clipping of
the others, the same.

Letters: K blocks, n images, k draws, f features, g images a condition, S steps, b batch, P population.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxpeft import trees
from jaxpeft.generate.ddpm import Predict, Schedule, q_sample
from jaxpeft.updates import descend, mask_updates

__all__ = [
    "ALWAYS",
    "NEVER",
    "all_masks",
    "block_map",
    "hypervolume",
    "inner",
    "leaf_mask",
    "memorisation",
    "pareto_filter",
    "population",
    "rates_of",
    "reference_optimiser",
    "select",
]

ALWAYS, NEVER = -1, -2  # block ids of leaves that no mask gates

Blocks = PyTree  # of numpy integers: a block id for each leaf, or one for each layer of a stacked leaf


# ------------------------------------------------------------------------------------------------------------ the blocks


def block_map(
    delta: PyTree, blocks: Sequence[trees.Pattern | None], *, frozen: trees.Pattern | None = None, stack: str = ""
) -> Blocks:
    """Which block each learned leaf of a delta belongs to.

    Args:
      delta: of any method; its fixed leaves are left out.
      blocks: block j is what the j-th pattern matches, the first pattern that does.
      frozen: leaves that no mask trains (`NEVER`); what no pattern matches is always trained (`ALWAYS`).
      stack: a segment of paths (`layers`) under which leaves hold all layers on their leading axis: layer i of them is in
        block i, and `blocks` is not asked.

    Returns:
      A tree of the structure of `trees.learned(delta)[0]`: an id each, or (layers,) ids of a stacked leaf.

    Raises:
      PatternError: a pattern that matches nothing.
    """
    leaves = trees.by_path(trees.learned(delta)[0])
    for pattern in (*blocks, frozen):
        if pattern is not None:
            trees.matches(pattern, leaves)

    def block(path: str, leaf: Any) -> np.ndarray:
        if frozen is not None and trees.is_match(frozen, path):
            return np.asarray(NEVER)
        if stack and stack in path.split("/"):
            return np.arange(leaf.shape[0])
        found = (j for j, pattern in enumerate(blocks) if pattern is not None and trees.is_match(pattern, path))
        return np.asarray(next(found, ALWAYS))

    new = {path: block(path, leaf) for path, leaf in leaves.items()}
    return trees.replace_leaves(trees.learned(delta)[0], new)


def leaf_mask(blocks: Blocks, mask: Any) -> PyTree:
    """The mask of each leaf, float32: a scalar, or one for each layer of a stacked leaf.

    Args:
      blocks: from `block_map`.
      mask: (K,) of 0 and 1, or booleans; traced or not.

    Raises:
      ValueError: fewer bits than blocks.
    """
    bits = jnp.asarray(mask, jnp.float32)
    most = max((int(np.max(b)) for b in jax.tree.leaves(blocks)), default=-1)
    if bits.shape[0] <= most:
        raise ValueError(f"a mask of {bits.shape[0]} bits for {most + 1} blocks")
    # The two last entries stand at the indices -2 (never) and -1 (always).
    every = jnp.concatenate([bits, jnp.array([0.0, 1.0], jnp.float32)])
    return jax.tree.map(lambda b: every[jnp.asarray(b)], blocks)


def _spread(mask: PyTree, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda m, x: m.reshape(*m.shape, *(1,) * (jnp.ndim(x) - m.ndim)), mask, tree)


# ----------------------------------------------------------------------------------------------------- the inner problem


def reference_optimiser(rate: Any, decay: float = 1e-2) -> optax.GradientTransformation:
    """AdamW at a constant rate after clipping to norm 1, as in the reference code. Decay pulls δ to 0, but γ away from 1."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=decay))


def inner(
    loss: Callable[[PyTree, PyTree, Any, Key[Array, ""]], Array],
    blocks: Blocks,
    optimiser: Callable[[Any], optax.GradientTransformation] = reference_optimiser,
) -> Callable[..., tuple[PyTree, Float[Array, "S"]]]:
    """The masked training of a delta.

    Args:
      loss: `(params, delta, batch, key) -> scalar`.
      blocks: from `block_map`.
      optimiser: `(rate) -> transformation`; the rate is traced.

    Returns:
      `(key, params, delta, mask (K,), rate, data, rows (S, b)) -> (delta, losses (S,))`, one scan over S steps, all of whose
      arguments may be traced. Step s sees `data`, a tree with n examples on its leading axis, at `rows[s]`. With a mask of
      zeros and no leaf that is always trained, the delta comes back to the bit.
    """

    def run(
        key: Key[Array, ""],
        params: PyTree,
        delta: PyTree,
        mask: Any,
        rate: Any,
        data: PyTree,
        rows: Int[Array, "S b"],
    ) -> tuple[PyTree, Float[Array, "S"]]:
        learned, fixed = trees.learned(delta)
        data = jax.tree.map(jnp.asarray, data)
        gate = _spread(leaf_mask(blocks, mask), learned)
        # Gradients first, or what is frozen would count in the norm that is clipped; updates last, or it would decay.
        chained = optax.chain(mask_updates(gate), optimiser(rate), mask_updates(gate))

        def drawn(learned: PyTree, now: Any) -> Array:
            rows, key = now
            return loss(params, trees.combine(learned, fixed), jax.tree.map(lambda x: x[rows], data), key)

        learned, losses = descend(drawn, learned, chained, (rows, jax.random.split(key, rows.shape[0])))
        return trees.combine(learned, fixed), losses

    return run


def population(
    function: Callable[..., Any],
    keys: Key[Array, "P"],
    params: PyTree,
    delta: PyTree,
    masks: Any,
    rates: Float[Array, "P"],
    *shared: Any,
    chunk: int = 0,
) -> Any:
    """`function(key, params, delta, mask, rate, *shared)` for each of a population, with params, delta and the rest held once.

    Args:
      function: from `inner`, or one that goes on to evaluate what it trained.
      chunk: so many at once by `vmap`, and the chunks one after another; 0 for all at once.

    Returns:
      What it returns, with a leading axis of P.
    """

    def one(own: Any) -> Any:
        key, mask, rate = own
        return function(key, params, delta, mask, rate, *shared)

    own = (keys, jnp.asarray(masks), rates)
    return jax.lax.map(one, own, batch_size=chunk) if chunk else jax.vmap(one)(own)


# ----------------------------------------------------------------------------------------------------------- the rewards


def memorisation(
    predict: Predict,
    schedule: Schedule,
    key: Key[Array, ""],
    images: Float[Array, "n ..."],
    condition: PyTree,
    empty: PyTree,
    times: Int[Array, "k #n"],
    reduce: Literal["mean", "max"] = "mean",
) -> Float[Array, ""]:
    """Mem: how far the condition moves the predicted noise on the training images.

    Args:
      predict: the bare network, without guidance.
      key: of the noise. Hold it over a search, or the search follows the noise.
      images, condition: those that should not be memorised.
      empty: the condition that means none.
      times: of each draw, for each image or (k, 1) for all of them. The reference draws them uniformly; a fixed grid is less
        noisy.
      reduce: over the images of a draw; then the mean over draws. "max" depends on n.

    Raises:
      ValueError: an unknown reduction.
    """
    if reduce not in ("mean", "max"):
        raise ValueError(f"reduce {reduce!r}: expected 'mean' or 'max'")
    n = images.shape[0]
    none = jax.tree.map(lambda c, e: jnp.broadcast_to(jnp.asarray(e, c.dtype), c.shape), condition, empty)

    def draw(now: Any) -> Array:
        t, key = now
        t = jnp.broadcast_to(t, (n,))
        z = q_sample(schedule, images, t, jax.random.normal(key, images.shape, images.dtype))
        apart = (predict(z, t, condition) - predict(z, t, none)).astype(jnp.float32)
        norms = jnp.sqrt(jnp.square(apart).reshape(n, -1).sum(1))
        return norms.max() if reduce == "max" else norms.mean()

    return jax.lax.map(draw, (times, jax.random.split(key, times.shape[0]))).mean()


# ------------------------------------------------------------------------------------------------------ the outer search


def all_masks(bits: int) -> Bool[np.ndarray, "P K"]:
    """All 2^K masks, the i-th the binary digits of i, its lowest first.

    Raises:
      ValueError: K out of 1 to 16.
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits {bits}: expected 1 to 16; search more with nsga2")
    return (np.arange(2**bits)[:, None] >> np.arange(bits) & 1).astype(bool)


def rates_of(numbers: Float[Array, "*P"], low: float = 1e-5, high: float = 1e-3) -> Float[Array, "*P"]:
    """Numbers in [0, 1] as rates from low to high on a logarithmic scale.

    Raises:
      ValueError: not 0 < low <= high.
    """
    if not 0 < low <= high:
        raise ValueError(f"rates from {low} to {high}: expected 0 < low <= high")
    return jnp.exp(math.log(low) + numbers * math.log(high / low))


def pareto_filter(scores: Float[Array, "P 2"]) -> Bool[Array, "P"]:
    """The reference code's front: sorted by both scores, what is not worse in the second than any before it.

    The same as `non_dominated`, but that it also keeps what is equal to a kept one in the second score and worse in the first.
    Scores that are not finite are never kept.
    """
    a, b = jnp.where(jnp.isfinite(scores).all(1)[:, None], scores, jnp.inf).T
    order = jnp.lexsort((b, a))
    kept = (b[order] <= jax.lax.cummin(b[order])) & jnp.isfinite(b[order])
    return jnp.zeros(scores.shape[0], bool).at[order].set(kept)


def hypervolume(scores: Float[Array, "P 2"], reference: Float[Array, "2"]) -> Float[Array, ""]:
    """The area that the points dominate within the corner `reference`; both scores smaller better."""
    a, b = jnp.minimum(jnp.where(jnp.isnan(scores), jnp.inf, scores), reference).T
    order = jnp.argsort(a)
    a, b = a[order], jax.lax.cummin(b[order])
    widths = jnp.append(a[1:], reference[0]) - a
    return (widths * (reference[1] - b)).sum()


def select(scores: Float[Array, "P 2"], below: Any) -> Int[Array, ""]:
    """Which of the candidates to take: of the least FD among those whose Mem is under `below` (that of plain tuning); where
    there is none, of the least Mem.

    Args:
      scores: (Mem, FD) each.
    """
    mem, fd = jnp.where(jnp.isfinite(scores), scores, jnp.inf).T
    fits = mem < below
    return jnp.where(fits.any(), jnp.argmin(jnp.where(fits, fd, jnp.inf)), jnp.argmin(mem))
