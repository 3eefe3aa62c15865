"""Side networks' view of a frozen backbone: read its hidden states, answer in its place.

Hidden states are marked in the model by `jax.ad_checkpoint.checkpoint_name(x, name)`, which does nothing by itself (our
models mark "embedded", every block's "hidden" and "final_hidden"); `named` marks the modules of a model that does not.
Readers find the marks in the traced function, inside jit, remat and scan as well, stop gradients there, and may
exchange the value at one mark. What the answer replaces is dead code, and nothing differentiated lies below a tap, so
the backward pass never enters the backbone.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.tree_util as jtu
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jaxtyping import Array

from jaxpeft.hooks import Hook, hooked
from jaxpeft.interpret import bind_again
from jaxpeft.method import ApplyFn

Taps = dict[str, list[Array]]
Answer = Callable[[Taps], Array]


class TapError(ValueError):
    """A hidden state that the model does not mark, or marks where it cannot be read."""


def named(apply_fn: ApplyFn, names: Mapping[str, str]) -> ApplyFn:
    """`apply_fn` with the outputs of modules marked: `{pattern over module paths: name}`; Linen or `from_nnx` models."""

    def marking(name: str) -> Hook:
        return Hook("**", lambda site, call, *a, **k: checkpoint_name(call(*a, **k), name))

    hooks = [marking(name)._replace(at=pattern) for pattern, name in names.items()]
    return hooked(hooks, apply_fn, {}, "named")


def read(
    apply_fn: ApplyFn, names: Sequence[str], *, answer_at: str | None = None, answer: Answer | None = None
) -> Callable[..., tuple[Any, Taps]]:
    """`apply_fn` that also returns the hidden states it marks, behind a stop-gradient.

    Args:
      apply_fn: any function of arrays.
      names: marks to read.
      answer_at: the mark whose value is exchanged.
      answer: `(taps so far) -> array` of the shape of the value at `answer_at`.

    Returns:
      A function giving `(output, {name: [array, ...]})`, one array for every time the mark is passed; the layers of a
      scan one by one, in order.

    Raises:
      TapError: a mark is not met, or stands inside a conditional or a while loop.
    """
    wanted: frozenset[str] = frozenset([*names, *([answer_at] if answer_at else [])])

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
        reader = _Reader(wanted, answer_at, answer)
        met = sorted(reader.marks(closed.jaxpr))
        if missing := [n for n in wanted if n not in met]:
            raise TapError(f"the model marks no {missing[0]!r}; it marks {met or 'nothing'} (see `readers.named`)")
        outputs, taps = reader.evaluate(closed.jaxpr, closed.consts, arrays, {})
        return jtu.tree_unflatten(jtu.tree_structure(shapes), outputs), taps

    return run


class _Reader:
    """One walk over a jaxpr. `before` are the taps that enclosing calls have met already."""

    def __init__(self, wanted: frozenset[str], answer_at: str | None, answer: Answer | None):
        self.wanted, self.answer_at, self.answer = wanted, answer_at, answer

    def marks(self, jaxpr: Any) -> set[str]:
        found = {e.params["name"] for e in jaxpr.eqns if e.primitive.name == "name"}
        return found.union(*(self.marks(j) for e in jaxpr.eqns for j in _inner(e.params)))

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
        inner = [j for j in _inner(params) if self.marks(j) & self.wanted]
        if not inner:
            return bind_again(equation, operands), {}
        if kind in ("jit", "closed_call", "remat2", "checkpoint"):
            (jaxpr,) = inner
            closed = params.get("jaxpr", params.get("call_jaxpr"))
            consts = closed.consts if isinstance(closed, core.ClosedJaxpr) else ()
            body = lambda xs: self.evaluate(jaxpr, consts, xs, before)
            if kind in ("remat2", "checkpoint"):
                return jax.checkpoint(body, policy=params["policy"], prevent_cse=params["prevent_cse"])(operands)
            return (jax.jit(body) if kind == "jit" else body)(operands)
        if kind == "scan":
            return self._scan(params, operands, before)
        raise TapError(f"a mark among {sorted(self.wanted)} stands inside {kind!r}, where it cannot be read")

    def _mark(self, name: str, x: Array, before: Taps) -> tuple[list[Any], Taps]:
        if name != self.answer_at:
            return [checkpoint_name(x, name)], {name: [lax.stop_gradient(x)]}
        assert self.answer is not None
        y = self.answer(before)
        if y.shape != x.shape:
            raise TapError(f"the answer at {name!r} has shape {y.shape}, the model's value {x.shape}")
        return [y.astype(x.dtype)], {name: [lax.stop_gradient(x)]}

    def _scan(self, params: dict[str, Any], operands: list[Any], before: Taps) -> tuple[Sequence[Any], Taps]:
        body, nc, nk = params["jaxpr"], params["num_consts"], params["num_carry"]
        if self.answer_at in self.marks(body.jaxpr):
            raise TapError(
                f"the answer's place {self.answer_at!r} stands inside a scan: it would be answered at each step"
            )

        def step(carry: Any, xs: Any) -> Any:
            outputs, taps = self.evaluate(body.jaxpr, body.consts, [*operands[:nc], *carry, *xs], before)
            return outputs[:nk], (outputs[nk:], taps)

        options = {k: params[k] for k in ("length", "reverse", "unroll")}
        carry, (ys, stacked) = lax.scan(step, operands[nc : nc + nk], operands[nc + nk :], **options)
        order = range(params["length"])[:: -1 if params["reverse"] else 1]
        return [*carry, *ys], {n: [x[i] for i in order for x in xs] for n, xs in stacked.items()}


def _joined(a: Taps, b: Taps) -> Taps:
    return {n: [*a.get(n, []), *b.get(n, [])] for n in {**a, **b}}


def _inner(params: Mapping[str, Any]) -> list[Any]:
    """The jaxprs that an equation holds."""
    held = [x for v in params.values() for x in (v if isinstance(v, tuple | list) else [v])]
    return [
        x.jaxpr if isinstance(x, core.ClosedJaxpr) else x for x in held if isinstance(x, core.ClosedJaxpr | core.Jaxpr)
    ]
