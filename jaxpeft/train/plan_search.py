"""The largest batch that a pod takes: a few compiled plans, and the line that memory lies on between them."""

import dataclasses
import math
from typing import Any

from jaxpeft import aot
from jaxpeft.train.plan import Plan, PlanConfig, mesh_of, model_for, plan, read_pod
from jaxpeft.train.sharding import BATCH


def largest_batch(config: PlanConfig, *, most: int = 8) -> tuple[int, list[Plan]]:
    """The most rows that fit, and the plans that say so.

    Memory is nearly affine in the rows: the plans of the fewest rows and of twice those give a line, the next is made
    where it meets the limit, and so on between what fits and what does not.

    Args:
      config: its `rows` are not read.
      most: compiles at most.

    Returns:
      Rows, 0 where not even one for each device that divides the batch fits; every plan made. The rows were compiled; one
      unit (data x fsdp x accumulate) more was compiled and did not fit, unless `most` ended the search before.
    """
    model, _ = model_for(config)
    mesh = mesh_of(config, model)
    unit = math.prod(mesh.shape[a] for a in BATCH) * config.accumulate
    plans: list[Plan] = []

    def total(units: int) -> int:
        plans.append(plan(dataclasses.replace(config, rows=units * unit)))
        return plans[-1].total

    limit = aot.TARGETS[read_pod(config.pod).kind].memory
    return unit * largest(total, limit, most), plans


def largest(total: Any, limit: int, most: int) -> int:
    """The largest n >= 1 with `total(n) <= limit` for a `total` that grows nearly along a line; 0 where there is none.

    Args:
      total: `(n) -> bytes`; called at most `most` times.
    """
    known = {1: total(1)}
    if known[1] > limit:
        return 0
    known[2] = total(2)
    while len(known) < most:
        fits = max(n for n, size in known.items() if size <= limit)
        fails = min((n for n, size in known.items() if size > limit), default=None)
        if fails == fits + 1:
            break
        low, high = sorted(known)[-2:] if fails is None else (fits, fails)
        slope = max((known[high] - known[low]) / (high - low), 1.0)
        n = max(int(low + (limit - known[low]) / slope), fits + 1)
        n = n if fails is None else min(n, fails - 1)
        known[n] = total(n)
    return max(n for n, size in known.items() if size <= limit)
