"""What an axis of a parameter is for, told from the equations that lead to its use; for `read_graph`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

Axes = tuple[tuple[int, ...], ...]
Leaf = tuple[str, tuple[int, ...]]


class Act(NamedTuple):
    """An activation: a node, and the operations on it since that have not become a node."""

    node: int
    since: frozenset[str] = frozenset()


class Par(NamedTuple):
    """Something made of parameters alone, and which of the (first) leaf's axes each axis is made of, where that is known."""

    leaves: tuple[Leaf, ...]
    axes: Axes | None = None
    table: str | None = None  # roles, once rows were looked up


Value = Act | Par | None  # None depends on neither parameters nor inputs


def usual_roles(shape: tuple[int, ...]) -> str:
    """Roles where the use tells nothing: outputs last, as kernels are laid out here."""
    return "".join(letters(shape, "o", "i"))


def letters(shape: Sequence[int], last: str, others: str = "i") -> list[str]:
    """`last` for the last axis that is wider than one, `others` for those before it."""
    wide = [i for i, n in enumerate(shape) if n > 1] or [len(shape) - 1]
    return ["." if n == 1 and i != wide[-1] else last if i == wide[-1] else others for i, n in enumerate(shape)]


def of_product(e: Any, at: int) -> tuple[str, list[str]]:
    """The type of a product with a parameter, its operand `at`, and a letter for each of the operand's axes."""
    ndim = len(e.invars[at].aval.shape)
    if e.primitive.name == "ragged_dot_general":
        return "linear", ["o", *["i"] * (ndim - 2), "o"]
    if e.primitive.name == "dot_general":
        contracted = e.params["dimension_numbers"][0][at]
        return "linear", ["i" if d in contracted else "o" for d in range(ndim)]
    out, into, *window = e.params["dimension_numbers"].rhs_spec
    use = {out: "o", into: "i", **dict(zip(window, "hwwww"))}
    groups, shape = e.params["feature_group_count"], e.invars[at].aval.shape
    return "depthwise" if groups > 1 and shape[into] == 1 else "conv", [use[d] for d in range(ndim)]


def of_rows(e: Any) -> list[str]:
    """A letter for each axis of a table that rows are looked up in."""
    rows = e.params["dimension_numbers"].start_index_map
    return ["o" if d in rows else "i" for d in range(len(e.invars[0].aval.shape))]


def one_step(x: Value, i: int) -> Value:
    """What step i of a scan gets of a value that the scan slices."""
    if not isinstance(x, Par) or x.axes is None or x.leaves[1:]:
        return x
    path, index = x.leaves[0]
    if x.axes[0] != (len(index),):
        return x._replace(axes=None)  # not the leaf's own leading axis: all steps share what it was made of
    return x._replace(leaves=((path, (*index, i)),), axes=x.axes[1:])


def made_of_parameters(e: Any, operands: list[Value]) -> Par:
    """The value of an equation without an activation among its operands."""
    pars = [x for x in operands if isinstance(x, Par)]
    leaves = tuple(dict.fromkeys(leaf for x in pars for leaf in x.leaves))
    one = pars[0]
    if len(leaves) > 1 or one.axes is None:
        return Par(leaves, None, one.table)
    at = next(i for i, x in enumerate(operands) if x is one)
    before, after = e.invars[at].aval.shape, e.outvars[0].aval.shape
    if e.primitive.name == "gather" and at == 0 and one.table is None:
        skipped = len(one.leaves[0][1])
        found = {axis: letter for group, letter in zip(one.axes, of_rows(e)) for axis in group}
        return Par(leaves, None, "".join(found[i] for i in sorted(found)) if min(found) == skipped else None)
    return Par(leaves, _moved(e, one.axes, before, after), one.table)


def _moved(e: Any, axes: Axes, before: tuple[int, ...], after: tuple[int, ...]) -> Axes | None:
    name, params = e.primitive.name, e.params
    if name == "transpose":
        return tuple(axes[i] for i in params["permutation"])
    if name == "squeeze":
        return tuple(g for i, g in enumerate(axes) if i not in params["dimensions"])
    if name == "broadcast_in_dim":
        placed = dict(zip(params["broadcast_dimensions"], axes))
        return tuple(placed.get(i, ()) for i in range(len(after)))
    if name == "reshape":
        return _merged(axes, before, after)
    return axes if len(before) == len(after) else None


def _merged(axes: Axes, before: tuple[int, ...], after: tuple[int, ...]) -> Axes | None:
    """Axes after a reshape that merges neighbours and adds or drops ones; None where it splits an axis."""
    rest, out = [(g, n) for g, n in zip(axes, before) if n != 1], []
    for n in after:
        group, have = (), 1
        while have < n and rest:
            more, size = rest.pop(0)
            group, have = group + more, have * size
        if have != n:
            return None
        out.append(group)
    return tuple(out)
