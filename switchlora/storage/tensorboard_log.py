"""A run in TensorBoard: ``log/sinks=tensorboard``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from switchlora.config import leaves
from switchlora.storage.events import read_events
from switchlora.storage.sinks import RunInfo, numbers, summary_numbers

FOLDER = "tensorboard"
FLUSH_SECONDS = 30
COMPARED = ("summary/val.best_top1", "summary/test.top1", "summary/cost.train_flops")
"""what TensorBoard's page of hyperparameters shows of each run"""


class TensorBoard:
    """Event files in the run folder: numbers by update, hyperparameters, pictures at the end.

    A run that goes on writes into the same folder. TensorBoard then hides what lies at or after
    the update of the last event that the run kept; what was kept of it is written again.
    """

    def start(self, run: RunInfo) -> None:
        """Begin, or go on."""
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / FOLDER
        there = any(folder.glob("events.out.tfevents.*"))
        events = list(read_events(run.folder))
        self._step = events[-1]["num_updates"] if events else 0
        first = self._step if there else 0
        self._writer = SummaryWriter(
            str(folder), purge_step=first if there else None, flush_secs=FLUSH_SECONDS
        )
        if not there:
            self._write_settings(run.config)
        for event in events:
            if event["num_updates"] >= first:
                self.log(event)

    def log(self, event: Mapping[str, Any]) -> None:
        """Write the numbers of an event, at its update.

        They are in the file when this returns, since a checkpoint may come next.
        """
        self._step = event["num_updates"]
        self._write(numbers(event))

    def figures(self, paths: Sequence[Path]) -> None:
        """Write pictures, under ``figures/<name>``."""
        import numpy as np
        from PIL import Image

        for path in paths:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            self._writer.add_image(f"figures/{path.stem}", pixels, self._step, dataformats="HWC")

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write the numbers that compare runs, at the last update."""
        self._write(summary_numbers(values))

    def finish(self, error: type[BaseException] | None) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, self._step)
        self._writer.flush()

    def _write_settings(self, config: Mapping[str, Any]) -> None:
        """Write the configuration as hyperparameters."""
        from torch.utils.tensorboard.summary import hparams

        settings = {}
        for key, value in leaves(config):
            settings[key] = value if isinstance(value, bool | int | float | str) else str(value)
        for summary in hparams(settings, dict.fromkeys(COMPARED, 0.0)):
            self._writer._get_file_writer().add_summary(summary)
