"""Batches of several tasks: shares, order, resumption."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft import data


def images(n, start, size=4, **more):
    return data.image_batches(
        np.full((n, 2, 2, 1), start, np.uint8), np.arange(n) % 3, batch_size=size, seed=1, shuffle=True, **more
    )


@given(st.lists(st.integers(1, 500), min_size=1, max_size=5), st.integers(1, 200), st.floats(0.5, 50))
def test_shares_add_up_and_follow_the_temperature(sizes, steps, temperature):
    got = data.shares(sizes, steps, temperature)
    p = np.asarray(sizes, float) ** (1 / temperature)
    assert got.sum() == steps
    assert (np.abs(got - steps * p / p.sum()) < 1).all()


def test_each_batch_is_of_one_task_in_proportion_to_its_size():
    parts = [images(40, 1), images(8, 2)]
    several = data.mixture(parts, seed=3)
    batches = list(several.epoch())
    assert len(batches) == len(several) == 12
    assert [int(b.task) for b in batches].count(1) == 2
    assert all((b.image[b.weight > 0] * 255).round().max() == b.task + 1 for b in batches)
    rows = [int(i) for b in batches if b.task == 0 for i in b.index if i >= 0]
    assert sorted(rows) == list(range(40)), "an epoch shows a part that has its own share once"


def test_an_infinite_temperature_draws_all_tasks_alike():
    several = data.mixture([images(40, 1), images(8, 2)], temperature=np.inf)
    assert [int(b.task) for b in several.epoch()].count(1) == 6


def test_any_position_can_be_asked_for_again():
    several = data.mixture([images(40, 1), images(9, 2)], temperature=2.0, seed=5)
    run = several.at(0)
    first = [next(run) for _ in range(30)]
    for i in (0, 13, 29):
        assert (several.batch(i).index == first[i].index).all()
        assert several.batch(i).task == first[i].task
    orders = [[int(b.task) for b in several.epoch(e)] for e in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_together_each_batch_holds_rows_of_every_task():
    several = data.together([images(40, 1, 4), images(9, 2, 2)])
    b = several.batch(7)
    assert b.task.tolist() == [0, 0, 0, 0, 1, 1]
    real = b.weight > 0
    assert ((b.image[real, 0, 0, 0] * 255).round() == b.task[real] + 1).all()
    assert set(b.index[b.task == 1]) <= {-1, *range(40, 49)}
    assert len(several) == 10
    assert several.num_examples == 49


def test_together_texts_are_padded_to_the_longest():
    text = lambda n, t: data.text_batches(
        data.Ragged(np.ones(n * t, np.int32), np.arange(n + 1) * t), None, batch_size=2, shuffle=False, buckets=(4, 8)
    )
    b = data.together([text(4, 3), text(4, 7)]).batch(0)
    assert b.input_ids.shape == b.attention_mask.shape == (4, 8)
    assert b.attention_mask.sum(1).tolist() == [3, 3, 7, 7]


def test_parts_say_their_task_when_evaluated_alone():
    several = data.mixture([images(8, 1), images(8, 2)])
    assert [int(b.task) for part in several.parts for b in part.epoch()] == [0, 0, 1, 1]
    assert several.parts[1].num_examples == 8


def test_bad_mixtures_are_refused():
    with pytest.raises(ValueError, match="0 parts"):
        data.mixture([])
    with pytest.raises(ValueError, match="0 parts"):
        data.together([])
    with pytest.raises(ValueError, match="seed -1"):
        data.mixture([images(4, 1)], seed=-1)
    with pytest.raises(ValueError, match="must be positive"):
        data.mixture([images(4, 1)], temperature=0)
    with pytest.raises(ValueError, match="counts batches from 0"):
        data.mixture([images(4, 1)]).batch(-1)
