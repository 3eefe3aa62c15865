"""Rankings: measures against scikit-learn and by hand, BM25 by its formula, pairs cut token by token, losses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from jaxpeft.train.ranking import (
    average_precision,
    bm25,
    cut_pair,
    mean_over_queries,
    order_of,
    pairwise_loss,
    pointwise_loss,
    reciprocal_rank,
    reranked,
)


def test_average_precision_divides_by_the_relevant_documents_in_the_list():
    assert float(average_precision(jnp.array([3.0, 2.0, 1.0]), jnp.array([1, 0, 1]))) == pytest.approx((1 + 2 / 3) / 2)
    assert float(average_precision(jnp.array([1.0, 3.0, 2.0, 0.0]), jnp.array([0, 1, 1, 0]))) == 1
    assert float(average_precision(jnp.array([1.0, 2.0]), jnp.array([False, False]))) == 0


def test_average_precision_is_that_of_scikit_learn_without_ties():
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(12.0), (20, 1)), axis=1)
    relevant = rng.random((20, 12)) < 0.3
    relevant[:, 0] = True
    got = jax.jit(average_precision)(scores, relevant)
    want = [average_precision_score(r, s) for r, s in zip(relevant, scores)]
    np.testing.assert_allclose(got, want, atol=1e-6)
    each = jax.vmap(average_precision)(jnp.asarray(scores), jnp.asarray(relevant))
    np.testing.assert_array_equal(got, each)


def test_the_reciprocal_rank_is_of_the_first_relevant_document():
    scores = jnp.array([[1.0, 4.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    relevant = jnp.array([[1, 0, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(reciprocal_rank(scores, relevant), [1 / 2, 0.0])


def test_queries_without_a_relevant_document_do_not_count():
    values, relevant = jnp.array([0.5, 0.0, 1.0]), jnp.array([[1, 0], [0, 0], [0, 1]])
    assert float(mean_over_queries(values, relevant)) == 0.75
    assert float(mean_over_queries(values, jnp.zeros((3, 2)))) == 0


def test_of_equal_scores_the_first_document_comes_first():
    assert order_of(jnp.array([1.0, 2.0, 2.0, 1.0])).tolist() == [1, 2, 0, 3]


def test_a_re_ranker_orders_its_candidates_and_leaves_the_rest_below():
    first = jnp.array([0.1, 0.9, 0.5, 0.7, 0.3])  # order 1 3 2 4 0
    assert jax.jit(reranked)(first, jnp.array([1.0, 2.0, 3.0])).tolist() == [2, 3, 1, 4, 0]
    assert reranked(jnp.stack([first, first]), jnp.zeros((2, 2))).tolist() == [[1, 3, 2, 4, 0]] * 2
    with pytest.raises(ValueError, match="6 candidates of 5"):
        reranked(first, jnp.zeros(6))


def test_bm25_is_its_formula():
    documents = [["a", "b", "a"], ["b", "c"], ["c", "c", "c", "d", "e"]]
    got = bm25([["a", "c"], ["a", "a"], ["z"]], documents, k1=1.5, b=0.5)

    def term(word, document):
        n, f = sum(word in d for d in documents), document.count(word)
        idf = math.log(1 + (3 - n + 0.5) / (n + 0.5))
        return idf * f * 2.5 / (f + 1.5 * (0.5 + 0.5 * len(document) / (10 / 3)))

    np.testing.assert_allclose(got[0], [term("a", d) + term("c", d) for d in documents])
    np.testing.assert_allclose(got[1], [2 * term("a", d) for d in documents])
    assert (got[2] == 0).all()


@pytest.mark.parametrize("arguments", [dict(documents=[]), dict(k1=-1.0), dict(b=1.5)])
def test_bm25_refuses_what_has_no_meaning(arguments):
    with pytest.raises(ValueError, match=r"documents, k1 .*expected some"):
        bm25([["a"]], **{"documents": [["a"]], **arguments})


@given(st.integers(1, 12), st.integers(1, 12), st.integers(5, 20))
def test_a_pair_loses_ids_from_its_longer_text(q, d, length):
    query, document = list(range(100, 100 + q)), list(range(200, 200 + d))
    ids, segments = cut_pair(query, document, length, cls=1, sep=2)
    while len(query) + len(document) > length - 3:
        (query if len(query) > len(document) else document).pop()
    assert ids == [1, *query, 2, *document, 2]
    assert segments == [0] * (len(query) + 2) + [1] * (len(document) + 1)


def test_a_pair_needs_room():
    with pytest.raises(ValueError, match="length 4"):
        cut_pair([7], [8], 4, cls=1, sep=2)


def test_losses_are_their_formulas():
    scores, relevant = jnp.array([0.5, -1.0, 2.0]), jnp.array([1, 0, 0])
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    want = [-math.log(sigmoid(0.5)), -math.log(1 - sigmoid(-1.0)), -math.log(1 - sigmoid(2.0))]
    np.testing.assert_allclose(pointwise_loss(scores, relevant), want, rtol=1e-6)
    pairs = [math.log(1 + math.exp(s - 0.5)) for s in (-1.0, 2.0)]
    np.testing.assert_allclose(pairwise_loss(scores, relevant), np.mean(pairs), rtol=1e-6)
    assert float(pairwise_loss(scores, jnp.ones(3))) == 0
    slope = jax.grad(lambda s: pairwise_loss(s, relevant))(scores)
    assert float(slope.sum()) == pytest.approx(0, abs=1e-7), "it knows differences alone"
    with jax.numpy_dtype_promotion("strict"):
        both = jax.jit(lambda s, r: pairwise_loss(s, r).sum() + pointwise_loss(s, r).sum())
        assert both(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((2, 3), jnp.int32)).dtype == jnp.float32
