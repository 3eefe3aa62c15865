"""Attention on TPU: forward, dq, and dk with dv, each one pass over the blocks that are seen.

Arrays are (b, heads, length, d) here, and one number a query is a row (b, h, 1, t). The lists of blocks are prefetched to
scalar memory, where the index maps read which block comes next; entries past a list's end repeat its last block, so nothing
is fetched for them, and nothing computed. The prefix is the first block of every row of blocks.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxpeft.kernels.attention_blocks import (
    HIDDEN,
    SMEM_BYTES,
    Blocks,
    Operands,
    Plan,
    Sizes,
    Tile,
    cost,
    finished,
    online,
    product,
    weights_and_slant,
)
from jaxpeft.kernels.block_selection import Lists
from jaxpeft.kernels.blocks import zero_beyond
from jaxpeft.kernels.platforms import VMEM_BYTES, KernelError, out_like, same_variance, tpu_params, wide


def forward(plan: Plan, x: Operands, *, interpret: bool) -> tuple[Array, Array]:
    """`(o (b, t, h, d), lse (b, h, t))`."""
    sizes, dtype = x.sizes, x.q.dtype
    blocks = plan.blocks_on("tpu", sizes, dtype)
    rows = plan.lists(sizes, blocks, x.selected)
    b, t, _, h, _, d, _ = sizes
    sums = wide(dtype)
    o, lse = _by_queries(
        _forward_kernel,
        "attention",
        plan,
        x,
        blocks,
        rows,
        extra={},
        out={"o": ((b, h, t, d), dtype), "lse": ((b, h, 1, t), sums)},
        scratch=[(blocks.q, 1), (blocks.q, 1), (blocks.q, d)],
        products=2,
        interpret=interpret,
    )
    return o.swapaxes(1, 2), lse[:, :, 0]


def backward_queries(
    plan: Plan, x: Operands, do: Array, lse: Array, delta: Array, *, with_slopes: bool, interpret: bool
) -> tuple[Array, Array | None]:
    """`(dq (b, t, h, d), rows whose sums are the slopes' gradient (b, h, t))`."""
    sizes, dtype = x.sizes, x.q.dtype
    blocks = plan.blocks_on("tpu", sizes, dtype)
    b, t, _, h, _, d, _ = sizes
    sums = wide(dtype)
    out = {"dq": ((b, h, t, d), dtype)}
    if with_slopes:
        out["slant"] = ((b, h, 1, t), sums)
    dq, *slant = _by_queries(
        _queries_kernel,
        "attention_dq",
        plan,
        x,
        blocks,
        plan.lists(sizes, blocks, x.selected),
        extra={"do": do.swapaxes(1, 2), "lse": lse[:, :, None], "delta": delta[:, :, None]},
        out=out,
        scratch=[(blocks.q, d), (blocks.q, 1)],
        products=3,
        interpret=interpret,
    )
    return dq.swapaxes(1, 2), slant[0][:, :, 0] if slant else None


def backward_keys(
    plan: Plan, x: Operands, do: Array, lse: Array, delta: Array, *, prefix: bool, interpret: bool
) -> tuple[Array, Array]:
    """`(dk, dv)`, (b, s, g, d), or with `prefix` those of the prefix for every batch element, (b, p, g, d)."""
    sizes, dtype = x.sizes, x.q.dtype
    blocks = plan.blocks_on("tpu", sizes, dtype)
    if prefix:
        assert x.prefix is not None
        k, v = x.prefix
        sizes = sizes._replace(s=sizes.p)
        blocks = Blocks(blocks.q, sizes.p)
        plan = dataclasses.replace(plan, causal=False, selection=None)
        columns = plan.lists(sizes, blocks, None, columns=True)
        x = x._replace(slopes=None, key_mask=None)
    else:
        k, v = x.k, x.v
        columns = plan.lists(sizes, blocks, x.selected, columns=True)
    b, _, s, h, g, d, _ = sizes
    group, n, slots = sizes.group, columns.index.shape[1], columns.index.shape[2]
    at = _reader(columns, slots)

    def head(gi: Any, j: Any) -> Any:
        return gi * group + lax.div(j, jnp.int32(slots)) if group > 1 else gi

    def queries(bi: Any, gi: Any, i: Any, j: Any, index: Any, *_: Any) -> Any:
        return bi, head(gi, j), at(index, head(gi, j), i, lax.rem(j, jnp.int32(slots))), 0

    def query_rows(bi: Any, gi: Any, i: Any, j: Any, index: Any, *_: Any) -> Any:
        return bi, head(gi, j), 0, at(index, head(gi, j), i, lax.rem(j, jnp.int32(slots)))

    shared = prefix and k.shape[0] == 1
    keys = pl.BlockSpec((None, None, blocks.k, d), lambda bi, gi, i, j, *_: (0 if shared else bi, gi, i, 0))
    written = pl.BlockSpec((None, None, blocks.k, d), lambda bi, gi, i, j, *_: (bi, gi, i, 0))
    wide_rows = pl.BlockSpec((None, None, blocks.q, d), queries)
    row = pl.BlockSpec((None, None, 1, blocks.q), query_rows)
    inputs = {
        "q": (x.q.swapaxes(1, 2), wide_rows),
        "do": (do.swapaxes(1, 2), wide_rows),
        "lse": (lse[:, :, None], row),
        "delta": (delta[:, :, None], row),
        "k": (k.swapaxes(1, 2), keys),
        "v": (v.swapaxes(1, 2), keys),
    }
    if x.slopes is not None:
        inputs["slopes"] = (
            x.slopes.reshape(h, 1, 1),
            pl.BlockSpec((None, 1, 1), lambda bi, gi, i, j, *_: (head(gi, j), 0, 0)),
        )
    if x.key_mask is not None:
        inputs["key_mask"] = (
            x.key_mask[:, :, None],
            pl.BlockSpec((None, blocks.k, 1), lambda bi, gi, i, j, *_: (bi, i, 0)),
        )
    sums = wide(dtype)
    dk, dv = _call(
        functools.partial(
            _keys_kernel, plan=plan, sizes=sizes, blocks=blocks, slots=slots, prefix=prefix, at=at, head=head
        ),
        "attention_dprefix" if prefix else "attention_dkv",
        plan,
        (b, g, n, group * slots),
        columns,
        inputs,
        out={"dk": ((b, g, s, d), dtype, written), "dv": ((b, g, s, d), dtype, written)},
        scratch=[pltpu.VMEM((blocks.k, d), sums), pltpu.VMEM((blocks.k, d), sums)],
        cost=cost(sizes._replace(p=0), dtype, plan.pairs(sizes), 4),
        interpret=interpret,
    )
    return dk.swapaxes(1, 2), dv.swapaxes(1, 2)


def _by_queries(
    kernel: Any,
    name: str,
    plan: Plan,
    x: Operands,
    blocks: Blocks,
    rows: Lists,
    *,
    extra: dict[str, Array],
    out: dict[str, Any],
    scratch: list[tuple[int, int]],
    products: int,
    interpret: bool,
) -> list[Array]:
    """Runs a kernel whose grid is (batch, heads, blocks of queries, blocks of keys)."""
    sizes = x.sizes
    b, _, _, h, _, d, p = sizes
    n, slots = rows.index.shape[1:]
    at = _reader(rows, slots)
    group = sizes.group

    def of(h: Any) -> Any:
        return lax.div(h, jnp.int32(group)) if group > 1 else h

    wide_rows = pl.BlockSpec((None, None, blocks.q, d), lambda bi, hi, i, j, *_: (bi, hi, i, 0))
    row = pl.BlockSpec((None, None, 1, blocks.q), lambda bi, hi, i, j, *_: (bi, hi, 0, i))
    keys = pl.BlockSpec((None, None, blocks.k, d), lambda bi, hi, i, j, index, *_: (bi, of(hi), at(index, hi, i, j), 0))
    inputs = {
        "q": (x.q.swapaxes(1, 2), wide_rows),
        "k": (x.k.swapaxes(1, 2), keys),
        "v": (x.v.swapaxes(1, 2), keys),
    }
    inputs |= {name: (a, row if name in ("lse", "delta") else wide_rows) for name, a in extra.items()}
    if x.prefix is not None:
        shared = x.prefix[0].shape[0] == 1
        spec = pl.BlockSpec((None, None, p, d), lambda bi, hi, i, j, *_: (0 if shared else bi, of(hi), 0, 0))
        inputs |= {"prefix_k": (x.prefix[0].swapaxes(1, 2), spec), "prefix_v": (x.prefix[1].swapaxes(1, 2), spec)}
    if x.slopes is not None:
        inputs["slopes"] = (
            x.slopes.reshape(h, 1, 1),
            pl.BlockSpec((None, 1, 1), lambda bi, hi, i, j, *_: (hi, 0, 0)),
        )
    if x.key_mask is not None:
        inputs["key_mask"] = (
            x.key_mask[:, None],
            pl.BlockSpec((None, 1, blocks.k), lambda bi, hi, i, j, index, *_: (bi, 0, at(index, hi, i, j))),
        )
    specs = {name: row if shape[2] == 1 and name in ("lse", "slant") else wide_rows for name, (shape, _) in out.items()}
    sums = wide(x.q.dtype)
    return _call(
        functools.partial(kernel, plan=plan, sizes=sizes, blocks=blocks, at=at),
        name,
        plan,
        (b, h, n, slots),
        rows,
        inputs,
        out={name: (shape, dtype, specs[name]) for name, (shape, dtype) in out.items()},
        scratch=[pltpu.VMEM(shape, sums) for shape in scratch],
        cost=cost(sizes, x.q.dtype, plan.pairs(sizes), products),
        interpret=interpret,
    )


def _reader(lists: Lists, slots: int) -> Any:
    """`(flat ref, head, block, slot) -> entry`; with slot None the block's count."""
    heads, n = lists.count.shape

    def at(ref: Any, head: Any, i: Any, j: Any) -> Any:
        row = (head * n if heads > 1 else 0) + i
        return ref[row if j is None else row * slots + j]

    return at


def _call(
    kernel: Any,
    name: str,
    plan: Plan,
    grid: tuple[int, ...],
    lists: Lists,
    inputs: dict[str, tuple[Array, Any]],
    *,
    out: dict[str, Any],
    scratch: list[Any],
    cost: pl.CostEstimate,
    interpret: bool,
) -> list[Array]:
    index, count = jnp.asarray(lists.index).reshape(-1), jnp.asarray(lists.count).reshape(-1)
    if 4 * (index.size + count.size) > SMEM_BYTES:
        raise KernelError(
            f"lists of {index.size} blocks take more than {SMEM_BYTES} bytes of scalar memory: larger blocks, or one "
            "selection for all heads"
        )
    index, count, *arrays = same_variance(index, count, *(a for a, _ in inputs.values()))
    return pl.pallas_call(
        functools.partial(kernel, names=(*inputs, *out)),
        out_shape=[out_like(shape, dtype, arrays[0]) for shape, dtype, _ in out.values()],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for *_, spec in out.values()],
            scratch_shapes=scratch,
        ),
        compiler_params=tpu_params(
            "parallel", "parallel", "parallel", "arbitrary", vmem_bytes=max(plan.vmem_bytes, VMEM_BYTES)
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(index, count, *arrays)


def _optional(r: dict[str, Any], name: str) -> Any:
    return r[name][...] if name in r else None


def _forward_kernel(
    index_ref: Any,  # block numbers, flat
    count_ref: Any,  # how many of them, flat
    *refs: Any,  # q (bq, d), k and v (bk, d), [prefix (p, d) twice], [slope (1, 1)], [mask (1, bk)]; o (bq, d), lse (1, bq)
    names: tuple[str, ...],
    plan: Plan,
    sizes: Sizes,
    blocks: Blocks,
    at: Any,
) -> None:
    r, (top, total, mean) = dict(zip(names, refs)), refs[len(names) :]
    h, i, j = (pl.program_id(axis) for axis in (1, 2, 3))
    row = i * blocks.q

    @pl.when(j == 0)
    def _():
        state = (jnp.full(top.shape, HIDDEN, top.dtype), jnp.zeros(total.shape, total.dtype), jnp.zeros_like(mean))
        if sizes.p:
            tile = Tile(plan, row, 0, sizes.t, sizes.p, prefix=True)
            state = online(tile, r["q"][...], r["prefix_k"][...], r["prefix_v"][...], None, None, state)
        top[...], total[...], mean[...] = state

    @pl.when(j < at(count_ref, h, i, None))
    def _():
        block = at(index_ref, h, i, j)
        tile = Tile(plan, row, block * blocks.k, sizes.t, sizes.s)
        v = zero_beyond(sizes.s, blocks.k, block)(r["v"][...], 0)
        state = (top[...], total[...], mean[...])
        top[...], total[...], mean[...] = online(
            tile, r["q"][...], r["k"][...], v, _optional(r, "slopes"), _optional(r, "key_mask"), state
        )

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        o, lse = finished((top[...], total[...], mean[...]))
        r["o"][...] = o.astype(r["o"].dtype)
        r["lse"][...] = lse.T


def _queries_kernel(
    index_ref: Any,
    count_ref: Any,
    *refs: Any,  # as forward, with do (bq, d), lse and delta (1, bq); dq (bq, d), [slant (1, bq)]; sums (bq, d), (bq, 1)
    names: tuple[str, ...],
    plan: Plan,
    sizes: Sizes,
    blocks: Blocks,
    at: Any,
) -> None:
    r, (dq, slant) = dict(zip(names, refs)), refs[len(names) :]
    h, i, j = (pl.program_id(axis) for axis in (1, 2, 3))
    row = i * blocks.q

    def block_ds(tile: Tile, k: Array, v: Array, slope: Any, mask: Any) -> Array:
        return weights_and_slant(
            tile, r["q"][...], k, v, r["do"][...], r["lse"][...].T, r["delta"][...].T, slope, mask
        )[1]

    def add(ds: Array, k: Array) -> Array:
        return product(ds.astype(k.dtype), k, (1, 0), plan.precision) * plan.scale

    @pl.when(j == 0)
    def _():
        slant[...] = jnp.zeros_like(slant)
        if sizes.p:
            k = r["prefix_k"][...]
            tile = Tile(plan, row, 0, sizes.t, sizes.p, prefix=True)
            dq[...] = add(block_ds(tile, k, r["prefix_v"][...], None, None), k)
        else:
            dq[...] = jnp.zeros_like(dq)

    @pl.when(j < at(count_ref, h, i, None))
    def _():
        block = at(index_ref, h, i, j)
        tile = Tile(plan, row, block * blocks.k, sizes.t, sizes.s)
        k = zero_beyond(sizes.s, blocks.k, block)(r["k"][...], 0)
        ds = block_ds(tile, k, r["v"][...], _optional(r, "slopes"), _optional(r, "key_mask"))
        dq[...] += add(ds, k)
        if "slant" in r:
            slant[...] -= (ds * tile.distance(ds.shape, ds.dtype)).sum(axis=1, keepdims=True)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        r["dq"][...] = dq[...].astype(r["dq"].dtype)
        if "slant" in r:
            r["slant"][...] = slant[...].T


def _keys_kernel(
    index_ref: Any,
    count_ref: Any,
    *refs: Any,  # q and do (bq, d), lse and delta (1, bq), k and v (bk, d), [slope (1, 1)], [mask (bk, 1)]; dk, dv (bk, d)
    names: tuple[str, ...],
    plan: Plan,
    sizes: Sizes,
    blocks: Blocks,
    slots: int,
    prefix: bool,
    at: Any,
    head: Any,
) -> None:
    r, (dk, dv) = dict(zip(names, refs)), refs[len(names) :]
    g, i, j = (pl.program_id(axis) for axis in (1, 2, 3))
    h, slot = head(g, j), lax.rem(j, jnp.int32(slots))

    @pl.when(j == 0)
    def _():
        dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)

    @pl.when(slot < at(count_ref, h, i, None))
    def _():
        block = at(index_ref, h, i, slot)
        inside = zero_beyond(sizes.t, blocks.q, block)
        q, do = inside(r["q"][...], 0), inside(r["do"][...], 0)
        tile = Tile(plan, block * blocks.q, i * blocks.k, sizes.t, sizes.s, axis=1, prefix=prefix)
        p, ds = weights_and_slant(
            tile,
            q,
            r["k"][...],
            r["v"][...],
            do,
            r["lse"][...],
            r["delta"][...],
            _optional(r, "slopes"),
            _optional(r, "key_mask"),
        )
        dv[...] += product(p.astype(do.dtype), do, (1, 0), plan.precision)
        dk[...] += product(ds.astype(q.dtype), q, (1, 0), plan.precision) * plan.scale

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        r["dk"][...], r["dv"][...] = dk[...].astype(r["dk"].dtype), dv[...].astype(r["dv"].dtype)
