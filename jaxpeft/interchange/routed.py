"""Poly and multi-head routing in the PEFT layout (POLY).

    here (scanned: with L in front)         there
    skills a (h, m, in/h, r), b (h, m, r, out/h)    poly_lora_A, poly_lora_B: the same axes
    router (T, h, m)                                poly_router.module_logits (T, h m)

PEFT scales by 1 / r; the alpha of this library goes into b. A router that several weights share is written for each of them.
PEFT always draws its router at random while training; in evaluation both compute the same.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpeft import trees
from jaxpeft.adapt.mhr import group, mhr, poly
from jaxpeft.interchange.errors import InterchangeError
from jaxpeft.interchange.layout import PREFIX, Part, Plan, Written
from jaxpeft.interchange.low_rank import targets
from jaxpeft.interchange.view import Leaf, View, by_ending, shortest, stack
from jaxpeft.method import Method


def write(part: Part, view: View) -> Written:
    """The settings and tensors of an `mhr` or `poly` part."""
    config = part.config
    alpha = 2 * config["rank"] if config["alpha"] is None else config["alpha"]
    if np.ndim(alpha):
        raise InterchangeError(f"alpha has shape {np.shape(alpha)}; PEFT's routed layers have one scale")
    tensors: dict[str, np.ndarray] = {}
    modules = []
    for path, skills in part.delta["skills"].items():
        z = np.asarray(part.delta["router"][group(path, config["router"])])
        a, b = (np.asarray(x.value if isinstance(x, trees.Fixed) else x) for x in (skills["a"], skills["b"]))
        lead = a.shape[: a.ndim - 4]
        arrays = {"a": a, "b": b * np.asarray(alpha, b.dtype), "router": np.broadcast_to(z, (*lead, *z.shape[-3:]))}
        for leaf, d in view.unstacked(path, arrays, tuple(arrays)):
            _check(leaf)
            modules.append(leaf.module)
            name = f"{PREFIX}{leaf.module}.poly_"
            tensors |= {
                f"{name}lora_A": d["a"],
                f"{name}lora_B": d["b"],
                f"{name}router.module_logits": d["router"].reshape(len(d["router"]), -1),
            }
    settings = {
        "peft_type": "POLY",
        "poly_type": "poly",
        "r": config["rank"],
        "n_tasks": config["tasks"],
        "n_skills": config["skills"],
        "n_splits": config.get("heads", 1),
        "target_modules": shortest(modules, view.modules, by_ending),
        "init_weights": True,
    }
    return Written(settings, tensors, frozenset(modules))


def read(config: Mapping[str, Any], view: View, names: frozenset[str]) -> Plan:
    """What a POLY folder with tensors `names` must hold, and how it becomes a method and a delta."""
    r, t, m, h = (config.get(k, d) for k, d in (("r", 8), ("n_tasks", 1), ("n_skills", 4), ("n_splits", 1)))
    if config.get("poly_type", "poly") != "poly":
        raise InterchangeError(f"poly_type {config['poly_type']!r} is not known: expected 'poly'")
    leaves = targets(config, view, names, ".poly_")
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf in leaves:
        _check(leaf)
        inner, outer = leaf.shape
        if inner % h or outer % h:
            raise InterchangeError(f"n_splits {h} does not divide {leaf.module!r}, which takes {inner} to {outer}")
        name = f"{PREFIX}{leaf.module}.poly_"
        shapes |= {
            f"{name}lora_A": (h, m, inner // h, r),
            f"{name}lora_B": (h, m, r, outer // h),
            f"{name}router.module_logits": (t, h * m),
        }

    def build(tensors: Mapping[str, np.ndarray]) -> tuple[Method, dict[str, Any]]:
        def of(leaf: Leaf, what: str) -> np.ndarray:
            return tensors[f"{PREFIX}{leaf.module}.poly_{what}"]

        skills: dict[str, Any] = {}
        router: dict[str, Any] = {}
        for path, layers in view.stacked({leaf: leaf for leaf in leaves}, "the adapter").items():
            each = lambda get, layers=layers: stack(
                [get(x) for x in layers] if isinstance(layers, list) else get(layers)
            )
            skills[path] = {"a": each(lambda x: of(x, "lora_A")), "b": each(lambda x: of(x, "lora_B"))}
            router[path] = each(lambda x: of(x, "router.module_logits").reshape(t, h, m))
        at = view.patterns(skills)
        method = poly(r, m, t, 1.0, at) if h == 1 else mhr(r, m, h, t, 1.0, at)
        return method, {"skills": skills, "router": router}

    return Plan(shapes, build, frozenset(leaf.module for leaf in leaves))


def _check(leaf: Leaf) -> None:
    if leaf.kind != "linear" or leaf.transform == "same":
        raise InterchangeError(
            f"PEFT routes linear layers only; {leaf.path!r} is {leaf.kind or 'no adaptable module'}"
            f"{' of the kind Conv1D' if leaf.transform == 'same' else ''} there. Use save_delta"
        )
