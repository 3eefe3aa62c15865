"""Multi-Head Adapter Routing for Cross-Task Generalization (Caccia et al., NeurIPS 2023, arXiv:2211.03831), with Poly
(Ponti et al., EACL 2023, arXiv:2202.13914).

Every adapted weight holds an inventory of m LoRA "skills". A task's own LoRA is a routed average of their parameters, in h
blocks ("heads") that are routed apart: A is cut along its input axis, B along its output axis, block k of both with the
same weights. Poly is h = 1.

    s = sigmoid(Z[task])                                  Z (T, h, m), U(±1e-3) at the start
    alpha[k, j] = s[k, j] / (Σ_j s[k, j] + 1e-12)
    A[k] = Σ_j alpha[k, j] A_kj                           A_kj (i/h, r), U(±1/sqrt(3 i)) at the start
    B[k] = Σ_j alpha[k, j] B_kj                           B_kj (r, o/h), zero at the start
    y = x W + (alpha_lora / r) (x A) B                    A (i, r): blocks one under another; B (r, o): side by side

Factors are averaged, not products: cross terms A_i B_j appear. To move to a new task, `new_tasks` gives it a fresh router;
then train all (MHR), or the router alone (`train="router"`: MHR-z). `to_average` is the mean skill, a plain LoRA from then
on (MHR-mu).

Reference code: microsoft/mttl, tag mhr-camera-ready (c66b20d). It may draw s from a relaxed Bernoulli distribution while
training (`sample=True`: where `apply` is given a `dropout_key`); its published T0 configurations do not. `peft`'s Poly
always does, and starts A at U(±1/sqrt(i/h)).

Letters: i inputs and o outputs of a weight, r rank, m skills, h heads, T tasks.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jaxpeft import trees
from jaxpeft.adapt.lora import AT, lora
from jaxpeft.generated import generated
from jaxpeft.method import Call, Delta, Method, register, site_key, stacked_keys

__all__ = ["mhr", "new_tasks", "poly", "routing", "to_average"]

Z_RANGE = 1e-3
Sharing = Literal["weight", "layer", "model"]


def routing(logits: Float[Array, "*h m"], key: Key[Array, ""] | None = None) -> Float[Array, "*h m"]:
    """alpha: the share of each skill in each block, in float32.

    Args:
      logits: Z of one task.
      key: draws s from a relaxed Bernoulli distribution of temperature 1 with these logits.
    """
    z = logits.astype(jnp.float32)
    if key is not None:
        u = jax.random.uniform(key, z.shape, minval=1e-6, maxval=1 - 1e-6)
        z = z + jnp.log(u) - jnp.log1p(-u)
    s = jax.nn.sigmoid(z)
    return s / (s.sum(-1, keepdims=True) + 1e-12)


def compose(
    a: Float[Array, "*stack h m i r"], b: Float[Array, "*stack h m r o"], alpha: Float[Array, "*stack h m"]
) -> dict[str, Array]:
    """The routed LoRA `{"a": (*stack, i, r), "b": (*stack, r, o)}` of one task; i and o may be several axes, of which the
    first is the one that is cut into blocks."""
    stack = alpha.ndim - 2

    def mixed(x: Array) -> Array:
        flat = x.reshape(*x.shape[: stack + 2], -1)
        return jnp.einsum("...hm,...hmx->...hx", alpha.astype(x.dtype), flat).reshape(
            *x.shape[: stack + 1], *x.shape[stack + 2 :]
        )

    a, b = mixed(a), jnp.moveaxis(mixed(b), stack, stack + 1)
    merge = lambda x, at: x.reshape(*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])
    return {"a": merge(a, stack), "b": merge(b, stack + 1)}


def new_tasks(key: Key[Array, ""], delta: Delta, tasks: int) -> Delta:
    """The delta with a fresh router for `tasks` new tasks; the skills stay. For `mhr(..., tasks=tasks)`."""

    def fresh(group: str, z: Array) -> Array:
        *stack, _, h, m = z.shape
        return _router(site_key(key, group), (*stack, tasks, h, m), z.dtype)

    return {**delta, "router": {g: fresh(g, z) for g, z in delta["router"].items()}}


def to_average(delta: Delta) -> Delta:
    """The plain LoRA delta of the mean skill (MHR-mu): `lora` with the same rank and alpha takes it."""
    skills, z = trees.unmark(delta["skills"]), delta["router"]
    like = {p: z.get(p, next(iter(z.values()))) for p in skills}
    even = {p: jnp.full((*x.shape[:-3], *x.shape[-2:]), 1 / x.shape[-1], jnp.float32) for p, x in like.items()}
    return {p: compose(d["a"], d["b"], even[p]) for p, d in skills.items()}


def _router(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, -Z_RANGE, Z_RANGE)


def group(path: str, sharing: Sharing) -> str:
    """The name of the router that serves a weight."""
    if sharing == "weight":
        return path
    segments = path.split("/")
    numbered = [i for i, s in enumerate(segments) if s.startswith("layers")]
    return "/".join(segments[: numbered[-1] + 1]) if sharing == "layer" and numbered else "model"


@register(
    family="adapt",
    paper="Caccia et al., NeurIPS 2023",
    mechanism="weights",
    mergeable=True,
    exact_start=True,
    rate=2e-3,
)
def mhr(
    rank: int = 4,
    skills: int = 8,
    heads: int = 8,
    tasks: int = 1,
    alpha: Any = None,
    at: trees.Pattern = AT,
    *,
    router: Sharing = "weight",
    sample: bool = False,
    train: Literal["all", "router"] = "all",
    name: str = "mhr",
) -> Method:
    """Multi-head routing over an inventory of LoRA skills; `heads=1` is Poly. See the module for the equations.

    Args:
      rank: r, of each skill.
      skills: m.
      heads: h; divides the first input and the first output axis of every chosen weight.
      tasks: T; `apply` takes `task=` where there are several.
      alpha: numerator of LoRA's scale; `2 * rank` where None. May be an array.
      at: pattern of weights.
      router: what shares one router: each weight has its own, all weights of a layer, or the whole model.
      sample: draws the router's shares at random in training.
      train: "router" holds the skills fixed (MHR-z).
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is `{"skills": {path: {"a": (*stack, h, m, i/h, r), "b": (*stack, h, m, r, o/h)}}, "router":
      {group: (*stack, T, h, m)}}`. The router trains at 100 times the rate, as in the reference's configurations. It
      merges for a task, and at its start the adapted model equals the base.

    Raises:
      ValueError: a size below 1, heads that do not divide a weight, an unknown `router` or `train`.
      PatternError: nothing matches `at`.
    """
    for label, size in (("skills", skills), ("heads", heads), ("tasks", tasks)):
        if size < 1:
            raise ValueError(f"{label} {size}: there is at least one")
    if router not in ("weight", "layer", "model") or train not in ("all", "router"):
        raise ValueError(f"router {router!r}, train {train!r}: expected weight, layer or model; all or router")
    inner = lora(rank, alpha, at, name=name)

    def init(key: Key[Array, ""], shapes: PyTree, call: Call) -> Delta:
        leaves = trees.by_path(call.params)
        inventory: dict[str, Any] = {}
        routers: dict[str, Any] = {}
        for path, d in shapes.items():
            stack = d["a"].ndim + d["b"].ndim - 2 - leaves[path].ndim
            inner_axes, outer_axes = d["a"].shape[stack:-1], d["b"].shape[stack + 1 :]
            if inner_axes[0] % heads or outer_axes[0] % heads:
                raise ValueError(
                    f"heads {heads} do not divide {path!r}, which takes {inner_axes} to {outer_axes}: take a divisor of "
                    f"{math.gcd(inner_axes[0], outer_axes[0])}"
                )
            lead, dtype = d["a"].shape[:stack], d["a"].dtype
            bound = 1 / math.sqrt(3 * math.prod(inner_axes))

            def draw(k: Any, axes: Any = inner_axes, dtype: Any = dtype, bound: float = bound) -> Array:
                cut = (heads, skills, axes[0] // heads, *axes[1:], rank)
                return jax.random.uniform(k, cut, dtype, -bound, bound)

            for _ in lead:
                draw = jax.vmap(draw)
            a = draw(stacked_keys(site_key(key, path), lead))
            b = jnp.zeros((*lead, heads, skills, rank, outer_axes[0] // heads, *outer_axes[1:]), dtype)
            inventory[path] = {"a": a, "b": b}
            shared = group(path, router)
            own = (1,) * stack if router == "model" else lead
            z = _router(site_key(key, f"{shared}/router"), (*own, tasks, heads, skills))
            if routers.setdefault(shared, z).shape != z.shape:
                raise ValueError(
                    f"router={router!r}: weights of {shared!r} are stacked differently; take router='weight'"
                )
        held = jax.tree.map(trees.Fixed, inventory) if train == "router" else inventory
        return {"skills": held, "router": routers}

    def emit(delta: Delta, task: Any, key: Any) -> Delta:
        alphas = {}
        for name, z in delta["router"].items():
            own = jnp.take(z, task, axis=z.ndim - 3, mode="clip")
            alphas[name] = routing(own, site_key(key, name) if sample and key is not None else None)
        return {p: compose(d["a"], d["b"], alphas[group(p, router)]) for p, d in delta["skills"].items()}

    config: Mapping[str, Any] = dict(
        method="mhr",
        rank=rank,
        skills=skills,
        heads=heads,
        tasks=tasks,
        alpha=alpha,
        at=at,
        router=router,
        sample=sample,
        train=train,
        name=name,
    )
    rates = (("router/**", 100.0),) if train == "all" else ()
    return generated(inner, init, emit, config, name=name, tasks=tasks)._replace(rates=rates)


@register(
    family="adapt", paper="Ponti et al., EACL 2023", mechanism="weights", mergeable=True, exact_start=True, rate=2e-3
)
def poly(
    rank: int = 4,
    skills: int = 8,
    tasks: int = 1,
    alpha: Any = None,
    at: trees.Pattern = AT,
    *,
    router: Sharing = "weight",
    sample: bool = False,
    train: Literal["all", "router"] = "all",
    name: str = "poly",
) -> Method:
    """Poly: `mhr` with one head; arguments as there."""
    options = dict(router=router, sample=sample, train=train, name=name)
    made = mhr(rank, skills, 1, tasks, alpha, at, **options)
    config = {k: v for k, v in made.config.items() if k not in ("method", "heads")}
    return made._replace(config={"method": "poly", **config})
