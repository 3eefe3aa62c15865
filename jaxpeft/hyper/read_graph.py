"""From a jaxpr to the nodes and edges of a drawing of the model; see `graph`, which this belongs to."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxpeft import trees
from jaxpeft.hyper.graph_roles import (
    Act,
    Leaf,
    Par,
    Value,
    letters,
    made_of_parameters,
    of_product,
    of_rows,
    one_step,
    usual_roles,
)
from jaxpeft.hyper.hypernetwork import TargetError
from jaxpeft.interpret import scan_counts

OPS = (
    "input", "linear", "conv", "depthwise", "embedding", "position", "token", "norm", "scale", "bias", "parameter",
    "product", "sum", "gate", "softmax", "activation", "rotary", "pool", "mean", "concat", "select", "index", "other",
)  # fmt: skip


class Slot(NamedTuple):
    """One tensor that a node holds: a parameter, or one layer's slice of a stacked one.

    Attributes:
      op: the type of its node.
      path: of the parameter.
      index: the layer, or nothing; nested scans give several numbers.
      shape: without the axes that count layers.
      roles: a letter for each axis of `shape`: "o" outputs, "i" inputs, "h" and "w" a window, "n" places that a table of
        positions has a row for, "." an axis of size one.
      node: that owns it.
      part: 0 a matrix, a kernel, a scale; 1 what is added (a bias, a norm's shift).
    """

    op: str
    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    roles: str
    node: int
    part: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(c_out, c_in, k_h, k_w); a vector is (c, 1, 1, 1), a table of n positions (1, c, √n, √n), rounded down."""
        of = lambda letter: int(np.prod([n for n, r in zip(self.shape, self.roles) if r == letter], initial=1))
        if "n" in self.roles:
            side = int(of("n") ** 0.5)
            return 1, of("i"), side, side
        return of("o"), of("i"), of("h"), of("w")


_ENTERED = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general"}
_INDEXED = {"gather", "dynamic_slice", "dynamic_update_slice", "scatter", "scatter_add", "scatter-add", "sort", "top_k"}
_POOLS = {
    "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin", "cumsum", "cumprod",
    "cummax", "cummin", "cumlogsumexp", "reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min",
}  # fmt: skip
_NONLINEAR = {
    "max", "min", "pow", "integer_pow", "square", "cbrt", "exp", "exp2", "expm1", "log", "log1p", "tanh", "tan", "sin",
    "cos", "asin", "acos", "atan", "sinh", "cosh", "atan2", "logistic", "erf", "erfc", "erf_inv", "abs", "sign", "floor",
    "ceil", "round", "clamp", "rem", "lgamma", "digamma", "select_n",
}  # fmt: skip
_PLAIN = {
    "add", "add_any", "sub", "mul", "div", "neg", "rsqrt", "sqrt", "reduce_sum", "concatenate", "reshape", "transpose",
    "squeeze", "expand_dims", "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "name", "stop_gradient",
    "slice", "split", "pad", "rev", "reduce_precision", "sharding_constraint", "mesh_cast", "pvary", "device_put",
    "optimization_barrier", "real", "imag", "bitcast_convert_type", "is_finite", "not", "and", "or", "xor", "eq", "ne",
    "lt", "le", "gt", "ge", "nextafter", "shift_left", "shift_right_logical", "shift_right_arithmetic", "random_bits",
    "random_wrap", "random_unwrap", "random_seed", "random_fold_in", "random_split", "threefry2x32",
}  # fmt: skip
_KNOWN = _PRODUCTS | _INDEXED | _POOLS | _NONLINEAR | _PLAIN
_JOINT = {"add": "sum", "add_any": "sum", "sub": "sum", "concatenate": "concat", "select_n": "select", "max": "select"}


def _kind(since: frozenset[str]) -> str | None:
    """What the operations gathered over one node are as a node; None: nothing worth one."""
    if since & {"rsqrt", "sqrt"}:
        return "norm"
    if "exp" in since and since & {"reduce_sum", "reduce_max"}:
        return "softmax"
    if since & _NONLINEAR:
        return "activation"
    if {"neg", "concatenate"} <= since:
        return "rotary"
    return "pool" if since & _POOLS else "mean" if "reduce_sum" in since else None


def _is_activation(since: frozenset[str]) -> bool:
    """Whether what has gathered is one for sure: it may still become a norm after squares, a softmax after exponentials."""
    return _kind(since) == "activation" and "exp" not in since and bool(since & _NONLINEAR - {"square", "integer_pow"})


class Drawing(NamedTuple):
    """Nodes in topological order: their types, the tensors they hold, which one each node is of (or -1), and the edges."""

    ops: list[int]
    slots: tuple[Slot, ...]
    owned: list[int]
    edges: np.ndarray  # (E, 2)


def draw(apply_fn: Callable[..., Any], spec: Any, inputs: Sequence[Any], unknown: str) -> Drawing:
    """The drawing of `apply_fn(params, *inputs)`; `spec` are shapes."""
    flat = trees.by_path(spec)
    jaxpr = jax.make_jaxpr(apply_fn)(spec, *inputs).jaxpr
    reader = _Reader(flat, unknown)
    own = [
        Par(((p, ()),), tuple((i,) for i in range(x.ndim))) if trees.is_learned(p, x) else None for p, x in flat.items()
    ]
    reader.finish(reader.run(jaxpr, [*own, *[Act(0)] * (len(jaxpr.invars) - len(own))]))
    return reader.drawing()


class _Reader:
    """Walks a jaxpr and keeps the nodes as they come."""

    def __init__(self, flat: dict[str, Any], unknown: str) -> None:
        self.flat, self.unknown = flat, unknown
        self.op, self.leaf = ["input"], [None]
        self.edges: set[tuple[int, int]] = set()
        self.slots: dict[Leaf, Slot] = {}
        self.made: dict[tuple[int, str], int] = {}
        self.outputs: set[int] = set()
        self.shifted: set[int] = set()  # norms whose shift is known

    # ------------------------------------------------------------------------------------------------------- nodes

    def node(self, op: str, before: Iterable[int] = (), leaf: Any = None) -> int:
        self.op.append(op)
        self.leaf.append(leaf)
        new = len(self.op) - 1
        self.edges |= {(i, new) for i in before}
        return new

    def settled(self, x: Act) -> int:
        """The node of an activation, made of what has gathered if need be."""
        kind = _kind(x.since)
        if kind is None:
            return x.node
        if (x.node, kind) not in self.made:
            self.made[x.node, kind] = self.node(kind, [x.node])
        return self.made[x.node, kind]

    def holder(self, op: str, par: Par, before: Iterable[int], roles: str | None = None, part: int = 0) -> Act:
        """A node that holds a parameter; where several made the value, the others have nodes before it."""
        others = [self.node("parameter", (), leaf) for leaf in par.leaves[1:]]
        for at, leaf in zip(others, par.leaves[1:]):
            self.own(leaf, at, None, 0)
        new = self.node(op, [*before, *others], par.leaves[0])
        self.own(par.leaves[0], new, par.table or roles, part)
        return Act(new)

    def own(self, leaf: Leaf, node: int, roles: str | None, part: int) -> None:
        if leaf not in self.slots:
            shape = self.flat[leaf[0]].shape[len(leaf[1]) :]
            self.slots[leaf] = Slot(
                self.op[node], *leaf, shape, usual_roles(shape) if roles is None else roles, node, part
            )

    def own_shape(self, par: Par) -> tuple[int, ...]:
        path, index = par.leaves[0]
        return self.flat[path].shape[len(index) :]

    def roles(self, par: Par, axes: Sequence[str]) -> str | None:
        """Roles of the leaf's axes, from a letter for each axis of the value."""
        if par.axes is None or par.leaves[1:]:
            return None
        first = len(par.leaves[0][1])
        found = {axis - first: letter for group, letter in zip(par.axes, axes) for axis in group}
        return "".join(
            "." if n == 1 and found.get(i) != "i" else found.get(i, "i") for i, n in enumerate(self.own_shape(par))
        )

    # --------------------------------------------------------------------------------------------------- equations

    def run(self, jaxpr: Any, args: Sequence[Value]) -> list[Value]:
        values: dict[Any, Value] = dict(zip(jaxpr.invars, args, strict=True))
        read = lambda v: None if isinstance(v, core.Literal) else values.get(v)
        for equation in jaxpr.eqns:
            values.update(zip(equation.outvars, self.equation(equation, [read(v) for v in equation.invars])))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, e: Any, operands: list[Value]) -> list[Value]:
        name, count = e.primitive.name, len(e.outvars)
        if all(x is None for x in operands):
            return [None] * count
        if name in ("scan", "while", "cond"):
            return getattr(self, f"_{name}")(e.params, operands)
        if name in _ENTERED:
            inner = next(e.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in e.params)
            return self.run(getattr(inner, "jaxpr", inner), operands)
        if name not in _KNOWN and self.unknown == "refuse":
            raise TargetError(
                f"the operation {name!r} is not in the vocabulary of graphs; unknown='other' makes a node of that type, or "
                "write the model without it"
            )
        if not any(isinstance(x, Act) for x in operands):
            return [made_of_parameters(e, operands)] * count
        out = self.holding(e, operands) if any(isinstance(x, Par) for x in operands) else None
        if out is None:
            whole = [self.holder("parameter", x, ()) if isinstance(x, Par) else x for x in operands]
            out = self.joined(e, [x for x in whole if isinstance(x, Act)])
        return [out] * count

    def holding(self, e: Any, operands: list[Value]) -> Act | None:
        """The node of an equation that reads a parameter; None where the parameter needs a node of its own first."""
        name, (at, *more) = e.primitive.name, [i for i, x in enumerate(operands) if isinstance(x, Par)]
        acts = [x for x in operands if isinstance(x, Act)]
        par, x, shape = operands[at], acts[0], e.invars[at].aval.shape
        assert isinstance(par, Par)
        if more or (len(acts) > 1 and name != "concatenate"):
            return None
        if name in _PRODUCTS:
            if name == "conv_general_dilated" and at != 1:
                return None
            op, axes = of_product(e, at)
            return self.holder(op, par, [self.settled(x)], self.roles(par, axes))
        if name == "gather" and at == 0:
            return self.holder("embedding", par, [self.settled(x)], self.roles(par, of_rows(e)))
        wide = [i for i, n in enumerate(shape) if n > 1]
        if name == "concatenate":
            token = self.holder("token", par, (), self.roles(par, letters(shape, "o")), part=1)
            return self.joined(e, [token, *acts])
        if name in ("mul", "div"):
            roles = self.roles(par, letters(shape, "o"))
            if _kind(x.since) == "norm":
                return self.holder("norm", par, [x.node], roles)
            return self.holder("scale", par, [self.settled(x)], roles)
        if name not in ("add", "sub"):
            return None
        if par.table or len(wide) > 1:
            return self.holder("position", par, [self.settled(x)], self.roles(par, letters(shape, "i", "n")), part=1)
        roles = self.roles(par, letters(shape, "o"))
        if self.op[x.node] == "norm" and self.leaf[x.node] and _kind(x.since) is None and x.node not in self.shifted:
            self.shifted.add(x.node)
            self.own(par.leaves[0], x.node, roles, 1)
            return x
        return self.holder("bias", par, [self.settled(x)], roles, part=1)

    def joined(self, e: Any, acts: list[Act]) -> Act:
        """An equation of activations alone."""
        name = e.primitive.name
        if name not in _KNOWN:
            return Act(self.node("other", {self.settled(x) for x in acts}))
        if name in _PRODUCTS and len(acts) > 1:
            return Act(self.node("product", {self.settled(x) for x in acts}))
        if name.startswith("reduce_window"):
            return Act(self.node("pool", {self.settled(x) for x in acts}))
        if name == "reduce_sum" and _is_activation(acts[0].since):
            acts = [Act(self.settled(acts[0]))]  # a mean of activations, neither a norm nor a softmax
        if len({x.node for x in acts}) == 1:
            return Act(acts[0].node, frozenset().union(*(x.since for x in acts), self.traces(e, acts)))
        nodes = {self.settled(x) for x in acts}
        late, *early = sorted(nodes, reverse=True)
        if name in ("mul", "div") and all(self.op[i] == "softmax" and (i, late) in self.edges for i in early):
            return Act(late)  # a softmax whose sum is divided by after the product with the values
        op = "index" if name in _INDEXED else _JOINT.get(name, "gate")
        return Act(late if not early else self.node(op, nodes))

    def traces(self, e: Any, acts: list[Act]) -> set[str]:
        """What an equation over one node adds to what has gathered there: of whole numbers, only reductions count."""
        name = e.primitive.name
        real = any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in e.outvars)
        if not real:
            return {name} & _POOLS
        if name == "select_n" and len(acts) == 1:
            return set()  # a mask that does not depend on the input
        return {name, "square"} if name == "mul" and len(acts) > 1 else {name}

    # ------------------------------------------------------------------------------------------------ control flow

    def _scan(self, params: dict[str, Any], operands: list[Value]) -> list[Value]:
        (nc, nk), body = scan_counts(params), params["jaxpr"].jaxpr
        consts, carry, xs = operands[:nc], operands[nc : nc + nk], operands[nc + nk :]
        if not any(isinstance(x, Par) for x in xs):
            return self.run(body, operands)
        steps = range(params["length"])
        columns = []
        for i in reversed(steps) if params["reverse"] else steps:
            out = self.run(body, [*consts, *carry, *(one_step(x, i) for x in xs)])
            carry = out[:nk]
            columns.append(out[nk:])
        return [*carry, *(self.gathered(y, "concat") for y in zip(*columns))]

    def _while(self, params: dict[str, Any], operands: list[Value]) -> list[Value]:
        nc = params["cond_nconsts"]
        return self.run(params["body_jaxpr"].jaxpr, operands[nc:])

    def _cond(self, params: dict[str, Any], operands: list[Value]) -> list[Value]:
        index, *rest = operands
        if index is None:  # by the platform, with the formulation for any platform last
            return self.run(params["branches"][-1].jaxpr, rest)
        ways = [self.run(branch.jaxpr, rest) for branch in params["branches"]]
        return [self.gathered([index, *way], "select") for way in zip(*ways)]

    def gathered(self, values: Sequence[Value], op: str) -> Value:
        acts = {self.settled(x) for x in values if isinstance(x, Act)}
        if not acts:
            return next((x for x in values if x is not None), None)
        return Act(acts.pop()) if len(acts) == 1 else Act(self.node(op, acts))

    # -------------------------------------------------------------------------------------------------- the result

    def finish(self, outputs: Sequence[Value]) -> None:
        self.outputs = {self.settled(x) for x in outputs if isinstance(x, Act)}
        read = {path for path, _ in self.slots}
        for path, x in self.flat.items():
            if trees.is_learned(path, x) and path not in read:
                self.own((path, ()), self.node("parameter", (), (path, ())), None, 0)

    def drawing(self) -> Drawing:
        n = len(self.op)
        before: list[list[int]] = [[] for _ in range(n)]
        for i, j in self.edges:
            before[j].append(i)
        seen, todo = {0}, [*self.outputs, *(i for i in range(n) if self.leaf[i])]
        while todo:
            if (i := todo.pop()) not in seen:
                seen.add(i)
                todo += before[i]
        kept = sorted(seen)
        new = {old: i for i, old in enumerate(kept)}
        order = {leaf: i for i, leaf in enumerate(sorted(self.slots))}
        slots = tuple(s._replace(node=new[s.node]) for s in (self.slots[leaf] for leaf in order))
        owned = [order[leaf] if (leaf := self.leaf[i]) else -1 for i in kept]
        pairs = [(new[i], new[j]) for i, j in self.edges if i in seen and j in seen]
        return Drawing([OPS.index(self.op[i]) for i in kept], slots, owned, np.array(pairs, int).reshape(-1, 2))
