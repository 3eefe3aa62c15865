"""VL-Adapter: Parameter-Efficient Transfer Learning for Vision-and-Language Tasks (Sung et al., CVPR 2022,
arXiv:2112.06825).

Several tasks are trained together through adapters after each attention's output projection and each feed-forward
network's second linear map, before dropout and the block's own residual:

    u + gelu(u D_t + c_t) U_t + e_t            u: the sub-layer's output; D_t (d, r), U_t (r, d), N(0, 0.02²); c, e = 0

What the tasks share (the paper's question; over tasks, never over layers or places):

    multiple     D_t and U_t for each task             half_down    one D, U_t for each task
    single       one D, one U                          half_up      D_t for each task, one U

"single" is the paper's best: with T tasks it has 1/T of the parameters of "multiple", and tasks with few examples gain.
The other adapters that the paper compares are `compacter` and `hyperformer`.

The paper also trains all layer norms and the projection of the visual features: `chain(vl_adapter(...),
full("**/*norm/*", name="norms"))`. GELU is its tanh approximation.

Reference code: ylsung/VL_adapter @545fcbb (VL-T5/src/adapters/adapter_controller.py). Its initialisation is that of the
whole language model: N(0, 0.02²) in BART, the default here; in T5 torch's U(±1/sqrt(fan_in)), which is not offered. An
adapter is not zero at the start; `init="lora"` (U = 0) makes it so. A task's unused parameters stay as they are in torch;
here Adam's momentum and weight decay still move them, unless the updates are masked by task.

Letters: T tasks, d width, r bottleneck.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jaxpeft import trees
from jaxpeft.adapt.unified import Design, sublayer
from jaxpeft.generated import generated
from jaxpeft.method import Call, Delta, Method, register

__all__ = ["AT", "SHARES", "adapters", "checked_sharing", "for_task", "is_own", "shared_start", "vl_adapter"]

AT = "**/{attention,cross_attention,mlp/down}"
SHARES = ("multiple", "single", "half_down", "half_up")
Share = Literal["multiple", "single", "half_down", "half_up"]


def is_own(name: str, share: str) -> bool:
    """Whether each task has an array `name` ("down", "up_bias", ...) of its own. Norms are shared in all modes."""
    side = name.partition("_")[0]
    return side in {"multiple": ("down", "up"), "single": (), "half_down": ("up",), "half_up": ("down",)}[share]


def _axis(name: str) -> int:
    """Where the tasks' axis stands in an array: before the array's own axes, behind those of stacked layers."""
    return {"down": -3, "up": -3, "rule": -4, "blocks": -4, "left": -4, "right": -4}.get(name.rpartition("_")[2], -2)


def shared_start(draw: Callable[[Any], PyTree], key: Key[Array, ""], tasks: int, own: Callable[[str], bool]) -> PyTree:
    """`{place: {name: array}}` as `draw(key)` gives it, with an axis of T where `own(name)`."""

    def joined(name: str, x: Array) -> Array:
        return jnp.moveaxis(x, 0, _axis(name)) if own(name) else x[0]

    every = jax.vmap(draw)(jax.random.split(key, tasks))
    return {place: {n: joined(n, x) for n, x in named.items()} for place, named in every.items()}


def for_task(
    sites: Mapping[str, Mapping[str, Array]], task: Any, own: Callable[[str], bool]
) -> dict[str, dict[str, Array]]:
    """One task's arrays; undoes `shared_start`. The task may be traced."""

    def one(name: str, x: Array) -> Array:
        return jnp.take(x, task, axis=_axis(name), mode="clip") if own(name) else x

    return {place: {n: one(n, x) for n, x in named.items()} for place, named in sites.items()}


def checked_sharing(tasks: int, share: str) -> None:
    """Raises ValueError for no tasks and for an unknown mode."""
    if tasks < 1:
        raise ValueError(f"tasks {tasks}: there is at least one")
    if share not in SHARES:
        raise ValueError(f"share {share!r}: expected one of {', '.join(SHARES)}{trees.near(share, SHARES)}")


def adapters(
    rank: int | None,
    reduction: int,
    at: trees.Pattern = AT,
    *,
    norm: str = "none",
    init: str = "bert",
    activation: str = "gelu_tanh",
    biases: bool = True,
    name: str,
) -> Method:
    """The plain adapters of one task that this paper's methods come down to; r is `reduction`'s where `rank` is None.

    Raises:
      ValueError: a size below 1, an unknown norm or init.
    """
    if norm not in ("none", "in", "out") or init not in ("bert", "lora"):
        raise ValueError(f"norm {norm!r}, init {init!r}: expected none, in or out; bert or lora")
    design = Design(norm=norm, init=init, activation=activation, biases=biases)  # pyright: ignore[reportArgumentType]
    return sublayer(design, rank, reduction=reduction, at=at, name=name)


@register(
    family="adapt", paper="Sung et al., CVPR 2022", mechanism="hooks", mergeable=False, exact_start=False, rate=1e-3
)
def vl_adapter(
    rank: int | None = None,
    tasks: int = 1,
    share: Share = "single",
    *,
    reduction: int = 8,
    norm: Literal["none", "in", "out"] = "none",
    init: Literal["bert", "lora"] = "bert",
    at: trees.Pattern = AT,
    name: str = "vl_adapter",
) -> Method:
    """Adapters for several tasks; see the module for the equation and the modes of sharing.

    Args:
      rank: r, at least 1; None for d / `reduction`.
      tasks: T; `apply` takes `task=` where there are several.
      share: what the tasks share.
      reduction: the reduction factor.
      norm: a layer norm on the adapter's input or output, shared by the tasks; off in the paper's runs.
      init: "lora" starts with U = 0, so that the adapted model starts as its base.
      at: pattern of modules whose output is adapted.
      name: the key of its delta in a chain.

    Returns:
      A method on hooks, delta `{module path: {"down" (*stack, [T,] d, r), "down_bias", "up", "up_bias"}}`, the axis of T
      only where each task has its own. It does not merge; it bakes into a task's plain adapters.

    Raises:
      ValueError: a size below 1, an unknown option, a width smaller than the reduction factor.
      PatternError: no module matches.
    """
    checked_sharing(tasks, share)
    inner = adapters(rank, reduction, at, norm=norm, init=init, name=name)
    own = functools.partial(is_own, share=share)

    def start(key: Key[Array, ""], shapes: PyTree, call: Call) -> Delta:
        return shared_start(lambda k: inner.init(k, call), key, tasks, own)

    def emit(delta: Delta, task: Any, key: Any) -> Delta:
        return for_task(delta, task, own)

    config = dict(
        method="vl_adapter",
        rank=rank,
        tasks=tasks,
        share=share,
        reduction=reduction,
        norm=norm,
        init=init,
        at=at,
        name=name,
    )
    return generated(inner, start, emit, config, name=name, tasks=tasks)
