"""A sweep: k settings of hyperparameters trained side by side in one compiled program, each as it would train alone.

    found = jaxpeft.sweep(make, grid(rate=[1e-3, 3e-3], seed=range(4)), params, batches, steps=500)

`population.side_by_side` holds the pure functions; here is what drives them: settings checked before any compile, chunks
where not all fit at once, a mesh axis over which runs are divided, and successive halving (Jamieson and Talwalkar,
"Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016).

**Chunks.** Base and batch are read once for all runs, and all their states stay on the device; what does not fit are the
temporaries. So the program computes a chunk of the runs at once and loops over the chunks, at every step.

**Halving.** At the steps `halve_at` the runs are scored on the validation batches and the best share `keep` goes on;
runs that diverged come last. The survivors are gathered into a program of half the size, a quarter, ...: the smallest
that holds them, so that freed slots cost no time and at most log2(k) programs are compiled. New settings do not enter:
they would have seen fewer steps than those they are compared with.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, PyTree

from jaxpeft import trees
from jaxpeft.train.population import Run
from jaxpeft.train.programs import Programs, SweepError, is_key, to_host

T = TypeVar("T")


class Result(NamedTuple):
    """What became of one setting.

    Attributes:
      setting: its numbers.
      steps: updates made; fewer than the sweep's where halving took its slot.
      ended: "finished", "halved", or "not finite".
      first_bad: the first step with a metric that was not finite, -1 for none.
      score: of its last validation, higher is better; NaN without one.
      means: the sums of its last validation over their weight.
    """

    setting: Any
    steps: int
    ended: str
    first_bad: int
    score: float
    means: dict[str, Any]


class Swept(NamedTuple):
    """A finished sweep, in the order of the settings.

    Attributes:
      results: one per setting.
      states: the state each setting ended with, each leaf (k, ...), on the host.
      history: metrics by name, (steps, k); NaN where a setting was not trained any more.
      chunk: runs computed at once.
      programs: step programs compiled, those to find the chunk included.
      compile_seconds: spent on all programs.
      peak_bytes: of the largest step program that ran, on one device: arguments, outputs and temporaries.
    """

    results: list[Result]
    states: PyTree
    history: dict[str, Float[np.ndarray, "steps k"]]
    chunk: int
    programs: int
    compile_seconds: float
    peak_bytes: int

    @property
    def order(self) -> Int[np.ndarray, "k"]:
        """The settings' positions, best first: by steps, then by score; those that diverged last."""
        rows = self.results
        return _ranked([r.score for r in rows], [r.first_bad for r in rows], [r.steps for r in rows])

    def state(self, position: int) -> Any:
        """The state that the setting at `position` ended with."""
        return jax.tree.map(lambda x: x[position], self.states)


def grid(**axes: Iterable[float]) -> dict[str, np.ndarray]:
    """All combinations of the named values, the last name fastest: each name with an array (k,), float32 or int32.

    Raises:
      SweepError: no names, or a name without values.
    """
    values = {name: list(v) for name, v in axes.items()}
    if empty := [name for name, v in values.items() if not v]:
        raise SweepError(f"a grid with no values of {empty[0]!r}: give one at least")
    if not values:
        raise SweepError("a grid of no settings: name at least one hyperparameter")
    columns = zip(*itertools.product(*values.values()))
    kinds = [np.int32 if all(isinstance(x, int | np.integer) for x in v) else np.float32 for v in values.values()]
    return {name: np.array(column, kind) for name, column, kind in zip(values, columns, kinds)}


def lowest_loss(means: dict[str, Any]) -> float:
    """The score of a run by its mean validation loss."""
    return -float(means["loss"])


Progress = Callable[[int, int, dict[str, np.ndarray]], None]


def sweep(
    make: Callable[[Any], Run],
    settings: PyTree,
    params: PyTree,
    batches: Iterable[Any],
    *,
    steps: int,
    validation: Iterable[Any] = (),
    score: Callable[[dict[str, Any]], float] = lowest_loss,
    halve_at: Sequence[int] = (),
    keep: float = 0.5,
    chunk: int | None = None,
    memory_limit: int | None = None,
    largest: Any = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Swept:
    """Trains all settings for `steps` steps on the same batches, each as it would train alone.

    Args:
      make: `(setting) -> Run`, from numbers to the functions of one run; called once with each setting's numbers, so that
        a bad one is refused by name, and under `vmap` with traced ones.
      settings: a pytree of arrays (k, ...), as `grid` makes.
      params: the frozen base, held once.
      batches: read once; each trains all runs.
      steps: updates of each run that keeps its slot.
      validation: batches to score on, at each halving and at the end.
      score: `({name: mean}) -> number`, higher is better, of what `Run.evaluate` summed, divided by its "weight".
      halve_at: steps, increasing and below `steps`, after which the best go on.
      keep: the share that does, in (0, 1); at least one run does.
      chunk: runs computed at once, a loop over chunks inside the program doing the others; per device of a mesh, its
        share of them. None for all that fit in `memory_limit`; on a CPU without a limit, about four.
      memory_limit: bytes per device that a step may take: base, batch, states and temporaries. The chunk that fits is
        found by compiling, from shapes alone, mostly in three tries. None for what the device says it has; a CPU says
        nothing.
      largest: a batch of the largest shape, or `jax.ShapeDtypeStruct`s of it, for the memory; None takes the first.
      mesh: with an axis "run", over which the runs are divided; the base may be divided over other axes of it and is
        else repeated. Where the devices, or the chunk, do not divide the runs, the last one is repeated.
      progress: `(step, of how many, metrics of the runs going on)`, called at every step; it waits for the step's numbers.

    Returns:
      Results, states and history of all settings.

    Raises:
      SweepError: settings that disagree on k or cannot be made, bad `steps`, `halve_at` or `keep`, halving without
        validation, a `score` of what there is not, too few batches, a mesh without the axis, a backend that does not
        tell its memory.
      MemoryLimitError: one run at a time is over the limit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxpeft.train import Run, grid
      >>> def make(setting):  # w minimises (w - 3)^2
      ...     def step(w, params, batch):
      ...         return w - setting["rate"] * 2 * (w - batch), {"loss": (w - batch) ** 2}
      ...     return Run(lambda params: jnp.zeros(()), step)
      >>> sweep(make, grid(rate=[0.1, 0.5]), None, [jnp.array(3.0)] * 20, steps=20).states.round(1).tolist()
      [3.0, 3.0]
    """
    validation = list(validation)
    settings, count = _checked(make, settings, bool(validation))
    stops = _stops(steps, halve_at, keep, bool(validation))
    source = iter(batches)
    first_batch = next(source, None)
    if first_batch is None:
        raise SweepError("no batches: there is nothing to train on")
    source = itertools.chain([first_batch], source)
    programs = Programs(make, params, mesh)
    chunk = programs.fit(settings, first_batch if largest is None else largest, validation, score, chunk, memory_limit)

    alive, held = np.arange(count), None
    ended, ended_runs = [], []
    scores, means = np.full(count, np.nan), [{} for _ in range(count)]
    history: dict[str, np.ndarray] = {}
    for first, last in itertools.pairwise([0, *stops]):
        real = len(alive)
        mine = np.minimum(np.arange(programs.slots(real)), real - 1)  # the last run fills the slots left over
        population = programs.start(_take(settings, alive[mine]), None if held is None else _take(held, mine))
        tell = None if progress is None else lambda at, numbers: progress(at, steps, _take(numbers, slice(real)))
        population, metrics = programs.train(population, source, first, last, tell)
        for name, values in metrics.items():
            whole = history.setdefault(name, np.full((steps, count), np.nan, np.float32))
            whole[first:last, alive] = values[:, :real]
        held = _take(to_host(population), slice(real))
        for i, m in zip(alive, _means(_take(programs.evaluate(population, validation), slice(real)))):
            means[i], scores[i] = m, score(m)
        order = _ranked(scores[alive], held.first_bad, held.step)
        going = 0 if last == steps else max(1, math.ceil(keep * real))
        survivors, gone = np.sort(order[:going]), order[going:]
        ended.append(alive[gone])
        ended_runs.append(_take(held, gone))
        alive, held = alive[survivors], _take(held, survivors)
    final = _take(_joined(ended_runs), np.argsort(np.concatenate(ended)))
    results = [
        Result(
            _take(settings, i),
            int(final.step[i]),
            "not finite" if final.first_bad[i] >= 0 else "finished" if final.step[i] == steps else "halved",
            int(final.first_bad[i]),
            float(scores[i]),
            means[i],
        )
        for i in range(count)
    ]
    return Swept(
        results, final.states, history, chunk, programs.compiled_steps, programs.compile_seconds, programs.peak_bytes
    )


# --------------------------------------------------------------------------------------------- before anything compiles


def _checked(make: Callable[[Any], Run], settings: PyTree, validated: bool) -> tuple[PyTree, int]:
    """The settings on the host, and their number; each is made once from its own numbers."""
    leaves = trees.by_path(settings)
    sizes = {path: np.shape(x)[:1] for path, x in leaves.items()}
    if not leaves or () in sizes.values():
        raise SweepError(f"settings are arrays with a leading axis, one entry per run (see `grid`); got {settings!r}")
    if len(set(sizes.values())) > 1:
        raise SweepError(f"settings disagree on their number: { {path: n for path, (n,) in sizes.items()} }")
    ((count,),) = set(sizes.values())
    if not count:
        raise SweepError("no settings: every array of them is empty")
    settings = to_host(jax.tree.map(jnp.asarray, settings))
    for i in range(count):
        one = _take(settings, i)
        try:
            run = make(one)
        except KeyError as error:
            raise SweepError(f"the settings have no {error}, for which `make` asks: {_described(one)}") from error
        except Exception as error:
            raise SweepError(f"setting {i}, {_described(one)}: {error}") from error
        if validated and run.evaluate is None:
            raise SweepError("these runs have no `evaluate`, so nothing can be validated: give `Run` one")
    return settings, count


def _described(setting: PyTree) -> str:
    return ", ".join(f"{path}={x}" for path, x in trees.by_path(setting).items())


def _stops(steps: int, halve_at: Sequence[int], keep: float, validated: bool) -> list[int]:
    if steps < 1:
        raise SweepError(f"steps={steps}: expected one at least")
    stops = [0, *halve_at, steps]
    if any(a >= b for a, b in itertools.pairwise(stops)):
        raise SweepError(
            f"halve_at={tuple(halve_at)}: expected increasing steps between 1 and steps={steps}, exclusive"
        )
    if halve_at and not 0 < keep < 1:
        raise SweepError(f"keep={keep}: expected a share between 0 and 1")
    if halve_at and not validated:
        raise SweepError("halving ranks runs by their validation score: give validation batches")
    return stops[1:]


# ------------------------------------------------------------------------------------------------------------- the rest


def _means(sums: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    for i, weight in enumerate(sums.get("weight", ())):
        yield {name: values[i] / weight for name, values in sums.items() if name != "weight"}


def _ranked(scores: Any, first_bad: Any, steps: Any) -> Int[np.ndarray, "k"]:
    """Positions, best first; equals keep their order."""
    scores = np.asarray(scores, np.float64)
    lost = ~np.isfinite(scores)
    return np.lexsort((-np.where(lost, 0, scores), -np.asarray(steps), np.asarray(first_bad) >= 0, lost))


def _take(tree: T, index: Any) -> T:
    return jax.tree.map(lambda x: x[index], tree)


def _joined(parts: Sequence[T]) -> T:
    """Trees of host arrays, end to end."""
    return jax.tree.map(lambda *xs: (jnp if is_key(xs[0]) else np).concatenate(xs), *parts)
