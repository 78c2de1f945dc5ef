"""Figures of benchmarks.report: speed and memory against a document's length, memory over time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from benchmarks.report_tables import OURS, Content, Row, unique


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


FIGURES: dict[str, Callable[[Content], Figure]] = {
    "speed": speed_figure,
    "memory": memory_figure,
    "stress": stress_figure,
}


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
