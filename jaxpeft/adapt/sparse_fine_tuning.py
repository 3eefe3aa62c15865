"""LT-SFT: Composable Sparse Fine-Tuning for Cross-Lingual Transfer (Ansell, Ponti, Korhonen and Vulić, ACL 2022,
arXiv:2110.07560), as Parameter-Efficient Neural Reranking for Cross-Lingual and Multilingual Retrieval (Litschko, Vulić
and Glavaš, COLING 2022, arXiv:2204.02292) uses it for languages and for ranking.

A delta moves k entries of the model and leaves the others; which, a first, dense training finds:

    1.  train all of P (what may move) and H (the head) for T1 steps:                theta1
    2.  M = the k entries of P with the largest |theta1 - theta0|, over all of P together
    3.  everything back to theta0, the head and the optimiser's moments too
    4.  train the entries in M, and H:                                               theta2
    phi = M (theta2 - theta0);    loss + (lambda / N) Σ |theta - theta0| in both trainings, N weights of the whole model

Deltas of one model compose by addition: `compose(theta0, phi_language, phi_ranking)`. A ranking delta that was trained on
theta0 + phi_english is a difference to that sum, so another language takes English's place and the ranking stays.

Step 4 trains values that start at zero and are added at fixed positions: nothing outside M exists to be decayed or moved by
stale moments, and no update needs a mask (`updates.mask_updates` over the whole model does the same with any optimiser
that treats entries apart).

Reference code: cambridgeltl/composable-sft @29f7872 (src/sft/lt_sft.py, trainer.py, sft.py); rlitschk/ModularCLIR @9f8150b
(src/sft_retrieval.py). Departures: exactly k entries are taken, the first of equal ones, where the reference takes all
that reach the k-th largest; it can also repeat the procedure with k/n entries each (n = 1 in both papers), which is left
out; lambda's term in step 4 belongs to the loss of the run that follows: `anchor_l1` of the values and zeros.

Letters: n entries of one weight (of one layer), k of all.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxpeft import trees
from jaxpeft.adapt.full import HEAD
from jaxpeft.hooks import Hook, Site, discover
from jaxpeft.method import Call, Delta, Method, Params, Study, on_weights, register, site_key, stacked_keys
from jaxpeft.topk import top_k_mask
from jaxpeft.updates import anchor_l1
from jaxpeft.weights import sparse as sparse_weight

__all__ = ["compose", "diff", "lt_select", "modules", "padded", "revert", "sparse", "sparse_fine_tuning"]

Score = Literal["magnitude", "random", "given"]
TOLERANCE = 1e-7  # a difference that is no larger counts as none, as in the reference


# ------------------------------------------------------------------------------------------- selection and arithmetic


def lt_select(before: PyTree, after: PyTree, k: Any) -> PyTree:
    """True at the k entries that moved most, over all leaves together.

    Args:
      before, after: theta0 and theta1, trees of floats of one structure (the leaves that may be chosen, and no others).
      k: 0 to the number of entries; may be traced.

    Returns:
      Booleans in the structure of `before`, exactly k of them true.

    Raises:
      ValueError: k out of range, or more than the entries that moved at all (where the values are known).
    """
    mask, changed = _ranked(before, after, k)
    if not isinstance(changed, Tracer) and not 0 <= int(k) <= int(changed):
        raise ValueError(
            f"k {int(k)}: only {int(changed)} of {trees.count(before)} entries moved in the dense training, the others cannot "
            "be told apart; take a smaller k, or a longer or faster dense training"
        )
    return mask


@jax.jit
def _ranked(before: PyTree, after: PyTree, k: Any) -> tuple[PyTree, Array]:
    """The mask, and how many entries moved at all."""
    moved = jax.tree.map(lambda x, y: jnp.abs(y.astype(jnp.float32) - x.astype(jnp.float32)), before, after)
    changed = [jnp.count_nonzero(x) for x in jax.tree.leaves(moved)]
    return top_k_mask(moved, k), sum(changed, jnp.zeros((), changed[0].dtype))


def diff(before: Params, after: Params, mask: PyTree = None, *, tolerance: float = TOLERANCE) -> Delta:
    """What a training changed, as a delta of `sparse`. It reads values: not for use under jit.

    Args:
      before, after: theta0 and theta2, or parts of them.
      mask: booleans in their structure; None for all entries.
      tolerance: of a difference that counts as none.

    Returns:
      `{path: {"indices": (n,), "values": (n,)}}` of the leaves that differ; indices are places in the flattened leaf.
    """
    old, new = trees.by_path(before), trees.by_path(after)
    masks = {} if mask is None else trees.by_path(mask)
    out = {}
    for path, w in old.items():
        if not jnp.issubdtype(jnp.result_type(w), jnp.inexact):
            continue
        wide = trees.wide_dtype(jnp.result_type(w))
        d = np.asarray(jnp.asarray(new[path], wide) - jnp.asarray(w, wide)).reshape(-1)
        chosen = np.abs(d) > tolerance
        if mask is not None:
            chosen &= np.asarray(masks[path]).reshape(-1)
        places = np.flatnonzero(chosen)
        if len(places):
            out[path] = {"indices": trees.Fixed(jnp.asarray(places, jnp.int32)), "values": jnp.asarray(d[places])}
    return out


def compose(params: Params, *deltas: Delta, sign: float = 1.0) -> Params:
    """`params` with every delta's values added at its places: a sum, in whatever order, in which equal places add up.

    Args:
      params: the model's.
      deltas: of `sparse` or `sparse_fine_tuning`, and from `diff`.
      sign: what values are multiplied by.

    Raises:
      KeyError: a delta for a leaf that the model does not have.
    """
    for delta in deltas:
        leaves = trees.by_path(params)
        if unknown := sorted(set(delta) - set(leaves)):
            raise KeyError(f"the delta moves {unknown[0]!r}, which the model lacks{trees.near(unknown[0], leaves)}")
        new = {}
        for path, d in trees.unmark(dict(delta)).items():
            new[path] = sparse_weight(
                leaves[path], d["indices"], d["values"] * jnp.asarray(sign, d["values"].dtype)
            ).dense()
        params = trees.replace_leaves(params, new)
    return params


def revert(params: Params, *deltas: Delta) -> Params:
    """Undoes `compose`, to rounding."""
    return compose(params, *deltas, sign=-1.0)


def padded(deltas: Sequence[Delta], params: Params) -> list[Delta]:
    """The deltas with the same leaves and counts, so that they stack: `vmap` over languages. Entries that are added lie
    out of range and do nothing."""
    leaves = trees.by_path(params)
    most: dict[str, int] = {}
    for delta in deltas:
        for path, d in delta.items():
            most[path] = max(most.get(path, 0), d["values"].shape[-1])

    def one(delta: Delta) -> Delta:
        out = {}
        for path, n in most.items():
            like = delta.get(path) or next(d[path] for d in deltas if path in d)
            indices, values = trees.unmark(dict(like))["indices"], like["values"]
            if path not in delta:
                indices, values = indices[..., :0], values[..., :0]
            room = [(0, 0)] * (values.ndim - 1) + [(0, n - values.shape[-1])]
            fill = math.prod(leaves[path].shape)
            out[path] = {
                "indices": trees.Fixed(jnp.pad(indices, room, constant_values=fill)),
                "values": jnp.pad(values, room),
            }
        return out

    return [one(delta) for delta in deltas]


# ---------------------------------------------------------------------------------------------- places in a model's weights


def modules(call: Call) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The modules that run in a call: `{place in params: (path of the module, leading sizes of the stack it stands in)}`.
    Nothing for a model that is a plain function."""

    def around(site: Site, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        site.param(site.path, (), None)
        return inner(*args, **kwargs)

    try:
        found = discover([Hook("**", around)], call)
    except trees.PatternError:
        return {}
    return {place: (path, slot.stack) for place, named in found.items() for path, slot in named.items()}


def stacks(call: Call) -> Callable[[str], tuple[int, ...]]:
    """`path of a leaf -> leading sizes of the stack of layers that it stands in`."""
    found = modules(call)
    return lambda path: found.get(path.rpartition("/")[0], ("", ()))[1]


def movable(params: Params, at: trees.Pattern | None) -> dict[str, Array]:
    """The floating-point leaves that `at` chooses; None for all but the head.

    Raises:
      PatternError: nothing matches.
    """
    leaves = trees.by_path(params)
    chosen = (
        [p for p in leaves if not trees.is_match(HEAD, p)] if at is None else trees.matches(at, leaves, "parameter")
    )
    return {p: leaves[p] for p in chosen if jnp.issubdtype(jnp.result_type(leaves[p]), jnp.inexact)}


def places(mask: Any, stack: tuple[int, ...], size: int | None = None) -> Int[np.ndarray, "*stack n"]:
    """Where a mask is true, in each layer's flattened weight; layers with fewer places than the most are filled up with
    ones out of range."""
    flat = np.asarray(mask).reshape(*stack, -1)
    rows = [np.flatnonzero(row) for row in flat.reshape(-1, flat.shape[-1])]
    n = max([len(r) for r in rows], default=0) if size is None else size
    out = np.full((len(rows), n), flat.shape[-1], np.int32)
    for i, r in enumerate(rows):
        out[i, : len(r)] = r
    return out.reshape(*stack, n)


def amount(k: float, total: int, name: str = "k") -> int:
    """A number of entries, given as such or as a share of all.

    Raises:
      ValueError: not positive, or more than there are.
    """
    n = round(k * total) if k < 1 else round(k)
    if not 1 <= n <= total:
        raise ValueError(f"{name} {k}: that is {n} of {total} entries; take 1 to {total}, or a share below 1")
    return n


def _unknown(shape: tuple[int, ...]) -> Array:
    """Indices that only have a shape: a program that asks for their values fails when it runs."""

    def refuse() -> Any:
        raise ValueError(_NO_INDICES)

    return jax.pure_callback(refuse, jax.ShapeDtypeStruct(shape, jnp.int32))


_NO_INDICES = (
    "this sparse method was made from a file, which keeps how many entries each weight has: which, its delta says. Load the "
    "delta, or choose anew (score='magnitude', 'random', or by the task's data)"
)


# -------------------------------------------------------------------------------------------------------- the methods


@register(
    family="adapt", paper="Ansell et al., ACL 2022", mechanism="weights", mergeable=True, exact_start=True, rate=1e-3
)
def sparse(
    k: float = 0.05,
    at: trees.Pattern | None = None,
    *,
    score: Score = "magnitude",
    counts: Mapping[str, int] | None = None,
    indices: Mapping[str, Any] | None = None,
    name: str = "sparse",
) -> Method:
    """Adds learned values at few fixed entries of the weights.

    Args:
      k: how many entries, or which share of them where it is below 1. Every weight (of every layer) gets its share by size.
      at: pattern of the leaves to choose among; None for all but the head. Integers are left alone.
      score: within a weight, the entries of the largest |w| ("magnitude"), or any ("random").
      counts: entries of each layer of each weight, `{path: n}`, in the place of `k` and `at`.
      indices: `{path: (*stack, n)}`, the entries themselves, as `places` makes them of a mask: score is "given" then. Files
        keep their numbers, the delta keeps them.
      name: the key of its delta in a chain.

    Returns:
      A method whose delta is `{path: {"indices": (*stack, n), "values": (*stack, n)}}`, the indices fixed, the values zero at
      the start. It merges.

    Raises:
      ValueError: k out of range or too small for any weight, an unknown score, "given" without indices at `init`.
      PatternError: nothing matches `at`.
    """
    if indices is not None:
        counts = {p: np.shape(x)[-1] for p, x in indices.items()}
    given = "given" if indices is not None else score
    if given not in ("magnitude", "random", "given") or (given == "given" and counts is None):
        raise ValueError(f"score {score!r}: expected 'magnitude' or 'random', or `indices`")
    if not k > 0:
        raise ValueError(f"k {k}: expected a number of entries, or a share of them below 1")

    def start(key: Key[Array, ""], call: Call) -> Delta:
        if given == "given" and indices is None and not isinstance(key, Tracer):
            raise ValueError(_NO_INDICES)
        stack_of, leaves = stacks(call), trees.by_path(call.params)
        if counts is None:
            chosen = movable(call.params, at)
            total = trees.count(chosen)
            share = amount(k, total) / total
            numbers = {p: round(share * math.prod(w.shape[len(stack_of(p)) :])) for p, w in chosen.items()}
        else:
            numbers = dict(counts)
            trees.matches(list(numbers), leaves, "parameter")
        numbers = {p: n for p, n in numbers.items() if n}
        if not numbers:
            raise ValueError(f"k {k} leaves no weight an entry: take more")

        def entries(path: str, n: int) -> Array:
            stack, w = stack_of(path), leaves[path]
            if indices is not None:
                return jnp.asarray(indices[path], jnp.int32)
            if given == "given":
                return _unknown((*stack, n))
            if given == "random":
                draw = lambda key: jax.random.uniform(key, w.shape[len(stack) :])
                keys = stacked_keys(site_key(key, path), stack)
            else:
                draw, keys = (lambda w: jnp.abs(w.astype(trees.wide_dtype(w.dtype)))), w

            def one(x: Array) -> Array:
                mask = top_k_mask(draw(x), n).reshape(-1)
                return jnp.nonzero(mask, size=n, fill_value=mask.size)[0].astype(jnp.int32)

            for _ in stack:
                one = jax.vmap(one)
            return one(keys)

        out = {}
        for path, n in numbers.items():
            found = entries(path, n)
            values = jnp.zeros(found.shape, trees.wide_dtype(leaves[path].dtype))
            out[path] = {"indices": trees.Fixed(found), "values": values}
        return out

    config = dict(
        method="sparse",
        name=name,
        k=k,
        at=at,
        score=given,
        counts=None if counts is None else {p: int(n) for p, n in counts.items()},
    )
    return on_weights(name, "**", lambda *_: {}, _built, config, factored=False)._replace(init=start)


def _built(path: str, w: Array, d: dict[str, Array], key: Any) -> Any:
    value = sparse_weight(w, d["indices"], d["values"])
    # Biases and norms are added and multiplied elementwise, where there is nothing to gain by being lazy.
    rest = w.shape[d["indices"].ndim - 1 :]
    return value.dense() if math.prod(rest[:-1]) == 1 else value


@register(
    family="adapt", paper="Ansell et al., ACL 2022", mechanism="weights", mergeable=True, exact_start=True, rate=1e-3
)
def sparse_fine_tuning(
    k: float = 0.05,
    at: trees.Pattern | None = None,
    *,
    steps: int = 100,
    score: Literal["change", "magnitude", "random"] = "change",
    along: trees.Pattern | None = None,
    l1: Any = 0.0,
    rate: Any = None,
    name: str = "sparse_fine_tuning",
) -> Method:
    """LT-SFT: a dense training on the task's data finds the entries, which `sparse` then trains; see the module.

    Train the head along: `chain(sparse_fine_tuning(), head())`.

    Args:
      k: how many entries, or which share of P where it is below 1.
      at: pattern of P; None for all but the head. The paper's language deltas leave the norms out: `["**", "!**/*norm/*",
        "!**/head/**"]`; its ranking deltas do not.
      steps: T1 updates of the dense training.
      score: "change", the method; "magnitude" and "random" choose without a training, each weight its share (`sparse`).
      along: pattern of H, what the dense training moves beside P; None for the head, where there is one.
      l1: lambda of the dense training.
      rate: its peak learning rate (Adam, clipped at norm 1, linear decay); None for that of the run that follows.
      name: the key of its delta in a chain.

    Returns:
      A method whose `prepare` gives a `sparse`. It merges.

    Raises:
      ValueError: k, steps or score out of range; at `init`, a score of "change" without `prepare`; in `prepare`, a training
        that diverges or moves fewer than k entries.
      PatternError: nothing matches.
    """
    if score not in ("change", "magnitude", "random"):
        raise ValueError(f"score {score!r}: expected 'change', 'magnitude' or 'random'")
    if steps < 1:
        raise ValueError(f"steps {steps}: the dense training has at least one")
    config = dict(
        method="sparse_fine_tuning", name=name, k=k, at=at, steps=steps, score=score, along=along, l1=l1, rate=rate
    )
    by_size = sparse(k, at, score="random" if score == "change" else score, name=name)._replace(config=config)
    if score != "change":
        return by_size

    def refuse(key: Key[Array, ""], call: Call) -> Delta:
        raise ValueError(
            f"{name} looks at the task's data before it starts: train it through `finetune`, call `prepare(study)` and take "
            "what it answers, or choose without data (score='magnitude' or 'random')"
        )

    def prepare(study: Study) -> Method:
        before = movable(study.call.params, at)
        every = trees.by_path(study.call.params)
        chosen = (
            [p for p in every if trees.is_match(HEAD, p)] if along is None else trees.matches(along, every, "parameter")
        )
        with_head = {**before, **{p: every[p] for p in chosen}}
        after = densely_trained(study, with_head, steps, l1, study.rate if rate is None else rate)
        n = amount(k, trees.count(before))
        mask = lt_select(before, {p: after[p] for p in before}, n)
        stack_of = stacks(study.call)
        found = {p: places(m, stack_of(p)) for p, m in mask.items()}
        return sparse(indices={p: x for p, x in found.items() if x.shape[-1]}, name=name)

    return by_size._replace(init=refuse, prepare=prepare)


def densely_trained(
    study: Study, leaves: Mapping[str, Array], steps: int, l1: Any, rate: Any
) -> dict[str, Float[Array, "..."]]:
    """`leaves`, a part of the model's by path, after `steps` updates on the task's data.

    Raises:
      ValueError: the loss or a weight is not finite in the end.
    """
    call, total = study.call, trees.count(study.call.params)
    shape = optax.linear_schedule(1.0, 0.0, steps)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale_by_schedule(shape), optax.scale(-1.0)
    )

    def loss(moving: Any, params: Params, start: Any, batch: Any, key: Any) -> Array:
        moved = trees.replace_leaves(params, moving)
        own = study.loss(lambda *x, **k: call.apply_fn(moved, *x, **k), batch, key)
        return own + l1 / total * anchor_l1(moving, start)

    @jax.jit
    def step(moving: Any, state: Any, params: Params, start: Any, batch: Any, key: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(moving, params, start, batch, key)
        updates, state = optimiser.update(grads, state, moving)
        return (
            optax.apply_updates(moving, jax.tree.map(lambda u: u * jnp.asarray(rate, u.dtype), updates)),
            state,
            value,
        )

    start = dict(leaves)
    moving, state, value = start, optimiser.init(start), jnp.zeros(())
    for i in range(steps):
        key = jax.random.fold_in(study.key, i)
        moving, state, value = step(moving, state, call.params, start, study.train.batch(i), key)
    if not all(bool(jnp.isfinite(x).all()) for x in (value, *moving.values())):
        raise ValueError(f"the dense training diverged (loss {float(value)}) at rate {rate}: take a smaller one")
    return moving
