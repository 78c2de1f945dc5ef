"""docs/benchmarks.md, reliability.md, results.md and figures, from benchmarks/results: every number there is generated.

    python -m benchmarks.report

- a section a file: machine, versions, commands, table, figure; files of one benchmark (`speed-*.json`) stand together
- what a person has to say stands in benchmarks/notes: `intro.md` (`reliability.md`), `<benchmark>.md`, and `<file>.md`
  for one of several
- docs/reliability.md waits for results of all its sections; docs/results.md, for quality.json: see `quality_report`
- a benchmark that has no table of its own here is shown as its rows are
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from utils import atomic_path, write_text
from visualization_utils import DPI, STYLE

BENCHMARKS = Path(__file__).parent
RESULTS = BENCHMARKS / "results"
NOTES = BENCHMARKS / "notes"
PAGE = BENCHMARKS.parent / "docs" / "benchmarks.md"
OURS = "ReBerta"
STRIKES = ("while starting", "while training", "aimed at a save", "during a save")
RELIABILITY, QUALITY = "reliability.md", "results.md"  # beside PAGE
TITLES = {
    "speed": "Speed",
    "memory": "Memory",
    "data": "Data",
    "accuracy": "Accuracy",
}
RELIABILITY_TITLES = {
    "kills": "Kills, signals and damaged checkpoints",
    "stress": "Stress",
    "fuzz": "Fuzzing",
}
SETTLED = 0.25  # of a stage's time, in which libraries are imported and what is needed once is made
CAPTIONS = {"stress": "over time"}

Content = Mapping[str, Any]
Row = Mapping[str, Any]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table whose first `left` columns are text, the others numbers."""
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def unique(rows: Iterable[Row], key: str) -> list[Any]:
    """The values of `key`, in the order in which they first come."""
    return list(dict.fromkeys(row[key] for row in rows))


def find(rows: Iterable[Row], **cell: Any) -> Row | None:
    return next((row for row in rows if cell.items() <= row.items()), None)


def number(value: Any) -> str:
    """Three figures at least, thousands set apart; what is no number as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3g}"


def rooflines(content: Content, precision: str) -> list[float]:
    """All that were measured, FLOPs a second, in the order of time."""
    return [
        session[when][precision]
        for session in content["sessions"]
        for when in ("roofline_at_start", "roofline_at_end")
        if when in session
    ]


def share_of_roofline(content: Content, row: Row) -> float:
    """FLOPs a second of a row, as a share of the best that a plain matrix product reached on that machine."""
    return row["flops"] / row["seconds"] / max(rooflines(content, row["precision"]))


def speed_table(content: Content) -> str:
    modes = unique(content["rows"], "mode")
    columns = ["tokens/s", f"{OURS} / it", "of roofline", "calls"]
    header = ["tokens", "precision", "model", *(f"{mode}: {column}" for mode in modes for column in columns)]
    lines = []
    for tokens in unique(content["rows"], "tokens"):
        for precision in unique(content["rows"], "precision"):
            for model in unique(content["rows"], "model"):
                line = [f"{tokens:,}", precision, model]
                for mode in modes:
                    cell = {"tokens": tokens, "precision": precision, "mode": mode}
                    row = find(content["rows"], model=model, **cell)
                    line += _speed_cells(content, row, find(content["rows"], model=OURS, **cell))
                lines.append(line)
    text = markdown_table(header, lines, left=3)
    for precision in unique(content["rows"], "precision"):
        figures = ", ".join(f"{value / 1e9:,.0f}" for value in rooflines(content, precision))
        text += f"\n\nRoofline, {precision}, GFLOP/s at start and end: {figures}."
    return text


def _speed_cells(content: Content, row: Row | None, ours: Row | None) -> list[str]:
    if row is None:
        return [""] * 4
    if "error" in row:
        return ["failed", "", "", ""]
    ratio = ours["tokens_per_second"] / row["tokens_per_second"] if ours is not None and "error" not in ours else None
    return [
        f"{row['tokens_per_second']:,.0f}",
        "" if ratio is None else f"{ratio:.2f}",
        f"{share_of_roofline(content, row):.0%}",
        f"{row['calls']}, cold" if row["cold"] else str(row["calls"]),
    ]


def memory_table(content: Content) -> str:
    lengths = sorted(unique(content["rows"], "tokens"))
    lines = []
    for mode in unique(content["rows"], "mode"):
        for model in unique((row for row in content["rows"] if row["mode"] == mode), "model"):
            found = [find(content["rows"], mode=mode, model=model, tokens=tokens) for tokens in lengths]
            lines.append([model, mode, *(_memory_cell(row) for row in found)])
    header = ["peak beyond weights and gradients, MB", "", *(f"{tokens:,} tokens" for tokens in lengths)]
    return markdown_table(header, lines, left=2)


def _memory_cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "error" not in row:
        return f"{row['extra_mb']:,}"
    if row["error"].startswith("not tried"):
        return "–"
    return row["error"] if row["error"].startswith("over ") else "failed"


def plain_table(content: Content) -> str:
    header = list(dict.fromkeys(key for row in content["rows"] for key in row))
    lines = [[number(row.get(key, "")) for key in header] for row in content["rows"]]
    return markdown_table(header, lines, left=1)


def kills_table(content: Content) -> str:
    """What was done to runs, damage by file, and every fault."""
    struck = [row for row in content["rows"] if row["scenario"] != "damage"]
    kinds = dict.fromkeys((row["scenario"], row["processes"]) for row in struck)
    lines = [_kind_of_strike([row for row in struck if (row["scenario"], row["processes"]) == kind]) for kind in kinds]
    header = ["done to the run", "processes", "exit codes", "runs", "process starts", *STRIKES, "runs at fault"]
    parts = [markdown_table(header, lines, left=3)]
    damages = [row for row in content["rows"] if row["scenario"] == "damage"]
    kinds_of_damage = unique(damages, "damage")
    lines = []
    for of, file in dict.fromkeys((row["of"], row["file"]) for row in damages):
        found = [find(damages, of=of, file=file, damage=damage) for damage in kinds_of_damage]
        lines.append([of, file, *("" if row is None else "FAULT" if row["faults"] else "as it must" for row in found)])
    if lines:
        parts.append(markdown_table(["damage to", "file", *kinds_of_damage], lines, left=2 + len(kinds_of_damage)))
    at_fault = [row for row in content["rows"] if row["faults"]]
    parts.append(
        f"Runs at fault: {len(at_fault)} of {len(content['rows'])} ({len(damages)} of them of damaged checkpoints)."
    )
    facts = ("scenario", "processes", "of", "file", "damage")
    parts += [f"- {', '.join(row[key] for key in facts if key in row)}: {'; '.join(row['faults'])}" for row in at_fault]
    return "\n\n".join(parts)


def _kind_of_strike(rows: Sequence[Row]) -> list[str]:
    codes = Counter(code for row in rows for code in row.get("exit codes", []))
    return [
        rows[0]["scenario"],
        rows[0]["processes"],
        ", ".join(f"{code} ({times} x)" for code, times in codes.items()),
        number(len(rows)),
        number(sum(row["starts"] for row in rows)),
        *(number(sum(row.get(strike, 0) for row in rows)) for strike in STRIKES),
        number(sum(bool(row["faults"]) for row in rows)),
    ]


def stress_table(content: Content) -> str:
    """A row a figure, a column a stage."""
    rows = content["rows"]
    plain = {
        "documents in": "documents_in",
        "documents out": "documents_out",
        "the same ids in the same order": "same_ids_in_order",
        "the same predictions as in the evaluation": "predicts_as_evaluation",
        "longest document, tokens": "longest",
        "exit code": "exit_code",
        "seconds": "seconds",
    }
    lines = [[name, *(number(row.get(key, "")) for row in rows)] for name, key in plain.items()]
    read = [f"{row['tokens_read']:,} of {row['tokens']:,}" if "tokens" in row else "" for row in rows]
    lines.append(["tokens read", *read])
    for kind in ("resident", "private"):
        ends = [_start_and_end(row[kind]) for row in rows]
        thousands = [(1 - SETTLED) * row["documents_in"] / 1000 for row in rows]
        grown = [f"{(end - start) / count:.2f}" for (start, end), count in zip(ends, thousands, strict=True)]
        lines.append([f"{kind} memory, start, MB", *(number(start) for start, _ in ends)])
        lines.append([f"{kind} memory, end, MB", *(number(end) for _, end in ends)])
        lines.append([f"{kind} memory, peak, MB", *(number(row[f"{kind}_peak_mb"]) for row in rows)])
        lines.append([f"{kind} memory, growth per 1,000 documents, MB", *grown])
    return markdown_table(["", *(row["stage"] for row in rows)], lines, left=1)


def _start_and_end(curve: Sequence[int]) -> tuple[float, float]:
    """Medians of a twentieth of the curve each: right after the first quarter, and at the end."""
    some, settled = math.ceil(len(curve) / 20), int(SETTLED * len(curve))
    return statistics.median(curve[settled : settled + some]), statistics.median(curve[-some:])


def _log_axes(axes: Axes, rows: Iterable[Row], label: str) -> None:
    lengths = sorted(unique(rows, "tokens"))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths], rotation=30)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
    axes.grid(True)


def _plot(axes: Axes, rows: Iterable[Row], name: str, key: str, **style: Any) -> None:
    points = sorted((row["tokens"], row[key]) for row in rows if "error" not in row)
    axes.plot(*zip(*points, strict=True), label=name, marker="o", linewidth=2 if name.startswith(OURS) else 1, **style)


def speed_figure(content: Content) -> Figure:
    """Tokens a second against length: a row of panels a precision, a column a mode."""
    rows = content["rows"]
    precisions, modes = unique(rows, "precision"), unique(rows, "mode")
    figure = Figure(figsize=(5 * len(modes), 3.2 * len(precisions)), layout="constrained")
    grid = figure.subplots(len(precisions), len(modes), squeeze=False)
    for i, precision in enumerate(precisions):
        for j, mode in enumerate(modes):
            panel = [row for row in rows if row["precision"] == precision and row["mode"] == mode]
            for number_of_model, model in enumerate(unique(rows, "model")):
                line = [row for row in panel if row["model"] == model]
                if any("error" not in row for row in line):
                    _plot(grid[i, j], line, model, "tokens_per_second", color=f"C{number_of_model}")
            grid[i, j].set_title(f"{mode}, {precision}")
            _log_axes(grid[i, j], rows, "tokens a second")
    handles = {line.get_label(): line for axes in grid.flat for line in axes.lines}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    return figure


def memory_figure(content: Content) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for model, mode in dict.fromkeys((row["model"], row["mode"]) for row in content["rows"]):
        line = [row for row in content["rows"] if row["model"] == model and row["mode"] == mode]
        if any("error" not in row for row in line):
            name, linestyle = (model, "-") if mode == "training" else (f"{model}, {mode}", "--")
            _plot(axes, line, name, "extra_mb", linestyle=linestyle)
    _log_axes(axes, content["rows"], "MB beyond weights and gradients")
    figure.legend(loc="outside right upper")
    return figure


def stress_figure(content: Content) -> Figure:
    figure = Figure(figsize=(4 * len(content["rows"]), 3.5), layout="constrained")
    panels = figure.subplots(1, len(content["rows"]), sharey=True, squeeze=False)[0]
    for axes, row in zip(panels, content["rows"], strict=True):
        for kind in ("resident", "private"):
            axes.plot(row["time"], row[kind], label=kind)
        axes.set_title(row["stage"])
        axes.set_xlabel("seconds")
        axes.set_ylim(bottom=0)
        axes.grid(True)
    panels[0].set_ylabel("memory, MB")
    panels[0].legend()
    return figure


TABLES: dict[str, Callable[[Content], str]] = {
    "speed": speed_table,
    "memory": memory_table,
    "kills": kills_table,
    "stress": stress_table,
}
FIGURES: dict[str, Callable[[Content], Figure]] = {
    "speed": speed_figure,
    "memory": memory_figure,
    "stress": stress_figure,
}


def machine_line(machine: Content, *more: str) -> str:
    """A processor and its memory, and `more` of how it was used."""
    amx = "AMX" if machine["amx"] else "no AMX"
    return ", ".join(
        [machine["cpu"], f"{machine['cores']} cores", *more, f"{machine['memory_gb']} GB", machine["kernels"], amx]
    )


def origin(content: Content) -> str:
    """Where and how the figures were made: machine, versions, options, and every command with its date."""
    lines = []
    if "machine" in content:
        lines.append(machine_line(content["machine"], f"{content['machine']['threads']} threads"))
    for key in ("versions", "options"):
        if key in content:
            lines.append(", ".join(f"{name} {value}" for name, value in content[key].items()))
    lines += [f"{session['started']}: `{session['command']}`" for session in content.get("sessions", [])]
    return "\n".join(f"- {line}" for line in lines)


def section(content: Content) -> str:
    """Origin, table, and what failed."""
    table = TABLES.get(content.get("benchmark", ""), plain_table)(content)
    failures = [
        f"- {', '.join(number(value) for key, value in row.items() if key != 'error')}: {row['error']}"
        for row in content["rows"]
        if "error" in row
    ]
    parts = [origin(content), table, "\n".join(["What has no figure, and why:", "", *failures]) if failures else ""]
    return "\n\n".join(part for part in parts if part)


def _note(name: str) -> list[str]:
    path = NOTES / f"{name}.md"
    return [path.read_text(encoding="utf-8").strip()] if path.exists() else []


def _read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return {"rows": content} if isinstance(content, list) else content


def pages(contents: Mapping[str, Content]) -> dict[Path, str]:
    """The pages that there are results for, from the content of each file by its name without the ending."""
    from benchmarks import quality_report  # whose tables are made with what stands here

    found = _sections(contents, TITLES) or ["There are no results in benchmarks/results yet."]
    made = {PAGE: ["# Benchmarks", *_note("intro"), *found]}
    if RELIABILITY_TITLES.keys() <= contents.keys():
        found = _sections(contents, RELIABILITY_TITLES)
        made[PAGE.with_name(RELIABILITY)] = ["# Reliability", *_note("reliability"), *found]
    if "quality" in contents:
        found = quality_report.sections(contents["quality"])
        made[PAGE.with_name(QUALITY)] = ["# Results", *_note("quality"), *found]
    return {page: "\n\n".join(parts) + "\n" for page, parts in made.items()}


def _sections(contents: Mapping[str, Content], titles: Mapping[str, str]) -> list[str]:
    parts = []
    for benchmark, title in titles.items():
        names = [name for name in contents if name.split("-")[0] == benchmark]
        if names:
            parts += [f"## {title}", *_note(benchmark)]
        for name in names:
            if name != benchmark:
                parts += [f"### {name}", *_note(name)]
            parts.append(section(contents[name]))
        drawn = figures({name: contents[name] for name in names})
        caption = f"{title} {CAPTIONS.get(benchmark, 'by document length')}"
        parts += [f"![{caption}: {name}]({name}.png)" for name in drawn]
    return parts


def figures(contents: Mapping[str, Content]) -> dict[str, Content]:
    """What is drawn, by the figure's name: the rows of all files of a benchmark that are of one encoder's shape.

    A curve needs two lengths. The stress run has a figure of its own.
    """
    merged: dict[str, Content] = {}
    for content in contents.values():
        if content.get("benchmark") in FIGURES and "layers" in content["options"]:
            name = "{}-{layers}x{width}".format(content["benchmark"], **content["options"])
            before = merged.get(name, {"rows": []})
            merged[name] = {"benchmark": content["benchmark"], "rows": [*before["rows"], *content["rows"]]}
    curves = {
        name: content
        for name, content in merged.items()
        if len(unique((row for row in content["rows"] if "error" not in row), "tokens")) > 1
    }
    return curves | {f"{name}-memory": content for name, content in contents.items() if name == "stress"}


def main() -> None:
    contents = {path.stem: _read(path) for path in sorted(RESULTS.glob("*.json"))}
    for name, content in figures(contents).items():
        with mpl.rc_context(STYLE), atomic_path(PAGE.parent / f"{name}.png") as temporary:
            FIGURES[content["benchmark"]](content).savefig(temporary, dpi=DPI)
    for path, text in pages(contents).items():
        write_text(path, text)


if __name__ == "__main__":
    main()
