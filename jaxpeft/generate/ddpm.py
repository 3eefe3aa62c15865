"""DDPM and DDIM, small and exact: Ho et al., "Denoising diffusion probabilistic models", NeurIPS 2020 (arXiv:2006.11239);
Song et al., "Denoising diffusion implicit models", ICLR 2021 (arXiv:2010.02502); Nichol and Dhariwal, "Improved denoising
diffusion probabilistic models", ICML 2021 (arXiv:2102.09672); Ho and Salimans, "Classifier-free diffusion guidance", 2021
(arXiv:2207.12598).

    forward     x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε,        α_t = 1 - β_t,   ᾱ_t = α_0 α_1 ... α_t,   ε ~ N(0, 1)
    loss        |ε - ε_θ(x_t, t, c)|²,   t uniform;           c becomes the empty condition with probability p
    guidance    ε = ε_θ(x, t, ∅) + w (ε_θ(x, t, c) - ε_θ(x, t, ∅))                            w = 1: no guidance
    DDPM        x_{t-1} = μ(x̂_0, x_t) + σ_t z,                σ_t² = β̃_t = β_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t),  or β_t
    DDIM        x_s = sqrt(ᾱ_s) x̂_0 + sqrt(1 - ᾱ_s - σ²) ε + σ z,    σ = η sqrt((1 - ᾱ_s)/(1 - ᾱ_t)) sqrt(1 - ᾱ_t/ᾱ_s)

with x̂_0 = (x_t - sqrt(1 - ᾱ_t) ε) / sqrt(ᾱ_t). Times are 0 ... T-1, and ᾱ_{-1} = 1: after the last step there is no noise.
For data that are one point, DDPM with β̃ and DDIM with any η return it exactly; for data from N(0, 1), DDPM with β does.

A network is any function `predict(x, t, condition) -> ε`: x (b, ...), t (b,) int32, condition a tree whose leaves have the
examples on their leading axis (labels), or None. All is pure, may be jitted, vmapped and differentiated; sampling is one scan.

Letters: b batch, T diffusion times, S sampling steps.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

__all__ = [
    "Predict",
    "Schedule",
    "cosine",
    "ddim",
    "ddpm",
    "drop_labels",
    "epsilon_loss",
    "guided",
    "linear",
    "posterior",
    "predict_noise",
    "predict_start",
    "q_sample",
    "schedule",
]

Predict = Callable[[Any, Any, Any], Any]  # (x, t, condition) -> ε; a model's `apply` may declare more


class Schedule(NamedTuple):
    """How much noise there is when.

    Attributes:
      beta: β_t, in (0, 1).
      alpha_bar: ᾱ_t, falling from nearly 1 to nearly 0.
      before: ᾱ_{t-1}, 1 at t = 0.
    """

    beta: Float[Array, "T"]
    alpha_bar: Float[Array, "T"]
    before: Float[Array, "T"]

    @property
    def times(self) -> int:
        """T."""
        return self.beta.shape[0]


def schedule(beta: Any) -> Schedule:
    """The schedule of these β, given as concrete numbers.

    Raises:
      ValueError: no β, or one outside (0, 1).
    """
    beta = np.asarray(beta, np.float64)
    if beta.ndim != 1 or not beta.size or not ((beta > 0) & (beta < 1)).all():
        raise ValueError(
            f"β of shape {beta.shape} from {beta.min(initial=1)} to {beta.max(initial=0)}: each is in (0, 1)"
        )
    # In float64 on the host: a product of a thousand float32 factors loses three digits.
    alpha_bar = np.cumprod(1 - beta)
    before = np.append(1.0, alpha_bar[:-1])
    return Schedule(*(jnp.asarray(x, jnp.float32) for x in (beta, alpha_bar, before)))


def linear(times: int, start: float | None = None, end: float | None = None) -> Schedule:
    """β from `start` to `end` in equal steps (Ho et al., section 4).

    Args:
      times: T, at least 1.
      start, end: None for 1e-4 and 0.02 times 1000 / T: the same total noise at any T, as in Nichol and Dhariwal's code.

    Raises:
      ValueError: T below 1, or a β outside (0, 1); the defaults need T over 20.
    """
    start = 0.1 / max(times, 1) if start is None else start
    end = 20 / max(times, 1) if end is None else end
    return schedule(np.linspace(start, end, max(times, 0)))


def cosine(times: int, offset: float = 0.008, largest: float = 0.999) -> Schedule:
    """ᾱ_t = f(t + 1) / f(0), f(t) = cos²(π/2 (t/T + s) / (1 + s)); β at most `largest` (Nichol and Dhariwal, eq. 17).

    Args:
      times: T, at least 1.
      offset: s, at least 0: less noise in the first steps where it is larger.
      largest: of β, below 1.

    Raises:
      ValueError: values out of range.
    """
    if offset < 0:
        raise ValueError(f"offset {offset}: at least 0")
    f = np.cos(np.pi / 2 * (np.arange(max(times, 0) + 1) / max(times, 1) + offset) / (1 + offset)) ** 2
    return schedule(np.minimum(1 - f[1:] / f[:-1], largest))


def _at(values: Float[Array, "T"], t: Int[Array, "*b"], like: Array) -> Array:
    """The values at each example's time, to be multiplied with `like`."""
    found = values[t].astype(like.dtype)
    return found.reshape(*found.shape, *(1,) * (like.ndim - found.ndim))


def q_sample(
    schedule: Schedule, x0: Float[Array, "b ..."], t: Int[Array, "b"], noise: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """x_t of the forward process, in one step from x_0."""
    a = _at(schedule.alpha_bar, t, x0)
    return jnp.sqrt(a) * x0 + jnp.sqrt(1 - a) * noise


def predict_start(
    schedule: Schedule, x: Float[Array, "b ..."], t: Int[Array, "b"], noise: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """x̂_0: what `q_sample` with this noise made x of."""
    a = _at(schedule.alpha_bar, t, x)
    return (x - jnp.sqrt(1 - a) * noise) / jnp.sqrt(a)


def predict_noise(
    schedule: Schedule, x: Float[Array, "b ..."], t: Int[Array, "b"], x0: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """ε: the noise with which `q_sample` made x of x_0."""
    a = _at(schedule.alpha_bar, t, x)
    return (x - jnp.sqrt(a) * x0) / jnp.sqrt(1 - a)


def posterior(
    schedule: Schedule, x0: Float[Array, "b ..."], x: Float[Array, "b ..."], t: Int[Array, "b"]
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """Mean and variance of x_{t-1} given x_t and x_0 (Ho et al., eq. 6 and 7); the variance broadcasts to the mean."""
    beta, a, before = (_at(v, t, x) for v in schedule)
    mean = (jnp.sqrt(before) * beta * x0 + jnp.sqrt(1 - beta) * (1 - before) * x) / (1 - a)
    return mean, beta * (1 - before) / (1 - a)


def drop_labels(key: Key[Array, ""], condition: PyTree, empty: PyTree, rate: Any) -> PyTree:
    """The condition, an example's as a whole exchanged for `empty` with probability `rate`.

    Args:
      condition: a tree of (b, ...).
      empty: a tree of the same structure, of what stands for no condition (the number of the empty class).
      rate: may be traced.
    """
    leaves = jax.tree.leaves(condition)
    if not leaves:
        return condition
    drop = jax.random.bernoulli(key, rate, leaves[0].shape[:1])

    def one(c: Array, e: Any) -> Array:
        return jnp.where(drop.reshape(-1, *(1,) * (c.ndim - 1)), jnp.asarray(e, c.dtype), c)

    return jax.tree.map(one, condition, empty)


def epsilon_loss(
    predict: Predict,
    schedule: Schedule,
    key: Key[Array, ""],
    x0: Float[Array, "b ..."],
    condition: PyTree = None,
    empty: PyTree = None,
    drop: Any = 0.0,
) -> Float[Array, "b"]:
    """Each example's loss at one random time: the mean over its entries of |ε - ε_θ|² (Ho et al., eq. 14).

    Args:
      predict: ε_θ.
      key: of the times, the noise and what is dropped.
      condition, empty, drop: see `drop_labels`; without `empty` nothing is dropped. `drop` may be traced.
    """
    times, noises, drops = jax.random.split(key, 3)
    t = jax.random.randint(times, x0.shape[:1], 0, schedule.times)
    noise = jax.random.normal(noises, x0.shape, x0.dtype)
    c = condition if empty is None else drop_labels(drops, condition, empty, drop)
    error = predict(q_sample(schedule, x0, t, noise), t, c) - noise
    return jnp.square(error.astype(jnp.float32)).reshape(x0.shape[0], -1).mean(1)


def guided(predict: Predict, weight: Any, empty: PyTree) -> Predict:
    """ε with classifier-free guidance, from one call on 2 b examples.

    Args:
      weight: w: 0 is unconditional, 1 conditional, more is guided; a scalar, may be traced. In the other common notation
        (1 + v) ε_c - v ε_∅, it is 1 + v.
      empty: what stands for no condition; see `drop_labels`.
    """

    def run(x: Array, t: Array, condition: Any) -> Array:
        none = jax.tree.map(lambda c, e: jnp.broadcast_to(jnp.asarray(e, c.dtype), c.shape), condition, empty)
        twice = lambda a, b: jnp.concatenate([a, b])
        both = predict(twice(x, x), twice(t, t), jax.tree.map(twice, condition, none))
        with_it, without = jnp.split(both, 2)
        return without + jnp.asarray(weight, x.dtype) * (with_it - without)

    return run


def _start_and_noise(
    schedule: Schedule, predict: Predict, x: Array, t: Array, condition: PyTree, clip: float | None
) -> tuple[Array, Array]:
    noise = predict(x, t, condition)
    x0 = predict_start(schedule, x, t, noise)
    if clip is None:
        return x0, noise
    x0 = jnp.clip(x0, -clip, clip)
    return x0, predict_noise(schedule, x, t, x0)


def ddpm(
    predict: Predict,
    schedule: Schedule,
    key: Key[Array, ""],
    noise: Float[Array, "b ..."],
    condition: PyTree = None,
    *,
    variance: Literal["posterior", "beta"] = "posterior",
    clip: float | None = None,
) -> Float[Array, "b ..."]:
    """Samples through all T times (ancestral sampling).

    Args:
      predict: ε_θ; `guided` for guidance.
      key: of the noise in each step.
      noise: x_T, standard normal: `jax.random.normal(key, (b, ...))`.
      condition: of each example.
      variance: σ_t² is β̃_t or β_t.
      clip: x̂_0 is cut to [-clip, clip] (pixels in [-1, 1]: 1.0), and ε follows it; None cuts nothing.

    Raises:
      ValueError: an unknown variance.
    """
    if variance not in ("posterior", "beta"):
        raise ValueError(f"variance {variance!r}: expected 'posterior' or 'beta'")

    def step(x: Array, now: Any) -> tuple[Array, None]:
        time, key = now
        t = jnp.full(x.shape[:1], time)
        x0, _ = _start_and_noise(schedule, predict, x, t, condition, clip)
        mean, smaller = posterior(schedule, x0, x, t)
        size = smaller if variance == "posterior" else _at(schedule.beta, t, x)
        z = jax.random.normal(key, x.shape, x.dtype)
        return mean + jnp.where(time > 0, jnp.sqrt(size), jnp.zeros((), x.dtype)) * z, None

    times = jnp.arange(schedule.times, dtype=jnp.int32)[::-1]
    return jax.lax.scan(step, noise, (times, jax.random.split(key, schedule.times)))[0]


def ddim(
    predict: Predict,
    schedule: Schedule,
    key: Key[Array, ""],
    noise: Float[Array, "b ..."],
    condition: PyTree = None,
    *,
    steps: int,
    eta: Any = 0.0,
    clip: float | None = None,
) -> Float[Array, "b ..."]:
    """Samples through S of the T times, evenly spaced and the first and the last of them always among them.

    Args:
      steps: S, 1 to T. With S = T and η = 1 the steps are those of `ddpm`.
      eta: η: 0 is deterministic given `noise`, 1 as noisy as DDPM; may be traced.
      predict, key, noise, condition, clip: as in `ddpm`; with η = 0 the key changes nothing.

    Raises:
      ValueError: S out of range.
    """
    if not 1 <= steps <= schedule.times:
        raise ValueError(f"steps {steps}: expected 1 to {schedule.times}, the schedule's times")
    chosen = np.round(np.linspace(schedule.times - 1, 0, steps)).astype(np.int32)
    after = jnp.append(schedule.alpha_bar[chosen[1:]], 1.0)  # ᾱ of the time to which a step goes

    def step(x: Array, now: Any) -> tuple[Array, None]:
        time, a_s, key = now
        t = jnp.full(x.shape[:1], time)
        x0, e = _start_and_noise(schedule, predict, x, t, condition, clip)
        a_t = schedule.alpha_bar[time]
        sigma = jnp.asarray(eta, jnp.float32) * jnp.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
        towards = jnp.sqrt(jnp.maximum(1 - a_s - sigma**2, 0.0))
        z = jax.random.normal(key, x.shape, x.dtype)
        return jnp.sqrt(a_s).astype(x.dtype) * x0 + towards.astype(x.dtype) * e + sigma.astype(x.dtype) * z, None

    return jax.lax.scan(step, noise, (jnp.asarray(chosen), after, jax.random.split(key, steps)))[0]
