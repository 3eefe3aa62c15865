"""One function over a batch whose rows choose among a few trees: work that depends on the tree alone is done once a tree.

    over_rows(f, stacked, which, rows)[i] = f(stacked[which[i]], *rows[i])

`vmap` over gathered trees computes everything once a row: DoRA's column norms, a prefix's network, casts. Here f is
traced once and its equations fall into three stages by what they depend on: nothing (computed once), the tree (once a
tree), the row (once a row); what the third stage reads of the second is gathered by `which`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Int, PyTree

from jaxpeft.interpret import bind_again, varying

_SHARED, _TREE, _ROW = range(3)


def over_rows(
    function: Callable[..., PyTree], stacked: PyTree, which: Int[Array, "b"], rows: Sequence[PyTree]
) -> PyTree:
    """`function(stacked[which[i]], *rows[i])` for every i, stacked on a new leading axis.

    Args:
      function: of a tree and any number of pytrees of arrays; what it closes over is shared by all rows.
      stacked: leaves of shape (n, ...).
      which: positions in 0..n-1, one a row. They are not checked.
      rows: pytrees with leaves of shape (b, ...).
    """
    # Inside shard_map devices see different rows: what these choose from counts as different too.
    stacked = jax.tree.map(lambda x: varying(x, jax.typeof(which).manual_axis_type.varying), stacked)
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(_first(stacked), *map(_first, rows))
    jaxpr, trees, arrays = closed.jaxpr, jax.tree.leaves(stacked), jax.tree.leaves(rows)
    tree_vars, row_vars = jaxpr.invars[: len(trees)], jaxpr.invars[len(trees) :]
    # With fewer rows than trees it is cheaper to gather first.
    equations = _stages(jaxpr, tree_vars, row_vars, gather_first=bool(trees) and trees[0].shape[0] > which.shape[0])
    shared = _evaluate(equations[_SHARED], dict(zip(jaxpr.constvars, closed.consts)))
    made = {*tree_vars, *(v for e in equations[_TREE] for v in e.outvars)}
    read = _variables(v for vs in (*(e.invars for e in equations[_ROW]), jaxpr.outvars) for v in vs)
    border = [v for v in read if v in made]

    def of_tree(leaves: Sequence[Array]) -> list[Array]:
        values = _evaluate(equations[_TREE], shared | dict(zip(tree_vars, leaves)))
        return [values[v] for v in border]

    def of_row(chosen: Sequence[Array], row: Sequence[Array]) -> list[Array]:
        values = _evaluate(equations[_ROW], shared | dict(zip((*border, *row_vars), (*chosen, *row))))
        return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars]

    chosen = [jnp.take(x, which, axis=0, mode="clip") for x in jax.vmap(of_tree)(trees)] if border else []
    outputs = jax.vmap(of_row, axis_size=which.shape[0])(chosen, arrays)
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[0], tree)  # not shapes: inside shard_map a type says more


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(v for v in atoms if not isinstance(v, core.Literal)))


def _stages(jaxpr: Any, tree_vars: Sequence[Any], row_vars: Sequence[Any], gather_first: bool) -> tuple[list[Any], ...]:
    """The equations by the latest thing that they depend on."""
    stage = dict.fromkeys(jaxpr.constvars, _SHARED) | dict.fromkeys(tree_vars, _TREE) | dict.fromkeys(row_vars, _ROW)
    out: tuple[list[Any], ...] = ([], [], [])
    for e in jaxpr.eqns:
        s = max((stage[v] for v in _variables(e.invars)), default=_SHARED)
        if s == _TREE and (gather_first or _only_repeats(e)):
            s = _ROW
        out[s].append(e)
        stage.update(dict.fromkeys(e.outvars, s))
    return out


def _only_repeats(equation: Any) -> bool:
    """A broadcast costs nothing where it is used; gathering what it makes would."""
    size = lambda v: math.prod(v.aval.shape)
    return equation.primitive.name == "broadcast_in_dim" and size(equation.outvars[0]) > size(equation.invars[0])


def _evaluate(equations: Sequence[Any], values: dict[Any, Any]) -> dict[Any, Any]:
    values = dict(values)
    for e in equations:
        operands = [v.val if isinstance(v, core.Literal) else values[v] for v in e.invars]
        values.update(zip(e.outvars, bind_again(e, operands)))
    return values
