"""Reads the TPU compiler's static schedule of a kernel: how many bundles (about one a cycle) each part of its body takes.

The body of a Pallas kernel is one pass over a grid step. What stands under `pl.when` is a predicated region: its bundles
count only in the steps that enter it, so that a kernel's total is the sum of its parts' lengths times how often each is
entered. The schedule does not see waiting for memory: set bytes over bandwidth beside it.
"""

import dataclasses
import os
import re
from pathlib import Path

_EXIT = re.compile(r"(%p\w+) = scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test")
_BACK = re.compile(r"sbr\.rel \(!(%p\w+)\) target")
_BRANCH = re.compile(r"sbr\.rel \(.*?\) target = \$region(\d+)")


@dataclasses.dataclass(frozen=True)
class Region:
    """A stretch of bundles under one predicate, in the order of the code; `own` leaves out regions inside it."""

    start: int
    end: int
    own: int
    depth: int
    mxu: int


def dump_into(folder: Path) -> None:
    """Makes the TPU compiler leave its schedules there. To be called before anything is compiled for a TPU."""
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true"
    )


def regions(folder: Path, kernel: str) -> list[Region]:
    """The predicated regions of the kernel's last compilation, the whole body first."""
    (bundles, use) = (
        _latest(folder, kernel, what) for what in ("final_bundles", "final_hlo-static-per-bundle-utilization")
    )
    lines = bundles.read_text().splitlines()
    busy = _matrix_unit(use)
    open_at: list[tuple[int, int]] = []
    found: list[tuple[int, int, int]] = []
    address = 0
    for line in lines:
        if not (m := re.match(r"^\s*(0x[0-9a-f]+)", line)):
            # A bundle with long comments goes over several lines; only the first has an address.
            for n in re.findall(r"region (\d+)", line):
                _close(open_at, found, int(n), address)
            continue
        address = int(m.group(1), 16)
        if "PF:" in line:
            for n in re.findall(r"region (\d+)", line):
                _close(open_at, found, int(n), address)
        for n in _BRANCH.findall(line):
            open_at.append((int(n), address + 1))
    total = address + 1
    spans = sorted([(0, total), *((a, b) for _, a, b in found)], key=lambda s: (s[0], -s[1]))
    out = []
    for a, b in spans:
        inside = [(c, d) for c, d in spans if (c, d) != (a, b) and a <= c and d <= b]
        top = [s for s in inside if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in inside)]
        own = (b - a) - sum(d - c for c, d in top)
        mxu = sum(busy[a:b]) - sum(sum(busy[c:d]) for c, d in top)
        depth = sum(c <= a and b <= d for c, d in spans if (c, d) != (a, b))
        out.append(Region(a, b, own, depth, mxu))
    return out


def loops(folder: Path, kernel: str) -> list[tuple[int, int, int]]:
    """(first bundle, how many, how often) of the loops inside the kernel's body, of its last compilation."""
    text = _latest(folder, kernel, "final_bundles").read_text()
    start, times, found = None, {}, []
    for line in text.splitlines():
        if not (m := re.match(r"^\s*(0x[0-9a-f]+)", line)):
            continue
        address = int(m.group(1), 16)
        if re.search(r"LB: >>", line):
            start = address
        times |= {p: int(n) for p, n in _EXIT.findall(line)}
        for p in _BACK.findall(line):
            if start is not None and p in times:
                found.append((start, address - start + 1, times[p]))
                start = None
    return found


def _close(open_at: list[tuple[int, int]], found: list[tuple[int, int, int]], number: int, address: int) -> None:
    for i, (n, start) in enumerate(open_at):
        if n == number and address > start:
            found.append((n, start, address))
            del open_at[i]
            return


def _latest(folder: Path, kernel: str, what: str) -> Path:
    found = sorted(folder.glob(f"*-{kernel}.*{what}.txt"))
    found = [p for p in found if "schedule-analysis" not in p.name and "pre-delay" not in p.name]
    if not found:
        raise FileNotFoundError(f"the compiler left no {what} of {kernel!r} in {folder}")
    return found[-1]


def _matrix_unit(path: Path) -> list[int]:
    """Per bundle, how many instructions went to the matrix units."""
    rows = path.read_text().splitlines()
    start = next(i for i, line in enumerate(rows) if "UTILIZATION" in line) + 1
    return [int(line.split()[0]) for line in rows[start:] if line.strip()]
