"""One tree of errors; each is also the built-in that a caller would expect."""

from __future__ import annotations

import errno
import inspect

import pytest

from kvswap.core import errors

BUILTINS = {
    "ConfigError": ValueError,
    "BudgetError": ValueError,
    "UnsupportedModelError": TypeError,
    "InvalidKeysError": ValueError,
    "KernelUnavailableError": RuntimeError,
    "SessionClosedError": RuntimeError,
    "DeviceIOError": OSError,
    "CorruptStoreError": ValueError,
    "StoreFullError": OSError,
    "StoreLockedError": OSError,
}


def all_errors() -> list[type[Exception]]:
    found = [cls for _, cls in inspect.getmembers(errors, inspect.isclass)]
    return [cls for cls in found if issubclass(cls, Exception)]


def test_every_error_hangs_on_one_root():
    assert all(issubclass(cls, errors.KVSwapError) for cls in all_errors())


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_an_error_is_the_expected_builtin(name, builtin):
    assert issubclass(getattr(errors, name), builtin)


def test_a_device_error_names_errno_path_offset_and_length():
    error = errors.DeviceIOError(errno.EIO, "/disk/file", offset_bytes=4096, nbytes=512)
    assert error.errno == errno.EIO
    assert (error.path, error.offset_bytes, error.nbytes) == ("/disk/file", 4096, 512)
    assert "512 bytes at offset 4096" in str(error)
    assert "/disk/file" in str(error)


def test_a_full_store_says_need_and_have():
    error = errors.StoreFullError("/disk", need_bytes=10, have_bytes=3, limit="disk_limit")
    assert error.errno == errno.ENOSPC
    assert (error.need_bytes, error.have_bytes) == (10, 3)
    assert "no room for 10 bytes, 3 left (disk_limit)" in str(error)


def test_a_corrupt_store_says_what_was_expected_and_found():
    error = errors.CorruptStoreError("/disk", "crc32c", expected="ab", found="cd")
    assert str(error) == "/disk: crc32c: expected ab, found cd"
    assert (error.check, error.expected, error.found) == ("crc32c", "ab", "cd")


def test_invalid_keys_name_layer_token_and_row():
    error = errors.InvalidKeysError("values", layer_idx=3, token=70, row=1)
    error.layer_idx = 5  # whoever knows the model says which of its layers it is
    expected = "values must be finite, got NaN or infinity in layer 5 at token 70 (row 1 of the"
    assert str(error).startswith(expected)
    assert (error.what, error.token, error.row) == ("values", 70, 1)


def test_a_model_error_names_the_class_and_what_it_lacks():
    error = errors.UnsupportedModelError("SomeModel", "a cache")
    assert str(error) == "SomeModel is not supported: a cache"
    assert (error.model_class, error.missing) == ("SomeModel", "a cache")
