import runpy

import pytest

from . import FOLDER


@pytest.fixture
def ran(monkeypatch):
    """Gives the names of an experiment, run as a script would be: with its folder at hand."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: runpy.run_path(str(FOLDER / name))
