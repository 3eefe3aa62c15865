"""Array-like leaves: weights that know their own products."""

from jaxpeft.weights.array_like import ArrayLike, densify, is_array_like
from jaxpeft.weights.difference import difference
from jaxpeft.weights.dora import column_norm, dora
from jaxpeft.weights.factored import Dropout, Factor, Factored, Term
from jaxpeft.weights.kronecker import kronecker, kronecker_dense, kronecker_matvec
from jaxpeft.weights.low_rank import low_rank
from jaxpeft.weights.masked import masked
from jaxpeft.weights.scaled import scaled
from jaxpeft.weights.sparse import Sparse, sparse

__all__ = [
    "ArrayLike",
    "Dropout",
    "Factor",
    "Factored",
    "Sparse",
    "Term",
    "column_norm",
    "densify",
    "difference",
    "dora",
    "is_array_like",
    "kronecker",
    "kronecker_dense",
    "kronecker_matvec",
    "low_rank",
    "masked",
    "scaled",
    "sparse",
]
