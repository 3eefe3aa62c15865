"""Makes the pages of results, here and in bench/ and adapt/, and the tables in README.md, from experiments/results.

python experiments/report.py            writes them
python experiments/report.py --check    exits with 1 where one is stale
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent


def results() -> dict[str, dict[str, Any]]:
    return {p.stem: json.loads(p.read_text()) for p in sorted((HERE / "results").glob("*.json"))}


def experiments_page(found: dict[str, dict[str, Any]]) -> str:
    """One section a paper's experiment: its claim, its verdict, its numbers, and what `notes/<slug>.md` makes of them."""
    lines = [
        "# Experiments",
        "",
        "Made by `python experiments/report.py` from `results/*.json`; a test fails when it is stale. Each script states its",
        "claim before it runs, tunes on validation data only, and looks at the test split once. All adaptation methods in one",
        "table: [adapt/README.md](adapt/README.md). Costs: [bench/README.md](bench/README.md).",
        "",
    ]
    own = {k: r for k, r in found.items() if not k.startswith("bench_") and k != "family"}
    lines += ["| experiment | what | script | claims that held |", "|---|---|---|---|"]
    for slug in own:
        script = script_of(slug)
        name = script.relative_to(HERE)
        lines.append(f"| [{slug}](#{slug}) | {_subject(script)} | [{name}]({name}) | {_share(own[slug])} |")
    return _page([*lines, ""], own, "results")


SCRIPTS = {"merge-folders": "merge/folders.py", "r8_default": "adapt/r8.py", "r8_full": "adapt/r8.py"}
"""Scripts whose results have other names than they."""


def script_of(slug: str) -> Path:
    """The script that writes `results/<slug>.json`."""
    return HERE / SCRIPTS[slug] if slug in SCRIPTS else next(HERE.glob(f"*/{slug.replace('-', '_')}.py"))


def _subject(script: Path) -> str:
    """The first line of the script's docstring."""
    return (ast.get_docstring(ast.parse(script.read_text())) or "").splitlines()[0]


def _share(result: dict[str, Any]) -> str:
    """How many of a result's claims held."""
    claims = result.get("claims", ())
    return f"{sum(c['verdict'] == 'holds' for c in claims)} of {len(claims)}" if claims else ""


def family_page(found: dict[str, dict[str, Any]]) -> str:
    """The table across all methods that fit one classifier, and what each one's own replication says of its paper."""
    lines = [
        "# One table across the family",
        "",
        "Made by `python experiments/report.py` from `../results/family.json`; a test fails when it is stale. What is measured",
        "and how stands in `family.py`; each method's own replication of its paper in `../README.md`.",
        "",
    ]
    family = found["family"]
    rows = [{**r, "its paper's claims that held": held(found, r["method"], "../README.md")} for r in family["rows"]]
    return _page(lines, {"family": {**family, "rows": rows}}, "../results")


def bench_page(found: dict[str, dict[str, Any]]) -> str:
    """One section a benchmark."""
    lines = [
        "# Costs",
        "",
        "Made by `python experiments/report.py` from `../results/bench_*.json`, which the scripts here write; a test fails",
        "when it is stale. What a compiler says of a device that was not there is a prediction and is called so.",
        "",
    ]
    return _page(lines, {k: r for k, r in found.items() if k.startswith("bench_")}, "../results")


def _page(lines: list[str], found: dict[str, dict[str, Any]], folder: str) -> str:
    for slug, r in found.items():
        lines += [f"## {slug}", ""]
        if "claims" in r:
            lines += ["| claim | verdict | evidence |", "|---|---|---|"]
            lines += [f"| {c['claim']} | {c['verdict']} | {c.get('evidence', '')} |" for c in r["claims"]]
            lines.append("")
        for table in ("rows", *r.get("tables", ())):
            if not (rows := [_flat(row) for row in r.get(table, ())]):
                continue
            lines += [*([f"{table}:", ""] if table != "rows" else [])]
            columns = [c for c, x in rows[0].items() if not isinstance(x, list)]  # per-seed numbers: in the file
            lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            lines += ["| " + " | ".join(_text(row.get(c)) for c in columns) + " |" for row in rows]
            lines.append("")
        if (note := HERE / "notes" / f"{slug}.md").exists():
            lines += [note.read_text().strip(), ""]
        if bench := bench_lines(r):
            lines += [*bench, ""]
        if (HERE / "results" / f"{slug}.png").exists():
            lines += [f"![{slug}]({folder}/{slug}.png)", ""]
    return "\n".join(lines).rstrip() + "\n"


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Columns of columns side by side."""
    pairs = ((k, v if isinstance(v, dict) else {"": v}) for k, v in row.items())
    return {f"{k} {name}".strip(): x for k, inner in pairs for name, x in inner.items()}


def bench_lines(r: dict[str, Any]) -> list[str]:
    """The ratios of a benchmark: median and all runs; none where there are no ratios."""
    if not any(isinstance(v, dict) and "median" in v for v in r.values()):
        return []
    lines = ["| ratio | median | runs | goal |", "|---|---|---|---|"]
    for key, value in r.items():
        if isinstance(value, dict) and "median" in value:
            runs = value["runs"] if len(value["runs"]) <= 8 else [min(value["runs"]), max(value["runs"])]
            text = ", ".join(f"{x:.2f}" for x in runs)
            if len(value["runs"]) > 8:
                text = f"{len(value['runs'])} pairs, {runs[0]:.2f} to {runs[1]:.2f}"
            lines.append(f"| {key} | {value['median']:.2f} | {text} | {value.get('goal', '')} |")
    return lines


SHARED = {
    **dict.fromkeys(("mam", "parallel", "scaled_parallel", "sublayer"), "unified-mam"),
    **dict.fromkeys(("compacter", "hyperformer"), "vl-adapter"),
    **dict.fromkeys(("sparse", "sparse_fine_tuning", "mad_x", "language_adapter"), "pe-reranking"),
    "polyhistor_lite": "polyhistor",
    "poly": "mhr",
    "border_prompt": "blackvip",
    "adapter_fusion": "scalearn",
    "anisotropic_scaling": "atlas",
    "isotropic_merging": "fisher-merging",
    "uniform_soup": "model-soups",
    "greedy_soup": "model-soups",
    "learned_soup": "model-soups",
    "wise_ft": "model-soups",
    "task_arithmetic": "breadcrumbs",
    "ties": "breadcrumbs",
    "dare": "breadcrumbs",
}
"""Methods that another paper's experiment replicates."""


ALSO = {
    "d2nwg": ("d2nwg-text",),
    "logah": ("logah-text",),
    "stn": ("stn-language",),
    **dict.fromkeys(
        ("uniform_soup", "task_arithmetic", "ties", "dare", "breadcrumbs", "fisher_merging"), ("merge-folders",)
    ),
}
"""Further experiments of a method, beside that of its paper."""


def held(found: dict[str, dict[str, Any]], name: str, page: str = "experiments/README.md") -> str:
    """How many of its experiments' claims held, with the way there."""
    told = []
    for slug in (SHARED.get(name, name.replace("_", "-")), *ALSO.get(name, ())):
        if share := _share(found.get(slug, {})):
            told.append(f"[{share}]({page}#{slug})")
    return ", ".join(told)


def methods_block(found: dict[str, dict[str, Any]]) -> str:
    """The README's table of methods: what the registry knows, and what the family's table found with little data."""
    from jaxpeft.method import METHODS

    family = found.get("family", {})
    whole = {r["method"]: r for r in family.get("rows", ())}
    texts = {r["method"]: r for r in family.get("r8", ())}
    lines = [
        "| method | paper | mechanism | merges | claims that held in small | mean of five | R8, 10 a class | trained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, e in sorted(METHODS.items()):
        mean = f"{whole[name]['mean accuracy']:.1f} %" if name in whole else ""
        r8, trained = (f"{texts[name]['10 a class']} %", f"{texts[name]['trained']:,}") if name in texts else ("", "")
        cells = (
            f"`{name}`",
            e.paper,
            e.mechanism,
            "yes" if e.mergeable else "no",
            held(found, name),
            mean,
            r8,
            trained,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TRANSFER = {
    "fantastic_gains": "Roth, Thede et al., ICLR 2024",
    "lame": "Boudiaf et al., CVPR 2022",
    "robustify": "after Jain et al., ICCV 2023",
    "trans_lora": "Wang et al., NeurIPS 2024",
}
BESIDE = {"tune.memcontrol": "Dutt et al., WACV 2025"}
"""Methods that are modules of functions, which no registry holds."""


def others_block(found: dict[str, dict[str, Any]]) -> str:
    """The README's table of what is no adaptation of one model."""
    from jaxpeft.hyper import HYPERNETWORKS
    from jaxpeft.merge import MERGES

    rows = [("merge", name, e.paper) for name, e in sorted(MERGES.items())]
    rows += [("hyper", name, e.paper) for name, e in sorted(HYPERNETWORKS.items())]
    rows += [("transfer", name, paper) for name, paper in TRANSFER.items()]
    rows += [(*name.split("."), paper) for name, paper in BESIDE.items()]
    lines = ["| in | name | paper | claims that held in small |", "|---|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| `jaxpeft.{room}` | `{n}` | {paper} | {held(found, n)} |" for room, n, paper in rows)]
    )


def costs_block(found: dict[str, dict[str, Any]]) -> str:
    """The README's figures of cost: what the benchmarks found."""
    named = {"fine-tuning": "bench_finetune", "many adapters": "bench_adapters", "sweep": "bench_sweep"}
    tables = {title: bench_lines(found[n]) for title, n in named.items() if n in found}
    if not tables:
        return "The benchmarks' committed runs are still to come: `experiments/bench`."
    head = next(iter(tables.values()))[:2]
    rows = [row.replace("| ", f"| {title}: ", 1) for title, lines in tables.items() for row in lines[2:]]
    return "\n".join([*head, *rows])


def memory_block(found: dict[str, dict[str, Any]]) -> str:
    """The README's table of temporaries and operations."""
    r = found.get("bench_memory")
    if not r:
        return "Not measured yet: `experiments/bench/memory.py`."
    full = next(row for row in r["rows"] if row["method"] == "full")
    lines = ["| method | temporaries | recomputed | scanned | both | operations |", "|---|---|---|---|---|---|"]
    for row in r["rows"]:
        sizes = " | ".join(f"{row[k]:.0f} MiB" for k in ("plain", "remat", "scan", "scan and remat"))
        lines.append(f"| `{row['method']}` | {sizes} | {row['gflop'] / full['gflop']:.2f} |")
    return "\n".join(lines)


def with_block(text: str, name: str, block: str) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- /name -->` exchanged."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, rest = text.split(start)
    _, tail = rest.split(end)
    return f"{head}{start}\n{block}\n{end}{tail}"


def _text(x: Any) -> str:
    if isinstance(x, float):
        return f"{x:.4g}"
    if isinstance(x, list):
        return ", ".join(map(_text, x))
    return "" if x is None else str(x)


def pages() -> dict[Path, str]:
    """Every generated page and what it should say."""
    found = results()
    readme = ROOT / "README.md"
    text = with_block(readme.read_text(), "methods", methods_block(found))
    text = with_block(text, "others", others_block(found))
    text = with_block(text, "costs", costs_block(found))
    return {
        HERE / "README.md": experiments_page(found),
        HERE / "bench" / "README.md": bench_page(found),
        **({HERE / "adapt" / "README.md": family_page(found)} if "family" in found else {}),
        readme: with_block(text, "memory", memory_block(found)),
    }


def main() -> int:
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path} is stale: run python experiments/report.py")
        return bool(stale)
    for path, text in pages().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
