"""Side networks' view of a frozen backbone: read its hidden states, answer in its place.

Hidden states are marked in the model by `jax.ad_checkpoint.checkpoint_name(x, name)`, which does nothing by itself (our
models mark "embedded", every block's "hidden" and "final_hidden"); `named` marks the modules of a model that does not.
Readers find the marks in the traced function, inside jit, remat and scan as well, stop gradients there, and may
exchange the value at one mark, or at one pass of it. What the answer replaces is dead code, and nothing differentiated
lies below a tap, so the backward pass never enters the backbone below the answer. What stands above it runs on as it is:
the last layers as a function.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jaxtyping import Array

from jaxpeft.hooks import Hook, hooked
from jaxpeft.interpret import bind_again, scan_counts
from jaxpeft.method import ApplyFn

Taps = dict[str, list[Array]]
Answer = Callable[[Taps], Array]
At = str | tuple[str, int]


class TapError(ValueError):
    """A hidden state that the model does not mark, or marks where it cannot be read."""


def named(apply_fn: ApplyFn, names: Mapping[str, str]) -> ApplyFn:
    """`apply_fn` with the outputs of modules marked: `{pattern over module paths: name}`; Linen or `from_nnx` models."""

    def marking(name: str) -> Hook:
        return Hook("**", lambda site, call, *a, **k: checkpoint_name(call(*a, **k), name))

    hooks = [marking(name)._replace(at=pattern) for pattern, name in names.items()]
    return hooked(hooks, apply_fn, {}, "named")


def read(
    apply_fn: ApplyFn, names: Sequence[str], *, answer_at: At | None = None, answer: Answer | None = None
) -> Callable[..., tuple[Any, Taps]]:
    """`apply_fn` that also returns the hidden states it marks, behind a stop-gradient.

    Args:
      apply_fn: any function of arrays.
      names: marks to read.
      answer_at: the mark whose value is exchanged, whenever it is passed; or `(mark, i)`, where only its i-th pass is
        (from 0; from the end where negative), in the turns of a scan as well.
      answer: `(taps so far, what it replaces among them) -> array` of the shape of the value at `answer_at`.

    Returns:
      A function giving `(output, {name: [array, ...]})`, one array for every time the mark is passed; the layers of a
      scan one by one, in order.

    Raises:
      TapError: a mark is not met, or not as often as `answer_at` says, or stands inside a conditional or a while loop.
    """
    place, number = answer_at if isinstance(answer_at, tuple) else (answer_at, None)
    wanted: frozenset[str] = frozenset([*names, *([place] if place else [])])

    @functools.wraps(apply_fn)
    def run(*args: Any, **kwargs: Any) -> tuple[Any, Taps]:
        leaves, structure = jtu.tree_flatten((args, kwargs))
        at = [i for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")]

        def flat(*xs: Any) -> Any:
            full = list(leaves)
            for i, x in zip(at, xs):
                full[i] = x
            a, k = jtu.tree_unflatten(structure, full)
            return apply_fn(*a, **k)

        arrays = [leaves[i] for i in at]
        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*arrays)
        met = sorted(_marks(closed.jaxpr))
        if missing := [n for n in sorted(wanted) if n not in met]:
            raise TapError(f"the model marks no {missing[0]!r}; it marks {met or 'nothing'} (see `readers.named`)")
        times = _passes(closed.jaxpr, place) if place else 0
        if number is not None and not -times <= number < times:
            raise TapError(f"the model passes {place!r} {times} times: there is no pass {number} to answer at")
        reader = _Reader(wanted, place, None if number is None else number % times, answer)
        outputs, taps = reader.evaluate(closed.jaxpr, closed.consts, arrays, {})
        return jtu.tree_unflatten(jtu.tree_structure(shapes), outputs), taps

    return run


class _Reader:
    """One walk over a jaxpr. `before` are the taps that enclosing calls have met already."""

    def __init__(self, wanted: frozenset[str], answer_at: str | None, number: int | None, answer: Answer | None):
        self.wanted, self.answer_at, self.number, self.answer = wanted, answer_at, number, answer

    def evaluate(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], before: Taps) -> tuple[list[Any], Taps]:
        values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))
        taps: Taps = {}
        for equation in jaxpr.eqns:
            operands = [v.val if isinstance(v, core.Literal) else values[v] for v in equation.invars]
            outputs, new = self._equation(equation, operands, _joined(before, taps))
            taps = _joined(taps, new)
            values.update(zip(equation.outvars, outputs))
        return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars], taps

    def _equation(self, equation: Any, operands: list[Any], before: Taps) -> tuple[Sequence[Any], Taps]:
        kind, params = equation.primitive.name, equation.params
        if kind == "name" and params["name"] in self.wanted:
            return self._mark(params["name"], operands[0], before)
        inner = [j for j in _inner(params) if _marks(j) & self.wanted]
        if not inner:
            return bind_again(equation, operands), {}
        if kind in ("jit", "closed_call", "remat2", "checkpoint"):
            (jaxpr,) = inner
            closed = params.get("jaxpr", params.get("call_jaxpr"))
            consts = closed.consts if isinstance(closed, core.ClosedJaxpr) else ()
            body = lambda xs: self.evaluate(jaxpr, consts, xs, before)
            # Recomputed, a block would run a second time for the one pass that is answered at its end, although no
            # gradient needs what is in it.
            if kind in ("remat2", "checkpoint") and self._turn(jaxpr, before) is None:
                return jax.checkpoint(body, policy=params["policy"], prevent_cse=params["prevent_cse"])(operands)
            return (jax.jit(body) if kind == "jit" else body)(operands)
        if kind == "scan":
            return self._scan(params, operands, before)
        raise TapError(f"a mark among {sorted(self.wanted)} stands inside {kind!r}, where it cannot be read")

    def _turn(self, body: Any, before: Taps, length: int = 1) -> int | None:
        """In which of `length` turns of `body` the one pass that is answered lies."""
        if self.answer_at is None or self.number is None:
            return None
        each = _passes(body, self.answer_at)
        to_go = self.number - len(before.get(self.answer_at, []))
        return to_go // each if 0 <= to_go < each * length else None

    def _mark(self, name: str, x: Array, before: Taps) -> tuple[list[Any], Taps]:
        seen = {name: [lax.stop_gradient(x)]}
        if name != self.answer_at or self.number not in (None, len(before.get(name, []))):
            return [checkpoint_name(x, name)], seen
        assert self.answer is not None
        y = self.answer(_joined(before, seen))
        if y.shape != x.shape:
            raise TapError(f"the answer at {name!r} has shape {y.shape}, the model's value {x.shape}")
        return [y.astype(x.dtype)], seen

    def _scan(self, params: dict[str, Any], operands: list[Any], before: Taps) -> tuple[Sequence[Any], Taps]:
        body, (nc, nk) = params["jaxpr"], scan_counts(params)
        if self.number is None and self.answer_at in _marks(body.jaxpr):
            raise TapError(
                f"the answer's place {self.answer_at!r} stands inside a scan: it would be answered at each step. "
                "Say at which: (mark, number)"
            )
        carry, xs = operands[nc : nc + nk], operands[nc + nk :]
        order = range(params["length"])[:: -1 if params["reverse"] else 1]

        def turn(carry: Any, own: Any, before: Taps) -> Any:
            outputs, taps = self.evaluate(body.jaxpr, body.consts, [*operands[:nc], *carry, *own], before)
            return outputs[:nk], (outputs[nk:], taps)

        answered = self._turn(body.jaxpr, before, len(order))
        if answered is None:
            options = {k: params[k] for k in ("length", "reverse", "unroll")}
            carry, (ys, stacked) = lax.scan(lambda c, own: turn(c, own, before), carry, xs, **options)
            return [*carry, *ys], _unstacked(stacked, order)
        parts: list[Sequence[Any]] = []
        taps: Taps = {}
        for turns in (order[:answered], order[answered : answered + 1], order[answered + 1 :]):
            now = _joined(before, taps)

            # By index: a loop over a part of `xs`, which may be all layers' weights, would copy that part.
            def at(carry: Any, i: Any, now: Taps = now) -> Any:
                return turn(carry, [lax.dynamic_index_in_dim(x, i, keepdims=False) for x in xs], now)

            if len(turns) == 1:
                carry, (ys, new) = at(carry, turns[0])
                ys = [y[None] for y in ys]
            elif turns:
                carry, (ys, stacked) = lax.scan(at, carry, jnp.asarray(turns), unroll=params["unroll"])
                new = _unstacked(stacked, range(len(turns)))
            else:
                continue
            parts, taps = [*parts, ys], _joined(taps, new)
        ys = [jnp.concatenate([part[i] for part in parts]) for i in range(len(parts[0]))]
        return [*carry, *(jnp.flip(y, 0) if params["reverse"] else y for y in ys)], taps


def _unstacked(stacked: Mapping[str, list[Array]], order: Sequence[int]) -> Taps:
    """The taps of a loop's turns one by one."""
    return {n: [x[i] for i in order for x in parts] for n, parts in stacked.items()}


def _joined(a: Taps, b: Taps) -> Taps:
    return {n: [*a.get(n, []), *b.get(n, [])] for n in {**a, **b}}


def _marks(jaxpr: Any) -> set[str]:
    """The names that a jaxpr marks, however deep inside."""
    found = {e.params["name"] for e in jaxpr.eqns if e.primitive.name == "name"}
    return found.union(*(_marks(j) for e in jaxpr.eqns for j in _inner(e.params)))


def _passes(jaxpr: Any, name: str) -> int:
    """How often a run of a jaxpr passes a mark; of branches, all are counted."""
    here = sum(e.primitive.name == "name" and e.params["name"] == name for e in jaxpr.eqns)
    return here + sum(e.params.get("length", 1) * _passes(j, name) for e in jaxpr.eqns for j in _inner(e.params))


def _inner(params: Mapping[str, Any]) -> list[Any]:
    """The jaxprs that an equation holds."""
    held = [x for v in params.values() for x in (v if isinstance(v, tuple | list) else [v])]
    return [
        x.jaxpr if isinstance(x, core.ClosedJaxpr) else x for x in held if isinstance(x, core.ClosedJaxpr | core.Jaxpr)
    ]
