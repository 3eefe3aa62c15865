"""UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter and Memory (Diao et al., CVPR 2024,
arXiv:2308.14316).

A side module without a sequence of side layers: every layer's frozen states are projected down by themselves, set in order
by the last layer's (the guide), weighted by a learned confidence of the layer, summed and added to the guide. Nothing
trained lies inside the backbone, and the trained path is as short for any depth.

    F_i = LN_i(W_i h_i + b_i)              i = 0..N; h_0: the embedding's output, h_i: the i-th layer's; F_N: the guide
    A_i = relu(F_N F_iᵀ)                   i < N; zero at padded keys
    A_i <- A_i / (row sum + eps)           no softmax, no scale
    F'_i = (A_i + I) F_i
    c = softmax over i of w_c · (g * f_i)  g, f_i: F_N and F_i averaged over the valid positions
    y = Up(F_N + P(Σ_i c_i F'_i))          stands where the backbone's last state stood

    kind          P                                                       Up                        eps
    vqa           Linear(m -> d), relu, Linear(d -> m), LN                Linear(m -> d)            1e-6
    retrieval     Linear(m -> m), LN                                      relu, Linear(m -> d)      1e-8
    grounding     as vqa                                                  relu, Linear(m -> d), LN  1e-7

Encoder-decoders are wired as the paper's grounding model is: the encoder's sum Y = F_N + P(...) is what the decoder's
states read, F_i <- F_i + LN(Linear(l1(relu(F_i Yᵀ)) Y)) for i < N without I, and only the decoder has Up.

Pooling and head are the model's: train the head along, `chain(unipt(), head())`.

Reference code: Paranioar/UniPT @3fa457d (VSE-infty/lib/adapter_for_transformer.py, CLIP-ViL/src/lxrt/modeling.py,
MDETR/models/transformer.py). Departures: the confidence has no bias, which softmax cancels. In causal models, of which
the reference has none, positions attend to those up to their own and confidences come from running means: otherwise a
position would see what it is to predict. A row without valid positions has the mean 0. The grounding kind reads all
layers, where the reference reads three (`states=(1, 3, 5)`), has no auxiliary outputs, and linear layers start as they do
by default in the reference's library (its VQA code: `std=0.02`; its grounding code: Xavier-uniform). Not here: the
variants for ResNets and CLIP's single vectors.

Letters: b batch, t (s) positions, d width, m = d // reduction, n targets.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxpeft.adapt import side
from jaxpeft.adapt.structure import Structure, structure
from jaxpeft.method import ApplyFn, Call, Delta, Method, Mode, Params, register, site_key
from jaxpeft.readers import Taps
from jaxpeft.trees import wide_dtype

__all__ = ["confidence", "interaction", "parallel", "unipt", "up"]

Kind = Literal["vqa", "retrieval", "grounding"]


class Form(NamedTuple):
    """What the kinds differ in: whether P has a hidden layer of width d, what stands around Up, and eps."""

    hidden: bool
    relu: bool
    norm: bool
    eps: float


FORMS = {
    "vqa": Form(True, False, False, 1e-6),
    "retrieval": Form(False, True, False, 1e-8),
    "grounding": Form(True, True, True, 1e-7),
}


# ------------------------------------------------------------------------------------------------------ pure functions


def weights(
    query: Float[Array, "b t m"],
    keys: Float[Array, "b s m"],
    mask: Int[Array, "b s"] | None = None,
    *,
    eps: float,
    causal: bool = False,
) -> Float[Array, "b t s"]:
    """relu(query keysᵀ), zero where `mask` is, over its row sum plus eps, in float32; each row sums to about 1, or to 0."""
    wide = wide_dtype(query.dtype)
    a = jax.nn.relu(jnp.einsum("btm,bsm->bts", query, keys, preferred_element_type=wide))
    if mask is not None:
        a = a * (mask != 0).astype(wide)[:, None, :]
    if causal:
        a = jnp.tril(a)
    return a / (a.sum(-1, keepdims=True) + eps)


def interaction(
    guide: Float[Array, "b t m"],
    feature: Float[Array, "b t m"],
    mask: Int[Array, "b t"] | None = None,
    *,
    eps: float = 1e-6,
    causal: bool = False,
) -> Float[Array, "b t m"]:
    """F' = (A + I) F, the feature set in order by the guide."""
    a = weights(guide, feature, mask, eps=eps, causal=causal).astype(feature.dtype)
    return feature + jnp.einsum("bts,bsm->btm", a, feature)


def pooled(
    x: Float[Array, "b t m"], mask: Int[Array, "b t"] | None = None, *, causal: bool = False
) -> Float[Array, "b s m"]:
    """The mean over valid positions, (b, 1, m); where causal, over those up to each, (b, t, m). In float32."""
    wide = wide_dtype(x.dtype)
    weight = jnp.ones((1, x.shape[1], 1), wide) if mask is None else (mask != 0).astype(wide)[:, :, None]
    x = x.astype(wide) * weight
    total, count = (jnp.cumsum(y, axis=1) if causal else y.sum(1, keepdims=True) for y in (x, weight))
    return total / jnp.maximum(count, 1)


def confidence(
    gate: Float[Array, "m"],
    guide: Float[Array, "b t m"],
    features: Sequence[Float[Array, "b t m"]],
    mask: Int[Array, "b t"] | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "b s n"]:
    """c of the n features, which sums to 1 over them; s = 1, or t where causal."""
    g = pooled(guide, mask, causal=causal) * gate.astype(wide_dtype(guide.dtype)).reshape(1, 1, -1)
    scores = [(g * pooled(f, mask, causal=causal)).sum(-1) for f in features]
    return jax.nn.softmax(jnp.stack(scores, axis=-1), axis=-1)


def parallel(
    phi: Mapping[str, Any],
    states: Sequence[Float[Array, "b t d"]],
    mask: Int[Array, "b t"] | None = None,
    memory: tuple[Float[Array, "b s m"], Int[Array, "b s"] | None] | None = None,
    *,
    eps: float = 1e-6,
    causal: bool = False,
    interact: bool = True,
    confident: bool = True,
    remat: bool = False,
    plain: bool = False,
) -> Float[Array, "b t m"]:
    """F_N + P(Σ_i c_i F'_i), what `up` brings back to the model's width.

    Args:
      phi: one stack's part of the delta.
      states: h, of which the last is the guide's; at least that one.
      mask: 1 at valid positions.
      memory: Y and its mask, in a decoder that has "cross" in phi.
      eps, causal: see the module.
      interact, confident: False for A = 0 and for c = 1/n.
      remat: recomputes the maps A_i in the backward pass instead of keeping the n of them.
      plain: norms that forward mode passes.
    """
    down = lambda i: side.layer_norm(
        side.of(phi["down_norm"], i), side.linear(side.of(phi["down"], i), states[i]), plain=plain
    )
    features = [down(i) for i in range(len(states))]
    guide, n = features.pop(), len(states) - 1
    if not n:
        return guide

    def crossed(i: int, f: Array) -> Array:
        if memory is None:
            return f
        y, y_mask = memory
        related = jnp.einsum("bts,bsm->btm", weights(f, y, y_mask, eps=eps).astype(y.dtype), y)
        related = side.linear(side.of(phi["cross"], i), related)
        return f + side.layer_norm(side.of(phi["cross_norm"], i), related, plain=plain)

    def ordered(f: Array) -> Array:
        return interaction(guide, f, mask, eps=eps, causal=causal) if interact else f

    features = [crossed(i, f) for i, f in enumerate(features)]
    if confident:
        c = confidence(phi["gate"], guide, features, mask, causal=causal).astype(guide.dtype)
    else:
        c = jnp.full((1, 1, n), 1 / n, guide.dtype)
    once = jax.checkpoint(ordered) if remat else ordered
    total = sum((c[:, :, i : i + 1] * once(f) for i, f in enumerate(features)), jnp.zeros_like(guide))
    if "merge_in" in phi:
        total = jax.nn.relu(side.linear(phi["merge_in"], total))
    return guide + side.layer_norm(phi["merge_norm"], side.linear(phi["merge"], total), plain=plain)


def up(
    phi: Mapping[str, Any], x: Float[Array, "b t m"], kind: Kind = "vqa", plain: bool = False
) -> Float[Array, "b t d"]:
    """Up of a kind; phi is the whole delta."""
    y = side.linear(phi["up"], jax.nn.relu(x) if FORMS[kind].relu else x)
    return side.layer_norm(phi["up_norm"], y, plain=plain) if FORMS[kind].norm else y


# ---------------------------------------------------------------------------------------------------------- the method


@register(
    family="adapt", paper="Diao et al., CVPR 2024", mechanism="reader", mergeable=False, exact_start=False, rate=3e-3
)
def unipt(
    reduction: int = 2,
    *,
    kind: Kind = "vqa",
    states: Sequence[int] | None = None,
    interact: bool = True,
    confident: bool = True,
    causal: bool | None = None,
    std: float | None = None,
    name: str = "unipt",
) -> Method:
    """Universal parallel tuning; see the module for the equations. Train the head along: `chain(unipt(), head())`.

    Works on every model of `jaxpeft.models`, in each of its layouts, through whatever other methods wrap it (on CLIP, one
    tower at a time), and on any function that marks "embedded", "hidden" and "final_hidden" (`readers.named`), whose
    padding mask is then the keyword `attention_mask`. Where the model's config recomputes layers, the maps are
    recomputed too.

    Args:
      reduction: rho; m = d // rho.
      kind: "vqa" (classification), "retrieval" or "grounding".
      states: which states are read besides the last: 0 is the embedding's output, i the i-th layer's. None: all; (): the
        guide alone, y = Up(F_N).
      interact: False leaves A out, F'_i = F_i.
      confident: False weights all layers alike.
      causal: whether positions see only those up to their own; None: as the model's config says, no where it has none.
      std: of the linear layers at the start, with zero biases; None draws them as linear layers are.
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is {"side": {"down": {"kernel" (n + 1, d, m), "bias"}, "down_norm", "gate" (m,), "merge",
      "merge_norm"}, "up"}, with "merge_in" and "up_norm" where the kind has them, and "encoder" and "decoder" (which has
      "cross" and "cross_norm") in place of "side" for encoder-decoders. It does not merge.

    Raises:
      ValueError: an option out of range; at `init`, a reduction over the model's width, a state that it does not have; a
        model whose last layer does not compute all positions.
      TapError: the model does not mark its hidden states.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(get_args(Kind))}")
    if reduction < 1:
        raise ValueError(f"reduction {reduction}: expected 1 or more")
    form = FORMS[kind]

    def read_of(seen: Sequence[Any], stack: side.Stack) -> list[Any]:
        """The states that are read, the guide's last."""
        last = len(seen) - 1
        targets = range(last) if states is None else states
        if last in targets:
            raise ValueError(f"states={list(targets)}: state {last}, the last, is the guide and no target")
        return side.picked(seen, [*targets, last], stack, "besides its guide")

    def start(key: Key[Array, ""], call: Call) -> Delta:
        stacks = side.stacks(structure(call.apply_fn, call.params, call.inputs, call.kwargs))
        if len(stacks) > 1 and states is not None and not len(states):
            raise ValueError(
                "states=(): in an encoder-decoder the decoder's states read the encoder's: take at least one"
            )
        out: dict[str, Any] = {}
        for stack in stacks:
            seen = read_of(side.states(call, stack), stack)
            d, n, dtype = seen[-1].shape[-1], len(seen) - 1, wide_dtype(seen[-1].dtype)
            if reduction > d:
                raise ValueError(f"reduction {reduction} leaves nothing of the model's width {d}")
            m = d // reduction

            def drawn(part: str, i: int, o: int, *many: int, at: str = stack.name, dtype: Any = dtype) -> Any:
                return side.linear_start(site_key(key, f"{at}/{part}"), i, o, std, dtype, many)

            phi: dict[str, Any] = {"down": drawn("down", d, m, n + 1), "down_norm": side.norm_start(m, dtype, (n + 1,))}
            if n:
                phi |= {"merge": drawn("merge", d if form.hidden else m, m), "merge_norm": side.norm_start(m, dtype)}
            if n and form.hidden:
                phi["merge_in"] = drawn("merge_in", m, d)
            if n and confident:
                phi["gate"] = drawn("gate", m, 1)["kernel"][:, 0]
            if n and stack.name == "decoder":
                phi |= {"cross": drawn("cross", m, m, n), "cross_norm": side.norm_start(m, dtype, (n,))}
            out[stack.name] = phi
            out["up"] = drawn("up", m, d, at="")
            if form.norm:
                out["up_norm"] = side.norm_start(d, dtype)
        return out

    def answer(delta: Delta, found: Structure | None, taps: Taps) -> Float[Array, "b t d"]:
        plain, remat = (found is not None and getattr(found.config, n) for n in ("plain", "remat"))
        memory, x = None, None
        for stack in side.stacks(found):
            seen = read_of(side.state_taps(taps, stack), stack)
            mask = side.mask_of(taps, stack, seen[-1].shape[1])
            x = parallel(
                delta[stack.name],
                seen,
                mask,
                memory,
                eps=form.eps,
                causal=stack.causal if causal is None else causal,
                interact=interact,
                confident=confident,
                remat=remat,
                plain=plain,
            )
            memory = (x, mask)
        assert x is not None
        return up(delta, x, kind, plain)

    def wrap(apply_fn: ApplyFn, delta: Delta, mode: Mode) -> ApplyFn:
        def run(params: Params, *inputs: Any, **kwargs: Any) -> Any:
            found = structure(apply_fn, params, inputs, kwargs)
            stacks = side.stacks(found)
            names = [f"{stack.tap}{n}" for stack in stacks for n in ("embedded", "hidden")]
            at = f"{stacks[-1].tap}final_hidden"
            answers = [(at, lambda taps: answer(delta, found, taps))]
            return side.answering(apply_fn, found, names, answers)(params, *inputs, **kwargs)

        return run

    config = dict(
        method="unipt",
        name=name,
        reduction=reduction,
        kind=kind,
        states=None if states is None else list(states),
        interact=interact,
        confident=confident,
        causal=causal,
        std=std,
    )
    return Method(name, start, wrap, None, config)
