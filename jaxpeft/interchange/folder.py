"""`save_peft` and `load_peft`: a PEFT adapter folder, whole or not at all, and read strictly."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxpeft import trees
from jaxpeft.files import Saved, write_atomically
from jaxpeft.interchange import low_rank, plain, rescaling, routed, virtual
from jaxpeft.interchange.errors import InterchangeError
from jaxpeft.interchange.keys import SUPPORTED, check_keys
from jaxpeft.interchange.layout import PREFIX, VIRTUAL_PREFIX, Part
from jaxpeft.interchange.view import View, contiguous
from jaxpeft.method import Delta, Method, Params, chain
from jaxpeft.models.decoder import Decoder
from jaxpeft.models.encoder import Encoder, SequenceClassifier
from jaxpeft.models.encoder_decoder import EncoderDecoder

CONFIG, ARRAYS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_WRITERS = {
    "lora": low_rank.write,
    "dora": low_rank.write,
    "ia3": rescaling.write,
    "mhr": routed.write,
    "poly": routed.write,
    "prompt_tuning": virtual.write_prompt,
    "prefix_tuning": virtual.write_prefix,
}
_READERS = {
    "LORA": low_rank.read,
    "IA3": rescaling.read,
    "POLY": routed.read,
    "PROMPT_TUNING": virtual.read_prompt,
    "PREFIX_TUNING": virtual.read_prefix,
}


def save_peft(
    folder: Path | str, delta: Delta, method: Method, model: Any, params: Params, *, base: str | None = None
) -> Path:
    """Writes a delta as a PEFT adapter: `peft.PeftModel.from_pretrained(base_model, folder)` computes the same there.

    Args:
      folder: made if missing; an older adapter in it is replaced.
      delta: of `method`, on a model of `jaxpeft.models`, unrolled or scanned.
      method: `lora`, `dora`, `ia3`, `poly`, `mhr`, `prompt_tuning` or `prefix_tuning`, alone or in a `chain` with `head`,
        `full` or `bitfit`.
      model, params: the base.
      base: the name or folder of the base, kept in the configuration for readers who look it up there.

    Returns:
      The folder.

    Raises:
      InterchangeError: what the PEFT layout cannot say, or PEFT would compute otherwise; nothing is written then.
    """
    view = View(model, params)
    settings, tensors = _written(delta, method, view)
    settings = {"base_model_name_or_path": base, "inference_mode": True, **settings}
    arrays = {name: contiguous(x) for name, x in sorted(tensors.items())}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ARRAYS, lambda path: save_file(arrays, path, metadata={"format": "pt"}))
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    write_atomically(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
    return folder


def load_peft(folder: Path | str, model: Any, params: Params) -> Saved:
    """Reads a PEFT adapter for `model`.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      model, params: the base, unrolled or scanned: a scanned stack gets its layers' adapters stacked.

    Returns:
      `delta` and `method` (a `chain` with `head` or `full` where modules were saved whole or biases trained), and in
      `extra` the base's name and the task, if the folder tells. `adapt(model.apply, method)` takes the delta as it is.

    Raises:
      InterchangeError: no adapter in the folder, pickled weights, an unknown type or setting; tensors that are missing,
        left over or misshapen, all listed; or what PEFT computes and no method here does.
    """
    folder, view = Path(folder), View(model, params)
    config = _read_config(folder)
    kind = check_keys(config)
    tensors = _read_tensors(folder)
    names = frozenset(tensors)
    is_virtual = kind in ("PROMPT_TUNING", "PREFIX_TUNING")
    plan = _READERS[kind](config, view, names)
    saved = plain.Announced(config, view, names, plan.modules, VIRTUAL_PREFIX if is_virtual else PREFIX)
    _check_tensors(folder, tensors, plan.shapes | saved.shapes(), saved.ignored)
    method, delta = plan.build(tensors)
    trained = saved.build(tensors)
    extra = {k: config[k] for k in ("base_model_name_or_path", "task_type") if config.get(k)}
    parts = {method.name: (method, delta)}
    if kind == "PREFIX_TUNING" and (leaf := virtual.position_table(view)):
        own = plain.base(view, leaf)
        table = np.asarray(trained.pop(leaf.path, {"value": own})["value"])
        table = virtual.moved(view, table, -config["num_virtual_tokens"])
        if not np.array_equal(table, own):
            parts["positions"] = (
                plain.full([leaf.path], name="positions"),
                {leaf.path: {"value": trees.Fixed(jnp.asarray(table))}},
            )
    if trained:
        rest = plain.method_of(trained, view)
        parts[rest.name] = (rest, trained)
    if len(parts) == 1:
        return Saved(delta, method, extra)
    return Saved({n: d for n, (_, d) in parts.items()}, chain(*(m for m, _ in parts.values())), extra)


# ------------------------------------------------------------------------------------------------------------- writing


def _written(delta: Delta, method: Method, view: View) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    parts = _parts(method.config, delta)
    known = {*_WRITERS, *plain.METHODS}
    # Bottleneck adapters share one method and differ in name.
    others = sorted({p.config.get("name", p.config["method"]) for p in parts if p.config["method"] not in known})
    if others:
        raise InterchangeError(
            f"PEFT has no layout for {', '.join(others)} (known: {', '.join((*_WRITERS, *plain.METHODS))}). "
            "Use save_delta, or merge and save_model where the method merges"
        )
    main = [p for p in parts if p.config["method"] in _WRITERS]
    if len(main) != 1 or not main[0].delta:
        raise InterchangeError(
            f"a PEFT folder holds one adapter; this delta has {[p.config['method'] for p in main] or 'none'} beside "
            f"{[p.config['method'] for p in parts if p not in main]}. Use save_delta, or merge and save_model"
        )
    kind = main[0].config["method"]
    is_virtual = kind in ("prompt_tuning", "prefix_tuning")
    settings, tensors, adapted = _WRITERS[kind](main[0], view)
    trained = plain.values([p for p in parts if p not in main], view)
    if kind == "prefix_tuning" and (leaf := virtual.position_table(view)):
        table = trained.get(leaf, plain.base(view, leaf))
        trained[leaf] = virtual.moved(view, table, settings["num_virtual_tokens"])
    task = _task(view)
    head = plain.head_leaves(view)
    implied = {}
    if task == "SEQ_CLS" and not any(leaf in trained for leaf in head):
        if is_virtual:
            # PEFT then looks for a head in the folder, announced or not, and fails without one.
            implied = {leaf: plain.base(view, leaf) for leaf in head}
        else:
            task = None
    prefix = VIRTUAL_PREFIX if is_virtual else PREFIX
    _, unsaid = plain.write(implied, view, adapted, prefix, biases=False)
    more, beside = plain.write(trained, view, adapted, prefix, biases=settings["peft_type"] == "LORA")
    return {"task_type": task, **settings, **more}, {**tensors, **unsaid, **beside}


def _parts(config: Mapping[str, Any], delta: Any) -> list[Part]:
    """The methods of a chain, nested ones too, each with its own delta."""
    if config["method"] != "chain":
        return [Part(config, delta)]
    total = [m["name"] for m in config["methods"]]
    out = []
    for i, m in enumerate(config["methods"]):
        label = m["name"] if total.count(m["name"]) == 1 else f"{m['name']}_{total[:i].count(m['name'])}"
        if label not in delta:
            raise InterchangeError(f"the delta has no {label!r}: it belongs to another chain")
        out += _parts(m, delta[label])
    return out


def _task(view: View) -> str | None:
    """PEFT's task, which chooses the class that runs the model; None where no class is needed or fits."""
    if isinstance(view.model, SequenceClassifier):
        architecture = view.model.hf_config()["architectures"][0]
        return "SEQ_CLS" if architecture.endswith("ForSequenceClassification") else None
    tasks = {Decoder: "CAUSAL_LM", EncoderDecoder: "SEQ_2_SEQ_LM", Encoder: "FEATURE_EXTRACTION"}
    return tasks.get(type(view.model))


# ------------------------------------------------------------------------------------------------------------- reading


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        inner = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
        hint = f"; its sub-folders {', '.join(inner)} hold adapters: name one of them" if inner else ""
        raise InterchangeError(f"there is no {CONFIG} in {folder}: it is not the folder of a PEFT adapter{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise InterchangeError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(config, dict):
        raise InterchangeError(f"{path} is not the configuration of an adapter; one names a peft_type, {SUPPORTED[0]}")
    return config


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    path = folder / ARRAYS
    if not path.is_file():
        if (folder / PICKLED).is_file():
            raise InterchangeError(
                f"{folder} holds a pickled {PICKLED}, which can run code when opened and is not read here. Convert it "
                "once where you trust it: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)"
            )
        raise InterchangeError(f"there is no {ARRAYS} in {folder}: the adapter's tensors are missing")
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as e:
        raise InterchangeError(f"{path} cannot be read ({e}): it is cut short or foreign; fetch it again") from e


def _check_tensors(
    folder: Path, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], ignored: set[str]
) -> None:
    missing = sorted(set(shapes) - set(tensors))
    left_over = sorted(set(tensors) - set(shapes) - ignored)
    misshapen = [
        f"{name}: shape {tensors[name].shape}, expected {shape}"
        for name, shape in sorted(shapes.items())
        if name in tensors and tensors[name].shape != tuple(shape)
    ] + [
        f"{name}: type {x.dtype}, expected a float type"
        for name, x in sorted(tensors.items())
        if name in shapes and not jnp.issubdtype(x.dtype, jnp.floating)
    ]
    if missing or left_over or misshapen:
        title = f"{folder} does not hold the adapter of its {CONFIG} for this model."
        raise InterchangeError.of(title, missing, left_over, misshapen)
