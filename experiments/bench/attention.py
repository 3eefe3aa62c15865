"""What a prefix costs in the attention kernel, as the TPU compiler counts it; nothing is run.

    python experiments/bench/attention.py            a few minutes; needs the extra `aot`, no accelerator
    python experiments/bench/attention.py --smoke    one workload; writes nothing unless --out is given

For every attention of `jaxpeft.kernels.workloads` in bfloat16, compiled for TPU v5e, the forward kernel: with a prefix
beside its keys, over the same keys alone, and over keys longer by the prefix's length (what putting it before the keys
costs). Bundles are the compiler's static instruction words, about one a cycle, each part of the kernel's body weighed by
how often it is entered. Predictions: waiting for memory is not among them, for which the floor stands: the operations and
the bytes that must move over the device's peak and bandwidth.

Known beforehand, so no prediction of ours: where keys fill several blocks a prefix costs less than longer keys, which take
one more block for every block of queries; and in a first run a prefix in a block of its own cost 1.29 and 1.11 where one
block held all keys (ViT-L, MiniLM), which is why it now stands before them there. Asked for, and reported as holding or not:
  1. Attention with a prefix takes at most 1.05 of the bundles of attention over the longer keys, for every workload.
"""

import argparse
import functools
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from jaxpeft import aot
from jaxpeft.kernels import attention
from jaxpeft.kernels.attention import SHORT
from jaxpeft.kernels.attention_blocks import Blocks
from jaxpeft.kernels.block_selection import reachable
from jaxpeft.kernels.workloads import ATTENTION

sys.path.insert(0, str(Path(__file__).parents[1]))
import record
import schedule

KIND, DTYPE, MATRIX_UNITS = "v5e", jnp.bfloat16, 4
DUMP = Path(tempfile.mkdtemp(prefix="jaxpeft-schedules-"))


def measured(w, keys: int, prefix: int) -> dict[str, float]:
    """Bundles and matrix-unit instructions of one call over so many keys."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=DTYPE)
    joined = bool(prefix) and keys + prefix <= SHORT
    whole, apart = (keys + prefix, 0) if joined else (keys, prefix)
    blocks = Blocks.for_tpu(w.t, whole, w.head_dim, apart, DTYPE)
    # Queries stand at the end of the keys that the workload has.
    offset = keys - w.s if w.causal else 0
    options = dict(causal=w.causal, offset=offset, with_lse=True, backend="tpu")
    q, kv = shape((w.b, w.t, w.heads, w.head_dim)), shape((w.b, keys, w.kv_heads, w.head_dim))
    operands = [q, kv, kv]
    if prefix:
        operands += [shape((1, prefix, w.kv_heads, w.head_dim))] * 2

    def call(q, k, v, *prefix):
        return attention(q, k, v, prefix=prefix or None, **options)

    aot.compile_for(KIND, call, *operands)
    pairs = reachable(w.t, whole, blocks.q, blocks.k, w.causal, offset + (prefix if joined else 0))
    rows, slots, each = pairs.shape[0], int(pairs.sum(1).max()), w.b * w.heads
    found = schedule.regions(DUMP, "attention")
    body = max((r for r in found if r.depth == 1), key=lambda r: r.end - r.start)
    inside = [r for r in found if body.start < r.start and r.end < body.end]
    times = dict.fromkeys((r.start for r in found), each * rows * slots)
    # A row's first step, its blocks of keys, its last step; with one block a row nothing is left to decide but the second.
    parts = [each * rows, each * int(pairs.sum()), each * rows] if slots > 1 else [each * int(pairs.sum())]
    # The last part may end with the body, as the pipeline's copies do: it is told by its size.
    inside = [r for r in found if r.depth == 2 and r.start > body.start and r.own > 64]
    if len(inside) not in (len(parts), 0):
        raise RuntimeError(f"{w.name}: {len(inside)} parts where {len(parts)} were expected: {found}")
    times |= dict(zip((r.start for r in inside), parts))
    bundles = sum(times[r.start] * r.own for r in found)
    return {
        "bundles": bundles,
        "mxu": sum(times[r.start] * r.mxu for r in found),
        "block_q": blocks.q,
        "block_k": blocks.k,
    }


def row_of(w):
    with_prefix, alone, longer = measured(w, w.s, w.prefix), measured(w, w.s, 0), measured(w, w.s + w.prefix, 0)
    pairs = w.t * w.s / (2 if w.causal else 1) + w.t * w.prefix
    operations = 4 * w.b * w.heads * w.head_dim * pairs
    size = jnp.dtype(DTYPE).itemsize
    least = (
        size * w.b * w.head_dim * (2 * w.t * w.heads + 2 * w.s * w.kv_heads)
        + 2 * size * w.prefix * w.kv_heads * w.head_dim
    )
    return {
        "workload": w.name,
        "prefix": w.prefix,
        "blocks": [with_prefix["block_q"], with_prefix["block_k"]],
        "gflop": operations / 1e9,
        "least_mib": least / 2**20,
        "floor_us": {
            k: 1e6 * max(operations / aot.TARGETS[k].flops, least / aot.TARGETS[k].bandwidth) for k in (KIND, "h100")
        },
        "bundles": with_prefix["bundles"],
        "to_longer_keys": with_prefix["bundles"] / longer["bundles"],
        "to_no_prefix": with_prefix["bundles"] / alone["bundles"],
        "matrix_unit_share": with_prefix["mxu"] / (MATRIX_UNITS * with_prefix["bundles"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What a prefix costs in attention; see the file's first lines.")
    parser.add_argument("--smoke", action="store_true", help="the smallest workload")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args()
    out = args.out or (None if args.smoke else record.RESULTS / "bench_attention.json")
    schedule.dump_into(DUMP)
    rows = []
    for w in ATTENTION[-1:] if args.smoke else ATTENTION:
        rows.append(row_of(w))
        r = rows[-1]
        print(
            f"{w.name:28} {r['bundles']:>12,} bundles, {r['to_longer_keys']:.3f} of longer keys, {r['to_no_prefix']:.3f} of "
            f"no prefix, matrix unit {r['matrix_unit_share']:.0%}",
            flush=True,
        )
    worst = max(rows, key=lambda r: r["to_longer_keys"])
    claims = [
        record.claim(
            "Attention with a prefix takes at most 1.05 of the bundles of attention over the longer keys",
            worst["to_longer_keys"] <= 1.05,
            f"predicted; worst {worst['to_longer_keys']:.3f}, {worst['workload']}",
        )
    ]
    print(claims[0])
    if out is not None:
        record.write(out, {"claims": claims, **record.provenance(), "device": KIND, "rows": rows})
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
