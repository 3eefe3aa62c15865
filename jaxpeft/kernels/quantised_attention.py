"""Attention of one new token over a cache quantised in stairs (see `stairs`), dequantised inside the kernel.

The codes are read once, a byte each, with the steps and zeros of their groups; neither keys nor values are formed in
memory. Past blocks, then the newest tokens as one more block of an online softmax. Blocks that hold no token yet are not
fetched.

On GPU the cache is also cut along its length, so that a single sequence fills the device; the parts are merged by their
log-sum-exps.

Letters: b batch, h heads, g heads of keys, r = h / g, d width, c capacity, S segment, G group, n a block's tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from jaxpeft.kernels.attention_blocks import HIDDEN, MAX_WIDTH, finished
from jaxpeft.kernels.platforms import (
    LANES,
    VMEM_BYTES,
    Backend,
    KernelError,
    dot,
    gpu_params,
    on_platform,
    out_like,
    power_of_two,
    same_variance,
    sublanes,
    tpu_params,
    wide,
)
from jaxpeft.kernels.stairs import Stairs, saq_read

__all__ = ["quantised_attention", "reference"]

State = tuple[Array, Array, Array]
SPLITS = 16  # parts of a cache on GPU, at most


@dataclasses.dataclass(frozen=True)
class _Plan:
    scale: float
    block: int  # tokens of the quantised part at a time
    group: int
    segment: int
    precision: Any
    vmem_bytes: int


def quantised_attention(
    q: Float[Array, "b h d"],
    cache: Stairs,
    *,
    scale: float | None = None,
    with_lse: bool = False,
    backend: Backend = "auto",
    block: int | None = None,
    precision: Any = None,
    vmem_bytes: int = VMEM_BYTES,
) -> Any:
    """softmax(scale q kᵀ) v over the live tokens of a cache, for the newest token's queries.

    There is no gradient of the kernel; `backend="xla"` has one in q.

    Args:
      q: one token's queries of a batch; query head i reads key head i // (h / g).
      cache: with one leading batch axis; lengths may differ.
      scale: d^-1/2 where None.
      with_lse: also returns the log-sum-exp of the scores, (b, h), float32.
      backend: "auto", "xla", "tpu" or "gpu"; see the package.
      block: tokens of the quantised part at a time: a divisor of the capacity; chosen where None.
      precision: of the products, as `jax.lax.dot` takes it.
      vmem_bytes: what the TPU kernel may use of VMEM.

    Returns:
      o (b, h, d) in q's type, or `(o, lse)`; sums are in float32. An empty cache gives 0 and -inf.

    Raises:
      KernelError: shapes that do not fit, a width over 256, a block that does not divide the capacity or that the platform
        refuses.
    """
    if q.ndim != 3 or cache.key_code.ndim != 4:
        raise KernelError(
            f"q {q.shape}, codes {cache.key_code.shape}: expected (b, h, d) and (b, g, c, d); give one sequence a batch of 1"
        )
    (b, h, d), (_, g, c, _) = q.shape, cache.key_code.shape
    if cache.key_code.shape != (b, g, c, d) or h % g:
        raise KernelError(
            f"q {q.shape}, codes {cache.key_code.shape}: expected one batch, one width, and h a multiple of g"
        )
    if d > MAX_WIDTH:
        raise KernelError(f"heads of width {d}: the kernel takes 1 to {MAX_WIDTH}")
    block = block_of(c, cache.group, d) if block is None else block
    if block < 1 or c % block or block % cache.group:
        raise KernelError(f"block {block}: a divisor of the capacity {c} and a multiple of the group {cache.group}")
    plan = _Plan(d**-0.5 if scale is None else float(scale), block, cache.group, cache.segment, precision, vmem_bytes)
    grouped = q.reshape(b, g, h // g, d)
    cache = dataclasses.replace(cache, length=jnp.broadcast_to(cache.length, (b,)))
    leaves, tree = jax.tree.flatten(cache)

    def xla(q: Array, *leaves: Array) -> tuple[Array, Array]:
        return reference(q, jax.tree.unflatten(tree, leaves), plan.scale, precision)

    def kernel(q: Array, *leaves: Array, platform: str, interpret: bool) -> tuple[Array, Array]:
        run = _on_tpu if platform == "tpu" else _on_gpu
        return run(plan, q, jax.tree.unflatten(tree, leaves), interpret=interpret)

    o, lse = on_platform(backend, xla, kernel, grouped, *leaves)
    o = o.reshape(b, h, d)
    return (o, lse.reshape(b, h)) if with_lse else o


def block_of(capacity: int, group: int, width: int) -> int:
    """The largest divisor, up to 4,096 tokens of width 128, of whole tiles of codes and scales, else the whole cache.

    Beginning a step costs a TPU about as much as 1,000 tokens do (`experiments/bench/kernels.py`).
    """
    unit, most = max(LANES, 8 * group), 4096 * LANES // (pl.cdiv(width, LANES) * LANES)
    fitting = [n for n in range(unit, min(capacity, most) + 1, unit) if not capacity % n and not n % group]
    return max(fitting, default=capacity)


def reference(
    q: Float[Array, "b g r d"], cache: Stairs, scale: float, precision: Any = None
) -> tuple[Float[Array, "b g r d"], Float[Array, "b g r"]]:
    """`(o, lse)` in plain JAX: read everything, then attend."""
    k, v, live = jax.vmap(saq_read)(cache)
    sums = wide(q.dtype)
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=sums)
    s = product("bgrd,bgnd->bgrn", q.astype(sums), k.astype(sums)) * scale
    live = live[:, None, None, :]
    s = jnp.where(live, s, jnp.asarray(HIDDEN, sums))
    top = lax.stop_gradient(s.max(-1, keepdims=True))
    p = jnp.where(live, jnp.exp(s - top), jnp.zeros((), sums))
    total = p.sum(-1, keepdims=True)
    o, lse = finished((top, total, product("bgrn,bgnd->bgrd", p, v.astype(sums))))
    return o.astype(q.dtype), lse[..., 0]


def _more(s: Array, seen: Array, weighed: Callable[[Array], Array], state: State) -> State:
    """The online softmax after more tokens: scores (r, n), and `weights (r, n) -> their sum of values (r, d)`."""
    top, total, mean = state
    s = jnp.where(seen, s, jnp.asarray(HIDDEN, s.dtype))
    new = jnp.maximum(top, s.max(axis=1, keepdims=True))
    p = jnp.where(seen, jnp.exp(s - new), jnp.zeros((), s.dtype))
    shrink = jnp.exp(top - new)
    return new, total * shrink + p.sum(axis=1, keepdims=True), mean * shrink + weighed(p)


def _cost(q: Array, cache: Stairs) -> pl.CostEstimate:
    b, g, r, d = q.shape
    tokens = cache.capacity + cache.segment
    return pl.CostEstimate(
        flops=4 * b * g * r * d * tokens,
        transcendentals=b * g * r * tokens,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) + 2 * q.size * q.dtype.itemsize,
    )


# ------------------------------------------------------------------------------------------------------------ the TPU


def _on_tpu(plan: _Plan, q: Array, cache: Stairs, *, interpret: bool) -> tuple[Array, Array]:
    asked = q.shape[2]
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -asked % sublanes(q.dtype)), (0, 0)))  # whole tiles of rows
    b, g, r, d = q.shape
    c, n, group = cache.capacity, plan.block, plan.group
    sums = wide(q.dtype)
    needed = _vmem(plan, r, d, c)
    if needed > plan.vmem_bytes:
        raise KernelError(
            f"blocks of {n} tokens need {needed} bytes of VMEM, the limit is {plan.vmem_bytes}: smaller ones"
        )
    if n != c and (n % LANES or n // group % 8):
        raise KernelError(f"block {n}: the whole capacity {c}, or a multiple of {LANES} and of 8 groups of {group}")
    blocks = c // n

    def held(b: Any, j: Any, length: Any) -> Any:
        """Blocks without a token are not fetched: the last with one stays."""
        past = lax.div(length[b], jnp.int32(plan.segment)) * plan.segment
        return jnp.minimum(j, jnp.maximum(lax.div(past + (n - 1), jnp.int32(n)) - 1, 0))

    codes = pl.BlockSpec((None, None, n, d), lambda bi, gi, j, length: (bi, gi, held(bi, j, length), 0))
    of_keys = pl.BlockSpec((None, None, n // group, d), lambda bi, gi, j, length: (bi, gi, held(bi, j, length), 0))
    of_values = pl.BlockSpec((None, None, d // group, n), lambda bi, gi, j, length: (bi, gi, 0, held(bi, j, length)))
    whole = lambda rows, columns: pl.BlockSpec((None, None, rows, columns), lambda bi, gi, j, length: (bi, gi, 0, 0))
    recent = whole(cache.segment, d)
    arrays = same_variance(
        cache.length,
        q,
        cache.key_code,
        cache.value_code,
        cache.key_step,
        cache.key_zero,
        cache.value_step,
        cache.value_zero,
        cache.recent_key,
        cache.recent_value,
    )
    o, lse = pl.pallas_call(
        functools.partial(_tpu_kernel, plan=plan),
        out_shape=[out_like(q.shape, q.dtype, arrays[1]), out_like((b, g, r, 1), sums, arrays[1])],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, g, blocks),
            in_specs=[whole(r, d), codes, codes, of_keys, of_keys, of_values, of_values, recent, recent],
            out_specs=[whole(r, d), whole(r, 1)],
            scratch_shapes=[pltpu.VMEM(shape, sums) for shape in ((r, 1), (r, 1), (r, d))],
        ),
        compiler_params=tpu_params("parallel", "parallel", "arbitrary", vmem_bytes=max(plan.vmem_bytes, VMEM_BYTES)),
        cost_estimate=_cost(q, cache),
        interpret=interpret,
        name="quantised_attention",
    )(*arrays)
    return o[:, :, :asked], lse[:, :, :asked, 0]


def _vmem(plan: _Plan, r: int, d: int, c: int) -> int:
    """Bytes: codes and scales twice, keys and values of a block in float32, scores."""
    width, n = pl.cdiv(d, LANES) * LANES, plan.block
    scales = 2 * 4 * (n // plan.group * width + 8 * pl.cdiv(d // plan.group, 8) * n)
    return 2 * (2 * n * width + 2 * scales) + 4 * 4 * n * width + 4 * 4 * plan.segment * width + 4 * 4 * max(r, 8) * n


def _tpu_kernel(
    length_ref: Any,  # (b,)
    q_ref: Any,  # (r, d)
    key_code: Any,  # (n, d) int8
    value_code: Any,  # (n, d) int8
    key_step: Any,  # (n / G, d)
    key_zero: Any,  # (n / G, d)
    value_step: Any,  # (d / G, n)
    value_zero: Any,  # (d / G, n)
    recent_key: Any,  # (S, d)
    recent_value: Any,  # (S, d)
    o_ref: Any,  # (r, d)
    lse_ref: Any,  # (r, 1)
    top: Any,  # (r, 1)
    total: Any,  # (r, 1)
    mean: Any,  # (r, d)
    *,
    plan: _Plan,
) -> None:
    b, j = pl.program_id(0), pl.program_id(2)
    n, group, sums = plan.block, plan.group, top.dtype
    rows, d = q_ref.shape
    past = lax.div(length_ref[b], jnp.int32(plan.segment)) * plan.segment
    q = q_ref[...]
    # Products are of q's type, as they would be over a cache that is not quantised; codes are whole numbers of 8 bits, which
    # bfloat16 holds.
    narrow = lambda x: x.astype(q.dtype)
    times = functools.partial(dot, precision=plan.precision)

    def more(k: Array, live: Any, weighed: Callable[[Array], Array]) -> None:
        s = times(q, narrow(k), (1, 1)) * plan.scale
        seen = lax.broadcasted_iota(jnp.int32, s.shape, 1) < live
        top[...], total[...], mean[...] = _more(s, seen, weighed, (top[...], total[...], mean[...]))

    @pl.when(j == 0)
    def _():
        top[...] = jnp.full(top.shape, HIDDEN, sums)
        total[...], mean[...] = jnp.zeros_like(total), jnp.zeros_like(mean)

    @pl.when(j * n < past)
    def _():
        over_tokens = lambda x: jnp.broadcast_to(x[:, None], (n // group, group, d)).reshape(n, d)
        step, zero = (over_tokens(x[...].astype(sums)) for x in (key_step, key_zero))

        def weighed(p: Array) -> Array:
            """Values have a step for each token and group of channels: the weights take it, and the codes stay as they are."""
            own = lax.div(lax.broadcasted_iota(jnp.int32, (rows, d), 1), jnp.int32(group))
            steps, zeros = (x[...].astype(sums) for x in (value_step, value_zero))
            every = jnp.concatenate([p * steps[g : g + 1] for g in range(d // group)], axis=0)
            y = times(narrow(every), narrow(value_code[...]), (1, 0))
            parts = [
                y[g * rows : (g + 1) * rows] + (p * zeros[g : g + 1]).sum(axis=1, keepdims=True)
                for g in range(d // group)
            ]
            return functools.reduce(lambda a, gy: jnp.where(own == gy[0], gy[1], a), enumerate(parts), parts[0])

        more(key_code[...].astype(sums) * step + zero, past - j * n, weighed)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        values = narrow(recent_value[...])
        more(recent_key[...], length_ref[b] - past, lambda p: times(narrow(p), values, (1, 0)))
        o, lse = finished((top[...], total[...], mean[...]))
        o_ref[...], lse_ref[...] = o.astype(o_ref.dtype), lse


# ------------------------------------------------------------------------------------------------------------ the GPU


def _on_gpu(plan: _Plan, q: Array, cache: Stairs, *, interpret: bool) -> tuple[Array, Array]:
    b, g, r, d = q.shape
    sums = wide(q.dtype)
    tokens = power_of_two(plan.group, 16, 64)
    steps = pl.cdiv(cache.capacity, tokens)
    splits = min(steps, SPLITS)
    arrays = same_variance(
        cache.length,
        q,
        cache.key_code,
        cache.value_code,
        cache.key_step,
        cache.key_zero,
        cache.value_step,
        cache.value_zero,
        cache.recent_key,
        cache.recent_value,
    )
    o, lse = pl.pallas_call(
        functools.partial(_gpu_kernel, plan=plan, tokens=tokens, each=pl.cdiv(steps, splits)),
        out_shape=[
            out_like((b, g, splits, r, d), sums, arrays[1]),
            out_like((b, g, splits, r), sums, arrays[1]),
        ],
        grid=(splits, g, b),
        compiler_params=gpu_params(stages=2),
        cost_estimate=_cost(q, cache),
        interpret=interpret,
        name="quantised_attention",
    )(*arrays)
    return _merged(o, lse, q.dtype)


def _merged(o: Array, lse: Array, dtype: Any) -> tuple[Array, Array]:
    """Parts along axis 2 as one attention; see `merge_attentions`."""
    top = lse.max(2, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, jnp.zeros((), top.dtype))
    weight = jnp.exp(lse - top)
    o, lse = finished((top[:, :, 0, :, None], weight.sum(2)[..., None], (o * weight[..., None]).sum(2)))
    return o.astype(dtype), lse[..., 0]


def _gpu_kernel(
    length_ref: Any,  # (b,)
    q_ref: Any,  # (b, g, r, d)
    key_code: Any,  # (b, g, c, d) int8
    value_code: Any,  # (b, g, c, d) int8
    key_step: Any,  # (b, g, c / G, d)
    key_zero: Any,  # (b, g, c / G, d)
    value_step: Any,  # (b, g, d / G, c)
    value_zero: Any,  # (b, g, d / G, c)
    recent_key: Any,  # (b, g, S, d)
    recent_value: Any,  # (b, g, S, d)
    o_ref: Any,  # (b, g, splits, r, d)
    lse_ref: Any,  # (b, g, splits, r)
    *,
    plan: _Plan,
    tokens: int,
    each: int,
) -> None:
    part, g, b = (pl.program_id(axis) for axis in range(3))
    r, d = q_ref.shape[2:]
    rows, width, sums = power_of_two(r, 16, 1024), power_of_two(d, 16, MAX_WIDTH), o_ref.dtype
    length = length_ref[b]
    past = lax.div(length, jnp.int32(plan.segment)) * plan.segment
    iota = lambda n: lax.broadcasted_iota(jnp.int32, (n,), 0)
    channel, own = iota(width), iota(rows)

    def load(ref: Any, row: Array, column: Array) -> Array:
        """Entries (row, column) of this sequence and head, in rows and columns of their own; 0 beyond the edges."""
        shape = (row.shape[0], column.shape[0])
        row, column = jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(column[None, :], shape)
        inside = (row < ref.shape[2]) & (column < ref.shape[3])
        return pltriton.load(ref.at[b, g, row, column], mask=inside, other=0).astype(sums)

    narrow = lambda x: x.astype(q_ref.dtype)  # as on TPU
    q = narrow(load(q_ref, own, channel))

    def more(k: Array, v: Array, live: Any, state: State) -> State:
        s = dot(q, narrow(k), (1, 1), plan.precision) * plan.scale
        seen = lax.broadcasted_iota(jnp.int32, s.shape, 1) < live
        return _more(s, seen, lambda p: dot(narrow(p), narrow(v), (1, 0), plan.precision), state)

    def step(j: Any, state: State) -> State:
        start = (part * each + jnp.asarray(j, jnp.int32)) * tokens
        token = start + iota(tokens)
        of_token, of_channel = lax.div(token, jnp.int32(plan.group)), lax.div(channel, jnp.int32(plan.group))
        k = load(key_code, token, channel) * load(key_step, of_token, channel) + load(key_zero, of_token, channel)
        # Steps of values lie with the tokens last: read across.
        across = lambda ref: load(ref, of_channel, token).T
        v = load(value_code, token, channel) * across(value_step) + across(value_zero)
        return more(k, v, past - start, state)

    state = (jnp.full((rows, 1), HIDDEN, sums), jnp.zeros((rows, 1), sums), jnp.zeros((rows, width), sums))
    first = part * each * tokens
    live = jnp.minimum(lax.div(jnp.maximum(past - first, 0) + (tokens - 1), jnp.int32(tokens)), each)
    state = lax.fori_loop(jnp.int32(0), live, step, state)

    def newest(j: Any, state: State) -> State:
        start = jnp.asarray(j, jnp.int32) * tokens
        k, v = (load(ref, start + iota(tokens), channel) for ref in (recent_key, recent_value))
        return more(k, v, length - past - start, state)

    last = part == pl.num_programs(0) - 1
    recent = jnp.where(last, lax.div(length - past + (tokens - 1), jnp.int32(tokens)), 0)
    o, lse = finished(lax.fori_loop(jnp.int32(0), recent.astype(jnp.int32), newest, state))
    shape = (rows, width)
    row, column = jnp.broadcast_to(own[:, None], shape), jnp.broadcast_to(channel[None, :], shape)
    pltriton.store(o_ref.at[b, g, part, row, column], o, mask=(row < r) & (column < d))
    pltriton.store(lse_ref.at[b, g, part, own], lse.sum(axis=1), mask=own < r)
