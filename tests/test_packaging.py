"""What is packed holds what it must: read from the settings, nothing is built here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CMAKE = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
BUILD = SETTINGS["tool"]["scikit-build"]


def kept_by_git(*paths: str) -> list[str]:
    """Return which of some paths git would keep; a source archive is made of those."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a working tree")
    done = subprocess.run(
        ["git", "check-ignore", *paths], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return [path for path in paths if path not in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "path",
    [
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
        "csrc/bindings.cc",
        "csrc/kernels/api.h",
        "src/kvswap/_native.pyi",
        "src/kvswap/py.typed",
        "src/kvswap/bench/reader/weights/model.safetensors",
        "tests/native/CMakeLists.txt",
        "tests/native/main.cc",
        "tests/conftest.py",
    ],
)
def test_a_source_archive_holds_what_a_build_and_its_tests_need(path: str) -> None:
    assert (ROOT / path).exists()
    assert kept_by_git(path) == [path]
    assert not any(path.startswith(left_out.strip("/")) for left_out in BUILD["sdist"]["exclude"])


def test_an_extension_that_was_built_in_place_is_not_packed() -> None:
    assert kept_by_git("src/kvswap/_native.cpython-310-darwin.so") == []
    # A pattern to include would take what git ignores.
    assert "include" not in BUILD["sdist"]


def test_a_wheel_is_the_package_with_its_extension() -> None:
    assert BUILD["wheel"]["packages"] == ["src/kvswap"]
    assert "install(TARGETS _native LIBRARY DESTINATION kvswap)" in CMAKE
    assert SETTINGS["build-system"]["build-backend"] == "scikit_build_core.build"


def test_every_source_of_the_extension_is_built() -> None:
    named = set(re.findall(r"csrc/[\w./]+\.cc", CMAKE))
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cc")}
    assert named == there


def test_every_native_test_is_built() -> None:
    settings = (ROOT / "tests/native/CMakeLists.txt").read_text(encoding="utf-8")
    there = {path.name for path in (ROOT / "tests/native").glob("*.cc")}
    assert set(re.findall(r"(?<![\w/])\w+\.cc", settings)) == there


def test_wheels_are_made_for_every_platform_that_is_promised() -> None:
    wheels = SETTINGS["tool"]["cibuildwheel"]
    assert wheels["linux"]["archs"] == ["x86_64", "aarch64"]
    for arch in wheels["linux"]["archs"]:
        assert wheels["linux"][f"manylinux-{arch}-image"] == "manylinux_2_28"
    assert wheels["macos"]["archs"] == ["arm64", "x86_64"]
    assert SETTINGS["project"]["requires-python"] == ">=3.10"


def test_what_is_for_one_system_stands_behind_its_name() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        guards: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("#if"):
                guards.append(line)
            elif line.startswith("#elif"):
                guards[-1] = line
            elif line.startswith("#endif"):
                guards.pop()
            found = re.match(
                r"#include <(linux/.*|link\.h|sys/syscall\.h|sys/auxv\.h|mach-o/.*)>", line
            )
            assert not found or guards, f"{path.name}: {line}"
