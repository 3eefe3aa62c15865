"""Models of one shape as one stack: what every merge reads and writes.

A merge sees T models as one tree whose leaves have a leading axis of T, and, where it has one, the base theta0 that
they were trained from. Floating-point leaves are merged, in float32 (or wider), and written back in the base's dtype.
Integers, booleans, keys, `Fixed` leaves and those that a pattern excludes are the base's as they are, or the first
model's where there is no base.

Letters: T models.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from jaxpeft import trees

__all__ = [
    "MergeInputError",
    "Split",
    "add",
    "check_finite",
    "from_base",
    "joined",
    "split",
    "stacked",
    "task_vectors",
    "weighted_sum",
]

ROWS = 12  # of a table in an error message
UNROLLED = 32  # XLA's CPU backend takes a hundred times as long for a product that is summed over its first axis


class MergeInputError(ValueError):
    """Models that cannot be merged: none, of different trees or shapes, or with NaN. The message has a table of the leaves."""


class Split(NamedTuple):
    """Models taken apart for a merge.

    Attributes:
      base: the leaves that are merged, as the base (or the first model) has them; `Absent` marks the others.
      models: the same leaves of all models, (T, *shape), in float32 or wider.
      fixed: the other leaves, of the base.
      size: T.
    """

    base: PyTree
    models: PyTree
    fixed: PyTree
    size: int


# ------------------------------------------------------------------------------------------------------------ stacking


def stacked(models: PyTree, base: PyTree = None) -> PyTree:
    """Models as one tree with a leading axis of T on every leaf.

    Args:
      models: a list or tuple of trees, or one tree that is stacked already (a trained population, `vmap` over inits). A
        tree whose root is itself a list is taken for a stack where `base` is a list of the same structure.
      base: where given, what the models are compared with as well.

    Returns:
      The stack. Floats of different widths become the widest, which is then what a merge without a base gives back;
      nothing else is converted.

    Raises:
      MergeInputError: no models, or leaves that differ in path, shape or kind: a table lists them.

    Example:
      >>> import jax.numpy as jnp
      >>> stacked([{"w": jnp.zeros((2, 3))}, {"w": jnp.ones((2, 3))}])["w"].shape
      (2, 2, 3)
      >>> stacked([{"w": jnp.zeros((2, 3))}, {"w": jnp.ones(3)}])
      Traceback (most recent call last):
      ...
      jaxpeft.merge.stack.MergeInputError: the models do not fit together: 1 of 1 leaves differ
        path  leaf           in
        w     float32[2, 3]  0
              float32[3]     1
    """
    same_tree = base is not None and jtu.tree_structure(models) == jtu.tree_structure(base)
    if type(models) in (list, tuple) and not same_tree:
        named = {} if base is None else {"base": base}
        named |= {str(i): m for i, m in enumerate(models)}
        if not models:
            raise MergeInputError("no models: a merge needs at least one")
        if not jtu.tree_leaves(models[0]):
            raise MergeInputError("models without a leaf: there is nothing to merge")
        _fit({name: trees.by_path(t) for name, t in named.items()}, [jtu.tree_structure(t) for t in named.values()])
        return jax.tree.map(_stack, *models)
    leaves = trees.by_path(models)
    if not leaves:
        raise MergeInputError("models without a leaf: there is nothing to merge")
    sizes = {p: jnp.shape(x)[0] if jnp.ndim(x) else None for p, x in leaves.items()}
    if len(set(sizes.values())) != 1 or None in sizes.values():
        held = sorted({str(n) for n in sizes.values()})
        raise MergeInputError(
            f"one tree of {len(leaves)} leaves whose first axes have sizes {', '.join(held) or 'none'}: a stack of models has "
            "one first axis, of the models, on every leaf. Several models are passed as a list"
        )
    if 0 in sizes.values():
        raise MergeInputError("no models: the stack's first axis has size 0")
    if base is not None:
        one = {p: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)) for p, x in leaves.items()}
        structures = [jtu.tree_structure(base), jtu.tree_structure(models)]
        _fit({"base": trees.by_path(base), "stack": one}, structures)
    return models


def _stack(*xs: Any) -> Array:
    kinds = {jnp.result_type(x) for x in xs}
    if len(kinds) > 1:  # floats of several widths: `_fit` let nothing else pass
        wide = (
            max(kinds, key=lambda d: jnp.finfo(d).bits) if len({jnp.finfo(d).bits for d in kinds}) > 1 else jnp.float32
        )
        xs = tuple(jnp.asarray(x).astype(wide) for x in xs)
    return jnp.stack([jnp.asarray(x) for x in xs])


def _kind(x: Any) -> tuple[Any, ...]:
    dtype = jnp.result_type(x)
    return (jnp.shape(x), "float" if jnp.issubdtype(dtype, jnp.floating) else str(dtype))


def _told(x: Any) -> str:
    return f"{jnp.result_type(x)}{list(jnp.shape(x))}"


def _fit(flat: Mapping[str, Mapping[str, Any]], structures: Sequence[Any]) -> None:
    """Raises MergeInputError where trees, given as {name: {path: leaf}}, differ."""
    paths = dict.fromkeys(p for leaves in flat.values() for p in leaves)
    rows, differing = [], 0
    for path in paths:
        held: dict[Any, tuple[str, list[str]]] = {}
        for name, leaves in flat.items():
            x = leaves.get(path)
            kind, told = ("absent", "absent") if path not in leaves else (_kind(x), _told(x))
            held.setdefault(kind, (told, []))[1].append(name)
        if len(held) > 1:
            differing += 1
            rows += [(path if i == 0 else "", told, _names(who)) for i, (told, who) in enumerate(held.values())]
    if rows:
        raise MergeInputError(
            f"the models do not fit together: {differing} of {len(paths)} leaves differ\n"
            + _table(rows, ("path", "leaf", "in"))
        )
    if len(set(structures)) > 1:
        raise MergeInputError(
            f"the models have the same leaves in different containers: {structures[0]} and "
            f"{next(s for s in structures if s != structures[0])}. Convert them to one kind of tree"
        )


def _names(who: Sequence[str]) -> str:
    return ", ".join(who) if len(who) <= 6 else f"{', '.join(who[:5])} and {len(who) - 5} more"


def _table(rows: Sequence[tuple[str, ...]], head: tuple[str, ...]) -> str:
    shown = [head, *rows[:ROWS]]
    widths = [max(len(row[i]) for row in shown) for i in range(len(head))]
    lines = ["  " + "  ".join(cell.ljust(n) for cell, n in zip(row, widths)).rstrip() for row in shown]
    return "\n".join(lines + ([f"  and {len(rows) - ROWS} more rows"] if len(rows) > ROWS else []))


def check_finite(models: PyTree, base: PyTree = None) -> None:
    """Raises where a model has NaN or an infinity. It reads values: call it before a merge, outside jit.

    Args:
      models: as for `stacked`.
      base: looked at too, where given.

    Raises:
      MergeInputError: a table lists the leaves, the models and the counts.
    """
    leaves = trees.by_path(stacked(models, base))
    rows = [] if base is None else [(p, "base", _not_finite(x)) for p, x in trees.by_path(base).items()]
    for path, x in leaves.items():
        if _is_inexact(x):
            bad = np.asarray((~jnp.isfinite(jnp.asarray(x))).reshape(len(x), -1).sum(1))
            rows += [(path, str(i), int(n)) for i, n in enumerate(bad)]
    rows = [(path, who, str(n)) for path, who, n in rows if n]
    if rows:
        raise MergeInputError(
            f"{len(rows)} leaves are not finite, and a merge would spread that: leave these models out\n"
            + _table(rows, ("path", "model", "NaN or infinite"))
        )


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _not_finite(x: Any) -> int:
    return int(jnp.size(x) - jnp.isfinite(jnp.asarray(x)).sum()) if _is_inexact(x) else 0


# ------------------------------------------------------------------------------------------------------ apart, together


def widened(x: Any) -> Array:
    """`x` in float32, or as it is where that is wider."""
    x = jnp.asarray(x)
    return x.astype(trees.wide_dtype(x.dtype))


def split(base: PyTree, models: PyTree, exclude: trees.Pattern | None = None, *, first: int = 0) -> Split:
    """Models taken apart: what is merged, widened, and what is not. Every merge starts here.

    Args:
      base: theta0, or None: the model of index `first` then gives dtypes and what is not merged.
      models: as for `stacked`.
      exclude: pattern of leaves that are not merged (heads).
      first: which model stands for the base where there is none.

    Raises:
      MergeInputError: as `stacked`, or no floating-point leaf is left.
      PatternError: nothing matches `exclude`.
    """
    stack = stacked(models, base)
    like = jax.tree.map(lambda x: jnp.asarray(x)[first], stack) if base is None else base
    excluded = set() if exclude is None else set(trees.matches(exclude, trees.by_path(like), "parameter"))
    where = lambda path, x: path not in excluded and trees.is_learned(path, x)
    moving, fixed = trees.partition(like, where)
    if not jtu.tree_leaves(moving):
        raise MergeInputError("nothing to merge: no floating-point leaf is left")
    # The markers of absent leaves tell shapes: the stack's are exchanged for those of one model.
    many = [widened(x) for x in jtu.tree_leaves(trees.partition(stack, where)[0])]
    size = jnp.shape(jtu.tree_leaves(stack)[0])[0]
    return Split(moving, jtu.tree_unflatten(jtu.tree_structure(moving), many), fixed, size)


def from_base(base: PyTree, models: PyTree, exclude: trees.Pattern | None = None) -> Split:
    """`split` for merges of task vectors, which there are only from a base.

    Raises:
      MergeInputError: no base, and as `split`.
    """
    if base is None:
        raise MergeInputError(
            "no base: this merge adds up what fine-tuning changed, for which it needs the model before"
        )
    return split(base, models, exclude)


def joined(parts: Split, merged: PyTree) -> PyTree:
    """Whole parameters again: `merged`, of the structure of `parts.base`, in its dtypes, and the fixed leaves."""
    cast = jax.tree.map(lambda m, b: m.astype(jnp.result_type(b)), merged, parts.base)
    return trees.combine(cast, parts.fixed)


def deltas(parts: Split) -> PyTree:
    """The task vectors tau_t = theta_t - theta0 of models taken apart: leaves (T, *shape)."""
    return jax.tree.map(lambda m, b: m - widened(b).astype(m.dtype), parts.models, parts.base)


def moved(parts: Split, delta: PyTree) -> PyTree:
    """Whole parameters, theta0 + delta: the sum is rounded once, to the base's dtype."""
    return joined(parts, jax.tree.map(lambda b, d: widened(b).astype(d.dtype) + d, parts.base, delta))


def task_vectors(base: PyTree, models: PyTree, *, exclude: trees.Pattern | None = None) -> PyTree:
    """tau_t = theta_t - theta0 of every model (Ilharco et al., ICLR 2023), to look at or to compute with.

    Args:
      base: theta0.
      models: as for `stacked`.
      exclude: pattern of leaves to leave out.

    Returns:
      A tree like `base` with leaves (T, *shape) in float32 or wider; `Absent` stands for what is not merged.

    Raises:
      MergeInputError, PatternError: as `split`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> base, models = {"w": jnp.ones(2)}, [{"w": jnp.zeros(2)}, {"w": jnp.full(2, 3.0)}]
      >>> tau = task_vectors(base, models)
      >>> add(base, jax.tree.map(lambda t: t.sum(0), tau), 0.5)["w"].tolist()
      [1.5, 1.5]
    """
    return deltas(from_base(base, models, exclude))


def add(base: PyTree, delta: PyTree, scale: Any = 1.0) -> PyTree:
    """theta0 + scale * delta, in the base's dtypes.

    Args:
      base: theta0.
      delta: a tree like `base`, as `task_vectors` makes them but without the models' axis; leaves that are `Absent`
        stay the base's.
      scale: may be traced.

    Raises:
      MergeInputError: another tree than the base's.
    """
    flat, structure = jtu.tree_flatten(base)
    own = jtu.tree_leaves(delta, is_leaf=lambda x: isinstance(x, trees.Absent))
    if len(flat) != len(own):
        raise MergeInputError(f"a delta of {len(own)} leaves for a base of {len(flat)}: they come from different trees")

    def one(b: Any, d: Any) -> Any:
        if isinstance(d, trees.Absent):
            return b
        if jnp.shape(b) != jnp.shape(d):
            raise MergeInputError(
                f"a delta of shape {jnp.shape(d)} for a leaf of shape {jnp.shape(b)}: sum over models first"
            )
        wide = widened(b)
        return (wide + jnp.asarray(scale).astype(wide.dtype) * jnp.asarray(d).astype(wide.dtype)).astype(
            jnp.result_type(b)
        )

    return jtu.tree_unflatten(structure, [one(b, d) for b, d in zip(flat, own)])


# ---------------------------------------------------------------------------------------------------------------- sums


def weighted_sum(models: PyTree, weights: Any) -> PyTree:
    """sum_t w_t x_t over the first axis of every leaf.

    A product and a sum rather than a dot product, whose inputs accelerators round by default.

    Args:
      models: leaves (T, *shape).
      weights: a number for all; (T,); or a tree of such vectors whose structure is a prefix of the other's, one for
        each block or leaf. May be traced.
    """

    def leaf(w: Array, x: Float[Array, "T *shape"]) -> Array:
        if jnp.ndim(w) > 1 or (jnp.ndim(w) == 1 and jnp.shape(w)[0] != x.shape[0]):
            raise ValueError(
                f"weights of shape {jnp.shape(w)} for {x.shape[0]} models: expected a number, or one a model"
            )
        w = jnp.broadcast_to(jnp.asarray(w).astype(x.dtype), x.shape[:1])
        return summed(x, w)

    if type(weights) in (list, tuple) and all(jnp.ndim(w) == 0 for w in jtu.tree_leaves(weights)):
        weights = jnp.stack([jnp.asarray(w, jnp.float32) for w in weights])
    return jax.tree.map(lambda w, part: jax.tree.map(lambda x: leaf(w, x), part), weights, models)


def summed(x: Float[Array, "T *shape"], w: Float[Array, "T"] | None = None) -> Float[Array, "*shape"]:
    """The sum over models, weighted where there are weights."""
    part = (lambda i: x[i]) if w is None else lambda i: w[i] * x[i]
    if x.shape[0] <= UNROLLED:
        return functools.reduce(lambda total, i: total + part(i), range(1, x.shape[0]), part(0))
    return (x if w is None else w.reshape(-1, *(1,) * (x.ndim - 1)) * x).sum(0)


def check_range(name: str, value: Any, low: float, high: float, remedy: str = "") -> None:
    """Raises ValueError for a number out of [low, high], or NaN, where it is known at trace time."""
    if isinstance(value, Tracer):
        return
    numbers = np.asarray(value, np.float64)
    if not ((numbers >= low) & (numbers <= high)).all():
        raise ValueError(f"{name} {value}: expected {low:g} to {high:g}{remedy}")
