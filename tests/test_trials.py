"""What users' inputs did to the product in November 2026: the tests that hold each row.

Rows are those of the list of trials. The runs at the end are rows that a whole run alone shows.
"""

import ast
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from conf_yamls import composed
from conftest import acting
from runs import DIGITS, assert_same_run
from starts import PATIENCE, Started, program, through_joblib
from switchlora.data import image_folder
from switchlora.data.loaders import split as split_rows
from switchlora.storage import find_all, read
from switchlora.train import train
from test_images import cut, folders, noise

HERE = Path(__file__).parent
RESULTS = {
    "1.1 a typo in a group that may be empty": (
        "cli: a_typo_in_a_group_that_may_be_empty_is_refused",
        "command_line: what_is_typed_by_mistake_gets_the_line_that_helps",
    ),
    "1.2 a key that nobody reads": (
        "command_line: what_is_typed_by_mistake_gets_the_line_that_helps",
        "command_line: an_unknown_key_of_a_yaml_of_ones_own_is_told",
    ),
    "1.3 models that read weights past the adapter": (
        "families: a_family_switches_and_its_exports_compute_the_same",
        "families: what_timm_reads_directly_is_merged_for_peft_and_it_is_said",
    ),
    "1.4 torch's fast path": (
        "surgery: in_evaluation_adapters_count_where_torch_has_a_fast_path",
        "surgery: an_adapter_that_does_not_stand_for_its_weight_is_refused",
    ),
    "1.5 a group written as a value; a switch that is given up": (
        "command_line: what_is_typed_by_mistake_gets_the_line_that_helps",
        "train: a_failed_switch_leaves_the_run_in_the_full_phase_and_says_so",
    ),
    "1.6 W&B's environment": (
        "wandb_log: the_mode_is_the_environments_unless_the_config_says_otherwise",
        "wandb_log: an_option_of_the_environment_is_left_to_wandb",
        "wandb_log: a_run_has_a_telling_name",
    ),
    "1.7 splits with other classes": (
        "images: the_classes_of_test_are_those_of_train_by_name",
        "images: a_class_that_training_lacks_is_refused_by_its_name",
    ),
    "1.8 hidden folders": ("images: hidden_folders_and_files_are_no_classes_and_no_images",),
    "1.9 16 bits": (
        "images: every_mode_and_depth_in_a_folder_is_as_bright_as_it_was_saved",
        "images: a_data_set_of_ones_own_is_read_in_the_same_way",
        "images: a_tiff_of_12_bits_or_with_white_as_zero_is_not_taken_for_one_of_16",
    ),
    "1.10 a frozen stem with batch norms": (
        "surgery: norms_that_are_frozen_keep_their_running_statistics",
        "trials: a_frozen_stem_keeps_its_running_statistics_to_the_end_of_the_run",
    ),
    "1.11 settings and the length of the run": (
        "schema: settings_are_compared_with_the_length_of_the_run",
        "command_line: what_is_typed_by_mistake_gets_the_line_that_helps",
    ),
    "1.12 linears that the targets leave out": (
        "surgery: the_coverage_names_the_largest_linears_that_are_left_out",
        "surgery: defaults_find_targets_that_other_transformers_call",
        "families: another_family_builds_and_its_targets_are_found_or_its_linears_are_told",
    ),
    "1.13 two sets of weights in a file": (
        "models: weights_are_found_in_what_they_are_wrapped_in_and_it_is_said",
    ),
}
DATA = {
    "3.1 the shipped augmentation": (
        "images: every_augmentation_is_drawn_without_an_error",
        "images: zero_bits_leave_black",
    ),
    "3.2 a damaged image in a worker": (
        "images: what_a_worker_could_not_read_is_told_in_one_line",
        "loader: a_program_that_ends_in_the_middle_of_a_pass_does_not_wait_for_its_workers",
    ),
    "3.3 damaged images": (
        "images: a_damaged_image_is_named_with_its_split_and_the_way_to_go_on",
        "images: what_is_no_image_is_told_from_its_header_before_training",
        "images: unreadable_images_are_skipped_named_and_counted",
        "images: an_image_that_is_skipped_counts_in_no_metric",
        "trials: a_run_that_skips_an_image_and_is_killed_ends_as_one_that_was_left_alone",
    ),
    "3.4 a late image of another mode": (
        "images: a_late_image_of_another_mode_is_converted",
        "images: late_colour_in_grey_data_is_refused_by_name",
    ),
    "3.5 labels out of range": (
        "images: a_label_that_is_no_class_is_told_before_a_device_sees_it",
        "images: a_model_with_too_few_logits_is_told_before_training",
    ),
    "3.6 files of weights": (
        "models: what_is_the_matter_with_a_file_of_weights_is_said_in_one_line",
        "models: weights_are_found_in_what_they_are_wrapped_in_and_it_is_said",
        "models: the_content_says_what_a_file_is_and_not_its_name",
        "fuzz: weights_of_any_bytes_are_loaded_or_told_in_one_line",
        "fuzz: weights_of_any_content_are_loaded_or_told_in_one_line",
    ),
    "3.7 nobody listens": (
        "talking: no_failing_stream_reaches_the_run",
        "talking: a_run_that_nobody_hears_ends_as_any_other",
    ),
    "3.8 a folder that cannot be printed": (
        "talking: a_folder_that_the_terminal_cannot_print_ends_no_run",
    ),
    "3.9 output into a file": ("progress: a_file_gets_a_line_every_half_minute_and_no_bar",),
    "3.10 W&B without a login": (
        "wandb_log: online_without_a_login_is_one_line_and_an_offline_run",
    ),
}
FAULTS = {
    "6.1 what a file names": ("attacks: what_a_file_names_is_not_run",),
    "6.2 pickles": (
        "models: no_code_in_a_file_of_weights_runs",
        "attacks: the_metadata_of_a_sharded_checkpoint_runs_nothing",
    ),
    "6.3 ranks that differ": (
        "distributed: ranks_with_other_settings_end_with_one_line_before_anything_is_written",
        "distributed: a_weight_that_changes_on_one_rank_ends_the_run_at_the_end_of_the_epoch",
        "distributed: ranks_that_disagree_inside_a_switch_end_the_run_and_train_no_further",
    ),
    "6.4 ranks with other data": (
        "distributed: ranks_agree_on_every_setting_but_those_of_a_machine",
    ),
    "6.5 empty mappings": ("schema: an_empty_mapping_is_not_what_is_missing",),
    "6.6 data that change": (
        "images: changed_images_have_another_digest_and_moved_ones_the_same",
        "text: a_text_that_has_changed_is_noticed_by_a_resume",
    ),
    "6.7 checksums of other files": (
        "resume: a_damaged_checkpoint_is_named_and_the_one_before_it_is_used",
    ),
    "6.8 a checkpoint with wrong content": (
        "resume: a_damaged_checkpoint_is_named_and_the_one_before_it_is_used",
        "fuzz: a_run_goes_on_from_any_content_of_its_checkpoint_or_from_the_one_before",
        "fuzz: a_checkpoint_of_any_bytes_is_told_in_one_line",
    ),
    "6.9 a trunk's damaged log": (
        "trunk: a_run_leaves_a_trunk_whose_log_is_damaged_and_goes_on_alone",
        "trunk: a_run_that_extends_a_trunk_leaves_it_when_its_log_gets_damaged",
    ),
    "6.10 a sweep without its parent": (
        "talking: a_launchers_process_ends_with_the_process_of_the_multirun",
        "trials: jobs_at_the_same_time_whose_parent_is_killed_save_and_stop_and_say_so_in_files",
    ),
    "6.11 no locks": ("attacks: a_file_system_without_locks_is_told_and_the_run_goes_on",),
    "6.12 SIGHUP": (
        "talking: a_signal_that_would_kill_is_noted",
        "talking: a_run_that_nobody_hears_ends_as_any_other",
    ),
    "6.13 losses of zero": (
        "criteria: losses_and_norms_of_zero_end_in_a_verdict",
        "criteria: weights_and_losses_of_zero_give_no_nan",
    ),
    "6.14 not finite": (
        "criteria: no_criterion_fires_on_what_is_not_finite",
        "criteria: no_policy_switches_on_a_measurement_that_is_not_finite",
    ),
    "6.15 stable ranks": ("spectral: the_spectral_norm_is_right_at_any_shape",),
    "6.16 averages and decompositions": (
        "switch: an_average_stays_as_it_is_where_a_weight_is_not_finite_and_names_it",
        "monitor: a_decomposition_that_fails_gives_no_number_and_no_end",
    ),
    "6.17 ranges": (
        "command_line: what_is_typed_by_mistake_gets_the_line_that_helps",
        "fuzz: any_value_at_any_place_is_built_or_gets_one_line",
        "fuzz: a_run_of_any_configuration_is_prepared_or_gets_one_line",
    ),
    "6.18 damaged records": (
        "records: a_damaged_file_is_named_with_what_is_wrong_and_the_other_runs_can_stay",
        "fuzz: records_of_any_bytes_give_a_run_or_one_line",
        "fuzz: records_of_any_content_give_a_run_or_one_line",
    ),
    "6.19 links": ("attacks: links_are_not_followed",),
    "6.20 logs, clocks, labels, secrets": (
        "fuzz: a_log_of_any_bytes_is_mended_at_the_same_length",
        "sweep: a_note_that_cannot_be_read_counts_as_an_interruption",
        "attacks: a_label_splits_no_row_and_is_no_formula",
        "attacks: a_value_from_the_environment_is_told",
    ),
}
TYPED = {
    "2.1 a group without plus": (
        "cli: a_system_or_an_experiment_needs_no_plus",
        "command_line: what_is_right_gets_none",
    ),
    **dict.fromkeys(
        (
            *("2.2 switch.guard=full", "2.3 switch.rank=8", "2.4 switch/rank=8", "2.6 lr=1e-3"),
            *("2.7 epoch=3", "2.8 lr=-1", "2.11 log.wandb=false", "2.20 --epochs 3"),
        ),
        ("command_line: what_is_typed_by_mistake_gets_the_line_that_helps",),
    ),
    "2.5 adapter.optimizer.lr": (
        "command_line: what_is_right_gets_none",
        "conf: each_key_of_the_adapters_optimizer_and_schedule_is_set_by_itself_or_follows",
    ),
    "2.9 full.compile": (
        "conf: the_model_is_compiled_when_the_recipe_says_so",
        "cli: hydras_error_on_a_value_that_it_cannot_read_says_to_quote",
    ),
    "2.10 quotes for a shell": ("command_line: every_example_can_be_pasted_into_any_shell",),
    "2.12 data.root=/nonexistent": (
        "data: a_download_is_told_before_it_begins_and_what_is_there_is_read_without_a_word",
        "data: a_root_that_cannot_be_made_is_told",
        "data: folders_without_images_are_refused_with_what_they_must_hold",
    ),
    "2.13 no network": ("data: without_a_network_it_is_told_which_file_to_put_where",),
    "2.14 data or a model without a value": (
        "data: folders_without_images_are_refused_with_what_they_must_hold",
        "command_line: what_is_typed_by_mistake_gets_the_line_that_helps",
        "cli: a_key_without_a_value_is_told_with_what_to_give",
    ),
    "2.15 models without img_size or without linears": (
        "models: a_family_builds_whether_or_not_it_takes_the_size_of_the_images",
        "surgery: a_model_without_linears_is_said_to_have_none",
    ),
    "2.16 xcit": ("models: a_family_builds_whether_or_not_it_takes_the_size_of_the_images",),
    "2.17 targets": ("surgery: a_pattern_that_matches_nothing_is_told_which_linears_there_are",),
    "2.18 digits for two epochs": ("train: the_default_window_shrinks_to_a_run_that_is_shorter",),
    "2.19 a launcher that is not installed": (
        "cli: a_plugin_that_is_not_installed_is_named_by_its_package",
    ),
    "2.21 keys in messages": ("schema: every_key_that_a_message_names_can_be_pasted",),
    "2.22 a folder with '=' in its name": (
        "command_line: the_command_that_goes_on_can_be_pasted_whatever_the_folders_name",
    ),
    "2.23 help, version, Tab, folders": (
        "cli: help_begins_with_what_the_program_does_and_names_groups_and_choices",
        "cli: the_version_is_that_of_the_program",
        "cli: tab_completes_groups_choices_and_keys",
        "command_line: a_mistake_leaves_no_run_folder",
    ),
}
OUTSIDE = {
    "4.1 what a wheel has": (
        "wheel: a_wheel_knows_its_commit_and_its_readme_stands_alone",
        "wheel: a_sweep_and_every_command_on_it_work_from_a_wheel_in_another_folder",
    ),
    "4.2 modes of files": ("attacks: written_files_follow_the_umask",),
    "4.3 eval": (
        "hub: eval_gives_what_the_run_recorded_whatever_form_the_model_has",
        "hub: a_file_that_is_not_right_is_one_line_and_runs_nothing",
        "hub: a_wrong_word_is_one_line",
    ),
    "4.4 a layout of the hub": (
        "hub: timm_loads_the_folder_with_the_logits_and_the_images_of_the_run",
        "hub: the_card_is_a_valid_one_and_tells_what_the_run_recorded",
        "hub: peft_loads_the_adapter_that_names_its_base",
    ),
    "4.5 TensorBoard and MLflow": (
        "sinks: tensorboard_has_each_number_once_also_after_a_kill",
        "sinks: mlflow_has_each_number_once_also_after_a_kill",
        "sinks: a_sink_that_fails_is_told_once_and_left",
    ),
    "4.6 torch.func": ("layers: function_transforms_see_the_plain_form",),
    "4.7 settings that are checked": ("schema: every_choice_of_every_group_is_right",),
}
PICTURES = {
    "5.1 without the switch": (
        "pictures: full_training_of_the_same_setting_and_seed_is_drawn_beside_a_run",
        "pictures: a_run_alone_shows_smoothed_loss_and_the_accuracies_that_matter",
    ),
    "5.2 the rule": (
        "pictures: update_norms_are_drawn_over_their_own_peak_with_the_rules_line_and_crossings",
    ),
    "5.3 the common full phase": (
        "pictures: the_common_full_phase_is_drawn_once_and_grey",
        "pictures: the_difference_to_full_training_is_in_points_and_fills_its_axis",
    ),
    "5.4 a fraction of 0": ("pictures: what_cannot_switch_is_called_full_training_everywhere",),
    "5.5 the page": (
        "pictures: the_page_begins_with_a_sentence_and_four_tiles_and_folds_the_rest",
        "pictures: notes_that_differ_in_numbers_alone_are_a_column",
    ),
    "5.6 the Pareto picture": (
        "pictures: each_row_is_named_at_its_point_and_coloured_by_its_kind",
        "pictures: shortened_full_training_is_a_line_and_dominated_points_are_open",
    ),
    "5.7 scaling, maps, formats, dark mode, names": (
        "pictures: scaling_shows_intervals_as_bands_and_many_tick_labels",
        "pictures: each_row_of_the_map_is_over_its_own_largest",
        "pictures: every_picture_can_be_png_pdf_and_svg_with_the_same_bytes_again",
        "pictures: lines_on_the_page_have_contrast_in_both_modes",
        "pictures: runs_are_named_by_setting_and_seed",
    ),
    "5.8 rows of zeros": ("pictures: parts_that_hold_nothing_have_no_row_in_the_memory_table",),
}
ROWS = RESULTS | TYPED | DATA | OUTSIDE | PICTURES | FAULTS


def defined(name):
    """The test functions of ``test_<name>.py``, without importing it."""
    tree = ast.parse((HERE / f"test_{name}.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_a_test(row):
    assert ROWS[row]
    for test in ROWS[row]:
        file, _, name = test.partition(": ")
        assert f"test_{name}" in defined(file), test


@pytest.mark.parametrize(
    "rows, number, count",
    [(RESULTS, 1, 13), (DATA, 3, 10), (OUTSIDE, 4, 7), (PICTURES, 5, 8), (FAULTS, 6, 20)],
)
def test_no_row_is_left_out(rows, number, count):
    assert [row.split()[0] for row in rows] == [f"{number}.{n}" for n in range(1, count + 1)]


# Rows that a whole run alone shows


HYBRID = (
    *("data=fake", "data.image_size=32", "data.num_classes=3", "data.batch_size=8"),
    *("model=timm", "model.name=tiny_vit_5m_224", "+model.depths=[1,1,1]"),
    *("+model.embed_dims=[16,32,48]", "+model.num_heads=[1,1,1]", "+model.window_sizes=[4,4,2]"),
    *("epochs=4", "monitor.window=3", "switch/criterion=at_epoch", "switch.criterion.epoch=1"),
    *("switch/rank=fixed", "switch.rank.rank=2", "switch.freeze=[patch_embed]", "log=quiet"),
    *("log.figures=false", "full.scheduler.warmup_t=2", "checkpoint.keep=9"),
)


def test_a_frozen_stem_keeps_its_running_statistics_to_the_end_of_the_run(tmp_path):
    summary = train(composed(*HYBRID), tmp_path)
    switched = summary["switch"]["num_updates"]
    assert switched and summary["num_updates"] > switched
    states = {path.name: read(path)["weights"] for path in find_all(tmp_path)}
    before, after = states[f"update-{switched:08d}"], states[f"update-{switched:08d}.1"]
    end = states[f"update-{summary['num_updates']:08d}"]
    stem = [name for name in end if name.startswith("patch_embed") and "running" in name]
    assert stem and all(torch.equal(before[name], end[name]) for name in stem)
    assert all(torch.equal(after[name], end[name]) for name in after if "patch_embed" in name)
    assert not all(torch.equal(after[name], end[name]) for name in end)


def words_of_a_run(root, folder, *more):
    return (
        *("data=imagefolder", f"data.root={root}", "data.num_classes=3", "data.image_size=32"),
        *("data.batch_size=4", "model=vit_tiny_patch16_224", "+model.depth=1"),
        *("+model.embed_dim=32", "+model.num_heads=2", "switch/criterion=never", "epochs=1"),
        *("monitor.window=1", "log=quiet", "log.figures=false", "system.threads=1"),
        *("data.skip_unreadable=true", "checkpoint.every_updates=1", *more),
        f"hydra.run.dir={folder}",
    )


def killed_at(update, *words):
    """The program, which is killed in the middle of an update."""
    patch = pytest.MonkeyPatch()
    acting(patch)(update, lambda images: os.kill(os.getpid(), signal.SIGKILL))
    program(*words)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_skips_an_image_and_is_killed_ends_as_one_that_was_left_alone(
    workers, tmp_path
):
    """The image is met before the kill alone: what is known of it comes from the checkpoint."""
    root = folders(tmp_path / "set", (12, 2), noise)
    data = image_folder(str(root), "train").samples
    trained = split_rows(len(data), 0.1, None)[0]
    broken = Path(data[int(trained[-1])][0])
    cut(broken)
    words = words_of_a_run(root, tmp_path / "left", f"system.workers={workers}")
    with Started(tmp_path / "said", program, *words) as started:
        done = started.finish()
    assert done.returncode == 0, done.stderr
    words = (*words[:-1], f"hydra.run.dir={tmp_path / 'killed'}", "resume=auto")
    with Started(tmp_path / "killed.said", killed_at, 8, *words) as started:
        assert started.finish().returncode == -signal.SIGKILL
    saved = read(find_all(tmp_path / "killed")[0])
    assert saved["train"]["num_updates"] == 7 and saved["skipped"]
    with Started(tmp_path / "again.said", program, *words) as started:
        again = started.finish()
    assert again.returncode == 0, again.stderr
    assert f"skipped, since it cannot be read: train image {broken}" in done.stdout
    assert "1 image(s) could not be read and were skipped" in again.stdout
    summary = json.loads((tmp_path / "killed" / "summary.json").read_text())
    assert summary["skipped_images"] == [f"train image {broken}"]
    assert_same_run(tmp_path / "left", tmp_path / "killed")


def members(session):
    """The processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it ended just now
        if int(number) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it needs Linux's /proc")
def test_jobs_at_the_same_time_whose_parent_is_killed_save_and_stop_and_say_so_in_files(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="it is not installed")
    words = (*DIGITS, "switch/criterion=never", "epochs=100000", "log.every=1", "system.threads=1")
    words += ("+launch=joblib", "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    with Started(tmp_path / "said", through_joblib, "-m", *words) as parent:
        while sum(1 for path in tmp_path.glob("*/metrics.jsonl") if path.stat().st_size) < 2:
            assert parent.running, parent.said()
            time.sleep(0.05)
        os.kill(parent.process.pid, signal.SIGKILL)
        end = time.monotonic() + PATIENCE
        while members(parent.process.pid):
            assert time.monotonic() < end, members(parent.process.pid)
            time.sleep(0.05)
    jobs = [path.parent for path in tmp_path.glob("*/metrics.jsonl")]
    assert len(jobs) == 2
    for job in jobs:
        output = (job / "output.log").read_text()
        assert "interrupted by SIGTERM after update" in output, output
        newest = read(find_all(job)[0])["train"]["num_updates"]
        assert f"after update {newest};" in output
