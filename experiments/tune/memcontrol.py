"""MemControl (WACV 2025) in small: can a search for what to tune keep a diffusion model from memorising?

    python experiments/tune/memcontrol.py            all of it: about half an hour on two cores, minutes on a GPU
    python experiments/tune/memcontrol.py --smoke    every part once in small; writes nothing unless --out is given

A class-conditional diffusion transformer (6 blocks, width 64) is trained once on Fashion-MNIST brought to 8 x 8 pixels and
kept in the cache, then fine-tuned on 80 digits of scikit-learn, 8 a class, each seen about 400 times. PEFT is LoRA of rank 8 at
all linear layers of the blocks: block j's is trained where bit j of the mask is one; biases, the embedding of labels (the
classes are new) and that of time always are. (DiffFit and SV-DIFF, the paper's, fit so small a model so badly, at over twice
the FD, that nothing is memorised: seen in one run each, at a rate of 0.01, on the search's digits, as were the sizes and the
range of rates chosen.) Adam, clipped, at a constant rate.

A candidate (6 bits and a rate) is trained from the start and judged by Mem (the norm of the condition's part of the predicted
noise on the 80 images, at a fixed grid of times and with fixed noise) and FD (the Fréchet distance of 300 samples to 360 real
digits in the features of a classifier trained on yet other digits). NSGA-II: 10 candidates, 4 rounds. Plain PEFT (all ones)
and full fine-tuning have a grid of four rates on the same seed; plain PEFT takes that of the least FD, full fine-tuning that
whose FD is nearest to plain PEFT's. The mask taken is that of the least FD among those whose Mem is below plain PEFT's.

Then all is trained anew, with five fresh seeds of initialisation, order, noise and samples, and judged on 360 test digits not
used before: FD, and the ratio of two mean distances to the nearest of the 80 training images, that of the samples to that of
the test digits. Small is memorised. Over 1, samples are no nearer than other digits are: it counts as 1 in claims 1 to 3.
Extraction: of 30 samples of a class, three or more alike, one of which is like a training image of the class; alike is a
largest distance over 4 x 4 tiles under that which one in a hundred of the real digits falls under.

Stated before running, each to be reported as holding or not, by means over the five seeds:
  1. Full fine-tuning memorises more than plain PEFT: a smaller ratio and no fewer extracted classes, at an FD within a quarter.
  2. The searched mask is nowhere worse than plain PEFT: ratio not smaller, FD not larger.
  3. Up to three of the search's front have a larger hypervolume, in ratio and FD, than random masks with as many ones each
     and the same rates, drawn anew for each seed.
  4. Mem orders the candidates of the search as the ratio does: Spearman's correlation of Mem and minus the ratio is at
     least 0.5.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import bases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import study
from pretraining import kept
from scipy import stats

from jaxpeft import Method, adapt, chain, full, generate, lora, trees
from jaxpeft.models.dit import Dit, DitConfig
from jaxpeft.tune import memcontrol as mc
from jaxpeft.tune import non_dominated, nsga2
from jaxpeft.updates import descend

EMPTY = 10  # the class that stands for none
SEARCH_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    layers: int = 6
    width: int = 64
    heads: int = 4
    times: int = 100  # of the diffusion
    pretraining_steps: int = 2500
    pretraining_batch: int = 128
    pretraining_rate: float = 1e-3
    examples: int = 0  # of Fashion-MNIST; 0 for all
    per_class: int = 8  # training digits
    reference: int = 360  # real digits that samples are compared with
    feature_steps: int = 600
    steps: int = 1000
    batch: int = 32
    drop: float = 0.1
    samples: int = 30  # of each class
    sampling_steps: int = 20
    guidance: float = 2.0
    mem_times: tuple[int, ...] = (10, 25, 40, 55, 70, 85)
    population: int = 10
    rounds: int = 4
    rank: int = 8
    low: float = 3e-4
    high: float = 1e-2
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    full_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    front: int = 3
    seeds: int = 5
    chunk: int = 5  # candidates trained at once


SMOKE = Setup(
    layers=2, width=16, heads=2, times=30, pretraining_steps=2, pretraining_batch=4, examples=20, per_class=2, reference=20,
    feature_steps=5, steps=2, batch=4, samples=3, sampling_steps=2, mem_times=(5, 15), population=4, rounds=1, rank=2,
    rates=(1e-2,), full_rates=(1e-3,), front=1, seeds=2, chunk=2,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ model and digits


def pretrained(s: Setup, keep: bool) -> tuple[Dit, Any]:
    config = DitConfig(
        width=s.width,
        layers=s.layers,
        heads=s.heads,
        head_dim=s.width // s.heads,
        mlp_width=2 * s.width,
        image=(8, 8),
        patch=(2, 2),
        channels=1,
        classes=EMPTY,
        init_std=None,  # at so small a width, 0.02 would leave attention asleep
    )
    model = Dit(config)
    start = jax.jit(model.init)(jax.random.key(0), *model.dummy_inputs())
    images, labels = map(jnp.asarray, bases.images("fashion-mnist", 8, examples=s.examples)["train"])
    schedule, n = generate.linear(s.times), len(labels)

    def loss(params: Any, rows: Any, key: Any) -> Any:
        predict = lambda *a: model.apply(params, *a)
        return generate.epsilon_loss(predict, schedule, key, images[rows], labels[rows], EMPTY, s.drop).mean()

    def run(params: Any) -> Any:
        rate = optax.warmup_cosine_decay_schedule(
            0.0, s.pretraining_rate, s.pretraining_steps // 20, s.pretraining_steps
        )
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

        @jax.jit
        def train(params: Any, key: Any) -> Any:
            def drawn(params: Any, key: Any) -> Any:
                draw, key = jax.random.split(key)
                return loss(params, jax.random.randint(draw, (s.pretraining_batch,), 0, n), key)

            return descend(drawn, params, optimiser, jax.random.split(key, s.pretraining_steps))

        params, losses = train(params, jax.random.key(1))
        print(f"pretrained: loss {float(losses[0]):.3f} to {float(losses[-100:].mean()):.3f}", flush=True)
        return params

    sizes = {k: v for k, v in dataclasses.asdict(s).items() if k.startswith("pretraining")}
    what = {"config": repr(config), "times": s.times, "drop": s.drop, "examples": s.examples, **sizes}
    return model, kept("dit", what, start, run, keep)


@dataclasses.dataclass(frozen=True)
class Digits:
    """Disjoint sets of digits, each (images, labels)."""

    train: Any  # those that may be memorised
    search: Any  # what samples are compared with in the search
    test: Any  # ... and in the end
    features: Any  # for the classifier


def digits_of(s: Setup) -> Digits:
    found = bases.images("digits", 8)
    images, labels = (np.concatenate([found[k][i] for k in ("train", "validation")]) for i in (0, 1))
    order = np.random.default_rng(0).permutation(len(labels))
    train = np.concatenate([order[labels[order] == c][: s.per_class] for c in range(EMPTY)])
    rest = order[~np.isin(order, train)]
    part = lambda rows: (jnp.asarray(images[rows]), jnp.asarray(labels[rows], jnp.int32))
    test = tuple(jnp.asarray(x[: s.reference]) for x in found["test"])
    return Digits(part(train), part(rest[: s.reference]), test, part(rest[s.reference :]))


def features_of(s: Setup, digits: Digits) -> tuple[Callable[[Any], Any], float]:
    """`images -> (n, 16)`, what a small classifier makes of them, and its accuracy on the search's digits."""
    sizes = (64, 64, 16, EMPTY)
    keys = jax.random.split(jax.random.key(2), 3)
    start = [jax.random.normal(k, (i, o)) / i**0.5 for k, i, o in zip(keys, sizes, sizes[1:])]
    optimiser = optax.adam(3e-3)

    def features(w: Any, x: Any) -> Any:
        return jnp.tanh(jnp.tanh(x.reshape(x.shape[0], -1) @ w[0]) @ w[1])

    def loss(w: Any, x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(features(w, x) @ w[2], y).mean()

    @jax.jit
    def train(w: Any, x: Any, y: Any) -> Any:
        def drawn(w: Any, key: Any) -> Any:
            rows, noise = jax.random.split(key)
            rows = jax.random.randint(rows, (64,), 0, x.shape[0])
            # Noisy pixels: features that a speck of noise moves would say little of how digits look.
            return loss(w, x[rows] + 0.1 * jax.random.normal(noise, (64, *x.shape[1:])), y[rows])

        return descend(drawn, w, optimiser, jax.random.split(jax.random.key(3), s.feature_steps))[0]

    w = train(start, *digits.features)
    x, y = digits.search
    return lambda x: features(w, x), float(((features(w, x) @ w[2]).argmax(-1) == y).mean())


# ------------------------------------------------------------------------------------------------------------ candidates


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is trained and judged: bits of the mask, a rate, a seed."""

    mask: tuple[int, ...]
    rate: float
    seed: int


def runner(
    s: Setup, method: Method, gate: str, model: Dit, params: Any, digits: Digits, features: Any, threshold: Any
) -> Any:
    """`(candidates, split of digits) -> metric -> (candidates,)`, by one program."""
    schedule = generate.linear(s.times)
    adapted = adapt(model.apply, method)
    inputs = model.dummy_inputs()
    start = jax.eval_shape(adapted.init, jax.random.key(0), params, *inputs)
    blocks = mc.block_map(start, [f"{gate}/**/layers_{i}/**" for i in range(s.layers)] if gate else [])

    def loss(params: Any, delta: Any, batch: Any, key: Any) -> Any:
        predict = lambda *a: adapted.apply(params, delta, *a)
        return generate.epsilon_loss(predict, schedule, key, batch[0], batch[1], EMPTY, s.drop).mean()

    train = mc.inner(loss, blocks, lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)))
    labels = jnp.repeat(jnp.arange(EMPTY), s.samples)

    def judge(key: Any, params: Any, _: None, mask: Any, rate: Any, data: Any, reference: Any) -> dict[str, Any]:
        keys = jax.random.split(key, 5)
        delta = adapted.init(keys[4], params, *inputs)
        rows = jax.random.randint(keys[0], (s.steps, s.batch), 0, data[1].shape[0])
        delta, losses = train(keys[1], params, delta, mask, rate, data, rows)
        merged = adapted.merge(params, delta)
        predict = lambda *a: model.apply(merged, *a)
        # Mem's noise is the same for all candidates and seeds.
        times = jnp.asarray(s.mem_times)[:, None]
        mem = mc.memorisation(predict, schedule, jax.random.key(7), data[0], data[1], EMPTY, times)
        noise = jax.random.normal(keys[2], (labels.shape[0], 8, 8, 1))
        made = generate.ddim(
            generate.guided(predict, s.guidance, EMPTY),
            schedule,
            keys[3],
            noise,
            labels,
            steps=s.sampling_steps,
            clip=1.0,
        )
        near = lambda x: generate.nearest_distance(x, data[0], "euclidean").mean()
        own = made.reshape(EMPTY, s.samples, 8, 8, 1)
        memorised, first = jax.vmap(lambda x: generate.extraction(x, threshold))(own)
        shown = own[jnp.arange(EMPTY), first]
        like = (generate.tile_distance(shown, data[0]) < threshold) & (data[1] == jnp.arange(EMPTY)[:, None])
        copied = (generate.tile_distance(made, data[0]) < threshold) & (data[1] == labels[:, None])
        return {
            "mem": mem,
            "fd": generate.frechet(features(reference), features(made), 1e-4),
            "ratio": near(made) / near(reference),
            "memorised": memorised.sum(),
            "extracted": (memorised & like.any(1)).sum(),
            "copied": copied.any(1).mean(),
            "amd": generate.nearest_distance(features(made), features(data[0])).mean(),
            "loss": losses[-20:].mean(),
        }

    @jax.jit
    def together(keys: Any, params: Any, masks: Any, rates: Any, data: Any, reference: Any) -> Any:
        return mc.population(judge, keys, params, None, masks, rates, data, reference, chunk=s.chunk)

    def run(candidates: Sequence[Candidate], reference: Any) -> dict[str, np.ndarray]:
        found = []
        for i in range(0, len(candidates), s.chunk):
            some = list(candidates[i : i + s.chunk])
            some += [some[-1]] * (s.chunk - len(some))  # so that one program does for all
            keys = jnp.stack([jax.random.key(c.seed) for c in some])
            masks = jnp.asarray([c.mask for c in some], jnp.float32)
            rates = jnp.asarray([c.rate for c in some], jnp.float32)
            found.append(jax.device_get(together(keys, params, masks, rates, digits.train, reference)))
        return {k: np.concatenate([f[k] for f in found])[: len(candidates)] for k in found[0]}

    return run, trees.count(trees.learned(start)[0])


def searched(s: Setup, run: Any, reference: Any) -> tuple[list[Candidate], dict[str, np.ndarray]]:
    """All candidates that the search saw, and their metrics."""
    search = nsga2(s.layers, 1, population=s.population)
    state, seen, found = search.init(jax.random.key(SEARCH_SEED)), [], []
    for key in jax.random.split(jax.random.key(SEARCH_SEED + 1), s.rounds):
        asked, state = search.ask(state, key)
        rates = np.asarray(mc.rates_of(asked.numbers[:, 0], s.low, s.high))
        new = [Candidate(tuple(map(int, m)), float(r), SEARCH_SEED) for m, r in zip(np.asarray(asked.bits), rates)]
        out = run(new, reference)
        state = search.tell(state, asked, jnp.stack([out["mem"], out["fd"]], 1))
        seen, found = seen + new, [*found, out]
        print(f"searched {len(seen)}: Mem {out['mem'].min():.2f}, FD {out['fd'].min():.3f} at least", flush=True)
    return seen, {k: np.concatenate([f[k] for f in found]) for k in found[0]}


def random_mask(like: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
    """Another mask with as many ones, where there is another."""
    while True:
        new = tuple(map(int, rng.permutation(like)))
        if new != like or len(set(like)) == 1:
            return new


def row(name: str, candidate: Any, trained: int, out: dict[str, np.ndarray]) -> dict[str, Any]:
    """One line of the table; what it prints are means over seeds."""
    means = {k: float(v.mean()) for k, v in out.items()}
    print(
        f"{name:22} ratio {means['ratio']:.3f}  FD {means['fd']:.3f}  extracted {means['extracted']:.1f}  "
        f"copied {means['copied']:.3f}  AMD {means['amd']:.4f}  Mem {means['mem']:.2f}  loss {means['loss']:.3f}",
        flush=True,
    )
    each = {k: [float(x) for x in v] for k, v in out.items()}
    return {"method": name, "trained": trained, **dataclasses.asdict(candidate), **means, "details": each}


def main() -> None:
    args = study.arguments("MemControl in small; see the file's first lines.")
    s, began = SMOKE if args.smoke else Setup(), time.perf_counter()
    model, params = pretrained(s, not args.smoke)
    digits = digits_of(s)
    features, accuracy = features_of(s, digits)
    x, y = digits.search
    apart = jnp.where(y[:, None] == digits.train[1], generate.tile_distance(x, digits.train[0]), jnp.inf).min(1)
    threshold = jnp.quantile(apart, 0.01)
    print(f"features: {accuracy:.3f} of the search's digits right; alike is under {float(threshold):.3f}", flush=True)
    low_rank = chain(
        lora(s.rank, at="**/layers_*/**/kernel"), full(("**/bias", "**/label/embedding", "params/time/**/kernel"))
    )
    peft, factors = runner(s, low_rank, "lora", model, params, digits, features, threshold)
    whole, everything = runner(s, full(), "", model, params, digits, features, threshold)
    ones, reference = (1,) * s.layers, digits.search[0]

    plain_tried = peft([Candidate(ones, r, SEARCH_SEED) for r in s.rates], reference)
    at = int(np.argmin(plain_tried["fd"]))
    plain = Candidate(ones, s.rates[at], 0)
    full_tried = whole([Candidate(ones, r, SEARCH_SEED) for r in s.full_rates], reference)
    nearest = int(np.argmin(np.abs(full_tried["fd"] - plain_tried["fd"][at])))
    tuned_all = Candidate(ones, s.full_rates[nearest], 0)
    seen, found = searched(s, peft, reference)
    scores = jnp.stack([jnp.asarray(found["mem"]), jnp.asarray(found["fd"])], 1)
    chosen = seen[int(mc.select(scores, float(plain_tried["mem"][at])))]
    ranked = sorted(np.flatnonzero(np.asarray(non_dominated(scores))), key=lambda i: found["fd"][i])
    few = np.unique(np.linspace(0, len(ranked) - 1, min(s.front, len(ranked))).round().astype(int))
    front = [seen[ranked[i]] for i in few]

    seeds = range(s.seeds)
    anew = lambda c: [dataclasses.replace(c, seed=seed) for seed in seeds]
    rng = np.random.default_rng(0)
    rivals = [[dataclasses.replace(c, mask=random_mask(c.mask, rng), seed=i) for i in seeds] for c in front]
    groups = {"plain PEFT": anew(plain), "searched": anew(chosen)}
    groups |= {f"front {i}": anew(c) for i, c in enumerate(front)}
    groups |= {f"random {i}": group for i, group in enumerate(rivals)}
    out = peft([c for group in groups.values() for c in group], digits.test[0])
    cut = {n: {k: v[i * s.seeds : (i + 1) * s.seeds] for k, v in out.items()} for i, n in enumerate(groups)}
    cut["full fine-tuning"] = whole(anew(tuned_all), digits.test[0])
    groups["full fine-tuning"] = anew(tuned_all)
    for metrics in cut.values():
        metrics["capped"] = np.minimum(metrics["ratio"], 1)
    rows = [row(n, groups[n][0], everything if "full" in n else factors, cut[n]) for n in cut]

    def paired(metric: str, a: str, b: str) -> tuple[float, float]:
        return study.interval([float(p) - float(q) for p, q in zip(cut[a][metric], cut[b][metric])])

    say = lambda what, pair: f"{what} {pair[0]:+.4f} ± {pair[1]:.4f}"
    nearer = paired("capped", "plain PEFT", "full fine-tuning")
    more = paired("extracted", "full fine-tuning", "plain PEFT")
    fds = {n: float(cut[n]["fd"].mean()) for n in cut}
    away = fds["full fine-tuning"] / fds["plain PEFT"] - 1
    ratio, fd = paired("capped", "searched", "plain PEFT"), paired("fd", "searched", "plain PEFT")

    points = lambda names, i: np.array([[-cut[n]["capped"][i], cut[n]["fd"][i]] for n in names])
    names = [[f"{kind} {i}" for i in range(len(front))] for kind in ("front", "random")]
    corner = jnp.array([0.0, max(float(cut[n]["fd"].max()) for group in names for n in group)])
    areas = [[float(mc.hypervolume(jnp.asarray(points(n, i)), corner)) for i in seeds] for n in names]
    area = study.interval([a - b for a, b in zip(*areas)])
    with np.errstate(invalid="ignore"):  # equal values have no order
        rank = float(np.corrcoef(stats.rankdata(found["mem"]), stats.rankdata(-found["ratio"]))[0, 1])
    claims = [
        record.claim(
            "Full fine-tuning memorises more than plain PEFT: a smaller ratio, no fewer extracted classes, an FD within 25 %",
            nearer[0] > 0 and more[0] >= 0 and abs(away) <= 0.25,
            f"{say('ratio, PEFT - full:', nearer)}; {say('extracted, full - PEFT:', more)}; FD {away:+.0%}",
        ),
        record.claim(
            "The searched mask is nowhere worse than plain PEFT on fresh seeds: ratio not smaller, FD not larger",
            ratio[0] >= 0 and fd[0] <= 0,
            f"mask {''.join(map(str, chosen.mask))}; {say('ratio', ratio)}; {say('FD', fd)}",
        ),
        record.claim(
            "The search's front has a larger hypervolume than random masks with as many ones and the same rates",
            area[0] > 0,
            f"{say('area', area)}; {statistics.mean(areas[0]):.4f} against {statistics.mean(areas[1]):.4f}",
        ),
        record.claim("Mem orders the search's candidates as the ratio does", rank >= 0.5, f"Spearman {rank:.2f}"),
    ]

    def figure(axes: Any) -> None:
        axes.scatter(found["ratio"], found["fd"], s=12, c="0.7", label="seen by the search (its seed, its digits)")
        colours = {"plain PEFT": "C0", "searched": "C1", "full fine-tuning": "C2", "front": "C4", "random": "C5"}
        for n, metrics in cut.items():
            kind = n if n in colours else n.split()[0]
            x, y = metrics["ratio"], metrics["fd"]
            label = {"front 0": "the search's front", "random 0": "random masks"}.get(n, n if n == kind else None)
            axes.errorbar(x.mean(), y.mean(), y.std(), x.std(), fmt="o", capsize=2, label=label, color=colours[kind])
        axes.set(xlabel="distance to the training images, relative to real digits'", ylabel="Fréchet distance")
        axes.legend(fontsize=7)

    plainly = lambda candidates, metrics: [
        {**dataclasses.asdict(c), **{k: float(v[i]) for k, v in metrics.items()}} for i, c in enumerate(candidates)
    ]
    study.finish(
        "memcontrol",
        args,
        paper="MemControl, WACV 2025",
        setup=s,
        rows=rows,
        claims=claims,
        began=began,
        figure=figure,
        search=plainly(seen, found),
        plain_tried=plainly([plain] * len(s.rates), {**plain_tried, "rate": np.array(s.rates)}),
        full_tried=plainly([tuned_all] * len(s.full_rates), {**full_tried, "rate": np.array(s.full_rates)}),
        rate_at_the_grids_edge={"plain": at in (0, len(s.rates) - 1), "full": nearest in (0, len(s.full_rates) - 1)},
        features_accuracy=accuracy,
        threshold=float(threshold),
        random_masks=[["".join(map(str, c.mask)) for c in group] for group in rivals],
    )


if __name__ == "__main__":
    main()
