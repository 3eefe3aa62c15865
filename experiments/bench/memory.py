"""What one gradient step of each method holds and computes: the compiler's own counts, which do not wobble.

    python experiments/bench/memory.py            a few minutes, from shapes alone: nothing is trained
    python experiments/bench/memory.py --smoke    three methods on a narrow model; writes nothing

MiniLM's shapes (6 layers of width 384), batch 16 of 128 tokens, float32, the whole batch at once, each method with its
defaults and the new head: temporaries and operations of one gradient of the learned leaves, as XLA compiles it for the
CPU; plain, with the layers recomputed in the backward pass, under one scanned layer, and both.

Stated before running:
  1. LST's temporaries are at least 60 % below full fine-tuning's at equal batch.
  2. They are at most half of LoRA's and of the adapters' (the paper: LST saves 69 % of full fine-tuning's memory, the
     others 26 %).
  3. No method but full fine-tuning takes more than 0.8 of its operations; LST takes less than any that changes the
     network inside.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxpeft import adapt, train
from jaxpeft.cli import environment
from jaxpeft.models import EncoderConfig, SequenceClassifier
from jaxpeft.train.run import Config, build_method

sys.path.insert(0, str(Path(__file__).parents[1]))
import record

METHODS = ["head", "bitfit", "lora", "dora", "ia3", "houlsby", "pfeiffer", "parallel", "prefix_tuning"]
METHODS += ["prompt_tuning", "mam", "lst", "full"]
LAYOUTS = {
    "plain": {},
    "remat": {"remat": True},
    "scan": {"scan": True},
    "scan and remat": {"scan": True, "remat": True},
}
ROWS, LENGTH, CLASSES = 16, 128, 8


def model_of(width=384, **layout):
    config = EncoderConfig(
        vocab=30522, width=width, layers=6, heads=12, head_dim=width // 12, mlp_width=4 * width, **layout
    )
    return SequenceClassifier(config, CLASSES)


def cost(model, method):
    """(temporary MiB, GFLOP) of one gradient."""
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    labels = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    adapted = adapt(model.apply, build_method(Config(method=method)))
    delta = jax.eval_shape(adapted.init, jax.random.key(0), params, ids, ids)

    def loss(delta, params, ids, mask, labels):
        return train.cross_entropy(adapted.apply(params, delta, ids, mask), labels).mean()

    program = jax.jit(jax.grad(loss)).lower(delta, params, ids, ids, labels).compile()
    return program.memory_analysis().temp_size_in_bytes / 2**20, program.cost_analysis()["flops"] / 1e9


def verdicts(rows):
    by = {r["method"]: r for r in rows}
    full, ours = by["full"], by["lst"]
    saved = 1 - ours["plain"] / full["plain"]
    others = {m: ours["plain"] / by[m]["plain"] for m in ("lora", "houlsby", "pfeiffer", "parallel") if m in by}
    work = {r["method"]: r["gflop"] / full["gflop"] for r in rows if r is not full}
    inside = [m for m in work if m not in ("head", "lst")]
    return [
        record.claim(
            "LST's temporaries are at least 60 % below full fine-tuning's", saved >= 0.6, f"{saved:.0%} below"
        ),
        record.claim(
            "They are at most half of LoRA's and of the adapters'",
            all(x <= 0.5 for x in others.values()),
            ", ".join(f"{x:.0%} of {m}'s" for m, x in others.items()),
        ),
        record.claim(
            "No other method takes more than 0.8 of full fine-tuning's operations, and LST less than any inside",
            max(work.values()) <= 0.8 and all(work["lst"] < work[m] for m in inside),
            ", ".join(f"{m} {x:.2f}" for m, x in work.items()),
        ),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    environment()
    rows = []
    for method in ["lora", "lst", "full"] if smoke else METHODS:
        row = {"method": method}
        for name, layout in LAYOUTS.items():
            if smoke and name != "plain":
                continue
            row[name], work = cost(model_of(48 if smoke else 384, **layout), method)
            if name == "plain":  # a loop's operations are counted for one turn only
                row["gflop"] = work
        rows.append(row)
        print({k: v if isinstance(v, str) else round(v, 1) for k, v in row.items()}, flush=True)
    claims = verdicts(rows)
    for c in claims:
        print(f"{c['verdict']:>14}: {c['claim']} ({c['evidence']})")
    if not smoke:
        setting = {"rows": ROWS, "length": LENGTH, "unit of plain, remat, scan": "MiB of temporaries"}
        record.write(
            record.RESULTS / "bench_memory.json",
            {**record.provenance(), "setting": setting, "claims": claims, "rows": rows},
        )


if __name__ == "__main__":
    main()
