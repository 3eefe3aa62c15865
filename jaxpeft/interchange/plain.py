"""Leaves that are trained as they are: PEFT's `modules_to_save`, and the biases of adapted layers.

PEFT saves modules whole, so what the delta lacks of one is filled in from the base. A bias of a layer that is adapted
itself goes with `bias="lora_only"`, together with the (unchanged) biases of the other adapted layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpeft.adapt.full import full, head
from jaxpeft.interchange.errors import InterchangeError
from jaxpeft.interchange.keys import IMPLIED, saved_modules
from jaxpeft.interchange.layout import Part
from jaxpeft.interchange.view import HEAD, Leaf, View, by_letters, containers, is_shared, shortest, stack
from jaxpeft.method import Method
from jaxpeft.models.names import TRANSFORMS, stored_shape

METHODS = ("full", "head", "bitfit")


def values(parts: Sequence[Part], view: View) -> dict[Leaf, np.ndarray]:
    """The trained leaves of `full`, `head` and `bitfit` parts, one layer each, as they are in use."""
    out: dict[Leaf, np.ndarray] = {}
    for part in parts:
        for path, arrays in part.delta.items():
            for leaf, d in view.unstacked(path, arrays, tuple(arrays)):
                if leaf in out:
                    raise InterchangeError(f"two parts of the chain train {path!r}: leave one of them out")
                if d:
                    out[leaf] = d["value"] if "value" in d else base(view, leaf) + d["difference"]
    return out


def base(view: View, leaf: Leaf) -> np.ndarray:
    """The leaf as the base has it."""
    x = view.values[leaf.path]
    return np.asarray(x if leaf.layer is None else x[leaf.layer])


def write(
    trained: Mapping[Leaf, np.ndarray], view: View, adapted: frozenset[str], prefix: str, *, biases: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings and tensors for trained leaves beside an adapter on the modules `adapted`.

    Args:
      prefix: of tensor names.
      biases: whether the adapter's type can keep biases of adapted layers.
    """
    whole, with_bias = set(), False
    for leaf in trained:
        if not leaf.name:
            raise InterchangeError(f"PEFT saves whole modules, and {leaf.path!r} is a bare parameter. Use save_delta")
        if why := is_shared(view, leaf):
            raise InterchangeError(f"{leaf.path!r} cannot be exchanged: {why}. Use save_delta")
        if leaf.module not in adapted:
            whole.add(_unit(leaf.module))
        elif leaf.name == "bias" and biases:
            with_bias = True
        else:
            raise InterchangeError(
                f"{leaf.path!r} is trained as it is, and its module is adapted, too: PEFT does one or the other. "
                "Use save_delta, or merge and save_model"
            )
    if clash := sorted(m for m in adapted if _unit(m) in whole):
        raise InterchangeError(f"{clash[0]!r} is adapted inside a module that is saved whole. Use save_delta")
    tensors = {}
    for leaf in view.leaves:
        if _unit(leaf.module) in whole:
            name = leaf.full_name
        elif with_bias and leaf.module in adapted and leaf.name == "bias":
            name = f"{leaf.module}.base_layer.bias"
        else:
            continue
        x = trained[leaf] if leaf in trained else base(view, leaf)
        tensors[prefix + name] = TRANSFORMS[leaf.transform][1](x)
    settings: dict[str, Any] = {"modules_to_save": shortest(whole, view.modules, by_letters) if whole else None}
    return ({**settings, "bias": "lora_only" if with_bias else "none"} if biases else settings), tensors


def head_leaves(view: View) -> list[Leaf]:
    """The parameters of the model's classification head, if it has one."""
    return [leaf for leaf in view.leaves if _unit(leaf.module) == HEAD]


class Announced:
    """The trained leaves that a folder's settings announce.

    Attributes:
      leaves: them, by the tensor that holds each.
      ignored: names that PEFT writes in addition, which repeat others or the base.
    """

    def __init__(
        self, config: Mapping[str, Any], view: View, names: frozenset[str], adapted: frozenset[str], prefix: str
    ):
        self.view, self.leaves, self.ignored = view, {}, set()
        said = config.get("modules_to_save") or []
        self.unsaid: set[str] = set()  # tensors of a head that only the task implies
        for wanted in dict.fromkeys(saved_modules(config)):
            hits = [leaf for leaf in view.leaves if any(by_letters(wanted, c) for c in containers(leaf.module))]
            own = {prefix + leaf.full_name: leaf for leaf in hits}
            if not hits and wanted not in IMPLIED:
                raise InterchangeError(f"modules_to_save names {wanted!r}, and the model has no such module")
            if wanted not in said:
                if not names & set(own):
                    continue
                self.unsaid |= set(own) - set(self.leaves)
            for leaf in hits:
                if why := is_shared(view, leaf):
                    raise InterchangeError(f"modules_to_save names {wanted!r}: {why}")
            self.leaves |= own
        mode = config.get("bias", "none")
        if mode not in ("none", "all", "lora_only"):
            raise InterchangeError(f"bias={mode!r}: expected 'none', 'all' or 'lora_only'")
        saved = {leaf.module for leaf in self.leaves.values()}
        for leaf in view.leaves:
            if leaf.name != "bias" or mode == "none":
                continue
            if leaf.module in adapted:
                self.leaves[f"{prefix}{leaf.module}.base_layer.bias"] = leaf
            elif mode == "all":
                self.leaves[f"{prefix}{leaf.module}.bias"] = leaf
        if mode == "all":
            both = ("modules_to_save.bias", "original_module.bias")
            self.ignored = {f"{prefix}{m}.{name}" for m in saved for name in both} & names

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each announced tensor."""
        return {name: stored_shape(leaf.transform, leaf.shape) for name, leaf in self.leaves.items()}

    def build(self, tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        """The delta of `full` for these tensors; other layers of a scanned stack are filled in from the base.

        A head that only the task implies and that equals the base's was not trained and is left out.
        """
        found = {leaf: TRANSFORMS[leaf.transform][0](tensors[n]) for n, leaf in self.leaves.items()}
        unsaid = {self.leaves[name] for name in self.unsaid}
        if unsaid and all(np.array_equal(found[leaf], base(self.view, leaf)) for leaf in unsaid):
            found = {leaf: x for leaf, x in found.items() if leaf not in unsaid}
        for path in dict.fromkeys(leaf.path for leaf in list(found)):
            for leaf in self.view.of(path):
                found.setdefault(leaf, base(self.view, leaf))
        return {path: {"value": stack(x)} for path, x in self.view.stacked(found, "a saved module").items()}


def method_of(delta: Mapping[str, Any], view: View) -> Method:
    """The method that trains the leaves of `delta`."""
    at = view.patterns(delta)
    return head(at) if all(_unit(leaf.module) == HEAD for p in delta for leaf in view.of(p)) else full(at)


def _unit(module: str) -> str:
    """PEFT wraps a head of several layers in one piece where the task is to classify."""
    return HEAD if module.split(".")[0] == HEAD else module
