"""The switch in the Trainer of Lightning: checkpoints, accumulation, what is refused."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers.logger import Logger  # noqa: E402

from conftest import tiny_vit  # noqa: E402
from switchlora import UpdateNorm  # noqa: E402
from switchlora.adapters import adapted_modules, is_factor, merged_state_dict  # noqa: E402
from switchlora.criteria import never  # noqa: E402
from switchlora.integrations import lightning as ours  # noqa: E402
from switchlora.integrations.lightning import LowRankSwitchCallback  # noqa: E402
from test_loop_again import TWO  # noqa: E402
from test_loop_guard import Behind  # noqa: E402

EARLY = UpdateNorm(5.0, patience=1)
"""fires at the second measurement"""
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


class Lit(pl.LightningModule):
    """An epoch has six batches; the network is a part of the module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = tiny_vit()
        self.losses = []

    def training_step(self, batch, _):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, _):
        self.log("logits", self.net(batch[0]).sum())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Notes(Logger):
    """A logger that keeps what it gets."""

    name, version = "notes", 0

    def __init__(self):
        super().__init__()
        self.entries = []

    def log_metrics(self, metrics, step=None):
        self.entries.append((step, metrics))

    def log_hyperparams(self, *_, **__):
        pass


def loader():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(48, 1, 8, 8, generator=generator)
    return DataLoader([(image, n % 5) for n, image in enumerate(images)], batch_size=8)


def switching(**options):
    return LowRankSwitchCallback(**{"window": 6, "rank": 2, "criterion": EARLY} | options)


def trainer(folder, *callbacks, **options):
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        callbacks=list(callbacks),
        **{"max_epochs": 4, "logger": False} | options,
    )


def fitted(folder, ckpt_path=None, callback=None, **options):
    """A training of 24 updates with a checkpoint every six."""
    model, notes, callback = Lit(), Notes(), callback or switching()
    keeping = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=6, **options)
    trainer(folder, callback, keeping, logger=notes).fit(model, loader(), ckpt_path=ckpt_path)
    return SimpleNamespace(model=model, notes=notes, switch=callback.switch, folder=folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("whole"))


def test_it_fires_where_a_replay_of_its_history_says_so_and_tells_the_loggers(whole):
    history = whole.switch.history
    fires = [m.num_updates for n, m in enumerate(history) if EARLY(history[: n + 1]).fires]
    assert whole.switch.switched_at == fires[0] == 12
    told = [(step, m["switch/switched"]) for step, m in whole.notes.entries if len(m) > 1]
    assert told == [(6, 0.0), (12, 1.0)]
    expected = sum(whole.model.losses[6:12]) / 6
    assert history[-1].train_loss == pytest.approx(expected, rel=1e-5)
    factors = {n: p for n, p in whole.model.named_parameters() if is_factor(n)}
    assert len(adapted_modules(whole.model)) == 8
    assert all(p.abs().sum() > 0 for p in factors.values())


@pytest.mark.parametrize("step", [6, 12, 18])
def test_it_goes_on_from_before_and_after_the_switch_to_the_same_end(whole, step, tmp_path):
    again = fitted(tmp_path, ckpt_path=whole.folder / f"step={step}.ckpt")
    assert again.switch.switched_at == 12 and again.switch.ranks == whole.switch.ranks
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_it_goes_on_between_two_stages_to_the_same_end(tmp_path):
    whole = fitted(tmp_path / "whole", callback=switching(**TWO))
    place = tmp_path / "whole/step=6.ckpt"
    again = fitted(tmp_path / "again", place, callback=switching(**TWO))
    assert whole.switch.switched_at == 6 and len(adapted_modules(whole.model)) == 8
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    loaded = Lit.load_from_checkpoint(tmp_path / "again/step=24.ckpt")
    expected = merged_state_dict(whole.model)
    torch.testing.assert_close(loaded.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("step", [12, 18])
def test_it_goes_on_around_a_return_to_full_training_to_the_same_end(step, tmp_path):
    guard = Behind(criterion=never)
    whole = fitted(tmp_path / "whole", callback=switching(guard=guard))
    place = tmp_path / f"whole/step={step}.ckpt"
    again = fitted(tmp_path / "again", place, callback=switching(guard=guard))
    assert not adapted_modules(again.model) and len(again.switch.history) == 3
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_checkpoint_after_the_switch_is_one_of_the_plain_model(whole):
    loaded = Lit.load_from_checkpoint(whole.folder / "step=24.ckpt")
    assert not adapted_modules(loaded)
    expected = merged_state_dict(whole.model)
    torch.testing.assert_close(loaded.state_dict(), expected, rtol=0, atol=0)


def test_weights_saved_alone_are_merged_too_and_any_checkpoint_is_evaluated(whole, tmp_path):
    last = fitted(tmp_path, save_weights_only=True)
    weights = torch.load(tmp_path / "step=24.ckpt", weights_only=True)
    assert set(weights["state_dict"]) == set(Lit().state_dict())

    def logits(model, ckpt_path):
        runs = trainer(tmp_path, switching())
        (found,) = runs.validate(model, loader(), ckpt_path=ckpt_path, verbose=False)
        return found["logits"]

    for place in (tmp_path / "step=24.ckpt", whole.folder / "step=18.ckpt"):
        assert logits(last.model, place) == pytest.approx(logits(Lit(), place), rel=1e-6)
    early = whole.folder / "step=6.ckpt"
    assert logits(last.model, early) == logits(Lit(), early)


def test_updates_count_not_micro_batches(tmp_path):
    callback, model = switching(window=2), Lit()
    runs = trainer(tmp_path, callback, accumulate_grad_batches=3, max_epochs=3)
    runs.fit(model, loader())
    assert callback.switch.switched_at == 4 and callback.switch.num_updates == 6
    expected = sum(model.losses[6:12]) / 6
    assert callback.switch.history[-1].train_loss == pytest.approx(expected, rel=1e-5)


class Manual(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


def test_what_cannot_work_is_refused_in_a_line(whole, tmp_path):
    for model, says in ((Manual(), "needs automatic"), (whole.model, "has adapters already")):
        with pytest.raises(ValueError, match=says):
            trainer(tmp_path, switching()).fit(model, loader())
    several = SimpleNamespace(optimizers=[1, 2], world_size=1)
    with pytest.raises(ValueError, match="needs one optimizer, not 2"):
        switching().on_fit_start(several, Lit())
    several = SimpleNamespace(optimizers=[1], world_size=2, strategy=SimpleNamespace(model=None))
    with pytest.raises(ValueError, match="does not go with SimpleNamespace: use .*ddp"):
        switching().on_fit_start(several, Lit())
    trainer(tmp_path, keeping := ModelCheckpoint(tmp_path), max_steps=1).fit(Lit(), loader())
    with pytest.raises(ValueError, match="was written without LowRankSwitchCallback"):
        trainer(tmp_path, switching()).fit(Lit(), loader(), ckpt_path=keeping.best_model_path)


def imported_anew():
    spec = spec_from_file_location("anew", ours.__file__)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_lightning_the_older_package_is_taken_and_without_both_a_line_says_so(monkeypatch):
    older = pytest.importorskip("pytorch_lightning.callbacks")
    monkeypatch.setitem(sys.modules, "lightning.pytorch.callbacks", None)
    assert issubclass(imported_anew().LowRankSwitchCallback, older.Callback)
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", None)
    with pytest.raises(ModuleNotFoundError, match="pip install lightning"):
        imported_anew()
