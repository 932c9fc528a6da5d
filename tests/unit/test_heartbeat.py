"""When a stalled beat condemns a child, and when it does not."""

import os

from gpooler.process.heartbeat import STALL_S, Watch, look

SECONDS = int(STALL_S) + 5


def test_a_beat_that_goes_on_is_never_stalled() -> None:
    watch = Watch()
    assert not any(watch.is_stalled(second, (second, second), "S", 0) for second in range(1, 200))


def test_one_of_two_beats_that_stands_still_is_stalled() -> None:
    for is_hub in (True, False):
        watch = Watch()
        stalled = [
            watch.is_stalled(second, (7, second) if is_hub else (second, 7), "S", second)
            for second in range(1, SECONDS)
        ]
        assert stalled.index(True) == STALL_S


def test_a_child_that_spins_is_stalled() -> None:
    watch = Watch()
    assert any(watch.is_stalled(second, (7,), "R", second) for second in range(SECONDS))


def test_a_beat_that_has_not_begun_is_not_watched() -> None:
    watch = Watch()
    assert not any(watch.is_stalled(second, (second, 0), "S", 0) for second in range(SECONDS))


def test_a_stopped_or_traced_child_is_not_stalled() -> None:
    for state in "Tt":
        watch = Watch()
        assert not any(watch.is_stalled(second, (7,), state, 0) for second in range(SECONDS))


def test_a_starved_child_is_not_stalled() -> None:
    watch = Watch()
    assert not any(watch.is_stalled(second, (7,), "R", 5) for second in range(SECONDS))


def test_time_in_which_the_master_did_not_run_either_does_not_count() -> None:
    watch = Watch()
    assert not any(watch.is_stalled(minute * 60.0, (7,), "S", 0) for minute in range(100))


def test_a_beat_after_a_long_pause_clears_it() -> None:
    watch = Watch()
    for second in range(29):
        assert not watch.is_stalled(second, (7,), "S", 0)
    assert not watch.is_stalled(29, (8,), "S", 0)
    assert not any(watch.is_stalled(30 + second, (8,), "S", 0) for second in range(29))


def test_look_shows_this_process_running_and_a_dead_one_gone() -> None:
    state, cpu = look(os.getpid())
    assert state == "R"
    assert cpu > 0
    assert look(2**22 + 1) == ("X", 0)
