"""MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards (Wang et al., ICLR 2025,
arXiv:2410.00938).

All layers' weights of one kind (all query projections, say) draw the vectors of their A and B from one common pool each.
A vector is l shards in a row; which ones, is drawn at random once and never learned.

    pools     A_pool (n, i/l), B_pool (n, o/l), n = e L l:  the budget of a LoRA of rank e in each of L layers
    rows      0 .. n_pub - 1 are public, n_pub = (e - p) L l; of the rest, p l belong to each layer alone
    indices   layer's list = (r - p) l public rows without replacement, then its own private ones; A and B drawn apart
    A[j] = [A_pool[list[j l]], ..., A_pool[list[j l + l - 1]]],  j < r;  B alike
    y = x W + (alpha / r) Dropout(x) A' B                  r may be several times e

A_pool starts as U(±1/sqrt(i)), B_pool at zero. p = e = r, l = 1 is LoRA in each layer. What keeps layers apart: subsets
(`subset=False`: every layer uses the whole pool, "pure sharing"), pair dissociation (`dissociate=False`: one list for A
and B), sharding (l = 1), privatisation (p = 0).

Reference code: Forence1999/MoS @cafb8dd (modules/Tied_LoRA.py is MoS; chunkwise_sharing_LoRA.py is its baseline PRoLoRA).
Its anti-vector of ones, left over from an experiment, is left out.

Letters: L layers, i inputs and o outputs of a weight, r rank, e equivalent rank, p private rank, l shards a vector.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxpeft import trees
from jaxpeft.adapt.lora import AT, lora
from jaxpeft.generated import generated
from jaxpeft.method import Call, Delta, Method, register, site_key

__all__ = ["assemble", "indices", "mos"]


def indices(
    key: Key[Array, ""], layers: int, e: int, r: int, p: int, shards: int, *, subset: bool = True
) -> Int[Array, "L r*l"]:
    """Which rows of a pool each layer's vectors are made of; without `subset` all of them, in the same order.

    Raises:
      ValueError: sizes that leave fewer public shards than a layer needs.
    """
    if not subset:
        return jnp.broadcast_to(jnp.arange(e * layers * shards), (layers, e * layers * shards))
    public, wanted = (e - p) * layers * shards, (r - p) * shards
    if wanted > public:
        raise ValueError(
            f"rank {r} with private rank {p} needs {wanted} public shards, and the pool of equivalent rank {e} over "
            f"{layers} layers has {public}: raise e or lower the rank"
        )
    drawn = jax.vmap(lambda k: jax.random.permutation(k, public)[:wanted])(jax.random.split(key, layers))
    own = public + jnp.arange(layers * p * shards).reshape(layers, p * shards)
    return jnp.concatenate([drawn, own], axis=1)


def assemble(pool: Float[Array, "n d"], rows: Int[Array, "*L r*l"], rank: int) -> Float[Array, "*L r l*d"]:
    """The vectors that the lists of rows make."""
    return pool[rows].reshape(*rows.shape[:-1], rank, -1)


def _kind(path: str) -> str:
    """What pools a weight draws from: its path without the numbers of layers."""
    return "/".join("layers" if s.startswith("layers") else s for s in path.split("/"))


@register(
    family="adapt", paper="Wang et al., ICLR 2025", mechanism="weights", mergeable=True, exact_start=True, rate=4e-3
)
def mos(
    rank: int = 8,
    equivalent: int = 2,
    private: int = 1,
    shards: int = 2,
    alpha: Any = 16.0,
    at: trees.Pattern = AT,
    *,
    dissociate: bool = True,
    subset: bool = True,
    dropout: Any = 0.0,
    name: str = "mos",
) -> Method:
    """Mixture of shards; see the module for the equations.

    Args:
      rank: r, of the assembled LoRA.
      equivalent: e, at most r: the method has the parameters of a LoRA of rank e.
      private: p, 0 to e: vectors that a layer shares with no other.
      shards: l, which divides every chosen weight's inputs and outputs.
      alpha: numerator of the scale alpha / r. May be an array.
      at: pattern of two-dimensional weights, stacked or not.
      dissociate: A and B have lists of their own.
      subset: layers draw subsets of the pool; else each uses all of it (then `rank` must be e times the layers, and
        `private` 0).
      dropout: as in `lora`.
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is `{"pools": {kind: {"a": (n, i/l), "b": (n, o/l)}}, "indices": {path: {"a": (*stack, r l),
      "b"}}}`, the indices fixed. It merges and bakes into a LoRA of rank r, and starts as its base.

    Raises:
      ValueError: sizes out of range, a weight that l does not divide, more public vectors wanted than there are.
      PatternError: nothing matches `at`.
    """
    if not 1 <= equivalent <= max(rank, 0) or not 0 <= private <= equivalent or shards < 1:
        raise ValueError(
            f"rank {rank}, equivalent {equivalent}, private {private}, shards {shards}: expected private <= equivalent <= "
            "rank, the last two and the shards at least 1"
        )
    if not subset and private:
        raise ValueError(
            f"private {private} with subset=False: a layer that uses the whole pool has nothing of its own"
        )
    inner = lora(rank, alpha, at, dropout=dropout, name=name)

    def init(key: Key[Array, ""], shapes: PyTree, call: Call) -> Delta:
        kinds: dict[str, list[str]] = {}
        for path, d in shapes.items():
            stack = d["a"].ndim - 2
            if d["b"].ndim != stack + 2 or d["a"].shape[-2] % shards or d["b"].shape[-1] % shards:
                raise ValueError(
                    f"{path!r} takes {d['a'].shape[stack:-1]} to {d['b'].shape[stack + 1 :]}: mos needs matrices whose sides "
                    f"{shards} shards divide"
                )
            kinds.setdefault(_kind(path), []).append(path)
        pools: dict[str, Any] = {}
        lists: dict[str, Any] = {}
        for kind, paths in kinds.items():
            k = site_key(key, kind)
            stacks = {p: shapes[p]["a"].shape[:-2] for p in paths}
            layers = sum(math.prod(s) for s in stacks.values())
            if not subset and rank != equivalent * layers:
                raise ValueError(
                    f"rank {rank} with subset=False: {layers} layers of equivalent rank {equivalent} share "
                    f"{equivalent * layers} vectors; take that rank"
                )
            sides = {(shapes[p]["a"].shape[-2], shapes[p]["b"].shape[-1]) for p in paths}
            if len(sides) > 1:
                raise ValueError(f"weights of one kind, {kind!r}, have sizes {sorted(sides)}: they cannot share a pool")
            d, n = shapes[paths[0]], equivalent * layers * shards
            i, o, dtype = d["a"].shape[-2], d["b"].shape[-1], d["a"].dtype
            bound = i**-0.5
            pools[kind] = {
                "a": jax.random.uniform(site_key(k, "a"), (n, i // shards), dtype, -bound, bound),
                "b": jnp.zeros((n, o // shards), dtype),
            }
            drawn = {
                side: indices(site_key(k, f"{side} rows"), layers, equivalent, rank, private, shards, subset=subset)
                for side in ("a", "b")
            }
            if not dissociate:
                drawn["b"] = drawn["a"]
            first = 0
            for path in paths:
                count = math.prod(stacks[path])
                lists[path] = {
                    side: trees.Fixed(rows[first : first + count].reshape(*stacks[path], -1))
                    for side, rows in drawn.items()
                }
                first += count
        return {"pools": pools, "indices": lists}

    def emit(delta: Delta, task: Any, key: Any) -> Delta:
        def one(path: str, rows: Mapping[str, Array]) -> dict[str, Array]:
            pool = delta["pools"][_kind(path)]
            a = assemble(pool["a"], rows["a"], rank)
            return {"a": jnp.swapaxes(a, -1, -2), "b": assemble(pool["b"], rows["b"], rank)}

        return {path: one(path, rows) for path, rows in delta["indices"].items()}

    config = dict(
        method="mos",
        rank=rank,
        equivalent=equivalent,
        private=private,
        shards=shards,
        alpha=alpha,
        at=at,
        dissociate=dissociate,
        subset=subset,
        dropout=dropout,
        name=name,
    )
    return generated(inner, init, emit, config, name=name)
