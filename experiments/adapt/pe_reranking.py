"""Modular re-ranking over languages (Litschko et al., COLING 2022), in small: a language's own delta and a ranking delta.

    python experiments/adapt/pe_reranking.py            all of it: about an hour on two cores
    python experiments/adapt/pe_reranking.py --smoke    every part once in small; writes nothing unless --out is given

Data: the manual pages of sections 2 and 3 in English and in German, French and Russian, from the distribution's packages
`manpages-dev` and `manpages-<language>-dev`. A query is the one-line summary of a page in English, documents are up to three
paragraphs of descriptions in the other language, relevant are those of the same page; the names that a page describes are
taken out of both. 100 pages that all four languages have are for testing, 60 for validation (in English); no training of any
kind sees them.

First stage: MiniLM (all-MiniLM-L6-v2) as it is, cosine of mean-pooled states; its best 8 documents are re-ranked, the rest
stays below in its order. BM25 stands beside it. Re-ranker: MiniLM as a cross-encoder on [CLS] query [SEP] document [SEP],
64 tokens, one logit, binary cross-entropy, 1 relevant to 4 others (3 of them MiniLM's best), English alone: 6,000 pairs.

    full         all parameters, zero-shot in the other languages
    RM, RA       a ranking mask (113,040 entries: k) or a ranking adapter (r = 24: as many), trained on top of English's
    LM, LA       a language mask or adapter (r = 96 with NICE; as many entries), by masked language modelling on the language's
                 pages; "dlang" is the documents' language, "wrong" another one; "split" gives the query's
                 tokens English's
    NICE is trained with and left out at test time, as in the paper.

Masks are found as the paper finds them: train densely, take the largest changes, start anew. The prediction head of the
language models is learned first, on English with MiniLM held fixed (MiniLM comes without one). For each of full, RM and RA
one rate out of three by the first seed's MAP on the English validation pages; then five seeds, each tested once. Language
deltas are trained once.

This is the second run. In the first a ranking mask was found at the rate at which it was then trained, which is too large for
all parameters: it learned next to nothing, and was 2.2 points of MAP under full fine-tuning. On validation a mask found at
1e-4, full fine-tuning's best rate, is as good as that, so the dense training has this rate now. Full fine-tuning, RM and RA
had two rates. The first run's test pages are left out; these are others.

Small about it: the model, 300 updates for ranking, 100 for a language, and MiniLM knows English alone: its vocabulary cuts
the other languages into pieces, Russian into letters.

Stated before running, each to be reported as holding or not, on MAP as the mean over the three languages:
  1. RM + LM(dlang) is at least as good as full fine-tuning.
  2. RA + LA(dlang) is at least as good as full fine-tuning.
  3. The right language's mask is better than a wrong one's, and so is its adapter.
  4. What RM + LM(dlang) gains on full fine-tuning is largest in Russian, of which MiniLM knows least.
  5. RM + LM(dlang) is over BM25 and over MiniLM's own ranking.
"""

import dataclasses
import gzip
import re
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import study
from pretraining import kept

from jaxpeft import adapt, chain, data, full, head, language_adapter, mad_x, mask_updates, train, trees
from jaxpeft.adapt.mad_x import with_language
from jaxpeft.adapt.sparse_fine_tuning import compose, diff, lt_select
from jaxpeft.data.assets import apt_download, data_tar
from jaxpeft.data.manuals import plain_text
from jaxpeft.models import Encoder, SequenceClassifier, load_model, mean_pool
from jaxpeft.train.ranking import average_precision, bm25, cut_pair, order_of, pointwise_loss, reciprocal_rank, reranked
from jaxpeft.updates import anchor_l1

DESCRIPTION = {"en": "DESCRIPTION", "de": "BESCHREIBUNG", "fr": "DESCRIPTION", "ru": "ОПИСАНИЕ"}
LANGUAGES = ("de", "fr", "ru")
NORMS = "!**/*norm/*"


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    seen: int = 100  # pages that the first run was tested on: now neither for training nor for testing
    validated: int = 60
    tested: int = 100
    paragraphs: int = 3
    candidates: int = 8
    length: int = 64
    query_length: int = 16
    rank: int = 24
    language_rank: int = 96
    ranking: study.Budget = dataclasses.field(default_factory=lambda: study.Budget(steps=300, batch=4, rates=()))
    dense_steps: int = 150
    dense_rate: float = 1e-4
    rates: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("full", (5e-5, 1e-4, 2e-4)),
        ("RM", (1e-4, 3e-4, 1e-3)),
        ("RA", (1e-3, 3e-3, 1e-2)),
    )
    language: study.Budget = dataclasses.field(default_factory=lambda: study.Budget(steps=100, batch=16, rates=()))
    language_dense_steps: int = 50
    mask_rate: float = 3e-4
    adapter_rate: float = 1e-3
    head_steps: int = 200
    masked: int = 9  # tokens of a window
    windows: int = 3000
    l1: float = 0.1
    seeds: int = 5
    pages: int = 0  # of each language; 0 for all
    layers: int = 6


SMOKE = Setup(
    seen=0,
    validated=4,
    tested=4,
    candidates=3,
    length=24,
    rank=2,
    language_rank=2,
    ranking=study.Budget(steps=2, batch=2, rates=()),
    dense_steps=2,
    rates=(("full", (1e-4,)), ("RM", (1e-4,)), ("RA", (1e-3,))),
    language=study.Budget(steps=2, batch=2, rates=()),
    language_dense_steps=2,
    head_steps=2,
    masked=3,
    windows=8,
    seeds=1,
    pages=60,
    layers=1,
)


# ------------------------------------------------------------------------------------------------------------- the data


class Page(NamedTuple):
    """One manual page without the names that it describes."""

    summary: str
    paragraphs: list[str]


def package_pages(language: str, most: int) -> tuple[dict[str, str], str]:
    """Page name to text of sections 2 and 3, and the package's file name; `most` pages, or all where it is 0."""
    package = "manpages-dev" if language == "en" else f"manpages-{language}-dev"
    downloads = data.cache_dir() / "downloads"
    found = sorted(downloads.glob(f"{package}_*.deb"))
    archive = found[-1] if found else apt_download(package, package, downloads, f"put {package}_*.deb into {downloads}")
    out = {}
    with data_tar(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as members:
        for member in members:
            path = PurePosixPath(member.name)
            if path.parent.name in ("man2", "man3") and path.suffix == ".gz" and member.isfile():
                source = members.extractfile(member)
                assert source is not None
                text = plain_text(gzip.decompress(source.read()).decode("utf-8", "replace"))
                if text:  # a page that only points to another has none
                    out[path.stem] = text
                if len(out) == most:
                    break
    return out, archive.name


def page_of(name: str, text: str, heading: str, s: Setup) -> Page | None:
    """A page's summary and the first paragraphs of its description; None where it has too little of either."""
    paragraphs = text.split("\n\n")
    if " - " not in paragraphs[0]:
        return None
    names, summary = paragraphs[0].split(" - ", 1)
    described = {*re.findall(r"\w+", names)[1:], name.rsplit(".", 1)[0]}
    any_name = "|".join(re.escape(n) for n in sorted(described, key=len, reverse=True))
    nameless = lambda x: " ".join(re.sub(rf"\b({any_name})\b(\(\d?\))?", " ", x, flags=re.IGNORECASE).split())
    at = next((i for i, p in enumerate(paragraphs) if p.startswith(heading)), None)
    if at is None:
        return None
    body = [nameless(p.removeprefix(heading)) for p in paragraphs[at:]]
    body = [p for p in body if len(p.split()) >= 12][: s.paragraphs]
    summary = nameless(summary)
    return Page(summary, body) if len(summary.split()) >= 2 and body else None


class Collection(NamedTuple):
    """Queries and documents by page.

    Attributes:
      queries: English summaries.
      documents: paragraphs.
      relevant: (queries, documents).
    """

    queries: list[str]
    documents: list[str]
    relevant: np.ndarray


def collection(names: list[str], english: Mapping[str, Page], pages: Mapping[str, Page]) -> Collection:
    owners = [n for n in names for _ in pages[n].paragraphs]
    documents = [p for n in names for p in pages[n].paragraphs]
    relevant = np.array([[n == o for o in owners] for n in names])
    return Collection([english[n].summary for n in names], documents, relevant)


class Queries(NamedTuple):
    """Queries with c candidates each: ids, mask and segments (n, c, t), which of them are relevant (n, c), weights (n,)."""

    input_ids: Any
    attention_mask: Any
    token_type_ids: Any
    relevant: Any
    weight: Any


class Masked(NamedTuple):
    """Windows of text (n, t) with m masked tokens each: their positions and what stood there (n, m), weights (n,)."""

    input_ids: Any
    attention_mask: Any
    positions: Any
    targets: Any
    weight: Any


class Text:
    """MiniLM's tokenizer and what it makes of texts."""

    def __init__(self, s: Setup):
        self.s, self.tokenizer = s, data.Tokenizer(data.model_folder("all-MiniLM-L6-v2"))
        self.special = self.tokenizer.special

    def ids(self, texts: list[str]) -> list[list[int]]:
        return [x[1:-1].tolist() for x in self.tokenizer.encode(texts, 512)]

    def pairs(self, seen: Collection, chosen: np.ndarray) -> Queries:
        """The candidates `chosen` (n, c) of each query."""
        queries = [q[: self.s.query_length] for q in self.ids(seen.queries)]
        documents = self.ids(seen.documents)
        ids = np.full((*chosen.shape, self.s.length), self.tokenizer.pad_id, np.int32)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for (i, j), d in np.ndenumerate(chosen):
            own, segments = cut_pair(
                queries[i], documents[d], self.s.length, cls=self.special["cls"], sep=self.special["sep"]
            )
            ids[i, j, : len(own)], mask[i, j, : len(own)], types[i, j, : len(own)] = own, 1, segments
        relevant = np.take_along_axis(seen.relevant, chosen, axis=1).astype(np.int32)
        return Queries(*map(jnp.asarray, (ids, mask, types, relevant, np.ones(len(chosen), np.float32))))

    def windows(self, texts: list[str], seed: int) -> Masked:
        """Random windows with 9 of 62 tokens to be predicted: 8 of 10 are hidden, 1 is another one, 1 stays."""
        s, rng = self.s, np.random.default_rng(seed)
        stream = np.concatenate(self.ids(texts))
        at = rng.integers(0, len(stream) - s.length + 2, s.windows)
        ids = np.empty((s.windows, s.length), np.int32)
        ids[:, 0], ids[:, -1] = self.special["cls"], self.special["sep"]
        ids[:, 1:-1] = stream[at[:, None] + np.arange(s.length - 2)]
        positions = 1 + rng.permuted(np.tile(np.arange(s.length - 2), (s.windows, 1)), axis=1)[:, : s.masked]
        targets = np.take_along_axis(ids, positions, 1)
        draw = rng.random(positions.shape)
        other = rng.integers(1000, self.tokenizer.vocab_size, positions.shape)
        shown = np.where(draw < 0.8, self.special["mask"], np.where(draw < 0.9, other, targets))
        np.put_along_axis(ids, positions, shown, 1)
        return Masked(*map(jnp.asarray, (ids, np.ones_like(ids), positions, targets, np.ones(s.windows, np.float32))))


# ------------------------------------------------------------------------------------------------------------ the models


class Predictions(nn.Module):
    """MiniLM with BERT's prediction head: logits (b, m, words) of the tokens at `positions`."""

    config: Any

    @nn.compact
    def __call__(self, ids: Any, mask: Any, positions: Any) -> Any:
        hidden = Encoder(self.config, name="backbone")(ids, mask)
        x = jnp.take_along_axis(hidden, positions[..., None], axis=1)
        x = nn.LayerNorm(name="predictions_norm")(nn.gelu(nn.Dense(self.config.width, name="predictions")(x)))
        return nn.Dense(self.config.vocab, name="decoder")(x)


HEAD_OF_LANGUAGE = "**/predictions*/*"


def ranking_task(model: Any) -> tuple[Callable[..., Any], train.Task]:
    """The cross-encoder on (n, c, t), and its loss."""

    def apply(params: Any, ids: Any, mask: Any, types: Any) -> Any:
        flat = lambda x: x.reshape(-1, x.shape[-1])
        return model.apply(params, flat(ids), flat(mask), flat(types)).reshape(ids.shape[:2])

    def forward(apply: Any, batch: Any, key: Any) -> Any:
        return apply(batch.input_ids, batch.attention_mask, batch.token_type_ids, dropout_key=key)

    return apply, train.Task(forward, lambda scores, batch: pointwise_loss(scores, batch.relevant).mean(-1))


def language_task() -> train.Task:
    def forward(apply: Any, batch: Any, key: Any) -> Any:
        return apply(batch.input_ids, batch.attention_mask, batch.positions, dropout_key=key)

    def loss(logits: Any, batch: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch.targets).mean(-1)

    return train.Task(forward, loss)


def rows_for(examples: Any, steps: int, budget: study.Budget, seed: int) -> np.ndarray:
    return study.rows_of(len(examples.weight), steps, budget.batch, seed)


def finished(bad: Any, losses: Any, what: str) -> None:
    if int(bad) >= 0:
        print(f"{what}: diverged at step {int(bad)}", flush=True)
    else:
        print(f"{what}: loss {float(losses[:10].mean()):.3f} to {float(losses[-20:].mean()):.3f}", flush=True)


def lottery(apply_fn: Any, task: train.Task, at: Any, along: Any, budget: study.Budget, dense_steps: int, l1: float):
    """LT-SFT as one program: `(params, k, rates, seed, examples) -> (sparse delta, head's leaves, losses)`; one rate for
    the dense training and one for the sparse.

    The second training masks updates of dense differences, which compiles once for all masks; it is what `sparse` does.
    """

    def phase(start: Any, mask: Any, params: Any, rate: Any, examples: Any, rows: Any) -> Any:
        optimiser = optax.chain(study.adam(budget.warmup)(rate, rows.shape[0]), mask_updates(mask))

        def loss(moving: Any, batch: Any) -> Any:
            own = trees.replace_leaves(params, moving)
            scores = task.forward(lambda *x, dropout_key=None: apply_fn(own, *x), batch, None)
            return task.loss(scores, batch).mean() + l1 / trees.count(params) * anchor_l1(moving, start)

        def one(state: Any, rows: Any) -> Any:
            moving, inner = state
            value, grads = jax.value_and_grad(loss)(moving, jax.tree.map(lambda x: x[rows], examples))
            updates, inner = optimiser.update(grads, inner, moving)
            return (optax.apply_updates(moving, updates), inner), value

        (moving, _), losses = jax.lax.scan(one, (start, optimiser.init(start)), rows)
        return moving, losses

    @jax.jit
    def run(params: Any, k: Any, rates: Any, examples: Any, first: Any, second: Any) -> Any:
        leaves = trees.by_path(params)
        body = {p: leaves[p] for p in trees.matches(at, leaves)}
        start = {**body, **{p: leaves[p] for p in trees.matches(along, leaves)}}
        everything = {p: jnp.ones((1,) * x.ndim) for p, x in start.items()}
        dense, _ = phase(start, everything, params, rates[0], examples, first)
        mask = lt_select(body, {p: dense[p] for p in body}, k)
        moving, losses = phase(start, {**everything, **mask}, params, rates[1], examples, second)
        return {p: (moving[p], mask[p]) for p in body}, {p: moving[p] for p in start if p not in body}, losses

    def found(params: Any, k: int, rates: tuple[float, float], seed: int, examples: Any) -> Any:
        rows = [rows_for(examples, n, budget, seed + i) for i, n in enumerate((dense_steps, budget.steps))]
        body, own_head, losses = run(params, k, rates, examples, *rows)
        leaves = trees.by_path(params)
        after = {p: x for p, (x, _) in body.items()}
        delta = diff({p: leaves[p] for p in after}, after, {p: m for p, (_, m) in body.items()})
        return delta, own_head, losses

    return found


# --------------------------------------------------------------------------------------------------------- the experiment


class Lab:
    """Everything that the parts of the experiment share."""

    def __init__(self, s: Setup, keep: bool):
        self.s, self.text = s, Text(s)
        texts, self.packages = {}, {}
        for language in DESCRIPTION:
            texts[language], self.packages[language] = package_pages(language, s.pages)
        self.pages = {
            k: {n: p for n, t in found.items() if (p := page_of(n, t, DESCRIPTION[k], s))} for k, found in texts.items()
        }
        rng = np.random.default_rng(0)
        shared = sorted(set.intersection(*(set(p) for p in self.pages.values())))
        held = list(rng.permutation(shared)[: s.seen + s.validated + s.tested])
        self.validation_names, self.test_names = held[s.seen : s.seen + s.validated], held[s.seen + s.validated :]
        rest = [n for n in sorted(self.pages["en"]) if n not in held]
        self.train_names = rest
        free = {k: [t for n, t in sorted(found.items()) if n not in held] for k, found in texts.items()}
        self.windows = {k: self.text.windows(found, i) for i, (k, found) in enumerate(free.items())}
        folder = data.model_folder("all-MiniLM-L6-v2")
        encoder, self.encoder_params = load_model(folder)
        self.encoder = encoder
        config = dataclasses.replace(encoder.config, layers=s.layers, pooler=False)
        own = {n: x for n, x in self.encoder_params["params"].items() if n != "pooler"}
        self.backbone = {n: x for n, x in own.items() if not n.startswith("layers_") or int(n[7:]) < s.layers}
        self.model = SequenceClassifier(dataclasses.replace(config, narrow=True), 1, "first")
        self.apply, self.task = ranking_task(self.model)
        ids = jnp.ones((1, 4), jnp.int32)
        fresh = jax.jit(self.model.init)(jax.random.key(0), ids)["params"]["head"]
        self.params = {"params": {"backbone": self.backbone, "head": fresh}}
        self.predictions = Predictions(config)
        self.language_params = self._language_model(keep)

    def _language_model(self, keep: bool) -> Any:
        """MiniLM with a prediction head that was learned on English, the encoder and the words held fixed."""
        ids = jnp.ones((1, 4), jnp.int32)
        drawn = jax.jit(self.predictions.init)(jax.random.key(1), ids, ids, ids[:, :1])["params"]
        words = self.backbone["embeddings"]["word"]["embedding"]
        decoder = {"kernel": words.T, "bias": jnp.zeros(words.shape[0])}
        params = {"params": {**drawn, "backbone": self.backbone, "decoder": decoder}}
        budget = dataclasses.replace(self.s.language, steps=self.s.head_steps)
        part = lambda p: {n: x for n, x in trees.by_path(p).items() if trees.is_match(HEAD_OF_LANGUAGE, n)}

        def learned(start: Any) -> Any:
            method = full(HEAD_OF_LANGUAGE)
            delta = self.trained(
                self.predictions.apply, language_task(), method, params, budget, 1e-3, 0, "en", "predictions"
            )
            return {p: d["value"] for p, d in delta.items()}

        what = {
            **dataclasses.asdict(budget),
            "length": self.s.length,
            "layers": self.s.layers,
            "packages": self.packages,
        }
        return trees.replace_leaves(params, kept("minilm-predictions", what, part(params), learned, keep))

    def trained(
        self,
        apply: Any,
        task: Any,
        method: Any,
        params: Any,
        budget: Any,
        rate: float,
        seed: int,
        language: str,
        name: str,
    ) -> Any:
        """A delta trained on a language's windows."""
        examples = self.windows[language]
        adapted = adapt(apply, method)
        problem = study.Problem(apply, params, {"train": examples}, task)
        run = study.trainer(adapted, problem, study.Arm(method), budget)
        few = jax.tree.map(lambda x: x[:2], examples)
        delta = jax.jit(adapted.init)(jax.random.key(seed), params, few.input_ids, few.attention_mask, few.positions)
        delta, bad, losses = run(params, delta, rate, seed, examples, rows_for(examples, budget.steps, budget, seed))
        finished(bad, losses, f"{name}, {language}")
        return delta

    # ---------------------------------------------------------------------------------------------------- languages

    def language_deltas(self, k: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Masks and adapters of all languages."""
        s, apply = self.s, self.predictions.apply
        at = ["**/backbone/**", NORMS]
        find = lottery(apply, language_task(), at, HEAD_OF_LANGUAGE, s.language, s.language_dense_steps, s.l1)
        masks, adapters = {}, {}
        method = chain(language_adapter(s.language_rank, inverse_at="**/decoder"), full(HEAD_OF_LANGUAGE))
        for language in DESCRIPTION:
            masks[language], _, losses = find(self.language_params, k, (s.mask_rate,) * 2, 0, self.windows[language])
            finished(-1, losses, f"language mask, {language}")
            delta = self.trained(
                apply, language_task(), method, self.language_params, s.language, s.adapter_rate, 0, language, "adapter"
            )
            adapters[language] = delta["language_adapter"]
        return masks, adapters

    # -------------------------------------------------------------------------------------------------- first stage

    def cosine(self, seen: Collection) -> np.ndarray:
        """MiniLM's similarity of every query and document."""

        @jax.jit
        def encode(params: Any, ids: Any, mask: Any) -> Any:
            x = mean_pool(self.encoder.apply(params, ids, mask), mask)
            return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

        def all_of(texts: list[str], size: int = 32) -> np.ndarray:
            tokens = self.text.tokenizer.encode(texts, self.s.length)
            out = []
            for start in range(0, len(texts), size):
                rows = np.arange(start, start + size) % len(texts)
                ids, mask = tokens.padded(rows, self.s.length, self.text.tokenizer.pad_id)
                out.append(np.asarray(encode(self.encoder_params, ids, mask)))
            return np.concatenate(out)[: len(texts)]

        return all_of(seen.queries) @ all_of(seen.documents).T

    def training_pairs(self) -> Queries:
        """For each English paragraph of the training pages: it, 3 others that MiniLM finds near its query, 1 random."""
        seen = collection(self.train_names, self.pages["en"], self.pages["en"])
        order = np.asarray(order_of(np.where(seen.relevant, -np.inf, self.cosine(seen))))
        rng = np.random.default_rng(1)
        queries, chosen = [], []
        for q, d in zip(*np.nonzero(seen.relevant)):
            near = rng.choice(order[q, : min(20, order.shape[1] - 1)], 3, replace=False)
            queries.append(q)
            chosen.append([d, *near, rng.choice(order[q, : -int(seen.relevant[q].sum())])])
        of = Collection([seen.queries[q] for q in queries], seen.documents, seen.relevant[queries])
        return self.text.pairs(of, np.array(chosen))

    def held_out(self, names: list[str], language: str) -> "HeldOut":
        seen = collection(names, self.pages["en"], self.pages[language])
        first = self.cosine(seen)
        words = lambda x: re.findall(r"\w+", x.lower())
        lexical = bm25([words(q) for q in seen.queries], [words(d) for d in seen.documents])
        best = np.asarray(order_of(first))[:, : self.s.candidates]
        return HeldOut(seen.relevant, first, lexical, self.text.pairs(seen, best))


class HeldOut(NamedTuple):
    """Queries to be ranked: relevance, the two first rankings (n, documents), and the candidates of MiniLM's."""

    relevant: np.ndarray
    first: np.ndarray
    lexical: np.ndarray
    candidates: Queries

    def measures(self, scores: Any = None, *, lexical: bool = False) -> dict[str, np.ndarray]:
        """AP and RR of each query, re-ranked by the scores of its candidates."""
        first = self.lexical if lexical else self.first
        order = np.asarray(order_of(first) if scores is None else reranked(first, scores))
        hits = np.take_along_axis(self.relevant, order, axis=1)
        down = -jnp.broadcast_to(jnp.arange(hits.shape[1]), hits.shape)
        return {"ap": np.asarray(average_precision(down, hits)), "rr": np.asarray(reciprocal_rank(down, hits))}


def scorer(apply: Callable[..., Any], size: int = 8) -> Callable[..., Any]:
    """`(params, delta, queries) -> (n, c)`, a few queries at a time."""

    @jax.jit
    def run(params: Any, delta: Any, queries: Queries) -> Any:
        n = queries.weight.shape[0]
        cut = lambda x: jnp.concatenate([x, x[: -n % size]]).reshape(-1, size, *x.shape[1:])
        one = lambda b: apply(params, delta, b.input_ids, b.attention_mask, b.token_type_ids)
        return jax.lax.map(one, jax.tree.map(cut, queries)).reshape(-1, queries.relevant.shape[1])[:n]

    return run


def wrong(language: str) -> str:
    """A language that is neither the documents' nor the queries'."""
    return LANGUAGES[(LANGUAGES.index(language) + 1) % len(LANGUAGES)]


def rankers(lab: Lab, masks: Any, adapters: Any, k: int) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Arm -> (`(rate, seed, examples) -> what was learned`, `learned -> {configuration: language -> scores}`)."""
    s, apply, params = lab.s, lab.apply, lab.params
    plain = scorer(lambda p, _, *x: apply(p, *x))
    few = jnp.ones((1, 2, 4), jnp.int32)

    def with_head(params: Any, leaves: Any) -> Any:
        return trees.replace_leaves(params, leaves)

    # all parameters
    everything = adapt(apply, full())
    problem = study.Problem(apply, params, {}, lab.task)
    fit_all = study.trainer(everything, problem, study.Arm(full()), s.ranking)

    def learn_all(rate: float, seed: int, examples: Any) -> Any:
        delta = everything.init(jax.random.key(seed), params, few, few, few * 0)
        rows = rows_for(examples, s.ranking.steps, s.ranking, seed)
        delta, bad, losses = fit_all(params, delta, rate, seed, examples, rows)
        finished(bad, losses, f"full, rate {rate:g}, seed {seed}")
        return everything.merge(params, delta)

    # a mask, on top of English's
    on_english = compose(params, masks["en"])
    find = lottery(apply, lab.task, "**/backbone/**", "**/head/*", s.ranking, s.dense_steps, 0.0)

    def learn_mask(rate: float, seed: int, examples: Any) -> Any:
        delta, own_head, losses = find(on_english, k, (s.dense_rate, rate), seed, examples)
        finished(-1, losses, f"ranking mask, rate {rate:g}, seed {seed}")
        return delta, own_head

    def mask_scores(learned: Any, *languages: str) -> Callable[..., Any]:
        delta, own_head = learned
        whole = with_head(compose(params, *(masks[x] for x in languages), delta), own_head)
        return lambda queries: plain(whole, {}, queries)

    # an adapter, on top of English's
    options = dict(language_rank=s.language_rank, name="mad_x")
    trained_as = chain(mad_x(s.rank, language=adapters["en"], **options), head())
    stack = adapt(apply, trained_as)
    fit_adapter = study.trainer(stack, problem, study.Arm(trained_as), s.ranking)
    used = {
        "one": scorer(adapt(apply, chain(mad_x(s.rank, invertible=False, **options), head())).apply),
        "split": scorer(adapt(apply, chain(mad_x(s.rank, invertible=False, split=True, **options), head())).apply),
    }

    def learn_adapter(rate: float, seed: int, examples: Any) -> Any:
        delta = stack.init(jax.random.key(seed), params, few, few, few * 0)
        rows = rows_for(examples, s.ranking.steps, s.ranking, seed)
        delta, bad, losses = fit_adapter(params, delta, rate, seed, examples, rows)
        finished(bad, losses, f"ranking adapter, rate {rate:g}, seed {seed}")
        return delta

    def adapter_scores(learned: Any, language: str, query: str | None = None, how: str = "one") -> Callable[..., Any]:
        own = with_language(learned["mad_x"], adapters[language], None if query is None else adapters[query])
        return lambda queries: used[how](params, {**learned, "mad_x": own}, queries)

    return {
        "full": (learn_all, lambda got: {"full": lambda x: lambda q: plain(got, {}, q)}),
        "RM": (
            learn_mask,
            lambda got: {
                "RM": lambda x: mask_scores(got),
                "RM + LM(en)": lambda x: mask_scores(got, "en"),
                "RM + LM(dlang)": lambda x: mask_scores(got, x),
                "RM + LM(wrong)": lambda x: mask_scores(got, wrong(x)),
            },
        ),
        "RA": (
            learn_adapter,
            lambda got: {
                "RA + LA(en)": lambda x: adapter_scores(got, "en"),
                "RA + LA(dlang)": lambda x: adapter_scores(got, x),
                "RA + LA(wrong)": lambda x: adapter_scores(got, wrong(x)),
                "RA + LA(split)": lambda x: adapter_scores(got, x, "en", "split"),
            },
        ),
    }


def bootstrap(a: np.ndarray, b: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the mean of a - b, in points, over queries drawn anew; (languages, queries) of seed means."""
    d, rng = 100 * (a - b).mean(0), np.random.default_rng(0)
    means = d[rng.integers(0, len(d), (draws, len(d)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def main() -> None:
    args = study.arguments("Modular re-ranking in small; see the file's first lines.")
    s, began = SMOKE if args.smoke else Setup(), time.perf_counter()
    lab = Lab(s, keep=not args.smoke)
    own = adapt(lab.predictions.apply, language_adapter(s.language_rank, inverse_at="**/decoder"))
    ids = jnp.ones((1, 4), jnp.int32)
    k_language = trees.count(jax.eval_shape(own.init, jax.random.key(0), lab.language_params, ids, ids, ids[:, :1]))
    width = lab.encoder.config.width
    k_ranking = s.layers * (2 * width * s.rank + s.rank + width)
    print(f"language deltas of {k_language:,}, ranking deltas of {k_ranking:,} parameters", flush=True)
    masks, adapters = lab.language_deltas(k_language)
    examples = lab.training_pairs()
    validation = lab.held_out(lab.validation_names, "en")
    tests = {x: lab.held_out(lab.test_names, x) for x in LANGUAGES}
    print(f"{len(examples.weight)} training queries of 5 pairs, {time.perf_counter() - began:.0f} s", flush=True)

    found: dict[str, list[dict[str, dict[str, np.ndarray]]]] = {}  # configuration -> seed -> language -> measures
    chosen, tried = {}, {}
    arms = rankers(lab, masks, adapters, k_ranking)
    for arm, rates in s.rates:
        learn, configurations = arms[arm]
        name = {"full": "full", "RM": "RM + LM(en)", "RA": "RA + LA(en)"}[arm]
        on_validation = lambda got: configurations(got)[name]("en")(validation.candidates)
        first = {r: learn(r, 0, examples) for r in rates}
        tried[arm] = {r: float(validation.measures(on_validation(got))["ap"].mean()) for r, got in first.items()}
        chosen[arm] = max(tried[arm], key=tried[arm].__getitem__)
        print(f"{arm}: MAP on English validation {tried[arm]}", flush=True)
        for seed in range(s.seeds):
            got = learn(chosen[arm], seed, examples) if seed else first[chosen[arm]]
            for label, of in configurations(got).items():
                scores = {x: t.measures(of(x)(t.candidates)) for x, t in tests.items()}
                found.setdefault(label, []).append(scores)

    def row(label: str, seeds: list[dict[str, dict[str, np.ndarray]]], trained: int) -> dict[str, Any]:
        test = [statistics.mean(float(m["ap"].mean()) for m in each.values()) for each in seeds]
        out = {"method": label, "trained": trained, "test": test, "mean": statistics.mean(test)}
        out["std"] = statistics.stdev(test) if len(test) > 1 else 0.0
        for x in LANGUAGES:
            out[f"map_{x}"] = statistics.mean(float(each[x]["ap"].mean()) for each in seeds)
        out["mrr"] = statistics.mean(float(m["rr"].mean()) for each in seeds for m in each.values())
        print(
            f"{label:24} MAP {100 * out['mean']:.1f} ± {100 * out['std']:.1f}  MRR {100 * out['mrr']:.1f}", flush=True
        )
        return out

    base = {
        "BM25": [{x: t.measures(lexical=True) for x, t in tests.items()}] * s.seeds,
        "MiniLM": [{x: t.measures() for x, t in tests.items()}] * s.seeds,
    }
    sizes = {"full": trees.count(lab.params)}
    every = {**base, **found}
    rows = [row(n, seeds, sizes.get(n, 0 if n in base else k_ranking + width + 1)) for n, seeds in every.items()]
    by = {r["method"]: r for r in rows}
    of = lambda n: np.mean([[each[x]["ap"] for x in LANGUAGES] for each in every[n]], axis=0)

    def better(text: str, *pairs: tuple[str, str], strict: bool = False) -> dict[str, str]:
        parts, holds = [], True
        for a, b in pairs:
            mean, half = study.difference(by[a], by[b])
            low, high = bootstrap(of(a), of(b))
            parts.append(f"{a} - {b}: {mean:+.2f} ± {half:.2f} over seeds, [{low:+.2f}, {high:+.2f}] over queries")
            holds &= mean > 0 if strict else mean >= 0
        return record.claim(text, holds, "; ".join(parts) + " points of MAP")

    gains = {x: 100 * (by["RM + LM(dlang)"][f"map_{x}"] - by["full"][f"map_{x}"]) for x in LANGUAGES}
    claims = [
        better("RM + LM(dlang) is at least as good as full fine-tuning", ("RM + LM(dlang)", "full")),
        better("RA + LA(dlang) is at least as good as full fine-tuning", ("RA + LA(dlang)", "full")),
        better(
            "The right language's mask and adapter are better than a wrong one's",
            ("RM + LM(dlang)", "RM + LM(wrong)"),
            ("RA + LA(dlang)", "RA + LA(wrong)"),
            strict=True,
        ),
        record.claim(
            "What RM + LM(dlang) gains on full fine-tuning is largest in Russian",
            max(gains, key=gains.__getitem__) == "ru",
            ", ".join(f"{x} {g:+.2f}" for x, g in gains.items()) + " points of MAP",
        ),
        better(
            "RM + LM(dlang) is over BM25 and over MiniLM's own ranking",
            ("RM + LM(dlang)", "BM25"),
            ("RM + LM(dlang)", "MiniLM"),
            strict=True,
        ),
    ]
    study.finish(
        "pe-reranking",
        args,
        paper="Modular re-ranking, Litschko et al., COLING 2022",
        setup=s,
        rows=rows,
        claims=claims,
        began=began,
        packages=lab.packages,
        pages={x: len(p) for x, p in lab.pages.items()},
        rates=chosen,
        validation_map=tried,
        parameters={"language": k_language, "ranking": k_ranking},
    )


if __name__ == "__main__":
    main()
