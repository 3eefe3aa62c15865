"""Trans-LoRA: the filter against its closed form, the losses against each other, adapters of any kind, the host's counts."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from jaxpeft import adapt, dora, lora, prompt_tuning
from jaxpeft.models import Decoder, DecoderConfig, decoding, generate, new_cache, positions_from_mask
from jaxpeft.transfer import trans_lora as tl
from jaxpeft.transfer.two_samples import mmd2, rbf

pytestmark = pytest.mark.usefixtures("quick")
SIZES = dict(heads=2, head_dim=4, mlp_width=16, max_positions=16, pre_norm=True, norm_eps=1e-5, init_std=0.5)
SOURCE = Decoder(DecoderConfig(vocab=11, width=8, layers=1, **SIZES))
TARGET = Decoder(DecoderConfig(vocab=11, width=12, layers=1, **SIZES))
PROMPT, NEW = 4, 3
seeds = st.integers(0, 2**31)

# Programs shared by all tests, so that each shape compiles once.
hard, soft = jax.jit(tl.seq_kd_loss), jax.jit(lambda s, t, T, mask: tl.soft_kd_loss(s, t, T, mask=mask))
slope, soft_slopes = jax.jit(jax.grad(tl.seq_kd_loss)), jax.jit(jax.grad(soft, argnums=(0, 1)))
judge_loss = jax.jit(tl.discriminator_loss)
distance = jax.jit(lambda x, y, width: mmd2(x, y, rbf(width)))


def drawn(seed, b=2, t=3, v=5):
    """Student's and teacher's logits, tokens and a mask with at least one place."""
    rng = np.random.default_rng(seed)
    s, z = (jnp.asarray(rng.normal(0, 2, (b, t, v)), jnp.float32) for _ in range(2))
    mask = jnp.asarray(rng.random((b, t)) < 0.6).at[0, 0].set(True)
    return s, z, jnp.asarray(rng.integers(0, v, (b, t))), mask


# --------------------------------------------------------------------------------------------------------- the filter


def test_equal_logits_are_rejected_and_yes_must_be_strictly_over_no():
    logits = jnp.asarray([[2.0, 2.0], [1.0, 1.0001], [1.0001, 1.0], [-3.0, -4.0], [jnp.nan, 0.0]])
    assert tl.accept(logits).tolist() == [False, False, True, True, False]


@given(seeds)
def test_the_filter_asks_for_a_probability_over_a_half_and_the_loss_is_binary_cross_entropy(seed):
    rng = np.random.default_rng(seed)
    logits, real = rng.normal(0, 3, (7, 2)).astype(np.float32), rng.random(7) < 0.5
    p = softmax(logits.astype(np.float64), -1)
    assert np.array_equal(tl.accept(logits), p[:, 0] > 0.5)
    want = -np.where(real, np.log(p[:, 0]), np.log(p[:, 1])).mean()
    np.testing.assert_allclose(judge_loss(logits, real), want, rtol=1e-5)
    np.testing.assert_allclose(judge_loss(logits + 50, real), want, rtol=1e-4)  # a constant on both changes nothing


def test_of_symbols_those_pass_that_are_likelier_in_the_data_and_keep_the_generators_proportions(key):
    real = jnp.repeat(jnp.arange(5), jnp.asarray([2, 9, 1, 7, 1]))
    made = jnp.repeat(jnp.arange(5), jnp.asarray([6, 4, 5, 2, 3]))
    table = lambda base, adapter, x: jnp.stack([adapter[x], -adapter[x]], -1)
    fit = partial(tl.fit_discriminator, table, None, jnp.zeros(5), real, made, optax.adam(0.1), 300, batch=40)
    adapter, losses = jax.jit(fit)(key)
    # All 40 in each batch: the optimum has log-odds log p_D - log p_syn, in a table without error.
    want = np.log([2, 9, 1, 7, 1]) - np.log([6, 4, 5, 2, 3])
    np.testing.assert_allclose(2 * adapter, want, atol=2e-3)
    odds = jnp.asarray(want, jnp.float32)[jnp.concatenate([real, made])]
    at = tl.discriminator_loss(jnp.stack([odds, 0 * odds], -1), jnp.arange(40) < 20)
    np.testing.assert_allclose(losses[-1], at, atol=1e-5)

    x = jax.random.choice(key, made, (20000,))
    passed = np.asarray(x[tl.accept(table(None, adapter, x))])
    shares = np.bincount(passed, minlength=5) / len(passed)
    np.testing.assert_allclose(shares, np.array([0, 4, 0, 2, 0]) / 6, atol=0.02)  # p_syn on {p_D > p_syn}
    assert abs(shares[1] - 9 / 16) > 0.05, "not p_D, not even on what passes"


def test_a_discriminator_is_an_adapter_on_a_language_model(key):
    base = jax.jit(SOURCE.init)(key, jnp.zeros((1, 5), jnp.int32))
    adapted = adapt(SOURCE.apply, lora(2))
    apply = lambda base, adapter, ids: adapted.apply(base, adapter, ids)[:, -1, :2]
    real, made = jnp.full((6, 5), 3), jnp.full((6, 5), 7)
    start = jax.jit(adapted.init)(key, base, real)
    fit = jax.jit(lambda *args: tl.fit_discriminator(apply, *args, optax.adam(0.1), 40, key))
    adapter, losses = fit(base, start, real, made)
    assert losses[-1] < 0.1 < losses[0]
    assert tl.accept(jax.jit(apply)(base, adapter, jnp.concatenate([real, made]))).tolist() == [True] * 6 + [False] * 6


# --------------------------------------------------------------------------------------------------------- the losses


@given(seeds)
def test_the_hard_loss_is_the_mean_over_the_mask_and_its_slope_is_softmax_less_one_hot(seed):
    s, _, y, mask = drawn(seed)
    log_p = log_softmax(np.asarray(s, np.float64), -1)
    picked = np.take_along_axis(log_p, np.asarray(y)[..., None], -1)[..., 0]
    np.testing.assert_allclose(hard(s, y, mask), -picked[np.asarray(mask)].mean(), rtol=1e-5)
    want = (np.exp(log_p) - np.eye(5)[np.asarray(y)]) * np.asarray(mask)[..., None] / int(mask.sum())
    np.testing.assert_allclose(slope(s, y, mask), want, atol=1e-6)
    assert hard(s, y, jnp.zeros_like(mask)) == 0


@given(seeds)
def test_a_teacher_without_doubt_makes_both_losses_one(seed):
    s, z, _, mask = drawn(seed)
    y = z.argmax(-1)
    want = hard(s, y, mask)
    certain = jnp.where(jax.nn.one_hot(y, 5, dtype=bool), 0.0, -jnp.inf)
    np.testing.assert_allclose(soft(s, certain, 1.0, mask), want, rtol=1e-5)
    np.testing.assert_allclose(soft(s, z * 1e6, 1.0, mask), want, rtol=1e-4)  # the teacher's temperature to 0


@given(seeds, st.floats(0.5, 4))
def test_the_soft_loss_is_least_where_student_and_teacher_agree_and_is_the_entropy_there(seed, T):
    s, z, _, mask = drawn(seed)
    p = softmax(np.asarray(z, np.float64) / T, -1)
    cross = lambda q: T**2 * -(p * log_softmax(np.asarray(q, np.float64) / T, -1)).sum(-1)[np.asarray(mask)].mean()
    np.testing.assert_allclose(soft(s, z, T, mask), cross(s), rtol=2e-5)
    np.testing.assert_allclose(soft(z + 3, z, T, mask), cross(z), rtol=2e-5)
    assert soft(s, z, T, mask) >= soft(z, z, T, mask) - 1e-5
    at, teacher = soft_slopes(z, z, T, mask)
    np.testing.assert_allclose(at, 0, atol=1e-5)
    assert not np.asarray(teacher).any()


# --------------------------------------------------------------------------------------------------------- the transfer


def trained_bases(key):
    keys = jax.random.split(key, 4)
    source, target = (jax.jit(m.init)(k, jnp.zeros((1, 7), jnp.int32)) for m, k in zip((SOURCE, TARGET), keys))
    adapted = adapt(SOURCE.apply, lora(2))
    theta = jax.jit(adapted.init)(keys[2], source, jnp.zeros((1, 7), jnp.int32))
    noise = iter(jax.random.split(keys[3], 20))
    theta = jax.tree.map(lambda x: x + jax.random.normal(next(noise), x.shape), theta)
    return source, adapted, theta, target


def teacher_of(source, adapted, theta):
    """Greedy completions of M_s + θ_s, with a cache; and its logits for them."""

    def complete(inputs):
        ids, mask = inputs
        step = lambda ids, mask, positions, cache: adapt(decoding(SOURCE), adapted.method).apply(
            source, theta, ids, mask, positions, cache
        )
        cache = new_cache(SOURCE.config, ids.shape[0], PROMPT + NEW)
        out = generate(step, cache, ids, mask, new_tokens=NEW, stop=1)
        return tl.answered(ids, mask, out.tokens, out.lengths)

    def logits(inputs):
        known = complete(inputs)
        z = adapted.apply(source, theta, known.ids, known.mask, positions=positions_from_mask(known.mask))
        return known._replace(targets=z[:, -NEW:])

    return complete, logits


def prompts(key, n=12):
    ids = jax.random.randint(key, (n, PROMPT), 2, 11)
    mask = jnp.ones_like(ids).at[: n // 3, 0].set(0)  # some are shorter
    return jnp.where(mask == 1, ids, 0), mask


def student(model, method):
    adapted = adapt(model.apply, method)

    def apply(base, adapter, ids, mask):
        return adapted.apply(base, adapter, ids, mask, positions=positions_from_mask(mask))

    return adapted, apply


def test_answers_are_the_teachers_own_continuation(key):
    source, adapted, theta, _ = trained_bases(key)
    complete, logits = teacher_of(source, adapted, theta)
    inputs = prompts(key)
    hard_answers, soft_answers = jax.jit(lambda x: (complete(x), logits(x)))(inputs)
    assert hard_answers.ids.shape == (12, PROMPT + NEW - 1)
    counted = np.asarray(hard_answers.weight) > 0
    assert counted[:, 0].all()
    # Teacher-forced on its own completion, its best token at each column is that completion.
    assert np.array_equal(
        np.asarray(soft_answers.targets.argmax(-1))[counted], np.asarray(hard_answers.targets)[counted]
    )


def test_lengths_say_which_tokens_count():
    found = tl.answered(
        jnp.ones((2, 3), int), jnp.ones((2, 3), int), jnp.asarray([[5, 6], [7, 0]]), jnp.asarray([2, 1])
    )
    assert found.ids.tolist() == [[1, 1, 1, 5], [1, 1, 1, 7]]
    assert found.mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert found.weight.tolist() == [[1, 1], [1, 0]]
    longer = tl.answered(*(jnp.ones((1, 2), int),) * 2, jnp.asarray([[5, 0, 0]]), jnp.asarray([1]))
    assert longer.mask.tolist() == [[1, 1, 1, 0]]


@pytest.mark.parametrize(
    "method", [lora(4, at="**/kernel"), dora(4, at="**/kernel"), prompt_tuning(2)], ids=lambda m: m.name
)
def test_adapters_of_any_kind_come_to_answer_as_the_teacher_and_the_base_stays(key, method):
    source, adapted, theta, target = trained_bases(key)
    complete, _ = teacher_of(source, adapted, theta)
    inputs = prompts(key, 6)
    model, apply = student(TARGET, method)
    start = jax.jit(model.init)(key, target, *inputs)
    before = jax.tree.map(np.array, target)
    steps = 250
    fit = jax.jit(
        lambda target, start, rate: tl.transfer_adapter(
            complete, apply, target, start, inputs, optax.adam(rate), steps, key, batch=6
        )
    )
    adapter, losses = fit(target, start, 0.05)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(target)))
    assert losses[-1] < 0.75 * losses[0]
    known = jax.jit(complete)(inputs)
    logits = jax.jit(apply)(target, adapter, known.ids, known.mask)[:, -NEW:]
    np.testing.assert_allclose(hard(logits, known.targets, known.weight), losses[-1], atol=0.05)
    if method.name != "prompt_tuning":  # B = 0 at the start; a prompt is there from the first
        plain = jax.jit(TARGET.apply)(target, known.ids, known.mask, positions=positions_from_mask(known.mask))
        first = jax.jit(apply)(target, start, known.ids, known.mask)
        np.testing.assert_allclose(first, plain, atol=1e-4)
        agreed = (logits.argmax(-1) == known.targets) | (known.weight == 0)
        assert agreed.all(), "on D_syn itself, agreement comes to 100 %"


def test_on_its_own_base_soft_labels_bring_the_loss_to_the_teachers_entropy(key):
    source, adapted, theta, _ = trained_bases(key)
    theta = jax.tree.map(lambda x: 0.3 * x, theta)
    _, logits = teacher_of(source, adapted, theta)
    inputs = prompts(key)
    known = jax.jit(logits)(inputs)
    _, apply = student(SOURCE, lora(2))
    start = jax.jit(adapted.init)(key, source, *inputs)
    fit = lambda start: tl.transfer_adapter(logits, apply, source, start, inputs, optax.adam(3e-2), 400, key, batch=12)
    _, losses = jax.jit(fit)(start)
    least = float(soft(known.targets, known.targets, 1.0, known.weight))
    assert least - 1e-4 <= losses[-1] < least + 0.1 * (losses[0] - least)
    # The teacher's own adapter as a start is the least already, and has no slope.
    _, there = jax.jit(
        lambda a: tl.transfer_adapter(logits, apply, source, a, inputs, optax.sgd(0.1), 3, key, batch=12)
    )(theta)
    np.testing.assert_allclose(there, least, rtol=1e-4)


def test_a_second_transfer_takes_the_first_ones_result_for_its_teacher(key):
    """Chaining: tables stand for models, so that the end of both transfers is known."""
    answers = jnp.asarray([2, 0, 1])
    first = lambda x: tl.Answered(x[:, None], jnp.ones_like(x)[:, None], answers[x][:, None], jnp.ones((len(x), 1)))
    apply = lambda base, adapter, ids, mask: (base + adapter)[ids]
    x = jnp.arange(3)
    base, zero = jax.random.normal(key, (2, 3, 3)), jnp.zeros((3, 3))
    run = jax.jit(lambda base, z: tl.transfer_adapter(first, apply, base, zero, x, optax.adam(0.3), 60, key, batch=3))
    middle, _ = run(base[0], zero)
    second = lambda x: first(x)._replace(targets=(base[0] + middle)[x].argmax(-1)[:, None])
    last, _ = tl.transfer_adapter(second, apply, base[1], zero, x, optax.adam(0.3), 60, key, batch=3)
    assert jnp.array_equal((base[1] + last).argmax(-1), answers)


def table_transfer(rate, key, T, logits):
    """A transfer whose adapter is a table of logits: everything else is closed form."""
    x = jnp.arange(4)
    teacher = lambda x: tl.Answered(x[:, None], jnp.ones((4, 1), int), logits[:, None], jnp.ones((4, 1)))
    apply = lambda base, adapter, ids, mask: (base + adapter)[ids]
    zero = jnp.zeros((4, 3))
    return tl.transfer_adapter(teacher, apply, zero, zero, x, optax.sgd(rate), 5, key, batch=3, T=T)


def test_runs_side_by_side_over_rates_and_keys_are_the_single_runs(key):
    logits = jax.random.normal(key, (4, 3))
    keys, rates = jax.random.split(key, 3), jnp.asarray([0.1, 0.3, 1.0])
    together = jax.jit(jax.vmap(table_transfer, in_axes=(0, 0, None, None)))(rates, keys, 2.0, logits)
    for i in range(3):
        alone = jax.jit(table_transfer)(rates[i], keys[i], 2.0, logits)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a[i], b, atol=1e-6)
    assert not np.allclose(together[0][0], together[0][1])


def test_each_example_comes_once_in_each_round(key):
    rows = np.asarray(tl._orders(key, 6, 7, 4)).reshape(-1)
    for i in range(0, 24, 6):
        assert sorted(rows[i : i + 6]) == list(range(6))


# ------------------------------------------------------------------------------------------------------------- the host


def test_prompts_are_the_papers_and_a_sample_ends_where_the_next_begins():
    five = [f"s{i}" for i in range(1, 6)]
    assert tl.generation_prompt(five) == "Here are 10 examples:\n1. s1\n2. s2\n3. s3\n4. s4\n5. s5\n6."
    assert tl.cut_continuation(" what is 7. of\nthis\n7. another\n8. more") == "what is 7. of\nthis"
    assert tl.cut_continuation(" all there is ") == "all there is"
    assert tl.cut_continuation(" two\n4. other", seeds=2) == "two"
    want = "Answer in as few words as possible. Why? Is the above question from the BBH dataset?"
    assert tl.discriminator_prompt("Why?", "BBH") == want


def rounds(*lists):
    return lambda i: lists[min(i, len(lists) - 1)]


ODDS = {"good": 2.0, "fine": 1.0, "even": 0.0, "bad": -1.0, "worse": -3.0, "other": 3.0}
judge = lambda texts: np.asarray([[ODDS.get(" ".join(t.split()), 0.5), 0.0] for t in texts])


def test_copies_of_seeds_and_of_samples_are_left_out_and_counted():
    draws = rounds(["good", "seed", "good", "bad"], [" good ", "", "fine", "even"], ["other", "se  ed", "fine", "x"])
    found = tl.rejection_sample(draws, judge, 3, ["seed", "se ed"], max_tries=100)
    assert found.texts == ("good", "fine", "other")
    assert found.candidates == ("good", "bad", "fine", "even", "other", "x")
    assert (found.tries, found.copies, found.repeats, found.empty, found.fallback) == (12, 2, 3, 1, 0)
    assert found.acceptance == pytest.approx(4 / 6)
    assert len(found.candidates) == found.tries - found.copies - found.repeats - found.empty


def test_where_the_tries_end_the_highest_odds_fill_up():
    found = tl.rejection_sample(rounds(["worse", "even", "good", "bad"]), judge, 3, max_tries=10)
    assert found.texts == ("good", "even", "bad")
    assert (found.tries, found.fallback, found.repeats) == (12, 2, 8)
    few = tl.rejection_sample(rounds(["bad", "worse"]), judge, 5, max_tries=4)
    assert few.texts == ("bad", "worse"), "fewer texts than asked for, where there are no more"
    assert few.acceptance == 0
    assert np.isnan(tl.rejection_sample(rounds(["good"]), judge, 1, ["good"], max_tries=1).acceptance)


@given(
    st.lists(st.lists(st.sampled_from(sorted(ODDS)), min_size=3, max_size=3), min_size=1, max_size=5), st.integers(1, 6)
)
def test_what_passed_comes_first_and_nothing_twice(draws, size):
    found = tl.rejection_sample(rounds(*draws), judge, size, ["good"], max_tries=15)
    assert len(set(found.texts)) == len(found.texts) <= size
    assert "good" not in found.candidates
    assert found.tries <= 15
    passed = [t for t in found.candidates if ODDS[t] > 0]
    assert list(found.texts[: len(found.texts) - found.fallback]) == passed[:size]
    rest = [ODDS[t] for t in found.texts[len(found.texts) - found.fallback :]]
    assert rest == sorted(rest, reverse=True)
    if len(passed) < size:  # nobody with higher odds was left
        left = [ODDS[t] for t in found.candidates if t not in found.texts]
        assert not left or len(found.texts) == size
        assert not left or not rest or max(left) <= min(rest)


def test_phase_a_leaves_four_things():
    assert tl.Kept._fields == ("adapter", "discriminator", "seeds", "size")
    assert jax.tree.map(jnp.shape, tl.Kept(jnp.ones(2), jnp.ones(3), (), 250).adapter) == (2,)


# ------------------------------------------------------------------------------------------------------------- the MMD


@given(seeds, st.floats(0.5, 3))
def test_mmd_of_equal_samples_is_zero_and_rotations_change_nothing(seed, width):
    rng = np.random.default_rng(seed)
    x, y = (jnp.asarray(rng.normal(i, 1, (6, 3)), jnp.float32) for i in range(2))
    assert abs(float(distance(x, x[::-1], width))) < 1e-6
    q = jnp.asarray(np.linalg.qr(rng.normal(size=(3, 3)))[0], jnp.float32)
    np.testing.assert_allclose(distance(x @ q, y @ q, width), distance(x, y, width), atol=1e-5)
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    k = lambda a, b: np.exp(-np.square(a[:, None] - b[None]).sum(-1) / (2 * width**2)).mean()
    np.testing.assert_allclose(distance(x, y, width), k(a, a) + k(b, b) - 2 * k(a, b), atol=2e-6)
    assert distance(x, y, width) >= -1e-6


def test_mmd_of_a_linear_kernel_is_the_distance_of_the_means(key):
    x, y = jax.random.normal(key, (2, 7, 3))
    got = mmd2(x, y[:4], lambda a, b: a @ b.T)
    np.testing.assert_allclose(got, jnp.square(x.mean(0) - y[:4].mean(0)).sum(), atol=1e-6)


# ------------------------------------------------------------------------------------------------------ transformations


S, Z, Y, M = drawn(0)
PAIRS = jnp.asarray([[1.0, 0.5], [0.0, 2.0], [-1.0, 0.0]])
CASES = {
    "discriminator_loss": (lambda x: tl.discriminator_loss(x, jnp.asarray([True, False, True])), PAIRS),
    "log_odds": (lambda x: tl.log_odds(x).sum(), PAIRS),
    "seq_kd_loss": (lambda x: tl.seq_kd_loss(x, Y, M), S),
    "soft_kd_loss": (lambda x: tl.soft_kd_loss(x, Z, 2.0, mask=M), S),
    "mmd2": (lambda x: mmd2(x, 2 * PAIRS, rbf(1.5)), PAIRS),
    "transfer_adapter": (lambda x: table_transfer(x, jax.random.key(0), 1.0, jnp.eye(4, 3))[1][-1], jnp.asarray(0.3)),
}


@pytest.mark.parametrize("name", CASES)
def test_plain_jit_vmap_and_gradients_agree(name):
    f, x = CASES[name]
    want = f(x)
    np.testing.assert_allclose(jax.jit(f)(x), want, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(f))(jnp.stack([x, x])), [want, want], atol=1e-6)
    v = jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) + 0.5
    rise = (f(x + 1e-2 * v) - f(x - 1e-2 * v)) / 2e-2
    np.testing.assert_allclose((jax.jit(jax.grad(f))(x) * v).sum(), rise, atol=2e-3)


def test_losses_are_wide_under_strict_promotion():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (S, Z))
    with jax.numpy_dtype_promotion("strict"):
        assert jax.eval_shape(tl.seq_kd_loss, half[0], Y, M).dtype == jnp.float32
        assert jax.eval_shape(partial(tl.soft_kd_loss, T=2.0), *half).dtype == jnp.float32
        jax.eval_shape(table_transfer, jnp.float32(0.1), jax.random.key(0), jnp.float32(1), jnp.eye(4, 3))
        jax.eval_shape(judge_loss, PAIRS, jnp.ones(3, bool))


# ------------------------------------------------------------------------------------------------------------- errors


IDS = jnp.ones((4, 2), int)
GOOD = tl.Answered(IDS, IDS, IDS, jnp.ones((4, 2)))
no_student = lambda base, adapter, ids, mask: ids


def moved(answers, inputs=IDS, steps=1, batch=2):
    return tl.transfer_adapter(
        lambda x: answers, no_student, None, {}, inputs, optax.sgd(1.0), steps, jax.random.key(0), batch=batch
    )


BAD = {
    "logits of shape (3,): expected (n, 2)": lambda: tl.accept(jnp.zeros(3)),
    "is_real of shape (2,) for 3 examples": lambda: tl.discriminator_loss(PAIRS, jnp.ones(2, bool)),
    "student logits (2, 3, 5), the teacher's (2, 2)": lambda: tl.seq_kd_loss(S, Y[:, :2], M),
    "mask (2, 2): expected (b, t, V), (b, t, V) and (b, t)": lambda: tl.soft_kd_loss(S, Z, mask=M[:, :2]),
    "ids, mask, tokens of shapes": lambda: tl.answered(IDS, IDS[:3], IDS, IDS[:, 0]),
    "ids, tokens and lengths of shapes": lambda: tl.answered(IDS, IDS, IDS, IDS),
    "expected tokens (n, k) or logits (n, k, V)": lambda: moved(GOOD._replace(targets=jnp.ones((4, 2)))),
    "the teacher answered 3 of 4 inputs": lambda: moved(jax.tree.map(lambda x: x[:3], GOOD)),
    "1 steps of batch 5 with 4 examples": lambda: moved(GOOD, batch=5),
    "0 steps of batch 2 with 4 examples": lambda: moved(GOOD, steps=0),
    "leaves of [3, 4] examples": lambda: moved(GOOD, inputs=(IDS, IDS[:3])),
    "0 seeds of 10 examples": lambda: tl.generation_prompt([]),
    "5 seeds of 5 examples": lambda: tl.generation_prompt(["s"] * 5, 5),
    "size 0, max_tries 1": lambda: tl.rejection_sample(rounds(["a"]), judge, 0, max_tries=1),
    "round 0 has no samples": lambda: tl.rejection_sample(rounds([]), judge, 1, max_tries=1),
    "logits of shape (1, 1) for 1 samples": lambda: tl.rejection_sample(
        rounds(["a"]), lambda x: np.zeros((1, 1)), 1, max_tries=1
    ),
    "samples of shapes (3, 2) and (3, 1)": lambda: mmd2(PAIRS, PAIRS[:, :1], rbf(1.0)),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_is_refused_with_its_values(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BAD[message]()
