"""metrics.jsonl: one reader for runs, records, trunks and pictures."""

import json
import math
from dataclasses import replace

import pytest

from conftest import stats
from switchlora.criteria import Verdict
from switchlora.monitor import Measurement
from switchlora.storage import (
    FileDamaged,
    event_of,
    measurement_of,
    read_events,
    read_history,
    read_placed,
)

LINES = ['{"event": "memory", "num_updates": 1}', '{"event": "measure", "num_updates": 2}']
TRAIN = '{"event": "train", "num_updates": 1, "train/loss": 2.0}'
DAMAGED = {
    "not UTF-8": (b'{"event": "tr\xe4in"}', "is not UTF-8"),
    "cut": (b'{"event": "tra', "is no JSON: Unterminated string starting at at column 11"),
    "zeros": (bytes(9), "is no JSON"),
    "empty": (b"", "is empty"),
    "two lines that lost their break": (f"{TRAIN}{TRAIN}".encode(), "is no JSON: Extra data"),
    "another break": (f"{TRAIN}\r{TRAIN}".encode(), "is no JSON: Extra data"),
    "a list": (b"[1, 2]", "holds no JSON object"),
    "a number": (b"7", "holds no JSON object"),
    "deeply nested": (b"[" * 100_000, "is nested too deeply"),
    "a number of too many digits": (b"9" * 10_000, "Exceeds the limit"),
    "no event": (b'{"loss": 1}', "holds no event"),
    "no name": (b'{"event": 3, "num_updates": 1}', "holds no event"),
    "no updates": (b'{"event": "train"}', "is an event without 'num_updates'"),
    "no loss": (b'{"event": "train", "num_updates": 1}', "'train' without 'train/loss'"),
    "no top1": (b'{"event": "eval", "num_updates": 1}', "'eval' without 'val/top1'"),
}


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


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_line_is_named_with_what_is_wrong(tmp_path, kind):
    line, words = DAMAGED[kind]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([LINES[0].encode(), line, LINES[1].encode(), b""]))
    with pytest.raises(FileDamaged) as caught:
        list(read_events(tmp_path))
    said = str(caught.value)
    assert said.startswith(f"{path} is damaged: ") and words in said, said
    assert "line 2" in said or kind == "a number of too many digits"


@pytest.mark.parametrize("lost", ["epoch", "train/window_loss", "grad_norm/head"])
def test_a_measurement_that_lacks_a_number_is_named_with_its_line(tmp_path, lost):
    event = event_of(MEASURED["plain"], Verdict(False, {}, ""))
    del event[lost]
    written(tmp_path, LINES[0], json.dumps(event))
    with pytest.raises(FileDamaged, match=f"line 2 is a measurement without '{lost}'"):
        read_history(tmp_path)


def test_places_are_the_bytes_of_the_lines(tmp_path):
    path = written(tmp_path, *LINES)
    content = path.read_bytes()
    for placed in read_placed(path):
        assert json.loads(content[placed.place : placed.end]) == placed.event
    assert placed.end == len(content)


PLAIN = {"blocks.0.attn.qkv": stats(update_norm=0.1 + 2e-17), "head": stats(grad_norm=1 / 3)}
EXACT = replace(
    stats(),
    weight_effective_rank=1 / 7,
    update_effective_rank=math.nan,
    weight_singular_values=(2 / 3, 1e-300),
    update_singular_values=(0.1, math.nan),
    update_kept_energies=(1 / 9, math.nan),
    basis_stability=0.9,
)
MEASURED = {
    "plain": Measurement(30, 1.5, 2 / 3, PLAIN),
    "exact": Measurement(30, 1.5, 2 / 3, {"head": EXACT}),
    "not finite": Measurement(30, 1.5, math.nan, {"head": stats(grad_norm=math.nan)}),
}


@pytest.mark.parametrize("kind", MEASURED)
def test_a_measurement_is_read_back_bit_for_bit(kind):
    measured = MEASURED[kind]
    line = json.dumps(event_of(measured, Verdict(False, {"head": -0.5}, "not yet")))
    assert repr(measurement_of(json.loads(line))) == repr(measured), "NaN is not equal to itself"
