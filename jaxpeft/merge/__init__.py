"""Many models in, one model out: pure functions `merge(base, models, *, ...) -> params`.

    models = [trained_on_a, trained_on_b]     # or one tree with a leading axis, as a vmapped training leaves it
    params = task_arithmetic(base, models, alpha=0.3)
    curve  = jax.vmap(lambda a: task_arithmetic(base, models, alpha=a))(jnp.linspace(0, 1, 21))
    params = dare(base, models, key=key, p=0.9, combine=ties, keep=0.2)
    params = uniform_soup(None, models)       # what needs no base takes None

Hyperparameters that are numbers may be traced: `vmap` over them gives the whole curve, `lax.map` the same with one
model in memory at a time. `MERGES` lists what there is. `merge_deltas` sums LoRA deltas without forming a weight.
"""

from jaxpeft.merge.atlas import atlas, compose, compose_linearized, init_lam, partition_ids
from jaxpeft.merge.atlas_learning import (
    adamw,
    addition_loss,
    best_epoch,
    best_negation,
    fit_lam,
    multi_head,
    negation_loss,
    regulariser,
    trusted_set,
    two_streams,
    ufm_loss,
)
from jaxpeft.merge.atlas_method import anisotropic_scaling
from jaxpeft.merge.atlas_vectors import LowRank, blocks_within, lora_task_vectors
from jaxpeft.merge.breadcrumbs import breadcrumbs, middle_masks
from jaxpeft.merge.dare import dare
from jaxpeft.merge.deltas import merge_adapted, merge_deltas
from jaxpeft.merge.fisher_merging import diagonal_fisher, dirichlet_grid, fisher_merging, isotropic_merging, pair_grid
from jaxpeft.merge.model_soups import (
    Greedy,
    Learned,
    greedy_selection,
    greedy_soup,
    learned_mixture,
    learned_soup,
    logit_ensemble,
    soup,
    uniform_soup,
    wise_ft,
)
from jaxpeft.merge.registry import MERGES, Merge, merge, register_merge
from jaxpeft.merge.regmean import gram, regmean
from jaxpeft.merge.stack import MergeInputError, add, check_finite, stacked, task_vectors
from jaxpeft.merge.task_arithmetic import Negation, negation, task_arithmetic
from jaxpeft.merge.ties import elected_signs, ties

__all__ = [
    "MERGES",
    "Greedy",
    "Learned",
    "LowRank",
    "Merge",
    "MergeInputError",
    "Negation",
    "adamw",
    "add",
    "addition_loss",
    "anisotropic_scaling",
    "atlas",
    "best_epoch",
    "best_negation",
    "blocks_within",
    "breadcrumbs",
    "check_finite",
    "compose",
    "compose_linearized",
    "dare",
    "diagonal_fisher",
    "dirichlet_grid",
    "elected_signs",
    "fisher_merging",
    "fit_lam",
    "gram",
    "greedy_selection",
    "greedy_soup",
    "init_lam",
    "isotropic_merging",
    "learned_mixture",
    "learned_soup",
    "logit_ensemble",
    "lora_task_vectors",
    "merge",
    "merge_adapted",
    "merge_deltas",
    "middle_masks",
    "multi_head",
    "negation",
    "negation_loss",
    "pair_grid",
    "partition_ids",
    "register_merge",
    "regmean",
    "regulariser",
    "soup",
    "stacked",
    "task_arithmetic",
    "task_vectors",
    "ties",
    "trusted_set",
    "two_streams",
    "ufm_loss",
    "uniform_soup",
    "wise_ft",
]
