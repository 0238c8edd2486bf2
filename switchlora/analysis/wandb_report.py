"""Build a Weights & Biases report of runs: ``switchlora-runs wandb-report RUNS...``.

The report covers the W&B runs in the run folders. It has panels of update norms, stable ranks and
margins (one for each family of targets, over ``num_updates``), validation, and the table of ranks.
It needs ``pip install wandb-workspaces``. Without ``--publish`` nothing is sent. The report is
then written to ``--out`` as JSON, which W&B's own package makes from it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchlora.criteria import LOSS
from switchlora.names import family
from switchlora.storage import Record, find_records, output_file, warn

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import (
        LinePlot,
        PanelGrid,
        Report,
        Runset,
        WeavePanelSummaryTable,
    )


AXIS = "num_updates"
HEADINGS = {
    "relative_update_norm": "Update norm, relative to the weight's",
    "update_stable_rank": "Stable rank of the update",
    "weight_stable_rank": "Stable rank of the weight",
    "switch/margin": "Margin to the criterion's threshold (fires where all are positive)",
}
"""the heading over the plots of each statistic"""
TRAINING = {
    "val/top1": "Validation top1, %",
    "val/loss": "Validation loss",
    "params/trainable": "Trained parameters: they drop at the switch",
}
"""the title of the plot of each metric"""
RANKS = "switch/ranks"
COLUMNS = 24  # of W&B's grid
HEIGHT = 8  # of a panel
MOST_ACROSS = 3  # most plots beside each other
Spec = dict[str, Any]


def main() -> None:
    """Write the report's JSON, or publish it. Exit with one line on a mistake."""
    options = parse(sys.argv[1:])
    try:
        records = find_records(options.runs, warn, lambda record: build_report([record], "", ""))
        entity = options.entity if options.publish else ""
        report = build_report(records, entity, options.project)
        if options.publish:
            print(publish(report))
        else:
            options.out.write_text(json.dumps(spec_of(report), indent=2) + "\n")
            print(options.out)
    except (ValueError, OSError) as error:
        sys.exit(f"wandb-report: {error}")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run folders or sweep folders")
    parser.add_argument("--out", type=output_file, default=Path("wandb_report.json"))
    parser.add_argument("--project", help="default: the one that the runs were logged for")
    parser.add_argument("--entity", help="the W&B user or team that owns the project")
    parser.add_argument("--publish", action="store_true", help="save the report to W&B")
    options = parser.parse_args(words)
    if options.publish and not options.entity:
        parser.error("--publish needs --entity, the W&B user or team that owns the project")
    return options


def build_report(records: Sequence[Record], entity: str, project: str | None) -> "Report":
    """Build the report of ``records``. Without an ``entity`` no network is used.

    Raise ValueError when the package is missing or a run folder holds no W&B run.
    """
    wr = _package()
    ids = list(dict.fromkeys(map(wandb_id, records)))
    project = project or records[0].config["log"]["wandb"]["project"]
    runset = _runset(ids, records, entity, project)
    training = [_plot(title, [key]) for key, title in TRAINING.items()]
    blocks = [
        wr.H1("When the runs switched"),
        wr.UnorderedList(list(map(_switch_line, records))),
        wr.H1("Training"),
        _grid(runset, training),
        wr.H1("Ranks"),
        wr.PanelGrid(runsets=[runset], panels=[_rank_table()]),
    ]
    for statistic, heading in HEADINGS.items():
        families = metrics_by_family(records, statistic)
        if families:
            plots = [_plot(name, keys) for name, keys in families.items()]
            blocks += [wr.H1(heading), _grid(runset, plots)]
    plural = "s" if len(records) > 1 else ""
    title = f"Switching in {len(records)} run{plural}"
    return wr.Report(project, entity, title, blocks=blocks, width="fluid")


def publish(report: "Report") -> str:
    """Save the report to W&B and return its address. Raise ValueError when W&B refuses it."""
    import wandb

    try:
        wandb.Api()
        report.save()
    except (wandb.errors.Error, OSError) as error:
        raise ValueError(f"W&B refused the report: {' '.join(str(error).split())}") from error
    return report.url


def spec_of(report: "Report") -> Spec:
    """Return the content that the report's ``save`` would send."""
    model = report._to_model()
    return json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))


def wandb_id(record: Record) -> str:
    """Return the id of a run in W&B. Raise ValueError when it has none."""
    runs = record.folder.glob("wandb/*run-*-*")
    found = sorted(runs, key=lambda path: path.name.removeprefix("offline-"))
    if not found:
        raise ValueError(
            f"{record.folder} has no W&B run: train with log.wandb.mode=offline or online"
        )
    return found[-1].name.rpartition("-")[2]


def metrics_by_family(records: Sequence[Record], statistic: str) -> dict[str, list[str]]:
    """Return the logged keys of a statistic by family of targets, over all runs."""
    start = f"{statistic}/"
    logged: dict[str, None] = {}
    for record in records:
        for event in record.events("measure"):
            logged |= dict.fromkeys(event)
    families: dict[str, list[str]] = {}
    for key in logged:
        if key.startswith(start) and key != f"{start}{LOSS}":
            name = family(key.removeprefix(start))
            families.setdefault(name, []).append(key)
    return families


def _package() -> Any:
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise ValueError("it needs W&B's package: pip install wandb-workspaces") from error
    return wr


def _runset(ids: list[str], records: Sequence[Record], entity: str, project: str) -> "Runset":
    from wandb_workspaces import expr

    grouped = any(record.config["log"]["wandb"].get("group") for record in records)
    return _package().Runset(
        entity,
        project,
        "Runs",
        filters=expr.And(expr.Metric("ID").isin(list(ids))),
        groupby=["group"] if grouped else [],
    )


def _plot(title: str, keys: Sequence[str]) -> "LinePlot":
    return _package().LinePlot(
        title=title,
        x=AXIS,
        y=list(keys),
        title_x="optimizer updates",
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
    )


def _grid(runset: "Runset", plots: Sequence["LinePlot"]) -> "PanelGrid":
    wr = _package()
    width = COLUMNS // min(len(plots), MOST_ACROSS)
    across = COLUMNS // width
    for place, plot in enumerate(plots):
        row, column = divmod(place, across)
        plot.layout = wr.Layout(
            x=width * column,
            y=HEIGHT * row,
            w=width,
            h=HEIGHT,
        )
    return wr.PanelGrid(runsets=[runset], panels=list(plots))


def _rank_table() -> "WeavePanelSummaryTable":
    wr = _package()
    layout = wr.Layout(x=0, y=0, w=COLUMNS, h=HEIGHT)
    return wr.WeavePanelSummaryTable(table_name=RANKS, layout=layout)


def _switch_line(record: Record) -> str:
    switch = next(record.events("switch"), None)
    if switch is None:
        return f"{record.folder.name}: did not switch"
    place = f"update {switch['num_updates']:,} (epoch {switch['epoch']:.2f})"
    return f"{record.folder.name}: {place}: {switch['switch/reason']}"
