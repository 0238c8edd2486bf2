"""The entry point: ``switchlora key=value ...`` makes one run, in the order told here."""

from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig

from switchlora.adapters import count_parameters
from switchlora.config import as_plain
from switchlora.errors import Interrupted, TrainingStopped
from switchlora.learner import Update
from switchlora.process import Interruption, distributed, one_line
from switchlora.run import (
    Phase,
    Run,
    after_update,
    consider_switch,
    eval_line,
    faults_explained,
    finish,
    guide,
    how_to_go_on,
    leave_if_asked,
    look_after,
    note_loss,
    prepare,
    record_memory,
    save,
    save_or_leave,
    watch_as_configured,
)
from switchlora.storage import FolderLock, finished_summary
from switchlora.sweep import JOB_PATIENCE, is_job


def train(config: DictConfig, folder: Path) -> dict:
    """Run the experiment of ``config`` in ``folder``, from the start or on; return its summary."""
    distributed.join()
    folder = distributed.from_primary(lambda: folder)
    interruption = Interruption()
    try:
        with FolderLock(folder, patience=JOB_PATIENCE if is_job() else 0), interruption:
            summary = finished_summary(config.resume, folder, as_plain(config))
            if summary is not None:
                if distributed.is_primary():
                    print(f"{folder} holds a finished run; nothing to do")
                return summary
            return train_and_finish(prepare(config, folder, interruption))
    except Interrupted:
        interruption.hand_over()
        raise


def train_and_finish(run: Run) -> dict:
    """All epochs, then everything that a run leaves behind; that also when training must stop."""
    with run.log:
        try:
            with faults_explained(run):
                fit(run)
                return finish(run, "finished")
        except Exception as error:
            if isinstance(error, TrainingStopped) or distributed.world_size() == 1:
                with suppress(Exception):  # the first error is the one to tell
                    finish(run, f"stopped: {one_line(error)}")
            raise
        finally:
            if run.trunk is not None:
                run.trunk.release()


def fit(run: Run) -> None:
    """All epochs, with the switch wherever the criterion fires, and what follows from it."""
    if run.starts_elsewhere:
        watch_as_configured(run)
        save(run)
    if run.state.undecided:
        consider_switch(run)
    while not run.over:
        train_epoch(run)
        evaluate_epoch(run)
        look_after(run)
        save(run)
        leave_if_asked(run)


def train_epoch(run: Run) -> None:
    """The rest of a pass over the training split; measures, and perhaps switches, on the way."""
    state = run.state
    run.data.set_epoch(state.epoch, start=state.position)
    run.stopwatch.resume()
    if state.num_updates >= run.last_update:
        return
    for images, targets in run.data.train:
        if run.data.mixup is not None:
            images, targets = run.data.mixup(images, targets)
        guide(run)
        update = run.learner.update(images, targets, run.data.loss, state.num_updates)
        state.position += 1
        if keep(run, update):
            count_update(run, update)
        if state.num_updates >= run.last_update or state.position >= len(run.data.train):
            break
        save_or_leave(run)


def count_update(run: Run, update: Update) -> None:
    """One more update is made: record it, and measure when a window is complete."""
    run.stopwatch.lap()
    run.state.num_updates += 1
    record_update(run, update)
    if not run.state.recorded:
        record_memory(run)
        run.state.flops[run.state.phase] = run.flops_per_update
        run.state.recorded = True
    run.count_flops()
    run.monitor.observe(update.loss, run.learner.decay(update.lr))
    after_update(run)


def keep(run: Run, update: Update) -> bool:
    """Whether the update was applied; TrainingStopped after too many in a row that were not."""
    state = run.state
    if update.applied:
        state.skipped_in_a_row = 0
        return True
    state.skipped_updates += 1
    state.skipped_in_a_row += not update.overflow
    why = "fp16 overflow, the loss scale was lowered: " if update.overflow else ""
    run.log.line(
        f"skipped an update after {state.num_updates}: {why}"
        f"loss {update.loss:g}, gradient norm {update.grad_norm:g}"
    )
    if state.skipped_in_a_row > run.config["max_skipped"]:
        raise TrainingStopped(
            f"loss or gradient was not finite in {state.skipped_in_a_row} updates in a row after "
            f"update {state.num_updates}; lower the learning rate (full.optimizer.lr, "
            f"{update.lr:.2g} here) or check the data; {how_to_go_on(run)}"
        )
    return False


def record_update(run: Run, update: Update) -> None:
    """EMA, progress bar, and every ``log.every`` updates a 'train' event."""
    if run.ema is not None:
        run.ema.update(run.model)
    num_updates = run.state.num_updates
    run.log.progress(num_updates, phase=run.state.phase, loss=f"{update.loss:.3f}")
    if num_updates % run.config["log"]["every"] == 0 or num_updates == 1:
        metrics = {
            "train/loss": update.loss,
            "train/lr": update.lr,
            "train/grad_norm": update.grad_norm,
            "train/phase": run.state.phase,
            "train/adapter_phase": int(run.state.phase is not Phase.FULL),
        }
        run.log.event("train", num_updates, run.epoch, **metrics)


def evaluate_epoch(run: Run) -> None:
    """Validation metrics after an epoch, which is then done: an 'eval' event and a line."""
    state = run.state
    guide(run)
    with run.stopwatch.paused():
        metrics = run.evaluate(run.data.val)
        note_loss(run, "val", metrics["loss"])
        speed = run.stopwatch.summary(run.batch_size, len(run.data.train))
        if metrics["top1"] > state.best_top1:
            state.best_top1, state.best_update = metrics["top1"], state.num_updates
        state.last_eval = metrics
        state.epoch, state.position = state.epoch + 1, 0
        run.log.event(
            "eval",
            state.num_updates,
            run.epoch,
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
