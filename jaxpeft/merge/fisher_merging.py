"""Merging Models with Fisher-Weighted Averaging (Matena and Raffel, NeurIPS 2022, arXiv:2111.09832).

Each model is taken for a Gaussian posterior N(theta_i, F_i^-1) with its diagonal Fisher information; what maximises the
weighted joint posterior is, for every parameter j,

    theta[j] = sum_i w_i D_i[j] theta_i[j] / sum_i w_i D_i[j],       w_i = lambda_i / |F_i|_2
    F_i[j]   = 1/N sum_n E_{y ~ p(y|x_n)} (d log p(y|x_n) / d theta[j])^2

with labels from the model's own predictions; D = max(F, floor) for the target, whose values win where no model knows
anything, and D = F for the donors. Isotropic merging is F = 1. |F_i|_2 is one number a model: without it lambda means
little, as Fishers differ by orders of magnitude.

Reference code: mmatena/model_merging @46802f9 (merging.py, fisher.py). Departures: where all of a parameter's weights
are zero (a weight of 0 for the target and a donor's dead unit), and where a whole Fisher is zero, the code gives NaN
and this the target's value; norms are computed so that they do not underflow.

Letters: M models, N examples, c of them at once, C classes.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxpeft import trees
from jaxpeft.merge.registry import register_merge
from jaxpeft.merge.stack import MergeInputError, Split, check_range, joined, split, summed, widened

__all__ = ["diagonal_fisher", "dirichlet_grid", "fisher_merging", "isotropic_merging", "pair_grid"]

Params = PyTree
Mode = Literal["exact", "sample", "empirical"]


def diagonal_fisher(
    apply_fn: Callable[[Params, Any], Float[Array, "C"]],
    params: Params,
    xs: PyTree,
    *,
    mode: Mode = "exact",
    key: Key[Array, ""] | None = None,
    labels: Int[Array, "N"] | None = None,
    chunk: int = 8,
    exclude: trees.Pattern | None = None,
) -> PyTree:
    """The diagonal of the Fisher information, a mean over examples.

    Gradients are squared for each example and class before they are summed: the square of a batch's gradient is another
    thing.

    Args:
      apply_fn: `(params, x) -> logits (C,)` of ONE example, without dropout.
      params: the model's.
      xs: examples of its own training set, leaves (N, ...); some hundreds to some thousands.
      mode: "exact", the expectation over all C labels; "sample", one label drawn an example, for large C; "empirical",
        the true labels, which is not the Fisher information but is often called so.
      key: of "sample".
      labels: (N,), of "empirical".
      chunk: c: c C gradients are held at once (c in the other modes).
      exclude: pattern of leaves to leave out.

    Returns:
      A tree like `params` in float32 or wider; zero at leaves that are left out or are not floating-point.

    Raises:
      ValueError: no examples, an unknown mode or one without its key or labels.
      PatternError: nothing matches `exclude`.
    """
    if mode not in ("exact", "sample", "empirical"):
        raise ValueError(f"mode {mode!r}: expected 'exact', 'sample' or 'empirical'")
    if (mode == "sample" and key is None) or (mode == "empirical" and labels is None):
        raise ValueError(f"mode {mode!r} needs {'a key' if mode == 'sample' else 'labels'}")
    n = jtu.tree_leaves(xs)[0].shape[0] if jtu.tree_leaves(xs) else 0
    if n < 1 or chunk < 1:
        raise ValueError(f"{n} examples in chunks of {chunk}: there must be some of both")
    excluded = set() if exclude is None else set(trees.matches(exclude, trees.by_path(params), "parameter"))
    moving, fixed = trees.partition(params, lambda p, x: p not in excluded and trees.is_learned(p, x))

    def one(x: Any, key: Any, label: Any, weight: Array) -> PyTree:
        def log_probs(moving: PyTree) -> Array:
            logits = apply_fn(trees.combine(moving, fixed), x)
            if logits.ndim != 1:
                raise ValueError(f"logits of shape {logits.shape}: expected (classes,), of one example")
            return jax.nn.log_softmax(widened(logits))

        logp, pull = jax.vjp(log_probs, moving)
        if mode == "exact":
            shares, classes = jnp.exp(logp), jnp.arange(logp.size)
        else:
            classes = (jax.random.categorical(key, logp) if mode == "sample" else label)[None]
            shares = jnp.ones(1, logp.dtype)
        grads = jax.vmap(lambda y: pull(jax.nn.one_hot(y, logp.size, dtype=logp.dtype))[0])(classes)
        return jax.tree.map(
            lambda g: jnp.tensordot(
                (shares * weight).astype(widened(g).dtype), jnp.square(widened(g)), 1, precision="highest"
            ),
            grads,
        )

    # The last chunk is filled up with the first example, at weight 0.
    rows = -(-n // chunk)
    places = jnp.arange(rows * chunk)
    weights = (places < n).astype(jnp.float32).reshape(rows, chunk)
    places = jnp.where(places < n, places, 0).reshape(rows, chunk)
    keys = jax.random.split(key, n) if mode == "sample" and key is not None else None
    labels = labels if mode == "empirical" else None

    def add(total: PyTree, row: Any) -> tuple[PyTree, None]:
        at, weight = row
        x, k, label = jax.tree.map(lambda x: jnp.asarray(x)[at], (xs, keys, labels))
        part = jax.vmap(one)(x, k, label, weight)
        return jax.tree.map(lambda t, p: t + p.sum(0), total, part), None

    zero = jax.tree.map(lambda w: jnp.zeros_like(widened(w)), moving)
    total, _ = jax.lax.scan(add, zero, (places, weights))
    mean = jax.tree.map(lambda t: t / n, total)
    return trees.combine(mean, jax.tree.map(lambda w: jnp.zeros(jnp.shape(w), jnp.float32), fixed))


@register_merge(
    paper="Matena and Raffel, NeurIPS 2022",
    needs_base=False,
    needs=("fishers",),
    hyper={"floor": (1e-8, 1e-4)},
    symmetric=False,
)
def fisher_merging(
    base: Params | None,
    models: PyTree,
    *,
    fishers: PyTree,
    weights: Any = 1.0,
    floor: Any = 1e-6,
    favor_target: bool = True,
    normalize: bool = True,
    target: int = 0,
    exclude: trees.Pattern | None = None,
) -> Params:
    """A mean of models in which every parameter is weighted by its Fisher information.

    Args:
      base: gives dtypes and what is not merged; None for the target.
      models: M models, a list or a stack.
      fishers: their Fishers in the same order, from `diagonal_fisher`: a list or a stack. None in a list is a model
        without one: it counts as isotropic, F = 1 everywhere (after normalisation, as much in all as any other).
      weights: lambda, a number for all or (M,), not negative; only ratios matter. `vmap` over them gives every point of
        a grid.
      floor: the least a Fisher counts, before normalisation. It is absolute, and Fishers of confident models are often
        below it: the target is then favoured nearly everywhere. May be traced.
      favor_target: floor the target's Fisher alone, or everyone's.
      normalize: divide by each Fisher's norm.
      target: which model's values stand where no model knows anything.
      exclude: pattern of leaves that are not merged (the head).

    Raises:
      ValueError: negative weights or floor, a target out of range.
      MergeInputError: as `split`; Fishers that do not fit the models.
      PatternError: as `split`.

    Example:
      >>> import jax.numpy as jnp
      >>> models = [{"w": jnp.array([0.0, 0.0])}, {"w": jnp.array([1.0, 1.0])}]
      >>> fishers = [{"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([1.0, 3.0])}]
      >>> [round(float(x), 3) for x in fisher_merging(None, models, fishers=fishers)["w"]]
      [0.25, 0.75]
    """
    check_range("weights", weights, 0, float("inf"))
    check_range("floor", floor, 0, float("inf"))
    parts = split(base, models, exclude, first=target)
    size = parts.size
    if not 0 <= target < size:
        raise ValueError(f"target {target}: there are models 0 to {size - 1}")
    information = _fishers(parts, fishers)
    lam = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), (size,))
    if normalize:
        norms = _norms(information)
        scale = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 1)
    else:
        scale = jnp.ones(size, jnp.float32)
    floors = jnp.full(size, 1.0) if not favor_target else (jnp.arange(size) == target).astype(jnp.float32)
    floors = floors.astype(jnp.float32) * jnp.asarray(floor, jnp.float32)

    def leaf(x: Float[Array, "M *shape"], f: Float[Array, "M *shape"]) -> Float[Array, "*shape"]:
        along = lambda v: v.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        w = along(lam) * (jnp.maximum(f.astype(x.dtype), along(floors)) * along(scale))
        # Divided by the largest, so that neither sum underflows and one model alone comes out as it went in.
        largest = w.max(0)
        w = w / jnp.where(largest > 0, largest, 1)
        total = summed(w)
        # A model of weight zero has no say, not even by a NaN.
        mean = summed(jnp.where(w > 0, w * x, 0)) / jnp.where(largest > 0, total, 1)
        return jnp.where(largest > 0, mean, x[target])

    return joined(parts, jax.tree.map(leaf, parts.models, information))


def _fishers(parts: Split, fishers: PyTree) -> PyTree:
    """The Fishers as a stack of the structure of `parts.models`, with ones for models that have none."""
    whole = jtu.tree_structure(trees.combine(parts.models, parts.fixed))
    many = type(fishers) in (list, tuple) and jtu.tree_structure(fishers) != whole
    if many and len(fishers) != parts.size:
        raise MergeInputError(
            f"{len(fishers)} Fishers for {parts.size} models: expected one each (None where there is none)"
        )
    have = [None if f is None else trees.by_path(f) for f in (fishers if many else [fishers])]
    out = []
    for path, x in trees.by_path(parts.models).items():
        for leaves in have:
            if leaves is not None and path not in leaves:
                raise MergeInputError(
                    f"no Fisher for {path!r}{trees.near(path, leaves)}; exclude the leaf, or compute it"
                )
        shape = x.shape[1:] if many else x.shape
        own = [jnp.ones(shape, jnp.float32) if leaves is None else widened(leaves[path]) for leaves in have]
        if wrong := [f.shape for f in own if f.shape != shape]:
            raise MergeInputError(f"a Fisher of shape {wrong[0]} for {path!r}, whose shape is {shape}")
        out.append(jnp.stack(own) if many else own[0])
    return jtu.tree_unflatten(jtu.tree_structure(parts.models), out)


def _norms(information: PyTree) -> Float[Array, "M"]:
    """sqrt(sum F^2) of each model over all leaves. Fishers of 1e-20 are common, and their squares are zero in float32."""
    leaves = [f.reshape(f.shape[0], -1).astype(jnp.float32) for f in jtu.tree_leaves(information) if f.size]
    largest = jnp.stack([f.max(1) for f in leaves]).max(0)
    safe = jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(sum(jnp.square(f / safe[:, None]).sum(1) for f in leaves))


@register_merge(paper="Matena and Raffel, NeurIPS 2022", needs_base=False)
def isotropic_merging(
    base: Params | None, models: PyTree, *, weights: Any = 1.0, exclude: trees.Pattern | None = None
) -> Params:
    """The weighted mean of models, sum_i lambda_i theta_i / sum_i lambda_i: Fisher merging's baseline.

    Args:
      base, models, exclude: as in `fisher_merging`.
      weights: lambda, a number for all or (M,); only ratios matter, and their sum must not be zero.

    Raises:
      MergeInputError, PatternError: as `split`.
    """
    parts = split(base, models, exclude)
    lam = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), (parts.size,))

    def mean(x: Array) -> Array:
        w = lam.astype(x.dtype)
        return summed(x, w) / w.sum()

    return joined(parts, jax.tree.map(mean, parts.models))


def pair_grid(k: int) -> Float[Array, "k 2"]:
    """k weights of two models, from the target alone, (1, 0), to the donor alone.

    Raises:
      ValueError: fewer than two.
    """
    if k < 2:
        raise ValueError(f"{k} points: a grid with both ends has at least two")
    donor = jnp.linspace(0, 1, k, dtype=jnp.float32)
    return jnp.stack([1 - donor, donor], 1)


def dirichlet_grid(key: Key[Array, ""], k: int, models: int) -> Float[Array, "k M"]:
    """k draws of weights that sum to one, uniform among all such."""
    return jax.random.dirichlet(key, jnp.ones(models, jnp.float32), (k,))
