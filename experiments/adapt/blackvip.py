"""BlackVIP (Oh et al., CVPR 2023) in small: prompts for a model that can only be asked, and SPSA with gradient correction.

    python experiments/adapt/blackvip.py            all of it: about half an hour on two cores
    python experiments/adapt/blackvip.py --smoke    every part once in small; writes nothing unless --out is given

The service is a small convolutional network, trained on 800 of scikit-learn's digits, white on black, 8 x 8 in the middle of
24 x 24. Only losses of batches are asked of it. Two shifts, 16 examples a class to train on, 16 more to choose settings on:

  location     the digit in one of the eight cells around the middle, another example's digit in the middle; its label
               counts for nothing
  background   the digit in the middle on one of ten colours, in training (and validation) its class's own with probability
               0.8; in the test never its own

The coordinator's encoder is that of an autoencoder (64 features), trained on MNIST's digits brought to 8 x 8, one or two of
them anywhere on coloured canvases; the trigger has 224 numbers, the decoder with it 2,368. All arms make the same number of
updates and ask ten losses of 32 images for each: BAR (the image shrunk, a trained frame, focal loss, one-sided random
directions, 9 + 1 losses), VP (a trained frame added, SPSA-GC), BlackVIP with SPSA and with SPSA-GC (2 x 5 losses); as an
upper bound the coordinator with true gradients and Adam. Each arm has six settings (of a, c and beta, or of its own) tried
on validation images of the shift's training distribution by two seeds; then five seeds, of which the test images are looked
at once. Then logistic regression on scikit-learn's breast cancer data: the settings by the validation loss of five seeds, then
twenty.

Stated before running, each to be reported as holding or not, by the mean of the paired differences over seeds:
  1. BlackVIP is over zero-shot on both shifts.
  2. It is over VP on both, and at least 3 points on location.
  3. It is over BAR on both.
  4. With SPSA-GC its training loss ends lower than with SPSA, on both.
  5. True gradients are at least as good as BlackVIP, on both.
  6. On logistic regression SPSA-GC's training loss ends lower than SPSA's.

Small about it: the images, the service, the encoder, and a few thousand questions where the paper's runs ask millions. The
paper's digit on a canvas stands on 224 pixels; here the canvas is three digits wide, so that the two do not overlap.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import bases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import study
from pretraining import kept
from sklearn.datasets import load_breast_cancer

from jaxpeft import adapt, blackvip, border_prompt, full, train
from jaxpeft.tune import gain, rgf, spsa, spsa_gc, value_and_spsa

DIGIT, SIZE = 8, 24
CELLS = tuple((8 * i, 8 * j) for i in range(3) for j in range(3) if (i, j) != (1, 1))
MIDDLE = (8, 8)
# Ten backgrounds that a white digit stands out from.
COLOURS = np.array(
    [
        *((0.6, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.7), (0.5, 0.5, 0.0), (0.5, 0.0, 0.5)),
        *((0.0, 0.5, 0.5), (0.4, 0.4, 0.4), (0.6, 0.3, 0.0), (0.0, 0.3, 0.6), (0.3, 0.6, 0.3)),
    ],
    np.float32,
)
SHIFTS = ("location", "background")


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    own: int = 800  # digits that the service is trained on
    shots: int = 16  # a class, for training and for validation each
    tested: int = 600
    service_steps: int = 1500
    encoder_steps: int = 2000
    canvases: int = 8000
    features: int = 64
    frame: int = 3  # pixels
    q: int = 5
    gamma: float = 0.1
    rho: float = 0.8
    budget: study.Budget = dataclasses.field(
        default_factory=lambda: study.Budget(steps=2000, batch=32, rates=tuple(range(6)), beyond=0, tuning_seeds=2)
    )
    logistic_steps: int = 500
    logistic_tuning_seeds: int = 5
    logistic_seeds: int = 20


SMOKE = Setup(
    own=20,
    shots=2,
    tested=20,
    service_steps=2,
    encoder_steps=2,
    canvases=16,
    q=2,
    budget=study.Budget(steps=2, batch=8, rates=(1.0,), tuning_seeds=1, seeds=2),
    logistic_steps=3,
    logistic_tuning_seeds=2,
    logistic_seeds=3,
)

# Six settings of each arm.
SPSA = {"a": (0.001, 0.003, 0.01, 0.03, 0.003, 0.01), "c": (0.01, 0.01, 0.01, 0.01, 0.03, 0.03), "beta": (0.0,) * 6}
SPSA_GC = {"a": (1e-4, 3e-4, 1e-3, 1e-3, 3e-3, 1e-2), "c": (0.01,) * 6, "beta": (0.9, 0.9, 0.9, 0.5, 0.5, 0.5)}
VP = {"a": (0.01, 0.1, 1.0, 0.03, 0.3, 3.0), "c": (0.01,) * 6, "beta": (0.9, 0.9, 0.9, 0.5, 0.5, 0.5)}
BAR = {"a": (0.1, 1.0, 10.0, 0.1, 1.0, 10.0), "b": (0.01, 0.01, 0.01, 0.1, 0.1, 0.1)}
TRUE = {"a": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}

Table = Mapping[str, tuple[float, ...]]


# ------------------------------------------------------------------------------------------------------------ pictures


def on_canvas(digits: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """(n, 24, 24): each (8, 8) digit in [0, 1] with its upper left corner at its cell."""
    out = np.zeros((len(digits), SIZE, SIZE), np.float32)
    for canvas, digit, (i, j) in zip(out, digits, cells):
        canvas[i : i + DIGIT, j : j + DIGIT] = digit
    return out


def coloured(canvas: np.ndarray, background: np.ndarray) -> np.ndarray:
    """(n, 24, 24, 3) in [-1, 1]: white where the canvas is 1, the background (n, 3) where it is 0."""
    ink = canvas[..., None]
    return 2 * (ink + (1 - ink) * background[:, None, None]) - 1


def plain(digits: np.ndarray) -> np.ndarray:
    return coloured(on_canvas(digits, np.array([MIDDLE] * len(digits))), np.zeros((len(digits), 3), np.float32))


def moved(digits: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Each digit in a cell at the edge, another one of the same split in the middle."""
    rng = np.random.default_rng(seed)
    n = len(digits)
    canvas = on_canvas(digits, np.array(CELLS)[rng.integers(0, len(CELLS), n)])
    other = (np.arange(n) + rng.integers(1, n, n)) % n
    canvas += on_canvas(digits[other], np.array([MIDDLE] * n))
    return coloured(canvas, np.zeros((n, 3), np.float32))


def tinted(digits: np.ndarray, labels: np.ndarray, rho: float, seed: int) -> np.ndarray:
    """Each digit on its class's colour with probability rho, else on one of the others."""
    rng = np.random.default_rng(seed)
    n = len(digits)
    which = np.where(rng.random(n) < rho, labels, (labels + rng.integers(1, 10, n)) % 10)
    return coloured(on_canvas(digits, np.array([MIDDLE] * n)), COLOURS[which])


def digits_of(s: Setup) -> dict[str, Any]:
    """Scikit-learn's digits, newly split: the service's own, and training, validation and test of the shifts."""
    parts = bases.images("digits", DIGIT)
    x, y = (np.concatenate(arrays) for arrays in zip(*parts.values()))
    x, order = (x[..., 0] + 1) / 2, np.random.default_rng(0).permutation(len(y))
    own, rest = order[: s.own], order[s.own :]
    few = np.concatenate([rest[y[rest] == c][: 2 * s.shots] for c in range(10)])
    shot = np.arange(len(few)) % (2 * s.shots) < s.shots
    test = np.setdiff1d(rest, few)[: s.tested]
    rows = {"own": own, "train": few[shot], "validation": few[~shot], "test": test}
    return {k: (x[r], y[r]) for k, r in rows.items()}


def examples_of(shift: str, digits: Mapping[str, Any], s: Setup) -> dict[str, Any]:
    """The examples of a shift by split."""
    out = {}
    for i, split in enumerate(("train", "validation", "test")):
        x, y = digits[split]
        rho = 0.0 if split == "test" else s.rho
        out[split] = study.images_of(moved(x, y, i) if shift == "location" else tinted(x, y, rho, 10 + i), y)
    return out


def canvases(s: Setup) -> np.ndarray:
    """What the encoder learns from: MNIST's digits, one or two in any cells, on any colour or black."""
    rng = np.random.default_rng(0)
    few = (bases.images("mnist-5k", DIGIT)["train"][0][..., 0] + 1) / 2
    n, every = s.canvases, np.array([*CELLS, MIDDLE])
    cells = np.array([rng.permutation(len(every))[:2] for _ in range(n)])
    one, two = (on_canvas(few[rng.integers(0, len(few), n)], every[c]) for c in cells.T)
    both = rng.random(n) < 0.5
    black = rng.random((n, 1)) < 0.5
    return coloured(one + two * both[:, None, None], np.where(black, 0, 0.7 * rng.random((n, 3))).astype(np.float32))


# -------------------------------------------------------------------------------------------------------------- models


class Service(nn.Module):
    """The black box: three convolutions and the mean of the positions."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for width, stride in ((12, 2), (24, 2), (32, 1)):
            x = nn.relu(nn.Conv(width, (3, 3), (stride, stride))(x))
        return nn.Dense(10)(x.mean((1, 2)))


class Autoencoder(nn.Module):
    """The features of `encode`, and pixels from them."""

    features: int

    def setup(self) -> None:
        self.convolutions = [nn.Conv(16, (3, 3), (2, 2)), nn.Conv(32, (3, 3), (2, 2))]
        self.inner, self.wide = nn.Dense(self.features), nn.Dense(256)
        self.pixels = nn.Dense(SIZE * SIZE * 3)

    def encode(self, x: Any) -> Any:
        for convolution in self.convolutions:
            x = nn.relu(convolution(x))
        return nn.tanh(self.inner(x.reshape(x.shape[0], -1)))

    def __call__(self, x: Any) -> Any:
        return self.pixels(nn.relu(self.wide(self.encode(x)))).reshape(x.shape)


def trained(name: str, model: Any, task: train.Task, images: Any, labels: Any, steps: int, s: Setup, keep: bool) -> Any:
    """The parameters of a model of this file, trained as a whole."""
    examples = study.images_of(images, labels)
    start = jax.jit(model.init)(jax.random.key(0), examples.image[:1])
    problem = study.Problem(model.apply, start, {"train": examples}, task)

    def run(params: Any) -> Any:
        adapted, budget = adapt(problem.apply_fn, full()), study.Budget(steps=steps, batch=min(64, len(labels)))
        delta = adapted.init(jax.random.key(0), params, examples.image[:1])
        fit = study.trainer(adapted, problem, study.Arm(full()), budget)
        rows = study.rows_of(len(labels), steps, budget.batch, 0)
        delta, bad, losses = fit(params, delta, 3e-3, 0, examples, rows)
        assert int(bad) < 0
        print(f"{name}: loss {float(losses[0]):.4f} to {float(losses[-20:].mean()):.4f}", flush=True)
        return adapted.merge(params, delta)

    what = {"model": name, "own": s.own, "canvases": s.canvases, "features": s.features, "steps": steps}
    return kept(f"blackvip-{name}", what, start, run, keep)


# ---------------------------------------------------------------------------------------------------------------- arms


def chosen(table: Table, at: Any) -> dict[str, Any]:
    """The setting of that number, which stands in the place of the rate."""
    return {k: jnp.asarray(v)[jnp.round(at).astype(jnp.int32)] for k, v in table.items()}


def from_values(table: Table, s: Setup) -> Callable[..., Any]:
    """SPSA in the place of `jax.value_and_grad`, with the setting's c."""

    def estimator(function: Callable[..., Any], *, has_aux: bool = True) -> Callable[..., Any]:
        def run(learned: Any, state: Any, *rest: Any) -> Any:
            c = chosen(table, state.optimiser.hyperparams["rate"])["c"]
            own = value_and_spsa(gain(c, s.gamma), s.q, vectorised=True)
            return own(function, has_aux=has_aux)(learned, state, *rest)

        return run

    return estimator


def one_sided(table: Table, s: Setup) -> Callable[..., Any]:
    """BAR's estimate, of as many values as SPSA's."""

    def estimator(function: Callable[..., Any], *, has_aux: bool = True) -> Callable[..., Any]:
        assert has_aux

        def run(learned: Any, state: Any, *rest: Any) -> Any:
            *others, key = rest
            b = chosen(table, state.optimiser.hyperparams["rate"])["b"]
            loss = lambda w: function(w, state, *others, key)
            _, estimate = rgf(lambda w: loss(w)[0], jax.random.fold_in(key, 1), learned, b, 2 * s.q - 1)
            return loss(learned), estimate

        return run

    return estimator


def spsa_steps(table: Table) -> Callable[[Any, int], Any]:
    """SPSA-GC's updates with the setting's a and beta."""

    def make(at: Any, steps: int) -> Any:
        own = chosen(table, at)
        return spsa_gc(own["a"], 1.0, 0.4, own["beta"])

    return make


def bar_steps(at: Any, steps: int) -> Any:
    """Plain descent, the rate falling to a five-hundredth with the power 0.9."""
    a = chosen(BAR, at)["a"]
    left = lambda count: jnp.maximum(1 - count / steps, 0.0) ** 0.9
    return optax.scale_by_schedule(lambda count: -a * (0.002 + 0.998 * left(count)))


def true_steps(at: Any, steps: int) -> Any:
    return study.adam(0.06)(chosen(TRUE, at)["a"], steps)


def focal(outputs: Any, batch: Any) -> Any:
    """Cross-entropy that counts less where the answer is right already, gamma 2."""
    each = optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), batch.label)
    return (1 - jnp.exp(-each)) ** 2 * each


def framed(problem: study.Problem, s: Setup) -> study.Problem:
    """BAR's: the images shrunk into the frame, whose trained numbers become pixels by a sigmoid."""
    inner = SIZE - 2 * s.frame
    edge = np.ones((SIZE, SIZE, 1), bool)
    edge[s.frame : -s.frame, s.frame : -s.frame] = False

    def shrunk(batch: Any) -> Any:
        x = jax.image.resize(batch.image, (len(batch.label), inner, inner, 3), "bilinear")
        return batch._replace(image=jnp.pad(x, ((0, 0), (s.frame, s.frame), (s.frame, s.frame), (0, 0))))

    def apply_fn(params: Any, x: Any) -> Any:
        return problem.apply_fn(params, jnp.where(edge, jnp.tanh(x / 2), x))  # 2 sigmoid(x) - 1

    task = train.Task(problem.task.forward, focal)
    return study.Problem(apply_fn, problem.params, {k: shrunk(e) for k, e in problem.examples.items()}, task)


def arms(problem: study.Problem, encode: Callable[..., Any], s: Setup) -> dict[str, tuple[study.Arm, Table]]:
    """Name -> (arm, its settings)."""
    ours = blackvip(1.0, encoder=encode)
    frame = border_prompt(s.frame, low=-1.0, high=1.0)
    black = lambda table: {"gradient": from_values(table, s), "optimiser": spsa_steps(table)}
    bar = {"gradient": one_sided(BAR, s), "optimiser": bar_steps, "problem": framed(problem, s)}
    return {
        "BAR": (study.Arm(border_prompt(s.frame), **bar), BAR),
        "VP, SPSA-GC": (study.Arm(frame, **black(VP)), VP),
        "BlackVIP, SPSA": (study.Arm(ours, **black(SPSA)), SPSA),
        "BlackVIP, SPSA-GC": (study.Arm(ours, **black(SPSA_GC)), SPSA_GC),
        "true gradients": (study.Arm(ours, optimiser=true_steps), TRUE),
    }


def measured(shift: str, problem: study.Problem, encode: Callable[..., Any], s: Setup) -> dict[str, dict[str, Any]]:
    """A row of each arm on one shift, and of the service as it is."""
    predict = jax.jit(lambda params, x: problem.apply_fn(params, x).argmax(-1))
    own = float(jnp.mean(predict(problem.params, problem.examples["test"].image) == problem.examples["test"].label))
    print(f"-- {shift}: zero-shot {100 * own:.2f}", flush=True)
    rows = {"zero-shot": {"trained": 0, "test": [own] * s.budget.seeds, "mean": own, "std": 0.0}}
    every = arms(problem, encode, s)
    found = study.measure({n: arm for n, (arm, _) in every.items()}, problem, s.budget)
    for name, row in found.items():
        table, at = every[name][1], round(row.pop("rate"))
        # The number of a setting is no rate: what it stands for is written, and whether its a is at an end of the grid.
        row["setting"] = {k: v[at] for k, v in table.items()}
        print(f"{name}: the rate above is the number of the setting {row['setting']}", flush=True)
        row["details"]["rate_at_the_grids_edge"] = table["a"][at] in (min(table["a"]), max(table["a"]))
        row["details"]["settings"] = {k: list(v) for k, v in table.items()}
        rows[name] = row
    return {n: {**row, "method": f"{shift}: {n}", "shift": shift} for n, row in rows.items()}


# ------------------------------------------------------------------------------------------------- logistic regression


def logistic(s: Setup) -> dict[str, Any]:
    """The training loss of SPSA and SPSA-GC with one draw a step, for each seed."""
    x, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    cut = np.split(order, [6 * len(y) // 10, 8 * len(y) // 10])
    x = (x - x[cut[0]].mean(0)) / x[cut[0]].std(0)
    parts = [(jnp.asarray(x[r], jnp.float32), jnp.asarray(2.0 * y[r] - 1, jnp.float32)) for r in cut]

    def loss(w: Any, part: Any) -> Any:
        inputs, sign = part
        return jax.nn.softplus(-sign * (inputs @ w[:-1] + w[-1])).mean() + 1e-3 * jnp.sum(w**2)

    def one(own: Any, seed: Any) -> Any:
        optimiser = spsa_gc(own["a"], 1.0, 0.4, own["beta"])
        size = gain(own["c"], s.gamma)
        w = jnp.zeros(x.shape[1] + 1)

        def step(carry: Any, k: Any) -> Any:
            w, state = carry
            key = jax.random.fold_in(jax.random.key(seed), k)
            _, estimate = spsa(lambda w: loss(w, parts[0]), key, w, size(k.astype(jnp.float32)))
            updates, state = optimiser.update(estimate, state)
            w = optax.apply_updates(w, updates)
            return (w, state), loss(w, parts[0])

        (w, _), losses = jax.lax.scan(step, (w, optimiser.init(w)), jnp.arange(s.logistic_steps))
        inputs, sign = parts[2]
        return losses, loss(w, parts[1]), jnp.mean((inputs @ w[:-1] + w[-1]) * sign > 0)

    run = jax.jit(jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None)))
    tables = {
        "SPSA": {"a": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), "c": (0.01,) * 6, "beta": (0.0,) * 6},
        "SPSA-GC": {"a": (0.01, 0.1, 1.0, 0.03, 0.1, 0.3), "c": (0.01,) * 6, "beta": (0.5, 0.5, 0.5, 0.9, 0.9, 0.9)},
    }
    out = {}
    for name, table in tables.items():
        settings = {k: jnp.asarray(v) for k, v in table.items()}
        _, held, _ = run(settings, 1000 + jnp.arange(s.logistic_tuning_seeds))
        means = np.nan_to_num(np.asarray(held).mean(1), nan=np.inf)
        at = int(means.argmin())
        losses, _, test = run({k: v[at : at + 1] for k, v in settings.items()}, jnp.arange(s.logistic_seeds))
        out[name] = {
            "setting": {k: v[at] for k, v in table.items()},
            "at_the_grids_edge": table["a"][at] in (min(table["a"]), max(table["a"])),
            "validation_by_setting": means.tolist(),
            "loss": np.asarray(losses)[0, :, -1].tolist(),
            "curve": np.asarray(losses)[0].mean(0)[:: max(1, s.logistic_steps // 50)].tolist(),
            "test": np.asarray(test)[0].tolist(),
        }
        print(
            f"logistic regression, {name}: loss {np.mean(out[name]['loss']):.4f} ± {np.std(out[name]['loss']):.4f}, "
            f"test {100 * np.mean(out[name]['test']):.2f}, {out[name]['setting']}",
            flush=True,
        )
    return out


# ------------------------------------------------------------------------------------------------------------- the run


def figure(done: Mapping[str, Mapping[str, Any]]) -> Callable[[Any], None]:
    """Test accuracy of every arm on both shifts."""

    def draw(axes: Any) -> None:
        for i, (shift, rows) in enumerate(done.items()):
            at = np.arange(len(rows)) + 0.4 * i
            means, spread = ([100 * r[k] for r in rows.values()] for k in ("mean", "std"))
            axes.bar(at, means, 0.38, yerr=spread, label=shift)
            axes.set_xticks(at - 0.2, list(rows), rotation=20, fontsize=7)
        axes.set(ylabel="test accuracy, %")
        axes.legend()

    return draw


def main() -> None:
    args = study.arguments("BlackVIP in small; see the file's first lines.")
    s, began, keep = SMOKE if args.smoke else Setup(), time.perf_counter(), not args.smoke
    jax.config.update("jax_disable_most_optimizations", args.smoke)  # it is all compiling
    digits = digits_of(s)
    service, coder = Service(), Autoencoder(s.features)
    task = train.image_classification()
    own = plain(digits["own"][0]), digits["own"][1]
    params = trained("service", service, task, *own, s.service_steps, s, keep)
    drawn = canvases(s)
    copying = train.Task(task.forward, lambda outputs, batch: jnp.square(outputs - batch.image).mean((1, 2, 3)))
    inner = trained("encoder", coder, copying, drawn, np.zeros(len(drawn)), s.encoder_steps, s, keep)
    encode = lambda x: coder.apply(inner, x, method="encode")
    answers = np.asarray(jax.jit(service.apply)(params, plain(digits["test"][0])))
    clean = float(np.mean(answers.argmax(-1) == digits["test"][1]))
    print(f"the service on plain test digits: {100 * clean:.2f}", flush=True)

    done = {}
    for shift in SHIFTS:
        problem = study.Problem(service.apply, params, examples_of(shift, digits, s), task)
        done[shift] = measured(shift, problem, encode, s)
    small = logistic(s)

    def better(text: str, a: str, b: str, points: Mapping[str, float]) -> dict[str, str]:
        found = {shift: study.difference(rows[a], rows[b]) for shift, rows in done.items()}
        holds = all(m > 0 and m >= points.get(shift, 0.0) for shift, (m, _) in found.items())
        return record.claim(text, holds, "; ".join(f"{k}: {m:+.2f} ± {h:.2f} points" for k, (m, h) in found.items()))

    def lower(a: Any, b: Any) -> tuple[float, float]:
        return study.interval([x - y for x, y in zip(a, b, strict=True)])

    losses = {
        shift: lower(*(rows[f"BlackVIP, {n}"]["details"]["losses"] for n in ("SPSA-GC", "SPSA")))
        for shift, rows in done.items()
    }
    ours = "BlackVIP, SPSA-GC"
    bound = {shift: study.difference(rows["true gradients"], rows[ours]) for shift, rows in done.items()}
    mean, half = lower(small["SPSA-GC"]["loss"], small["SPSA"]["loss"])
    claims = [
        better("BlackVIP is over zero-shot on both shifts", ours, "zero-shot", {}),
        better(
            "BlackVIP is over VP on both shifts, and at least 3 points on location",
            ours,
            "VP, SPSA-GC",
            {"location": 3.0},
        ),
        better("BlackVIP is over BAR on both shifts", ours, "BAR", {}),
        record.claim(
            "With SPSA-GC the training loss ends lower than with SPSA, on both shifts",
            all(m < 0 for m, _ in losses.values()),
            "; ".join(f"{k}: {m:+.3f} ± {h:.3f}" for k, (m, h) in losses.items()),
        ),
        record.claim(
            "True gradients are at least as good as BlackVIP on both shifts",
            all(m >= 0 for m, _ in bound.values()),
            "; ".join(f"{k}: {m:+.2f} ± {h:.2f} points" for k, (m, h) in bound.items()),
        ),
        record.claim(
            "On logistic regression SPSA-GC's training loss ends lower than SPSA's",
            mean < 0,
            f"{mean:+.4f} ± {half:.4f} over {s.logistic_seeds} seeds",
        ),
    ]
    study.finish(
        "blackvip",
        args,
        paper="BlackVIP, Oh et al., CVPR 2023",
        setup=s,
        rows=[row for rows in done.values() for row in rows.values()],
        claims=claims,
        began=began,
        figure=figure(done),
        plain_accuracy=clean,
        losses_asked=2 * s.q * s.budget.steps,
        logistic=small,
    )


if __name__ == "__main__":
    main()
