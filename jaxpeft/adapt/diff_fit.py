"""DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient Fine-Tuning (Xie et al., ICCV
2023, arXiv:2304.06648).

Learned vectors γ, ones at the start, rescale sublayers, and the model's biases and norms are trained with them (section 3.2):

    q <- γ_q * (x W_q + b_q), likewise k, v and the output projection;      x <- x + γ * f(x)  for every residual branch f.

A branch ends in a linear layer, so that its γ rescales that layer's output: on the output projection of an attention it stands
beside the projection's own γ, as in the reference code, and their product is what counts. (With dropout between the two nothing
changes, as both are elementwise.) The paper has the branches' γ alone; q, k, v and output are the reference code's:
Raman1121/Diffusion_Memorization_HPO @5a6afdd (difffit/attention.py, attention_processor.py).
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxpeft import trees
from jaxpeft.adapt.full import full
from jaxpeft.method import Method, chain, on_weights, register
from jaxpeft.roles import Role
from jaxpeft.weights import scaled
from jaxpeft.weights.factored import Factored

__all__ = ["diff_fit"]

AT = "**/{attention,cross_attention}/{query,key,value,qkv,out}/kernel"
BRANCHES = ("**/{attention,cross_attention}/out/kernel", "**/mlp/down/kernel")


@register(
    family="adapt", paper="Xie et al., ICCV 2023", mechanism="weights", mergeable=True, exact_start=True, rate=3e-3
)
def diff_fit(
    at: trees.Pattern | None = AT,
    branches: trees.Pattern | None = BRANCHES,
    rest: trees.Pattern | None = "**/{bias,scale}",
    *,
    name: str = "diff_fit",
) -> Method:
    """DiffFit; see the module.

    Args:
      at: weights whose outputs, their bias included, are rescaled; None for the paper's form.
      branches: the last weights of residual branches, rescaled too.
      rest: leaves that are trained themselves; None for none. A diffusion model's label embedding may stand here.
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is `{"gammas": {path: {"gamma": (*stack, *outer), "branch": the same}}, "trained": {path:
      {"value": leaf}}}`. It merges, and starts as its base.

    Raises:
      ValueError: neither `at` nor `branches`.
      PatternError: nothing matches one of the patterns.
    """
    sides = {label: patterns(p) for label, p in (("gamma", at), ("branch", branches)) if p is not None}
    if not sides:
        raise ValueError("neither at nor branches: nothing would be rescaled; bitfit trains biases alone")

    def start(key: Key[Array, ""], path: str, w: Array, role: Role) -> dict[str, Array]:
        ones = jnp.ones((*w.shape[: role.stack], *w.shape[sum(role) :]), trees.wide_dtype(w.dtype))
        # The number of stacked axes cannot be told from one vector: the name of the leaf says it.
        return {f"{label}{role.stack or ''}": ones for label, own in sides.items() if trees.is_match(own, path)}

    def build(path: str, w: Array, d: dict[str, Array], key: Key[Array, ""] | None) -> Factored:
        if not all(label.startswith(("gamma", "branch")) for label in d):
            raise KeyError("gamma or branch")
        stack = next(iter(d)).removeprefix("gamma").removeprefix("branch")
        return scaled(w, product(d), "out", int(stack or 0))

    def beside(path: str, leaves: Mapping[str, Array], d: dict[str, Array]) -> dict[str, Any]:
        bias = path.rpartition("/")[0] + "/bias"
        return {bias: leaves[bias] * product(d).astype(leaves[bias].dtype)} if bias in leaves else {}

    def product(d: dict[str, Array]) -> Array:
        first, *more = d.values()
        return first * more[0] if more else first

    every = [p for own in sides.values() for p in own]
    gammas = on_weights("gammas", every, start, build, {}, beside=beside)
    config = dict(method="diff_fit", name=name, at=at, branches=branches, rest=rest)
    # The trained biases are handed over first and rescaled then.
    parts = [gammas] if rest is None else [gammas, full(rest, name="trained")]
    return chain(*parts, name=name)._replace(config=config)


def patterns(p: trees.Pattern) -> list[str]:
    return [p] if isinstance(p, str) else list(p)
