"""Parameter pytrees: paths and patterns, the split into learned and fixed leaves, stacking, counting.

A *path* is the position of a leaf written with slashes (`params/layers_0/attention/query/kernel`), whatever containers
the tree is made of. A *pattern* is a glob over paths and is data, so that it can stand in a config file:

    *          anything inside one segment            **       any number of segments, none included
    ?          one character inside a segment         {a,b}    alternatives, which may nest and hold globs
    !pattern   takes out what earlier patterns of the same sequence chose

Everything here is a pure function; nothing is compiled.
"""

import dataclasses
import difflib
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

Pattern = str | Sequence[str]
T = TypeVar("T")


class PatternError(ValueError):
    """A pattern that matches nothing or cannot be read."""


# ---------------------------------------------------------------------------------------------------------------- paths


def path_string(path: Sequence[Any]) -> str:
    """A jax key path as a slash-joined string; dict keys, attributes and indices read alike.

    The `.value` under which an NNX variable holds its array is left out: `layers/0/kernel`, as in Linen.
    """
    if len(path) > 1 and isinstance(path[-1], jtu.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def by_path(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Every leaf of `tree` under its path, in flattening order."""
    return {path_string(p): x for p, x in jtu.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]}


def replace_leaves(tree: T, new: Mapping[str, Any], is_leaf: Callable[[Any], bool] | None = None) -> T:
    """`tree` with the leaves at the paths in `new` exchanged.

    Raises:
      KeyError: a path that is not in the tree (near paths are listed).
    """
    flat, structure = jtu.tree_flatten_with_path(tree, is_leaf=is_leaf)
    paths = [path_string(p) for p, _ in flat]
    if unknown := set(new) - set(paths):
        path = min(unknown)
        raise KeyError(f"no leaf at {path!r}{near(path, paths)}")
    return jtu.tree_unflatten(structure, [new.get(p, x) for p, (_, x) in zip(paths, flat)])


# ------------------------------------------------------------------------------------------------------------- patterns


@functools.lru_cache(maxsize=1024)
def _regex(pattern: str) -> re.Pattern[str]:
    out, i, depth = [], 0, 0
    while i < len(pattern):
        c = pattern[i]
        if pattern.startswith("**/", i):
            out.append("(?:[^/]+/)*")
            i += 3
            continue
        if pattern.startswith("/**", i) and i + 3 == len(pattern):
            out.append("(?:/[^/]+)*")
            i += 3
            continue
        if pattern.startswith("**", i):
            out.append(".*")
            i += 2
            continue
        depth += (c == "{") - (c == "}" and depth > 0)
        closes = c == "}" and "(?:" in out
        out.append(
            {"*": "[^/]*", "?": "[^/]", "{": "(?:"}.get(c)
            or ("|" if c == "," and depth else ")" if closes else re.escape(c))
        )
        i += 1
    if depth:
        raise PatternError(f"the pattern {pattern!r} opens a brace that it does not close")
    return re.compile("".join(out))


def near(name: str, among: Iterable[str], most: int = 3) -> str:
    """The end of an error message: the names closest to `name`, or nothing where none is close."""
    among = list(dict.fromkeys(among))
    found = difflib.get_close_matches(name, among, n=most, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, found))}?" if found else ""


def matches(pattern: Pattern, paths: Iterable[str], what: str = "leaf") -> list[str]:
    """The paths that `pattern` chooses, in the order of `paths`.

    Args:
      pattern: one glob, or a sequence in which each positive glob adds paths and each `!glob` takes some out again.
        A sequence that starts with a negation starts from all paths.
      paths: what there is to choose from.
      what: the word for one path in the error message.

    Raises:
      PatternError: a glob chose nothing: the message lists near misses.
    """
    paths = list(paths)
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not patterns:
        raise PatternError("an empty sequence of patterns chooses nothing")
    chosen = set(paths) if patterns[0].startswith("!") else set()
    for p in patterns:
        found = {x for x in paths if _regex(p.removeprefix("!")).fullmatch(x)}
        if not found:
            raise PatternError(f"the pattern {p!r} matches no {what}{_near_misses(p, paths)}")
        chosen = chosen - found if p.startswith("!") else chosen | found
    if not chosen:
        raise PatternError(
            f"the patterns {patterns!r} leave no {what}: each negation took out what was chosen before it"
        )
    return [x for x in paths if x in chosen]


def is_match(pattern: Pattern, path: str) -> bool:
    """Whether `pattern` chooses this one path."""
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    chosen = bool(patterns) and patterns[0].startswith("!")
    for p in patterns:
        if _regex(p.removeprefix("!")).fullmatch(path):
            chosen = not p.startswith("!")
    return chosen


def _near_misses(pattern: str, paths: list[str], most: int = 3) -> str:
    """Compares by the pattern's words, so that `**/querry/kernel` finds `…/query/kernel` under any prefix."""
    words = [w for w in re.split(r"[*?{},/!]+", pattern) if w]
    if not paths:
        return " (there are none)"

    def score(path: str) -> float:
        segments = path.split("/")
        return sum(max(difflib.SequenceMatcher(None, w, s).ratio() for s in segments) for w in words)

    best = sorted(paths, key=score, reverse=True)[: most if words else 0] or paths[:most]
    return f"; near misses: {', '.join(map(repr, best))} (of {len(paths)})"


# --------------------------------------------------------------------------------------------------- learned and fixed


@jtu.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """Marks a leaf of a delta that is stored and sent with it but never learned (indices, hash seeds, frozen tables)."""

    value: Any


@jtu.register_dataclass
@dataclasses.dataclass(frozen=True)
class Absent:
    """Stands in a partitioned tree for a leaf that is in the other half. It has no children, so maps pass over it."""

    what: str = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        return f"Absent({self.what})"


def _described(x: Any) -> str:
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    return (
        type(x).__name__
        if dtype is None
        else f"{np.dtype(dtype).name if not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else 'key'}{list(shape or ())}"
    )


def _is_fixed(x: Any) -> bool:
    return isinstance(x, Fixed)


def _is_absent(x: Any) -> bool:
    return isinstance(x, Absent)


def partition(tree: T, where: Callable[[str, Any], bool]) -> tuple[T, T]:
    """Two trees of the structure of `tree`: leaves with `where(path, leaf)` true in the first, the others in the second.

    What a half lacks is an `Absent` marker: `jax.tree.map`, `jax.grad` and optax see only the leaves that are there.
    `Fixed` nodes count as one leaf.
    """
    flat, structure = jtu.tree_flatten_with_path(tree, is_leaf=_is_fixed)
    yes = [where(path_string(p), x) for p, x in flat]
    first = [x if y else Absent(_described(x)) for y, (_, x) in zip(yes, flat)]
    second = [Absent(_described(x)) if y else x for y, (_, x) in zip(yes, flat)]
    return jtu.tree_unflatten(structure, first), jtu.tree_unflatten(structure, second)


def combine(first: T, second: T) -> T:
    """Undoes `partition`.

    Raises:
      ValueError: a leaf that both halves have or that neither has; the message gives its path.
    """

    def leaf(x: Any) -> bool:
        return _is_absent(x) or _is_fixed(x)

    a, structure = jtu.tree_flatten_with_path(first, is_leaf=leaf)
    b = jtu.tree_leaves(second, is_leaf=leaf)
    if len(a) != len(b):
        raise ValueError(f"the halves have {len(a)} and {len(b)} leaves: they come from different trees")
    out = []
    for (path, x), y in zip(a, b):
        if _is_absent(x) == _is_absent(y):
            raise ValueError(f"{path_string(path)!r} is in {'neither half' if _is_absent(x) else 'both halves'}")
        out.append(y if _is_absent(x) else x)
    return jtu.tree_unflatten(structure, out)


def is_learned(path: str, leaf: Any) -> bool:
    """Whether a leaf of a delta is trained: it is inexact and not marked `Fixed`."""
    return not _is_fixed(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def learned(delta: T) -> tuple[T, T]:
    """`(learned, fixed)` halves of a delta: the one place where they are told apart, for every method and optimiser."""
    return partition(delta, is_learned)


def unmark(tree: T) -> T:
    """`tree` with `Fixed` marks taken off and gradients stopped there."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x.value) if _is_fixed(x) else x, tree, is_leaf=_is_fixed)


def labels(tree: T, rules: Mapping[str, Pattern], default: str = "default") -> T:
    """A tree of strings for `optax.multi_transform`: the label of the first rule whose pattern chooses the leaf.

    Example: `labels(delta, {"fast": "**/b", "slow": "**"})`; several methods train their parts at different rates.
    """
    flat, structure = jtu.tree_flatten_with_path(tree)
    paths = [path_string(p) for p, _ in flat]
    chosen = {label: set(matches(pattern, paths)) for label, pattern in rules.items()}
    return jtu.tree_unflatten(
        structure, [next((label for label, hits in chosen.items() if p in hits), default) for p in paths]
    )


# --------------------------------------------------------------------------------------------- stacks, sizes, identity


def stack(trees: Sequence[T]) -> T:
    """Trees of one structure as one tree with a new leading axis on every leaf.

    Raises:
      ValueError: no trees, or trees of different structure.
    """
    if not trees:
        raise ValueError("nothing to stack: the sequence of trees is empty")
    for i, t in enumerate(trees[1:], 1):
        if jtu.tree_structure(t) != jtu.tree_structure(trees[0]):
            raise ValueError(f"tree {i} differs in structure from tree 0: {_difference(trees[0], t)}")
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def unstack(tree: T) -> list[T]:
    """Undoes `stack`: one tree per entry of the leading axis."""
    sizes = {x.shape[0] for x in jax.tree.leaves(tree)}
    if len(sizes) != 1:
        raise ValueError(f"leaves disagree on the leading axis: sizes {sorted(sizes)}")
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(sizes.pop())]


def mix(stacked: T, coefficients: PyTree) -> T:
    """A weighted sum over the leading axis of every leaf: soups, routed inventories, task vectors.

    Args:
      stacked: leaves of shape (n, ...).
      coefficients: (n,) for all leaves, or a tree of such vectors whose structure is a prefix of the other's: one for each
        block or leaf. A one-hot vector is a choice; `vmap` over them gives one mixture per example.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([1.0, 3.0])
      >>> mix({"a": x, "b": x}, {"a": jnp.array([0.5, 0.5]), "b": jnp.array([0.0, 1.0])})
      {'a': Array(2., dtype=float32), 'b': Array(3., dtype=float32)}
    """

    def block(c: Array, part: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.tensordot(c.astype(x.dtype), x, axes=1), part)

    return jax.tree.map(block, coefficients, stacked)


def _difference(a: PyTree, b: PyTree) -> str:
    p, q = set(by_path(a)), set(by_path(b))
    return f"only in the first {sorted(p - q)[:3]}, only in the second {sorted(q - p)[:3]}"


def count(tree: PyTree) -> int:
    """Number of scalars in all leaves."""
    return sum(int(np.prod(jnp.shape(x))) for x in jax.tree.leaves(tree))


def nbytes(tree: PyTree) -> int:
    """Bytes of all leaves."""
    return sum(int(np.prod(x.shape)) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def wide_dtype(dtype: Any) -> Any:
    """float32, or `dtype` where that is wider; jnp.promote_types would refuse under strict promotion."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def fingerprint(params: PyTree) -> str:
    """Sixteen hex digits that name a base by its paths and shapes (not its values or dtypes).

    A saved delta carries it, so that loading it onto another architecture is refused before anything is computed.
    """
    lines = [f"{p}:{','.join(map(str, jnp.shape(x)))}" for p, x in sorted(by_path(params).items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
