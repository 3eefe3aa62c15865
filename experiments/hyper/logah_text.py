"""LoGAH (Zhou et al., 2024) in small: text decoders wider and deeper than any that its network was trained on.

    python experiments/hyper/logah_text.py            all of it: twenty to twenty-five minutes on one core by its operations
    python experiments/hyper/logah_text.py --smoke    every part once in small; writes nothing unless --out is given

The models are GPT-2's in small (learned positions, pre-norm blocks, tied word table; feed-forward blocks of twice the width)
and predict the next of 32 characters from up to 32 before it: English manual pages in small letters without accents, digits
alike, whatever is no letter, space, digit or . , - one character more. (Of 256 bytes the tiled network could not tell those
apart whose numbers are equal modulo 32; so its table fits its block.) Query, key and value are one matrix, as GPT-2's are:
in a graph in which they are three, query and key stand alike and get the same weights. As for GPT-2 in the paper, predicted
matrices are brought to a deviation of 0.02, tables stay as they are.

Networks are trained over 42 decoders of depth 1 to 3, width 16 to 64 and 2 or 4 heads, whose graphs are read from the
models themselves: a step draws four of them and 8 windows, predicts their weights and takes the mean loss. All
architectures go through one compiled program, in which what is beyond a width is masked (checked against the models).
Two networks of d = 32, two layers: LoGAH (r = 8, K = 512) and GHN-3's (a block of 32 x 32, tiled; where 32 divides the width
that makes query, key and value the same), whose decoder has more parameters; both make vectors by a perceptron. Three seeds.
(After 1,000 steps of 6 windows, in a first run, LoGAH had learned the frequencies of characters and no more: 2.98 nats.
Training is of 4,000 since; the claims are the old ones.)

Evaluation is on depth 4, width 96 and 128: the predicted weights with the paper's noise (1e-5 of each tensor's deviation), or
random ones (all matrices and tables N(0, 0.02²), or LeCun's N(0, 1 / fan-in)), are trained by Adam for 300 steps of 8
windows. The rate of each start is chosen out of three by validation of one tuning seed at width 96, and kept at width 128;
then five seeds (orders of the examples and draws; seed i takes the network of seed i mod 3). Measured are nats a character
on held-out pages after 0, 30, 100 and 300 steps. The same, with these rates, at width 96 on German pages, which no network
has seen.

Stated before running, each to be reported as holding or not ("better" by the interval over seeds):
  1. Without training, LoGAH's decoders are better than both random ones, at both widths.
  2. Without training, they are better than the characters' frequencies, at both widths.
  3. After 30 steps LoGAH's start is better than both random ones, at both widths.
  4. After 300 steps it is at most 0.02 nats worse than the better random one, at both widths.
  5. Without training and after 30 steps LoGAH is on the mean at least as good as the tiled network, at both widths.
  6. On German after 30 steps LoGAH's start, learned on English, is better than both random ones.
  7. LoGAH's decoder has fewer parameters than the tiled one, and than one with a block as wide as what it predicts.
"""

import dataclasses
import functools
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import bases
import jax
import jax.numpy as jnp
import logah_bench as bench
import numpy as np
import record
import study

from jaxpeft import trees
from jaxpeft.hyper.graph import Graph, model_graph
from jaxpeft.hyper.logah import logah_network, with_noise
from jaxpeft.models import Decoder, DecoderConfig

LETTERS = " abcdefghijklmnopqrstuvwxyz.,-0"
CONTEXT, SYMBOLS = 32, len(LETTERS) + 1
HEADS = 4  # of the unseen decoders
STD = 0.02
RANDOM = ("N(0, 0.02²)", "LeCun")


@dataclasses.dataclass(frozen=True)
class Setup(bench.Setup):
    """Sizes of the experiment."""

    block: tuple[int, int] = (32, 1)
    pool: int = 42
    meta_steps: int = 4000
    meta_batch: int = 8
    batch: int = 8
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    windows: tuple[int, int, int] = (16384, 128, 192)  # training, validation, test
    other: str = "de"
    noise: float = 1e-5


SMOKE = Setup(
    size=(8, 1, 2, 2), reach=64, block=(4, 1), depths=(1, 2), widths=(8, 16), pool=3, nets=2, meta_steps=3, meta_seeds=2,
    meta_batch=4, unseen=(16,), unseen_depth=2, steps=4, marks=(0, 2, 4), batch=4, rates=(1e-3, 1e-2), seeds=2, chunk=2,
    windows=(32, 4, 4),
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the text


def symbols_of(stream: np.ndarray) -> np.ndarray:
    """A stream of bytes as numbers of characters; the last one stands for all that have none."""
    text = unicodedata.normalize("NFKD", stream.tobytes().decode().casefold())
    table = np.full(128, SYMBOLS - 1, np.uint8)
    for character, number in [
        *zip(LETTERS, range(SYMBOLS)),
        *((d, LETTERS.index("0")) for d in "123456789"),
        ("\n", 0),
    ]:
        table[ord(character)] = number
    return table[np.frombuffer(text.encode("ascii", "ignore"), np.uint8)]


def text_of(language: str, s: Setup) -> tuple[dict[str, Any], float]:
    """Split -> windows (n, 32) and what follows each position; the test's nats a character by training frequencies."""
    parts, streams = {}, {k: symbols_of(stream) for k, stream in bases.pages(language).items()}
    for i, (split, count) in enumerate(zip(("train", "validation", "test"), s.windows)):
        ids = bases.windows(streams[split], count, CONTEXT + 1, i).input_ids
        parts[split] = ids[:, :-1], ids[:, 1:]
    share = np.bincount(streams["train"], minlength=SYMBOLS) + 1.0
    share /= share.sum()
    return parts, float(-np.log(share[np.asarray(parts["test"][1])]).mean())


# -------------------------------------------------------------------------------------------------------- the decoders


def model_of(depth: int, width: int, heads: int) -> Decoder:
    return Decoder(
        DecoderConfig(
            vocab=SYMBOLS,
            width=width,
            layers=depth,
            heads=heads,
            head_dim=width // heads,
            mlp_width=2 * width,
            max_positions=CONTEXT,
            activation="gelu_new",
            norm_eps=1e-5,
            pre_norm=True,
            fused_qkv=True,
            scan=True,
            init_std=STD,
        )
    )


@functools.cache
def spec_of(depth: int, width: int) -> Any:
    return jax.eval_shape(model_of(depth, width, HEADS).init, jax.random.key(0), jnp.zeros((1, CONTEXT), jnp.int32))


def graph_of(depth: int, width: int, heads: int, nodes: int | None = None) -> Graph:
    inputs = jnp.zeros((1, CONTEXT), jnp.int32)
    return model_graph(model_of(depth, width, heads).apply, spec_of(depth, width), inputs, nodes=nodes)


def forward(params: Any, masks: Any, ids: Any) -> Any:
    """Logits (b, t, 32) of a member at the largest sizes."""
    p = params["params"]
    table, positions = (p["embeddings"][k]["embedding"] for k in ("word", "position"))
    attention, mlp = p["layers"]["attention"], p["layers"]["mlp"]
    norms = {"norm1": p["layers"]["attention_norm"], "norm2": p["layers"]["mlp_norm"]}
    layers = {**norms, "qkv": attention["qkv"], "out": attention["out"], **mlp}
    x = bench.run_layers(layers, table[ids] + positions[: ids.shape[1]], masks, causal=True)
    return bench.norm(p["final_norm"], x, masks) @ table.T


def fitted(params: Any, masks: Any, s: Setup) -> Any:
    """What was decoded at the largest sizes, unscaled, as a member's own; see `bench.Family`."""

    def fit(path: str, x: Any) -> Any:
        x, inputs, outputs = bench.own_part(path, x, masks)
        if path.endswith("kernel"):
            x = scaled(x, inputs[:, None] * outputs)
        return x * outputs * (masks["layer"].reshape(-1, *(1,) * (x.ndim - 1)) if "/layers/" in path else 1.0)

    return trees.replace_leaves(params, {p: fit(p, x) for p, x in trees.by_path(params).items()})


def scaled(x: Any, own: Any) -> Any:
    """Stacked matrices (L, m, n) brought to the deviation that GPT-2's are, by the entries that are a member's own."""
    count = own.sum()
    away = (x - (x * own).sum((1, 2), keepdims=True) / count) * own
    spread = jnp.sqrt(jnp.maximum(jnp.square(away).sum((1, 2), keepdims=True) / (count - 1), 1e-30))
    return x * (STD / (spread + 1e-7)) * own


FAMILY = bench.Family(spec_of, graph_of, lambda *sizes: model_of(*sizes).apply, forward, fitted)


def unscaled(slots: Any) -> tuple:
    """Slots whose matrices are decoded as tables are, without a scale: that of the largest size is no member's."""
    return tuple(t._replace(op="embedding") if t.op == "linear" else t for t in slots)


# -------------------------------------------------------------------------------------------------------------- starts


def lecun(path: str, x: Any) -> float | None:
    """Deviations N(0, 1 / fan-in); the tables' is that of the head, which the word table is."""
    if path.endswith("embedding"):
        return x.shape[-1] ** -0.5
    return x.shape[-2] ** -0.5 if path.endswith("kernel") else None


def starts_of(kind: str, width: int, network: Any, trained: Any, s: Setup) -> Any:
    """`(seed) -> params` of the unseen decoder."""
    spec, model = spec_of(s.unseen_depth, width), model_of(s.unseen_depth, width, HEADS)
    if kind == RANDOM[0]:
        draw = jax.jit(lambda key: model.init(key, jnp.zeros((1, CONTEXT), jnp.int32)))
    elif kind == RANDOM[1]:
        draw = jax.jit(lambda key: bench.drawn(key, spec, lecun))
    else:
        graph = graph_of(s.unseen_depth, width, HEADS)
        predict = jax.jit(lambda w, key: with_noise(key, network.predict(w, graph, spec), s.noise))
        return lambda seed: predict(trained[seed % s.meta_seeds], jax.random.key(seed))
    return lambda seed: draw(jax.random.key(seed))


def trainer(width: int, s: Setup) -> tuple[Any, Any]:
    """Training of the unseen decoder, and its nats a character; 100 where training broke off."""
    apply = model_of(s.unseen_depth, width, HEADS).apply

    def nats(params: Any, x: Any, y: Any) -> Any:
        value = bench.cross_entropy(apply(params, x), y).mean()
        return jnp.where(jnp.isfinite(value), value, 100.0)

    return bench.trainer(apply, nats, s)


def main() -> None:
    began, args = time.perf_counter(), study.arguments((__doc__ or "").splitlines()[0])
    s = SMOKE if args.smoke else Setup()
    texts = {"English": text_of("en", s), "German": text_of(s.other, s)}
    x, y = texts["English"][0]["train"]
    networks = {
        "LoGAH": logah_network(s.size, reach=s.reach, vectors="mlp", scaling="std", std=STD),
        "tiled": logah_network(s.size, decoder="full", block=s.block, vectors="mlp", scaling="std", std=STD),
    }
    pool, slots, sizes = bench.pool_of(FAMILY, s)
    slots, trained, curves = unscaled(slots), {}, {}
    for name, network in networks.items():
        differ = bench.checked(FAMILY, network, pool, slots, sizes, s, x[:4])
        print(f"{name}: padded and ordinary logits differ by {differ:.0e}")
        trained[name], curves[name] = bench.meta_trained(FAMILY, network, pool, slots, s, x, y)
        print(f"{name}: meta-training loss {curves[name][:, -50:].mean():.3f}", flush=True)

    rows, by, rates = [], {}, {}
    for width in s.unseen:
        programs = trainer(width, s)
        for kind in (*RANDOM, *networks):
            starts = starts_of(kind, width, networks.get(kind), trained.get(kind), s)
            for text in ("English", "German") if width == s.unseen[0] and kind != "tiled" else ("English",):
                row = bench.evaluated(
                    programs, f"{kind}, width {width}, {text}", starts, texts[text][0], s,
                    rates=rates.get(kind, s.rates), best=min, told=lambda v: f"{v:.3f}",
                )  # fmt: skip
                rates.setdefault(kind, (row["rate"],))
                by[kind, width, text] = np.asarray(row["details"]["test"])
                rows.append(row)

    def gain(others: Any, marks: Any, widths: Any = s.unseen, text: str = "English") -> list[tuple[float, float]]:
        """By how many nats LoGAH is below each other start, at each mark and width."""
        below = lambda k, m, w: (by[k, w, text] - by["LoGAH", w, text])[:, s.marks.index(m)]
        return [study.interval(below(k, m, w).tolist()) for m in marks for w in widths for k in others]

    early, last = s.marks[1], s.marks[-1]
    told = lambda found: "; ".join(f"{m:+.3f} ± {h:.3f}" for m, h in found) + " nats"
    better = lambda found: all(m - h > 0 for m, h in found)
    first, soon, carried = gain(RANDOM, (0,)), gain(RANDOM, (early,)), gain(RANDOM, (early,), s.unseen[:1], "German")
    frequent = {name: nats for name, (_, nats) in texts.items()}
    counted = [study.interval((frequent["English"] - by["LoGAH", w, "English"][:, 0]).tolist()) for w in s.unseen]
    strongest = {w: min(RANDOM, key=lambda k, w=w: by[k, w, "English"][:, -1].mean()) for w in s.unseen}
    end = [gain((strongest[w],), (last,), (w,))[0] for w in s.unseen]
    tiled = gain(("tiled",), (0, early))
    count = lambda network: trees.count(jax.eval_shape(network.init, jax.random.key(0))["decoder"])
    widest = 3 * max(s.unseen)
    covering = count(logah_network(s.size, decoder="full", block=(widest, s.block[1]), vectors="mlp"))
    own = {name: count(network) for name, network in networks.items()}
    claims = [
        record.claim("Without training, LoGAH's decoders are better than both random ones", better(first), told(first)),
        record.claim(
            "Without training, they are better than the characters' frequencies",
            better(counted),
            f"{told(counted)}, by {frequent['English']:.3f}",
        ),
        record.claim(f"After {early} steps LoGAH's start is better than both random ones", better(soon), told(soon)),
        record.claim(
            f"After {last} steps it is at most 0.02 nats worse than the better random one",
            all(m >= -0.02 for m, _ in end),
            told(end),
        ),
        record.claim(
            f"Without training and after {early} steps LoGAH is at least as good as the tiled network",
            all(m >= 0 for m, _ in tiled),
            told(tiled),
        ),
        record.claim(
            f"On German after {early} steps the start learned on English is better than both random ones",
            better(carried),
            told(carried),
        ),
        record.claim(
            "LoGAH's decoder has fewer parameters than the tiled one, and than one with a block as wide as what it predicts",
            own["LoGAH"] < min(own["tiled"], covering),
            f"{own['LoGAH']:,}, {own['tiled']:,} and {covering:,}",
        ),
    ]

    def draw(axes: Any) -> None:
        for (kind, width, text), test in by.items():
            if text == "English":
                style = "-" if width == s.unseen[-1] else ":"
                color = f"C{[*RANDOM, *networks].index(kind)}"
                axes.plot(s.marks, test.mean(0), style, marker="o", color=color, label=f"{kind}, width {width}")
        axes.axhline(frequent["English"], color="0.7", linewidth=1)
        axes.set(xlabel="step", ylabel="nats a character", xscale="symlog")
        axes.legend(fontsize=7)

    study.finish(
        "logah-text", args, paper="Zhou et al.: LoGAH, arXiv 2405.16287, 2024", setup=s, rows=rows, claims=claims,
        began=began, figure=draw, frequencies=frequent, decoder_parameters={**own, "full, covering": covering},
        decoders={str(w): trees.count(spec_of(s.unseen_depth, w)) for w in s.unseen},
        meta_loss={k: c[:, :: max(1, s.meta_steps // 100)].mean(0).tolist() for k, c in curves.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
