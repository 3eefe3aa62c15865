"""MoS, mixture of shards (Wang et al., ICLR 2025), in small: what LoRA's parameters buy when layers share them.

    python experiments/adapt/mos.py            all of it: about half an hour on two cores
    python experiments/adapt/mos.py --smoke    every part once in small; writes nothing unless --out is given

A byte-level causal transformer (8 layers, width 96) is trained once on English manual pages and kept in the cache, then
adapted, frozen, to German ones, by low-rank changes of all its linear layers. The measure is bits a byte on held-out
German pages; the score is its negative. All arms but the last train as many numbers as a LoRA of rank 2 in every layer
(asserted); each has one rate out of one grid by a tuning seed, then five seeds of initialisation, lists and data order.

Stated before running, each to be reported as holding or not, by the mean of the paired differences over seeds:
  1. MoS beats LoRA at equal parameters.
  2. Pure sharing (every layer the same change) is worse than MoS and not better than subset selection.
  3. MoS closes at least half of the gap from LoRA of rank 2 to LoRA of rank 16, which has 8 times its parameters.
  4. Removing pair dissociation, sharding or privatisation makes it worse, each on the mean.
Differences are expected to be small: a base of 8 layers has little to share. The paper's models have 32.
"""

import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import bases
import record
import study

from jaxpeft import lora, mos, train

AT = ("**/attention/{qkv,out}/kernel", "**/mlp/{up,down}/kernel")


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the experiment."""

    base: bases.Bytes = dataclasses.field(default_factory=lambda: bases.Bytes(layers=8, steps=2000))
    equivalent: int = 2
    rank: int = 8
    shards: int = 2
    large: int = 16
    windows: int = 384
    training_windows: int = 8192
    budget: study.Budget = dataclasses.field(
        default_factory=lambda: study.Budget(steps=200, batch=16, rates=(3e-3, 1e-2, 3e-2), tuning_seeds=1)
    )


SMOKE = Setup(
    bases.SMALL_BYTES, 2, 3, 2, 4, 8, 16, study.Budget(steps=2, batch=4, rates=(1e-2,), tuning_seeds=1, seeds=2)
)


def arms(s: Setup) -> dict[str, study.Arm]:
    e, r, l, layers = s.equivalent, s.rank, s.shards, s.base.layers
    every = {
        "LoRA": lora(e, 16.0, AT),
        "pure sharing": mos(e * layers, e, 0, 1, at=AT, subset=False),
        "subset selection": mos(r, e, 0, 1, at=AT, dissociate=False),
        "MoS": mos(r, e, min(1, e), l, at=AT),
        "MoS, one list for both": mos(r, e, min(1, e), l, at=AT, dissociate=False),
        "MoS, whole vectors": mos(r, e, min(1, e), 1, at=AT),
        "MoS, nothing private": mos(r, e, 0, l, at=AT),
        "LoRA, large": lora(s.large, 16.0, AT),
    }
    return {name: study.Arm(method) for name, method in every.items()}


def main() -> None:
    args = study.arguments("MoS in small; see the file's first lines.")
    s, began = SMOKE if args.smoke else Setup(), time.perf_counter()
    english, german = bases.pages("en"), bases.pages("de", seed=2)
    model, params = bases.byte_decoder(s.base, english["train"], keep=not args.smoke)
    cut = lambda split, rows, seed: bases.windows(german[split], rows, s.base.context, seed)
    examples = {
        "train": cut("train", s.training_windows, 0),
        "validation": cut("validation", s.windows, 1),
        "test": cut("test", s.windows, 2),
    }
    problem = study.Problem(model.apply, params, examples, train.language_modelling(), bases.bits_per_byte)
    done = study.measure(arms(s), problem, s.budget)
    small = {n: r["trained"] for n, r in done.items() if n != "LoRA, large"}
    assert len(set(small.values())) == 1, small

    ours, better = done["MoS"], lambda a, b: study.difference(done[a], done[b])
    say = lambda pairs: "; ".join(f"{a} - {b}: {10 * m:+.1f} ± {10 * h:.1f}" for (a, b), (m, h) in pairs.items())

    def claim(text: str, *pairs: tuple[str, str]) -> dict[str, str]:
        found = {pair: better(*pair) for pair in pairs}
        return record.claim(text, all(m > 0 for m, _ in found.values()), say(found) + " millibits a byte")

    closed = (ours["mean"] - done["LoRA"]["mean"]) / (done["LoRA, large"]["mean"] - done["LoRA"]["mean"])
    parts = ("MoS, one list for both", "MoS, whole vectors", "MoS, nothing private")
    claims = [
        claim("MoS beats LoRA at equal parameters", ("MoS", "LoRA")),
        claim(
            "Pure sharing is worse than MoS and not better than subset selection",
            ("MoS", "pure sharing"),
            ("subset selection", "pure sharing"),
        ),
        record.claim(
            "MoS closes at least half of the gap to LoRA with 8 times its parameters", closed >= 0.5, f"{closed:.0%}"
        ),
        claim("Each of dissociation, sharding and privatisation helps", *(("MoS", p) for p in parts)),
    ]
    study.finish(
        "mos",
        args,
        paper="MoS, Wang et al., ICLR 2025",
        setup=s,
        rows=list(done.values()),
        claims=claims,
        began=began,
    )


if __name__ == "__main__":
    main()
