"""One whole run: a pretrained model, a data set, a method; trained, validated, tested, written to a folder.

    runs/20260102-030405-lora-r8/
      config.json   metrics.jsonl   result.json   curve.png   delta/   checkpoints/

Experiments and every sub-command of the command line go through `finetune`, so their numbers mean the same.
"""

import dataclasses
import inspect
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft import data, trees
from jaxpeft.adapt.full import head as head_method
from jaxpeft.files import load_delta, save_delta, to_plain, write_atomically
from jaxpeft.method import METHODS, Adapted, Call, Delta, Method, Params, Study, adapt, chain, entry
from jaxpeft.models import load_classifier
from jaxpeft.train import sharding
from jaxpeft.train.checkpoints import Checkpoints
from jaxpeft.train.loop import Compiled, Fit, Scores, evaluate, fit
from jaxpeft.train.metrics import Metrics
from jaxpeft.train.step import (
    Task,
    TrainState,
    create,
    image_classification,
    make_evaluation,
    make_step,
    text_classification,
)
from jaxpeft.updates import relative_rates


class ConfigError(ValueError):
    """A run's configuration that cannot work."""


@dataclass(frozen=True)
class Config:
    """What a run does. LoRA's default rate was the better of 2e-3 and 4e-3 on R8's validation split.

    Attributes:
      model: a built-in name, a folder, or a hub id.
      dataset: a built-in name, a folder or file of your own (texts or pictures), or any tensorflow-datasets name.
      method: any registered method (`jaxpeft methods` lists them).
      options: of the method, `name=value` each: rank=16 dropout=0.1 "at=**/query/kernel".
      epochs: passes over the training data.
      steps: instead of epochs, where it is above 0.
      batch_size: examples per update, over all devices.
      rate: peak learning rate; 0 takes the method's own default.
      head_rate: the head's, where it should differ; 0 for the same.
      schedule: after the warm-up: linear or cosine decay to zero, or constant.
      warmup: share of the steps in which the rate rises.
      weight_decay: AdamW's, on the delta.
      clip: norm to which gradients are clipped; 0 for none.
      accumulate: parts that a batch is computed in, one after another; 0 for parts of 4 rows on a CPU (less memory to map
        anew at each step, and more of it in the caches), else for the whole at once. The gradient is that of the whole
        batch either way.
      max_length: tokens kept of a text.
      pooling: what a text classifier reads: the mean of the tokens, the first token, or BERT's pooler.
      per_class: training examples per class; 0 for all.
      validate_every: steps between validations; 0 for once an epoch.
      save_every: steps between checkpoints; 0 for once an epoch.
      seed: of initialisation, order and dropout.
      model_dropout: whether the base model's own dropout is on in training.
      dtype: what the model computes in; parameters stay float32.
      scan: one compiled layer, looped over.
      remat: recompute activations in the backward pass.
      fsdp: devices over which the base is divided; the others divide the batch.
      test: whether the test split is scored at the end.
    """

    model: str = "all-MiniLM-L6-v2"
    dataset: str = "r8"
    method: str = "lora"
    options: tuple[str, ...] = ()
    epochs: float = 1.0
    steps: int = 0
    batch_size: int = 16
    rate: float = 0.0
    head_rate: float = 0.0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 0
    max_length: int = 128
    pooling: Literal["mean", "first", "bert"] = "mean"
    per_class: int = 0
    validate_every: int = 0
    save_every: int = 0
    seed: int = 0
    model_dropout: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan: bool = False
    remat: bool = False
    fsdp: int = 1
    test: bool = True


def config_from(fields: Mapping[str, Any]) -> Config:
    """A config from what `dataclasses.asdict` made of it and JSON of that.

    Raises:
      ConfigError: a field that there is not.
    """
    if unknown := set(fields) - {f.name for f in dataclasses.fields(Config)}:
        raise ConfigError(f"a run's configuration has no field {min(unknown)!r}: it was written by another version")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return Config(**values)


@dataclass(frozen=True)
class Loaded:
    """The expensive parts of a run, which runs of one comparison share."""

    model: Any
    params: Params
    folder: Path
    dataset: data.Dataset
    tokens: Mapping[str, Any]
    tokenizer: Any
    task: Task


def parse_options(method: str, options: tuple[str, ...]) -> dict[str, Any]:
    """`("rank=16", "at=**/kernel")` as keyword arguments of the method's factory: JSON values, else strings.

    Raises:
      ConfigError: no "=", a name that the method does not have (its names are listed), a word for a number.
    """
    known = inspect.signature(entry(method).factory).parameters
    out = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals and name in known:
            shown = "..." if known[name].default is None else repr(known[name].default)
            raise ConfigError(f"option {option!r} for {method} has no value: write name=value, as {name}={shown}")
        if not equals or name not in known:
            names = ", ".join(f"{p.name}={p.default!r}" for p in known.values() if p.name != "name")
            raise ConfigError(f"option {option!r} for {method}{trees.near(name, known)}; it takes {names}")
        try:
            out[name] = json.loads(value)
        except json.JSONDecodeError:
            out[name] = value
        # What may be traced, a number, is annotated Any.
        if isinstance(out[name], str) and known[name].annotation in (Any, int, float, bool, int | None, float | None):
            raise ConfigError(f"option {option!r} for {method}: {value!r} is a word; expected a number, true or false")
    return out


def build_method(config: Config, **overrides: Any) -> Method:
    """The configured method, with the task's head trained along."""
    factory = entry(config.method).factory
    return with_head(config, factory(**{**parse_options(config.method, config.options), **overrides}))


def prepared(config: Config, loaded: Loaded, method: Method) -> Method:
    """`method`, after it has looked at the data where it wants to; see `Method.prepare`."""
    if method.prepare is None:
        return method
    train = batches_of(loaded, "train", config.batch_size, seed=config.seed, shuffle=True)
    model = adapted_model(config, loaded, method)

    def loss(apply: Callable[..., Any], batch: Any, key: Any) -> Any:
        each = loaded.task.loss(loaded.task.forward(apply, batch, key), batch)
        return jnp.sum(each * batch.weight) / jnp.maximum(jnp.sum(batch.weight), 1)

    # The task's forward passes a key for dropout to adapted models; the base itself takes none.
    base = lambda params, *inputs, dropout_key=None, **kwargs: model.base(params, *inputs, **kwargs)
    study = Study(
        Call(base, loaded.params, inputs_of(loaded, train.batch(0))),
        loss,
        train,
        batches_of(loaded, "validation", _evaluation_rows(config)),
        config.rate or entry(config.method).rate,
        jax.random.fold_in(jax.random.key(config.seed), 1),
    )
    return method.prepare(study)


def with_head(config: Config, method: Method) -> Method:
    """The method and the task's head: it is new, so every method has to train it."""
    return method if config.method in ("full", "head") else chain(method, head_method())


def adapted_model(config: Config, loaded: Loaded, method: Method) -> Adapted:
    """The loaded model with a method; a reader's is left whole, since it reads what a narrow model does not compute."""
    model = loaded.model
    if entry(config.method).mechanism == "reader" and getattr(model.config, "narrow", False):
        model = model.clone(config=dataclasses.replace(model.config, narrow=False))
    return adapt(model.apply, method)


def check(config: Config) -> None:
    """Refuses numbers that no run can have, and what the method does not take.

    Raises:
      ConfigError: which, and what is expected.
    """
    least = dict.fromkeys(("steps", "rate", "head_rate", "weight_decay", "clip", "accumulate", "per_class"), 0)
    least |= dict.fromkeys(("validate_every", "save_every"), 0) | dict.fromkeys(("max_length", "fsdp"), 1)
    for name, low in least.items():
        if not getattr(config, name) >= low:
            raise ConfigError(f"{name}={getattr(config, name)}: expected {low} or more")
    if not 0 <= config.warmup < 1:
        raise ConfigError(f"warmup={config.warmup}: it is a share of the steps, in [0, 1)")
    if not config.steps and not config.epochs > 0:
        raise ConfigError(f"epochs={config.epochs}: nothing would be trained; give a positive number, or steps")
    if jax.device_count() % config.fsdp:
        raise ConfigError(f"fsdp={config.fsdp} does not divide the {jax.device_count()} devices there are")
    parse_options(config.method, config.options)


def load(config: Config) -> Loaded:
    """Reads model and data; everything is cached on disk after the first time.

    Raises:
      ConfigError, DatasetError, AssetError, ModelFolderError.
    """
    check(config)  # wrong words are said before anything is read
    dataset = data.load(config.dataset)
    if config.per_class:
        dataset = data.subsample(dataset, per_class=config.per_class, seed=config.seed, short="keep")
    folder = data.model_folder(config.model)
    overrides: dict[str, Any] = {"dtype": config.dtype, "scan": config.scan, "remat": config.remat}
    text = dataset.kind == "text"
    if text:
        overrides["narrow"] = True  # what only the first token's state decides is computed for it alone
    model, params = load_classifier(
        folder,
        dataset.num_classes,
        pooling=config.pooling if text else None,
        key=jax.random.key(config.seed),
        fresh_head=True,
        **overrides,
    )
    if not text:
        pixels = {
            name: _fitted(split.inputs, dataset.pixel_max, model.config) for name, split in dataset.splits.items()
        }
        return Loaded(model, params, folder, dataset, pixels, None, image_classification(config.model_dropout))
    tokenizer = data.Tokenizer(folder)
    tokens = {name: tokenizer.encode(list(split.inputs), config.max_length) for name, split in dataset.splits.items()}
    return Loaded(model, params, folder, dataset, tokens, tokenizer, text_classification(config.model_dropout))


def _fitted(images: Any, pixel_max: float, config: Any) -> Any:
    """Images as the model reads them: its size and channels, values in [-1, 1] as its preprocessing has them."""
    x = jnp.asarray(images, jnp.float32) / pixel_max
    shape = (len(x), *config.image, x.shape[-1])
    x = x if x.shape == shape else jax.image.resize(x, shape, "bilinear")
    x = jnp.repeat(x, config.channels, axis=-1) if x.shape[-1] == 1 < config.channels else x
    return np.asarray(2 * x - 1)


def batches_of(loaded: Loaded, split: str, batch_size: int, *, seed: int = 0, shuffle: bool = False) -> Any:
    """The batches of one split, of this process's rows."""
    labels = loaded.dataset.splits[split].labels
    where = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    options = {"batch_size": batch_size, "seed": seed, "shuffle": shuffle, **where}
    if loaded.tokenizer is None:
        return data.image_batches(loaded.tokens[split], labels, pixel_max=1, **options)
    return data.text_batches(loaded.tokens[split], labels, pad_id=loaded.tokenizer.pad_id, **options)


def schedule_of(config: Config, steps: int, peak: Any) -> optax.Schedule:
    """Rises over the warm-up, then decays to zero at `steps`; `peak` may be traced."""
    up = round(config.warmup * steps)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, max(steps - up, 1)),
        "cosine": optax.cosine_decay_schedule(peak, max(steps - up, 1)),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(up, 1)), after], [up]) if up else after


def optimiser_of(config: Config, steps: int, rate: Any = None, rates: Any = ()) -> optax.GradientTransformation:
    """AdamW on the delta, clipped; the head at a rate of its own where one is set, parts at their method's `rates`."""
    peak = (config.rate or entry(config.method).rate) if rate is None else rate
    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []

    def adam(peak: Any) -> optax.GradientTransformation:
        return optax.adamw(schedule_of(config, steps, peak), weight_decay=config.weight_decay)

    after = [relative_rates(rates)] if rates else []
    if not config.head_rate:
        return optax.chain(*clip, adam(peak), *after)
    parts: dict[Any, Any] = {"head": adam(config.head_rate), "delta": adam(peak)}
    rule = {"head": "**/head/**"}
    by_part = optax.multi_transform(parts, lambda tree: trees.labels(tree, rule, default="delta"))
    return optax.chain(*clip, by_part, *after)


def parts_of(config: Config) -> int:
    """How many parts a batch is computed in; see `Config.accumulate`."""
    if config.accumulate:
        return config.accumulate
    rows = config.batch_size // jax.device_count()
    return rows // 4 if jax.default_backend() == "cpu" and rows % 4 == 0 and rows > 4 else 1


def total_steps(config: Config, batches: Any) -> int:
    return config.steps or max(1, round(config.epochs * len(batches)))


Progress = Callable[[int, int, float, dict[str, float]], None]


def finetune(
    config: Config,
    folder: Path | None,
    *,
    loaded: Loaded | None = None,
    resume: bool = False,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Trains, validates, tests.

    Args:
      config: of the run.
      folder: where everything is written; None for nowhere.
      loaded: from `load`, to share between runs.
      resume: continue from the newest checkpoint in `folder`, to the same final numbers, bit for bit.
      progress: `(step, steps, examples per second, numbers)`.

    Returns:
      The result as plain data: test and validation scores, trained parameters, seconds, bytes.

    Raises:
      ConfigError, DatasetError, AssetError, ModelFolderError, PatternError, NonFiniteError, Interrupted.
    """
    began = time.perf_counter()
    check(config)
    loaded = load(config) if loaded is None else loaded
    method = prepared(config, loaded, build_method(config))
    adapted = adapted_model(config, loaded, method)
    train = batches_of(loaded, "train", config.batch_size, seed=config.seed, shuffle=True)
    steps = total_steps(config, train)
    optimiser = optimiser_of(config, steps, rates=method.rates)
    params, place, state = _placed(config, loaded, adapted, optimiser, train)

    evaluation = Compiled(make_evaluation(adapted, loaded.task))
    step = Compiled(make_step(adapted, loaded.task, optimiser, accumulate=parts_of(config)), donate_argnums=0)
    held_out = batches_of(loaded, "validation", _evaluation_rows(config))

    last: Scores | None = None

    def validate(state: TrainState) -> Scores:
        nonlocal last
        last = evaluate(evaluation, state.delta, params, held_out, place)
        return last

    checkpoints = metrics = None
    if folder is not None:
        checkpoints = Checkpoints(folder)
        if resume:
            state = checkpoints.restore(state)
        metrics = Metrics(folder, keep_until=int(state.step) if resume else None)
        write_json(folder / "config.json", dataclasses.asdict(config))
    how = Fit(
        validate=validate if len(loaded.dataset.validation) else None,
        validate_every=config.validate_every or len(train),
        checkpoints=checkpoints,
        save_every=config.save_every or len(train),
        metrics=metrics,
        progress=lambda at, rate, numbers: progress(at, steps, rate, numbers),
        place=place,
    )
    training = time.perf_counter()
    state = fit(step, state, params, train, steps, how)
    seconds = time.perf_counter() - training
    result = _result(config, loaded, state.delta, params, step, last or validate(state))
    if config.test:
        scores = evaluate(evaluation, state.delta, params, batches_of(loaded, "test", _evaluation_rows(config)), place)
        result |= {"test_accuracy": scores.accuracy, "test_macro_f1": scores.macro_f1, "test_loss": scores.loss}
    result |= {"steps": steps, "train_seconds": seconds, "compile_seconds": step.seconds + evaluation.seconds}
    result["seconds"] = time.perf_counter() - began
    if folder is not None:
        delta = jax.device_get(state.delta)
        labels = list(loaded.dataset.labels)
        where = save_delta(
            folder / "delta", delta, method, loaded.params, labels=labels, config=dataclasses.asdict(config)
        )
        result["delta_bytes"] = sum(f.stat().st_size for f in where.iterdir())
        write_json(folder / "result.json", result)
    return result


def _placed(
    config: Config, loaded: Loaded, adapted: Adapted, optimiser: Any, train: Any
) -> tuple[Any, Any, TrainState]:
    """Base and state on the devices there are, and what puts a batch there."""
    key = jax.random.key(config.seed)
    example = train.batch(0)
    init = lambda key, params: adapted.init(key, params, *inputs_of(loaded, example))
    state = create(jax.jit(init)(key, loaded.params), optimiser, config.seed)
    if jax.device_count() == 1:
        return loaded.params, None, state
    if config.batch_size % jax.device_count():
        raise ConfigError(
            f"batch_size={config.batch_size} on {jax.device_count()} devices: the batch must divide by the devices"
        )
    mesh = sharding.make_mesh(jax.device_count() // config.fsdp, config.fsdp)
    place = lambda batch: sharding.place_batch(mesh, batch)
    return sharding.place_base(mesh, loaded.params), place, sharding.place_state(mesh, state)


def inputs_of(loaded: Loaded, batch: Any) -> tuple[Any, ...]:
    return (batch.image,) if loaded.tokenizer is None else (batch.input_ids, batch.attention_mask)


def _evaluation_rows(config: Config) -> int:
    return max(config.batch_size, 32 // config.batch_size * config.batch_size)


def _result(
    config: Config, loaded: Loaded, delta: Delta, params: Params, step: Compiled, scores: Scores
) -> dict[str, Any]:
    trained, whole = trees.count(trees.learned(delta)[0]), trees.count(params)
    return {
        "method": config.method,
        "dataset": config.dataset,
        "kind": loaded.dataset.kind,
        "model": config.model,
        "seed": config.seed,
        "train_examples": len(loaded.dataset.train),
        "validation_accuracy": scores.accuracy,
        "validation_macro_f1": scores.macro_f1,
        "trained_parameters": trained,
        "model_parameters": whole,
        "trained_percent": 100 * trained / whole,
        "step_peak_bytes": step.peak_bytes,
        "step_temporary_bytes": step.temporary_bytes,
    }


@dataclass(frozen=True)
class Trained:
    """A finished run, ready to be used."""

    adapted: Adapted
    params: Params
    delta: Delta
    loaded: Loaded
    config: Config
    labels: tuple[str, ...]


def open_run(folder: Path) -> Trained:
    """A run from its folder (or from its `delta` folder).

    Raises:
      DeltaError: it holds no delta, or one of another base.
    """
    folder = Path(folder)
    where = folder / "delta" if (folder / "delta").is_dir() else folder
    saved = load_delta(where)
    config = config_from(saved.extra["config"])
    loaded = load(dataclasses.replace(config, per_class=0))
    saved = load_delta(where, loaded.params)
    adapted = adapted_model(config, loaded, saved.method)
    return Trained(adapted, loaded.params, saved.delta, loaded, config, tuple(saved.extra["labels"]))


def predict(run: Trained, texts: list[str], rows: int = 32) -> tuple[list[str], np.ndarray]:
    """Labels and class probabilities (n, c) of texts.

    Raises:
      ConfigError: an empty text, or a run on images.
    """
    if run.loaded.tokenizer is None:
        raise ConfigError("this run classifies images, not texts")
    if empty := [i for i, t in enumerate(texts) if not t.strip()]:
        raise ConfigError(f"text {empty[0]} is empty: there is nothing to classify")
    tokens = run.loaded.tokenizer.encode(texts, run.config.max_length, cache=False)
    batches = data.text_batches(
        tokens, None, batch_size=min(rows, len(texts)), shuffle=False, pad_id=run.loaded.tokenizer.pad_id
    )
    apply = jax.jit(lambda params, delta, ids, mask: jax.nn.softmax(run.adapted.apply(params, delta, ids, mask)))
    out = np.zeros((len(texts), len(run.labels)))
    for batch in batches.epoch():
        p = np.asarray(apply(run.params, run.delta, batch.input_ids, batch.attention_mask))
        out[batch.index[batch.index >= 0]] = p[batch.index >= 0]
    return [run.labels[i] for i in out.argmax(-1)], out


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda p: p.write_text(json.dumps(to_plain(value), indent=1) + "\n"))


def parameters_for(config: Config, loaded: Loaded) -> dict[str, int]:
    """Trained parameters of every method for this model, from shapes alone; -1 where a method does not fit it."""
    out = {}
    for name in METHODS:
        try:
            own = dataclasses.replace(config, method=name, options=())
            batch = batches_of(loaded, "validation", 2).batch(0)
            init = adapted_model(own, loaded, build_method(own)).init
            shapes = jax.eval_shape(
                lambda k, p, i=init: i(k, p, *inputs_of(loaded, batch)), jax.random.key(0), loaded.params
            )
            out[name] = trees.count(trees.learned(shapes)[0])
        except ValueError:
            out[name] = -1
    return out
