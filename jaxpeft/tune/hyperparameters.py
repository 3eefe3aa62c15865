"""Hyperparameters as unconstrained reals: what a method may move by gradients, noise or proposals, and the values it means.

    bounded (a, b)       value = a + (b - a) sigmoid(λ)
    from below (a, -)    value = a + softplus(λ)
    from above (-, b)    value = b - softplus(λ)
    unbounded            value = λ
    discrete             the floor of that

Letters: n hyperparameters, b examples.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

__all__ = ["Hyperparameter", "constrain", "entropy", "inverse_softplus", "named", "perturb", "unconstrain"]


class Hyperparameter(NamedTuple):
    """One number to tune.

    Attributes:
      start: its first value; for a discrete one the number before the floor, strictly inside the bounds.
      low, high: bounds, which are never reached; None where there is none.
      discrete: whether the value is a whole number.
      shared: whether a batch can only have one value of it (a penalty's weight); else each example has its own.
    """

    start: float
    low: float | None = None
    high: float | None = None
    discrete: bool = False
    shared: bool = False


Specs = Mapping[str, Hyperparameter]


def unconstrain(specs: Specs, values: Mapping[str, Any] | None = None) -> Float[Array, "n"]:
    """λ of these values, by default of the starts; the order is that of `specs`.

    Raises:
      ValueError: no hyperparameters, or a value on or outside of its bounds.
    """
    if not specs:
        raise ValueError("no hyperparameters: there is nothing to tune")
    return jnp.stack([_inverse(name, s, s.start if values is None else values[name]) for name, s in specs.items()])


def constrain(specs: Specs, lam: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """The values that λ means. Floors have no slope.

    Raises:
      ValueError: another number of hyperparameters.
    """
    if jnp.shape(lam)[-1] != len(specs):
        raise ValueError(f"λ of shape {jnp.shape(lam)} for {len(specs)} hyperparameters")
    return jnp.stack([_value(s, lam[..., i]) for i, s in enumerate(specs.values())], -1)


def named(specs: Specs, values: Float[Array, "*b n"]) -> dict[str, Float[Array, "*b"]]:
    """Values by name."""
    return {name: values[..., i] for i, name in enumerate(specs)}


def perturb(
    key: Key[Array, ""], specs: Specs, lam: Float[Array, "n"], xi: Float[Array, "n"], examples: int
) -> Float[Array, "b n"]:
    """λ + softplus(ξ) ε with ε ~ N(0, 1) for each example; what a batch shares is the first example's."""
    noisy = lam + jax.nn.softplus(xi) * jax.random.normal(key, (examples, len(specs)), lam.dtype)
    shared = jnp.array([s.shared for s in specs.values()])
    return jnp.where(shared, noisy[:1], noisy)


def entropy(xi: Float[Array, "n"]) -> Float[Array, ""]:
    """Of the noise: Σ log(softplus(ξ) √(2πe)); its slope is sigmoid(ξ) / softplus(ξ)."""
    return jnp.log(jax.nn.softplus(xi) * math.sqrt(2 * math.pi * math.e)).sum()


def inverse_softplus(x: Any) -> Array:
    """log(e^x - 1), for x over 0; large x do not overflow."""
    x = jnp.asarray(x, jnp.float32) if not hasattr(x, "dtype") else jnp.asarray(x)
    return x + jnp.log(-jnp.expm1(-x))


def _value(s: Hyperparameter, x: Array) -> Array:
    if s.low is not None and s.high is not None:
        x = s.low + (s.high - s.low) * jax.nn.sigmoid(x)
    elif s.low is not None:
        x = s.low + jax.nn.softplus(x)
    elif s.high is not None:
        x = s.high - jax.nn.softplus(x)
    return jnp.floor(x) if s.discrete else x


def _inverse(name: str, s: Hyperparameter, value: Any) -> Array:
    low, high = (-math.inf if s.low is None else s.low), (math.inf if s.high is None else s.high)
    if not low < float(value) < high:
        raise ValueError(f"{name} {value}: expected a number between {low:g} and {high:g}, neither included")
    if s.low is not None and s.high is not None:
        share = (value - low) / (high - low)
        return jnp.log(jnp.asarray(share, jnp.float32)) - jnp.log1p(-jnp.asarray(share, jnp.float32))
    if s.low is not None:
        return inverse_softplus(value - low)
    if s.high is not None:
        return inverse_softplus(high - value)
    return jnp.asarray(value, jnp.float32)
