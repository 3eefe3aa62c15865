"""Ranks as traced numbers: LoRA or DoRA of rank r inside arrays of a larger rank R, so that ranks share one program.

With columns a[:, r:] = 0 and rows b[r:, :] = 0 the product A B has rank r, and nothing has to hold them there: the
gradient of either is a product with the other,

    dL/da[:, r:] = s xᵀ g b[r:, :]ᵀ = 0,    dL/db[r:, :] = s a[:, r:]ᵀ xᵀ g = 0,

so every optimiser that leaves a value at zero where value and gradient have always been zero (SGD, Adam, AdamW with its
decay, Lion, clipping by norm; not added noise) keeps them. B starts at zero as a whole, hence only A is masked, once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Int, Key

from jaxpeft import trees
from jaxpeft.method import Call, Delta, Method, Params, from_config

__all__ = ["RANKED", "trim_rank", "with_rank"]

RANKED = ("lora", "dora")
"""The methods whose scale divides alpha by the rank, and whose ranks can be padded and traced."""


def with_rank(method: Method, rank: Int[Array, ""] | int) -> Method:
    """`method`, a LoRA or DoRA of rank R, as one of rank `rank` in arrays of the same shapes.

    Its scale is that of its own rank: alpha / r, or alpha / sqrt(r); alpha is 2 r where the method was given none. The
    first r columns of A start as those of the rank-R method (Gaussian ones with the standard deviation 1 / r).

    Args:
      method: from `lora` or `dora`, without `rank_pattern`.
      rank: 1..R; may be traced, so that a sweep over ranks is one program.

    Returns:
      A method with the delta of `method`; `trim_rank` takes the zeros out when it is trained.

    Raises:
      ValueError: another method, a `rank_pattern`, a rank outside 1..R (where it is known at trace time).

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft
      >>> params = {"w": jnp.ones((4, 4))}
      >>> def start(rank):
      ...     method = jaxpeft.with_rank(jaxpeft.lora(rank=3, at="w"), rank)
      ...     return jaxpeft.adapt(lambda p, x: x @ p["w"], method).init(jax.random.key(0), params, jnp.ones((1, 4)))
      >>> jnp.count_nonzero(jax.vmap(start)(jnp.array([1, 3]))["w"]["a"], axis=(1, 2)).tolist()
      [4, 12]
    """
    config = dict(method.config)
    if config["method"] not in RANKED:
        raise ValueError(
            f"with_rank is for {' and '.join(RANKED)}; this is {config['method']!r}, whose sizes are static"
        )
    if config["rank_pattern"]:
        raise ValueError(
            f"with_rank sets one rank for all weights; this method has rank_pattern={config['rank_pattern']}"
        )
    largest = config["rank"]
    if not isinstance(rank, Tracer) and not 1 <= rank <= largest:
        raise ValueError(
            f"rank {rank}: expected 1 to {largest}, the rank of the method; give it the largest rank of all"
        )
    r = jnp.asarray(rank).astype(jnp.float32)
    # The method divides alpha by its R (or sqrt(R)); r is what it should divide by.
    ratio = jnp.sqrt(largest / r) if config["scaling"] == "rslora" else largest / r

    def scaled(alpha: Any) -> Array:
        return jnp.asarray(alpha, jnp.float32) * ratio

    config["alpha"] = scaled(2 * r if config["alpha"] is None else config["alpha"])
    config["alpha_pattern"] = {k: scaled(v) for k, v in (config["alpha_pattern"] or {}).items()} or None
    same = from_config(config)

    def init(key: Key[Array, ""], call: Call) -> Delta:
        gain = jnp.where(
            jnp.arange(largest, dtype=r.dtype) < r, largest / r if config["init"] == "gaussian" else 1.0, 0.0
        )
        delta = same.init(key, call)
        return {p: {**d, "a": d["a"] * gain.astype(d["a"].dtype)} for p, d in delta.items()}

    return same._replace(init=init)


def trim_rank(delta: Delta, params: Params, rank: int) -> Delta:
    """The delta of `lora(rank)` that equals a delta of `with_rank(..., rank)`: the zero columns and rows cut off.

    Args:
      delta: `{path: {"a": (*stack, *inner, R), "b": (*stack, R, *outer), ...}}`.
      params: the base.
      rank: static, 1..R.

    Raises:
      ValueError: a rank outside 1..R.
    """
    leaves = trees.by_path(params)

    def cut(path: str, d: dict[str, Array]) -> dict[str, Array]:
        a, b = d["a"], d["b"]
        if not 1 <= rank <= a.shape[-1]:
            raise ValueError(f"rank {rank} of {path!r}: the delta's arrays are of rank {a.shape[-1]}")
        at = a.ndim + b.ndim - 2 - leaves[path].ndim  # b's axes begin with the stacked layers
        return {**d, "a": a[..., :rank], "b": jax.lax.slice_in_dim(b, 0, rank, axis=at)}

    return {p: cut(p, d) for p, d in delta.items()}
