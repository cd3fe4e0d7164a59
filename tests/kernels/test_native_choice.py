"""Which kernels run is what was asked for, and what cannot run is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from kvswap.core.errors import KernelUnavailableError
from kvswap.core.extension import native as extension
from kvswap.kernels.accelerator import accelerator_of
from kvswap.kernels.native import (
    REFERENCE,
    forced,
    has_triton,
    kernel_name,
    native,
    native_names,
)

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


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels run here")
needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")


def asked(**settings: str) -> tuple[str, list[str], list[str]]:
    """Return the name of what runs in a new process, what could, and what was said."""
    kept = {
        name: v for name, v in os.environ.items() if not name.startswith(("KVSWAP_", "TRITON_"))
    }
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


@no_gpu
@needs_native
def test_an_unknown_name_is_refused_with_those_present():
    refused, names, _ = asked(KVSWAP_KERNEL="sse9")
    present = ", ".join(["torch", *names])
    assert refused == f"refused: KVSWAP_KERNEL must be one of {present}, got 'sse9'"


def test_without_the_extension_the_reference_runs_and_says_so_once():
    name, names, said = asked(KVSWAP_NATIVE="0")
    assert (name, names) == ("torch", [])
    assert said == ["plain torch computes what native kernels would, as they were not built"]


@no_gpu
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


@needs_triton
def test_triton_is_chosen_by_name_where_it_is_interpreted():
    assert asked(KVSWAP_KERNEL="triton", TRITON_INTERPRET="1")[0] == "triton"
    assert asked(TRITON_INTERPRET="1")[0] != "triton"


@no_gpu
def test_triton_is_refused_where_nothing_runs_it():
    refused, _, _ = asked(KVSWAP_KERNEL="triton")
    assert refused.startswith("refused: KVSWAP_KERNEL must be one of torch, ")
    assert refused.endswith("got 'triton'")


def test_a_model_on_the_host_has_no_accelerator_unless_it_is_forced(monkeypatch):
    host = torch.device("cpu")
    assert accelerator_of(host) is None
    with forced(REFERENCE):
        assert accelerator_of(torch.device("cuda")) is None
    monkeypatch.setenv("KVSWAP_KERNEL", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(KernelUnavailableError, match="needs triton and a model on a CUDA device"):
        accelerator_of(host)


def test_without_triton_a_model_on_a_gpu_keeps_its_cache_on_the_host(monkeypatch):
    monkeypatch.setattr("kvswap.kernels.accelerator.has_triton", lambda: False)
    with pytest.warns(RuntimeWarning, match="triton is not installed"):
        assert accelerator_of(torch.device("cuda")) is None


@needs_native
def test_what_stays_on_the_host_has_the_best_kernels_beside_triton():
    if not has_triton() or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")):
        pytest.skip("triton does not run here")
    with forced("triton"):
        assert kernel_name() == "triton"
        assert native() is extension
        assert extension.kernel_name() == native_names()[0]
