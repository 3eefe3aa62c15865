"""What LoGAH's experiments share: a pool of architectures in one compiled program, training over it, and its evaluation.

    pool, slots, sizes = pool_of(family, s)
    weights, losses = meta_trained(family, network, pool, slots, s, x, y)           # for each seed
    row = evaluated(trainer(apply, score, s), "LoGAH", starts, parts, s)

All members of a pool are computed at its largest depth and width. Graphs and masks are arguments; that smaller matrices are
corners of larger ones, of LoGAH's and of tiled ones, lets one decoding serve every width (`checked` against the ordinary way).
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import study

from jaxpeft import trees
from jaxpeft.hyper.graph import Graph
from jaxpeft.hyper.logah import frobenius
from jaxpeft.updates import descend

HEADS = 4  # the most that a member has


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of training over a pool (`meta`) and of the evaluation on unseen architectures."""

    size: tuple[int, int, int, int] = (32, 2, 4, 8)
    reach: int = 512
    block: tuple[int, int] = (32, 4)
    depths: tuple[int, ...] = (1, 2, 3)
    widths: tuple[int, ...] = (16, 24, 32, 40, 48, 56, 64)
    pool: int = 60
    nets: int = 4
    meta_steps: int = 1500
    meta_rate: float = 1e-3
    meta_batch: int = 32
    penalty: float = 3e-5
    meta_seeds: int = 3
    unseen: tuple[int, ...] = (96, 128)
    unseen_depth: int = 4
    steps: int = 300
    marks: tuple[int, ...] = (0, 30, 100, 300)
    chunk: int = 10  # of steps, which the marks are multiples of
    batch: int = 32
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    seeds: int = 5


# --------------------------------------------------------------------------------------------------- one for all widths


def masks_of(depth: int, width: int, heads: int, depth_max: int, width_max: int) -> Any:
    """Which layers, channels, hidden units (twice the width) and channels of each head a network of these sizes has.

    "place": where each column of the largest query, key and value, one of them behind another, lies in a member's.
    """
    channel = np.arange(width_max)
    head = channel * heads // width
    part, column = np.divmod(np.arange(3 * width_max), width_max)
    return {
        "layer": (np.arange(depth_max) < depth).astype(np.float32),
        "channel": (channel < width).astype(np.float32),
        "hidden": (np.arange(2 * width_max) < 2 * width).astype(np.float32),
        "head": ((head == np.arange(HEADS)[:, None]) & (channel < width)).astype(np.float32),
        "place": np.where(column < width, part * width + column, 0).astype(np.int32),
        "width": np.float32(width),
        "heads": np.float32(heads),
    }


def own_part(path: str, x: Any, masks: Any) -> tuple[Any, Any, Any]:
    """A decoded leaf with its query, key and value where a member has them; masks of a matrix's inputs and outputs."""
    channel, hidden = masks["channel"], masks["hidden"]
    inputs = hidden if "/down/" in path else channel
    if "/qkv/" in path:
        return x[..., masks["place"]], inputs, jnp.tile(channel, 3)
    return x, inputs, hidden if "/up/" in path else channel


def dense(p: Any, x: Any) -> Any:
    return x @ p["kernel"] + p["bias"]


def norm(p: Any, x: Any, masks: Any) -> Any:
    """A layer norm over a member's own channels."""
    channel, n = masks["channel"], masks["width"]
    x = (x - (x * channel).sum(-1, keepdims=True) / n) * channel
    return (x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) / n + 1e-5) * p["scale"] + p["bias"]) * channel


def run_layers(layers: Any, x: Any, masks: Any, causal: bool = False) -> Any:
    """Pre-norm blocks over x (b, t, c); `layers` are norm1, qkv, out, norm2, up and down, stacked.

    Query, key and value are one matrix: in a graph in which they are three, query and key stand alike.
    """

    def layer(x: Any, one: Any) -> Any:
        p, there = one
        y = norm(p["norm1"], x, masks)
        q, k, v = jnp.split(dense(p["qkv"], y), 3, -1)
        q, v = (z[:, None] * masks["head"][None, :, None] for z in (q, v))
        logits = jnp.einsum("bhtc,bsc->bhts", q, k) * jnp.sqrt(masks["heads"] / masks["width"])
        if causal:
            logits = jnp.where(np.tri(x.shape[1], dtype=bool), logits, -1e30)
        y = jnp.einsum("bhts,bhsc->btc", jax.nn.softmax(logits, -1), v)
        x = x + dense(p["out"], y) * masks["channel"] * there
        y = jax.nn.gelu(dense(p["up"], norm(p["norm2"], x, masks))) * masks["hidden"]
        return x + dense(p["down"], y) * masks["channel"] * there, None

    return jax.lax.scan(layer, x, (layers, masks["layer"]))[0]


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one kind in any depth, width and number of heads.

    Attributes:
      spec: `(depth, width) -> shapes of the parameters`, the layers stacked.
      graph: `(depth, width, heads, nodes=None) -> Graph`.
      apply: `(depth, width, heads) -> (params, x) -> logits`, the ordinary way.
      forward: `(params, masks, x) -> logits` at the pool's largest sizes.
      fit: `(params, masks, setup) -> params`: what was decoded at the largest sizes brought to a member's scale, zero beyond
        it.
    """

    spec: Callable[[int, int], Any]
    graph: Callable[..., Graph]
    apply: Callable[[int, int, int], Callable[..., Any]]
    forward: Callable[..., Any]
    fit: Callable[..., Any]


def pool_of(family: Family, s: Setup) -> tuple[Any, tuple, list[tuple[int, int, int]]]:
    """The pool as stacked arrays: graphs, where the largest one's slots are in each, masks; its slots; the sizes."""
    every = [(d, w, h) for d, w, h in itertools.product(s.depths, s.widths, (2, 4))]
    chosen = [every[i] for i in np.random.default_rng(0).permutation(len(every))[: s.pool]]
    deep, wide = max(s.depths), max(s.widths)
    largest = family.graph(deep, wide, HEADS)
    n, members = len(largest.op), []
    for d, w, h in chosen:
        graph = family.graph(d, w, h, n)
        node = {(t.path, t.index): t.node for t in graph.slots}
        order = np.zeros(n, np.int32)
        for t in largest.slots:
            order[t.node] = node.get((t.path, t.index), 0)
        members.append({"graph": graph.arrays(), "order": order, "masks": masks_of(d, w, h, deep, wide)})
    return trees.stack(members), largest.slots, chosen


def widened(family: Family, network: Any, weights: Any, one: Any, slots: Any, s: Setup) -> Any:
    """One member's weights at the pool's largest sizes: its own, and beyond its width what is masked."""
    made = network.decode(weights, network.encode(weights, one["graph"])[one["order"]], slots)
    spec = family.spec(max(s.depths), max(s.widths))
    by: dict[str, list[Any]] = {}
    stacked = {path for path, index in made if index}
    for path, index in sorted(made):
        by.setdefault(path, []).append(made[path, index])
    params = trees.replace_leaves(
        spec, {p: jnp.stack(by[p]) if p in stacked else by[p][0] for p in trees.by_path(spec)}
    )
    return family.fit(params, one["masks"], s)


def checked(family: Family, network: Any, pool: Any, slots: Any, sizes: Any, s: Setup, x: Any) -> float:
    """The largest difference of logits between the padded program and the ordinary way, over the first two members.

    Raises:
      AssertionError: it is more than rounding.
    """
    weights, worst = jax.jit(network.init)(jax.random.key(0)), 0.0
    wide = jax.jit(lambda w, one: family.forward(widened(family, network, w, one, slots, s), one["masks"], x))
    for i, (d, w, h) in enumerate(sizes[:2]):
        padded = wide(weights, jax.tree.map(lambda a, i=i: a[i], pool))
        graph, spec, apply = family.graph(d, w, h), family.spec(d, w), family.apply(d, w, h)
        plain = jax.jit(lambda v, g=graph, t=spec, f=apply: f(network.predict(v, g, t), x))(weights)
        worst = max(worst, float(jnp.abs(padded - plain).max() / jnp.abs(plain).max()))
    if worst > 1e-3:
        raise AssertionError(f"the padded program differs from the ordinary one by {worst:.1e}")
    return worst


# ----------------------------------------------------------------------------------------------------------- training


def cross_entropy(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def meta_program(family: Family, network: Any, pool: Any, slots: Any, s: Setup, x: Any, y: Any) -> Callable[..., Any]:
    """`(key) -> weights, losses (steps,)`: a step draws some members and examples, and trains through what is predicted."""
    shape = optax.warmup_cosine_decay_schedule(0.0, s.meta_rate, max(1, s.meta_steps // 20), s.meta_steps)
    rule = optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(shape, weight_decay=1e-2))

    @jax.jit
    def run(key: Any) -> Any:
        first, second = jax.random.split(key)
        weights = network.init(first)

        def loss(weights: Any, key: Any) -> Any:
            which, rows = jax.random.split(key)
            some = jax.tree.map(lambda a: a[jax.random.randint(which, (s.nets,), 0, a.shape[0])], pool)
            rows = jax.random.randint(rows, (s.meta_batch,), 0, y.shape[0])

            def one(member: Any) -> Any:
                params = widened(family, network, weights, member, slots, s)
                logits = family.forward(params, member["masks"], x[rows])
                return cross_entropy(logits, y[rows]).mean(), frobenius(params)

            losses, norms = jax.vmap(one)(some)
            return losses.mean() + s.penalty * norms.mean(), losses.mean()

        weights, (_, losses) = descend(loss, weights, rule, jax.random.split(second, s.meta_steps), has_aux=True)
        return weights, losses

    return run


def meta_trained(
    family: Family, network: Any, pool: Any, slots: Any, s: Setup, x: Any, y: Any
) -> tuple[list[Any], np.ndarray]:
    """The weights of each seed, and the losses (seeds, steps)."""
    run = meta_program(family, network, pool, slots, s, x, y)
    made = [run(jax.random.fold_in(jax.random.key(5), seed)) for seed in range(s.meta_seeds)]
    return [w for w, _ in made], np.stack([np.asarray(losses) for _, losses in made])


def drawn(key: Any, spec: Any, deviation: Callable[[str, Any], float | None]) -> Any:
    """A random start: normal with the deviation of `(path, shape)`; where that is None, scales 1 and others 0."""
    flat = trees.by_path(spec)
    keys = dict(zip(flat, jax.random.split(key, len(flat))))

    def leaf(path: str, x: Any) -> Any:
        std = deviation(path, x)
        if std is not None:
            return std * jax.random.normal(keys[path], x.shape)
        return jnp.full(x.shape, float(path.endswith("scale")), x.dtype)

    return trees.replace_leaves(spec, {p: leaf(p, x) for p, x in flat.items()})


# --------------------------------------------------------------------------------------------------------- evaluation


def trainer(apply: Callable[..., Any], score: Callable[..., Any], s: Setup) -> tuple[Any, Any]:
    """Training and testing of an unseen network.

    `(params, rate, rows (steps, b), train) -> params (marks, ...)` and `(params (marks, ...), seen) -> scores (marks,)`, where
    `apply(params, x)` are logits and `score(params, x, y)` is a number.
    """
    rule = optax.scale_by_adam()
    at = np.array([m // s.chunk - 1 for m in s.marks[1:]])

    @jax.jit
    def run(params: Any, rate: Any, rows: Any, train: Any) -> Any:
        x, y = train

        def step(state: Any, rows: Any) -> Any:
            params, moments = state
            loss = lambda p: cross_entropy(apply(p, x[rows]), y[rows]).mean()
            updates, moments = rule.update(jax.grad(loss)(params), moments)
            return (jax.tree.map(lambda p, u: p - rate * u, params, updates), moments), None

        def chunk(state: Any, rows: Any) -> Any:
            state, _ = jax.lax.scan(step, state, rows)
            return state, state[0]

        chunks = rows.reshape(-1, s.chunk, rows.shape[-1])
        _, kept = jax.lax.scan(chunk, (params, rule.init(params)), chunks)
        return jax.tree.map(lambda p, k: jnp.concatenate([p[None], k[at]]), params, kept)

    return run, jax.jit(lambda params, seen: jax.lax.map(lambda p: score(p, *seen), params))


def evaluated(
    programs: tuple[Any, Any],
    name: str,
    starts: Callable[[int], Any],
    parts: Mapping[str, Any],
    s: Setup,
    *,
    rates: Sequence[float],
    best: Callable[..., float] = max,
    told: Callable[[float], str] = lambda v: f"{100 * v:.1f}",
) -> dict[str, Any]:
    """One start on one network: the rate by validation (the only one, where there is one), then the test scores.

    Args:
      programs: of `trainer`.
      starts: `(seed) -> params`; a tuning seed has number 1000.
      parts: split -> (x, y).
      rates: to choose from, by the score of the last mark.
      best: `max` or `min` of the scores.
      told: a score in what is printed.

    Returns:
      A row: method, rate, after_<mark> for each mark; details: "test" (seeds, marks), "validation_by_rate".
    """
    run, score = programs
    rows = lambda seed: study.rows_of(len(parts["train"][1]), s.steps, s.batch, seed)
    trained = lambda seed, rate: run(starts(seed), rate, rows(seed), parts["train"])
    tried: dict[float, float] = {}
    if len(rates) > 1:
        tried = {r: float(score(trained(1000, r), parts["validation"])[-1]) for r in map(float, rates)}
    rate = best(tried, key=lambda r: tried[r]) if tried else float(rates[0])
    test = np.stack([np.asarray(score(trained(i, rate), parts["test"])) for i in range(s.seeds)])
    marks = {f"after_{m}": float(v) for m, v in zip(s.marks, test.mean(0))}
    print(f"{name:>40}: rate {rate:g}, " + ", ".join(f"{k[6:]} {told(v)}" for k, v in marks.items()), flush=True)
    return {"method": name, "rate": rate, **marks, "details": {"test": test.tolist(), "validation_by_rate": tried}}
