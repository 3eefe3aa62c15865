"""LST, ladder side-tuning (Sung et al., NeurIPS 2022), in small: memory, operations and accuracy against other methods.

    python experiments/side/lst.py            all of it: under an hour on two quiet cores
    python experiments/side/lst.py --smoke    each part once in small, a minute; writes nothing unless --out is given

A pre-norm ViT of 8 blocks, width 128, is trained once on Fashion-MNIST (kept in the cache) and adapted to
scikit-learn's digits, brought to 28 x 28: another task, other pictures, 1,293 training examples. All methods train the
same new head; LST (r = 8), LoRA and adapters have about as many parameters besides (LST without ladders fewer). For
each method one learning rate out of one grid, by the validation accuracy of two seeds; then five seeds, of which the
test split is looked at once, at the end. Temporaries and operations are the compiler's figures for one gradient at
batch 64, not times.

Stated before running, each to be reported as holding or not:
  1. The temporaries of LST's gradient are at most half of LoRA's and at most half of the adapters'.
  2. They are at most 40 % of full fine-tuning's (the paper: 31 %).
  3. LST's gradient takes at most 60 % of the operations of LoRA's: the backward pass stays out of the backbone.
  4. LST's mean test accuracy is at least 2 points over the linear probe's.
  5. It is at most 2 points under LoRA's.
  6. It is over that of side-tuning without ladders.
  7. Started from pruned weights it is at least as accurate as from random ones (a small effect: see the interval).
Intervals are 95 % t-intervals of the mean of the five paired differences.

This is the second run: in the first (160 updates, rates up to 1e-2) LST's best rate was the grid's largest. Since its test
split had been seen, this one draws its own splits out of the 1,797 digits, of the same sizes.

Small: one backbone, one target, images. The paper's numbers are GLUE with T5 and vision-language tasks with CLIP-T5.
Pruning ranks by |W|, the card's choice where the task's head is new, not by squared gradients.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from jaxpeft import Method, adapt, bitfit, chain, data, full, head, houlsby, lora, train, trees
from jaxpeft.adapt.ladder import lst
from jaxpeft.files import write_atomically
from jaxpeft.models import ImageClassifier, VisionConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
import record
from pretraining import kept

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BACKBONE = ("layers", "width", "heads", "patch", "examples")
T_95 = 2.776  # Student's t, four degrees of freedom


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    layers: int = 8
    width: int = 128
    heads: int = 8
    patch: int = 7
    reduction: int = 8
    lora_rank: int = 12
    adapter_rank: int = 12
    pretraining_steps: int = 600
    pretraining_batch: int = 64
    pretraining_rate: float = 1e-3
    steps: int = 320
    batch: int = 32
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    tuning_seeds: int = 2
    seeds: int = 5
    cost_batch: int = 64
    examples: int = 0  # of each split; 0 for all


SMOKE = Setup(2, 32, 4, 14, 4, 2, 2, 2, 8, 1e-3, 2, 8, (1e-3, 3e-3), 1, 2, 4, 40)


def model_of(setup: Setup) -> ImageClassifier:
    config = VisionConfig(
        width=setup.width,
        layers=setup.layers,
        heads=setup.heads,
        head_dim=setup.width // setup.heads,
        mlp_width=4 * setup.width,
        pre_norm=True,
        norm_eps=1e-6,
        image=(28, 28),
        patch=(setup.patch, setup.patch),
        channels=1,
    )
    return ImageClassifier(config, 10)


def methods(setup: Setup) -> dict[str, Method]:
    """Every method with the head; `full` has it anyway."""
    r = setup.reduction
    own = {
        "LoRA": lora(setup.lora_rank),
        "adapters": houlsby(setup.adapter_rank),
        "BitFit": bitfit(("**/bias", "!**/head/**")),
        "LST": lst(r),
        "LST, random init": lst(r, init="random"),
        "LST, no ladders": lst(r, ladders=False),
    }
    return {"linear probe": head(), **{n: chain(m, head()) for n, m in own.items()}, "full": full()}


def splits(name: str, setup: Setup) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (n, 28, 28, 1) in [-1, 1] and labels."""
    found = data.load(name)
    parts = {split: (part.inputs, part.labels) for split, part in found.splits.items()}
    if name == "digits":  # the standard test split was seen by the first run
        every = [np.concatenate(arrays) for arrays in zip(*parts.values())]
        order = np.random.default_rng(1).permutation(len(every[1]))
        cut = np.split(order, np.cumsum([len(labels) for _, labels in parts.values()])[:-1])
        parts = {split: (every[0][rows], every[1][rows]) for split, rows in zip(parts, cut)}
    out = {}
    for split, (inputs, labels) in parts.items():
        n = setup.examples or len(labels)
        x = jnp.asarray(inputs[:n], jnp.float32) / found.pixel_max
        x = x if x.shape[1] == 28 else jax.image.resize(x, (len(x), 28, 28, 1), "bilinear")
        out[split] = (np.asarray(2 * x - 1), labels[:n])
    return out


def batches(part, size, *, seed=0, shuffle=False):
    return data.image_batches(part[0], part[1], batch_size=size, seed=seed, shuffle=shuffle, pixel_max=1)


def optimiser(steps: int):
    """Adam, clipped, with warm-up and linear decay; its rate is part of its state, so one program serves all rates."""
    up = max(1, steps // 16)
    shape = optax.join_schedules(
        [optax.linear_schedule(0, 1, up), optax.linear_schedule(1, 0, max(1, steps - up))], [up]
    )

    def make(rate):
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale_by_schedule(shape), optax.scale(-rate)
        )

    return lambda rate: optax.inject_hyperparams(make)(rate=rate)


def fitted(adapted, params, part, setup, *, steps, batch, programs):
    """`(rate, seed) -> delta`, all runs by one compiled step."""
    make = optimiser(steps)
    step = train.Compiled(train.make_step(adapted, train.image_classification(), make(1.0)), donate_argnums=0)
    programs.append(step)
    init = jax.jit(adapted.init)

    def run(rate, seed):
        work = batches(part, batch, seed=seed, shuffle=True)
        delta = init(jax.random.key(seed), params, work.batch(0).image)
        return jax.device_get(train.fit(step, train.create(delta, make(rate), seed), params, work, steps).delta)

    return run


def pretrained(setup: Setup, model, keep: bool):
    """The backbone's weights, trained once; and their validation accuracy."""
    parts = splits("fashion-mnist", setup)

    def run(params):
        began, adapted = time.perf_counter(), adapt(model.apply, full())
        sizes = {"steps": setup.pretraining_steps, "batch": setup.pretraining_batch}
        delta = fitted(adapted, params, parts["train"], setup, **sizes, programs=[])(setup.pretraining_rate, 0)
        print(f"pretrained in {time.perf_counter() - began:.0f} s", flush=True)
        return adapted.merge(params, delta)

    what = {k: v for k, v in dataclasses.asdict(setup).items() if k in BACKBONE or k.startswith("pretraining")}
    start = jax.jit(model.init)(jax.random.key(0), parts["train"][0][:1])
    params = kept("vit-fashion-mnist", what, start, run, keep)
    return params, evaluated(adapt(model.apply, head()), model, params)(None, parts["validation"])


def evaluated(adapted, model, params):
    """`(delta, split) -> accuracy`; without a delta, of the model itself."""
    evaluation = train.Compiled(train.make_evaluation(adapted, train.image_classification()))

    def run(delta, part):
        delta = adapted.init(jax.random.key(0), params, part[0][:1]) if delta is None else delta
        return train.evaluate(evaluation, delta, params, batches(part, min(144, len(part[0])))).accuracy

    return run


def cost(adapted, params, setup: Setup) -> dict[str, float]:
    """Temporaries (MiB) and operations (GFLOP) of one gradient of the learned leaves."""
    images = jax.ShapeDtypeStruct((setup.cost_batch, 28, 28, 1), jnp.float32)
    labels = jax.ShapeDtypeStruct((setup.cost_batch,), jnp.int32)
    delta = jax.eval_shape(adapted.init, jax.random.key(0), params, images)

    def loss(delta, params, images, labels):
        return train.cross_entropy(adapted.apply(params, delta, images), labels).mean()

    program = jax.jit(jax.grad(loss)).lower(delta, params, images, labels).compile()
    return {
        "temporaries_mib": program.memory_analysis().temp_size_in_bytes / 2**20,
        "gflop": program.cost_analysis()["flops"] / 1e9,
    }


def measured(name, method, setup, model, params, parts):
    """One row (cost, the chosen rate, five seeds), and how it came about."""
    began = time.perf_counter()
    adapted = adapt(model.apply, method)
    run = fitted(adapted, params, parts["train"], setup, steps=setup.steps, batch=setup.batch, programs=[])
    score = evaluated(adapted, model, params)
    found: dict[tuple[float, int], tuple[float, object]] = {}

    def once(rate, seed):
        if (rate, seed) not in found:
            try:
                delta = run(rate, seed)
            except train.NonFiniteError:
                found[rate, seed] = (0.0, None)
            else:
                found[rate, seed] = (score(delta, parts["validation"]), delta)
        return found[rate, seed]

    tried = {rate: statistics.mean(once(rate, s)[0] for s in range(setup.tuning_seeds)) for rate in setup.rates}
    rate = max(tried, key=tried.__getitem__)
    finished = [once(rate, seed) for seed in range(setup.seeds)]
    test = [score(delta, parts["test"]) if delta is not None else 0.0 for _, delta in finished]
    trained = trees.count(trees.learned(finished[0][1])[0])
    row = {
        "method": name,
        "trained": trained,
        "rate": rate,
        "test": test,
        "test_mean": statistics.mean(test),
        "test_std": statistics.stdev(test),
        **cost(adapted, params, setup),
    }
    details = {
        "validation": [v for v, _ in finished],
        "validation_by_rate": {str(k): v for k, v in tried.items()},
        "rate_at_the_grids_edge": rate in (setup.rates[0], setup.rates[-1]),
        "seconds": time.perf_counter() - began,
    }
    print(
        f"{name:18} {trained:>9,} trained  rate {rate:g}  test {100 * row['test_mean']:.1f}"
        f" ± {100 * row['test_std']:.1f} %  {row['temporaries_mib']:.1f} MiB  {row['gflop']:.2f} GFLOP"
        f"  {details['seconds']:.0f} s",
        flush=True,
    )
    return row, details


def difference(a, b):
    """Mean and half-width of the 95 % interval of paired differences, in points."""
    d = [100 * (x - y) for x, y in zip(a["test"], b["test"])]
    return statistics.mean(d), T_95 * statistics.stdev(d) / len(d) ** 0.5


def verdicts(rows):
    """The docstring's claims against the rows."""
    by = {r["method"]: r for r in rows}
    ours = by["LST"]
    claims = []

    def claim(text, holds, evidence):
        claims.append(record.claim(text, holds, evidence))

    share = {n: ours["temporaries_mib"] / by[n]["temporaries_mib"] for n in ("LoRA", "adapters", "full")}
    claim(
        "LST's temporaries are at most half of LoRA's and of the adapters'",
        max(share["LoRA"], share["adapters"]) <= 0.5,
        f"{share['LoRA']:.0%} and {share['adapters']:.0%}",
    )
    claim("They are at most 40 % of full fine-tuning's", share["full"] <= 0.4, f"{share['full']:.0%}")
    operations = ours["gflop"] / by["LoRA"]["gflop"]
    claim("LST's gradient takes at most 60 % of LoRA's operations", operations <= 0.6, f"{operations:.0%}")
    for text, other, least in (
        ("LST is at least 2 points over the linear probe", "linear probe", 2.0),
        ("LST is at most 2 points under LoRA", "LoRA", -2.0),
        ("LST is over side-tuning without ladders", "LST, no ladders", 0.0),
        ("Pruned initialisation is at least as good as random", "LST, random init", 0.0),
    ):
        mean, half = difference(ours, by[other])
        holds = mean > least if other == "LST, no ladders" else mean >= least
        claim(text, holds, f"{mean:+.2f} ± {half:.2f} points")
    return claims


def figure(rows, path: Path) -> None:
    """Accuracy over memory, one point a method."""
    fig, axes = plt.subplots(figsize=(6.4, 4))
    for i, row in enumerate(rows):
        x, y = row["temporaries_mib"], 100 * row["test_mean"]
        axes.errorbar(x, y, 100 * row["test_std"], fmt="o", capsize=3)
        axes.annotate(row["method"], (x, y), xytext=(5, 5 if i % 2 else -12), textcoords="offset points", fontsize=8)
    axes.set_xlabel("temporaries of one gradient, batch 64 (MiB)")
    axes.set_ylabel("test accuracy on digits (%), mean ± std")
    axes.margins(x=0.15)
    fig.tight_layout()
    write_atomically(path, lambda p: fig.savefig(p, format="png", dpi=150))
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description="LST in small; see the file's first lines.")
    parser.add_argument("--smoke", action="store_true", help="each part once, in small")
    parser.add_argument("--out", type=Path, help="the JSON file to write, and beside it the figure")
    args = parser.parse_args()
    setup = SMOKE if args.smoke else Setup()
    out = args.out or (None if args.smoke else record.RESULTS / "lst.json")
    began = time.perf_counter()

    model = model_of(setup)
    base, source_accuracy = pretrained(setup, model, keep=not args.smoke)
    print(f"Fashion-MNIST validation accuracy {source_accuracy:.3f}", flush=True)
    # The target's classes are others: every method starts from the same new head.
    fresh = jax.jit(model.init)(jax.random.key(1), np.zeros((1, 28, 28, 1), np.float32))
    params = {"params": {**base["params"], "head": fresh["params"]["head"]}}
    parts = splits("digits", setup)
    done = {name: measured(name, m, setup, model, params, parts) for name, m in methods(setup).items()}
    rows = [row for row, _ in done.values()]
    claims = verdicts(rows)
    for c in claims:
        print(f"{c['verdict']:>14}: {c['claim']} ({c['evidence']})")
    result = {
        "paper": "LST, Sung et al., NeurIPS 2022",
        "setup": dataclasses.asdict(setup),
        **record.provenance(),
        "examples": {n: len(p[0]) for n, p in parts.items()},
        "source_validation_accuracy": source_accuracy,
        "claims": claims,
        "rows": rows,
        "details": {name: details for name, (_, details) in done.items()},
        "seconds": time.perf_counter() - began,
    }
    if out is not None:
        record.write(out, result)
        figure(rows, out.with_suffix(".png"))
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
