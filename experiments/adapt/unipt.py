"""UniPT (Diao et al., CVPR 2024) in small: memory, accuracy, and what its parts are worth.

    python experiments/adapt/unipt.py            all of it: about half an hour on two quiet cores
    python experiments/adapt/unipt.py --smoke    every part once in small; writes nothing unless --out is given

Two frozen models, adapted by a side module and a new head: a small ViT to digits, and MiniLM to 160 Reuters articles (see
side_bench.py). UniPT, LST and LoRA train about as many parameters (LST twice as many on R8). Each arm has one rate out of
three by validation accuracy, then five seeds of which the test split is looked at once. Temporaries and operations are the
compiler's figures for one gradient of the ViT at batch 64.

Stated before running, each to be reported as holding or not, by the mean of the paired differences over seeds:
  1. The temporaries of UniPT's gradient are at most half of LoRA's.
  2. UniPT is at least as good as the linear probe, on both problems.
  3. It is at least as good as LST, on both.
  4. It is at least as good as a learned weighted sum of the layers, on both.
  5. Without its interaction (A = 0) it is worse on digits: a small effect, see the interval.
  6. With even confidences it is worse on digits: as small.
  7. With the last layer alone, y = Up(F_N), it is worse on digits.

Small: two tasks, models of six layers, few updates. The paper's tasks are retrieval, question answering and grounding.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import side_bench as bench
import study

from jaxpeft import chain, head
from jaxpeft.adapt.unipt import unipt


def main() -> None:
    args = study.arguments("UniPT in small; see the file's first lines.")
    s, began = bench.setup(args.smoke), time.perf_counter()
    problem = bench.digits(s.base, keep=not args.smoke)
    ours = {
        "UniPT": unipt(s.reductions[1]),
        "UniPT, no interaction": unipt(s.reductions[1], interact=False),
        "UniPT, even confidence": unipt(s.reductions[1], confident=False),
        "UniPT, last layer alone": unipt(s.reductions[1], states=()),
    }
    arms = bench.baselines(s, False, ("linear probe", "weighted sum", "LST", "LoRA", "full"))
    arms |= {n: study.Arm(chain(m, head())) for n, m in ours.items()}
    cost = bench.costs(arms, problem, s, "UniPT")
    done = bench.measured(arms, problem, s.budget, "digits")
    texts = bench.baselines(s, True, ("linear probe", "weighted sum", "LST", "LoRA"))
    texts["UniPT"] = study.Arm(chain(unipt(s.text_reductions[1]), head()))
    done |= bench.measured(texts, bench.r8(s), s.text_budget, "R8")

    both, digits = ("digits", "R8"), ("digits",)
    claims = [
        bench.half_of_lora("UniPT", cost),
        bench.over("UniPT is at least as good as the linear probe", done, "UniPT", "linear probe", both),
        bench.over("UniPT is at least as good as LST", done, "UniPT", "LST", both),
        bench.over("UniPT is at least as good as a weighted sum of layers", done, "UniPT", "weighted sum", both),
        bench.over("The interaction helps", done, "UniPT", "UniPT, no interaction", digits, strictly=True),
        bench.over("The confidence helps", done, "UniPT", "UniPT, even confidence", digits, strictly=True),
        bench.over("The other layers help", done, "UniPT", "UniPT, last layer alone", digits, strictly=True),
    ]
    rows = bench.rows_of(done, cost)
    paper = "UniPT, Diao et al., CVPR 2024"
    study.finish(
        "unipt", args, paper=paper, setup=s, rows=rows, claims=claims, began=began, cost=cost, figure=bench.figure(rows)
    )


if __name__ == "__main__":
    main()
