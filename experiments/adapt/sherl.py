"""SHERL (Diao et al., ECCV 2024) in small: memory, accuracy against UniPT and LST, and what its two routes are worth.

    python experiments/adapt/sherl.py            all of it: about half an hour on two quiet cores
    python experiments/adapt/sherl.py --smoke    every part once in small; writes nothing unless --out is given

The problems, budgets and baselines of unipt.py (see side_bench.py), with splits and rates found anew. SHERL, UniPT and LoRA
train about as many parameters; LST twice as many on R8, and the last layer alone is more on both.

Stated before running, each to be reported as holding or not, by the mean of the paired differences over seeds:
  1. The temporaries of SHERL's gradient are at most half of LoRA's.
  2. SHERL is at least as good as UniPT, on both problems.
  3. It is at least as good as LST, on both.
  4. The late layer helps: without it (u goes to the last norm and the head) SHERL is worse, on both.
  5. Redundancy helps or does no harm (R = 1 is not better beyond the interval), on both.
  6. SHERL is at least as good as the linear probe, on both.

Small: two tasks, models of six layers, few updates. The paper's tasks are retrieval, question answering, grounding and GLUE.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import record
import side_bench as bench
import study

from jaxpeft import Method, chain, head
from jaxpeft.adapt.sherl import sherl
from jaxpeft.adapt.unipt import unipt


def forms(reduction: int) -> dict[str, Method]:
    """The method, what is left out of it, and the one before it."""
    return {
        "SHERL": sherl(reduction),
        "SHERL, R = 1": sherl(reduction, discount=False),
        "SHERL, no late layer": sherl(reduction, late=0),
        "UniPT": unipt(reduction),
    }


def main() -> None:
    args = study.arguments("SHERL in small; see the file's first lines.")
    s, began = bench.setup(args.smoke), time.perf_counter()
    problem = bench.digits(s.base, keep=not args.smoke)
    arms = bench.baselines(s, False, ("linear probe", "last layer", "LST", "LoRA", "full"))
    arms |= {n: study.Arm(chain(m, head())) for n, m in forms(s.reductions[1]).items()}
    cost = bench.costs(arms, problem, s, "SHERL")
    done = bench.measured(arms, problem, s.budget, "digits")
    texts = bench.baselines(s, True, ("linear probe", "LST"))
    texts |= {n: study.Arm(chain(m, head())) for n, m in forms(s.text_reductions[1]).items()}
    done |= bench.measured(texts, bench.r8(s), s.text_budget, "R8")

    both = ("digits", "R8")
    discount = {t: study.difference(done[f"SHERL, {t}"], done[f"SHERL, R = 1, {t}"]) for t in both}
    claims = [
        bench.half_of_lora("SHERL", cost),
        bench.over("SHERL is at least as good as UniPT", done, "SHERL", "UniPT", both),
        bench.over("SHERL is at least as good as LST", done, "SHERL", "LST", both),
        bench.over("The late layer helps", done, "SHERL", "SHERL, no late layer", both, strictly=True),
        record.claim(
            "Redundancy helps or does no harm",
            all(mean + half >= 0 for mean, half in discount.values()),
            "; ".join(f"{t}: {mean:+.2f} ± {half:.2f} points" for t, (mean, half) in discount.items()),
        ),
        bench.over("SHERL is at least as good as the linear probe", done, "SHERL", "linear probe", both),
    ]
    rows = bench.rows_of(done, cost)
    paper = "SHERL, Diao et al., ECCV 2024"
    study.finish(
        "sherl", args, paper=paper, setup=s, rows=rows, claims=claims, began=began, cost=cost, figure=bench.figure(rows)
    )


if __name__ == "__main__":
    main()
