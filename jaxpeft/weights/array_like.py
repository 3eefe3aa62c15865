"""What an array-like leaf promises to the engine in `interpret.py`.

A leaf of `params` may be any value with a shape and a dtype that knows how to take part in the operations that models
do with weights, without being formed. Each operation may answer `NotImplemented`: the engine then calls `dense()`,
correct before fast, and says so.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array

Dims = tuple[int, ...]


class ArrayLike:
    """A value with a shape and a dtype that is not one dense array. Subclasses are registered pytree dataclasses."""

    @property
    def shape(self) -> Dims:
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dense(self) -> Array:
        """The array that this value stands for, of `self.shape` and `self.dtype`."""
        raise NotImplementedError

    # Products: `x` is an ordinary array.

    def dot(self, x: Array, contract: tuple[Dims, Dims], batch: tuple[Dims, Dims], **options: Any) -> Any:
        """`lax.dot_general(x, self)`: contracted and batch axes are given for x first; result (batch, x free, own free)."""
        return NotImplemented

    def conv(self, x: Array, params: dict[str, Any]) -> Any:
        """`lax.conv_general_dilated` with this value as the kernel; `params` are the equation's."""
        return NotImplemented

    def ragged_dot(self, x: Array, group_sizes: Array, params: dict[str, Any]) -> Any:
        """`lax.ragged_dot(x, self, group_sizes)`."""
        return NotImplemented

    def take(self, axis: int, look_up: Callable[[Array, int], Array]) -> Any:
        """Rows along `axis`: `look_up(array, axis)` gathers them from an array and puts the index axes first."""
        return NotImplemented

    # Structure: each answers another array-like value, nothing is computed.

    def astype(self, dtype: Any) -> Any:
        return NotImplemented

    def transpose(self, order: Dims) -> Any:
        return NotImplemented

    def reshape(self, shape: Dims) -> Any:
        return NotImplemented

    def along(self, axis: int, cut: Callable[[Array, int], Array]) -> Any:
        """A part along one axis: `cut(array, axis)` does it to one array."""
        return NotImplemented

    def times(self, y: Array) -> Any:
        """Elementwise product with an array that broadcasts to `self.shape`, of the same rank or a scalar."""
        return NotImplemented

    def each(self, function: Callable[[Array], Array]) -> Any:
        """The value with `function`, which keeps shapes and commutes with products, done to every part."""
        return NotImplemented

    def scanned(self) -> tuple[Sequence[Any], Callable[[Sequence[Any]], "ArrayLike"]] | Any:
        """Parts that have the leading axis, and a function that makes the value of one step from their slices."""
        return NotImplemented


def is_array_like(x: Any) -> bool:
    return isinstance(x, ArrayLike)


def densify(tree: Any) -> Any:
    """`tree` with every array-like leaf formed."""
    return jax.tree.map(lambda x: x.dense() if is_array_like(x) else x, tree, is_leaf=is_array_like)
