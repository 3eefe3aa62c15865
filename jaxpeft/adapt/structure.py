"""What a side network has to know about the model that it reads, found in the call itself.

A side network is made of the model's own kind of blocks, so it needs their configuration, the names of the hidden
states and the masks that the blocks get. `structure` finds them by watching which Linen module is called, through
whatever functions and methods are wrapped around it; `marked` makes the call's masks readable like hidden states.
"""

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from jaxpeft.hooks import is_unhooked
from jaxpeft.method import ApplyFn, Params
from jaxpeft.models.layers import BlockConfig

__all__ = ["ARGUMENTS", "Structure", "argument", "marked", "shapes_of", "structure"]


class Structure(NamedTuple):
    """What the side network has to know about the model's call.

    Attributes:
      config: of its blocks.
      tap: what the names of its hidden states begin with.
      path: of the module that was called.
      given: its arguments that are marked for the side network to read: masks and positions.
    """

    config: BlockConfig
    tap: str
    path: tuple[str, ...]
    given: tuple[str, ...]


class _Reached(Exception):
    """Ends a trace where all that was asked for is known."""


ARGUMENTS = ("attention_mask", "decoder_attention_mask", "positions")
# A jitted model must not answer from the cache of its other calls: what a trace meets depends on who watches it.
_WATCHED = jax.make_user_context()
_NUMBER = itertools.count()


def argument(name: str) -> str:
    """The mark of an argument."""
    return f"argument {name}"


@contextlib.contextmanager
def _watching(intercept: Callable[..., Any], by: Any) -> Iterator[None]:
    with nn.intercept_methods(intercept), _WATCHED(by):
        yield


def _bound(module: nn.Module, args: Any, kwargs: Any) -> inspect.BoundArguments:
    return inspect.signature(type(module).__call__).bind(module, *args, **kwargs)


def structure(apply_fn: ApplyFn, params: Params, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Structure | None:
    """The outermost module with a `BlockConfig` that `apply_fn` calls, whatever methods are wrapped around it; None
    where no Linen module has one. The model is traced up to there, on shapes."""

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        config = getattr(context.module, "config", None)
        if context.method_name != "__call__" or config is None or is_unhooked():
            return next_fun(*args, **kwargs)
        if not isinstance(config, BlockConfig):
            fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
            towers = [f.name for f in fields if isinstance(getattr(config, f.name), BlockConfig)]
            if len(towers) > 1:
                raise ValueError(
                    f"a side network reads one tower, the model has {' and '.join(towers)}: adapt one of them"
                )
            return next_fun(*args, **kwargs)
        given = _bound(context.module, args, kwargs).arguments
        if given.get("cache") is not None:
            raise ValueError(
                "a side network has no cache of its own: it would see each continuation without what stands before it. "
                "Generate by full passes, or with another method"
            )
        raise _Reached(
            Structure(
                config,
                getattr(context.module, "tap", ""),
                context.module.path,
                tuple(n for n in ARGUMENTS if given.get(n) is not None),
            )
        )

    try:
        with _watching(intercept, next(_NUMBER)):
            shapes_of(apply_fn, params, inputs, kwargs)
    except _Reached as reached:
        return reached.args[0]
    return None


def shapes_of(apply_fn: Callable[..., Any], params: Params, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`jax.eval_shape` of a call in which what is no array (flags, None) stays as it is."""
    leaves, tree = jtu.tree_flatten((params, inputs, dict(kwargs)))
    at = [i for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")]

    def run(arrays: Sequence[Array]) -> Any:
        full = list(leaves)
        for i, x in zip(at, arrays):
            full[i] = x
        p, a, k = jtu.tree_unflatten(tree, full)
        return apply_fn(p, *a, **k)

    return jax.eval_shape(run, [leaves[i] for i in at])


def marked(apply_fn: ApplyFn, seen: Structure, inside: tuple[tuple[type[nn.Module], str], ...] = ()) -> ApplyFn:
    """`apply_fn` with the arguments that the side network needs marked as hidden states are.

    Args:
      apply_fn: the model.
      seen: where and what `structure` has found.
      inside: (class, argument) pairs: the same of every module of that class.
    """

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or is_unhooked():
            return next_fun(*args, **kwargs)
        whole = module.path == seen.path and hasattr(module, "config")
        names = [*(seen.given if whole else ()), *(name for kind, name in inside if isinstance(module, kind))]
        if not names:
            return next_fun(*args, **kwargs)
        bound = _bound(module, args, kwargs)
        for name in names:
            bound.arguments[name] = checkpoint_name(jnp.asarray(bound.arguments[name]), argument(name))
        return next_fun(*bound.args[1:], **bound.kwargs)

    def run(params: Params, *inputs: Any, **kwargs: Any) -> Any:
        with _watching(intercept, (seen.path, seen.given, inside)):
            return apply_fn(params, *inputs, **kwargs)

    return run
