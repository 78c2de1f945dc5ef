"""The pages of docs that show measurements, and their figures, from benchmarks/results: all numbers are generated.

    python -m benchmarks.report

- a section a file: machine, versions, commands, table, figure; files of one benchmark (`speed-*.json`) stand together
- what a person has to say stands in benchmarks/notes: `intro.md` (`reliability.md`), `<benchmark>.md`, and `<file>.md`
  for one of several
- docs/reliability.md waits for results of all its sections; docs/results.md is made of quality.json (see
  `quality_report`), docs/starts.md of starts.json
- a benchmark that has no table of its own here is shown as its rows are
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

from benchmarks import quality_report
from benchmarks.report_aims import aims
from benchmarks.report_figures import FIGURES, figures
from benchmarks.report_tables import TABLES, Content, machine_line, number, plain_table
from files import atomic_path, write_text
from visualization_utils import DPI, STYLE

BENCHMARKS = Path(__file__).parent
RESULTS = BENCHMARKS / "results"
NOTES = BENCHMARKS / "notes"
PAGE = BENCHMARKS.parent / "docs" / "benchmarks.md"
RELIABILITY, QUALITY, STARTS = "reliability.md", "results.md", "starts.md"  # beside PAGE
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
CAPTIONS = {"stress": "over time"}


def origin(content: Content) -> str:
    """Where and how the figures were made: machine, versions, options, and every command with its date."""
    lines = []
    if "machine" in content:
        lines.append(machine_line(content["machine"], f"{content['machine']['threads']} threads"))
    for key in ("versions", "options"):
        if key in content:
            lines.append(", ".join(f"{name} {value}" for name, value in content[key].items()))
    for session in content.get("sessions", []):
        where = f" (on {machine_line(session['machine'])})" if "machine" in session else ""
        lines.append(f"{session['started']}: `{session['command']}`{where}")
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


def pages(contents: Mapping[str, Content]) -> dict[Path, str]:
    """The pages that there are results for, from the content of each file by its name without the ending."""
    found = _sections(contents, TITLES) or ["There are no results in benchmarks/results yet."]
    made = {PAGE: ["# Benchmarks", *_note("intro"), *aims(contents), *found]}
    if RELIABILITY_TITLES.keys() <= contents.keys():
        found = _sections(contents, RELIABILITY_TITLES)
        made[PAGE.with_name(RELIABILITY)] = ["# Reliability", *_note("reliability"), *found]
    if "quality" in contents:
        page = quality_report.Page(contents["quality"])
        method = ["## How it was done", *_note("quality-method"), *quality_report.evidence(page)]
        made[PAGE.with_name(QUALITY)] = ["# Results", *_note("quality"), *quality_report.answers(page), *method]
    if "starts" in contents:
        made[PAGE.with_name(STARTS)] = ["# How a model starts", *_note("starts"), section(contents["starts"])]
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


def main() -> None:
    contents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    for name, content in figures(contents).items():
        with mpl.rc_context(STYLE), atomic_path(PAGE.parent / f"{name}.png") as temporary:
            FIGURES[content["benchmark"]](content).savefig(temporary, dpi=DPI)
    for path, text in pages(contents).items():
        write_text(path, text)


if __name__ == "__main__":
    main()
