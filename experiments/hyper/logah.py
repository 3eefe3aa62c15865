"""LoGAH (Zhou et al., 2024) in small: vision Transformers wider and deeper than any that its network was trained on.

    python experiments/hyper/logah.py            all of it: fifteen to twenty minutes on one core by its operations
    python experiments/hyper/logah.py --smoke    every part once in small; writes nothing unless --out is given

Networks are trained on the 8 x 8 digits (patches of 2 x 2) over a pool of 60 vision Transformers of depth 1 to 3, width 16 to
64 and 2 or 4 heads: a step draws four of them and 32 training images, predicts their weights and takes the mean loss. All
architectures go through one compiled program: graphs and widths are arguments, and what is beyond a width is masked, which
the property that smaller matrices are corners of larger ones allows (checked against the ordinary way before training).
Two networks of d = 32, two layers: LoGAH (r = 8, K = 512) and GHN-3's (a block of 32 x 32, tiled), whose decoder has more
parameters; both make vectors by a perceptron. Three seeds of each.

Evaluation is on depth 4, width 96 and 128: the predicted weights, or random ones (LeCun), are trained by Adam for 300 steps of
32 images; the rate of each start is chosen out of four by validation of one tuning seed, then five seeds (orders of the
examples; seed i takes the network of seed i mod 3). Test accuracy after 0, 30, 100 and 300 steps. The same at width 96 on
Fashion-MNIST shrunk to 8 x 8, as many images to train on as there are digits, with the networks trained on digits.

Besides, from shapes alone: the decoders' parameters, where nothing tiles, for GPT-2 large and ViT-L; and a GPT-2 large (774
million parameters) that a LoGAH-tiny as it starts really writes, leaf by leaf, as sharded safetensors.

Stated before running, each to be reported as holding or not:
  1. Without training, LoGAH's networks are better than random ones, at both widths.
  2. After 30 steps LoGAH's start is better than the random one, at both widths.
  3. After 300 steps it is at most a point worse.
  4. Without training and after 30 steps LoGAH is at least as good as the tiled network, at both widths.
  5. LoGAH's decoder has fewer parameters than a full one with a block as wide as what it predicts (256).
  6. On Fashion-MNIST after 30 steps LoGAH's start, learned on digits, is better than the random one.
  7. Writing GPT-2 large takes less than half as much memory above what the process had as its weights would.
"""

import dataclasses
import itertools
import json
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import study
from safetensors.numpy import save_file

from jaxpeft import data, trees
from jaxpeft.hyper.graph import Graph, model_graph
from jaxpeft.hyper.logah import SIZES, frobenius, logah_network
from jaxpeft.models.folder import read_index
from jaxpeft.models.loading import hf_name, model_from_config
from jaxpeft.models.names import TRANSFORMS
from jaxpeft.models.presets import preset

PATCHES, PIXELS, CLASSES = 16, 4, 10


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

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
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    seeds: int = 5
    large: tuple[int, int, int, int] = (1280, 36, 20, 50257)  # GPT-2 large: width, layers, heads, words
    shard: int = 500 * 2**20


SMOKE = Setup(
    size=(8, 1, 2, 2), reach=64, block=(4, 4), depths=(1, 2), widths=(8, 16), pool=3, nets=2, meta_steps=3, meta_seeds=2,
    meta_batch=8, unseen=(16,), unseen_depth=2, steps=4, marks=(0, 2, 4), batch=8, rates=(1e-3, 1e-2), seeds=2, chunk=2,
    large=(16, 2, 2, 60), shard=2**13,
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the targets


def spec_of(depth: int, width: int) -> Any:
    """The parameters of a vision Transformer with a feed-forward block of twice its width."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    dense = lambda m, n, *l: {"kernel": shape(*l, m, n), "bias": shape(*l, n)}
    norm = lambda *l: {"scale": shape(*l, width), "bias": shape(*l, width)}
    return {
        "patch": dense(PIXELS, width),
        "position": shape(PATCHES, width),
        "layers": {
            "norm1": norm(depth), "norm2": norm(depth), "up": dense(width, 2 * width, depth),
            "down": dense(2 * width, width, depth), **{k: dense(width, width, depth) for k in ("q", "k", "v", "out")},
        },
        "norm": norm(),
        "head": dense(width, CLASSES),
    }  # fmt: skip


def masks_of(depth: int, width: int, heads: int, depth_max: int, width_max: int) -> Any:
    """Which layers, channels, hidden units and channels of each of four heads a network of these sizes has."""
    channel = np.arange(width_max)
    head = channel * heads // width
    return {
        "layer": (np.arange(depth_max) < depth).astype(np.float32),
        "channel": (channel < width).astype(np.float32),
        "hidden": (np.arange(2 * width_max) < 2 * width).astype(np.float32),
        "head": ((head == np.arange(4)[:, None]) & (channel < width)).astype(np.float32),
        "width": np.float32(width),
        "heads": np.float32(heads),
    }


def forward(params: Any, masks: Any, x: Any) -> Any:
    """Logits of images (b, 16, 4) as patches."""
    channel, n = masks["channel"], masks["width"]
    dense = lambda p, x: x @ p["kernel"] + p["bias"]

    def norm(p: Any, x: Any) -> Any:
        x = (x - (x * channel).sum(-1, keepdims=True) / n) * channel
        return (x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) / n + 1e-5) * p["scale"] + p["bias"]) * channel

    def layer(x: Any, one: Any) -> Any:
        p, there = one
        y = norm(p["norm1"], x)
        q, v = (dense(p[k], y)[:, None] * masks["head"][None, :, None] for k in ("q", "v"))
        logits = jnp.einsum("bhtc,bsc->bhts", q, dense(p["k"], y)) * jnp.sqrt(masks["heads"] / n)
        y = jnp.einsum("bhts,bhsc->btc", jax.nn.softmax(logits, -1), v)
        x = x + dense(p["out"], y) * channel * there
        y = jax.nn.gelu(dense(p["up"], norm(p["norm2"], x))) * masks["hidden"]
        return x + dense(p["down"], y) * channel * there, None

    x = (dense(params["patch"], x) + params["position"]) * channel
    x, _ = jax.lax.scan(layer, x, (params["layers"], masks["layer"]))
    return dense(params["head"], norm(params["norm"], x).mean(1))


def graph_of(depth: int, width: int, heads: int, nodes: int | None = None) -> Graph:
    masks = masks_of(depth, width, heads, depth, width)
    return model_graph(
        lambda p, x: forward(p, masks, x), spec_of(depth, width), jnp.ones((1, PATCHES, PIXELS)), nodes=nodes
    )


def pool_of(s: Setup) -> tuple[Any, tuple, list[tuple[int, int, int]]]:
    """The pool as stacked arrays: graphs, where the largest one's slots are in each, masks; its slots; the sizes."""
    every = [(d, w, h) for d, w, h in itertools.product(s.depths, s.widths, (2, 4))]
    chosen = [every[i] for i in np.random.default_rng(0).permutation(len(every))[: s.pool]]
    deep, wide = max(s.depths), max(s.widths)
    largest = graph_of(deep, wide, 4)
    n, members = len(largest.op), []
    for d, w, h in chosen:
        graph = graph_of(d, w, h, n)
        node = {(t.path, t.index): t.node for t in graph.slots}
        order = np.zeros(n, np.int32)
        for t in largest.slots:
            order[t.node] = node.get((t.path, t.index), 0)
        members.append({"graph": graph.arrays(), "order": order, "masks": masks_of(d, w, h, deep, wide)})
    return trees.stack(members), largest.slots, chosen


def widened(network: Any, weights: Any, one: Any, slots: Any, s: Setup) -> Any:
    """One member's weights at the pool's largest sizes: its own, and beyond its width what is masked."""
    made = network.decode(weights, network.encode(weights, one["graph"])[one["order"]], slots)
    spec = spec_of(max(s.depths), max(s.widths))
    by: dict[str, list[Any]] = {}
    for path, index in sorted(made):
        by.setdefault(path, []).append(made[path, index])
    params = trees.replace_leaves(
        spec, {p: jnp.stack(by[p]) if p.startswith("layers/") else by[p][0] for p in trees.by_path(spec)}
    )
    # Matrices were scaled by the largest fan-in; all but the patches' grow with the width.
    masks, gain = one["masks"], jnp.sqrt(max(s.widths) / one["masks"]["width"])

    def fit(path: str, x: Any) -> Any:
        kernel = path.endswith("kernel") and not path.startswith("patch")
        rows, columns = ("hidden" if "/down/" in path else "channel"), ("hidden" if "/up/" in path else "channel")
        x = x * masks["layer"].reshape(-1, *(1,) * (x.ndim - 1)) if path.startswith("layers/") else x
        x = x * masks[rows][:, None] * gain if kernel else x
        return x if path.startswith("head/") else x * masks[columns]

    return trees.replace_leaves(params, {p: fit(p, x) for p, x in trees.by_path(params).items()})


def checked(network: Any, pool: Any, slots: Any, sizes: Any, s: Setup, x: Any) -> float:
    """The largest difference of logits between the padded program and the ordinary way, over the first two members.

    Raises:
      AssertionError: it is more than rounding.
    """
    weights, worst = jax.jit(network.init)(jax.random.key(0)), 0.0
    wide = jax.jit(lambda w, one: forward(widened(network, w, one, slots, s), one["masks"], x))
    for i, (d, w, h) in enumerate(sizes[:2]):
        padded = wide(weights, jax.tree.map(lambda a, i=i: a[i], pool))
        graph, spec, masks = graph_of(d, w, h), spec_of(d, w), masks_of(d, w, h, d, w)
        plain = jax.jit(lambda v, g=graph, t=spec, m=masks: forward(network.predict(v, g, t), m, x))(weights)
        worst = max(worst, float(jnp.abs(padded - plain).max() / jnp.abs(plain).max()))
    if worst > 1e-3:
        raise AssertionError(f"the padded program differs from the ordinary one by {worst:.1e}")
    return worst


# ----------------------------------------------------------------------------------------------------------- training


def meta_trained(network: Any, pool: Any, slots: Any, s: Setup, x: Any, y: Any) -> tuple[list[Any], np.ndarray]:
    """The weights of each seed, and the losses (seeds, steps)."""
    shape = optax.warmup_cosine_decay_schedule(0.0, s.meta_rate, max(1, s.meta_steps // 20), s.meta_steps)
    rule = optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(shape, weight_decay=1e-2))

    @jax.jit
    def run(key: Any) -> Any:
        first, second = jax.random.split(key)
        weights = network.init(first)

        def step(state: Any, key: Any) -> Any:
            weights, moments = state
            which, rows = jax.random.split(key)
            some = jax.tree.map(lambda a: a[jax.random.randint(which, (s.nets,), 0, a.shape[0])], pool)
            rows = jax.random.randint(rows, (s.meta_batch,), 0, y.shape[0])

            def loss(w: Any) -> Any:
                def one(member: Any) -> Any:
                    params = widened(network, w, member, slots, s)
                    logits = forward(params, member["masks"], x[rows])
                    each = optax.softmax_cross_entropy_with_integer_labels(logits, y[rows])
                    return each.mean(), frobenius(params)

                losses, norms = jax.vmap(one)(some)
                return losses.mean() + s.penalty * norms.mean(), losses.mean()

            (_, value), grads = jax.value_and_grad(loss, has_aux=True)(weights)
            updates, moments = rule.update(grads, moments, weights)
            return (optax.apply_updates(weights, updates), moments), value

        (weights, _), losses = jax.lax.scan(step, (weights, rule.init(weights)), jax.random.split(second, s.meta_steps))
        return weights, losses

    made = [run(jax.random.fold_in(jax.random.key(5), seed)) for seed in range(s.meta_seeds)]
    return [w for w, _ in made], np.stack([np.asarray(losses) for _, losses in made])


def lecun(key: Any, spec: Any) -> Any:
    """A random start: matrices N(0, 1 / fan-in), positions N(0, 0.02²), norms' scales 1, biases 0."""
    flat = trees.by_path(spec)
    keys = dict(zip(flat, jax.random.split(key, len(flat))))

    def leaf(path: str, x: Any) -> Any:
        if path.endswith(("kernel", "position")):
            std = 0.02 if path == "position" else x.shape[-2] ** -0.5
            return std * jax.random.normal(keys[path], x.shape)
        return jnp.full(x.shape, float(path.endswith("scale")))

    return trees.replace_leaves(spec, {p: leaf(p, x) for p, x in flat.items()})


def trainer(width: int, s: Setup) -> tuple[Any, Any]:
    """Training and testing of the unseen network.

    `(params, rate, rows (steps, b), train) -> params (marks, ...)` and `(params (marks, ...), seen) -> accuracies (marks,)`
    """
    masks = masks_of(s.unseen_depth, width, 4, s.unseen_depth, width)
    rule = optax.scale_by_adam()
    at = np.array([m // s.chunk - 1 for m in s.marks[1:]])

    @jax.jit
    def run(params: Any, rate: Any, rows: Any, train: Any) -> Any:
        x, y = train

        def step(state: Any, rows: Any) -> Any:
            params, moments = state
            loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(forward(p, masks, x[rows]), y[rows]).mean()
            updates, moments = rule.update(jax.grad(loss)(params), moments)
            return (jax.tree.map(lambda p, u: p - rate * u, params, updates), moments), None

        def chunk(state: Any, rows: Any) -> Any:
            state, _ = jax.lax.scan(step, state, rows)
            return state, state[0]

        chunks = rows.reshape(-1, s.chunk, rows.shape[-1])
        _, kept = jax.lax.scan(chunk, (params, rule.init(params)), chunks)
        return jax.tree.map(lambda p, k: jnp.concatenate([p[None], k[at]]), params, kept)

    def accuracy(params: Any, seen: Any) -> Any:
        x, y = seen
        return jax.lax.map(lambda p: (forward(p, masks, x).argmax(-1) == y).mean(), params)

    return run, jax.jit(accuracy)


def evaluated(programs: Any, name: str, starts: Any, parts: Mapping[str, Any], s: Setup) -> dict[str, Any]:
    """One start on one network: the rate by validation, then the test accuracies of each seed at each mark."""
    run, accuracy = programs
    rows = lambda seed: study.rows_of(len(parts["train"][1]), s.steps, s.batch, seed)
    trained = lambda seed, rate: run(starts(seed), rate, rows(seed), parts["train"])
    tried = {r: float(accuracy(trained(1000, r), parts["validation"])[-1]) for r in map(float, s.rates)}
    rate = max(tried, key=lambda r: tried[r])
    test = np.stack([np.asarray(accuracy(trained(i, rate), parts["test"])) for i in range(s.seeds)])
    marks = {f"after_{m}": float(v) for m, v in zip(s.marks, test.mean(0))}
    print(f"{name:>40}: rate {rate:g}, " + ", ".join(f"{k[6:]} {100 * v:.1f}" for k, v in marks.items()), flush=True)
    return {"method": name, "rate": rate, **marks, "details": {"test": test.tolist(), "validation_by_rate": tried}}


# -------------------------------------------------------------------------------------------------------------- large


def write_predicted(folder: Path, network: Any, weights: Any, model: Any, shard_bytes: int) -> dict[str, int]:
    """Predicts a model leaf by leaf into a folder of safetensors; one shard of weights is held at a time.

    Returns how many nodes, parameters, bytes and shards there are.
    """
    inputs = model.dummy_inputs()
    spec = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    graph = model_graph(model.apply, spec, *inputs)
    embeddings = jax.jit(network.encode)(weights, graph.arrays())
    programs: dict[Any, Any] = {}

    def tensor(path: str) -> np.ndarray:
        (slot,) = (t for t in graph.slots if t.path == path)
        alike = slot._replace(path="", index=(), node=0)  # one program for all tensors of a kind
        if alike not in programs:
            programs[alike] = jax.jit(lambda w, x: network.decode(w, x, [alike])["", ()])
        return np.asarray(programs[alike](weights, embeddings[slot.node][None]))

    shards: list[list[str]] = [[]]
    size, sizes = 0, {path: 4 * int(np.prod(x.shape)) for path, x in trees.by_path(spec).items()}
    for path, bytes_ in sizes.items():
        if shards[-1] and size + bytes_ > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(path)
        size += bytes_
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    where = {}
    for name, paths in zip(names, shards):
        held = {}
        for path in paths:
            theirs, transform = hf_name(model, path, stored=True)
            held[theirs] = np.asarray(TRANSFORMS[transform][1](tensor(path)), order="C")
        save_file(held, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(held, name)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index) + "\n")
    (folder / "config.json").write_text(json.dumps(model.hf_config()) + "\n")
    total = sum(sizes.values())
    return {"nodes": len(graph.op), "parameters": total // 4, "bytes": total, "shards": len(shards)}


def gpt2(s: Setup) -> Any:
    width, layers, heads, words = s.large
    return model_from_config(
        {**preset("gpt2"), "n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": words}
    )


def large_written(s: Setup) -> dict[str, Any]:
    """What `write_predicted` took for GPT-2 large; first of all, since a process knows its peak of memory alone."""
    network = logah_network("tiny", scaling="std", channels=(50257,))
    weights = jax.jit(network.init)(jax.random.key(0))
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before, since = peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        written: dict[str, Any] = write_predicted(Path(folder), network, weights, gpt2(s), s.shard)
        if sum(int(np.prod(e.shape)) for e in read_index(folder).values()) != written["parameters"]:
            raise AssertionError("the folder does not hold what was predicted")
    written |= {"more_memory": peak() - before, "seconds": time.perf_counter() - since}
    print(f"GPT-2 large: {written}", flush=True)
    return written


def decoder_sizes() -> list[dict[str, Any]]:
    """Parameters of the decoders, where nothing tiles but the word table, from shapes alone."""
    rows = []
    for target, width, side in (("ViT-L", 4096, 16), ("GPT-2 large", 5120, 1)):
        for name, (d, layers, heads, rank) in SIZES.items():
            count = lambda **k: trees.count(
                jax.eval_shape(logah_network((d, layers, heads, rank), vectors="mlp", **k).init, jax.random.key(0))[
                    "decoder"
                ]
            )
            rows.append(
                {
                    "target": target, "size": name, "logah": count(),
                    "full": count(decoder="full", block=(width, side)), "tiled_64": count(decoder="full", block=(64, side)),
                }
            )  # fmt: skip
    return rows


def as_patches(images: np.ndarray) -> Any:
    """(n, 8, 8) in [0, 1] as (n, 16, 4)."""
    cut = images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, PATCHES, PIXELS)
    return jnp.asarray((cut - 0.3) / 0.35, jnp.float32)


def images_of(name: str, most: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Patches and labels of each split, the first `most` of it."""
    parts = {}
    for split, p in data.load(name).splits.items():
        x, y = np.asarray(p.inputs)[..., 0], np.asarray(p.labels)
        if most is None:
            x = x / 16
        else:
            x, y = x[: most[split]], y[: most[split]]
            x = np.pad(x / 255, ((0, 0), (2, 2), (2, 2))).reshape(-1, 8, 4, 8, 4).mean((2, 4))
        parts[split] = as_patches(x), jnp.asarray(y)
    return parts


def main() -> None:
    began, args = time.perf_counter(), study.arguments((__doc__ or "").splitlines()[0])
    s = SMOKE if args.smoke else Setup()
    written = large_written(s)
    networks = {
        "LoGAH": logah_network(s.size, reach=s.reach, vectors="mlp"),
        "tiled": logah_network(s.size, decoder="full", block=s.block, vectors="mlp"),
    }
    digits = images_of("digits")
    x, y = digits["train"]
    pool, slots, sizes = pool_of(s)
    trained, curves = {}, {}
    for name, network in networks.items():
        print(f"{name}: padded and ordinary logits differ by {checked(network, pool, slots, sizes, s, x[:4]):.0e}")
        trained[name], curves[name] = meta_trained(network, pool, slots, s, x, y)
        print(f"{name}: meta-training loss {curves[name][:, -50:].mean():.3f}", flush=True)

    def starts_of(kind: str, width: int) -> Any:
        spec = spec_of(s.unseen_depth, width)
        if kind == "random":
            draw = jax.jit(lambda key: lecun(key, spec))
            return lambda seed: draw(jax.random.key(seed))
        graph = graph_of(s.unseen_depth, width, 4)
        predict = jax.jit(lambda w: networks[kind].predict(w, graph, spec))
        made = [predict(w) for w in trained[kind]]
        return lambda seed: made[seed % s.meta_seeds]

    rows, by = [], {}
    digits_have = {split: len(y) for split, (_, y) in digits.items()}
    fashion = images_of("fashion-mnist", {**digits_have, "test": 2000})
    for width in s.unseen:
        programs = trainer(width, s)
        for name, parts, kinds in (
            ("digits", digits, ("random", "LoGAH", "tiled")),
            ("Fashion", fashion, ("random", "LoGAH")),
        ):
            for kind in kinds if name == "digits" or width == s.unseen[0] else ():
                row = evaluated(programs, f"{kind}, width {width}, {name}", starts_of(kind, width), parts, s)
                by[kind, width, name] = np.asarray(row["details"]["test"])
                rows.append(row)

    def gain(a: str, b: str, mark: int, width: int, name: str = "digits") -> tuple[float, float]:
        at = s.marks.index(mark)
        return study.interval(list(100 * (by[a, width, name][:, at] - by[b, width, name][:, at])))

    early, last = s.marks[1], s.marks[-1]
    told = lambda found: "; ".join(f"{m:+.1f} ± {h:.1f}" for m, h in found) + " points"
    better = lambda found: all(m - h > 0 for m, h in found)
    first, soon, end = ([gain("LoGAH", "random", m, w) for w in s.unseen] for m in (0, early, last))
    tiled = [gain("LoGAH", "tiled", m, w) for m in (0, early) for w in s.unseen]
    carried = [gain("LoGAH", "random", early, s.unseen[0], "Fashion")]
    count = lambda network: trees.count(jax.eval_shape(network.init, jax.random.key(0))["decoder"])
    covering = count(logah_network(s.size, decoder="full", block=(2 * max(s.unseen), s.block[1]), vectors="mlp"))
    own = {name: count(network) for name, network in networks.items()}
    claims = [
        record.claim("Without training, LoGAH's networks are better than random ones", better(first), told(first)),
        record.claim(f"After {early} steps LoGAH's start is better than the random one", better(soon), told(soon)),
        record.claim(
            f"After {last} steps it is at most a point worse", all(m >= -1 for m, _ in end), told(end)
        ),
        record.claim(
            f"Without training and after {early} steps LoGAH is at least as good as the tiled network",
            all(m >= 0 for m, _ in tiled),
            told(tiled),
        ),
        record.claim(
            "LoGAH's decoder has fewer parameters than a full one with a block as wide as what it predicts",
            own["LoGAH"] < covering,
            f"{own['LoGAH']:,} and {covering:,}; the tiled one has {own['tiled']:,}",
        ),
        record.claim(f"On Fashion after {early} steps the start learned on digits is better than the random one",
                     better(carried), told(carried)),
        record.claim(
            "Writing GPT-2 large takes less than half as much more memory as its weights would",
            written["more_memory"] < written["bytes"] / 2,
            f"{written['more_memory'] / 2**20:.0f} MiB more for {written['bytes'] / 2**20:.0f} MiB",
        ),
    ]  # fmt: skip

    def draw(axes: Any) -> None:
        for (kind, width, name), test in by.items():
            if name == "digits":
                style = "-" if width == s.unseen[-1] else ":"
                color = f"C{['random', 'LoGAH', 'tiled'].index(kind)}"
                axes.plot(s.marks, 100 * test.mean(0), style, marker="o", color=color, label=f"{kind}, width {width}")
        axes.set(xlabel="step", ylabel="test accuracy", xscale="symlog")
        axes.legend(fontsize=7)

    study.finish(
        "logah", args, paper="Zhou et al.: LoGAH, arXiv 2405.16287, 2024", setup=s, rows=rows, claims=claims, began=began,
        figure=draw, decoders=decoder_sizes(), written=written, decoder_parameters={**own, "full, covering": covering},
        meta_loss={k: c[:, :: max(1, s.meta_steps // 100)].mean(0).tolist() for k, c in curves.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
