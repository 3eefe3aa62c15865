"""Sixteen settings of LoRA: one program here, against one run after another here and with Hugging Face PEFT.

    python experiments/bench/sweep.py            about 10 minutes on two quiet cores
    python experiments/bench/sweep.py --smoke    every side once, two settings and two steps

A BERT-type encoder of 2 layers and width 64 with random weights, LoRA r=8 on query and value, head trained, AdamW, batch
16 of 32 tokens, float32, no dropout; 4 rates x 2 alphas x 2 seeds, 100 steps each on the same batches. Two threads. The
time is that of all sixteen runs, from settings to last loss, compiling included; reading models and starting processes
is not. Each side is a process of its own, without a compilation cache, and the sides take turns. The sides:

    sweep      `jaxpeft.sweep`: one program
    separate   sixteen runs, each jitted on its own, as a script that is started sixteen times
    shared     sixteen runs, one after another through ONE jitted step that takes the numbers as arguments: what is left
               of the gain when nothing is compiled twice
    peft       sixteen runs of PEFT

Stated before running:
  1. The sweep takes at most 0.35 of the time of sixteen separate runs.
  2. Its last losses are those of the separate runs to 1e-5.
The ratios to PEFT and to the shared program are reported. Needs the extra `parity`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
ROWS, LENGTH, RANK, CLASSES, VOCAB, WIDTH, LAYERS, HEADS = 16, 32, 8, 4, 1000, 64, 2, 4
RATES, ALPHAS, SEEDS = (1e-3, 2e-3, 4e-3, 8e-3), (8.0, 16.0), (0, 1)
SIDES = ("sweep", "separate", "shared", "peft")


def batches(count):
    """(ids, labels): the label is told by the first token."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCAB, (count, ROWS, LENGTH)).astype(np.int32)
    return [(x, (x[:, 0] % CLASSES).astype(np.int32)) for x in ids]


def points():
    """The settings as plain numbers."""
    every = [dict(rate=r, alpha=a, seed=s) for r in RATES for a in ALPHAS for s in SEEDS]
    return every[: int(os.environ["BENCH_SETTINGS"])]


def jaxpeft_side():
    """`(work, params, make)` of our three sides."""
    import jax
    import optax

    from jaxpeft import adapt, chain, data, head, lora, train
    from jaxpeft.models import EncoderConfig, SequenceClassifier

    def batch(ids, labels):
        ones = np.ones(ROWS, np.float32)
        return data.TextBatch(ids, np.ones_like(ids), labels, ones, np.arange(ROWS, dtype=np.int32))

    config = EncoderConfig(
        vocab=VOCAB, width=WIDTH, layers=LAYERS, heads=HEADS, head_dim=WIDTH // HEADS, mlp_width=4 * WIDTH, pooler=True
    )
    model = SequenceClassifier(config, CLASSES, pooling="bert")
    work = [batch(*b) for b in batches(int(os.environ["BENCH_STEPS"]))]
    inputs = work[0].input_ids, work[0].attention_mask
    params = jax.block_until_ready(jax.jit(model.init)(jax.random.key(0), *inputs))

    def make(setting):
        adapted = adapt(model.apply, chain(lora(rank=RANK, alpha=setting["alpha"]), head()))
        optimiser = optax.adamw(setting["rate"], weight_decay=0.01)
        return train.run_of(adapted, optimiser, train.text_classification(), *inputs, seed=setting["seed"])

    return work, params, make


def child_sweep():
    from jaxpeft import sweep

    work, params, make = jaxpeft_side()
    began = time.perf_counter()
    settings = {name: np.array([p[name] for p in points()]) for name in points()[0]}
    found = sweep(make, settings, params, work, steps=len(work))
    seconds = time.perf_counter() - began
    report(seconds, found.history["loss"][-1], compile_seconds=found.compile_seconds, peak_bytes=found.peak_bytes)


def child_separate():
    import jax

    work, params, make = jaxpeft_side()
    began, losses = time.perf_counter(), []
    for setting in points():
        run = make(setting)
        state = jax.jit(run.init)(params)
        step = jax.jit(run.step, donate_argnums=0)
        for batch in work:
            state, numbers = step(state, params, batch)
        losses.append(float(numbers["loss"]))
    report(time.perf_counter() - began, losses)


def child_shared():
    import jax

    work, params, make = jaxpeft_side()
    began, losses = time.perf_counter(), []
    init = jax.jit(lambda setting, params: make(setting).init(params))
    step = jax.jit(lambda setting, state, *rest: make(setting).step(state, *rest), donate_argnums=1)
    for setting in points():
        state = init(setting, params)
        for batch in work:
            state, numbers = step(setting, state, params, batch)
        losses.append(float(numbers["loss"]))
    report(time.perf_counter() - began, losses)


def child_peft():
    import copy

    import peft
    import torch
    import transformers

    torch.set_num_threads(2)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    base = transformers.BertForSequenceClassification(config)
    work = [
        {
            "input_ids": torch.as_tensor(ids).long(),
            "attention_mask": torch.ones(ROWS, LENGTH).long(),
            "labels": torch.as_tensor(labels).long(),
        }
        for ids, labels in batches(int(os.environ["BENCH_STEPS"]))
    ]
    began, losses = time.perf_counter(), []
    for setting in points():
        torch.manual_seed(setting["seed"])
        lora = peft.LoraConfig(
            r=RANK,
            lora_alpha=setting["alpha"],
            target_modules=["query", "value"],
            modules_to_save=["classifier"],
        )
        model = peft.get_peft_model(copy.deepcopy(base), lora)
        model.train()
        learned = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(learned, lr=setting["rate"], weight_decay=0.01)
        for batch in work:
            loss = model(**batch).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        losses.append(loss.item())
    report(time.perf_counter() - began, losses, trained=sum(p.numel() for p in learned))


CHILDREN = {"sweep": child_sweep, "separate": child_separate, "shared": child_shared, "peft": child_peft}


def report(seconds, losses, **more):
    print(json.dumps({"seconds": seconds, "losses": [float(x) for x in losses], **more}), flush=True)


def run(side, steps, settings):
    env = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "BENCH_STEPS": str(steps)}
    env["BENCH_SETTINGS"] = str(settings)
    env = {k: v for k, v in env.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    words = [sys.executable, __file__, "--child", side]
    out = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if out.returncode:
        raise RuntimeError(f"{side} failed:\n{out.stderr[-3000:]}")
    return json.loads(out.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", choices=CHILDREN)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.child:
        CHILDREN[arguments.child]()
        return
    steps, rounds, settings = (2, 1, 2) if arguments.smoke else (arguments.steps, arguments.rounds, 16)
    import record

    found = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            found[side].append(run(side, steps, settings))
        print({side: f"{runs[-1]['seconds']:.1f} s" for side, runs in found.items()}, flush=True)

    def ratio(other, **more):
        runs = [a["seconds"] / b["seconds"] for a, b in zip(found["sweep"], found[other])]
        return {"median": statistics.median(runs), "runs": runs, **more}

    total = ratio("separate", goal="<= 0.35")
    apart = max(
        float(np.abs(np.subtract(a["losses"], b["losses"])).max()) for a, b in zip(found["sweep"], found["separate"])
    )
    claims = [
        record.claim(
            "Sixteen settings in one program take at most 0.35 of the time of sixteen separate jitted runs",
            total["median"] <= 0.35,
            f"{total['median']:.2f}",
        ),
        record.claim("Their last losses are those of the separate runs to 1e-5", apart <= 1e-5, f"{apart:.1e} apart"),
    ]
    result = {
        **record.provenance("torch", "transformers", "peft"),
        "claims": claims,
        "total_time_ratio": total,
        "ratio_to_peft": ratio("peft"),
        "ratio_to_shared_program": ratio("shared"),
        "seconds": {side: [r["seconds"] for r in runs] for side, runs in found.items()},
        "compile_seconds": [r["compile_seconds"] for r in found["sweep"]],
        "step_peak_bytes": found["sweep"][0]["peak_bytes"],
        "setting": {"settings": settings, "steps": steps, "rows": ROWS, "length": LENGTH, "rank": RANK, "threads": 2},
    }
    print(json.dumps(result, indent=1))
    target = arguments.out or (None if arguments.smoke else record.RESULTS / "bench_sweep.json")
    if target:
        record.write(target, result)


if __name__ == "__main__":
    main()
