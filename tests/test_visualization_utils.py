"""Figures: every name inside the picture and apart from its neighbour, whatever the number of classes or the script."""

from __future__ import annotations

import itertools
import logging
import math
import warnings

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

import figure_text
import visualization_utils
from data_utils.windows import capacity
from visualization_utils import (
    save_class_metrics,
    save_confusion_matrix,
    save_learning_curves,
    save_length_coverage,
    save_reliability,
    save_run_curves,
)

SUBJECTS = "经济金融政治军事外交教育科技文化体育娱乐健康旅游汽车房产社会法律环境农业能源交通"
NAMES = {
    "long": lambda i: f"Economic affairs, foreign policy and defence of all the member states, part {i} of the series",
    "chinese": lambda i: f"{SUBJECTS[2 * i % 40 : 2 * i % 40 + 2]}新闻与评论（第{i}类）",
}


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn."""
    drawn = []

    class Recorded(visualization_utils.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            drawn.append(self)

    monkeypatch.setattr(visualization_utils, "Figure", Recorded)
    return drawn


@pytest.fixture
def logged(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("reberta"), "propagate", True)
    caplog.set_level(logging.WARNING, "reberta")
    return caplog


def confusion(path, names):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, len(names), 3000)
    save_confusion_matrix(truth, np.where(rng.random(3000) < 0.7, truth, truth // 2), path, names)


def outcomes(path, names):
    rng = np.random.default_rng(0)
    truth = rng.random((300, len(names))) < 0.2
    save_confusion_matrix(truth, truth ^ (rng.random(truth.shape) < 0.1), path, names)


def class_metrics(path, names):
    rows = [{"label": n, "precision": 0.9, "recall": 1 / (i + 1), "f1": 0.5, "support": i} for i, n in enumerate(names)]
    save_class_metrics(rows, path)


@pytest.mark.parametrize("draw", [confusion, outcomes, class_metrics])
@pytest.mark.parametrize("kind", sorted(NAMES))
@pytest.mark.parametrize("classes", [5, 20, 100])
def test_names_stand_inside_the_picture_and_apart(tmp_path, figures, logged, classes, kind, draw):
    names = [NAMES[kind](i) for i in range(classes)]
    path = tmp_path / "figure.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is a warning
        draw(path, names)
    assert not logged.records
    assert 20_000 < path.stat().st_size < 2_000_000

    (figure,) = figures
    axes = figure.axes[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    page = figure.get_tightbbox(renderer).padded(0.12)  # inches
    ink = imread(path)[..., :3]
    assert ink.shape[:2] == pytest.approx((page.height * 200, page.width * 200), abs=4)
    ink[10:-10, 10:-10] = 1
    assert (ink == 1).all()  # nothing reaches the border

    expected = classes if draw is not outcomes else 4
    for axis, count in (("y", classes), ("x", expected if draw is not class_metrics else 6)):
        ticks = getattr(axes, f"get_{axis}ticklabels")()
        assert len({tick.get_text() for tick in ticks}) == count
        boxes = [tick.get_window_extent(renderer) for tick in ticks]
        for box in boxes:
            assert page.x0 <= box.x0 / figure.dpi < box.x1 / figure.dpi <= page.x1
            assert page.y0 <= box.y0 / figure.dpi < box.y1 / figure.dpi <= page.y1
        if ticks[0].get_rotation() == 45:  # the boxes overlap, the names need not
            pitch = axes.transData.transform([(0, 0), (1, 0)])[:, 0] @ [-1, 1] / math.sqrt(2)
            assert all(tick.get_fontsize() * 1.2 * figure.dpi / 72 <= pitch for tick in ticks)
        else:
            assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_hundreds_of_classes_have_every_other_name(tmp_path, figures):
    confusion(tmp_path / "figure.png", [f"class {i}" for i in range(300)])
    axes = figures[0].axes[0]
    assert len(axes.get_yticklabels()) == len(axes.get_xticklabels()) == 100
    assert axes.get_yticklabels()[1].get_text() == "class 3"
    assert figures[0].get_size_inches().tolist() == [16, 16]


def test_names_without_a_font_keep_their_number(tmp_path, figures, logged, monkeypatch):
    monkeypatch.setattr(figure_text, "_font_candidates", lambda: iter(()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_confusion_matrix([0, 1, 2], [0, 1, 1], tmp_path / "figure.png", ["经济", "政治 news", "other"])
    ticks = [tick.get_text() for tick in figures[0].axes[0].get_yticklabels()]
    assert ticks == ["#0 □□", "#1 □□ news", "other"]
    assert "'政' (U+653F)" in logged.text
    assert f"pip install {figure_text.FONT_PACKAGE}" in logged.text


def test_names_that_folding_made_equal_are_numbered(tmp_path, figures):
    middle = [f"{'a' * 100}{i}{'b' * 100}" for i in range(40)]
    confusion(tmp_path / "figure.png", middle)
    ticks = [tick.get_text() for tick in figures[0].axes[0].get_yticklabels()]
    assert len(set(ticks)) == 40
    assert ticks[17].startswith("#17 aaa")


def test_numbers_of_names_are_those_of_the_classes(tmp_path, figures):
    rows = [{"label": "x" * 500, "precision": f1, "recall": f1, "f1": f1, "support": 3} for f1 in (0.1, 0.9, 0.5)]
    save_class_metrics(rows, tmp_path / "figure.png")
    ticks = [tick.get_text() for tick in figures[0].axes[0].get_yticklabels()]
    assert [tick[:2] for tick in ticks] == ["#1", "#2", "#0"]  # best F1 first


def test_dollars_are_no_formula(tmp_path, figures):
    save_confusion_matrix([0, 1], [0, 1], tmp_path / "figure.png", ["$10-$20", "$x_"])
    assert [tick.get_text() for tick in figures[0].axes[0].get_yticklabels()] == ["$10-$20", "$x_"]


def test_confusion_matrix_takes_names_and_shows_percent_and_count(tmp_path, figures):
    truth = ["a", "a", "a", "a", "c", "c"]
    save_confusion_matrix(truth, ["a", "a", "a", "b", "c", "a"], tmp_path / "figure.png", ["a", "b", "c"])
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["75%\n3", "25%\n1", "50%\n1", "50%\n1"]
    assert axes.get_title() == "4 of 6 documents correct (66.7%)"
    shares = axes.images[0].get_array()
    assert shares.mask.tolist() == [[False] * 3, [True] * 3, [False] * 3]  # no document of class b: grey


def test_an_unknown_name_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="not among the label names: d"):
        save_confusion_matrix(["a", "d"], ["a", "a"], tmp_path / "figure.png", ["a", "b"])
    assert not list(tmp_path.iterdir())


def test_outcomes_of_each_label(tmp_path, figures):
    truth, predicted = np.array([[1, 0], [1, 0], [1, 0], [0, 0]]), np.array([[1, 0], [0, 0], [1, 0], [1, 0]])
    save_confusion_matrix(truth, predicted, tmp_path / "two.png", ["a", "b"])
    save_confusion_matrix(truth[:, :1], predicted[:, :1], tmp_path / "one.png", ["a"])
    first = ["2  (67%)", "1  (33%)", "1  (100%)"]  # found, missed, given; none left
    assert [text.get_text() for text in figures[0].axes[0].texts] == [*first, "4  (100%)"]
    assert [text.get_text() for text in figures[1].axes[0].texts] == first


def test_class_metrics_are_sorted_by_f1(tmp_path, figures):
    rows = [
        {"label": label, "precision": f1, "recall": f1, "f1": f1, "support": support}
        for label, f1, support in (("poor", 0.2, 3), ("good", 0.9, 1234), ("fair", 0.5, 7))
    ]
    save_class_metrics(rows, tmp_path / "figure.png")
    axes = figures[0].axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["good", "fair", "poor"]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["F1", "0.900", "0.500", "0.200", "documents", "1,234", "7", "3"]
    assert axes.get_legend().get_texts()[-1].get_text() == "macro F1 0.533"


def test_learning_curves(tmp_path, figures):
    save_learning_curves([1.5, 0.9], [1.4, 1.0, 0.8], tmp_path / "epochs.png", title="损失")
    save_learning_curves([(10, 1.5), (20, 0.9)], [(20, 1.1)], tmp_path / "steps.png")
    epochs, steps = (figure.axes[0] for figure in figures)
    assert [line.get_xydata().tolist() for line in epochs.lines] == [[[1, 1.5], [2, 0.9]], [[1, 1.4], [2, 1], [3, 0.8]]]
    assert [line.get_xydata().tolist() for line in steps.lines] == [[[10, 1.5], [20, 0.9]], [[20, 1.1]]]
    assert (epochs.get_title(), epochs.get_xlabel()) == ("损失", "epoch")
    assert (steps.get_title(), steps.get_xlabel()) == ("loss", "optimizer step")


def test_run_curves(tmp_path, figures):
    rows = [
        {"step": 10, "epoch": 0.5, "loss": 2.0, "learning_rate": 1e-5},
        {"step": 20, "epoch": 1.0, "loss": 1.0, "learning_rate": 0.0},
        {"step": 20, "epoch": 1.0, "eval_loss": 1.5, "eval_accuracy": 0.5},
        {"step": 10, "epoch": 0.5, "loss": 1.9},  # logged again after a resume
        {"step": 30, "epoch": 1.5, "eval_loss": 1.2, "eval_accuracy": float("nan")},
        {"step": 30, "epoch": 1.5, "train_runtime": 3.0},
    ]
    save_run_curves(rows, tmp_path / "run.png")
    panels = figures[0].axes[0].child_axes
    assert [axes.get_title() for axes in panels] == [
        "loss (best 1.2 at step 30)",
        "accuracy (best 0.5 at step 20)",
        "learning rate",
    ]
    assert panels[0].lines[0].get_xydata().tolist() == [[10, 1.9], [20, 1.0]]


def test_run_curves_before_the_first_value(tmp_path):
    save_run_curves([{"step": 0, "eval_loss": float("nan")}], tmp_path / "one.png")
    save_run_curves([], tmp_path / "none.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none.png", "one.png"]


def test_length_coverage_equals_its_definition(tmp_path, figures):
    tokens, window_size = [0, 5, 10, 11, 35, 700], 12
    save_length_coverage(tokens, window_size, tmp_path / "figure.png")
    axes = figures[0].axes[0]
    whole, read = (dict(line.get_xydata().tolist()) for line in axes.lines)
    assert list(whole) == list(range(1, 129))
    for windows in whole:
        assert whole[windows] == pytest.approx(sum(n <= windows * 10 for n in tokens) / 6)
        assert read[windows] == pytest.approx(sum(min(n, windows * 10) for n in tokens) / sum(tokens))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [str(2**power) for power in range(8)]
    assert axes.texts[2].get_text() == "83.3%"  # four windows


def test_length_coverage_of_windows_that_overlap(tmp_path, figures):
    tokens = [0, 5, 10, 11, 35, 70]
    save_length_coverage(tokens, 12, tmp_path / "figure.png", 4)
    whole, read = (dict(line.get_xydata().tolist()) for line in figures[0].axes[0].lines)
    for windows in whole:
        room = capacity(int(windows), 12, 4)
        assert whole[windows] == pytest.approx(sum(n <= room for n in tokens) / 6)
        assert read[windows] == pytest.approx(sum(min(n, room) for n in tokens) / sum(tokens))


def test_length_coverage_of_short_documents_reaches_64_windows(tmp_path, figures):
    save_length_coverage(np.array([3, 4]), 256, tmp_path / "figure.png")
    assert figures[0].axes[0].get_xticklabels()[-1].get_text() == "64"


@pytest.mark.parametrize("names", [["before", "after"], ["after"]])
def test_reliability_by_hand(tmp_path, figures, names):
    curves = {
        "before": (np.array([0.95, 0.96, 0.97, 1.0]), np.array([True, False, True, False])),
        "after": (np.array([0.5, 0.55, 0.7, 0.9]), np.array([True, False, True, True])),
    }
    save_reliability({name: curves[name] for name in names}, tmp_path / "figure.png", bins=5)
    assert (tmp_path / "figure.png").stat().st_size > 20_000
    axes = figures[0].axes[0]
    points = {line.get_label(): line.get_xydata() for line in axes.lines[1:]}
    assert list(points) == names == [text.get_text() for text in axes.get_legend().get_texts()]
    np.testing.assert_allclose(points["after"], [[0.525, 0.5], [0.7, 1], [0.9, 1]])
    [below] = axes.child_axes
    below.figure.canvas.draw()
    assert {tick.get_text() for tick in below.get_yticklabels(which="both")} <= {"", "0", "1", "10"}
    counts = [patch.get_data().values.tolist() for patch in below.patches]
    assert counts == [[0, 0, 0, 0, 4], [0, 0, 2, 1, 1]][-len(names) :]
    if "before" in names:
        np.testing.assert_allclose(points["before"], [[0.97, 0.5]])


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    before = dict(mpl.rcParams), mpl.get_backend(auto_select=False)
    confusion(tmp_path / "figure.png", ["a", "b"])
    assert (dict(mpl.rcParams), mpl.get_backend(auto_select=False)) == before
