"""Every backbone against its torch original: a folder saved there answers the same here, and the other way round.

The torch models are small and random. Logits agree to 1e-4 in float32 (observed: under 1e-5), since the sums
run in other orders.
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.models import (
    hf_name,
    load_classifier,
    load_model,
    our_name,
    positions_from_mask,
    save_model,
    stack_layers,
)
from jaxpeft.models.encoder_decoder import relative_buckets

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    # Third parties: torch's and transformers' own notices say nothing about our code.
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]

TOLERANCE = 1e-4
T = 9  # tokens
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
BERT = {**SMALL, "vocab_size": 40, "max_position_embeddings": 14, "initializer_range": 0.5}
IMAGE = {"image_size": 8, "patch_size": 4, "initializer_range": 0.3}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 14, "initializer_range": 0.3}
LLAMA = {**SMALL, "vocab_size": 40, "num_key_value_heads": 2, "initializer_range": 0.3, "rms_norm_eps": 1e-5}
NO_TOKENS = {"bos_token_id": 0, "eos_token_id": 1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2, "d_ff": 24}
CLIP = {
    "text_config": {**SMALL, "vocab_size": 40, "max_position_embeddings": 14, "eos_token_id": 7, **NO_TOKENS},
    "vision_config": {**SMALL, "hidden_size": 24, **IMAGE},
    "projection_dim": 12,
}
CLIP["text_config"]["eos_token_id"] = 7
OLD_CLIP = {**CLIP, "text_config": {**CLIP["text_config"], "eos_token_id": 2}}

MASKS = {
    "none": None,
    "right": np.array([[1] * T, [1] * 5 + [0] * (T - 5)]),
    "left": np.array([[1] * T, [0] * 4 + [1] * (T - 4)]),
}


def original(name, config_name, fields):
    """The torch model `name`, freshly initialised, in evaluation mode."""
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**fields)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            # Norms and biases start at one and zero: moved, so that a swapped name shows.
            if value.ndim <= 1 and "logit_scale" not in key:
                value.add_(0.2 * torch.randn_like(value))
    return model


def saved(model, folder, **kwargs):
    model.save_pretrained(folder, **kwargs)
    return folder


def ids(high=40, low=3):
    return np.random.default_rng(0).integers(low, high, (2, T))


def tensors(**arrays):
    return {key: None if value is None else torch.tensor(value) for key, value in arrays.items()}


def agree(ours, theirs, mask=None):
    """Maximal difference at unmasked positions."""
    ours, theirs = np.asarray(ours, np.float64), theirs.detach().double().numpy()
    assert ours.shape == theirs.shape
    if mask is not None and ours.ndim == 3:
        ours, theirs = ours[mask == 1], theirs[mask == 1]
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def back(model, params, name, folder):
    """The torch model read from what we save; every tensor must find its place."""
    save_model(folder, model, params)
    again, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["unexpected_keys"], report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return again.eval()


def as_jax(*arrays):
    return [None if a is None else jnp.asarray(a, jnp.int32) for a in arrays]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "name",
    ["BertModel", "RobertaModel", "BertForSequenceClassification", "RobertaForSequenceClassification"],
)
def test_encoders(tmp_path, name, mask):
    family = "Roberta" if name.startswith("Roberta") else "Bert"
    fields = {**BERT, "num_labels": 3} if "Classification" in name else BERT
    theirs = original(name, f"{family}Config", fields)
    m, x = MASKS[mask], ids()
    if m is not None and family == "Roberta":
        x = np.where(m == 1, x, 1)  # RoBERTa's positions count the pad id
    types = (np.arange(T)[None] > 4).astype(int).repeat(2, 0) if family == "Bert" else None
    model, params = load_model(saved(theirs, tmp_path / "a"))
    given = tensors(input_ids=x, attention_mask=m, token_type_ids=types)
    answer = model.apply(params, *as_jax(x, m, types))

    def run(torch_model):
        out = torch_model(**given)
        return out.logits if hasattr(out, "logits") else out.last_hidden_state

    agree(answer, run(theirs), m)
    agree(answer, run(back(model, params, name, tmp_path / "b")), m)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama3", "llama_tied_biased"])
def test_decoders(tmp_path, kind, mask):
    more = {
        "llama3": {"rope_parameters": LLAMA3, "head_dim": 6},
        "llama_tied_biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    }
    if kind == "gpt2":
        name, theirs = "GPT2LMHeadModel", original("GPT2LMHeadModel", "GPT2Config", {**GPT2, **NO_TOKENS})
    else:
        name = "LlamaForCausalLM"
        theirs = original(name, "LlamaConfig", {**LLAMA, **NO_TOKENS, **more.get(kind, {})})
    m, x = MASKS[mask], ids()
    model, params = load_model(saved(theirs, tmp_path / "a"))
    given = tensors(input_ids=x, attention_mask=m)
    answer = model.apply(params, *as_jax(x, m))
    agree(answer, theirs(**given).logits, m)
    again = back(model, params, name, tmp_path / "b")
    agree(answer, again(**given).logits, m)
    if m is not None:
        positions = positions_from_mask(jnp.asarray(m))
        given["position_ids"] = torch.tensor(np.asarray(positions)).long()
        agree(model.apply(params, *as_jax(x, m), positions=positions), theirs(**given).logits, m)


def test_old_rope_spelling(tmp_path):
    theirs = original("LlamaForCausalLM", "LlamaConfig", {**LLAMA, **NO_TOKENS, "rope_parameters": LLAMA3})
    folder = saved(theirs, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (folder / "config.json").write_text(json.dumps(config))
    model, params = load_model(folder)
    agree(model.apply(params, jnp.asarray(ids())), theirs(torch.tensor(ids())).logits)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["t5", "v1.1", "v1.1-untied"])
def test_t5(tmp_path, kind, mask):
    more = {} if kind == "t5" else {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    theirs = original("T5ForConditionalGeneration", "T5Config", {**T5, **more})
    if kind == "v1.1-untied":
        theirs.config.tie_word_embeddings = False
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn_like(theirs.lm_head.weight))
    m, x = MASKS[mask], ids()
    y = ids()[:, ::-1].copy()[:, :6]
    ym = None if m is None or mask == "left" else m[:, :6]
    model, params = load_model(saved(theirs, tmp_path / "a"))
    assert model.config.tied == (kind != "v1.1-untied")
    given = tensors(input_ids=x, attention_mask=m, decoder_input_ids=y, decoder_attention_mask=ym)
    answer = model.apply(params, *as_jax(x, y, m, ym))
    agree(answer, theirs(**given).logits, ym)
    again = back(model, params, "T5ForConditionalGeneration", tmp_path / "b")
    agree(answer, again(**given).logits, ym)


def test_t5_buckets():
    attention = transformers.models.t5.modeling_t5.T5Attention
    for both in (True, False):
        ours = relative_buckets(300, 300, bidirectional=both, buckets=32, limit=128)
        distance = torch.arange(300)[None, :] - torch.arange(300)[:, None]
        theirs = attention._relative_position_bucket(distance, both, 32, 128)
        np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("name", ["ViTModel", "ViTForImageClassification"])
@pytest.mark.parametrize("names", ["files", "modules"])
def test_vit(tmp_path, name, names):
    from safetensors.numpy import save_file

    theirs = original(name, "ViTConfig", {**SMALL, **IMAGE, "num_labels": 3})
    folder = saved(theirs, tmp_path / "a")
    if names == "modules":  # the module tree's own names, as a state dict has them
        save_file({k: v.numpy() for k, v in theirs.state_dict().items()}, folder / "model.safetensors")
    model, params = load_model(folder)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    answer = model.apply(params, jnp.asarray(pixels.transpose(0, 2, 3, 1)))

    def run(torch_model):
        out = torch_model(torch.tensor(pixels))
        return out.logits if hasattr(out, "logits") else out.last_hidden_state

    agree(answer, run(theirs))
    agree(answer, run(back(model, params, name, tmp_path / "b")))


@pytest.mark.parametrize("fields", [CLIP, OLD_CLIP], ids=["eos", "old_eos"])
@pytest.mark.parametrize("mask", ["none", "right"])
def test_clip(tmp_path, fields, mask):
    theirs = original("CLIPModel", "CLIPConfig", fields)
    x = ids()
    x[:, 4] = 7
    if fields is OLD_CLIP:
        x[:, 4] = 39
    m = MASKS[mask]
    pixels = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
    model, params = load_model(saved(theirs, tmp_path / "a"))
    given = tensors(input_ids=x, attention_mask=m, pixel_values=pixels)
    answer = model.apply(params, jnp.asarray(x), jnp.asarray(pixels.transpose(0, 2, 3, 1)), *as_jax(m))
    agree(answer, theirs(**given).logits_per_image)
    agree(answer, back(model, params, "CLIPModel", tmp_path / "b")(**given).logits_per_image)


def test_sharded_both_ways(tmp_path):
    theirs = original("BertModel", "BertConfig", BERT)
    x = ids()
    folder = saved(theirs, tmp_path / "a", max_shard_size="6KB")
    assert (folder / "model.safetensors.index.json").is_file()
    model, params = load_model(folder, scan=True)
    want = theirs(torch.tensor(x)).last_hidden_state
    agree(model.apply(params, jnp.asarray(x)), want)
    save_model(tmp_path / "b", model, params, max_shard_bytes=5000)
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 2
    agree(
        model.apply(params, jnp.asarray(x)), transformers.AutoModel.from_pretrained(tmp_path / "b")(torch.tensor(x))[0]
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_folders(tmp_path, dtype):
    theirs = original("BertModel", "BertConfig", BERT).to(getattr(torch, dtype))
    folder = saved(theirs, tmp_path / "a")
    model, params = load_model(folder, param_dtype=dtype)
    save_model(tmp_path / "b", model, params)
    again = transformers.AutoModel.from_pretrained(tmp_path / "b", dtype=getattr(torch, dtype))
    for (key, a), (_, b) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    full, params = load_model(folder)
    agree(full.apply(params, jnp.asarray(ids())), theirs.float()(torch.tensor(ids())).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "config", "fields"),
    [
        ("BertForSequenceClassification", "BertConfig", BERT),
        ("RobertaForSequenceClassification", "RobertaConfig", BERT),
        ("GPT2LMHeadModel", "GPT2Config", {**GPT2, **NO_TOKENS}),
        ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, **NO_TOKENS}),
        ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
        ("ViTForImageClassification", "ViTConfig", {**SMALL, **IMAGE}),
        ("CLIPModel", "CLIPConfig", CLIP),
    ],
)
def test_names_are_those_of_the_module_tree(tmp_path, name, config, fields):
    """`hf_name` gives parameters of the torch module itself, which adapters are named after, and `our_name` returns."""
    from flax.traverse_util import flatten_dict

    theirs = original(name, config, fields)
    model, params = load_model(saved(theirs, tmp_path))
    there = {key for key, _ in theirs.named_parameters()}
    paths = ["params/" + "/".join(path) for path in flatten_dict(params["params"])]
    assert {hf_name(model, path)[0] for path in paths} == there
    for path in paths:
        name_there, transform = hf_name(model, path)
        assert our_name(model, name_there) == (path.removeprefix("params/"), transform)
        if "kernel" in path:
            assert theirs.get_submodule(hf_name(model, path.rpartition("/")[0])[0]) is not None


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_language_model_heads_are_left_unread(tmp_path, kind):
    theirs = original(kind, f"{kind[:-11]}Config", BERT)
    folder = saved(theirs, tmp_path / "a")
    model, params = load_model(folder)
    want = getattr(theirs, theirs.base_model_prefix)(torch.tensor(ids())).last_hidden_state
    agree(model.apply(params, jnp.asarray(ids())), want)
    classifier, params = load_classifier(folder, 3, key=jax.random.key(0), scan=True)
    assert classifier.apply(params, jnp.asarray(ids())).shape == (2, 3)


def test_gpt2_without_prefix_and_with_buffers(tmp_path):
    """The published gpt2 folder: no `transformer.`, and a causal mask among the tensors."""
    from safetensors.numpy import save_file

    theirs = original("GPT2LMHeadModel", "GPT2Config", {**GPT2, **NO_TOKENS})
    folder = saved(theirs, tmp_path)
    state = {k.removeprefix("transformer."): v.numpy() for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    state["h.0.attn.bias"] = np.tril(np.ones((1, 1, 4, 4), np.uint8))
    save_file(state, folder / "model.safetensors")
    model, params = load_model(folder)
    agree(model.apply(params, jnp.asarray(ids())), theirs(torch.tensor(ids())).logits)


def test_virtual_tokens_as_embeddings_in_front(tmp_path):
    """Virtual tokens from a hook equal the torch model on embeddings with the same rows in front."""
    import flax.linen as nn

    prompt = np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)
    m, x = MASKS["right"], ids(38)

    def hook(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if context.module.name == "word" and context.method_name == "__call__":
            return jnp.concatenate([jnp.broadcast_to(prompt, (2, 3, 16)), y], axis=1)
        return y

    for name, config, fields in [
        ("BertModel", "BertConfig", BERT),
        ("RobertaModel", "RobertaConfig", {**BERT, "max_position_embeddings": 16}),
        ("GPT2LMHeadModel", "GPT2Config", {**GPT2, **NO_TOKENS}),
        ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, **NO_TOKENS}),
    ]:
        theirs = original(name, config, fields)
        model, params = load_model(saved(theirs, tmp_path / name))
        with nn.intercept_methods(hook):
            answer = model.apply(params, *as_jax(x, m))
        words = theirs.get_input_embeddings()(torch.tensor(x))
        embeds = torch.cat([torch.tensor(prompt).expand(2, 3, 16), words], 1)
        mask = np.concatenate([np.ones((2, 3), int), m], 1)
        agree(answer, theirs(inputs_embeds=embeds, attention_mask=torch.tensor(mask))[0], mask)


def test_real_minilm():
    folder = Path(os.environ.get("JAXPEFT_MINILM", ""))
    if not (folder / "model.safetensors").is_file():
        pytest.skip("JAXPEFT_MINILM names no folder with all-MiniLM-L6-v2")
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    x = np.random.default_rng(0).integers(1000, 20000, (2, T))
    m = MASKS["right"]
    want = theirs(**tensors(input_ids=x, attention_mask=m))
    model, params = load_model(folder)
    hidden, pooled = model.apply(params, *as_jax(x, m), pooled=True)
    agree(hidden, want.last_hidden_state, m)
    agree(pooled, want.pooler_output)
    scanned = model.clone(config=load_model(folder, scan=True, remat=True)[0].config)
    agree(scanned.apply(stack_layers(params), *as_jax(x, m)), want.last_hidden_state, m)
