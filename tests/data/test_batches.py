"""The laws of batches: everything once, the same again from anywhere, the same bucket on every process."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft.data import Ragged, image_batches, restore_order, text_batches

LENGTHS = st.lists(st.integers(1, 16), min_size=1, max_size=40)
BUCKETS = (4, 8, 16)


def tokens_of(lengths):
    """Sequence i is 100 i + 1, 100 i + 2, ...: a token tells whose it is."""
    return Ragged.of([[100 * i + j + 1 for j in range(n)] for i, n in enumerate(lengths)])


def make(lengths, **options):
    labels = np.arange(len(lengths)) % 5
    return text_batches(tokens_of(lengths), labels, buckets=BUCKETS, pad_id=-1, **options)


def arrays(batch):
    """Its fields; the last, of which task a row is, is empty where there is one."""
    assert batch.task is None
    return tuple(batch)[:-1]


def same(a, b):
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3), st.booleans(), st.integers(0, 2))
def test_every_example_comes_once_an_epoch_and_rows_are_right(lengths, size, seed, shuffle, epoch):
    batches = make(lengths, batch_size=size, seed=seed, shuffle=shuffle)
    seen = []
    for batch in batches.epoch(epoch):
        length = batch.input_ids.shape[1]
        assert batch.input_ids.shape == batch.attention_mask.shape == (size, length)
        assert length in BUCKETS
        assert [a.dtype for a in arrays(batch)] == [np.int32, np.int32, np.int32, np.float32, np.int32]
        for ids, mask, label, weight, index in zip(*arrays(batch)):
            if index < 0:  # padding: weight 0, and one visible token so that no softmax is over nothing
                assert (weight, label, mask.sum(), mask[0]) == (0, 0, 1, 1)
                assert (ids == -1).all()
                continue
            n = lengths[index]
            assert n <= length
            assert (weight, label, mask.sum()) == (1, index % 5, n)
            assert ids.tolist() == [100 * index + j + 1 for j in range(n)] + [-1] * (length - n)
            seen.append(int(index))
    assert sorted(seen) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3))
def test_dropping_fills_every_batch_and_repeats_nothing(lengths, size, epoch):
    if len(lengths) < size:
        with pytest.raises(ValueError, match="do not fill one batch"):
            make(lengths, batch_size=size, last="drop")
        return
    batches = make(lengths, batch_size=size, last="drop")
    indices = np.concatenate([batch.index for batch in batches.epoch(epoch)])
    assert len(indices) == len(lengths) // size * size == len(set(indices.tolist()))
    assert (indices >= 0).all()


@given(LENGTHS, st.sampled_from([1, 2, 3]), st.integers(1, 4), st.booleans(), st.integers(0, 30))
def test_shards_partition_the_global_batch_and_agree_on_the_bucket(lengths, processes, each, shuffle, position):
    size = processes * each
    whole = make(lengths, batch_size=size, seed=1, shuffle=shuffle).batch(position)
    parts = [
        make(lengths, batch_size=size, seed=1, shuffle=shuffle, process_index=i, process_count=processes).batch(
            position
        )
        for i in range(processes)
    ]
    assert same(arrays(whole), [np.concatenate(columns) for columns in zip(*map(arrays, parts))])


@given(LENGTHS, st.integers(1, 9), st.integers(0, 40), st.sampled_from(["pad", "drop"]))
def test_resuming_anywhere_gives_the_same_stream(lengths, size, position, last):
    if last == "drop" and len(lengths) < size:
        return
    running = make(lengths, batch_size=size, seed=2, last=last).at(0)
    rest = itertools.islice(running, position, position + 5)
    resumed = make(lengths, batch_size=size, seed=2, last=last).at(position)  # a new process
    assert all(same(arrays(a), arrays(b)) for a, b in zip(rest, itertools.islice(resumed, 5), strict=True))


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3))
def test_a_batch_mixes_buckets_only_where_two_meet(lengths, size, epoch):
    """So at most (buckets - 1) batches of an epoch are padded past their examples' own buckets."""
    mixed = 0
    for batch in make(lengths, batch_size=size).epoch(epoch):
        own = {min(b for b in BUCKETS if b >= lengths[i]) for i in batch.index if i >= 0}
        assert batch.input_ids.shape[1] == max(own)
        mixed += len(own) > 1
    assert mixed <= len(BUCKETS) - 1


@given(st.permutations(range(13)), st.integers(1, 6))
def test_evaluation_goes_by_length_and_its_order_can_be_undone(lengths, size):
    lengths = [n + 1 for n in lengths]
    batches = list(make(lengths, batch_size=size, shuffle=False).epoch())
    index = np.concatenate([b.index for b in batches])
    assert [lengths[i] for i in index if i >= 0] == sorted(lengths)
    values = np.concatenate([b.attention_mask.sum(1) for b in batches])
    assert restore_order(index, values, 13).tolist() == lengths
    both = restore_order(index, np.stack([values, -values], 1), 13)
    assert both[:, 1].tolist() == [-n for n in lengths]


def test_epochs_and_seeds_have_other_orders_and_evaluation_has_one():
    def orders(**options):
        batches = make([3] * 40, batch_size=8, **options)
        return [tuple(np.concatenate([b.index for b in batches.epoch(e)]).tolist()) for e in range(3)]

    assert len({*orders(seed=0), *orders(seed=1)}) == 6
    assert len({*orders(shuffle=False)}) == 1


def test_dropping_leaves_out_other_and_not_only_long_examples():
    lengths = [2] * 30 + [16] * 3
    batches = make(lengths, batch_size=16, last="drop")
    left_out = [set(range(33)) - {int(i) for b in batches.epoch(e) for i in b.index} for e in range(60)]
    assert all(len(one) == 1 for one in left_out)
    counts = np.bincount([min(one) for one in left_out], minlength=33)
    # Uniform over 33: 3 long ones get 60 * 3 / 33 = 5.5 of 60 on average; 20 would be 6 standard deviations off.
    assert counts[30:].sum() < 20
    assert (counts > 0).sum() > 15


def test_the_batch_order_within_an_epoch_is_random_over_buckets():
    """Lengths must not rise through an epoch: the bucket of the first step varies."""
    batches = make([2] * 32 + [7] * 32 + [15] * 32, batch_size=8)
    first = {next(batches.epoch(e)).input_ids.shape[1] for e in range(20)}
    assert first == set(BUCKETS)


def test_images_are_scaled_and_padded_with_weight_zero():
    images = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2, 1)
    batches = image_batches(images, np.arange(5), batch_size=3, shuffle=False, pixel_max=19)
    one, two = batches.epoch()
    assert one.image.dtype == np.float32
    np.testing.assert_array_equal(one.image, images[:3] / np.float32(19))
    assert two.weight.tolist() == [1, 1, 0]
    assert two.index.tolist() == [3, 4, -1]
    assert two.label.tolist() == [3, 4, 0]
    assert (two.image[2] == 0).all()
    assert two.image.max() == 1
    seen = np.concatenate([b.index for b in image_batches(images, batch_size=2, seed=3).epoch(1)])
    assert sorted(seen.tolist()) == [-1, 0, 1, 2, 3, 4]


def test_without_labels_they_are_zero():
    assert (text_batches(tokens_of([3, 4]), batch_size=2).batch(0).label == 0).all()


@pytest.mark.parametrize(
    ("lengths", "options", "words"),
    [
        ([3], {"batch_size": 0}, "batch_size is 0"),
        ([], {"batch_size": 1}, "no examples"),
        ([3], {"batch_size": 3, "process_count": 2}, "does not divide among 2 processes"),
        ([3], {"batch_size": 2, "process_count": 2, "process_index": 2}, "process 2 of 2"),
        ([3], {"batch_size": 1, "process_count": 0}, "process 0 of 0"),
        ([3], {"batch_size": 1, "last": "keep"}, "'pad' or 'drop'"),
        ([3], {"batch_size": 1, "seed": -1}, "seed is -1"),
        ([3, 0], {"batch_size": 1}, "sequence 1 has no tokens"),
        ([3, 17], {"batch_size": 1}, "sequence 1 has 17 tokens, the longest bucket 16"),
    ],
)
def test_bad_arguments_are_named_errors(lengths, options, words):
    with pytest.raises(ValueError, match=words):
        make(lengths, **options)


def test_more_bad_arguments_are_named_errors():
    tokens = tokens_of([3, 4])
    with pytest.raises(ValueError, match=r"labels have shape \(3,\); there are 2"):
        text_batches(tokens, np.zeros(3, int), batch_size=1)
    for buckets in ((), (0, 8)):
        with pytest.raises(ValueError, match="must be lengths of 1 or more"):
            text_batches(tokens, batch_size=1, buckets=buckets)
    batches = text_batches(tokens, batch_size=1)
    for call in (batches.at, batches.batch):
        with pytest.raises(ValueError, match="counts batches from 0"):
            call(-1)
    with pytest.raises(ValueError, match=r"expected \(n, height, width, channels\)"):
        image_batches(np.zeros((2, 8, 8)), batch_size=1)
    with pytest.raises(ValueError, match="must be positive"):
        image_batches(np.zeros((2, 8, 8, 1)), batch_size=1, pixel_max=0)


@pytest.mark.parametrize(
    ("index", "words"),
    [([0, 1], "example 2 occurs 0 times"), ([0, 1, 1, 2], "example 1 occurs 2 times"), ([0, 3], "example 3 does not")],
)
def test_restoring_refuses_gaps_and_repeats(index, words):
    with pytest.raises(ValueError, match=words):
        restore_order(np.array(index), np.zeros(len(index)), 3)
    with pytest.raises(ValueError, match="indices for values"):
        restore_order(np.array(index), np.zeros(9), 3)
