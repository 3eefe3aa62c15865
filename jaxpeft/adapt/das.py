"""DAS, dynamic architecture skipping: Parameter and Computation Efficient Transfer Learning for Vision-Language Pre-trained
Models (Wu et al., NeurIPS 2023, arXiv:2309.01479).

Adapters make transfer small but leave the cost of inference as it was. DAS finds the k layers that this task can do without,
replaces each by a small residual adapter, and trains adapters beside the others: fewer numbers to learn, fewer operations.

    A(x) = relu(LN(x) D + d) U + u                               a norm of its own; N(0, 0.02²), biases zero
    kept layer (pre-norm)   x <- x + Attn(LN1 x) + A_0(x);   x <- x + MLP(LN2 x) + A_1(x)          width `rank`
    kept layer (post-norm)  h <- LN(Attn(x) + x + A_0(x));   x <- LN(MLP(h) + h) + A_1(h)
    skipped layer           x <- x + A_skip(x)                                                     width `skip_rank`

Which layers: a bandit (`tune.bandit`) samples subsets while the adapters of a supernet, which holds both kinds for every layer,
are trained for a few epochs; subsets whose validation loss is low are preferred. Then everything is trained anew with the
k layers gone. `skip=` says them outright; `skip=None` searches (`Method.prepare`), in `finetune` by itself.

Reference code: DoubtedSteam/DAS @1d6a0d6 (ViLT/vilt/modules/vilt_module_search.py, vision_transformer_PA.py). Departures: its
validation runs in training mode on what seems to be one and the same batch; ours evaluates, and walks through the batches.

Letters: b batch, t positions, d width, r bottleneck, n layers.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxpeft import trees
from jaxpeft.adapt.full import full
from jaxpeft.adapt.unified import Design, bottleneck
from jaxpeft.hooks import Hook, Site, Slots, on_hooks
from jaxpeft.method import Call, Delta, Method, Study, adapt, chain, register, site_key
from jaxpeft.tune.bandit import bandit, sample_subset

__all__ = ["das", "search", "supernet", "with_mask"]

BLOCKS = "**/layers*"
ADAPTER = Design(norm="in")


def _residual_adapter(site: Site, x: Float[Array, "b t d"], rank: int, label: str) -> Float[Array, "b t d"]:
    """A(x), its parameters under names that begin with `label`."""
    own = Site(site.path, site.stash, lambda name, *a: site._get(f"{label}_{name}", *a))
    return bottleneck(own, ADAPTER, x, x.shape[-1], rank)


def _parallel(rank: int, at: str) -> list[Hook]:
    """The two adapters beside a kept layer, in pre-norm and post-norm blocks alike: whichever of norm and module comes first
    leaves the other its input. What is left is taken out when it is used: a loop's body may be traced more than once."""

    def norm(kind: str) -> Any:
        def around(site: Site, call: Any, z: Array, *args: Any, **kwargs: Any) -> Array:
            y, place = call(z, *args, **kwargs), (site.parent, kind)
            if ("module", place) not in site.stash:
                site.stash["norm", place] = z
                return y
            h = site.stash.pop(("module", place))
            # Post-norm: the feed-forward network's adapter joins behind the norm, attention's has joined already.
            return y + _residual_adapter(site, h, rank, "beside") if kind == "mlp" else y

        return around

    def module(kind: str) -> Any:
        def around(site: Site, call: Any, x: Array, *args: Any, **kwargs: Any) -> Array:
            y, place = call(x, *args, **kwargs), (site.parent, kind)
            if ("norm", place) in site.stash:
                x = site.stash.pop(("norm", place))
            else:
                site.stash["module", place] = x
                if kind == "mlp":
                    return y
            return y + _residual_adapter(site, x[:, : y.shape[1]], rank, "beside")

        return around

    return [
        *(Hook(f"{at}/{kind}_norm", norm(kind)) for kind in ("attention", "mlp")),
        *(Hook(f"{at}/{kind}", module(kind)) for kind in ("attention", "mlp")),
    ]


def _skip(rank: int) -> Any:
    """A block's whole work done by its residual adapter; the block's own modules do not run."""

    def around(site: Site, call: Any, x: Float[Array, "b t d"], *args: Any, **kwargs: Any) -> Array:
        return x + _residual_adapter(site, x, rank, "skip")

    return around


def _pattern(layer: int | str) -> str:
    return f"**/layers_{layer}" if isinstance(layer, int) else layer


def supernet(rank: int = 96, skip_rank: int = 192, *, at: str = BLOCKS, name: str = "das") -> Method:
    """Every layer both ways, and a mask that says which way each goes: what the search trains.

    Both ways are computed, so nothing is saved; masks may be traced and vmapped. `with_mask` sets them.

    Args:
      rank, skip_rank, at, name: as in `das`.
    """

    def both(site: Site, call: Any, x: Float[Array, "b t d"], *args: Any, **kwargs: Any) -> Array:
        kept = call(x, *args, **kwargs)
        gone = x[:, : kept.shape[1]]
        gone = gone + _residual_adapter(site, gone, skip_rank, "skip")
        return jnp.where(site.param("skipped", (), None, jnp.bool_), gone, kept)

    def start(key: Any, slots: Slots, call: Call) -> Delta:
        return {
            place: {
                n: trees.Fixed(jnp.zeros(s.stack, bool)) if n == "skipped" else s.start(site_key(key, f"{place}/{n}"))
                for n, s in named.items()
            }
            for place, named in slots.items()
        }

    config = dict(method="das_supernet", rank=rank, skip_rank=skip_rank, at=at, name=name)
    return on_hooks(name, [*_parallel(rank, at), Hook(at, both)], config, init=start)


def _blocks(delta: Delta) -> list[tuple[str, int | None]]:
    """The layers of a supernet's delta in order: their place, and the index in a stack."""

    def natural(place: str) -> list[Any]:
        return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", place)]

    out: list[tuple[str, int | None]] = []
    for place in sorted((p for p, d in delta.items() if "skipped" in d), key=natural):
        stack = delta[place]["skipped"].value.shape
        out += [(place, i) for i in range(stack[0])] if stack else [(place, None)]
    return out


def with_mask(delta: Delta, mask: Bool[Array, "n"]) -> Delta:
    """A supernet's delta in which the layers that `mask` chooses are skipped; they count in the order of the model.

    Raises:
      ValueError: a mask of another length.
    """
    blocks = _blocks(delta)
    if mask.shape != (len(blocks),):
        raise ValueError(f"a mask of shape {mask.shape} for {len(blocks)} layers")
    new: dict[str, Any] = {}
    for (place, index), flag in zip(blocks, mask):
        before = new.get(place, delta[place]["skipped"].value)
        new[place] = flag if index is None else before.at[index].set(flag)
    return {p: {**d, "skipped": trees.Fixed(new[p])} if p in new else d for p, d in delta.items()}


def search(
    study: Study,
    method: Method,
    k: int,
    *,
    epochs: float = 3.0,
    warmup: float = 1.0,
    turn: int = 10,
    subsets: int = 3,
    rate: Any = 1.0,
) -> tuple[Float[Array, "n"], list[tuple[str, int | None]]]:
    """Trains a supernet on random subsets and learns which layers are not missed.

    Args:
      study: the task.
      method: from `supernet`; the model's head is trained along.
      k: layers to skip.
      epochs: of training.
      warmup: epochs before the first round of the bandit.
      turn: training steps between rounds.
      subsets, rate: as in `tune.bandit.bandit`.

    Returns:
      The preferences, larger for layers that are missed less, and the layers they are of.
    """
    base, params, inputs = study.call.apply_fn, study.call.params, study.call.inputs
    heads = [p for p in trees.by_path(params) if trees.is_match("**/head/**", p)]
    whole = chain(method, full(heads, name="head")) if heads else chain(method)
    adapted = adapt(base, whole)
    start, draws = jax.random.split(study.key)
    delta = adapted.init(start, params, *inputs, **study.call.kwargs)
    blocks = _blocks(delta[method.name])
    options = bandit(len(blocks), k, subsets=subsets, rate=rate)
    learned, fixed = trees.learned(delta)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(study.rate))

    def loss(learned: Any, mask: Any, params: Any, batch: Any, key: Any) -> Array:
        delta = trees.combine(learned, fixed)
        delta = {**delta, method.name: with_mask(delta[method.name], mask)}
        return study.loss(lambda *x, **k: adapted.apply(params, delta, *x, **k), batch, key)

    @jax.jit
    def train(learned: Any, state: Any, found: Any, params: Any, batch: Any, key: Any) -> Any:
        one, two = jax.random.split(key)
        mask = sample_subset(one, found.preferences, k)
        grads = jax.grad(loss)(learned, mask, params, batch, two)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(learned, updates), state

    @jax.jit
    def judge(learned: Any, found: Any, params: Any, batch: Any, key: Any) -> Any:
        masks, found = options.ask(found, key)
        losses = jax.lax.map(lambda mask: loss(learned, mask, params, batch, None), masks)
        return options.tell(found, masks, losses)

    state, found = optimiser.init(learned), options.init()
    steps, first = (max(1, round(e * len(study.train))) for e in (epochs, warmup))
    rounds = 0
    for i in range(steps):
        key = jax.random.fold_in(draws, i)
        learned, state = train(learned, state, found, params, study.train.batch(i), key)
        if i + 1 > first and (i + 1) % turn == 0:
            batch = study.validation.batch(rounds)
            found = judge(learned, found, params, batch, jax.random.fold_in(key, 1))
            rounds += 1
    return found.preferences, blocks


@register(
    family="adapt", paper="Wu et al., NeurIPS 2023", mechanism="hooks", mergeable=False, exact_start=False, rate=1e-3
)
def das(
    skip: Sequence[int | str] | None = None,
    k: int = 1,
    rank: int = 96,
    skip_rank: int = 192,
    *,
    epochs: float = 3.0,
    warmup: float = 1.0,
    turn: int = 10,
    subsets: int = 3,
    bandit_rate: float = 1.0,
    at: str = BLOCKS,
    name: str = "das",
) -> Method:
    """DAS: parallel adapters in the layers that stay, a residual adapter in place of each layer that goes.

    Args:
      skip: the layers that go: numbers of an unrolled stack (`layers_3` is 3) or patterns of block modules; () for none;
        None searches for k of them where the method is prepared (`finetune`, `compare`), and skips none before that.
      k: how many to search for.
      rank: width of the adapters in layers that stay; the paper's 96.
      skip_rank: width of those that replace a layer; the paper's 192 or 288.
      epochs, warmup, turn, subsets, bandit_rate: of the search; see `search`.
      at: pattern of the blocks.
      name: the key of its delta in a chain.

    Returns:
      A method on hooks, delta `{module path: {"beside_down", ...} or, of a skipped block, {"skip_down", ...}}`. It does not
      merge. A skipped layer's own weights are not touched: they need not be loaded.

    Raises:
      ValueError: a size below 1.
      PatternError: no module matches; a layer to skip that is not there; no layer stays.
    """
    if rank < 1 or skip_rank < 1 or k < 1 or turn < 1:
        raise ValueError(f"rank {rank}, skip_rank {skip_rank}, k {k}, turn {turn}: each is at least 1")
    gone = [_pattern(layer) for layer in skip or ()]
    hooks = [*_parallel(rank, at), *(Hook(pattern, _skip(skip_rank)) for pattern in gone)]
    config = dict(
        method="das",
        skip=None if skip is None else list(skip),
        k=k,
        rank=rank,
        skip_rank=skip_rank,
        epochs=epochs,
        warmup=warmup,
        turn=turn,
        subsets=subsets,
        bandit_rate=bandit_rate,
        at=at,
        name=name,
    )
    made = on_hooks(name, hooks, config)
    if skip is not None:
        return made

    def prepare(study: Study) -> Method:
        found, blocks = search(
            study,
            supernet(rank, skip_rank, at=at, name=name),
            k,
            epochs=epochs,
            warmup=warmup,
            turn=turn,
            subsets=subsets,
            rate=bandit_rate,
        )
        if any(index is not None for _, index in blocks):
            raise ValueError("layers in a scan cannot go one by one: load the model unrolled (scan=False)")
        chosen = [blocks[i][0] for i in jnp.argsort(-found, stable=True)[:k].tolist()]
        # Places in the parameters are paths of modules below the collection's name.
        paths = tuple(place.removeprefix("params/") for place in chosen)
        return das(paths, k, rank, skip_rank, at=at, name=name)

    return made._replace(prepare=prepare)
