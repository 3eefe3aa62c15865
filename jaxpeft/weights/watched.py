"""A value that tells of its products: how `explain` learns where and how often an adapted weight is used."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.tree_util as jtu
from jaxtyping import Array

from jaxpeft.weights.array_like import ArrayLike, Dims
from jaxpeft.weights.factored import STATIC


@dataclass(frozen=True)
class Use:
    """One product with an adapted weight.

    Attributes:
      path: of the weight.
      value: what it is multiplied as.
      x: the input's shape and dtype.
      contract, batch: axes, the input's first.
      repeats: how often the product is done: the length of the scans around it.
    """

    path: str
    value: ArrayLike
    x: Any
    contract: tuple[Dims, Dims]
    batch: tuple[Dims, Dims]
    repeats: int


Watch = Callable[[Use], None]


@jtu.register_dataclass
@dataclass(frozen=True)
class Watched(ArrayLike):
    """`value`, whose products are told to `watch`; other operations are passed on."""

    value: Any
    path: str = field(metadata=STATIC)
    watch: Watch = field(metadata=STATIC)
    repeats: int = field(default=1, metadata=STATIC)

    @property
    def shape(self) -> Dims:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def dense(self) -> Array:
        return self.value.dense()

    def dot(self, x: Array, contract: tuple[Dims, Dims], batch: tuple[Dims, Dims], **options: Any) -> Any:
        self.watch(Use(self.path, self.value, x, contract, batch, self.repeats))
        return self.value.dot(x, contract, batch, **options)

    def conv(self, x: Array, params: dict[str, Any]) -> Any:
        return self.value.conv(x, params)

    def ragged_dot(self, x: Array, group_sizes: Array, params: dict[str, Any]) -> Any:
        return self.value.ragged_dot(x, group_sizes, params)

    def take(self, axis: int, look_up: Callable[[Array, int], Array]) -> Any:
        return self.value.take(axis, look_up)

    def astype(self, dtype: Any) -> Any:
        return self._again(self.value.astype(dtype))

    def transpose(self, order: Dims) -> Any:
        return self._again(self.value.transpose(order))

    def reshape(self, shape: Dims) -> Any:
        return self._again(self.value.reshape(shape))

    def along(self, axis: int, cut: Callable[[Array, int], Array]) -> Any:
        return self._again(self.value.along(axis, cut))

    def times(self, y: Array) -> Any:
        return self._again(self.value.times(y))

    def each(self, function: Callable[[Array], Array]) -> Any:
        return self._again(self.value.each(function))

    def scanned(self) -> tuple[Sequence[Any], Callable[[Sequence[Any]], ArrayLike]] | Any:
        found = self.value.scanned()
        if found is NotImplemented:
            return found
        parts, make = found
        repeats = self.repeats * self.shape[0]
        return parts, lambda slices: dataclasses.replace(self, value=make(slices), repeats=repeats)

    def _again(self, value: Any) -> Any:
        return value if value is NotImplemented else dataclasses.replace(self, value=value)
