"""What speed and memory were to be, and what they are: the first table of docs/benchmarks.md.

- speed: ReBerta's fp32 tokens a second over each peer's, 6 layers x 384, two documents of 4,096 tokens, memory level 0;
  and its own in bf16 over fp32, for CPUs with AMX. A miss says what share of the roofline ReBerta would have to reach
- memory: the peak of a training step at 128k tokens against that at 8k
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.report_tables import OURS, Content, find, markdown_table, share_of_roofline

AIMS = {
    "training": {
        "independent windows": 1.0,
        "full attention": 3.5,
        "Longformer": 12.0,
        "BigBird": 6.0,
        "ModernBERT": 4.0,
    },
    "inference": {
        "independent windows": 1.2,
        "full attention": 4.0,
        "Longformer": 5.5,
        "BigBird": 7.5,
        "ModernBERT": 4.0,
    },
}
AIMS_OF_BF16 = {"training": 2.0, "inference": 2.5}
SHAPE = {"layers": 6, "width": 384, "batch": 2}
TOKENS = 4096
SHORT, LONG = 8192, 129_024  # tokens; the latter are 128,016 without [CLS] and [SEP]
GROWTH, MORE_MB = 1.3, 64 * 2**20 / 1e6
NOISE_MB = 4  # between two runs on the same machine
AUTO = f"{OURS}, memory level auto"


def aims(contents: Mapping[str, Content]) -> list[str]:
    """The section, or nothing where nothing of it was measured."""
    speeds = {
        name: content
        for name, content in contents.items()
        if name.split("-")[0] == "speed"
        and content["options"].items() >= SHAPE.items()
        and find(content["rows"], tokens=TOKENS)
    }
    parts = [_speed_table(speeds)] if speeds else []
    parts += [line for name, content in contents.items() if name == "memory" for line in _memory_line(content)]
    about = (
        f"What this project set out to reach. Speed: in fp32, {SHAPE['layers']} layers of width {SHAPE['width']}, "
        f"{SHAPE['batch']} documents of {TOKENS:,} tokens, memory level 0. The aims were set on one machine, with AMX."
    )
    return ["## Aims", about, *parts] if parts else []


def _speed_table(speeds: Mapping[str, Content]) -> str:
    lines = []
    for mode, peers in AIMS.items():
        for peer, aim in peers.items():
            cells = [_ratio(content, mode, (OURS, "fp32"), (peer, "fp32"), aim) for content in speeds.values()]
            lines.append([f"{mode}, over {peer}", f"{aim:g}", *cells])
    for mode, aim in AIMS_OF_BF16.items():
        cells = [
            _ratio(content, mode, (OURS, "bf16"), (OURS, "fp32"), aim if content["machine"]["amx"] else None)
            for content in speeds.values()
        ]
        lines.append([f"{mode}, bf16 over its own fp32", f"{aim:g} (AMX)", *cells])
    return markdown_table([f"{OURS}'s tokens a second", "aim", *speeds], lines, left=2)


def _ratio(content: Content, mode: str, ours: tuple[str, str], other: tuple[str, str], aim: float | None) -> str:
    rows = [
        find(content["rows"], tokens=TOKENS, mode=mode, model=model, precision=precision)
        for model, precision in (ours, other)
    ]
    if any(row is None or "error" in row for row in rows):
        return ""
    own, peer = (row for row in rows if row is not None)
    ratio = own["tokens_per_second"] / peer["tokens_per_second"]
    if aim is None or ratio >= aim:
        return f"{ratio:.2f}"
    share = share_of_roofline(content, own)
    return f"{ratio:.2f}, **missed**: {share:.0%} of the roofline, {share * aim / ratio:.0%} would be needed"


def _memory_line(content: Content) -> list[str]:
    cells = [find(content["rows"], model=AUTO, mode="training", tokens=tokens) for tokens in (SHORT, LONG)]
    if any(row is None or "error" in row for row in cells):
        return []
    short, long = (row["extra_mb"] for row in cells if row is not None)
    most = GROWTH * short + MORE_MB
    said = "**missed**" if long > most else "reached" if long < most - NOISE_MB else "reached, within the noise"
    return [
        f"Memory of a training step, level `auto`: {long} MB at {LONG:,} tokens. The aim, {GROWTH:g} times the "
        f"{short} MB at {SHORT:,} and 64 MiB, is {most:.0f} MB: {said}."
    ]
