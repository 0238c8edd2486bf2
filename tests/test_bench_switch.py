"""The benchmark of the monitor and the switch, on a small model."""

import json
import sys

import pytest

from starts import Started
from switchlora.bench.switch import main


def bench(*words):
    """``python scripts/bench_switch.py *words``."""
    sys.argv = ["bench_switch.py", *words]
    main()


@pytest.mark.slow
def test_a_record_holds_what_training_the_monitor_and_the_switch_cost(tmp_path):
    out = tmp_path / "new" / "switch.jsonl"
    words = ["--model", "vit_tiny_patch16_224", "--rank", "4", "--batch", "1", "--updates", "2"]
    with Started(tmp_path / "said", bench, *words, "--out", str(out)) as started:
        done = started.finish()
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    record = json.loads(out.read_text())
    assert record["targets"] == 48 and record["drift"] < 1e-4
    assert 0 < record["monitor_share"] < 0.1 and record["switch_seconds"] > 0
    assert record["training_peak_bytes"] > 4 * 4 * 5.7e6  # weights, gradients and two moments
    assert "window of 100 updates" in shown and str(out) in shown
