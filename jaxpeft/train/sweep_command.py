"""The command `jaxpeft sweep`: a grid of settings on a run's model and data, scored on its validation split."""

import dataclasses
import inspect
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.adapt.ranks import RANKED, with_rank
from jaxpeft.method import Method, entry
from jaxpeft.train.metrics import accuracy, macro_f1
from jaxpeft.train.population import Run, run_of
from jaxpeft.train.report import bytes_text, table_of
from jaxpeft.train.run import (
    Config,
    ConfigError,
    Loaded,
    Progress,
    adapted_model,
    batches_of,
    build_method,
    inputs_of,
    load,
    optimiser_of,
    parse_options,
    parts_of,
    prepared,
    total_steps,
    with_head,
)
from jaxpeft.train.step import TrainState, make_evaluation
from jaxpeft.train.sweep import grid, sweep

AXES = ("rate", "alpha", "rank", "dropout", "weight_decay", "seed")


def settings_of(config: Config, axes: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    """All combinations of the axes that have values.

    Raises:
      ConfigError: no rate or no seed; an axis that the method cannot sweep.
    """
    if not (axes["rate"] and axes["seed"]):
        raise ConfigError("a grid of no settings: give rates and at least one seed")
    for name in ("alpha", "rank", "dropout"):
        if axes[name] and argument_of(config.method, name) is None:
            raise ConfigError(f"{config.method} has no {name} to sweep")
    if any(axes[name] for name in ("alpha", "rank", "dropout")) and build_method(config).prepare is not None:
        raise ConfigError(f"{config.method} looks at the data before it is made: sweep its rate, decay and seed only")
    return grid(**{name: axes[name] for name in AXES if axes[name]})


def argument_of(method: str, axis: str) -> str | None:
    """The argument of the method's factory that an axis sets; None where it has none that may be traced.

    Numbers that a factory takes as arrays too are annotated `Any`; ranks are traced by `with_rank`.
    """
    if axis == "rank":
        return axis if method in RANKED else None
    known = inspect.signature(entry(method).factory).parameters
    names = ("alpha", "scale") if axis == "alpha" else (axis,)
    return next((k for k in names if k in known and known[k].annotation is Any), None)


def method_of(config: Config, setting: Mapping[str, Any], rank: int | None) -> Method:
    """The configured method with a setting's numbers; `rank` is the largest of the sweep, if it sweeps ranks."""
    options = parse_options(config.method, config.options)
    for name in ("alpha", "dropout"):
        if name in setting:
            options[str(argument_of(config.method, name))] = setting[name]
    if rank is None:
        return with_head(config, entry(config.method).factory(**options))
    return with_head(config, with_rank(entry(config.method).factory(**options | {"rank": rank}), setting["rank"]))


def sweep_validation(
    config: Config,
    axes: Mapping[str, Sequence[float]],
    *,
    halve_at: Sequence[int] = (),
    keep: float = 0.5,
    memory_limit: int | None = None,
    loaded: Loaded | None = None,
    progress: Progress = lambda *_: None,
) -> list[dict[str, Any]]:
    """Trains all settings side by side and scores each on the validation split.

    Args:
      config: of each run; what an axis sets is not used.
      axes: values by name, of `AXES`; empty for the config's own.
      halve_at, keep, memory_limit: as in `sweep`.
      loaded: from `load`, to share.
      progress: `(step, of how many, examples per second over all settings, numbers)`.

    Returns:
      One row a setting, as plain data, in the grid's order.

    Raises:
      ConfigError, SweepError, MemoryLimitError.
    """
    settings = settings_of(config, axes)
    loaded = load(config) if loaded is None else loaded
    train = batches_of(loaded, "train", config.batch_size, seed=config.seed, shuffle=True)
    steps, classes = total_steps(config, train), loaded.dataset.num_classes
    example = inputs_of(loaded, train.batch(0))
    rank = int(settings["rank"].max()) if "rank" in settings else None

    plain = build_method(config)
    ready = None if plain.prepare is None else prepared(config, loaded, plain)

    def make(setting: Mapping[str, Any]) -> Run:
        method = ready or method_of(config, setting, rank)
        adapted = adapted_model(config, loaded, method)
        own = dataclasses.replace(config, weight_decay=setting.get("weight_decay", config.weight_decay))
        optimiser = optimiser_of(own, steps, setting["rate"], method.rates)
        run = run_of(adapted, optimiser, loaded.task, *example, seed=setting["seed"], accumulate=parts_of(config))

        def evaluate(state: TrainState, params: Any, batch: Any) -> dict[str, Any]:
            found = make_evaluation(adapted, loaded.task)(state.delta, params, batch)["prediction"]
            pairs = jax.nn.one_hot(batch.label, classes).T @ (jax.nn.one_hot(found, classes) * batch.weight[:, None])
            return {"weight": jnp.sum(batch.weight), "confusion": pairs}

        return run._replace(evaluate=evaluate)

    began, seen = time.perf_counter(), 0

    def tell(step: int, of: int, numbers: dict[str, np.ndarray]) -> None:
        nonlocal seen
        seen += len(numbers["loss"]) * config.batch_size
        finite = numbers["loss"][np.isfinite(numbers["loss"])]
        best = {"loss": float(finite.min())} if finite.size else {}
        progress(step, of, seen / (time.perf_counter() - began), best)

    found = sweep(
        make,
        settings,
        loaded.params,
        train.at(0),
        steps=steps,
        validation=list(batches_of(loaded, "validation", 32).epoch()),
        score=lambda means: float(np.trace(means["confusion"])),
        halve_at=halve_at,
        keep=keep,
        memory_limit=memory_limit,
        largest=max((train.batch(i) for i in range(len(train))), key=lambda b: inputs_of(loaded, b)[0].size)
        if memory_limit
        else None,
        progress=tell,
    )
    seconds = time.perf_counter() - began
    return [
        {
            **{name: x.item() for name, x in result.setting.items()},
            **_scores(np.rint(result.means["confusion"] * len(loaded.dataset.validation)).astype(int)),
            "loss": float(found.history["loss"][result.steps - 1, i]),
            "steps": result.steps,
            "ended": result.ended,
            "first_bad_step": result.first_bad,
            "rank_in_sweep": place + 1,
            "total_seconds": seconds,
            "step_peak_bytes": found.peak_bytes,
            "config": dataclasses.asdict(config),
        }
        for i, (result, place) in enumerate(zip(found.results, np.argsort(found.order).tolist()))
    ]


def _scores(confusion: Any) -> dict[str, float]:
    """Accuracy and macro-F1 of (truth, predicted) counts."""
    truth, predicted = (np.repeat(index.ravel(), confusion.ravel()) for index in np.indices(confusion.shape))
    return {
        "validation_accuracy": accuracy(predicted, truth),
        "validation_macro_f1": macro_f1(predicted, truth),
    }


def sweep_table(rows: Sequence[dict[str, Any]]) -> Any:
    """The settings, best first."""
    swept = [name for name in AXES if name in rows[0]]
    table = table_of(
        (*(name.replace("weight_", "") for name in swept), "validation", "macro-F1", "last loss", "steps"),
        [
            (
                *(f"{r[name]:g}" for name in swept),
                f"{100 * r['validation_accuracy']:.2f} %",
                f"{r['validation_macro_f1']:.4f}",
                f"{r['loss']:.4f}" if r["first_bad_step"] < 0 else f"bad at {r['first_bad_step']}",
                f"{r['steps']}{' halved' if r['ended'] == 'halved' else ''}",
            )
            for r in sorted(rows, key=lambda r: r["rank_in_sweep"])
        ],
    )
    table.caption = f"one program; its step takes {bytes_text(rows[0]['step_peak_bytes'])}"
    return table
