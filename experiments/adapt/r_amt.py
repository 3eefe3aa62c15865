"""R-AMT, regularised mask tuning (Zheng et al., ICCV 2023), in small: which weights of a zero-shot classifier to switch off.

    python experiments/adapt/r_amt.py            all of it: about half an hour on two cores
    python experiments/adapt/r_amt.py --smoke    every part once in small; writes nothing unless --out is given

A classifier of the kind of CLIP: a ViT (4 layers, width 64) whose projected image is compared, by its cosine times 20, with
MiniLM's embeddings of the classes' names. It is trained once on MNIST and Fashion-MNIST together (20 names) and kept in the
cache. The target is scikit-learn's digits: other pictures (8 x 8, brought to size), the names of MNIST, so the model answers
without training. Then 1, 4 or 16 examples a class: masks on the attention's projections, by AMT and by R-AMT, l = 0.3 and 1;
a linear probe on the frozen image features; and learned class vectors (in CoOp's place). For each arm and number of shots one
rate out of a grid, by the validation split of one draw of examples that is not measured; then ten draws, for each a look at the
test split, and at the MNIST and Fashion-MNIST test images: how often the answer is still the zero-shot model's.

Stated before running, each to be reported as holding or not, R-AMT being the one of l = 0.3 and 1 that validates better:
  1. At 16 shots R-AMT is over zero-shot and over the linear probe.
  2. It switches off under a tenth of the masked weights.
  3. Over all shots R-AMT is at least as good as AMT, and its gain is larger at 1 shot than at 16.
  4. It forgets less: on the base's own test images it agrees more often with the zero-shot model than AMT does.
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
import record
import study
from pretraining import kept

from jaxpeft import adapt, data, full, r_amt, train
from jaxpeft.adapt.r_amt import regularised, switched_off
from jaxpeft.models import load_model

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLOTHES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
NAMES = (*(f"the handwritten digit {d}" for d in DIGITS), *(f"a picture of a {c}" for c in CLOTHES))
SCALE = 20.0


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    vit: bases.Vit = dataclasses.field(default_factory=lambda: bases.Vit(layers=4, width=64, heads=4, steps=1500))
    clothes: int = 7200
    shots: tuple[int, ...] = (1, 4, 16)
    steps: int = 150
    batch: int = 32
    mask_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    strengths: tuple[float, ...] = (0.3, 1.0)
    seeds: int = 10


SMOKE = Setup(dataclasses.replace(bases.SMALL_VIT, examples=80), 80, (1,), 2, 8, (1e-3,), (1e-2,), (1.0,), 2)


def names() -> np.ndarray:
    """(20, 384): unit vectors."""
    folder = data.model_folder("all-MiniLM-L6-v2")
    model, params = load_model(folder)
    ids, mask = data.Tokenizer(folder).encode(list(NAMES), 16).padded(np.arange(len(NAMES)), 16, 0)
    hidden = jax.jit(model.apply)(params, ids, mask)
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    return np.asarray(mean / jnp.linalg.norm(mean, axis=-1, keepdims=True))


def model_of(s: Setup):
    """`(apply_fn, init)`: logits for the names in `params["names"]`."""
    image = bases.vit_model(s.vit, 384)

    def apply_fn(params: Any, x: Any) -> Any:
        f = image.apply(params["image"], x)
        return SCALE * (f / jnp.linalg.norm(f, axis=-1, keepdims=True)) @ params["names"].T

    return apply_fn, lambda: jax.jit(image.init)(jax.random.key(0), jnp.zeros((1, s.vit.size, s.vit.size, 1)))


def pretrained(s: Setup, apply_fn: Any, start: Any, parts: Any, keep: bool) -> Any:
    """The image tower's parameters."""
    params = {"image": start, "names": jnp.asarray(names())}
    problem = study.Problem(apply_fn, params, {"train": study.images_of(*parts["train"])}, train.image_classification())
    method = full(at="image/**")

    def run(tower: Any) -> Any:
        adapted, budget = adapt(apply_fn, method), study.Budget(steps=s.vit.steps, batch=s.vit.batch)
        delta = adapted.init(jax.random.key(0), params, parts["train"][0][:1])
        rows = study.rows_of(len(parts["train"][1]), s.vit.steps, s.vit.batch, 0)
        fit = study.trainer(adapted, problem, study.Arm(method), budget)
        delta, bad, _ = fit(params, delta, s.vit.rate, 0, problem.examples["train"], rows)
        assert int(bad) < 0
        return adapted.merge(params, delta)["image"]

    what = {**dataclasses.asdict(s.vit), "clothes": s.clothes, "names": NAMES, "scale": SCALE}
    return {**params, "image": kept("clip-like", what, start, run, keep)}


def arms(s: Setup, apply_fn: Any, task: train.Task) -> dict[str, tuple[study.Arm, Any]]:
    """Name -> (arm, the method's adapted model)."""
    masks = r_amt(at="image/**/attention/{query,key,value,out}/kernel")
    adapted = adapt(apply_fn, masks)
    out = {
        "learned class vectors": (study.Arm(full("names", form="difference"), s.rates), None),
        "AMT": (study.Arm(masks, s.mask_rates, gradient=regularised(adapted, task, 0.0)), None),
    }
    for l in s.strengths:
        out[f"R-AMT, l={l:g}"] = (study.Arm(masks, s.mask_rates, gradient=regularised(adapted, task, l)), None)
    return {n: (a, adapt(apply_fn, a.method)) for n, (a, _) in out.items()}


def probe(s: Setup) -> tuple[Any, Any, study.Arm]:
    """The linear probe: a model whose head reads the frozen unit features."""
    image = bases.vit_model(s.vit, 384)

    def apply_fn(params: Any, x: Any) -> Any:
        f = image.apply(params["image"], x)
        return SCALE * (f / jnp.linalg.norm(f, axis=-1, keepdims=True)) @ params["head"]["kernel"]

    return apply_fn, {"head": {"kernel": jnp.zeros((384, 10))}}, study.Arm(full("head/**"), s.rates)


def main() -> None:
    args = study.arguments("R-AMT in small; see the file's first lines.")
    s, began = SMOKE if args.smoke else Setup(), time.perf_counter()
    few = 80 if args.smoke else 0
    mnist = bases.images("mnist-5k", s.vit.size, examples=few)
    fashion = bases.images("fashion-mnist", s.vit.size, examples=s.clothes)
    digits = bases.images("digits", s.vit.size, examples=few, split_seed=2)
    both = {k: tuple(np.concatenate(x) for x in zip(mnist[k], (fashion[k][0], fashion[k][1] + 10))) for k in mnist}
    apply_fn, start = model_of(s)
    params = pretrained(s, apply_fn, start(), both, keep=not args.smoke)
    here = {**params, "names": params["names"][:10]}
    task = train.image_classification()
    examples = {k: study.images_of(*digits[k]) for k in ("validation", "test")}
    old = study.images_of(both["test"][0][:2000], both["test"][1][:2000])
    zero_shot = jax.jit(lambda p, x: jax.lax.map(lambda i: apply_fn(p, i[None])[0], x).argmax(-1))
    answers = zero_shot(params, old.image)
    chance = float(np.mean(np.asarray(zero_shot(here, examples["test"].image)) == digits["test"][1]))
    source = float(np.mean(np.asarray(answers) == np.asarray(old.label)))
    print(f"zero-shot: {100 * chance:.1f} % of the digits; {100 * source:.1f} % of its own test images", flush=True)

    probed, extra, probe_arm = probe(s)
    every = {n: (apply_fn, here, a, adapted) for n, (a, adapted) in arms(s, apply_fn, task).items()}
    every["linear probe"] = (probed, {**here, **extra}, probe_arm, adapt(probed, probe_arm.method))
    rows: list[dict[str, Any]] = []
    for k in s.shots:
        for name, (fn, own, arm, adapted) in every.items():
            rows.append(measured(name, k, fn, own, arm, adapted, s, digits, examples, old, answers, params))
    best = {}
    for k in s.shots:
        mine = [r for r in rows if r["shots"] == k and r["arm"].startswith("R-AMT")]
        best[k] = max(mine, key=lambda r: r["validation"])
    by = {(r["arm"], r["shots"]): r for r in rows}
    study.finish(
        "r-amt",
        args,
        paper="R-AMT, Zheng et al., ICCV 2023",
        setup=s,
        rows=[{"method": f"{r['arm']}, {r['shots']} shots", **r} for r in rows],
        claims=verdicts(s, best, by, chance),
        began=began,
        zero_shot={"digits": chance, "source": source},
    )


def measured(name, k, fn, params, arm, adapted, s, digits, examples, old, answers, base) -> dict[str, Any]:
    """One row: the rate by validation, then `seeds` draws of examples."""
    began = time.perf_counter()
    problem = study.Problem(fn, params, {}, train.image_classification())
    fit = study.trainer(adapted, problem, arm, study.Budget(steps=s.steps, batch=s.batch))
    score = study.scorer(adapted, problem)
    init = jax.jit(adapted.init)
    whole = {**params, "names": base["names"]}

    @jax.jit
    def agree(delta: Any) -> Any:
        logits = jax.lax.map(lambda x: adapted.apply(whole, delta, x[None])[0], old.image)
        return jnp.mean(logits.argmax(-1) == answers)

    def run(rate: float, seed: int) -> Any:
        shots = study.images_of(*bases.per_class(digits["train"], k, seed))
        n = len(shots.label)
        rows = study.rows_of(n, s.steps, min(s.batch, n), seed)
        delta, bad, _ = fit(params, init(jax.random.key(seed), params, shots.image[:1]), rate, seed, shots, rows)
        return delta, int(bad) < 0

    def accuracy(delta: Any, good: bool, split: str) -> float:
        return float(np.mean(np.asarray(score(params, delta, examples[split])))) if good else 0.0

    tried = {rate: accuracy(*run(rate, 1000), "validation") for rate in arm.rates}
    rate = max(tried, key=tried.__getitem__)
    done = [run(rate, seed) for seed in range(s.seeds)]
    test = [accuracy(*d, "test") for d in done]
    row = {
        "arm": name,
        "shots": k,
        "rate": rate,
        "validation": tried[rate],
        "test": test,
        "mean": statistics.mean(test),
        "std": statistics.stdev(test),
    }
    if "AMT" in name:
        row["switched_off"] = statistics.mean(float(switched_off(d)) for d, _ in done)
        row["agreement"] = [float(agree(d)) for d, _ in done]
        row["mean_agreement"] = statistics.mean(row["agreement"])
    print(
        f"{k:>2} shots  {name:22} rate {rate:<7g} {100 * row['mean']:.2f} ± {100 * row['std']:.2f} %  "
        + (f"off {row['switched_off']:.2%}  agrees {row['mean_agreement']:.2%}  " if "switched_off" in row else "")
        + f"{time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return row


def verdicts(s: Setup, best: dict[int, Any], by: dict[Any, Any], chance: float) -> list[dict[str, str]]:
    """The docstring's claims against the rows."""
    most, least = max(s.shots), min(s.shots)
    over_probe = study.difference(best[most], by["linear probe", most])
    over_zero = study.interval([100 * (t - chance) for t in best[most]["test"]])
    gains = {k: study.difference(best[k], by["AMT", k]) for k in s.shots}
    mean_gain = study.interval(
        [statistics.mean(100 * (best[k]["test"][i] - by["AMT", k]["test"][i]) for k in s.shots) for i in range(s.seeds)]
    )
    kept = study.interval(
        [
            statistics.mean(100 * (best[k]["agreement"][i] - by["AMT", k]["agreement"][i]) for k in s.shots)
            for i in range(s.seeds)
        ]
    )
    off = max(best[k]["switched_off"] for k in s.shots)
    said = "; ".join(f"{k} shots: {m:+.2f} ± {h:.2f}" for k, (m, h) in gains.items())
    return [
        record.claim(
            f"At {most} shots R-AMT is over zero-shot and over the linear probe",
            over_zero[0] > 0 and over_probe[0] > 0,
            f"{over_zero[0]:+.2f} ± {over_zero[1]:.2f} and {over_probe[0]:+.2f} ± {over_probe[1]:.2f} points",
        ),
        record.claim("It switches off under a tenth of the masked weights", off < 0.1, f"at most {off:.2%}"),
        record.claim(
            "R-AMT is at least as good as AMT over all shots, and gains more with few",
            mean_gain[0] >= 0 and gains[least][0] >= gains[most][0],
            f"{mean_gain[0]:+.2f} ± {mean_gain[1]:.2f} points; {said}",
        ),
        record.claim(
            "On the base's own test images it agrees more often with the zero-shot model than AMT",
            kept[0] > 0,
            f"{kept[0]:+.2f} ± {kept[1]:.2f} points",
        ),
    ]


if __name__ == "__main__":
    main()
