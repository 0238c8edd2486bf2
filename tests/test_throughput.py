"""Per-phase counters."""

import pytest
import torch

from switchlora.learner import WARMUP_UPDATES, Stopwatch, peak_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(peak_memory(CPU) is None, reason="this system does not tell peak memory")
def test_a_new_phase_forgets_the_memory_peak_of_the_last():
    watch = Stopwatch(CPU)
    ballast = torch.ones(100 * 2**20)  # 400 MiB
    high = watch.summary(1, 1)["peak_memory_bytes"]
    del ballast
    watch.start_phase()
    assert high - watch.summary(1, 1)["peak_memory_bytes"] > 300 * 2**20


def test_warm_up_updates_and_pauses_do_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("switchlora.learner.stopwatch.time.perf_counter", lambda: now[0])
    watch = Stopwatch(CPU)
    for seconds in [100.0] * WARMUP_UPDATES + [2.0] * 5:
        now[0] += seconds
        watch.lap()
        with watch.paused(monitor=True):
            now[0] += 0.5
    figures = watch.summary(batch_size=8, updates_per_epoch=10)
    assert figures["images_per_second"] == 4.0 and figures["epoch_seconds"] == 20.0
    assert watch.monitor_share == pytest.approx(5.0 / 510.0)


def test_too_few_updates_give_no_figure():
    figures = Stopwatch(CPU).summary(8, 10)
    assert figures["images_per_second"] is None and figures["epoch_seconds"] is None
