"""metrics.jsonl: one reader for runs, records, trunks and pictures."""

import json

import pytest

from conftest import stats
from switchlora.criteria import Verdict
from switchlora.monitor import Measurement
from switchlora.storage import (
    as_record,
    measurement_metrics,
    measurement_of,
    read_events,
    read_placed,
)

LINES = ['{"event": "train", "num_updates": 1}', '{"event": "measure", "num_updates": 2}']


def written(folder, *lines, end="\n"):
    path = folder / "metrics.jsonl"
    path.write_text("\n".join(lines) + end)
    return path


def test_events_come_in_order_all_or_those_of_a_name(tmp_path):
    written(tmp_path, *LINES)
    assert [event["num_updates"] for event in read_events(tmp_path)] == [1, 2]
    assert [event["num_updates"] for event in read_events(tmp_path, "measure")] == [2]


def test_the_line_that_a_run_is_writing_is_left_out(tmp_path):
    written(tmp_path, *LINES, '{"event": "tra', end="")
    assert len(list(read_events(tmp_path))) == 2


@pytest.mark.parametrize("line", ['{"event": "tra', "[1, 2]", "7", '{"loss": 1}', "\x00\x00"])
def test_a_damaged_line_is_named(tmp_path, line):
    written(tmp_path, LINES[0], line, LINES[1])
    with pytest.raises(ValueError, match=f"{tmp_path}: line 2 of metrics.jsonl is damaged"):
        list(read_events(tmp_path))


def test_places_are_the_bytes_of_the_lines(tmp_path):
    path = written(tmp_path, *LINES)
    content = path.read_bytes()
    for placed in read_placed(path):
        assert json.loads(content[placed.place : placed.end]) == placed.event
    assert placed.end == len(content)


def test_a_measurement_is_read_back_bit_for_bit():
    layers = {"blocks.0.attn.qkv": stats(update_norm=0.1 + 2e-17), "head": stats(grad_norm=1 / 3)}
    measured = Measurement(30, 1.5, 2 / 3, layers)
    metrics = measurement_metrics(measured, Verdict(False, {}, "not yet"))
    line = json.dumps(as_record("measure", measured.num_updates, measured.epoch, metrics))
    assert measurement_of(json.loads(line)) == measured
