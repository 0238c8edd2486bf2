"""A run in Weights & Biases that never ends the training: what fails there is told, and left."""

import io
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from inspect import signature
from pathlib import Path
from typing import Any

from switchlora.errors import check_choice
from switchlora.process import one_line
from switchlora.storage.retention import free_name

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
    options = {key: value for key, value in given.items() if value not in (None, [])}
    for key, value in defaults.items():
        if BY_ENVIRONMENT.get(key, "") not in os.environ:
            options.setdefault(key, value)
    return {**options, "mode": wandb_mode(given["mode"])}


class WandbLog:
    """One run in W&B. What fails is told in one line, and the training goes on without it.

    An offline run cannot be reopened. It is written anew, whole, from metrics.jsonl. What the
    interrupted process left is put aside. One offline folder thus holds everything.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        options: Mapping[str, Any],
        known: str | None,
        say: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._say = say
        self._run = self._begin(config, options, known)
        self.id = None if self._run is None else self._run.id
        self._first_step = 0 if self._run is None else self._run.starting_step
        self._step = 0

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the next event, unless W&B knows it from an earlier process."""
        step = self._step
        self._step += 1
        if step >= self._first_step:
            self._attempt(lambda run: run.log(_as_values(record), step=step))

    def images(self, paths: list[Path]) -> None:
        """Send pictures, under ``figures/<name>``."""

        def send(run: Any) -> None:
            import wandb

            run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in paths})

        self._attempt(send)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write the values of the whole run to W&B's summary."""
        self._attempt(lambda run: run.summary.update(values))

    def finish(self, exit_code: int) -> None:
        """End the W&B run."""
        self._attempt(lambda run: run.finish(exit_code=exit_code))

    def _attempt(self, act: Callable[[Any], Any]) -> None:
        """Do something with the W&B run; leave W&B when that fails."""
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:
            self._run = None
            self._say(f"W&B is left, the run goes on without it: {one_line(error)}")

    def _begin(
        self, config: Mapping[str, Any], options: Mapping[str, Any], known: str | None
    ) -> Any:
        """Return a W&B run; offline where it cannot be online, None where it cannot be at all."""
        try:
            return _start(self._folder, config, options, known)
        except Exception as error:
            if options["mode"] == "offline":
                self._say(f"W&B cannot start, the run goes on without it: {one_line(error)}")
                return None
            self._say(
                f"W&B logs offline: {one_line(error)} What is in {self._folder / 'wandb'} can be "
                "sent later with 'wandb sync'"
            )
            return self._begin(config, {**options, "mode": "offline"}, known)


def _start(
    folder: Path, config: Mapping[str, Any], options: Mapping[str, Any], known: str | None
) -> Any:
    """Start a W&B run, or reopen the ``known`` one."""
    _name_a_home()
    import wandb

    if options["mode"] == "offline":
        _put_aside(folder / "wandb")
    else:
        _check_login()
    run = wandb.init(
        dir=str(folder),
        config=dict(config),
        reinit="create_new",
        id=known,
        resume="allow" if known and options["mode"] == "online" else None,
        settings=wandb.Settings(silent=True, console="off"),
        **options,
    )
    run.define_metric("num_updates")
    run.define_metric("*", step_metric="num_updates")
    return run


def _check_login() -> None:
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
