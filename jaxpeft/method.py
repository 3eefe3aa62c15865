"""How a method meets a model: `adapt`, `chain`, and methods on weights.

A model is a function `apply_fn(params, *inputs)` with frozen `params`. A `Method` makes a small pytree, the *delta*, and
says how the function behaves with it. It is a record of pure functions; `chain` puts several into one.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Int, Key, PyTree

from jaxpeft import trees
from jaxpeft.hoist import over_rows
from jaxpeft.interpret import Policy, lift
from jaxpeft.roles import Role, roles
from jaxpeft.weights import products
from jaxpeft.weights.array_like import is_array_like
from jaxpeft.weights.factored import Factored
from jaxpeft.weights.products import Backend
from jaxpeft.weights.watched import Watch, Watched

Params = PyTree
Delta = PyTree
ApplyFn = Callable[..., Any]


class MergeError(ValueError):
    """A method whose effect no set of dense weights can express."""


class TaskError(ValueError):
    """A task that a delta has no part for, or none where it has several."""


@dataclass(frozen=True)
class Call:
    """One call of a model, from which a method reads what it needs to initialise: shapes, and values where it must."""

    apply_fn: ApplyFn
    params: Params
    inputs: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class Study(NamedTuple):
    """What a method may look at before it is made, where it is made for one task's data: see `Method.prepare`.

    Attributes:
      call: the model and an example batch.
      loss: `(apply, batch, key) -> scalar`, the mean loss of a batch, where `apply(*inputs, **kwargs)` is a model with its
        parameters in place, and `key` is None for evaluation.
      train, validation: batches (`data.Batches`).
      rate: the peak learning rate of the run that follows.
      key: of everything random.
    """

    call: Call
    loss: Callable[..., Array]
    train: Any
    validation: Any
    rate: float
    key: Key[Array, ""]


class Mode(NamedTuple):
    """How an adapted model runs.

    Attributes:
      dropout_key: None in evaluation.
      on_dense: as in `interpret.lift`.
      backend: how low-rank sums are multiplied; see `weights.products`.
      watch: told of every product with an adapted weight; see `explain`.
      task: which of its tasks a delta acts for; None where the method knows no tasks.
    """

    dropout_key: Key[Array, ""] | None = None
    on_dense: Policy = "warn"
    backend: Backend = "auto"
    watch: Watch | None = None
    task: Int[Array, ""] | int | None = None

    def at(self, site: str) -> "Mode":
        """The mode for one place: its own key."""
        return self if self.dropout_key is None else self._replace(dropout_key=site_key(self.dropout_key, site))


class Method(NamedTuple):
    """A way to adapt a frozen model.

    Attributes:
      name: what the method is called in deltas, files and messages.
      init: `(key, call) -> delta`.
      wrap: `(apply_fn, delta, mode) -> apply_fn'`, the model as this delta changes it.
      merge: `(params, delta) -> params`, or None where no dense weights have the same effect.
      config: what made it, as plain data for files.
      tasks: how many tasks its delta serves, each with a part of its own; None where it knows none.
      rates: (pattern over the delta's paths, factor) pairs, the first that matches counts: parts that its paper trains at
        another rate than the rest, relative to it; see `updates.relative_rates`.
      prepare: `(study) -> method`, for a method that looks at the task's data before it is made (which weights matter, which
        layers can go): what it answers is trained. None where there is nothing to look at.
      bake: `(delta, task) -> (method, delta)`, the simpler method with the same effect on that task; None where it is
        simple already.
    """

    name: str
    init: Callable[[Key[Array, ""], Call], Delta]
    wrap: Callable[[ApplyFn, Delta, Mode], ApplyFn]
    merge: Callable[[Params, Delta], Params] | None
    config: Mapping[str, Any]
    tasks: int | None = None
    rates: tuple[tuple[str, float], ...] = ()
    prepare: "Callable[[Study], Method] | None" = None
    bake: "Callable[[Delta, Any], tuple[Method, Delta]] | None" = None


class Adapted(NamedTuple):
    """A model with a method, as pure functions.

    Attributes:
      init: `(key, params, *inputs, **kwargs) -> delta`. Inputs are an example batch; `jax.eval_shape` gives the delta's
        shapes without computing it.
      apply: `(params, delta, *inputs, dropout_key=None, task=None, **kwargs)`, the adapted model. `task` is for methods
        whose delta serves several: a number for the whole batch, or (b,) one for each example (inputs and results then
        have the examples on their leading axis, `kwargs` are shared); it may be traced, and is then not checked: a
        number out of range counts as the nearest. Raises `TaskError`.
      merge: `(params, delta, task=None) -> params` such that `apply_fn(merged, ...)` is the adapted model. Raises
        `MergeError` where no merge exists, `TaskError` as `apply`.
      method: what it was made from.
      base: the model itself, `(params, *inputs, **kwargs)`.
      backend: how low-rank sums are multiplied.
    """

    init: Callable[..., Delta]
    apply: Callable[..., Any]
    merge: Callable[[Params, Delta], Params]
    method: Method
    base: ApplyFn
    backend: Backend


def adapt(apply_fn: ApplyFn, method: Method, *, on_dense: Policy = "warn", backend: Backend = "auto") -> Adapted:
    """Joins a model and a method.

    Args:
      apply_fn: `(params, *inputs, **kwargs) -> anything`: a Linen model's `apply`, `from_nnx(model)[0]`, or any
        function. It is never modified.
      method: e.g. `lora(rank=8)`, or several in a `chain`.
      on_dense: what to do where an operation would form an adapted weight in full; see `interpret.lift`.
      backend: how `x (w + s a b)` is multiplied: "auto" takes the Pallas kernel on TPU (`jax.default_backend()`) where it
        serves and two products elsewhere, "xla" always two products, "pallas" the kernel on TPU and GPU, "merged" forms
        the sum first (a dense copy of one weight at a time). `explain` tells what was chosen where.

    Raises:
      ValueError: an unknown backend.
      TypeError: a module itself instead of a function, or something else than a method.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft
      >>> model = lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"]
      >>> params = {"in": jnp.ones((4, 8)), "out": jnp.ones((8, 2))}
      >>> adapted = jaxpeft.adapt(model, jaxpeft.lora(rank=2, at="in"))
      >>> delta = adapted.init(jax.random.key(0), params, jnp.ones((1, 4)))
      >>> adapted.apply(params, delta, jnp.ones((1, 4))).shape
      (1, 2)
    """

    products.checked(backend)
    if isinstance(apply_fn, nn.Module | nnx.Module):
        remedy = (
            "its `apply`" if isinstance(apply_fn, nn.Module) else "`*jaxpeft.from_nnx(model)`: a function and params"
        )
        raise TypeError(f"{type(apply_fn).__name__} is a module, no function of parameters: give {remedy}")
    _checked_method(method)

    def init(key: Key[Array, ""], params: Params, *inputs: Any, **kwargs: Any) -> Delta:
        return method.init(key, Call(apply_fn, params, inputs, kwargs))

    def apply(
        params: Params,
        delta: Delta,
        *inputs: Any,
        dropout_key: Key[Array, ""] | None = None,
        task: Any = None,
        **kwargs: Any,
    ) -> Any:
        task = _checked_task(method, task)

        def run(task: Any, inputs: tuple[Any, ...], key: Any) -> Any:
            mode = Mode(key, on_dense, backend, task=task)
            return method.wrap(apply_fn, delta, mode)(params, *inputs, **kwargs)

        if task is None or jnp.ndim(task) == 0:
            return run(task, inputs, dropout_key)

        def one(task: Any, inputs: Any, key: Any) -> Any:
            y = run(task, jax.tree.map(lambda x: x[None], inputs), key)
            return jax.tree.map(lambda x: x[0], y)

        if odd := [jnp.shape(x) for x in jax.tree.leaves(inputs) if jnp.shape(x)[:1] != jnp.shape(task)]:
            raise TaskError(
                f"{jnp.shape(task)[0]} tasks for an input of shape {odd[0]}: give one an example, or a number"
            )
        # What a task's part of the delta is made of does not depend on the example: `over_rows` makes it once a task.
        assert method.tasks is not None
        keys = None if dropout_key is None else jax.random.split(dropout_key, task.shape[0])
        return over_rows(one, jnp.arange(method.tasks), task, (inputs, keys))

    def merge(params: Params, delta: Delta, task: Any = None) -> Params:
        if method.merge is None:
            raise MergeError(
                f"{method.name} has no merge: its effect depends on the hidden states, which no fixed weights express. "
                "Keep base and delta apart and call `apply`"
            )
        simple, own = bake(method, delta, task)
        assert simple.merge is not None
        return simple.merge(params, own)

    return Adapted(init, apply, merge, method, apply_fn, backend)


def _checked_method(method: Any) -> None:
    if not isinstance(method, Method):
        raise TypeError(
            f"{method!r} is no method: expected what a factory returns, as jaxpeft.lora(rank=8), or a chain of those"
        )


def bake(method: Method, delta: Delta, task: Any = None) -> tuple[Method, Delta]:
    """The simplest method, and its delta, with the effect that `delta` has on one task.

    A delta that generates another (hypernetworks, routed inventories, shards, one part a task) becomes that other one:
    a plain LoRA, plain adapters. It can then be saved in their files, put into `many`'s slots, merged.

    Args:
      method: any method; one that is simple already comes back as it is.
      delta: of that method.
      task: which task, where the delta serves several.

    Raises:
      TaskError: a task that the delta has no part for, or none where it has several.
    """
    task = _checked_task(method, task)
    if task is not None and jnp.ndim(task):
        raise TaskError(f"tasks of shape {jnp.shape(task)}: a delta is baked for one task, a number")
    return (method, delta) if method.bake is None else method.bake(delta, task)


def _checked_task(method: Method, task: Any) -> Any:
    """The task as `Mode` has it; 0 for the only one."""
    if method.tasks is None:
        if task is not None:
            raise TaskError(f"task {task} for {method.name}, which knows no tasks: leave it out")
        return None
    if task is None:
        if method.tasks > 1:
            raise TaskError(f"{method.name} serves {method.tasks} tasks: say which, task=0..{method.tasks - 1}")
        return 0
    if not jnp.issubdtype(jnp.result_type(task), jnp.integer) or jnp.ndim(task) > 1:
        raise TaskError(
            f"task is {jnp.result_type(task)}{list(jnp.shape(task))}: expected an integer, or one an example"
        )
    if not isinstance(task, Tracer):
        wrong = [int(t) for t in np.ravel(task) if not 0 <= t < method.tasks]
        if wrong:
            raise TaskError(f"task {wrong[0]}: {method.name} serves tasks 0 to {method.tasks - 1}")
    return task if jnp.ndim(task) == 0 else jnp.asarray(task)


def chain(*methods: Method, name: str = "chain") -> Method:
    """Several methods as one: the first changes the model, the second changes the changed model, and so on.

    Where two change one weight, the later one is handed the base's weight and the earlier one what that makes of it.
    Its delta is a dict from each method's name (numbered where a name repeats) to that method's delta.

    Raises:
      ValueError: no methods, or methods for different numbers of tasks.
      TypeError: something that is no method; a list of methods is given as `chain(*methods)`.
    """
    if not methods:
        raise ValueError("a chain of no methods")
    for method in methods:
        _checked_method(method)
    labels = chain_labels([m.name for m in methods])

    def init(key: Key[Array, ""], call: Call) -> Delta:
        return {n: m.init(site_key(key, n), call) for n, m in zip(labels, methods)}

    def wrap(apply_fn: ApplyFn, delta: Delta, mode: Mode) -> ApplyFn:
        for n, m in zip(labels, methods):
            apply_fn = m.wrap(apply_fn, delta[n], mode.at(n))
        return apply_fn

    def merge(params: Params, delta: Delta) -> Params:
        # As when applied: the last method wraps the others, so that it is handed the weights first.
        for n, m in reversed(list(zip(labels, methods))):
            assert m.merge is not None
            params = m.merge(params, delta[n])
        return params

    def baked(delta: Delta, task: Any) -> tuple[Method, Delta]:
        parts = {
            n: (m, delta[n]) if m.bake is None else m.bake(delta[n], None if m.tasks is None else task)
            for n, m in zip(labels, methods)
        }
        simple = chain(*(m._replace(name=old.name) for (m, _), old in zip(parts.values(), methods)), name=name)
        return simple, {n: d for n, (_, d) in parts.items()}

    def prepared(study: Study) -> Method:
        made = [
            m if m.prepare is None else m.prepare(study._replace(key=site_key(study.key, n)))
            for n, m in zip(labels, methods)
        ]
        return chain(*(m._replace(name=old.name) for m, old in zip(made, methods)), name=name)

    tasks = {m.tasks for m in methods if m.tasks is not None}
    if len(tasks) > 1:
        raise ValueError(
            f"methods for {' and '.join(map(str, sorted(tasks)))} tasks in one chain: their tasks must be the same"
        )
    mergeable = all(m.merge is not None for m in methods)
    config = {"method": "chain", "name": name, "methods": [dict(m.config) for m in methods]}
    return Method(
        name,
        init,
        wrap,
        merge if mergeable else None,
        config,
        tasks=next(iter(tasks), None),
        rates=tuple((f"{n}/{pattern}", factor) for n, m in zip(labels, methods) for pattern, factor in m.rates),
        prepare=None if all(m.prepare is None for m in methods) else prepared,
        bake=None if all(m.bake is None for m in methods) else baked,
    )


def chain_labels(names: Sequence[str]) -> list[str]:
    """What the parts of a chain's delta are called: each method's name, numbered where a name repeats."""
    return [n if names.count(n) == 1 else f"{n}_{names[:i].count(n)}" for i, n in enumerate(names)]


# ------------------------------------------------------------------------------------------------------- the registry


class Entry(NamedTuple):
    """What the library knows of a method: it drives the command line, the table of methods and the common tests."""

    factory: Callable[..., Method]
    family: str
    paper: str
    mechanism: str
    mergeable: bool
    exact_start: bool
    rate: float
    reads: str


METHODS: dict[str, Entry] = {}


def register(
    *,
    family: str,
    paper: str,
    mechanism: str,
    mergeable: bool,
    exact_start: bool,
    rate: float = 1e-3,
    reads: Literal["anything", "images"] = "anything",
    name: str | None = None,
) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Puts a factory into the registry under its own name.

    Args:
      family: the room it lives in ("adapt").
      paper: authors, venue, year.
      mechanism: "weights", "hooks", "reader", "inputs", or "chain".
      mergeable: whether `merge` exists.
      exact_start: whether the adapted model equals its base before training, as the paper initialises it.
      rate: the peak learning rate (Adam) that `finetune` takes where none is given.
      reads: what models it is for: of any inputs, or of images only.
      name: where it differs from the factory's.
    """

    def enter(factory: Callable[..., Method]) -> Callable[..., Method]:
        METHODS[name or factory.__name__] = Entry(
            factory, family, paper, mechanism, mergeable, exact_start, rate, reads
        )
        return factory

    return enter


def entry(name: str) -> Entry:
    """The registry's entry for `name`.

    Raises:
      ValueError: an unknown name; what there is, is listed.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{trees.near(name, METHODS)}; there are: {', '.join(sorted(METHODS))}")
    return METHODS[name]


COMBINATORS: dict[str, Callable[..., Method]] = {
    # What makes methods of methods: their configs hold configs.
    "chain": lambda methods, name: chain(*map(from_config, methods), name=name),
}


def from_config(config: Mapping[str, Any]) -> Method:
    """The method that a `Method.config` describes."""
    rest = {k: v for k, v in config.items() if k != "method"}
    return (COMBINATORS.get(config["method"]) or entry(config["method"]).factory)(**rest)


def site_key(key: Key[Array, ""], site: str) -> Key[Array, ""]:
    """A key for one place, independent of what other places there are."""
    return jax.random.fold_in(key, zlib.crc32(site.encode()))


def stacked_keys(key: Key[Array, ""], stack: tuple[int, ...]) -> Key[Array, "*stack"]:
    """One key per stacked layer; the key itself where there is no stack."""
    return jax.random.split(key, stack) if stack else key


# -------------------------------------------------------------------------------------------------- methods on weights


def on_weights(
    name: str,
    at: trees.Pattern,
    init: Callable[[Key[Array, ""], str, Array, Role], dict[str, Array]],
    build: Callable[[str, Array, dict[str, Array], Key[Array, ""] | None], Any],
    config: Mapping[str, Any],
    *,
    factored: bool = True,
    beside: Callable[[str, Mapping[str, Array], dict[str, Array]], dict[str, Any]] = lambda *_: {},
) -> Method:
    """A method that replaces leaves of `params` by values built from them; it always merges.

    Its delta is `{path: {name: array}}`.

    Args:
      name: of the method.
      at: which leaves.
      init: `(key, path, weight, role) -> arrays` of one leaf's delta.
      build: `(path, weight, arrays, dropout_key) -> value`, array-like or an ordinary array.
      config: plain data.
      factored: whether the leaves must be float weights with a role each (two axes or more); else any leaf will do and
        `role` is (0, 0).
      beside: `(path, leaves, arrays) -> {path: value}`, other leaves that change with this one (a kernel's bias).
    """

    def start(key: Key[Array, ""], call: Call) -> Delta:
        leaves = trees.by_path(call.params)
        chosen = trees.matches(at, leaves, "parameter")
        if factored:
            for path in chosen:
                w = leaves[path]
                if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
                    raise ValueError(
                        f"{name} needs floating-point weights of two axes or more; {path!r} is "
                        f"{jnp.dtype(w.dtype).name}{list(w.shape)}. Narrow the pattern {at!r}"
                    )
        found = roles(call.apply_fn, call.params, chosen, call.inputs, call.kwargs) if factored else {}
        return {p: init(site_key(key, p), p, leaves[p], found.get(p, Role(0, 0))) for p in chosen}

    def built(path: str, w: Array, d: Any, mode: Mode) -> Any:
        try:
            return build(path, w, trees.unmark(d), mode.at(path).dropout_key)
        except KeyError as e:
            raise ValueError(
                f"the delta holds {', '.join(map(repr, d))} at {path!r}, where {name} wants {e}: it is of another method"
            ) from e

    def values(params: Params, delta: Delta, mode: Mode) -> Params:
        leaves = trees.by_path(params)
        if unknown := [p for p in delta if p not in leaves]:
            raise KeyError(
                f"the delta adapts {unknown[0]!r}, which the model lacks{trees.near(unknown[0], leaves)} "
                f"({len(unknown)} of {len(delta)} paths are missing)"
            )
        new = {p: built(p, leaves[p], d, mode) for p, d in delta.items()}
        for p, d in delta.items():
            new |= beside(p, leaves, trees.unmark(d))
        for p, value in new.items():
            if isinstance(value, Factored):
                value = new[p] = dataclasses.replace(value, backend=mode.backend)
            if mode.watch is not None and is_array_like(value):
                new[p] = Watched(value, p, mode.watch)
            if value.shape != leaves[p].shape:
                raise ValueError(f"{name} makes {value.shape} of {p!r}, whose shape is {leaves[p].shape}")
        return trees.replace_leaves(params, new)

    def wrap(apply_fn: ApplyFn, delta: Delta, mode: Mode) -> ApplyFn:
        lifted = lift(apply_fn, mode.on_dense)
        return lambda params, *inputs, **kwargs: lifted(values(params, delta, mode), *inputs, **kwargs)

    def merge(params: Params, delta: Delta) -> Params:
        return jax.tree.map(
            lambda x: x.dense() if is_array_like(x) else x, values(params, delta, Mode()), is_leaf=is_array_like
        )

    return Method(name, start, wrap, merge, config)
