"""LoGAH (Zhou et al., 2024) in small: vision Transformers wider and deeper than any that its network was trained on.

    python experiments/hyper/logah.py            all of it: half an hour on one core
    python experiments/hyper/logah.py --smoke    every part once in small; writes nothing unless --out is given

Networks are trained on the 8 x 8 digits (patches of 2 x 2) over a pool of 42 vision Transformers of depth 1 to 3, width 16 to
64 and 2 or 4 heads: a step draws four of them and 32 training images, predicts their weights and takes the mean loss. All
architectures go through one compiled program: graphs and widths are arguments, and what is beyond a width is masked, which
the property that smaller matrices are corners of larger ones allows (checked against the ordinary way before training).
Two networks of d = 32, two layers: LoGAH (r = 8, K = 512) and GHN-3's (a block of 32 x 32, tiled), whose decoder has more
parameters; both make vectors by a perceptron. Three seeds of each.

A first run, of 1,500 steps and with query and key apart (which in the graph stand alike, so that they got the same weights),
had one network of three that had learned next to nothing. Since then the three are one matrix, as in the reference's models,
training is of 2,500 steps, and training goes on from predictions with the paper's noise; the claims are the old ones.

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
  5. LoGAH's decoder has fewer parameters than a full one with a block as wide as what it predicts (384).
  6. On Fashion-MNIST after 30 steps LoGAH's start, learned on digits, is better than the random one.
  7. Writing GPT-2 large takes less than half as much memory above what the process had as its weights would.
"""

import dataclasses
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
import logah_bench as bench
import numpy as np
import record
import study
from safetensors.numpy import save_file

from jaxpeft import data, trees
from jaxpeft.hyper.graph import Graph, model_graph
from jaxpeft.hyper.logah import SIZES, logah_network, with_noise
from jaxpeft.models.folder import read_index
from jaxpeft.models.loading import hf_name, model_from_config
from jaxpeft.models.names import TRANSFORMS
from jaxpeft.models.presets import preset

PATCHES, PIXELS, CLASSES = 16, 4, 10


@dataclasses.dataclass(frozen=True)
class Setup(bench.Setup):
    """Sizes of the experiment."""

    meta_steps: int = 2500
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
            "norm1": norm(depth), "qkv": dense(width, 3 * width, depth), "out": dense(width, width, depth),
            "norm2": norm(depth), "up": dense(width, 2 * width, depth), "down": dense(2 * width, width, depth),
        },
        "norm": norm(),
        "head": dense(width, CLASSES),
    }  # fmt: skip


def forward(params: Any, masks: Any, x: Any) -> Any:
    """Logits of images (b, 16, 4) as patches."""
    x = (bench.dense(params["patch"], x) + params["position"]) * masks["channel"]
    x = bench.run_layers(params["layers"], x, masks)
    return bench.dense(params["head"], bench.norm(params["norm"], x, masks).mean(1))


def apply_of(depth: int, width: int, heads: int) -> Any:
    """`(params, x) -> logits` of a network of its own sizes."""
    masks = bench.masks_of(depth, width, heads, depth, width)
    return lambda p, x: forward(p, masks, x)


def graph_of(depth: int, width: int, heads: int, nodes: int | None = None) -> Graph:
    inputs = jnp.ones((1, PATCHES, PIXELS))
    return model_graph(apply_of(depth, width, heads), spec_of(depth, width), inputs, nodes=nodes)


def fitted(params: Any, masks: Any, s: Setup) -> Any:
    """What was decoded at the largest sizes as a member's own; see `bench.Family`."""
    # Matrices were scaled by the largest fan-in; all but the patches' grow with the width.
    gain = jnp.sqrt(max(s.widths) / masks["width"])

    def fit(path: str, x: Any) -> Any:
        x, inputs, outputs = bench.own_part(path, x, masks)
        x = x * masks["layer"].reshape(-1, *(1,) * (x.ndim - 1)) if path.startswith("layers/") else x
        if path.endswith("kernel") and not path.startswith("patch"):
            x = x * inputs[:, None] * gain
        return x if path.startswith("head/") else x * outputs

    return trees.replace_leaves(params, {p: fit(p, x) for p, x in trees.by_path(params).items()})


FAMILY = bench.Family(spec_of, graph_of, apply_of, forward, fitted)


def lecun(path: str, x: Any) -> float | None:
    """Deviations of a random start: matrices N(0, 1 / fan-in), positions N(0, 0.02²)."""
    if path.endswith(("kernel", "position")):
        return 0.02 if path == "position" else x.shape[-2] ** -0.5
    return None


def trainer(width: int, s: Setup) -> tuple[Any, Any]:
    """Training of the unseen network, and its accuracy."""
    apply = apply_of(s.unseen_depth, width, 4)
    return bench.trainer(apply, lambda p, x, y: (apply(p, x).argmax(-1) == y).mean(), s)


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
    pool, slots, sizes = bench.pool_of(FAMILY, s)
    trained, curves = {}, {}
    for name, network in networks.items():
        differ = bench.checked(FAMILY, network, pool, slots, sizes, s, x[:4])
        print(f"{name}: padded and ordinary logits differ by {differ:.0e}")
        trained[name], curves[name] = bench.meta_trained(FAMILY, network, pool, slots, s, x, y)
        print(f"{name}: meta-training loss {curves[name][:, -50:].mean():.3f}", flush=True)

    def starts_of(kind: str, width: int) -> Any:
        spec = spec_of(s.unseen_depth, width)
        if kind == "random":
            draw = jax.jit(lambda key: bench.drawn(key, spec, lecun))
            return lambda seed: draw(jax.random.key(seed))
        graph = graph_of(s.unseen_depth, width, 4)
        predict = jax.jit(lambda w, key: with_noise(key, networks[kind].predict(w, graph, spec)))
        return lambda seed: predict(trained[kind][seed % s.meta_seeds], jax.random.key(seed))

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
                title, starts = f"{kind}, width {width}, {name}", starts_of(kind, width)
                row = bench.evaluated(programs, title, starts, parts, s, rates=s.rates)
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
    covering = count(logah_network(s.size, decoder="full", block=(3 * max(s.unseen), s.block[1]), vectors="mlp"))
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
