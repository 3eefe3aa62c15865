"""Attention on GPU: forward, dq, and dk with dv; a program walks one block's list of partners.

Arrays stay (b, length, heads, d). Widths are padded to a power of two on the way in; what lies beyond an edge is read as 0.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array

from jaxpeft.kernels.attention_blocks import (
    HIDDEN,
    MAX_WIDTH,
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
from jaxpeft.kernels.platforms import gpu_params, out_like, power_of_two, same_variance, wide


def forward(plan: Plan, x: Operands, *, interpret: bool) -> tuple[Array, Array]:
    """`(o (b, t, h, d), lse (b, h, t))`."""
    sizes, dtype = x.sizes, x.q.dtype
    blocks = plan.blocks_on("gpu", sizes, dtype)
    b, t, _, h, _, d, _ = sizes
    o, lse = _call(
        _forward_kernel,
        "attention",
        plan,
        x,
        blocks,
        plan.lists(sizes, blocks, x.selected),
        extra={},
        out={"o": ((b, t, h, d), dtype), "lse": ((b, h, t), wide(dtype))},
        products=2,
        interpret=interpret,
    )
    return o, lse


def backward_queries(
    plan: Plan, x: Operands, do: Array, lse: Array, delta: Array, *, with_slopes: bool, interpret: bool
) -> tuple[Array, Array | None]:
    """`(dq (b, t, h, d), rows whose sums are the slopes' gradient (b, h, t))`."""
    sizes, dtype = x.sizes, x.q.dtype
    blocks = plan.blocks_on("gpu", sizes, dtype)
    b, t, _, h, _, d, _ = sizes
    out: dict[str, Any] = {"dq": ((b, t, h, d), dtype)}
    if with_slopes:
        out["slant"] = ((b, h, t), wide(dtype))
    dq, *slant = _call(
        _queries_kernel,
        "attention_dq",
        plan,
        x,
        blocks,
        plan.lists(sizes, blocks, x.selected),
        extra={"do": do, "lse": lse, "delta": delta},
        out=out,
        products=3,
        interpret=interpret,
    )
    return dq, slant[0] if slant else None


def backward_keys(
    plan: Plan, x: Operands, do: Array, lse: Array, delta: Array, *, prefix: bool, interpret: bool
) -> tuple[Array, Array]:
    """`(dk, dv)`, (b, s, g, d), or with `prefix` those of the prefix for every batch element, (b, p, g, d)."""
    sizes, dtype = x.sizes, x.q.dtype
    blocks = plan.blocks_on("gpu", sizes, dtype)
    b, _, s, _, g, d, p = sizes
    if prefix:
        # Every block of queries is a partner of every block of the prefix.
        n, m = pl.cdiv(p, blocks.k), pl.cdiv(sizes.t, blocks.q)
        every = jnp.broadcast_to(jnp.arange(m, dtype=jnp.int32), (1, n, m))
        partners = Lists(every, jnp.full((1, n), m, jnp.int32))
        length = p
    else:
        partners, length = plan.lists(sizes, blocks, x.selected, columns=True), s
    dk, dv = _call(
        functools.partial(_keys_kernel, prefix=prefix),
        "attention_dprefix" if prefix else "attention_dkv",
        plan,
        x,
        blocks,
        partners,
        extra={"do": do, "lse": lse, "delta": delta},
        out={"dk": ((b, length, g, d), dtype), "dv": ((b, length, g, d), dtype)},
        products=4,
        by_keys=True,
        interpret=interpret,
    )
    return dk, dv


def _call(
    kernel: Any,
    name: str,
    plan: Plan,
    x: Operands,
    blocks: Blocks,
    partners: Lists,
    *,
    extra: dict[str, Array],
    out: dict[str, Any],
    products: int,
    by_keys: bool = False,
    interpret: bool,
) -> list[Array]:
    """Runs a program for each (block, head, batch element); with `by_keys` blocks and heads are the keys'."""
    sizes = x.sizes
    b, _, _, h, g, _, _ = sizes
    inputs = {"index": jnp.asarray(partners.index), "count": jnp.asarray(partners.count), "q": x.q, "k": x.k, "v": x.v}
    if x.prefix is not None:
        inputs |= {"prefix_k": x.prefix[0], "prefix_v": x.prefix[1]}
    inputs |= {name: a for name, a in (("slopes", x.slopes), ("key_mask", x.key_mask)) if a is not None} | extra
    arrays = same_variance(*inputs.values())
    return pl.pallas_call(
        functools.partial(kernel, names=(*inputs, *out), plan=plan, sizes=sizes, blocks=blocks),
        out_shape=[out_like(shape, dtype, arrays[0]) for shape, dtype in out.values()],
        grid=(partners.index.shape[1], g if by_keys else h, b),
        compiler_params=gpu_params(stages=2),
        cost_estimate=cost(sizes, x.q.dtype, plan.pairs(sizes), products),
        interpret=interpret,
        name=name,
    )(*arrays)


class _Part:
    """What a program reads: refs by name, indexed by batch element and head."""

    def __init__(self, refs: dict[str, Any], sizes: Sizes, blocks: Blocks) -> None:
        self.refs, self.sizes, self.blocks = refs, sizes, blocks
        self.width = power_of_two(sizes.d, 16, MAX_WIDTH)

    def matrix(self, name: str, batch: Any, head: Any, row: Any, length: int) -> Array:
        """Rows of a (b, n, heads, d) array, 0 beyond its edges; of a first axis of 1 always the first."""
        block, inside = self._rows(name, batch, head, row, length)
        return pltriton.load(block, mask=inside, other=0.0)

    def store(self, name: str, batch: Any, head: Any, row: Any, value: Array) -> None:
        block, inside = self._rows(name, batch, head, row, value.shape[0])
        pltriton.store(block, value.astype(self.refs[name].dtype), mask=inside)

    def _rows(self, name: str, batch: Any, head: Any, row: Any, length: int) -> tuple[Any, Array]:
        ref, shape = self.refs[name], (length, self.width)
        inside = row + lax.broadcasted_iota(jnp.int32, shape, 0) < ref.shape[1]
        if self.width > ref.shape[3]:
            inside &= lax.broadcasted_iota(jnp.int32, shape, 1) < ref.shape[3]
        first = jnp.int32(0) if ref.shape[0] == 1 else batch
        return ref.at[first, pl.ds(row, length), head, pl.ds(jnp.int32(0), self.width)], inside

    def numbers(self, name: str, at: tuple[Any, ...], row: Any, length: int) -> Array:
        """Consecutive entries of an array's last axis, 0 beyond its end."""
        ref = self.refs[name]
        return pltriton.load(ref.at[(*at, pl.ds(row, length))], mask=self._inside(ref, row, length), other=0)

    def store_numbers(self, name: str, at: tuple[Any, ...], row: Any, value: Array) -> None:
        ref, length = self.refs[name], value.shape[0]
        pltriton.store(ref.at[(*at, pl.ds(row, length))], value, mask=self._inside(ref, row, length))

    @staticmethod
    def _inside(ref: Any, row: Any, length: int) -> Array:
        return row + lax.broadcasted_iota(jnp.int32, (length,), 0) < ref.shape[-1]

    def partner(self, head: Any, i: Any, j: Any) -> Any:
        ref = self.refs["index"]
        return ref[0 if ref.shape[0] == 1 else head, i, j]

    def count(self, head: Any, i: Any) -> Any:
        ref = self.refs["count"]
        return ref[0 if ref.shape[0] == 1 else head, i]

    def slope(self, head: Any) -> Any:
        return self.refs["slopes"][head] if "slopes" in self.refs else None

    def mask(self, batch: Any, row: Any) -> Any:
        return self.numbers("key_mask", (batch,), row, self.blocks.k) if "key_mask" in self.refs else None


def _column(x: Array | None) -> Array | None:
    return None if x is None else x[:, None]


def _row(x: Array | None) -> Array | None:
    return None if x is None else x[None, :]


def _forward_kernel(*refs: Any, names: tuple[str, ...], plan: Plan, sizes: Sizes, blocks: Blocks) -> None:
    part = _Part(dict(zip(names, refs)), sizes, blocks)
    i, h, b = (pl.program_id(axis) for axis in range(3))
    g = lax.div(h, jnp.int32(sizes.group))
    row, sums = i * blocks.q, wide(part.refs["q"].dtype)
    q = part.matrix("q", b, h, row, blocks.q)
    slope = part.slope(h)
    zeros = lambda *shape: jnp.zeros(shape, sums)
    state = (jnp.full((blocks.q, 1), HIDDEN, sums), zeros(blocks.q, 1), zeros(blocks.q, part.width))

    def prefix(j: Any, state: Any) -> Any:
        at = jnp.asarray(j, jnp.int32) * blocks.k
        k, v = (part.matrix(name, b, g, at, blocks.k) for name in ("prefix_k", "prefix_v"))
        return online(Tile(plan, row, at, sizes.t, sizes.p, prefix=True), q, k, v, None, None, state)

    def step(j: Any, state: Any) -> Any:
        at = part.partner(h, i, jnp.asarray(j, jnp.int32)) * blocks.k
        k, v = (part.matrix(name, b, g, at, blocks.k) for name in ("k", "v"))
        return online(Tile(plan, row, at, sizes.t, sizes.s), q, k, v, slope, _row(part.mask(b, at)), state)

    if sizes.p:
        state = lax.fori_loop(0, pl.cdiv(sizes.p, blocks.k), prefix, state)
    o, lse = finished(lax.fori_loop(jnp.int32(0), part.count(h, i), step, state))
    part.store("o", b, h, row, o)
    part.store_numbers("lse", (b, h), row, lse.sum(axis=1))


def _queries_kernel(*refs: Any, names: tuple[str, ...], plan: Plan, sizes: Sizes, blocks: Blocks) -> None:
    part = _Part(dict(zip(names, refs)), sizes, blocks)
    i, h, b = (pl.program_id(axis) for axis in range(3))
    g = lax.div(h, jnp.int32(sizes.group))
    row, sums = i * blocks.q, wide(part.refs["q"].dtype)
    q, do = (part.matrix(name, b, h, row, blocks.q) for name in ("q", "do"))
    lse, delta = (part.numbers(name, (b, h), row, blocks.q)[:, None] for name in ("lse", "delta"))
    slope, with_slopes = part.slope(h), "slant" in part.refs

    def prefix(j: Any, dq: Array) -> Array:
        at = jnp.asarray(j, jnp.int32) * blocks.k
        k, v = (part.matrix(name, b, g, at, blocks.k) for name in ("prefix_k", "prefix_v"))
        tile = Tile(plan, row, at, sizes.t, sizes.p, prefix=True)
        _, ds = weights_and_slant(tile, q, k, v, do, lse, delta, None, None)
        return dq + product(ds.astype(k.dtype), k, (1, 0), plan.precision)

    def step(j: Any, carry: Any) -> Any:
        dq, slant = carry
        at = part.partner(h, i, jnp.asarray(j, jnp.int32)) * blocks.k
        k, v = (part.matrix(name, b, g, at, blocks.k) for name in ("k", "v"))
        tile = Tile(plan, row, at, sizes.t, sizes.s)
        _, ds = weights_and_slant(tile, q, k, v, do, lse, delta, slope, _row(part.mask(b, at)))
        if with_slopes:
            slant = slant - (ds * tile.distance(ds.shape, ds.dtype)).sum(axis=1)
        return dq + product(ds.astype(k.dtype), k, (1, 0), plan.precision), slant

    dq, slant = jnp.zeros((blocks.q, part.width), sums), jnp.zeros(blocks.q, sums)
    if sizes.p:
        dq = lax.fori_loop(0, pl.cdiv(sizes.p, blocks.k), prefix, dq)
    dq, slant = lax.fori_loop(jnp.int32(0), part.count(h, i), step, (dq, slant))
    part.store("dq", b, h, row, dq * plan.scale)
    if with_slopes:
        part.store_numbers("slant", (b, h), row, slant)


def _keys_kernel(*refs: Any, names: tuple[str, ...], plan: Plan, sizes: Sizes, blocks: Blocks, prefix: bool) -> None:
    part = _Part(dict(zip(names, refs)), sizes, blocks)
    i, g, b = (pl.program_id(axis) for axis in range(3))
    column, sums = i * blocks.k, wide(part.refs["q"].dtype)
    k, v = (part.matrix(f"prefix_{name}" if prefix else name, b, g, column, blocks.k) for name in ("k", "v"))
    mask = None if prefix else _column(part.mask(b, column))
    keys = sizes.p if prefix else sizes.s

    def of_head(r: Any, sums: Any) -> Any:
        h = g * sizes.group + jnp.asarray(r, jnp.int32)
        slope = None if prefix else part.slope(h)

        def step(j: Any, carry: Any) -> Any:
            dk, dv = carry
            row = part.partner(h, i, jnp.asarray(j, jnp.int32)) * blocks.q
            q, do = (part.matrix(name, b, h, row, blocks.q) for name in ("q", "do"))
            lse, delta = (part.numbers(name, (b, h), row, blocks.q)[None, :] for name in ("lse", "delta"))
            tile = Tile(plan, row, column, sizes.t, keys, axis=1, prefix=prefix)
            p, ds = weights_and_slant(tile, q, k, v, do, lse, delta, slope, mask)
            return (
                dk + product(ds.astype(q.dtype), q, (1, 0), plan.precision),
                dv + product(p.astype(do.dtype), do, (1, 0), plan.precision),
            )

        return lax.fori_loop(jnp.int32(0), part.count(h, i), step, sums)

    zeros = jnp.zeros((blocks.k, part.width), sums)
    dk, dv = lax.fori_loop(0, sizes.group, of_head, (zeros, zeros))
    part.store("dk", b, g, column, dk * plan.scale)
    part.store("dv", b, g, column, dv)
