"""Many fine-tuned models of one start, to merge: domains of Fashion-MNIST, and networks trained on them, kept in the cache.

    zoo = Zoo(rate=3e-4)                                  # large task vectors; rate=1e-4 makes small ones
    parts = domains(zoo, seed=0)                          # {"train": Images of (D, n, 28, 28), ...}
    base = pretrained(zoo, 0, parts, keep=True)           # theta0: {"encoder": ..., "head": ...}
    models = fine_tuned(zoo, 0, parts, base, one_each(zoo), keep=True)    # a stack: leaves (D, ...)
    accuracy(base, parts["test"])                         # (D,), of one network on every domain
    own_accuracy(models, parts["test"], one_each(zoo))    # (D,), of each network on its own

A domain turns the pictures by quarters of a circle and may invert their grey values; the classes stay. Every domain has
pictures of its own, of which no other domain nor split has any. The start is a perceptron with a head, trained on some
pictures of every domain, or of some domains only; fine-tuning trains the encoder on one domain, with the head frozen,
which all networks then share, or with a copy of the head of its own.

Runs of one seed are trained in one program, whatever their domains, rates and orders of the examples: domain, rate and
decay are arguments. A seed draws the pictures of all splits, the start and the orders.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pretraining import kept

from jaxpeft import data
from jaxpeft.updates import descend

SPLITS = ("start", "train", "validation", "selection", "test")


@dataclasses.dataclass(frozen=True)
class Zoo:
    """Sizes of the domains and of their networks.

    Attributes:
      turns: quarters of a circle; each is one domain, and `inverted` one more with inverted grey values.
      start, train, validation, selection, test: pictures a domain: to train theta0; to fine-tune; to learn or to tune a
        merge on; to choose among what was so learned (rates, epochs); to measure, once.
      widths: of the encoder's layers.
      start_epochs, start_rate: of theta0's training.
      start_domains: which domains theta0 sees; None for all. (0,) is clean pictures only.
      rate, epochs: of fine-tuning; the size of the task vectors follows from them.
      decay: AdamW's.
      own_heads: whether fine-tuning trains the head as well.
    """

    turns: tuple[int, ...] = (0, 1, 2, 3)
    inverted: bool = True
    start: int = 500
    train: int = 6000
    validation: int = 500
    selection: int = 250
    test: int = 1250
    widths: tuple[int, ...] = (512, 512)
    start_epochs: int = 8
    start_rate: float = 5e-4
    start_domains: tuple[int, ...] | None = None
    rate: float = 3e-4
    epochs: float = 2
    decay: float = 0.1
    batch: int = 64
    own_heads: bool = False

    @property
    def kinds(self) -> list[tuple[int, bool]]:
        """(quarters, inverted) of each domain."""
        return [(turn, dark) for dark in ((False, True) if self.inverted else (False,)) for turn in self.turns]

    @property
    def names(self) -> list[str]:
        return [f"{90 * turn}°" + (" inverted" if dark else "") for turn, dark in self.kinds]


SMALL = Zoo(start=16, train=24, validation=16, selection=8, test=16, widths=(16, 16), start_epochs=1, epochs=1, batch=8)


class Images(NamedTuple):
    """A split of every domain.

    Attributes:
      image: (D, n, 28, 28) bytes.
      label: (D, n).
    """

    image: jax.Array
    label: jax.Array


class Run(NamedTuple):
    """One fine-tuning. None stands for the zoo's number.

    Attributes:
      domain: which one.
      rate, decay: of AdamW.
      order: draws the order of the examples: runs that differ in it alone are several models of one domain.
    """

    domain: int
    rate: float | None = None
    decay: float | None = None
    order: int = 0


def one_each(s: Zoo) -> list[Run]:
    """One run a domain."""
    return [Run(i) for i in range(len(s.kinds))]


# ------------------------------------------------------------------------------------------------------------- domains


def domains(s: Zoo, seed: int) -> dict[str, Images]:
    """The splits; see `Zoo`."""
    found, kinds = data.load("fashion-mnist").splits, s.kinds
    rng = np.random.default_rng([seed, 8])
    sizes = {
        "train": {"start": s.start, "train": s.train},
        "validation": {"validation": s.validation, "selection": s.selection},
        "test": {"test": s.test},
    }
    out = {}
    for source, wanted in sizes.items():
        image, label = np.asarray(found[source].inputs)[..., 0], np.asarray(found[source].labels)
        each = sum(wanted.values())
        if each * len(kinds) > len(label):
            raise ValueError(f"{each} pictures for each of {len(kinds)} domains, of {len(label)} in the {source} split")
        rows = rng.permutation(len(label))[: each * len(kinds)].reshape(len(kinds), each)
        pictures = np.stack([_seen(image[r], *kind) for r, kind in zip(rows, kinds)])
        cuts = np.cumsum(list(wanted.values()))[:-1]
        parts = zip(wanted, np.split(pictures, cuts, 1), np.split(label[rows].astype(np.int32), cuts, 1))
        out |= {name: Images(jnp.asarray(x), jnp.asarray(y)) for name, x, y in parts}
    return out


def _seen(image: np.ndarray, turn: int, dark: bool) -> np.ndarray:
    turned = np.rot90(image, turn, (1, 2))
    return 255 - turned if dark else turned


# -------------------------------------------------------------------------------------------------------- the networks


def draw(key: Any, widths: Sequence[int], classes: int = 10) -> Any:
    """A network at random: {"encoder": {"layer_0": {"kernel", "bias"}, ...}, "head": {"kernel", "bias"}}."""
    sizes = [28 * 28, *widths, classes]
    layers = [
        {"kernel": jax.nn.initializers.he_normal()(k, (i, o), jnp.float32), "bias": jnp.zeros(o)}
        for k, i, o in zip(jax.random.split(key, len(sizes) - 1), sizes, sizes[1:])
    ]
    return {"encoder": {f"layer_{i}": x for i, x in enumerate(layers[:-1])}, "head": layers[-1]}


def features(encoder: Any, image: Any) -> Any:
    """(b, 28, 28) bytes -> (b, width)."""
    x = image.reshape(len(image), -1).astype(jnp.float32) / 255
    for i in range(len(encoder)):
        layer = encoder[f"layer_{i}"]
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x


def logits(params: Any, image: Any) -> Any:
    """(b, 28, 28) bytes -> (b, 10)."""
    return features(params["encoder"], image) @ params["head"]["kernel"] + params["head"]["bias"]


def cross_entropy(params: Any, image: Any, label: Any) -> Any:
    """The mean of a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, image), label).mean()


@jax.jit
def accuracy(params: Any, part: Images) -> jax.Array:
    """(D,): a network on every domain."""
    return jax.lax.map(lambda p: (logits(params, p.image).argmax(-1) == p.label).mean(), part)


def own_accuracy(models: Any, part: Images, runs: Sequence[Run]) -> jax.Array:
    """(R,): each of a stack of networks on its run's own domain."""
    return _own_accuracy(models, part, jnp.asarray([r.domain for r in runs]))


@jax.jit
def _own_accuracy(models: Any, part: Images, domain: Any) -> jax.Array:
    one = lambda x: (logits(x[0], part.image[x[1]]).argmax(-1) == part.label[x[1]]).mean()
    return jax.lax.map(one, (models, domain))


# ------------------------------------------------------------------------------------------------------------ training


def pretrained(s: Zoo, seed: int, parts: dict[str, Images], keep: bool) -> Any:
    """theta0, encoder and head."""
    seen = jnp.asarray(list(range(len(s.kinds)) if s.start_domains is None else s.start_domains))
    image, label = (x[seen].reshape(-1, *x.shape[2:]) for x in parts["start"])
    rows = orders(len(label), s.start_epochs, s.batch, seed)[None]
    numbers = jnp.full(1, s.start_rate), jnp.full(1, s.decay)

    def run(params: Any) -> Any:
        trained, losses = _trained(params, True, Images(image[None], label[None]), jnp.zeros(1, int), rows, *numbers)
        _told("theta0", losses)
        return jax.tree.map(lambda x: x[0], trained)

    start = draw(jax.random.fold_in(jax.random.key(seed), 8), s.widths)
    return kept("zoo-start", {**_what(s, "start"), "seed": seed}, start, run, keep)


def fine_tuned(s: Zoo, seed: int, parts: dict[str, Images], base: Any, runs: Sequence[Run], keep: bool) -> Any:
    """One network a run, as a stack: leaves (R, ...). With frozen heads all have the base's."""
    rates = [s.rate if r.rate is None else r.rate for r in runs]
    decays = [s.decay if r.decay is None else r.decay for r in runs]
    rows = np.stack([orders(s.train, s.epochs, s.batch, 1000 * seed + 10 * r.domain + 97 * r.order) for r in runs])
    domain = jnp.asarray([r.domain for r in runs])

    def run(_: Any) -> Any:
        models, losses = _trained(
            base, s.own_heads, parts["train"], domain, rows, jnp.asarray(rates), jnp.asarray(decays)
        )
        _told(f"{len(runs)} networks", losses)
        return models

    filled = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(runs), *x.shape)), base)
    chosen = [[r.domain, rate, decay, r.order] for r, rate, decay in zip(runs, rates, decays)]
    return kept("zoo", {**_what(s, "start", "tuned"), "seed": seed, "runs": chosen}, filled, run, keep)


def _what(s: Zoo, *stages: str) -> dict[str, Any]:
    """The numbers that decide a stage's result, the sizes of the training pictures included."""
    names = {
        "start": ("turns", "inverted", "start", "train", "widths", "start_epochs", "start_rate", "start_domains"),
        "tuned": ("epochs", "own_heads"),
    }
    every = dataclasses.asdict(s)
    return {"batch": s.batch, "decay": s.decay} | {n: every[n] for stage in stages for n in names[stage]}


def _told(what: str, losses: Any) -> None:
    """Says how training went, and refuses what diverged."""
    last = np.asarray(losses)[:, -20:].mean(1)
    assert np.isfinite(last).all(), f"{what}: losses {last}"
    print(f"{what}: loss {float(np.asarray(losses)[:, 0].mean()):.3f} to {last.mean():.3f}", flush=True)


def orders(n: int, epochs: float, batch: int, seed: int) -> np.ndarray:
    """(steps, batch) rows: one random order of n examples after another, the last part of each left out."""
    rng, each = np.random.default_rng([seed, 9]), n // batch
    steps = max(1, round(epochs * each))
    rows = [rng.permutation(n)[: each * batch].reshape(each, batch) for _ in range(-(-steps // each))]
    return np.concatenate(rows)[:steps].astype(np.int32)


@jax.jit(static_argnums=1)
def _trained(base: Any, heads: bool, part: Images, domain: Any, rows: Any, rates: Any, decays: Any) -> Any:
    """Stacks of networks and of losses (R, steps): AdamW, clipped, warm-up and cosine; one run after another."""
    steps = rows.shape[1]
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 16), max(2, steps))
    fixed = {} if heads else {"head": base["head"]}

    def one(each: Any) -> Any:
        d, order, rate, decay = each
        optimiser = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(lambda count: rate * shape(count), weight_decay=decay)
        )

        def loss(learned: Any, row: Any) -> Any:
            return cross_entropy({**learned, **fixed}, part.image[d, row], part.label[d, row])

        start = {name: base[name] for name in base if name not in fixed}
        learned, losses = descend(loss, start, optimiser, order)
        return {**learned, **fixed}, losses

    return jax.lax.map(one, (domain, jnp.asarray(rows), rates, decays))
