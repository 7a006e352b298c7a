"""The report: what stands in it, and that nothing a model says can break it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from groundup.errors import UserError
from groundup.eval.plots import read_metrics, series, smooth
from groundup.eval.report import write_report


def data_of(tmp_path: Path) -> dict[str, Any]:
    metrics = tmp_path / "metrics.jsonl"
    lines: list[dict[str, Any]] = [{"step": s, "loss": 8 / s, "lr": 1e-3} for s in range(1, 60)]
    lines += [{"step": s, "val_loss": 4 / s, "bits_per_byte": 3 / s} for s in range(10, 60, 10)]
    metrics.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 60, "lo', encoding="utf-8")
    return {
        "title": "quickstart",
        "machine": {"name": "a laptop", "cores": 2},
        "derived": {"parameters": 1234567, "learning_rate": 0.0031, "ok": True},
        "stages": [
            {"name": "tokenizer", "seconds": 2.0, "tokens": 0, "metrics": {}},
            {"name": "pretrain", "seconds": 361.0, "tokens": 3200000,
             "metrics": {"world_exact_zh": 0.02, "world_exact_en": 0.0, "bits_per_byte": 0.91}},
            {"name": "sft", "seconds": 200.0, "tokens": 1000000, "before": {"bits_per_byte": 1.5},
             "metrics": {"world_exact_zh": 0.93, "world_exact_en": 0.885, "bits_per_byte": 0.33, "identity": 1.0}},
        ],
        "baseline": {"world_exact_zh": 0.31, "world_exact_en": 0.28},
        "samples": [
            {"question": "小猫?", "answer": "一只 | 猫\n<b>", "expected": "猫"},
            {"question": "2+2?", "answer": "4", "expected": "4"},
        ],
        "curves": {"pretrain": str(metrics), "sft": str(tmp_path / "missing.jsonl")},
        "next_commands": ["groundup chat out/sft"],
    }  # fmt: skip


def test_report_json_has_the_stages(tmp_path: Path) -> None:
    data = data_of(tmp_path)
    returned = write_report(tmp_path / "out", data)
    stored = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert stored == returned
    assert stored["stages"] == data["stages"]
    assert stored["baseline"] == data["baseline"]
    assert stored["plots"] == ["accuracy.png", "curves.png"]
    assert stored["seconds"] == 563.0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "accuracy.png",
        "curves.png",
        "report.json",
        "report.md",
    ]


def test_report_md_shows_what_each_stage_added(tmp_path: Path) -> None:
    write_report(tmp_path / "out", data_of(tmp_path))
    page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    row = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("|")}
    assert "2.0 % → **93.0 %**" in row["sft"]
    assert "1.5 → **0.33**" in row["sft"]  # its own before, not the bits of pretraining's other text
    assert "**0.91**" in row["pretrain"]
    assert "→" not in row["pretrain"]
    assert "6 min 01 s | 3,200,000" in row["pretrain"]
    assert "31.0 %" in next(line for name, line in row.items() if name.startswith("baseline"))
    assert "一只 \\| 猫<br>&lt;b> | 猫 | ✗ |" in row["小猫?"]
    assert row["2+2?"].endswith("✓ |")
    for text in (
        "1,234,567",
        "0.0031",
        "a laptop",
        "groundup chat out/sft",
        "](curves.png)",
        "](accuracy.png)",
        "阶段",
    ):
        assert text in page


def test_every_table_row_has_the_width_of_its_head(tmp_path: Path) -> None:
    write_report(tmp_path / "out", data_of(tmp_path))
    page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8").replace("\\|", "")
    for block in page.split("\n\n"):
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, block


def test_a_run_on_own_data_needs_no_world(tmp_path: Path) -> None:
    """Only stages must be there; a figure that is not finite is written as null, for it is no JSON."""
    stages = [{"name": "pretrain", "seconds": 1.0, "tokens": 5, "metrics": {"bits_per_byte": float("nan")}}]
    write_report(tmp_path, {"stages": stages})
    stored = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert stored["stages"][0]["metrics"] == {"bits_per_byte": None}
    assert stored["plots"] == []
    assert "](" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_plots_draw_without_a_missing_glyph(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(tmp_path / "out", data_of(tmp_path))
    for name in ("accuracy.png", "curves.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_metrics_are_read_as_a_killed_run_leaves_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": NaN}\n{"step": 1, "loss": 2}\n{"st')
    rows = read_metrics(path)
    assert series(rows, "loss") == ([1], [2])  # written twice after a resume: the later one; NaN is left out
    path.write_text('{"st\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:1"):
        read_metrics(path)


def test_smooth_keeps_length_and_level() -> None:
    assert smooth([2.0] * 7, 3) == [2.0] * 7
    assert smooth([0.0, 3.0, 0.0], 3) == [1.5, 1.0, 1.5]
