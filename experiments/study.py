"""What the experiments share: runs as compiled programs, rates chosen on validation, seeds, paired intervals, the file.

    arms = {"LoRA": Arm(chain(lora(4), head())), "full": Arm(full())}
    done = measure(arms, problem, Budget(steps=300, batch=32, rates=(1e-3, 3e-3)))
    difference(done["LoRA"], done["full"])           # mean and half-width of the 95 % interval, paired over seeds

A `Problem` is a model with data of one or several tasks; an `Arm` is a method on it. For each arm one rate out of the grid
(continued where its best is at an edge) by the validation score of the tuning seeds (which are not among the measured
ones), then every seed once, of which the test score is looked at once. A run is a scan over its steps, with the rate, the
seed and the order of the examples as arguments; the runs of an arm are trained side by side in one program (vmap).
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import record
from scipy import stats

from jaxpeft import Adapted, Method, adapt, data, train, trees
from jaxpeft.files import write_atomically
from jaxpeft.updates import relative_rates

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Problem:
    """A frozen model and the examples to adapt it to.

    Attributes:
      apply_fn, params: the model.
      examples: split -> batch (an `ImageBatch` or `TextBatch`) that holds all of its examples, `task` (n,) included where
        there are several.
      task: forward and loss.
      score: `(outputs, batch) -> (n,)`, whose mean over a split is what is compared (the mean over tasks of each task's
        mean, where there are several); larger is better.
    """

    apply_fn: Callable[..., Any]
    params: Any
    examples: Mapping[str, Any]
    task: train.Task
    score: Callable[[Any, Any], Any] = lambda outputs, batch: outputs.argmax(-1) == batch.label


TOGETHER = 6  # runs of an arm in one program


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every arm may spend.

    Attributes:
      steps, batch: of a run.
      rates: the grid, and `beyond` how often it is continued where its best is at an edge.
      tuning_seeds, seeds: how many choose the rate, and how many are measured.
      warmup: the share of steps in which the rate rises.
    """

    steps: int = 300
    batch: int = 32
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    beyond: int = 2
    tuning_seeds: int = 2
    seeds: int = 5
    warmup: float = 0.06


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method on a problem.

    Attributes:
      method: what is trained. One with `prepare` looks at the training split first, for each seed anew.
      rates: its own grid, where it should not be the budget's.
      start: `(seed, params, delta) -> delta`, another start (a source task's delta).
      gradient: in the place of `jax.value_and_grad`; see `train.make_step`.
      optimiser: `(rate, steps) -> optax transformation` instead of Adam with warm-up and linear decay.
      problem: another problem with the same splits (another base, another loss).
    """

    method: Method
    rates: tuple[float, ...] | None = None
    start: Callable[..., Any] | None = None
    gradient: Callable[..., Any] = jax.value_and_grad
    optimiser: Callable[[Any, int], Any] | None = None
    problem: Problem | None = None


def images_of(images: np.ndarray, labels: np.ndarray, task: np.ndarray | None = None) -> data.ImageBatch:
    """All examples of a split as one batch."""
    n = len(labels)
    image, label = jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)
    return data.ImageBatch(
        image, label, jnp.ones(n), jnp.arange(n), None if task is None else jnp.asarray(task, jnp.int32)
    )


def texts_of(ids: np.ndarray, mask: np.ndarray, labels: np.ndarray, task: np.ndarray | None = None) -> data.TextBatch:
    """All examples of a split as one batch of one length."""
    n = len(labels)
    arrays = (jnp.asarray(x, jnp.int32) for x in (ids, mask, labels))
    return data.TextBatch(*arrays, jnp.ones(n), jnp.arange(n), None if task is None else jnp.asarray(task, jnp.int32))


def rows_of(n: int, steps: int, batch: int, seed: int) -> np.ndarray:
    """(steps, batch) indices: one random order of n examples after another."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(n) for _ in range(-(-steps * batch // n))]
    return np.concatenate(orders)[: steps * batch].reshape(steps, batch)


def adam(warmup: float) -> Callable[[Any, int], Any]:
    """Adam, clipped, with warm-up and linear decay."""

    def make(rate: Any, steps: int) -> Any:
        up = max(1, round(warmup * steps))
        parts = [optax.linear_schedule(0.0, 1.0, up), optax.linear_schedule(1.0, 0.0, max(1, steps - up))]
        shape = optax.join_schedules(parts, [up])
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale_by_schedule(shape), optax.scale(-rate)
        )

    return make


def trainer(adapted: Adapted, problem: Problem, arm: Arm, budget: Budget) -> Callable[..., Any]:
    """`(params, delta, rate, seed, examples, rows (steps, b)) -> (delta, first bad step or -1, losses (steps,))`."""
    make = arm.optimiser or adam(budget.warmup)

    def build(rate: Any) -> Any:
        extra = [relative_rates(adapted.method.rates)] if adapted.method.rates else []
        return optax.chain(make(rate, budget.steps), *extra)

    optimiser = optax.inject_hyperparams(build)
    step = train.make_step(adapted, problem.task, optimiser(1.0), gradient=arm.gradient)

    @jax.jit
    def run(params: Any, delta: Any, rate: Any, seed: Any, examples: Any, rows: Any) -> Any:
        def one(state: Any, rows: Any) -> Any:
            state, numbers = step(state, params, jax.tree.map(lambda x: x[rows], examples))
            return state, numbers["loss"]

        state, losses = jax.lax.scan(one, train.create(delta, optimiser(rate), seed), rows)
        return state.delta, state.first_bad, losses

    return run


def scorer(adapted: Adapted, problem: Problem, rows: int = 128) -> Callable[..., Any]:
    """`(params, delta, examples) -> (n,)` scores, `rows` at a time."""

    @jax.jit
    def run(params: Any, delta: Any, examples: Any) -> Any:
        n = examples.label.shape[0]
        size = min(rows, n)
        cut = lambda x: jnp.concatenate([x, x[: -n % size]]).reshape(-1, size, *x.shape[1:])

        def part(batch: Any) -> Any:
            apply = lambda *inputs, **kwargs: adapted.apply(params, delta, *inputs, **kwargs)
            return problem.score(problem.task.forward(apply, batch, None), batch).astype(jnp.float32)

        return jax.lax.map(part, jax.tree.map(cut, examples)).reshape(-1)[:n]

    return run


def inputs_of(batch: Any) -> tuple[Any, ...]:
    """What the model reads of a batch."""
    return (batch.image,) if hasattr(batch, "image") else (batch.input_ids, batch.attention_mask)


def measure(
    arms: Mapping[str, Arm], problem: Problem, budget: Budget, deltas: dict[str, dict[int, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """A row of each arm; printed as they come. `details` in a row are for the file, not for the table.

    Where `deltas` is given, it receives the trained deltas of the chosen rate: arm -> seed (tuning ones too) -> delta.
    """
    return {name: _measured(name, arm, arm.problem or problem, budget, deltas) for name, arm in arms.items()}


def _measured(name: str, arm: Arm, problem: Problem, budget: Budget, deltas: Any) -> dict[str, Any]:
    began = time.perf_counter()
    examples, params = problem.examples, problem.params
    n = examples["train"].label.shape[0]
    few = jax.tree.map(lambda x: x[: budget.batch], examples["train"])
    made: dict[Any, Any] = {}
    kept: dict[float, dict[int, Any]] = {}
    last: dict[tuple[float, int], float] = {}
    sizes: list[int] = []

    def programs(seed: int) -> Any:
        """The method (of this seed, where it looks at the data), its trainer and its scorer."""
        key = seed if arm.method.prepare is not None else None
        if key not in made:
            method = arm.method
            if method.prepare is not None:
                method = method.prepare(study_of(problem, budget, seed))
            adapted = adapt(problem.apply_fn, method)
            made.clear()  # a prepared method is one seed's
            fit = jax.jit(jax.vmap(trainer(adapted, problem, arm, budget), in_axes=(None, 0, 0, 0, None, 0)))
            score = jax.jit(lambda p, deltas, x: jax.lax.map(lambda d: scorer(adapted, problem)(p, d, x), deltas))
            made[key] = fit, score, jax.jit(adapted.init)
        return made[key]

    def runs(pairs: Sequence[tuple[float, int]], split: str) -> list[np.ndarray]:
        """The scores of each (rate, seed), trained side by side; 0 where training broke off."""
        fit, score, init = programs(pairs[0][1])
        starts = [init(jax.random.key(seed), params, *inputs_of(few)) for _, seed in pairs]
        if arm.start is not None:
            starts = [arm.start(seed, params, delta) for (_, seed), delta in zip(pairs, starts, strict=True)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *starts)
        rows = np.stack([rows_of(n, budget.steps, min(budget.batch, n), seed) for _, seed in pairs])
        rate, seed = (jnp.asarray(column) for column in zip(*pairs, strict=True))
        trained, bad, losses = fit(params, stacked, rate, seed, examples["train"], rows)
        scores = np.asarray(score(params, trained, examples[split]))
        if deltas is not None:
            held = jax.device_get(trained)
            for i, (r, s) in enumerate(pairs):
                kept.setdefault(r, {})[s] = jax.tree.map(lambda x, i=i: x[i], held)
        last.update(zip(pairs, np.mean(np.asarray(losses)[:, -20:], axis=1).tolist()))
        sizes.append(trees.count(trees.learned(starts[0])[0]))
        return list(np.where(np.asarray(bad)[:, None] < 0, scores, 0.0))

    def all_of(pairs: Sequence[tuple[float, int]], split: str) -> list[np.ndarray]:
        """`runs`, by groups of one size, so that there is one program; where a seed has its own, by seeds."""
        found: dict[tuple[float, int], np.ndarray] = {}
        own = arm.method.prepare is not None
        size = min(TOGETHER, max(len(rates) * budget.tuning_seeds, budget.seeds))
        for group in [[p for p in pairs if p[1] == s] for s in dict.fromkeys(s for _, s in pairs)] if own else [pairs]:
            for i in range(0, len(group), size):
                some = group[i : i + size]
                filled = some if own else [*some, *[some[-1]] * (size - len(some))]
                found |= dict(zip(filled, runs(filled, split)))
        return [found[pair] for pair in pairs]

    rates = arm.rates or budget.rates
    tuning = [1000 + i for i in range(budget.tuning_seeds)]
    mean_of = lambda scores: statistics.mean(means(scores, examples["validation"].task))
    tried: dict[float, list[float]] = {}

    def attempt(new: Sequence[float]) -> float:
        grid = [(rate, seed) for rate in new for seed in tuning]
        for (rate, _), x in zip(grid, all_of(grid, "validation"), strict=True):
            tried.setdefault(rate, []).append(mean_of(x))
        return max(tried, key=lambda r: statistics.mean(tried[r]))

    rate = attempt(rates)
    for _ in range(budget.beyond if len(rates) > 1 else 0):  # a best at the grid's edge may be better still beyond it
        low, high = sorted(tried)[:2], sorted(tried)[-2:]
        if rate not in (low[0], high[1]):
            break
        rate = attempt([low[0] ** 2 / low[1] if rate == low[0] else high[1] ** 2 / high[0]])
    chosen = [(rate, seed) for seed in range(budget.seeds)]
    scores = all_of(chosen, "test")
    by_task = [means(x, examples["test"].task) for x in scores]
    test, learned = [statistics.mean(x) for x in by_task], sizes[-1]
    if deltas is not None:
        deltas[name] = kept[rate]
    row = {
        "method": name,
        "trained": learned,
        "rate": rate,
        "test": test,
        "mean": statistics.mean(test),
        "std": statistics.stdev(test) if len(test) > 1 else 0.0,
        "last_loss": statistics.mean(last[pair] for pair in chosen),
        "details": {
            "validation_by_rate": {str(r): v for r, v in tried.items()},
            "rate_at_the_grids_edge": len(tried) > 1 and rate in (min(tried), max(tried)),
            "test_by_task": by_task if len(by_task[0]) > 1 else None,
            "losses": [last[pair] for pair in chosen],
            "seconds": time.perf_counter() - began,
        },
    }
    print(
        f"{name:28} {learned:>9,} trained  rate {rate:<7g} {100 * row['mean']:.2f} ± {100 * row['std']:.2f}  "
        f"loss {row['last_loss']:.4f}  {row['details']['seconds']:.0f} s",
        flush=True,
    )
    return row


def means(scores: np.ndarray, task: Any) -> list[float]:
    """The mean score of each task."""
    if task is None:
        return [float(scores.mean())]
    task = np.asarray(task)
    return [float(scores[task == t].mean()) for t in range(task.max() + 1)]


def study_of(problem: Problem, budget: Budget, seed: int) -> Any:
    """What a method that looks at the data gets to see; see `jaxpeft.Study`."""
    from jaxpeft import Study
    from jaxpeft.method import Call

    def loss(apply: Any, batch: Any, key: Any) -> Any:
        each = problem.task.loss(problem.task.forward(apply, batch, key), batch)
        return jnp.sum(each * batch.weight) / jnp.sum(batch.weight)

    few = jax.tree.map(lambda x: x[: budget.batch], problem.examples["train"])
    base = lambda params, *inputs, dropout_key=None, **kwargs: problem.apply_fn(params, *inputs, **kwargs)
    return Study(
        Call(base, problem.params, inputs_of(few)),
        loss,
        Shuffled(problem.examples["train"], budget.batch, seed),
        Shuffled(problem.examples["validation"], budget.batch, seed),
        budget.rates[len(budget.rates) // 2],
        jax.random.fold_in(jax.random.key(seed), 1),
    )


class Shuffled:
    """Batches of one split, with the part of `data.Batches`' face that studies use."""

    def __init__(self, examples: Any, size: int, seed: int):
        self._examples, self._size, self._seed = examples, size, seed
        self.num_examples = examples.label.shape[0]

    def __len__(self) -> int:
        return -(-self.num_examples // self._size)

    def batch(self, position: int) -> Any:
        rows = rows_of(self.num_examples, position + 1, min(self._size, self.num_examples), self._seed)[position]
        return jax.tree.map(lambda x: x[rows], self._examples)


# ----------------------------------------------------------------------------------------------- comparing, reporting


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t-interval."""
    n = len(values)
    if n < 2:
        return statistics.mean(values), float("inf")
    return statistics.mean(values), float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, float]:
    """Of two rows, in points: mean and half-width of the interval of a - b, paired over seeds."""
    return interval([100 * (x - y) for x, y in zip(a["test"], b["test"], strict=True)])


def at_least(text: str, a: Mapping[str, Any], b: Mapping[str, Any], points: float = 0.0) -> dict[str, str]:
    """The claim that a's mean is at least b's plus `points`."""
    mean, half = difference(a, b)
    return record.claim(text, mean >= points, f"{mean:+.2f} ± {half:.2f} points")


def gradient_of(adapted: Adapted, problem: Problem) -> Callable[..., Any]:
    """`(learned leaves, the others, params, batch) -> the gradient of the mean loss`, without dropout."""

    def loss(yes: Any, no: Any, params: Any, batch: Any) -> Any:
        apply = lambda *inputs, **kwargs: adapted.apply(params, trees.combine(yes, no), *inputs, **kwargs)
        return problem.task.loss(problem.task.forward(apply, batch, None), batch).mean()

    return jax.grad(loss)


def counted(program: Any) -> dict[str, float]:
    """A compiled program's temporaries (MiB) and operations (GFLOP)."""
    return {
        "temporaries_mib": program.memory_analysis().temp_size_in_bytes / 2**20,
        "gflop": program.cost_analysis()["flops"] / 1e9,
    }


def memory_of(adapted: Adapted, problem: Problem, rows: int = 64) -> dict[str, float]:
    """Temporaries (MiB) and operations (GFLOP) of one gradient of the learned leaves, by the CPU's compiler."""
    batch = jax.eval_shape(
        lambda e: jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), e), problem.examples["train"]
    )
    params = jax.eval_shape(lambda x: x, problem.params)
    delta = jax.eval_shape(adapted.init, jax.random.key(0), params, *inputs_of(batch))
    # On a GPU products are calls of a library, which the compiler does not count: always the CPU's figures.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return counted(jax.jit(gradient_of(adapted, problem)).lower(*trees.learned(delta), params, batch).compile())


def arguments(text: str) -> argparse.Namespace:
    """`--smoke` and `--out`."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--smoke", action="store_true", help="each part once, in small; writes only with --out")
    parser.add_argument("--out", type=Path, help="the JSON file to write, and beside it the figure")
    return parser.parse_args()


def finish(
    slug: str,
    args: argparse.Namespace,
    *,
    paper: str,
    setup: Any,
    rows: Sequence[Mapping[str, Any]],
    claims: Sequence[Mapping[str, str]],
    began: float,
    figure: Callable[[Any], None] | None = None,
    **more: Any,
) -> None:
    """Prints the verdicts and writes `results/<slug>.json` (and `.png`); a smoke run writes only where it is told to.

    Args:
      slug: the card's file name.
      args: from `arguments`.
      paper, setup, rows, claims: as they stand in the file; the rows' `details` are kept apart from the table.
      began: `time.perf_counter()` at the start.
      figure: `(axes) -> None` draws it.
      more: further keys of the file.
    """
    for c in claims:
        print(f"{c['verdict']:>14}: {c['claim']} ({c['evidence']})")
    out = args.out or (None if args.smoke else record.RESULTS / f"{slug}.json")
    if out is None:
        return
    result = {
        "paper": paper,
        "setup": dataclasses.asdict(setup) if dataclasses.is_dataclass(setup) else setup,
        **record.provenance(),
        "device": jax.devices()[0].device_kind,
        "claims": list(claims),
        "rows": [{k: v for k, v in row.items() if k != "details"} for row in rows],
        "details": {row["method"]: row["details"] for row in rows if "details" in row},
        **more,
        "seconds": time.perf_counter() - began,
    }
    record.write(out, result)
    if figure is not None:
        fig, axes = plt.subplots(figsize=(6.8, 4.2))
        figure(axes)
        fig.tight_layout()
        write_atomically(out.with_suffix(".png"), lambda p: fig.savefig(p, format="png", dpi=150))
        plt.close(fig)
    print(f"wrote {out}")


def points(rows: Sequence[Mapping[str, Any]], x: str, label: str, y_label: str) -> Callable[[Any], None]:
    """A figure of the rows' means over their `x`, one named point a row."""

    def draw(axes: Any) -> None:
        for i, row in enumerate(rows):
            at = (row[x], 100 * row["mean"])
            axes.errorbar(*at, 100 * row["std"], fmt="o", capsize=3)
            axes.annotate(row["method"], at, xytext=(5, 5 if i % 2 else -11), textcoords="offset points", fontsize=7)
        axes.set(xscale="log", xlabel=label, ylabel=y_label)
        axes.margins(x=0.2)

    return draw
