"""Tunable convolutions (Maggioni et al., CVPR 2023) in small: one denoiser with a slider, on photographs.

    python experiments/hyper/tunable_conv.py            all of it: forty to fifty minutes on one core
    python experiments/hyper/tunable_conv.py --smoke    every part once in small; writes nothing unless --out is given

Two photographs (scikit-learn's china and flower, grey): patches of 24 x 24 out of their left 60 % train, out of the next 10 %
validate, and the right 30 % test, on patches fixed beforehand. Gaussian noise of σ = 25/255 is drawn anew at each step. The
network is residual, five 3 x 3 convolutions of 16 channels. Two pairs of objectives, ω₁ + ω₂ = 1:

    A    squared error to the clean patch, and to the noisy one. The best answer at ω is ω₁ E[clean | noisy] + ω₂ noisy
    B    squared error to the clean patch, and 1 - SSIM (windows of 7) to it, balanced at the start

Methods, each 1,000 steps of 16 patches, Adam with a cosine:

    tunable            "mlp": an affine map of ω for each convolution; ω uniform for each patch
    tunable, linear    α = ω
    single             a network for each ω of {0, 1/4, 1/2, 3/4, 1}: five networks, the reference
    DNI                weights between two networks, for ω₁ = 1 and, trained on from it as long again, ω₁ = 0
    plane              ω₁ as a second input channel, ω uniform for each patch

One rate out of three for each method by the validation patches' weighted loss, the mean over the five ω, of a seed that is not
measured; five seeds; the test patches are looked at once for each network and ω.

Stated before running, each to be reported as holding or not, by means over seeds; losses are ω-weighted objectives on the test
patches (A: what is over the least of any answer, ω₁ ω₂ |noisy - clean|², is told apart in the file):
  1. A: at both ends "tunable" is within 0.3 dB (of the end's own squared error) of the single networks.
  2. A: in between (1/4, 1/2, 3/4) its mean loss is at most DNI's.
  3. B: in between its mean loss is at most DNI's.
  4. A: the noise left grows with ω₂ at every step of the slider.
  5. For one ω its program takes at most 1 % more operations than the plain network's.
  6. "plane" is not better than "tunable" in the mean over A's five ω (at this size it may well be).
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import study
from sklearn.datasets import load_sample_images

from jaxpeft import trees
from jaxpeft.files import write_atomically
from jaxpeft.hyper import balanced, multi_loss, per_example, sample_omega, tunable_conv
from jaxpeft.updates import descend

SIGMA = 25 / 255
OMEGAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # ω₁
MODES: dict[str, Any] = {"tunable": "mlp", "tunable, linear": "linear"}
METHODS = ("tunable", "tunable, linear", "single", "DNI", "plane")


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    side: int = 24
    channels: int = 16
    layers: int = 5
    steps: int = 1000
    batch: int = 16
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    held: int = 128
    seeds: int = 5


SMOKE = Setup(side=8, channels=2, layers=3, steps=2, batch=2, rates=(1e-3,), held=4, seeds=2)


class Conv(nn.Module):
    """A 3 x 3 convolution as a product with nine shifted inputs: ten times faster in training by XLA on a CPU."""

    features: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        rows, columns = x.shape[1:3]
        wide = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [wide[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
        return jnp.concatenate(shifted, -1) @ kernel.reshape(-1, self.features) + bias


class Net(nn.Module):
    """Noisy patches (b, y, x, 1), and perhaps further planes, to clean ones: what is taken away."""

    channels: int
    layers: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = x
        for i in range(self.layers - 1):
            y = nn.relu(Conv(self.channels, name=f"conv_{i}")(y))
        return x[..., :1] - Conv(1, name="out")(y)


# ------------------------------------------------------------------------------------------------------------ photographs


def photographs() -> list[np.ndarray]:
    """Grey, in [0, 1]."""
    return [
        np.asarray(x, np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255
        for x in load_sample_images().images
    ]


def patches(photos: list[np.ndarray], part: tuple[float, float], count: int, side: int, seed: int) -> Any:
    """(count, side, side, 1) patches from columns within these parts of each photograph's width."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(count):
        photo = photos[rng.integers(len(photos))]
        low, high = (int(p * photo.shape[1]) for p in part)
        y, x = rng.integers(photo.shape[0] - side), rng.integers(low, high - side)
        out.append(photo[y : y + side, x : x + side, None])
    return jnp.asarray(np.stack(out))


# ------------------------------------------------------------------------------------------------------------- objectives


def squared(to: str) -> Any:
    return lambda f, clean, noisy: jnp.square(f - (clean if to == "clean" else noisy)).mean((1, 2, 3))


def dissimilarity(f: Any, clean: Any, noisy: Any) -> Any:
    """1 - SSIM, windows of 7 without weights."""
    mean = lambda x: nn.avg_pool(x, (7, 7), (1, 1))
    a, b = mean(f), mean(clean)
    va, vb, ab = mean(f * f) - a * a, mean(clean * clean) - b * b, mean(f * clean) - a * b
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * a * b + c1) * (2 * ab + c2) / ((a * a + b * b + c1) * (va + vb + c2))
    return 1 - ssim.mean((1, 2, 3))


PAIRS = {"A": [squared("clean"), squared("noisy")], "B": [squared("clean"), dissimilarity]}


# --------------------------------------------------------------------------------------------------------------- training


class Bench:
    """One pair of objectives: programs whose starts, rates and ω are arguments."""

    def __init__(self, s: Setup, pair: str, train: Any, held: dict[str, Any]):
        self.s, self.train = s, train
        self.net = Net(s.channels, s.layers)
        losses = PAIRS[pair]
        clean = held["validation"]
        noisy = clean + SIGMA * jax.random.normal(jax.random.key(3), clean.shape)
        self.scales = np.asarray(balanced(losses, noisy, clean, noisy)) if pair == "B" else np.ones(2)
        self.loss = multi_loss(losses, [float(x) for x in self.scales])
        self.objectives = losses
        self.held = {k: (x, x + SIGMA * jax.random.normal(jax.random.key(4), x.shape)) for k, x in held.items()}
        start = lambda key: self.net.init(key, jnp.zeros((1, s.side, s.side, 1)))
        self.hyper = {n: tunable_conv(start, mode=m) for n, m in MODES.items()}
        self.start = {n: jax.jit(h.init) for n, h in self.hyper.items()}
        self.start["single"] = jax.jit(start)
        self.start["plane"] = jax.jit(lambda key: self.net.init(key, jnp.zeros((1, s.side, s.side, 2))))
        self._fit = {n: self._trainer(self.apply(n)) for n in ("tunable", "tunable, linear", "single", "plane")}
        self._scores = jax.jit(self._score)

    def apply(self, name: str) -> Any:
        """`(weights, ω (b, 2), noisy) -> answers`."""
        if name in self.hyper:
            return per_example(self.net.apply, self.hyper[name])
        if name == "plane":

            def with_plane(w: Any, omega: Any, x: Any) -> Any:
                plane = jnp.broadcast_to(omega[:, :1, None, None], x.shape)
                return self.net.apply(w, jnp.concatenate([x, plane], -1))

            return with_plane
        return lambda w, omega, x: self.net.apply(w, x)

    def _trainer(self, apply: Any) -> Any:
        s = self.s

        def run(weights: Any, rate: Any, fixed: Any, key: Any, clean: Any) -> Any:
            """`fixed`: ω₁, or under 0 for a new ω for each patch."""
            rule = optax.adam(lambda n: rate * optax.cosine_decay_schedule(1.0, max(1, s.steps))(n))

            def loss(weights: Any, key: Any) -> Any:
                rows, noise, draw = jax.random.split(key, 3)
                x = clean[jax.random.randint(rows, (s.batch,), 0, clean.shape[0])]
                noisy = x + SIGMA * jax.random.normal(noise, x.shape)
                one = jnp.broadcast_to(jnp.stack([fixed, 1 - fixed]), (s.batch, 2))
                omega = jnp.where(fixed < 0, sample_omega(draw, s.batch, 2), one)
                return self.loss(omega, apply(weights, omega, noisy), x, noisy).mean()

            weights, losses = descend(loss, weights, rule, jax.random.split(key, s.steps))
            return weights, losses[-20:].mean()

        return jax.jit(run)

    def fit(self, name: str, start: Any, rate: float, fixed: float, seed: int) -> Any:
        weights, last = self._fit[name](start, rate, fixed, jax.random.fold_in(jax.random.key(9), seed), self.train)
        assert np.isfinite(float(last)), f"{name} diverged"
        return weights

    def networks(self, name: str, rate: float, seed: int) -> list[Any]:
        """For each ω of the slider an ordinary network's parameters."""
        key = jax.random.fold_in(jax.random.key(11), seed)
        if name in self.hyper:
            w = self.fit(name, self.start[name](key), rate, -1.0, seed)
            return [self.hyper[name].apply(w, jnp.array([o, 1 - o])) for o in OMEGAS]
        if name == "plane":
            return [self.fit(name, self.start[name](key), rate, -1.0, seed)] * len(OMEGAS)
        if name == "single":
            return [self.fit(name, self.start[name](key), rate, o, seed) for o in OMEGAS]
        first = self.fit("single", self.start["single"](key), rate, 1.0, seed)
        second = self.fit("single", first, rate, 0.0, seed + 50)
        return [jax.tree.map(lambda a, b, o=o: o * a + (1 - o) * b, first, second) for o in OMEGAS]

    def _score(self, params: Any, omega: Any, clean: Any, noisy: Any) -> Any:
        """The weighted loss, both objectives, and the share of the noise that is left."""
        planes = 1 if params["params"]["conv_0"]["kernel"].shape[2] == 1 else 2
        o = jnp.broadcast_to(jnp.stack([omega, 1 - omega]), (clean.shape[0], 2))
        f = self.apply("single" if planes == 1 else "plane")(params, o, noisy)
        each = [one(f, clean, noisy).mean() for one in self.objectives]
        left = jnp.vdot(f - clean, noisy - clean) / jnp.vdot(noisy - clean, noisy - clean)
        return self.loss(o, f, clean, noisy).mean(), each[0], each[1], left

    def scores(self, params: Any, omega: float, split: str) -> tuple[float, ...]:
        return tuple(map(float, self._scores(params, omega, *self.held[split])))


def main() -> None:
    began, args = time.perf_counter(), study.arguments((__doc__ or "").splitlines()[0])
    s = SMOKE if args.smoke else Setup()
    photos = photographs()
    train = patches(photos, (0, 0.6), 4096 if not args.smoke else 16, s.side, 0)
    held = {
        "validation": patches(photos, (0.6, 0.7), s.held, s.side, 1),
        "test": patches(photos, (0.7, 1.0), 4 * s.held, s.side, 2),
    }
    rows, found, tried, nets = [], {}, {}, {}
    for pair in PAIRS:
        bench = Bench(s, pair, train, held)
        for name in METHODS:
            mean = {
                rate: statistics.mean(
                    bench.scores(p, o, "validation")[0] for p, o in zip(bench.networks(name, rate, 1000), OMEGAS)
                )
                for rate in s.rates
            }
            rate = min(mean, key=mean.__getitem__)
            tried[f"{pair}, {name}"] = mean
            seeds = []
            for seed in range(s.seeds):
                made = bench.networks(name, rate, seed)
                nets[pair, name] = made
                seeds.append([bench.scores(p, o, "test") for p, o in zip(made, OMEGAS)])
            found[pair, name] = np.array(seeds)  # (seeds, ω, 4)
            by = found[pair, name][..., 0]
            rows.append(
                {
                    "method": f"{pair}, {name}",
                    "parameters": trees.count(nets[pair, name][0]),
                    "rate": rate,
                    **{f"loss at {o:g}": float(x) for o, x in zip(OMEGAS, by.mean(0))},
                    "details": {"scores": found[pair, name].tolist()},
                }
            )
            print(rows[-1]["method"], [round(float(x), 6) for x in by.mean(0)], flush=True)

    def db(omega: int, objective: int) -> float:
        """tunable over single, of one objective's error (a floor of 1e-6, 60 dB, where the noisy patch itself is asked for)."""
        ours, single = (found["A", name][:, omega, objective].mean() + 1e-6 for name in ("tunable", "single"))
        return float(10 * np.log10(ours / single))

    ends = {"ω₁ = 1": db(-1, 1), "ω₁ = 0": db(0, 2)}
    inner = lambda pair, name: found[pair, name][:, 1:-1, 0].mean(1)
    left = found["A", "tunable"][..., 3].mean(0)
    over = {p: study.interval((100 * (inner(p, "DNI") / inner(p, "tunable") - 1)).tolist()) for p in PAIRS}
    plane = study.interval(
        (100 * (found["A", "plane"][..., 0].mean(1) / found["A", "tunable"][..., 0].mean(1) - 1)).tolist()
    )
    operations = counted(s)
    told = lambda pair: f"{pair[0]:+.1f} ± {pair[1]:.1f} %"
    claims = [
        record.claim(
            "A: at both ends tunable is within 0.3 dB of the single networks",
            max(ends.values()) <= 0.3,
            ", ".join(f"{k}: {v:+.2f} dB" for k, v in ends.items()),
        ),
        record.claim(
            "A: in between its loss is at most DNI's", over["A"][0] >= 0, f"DNI's is {told(over['A'])} over it"
        ),
        record.claim(
            "B: in between its loss is at most DNI's", over["B"][0] >= 0, f"DNI's is {told(over['B'])} over it"
        ),
        record.claim(
            "A: the noise left grows with ω₂ at every step of the slider",
            bool((np.diff(left) < 0).all()),
            ", ".join(f"{1 - o:g}: {x:.2f}" for o, x in zip(OMEGAS, left)),
        ),
        record.claim(
            "For one ω its program takes at most 1 % more operations than the plain network's",
            operations["one"] <= 1.01 * operations["plain"],
            "{:.4f} of it; an ω a patch: {:.2f}".format(
                *(operations[k] / operations["plain"] for k in ("one", "mixed"))
            ),
        ),
        record.claim("A plane of ω is not better than tunable on A", plane[0] >= 0, f"its loss is {told(plane)} over"),
    ]

    def draw(axes: Any) -> None:
        base = found["A", "single"][..., 0].mean(0)
        for name in METHODS:
            ratio = found["A", name][..., 0].mean(0) / np.maximum(base, 1e-9)
            axes.plot(OMEGAS[1:], ratio[1:], "o-", markersize=3, label=name)
        axes.set(xlabel="ω₁ (1: most denoising)", ylabel="pair A: weighted loss over the single networks'")
        axes.legend(fontsize=7)

    study.finish(
        "tunable-conv", args, paper="Maggioni et al.: Tunable Convolutions with Parametric Multi-Loss Optimization, CVPR 2023",
        setup=s, rows=rows, claims=claims, began=began, figure=draw, operations=operations, validation_by_rate=tried,
        noise_left=left.tolist(),
    )  # fmt: skip
    out = args.out or (None if args.smoke else record.RESULTS / "tunable-conv.json")
    if out is not None:
        slider(Net(s.channels, s.layers), nets["A", "tunable"], photos[0], out.with_name(f"{out.stem}-slider.png"))


def counted(s: Setup) -> dict[str, float]:
    """Operations of the plain network, of a tunable one at one ω, and with an ω for each patch, by the compiler."""
    net = Net(s.channels, s.layers)
    hyper = tunable_conv(lambda key: net.init(key, jnp.zeros((1, s.side, s.side, 1))))
    shape = lambda *d: jax.ShapeDtypeStruct(d, jnp.float32)
    x, weights = shape(s.batch, s.side, s.side, 1), jax.eval_shape(hyper.init, jax.random.key(0))
    flops = lambda f, *a: study.counted(jax.jit(f).lower(*a).compile())["gflop"]
    return {
        "plain": flops(net.apply, hyper.target, x),
        "one": flops(lambda w, o, x: net.apply(hyper.apply(w, o), x), weights, shape(2), x),
        "mixed": flops(per_example(net.apply, hyper), weights, shape(s.batch, 2), x),
    }


def slider(net: Any, networks: list[Any], photo: np.ndarray, out: Path) -> None:
    """The steps of the slider on a part of a photograph."""
    clean = photo[150:278, -170:-42]
    noisy = jnp.asarray(clean + SIGMA * np.random.default_rng(0).normal(size=clean.shape), jnp.float32)
    shown = [
        np.asarray(noisy),
        *(np.asarray(jnp.asarray(net.apply(p, noisy[None, ..., None])))[0, ..., 0] for p in networks),
        clean,
    ]
    fig, axes = study.plt.subplots(1, len(shown), figsize=(2 * len(shown), 2.3))
    for ax, image, title in zip(axes, shown, ["noisy", *(f"ω₁ = {o:g}" for o in OMEGAS), "clean"]):
        ax.imshow(image, cmap="gray", vmin=0, vmax=1)
        ax.set_title(title, fontsize=8)
        ax.axis("off")
    fig.tight_layout()
    write_atomically(out, lambda p: fig.savefig(p, format="png", dpi=150))
    study.plt.close(fig)


if __name__ == "__main__":
    main()
