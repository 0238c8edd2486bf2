"""One run, in the order of its events: train, measure, switch, evaluate, save."""

from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from switchlora.adapters import count_parameters
from switchlora.config import as_plain
from switchlora.errors import Interrupted, SwitchFailed, TrainingStopped
from switchlora.learner import StepOutcome
from switchlora.process import Interruption, distributed, one_line, say
from switchlora.run import (
    Phase,
    Run,
    agree_on_settings,
    consider_switch,
    count_compiled,
    end_joint_phase,
    end_window,
    eval_line,
    faults_explained,
    finish,
    guide,
    how_to_go_on,
    leave_if_asked,
    look_after,
    prepare,
    record_memory,
    save,
    save_or_leave,
    status_at_end,
    tell_compiler_fault,
    tell_refactoring,
    tell_skipped,
    wait_until_saved,
    with_choices,
)
from switchlora.storage import FolderLock, finished_summary, unused_removed
from switchlora.sweep import JOB_PATIENCE, is_job


def train(config: DictConfig, folder: Path | str) -> dict:
    """Run the experiment of ``config`` in ``folder`` and return its summary.

    With ``resume=auto`` an interrupted run goes on from its last checkpoint. A finished run is
    then not run again: its summary is read from the folder.
    """
    folder = Path(folder)
    with unused_removed(folder):
        return train_in(folder, config)


def train_in(folder: Path, config: DictConfig) -> dict:
    """Do what ``train`` does, and leave the folder as it is at an error."""
    distributed.join()
    config = with_choices(config)
    settings = as_plain(config)
    agree_on_settings(settings)
    folder = distributed.from_primary(lambda: folder)
    interruption = Interruption()
    try:
        with FolderLock(folder, patience=JOB_PATIENCE if is_job() else 0), interruption:
            summary = finished_summary(config.resume, folder, settings)
            if summary is not None:
                if distributed.is_primary():
                    say(f"{folder} holds a finished run; nothing to do")
                return summary
            return train_and_finish(prepare(config, folder, interruption))
    except Interrupted:
        interruption.hand_over()
        raise


def train_and_finish(run: Run) -> dict:
    """Train all epochs, write everything that a run leaves behind, and return its summary.

    The results are also written when training stops with an error. There is one exception: with
    several processes, an error other than TrainingStopped writes nothing. SwitchFailed, after all
    that, when a switch was due and none could be made.
    """
    with run.log:
        try:
            with faults_explained(run):
                fit(run)
                summary = finish(run, status_at_end(run.state))
        except Exception as error:
            if isinstance(error, TrainingStopped) or distributed.world_size() == 1:
                with suppress(Exception):  # the first error is the one to tell
                    finish(run, f"stopped: {one_line(error)}")
            raise
        finally:
            with suppress(OSError):  # it was told already, or an earlier error is
                run.writer.wait()
            if run.trunk is not None:
                run.trunk.release()
        if summary["status"] != "finished":
            raise SwitchFailed(
                f"{summary['status']}; the run trained in full to its end, everything is in "
                f"{run.log.folder}"
            )
        return summary


def fit(run: Run) -> None:
    """Train and evaluate epoch by epoch until the run is over.

    Switches happen inside ``train_epoch``. After each evaluation the guard checks the losses
    (``look_after``) and a checkpoint is saved.
    """
    if run.starts_elsewhere:
        run.control.watch_as_configured()
        save(run)
    if run.state.undecided:
        consider_switch(run)
    while not run.over:
        train_epoch(run)
        evaluate_epoch(run)
        look_after(run)
        save(run)
        leave_if_asked(run)
    wait_until_saved(run)


def train_epoch(run: Run) -> None:
    """Train the rest of the current epoch.

    At the end of a window of updates the criterion is asked, so this function may switch.
    """
    state = run.state
    if state.num_updates >= run.last_update:
        return
    run.data.set_epoch(state.epoch, start=state.position)
    run.stopwatch.resume()
    try:
        make_updates(run)
    except Exception:
        with suppress(Exception):  # the first error is the one to tell
            settle(run)
        raise


def make_updates(run: Run) -> None:
    """Make the updates of the batches that are left of the epoch, and act between them."""
    state = run.state
    for inputs, labels in run.data.train:
        if run.data.mixup is not None:
            inputs, labels = run.data.mixup(inputs, labels)
        guide(run)
        launch(run, inputs, labels)
        state.position += 1
        if not may_settle_late(run):
            settle(run)
        if state.num_updates >= run.last_update or state.position >= len(run.data.train):
            break
        save_or_leave(run, settle)


def launch(run: Run, inputs: Tensor, labels: Tensor) -> None:
    """Make an update, whose outcome ``settle`` reads.

    Where the device decides on its own, the outcome of the update before is read only here, when
    the device has the gradients of this one to compute: so it never waits for the host.
    """
    state, loss_fn = run.state, run.data.loss
    if run.learner.decides_on_device:
        run.learner.backward(inputs, labels, loss_fn, state.num_updates)
        settle(run)
        run.pending = run.learner.step(state.num_updates)
    else:
        step = run.learner.update(inputs, labels, loss_fn, state.num_updates)
        run.pending = lambda: step
    if run.ema is not None:
        run.ema.look(run.model)


def may_settle_late(run: Run) -> bool:
    """Return whether nothing hangs on the outcome of the update that was just launched.

    At the end of a window, of an epoch and of a run something does, and where a checkpoint is due.
    """
    state, coming = run.state, run.state.num_updates + 1
    return (
        run.learner.decides_on_device
        and run.ledger.recorded
        and state.joint_until is None
        and coming < run.last_update
        and state.position < len(run.data.train)
        and not run.monitor.due(coming)
        and not run.saves.due(coming)
    )


def settle(run: Run) -> None:
    """Act on the outcome of the last update, if that has not been done.

    An applied one may end a window, and so lead to a switch.
    """
    if run.pending is None:
        return
    step, run.pending = run.pending(), None
    if not step.applied:
        step_skipped(run, step)
        return
    step_done(run, step)
    if run.control.joint_phase_over:
        end_joint_phase(run)
    if run.monitor.due(run.state.num_updates):
        end_window(run)  # measures, asks the criterion, and may switch


def step_done(run: Run, step: StepOutcome) -> None:
    """Count an optimizer step that was applied, log it and pass it to the monitor.

    The first step after a change of the trained tensors also records memory and FLOPs.
    """
    state = run.state
    run.stopwatch.lap()
    state.num_updates += 1
    state.skipped_in_a_row = 0
    average_weights(run)
    tell_refactoring(run)
    tell_compiler_fault(run)
    log_step(run, step)
    if not run.ledger.recorded:
        count_compiled(run)
        record_memory(run)
        run.ledger.flops[state.phase] = run.sum_flops()
        run.ledger.recorded = True
    run.count_flops()
    run.monitor.observe(step.loss, run.learner.decay(step.lr))


def average_weights(run: Run) -> None:
    """Move the weight average, if there is one.

    Updates that it leaves out are counted. The first is told at once, all of them at the end.
    """
    lost = None if run.ema is None else run.ema.update(run.model)
    if lost is None:
        return
    run.ledger.skipped_averages += 1
    if run.ledger.skipped_averages == 1:
        where = f"update {run.state.num_updates}"
        run.log.line(f"the weight average (EMA) leaves out {where}: {lost} is not finite")


def step_skipped(run: Run, step: StepOutcome) -> None:
    """Count and log a step that was not applied.

    Raise TrainingStopped after more than ``max_skipped`` such steps in a row. An fp16 overflow
    does not count towards that limit.
    """
    state = run.state
    run.ledger.skipped_updates += 1
    if not step.overflow:
        state.skipped_in_a_row += 1
    why = "fp16 overflow, the loss scale was lowered: " if step.overflow else ""
    run.log.line(
        f"skipped an update after {state.num_updates}: {why}"
        f"loss {step.loss:g}, gradient norm {step.grad_norm:g}"
    )
    if state.skipped_in_a_row > run.config["max_skipped"]:
        raise TrainingStopped(
            f"loss or gradient was not finite in {state.skipped_in_a_row} updates in a row after "
            f"update {state.num_updates}; lower the learning rate (full.optimizer.lr, "
            f"{step.lr:.2g} here) or check the data; {how_to_go_on(run)}"
        )


def log_step(run: Run, step: StepOutcome) -> None:
    """Move the progress bar and write a 'train' event every ``log.every`` updates."""
    num_updates = run.state.num_updates
    run.log.progress(num_updates, phase=run.state.phase, loss=f"{step.loss:.3f}")
    if num_updates % run.config["log"]["every"] == 0 or num_updates == 1:
        metrics = {
            "train/loss": step.loss,
            "train/lr": step.lr,
            "train/grad_norm": step.grad_norm,
            "train/phase": run.state.phase,
            "train/adapter_phase": int(run.state.phase is not Phase.FULL),
        }
        run.log.event("train", num_updates, run.epoch, **metrics)


def evaluate_epoch(run: Run) -> None:
    """Evaluate on the validation split, end the epoch, and log the metrics."""
    guide(run)
    with run.stopwatch.paused():
        metrics = run.evaluate(run.data.val)
        run.control.note_loss("val", metrics["loss"])
        finish_epoch(run, metrics)
        log_evaluation(run, metrics)
    run.log.line(eval_line(run.state.epoch, run.state.phase, metrics))
    tell_skipped(run)


def finish_epoch(run: Run, metrics: dict[str, float]) -> None:
    """Store the metrics and the best top1 so far, and advance to the next epoch."""
    state = run.state
    if metrics["top1"] > state.best_top1:
        state.best_top1, state.best_update = metrics["top1"], state.num_updates
    run.ledger.note_eval(metrics, state.num_updates, kept=run.policy.keeps_residual)
    state.epoch, state.position = state.epoch + 1, 0


def log_evaluation(run: Run, metrics: dict[str, float]) -> None:
    """Write an 'eval' event with the metrics and the speed and memory of the phase so far."""
    speed = run.stopwatch.summary(run.batch_size, len(run.data.train))
    run.log.event(
        "eval",
        run.state.num_updates,
        run.epoch,
        **{f"val/{name}": value for name, value in metrics.items()},
        **{
            "train/images_per_second": speed["images_per_second"],
            "train/epoch_seconds": speed["epoch_seconds"],
            "memory/peak_bytes": speed["peak_memory_bytes"],
            "monitor/time_share": run.stopwatch.monitor_share,
            "params/trainable": count_parameters(run.model, trainable=True),
            "train/phase": run.state.phase,
        },
    )
