"""The lines of a running stage say how much time is left, the first one included."""

import pytest

from halo import progress


@pytest.fixture
def clock(monkeypatch):
    """A list whose last item is the time that progress sees, in seconds."""
    times = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: times[-1])
    return times


def test_the_first_line_has_a_time_left(clock, capsys):
    with progress.StageProgress("align", 1000) as shown:
        clock.append(105.0)
        shown.update(1, "loss 2.0")  # Less than ten seconds after the last line, so there is none.
        assert capsys.readouterr().out == ""
        clock.append(120.0)
        shown.update(4, "loss 1.5")
        assert capsys.readouterr().out == "align      4/1000  loss 1.5  1:23:00 left\n"
        clock.append(200.0)
        shown.update(1000, "loss 1.0")
        assert capsys.readouterr().out == "align      1000/1000  loss 1.0\n"


def test_what_was_done_before_is_not_taken_for_speed(clock, capsys):
    with progress.StageProgress("align", 1000, start=990) as resumed:
        clock.append(130.0)
        resumed.update(991, "")
        assert capsys.readouterr().out == "align      991/1000    0:04:30 left\n"
    clock.append(500.0)
    with progress.StageProgress("eval", 100) as restored:  # From a journal: 90 parts at once.
        for done in range(1, 91):
            restored.update(done, "")
        clock.append(520.0)
        restored.update(92, "")
        assert capsys.readouterr().out == "eval       92/100    0:01:20 left\n"


def test_no_time_is_invented_before_anything_is_done(clock, capsys):
    with progress.StageProgress("eval", 100) as restored:
        restored.update(60, "")
        clock.append(520.0)
        restored.update(60, "")
        assert capsys.readouterr().out == "eval       60/100  \n"


def test_one_of_several_processes_shows_nothing(clock, capsys):
    with progress.StageProgress("align", 10, shown=False) as hidden:
        clock.append(200.0)
        hidden.update(5, "")
    assert capsys.readouterr().out == ""
