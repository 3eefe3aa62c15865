"""The Power of Scale for Parameter-Efficient Prompt Tuning (Lester et al., EMNLP 2021, arXiv:2104.08691).

l learned vectors stand before the embedded tokens; the rest of the model takes them for tokens (they have positions,
and every token sees them). They start as embeddings of random words of the vocabulary (section 3.2), or as noise.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpeft import trees
from jaxpeft.hooks import Hook, Site, Slots, on_hooks
from jaxpeft.method import Call, Delta, Method, register, site_key

__all__ = ["prompt_tuning"]


@register(
    family="adapt", paper="Lester et al., EMNLP 2021", mechanism="hooks", mergeable=False, exact_start=False, rate=3e-2
)
def prompt_tuning(
    length: int = 16,
    *,
    init: Literal["vocabulary", "normal", "uniform"] = "vocabulary",
    at: trees.Pattern = "**/embeddings/word",
    name: str = "prompt_tuning",
) -> Method:
    """Prompt tuning.

    Args:
      length: l, at least 1. The model must have room for l more positions.
      init: "vocabulary" (embeddings of random words), "normal" (standard deviation 0.02) or "uniform" ([-0.5, 0.5]).
      at: pattern of the embedding module, which maps ids (b, t) to vectors (b, t, d).
      name: the key of its delta in a chain.

    Returns:
      A method on hooks, delta `{module path: {"prompt": (l, d)}}`. It does not merge.

    Raises:
      ValueError: a length below 1, an unknown init, or "vocabulary" where the module has no table `embedding`.
      PatternError: no module matches.
    """
    if length < 1:
        raise ValueError(f"length {length}: a prompt has at least one position")
    if init not in ("vocabulary", "normal", "uniform"):
        raise ValueError(f"init {init!r}: expected 'vocabulary', 'normal' or 'uniform'")

    def around(site: Site, call: Any, ids: Array, *args: Any, **kwargs: Any) -> Array:
        x = call(ids, *args, **kwargs)
        prompt = site.param("prompt", (length, x.shape[-1]), None).astype(x.dtype)
        return jnp.concatenate([jnp.broadcast_to(prompt, (x.shape[0], *prompt.shape)), x], axis=1)

    def start(key: Key[Array, ""], slots: Slots, call: Call) -> Delta:
        return {
            place: {"prompt": prompt_start(site_key(key, place), place, named["prompt"].shape, init, call)}
            for place, named in slots.items()
        }

    return on_hooks(
        name, [Hook(at, around)], dict(method="prompt_tuning", length=length, init=init, at=at, name=name), init=start
    )


def prompt_start(key: Key[Array, ""], place: str, shape: tuple[int, ...], init: str, call: Call) -> Float[Array, "l d"]:
    """The prompt at the start: embeddings of random words of the module's table, or noise.

    Raises:
      ValueError: "vocabulary" where the module has no table `embedding`.
    """
    if init == "normal":
        return 0.02 * jax.random.normal(key, shape)
    if init == "uniform":
        return jax.random.uniform(key, shape, minval=-0.5, maxval=0.5)
    table = trees.by_path(call.params).get(f"{place}/embedding")
    if table is None or table.ndim != 2:
        raise ValueError(f"init 'vocabulary' needs a table at '{place}/embedding'; use 'normal' or 'uniform'")
    rows = jax.random.randint(key, (shape[0],), 0, table.shape[0])
    return table[rows].astype(jnp.float32)
