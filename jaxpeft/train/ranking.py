"""Retrieval: how good a ranking is, a first ranking without a model, and losses for models that score pairs.

    AP = mean over the relevant documents in the list of (relevant ones up to it / its rank)         MAP: mean over queries
    RR = 1 / rank of the first relevant document                                                     MRR: likewise
    BM25(q, D) = Σ_{w in q} idf(w) f (k1 + 1) / (f + k1 (1 - b + b |D| / mean |D|)),   f: occurrences of w in D
    idf(w) = log(1 + (N - n_w + 1/2) / (n_w + 1/2)),   n_w of the N documents contain w

References: Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond, 2009 (idf as in Lucene, which is
never negative); Burges et al., Learning to Rank using Gradient Descent, ICML 2005 (the pairwise loss); evaluation as in
Litschko, Vulić and Glavaš, COLING 2022 (rlitschk/ModularCLIR @9f8150b, src/helper/evaluate.py): AP divides by the relevant
documents in the list, and queries without any do not count.

Letters: q queries, n documents, c candidates.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Num

__all__ = [
    "average_precision",
    "bm25",
    "cut_pair",
    "mean_over_queries",
    "order_of",
    "pairwise_loss",
    "pointwise_loss",
    "reciprocal_rank",
    "reranked",
]


def order_of(scores: Num[Array, "*q n"]) -> Int[Array, "*q n"]:
    """Documents from the largest score to the smallest; of equal ones the first."""
    return jnp.argsort(-jnp.asarray(scores), axis=-1, stable=True)


def average_precision(scores: Num[Array, "*q n"], relevant: Num[Array, "*q n"]) -> Float[Array, "*q"]:
    """AP of each query; 0 where nothing is relevant.

    Args:
      scores: larger is better.
      relevant: booleans, or 0 and 1.

    Example:
      >>> import jax.numpy as jnp
      >>> float(average_precision(jnp.array([3.0, 2.0, 1.0]), jnp.array([1, 0, 1])))
      0.8333333730697632
    """
    hits = _ranked(scores, relevant)
    precision = jnp.cumsum(hits, axis=-1) / _ranks(hits)
    return jnp.sum(precision * hits, axis=-1) / jnp.maximum(hits.sum(-1), 1.0)


def reciprocal_rank(scores: Num[Array, "*q n"], relevant: Num[Array, "*q n"]) -> Float[Array, "*q"]:
    """RR of each query; 0 where nothing is relevant. Arguments as in `average_precision`."""
    hits = _ranked(scores, relevant)
    return jnp.max(hits / _ranks(hits), axis=-1, initial=0.0)


def mean_over_queries(values: Float[Array, "q"], relevant: Num[Array, "q n"]) -> Float[Array, ""]:
    """The mean over the queries with a relevant document (MAP, MRR); 0 where there are none."""
    counts = jnp.any(jnp.asarray(relevant) != 0, axis=-1)
    return jnp.sum(jnp.where(counts, values, 0.0)) / jnp.maximum(counts.sum().astype(values.dtype), 1.0)


def _ranked(scores: Array, relevant: Array) -> Float[Array, "*q n"]:
    """1.0 at the ranks of relevant documents."""
    order = order_of(scores)
    return jnp.take_along_axis((jnp.asarray(relevant) != 0).astype(jnp.float32), order, axis=-1)


def _ranks(hits: Array) -> Float[Array, "*q n"]:
    ranks = jnp.arange(1, hits.shape[-1] + 1).astype(hits.dtype)
    return ranks.reshape((1,) * (hits.ndim - 1) + ranks.shape)


def reranked(first: Num[Array, "*q n"], scores: Num[Array, "*q c"]) -> Int[Array, "*q n"]:
    """Documents in the order of a re-ranker for its c candidates, and below them in that of the first ranking.

    Args:
      first: scores of the first ranking.
      scores: of its best c documents, in its order: column j belongs to document `order_of(first)[..., j]`.

    Raises:
      ValueError: more candidates than documents.
    """
    c, n = scores.shape[-1], first.shape[-1]
    if c > n:
        raise ValueError(f"{c} candidates of {n} documents")
    order = order_of(first)
    best = jnp.take_along_axis(order[..., :c], order_of(scores), axis=-1)
    return jnp.concatenate([best, order[..., c:]], axis=-1)


# ---------------------------------------------------------------------------------------------- a ranking without a model


def bm25(
    queries: Sequence[Sequence[Hashable]], documents: Sequence[Sequence[Hashable]], *, k1: float = 1.2, b: float = 0.75
) -> Float[np.ndarray, "q n"]:
    """BM25 of every document for every query; a term that a query repeats counts as often. Plain numpy.

    Args:
      queries, documents: terms, as the caller cuts them (words in lower case, ids).
      k1: how soon further occurrences of a term stop to count, 0 or more.
      b: how much long documents are held back, 0 to 1.

    Raises:
      ValueError: no documents, or a number out of range.
    """
    if not documents or k1 < 0 or not 0 <= b <= 1:
        raise ValueError(f"{len(documents)} documents, k1 {k1}, b {b}: expected some, k1 >= 0 and b in [0, 1]")
    lengths = np.array([len(d) for d in documents], np.float64)
    norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1.0))
    places: dict[Hashable, list[tuple[int, int]]] = {}
    for i, document in enumerate(documents):
        for term, count in Counter(document).items():
            places.setdefault(term, []).append((i, count))
    out = np.zeros((len(queries), len(documents)))
    for row, query in zip(out, queries):
        for term in query:
            if term in places:
                at, f = (np.array(x) for x in zip(*places[term]))
                idf = np.log1p((len(documents) - len(at) + 0.5) / (len(at) + 0.5))
                row[at] += idf * f * (k1 + 1) / (f + norm[at])
    return out


# ------------------------------------------------------------------------------------------------------------- pairs


def cut_pair(
    query: Sequence[int], document: Sequence[int], length: int, *, cls: int, sep: int
) -> tuple[list[int], list[int]]:
    """Ids and segments of [CLS] query [SEP] document [SEP], of at most `length` ids: while there are more, the longer of the
    two loses its last (the document where both are equally long).

    Raises:
      ValueError: no room for an id of each.
    """
    if length < 5:
        raise ValueError(f"length {length}: three special ids and one of each text need 5")
    room = length - 3
    if len(query) + len(document) > room:
        query = query[: max(room - room // 2, room - len(document))]
        document = document[: room - len(query)]
    ids = [cls, *query, sep, *document, sep]
    return ids, [0] * (len(query) + 2) + [1] * (len(document) + 1)


def pointwise_loss(scores: Float[Array, "*b"], labels: Num[Array, "*b"]) -> Float[Array, "*b"]:
    """Binary cross-entropy of each pair's score (a logit) with its label, 0 or 1."""
    return optax.sigmoid_binary_cross_entropy(scores.astype(jnp.float32), jnp.asarray(labels).astype(jnp.float32))


def pairwise_loss(scores: Float[Array, "*q c"], relevant: Num[Array, "*q c"]) -> Float[Array, "*q"]:
    """The mean over pairs of a relevant candidate and another of log(1 + exp(s_other - s_relevant)); 0 without such pairs."""
    s, yes = scores.astype(jnp.float32), jnp.asarray(relevant) != 0
    pairs: Bool[Array, "*q c c"] = yes[..., :, None] & ~yes[..., None, :]
    each: Any = jax.nn.softplus(s[..., None, :] - s[..., :, None])
    count = jnp.maximum(pairs.sum((-1, -2)).astype(jnp.float32), 1.0)
    return jnp.sum(jnp.where(pairs, each, 0.0), axis=(-1, -2)) / count
