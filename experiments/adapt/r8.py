"""All methods of the main job on Reuters R8 with few examples, and three of them with all of them.

    python experiments/adapt/r8.py --tune        learning rates, on the validation split: writes rates.json
    python experiments/adapt/r8.py               12 methods x 3 seeds, 20 examples a class; then head, LoRA, full on all
    python experiments/adapt/r8.py --smoke       each part at its smallest, seconds to minutes; writes nothing here

Stated before running: with 20 examples a class, the methods that change the network (all but `head`) are better in the
mean than the linear probe; LoRA, adapters and MAM come within one standard deviation of full fine-tuning while training
under 5 % of its parameters; LST is above the linear probe. Seeds draw the subsample too, so spreads contain it.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from jaxpeft.cli import environment
from jaxpeft.train.compare import compare
from jaxpeft.train.run import Config, finetune, load, write_json

HERE = Path(__file__).parent
METHODS = [
    "head",
    "bitfit",
    "lora",
    "dora",
    "ia3",
    "pfeiffer",
    "parallel",
    "prefix_tuning",
    "prompt_tuning",
    "mam",
    "lst",
]
METHODS += ["full"]
LOW = Config(per_class=20, steps=80, batch_size=16, max_length=128, schedule="linear", warmup=0.1)
FULL = Config(epochs=1.0, batch_size=16, max_length=128)
GRID = (0.3, 1.0, 3.0)
"""Factors on each method's registered rate, the best of which on validation is taken."""


def show(step, steps, rate, numbers):
    if step == steps:
        print(f"  {step} steps, {rate:.0f} examples/s, {numbers}", flush=True)


def tune(out, methods, config):
    """Each method at three rates with seed 100, which no measured run uses; scored on validation only."""
    from jaxpeft.method import entry

    config = dataclasses.replace(config, seed=100, test=False)
    found, loaded = {}, None
    for method in methods:
        scores = {}
        for factor in GRID:
            run = dataclasses.replace(config, method=method, rate=factor * entry(method).rate)
            loaded = loaded or load(run)
            scores[run.rate] = finetune(run, None, loaded=loaded)["validation_accuracy"]
        found[method] = {"rate": max(scores, key=scores.get), "scores": scores}
        print(method, found[method], flush=True)
        write_json(out / "rates.json", found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    environment()
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            small = dataclasses.replace(LOW, per_class=2, steps=2, max_length=16)
            print(compare(small, ["head", "lora"], [0], Path(folder)))
        return
    if arguments.tune:
        tune(HERE / "r8", METHODS, LOW)
        return
    path = HERE / "r8" / "rates.json"
    rates = json.loads(path.read_text()) if path.exists() else {}
    specs = [f"{m}:rate={rates[m]['rate']}" if m in rates else m for m in METHODS]
    print(compare(LOW, specs, range(3), HERE / "r8", progress=show))
    print(compare(FULL, ["head", "lora", "full"], [0], HERE / "r8_full", progress=show))


if __name__ == "__main__":
    main()
