"""The Trainer of transformers on text: ``python examples/trainer_text.py``.

A small Llama with random weights learns the bytes of a file of Python's own library.
"""

import argparse
from pathlib import Path

import torch
from shared import Telling, logits
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from switchlora import UpdateNorm
from switchlora.integrations.transformers import LowRankSwitchCallback, save_merged

OUT = "runs/examples/trainer_text"


def accuracy(model, rows):
    """Return the share of bytes that the model guesses from those before them."""
    guessed = logits(model, rows).argmax(-1)
    return (guessed[:, :-1] == rows[:, 1:]).float().mean().item()


torch.manual_seed(0)
text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
rows = text[: len(text) // 32 * 32].view(-1, 32)
train, test = rows[:-200], rows[-200:]
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config)
telling = Telling(UpdateNorm(0.7, patience=2))  # prints a line for each measurement
callback = LowRankSwitchCallback(
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
    criterion=telling,
    on_switch=telling.switched,
    rank=8,
    window=20,
)
arguments = TrainingArguments(
    output_dir=OUT,
    max_steps=180,
    per_device_train_batch_size=16,
    learning_rate=5e-3,
    warmup_steps=40,
    lr_scheduler_type="cosine",
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
)
examples = [{"input_ids": row, "labels": row} for row in train]
trainer = Trainer(model, arguments, train_dataset=examples, callbacks=[callback])
trainer.train()

trainer.save_model(OUT)
save_merged(model, OUT)  # else from_pretrained would leave the adapters out
print(f"accuracy with adapters {accuracy(model, test):.2%}")
loaded = LlamaForCausalLM.from_pretrained(OUT)
print(f"accuracy merged        {accuracy(loaded, test):.2%}")
