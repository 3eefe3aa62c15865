"""Gradients from values alone: simultaneous perturbation (Spall, 1992), and SPSA-GC (Oh et al., BlackVIP, CVPR 2023).

    g_j = (L(w + c D) - L(w - c D)) / (2 c D_j)          averaged over q draws of D, two values of L each

D has independent entries whose inverse has moments: D_j = ±1 ("rademacher"), or sign times U[1/2, 1) ("segmented", the
reference code's). For a quadratic L the estimate is exactly unbiased at every c, with variance
E[D²] E[D⁻²] Σ_{k≠j} G_k² of entry j (the factor is 1, or 7/6).

    SPSA-GC:  m_1 = g_1,  m_k = β m_{k-1} + g_k,      w <- w - a_k (g_k + β m_k)
    gains:    a_k = a / (k + o)^α,                    c_k = c / k^γ,                  k = 1, 2, ...

One-sided random directions (RGF, as BAR uses them): g = (d / q) Σ_i u_i (L(w + b u_i) - L(w)) / b, u_i uniform on the
sphere; for a linear L and q = 1 its expectation is the gradient.

Reference code: changdaeoh/BlackVIP @66606fb (trainers/blackvip.py). There the look-ahead of the paper's equation stands in
the shifted variable w + β m: the same method where a is constant.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Key, PyTree

__all__ = ["Distribution", "gain", "rgf", "spsa", "spsa_gc", "value_and_spsa"]

Distribution = Literal["segmented", "rademacher"]


def perturbation(key: Key[Array, ""], n: int, dtype: Any, distribution: Distribution) -> Float[Array, "n"]:
    """D; no entry is smaller than 1/2 in size, as the estimate divides by it."""
    sign_key, size_key = jax.random.split(key)
    sign = jax.random.rademacher(sign_key, (n,), dtype)
    return sign if distribution == "rademacher" else sign * jax.random.uniform(size_key, (n,), dtype, 0.5, 1.0)


def spsa(
    loss: Callable[[PyTree], Float[Array, ""]],
    key: Key[Array, ""],
    params: PyTree,
    c: Any,
    q: int = 1,
    *,
    distribution: Distribution = "segmented",
    vectorised: bool = False,
) -> tuple[Float[Array, ""], PyTree]:
    """An estimate of the gradient of `loss` at `params` from 2 q values.

    Args:
      loss: a scalar, evaluated only: it may hold a `jax.pure_callback` to something outside. Compute it in float32.
      key: of the perturbations.
      params: floating-point leaves.
      c: the size of the perturbation; may be traced.
      q: draws that are averaged, at least 1.
      distribution: of D.
      vectorised: evaluates the 2 q values together (`vmap`) rather than one after another.

    Returns:
      The mean of the values and a tree like `params`.

    Raises:
      ValueError: q below 1, or an unknown distribution.
    """
    if q < 1:
        raise ValueError(f"q {q}: there is at least one perturbation")
    if distribution not in ("segmented", "rademacher"):
        raise ValueError(f"distribution {distribution!r}: expected 'segmented' or 'rademacher'")
    flat, unravel = ravel_pytree(params)
    c = jnp.asarray(c, flat.dtype)

    def one(key: Key[Array, ""]) -> tuple[Array, Array]:
        d = perturbation(key, flat.shape[0], flat.dtype, distribution)
        up, down = loss(unravel(flat + c * d)), loss(unravel(flat - c * d))
        return (up + down) / 2, (up - down).astype(flat.dtype) / (2 * c * d)

    keys = jax.random.split(key, q)
    if vectorised:
        values, estimates = jax.vmap(one)(keys)
        return values.mean(), unravel(estimates.mean(0))

    def add(total: Any, key: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(key)), None

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, keys[0]))
    (value, estimate), _ = jax.lax.scan(add, start, keys)
    return value / q, unravel(estimate / q)


def value_and_spsa(c: Any, q: int = 1, **options: Any) -> Callable[..., Any]:
    """In the place of `jax.value_and_grad` in `train.make_step(gradient=...)`: see `spsa`.

    Args:
      c: the size of the perturbation, or a schedule of the step (`gain(c, gamma)`).
      q, options: as in `spsa`.
    """

    def estimator(function: Callable[..., Any], *, has_aux: bool = True) -> Callable[..., Any]:
        assert has_aux

        def run(learned: PyTree, state: Any, *rest: Any) -> Any:
            *others, key = rest
            own, draws = jax.random.split(key)
            loss = lambda w: function(w, state, *others, own)
            size = c(state.step) if callable(c) else c
            _, estimate = spsa(lambda w: loss(w)[0], draws, learned, size, q, **options)
            return loss(learned), estimate

        return run

    return estimator


def rgf(
    loss: Callable[[PyTree], Float[Array, ""]], key: Key[Array, ""], params: PyTree, b: Any, q: int = 1
) -> tuple[Float[Array, ""], PyTree]:
    """The one-sided random gradient-free estimate from q + 1 values; see the module. Returns L(w) and the estimate.

    Raises:
      ValueError: q below 1.
    """
    if q < 1:
        raise ValueError(f"q {q}: there is at least one direction")
    flat, unravel = ravel_pytree(params)
    b, here = jnp.asarray(b, flat.dtype), loss(params)

    def add(total: Array, key: Any) -> tuple[Array, None]:
        u = jax.random.normal(key, flat.shape, flat.dtype)
        u = u / jnp.linalg.norm(u)
        return total + u * (loss(unravel(flat + b * u)) - here).astype(flat.dtype) / b, None

    total, _ = jax.lax.scan(add, jnp.zeros_like(flat), jax.random.split(key, q))
    return here, unravel(total * (flat.shape[0] / q))


def gain(start: Any, decay: Any, offset: Any = 0) -> optax.Schedule:
    """`start / (k + offset)^decay` for k = 1, 2, ...: an optax schedule, whose count begins at 0."""
    return lambda count: start / (count + 1 + offset) ** decay


class SpsaGcState(NamedTuple):
    """State of `spsa_gc`."""

    count: Int[Array, ""]  # updates made
    momentum: PyTree  # m


def spsa_gc(a: Any = 0.01, offset: Any = 1.0, decay: Any = 0.4, beta: Any = 0.9) -> optax.GradientTransformation:
    """SPSA with gradient correction, for any estimate of a gradient; β = 0 is plain SPSA.

    Args:
      a, offset, decay: of the gain a_k = a / (k + o)^α, k from 1.
      beta: β. All may be traced.
    """
    schedule = gain(a, decay, offset)

    def init(params: PyTree) -> SpsaGcState:
        return SpsaGcState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        m = jax.tree.map(lambda m, g: beta * m + g, state.momentum, updates)
        a_k = jnp.asarray(schedule(state.count.astype(jnp.float32)))
        new = jax.tree.map(lambda g, m: -a_k.astype(g.dtype) * (g + beta * m), updates, m)
        return new, SpsaGcState(state.count + 1, m)

    return optax.GradientTransformation(init, update)
