"""The kernels on the accelerator at hand: are they right there, and how long do they take beside what XLA makes.

    python experiments/bench/device.py            a GPU; some minutes, most of them compiling
    python experiments/bench/device.py --smoke    the smallest of each kind, anywhere; writes nothing unless --out is given

For the layers of `jaxpeft.kernels.workloads` in bfloat16, forward and with gradients: our kernel, the plain JAX that stands
beside it (`backend="xla"`), and what is asked of both without the update: the plain product, attention over keys longer by
the prefix (our kernel, and cuDNN's), attention over the cache that is not quantised. An error is |y - y'| / |y'|
against plain JAX in float32. A time is the median of several rounds, each a compiled loop that runs the call many times;
the floor beside it is the larger of operations over the device's peak and bytes over its bandwidth, as its maker states
them.

Known from tuning the blocks of one layer (Llama-3-8B's q and down, forward), so no prediction for these: 1.2 of the plain
product and 0.8 to 0.95 of XLA's. Stated before running, each to be reported as holding or not:
  1. Every kernel is right: forward and gradients err by at most 0.01.
  2. The fused product takes at most 1.08 of the plain product at r = 16, for layers 4,096 wide and 2,048 tokens.
  3. It takes less time than XLA's two products, for the same layers.
  4. With factors of its own for every example it takes less than XLA's version, for every layer.
  5. Attention with a prefix takes at most 1.05 of the same kernel over the longer keys, for every layer.
  6. Attention over a quantised cache takes less than attention over the whole one.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft import aot
from jaxpeft.kernels import attention, grouped_low_rank, hashed_matmul, low_rank_matmul, quantised_attention, saq_init
from jaxpeft.kernels.random_fold import materialise
from jaxpeft.kernels.workloads import ATTENTION, DECODING, GROUPED, HASHED, PRODUCTS

sys.path.insert(0, str(Path(__file__).parents[1]))
import record

DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: `versions` of it on the same operands, of which "kernel" and "XLA" can be differentiated where `wrt` is.

    Attributes:
      kind, name: of the workload.
      make: `key -> operands`, arrays in float32, of which the versions get bfloat16.
      versions: name -> function of the operands.
      wrt: operands to differentiate.
      operations, moved: of a forward call: how many, and the bytes that must move.
    """

    kind: str
    name: str
    make: Callable[[Any], tuple[Any, ...]]
    versions: dict[str, Callable[..., Any]]
    wrt: tuple[int, ...]
    operations: float
    moved: float


def normal(key: Any, *shape: int) -> Any:
    """Of a weight's or an activation's size, so that products are near 1."""
    return jax.random.normal(key, shape) / shape[0] ** 0.5 if len(shape) == 2 else jax.random.normal(key, shape)


def some(workloads: Any) -> list[Any]:
    """Those that are timed; the others are like one of these."""
    left = ("k, 2,048", "gate", "a tenth", "rank 256", "ViT-L q", "MiniLM q", "2,048 sequences", "hundred")
    return [w for w in workloads if not any(name in w.name for name in left)]


def products() -> list[Case]:
    out = []
    for p in some(PRODUCTS):

        def make(key: Any, p: Any = p) -> Any:
            x, w, a, b = jax.random.split(key, 4)
            return jax.random.normal(x, (p.m, p.k)), normal(w, p.k, p.n), normal(a, p.k, p.r), normal(b, p.r, p.n)

        run = lambda backend: lambda x, w, a, b: low_rank_matmul(x, w, a, b, 2.0, backend=backend)
        plain = lambda x, w, a, b: jnp.dot(x, w)
        least = 2 * (p.m * p.k + p.k * p.n + p.r * (p.k + p.n) + p.m * p.n)
        out.append(
            Case(
                "low-rank product",
                p.name,
                make,
                {"kernel": run("gpu"), "XLA": run("xla"), "plain": plain},
                (0, 2, 3),
                2 * p.m * (p.k * p.n + p.r * (p.k + p.n)),
                least,
            )
        )
    return out


def grouped() -> list[Case]:
    out = []
    for p in some(GROUPED):

        def make(key: Any, p: Any = p) -> Any:
            x, w, a, b, g = jax.random.split(key, 5)
            rows = (p.b, p.t, p.k) if p.t > 1 else (p.b, p.k)
            factors = [
                jax.random.normal(a, (p.groups, p.k, p.r)) / p.k**0.5,
                jax.random.normal(b, (p.groups, p.r, p.n)),
            ]
            group = jax.random.randint(g, (p.b,), 0, p.groups)
            return jax.random.normal(x, rows), normal(w, p.k, p.n), factors[0], factors[1] / p.r**0.5, group

        run = lambda backend: lambda x, w, a, b, g: grouped_low_rank(x, w, a, b, g, 2.0, backend=backend)
        m = p.b * p.t
        used = min(p.b, p.groups)
        out.append(
            Case(
                "grouped product",
                p.name,
                make,
                {"kernel": run("gpu"), "XLA": run("xla"), "plain": lambda x, w, a, b, g: jnp.dot(x, w)},
                (0, 2, 3) if p.groups <= 64 else (),
                2 * m * (p.k * p.n + p.r * (p.k + p.n)),
                2 * (m * p.k + p.k * p.n + used * p.r * (p.k + p.n) + m * p.n),
            )
        )
    return out


def hashed() -> list[Case]:
    out = []
    for p in some(HASHED):

        def make(key: Any, p: Any = p) -> Any:
            x, memory = jax.random.split(key)
            return jax.random.normal(x, (p.m, p.k)), jax.random.normal(memory, (p.size,)) / p.k**0.5

        run = lambda backend, p=p: lambda x, memory: hashed_matmul(x, memory, 7, (p.k, p.n), backend=backend)
        # The weight formed first, outside of the time of neither: what a kernel saves is its bytes.
        plain = lambda x, memory, p=p: jnp.dot(x, materialise(memory, 7, (p.k, p.n)))
        out.append(
            Case(
                "hashed product",
                p.name,
                make,
                {"kernel": run("gpu"), "XLA": run("xla"), "plain": plain},
                (0, 1),
                2 * p.m * p.k * p.n,
                2 * (p.m * p.k + p.size + p.m * p.n),
            )
        )
    return out


def attentions() -> list[Case]:
    out = []
    for w in ATTENTION:

        def make(key: Any, w: Any = w) -> Any:
            keys = jax.random.split(key, 5)
            shapes = [(w.b, w.t, w.heads), *[(w.b, w.s, w.kv_heads)] * 2, *[(1, w.prefix, w.kv_heads)] * 2]
            return tuple(jax.random.normal(k, (*s, w.head_dim)) for k, s in zip(keys, shapes))

        def run(backend: Any, w: Any = w) -> Any:
            return lambda q, k, v, pk, pv: attention(q, k, v, prefix=(pk, pv), causal=w.causal, backend=backend)

        def behind(p: Any, x: Any, w: Any = w) -> Any:
            return jnp.concatenate([jnp.broadcast_to(p, (w.b, *p.shape[1:])), x], 1)

        def ours(q: Any, k: Any, v: Any, pk: Any, pv: Any, w: Any = w, of: Any = behind) -> Any:
            offset = w.prefix if w.causal else 0
            return attention(q, of(pk, k), of(pv, v), causal=w.causal, offset=offset, with_lse=True, backend="gpu")[0]

        def cudnn(q: Any, k: Any, v: Any, pk: Any, pv: Any, w: Any = w, of: Any = behind) -> Any:
            # Its causal mask begins at the first key: a query sees fewer keys by the prefix's length.
            return jax.nn.dot_product_attention(q, of(pk, k), of(pv, v), is_causal=w.causal, implementation="cudnn")

        pairs = w.t * w.s / (2 if w.causal else 1) + w.t * w.prefix
        size = 2 * w.b * w.head_dim * (2 * w.t * w.heads + 2 * w.s * w.kv_heads)
        versions = {
            "kernel": run("gpu"),
            "XLA": run("xla"),
            "kernel over longer keys": ours,
            "cuDNN over longer keys": cudnn,
        }
        out.append(
            Case(
                "attention with a prefix",
                w.name,
                make,
                versions,
                (0, 1, 2, 3, 4),
                4 * w.b * w.heads * w.head_dim * pairs,
                size,
            )
        )
    return out


def decoding() -> list[Case]:
    """One token over a quantised cache, of the first of `DECODING`."""
    name, b, h, g, d, c = DECODING[0]

    def make(key: Any) -> Any:
        q, k, v, codes, steps = jax.random.split(key, 5)
        cache = saq_init(c, g, d, batch=(b,))
        drawn = {
            name: jax.random.randint(jax.random.fold_in(codes, i), x.shape, -128, 128, jnp.int8)
            if x.dtype == jnp.int8
            else 0.01 * jax.random.normal(jax.random.fold_in(steps, i), x.shape) ** 2
            for i, (name, x) in enumerate((n, getattr(cache, n)) for n in CODES)
        }
        cache = dataclasses.replace(cache, **drawn, length=jnp.int32(c))
        shape = (b, c, g, d)
        return jax.random.normal(q, (b, h, d)), cache, jax.random.normal(k, shape), jax.random.normal(v, shape)

    run = lambda backend: lambda q, cache, k, v: quantised_attention(q, cache, backend=backend)
    whole = lambda q, cache, k, v: jax.nn.dot_product_attention(q[:, None], k, v)
    versions = {"kernel": run("gpu"), "XLA": run("xla"), "whole cache": whole}
    moved = 2 * b * g * c * d + 2 * 2 * 4 * b * g * c * d // 32
    return [Case("decoding", name, make, versions, (), 4 * b * h * d * c, moved)]


CODES = ("key_code", "value_code", "key_step", "key_zero", "value_step", "value_zero")


def looped(function: Callable[..., Any]) -> Callable[..., Any]:
    """`(times, operands) -> the result`, of the last of so many calls, none of which the compiler may leave out."""

    def run(times: Any, *operands: Any) -> Any:
        def body(_: Any, state: Any) -> Any:
            operands, _ = state
            return lax.optimization_barrier((operands, function(*operands)))

        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *operands))
        return lax.fori_loop(0, times, body, (operands, start))[1]

    return run


def with_gradients(function: Callable[..., Any], wrt: tuple[int, ...]) -> Callable[..., Any]:
    """The gradients of Σ y², y as well: a cotangent that is not constant."""

    def loss(*operands: Any) -> Any:
        y = function(*operands)
        return 0.5 * jnp.sum(jnp.square(y.astype(jnp.float32))), y

    return jax.grad(loss, wrt, has_aux=True)


def error(got: Any, want: Any) -> float:
    """|y - y'| / |y'|, of the worst leaf."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    each = [jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel()) for a, b in pairs]
    return float(jnp.max(jnp.stack(each)))


def seconds(program: Any, operands: Any, times: int, rounds: int = 5) -> float:
    """Median time of one of so many calls."""
    n, found = jnp.int32(times), []
    jax.block_until_ready(program(n, *operands))
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(program(n, *operands))
        found.append((time.perf_counter() - start) / times)
    return statistics.median(found)


def lowered(operands: Any) -> Any:
    """Arrays in bfloat16; a cache stays as it is."""
    cast = lambda x: x.astype(DTYPE) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating) else x
    return tuple(map(cast, operands))


def compiled(case: Case, name: str, both: bool) -> Any:
    """The loop of one version; what the device or the shapes refuse (cuDNN) is returned as the error that it is."""
    function = with_gradients(case.versions[name], case.wrt) if both else case.versions[name]
    shapes = jax.eval_shape(lambda key: lowered(case.make(key)), jax.random.key(0))
    try:
        return jax.jit(looped(function)).lower(jax.ShapeDtypeStruct((), jnp.int32), *shapes).compile()
    except Exception as refused:
        return refused


def todo(case: Case) -> list[tuple[str, bool]]:
    return [(n, False) for n in case.versions] + [(n, True) for n in ("kernel", "XLA") if case.wrt]


def row_of(case: Case, programs: dict[tuple[str, bool], Any], seed: int) -> dict[str, Any]:
    target = aot.TARGETS["h100"]
    exact = case.make(jax.random.key(seed))
    operands = lowered(exact)
    again = jax.tree.map(lambda x, y: x.astype(y.dtype), operands, exact)  # what the versions see, in float32
    with jax.default_matmul_precision("highest"):
        want = {False: jax.jit(case.versions["XLA"])(*again)}
        if case.wrt:
            want[True] = jax.jit(with_gradients(case.versions["XLA"], case.wrt))(*again)
    floor = max(case.operations / target.flops, case.moved / target.bandwidth)
    row: dict[str, Any] = {"kind": case.kind, "workload": case.name, "floor_us": 1e6 * floor}
    for (name, both), program in programs.items():
        label = f"{name}, with gradients" if both else name
        if isinstance(program, Exception):
            print(f"{case.name}, {label}: {str(program)[:300]}", flush=True)
            row[f"{label} us"] = None
            continue
        if name in ("kernel", "XLA"):
            row[f"{label} error"] = error(program(jnp.int32(1), *operands), want[both])
        row[f"{label} us"] = 1e6 * seconds(program, operands, max(4, min(200, round(2e-3 / floor))))
    print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


def measured(cases: list[Case]) -> list[dict[str, Any]]:
    """Everything is compiled first, side by side: times are taken with nothing beside them."""
    work = [(case, *item) for case in cases for item in todo(case)]
    with ThreadPoolExecutor() as pool:
        made = dict(zip(((c.kind, c.name, n, g) for c, n, g in work), pool.map(lambda w: compiled(*w), work)))
    own = lambda c: {(n, g): made[c.kind, c.name, n, g] for n, g in todo(c)}
    return [row_of(case, own(case), i) for i, case in enumerate(cases)]


def claims_of(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    of = lambda kind: [r for r in rows if r["kind"] == kind]
    worst = max((r[k], r["workload"]) for r in rows for k in r if k.startswith("kernel") and k.endswith("error"))
    wide = [r for r in of("low-rank product") if "Llama" in r["workload"] and "2,048 tokens" in r["workload"]]

    def ratio(text: str, chosen: list[dict[str, Any]], other: str, most: float) -> dict[str, str]:
        found = {r["workload"]: r["kernel us"] / r[f"{other} us"] for r in chosen if r[f"{other} us"]}
        said = ", ".join(f"{name}: {x:.2f}" for name, x in found.items())
        return record.claim(text, bool(found) and max(found.values()) <= most, said)

    return [
        record.claim("every kernel errs by at most 0.01", worst[0] <= 0.01, f"worst {worst[0]:.4f}, {worst[1]}"),
        ratio("the fused product takes at most 1.08 of the plain one, 4,096 wide", wide, "plain", 1.08),
        ratio("the fused product takes less than XLA's two products, 4,096 wide", wide, "XLA", 1.0),
        ratio("the grouped product takes less than XLA's version", of("grouped product"), "XLA", 1.0),
        ratio(
            "attention with a prefix takes at most 1.05 of attention over the longer keys",
            of("attention with a prefix"),
            "kernel over longer keys",
            1.05,
        ),
        ratio("decoding over a quantised cache takes less than over the whole one", of("decoding"), "whole cache", 1.0),
    ]


KINDS = {"products": products, "grouped": grouped, "hashed": hashed, "attention": attentions, "decoding": decoding}


def smoke() -> None:
    """Every kind at a size that an interpreter can run, and the loop runs what it is given."""
    p = PRODUCTS[-2]._replace(name="small", m=32, k=32, n=32, r=4)
    sizes = {"PRODUCTS": (p,), "GROUPED": (GROUPED[-1]._replace(b=4, t=8, k=32, n=32, r=4, groups=3),)}
    sizes |= {"HASHED": (HASHED[-1]._replace(m=16, k=32, n=128, size=512),)}
    sizes |= {"ATTENTION": (ATTENTION[-1]._replace(b=1, t=16, s=16, heads=2, kv_heads=2, head_dim=16, prefix=4),)}
    for name, value in sizes.items():
        globals()[name] = value
    for kind in ("products", "grouped", "hashed", "attention"):
        for case in KINDS[kind]():
            operands = lowered(case.make(jax.random.key(0)))
            want = case.versions["XLA"](*case.make(jax.random.key(0)))
            assert error(case.versions["kernel"](*operands), want) < 0.05, case.name
            assert error(jax.jit(looped(case.versions["XLA"]))(2, *operands), want) < 0.05, case.name


def main() -> None:
    parser = argparse.ArgumentParser(description="The kernels on a GPU; see the file's first lines.")
    parser.add_argument("--smoke", action="store_true", help="small sizes, on any device")
    parser.add_argument("--only", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args()
    if args.smoke:
        smoke()
        return
    if jax.default_backend() != "gpu":
        parser.error(f"needs a GPU, found {jax.default_backend()}")
    rows = measured([case for kind in args.only for case in KINDS[kind]()])
    claims = claims_of(rows) if set(args.only) == set(KINDS) else []
    for c in claims:
        print(f"{c['verdict']:>14}: {c['claim']} ({c['evidence']})")
    tables = {
        kind: [{k: v for k, v in r.items() if k != "kind"} for r in rows if r["kind"] == kind]
        for kind in dict.fromkeys(r["kind"] for r in rows)
    }
    out = args.out or record.RESULTS / "bench_device.json"
    record.write(
        out,
        {
            "claims": claims,
            **record.provenance(),
            "device": jax.devices()[0].device_kind,
            "tables": list(tables),
            **tables,
        },
    )


if __name__ == "__main__":
    main()
