"""DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning (Shi and Lipani, ICLR 2024, arXiv:2309.05173).

The budget of a soft prompt of l vectors goes into a shorter one and a low-rank offset to the embedded input, by position:

    X = [P; E + (alpha / sqrt(r)) A B]            P (m, d), A (s, r), B (r, d);  l d = m d + (s + d) r
    A ~ U(±1/sqrt(r)), B = 0: it starts as prompt tuning with m vectors

The sequence is m + s long instead of l + s, so attention costs less; and the two parts want different rates (in the paper
0.3 for P, 1e-4 to 5e-3 for A and B). The offset depends on the position alone, so inputs must be aligned alike (padded on
the right), and it merges into no table.

Reference code: ZhengxiangShi/DePT @f0266a7 (peft/tuners/prompt_tuning_lora.py). The paper writes E + A B: alpha / sqrt(r),
alpha = 8, is the code's. It starts P from a fixed sentence's embeddings; here, as in `prompt_tuning`, from random words'.

Letters: b batch, t tokens, s positions that have an offset, m prompt vectors, r rank, d width.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxpeft import trees
from jaxpeft.adapt.prompt_tuning import prompt_start
from jaxpeft.hooks import Hook, Site, Slots, on_hooks
from jaxpeft.method import Call, Delta, Method, register, site_key

__all__ = ["budget", "dept"]


def budget(length: int, width: int, positions: int, prompt: int) -> int:
    """The largest r with at most the parameters of a prompt of `length` vectors: (l - m) d / (s + d).

    Raises:
      ValueError: a prompt that is longer than `length`.
    """
    if not 0 <= prompt <= length:
        raise ValueError(f"prompt {prompt}: expected 0 to the length, {length}")
    return (length - prompt) * width // (positions + width)


@register(
    family="adapt", paper="Shi and Lipani, ICLR 2024", mechanism="hooks", mergeable=False, exact_start=False, rate=1e-3
)
def dept(
    prompt: int = 8,
    rank: int = 8,
    positions: int = 128,
    alpha: Any = 8.0,
    *,
    init: Literal["vocabulary", "normal", "uniform"] = "vocabulary",
    prompt_rate: float = 30.0,
    at: trees.Pattern = "**/embeddings/word",
    name: str = "dept",
) -> Method:
    """Decomposed prompt tuning; see the module for the equations, and `budget` for sizes that compare.

    Args:
      prompt: m, 0 or more vectors in front; the model must have room for so many more positions.
      rank: r of the offset, 0 for none.
      positions: s, the longest input.
      alpha: numerator of the offset's scale. May be an array.
      init: of P, as in `prompt_tuning`.
      prompt_rate: P's learning rate relative to that of A and B.
      at: pattern of the embedding module, which maps ids (b, t) to vectors (b, t, d).
      name: the key of its delta in a chain.

    Returns:
      A method on hooks, delta `{module path: {"prompt": (m, d), "a": (s, r), "b": (r, d)}}`. It does not merge.

    Raises:
      ValueError: negative sizes, both zero, an unknown init; an input longer than s.
      PatternError: no module matches.
    """
    if prompt < 0 or rank < 0 or not prompt + rank or positions < 1:
        raise ValueError(
            f"prompt {prompt}, rank {rank}, positions {positions}: none is negative, and there is a prompt or an offset"
        )
    if init not in ("vocabulary", "normal", "uniform"):
        raise ValueError(f"init {init!r}: expected 'vocabulary', 'normal' or 'uniform'")

    def around(site: Site, call: Any, ids: Array, *args: Any, **kwargs: Any) -> Array:
        x = call(ids, *args, **kwargs)
        t, d = x.shape[-2:]
        if rank:
            if t > positions:
                raise ValueError(
                    f"{t} tokens, and dept has offsets for {positions}: make it with positions={t} or more"
                )
            a = site.param("a", (positions, rank), _uniform).astype(x.dtype)
            b = site.param("b", (rank, d), _zeros).astype(x.dtype)
            x = x + (jnp.asarray(alpha, x.dtype) / math.sqrt(rank) * (a[:t] @ b))[None]
        if prompt:
            p = site.param("prompt", (prompt, d), None).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(p, (x.shape[0], *p.shape)), x], axis=1)
        return x

    def start(key: Key[Array, ""], slots: Slots, call: Call) -> Delta:
        out: dict[str, Any] = {}
        for place, named in slots.items():
            drawn = {n: s.start(site_key(key, f"{place}/{n}")) for n, s in named.items() if s.init is not None}
            if prompt:
                drawn["prompt"] = prompt_start(site_key(key, place), place, named["prompt"].shape, init, call)
            out[place] = drawn
        return out

    config = dict(
        method="dept",
        prompt=prompt,
        rank=rank,
        positions=positions,
        alpha=alpha,
        init=init,
        prompt_rate=prompt_rate,
        at=at,
        name=name,
    )
    made = on_hooks(name, [Hook(at, around)], config, init=start)
    return made._replace(rates=(("**/prompt", prompt_rate),) if prompt and rank else ())


def _uniform(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    bound = 1 / math.sqrt(shape[1])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _zeros(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    return jnp.zeros(shape, dtype)
