"""Compacter: Efficient Low-Rank Hypercomplex Adapter Layers (Karimi Mahabadi et al., NeurIPS 2021, arXiv:2106.04647), as
compared in VL-Adapter (Sung et al., CVPR 2022, arXiv:2112.06825).

The adapters of `vl_adapter` with both weights sums of n Kronecker products (PHM layers: parameterised hypercomplex
multiplication, Zhang et al., ICLR 2021):

    y = x H + b,    H = Σ_i P_i ⊗ B_i                P (n, n, n), the rule;  B (n, in/n, out/n), the blocks
    B_i = L_i R_i                                    in Compacter: L (n, in/n, k), R (n, k, out/n)

P ~ N(0, 0.01²); B, or L and R each, U(±sqrt(2) sqrt(6 / (fan_in + fan_out))); b = 0. So H starts close to zero. The rule is
each layer's own, one for all tasks at a place, or one for the model (`rule`). VL-Adapter's best setting is n = 2 with rules
of their own and whole blocks, the default; Compacter's is `division=4, factors=1, rule="model", rule_std=1e-4`.

H is formed once a step where its blocks are whole: without it a product takes not fewer operations but more (303.6 instead
of 302.3 million forward for n = 2, 768 -> 96, 2,048 rows; 308.3 for n = 4). With factors of rank 1 it takes 14.4 million
(n = 4) and H is not formed: the gradient took 5 ms instead of 12 on two CPU cores (see `weights.kronecker.lazily`).

Reference code: ylsung/VL_adapter @545fcbb (VL-T5/src/adapters/hypercomplex, adapter_modeling.HyperComplexAdapter).

Letters: n divisions, k rank of the blocks, T tasks, d width, r bottleneck.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jaxpeft import trees
from jaxpeft.adapt.vl_adapter import AT, Share, adapters, checked_sharing, for_task, is_own, shared_start
from jaxpeft.hyper import emitting
from jaxpeft.method import Call, Delta, Method, register, site_key, stacked_keys
from jaxpeft.weights.factored import Factored
from jaxpeft.weights.kronecker import kronecker, lazily

__all__ = ["compacter", "phm", "phm_linear", "phm_parameters", "phm_start"]


def phm(p: Mapping[str, Array]) -> Factored:
    """H of {"rule" (*stack, n, n, n), "blocks" (*stack, n, in/n, out/n)}, or "left" and "right" instead of "blocks"."""
    return kronecker(p["rule"], p["blocks"] if "blocks" in p else (p["left"], p["right"]), terms=True)


def phm_linear(p: Mapping[str, Array], x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    """x H + b without forming H; "bias" may be missing."""
    n = p["rule"].shape[0]
    y = x.reshape(*x.shape[:-1], n, -1)
    if "blocks" in p:
        y = jnp.einsum("...ak,ikp->...aip", y, p["blocks"])
        y = jnp.einsum("...aip,iac->...cp", y, p["rule"])
    else:
        y = jnp.einsum("...ak,ikr->...air", y, p["left"])
        y = jnp.einsum("...air,iac->...icr", y, p["rule"])
        y = jnp.einsum("...icr,irp->...cp", y, p["right"])
    y = y.reshape(*y.shape[:-2], -1)
    return y + p["bias"].reshape((1,) * (y.ndim - 1) + p["bias"].shape) if "bias" in p else y


def phm_parameters(inputs: int, outputs: int, division: int, factors: int = 0) -> int:
    """Parameters of one PHM layer with its bias: n³ + in out / n + out, or n³ + k (in + out) + out."""
    return division**3 + (factors * (inputs + outputs) if factors else inputs * outputs // division) + outputs


def phm_start(
    key: Key[Array, ""], shape: tuple[int, int], division: int, factors: int, rule_std: Any
) -> dict[str, Array]:
    """One layer's rule and blocks.

    Raises:
      ValueError: n does not divide both sizes.
    """
    n, (i, o) = division, shape
    if i % n or o % n:
        raise ValueError(f"division {n} does not divide a map from {i} to {o}: take a divisor of {math.gcd(i, o)}")

    def xavier(label: str, rows: int, columns: int) -> Array:
        bound = math.sqrt(12 / (rows + columns))
        return jax.random.uniform(site_key(key, label), (n, rows, columns), minval=-bound, maxval=bound)

    rule = {"rule": rule_std * jax.random.normal(site_key(key, "rule"), (n, n, n))}
    if not factors:
        return rule | {"blocks": xavier("blocks", i // n, o // n)}
    return rule | {"left": xavier("left", i // n, factors), "right": xavier("right", factors, o // n)}


@register(
    family="adapt",
    paper="Karimi Mahabadi et al., NeurIPS 2021",
    mechanism="hooks",
    mergeable=False,
    exact_start=False,
    rate=1e-3,
)
def compacter(
    rank: int | None = None,
    division: int = 2,
    factors: int = 0,
    tasks: int = 1,
    share: Share = "single",
    *,
    rule: Literal["layer", "tasks", "model"] = "layer",
    rule_std: Any = 0.01,
    reduction: int = 8,
    norm: Literal["none", "in", "out"] = "none",
    at: trees.Pattern = AT,
    name: str = "compacter",
) -> Method:
    """Adapters of PHM layers; see the module for the equations.

    Args:
      rank: r, at least 1; None for d / `reduction`.
      division: n, which divides d and r.
      factors: k, the rank of the blocks; 0 for whole blocks.
      tasks, share: as in `vl_adapter`.
      rule: whose the rule is: each PHM layer's (and each task's, where the layer is a task's own), one for all tasks at a
        place, or one for the whole model.
      rule_std: standard deviation of its start. May be an array.
      reduction, norm, at, name: as in `vl_adapter`.

    Returns:
      A method on hooks, delta `{"sites": {module path: {"down_rule", "down_blocks", "down_bias", "up_rule", ...}}}`, with
      "rule" (n, n, n) beside "sites" where the model has one. It does not merge; it bakes into a task's plain adapters.

    Raises:
      ValueError: a size below 1, n that divides d or r not, an unknown option.
      PatternError: no module matches.
    """
    checked_sharing(tasks, share)
    if division < 1 or factors < 0:
        raise ValueError(f"division {division}, factors {factors}: at least 1, and 0 (whole blocks) or more")
    if rule not in ("layer", "tasks", "model"):
        raise ValueError(f"rule {rule!r}: expected 'layer', 'tasks' or 'model'")
    inner = adapters(rank, reduction, at, norm=norm, name=name)

    def own(array: str) -> bool:
        return is_own(array, share) and not (rule == "tasks" and array.endswith("_rule"))

    def start(key: Key[Array, ""], shapes: PyTree, call: Call) -> Delta:
        def one(key: Key[Array, ""], place: str, side: str, shape: tuple[int, ...]) -> dict[str, Array]:
            *stack, i, o = shape
            draw = lambda k: phm_start(k, (i, o), division, factors, rule_std)
            for _ in stack:
                draw = jax.vmap(draw)
            made = draw(stacked_keys(site_key(key, f"{place}/{side}"), tuple(stack)))
            return {f"{side}_{n}": x for n, x in made.items() if n != "rule" or rule != "model"}

        def draw(key: Key[Array, ""]) -> PyTree:
            plain = inner.init(key, call)
            return {
                place: {n: x for n, x in named.items() if n not in ("down", "up")}
                | one(key, place, "down", named["down"].shape)
                | one(key, place, "up", named["up"].shape)
                for place, named in plain.items()
            }

        sites = {"sites": shared_start(draw, key, tasks, own)}
        model = {"rule": rule_std * jax.random.normal(site_key(key, "rule"), (division,) * 3)}
        return sites | model if rule == "model" else sites

    def emit(delta: Delta, task: Any, key: Any) -> Delta:
        def side(named: Mapping[str, Array], side: str) -> Any:
            mine = {n.removeprefix(f"{side}_"): x for n, x in named.items() if n.startswith(f"{side}_")}
            return lazily(phm({"rule": delta.get("rule"), **mine}))

        def adapter(named: Mapping[str, Array]) -> dict[str, Any]:
            plain = {n: x for n, x in named.items() if n.endswith("_bias") or n.startswith("norm")}
            return plain | {"down": side(named, "down"), "up": side(named, "up")}

        return {place: adapter(named) for place, named in for_task(delta["sites"], task, own).items()}

    config = dict(
        method="compacter",
        rank=rank,
        division=division,
        factors=factors,
        tasks=tasks,
        share=share,
        rule=rule,
        rule_std=rule_std,
        reduction=reduction,
        norm=norm,
        at=at,
        name=name,
    )
    return emitting(inner, start, emit, config, name=name, tasks=tasks)
