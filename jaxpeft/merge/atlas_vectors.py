"""Task vectors in the forms that `compose` takes: factors of LoRA fine-tuning, and those that fit into a budget of memory.

Letters: T task vectors, r a rank.
"""

import dataclasses
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from jaxpeft import trees
from jaxpeft.adapt.lora import scale_of
from jaxpeft.merge.stack import MergeInputError, widened
from jaxpeft.method import Delta, Method, Params, bake

__all__ = ["LowRank", "blocks_within", "is_low_rank", "lora_task_vectors"]


@jtu.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """T task vectors of one weight as factors, tau_i = a_i b_i.

    Attributes:
      a: (T, *stack, *inner, r).
      b: (T, *stack, r, *outer), the scale included.
    """

    a: Array
    b: Array

    def shape(self, ndim: int) -> tuple[int, ...]:
        """(T, *shape) of the vectors for a weight of so many axes."""
        stack = self.a.ndim + self.b.ndim - 4 - ndim
        return (*self.a.shape[:-1], *self.b.shape[stack + 2 :])

    def letters(self, ndim: int) -> tuple[str, str, str]:
        """Of the weight's axes: stacked, a's, b's."""
        stack = self.a.ndim + self.b.ndim - 4 - ndim
        axes = string.ascii_lowercase[:ndim]
        return axes[:stack], axes[stack : self.a.ndim - 2], axes[self.a.ndim - 2 :]


def is_low_rank(x: Any) -> bool:
    return isinstance(x, LowRank)


def lora_task_vectors(
    methods: Method | Sequence[Method], deltas: Sequence[Delta], params: Params
) -> dict[str, LowRank]:
    """Task vectors of LoRA fine-tuning, in factors: {path: LowRank}, for `compose`.

    Args:
      methods: `lora` of any ranks and places, or what bakes to it; one for all deltas or one each.
      deltas: T of them, trained from the same base. Lower ranks are filled with zeros, and so is a weight that a delta
        does not adapt.
      params: the base, or its shapes.

    Raises:
      MergeInputError: no deltas, another number of methods, or factors of different layouts at one place.
      ValueError: a method other than LoRA: its task vectors are those of its merged models.
    """
    methods = [methods] * len(deltas) if isinstance(methods, Method) else list(methods)
    if not deltas or len(methods) != len(deltas):
        raise MergeInputError(f"{len(methods)} methods for {len(deltas)} deltas: expected one for all or one each")
    simple = [bake(m, d) for m, d in zip(methods, deltas)]
    if other := [m.name for m, _ in simple if m.config["method"] != "lora"]:
        raise ValueError(f"a delta of {other[0]}: only those of lora are products; merge the models and subtract")
    leaves = trees.by_path(params)
    out = {}
    for path in dict.fromkeys(p for _, delta in simple for p in delta):
        if path not in leaves:
            raise MergeInputError(f"a delta adapts {path!r}, which the model lacks{trees.near(path, leaves)}")
        pairs = [_scaled(m, d, path, leaves[path].ndim) for m, d in simple]
        like = next(p for p in pairs if p is not None)
        out[path] = _stacked([(0 * like[0], 0 * like[1]) if p is None else p for p in pairs], path, leaves[path].ndim)
    return out


def _scaled(method: Method, delta: Delta, path: str, ndim: int) -> tuple[Array, Array] | None:
    """a, and b with the scale, which may be one number or one a stacked layer."""
    if path not in delta:
        return None
    a, b = delta[path]["a"], delta[path]["b"]
    scale = jnp.asarray(scale_of(method.config, path, a.shape[-1])).astype(trees.wide_dtype(b.dtype))
    return a, widened(b) * scale.reshape(*scale.shape, *(1,) * (b.ndim - scale.ndim) if scale.ndim else ())


def _stacked(pairs: Sequence[tuple[Array, Array]], path: str, ndim: int) -> LowRank:
    axis = pairs[0][0].ndim + pairs[0][1].ndim - 2 - ndim  # b's axis of the rank, behind the stacked layers
    layouts = {(a.shape[:-1], b.shape[:axis], b.shape[axis + 1 :]) for a, b in pairs}
    if len(layouts) > 1:
        shapes = "; ".join(f"a {a.shape}, b {b.shape}" for a, b in pairs)
        raise MergeInputError(f"factors of {path!r} that differ in more than the rank: {shapes}")
    rank = max(a.shape[-1] for a, _ in pairs)
    fill = lambda x, i: jnp.pad(x, [(0, rank - n if j == i % x.ndim else 0) for j, n in enumerate(x.shape)])
    return LowRank(jnp.stack([fill(a, -1) for a, _ in pairs]), jnp.stack([fill(b, axis) for _, b in pairs]))


def blocks_within(vectors: PyTree, budget: int, scores: Mapping[str, Any] | None = None) -> list[str]:
    """Blocks to adapt where memory is short: the best by score whose task vectors fit.

    Args:
      vectors: as for `compose`, or their shapes where `scores` are given.
      budget: bytes that the vectors may take.
      scores: {path: number}, the larger the earlier (the size of |dL/dlam| on a few batches, say); None is the mean
        square of the task vectors' entries. Read here: not under jit.

    Returns:
      Paths, in the order of `vectors`, for `at` of `init_lam` and to keep of `vectors`. A block that does not fit is
      passed over for smaller ones.

    Raises:
      ValueError: not even one block fits.
    """
    taus = trees.by_path(vectors, is_leaf=is_low_rank)
    size = {
        p: sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jtu.tree_leaves(t)) for p, t in taus.items()
    }
    if scores is None:
        square = lambda t: jnp.mean(jnp.square(widened(t)))
        scores = {p: square(t.a) * square(t.b) if isinstance(t, LowRank) else square(t) for p, t in taus.items()}
    left, taken = budget, set()
    for path in sorted(taus, key=lambda p: -float(scores[p])):
        if size[path] <= left:
            left -= size[path]
            taken.add(path)
    if not taken:
        raise ValueError(f"a budget of {budget} bytes: the smallest block takes {min(size.values())}")
    return [p for p in taus if p in taken]
