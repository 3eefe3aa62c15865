"""Several methods and seeds on one budget: a table with means and spreads, and accuracy against parameters."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpeft.method import entry
from jaxpeft.train.report import bytes_text, save_tradeoff
from jaxpeft.train.run import Config, ConfigError, Progress, finetune, load, write_json


def parse(spec: str) -> tuple[str, tuple[str, ...], float]:
    """`"lora:rank=4,rate=2e-3"` as (method, options, rate); a rate of 0 is the method's own."""
    name, _, rest = spec.partition(":")
    entry(name)
    options, rate = [], 0.0
    for part in filter(None, rest.split(",")):
        if part.startswith("rate="):
            rate = float(part.removeprefix("rate="))
        else:
            options.append(part)
    return name, tuple(options), rate


def compare(
    config: Config, specs: Sequence[str], seeds: Iterable[int], out: Path, *, progress: Progress = lambda *_: None
) -> Any:
    """Trains every method with every seed and writes `results.json`, `table.md` and `tradeoff.png` into `out`.

    Runs whose result is already in `out` are read, not repeated, if their configuration is the same.

    Args:
      config: the budget all share; `method` and `options` come from `specs`, the rate too where one names it.
      specs: `name` or `name:option=value,rate=...`.
      seeds: each also draws its own subsample where the budget has `per_class`.
      out: folder.

    Returns:
      The table, for printing.
    """
    seeds = list(seeds)
    if not specs or not seeds:
        raise ConfigError(f"{len(specs)} methods and {len(seeds)} seeds: there is nothing to compare")
    parsed = [parse(s) for s in specs]
    results: list[dict[str, Any]] = []
    for seed in seeds:
        loaded = None
        for name, options, rate in parsed:
            run = dataclasses.replace(config, method=name, options=options, rate=rate or config.rate, seed=seed)
            path = out / "runs" / f"{name}-{seed}.json"
            done = _finished(path, run)
            if done is None:
                loaded = load(run) if loaded is None else loaded
                done = finetune(run, None, loaded=loaded, progress=progress)
                write_json(path, {"config": dataclasses.asdict(run), "result": done})
                jax.clear_caches()
            results.append(done)
    rows = summarise(results, [name for name, _, _ in parsed])
    write_json(
        out / "results.json",
        {"config": dataclasses.asdict(config), "seeds": seeds, "methods": list(specs), "rows": rows},
    )
    (out / "table.md").write_text(markdown(rows) + "\n")
    size = f"{config.per_class} examples a class" if config.per_class else "all training data"
    save_tradeoff(rows, out / "tradeoff.png", f"{Path(config.dataset).name}, {size}, {len(seeds)} seeds")
    return markdown(rows)


def _finished(path: Path, config: Config) -> dict[str, Any] | None:
    if not path.exists():
        return None
    held = json.loads(path.read_text())
    same = held["config"] == json.loads(json.dumps(dataclasses.asdict(config)))
    return held["result"] if same else None


def summarise(results: Sequence[dict[str, Any]], order: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and sample deviation over seeds, by method."""
    rows = []
    for name in order:
        mine = [r for r in results if r["method"] == name]
        scores = np.array([r["test_accuracy"] for r in mine])
        f1 = np.array([r["test_macro_f1"] for r in mine])
        rows.append(
            {
                "method": name,
                "mean": float(scores.mean()),
                "std": float(scores.std(ddof=1)) if len(scores) > 1 else 0.0,
                "per_seed": scores.tolist(),
                "macro_f1": float(f1.mean()),
                "macro_f1_per_seed": f1.tolist(),
                "trained_parameters": mine[0]["trained_parameters"],
                "trained_percent": mine[0]["trained_percent"],
                "step_temporary_bytes": mine[0]["step_temporary_bytes"],
                "train_seconds": float(np.median([r["train_seconds"] for r in mine])),
            }
        )
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = [
        "| method | test accuracy | macro-F1 | trained parameters | step's temporaries | training |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['method']} | {100 * r['mean']:.2f} ± {100 * r['std']:.2f} % | {r['macro_f1']:.3f} "
            f"| {r['trained_parameters']:,} ({r['trained_percent']:.2f} %) | {bytes_text(r['step_temporary_bytes'])} "
            f"| {r['train_seconds']:.0f} s |"
        )
    return "\n".join(lines)
