"""A run in MLflow: ``log/sinks=mlflow``."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from switchlora.config import leaves
from switchlora.errors import Interrupted
from switchlora.storage.events import read_events
from switchlora.storage.files import write_whole
from switchlora.storage.sinks import RunInfo, numbers, summary_numbers

RUN_ID = "mlflow_run_id"
"""file in the run folder with the id of the run in MLflow"""
EVENTS = "events"
"""metric in MLflow: how many lines of metrics.jsonl it holds"""
EXPERIMENT = "switchlora"
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the training waits meanwhile
}
"""by variable of MLflow, what holds unless the environment says otherwise"""


class MLflow:
    """One run in MLflow: parameters, metrics by update, and files at the end.

    A run that goes on is the same run there. MLflow keeps what the interrupted process logged
    after its last checkpoint. These events come again, in the same order, and are not sent twice.
    What is not given is as MLflow's variables in the environment say.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment: str | None = None,
        name: str | None = None,
        model: bool = False,
    ) -> None:
        self._tracking_uri = tracking_uri
        self._experiment = None if experiment is None else str(experiment)
        self._name = None if name is None else str(name)
        self._model = model
        self._read = 0
        self._step = 0
        self._known: dict[str, float] = {}
        """by metric, the last value that MLflow had when this process began"""

    def start(self, run: RunInfo) -> None:
        """Begin a run in MLflow, or go on with that of the run folder."""
        for variable, value in QUIET.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient

        self._client = MlflowClient(self._tracking_uri)
        self._folder = run.folder
        note = run.folder / RUN_ID
        if run.goes_on and note.exists():
            self._go_on(note.read_text().strip())
        else:
            self._begin(run)
            write_whole(note, f"{self._id}\n")
        for event in read_events(run.folder):
            self.log(event)

    def log(self, event: Mapping[str, Any]) -> None:
        """Send the numbers of the next event, unless MLflow has them."""
        self._read += 1
        self._step = event["num_updates"]
        if self._read > self._known.get(EVENTS, 0):
            self._send({**numbers(event), EVENTS: self._read})

    def figures(self, paths: Sequence[Path]) -> None:
        """Send pictures, into the folder ``figures``."""
        for path in paths:
            self._client.log_artifact(self._id, str(path), "figures")

    def summary(self, values: Mapping[str, Any]) -> None:
        """Send the numbers that compare runs, summary.json, config.yaml; the model if asked."""
        found = summary_numbers(values)
        self._send({key: x for key, x in found.items() if self._known.get(key) != x})
        self._known |= found
        names = ["summary.json", "config.yaml"]
        if self._model:
            names += ["model.safetensors", "model_ema.safetensors", "adapter"]
        for name in names:
            if (self._folder / name).exists():
                self._send_file(self._folder / name)

    def finish(self, error: type[BaseException] | None) -> None:
        """End the run in MLflow: finished, failed, or killed by a signal."""
        status = "FAILED"
        if error is None:
            status = "FINISHED"
        elif issubclass(error, Interrupted | KeyboardInterrupt):
            status = "KILLED"
        self._client.set_terminated(self._id, status)

    def _begin(self, run: RunInfo) -> None:
        """Begin a run in MLflow with the configuration as its parameters."""
        from mlflow.entities import Param

        tags = {"switchlora.folder": str(run.folder.absolute())}
        name = self._name or "_".join(run.words)
        begun = self._client.create_run(self._experiment_id(), run_name=name, tags=tags)
        self._id = begun.info.run_id
        params = [Param(_clean(key), str(value)) for key, value in leaves(run.config)]
        self._client.log_batch(self._id, params=params)

    def _go_on(self, run_id: str) -> None:
        """Go on with a run of MLflow. Its parameters stay: MLflow lets none change."""
        self._id = run_id
        self._known = dict(self._client.get_run(run_id).data.metrics)
        self._client.update_run(run_id, status="RUNNING")

    def _experiment_id(self) -> str:
        """Return the id of the experiment; it is made if it is not there."""
        from mlflow.exceptions import MlflowException

        by_id = os.environ.get("MLFLOW_EXPERIMENT_ID")
        name = self._experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if by_id and not name:
            return by_id
        name = name or EXPERIMENT
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name)
            except MlflowException:  # another job has just made it, or it cannot be made
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id

    def _send(self, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        metrics = [Metric(_clean(key), x, now, self._step) for key, x in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def _send_file(self, path: Path) -> None:
        if path.is_dir():
            self._client.log_artifacts(self._id, str(path), path.name)
        else:
            self._client.log_artifact(self._id, str(path))


def _clean(key: str) -> str:
    """Return a key of letters that MLflow takes in a name."""
    return re.sub(r"[^\w./ -]", "_", key)
