"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., ICLR 2022, arXiv:2106.09685).

A frozen weight W becomes W + s A B with A (inner, r) and B (r, outer), eq. 3 (A and B change places here: rows are
inputs). Only A and B are learned; B starts at zero, so the adapted model starts as its base; the sum merges exactly.

    h = x W + s Dropout(x) A B,    s = alpha / r,  or alpha / sqrt(r) for rsLoRA (Kalajdzievski, 2023, arXiv:2312.03732)

The reference code (microsoft/LoRA; the `peft` package, whose files we read and write) initialises A like a linear
layer, U(-1/sqrt(inner), 1/sqrt(inner)); the paper's text says Gaussian, which is `init="gaussian"` (std 1/r, as in
`peft`).

Shape letters: r rank; a weight's axes are (*stack, *inner, *outer).
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key

from jaxpeft import trees
from jaxpeft.method import Method, on_weights, register, stacked_keys
from jaxpeft.roles import Role
from jaxpeft.weights import low_rank
from jaxpeft.weights.factored import Factored

__all__ = ["lora"]

AT = "**/attention/{query,value,qkv}/kernel"

Init = Literal["kaiming", "gaussian", "zeros"]


def factors(
    key: Key[Array, ""], w: Array, role: Role, rank: int, init: Init = "kaiming", dtype: Any = None
) -> dict[str, Float[Array, "..."]]:
    """The two factors at the start: `a` random, (*stack, *inner, r); `b` zero, (*stack, r, *outer)."""
    stack, inner, outer = w.shape[: role.stack], w.shape[role.stack : sum(role)], w.shape[sum(role) :]
    dtype = dtype or trees.wide_dtype(w.dtype)

    def one(key: Key[Array, ""]) -> Array:
        if init == "gaussian":
            return jax.random.normal(key, (*inner, rank), dtype) / rank
        if init == "zeros":
            return jnp.zeros((*inner, rank), dtype)
        bound = 1 / math.sqrt(np.prod(inner))
        return jax.random.uniform(key, (*inner, rank), dtype, -bound, bound)

    for _ in stack:
        one = jax.vmap(one)
    return {"a": one(stacked_keys(key, stack)), "b": jnp.zeros((*stack, rank, *outer), dtype)}


def check_rank(rules: Mapping[str, Any], path: str, w: Array, role: Role) -> int:
    """The rank at `path` by the rules; raises ValueError where it is not in 1..min(inner, outer) of the weight."""
    rank = first_match(rules["rank_pattern"], path, rules["rank"])
    inner, outer = math.prod(w.shape[role.stack : sum(role)]), math.prod(w.shape[sum(role) :])
    if not 1 <= rank <= min(inner, outer):
        raise ValueError(
            f"rank {rank} for {path!r}, a {inner} x {outer} matrix: a rank is at least 1 and at most {min(inner, outer)}"
        )
    return rank


def scale_of(rules: Mapping[str, Any], path: str, rank: int) -> Any:
    """alpha / r at `path`, or alpha / sqrt(r) for rsLoRA; alpha is 2 * rank where nothing says otherwise."""
    alpha = 2 * rules["rank"] if rules["alpha"] is None else rules["alpha"]
    alpha = first_match(rules["alpha_pattern"], path, alpha)
    # A list comes from a config that was written as JSON: one number per stacked layer.
    alpha = jnp.asarray(alpha) if isinstance(alpha, list) else alpha
    return alpha / (math.sqrt(rank) if rules["scaling"] == "rslora" else rank)


def check_lora(rank: int, dropout: Any, scaling: str, init: str) -> None:
    """Raises ValueError for what no model could make right."""
    if not isinstance(rank, int | np.integer) or rank < 1:
        raise ValueError(f"rank {rank!r}: a rank is at least 1, and a whole number")
    if not isinstance(dropout, Tracer) and not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}: expected a probability in [0, 1)")
    if scaling not in ("standard", "rslora"):
        raise ValueError(f"scaling {scaling!r}: expected 'standard' or 'rslora'")
    if init not in ("kaiming", "gaussian", "zeros"):
        raise ValueError(f"init {init!r}: expected 'kaiming', 'gaussian' or 'zeros'")


def first_match(rules: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    """The value of the first pattern of `rules` that matches `path`."""
    for pattern, value in (rules or {}).items():
        if trees.is_match(pattern, path):
            return value
    return otherwise


@register(
    family="adapt", paper="Hu et al., ICLR 2022", mechanism="weights", mergeable=True, exact_start=True, rate=2e-3
)
def lora(
    rank: int = 8,
    alpha: Any = None,
    at: trees.Pattern = AT,
    *,
    scaling: Literal["standard", "rslora"] = "standard",
    dropout: Any = 0.0,
    init: Init = "kaiming",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, Any] | None = None,
    name: str = "lora",
) -> Method:
    """LoRA on the weights that `at` chooses; see the module for the equations.

    Args:
      rank: r, 1 to the smaller side of every chosen weight.
      alpha: the numerator of the scale; `2 * rank` where None. May be an array (traced, vmapped in a sweep).
      at: pattern of weights: kernels of any layout, embeddings, convolutions, stacked layers.
      scaling: "standard" (alpha / r) or "rslora" (alpha / sqrt(r)).
      dropout: probability of dropping an input of A; acts where `apply` is given a `dropout_key`. May be an array, as
        `alpha`.
      init: of A: "kaiming" (the reference code), "gaussian" (the paper's text), "zeros".
      rank_pattern, alpha_pattern: exceptions by pattern; the first that matches a path counts.
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is `{path: {"a": (*stack, *inner, r), "b": (*stack, r, *outer)}}`. It merges, and at its start
      the adapted model equals the base.

    Raises:
      ValueError: a rank below 1 or over a matrix, dropout outside [0, 1), an unknown scaling or init.
      PatternError: nothing matches `at`.
    """
    check_lora(rank, dropout, scaling, init)
    rules = dict(rank=rank, alpha=alpha, scaling=scaling, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)

    def start(key: Key[Array, ""], path: str, w: Array, role: Role) -> dict[str, Array]:
        return factors(key, w, role, check_rank(rules, path, w, role), init)

    def build(path: str, w: Array, d: dict[str, Array], key: Key[Array, ""] | None) -> Factored:
        stack = w.shape[: d["a"].ndim + d["b"].ndim - 2 - w.ndim]
        keys = None if key is None else stacked_keys(key, stack)
        return low_rank(w, d["a"], d["b"], scale_of(rules, path, d["a"].shape[-1]), key=keys, dropout=dropout)

    return on_weights(
        name, at, start, build, dict(method="lora", name=name, at=at, dropout=dropout, init=init, **rules)
    )
