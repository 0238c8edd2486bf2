"""The entry point: ``switchlora key=value ...`` makes one run, in the order told here."""

import gc
import os
import sys
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from switchlora.criteria import Verdict
from switchlora.errors import SwitchFailed, TrainingStopped, near
from switchlora.finish import finish
from switchlora.learner import Learner, Update, build_learner
from switchlora.monitor import Measurement, UpdateMonitor
from switchlora.report import (
    eval_line,
    measurement_line,
    measurement_metrics,
    switch_lines,
    switch_metrics,
)
from switchlora.run import Run, prepare
from switchlora.state import Phase
from switchlora.surgery import count_parameters
from switchlora.switch import switch

SHOW_TRACEBACK = "SWITCHLORA_TRACEBACK"
USER_ERRORS = (
    ValueError,
    TrainingStopped,
    OSError,
    torch.OutOfMemoryError,
    HydraException,
    OmegaConfBaseException,
)


def train(config: DictConfig, folder: Path) -> dict:
    """Run the experiment of ``config`` in ``folder`` and return its summary."""
    run = prepare(config, folder)
    with run.log:
        status = "stopped"
        try:
            fit(run)
            status = "finished"
        except TrainingStopped as stop:
            status = f"stopped: {stop}"
            raise
        finally:
            summary = finish(run, status, folder, int(config.seed))
    return summary


def fit(run: Run) -> None:
    """All epochs, with the switch wherever the criterion fires."""
    consider_switch(run, epoch=0.0)
    while run.state.epoch < run.epochs and run.state.num_updates < run.last_update:
        train_epoch(run)
        evaluate_epoch(run)


def train_epoch(run: Run) -> None:
    """One pass over the training split; measures, and perhaps switches, as windows complete."""
    state = run.state
    run.data.set_epoch(state.epoch)
    run.stopwatch.resume()
    for position, (images, targets) in enumerate(run.data.train, start=1):
        if run.data.mixup is not None:
            images, targets = run.data.mixup(images, targets)
        update = run.learner.update(images, targets, run.data.loss, state.num_updates)
        if not keep(run, update):
            continue
        run.stopwatch.lap()
        state.num_updates += 1
        epoch = state.epoch + position / len(run.data.train)
        record_update(run, update, epoch)
        if run.monitor is not None:
            run.monitor.observe(update.loss, run.learner.decay(update.lr))
            if run.monitor.due(state.num_updates):
                measure(run, run.monitor, epoch)
                consider_switch(run, epoch)
        if state.num_updates == run.last_update:
            break
    state.epoch += 1


def keep(run: Run, update: Update) -> bool:
    """Whether the update was applied; TrainingStopped after too many in a row that were not."""
    state = run.state
    if update.applied:
        state.skipped_in_a_row = 0
        return True
    state.skipped_updates += 1
    state.skipped_in_a_row += 1
    run.log.line(
        f"skipped an update after {state.num_updates}: "
        f"loss {update.loss:g}, gradient norm {update.grad_norm:g}"
    )
    if state.skipped_in_a_row > run.max_skipped:
        raise TrainingStopped(
            f"loss or gradient was not finite in {state.skipped_in_a_row} updates in a row after "
            f"update {state.num_updates}; lower the learning rate (full.optimizer.lr, "
            f"{update.lr:.2g} here) or check the data"
        )
    return False


def record_update(run: Run, update: Update, epoch: float) -> None:
    """EMA, progress bar, and every ``log.every`` updates a 'train' event."""
    if run.ema is not None:
        run.ema.update(run.model)
    run.log.progress(phase=run.state.phase, loss=f"{update.loss:.3f}")
    if run.state.num_updates % run.log_every == 0 or run.state.num_updates == 1:
        metrics = {
            "train/loss": update.loss,
            "train/lr": update.lr,
            "train/grad_norm": update.grad_norm,
            "train/phase": run.state.phase,
        }
        run.log.event("train", run.state.num_updates, epoch, **metrics)


def measure(run: Run, monitor: UpdateMonitor, epoch: float) -> None:
    """Add the finished window to the history."""
    with run.stopwatch.paused(monitor=True):
        run.state.history.append(monitor.measure(run.state.num_updates, epoch))


def consider_switch(run: Run, epoch: float) -> None:
    """Ask the criterion; when it fires, switch; when that fails, go on in the full phase."""
    assert run.monitor is not None
    history = run.state.history
    run.verdict = run.policy.decide(history)
    with run.stopwatch.paused():
        if history:
            report_measurement(run, history[-1], run.verdict)
        switched = run.verdict.fires and try_switch(run, epoch)
        if switched:
            release_memory(run.device)
    if switched:
        run.stopwatch.start_phase()
    elif history:
        with run.stopwatch.paused(monitor=True):
            run.monitor.start_window(run.state.num_updates)


def report_measurement(run: Run, measurement: Measurement, verdict: Verdict) -> None:
    """A 'measure' event and a line on the terminal."""
    run.log.event(
        "measure",
        measurement.num_updates,
        measurement.epoch,
        **measurement_metrics(measurement, verdict),
    )
    run.log.line(measurement_line(measurement, verdict))


def try_switch(run: Run, epoch: float) -> bool:
    """Switch to the adapter phase: new learner, no monitor. Whether it worked."""
    assert run.monitor is not None and run.verdict is not None
    state = run.state
    full_phase = run.phase_summary()

    def rebuild() -> Learner:
        recipe = run.recipes[Phase.ADAPTER]
        return build_learner(run.model, recipe, run.total_updates, start=state.num_updates)

    try:
        run.learner, report = switch(
            run.learner, run.policy, run.monitor, state.history, run.probe, rebuild
        )
    except SwitchFailed as failure:
        run.log.line(f"the switch failed and was undone, full training goes on: {failure}")
        run.log.event("switch_failed", state.num_updates, epoch, reason=str(failure))
        state.failed_switches.append(str(failure))
        return False
    run.switch_report, run.monitor = report, None
    run.phases[Phase.FULL] = full_phase
    state.phase = Phase.ADAPTER
    state.switch_update, state.switch_epoch = state.num_updates, epoch
    for line in switch_lines(report, run.verdict, state.num_updates, epoch):
        run.log.line(line)
    metrics = switch_metrics(report, run.verdict)
    run.log.event("switch", state.num_updates, epoch, **metrics)
    rows = [[name, rank, report.captured_energy[name]] for name, rank in report.ranks.items()]
    run.log.table("switch/ranks", ["target", "rank", "captured_energy"], rows)
    return True


def evaluate_epoch(run: Run) -> None:
    """Validation metrics after an epoch: an 'eval' event and a line."""
    state = run.state
    with run.stopwatch.paused():
        metrics = run.evaluate(run.data.val)
        speed = run.stopwatch.summary(run.batch_size, len(run.data.train))
        state.best_top1 = max(state.best_top1, metrics["top1"])
        run.last_eval = metrics
        run.log.event(
            "eval",
            state.num_updates,
            float(state.epoch),
            **{f"val/{name}": value for name, value in metrics.items()},
            **{
                "train/images_per_second": speed["images_per_second"],
                "train/epoch_seconds": speed["epoch_seconds"],
                "memory/peak_bytes": speed["peak_memory_bytes"],
                "monitor/time_share": run.stopwatch.monitor_share,
                "params/trainable": count_parameters(run.model, trainable=True),
                "train/phase": state.phase,
            },
        )
    run.log.line(eval_line(state.epoch, state.phase, metrics))


def release_memory(device: torch.device) -> None:
    """Return what the full phase held: optimizer state, gradients, replaced weights."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _folder_of(name: str) -> Path:
    beside = Path(__file__).resolve().parent
    return next(p for p in (beside / name, beside.parent / name) if p.is_dir())


OmegaConf.register_new_resolver("switchlora_root", lambda: str(_folder_of("experiments").parent))


@hydra.main(version_base="1.3", config_path=str(_folder_of("conf")), config_name="config")
def _hydra_main(config: DictConfig) -> float:
    hydra_config = HydraConfig.get()
    try:
        summary = train(config, Path(hydra_config.runtime.output_dir))
    except USER_ERRORS as error:
        if hydra_config.mode is RunMode.MULTIRUN or SHOW_TRACEBACK in os.environ:
            raise
        sys.exit(f"switchlora: {one_line(error)}")
    return summary["val"]["top1"]


def main() -> None:
    """``switchlora`` on the command line: one clear line for a user's mistake, exit status 1.

    With SWITCHLORA_TRACEBACK=1 in the environment the whole traceback is shown.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of printing them
    try:
        _hydra_main()
    except USER_ERRORS as error:
        if SHOW_TRACEBACK in os.environ:
            raise
        sys.exit(f"switchlora: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("switchlora: interrupted; everything computed so far is kept")


def one_line(error: BaseException) -> str:
    """The message that matters of an error and its causes, on one line."""
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, USER_ERRORS):
        return one_line(error.__cause__)
    message = str(error)
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.parent_node is not None:
        message += f"; {near(str(cause.key), map(str, cause.parent_node))}"
    return " ".join(message.split("Config search path")[0].split())


if __name__ == "__main__":
    main()
