"""Tokens: lengths are ours to say, special tokens survive cutting, the cache never lies."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft.data import AssetError, Ragged, Tokenizer


@pytest.fixture
def folder(tmp_path):
    """A word-level tokenizer with BERT's frame, and with padding and truncation of its own, like MiniLM's file."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d"]
    made = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.enable_padding(length=16)
    made.enable_truncation(16)
    path = tmp_path / "model"
    path.mkdir()
    made.save(str(path / "tokenizer.json"))
    return path


def test_texts_become_framed_ids_cut_to_length(folder):
    tokenizer = Tokenizer(folder)
    tokens = tokenizer.encode(["a b", "", "x", "a b c d a b"], max_length=5)
    assert [row.tolist() for row in tokens] == [[2, 4, 5, 3], [2, 3], [2, 1, 3], [2, 4, 5, 6, 3]]
    long = tokenizer.encode(["a " * 40], max_length=64)
    assert long.lengths.tolist() == [42]  # neither filled nor cut to the file's own 16
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (0, 8)
    assert tokenizer.special == {"pad": 0, "unk": 1, "cls": 2, "sep": 3}
    assert tokenizer.decode(tokens[0]) == "a b"
    assert len(tokenizer.encode([], max_length=5)) == 0


def test_declared_special_tokens_come_first(folder):
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "d"}, "eos_token": "[SEP]"}))
    tokenizer = Tokenizer(folder / "tokenizer.json")
    assert tokenizer.special["pad"] == tokenizer.pad_id == 7
    assert tokenizer.special["eos"] == 3


def test_the_second_time_comes_from_the_cache_and_is_the_same(folder, cache, monkeypatch):
    tokenizer = Tokenizer(folder)
    first = tokenizer.encode(["a b", "c"], max_length=8)
    monkeypatch.setattr(Tokenizer, "_encode", None)  # would fail if called
    second = tokenizer.encode(("a b", "c"), max_length=8)
    np.testing.assert_array_equal(first.ids, second.ids)
    np.testing.assert_array_equal(first.offsets, second.offsets)


def test_other_texts_lengths_and_tokenizers_have_other_keys(folder):
    tokenizer = Tokenizer(folder)
    keys = [tokenizer._key(*a) for a in ((["ab", "c"], 8), (["a", "bc"], 8), (["abc"], 8), (["ab", "c"], 9))]
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    keys.append(Tokenizer(folder)._key(["ab", "c"], 8))
    assert len(set(keys)) == 5


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_cache_file_is_made_anew(folder, cache, damage):
    tokenizer = Tokenizer(folder)
    first = tokenizer.encode(["a b c d"] * 50, max_length=8)
    (path,) = (cache / "tokens").glob("*.npz")
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[300] ^= 1
    elif damage == "empty":
        data = b""
    path.write_bytes(bytes(data))
    if damage == "foreign":
        np.savez(path, ids=np.zeros(3, np.int64))
    again = tokenizer.encode(["a b c d"] * 50, max_length=8)
    np.testing.assert_array_equal(first.ids, again.ids)
    with np.load(path) as stored:
        assert sorted(stored) == ["ids", "offsets"]


def test_bad_arguments_are_named_errors(folder, tmp_path):
    tokenizer = Tokenizer(folder)
    with pytest.raises(ValueError, match="not one string"):
        tokenizer.encode("a b", max_length=8)
    with pytest.raises(ValueError, match="max_length is 2"):
        tokenizer.encode(["a"], max_length=2)
    with pytest.raises(ValueError, match="text 1 is int"):
        tokenizer.encode(["a", 1], max_length=8)  # type: ignore[list-item]
    with pytest.raises(AssetError, match="is not a tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(AssetError, match="is not a tokenizer"):
        Tokenizer(tmp_path)


@given(st.lists(st.lists(st.integers(0, 99), max_size=6), max_size=8), st.integers(6, 9), st.randoms())
def test_ragged_rows_are_what_went_in(sequences, length, random):
    tokens = Ragged.of(sequences)
    assert [row.tolist() for row in tokens] == sequences
    assert tokens.lengths.tolist() == [len(s) for s in sequences]
    indices = np.array([random.randrange(len(sequences)) for _ in range(5)] if sequences else [], np.int64)
    ids, mask = tokens.padded(indices, length, pad_id=-7)
    for row, visible, index in zip(ids, mask, indices):
        expected = sequences[index]
        assert row.tolist() == expected + [-7] * (length - len(expected))
        assert visible.tolist() == [1] * len(expected) + [0] * (length - len(expected))
    assert [row.tolist() for row in tokens.take(indices)] == [sequences[i] for i in indices]


def test_ragged_refuses_what_does_not_fit():
    tokens = Ragged.of([[1, 2, 3], []])
    assert tokens[-1].tolist() == []
    with pytest.raises(IndexError):
        tokens[2]
    with pytest.raises(ValueError, match="3 tokens does not fit into 2"):
        tokens.padded(np.array([0]), 2, 0)
    with pytest.raises(ValueError, match="offsets must rise"):
        Ragged(np.zeros(3, np.int32), np.array([0, 2]))
    with pytest.raises(ValueError, match="read-only"):
        tokens.ids[0] = 5


@pytest.mark.network
def test_minilm_tokenizes_like_bert():
    tokenizer = Tokenizer("all-MiniLM-L6-v2")
    assert tokenizer.encode(["Hello world!"], max_length=16)[0].tolist() == [101, 7592, 2088, 999, 102]
    assert tokenizer.encode(["word " * 400], max_length=256).lengths.tolist() == [256]
    assert tokenizer.special == {"pad": 0, "cls": 101, "sep": 102, "unk": 100, "mask": 103}
    assert tokenizer.vocab_size == 30522
