"""Which way of multiplying `x (w + 2 a b)` is fastest on this CPU: five formulations, forward and for training.

    python experiments/bench/products.py            about three minutes on two quiet cores
    python experiments/bench/products.py --smoke    one shape, once; writes nothing unless --out is given

    two products    x w + 2 (x a) b
    [w a]           one product with the concatenated weights, its last columns times b
    [x h]           one product of the concatenated inputs, h = x a, with the concatenated w and 2 b
    three sites     x times [a a a] once for three weights that share x (query, key, value), then each as two products;
                    counted per site
    merged          x (w + 2 a b), the sum formed; its gradients take the low-rank way (`jaxpeft.weights.products`)

Training is the gradient with respect to x, a and b. All formulations of one shape take turns; the figure is the least of
all rounds, which other work on the machine disturbs least, relative to two products.

Stated before running:
  1. For training, nothing that leaves the weight unformed is more than 5 % faster than two products at any shape.
  2. Merged is faster forward wherever the rows outnumber k n / (k + n) by 4, and slower at 16 rows.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.weights import products

sys.path.insert(0, str(Path(__file__).parents[1]))
import record

SHAPES = [
    (m, k, n, r)
    for k, n, r in ((384, 384, 8), (384, 1536, 8), (384, 384, 64), (1024, 1024, 16))
    for m in (16, 128, 512, 2048)
]


def two_products(x, w, a, b):
    return x @ w + (2 * (x @ a)) @ b


def weights_concatenated(x, w, a, b):
    z, n = x @ jnp.concatenate([w, a], 1), w.shape[1]
    return z[:, :n] + (2 * z[:, n:]) @ b


def inputs_concatenated(x, w, a, b):
    return jnp.concatenate([x, x @ a], 1) @ jnp.concatenate([w, 2 * b], 0)


def three_sites(x, w, a, b):
    h = jnp.split(x @ jnp.concatenate([a, a + 1, a + 2], 1), 3, axis=1)
    return sum(x @ (w + i) + (2 * h[i]) @ b for i in range(3))


def merged(x, w, a, b):
    return products.merged(None, x, w, a, 2 * b)


FORMULATIONS = {
    "two products": two_products,
    "[w a]": weights_concatenated,
    "[x h]": inputs_concatenated,
    "three sites": three_sites,
    "merged": merged,
}
SITES = {"three sites": 3}


def measured(shape, rounds):
    """Seconds per site: `{formulation: (forward, training)}`."""
    m, k, n, r = shape
    rng = np.random.default_rng(0)
    sizes = [(m, k), (k, n), (k, r), (r, n), (m, n)]
    x, w, a, b, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in sizes)
    programs = {}
    for name, f in FORMULATIONS.items():
        programs[name, 0] = functools.partial(jax.jit(f), x, w, a, b)
        gradient = jax.jit(jax.grad(lambda x, a, b, w, g, f=f: (f(x, w, a, b) * g).sum(), argnums=(0, 1, 2)))
        programs[name, 1] = functools.partial(gradient, x, a, b, w, g)
    best = dict.fromkeys(programs, float("inf"))
    for run in programs.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        for name, run in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            best[name] = min(best[name], time.perf_counter() - began)
    return {n: tuple(best[n, i] / SITES.get(n, 1) for i in (0, 1)) for n in FORMULATIONS}


def verdicts(rows):
    lazy = [n for n in FORMULATIONS if n not in ("two products", "merged")]
    fastest = min(((r["training"][n], n, r) for r in rows for n in lazy), key=lambda t: t[0])
    many = [r for r in rows if r["m"] >= 4 * r["k"] * r["n"] / (r["k"] + r["n"])]
    few = [r for r in rows if r["m"] == 16]
    return [
        record.claim(
            "For training nothing that leaves the weight unformed is more than 5 % faster than two products",
            fastest[0] >= 0.95,
            f"fastest: {fastest[1]} at {fastest[0]:.2f} of the time, m {fastest[2]['m']}, k {fastest[2]['k']}, "
            f"n {fastest[2]['n']}, r {fastest[2]['r']}",
        ),
        record.claim(
            "Merged is faster forward with many rows, and slower at 16",
            all(r["forward"]["merged"] < 1 for r in many) and all(r["forward"]["merged"] > 1 for r in few),
            "many rows: "
            + ", ".join(f"{r['forward']['merged']:.2f}" for r in many)
            + "; 16 rows: "
            + ", ".join(f"{r['forward']['merged']:.2f}" for r in few),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Formulations of the low-rank product; see the file's first lines.")
    parser.add_argument("--smoke", action="store_true", help="one shape, once")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args()
    out = args.out or (None if args.smoke else record.RESULTS / "bench_products.json")
    rows = []
    for shape in SHAPES[:1] if args.smoke else SHAPES:
        seconds = measured(shape, 2 if args.smoke else 30)
        base = seconds["two products"]
        rows.append(
            dict(zip("mkn", shape), r=shape[3], two_products_ms=[1e3 * s for s in base])
            | {
                kind: {n: s[i] / base[i] for n, s in seconds.items() if n != "two products"}
                for i, kind in enumerate(("forward", "training"))
            }
        )
        print(shape, {k: {n: round(v, 2) for n, v in rows[-1][k].items()} for k in ("forward", "training")}, flush=True)
    claims = verdicts(rows) if not args.smoke else []
    for c in claims:
        print(f"{c['verdict']:>14}: {c['claim']} ({c['evidence']})")
    if out is not None:
        record.write(out, {"claims": claims, **record.provenance(), "rows": rows})
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
