"""Where activations stand on a mesh: what the compiler would have to guess, said.

    hidden    the states (b, t, d) that enter and leave a block: rows over "data" and "fsdp", positions over "tensor"
    heads     queries, keys and values (b, t, h, k) of the attention core: rows likewise, heads over "tensor"
    inner     the wide states (b, t, f) inside a feed-forward block: rows likewise, features over "tensor"

Without the first the residual stream is whole along "tensor", and what recomputation keeps of each layer (its input) with
it. Divided by positions (sequence parallelism: Korthikanti et al., "Reducing activation recomputation in large
transformer models", 2022, section 4.2.2) it takes 1 / tensor of that, and norms are computed once instead of on every
device of the axis. Without the second the compiler may divide the scores by keys, which sums them across devices;
without the third it may gather whole weights instead of the smaller hidden states.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from jaxpeft.method import ApplyFn
from jaxpeft.models.layers import AttentionCore, Block, Mlp
from jaxpeft.train.sharding import BATCH, fitting

Divided = Literal["hidden", "heads", "inner"]
ALL: tuple[Divided, ...] = get_args(Divided)

# A jitted model must not answer from the cache of its calls on another mesh, or on none.
_MESH = jax.make_user_context()
_NUMBER = itertools.count()


def shard_activations(apply_fn: ApplyFn, mesh: Mesh, what: Sequence[Divided] = ALL) -> ApplyFn:
    """`apply_fn` with its activations divided over `mesh`.

    It acts on Linen models made of the blocks of `models.layers`, whatever methods are wrapped around them, and changes
    no number. Rows, positions, heads or features that their mesh axes do not divide stay whole.

    Example: `adapted._replace(apply=shard_activations(adapted.apply, mesh))`. Around the adapted model it divides the
    blocks of side networks too, which `adapt(shard_activations(model.apply, mesh), lst())` would not see.

    Raises:
      ValueError: something in `what` that there is not.
    """
    if unknown := set(what) - set(get_args(Divided)):
        raise ValueError(
            f"{min(unknown)!r} is nothing that is divided: expected some of {', '.join(get_args(Divided))}"
        )
    number = next(_NUMBER)

    def placed(x: Array, *axes: Any) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fitting(mesh, axes, x.shape)))

    def hidden(x: Array) -> Array:
        return placed(x, BATCH, "tensor", None)

    def heads(x: Array) -> Array:
        return placed(x, BATCH, None, "tensor", None)

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if isinstance(module, Block) and "hidden" in what:
            return hidden(next_fun(hidden(args[0]), *args[1:], **kwargs))
        if isinstance(module, AttentionCore) and "heads" in what:
            return heads(next_fun(*map(heads, args[:3]), *args[3:], **kwargs))
        y = next_fun(*args, **kwargs)
        return placed(y, BATCH, None, "tensor") if "inner" in what and widens(module) else y

    def run(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(intercept), _MESH(number):
            return apply_fn(params, *inputs, **kwargs)

    return run


def widens(module: nn.Module) -> bool:
    """Whether it is a product into a feed-forward block's inner states."""
    return isinstance(module.parent, Mlp) and module.name in ("up", "gate")
