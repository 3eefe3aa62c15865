"""Polyhistor: Parameter-Efficient Multi-Task Adaptation for Dense Vision Tasks (Liu et al., NeurIPS 2022,
arXiv:2210.03265), and Polyhistor-Lite.

Adapters after each attention and each feed-forward network of a hierarchical transformer, u + gelu(u D + c) U + e with D
(d, n), U (n, d), n = d / rho, where width d and with it a hypernetwork's heads grow from stage to stage. Two remedies:

    decomposed hypernetworks      D = A B,   A = H_A v_t (d, r),   B = H_B v_t (r, n)         v_t (k,): the task's embedding
    layer-wise scaling kernels    D_l = T ⊗ S_l,   T (d_0, n_0),   S_l (s, s),   s = d_l / d_0

Polyhistor decomposes each adapter matrix by a pair of linear heads of its own. Lite has one pair for each kind of matrix,
which makes its template T = A B at the narrowest width d_0 for all layers, and a small kernel S_l for each matrix. U alike.
The biases c and e are each layer's and task's own. Parameters of a pair D, U without biases, with linear heads:

    adapters 2 n d a task     heads of full matrices 2 k n d     Polyhistor 2 k r (n + d)     Lite 2 s², once 2 k r (n_0 + d_0)

Where that takes fewer operations by far (a factor of 8; see `weights.kronecker.lazily`) neither A B nor T ⊗ S is formed: at
d_0 = 96, rho = 4, r = 8 a row with D takes 147,456 multiplications at s = 8, through the factors of Lite 8,192, of Polyhistor
7,680; at s = 2 it takes 9,216 against 2,048 and 1,920, and the matrix is formed, once a step.

No code of the paper is public; its equations are the paper's, what stands around them is read into it: heads with biases
(`head_bias`), r and k, one kernel for all tasks (`kernels="task"`: one each), biases. Start: v ~ N(0, 1); A ~ N(0, 1/d),
B ~ N(0, 1/r) in D; in U A ~ N(0, 1/n), B = 0, so that the adapted model starts as its base; S = I + N(0, 0.01²).

Letters: T tasks (and the template), k embedding, d width, n bottleneck, r rank, s scale.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jaxpeft import trees
from jaxpeft.adapt.vl_adapter import AT, adapters, checked_sharing
from jaxpeft.hyper import Place, emitting, head, head_start, normal, places, zeros
from jaxpeft.method import Call, Delta, Method, register, site_key, stacked_keys
from jaxpeft.weights.kronecker import kronecker, lazily

__all__ = ["decomposed", "decomposed_start", "generate", "generate_lite", "polyhistor", "polyhistor_lite"]

KERNEL_STD = 0.01
SIDES = ("down", "up")


def decomposed_start(
    key: Key[Array, ""], inputs: int, shape: tuple[int, int], rank: int, *, bias: bool = True, zero: bool = False
) -> dict[str, dict[str, Array]]:
    """A pair of heads {"a", "b"} that makes an (i, o) matrix of rank r from an embedding (k,); zero at the start or not."""
    (i, o), root = shape, math.sqrt(inputs)
    pair = {
        "a": head_start(site_key(key, "a"), inputs, (i, rank), normal(1 / (root * math.sqrt(i)))),
        "b": head_start(site_key(key, "b"), inputs, (rank, o), zeros if zero else normal(1 / (root * math.sqrt(rank)))),
    }
    return pair if bias else {n: {"weight": p["weight"]} for n, p in pair.items()}


def decomposed(p: Mapping[str, Mapping[str, Array]], v: Float[Array, "k"]) -> tuple[Array, Array]:
    """The two factors (*stack, i, r), (*stack, r, o) of a pair of heads, each layer's own where they are stacked."""

    def one(p: Mapping[str, Array]) -> Array:
        made = lambda p: head(p, v)
        for _ in range(p["weight"].ndim - 3):
            made = jax.vmap(made)
        return made(p)

    return one(p["a"]), one(p["b"])


def generate(delta: Delta, task: Any) -> Delta:
    """Polyhistor's adapters of one task, `{module path: {"down" (*stack, d, n), "up", ...}}`, not formed where that is
    cheaper."""
    v = jnp.take(delta["task"], task, axis=0, mode="clip")
    one = jnp.ones((1, 1), v.dtype)
    return {
        path: {side: lazily(kronecker(decomposed(pair[side], v), one)) for side in SIDES}
        | _biases_of(delta, task, path)
        for path, pair in delta["heads"].items()
    }


def generate_lite(delta: Delta, task: Any, *, own_kernels: bool = False) -> Delta:
    """Lite's adapters of one task, as `generate`; `own_kernels` where each task has kernels of its own."""
    v = jnp.take(delta["task"], task, axis=0, mode="clip")
    templates = {
        tower: {part: {side: decomposed(pair[side], v) for side in SIDES} for part, pair in parts.items()}
        for tower, parts in delta["heads"].items()
    }

    def matrix(place: Place, side: str, kernel: Array) -> Any:
        s = jnp.take(kernel, task, axis=-3, mode="clip") if own_kernels else kernel
        return lazily(kronecker(templates[place.tower][place.part][side], s))

    return {
        path: {side: matrix(place, side, delta["kernels"][path][side]) for side in SIDES}
        | _biases_of(delta, task, path)
        for path, place in places(delta["kernels"]).items()
    }


def _biases_of(delta: Delta, task: Any, path: str) -> dict[str, Array]:
    own = delta.get("biases", {}).get(path, {})
    return {n: jnp.take(x, task, axis=-2, mode="clip") for n, x in own.items()}


def _stacked(draw: Any, key: Key[Array, ""], stack: tuple[int, ...]) -> PyTree:
    for _ in stack:
        draw = jax.vmap(draw)
    return draw(stacked_keys(key, stack))


def _biases_start(shapes: Mapping[str, Any], tasks: int) -> dict[str, Array]:
    """Zeros of (*stack, T, size)."""
    biases = {n: s for n, s in shapes.items() if n.endswith("_bias")}
    return {n: jnp.zeros((*s.shape[:-1], tasks, s.shape[-1])) for n, s in biases.items()}


def _checked(rank: int, tasks: int, embedding: int, reduction: int) -> None:
    checked_sharing(tasks, "single")
    if rank < 1 or embedding < 1 or reduction < 1:
        raise ValueError(f"rank {rank}, embedding {embedding}, reduction {reduction}: each is at least 1")


@register(
    family="adapt", paper="Liu et al., NeurIPS 2022", mechanism="hooks", mergeable=False, exact_start=True, rate=1e-4
)
def polyhistor(
    rank: int = 8,
    tasks: int = 1,
    *,
    embedding: int = 64,
    reduction: int = 4,
    head_bias: bool = True,
    biases: bool = True,
    activation: str = "gelu",
    at: trees.Pattern = AT,
    name: str = "polyhistor",
) -> Method:
    """Polyhistor: adapters by decomposed hypernetworks, a pair of heads for each matrix; see the module.

    Args:
      rank: r of the generated matrices, at least 1.
      tasks: T; `apply` takes `task=` where there are several.
      embedding: k.
      reduction: rho; the bottleneck is d / rho.
      head_bias: whether heads have a bias, which all tasks share.
      biases: whether adapters have c and e, each layer's and task's own.
      activation: of the bottleneck.
      at: pattern of modules whose output is adapted.
      name: the key of its delta in a chain.

    Returns:
      A method on hooks, delta `{"task": (T, k), "heads": {module path: {"down": {"a": {"weight" (*stack, k, d, r), "bias"},
      "b": {...}}, "up"}}, "biases": {module path: {"down_bias" (*stack, T, n), "up_bias"}}}`. It does not merge; it bakes
      into a task's plain adapters, and starts as its base.

    Raises:
      ValueError: a size below 1, an unknown activation, a width smaller than rho.
      PatternError: no module matches.
    """
    _checked(rank, tasks, embedding, reduction)
    inner = adapters(None, reduction, at, activation=activation, biases=biases, name=name)

    def start(key: Key[Array, ""], shapes: PyTree, call: Call) -> Delta:
        def pair(place: str, side: str, s: Any) -> PyTree:
            draw = lambda k: decomposed_start(k, embedding, s.shape[-2:], rank, bias=head_bias, zero=side == "up")
            return _stacked(draw, site_key(key, f"{place}/{side}"), s.shape[:-2])

        heads = {place: {side: pair(place, side, named[side]) for side in SIDES} for place, named in shapes.items()}
        delta = {"task": jax.random.normal(site_key(key, "task"), (tasks, embedding)), "heads": heads}
        return delta | ({"biases": {p: _biases_start(named, tasks) for p, named in shapes.items()}} if biases else {})

    def emit(delta: Delta, task: Any, key: Any) -> Delta:
        return generate(delta, task)

    config = dict(
        method="polyhistor",
        rank=rank,
        tasks=tasks,
        embedding=embedding,
        reduction=reduction,
        head_bias=head_bias,
        biases=biases,
        activation=activation,
        at=at,
        name=name,
    )
    return emitting(inner, start, emit, config, name=name, tasks=tasks)


@register(
    family="adapt", paper="Liu et al., NeurIPS 2022", mechanism="hooks", mergeable=False, exact_start=True, rate=1e-4
)
def polyhistor_lite(
    rank: int = 8,
    tasks: int = 1,
    *,
    embedding: int = 64,
    reduction: int = 4,
    kernels: Literal["shared", "task", "fixed"] = "shared",
    head_bias: bool = True,
    biases: bool = True,
    activation: str = "gelu",
    at: trees.Pattern = AT,
    name: str = "polyhistor_lite",
) -> Method:
    """Polyhistor-Lite: templates by decomposed hypernetworks, enlarged by each layer's kernel; see the module.

    Args:
      rank: r of the templates, at least 1.
      kernels: "shared" by the tasks, one a "task", or "fixed" at ones / s, which is the ablation without kernels.
      tasks, embedding, reduction, head_bias, biases, activation, at, name: as in `polyhistor`. Every adapted width is a
        multiple of the narrowest one in its tower.

    Returns:
      A method on hooks, delta `{"task": (T, k), "heads": {tower: {part: {"down": {"a", "b"}, "up"}}}, "kernels": {module
      path: {"down": (*stack, [T,] s, s), "up"}}, "biases": as in `polyhistor`}`. It does not merge; it bakes into a task's
      plain adapters, and starts as its base.

    Raises:
      ValueError: a size below 1, an unknown option, widths that the narrowest one does not divide.
      PatternError: no module matches.
    """
    _checked(rank, tasks, embedding, reduction)
    if kernels not in ("shared", "task", "fixed"):
        raise ValueError(f"kernels {kernels!r}: expected 'shared', 'task' or 'fixed'")
    inner = adapters(None, reduction, at, activation=activation, biases=biases, name=name)

    def start(key: Key[Array, ""], shapes: PyTree, call: Call) -> Delta:
        found = places(shapes)
        narrow: dict[str, tuple[int, int]] = {}
        for path, named in shapes.items():
            shape, tower = named["down"].shape[-2:], found[path].tower
            narrow[tower] = min(narrow.setdefault(tower, shape), shape)
        heads: dict[str, Any] = {}
        sized: dict[str, Any] = {}
        for path, named in shapes.items():
            place, (*stack, d, n) = found[path], named["down"].shape
            d0, n0 = narrow[place.tower]
            if d % d0 or n != n0 * (d // d0):
                raise ValueError(
                    f"{path!r} has width {d} and bottleneck {n}, the narrowest of its tower {d0} and {n0}: every width is a "
                    "multiple of it. Narrow the pattern, or take another reduction"
                )
            sized[path] = {
                side: _kernel(site_key(key, f"{path}/{side}"), tuple(stack), tasks, d // d0, kernels) for side in SIDES
            }
            own = heads.setdefault(place.tower, {}).setdefault(place.part, {})
            for side, shape in (("down", (d0, n0)), ("up", (n0, d0))):
                label = site_key(key, f"{place.tower}/{place.part}/{side}")
                own[side] = decomposed_start(label, embedding, shape, rank, bias=head_bias, zero=side == "up")
        delta = {
            "task": jax.random.normal(site_key(key, "task"), (tasks, embedding)),
            "heads": heads,
            "kernels": sized,
        }
        return delta | ({"biases": {p: _biases_start(named, tasks) for p, named in shapes.items()}} if biases else {})

    def emit(delta: Delta, task: Any, key: Any) -> Delta:
        return generate_lite(delta, task, own_kernels=kernels == "task")

    config = dict(
        method="polyhistor_lite",
        rank=rank,
        tasks=tasks,
        embedding=embedding,
        reduction=reduction,
        kernels=kernels,
        head_bias=head_bias,
        biases=biases,
        activation=activation,
        at=at,
        name=name,
    )
    return emitting(inner, start, emit, config, name=name, tasks=tasks)


def _kernel(key: Key[Array, ""], stack: tuple[int, ...], tasks: int, s: int, kernels: str) -> Any:
    """S_l at the start: (*stack, s, s), or (*stack, T, s, s)."""
    if kernels == "fixed":
        return trees.Fixed(jnp.full((*stack, s, s), 1 / s))
    shape = (*stack, tasks, s, s) if kernels == "task" else (*stack, s, s)
    return jnp.eye(s) + KERNEL_STD * jax.random.normal(key, shape)
