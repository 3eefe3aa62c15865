"""The records that the parts of this package hand to each other."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxpeft.method import Method

PREFIX = "base_model.model."  # of tensors beside or inside the base's modules
VIRTUAL_PREFIX = "base_model."  # of the modules that a prompt or a prefix brings along


class Part(NamedTuple):
    """One method of a chain with its delta."""

    config: Mapping[str, Any]
    delta: Mapping[str, Any]


class Written(NamedTuple):
    """Settings for `adapter_config.json`, tensors by full name, and the modules that are adapted."""

    settings: dict[str, Any]
    tensors: dict[str, np.ndarray]
    modules: frozenset[str]


class Plan(NamedTuple):
    """What a folder must hold, and what is made of it.

    Attributes:
      shapes: of each tensor by full name.
      build: from the tensors to the method and its delta.
      modules: those that are adapted.
    """

    shapes: dict[str, tuple[int, ...]]
    build: Callable[[Mapping[str, np.ndarray]], tuple[Method, dict[str, Any]]]
    modules: frozenset[str]
