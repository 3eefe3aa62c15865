"""Against numbers recorded from reference implementations (third_party/): no torch is needed.

The records hold seven digits of float32; sums run in another order here. Logits of two layers therefore agree to 2e-5,
single layers to 1e-5.
"""

import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxpeft
from jaxpeft.adapt.prefix_tuning import prefix_tuning, tables
from jaxpeft.adapt.unified import Design, hooks_of
from jaxpeft.hooks import discover
from jaxpeft.method import Call
from jaxpeft.models import Encoder, EncoderConfig, load_model

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "parity"))
from golden import fill, inputs  # noqa: E402  (makes weights and inputs from names; imports no torch)


def recorded(name):
    return json.loads((ROOT / "third_party" / f"{name}.json").read_text())


def arrays(tree):
    return {k: jnp.asarray(v, jnp.float32) for k, v in tree.items()}


MODELS = recorded("transformers")["models"]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    held = MODELS[name]
    tensors = {k: fill(k, shape) for k, shape in held["shapes"].items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {**held["config"], "architectures": [name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, params = load_model(tmp_path)
    given = inputs(config["model_type"])
    if "pixel_values" in given:
        x = (jnp.asarray(given["pixel_values"], jnp.float32).transpose(0, 2, 3, 1),)
    else:
        ids, mask = (jnp.asarray(given[k], jnp.int32) for k in ("input_ids", "attention_mask"))
        decoder = given.get("decoder_input_ids")
        x = (ids, mask) if decoder is None else (ids, jnp.asarray(decoder.copy(), jnp.int32), mask)
    got, want = np.asarray(jax.jit(model.apply)(params, *x)), np.asarray(held["logits"])
    real = slice(None)
    if name in ("GPT2LMHeadModel", "LlamaForCausalLM"):  # logits at padding mean nothing
        real = given["attention_mask"] == 1
    np.testing.assert_allclose(got[real], want[real], atol=2e-5, rtol=2e-5)


PEFT = recorded("peft")["cases"]


@pytest.mark.parametrize("case", PEFT)
def test_low_rank_and_rescaled_layers_are_those_of_peft(case):
    kind, setting = case.split(" ", 1)
    held = PEFT[case]
    p = {k.replace(".default", "").replace(".weight", ""): v for k, v in arrays(held["parameters"]).items()}
    w, x = p["layer.base_layer"], jnp.asarray(held["input"], jnp.int32 if kind == "embedding" else jnp.float32)
    bias = p.get("layer.base_layer.bias", jnp.zeros(()))
    if kind == "linear":
        params, model = {"kernel": w.T}, lambda params, x: x @ params["kernel"] + bias[None]
    elif kind == "embedding":
        params, model = {"kernel": w}, lambda params, x: jnp.take(params["kernel"], x, axis=0)
    else:
        params = {"kernel": w.transpose(2, 3, 1, 0)}  # (h, w, in, out)
        numbers = ("NHWC", "HWIO", "NHWC")
        x = x.transpose(0, 2, 3, 1)

        def model(params, x):
            y = jax.lax.conv_general_dilated(x, params["kernel"], (1, 1), [(1, 1)] * 2, dimension_numbers=numbers)
            return y + bias[None, None, None]

    if setting.startswith("ia3"):
        inside = "feed" in setting
        method = jaxpeft.ia3("kernel" if not inside else (), "kernel" if inside else None)
        vector = p["layer.ia3_l"].reshape(-1)
        # The output's rescaling meets the bias too; this hand-written model adds it itself.
        if not inside:
            model = lambda params, x: x @ params["kernel"]
        adapted = jaxpeft.adapt(model, method, on_dense="refuse")
        delta = adapted.init(jax.random.key(0), params, x)
        (name,) = delta["kernel"]
        delta = {"kernel": {name: vector.reshape(delta["kernel"][name].shape)}}
        got = adapted.apply(params, delta, x) + (0 if inside else (vector * bias)[None])
    else:
        make = jaxpeft.dora if setting == "dora" else jaxpeft.lora
        more = {"scaling": "rslora"} if setting == "rslora" else {}
        adapted = jaxpeft.adapt(model, make(2, 3.0, "kernel", **more), on_dense="refuse")
        delta = adapted.init(jax.random.key(0), params, x)
        if kind == "embedding":
            own = {"a": p["layer.lora_embedding_A"].T, "b": p["layer.lora_embedding_B"].T}
        elif kind == "linear":
            own = {"a": p["layer.lora_A"].T, "b": p["layer.lora_B"].T}
        else:
            own = {"a": p["layer.lora_A"].transpose(2, 3, 1, 0), "b": p["layer.lora_B"][:, :, 0, 0].T}
        if setting == "dora":
            own["magnitude"] = p["layer.lora_magnitude_vector"].reshape(-1)
        assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in delta["kernel"].items()}
        got = adapted.apply(params, {"kernel": own}, x)
    want = np.asarray(held["output"])
    got = np.asarray(got).transpose(0, 3, 1, 2) if kind == "conv" else np.asarray(got)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


UNIFIED = recorded("unified")


class Nothing(nn.Module):
    """A sub-layer that gives zero: what comes out is the adapter's change."""

    @nn.compact
    def __call__(self, x):
        return jnp.zeros_like(x)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Nothing(name="mlp")(x)


@pytest.mark.parametrize("case", UNIFIED["adapters"]["cases"])
def test_the_bottleneck_is_that_of_the_papers_code(case):
    held = UNIFIED["adapters"]["cases"][case]
    p = arrays(held["parameters"])
    norm, scale = case.removeprefix("norm ").split(", scale ")
    learned = scale == "learnable_scalar"
    design = Design(insertion="parallel", composition="scaled", norm=norm, scale=None if learned else float(scale))
    x = jnp.asarray(UNIFIED["adapters"]["input"], jnp.float32)
    adapted = jaxpeft.adapt(Net().apply, jaxpeft.sublayer(design, 3, at="mlp"))
    delta = adapted.init(jax.random.key(0), {}, x)
    own = {
        "down": p["down_proj.weight"].T,
        "down_bias": p["down_proj.bias"],
        "up": p["up_proj.weight"].T,
        "up_bias": p["up_proj.bias"],
    }
    if norm != "none":
        own |= {f"norm_{n}": p[f"adapter_layer_norm_before.{w}"] for n, w in (("scale", "weight"), ("bias", "bias"))}
    if learned:
        own["amount"] = p["scale"].reshape(())
    ((place, start),) = delta.items()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in start.items()}
    np.testing.assert_allclose(adapted.apply({}, {place: own}, x), held["output"], atol=1e-5, rtol=1e-5)


def test_the_gate_is_that_of_the_papers_code():
    """λ = sigmoid(lse(prefix logits) - lse(context logits)), and the context's weight is 1 - λ."""
    held = UNIFIED["gate"]
    a, b = (jax.nn.logsumexp(jnp.asarray(held[k], jnp.float32), axis=-1) for k in ("prefix_logits", "context_logits"))
    prefix, context = (np.asarray(w)[..., 0] for w in held["weights"])
    np.testing.assert_allclose(jax.nn.sigmoid(a - b), prefix, atol=1e-6)
    np.testing.assert_allclose(jax.nn.sigmoid(b - a), context, atol=1e-6)


def test_the_prefix_networks_tables_are_those_of_the_papers_code():
    held = UNIFIED["prefix"]
    p = arrays(held["parameters"])
    delta = {
        "embedding": p["wte_enc.weight"],
        "w1": p["control_trans_enc.0.weight"].T,
        "b1": p["control_trans_enc.0.bias"],
        "w2": p["control_trans_enc.2.weight"].T,
        "b2": p["control_trans_enc.2.bias"],
    }
    config = EncoderConfig(vocab=9, width=8, layers=2, heads=2, head_dim=4, mlp_width=8)
    model, ids = Encoder(config), jnp.ones((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    (kind,) = jax.eval_shape(jaxpeft.adapt(model.apply, prefix_tuning(3, 5)).init, jax.random.key(0), params, ids)
    slots = discover(
        hooks_of(jaxpeft.DESIGNS["prefix_tuning"][0], 3, None, 0.0, None), Call(model.apply, params, (ids,))
    )
    got = tables({kind: delta}, slots)
    for layer, (place, want) in enumerate(zip(slots, held["layers"])):
        for ours, theirs in (("key", "prev_key"), ("value", "prev_value")):
            x = np.asarray(want[theirs]).transpose(1, 0, 2)  # (heads, l, d_h) there
            np.testing.assert_allclose(got[place][ours], x, atol=1e-5, rtol=1e-5, err_msg=f"layer {layer}")
