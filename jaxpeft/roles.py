"""What each axis of a weight is for, observed rather than guessed.

A kernel of shape (3, 8, 8) may be three stacked layers, a 1-D convolution, or three heads; only its use tells. The model
is traced once on shapes with a probe in the weight's place, which notes how it is multiplied.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from jaxpeft import trees
from jaxpeft.interpret import lift
from jaxpeft.weights.array_like import Dims
from jaxpeft.weights.factored import STATIC, Factor, Factored, Term, names


class Role(NamedTuple):
    """The axes of a weight: `stack` leading ones are layers or experts, the next `inner` go with `a`, the rest with `b`."""

    stack: int
    inner: int


class RoleError(ValueError):
    """A weight whose use does not tell its axes apart."""


@jtu.register_dataclass
@dataclass(frozen=True)
class _Probe(Factored):
    note: Callable[[set[str], set[str]], None] = dataclasses.field(metadata=STATIC, default=lambda *_: None)

    def _noted(self, contracted: set[str], batched: set[str]) -> None:
        self.note(contracted, set("".join(self.axes)) - batched)

    def dot(self, x: Array, contract: tuple[Dims, Dims], batch: tuple[Dims, Dims], **options: Any) -> Any:
        self._noted({c for i in contract[1] for c in self.axes[i]}, {c for i in batch[1] for c in self.axes[i]})
        return super().dot(x, contract, batch, **options)

    def conv(self, x: Array, params: dict[str, Any]) -> Any:
        out = params["dimension_numbers"].rhs_spec[0]
        self._noted({c for i, g in enumerate(self.axes) if i != out for c in g}, set())
        return super().conv(x, params)

    def ragged_dot(self, x: Array, group_sizes: Array, params: dict[str, Any]) -> Any:
        self._noted(set(self.axes[1]), set(self.axes[0]))
        return super().ragged_dot(x, group_sizes, params)

    def take(self, axis: int, look_up: Callable[[Array, int], Array]) -> Any:
        self._noted(set(self.axes[axis]), set())
        return super().take(axis, look_up)

    def _split(self, letter: str, new: str, outer: int) -> "Factored":
        # Both halves stand for the letter that was split: nobody adapts half an axis.
        parent = dataclasses.replace(
            self, note=lambda c, p: self.note(_joined(c, letter, new), _joined(p, letter, new))
        )
        return super(_Probe, parent)._split(letter, new, outer)


def _joined(found: set[str], letter: str, halves: str) -> set[str]:
    return {letter if c in halves else c for c in found}


def roles(
    apply_fn: Callable[..., Any], params: PyTree, paths: Sequence[str], inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Role]:
    """The role of every weight in `paths`.

    Two-dimensional weights are (inner, outer) without looking; the model is traced only where there are others.

    Raises:
      RoleError: a weight of three axes or more that no product, convolution or look-up of this call uses.
    """
    leaves = trees.by_path(params)
    found = {p: Role(0, 1) for p in paths if leaves[p].ndim == 2}
    others = [p for p in paths if p not in found]
    if not others:
        return found
    uses: dict[str, list[tuple[set[str], set[str]]]] = {p: [] for p in others}

    def probe(path: str) -> _Probe:
        w, axes = leaves[path], names(leaves[path].ndim)
        seen = uses[path]
        return _Probe((Term((Factor(w, axes),)),), (), tuple(axes), note=lambda c, p: seen.append((c, p)))

    probed = trees.replace_leaves(params, {p: probe(p) for p in others})
    jax.eval_shape(lambda p, *x: lift(apply_fn, "allow")(p, *x, **kwargs), probed, *inputs)
    return found | {p: _role(p, names(leaves[p].ndim), uses[p]) for p in others}


def _role(path: str, axes: str, uses: list[tuple[set[str], set[str]]]) -> Role:
    if not uses:
        raise RoleError(f"no product uses {path!r} in this call, so the roles of its {len(axes)} axes cannot be told")
    contracted, present = uses[0]
    stack = "".join(c for c in axes if c not in present)
    rest = axes[len(stack) :]
    inner = "".join(c for c in rest if c in contracted)
    if not axes.startswith(stack) or not inner or inner == rest:
        raise RoleError(
            f"{path!r}: axes {stack or 'none'} of {axes} are stacked and {inner} summed: no factoring is known"
        )
    if rest.startswith(inner):
        return Role(len(stack), len(inner))
    if rest.endswith(inner):
        return Role(len(stack), len(rest) - len(inner))
    # The summed axes stand in the middle (heads, width, head width): each leading slice gets factors of its own.
    return Role(len(stack) + rest.index(inner[0]), len(inner))
