"""The Trainer of transformers on images: ``python examples/trainer_images.py``.

A callback is new, and a line after ``save_model``.
"""

import torch
from shared import Telling, accuracy, digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from switchlora import UpdateNorm
from switchlora.integrations.transformers import LowRankSwitchCallback, save_merged

OUT = "runs/examples/trainer_images"

torch.manual_seed(0)
train, test = digits()
config = ViTConfig(
    image_size=8,
    patch_size=4,
    num_channels=1,
    num_labels=10,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
)
model = ViTForImageClassification(config)
telling = Telling(UpdateNorm(0.7, patience=2))  # prints a line for each measurement
callback = LowRankSwitchCallback(
    target_modules="all-linear",  # all linears but the last one, which is the head
    criterion=telling,
    on_switch=telling.switched,
    window=22,  # updates: one measurement an epoch
)
arguments = TrainingArguments(
    output_dir=OUT,
    num_train_epochs=9,
    per_device_train_batch_size=64,
    dataloader_drop_last=True,
    learning_rate=5e-3,
    warmup_steps=44,
    lr_scheduler_type="cosine",
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
)
examples = [{"pixel_values": image, "labels": label} for image, label in train]
trainer = Trainer(model, arguments, train_dataset=examples, callbacks=[callback])
trainer.train()

trainer.save_model(OUT)
save_merged(model, OUT)  # else from_pretrained would leave the adapters out
print(f"accuracy with adapters {accuracy(model, test):.2%}")
loaded = ViTForImageClassification.from_pretrained(OUT)
print(f"accuracy merged        {accuracy(loaded, test):.2%}")
