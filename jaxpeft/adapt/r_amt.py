"""R-AMT: Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models (Zheng et al., ICCV
2023, arXiv:2307.15049).

A frozen model is adapted by switching some of its weights off: a binary mask on chosen weight matrices, learned through
real-valued scores R and a straight-through gradient. One bit a masked weight is kept; nothing is added at inference.

    W' = m * W,   m = 1[R > t],   dL/dR := dL/dm = (dL/dW') * W          R = s = 0.01 at the start, t = 0.005

AMT trains R by a = d(L_ce + lambda Σ_l |R_l|_2)/dR. R-AMT drops entries of a at random where they disagree with
b = dL_kl/dR, the gradient of a distillation loss to the unmasked model (gradient dropout regularity):

    P = (1 + sign(a) (a + b) / (|a| + |b| + eps)) / 2          1 where a and b agree, |a| / (|a| + |b|) where not
    g = ((1 - l) + l 1[P > U]) a,   U ~ U[0, 1)                l = 0 is AMT; L_kl itself is never descended
    L_kl = τ² mean_n(- Σ_c softmax(z0 / τ)_c log softmax(z / τ)_c)

An entry is s - t above the threshold and Adam moves it by about the rate: nothing flips before (s - t) / rate steps.

Reference code: wuw2019/R-AMT @07f8d2c (code/modules/masklayers.py, code/trainers/masktuning.py, code/loss/reg_loss.py).
It masks the attention's projections (and the patch convolution) of CLIP's image tower.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree, UInt8

from jaxpeft import trees
from jaxpeft.method import Adapted, Delta, Method, on_weights, register, site_key
from jaxpeft.roles import Role
from jaxpeft.weights import masked

__all__ = ["gdr", "pack", "r_amt", "regularised", "switched_off", "unpack"]

AT = "**/attention/{query,key,value,qkv,out}/kernel"


@jax.custom_vjp
def straight_through(scores: Float[Array, "*w"], threshold: Float[Array, ""]) -> Float[Array, "*w"]:
    """1 where the score is over the threshold, else 0; its gradient is passed on to the scores as it is."""
    return (scores > threshold).astype(scores.dtype)


straight_through.defvjp(
    lambda scores, threshold: (straight_through(scores, threshold), threshold),
    lambda threshold, g: (g, jnp.zeros_like(threshold)),
)


def gdr(key: Key[Array, ""], a: PyTree, b: PyTree, rate: Any, eps: float = 1e-8) -> PyTree:
    """Gradient dropout regularity: `a`, with entries that disagree with `b` dropped at random.

    Args:
      key: of U, drawn anew for every entry.
      a: gradient of what is minimised.
      b: gradient of what should not be forgotten; a tree like `a`.
      rate: l, in 0..1; may be traced.
      eps: where |a| + |b| is far below it, P is 1/2 whatever their signs.

    Returns:
      A tree like `a`: each entry is its own or, where it is dropped, (1 - l) of it.
    """

    def one(path: str, x: Array, y: Array) -> Array:
        wide = trees.wide_dtype(x.dtype)
        p, q = x.astype(wide), y.astype(wide)
        share = 0.5 * (1 + jnp.sign(p) * (p + q) / (jnp.abs(p) + jnp.abs(q) + eps))
        keep = share > jax.random.uniform(site_key(key, path), x.shape, wide)
        return (((1 - rate) + rate * keep) * p).astype(x.dtype)

    other = trees.by_path(b)
    return trees.replace_leaves(a, {p: one(p, x, other[p]) for p, x in trees.by_path(a).items()})


def penalty(scores: PyTree) -> Float[Array, ""]:
    """Σ_l |R_l|_2 over the leaves named "scores": the plain norm, with gradient zero where all of a leaf is zero."""
    total = jnp.zeros(())
    for path, x in trees.by_path(scores).items():
        if path.endswith("scores"):
            square = jnp.sum(jnp.square(x.astype(jnp.float32)))
            safe = jnp.where(square > 0, square, 1.0)
            total = total + jnp.where(square > 0, jnp.sqrt(safe), 0.0)
    return total


def regularised(
    adapted: Adapted, task: Any, rate: Any, *, norm: Any = 1e-4, temperature: Any = 1.0, eps: float = 1e-8
) -> Callable[..., Any]:
    """R-AMT's gradient, in the place of `jax.value_and_grad` in `train.make_step(gradient=...)`.

    The teacher is the base itself, run on the same batch. One forward pass of the student serves both gradients.

    Args:
      adapted: with `r_amt` in its method.
      task: the one that `make_step` is given; its outputs are logits (b, c).
      rate: l; may be traced.
      norm: lambda of the scores' norms.
      temperature: τ.
      eps: of `gdr`.
    """

    def gradient(function: Callable[..., Any], *, has_aux: bool = True) -> Callable[..., Any]:
        del function  # the step's loss, which stands below with the distillation beside it
        assert has_aux

        def run(learned: PyTree, state: Any, params: PyTree, batch: Any, key: Any) -> Any:
            own, draws = jax.random.split(key)
            weight = jnp.maximum(jnp.sum(batch.weight), 1.0)
            base = lambda *inputs, dropout_key=None, **more: adapted.base(params, *inputs, **more)
            z0 = jax.lax.stop_gradient(task.forward(base, batch, None)).astype(jnp.float32)

            def losses(learned: PyTree) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
                delta = trees.combine(learned, state.fixed)
                z = task.forward(lambda *x, **k: adapted.apply(params, delta, *x, **k), batch, own)
                ce = jnp.sum(task.loss(z, batch) * batch.weight) / weight
                log_p = jax.nn.log_softmax(z.astype(jnp.float32) / temperature)
                kl = -jnp.sum(jax.nn.softmax(z0 / temperature) * log_p, -1) * temperature**2
                hits = jnp.sum((z.argmax(-1) == batch.label) * batch.weight)
                return (ce + norm * penalty(learned), jnp.sum(kl * batch.weight) / weight), (ce, hits)

            _, pull, (ce, hits) = jax.vjp(losses, learned, has_aux=True)
            one, zero = jnp.ones(()), jnp.zeros(())
            (a,), (b,) = pull((one, zero)), pull((zero, one))
            # The step divides by the batch's weight, as for sums.
            grads = jax.tree.map(lambda g: g * weight, gdr(draws, a, b, rate, eps))
            return (ce * weight, hits), grads

        return run

    return gradient


def switched_off(delta: Delta, threshold: Any = 0.005) -> Float[Array, ""]:
    """The share of masked entries that are zero."""
    scores = [x for p, x in trees.by_path(delta).items() if p.endswith("scores")]
    off = sum((jnp.sum(x <= threshold) for x in scores), jnp.zeros((), jnp.int32))
    return off / sum(x.size for x in scores)


def pack(scores: Float[Array, "*w"], threshold: float = 0.005) -> UInt8[np.ndarray, "n"]:
    """The mask as bits, row by row, the last byte filled with zeros."""
    return np.packbits(np.asarray(scores) > threshold)


def unpack(bits: UInt8[np.ndarray, "n"], shape: tuple[int, ...]) -> Bool[np.ndarray, "*w"]:
    """Undoes `pack`.

    Raises:
      ValueError: bits for another shape.
    """
    size = int(np.prod(shape))
    if len(bits) != -(-size // 8):
        raise ValueError(f"{len(bits)} bytes for a mask of shape {shape}, which takes {-(-size // 8)}")
    return np.unpackbits(bits, count=size).astype(bool).reshape(shape)


@register(
    family="adapt", paper="Zheng et al., ICCV 2023", mechanism="weights", mergeable=True, exact_start=True, rate=1e-3
)
def r_amt(
    at: trees.Pattern = AT, *, start: Any = 0.01, threshold: float = 0.005, spread: bool = False, name: str = "r_amt"
) -> Method:
    """Binary masks on chosen weights. Trained by an ordinary step it is AMT; with `regularised` it is R-AMT.

    Args:
      at: pattern of weights.
      start: s, the scores at the start, over the threshold.
      threshold: t; a score of exactly t switches its weight off.
      spread: scores start at U(0, s) instead of s (some weights are then off from the start).
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is `{path: {"scores": like the weight}}`. It merges, and starts as its base unless `spread`.

    Raises:
      ValueError: scores that would start at or under the threshold.
      PatternError: nothing matches `at`.
    """
    if isinstance(start, int | float) and not start > threshold:
        raise ValueError(f"start {start} is not over the threshold {threshold}: every weight would be off")

    def init(key: Key[Array, ""], path: str, w: Array, role: Role) -> dict[str, Array]:
        dtype = trees.wide_dtype(w.dtype)
        scores = jnp.full(w.shape, start, dtype)
        return {"scores": scores * jax.random.uniform(key, w.shape, dtype) if spread else scores}

    def build(path: str, w: Array, d: dict[str, Array], key: Key[Array, ""] | None) -> Any:
        return masked(w, straight_through(d["scores"], jnp.asarray(threshold, d["scores"].dtype)))

    config = dict(method="r_amt", at=at, start=start, threshold=threshold, spread=spread, name=name)
    return on_weights(name, at, init, build, config, factored=False)
