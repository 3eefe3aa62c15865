"""D2NWG (Soro et al., ICLR 2025) in small: classifier heads generated for data sets that the zoo has not seen.

    python experiments/hyper/d2nwg.py            all of it: about half an hour on one core
    python experiments/hyper/d2nwg.py --smoke    every part once in small; writes nothing unless --out is given

20 classes: Fashion-MNIST's ten, and scikit-learn's digits made larger. Features are those of a ViT trained on Fashion-MNIST
(the class token, standardised, its first 64 principal components). A task is five of the classes in their order; a network is
a linear head (64 x 5 and 5 numbers). The zoo: 200 tasks with 20 heads each, 4,000 in one program, trained from zero on 50
images a class of their own draw; 20 further tasks choose rates, and 40 are held out. A data set is shown as five random
images a class. Stages as in the paper on vectors (`jaxpeft.hyper.d2nwg`): an autoencoder of 32 latents, a set encoder aligned
with it, 200 times of diffusion. Without training on the held-out tasks, and after 1, 5 and 20 steps of gradient descent on five
labelled images a class (the same that are shown):

    D2NWG             a generated head, the mean over ten; "best of 10" by the loss on the labelled images
    unconditional     the same generator trained without data sets
    nearest head      a head of the zoo task whose class means are nearest to those of the images shown
    mean head         of the whole zoo
    random            N(0, 1/64)
    prototypes        w_c = mean_c, b_c = -|mean_c|²/2: a simple baseline that must be shown

The step size is chosen for each start out of three on the 20 tasks, by the accuracy after 20 steps. Five seeds draw tasks,
heads, images and the generator's start. Accuracy is on test images of a task's classes; the mean over 40 tasks.

Stated before running, each to be reported as holding or not, by means over seeds:
  1. Without training, D2NWG is at least 20 points over the unconditional generator.
  2. The unconditional generator is within 10 points of random heads.
  3. Best of 10 is at least as good as the nearest head of the zoo.
  4. After 5 steps, best of 10 is at least 5 points over the random start.
  5. On the zoo's own tasks generated heads are within 2 points of the zoo's.
  6. Best of 10 is at least as good as prototypes, without training.
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import bases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import study

from jaxpeft.hyper import weight_diffusion
from jaxpeft.hyper.d2nwg import Denoiser, VectorVae
from jaxpeft.hyper.set_transformer import DatasetEncoder
from jaxpeft.models.vit import VisionTransformer
from jaxpeft.updates import descend

WAYS = 5
STEPS = (0, 1, 5, 20)


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    base: bases.Vit = bases.VIT
    features: int = 64
    tasks: int = 200
    heads: int = 20
    tuning: int = 20
    held: int = 40
    per_class: int = 50
    shots: int = 5
    head_steps: int = 150
    latent: int = 32
    times: int = 200
    vae_steps: int = 4000
    align_steps: int = 1500
    diffusion_steps: int = 6000
    batch: int = 64
    generated: int = 10
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    tested: int = 100  # test images of each class
    seeds: int = 5


SMOKE = Setup(
    bases.SMALL_VIT, features=8, tasks=4, heads=2, tuning=2, held=2, per_class=2, shots=2, head_steps=2, latent=2, times=32,
    vae_steps=2, align_steps=2, diffusion_steps=2, batch=4, generated=2, rates=(0.1,), tested=4, seeds=2,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- features


def features(s: Setup, keep: bool) -> tuple[np.ndarray, np.ndarray]:
    """(20, n, f) to draw from and (20, t, f) to test on; every class as many, drawn with replacement where it has fewer."""
    model, params, _ = bases.fashion_vit(s.base, keep)
    tower = VisionTransformer(model.config)
    read = jax.jit(lambda p, x: jnp.asarray(tower.apply(p, x))[:, 0])
    own = {"params": params["params"]["backbone"]}
    out: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    rng = np.random.default_rng(0)
    for name in ("fashion-mnist", "digits"):
        parts = bases.images(name, s.base.size, examples=s.base.examples)
        for split, count in (("train", 400), ("test", s.tested)):
            x, y = parts[split]
            for c in range(10):
                rows = np.flatnonzero(y == c)
                rows = rows if len(rows) else np.arange(len(y))  # a smoke run may lack a class
                drawn = rng.permutation(rows)[:count] if len(rows) >= count else rng.choice(rows, count)
                out[split].append(np.asarray(read(own, jnp.asarray(x[drawn]))))
    train, test = (np.stack(out[k]) for k in ("train", "test"))
    mean, std = train.mean((0, 1)), train.std((0, 1)) + 1e-6
    flat = ((train - mean) / std).reshape(-1, train.shape[-1])
    axes = np.linalg.svd(flat, full_matrices=False)[2][: s.features].T
    scale = (flat @ axes).std()
    return tuple(((x - mean) / std) @ axes / scale for x in (train, test))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------------------- heads


def logits(head: Any, x: Any) -> Any:
    return x @ head["kernel"] + head["bias"]


def loss(head: Any, x: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits(head, x), y).mean()


@jax.jit(static_argnums=3)
def trained(head: Any, x: Any, rate: Any, steps: int) -> Any:
    """Gradient descent on (c, m, f) images of each class, all at once."""
    flat, y = x.reshape(-1, x.shape[-1]), jnp.repeat(jnp.arange(x.shape[0]), x.shape[1])
    step = lambda _, h: jax.tree.map(lambda w, g: w - rate * g, h, jax.grad(loss)(h, flat, y))
    return jax.lax.fori_loop(0, steps, step, head)


def accuracy(head: Any, x: Any) -> Any:
    return (logits(head, x).argmax(-1) == jnp.arange(x.shape[0])[:, None]).mean()


@jax.jit
def scores(heads: Any, x: Any) -> Any:
    """Accuracies of a stack of heads."""
    return jax.vmap(accuracy, (0, None))(heads, x)


@jax.jit(static_argnums=3)
def after(heads: Any, x: Any, rate: Any, steps: int) -> Any:
    """A stack of heads after some steps."""
    return jax.vmap(lambda h: trained(h, x, rate, steps))(heads)


def prototypes(x: Any) -> Any:
    mean = x.mean(1)
    return {"kernel": mean.T, "bias": -jnp.square(mean).sum(-1) / 2}


# --------------------------------------------------------------------------------------------------------------- generator


class Generator:
    """The stages, compiled once for all seeds; heads come and go divided by the zoo's spread."""

    def __init__(self, s: Setup):
        self.s = s
        head = {"kernel": jnp.zeros((s.features, WAYS)), "bias": jnp.zeros(WAYS)}
        self.stages = weight_diffusion(
            head, (WAYS, s.shots, s.features), latent=s.latent, times=s.times, denoiser=Denoiser(),
            vae=VectorVae(s.features * WAYS + WAYS, s.latent), encoder=DatasetEncoder(s.latent, between=128, width=64),
        )  # fmt: skip
        t = self.stages
        self._fits = {
            "vae": self._fit(lambda p, w, x, key: t.vae_loss(p, w, key), ("vae",), s.vae_steps),
            "alignment": self._fit(t.align_loss, ("data",), s.align_steps),
            "diffusion": self._fit(t.diffusion_loss, ("denoiser", "data"), s.diffusion_steps),
            "unconditional": self._fit(
                lambda p, w, x, key: t.diffusion_loss(p, w, None, key), ("denoiser",), s.diffusion_steps
            ),
        }
        self._init = jax.jit(t.init)
        one = lambda weights, x, key: t.generate(weights, x, key)
        self._made = jax.jit(jax.vmap(one, (None, None, 0)))

    def _fit(self, loss: Any, parts: tuple[str, ...], steps: int) -> Any:
        s = self.s
        rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-3, max(1, steps))))

        def run(weights: Any, w: Any, tasks: Any, data: Any, key: Any) -> Any:
            def shown(key: Any, classes: Any) -> Any:
                return data[classes[:, None], jax.random.randint(key, (WAYS, s.shots), 0, data.shape[1])]

            def one(own: Any, key: Any) -> Any:
                rows, show, other = jax.random.split(key, 3)
                i = jax.random.randint(rows, (s.batch,), 0, w.shape[0])
                x = jax.vmap(shown)(jax.random.split(show, s.batch), tasks[i])
                return loss({**weights, **own}, w[i], x, other)

            own, losses = descend(one, {k: weights[k] for k in parts}, rule, jax.random.split(key, steps))
            return {**weights, **own}, losses

        return jax.jit(run)

    def fitted(self, key: Any, w: Any, tasks: Any, data: Any) -> dict[bool, Any]:
        """Weights of the conditional generator and of the unconditional one, which share an autoencoder."""
        keys = iter(jax.random.split(key, 5))

        def fit(name: str, weights: Any) -> Any:
            weights, losses = self._fits[name](weights, w, tasks, data, next(keys))
            print(f"  {name}: {float(losses[0]):.3f} to {float(losses[-50:].mean()):.3f}", flush=True)
            return weights

        weights = fit("vae", self._init(next(keys)))
        weights = self.stages.calibrated(weights, w, key)
        return {True: fit("diffusion", fit("alignment", weights)), False: fit("unconditional", weights)}

    def heads(self, weights: Any, x: Any, keys: Any, spread: Any) -> Any:
        """A head for each key, for the images x (5, m, f), or for none."""
        return jax.tree.map(lambda h: spread * h, self._made(weights, x, keys))


# --------------------------------------------------------------------------------------------------------------------- all


def one_seed(s: Setup, generator: Generator, seed: int, train: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    rng, key = np.random.default_rng([seed, 6]), jax.random.fold_in(jax.random.key(31), seed)
    subsets: list[tuple[int, ...]] = []
    while len(subsets) < s.tasks + s.tuning + s.held:
        new = tuple(sorted(rng.choice(len(train), WAYS, replace=False).tolist()))
        if new not in subsets:
            subsets.append(new)
    zoo, tuning, held = np.split(np.array(subsets), [s.tasks, s.tasks + s.tuning])
    data, of_test = jnp.asarray(train), jnp.asarray(test)

    classes = jnp.asarray(np.repeat(zoo, s.heads, 0))
    rows = jnp.asarray(rng.integers(0, train.shape[1], (len(classes), WAYS, s.per_class)))
    zero = {"kernel": jnp.zeros((s.features, WAYS)), "bias": jnp.zeros(WAYS)}
    one = lambda at: trained(zero, data[at[0][:, None], at[1]], 1.0, s.head_steps)
    heads = jax.jit(lambda c, r: jax.lax.map(one, (c, r), batch_size=100))(classes, rows)
    spread = float(jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(heads)]).std())
    w = jax.vmap(generator.stages.vectors.flatten)(heads) / spread
    weights = generator.fitted(key, w, classes, data)
    means = data.mean(1)[jnp.asarray(zoo)]  # (tasks, 5, f)
    whole = jax.tree.map(lambda x: x.mean(0), heads)

    def starts(classes: np.ndarray, x: Any, key: Any) -> dict[str, Any]:
        """Stacks of heads for a task of which x (5, m, f) is shown; several heads are averaged over in accuracy."""
        keys, own = jax.random.split(key, s.generated), x.reshape(-1, s.features)
        y = jnp.repeat(jnp.arange(WAYS), s.shots)
        best = lambda many: jax.tree.map(lambda h: h[jax.vmap(lambda h: loss(h, own, y))(many).argmin()][None], many)
        near = int(jnp.square(means - x.mean(1)).sum((1, 2)).argmin())
        made = generator.heads(weights[True], x, keys, spread)
        free = generator.heads(weights[False], None, keys, spread)
        alone = lambda h: jax.tree.map(lambda v: v[None], h)
        return {
            "D2NWG": made,
            "D2NWG, best of 10": best(made),
            "unconditional": free,
            "unconditional, best of 10": best(free),
            "nearest head": jax.tree.map(lambda h: h[near * s.heads : (near + 1) * s.heads], heads),
            "mean head": alone(whole),
            "random": {
                "kernel": jax.vmap(lambda k: jax.random.normal(k, (s.features, WAYS)))(keys) / s.features**0.5,
                "bias": jnp.zeros((s.generated, WAYS)),
            },
            "prototypes": alone(prototypes(x)),
        }

    def measured(tasks: np.ndarray, rates: dict[str, float] | None, stream: int) -> Any:
        """{start: (tasks, steps)}, or without rates {start: {rate: mean accuracy after the last}}."""
        out: dict[str, Any] = {}
        for t, classes in enumerate(tasks):
            own = jax.random.fold_in(jax.random.fold_in(key, stream), t)
            picks = np.random.default_rng([seed, stream, t]).integers(0, train.shape[1], (WAYS, s.shots))
            x, held_out = data[classes[:, None], picks], of_test[jnp.asarray(classes)]
            for name, h in starts(classes, x, own).items():
                if rates is None:
                    for r in s.rates:
                        out.setdefault(name, {}).setdefault(r, []).append(
                            float(scores(after(h, x, r, STEPS[-1]), held_out).mean())
                        )
                else:
                    found = [scores(after(h, x, rates[name], n), held_out).mean() for n in STEPS]
                    out.setdefault(name, []).append([float(f) for f in found])
        return out

    tried = measured(tuning, None, 1)
    rates = {name: max(by, key=lambda r: statistics.mean(by[r])) for name, by in tried.items()}
    found = {name: np.mean(x, 0).tolist() for name, x in measured(held, rates, 2).items()}
    # In distribution: the zoo's own tasks, the same images shown to the generator as to anybody.
    some = rng.permutation(s.tasks)[: s.held]
    inside = {name: np.mean(x, 0)[0] for name, x in measured(zoo[some], rates, 3).items() if name == "D2NWG"}
    of_task = lambda i: jax.tree.map(lambda h: h[i * s.heads : (i + 1) * s.heads], heads)
    own = [float(scores(of_task(i), of_test[jnp.asarray(zoo[i])]).mean()) for i in some]
    print(f"seed {seed}:", {n: [round(100 * f, 1) for f in x] for n, x in found.items()}, flush=True)
    return {"found": found, "rates": rates, "inside": float(inside["D2NWG"]), "zoo": statistics.mean(own)}


def main() -> None:
    began, args = time.perf_counter(), study.arguments((__doc__ or "").splitlines()[0])
    s = SMOKE if args.smoke else Setup()
    train, test = features(s, keep=not args.smoke)
    generator = Generator(s)
    seeds = [one_seed(s, generator, seed, train, test) for seed in range(s.seeds)]
    names = list(seeds[0]["found"])
    at = lambda name, step: [r["found"][name][STEPS.index(step)] for r in seeds]
    rows = [
        {
            "method": n,
            **{
                f"{k} steps": f"{100 * statistics.mean(at(n, k)):.1f} ± {100 * statistics.stdev(at(n, k)):.1f}"
                for k in STEPS
            },
            "details": {"accuracy": [r["found"][n] for r in seeds], "rates": [r["rates"][n] for r in seeds]},
        }
        for n in names
    ]
    gap = lambda a, b: study.interval([100 * (x - y) for x, y in zip(a, b, strict=True)])
    told = lambda pair: f"{pair[0]:+.2f} ± {pair[1]:.2f} points"
    best = "D2NWG, best of 10"
    over_free, free = gap(at("D2NWG", 0), at("unconditional", 0)), gap(at("unconditional", 0), at("random", 0))
    near, five = gap(at(best, 0), at("nearest head", 0)), gap(at(best, 5), at("random", 5))
    inside = gap([r["inside"] for r in seeds], [r["zoo"] for r in seeds])
    simple = gap(at(best, 0), at("prototypes", 0))
    claims = [
        record.claim(
            "D2NWG is at least 20 points over the unconditional generator", over_free[0] >= 20, told(over_free)
        ),
        record.claim("The unconditional generator is within 10 points of random heads", abs(free[0]) <= 10, told(free)),
        record.claim("Best of 10 is at least as good as the nearest head of the zoo", near[0] >= 0, told(near)),
        record.claim("After 5 steps best of 10 is at least 5 points over the random start", five[0] >= 5, told(five)),
        record.claim(
            "On the zoo's tasks generated heads are within 2 points of the zoo's", inside[0] >= -2, told(inside)
        ),
        record.claim("Best of 10 is at least as good as prototypes", simple[0] >= 0, told(simple)),
    ]

    def draw(axes: Any) -> None:
        for n in names:
            axes.plot(range(len(STEPS)), [100 * statistics.mean(at(n, k)) for k in STEPS], "o-", markersize=3, label=n)
        axes.set(
            xticks=range(len(STEPS)), xticklabels=STEPS, xlabel="steps on five images a class", ylabel="accuracy, %"
        )
        axes.legend(fontsize=7)

    study.finish(
        "d2nwg", args, paper="Soro et al.: Diffusion-Based Neural Network Weights Generation, ICLR 2025", setup=s, rows=rows,
        claims=claims, began=began, figure=draw, inside=[(r["inside"], r["zoo"]) for r in seeds],
    )  # fmt: skip


if __name__ == "__main__":
    main()
