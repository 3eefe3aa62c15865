"""Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time
(Wortsman et al., ICML 2022, arXiv:2203.05482), and WiSE-FT (Wortsman et al., CVPR 2022, arXiv:2109.01903).

k models fine-tuned from one start, head included, are averaged into one:

    uniform   theta = 1/k sum_i theta_i
    greedy    in the order of their scores on held-out data each model joins the mean if the score does not fall
    learned   theta_l = sum_i alpha_{l,i} theta_i, alpha = softmax(a); a and beta minimise CE(beta f(x; theta), y) on
              held-out data
    WiSE-FT   theta = (1 - alpha) theta0 + alpha theta_1

A soup of models whose heads started apart does not work. Running statistics (batch normalisation) have to be computed
anew for a soup: leave them out by `exclude` and run the model over data. What a soup is chosen by is biased upwards:
report test data.

Reference code: mlfoundations/model-soups @d5398f1 (main.py, learned_bylayer.py). Departures: a model that leaves the
score as it was is taken, as in the paper's recipe 1, where the code asks for more (accept="gt"); of equal scores the
lower index comes first, where the code has them reversed; the sum and the count are carried, not a running mean.

Letters: k models, n batches, b examples, C classes.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxpeft import trees
from jaxpeft.merge.registry import register_merge
from jaxpeft.merge.stack import from_base, joined, split, stacked, summed, weighted_sum, widened
from jaxpeft.updates import descend

__all__ = [
    "Greedy",
    "Learned",
    "greedy_selection",
    "greedy_soup",
    "learned_mixture",
    "learned_soup",
    "logit_ensemble",
    "soup",
    "uniform_soup",
    "wise_ft",
]

Params = PyTree


def soup(base: Params | None, models: PyTree, *, weights: Any, exclude: trees.Pattern | None = None) -> Params:
    """A weighted sum of models, with whatever weights.

    Args:
      base: gives dtypes and what is not merged; None for the first model.
      models: k models, a list or a stack.
      weights: (k,), or a tree of such vectors, one for each block or leaf. `vmap` over them gives a curve or a surface.
      exclude: pattern of leaves that are not merged.

    Raises:
      MergeInputError, PatternError: as `split`.
    """
    parts = split(base, models, exclude)
    return joined(parts, weighted_sum(parts.models, weights))


@register_merge(paper="Wortsman et al., ICML 2022", needs_base=False)
def uniform_soup(base: Params | None, models: PyTree, *, exclude: trees.Pattern | None = None) -> Params:
    """The mean of all models.

    Args:
      base, models, exclude: as in `soup`.

    Example:
      >>> import jax.numpy as jnp
      >>> uniform_soup(None, [{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}])["w"].tolist()
      [0.5, 0.5]
    """
    parts = split(base, models, exclude)
    return joined(parts, jax.tree.map(lambda x: summed(x) / parts.size, parts.models))


@register_merge(paper="Wortsman et al., CVPR 2022", needs_base=True, hyper={"alpha": (0.0, 1.0)})
def wise_ft(base: Params, models: PyTree, *, alpha: Any = 0.5, exclude: trees.Pattern | None = None) -> Params:
    """A point on the line from the base (alpha 0) to a fine-tuned model (alpha 1), or to the mean of several.

    Args:
      base: theta0, the model before fine-tuning.
      models: the fine-tuned one, as a list or a stack of one; or several.
      alpha: may lie outside of 0 to 1, and be traced.
      exclude: pattern of leaves that stay the base's.

    Raises:
      MergeInputError, PatternError: as `split`.
    """
    parts = from_base(base, models, exclude)

    def point(b: Array, x: Array) -> Array:
        a = jnp.asarray(alpha).astype(x.dtype)
        return (1 - a) * widened(b).astype(x.dtype) + a * (summed(x) / parts.size)

    return joined(parts, jax.tree.map(point, parts.base, parts.models))


def logit_ensemble(
    apply_fn: Callable[..., Float[Array, "b C"]], models: PyTree, *inputs: Any, weights: Any = None
) -> Float[Array, "b C"]:
    """The mean of the models' logits: what a soup is measured against, at k times its cost.

    Args:
      apply_fn: `(params, *inputs) -> logits`.
      models: k models, a list or a stack.
      weights: (k,), or None for the mean.

    The greedy ensemble is `greedy_selection` of logits, which are models too: a stack of (k, b, C) and a score of (b,
    C).
    """
    stack = stacked(models)
    logits = jax.vmap(apply_fn, (0, *(None for _ in inputs)))(stack, *inputs)
    wide = jax.tree.map(widened, logits)
    return jax.tree.map(lambda x: x.mean(0), wide) if weights is None else weighted_sum(wide, weights)


# -------------------------------------------------------------------------------------------------------------- greedy


class Greedy(NamedTuple):
    """What `greedy_selection` found.

    Attributes:
      params: the mean of the chosen models.
      chosen: (k,), which models are in it.
      score: of the soup, on the data that chose it; at least the best model's.
      scores: (k,), of the models alone; NaN as it came.
      order: (k,), the models as they were tried.
    """

    params: Params
    chosen: Bool[Array, "k"]
    score: Float[Array, ""]
    scores: Float[Array, "k"]
    order: Int[Array, "k"]


def greedy_selection(
    base: Params | None,
    models: PyTree,
    *,
    score_fn: Callable[[Params], Any],
    accept: Literal["ge", "gt"] = "ge",
    order: Any = None,
    host: bool = False,
    exclude: trees.Pattern | None = None,
) -> Greedy:
    """Chooses models for a soup, best first, each if the score of the mean with it does not fall (recipe 1).

    A score that is NaN comes last and is never accepted: a diverged model does not enter. Where all are, so is the
    result.

    Args:
      base, models, exclude: as in `soup`.
      score_fn: `(params) -> scalar` on held-out data, larger is better. Traced once; the whole selection is then one
        program.
      accept: what the score must do: "ge", not fall (the paper), or "gt", rise (its code).
      order: (k,), which model is tried when, the first being the start; None for the order of the scores.
      host: run `score_fn` outside of any program, as one must where it reads a data loader.

    Raises:
      ValueError: an unknown `accept`, an order of the wrong length.
      MergeInputError, PatternError: as `split`.

    Example:
      >>> import jax.numpy as jnp
      >>> models = [{"w": jnp.array([x])} for x in (0.0, 3.0, 2.0)]
      >>> found = greedy_selection(None, models, score_fn=lambda p: -jnp.abs(p["w"][0] - 2.4))
      >>> found.chosen.tolist(), found.params["w"].tolist()
      ([False, True, True], [2.5])
    """
    if accept not in ("ge", "gt"):
        raise ValueError(f"accept {accept!r}: expected 'ge' or 'gt'")
    parts = split(base, models, exclude)
    if order is not None and jnp.shape(order) != (parts.size,):
        raise ValueError(f"an order of shape {jnp.shape(order)} for {parts.size} models: expected one place a model")
    number = lambda s: jnp.asarray(s).astype(jnp.float32)
    one = lambda i: jax.tree.map(lambda x: x[i], parts.models)
    score = lambda mean: number(score_fn(joined(parts, mean)))

    def attempt(state: Any, i: Any, score: Callable[[PyTree], Array] = score) -> tuple[Any, None]:
        total, count, best, chosen = state
        with_it = jax.tree.map(lambda t, x: t + x, total, one(i))
        new = score(jax.tree.map(lambda t: t / (count + 1).astype(t.dtype), with_it))
        better = new >= best if accept == "ge" else new > best  # never where it is NaN
        total = jax.tree.map(lambda t, w: jnp.where(better, w, t), total, with_it)
        return (total, count + better.astype(count.dtype), jnp.where(better, new, best), chosen.at[i].set(better)), None

    if host:
        scores = jnp.stack([score(one(i)) for i in range(parts.size)])
    else:
        scores = jax.lax.map(score, parts.models)
    places = jnp.argsort(-scores, stable=True) if order is None else jnp.asarray(order)
    first = places[0]
    state = (one(first), jnp.ones((), jnp.int32), scores[first], jnp.zeros(parts.size, bool).at[first].set(True))
    if host:
        for i in places[1:]:
            state, _ = attempt(state, i)
    else:
        state, _ = jax.lax.scan(attempt, state, places[1:])
    total, count, best, chosen = state
    params = joined(parts, jax.tree.map(lambda t: t / count.astype(t.dtype), total))
    return Greedy(params, chosen, best, scores, places)


@register_merge(paper="Wortsman et al., ICML 2022", needs_base=False, needs=("score_fn",))
def greedy_soup(
    base: Params | None,
    models: PyTree,
    *,
    score_fn: Callable[[Params], Any],
    accept: Literal["ge", "gt"] = "ge",
    order: Any = None,
    host: bool = False,
    exclude: trees.Pattern | None = None,
) -> Params:
    """The mean of models chosen greedily on held-out data; `greedy_selection` tells which.

    Args are those of `greedy_selection`.
    """
    return greedy_selection(
        base, models, score_fn=score_fn, accept=accept, order=order, host=host, exclude=exclude
    ).params


# ------------------------------------------------------------------------------------------------------------- learned


class Learned(NamedTuple):
    """What `learned_mixture` found.

    Attributes:
      params: the soup.
      alpha: (k,), or a tree of such vectors, one a leaf; each sums to one.
      beta: what logits were multiplied by; the soup's own logits are without it.
      losses: (steps,), before each step.
    """

    params: Params
    alpha: PyTree
    beta: Float[Array, ""]
    losses: Float[Array, "steps"]


def learned_mixture(
    base: Params | None,
    models: PyTree,
    *,
    apply_fn: Callable[[Params, Any], Float[Array, "b C"]],
    batches: tuple[Any, Int[Array, "n b"]],
    steps: int = 100,
    rate: Any = 0.05,
    per_leaf: bool = False,
    exclude: trees.Pattern | None = None,
) -> Learned:
    """Learns the weights of a soup by gradient descent (Adam) on held-out data; the models themselves are constants.

    All models are in memory at once. Starts at the uniform soup.

    Args:
      base, models, exclude: as in `soup`.
      apply_fn: `(params, x) -> logits`.
      batches: inputs (n, b, ...) and labels (n, b); step i sees batch i mod n.
      steps: 0 is the uniform soup.
      rate: the learning rate; may be traced.
      per_leaf: one mixture a leaf ("by layer" in the paper) or one for all.

    Raises:
      MergeInputError, PatternError: as `split`.
    """
    parts = split(base, models, exclude)
    zeros = lambda: jnp.zeros(parts.size, jnp.float32)
    start = {
        "a": jax.tree.map(lambda _: zeros(), parts.base) if per_leaf else zeros(),
        "beta": jnp.ones((), jnp.float32),
    }
    size = jtu.tree_leaves(batches)[0].shape[0]

    def mixed(a: PyTree) -> Params:
        return joined(parts, weighted_sum(parts.models, jax.tree.map(jax.nn.softmax, a)))

    def loss(learned: PyTree, i: Array) -> Array:
        x, y = jax.tree.map(lambda b: b[i % size], batches)
        logits = apply_fn(mixed(learned["a"]), x).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(learned["beta"] * logits, y).mean()

    rule = optax.chain(optax.scale_by_adam(), optax.scale(-jnp.asarray(rate, jnp.float32)))
    learned, losses = descend(loss, start, rule, jnp.arange(steps))
    return Learned(mixed(learned["a"]), jax.tree.map(jax.nn.softmax, learned["a"]), learned["beta"], losses)


@register_merge(
    paper="Wortsman et al., ICML 2022", needs_base=False, needs=("apply_fn", "batches"), hyper={"rate": (0.01, 0.2)}
)
def learned_soup(
    base: Params | None,
    models: PyTree,
    *,
    apply_fn: Callable[[Params, Any], Float[Array, "b C"]],
    batches: tuple[Any, Int[Array, "n b"]],
    steps: int = 100,
    rate: Any = 0.05,
    per_leaf: bool = False,
    exclude: trees.Pattern | None = None,
) -> Params:
    """A soup whose weights are learned on held-out data; `learned_mixture` tells them.

    Args are those of `learned_mixture`.
    """
    return learned_mixture(
        base,
        models,
        apply_fn=apply_fn,
        batches=batches,
        steps=steps,
        rate=rate,
        per_leaf=per_leaf,
        exclude=exclude,
    ).params
