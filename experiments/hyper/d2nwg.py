"""D2NWG (Soro et al., ICLR 2025) in small: classifier heads generated for data sets that the zoo has not seen.

    python experiments/hyper/d2nwg.py            all of it: twenty to thirty minutes on one core
    python experiments/hyper/d2nwg.py --smoke    every part once in small; writes nothing unless --out is given

20 classes: Fashion-MNIST's ten, and scikit-learn's digits made larger. Features are those of a ViT trained on Fashion-MNIST
(the class token, standardised, its first 64 principal components). A task is five of the classes in their order; a network is
a linear head (64 x 5 and 5 numbers). The zoo: 200 tasks with 20 heads each, 4,000 in one program, trained from zero on 50
images a class of their own draw; 20 further tasks choose rates, and 40 are held out. A data set is shown as five random
images a class. Stages as in the paper on vectors (`jaxpeft.hyper.d2nwg`): an autoencoder of 32 latents, a set encoder aligned
with it, 200 times of diffusion. Without training on the held-out tasks, and after 1, 5 and 20 steps of gradient descent on five
labelled images a class (the same that are shown):

    D2NWG             a generated head, the mean over ten; "best of 10" by the loss on the labelled images
    unconditional     the same generator trained without data sets
    nearest head      a head of the zoo task whose class means are nearest to those of the images shown
    mean head         of the whole zoo
    random            N(0, 1/64)
    prototypes        w_c = mean_c, b_c = -|mean_c|²/2: a simple baseline that must be shown

The step size is chosen for each start out of three on the 20 tasks, by the accuracy on validation images after 20 steps. Five
seeds draw tasks, heads, images and the generator's start. Accuracy is on test images of a task's classes; the mean over 40
tasks.

Stated before running, each to be reported as holding or not, by means over seeds:
  1. Without training, D2NWG is at least 20 points over the unconditional generator.
  2. The unconditional generator is within 10 points of random heads.
  3. Best of 10 is at least as good as the nearest head of the zoo.
  4. After 5 steps, best of 10 is at least 5 points over the random start.
  5. On the zoo's own tasks generated heads are within 2 points of the zoo's.
  6. Best of 10 is at least as good as prototypes, without training.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import bases
import d2nwg_bench as bench
import jax
import jax.numpy as jnp
import numpy as np
import study

from jaxpeft.hyper.d2nwg import Denoiser, VectorVae
from jaxpeft.hyper.set_transformer import DatasetEncoder
from jaxpeft.models.vit import VisionTransformer

WAYS = 5


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    base: bases.Vit = bases.VIT
    features: int = 64
    tasks: int = 200
    heads: int = 20
    tuning: int = 20
    held: int = 40
    per_class: int = 50
    shots: int = 5
    head_steps: int = 150
    latent: int = 32
    times: int = 200
    vae_steps: int = 4000
    align_steps: int = 1500
    diffusion_steps: int = 6000
    batch: int = 32
    encoder: tuple[int, int, int] = (128, 48, 8)  # between, width, points
    generated: int = 10
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    tested: int = 100  # test images of each class, and as many for validation
    seeds: int = 5


SMOKE = Setup(
    bases.SMALL_VIT, features=8, tasks=4, heads=2, tuning=2, held=2, per_class=2, shots=2, head_steps=2, latent=2, times=32,
    vae_steps=2, align_steps=2, diffusion_steps=2, batch=4, encoder=(4, 8, 2), generated=2, rates=(0.1,), tested=4, seeds=2,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- features


def features(s: Setup, keep: bool) -> dict[str, Any]:
    """Split -> (20, n, f); every class as many, drawn with replacement where it has fewer."""
    model, params, _ = bases.fashion_vit(s.base, keep)
    tower = VisionTransformer(model.config)
    read = jax.jit(lambda p, x: jnp.asarray(tower.apply(p, x))[:, 0])
    own = {"params": params["params"]["backbone"]}
    counts = {"train": 400, "validation": s.tested, "test": s.tested}
    out: dict[str, list[np.ndarray]] = {split: [] for split in counts}
    rng = np.random.default_rng(0)
    for name in ("fashion-mnist", "digits"):
        parts = bases.images(name, s.base.size, examples=s.base.examples)
        for split, count in counts.items():
            x, y = parts[split]
            for c in range(10):
                rows = np.flatnonzero(y == c)
                rows = rows if len(rows) else np.arange(len(y))  # a smoke run may lack a class
                drawn = rng.permutation(rows)[:count] if len(rows) >= count else rng.choice(rows, count)
                out[split].append(np.asarray(read(own, jnp.asarray(x[drawn]))))
    return dict(zip(out, map(jnp.asarray, bench.reduced(s.features, *map(np.stack, out.values())))))


# --------------------------------------------------------------------------------------------------------------------- all


def generator_of(s: Setup) -> bench.Generator:
    between, width, points = s.encoder
    return bench.Generator(
        bench.zero_head(s.features, WAYS), (WAYS, s.shots, s.features), VectorVae(s.features * WAYS + WAYS, s.latent),
        DatasetEncoder(s.latent, between, width, points=points), Denoiser(), latent=s.latent, times=s.times,
        steps=(s.vae_steps, s.align_steps, s.diffusion_steps), batch=s.batch,
    )  # fmt: skip


def one_seed(s: Setup, generator: bench.Generator, seed: int, x: dict[str, Any]) -> dict[str, Any]:
    rng, key = np.random.default_rng([seed, 6]), jax.random.fold_in(jax.random.key(31), seed)
    tasks = bench.drawn_tasks(rng, len(x["train"]), WAYS, s.tasks + s.tuning + s.held)
    own, tuning, held = np.split(np.array(tasks), [s.tasks, s.tasks + s.tuning])
    zoo = bench.head_zoo(own, s.heads, x["train"], rng, per_class=s.per_class, steps=s.head_steps)
    weights = generator.fitted(key, zoo, x["train"])
    start = lambda shown, key: bench.starts(generator, weights, zoo, shown, key, s.generated)
    shown = lambda tasks, stream, split="test": bench.cases(
        start, tasks, x["train"], x[split], shots=s.shots, seed=seed, stream=stream, key=key
    )

    rates = bench.chosen_rates(shown(tuning, 1, "validation"), s.rates)
    found = bench.accuracies(shown(held, 2), rates)
    # In distribution: the zoo's own tasks, the same images shown to the generator as to anybody.
    some = rng.permutation(s.tasks)[: s.held]
    inside = bench.accuracies(shown(own[some], 3), rates)["D2NWG"][0]
    theirs = bench.zoo_accuracy(zoo, some, x["test"])
    print(f"seed {seed}:", {n: [round(100 * f, 1) for f in x] for n, x in found.items()}, flush=True)
    return {"found": found, "rates": rates, "inside": inside, "zoo": theirs}


def main() -> None:
    began, args = time.perf_counter(), study.arguments((__doc__ or "").splitlines()[0])
    s = SMOKE if args.smoke else Setup()
    x = features(s, keep=not args.smoke)
    generator = generator_of(s)
    seeds = [one_seed(s, generator, seed, x) for seed in range(s.seeds)]
    results = [r["found"] for r in seeds]
    rows = bench.rows_of(results, [r["rates"] for r in seeds])
    claims = bench.head_claims(results, [r["inside"] for r in seeds], [r["zoo"] for r in seeds])
    study.finish(
        "d2nwg", args, paper="Soro et al.: Diffusion-Based Neural Network Weights Generation, ICLR 2025", setup=s, rows=rows,
        claims=claims, began=began, figure=bench.curves(results, "images"), inside=[(r["inside"], r["zoo"]) for r in seeds],
    )  # fmt: skip


if __name__ == "__main__":
    main()
