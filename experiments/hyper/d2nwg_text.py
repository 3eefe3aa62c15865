"""D2NWG (Soro et al., ICLR 2025) on language, in small: heads and LoRAs of MiniLM generated for tasks the zoo has not seen.

    python experiments/hyper/d2nwg_text.py            all of it: a quarter of an hour on one core
    python experiments/hyper/d2nwg_text.py --smoke    every part once in small; writes nothing unless --out is given

35 classes: the 20 newsgroups, and the 15 classes of Reuters R52 that have 37 training texts or more, among them all of R8's. Of
each class 60 training, 16 validation and 32 test texts (again from the start where it has fewer), their first 24 tokens.
all-MiniLM-L6-v2 reads each once; what goes into its last layer is kept. Features are its sentence vectors, standardised, their
first 64 principal components. A task is some classes in their order, shown as five random texts a class; a set encoder reads
the features of these.

Heads, as in d2nwg.py and with its starts: five classes, linear heads from 64 features. Classes fall into five random groups of
seven. The zoo: 500 tasks of one class of each group, 3 heads each, trained from zero on 30 texts a class of their own draw. 20
further tasks choose rates, by validation texts. Held out are 40 further tasks, "new tasks", and 40 whose classes are all of
one group, "new pairs": no two of them ever met in the zoo. Five seeds.

LoRAs: four classes, LoRA on query and value of the last layer. Its output at the first token goes through one linear head
that is the same for all tasks (four random orthonormal directions, of unit variance over texts, about the mean): without a
LoRA accuracy is chance, all of the task is in the LoRA. LoRA's symmetry (A M, M⁻¹ B) would make the zoo's weights
incomparable, so A is fixed and common to all: the first 8 right singular vectors of the texts' mean states, scaled to unit
mean square; B is trained from zero, and generated: 6,144 numbers. (Rank 1 or 2 with a fixed A would see two directions of
384.) The zoo: 200 tasks with one LoRA each, 30 steps of three texts a class out of 60, along the gradient with lengths that
fall linearly: Adam would fill B with noise where the gradient is small. The autoencoder is linear, for 200 vectors. 24
held-out tasks; the first length is chosen out of three by validation texts of 6 further tasks. Five seeds.

    D2NWG                        a generated LoRA, the mean over ten; "best of 10" by the loss on the texts shown
    no LoRA; mean LoRA           B = 0; the zoo's mean
    nearest LoRA                 of the zoo task whose class means are nearest to those of the texts shown
    LoRA of the texts shown      as many steps on the 20 texts alone
    LoRA of all texts            as the zoo's, and the same once more through the autoencoder: what can be hoped for
    prototypes                   nearest mean of the shown texts' features, without any LoRA

Stated before running, each to be reported as holding or not, by means over seeds. Heads:
  1. Without training, D2NWG is at least 20 points over the unconditional generator.
  2. The unconditional generator is within 10 points of random heads.
  3. Best of 10 is at least as good as the nearest head of the zoo.
  4. After 5 steps, best of 10 is at least 5 points over the random start.
  5. On the zoo's own tasks generated heads are within 2 points of the zoo's.
  6. Best of 10 is at least as good as prototypes, without training.
  7. On new pairs D2NWG is still at least 20 points over the unconditional generator, without training.
LoRAs, without training on the held-out task:
  8. Generated LoRAs are at least 20 points over no LoRA.
  9. They are at least 5 points over the zoo's mean LoRA.
 10. Best of 10 is at least as good as the nearest task's LoRA.
 11. Best of 10 is at least as good as a LoRA of the texts shown.
 12. Best of 10 is at most 5 points under a LoRA of all texts.
 13. Best of 10 is at least as good as prototypes.
(A first run, of less than half as many steps in every stage of the generator, of which one claim of 13 held, was 32 points
under the zoo on the zoo's own tasks: it had not learned. The steps are more since; the claims are the old ones.)
Small about it: no language model writes, and LoRA sits in one layer. The paper generates layers of a Llama.
"""

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import bases
import d2nwg_bench as bench
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import study

from jaxpeft import adapt, data, lora, trees
from jaxpeft.hyper.d2nwg import Denoiser, VectorVae
from jaxpeft.hyper.set_transformer import DatasetEncoder
from jaxpeft.interchange import load_peft, save_peft
from jaxpeft.models.encoder import Encoder, EncoderBlock, mean_pool
from jaxpeft.models.layers import attention_bias
from jaxpeft.updates import descend

REUTERS = (
    "acq", "cocoa", "coffee", "cpi", "crude", "earn", "gnp", "gold", "grain", "interest", "money-fx", "money-supply", "ship",
    "sugar", "trade",
)  # fmt: skip
CLASSES = 20 + len(REUTERS)
WAYS, LORA_WAYS = 5, 4
TEXTS = {"train": 60, "validation": 16, "test": 32}
PIECE = 64  # texts read at once


@dataclasses.dataclass(frozen=True)
class Heads:
    """Sizes of the first part; `stages` are the steps of autoencoder, alignment, diffusion."""

    tasks: int = 500
    each: int = 3
    tuning: int = 20
    held: int = 40
    inside: int = 20
    per_class: int = 30
    steps: int = 100
    stages: tuple[int, int, int] = (4000, 2000, 6000)
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    seeds: int = 5


@dataclasses.dataclass(frozen=True)
class Loras:
    """Sizes of the second."""

    rank: int = 8
    tasks: int = 200
    tuning: int = 6
    held: int = 24
    per_class: int = 3
    steps: int = 30
    together: int = 16  # runs in one program
    stages: tuple[int, int, int] = (3000, 2000, 6000)
    rates: tuple[float, ...] = (0.1, 0.3, 1.0)
    seeds: int = 5


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    length: int = 24
    texts: tuple[int, ...] = tuple(TEXTS.values())
    examples: int = 0  # of each split of the data sets; 0 for all
    features: int = 64
    shots: int = 5
    generated: int = 10
    latent: int = 64
    times: int = 100
    batch: int = 32
    encoder: tuple[int, int, int] = (64, 48, 8)  # between, width, points
    denoiser: tuple[int, int] = (192, 3)  # width, depth
    hidden: int = 256
    heads: Heads = Heads()
    loras: Loras = Loras()


SMOKE = Setup(
    length=6, texts=(3, 2, 2), examples=60, features=8, shots=2, generated=2, latent=2, times=32, batch=4,
    encoder=(4, 8, 2), denoiser=(8, 1), hidden=8,
    heads=Heads(4, 2, 2, 2, 2, per_class=2, steps=2, stages=(2, 2, 2), rates=(0.1,), seeds=2),
    loras=Loras(2, 4, 1, 2, per_class=1, steps=2, together=4, stages=(2, 2, 2), rates=(0.3,), seeds=2),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------- texts


class Texts(NamedTuple):
    """By split, (classes, n, ...): tokens, masks, the states (t, d) that the last layer reads, sentence vectors (d,)."""

    ids: dict[str, Any]
    mask: dict[str, Any]
    states: dict[str, Any]
    vectors: dict[str, np.ndarray]


def read(s: Setup) -> tuple[Texts, Any, Any]:
    """The texts with MiniLM, which reads each once, and its parameters."""
    rng, sets = np.random.default_rng(0), ("20ng", "r52")
    parts = [bases.sentences(name, length=s.length, pooling="first", examples=s.examples) for name in sets]
    labels = data.load("r52").labels
    chosen = (range(20), [labels.index(name) for name in REUTERS])

    def drawn(split: str, count: int) -> tuple[Any, Any]:
        """Tokens and masks (classes, count, t)."""
        ids, mask = [], []
        for (examples, _, _), some in zip(parts, chosen):
            label = np.asarray(examples[split].label)
            for c in some:
                rows = rng.permutation(np.flatnonzero(label == c))
                rows = np.resize(rows if len(rows) else np.arange(len(label)), count)  # a smoke run may lack a class
                ids.append(np.asarray(examples[split].input_ids)[rows])
                mask.append(np.asarray(examples[split].attention_mask)[rows])
        return np.stack(ids), np.stack(mask)

    made = {split: drawn(split, count) for split, count in zip(TEXTS, s.texts)}
    ids, mask = ({k: pair[i] for k, pair in made.items()} for i in range(2))
    _, model, params = parts[0]
    every = np.concatenate([x.reshape(-1, s.length) for x in ids.values()])
    masks = np.concatenate([x.reshape(-1, s.length) for x in mask.values()])
    _, first, back = np.unique(every, axis=0, return_index=True, return_inverse=True)
    first = np.resize(first, -(-len(first) // PIECE) * PIECE)  # whole pieces: one program
    below, last = Encoder(dataclasses.replace(model.config, layers=model.config.layers - 1)), EncoderBlock(model.config)

    def one(backbone: Any, ids: Any, mask: Any) -> Any:
        ids, mask = ids[None], mask[None]
        states: Any = below.apply({"params": backbone}, ids, mask)
        own = {"params": backbone[f"layers_{model.config.layers - 1}"]}
        vector = mean_pool(jnp.asarray(last.apply(own, states, attention_bias(mask, s.length))), mask)[0]
        return states[0], vector / jnp.linalg.norm(vector)

    run = jax.jit(lambda b, *x: jax.lax.map(lambda pair: one(b, *pair), x, batch_size=PIECE))
    states, vectors = map(np.asarray, run(params["params"]["backbone"], every[first], masks[first]))
    cuts = np.split(back.reshape(-1), np.cumsum([CLASSES * n for n in s.texts])[:-1])
    rows = {k: cut.reshape(CLASSES, -1) for k, cut in zip(TEXTS, cuts)}
    device = lambda x: {k: jnp.asarray(v) for k, v in x.items()}
    found = {k: states[r] for k, r in rows.items()}
    return Texts(device(ids), device(mask), device(found), {k: vectors[r] for k, r in rows.items()}), model, params


def generator_of(s: Setup, spec: Any, ways: int, vae: VectorVae, stages: tuple[int, int, int]) -> bench.Generator:
    between, width, points = s.encoder
    return bench.Generator(
        spec, (ways, s.shots, s.features), vae, DatasetEncoder(s.latent, between, width, points=points),
        Denoiser(*s.denoiser), latent=s.latent, times=s.times, steps=stages, batch=s.batch,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------- heads


def group_tasks(rng: np.random.Generator, s: Heads) -> tuple[np.ndarray, np.ndarray]:
    """Different tasks with one class of each of five random groups, and tasks within a group."""
    groups = rng.permutation(CLASSES).reshape(WAYS, -1)
    mixed: dict[tuple[int, ...], None] = {}
    while len(mixed) < s.tasks + s.tuning + s.held:
        mixed[tuple(sorted(groups[range(WAYS), rng.integers(0, groups.shape[1], WAYS)].tolist()))] = None
    within: dict[tuple[int, ...], None] = {}
    while len(within) < s.held:
        within[tuple(sorted(rng.choice(groups[rng.integers(WAYS)], WAYS, replace=False).tolist()))] = None
    return np.array(list(mixed)), np.array(list(within))


def heads_of_seed(s: Setup, generator: bench.Generator, seed: int, x: dict[str, Any]) -> dict[str, Any]:
    """Accuracies by start on new tasks and on new pairs; x holds features by split."""
    h = s.heads
    rng, key = np.random.default_rng([seed, 61]), jax.random.fold_in(jax.random.key(32), seed)
    tasks, pairs = group_tasks(rng, h)
    own, tuning, held = np.split(tasks, [h.tasks, h.tasks + h.tuning])
    zoo = bench.head_zoo(own, h.each, x["train"], rng, per_class=h.per_class, steps=h.steps)
    weights = generator.fitted(key, zoo, x["train"])
    start = lambda shown, key: bench.starts(generator, weights, zoo, shown, key, s.generated)
    shown = lambda tasks, stream, split: bench.cases(
        start, tasks, x["train"], x[split], shots=s.shots, seed=seed, stream=stream, key=key
    )

    rates = bench.chosen_rates(shown(tuning, 1, "validation"), h.rates)
    found, apart = (bench.accuracies(shown(t, i, "test"), rates) for t, i in ((held, 2), (pairs, 3)))
    some = rng.permutation(h.tasks)[: h.inside]
    inside = bench.accuracies(shown(own[some], 4, "test"), rates)["D2NWG"][0]
    for name, result in {"new tasks": found, "new pairs": apart}.items():
        print(f"seed {seed}, {name}:", {n: [round(100 * f, 1) for f in v] for n, v in result.items()}, flush=True)
    theirs = bench.zoo_accuracy(zoo, some, x["test"])
    return {"found": found, "apart": apart, "rates": rates, "inside": inside, "zoo": theirs}


# ------------------------------------------------------------------------------------------------------------------- LoRAs


class LastLayer:
    """MiniLM's last layer with the common head, as a function of a LoRA's B; programs compiled once.

    A network here is {path: B}. `states` and `mask` are those of a task's texts, (c, n, t, d) and (c, n, t).
    """

    def __init__(self, s: Setup, texts: Texts, model: Any, params: Any):
        self.s, self.texts = s.loras, texts
        layer = f"layers_{model.config.layers - 1}"
        block = EncoderBlock(model.config, first_only=True)

        def apply(params: Any, states: Any, mask: Any) -> Any:
            own = {"params": params["params"]["backbone"][layer]}
            return jnp.asarray(block.apply(own, states, attention_bias(mask, states.shape[1])))[:, 0]

        at = f"**/{layer}/attention/{{query,value}}/kernel"
        self.params = {"params": {"backbone": {layer: params["params"]["backbone"][layer]}}}
        self.adapted = adapt(apply, lora(self.s.rank, alpha=self.s.rank, at=at))
        states, mask = texts.states["train"], texts.mask["train"]
        start = self.adapted.init(jax.random.key(0), self.params, states[0], mask[0])
        self.zero = {path: jnp.zeros_like(d["b"]) for path, d in start.items()}

        means = (states * mask[..., None]).sum(2) / mask.sum(2)[..., None]
        means = np.asarray(means).reshape(-1, means.shape[-1])
        _, size, right = np.linalg.svd(means, full_matrices=False)
        self.a = jnp.asarray((right[: self.s.rank] * (len(means) ** 0.5 / size[: self.s.rank, None])).T)

        outputs = jax.jit(lambda p, x, m: jax.lax.map(lambda pair: apply(p, *pair), (x, m)))(self.params, states, mask)
        outputs = np.asarray(outputs).reshape(-1, outputs.shape[-1])
        directions = np.linalg.qr(np.random.default_rng(0).normal(size=(outputs.shape[-1], LORA_WAYS)))[0]
        kernel = directions / ((outputs - outputs.mean(0)) @ directions).std()
        kernel = jnp.asarray(kernel, jnp.float32)
        self.head = {"kernel": kernel, "bias": -jnp.asarray(outputs.mean(0)) @ kernel}

        self._fit = jax.jit(jax.vmap(self._one_fit, in_axes=(None, 0, 0, 0, None, None)))
        self._told = jax.jit(jax.vmap(self.loss, in_axes=(None, 0, None, None)))

    def delta(self, network: Any) -> Any:
        return {path: {"a": trees.Fixed(self.a), "b": b} for path, b in network.items()}

    def logits(self, params: Any, network: Any, states: Any, mask: Any) -> Any:
        """(c·n, 4)."""
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        outputs = self.adapted.apply(params, self.delta(network), flat(states), flat(mask))
        return outputs @ self.head["kernel"] + self.head["bias"]

    def loss(self, params: Any, network: Any, states: Any, mask: Any) -> tuple[Any, Any]:
        """Of a task's texts, with accuracy."""
        logits, label = self.logits(params, network, states, mask), jnp.repeat(jnp.arange(LORA_WAYS), states.shape[1])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return each.mean(), (logits.argmax(-1) == label).mean()

    def _one_fit(self, params: Any, rate: Any, classes: Any, rows: Any, states: Any, mask: Any) -> Any:
        fall = optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, self.s.steps))
        rule = optax.chain(optax.normalize_by_update_norm(), fall, optax.scale(-rate))

        def loss(network: Any, at: Any) -> Any:
            return self.loss(params, network, states[classes[:, None], at], mask[classes[:, None], at])[0]

        return descend(loss, self.zero, rule, rows)

    def fitted(self, rates: Any, tasks: np.ndarray, rows: np.ndarray) -> Any:
        """A LoRA for each task (c,) with its rate and its rows of training texts (steps, c, k); groups of one size."""
        n, size = len(tasks), self.s.together
        given = [np.asarray(x) for x in (np.broadcast_to(np.float32(rates), n), tasks, rows)]
        texts, out, losses = (self.texts.states["train"], self.texts.mask["train"]), [], []
        for i in range(0, n, size):
            at = np.minimum(np.arange(i, i + size), n - 1)
            networks, falling = self._fit(self.params, *(x[at] for x in given), *texts)
            out.append(networks)
            losses.append(np.asarray(falling)[: n - i])
        losses = np.concatenate(losses)
        print(f"  {n} LoRAs: loss {losses[:, 0].mean():.3f} to {losses[:, -5:].mean():.3f}", flush=True)
        return jax.tree.map(lambda *x: jnp.concatenate(x)[:n], *out)

    def told(self, networks: Any, classes: Any, split: str, rows: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Losses and accuracies of a stack of LoRAs on a split's texts of a task, or on these (c, m) of them."""
        at = np.asarray(classes) if rows is None else (np.asarray(classes)[:, None], rows)
        losses, right = self._told(self.params, networks, self.texts.states[split][at], self.texts.mask[split][at])
        return np.asarray(losses), np.asarray(right)

    def chosen_rate(self, tasks: np.ndarray, rows: np.ndarray) -> float:
        """The rate with the best mean accuracy on validation texts."""
        n, grid = len(tasks), self.s.rates
        tile = lambda x: np.tile(x, (len(grid), *[1] * (x.ndim - 1)))
        networks = self.fitted(np.repeat(grid, n), tile(tasks), tile(rows))
        of = lambda t: jax.tree.map(lambda b: b[t::n], networks)
        right = np.mean([self.told(of(t), classes, "validation")[1] for t, classes in enumerate(tasks)], 0)
        print(f"  by length of step: {dict(zip(grid, right.round(3).tolist()))}", flush=True)
        return grid[int(right.argmax())]


def loras_of_seed(
    s: Setup, layer: LastLayer, generator: bench.Generator, seed: int, x: dict[str, Any]
) -> dict[str, Any]:
    """Mean accuracies on held-out tasks by where a LoRA comes from; x holds features by split."""
    l, pool = s.loras, s.texts[0]
    rng, key = np.random.default_rng([seed, 62]), jax.random.fold_in(jax.random.key(33), seed)
    tasks = np.array(bench.drawn_tasks(rng, CLASSES, LORA_WAYS, l.tasks + l.tuning + l.held))
    own, tuning, held = np.split(tasks, [l.tasks, l.tasks + l.tuning])
    draw = lambda n, of: rng.integers(0, of, (n, l.steps, LORA_WAYS, l.per_class))
    show = lambda n: rng.permuted(np.tile(np.arange(pool), (n, LORA_WAYS, 1)), axis=-1)[..., : s.shots]
    among = lambda shown: np.take_along_axis(shown[:, None], draw(len(shown), s.shots), -1)

    shown = show(l.held)
    rates = {"all texts": layer.chosen_rate(tuning, draw(l.tuning, pool))}
    rates["texts shown"] = layer.chosen_rate(tuning, among(show(l.tuning)))
    both = layer.fitted(rates["all texts"], np.concatenate([own, held]), draw(l.tasks + l.held, pool))
    ceiling = jax.tree.map(lambda b: b[l.tasks :], both)
    zoo = bench.zoo_of(own, 1, jax.tree.map(lambda b: b[: l.tasks], both), x["train"])
    few = layer.fitted(rates["texts shown"], held, among(shown))
    weights = generator.fitted(key, zoo, x["train"], unconditional=False)[True]
    through = generator.autoencoded(weights, ceiling, zoo.spread)

    found: dict[str, list[float]] = {}
    made: Any = None
    for t, classes in enumerate(held):
        features = x["train"][classes[:, None], shown[t]]
        made = generator.draw(weights, features, jax.random.split(jax.random.fold_in(key, t), s.generated), zoo.spread)
        best = int(layer.told(made, classes, "train", shown[t])[0].argmin())
        one = lambda networks, t=t: jax.tree.map(lambda b: b[t], networks)
        others = {
            "no LoRA": layer.zero,
            "mean LoRA": zoo.mean,
            "nearest LoRA": one(zoo.networks, zoo.nearest(features)),
            "LoRA of the texts shown": one(few),
            "LoRA of all texts": one(ceiling),
            "LoRA of all texts, autoencoded": one(through),
        }
        stack = jax.tree.map(lambda m, *o: jnp.concatenate([m, jnp.stack(o)]), made, *others.values())
        right = layer.told(stack, classes, "test")[1]
        simple = bench.accuracy(bench.prototypes(features), x["test"][jnp.asarray(classes)])
        result = {"D2NWG": right[: s.generated].mean(), "D2NWG, best of 10": right[best]}
        result |= {**dict(zip(others, right[s.generated :], strict=True)), "prototypes": simple}
        for name, value in result.items():
            found.setdefault(name, []).append(float(value))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    print(f"seed {seed}, LoRAs:", {n: round(100 * m, 1) for n, m in means.items()}, flush=True)
    return {"found": means, "rates": rates, "made": jax.tree.map(lambda b: b[0], made)}


def written(layer: LastLayer, network: Any, model: Any, params: Any) -> dict[str, Any]:
    """A LoRA as a PEFT adapter, read back and run in the whole model: its size, and how far logits are from the layer's."""
    whole = model.clone(num_labels=LORA_WAYS)
    base = {"params": {"backbone": params["params"]["backbone"], "head": layer.head}}
    with tempfile.TemporaryDirectory() as folder:
        save_peft(folder, trees.unmark(layer.delta(network)), layer.adapted.method, whole, base)
        size = sum(p.stat().st_size for p in Path(folder).iterdir())
        saved = load_peft(folder, whole, base)
    ids, mask, states = (x["test"][0] for x in (layer.texts.ids, layer.texts.mask, layer.texts.states))
    found = jax.jit(adapt(whole.apply, saved.method).apply)(base, saved.delta, ids, mask)
    ours = jax.jit(layer.logits)(layer.params, network, states[None], mask[None])
    return {"bytes": size, "largest_difference_of_logits": float(jnp.abs(found - ours).max())}


# --------------------------------------------------------------------------------------------------------------------- all


def lora_claims(found: dict[str, list[float]]) -> list[dict[str, str]]:
    """Of accuracies by seeds."""

    def claim(text: str, a: str, b: str, points: float = 0.0) -> dict[str, str]:
        pair = bench.gap(found[a], found[b])
        return record.claim(text, pair[0] >= points, bench.told(pair))

    best = "D2NWG, best of 10"
    return [
        claim("Generated LoRAs are at least 20 points over no LoRA", "D2NWG", "no LoRA", 20),
        claim("They are at least 5 points over the zoo's mean LoRA", "D2NWG", "mean LoRA", 5),
        claim("The best of 10 LoRAs is at least as good as the nearest task's", best, "nearest LoRA"),
        claim("It is at least as good as a LoRA of the texts shown", best, "LoRA of the texts shown"),
        claim("It is at most 5 points under a LoRA of all texts", best, "LoRA of all texts", -5),
        claim("It is at least as good as prototypes", best, "prototypes"),
    ]


def main() -> None:
    began, args = time.perf_counter(), study.arguments((__doc__ or "").splitlines()[0])
    s = SMOKE if args.smoke else Setup()
    texts, model, params = read(s)
    x = dict(zip(TEXTS, map(jnp.asarray, bench.reduced(s.features, *texts.vectors.values()))))
    print(f"texts read: {time.perf_counter() - began:.0f} s", flush=True)

    head, count = bench.zero_head(s.features, WAYS), s.features * WAYS + WAYS
    generator = generator_of(s, head, WAYS, VectorVae(count, s.latent, (s.hidden,)), s.heads.stages)
    seeds = [heads_of_seed(s, generator, seed, x) for seed in range(s.heads.seeds)]
    held, apart = ([r[k] for r in seeds] for k in ("found", "apart"))
    rates = [r["rates"] for r in seeds]
    rows, pairs = bench.rows_of(held, rates), bench.rows_of(apart, rates)
    print(f"heads: {time.perf_counter() - began:.0f} s", flush=True)

    layer = LastLayer(s, texts, model, params)
    vae = VectorVae(trees.count(layer.zero), s.latent, ())
    generator = generator_of(s, layer.zero, LORA_WAYS, vae, s.loras.stages)
    done = [loras_of_seed(s, layer, generator, seed, x) for seed in range(s.loras.seeds)]
    by = {n: [r["found"][n] for r in done] for n in done[0]["found"]}
    saved = written(layer, done[0]["made"], model, params)
    print(f"a generated LoRA, written and read back: {saved}", flush=True)

    further = bench.gap(bench.at(apart, "D2NWG", 0), bench.at(apart, "unconditional", 0))
    claims = [
        *bench.head_claims(held, [r["inside"] for r in seeds], [r["zoo"] for r in seeds]),
        record.claim(
            "On new pairs D2NWG is still at least 20 points over the unconditional generator", further[0] >= 20,
            bench.told(further),
        ),
        *lora_claims(by),
    ]  # fmt: skip
    study.finish(
        "d2nwg-text", args, paper="Soro et al.: Diffusion-Based Neural Network Weights Generation, ICLR 2025", setup=s,
        rows=rows, claims=claims, began=began, figure=bench.curves(held, "texts"), tables=["new pairs", "LoRAs"],
        inside=[(r["inside"], r["zoo"]) for r in seeds], lora_rates=[r["rates"] for r in done], saved=saved,
        **{
            "new pairs": [{k: v for k, v in r.items() if k != "details"} for r in pairs],
            "new_pairs_by_seed": apart,
            "LoRAs": [{"LoRA": n, "accuracy": bench.percent(v), "by_seed": v} for n, v in by.items()],
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
