"""From a folder to `(model, params)` and back: which class a config names, which tensor is which parameter.

Reading is strict. Every parameter of the model must be in the folder with its shape and a float type, and every tensor
of the folder must be a parameter, a head the model does not have by its class, or a buffer known to carry nothing.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from jaxpeft.models import clip, decoder, encoder, encoder_decoder, vit
from jaxpeft.models.clip import Clip, ClipConfig
from jaxpeft.models.decoder import Decoder, DecoderConfig
from jaxpeft.models.encoder import Encoder, EncoderConfig, SequenceClassifier, label_names
from jaxpeft.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from jaxpeft.models.folder import (
    FLOATS,
    Entry,
    ModelFolderError,
    read_config,
    read_index,
    read_tensors,
    write_folder,
)
from jaxpeft.models.layers import stack_layers, unstack_layers
from jaxpeft.models.names import TRANSFORMS, Row, stored_shape, to_hf, to_ours
from jaxpeft.models.vit import ImageClassifier, VisionConfig, VisionTransformer
from jaxpeft.tensor_names import near_name

# model_type -> build(config dictionary, tensor names or None, overrides)
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "bert": encoder.build,
    "roberta": encoder.build,
    "gpt2": decoder.build,
    "llama": decoder.build,
    "t5": encoder_decoder.build,
    "vit": vit.build,
    "clip": clip.build,
}
MODELS: dict[type[Any], type[nn.Module]] = {
    EncoderConfig: Encoder,
    DecoderConfig: Decoder,
    EncoderDecoderConfig: EncoderDecoder,
    VisionConfig: VisionTransformer,
    ClipConfig: Clip,
}
_BUFFERS = (
    r".*\.position_ids",
    r".*rotary_emb\.inv_freq",
    r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",  # GPT-2's causal mask; its parameters are `c_attn.bias`
)
_LEAVES = (("kernel", "weight"), ("embedding", "weight"), ("scale", "weight"))


def model_from_config(hf: Mapping[str, Any], **overrides: Any) -> Any:
    """The model that a `config.json` dictionary names, without parameters.

    `overrides` replace fields of our config (`scan=True`, `dtype="bfloat16"`). The class follows `architectures`.
    """
    return _build(hf, None, overrides)


def load_model(folder: str | os.PathLike[str], **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """The model of a folder and its variables `{"params": ...}`, in `param_dtype` (float32 if not overridden).

    Example: `model, params = load_model("all-MiniLM-L6-v2", scan=True)`, then `model.apply(params, ids, mask)`.
    Raises `ModelFolderError` where the folder is not what its config says.
    """
    hf = read_config(folder)
    index = read_index(folder)
    model = _build(hf, frozenset(index), overrides, str(folder))
    return model, _read_params(model, index, str(folder))


def load_classifier(
    folder: str | os.PathLike[str],
    num_labels: int | None = None,
    *,
    pooling: str | None = None,
    key: Array | None = None,
    fresh_head: bool = False,
    **overrides: Any,
) -> tuple[Any, dict[str, Any]]:
    """A classifier on the folder's backbone.

    A folder that holds a classifier gives its own head, unless `fresh_head`; any other gets a new one, initialised from
    `key`, with `num_labels` classes over `pooling` ("mean", "first" or "bert"; "mean" if None; text models only).
    """
    hf = read_config(folder)
    index = read_index(folder)
    base = _build(hf, frozenset(index), overrides, str(folder))
    stored = getattr(base, "num_labels", None)
    if stored is not None and not fresh_head:
        if num_labels not in (None, stored):
            raise ModelFolderError(
                f"{folder} holds a head of {stored} labels, {num_labels} were asked; pass fresh_head=True for a new one"
            )
        if pooling not in (None, getattr(base, "pooling", None)):
            raise ModelFolderError(
                f"the head in {folder} belongs to pooling={getattr(base, 'pooling', None)!r}, asked was {pooling!r}: "
                "leave pooling out or pass fresh_head=True"
            )
        return base, _read_params(base, index, str(folder))
    if num_labels is None or num_labels < 1:
        raise ValueError(f"a new head needs num_labels of at least 1, got {num_labels}")
    if key is None:
        raise ValueError("a new head is initialised at random: pass key=jax.random.key(...)")
    model = _with_head(base, num_labels, pooling)
    return model, _read_params(model, index, str(folder), key=key)


def save_model(
    folder: str | os.PathLike[str],
    model: Any,
    params: Mapping[str, Any],
    *,
    source: str | os.PathLike[str] | None = None,
    max_shard_bytes: int | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Write a folder that `load_model` and transformers read; `source` is a folder whose tokenizer files come along.

    `labels` are the names of a classifier's classes.

    `params` are checked against the model first: nothing is written where a name, shape or type differs.
    """
    hf = model.hf_config()
    if labels is not None:
        hf |= label_names(labels)
    expected = _expected(model)
    tree = params.get("params", params)
    if model.config.scan:
        tree = unstack_layers(tree)
    flat = flatten_dict(dict(tree), sep="/")
    missing = sorted(set(expected) - set(flat))
    left_over = sorted(set(flat) - set(expected))
    misshapen = []
    for path in sorted(set(flat) & set(expected)):
        leaf, shape = flat[path], expected[path].shape
        if not isinstance(leaf, jax.Array | np.ndarray):
            misshapen.append(f"{path}: a {type(leaf).__name__}, not an array; merge the delta first")
        elif leaf.shape != shape:
            misshapen.append(f"{path}: shape {leaf.shape}, the model has {shape}")
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            misshapen.append(f"{path}: type {leaf.dtype}, expected a float type")
    _raise_differences(f"these params are not those of {type(model).__name__}", missing, left_over, misshapen)
    tensors = {}
    rows = model.name_rows()
    for path, leaf in flat.items():
        row, _, name = _row_of(rows, path)
        tensors[name] = TRANSFORMS[row.transform][1](np.asarray(leaf))
    write_folder(folder, hf, tensors, max_shard_bytes=max_shard_bytes, source=source)


def hf_name(model_or_config: Any, path: str, *, stored: bool = False) -> tuple[str, str]:
    """The Hugging Face name of our parameter `path`, and the transform between the two arrays.

    `path` may start with "params/", be stacked (`layers/...`: the name then holds "{i}") or stop at the module
    (`layers_0/attention/query`: the name then stops there, too). Names are those of the module tree, after which PEFT
    adapters are named; `stored=True` gives those in files (they differ for ViT).

        hf_name(classifier, "backbone/layers_0/attention/query/kernel")
        # ("bert.encoder.layer.0.attention.self.query.weight", "transpose")
    """
    rows = _model_of(model_or_config).name_rows()
    path = path.removeprefix("params/")
    for leaf, suffix in (("", ""), *((f"/{ours}", f".{theirs}") for ours, theirs in _LEAVES)):
        found = to_hf(rows, path + leaf)
        if found:
            row, tree_name, file_name = found
            return (file_name if stored else tree_name).removesuffix(suffix), row.transform
    raise ValueError(f"{path!r} is no parameter with a Hugging Face name{near_name(path, [row.ours for row in rows])}")


def our_name(model_or_config: Any, name: str) -> tuple[str, str]:
    """The inverse of `hf_name`: our unrolled path and the transform, for a tensor's or a module's name."""
    rows = _model_of(model_or_config).name_rows()
    found = to_ours(rows, name)
    if found:
        return found[1], found[0].transform
    found = to_ours(rows, f"{name}.weight")
    if found:
        return found[1].rpartition("/")[0], found[0].transform
    raise ValueError(f"{name!r} is no tensor of this model{near_name(name, [row.hf for row in rows])}")


# ------------------------------------------------------------------------------------------------ inner parts


def _build(
    hf: Mapping[str, Any], names: frozenset[str] | None, overrides: Mapping[str, Any], where: str = "the config"
) -> Any:
    kind = hf.get("model_type")
    if kind not in BUILDERS:
        raise ModelFolderError(f"{where} is of model_type {kind!r}; known: {', '.join(sorted(BUILDERS))}")
    try:
        return BUILDERS[kind](hf, names, overrides)
    except ValueError as error:
        raise ModelFolderError(f"{where}: {error}") from error
    except (KeyError, TypeError) as error:
        raise ModelFolderError(f"{where} has a {kind} configuration that cannot be read: {error!r}") from error


def _model_of(model_or_config: Any) -> Any:
    if type(model_or_config) in MODELS:
        return MODELS[type(model_or_config)](model_or_config)  # pyright: ignore[reportCallIssue]
    return model_or_config


def _with_head(base: Any, num_labels: int, pooling: str | None) -> Any:
    if isinstance(base, Encoder | SequenceClassifier):
        pooling = pooling or "mean"
        config = dataclasses.replace(base.config, pooler=pooling == "bert")
        return SequenceClassifier(config, num_labels, pooling)
    if isinstance(base, VisionTransformer | ImageClassifier):
        if pooling is not None:
            raise ValueError(f"an image classifier always reads the first token; pooling={pooling!r} was asked")
        return ImageClassifier(dataclasses.replace(base.config, pooler=False), num_labels)
    raise ValueError(f"{type(base).__name__} has no classifier here; those of BERT, RoBERTa and ViT folders do")


def _expected(model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of the unrolled model by path, from shapes alone."""
    plain = model.clone(config=dataclasses.replace(model.config, scan=False, remat=False))
    shapes = jax.eval_shape(plain.init, jax.random.key(0), *plain.dummy_inputs())
    return dict(flatten_dict(shapes["params"], sep="/"))  # pyright: ignore[reportReturnType]


def _row_of(rows: Sequence[Row], path: str) -> tuple[Row, str, str]:
    found = to_hf(rows, path)
    if found is None:
        raise AssertionError(f"the name table lacks {path}")
    return found


def _read_params(model: Any, index: Mapping[str, Entry], where: str, key: Array | None = None) -> dict[str, Any]:
    """The variables of `model` from the tensors of `index`; with `key`, head and pooler may be absent there."""
    expected = _expected(model)
    rows = model.name_rows()
    prefix, ignorable = model.reading()
    if key is not None:
        ignorable = (*ignorable, r"classifier\..*")  # an old head of another kind
    source: dict[str, tuple[str, str]] = {}  # tensor name -> our path, transform
    taken: dict[str, str] = {}
    left_over, misshapen = [], []
    for name, entry in index.items():
        hit = _resolve(rows, name, prefix, expected)
        if hit is None:
            if not any(re.fullmatch(pattern, name) for pattern in (*_BUFFERS, *ignorable)):
                left_over.append(name)
            continue
        path, transform = hit
        shape = stored_shape(transform, expected[path].shape)
        if key is not None and _is_head(path) and entry.shape != shape:
            continue
        if path in taken:
            misshapen.append(f"{name}: the same parameter as {taken[path]}")
        elif entry.shape != shape:
            misshapen.append(f"{name}: shape {entry.shape}, the config wants {shape}")
        elif entry.dtype not in FLOATS:
            misshapen.append(f"{name}: type {entry.dtype}, expected one of {', '.join(sorted(FLOATS))}")
        taken[path] = name
        source[name] = (path, transform)
    absent = sorted(set(expected) - set(taken))
    fresh = [path for path in absent if key is not None and _is_head(path)]
    missing = [_row_of(rows, path)[2] for path in absent if path not in fresh]
    _raise_differences(f"{where} does not hold the {type(model).__name__} of its config", missing, left_over, misshapen)

    dtype = model.config.param_dtype

    def convert(name: str, array: np.ndarray) -> Array:
        return jnp.asarray(TRANSFORMS[source[name][1]][0](array).astype(dtype))

    flat = {source[name][0]: array for name, array in read_tensors(index, list(source), convert)}
    if fresh:
        inputs = model.dummy_inputs()
        plain = model.clone(config=dataclasses.replace(model.config, scan=False, remat=False))
        # Under jit only what is returned is computed: the backbone is not initialised a second time.
        init = jax.jit(lambda key: [flatten_dict(plain.init(key, *inputs)["params"], sep="/")[path] for path in fresh])
        flat.update(zip(fresh, init(key), strict=True))
    params = unflatten_dict(flat, sep="/")
    return {"params": stack_layers(params) if model.config.scan else params}


def _is_head(path: str) -> bool:
    return path.startswith(("head/", "backbone/pooler/"))


def _resolve(rows: Sequence[Row], name: str, prefix: str, expected: Mapping[str, Any]) -> tuple[str, str] | None:
    """Our path and transform for a tensor's name, with or without the backbone's prefix, by old or new spelling."""
    modern = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
    for candidate in (modern, prefix + modern, modern.removeprefix(prefix)):
        found = to_ours(rows, candidate)
        if found and found[1] in expected:
            return found[1], found[0].transform
    return None


def _raise_differences(title: str, missing: Sequence[str], left_over: Sequence[str], misshapen: Sequence[str]) -> None:
    if missing or left_over or misshapen:
        raise ModelFolderError.of(title + ".", missing, left_over, misshapen)
