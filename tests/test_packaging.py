"""What is shipped: the wheel's contents, the pins, and the rule that samq is imported under its own name."""

import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("calib", "quant", "export", "engines", "tools")
PYTHONS = ("3.10", "3.11", "3.12")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]


def requirement_lines(text: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


PINS = requirement_lines((ROOT / "constraints.txt").read_text(encoding="utf-8"))


def holds(requirement: Requirement, python: str) -> bool:
    """Whether a requirement's marker holds under that Python on Linux x86_64."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def shipped_files(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in files if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy, so that no build/ or egg-info of the working tree can slip into it."""
    copy = tmp_path_factory.mktemp("samq")
    for folder in (*FOLDERS, "src"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*build, "-w", copy / "dist", copy], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = (copy / "dist").glob("samq-*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_a_package_with_all_its_files_in_the_wheel(wheel: zipfile.ZipFile, folder: str) -> None:
    link = ROOT / "src" / "samq" / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder
    packed = {name.removeprefix(f"samq/{folder}/") for name in wheel.namelist() if name.startswith(f"samq/{folder}/")}
    assert packed == shipped_files(ROOT / folder)
    assert "__init__.py" in packed


def test_the_wheel_carries_the_type_marker_presets_demo_and_licence(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert "samq/py.typed" in names
    assert "samq/quant/presets/int4_svdquant.yaml" in names
    for data in ("checkpoint", "images"):
        assert any(name.startswith(f"samq/tools/demo/{data}/") for name in names), f"no demo {data}"
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"samq", f"samq-{PROJECT['project']['version']}.dist-info"}


def test_the_wheel_declares_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    scripts = ConfigParser()
    scripts.read_string(wheel.read(name).decode())
    assert dict(scripts["console_scripts"]) == {"samq-export": "samq.tools.cli:main"}


def test_the_package_and_the_project_have_one_version() -> None:
    source = (ROOT / "src" / "samq" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{PROJECT["project"]["version"]}"' in source


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_has_one_exact_pin_that_fits(python: str) -> None:
    pins = [pin for pin in PINS if holds(pin, python)]
    names = [canonicalize_name(pin.name) for pin in pins]
    assert len(names) == len(set(names)), "two pins for one package"
    versions: dict[str, str] = {}
    for name, pin in zip(names, pins, strict=True):
        exact = re.fullmatch(r"==([^*]+)", str(pin.specifier))
        assert exact, f"{pin} is not an exact pin"
        versions[name] = exact[1]
    build: list[str] = PROJECT["build-system"]["requires"]
    for line in [*PROJECT["project"]["dependencies"], *EXTRAS["dev"], *build]:
        wanted = Requirement(line)
        if holds(wanted, python):
            version = versions.get(canonicalize_name(wanted.name))
            assert version, f"{wanted.name} has no pin for Python {python}"
            assert wanted.specifier.contains(version), f"{wanted} does not admit the pin {version}"


def test_torch_is_the_version_with_a_cpu_build() -> None:
    assert [str(pin) for pin in PINS if pin.name == "torch"] == ["torch==2.13.0"]


def test_what_needs_a_gpu_or_a_server_is_an_extra() -> None:
    named = {extra: {Requirement(line).name for line in lines} for extra, lines in EXTRAS.items()}
    assert named["gpu"] == {"onnxruntime-gpu"}
    assert named["tensorrt"] == {"tensorrt", "cuda-python"}
    assert named["modelopt"] == {"nvidia-modelopt"}
    assert named["triton"] == {"tritonclient"}
    base = {Requirement(line).name for line in PROJECT["project"]["dependencies"]}
    assert not base & set().union(*named.values())


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("line", ["import {}", "import {}.x", "from {} import x", "from {}.x import y"])
def test_ruff_refuses_an_import_past_samq(folder: str, line: str) -> None:
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"]
    stdin = ["--stdin-filename", "tests/test_x.py", "-"]
    source = line.format(folder) + "\n"
    done = subprocess.run([*ruff, *stdin], cwd=ROOT, input=source, capture_output=True, text=True, check=False)
    assert f"TID251 `{folder}" in done.stdout
    assert f"import samq.{folder}" in done.stdout
