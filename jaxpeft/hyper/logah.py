"""LoGAH (Zhou et al., 2024): a network that reads a model's computational graph and predicts all of its weights.

    x  = encode(graph)                                          an embedding (d,) for each node, see `graphormer`
    Z  = MLP(x) as (2r, r),   Y = relu(Z) Pᵀ + p                (2r, K), read row by row as (2K, r)
    A  = the first K rows, B = the last K                       (K, r) each
    W  = A[:c_out k_h] B[:c_in k_w]ᵀ                            then (c_out, k_h, c_in, k_w) with its middle axes swapped

One set of weights serves every architecture: a `GraphHyperNetwork` is trained over many, and `logah` is its face for one
target. GHN-3's decoder predicts a block (b, b, S, S) from each embedding, d² numbers of it at a time, and tiles it over wider
layers; LoGAH's predicts factors as long as the layers are wide, so nothing repeats, with K r numbers for its longest matrix
where a block as wide would take 8 d b².

What is predicted is brought to the scale of an initialisation:

    matrices    √(β / fan-in) W        β = 2, for depth-wise kernels and windows lower than wide 1         "fan_in", ViT's
                std W / (deviation + 1e-7)     the deviation is differentiated as well                     "std", GPT's
    scales      2 σ(p / 2),   biases tanh(p / 5);   tables of embeddings and positions stay as they are

Letters: d width, r rank, K reach, G a group of nodes whose tensors are alike, decoded in one vmap.

Nodes that stand alike in a graph, as query and key of one shape do, get the same weights: fuse them into one matrix, or go on
from `with_noise`.

Only as many rows of Y are made as are needed: the (2r, K) → (2K, r) reading is of memory, so that the first m rows of A lie in
the first ⌈m r / K⌉ rows of Y. Where K is far over the widths, one row of Z, r numbers, is all that a matrix is made from.

Reference code: Blackzxy/LoGAH @ 68c5a83 and SamsungSAILMontreal/ghn3 @ b3289ac. Departures: class heads, which need the number
of classes in the weights, are decoded like other layers; class tokens are predicted, not drawn; a matrix (1, 1) has deviation
0 instead of none; windows larger than the full decoder's are refused, not interpolated; no layer is made that is not used.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from jaxpeft import trees
from jaxpeft.hyper.graph import Graph, Slot
from jaxpeft.hyper.graph_decoders import Sizes, factors, full, full_start, kernel, low_rank_start, vector
from jaxpeft.hyper.graphormer import dense_start, encode, encoder_start, vocabulary
from jaxpeft.hyper.hypernetwork import Hypernetwork, TargetError, as_spec, register_hypernetwork, split_target
from jaxpeft.weights.factored import Factor, Factored, Term, names

__all__ = ["SIZES", "GraphHyperNetwork", "frobenius", "logah", "logah_network", "with_noise"]

SIZES = {"tiny": (64, 3, 8, 32), "small": (128, 5, 16, 90), "base": (256, 5, 16, 128), "large": (256, 12, 16, 256)}


class GraphHyperNetwork(NamedTuple):
    """A hypernetwork for any number of architectures.

    Attributes:
      init: `(key) -> weights`: {"encoder", "decoder", "vectors"}, the last only if they have a decoder of their own.
      encode: `(weights, graph) -> (N, d)`, embeddings of the nodes.
      decode: `(weights, embeddings, slots, factored=False) -> {(path, index): tensor}`, some slots of a graph alone: a large
        target is predicted part by part without ever being whole.
      predict: `(weights, graph, spec, base=None) -> params` like `spec`; leaves that are not floating point are `base`'s.
      factored: as `predict`, with matrices that stay products.
      config: plain data.
    """

    init: Callable[[Key[Array, ""]], PyTree]
    encode: Callable[[PyTree, Graph], Float[Array, "N d"]]
    decode: Callable[..., dict[tuple[str, tuple[int, ...]], Any]]
    predict: Callable[..., PyTree]
    factored: Callable[..., PyTree]
    config: Mapping[str, Any]


def logah_network(
    size: str | Sizes = "tiny",
    *,
    decoder: Literal["low_rank", "full"] = "low_rank",
    vectors: Literal["low_rank", "mlp"] = "low_rank",
    scaling: Literal["fan_in", "std"] = "fan_in",
    reach: int = 32768,
    block: tuple[int, int] = (64, 16),
    std: float = 0.02,
    classes: int = 10,
    channels: tuple[int, ...] = (),
) -> GraphHyperNetwork:
    """A graph hypernetwork: LoGAH, or with `decoder="full"` GHN-3.

    Args:
      size: a name in `SIZES`, or (d, layers, heads, r).
      decoder: of everything but vectors.
      vectors: biases, scales and tokens of c numbers by the low-rank decoder as a tensor (2c, 1, 1, 1), or by an MLP of their
        own, tiled beyond its d / 2 (full: b) numbers; "full" has only the latter.
      scaling: see the module.
      reach: K, the largest c k that is predicted without tiling.
      block: (b, S) of the full decoder.
      std: of matrices with `scaling="std"`.
      classes, channels: sizes with an embedding of their own, besides the usual ones.

    Raises:
      ValueError: an unknown name; sizes under 1, a width that 4 or the heads do not divide; vectors by the low-rank decoder
        where there is none.
    """
    d, layers, heads, rank = _checked_size(size, decoder, vectors, scaling)
    if min(reach // 2, *block, classes) < 1:
        raise ValueError(f"reach {reach}, block {block}, classes {classes}: sizes are at least 1, the reach at least 2")
    words = vocabulary(classes, channels)
    own = max(1, block[0] if decoder == "full" else d // 2)

    def init(key: Key[Array, ""]) -> PyTree:
        first, second, third = jax.random.split(key, 3)
        weights = {"encoder": encoder_start(first, d, layers, heads, words)}
        weights["decoder"] = (
            full_start(second, d, block) if decoder == "full" else low_rank_start(second, d, rank, reach)
        )
        if vectors == "mlp":
            keys = jax.random.split(third)
            weights["vectors"] = [dense_start(keys[0], d, 2 * d), dense_start(keys[1], 2 * d, 2 * own, small=True)]
        return weights

    def decode(weights: PyTree, x: Float[Array, "N d"], slots: Sequence[Slot], factored: bool = False) -> dict:
        made: dict[tuple[str, tuple[int, ...]], Any] = {}
        for kind, group in _groups(slots).items():
            rows = x[np.array([s.node for s in group])]
            if kind.vector:
                both = jax.vmap(lambda e: vector(weights, e, kind.sizes[0]))(rows)
                made |= {(s.path, s.index): both[i, s.part].reshape(s.shape) for i, s in enumerate(group)}
                continue
            if decoder == "full":
                whole = jax.vmap(lambda e: full(weights["decoder"], e, kind.sizes, block))(rows)
                whole = whole * _each(_gain(kind, lambda: jax.vmap(_spread)(whole), scaling, std), whole)
            else:
                a, b = jax.vmap(lambda e: factors(weights["decoder"], e, kind.sizes, rank))(rows)
                gain = _gain(kind, lambda: jax.vmap(_product_spread)(a, b), scaling, std)
                if factored and kind.flat:
                    gain = jnp.broadcast_to(gain, len(group))
                    made |= {(s.path, s.index): (s, a[i], b[i], gain[i]) for i, s in enumerate(group)}
                    continue
                whole = jax.vmap(lambda a, b: kernel(a, b, kind.sizes))(a, b)
                whole = whole * _each(gain, whole)
            made |= {(s.path, s.index): _laid_out(whole[i], s) for i, s in enumerate(group)}
        return made

    def emit(weights: PyTree, graph: Graph, spec: PyTree, base: PyTree = None, factored: bool = False) -> PyTree:
        spec = as_spec(spec)
        others = split_target(spec, base)[1]
        where = _checked_graph(graph, spec)
        made = decode(weights, encode(weights["encoder"], graph, heads, words), graph.slots, factored)
        leaf = lambda path, x: _leaf([made[key] for key in where[path]], x) if path in where else x
        flat, structure = jtu.tree_flatten_with_path(spec)
        leaves = [leaf(trees.path_string(p), x) for p, x in flat]
        kept = jtu.tree_leaves(others, is_leaf=lambda x: isinstance(x, trees.Absent))
        return jtu.tree_unflatten(structure, [y if isinstance(k, trees.Absent) else k for y, k in zip(leaves, kept)])

    config = {
        "size": (d, layers, heads, rank), "decoder": decoder, "vectors": vectors, "scaling": scaling, "reach": reach,
        "block": block, "std": std, "classes": classes, "channels": channels,
    }  # fmt: skip
    return GraphHyperNetwork(
        init, lambda weights, graph: encode(weights["encoder"], graph, heads, words), decode, emit,
        functools.partial(emit, factored=True), config,
    )  # fmt: skip


@register_hypernetwork(paper="Zhou et al., ES-FoMo 2025")
def logah(spec: PyTree, graph: Graph, network: GraphHyperNetwork | None = None, *, base: PyTree = None) -> Hypernetwork:
    """A graph hypernetwork's face for one target.

    Args:
      spec: the target's parameters, as `jax.eval_shape(model.init, ...)` gives them.
      graph: of the same target, as `model_graph` reads it.
      network: whose weights may be shared by many targets; None: `logah_network()`.
      base: whose leaves that are not floating point are kept.

    Returns:
      A hypernetwork: `apply(weights)`, without a condition, and `factored(weights)`, whose matrices stay products.

    Raises:
      TargetError: as `split_target`; a graph of another target.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxpeft.hyper import model_graph
      >>> spec = {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.float32)}
      >>> graph = model_graph(lambda p, x: x @ p["kernel"], spec, jnp.ones((2, 4)))
      >>> hyper = logah(spec, graph, logah_network((8, 1, 2, 4), reach=64))
      >>> hyper.apply(hyper.init(jax.random.key(0)))["kernel"].shape
      (4, 3)
    """
    network = logah_network() if network is None else network
    split_target(spec, base)
    _checked_graph(graph, as_spec(spec))
    return Hypernetwork(
        "logah",
        network.init,
        lambda weights, condition=None: network.predict(weights, graph, spec, base),
        as_spec(spec),
        network.config,
        lambda weights, condition=None: network.factored(weights, graph, spec, base),
    )


def frobenius(params: PyTree) -> Float[Array, ""]:
    """Σ ‖p‖ over the tensors, not squared: the penalty of training, 3e-5 times in the reference; its gradient at 0 is 0."""
    squares = [jnp.square(x).sum() for x in jax.tree.leaves(params)]
    return sum((jnp.where(s > 0, jnp.sqrt(jnp.where(s > 0, s, 1.0)), 0.0) for s in squares), jnp.zeros(()))


def with_noise(key: Key[Array, ""], params: PyTree, beta: Any = 1e-5) -> PyTree:
    """Predicted weights with normal noise of `beta` times each tensor's deviation, for training to go on from.

    Nodes that a graph cannot tell apart (a query and a key of one shape, rows that a decoder tiles) are predicted alike, and
    units that are alike have one gradient and stay so. (The reference's option, with its 1e-5.)
    """
    flat = trees.by_path(params)
    keys = dict(zip(flat, jax.random.split(key, len(flat)), strict=True))

    def noisy(path: str, x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x + (beta * x.std() * jax.random.normal(keys[path], x.shape)).astype(x.dtype)

    return trees.replace_leaves(params, {p: noisy(p, x) for p, x in flat.items()})


# ------------------------------------------------------------------------------------------------------ which are alike


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What slots that are decoded together have in common."""

    sizes: Sizes
    vector: bool
    raw: bool = False  # a table, which is not scaled
    beta: float = 2.0
    flat: bool = False  # no window, so that it can stay a product


def _groups(slots: Sequence[Slot]) -> dict[_Kind, list[Slot]]:
    groups: dict[_Kind, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(_kind(slot), []).append(slot)
    return groups


def _kind(slot: Slot) -> _Kind:
    if slot.op in ("norm", "scale", "bias", "token", "parameter") and sum(n > 1 for n in slot.shape) <= 1:
        return _Kind((int(np.prod(slot.shape)), 1, 1, 1), True)
    sizes, windowed = slot.sizes, bool(set(slot.roles) & set("hw"))
    beta = 1.0 if windowed and (sizes[1] == 1 or sizes[2] < sizes[3]) else 2.0
    return _Kind(sizes, False, slot.op in ("embedding", "position"), beta, not set(slot.roles) & set("hwn"))


def _gain(kind: _Kind, spread: Callable[[], Array], scaling: str, std: float) -> Float[Array, "#G"]:
    if kind.raw:
        return jnp.ones(1)
    if scaling == "fan_in":
        return jnp.full(1, (kind.beta / np.prod(kind.sizes[1:])) ** 0.5)
    return std / (spread() + 1e-7)


def _each(gain: Float[Array, "#G"], whole: Float[Array, "G ..."]) -> Array:
    return gain.reshape(-1, *(1,) * (whole.ndim - 1))


def _deviation(squares: Float[Array, ""], n: int) -> Float[Array, ""]:
    """Of n numbers whose squared distances from their mean have this sum."""
    return jnp.sqrt(jnp.maximum(squares / max(n - 1, 1), 1e-30))


def _spread(w: Array) -> Float[Array, ""]:
    return _deviation(jnp.square(w - w.mean()).sum(), w.size)


def _product_spread(a: Float[Array, "m r"], b: Float[Array, "n r"]) -> Float[Array, ""]:
    """The deviation of the entries of a bᵀ, which is not formed; a sum of squares alone, so that nothing cancels."""
    m, n = a.shape[0], b.shape[0]
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = a - mean_a, b - mean_b
    squares = ((a.T @ a) * (b.T @ b)).sum() + n * jnp.square(a @ mean_b).sum() + m * jnp.square(b @ mean_a).sum()
    return _deviation(squares, m * n)


# ------------------------------------------------------------------------------------------------------------ the leaves


def _laid_out(w: Float[Array, "c_out c_in k_h k_w"], slot: Slot) -> Array:
    """A tensor in its leaf's own order of axes; the first rows of a table of positions without a place are the last's."""
    order = sorted(range(len(slot.roles)), key=lambda i: "oihwn.".index(slot.roles[i]))
    if "n" in slot.roles:
        order = sorted(order, key=lambda i: "nohwi.".index(slot.roles[i]))
        places = int(np.prod([n for n, r in zip(slot.shape, slot.roles) if r == "n"]))
        grid = w[0].reshape(w.shape[1], -1).T
        w = grid[(np.arange(places) - places) % len(grid)]
    return w.reshape([slot.shape[i] for i in order]).transpose(np.argsort(order))


def _leaf(parts: Sequence[Any], x: jax.ShapeDtypeStruct) -> Any:
    """A leaf from its layers' tensors, or from the factors of them."""
    if not isinstance(parts[0], tuple):
        return jnp.stack(parts).reshape(x.shape).astype(x.dtype)
    slot, stacked = parts[0][0], len(x.shape) - len(parts[0][0].shape)
    a, b, gain = (jnp.stack(each).reshape(*x.shape[:stacked], *each[0].shape) for each in zip(*(p[1:] for p in parts)))
    free = names(len(x.shape))
    lead, own = free[:stacked], free[stacked:]

    def factor(role: str, value: Array) -> Factor:
        axes = [i for i, r in enumerate(slot.roles) if r == role]
        shape = (*x.shape[:stacked], *(slot.shape[i] for i in axes), value.shape[-1])
        return Factor(value.reshape(shape).astype(x.dtype), lead + "".join(own[i] for i in axes) + "r")

    term = Term((factor("i", b), Factor(gain.astype(x.dtype), lead), factor("o", a)))
    return Factored((term,), (), (*lead, *("" if r == "." else c for r, c in zip(slot.roles, own))))


def _checked_graph(graph: Graph, spec: PyTree) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """The slots of each leaf, in the order of its layers."""
    where: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    flat = {p: x for p, x in trees.by_path(spec).items() if trees.is_learned(p, x)}
    for slot in sorted(graph.slots, key=lambda s: (s.path, s.index)):
        where.setdefault(slot.path, []).append((slot.path, slot.index))
        x = flat.get(slot.path)
        if x is None or x.shape[len(slot.index) :] != slot.shape:
            found = "nothing" if x is None else list(x.shape)
            raise TargetError(
                f"the graph's {slot.path!r} is {list(slot.shape)}, the specification has {found} there: read the graph of "
                "this specification"
            )
    if missing := sorted(set(flat) - set(where)):
        raise TargetError(f"the graph lacks {missing[0]!r}: read the graph of this specification, and pass its slots")
    return where


def _checked_size(size: str | Sizes, decoder: str, vectors: str, scaling: str) -> Sizes:
    if isinstance(size, str) and size not in SIZES:
        raise ValueError(f"size {size!r}: expected one of {sorted(SIZES)} or (width, layers, heads, rank)")
    d, layers, heads, rank = SIZES[size] if isinstance(size, str) else size
    if min(d, layers, heads, rank) < 1 or d % 4 or d % heads:
        raise ValueError(f"size {size}: at least 1 each, and a width that 4 and the heads divide")
    for name, value, known in (
        ("decoder", decoder, ("low_rank", "full")),
        ("vectors", vectors, ("low_rank", "mlp")),
        ("scaling", scaling, ("fan_in", "std")),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r}: expected {known[0]!r} or {known[1]!r}")
    if decoder == "full" and vectors == "low_rank":
        raise ValueError("the full decoder has no factors to make vectors from: set vectors='mlp'")
    return d, layers, heads, rank
