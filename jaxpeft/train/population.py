"""Many training runs as one: states stacked on a leading axis, the step vmapped, the base and the batch held once.

A run is made from a *setting*, a pytree of numbers; under `vmap` the numbers are traced, so whatever differs between the
runs (learning rate, scale, decay, dropout, seed, rank) is an array of the program and nothing is compiled per setting.

    runs = side_by_side(make)                                   # make(setting) -> Run
    population = jax.jit(runs.init)(settings, params)           # settings: each leaf (k, ...)
    population, metrics = jax.jit(runs.step, donate_argnums=0)(population, params, batch)

Letter: k runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Int, PyTree

from jaxpeft.method import Adapted
from jaxpeft.train.step import Task, TrainState, create, make_evaluation, make_step


class Run(NamedTuple):
    """One training run as pure functions; `run_of` makes it for an adapted model, and so may you for anything else.

    Attributes:
      init: `(params) -> state`.
      step: `(state, params, batch) -> (state, {name: scalar})`. A scalar that is not finite marks the run as diverged.
      evaluate: `(state, params, batch) -> {name: sum over the batch's rows}` with the number of rows as "weight"; None
        where nothing is validated.
    """

    init: Callable[[PyTree], Any]
    step: Callable[[Any, PyTree, Any], tuple[Any, dict[str, Array]]]
    evaluate: Callable[[Any, PyTree, Any], dict[str, Array]] | None = None


def run_of(
    adapted: Adapted,
    optimiser: optax.GradientTransformation,
    task: Task,
    *inputs: Any,
    seed: Any = 0,
    accumulate: int = 1,
) -> Run:
    """The run that `make_step` trains, its initialisation and dropout drawn from `seed`.

    Args:
      adapted: model and method.
      optimiser: of the learned leaves.
      task: what to minimise; its evaluation sums "loss" and, where batches have labels, "accuracy".
      inputs: an example of the model's inputs, for `adapted.init`.
      seed: an integer; may be traced, as everything that `adapted` and `optimiser` were made from.
      accumulate: as in `make_step`.
    """

    def init(params: PyTree) -> TrainState:
        return create(adapted.init(jax.random.key(seed), params, *inputs), optimiser, seed)

    def evaluate(state: TrainState, params: PyTree, batch: Any) -> dict[str, Array]:
        out = make_evaluation(adapted, task)(state.delta, params, batch)
        sums = {"weight": batch.weight.sum(), "loss": (out["loss"] * batch.weight).sum()}
        if hasattr(batch, "label") and out["prediction"].ndim == 1:
            sums["accuracy"] = ((out["prediction"] == batch.label) * batch.weight).sum()
        return sums

    return Run(init, make_step(adapted, task, optimiser, accumulate=accumulate), evaluate)


@jtu.register_dataclass
@dataclass(frozen=True)
class Population:
    """k runs side by side.

    Attributes:
      settings: each leaf (k, ...).
      states: each leaf (k, ...).
      step: (k,) updates made.
      first_bad: (k,) the first step with a metric that was not finite, -1 while there is none.
    """

    settings: PyTree
    states: PyTree
    step: Int[Array, "k"]
    first_bad: Int[Array, "k"]


class Runs(NamedTuple):
    """k runs as pure functions; jit them.

    Attributes:
      init: `(settings, params) -> population`.
      step: `(population, params, batch) -> (population, {name: (k,)})`.
      evaluate: `(population, params, batch) -> {name: (k, ...)}`, sums over the batch's rows.
    """

    init: Callable[[PyTree, PyTree], Population]
    step: Callable[[Population, PyTree, Any], tuple[Population, dict[str, Array]]]
    evaluate: Callable[[Population, PyTree, Any], dict[str, Array]]


def side_by_side(make: Callable[[Any], Run], *, chunk: int | None = None, axis: str | None = None) -> Runs:
    """The runs that `make` makes, one per setting, as one.

    No run sees another: each one's numbers are those of the run alone, to the rounding of a sum's order, and one that
    diverges changes no other.

    Args:
      make: `(setting) -> Run`; the setting's leaves are traced scalars (or whatever follows their leading axis).
      chunk: runs computed at once, the others after them in a loop inside the program: temporaries are those of a chunk.
        None for all.
      axis: the mesh axis that populations are divided over, if any; its size divides `chunk`.

    Raises:
      ValueError: (when the functions are called) a number of runs over `chunk` that it does not divide.
    """

    def mapped(function: Callable[..., Any], each: PyTree, *shared: Any) -> Any:
        """`function(one, *shared)` of every entry of the leading axis of `each`."""
        together = jax.vmap(function, in_axes=(0, *[None] * len(shared)), spmd_axis_name=axis)
        k = jax.tree.leaves(each)[0].shape[0]
        if chunk is None or k <= chunk:
            return together(each, *shared)
        if k % chunk:
            raise ValueError(f"{k} runs do not divide into chunks of {chunk}: repeat some, or choose another chunk")
        parts = k // chunk
        # Part i takes the runs i, i + parts, ...: on a mesh every part then has runs of every device.
        cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(chunk, parts, *x.shape[1:]), 1, 0), each)
        out = jax.lax.scan(lambda _, part: (None, together(part, *shared)), None, cut)[1]
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(k, *x.shape[2:]), out)

    def init(settings: PyTree, params: PyTree) -> Population:
        states = mapped(lambda one, params: make(one).init(params), settings, params)
        k = jax.tree.leaves(settings)[0].shape[0]
        return Population(settings, states, jnp.zeros(k, jnp.int32), jnp.full(k, -1, jnp.int32))

    def step(population: Population, params: PyTree, batch: Any) -> tuple[Population, dict[str, Array]]:
        def own(run: Any, params: PyTree, batch: Any) -> Any:
            setting, state = run
            return make(setting).step(state, params, batch)

        old = population
        states, metrics = mapped(own, (old.settings, old.states), params, batch)
        bad = ~jnp.all(jnp.stack([jnp.isfinite(m) for m in metrics.values()]), axis=0)
        first_bad = jnp.where(bad & (old.first_bad < 0), old.step, old.first_bad)
        return Population(old.settings, states, old.step + 1, first_bad), metrics

    def evaluate(population: Population, params: PyTree, batch: Any) -> dict[str, Array]:
        def own(run: Any, params: PyTree, batch: Any) -> dict[str, Array]:
            setting, state = run
            function = make(setting).evaluate
            if function is None:
                raise ValueError("these runs have no `evaluate`, so nothing can be validated: give `Run` one")
            return function(state, params, batch)

        return mapped(own, (population.settings, population.states), params, batch)

    return Runs(init, step, evaluate)
