"""A grid of settings in one compiled program: states stacked on a leading axis, the step vmapped, the base held once.

Learning rate, scale and seed are arrays inside the program, so nothing is compiled anew between settings. All settings
see the same batches, and each trains as it would alone.
"""

import dataclasses
import inspect
import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from jaxpeft import trees
from jaxpeft.method import entry
from jaxpeft.train.loop import Compiled
from jaxpeft.train.metrics import accuracy, macro_f1
from jaxpeft.train.report import table_of
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
    parts_of,
    total_steps,
)
from jaxpeft.train.step import TrainState, create, make_evaluation, make_step


class Settings(NamedTuple):
    """One setting, or a stack of them: every field (k,).

    Attributes:
      rate: peak learning rate.
      alpha: LoRA's alpha, or an adapter's scale; NaN for the method's own.
      seed: of initialisation and dropout.
    """

    rate: Float[Array, "*k"]
    alpha: Float[Array, "*k"]
    seed: UInt32[Array, "*k"]


def grid(rates: Sequence[float], alphas: Sequence[float], seeds: Iterable[int]) -> list[Settings]:
    """All combinations. Raises ConfigError where there are none."""
    points = [Settings(*p) for p in itertools.product(rates, alphas or [float("nan")], seeds)]  # pyright: ignore[reportArgumentType]
    if not points:
        raise ConfigError("a grid of no settings: give rates and at least one seed")
    return points


def sweep_validation(
    config: Config, settings: Sequence[Settings], *, loaded: Loaded | None = None, progress: Progress = lambda *_: None
) -> list[dict[str, Any]]:
    """Trains all settings side by side and scores each on the validation split.

    Raises:
      ConfigError: an alpha for a method that has neither `alpha` nor `scale`.
    """
    knob = next(
        (k for k in ("alpha", "scale") if k in inspect.signature(entry(config.method).factory).parameters), None
    )
    with_alpha = not np.isnan(settings[0].alpha)
    if with_alpha and knob is None:
        raise ConfigError(f"{config.method} has neither 'alpha' nor 'scale' to sweep")
    loaded = load(config) if loaded is None else loaded
    train = batches_of(loaded, "train", config.batch_size, seed=config.seed, shuffle=True)
    steps = total_steps(config, train)
    example = inputs_of(loaded, train.batch(0))
    stacked = Settings(
        jnp.array([s.rate for s in settings], jnp.float32),
        jnp.array([s.alpha for s in settings], jnp.float32),
        jnp.array([s.seed for s in settings], jnp.uint32),
    )

    def parts(one: Settings) -> tuple[Any, Any]:
        method = build_method(config, **({str(knob): one.alpha} if with_alpha else {}))
        return adapted_model(config, loaded, method), optimiser_of(config, steps, one.rate)

    def start(one: Settings, params: Any) -> TrainState:
        adapted, optimiser = parts(one)
        return create(adapted.init(jax.random.key(one.seed), params, *example), optimiser, one.seed)

    def step(one: Settings, state: TrainState, params: Any, batch: Any) -> Any:
        adapted, optimiser = parts(one)
        return make_step(adapted, loaded.task, optimiser, accumulate=parts_of(config))(state, params, batch)

    def predictions(one: Settings, learned: Any, fixed: Any, params: Any, batch: Any) -> Any:
        adapted, _ = parts(one)
        return make_evaluation(adapted, loaded.task)(trees.combine(learned, fixed), params, batch)["prediction"]

    began = time.perf_counter()
    states = jax.jit(jax.vmap(start, (0, None)))(stacked, loaded.params)
    many = Compiled(jax.vmap(step, (0, 0, None, None)), donate_argnums=1)
    score = Compiled(jax.vmap(predictions, (0, 0, 0, None, None)))
    seen, numbers = 0, {}
    for position, batch in zip(range(steps), train.at(0)):
        states, numbers = many(stacked, states, loaded.params, batch)
        seen += int((batch.weight > 0).sum()) * len(settings)
        best = {"loss": float(jnp.nanmin(numbers["loss"]))}
        progress(position + 1, steps, seen / (time.perf_counter() - began), best)
    held = batches_of(loaded, "validation", 32)
    predicted = np.zeros((len(settings), held.num_examples), np.int64)
    for batch in held.epoch():
        out = np.asarray(score(stacked, states.learned, states.fixed, loaded.params, batch))
        predicted[:, batch.index[batch.index >= 0]] = out[:, batch.index >= 0]
    truth = np.asarray(loaded.dataset.validation.labels)
    seconds = time.perf_counter() - began
    diverged = np.asarray(states.first_bad)
    return [
        {
            "rate": float(s.rate),
            "alpha": float(s.alpha) if with_alpha else None,
            "seed": int(s.seed),
            "validation_accuracy": accuracy(p, truth),
            "validation_macro_f1": macro_f1(p, truth),
            "loss": float(numbers["loss"][i]),
            "first_bad_step": int(diverged[i]),
            "total_seconds": seconds,
            "config": dataclasses.asdict(config),
        }
        for i, (s, p) in enumerate(zip(settings, predicted))
    ]


def sweep_table(rows: Sequence[dict[str, Any]]) -> Any:
    """The settings, best first."""
    ranked = sorted(rows, key=lambda r: -r["validation_accuracy"])
    return table_of(
        ("rate", "alpha", "seed", "validation accuracy", "macro-F1", "last loss"),
        [
            (
                f"{r['rate']:g}",
                "-" if r["alpha"] is None else f"{r['alpha']:g}",
                str(r["seed"]),
                f"{100 * r['validation_accuracy']:.2f} %",
                f"{r['validation_macro_f1']:.4f}",
                f"{r['loss']:.4f}" if r["first_bad_step"] < 0 else f"not finite from step {r['first_bad_step']}",
            )
            for r in ranked
        ],
    )
