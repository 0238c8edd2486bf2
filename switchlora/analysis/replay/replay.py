"""Show when other settings would have switched: ``switchlora-runs replay RUN... KEY=VALUE ...``.

A criterion reads only the logged history, so it can be asked again without training. Example:
``switchlora-runs replay runs/x switch/criterion=prelora switch.criterion.tau=0.25,0.5,1``. The
overrides have the form of ``switchlora -m``, and change the run's own policy. A RUN may be a
sweep. The results are printed as a table, and written to replay.json, replay.md and replay.png.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path

from hydra import initialize_config_dir

from switchlora.adapters import Target
from switchlora.analysis.figures import results_folder
from switchlora.analysis.formats import markdown
from switchlora.analysis.output import add_formats, save
from switchlora.analysis.replay.picture import draw
from switchlora.analysis.replay.settings import labels, policy_of, split
from switchlora.analysis.tables.rows import run_names
from switchlora.config import folder_of
from switchlora.criteria import Verdict
from switchlora.monitor import Measurement
from switchlora.policy import Decision, SwitchPolicy, decisions
from switchlora.process import USER_ERRORS, one_line
from switchlora.storage import Record, find_records, output_folder, warn

CONF = folder_of("conf")
SLICE = re.compile(r"\.[qkv]$")
"""what the name of a row slice has after that of its module"""


@dataclass(frozen=True)
class Answer:
    """The outcome of one setting on one run's history."""

    setting: str
    run: str
    fires_at: int | None
    """update at which the setting first fires; None when it does not"""
    epoch: float | None
    measured_until: int
    """last update of the history"""
    history_ends: str | None
    """why the history ends before the training's end; None when it covers the whole training"""
    target: str | None
    margin: float | None
    """margin of the deciding ``target``, when the setting fires, or else at the history's end"""
    reason: str
    curve: Sequence[tuple[int, float]]
    """update and deciding margin of each measurement, until the setting fires"""

    @property
    def outcome(self) -> str:
        """The update at which the setting fires, 'never', or 'not by N' when the history ends."""
        if self.fires_at is not None:
            return str(self.fires_at)
        return f"not by {self.measured_until}" if self.history_ends else "never"


def main() -> None:
    """Answer what the command line asks. Exit with one line on a mistake in it."""
    options = parse(sys.argv[1:])
    try:
        records = find_records(options.runs, warn, Record.history)
        answers = replay(records, options.overrides, options.config_dir, options.allow)
        folder = options.out or results_folder(options.runs, "replay")
        text = report(records, options.overrides, answers)
        written = write(folder, records, options.overrides, answers, text, options.formats)
    except USER_ERRORS as error:
        sys.exit(f"replay: {one_line(error)}")
    print(text)
    print(f"written: {' '.join(map(str, written))}")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the options of the command line, and split its words into runs and overrides."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="+", metavar="RUN or KEY=VALUE")
    parser.add_argument("--out", type=output_folder, help="replay/ in the run or sweep by default")
    add_formats(parser)
    parser.add_argument("--config-dir", type=Path, help="a folder with yamls of your own")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="NAME", help="your class that a run names"
    )
    options = parser.parse_intermixed_args(words)
    options.runs = []
    options.overrides = []
    for word in options.words:
        if "=" in word and not Path(word).exists():
            options.overrides.append(word)
        else:
            options.runs.append(Path(word))
    if not options.runs:
        parser.error("give the folder of a run or of a sweep")
    return options


def replay(
    records: Sequence[Record],
    words: Sequence[str],
    config_dir: Path | None = None,
    allow: Sequence[str] = (),
) -> list[Answer]:
    """Return the answer of every setting on every run.

    The overrides ``words`` may hold sweeps; every combination is a setting. The runs may name
    classes and functions of this program, those in the words and the yamls, and ``allow``.
    """
    if config_dir is not None and not config_dir.is_dir():
        raise ValueError(f"--config-dir {config_dir} is no folder")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = split(words)
        histories = [record.history() for record in records]
        names = run_names(records)
        answers = []
        for setting, label in zip(settings, labels(settings), strict=True):
            for record, history, name in zip(records, histories, names, strict=True):
                policy = policy_of(record, setting, config_dir, tuple(allow))
                answers.append(ask(policy, record, history, (label, name)))
        return answers


def ask(
    policy: SwitchPolicy, record: Record, history: Sequence[Measurement], names: tuple[str, str]
) -> Answer:
    """Ask the policy before the first update and after each window, until it fires.

    ``names`` are the label of the setting and the name of the run.
    """
    setting, run = names
    curve: list[tuple[int, float]] = []
    quorum = getattr(policy.criterion, "quorum", 1.0)
    for decision in asked(policy, record, history):
        target, margin = deciding(decision.verdict, quorum)
        if margin is not None:
            curve.append((decision.num_updates, margin))
    fires_at = None
    epoch = None
    if decision.verdict.fires or decision.chosen:
        fires_at = decision.num_updates
        epoch = epoch_at(fires_at, history)
    return Answer(
        setting=setting,
        run=run,
        fires_at=fires_at,
        epoch=epoch,
        measured_until=history[-1].num_updates if history else 0,
        history_ends=history_ends(record),
        target=target,
        margin=margin,
        reason=decision.reason,
        curve=curve,
    )


def epoch_at(num_updates: int, history: Sequence[Measurement]) -> float:
    """Return the epoch of the measurement after ``num_updates`` updates, or 0 without one."""
    for measurement in history:
        if measurement.num_updates == num_updates:
            return measurement.epoch
    return 0.0


def asked(
    policy: SwitchPolicy, record: Record, history: Sequence[Measurement]
) -> Iterator[Decision]:
    """Yield the policy's decisions, as the run would have made them.

    Raise ValueError when the history lacks statistics that the criterion reads.
    """
    targets = {}
    for name in history[-1].layers if history else ():
        targets[name] = Target(name, SLICE.sub("", name), slice(None))
    try:
        yield from decisions(policy, history, targets)
    except (TypeError, IndexError) as error:
        exact = record.config["monitor"]["exact"]
        missing = "" if exact else ", or it reads what only monitor.exact=true measures"
        raise ValueError(
            f"{record.folder.name}: the criterion fails on its history ({error}): a value has "
            f"the wrong type{missing}"
        ) from error


def deciding(verdict: Verdict, quorum: float) -> tuple[str | None, float | None]:
    """Return the deciding target and its margin.

    The share ``quorum`` of all targets must have margins at least as large. With quorum 1 the
    deciding margin is the smallest.
    """
    if not verdict.margins:
        return None, None
    ranked = sorted(verdict.margins.items(), key=itemgetter(1), reverse=True)
    needed = math.ceil(quorum * len(ranked))
    return ranked[needed - 1]


def history_ends(record: Record) -> str | None:
    """Return why a run was not measured to the end of its training, or None if it was."""
    if next(record.events("switch"), None) is not None:
        return "where it switched"
    return None if record.finished else "the run is not finished"


def report(records: Sequence[Record], words: Sequence[str], answers: Sequence[Answer]) -> str:
    """Return Markdown with a heading, a line per run, the table, and notes on its columns."""
    lines = map(run_line, records, answers)
    given = " ".join(words) or "nothing, so the settings of the runs"
    rows = [["setting", "run", "fires at update", "epoch", "margin", "of, or why not"]]
    rows += map(table_row, answers)
    parts = ["# Replay", f"Given: {given}", "\n".join(lines), markdown(rows), NOTES]
    return "\n\n".join(parts)


def table_row(answer: Answer) -> list[str]:
    """Return the cells of an answer's row."""
    epoch = "-" if answer.epoch is None else f"{answer.epoch:.2f}"
    margin = "-" if answer.margin is None else f"{answer.margin:.3g}"
    why = answer.target or answer.reason
    return [answer.setting, answer.run, answer.outcome, epoch, margin, why]


NOTES = """\
- patience and windows count the run's windows, however many updates or epochs those are.
- never: the run trained in full to its end, and the setting does not fire in all of it.
- not by N: the history ends at update N, so the setting fires later or never; a longer run tells,
  such as one with switch/criterion=never.
- margin: distance to the threshold, in the criterion's unit, of the target that decides: the one
  with the smallest, or the one that would complete the quorum. Below zero it holds the switch
  back most. PreLoRA decides by means over families, so it may fire with a target below zero."""


def run_line(record: Record, answer: Answer) -> str:
    """Return a line on a run: the length of its windows, and where its history ends."""
    window = record.config["monitor"]["window"]
    span = "1 epoch" if window == "epoch" else f"{window} updates"
    end = f"until update {answer.measured_until}"
    return f"- {answer.run}: measured every {span}, {end}, {answer.history_ends or 'its end'}"


def write(
    folder: Path,
    records: Sequence[Record],
    words: Sequence[str],
    answers: Sequence[Answer],
    text: str,
    formats: Sequence[str] = ("png",),
) -> list[Path]:
    """Write the answers as JSON, Markdown and a picture; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "overrides": list(words),
        "runs": [str(record.folder) for record in records],
        "answers": [{**asdict(answer), "outcome": answer.outcome} for answer in answers],
    }
    as_json = folder / "replay.json"
    as_markdown = folder / "replay.md"
    as_json.write_text(json.dumps(content, indent=1) + "\n")
    as_markdown.write_text(text + "\n")
    return [as_json, as_markdown, *save(draw(answers), folder, "replay", formats)]
