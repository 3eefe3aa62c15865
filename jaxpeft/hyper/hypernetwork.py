"""What a network that emits the weights of another is: pure functions around a specification of the target.

    spec   = jax.eval_shape(model.init, key, x)          # of any model: Linen, NNX, a dictionary of one's own
    hyper  = mip(spec, inputs=1)                         # or another of `HYPERNETWORKS`
    params = hyper.apply(hyper.init(key), gamma)         # a tree like `spec`, differentiable; model.apply takes it

What is emitted is a tree, never one flat vector: each tensor has a head, a start and, if one likes, a sharding of its own.
`vmap` over conditions gives many models at once. Leaves that are not floating point (counters, keys) are not emitted.
"""

from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Key, PyTree

from jaxpeft import trees
from jaxpeft.interpret import lift

__all__ = [
    "HYPERNETWORKS",
    "Entry",
    "Hypernetwork",
    "TargetError",
    "as_spec",
    "bias_of",
    "output_shape",
    "per_example",
    "register_hypernetwork",
    "split_target",
    "stacked_paths",
]


class TargetError(ValueError):
    """A specification that no weights can be emitted for, or saved weights that do not belong to it."""


class Hypernetwork(NamedTuple):
    """A network whose outputs are the parameters of another.

    Attributes:
      name: of the method.
      init: `(key) -> weights`, what is trained.
      apply: `(weights, condition) -> params`, a tree of the target's structure, shapes and dtypes.
      target: the specification: the target's parameters as `jax.ShapeDtypeStruct`s.
      config: what made it but for the target, as plain data for files.
      factored: as `apply`, but with leaves that are array-like and know their products (`weights`), for `interpret.lift`:
        cheaper where they would be used once. None where there is nothing to be saved.
    """

    name: str
    init: Callable[[Key[Array, ""]], PyTree]
    apply: Callable[..., PyTree]
    target: PyTree
    config: Mapping[str, Any]
    factored: Callable[..., PyTree] | None = None


class Entry(NamedTuple):
    """What the library knows of a hypernetwork.

    Attributes:
      factory: `(spec, ...)`, or `(init_fn, ...)` where a target's own start is a part of the method.
      paper: authors, venue, year.
      summary: one line.
    """

    factory: Callable[..., Hypernetwork]
    paper: str
    summary: str


HYPERNETWORKS: dict[str, Entry] = {}


def register_hypernetwork(*, paper: str) -> Callable[[Callable[..., Hypernetwork]], Callable[..., Hypernetwork]]:
    """Puts a factory into `HYPERNETWORKS` under its own name; its summary is the first line of its docstring."""

    def enter(factory: Callable[..., Hypernetwork]) -> Callable[..., Hypernetwork]:
        summary = (factory.__doc__ or "").strip().splitlines()[0]
        HYPERNETWORKS[factory.__name__] = Entry(factory, paper, summary)
        return factory

    return enter


def per_example(apply_fn: Callable[..., Any], hyper: Hypernetwork) -> Callable[..., Any]:
    """The target with weights of its own for each example.

    Args:
      apply_fn: `(params, *inputs)`, whose inputs and outputs have the examples on their leading axis; static.
      hyper: for `apply_fn`'s parameters; its `factored` weights are used where it has them, so that what the examples share
        is multiplied once for all of them.

    Returns:
      `(weights, condition, *inputs)`, where every leaf of `condition` has the examples on its leading axis as well.
    """
    emit = hyper.factored or hyper.apply

    def run(weights: PyTree, condition: PyTree, *inputs: Any) -> Any:
        def one(condition: PyTree, *inputs: Any) -> Any:
            batch = jax.tree.map(lambda x: x[None], inputs)
            out = lift(apply_fn)(emit(weights, condition), *batch)
            return jax.tree.map(lambda y: y[0], out)

        return jax.vmap(one)(condition, *inputs)

    return run


# ------------------------------------------------------------------------------------------------------------ the target


def split_target(spec: PyTree, base: PyTree = None) -> tuple[PyTree, PyTree]:
    """A specification in two: what is emitted, and what is kept from `base`; `trees.combine` puts them together.

    Args:
      spec: arrays or `jax.ShapeDtypeStruct`s.
      base: parameters of that structure; only needed where something is not floating point.

    Raises:
      TargetError: nothing to emit; other kinds of leaves and no base; a base of other leaves.
    """
    spec = as_spec(spec)
    if not jtu.tree_leaves(spec):
        raise TargetError("an empty specification: the target has no parameters, so there is nothing to emit")
    emitted, others = trees.partition(spec, trees.is_learned)
    if not jtu.tree_leaves(emitted):
        raise TargetError("nothing to emit: no leaf of the specification is floating point")
    strange = [p for p, x in trees.by_path(spec).items() if not trees.is_learned(p, x)]
    if base is None:
        if strange:
            kind = trees.by_path(spec)[strange[0]].dtype
            raise TargetError(
                f"{strange[0]!r} is {kind}, which no network emits: give a base, whose values are kept there"
            )
        return emitted, others
    if (a := trees.fingerprint(spec)) != (b := trees.fingerprint(base)):
        raise TargetError(f"a base with fingerprint {b} for a target with {a}: their leaves differ in names or shapes")
    return emitted, trees.partition(base, trees.is_learned)[1]


def as_spec(tree: PyTree) -> PyTree:
    """`tree` as `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def stacked_paths(spec: PyTree, stacked: trees.Pattern | None) -> set[str]:
    """The paths of leaves whose first axis counts layers (of a scanned model): each entry is a tensor by itself.

    Raises:
      PatternError: nothing matches.
    """
    return set() if stacked is None else set(trees.matches(stacked, trees.by_path(spec), "parameter"))


def bias_of(path: str, flat: Mapping[str, Any]) -> str | None:
    """The path of the bias beside a kernel, if there is one."""
    bias = f"{path.rpartition('/')[0]}/bias".lstrip("/")
    return bias if bias in flat else None


def output_shape(path: str, flat: Mapping[str, Any], stacked: Container[str]) -> tuple[int, ...]:
    """The output axes of a kernel: as many of its last ones as its module's bias has, else one."""
    bias = bias_of(path, flat)
    return flat[path].shape[-1:] if bias is None else flat[bias].shape[int(bias in stacked) :]
