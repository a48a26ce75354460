"""Times of calls on a simulated GPU, whose first call in a row waits for the host."""

import time

import pytest
import torch

from flexmoba.reporting import median_ms, median_ms_alone

WAIT_MS = 0.5


class Clock:
    """A GPU whose events and calls take simulated time."""

    def __init__(self, call_ms: float):
        self.now = 0.0
        self.call_ms = call_ms
        self.calls = 0

    def call(self) -> None:
        self.now += self.call_ms
        self.calls += 1

    def event(self, *, enable_timing: bool):
        clock = self

        class Event:
            def record(self):
                self.at = clock.now
                clock.now += WAIT_MS

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()


@pytest.mark.parametrize(
    ("call_ms", "calls"), [(1.0, 13), (0.001, 40), (30.0, 1)], ids=["short", "shortest", "long"]
)
def test_calls_queue_in_series(call_ms, calls, monkeypatch):
    clock = Clock(call_ms)
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    device = torch.device("cuda")
    assert median_ms(clock.call, device, seconds=0) == pytest.approx(call_ms + WAIT_MS / calls)
    assert clock.calls == 2 + 3 * calls
    clock.calls = 0
    assert median_ms_alone(clock.call, device, seconds=0) == pytest.approx(call_ms + WAIT_MS)
    assert clock.calls == 1


def test_a_long_call_runs_twice(monkeypatch):
    clock = Clock(2500.0)
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    assert median_ms(clock.call, torch.device("cuda")) == 2500 + WAIT_MS
    assert clock.calls == 2


def test_calls_on_cpu_run_alone():
    calls = []
    ms = median_ms(lambda: calls.append(time.sleep(0.01)), torch.device("cpu"), seconds=0)
    assert 10 <= ms < 1000
    assert len(calls) == 5
