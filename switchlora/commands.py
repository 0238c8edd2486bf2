"""``switchlora-runs`` and ``switchlora-bench``: the first word picks the command."""

import sys
from collections.abc import Mapping
from importlib import import_module

from switchlora.errors import ODD
from switchlora.names import near

RUNS = {
    "eval": (
        "analysis.evaluate",
        "loss and accuracy of a saved model, on its test split or others",
    ),
    "card": (
        "analysis.card.card",
        "what accuracy hides, beside full training: classes, calibration",
    ),
    "cards": ("analysis.card.over_seeds", "cards of several seeds, beside full training"),
    "data": ("analysis.data_report", "what is wrong with data: leaks, duplicates, labels, shift"),
    "tables": ("analysis.tables.table", "accuracy, cost, speed and memory of runs, side by side"),
    "report": ("analysis.page.page", "one HTML page with tables, curves and pictures of runs"),
    "curves": ("analysis.curves", "update norms and ranks over the updates, runs overlaid"),
    "figures": ("analysis.figures", "draw the pictures of runs again"),
    "replay": ("analysis.replay.replay", "when other criteria and thresholds would have switched"),
    "scaling": ("analysis.scaling", "fit loss against training FLOPs over several model sizes"),
    "compare": ("analysis.compare", "say whether two runs ended bit-equal, and what differs"),
    "publish": ("analysis.versions.publish", "make a run a version in a registry of models"),
    "promote": ("analysis.versions.promote", "put a version of a registry into production"),
    "rollback": ("analysis.versions.rollback", "put the version before back into production"),
    "verify": ("analysis.versions.verify", "check the versions of a registry by their checksums"),
    "log": ("analysis.versions.log", "who published and promoted what in a registry, and why"),
    "drift": ("analysis.drift.drift", "whether new images are like those that a version knows"),
    "takeoff": ("analysis.takeoff", "the model of just before the switch, bit for bit"),
    "wandb-report": ("analysis.wandb_report", "a report of runs in Weights & Biases"),
}
BENCH = {
    "update": ("bench.bench", "an update's seconds and memory: full training, adapters, PEFT"),
    "plan": ("bench.plan", "time and memory of both phases on a device by name, predicted"),
    "switch": ("bench.switch", "what monitor and switch cost"),
    "lowrank": ("bench.lowrank", "low-rank layers beside dense ones"),
    "phases": ("bench.phases", "an update of both phases of a run, and what each of them holds"),
    "systems": ("bench.systems", "updates of the runs of a sweep, interleaved in one process"),
}
Commands = Mapping[str, tuple[str, str]]


def runs() -> None:
    """``switchlora-runs COMMAND ...``: read the runs that are there."""
    dispatch("switchlora-runs", RUNS)


def bench() -> None:
    """``switchlora-bench COMMAND ...``: time things anew on this machine."""
    dispatch("switchlora-bench", BENCH)


def dispatch(program: str, commands: Commands) -> None:
    """Call ``main`` of the module behind the first word of the command line.

    Without a word, or with --help, list the commands. SystemExit with one line for an unknown one.
    """
    word, *rest = sys.argv[1:] or ["--help"]
    if word in ("-h", "--help"):
        print(usage(program, commands))
        return
    if word not in commands:
        sys.exit(f"{program}: no command '{word}'; {near(word, commands)}")
    module, _ = commands[word]
    sys.argv = [f"{program} {word}", *rest]
    command = import_module(f"switchlora.{module}")
    from switchlora.process import exit_with_one_line, talk_without_risk  # torch is there by now

    talk_without_risk()  # its reader may be `head`
    try:
        command.main()
    except ODD as error:
        what = f"something odd stands in a file of these runs ({type(error).__name__}: {error})"
        odd = ValueError(f"{word}: {what}; SWITCHLORA_TRACEBACK=1 shows where it was met")
        odd.__cause__ = error
        exit_with_one_line(odd)


def usage(program: str, commands: Commands) -> str:
    """How the program is called, with a line for each command."""
    lines = [f"  {name:<14}{what}" for name, (_, what) in commands.items()]
    head = [f"usage: {program} COMMAND ...", "", "commands:"]
    return "\n".join([*head, *lines, "", f"{program} COMMAND --help tells more."])
