"""The shared set-up: it takes a Python that has all, else makes .venv, and completes one that was interrupted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pack(wheels: Path, name: str, version: str, members: dict[str, bytes]) -> None:
    """Write a wheel of pure Python files."""
    info = f"{name}-{version}.dist-info"
    members |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{member},,\n" for member in members) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(wheels / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for member, content in (members | {f"{info}/RECORD": record.encode()}).items():
            wheel.writestr(member, content)


@pytest.fixture
def project(tmp_path):
    """A project that asks for one tiny package, which only the folder `wheels` has."""
    (tmp_path / "helpers/config").mkdir(parents=True)
    shutil.copy(ROOT / "helpers/environment.sh", tmp_path / "helpers")
    shutil.copy(ROOT / "helpers/config/requirements.py", tmp_path / "helpers/config")
    (tmp_path / "requirements.txt").write_text("floydtuner-probe>=2  # tiny\npackaging\n")
    (tmp_path / "constraints.txt").write_text("floydtuner-probe==2.1\n")
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "mkdir", "rm", "head"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    (tmp_path / "bin/python3").symlink_to(sys._base_executable)
    (tmp_path / "wheels").mkdir()
    return tmp_path


def set_up(project: Path, links: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", '. helpers/environment.sh; need_python || exit; "$PYTHON" -c "import probe; print(probe.X)"'],
        cwd=project, check=False, text=True, capture_output=True, timeout=120, stdin=subprocess.DEVNULL,
        env={"PATH": str(project / "bin"), "HOME": str(project), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull,
             "PIP_FIND_LINKS": links, "PYTHONDONTWRITEBYTECODE": "1"},
    )


def test_an_environment_is_made_completed_and_used_again(project):
    failed = set_up(project, str(project / "bin"))
    assert failed.returncode == 1 and "ERROR" in failed.stderr and "floydtuner-probe" in failed.stderr
    assert (project / ".venv/bin/python").exists()

    wheels = project / "wheels"
    for version in ("1.0", "2.1", "2.2"):
        pack(wheels, "floydtuner_probe", version, {"probe.py": f"X = 'probe {version}'\n".encode()})
    packaging = {str(file): file.locate().read_bytes() for file in metadata.files("packaging")
                 if str(file).startswith("packaging/") and file.suffix == ".py"}
    pack(wheels, "packaging", metadata.version("packaging"), packaging)
    completed = set_up(project, str(wheels))
    assert completed.returncode == 0 and "Completing" in completed.stderr, completed.stderr
    assert completed.stdout == "probe 2.1\n" and "Installing collected packages" in completed.stderr

    again = set_up(project, str(project / "bin"))
    assert (again.returncode, again.stdout, again.stderr) == (0, "probe 2.1\n", "")

    (project / ".venv/.unfinished").touch()
    assert "its set-up was interrupted" in set_up(project, str(wheels)).stderr
    assert not (project / ".venv/.unfinished").exists()

    (project / "requirements.txt").write_text("floydtuner-probe>=3\npackaging\n")
    (project / "constraints.txt").write_text("")
    lacks = set_up(project, str(wheels))
    assert lacks.returncode == 1 and "floydtuner-probe is 2.1, not >=3" in lacks.stderr


def test_without_a_new_enough_python_it_says_which_is_needed(project):
    (project / "bin/python3").unlink()
    result = set_up(project, str(project / "bin"))
    assert result.returncode == 1 and "Python 3.11 or newer" in result.stderr


def test_this_python_has_what_the_requirements_ask_for():
    command = [sys.executable, "helpers/config/requirements.py", "requirements.txt"]
    result = subprocess.run(command, cwd=ROOT, check=False, text=True, capture_output=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_the_constraints_pin_everything_and_name_no_machine():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert not any(set("+@/:;") & set(name + version) for name, version in pins.items())
    asked = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = {line.split(">")[0] for line in asked if line and not line.startswith("#")}
    assert names <= set(pins)
