"""Recipes: what is merged, how and with which numbers, as mergekit's YAML says it.

    merge_method: ties
    base_model: base
    models:
      - model: a
        parameters: {weight: 0.5, density: [0.2, 0.8]}          # from the first layer to the last
      - model: b
        parameters:
          weight:
            - {filter: mlp, value: 0.3}                           # tensors whose name has "mlp" in it
            - {value: 0.7}                                        # all others
    parameters: {normalize: true, lambda: 0.9}
    dtype: bfloat16

Folders are relative to the recipe's own. A model's parameters come before the recipe's. A list of numbers is interpolated by
depth, 0 at the first layer to 1 at the last; tensors outside of layers are at 0.

    linear                                    sum w x / sum w (normalize: false leaves the division out)
    slerp                                     t from the base to the other model, on the sphere, a tensor each
    task_arithmetic                           base + lambda sum w tau
    ties, dare_ties, breadcrumbs_ties         ... with signs elected, of tau that are trimmed, dropped, cut at both ends
    dare_linear, breadcrumbs                  ... without signs

weight has no default; density is the share of tau that stays, gamma the share of the largest that goes (breadcrumbs, 0.01);
`normalize` divides by the weights that count (ties does where nothing is said); `rescale` makes up for what was dropped (dare
does). What a recipe asks that is not done here (layers of other models put together, vocabularies joined) is refused by name.

Reference for the language: arcee-ai/mergekit 0.1.5.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from jaxpeft import trees

__all__ = ["METHODS", "Numbers", "Recipe", "RecipeError", "Rule", "Source", "depths", "load_recipe", "read_recipe"]


class Rule(NamedTuple):
    """What a merge method does, and what it reads of a recipe.

    Attributes:
      kind: "mean" of the models, without a base; "sphere", between the base and one other; or "differences" from the
        base, added to it.
      parameters: of its own, beside `weight`, `normalize` and `rescale`.
      normalize, rescale: where a recipe does not say.
      keeps: which entries of a difference stay: all, "random" ones, or the "largest".
      elects: whether only what has the sign of the sum counts.
    """

    kind: Literal["mean", "sphere", "differences"]
    parameters: tuple[str, ...] = ()
    normalize: bool = False
    rescale: bool = False
    keeps: Literal["all", "random", "largest"] = "all"
    elects: bool = False


_SHARE, _CUT = ("lambda", "density"), ("lambda", "density", "gamma")
METHODS = {
    "linear": Rule("mean", normalize=True),
    "slerp": Rule("sphere", ("t",)),
    "task_arithmetic": Rule("differences", ("lambda",)),
    "ties": Rule("differences", _SHARE, normalize=True, keeps="largest", elects=True),
    "dare_linear": Rule("differences", _SHARE, rescale=True, keeps="random"),
    "dare_ties": Rule("differences", _SHARE, rescale=True, keeps="random", elects=True),
    "breadcrumbs": Rule("differences", _CUT, keeps="largest"),
    "breadcrumbs_ties": Rule("differences", _CUT, keeps="largest", elects=True),
}
DTYPES = ("float64", "float32", "float16", "bfloat16")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_TOP = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source")
_IGNORED = ("name", "chat_template", "int8_mask")


class RecipeError(ValueError):
    """A recipe that cannot be followed: the message names the key and the remedy."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model of a recipe and the parameters that are its own."""

    folder: Path
    parameters: Mapping[str, Any]


class Numbers(NamedTuple):
    """A tensor's parameters, by model where they are the models' own; empty where the method has none."""

    weight: tuple[float, ...]
    density: tuple[float, ...]
    gamma: tuple[float, ...]
    scale: float
    t: float
    normalize: bool
    rescale: bool


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe, checked.

    Attributes:
      method: one of `METHODS`.
      models: what is merged; of `slerp` one, the other end being the base. Never the base itself where a base is needed.
      base: the folder of the base, None for `linear`.
      parameters: those of all models.
      dtype: of the result; None for the base's own, tensor by tensor.
      tokenizer: the folder whose tokenizer and config come along.
    """

    method: str
    models: tuple[Source, ...]
    base: Path | None
    parameters: Mapping[str, Any]
    dtype: str | None
    tokenizer: Path

    @property
    def rule(self) -> Rule:
        """Of its method."""
        return METHODS[self.method]

    @property
    def folders(self) -> list[Path]:
        """Of the base, where there is one, and of the models."""
        return [*([self.base] if self.base else []), *(m.folder for m in self.models)]

    def number(self, name: str, tensor: str, depth: float, source: Source | None = None, default: Any = None) -> float:
        """A parameter for one tensor.

        Args:
          name: of the parameter.
          tensor: its name in the files.
          depth: 0 at the first layer, 1 at the last; see `depths`.
          source: the model, for parameters of models.
          default: None for a parameter that must be there.

        Raises:
          RecipeError: it is missing, or not a number.
        """
        for place, held in (
            (source.folder.name if source else "", source.parameters if source else {}),
            ("", self.parameters),
        ):
            if name in held and (found := _chosen(held[name], tensor, depth)) is not None:
                return _number(found, f"{place + ': ' if place else ''}{name}")
        if default is None:
            where = f" for {source.folder.name}" if source else ""
            raise RecipeError(f"parameter {name!r} is not given{where} ({tensor}): {self.method} needs it")
        return default

    def flag(self, name: str, tensor: str, depth: float, default: bool) -> bool:
        """A yes or no of all models."""
        return bool(self.number(name, tensor, depth, default=float(default)))

    def numbers(self, tensor: str, depth: float) -> Numbers:
        """All of a tensor's parameters.

        Raises:
          RecipeError: one is missing, no number or out of range.
        """
        rule, own = self.rule, self.rule.parameters

        def each(name: str, default: float | None) -> tuple[float, ...]:
            return tuple(self.number(name, tensor, depth, m, default) for m in self.models)

        density = each("density", 1.0) if "density" in own else ()
        gamma = each("gamma", 0.01) if "gamma" in own else ()
        for name, values in (("density", density), ("gamma", gamma)):
            if any(not 0 <= v <= 1 for v in values):
                raise RecipeError(f"parameter {name} of {tensor} is {values}: a share, 0 to 1")
        weight = () if rule.kind == "sphere" else each("weight", None)
        normalize = self.flag("normalize", tensor, depth, rule.normalize)
        if rule.kind == "mean" and normalize and abs(sum(weight)) < 1e-8:
            raise RecipeError(f"the weights of {tensor} sum to 0: nothing to divide by; set normalize: false")
        return Numbers(
            weight,
            density,
            gamma,
            self.number("lambda", tensor, depth, default=1.0) if "lambda" in own else 1.0,
            self.number("t", tensor, depth) if "t" in own else 0.0,
            normalize,
            self.flag("rescale", tensor, depth, rule.rescale),
        )

    def digest(self) -> str:
        """Tells this recipe from others, folders included."""
        held = {**dataclasses.asdict(self), "folders": [str(f.resolve()) for f in self.folders]}
        return hashlib.sha256(json.dumps(held, sort_keys=True, default=str).encode()).hexdigest()[:16]


def depths(names: Sequence[str]) -> dict[str, float]:
    """Each tensor's depth: i / (n - 1) in layer i of n (1 of a single layer), 0 outside of layers."""
    at = {name: int(m.group(1)) if (m := _LAYER.search(name)) else None for name in names}
    last = max((i for i in at.values() if i is not None), default=0)
    return {name: 0.0 if i is None else i / last if last else 1.0 for name, i in at.items()}


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Reads a YAML file.

    Raises:
      RecipeError: it is missing, no YAML, or asks for what is not done.
    """
    path = Path(path)
    try:
        held = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: there is no such recipe") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    return read_recipe(held, path.parent)


def read_recipe(held: Any, root: str | os.PathLike[str] = ".") -> Recipe:
    """The recipe that plain data describe, with folders relative to `root`.

    Raises:
      RecipeError: as `load_recipe`.
    """
    if not isinstance(held, Mapping):
        raise RecipeError("a recipe is a mapping with merge_method and models")
    for key in held:
        if key not in _TOP and key not in _IGNORED:
            raise RecipeError(f"{key!r} is not done here{trees.near(str(key), _TOP)}; known: {', '.join(_TOP)}")
    method = held.get("merge_method")
    if method not in METHODS:
        raise RecipeError(f"merge_method {method!r}{trees.near(str(method), METHODS)}; known: {', '.join(METHODS)}")
    root = Path(root)
    models = _models(held, root)
    base = _folder(held["base_model"], root) if held.get("base_model") else None
    parameters = dict(held.get("parameters") or {})
    rule = METHODS[method]
    if rule.kind == "mean":
        base = None
        if not models:
            raise RecipeError(f"models: {method} needs one at least")
    else:
        if base is None:
            raise RecipeError(f"base_model is not given: {method} needs it")
        models = tuple(m for m in models if m.folder != base)
        if rule.kind == "sphere" and len(models) != 1:
            raise RecipeError(f"models: {method} is between the base and one other model, {len(models)} are given")
    dtype = held.get("out_dtype") or held.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    known = {"weight", "normalize", "rescale", *_IGNORED, *rule.parameters}
    for name in {**parameters, **{n: 0 for m in models for n in m.parameters}}:
        if name not in known:
            raise RecipeError(
                f"parameter {name!r} of {method}{trees.near(name, known)}; known: {', '.join(sorted(known))}"
            )
    return Recipe(method, models, base, parameters, dtype, _tokenizer(held, root, base, models))


def _models(held: Mapping[str, Any], root: Path) -> tuple[Source, ...]:
    given = held.get("models")
    if "slices" in held:
        slices = held["slices"]
        sources = slices[0].get("sources", []) if isinstance(slices, list) and len(slices) == 1 else []
        if given or not sources or any("layer_range" in s and s["layer_range"][0] != 0 for s in sources):
            raise RecipeError(
                "slices: layers of several models put together are not done here; one slice of whole models is"
            )
        own = slices[0].get("parameters") or {}
        given = [{**s, "parameters": {**own, **(s.get("parameters") or {})}} for s in sources]
    if not isinstance(given, list) or not all(isinstance(m, Mapping) and "model" in m for m in given):
        raise RecipeError("models: a list of mappings, each with 'model', a folder")
    return tuple(Source(_folder(m["model"], root), dict(m.get("parameters") or {})) for m in given)


def _folder(name: Any, root: Path) -> Path:
    path = name.get("model", {}).get("path", name) if isinstance(name, Mapping) else name
    folder = root / str(path)
    if not folder.is_dir():
        raise RecipeError(f"model {str(path)!r}: there is no folder {folder}; fetch a model first and give its folder")
    return folder


def _tokenizer(held: Mapping[str, Any], root: Path, base: Path | None, models: tuple[Source, ...]) -> Path:
    source = held.get("tokenizer_source") or "base"
    if source == "union":
        raise RecipeError("tokenizer_source 'union': vocabularies are not joined here; all models need the same")
    return (base or models[0].folder) if source == "base" else _folder(source, root)


def _chosen(value: Any, tensor: str, depth: float) -> Any:
    """What stands for this tensor: the first condition that holds, interpolated by depth."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return value
    if value and all(isinstance(v, Mapping) for v in value):
        for v in value:
            if v.get("filter") in (None, "*") or str(v["filter"]) in tensor:
                return _chosen(v.get("value"), tensor, depth)
        return None
    if not value:
        return None
    numbers = [_number(v, "a gradient") for v in value]
    at = depth * (len(numbers) - 1)
    low = min(int(at), len(numbers) - 1)
    high = min(low + 1, len(numbers) - 1)
    return numbers[low] + (at - low) * (numbers[high] - numbers[low])


def _number(value: Any, name: str) -> float:
    try:
        return float(value)  # YAML reads 1e-3 as text
    except (TypeError, ValueError) as error:
        raise RecipeError(f"parameter {name} is {value!r}: expected a number") from error
