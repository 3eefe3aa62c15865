"""Runs any JAX function on array-like weights without forming them.

`lift(function)` is `function`, accepting `ArrayLike` leaves wherever it accepts arrays. The function is traced once on
the dense shapes; its equations are then evaluated in order:

- an equation without an array-like operand is bound again untouched, whatever its primitive (custom_vjp, shard_map and
  Pallas calls included);
- one with a rule follows it: products on either side, convolutions, look-ups, and the structure around them;
- jit, remat, scan, cond and while are entered;
- anything else forms the weight, which is correct, and is reported to `on_dense`.

Lifted functions nest, and compose with jit, grad, vmap, scan and sharding: the values' parts are ordinary arrays.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import api_util, lax
from jax.extend import core
from jax.extend.core import primitives as prims
from jaxtyping import Array

from jaxpeft.weights.array_like import ArrayLike, is_array_like

Policy = Literal["warn", "allow", "refuse"] | Callable[[str, ArrayLike], None]
F = TypeVar("F", bound=Callable[..., Any])


class DenseWarning(UserWarning):
    """A weight was formed in full because an operation has no rule."""


class DenseError(RuntimeError):
    """A weight would have been formed in full and the policy is to refuse."""


def lift(function: F, on_dense: Policy = "warn") -> F:
    """`function`, accepting array-like leaves in its arguments.

    Args:
      function: any function of pytrees. Arrays in its arguments are traced; everything else is passed as it is, so
        Python flags stay static.
      on_dense: what happens where an operation has no rule and the weight must be formed: "warn" (a `DenseWarning` at
        trace time), "allow", "refuse" (raises `DenseError`), or a function of the primitive's name and the value.

    Returns:
      A function with the same signature; its results are ordinary arrays. Jit it: every eager call traces anew.
    """
    report = _reporter(on_dense)

    @functools.wraps(function)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jtu.tree_flatten((args, kwargs), is_leaf=is_array_like)
        if not any(map(is_array_like, leaves)):
            return function(*args, **kwargs)
        at = [i for i, x in enumerate(leaves) if isinstance(x, ArrayLike | jax.Array | np.ndarray)]
        traced = [jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array_like(x) else x for x in (leaves[i] for i in at)]

        def flat(*xs: Any) -> Any:
            full = list(leaves)
            for i, x in zip(at, xs):
                full[i] = x
            a, k = jtu.tree_unflatten(structure, full)
            return function(*a, **k)

        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*traced)
        outputs = _evaluate(closed.jaxpr, closed.consts, [leaves[i] for i in at], report)
        return jtu.tree_unflatten(jtu.tree_structure(shapes), [_form(y, "return", report) for y in outputs])

    return lifted  # type: ignore[return-value]


def _reporter(on_dense: Policy) -> Callable[[str, ArrayLike], None]:
    def warn(primitive: str, value: ArrayLike) -> None:
        warnings.warn(
            f"{primitive!r} has no rule for this weight: {type(value).__name__}{list(value.shape)} is formed in full "
            "(correct, but it costs the memory of a dense copy)",
            DenseWarning,
            stacklevel=2,
        )

    def refuse(primitive: str, value: ArrayLike) -> None:
        raise DenseError(f"{primitive!r} has no rule for this weight: {type(value).__name__}{list(value.shape)}")

    if callable(on_dense):
        return on_dense
    table = {"warn": warn, "allow": lambda *_: None, "refuse": refuse}
    if on_dense not in table:
        raise ValueError(f"on_dense={on_dense!r}: expected one of {sorted(table)} or a function")
    return table[on_dense]


# ------------------------------------------------------------------------------------------------------- the evaluator

Report = Callable[[str, ArrayLike], None]
Rule = Callable[[list[Any], dict[str, Any], Report], Any]
_RULES: dict[str, Rule] = {}


def _rule(*primitives: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        # By name: not every primitive (ragged_dot_general) is public as an object.
        _RULES.update(dict.fromkeys([getattr(p, "name", p) for p in primitives], function))
        return function

    return register


def _form(x: Any, primitive: str, report: Report) -> Any:
    if not is_array_like(x):
        return x
    report(primitive, x)
    return x.dense()


def bind_again(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """One equation as it stands. A jaxpr of one equation keeps every primitive working without knowing it."""
    inputs = {v: x for v, x in zip(equation.invars, operands) if not isinstance(v, core.Literal)}
    one = core.Jaxpr((), list(inputs), list(equation.outvars), [equation], equation.effects, _NAMELESS)
    return core.jaxpr_as_fun(core.ClosedJaxpr(one, ()))(*inputs.values())


# jax wants a jaxpr's arguments named for its error messages; those of one equation have no names.
_NAMELESS = api_util.debug_info("lift", bind_again, (None, ()), {}).with_unknown_names()


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], report: Report) -> list[Any]:
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, core.Literal) else values[v]

    for equation in jaxpr.eqns:
        operands = [read(v) for v in equation.invars]
        outputs: Any = NotImplemented
        if any(map(is_array_like, operands)):
            rule = _RULES.get(equation.primitive.name)
            outputs = NotImplemented if rule is None else rule(operands, equation.params, report)
            if outputs is NotImplemented:
                operands = [_form(x, equation.primitive.name, report) for x in operands]
        if outputs is NotImplemented:
            outputs = bind_again(equation, operands)
        values.update(zip(equation.outvars, outputs))
    return [read(v) for v in jaxpr.outvars]


# ------------------------------------------------------------------------------------------------------------ products


def _one(y: Any) -> Any:
    return y if y is NotImplemented else [y]


@_rule(prims.dot_general_p)
def _dot_general(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    left, right = operands
    (cl, cr), (bl, br) = params["dimension_numbers"]
    options = {k: params[k] for k in ("precision", "preferred_element_type")}
    if is_array_like(left) and is_array_like(right):
        # Two weights multiplied together (a factored layer): the smaller one is formed, the other stays lazy.
        small = min((left, right), key=lambda w: np.prod(w.shape))
        report("dot_general of two weights", small)
        left, right = (left.dense(), right) if small is left else (left, right.dense())
    if is_array_like(right):
        return _one(right.dot(left, (cl, cr), (bl, br), **options))
    precision = options["precision"]
    options["precision"] = tuple(reversed(precision)) if isinstance(precision, tuple) else precision
    y = left.dot(right, (cr, cl), (br, bl), **options)
    if y is NotImplemented:
        return y
    batch, right_free = len(bl), right.ndim - len(cr) - len(br)
    n = y.ndim  # (batch, right free, left free) -> (batch, left free, right free)
    return [jnp.transpose(y, (*range(batch), *range(batch + right_free, n), *range(batch, batch + right_free)))]


@_rule(prims.conv_general_dilated_p)
def _conv(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    x, kernel = operands
    return NotImplemented if is_array_like(x) else _one(kernel.conv(x, params))


@_rule("ragged_dot_general")
def _ragged_dot(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    x, w, group_sizes = operands
    plain = params["ragged_dot_dimension_numbers"]
    (cl, cr), (bl, br) = plain.dot_dimension_numbers
    usual = ((tuple(cl), tuple(cr)), (tuple(bl), tuple(br))) == (((1,), (1,)), ((), ()))
    if is_array_like(x) or not usual or tuple(plain.rhs_group_dimensions) != (0,):
        return NotImplemented
    return _one(w.ragged_dot(x, group_sizes, params))


@_rule(prims.gather_p)
def _gather(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    """Rows along one axis, as embeddings are read; other gathers go dense."""
    w, indices = operands
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if is_array_like(indices) or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return NotImplemented
    (axis,) = numbers.start_index_map
    whole = all(n == m for i, (n, m) in enumerate(zip(sizes, w.shape)) if i != axis)
    index_axes = tuple(range(indices.ndim - 1))
    if numbers.collapsed_slice_dims != (axis,) or not whole:
        return NotImplemented

    def look_up(x: Array, at: int) -> Array:
        cut = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(index_axes), len(index_axes) + x.ndim - 1)),
            collapsed_slice_dims=(at,),
            start_index_map=(at,),
        )
        window = tuple(1 if i == at else n for i, n in enumerate(x.shape))
        return lax.gather(x, indices, cut, window, mode=params["mode"], fill_value=params["fill_value"])

    y = w.take(axis, look_up)
    if y is NotImplemented:
        return y
    kept = iter(range(len(index_axes), y.ndim))  # y is (index axes, kept axes); the equation may interleave them
    index = iter(index_axes)
    return [jnp.transpose(y, [next(kept) if d in numbers.offset_dims else next(index) for d in range(y.ndim)])]


# ----------------------------------------------------------------------------------------------------------- structure


@_rule(prims.convert_element_type_p)
def _convert(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    return _one(operands[0].astype(params["new_dtype"]))


@_rule(prims.transpose_p)
def _transpose(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    return _one(operands[0].transpose(tuple(params["permutation"])))


@_rule(prims.reshape_p)
def _reshape(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    return NotImplemented if params.get("dimensions") else _one(operands[0].reshape(tuple(params["new_sizes"])))


@_rule(prims.squeeze_p)
def _squeeze(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    w = operands[0]
    return _one(w.reshape(tuple(n for i, n in enumerate(w.shape) if i not in params["dimensions"])))


@_rule(prims.broadcast_in_dim_p)
def _expand_dims(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    w, where, shape = operands[0], params["broadcast_dimensions"], params["shape"]
    only_ones = all(shape[d] == w.shape[i] for i, d in enumerate(where)) and np.prod(shape) == np.prod(w.shape)
    return _one(w.reshape(tuple(shape))) if only_ones and list(where) == sorted(where) else NotImplemented


def _axis_cut(w: Any, starts: Sequence[Any], sizes: Sequence[int], strides: Sequence[int]) -> Any:
    changed = [i for i, (n, m, s) in enumerate(zip(sizes, w.shape, strides)) if n != m or s != 1]
    for i in changed:
        w = w.along(
            i,
            lambda x, at, i=i: lax.dynamic_slice_in_dim(x, starts[i], sizes[i], at)[
                (slice(None),) * at + (slice(None, None, strides[i]),)
            ],
        )
        if w is NotImplemented:
            return w
    return w


@_rule(prims.slice_p)
def _slice(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    starts, limits = params["start_indices"], params["limit_indices"]
    return _one(
        _axis_cut(operands[0], starts, [b - a for a, b in zip(starts, limits)], params["strides"] or [1] * len(starts))
    )


@_rule(prims.dynamic_slice_p)
def _dynamic_slice(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    w, *starts = operands
    return _one(_axis_cut(w, starts, params["slice_sizes"], [1] * len(starts))) if is_array_like(w) else NotImplemented


@_rule(prims.mul_p)
def _mul(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    x, y = operands if is_array_like(operands[0]) else operands[::-1]
    return NotImplemented if is_array_like(y) else _one(x.times(jnp.asarray(y)))


@_rule(prims.div_p)
def _div(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    x, y = operands
    return _one(x.times(1 / jnp.asarray(y))) if is_array_like(x) and not is_array_like(y) else NotImplemented


@_rule(prims.neg_p)
def _neg(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    return _one(operands[0].times(jnp.asarray(-1, operands[0].dtype)))


@_rule(prims.copy_p, prims.name_p)
def _same(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    return operands


@_rule(prims.stop_gradient_p)
def _stop_gradient(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    return _one(operands[0].each(lax.stop_gradient))


@_rule("pvary")
def _pvary(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    return _one(operands[0].each(lambda x: varying(x, params["axes"])))


def varying(x: Array, axes: Iterable[str]) -> Array:
    """`x`, inside shard_map, as a value that may differ between the devices along `axes`."""
    new = tuple(a for a in axes if a not in jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, new, to="varying") if new else x


# -------------------------------------------------------------------------------------------------------- control flow


def _entered(jaxpr: Any, consts: Sequence[Any], report: Report, form: str = "") -> Callable[..., list[Any]]:
    def body(*operands: Any) -> list[Any]:
        outputs = _evaluate(jaxpr, consts, operands, report)
        return [_form(y, form, report) for y in outputs] if form else outputs

    return body


@_rule(prims.jit_p)
def _jit(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    body = _entered(params["jaxpr"].jaxpr, params["jaxpr"].consts, report)
    body.__name__ = params["name"]
    return jax.jit(body, inline=params["inline"])(*operands)


@_rule(prims.closed_call_p)
def _call(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    closed = params["call_jaxpr"]
    return _entered(closed.jaxpr, closed.consts, report)(*operands)


@_rule(prims.remat_p)
def _remat(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    body = _entered(params["jaxpr"], (), report)
    return jax.checkpoint(body, policy=params["policy"], prevent_cse=params["prevent_cse"])(*operands)


@_rule(prims.cond_p)
def _cond(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    index, *rest = operands
    branches = [_entered(b.jaxpr, b.consts, report, "a branch's result") for b in params["branches"]]
    return lax.switch(index, branches, *rest)


def _invariant(jaxpr: Any, carry: Sequence[Any], first: int) -> list[bool]:
    """Which carried values the body hands on unchanged: an array-like one among them is as good as a constant."""
    return [jaxpr.outvars[i] is jaxpr.invars[first + i] and is_array_like(x) for i, x in enumerate(carry)]


def _merge(kept: Sequence[bool], yes: Sequence[Any], no: Sequence[Any]) -> list[Any]:
    a, b = iter(yes), iter(no)
    return [next(a) if k else next(b) for k in kept]


@_rule(prims.while_p)
def _while(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    nc, nb = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, carry = operands[:nc], operands[nc : nc + nb], operands[nc + nb :]
    kept = _invariant(body.jaxpr, carry, nb)
    constant = [x for k, x in zip(kept, carry) if k]
    start = [_form(x, "a loop's state", report) for k, x in zip(kept, carry) if not k]

    def test(state: list[Any]) -> Any:
        return _evaluate(cond.jaxpr, cond.consts, [*cond_consts, *_merge(kept, constant, state)], report)[0]

    def step(state: list[Any]) -> list[Any]:
        new = _evaluate(body.jaxpr, body.consts, [*body_consts, *_merge(kept, constant, state)], report)
        return [_form(x, "a loop's state", report) for k, x in zip(kept, new) if not k]

    return _merge(kept, constant, lax.while_loop(test, step, start))


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many the loop's state."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # from jax 0.11
    return len(list(consts)), len(list(carry))


@_rule(prims.scan_p)
def _scan(operands: list[Any], params: dict[str, Any], report: Report) -> Any:
    body, (nc, nk) = params["jaxpr"], scan_counts(params)
    consts, carry, xs = operands[:nc], operands[nc : nc + nk], operands[nc + nk :]
    kept = _invariant(body.jaxpr, carry, nc)
    constant = [x for k, x in zip(kept, carry) if k]
    start = [_form(x, "a loop's state", report) for k, x in zip(kept, carry) if not k]
    # A scanned weight is sliced part by part; parts that all steps share are closed over.
    sliced: list[tuple[Any, Callable[[Any], Any]]] = []
    for x in xs:
        parts = x.scanned() if is_array_like(x) else NotImplemented
        if parts is NotImplemented:
            sliced.append((_form(x, "scan", report), lambda s: s))
        else:
            sliced.append(parts)

    def step(state: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        now = [make(s) for (_, make), s in zip(sliced, slices)]
        outputs = _evaluate(body.jaxpr, body.consts, [*consts, *_merge(kept, constant, state), *now], report)
        formed = [_form(y, "a scan's result", report) for y in outputs[nk:]]
        return [_form(y, "a loop's state", report) for k, y in zip(kept, outputs) if not k], formed

    options = {k: params[k] for k in ("length", "reverse", "unroll")}
    state, ys = lax.scan(step, start, [parts for parts, _ in sliced], **options)
    return [*_merge(kept, constant, state), *ys]
