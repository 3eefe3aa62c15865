"""MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer (Pfeiffer, Vulić, Gurevych and Ruder, EMNLP 2020,
arXiv:2005.00052), as Parameter-Efficient Neural Reranking for Cross-Lingual and Multilingual Retrieval (Litschko, Vulić and
Glavaš, COLING 2022, arXiv:2204.02292) uses it.

A language adapter is trained by masked language modelling on text of one language; a task adapter is trained on top of the
source language's, which stays as it is; for another language its adapter takes that place. In each block, with
z = h + r (feed-forward output and its input) and LN the block's own frozen norm:

    z_1 = z   + A_language(LN(z)),      A(x) = relu(x D + b) U + c
    z_2 = z_1 + A_task(LN(z_1)),        out = LN(z_2)

The language adapter has an invertible part (NICE) at the embedding layer's output e = [e_1, e_2], whose inverse stands
before the projection to the vocabulary in language modelling:

    y_1 = e_1 + F(e_2),   y_2 = e_2 + G(y_1);        e_2 = y_2 - G(y_1),   e_1 = y_1 - F(e_2)

Split: tokens of segment 0 (the query) go through one language's adapter, the others (the document) through another's; the
task adapter takes all. The segments are what the model's token-type embedding is called with.

Reference code: adapter-hub/adapters @88f18eb (methods/modeling.py, bottleneck.py, invertible.py: `SeqBnInvConfig`,
`Stack`, `Split`); rlitschk/ModularCLIR @9f8150b. Its `Split` cuts all rows of a batch at one position and applies the first
adapter's NICE to all tokens; here each row has its own segments, for NICE too.

Letters: b batch, t tokens, d width, m bottleneck, n bottleneck of F and G.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxpeft import trees
from jaxpeft.adapt.unified import DESIGNS, bottleneck
from jaxpeft.hooks import Hook, Site, Slots, on_hooks
from jaxpeft.method import Call, Delta, Method, register, site_key

__all__ = ["adapter_stack", "language_adapter", "mad_x", "nice", "nice_inverse", "with_language"]

AT = "**/mlp_norm"
EMBEDDINGS = "**/embeddings"
SEGMENTS = "**/embeddings/type"
(DESIGN,) = DESIGNS["pfeiffer"]


def adapter_stack(
    z: Float[Array, "*b d"],
    norm: Callable[[Array], Array],
    adapters: Sequence[Callable[[Array], Array]],
) -> Float[Array, "*b d"]:
    """A block's output with a stack of adapters around its last norm.

    Args:
      z: what the norm is called with, h + r.
      norm: LN.
      adapters: the first acts first; each is `x -> A(x)`, without its residual.
    """
    for adapter in adapters:
        z = z + adapter(norm(z))
    return norm(z)


def nice(p: Mapping[str, Array], e: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """The invertible map; its Jacobian has determinant 1.

    Args:
      p: {"f_down" (d/2, n), "f_down_bias" (n,), "f_up" (n, d/2), "f_up_bias" (d/2,)} and "g_..." alike.
      e: of even width.
    """
    first, second = jnp.split(e, 2, axis=-1)
    first = first + _coupling(p, "f", second)
    second = second + _coupling(p, "g", first)
    return jnp.concatenate([first, second], axis=-1)


def nice_inverse(p: Mapping[str, Array], y: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Undoes `nice`, to rounding."""
    first, second = jnp.split(y, 2, axis=-1)
    second = second - _coupling(p, "g", first)
    first = first - _coupling(p, "f", second)
    return jnp.concatenate([first, second], axis=-1)


def _coupling(p: Mapping[str, Array], which: str, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    w = {n: p[f"{which}_{n}"].astype(x.dtype) for n in ("down", "down_bias", "up", "up_bias")}
    row = lambda v: v.reshape((1,) * (x.ndim - 1) + v.shape)
    return jax.nn.relu(x @ w["down"] + row(w["down_bias"])) @ w["up"] + row(w["up_bias"])


def _nice_parameters(site: Site, prefix: str, d: int, n: int | None) -> dict[str, Array]:
    if d % 2:
        raise ValueError(f"an invertible adapter halves the width, and {d} is odd: take invertible=False")
    half, n = d // 2, n or max(1, d // 4)
    small = lambda key, shape, dtype: 0.02 * jax.random.normal(key, shape, dtype)
    zeros = lambda key, shape, dtype: jnp.zeros(shape, dtype)
    out = {}
    for which in ("f", "g"):
        for name, shape, init in (
            ("down", (half, n), small),
            ("down_bias", (n,), zeros),
            ("up", (n, half), small),
            ("up_bias", (half,), zeros),
        ):
            out[f"{which}_{name}"] = site.param(f"{prefix}{which}_{name}", shape, init)
    return out


def _part(site: Site, prefix: str) -> Site:
    """The site with parameters of other names: several adapters stand at one."""
    return Site(site.path, site.stash, lambda name, *what: site.param(prefix + name, *what))


def _by_segment(site: Site, first: Array, other: Array) -> Array:
    """`first` at tokens of segment 0, `other` elsewhere."""
    if "segments" not in site.stash:
        raise ValueError(
            f"nothing told the segments of the tokens before {site.path!r}: does `segments_at` match the token-type embedding?"
        )
    segments = site.stash["segments"][:, : first.shape[1], None]  # a narrow last layer has the first token alone
    return jnp.where(segments == 0, first, other)


def _note_segments(site: Site, call: Any, segments: Int[Array, "#b t"], *args: Any, **kwargs: Any) -> Array:
    site.stash["segments"] = segments
    return call(segments, *args, **kwargs)


# ---------------------------------------------------------------------------------------------------------- methods


@register(
    family="adapt",
    paper="Pfeiffer et al., EMNLP 2020",
    mechanism="hooks",
    mergeable=False,
    exact_start=False,
    rate=1e-3,
)
def language_adapter(
    rank: int = 48,
    *,
    invertible: bool = True,
    invertible_rank: int | None = None,
    inverse_at: trees.Pattern | None = None,
    at: trees.Pattern = AT,
    embeddings_at: trees.Pattern = EMBEDDINGS,
    name: str = "language_adapter",
) -> Method:
    """A Pfeiffer adapter in each block and NICE at the embeddings: what a language is learned by.

    Args:
      rank: m; half of the width in the papers.
      invertible: whether there is a NICE part.
      invertible_rank: n; None for a quarter of the width, as in the papers.
      inverse_at: pattern of the module whose input the inverse is applied to, the projection to the vocabulary; None where
        there is none (the adapter is used, not trained).
      at: pattern of the norms after the feed-forward networks, in post-norm blocks.
      embeddings_at: pattern of the embedding layer.
      name: the key of its delta in a chain.

    Returns:
      A method on hooks, delta `{norm: {"down" (*stack, d, m), "down_bias", "up", "up_bias"}, embeddings: {"f_down", ...}}`.
      It does not merge.

    Raises:
      ValueError: a rank below 1; an odd width with `invertible`.
      PatternError: no module matches.
    """
    _check_ranks(rank=rank, invertible_rank=invertible_rank)

    def around(site: Site, call: Any, z: Array, *args: Any, **kwargs: Any) -> Array:
        norm = lambda x: call(x, *args, **kwargs)
        return adapter_stack(z, norm, [lambda x: bottleneck(site, DESIGN, x, x.shape[-1], rank)])

    def forward(site: Site, call: Any, *args: Any, **kwargs: Any) -> Array:
        e = call(*args, **kwargs)
        site.stash["nice"] = p = _nice_parameters(site, "", e.shape[-1], invertible_rank)
        return nice(p, e)

    def inverse(site: Site, call: Any, x: Array, *args: Any, **kwargs: Any) -> Array:
        return call(nice_inverse(site.stash["nice"], x), *args, **kwargs)

    hooks = [Hook(at, around)]
    if invertible:
        hooks.append(Hook(embeddings_at, forward))
        hooks += [] if inverse_at is None else [Hook(inverse_at, inverse)]
    config = dict(
        method="language_adapter",
        rank=rank,
        invertible=invertible,
        invertible_rank=invertible_rank,
        inverse_at=inverse_at,
        at=at,
        embeddings_at=embeddings_at,
        name=name,
    )
    return on_hooks(name, hooks, config)


@register(
    family="adapt",
    paper="Pfeiffer et al., EMNLP 2020",
    mechanism="hooks",
    mergeable=False,
    exact_start=False,
    rate=1e-3,
)
def mad_x(
    rank: int = 16,
    language_rank: int = 48,
    *,
    language: PyTree = None,
    query: PyTree = None,
    split: bool = False,
    invertible: bool = True,
    invertible_rank: int | None = None,
    dropout: float = 0.0,
    at: trees.Pattern = AT,
    embeddings_at: trees.Pattern = EMBEDDINGS,
    segments_at: trees.Pattern = SEGMENTS,
    name: str = "mad_x",
) -> Method:
    """A task adapter that is learned on a language adapter that stays; see the module. Train the head along.

    To use it for another language, `with_language` puts that one's adapter into the delta.

    Args:
      rank: m of the task adapter.
      language_rank, invertible_rank: of the language adapters, as they were made.
      language: the delta of a `language_adapter`, or of a chain in which it has that name; of the documents' language where
        there is a split. None draws one at random (of shapes only: nothing is transferred).
      query: likewise, of the queries' language.
      split: whether tokens of segment 0 have a language adapter of their own. The model is then called with its segments
        (`token_type_ids`).
      invertible: False leaves the NICE part out, which Litschko et al. found better at test time.
      dropout: inside the task adapter, where `apply` is given a `dropout_key`.
      at, embeddings_at: as in `language_adapter`.
      segments_at: pattern of the module that is called with the segments.
      name: the key of its delta in a chain.

    Returns:
      A method on hooks, delta `{norm: {"down", "down_bias", "up", "up_bias", "language_down", ...}, embeddings:
      {"language_f_down", ...}}`, with "query_..." for a split; all but the task adapter's four are fixed. It does not merge.

    Raises:
      ValueError: a rank below 1; at `init`, a language adapter of other modules or sizes, a split of a model that is not
        called with segments.
      PatternError: no module matches.
    """
    _check_ranks(rank=rank, language_rank=language_rank, invertible_rank=invertible_rank)
    if query is not None and not split:
        raise ValueError("query=... without split=True: one language adapter takes all tokens, give it as `language`")
    given = {"language_": language, "query_": query}

    def around(site: Site, call: Any, z: Array, *args: Any, **kwargs: Any) -> Array:
        norm = lambda x: call(x, *args, **kwargs)
        of = lambda prefix, x: bottleneck(_part(site, prefix), DESIGN, x, x.shape[-1], language_rank)

        def languages(x: Array) -> Array:
            own = of("language_", x)
            return _by_segment(site, of("query_", x), own) if split else own

        task = lambda x: bottleneck(site, DESIGN, x, x.shape[-1], rank, dropout)
        return adapter_stack(z, norm, [languages, task])

    def embedded(site: Site, call: Any, *args: Any, **kwargs: Any) -> Array:
        e = call(*args, **kwargs)
        of = lambda prefix: nice(_nice_parameters(site, prefix, e.shape[-1], invertible_rank), e)
        return _by_segment(site, of("query_"), of("language_")) if split else of("language_")

    def start(key: Key[Array, ""], slots: Slots, call: Call) -> Delta:
        out: dict[str, Any] = {}
        for place, named in slots.items():
            drawn = {n: s.start(site_key(key, f"{place}/{n}")) for n, s in named.items()}
            is_task = lambda n: not n.startswith(tuple(given))
            out[place] = {n: x if is_task(n) else trees.Fixed(x) for n, x in drawn.items()}
        return with_language(out, language, query)

    hooks = [Hook(at, around)]
    hooks += [Hook(embeddings_at, embedded)] if invertible else []
    hooks += [Hook(segments_at, _note_segments)] if split else []
    config = dict(
        method="mad_x",
        rank=rank,
        language_rank=language_rank,
        split=split,
        invertible=invertible,
        invertible_rank=invertible_rank,
        dropout=dropout,
        at=at,
        embeddings_at=embeddings_at,
        segments_at=segments_at,
        name=name,
    )
    return on_hooks(name, hooks, config, init=start)


def with_language(delta: Delta, language: PyTree = None, query: PyTree = None) -> Delta:
    """A `mad_x` delta with other language adapters; None leaves what is there. A delta that was trained without a split
    takes a query's adapter too.

    Raises:
      ValueError: a language adapter that lacks what the delta has a place for, or has other sizes.
    """
    out = {place: dict(named) for place, named in delta.items()}
    for prefix, source in (("language_", language), ("query_", query)):
        if source is None:
            continue
        source = trees.unmark(source.get("language_adapter", source))
        for place, named in out.items():
            for label in [n for n in named if n.startswith("language_")]:
                own = label.removeprefix("language_")
                x, want = source.get(place, {}).get(own), jnp.shape(named[label].value)
                if x is None or jnp.shape(x) != want:
                    raise ValueError(
                        f"the {prefix.rstrip('_')} adapter has {'nothing' if x is None else jnp.shape(x)} as {own!r} at "
                        f"{place!r}, where {want} is expected: was it made for this model, with this rank?"
                    )
                named[prefix + own] = trees.Fixed(x)
    return out


def _check_ranks(**ranks: int | None) -> None:
    for label, rank in ranks.items():
        if rank is not None and rank < 1:
            raise ValueError(f"{label} {rank}: a bottleneck is at least 1 wide")
