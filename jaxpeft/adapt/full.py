"""Training chosen leaves of the model itself: full fine-tuning, the head alone, and BitFit.

BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models (Ben Zaken et al., ACL 2022,
arXiv:2106.10199) trains every bias of the model (those of layer norms too) and the task's head.

The delta holds the chosen leaves themselves, or, with `form="difference"`, what is added to them: the same function at
the cost of one sum per leaf, but weight decay then pulls towards the pretrained weights instead of towards zero. It is kept
in float32 at least, and the model sees it in the dtype of its own leaves: in half precision small updates would be lost.
"""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxpeft import trees
from jaxpeft.method import Method, on_weights, register
from jaxpeft.roles import Role
from jaxpeft.weights import difference

__all__ = ["bitfit", "full", "head"]

HEAD = "**/head/**"


@register(family="adapt", paper="(baseline)", mechanism="weights", mergeable=True, exact_start=True, rate=2e-4)
def full(at: trees.Pattern = "**", *, form: Literal["value", "difference"] = "value", name: str = "full") -> Method:
    """Trains every leaf that `at` chooses; all of the model by default.

    Args:
      at: pattern of leaves; integer leaves among them are left alone. Statistics that are no parameters (`batch_stats` of
        Linen, a BatchNorm's `mean` and `var` of NNX) are leaves like others: leave them out with a second pattern,
        `("**", "!batch_stats/**")`.
      form: whether the delta holds the leaves or differences to them.
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is `{path: {"value": leaf}}` or `{path: {"difference": zeros}}`. It merges.

    Raises:
      ValueError: an unknown form.
      PatternError: nothing matches `at`.
    """
    if form not in ("value", "difference"):
        raise ValueError(f"form {form!r}: expected 'value' or 'difference'")

    def start(key: Key[Array, ""], path: str, w: Array, role: Role) -> dict[str, Array]:
        if not jnp.issubdtype(w.dtype, jnp.inexact):
            return {}
        wide = trees.wide_dtype(w.dtype)
        # A copy: a training step may donate its delta's buffers, and the base must outlive it.
        return {"value": jnp.array(w, wide, copy=True)} if form == "value" else {"difference": jnp.zeros_like(w, wide)}

    def build(path: str, w: Array, d: dict[str, Array], key: Key[Array, ""] | None) -> Any:
        if not d:
            return w
        return d["value"].astype(w.dtype) if "value" in d else difference(w, d["difference"])

    return on_weights(name, at, start, build, dict(method="full", name=name, at=at, form=form), factored=False)


@register(family="adapt", paper="(baseline)", mechanism="weights", mergeable=True, exact_start=True, rate=1e-2)
def head(at: trees.Pattern = HEAD, *, name: str = "head") -> Method:
    """Trains the task's head on frozen features (a linear probe where the head is linear); see `full`."""
    return full(at, name=name)._replace(config=dict(method="head", name=name, at=at))


@register(
    family="adapt", paper="Ben Zaken et al., ACL 2022", mechanism="weights", mergeable=True, exact_start=True, rate=3e-3
)
def bitfit(at: trees.Pattern = "**/bias", *, name: str = "bitfit") -> Method:
    """Trains every bias that `at` chooses; see `full`."""
    return full(at, name=name)._replace(config=dict(method="bitfit", name=name, at=at))
