"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al., ICLR 2024, arXiv:2310.11454).

LoRA whose two matrices are drawn once, frozen, and shared by all weights; what a weight learns is two vectors that scale the
columns of either (rows are inputs here):

    h = x W + Dropout(x) A diag(d) B diag(b),    A (inner, r) and B (r, outer) frozen,  d (r,) and b (outer,) learned
    A = the first rows of one (largest inner, r), B the first columns of one (r, largest outer), both U(±sqrt(6 / fan in))
    d = 0.1 and b = 0 at the start: the adapted model starts as its base

A weight learns r + outer numbers, so ranks are large, also larger than the weight's sides.

Reference code: the `peft` package (tuners/vera, 0.21.2), from which equations and defaults are taken; the paper itself was not
at hand. Its draws come from torch's generator, ours from the key. The frozen matrices are in the delta as fixed leaves, so
that its file holds all that it takes (`save_projection` there). In code, "a" and "b" of `shared` are the matrices, "d" and "b"
of `vectors` the vectors.

Letters: r rank; a weight's axes are (*stack, *inner, *outer).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jaxpeft import trees
from jaxpeft.adapt.lora import AT, lora
from jaxpeft.generated import generated
from jaxpeft.method import Call, Delta, Method, register, site_key

__all__ = ["vera"]


def scaled(
    shared: Mapping[str, Float[Array, "..."]], d: Float[Array, "*stack r"], b: Float[Array, "..."]
) -> dict[str, Array]:
    """LoRA's factors A diag(d), (*stack, *inner, r), and B diag(b), (*stack, r, *outer)."""
    stack, inner = d.shape[:-1], shared["a"].ndim - 1
    return {
        "a": shared["a"] * d.reshape(*stack, *(1,) * inner, d.shape[-1]),
        "b": shared["b"] * jnp.expand_dims(b, len(stack)),
    }


@register(
    family="adapt", paper="Kopiczko et al., ICLR 2024", mechanism="weights", mergeable=True, exact_start=True, rate=1e-2
)
def vera(
    rank: int = 256,
    at: trees.Pattern = AT,
    *,
    start: float = 0.1,
    dropout: Any = 0.0,
    name: str = "vera",
) -> Method:
    """VeRA on the weights that `at` chooses; see the module for the equations.

    Args:
      rank: r, at least 1; it may be larger than a weight's sides.
      at: pattern of weights: kernels of any layout, embeddings, convolutions, stacked layers.
      start: every entry of d at the start; `peft` recommends 0.1 or less.
      dropout: as in `lora`.
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is `{"shared": {sizes: {"a": (*inner, r), "b": (r, *outer)}}, "vectors": {sizes: {path: {"d":
      (*stack, r), "b": (*stack, *outer)}}}}`, `sizes` being a weight's, as "384 to 384"; the shared half is fixed. It merges
      and bakes into a LoRA of rank r with scale 1.

    Raises:
      ValueError: a rank below 1, dropout outside [0, 1).
      PatternError: nothing matches `at`.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: a rank is at least 1")
    # LoRA refuses ranks over a weight's side; here they are no waste. Of its start, the shapes alone are used.
    inner = lora(rank, float(rank), at, dropout=dropout)._replace(init=lora(1, at=at).init)

    def init(key: Key[Array, ""], shapes: PyTree, call: Call) -> Delta:
        weights = trees.by_path(call.params)
        stack = {p: s["a"].ndim + s["b"].ndim - 2 - weights[p].ndim for p, s in shapes.items()}
        sides = {p: (s["a"].shape[stack[p] : -1], s["b"].shape[stack[p] + 1 :]) for p, s in shapes.items()}
        rows, columns = (max(math.prod(x[i]) for x in sides.values()) for i in (0, 1))
        dtype = next(iter(shapes.values()))["a"].dtype
        draw = lambda label, shape, fan: jax.random.uniform(
            site_key(key, label), shape, dtype, -math.sqrt(6 / fan), math.sqrt(6 / fan)
        )
        a, b = draw("a", (rows, rank), rows), draw("b", (rank, columns), rank)
        shared: dict[str, Any] = {}
        vectors: dict[str, Any] = {}
        for path, (i, o) in sides.items():
            sizes = " to ".join("x".join(map(str, side)) for side in (i, o))
            shared[sizes] = {
                "a": trees.Fixed(a[: math.prod(i)].reshape(*i, rank)),
                "b": trees.Fixed(b[:, : math.prod(o)].reshape(rank, *o)),
            }
            lead = shapes[path]["a"].shape[: stack[path]]
            own = {"d": jnp.full((*lead, rank), start, dtype), "b": jnp.zeros((*lead, *o), dtype)}
            vectors.setdefault(sizes, {})[path] = own
        return {"shared": shared, "vectors": vectors}

    def emit(delta: Delta, task: Any, key: Any) -> Delta:
        return {
            path: scaled(delta["shared"][sizes], **own)
            for sizes, paths in delta["vectors"].items()
            for path, own in paths.items()
        }

    config = dict(method="vera", rank=rank, at=at, start=start, dropout=dropout, name=name)
    return generated(inner, init, emit, config, name=name)
