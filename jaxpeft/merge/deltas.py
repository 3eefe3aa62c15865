"""Merging deltas rather than models: LoRA deltas summed exactly, in factors; others by way of the weights that they
change.

    sum_i c_i s_i A_i B_i = s [A_1 ... A_n] [c_1 s_1/s B_1; ...; c_n s_n/s B_n],      s = s_1

The ranks add up and nothing dense is formed. All of c_i and of differing scales stands in B, sign and all, so that
negative coefficients subtract and one delta at coefficient 1 comes back as it was.

Letters: n deltas, r a rank; a weight's axes are (*stack, *inner, *outer).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpeft import trees
from jaxpeft.adapt.lora import lora, scale_of
from jaxpeft.merge.stack import MergeInputError, widened
from jaxpeft.method import Delta, MergeError, Method, Params, bake

__all__ = ["merge_adapted", "merge_deltas"]


def merge_deltas(
    methods: Method | Sequence[Method], deltas: Sequence[Delta], params: Params, *, weights: Any = 1.0
) -> tuple[Method, Delta]:
    """LoRA deltas as one, whose effect is the weighted sum of theirs.

    Args:
      methods: what the deltas were made by, one for all or one each: `lora` of any ranks, scales and places, or what
        `bake`s to it. Those for several tasks are baked by the caller first.
      deltas: n of them.
      params: the base, or its shapes.
      weights: (n,), or a number for all; negative ones subtract. May be traced.

    Returns:
      `(method, delta)`: a `lora` of the ranks' sum at every weight that any of them adapts, and its delta. The ranks
        may exceed a
      weight's smaller side: the sum is exact all the same. Its dropout is the deltas' where it is the same for all,
      else 0.

    Raises:
      MergeInputError: no deltas, another number of methods, factors of different layouts at one place.
      ValueError: a method other than LoRA: `merge_adapted` merges those through the weights.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft
      >>> apply_fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((4, 3))}
      >>> one = jaxpeft.adapt(apply_fn, jaxpeft.lora(rank=2, at="w", init="gaussian"))
      >>> delta = jax.tree.map(jnp.ones_like, one.init(jax.random.key(0), params, jnp.ones((1, 4))))
      >>> method, total = merge_deltas(one.method, [delta, delta], params, weights=[1.0, -1.0])
      >>> total["w"]["a"].shape, jaxpeft.adapt(apply_fn, method).merge(params, total)["w"][0].tolist()
      ((4, 4), [1.0, 1.0, 1.0])
    """
    if not deltas:
        raise MergeInputError("no deltas: a sum needs at least one")
    methods = [methods] * len(deltas) if isinstance(methods, Method) else list(methods)
    if len(methods) != len(deltas):
        raise MergeInputError(f"{len(methods)} methods for {len(deltas)} deltas: expected one for all or one each")
    if jnp.ndim(weights) > 1 or (jnp.ndim(weights) == 1 and jnp.shape(weights)[0] != len(deltas)):
        raise MergeInputError(f"weights of shape {jnp.shape(weights)} for {len(deltas)} deltas: expected one each")
    simple = [bake(m, d) for m, d in zip(methods, deltas)]
    for method, _ in simple:
        if method.config["method"] != "lora":
            raise ValueError(
                f"a delta of {method.name}: only those of lora are summed in factors; `merge_adapted` merges any that "
                "have a merge through the weights that they change"
            )
    coefficients = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), (len(deltas),))
    leaves = trees.by_path(params)
    configs = [m.config for m, _ in simple]
    if len(simple) == 1:
        method, delta = simple[0]
        return method, {p: _weighted(d, coefficients[0], 1.0, d, leaves[p].ndim) for p, d in delta.items()}

    summed, ranks, alphas = {}, {}, {}
    for path in dict.fromkeys(p for _, delta in simple for p in delta):
        if path not in leaves:
            raise MergeInputError(f"a delta adapts {path!r}, which the model lacks{trees.near(path, leaves)}")
        have = [i for i, (_, delta) in enumerate(simple) if path in delta]
        factors = [simple[i][1][path] for i in have]
        axis = _rank_axis(factors[0], leaves[path].ndim)
        layouts = {(f["a"].shape[:-1], *(n for j, n in enumerate(f["b"].shape) if j != axis)) for f in factors}
        if len(layouts) > 1:
            shapes = "; ".join(f"delta {i}: a {f['a'].shape}, b {f['b'].shape}" for i, f in zip(have, factors))
            raise MergeInputError(f"factors of {path!r} that differ in more than the rank: {shapes}")
        scales = [scale_of(configs[i], path, f["a"].shape[-1]) for i, f in zip(have, factors)]
        parts = [
            _weighted(f, coefficients[i], s / scales[0], factors[0], leaves[path].ndim)
            for i, f, s in zip(have, factors, scales)
        ]
        summed[path] = {
            "a": jnp.concatenate([f["a"] for f in parts], axis=-1),
            "b": jnp.concatenate([f["b"] for f in parts], axis=axis),
        }
        ranks[path] = summed[path]["a"].shape[-1]
        alphas[path] = scales[0] * ranks[path]
    first = configs[0]
    dropout = (
        first["dropout"]
        if all(c["dropout"] is first["dropout"] or c["dropout"] == first["dropout"] for c in configs)
        else 0.0
    )
    method = lora(
        rank=max(ranks.values(), default=1),
        at=list(summed),
        dropout=dropout,
        init=first["init"],
        rank_pattern=ranks,
        alpha_pattern=alphas,
        name=first["name"],
    )
    return method, summed


def _rank_axis(d: Mapping[str, Array], ndim: int) -> int:
    """Where b has its rank: behind the stacked layers, of which there are a.ndim + b.ndim - 2 - w.ndim."""
    return d["a"].ndim + d["b"].ndim - 2 - ndim


def _weighted(
    d: Mapping[str, Array], weight: Array, ratio: Any, like: Mapping[str, Array], ndim: int
) -> dict[str, Array]:
    """The factors with b multiplied by weight * ratio, in the dtypes of `like`."""
    dtype, wide = like["b"].dtype, trees.wide_dtype(d["b"].dtype)
    ratio = jnp.asarray(ratio).astype(wide)  # one number, or one a stacked layer
    by = weight.astype(wide) * ratio.reshape(*ratio.shape, *(1,) * (d["b"].ndim - ratio.ndim) if ratio.ndim else ())
    return {"a": d["a"].astype(like["a"].dtype), "b": (d["b"].astype(wide) * by).astype(dtype)}


def merge_adapted(
    merge: Callable[..., Params],
    params: Params,
    methods: Method | Sequence[Method],
    deltas: Sequence[Delta],
    **hyper: Any,
) -> Params:
    """Merges adapted models by any merge, through those of their weights that any delta changes.

    For merges that are no sums (`ties`, `breadcrumbs`, `dare`). The changed weights of all models are formed, in
    float32, and nothing else.

    Args:
      merge: `(base, models, **hyper) -> params`. It sees `{path: weight}` of the changed leaves: what counts entries of
        the "global" model counts these.
      params: the base.
      methods: one for all or one each, that merge; those for several tasks are baked by the caller first.
      deltas: n of them.
      **hyper: what `merge` takes.

    Returns:
      Whole parameters.

    Raises:
      MergeInputError: no deltas, another number of methods, or deltas that change nothing.
      MergeError: a method without a merge.
    """
    if not deltas:
        raise MergeInputError("no deltas: a merge needs at least one")
    methods = [methods] * len(deltas) if isinstance(methods, Method) else list(methods)
    if len(methods) != len(deltas):
        raise MergeInputError(f"{len(methods)} methods for {len(deltas)} deltas: expected one for all or one each")
    wide = jax.tree.map(lambda x: widened(x) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x, params)
    before, models = trees.by_path(wide), []
    for method, delta in zip(methods, deltas):
        simple, own = bake(method, delta)
        if simple.merge is None:
            raise MergeError(
                f"{simple.name} has no merge: no weights express its effect, so that there is nothing to merge"
            )
        models.append(trees.by_path(simple.merge(wide, own)))
    # A merge hands on the very leaves that it does not change.
    changed = [p for p, x in before.items() if any(m[p] is not x for m in models)]
    if not changed:
        raise MergeInputError("the deltas change no weight of the model")
    leaves = trees.by_path(params)
    new = merge({p: before[p] for p in changed}, [{p: m[p] for p in changed} for m in models], **hyper)
    return trees.replace_leaves(params, {p: x.astype(leaves[p].dtype) for p, x in new.items()})
