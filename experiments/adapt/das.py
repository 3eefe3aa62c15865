"""DAS (Wu et al., NeurIPS 2023) in small: does a bandit find the layers that a task can do without?

    python experiments/adapt/das.py            all of it: about half an hour on two cores, minutes on a GPU
    python experiments/adapt/das.py --smoke    every part once in small; writes nothing unless --out is given

A ViT (8 blocks, width 96, patches of 8 in images of 24) is trained once on seven of Fashion-MNIST's ten classes and kept in
the cache. Two targets, 600 training images each: scikit-learn's digits, and the three held-out classes (pullover, coat,
shirt). Adapters beside the layers that stay are 12 wide, those in place of skipped ones 24: the paper's shares of the width.

Every subset of 1 or 2 layers is skipped in turn, 20 random ones of 3 and of 4, none, the last k, the k layers that change
their input least (norm of the change over norm of the input, on 64 training images, before any training), and what DAS
chose, in five searches for each k and target. Each is trained anew three times and tested once each time. A search trains a
supernet and sees 300 validation images; one rate for all subsets of a target is chosen on those by a seed that is not
measured. A subset's percentile is the share of the other subsets of its size (all, or the 20) whose mean test accuracy is
lower, ties counting half. Then two blocks whose output projections are zero are put into the ViT, at places drawn anew for
each of ten seeds, and a search for two layers on the ViT's own task should name them. Sizing the experiment showed that six of
its eight blocks are hardly missed either, so the same is done with a ViT of two blocks.

Stated before running, each to be reported as holding or not:
  1. For each k and target the mean percentile of DAS is over 50.
  2. Its mean over all is at least 75.
  3. Skipping one or two layers by DAS costs at most 1 point against skipping none.
  4. It is at least as good as skipping the last k, on the mean over k.
  5. It is at least as good as skipping the k layers of the smallest change, on the mean over k.
  6. For each k the operations of the compiled model fall by k/8 of those of the blocks, to within a tenth of that.
  7. Accuracy falls as k grows: the mean over the subsets that were not searched for, from each k to the next.
  8. The blocks planted among eight are both found in at least 9 of 10 seeds.
  9. So are those planted among two.

Small about it: the model, the targets, 120 updates; a search has 120 rounds of three subsets, so its bandit takes steps of 5
where the paper's, with many more rounds, takes steps of 1, and a round follows every training step instead of every tenth.
Masked subsets train as pruned models do (the adapters that do nothing get no gradient), in one program for all of them.
"""

import dataclasses
import itertools
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

from jaxpeft import Adapted, adapt, chain, das, head, train, trees
from jaxpeft.adapt.das import supernet, with_mask
from jaxpeft.models.layers import Block
from jaxpeft.models.vit import VisionEmbeddings
from jaxpeft.tune.bandit import bandit, sample_subset

HELD_OUT = (2, 4, 6)
CLASSES = 10  # of the head, for both targets: they share programs
TUNING_SEED = 1000

Skipped = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    base: bases.Vit = dataclasses.field(
        default_factory=lambda: bases.Vit(
            layers=8, size=24, patch=8, classes=tuple(c for c in range(10) if c not in HELD_OUT), steps=1500
        )
    )
    rank: int = 12
    skip_rank: int = 24
    sizes: tuple[int, ...] = (1, 2, 3, 4)
    enumerated: int = 2  # up to this k all subsets
    drawn: int = 20  # of larger ones
    examples: int = 600
    held: int = 300  # of validation
    tested: int = 897
    steps: int = 120
    batch: int = 16
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    tuned_on: int = 5  # subsets, none among them
    seeds: int = 3
    together: int = 4  # runs in a call
    searches: int = 5
    warmup: int = 50  # steps of a search before its first round
    rounds: int = 120
    turn: int = 1  # steps between rounds
    subsets: int = 3  # of a round
    judged: int = 48  # validation images of a round
    bandit_rate: float = 5.0
    planted: int = 2
    plantings: int = 10
    found: int = 9  # of the plantings, so many at least
    shallow: int = 2  # blocks of the other ViT that is planted into
    planting_rate: float = 1e-3


SMOKE = Setup(
    dataclasses.replace(bases.SMALL_VIT, layers=3, size=16, patch=8, classes=Setup().base.classes),
    rank=2,
    skip_rank=4,
    sizes=(1, 2),
    enumerated=1,
    drawn=2,
    examples=16,
    held=12,
    tested=12,
    steps=2,
    batch=8,
    rates=(3e-3,),
    tuned_on=2,
    seeds=2,
    searches=2,
    warmup=1,
    rounds=2,
    turn=1,
    subsets=2,
    judged=8,
    plantings=2,
    found=2,
)


# ------------------------------------------------------------------------------------------------------ data and model


def targets(s: Setup) -> dict[str, dict[str, Any]]:
    """Target -> split -> examples. Validation and test are filled up to one length with rows of weight 0."""
    out = {}
    for name in ("digits", "fashion-mnist"):
        parts = bases.images(name, s.base.size, examples=0 if name == "digits" else 10 * (s.examples + s.tested))
        if name == "digits":
            every = [np.concatenate(x) for x in zip(*parts.values())]
            order = np.random.default_rng(0).permutation(len(every[1]))
            cut = np.split(order, np.cumsum([s.examples, s.held, s.tested]))
            parts = {k: (every[0][rows], every[1][rows]) for k, rows in zip(parts, cut)}
        else:
            parts = {k: bases.of_classes(p, HELD_OUT) for k, p in parts.items()}
        sizes = {"train": s.examples, "validation": s.held, "test": s.tested}
        cut = {k: study.images_of(x[: sizes[k]], y[: sizes[k]]) for k, (x, y) in parts.items()}
        assert {k: len(e.label) for k, e in cut.items()} == sizes, f"{name} has too few examples"
        longest = max(s.held, s.tested)
        fill = lambda x: jnp.pad(x, [(0, longest - len(x))] + [(0, 0)] * (x.ndim - 1))
        out[name] = {k: e if k == "train" else jax.tree.map(fill, e) for k, e in cut.items()}
    return out


def changes(model: Any, params: Any, images: Any) -> list[float]:
    """How much each block changes its input: the mean over positions of the change's norm over the input's."""
    seen = lambda module, _: isinstance(module, (Block, VisionEmbeddings))

    @jax.jit
    def run(params: Any, images: Any) -> Any:
        _, kept = model.apply(params, images, capture_intermediates=seen, mutable=["intermediates"])
        inner = kept["intermediates"]["backbone"]
        n = model.config.layers
        states = [inner["embeddings"]["__call__"][0], *(inner[f"layers_{i}"]["__call__"][0] for i in range(n))]
        norm = lambda x: jnp.linalg.norm(x, axis=-1)
        return jnp.stack([(norm(b - a) / norm(a)).mean() for a, b in itertools.pairwise(states)])

    return np.asarray(run(params, images)).tolist()


def with_planted(params: Any, places: Sequence[int], layers: int) -> Any:
    """The parameters of a model with redundant blocks at these places: copies of the next block with outputs of zero."""
    backbone = params["params"]["backbone"]
    new = {k: v for k, v in backbone.items() if not k.startswith("layers_")}
    at = 0
    for i in range(layers + len(places)):
        block = backbone[f"layers_{min(at, layers - 1)}"]
        if i in places:
            silent = {p: jnp.zeros_like(x) for p, x in trees.by_path(block).items() if "/out/" in p or "/down/" in p}
            assert len(silent) == 4, sorted(silent)
            block = trees.replace_leaves(block, silent)
        else:
            at += 1
        new[f"layers_{i}"] = block
    return {"params": {**params["params"], "backbone": new}}


# ------------------------------------------------------------------------------------------- training subsets, searching


def mask_of(skipped: Skipped, n: int) -> np.ndarray:
    return np.isin(np.arange(n), skipped)


def subset_runner(adapted: Adapted, s: Setup) -> Callable[..., Any]:
    """`(params, masks (R, n), rates (R,), seeds (R,), examples, rows (R, steps, b), held) -> (accuracies, bad) (R,)`:
    R runs together, each with its layers skipped, from the start to its accuracy on the held-out examples."""
    task, make = train.image_classification(), study.adam(0.06)

    def one(params: Any, mask: Any, rate: Any, seed: Any, examples: Any, rows: Any, held: Any) -> Any:
        delta = adapted.init(jax.random.key(seed), params, examples.image[:1])
        delta = {**delta, "das": with_mask(delta["das"], mask)}
        optimiser = optax.inject_hyperparams(lambda rate: make(rate, s.steps))
        step = train.make_step(adapted, task, optimiser(1.0))

        def update(state: Any, rows: Any) -> Any:
            return step(state, params, jax.tree.map(lambda x: x[rows], examples))[0], None

        state, _ = jax.lax.scan(update, train.create(delta, optimiser(rate), seed), rows)
        size = min(128, len(held.label))
        cut = lambda x: jnp.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])
        hits = lambda b: jnp.sum((adapted.apply(params, state.delta, b.image).argmax(-1) == b.label) * b.weight)
        return jax.lax.map(hits, jax.tree.map(cut, held)).sum() / held.weight.sum(), state.first_bad

    return jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0, None, 0, None)))


def accuracies(
    run: Callable[..., Any],
    params: Any,
    wanted: Sequence[tuple[Skipped, float, int]],
    examples: Any,
    split: str,
    s: Setup,
) -> list[float]:
    """The accuracy of each (skipped layers, rate, seed), `s.together` in a call. One that diverged has 0."""
    out: list[float] = []
    n = len(examples["train"].label)
    for start in range(0, len(wanted), s.together):
        part = list(wanted[start : start + s.together])
        part += part[-1:] * (s.together - len(part))
        masks = np.stack([mask_of(skipped, s.base.layers) for skipped, _, _ in part])
        rows = np.stack([study.rows_of(n, s.steps, s.batch, seed) for _, _, seed in part])
        rates, seeds = np.array([r for _, r, _ in part], np.float32), np.array([i for _, _, i in part], np.uint32)
        found, bad = run(params, masks, rates, seeds, examples["train"], rows, examples[split])
        out += np.where(np.asarray(bad) < 0, found, 0.0).tolist()
    return out[: len(wanted)]


def searcher(adapted: Adapted, n: int, k: int, s: Setup) -> Callable[..., Any]:
    """`jaxpeft.adapt.das.search` as one program: `(params, rate, seed, examples, rows, validation, rows) -> preferences`.

    The rows are (warmup + rounds turn, b) of training and (rounds, judged) of validation.
    """
    task, options = train.image_classification(), bandit(n, k, subsets=s.subsets, rate=s.bandit_rate)

    @jax.jit
    def run(params: Any, rate: Any, seed: Any, examples: Any, rows: Any, validation: Any, judged: Any) -> Any:
        start, draws = jax.random.split(jax.random.key(seed))
        learned, fixed = trees.learned(adapted.init(start, params, examples.image[:1]))
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

        def loss(learned: Any, mask: Any, batch: Any) -> Any:
            delta = trees.combine(learned, fixed)
            delta = {**delta, "das": with_mask(delta["das"], mask)}
            return task.loss(adapted.apply(params, delta, batch.image), batch).mean()

        def fit(carry: Any, at: Any) -> Any:
            learned, state, preferences = carry
            i, rows = at
            mask = sample_subset(jax.random.split(jax.random.fold_in(draws, i))[0], preferences, k)
            grads = jax.grad(loss)(learned, mask, jax.tree.map(lambda x: x[rows], examples))
            updates, state = optimiser.update(grads, state)
            return (optax.apply_updates(learned, updates), state, preferences), None

        def one_round(carry: Any, at: Any) -> Any:
            (learned, state, found), (i, rows, judged) = carry, at
            (learned, state, _), _ = jax.lax.scan(fit, (learned, state, found.preferences), (i, rows))
            batch = jax.tree.map(lambda x: x[judged], validation)
            masks, found = options.ask(found, jax.random.fold_in(jax.random.fold_in(draws, i[-1]), 1))
            losses = jax.lax.map(lambda mask: loss(learned, mask, batch), masks)
            return (learned, state, options.tell(found, masks, losses)), None

        steps, first = jnp.arange(rows.shape[0]), s.warmup
        found = options.init()
        carry = learned, optimiser.init(learned), found.preferences
        (learned, state, _), _ = jax.lax.scan(fit, carry, (steps[:first], rows[:first]))
        turns = lambda x: x[first:].reshape(s.rounds, s.turn, *x.shape[1:])
        (_, _, found), _ = jax.lax.scan(one_round, (learned, state, found), (turns(steps), turns(rows), judged))
        return found.preferences

    return run


def searched(run: Callable[..., Any], params: Any, rate: float, seed: int, examples: Any, s: Setup) -> np.ndarray:
    """The preferences after one search."""
    rows = study.rows_of(s.examples, s.warmup + s.rounds * s.turn, s.batch, seed)
    judged = study.rows_of(s.held, s.rounds, s.judged, seed + 1)
    return np.asarray(run(params, rate, seed, examples["train"], rows, examples["validation"], judged))


def first_of(preferences: np.ndarray, k: int) -> Skipped:
    """The k largest, in the order of the layers."""
    return tuple(sorted(np.argsort(-preferences, kind="stable")[:k].tolist()))


# -------------------------------------------------------------------------------------------------------------- costs


def flops(apply: Callable[..., Any], *inputs: Any) -> float:
    """Operations of the compiled program, by its own count."""
    program = jax.jit(apply).lower(*inputs)
    # On a GPU products become calls of a library, which the count of a compiled program passes over.
    found = (program.compile() if jax.default_backend() == "cpu" else program).cost_analysis()
    assert found is not None
    return found["flops"]


def operations(model: Any, params: Any, chosen: dict[int, Skipped], s: Setup) -> dict[str, Any]:
    """Operations and trained numbers of the pruned models for 32 images, and what the blocks alone take."""
    images = jax.ShapeDtypeStruct((32, s.base.size, s.base.size, 1), jnp.float32)

    def base(layers: int) -> float:
        made = bases.vit_model(dataclasses.replace(s.base, layers=layers), CLASSES)
        return flops(made.apply, jax.eval_shape(made.init, jax.random.key(0), images), images)

    out: dict[str, Any] = {"blocks": (base(s.base.layers) - base(s.base.layers - 1)) * s.base.layers}
    for k, skipped in {0: (), **chosen}.items():
        adapted = adapt(model.apply, chain(das(skipped, rank=s.rank, skip_rank=s.skip_rank), head()))
        delta = jax.eval_shape(adapted.init, jax.random.key(0), params, images)
        out[str(k)] = {
            "flops": flops(adapted.apply, params, delta, images),
            "trained": trees.count(trees.learned(delta)[0]),
            "skipped": skipped,
        }
    for k in chosen:
        fell = out["0"]["flops"] - out[str(k)]["flops"]
        out[str(k)]["fell_by_share_of_expected"] = fell / (k / s.base.layers * out["blocks"])
    return out


# ---------------------------------------------------------------------------------------------------------- one target


def percentile(value: float, others: Sequence[float]) -> float:
    """How many in a hundred of the others are lower; ties count half."""
    return 100 * statistics.mean([(value > x) + 0.5 * (value == x) for x in others])


def measured(name: str, examples: Any, model: Any, params: Any, tools: Any, s: Setup) -> dict[str, Any]:
    """All of one target: the rate, the searches, the accuracy of every subset."""
    run, searches = tools
    n, began = s.base.layers, time.perf_counter()
    rng = np.random.default_rng(0)
    pool: dict[int, list[Skipped]] = {}
    for k in s.sizes:
        every = list(itertools.combinations(range(n), k))
        drawn = every if k <= s.enumerated else [every[i] for i in rng.permutation(len(every))[: s.drawn]]
        pool[k] = sorted(drawn)
    flat = [skipped for subsets in pool.values() for skipped in subsets]
    tuned = [(), *(flat[i] for i in rng.permutation(len(flat))[: s.tuned_on - 1])]
    tries = [(skipped, rate, TUNING_SEED) for rate in s.rates for skipped in tuned]
    scores = np.reshape(accuracies(run, params, tries, examples, "validation", s), (len(s.rates), -1)).mean(1)
    rate = s.rates[int(scores.argmax())]
    print(f"-- {name}: rate {rate:g}, validation {100 * scores.max():.1f}", flush=True)

    change = changes(model, params, examples["train"].image[:64])
    preferences = {
        k: [searched(searches[k], params, rate, seed, examples, s).tolist() for seed in range(s.searches)]
        for k in s.sizes
    }
    chosen = {k: [first_of(np.array(r), k) for r in each] for k, each in preferences.items()}
    fixed = {
        "skip last": {k: tuple(range(n - k, n)) for k in s.sizes},
        "smallest change": {k: first_of(-np.array(change), k) for k in s.sizes},
    }
    extra = [x for each in chosen.values() for x in each] + [x for each in fixed.values() for x in each.values()]
    wanted = list(dict.fromkeys([(), *flat, *extra]))
    runs = [(skipped, rate, seed) for skipped in wanted for seed in range(s.seeds)]
    found = np.reshape(accuracies(run, params, runs, examples, "test", s), (len(wanted), s.seeds))
    by = {skipped: row.tolist() for skipped, row in zip(wanted, found)}
    mean = lambda subsets: np.mean([by[x] for x in subsets], axis=0).tolist()  # over subsets, one a seed

    tests, percentiles = {"no skipping": by[()]}, {}
    for k in s.sizes:
        tests |= {f"DAS {k}": mean(chosen[k]), f"random {k}": mean(pool[k])}
        tests |= {f"{rule} {k}": by[each[k]] for rule, each in fixed.items()}
        level = lambda x, k=k: percentile(statistics.mean(by[x]), [statistics.mean(by[y]) for y in pool[k] if y != x])
        percentiles[k] = [level(x) for x in chosen[k]]
        spread = [statistics.mean(by[x]) for x in pool[k]]
        print(
            f"k = {k}: DAS {100 * np.mean(tests[f'DAS {k}']):.2f} (percentile {np.mean(percentiles[k]):.0f} ± "
            f"{np.std(percentiles[k]):.0f}), subsets {100 * min(spread):.2f} to {100 * max(spread):.2f}, median "
            f"{100 * np.median(spread):.2f}, last {100 * np.mean(tests[f'skip last {k}']):.2f}, smallest change "
            f"{100 * np.mean(tests[f'smallest change {k}']):.2f}, none {100 * np.mean(by[()]):.2f}; {chosen[k]}",
            flush=True,
        )
    name_of = lambda skipped: ",".join(map(str, skipped)) or "none"
    return {
        "rate": rate,
        "validation_by_rate": dict(zip(map(str, s.rates), scores.tolist())),
        "tests": tests,
        "percentiles": percentiles,
        "chosen": chosen,
        "preferences": preferences,
        "change": change,
        "pools": {k: [name_of(x) for x in subsets] for k, subsets in pool.items()},
        "test_by_subset": {name_of(x): row for x, row in by.items()},
        "seconds": time.perf_counter() - began,
    }


def own_task(s: Setup) -> dict[str, Any]:
    """Examples of the classes that the base was trained on."""
    few = s.base.examples or 10 * (s.examples + s.held)
    parts = bases.images("fashion-mnist", s.base.size, examples=few)
    sizes = {"train": s.examples, "validation": s.held}
    known = {k: bases.of_classes(parts[k], s.base.classes) for k in sizes}
    return {k: study.images_of(x[: sizes[k]], y[: sizes[k]]) for k, (x, y) in known.items()}


def planted(layers: int, examples: Any, s: Setup, keep: bool) -> dict[str, Any]:
    """Of a base of so many blocks on its own task: its loss without each of them, untrained; and of each seed, where the
    redundant blocks are and where the search says they are."""
    model, params, _ = bases.fashion_vit(dataclasses.replace(s.base, layers=layers), keep)
    adapted = adapt(model.apply, chain(supernet(s.rank, s.skip_rank), head()))
    held, task = examples["validation"], train.image_classification()

    @jax.jit
    def losses(params: Any) -> Any:
        delta = adapted.init(jax.random.key(0), params, held.image[:1])
        one = lambda mask: adapted.apply(params, {**delta, "das": with_mask(delta["das"], mask)}, held.image)
        masks = jnp.concatenate([jnp.zeros((1, layers), bool), jnp.eye(layers, dtype=bool)])
        return jax.lax.map(lambda mask: task.loss(one(mask), held).mean(), masks)

    whole, *without = np.asarray(losses(params)).tolist()
    n = layers + s.planted
    deeper = bases.vit_model(dataclasses.replace(s.base, layers=n), len(s.base.classes))
    run = searcher(adapt(deeper.apply, chain(supernet(s.rank, s.skip_rank), head())), n, s.planted, s)
    seeds = []
    for seed in range(s.plantings):
        places = tuple(sorted(np.random.default_rng(100 + seed).permutation(n)[: s.planted].tolist()))
        found = searched(run, with_planted(params, places, layers), s.planting_rate, 200 + seed, examples, s)
        seeds.append({"places": places, "found": first_of(found, s.planted), "preferences": found.tolist()})
    hits = sum(x["places"] == x["found"] for x in seeds)
    chance = 1 / len(list(itertools.combinations(range(n), s.planted)))
    print(
        f"planted into {layers} blocks: both found in {hits} of {len(seeds)} seeds (by chance {chance:.0%})", flush=True
    )
    print(f"loss {whole:.4f}, without each block {', '.join(f'{x:.4f}' for x in without)}", flush=True)
    return {"loss": whole, "loss_without_block": without, "seeds": seeds, "hits": hits, "by_chance": chance}


def figure(by_target: dict[str, Any], s: Setup) -> Callable[[Any], None]:
    """Test accuracy over k: every subset a dot, DAS and the rules as lines."""

    def draw(axes: Any) -> None:
        for i, (name, t) in enumerate(by_target.items()):
            for k in s.sizes:
                y = [100 * statistics.mean(t["test_by_subset"][x]) for x in t["pools"][k]]
                axes.plot([k + 0.12 * i] * len(y), y, ".", color=f"C{i}", alpha=0.3)
            for rule, style in (("DAS", "o-"), ("random", "k:"), ("skip last", "v--"), ("smallest change", "^--")):
                y = [100 * statistics.mean(t["tests"][f"{rule} {k}"]) for k in s.sizes]
                color = {} if rule == "random" else {"color": f"C{i}"}
                axes.plot([k + 0.12 * i for k in s.sizes], y, style, label=f"{name}, {rule}", **color)
        axes.set(xlabel="layers skipped, of 8", ylabel="test accuracy, %", xticks=list(s.sizes))
        axes.legend(fontsize=7)

    return draw


def main() -> None:
    args = study.arguments("DAS in small; see the file's first lines.")
    s, began = SMOKE if args.smoke else Setup(), time.perf_counter()
    jax.config.update("jax_disable_most_optimizations", args.smoke)  # it is all compiling
    model, params, accuracy = bases.fashion_vit(s.base, keep=not args.smoke)
    print(f"Fashion-MNIST, {len(s.base.classes)} classes: validation accuracy {accuracy:.3f}", flush=True)
    model, params = bases.with_new_head(model, params, CLASSES)
    every = targets(s)
    adapted = adapt(model.apply, chain(supernet(s.rank, s.skip_rank), head()))
    tools = subset_runner(adapted, s), {k: searcher(adapted, s.base.layers, k, s) for k in s.sizes}
    done = {name: measured(name, examples, model, params, tools, s) for name, examples in every.items()}
    first = next(iter(done))
    cost = operations(model, params, {k: done[first]["chosen"][k][0] for k in s.sizes}, s)
    own = own_task(s)
    plants = {layers: planted(layers, own, s, not args.smoke) for layers in (s.base.layers, s.shallow)}

    rows = []
    for name in done[first]["tests"]:
        test = [statistics.mean(x) for x in zip(*(d["tests"][name] for d in done.values()))]
        k = 0 if name == "no skipping" else int(name.rpartition(" ")[2])
        rows.append(
            {
                "method": name,
                "trained": cost[str(k)]["trained"],
                "flops": cost[str(k)]["flops"],
                "rate": [d["rate"] for d in done.values()],
                "test": test,
                "mean": statistics.mean(test),
                "std": statistics.stdev(test),
                "details": {"by_target": {t: d["tests"][name] for t, d in done.items()}},
            }
        )
    by = {r["method"]: r for r in rows}

    def over_sizes(rule: str) -> dict[str, Any]:
        return {"test": [statistics.mean(x) for x in zip(*(by[f"{rule} {k}"]["test"] for k in s.sizes))]}

    levels = {(t, k): d["percentiles"][k] for t, d in done.items() for k in s.sizes}
    means = {at: statistics.mean(x) for at, x in levels.items()}
    small = [k for k in s.sizes if k <= 2]
    lost = {k: study.difference(by[f"DAS {k}"], by["no skipping"]) for k in small}
    random = [by["no skipping"]["mean"], *(by[f"random {k}"]["mean"] for k in s.sizes)]
    shares = {k: cost[str(k)]["fell_by_share_of_expected"] for k in s.sizes}
    claims = [
        record.claim(
            "For each k and target the mean percentile of DAS is over 50",
            all(m > 50 for m in means.values()),
            "; ".join(f"{t}, k = {k}: {means[t, k]:.0f} ± {statistics.stdev(x):.0f}" for (t, k), x in levels.items()),
        ),
        record.claim(
            "The mean percentile over k and targets is at least 75",
            statistics.mean(means.values()) >= 75,
            f"{statistics.mean(means.values()):.0f}, standard deviation over searches "
            f"{statistics.stdev([statistics.mean(x) for x in zip(*levels.values())]):.0f}",
        ),
        record.claim(
            "Skipping one or two layers by DAS costs at most 1 point",
            all(m >= -1 for m, _ in lost.values()),
            "; ".join(f"k = {k}: {m:+.2f} ± {h:.2f} points" for k, (m, h) in lost.items()),
        ),
        study.at_least("DAS is at least as good as skipping the last k", over_sizes("DAS"), over_sizes("skip last")),
        study.at_least(
            "DAS is at least as good as skipping the layers of the smallest change",
            over_sizes("DAS"),
            over_sizes("smallest change"),
        ),
        record.claim(
            "Operations fall by k/8 of those of the blocks, to within a tenth",
            all(abs(x - 1) <= 0.1 for x in shares.values()),
            "; ".join(
                f"k = {k}: {cost['0']['flops'] / 1e6:.1f} to {cost[str(k)]['flops'] / 1e6:.1f} million for 32 images, "
                f"{x:.3f} of the expected fall"
                for k, x in shares.items()
            ),
        ),
        record.claim(
            "Accuracy falls as k grows, on the mean over subsets",
            all(b < a for a, b in itertools.pairwise(random)),
            ", ".join(f"{100 * x:.2f}" for x in random) + " for k = " + ", ".join(map(str, (0, *s.sizes))),
        ),
    ]
    claims += [
        record.claim(
            f"Planted among {layers} blocks, both redundant ones are found in at least {s.found} of {s.plantings} seeds",
            found["hits"] >= s.found,
            f"{found['hits']} of {s.plantings}, by chance {found['by_chance']:.0%} of them; the loss is "
            f"{found['loss']:.3f}, without each of the other blocks {min(found['loss_without_block']):.3f} to "
            f"{max(found['loss_without_block']):.3f}",
        )
        for layers, found in plants.items()
    ]
    study.finish(
        "das",
        args,
        paper="DAS, Wu et al., NeurIPS 2023",
        setup=s,
        rows=rows,
        claims=claims,
        began=began,
        figure=figure(done, s),
        base_validation_accuracy=accuracy,
        by_target=done,
        cost=cost,
        planted=plants,
    )


if __name__ == "__main__":
    main()
