"""A plan as a table for the terminal."""

from collections.abc import Sequence
from typing import Any

from jaxpeft.train.plan import Plan
from jaxpeft.train.report import bytes_text, table_of


def plan_table(plans: Sequence[Plan]) -> Any:
    """One column a plan; bytes of one device. Everything in it is the compiler's prediction."""
    return table_of(
        ["of one device, predicted", *(f"{p.config.rows} x {p.config.length}" for p in plans)],
        [[name, *(row(p) for p in plans)] for name, row in _ROWS.items()],
    )


def _collectives(p: Plan) -> str:
    if not p.collectives:
        return "-"
    return "\n".join(f"{kind} {c.count} x, {bytes_text(c.bytes)}" for kind, c in p.collectives.items())


def _cycles(p: Plan) -> str:
    if not p.cycles:
        return "-"
    return f"{p.cycles / 1e6:,.1f} million cycles" + (f", {p.seconds:.3f} s" if p.seconds else "")


_ROWS = {
    "mesh": lambda p: ", ".join(f"{name} {n}" for name, n in p.mesh.items()),
    "base": lambda p: bytes_text(p.base),
    "delta": lambda p: bytes_text(p.delta),
    "optimiser": lambda p: bytes_text(p.optimiser),
    "temporaries": lambda p: bytes_text(p.temporaries),
    "total": lambda p: bytes_text(p.total),
    "of": lambda p: bytes_text(p.limit),
    "fits": lambda p: "yes" if p.fits else "no",
    "collectives in a step, sent": _collectives,
    "computing, estimated": _cycles,
    "compiled in": lambda p: f"{p.compile_seconds:.0f} s",
}
