"""The switch in the Trainer of transformers: images, text, checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from switchlora import UpdateNorm  # noqa: E402
from switchlora.adapters import adapted_modules, is_factor  # noqa: E402
from switchlora.criteria import AnyOf, LossPlateau, PreLoRA, never  # noqa: E402
from switchlora.integrations.transformers import (  # noqa: E402
    LowRankSwitchCallback,
    save_merged,
)
from test_loop_again import TWO  # noqa: E402
from test_loop_guard import Behind  # noqa: E402

EARLY = UpdateNorm(5.0, patience=1)
"""fires at the second measurement"""


class Images(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, place):
        generator = torch.Generator().manual_seed(place)
        image = torch.randn(3, 16, 16, generator=generator)
        return {"pixel_values": image, "labels": place % 4}


class Words(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, place):
        generator = torch.Generator().manual_seed(place)
        words = torch.randint(0, 32, (12,), generator=generator)
        return {"input_ids": words, "labels": words}


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=4,
    )
    return transformers.ViTForImageClassification(config)


def language_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=32, max_position_embeddings=16, **sizes, **heads)
    )


def trainer(folder, model, data, callback, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **{"max_steps": 24, "logging_steps": 6, "save_steps": 6} | options,
    )
    return transformers.Trainer(
        *(model, arguments), train_dataset=data, eval_dataset=data, callbacks=[callback]
    )


def switching(**options):
    chosen = {"target_modules": "all-linear", "window": 6, "rank": 2, "criterion": EARLY}
    return LowRankSwitchCallback(**chosen | options)


@pytest.mark.parametrize("make,data", [(vit, Images()), (language_model, Words())])
def test_a_trainer_switches_and_its_optimizer_trains_the_factors(make, data, tmp_path):
    callback = switching()
    hf = trainer(tmp_path, make(), data, callback)
    hf.train()
    assert callback.switch.switched_at == 12 and callback.switch.report.drift <= 1e-5
    held = {p for group in hf.optimizer.param_groups for p in group["params"]}
    assert held == {p for p in hf.model.parameters() if p.requires_grad}
    assert all(p.abs().sum() > 0 for n, p in hf.model.named_parameters() if is_factor(n))
    first, second, *_ = hf.lr_scheduler.get_last_lr()
    assert first == second and len(hf.lr_scheduler.get_last_lr()) == len(hf.optimizer.param_groups)
    logged = [entry for entry in hf.state.log_history if "switch/switched" in entry]
    assert [(e["step"], e["switch/switched"]) for e in logged] == [(6, 0.0), (12, 1.0)]


@pytest.mark.parametrize("criterion", [LossPlateau(), AnyOf([UpdateNorm(), PreLoRA()])])
def test_a_criterion_that_reads_the_loss_is_refused_as_a_trainer_does_not_tell_it(
    criterion, tmp_path
):
    hf = trainer(tmp_path, vit(), Images(), switching(criterion=criterion))
    with pytest.raises(ValueError, match="reads the loss, which a Trainer does not tell"):
        hf.train()


def test_what_is_saved_after_the_switch_gives_the_logits_that_were_trained(whole, tmp_path):
    hf = whole
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = hf.model.eval()(image).logits
    hf.save_model(str(tmp_path / "end"))
    save_merged(hf.model, tmp_path / "end")
    for folder in (f"{hf.args.output_dir}/checkpoint-24", tmp_path / "end"):
        loaded = transformers.ViTForImageClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(image).logits, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that switched at update 12 of 24, with a checkpoint every 6."""
    hf = trainer(tmp_path_factory.mktemp("whole"), vit(), Images(), switching())
    hf.train()
    return hf


def goes_on(folder, place, model=None, **options):
    callback = switching(resume_from_checkpoint=place, **options)
    hf = trainer(folder, model or vit(), Images(), callback)
    hf.train(resume_from_checkpoint=str(place))
    return hf


@pytest.mark.parametrize("update", [6, 12, 18])
def test_a_trainer_that_goes_on_before_or_after_the_switch_ends_the_same(update, whole, tmp_path):
    again = goes_on(tmp_path, f"{whole.args.output_dir}/checkpoint-{update}")
    assert len(adapted_modules(again.model)) == 12
    logs = []
    for hf in (whole, again):
        logs.append([e.get("loss") or e.get("switch/switched") for e in hf.state.log_history[:-1]])
    assert logs[0] == logs[1]
    states = [hf.model.state_dict() for hf in (again, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    states = [hf.optimizer.state_dict() for hf in (again, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:the adapter is behind")
def test_a_trainer_goes_on_after_a_return_to_full_training_to_the_same_end(tmp_path):
    guard = Behind(criterion=never)
    whole = trainer(tmp_path / "whole", vit(), Images(), switching(guard=guard))
    whole.train()
    again = goes_on(tmp_path / "again", f"{whole.args.output_dir}/checkpoint-18", guard=guard)
    assert not adapted_modules(again.model)
    states = [hf.model.state_dict() for hf in (again, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    states = [hf.optimizer.state_dict() for hf in (again, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


class Plain(nn.Module):
    """A model that is none of transformers, whose checkpoints are plain files of its tensors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.head = nn.Linear(768, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.fc2(self.fc1(pixel_values.flatten(1)).relu()).relu())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def test_a_model_that_is_none_of_transformers_goes_on_after_the_switch_too(tmp_path):
    hf = trainer(tmp_path / "whole", Plain(), Images(), switching())
    hf.train()
    again = goes_on(tmp_path / "again", tmp_path / "whole/checkpoint-18", Plain())
    states = [hf.model.state_dict(), again.model.state_dict()]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    saved = Plain()
    saved.load_state_dict(load_file(tmp_path / "again/checkpoint-24/model.safetensors"))
    images = torch.randn(2, 3, 16, 16)
    logits = [model(images)["logits"] for model in (saved, hf.model)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_checkpoints_that_do_not_belong_are_refused_in_a_line(whole, tmp_path):
    place = Path(whole.args.output_dir)
    hf = trainer(tmp_path, vit(), Images(), switching())
    with pytest.raises(ValueError, match="name the checkpoint"):
        hf.train(resume_from_checkpoint=str(place / "checkpoint-6"))
    hf = trainer(
        tmp_path, vit(), Images(), switching(resume_from_checkpoint=place / "checkpoint-24")
    )
    with pytest.raises(
        ValueError, match="checkpoint-24 is of update 24, but the trainer goes on from update 18"
    ):
        hf.train(resume_from_checkpoint=str(place / "checkpoint-18"))
    for content in (
        b"",
        b"no file of torch",
        (place / "checkpoint-18/low_rank_switch.pt").read_bytes()[:99],
    ):
        shutil.copytree(place / "checkpoint-18", tmp_path / "cut", dirs_exist_ok=True)
        (tmp_path / "cut/low_rank_switch.pt").write_bytes(content)
        with pytest.raises(ValueError, match="low_rank_switch.pt is damaged"):
            goes_on(tmp_path, tmp_path / "cut")
    with pytest.raises(ValueError, match="the model has adapters already"):
        trainer(tmp_path, whole.model, Images(), switching()).train()


def test_it_goes_on_between_two_stages_to_the_same_end(tmp_path):
    hf = trainer(tmp_path / "whole", vit(), Images(), switching(**TWO))
    hf.train()
    again = goes_on(tmp_path / "again", tmp_path / "whole/checkpoint-6", **TWO)
    for part in ("model", "optimizer", "lr_scheduler"):
        states = [getattr(found, part).state_dict() for found in (again, hf)]
        torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("best, options, adapters", [(6, {}, 0), (18, {}, 12), (6, TWO, 2)])
def test_the_best_model_at_the_end_is_the_one_that_was_saved(best, options, adapters, tmp_path):
    hf = trainer(
        *(tmp_path, vit(), Images(), switching(**options)),
        **{"eval_strategy": "steps", "eval_steps": 6, "load_best_model_at_end": True},
        metric_for_best_model="chosen",
        greater_is_better=True,
    )
    hf.compute_metrics = lambda _: {"chosen": float(hf.state.global_step == best)}
    hf.train()
    saved = transformers.ViTForImageClassification.from_pretrained(tmp_path / f"checkpoint-{best}")
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = saved.eval()(image).logits
        torch.testing.assert_close(hf.model.eval()(image).logits, wanted, rtol=0, atol=1e-5)
    assert len(adapted_modules(hf.model)) == adapters
