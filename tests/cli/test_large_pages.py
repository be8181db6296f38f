"""Long commands begin anew once, where Linux gives large pages to who asks, and never where they must not."""

import sys

import pytest

from mmdiff.cli.main import begin_with_large_pages


@pytest.fixture
def started(monkeypatch):
    """What the process was replaced by; nothing is."""
    found = []
    monkeypatch.setattr("mmdiff.cli.main.os.execv", lambda *arguments: found.append(arguments))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "argv", ["mmdiff", "train", "a.py"])
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # so that what the test leaves is taken back
    monkeypatch.delenv("GLIBC_TUNABLES")
    return found


@pytest.mark.parametrize(("told", "times"), [("always [madvise] never", 1), ("[always] madvise never", 0), ("[never]", 0)])
def test_only_where_they_must_be_asked_for(started, told, times, tmp_path):
    (tmp_path / "enabled").write_text(told)
    begin_with_large_pages(tmp_path / "enabled")
    begin_with_large_pages(tmp_path / "enabled")  # in the new process, which has the variable
    assert started == [(sys.executable, [sys.executable, "-m", "mmdiff", "train", "a.py"])] * times


def test_not_where_the_user_has_chosen_or_linux_says_nothing(started, monkeypatch, tmp_path):
    begin_with_large_pages(tmp_path / "absent")
    (tmp_path / "enabled").write_text("always [madvise] never")
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    begin_with_large_pages(tmp_path / "enabled")
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(sys, "platform", "darwin")
    begin_with_large_pages(tmp_path / "enabled")
    assert started == []
