"""The Trainer of Lightning: ``python examples/lightning_fit.py``. One callback is new."""

import lightning
import timm
import torch
from shared import SMALL_VIT, Telling, accuracy, digits
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from switchlora import UpdateNorm
from switchlora.integrations.lightning import LowRankSwitchCallback

OUT = "runs/examples/lightning_fit.ckpt"


class Classifier(lightning.LightningModule):
    """A small ViT with its optimizer and schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = timm.create_model("vit_tiny_patch16_224", **SMALL_VIT)

    def forward(self, images):
        """Return the logits."""
        return self.vit(images)

    def training_step(self, batch, batch_idx):
        """Return the loss."""
        images, labels = batch
        return cross_entropy(self(images), labels)

    def configure_optimizers(self):
        """Return AdamW, and a rate that rises and falls."""
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.05)
        updates = int(self.trainer.estimated_stepping_batches)
        scheduler = OneCycleLR(optimizer, max_lr=5e-3, total_steps=updates, pct_start=0.25)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


lightning.seed_everything(0, verbose=False)
train, test = digits()
loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
model = Classifier()
telling = Telling(UpdateNorm(0.7, patience=2))  # prints a line for each measurement
callback = LowRankSwitchCallback(criterion=telling, on_switch=telling.switched, window=len(loader))
trainer = lightning.Trainer(
    max_epochs=9,
    callbacks=[callback],
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, loader)

trainer.save_checkpoint(OUT)  # its weights are merged
print(f"accuracy with adapters {accuracy(model, test):.2%}")
loaded = Classifier.load_from_checkpoint(OUT)
print(f"accuracy merged        {accuracy(loaded, test):.2%}")
