"""Generation against transformers' `generate`: the same folder, greedy, left padding, a stop token, scores.

Tokens are equal; log-probabilities agree to 1e-4 in float32, since the sums run in other orders.
"""

import functools

import jax
import numpy as np
import pytest

from jaxpeft.models import decoding, generate, load_model, new_cache
from jaxpeft.models.generation import cut

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    # Third parties: torch's and transformers' own notices say nothing about our code.
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]

SHARED = {"vocab_size": 40, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
CONFIGS = {
    "gpt2": ("GPT2", dict(n_embd=16, n_layer=2, n_head=4, n_positions=32)),
    "llama": (
        "Llama",
        dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24),
    ),
}
MASK = np.array([[1] * 6, [0] * 3 + [1] * 3, [0] + [1] * 5], np.int32)
IDS = np.random.default_rng(0).integers(2, 40, MASK.shape).astype(np.int32) * MASK
NEW = 10


@functools.lru_cache
def theirs(family):
    prefix, fields = CONFIGS[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**SHARED, **fields)
    name = "GPT2LMHeadModel" if family == "gpt2" else "LlamaForCausalLM"
    return getattr(transformers, name)(config).eval()


def generated(model, **kwargs):
    with torch.no_grad():
        return model.generate(
            input_ids=torch.tensor(IDS).long(),
            attention_mask=torch.tensor(MASK).long(),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
            **kwargs,
        )


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_and_scores_are_those_of_transformers(family, scan, tmp_path):
    original = theirs(family)
    original.save_pretrained(tmp_path)
    model, params = load_model(tmp_path, scan=scan)
    step = functools.partial(decoding(model), params)
    cache = new_cache(model.config, len(IDS), IDS.shape[1] + NEW - 1)
    run = jax.jit(lambda ids, mask, **k: generate(step, cache, ids, mask, new_tokens=NEW, **k), static_argnames="stop")
    want, got = generated(original), run(IDS, MASK)
    tokens = want.sequences[:, IDS.shape[1] :].numpy()
    np.testing.assert_array_equal(got.tokens, tokens)
    scores = torch.stack(want.scores, 1).log_softmax(-1).gather(2, torch.tensor(tokens)[:, :, None])[:, :, 0]
    np.testing.assert_allclose(got.log_probs, scores.numpy(), atol=1e-4)

    stop = int(tokens[0, 4])
    want, got = generated(original, eos_token_id=stop).sequences[:, IDS.shape[1] :].numpy(), run(IDS, MASK, stop=stop)
    np.testing.assert_array_equal(np.asarray(got.tokens)[:, : want.shape[1]], want)
    assert not np.any(np.asarray(got.tokens)[:, want.shape[1] :])


def test_top_k_and_top_p_keep_what_transformers_keeps():
    logits = (3 * np.random.default_rng(0).normal(size=(4, 50))).astype(np.float32)
    warpers = {
        (5, None): [transformers.TopKLogitsWarper(5)],
        (None, 0.7): [transformers.TopPLogitsWarper(0.7)],
        (8, 0.5): [transformers.TopKLogitsWarper(8), transformers.TopPLogitsWarper(0.5)],
    }
    for (k, p), chain in warpers.items():
        want = torch.tensor(logits)
        for warper in chain:
            want = warper(None, want)
        np.testing.assert_array_equal(np.isfinite(cut(logits, k, p)), np.isfinite(want.numpy()))
