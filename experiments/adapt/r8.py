"""All methods of the main job on Reuters R8 with few examples, and three of them with all of them.

    python experiments/adapt/r8.py --tune        learning rates, on the validation split: writes r8_rates.json
    python experiments/adapt/r8.py               12 methods x 3 seeds, 20 examples a class
    python experiments/adapt/r8.py --default     what `jaxpeft finetune` does where nothing else is said
    python experiments/adapt/r8.py --full        head, LoRA and full fine-tuning once each on all of R8
    python experiments/adapt/r8.py --smoke       each part at its smallest, seconds to minutes; writes nothing here

About 20, 25, 5 and 15 minutes on two cores. The model is all-MiniLM-L6-v2, the test split R8's standard one. Few examples:
20 of each class (fewer where a class has fewer), cut at 64 tokens, 80 updates of 16. All: one epoch at 128
tokens. Seeds draw the subsample too, so spreads contain it.

Stated before running. With few examples:
  1. every method that changes the network is better in the mean than the linear probe (`head`), LST among them;
  2. LoRA, the Pfeiffer and the parallel adapter and MAM come within one standard deviation of full fine-tuning (the
     larger of the two spreads), with under 5 % of its parameters.
With all of them:
  3. the default of `jaxpeft finetune`, LoRA, reaches 95 % on the test split;
  4. it trains in about five minutes (330 s at most) on two cores;
  5. it is over the linear probe and at most one point under full fine-tuning (stated when LoRA's own number was known,
     before the other two ran).
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from jaxpeft.cli import environment
from jaxpeft.method import entry
from jaxpeft.train.compare import compare
from jaxpeft.train.run import Config, finetune, load

sys.path.insert(0, str(Path(__file__).parents[1]))
import record

HERE = Path(__file__).parent
METHODS = ["head", "bitfit", "lora", "dora", "ia3", "pfeiffer", "parallel", "prefix_tuning", "prompt_tuning", "mam"]
METHODS += ["lst", "full"]
LOW = Config(per_class=20, steps=80, batch_size=16, max_length=64, warmup=0.1, validate_every=80)
FULL = Config()
GRID = (0.3, 1.0, 3.0)
"""Factors on each method's registered rate, the best of which on validation is taken; one more, three times
further out, where the best is at an edge."""


def show(step, steps, rate, numbers):
    if step == steps:
        print(f"  {step} steps, {rate:.0f} examples/s, {numbers}", flush=True)


def tune(path, methods, config):
    """Each method's rate by one run a rate with seed 100, which no measured run uses; scored on validation only."""
    config = dataclasses.replace(config, seed=100, test=False)
    found, loaded = {}, load(config)
    for method in methods:
        scores = {}

        def score(factor, method=method, scores=scores):
            run = dataclasses.replace(config, method=method, rate=factor * entry(method).rate)
            scores[run.rate] = finetune(run, None, loaded=loaded)["validation_accuracy"]

        for factor in GRID:
            score(factor)
        best = max(scores, key=scores.get)
        if best == max(scores):
            score(3 * GRID[-1])
        elif best == min(scores):
            score(GRID[0] / 3)
        found[method] = {"rate": max(scores, key=scores.get), "scores": scores}
        print(method, found[method], flush=True)
        record.write(path, found)


def verdict(rows):
    """The claims on few examples."""
    by = {r["method"]: r for r in rows}
    probe, full = by["head"], by["full"]
    below = [r["method"] for r in rows if r is not probe and r["mean"] <= probe["mean"]]
    near = {m: by[m]["mean"] - full["mean"] for m in ("lora", "pfeiffer", "parallel", "mam")}
    inside = all(d >= -max(by[m]["std"], full["std"]) and by[m]["trained_percent"] < 5 for m, d in near.items())
    gaps = ", ".join(f"{m} {100 * d:+.2f}" for m, d in near.items())
    sizes = ", ".join(f"{by[m]['trained_percent']:.2f} %" for m in near)
    return [
        record.claim(
            "every method that changes the network is better in the mean than the linear probe",
            not below,
            f"head {100 * probe['mean']:.2f} %; not above it: {', '.join(below) or 'none'}",
        ),
        record.claim(
            "LoRA, Pfeiffer, parallel and MAM come within one standard deviation of full fine-tuning with under 5 % of "
            "its parameters",
            inside,
            f"points from full: {gaps} (its spread {100 * full['std']:.2f}); trained: {sizes}",
        ),
    ]


def verdict_default(rows):
    """The claims on the default."""
    lora = next(r for r in rows if r["method"] == "lora")
    return [
        record.claim(
            "the default of `jaxpeft finetune` reaches 95 % on R8's standard test split",
            lora["mean"] >= 0.95,
            f"{100 * lora['mean']:.2f} %, macro-F1 {lora['macro_f1']:.3f}, one seed",
        ),
        record.claim(
            "it trains in about five minutes on two cores (330 s at most)",
            lora["train_seconds"] <= 330,
            f"{lora['train_seconds']:.0f} s, validation included",
        ),
    ]


def verdict_full(rows):
    """The claim on three methods with all examples."""
    by = {r["method"]: r["mean"] for r in rows}
    return [
        record.claim(
            "LoRA is over the linear probe and at most one point under full fine-tuning",
            by["lora"] > by["head"] and by["lora"] >= by["full"] - 0.01,
            ", ".join(f"{m} {100 * x:.2f} %" for m, x in by.items()),
        )
    ]


def run(config, specs, seeds, slug, verdicts, **more):
    """The comparison and its results file; finished runs are kept in `runs/`, so that a cut one goes on."""
    folder = HERE / "runs" / slug
    print(compare(config, specs, seeds, folder, progress=show))
    held = json.loads((folder / "results.json").read_text())
    claims = verdicts(held["rows"])
    for c in claims:
        print(f"{c['verdict']:>14}: {c['claim']} ({c['evidence']})")
    record.write(record.RESULTS / f"{slug}.json", {**record.provenance(), "claims": claims, **held, **more})
    if len(specs) > 1:
        (record.RESULTS / f"{slug}.png").write_bytes((folder / "tradeoff.png").read_bytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--default", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    environment()
    rates = HERE / "r8_rates.json"
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            small = dataclasses.replace(LOW, per_class=2, steps=2, max_length=16)
            tune(Path(folder) / "rates.json", ["head"], small)
            print(compare(small, ["head", "lora"], [0], Path(folder)))
    elif arguments.tune:
        tune(rates, METHODS, LOW)
    elif arguments.default:
        run(FULL, ["lora"], [0], "r8_default", verdict_default)
    elif arguments.full:
        run(FULL, ["head", "lora", "full"], [0], "r8_full", verdict_full)
    else:
        chosen = json.loads(rates.read_text())
        specs = [f"{m}:rate={chosen[m]['rate']:g}" for m in METHODS]
        run(LOW, specs, range(3), "r8", verdict, rates=chosen)


if __name__ == "__main__":
    main()
