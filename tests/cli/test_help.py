"""Help and version are quick: they import no torch. Without its packages the command says so."""

from __future__ import annotations

import pytest

from tests.cli.processes import execute_python


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["--version"],
        ["demo", "--help"],
        ["run", "--help"],
        ["eval", "--help"],
        ["calibrate", "--help"],
        ["budgets", "--help"],
        ["profile", "--help"],
        ["tune", "--help"],
        ["nonsense"],
        ["run", "--nonsense"],
    ],
)
def test_nothing_heavy_is_imported(arguments):
    done = execute_python(
        "import sys\nfrom kvswap.cli import main\n"
        f"main({arguments!r})\n"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert done.returncode == 0, done.stderr


def test_help_names_every_command(kvswap):
    result = kvswap("--help")
    assert (result.code, result.err) == (0, "")
    for command in ("demo", "run", "eval", "calibrate", "budgets", "profile", "tune", "placement"):
        assert f"  {command} " in result.out
    assert kvswap() == result


@pytest.mark.parametrize(
    "command", ["demo", "run", "eval", "calibrate", "budgets", "profile", "tune", "placement"]
)
def test_help_of_a_command_fits_a_terminal(kvswap, command):
    result = kvswap(command, "--help")
    assert result.code == 0
    assert all(len(line) <= 80 for line in result.out.splitlines())


def test_version(kvswap):
    import kvswap as package

    result = kvswap("--version")
    assert (result.code, result.out) == (0, f"kvswap {package.__version__}\n")


@pytest.mark.parametrize("package", ["click", "rich"])
def test_without_its_packages_one_line_says_what_to_install(package):
    done = execute_python(
        f"import sys\nsys.modules[{package!r}] = None\nfrom kvswap.cli import main\n"
        "sys.exit(main(['--help']))"
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pip install 'kvswap[cli]'" in done.stderr
