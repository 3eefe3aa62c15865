"""Methods whose delta generates another method's delta.

Hypernetworks, routed inventories, shared shards, Kronecker factors, one part for each task: each says what a small set of
numbers becomes, and a method that is there already says what that does to the model:

    apply(delta, task) = inner.apply(emit(delta, task, key))

So they inherit the inner method's scans, shardings, merge and files: `bake` gives the inner method's delta.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jaxpeft import trees
from jaxpeft.method import COMBINATORS, ApplyFn, Call, Delta, Method, Mode, Params, TaskError, from_config

__all__ = ["generated", "per_task"]


def generated(
    inner: Method,
    init: Callable[[Key[Array, ""], PyTree, Call], Delta],
    emit: Callable[[Delta, Any, Any], Delta],
    config: Mapping[str, Any],
    *,
    name: str,
    tasks: int | None = None,
) -> Method:
    """A method that acts through `inner`.

    Args:
      inner: what the generated delta is a delta of.
      init: `(key, shapes, call) -> delta`; `shapes` is the inner delta as `jax.ShapeDtypeStruct`s. An inner method without
        a structure of its own for `call` says so there.
      emit: `(delta, task, key) -> inner delta`, differentiable, with traced tasks; `key` is None in evaluation. Leaves marked
        `Fixed` come unmarked.
      config: plain data.
      name: of the method; `inner` takes it over.
      tasks: how many tasks the delta serves; None where `emit` pays no heed to them.
    """
    inner = inner._replace(name=name)

    def start(key: Key[Array, ""], call: Call) -> Delta:
        return init(key, jax.eval_shape(lambda k: inner.init(k, call), key), call)

    def wrap(apply_fn: ApplyFn, delta: Delta, mode: Mode) -> ApplyFn:
        own = mode.at("emit").dropout_key
        made = emit(trees.unmark(delta), mode.task, own)
        return inner.wrap(apply_fn, made, mode if inner.tasks is not None else mode._replace(task=None))

    def merge(params: Params, delta: Delta) -> Params:
        assert inner.merge is not None
        if (tasks or 1) > 1:
            raise TaskError(f"{name} serves {tasks} tasks: bake it for one, then merge")
        return inner.merge(params, emit(trees.unmark(delta), None if tasks is None else 0, None))

    def bake(delta: Delta, task: Any) -> tuple[Method, Delta]:
        return inner, emit(trees.unmark(delta), task, None)

    return Method(name, start, wrap, None if inner.merge is None else merge, config, tasks=tasks, bake=bake)


def per_task(method: Method, tasks: int, *, name: str | None = None) -> Method:
    """`tasks` deltas of one method, each for its own task: adapters that are not shared, a head for every task.

    Args:
      method: e.g. `lora()`.
      tasks: T, at least 1.
      name: the method's own where None.

    Returns:
      A method whose delta is the method's with a leading axis of T, each entry with a start of its own. It merges where
      the method does, for one task.

    Raises:
      ValueError: no tasks, or a method that serves several already.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft
      >>> model = lambda params, x: x @ params["w"]
      >>> params, x = {"w": jnp.ones((2, 3))}, jnp.ones((2, 2))
      >>> adapted = jaxpeft.adapt(model, jaxpeft.per_task(jaxpeft.ia3(at="w", feed_forward=None), tasks=2))
      >>> delta = adapted.init(jax.random.key(0), params, x)
      >>> delta = jax.tree.map(lambda d: d * jnp.array([[1.0], [5.0]]), delta)
      >>> adapted.apply(params, delta, x, task=jnp.array([1, 0]))[:, 0].tolist()
      [10.0, 2.0]
    """
    label = name or method.name
    if tasks < 1:
        raise ValueError(f"tasks {tasks}: there is at least one")
    if method.tasks is not None:
        raise ValueError(f"{method.name} serves {method.tasks} tasks already")

    def init(key: Key[Array, ""], shapes: PyTree, call: Call) -> Delta:
        return jax.vmap(lambda k: method.init(k, call))(jax.random.split(key, tasks))

    def emit(delta: Delta, task: Any, key: Any) -> Delta:
        return jax.tree.map(lambda x: jnp.take(x, task, axis=0, mode="clip"), delta)

    config = {"method": "per_task", "of": dict(method.config), "tasks": tasks, "name": label}
    return generated(method, init, emit, config, name=label, tasks=tasks)


COMBINATORS["per_task"] = lambda of, tasks, name: per_task(from_config(of), tasks, name=name)
