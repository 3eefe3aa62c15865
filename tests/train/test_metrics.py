"""Scores against scikit-learn, and the metrics file."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from jaxpeft.train import Metrics, accuracy, macro_f1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_macro_f1_is_scikit_learns(pairs):
    predicted, truth = np.array(pairs).T
    assert macro_f1(predicted, truth) == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0))
    assert accuracy(predicted, truth) == pytest.approx(np.mean(predicted == truth))


def test_no_predictions_are_refused():
    with pytest.raises(ValueError, match="0 predictions for 0 labels"):
        accuracy(np.array([]), np.array([]))


def test_a_resumed_run_drops_later_rows_and_a_line_cut_short(tmp_path):
    metrics = Metrics(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        metrics.write(step, {"loss": 1.0 / step})
    with metrics.path.open("a") as f:
        f.write('{"step": 4, "lo')
    assert [r["step"] for r in Metrics.read(tmp_path)] == [1, 2, 3]
    Metrics(tmp_path, tensorboard=False, keep_until=2)
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1, 2]
