"""Structural pruning: a transformer's blocks cut to a fraction of every width, as a start for a thin copy.

From LST (Sung et al., NeurIPS 2022; reference code ylsung/Ladder-Side-Tuning @1798e82, pruning_methods.py,
`pruning_v2`). The backbone is walked in the order of execution with one running set `keep` of indices, in increasing
order, of n - round(n (1 - 1/r)) = n / r out of n:

    word table (or patches)   keep := top columns by the sum over rows of |I|
    norms                     entries `keep`
    query, key, value         inputs `keep`; outputs ranked by sum |I_q I_k I_v| over the kept inputs; keep := the top
    out, up, down             inputs `keep`; outputs ranked by the sum of |I|; keep := the top

Outputs of query, key and value are ranked over all heads together and cut into heads anew; residual streams are not
kept consistent from layer to layer; a decoder's walk goes on with the set that its encoder left. All of it is the
reference's doing. Added here: biases, which T5 does not have, are cut with the outputs of their kernel; `gate` and `up`
of a gated block are ranked by their product, as query, key and value are; post-norm blocks are walked in their order.

Letters: d width, r reduction, n inputs of a product, m its outputs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxpeft.method import Params

__all__ = ["backbone_of", "prune_products", "structural_prune"]


def top(score: Float[Array, "m"], reduction: int) -> Int[Array, "k"]:
    """Indices of the largest scores, increasing; of equal ones the first. k = m - round(m (1 - 1/r))."""
    k = score.shape[0] - round(score.shape[0] * (1 - 1 / reduction))
    return jnp.sort(jnp.argsort(-score, stable=True)[:k])


def prune_products(
    modules: Sequence[Mapping[str, Array]],
    importances: Sequence[Mapping[str, Array]],
    keep: Int[Array, "k"],
    reduction: int,
) -> tuple[list[dict[str, Array]], Int[Array, "j"]]:
    """Cuts products that read the same inputs, and whose outputs meet elementwise, to the same outputs.

    Args:
      modules: {"kernel": (n, m), "bias": (m,)} each; the bias may be absent.
      importances: of the same structure; only those of kernels count.
      keep: the inputs that are left.
      reduction: r.

    Returns:
      The cut modules, and which outputs are left: `keep` for what follows.
    """
    if len({m["kernel"].shape for m in modules}) > 1:
        raise ValueError(
            f"kernels of shapes {[m['kernel'].shape for m in modules]} cannot be ranked together (fewer key than query "
            "heads?): initialise with init='random'"
        )
    score = math.prod([i["kernel"][keep] for i in importances], start=jnp.ones((), importances[0]["kernel"].dtype))
    kept = top(jnp.abs(score).sum(0), reduction)
    cut = [{n: x[keep][:, kept] if n == "kernel" else x[kept] for n, x in m.items()} for m in modules]
    return cut, kept


def structural_prune(params: Params, importance: PyTree, reduction: int, *, pre_norm: bool = True) -> dict[str, Any]:
    """A backbone's blocks cut to 1/r of every width; see the module for the walk. A function of arrays: jit it.

    Args:
      params: a backbone of ours: {"embeddings", "layers_0", ..., "final_norm"}, or {"embeddings", "encoder", "decoder"}
        with layers in each. Layers may be stacked ("layers").
      importance: I, of the same structure.
      reduction: r, which divides all widths; 1 gives back what was there.
      pre_norm: where the blocks have their norms.

    Returns:
      The tree without its embeddings, layers unstacked, every width over r; relative positions are copied whole.
    """
    table, ranked = _embedding(params["embeddings"]), _embedding(importance["embeddings"])
    assert table.shape == ranked.shape
    keep = top(jnp.abs(ranked).sum(tuple(range(ranked.ndim - 1))), reduction)
    towers = [n for n in ("encoder", "decoder") if n in params]
    out: dict[str, Any] = {}
    for name in towers or [""]:
        tower, ranks = (params[name], importance[name]) if name else (params, importance)
        cut: dict[str, Any] = {n: tower[n] for n in ("relative_bias",) if n in tower}
        for i, (layer, rank) in enumerate(zip(_layers(tower), _layers(ranks), strict=True)):
            cut[f"layers_{i}"], keep = _prune_block(layer, rank, keep, reduction, pre_norm)
        if "final_norm" in tower:
            cut["final_norm"] = {n: x[keep] for n, x in tower["final_norm"].items()}
        out |= {name: cut} if name else cut
    return out


def _prune_block(layer: Any, rank: Any, keep: Array, reduction: int, pre_norm: bool) -> tuple[dict[str, Any], Array]:
    out: dict[str, Any] = {}
    for part in ("attention", "cross_attention", "mlp"):
        if part not in layer:
            continue
        norm = {f"{part}_norm": layer[f"{part}_norm"]} if f"{part}_norm" in layer else {}
        if pre_norm:
            out |= jax.tree.map(lambda x: x[keep], norm)
        groups = [["up", "gate"], ["down"]] if part == "mlp" else [["query", "key", "value"], ["out"]]
        module, ranks = _separate(layer[part]), _separate(rank[part])
        cut: dict[str, Any] = {}
        for group in groups:
            names = [n for n in group if n in module]
            new, keep = prune_products([module[n] for n in names], [ranks[n] for n in names], keep, reduction)
            cut |= dict(zip(names, new))
        if not pre_norm:
            out |= jax.tree.map(lambda x: x[keep], norm)
        out[part] = _joined(cut) if "qkv" in layer[part] else cut
    return out, keep


def _separate(module: Mapping[str, Any]) -> Mapping[str, Any]:
    """An attention with query, key and value apart."""
    if "qkv" not in module:
        return module
    parts = {n: jnp.split(x, 3, axis=-1) for n, x in module["qkv"].items()}
    own = {name: {n: x[i] for n, x in parts.items()} for i, name in enumerate(("query", "key", "value"))}
    return {**own, "out": module["out"]}


def _joined(module: Mapping[str, Any]) -> dict[str, Any]:
    parts = [module[n] for n in ("query", "key", "value")]
    return {"qkv": {n: jnp.concatenate([p[n] for p in parts], axis=-1) for n in parts[0]}, "out": module["out"]}


def _embedding(embeddings: Mapping[str, Any]) -> Float[Array, "*n d"]:
    for path in (("word", "embedding"), ("patch", "kernel")):
        if path[0] in embeddings:
            return embeddings[path[0]][path[1]]
    raise ValueError(f"embeddings with {sorted(embeddings)} have no word table and no patches to rank by")


def _layers(tower: Mapping[str, Any]) -> list[Any]:
    if "layers" in tower:
        stacked = tower["layers"]
        return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(jax.tree.leaves(stacked)[0].shape[0])]
    return [tower[f"layers_{i}"] for i in range(sum(n.startswith("layers_") for n in tower))]


def backbone_of(params: Params) -> Mapping[str, Any]:
    """The part of `params` that holds the embeddings and the layers.

    Raises:
      ValueError: there is none, or more than one.
    """
    found: list[Mapping[str, Any]] = []

    def visit(tree: Any) -> None:
        if not isinstance(tree, Mapping):
            return
        stacks = [n for n in tree if n == "layers" or n.startswith("layers_")]
        if "embeddings" in tree and (stacks or {"encoder", "decoder"} <= set(tree)):
            found.append(tree)
            return
        for child in tree.values():
            visit(child)

    visit(params)
    if len(found) != 1:
        raise ValueError(
            f"structural pruning found {len(found)} backbones (embeddings beside layers_0, ...) in the parameters, and "
            "needs one, laid out as in jaxpeft.models: initialise with init='random'"
        )
    return found[0]
