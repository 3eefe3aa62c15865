"""The pieces all backbones are made of: attention, feed-forward block, norms, and the loop over layers.

Letters: b batch, t (tq, tk) positions, d width, h heads, g key/value heads, k size of one head, f width of the
feed-forward block, L layers.

    attention(x) = out(core(query(x), key(x), value(x), bias))
    core(q, k, v, bias) = softmax(scale · q kᵀ + bias) v           softmax in float32
    mlp(x) = down(act(up(x)))      or, gated,      down(act(gate(x)) · up(x))
    post-norm:  x ← norm(x + f(x))        pre-norm:  x ← x + f(norm(x))

`AttentionCore` holds no parameters and is a module only so that others can hook it by name: a prefix prepends keys,
a router drops heads, a faster formulation replaces it. Masks, causal ones too, therefore travel in its additive
`bias` and nowhere else.

Reference: Vaswani et al., "Attention is all you need", NeurIPS 2017; Shazeer, "GLU variants improve transformer",
2020; Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.
Not taken over from the reference implementations: dropout on attention probabilities (only hidden states drop out).
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxpeft.kernels.positions import rotate
from jaxpeft.models import fused
from jaxpeft.trees import wide_dtype

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": fused.gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}

# Half of the smallest float32: a second bias may still be added to it without reaching -inf, so that a row whose
# keys are all masked stays finite.
MASKED = float(jnp.finfo(jnp.float32).min) / 2

C = TypeVar("C")


def plain_gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What a block needs to know; the families' configs add embeddings and heads.

    `head_dim` need not be `width / heads`, and `kv_heads` (None: as many as `heads`) may be any divisor of `heads`.
    `dropout` acts on hidden states. `scan` keeps the layers stacked on a leading axis and compiles one of them,
    `remat` recomputes them in the backward pass; both change no number.
    `plain` takes formulations without backward passes of their own (see `fused`), which forward mode needs. `dtype` is
    for computing, `param_dtype` for keeping. `extra` is the JSON of the configuration it was read from, so that what we
    do not use is written back.
    """

    width: int
    layers: int
    heads: int
    head_dim: int
    mlp_width: int
    kv_heads: int | None = None
    activation: str = "gelu"
    gated: bool = False
    norm: str = "layer"  # or "rms"
    norm_eps: float = 1e-12
    pre_norm: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    fused_qkv: bool = False
    attention_scale: float | None = None  # None: head_dim ** -0.5
    dropout: float = 0.0
    inner_dropout: bool = False  # T5 also drops between the two products of its feed-forward block
    init_std: float | None = 0.02  # None: fan-in scaling
    scan: bool = False
    remat: bool = False
    plain: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    extra: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, jnp.dtype(getattr(self, name)))
            if not jnp.issubdtype(getattr(self, name), jnp.floating):
                raise ValueError(f"{name} must be a float type, got {getattr(self, name)}")
        for name in ("width", "layers", "heads", "head_dim", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")
        if self.norm not in ("layer", "rms"):
            raise ValueError(f"norm must be 'layer' or 'rms', got {self.norm!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.fused_qkv and (self.kv_heads or self.heads) != self.heads:
            raise ValueError("fused_qkv needs as many key/value heads as query heads")

    def written(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration this was read from, overlaid with `fields` and the dtype of the parameters."""
        return {**json.loads(self.extra or "{}"), **fields, "dtype": str(self.param_dtype)}


def from_fields(cls: type[C], hf: Mapping[str, Any], fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> C:
    """A config of class `cls` from translated `fields`, remembering `hf`; `overrides` win."""
    unknown = set(overrides) - {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
    extra = {key: value for key, value in hf.items() if key not in ("torch_dtype", "dtype")}
    return cls(**{**fields, "extra": json.dumps(extra, sort_keys=True), **overrides})


Keys = Mapping[str, tuple[str, Any]]
"""How a family writes a config: name in its `config.json` -> (field here, value where the name is missing)."""

# BERT's names, which others took over.
BLOCK_KEYS: Keys = {
    "hidden_size": ("width", 768),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("heads", 12),
    "intermediate_size": ("mlp_width", 3072),
    "hidden_act": ("activation", "gelu"),
    "layer_norm_eps": ("norm_eps", 1e-12),
    "initializer_range": ("init_std", 0.02),
}


def read_keys(hf: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
    """The fields that `hf` gives; `head_dim` is width / heads where it gives none."""
    fields = {field: hf.get(name, default) for name, (field, default) in keys.items()}
    return {**fields, "head_dim": fields.get("head_dim") or fields["width"] // fields["heads"]}


def write_keys(config: BlockConfig, keys: Keys) -> dict[str, Any]:
    """Undoes `read_keys`."""
    return {name: getattr(config, field) for name, (field, _) in keys.items()}


# ------------------------------------------------------------------------------------------------ small modules


def kernel_init(config: BlockConfig, scale: float = 1.0) -> Callable[..., Array]:
    """Normal with the config's deviation, or fan-in scaled by `scale` where it has none."""
    if config.init_std is not None:
        return nn.initializers.normal(config.init_std)
    return nn.initializers.variance_scaling(scale, "fan_in", "normal")


def dense(
    config: BlockConfig, features: int, *, use_bias: bool, name: str | None = None, scale: float = 1.0
) -> nn.Dense:
    """A Dense with the config's dtypes and initialisation; its kernel is (in, out)."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=kernel_init(config, scale),
        name=name,
    )


class Norm(nn.Module):
    """Layer norm, (x - mean) / √(var + eps) · scale + bias, or root mean square norm, x / √(mean x² + eps) · scale.

    All of it in at least float32, the result in the config's dtype. Own, because flax's fails under strict promotion
    where the parameters are kept in half precision.
    """

    config: BlockConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        c = self.config
        shape = (x.shape[-1],)
        wide = wide_dtype(x.dtype)
        scale = jnp.asarray(self.param("scale", nn.initializers.ones, shape, c.param_dtype), wide)
        if c.norm == "layer":
            bias = jnp.asarray(self.param("bias", nn.initializers.zeros, shape, c.param_dtype), wide)
            norm = fused.plain_layer_norm if c.plain else fused.layer_norm
            return jnp.asarray(norm(x, scale, bias, c.norm_eps), c.dtype)
        y = x.astype(wide)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + c.norm_eps)
        return (y * scale.reshape((1,) * (x.ndim - 1) + shape)).astype(c.dtype)


def norm(config: BlockConfig, name: str) -> Norm:
    """The config's norm under `name`."""
    return Norm(config, name=name)


def embed(config: BlockConfig, rows: int, name: str | None = None, std: float | None = None) -> nn.Embed:
    """An embedding table (rows, d) with the config's dtypes."""
    return nn.Embed(
        rows,
        config.width,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        embedding_init=nn.initializers.normal(std or config.init_std or 1.0),
        name=name,
    )


class AttentionCore(nn.Module):
    """softmax(scale · q kᵀ + bias) v, without parameters; hook it to change what attention sees.

    Query head i reads key/value head i // (h / g).
    """

    scale: float | None = None
    plain: bool = False

    @nn.compact
    def __call__(
        self,
        q: Float[Array, "b tq h k"],
        k: Float[Array, "b tk g k"],
        v: Float[Array, "b tk g k"],
        bias: Float[Array, "#b #h #tq tk"] | None = None,
    ) -> Float[Array, "b tq h k"]:
        b, tq, h, size = q.shape
        tk, g = k.shape[1:3]
        scale = size**-0.5 if self.scale is None else self.scale
        if not self.plain:
            return fused.attention(q, k, v, bias, scale)
        wide = wide_dtype(q.dtype)
        grouped = q.reshape(b, tq, g, h // g, size)
        scores = jnp.einsum("bqgrk,bsgk->bgrqs", grouped, k, preferred_element_type=wide) * scale
        scores = scores.reshape(b, h, tq, tk)
        if bias is not None:
            scores = scores + bias.astype(wide)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(b, g, h // g, tq, tk)
        return jnp.einsum("bgrqs,bsgk->bqgrk", weights, v).reshape(b, tq, h, size)


class Attention(nn.Module):
    """Multi-head attention over `x`, or from `x` over `memory`; no dropout of its own.

    With a `cell` (see `cache`) keys and values of `x` go behind those it keeps, and attention is over all of them.
    """

    config: BlockConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b tq d"],
        bias: Float[Array, "#b #h #tq tk"] | None = None,
        memory: Float[Array, "b tk d"] | None = None,
        rotary: tuple[Array, Array] | None = None,
        cell: Any = None,
    ) -> Float[Array, "b tq d"]:
        c = self.config
        g = c.kv_heads or c.heads
        memory = x if memory is None else memory
        if c.fused_qkv:
            parts = dense(c, 3 * c.heads * c.head_dim, use_bias=c.qkv_bias, name="qkv")(x)
            q, k, v = jnp.split(parts, 3, axis=-1)
        else:
            # Where the product q kᵀ is not scaled, the query's initialisation carries the scale.
            scale = 1.0 if c.attention_scale is None else 1.0 / c.head_dim
            q = dense(c, c.heads * c.head_dim, use_bias=c.qkv_bias, name="query", scale=scale)(x)
            k = dense(c, g * c.head_dim, use_bias=c.qkv_bias, name="key")(memory)
            v = dense(c, g * c.head_dim, use_bias=c.qkv_bias, name="value")(memory)
        q = q.reshape(*q.shape[:2], c.heads, c.head_dim)
        k = k.reshape(*k.shape[:2], g, c.head_dim)
        v = v.reshape(*v.shape[:2], g, c.head_dim)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cell is not None:
            k, v = cell.extend(k, v)
        y = AttentionCore(c.attention_scale, c.plain, name="core")(q, k, v, bias)
        return dense(c, c.width, use_bias=c.out_bias, name="out")(y.reshape(*y.shape[:2], c.heads * c.head_dim))


class Mlp(nn.Module):
    """The feed-forward block, its closing dropout included."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], deterministic: bool = True) -> Float[Array, "b t d"]:
        c = self.config
        act = plain_gelu if c.plain and c.activation == "gelu" else ACTIVATIONS[c.activation]
        y = dense(c, c.mlp_width, use_bias=c.mlp_bias, name="up")(x)
        y = act(dense(c, c.mlp_width, use_bias=c.mlp_bias, name="gate")(x)) * y if c.gated else act(y)
        if c.inner_dropout:
            y = nn.Dropout(c.dropout)(y, deterministic=deterministic)
        y = dense(c, c.width, use_bias=c.mlp_bias, name="down")(y)
        return nn.Dropout(c.dropout)(y, deterministic=deterministic)


class Block(nn.Module):
    """Self-attention and feed-forward block, pre- or post-norm as the config says.

    With `first_only` the block returns the first position's state alone, (b, 1, d): what a last layer owes a classifier
    that reads the first token. Keys and values still come from all positions.
    """

    config: BlockConfig
    first_only: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        bias: Float[Array, "#b #h #t t"] | None = None,
        deterministic: bool = True,
        rotary: tuple[Array, Array] | None = None,
        cell: Any = None,
    ) -> Float[Array, "b t d"]:
        c = self.config
        attention, mlp = Attention(c, name="attention"), Mlp(c, name="mlp")
        attention_norm, mlp_norm = norm(c, "attention_norm"), norm(c, "mlp_norm")
        drop = nn.Dropout(c.dropout)
        n = slice(1 if self.first_only else None)
        if c.pre_norm:
            memory = attention_norm(x)
            y = attention(memory[:, n], bias, memory if self.first_only else None, rotary, cell)
            x = x[:, n] + drop(y, deterministic=deterministic)
            return x + mlp(mlp_norm(x), deterministic)
        y = attention(x[:, n], bias, x if self.first_only else None, rotary, cell)
        x = attention_norm(x[:, n] + drop(y, deterministic=deterministic))
        return mlp_norm(x + mlp(x, deterministic))


def with_pooler(
    config: Any, x: Float[Array, "b t d"], pooled: bool, initialising: bool
) -> Float[Array, "b t d"] | tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
    """The states, with BERT's dense layer on the first of them where it is asked for; inside a compact method.

    Its weights are made with the others even if the first call does not ask.
    """
    if pooled and not config.pooler:
        raise ValueError("the model has no pooler; set pooler=True in its config")
    if not config.pooler or not (pooled or initialising):
        return x
    first = jnp.tanh(dense(config, config.width, use_bias=True, name="pooler")(x[:, 0]))
    return (x, first) if pooled else x


# ------------------------------------------------------------------------------------------------ the layer loop


def run_layers(
    block: type[nn.Module],
    config: BlockConfig,
    x: Array,
    *args: Any,
    deterministic: bool,
    tap: str = "",
    layers: int = 0,
    first_only: bool = False,
) -> Array:
    """Send `x` through the config's layers, unrolled or scanned, each optionally recomputed in the backward pass.

    To be called inside a compact method. `args[0]` is the additive bias, the rest follow `deterministic` in the
    block's signature. Each block's output is named `tap + "hidden"`, the name readers find it by. With `first_only`
    the last layer computes the first position alone, where layers are not scanned.
    """

    def body(layer: nn.Module, x: Array, *args: Any) -> tuple[Array, None]:
        y = layer(x, args[0], deterministic, *args[1:])  # pyright: ignore[reportCallIssue]
        return checkpoint_name(y, tap + "hidden"), None

    count = layers or config.layers
    if config.remat:
        # Inside a scan nothing can be merged with the forward pass, so the costly barrier is left out.
        body = nn.remat(body, prevent_cse=not config.scan)
    if config.scan:
        loop = nn.scan(
            body,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast,) * len(args),  # pyright: ignore[reportArgumentType]
            length=count,
        )
        return loop(block(config, name="layers"), x, *args)[0]
    for i in range(count):
        own = {"first_only": True} if first_only and i == count - 1 else {}
        x, _ = body(block(config, name=f"layers_{i}", **own), x, *args)
    return x


# ------------------------------------------------------------------------------------------------ masks, positions


def checked_mask(mask: Array | None, input_ids: Array) -> None:
    """Refuse a mask of another shape than the ids: it would broadcast to a wrong answer."""
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (batch, length), got {input_ids.shape}")
    if mask is not None and mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {mask.shape}, input_ids {input_ids.shape}; they must be equal")


def checked_length(length: int, limit: int) -> None:
    """Refuse more positions than the table has: JAX would clamp the index and answer without a word."""
    if length > limit:
        raise ValueError(f"{length} positions, but the model has {limit}: shorten the input (virtual tokens count)")


def extend_left(values: Array | None, length: int, fill: int) -> Array | None:
    """`values` (b, t) grown at the left to `length` columns: what virtual tokens in front need."""
    if values is None or values.shape[1] == length:
        return values
    return jnp.pad(values, ((0, 0), (length - values.shape[1], 0)), constant_values=fill)


def attention_bias(
    mask: Int[Array, "b tk"] | None, length: int, *, causal: bool = False
) -> Float[Array, "#b 1 #tq tk"] | None:
    """The additive float32 bias of a padding mask (1 keeps) and, if asked, of causality; None if nothing is masked."""
    allowed = None
    if mask is not None:
        allowed = (mask != 0)[:, None, None, :]
    if causal:
        tril = jnp.tril(jnp.ones((length, length), bool))[None, None]
        allowed = tril if allowed is None else allowed & tril
    return None if allowed is None else jnp.where(allowed, 0.0, MASKED).astype(jnp.float32)


# ------------------------------------------------------------------------------------------------ layer layouts


def stack_layers(params: Any) -> Any:
    """Unrolled to scanned: every `layers_0 ... layers_{L-1}` of a nested dict becomes one `layers`, stacked on axis 0.

    Raises ValueError where a number is missing or the layers differ in structure.
    """
    if not isinstance(params, Mapping):
        return params
    numbers = sorted(int(key[7:]) for key in params if _is_layer(key))
    if numbers != list(range(len(numbers))):
        raise ValueError(f"layers must be numbered 0 to L-1 without a gap, got {numbers}")
    out = {key: stack_layers(value) for key, value in params.items() if not _is_layer(key)}
    if numbers:
        trees = [stack_layers(params[f"layers_{i}"]) for i in numbers]
        first = jax.tree.structure(trees[0])
        for i, tree in enumerate(trees):
            if jax.tree.structure(tree) != first:
                raise ValueError(f"layers_{i} has another structure than layers_0; such layers cannot be stacked")
        out["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    return out


def unstack_layers(params: Any) -> Any:
    """Scanned to unrolled: the inverse of `stack_layers`."""
    if not isinstance(params, Mapping):
        return params
    out = {key: unstack_layers(value) for key, value in params.items() if key != "layers"}
    if "layers" in params:
        tree = unstack_layers(params["layers"])
        counts = {leaf.shape[0] for leaf in jax.tree.leaves(tree)}
        if len(counts) != 1:
            raise ValueError(f"the leaves under 'layers' have different leading axes: {sorted(counts)}")
        for i in range(counts.pop()):
            out[f"layers_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], tree)
    return out


def _is_layer(key: str) -> bool:
    return key.startswith("layers_") and key[7:].isdigit()
