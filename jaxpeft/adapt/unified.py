"""The unified view of parameter-efficient transfer: He et al., Towards a Unified View of Parameter-Efficient Transfer
Learning, ICLR 2022, arXiv:2110.04366.

Every method computes a change dh of one hidden state h = S(x) of a frozen sub-layer S and composes it with h. A `Design`
says how, along the paper's dimensions (table 1): functional form x insertion x modified site x composition.

    bottleneck       dh = act(z W_d + b_d) W_u + b_u                             z = x (parallel) or h (sequential)
    linear           dh = z W_d W_u
    softmax_prefix   dh = softmax(q P_k^T / sqrt(d_h)) P_v   for each head
    relu_prefix      dh = relu(q P_k^T) P_v                  for each head (multi-head parallel adapter)

    add      h + dh          scaled   h + s dh (s multiplies the bias b_u too)
    gated    (1 - g(x)) h + g(x) dh,  g = softmax mass of the prefix: attention over the prefix joined to the context

Reference code: jxhe/unify-parameter-efficient-tuning @3222ce2 (petl/petl_factory.py, the BART and RoBERTa models). Two
of its choices are options here: in pre-norm blocks it lets a parallel adapter read the residual stream before the
sub-layer's norm (`reads="residual"`), and it puts a parallel adapter at attention before the output projection, a
sequential one after it (done here likewise).

Letters: b batch, t queries, k keys, h heads, e head width, d model width, r bottleneck (or prefix length l).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpeft import trees
from jaxpeft.hooks import Hook, Site, on_hooks
from jaxpeft.method import Method, register

__all__ = ["DESIGNS", "Design", "compose", "parameters", "prefix_attention", "sublayer"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class Design:
    """One row of the design table; see the module.

    Attributes:
      form: how dh is computed.
      insertion: what it is computed from: the sub-layer's input or its output.
      site: which hidden state changes.
      composition: how dh joins it.
      norm: a trainable layer norm on the adapter's input, on its output, or none.
      reads: for parallel ones, the sub-layer's input or the residual stream before the sub-layer's norm.
      init: "bert": both projections N(0, 0.02²), dh starts small; "lora": W_u = 0, dh starts at zero.
      scale: s; None learns it, from 1.
      activation: of the bottleneck.
      biases: whether the bottleneck has b_d and b_u.
    """

    form: Literal["bottleneck", "linear", "softmax_prefix", "relu_prefix"] = "bottleneck"
    insertion: Literal["sequential", "parallel"] = "sequential"
    site: Literal["attention", "head", "ffn", "ffn_norm", "query", "value", "ffn_up", "ffn_down"] = "ffn"
    composition: Literal["add", "scaled", "gated"] = "add"
    norm: Literal["none", "in", "out"] = "none"
    reads: Literal["input", "residual"] = "input"
    init: Literal["bert", "lora"] = "bert"
    scale: float | None = 1.0
    activation: str = "relu"
    biases: bool = True

    def __post_init__(self) -> None:
        prefix = self.form.endswith("_prefix")
        if prefix != (self.site == "head"):
            raise ValueError(f"form {self.form!r} at site {self.site!r}: prefix forms, and only they, act at 'head'")
        if prefix and self.insertion != "parallel":
            raise ValueError(f"form {self.form!r} reads the query: it is parallel, not {self.insertion!r}")
        if self.composition == "gated" and self.form != "softmax_prefix":
            raise ValueError(f"composition 'gated' needs the form 'softmax_prefix', not {self.form!r}")
        if self.site == "ffn_norm" and self.insertion != "sequential":
            raise ValueError("site 'ffn_norm' (the norm that follows the feed-forward network) is sequential")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r}: expected one of {sorted(ACTIVATIONS)}")


DESIGNS: dict[str, tuple[Design, ...]] = {
    # The paper's table 1, then its new combinations. Several designs are one method with several sites.
    "prefix_tuning": (Design("softmax_prefix", "parallel", "head", "gated"),),
    "houlsby": (Design(site="attention", norm="in"), Design(site="ffn")),
    "pfeiffer": (Design(site="ffn_norm"),),
    "lora_projections": (
        Design("linear", "parallel", "query", "scaled", init="lora", biases=False),
        Design("linear", "parallel", "value", "scaled", init="lora", biases=False),
    ),
    "parallel_adapter": (Design(insertion="parallel"),),
    "parallel_attention_adapter": (Design(insertion="parallel", site="attention", norm="in"),),
    "sequential_attention_adapter": (Design(site="attention", norm="in"),),
    "multi_head_parallel_adapter": (Design("relu_prefix", "parallel", "head", norm="in", biases=False),),
    "prefix_without_gating": (Design("softmax_prefix", "parallel", "head", norm="in"),),
    "scaled_parallel_adapter": (Design(insertion="parallel", composition="scaled", init="lora", scale=4.0),),
}


def parameters(design: Design, d: int, r: int, *, wide: int | None = None) -> int:
    """Parameters per sub-layer without biases and norms: 2rd; a linear adapter at one d -> d' projection r (d + d')."""
    return r * (d + (wide or d))


# ------------------------------------------------------------------------------------------------- forms, composition


def _normal(std: float) -> Any:
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def _kaiming(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _zeros(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    return jnp.zeros(shape, dtype)


def _ones(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    return jnp.ones(shape, dtype)


def _norm(site: Site, name: str, z: Float[Array, "*b d"], eps: float = 1e-5) -> Float[Array, "*b d"]:
    gain, shift = site.param(f"{name}_scale", (z.shape[-1],), _ones), site.param(f"{name}_bias", (z.shape[-1],), _zeros)
    wide = z.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return (
        centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps) * _row(gain, z) + _row(shift, z)
    ).astype(z.dtype)


def bottleneck(
    site: Site, design: Design, z: Float[Array, "*b d"], width: int, r: int, dropout: float = 0.0
) -> Float[Array, "*b width"]:
    """A(z) of the module's table, with the parameters of `site`; not yet scaled."""
    d, dtype = z.shape[-1], z.dtype
    small = _normal(0.02)
    z = _norm(site, "norm", z) if design.norm == "in" else z
    h = z @ site.param("down", (d, r), small if design.init == "bert" else _kaiming).astype(dtype)
    if design.biases:
        h = h + _row(site.param("down_bias", (r,), _zeros).astype(dtype), h)
    if design.form == "bottleneck":
        h = ACTIVATIONS[design.activation](h)
    y = site.dropout(h, dropout) @ site.param("up", (r, width), small if design.init == "bert" else _zeros).astype(
        dtype
    )
    return y + _row(site.param("up_bias", (width,), _zeros).astype(dtype), y) if design.biases else y


def _row(x: Array, like: Array) -> Array:
    """A vector along the last axis of `like`, with axes of size one before it: ranks are never promoted in silence."""
    return x.reshape((1,) * (like.ndim - 1) + x.shape)


def prefix_attention(
    q: Float[Array, "b t h e"], keys: Float[Array, "l g e"], values: Float[Array, "l g e"], form: str = "softmax_prefix"
) -> Float[Array, "b t h e"]:
    """Attention of queries over a prefix alone: dh of "softmax_prefix" and "relu_prefix" (which has no 1/sqrt(e)).

    `g` key heads serve `h` query heads in groups.
    """
    groups = q.shape[2] // keys.shape[1]
    keys, values = (jnp.repeat(x, groups, axis=1) if groups > 1 else x for x in (keys, values))
    logits = jnp.einsum("bthe,lhe->bhtl", q, keys.astype(q.dtype))
    if form == "relu_prefix":
        weights = jax.nn.relu(logits)
    else:
        weights = jax.nn.softmax(logits.astype(jnp.float32) / math.sqrt(q.shape[-1]), axis=-1).astype(q.dtype)
    return jnp.einsum("bhtl,lhe->bthe", weights, values.astype(q.dtype))


def compose(kind: str, h: Array, dh: Array, amount: Any = 1.0) -> Array:
    """h + dh, h + s dh, or (1 - g) h + g dh: `amount` is s or g and broadcasts to h."""
    if kind == "add":
        return h + dh
    amount = jnp.asarray(amount).astype(h.dtype)
    return h + amount * dh if kind == "scaled" else (1 - amount) * h + amount * dh


def joined(
    k: Float[Array, "b k g e"],
    v: Float[Array, "b k g e"],
    bias: Any,
    keys: Float[Array, "l g e"],
    values: Float[Array, "l g e"],
) -> tuple[Array, Array, Any]:
    """Keys, values and additive bias with a prefix in front that every query sees."""

    def front(prefix: Array, x: Array) -> Array:
        return jnp.concatenate([jnp.broadcast_to(prefix.astype(x.dtype), (x.shape[0], *prefix.shape)), x], axis=1)

    if bias is not None:
        bias = jnp.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(keys.shape[0], 0)])
    return front(keys, k), front(values, v), bias


# ----------------------------------------------------------------------------------------------------- where to step in

ATTENTION = "**/{attention,cross_attention}"
_SITES = {
    "attention": ATTENTION,
    "head": f"{ATTENTION}/core",
    "ffn": "**/mlp",
    "ffn_norm": "**/mlp_norm",
    "query": f"{ATTENTION}/query",
    "value": f"{ATTENTION}/value",
    "ffn_up": "**/mlp/up",
    "ffn_down": "**/mlp/down",
}


def _stash_input(tag: str) -> Any:
    def around(site: Site, call: Any, x: Array, *args: Any, **kwargs: Any) -> Any:
        site.stash[tag, site.path] = x
        return call(x, *args, **kwargs)

    return around


def hooks_of(
    design: Design, r: int | Callable[[int], int], at: trees.Pattern | None, dropout: float, scale: Any
) -> list[Hook]:
    """The hooks that put a design into a model whose modules are called as ours are, or at the modules `at` names; r may
    depend on the width of what a bottleneck reads."""
    where = _SITES[design.site] if at is None else at

    def amount(site: Site) -> Any:
        if design.scale is None and scale is None:
            return site.param("amount", (), _ones)
        return design.scale if scale is None else scale

    def with_change(site: Site, h: Array, z: Array) -> Array:
        width = math.prod(h.shape[z.ndim - 1 :])
        dh = bottleneck(site, design, z, width, r(z.shape[-1]) if callable(r) else r, dropout)
        s = amount(site) if design.composition == "scaled" else 1.0
        if design.norm == "out":
            return compose("add", h, _norm(site, "norm", jnp.asarray(s).astype(dh.dtype) * dh).reshape(h.shape))
        return compose(design.composition, h, dh.reshape(h.shape), s)

    def sequential(site: Site, call: Any, x: Array, *args: Any, **kwargs: Any) -> Array:
        h = call(x, *args, **kwargs)
        return with_change(site, h, h)

    def after_norm(site: Site, call: Any, z: Array, *args: Any, **kwargs: Any) -> Array:
        # Pfeiffer in a post-norm block: with z = x + FFN(x), out = LN(z + A(LN(z))), the same norm twice.
        return call(with_change(site, z, call(z, *args, **kwargs)), *args, **kwargs)

    def parallel(site: Site, call: Any, x: Array, *args: Any, **kwargs: Any) -> Array:
        z = site.stash[f"{design.site}_norm", f"{site.path}_norm"] if design.reads == "residual" else x
        return with_change(site, call(x, *args, **kwargs), z)

    def parallel_heads(site: Site, call: Any, q: Array, *args: Any, **kwargs: Any) -> Array:
        source = f"{site.parent}_norm" if design.reads == "residual" else site.parent
        return with_change(site, call(q, *args, **kwargs), site.stash["attention_input", source])

    def heads(site: Site, call: Any, q: Any, k: Any = None, v: Any = None, bias: Any = None, **kwargs: Any) -> Array:
        if not all(getattr(x, "ndim", 0) == 4 for x in (q, k, v)):
            raise ValueError(
                f"{site.path!r} is no attention core: it is to be called with queries, keys and values of shape (b, t, h, k) "
                "and a bias, as models.layers.AttentionCore is. A module that makes them itself has none to hook"
            )
        assert not callable(r)
        shape = (r, k.shape[2], k.shape[3])
        # W_u = 0 makes dh start at zero; a gated prefix is random in both, as its paper has it.
        values = _zeros if design.init == "lora" and design.composition != "gated" else _normal(0.02)
        pk, pv = site.param("key", shape, _normal(0.02)), site.param("value", shape, values)
        if design.composition == "gated":
            k, v, bias = joined(k, v, bias, pk, pv)
            return call(q, k, v, bias, **kwargs)
        query = site.stash["query", f"{site.parent}/query"].reshape(q.shape) if design.norm == "in" else q
        dh = prefix_attention(query, pk, pv, design.form)
        return compose(design.composition, call(q, k, v, bias, **kwargs), dh, amount(site))

    def query_of_normed(site: Site, call: Any, x: Array, *args: Any, **kwargs: Any) -> Array:
        site.stash["query", site.path] = call(_norm(site, "norm", x), *args, **kwargs)
        return call(x, *args, **kwargs)

    if design.site == "head":
        extra = [] if design.norm != "in" else [Hook(_sibling(where, "query"), query_of_normed)]
        return [*extra, Hook(where, heads)]
    if design.site == "ffn_norm":
        return [Hook(where, after_norm)]
    if design.insertion == "sequential":
        return [Hook(where, sequential)]
    if design.site == "attention":
        # The input is the attention's, the place before its output projection: two modules, so two hooks.
        input_of = _suffixed(where, "_norm") if design.reads == "residual" else where
        return [Hook(input_of, _stash_input("attention_input")), Hook(_suffixed(where, "/core"), parallel_heads)]
    if design.reads == "residual":
        return [Hook(_suffixed(where, "_norm"), _stash_input(f"{design.site}_norm")), Hook(where, parallel)]
    return [Hook(where, parallel)]


def _suffixed(at: trees.Pattern, end: str) -> trees.Pattern:
    return at + end if isinstance(at, str) else [p + end for p in at]


def _sibling(at: trees.Pattern, name: str) -> trees.Pattern:
    def one(p: str) -> str:
        return p.rpartition("/")[0] + f"/{name}"

    return one(at) if isinstance(at, str) else [one(p) for p in at]


@register(
    family="adapt", paper="He et al., ICLR 2022", mechanism="hooks", mergeable=False, exact_start=False, rate=2e-3
)
def sublayer(
    design: str | Design | Sequence[Design] = "scaled_parallel_adapter",
    rank: int | None = 16,
    *,
    reduction: int | None = None,
    at: trees.Pattern | None = None,
    scale: Any = None,
    dropout: float = 0.0,
    name: str | None = None,
) -> Method:
    """Any point of the design table.

    Args:
      design: a name in `DESIGNS`, a `Design`, or several that make one method.
      rank: the bottleneck r, or the prefix length l, at least 1; None where `reduction` says it.
      reduction: r as the width that the bottleneck reads over this number, where modules differ in width.
      at: pattern of modules where they are not named as in our models (one pattern for all designs).
      scale: s instead of the design's own; may be traced.
      dropout: inside the bottleneck; acts where `apply` is given a `dropout_key`.
      name: the key of its delta in a chain, and the prefix of its parameters.

    Returns:
      A method on hooks, delta `{module path: {"down", "down_bias", "up", ...}}`. It does not merge.

    Raises:
      ValueError: an unknown design, a rank below 1, a combination that the table has no meaning for.
      PatternError: no module matches.
    """
    if isinstance(design, str):
        if design not in DESIGNS:
            raise ValueError(
                f"unknown design {design!r}{trees.near(design, DESIGNS)}; there are: {', '.join(sorted(DESIGNS))}"
            )
        designs: tuple[Design, ...] = DESIGNS[design]
    else:
        designs = (
            (design,)
            if isinstance(design, Design)
            else tuple(Design(**d) if isinstance(d, dict) else d for d in design)
        )
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank}: a bottleneck or prefix is at least 1 wide")
    if rank is None and (reduction is None or reduction < 1 or any(d.site == "head" for d in designs)):
        raise ValueError(f"rank None, reduction {reduction}: a bottleneck has one of them, at least 1; a prefix a rank")

    def reduced(width: int) -> int:
        assert reduction is not None
        if width < reduction:
            raise ValueError(
                f"reduction {reduction} leaves nothing of a width of {width}: take a smaller one, or a rank"
            )
        return width // reduction

    label = name or (design if isinstance(design, str) else "sublayer")
    config = dict(
        method="sublayer",
        design=[dataclasses.asdict(d) for d in designs],
        rank=rank,
        reduction=reduction,
        at=at,
        scale=scale,
        dropout=dropout,
        name=label,
    )
    size = reduced if rank is None else rank
    return on_hooks(label, [h for d in designs for h in hooks_of(d, size, at, dropout, scale)], config)
