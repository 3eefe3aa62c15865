"""Hyperparameters: estimates without gradients, and searches."""

from jaxpeft.tune.bandit import bandit
from jaxpeft.tune.hyperparameters import (
    Hyperparameter,
    constrain,
    entropy,
    inverse_softplus,
    named,
    perturb,
    unconstrain,
)
from jaxpeft.tune.nsga2 import nsga2
from jaxpeft.tune.search import Search, non_dominated, pareto_ranks
from jaxpeft.tune.spsa import gain, rgf, spsa, spsa_gc, value_and_spsa

__all__ = [
    "Hyperparameter",
    "Search",
    "bandit",
    "constrain",
    "entropy",
    "gain",
    "inverse_softplus",
    "named",
    "non_dominated",
    "nsga2",
    "pareto_ranks",
    "perturb",
    "rgf",
    "spsa",
    "spsa_gc",
    "unconstrain",
    "value_and_spsa",
]
