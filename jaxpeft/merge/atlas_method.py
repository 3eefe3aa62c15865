"""aTLAS (Zhang et al., NeurIPS 2024, arXiv:2407.02880) as a method of parameter-efficient fine-tuning: frozen task vectors
of other tasks, and for each of them one learned coefficient a weight.

    theta^(l) = theta0^(l) + sum_i lam_{i,l} tau_i^(l)        lam from 0, the base

Vectors that are products a_i b_i (LoRA fine-tuning) act as one of rank T r whose rows of b are scaled by lam: no weight is
formed. Dense ones are summed weight by weight. With factors the weights of two axes or more are adapted; which weights are
is a matter of memory, as `blocks_within` counts it. Groups (aTLAS x K) are left to `compose`.

Letters: T task vectors, r their rank.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Key, PyTree

from jaxpeft import trees
from jaxpeft.merge.atlas_vectors import LowRank, is_low_rank
from jaxpeft.merge.stack import MergeInputError, widened
from jaxpeft.method import Method, on_weights, register
from jaxpeft.roles import Role
from jaxpeft.weights import difference, low_rank

__all__ = ["anisotropic_scaling"]

AT = "**/attention/{query,value,qkv}/kernel"


@register(
    family="merge", paper="Zhang et al., NeurIPS 2024", mechanism="weights", mergeable=True, exact_start=True, rate=1e-1
)
def anisotropic_scaling(
    vectors: int | PyTree = 4,
    rank: int = 16,
    *,
    at: trees.Pattern | None = None,
    stacked: trees.Pattern | None = None,
    name: str = "anisotropic_scaling",
) -> Method:
    """Learns how much of each task vector every weight takes.

    The paper trains with AdamW and decay 0.1 (`adamw`), 1e-1 with a cosine; the target's own vector must be left out.

    Args:
      vectors: {path: LowRank} of `lora_task_vectors`, or a tree or {path: (T, *shape)} of `task_vectors`, in any
        floating-point dtype; a number draws so many random ones in factors (of shapes only: nothing is transferred).
      rank: of random ones.
      at: pattern of the leaves to adapt; None for all that have vectors, and for the attention's query and value where
        they are random. `blocks_within` chooses by memory.
      stacked: pattern of leaves with dense vectors whose first axis is of layers, which then have coefficients each; of
        factors it is known.
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is `{path: {"lam": (*stack, T), "a": (*stack, T, *inner, r), "b": (*stack, T, r, *outer)}}`, or
      "vectors" (*stack, T, ...) in the place of a and b; all but lam are fixed. It merges.

    Raises:
      ValueError: no vectors, a rank below one; at `init`, vectors of another shape than the weight.
      PatternError: nothing matches.
    """
    count = vectors if isinstance(vectors, int) else _count(vectors)
    if count < 1 or rank < 1:
        raise ValueError(f"rank {rank}, {count} task vectors: at least one of each")
    taus = {} if isinstance(vectors, int) else trees.by_path(vectors, is_leaf=is_low_rank)
    places = AT if not taus and at is None else list(taus) if at is None else at
    layered = set() if stacked is None else set(trees.matches(stacked, taus, "task vector"))

    def start(key: Key[Array, ""], path: str, w: Array, role: Role) -> dict[str, Any]:
        if taus and path not in taus:
            raise ValueError(f"no task vectors for {path!r}{trees.near(path, taus)}: narrow the pattern {at!r}")
        tau = taus[path] if taus else _random(key, w, role, count, rank)
        have = tau.shape(w.ndim) if isinstance(tau, LowRank) else jnp.shape(tau)
        if have != (count, *w.shape):
            raise MergeInputError(f"task vectors {have} of {path!r}: expected {(count, *w.shape)}")
        depth = len(tau.letters(w.ndim)[0]) if isinstance(tau, LowRank) else int(path in layered)
        parts = {"a": tau.a, "b": tau.b} if isinstance(tau, LowRank) else {"vectors": tau}
        fixed = {n: trees.Fixed(jnp.moveaxis(jnp.asarray(x), 0, depth)) for n, x in parts.items()}
        return {"lam": jnp.zeros((*w.shape[:depth], count)), **fixed}

    def build(path: str, w: Array, d: Mapping[str, Array], key: Key[Array, ""] | None) -> Any:
        depth = d["lam"].ndim - 1
        last = lambda x: d["lam"].astype(x.dtype).reshape(*d["lam"].shape, *(1,) * (x.ndim - d["lam"].ndim))
        if "vectors" in d:
            tau = widened(d["vectors"])
            return difference(widened(w), (last(tau) * tau).sum(depth)).astype(w.dtype)
        a, b = jnp.moveaxis(d["a"], depth, -2), d["b"] * last(d["b"])
        return low_rank(w, a.reshape(*a.shape[:-2], -1), b.reshape(*b.shape[:depth], -1, *b.shape[depth + 2 :]))

    config = dict(method="anisotropic_scaling", vectors=count, rank=rank, at=at, stacked=stacked, name=name)
    return on_weights(name, places, start, build, config, factored=not taus)


def _count(vectors: PyTree) -> int:
    sizes = {x.shape[0] for x in jtu.tree_leaves(vectors)}
    if len(sizes) != 1:
        raise ValueError(f"task vectors whose first axes have sizes {sorted(sizes)}: expected one number of them")
    return sizes.pop()


def _random(key: Key[Array, ""], w: Array, role: Role, count: int, rank: int) -> LowRank:
    s, i = w.shape[: role.stack], w.shape[role.stack : role.stack + role.inner]
    ka, kb = jax.random.split(key)
    a = jax.random.normal(ka, (count, *s, *i, rank)) / rank**0.5
    return LowRank(a, 0.1 * jax.random.normal(kb, (count, *s, rank, *w.shape[role.stack + role.inner :])))
