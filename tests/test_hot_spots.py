"""The reader of Nsight Compute's source pages, and the launches that it profiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import hot_spots

PAGE = """\
"Kernel Name","some_kernel",
"Address","Source","# Samples","Instructions Executed","stall_wait","stall_long_sb","stall_wait (Not Issued)"
"0x10","  @!P1  STG.E.U16 [R2], R4","7","64","1","6","0"
"0x20","  FADD R1, R2, R3","20","32","20","0","18"
"0x30","  STG.E.U16 [R8], R9","3","64","3","0","0"
"0x40","  STG.E.128 [R8], R12","0","2","0","0","0"
"Kernel Name","another",
"Address","Source","# Samples","Instructions Executed","stall_wait","stall_long_sb","stall_wait (Not Issued)"
"0x10","  EXIT","1","4","1","0","0"
"""


def test_memory_instructions_are_counted_and_the_hottest_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.csv"
    page.write_text(PAGE, encoding="utf-8")
    assert hot_spots.main([str(page), "--count", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "some_kernel: 4 instructions, 30 samples"
    assert lines[2].split() == ["STG.E.U16", "2", "128"]
    assert lines[3].split() == ["STG.E.128", "1", "2"]
    assert " ".join(lines[5].split()) == "0 7 64 @!P1 STG.E.U16 [R2], R4; long_sb 6, wait 1"
    assert " ".join(lines[6].split()) == "1 20 32 FADD R1, R2, R3; wait 20"
    assert lines[7] == "another: 1 instructions, 1 samples"


@pytest.mark.parametrize("text", ["", "something else\n", PAGE.replace("# Samples", "Samples")])
def test_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    page = tmp_path / "page.csv"
    page.write_text(text, encoding="utf-8")
    assert hot_spots.main([str(page)]) == 2
    assert "no source page" in capsys.readouterr().err


def test_shapes_are_launched_by_their_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"kind": "decode", "hq": 4, "hkv": 2, "d": 32, "page": 16, "b": 2, "kv": 40}
    shapes = tmp_path / "shapes.json"
    shapes.write_text(json.dumps({"shapes": [entry | {"name": "this"}, entry | {"name": "that"}]}), encoding="utf-8")
    assert hot_spots.main(["--launch", "that", "--shapes", str(shapes), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "that | decode | 4/2 d32 | 2 x 40 | page 16\n"
    assert hot_spots.main(["--launch", "none of them", "--shapes", str(shapes), "--device", "cpu"]) == 2
    with pytest.raises(SystemExit):
        hot_spots.main([])
