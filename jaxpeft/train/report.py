"""Results as tables and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.method import METHODS
from jaxpeft.train.metrics import Metrics


def table_of(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """A table for the terminal, numbers to the right."""
    from rich.table import Table

    table = Table(*columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table


def bytes_text(n: float) -> str:
    """A size a person can read: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


def result_table(results: Sequence[Mapping[str, Any]]) -> Any:
    """One row a run."""
    columns = ("method", "test accuracy", "macro-F1", "trained", "of the model", "training", "step's memory", "delta")
    return table_of(
        columns,
        [
            (
                r["method"],
                f"{100 * r['test_accuracy']:.2f} %" if "test_accuracy" in r else "-",
                f"{r['test_macro_f1']:.4f}" if "test_macro_f1" in r else "-",
                f"{r['trained_parameters']:,}",
                f"{r['trained_percent']:.2f} %",
                f"{r['train_seconds']:.0f} s",
                bytes_text(r["step_peak_bytes"]),
                bytes_text(r["delta_bytes"]) if "delta_bytes" in r else "-",
            )
            for r in results
        ],
    )


def methods_table(counts: Mapping[str, int]) -> Any:
    """One row a registered method, by family; fits 80 columns.

    `kind` is the mechanism; `same` tells whether the adapted model starts as its base; "does not" stands for a method whose
    defaults do not fit the model.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    widths = {"method": 19, "paper": 22, "kind": 7, "merges": 6, "same": 4, "parameters": 10}
    for i, (column, width) in enumerate(widths.items()):
        # Long papers are cut: the README's table has them whole.
        table.add_column(column, justify="left" if i < 3 else "right", no_wrap=True, min_width=width, max_width=width)

    def trained(name: str) -> str:
        n = counts.get(name)
        return "-" if n is None else "does not" if n < 0 else f"{n:,}"

    yes = lambda x: "yes" if x else "no"
    for family in sorted({e.family for e in METHODS.values()}):
        table.add_section()
        table.add_row(f"[bold]{family}[/bold]")
        for n, e in sorted(METHODS.items()):
            if e.family == family:
                table.add_row(n, e.paper, e.mechanism, yes(e.mergeable), yes(e.exact_start), trained(n))
    return table


def save_curve(folder: Path, target: Path) -> None:
    """The learning curve of a run: training loss, smoothed, and validation accuracy."""
    plt = _pyplot()
    rows = Metrics.read(folder)
    train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    held = [(r["step"], 100 * r["validation_accuracy"]) for r in rows if "validation_accuracy" in r]
    figure, left = plt.subplots(figsize=(6, 3.5))
    if train:
        x, y = np.array(train).T
        smooth = np.array([y[max(0, i - 4) : i + 1].mean() for i in range(len(y))])
        left.plot(x, y, color="C0", alpha=0.25)
        left.plot(x, smooth, color="C0")
    left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    if held:
        right = left.twinx()
        right.plot(*np.array(held).T, "o-", color="C1")
        right.set(ylabel="validation accuracy, %")
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)


def save_tradeoff(rows: Sequence[Mapping[str, Any]], target: Path, title: str) -> None:
    """Accuracy against trained parameters, with the spread over seeds."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for r in rows:
        axes.errorbar(r["trained_parameters"], 100 * r["mean"], yerr=100 * r["std"], fmt="o", capsize=3)
        axes.annotate(
            r["method"], (r["trained_parameters"], 100 * r["mean"]), xytext=(5, 4), textcoords="offset points"
        )
    axes.set(xscale="log", xlabel="trained parameters", ylabel="test accuracy, %", title=title)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
