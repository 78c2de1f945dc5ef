"""Fonts that are looked for only when they are needed, and text in columns."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

import figure_text
from figure_text import FONT_FILE, choose_fonts, display_width, shorten


def test_chinese_names_get_a_font_that_has_them():
    families, missing = choose_fonts(["经济", "歷史", "ひらがな", "economy"])
    assert missing == set()
    assert families[0] == "DejaVu Sans"
    assert len(families) == 2
    found = FT2Font(font_manager.findfont(families[1], fallback_to_default=False)).get_charmap()
    assert all(ord(char) in found for char in "经济歷史ひらがな")


def test_fonts_are_looked_for_only_if_a_name_needs_them(monkeypatch):
    monkeypatch.setattr(figure_text, "_font_candidates", lambda: (pytest.fail("looked for") for _ in "1"))
    assert choose_fonts(["économie", "экономика", "οικονομία", "→"]) == (["DejaVu Sans"], set())


def test_an_installed_font_comes_before_the_package(monkeypatch):
    known = choose_fonts(["经"])  # the font manager knows the package's font from here on
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail("looked for the package"))
    assert choose_fonts(["经济"]) == known


def test_the_package_is_not_imported_for_its_font():
    choose_fonts(["经"])
    assert importlib.util.find_spec(FONT_FILE[0]) is not None
    assert FONT_FILE[0] not in sys.modules


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [("short", 5, "short"), ("abcdefghij", 6, "abc…ij"), ("经济政治军事", 7, "经…军事"), ("经济", 4, "经济")],
)
def test_shorten(text, width, expected):
    assert shorten(text, width) == expected
    assert display_width(expected) <= width


def test_display_width():
    assert display_width("abc") == 3
    assert display_width("经济a") == 5
    assert display_width("e\u0301") == 1
