"""What Llama-3-8B and 70B need on pods that are not here, as the platforms' compilers count it.

    python experiments/bench/plan.py            each case's step, one after another; hours on two cores
    python experiments/bench/plan.py --largest  and the largest batch that fits, variants left out; some compiles each
    python experiments/bench/plan.py --smoke    one narrow model on four chips; writes nothing here

Needs the extra `aot`. Nothing runs: bytes, collectives and cycles are the compilers' predictions. Finished cases are kept
in `plan_cases/`, so that a cut run goes on. v5e-16 and v5e-256 are that many chips, v5p-64 is 32 chips (64 cores).

Base in bfloat16, delta and AdamW in float32, layers scanned and recomputed, hidden states between blocks divided over
the tensor axis. LoRA and DoRA have rank 16 on query and value, LST r = 8 with a random start.

Known from the compiles that shaped `shard_activations`, so no prediction of ours:
  1. Llama-3-8B with LoRA at 16 x 2048 on v5e-16 takes at most the first sketch's 1.1 GB of arguments and 6.1 GB of
     temporaries a chip.
  2. Llama-3-70B with LoRA at 64 x 4096 fits on v5e-256 in half of the memory; most of what makes it so is "hidden".
  3. 64 LoRA runs of 8B, four to each of 16 groups of 16 chips, fit on v5e-256 with a batch of 8 x 2048.
Stated before running:
  4. DoRA takes at most 1.1 of LoRA's total at the same batch, wherever LoRA fits.
  5. Full fine-tuning of 8B does not fit on one H100 and fits on v5e-256.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import tempfile
from pathlib import Path

from jaxpeft.models.presets import PRESETS
from jaxpeft.train.activations import ALL
from jaxpeft.train.plan import PlanConfig, plan, prepare
from jaxpeft.train.plan_search import largest_batch

sys.path.insert(0, str(Path(__file__).parents[1]))
import record

RUNS = Path(__file__).parent / "plan_cases"
OPTIONS = {"lora": ("rank=16",), "dora": ("rank=16",), "lst": ("init=random",), "full": ()}
PODS = {"v5e-16": "v5e:4x4", "v5e-256": "v5e:16x16", "v5p-64": "v5p:2x4x4", "one H100": "h100:1", "8 H100": "h100:8"}
BATCHES = {
    "llama-3-8b": (2048, {"v5e-16": 16, "v5e-256": 256, "v5p-64": 32, "one H100": 4, "8 H100": 32}),
    "llama-3-70b": (4096, {"v5e-16": 16, "v5e-256": 64, "v5p-64": 32, "one H100": 1, "8 H100": 8}),
}


def cases():
    """{name: config}: the table; then its variants, named behind a comma: what makes 70B fit, the sweep."""
    out = {}
    for model, (length, rows) in BATCHES.items():
        for pod, n in rows.items():
            for method, options in OPTIONS.items():
                out[f"{model} {method} {pod}"] = PlanConfig(
                    model=model, pod=PODS[pod], method=method, options=options, rows=n, length=length
                )
    lora = out["llama-3-70b lora v5e-256"]
    for name in ALL:
        without = tuple(x for x in ALL if x != name)
        out[f"llama-3-70b lora v5e-256, {name} left to the compiler"] = dataclasses.replace(lora, activations=without)
    out["llama-3-70b lora v5e-256, all left to the compiler"] = dataclasses.replace(lora, activations=())
    out["llama-3-70b lora v5e-256, delta repeated"] = dataclasses.replace(lora, place_delta=False)
    out["llama-3-70b lora v5e-256, tensor 16"] = dataclasses.replace(lora, tensor=16)
    sweep = dataclasses.replace(out["llama-3-8b lora v5e-256"], runs=64, run_groups=16, rows=8)
    out["llama-3-8b lora v5e-256, 64 runs"] = sweep
    return out


def path_of(folder, config, what):
    """Where the answer to `what` ("plan", "largest") for this configuration is kept."""
    name = hashlib.sha256(json.dumps([what, dataclasses.asdict(config)], sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{name}.json"


def kept(folder, config, what, compute):
    """`compute()`, or what an earlier run kept of it for the same configuration."""
    path = path_of(folder, config, what)
    if not path.exists():
        record.write(path, compute())
    return json.loads(path.read_text())


def planned(folder, name, config, search):
    """All that is known of a case; its largest batch too where it is asked for, or was earlier."""
    found = {"case": name, **kept(folder, config, "plan", lambda: dataclasses.asdict(plan(config)))}
    if (search and "," not in name) or path_of(folder, config, "largest").exists():
        found |= kept(folder, config, "largest", lambda: searched(config))
    print(f"{name}: {found['total'] / 1e9:.2f} GB of {found['limit'] / 1e9:.2f}, fits: {found['fits']}", flush=True)
    return found


def searched(config):
    rows, plans = largest_batch(config)
    return {"largest_rows": rows, "searched": [[p.config.rows, p.total] for p in plans]}


def row_of(found):
    """A case's line of the table; GB are 10^9 bytes of one device."""
    config, gigabytes = found["config"], lambda *names: sum(found[n] for n in names) / 1e9
    return {
        "case": found["case"],
        "batch": f"{config['rows']} x {config['length']}",
        "mesh": ", ".join(f"{axis} {n}" for axis, n in found["mesh"].items()),
        "base GB": gigabytes("base"),
        "delta and optimiser GB": gigabytes("delta", "optimiser"),
        "temporaries GB": gigabytes("temporaries"),
        "total GB": gigabytes("total"),
        "of GB": gigabytes("limit"),
        "fits": "yes" if found["fits"] else "no",
        "largest batch": found.get("largest_rows"),
        "collectives": sum(c["count"] for c in found["collectives"].values()) or None,
        "sent GB": sum(c["bytes"] for c in found["collectives"].values()) / 1e9 or None,
        "computing s": found["seconds"] or None,
    }


def verdicts(rows):
    by = {r["case"]: r for r in rows}

    def gigabytes(name, field="total"):
        return by[name][field] / 1e9

    small, large = "llama-3-8b lora v5e-16", "llama-3-70b lora v5e-256"
    left = {name: gigabytes(f"{large}, {name} left to the compiler") for name in (*ALL, "all")}
    sweep = "llama-3-8b lora v5e-256, 64 runs"
    ratios = {
        name: by[name.replace(" lora ", " dora ")]["total"] / r["total"]
        for name, r in by.items()
        if " lora " in name and "," not in name and r["fits"]
    }
    full = ["llama-3-8b full one H100", "llama-3-8b full v5e-256"]
    return [
        record.claim(
            "Llama-3-8B with LoRA at 16 x 2048 on v5e-16 takes at most 1.1 GB of arguments and 6.1 GB of temporaries",
            gigabytes(small, "arguments") <= 1.1 and gigabytes(small, "temporaries") <= 6.1,
            f"{gigabytes(small, 'arguments'):.2f} GB and {gigabytes(small, 'temporaries'):.2f} GB",
        ),
        record.claim(
            "Llama-3-70B with LoRA at 64 x 4096 fits on v5e-256 in half of the memory; most of it is 'hidden'",
            by[large]["total"] <= by[large]["limit"] / 2 and max(ALL, key=left.get) == "hidden",
            f"{gigabytes(large):.2f} GB of {gigabytes(large, 'limit'):.2f}; left to the compiler: "
            + ", ".join(f"{name} {x:.2f} GB" for name, x in left.items()),
        ),
        record.claim(
            "DoRA takes at most 1.1 of LoRA's total wherever LoRA fits",
            max(ratios.values()) <= 1.1,
            ", ".join(f"{name}: {x:.2f}" for name, x in ratios.items()),
        ),
        record.claim(
            "full fine-tuning of 8B does not fit on one H100 and fits on v5e-256",
            not by[full[0]]["fits"] and by[full[1]]["fits"],
            f"{gigabytes(full[0]):.2f} GB and {gigabytes(full[1]):.2f} GB a device",
        ),
        record.claim(
            "64 LoRA runs of 8B fit on v5e-256 with a batch of 8 x 2048",
            by[sweep]["fits"],
            f"{gigabytes(sweep):.2f} GB a chip",
        ),
    ]


def smoke():
    """A narrow Llama on four chips, and that a finished case is not compiled again."""
    narrow = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(
            json.dumps(PRESETS["llama-3-8b"] | narrow | {"vocab_size": 512, "num_key_value_heads": 2})
        )
        config = PlanConfig(model=folder, pod="v5e:2x2", options=("rank=4",), rows=4, length=128)
        found = planned(Path(folder), "narrow", config, search=False)
        assert row_of(found)["fits"] == "yes"
        assert planned(Path(folder), "narrow", config, search=False) == found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    prepare()
    if arguments.smoke:
        smoke()
        return
    every = [planned(RUNS, name, config, arguments.largest) for name, config in cases().items()]
    claims = verdicts(every)
    for c in claims:
        print(f"{c['verdict']:>14}: {c['claim']} ({c['evidence']})")
    record.write(
        record.RESULTS / "bench_plan.json",
        {**record.provenance(), "claims": claims, "rows": [row_of(found) for found in every], "details": every},
    )


if __name__ == "__main__":
    main()
