"""Hidden-state interception: a function of our own around the `__call__` of named modules, in Linen and in NNX.

A hook is `around(site, call, *args, **kwargs)`: `call` is the module itself, `site` gives the hook its parameters,
`site.param(name, shape, init)`, as a module would ask for them. The model is not changed. While initialising, the model
is traced once on shapes and what the hooks ask for is recorded; in use the values stand in the tree that the model is
given, beside the module's own parameters, so that layers under `nn.scan`, `nn.remat` and `nnx.scan` get theirs sliced
with the rest. The delta is `{module path: {name: array}}`, with leading axes for stacked layers.
"""

import contextlib
import contextvars
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key, PyTree

from jaxpeft import trees
from jaxpeft.method import ApplyFn, Call, Delta, Method, Mode, Params, site_key, stacked_keys

Init = Callable[[Key[Array, ""], tuple[int, ...], Any], Array]
Around = Callable[..., Any]
_KEY = "dropout_key"


class Hook(NamedTuple):
    """Where to step in, and with what: `around(site, call, *args, **kwargs)`."""

    at: trees.Pattern
    around: Around


@dataclasses.dataclass(frozen=True)
class Slot:
    """One parameter that a hook asks for: shape of one layer, leading sizes of the stack it stands in, dtype, start."""

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    dtype: Any
    init: Init | None

    def start(self, key: Key[Array, ""]) -> Array:
        if self.init is None:
            raise ValueError("a slot without an initialiser is filled by the method itself")
        init = self.init

        def make(k: Key[Array, ""]) -> Array:
            return init(k, self.shape, self.dtype)

        for _ in self.stack:
            make = jax.vmap(make)
        return make(stacked_keys(key, self.stack))


Slots = dict[str, dict[str, Slot]]


class Site:
    """A module at the moment it is called, as a hook sees it.

    Attributes:
      path: the module's path, `backbone/layers_0/attention`.
      stash: a dict shared by all sites of one call of the model, for what one hook leaves for another.
    """

    def __init__(self, path: str, stash: dict[Any, Any], get: Callable[..., Any]):
        self.path, self.stash, self._get = path, stash, get

    @property
    def parent(self) -> str:
        return self.path.rpartition("/")[0]

    def param(self, name: str, shape: Sequence[int], init: Init | None, dtype: Any = jnp.float32) -> Array:
        """The hook's parameter `name` of this module: (of one layer) `shape`. `init` None: the method fills it."""
        return self._get(name, tuple(shape), init, dtype)

    def dropout(self, x: Array, rate: float) -> Array:
        """Dropout where the model is applied with a `dropout_key`, else `x`."""
        key = self._get(_KEY, (), None, None) if rate else None
        if key is None:
            return x
        keep = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


# ------------------------------------------------------------------------------------------------- NNX models as calls


_SURGEONS: contextvars.ContextVar[tuple[Callable[[nnx.Module], None], ...]] = contextvars.ContextVar("s", default=())


def from_nnx(model: nnx.Module) -> tuple[ApplyFn, PyTree]:
    """An NNX model as `(apply_fn, params)`, open to hooks.

    `nnx.split` alone is enough for methods on weights; hooks need to see the modules that `nnx.merge` makes.

    The function is pure: what a call changes in the model is dropped. In training mode that would give one dropout mask
    at every step and statistics that stand still, so call `model.eval()` first, as for a frozen base one does anyway; a
    method's own dropout follows the `dropout_key`.

    Args:
      model: any NNX module. All of its state (parameters, statistics, random streams) is in `params`.
    """
    graph, state = nnx.split(model)

    def apply_fn(params: PyTree, *inputs: Any, **kwargs: Any) -> Any:
        made = nnx.merge(graph, params)
        for surgeon in _SURGEONS.get():
            surgeon(made)
        return made(*inputs, **kwargs)

    return apply_fn, state


@contextlib.contextmanager
def _nnx_surgery(surgeon: Callable[[nnx.Module], None]) -> Iterator[None]:
    token = _SURGEONS.set((*_SURGEONS.get(), surgeon))
    try:
        yield
    finally:
        _SURGEONS.reset(token)


def _operate(model: nnx.Module, chosen: Mapping[str, list[Around]], site: Callable[..., Site]) -> None:
    """Exchanges the class of each chosen module by one whose `__call__` runs the hooks; the module is a fresh copy."""
    for path, module in list(nnx.iter_modules(model)):
        name = "/".join(map(str, path))
        if name not in chosen:
            continue
        kind = type(module)

        def hooked(self: Any, *args: Any, _kind: Any = kind, _name: str = name, **kwargs: Any) -> Any:
            def call(*a: Any, **k: Any) -> Any:
                return _kind.__call__(self, *a, **k)

            return _around(chosen[_name], site(_name, self), call)(*args, **kwargs)

        object.__setattr__(module, "__class__", type(kind.__name__, (kind,), {"__call__": hooked}))


# -------------------------------------------------------------------------------------------------------- interception


def _around(hooks: Sequence[Around], site: Site, module: Callable[..., Any]) -> Callable[..., Any]:
    whole = module
    for around in hooks:

        def whole(*args: Any, _around: Around = around, _call: Callable[..., Any] = whole, **kwargs: Any) -> Any:
            return _around(site, _call, *args, **kwargs)

    return whole


_UNHOOKED: contextvars.ContextVar[bool] = contextvars.ContextVar("unhooked", default=False)


@contextlib.contextmanager
def unhooked() -> Iterator[None]:
    """No hook sees the modules that run inside: a hook's repeated call, a side network's own."""
    token = _UNHOOKED.set(True)
    try:
        yield
    finally:
        _UNHOOKED.reset(token)


def is_unhooked() -> bool:
    """Whether the code runs inside `unhooked`."""
    return _UNHOOKED.get()


def _repeatable(module: nn.Module, first: Callable[..., Any]) -> Callable[..., Any]:
    """A Linen module's call that a hook may make more than once.

    A compact module may name its parameters once per instance, so calls after the first go to an unbound copy, which
    no hook sees.
    """
    used = False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal used
        if not used:
            used = True
            return first(*args, **kwargs)
        with unhooked():
            return module.clone(parent=None, name=None).apply(module.variables, *args, **kwargs)

    return call


def _hooks_at(hooks: Sequence[Hook], path: str) -> list[Around]:
    return [h.around for h in hooks if trees.is_match(h.at, path)]


class _Seen(NamedTuple):
    """What discovery finds: the slots by place in `params`, and the paths of all modules (for error messages)."""

    slots: Slots
    modules: list[str]


def discover(hooks: Sequence[Hook], call: Call) -> Slots:
    """What the hooks would ask for in this call: `{place in params: {name: Slot}}`, in the order of execution.

    Raises:
      PatternError: a hook met no module; near misses among the modules that ran are listed.
    """
    seen = _Seen({}, [])
    stash: dict[Any, Any] = {}

    def found(place: str, stack: tuple[int, ...]) -> Callable[..., Any]:
        def get(name: str, shape: tuple[int, ...], init: Init | None, dtype: Any) -> Any:
            if name == _KEY:
                return None
            slot = Slot(shape, stack, dtype, init)
            if seen.slots.setdefault(place, {}).setdefault(name, slot).shape != shape:
                raise ValueError(
                    f"two hooks ask for {name!r} at {place!r}, of shapes {shape} and others: name one anew"
                )
            return jnp.zeros(shape, dtype)

        return get

    def run(params: Params, *inputs: Any) -> Any:
        ids = {id(x): p for p, x in trees.by_path(params).items()}
        outer = trees.by_path(params)
        frames: list[tuple[str, str, Mapping[str, Any]]] = []  # (path, root, own variables) of the modules on the way
        local = threading.local()

        def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if context.method_name != "__call__" or is_unhooked():
                return next_fun(*args, **kwargs)
            path = "/".join(module.path)
            own = trees.by_path(module.variables.get("params", {}))
            if not path:
                local.root = _linen_root(own, ids, outer)
            root = getattr(local, "root", None)
            if root is None:
                local.root = root = _linen_root({}, ids, outer)
            seen.modules.append(path)
            frames.append((path, root, own))
            try:
                if around := _hooks_at(hooks, path):
                    place = "/".join(filter(None, (root, path)))
                    site = Site(path, stash, found(place, _stack_of(frames, outer)))
                    return _around(around, site, _repeatable(module, next_fun))(*args, **kwargs)
                return next_fun(*args, **kwargs)
            finally:
                frames.pop()

        def surgeon(model: nnx.Module) -> None:
            paths = ["/".join(map(str, p)) for p, _ in nnx.iter_modules(model)]
            seen.modules.extend(paths)

            def site(path: str, module: nnx.Module) -> Site:
                inner = trees.by_path(nnx.state(module))
                stack = next(
                    (_lead(x.shape, outer[f"{path}/{n}"].shape) for n, x in inner.items() if f"{path}/{n}" in outer), ()
                )
                return Site(path, stash, found(path, stack))

            _operate(model, {p: h for p in paths if (h := _hooks_at(hooks, p))}, site)

        with nn.intercept_methods(intercept), _nnx_surgery(surgeon):
            return call.apply_fn(params, *inputs, **call.kwargs)

    jax.eval_shape(run, call.params, *call.inputs)
    if not seen.modules:
        raise trees.PatternError(
            "this model calls no modules that hooks could stand at: they see those of a Linen model's `apply` and of "
            "`from_nnx`; in plain functions of arrays only weights can be adapted"
        )
    for hook in hooks:
        trees.matches(hook.at, dict.fromkeys(seen.modules), "module")
    return seen.slots


def _linen_root(own: Mapping[str, Any], ids: Mapping[int, str], outer: Mapping[str, Any]) -> str:
    """Where in `params` the variables of the model that is being applied lie: found by the identity of a leaf."""
    for name, leaf in own.items():
        if id(leaf) in ids and ids[id(leaf)].endswith(name):
            return ids[id(leaf)].removesuffix(name).rstrip("/")
    # The caller made new leaves of them (a cast, another method below): then it is found by its names.
    first = next(iter(own), None)
    starts = [p.removesuffix(first) for p in outer if p == first or p.endswith(f"/{first}")] if first else []
    found = [s for s in starts if all(s + name in outer for name in own)]
    if first and len(found) != 1:
        raise ValueError(
            f"hooks cannot tell which part of `params` the model's variables ({first!r}, ...) come from: "
            f"{len(found)} parts fit. Pass the parameters to the model without computing on them first"
        )
    return found[0].rstrip("/") if found else "params" if all(p.startswith("params/") for p in outer) else ""


def _stack_of(frames: Sequence[tuple[str, str, Mapping[str, Any]]], outer: Mapping[str, Any]) -> tuple[int, ...]:
    """The leading axes that a module's variables have outside of the loops it is called in.

    Read off the nearest module on the way that has variables: outside minus inside.
    """
    for path, root, own in reversed(frames):
        for name, leaf in own.items():
            place = "/".join(filter(None, (root, path, name)))
            if place in outer:
                return _lead(leaf.shape, outer[place].shape)
    return ()


def _lead(inner: tuple[int, ...], outer: tuple[int, ...]) -> tuple[int, ...]:
    lead = outer[: len(outer) - len(inner)]
    if (*lead, *inner) != tuple(outer):
        raise ValueError(
            f"stacked parameters of shape {outer} are used as {inner}: layers must be stacked on leading axes"
        )
    return tuple(lead)


def _with(params: Params, values: Mapping[str, Mapping[str, Array]], label: str) -> Params:
    """`params` with each site's values beside the module's own, as `label.name`."""

    def put(tree: Any, path: list[str], leaves: Mapping[str, Array]) -> Any:
        if not path:
            new = {f"{label}.{k}": v for k, v in leaves.items()}
            if clash := set(new) & set(tree):
                raise ValueError(f"{min(clash)!r} is taken: give one of the chained methods another name")
            return {**tree, **new}
        head, *rest = path
        return {**tree, head: put(tree.get(head, {}), rest, leaves)}

    for place, leaves in values.items():
        params = put(params, place.split("/") if place else [], leaves)
    return params


def hooked(hooks: Sequence[Hook], apply_fn: ApplyFn, values: Mapping[str, Mapping[str, Any]], label: str) -> ApplyFn:
    """`apply_fn` with the hooks in place and their parameters given: `{place in params: {name: array}}`."""

    def run(params: Params, *inputs: Any, **kwargs: Any) -> Any:
        stash: dict[Any, Any] = {}

        def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if context.method_name != "__call__" or is_unhooked():
                return next_fun(*args, **kwargs)
            path = "/".join(module.path)
            if not (around := _hooks_at(hooks, path)):
                return next_fun(*args, **kwargs)
            own = module.variables.get("params", {})

            def get(name: str, shape: tuple[int, ...], init: Any, dtype: Any) -> Any:
                value = own.get(f"{label}.{name}")
                if value is None and name != _KEY:
                    raise KeyError(
                        f"the delta has no {name!r} at {path!r}: it was made for other modules or another model"
                    )
                return value

            return _around(around, Site(path, stash, get), _repeatable(module, next_fun))(*args, **kwargs)

        def surgeon(model: nnx.Module) -> None:
            modules = {"/".join(map(str, p)): m for p, m in nnx.iter_modules(model)}
            for place, leaves in values.items():
                for name, value in leaves.items():
                    setattr(modules[place], _attribute(label, name), nnx.Param(value))

            def site(path: str, module: nnx.Module) -> Site:
                def get(name: str, shape: tuple[int, ...], init: Any, dtype: Any) -> Any:
                    value = getattr(module, _attribute(label, name), None)
                    return value if value is None else value[...]

                return Site(path, stash, get)

            _operate(model, {p: h for p in modules if (h := _hooks_at(hooks, p))}, site)

        is_nnx = isinstance(params, nnx.State)
        with nn.intercept_methods(intercept), _nnx_surgery(surgeon):
            return apply_fn(params if is_nnx else _with(params, values, label), *inputs, **kwargs)

    return run


def _attribute(label: str, name: str) -> str:
    return f"{label}__{name}"


# --------------------------------------------------------------------------------------------------- methods on hooks


def on_hooks(
    name: str,
    hooks: Sequence[Hook],
    config: Mapping[str, Any],
    *,
    init: Callable[[Key[Array, ""], Slots, Call], Delta] | None = None,
    emit: Callable[[Delta, Slots], Mapping[str, Mapping[str, Array]]] | None = None,
) -> Method:
    """A method that acts on hidden states; it does not merge.

    Args:
      name: of the method, and the prefix of its parameters' names in the model's tree.
      hooks: what to do where. Hooks may share a site's parameters by asking for the same name.
      config: plain data.
      init: `(key, slots, call) -> delta` where the delta is not simply the slots' values.
      emit: `(delta, slots) -> {place: {name: array}}`: the values that such a delta generates (a reparameterisation,
        a hypernetwork). The model is traced once more, on shapes, to find the slots.
    """
    hooks = tuple(hooks)

    def start(key: Key[Array, ""], call: Call) -> Delta:
        slots = discover(hooks, call)
        if init is not None:
            return init(key, slots, call)
        return {
            place: {n: s.start(site_key(key, f"{place}/{n}")) for n, s in named.items()}
            for place, named in slots.items()
        }

    def wrap(apply_fn: ApplyFn, delta: Delta, mode: Mode) -> ApplyFn:
        def run(params: Params, *inputs: Any, **kwargs: Any) -> Any:
            values = trees.unmark(delta)
            if emit is not None:
                values = emit(values, discover(hooks, Call(apply_fn, params, inputs, kwargs)))
            if mode.dropout_key is not None:
                slots = discover(hooks, Call(apply_fn, params, inputs, kwargs))
                values = {
                    place: {**v, _KEY: stacked_keys(site_key(mode.dropout_key, place), _any_stack(slots[place]))}
                    for place, v in values.items()
                }
            return hooked(hooks, apply_fn, values, name)(params, *inputs, **kwargs)

        return run

    return Method(name, start, wrap, None, config)


def _any_stack(named: Mapping[str, Slot]) -> tuple[int, ...]:
    return next(iter(named.values())).stack
