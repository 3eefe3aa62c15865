"""LST, ladder side-tuning: Sung, Cho and Bansal, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer
Learning", NeurIPS 2022, arXiv:2206.06522.

A thin copy of the transformer stands beside the frozen one, reads its hidden states through gated "ladder" connections
and answers in its place. Nothing trained lies inside the backbone, so no backward pass enters it.

    s = D_in e + b_in                                                  e: the embedding's output
    for each kept layer i:
        mu_i = sigmoid(a_i / T)                                        a_i = 0 at the start: mu = 1/2
        s <- mu_i s + (1 - mu_i) (D_i h_i + b_i)                       h_i: the output of the backbone's block i
        s <- SideBlock_i(s)                                            the model's block, width, heads and mlp over r
    y = U dropout(SideNorm(s)) + b_u                                   stands where the backbone's last state stood

Encoder-decoders have two such towers; the side decoder's cross-attention reads the side encoder's normed states, and
only the decoder's is brought back to width d. Relative positions have a table of the side network's own. e and h_i are
behind a stop-gradient. Pooling and head are the model's: train the head along, `chain(lst(), head())`.

Side blocks start as the backbone's, cut to 1/r of their widths (`pruning`), D, U and gates afresh.

Reference code: ylsung/Ladder-Side-Tuning @1798e82 (modeling_side_t5.py, pruning_methods.py: `pruning_v2`, fisher.py).
Departures: gates of dropped layers do not exist. D and U start as linear layers do by default in the reference's
library, U(-1/sqrt(n), 1/sqrt(n)) for n inputs, biases too; its T5 class draws N(0, 0.01²) with zero biases instead
(`std=0.01`).

Letters: b batch, t positions, d width, r reduction, n inputs of a product, m its outputs, L layers.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jaxpeft import trees
from jaxpeft.adapt.importance import magnitude
from jaxpeft.adapt.pruning import backbone_of, structural_prune
from jaxpeft.adapt.side import answering, drop, linear, linear_start, of
from jaxpeft.adapt.structure import Structure, argument, structure
from jaxpeft.hooks import unhooked
from jaxpeft.method import ApplyFn, Call, Delta, Method, Mode, Params, register, site_key
from jaxpeft.models.clip import ClipTextConfig
from jaxpeft.models.decoder import DecoderConfig, Rope, rotary_angles
from jaxpeft.models.encoder import EncoderConfig
from jaxpeft.models.encoder_decoder import CrossBlock, EncoderDecoderConfig, relative_buckets
from jaxpeft.models.layers import Block, BlockConfig, Norm, attention_bias, extend_left
from jaxpeft.models.vit import VisionConfig
from jaxpeft.readers import Taps
from jaxpeft.trees import wide_dtype

__all__ = ["lst"]

CONFIGS: dict[str, type[BlockConfig]] = {
    c.__name__: c
    for c in (BlockConfig, EncoderConfig, DecoderConfig, EncoderDecoderConfig, VisionConfig, ClipTextConfig)
}
PAPER_REDUCTION = 8


# ------------------------------------------------------------------------------------------------- the side network


class Tower(NamedTuple):
    """One stack of the model: the key of its parameters and of its taps, its blocks, the indices of the kept ones."""

    name: str
    tap: str
    block: type[nn.Module]
    layers: tuple[int, ...]


def narrowed(config: BlockConfig, reduction: int | None, dropout: float | None = None) -> tuple[BlockConfig, int]:
    """The side blocks' config, and r.

    `reduction` None is the paper's 8 or, in a small model, the largest divisor of its widths below it that leaves a
    norm four features (over two it knows no more than which is larger).

    Raises:
      ValueError: r does not divide the width, the width of a head or that of the feed-forward block.
    """
    sizes = {n: getattr(config, n) for n in ("width", "head_dim", "mlp_width")}
    common = math.gcd(*sizes.values())
    fitting = [r for r in range(1, common + 1) if common % r == 0]
    if reduction is None:
        r = max([r for r in fitting if r <= PAPER_REDUCTION and config.width // r >= 4], default=1)
    elif reduction in fitting:
        r = reduction
    else:
        name, size = next((n, s) for n, s in sizes.items() if reduction < 1 or s % reduction)
        raise ValueError(f"reduction {reduction} does not divide {name}={size}; for this model, take one of {fitting}")
    if isinstance(config, DecoderConfig) and config.family == "llama" and (config.head_dim // r) % 2:
        raise ValueError(f"reduction {r} leaves heads of {config.head_dim // r}, which rotary positions cannot halve")
    side = dataclasses.replace(
        config,
        width=config.width // r,
        head_dim=config.head_dim // r,
        mlp_width=config.mlp_width // r,
        dropout=config.dropout if dropout is None else dropout,
        param_dtype=wide_dtype(config.param_dtype),
    )
    return side, r


def towers_of(config: BlockConfig, tap: str, keep: Sequence[int] | None, drop_every: int) -> tuple[Tower, ...]:
    """The side network's stacks.

    Raises:
      ValueError: a kept layer that the model does not have, or none left.
    """

    def kept(layers: int) -> tuple[int, ...]:
        if keep is None:
            chosen = tuple(i for i in range(layers) if not drop_every or i % drop_every)
        else:
            chosen = tuple(sorted(set(keep)))
        if not chosen or not all(0 <= i < layers for i in chosen):
            raise ValueError(
                f"keep={keep}, drop_every={drop_every} leaves the layers {list(chosen)}, expected at least one of "
                f"0..{layers - 1}"
            )
        return chosen

    if isinstance(config, EncoderDecoderConfig):
        return (
            Tower("encoder", "encoder_", Block, kept(config.layers)),
            Tower("decoder", "decoder_", CrossBlock, kept(config.decoder_layers)),
        )
    return (Tower("side", tap, Block, kept(config.layers)),)


def climb(
    phi: Mapping[str, Any],
    tower: Tower,
    side: BlockConfig,
    taps: Taps,
    temperature: Any,
    ladders: bool,
    mode: Mode,
    *args: Any,
) -> Float[Array, "b t d_side"]:
    """One tower of the side network, its norm included; `args` are the blocks' (bias, then what follows the mode)."""
    e = taps[f"{tower.tap}embedded"][0]
    hidden = taps.get(f"{tower.tap}hidden", [])
    key = mode.dropout_key
    if odd := [i for i in tower.layers if ladders and hidden[i].shape != e.shape]:
        raise ValueError(
            f"layer {odd[0]} gives {hidden[odd[0]].shape} where the embedding gave {e.shape}: a reader needs all "
            "positions (config narrow=False)"
        )

    def block(p: Any, s: Array, key: Any) -> Any:
        rngs = {} if key is None else {"dropout": key}
        return tower.block(side).apply({"params": p}, s, args[0], key is None, *args[1:], rngs=rngs)

    if side.remat:
        # Inside a scan nothing can be merged with the forward pass, so the costly barrier is left out.
        block = jax.checkpoint(block, prevent_cse=not side.scan)

    def climbed(s: Array, rung: tuple[Any, Any, Any]) -> tuple[Array, None]:
        layer, h, key = rung
        if ladders:
            mu = jax.nn.sigmoid(layer["gate"] / temperature).astype(s.dtype)
            s = mu * s + (1 - mu) * linear(layer["down"], h)
        return block(layer["block"], s, key), None

    s = linear(phi["down"], e)
    states = [hidden[i] if ladders else None for i in tower.layers]
    keys = [None if key is None else site_key(key, f"{tower.name}/layers_{i}") for i in tower.layers]
    layers = phi.get("layers")
    if side.scan:
        layers = trees.stack([phi[f"layers_{i}"] for i in tower.layers]) if layers is None else layers
        # The states are slices of one array, which the compiler puts together again without a copy.
        s, _ = jax.lax.scan(climbed, s, (layers, trees.stack(states), trees.stack(keys)))
    else:
        for n, i in enumerate(tower.layers):
            s, _ = climbed(s, (phi[f"layers_{i}"] if layers is None else of(layers, n), states[n], keys[n]))
    s = Norm(side).apply({"params": phi["norm"]}, s)
    assert isinstance(s, jax.Array)
    return drop(s, side.dropout, None if key is None else site_key(key, f"{tower.name}/norm"))


def _side_answer(
    phi: Mapping[str, Any],
    config: BlockConfig,
    side: BlockConfig,
    towers: Sequence[Tower],
    temperature: Any,
    ladders: bool,
    mode: Mode,
    taps: Taps,
) -> Float[Array, "b t d"]:
    """y, from what the backbone has shown."""

    def given(name: str) -> Any:
        return taps.get(argument(name), [None])[0]

    def length(tower: Tower) -> int:
        return taps[f"{tower.tap}embedded"][0].shape[1]

    def run(tower: Tower, *args: Any) -> Array:
        return climb(phi[tower.name], tower, side, taps, temperature, ladders, mode, *args)

    if isinstance(config, EncoderDecoderConfig):
        encoder, decoder = towers
        mask = extend_left(given("attention_mask"), length(encoder), 1)
        memory = run(encoder, _relative(phi["encoder"], config, length(encoder), mask, causal=False))
        bias = _relative(phi["decoder"], config, length(decoder), given("decoder_attention_mask"), causal=True)
        s = run(decoder, bias, memory, attention_bias(mask, length(decoder)))
    else:
        (tower,) = towers
        t = length(tower)
        causal = isinstance(config, DecoderConfig | ClipTextConfig)
        bias = attention_bias(extend_left(given("attention_mask"), t, 1), t, causal=causal)
        rotary = None
        if isinstance(config, DecoderConfig) and config.family == "llama":
            positions = given("positions")
            positions = jnp.arange(t)[None] if positions is None else positions
            if positions.shape[1] != t:
                raise ValueError(
                    f"positions for {positions.shape[1]} of {t} states: leave them out with virtual tokens"
                )
            rotary = rotary_angles(config.rope, positions, side.head_dim)
        s = run(tower, bias, rotary)
    return linear(phi["up"], s)


def _relative(phi: Mapping[str, Any], config: EncoderDecoderConfig, t: int, mask: Any, *, causal: bool) -> Array:
    table = phi["relative_bias"]["embedding"]
    buckets = relative_buckets(t, t, bidirectional=not causal, buckets=config.buckets, limit=config.max_distance)
    bias = jnp.take(table, jnp.asarray(buckets), axis=0).transpose(2, 0, 1)[None]
    masked = attention_bias(mask, t, causal=causal)
    return bias if masked is None else bias + masked.astype(bias.dtype)


def _start(
    key: Key[Array, ""],
    config: BlockConfig,
    side: BlockConfig,
    towers: Sequence[Tower],
    std: float | None,
    ladders: bool,
    pruned: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """phi at the start; `pruned` is what `structural_prune` made, or None for fresh blocks."""
    dtype, d, w = side.param_dtype, config.width, side.width
    plain = dataclasses.replace(side, dropout=0.0)
    dummy = jnp.zeros((1, 1, w), side.dtype)

    def cast(tree: Any) -> Any:
        # A copy: a step may donate its delta's buffers, and at r = 1 these would be the backbone's.
        return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), tree)

    out: dict[str, Any] = {"up": linear_start(site_key(key, "up"), w, d, std, dtype)}
    for tower in towers:
        source = None if pruned is None else pruned.get(tower.name, pruned)
        phi: dict[str, Any] = {"down": linear_start(site_key(key, f"{tower.name}/down"), d, w, std, dtype)}
        layers = {}
        for i in tower.layers:
            place = f"{tower.name}/layers_{i}"
            if source is not None:
                layer = {"block": cast(source[f"layers_{i}"])}
            else:
                args = (dummy, None, True, *([dummy] if tower.block is CrossBlock else []))
                layer = {"block": tower.block(plain).init(site_key(key, f"{place}/block"), *args)["params"]}
            if ladders:
                layer["gate"] = jnp.zeros((), dtype)
                layer["down"] = linear_start(site_key(key, f"{place}/down"), d, w, std, dtype)
            layers[f"layers_{i}"] = layer
        phi |= {"layers": trees.stack(list(layers.values()))} if side.scan else layers
        if source is not None and "final_norm" in source:
            phi["norm"] = cast(source["final_norm"])
        else:
            phi["norm"] = Norm(side).init(key, dummy)["params"]
        if isinstance(config, EncoderDecoderConfig):
            if source is not None:
                phi["relative_bias"] = cast(source["relative_bias"])
            else:
                own = jax.random.normal(site_key(key, f"{tower.name}/relative"), (config.buckets, config.heads), dtype)
                phi["relative_bias"] = {"embedding": own * w**-0.5}
        out[tower.name] = phi
    return out


# ------------------------------------------------------------------------------------------------------- the method


def _plain(config: BlockConfig | None) -> dict[str, Any] | None:
    """A config as plain data, and `_config` back."""
    if config is None:
        return None
    fields = dataclasses.asdict(config)
    return {**fields, "kind": type(config).__name__, "dtype": str(config.dtype), "param_dtype": str(config.param_dtype)}


def _config(config: BlockConfig | Mapping[str, Any] | None) -> BlockConfig | None:
    if config is None or isinstance(config, BlockConfig):
        return config
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k != "kind"}
    if "rope" in fields:
        fields["rope"] = Rope(**fields["rope"])
    return CONFIGS[config["kind"]](**fields)


@register(
    name="lst",
    family="adapt",
    paper="Sung et al., NeurIPS 2022",
    mechanism="reader",
    mergeable=False,
    exact_start=False,
    rate=3e-3,
)
def lst(
    reduction: int | None = None,
    *,
    keep: Sequence[int] | None = None,
    drop_every: int = 0,
    init: Literal["pruned", "random"] = "pruned",
    importance: PyTree | Literal["magnitude"] = "magnitude",
    ladders: bool = True,
    temperature: Any = 0.1,
    dropout: float | None = None,
    std: float | None = None,
    config: BlockConfig | Mapping[str, Any] | None = None,
    name: str = "lst",
) -> Method:
    """Ladder side-tuning; see the module for the equations. Train the head along: `chain(lst(), head())`.

    Works on every model of `jaxpeft.models`, in each of its layouts, through whatever other methods wrap it; on CLIP,
    one tower at a time. The backbone runs as the call says: its own dropout is off unless the caller turns it on.

    Args:
      reduction: r, which divides the model's width, head width and feed-forward width. None: 8 as in the paper, or in a
        small model the largest divisor below it that leaves the side network four features.
      keep: indices of the layers that the side network has (in encoder and decoder alike); None for all.
      drop_every: instead of `keep`, leaves out the layers 0, n, 2n, ... : 4 is the paper's for T5-base, 2 for T5-large.
      init: "pruned", side blocks cut from the backbone's, or "random".
      importance: what pruning ranks by: "magnitude", |W|, or a tree of the structure of `params`, as
        `importance.squared_gradients` makes it (the paper: 1024 training samples). Files do not keep it.
      ladders: False leaves only the embedding to read, without gates: side-tuning without ladders (mu = 1).
      temperature: T of the gates; may be traced.
      dropout: of the side network, where `apply` is given a `dropout_key`; None is the model config's.
      std: of the projections D and U at the start, with zero biases; None draws them as linear layers are.
      config: of the model's blocks, where it is not a Linen model that has one: the model must then mark "embedded",
        "hidden" and "final_hidden" (as `named(model.apply, {"embed": "embedded", "block_*": "hidden", "norm":
        "final_hidden"})`), and a padding mask is the keyword `attention_mask`. Of the config's sizes the side network takes
        `width`, `heads`, `head_dim`, `mlp_width` and `layers`.
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is {"side": {"down", "layers_i": {"gate", "down", "block"}, "norm"}, "up"}, with
      "encoder" and "decoder" and their "relative_bias" in place of "side" for encoder-decoders. Where the model's layers
      are scanned, the kept ones are stacked under "layers" instead; either layout is taken. It does not merge.

    Raises:
      ValueError: an option out of range; at `init`, a reduction that does not divide the model's widths, a layer that
        it does not have, a model whose structure is not to be found.
      TapError: the model does not mark its hidden states.
    """
    if reduction is not None and reduction < 1:
        raise ValueError(f"reduction {reduction}: expected 1 or more, a divisor of the model's widths")
    if init not in ("pruned", "random"):
        raise ValueError(f"init {init!r}: expected 'pruned' or 'random'")
    if keep is not None and (drop_every or not len(keep)):
        raise ValueError(
            f"keep={keep} with drop_every={drop_every}: give at least one layer to keep, or drop_every alone"
        )
    if drop_every < 0 or drop_every == 1:
        raise ValueError(f"drop_every {drop_every}: 0 drops no layer, n >= 2 every n-th")
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}: expected a probability in [0, 1)")
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"temperature {temperature}: expected a positive number")
    if isinstance(importance, str) and importance not in ("magnitude", "given"):
        raise ValueError(
            f"importance {importance!r}: expected 'magnitude' or a tree of the structure of the parameters"
        )
    fixed = _config(config)

    def seen(call: Call) -> Structure:
        found = structure(call.apply_fn, call.params, call.inputs, call.kwargs)
        if fixed is not None:
            return (found or Structure(fixed, "", (), ()))._replace(config=fixed)
        if found is None:
            raise ValueError("lst finds no Linen module with a BlockConfig in this model: give it one, lst(config=...)")
        return found

    def start(key: Key[Array, ""], call: Call) -> Delta:
        found = seen(call)
        side, r = narrowed(found.config, reduction, dropout)
        towers = towers_of(found.config, found.tap, keep, drop_every)
        pruned = None
        if init == "pruned":
            backbone = backbone_of(call.params)
            if isinstance(importance, str):
                if importance == "given":
                    raise ValueError("this method was made from a file, which does not keep the importances: give them")
                ranks = magnitude(backbone)
            else:
                _same_structure(importance, call.params)
                ranks = backbone_of(importance)
            pruned = structural_prune(backbone, ranks, r, pre_norm=found.config.pre_norm)
        with unhooked():
            return _start(key, found.config, side, towers, std, ladders, pruned)

    def wrap(apply_fn: ApplyFn, delta: Delta, mode: Mode) -> ApplyFn:
        def run(params: Params, *inputs: Any, **kwargs: Any) -> Any:
            found = seen(Call(apply_fn, params, inputs, kwargs))
            side, _ = narrowed(found.config, reduction, dropout)
            towers = towers_of(found.config, found.tap, keep, drop_every)
            own = mode if side.dropout else Mode()

            def answer(taps: Taps) -> Array:
                return _side_answer(delta, found.config, side, towers, temperature, ladders, own, taps)

            names = []
            for tower in towers:
                names += [f"{tower.tap}embedded", *([f"{tower.tap}hidden"] if ladders else [])]
            last = f"{towers[-1].tap}final_hidden"
            return answering(apply_fn, found, names, [(last, answer)])(params, *inputs, **kwargs)

        return run

    plain = dict(
        method="lst",
        name=name,
        reduction=reduction,
        keep=None if keep is None else list(keep),
        drop_every=drop_every,
        init=init,
        importance=importance if isinstance(importance, str) else "given",
        ladders=ladders,
        temperature=temperature,
        dropout=dropout,
        std=std,
        config=_plain(fixed),
    )
    return Method(name, start, wrap, None, plain)


def _same_structure(importance: PyTree, params: Params) -> None:
    ours, theirs = trees.by_path(params), trees.by_path(importance)
    if wrong := [p for p in ours if p not in theirs or jnp.shape(theirs[p]) != jnp.shape(ours[p])]:
        has = jnp.shape(theirs[wrong[0]]) if wrong[0] in theirs else "nothing"
        raise ValueError(
            f"the importances have {has} at {wrong[0]!r}, where the parameters have {jnp.shape(ours[wrong[0]])}"
        )
