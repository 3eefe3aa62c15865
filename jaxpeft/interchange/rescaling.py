"""IA3 in the PEFT layout: `ia3_l` (out, 1) where outputs are rescaled, with their bias, (1, in) where inputs are."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpeft.adapt.ia3 import ia3
from jaxpeft.interchange.errors import InterchangeError
from jaxpeft.interchange.layout import PREFIX, Part, Plan, Written
from jaxpeft.interchange.low_rank import targets
from jaxpeft.interchange.view import Leaf, View, by_ending, by_letters, shortest, stack
from jaxpeft.method import Method


def write(part: Part, view: View) -> Written:
    """The settings and tensors of an `ia3` part."""
    tensors: dict[str, np.ndarray] = {}
    chosen: dict[str, bool] = {}
    flipped = False
    for path, arrays in part.delta.items():
        for leaf, d in view.unstacked(path, arrays, tuple(arrays)):
            _check(leaf)
            ((label, gain),) = d.items()
            inside = label.startswith("in")
            chosen[leaf.module] = inside
            flipped |= leaf.transform == "same"
            tensors[f"{PREFIX}{leaf.module}.ia3_l"] = gain[None, :] if inside else gain[:, None]
    inner = [m for m, inside in chosen.items() if inside]
    outer = [m for m, inside in chosen.items() if not inside]
    # PEFT wants the names of the one list to stand in the other, and reads them by two rules.
    names = shortest(inner, view.modules, lambda e, m: by_ending(e, m) or (m in chosen and by_letters(e, m)))
    settings = {
        "peft_type": "IA3",
        "target_modules": [*shortest(outer, view.modules, by_ending), *names],
        "feedforward_modules": names,
        "fan_in_fan_out": flipped,
        "init_ia3_weights": True,
    }
    return Written(settings, tensors, frozenset(chosen))


def read(config: Mapping[str, Any], view: View, names: frozenset[str]) -> Plan:
    """What an IA3 folder with tensors `names` must hold, and how it becomes a method and a delta."""
    leaves = targets(config, view, names, ".ia3_l")
    inside = {leaf: _is_inside(config.get("feedforward_modules"), leaf.module) for leaf in leaves}
    shapes = {}
    for leaf in leaves:
        _check(leaf)
        width, outer = leaf.shape
        shapes[f"{PREFIX}{leaf.module}.ia3_l"] = (1, width) if inside[leaf] else (outer, 1)

    def build(tensors: Mapping[str, np.ndarray]) -> tuple[Method, dict[str, Any]]:
        delta: dict[str, Any] = {}
        inner = set()
        for path, gains in view.stacked({leaf: leaf for leaf in leaves}, "the adapter").items():
            many = gains if isinstance(gains, list) else [gains]
            if len({inside[leaf] for leaf in many}) > 1:
                raise InterchangeError(
                    f"the stack {path!r} is rescaled at its inputs in some layers and at its outputs in others: "
                    "load the model with scan=False"
                )
            side = "in" if inside[many[0]] else "out"
            inner |= {path} if side == "in" else set()
            values = [tensors[f"{PREFIX}{leaf.module}.ia3_l"].reshape(-1) for leaf in many]
            stacked = isinstance(gains, list)
            delta[path] = {f"{side}{1 if stacked else ''}": stack(values if stacked else values[0])}
        # Where all are at the inputs, both patterns name the same weights, and the second decides.
        at = view.patterns(set(delta) - inner or inner)
        return ia3(at, view.patterns(inner) if inner else None), delta

    return Plan(shapes, build, frozenset(leaf.module for leaf in leaves))


def _check(leaf: Leaf) -> None:
    if leaf.kind != "linear":
        raise InterchangeError(
            f"PEFT's IA3 on {leaf.path!r} ({leaf.kind or 'no adaptable module'}) is not supported, only on linear "
            "layers. Use save_delta"
        )


def _is_inside(modules: Any, module: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return any(by_letters(m, module) for m in modules or [])
