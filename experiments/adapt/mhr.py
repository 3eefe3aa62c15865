"""Multi-head adapter routing (Caccia et al., NeurIPS 2023), in small: skills from many tasks, few examples of new ones.

    python experiments/adapt/mhr.py            all of it: about forty minutes on two cores
    python experiments/adapt/mhr.py --smoke    every part once in small; writes nothing unless --out is given

A ViT (4 layers, width 64) is trained once on Fashion-MNIST and kept in the cache. Tasks are pairs of digits to be told apart,
all 45 of MNIST and all 45 of scikit-learn's digits, with one head of two logits for all: what an image's logit means is up to
the task. 70 tasks train each method together (mixed batches); of the other 20, five choose the rate of the second stage and
fifteen are measured: 16 examples a class, each task on its own, then its test examples. Methods of the first stage, of equal
size but for the last: one LoRA for all tasks (its rank that of all skills together), Poly and MHR (8 skills of rank 2, MHR
with 8 heads), and a LoRA for each task. The second stage trains all of a method, its router alone (-z), or the average of its
skills (-mu); the head stays. Rates: the first stage's by its own training tasks' validation examples, the second's by the
five tuning tasks; five seeds.

Stated before running, each to be reported as holding or not, by means of paired differences over seeds:
  1. Training loss: MHR at most Poly's, Poly below the shared LoRA's, in at least four of five seeds.
  2. Few-shot accuracy: MHR at least Poly, Poly at least the shared LoRA.
  3. MHR-mu within one point of MHR, and over the shared LoRA.
  4. MHR-z over Poly-z.
  5. Gradients of different tasks agree (mean pairwise cosine, averaged over three moments of training) more in MHR than in
     Poly, and more there than in the shared LoRA.
"""

import dataclasses
import itertools
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
from jax.flatten_util import ravel_pytree

from jaxpeft import adapt, chain, head, lora, mhr, per_task, poly, train
from jaxpeft.adapt.mhr import new_tasks, to_average

AT = ("**/attention/{query,key,value,out}/kernel", "**/mlp/{up,down}/kernel")


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    base: bases.Vit = dataclasses.field(default_factory=lambda: bases.Vit(layers=4, width=64, heads=4))
    classes: int = 10
    held_out: int = 20
    tuning_tasks: int = 5
    rank: int = 2
    skills: int = 8
    heads: int = 8
    steps: int = 600
    batch: int = 64
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    shots: int = 16
    few_steps: int = 100
    few_batch: int = 32
    few_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: int = 5
    aligned_tasks: int = 16


SMOKE = Setup(dataclasses.replace(bases.SMALL_VIT, width=32), 3, 2, 1, 1, 2, 2, 3, 8, (3e-3,), 2, 2, 4, (3e-3,), 2, 2)


# ------------------------------------------------------------------------------------------------------------ the tasks


def pairs(s: Setup) -> dict[str, list[Any]]:
    """Split -> (images, labels 0 and 1) of each task; MNIST's pairs and the digits' take turns in a random order."""
    sets = [bases.images(name, s.base.size) for name in ("mnist-5k", "digits")]
    every = [(k, *pair) for k in range(2) for pair in itertools.combinations(range(s.classes), 2)]
    order = np.random.default_rng(0).permutation(len(every))
    out: dict[str, list[Any]] = {}
    for split in ("train", "validation", "test"):
        out[split] = [bases.of_classes(sets[every[i][0]][split], every[i][1:]) for i in order]
    return out


def joined(parts: list[Any], limit: int = 0) -> Any:
    """One batch of the examples of several tasks, in the order of the list; `limit` of each at most."""
    cut = [(x[: limit or len(x)], y[: limit or len(y)]) for x, y in parts]
    task = np.repeat(np.arange(len(cut)), [len(y) for _, y in cut])
    return study.images_of(np.concatenate([x for x, _ in cut]), np.concatenate([y for _, y in cut]), task)


def shots_of(parts: list[Any], count: int, seed: int) -> Any:
    """`count` examples a class of each task, stacked: leaves (tasks, 2 count, ...)."""
    few = [study.images_of(*bases.per_class(p, count, seed)) for p in parts]
    return jax.tree.map(lambda *x: jnp.stack(x), *few)


# -------------------------------------------------------------------------------------------------------- first stage


def methods(s: Setup, tasks: int) -> dict[str, Any]:
    r, m = s.rank, s.skills
    return {
        "shared LoRA": lora(r * m, 1.0 * r * m, AT, name="skill"),
        "Poly": poly(r, m, tasks, 1.0 * r, AT, name="skill"),
        "MHR": mhr(r, m, s.heads, tasks, 1.0 * r, AT, name="skill"),
        "LoRA for each task": per_task(lora(r, 1.0 * r, AT, name="skill"), tasks),
    }


def without_task(task: train.Task) -> train.Task:
    """The same for a method that serves all tasks alike: it is not told which."""
    return train.Task(lambda apply, batch, key: task.forward(apply, batch._replace(task=None), key), task.loss)


def pretrainer(adapted: Any, task: train.Task, s: Setup) -> Any:
    """`(params, rate, seed, examples, rows) -> (delta, loss of the last tenth, alignment at three moments)`."""
    budget = study.Budget(steps=s.steps, batch=s.batch)
    make = study.adam(budget.warmup)
    optimiser = study.optax.inject_hyperparams(
        lambda rate: (
            study.optax.chain(make(rate, s.steps), study.relative_rates(adapted.method.rates))
            if adapted.method.rates
            else make(rate, s.steps)
        )
    )
    step = train.make_step(adapted, task, optimiser(1.0))

    def agreement(delta: Any, params: Any, probes: Any) -> Any:
        """The mean cosine between the gradients of different tasks."""

        def gradient(batch: Any) -> Any:
            def loss(skill: Any) -> Any:
                apply = lambda *x, **k: adapted.apply(params, {**delta, "skill": skill}, *x, **k)
                return task.loss(task.forward(apply, batch, None), batch).mean()

            own = jax.grad(loss)(delta["skill"])
            flat = ravel_pytree(own.get("skills", own))[0]
            return flat / (jnp.linalg.norm(flat) + 1e-12)

        g = jax.lax.map(gradient, probes)
        n = g.shape[0]
        return (jnp.sum(g @ g.T) - n) / (n * (n - 1))

    @jax.jit
    def run(params: Any, rate: Any, seed: Any, examples: Any, rows: Any, probes: Any) -> Any:
        few = examples.image[: s.batch]
        state = train.create(adapted.init(jax.random.key(seed), params, few), optimiser(rate), seed)

        def one(state: Any, rows: Any) -> Any:
            state, numbers = step(state, params, jax.tree.map(lambda x: x[rows], examples))
            return state, numbers["loss"]

        aligned, losses = [], []
        for part in jnp.split(rows, 3):
            state, loss = jax.lax.scan(one, state, part)
            aligned.append(agreement(state.delta, params, probes))
            losses.append(loss)
        return state.delta, jnp.concatenate(losses)[-max(1, s.steps // 10) :].mean(), jnp.stack(aligned)

    return run


# ------------------------------------------------------------------------------------------------------- second stage


def few_shot(method: Any, model: Any, task: train.Task, s: Setup) -> Any:
    """`(params, deltas (tasks, ...), rate, seed, shots, rows, tests) -> accuracies (tasks,)`: every task on its own."""
    adapted = adapt(model.apply, method)
    problem = study.Problem(model.apply, None, {}, task)
    arm, budget = study.Arm(method), study.Budget(steps=s.few_steps, batch=s.few_batch)
    fit = study.trainer(adapted, problem, arm, budget)

    @jax.jit
    def run(params: Any, deltas: Any, rate: Any, seed: Any, shots: Any, rows: Any, tests: Any) -> Any:
        trained = jax.vmap(lambda d, e: fit(params, d, rate, seed, e, rows)[0])(deltas, shots)

        def score(x: Any) -> Any:
            delta, batch = x
            found = adapted.apply(params, delta, batch.image).argmax(-1) == batch.label
            return jnp.sum(found * batch.weight) / jnp.sum(batch.weight)

        return jax.lax.map(score, (trained, tests))

    return run


def padded(parts: list[Any]) -> Any:
    """The test examples of each task, stacked to the longest; weight 0 is padding."""
    most = max(len(y) for _, y in parts)

    def one(part: Any) -> Any:
        x, y = part
        fill = most - len(y)
        batch = study.images_of(np.pad(x, [(0, fill), (0, 0), (0, 0), (0, 0)]), np.pad(y, (0, fill)))
        return batch._replace(weight=jnp.asarray(np.arange(most) < len(y), jnp.float32))

    return jax.tree.map(lambda *x: jnp.stack(x), *map(one, parts))


def second_stage(s: Setup, tasks: int) -> dict[str, tuple[str, Any, Any]]:
    """Name -> (what it starts from, the method, `(key, delta) -> one task's delta`)."""
    r, m = s.rank, s.skills
    fresh = lambda key, delta: new_tasks(key, delta["skill"], 1)
    plain = lora(r, 1.0 * r, AT, name="skill")

    def held(delta: Any) -> Any:
        return {**delta, "skills": jax.tree.map(study.trees.Fixed, delta["skills"])}

    return {
        "LoRA, from nothing": ("shared LoRA", plain, None),
        "shared LoRA": ("shared LoRA", lora(r * m, 1.0 * r * m, AT, name="skill"), lambda key, d: d["skill"]),
        "Poly": ("Poly", poly(r, m, 1, 1.0 * r, AT, name="skill"), fresh),
        "Poly-z": ("Poly", poly(r, m, 1, 1.0 * r, AT, train="router", name="skill"), lambda k, d: held(fresh(k, d))),
        "MHR": ("MHR", mhr(r, m, s.heads, 1, 1.0 * r, AT, name="skill"), fresh),
        "MHR-z": (
            "MHR",
            mhr(r, m, s.heads, 1, 1.0 * r, AT, train="router", name="skill"),
            lambda k, d: held(fresh(k, d)),
        ),
        "MHR-mu": ("MHR", plain, lambda key, d: to_average(d["skill"])),
    }


def main() -> None:
    args = study.arguments("MHR in small; see the file's first lines.")
    s, began = SMOKE if args.smoke else Setup(), time.perf_counter()
    model, params, _ = bases.fashion_vit(s.base, keep=not args.smoke)
    model, params = bases.with_new_head(model, params, 2)
    parts = pairs(s)
    seen = {k: v[: -s.held_out] for k, v in parts.items()}
    new = {k: v[-s.held_out :] for k, v in parts.items()}
    tuning, measured = slice(0, s.tuning_tasks), slice(s.tuning_tasks, None)
    tasks = len(seen["train"])
    examples, validation = joined(seen["train"], 300), joined(seen["validation"], 20)
    rng = np.random.default_rng(1)
    chosen = rng.permutation(tasks)[: s.aligned_tasks]
    probes = jax.tree.map(
        lambda *x: jnp.stack(x),
        *(study.images_of(*bases.per_class(seen["train"][t], s.shots, 7))._replace(task=jnp.int32(t)) for t in chosen),
    )
    plain = train.image_classification()

    first: dict[str, dict[str, Any]] = {}
    deltas: dict[str, list[Any]] = {}
    for name, method in methods(s, tasks).items():
        start = time.perf_counter()
        adapted = adapt(model.apply, chain(method, head()))
        task = plain if method.tasks else without_task(plain)
        run, n = pretrainer(adapted, task, s), len(examples.label)
        score = study.scorer(adapted, study.Problem(model.apply, params, {}, task))
        rows = lambda seed, n=n: study.rows_of(n, s.steps, s.batch, seed)
        tried = {}
        for rate in s.rates:
            delta, _, _ = run(params, rate, 1000, examples, rows(1000), probes)
            tried[rate] = float(np.mean(study.means(np.asarray(score(params, delta, validation)), validation.task)))
        rate = max(tried, key=tried.__getitem__)
        done = [run(params, rate, seed, examples, rows(seed), probes) for seed in range(s.seeds)]
        deltas[name] = [d for d, _, _ in done]
        first[name] = {
            "method": name,
            "trained": study.trees.count(study.trees.learned(done[0][0])[0]),
            "rate": rate,
            "training_loss": [float(l) for _, l, _ in done],
            "agreement": [float(a.mean()) for _, _, a in done],
            "details": {"validation_by_rate": tried, "agreement": [a.tolist() for _, _, a in done]},
        }
        row = first[name]
        print(
            f"{name:20} {row['trained']:>8,} trained  rate {rate:g}  loss {statistics.mean(row['training_loss']):.4f}  "
            f"agreement {statistics.mean(row['agreement']):.4f}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )

    tests, scores = padded(new["test"]), {}
    pick = lambda tree, which: jax.tree.map(lambda x: x[which], tree)
    for name, (source, method, begin) in second_stage(s, tasks).items():
        start = time.perf_counter()
        run = few_shot(chain(method), model, plain, s)
        own = adapt(model.apply, method)

        def started(seed: int, count: int, source: str = source, begin: Any = begin, own: Any = own) -> Any:
            delta = deltas[source][seed]
            keys = jax.random.split(jax.random.key(seed), count)
            image = jnp.zeros((1, s.base.size, s.base.size, 1))
            one = (lambda k: own.init(k, params, image)) if begin is None else (lambda k: begin(k, delta))
            made = [{"skill": one(k)} for k in keys]
            return jax.tree.map(lambda *x: jnp.stack(x), *made)

        # The head that the first stage trained stands in the base.
        def with_head(seed: int, source: str = source) -> Any:
            trained = {p: d["value"] for p, d in deltas[source][seed]["head"].items()}
            return study.trees.replace_leaves(params, trained)

        def once(rate: float, seed: int, which: slice, run: Any = run) -> np.ndarray:
            shots = pick(shots_of(new["train"], s.shots, seed), which)
            count = shots.label.shape[0]
            rows = study.rows_of(2 * s.shots, s.few_steps, min(s.few_batch, 2 * s.shots), seed)
            own = with_head(seed), started(seed, count)
            return np.asarray(run(*own, rate, seed, shots, rows, pick(tests, which)))

        tried = {rate: float(once(rate, 0, tuning).mean()) for rate in s.few_rates}
        rate = max(tried, key=tried.__getitem__)
        found = [once(rate, seed, measured) for seed in range(s.seeds)]
        test = [float(f.mean()) for f in found]
        scores[name] = {
            "method": name,
            "trained": study.trees.count(study.trees.learned(pick(started(0, 1), 0))[0]),
            "rate": rate,
            "test": test,
            "mean": statistics.mean(test),
            "std": statistics.stdev(test),
            "details": {"tuning_by_rate": tried, "test_by_task": [f.tolist() for f in found]},
        }
        row = scores[name]
        print(
            f"{name:20} {row['trained']:>8,} trained  rate {rate:g}  {100 * row['mean']:.2f} ± {100 * row['std']:.2f} %  "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    study.finish(
        "mhr",
        args,
        paper="MHR, Caccia et al., NeurIPS 2023",
        setup=s,
        rows=list(scores.values()),
        claims=verdicts(first, scores),
        began=began,
        tables=["first stage"],
        **{"first stage": [{k: v for k, v in r.items() if k != "details"} | means_of(r) for r in first.values()]},
        first_stage_details={n: r["details"] for n, r in first.items()},
    )


def means_of(row: dict[str, Any]) -> dict[str, float]:
    return {f"mean_{k}": statistics.mean(row[k]) for k in ("training_loss", "agreement")}


def verdicts(first: dict[str, Any], scores: dict[str, Any]) -> list[dict[str, str]]:
    """The docstring's claims against the rows."""

    def ordered(key: str, sign: float, *names: str) -> tuple[bool, str]:
        gaps, said = [], []
        for a, b in itertools.pairwise(names):
            gap = [sign * (x - y) for x, y in zip(first[a][key], first[b][key])]
            mean, half = study.interval(gap)
            gaps.append(gap)
            said.append(f"{a} - {b}: {sign * mean:+.4f} ± {half:.4f}")
        return all(statistics.mean(g) >= 0 for g in gaps), "; ".join(said)

    loss = [first[n]["training_loss"] for n in ("MHR", "Poly", "shared LoRA")]
    seeds = [a <= b < c for a, b, c in zip(*loss)]
    _, losses = ordered("training_loss", -1.0, "MHR", "Poly", "shared LoRA")
    agree, aligned = ordered("agreement", 1.0, "MHR", "Poly", "shared LoRA")
    gap = lambda a, b: study.difference(scores[a], scores[b])
    said = lambda *names: "; ".join(
        f"{a} - {b}: {gap(a, b)[0]:+.2f} ± {gap(a, b)[1]:.2f}" for a, b in itertools.pairwise(names)
    )
    mu = gap("MHR-mu", "MHR")[0], gap("MHR-mu", "shared LoRA")[0]
    return [
        record.claim(
            "Training loss: MHR at most Poly's, Poly's below the shared LoRA's, in four of five seeds",
            sum(seeds) >= 0.8 * len(seeds),
            f"in {sum(seeds)} of {len(seeds)}; {losses}",
        ),
        record.claim(
            "Few-shot: MHR at least Poly, Poly at least the shared LoRA",
            gap("MHR", "Poly")[0] >= 0 and gap("Poly", "shared LoRA")[0] >= 0,
            said("MHR", "Poly", "shared LoRA") + " points",
        ),
        record.claim(
            "MHR-mu is within a point of MHR and over the shared LoRA",
            abs(mu[0]) <= 1 and mu[1] > 0,
            said("MHR-mu", "MHR") + "; " + said("MHR-mu", "shared LoRA") + " points",
        ),
        study.at_least("MHR-z is over Poly-z", scores["MHR-z"], scores["Poly-z"]),
        record.claim(
            "Gradients of tasks agree more in MHR than in Poly, and there than in the shared LoRA", agree, aligned
        ),
    ]


if __name__ == "__main__":
    main()
