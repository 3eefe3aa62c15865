"""Three heads on one encoder, and the choice among them for each input; the last step of `robustify`.

Letters: n examples, C classes, d features, P passes; K_c, K_u, K_m the clean, the unclean and the combined head.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxpeft import trees

__all__ = [
    "CLEAN",
    "COMBINED",
    "UNCLEAN",
    "Chosen",
    "Heads",
    "dense",
    "head_logits",
    "mc_forward",
    "predict",
    "select_head",
    "three_heads",
    "uncertainty_of",
]

CLEAN, UNCLEAN, COMBINED = 0, 1, 2

Rule = Literal["entropy+kl", "entropy"]
Uncertainty = Literal["entropy", "variance", "information"]


class Heads(NamedTuple):
    """Of each head, whatever it is: parameters, logits, probabilities."""

    clean: Any
    unclean: Any
    combined: Any


class Chosen(NamedTuple):
    """Which head answers each input, and its answer."""

    probs: Float[Array, "n C"]
    choice: Int[Array, "n"]  # CLEAN, UNCLEAN or COMBINED


def three_heads(head: PyTree) -> Heads:
    """Three copies of the pretrained head, as all three start. (Copies: a training step may donate their buffers.)"""
    copy = lambda: jax.tree.map(lambda x: jnp.array(x, copy=True), head)
    return Heads(copy(), copy(), copy())


def dense(head: PyTree, h: Float[Array, "n d"]) -> Float[Array, "n C"]:
    """A linear head's logits; `head` has `kernel` (d, C) and `bias` (C,)."""
    return h @ head["kernel"] + head["bias"]


def head_logits(
    heads: Heads,
    h: Float[Array, "n d"],
    key: Key[Array, ""] | None = None,
    *,
    dropout: Any = 0.1,
    apply_head: Callable[[PyTree, Array], Array] = dense,
) -> Heads:
    """The three heads' logits (n, C) on the same features, of which the same are dropped for all three.

    Args:
      key: of the dropout; None for none.
      dropout: the share dropped, 0 to under 1; may be traced.
      apply_head: `(head, features) -> logits`.
    """
    if key is not None:
        kept = 1 - jnp.asarray(dropout, h.dtype)
        h = jnp.where(jax.random.bernoulli(key, kept, h.shape), h / kept, 0)
    return Heads(*(apply_head(head, h) for head in heads))


def mc_forward(
    apply: Callable[[PyTree, PyTree, Key[Array, ""]], PyTree],
    params: PyTree,
    key: Key[Array, ""],
    x: PyTree,
    passes: int,
) -> PyTree:
    """Probabilities of `passes` runs with different keys. What comes before the first use of the key runs once.

    Args:
      apply: `(params, x, key) -> logits`, (n, C) or a tree of such.
      passes: P, at least 1.

    Returns:
      (P, n, C), or a tree of such.

    Raises:
      ValueError: no passes.
    """
    if passes < 1:
        raise ValueError(f"{passes} passes: there is at least one")
    logits = jax.vmap(lambda key: apply(params, x, key))(jax.random.split(key, passes))
    return jax.tree.map(lambda z: jax.nn.softmax(z.astype(trees.wide_dtype(z.dtype)), -1), logits)


def uncertainty_of(probs: Float[Array, "P n C"], kind: Uncertainty = "entropy") -> Float[Array, "n"]:
    """How unsure P passes are of each input.

        entropy        H of their mean
        variance       of the probability that they give the mean's best class
        information    H of their mean less their mean H: what the passes disagree on

    Raises:
      ValueError: an unknown kind, or an array that is not (P, n, C).
    """
    if kind not in get_args(Uncertainty):
        raise ValueError(f"uncertainty {kind!r}: expected one of {', '.join(map(repr, get_args(Uncertainty)))}")
    probs = jnp.asarray(probs)
    if probs.ndim != 3 or not probs.shape[0]:
        raise ValueError(f"probabilities of shape {probs.shape}: expected (P, n, C), P at least 1")
    mean = probs.mean(0)
    if kind == "entropy":
        return entropy(mean)
    if kind == "information":
        return entropy(mean) - entropy(probs).mean(0)
    return jnp.take_along_axis(probs, mean.argmax(-1)[None, :, None], -1)[..., 0].var(0)


def select_head(
    pc: Float[Array, "n C"],
    pu: Float[Array, "n C"],
    pm: Float[Array, "n C"],
    *,
    delta: Any = None,
    eps: Any = 0.05,
    rule: Rule | Callable[..., Int[Array, "n"]] = "entropy+kl",
    uncertainty: tuple[Float[Array, "n"], Float[Array, "n"]] | None = None,
) -> Chosen:
    """The head for each input, from predictions alone; see the module. Ties go to the combined head.

    Args:
      pc, pu, pm: the heads' (mean) probabilities.
      delta: δ, 0 or more, in units of the uncertainty; may be traced. None is log(C) / 10. With 0, the surer of K_c and K_u
        answers; with infinity neither does for being surer.
      eps: ε, 0 or more; may be traced. With infinity, K_m answers where δ does not decide.
      rule: "entropy" leaves the second line of the rule out. A function `(pc, pu, pm, uncertainty, delta, eps) -> choice`
        replaces it, of which `uncertainty` is the pair.
      uncertainty: of K_c and of K_u, where not the entropies of pc and pu.

    Raises:
      ValueError: an unknown rule, or shapes that do not agree.
    """
    if not callable(rule) and rule not in get_args(Rule):
        raise ValueError(f"rule {rule!r}: expected a function or one of {', '.join(map(repr, get_args(Rule)))}")
    pc, pu, pm = (jnp.asarray(p) for p in (pc, pu, pm))
    if not pc.shape == pu.shape == pm.shape or pc.ndim != 2:
        raise ValueError(f"probabilities {pc.shape}, {pu.shape}, {pm.shape}: expected one shape (n, C)")
    uc, uu = (entropy(pc), entropy(pu)) if uncertainty is None else uncertainty
    uc, uu = (each_of("uncertainty", u, len(pc)) for u in (uc, uu))
    delta = jnp.log(jnp.asarray(pc.shape[-1], uc.dtype)) / 10 if delta is None else jnp.asarray(delta, uc.dtype)
    if callable(rule):
        choice = rule(pc, pu, pm, (uc, uu), delta, eps)
    else:
        choice = jnp.full(pc.shape[:1], COMBINED, jnp.int32)
        if rule == "entropy+kl":
            to_c, to_u = _kl(pm, pc), _kl(pm, pu)
            nearer = jnp.where(to_c < to_u, CLEAN, UNCLEAN)
            choice = jnp.where(jnp.abs(to_c - to_u) > jnp.asarray(eps, to_c.dtype), nearer, choice)
        choice = jnp.where(jnp.abs(uc - uu) > delta, jnp.where(uc < uu, CLEAN, UNCLEAN), choice)
    probs = jnp.take_along_axis(jnp.stack([pc, pu, pm]), choice[None, :, None], 0)[0]
    return Chosen(probs, choice.astype(jnp.int32))


def predict(
    heads: Heads,
    h: Float[Array, "n d"],
    key: Key[Array, ""],
    *,
    passes: int = 10,
    dropout: Any = 0.1,
    kind: Uncertainty = "entropy",
    apply_head: Callable[[PyTree, Array], Array] = dense,
    **options: Any,
) -> Chosen:
    """The whole of the inference on the encoder's features: dropout before the heads, their means, the choice.

    Args and errors as in `head_logits`, `mc_forward`, `uncertainty_of` (its `kind`); `options` are `select_head`'s.
    """
    run = lambda heads, h, key: head_logits(heads, h, key, dropout=dropout, apply_head=apply_head)
    p = mc_forward(run, heads, key, h, passes)
    unsure = uncertainty_of(p.clean, kind), uncertainty_of(p.unclean, kind)
    return select_head(*(x.mean(0) for x in p), uncertainty=unsure, **options)


def each_of(what: str, x: Any, n: int) -> Array:
    """One value for each of n examples; raises ValueError otherwise, naming `what`."""
    x = jnp.asarray(x)
    if x.shape != (n,):
        raise ValueError(f"{what} of shape {x.shape} for {n} examples: expected ({n},)")
    return x


def _log(p: Any) -> Any:
    """Finite at 0, where p log p must be 0 and a divergence large but comparable."""
    return jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))


def entropy(p: Any) -> Any:
    """H of the last axis."""
    return -(p * _log(p)).sum(-1)


def _kl(p: Any, q: Any) -> Any:
    return (p * (_log(p) - _log(q))).sum(-1)
