"""docs/benchmarks.md and its figures, from the JSON files in benchmarks/results: every number there is generated.

    python -m benchmarks.report

- a section a file: machine, versions, commands, table, figure; files of one benchmark (`speed-*.json`) stand together
- what a person has to say stands in benchmarks/notes: `intro.md`, `<benchmark>.md`, and `<file>.md` for one of several
- a benchmark that has no table of its own here is shown as its rows are
"""

from __future__ import annotations

import json
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
TITLES = {
    "speed": "Speed",
    "memory": "Memory",
    "data": "Data",
    "accuracy": "Accuracy",
}

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


TABLES: dict[str, Callable[[Content], str]] = {"speed": speed_table, "memory": memory_table}
FIGURES: dict[str, Callable[[Content], Figure]] = {"speed": speed_figure, "memory": memory_figure}


def origin(content: Content) -> str:
    """Where and how the figures were made: machine, versions, options, and every command with its date."""
    lines = []
    if "machine" in content:
        machine = content["machine"]
        lines.append(
            f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['memory_gb']} GB, "
            f"{machine['kernels']}, {'AMX' if machine['amx'] else 'no AMX'}"
        )
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


def render(contents: Mapping[str, Content]) -> str:
    """The page, from the content of each file by its name without the ending."""
    parts = ["# Benchmarks", *_note("intro")]
    for benchmark, title in TITLES.items():
        names = [name for name in contents if name.split("-")[0] == benchmark]
        if names:
            parts += [f"## {title}", *_note(benchmark)]
        for name in names:
            if name != benchmark:
                parts += [f"### {name}", *_note(name)]
            parts.append(section(contents[name]))
        drawn = figures({name: contents[name] for name in names})
        parts += [f"![{title} by document length: {name}]({name}.png)" for name in drawn]
    if not contents:
        parts.append("There are no results in benchmarks/results yet.")
    return "\n\n".join(parts) + "\n"


def figures(contents: Mapping[str, Content]) -> dict[str, Content]:
    """What is drawn, by the figure's name: the rows of all files of a benchmark that are of one encoder's shape.

    A curve needs two lengths.
    """
    merged: dict[str, Content] = {}
    for content in contents.values():
        if content.get("benchmark") in FIGURES:
            name = "{}-{layers}x{width}".format(content["benchmark"], **content["options"])
            before = merged.get(name, {"rows": []})
            merged[name] = {"benchmark": content["benchmark"], "rows": [*before["rows"], *content["rows"]]}
    return {
        name: content
        for name, content in merged.items()
        if len(unique((row for row in content["rows"] if "error" not in row), "tokens")) > 1
    }


def main() -> None:
    contents = {path.stem: _read(path) for path in sorted(RESULTS.glob("*.json"))}
    for name, content in figures(contents).items():
        with mpl.rc_context(STYLE), atomic_path(PAGE.parent / f"{name}.png") as temporary:
            FIGURES[content["benchmark"]](content).savefig(temporary, dpi=DPI)
    write_text(PAGE, render(contents))


if __name__ == "__main__":
    main()
