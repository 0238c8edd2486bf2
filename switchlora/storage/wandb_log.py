"""A run in Weights & Biases: ``log.wandb``."""

import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from inspect import signature
from pathlib import Path
from typing import Any

from switchlora.errors import check_choice
from switchlora.process import one_line
from switchlora.storage.events import read_events
from switchlora.storage.retention import free_name
from switchlora.storage.sinks import RunInfo

PROJECT = "switchlora"
"""in W&B, unless another is named"""
MODES = ("offline", "online", "disabled")
SPELLINGS = {"dryrun": "offline", "run": "online", "": "offline"}
"""other values that W&B takes for its mode"""
TRUE = ("true", "1", "yes", "on")
BY_ENVIRONMENT = {
    "project": "WANDB_PROJECT",
    "name": "WANDB_NAME",
    "group": "WANDB_RUN_GROUP",
    "tags": "WANDB_TAGS",
    "job_type": "WANDB_JOB_TYPE",
}
"""by option of W&B, the variable that W&B reads where the option is not given"""


def wandb_mode(given: str | None) -> str:
    """Return W&B's mode: the ``given`` one, or that of the environment, or 'offline'.

    ValueError for a mode that W&B does not have.
    """
    if given is not None:
        check_choice("log.wandb.mode", str(given), MODES)
        return given
    if os.environ.get("WANDB_DISABLED", "").lower() in TRUE:
        return "disabled"
    found = os.environ.get("WANDB_MODE", "")
    mode = SPELLINGS.get(found, found)
    check_choice("the environment's WANDB_MODE", mode, MODES)
    return mode


def wandb_options(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a W&B run: what is ``given``, or else what ``defaults`` say.

    What the environment sets is left to W&B, unless the option is given.
    """
    options = {key: _as_text(value) for key, value in given.items() if value not in (None, [])}
    for key, value in defaults.items():
        if BY_ENVIRONMENT.get(key, "") not in os.environ:
            options.setdefault(key, value)
    return {**options, "mode": wandb_mode(given["mode"])}


def _as_text(value: Any) -> Any:
    """Return a name or a list of names as text: on a command line, 7 is a number."""
    return list(map(str, value)) if isinstance(value, list) else str(value)


class WandbLog:
    """One run in W&B, a sink.

    An offline run cannot be reopened. It is written anew, whole, from metrics.jsonl. What the
    interrupted process left is put aside. One offline folder thus holds everything.
    ``known`` is the id that the run has in W&B from an earlier process.
    """

    def __init__(self, options: Mapping[str, Any], known: str | None) -> None:
        self._options = options
        self._known = known
        self._step = 0
        self.id: str | None = None

    def start(self, run: RunInfo) -> None:
        """Begin a run in W&B, or reopen the known one; offline where it cannot be online."""

        def start(options: Mapping[str, Any]) -> Any:
            return _start(run.folder, run.config, options, self._known)

        self._run = online_or_offline(start, self._options, run.folder, run.say)
        self.id = self._run.id
        self._first_step = self._run.starting_step
        for event in read_events(run.folder):
            self.log(event)

    def log(self, event: Mapping[str, Any]) -> None:
        """Send the next event, unless W&B knows it from an earlier process."""
        step = self._step
        self._step += 1
        if step >= self._first_step:
            self._run.log(_as_values(event), step=step)

    def figures(self, paths: Sequence[Path]) -> None:
        """Send pictures, under ``figures/<name>``."""
        import wandb

        self._run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in paths})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write the values of the whole run to W&B's summary."""
        self._run.summary.update(values)

    def finish(self, error: type[BaseException] | None) -> None:
        """End the W&B run."""
        self._run.finish(exit_code=0 if error is None else 1)


def online_or_offline(
    start: Callable[[Mapping[str, Any]], Any],
    options: Mapping[str, Any],
    folder: Path,
    say: Callable[[str], None],
) -> Any:
    """Return what ``start`` begins with ``options``; offline where it cannot be online.

    A line says why, and that the files in ``folder`` can be sent later.
    """
    try:
        return start(options)
    except Exception as error:
        if options["mode"] == "offline":
            raise
        say(
            f"W&B logs offline: {one_line(error)} What is in {folder / 'wandb'} can be "
            "sent later with 'wandb sync'"
        )
        return start({**options, "mode": "offline"})


def _start(
    folder: Path, config: Mapping[str, Any], options: Mapping[str, Any], known: str | None
) -> Any:
    """Start a W&B run, or reopen the ``known`` one; set its axis."""
    if options["mode"] == "offline":
        _put_aside(folder / "wandb")
    run = begin_wandb(folder, options, known, config)
    run.define_metric("num_updates")
    run.define_metric("*", step_metric="num_updates")
    return run


def begin_wandb(
    folder: Path,
    options: Mapping[str, Any],
    known: str | None,
    config: Mapping[str, Any] | None = None,
) -> Any:
    """Begin a W&B run whose files are in ``folder``, or reopen the ``known`` one."""
    _name_a_home()
    import wandb

    if options["mode"] == "online":
        check_login()
    return wandb.init(
        dir=str(folder),
        config=dict(config or {}),
        reinit="create_new",
        id=known,
        resume="allow" if known and options["mode"] == "online" else None,
        settings=wandb.Settings(silent=True, console="off"),
        **options,
    )


def check_login() -> None:
    """Raise ValueError if W&B would ask on the terminal for a key: nobody may be there."""
    import wandb

    if "prompt" in signature(wandb.login).parameters:
        with redirect_stderr(io.StringIO()):
            known = wandb.login(prompt=False)
    else:  # W&B before 0.30
        known = bool(wandb.api.api_key)
    if not known:
        raise ValueError("there is no key: 'wandb login' or WANDB_API_KEY gives one.")


def _name_a_home() -> None:
    """Name a home folder in the environment: without one, W&B's log comes to the terminal."""
    if "HOME" not in os.environ:
        home = os.path.expanduser("~")
        os.environ["HOME"] = tempfile.gettempdir() if home == "~" else home


def _as_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return numbers and tables of an event, as W&B takes them."""
    import wandb

    values: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, int | float):
            values[key] = value
        elif isinstance(value, Mapping) and set(value) == {"columns", "data"}:
            values[key] = wandb.Table(columns=value["columns"], data=value["data"])
    return values


def _put_aside(folder: Path) -> None:
    for left in folder.glob("offline-run-*"):
        aside = folder / "interrupted"
        aside.mkdir(exist_ok=True)
        left.rename(free_name(aside, left.name))  # two runs of one second have the same name
