"""Hyperparameters: estimates without gradients, and searches."""

from jaxpeft.tune.search import Search, non_dominated, pareto_ranks
from jaxpeft.tune.spsa import gain, rgf, spsa, spsa_gc

__all__ = ["Search", "gain", "non_dominated", "pareto_ranks", "rgf", "spsa", "spsa_gc"]
