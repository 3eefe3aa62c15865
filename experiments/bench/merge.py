"""Merging model folders: `jaxpeft merge --recipe` beside mergekit, as whole commands on the same folders.

    python experiments/bench/merge.py                             minutes; mergekit where it can be imported
    python experiments/bench/merge.py --mergekit FOLDER           with mergekit from another folder (pip install --target)
    python experiments/bench/merge.py --large                     3 GB of folders within 1 GB of memory instead
    python experiments/bench/merge.py --smoke                     small folders, once; writes nothing unless --out is given

Four Llama-shaped models of 102 million float32 parameters and their base, random; five methods with mergekit's names and
settings; both tools in turn, two threads each, files in the system's cache. Time is the whole command's, start included; memory
is the largest resident set of its process. Tensors are compared where the definitions agree (all but dare_ties, whose drops
are random).

Goals, stated before any run:
  1. At least 4 times mergekit's speed on TIES and breadcrumbs, at least twice on the others.
  2. At most 0.4 of its memory on each.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import record

ROOT = Path(__file__).parents[2]
METHODS = {
    "linear": {"merge_method": "linear"},
    "task_arithmetic": {"merge_method": "task_arithmetic", "base_model": "base"},
    "dare_ties": {"merge_method": "dare_ties", "base_model": "base"},
    "breadcrumbs": {"merge_method": "breadcrumbs", "base_model": "base"},
    "ties": {"merge_method": "ties", "base_model": "base"},
}
OWN = {
    "linear": {"weight": 0.25},
    "task_arithmetic": {"weight": 0.3},
    "dare_ties": {"weight": 0.3, "density": 0.5},
    "breadcrumbs": {"weight": 0.3, "density": 0.9, "gamma": 0.01},
    "ties": {"weight": 0.3, "density": 0.2},
}
GOALS = {"ties": 4.0, "breadcrumbs": 4.0}
WIDTH, INNER, LAYERS, VOCABULARY = 640, 1728, 12, 32000
MODELS = ("a", "b", "c", "d")


def shapes(width: int, inner: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        p = f"model.layers.{i}."
        out |= {f"{p}self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
        out |= {f"{p}mlp.{n}_proj.weight": (inner, width) for n in ("gate", "up")}
        out[f"{p}mlp.down_proj.weight"] = (width, inner)
        out |= {f"{p}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    return out | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def make(root: Path, sizes: tuple[int, int, int, int]) -> int:
    """The folders; their parameters each."""
    width, inner, layers, vocabulary = sizes
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        "vocab_size": vocabulary,
        "torch_dtype": "float32",
    }
    held = shapes(*sizes)
    rng = np.random.default_rng(0)
    base = {n: 0.02 * rng.standard_normal(s, np.float32) for n, s in held.items()}
    for name in ("base", *MODELS):
        (root / name).mkdir()
        moved = (
            base
            if name == "base"
            else {n: x + 1e-3 * rng.standard_normal(x.shape, np.float32) for n, x in base.items()}
        )
        save_file(moved, root / name / "model.safetensors", metadata={"format": "pt"})
        (root / name / "config.json").write_text(json.dumps(config))
    return sum(x.size for x in base.values())


def recipe_of(method: str, root: Path) -> Path:
    models = [{"model": str(root / m), "parameters": OWN[method]} for m in MODELS]
    held = {**METHODS[method], "models": models, "dtype": "float32"}
    if "base_model" in held:
        held["base_model"] = str(root / "base")
    path = root / f"{method}.yaml"
    path.write_text(json.dumps(held))  # JSON is YAML
    return path


def timed(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """(seconds, MiB) of a whole command. (What `wait4` tells of memory begins with the parent's, before the exec.)"""
    start, most = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **env})
    while process.poll() is None:
        with contextlib.suppress(OSError):
            held = Path(f"/proc/{process.pid}/status").read_text()
            most = max(most, *(int(line.split()[1]) for line in held.splitlines() if line.startswith("VmHWM")), 0)
        time.sleep(0.01)
    return time.perf_counter() - start, most / 1024


def ours(recipe: Path, out: Path) -> tuple[float, float]:
    program = "import sys; from jaxpeft.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "merge", "--recipe", str(recipe), "--out", str(out), "--workers", "2"]
    return timed(command, {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)})


def theirs(recipe: Path, out: Path, path: str) -> tuple[float, float]:
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(recipe), str(out), "--no-copy-tokenizer"]
    threads = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    return timed([*command, "--num-threads", "2"], threads | ({"PYTHONPATH": path} if path else {}))


def apart(a: Path, b: Path) -> dict[str, float]:
    """How far tensors are apart, and how many entries are by over 1e-5. (Of equal magnitudes at a threshold, here the first
    stay, and in mergekit any: its sort is not stable. In float32 a large tensor has several.)"""
    x, y = (load_file(p / "model.safetensors") for p in (a, b))
    gaps = {n: np.abs(x[n] - y[n]) for n in y}
    return {
        "most": max(float(g.max()) for g in gaps.values()),
        "entries": sum(int((g > 1e-5).sum()) for g in gaps.values()),
    }


def has_mergekit(path: str) -> bool:
    env = {**os.environ, **({"PYTHONPATH": path} if path else {})}
    run = [sys.executable, "-c", "import mergekit.merge"]
    return subprocess.run(run, env=env, capture_output=True, check=False).returncode == 0


def compared(root: Path, repeats: int, path: str, with_theirs: bool) -> list[dict[str, Any]]:
    rows = []
    for method in METHODS:
        recipe, found = recipe_of(method, root), []
        gap = {}
        for _ in range(repeats):
            mine = ours(recipe, root / "ours")
            other = theirs(recipe, root / "theirs", path) if with_theirs else (float("nan"), float("nan"))
            if with_theirs and method != "dare_ties":
                gap = apart(root / "ours", root / "theirs")
            found.append((*mine, *other))
            for name in ("ours", "theirs"):
                shutil.rmtree(root / name, ignore_errors=True)
        row = {"method": method}
        for i, name in enumerate(("seconds", "MiB", "mergekit seconds", "mergekit MiB")):
            row[name] = statistics.median(f[i] for f in found)
        row["speed"] = statistics.median(f[2] / f[0] for f in found)
        row["memory"] = statistics.median(f[1] / f[3] for f in found)
        row["speeds"] = [f[2] / f[0] for f in found]
        row |= {"farthest apart": gap.get("most"), "entries apart": gap.get("entries")}
        rows.append(row)
        print({k: round(v, 7) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return rows


def large(root: Path) -> dict[str, Any]:
    """Three folders of 1 GB each under a limit of 1 GB of data (not of what is mapped)."""
    sizes = (2048, 5504, 2, 32000)
    make(root, sizes)
    recipe = recipe_of("ties", root)
    held = json.loads(recipe.read_text())
    held["models"] = held["models"][:2]
    recipe.write_text(json.dumps(held))
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (10**9, 10**9)); "
        "from jaxpeft.merge.recipe import load_recipe; from jaxpeft.merge.streaming import merge_folders; "
        "merge_folders(load_recipe(sys.argv[1]), sys.argv[2], workers=2)"
    )
    seconds, memory = timed([sys.executable, "-c", program, str(recipe), str(root / "out")], {"PYTHONPATH": str(ROOT)})
    name = "model.layers.1.mlp.up_proj.weight"
    base, *models = (load_file(root / m / "model.safetensors")[name] for m in ("base", *MODELS[:2]))
    kept = []
    for tau in (m - base for m in models):
        largest = np.argsort(-np.abs(tau).ravel(), kind="stable")[: int(0.2 * tau.size)]
        mask = np.zeros(tau.size, bool)
        mask[largest] = True
        kept.append(np.where(mask.reshape(tau.shape), tau, 0))
    sign = np.sign(sum(kept))
    agree = [k * sign > 0 for k in kept]
    want = base + sum(np.where(a, k, 0) for a, k in zip(agree, kept)) / np.maximum(sum(a.astype(int) for a in agree), 1)
    got = load_file(root / "out" / "model.safetensors")[name]
    size = sum((root / m / "model.safetensors").stat().st_size for m in ("base", *MODELS[:2]))
    return {"gigabytes": size / 1e9, "seconds": seconds, "MiB": memory, "error": float(np.abs(got - want).max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--mergekit", default="", help="where mergekit is, if not installed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if args.large:
            found = large(root)
            print(found)
            path = record.RESULTS / "bench_merge.json"
            record.write(args.out or path, {**json.loads(path.read_text()), "large": [found], "tables": ["large"]})
            return
        count = make(root, (20, 24, 1, 50) if args.smoke else (WIDTH, INNER, LAYERS, VOCABULARY))
        there = not args.smoke and has_mergekit(args.mergekit)
        rows = compared(root, 1 if args.smoke else args.repeats, args.mergekit, there)
    if args.smoke:
        return
    slow = {r["method"]: r["speed"] for r in rows if r["speed"] < GOALS.get(r["method"], 2.0)}
    heavy = {r["method"]: r["memory"] for r in rows if r["memory"] > 0.4}
    said = lambda key: ", ".join(f"{r['method']} {r[key]:.2f}" for r in rows)
    claims = [
        record.claim("4 times mergekit's speed on TIES and breadcrumbs, twice on the others", not slow, said("speed")),
        record.claim("at most 0.4 of its memory", not heavy, said("memory")),
    ]
    for c in claims:
        print(f"{c['verdict']:>14}: {c['claim']} ({c['evidence']})")
    ratios = {
        "speed_ratio": {r["method"]: r["speed"] for r in rows},
        "memory_ratio": {r["method"]: r["memory"] for r in rows},
    }
    what = {"parameters": count, "repeats": args.repeats, "mergekit": "0.1.5"}
    record.write(
        args.out or record.RESULTS / "bench_merge.json",
        {"setup": what, **record.provenance(), "claims": claims, "rows": rows, **ratios},
    )


if __name__ == "__main__":
    main()
