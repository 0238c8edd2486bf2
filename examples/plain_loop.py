"""A plain PyTorch loop: ``python examples/plain_loop.py``.

Three things are new: the switch is made, it steps after the optimizer, and it saves.
"""

import timm
import torch
from shared import SMALL_VIT, accuracy, digits
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from switchlora import LowRankSwitch, UpdateNorm

EPOCHS = 9
OUT = "runs/examples/plain_loop"

torch.manual_seed(0)
train, test = digits()
loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
model = timm.create_model("vit_tiny_patch16_224", **SMALL_VIT)
optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
scheduler = OneCycleLR(optimizer, max_lr=5e-3, total_steps=EPOCHS * len(loader), pct_start=0.25)
switch = LowRankSwitch(
    model,
    optimizer,
    scheduler,
    criterion=UpdateNorm(0.7, patience=2),  # at or under 0.7 of their peak, twice in a row
    window=len(loader),  # one measurement an epoch
)

for epoch in range(EPOCHS):
    for images, labels in loader:
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if switch.step(loss):  # True once: adapters are in, the same optimizer trains them
            print(f"SWITCH at update {switch.switched_at}: {switch.verdict.reason}")
            switch.print_trainable_parameters()
    if not switch.switched:
        print(f"update {switch.num_updates}: {switch.verdict.reason}")
    print(f"epoch {epoch + 1}: loss {loss:.3f}, test accuracy {accuracy(model, test):.1%}")

switch.save_pretrained(OUT)  # the adapter as PEFT reads it, and its base model beside
print(f"accuracy with adapters {accuracy(model, test):.2%}")
switch.merge_and_unload()  # the model is plain again
print(f"accuracy merged        {accuracy(model, test):.2%}")
