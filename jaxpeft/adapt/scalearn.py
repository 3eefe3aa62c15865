"""ScaLearn: Simple and Highly Parameter-Efficient Task Transfer by Learning to Scale (Frohmann et al., Findings of ACL
2024, arXiv:2310.01217), with AdapterFusion (Pfeiffer et al., EACL 2021, arXiv:2005.00247), which it is measured against.

T Pfeiffer adapters, each trained on a task of its own, are frozen; for a target only the scales of their outputs are
learned, without a softmax and without a sum to one:

    u_t = relu(h D_t + b_t) U_t + c_t,    h = LN(f + x)                f: the feed-forward output, x: its input
    out = LN(Σ_t w_t * u_t + f + x)

    ScaLearn          w (T, d) in each layer             ScaLearn++          one (T, d) for all layers
    ScaLearnUniform   w (T, 1) in each layer             ScaLearnUniform++   one (T, 1) for all

w ~ N(2/T, 0.001²) at the start; dropout acts on w itself, one mask a layer and step. Because u_t is linear in U_t, the T
adapters are one of width T r with U_t scaled by w_t: two products, and `bake` gives that adapter.

AdapterFusion attends over the T outputs: softmax_t(q k_t) with q = h W_q + b_q, k_t = u_t W_k + b_k and values u_t W_v;
no 1/sqrt(d); W_v starts as the identity with 1e-6 elsewhere.

Reference code: CPJKU/ScaLearn @81d77ea (adapter-transformers/.../adapters/modeling.py: ScaLearn, ScaLearnPlusPlus,
BertFusion; layer.py). Its flag that shares w over the layers is called `per_layer`.

Letters: T adapters, d width, r bottleneck, b batch, t positions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jaxpeft import trees
from jaxpeft.adapt.unified import ACTIVATIONS, sublayer
from jaxpeft.generated import generated
from jaxpeft.hooks import Hook, Site, Slots, on_hooks
from jaxpeft.method import Call, Delta, Method, register, site_key

__all__ = ["adapter_fusion", "combined", "fold", "scalearn"]

Sources = int | Sequence[PyTree]
Constraint = Literal["none", "mean", "softmax"]
AT = "**/mlp_norm"


def fold(adapters: Mapping[str, Array], scale: Float[Array, "*stack T d_or_1"]) -> dict[str, Array]:
    """T adapters, scaled, as one of width T r with the same output.

    Args:
      adapters: {"down" (*stack, T, d, r), "down_bias" (*stack, T, r), "up" (*stack, T, r, d), "up_bias" (*stack, T, d)}.
      scale: w.
    """
    down = jnp.moveaxis(adapters["down"], -3, -2)
    up = adapters["up"] * scale[..., None, :].astype(adapters["up"].dtype)
    return {
        "down": down.reshape(*down.shape[:-2], -1),
        "down_bias": adapters["down_bias"].reshape(*down.shape[:-3], -1),
        "up": up.reshape(*up.shape[:-3], -1, up.shape[-1]),
        "up_bias": (adapters["up_bias"] * scale.astype(adapters["up_bias"].dtype)).sum(-2),
    }


def combined(scale: Float[Array, "*stack T d"], constraint: Constraint) -> Float[Array, "*stack T d"]:
    """The scales as they act: as they are, divided by their sum over t, or their softmax over t."""
    if constraint == "mean":
        return scale / scale.sum(-2, keepdims=True)
    return jax.nn.softmax(scale, axis=-2) if constraint == "softmax" else scale


def _adapters(sources: Sources, rank: int, key: Key[Array, ""], call: Call, at: trees.Pattern, name: str) -> PyTree:
    """The sources' adapters, T on the axis behind the stacked layers': out of what runs save too, with a head beside."""
    one = sublayer("pfeiffer", rank, at=at, name=name)
    want = jax.eval_shape(lambda k: one.init(k, call), key)
    if isinstance(sources, int):
        stacked = jax.vmap(lambda k: one.init(k, call))(jax.random.split(key, sources))
    else:
        found = [s.get(name, s) for s in map(trees.unmark, sources)]
        shapes = [{p: x.shape for p, x in trees.by_path(s).items()} for s in found]
        if any(s != shapes[0] for s in shapes):
            raise ValueError(
                "the sources' adapters differ in their modules or sizes: they must be of one model and one rank"
            )
        stacked = trees.stack(found)
    _same_modules(stacked, want)
    behind = lambda d: {n: jnp.moveaxis(x, 0, d["up_bias"].ndim - 2) for n, x in d.items()}
    return {place: behind(d) for place, d in stacked.items()}


@register(
    family="adapt",
    paper="Frohmann et al., Findings of ACL 2024",
    mechanism="hooks",
    mergeable=False,
    exact_start=False,
    rate=6e-3,
)
def scalearn(
    sources: Sources = 4,
    rank: int = 16,
    *,
    uniform: bool = False,
    share_layers: bool = False,
    constraint: Constraint = "none",
    dropout: float | None = None,
    init_scale: float = 2.0,
    train: bool = True,
    at: trees.Pattern = AT,
    source: str = "pfeiffer",
    name: str = "scalearn",
) -> Method:
    """Learned scales over frozen Pfeiffer adapters; see the module for the equations and the four variants.

    Args:
      sources: T deltas of `pfeiffer(rank)`, or of chains in which it is called `source`, the target's own last; a number
        draws so many random ones (of shapes only: nothing is transferred).
      rank: r, of every source.
      uniform: one number an adapter instead of d.
      share_layers: the same scales in all layers.
      constraint: "mean" or "softmax", the paper's ablations.
      dropout: of the scales, where `apply` is given a `dropout_key`; None is 0.3, and 0 for ScaLearnUniform++.
      init_scale: what the scales of an entry sum to at the start; 1 is the average of the adapters.
      train: False holds the scales fixed at exactly `init_scale` / T.
      at: pattern of the norms after the feed-forward networks.
      source: see `sources`.
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is `{"scale": {module path or "all": (*stack, T, d)}, "adapters": {module path: {...}}}`, the
      adapters fixed. It does not merge; it bakes into one Pfeiffer adapter of width T r.

    Raises:
      ValueError: no sources, an option out of range; at `init`, sources that differ or are of another model.
      PatternError: no module matches.
    """
    count = sources if isinstance(sources, int) else len(sources)
    if count < 1 or rank < 1:
        raise ValueError(f"rank {rank}, {count} sources: there is at least one adapter, at least 1 wide")
    if constraint not in ("none", "mean", "softmax"):
        raise ValueError(f"constraint {constraint!r}: expected 'none', 'mean' or 'softmax'")
    rate = (0.0 if uniform and share_layers else 0.3) if dropout is None else dropout
    if not 0 <= rate < 1:
        raise ValueError(f"dropout {rate}: expected a probability in [0, 1)")
    inner = sublayer("pfeiffer", rank * count, at=at, name=name)

    def init(key: Key[Array, ""], shapes: PyTree, call: Call) -> Delta:
        adapters = _adapters(sources, rank, site_key(key, "sources"), call, at, source)
        scales: dict[str, Array] = {}
        for place, d in adapters.items():
            *stack, t, width = d["up_bias"].shape
            lead = (1,) * len(stack) if share_layers else tuple(stack)
            axes, label = (*lead, t, 1 if uniform else width), "all" if share_layers else place
            noise = 1e-3 * jax.random.normal(site_key(key, label), axes) if train else jnp.zeros(axes)
            if scales.setdefault(label, init_scale / count + noise).shape != axes:
                raise ValueError("share_layers needs layers of one width, all stacked or none")
        fix = lambda tree: jax.tree.map(trees.Fixed, tree)
        return {"scale": scales if train else fix(scales), "adapters": fix(adapters)}

    def emit(delta: Delta, task: Any, key: Any) -> Delta:
        def scale_of(place: str, d: Mapping[str, Array]) -> Array:
            w = combined(delta["scale"]["all" if share_layers else place], constraint)
            w = jnp.broadcast_to(w, (*d["up_bias"].shape[:-1], w.shape[-1]))
            if key is None or not rate:
                return w
            keep = jax.random.bernoulli(site_key(key, place), 1 - rate, w.shape)
            return jnp.where(keep, w / (1 - rate), 0.0)

        return {place: fold(d, scale_of(place, d)) for place, d in delta["adapters"].items()}

    config = dict(
        method="scalearn",
        sources=count,
        rank=rank,
        uniform=uniform,
        share_layers=share_layers,
        constraint=constraint,
        dropout=dropout,
        init_scale=init_scale,
        train=train,
        at=at,
        source=source,
        name=name,
    )
    return generated(inner, init, emit, config, name=name)


def _same_modules(adapters: PyTree, want: PyTree) -> None:
    """Raises ValueError where the sources' adapters are not those of this model."""
    ours = {p: s.shape for p, s in trees.by_path(want).items()}
    theirs = {p: x.shape[1:] for p, x in trees.by_path(adapters).items()}
    if wrong := [p for p in {**ours, **theirs} if ours.get(p) != theirs.get(p)]:
        raise ValueError(
            f"the sources have {theirs.get(wrong[0], 'nothing')} at {wrong[0]!r}, where this model's adapters have "
            f"{ours.get(wrong[0], 'nothing')} ({len(wrong)} of {len(ours)} arrays differ)"
        )


@register(
    family="adapt", paper="Pfeiffer et al., EACL 2021", mechanism="hooks", mergeable=False, exact_start=False, rate=1e-3
)
def adapter_fusion(
    sources: Sources = 4,
    rank: int = 16,
    *,
    dropout: float = 0.0,
    at: trees.Pattern = AT,
    source: str = "pfeiffer",
    name: str = "adapter_fusion",
) -> Method:
    """AdapterFusion: attention over the outputs of frozen Pfeiffer adapters; see the module.

    The paper adds 0.01 |W_v - I|² to the loss: `value_regulariser`.

    Args:
      sources, rank, at, source, name: as in `scalearn`.
      dropout: of the attention's logits, where `apply` is given a `dropout_key`.

    Returns:
      A method on hooks, delta `{module path: {"query", "key", "value" (d, d), "query_bias", "key_bias" (d,)}}` beside the
      fixed adapters `{"down" (*stack, T, d, r), ...}`. It does not merge.

    Raises:
      ValueError, PatternError: as `scalearn`.
    """
    count = sources if isinstance(sources, int) else len(sources)
    if count < 1 or rank < 1:
        raise ValueError(f"rank {rank}, {count} sources: there is at least one adapter, at least 1 wide")
    normal = lambda key, shape, dtype: 0.02 * jax.random.normal(key, shape, dtype)
    zeros = lambda key, shape, dtype: jnp.zeros(shape, dtype)
    identity = lambda key, shape, dtype: jnp.where(jnp.eye(shape[0], dtype=bool), 1.0, 1e-6).astype(dtype)

    def around(site: Site, call: Any, z: Float[Array, "b t d"], *args: Any, **kwargs: Any) -> Array:
        d, dtype = z.shape[-1], z.dtype
        h = call(z, *args, **kwargs)
        p = {
            n: site.param(n, shape, None).astype(dtype)
            for n, shape in (
                ("down", (count, d, rank)),
                ("down_bias", (count, rank)),
                ("up", (count, rank, d)),
                ("up_bias", (count, d)),
            )
        }
        row = lambda x: x[:, None, None]
        wide = ACTIVATIONS["relu"](jnp.einsum("btd,Tdr->Tbtr", h, p["down"]) + row(p["down_bias"]))
        u = jnp.einsum("Tbtr,Trd->Tbtd", wide, p["up"]) + row(p["up_bias"])
        q = h @ site.param("query", (d, d), normal).astype(dtype) + site.param("query_bias", (d,), zeros).astype(dtype)
        k = u @ site.param("key", (d, d), normal).astype(dtype) + site.param("key_bias", (d,), zeros).astype(dtype)
        logits = site.dropout(jnp.einsum("btd,Tbtd->Tbt", q, k), dropout)
        share = jax.nn.softmax(logits.astype(jnp.float32), axis=0).astype(dtype)
        mixed = jnp.einsum("Tbt,Tbtd->btd", share, u) @ site.param("value", (d, d), identity).astype(dtype)
        return call(z + mixed, *args, **kwargs)

    def start(key: Key[Array, ""], slots: Slots, call: Call) -> Delta:
        adapters = _adapters(sources, rank, site_key(key, "sources"), call, at, source)
        out: dict[str, Any] = {}
        for place, named in slots.items():
            drawn = {n: s.start(site_key(key, f"{place}/{n}")) for n, s in named.items() if s.init is not None}
            out[place] = {**jax.tree.map(trees.Fixed, adapters[place]), **drawn}
        return out

    config = dict(method="adapter_fusion", sources=count, rank=rank, dropout=dropout, at=at, source=source, name=name)
    return on_hooks(name, [Hook(at, around)], config, init=start)


def value_regulariser(delta: Delta) -> Array:
    """Σ |W_v - I|² over the layers of an `adapter_fusion` delta; the paper adds 0.01 times this to the loss."""
    every = [x for p, x in trees.by_path(delta).items() if p.endswith("/value")]
    return sum((jnp.square(w - jnp.eye(w.shape[-1], dtype=w.dtype)).sum() for w in every), jnp.zeros(()))
