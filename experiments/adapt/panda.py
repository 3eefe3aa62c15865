"""PANDA (Zhong et al., IEEE TKDE 2024) in small: prompts of other tasks, as a start or as teachers.

    python experiments/adapt/panda.py            all of it: about half an hour on two cores
    python experiments/adapt/panda.py --smoke    every part once in small; writes nothing unless --out is given

A ViT (4 layers, width 64) is trained once on Fashion-MNIST, kept in the cache, and frozen. A prompt is a prefix: eight keys
and values in every layer, with a linear head; heads have ten outputs, of which a task uses its own. Eight sources: MNIST's
digits by class, by parity, by under five, by whether they have a loop; Fashion-MNIST by class, its tops, its shoes, and by
which of four quarter turns a picture has. Three targets, 120 training examples each: scikit-learn's digits (other pictures,
8 x 8) by class, by parity, and by quarter turns.

    PT               prompt and head from nothing; what all others are held against
    PoT              the prompt from a source's; also the teacher of the next ones
    PANDA            from PT's start, with w = λ sim(source, target)
    PANDA, constant  from PT's start, with w = λ
    PoT + KD         from PoT's start, with w = λ sim

sim is the cosine of the tasks' embeddings (outputs averaged over tokens, prompted minus unprompted, on training examples),
cut at zero. PT and PoT have one rate each out of four by the validation split under a seed that is not measured; PANDA takes
PT's, PoT + KD takes PoT's; each of the three has one λ out of four, by the first target's validation split alone. Then five
seeds of source prompts, starts, training examples and their order, for each of which the test split is looked at once. What
is compared is the mean over all 24 pairs.

Stated before running, each to be reported as holding or not, by the mean of the paired differences over seeds:
  1. PANDA is better than PoT.
  2. PANDA is at least as good as PT.
  3. PoT's worst source costs something against PT, in the mean over targets and seeds, and PANDA's worst at most half of it.
  4. sim ranks the sources of a target by PoT's validation accuracy after the first epoch better than the cosine of the averaged
     prompts does: a higher Spearman correlation in the mean over targets.
  5. PANDA with w = λ sim is at least as good as with a constant weight.
The overlap of activated units is reported beside the two measures. Departures: an image model; prefixes start as the library's
do, N(0, 0.02²); no dropout; KD is the mean square (`norm="mean"`), so λ is not the reference's; the last step is kept, not the
best epoch; 200 updates.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import bases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import study
from scipy import stats

from jaxpeft import adapt, chain, head, prefix_tuning, train, trees
from jaxpeft.adapt.panda import (
    overlap,
    panda_loss,
    prompt_similarity,
    task_embedding,
    transfer_init,
    transferability,
)
from jaxpeft.models.vit import VisionTransformer
from jaxpeft.train.step import cross_entropy

WIDEST = 10  # outputs of every head
NEVER = -1e9
STUDENTS = ("PANDA", "PANDA, constant", "PoT + KD")


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    base: bases.Vit = dataclasses.field(default_factory=lambda: bases.Vit(layers=4, width=64, heads=4, steps=1500))
    length: int = 8
    source_examples: int = 2000
    source_steps: int = 800
    source_batch: int = 32
    source_rate: float = 1e-2
    target_examples: int = 120
    steps: int = 200
    batch: int = 16
    rates: tuple[float, ...] = (1e-2, 3e-2, 1e-1, 3e-1)
    weights: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    seeds: int = 5
    limit: int = 0  # of validation and test examples


SMOKE = Setup(
    dataclasses.replace(bases.SMALL_VIT, examples=60), 2, 24, 2, 8, 1e-2, 16, 3, 8, (1e-2,), (0.1,), 2, limit=16
)


# ------------------------------------------------------------------------------------------------------------ the tasks


class Task(NamedTuple):
    """Images and labels by split, and how many classes there are."""

    name: str
    splits: dict[str, Any]
    classes: int


def turned(part: Any) -> Any:
    """Each image by a random number of quarter turns, and that number."""
    x, y = part
    turns = np.random.default_rng(0).integers(0, 4, len(y))
    return np.stack([np.rot90(i, k) for i, k in zip(x, turns)]), turns


def asked(splits: Any, question: Callable[[Any], Any]) -> Any:
    return {k: (x, np.asarray(question(np.asarray(y)))) for k, (x, y) in splits.items()}


def source_tasks(s: Setup) -> list[Task]:
    most = s.source_examples
    mnist = bases.images("mnist-5k", s.base.size)
    fashion = bases.images("fashion-mnist", s.base.size, examples=6 * most)
    groups = {"tops": (0, 2, 4, 6), "shoes": (5, 7, 9)}
    return [
        Task("MNIST class", mnist, 10),
        Task("MNIST parity", asked(mnist, lambda y: y % 2), 2),
        Task("MNIST under five", asked(mnist, lambda y: y < 5), 2),
        Task("MNIST loop", asked(mnist, lambda y: np.isin(y, (0, 6, 8, 9))), 2),
        Task("clothes class", fashion, 10),
        *(Task(n, {k: bases.of_classes(p, c) for k, p in fashion.items()}, len(c)) for n, c in groups.items()),
        Task("clothes turn", {k: turned(p) for k, p in fashion.items()}, 4),
    ]


def target_tasks(s: Setup) -> list[Task]:
    digits = bases.images("digits", s.base.size)
    return [
        Task("digits class", digits, 10),
        Task("digits parity", asked(digits, lambda y: y % 2), 2),
        Task("digits turn", {k: turned(p) for k, p in digits.items()}, 4),
    ]


class Lessons(NamedTuple):
    """Examples, and what a teacher says of them: `pull` is w, and all are (n, ...), or (slots, n, ...) where stacked."""

    image: Any
    label: Any
    weight: Any
    classes: Any
    teacher: Any
    pull: Any


def lessons(part: Any, classes: int, count: int, seed: int) -> Lessons:
    """`count` examples, drawn by the seed, without a teacher."""
    x, y = part
    rows = np.random.default_rng(seed).permutation(len(y))[: count or len(y)]
    n = len(rows)
    image, label = x[rows].astype(np.float32), y[rows].astype(np.int32)
    zeros = np.zeros((n, WIDEST), np.float32)
    return Lessons(image, label, np.ones(n, np.float32), np.full(n, classes, np.int32), zeros, zeros[:, 0])


def stacked(tasks: list[Task], split: str, count: int, seed: int = 0) -> Lessons:
    """The tasks' lessons on a leading axis; equally many of each."""
    count = min(count or len(tasks[0].splits[split][1]), *(len(t.splits[split][1]) for t in tasks))
    return jax.tree.map(lambda *x: jnp.stack(x), *(lessons(t.splits[split], t.classes, count, seed) for t in tasks))


# --------------------------------------------------------------------------------------------------------- the programs


def own(logits: Any, classes: Any, other: float) -> Any:
    return jnp.where(jnp.arange(WIDEST) < classes[..., None], logits, other)


def loss(logits: Any, batch: Lessons) -> Any:
    """PANDA's, of the task's own classes: their mean square is that of all outputs, scaled."""
    plain = cross_entropy(own(logits, batch.classes, NEVER), batch.label)
    taught = own(logits, batch.classes, 0.0), own(batch.teacher, batch.classes, 0.0)
    return panda_loss(plain, *taught, batch.pull * WIDEST / batch.classes)


class Programs:
    """What is compiled; all but `fresh` take their deltas, lessons and rates stacked, a slot for each run."""

    def __init__(self, s: Setup, model: Any, params: Any):
        prefix = prefix_tuning(s.length, 0)
        adapted = adapt(model.apply, chain(prefix, head()))
        self.params, self.adapted, self.s = params, adapted, s
        reader = _Hidden(model.config)
        prompted = adapt(reader.apply, prefix)
        taught = train.Task(lambda apply, batch, key: apply(batch.image), loss)

        @jax.jit
        def fresh(params: Any, key: Any) -> Any:
            delta = adapted.init(key, params, jnp.zeros((1, s.base.size, s.base.size, 1)))
            draw = lambda x: 0.02 * jax.random.normal(jax.random.fold_in(key, 1), x.shape) if x.ndim > 1 else 0 * x
            return {**delta, "head": jax.tree.map(draw, delta["head"])}

        def fit(steps: int) -> Any:
            make = study.adam(0.0)  # a warm-up would outlast the first epoch, which is looked at
            optimiser = optax.inject_hyperparams(lambda rate: make(rate, steps))
            step = train.make_step(adapted, taught, optimiser(1.0))

            def one_run(params: Any, delta: Any, rate: Any, examples: Any, rows: Any, epoch: Any) -> Any:
                def update(carry: Any, now: Any) -> Any:
                    state, early = carry
                    i, rows = now
                    state, numbers = step(state, params, jax.tree.map(lambda x: x[rows], examples))
                    early = jax.tree.map(lambda a, b: jnp.where(i < epoch, a, b), state.delta, early)
                    return (state, early), numbers["loss"]

                start = (train.create(delta, optimiser(rate)), delta)
                (state, early), losses = jax.lax.scan(update, start, (jnp.arange(steps), rows))
                return state.delta, early, state.first_bad, losses[-max(1, steps // 10) :].mean()

            return jax.jit(jax.vmap(one_run, (None, 0, 0, 0, None, None)))

        def logits_of(params: Any, delta: Any, image: Any) -> Any:
            return adapted.apply(params, delta, image)

        @jax.jit
        def teach(params: Any, deltas: Any, image: Any) -> Any:
            return jax.lax.map(lambda d: logits_of(params, *d), (deltas, image))

        @jax.jit
        def score(params: Any, deltas: Any, examples: Any, which: Any) -> Any:
            def one(x: Any) -> Any:
                delta, task = x
                mine = jax.tree.map(lambda e: e[task], examples)
                found = own(logits_of(params, delta, mine.image), mine.classes, NEVER).argmax(-1)
                return jnp.mean(found == mine.label)

            return jax.lax.map(one, (deltas, which))

        @jax.jit
        def outputs(params: Any, prefixes: Any, image: Any) -> Any:
            """(slots, n, d) averages over tokens with and without the prompt; (slots, L, u) units active at the first
            token of most examples."""

            def one(x: Any) -> Any:
                seen = []

                def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
                    y = call(*args, **kwargs)
                    if context.module.name == "up" and context.method_name == "__call__":
                        seen.append(jnp.mean(y[:, 0] > 0, axis=0) > 0.5)
                    return y

                delta, image = x
                plain: Any = reader.apply(params, image)
                with nn.intercept_methods(watch):
                    mine = prompted.apply(params, delta, image).mean(1)
                return mine, plain.mean(1), jnp.stack(seen)

            return jax.lax.map(one, (prefixes, image))

        self.fresh, self.teach, self.score, self.outputs = fresh, teach, score, outputs
        self.fit_source, self.fit = fit(s.source_steps), fit(s.steps)


class _Hidden(nn.Module):
    """The classifier's hidden states, by the classifier's names."""

    config: Any

    @nn.compact
    def __call__(self, pixels: Any) -> Any:
        return VisionTransformer(self.config, name="backbone")(pixels)


def repeated(tree: Any, n: int) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), tree)


def joined(*parts: Any) -> Any:
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def at(tree: Any, rows: Any) -> Any:
    return jax.tree.map(lambda x: x[rows], tree)


# --------------------------------------------------------------------------------------------------------------- a seed


class Seed:
    """One seed's source prompts and stages; slots of pairs are numbered target by target."""

    def __init__(self, p: Programs, sources: list[Task], targets: list[Task], held: dict[str, Lessons], seed: int):
        s = p.s
        self.p, self.seed, self.held, self.S, self.T = p, seed, held, len(sources), len(targets)
        self.key = jax.random.key(seed)
        self.examples = stacked(targets, "train", s.target_examples, seed)
        self.n = self.examples.label.shape[1]
        self.start = p.fresh(p.params, self.key)
        studied = stacked(sources, "train", s.source_examples, seed)
        rows = study.rows_of(studied.label.shape[1], s.source_steps, s.source_batch, seed)
        begin = repeated(p.fresh(p.params, jax.random.fold_in(self.key, 7)), self.S)
        rate = jnp.full(self.S, s.source_rate)
        self.sources, _, bad, self.source_loss = p.fit_source(p.params, begin, rate, studied, rows, 0)
        assert bool((bad < 0).all()), "a source prompt diverged"
        few = min(200, studied.label.shape[1])
        self.studied = jax.tree.map(lambda x: x[:, :few], studied)
        self.pairs = np.repeat(np.arange(self.T), self.S)

    def _fitted(self, deltas: Any, rates: Any, examples: Lessons) -> tuple[Any, Any, np.ndarray]:
        s = self.p.s
        rows = study.rows_of(self.n, s.steps, min(s.batch, self.n), self.seed)
        epoch = -(-self.n // s.batch)
        delta, early, bad, _ = self.p.fit(self.p.params, deltas, jnp.asarray(rates), examples, rows, epoch)
        return delta, early, np.asarray(bad) < 0

    def scored(self, deltas: Any, good: np.ndarray, which: np.ndarray, split: str) -> np.ndarray:
        found = self.p.score(self.p.params, deltas, self.held[split], jnp.asarray(which))
        return np.where(good, np.asarray(found), 0.0)

    def first_stage(self, pot: float, pt: float) -> None:
        """PoT of all pairs and PT of all targets."""
        pairs, T = self.T * self.S, self.T
        moved = transfer_init(at(self.sources, np.tile(np.arange(self.S), T)), repeated(self.start, pairs))
        self.which = np.concatenate([self.pairs, np.arange(T)])
        rates = np.r_[np.full(pairs, pot), np.full(T, pt)].astype(np.float32)
        examples = at(self.examples, self.which)
        self.begun, self.rates = moved, (pot, pt)
        self.first, self.early, self.good = self._fitted(joined(moved, repeated(self.start, T)), rates, examples)

    def split_first(self, values: np.ndarray) -> dict[str, np.ndarray]:
        pairs = self.T * self.S
        return {"PoT": values[:pairs].reshape(self.T, self.S), "PT": values[pairs:]}

    def measures(self) -> dict[str, np.ndarray]:
        """(S, T) similarities of sources and targets."""
        p, pairs = self.p, self.T * self.S
        of = lambda delta: delta["prefix_tuning"]
        own = at(self.first, slice(pairs, None))
        found = []
        for deltas, examples in ((self.sources, self.studied), (own, self.examples)):
            prompted, plain, units = p.outputs(p.params, of(deltas), examples.image)
            e = [
                task_embedding(lambda _, f=f: f, [at(examples, i)], lambda _, g=g: g)
                for i, (f, g) in enumerate(zip(prompted, plain))
            ]
            leaves = jax.tree.leaves(of(deltas))  # (tasks, l, heads, width) each
            prompts = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in leaves], -1)
            found.append((jnp.stack(e), prompts, units))
        (e, a, u), (f, b, v) = found
        both = jax.vmap(lambda x: jax.vmap(lambda y: overlap(x, y))(v))(u)
        return {
            "sim": np.asarray(transferability(e, f, clip=False)),
            "averaged prompts": np.asarray(prompt_similarity(a, b)),
            "active units": np.asarray(both),
        }

    def second_stage(self, sim: np.ndarray, weights: dict[str, float], split: str) -> dict[str, np.ndarray]:
        """The students' scores, (T, S) each, with these λ."""
        pairs, (pot, pt) = self.T * self.S, self.rates
        like = np.maximum(sim, 0).T.reshape(-1)
        pull = np.concatenate([weights[n] * (like if n != "PANDA, constant" else np.ones(pairs)) for n in STUDENTS])
        own = at(self.examples, self.pairs)
        teacher = self.p.teach(self.p.params, at(self.first, slice(0, pairs)), own.image)
        own = repeated(own._replace(teacher=teacher), len(STUDENTS))
        own = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), own)
        own = own._replace(pull=jnp.repeat(jnp.asarray(pull, jnp.float32)[:, None], self.n, 1))
        begin = joined(repeated(self.start, 2 * pairs), self.begun)
        rates = np.r_[np.full(2 * pairs, pt), np.full(pairs, pot)].astype(np.float32)
        deltas, _, good = self._fitted(begin, rates, own)
        found = self.scored(deltas, good, np.tile(self.pairs, len(STUDENTS)), split)
        return dict(zip(STUDENTS, found.reshape(len(STUDENTS), self.T, self.S)))


def tuned(tuning: Seed, s: Setup) -> tuple[dict[str, float], dict[str, float], Any]:
    """Rates, weights, and what was tried, on validation examples."""
    tried: dict[str, dict[float, float]] = {"PT": {}, "PoT": {}, **{n: {} for n in STUDENTS}}
    for rate in s.rates:
        tuning.first_stage(rate, rate)
        scores = tuning.split_first(tuning.scored(tuning.first, tuning.good, tuning.which, "validation"))
        for name, found in scores.items():
            tried[name][rate] = float(found.mean())
    rates = {n: max(tried[n], key=tried[n].__getitem__) for n in ("PT", "PoT")}
    tuning.first_stage(rates["PoT"], rates["PT"])
    sim = tuning.measures()["sim"]
    for weight in s.weights:
        found = tuning.second_stage(sim, dict.fromkeys(STUDENTS, weight), "validation")
        for name in STUDENTS:
            tried[name][weight] = float(found[name][0].mean())
    return rates, {n: max(tried[n], key=tried[n].__getitem__) for n in STUDENTS}, tried


def main() -> None:
    args = study.arguments("PANDA in small; see the file's first lines.")
    s, began = SMOKE if args.smoke else Setup(), time.perf_counter()
    model, params, _ = bases.fashion_vit(s.base, keep=not args.smoke)
    model, params = bases.with_new_head(model, params, WIDEST)
    programs, sources, targets = Programs(s, model, params), source_tasks(s), target_tasks(s)
    held = {k: stacked(targets, k, s.limit) for k in ("validation", "test")}
    rates, weights, tried = tuned(Seed(programs, sources, targets, held, 1000), s)
    print(f"rates {rates}, weights {weights}, {time.perf_counter() - began:.0f} s", flush=True)

    scores: dict[str, list[np.ndarray]] = {n: [] for n in ("PT", "PoT", *STUDENTS)}
    measures: list[dict[str, np.ndarray]] = []
    early, source_scores = [], []
    known = stacked(sources, "validation", s.limit or 200)
    for seed in range(s.seeds):
        run = Seed(programs, sources, targets, held, seed)
        source_scores.append(np.asarray(programs.score(params, run.sources, known, jnp.arange(len(sources)))))
        run.first_stage(rates["PoT"], rates["PT"])
        found = run.split_first(run.scored(run.first, run.good, run.which, "test"))
        early.append(run.split_first(run.scored(run.early, run.good, run.which, "validation"))["PoT"])
        measures.append(run.measures())
        found |= run.second_stage(measures[-1]["sim"], weights, "test")
        for name, value in found.items():
            scores[name].append(value)
        said = ", ".join(f"{n} {100 * v.mean():.2f}" for n, v in found.items())
        print(f"seed {seed}: {said}; {time.perf_counter() - began:.0f} s", flush=True)

    rows = {}
    for name, values in scores.items():
        test = [float(v.mean()) for v in values]
        rate = rates["PoT" if name.startswith("PoT") else "PT"]
        rows[name] = {
            "method": name,
            "trained": trees.count(programs.fresh(params, jax.random.key(0))),
            "rate": rate,
            "weight": weights.get(name, 0.0),
            "test": test,
            "mean": statistics.mean(test),
            "std": statistics.stdev(test),
            "details": {"validation_tried": tried[name], "test_by_target_and_source": [v.tolist() for v in values]},
        }
    ranked = correlations(measures, early)
    names = {"sources": [t.name for t in sources], "targets": [t.name for t in targets]}
    study.finish(
        "panda",
        args,
        paper="PANDA, Zhong et al., IEEE TKDE 2024",
        setup=s,
        rows=list(rows.values()),
        claims=verdicts(rows, scores, ranked, names),
        began=began,
        figure=figure(scores, names["sources"]),
        tables=["sources", "measures"],
        sources=by_source(scores, names["sources"], np.mean(source_scores, 0)),
        measures=[{"measure": n, "spearman": statistics.mean(v)} for n, v in ranked.items()],
        tasks=names,
        similarities=[{n: m.tolist() for n, m in seed.items()} for seed in measures],
        spearman_by_seed=ranked,
        after_one_epoch=[e.tolist() for e in early],
    )


# ------------------------------------------------------------------------------------------------------- what it says


def correlations(measures: list[Any], early: list[np.ndarray]) -> dict[str, list[float]]:
    """Measure -> each seed's mean over targets of Spearman's correlation with the first epoch's accuracy; a constant ranks
    nothing: 0."""

    def spearman(a: Any, b: Any) -> float:
        return 0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else float(stats.spearmanr(a, b)[0])  # pyright: ignore[reportArgumentType]

    return {
        name: [
            statistics.mean(spearman(m[name][:, t], e[t]) for t in range(len(e)))
            for m, e in zip(measures, early, strict=True)
        ]
        for name in measures[0]
    }


def gains(scores: Any, name: str) -> np.ndarray:
    """(T, S): points over PT, in the mean over seeds."""
    return 100 * np.mean([v - pt[:, None] for v, pt in zip(scores[name], scores["PT"], strict=True)], axis=0)


def by_source(scores: Any, names: list[str], known: np.ndarray) -> list[dict[str, Any]]:
    found = {n: gains(scores, n).mean(0) for n in ("PoT", *STUDENTS)}
    return [
        {"source": name, "own_validation": float(known[i]), **{f"{n} - PT": float(v[i]) for n, v in found.items()}}
        for i, name in enumerate(names)
    ]


def verdicts(rows: Any, scores: Any, ranked: Any, names: Any) -> list[dict[str, str]]:
    """The docstring's claims against the rows."""
    over, half = study.difference(rows["PANDA"], rows["PoT"])
    pairs = gains(scores, "PANDA") - gains(scores, "PoT")
    lost = [f"{names['sources'][j]} to {names['targets'][i]}" for i, j in zip(*np.nonzero(pairs < 0))]
    spread = study.interval(list(pairs.reshape(-1)))[1]
    worst = {n: max(0.0, -float(gains(scores, n).mean(0).min())) for n in ("PoT", "PANDA")}
    sim, plain = ranked["sim"], ranked["averaged prompts"]
    rank, rank_half = study.interval([a - b for a, b in zip(sim, plain)])
    said = ", ".join(f"{n} {statistics.mean(v):.2f}" for n, v in ranked.items())
    where = f"; worse in {len(lost)} of {pairs.size} pairs" + (f" ({', '.join(lost)})" if lost else "")
    return [
        record.claim(
            "PANDA is better than PoT",
            over > 0,
            f"{over:+.2f} ± {half:.2f} points over seeds, ± {spread:.2f} over pairs{where}",
        ),
        study.at_least("PANDA is at least as good as PT", rows["PANDA"], rows["PT"]),
        record.claim(
            "PoT's worst source costs something against PT, PANDA's at most half of it",
            worst["PoT"] > 0 and worst["PANDA"] <= 0.5 * worst["PoT"],
            f"PoT {worst['PoT']:.2f} points, PANDA {worst['PANDA']:.2f}",
        ),
        record.claim(
            "sim ranks sources better than averaged prompts",
            rank > 0,
            f"Spearman {said}; {rank:+.2f} ± {rank_half:.2f}",
        ),
        study.at_least(
            "The weight by sim is at least as good as a constant one", rows["PANDA"], rows["PANDA, constant"]
        ),
    ]


def figure(scores: Any, names: list[str]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        at, wide = np.arange(len(names)), 0.8 / (1 + len(STUDENTS))
        for i, name in enumerate(("PoT", *STUDENTS)):
            axes.bar(at + i * wide, gains(scores, name).mean(0), wide, label=name)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(at + 1.5 * wide, names, rotation=30, ha="right", fontsize=7)
        axes.set(ylabel="points over prompt tuning, mean over targets")
        axes.legend(fontsize=7)

    return draw


if __name__ == "__main__":
    main()
