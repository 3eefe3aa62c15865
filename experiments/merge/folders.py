"""Merging as its users do it: models fine-tuned by one command, merged as folders by recipes, measured on their tasks.

    python experiments/merge/folders.py            all of it: about forty minutes on one core, most of it fine-tuning
    python experiments/merge/folders.py --smoke    every part once in small; writes nothing unless --out is given

The zoo, made once and kept in the cache, by `finetune` (what the command calls), all weights trained:

    texts     all-MiniLM-L6-v2 on Reuters R8, R52 and 20 Newsgroups: 150 steps of 16 texts of 24 tokens
    images    a ViT of six layers, pretrained on Fashion-MNIST, on MNIST (5,000), scikit-learn's digits, and two altered
              copies of Fashion-MNIST (turned by a quarter, inverted; 5,000 pictures each): 300 steps of 32

Three seeds draw heads, orders and what is evaluated. Every encoder is written as a folder of safetensors, the recipes of
`jaxpeft merge` make one encoder of all of a side, and it is measured under each task's own head:

    base                 nothing merged
    linear               the mean
    task_arithmetic      λ out of 0.3, 0.5, 0.8
    ties                 the largest fifth, the same λ by the mean of those that agree in sign: 0.8, 1.2, 1.8
    dare_ties            a fifth drawn, λ as of task arithmetic
    breadcrumbs          the middle: density 0.9, gamma 0.01, λ as of task arithmetic
    fisher               not by a recipe: 128 examples' sampled Fisher information, weights all one

λ is chosen by the validation splits (mean of a side's normalised accuracies: divided by those of the tasks' own models); the
test splits (600 examples drawn of each) are looked at once for each method.

Stated before running, each to be reported as holding or not, by means over seeds of the normalised test accuracy:
  1. Every merged model is over the base, on both sides.
  2. Task arithmetic is at least as good as the mean, on both sides.
  3. TIES is at least as good as task arithmetic, on both sides.
  4. Breadcrumbs are at least as good as TIES, on both sides.
  5. Fisher merging is at least as good as the mean, on both sides.
  6. The best merged encoder of texts keeps 90 % of its tasks' own accuracy.
"""

import dataclasses
import functools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import bases
import jax
import numpy as np
import record
import study
import yaml

from jaxpeft import data
from jaxpeft.files import load_delta
from jaxpeft.merge import diagonal_fisher, fisher_merging
from jaxpeft.merge.recipe import load_recipe
from jaxpeft.merge.streaming import merge_folders
from jaxpeft.models import load_model, save_model
from jaxpeft.models.encoder import Encoder
from jaxpeft.models.vit import VisionTransformer
from jaxpeft.train.run import Config, Loaded, adapted_model, finetune, load

SUMS = (0.3, 0.5, 0.8)
RECIPES: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "linear": ({}, (1.0,)),
    "task_arithmetic": ({}, SUMS),
    "ties": ({"density": 0.2}, (0.8, 1.2, 1.8)),
    "dare_ties": ({"density": 0.2}, SUMS),
    "breadcrumbs": ({"density": 0.9, "gamma": 0.01}, SUMS),
}
ALTERED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "turned": lambda x: np.rot90(x, axes=(1, 2)),
    "inverted": lambda x: -x,
}


@dataclasses.dataclass(frozen=True)
class Side:
    """A base, its tasks and how it is fine-tuned.

    Attributes:
      tasks: data sets; "name altered" is a copy in which `ALTERED` changed the pictures.
      train: examples, drawn; 0 for all.
      length: tokens of a text.
    """

    tasks: tuple[str, ...]
    steps: int
    batch: int
    train: int = 0
    length: int = 24
    vit: bases.Vit | None = None  # None: MiniLM


@dataclasses.dataclass(frozen=True)
class Setup:
    texts: Side = Side(("r8", "r52", "20ng"), 150, 16)
    images: Side = Side(
        ("mnist-5k", "digits", "fashion-mnist turned", "fashion-mnist inverted"), 300, 32, 5000, vit=bases.VIT
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    validation: int = 250
    test: int = 600
    fisher: int = 128


SMOKE = Setup(
    texts=Side(("r8", "r52"), 2, 4, 8, 8),
    images=Side(("digits", "fashion-mnist turned"), 2, 4, 8, vit=bases.SMALL_VIT),
    seeds=(0,),
    validation=8,
    test=8,
    fisher=2,
)


class Member(NamedTuple):
    """A task's fine-tuned model: what there is to merge, its head, and its examples of a fixed length."""

    loaded: Loaded
    encoder: Any
    head: Any
    examples: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- the zoo


def base_of(side: Side, folder: Path, keep: bool) -> str:
    """The model that is fine-tuned: a name, or a folder that is written here."""
    if side.vit is None:
        return "all-MiniLM-L6-v2"
    model, params, _ = bases.fashion_vit(side.vit, keep)
    save_model(folder, model, params)
    return str(folder)


def drawn(split: data.Split, count: int, seed: int) -> np.ndarray:
    n = len(split)
    return np.sort(np.random.default_rng(seed).permutation(n)[: count or n])


def loaded_task(s: Setup, side: Side, task: str, model: str, seed: int) -> tuple[Config, Loaded]:
    """What `finetune` works on: the data set's drawn rows, altered where the task says so."""
    name, _, altered = task.partition(" ")
    config = Config(
        model=model,
        dataset=name,
        method="full",
        steps=side.steps,
        batch_size=side.batch,
        max_length=side.length,
        seed=seed,
        validate_every=side.steps,
        save_every=side.steps,
        test=False,
    )
    loaded = load(config)
    counts = {"train": side.train, "validation": s.validation, "test": s.test}
    rows = {k: drawn(part, counts[k], seed) for k, part in loaded.dataset.splits.items()}
    splits = {k: part.take(rows[k]) for k, part in loaded.dataset.splits.items()}
    if loaded.tokenizer is not None:
        tokens = {k: loaded.tokenizer.encode(list(part.inputs), side.length) for k, part in splits.items()}
    else:
        change = ALTERED[altered] if altered else lambda x: x
        tokens = {k: np.ascontiguousarray(change(np.asarray(loaded.tokens[k])[rows[k]])) for k in splits}
    return config, dataclasses.replace(loaded, dataset=dataclasses.replace(loaded.dataset, **splits), tokens=tokens)


def member(s: Setup, side: Side, task: str, model: str, seed: int, zoo: Path) -> Member:
    """A fine-tuned model; out of the zoo where an earlier run has made it."""
    config, loaded = loaded_task(s, side, task, model, seed)
    run = zoo / f"{task.replace(' ', '-')}-{seed}"
    if not (run / "result.json").exists():
        shutil.rmtree(run, ignore_errors=True)
        finetune(config, run, loaded=loaded)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    saved = load_delta(run / "delta", loaded.params)
    params = adapted_model(config, loaded, saved.method).merge(loaded.params, saved.delta)["params"]
    examples = {}
    for split in ("train", "validation", "test"):
        labels = loaded.dataset.splits[split].labels
        if loaded.tokenizer is None:
            examples[split] = study.images_of(loaded.tokens[split], labels)
        else:
            ids, mask = loaded.tokens[split].padded(np.arange(len(labels)), side.length, loaded.tokenizer.pad_id)
            examples[split] = study.texts_of(ids, mask, labels)
    return Member(loaded, {"params": params["backbone"]}, params["head"], examples)


# ---------------------------------------------------------------------------------------------------------- measuring


@functools.cache
def right(model: Any) -> Callable[..., Any]:
    """(encoder, head, part of the examples) -> how many are right; one program a head."""

    def count(encoder: Any, head: Any, part: Any) -> Any:
        params = {"params": {"backbone": encoder["params"], "head": head}}
        return (model.apply(params, *study.inputs_of(part)).argmax(-1) == part.label).sum()

    return jax.jit(count)


def accuracy(who: Member, encoder: Any, split: str, rows: int = 50) -> float:
    """Of an encoder under a task's head."""
    part = who.examples[split]
    n = len(part.label)
    cut = lambda i: jax.tree.map(lambda x: x[i : i + rows], part)
    return sum(int(right(who.loaded.model)(encoder, who.head, cut(i))) for i in range(0, n, rows)) / n


def normalised(members: list[Member], own: list[float], encoder: Any, split: str) -> list[float]:
    return [accuracy(m, encoder, split) / max(o, 1e-9) for m, o in zip(members, own, strict=True)]


# ------------------------------------------------------------------------------------------------------------ merging


def by_recipe(method: str, scale: float, base: Path, folders: list[Path], work: Path) -> Any:
    """The encoder that a recipe makes: written to a file, followed, read back."""
    parameters = RECIPES[method][0]
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(f), "parameters": {"weight": 1.0, **parameters}} for f in folders],
    }
    if method != "linear":
        recipe |= {"base_model": str(base), "parameters": {"lambda": scale}}
    path, out = work / "recipe.yaml", work / "merged"
    path.write_text(yaml.safe_dump(recipe))
    shutil.rmtree(out, ignore_errors=True)
    merge_folders(load_recipe(path), out, workers=1)
    return load_model(out)[1]


def by_fisher(s: Setup, members: list[Member]) -> Any:
    """The encoders' mean by how much each one's labels depend on a weight."""
    fishers = []
    for i, m in enumerate(members):

        def logits(encoder: Any, one: Any, m: Member = m) -> Any:
            params = {"params": {"backbone": encoder["params"], "head": m.head}}
            return m.loaded.model.apply(params, *(x[None] for x in one))[0]

        part = jax.tree.map(lambda x: x[: s.fisher], m.examples["train"])
        run = jax.jit(functools.partial(diagonal_fisher, logits, mode="sample", key=jax.random.key(i), chunk=4))
        fishers.append(run(m.encoder, study.inputs_of(part)))
    return fisher_merging(None, [m.encoder for m in members], fishers=fishers)


@dataclasses.dataclass
class Found:
    """Of one side and seed: test accuracies of the tasks' own models, and by method the normalised ones and λ."""

    own: list[float]
    scores: dict[str, list[float]]
    scales: dict[str, float]


def measured(s: Setup, side: Side, seed: int, zoo: Path, keep: bool) -> Found:
    with tempfile.TemporaryDirectory() as held:
        work = Path(held)
        model = base_of(side, work / "model", keep)
        members = [member(s, side, task, model, seed, zoo) for task in side.tasks]
        config = members[0].loaded.model.config
        bare = VisionTransformer(config) if side.vit else Encoder(dataclasses.replace(config, narrow=False))
        start = {"params": members[0].loaded.params["params"]["backbone"]}
        folders = [work / f"task{i}" for i in range(len(members))]
        for folder, encoder in zip([work / "base", *folders], [start, *(m.encoder for m in members)], strict=True):
            save_model(folder, bare, encoder)

        own = {k: [accuracy(m, m.encoder, k) for m in members] for k in ("validation", "test")}
        candidates = {
            n: {x: functools.partial(by_recipe, n, x, work / "base", folders, work) for x in scales}
            for n, (_, scales) in RECIPES.items()
        }
        candidates |= {"fisher": {1.0: lambda: by_fisher(s, members)}, "base": {0.0: lambda: start}}
        scores, scales = {}, {}
        for name, made in candidates.items():
            on_validation = {}
            if len(made) > 1:
                for x, make in made.items():
                    on_validation[x] = statistics.mean(normalised(members, own["validation"], make(), "validation"))
            scales[name] = max(on_validation, key=lambda x: on_validation[x]) if on_validation else next(iter(made))
            scores[name] = normalised(members, own["test"], made[scales[name]](), "test")
            print(f"{side.tasks} seed {seed} {name}: {np.round(scores[name], 3)} at {scales[name]}", flush=True)
    return Found(own["test"], scores, scales)


# ------------------------------------------------------------------------------------------------------------- report


def mean_of(found: list[Found], name: str) -> list[float]:
    """A seed's mean over tasks."""
    return [statistics.mean(f.scores[name]) for f in found]


def compared(sides: dict[str, list[Found]], a: str, b: str) -> tuple[bool, str]:
    """Whether `a` is at least as good as `b` on both sides, and by how much."""
    gaps = {k: study.interval([x - y for x, y in zip(mean_of(f, a), mean_of(f, b))]) for k, f in sides.items()}
    text = "; ".join(f"{k}: {100 * m:+.2f} ± {100 * h:.2f}" for k, (m, h) in gaps.items())
    return all(m >= 0 for m, _ in gaps.values()), f"{text} points of normalised accuracy"


def claims(sides: dict[str, list[Found]]) -> list[dict[str, str]]:
    merged = [*RECIPES, "fisher"]
    means = {k: {n: statistics.mean(mean_of(f, n)) for n in (*merged, "base")} for k, f in sides.items()}
    worst = {k: min(merged, key=lambda n: m[n]) for k, m in means.items()}
    over = "; ".join(f"{k}: base {100 * means[k]['base']:.1f}, {n} {100 * means[k][n]:.1f} %" for k, n in worst.items())
    best = max(merged, key=lambda n: means["texts"][n])
    return [
        record.claim(
            "Every merged model is over the base, on both sides",
            all(means[k][n] > means[k]["base"] for k, n in worst.items()),
            f"the least: {over}",
        ),
        record.claim("Task arithmetic is at least as good as the mean", *compared(sides, "task_arithmetic", "linear")),
        record.claim("TIES is at least as good as task arithmetic", *compared(sides, "ties", "task_arithmetic")),
        record.claim("Breadcrumbs are at least as good as TIES", *compared(sides, "breadcrumbs", "ties")),
        record.claim("Fisher merging is at least as good as the mean", *compared(sides, "fisher", "linear")),
        record.claim(
            "The best merged encoder of texts keeps 90 % of its tasks' own accuracy",
            means["texts"][best] >= 0.9,
            f"{best}: {100 * means['texts'][best]:.1f} %",
        ),
    ]


def rows(s: Setup, sides: dict[str, list[Found]]) -> list[dict[str, Any]]:
    """One row a side and task: the own model's accuracy, and normalised ones by method."""
    out = []
    for k, found in sides.items():
        for i, task in enumerate(getattr(s, k).tasks):
            row: dict[str, Any] = {"side": k, "task": task, "own model": statistics.mean(f.own[i] for f in found)}
            row |= {n: statistics.mean(f.scores[n][i] for f in found) for n in found[0].scores}
            out.append({**row, "seeds": [{"own": f.own[i], **{n: v[i] for n, v in f.scores.items()}} for f in found]})
    return out


def drawing(table: list[dict[str, Any]]) -> Callable[[Any], None]:
    """The heat map of tasks by method."""
    methods = ["base", *RECIPES, "fisher"]

    def draw(axes: Any) -> None:
        values = np.array([[100 * r[m] for m in methods] for r in table])
        shown = axes.imshow(values, cmap="viridis", vmin=max(0, values.min()), vmax=100, aspect="auto")
        axes.set_xticks(range(len(methods)), methods, rotation=30, ha="right", fontsize=8)
        axes.set_yticks(range(len(table)), [r["task"] for r in table], fontsize=8)
        middle = (values.min() + 100) / 2
        for (i, j), v in np.ndenumerate(values):
            axes.text(j, i, f"{v:.0f}", ha="center", va="center", fontsize=8, color="w" if v < middle else "k")
        axes.figure.colorbar(shown, label="% of the task's own model")

    return draw


def main() -> None:
    args = study.arguments(__doc__ or "")
    s, began = SMOKE if args.smoke else Setup(), time.perf_counter()
    with tempfile.TemporaryDirectory() as held:
        zoo = Path(held) if args.smoke else data.cache_dir() / "experiments" / "fine-tuned"
        sides = {
            k: [measured(s, getattr(s, k), seed, zoo / k, not args.smoke) for seed in s.seeds]
            for k in ("texts", "images")
        }
    table = rows(s, sides)
    study.finish(
        "merge-folders",
        args,
        paper="of Fisher merging, model soups, task arithmetic, TIES, DARE and breadcrumbs",
        setup=s,
        rows=table,
        claims=claims(sides),
        began=began,
        figure=drawing(table),
        scales={k: [f.scales for f in found] for k, found in sides.items()},
    )


if __name__ == "__main__":
    main()
