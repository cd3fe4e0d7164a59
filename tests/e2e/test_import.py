"""Importing kvswap costs nothing and changes nothing; every public name is there."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

import kvswap

PROBE = """
    import json, os, sys, threading, warnings
    def state():
        return [
            threading.active_count(), len(warnings.filters), sorted(os.environ),
            sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else [],
            str(sys.excepthook), os.getcwd(), os.umask(0o22),
        ]
    before = state()
    import kvswap
    {extra}
    heavy = ["torch", "triton", "transformers", "numpy", "safetensors", "click", "rich"]
    found = [name for name in heavy if name in sys.modules]
    print(json.dumps([before == state(), found]))
"""


def imported(extra: str = "") -> tuple[bool, list[str]]:
    """Import in a new process; return whether nothing changed, and what came along."""
    code = textwrap.dedent(PROBE).format(extra=extra)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    is_same, found = json.loads(done.stdout)
    return is_same, found


def test_importing_brings_nothing_heavy_and_changes_nothing():
    assert imported() == (True, [])


def test_settings_and_errors_need_no_torch():
    _, found = imported(
        "kvswap.CacheConfig(kv_memory='1MiB', storage=kvswap.StorageConfig(directories=['/']));"
        " kvswap.KVSwapError; kvswap.CacheStats"
    )
    assert found == []


@pytest.mark.parametrize("name", ["BlockStore", "profile_device"])
def test_what_is_only_about_devices_needs_no_torch(name):
    _, found = imported(f"kvswap.{name}")
    assert "torch" not in found
    assert "transformers" not in found


@pytest.mark.parametrize("name", kvswap.__all__)
def test_a_public_name_resolves(name):
    assert getattr(kvswap, name).__doc__
    assert name in dir(kvswap)


def test_public_names_are_those_of_the_architecture():
    promised = {
        "attach", "KVSwapCache", "CacheConfig", "StorageConfig", "CacheStats", "Selector",
        "register_selector", "selector_names", "register_index", "index_names", "BlockStore",
        "calibrate", "DeviceModel", "DeviceProfile", "profile_device", "KVSwapError",
    }  # fmt: skip
    assert promised <= set(kvswap.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'kvswap' has no attribute 'flux'"):
        _ = kvswap.flux
