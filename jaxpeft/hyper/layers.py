"""What hypernetworks share: embeddings of tasks, layers and places, a trunk, one output head for each tensor.

    z = LN(W_2 relu(W_1 [e_1; e_2; ...] + c_1) + c_2)             trunk, (*stack, p)
    X = B + Σ_j z_j G_j                                            head: G (p, *shape), B (*shape)

A head emits its tensor in the tensor's own shape, never as a part of one flat vector, and each has a start of its own.
Stacked (scanned) layers have stacked embeddings: leading axes of z are leading axes of X.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jaxpeft import trees
from jaxpeft.generated import generated
from jaxpeft.interpret import lift
from jaxpeft.method import ApplyFn, Call, Delta, Method, Mode, Params
from jaxpeft.models.fused import plain_layer_norm
from jaxpeft.weights.array_like import densify

__all__ = ["Place", "emitting", "head", "head_start", "normal", "places", "trunk", "trunk_start", "zeros"]

Init = Callable[[Key[Array, ""], tuple[int, ...]], Array]


# ---------------------------------------------------------------------------------------------------- where a module is


class Place(NamedTuple):
    """The path of a module in two: its layer, and the part of the layer that it is.

    What a module shares with which others follows from the layer's name:

        layer    params/decoder/layers_3        base    params/decoder/layers           tower    params/decoder
        layer    params/stages_1/layers_0       base    params/stages_1/layers          tower    params

    Layers of one base are alike (stages differ in width), and a tower is what stands above all numbers. Scanned layers
    are one layer, `params/decoder/layers`.
    """

    layer: str
    part: str

    @property
    def path(self) -> str:
        return f"{self.layer}/{self.part}" if self.layer else self.part

    @property
    def base(self) -> str:
        *above, own = self.layer.split("/")
        return "/".join([*above, *filter(None, [_NUMBER.sub("", own)])])

    @property
    def tower(self) -> str:
        segments = self.layer.split("/")
        first = (i for i, s in enumerate(segments) if s == "layers" or _NUMBER.search(s))
        return "/".join(segments[: next(first, len(segments))])


_NUMBER = re.compile(r"_?\d+$")


def places(paths: Iterable[str]) -> dict[str, Place]:
    """Each path in its two parts.

    The layer's own segment is the last one called `layers`, `layers_3` or `layers/3`; without such a name, the last one in
    whose number alone two paths differ; without that, the one above the module.
    """
    paths = list(paths)

    def split(path: str) -> Place:
        segments = path.split("/")
        at = _layer_at(segments, paths)
        return Place("/".join(segments[: at + 1]), "/".join(segments[at + 1 :]))

    return {path: split(path) for path in paths}


def _layer_at(segments: list[str], paths: list[str]) -> int:
    inner = range(len(segments) - 1)
    if named := [i for i in inner if re.fullmatch(r"layers(_\d+)?", segments[i])]:
        last = named[-1]
        return last + 1 if segments[last] == "layers" and last + 1 in inner and segments[last + 1].isdigit() else last
    for i in reversed(inner):
        name = _NUMBER.sub("", segments[i])
        if name != segments[i]:
            before, after = "/".join([*segments[:i], name]), "/".join(["", *segments[i + 1 :]])
            alike = re.compile(re.escape(before) + r"_?\d+" + re.escape(after))
            if sum(alike.fullmatch(p) is not None for p in paths) > 1:
                return i
    return len(segments) - 2


# ------------------------------------------------------------------------------------------------------------ the parts


def normal(std: float) -> Init:
    """N(0, std²)."""
    return lambda key, shape: std * jax.random.normal(key, shape)


def zeros(key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    """Zeros, as an initialiser."""
    return jnp.zeros(shape)


def head_start(key: Key[Array, ""], inputs: int, shape: tuple[int, ...], init: Init) -> dict[str, Array]:
    """A head for one tensor: {"weight": (inputs, *shape), "bias": shape}, the bias zero."""
    return {"weight": init(key, (inputs, *shape)), "bias": jnp.zeros(shape)}


def head(p: Mapping[str, Array], z: Float[Array, "*stack p"]) -> Float[Array, "..."]:
    """The tensor (*stack, *shape) that a head emits; a head without a "bias" is linear in z."""
    y = jnp.tensordot(z, p["weight"], axes=1)
    return y + p["bias"].reshape((1,) * (z.ndim - 1) + p["bias"].shape) if "bias" in p else y


def trunk_start(key: Key[Array, ""], inputs: int, hidden: int, outputs: int, init: Init) -> dict[str, Array]:
    """A trunk's parameters."""
    first, second = jax.random.split(key)
    return {
        "w1": init(first, (inputs, hidden)),
        "b1": jnp.zeros(hidden),
        "w2": init(second, (hidden, outputs)),
        "b2": jnp.zeros(outputs),
        "norm_scale": jnp.ones(outputs),
        "norm_bias": jnp.zeros(outputs),
    }


def trunk(
    p: Mapping[str, Array], *embeddings: Float[Array, "*#stack e"], eps: float = 1e-6
) -> Float[Array, "*stack p"]:
    """z of the module's equations from the embeddings, whose leading axes broadcast."""
    lead = jnp.broadcast_shapes(*(e.shape[:-1] for e in embeddings))
    x = jnp.concatenate([jnp.broadcast_to(e, (*lead, e.shape[-1])) for e in embeddings], axis=-1)
    row = lambda v: v.reshape((1,) * len(lead) + v.shape)
    y = jax.nn.relu(x @ p["w1"] + row(p["b1"])) @ p["w2"] + row(p["b2"])
    return plain_layer_norm(y, p["norm_scale"], p["norm_bias"], eps)


# --------------------------------------------------------------------------------------------------------- emitting


def emitting(
    inner: Method,
    init: Callable[[Key[Array, ""], PyTree, Call], Delta],
    emit: Callable[[Delta, Any, Any], Delta],
    config: Mapping[str, Any],
    *,
    name: str,
    tasks: int | None = None,
) -> Method:
    """`generated` for an `emit` whose leaves may be array-like (`weights.kronecker`).

    The inner method runs on them without forming them; in a baked delta they are formed. Arguments as in `generated`.
    """

    def wrap(apply_fn: ApplyFn, delta: Delta, mode: Mode) -> ApplyFn:
        def run(params: Params, *inputs: Any, **kwargs: Any) -> Any:
            whole = lambda delta, params, inputs, kwargs: inner.wrap(apply_fn, delta, mode)(params, *inputs, **kwargs)
            return lift(whole, mode.on_dense)(delta, params, inputs, kwargs)

        return run

    made = generated(inner._replace(wrap=wrap), init, emit, config, name=name, tasks=tasks)

    def bake(delta: Delta, task: Any) -> tuple[Method, Delta]:
        return inner._replace(name=name), densify(emit(trees.unmark(delta), task, None))

    return made._replace(bake=bake)
