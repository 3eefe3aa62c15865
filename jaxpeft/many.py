"""Many adapters of one method over one base: each example of a batch runs with its own.

    serving = many(adapted, slots=32)
    held    = serving.empty(delta)                      # or its shapes
    held    = serving.insert(held, 3, delta)            # jitted once: slots, not programs, change
    logits  = serving.apply(params, held, which, *inputs)      which (b,): a slot for each example, -1 for the base

The deltas stand in fixed slots on a leading axis. A batch is one program: the base's products see all examples at once,
each example's own small product is gathered from its slot, and what depends on a delta alone (DoRA's column norms, a
prefix's network) is computed once a slot (see `hoist`), in a compiled generation once in all: XLA moves it out of the
loop. Measured by `experiments/bench/adapters.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, Key, PyTree

from jaxpeft import trees
from jaxpeft.adapt.lora import scale_of
from jaxpeft.adapt.ranks import RANKED
from jaxpeft.hoist import over_rows
from jaxpeft.method import Adapted, Delta, Method, Params, chain_labels

__all__ = ["Many", "SlotError", "Slots", "many"]


class SlotError(ValueError):
    """A delta that does not fit the slots, or a slot that does not exist."""


@jtu.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Deltas in slots.

    Attributes:
      delta: leaves of shape (n + 1, ...). The last row belongs to no slot: it is what the base is run with.
      used: (n,), whether a slot holds a delta.
    """

    delta: PyTree
    used: Bool[Array, "n"]


class Many(NamedTuple):
    """Many deltas over one base, as pure functions; all may be jitted, with slots and ids traced.

    Attributes:
      empty: `(delta) -> slots`, all empty, for deltas like this one (arrays or shapes). Its ranks are the largest that
        the slots take.
      insert: `(slots, slot, delta, method=None) -> slots`, which replaces what the slot held. A delta of a smaller rank is
        padded with zeros where that is exact (LoRA, DoRA, bottleneck adapters). `method` is what the delta was made
        by where that is not the adapted model's own: its scale alpha / r goes into the delta. Raises `SlotError` for a
        slot out of range (a traced one changes nothing) and for a delta of another structure, dtype or shape.
      remove: `(slots, slot) -> slots`: its weights are gone and its id means the base. Raises as `insert`.
      apply: `(params, slots, which, *inputs, dropout_key=None, **kwargs)`, example i with the delta in slot `which[i]`;
        -1 and the id of an empty slot are the base. `inputs` and results are pytrees of arrays with the examples on
        their leading axis; `kwargs` are shared. Raises `SlotError` for other ids out of range; where `which` is traced
        they are the base.
    """

    empty: Callable[[Delta], Slots]
    insert: Callable[..., Slots]
    remove: Callable[[Slots, Any], Slots]
    apply: Callable[..., Any]


def many(adapted: Adapted, slots: int) -> Many:
    """Slots for `slots` deltas of `adapted`'s method.

    Where the method has a delta that leaves the base as it is (LoRA, IA3, bottleneck adapters), examples without one
    cost what the others do. For other methods a batch with such examples runs the base as well; a batch without, does
    not. Under `shard_map` each device decides that for its own examples.

    Args:
      adapted: model and method.
      slots: n, at least 1.

    Raises:
      ValueError: no slots.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft
      >>> model = lambda params, x: x @ params["w"]
      >>> params, x = {"w": jnp.ones((4, 2))}, jnp.ones((3, 4))
      >>> adapted = jaxpeft.adapt(model, jaxpeft.ia3(at="w", feed_forward=None))
      >>> delta = adapted.init(jax.random.key(0), params, x)
      >>> serving = jaxpeft.many(adapted, slots=2)
      >>> held = serving.insert(serving.empty(delta), 0, jax.tree.map(lambda d: 3 * d, delta))
      >>> serving.apply(params, held, jnp.array([0, 1, -1]), x)[:, 0].tolist()
      [12.0, 4.0, 4.0]
    """
    if slots < 1:
        raise ValueError(f"{slots} slots: there is at least one")
    config = adapted.method.config

    def empty(delta: Delta) -> Slots:
        rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (slots + 1, *x.shape)), _unused(config, delta))
        return Slots(rows, jnp.zeros(slots, bool))

    def insert(held: Slots, slot: Any, delta: Delta, method: Method | None = None) -> Slots:
        return _put(held, _checked(slot, slots), _fitted(config, method, delta, _row_shapes(held.delta)), True)

    def remove(held: Slots, slot: Any) -> Slots:
        return _put(held, _checked(slot, slots), _unused(config, _row_shapes(held.delta)), False)

    def apply(
        params: Params,
        held: Slots,
        which: Int[Array, "b"],
        *inputs: Any,
        dropout_key: Key[Array, ""] | None = None,
        **kwargs: Any,
    ) -> Any:
        which = _checked_ids(which, slots, inputs)
        has_own = (which >= 0) & (which < slots)
        has_own &= held.used[jnp.where(has_own, which, 0)]
        keys = None if dropout_key is None else jax.random.split(dropout_key, which.shape[0])

        def one(delta: Delta, inputs: Any, key: Any) -> Any:
            batch = jax.tree.map(lambda x: x[None], inputs)
            y = adapted.apply(params, delta, *batch, dropout_key=key, **kwargs)
            return jax.tree.map(lambda x: x[0], y)

        y = over_rows(one, held.delta, jnp.where(has_own, which, slots), (inputs, keys))
        if _keeps_base(config):
            return y

        def with_base(y: Any) -> Any:
            choose = lambda a, b: jnp.where(has_own.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
            return jax.tree.map(choose, y, adapted.base(params, *inputs, **kwargs))

        return jax.lax.cond(has_own.all(), lambda y: y, with_base, y)

    return Many(empty, insert, remove, apply)


# ---------------------------------------------------------------------------------------------------------- slots, ids


def _checked(slot: Any, slots: int) -> Any:
    if not isinstance(slot, Tracer) and not 0 <= int(slot) < slots:
        raise SlotError(f"slot {int(slot)}: there are slots 0 to {slots - 1}")
    # The row behind the slots is the base's: a traced slot that points there points nowhere.
    return jnp.where((slot >= 0) & (slot < slots), slot, slots + 1)


def _checked_ids(which: Any, slots: int, inputs: Sequence[Any]) -> Int[Array, "b"]:
    if jnp.ndim(which) != 1 or not jnp.issubdtype(jnp.result_type(which), jnp.integer):
        raise ValueError(
            f"which has shape {jnp.shape(which)} and dtype {jnp.result_type(which)}: expected one integer an example"
        )
    if not isinstance(which, Tracer) and (wrong := [int(i) for i in np.asarray(which) if not -1 <= i < slots]):
        raise SlotError(f"ids {wrong[:5]}: there are slots 0 to {slots - 1}, and -1 for the base")
    for path, x in trees.by_path(tuple(inputs)).items():
        if jnp.shape(x)[:1] != jnp.shape(which):
            raise ValueError(
                f"input {path} has shape {jnp.shape(x)}, for {jnp.shape(which)[0]} ids: its first axis must be the "
                "examples; what all share is passed by keyword"
            )
    return jnp.asarray(which)


def _row_shapes(stacked: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)


def _put(held: Slots, slot: Any, delta: Delta, used: bool) -> Slots:
    put = lambda x, new: x.at[slot].set(new, mode="drop")
    return Slots(jax.tree.map(put, held.delta, delta), put(held.used, used))


# ------------------------------------------------------------------------------------------- what is known of a method


def _by_part(function: Callable[..., Any], configs: Sequence[Mapping[str, Any]], *deltas: Delta) -> Any:
    """`function(*configs, *deltas)`, for a chain of each method and its part of the deltas."""
    if configs[0].get("method") != "chain":
        return function(*configs, *deltas)
    parts = [config["methods"] for config in configs]
    labels = chain_labels([part["name"] for part in parts[0]])
    return {n: _by_part(function, own, *(d[n] for d in deltas)) for n, *own in zip(labels, *parts)}


def _neutral(config: Mapping[str, Any]) -> float | None:
    """What all numbers of a delta must be for the adapted model to be its base exactly; None where nothing does it."""
    kind = config.get("method")
    if kind == "sublayer":  # a gated prefix takes its share of the attention whatever it holds
        return None if any(d["composition"] == "gated" for d in config["design"]) else 0.0
    return {"lora": 0.0, "ia3": 1.0}.get(str(kind))


def _keeps_base(config: Mapping[str, Any]) -> bool:
    if config.get("method") == "chain":
        return all(map(_keeps_base, config["methods"]))
    return _neutral(config) is not None


def _unused(config: Mapping[str, Any], delta: Delta) -> Delta:
    """The contents of a slot without a delta."""

    def part(config: Mapping[str, Any], delta: Delta) -> Delta:
        return jax.tree.map(lambda x: jnp.full(x.shape, _neutral(config) or 0, x.dtype), delta)

    return _by_part(part, [config], delta)


# -------------------------------------------------------------------------------------------------- fitting into a slot

_PADDED = {"lora": ("a", "b"), "dora": ("a", "b"), "sublayer": ("down", "down_bias", "up")}


def _fitted(config: Mapping[str, Any], method: Method | None, delta: Delta, like: PyTree) -> Delta:
    """`delta` with the shapes of `like` and the same effect under the method of `config`."""
    own, want = trees.by_path(delta), trees.by_path(like)
    if jax.tree.structure(delta) != jax.tree.structure(like):
        missing, extra = sorted(set(want) - set(own))[:3], sorted(set(own) - set(want))[:3]
        raise SlotError(f"the delta is not like those of the slots: it lacks {missing} and has {extra} besides")
    for path, x in own.items():
        if x.dtype != want[path].dtype:
            raise SlotError(f"{path!r} is {x.dtype}, in the slots {want[path].dtype}: convert the delta, or the slots")
    source = config if method is None else method.config
    if _kinds(source) != _kinds(config):
        raise SlotError(f"a delta of {_kinds(source)} for slots of {_kinds(config)}")
    return _by_part(_fitted_part, [config, source], delta, like)


def _kinds(config: Mapping[str, Any]) -> Any:
    kind = config.get("method")
    return [_kinds(c) for c in config["methods"]] if kind == "chain" else kind


def _fitted_part(config: Mapping[str, Any], source: Mapping[str, Any], delta: Delta, like: PyTree) -> Delta:
    kind = str(config.get("method"))
    names = _PADDED.get(kind, ())
    if kind == "sublayer" and any(d["form"].endswith("_prefix") for d in config["design"]):
        names = ()
    want = trees.by_path(like)
    new = {p: _padded(p, x, want[p].shape, p.rpartition("/")[2] in names) for p, x in trees.by_path(delta).items()}
    fitted = trees.replace_leaves(delta, new)
    if kind not in RANKED:
        return fitted

    def rescaled(path: str, d: Mapping[str, Array]) -> dict[str, Array]:
        # The method divides alpha by the rank it sees, which is the slots' now: b carries the difference.
        was = scale_of(source, path, delta[path]["a"].shape[-1])
        now = scale_of(config, path, d["a"].shape[-1])
        ratio = jnp.asarray(was / now, d["b"].dtype)
        return {**d, "b": d["b"] * ratio.reshape(*ratio.shape, *(1,) * (d["b"].ndim - ratio.ndim))}

    return {path: rescaled(path, d) for path, d in fitted.items()}


def _padded(path: str, x: Array, shape: tuple[int, ...], may: bool) -> Array:
    if x.shape == shape:
        return x
    differ = [i for i, (n, m) in enumerate(zip(x.shape, shape)) if n != m]
    if not may or x.ndim != len(shape) or len(differ) != 1 or x.shape[differ[0]] > shape[differ[0]]:
        raise SlotError(
            f"{path!r} has shape {x.shape}, in the slots {shape}: only a smaller rank of LoRA, DoRA or a bottleneck "
            "adapter can be padded; make the slots for the largest"
        )
    return jnp.pad(x, [(0, m - n) for n, m in zip(x.shape, shape)])
