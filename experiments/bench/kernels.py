"""What the kernels must do and what the TPU compiler makes of them: operations, bytes, static schedule; nothing is run.

    python experiments/bench/kernels.py            ten minutes; needs the extra `aot`, no accelerator
    python experiments/bench/kernels.py --smoke    one workload of each; writes nothing unless --out is given

For every product of `jaxpeft.kernels.workloads` in bfloat16, compiled for TPU v5e: the fused low-rank kernel, the same
kernel without its low-rank part, and what XLA makes of `x w + 2 (x a) b`. Bundles are the compiler's static instruction
words, about one a cycle, weighed by how often each part of the kernel's body is entered; the matrix unit's share is of
its four slots a bundle. For batches in which every example has factors of its own, the grouped kernel against the plain
product with the same blocks. XLA's figure is its own estimate of cycles for the fusions it makes. All are predictions:
they do not see waiting for memory, for which the floor beside them stands: bytes over bandwidth, operations over peak.

Stated before running, each to be reported as holding or not:
  1. At r = 16 the fused product takes at most 1.08 of the plain product's bundles, for every workload.
  2. It moves at most 1.02 times the bytes of the plain product with the same blocks, and a and b.
  3. It takes fewer cycles than XLA's estimate of its own version.
  4. With factors of its own for every example, a layer of Llama-3-8B takes at most 1.25 of the plain product's bundles.
     (Worded after MiniLM's layer was seen, at 1.85, and before those of Llama were.)
  5. With over 1,000 rows the hashed product takes at most 1.5 of the plain product's bundles.
  6. Decoding over a quantised cache, the longer of its bundles at the clock and its bytes at the bandwidth, takes at most
     0.75 of the time that the bytes of a full bfloat16 cache take. (Worded when one block of 1,024 tokens of the first
     workload had been counted: 534 bundles.)
"""

import argparse
import functools
import math
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxpeft import aot
from jaxpeft.kernels import grouped_low_rank, hashed_matmul, low_rank_matmul, quantised_attention, saq_init
from jaxpeft.kernels.grouped_blocks import GroupedBlocks, slots
from jaxpeft.kernels.hashed_matmul import HashedBlocks
from jaxpeft.kernels.low_rank_matmul import Blocks
from jaxpeft.kernels.platforms import VMEM_BYTES, dot, tpu_params
from jaxpeft.kernels.quantised_attention import block_of
from jaxpeft.kernels.random_fold import Fold
from jaxpeft.kernels.workloads import DECODING, GROUPED, HASHED, PRODUCTS
from jaxpeft.train.plan import CLOCK

sys.path.insert(0, str(Path(__file__).parents[1]))
import record
import schedule

KIND, DTYPE = "v5e", jnp.bfloat16
MATRIX_UNITS = 4
DUMP = Path(tempfile.mkdtemp(prefix="jaxpeft-schedules-"))


def plain_matmul(x, w, blocks: Blocks | GroupedBlocks):
    """The kernel without its low-rank part: the same blocks, the same sums."""
    (m, k), n = x.shape, w.shape[1]
    grid = (pl.cdiv(m, blocks.m), pl.cdiv(n, blocks.n), pl.cdiv(k, blocks.k))

    def kernel(x_ref, w_ref, y_ref, *sums):
        l = pl.program_id(2)
        if not sums:
            y_ref[...] = dot(x_ref[...], w_ref[...]).astype(y_ref.dtype)
            return
        (y_sum,) = sums

        @pl.when(l == 0)
        def _():
            y_sum[...] = jnp.zeros_like(y_sum)

        y_sum[...] += dot(x_ref[...], w_ref[...])

        @pl.when(l == pl.num_programs(2) - 1)
        def _():
            y_ref[...] = y_sum[...].astype(y_ref.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=grid,
        in_specs=[
            pl.BlockSpec((blocks.m, blocks.k), lambda i, j, l: (i, l)),
            pl.BlockSpec((blocks.k, blocks.n), lambda i, j, l: (l, j)),
        ],
        out_specs=pl.BlockSpec((blocks.m, blocks.n), lambda i, j, l: (i, j)),
        scratch_shapes=[pltpu.VMEM((blocks.m, blocks.n), jnp.float32)] if grid[2] > 1 else [],
        compiler_params=tpu_params("parallel", "arbitrary", "arbitrary", vmem_bytes=VMEM_BYTES),
        name="plain_matmul",
    )(x, w)


def weighed(kernel: str, grid: tuple[int, int, int]) -> tuple[int, int]:
    """(bundles, matrix-unit instructions) of a whole call, by how often each part of the body is entered."""
    rows, columns, inner = grid
    found = schedule.regions(DUMP, kernel)
    body = max((r for r in found if r.depth == 1), key=lambda r: r.end - r.start)
    # What ends with the body, or lies in such a part, is the pipeline's own copy out.
    own = min((r.start for r in found if body.start < r.start and r.end == body.end), default=body.end)
    inside = [r for r in found if body.start < r.start < own and r.end < body.end]
    # Parts in the order of the code; where a grid axis has one step its predicate is always true and the part inlined.
    parts = [rows * columns] if inner > 1 else []  # the sums' start
    if kernel != "plain_matmul":
        parts += [rows] if inner > 1 or columns > 1 else []  # the start of h's sums
        parts += [rows * inner] if columns > 1 else []  # h
    parts += [rows * columns] if inner > 1 else []  # the result
    if kernel == "grouped_low_rank":
        parts += [rows] if columns > 1 else []  # within it, what of h is whose
    if len(inside) != len(parts):
        raise RuntimeError(f"{kernel} on {grid}: {len(inside)} parts where {len(parts)} were expected: {found}")
    times = dict.fromkeys((r.start for r in found), rows * columns * inner)
    times |= dict(zip((r.start for r in inside), parts))
    return sum(times[r.start] * r.own for r in found), sum(times[r.start] * r.mxu for r in found)


def xla_cycles(function, *shapes) -> int:
    """The sum of XLA's own estimates over the fusions it makes."""
    text = aot.compile_for(KIND, function, *shapes).as_text()
    return sum(int(n) for n in re.findall(r'estimated_cycles":"(\d+)"', text))


def row_of(p):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=DTYPE)
    x, w, a, b = shape((p.m, p.k)), shape((p.k, p.n)), shape((p.k, p.r)), shape((p.r, p.n))
    blocks = Blocks.for_tpu(p.m, p.k, p.n, p.r, DTYPE)
    grid = (math.ceil(p.m / blocks.m), math.ceil(p.n / blocks.n), math.ceil(p.k / blocks.k))
    fused = functools.partial(low_rank_matmul, backend="tpu", blocks=blocks)
    aot.compile_for(KIND, lambda *o: fused(*o, 2.0), x, w, a, b)
    bundles, busy = weighed("low_rank_matmul", grid)
    aot.compile_for(KIND, functools.partial(plain_matmul, blocks=blocks), x, w)
    plain, _ = weighed("plain_matmul", grid)
    size = jnp.dtype(DTYPE).itemsize
    operations = 2 * p.m * (p.k * p.n + p.k * p.r + p.r * p.n)
    least = size * (p.m * p.k + p.k * p.n + p.k * p.r + p.r * p.n + p.m * p.n)
    moved = blocks.traffic(p.m, p.k, p.n, p.r, DTYPE)
    without = moved - size * (p.k * p.r + p.r * p.n) * (grid[0] if grid[2] > 1 or grid[1] > 1 else 1)
    floor = {k: 1e6 * max(operations / aot.TARGETS[k].flops, least / aot.TARGETS[k].bandwidth) for k in (KIND, "h100")}
    return {
        "workload": p.name,
        "m": p.m,
        "k": p.k,
        "n": p.n,
        "rank": p.r,
        "blocks": [blocks.m, blocks.k, blocks.n],
        "gflop": operations / 1e9,
        "least_mib": least / 2**20,
        "moved_mib": moved / 2**20,
        "moved_to_plain": moved / without,
        "floor_us": floor,
        "bundles": bundles,
        "bundles_to_plain": bundles / plain,
        "matrix_unit_share": busy / (MATRIX_UNITS * bundles),
        "xla_cycles": xla_cycles(lambda x, w, a, b: x @ w + 2 * (x @ a) @ b, x, w, a, b),
        "xla_cycles_plain": xla_cycles(lambda x, w: x @ w, x, w),
    }


def grouped_row_of(w):
    name, b, t, k, n, r, groups = w
    shape, m = functools.partial(jax.ShapeDtypeStruct, dtype=DTYPE), b * t
    x, w, factors = shape((b, t, k)), shape((k, n)), (shape((groups, k, r)), shape((groups, r, n)))
    blocks = GroupedBlocks.for_tpu(m, k, n, r, t, DTYPE)
    grid = (math.ceil(m / blocks.m), math.ceil(n / blocks.n), math.ceil(k / blocks.k))
    call = functools.partial(grouped_low_rank, scale=2.0, backend="tpu", blocks=blocks)
    aot.compile_for(KIND, call, x, w, *factors, jax.ShapeDtypeStruct((b,), jnp.int32))
    bundles, busy = weighed("grouped_low_rank", grid)
    aot.compile_for(KIND, functools.partial(plain_matmul, blocks=blocks), shape((m, k)), w)
    plain, _ = weighed("plain_matmul", grid)
    return {
        "workload": name,
        "examples": b,
        "rows": t,
        "k": k,
        "n": n,
        "rank": r,
        "groups": groups,
        "blocks": [blocks.m, blocks.k, blocks.n],
        "slots": slots(m, blocks.m, t),
        "moved_mib": blocks.traffic(m, k, n, r, t, DTYPE) / 2**20,
        "bundles": bundles,
        "bundles_to_plain": bundles / plain,
        "matrix_unit_share": busy / (MATRIX_UNITS * bundles),
    }


def hashed_row_of(p):
    """Columns of tiles outermost: each tile is made once, for the first block of rows."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=DTYPE)
    fold = Fold(p.size, (p.k, p.n), 0, 128)
    blocks = HashedBlocks.for_tpu(p.m, fold, DTYPE, False)
    call = lambda x, memory: hashed_matmul(x, memory, 7, (p.k, p.n), backend="tpu", blocks=blocks)
    aot.compile_for(KIND, call, shape((p.m, p.k)), shape((p.size,)))
    columns, rows, inner = p.n // blocks.n, math.ceil(p.m / blocks.m), p.k // blocks.k
    found, turns = schedule.regions(DUMP, "hashed_matmul"), schedule.loops(DUMP, "hashed_matmul")
    body = max((r for r in found if r.depth == 1), key=lambda r: r.own)
    inside = [r for r in found if r.depth == 2 and body.start < r.start and r.end <= body.end]
    if not turns:
        raise RuntimeError(f"{p.name}: no loop over a tile's rows in {found}")
    start, length, times = turns[0]
    # With one block of rows the tile is made in every step, and no predicate stands before it.
    making = next((r for r in inside if r.start <= start < r.end), None)
    tile = (making.own if making else 0) + (times - 1) * length
    steps = columns * rows * inner
    ends = sum(r.own for r in inside if r is not making) * columns * rows
    bundles = tile * columns * inner + (found[0].own + body.own) * steps + ends
    plain_blocks = Blocks(blocks.m, blocks.k, blocks.n)
    aot.compile_for(KIND, functools.partial(plain_matmul, blocks=plain_blocks), shape((p.m, p.k)), shape((p.k, p.n)))
    plain, _ = weighed("plain_matmul", (rows, columns, inner))
    moved, weight = 2 * (p.m * p.k * columns + p.m * p.n) + 4 * p.size, 2 * p.k * p.n
    return {
        "workload": p.name,
        "m": p.m,
        "k": p.k,
        "n": p.n,
        "memory": p.size,
        "blocks": [blocks.m, blocks.k, blocks.n],
        "moved_mib": moved / 2**20,
        "weight_mib": weight / 2**20,
        "tiles_bundles": tile * columns * inner,
        "bundles": bundles,
        "bundles_to_plain": bundles / plain,
    }


def decoding_row_of(w):
    """One token's attention over a quantised cache: bundles against the time its bytes take."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=DTYPE)
    cache = jax.eval_shape(lambda: saq_init(w.c, w.kv_heads, w.head_dim, batch=(w.b,), dtype=DTYPE))
    leaves, tree = jax.tree.flatten(cache)
    call = lambda q, *leaves: quantised_attention(q, jax.tree.unflatten(tree, leaves), backend="tpu")
    aot.compile_for(KIND, call, shape((w.b, w.heads, w.head_dim)), *leaves)
    found = schedule.regions(DUMP, "quantised_attention")
    body = max((r for r in found if r.depth == 1), key=lambda r: r.end - r.start)
    parts = [r for r in found if r.depth == 2 and body.start < r.start and r.end <= body.end][:3]
    blocks = w.c // block_of(w.c, cache.group, w.head_dim)
    each = w.b * w.kv_heads
    if len(parts) != 3 and blocks > 1:
        raise RuntimeError(f"{w.name}: three parts were expected: {found}")
    often = [each, each * blocks, each]
    bundles = each * blocks * (found[0].own + body.own) + sum(n * r.own for n, r in zip(often, parts))
    moved = sum(x.size * x.dtype.itemsize for x in leaves)
    seconds = bundles / CLOCK[KIND]
    return {
        "workload": w.name,
        "moved_mib": moved / 2**20,
        "full_cache_mib": 2 * 2 * w.b * w.c * w.kv_heads * w.head_dim / 2**20,
        "floor_us": 1e6 * moved / aot.TARGETS[KIND].bandwidth,
        "bundles": bundles,
        "bundles_us": 1e6 * seconds,
        "full_cache_floor_us": 1e6 * 4 * w.b * w.c * w.kv_heads * w.head_dim / aot.TARGETS[KIND].bandwidth,
    }


def verdicts(rows, grouped, hashed, decoding):
    at_16 = [r for r in rows if r["rank"] == 16]
    worst = max(at_16, key=lambda r: r["bundles_to_plain"])
    bytes_ = max(rows, key=lambda r: r["moved_to_plain"])
    xla = max(rows, key=lambda r: r["bundles"] / max(1, r["xla_cycles"]))
    ratio = xla["bundles"] / max(1, xla["xla_cycles"])
    long = max((r for r in hashed if r["m"] > 1000), key=lambda r: r["bundles_to_plain"])
    slow = max(decoding, key=lambda r: max(r["bundles_us"], r["floor_us"]) / r["full_cache_floor_us"])
    share = max(slow["bundles_us"], slow["floor_us"]) / slow["full_cache_floor_us"]
    many = max((r for r in grouped if r["k"] == 4096), key=lambda r: r["bundles_to_plain"])
    return [
        record.claim(
            "At r = 16 the fused product takes at most 1.08 of the plain product's bundles",
            worst["bundles_to_plain"] <= 1.08,
            f"predicted; worst {worst['bundles_to_plain']:.3f}, {worst['workload']}",
        ),
        record.claim(
            "It moves at most 1.02 of the plain product's bytes",
            bytes_["moved_to_plain"] <= 1.02,
            f"counted; worst {bytes_['moved_to_plain']:.3f}, {bytes_['workload']}",
        ),
        record.claim(
            "It takes fewer cycles than XLA's estimate of its own version",
            ratio < 1,
            f"predicted; worst {ratio:.2f}, {xla['workload']}",
        ),
        record.claim(
            "With factors of its own for every example, a layer of Llama-3-8B takes at most 1.25 of the plain bundles",
            many["bundles_to_plain"] <= 1.25,
            f"predicted; worst {many['bundles_to_plain']:.3f}, {many['workload']}",
        ),
        record.claim(
            "With over 1,000 rows the hashed product takes at most 1.5 of the plain product's bundles",
            long["bundles_to_plain"] <= 1.5,
            f"predicted; worst {long['bundles_to_plain']:.3f}, {long['workload']}",
        ),
        record.claim(
            "Decoding over the quantised cache takes at most 0.75 of the time that a full cache's bytes take",
            share <= 0.75,
            f"predicted; worst {share:.2f}, {slow['workload']}",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="The kernels' static costs; see the file's first lines.")
    parser.add_argument("--smoke", action="store_true", help="one workload of each")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args()
    out = args.out or (None if args.smoke else record.RESULTS / "bench_kernels.json")
    schedule.dump_into(DUMP)
    rows = []
    for p in PRODUCTS[-1:] if args.smoke else PRODUCTS:
        rows.append(row_of(p))
        r = rows[-1]
        print(
            f"{p.name:40} {r['gflop']:8.1f} GFLOP  {r['bundles']:>10,} bundles, {r['bundles_to_plain']:.3f} of plain, "
            f"matrix unit {r['matrix_unit_share']:.0%}; XLA {r['xla_cycles']:,}",
            flush=True,
        )
    grouped = []
    for g in GROUPED[-1:] if args.smoke else GROUPED:
        grouped.append(grouped_row_of(g))
        r = grouped[-1]
        print(
            f"{g.name:40} {r['slots']:>3} slots      {r['bundles']:>10,} bundles, {r['bundles_to_plain']:.3f} of plain, "
            f"matrix unit {r['matrix_unit_share']:.0%}",
            flush=True,
        )
    hashed = [hashed_row_of(p) for p in (HASHED[-1:] if args.smoke else HASHED)]
    for r in hashed:
        print(f"{r['workload']:60} {r['bundles']:>10,} bundles, {r['bundles_to_plain']:.3f} of plain", flush=True)
    decoding = [decoding_row_of(w) for w in (DECODING[-1:] if args.smoke else DECODING)]
    for r in decoding:
        print(
            f"{r['workload']:60} {r['bundles']:>10,} bundles, {r['bundles_us']:.0f} us; bytes {r['floor_us']:.0f} us, of a "
            f"full cache {r['full_cache_floor_us']:.0f} us",
            flush=True,
        )
    claims = verdicts(rows, grouped, hashed, decoding) if not args.smoke else []
    for c in claims:
        print(f"{c['verdict']:>14}: {c['claim']} ({c['evidence']})")
    if out is not None:
        made = {"grouped": grouped, "hashed": hashed, "decoding": decoding}
        tables = {"tables": list(made), "rows": rows, **made}
        record.write(out, {"claims": claims, **record.provenance(), "device": KIND, **tables})
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
