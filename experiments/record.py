"""What every results file says of itself: commit, versions, claims with verdicts; and how it is written."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxpeft.files import to_plain, write_atomically

RESULTS = Path(__file__).parent / "results"


def provenance(*packages: str) -> dict[str, Any]:
    """The commit this tree is at (saying whether it has changes) and the versions of what it ran on."""

    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/jaxpeft", ":/experiments/**/*.py")
    found = {p: version(p) for p in ("jax", "flax", "optax", "numpy", *packages)}
    commit = git("rev-parse", "HEAD") + (" with changes" if changed else "")
    return {
        "commit": commit or os.environ.get("COMMIT", "unknown"),  # a copy without history is told what it is of
        "versions": {"python": platform.python_version(), **found},
    }


def claim(text: str, holds: bool, evidence: str) -> dict[str, str]:
    """One claim, stated before the run, and what the run says of it."""
    return {"claim": text, "verdict": "holds" if holds else "does not hold", "evidence": evidence}


def write(path: Path, result: dict[str, Any]) -> None:
    """`result` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda p: p.write_text(json.dumps(to_plain(result), indent=1) + "\n"))
