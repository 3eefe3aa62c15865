"""Pareto fronts against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft.tune import non_dominated, pareto_ranks

scores = st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, 2.0, float("nan")])] * 2), min_size=1, max_size=8)


def better(a, b):
    return all(x <= y for x, y in zip(a, b)) and any(x < y for x, y in zip(a, b))


@given(scores)
def test_fronts_are_those_of_pairwise_comparison(points):
    x = np.where(np.isnan(points), np.inf, points)
    left, ranks, front = set(range(len(x))), [0] * len(x), 0
    while left:
        now = {i for i in left if not any(better(x[j], x[i]) for j in left)}
        for i in now:
            ranks[i] = front
        left, front = left - now, front + 1
    assert jax.jit(pareto_ranks)(jnp.array(points)).tolist() == ranks
    assert non_dominated(jnp.array(points)).tolist() == [r == 0 for r in ranks]
