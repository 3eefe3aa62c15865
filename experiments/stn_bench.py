"""What the experiments of self-tuning networks (hyper/stn.py, hyper/stn_language.py) share: runs as scans, searches, rows.

A script has a model, its losses and its data {"train": (inputs, targets), "validation": ..., "test": ...}; `evaluated` is its
`(params, data) -> (2,)`, the losses on validation and test data.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import study
from scipy import stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern, WhiteKernel

from jaxpeft.hyper import Tuner
from jaxpeft.tune import Hyperparameter, constrain, unconstrain

# ------------------------------------------------------------------------------------------------------------------- runs


def batch_of(key: Any, part: Any, size: int) -> Any:
    """Examples drawn with replacement."""
    rows = jax.random.randint(key, (size,), 0, part[1].shape[0])
    return part[0][rows], part[1][rows]


def tuned_run(
    tuner_of: Callable[[Any, Any], Tuner],
    specs: Mapping[str, Hyperparameter],
    evaluated: Callable[..., Any],
    *,
    cycles: int,
    batch: int,
    evaluations: int,
) -> Callable[..., Any]:
    """A run of STN: cycles of two training steps and one validation step, which the first twentieth does without.

    Args:
      tuner_of: `(rate, λ's rate) -> Tuner`.
      evaluations: of the network at λ, evenly over the run; they divide the cycles.

    Returns:
      `(λ_0, rate, λ's rate, key, data) -> (values at every training step (2 cycles, n), losses (evaluations, 2), the last
      values (n,))`.
    """

    def run(lam: Any, rate: Any, lam_rate: Any, key: Any, data: Any) -> Any:
        tuner = tuner_of(rate, lam_rate)
        state = tuner.init(jax.random.fold_in(key, 1))._replace(lam=lam)

        def cycle(state: Any, at: Any) -> Any:
            key, number = at
            a, b, c, *noise = jax.random.split(key, 6)
            before = constrain(specs, state.lam)
            for k, n in ((a, noise[0]), (b, noise[1])):
                state, _ = tuner.train_step(state, batch_of(k, data["train"], batch), n)
            tuned, _ = tuner.valid_step(state, batch_of(c, data["validation"], batch), noise[2])
            warm = number < cycles // 20
            return jax.tree.map(lambda x, y: jnp.where(warm, x, y), state, tuned), before

        def stretch(state: Any, at: Any) -> Any:
            state, values = jax.lax.scan(cycle, state, at)
            return state, (values, evaluated(tuner.params(state), data))

        keys = jax.random.split(jax.random.fold_in(key, 2), (evaluations, cycles // evaluations))
        numbers = jnp.arange(keys.size).reshape(keys.shape)
        state, (values, found) = jax.lax.scan(stretch, state, (keys, numbers))
        return jnp.repeat(values.reshape(-1, len(specs)), 2, 0), found, constrain(specs, state.lam)

    return run


def plain_run(
    init: Callable[[Any], Any],
    rule_of: Callable[[Any, int], optax.GradientTransformation],
    loss: Callable[..., Any],
    specs: Mapping[str, Hyperparameter],
    evaluated: Callable[..., Any],
    *,
    steps: int,
    batch: int,
    evaluations: int,
) -> Callable[..., Any]:
    """A run of an ordinary network, its regularisers as a schedule says.

    Args:
      init: `key -> params`.
      rule_of: `(rate, steps) -> optimiser`.
      loss: `(params, batch, {name: (b,)}, key) -> scalar`.

    Returns:
      `(values (steps, n), rate, key, data) -> losses (evaluations, 2)`.
    """

    def run(schedule: Any, rate: Any, key: Any, data: Any) -> Any:
        params = init(jax.random.fold_in(key, 1))
        rule = rule_of(rate, steps)

        def step(state: Any, at: Any) -> Any:
            (params, moments), (key, values) = state, at
            rows, noise = jax.random.split(key)
            examples = batch_of(rows, data["train"], batch)
            strengths = {n: jnp.full(batch, values[i]) for i, n in enumerate(specs)}
            updates, moments = rule.update(jax.grad(loss)(params, examples, strengths, noise), moments)
            return (optax.apply_updates(params, updates), moments), None

        def stretch(state: Any, at: Any) -> Any:
            state, _ = jax.lax.scan(step, state, at)
            return state, evaluated(state[0], data)

        each = steps // evaluations
        keys = jax.random.split(jax.random.fold_in(key, 2), (evaluations, each))
        values = schedule[: evaluations * each].reshape(evaluations, each, -1)
        return jax.lax.scan(stretch, (params, rule.init(params)), (keys, values))[1]

    return run


def chosen(evaluations: Any) -> tuple[float, float]:
    """(validation loss, test loss) where the former is least; a run that broke off has none."""
    e = np.nan_to_num(np.asarray(evaluations).reshape(-1, 2), nan=1e9)
    return tuple(map(float, e[e[:, 0].argmin()]))  # type: ignore[return-value]


class Rates(NamedTuple):
    """Learning rates: of whole and of short plain runs, of STN's network and of its λ."""

    plain: float
    short: float
    own: float
    lam: float


def rates_of(
    rates: Sequence[float],
    own_rates: Sequence[float],
    lam_rates: Sequence[float],
    whole: Callable[[Sequence[float]], Iterable[Any]],
    short: Callable[[Sequence[float]], Iterable[Any]],
    own: Callable[[float, float], Any],
) -> Rates:
    """Those of the least validation loss.

    Args:
      whole, short: rates -> losses (evaluations, 2) of a plain run at each.
      own: `(rate, λ's rate) ->` those of STN.
    """
    plain, hurried = (dict(zip(rates, (chosen(e)[0] for e in runs(rates)))) for runs in (whole, short))
    both = {pair: chosen(own(*pair))[0] for pair in itertools.product(own_rates, lam_rates)}
    best = lambda found: min(found, key=found.__getitem__)
    print(f"rates: plain {plain}, short {hurried}, STN and λ {both}", flush=True)
    return Rates(best(plain), best(hurried), *best(both))


# --------------------------------------------------------------------------------------------------------------- searches


@dataclasses.dataclass(frozen=True)
class Space:
    """Where searches look, in λ.

    Attributes:
      specs: what is searched.
      low, high: the values of two corners.
      together: names that a grid moves as one.
    """

    specs: Mapping[str, Hyperparameter]
    low: Mapping[str, float]
    high: Mapping[str, float]
    together: tuple[str, ...]

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.asarray(unconstrain(self.specs, v)) for v in (self.low, self.high))  # type: ignore[return-value]

    def random(self, count: int, seed: int) -> np.ndarray:
        """Points (count, n)."""
        low, high = self.bounds()
        return low + (high - low) * np.random.default_rng([seed, 3]).random((count, len(low)))

    def grid(self, count: int) -> np.ndarray:
        """Each at a third and two thirds of its range; the first `count`."""
        low, high = self.bounds()
        groups = [self.together, *((n,) for n in self.specs if n not in self.together)]
        points = itertools.product((1 / 3, 2 / 3), repeat=len(groups))
        named_points = [{n: x for group, x in zip(groups, point) for n in group} for point in points]
        share = np.array([[point[n] for n in self.specs] for point in named_points])
        return low + (high - low) * share[:count]

    def bayes(self, evaluate: Callable[[Any], Any], count: int, seed: int, worst: float) -> tuple[float, float]:
        """Four points at random, then those of the largest expected improvement out of 2,000; the best one's losses.

        Args:
          evaluate: `point -> losses (evaluations, 2)`.
          worst: validation losses above it count as this, so that one bad point does not flatten the others.
        """
        low, high = self.bounds()
        points = list(self.random(min(4, count), 100 + seed))
        found = [chosen(evaluate(p)) for p in points]
        rng = np.random.default_rng([seed, 4])
        while len(points) < count:
            x, y = (np.array(points) - low) / (high - low), np.minimum(np.array([v for v, _ in found]), worst)
            kernel = Matern(0.5, (0.1, 10), nu=2.5) + WhiteKernel(1e-3, (1e-6, 1))
            model = GaussianProcessRegressor(kernel, normalize_y=True)
            model.fit(x, y)
            some = rng.random((2000, len(low)))
            mean, std = model.predict(some, return_std=True)
            z = (y.min() - mean) / np.maximum(std, 1e-9)
            gain = (y.min() - mean) * stats.norm.cdf(z) + std * stats.norm.pdf(z)
            points.append(low + (high - low) * some[gain.argmax()])
            found.append(chosen(evaluate(points[-1])))
        return min(found)


# ---------------------------------------------------------------------------------------------------------------- results

Losses = Mapping[str, Sequence[float]]
"""Of each method, the test loss of each seed."""


def rows_of(losses: Losses) -> list[dict[str, Any]]:
    return [
        {"method": n, "test_loss": statistics.mean(x), "std": statistics.stdev(x), "details": {"test_loss": list(x)}}
        for n, x in losses.items()
    ]


def below(losses: Losses, one: str, other: str) -> tuple[float, float]:
    """By how much `one` is below `other`: mean and half-width of the interval, paired over seeds."""
    return study.interval([b - a for a, b in zip(losses[one], losses[other], strict=True)])


def told(pair: tuple[float, float]) -> str:
    return f"{pair[0]:+.4f} ± {pair[1]:.4f}"


def bands(axes: Any, curves: Mapping[str, np.ndarray], first: int = 0) -> None:
    """Curves (seeds, cycles): their means, and what lies between the least and the largest."""
    for i, (name, curve) in enumerate(curves.items(), first):
        axes.plot(curve.mean(0), color=f"C{i}", label=name)
        axes.fill_between(np.arange(curve.shape[1]), curve.min(0), curve.max(0), color=f"C{i}", alpha=0.2)
