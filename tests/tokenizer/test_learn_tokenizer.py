"""The experiments of the two pages run as they stand, and print what the pages say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

LEARN = Path(__file__).resolve().parents[2] / "docs" / "learn"
EXPERIMENT = re.compile(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)+)", re.DOTALL)


def experiment(page: str) -> tuple[str, str]:
    """The code of a page, and what the page says that it prints."""
    found = EXPERIMENT.search((LEARN / page).read_text("utf-8"))
    assert found
    return found[1], re.sub("(?m)^    ", "", found[2])


def printed(source: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(source, "page", "exec"), {})
    return out.getvalue()


def test_the_mask_experiment_prints_what_its_page_says() -> None:
    source, shown = experiment("mask.md")
    assert printed(source) == shown


def test_the_tokenizer_experiment_prints_the_figures_of_its_page() -> None:
    source, shown = experiment("tokenizer.md")
    ours, theirs = (
        [[float(figure) for figure in re.findall(r"[\d.]+", line)] for line in text.splitlines()[:-1]]
        for text in (printed(source), shown)
    )
    assert len(ours) == 5
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=0.15)  # the world may learn new stories


@pytest.mark.parametrize("page", ["tokenizer", "mask"])
def test_both_languages_show_the_same_experiment_and_link_to_files_that_exist(page: str) -> None:
    assert experiment(f"{page}.md") == experiment(f"{page}.zh.md")
    for end in (".md", ".zh.md"):
        for target in re.findall(r"\]\((\S+?)\)", (LEARN / f"{page}{end}").read_text("utf-8")):
            assert (LEARN / target).exists(), target
