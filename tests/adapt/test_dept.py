"""Decomposed prompt tuning: the card's oracles on a tiny encoder."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpeft import adapt, dept, prompt_tuning, trees
from jaxpeft.adapt.dept import budget
from jaxpeft.models import SequenceClassifier
from jaxpeft.models.encoder import EncoderConfig

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = EncoderConfig(
    vocab=20, width=8, layers=2, heads=2, head_dim=4, mlp_width=16, max_positions=24, init_std=0.3, plain=True
)
IDS = np.random.default_rng(0).integers(2, 20, (4, 5)).astype(np.int32)
MASK = np.ones((4, 5), np.int32)
MODEL = SequenceClassifier(CONFIG, 3)
PLACE = "params/backbone/embeddings/word"


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), IDS, MASK)


def started(params, method):
    adapted = adapt(MODEL.apply, method, on_dense="refuse")
    return adapted, adapted.init(jax.random.key(1), params, IDS, MASK)


def moved(delta, by=0.3):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + by * jnp.asarray(rng.normal(size=x.shape), x.dtype), delta)


def test_it_starts_as_prompt_tuning_with_its_prompt(params, close):
    adapted, delta = started(params, dept(3, 2, 6))
    plain = adapt(MODEL.apply, prompt_tuning(3))
    prompt = {PLACE: {"prompt": delta[PLACE]["prompt"]}}
    close(adapted.apply(params, delta, IDS, MASK), plain.apply(params, prompt, IDS, MASK))


def test_rank_zero_is_prompt_tuning_and_no_prompt_at_the_start_is_the_base(params, close):
    adapted, delta = started(params, dept(3, 0, 6))
    assert delta[PLACE].keys() == {"prompt"}
    close(adapted.apply(params, delta, IDS, MASK), adapt(MODEL.apply, prompt_tuning(3)).apply(params, delta, IDS, MASK))
    adapted, delta = started(params, dept(0, 2, 6))
    assert delta[PLACE].keys() == {"a", "b"}
    close(adapted.apply(params, delta, IDS, MASK), MODEL.apply(params, IDS, MASK))


def test_the_offset_is_gamma_a_b_by_position_whatever_the_token(params, close):
    """Seen through a model that answers with its embedded input."""
    adapted = adapt(lambda p, ids: MODEL.apply(p, ids, jnp.ones_like(ids)), dept(0, 2, 6, alpha=3.0))
    delta = moved(adapted.init(jax.random.key(1), params, IDS))
    table = params["params"]["backbone"]["embeddings"]["word"]["embedding"]
    offset = 3.0 / np.sqrt(2) * delta[PLACE]["a"] @ delta[PLACE]["b"]
    # A base whose table has a row for each (position, token): the offset written into the table by hand.
    rows = np.arange(5)[None] * 20 + IDS
    big = (offset[:5, None] + table[None]).reshape(100, 8)
    wide = SequenceClassifier(dataclasses.replace(CONFIG, vocab=100), 3)
    by_hand = trees.replace_leaves(params, {f"{PLACE}/embedding": big})
    close(adapted.apply(params, delta, IDS), wide.apply(by_hand, rows, np.ones_like(rows)))
    assert np.linalg.matrix_rank(np.asarray(offset)) <= 2


def test_masked_padding_changes_nothing(params, close):
    adapted, delta = started(params, dept(3, 2, 9))
    delta = moved(delta)
    longer = np.pad(IDS, [(0, 0), (0, 3)], constant_values=7)
    mask = np.pad(MASK, [(0, 0), (0, 3)])
    close(adapted.apply(params, delta, longer, mask), adapted.apply(params, delta, IDS, MASK))


def test_sizes_at_equal_budget_are_the_papers():
    for m, r in ((80, 15), (60, 30), (40, 45)):
        assert budget(100, 768, 256, m) == r
        assert m * 768 + (256 + 768) * r == 100 * 768
    assert budget(100, 768, 512, 60) == 24


def test_a_starts_by_its_rank_and_b_at_zero(params):
    _, delta = started(params, dept(2, 4, 400))
    d = delta[PLACE]
    assert 0.95 / 2 < float(jnp.abs(d["a"]).max()) <= 1 / 2
    assert (d["b"] == 0).all()
    assert d["prompt"].shape == (2, 8)


def test_the_prompt_has_its_own_rate():
    assert dept(3, 2).rates == (("**/prompt", 30.0),)
    assert dept(3, 0).rates == dept(0, 2).rates == ()


def test_bad_arguments_are_refused(params):
    for wrong in ({"prompt": -1}, {"rank": -1}, {"prompt": 0, "rank": 0}, {"positions": 0}):
        with pytest.raises(ValueError, match=r"prompt .* rank .* positions"):
            dept(**wrong)
    with pytest.raises(ValueError, match="init 'words'"):
        dept(init="words")
    with pytest.raises(ValueError, match="5 tokens, and dept has offsets for 4"):
        started(params, dept(2, 2, 4))
    with pytest.raises(ValueError, match="prompt 101"):
        budget(100, 768, 256, 101)


class Table(nn.Module):
    """An embedding alone, where the pattern looks for one."""

    @nn.compact
    def __call__(self, ids):
        return nn.Embed(10, 6, name="word")(ids)


def test_it_makes_of_embedded_tokens_what_the_reference_makes(close):
    g = {
        k: jnp.asarray(v)
        for k, v in load_file(Path(__file__).parents[2] / "third_party" / "dept" / "golden.safetensors").items()
    }
    adapted = adapt(Table().apply, dept(3, 2, 7, at="word"))
    params = {"params": {"word": {"embedding": g["embedded"].reshape(10, 6)}}}
    delta = {"params/word": {n: g[n] for n in ("prompt", "a", "b")}}
    close(adapted.apply(params, delta, jnp.arange(10).reshape(2, 5)), g["output"])
    assert float(jnp.abs(g["a_at_start"]).max()) <= 1 / np.sqrt(2)
    assert float(g["scaling"][0]) == pytest.approx(8 / np.sqrt(2))
