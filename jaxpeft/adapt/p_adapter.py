"""p-Laplacian Adaptation for Generative Pre-trained Vision-Language Models (Wu et al., AAAI 2024, arXiv:2312.10613).

An adapter after attention is a step of message passing on a graph: nodes are the attended values (and, across modalities, the
queries), edges the attention matrix A. Queries and values differ (heterophily), and plain averaging smooths what differs away;
so edges are weighed by the length of the difference between their ends, |G|^(p-2), as the p-Laplacian has it:

    G_ij = sqrt(A_ij + e) (f_j - f_i),   M_ij = A_ij |G_ij + e|_2^(p-2),   e = 1e-8
    alpha_i = 1 / (Σ_j M_ij + 2 mu / p),   beta_i = alpha_i 2 mu / p,   mu = mu_0 (2 + tanh m)
    F' = diag(alpha) M F + diag(beta) F                                          self-attention: nodes are values
    F' = diag(alpha) M F_V (+ diag(beta) F_Q with restart="theory")              cross-attention: queries meet values
    f  = heads of (nodes W_o + b_o) W_i + b_i                                    W_o: the frozen output projection
    h <- h + [gelu(h W_g + b_g) * F'] W_out + b_out                              h: the attention's output
    ffn <- ffn + relu(x W_1 + b_1) W_2 + b_2                                     beside the feed-forward network

At p = 2 this is plain averaging. Across modalities values and the columns of A may first be averaged into `samples` tokens.
In self-attention a node is its own neighbour, and at distance zero its weight (e sqrt(c))^(p-2) outweighs all others for
p < 2: the step is close to the identity. That is the reference's doing (`self_loops="keep"`); its pGNN drops infinite weights,
`self_loops="drop"`. Distances come from squared norms and products, so only matrices of the size of A are formed.

Reference code: wuhy68/p-Adapter @e66ab8b (eff_blip/eff_modeling_blip.py; it lacks lines and does not run), and the pGNN step
guoji-fu/pGNNs (src/pgnn_conv.py). In the code the restart term of cross-attention is an off-diagonal block of a diagonal
matrix, that is zero; `restart="theory"` adds what the theory has there.

Letters: b batch, h heads, q queries, n nodes, c features a head, d width, r = d / reduction.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpeft import trees
from jaxpeft.adapt.unified import ATTENTION, Design, hooks_of
from jaxpeft.hooks import Hook, Site, on_hooks
from jaxpeft.method import Method, register

__all__ = ["p_adapter", "p_reweight", "p_step"]

E = 1e-8


def p_reweight(
    a: Float[Array, "*b q n"],
    rows: Float[Array, "*b q c"],
    nodes: Float[Array, "*b n c"],
    p: Any,
    *,
    same: bool,
    self_loops: Literal["keep", "drop"] = "keep",
) -> Float[Array, "*b q n"]:
    """M, in float32.

    Args:
      a: attention, zero at masked nodes.
      rows, nodes: the features of the ends of each edge.
      p: over 0; 2 leaves A as it is.
      same: row i is node i, so that their distance is exactly zero.
      self_loops: whether such an edge counts.
    """
    a, rows, nodes = (x.astype(jnp.float32) for x in (a, rows, nodes))
    square = lambda x: jnp.sum(jnp.square(x), -1)
    product = jnp.einsum("...qc,...nc->...qn", rows, nodes)
    distance = jnp.maximum(square(rows)[..., :, None] + square(nodes)[..., None, :] - 2 * product, 0.0)
    tilt = nodes.sum(-1)[..., None, :] - rows.sum(-1)[..., :, None]
    if same:
        # The difference of equal numbers is rounding, which (e sqrt(c))^(p-2) would take for a distance.
        own = jnp.eye(*a.shape[-2:], dtype=bool)
        distance, tilt = jnp.where(own, 0.0, distance), jnp.where(own, 0.0, tilt)
        if self_loops == "drop":
            a = jnp.where(own, 0.0, a)
    edge = a + E
    length = edge * distance + 2 * E * jnp.sqrt(edge) * tilt + rows.shape[-1] * E**2
    # |G + e| is at least zero; rounding can leave it just below, where a power is not a number.
    safe = jnp.maximum(length, 1e-3 * E**2)
    return a * jnp.exp(0.5 * (p - 2) * jnp.log(safe))


def p_step(
    m: Float[Array, "*b q n"],
    rows: Float[Array, "*b q c"],
    nodes: Float[Array, "*b n c"],
    p: Any,
    mu: Any,
    restart: Any = 1.0,
) -> Float[Array, "*b q c"]:
    """One step: alpha M F + restart beta F, in float32. `restart` 0 leaves the second term out."""
    amount = 2 * mu / p
    alpha = 1 / (m.sum(-1, keepdims=True) + amount)
    mixed = jnp.einsum("...qn,...nc->...qc", m, nodes.astype(jnp.float32))
    return alpha * mixed + restart * alpha * amount * rows.astype(jnp.float32)


def pooling(n: int, samples: int) -> Float[np.ndarray, "n s"]:
    """Averages of n tokens in `samples` runs, as adaptive average pooling cuts them."""
    out = np.zeros((n, samples), np.float32)
    for s in range(samples):
        first, last = s * n // samples, -(-(s + 1) * n // samples)
        out[first:last, s] = 1 / (last - first)
    return out


def _weights(q: Array, k: Array, bias: Any, scale: float) -> Float[Array, "b h q n"]:
    """The attention matrix of a core's inputs, in float32; key heads serve groups of query heads."""
    groups = q.shape[2] // k.shape[2]
    k = jnp.repeat(k, groups, axis=2) if groups > 1 else k
    logits = scale * jnp.einsum("bqhe,bnhe->bhqn", q.astype(jnp.float32), k.astype(jnp.float32))
    return jax.nn.softmax(logits if bias is None else logits + bias.astype(jnp.float32), axis=-1)


@register(
    family="adapt", paper="Wu et al., AAAI 2024", mechanism="hooks", mergeable=False, exact_start=False, rate=2e-3
)
def p_adapter(
    reduction: int = 8,
    p: float = 1.5,
    mu: float = 0.1,
    *,
    learn_p: bool = True,
    samples: int | None = None,
    restart: Literal["code", "theory"] = "code",
    self_loops: Literal["keep", "drop"] = "keep",
    message: bool = True,
    feed_forward: bool = True,
    scale: float | None = None,
    at: trees.Pattern = ATTENTION,
    name: str = "p_adapter",
) -> Method:
    """The p-adapter at attention, with a bottleneck beside the feed-forward network.

    Args:
      reduction: the bottleneck is d / reduction wide; divides the heads' width.
      p: at the start, over 0; the paper's 1.25 to 1.75.
      mu: mu_0, over 0.
      learn_p: whether p is trained, one number an attention.
      samples: tokens that cross-attention's values are averaged into; None for no averaging.
      restart: of cross-attention; see the module.
      self_loops: of self-attention; see the module.
      message: False puts the projected attention output in the place of F': the gate alone, an ablation.
      feed_forward: whether there is a bottleneck beside the feed-forward network.
      scale: the attention's, where it is not 1 / sqrt(head width).
      at: pattern of attention modules, which have children `core` and `out`.
      name: the key of its delta in a chain.

    Returns:
      A method on hooks, delta `{module path of an attention's `out`: {"inner" (d, r), "inner_bias", "gate" (d, r),
      "gate_bias", "up" (r, d), "up_bias", "p", "m"}, ...}`. It does not merge.

    Raises:
      ValueError: an option out of range; at `init`, a reduction that does not divide the heads' width.
      PatternError: no module matches.
    """
    if reduction < 1 or not p > 0 or not mu > 0:
        raise ValueError(f"reduction {reduction}, p {p}, mu {mu}: expected 1 or more, and positive numbers")
    if samples is not None and samples < 1:
        raise ValueError(f"samples {samples}: values are averaged into at least one token")
    if restart not in ("code", "theory") or self_loops not in ("keep", "drop"):
        raise ValueError(f"restart {restart!r}, self_loops {self_loops!r}: expected code or theory, keep or drop")

    def core(site: Site, call: Any, q: Array, k: Array, v: Array, bias: Any = None, **kwargs: Any) -> Array:
        site.stash["attention", site.parent] = q, k, v, bias
        return call(q, k, v, bias, **kwargs)

    def out(site: Site, call: Any, x: Float[Array, "b q d"], *args: Any, **kwargs: Any) -> Array:
        h = call(x, *args, **kwargs)
        q, k, v, bias = site.stash["attention", site.parent]
        heads, width = q.shape[2:]
        if width % reduction:
            raise ValueError(f"reduction {reduction} does not divide the heads' width {width}")
        d, r, dtype = h.shape[-1], heads * width // reduction, h.dtype

        def linear(y: Array, label: str, n: int, m: int) -> Array:
            y = y @ site.param(label, (n, m), _normal).astype(dtype)
            return y + site.param(f"{label}_bias", (m,), _zeros).astype(dtype).reshape((1,) * (y.ndim - 1) + (m,))

        def features(nodes: Array) -> Float[Array, "b h n c"]:
            f = linear(call(nodes.reshape(*nodes.shape[:2], -1), *args, **kwargs), "inner", d, r)
            return jnp.swapaxes(f.reshape(*f.shape[:2], heads, -1), 1, 2)

        gate = jax.nn.gelu(linear(h, "gate", d, r), approximate=False)
        power = site.param("p", (), lambda key, shape, dtype: jnp.full(shape, p, dtype)) if learn_p else p
        amount = mu * (2 + jnp.tanh(site.param("m", (), _zeros)))
        if not message:
            mixed = linear(h, "inner", d, r)
        else:
            values = jnp.repeat(v, heads // v.shape[2], axis=2) if v.shape[2] < heads else v
            a = _weights(q, k, bias, 1 / math.sqrt(width) if scale is None else scale)
            cross = site.parent.endswith("cross_attention")
            if cross and samples is not None:
                pool = jnp.asarray(pooling(a.shape[-1], samples))
                a = a @ pool
                values = jnp.einsum("bnhe,ns->bshe", values, pool.astype(values.dtype))
            nodes = features(values)
            # A layer that is asked for the first position alone has one query.
            rows = features(q) if cross else nodes[:, :, : q.shape[1]]
            weights = p_reweight(a, rows, nodes, power, same=not cross, self_loops=self_loops)
            again = 1.0 if not cross or restart == "theory" else 0.0
            f = p_step(weights, rows, nodes, power, amount, again)
            mixed = jnp.swapaxes(f, 1, 2).reshape(*h.shape[:2], r).astype(dtype)
        return h + linear(gate * mixed, "up", r, d)

    def normal_width(site: Site, call: Any, x: Array, *args: Any, **kwargs: Any) -> Array:
        # r = d / reduction is known where the module is met.
        around = hooks_of(Design(insertion="parallel"), max(1, x.shape[-1] // reduction), "**/mlp", 0.0, None)[0].around
        return around(site, call, x, *args, **kwargs)

    inside = [at] if isinstance(at, str) else list(at)
    hooks = [Hook([f"{a}/core" for a in inside], core), Hook([f"{a}/out" for a in inside], out)]
    hooks += [Hook("**/mlp", normal_width)] if feed_forward else []
    config = dict(
        method="p_adapter",
        reduction=reduction,
        p=p,
        mu=mu,
        learn_p=learn_p,
        samples=samples,
        restart=restart,
        self_loops=self_loops,
        message=message,
        feed_forward=feed_forward,
        scale=scale,
        at=at,
        name=name,
    )
    return on_hooks(name, hooks, config)


def _normal(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    return 0.02 * jax.random.normal(key, shape, dtype)


def _zeros(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    return jnp.zeros(shape, dtype)
