"""How fast and how large: LoRA fine-tuning of MiniLM here and with Hugging Face PEFT, on the same CPU.

    python experiments/bench/finetune.py            all of it: about 15 minutes on two quiet cores
    python experiments/bench/finetune.py --smoke    each part once, seconds

Both sides: BertForSequenceClassification with its pooler, LoRA r=8 on query and value, head trained, AdamW, batch 16 of
128 tokens of R8, float32, no dropout, two threads; each measurement is a process of its own, the sides take turns
(A B A B ...), and ratios are formed pair by pair. Needs the extra `parity`.

Stated before running. Goals: throughput at least 1.5 times PEFT's, peak resident memory at most 0.8 of its, adapted
over base forward at most 1.10; a vmapped sweep of 8 settings is reported against 8 PEFT runs one after another.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
ROWS, LENGTH, RANK, CLASSES = 16, 128, 8, 8


def write_batches(count, path):
    """`count` batches of R8 training texts, every row cut or padded to LENGTH: made once, read by both sides."""
    import numpy as np

    from jaxpeft import data

    text = data.load("r8")
    tokenizer = data.Tokenizer(data.model_folder("all-MiniLM-L6-v2"))
    rows = count * ROWS
    ids, mask = tokenizer.encode(text.train.inputs[:rows], LENGTH).padded(np.arange(rows), LENGTH, 0)
    labels = np.asarray(text.train.labels[:rows], np.int32)
    cut = lambda x: x.reshape(count, ROWS, *x.shape[1:])
    np.savez(path, ids=cut(ids), mask=cut(mask), labels=cut(labels))


def batches(count):
    """The first `count` of them as (ids, mask, labels)."""
    import numpy as np

    with np.load(os.environ["BENCH_BATCHES"]) as held:
        return list(zip(*(held[k][:count] for k in ("ids", "mask", "labels"))))


def text_batch(batch):
    import numpy as np

    from jaxpeft import data

    return data.TextBatch(*batch, np.ones(ROWS, np.float32), np.arange(ROWS, dtype=np.int32))


def report(**numbers):
    numbers["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(numbers), flush=True)


def timed(step, work):
    """Seconds to the first step's end from the process's start, then seconds of each later step."""
    began = float(os.environ["BENCH_BEGAN"])
    step(work[0])
    first = time.time() - began
    step(work[1])
    seconds = []
    for batch in work[2:]:
        t = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - t)
    return {"first_step_seconds": first, "step_seconds": statistics.median(seconds), "steps": len(seconds)}


def jaxpeft_model(method, accumulate=4):
    import jax
    import optax

    from jaxpeft import adapt, data, train
    from jaxpeft.models import load_classifier
    from jaxpeft.train.run import Config, build_method

    folder = data.model_folder("all-MiniLM-L6-v2")
    model, params = load_classifier(folder, CLASSES, pooling="bert", narrow=True, key=jax.random.key(0))
    adapted = adapt(
        model.apply, build_method(Config(method=method, options=(f"rank={RANK}",) if method == "lora" else ()))
    )
    optimiser = optax.adamw(1e-3)
    step = train.make_step(adapted, train.text_classification(), optimiser, accumulate=accumulate)
    return model, params, adapted, optimiser, step


def child_jaxpeft(steps):
    from jaxpeft.cli import environment

    environment()
    work = batches(steps + 2)
    import jax

    from jaxpeft import train

    _, params, adapted, optimiser, step = jaxpeft_model("lora")
    delta = jax.jit(adapted.init)(jax.random.key(0), params, *work[0][:2])
    state = train.create(delta, optimiser)
    program = train.Compiled(step, donate_argnums=0)

    def one(batch):
        nonlocal state
        state, numbers = program(state, params, text_batch(batch))
        return float(numbers["loss"])

    report(**timed(one, work), temporary_mb=program.temporary_bytes / 1e6)


def peft_base():
    """The base model in torch, without dropout; and what makes a LoRA model of it."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(2)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        os.environ["BENCH_MODEL"], num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"], modules_to_save=["classifier"]
    )

    def adapted(model):
        model = peft.get_peft_model(model, config)
        model.train()
        return model

    return base, adapted


def peft_step(model, rate):
    """`(batch) -> loss`, one AdamW step on the adapters and the classifier."""
    import torch

    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)

    def one(batch):
        ids, mask, labels = (torch.as_tensor(x).long() for x in batch)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return one


def child_peft(steps):
    work = batches(steps + 2)
    base, adapted = peft_base()
    report(**timed(peft_step(adapted(base), 1e-3), work))


def child_forward(steps):
    """Adapted and base forward passes in one process, in turn."""
    from jaxpeft.cli import environment

    environment()
    work = batches(2)
    import jax

    model, params, adapted, _, _ = jaxpeft_model("lora")
    delta = jax.jit(adapted.init)(jax.random.key(0), params, *work[0][:2])
    base = jax.jit(model.apply)
    ours = jax.jit(adapted.apply)
    ids, mask, _ = work[0]
    runs = {"base": lambda: base(params, ids, mask), "adapted": lambda: ours(params, delta, ids, mask)}
    seconds = {name: [] for name in runs}
    for run in runs.values():
        run().block_until_ready()
    for _ in range(3 * steps):
        for name, run in runs.items():
            t = time.perf_counter()
            run().block_until_ready()
            seconds[name].append(time.perf_counter() - t)
    pairs = [a / b for a, b in zip(seconds["adapted"], seconds["base"])]
    count = lambda f, *a: f.lower(*a).compile().cost_analysis()["flops"]
    flops = count(ours, params, delta, ids, mask) / count(base, params, ids, mask)
    report(adapted_over_base=statistics.median(pairs), pairs=pairs, flops_ratio=flops)


def child_sweep(steps):
    """Eight learning rates in one vmapped program, compile included; the clock starts where PEFT's loop would."""
    from jaxpeft.cli import environment

    environment()
    work = batches(steps)
    import jax
    import jax.numpy as jnp
    import optax

    from jaxpeft import train

    _, params, adapted, _, _ = jaxpeft_model("lora")
    rates = jnp.geomspace(1e-4, 4e-3, 8)
    began = time.perf_counter()

    def start(rate, params):
        return train.create(adapted.init(jax.random.key(0), params, *work[0][:2]), optax.adamw(rate))

    def step(rate, state, params, batch):
        return train.make_step(adapted, train.text_classification(), optax.adamw(rate), accumulate=16)(
            state, params, batch
        )

    states = jax.jit(jax.vmap(start, (0, None)))(rates, params)
    many = train.Compiled(jax.vmap(step, (0, 0, None, None)), donate_argnums=1)
    for batch in work:
        states, numbers = many(rates, states, params, text_batch(batch))
    numbers["loss"].block_until_ready()
    report(
        total_seconds=time.perf_counter() - began, compile_seconds=many.seconds, temporary_mb=many.temporary_bytes / 1e6
    )


def child_peft_sweep(steps):
    """Eight PEFT runs one after another: model loading is not counted, training is."""
    import copy

    work = batches(steps)
    base, adapted = peft_base()
    total = 0.0
    for k in range(8):
        model = adapted(copy.deepcopy(base))
        began = time.perf_counter()
        one = peft_step(model, 1e-4 * 40 ** (k / 7))
        for batch in work:
            one(batch)
        total += time.perf_counter() - began
    report(total_seconds=total)


CHILDREN = {
    "jaxpeft": child_jaxpeft,
    "peft": child_peft,
    "forward": child_forward,
    "sweep": child_sweep,
    "peft_sweep": child_peft_sweep,
}


def run(name, steps, cache):
    env = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "BENCH_BEGAN": str(time.time())}
    env |= {"JAX_COMPILATION_CACHE_DIR": cache, "TOKENIZERS_PARALLELISM": "false"}
    out = subprocess.run(
        [sys.executable, __file__, "--child", name, "--steps", str(steps)], env=env, capture_output=True, text=True
    )
    if out.returncode:
        raise RuntimeError(f"{name} failed:\n{out.stderr[-3000:]}")
    return json.loads(out.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", choices=CHILDREN)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sweep-steps", type=int, default=20)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.child:
        CHILDREN[arguments.child](arguments.steps)
        return
    steps, pairs, sweep_steps = (
        (1, 1, 1) if arguments.smoke else (arguments.steps, arguments.pairs, arguments.sweep_steps)
    )
    import record

    from jaxpeft.data import model_folder

    with tempfile.TemporaryDirectory() as cache:
        os.environ["BENCH_BATCHES"] = str(Path(cache) / "batches.npz")
        os.environ["BENCH_MODEL"] = str(model_folder("all-MiniLM-L6-v2"))
        write_batches(max(steps + 2, sweep_steps), os.environ["BENCH_BATCHES"])
        cold = run("jaxpeft", 1, cache)
        warm = run("jaxpeft", 1, cache)
        ours, theirs = [], []
        for _ in range(pairs):
            ours.append(run("jaxpeft", steps, cache))
            theirs.append(run("peft", steps, cache))
            print(f"step: {ours[-1]['step_seconds']:.3f} s here, {theirs[-1]['step_seconds']:.3f} s PEFT", flush=True)
        forward = run("forward", steps, cache)
        sweeps = [
            (run("sweep", sweep_steps, str(Path(cache) / f"none{i}")), run("peft_sweep", sweep_steps, cache))
            for i in range(1 if arguments.smoke else 2)
        ]
    throughput = [b["step_seconds"] / a["step_seconds"] for a, b in zip(ours, theirs)]
    memory = [a["peak_rss_mb"] / b["peak_rss_mb"] for a, b in zip(ours, theirs)]
    sweep = [a["total_seconds"] / b["total_seconds"] for a, b in sweeps]
    result = {
        **record.provenance("torch", "transformers", "peft"),
        "throughput_ratio": {"median": statistics.median(throughput), "runs": throughput, "goal": ">= 1.5"},
        "memory_ratio": {"median": statistics.median(memory), "runs": memory, "goal": "<= 0.8"},
        "adapted_over_base": {
            "median": forward["adapted_over_base"],
            "runs": forward["pairs"],
            "flops_ratio": forward["flops_ratio"],
            "goal": "<= 1.10",
        },
        "sweep_ratio": {"median": statistics.median(sweep), "runs": sweep, "settings": 8, "steps": sweep_steps},
        "examples_per_second": {
            "jaxpeft": [ROWS / a["step_seconds"] for a in ours],
            "peft": [ROWS / b["step_seconds"] for b in theirs],
        },
        "first_step_seconds": {
            "jaxpeft_cold": cold["first_step_seconds"],
            "jaxpeft_warm": warm["first_step_seconds"],
            "peft": statistics.median(b["first_step_seconds"] for b in theirs),
        },
        "step_temporary_mb": ours[0]["temporary_mb"],
        "peak_rss_mb": {"jaxpeft": [a["peak_rss_mb"] for a in ours], "peft": [b["peak_rss_mb"] for b in theirs]},
        "sweeps": [{"jaxpeft": a, "peft": b} for a, b in sweeps],
        "setting": {"rows": ROWS, "length": LENGTH, "rank": RANK, "threads": 2, "steps": steps, "accumulate": 4},
    }
    print(json.dumps(result, indent=1))
    target = arguments.out or (None if arguments.smoke else record.RESULTS / "bench_finetune.json")
    if target:
        record.write(target, result)


if __name__ == "__main__":
    main()
