"""Packages that these tests compare with import one called `tokenizers`, as is the folder of tests beside this one."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def packages_before_folders(monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path or ".").resolve() != TESTS])
