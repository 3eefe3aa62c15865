"""Small pretrained bases and the data around them, which several experiments adapt. Each is trained once and kept.

model, params, accuracy = fashion_vit(VIT, keep=True)               # a ViT on Fashion-MNIST
splits = images("digits", 28)                                       # {"train": (images, labels), ...}
model, params = byte_decoder(BYTES, english["train"], keep=True)    # a byte-level language model on manual pages
examples, model, params = sentences("r8", per_class=20)             # MiniLM with its tokens
"""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pretraining import kept
from study import Arm, Budget, Problem, images_of, rows_of, scorer, texts_of, trainer

from jaxpeft import adapt, data, full, train
from jaxpeft.models import Decoder, DecoderConfig, ImageClassifier, SequenceClassifier, VisionConfig, load_classifier
from jaxpeft.models.encoder import EncoderConfig


@dataclasses.dataclass(frozen=True)
class Vit:
    """A pre-norm ViT and its pretraining on Fashion-MNIST."""

    layers: int = 6
    width: int = 96
    heads: int = 6
    patch: int = 7
    size: int = 28
    classes: tuple[int, ...] = tuple(range(10))  # of Fashion-MNIST; the others are left for targets
    steps: int = 600
    batch: int = 64
    rate: float = 1e-3
    examples: int = 0  # of each split; 0 for all


VIT = Vit()
SMALL_VIT = Vit(layers=2, width=32, heads=4, patch=14, steps=2, batch=8, examples=40)


def vit_model(s: Vit, classes: int) -> ImageClassifier:
    config = VisionConfig(
        width=s.width,
        layers=s.layers,
        heads=s.heads,
        head_dim=s.width // s.heads,
        mlp_width=4 * s.width,
        pre_norm=True,
        norm_eps=1e-6,
        image=(s.size, s.size),
        patch=(s.patch, s.patch),
        channels=1,
    )
    return ImageClassifier(config, classes)


def images(name: str, size: int = 28, *, examples: int = 0, split_seed: int | None = None) -> dict[str, Any]:
    """Split -> (images (n, size, size, 1) in [-1, 1], labels (n,)).

    Args:
      name: a data set of images (`jaxpeft.data`).
      size: they are brought to it.
      examples: so many of each split, at random; 0 for all.
      split_seed: draws new splits of the same sizes out of all examples; None keeps the standard ones.
    """
    found = data.load(name)
    parts = {split: (np.asarray(part.inputs), np.asarray(part.labels)) for split, part in found.splits.items()}
    if split_seed is not None:
        every = [np.concatenate(arrays) for arrays in zip(*parts.values())]
        order = np.random.default_rng(split_seed).permutation(len(every[1]))
        cut = np.split(order, np.cumsum([len(labels) for _, labels in parts.values()])[:-1])
        parts = {split: (every[0][rows], every[1][rows]) for split, rows in zip(parts, cut)}
    out = {}
    for split, (inputs, labels) in parts.items():
        n = min(examples or len(labels), len(labels))
        if n < len(labels):
            rows = np.sort(np.random.default_rng(0).permutation(len(labels))[:n])
            inputs, labels = inputs[rows], labels[rows]
        x = jnp.asarray(inputs, jnp.float32) / found.pixel_max
        x = x if x.shape[1] == size else jax.image.resize(x, (n, size, size, x.shape[-1]), "bilinear")
        out[split] = (np.asarray(2 * x - 1), labels)
    return out


def of_classes(part: Any, classes: tuple[int, ...]) -> Any:
    """The examples of these classes, numbered in their order."""
    rows = np.isin(part[1], classes)
    return part[0][rows], np.searchsorted(np.sort(classes), part[1][rows])


def per_class(part: Any, count: int, seed: int) -> Any:
    """`count` random examples of each class."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(part[1] == c))[:count] for c in np.unique(part[1])]
    chosen = np.sort(np.concatenate(rows))
    return part[0][chosen], part[1][chosen]


def fashion_vit(s: Vit, keep: bool) -> tuple[ImageClassifier, Any, float]:
    """The model, its parameters, and its accuracy on Fashion-MNIST's validation split (of the classes it knows)."""
    model = vit_model(s, len(s.classes))
    parts = {k: of_classes(p, s.classes) for k, p in images("fashion-mnist", s.size, examples=s.examples).items()}
    examples = {k: images_of(*p) for k, p in parts.items() if k != "test"}
    start = jax.jit(model.init)(jax.random.key(0), parts["train"][0][:1])
    problem = Problem(model.apply, start, examples, train.image_classification())
    params = kept(
        "vit", dataclasses.asdict(s), start, lambda p: _pretrained(problem, p, s.steps, s.batch, s.rate), keep
    )
    return model, params, float(np.mean(_scores(problem, params, examples["validation"])))


def with_new_head(model: Any, params: Any, classes: int, seed: int = 1) -> tuple[ImageClassifier, Any]:
    """The same backbone with a head for other classes, drawn anew."""
    made = ImageClassifier(model.config, classes)
    size = model.config.image
    fresh = jax.jit(made.init)(jax.random.key(seed), jnp.zeros((1, *size, model.config.channels)))
    return made, {"params": {**params["params"], "head": fresh["params"]["head"]}}


def _pretrained(problem: Problem, params: Any, steps: int, batch: int, rate: float) -> Any:
    adapted, budget = adapt(problem.apply_fn, full()), Budget(steps=steps, batch=batch)
    n = problem.examples["train"].label.shape[0]
    few = jax.tree.map(lambda x: x[:1], problem.examples["train"])
    delta = adapted.init(jax.random.key(0), params, *([few.image] if hasattr(few, "image") else [few.input_ids]))
    run = trainer(adapted, problem, Arm(full()), budget)
    delta, bad, losses = run(params, delta, rate, 0, problem.examples["train"], rows_of(n, steps, min(batch, n), 0))
    assert int(bad) < 0, f"pretraining diverged at step {int(bad)}"
    print(f"pretrained: loss {float(losses[0]):.3f} to {float(losses[-20:].mean()):.3f}", flush=True)
    return adapted.merge(params, delta)


def _scores(problem: Problem, params: Any, examples: Any) -> np.ndarray:
    adapted = adapt(problem.apply_fn, full(at="**/head/**"))
    inputs = examples.image[:1] if hasattr(examples, "image") else examples.input_ids[:1]
    delta = adapted.init(jax.random.key(0), params, inputs)
    return np.asarray(scorer(adapted, problem)(params, delta, examples))


# ------------------------------------------------------------------------------------------------------------- text


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A byte-level causal transformer and its pretraining."""

    layers: int = 4
    width: int = 96
    heads: int = 4
    context: int = 96
    steps: int = 3000
    batch: int = 32
    rate: float = 2e-3


BYTES = Bytes()
SMALL_BYTES = Bytes(2, 32, 2, 24, 4, 4)


def pages(language: str, seed: int = 0) -> dict[str, np.ndarray]:
    """The manual pages of a language as streams of bytes, 80/10/10 by whole pages in the seed's order."""
    found = data.manual_pages(language)
    names = np.random.default_rng(seed).permutation(list(found.texts))
    cut = (8 * len(names) // 10, 9 * len(names) // 10)
    parts = dict(zip(("train", "validation", "test"), np.split(names, cut)))
    joined = {k: "\n\n".join(found.texts[n] for n in part).encode() for k, part in parts.items()}
    return {k: np.frombuffer(b, np.uint8) for k, b in joined.items()}


def cuts(stream: np.ndarray, rows: int, length: int, seed: int) -> np.ndarray:
    """`rows` windows of `length` bytes at random places, int32."""
    at = np.random.default_rng(seed).integers(0, len(stream) - length, rows)
    return stream[at[:, None] + np.arange(length)].astype(np.int32)


def windows(stream: np.ndarray, rows: int, length: int, seed: int) -> data.TextBatch:
    """`cuts` as examples for language modelling."""
    ids = cuts(stream, rows, length, seed)
    return texts_of(ids, np.ones_like(ids), np.zeros(rows))


def byte_model(s: Bytes) -> Decoder:
    """The model alone."""
    return Decoder(
        DecoderConfig(
            vocab=256,
            width=s.width,
            layers=s.layers,
            heads=s.heads,
            head_dim=s.width // s.heads,
            mlp_width=4 * s.width,
            max_positions=s.context,
            pre_norm=True,
            norm_eps=1e-5,
            family="gpt2",
        )
    )


def byte_decoder(s: Bytes, stream: np.ndarray, keep: bool) -> tuple[Decoder, Any]:
    """The model and its parameters, trained on `stream`."""
    model = byte_model(s)
    what = {**dataclasses.asdict(s), "text": hashlib.sha256(stream.tobytes()).hexdigest()}
    start = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, s.context), jnp.int32))

    def run(params: Any) -> Any:
        examples = {"train": windows(stream, s.steps * s.batch, s.context, 0)}
        problem = Problem(model.apply, params, examples, train.language_modelling())
        return _pretrained(problem, params, s.steps, s.batch, s.rate)

    return model, kept("bytes", what, start, run, keep)


def bits_per_byte(outputs: Any, batch: Any) -> Any:
    """Minus the bits a byte of each row: a score, of which more is better."""
    return -train.language_modelling().loss(outputs, batch) / jnp.log(2.0)


def sentences(
    name: str, *, per_class: int = 0, seed: int = 0, length: int = 128, pooling: str = "mean", examples: int = 0
) -> tuple[dict[str, data.TextBatch], Any, Any]:
    """MiniLM and a data set's tokens: `(split -> examples, model, params with a new head)`.

    Args:
      name: a data set of texts.
      per_class: training examples of each class, drawn by `seed`; 0 for all.
      length: tokens kept of a text; all are padded to it.
      pooling: what the head reads, as in `train.Config`.
      examples: the first so many of each split; 0 for all.
    """
    dataset = data.load(name)
    if per_class:
        dataset = data.subsample(dataset, per_class=per_class, seed=seed, short="keep")
    folder = data.model_folder("all-MiniLM-L6-v2")
    model, params = load_classifier(
        folder, dataset.num_classes, pooling=pooling, key=jax.random.key(seed), fresh_head=True
    )
    tokenizer = data.Tokenizer(folder)
    out = {}
    for split, part in dataset.splits.items():
        n = min(examples or len(part), len(part))
        tokens = tokenizer.encode(list(part.inputs[:n]), length)
        ids, mask = tokens.padded(np.arange(n), length, tokenizer.pad_id)
        out[split] = texts_of(ids, mask, part.labels[:n])
    return out, model, params


# ------------------------------------------------------------------------------------------- a byte-level encoder


@dataclasses.dataclass(frozen=True)
class ByteEncoder:
    """A byte-level bidirectional transformer and its pretraining: it tells manual pages in these languages apart."""

    layers: int = 4
    width: int = 96
    heads: int = 4
    context: int = 128  # positions, with room for prompts
    window: int = 64
    languages: tuple[str, ...] = ("en", "ru", "ja", "cs", "uk", "tr")
    rows: int = 3000  # windows a language
    steps: int = 800
    batch: int = 32
    rate: float = 1e-3


BYTE_ENCODER = ByteEncoder()
SMALL_BYTE_ENCODER = ByteEncoder(2, 32, 2, 24, 12, ("en", "cs"), 8, 4, 4)


def byte_encoder(s: ByteEncoder, classes: int, keep: bool) -> tuple[SequenceClassifier, Any]:
    """A classifier with a new head on the mean of the positions, its backbone trained on other languages.

    (Trained to predict hidden bytes it learns their frequencies and nothing else in the minutes there are.)
    """
    config = EncoderConfig(
        vocab=256,
        width=s.width,
        layers=s.layers,
        heads=s.heads,
        head_dim=s.width // s.heads,
        mlp_width=4 * s.width,
        max_positions=s.context,
        plain=True,
    )
    reader, model = SequenceClassifier(config, len(s.languages)), SequenceClassifier(config, classes)
    dummy = jnp.zeros((1, s.window), jnp.int32)
    start = jax.jit(reader.init)(jax.random.key(0), dummy)

    def run(params: Any) -> Any:
        examples = languages(s.languages, {"train": s.rows}, s.window, seed=4)
        problem = Problem(reader.apply, params, examples, train.text_classification())
        return _pretrained(problem, params, s.steps, s.batch, s.rate)

    params = kept("byte-encoder", dataclasses.asdict(s), start, run, keep)
    fresh = jax.jit(model.init)(jax.random.key(1), dummy)
    return model, {"params": {**fresh["params"], "backbone": params["params"]["backbone"]}}


def languages(names: tuple[str, ...], rows: dict[str, int], length: int, seed: int) -> dict[str, data.TextBatch]:
    """Windows of manual pages in several languages, each labelled by its language: `rows` a language of each split."""
    streams = [pages(name, seed) for name in names]
    out = {}
    for i, (split, count) in enumerate(rows.items()):
        parts = [windows(s[split], count, length, 100 * seed + 10 * i + k) for k, s in enumerate(streams)]
        ids = np.concatenate([p.input_ids for p in parts])
        out[split] = texts_of(ids, np.ones_like(ids), np.repeat(np.arange(len(names)), count))
    return out
