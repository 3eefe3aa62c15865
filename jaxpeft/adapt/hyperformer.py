"""Hyperformer: Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks (Karimi Mahabadi et
al., ACL 2021, arXiv:2106.04489), as compared in VL-Adapter (Sung et al., CVPR 2022, arXiv:2112.06825).

A hypernetwork makes the adapters of `vl_adapter` from embeddings of the task t and the layer m:

    z = LN(W_2 relu(W_1 [e_t; l_m] + c_1) + c_2)            W_1 (2 e, h), W_2 (h, p), eps 1e-6
    X = G_X z + g_X                                          for each array X of the adapters after each kind of module

e_t is the model's, l_m and the two maps are each tower's (encoder, decoder), and each kind of module (attention, cross
attention, feed-forward) has heads of its own for D (d, r), c (r,), U (r, d) and e (d,), which all layers and tasks share.
Hyperformer++ (`efficient=True`) has one set of heads for all kinds, and z knows the kind: [e_t; l_m; s_kind]. Where widths
differ between stages, heads and layers are each stage's: a head makes arrays of one size.

Embeddings ~ N(0, 1), all maps N(0, 0.01²), biases 0. VL-Adapter's BART overwrites the maps' and the layers' start with
N(0, 0.02²) (`std=0.02, layer_std=0.02`) and takes p = 8, the default here (Hyperformer: 64). LN over a z of one number
would be its bias alone, so p is at least 2.

Reference code: ylsung/VL_adapter @545fcbb (VL-T5/src/adapters/adapter_hypernetwork.py). Its heads emit torch's (out, in).

Letters: T tasks, e embedding, h hidden, p of z, d width, r bottleneck.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jaxpeft import trees
from jaxpeft.adapt.vl_adapter import AT, adapters, checked_sharing
from jaxpeft.generated import generated
from jaxpeft.hyper import Place, head, head_start, normal, places, trunk, trunk_start
from jaxpeft.method import Call, Delta, Method, register, site_key

__all__ = ["generate", "hyperformer"]


def hidden_code(
    delta: Delta, place: Place, task: Float[Array, "e"], *, efficient: bool = False
) -> Float[Array, "*stack p"]:
    """z of a module, for a task's embedding."""
    given = [task, delta["layer"][place.layer]["embedding"]]
    if efficient:
        given.append(delta["part"][place.base][place.part]["embedding"])
    return trunk(delta["trunk"][place.tower], *given)


def generate(delta: Delta, task: Any, *, efficient: bool = False) -> Delta:
    """The plain adapters of one task, `{module path: {"down" (*stack, d, r), ...}}`."""
    own = jnp.take(delta["task"], task, axis=0, mode="clip")
    out = {}
    for layer in delta["layer"]:
        base = Place(layer, "").base
        for part in (delta["part"] if efficient else delta["heads"])[base]:
            place = Place(layer, part)
            z = hidden_code(delta, place, own, efficient=efficient)
            heads = delta["heads"][base] if efficient else delta["heads"][base][part]
            out[place.path] = {n: head(p, z) for n, p in heads.items()}
    return out


def _sizes(shapes: PyTree, found: Mapping[str, Place], efficient: bool) -> dict[str, dict[str, Any]]:
    """Base -> part -> name -> the shape that a head emits.

    Raises:
      ValueError: modules that cannot share heads.
    """
    out: dict[str, dict[str, Any]] = {}
    parts: dict[str, set[str]] = {}
    for path, named in shapes.items():
        place, stack = found[path], named["down"].ndim - 2
        own = {n: s.shape[stack:] for n, s in named.items()}
        alike = out.setdefault(place.base, {})
        other = next(iter(alike.values()), own) if efficient else alike.get(place.part, own)
        if other != own:
            raise ValueError(
                f"{path!r} is adapted by {own['down']}, others with the same heads by {other['down']}, and a head makes arrays "
                f"of one size: narrow the pattern{', or take efficient=False' if efficient else ''}"
            )
        alike[place.part] = own
        parts.setdefault(place.layer, set()).add(place.part)
    for layer, own_parts in parts.items():
        if missing := set(out[Place(layer, "").base]) - own_parts:
            raise ValueError(
                f"{sorted(missing)} of {layer!r} is not adapted, in layers like it it is: layers that share heads are adapted "
                "alike; change the pattern"
            )
    return out


@register(
    family="adapt",
    paper="Karimi Mahabadi et al., ACL 2021",
    mechanism="hooks",
    mergeable=False,
    exact_start=False,
    rate=1e-3,
)
def hyperformer(
    rank: int | None = None,
    tasks: int = 1,
    *,
    embedding: int = 512,
    hidden: int = 128,
    projected: int = 8,
    efficient: bool = False,
    std: Any = 0.01,
    layer_std: Any = 1.0,
    reduction: int = 8,
    norm: Literal["none", "in", "out"] = "none",
    at: trees.Pattern = AT,
    name: str = "hyperformer",
) -> Method:
    """Adapters that a shared hypernetwork makes; see the module for the equations.

    Args:
      rank: r, at least 1; None for d / `reduction`.
      tasks: T; `apply` takes `task=` where there are several.
      embedding, hidden, projected: e, h and p.
      efficient: Hyperformer++.
      std: standard deviation of the maps' start. May be an array.
      layer_std: that of the embeddings of layers and kinds. May be an array.
      reduction: the reduction factor.
      norm: a layer norm on the adapters' input or output, which the hypernetwork makes too.
      at: pattern of modules whose output is adapted.
      name: the key of its delta in a chain.

    Returns:
      A method on hooks, delta `{"task": (T, e), "layer": {layer: {"embedding": (*stack, e)}}, "trunk": {tower: {...}},
      "heads": {base: {part: {name: {"weight": (p, *shape), "bias": shape}}}}}` (`hyper.Place` has these words); where
      efficient one set of heads a base, and "part": {base: {part: {"embedding": (e,)}}}. It does not merge; it bakes into
      a task's plain adapters.

    Raises:
      ValueError: a size below 1 (`projected`: 2); modules that cannot share a head.
      PatternError: no module matches.
    """
    checked_sharing(tasks, "single")
    if embedding < 1 or hidden < 1 or projected < 2:
        raise ValueError(
            f"embedding {embedding}, hidden {hidden}, projected {projected}: expected at least 1, 1 and 2 (over one number "
            "the norm leaves nothing)"
        )
    inner = adapters(rank, reduction, at, norm=norm, name=name)

    def start(key: Key[Array, ""], shapes: PyTree, call: Call) -> Delta:
        found = places(shapes)
        drawn = lambda label, shape, by: {"embedding": by * jax.random.normal(site_key(key, label), shape)}
        start = lambda label, shape: head_start(site_key(key, label), projected, shape, normal(std))
        heads: dict[str, Any] = {}
        parts: dict[str, Any] = {}
        for base, own in _sizes(shapes, found, efficient).items():
            parts[base] = {part: drawn(f"{base}/{part}", (embedding,), layer_std) for part in own}
            made = {part: {n: start(f"{base}/{part}/{n}", s) for n, s in named.items()} for part, named in own.items()}
            heads[base] = next(iter(made.values())) if efficient else made
        layers = {
            place.layer: drawn(place.layer, (*shapes[path]["down"].shape[:-2], embedding), layer_std)
            for path, place in found.items()
        }
        width = (3 if efficient else 2) * embedding
        trunks = {
            tower: trunk_start(site_key(key, f"{tower}/trunk"), width, hidden, projected, normal(std))
            for tower in dict.fromkeys(place.tower for place in found.values())
        }
        known = {"task": drawn("task", (tasks, embedding), 1.0)["embedding"], "layer": layers, "trunk": trunks}
        return known | {"heads": heads} | ({"part": parts} if efficient else {})

    def emit(delta: Delta, task: Any, key: Any) -> Delta:
        return generate(delta, task, efficient=efficient)

    config = dict(
        method="hyperformer",
        rank=rank,
        tasks=tasks,
        embedding=embedding,
        hidden=hidden,
        projected=projected,
        efficient=efficient,
        std=std,
        layer_std=layer_std,
        reduction=reduction,
        norm=norm,
        at=at,
        name=name,
    )
    return generated(inner, start, emit, config, name=name, tasks=tasks)
