"""Data sets have their standard sizes, splits that never change, and refuse what cannot be trained on."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxpeft.data import (
    NAMES,
    TEXTS,
    Dataset,
    DatasetError,
    Split,
    load,
    load_text,
    subsample,
)
from jaxpeft.data import _raw as raw
from jaxpeft.data import datasets as module
from jaxpeft.data._files import AssetError
from jaxpeft.data._order import held_out, order


def write(path, rows, header=("text", "label")):
    delimiter = "\t" if path.suffix == ".tsv" else ","
    path.write_text("\n".join(delimiter.join(row) for row in [header, *rows]) + "\n", encoding="utf-8")
    return path


def rows(count, classes=2):
    return [(f"text {i}", f"c{i % classes}") for i in range(count)]


# --- splits ---


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.data())
def test_held_out_is_exact_stratified_and_empties_no_class(labels, data):
    labels = np.array(labels)
    sizes = np.bincount(labels, minlength=6)
    most = len(labels) - (sizes > 0).sum()
    count = data.draw(st.integers(0, most))
    seed = data.draw(st.integers(0, 3))
    taken = held_out(labels, count, seed)
    assert len(taken) == count == len(set(taken.tolist()))
    part = np.bincount(labels[taken], minlength=6)
    assert ((sizes - part)[sizes > 0] >= 1).all()
    fair = sizes * count / len(labels)
    # No class gets over one example more than its share unless others could not give theirs.
    if (np.floor(fair) <= sizes - 1)[sizes > 0].all() and (sizes[sizes > 0] > 1).all() and count:
        assert (part >= np.floor(fair) - 1e-9).all()
    np.testing.assert_array_equal(taken, held_out(labels, count, seed))


def test_held_out_refuses_to_empty_a_class():
    with pytest.raises(ValueError, match="each of the 2 classes must keep one"):
        held_out(np.array([0, 0, 1]), 2, 0)
    with pytest.raises(ValueError, match="cannot hold out -1"):
        held_out(np.array([0, 0, 1]), -1, 0)


def test_random_orders_are_fixed_for_ever():
    """Recorded: if numpy ever changed the raw stream, splits and batches would silently differ."""
    assert order(8, 0).tolist() == RECORDED_ORDER
    with pytest.raises(ValueError, match="from 0 on"):
        order(8, -1)


RECORDED_ORDER = [0, 3, 7, 5, 1, 2, 6, 4]


# --- built in ---


def test_digits_are_whole_stratified_and_repeatable(cache):
    data = load("digits")
    assert data.counts == {"train": 1293, "validation": 144, "test": 360}
    assert (data.kind, data.pixel_max, data.num_classes) == ("image", 16, 10)
    assert data.train.inputs.shape == (1293, 8, 8, 1)
    assert data.train.inputs.max() == 16
    # The three splits together are scikit-learn's set.
    images, _ = raw.digits()
    together = np.concatenate([split.inputs for split in data.splits.values()])
    assert sorted(map(bytes, together)) == sorted(map(bytes, images))
    assert np.ptp(data.class_counts("test")) <= 2
    again = load("digits")
    for name, split in data.splits.items():
        np.testing.assert_array_equal(split.inputs, again.splits[name].inputs)
    assert not data.train.inputs.flags.writeable
    assert repr(data) == "Dataset('digits', image, 10 classes, train 1,293, validation 144, test 360)"
    assert hashlib.sha256(data.test.labels.tobytes()).hexdigest()[:16] == DIGITS_TEST


DIGITS_TEST = "af76cb25e21466d6"


def test_validation_depends_on_its_seed_alone_and_test_on_nothing():
    one, two, none = load("digits", seed=0), load("digits", seed=1), load("digits", validation=0)
    np.testing.assert_array_equal(one.test.inputs, two.test.inputs)
    assert (one.validation.inputs != two.validation.inputs).any()
    assert none.counts == {"train": 1437, "validation": 0, "test": 360}
    assert load("digits", validation=100).counts["validation"] == 100


@pytest.mark.parametrize("share", [1.0, -0.1, 5000])
def test_an_impossible_validation_share_is_refused(share):
    with pytest.raises(DatasetError):
        load("digits", validation=share)


def test_a_prepared_set_is_not_prepared_again(monkeypatch):
    load("digits")
    monkeypatch.setattr(raw, "digits", None)  # would fail if called
    load("digits")


def test_a_prepared_set_of_the_wrong_size_is_refused(monkeypatch):
    load("digits")
    from jaxpeft.data.builders import Digits

    monkeypatch.setattr(Digits, "COUNTS", {"train": 1438, "test": 360})
    with pytest.raises(DatasetError, match="remove that folder"):
        load("digits")


def test_a_damaged_prepared_set_is_refused_with_the_remedy(cache):
    load("digits")
    (path,) = (cache / "tfds" / "digits").rglob("*train*array_record*")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DatasetError, match="remove that folder and load again"):
        load("digits")


def test_processes_that_load_at_once_all_succeed(cache):
    """On a fresh cache one prepares, the others wait and then read."""
    program = "from jaxpeft.data import load\nassert load('digits').counts['test'] == 360"
    running = [subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate()[1].decode() for process in running]
    assert [process.returncode for process in running] == [0] * 2, errors


def test_loading_writes_nothing_to_standard_output(capfd):
    load("digits")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_the_list_of_names_is_the_builders():
    from jaxpeft.data.builders import BUILDERS

    assert tuple(BUILDERS) == NAMES
    for builder in BUILDERS.values():
        assert len(set(builder.LABELS)) == len(builder.LABELS)
    for name in ("r8", "r52", "20ng"):
        assert list(BUILDERS[name].LABELS) == sorted(BUILDERS[name].LABELS)


def test_offline_without_the_asset_is_an_asset_error():
    with pytest.raises(AssetError, match="JAXPEFT_OFFLINE"):
        load("r8")


@pytest.mark.parametrize(
    ("name", "near"),
    [("r9", "r8"), ("fashion-mnits", "fashion-mnist"), ("ag_newss", "ag_news_subset"), ("No Such", "")],
)
def test_an_unknown_name_tells_what_there_is(name, near):
    with pytest.raises(DatasetError, match="built in are r8, r52, 20ng") as caught:
        load(name)
    if near:
        assert near in str(caught.value).split("near:")[1]


# --- tensorflow-datasets by name ---


def prepared(cache, name, features, splits, keys):
    """A prepared set on disk, as tensorflow-datasets itself leaves it."""
    import tensorflow_datasets as tfds

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            feature_dict = tfds.features.FeaturesDict(features(tfds))
            return tfds.core.DatasetInfo(builder=self, features=feature_dict, supervised_keys=keys)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples):
            yield from enumerate(examples)

    Made.name = name
    with module._quiet():
        Made(data_dir=str(cache / "tfds"), file_format="array_record").download_and_prepare()


def sentences(tfds):
    return {"sentence": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["no", "yes"])}


EXAMPLES = [{"sentence": f"text {i} ü", "label": i % 2} for i in range(40)]


@pytest.mark.parametrize("keys", [("sentence", "label"), None])
def test_a_tfds_set_is_read_by_name_without_its_code(cache, keys):
    prepared(cache, "toy_text", sentences, {"train": EXAMPLES, "validation": EXAMPLES[:6], "test": EXAMPLES[:4]}, keys)
    data = load("toy_text")
    assert data.counts == {"train": 40, "validation": 6, "test": 4}
    assert data.labels == ("no", "yes")
    assert sorted(data.train.inputs) == sorted(e["sentence"] for e in EXAMPLES)
    assert all((int(text.split()[1]) % 2) == label for text, label in zip(data.train.inputs, data.train.labels))


def test_hidden_test_labels_are_replaced_by_a_held_out_part(cache):
    hidden = [{"sentence": "x", "label": -1}] * 5
    prepared(cache, "toy_hidden", sentences, {"train": EXAMPLES, "test": hidden}, ("sentence", "label"))
    assert load("toy_hidden").counts == {"train": 29, "validation": 3, "test": 8}


def test_single_labels_out_of_range_are_refused(cache):
    prepared(
        cache, "toy_wrong", sentences, {"train": [*EXAMPLES, {"sentence": "x", "label": -1}]}, ("sentence", "label")
    )
    with pytest.raises(DatasetError, match=r"train example \d+ has label -1, outside 0\.\.1"):
        load("toy_wrong")


def test_tfds_sets_of_other_kinds_are_named_errors(cache):
    def pair(tfds):
        return {"a": tfds.features.Text(), "b": tfds.features.Text(), "y": tfds.features.ClassLabel(num_classes=2)}

    train = [{"a": f"{i}", "b": "x", "y": i % 2} for i in range(20)]
    prepared(cache, "toy_pair", pair, {"train": train}, None)
    with pytest.raises(DatasetError, match=r"Say keys=\(input, label\); there are a, b, y"):
        load("toy_pair")
    assert load("toy_pair", keys=("a", "y")).num_classes == 2
    with pytest.raises(DatasetError, match="not a class label"):
        load("toy_pair", keys=("a", "b"))
    prepared(cache, "toy_test", sentences, {"test": EXAMPLES}, ("sentence", "label"))
    with pytest.raises(DatasetError, match="there is no train split, only test"):
        load("toy_test")


def test_a_foreign_builder_that_fails_is_a_named_error(monkeypatch):
    import tensorflow_datasets as tfds

    def fail(self, **_):
        raise OSError("no route to host")

    monkeypatch.delenv("JAXPEFT_OFFLINE")
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(DatasetError, match="mnist: tensorflow-datasets cannot prepare it: no route to host"):
        load("mnist")


def test_offline_and_not_prepared_is_told():
    with pytest.raises(DatasetError, match=r"mnist is not prepared in .*JAXPEFT_OFFLINE"):
        load("mnist")


# --- a user's own files ---


def test_a_folder_of_files_gives_its_splits(tmp_path):
    write(tmp_path / "train.tsv", rows(40))
    write(tmp_path / "validation.csv", rows(6))
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"text": t, "label": c}) for t, c in rows(4)) + "\n\n")
    data = load(tmp_path)
    assert data.counts == {"train": 40, "validation": 6, "test": 4}
    assert data.labels == ("c0", "c1")
    assert data.test.inputs[:2] == ("text 0", "text 1")
    assert data.test.labels.tolist() == [0, 1, 0, 1]


def test_one_file_is_split_in_three(tmp_path):
    data = load(str(write(tmp_path / "all.csv", rows(100))))
    assert data.counts == {"train": 72, "validation": 8, "test": 20}
    together = [text for split in data.splits.values() for text in split.inputs]
    assert sorted(together) == sorted(text for text, _ in rows(100))


def test_quoted_fields_may_span_lines_and_integer_labels_sort_as_numbers(tmp_path):
    pairs = [(f'"two\nlines, ""quoted"" {i}"', str(i % 11)) for i in range(66)]
    data = load(write(tmp_path / "a.csv", pairs), validation=0)
    assert data.labels == tuple(str(i) for i in range(11))
    assert all(text.startswith('two\nlines, "quoted"') for text in data.train.inputs)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,class\nx,1\n", "no column label"),
        ("a.csv", "", "no column label and no column text"),
        ("a.csv", "text,label\n", "has no examples"),
        ("a.csv", "text,label\nx\n", "line 2: a text or label is missing"),
        ("a.csv", "text,label\n" + "x,1\n" * 9, "single class"),
        ("a.csv", "text,label\nx,1\n ,2\nx,2\n", "train example 1 is empty"),
        ("a.jsonl", '{"text": "x"}\n', "line 1: not an object with text and label"),
        ("a.jsonl", "no\n", "line 1: not an object"),
        ("a.jsonl", '{"text": 1, "label": 1}\n', "text must be a string"),
        ("a.txt", "x", r"files are \.tsv, \.csv, \.jsonl"),
        ("a.csv", b"text,label\n\xff,1\n", "cannot be read"),
        ("a.csv", "text,label\nx,1\ny,2\n", "cannot hold out|must keep one|single"),
    ],
)
def test_bad_files_are_named_errors(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DatasetError, match=words):
        load(path, validation=1)


def test_bad_folders_are_named_errors(tmp_path):
    with pytest.raises(DatasetError, match=r"no train\.tsv"):
        load(tmp_path)
    with pytest.raises(DatasetError, match="there is no file or folder"):
        load(tmp_path / "none")
    with pytest.raises(DatasetError, match="there is no file or folder"):
        load("none.csv")
    write(tmp_path / "train.tsv", rows(10))
    write(tmp_path / "test.csv", [("x", "c2")])
    with pytest.raises(DatasetError, match=r"label 'c2', which the train split never has \(c0, c1\)"):
        load(tmp_path)
    write(tmp_path / "train.csv", rows(10))
    with pytest.raises(DatasetError, match=r"which of train\.tsv, train\.csv"):
        load(tmp_path)


def pictures(folder, counts, mode="L", size=(4, 3)):
    """Folders of pictures: class -> how many, each of one grey value."""
    for i, (label, count) in enumerate(counts.items()):
        (folder / label).mkdir(parents=True)
        for k in range(count):
            Image.new(mode, size, 10 * i + k if mode == "L" else (10 * i + k, 0, 0)).save(
                folder / label / f"{k:02}.png"
            )
    return folder


def test_folders_of_pictures_are_classes(tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        pictures(tmp_path / split, {"10": count, "9": count})
    data = load(tmp_path, validation=2)
    assert (data.kind, data.pixel_max, data.labels) == ("image", 255, ("9", "10"))
    assert data.counts == {"train": 10, "validation": 2, "test": 4}
    assert data.test.inputs.shape == (4, 3, 4, 1)
    # Their files in order, folder by folder ("10" before "9"), with the labels of their folders.
    assert data.test.inputs[:, 0, 0, 0].tolist() == [0, 1, 10, 11]
    assert data.test.labels.tolist() == [1, 1, 0, 0]
    alone = load(pictures(tmp_path / "alone", {"a": 10, "b": 10}, mode="RGB"))
    assert alone.counts == {"train": 14, "validation": 2, "test": 4}
    assert alone.train.inputs.shape == (14, 3, 4, 3)


def test_arrays_of_pictures_are_read_and_grey_ones_get_a_channel(tmp_path):
    image, label = np.arange(20 * 6, dtype=np.uint8).reshape(20, 2, 3), np.array(["cat", "dog"] * 10)
    np.savez(tmp_path / "all.npz", image=image, label=label)
    data = load(tmp_path / "all.npz", validation=0)
    assert data.labels == ("cat", "dog")
    assert data.counts == {"train": 16, "validation": 0, "test": 4}
    rows = np.concatenate([data.train.inputs, data.test.inputs])[..., 0]
    assert sorted(map(tuple, rows.reshape(20, -1))) == sorted(map(tuple, image.reshape(20, -1)))


def test_pictures_that_do_not_fit_are_named_errors(tmp_path):
    mixed = pictures(tmp_path / "mixed", {"a": 2, "b": 2})
    Image.new("RGB", (4, 3), (1, 2, 3)).save(mixed / "a" / "colour.png")
    assert load(mixed, validation=0).train.inputs.shape[1:] == (3, 4, 3)  # grey ones become colour
    Image.new("L", (5, 3)).save(mixed / "b" / "wide.png")
    with pytest.raises(DatasetError, match=r"pictures differ in shape \(2 shapes"):
        load(mixed)
    (mixed / "b" / "wide.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"wide\.png cannot be read"):
        load(mixed)
    both = tmp_path / "both"
    pictures(both / "train", {"a": 2, "b": 2})
    write(both / "test.tsv", [("text", "a")])
    with pytest.raises(DatasetError, match="some of its splits are texts"):
        load(both)
    sizes = tmp_path / "sizes"
    pictures(sizes / "train", {"a": 2, "b": 2})
    pictures(sizes / "test", {"a": 2}, size=(2, 2))
    with pytest.raises(DatasetError, match="pictures of the splits differ in shape"):
        load(sizes)
    (tmp_path / "none" / "train").mkdir(parents=True)
    with pytest.raises(DatasetError, match="has no folder with pictures"):
        load(tmp_path / "none")
    for held, words in (
        ({"image": np.zeros((2, 2, 2), np.uint8)}, "no arrays image and label"),
        (
            {"image": np.zeros((2, 2, 2), np.float32), "label": np.arange(2)},
            r"image float32\[2, 2, 2, 1\].*expected uint8",
        ),
        ({"image": np.zeros((2, 2, 2), np.uint8), "label": np.arange(3)}, r"label \[3\]"),
    ):
        np.savez(tmp_path / "bad.npz", **held)
        with pytest.raises(DatasetError, match=words):
            load(tmp_path / "bad.npz")


def test_empty_texts_can_be_dropped_and_are_counted(tmp_path):
    data = load(write(tmp_path / "a.tsv", [*rows(20), ("  ", "c0")]), drop_empty=True)
    assert data.dropped == {"train": 1}
    assert sum(data.counts.values()) == 20


# --- subsample ---


def toy(sizes=(5, 3, 9)):
    labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    split = Split(tuple(f"t{i}" for i in range(len(labels))), labels)
    return Dataset("toy", "text", split, split, split, tuple("abc"))


@given(st.integers(1, 3), st.integers(0, 5))
def test_subsamples_have_the_asked_size_and_nest(per_class, seed):
    small, large = (subsample(toy(), per_class=n, seed=seed) for n in (per_class, 3))
    assert small.class_counts().tolist() == [per_class] * 3
    assert set(small.train.inputs) <= set(large.train.inputs)
    assert len(small.test) == 17


def test_a_class_with_too_few_is_refused_or_kept():
    with pytest.raises(DatasetError, match=r"1 classes have fewer than 4 training examples: b \(3\)"):
        subsample(toy(), per_class=4, seed=0)
    assert subsample(toy(), per_class=4, seed=0, short="keep").class_counts().tolist() == [4, 3, 4]
    with pytest.raises(DatasetError, match="must be 1 or more"):
        subsample(toy(), per_class=0, seed=0)
    with pytest.raises(DatasetError, match="'error' or 'keep'"):
        subsample(toy(), per_class=1, seed=0, short="no")  # type: ignore[arg-type]


# --- raw readers ---


def test_tab_rows_skip_blank_rows_keep_quotes_and_refuse_ragged_ones(tmp_path):
    path = tmp_path / "a.tab"
    path.write_text('Category\tText\nd\tstring\nclass\t\n\t\nx\t"a\ny\tb"c\n\n', encoding="utf-8")
    assert list(raw.tab_rows(path)) == [{"Category": "x", "Text": '"a'}, {"Category": "y", "Text": 'b"c'}]
    path.write_text("Category\tText\nd\tstring\nclass\t\nx\ta\tb\n", encoding="utf-8")
    with pytest.raises(AssetError, match="row 4: 3 columns instead of 2"):
        list(raw.tab_rows(path))


def test_idx_files_are_checked(tmp_path):
    import gzip

    path = tmp_path / "a.gz"
    body = bytes(range(6))
    path.write_bytes(gzip.compress(b"\0\0\x08\x02" + (2).to_bytes(4, "big") + (3).to_bytes(4, "big") + body))
    assert raw.idx_array(path).tolist() == [[0, 1, 2], [3, 4, 5]]
    path.write_bytes(gzip.compress(b"\0\0\x08\x02" + (2).to_bytes(4, "big") + (4).to_bytes(4, "big") + body))
    with pytest.raises(AssetError, match="holds 6 bytes"):
        raw.idx_array(path)
    path.write_bytes(gzip.compress(b"\0\0\x0d\x01" + bytes(8)))
    with pytest.raises(AssetError, match="not an IDX file"):
        raw.idx_array(path)


# --- the real ones ---


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [("r8", 5485, 2189, 8), ("r52", 6532, 2568, 52), ("20ng", 11293, 7528, 20), ("mnist-5k", 4000, 1000, 10)],
)
def test_standard_sets_have_their_standard_sizes(name, train, test, classes):
    data = load(name)
    assert data.counts["train"] + data.counts["validation"] == train
    assert data.counts["test"] == test
    assert data.num_classes == classes == len(np.unique(data.train.labels))
    if data.kind == "text":
        assert all(text.strip() for split in data.splits.values() for text in split.inputs)


@pytest.mark.network
@pytest.mark.slow
def test_fashion_mnist_has_its_standard_size():
    data = load("fashion-mnist")
    assert data.counts == {"train": 54000, "validation": 6000, "test": 10000}
    assert data.class_counts("train").tolist() == [5400] * 10
    assert data.class_counts("test").tolist() == [1000] * 10


@pytest.mark.network
@pytest.mark.parametrize(("name", "counts"), [("friends-transcripts", (183, 22, 22)), ("book-excerpts", (112, 14, 14))])
def test_running_text_is_split_by_documents(name, counts):
    texts = load_text(name)
    assert (len(texts.train), len(texts.validation), len(texts.test)) == counts
    assert len({*texts.train, *texts.validation, *texts.test}) == sum(counts)
    assert all(texts.train)
    assert texts == load_text(name)


def test_an_unknown_text_set_tells_what_there_is():
    with pytest.raises(DatasetError, match=f"{TEXTS[0]}, {TEXTS[1]}; near: friends-transcripts"):
        load_text("friends-transcript")
