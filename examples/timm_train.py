"""In the manner of timm's train.py: ``python examples/timm_train.py --epochs 20``.

Optimizer, schedule, Mixup and the average of the weights are timm's. Lines 1, 2 and 3 are new.
"""

import argparse
from pathlib import Path

import timm
import torch
from shared import SMALL_VIT, accuracy, digits
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader

from switchlora import LowRankSwitch, UpdateNorm
from switchlora.adapters import merge

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=9)
parser.add_argument("--warmup-epochs", type=int, default=2)
parser.add_argument("--lr", type=float, default=5e-3)
parser.add_argument("--mixup", type=float, default=0.1)
parser.add_argument("--model-ema-decay", type=float, default=0.9)
parser.add_argument("--output", type=Path, default=Path("runs/examples/timm_train"))
args = parser.parse_args()

torch.manual_seed(0)
train, test = digits()
loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
model = timm.create_model("vit_tiny_patch16_224", **SMALL_VIT)
optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
scheduler, num_epochs = create_scheduler_v2(
    optimizer,
    num_epochs=args.epochs,
    warmup_epochs=args.warmup_epochs,
    warmup_prefix=False,
    step_on_epochs=False,
    updates_per_epoch=len(loader),
)
mixup = Mixup(mixup_alpha=args.mixup, num_classes=10)
loss_fn = SoftTargetCrossEntropy()
ema = ModelEmaV3(model, decay=args.model_ema_decay)
criterion = UpdateNorm(0.7, patience=2)
switch = LowRankSwitch(model, optimizer, scheduler, criterion=criterion, window=len(loader))  # 1

num_updates = 0
for epoch in range(num_epochs):
    for images, labels in loader:
        mixed, targets = mixup(images, labels)
        loss = loss_fn(model(mixed), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
        num_updates += 1
        scheduler.step_update(num_updates)
        if switch.step(loss):  # 2
            ema = ModelEmaV3(model, decay=args.model_ema_decay)  # 3: it has adapters now, too
            print(f"SWITCH at update {num_updates}: {switch.verdict.reason}")
    scheduler.step(epoch + 1)
    if not switch.switched:
        print(f"update {num_updates}: {switch.verdict.reason}")
    print(f"epoch {epoch + 1}: loss {loss:.3f}, test accuracy {accuracy(ema.module, test):.1%}")

print(f"accuracy with adapters {accuracy(ema.module, test):.2%}")
merge(ema.module)
switch.merge_and_unload()
print(f"accuracy merged        {accuracy(ema.module, test):.2%}")
args.output.mkdir(parents=True, exist_ok=True)
weights = {"state_dict": model.state_dict(), "state_dict_ema": ema.module.state_dict()}
torch.save(weights, args.output / "last.pth.tar")  # for timm.create_model(checkpoint_path=...)
