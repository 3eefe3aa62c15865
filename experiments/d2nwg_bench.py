"""What the experiments of D2NWG (hyper/d2nwg.py, hyper/d2nwg_text.py) share: the generator's stages as compiled programs,
linear heads with a zoo of them, and heads of several origins compared on tasks.

A task is c classes in their order. `data` (classes, n, f) holds features of n examples of each class; a task is shown as
m of them for each of its classes (c, m, f).
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import study

from jaxpeft import trees
from jaxpeft.hyper import weight_diffusion
from jaxpeft.updates import descend

STEPS = (0, 1, 5, 20)


def reduced(count: int, train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Features (classes, n, d) as the first `count` principal components of `train`, standardised before, of variance 1
    altogether after."""
    mean, std = train.mean((0, 1)), train.std((0, 1)) + 1e-6
    flat = ((train - mean) / std).reshape(-1, train.shape[-1])
    axes = np.linalg.svd(flat, full_matrices=False)[2][:count].T
    scale = (flat @ axes).std()
    return tuple(((x - mean) / std) @ axes / scale for x in (train, *others))


def drawn_tasks(rng: np.random.Generator, classes: int, ways: int, count: int) -> list[tuple[int, ...]]:
    """So many different tasks."""
    found: list[tuple[int, ...]] = []
    while len(found) < count:
        new = tuple(sorted(rng.choice(classes, ways, replace=False).tolist()))
        if new not in found:
            found.append(new)
    return found


# --------------------------------------------------------------------------------------------------------------- networks


class Zoo(NamedTuple):
    """Trained networks, several of each task.

    Attributes:
      tasks: (t, c).
      each: k, how many there are of a task.
      networks: leaves (t·k, ...), those of a task beside one another.
      classes: (t·k, c), the task of each.
      centres: (t, c, f), the tasks' class means.
      spread: the standard deviation of all their numbers.
      mean: the mean network.
    """

    tasks: np.ndarray
    each: int
    networks: Any
    classes: Any
    centres: Any
    spread: float
    mean: Any

    def of(self, task: int) -> Any:
        """The networks of a task."""
        return jax.tree.map(lambda h: h[task * self.each : (task + 1) * self.each], self.networks)

    def nearest(self, x: Any) -> int:
        """The task whose class means are nearest to those of x (c, m, f)."""
        return int(jnp.square(self.centres - x.mean(1)).sum((1, 2)).argmin())


def zoo_of(tasks: np.ndarray, each: int, networks: Any, data: Any) -> Zoo:
    spread = float(jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(networks)]).std())
    mean = jax.tree.map(lambda x: x.mean(0), networks)
    classes = jnp.asarray(np.repeat(tasks, each, 0))
    return Zoo(tasks, each, networks, classes, data.mean(1)[jnp.asarray(tasks)], spread, mean)


class Generator:
    """The stages, compiled once for all seeds; networks come and go divided by the zoo's spread.

    Args:
      spec: of one network.
      shown: (c, m, f).
      vae, encoder, denoiser: as in `weight_diffusion`; for a `latent` of the encoder's size.
      times: of diffusion.
      steps: of the autoencoder, of alignment, of diffusion.
      batch: of all three.
    """

    def __init__(
        self, spec: Any, shown: tuple[int, int, int], vae: Any, encoder: Any, denoiser: Any, *, latent: int, times: int,
        steps: tuple[int, int, int], batch: int,
    ):  # fmt: skip
        self.shown, self.batch, self._vae = shown, batch, vae
        self.stages = t = weight_diffusion(
            spec, shown, latent=latent, times=times, denoiser=denoiser, vae=vae, encoder=encoder
        )
        vae_steps, align_steps, diffusion_steps = steps
        self._fits = {
            "vae": self._fit(lambda p, w, x, key: t.vae_loss(p, w, key), "vae/**", vae_steps),
            "alignment": self._fit(t.align_loss, "data/**", align_steps),
            # Of the aligned set encoder the last layer alone learns on, as in the paper. (All of it, without any norm, ended
            # at NaN for each of four seeds.)
            "diffusion": self._fit(t.diffusion_loss, ("denoiser/**", "data/params/head/*"), diffusion_steps),
            "unconditional": self._fit(
                lambda p, w, x, key: t.diffusion_loss(p, w, None, key), "denoiser/**", diffusion_steps
            ),
        }
        self._init = jax.jit(t.init)
        one = lambda weights, x, key: t.generate(weights, x, key)
        self._made = jax.jit(jax.vmap(one, (None, None, 0)))

    def _fit(self, loss: Any, parts: trees.Pattern, steps: int) -> Any:
        ways, shots, _ = self.shown
        rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-3, max(1, steps))))

        def run(weights: Any, w: Any, tasks: Any, data: Any, key: Any) -> Any:
            def shown(key: Any, classes: Any) -> Any:
                return data[classes[:, None], jax.random.randint(key, (ways, shots), 0, data.shape[1])]

            chosen = set(trees.matches(parts, trees.by_path(weights)))
            moving, still = trees.partition(weights, lambda path, _: path in chosen)

            def one(own: Any, key: Any) -> Any:
                rows, show, other = jax.random.split(key, 3)
                i = jax.random.randint(rows, (self.batch,), 0, w.shape[0])
                x = jax.vmap(shown)(jax.random.split(show, self.batch), tasks[i])
                return loss(trees.combine(own, still), w[i], x, other)

            own, losses = descend(one, moving, rule, jax.random.split(key, steps))
            return trees.combine(own, still), losses

        return jax.jit(run)

    def vectors(self, networks: Any, spread: float) -> Any:
        """(n, numbers), of networks with leaves (n, ...)."""
        return jax.vmap(self.stages.vectors.flatten)(networks) / spread

    def fitted(self, key: Any, zoo: Zoo, data: Any, *, unconditional: bool = True) -> dict[bool, Any]:
        """Weights of the conditional generator and of the unconditional one, which share an autoencoder."""
        keys = iter(jax.random.split(key, 5))
        w = self.vectors(zoo.networks, zoo.spread)

        def fit(name: str, weights: Any) -> Any:
            weights, losses = self._fits[name](weights, w, zoo.classes, data, next(keys))
            print(f"  {name}: {float(losses[0]):.3f} to {float(losses[-50:].mean()):.3f}", flush=True)
            return weights

        weights = fit("vae", self._init(next(keys)))
        weights = self.stages.calibrated(weights, w, key)
        out = {True: fit("diffusion", fit("alignment", weights))}
        return {**out, False: fit("unconditional", weights)} if unconditional else out

    def draw(self, weights: Any, x: Any, keys: Any, spread: float) -> Any:
        """A network for each key, for the examples x (c, m, f), or for none."""
        return jax.tree.map(lambda h: spread * h, self._made(weights, x, keys))

    def autoencoded(self, weights: Any, networks: Any, spread: float) -> Any:
        """Networks as the autoencoder gives them back: what no generator here can be better than."""
        w = spread * self._vae.apply(weights["vae"], self.vectors(networks, spread))
        return jax.vmap(self.stages.vectors.unflatten)(w)


# ------------------------------------------------------------------------------------------------------------------- heads


def logits(head: Any, x: Any) -> Any:
    return x @ head["kernel"] + head["bias"]


def loss(head: Any, x: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits(head, x), y).mean()


@jax.jit(static_argnums=3)
def trained(head: Any, x: Any, rate: Any, steps: int) -> Any:
    """Gradient descent on (c, m, f) examples of each class, all at once."""
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


def zero_head(features: int, ways: int) -> Any:
    return {"kernel": jnp.zeros((features, ways)), "bias": jnp.zeros(ways)}


def head_zoo(tasks: np.ndarray, each: int, data: Any, rng: np.random.Generator, *, per_class: int, steps: int) -> Zoo:
    """Heads trained from zero on `per_class` examples of each class, a draw of their own for each; in one program."""
    classes = jnp.asarray(np.repeat(tasks, each, 0))
    ways, features = tasks.shape[1], data.shape[-1]
    rows = jnp.asarray(rng.integers(0, data.shape[1], (len(classes), ways, per_class)))
    zero = zero_head(features, ways)
    one = lambda at: trained(zero, data[at[0][:, None], at[1]], 1.0, steps)
    heads = jax.jit(lambda c, r: jax.lax.map(one, (c, r), batch_size=100))(classes, rows)
    return zoo_of(tasks, each, heads, data)


def starts(generator: Generator, weights: Mapping[bool, Any], zoo: Zoo, x: Any, key: Any, count: int) -> dict[str, Any]:
    """Stacks of heads for a task of which x (c, m, f) is shown; several heads are averaged over in accuracy."""
    (ways, shots, features), spread = x.shape, zoo.spread
    keys, own = jax.random.split(key, count), x.reshape(-1, features)
    y = jnp.repeat(jnp.arange(ways), shots)
    best = lambda many: jax.tree.map(lambda h: h[jax.vmap(lambda h: loss(h, own, y))(many).argmin()][None], many)
    made = generator.draw(weights[True], x, keys, spread)
    free = generator.draw(weights[False], None, keys, spread)
    alone = lambda h: jax.tree.map(lambda v: v[None], h)
    return {
        "D2NWG": made,
        "D2NWG, best of 10": best(made),
        "unconditional": free,
        "unconditional, best of 10": best(free),
        "nearest head": zoo.of(zoo.nearest(x)),
        "mean head": alone(zoo.mean),
        "random": {
            "kernel": jax.vmap(lambda k: jax.random.normal(k, (features, ways)))(keys) / features**0.5,
            "bias": jnp.zeros((count, ways)),
        },
        "prototypes": alone(prototypes(x)),
    }


# ------------------------------------------------------------------------------------------------------ heads on tasks


class Case(NamedTuple):
    """A task with its stacks of heads by start, the examples shown (c, m, f), and those to score on (c, t, f)."""

    stacks: dict[str, Any]
    shown: Any
    scored: Any


def cases(
    start: Callable[[Any, Any], dict[str, Any]], tasks: np.ndarray, data: Any, scored: Any, *, shots: int, seed: int,
    stream: int, key: Any,
) -> Iterator[Case]:  # fmt: skip
    """Tasks as they are shown by a seed and a number of the set; `start` is `(x, key) -> stacks`."""
    for t, classes in enumerate(tasks):
        own = jax.random.fold_in(jax.random.fold_in(key, stream), t)
        picks = np.random.default_rng([seed, stream, t]).integers(0, data.shape[1], (len(classes), shots))
        x = data[classes[:, None], picks]
        yield Case(start(x, own), x, scored[jnp.asarray(classes)])


def chosen_rates(tuning: Iterable[Case], grid: Sequence[float]) -> dict[str, float]:
    """For each start the step size with the best mean accuracy after the last step."""
    tried: dict[str, dict[float, list[float]]] = {}
    for case in tuning:
        for name, h in case.stacks.items():
            for r in grid:
                found = scores(after(h, case.shown, r, STEPS[-1]), case.scored).mean()
                tried.setdefault(name, {}).setdefault(r, []).append(float(found))
    return {name: max(by, key=lambda r: statistics.mean(by[r])) for name, by in tried.items()}


def accuracies(held: Iterable[Case], rates: Mapping[str, float]) -> dict[str, list[float]]:
    """For each start the mean accuracy over tasks after each number of steps."""
    out: dict[str, list[list[float]]] = {}
    for case in held:
        for name, h in case.stacks.items():
            found = [scores(after(h, case.shown, rates[name], n), case.scored).mean() for n in STEPS]
            out.setdefault(name, []).append([float(f) for f in found])
    return {name: np.mean(x, 0).tolist() for name, x in out.items()}


def zoo_accuracy(zoo: Zoo, some: Iterable[int], scored: Any) -> float:
    """The mean accuracy of the zoo's own heads on these of its tasks."""
    return statistics.mean(float(scores(zoo.of(i), scored[jnp.asarray(zoo.tasks[i])]).mean()) for i in some)


# ------------------------------------------------------------------------------------------------------------------ report


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def gap(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Of two accuracies by seeds, in points: mean and half-width of the interval of a - b."""
    return study.interval([100 * (x - y) for x, y in zip(a, b, strict=True)])


def told(pair: tuple[float, float]) -> str:
    return f"{pair[0]:+.2f} ± {pair[1]:.2f} points"


def at(found: Sequence[Mapping[str, Sequence[float]]], name: str, step: int) -> list[float]:
    """A start's accuracy after so many steps, by seeds."""
    return [r[name][STEPS.index(step)] for r in found]


def rows_of(
    found: Sequence[Mapping[str, Sequence[float]]], rates: Sequence[Mapping[str, float]]
) -> list[dict[str, Any]]:
    """A row for each start."""
    return [
        {
            "method": n,
            **{f"{k} steps": percent(at(found, n, k)) for k in STEPS},
            "details": {"accuracy": [r[n] for r in found], "rates": [r[n] for r in rates]},
        }
        for n in found[0]
    ]


def head_claims(
    found: Sequence[Mapping[str, Sequence[float]]], inside: Sequence[float], theirs: Sequence[float]
) -> list[dict[str, str]]:
    """What both experiments claim of heads; `inside` is D2NWG on the zoo's tasks, `theirs` the zoo's accuracy there."""
    best, of = "D2NWG, best of 10", lambda name, step: at(found, name, step)
    over_free, free = gap(of("D2NWG", 0), of("unconditional", 0)), gap(of("unconditional", 0), of("random", 0))
    near, five = gap(of(best, 0), of("nearest head", 0)), gap(of(best, 5), of("random", 5))
    own, simple = gap(inside, theirs), gap(of(best, 0), of("prototypes", 0))
    return [
        record.claim(
            "D2NWG is at least 20 points over the unconditional generator", over_free[0] >= 20, told(over_free)
        ),
        record.claim("The unconditional generator is within 10 points of random heads", abs(free[0]) <= 10, told(free)),
        record.claim("Best of 10 is at least as good as the nearest head of the zoo", near[0] >= 0, told(near)),
        record.claim("After 5 steps best of 10 is at least 5 points over the random start", five[0] >= 5, told(five)),
        record.claim("On the zoo's tasks generated heads are within 2 points of the zoo's", own[0] >= -2, told(own)),
        record.claim("Best of 10 is at least as good as prototypes", simple[0] >= 0, told(simple)),
    ]


def curves(found: Sequence[Mapping[str, Sequence[float]]], what: str) -> Callable[[Any], None]:
    """A figure of accuracy over steps, a line for each start."""

    def draw(axes: Any) -> None:
        for n in found[0]:
            y = [100 * statistics.mean(at(found, n, k)) for k in STEPS]
            axes.plot(range(len(STEPS)), y, "o-", markersize=3, label=n)
        axes.set(
            xticks=range(len(STEPS)), xticklabels=STEPS, xlabel=f"steps on five {what} a class", ylabel="accuracy, %"
        )
        axes.legend(fontsize=7)

    return draw
