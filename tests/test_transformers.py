"""The switch in the Trainer of transformers: images, text, checkpoints."""

import pytest
import torch
from torch.utils.data import Dataset

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from switchlora import UpdateNorm  # noqa: E402
from switchlora.adapters import adapted_modules, is_factor  # noqa: E402
from switchlora.integrations.transformers import (  # noqa: E402
    LowRankSwitchCallback,
    save_merged,
)

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
    return transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])


def switching(**options):
    chosen = {"target_modules": "all-linear", "window": 6, "rank": 2, "criterion": EARLY}
    return LowRankSwitchCallback(**chosen, **options)


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


def test_what_is_saved_after_the_switch_gives_the_logits_that_were_trained(tmp_path):
    hf = trainer(tmp_path, vit(), Images(), switching())
    hf.train()
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = hf.model.eval()(image).logits
    hf.save_model(str(tmp_path / "end"))
    save_merged(hf.model, tmp_path / "end")
    for folder in ("checkpoint-24", "end"):
        loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(image).logits, expected, rtol=0, atol=1e-5)


def test_a_trainer_goes_on_from_before_the_switch_and_refuses_one_after(tmp_path):
    whole = trainer(tmp_path / "whole", vit(), Images(), switching())
    whole.train()

    def goes_on(name, update):
        place = str(tmp_path / f"whole/checkpoint-{update}")
        hf = trainer(tmp_path / name, vit(), Images(), switching(resume_from_checkpoint=place))
        hf.train(resume_from_checkpoint=place)
        return hf

    again = goes_on("again", 6)
    first = whole.state.log_history[0], again.state.log_history[0]
    assert first[0] == first[1] and len(adapted_modules(again.model)) == 12
    logged = [entry for entry in again.state.log_history if "switch/switched" in entry]
    assert [(e["step"], e["switch/switched"]) for e in logged] == [(6, 0.0), (12, 1.0)]
    with pytest.raises(ValueError, match="was written after the switch, at update 12"):
        goes_on("late", 18)
    lost = trainer(tmp_path / "lost", vit(), Images(), switching())
    with pytest.raises(ValueError, match="name the checkpoint"):
        lost.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-6"))
