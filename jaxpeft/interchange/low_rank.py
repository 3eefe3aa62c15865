"""LoRA and DoRA in the PEFT layout.

    here (scanned: with L in front)     there
    a (in, r), b (r, out)               lora_A.weight (r, in), lora_B.weight (out, r)
    a (num, r), b (r, dim)              lora_embedding_A (r, num), lora_embedding_B (dim, r)
    a (y, x, in, r), b (r, out)         lora_A.weight (r, in, y, x), lora_B.weight (out, r, 1, 1)
    magnitude (out)                     lora_magnitude_vector (out), of a convolution (1, out, 1, 1)

GPT-2's Conv1D is written as any linear layer (`fan_in_fan_out`). DoRA computes the same in evaluation. With dropout
while training, PEFT multiplies the base weight with the dropped input, too, where the gain adds to the base's output;
here the low-rank product alone sees it.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpeft.adapt.dora import dora
from jaxpeft.adapt.lora import first_match, lora
from jaxpeft.interchange.errors import InterchangeError
from jaxpeft.interchange.keys import saved_modules
from jaxpeft.interchange.layout import PREFIX, Part, Plan, Written
from jaxpeft.interchange.view import (
    Leaf,
    View,
    by_ending,
    by_regex,
    is_shared,
    most_common,
    shortest,
    stack,
)
from jaxpeft.method import Method


def write(part: Part, view: View) -> Written:
    """The settings and tensors of a `lora` or `dora` part."""
    config, with_magnitude = part.config, part.config["method"] == "dora"
    ranks: dict[str, int] = {}
    alphas: dict[str, Any] = {}
    tensors: dict[str, np.ndarray] = {}
    flipped = False
    for path, arrays in part.delta.items():
        alpha = _alpha(config, path)
        for leaf, d in view.unstacked(path, arrays, ("a", "b", "magnitude") if with_magnitude else ("a", "b")):
            check(view, leaf)
            if alpha.ndim and leaf.layer is None:
                raise InterchangeError(f"alpha has shape {alpha.shape} for the single weight {path!r}")
            ranks[leaf.module] = d["b"].shape[0]
            alphas[leaf.module] = _plain(alpha[leaf.layer] if alpha.ndim else alpha)
            flipped |= leaf.kind == "linear" and leaf.transform == "same"
            tensors |= {f"{PREFIX}{leaf.module}.{k}": x for k, x in _to_torch(leaf, d).items()}
    rank, alpha = most_common(list(ranks.values())), most_common(list(alphas.values()))
    start = config.get("init", "kaiming")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config["dropout"],
        "target_modules": shortest(ranks, view.modules, by_ending),
        "rank_pattern": _exceptions(ranks, rank),
        "alpha_pattern": _exceptions(alphas, alpha),
        "use_rslora": config["scaling"] == "rslora",
        "use_dora": with_magnitude,
        "fan_in_fan_out": flipped,
        "init_lora_weights": "gaussian" if start == "gaussian" else True,
    }
    return Written(settings, tensors, frozenset(ranks))


def read(config: Mapping[str, Any], view: View, names: frozenset[str]) -> Plan:
    """What a LORA folder with tensors `names` must hold, and how it becomes a method and a delta."""
    leaves = targets(config, view, names, ".lora_")
    with_magnitude = bool(config.get("use_dora"))
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    ranks = {leaf: _lookup(config.get("rank_pattern"), leaf.module, rank) for leaf in leaves}
    alphas = {leaf: _lookup(config.get("alpha_pattern"), leaf.module, alpha) for leaf in leaves}
    shapes = {}
    for leaf in leaves:
        if ranks[leaf] < 1:
            raise InterchangeError(f"rank {ranks[leaf]} for {leaf.module!r}: a rank is at least 1")
        shapes |= {f"{PREFIX}{leaf.module}.{k}": s for k, s in _torch_shapes(leaf, ranks[leaf], with_magnitude).items()}

    def build(tensors: Mapping[str, np.ndarray]) -> tuple[Method, dict[str, Any]]:
        found = {leaf: _from_torch(leaf, tensors) for leaf in leaves}
        delta = {}
        for path, layers in view.stacked(found, "the adapter").items():
            many = layers if isinstance(layers, list) else [layers]
            of = view.of(path)
            for what, values in (("rank", ranks), ("alpha", alphas)):
                if len({values[leaf] for leaf in of}) > 1:
                    raise InterchangeError(
                        f"the layers of the scanned stack {path!r} differ in {what} "
                        f"({[values[leaf] for leaf in of][:8]}): load the model with scan=False"
                    )
            delta[path] = {k: stack([d[k] for d in many] if isinstance(layers, list) else layers[k]) for k in many[0]}
        factory = dora if with_magnitude else lora
        method = factory(
            rank,
            alpha,
            view.patterns(delta),
            scaling="rslora" if config.get("use_rslora") else "standard",
            dropout=config.get("lora_dropout") or 0.0,
            init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
            rank_pattern=_by_path(ranks, rank),
            alpha_pattern=_by_path(alphas, alpha),
        )
        return method, delta

    return Plan(shapes, build, frozenset(leaf.module for leaf in leaves))


def check(view: View, leaf: Leaf) -> None:
    """Raises InterchangeError where PEFT has no layer for this leaf, or one that does something else."""
    if not leaf.kind:
        raise InterchangeError(
            f"PEFT adapts linear, embedding and convolution modules; {leaf.path!r} is none of them "
            f"({leaf.module!r} there). Use save_delta"
        )
    if why := is_shared(view, leaf):
        raise InterchangeError(f"{leaf.path!r} cannot be exchanged: {why}. Use save_delta")


def targets(config: Mapping[str, Any], view: View, names: frozenset[str], mark: str) -> list[Leaf]:
    """The weights that the settings of a folder choose; where they leave it open, those that its tensors name."""
    wanted = config.get("target_modules")
    adaptable = [leaf for leaf in view.leaves if leaf.kind]
    if wanted in (None, [], "all-linear"):
        named = {n.removeprefix(PREFIX).partition(mark)[0] for n in names if mark in n}
        chosen = [leaf for leaf in adaptable if leaf.module in named]
    else:
        chosen = [leaf for leaf in adaptable if _chooses(config, leaf.module)]
    if not chosen:
        raise InterchangeError(
            f"target_modules {wanted!r} chooses no weight of this {type(view.model).__name__}, whose modules are "
            f"called like {adaptable[-1].module!r}: the adapter is for another model"
        )
    for leaf in chosen:
        check(view, leaf)
    return chosen


def _chooses(config: Mapping[str, Any], module: str) -> bool:
    """PEFT's rule for one module."""
    wanted, excluded = config["target_modules"], config.get("exclude_modules") or []
    if (
        re.fullmatch(excluded, module) if isinstance(excluded, str) else any(by_ending(e, module) for e in excluded)
    ) or any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in saved_modules(config)):
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    if module in wanted:
        return True
    if not any(by_ending(w, module) for w in wanted):
        return False
    layers, around = config.get("layers_to_transform"), config.get("layers_pattern") or [r"[^.]*"]
    if layers is None or layers == []:
        return True
    for pattern in [around] if isinstance(around, str) else around:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


# ------------------------------------------------------------------------------------------------------------- tensors


def _to_torch(leaf: Leaf, d: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    a, b = d["a"], d["b"]
    if leaf.kind == "conv":
        out = {"lora_A.weight": a.transpose(3, 2, 0, 1), "lora_B.weight": b.T[:, :, None, None]}
    elif leaf.kind == "embedding":
        out = {"lora_embedding_A": a.T, "lora_embedding_B": b.T}
    else:
        out = {"lora_A.weight": a.T, "lora_B.weight": b.T}
    if "magnitude" in d:
        out["lora_magnitude_vector"] = d["magnitude"][None, :, None, None] if leaf.kind == "conv" else d["magnitude"]
    return out


def _from_torch(leaf: Leaf, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    def get(name: str) -> np.ndarray:
        return tensors[f"{PREFIX}{leaf.module}.{name}"]

    if leaf.kind == "conv":
        out = {"a": get("lora_A.weight").transpose(2, 3, 1, 0), "b": get("lora_B.weight")[:, :, 0, 0].T}
    elif leaf.kind == "embedding":
        out = {"a": get("lora_embedding_A").T, "b": get("lora_embedding_B").T}
    else:
        out = {"a": get("lora_A.weight").T, "b": get("lora_B.weight").T}
    magnitude = f"{PREFIX}{leaf.module}.lora_magnitude_vector"
    return {**out, "magnitude": tensors[magnitude].reshape(-1)} if magnitude in tensors else out


def _torch_shapes(leaf: Leaf, r: int, with_magnitude: bool) -> dict[str, tuple[int, ...]]:
    *inner, outer = leaf.shape
    if leaf.kind == "conv":
        y, x, channels = inner
        out: dict[str, tuple[int, ...]] = {"lora_A.weight": (r, channels, y, x), "lora_B.weight": (outer, r, 1, 1)}
    elif leaf.kind == "embedding":
        out = {"lora_embedding_A": (r, inner[0]), "lora_embedding_B": (outer, r)}
    else:
        out = {"lora_A.weight": (r, inner[0]), "lora_B.weight": (outer, r)}
    if with_magnitude:
        out["lora_magnitude_vector"] = (1, outer, 1, 1) if leaf.kind == "conv" else (outer,)
    return out


# --------------------------------------------------------------------------------------------------- ranks and alphas


def _alpha(config: Mapping[str, Any], path: str) -> np.ndarray:
    """The numerator of the scale at `path`: a number, or one for each stacked layer."""
    alpha = 2 * config["rank"] if config["alpha"] is None else config["alpha"]
    try:
        return np.asarray(first_match(config["alpha_pattern"], path, alpha), np.float64)
    except Exception as e:
        raise InterchangeError(
            f"alpha at {path!r} is not a number while a function is traced: save outside of jit"
        ) from e


def _plain(x: Any) -> int | float:
    x = float(x)
    return int(x) if x.is_integer() else x


def _exceptions(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """PEFT's pattern table: for each value but the usual one, the endings of its modules."""
    out = {}
    for value in dict.fromkeys(values.values()):
        if value != usual:
            chosen = {m for m, v in values.items() if v == value}
            out |= dict.fromkeys(shortest(chosen, values, by_regex), value)
    return out


def _by_path(values: Mapping[Leaf, Any], usual: Any) -> dict[str, Any] | None:
    return {leaf.path: value for leaf, value in values.items() if value != usual} or None


def _lookup(table: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    return next((value for pattern, value in (table or {}).items() if by_regex(pattern, module)), otherwise)
