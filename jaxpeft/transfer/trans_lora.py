"""Trans-LoRA: an adapter moved to another base almost without data (Wang et al., NeurIPS 2024, arXiv:2405.17258).

An adapter θ_s of a source base M_s is of no use on a target base M_t, and its data D are gone but for 5 seeds. A new one,
θ_t, is distilled from M_s + θ_s on inputs that M_t itself writes after the seeds. A discriminator φ, another adapter
trained beside θ_s while D was there, keeps only those that it cannot tell from D's.

    φ* = argmax E_{x ∈ D} log p_φ("yes" | t(x)) + E_{x ∈ X⁻} log p_φ("no" | t(x))       X⁻ written by M_s, t(x) a question
    D_syn = {x ~ M_t(· | seeds) : p_φ*("yes" | t(x)) > p_φ*("no" | t(x))},    |D_syn| = |D|
    θ_t = argmin H(M_t + θ_t, M_s + θ_s) over the completions of D_syn's inputs         hard: of the teacher's own tokens ŷ

φ* has log-odds log p_D(x) - log p_syn(x) where both kinds are equally many. The filter is hard: what passes has p_syn cut to
{p_D > p_syn}, which is not p_D. Generator and teacher are different models, and answers of the generator are not used.

Any adapter will do: it enters by `student_apply(base, adapter, ids, mask)` alone, for instance of `adapt(...).apply`, and
θ_t need not be of θ_s's kind. Letters: n examples, t columns, k of them answered, V vocabulary, m candidates, d features.

No reference code was found (the paper announced some). Read into the paper: H hard by default, since families of models do not
share tokens (soft where they do); a sample ends at the next number; copies of seeds and of samples are left out and
counted; where the tries end first, those of the highest log p(yes) - log p(no) fill up.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxpeft import trees
from jaxpeft.distillation import kl_loss, masked_mean
from jaxpeft.updates import descend

__all__ = [
    "Answered",
    "Kept",
    "Synthetic",
    "accept",
    "answered",
    "cut_continuation",
    "discriminator_loss",
    "discriminator_prompt",
    "fit_discriminator",
    "generation_prompt",
    "log_odds",
    "rejection_sample",
    "seq_kd_loss",
    "soft_kd_loss",
    "transfer_adapter",
]


class Kept(NamedTuple):
    """What remains of a source task once its data are gone."""

    adapter: PyTree  # θ_s
    discriminator: PyTree  # φ*, an adapter of M_s, or of any small model
    seeds: tuple[str, ...]  # 5 inputs of D
    size: int  # |D|


# -------------------------------------------------------------------------------------------------------- discriminator


def log_odds(logits: Float[Array, "n 2"]) -> Float[Array, "n"]:
    """log p(yes) - log p(no) of logits (yes, no), the probabilities being over these two alone.

    Raises:
      ValueError: logits of another shape.
    """
    logits = jnp.asarray(logits)
    if logits.ndim != 2 or logits.shape[1] != 2:
        raise ValueError(f"logits of shape {logits.shape}: expected (n, 2), of yes and of no")
    return logits[:, 0] - logits[:, 1]


def accept(logits: Float[Array, "n 2"]) -> Bool[Array, "n"]:
    """Whether each candidate passes: yes strictly over no. Logits and errors as in `log_odds`."""
    return log_odds(logits) > 0


def discriminator_loss(logits: Float[Array, "n 2"], is_real: Bool[Array, "n"]) -> Float[Array, ""]:
    """Mean binary cross-entropy of the log-odds: minus half of φ*'s objective where both kinds are equally many.

    With other numbers of them the best log-odds move by log(real / synthetic), and with them what passes.

    Raises:
      ValueError: shapes that do not agree.
    """
    odds, is_real = log_odds(logits), jnp.asarray(is_real)
    if is_real.shape != odds.shape:
        raise ValueError(f"is_real of shape {is_real.shape} for {odds.shape[0]} examples: expected ({odds.shape[0]},)")
    return optax.sigmoid_binary_cross_entropy(odds, is_real.astype(odds.dtype)).mean()


def fit_discriminator(
    apply: Callable[[PyTree, PyTree, PyTree], Float[Array, "b 2"]],
    base: PyTree,
    adapter0: PyTree,
    real: PyTree,
    synthetic: PyTree,
    optimiser: optax.GradientTransformation,
    steps: int,
    key: Key[Array, ""],
    *,
    batch: int = 8,
) -> tuple[PyTree, Float[Array, "steps"]]:
    """φ* (A3 of the paper): an adapter that tells D's inputs from synthetic ones.

    Args:
      apply: `(base, adapter, inputs) -> (b, 2)` logits of yes and of no after the question about each input; static.
      base: frozen.
      adapter0: the adapter's start.
      real, synthetic: inputs, leaves (n, ...) and (m, ...); n = m in the paper. D's own, not the seeds alone.
      optimiser: optax; the paper's is AdamW without decay, linearly falling. It may hold traced numbers.
      steps, batch: of the scan; `batch` at most n + m.
      key: of the order of the examples.

    Returns:
      The adapter and the loss of each step.

    Raises:
      ValueError: no examples, fewer than a batch, or no steps.
    """
    sizes = [_count(x) for x in (real, synthetic)]
    inputs = jax.tree.map(lambda *x: jnp.concatenate(x), real, synthetic)
    is_real = jnp.arange(sum(sizes)) < sizes[0]

    def loss(adapter: PyTree, rows: Array) -> Array:
        return discriminator_loss(apply(base, adapter, jax.tree.map(lambda x: x[rows], inputs)), is_real[rows])

    return _descend(loss, adapter0, optimiser, _orders(key, sum(sizes), steps, batch))


# ---------------------------------------------------------------------------------------------------------- distillation


class Answered(NamedTuple):
    """Inputs with a teacher's answers: the logits of the last k columns of `ids` are to predict `targets`."""

    ids: Int[Array, "n t"]
    mask: Int[Array, "n t"]  # 1 at tokens
    targets: Int[Array, "n k"] | Float[Array, "n k V"]  # the teacher's tokens (hard), or its logits (soft)
    weight: Float[Array, "n k"]  # 1 where a target counts


def answered(
    ids: Int[Array, "n p"], mask: Int[Array, "n p"], tokens: Int[Array, "n k"], lengths: Int[Array, "n"]
) -> Answered:
    """Prompts and the completions that a teacher wrote after them, as `models.generate` takes and gives them.

    A student with tokens of its own is given the teacher's text in those. Prompts padded on the left ask for positions
    that do not count padding (`models.positions_from_mask`) from the student too.

    Args:
      ids, mask: prompts, padded on the left.
      tokens: completions, padded on the right.
      lengths: tokens of each that count, its stop token included.

    Raises:
      ValueError: shapes that do not agree.
    """
    shapes = [jnp.shape(x) for x in (ids, mask, tokens, lengths)]
    if len(shapes[0]) != 2 or shapes[1] != shapes[0] or len(shapes[2]) != 2 or not shapes[2][1]:
        raise ValueError(f"ids, mask, tokens of shapes {shapes[:3]}: expected (n, p), (n, p), (n, k), k at least 1")
    if not shapes[0][0] == shapes[2][0] == (shapes[3] or (-1,))[0] or len(shapes[3]) != 1:
        raise ValueError(f"ids, tokens and lengths of shapes {shapes[0]}, {shapes[2]}, {shapes[3]}: expected n of each")
    ids, mask, tokens, lengths = map(jnp.asarray, (ids, mask, tokens, lengths))
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    joined = lambda a, b: jnp.concatenate([a, b[:, :-1].astype(a.dtype)], 1)
    return Answered(joined(ids, tokens), joined(mask, real), tokens, real.astype(jnp.float32))


def seq_kd_loss(
    student_logits: Float[Array, "b t V"], teacher_tokens: Int[Array, "b t"], mask: Bool[Array, "b t"]
) -> Float[Array, ""]:
    """Hard H: cross-entropy of the teacher's tokens, the mean over those of the mask; 0 where there are none.

    Args:
      student_logits: of the columns that predict them (the column before each token).
      teacher_tokens: the teacher's output.
      mask: which count; its slope is (softmax - one-hot) / their number there and 0 elsewhere.

    Raises:
      ValueError: shapes that do not agree.
    """
    student_logits, teacher_tokens = _flat(student_logits, mask, teacher_tokens, 2)
    each = optax.softmax_cross_entropy_with_integer_labels(student_logits, teacher_tokens)
    return masked_mean(each, jnp.ravel(mask))


def soft_kd_loss(
    student_logits: Float[Array, "b t V"],
    teacher_logits: Float[Array, "b t V"],
    T: Any = 1.0,
    *,
    mask: Bool[Array, "b t"] | None = None,
) -> Float[Array, ""]:
    """Soft H: T² times the cross-entropy of softmax(student / T) under softmax(teacher / T), the mean over the mask.

    Its least value is T² times the teacher's entropy, where the two agree. A shared vocabulary is needed; a classification
    head's logits come as t = 1. No gradient flows to the teacher.

    Args:
      student_logits, teacher_logits: of the same columns; the teacher's may be -inf.
      T: temperature, over 0; may be traced.
      mask: which count; None for all.

    Raises:
      ValueError: shapes that do not agree.
    """
    mask = jnp.ones(jnp.shape(student_logits)[:-1], bool) if mask is None else mask
    student_logits, teacher_logits = _flat(student_logits, mask, teacher_logits, 3)
    teacher_logits = lax.stop_gradient(teacher_logits.astype(student_logits.dtype))
    T = jnp.asarray(T, student_logits.dtype)
    log_t = jax.nn.log_softmax(teacher_logits / T, -1)
    entropy = -jnp.where(jnp.isneginf(log_t), 0, jnp.exp(log_t) * log_t).sum(-1)
    kl = kl_loss(student_logits, teacher_logits, T, mask=jnp.ravel(mask))
    return kl + jnp.square(T) * masked_mean(entropy, jnp.ravel(mask))


def transfer_adapter(
    teacher_fn: Callable[[PyTree], Answered],
    student_apply: Callable[[PyTree, PyTree, Array, Array], Float[Array, "b s V"]],
    base_t: PyTree,
    adapter0: PyTree,
    inputs: PyTree,
    optimiser: optax.GradientTransformation,
    steps: int,
    key: Key[Array, ""],
    *,
    batch: int = 8,
    T: Any = 1.0,
) -> tuple[PyTree, Float[Array, "steps"]]:
    """θ_t: an adapter of the target base that answers as the teacher does, in one scan; vmap it over rates and keys.

    Args:
      teacher_fn: `inputs -> Answered`: M_s + θ_s, asked once for all inputs. What it gives decides the loss: tokens make
        it `seq_kd_loss`, logits `soft_kd_loss`.
      student_apply: `(base_t, adapter, ids, mask) -> logits (b, s, V)`, of which the last k columns count: columns that
        the adapter puts in front (prompt tuning) do not matter. Static.
      base_t: M_t, frozen: gradients are taken of the adapter alone.
      adapter0: its start, untrained; its `Fixed` leaves stay.
      inputs: D_syn, leaves (n, ...).
      optimiser: optax; the paper's is AdamW without decay, linearly falling. It may hold traced numbers.
      steps, batch: of the scan; `batch` at most n.
      key: of the order of the examples.
      T: of soft labels; may be traced.

    Returns:
      The adapter and the loss of each step.

    Raises:
      ValueError: no inputs, fewer than a batch, no steps, or a teacher whose answers do not fit.
    """
    n = _count(inputs)
    answers = jax.tree.map(lax.stop_gradient, teacher_fn(inputs))
    soft = jnp.issubdtype(jnp.result_type(answers.targets), jnp.floating)
    if jnp.shape(answers.targets)[:2] != jnp.shape(answers.weight) or jnp.ndim(answers.targets) != 2 + soft:
        raise ValueError(
            f"targets {jnp.result_type(answers.targets)}{list(jnp.shape(answers.targets))} with weights "
            f"{jnp.shape(answers.weight)}: expected tokens (n, k) or logits (n, k, V), and (n, k)"
        )
    if _count(answers) != n:
        raise ValueError(f"the teacher answered {_count(answers)} of {n} inputs: one answer to each is needed")

    def loss(adapter: PyTree, rows: Array) -> Array:
        some = jax.tree.map(lambda x: jnp.asarray(x)[rows], answers)
        logits = student_apply(base_t, adapter, some.ids, some.mask)[:, -some.weight.shape[1] :]
        if soft:
            return soft_kd_loss(logits, some.targets, T, mask=some.weight)
        return seq_kd_loss(logits, some.targets, some.weight)

    return _descend(loss, adapter0, optimiser, _orders(key, n, steps, batch))


# ------------------------------------------------------------------------------------------------------ synthetic inputs


def generation_prompt(seeds: Sequence[str], total: int = 10) -> str:
    """What the generator continues (B1): "Here are 10 examples:", the numbered seeds, and the next number.

    Raises:
      ValueError: no seeds, or not fewer than `total`.
    """
    if not 0 < len(seeds) < total:
        raise ValueError(f"{len(seeds)} seeds of {total} examples: expected at least one, and fewer than that")
    lines = [f"{i}. {seed}" for i, seed in enumerate(seeds, 1)]
    return "\n".join([f"Here are {total} examples:", *lines, f"{len(seeds) + 1}."])


def cut_continuation(text: str, seeds: int = 5) -> str:
    """The sample in what a generator wrote after `generation_prompt`: up to the number that follows its own."""
    return text.split(f"\n{seeds + 2}.")[0].strip()


def discriminator_prompt(text: str, dataset: str) -> str:
    """t(x), the question about an input (never its completion) that is answered "yes" or "no" with one token.

    Mind that case and a leading space change which token these are.
    """
    return f"Answer in as few words as possible. {text} Is the above question from the {dataset} dataset?"


class Synthetic(NamedTuple):
    """What `rejection_sample` found. Candidates are those that are left without copies, in the order they came."""

    texts: tuple[str, ...]  # D_syn
    candidates: tuple[str, ...]
    odds: np.ndarray  # of each candidate, log p(yes) - log p(no)
    tries: int  # samples drawn
    copies: int  # of them copies of a seed
    repeats: int  # of them copies of another sample
    empty: int  # of them without text
    fallback: int  # of the texts, those that did not pass

    @property
    def acceptance(self) -> float:
        """The share of candidates that passed; NaN of none."""
        return float((self.odds > 0).mean()) if len(self.odds) else float("nan")


def rejection_sample(
    generate: Callable[[int], Sequence[str]],
    judge: Callable[[Sequence[str]], ArrayLike],
    size: int,
    seeds: Iterable[str] = (),
    *,
    max_tries: int,
) -> Synthetic:
    """D_syn: samples drawn until `size` of them passed, on the host (B1 and B2).

    Where too few passed within the tries, candidates with the highest log p(yes) - log p(no) fill up; where there are
    fewer candidates than `size`, for the rest were copies, there are fewer texts. Texts that differ in white space alone
    are copies.

    Args:
      generate: `round -> m samples`, round 0, 1, ...: a key is folded from it.
      judge: logits (m, 2) of yes and of no for each sample; it is handed all of a round, so that its shapes stay.
      size: |D_syn|, |D| in the paper.
      seeds: copies of them are left out.
      max_tries: at most so many samples are drawn, but for the last round's rest.

    Raises:
      ValueError: a size or a number of tries below 1, a round without samples, or not as many logits as samples.
    """
    if size < 1 or max_tries < 1:
        raise ValueError(f"size {size}, max_tries {max_tries}: both are at least 1")
    plain = lambda text: " ".join(text.split())
    given, seen = {plain(s) for s in seeds}, set()
    texts, odds, tries, copies, repeats, empty, passed, rounds = [], [], 0, 0, 0, 0, 0, 0
    while passed < size and tries < max_tries:
        drawn = list(generate(rounds))
        if not drawn:
            raise ValueError(f"round {rounds} has no samples: generate gives at least one")
        logits = jnp.asarray(judge(drawn))
        if logits.shape != (len(drawn), 2):
            raise ValueError(f"judge gave logits of shape {logits.shape} for {len(drawn)} samples: expected (m, 2)")
        rounds, tries = rounds + 1, tries + len(drawn)
        for text, value in zip(drawn, np.asarray(log_odds(logits)).tolist(), strict=True):
            name = plain(text)
            copies, repeats, empty = copies + (name in given), repeats + (name in seen), empty + (not name)
            if name and name not in given and name not in seen:
                seen.add(name)
                texts.append(text)
                odds.append(value)
                passed += value > 0
    return _chosen(texts, np.asarray(odds), size, tries=tries, copies=copies, repeats=repeats, empty=empty)


def _chosen(texts: list[str], odds: np.ndarray, size: int, **counts: int) -> Synthetic:
    """The first that passed, in their order; then, if these are too few, the others by their odds."""
    first = np.flatnonzero(odds > 0)[:size].tolist()
    others = [i for i in np.argsort(-odds, kind="stable").tolist() if not odds[i] > 0][: size - len(first)]
    found = tuple(texts[i] for i in first + others)
    return Synthetic(found, tuple(texts), odds, fallback=len(others), **counts)


# ------------------------------------------------------------------------------------------------------------- the parts


def _count(tree: PyTree) -> int:
    counts = {jnp.shape(x)[0] if jnp.ndim(x) else -1 for x in jax.tree.leaves(tree)}
    if len(counts) != 1 or min(counts) < 1:
        raise ValueError(f"leaves of {sorted(counts)} examples: expected the same number of each, at least one")
    return counts.pop()


def _orders(key: Key[Array, ""], n: int, steps: int, batch: int) -> Int[Array, "steps b"]:
    """Rows of each step: one random order of all examples after another."""
    if steps < 1 or not 1 <= batch <= n:
        raise ValueError(f"{steps} steps of batch {batch} with {n} examples: expected at least one, of 1 to {n}")
    keys = jax.random.split(key, -(-steps * batch // n))
    return jax.vmap(lambda k: jax.random.permutation(k, n))(keys).reshape(-1)[: steps * batch].reshape(steps, batch)


def _descend(
    loss: Callable[[PyTree, Array], Array],
    adapter0: PyTree,
    optimiser: optax.GradientTransformation,
    rows: Int[Array, "steps b"],
) -> tuple[PyTree, Float[Array, "steps"]]:
    learned, fixed = trees.learned(adapter0)
    learned, losses = descend(lambda a, rows: loss(trees.combine(a, fixed), rows), learned, optimiser, rows)
    return trees.combine(learned, fixed), losses


def _flat(logits: Any, mask: Any, targets: Any, ndim: int) -> tuple[Array, Array]:
    """Logits (bt, V), in float32 at least, and targets of as many rows."""
    logits, targets, shape = jnp.asarray(logits), jnp.asarray(targets), jnp.shape(logits)
    if len(shape) != 3 or targets.shape != shape[:ndim] or jnp.shape(mask) != shape[:2]:
        raise ValueError(
            f"student logits {shape}, the teacher's {targets.shape}, mask {jnp.shape(mask)}: expected (b, t, V), "
            f"{'(b, t)' if ndim == 2 else '(b, t, V)'} and (b, t)"
        )
    logits = logits.astype(trees.wide_dtype(logits.dtype)).reshape(-1, shape[2])
    return logits, targets.reshape(-1, *shape[2:ndim])
