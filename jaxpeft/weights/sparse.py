"""A weight and a sparse difference: few entries move, the others are the frozen ones."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpeft.weights.array_like import ArrayLike, Dims

STATIC: dict[str, Any] = {"static": True}


@jtu.register_dataclass
@dataclass(frozen=True)
class Sparse(ArrayLike):
    """`w` with `values` added at `indices`, then reshaped and transposed as `views` say.

    A product multiplies the frozen weight and adds each entry's own contribution, x[:, i] v to y[:, j], where that takes
    no more numbers (rows of x times entries) than the weight has; else it forms the sum of this one weight. Other uses
    form it too.

    Attributes:
      w: (*stack, *rest), frozen.
      indices: (*stack, n) positions in the flattened rest; those out of range (padding) are passed over.
      values: (*stack, n).
      views: pairs ("reshape", shape) and ("transpose", order), in order.
    """

    w: Array
    indices: Int[Array, "*stack n"]
    values: Float[Array, "*stack n"]
    views: tuple[tuple[str, Dims], ...] = field(default=(), metadata=STATIC)

    def _viewed(self, x: Array) -> Array:
        for kind, argument in self.views:
            x = x.reshape(argument) if kind == "reshape" else x.transpose(argument)
        return x

    def _sum(self, w: Array, values: Array) -> Array:
        stack = self.indices.shape[:-1]

        def one(w: Array, indices: Array, values: Array) -> Array:
            wider = values.dtype if jnp.finfo(values.dtype).bits > jnp.finfo(w.dtype).bits else w.dtype
            wide = values.astype(wider)
            # Added in the wider dtype, rounded once.
            flat = w.reshape(-1)
            new = flat.at[indices].get(mode="fill", fill_value=0).astype(wide.dtype) + wide
            return flat.at[indices].set(new.astype(w.dtype), mode="drop").reshape(w.shape)

        for _ in stack:
            one = jax.vmap(one)
        return self._viewed(one(w, self.indices, values))

    @property
    def shape(self) -> Dims:
        return jax.eval_shape(self._viewed, jax.ShapeDtypeStruct(self.w.shape, self.w.dtype)).shape

    @property
    def dtype(self) -> Any:
        return self.w.dtype

    def dense(self) -> Array:
        return self._sum(self.w, self.values)

    def _entries(self, axis: int) -> tuple[Array, Array] | None:
        """The entries' places along the contracted axis and along the other one, of a matrix that is at most transposed;
        None for other shapes. Padding is out of range in both."""
        if self.w.ndim != 2 or self.indices.ndim != 1 or any(kind != "transpose" for kind, _ in self.views):
            return None
        for _, order in reversed(self.views):
            axis = order[axis]
        rows, columns = self.indices // self.w.shape[1], self.indices % self.w.shape[1]
        columns = jnp.where(self.indices < self.w.size, columns, self.w.shape[1])
        return (rows, columns) if axis == 0 else (columns, rows)

    def dot(self, x: Array, contract: tuple[Dims, Dims], batch: tuple[Dims, Dims], **options: Any) -> Any:
        (mine, own), places = contract, None
        if len(own) == 1 and not batch[0]:
            entries = x.size // x.shape[mine[0]] * self.indices.shape[-1]
            places = self._entries(own[0]) if entries <= self.w.size else None
        if places is None:
            return lax.dot_general(x, self.dense(), (contract, batch), **options)
        y = lax.dot_general(x, self._viewed(self.w), (contract, batch), **options)
        inside, out = places
        picked = jnp.moveaxis(x, mine[0], -1).at[..., inside].get(mode="fill", fill_value=0)
        each = picked.astype(y.dtype) * self.values.astype(y.dtype).reshape(*(1,) * (x.ndim - 1), -1)
        return y.at[..., out].add(each, mode="drop")

    def conv(self, x: Array, params: dict[str, Any]) -> Any:
        return lax.conv_general_dilated_p.bind(x, self.dense(), **params)

    def take(self, axis: int, look_up: Callable[[Array, int], Array]) -> Any:
        return look_up(self.dense(), axis)

    def astype(self, dtype: Any) -> Any:
        if not jnp.issubdtype(dtype, jnp.inexact):
            return NotImplemented
        return dataclasses.replace(self, w=self.w.astype(dtype))

    def transpose(self, order: Dims) -> "Sparse":
        return dataclasses.replace(self, views=(*self.views, ("transpose", tuple(order))))

    def reshape(self, shape: Dims) -> "Sparse":
        return dataclasses.replace(self, views=(*self.views, ("reshape", tuple(shape))))

    def scanned(self) -> Any:
        if self.views or self.indices.ndim < 2:
            return NotImplemented
        return (self.w, self.indices, self.values), lambda parts: Sparse(*parts)


def sparse(w: Float[Array, "*stack_rest"], indices: Int[Array, "*stack n"], values: Float[Array, "*stack n"]) -> Sparse:
    """`w` with `values` added at `indices`, positions in each layer's flattened weight.

    Args:
      w: the frozen weight.
      indices: distinct; those of padding lie out of range.
      values: of the same shape.

    Raises:
      ValueError: indices and values of different shapes, or more stacked axes than the weight has.
    """
    if indices.shape != values.shape or indices.ndim < 1 or indices.shape[:-1] != w.shape[: indices.ndim - 1]:
        raise ValueError(
            f"indices {indices.shape} and values {values.shape} for a weight of shape {w.shape}: expected equal shapes, "
            "the weight's stacked axes and then the entries"
        )
    return Sparse(w, indices, values)
