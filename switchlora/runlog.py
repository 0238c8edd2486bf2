"""What a run writes while it goes on: metrics.jsonl always, W&B when asked, the terminal."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

METRICS = "metrics.jsonl"


class RunLog:
    """One run's log; a context manager that ends the W&B run with the right exit code.

    Every event is one JSON object a line in ``metrics.jsonl``, the source of truth, and one W&B
    step with the same keys. ValueError for a folder that holds a run already or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        total_updates: int,
        wandb: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        self.folder = folder
        if (folder / METRICS).exists():
            raise ValueError(f"{folder} already holds a run; choose another hydra.run.dir")
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb = _start_wandb(folder, config, wandb) if wandb else None
        self._file = (folder / METRICS).open("x", buffering=1)  # noqa: SIM115
        self._bar = tqdm(
            total=total_updates, unit="update", dynamic_ncols=True, disable=not progress
        )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def event(self, event: str, num_updates: int, epoch: float, **metrics: Any) -> None:
        """Record one event; keys as in the README, values numbers, strings, lists or mappings."""
        record = {"event": event, "num_updates": num_updates, "epoch": round(epoch, 6), **metrics}
        self._file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
        if self._wandb is not None:
            numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
            self._wandb.log({"num_updates": num_updates, "epoch": epoch, **numbers})

    def line(self, text: str) -> None:
        """One line on the terminal, above the progress bar."""
        self._bar.write(text)

    def progress(self, **postfix: str) -> None:
        """One more update on the progress bar."""
        self._bar.set_postfix(postfix, refresh=False)
        self._bar.update()

    def end_progress(self) -> None:
        """Close the progress bar, so that what follows stands below it."""
        self._bar.close()

    def table(self, key: str, columns: list[str | int], rows: list[list[Any]]) -> None:
        """A table in W&B."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({key: wandb.Table(columns=columns, data=rows)})

    def images(self, paths: list[Path]) -> None:
        """Pictures in W&B, under ``figures/<name>``."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({f"figures/{p.stem}": wandb.Image(str(p)) for p in paths})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Values of the whole run: ``summary.json`` and W&B's summary."""
        text = json.dumps(_plain(values), indent=2, allow_nan=False)
        (self.folder / "summary.json").write_text(text + "\n")
        if self._wandb is not None:
            self._wandb.summary.update(_plain(values))


def read_events(folder: Path, event: str | None = None) -> Iterator[dict[str, Any]]:
    """Events of a run folder in order, those named ``event`` or all."""
    with open(folder / METRICS) as file:
        for line in file:
            record = json.loads(line)
            if event in (None, record["event"]):
                yield record


def _start_wandb(folder: Path, config: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    import wandb

    run = wandb.init(
        dir=str(folder),
        config=dict(config),
        reinit="create_new",
        settings=wandb.Settings(silent=True, console="off"),
        **options,
    )
    run.define_metric("num_updates")
    run.define_metric("*", step_metric="num_updates")
    return run


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
