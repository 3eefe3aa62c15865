"""SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited Transfer Learning (Diao et al., ECCV 2024,
arXiv:2407.07523).

Two routes. The early one sums up the frozen states of the shallow layers, token by token, with weights that discount layers
which say the same; the late one gives the sum to the last frozen layer as its input. The backward pass goes through that
layer, which stays as it is, and no further.

    X = (x_0, ..., x_L')                     x_0: the embedding's output, x_i: the i-th layer's, L' = L - late
    z_i = Down_i(x_i)                        (b, t, m)
    q = z_L'; S = (z_0, ..., z_{L'-1})       the deep guide and the shallow states, at each position
    R_i = Σ_j relu(cos(S_i, S_j))            redundancy, over all shallow j: 1 <= R_i <= |S|
    a_i = relu(w · (S_i * q) + b) / R_i
    alpha_i = a_i / (Σ_j a_j + eps)          may be 0 for all i: then v = q
    v = Σ_i alpha_i S_i + q
    u = O(relu(v)) + tanh(g / T) x_L'        g = 0 at the start: the late layers see O(relu(v)) alone
    y = Layer_L(... Layer_{L'+1}(u))         the model's own, its masks, norms and head as they are

    kind         Down_i(x)                                    O                             eps
    vqa          (W2 h + b2 + h) σ(W3 h + b3),                Linear(m -> d)                1e-6
                 h = relu(W1 x + b1)
    retrieval    LN(W x + b)                                  Linear(m -> d), LN(1e-12)     1e-8
    grounding    LN(W x + b)                                  Linear(m -> d), LN            1e-6

and grounding has v = MLP(Σ_i alpha_i S_i) + q, with MLP: Linear(m -> d), relu, Linear(d -> m), LN.

In an encoder-decoder (T5) both stacks have such a module. The encoder's reads its last layer too, and LN(u) with a norm of
its own (`memory_norm`) is what the late decoder layers attend to; the layers before them attend to the frozen encoder's
states. The decoder's last norm is trained anew (`final_norm`). The output head is the model's.

Reference code: Paranioar/SHERL @36b4496 (CLIP-ViL/src/lxrt/modeling.py, VSE-infty/lib/adapter_for_transformer.py and
encoders.py, MDETR/models/transformer.py, Ladder-Side-Tuning/.../modeling_side_t5.py). Departures: any number of late
layers, where the code has one. A zero state counts as like itself (R = 1), where the reference divides by zero. Linear
layers start as they do by default in the reference's library (its VQA code: `std=0.02`). No dropout unless given (its
text retrieval: 0.1). The frozen layers drop out as the call says, not always in training. Encoder-decoders have the
wiring of T5 in all kinds. Not here: the variants for ResNets, CLIP's single vectors and MDETR's queries.

Letters: b batch, t positions, d width, m = d // reduction, n states read.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpeft import trees
from jaxpeft.adapt import side
from jaxpeft.adapt.structure import argument, structure
from jaxpeft.method import ApplyFn, Call, Delta, Method, Mode, Params, register, site_key
from jaxpeft.models.encoder_decoder import CrossBlock
from jaxpeft.models.layers import Norm
from jaxpeft.readers import At, Taps
from jaxpeft.trees import wide_dtype

__all__ = ["down", "mtsa", "redundancy", "sherl", "shares"]

Kind = Literal["vqa", "retrieval", "grounding"]


class Form(NamedTuple):
    """What the kinds differ in: whether Down is gated, the sum goes through an MLP, eps of O's norm (None: none), eps."""

    gated: bool
    mlp: bool
    norm: float | None
    eps: float


FORMS = {
    "vqa": Form(True, False, None, 1e-6),
    "retrieval": Form(False, False, 1e-12, 1e-8),
    "grounding": Form(False, True, 1e-5, 1e-6),
}


# ------------------------------------------------------------------------------------------------------ pure functions


def down(phi: Mapping[str, Any], x: Float[Array, "b t d"], plain: bool = False) -> Float[Array, "b t m"]:
    """z of one state; phi is of one layer and has "gate" and "inner" where Down is gated, else "norm"."""
    u = side.linear(phi["down"], x)
    if "norm" in phi:
        return side.layer_norm(phi["norm"], u, plain=plain)
    u = jax.nn.relu(u)
    return (side.linear(phi["inner"], u) + u) * jax.nn.sigmoid(side.linear(phi["gate"], u))


def redundancy(shallow: Float[Array, "b t s m"], eps: float = 1e-6) -> Float[Array, "b t s"]:
    """R in float32, between 1 and s."""
    x = shallow.astype(wide_dtype(shallow.dtype))
    square = jnp.square(x).sum(-1, keepdims=True)
    # The square root's slope at zero is infinite, and a vector of zeros is what relus may leave.
    some = square > 0
    norm = jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)
    unit = x / (norm + eps)
    r = jax.nn.relu(jnp.einsum("btim,btjm->btij", unit, unit)).sum(-1)
    return jnp.where(some[..., 0], r, 1)


def shares(
    phi: Mapping[str, Any],
    shallow: Float[Array, "b t s m"],
    guide: Float[Array, "b t m"],
    *,
    eps: float = 1e-6,
    discount: bool = True,
) -> Float[Array, "b t s"]:
    """alpha in float32: at each position they sum to about 1, or are all 0. phi is {"kernel": (m, 1), "bias": (1,)}."""
    wide = wide_dtype(shallow.dtype)
    w = phi["kernel"][:, 0].astype(wide).reshape(1, 1, -1)
    score = jnp.einsum("btsm,btm->bts", shallow.astype(wide), guide.astype(wide) * w)
    a = jax.nn.relu(score + phi["bias"].astype(wide).reshape(1, 1, 1))
    if discount:
        a = a / redundancy(shallow, eps)
    return a / (a.sum(-1, keepdims=True) + eps)


def mtsa(
    phi: Mapping[str, Any],
    states: Sequence[Float[Array, "b t d"]],
    residual: Float[Array, "b t d"],
    *,
    kind: Kind = "vqa",
    temperature: Any = 0.1,
    discount: bool = True,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
    plain: bool = False,
) -> Float[Array, "b t d"]:
    """u, the multi-tiered sensing adapter.

    Args:
      phi: one stack's part of the delta.
      states: X, at least two, the deep guide's last.
      residual: x_L', which the gate lets in.
      kind, temperature: see the module.
      discount: False leaves redundancy out, R = 1.
      dropout: on O's output, where there is a key.
      key: of dropout.
      plain: norms that forward mode passes.
    """
    form = FORMS[kind]
    z = [down(side.of(phi["down"], i), x, plain) for i, x in enumerate(states)]
    guide, shallow = z[-1], jnp.stack(z[:-1], axis=2)
    alpha = shares(phi["score"], shallow, guide, eps=form.eps, discount=discount)
    v = jnp.einsum("bts,btsm->btm", alpha.astype(shallow.dtype), shallow)
    if form.mlp:
        v = side.linear(phi["merge"], jax.nn.relu(side.linear(phi["merge_in"], v)))
        v = side.layer_norm(phi["merge_norm"], v, plain=plain)
    u = side.linear(phi["out"], jax.nn.relu(v + guide))
    if form.norm is not None:
        u = side.layer_norm(phi["out_norm"], u, form.norm, plain)
    gate = jnp.tanh(phi["gate"] / temperature).astype(u.dtype)
    return side.drop(u, dropout, key) + gate * residual.astype(u.dtype)


# ---------------------------------------------------------------------------------------------------------- the method


@register(
    family="adapt", paper="Diao et al., ECCV 2024", mechanism="reader", mergeable=False, exact_start=False, rate=3e-3
)
def sherl(
    reduction: int = 2,
    *,
    kind: Kind = "vqa",
    late: int = 1,
    states: Sequence[int] | None = None,
    discount: bool = True,
    temperature: Any = 0.1,
    dropout: float = 0.0,
    std: float | None = None,
    name: str = "sherl",
) -> Method:
    """SHERL; see the module for the equations. Train the head along: `chain(sherl(), head())`.

    Works on every model of `jaxpeft.models`, in each of its layouts, through whatever other methods wrap it (on CLIP, one
    tower at a time), and on any function that marks "embedded" and "hidden" (`readers.named`). The late layers run as
    the model and what is below this method have them; where layers are scanned, their weights are held once more. At the
    start the model is not the pretrained one.

    Args:
      reduction: d / m.
      kind: "vqa" (classification; language), "retrieval" or "grounding".
      late: layers that u passes through; 0 gives u to the model's last norm and head.
      states: which are read: 0 is the embedding's output, i the i-th layer's. None: all that there are before the late
        layers. The last of them is the deep guide. In an encoder-decoder the decoder leaves out those of its late layers.
      discount: False leaves redundancy out, R = 1.
      temperature: T of the gate; may be traced.
      dropout: on O's output and an encoder-decoder's side memory, where `apply` is given a `dropout_key`.
      std: of the linear layers at the start, with zero biases; None draws them as linear layers are.
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is {"side": {"down": {"down", "inner", "gate"} or {"down", "norm"} (each stacked over n), "score",
      "out", "gate" ()}}, with "out_norm", "merge_in", "merge" and "merge_norm" where the kind has them; for
      encoder-decoders "encoder" (with "memory_norm") and "decoder" (with "final_norm") in place of "side". It does not
      merge.

    Raises:
      ValueError: an option out of range; at `init`, a reduction over the model's width, a state that it does not have,
        fewer than two to read.
      TapError: the model does not mark its hidden states.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(get_args(Kind))}")
    if reduction < 1:
        raise ValueError(f"reduction {reduction}: expected 1 or more")
    if late < 0:
        raise ValueError(f"late {late}: expected 0 or more layers")
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"temperature {temperature}: expected a positive number")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}: expected a probability in [0, 1)")
    form = FORMS[kind]

    def read_of(seen: Sequence[Any], stack: side.Stack) -> list[Any]:
        """The states that are read out of those before the late layers, the deep guide's last."""
        own = states
        if own is not None and stack.name == "decoder":
            own = [i for i in own if i < len(seen)]
        read = side.picked(seen, own, stack, "before its late layers")
        if len(read) < 2:
            raise ValueError(
                f"states={states}, late={late}: {len(read)} of the {len(seen)} states that the {stack.name} has before its "
                "late layers; at least two are needed, one of them as the guide"
            )
        return read

    def start(key: Key[Array, ""], call: Call) -> Delta:
        stacks = side.stacks(structure(call.apply_fn, call.params, call.inputs, call.kwargs))
        if len(stacks) > 1 and not late:
            raise ValueError("late 0: in an encoder-decoder only late layers read the encoder's side memory; take 1")
        out: dict[str, Any] = {}
        for stack in stacks:
            seen = side.states(call, stack)
            # The encoder has no late layers: what reads its side memory are the decoder's.
            before = len(seen) - (0 if stack.name == "encoder" else late)
            n = len(read_of(seen[: max(before, 0)], stack))
            d, dtype = seen[0].shape[-1], wide_dtype(seen[0].dtype)
            if reduction > d:
                raise ValueError(f"reduction {reduction} leaves nothing of the model's width {d}")
            m = d // reduction

            def drawn(part: str, i: int, o: int, *many: int, at: str = stack.name, dtype: Any = dtype) -> Any:
                return side.linear_start(site_key(key, f"{at}/{part}"), i, o, std, dtype, many)

            first = {"down": drawn("down", d, m, n)}
            if form.gated:
                first |= {"inner": drawn("inner", m, m, n), "gate": drawn("gate", m, m, n)}
            else:
                first["norm"] = side.norm_start(m, dtype, (n,))
            phi: dict[str, Any] = {"down": first, "score": drawn("score", m, 1), "out": drawn("out", m, d)}
            phi["gate"] = jnp.zeros((), dtype)
            if form.mlp:
                phi |= {"merge_in": drawn("merge_in", m, d), "merge": drawn("merge", d, m)}
                phi["merge_norm"] = side.norm_start(m, dtype)
            if form.norm is not None:
                phi["out_norm"] = side.norm_start(d, dtype)
            if len(stacks) > 1:
                phi["memory_norm" if stack.name == "encoder" else "final_norm"] = {"scale": jnp.ones((d,), dtype)}
            out[stack.name] = phi
        return out

    def wrap(apply_fn: ApplyFn, delta: Delta, mode: Mode) -> ApplyFn:
        def run(params: Params, *inputs: Any, **kwargs: Any) -> Any:
            found = structure(apply_fn, params, inputs, kwargs)
            stacks = side.stacks(found)
            plain = found is not None and found.config.plain
            key_of = lambda place: None if mode.dropout_key is None else site_key(mode.dropout_key, place)
            options: dict[str, Any] = dict(kind=kind, temperature=temperature, discount=discount, plain=plain)

            def summed(stack: side.Stack, taps: Taps) -> Array:
                seen = side.state_taps(taps, stack)
                read = read_of(seen, stack)
                residual = read[-1] if stack.name == "encoder" else seen[-1]
                return mtsa(delta[stack.name], read, residual, dropout=dropout, key=key_of(stack.name), **options)

            def memory(taps: Taps) -> Array:
                assert found is not None
                y = Norm(found.config).apply({"params": delta["encoder"]["memory_norm"]}, summed(stacks[0], taps))
                assert isinstance(y, jax.Array)
                return side.drop(y, dropout, key_of("memory"))

            last = stacks[-1]
            names = [f"{stack.tap}{n}" for stack in stacks for n in ("embedded", "hidden")]
            answers: list[tuple[At, Any]] = [((f"{last.tap}hidden", -1 - late), lambda taps: summed(last, taps))]
            inside = ()
            if len(stacks) > 1:
                inside = ((CrossBlock, "memory"),)
                answers += [((argument("memory"), -1 - i), memory) for i in range(late)]
                params = _with_final_norm(params, delta["decoder"]["final_norm"]["scale"])
            return side.answering(apply_fn, found, names, answers, inside)(params, *inputs, **kwargs)

        return run

    config = dict(
        method="sherl",
        name=name,
        reduction=reduction,
        kind=kind,
        late=late,
        states=None if states is None else list(states),
        discount=discount,
        temperature=temperature,
        dropout=dropout,
        std=std,
    )
    return Method(name, start, wrap, None, config)


def _with_final_norm(params: Params, scale: Float[Array, "d"]) -> Params:
    """`params` with another scale in the decoder's last norm."""
    leaves = trees.by_path(params)
    (path,) = trees.matches("**/decoder/final_norm/scale", leaves, "parameter")
    return trees.replace_leaves(params, {path: scale.astype(leaves[path].dtype)})
