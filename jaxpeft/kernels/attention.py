"""Attention that `jax.nn.dot_product_attention` cannot do: a prefix, position biases, selected blocks, log-sum-exp.

    o_i = sum_j softmax_j(scale q_i · k_j - slope_h g(|i - j|)) v_j        over the keys that i sees and the prefix

One pass of an online softmax (Dao et al., "FlashAttention", NeurIPS 2022); the prefix is its first block, or, where one
block holds both and no bias tells them apart, stands before the keys. That equals the merge of two attentions by their
log-sum-exps (He et al., "Towards a unified view of parameter-efficient transfer learning", ICLR 2022, equation 7), which
`merge_attentions` offers for parts computed apart.

Nothing of the size of all scores is formed on TPU and GPU, forward or backward; elsewhere plain JAX forms it.

Shape letters: b batch, t queries, s keys, h heads, g heads of keys (h a multiple of it), d width, p prefix.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float

from jaxpeft.kernels import attention_gpu, attention_tpu
from jaxpeft.kernels.attention_blocks import MAX_PREFIX, MAX_WIDTH, Blocks, Operands, Plan
from jaxpeft.kernels.block_selection import Selection
from jaxpeft.kernels.platforms import VMEM_BYTES, Backend, KernelError, on_platform, same_variance, wide
from jaxpeft.kernels.positions import Position, position_bias, rotated

__all__ = ["attention", "merge_attentions", "reference"]

Part = tuple[Array, Array]
SHORT = 512  # keys and prefix that one block holds


def attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    *,
    prefix: tuple[Float[Array, "#b p g d"], Float[Array, "#b p g d"]] | None = None,
    position: Position | None = None,
    selection: Selection | None = None,
    key_mask: Bool[Array, "b s"] | None = None,
    causal: bool = False,
    offset: int = 0,
    scale: float | None = None,
    with_lse: bool = False,
    backend: Backend = "auto",
    blocks: Blocks | None = None,
    precision: Any = None,
    vmem_bytes: int = VMEM_BYTES,
) -> Any:
    """softmax(scale q kᵀ + bias) v over the prefix and the keys that are seen; see the module.

    With `backend="auto"`, where there is no prefix, slope, selection, offset or log-sum-exp, and nothing is float64, it is
    `jax.nn.dot_product_attention`.

    Args:
      q, k, v: queries, keys, values of one type; query head i reads key head i // (h / g). Width 1 to 256.
      prefix: keys and values that every query sees, without bias and before any mask, 1 to 1024 of them; shared by the
        batch where their first axis is 1. With rotary positions the rotated queries meet them as they are given, as if they
        stood at position 0.
      position: rotary positions and biases.
      selection: which blocks are seen, beside the other masks; see `block_selection`.
      key_mask: False for keys that nobody sees (padding).
      causal: query i sees keys up to `offset + i`.
      offset: the position of the first query among the keys; with 0 causal masks are those of
        `jax.nn.dot_product_attention`, with s - t the last query sees all.
      scale: d^-1/2 where None.
      with_lse: also returns the log-sum-exp of each query's scores, prefix included.
      backend: "auto", "xla", "tpu" or "gpu"; see the package.
      blocks: block sizes; chosen from the shapes where None.
      precision: of the products, as `jax.lax.dot` takes it.
      vmem_bytes: what the TPU kernel may use of VMEM.

    Returns:
      o (b, t, h, d) in q's type, or `(o, lse (b, t, h))` with lse in float32 (float64 for float64), as are all sums. A
      query that sees nothing has o = 0 and lse = -inf and gives no gradient.

    Raises:
      KernelError: shapes or types that do not fit, a width over 256, a prefix over 1024, a selection of other blocks, lists
        of blocks beyond a TPU's scalar memory, blocks that the platform refuses.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 4, 2, 8))
      >>> prefix = (jnp.zeros((1, 3, 2, 8)), jnp.ones((1, 3, 2, 8)))
      >>> attention(q, k, v, prefix=prefix, causal=True).shape
      (1, 4, 2, 8)
    """
    _check(q, k, v, prefix, position, selection, key_mask, blocks)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    position = Position() if position is None else position
    q, k = rotated(q, k, position, offset)
    standard = prefix is None and position.slopes is None and selection is None and not with_lse and not offset
    if backend == "auto" and standard and blocks is None and precision is None and q.dtype != jnp.float64:
        return _standard(q, k, v, key_mask, causal, factor)
    if not q.size or not k.shape[1]:
        raise KernelError(f"q {q.shape}, k {k.shape}: at least one of each axis")
    slopes = None
    if position.slopes is not None:
        sums = wide(q.dtype)
        slopes = jnp.asarray(position.slopes, sums) * jnp.asarray(position.slope_weight, sums)
    if prefix is not None:
        prefix = (prefix[0].astype(q.dtype), prefix[1].astype(q.dtype))
        short = k.shape[1] + prefix[0].shape[1] <= SHORT
        if short and slopes is None and selection is None and blocks is None:
            k, v, key_mask, offset = _behind(prefix, k, v, key_mask, offset)
            prefix = None
    plan = Plan(
        factor,
        causal,
        offset,
        position.distance,
        backend,
        blocks,
        None if selection is None else (selection.block, selection.slots),
        precision,
        vmem_bytes,
    )
    mask = None if key_mask is None else key_mask.astype(jnp.int32)
    selected = None if selection is None else selection.mask
    x = Operands(q, k, v, prefix, slopes, mask, selected)
    if backend == "xla":
        o, lse = reference(plan, x)
    else:
        leaves, tree = jax.tree.flatten(x)
        # Outside the custom gradient, so that what is shared over a mesh has its gradients summed.
        found: Any = _attention(plan, *jax.tree.unflatten(tree, same_variance(*leaves)))
        o, lse = found
    return (o, lse.swapaxes(1, 2)) if with_lse else o


def _behind(prefix: Part, k: Array, v: Array, key_mask: Any, offset: int) -> tuple[Array, Array, Any, int]:
    """Keys, values, their mask and the queries' offset, with the prefix before the keys: one block where two were."""
    b, p = k.shape[0], prefix[0].shape[1]
    k, v = (jnp.concatenate([jnp.broadcast_to(y, (b, *y.shape[1:])), x], 1) for y, x in zip(prefix, (k, v)))
    mask = None if key_mask is None else jnp.pad(key_mask.astype(bool), ((0, 0), (p, 0)), constant_values=True)
    return k, v, mask, offset + p


def merge_attentions(first: Part, second: Part) -> tuple[Float[Array, "*n d"], Float[Array, "*n"]]:
    """Two attentions of the same queries over different keys, as one over all of them.

    o = (1 - w) o₁ + w o₂ with w = e^lse₂ / (e^lse₁ + e^lse₂), and lse = log(e^lse₁ + e^lse₂). A scale s on the second's
    weight is log s added to lse₂ beforehand.

    Args:
      first, second: `(o (..., d), lse (...))`; a part with lse = -inf has no weight, and two of them give 0 and -inf.
    """
    (o1, lse1), (o2, lse2) = first, second
    top = lax.stop_gradient(jnp.maximum(lse1, lse2))
    top = jnp.where(jnp.isfinite(top), top, jnp.zeros((), top.dtype))
    w1, w2 = jnp.exp(lse1 - top), jnp.exp(lse2 - top)
    total = w1 + w2
    some = total > 0
    safe = jnp.where(some, total, jnp.ones((), total.dtype))
    mean = (o1.astype(total.dtype) * w1[..., None] + o2.astype(total.dtype) * w2[..., None]) / safe[..., None]
    return mean.astype(o1.dtype), jnp.where(some, top + jnp.log(safe), -jnp.inf)


def _check(
    q: Array,
    k: Array,
    v: Array,
    prefix: Any,
    position: Position | None,
    selection: Selection | None,
    key_mask: Any,
    blocks: Blocks | None,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise KernelError(f"q {q.shape}, k {k.shape}, v {v.shape}: expected (b, t, h, d) and twice (b, s, g, d)")
    (b, t, h, d), (_, s, g, _) = q.shape, k.shape
    if k.shape != (b, s, g, d) or not g or h % g:
        raise KernelError(
            f"q {q.shape}, k {k.shape}: expected one batch, one width, and query heads a multiple of the keys' heads"
        )
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise KernelError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: expected one floating-point type; cast them")
    if not 1 <= d <= MAX_WIDTH:
        raise KernelError(f"heads of width {d}: the kernel takes 1 to {MAX_WIDTH}")
    if prefix is not None:
        shapes = tuple(x.shape for x in prefix)
        p = shapes[0][1] if len(shapes[0]) == 4 else 0
        if not 1 <= p <= MAX_PREFIX or shapes[0] != shapes[1] or shapes[0] not in ((b, p, g, d), (1, p, g, d)):
            raise KernelError(
                f"prefix {shapes}: expected keys and values (1 or {b}, p, {g}, {d}) with p from 1 to {MAX_PREFIX}; put "
                "longer ones before the keys"
            )
    if position is not None and position.slopes is not None and position.slopes.shape != (h,):
        raise KernelError(f"slopes {position.slopes.shape}: one for each of {h} heads")
    if position is not None and position.distance not in ("linear", "harmonic"):
        raise KernelError(f"distance {position.distance!r}: linear or harmonic")
    if key_mask is not None and key_mask.shape != (b, s):
        raise KernelError(f"key_mask {key_mask.shape}: expected {(b, s)}")
    if selection is not None:
        n, m = -(-t // selection.block), -(-s // selection.block)
        if selection.mask.shape not in ((1, n, m), (h, n, m)):
            raise KernelError(
                f"selection of {selection.mask.shape} blocks of {selection.block}: expected (1 or {h}, {n}, {m}) for {t} "
                f"queries and {s} keys"
            )
        if blocks is not None:
            raise KernelError(f"{blocks} beside a selection: its own blocks decide")


def _standard(q: Array, k: Array, v: Array, key_mask: Any, causal: bool, scale: float) -> Array:
    key_mask = None if key_mask is None else key_mask.astype(bool)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    o = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, scale=scale)
    if key_mask is None:
        return o
    # What sees nothing is 0 here and a mean of all values there.
    some = jnp.cumsum(key_mask, axis=1, dtype=jnp.int32)[:, : q.shape[1]] > 0 if causal else key_mask.any(1)[:, None]
    if causal and q.shape[1] > k.shape[1]:
        some = jnp.pad(some, ((0, 0), (0, q.shape[1] - k.shape[1])), mode="edge")
    return jnp.where(some[:, :, None, None], o, jnp.zeros((), o.dtype))


def seen(plan: Plan, x: Operands) -> Bool[Array, "#b #h t s"]:
    """Which query sees which key."""
    t, s = x.sizes.t, x.sizes.s
    found = jnp.ones((1, 1, t, s), bool)
    if plan.causal:
        found &= (np.arange(t)[:, None] + plan.offset >= np.arange(s))[None, None]
    if x.key_mask is not None:
        found &= (x.key_mask != 0)[:, None, None]
    if x.selected is not None and plan.selection is not None:
        size = plan.selection[0]
        found &= x.selected[:, np.arange(t)[:, None] // size, np.arange(s) // size][None]
    return found


def reference(plan: Plan, x: Operands) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"]]:
    """`(o, lse)` in plain JAX, all scores formed."""
    b, t, s, h, g, d, p = x.sizes
    sums = wide(x.q.dtype)
    grouped = x.q.reshape(b, t, g, h // g, d)
    product = functools.partial(jnp.einsum, precision=plan.precision, preferred_element_type=sums)
    scores = product("btgrd,bsgd->bgrts", grouped, x.k).reshape(b, h, t, s) * plan.scale
    if x.slopes is not None:
        scores += position_bias(t, s, x.slopes, plan.distance, plan.offset)
    visible = jnp.broadcast_to(seen(plan, x), scores.shape)
    v = x.v
    if x.prefix is not None:
        k_prefix, v_prefix = (jnp.broadcast_to(y, (b, *y.shape[1:])) for y in x.prefix)
        ahead = product("btgrd,bpgd->bgrtp", grouped, k_prefix).reshape(b, h, t, p) * plan.scale
        scores, v = jnp.concatenate([ahead, scores], -1), jnp.concatenate([v_prefix, v], 1)
        visible = jnp.concatenate([jnp.ones(ahead.shape, bool), visible], -1)
    scores = jnp.where(visible, scores, jnp.asarray(-1e30, sums))
    top = lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - top), jnp.zeros((), sums))
    total = weights.sum(-1, keepdims=True)
    some = total > 0
    safe = jnp.where(some, total, jnp.ones((), sums))
    shares = (weights / safe).astype(v.dtype).reshape(b, g, h // g, t, -1)
    o = product("bgrts,bsgd->btgrd", shares, v).reshape(b, t, h, d).astype(x.q.dtype)
    return o, jnp.where(some, top + jnp.log(safe), -jnp.inf)[..., 0]


# --------------------------------------------------------------------------------------------------- differentiation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, q: Array, k: Array, v: Array, prefix: Any, slopes: Any, mask: Any, selected: Any) -> Any:
    return _run(plan, Operands(q, k, v, prefix, slopes, mask, selected))


def _run(plan: Plan, x: Operands) -> tuple[Array, Array]:
    def kernel(*leaves: Array, platform: str, interpret: bool) -> tuple[Array, Array]:
        module = attention_tpu if platform == "tpu" else attention_gpu
        return module.forward(plan, jax.tree.unflatten(tree, leaves), interpret=interpret)

    leaves, tree = jax.tree.flatten(x)
    return on_platform(plan.backend, lambda *ls: reference(plan, jax.tree.unflatten(tree, ls)), kernel, *leaves)


def _forward(plan: Plan, *parts: Any) -> tuple[Any, Any]:
    is_leaf = lambda z: hasattr(z, "perturbed")
    x = Operands(*jax.tree.map(lambda z: z.value, parts, is_leaf=is_leaf))
    # A pytree without leaves says which gradients are wanted: a bool would become an array.
    wanted = tuple(() if any(z.perturbed for z in jax.tree.leaves(part, is_leaf=is_leaf)) else None for part in parts)
    o, lse = _run(plan, x)
    return (o, lse), (x, o, lse, wanted)


def _backward(plan: Plan, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    x, o, lse, wanted = saved
    want_q, want_k, want_v, want_prefix, want_slopes, *_ = (w is not None for w in wanted)
    do, dlse = cotangents
    sums = lse.dtype
    if isinstance(do, SymbolicZero) and isinstance(dlse, SymbolicZero):
        return (None,) * 7
    do = jnp.zeros(o.shape, o.dtype) if isinstance(do, SymbolicZero) else do
    dlse = jnp.zeros(lse.shape, sums) if isinstance(dlse, SymbolicZero) else dlse
    leaves, tree = jax.tree.flatten(x)

    def xla(do: Array, dlse: Array, o: Array, lse: Array, *leaves: Array) -> Any:
        x = jax.tree.unflatten(tree, leaves)
        floats = (x.q, x.k, x.v, x.prefix, x.slopes)
        _, pull = jax.vjp(lambda q, k, v, p, s: reference(plan, x._replace(q=q, k=k, v=v, prefix=p, slopes=s)), *floats)
        dq, dk, dv, dprefix, dslopes = pull((do, jnp.where(lse > -jnp.inf, dlse, jnp.zeros((), sums))))
        return (
            dq if want_q else None,
            (dk, dv) if want_k or want_v else None,
            dprefix if want_prefix else None,
            dslopes if want_slopes else None,
        )

    def kernel(do: Array, dlse: Array, o: Array, lse: Array, *leaves: Array, platform: str, interpret: bool) -> Any:
        module = attention_tpu if platform == "tpu" else attention_gpu
        x: Operands = jax.tree.unflatten(tree, leaves)
        none = lse == -jnp.inf
        delta = (do.astype(sums) * o.astype(sums)).sum(-1).swapaxes(1, 2) - dlse
        delta = jnp.where(none, jnp.zeros((), sums), delta)
        rows = (do, jnp.where(none, jnp.zeros((), sums), lse), delta)
        dq = dkv = dprefix = dslopes = None
        if want_q or want_slopes:
            dq, slant = module.backward_queries(plan, x, *rows, with_slopes=want_slopes, interpret=interpret)
            dq = dq if want_q else None
            dslopes = None if slant is None else slant.sum((0, 2))
        if want_k or want_v:
            dkv = module.backward_keys(plan, x, *rows, prefix=False, interpret=interpret)
        if want_prefix:
            dprefix = module.backward_keys(plan, x, *rows, prefix=True, interpret=interpret)
            if x.prefix is not None and x.prefix[0].shape[0] == 1:
                dprefix = tuple(y.astype(sums).sum(0, keepdims=True).astype(y.dtype) for y in dprefix)
        return dq, dkv, dprefix, dslopes

    dq, dkv, dprefix, dslopes = on_platform(plan.backend, xla, kernel, do, dlse, o, lse, *leaves)
    dk, dv = (None, None) if dkv is None else dkv
    return dq, dk if want_k else None, dv if want_v else None, dprefix, dslopes, None, None


_attention.defvjp(_forward, _backward, symbolic_zeros=True)
