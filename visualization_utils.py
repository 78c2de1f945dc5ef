"""Figures from arrays, such as a paper would print them. Knows nothing of models.

- `save_confusion_matrix`: rows normalised by true class; for several labels a document, the outcomes of each label
- `save_class_metrics`: precision, recall and F1 of each class, best first; bars, or a dot plot for many classes
- `save_learning_curves`, `save_run_curves`: one measure in the course of training; a whole run on one page
- `save_length_coverage`: how many documents a number of windows covers
- `save_reliability`: probabilities against observed frequencies
- any number of classes, long names, any script (see `figure_text`): the page grows around what stands on it, so that
  nothing is cut off

Figures are `Figure` objects: neither pyplot nor the chosen backend is touched.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix

from data_utils.windows import capacity, window_counts
from figure_text import Names, Rows, display_width
from files import atomic_path

DPI = 200
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,  # a label such as "$10-$20" is no formula
}
GREY, BLUE, ORANGE = "#777777", "#0072B2", "#D55E00"  # colours of Okabe and Ito (2008), safe for the colour-blind
MEASURES = (("precision", "#56B4E9", "o"), ("recall", "#E69F00", "s"), ("f1", "#3b3b3b", "D"))

OUTCOMES = (
    "with label:\nfound (TP)",
    "with label:\nmissed (FN)",
    "without label:\ngiven (FP)",
    "without label:\nleft (TN)",
)
Labels = Sequence[Any] | np.ndarray
Values = Sequence[float] | Sequence[tuple[float, float]]


@contextlib.contextmanager
def _page(path: str | Path, width: float, height: float, families: list[str]) -> Iterator[tuple[Figure, Axes]]:
    """A figure with axes of `width` x `height` inches, saved with all the space that the texts around them need."""
    with mpl.rc_context({**STYLE, "font.family": families}):
        figure = Figure(figsize=(width, height), dpi=DPI)
        yield figure, figure.add_axes((0, 0, 1, 1))
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=DPI, bbox_inches="tight", pad_inches=0.12)


def save_confusion_matrix(y_true: Labels, y_pred: Labels, path: str | Path, label_names: Sequence[str]) -> None:
    """Draw the confusion matrix of `y_true` and `y_pred`: class indices or names [n], or 0/1 indicators [n, C].

    Colour is the share of the true class (the row); a cell holds percent and count, or the count, where there is room.
    A class without documents has a grey row. Indicators give one row a label, with its hits, misses, false alarms and
    correct rejections. Raises ValueError for a name that is not among `label_names`.
    """
    truth, predicted = _class_indices(y_true, label_names), _class_indices(y_pred, label_names)
    names = Names.of(label_names)
    if truth.ndim == 2:
        _save_label_outcomes(truth, predicted, path, names)
        return
    counts = confusion_matrix(truth, predicted, labels=range(len(label_names)))
    shares = _shares(counts, counts.sum(axis=1, keepdims=True))
    rows = Rows.of(len(label_names), largest=max(0.7, 2.2 / len(label_names)), smallest=0.13, room=7.5, limit=16)
    ticks = names.ticks(rows)[:: rows.step]
    heading = max(10, 1.1 * rows.total)
    with _page(path, rows.total, rows.total, names.families) as (figure, axes):
        pattern = "" if rows.height < 0.2 else "{0}" if rows.height < 0.5 else "{1:.0%}\n{0:,}"
        image = _draw_cells(axes, counts, shares, pattern, min(8, rows.height * 23))
        axes.set_xticks(rows.labelled, ticks, fontsize=rows.font_size, **_turn(ticks, rows))
        axes.set_yticks(rows.labelled, ticks, fontsize=rows.font_size)
        axes.set_xlabel("predicted class", fontsize=heading, labelpad=8)
        axes.set_ylabel("true class", fontsize=heading, labelpad=8)
        correct, total = np.trace(counts), counts.sum()
        axes.set_title(f"{correct:,} of {total:,} documents correct ({correct / total:.1%})", fontsize=heading, pad=8)
        bar = figure.colorbar(image, cax=axes.inset_axes((1 + 0.15 / rows.total, 0, 0.16 / rows.total, 1)))
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        bar.set_label("share of the true class", fontsize=heading)


def _turn(ticks: Sequence[str], rows: Rows) -> dict[str, Any]:
    """How labels stand under the columns: level where they fit, slanting where lines keep apart, else upright."""
    if max(map(display_width, ticks)) * rows.font_size * 0.62 < rows.pitch:
        return {}
    if rows.pitch * math.sqrt(0.5) > 1.3 * rows.font_size and not any("\n" in tick for tick in ticks):
        return {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    return {"rotation": 90}


def _class_indices(values: Labels, label_names: Sequence[str]) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind in "biuf":
        return array.astype(np.int64)
    position = {name: index for index, name in enumerate(label_names)}
    if unknown := sorted(set(array.tolist()) - position.keys()):
        raise ValueError(f"not among the label names: {', '.join(unknown[:5])}")
    return np.array([position[name] for name in array.tolist()], dtype=np.int64)


def _shares(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """counts / totals, NaN where there is nothing to divide by."""
    return np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)


def _draw_cells(axes: Axes, counts: np.ndarray, shares: np.ndarray, pattern: str, font_size: float) -> AxesImage:
    """A heat map of `shares`; `pattern` says how a count (0) and its share (1) are written, nothing if it is empty."""
    colours = mpl.colormaps["Blues"].with_extremes(bad="#eeeeee")
    image = axes.imshow(shares, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    down, across = shares.shape
    axes.autoscale(False)
    axes.hlines(np.arange(down - 1) + 0.5, -0.5, across - 0.5, color="white", linewidth=1 if pattern else 0.4)
    axes.vlines(np.arange(across - 1) + 0.5, -0.5, down - 0.5, color="white", linewidth=1 if pattern else 0.4)
    axes.tick_params(length=0)
    axes.spines[:].set(visible=True, color="#c0c0c0", linewidth=0.6)
    for row, column in np.argwhere(counts) if pattern else ():
        count, share = counts[row, column], shares[row, column]
        style: dict[str, Any] = {"color": "white" if share > 0.55 else "#222222", "fontsize": font_size}
        axes.text(column, row, pattern.format(count, share), ha="center", va="center", **style)
    return image


def _save_label_outcomes(truth: np.ndarray, predicted: np.ndarray, path: str | Path, names: Names) -> None:
    has, said = truth.astype(bool), predicted.astype(bool)
    counts = np.stack([has & said, has & ~said, ~has & said, ~has & ~said], axis=2).sum(axis=0)  # [C, 4]
    shares = _shares(counts, counts.reshape(-1, 2, 2).sum(axis=2).repeat(2, axis=1))
    rows = Rows.of(len(counts), largest=0.36, smallest=0.14, room=8, limit=20)
    with _page(path, 4.8, rows.total, names.families) as (_, axes):
        _draw_cells(axes, counts, shares, "{0:,}  ({1:.0%})" if rows.step == 1 else "", min(8, rows.font_size))
        axes.axvline(1.5, color="white", linewidth=6)
        axes.set_yticks(rows.labelled, names.ticks(rows)[:: rows.step], fontsize=rows.font_size)
        axes.xaxis.tick_top()
        axes.set_xticks(range(4), OUTCOMES, fontsize=8)


def save_class_metrics(per_class: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw precision, recall and F1 of each class, best F1 first, with F1 and the number of documents beside it.

    `per_class`: rows with `label`, `precision`, `recall`, `f1`, `support`. Bars up to 25 classes, a dot plot beyond.
    """
    order = sorted(range(len(per_class)), key=lambda i: (-per_class[i]["f1"], -per_class[i]["support"]))
    classes = [per_class[i] for i in order]
    rows = Rows.of(len(classes), largest=0.46, smallest=0.15, room=9 if len(classes) <= 25 else 6, limit=20)
    names = Names.of(row["label"] for row in per_class)
    ticks = names.ticks(rows)
    with _page(path, 5, rows.total, names.families) as (_, axes):
        handles = (_draw_bars if len(classes) <= 25 else _draw_dots)(axes, classes)
        macro = float(np.mean([row["f1"] for row in classes]))
        line = axes.axvline(macro, color=GREY, linestyle="--", linewidth=1, zorder=0.5)
        axes.set_yticks(rows.labelled, [ticks[order[i]] for i in rows.labelled], fontsize=rows.font_size)
        axes.set(xlim=(0, 1), ylim=(len(classes) - 0.5, -0.5), xlabel="score")
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        _write_column(axes, 1.1, "F1", [f"{row['f1']:.3f}" for row in classes], rows)
        _write_column(axes, 1.26, "documents", [f"{row['support']:,}" for row in classes], rows)
        labels = ["precision", "recall", "F1", f"macro F1 {macro:.3f}"]
        axes.legend([*handles, line], labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8)


def _write_column(axes: Axes, x: float, heading: str, texts: Sequence[str], rows: Rows) -> None:
    """Right-aligned texts that end at `x`, where 1 is the right edge of the axes; those of the labelled rows."""
    style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right"}
    axes.text(x, -0.5 - 0.1 / rows.height, heading, va="bottom", fontsize=8, color=GREY, **style)
    for i in rows.labelled:
        axes.text(x, i, texts[i], va="center", fontsize=rows.font_size, **style)


def _draw_bars(axes: Axes, classes: Sequence[Mapping[str, Any]]) -> list[Any]:
    places = np.arange(len(classes))
    return [
        axes.barh(places + offset, [row[measure] for row in classes], 0.24, color=colour)
        for offset, (measure, colour, _) in zip((-0.26, 0, 0.26), MEASURES, strict=True)
    ]


def _draw_dots(axes: Axes, classes: Sequence[Mapping[str, Any]]) -> list[Any]:
    places = np.arange(len(classes))
    ends = np.array([[row["precision"], row["recall"]] for row in classes])
    axes.hlines(places, ends.min(axis=1), ends.max(axis=1), color="#c8c8c8", linewidth=1)
    return [
        axes.plot([row[measure] for row in classes], places, marker, color=colour, markersize=3.2, clip_on=False)[0]
        for measure, colour, marker in MEASURES
    ]


def save_learning_curves(train_values: Values, val_values: Values, path: str | Path, title: str = "loss") -> None:
    """Draw one measure on training and validation data: a value an epoch, or (step, value) pairs."""
    heading = Names.of([title])
    pairs = any(isinstance(value, tuple | list) for value in (*train_values, *val_values))
    with _page(path, 4.6, 3.1, heading.families) as (_, axes):
        for label, values in {"training": train_values, "validation": val_values}.items():
            points = values if pairs else list(enumerate(values, 1))
            _draw_curve(axes, label, np.array(points, dtype=float).reshape(-1, 2))
        _finish_curves(axes, heading.drawable[0], "optimizer step" if pairs else "epoch")


def save_run_curves(metrics_rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Draw a run on one page: loss, accuracy, macro F1 and learning rate against the optimizer step.

    `metrics_rows`: rows of metrics.jsonl, with `step` and any of `loss`, `learning_rate`, `eval_loss`,
    `eval_accuracy`, `eval_f1_macro`. Of a step that was logged twice (after a resume) the last value counts. A panel
    without values is left out; the best evaluation is marked and named.
    """
    rows = list(metrics_rows)
    loss = {"training": _series(rows, "loss"), "validation": _series(rows, "eval_loss")}
    panels: list[tuple[str, dict[str, np.ndarray], Callable[..., Any] | None]] = [
        ("loss", loss, np.nanargmin),
        ("accuracy", {"validation": _series(rows, "eval_accuracy")}, np.nanargmax),
        ("macro F1", {"validation": _series(rows, "eval_f1_macro")}, np.nanargmax),
        ("learning rate", {"training": _series(rows, "learning_rate")}, None),
    ]
    panels = [panel for panel in panels if any(map(len, panel[1].values()))]
    with _page(path, 4.4, 2.6, ["DejaVu Sans"]) as (_, page):
        page.set_axis_off()
        for place, (title, curves, best) in enumerate(panels):
            axes = page.inset_axes((place % 2 * 1.2, -(place // 2) * 1.36, 1, 1))
            for label, points in curves.items():
                _draw_curve(axes, label, points)
            if best and np.isfinite(curves["validation"][:, 1]).any():
                title += _mark_best(axes, curves["validation"], best)
            _finish_curves(axes, title, "optimizer step")
            axes.set_xlim(0, 1.02 * max(1, *(row["step"] for row in rows)))


def _series(rows: Iterable[Mapping[str, Any]], key: str) -> np.ndarray:
    """[n, 2]: the steps in order, and the value logged last for each."""
    values = {row["step"]: row[key] for row in rows if row.get(key) is not None}
    return np.array(sorted(values.items()), dtype=float).reshape(-1, 2)


def _draw_curve(axes: Axes, label: str, points: np.ndarray) -> None:
    if len(points):
        colour, marker = (BLUE, "o") if label == "training" else (ORANGE, "s")
        axes.plot(*points.T, color=colour, marker=marker if len(points) <= 40 else "", markersize=3.5, label=label)


def _mark_best(axes: Axes, points: np.ndarray, best: Callable[..., Any]) -> str:
    step, value = points[best(points[:, 1])]
    axes.plot(step, value, "*", color=ORANGE, markersize=11, markeredgecolor="white")
    return f" (best {value:.4g} at step {step:,.0f})"


def _finish_curves(axes: Axes, title: str, x_label: str) -> None:
    axes.set(title=title, xlabel=x_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid()
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=8)


def save_length_coverage(
    token_counts: Sequence[int] | np.ndarray, window_size: int, path: str | Path, window_overlap: int = 0
) -> None:
    """Draw what share of the documents a number of windows covers whole, and what share of all tokens they hold.

    `token_counts`: content tokens of each document; a window of W tokens holds W - 2 of them, `window_overlap` of which
    the window before it holds, too.
    """
    tokens = np.sort(np.asarray(token_counts, dtype=np.int64))
    powers = range(max(6, math.ceil(math.log2(window_counts(int(tokens[-1]), window_size, window_overlap)))) + 1)
    windows = np.arange(1, 2 ** powers[-1] + 1)
    room = np.array([capacity(count, window_size, window_overlap) for count in windows.tolist()])
    whole = np.searchsorted(tokens, room, side="right")
    read = np.append(0, tokens.cumsum())[whole] + (len(tokens) - whole) * room
    with _page(path, max(5.2, 0.5 * len(powers)), 3.1, ["DejaVu Sans"]) as (_, axes):
        _draw_coverage(axes, "documents read whole", BLUE, whole / len(tokens), depth=26)
        _draw_coverage(axes, "tokens read", ORANGE, read / max(tokens.sum(), 1), depth=37)
        axes.set_xscale("log", base=2)
        axes.set_xticks([2**power for power in powers], [str(2**power) for power in powers])
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set(ylim=(0, 1.02), xlim=(0.93, 2 ** powers[-1] * 1.07), ylabel="share")
        axes.set_title(f"{len(tokens):,} documents, {tokens.sum():,} tokens")
        axes.set_xlabel(f"windows of {window_size} tokens", labelpad=29)
        axes.grid()
        axes.legend(fontsize=8)


def _draw_coverage(axes: Axes, label: str, colour: str, shares: np.ndarray, depth: float) -> None:
    """A curve of shares by number of windows, and `depth` points below the axis its values at the powers of two."""
    axes.plot(np.arange(len(shares)) + 1, shares, color=colour, drawstyle="steps-post", label=label)
    style: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "ha": "center"}
    for count in (2**power for power in range(len(shares).bit_length())):
        axes.annotate(f"{shares[count - 1]:.1%}", (count, 0), (0, -depth), fontsize=7, color=colour, **style)


def save_reliability(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str | Path, bins: int = 15) -> None:
    """Draw how often predictions of a probability are right, and below it how many predictions each bin has.

    `curves`: one or two by name, the last one on top: probabilities [n], and whether what they were given to is so [n].
    A point is a bin that is not empty.
    """
    edges = np.linspace(0, 1, bins + 1)
    with _page(path, 3.4, 3.4, ["DejaVu Sans"]) as (_, axes):
        below = axes.inset_axes((0, -0.5, 1, 0.32))
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        for colour, name in zip((ORANGE, BLUE)[-len(curves) :], curves, strict=True):
            probabilities, outcomes = curves[name]
            frequency, mean = calibration_curve(outcomes, probabilities, n_bins=bins)
            axes.plot(mean, frequency, color=colour, marker="o", markersize=3.5, label=name, clip_on=False)
            below.stairs(np.histogram(probabilities, edges)[0], edges, color=colour)
        for panel in (axes, below):
            panel.set(xlim=(0, 1))
            panel.grid()
        axes.set(ylim=(0, 1), ylabel="observed frequency")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=8)
        below.set(yscale="log", ylim=(0.8, None), ylabel="predictions", xlabel="predicted probability")
        below.yaxis.set_major_formatter("{x:,.0f}")  # 10^3 would need the parser of formulas
        below.minorticks_off()
