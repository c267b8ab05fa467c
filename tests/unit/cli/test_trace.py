"""``--trace`` and ``ds-cp trace summary``, without ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_cp.cli.main import main
from ds_cp.cli.trace import check_trace_file
from ds_cp.errors import OutputError
from tests.unit.trace.test_summary import written


def test_a_summary_as_text_and_as_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t.json"
    file.write_text(written())
    assert main(["trace", "summary", str(file)]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0].startswith("1 steps on 2 ranks (cpu): 0.200 s of steps")
    assert out[-1].startswith("ring pass-KV") and out[-1].split()[-3:] == ["50.0", "%", "0.001"]
    assert main(["trace", "summary", str(file), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["modes"]["ring pass-KV"]["overlap_share"] == pytest.approx(0.5)


@pytest.mark.parametrize("argv", [["trace"], ["trace", "summary"], ["trace", "summary", "none"]])
def test_what_is_wrong_is_said_in_a_line(
    argv: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    said = capfd.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert said.err.startswith("ds_cp: error: ")


def test_a_file_that_cannot_be_written_is_refused_before_anything_starts(tmp_path: Path) -> None:
    check_trace_file(None)
    check_trace_file(str(tmp_path / "new.json"))
    with pytest.raises(OutputError, match="there is no folder"):
        check_trace_file(str(tmp_path / "no" / "new.json"))
    with pytest.raises(OutputError, match="it is a folder"):
        check_trace_file(str(tmp_path))


@pytest.mark.parametrize("verb", [["serve"], ["generate", "--prompt", "x"]])
def test_verbs_check_it_first(
    verb: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = [*verb, "--model", str(tmp_path), "--trace", str(tmp_path / "no" / "t.json")]
    assert main(argv) == 2
    assert "cannot write the trace to" in capfd.readouterr().err
