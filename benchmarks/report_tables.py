"""Tables of benchmarks.report, made of rows: markdown, how figures are written, and each benchmark's own table."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

OURS = "ReBerta"
STRIKES = ("while starting", "while training", "aimed at a save", "during a save")
SETTLED = 0.25  # of a stage's time, in which libraries are imported and what is needed once is made

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


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation of what there is."""
    found = [value for value in values if value is not None]
    mean = f"{statistics.mean(found):.3f}" if found else ""
    return f"{mean} ± {statistics.stdev(found):.3f}" if len(found) > 1 else mean


def machine_line(machine: Content, *more: str) -> str:
    """A processor and its memory, and `more` of how it was used."""
    amx = "AMX" if machine["amx"] else "no AMX"
    return ", ".join(
        [machine["cpu"], f"{machine['cores']} cores", *more, f"{machine['memory_gb']} GB", machine["kernels"], amx]
    )


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


def starts_tables(content: Content) -> str:
    """A section a measure."""
    tables = {"documents": _documents_table, "memory": _heard_table, "training": _training_table}
    parts = []
    for measure in unique(content["rows"], "measure"):
        rows = [row for row in content["rows"] if row["measure"] == measure]
        parts += [f"## {measure.capitalize()}", tables[measure](rows)]
    return "\n\n".join(parts)


def _documents_table(rows: Sequence[Row]) -> str:
    lines = [[row["start"], f"{row['spread']:.2%}", f"{row['log_loss']:.3f}", f"{row['accuracy']:.3f}"] for row in rows]
    return markdown_table(["document state", "spread", "probe: log loss", "probe: accuracy"], lines, left=1)


def _heard_table(rows: Sequence[Row]) -> str:
    windows = [f"window {window}" for window in range(1, 1 + len(rows[0]["change"]))]
    lines = [
        [row["start"], kind, *(f"{value:.0e}" for value in row[kind])]
        for kind in ("change", "gradient")
        for row in rows
    ]
    return markdown_table(["what is carried", "share of the state's", *windows], lines, left=2)


def _training_table(rows: Sequence[Row]) -> str:
    epochs = sorted({int(epoch) for row in rows for epoch in row["validation"]})
    lines = []
    for row in rows:
        losses = [f"{row['validation'][str(epoch)]:.3f}" if str(epoch) in row["validation"] else "" for epoch in epochs]
        tested = [f"{row['accuracy']:.3f}", f"{row['test_log_loss']:.3f}"]
        lines.append([row["start"], *losses, str(row["best_epoch"]), *tested])
    header = ["start", *(f"epoch {epoch}" for epoch in epochs), "best epoch", "test: accuracy", "test: log loss"]
    return markdown_table(header, lines, left=1)


TABLES: dict[str, Callable[[Content], str]] = {
    "speed": speed_table,
    "memory": memory_table,
    "kills": kills_table,
    "stress": stress_table,
    "starts": starts_tables,
}
