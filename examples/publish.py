"""Publish what plain_loop.py left: ``python examples/plain_loop.py``, then this file.

The folder gets the layout of the Hugging Face hub: timm loads the merged model, PEFT the adapter.
"""

import shutil
from pathlib import Path

import timm
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from shared import SMALL_VIT, accuracy, digits
from timm.models import save_for_hf

TRAINED = Path("runs/examples/plain_loop")
FOLDER = Path("runs/examples/publish")
CARD = """---
{metadata}
---
# A small ViT on scikit-learn's digits

Trained in full at first, then as a low-rank adapter. Test accuracy: {accuracy:.1%}.

`timm.create_model("hf-hub:me/digits-vit", pretrained=True)` loads the merged model.
`adapter/` has the adapter alone, for PEFT, and `residual.safetensors`, which it belongs on.
"""

if not TRAINED.is_dir():
    raise SystemExit(f"{TRAINED} is missing: run examples/plain_loop.py first")
_, test = digits()
pixels = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}  # how images come to the model
base = timm.create_model(
    "vit_tiny_patch16_224",
    checkpoint_path=TRAINED / "residual.safetensors",
    pretrained_cfg_overlay=pixels,
    **SMALL_VIT,
)
adapted = PeftModel.from_pretrained(base, TRAINED)
print(f"accuracy with adapters {accuracy(adapted, test):.2%}")
merged = adapted.merge_and_unload()

save_for_hf(merged, FOLDER, model_args=SMALL_VIT, safe_serialization=True)
shutil.copytree(TRAINED, FOLDER / "adapter", dirs_exist_ok=True)
metadata = ModelCardData(library_name="timm", tags=["image-classification", "switchlora"])
card = CARD.format(metadata=metadata.to_yaml(), accuracy=accuracy(merged, test))
ModelCard(card).save(FOLDER / "README.md")

# Here it would be pushed, after `hf auth login`:
# huggingface_hub.upload_folder(repo_id="me/digits-vit", folder_path=FOLDER)

loaded = timm.create_model(f"local-dir:{FOLDER}", pretrained=True)  # hf-hub:me/digits-vit
print(f"accuracy merged        {accuracy(loaded, test):.2%}")
