"""Every experiment runs from start to end at its smallest; what needs torch is in the parity group."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
GROUP = dict.fromkeys(("bench/adapters.py", "bench/finetune.py", "bench/sweep.py"), pytest.mark.parity)
GROUP |= dict.fromkeys(("bench/attention.py", "bench/kernels.py", "bench/plan.py"), pytest.mark.aot)
SCRIPTS = sorted(str(p.relative_to(EXPERIMENTS)) for p in EXPERIMENTS.glob("*/*.py"))


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("script", [pytest.param(s, marks=GROUP.get(s, ())) for s in SCRIPTS])
def test_a_smoke_run_ends_well_and_writes_no_result(script):
    before = {p: p.stat().st_mtime_ns for p in EXPERIMENTS.rglob("*") if p.suffix in (".json", ".png", ".md")}
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device, as a user has
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # what runs twice is not worth compiling well
    out = subprocess.run(
        [sys.executable, EXPERIMENTS / script, "--smoke"], capture_output=True, text=True, env=env, check=False
    )
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    after = {p: p.stat().st_mtime_ns for p in EXPERIMENTS.rglob("*") if p.suffix in (".json", ".png", ".md")}
    assert after == before
