"""Which kernels run is what was asked for, and what cannot run is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kvswap.core.errors import KernelUnavailableError
from kvswap.core.extension import native as extension
from kvswap.kernels.native import REFERENCE, forced, kernel_name, native, native_names

needs_native = pytest.mark.skipif(extension is None, reason="the extension is not there")

PROBE = """
import json, warnings
warnings.simplefilter("always")
from kvswap.core.errors import KernelUnavailableError
with warnings.catch_warnings(record=True) as said:
    from kvswap.kernels.native import kernel_name, native_names
    try:
        name = kernel_name()
        kernel_name()
    except KernelUnavailableError as error:
        name = f"refused: {error}"
about = [str(each.message) for each in said if each.category is RuntimeWarning]
print(json.dumps([name, list(native_names()), about]))
"""


def asked(**settings: str) -> tuple[str, list[str], list[str]]:
    """Return the name of what runs in a new process, what could, and what was said."""
    kept = {name: v for name, v in os.environ.items() if not name.startswith("KVSWAP_")}
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        check=True,
        env=kept | settings,
    )
    name, names, said = json.loads(done.stdout)
    return name, names, said


@needs_native
def test_the_best_that_run_here_are_taken():
    assert asked() == (native_names()[0], list(native_names()), [])


@needs_native
@pytest.mark.parametrize("name", ["portable", "torch"])
def test_the_environment_forces_kernels_by_name(name):
    assert asked(KVSWAP_KERNEL=name)[0] == name


@needs_native
def test_an_unknown_name_is_refused_with_those_present():
    refused, names, _ = asked(KVSWAP_KERNEL="sse9")
    present = ", ".join(["torch", *names])
    assert refused == f"refused: KVSWAP_KERNEL must be one of {present}, got 'sse9'"


def test_without_the_extension_the_reference_runs_and_says_so_once():
    name, names, said = asked(KVSWAP_NATIVE="0")
    assert (name, names) == ("torch", [])
    assert said == ["plain torch computes what native kernels would, as they were not built"]


def test_kernels_that_are_absent_are_refused_with_those_present():
    refused, _, _ = asked(KVSWAP_NATIVE="0", KVSWAP_KERNEL="portable")
    assert refused == "refused: KVSWAP_KERNEL must be one of torch, got 'portable'"


@needs_native
def test_forcing_lasts_as_long_as_its_block():
    before = kernel_name()
    with forced("portable"):
        assert kernel_name() == "portable"
        with forced(REFERENCE):
            assert kernel_name() == REFERENCE
            assert native() is None
        assert kernel_name() == "portable"
    assert extension is not None
    assert extension.kernel_name() == before  # for those who found it before, too
    assert kernel_name() == before


@needs_native
def test_forcing_what_is_not_there_changes_nothing():
    before = kernel_name()
    with pytest.raises(KernelUnavailableError), forced("sse9"):
        pass
    assert kernel_name() == before


@needs_native
def test_the_portable_kernels_run_everywhere_and_come_last():
    assert native_names()[-1] == "portable"
