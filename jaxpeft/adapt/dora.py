"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., ICML 2024, arXiv:2402.09353).

A weight is split into the length of each column and its direction; the direction gets a low-rank update, the lengths m
are learned as they are (eq. 5):

    W' = m * (W + s A B) / |W + s A B|_column,    m = |W|_column at the start, B = 0, s = alpha / r

The norm is a constant to the gradient (section 4.3); it is computed through the factors, so that W + s A B is never
formed. Columns run over the inner axes of a weight, per output.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxpeft import trees
from jaxpeft.adapt.lora import AT, Init, check_lora, check_rank, factors, scale_of
from jaxpeft.method import Method, on_weights, register, stacked_keys
from jaxpeft.roles import Role
from jaxpeft.weights import dora as value
from jaxpeft.weights.factored import Factored

__all__ = ["dora"]


@register(
    family="adapt", paper="Liu et al., ICML 2024", mechanism="weights", mergeable=True, exact_start=True, rate=2e-3
)
def dora(
    rank: int = 8,
    alpha: Any = None,
    at: trees.Pattern = AT,
    *,
    scaling: str = "standard",
    dropout: Any = 0.0,
    init: Init = "kaiming",
    rank_pattern: Any = None,
    alpha_pattern: Any = None,
    name: str = "dora",
) -> Method:
    """DoRA on the weights that `at` chooses.

    Args are those of `lora`.

    Returns:
      A method whose delta is `{path: {"a", "b", "magnitude"}}`, magnitude of shape (*stack, *outer). It merges, and at
      its start the adapted model equals the base (to rounding: m / |W| is one).

    Raises:
      ValueError, PatternError: as `lora`.
    """
    check_lora(rank, dropout, scaling, init)
    rules = dict(rank=rank, alpha=alpha, scaling=scaling, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)

    def start(key: Key[Array, ""], path: str, w: Array, role: Role) -> dict[str, Array]:
        r = check_rank(rules, path, w, role)
        inner = tuple(range(role.stack, sum(role)))
        length = jnp.sqrt(jnp.sum(jnp.square(w.astype(trees.wide_dtype(w.dtype))), axis=inner))
        return {**factors(key, w, role, r, init), "magnitude": length}

    def build(path: str, w: Array, d: dict[str, Array], key: Key[Array, ""] | None) -> Factored:
        stack = w.shape[: d["a"].ndim + d["b"].ndim - 2 - w.ndim]
        keys = None if key is None else stacked_keys(key, stack)
        scale = scale_of(rules, path, d["a"].shape[-1])
        return value(w, d["a"], d["b"], d["magnitude"], scale, key=keys, dropout=dropout)

    return on_weights(
        name, at, start, build, dict(method="dora", name=name, at=at, dropout=dropout, init=init, **rules)
    )
