"""A tiny model in the middle of training, for tests of what may happen to it then."""

import torch
from torch import nn

from conf_yamls import build, composed
from conftest import tiny_vit
from switchlora.learner import build_learner
from switchlora.monitor import UpdateMonitor
from switchlora.switching import Scene, switch

TOTAL, SWITCH_AT = 40, 12
LOSS = nn.CrossEntropyLoss()
BASE = ("switch/criterion=at_start", "switch/rank=fixed", "switch.rank.rank=2")


def batch(seed, size=16):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, 8, 8, generator=generator)
    return images, torch.randint(0, 5, (size,), generator=generator)


class Trial:
    """A full phase of ``SWITCH_AT`` updates, ready to switch."""

    def __init__(self, *overrides):
        torch.manual_seed(0)
        config = composed(*BASE, "full.scheduler.warmup_t=4", *overrides)
        self.model = tiny_vit()
        self.policy = build(config.switch)
        self.full, self.adapter = build(config.full), build(config.adapter)
        targets = self.policy.find_targets(self.model)
        self.monitor = UpdateMonitor(self.model, targets, SWITCH_AT)
        self.learner = build_learner(self.model, self.full, TOTAL)
        self.done, self.history = 0, []
        self.train(SWITCH_AT)
        self.history = [self.monitor.measure(self.done, 1.0)] * 2

    def train(self, updates):
        for _ in range(updates):
            result = self.learner.update(*batch(self.done), LOSS, self.done)
            assert result.applied
            self.done += 1

    def rebuild(self, model, full=False):
        recipe = self.full if full else self.adapter
        return build_learner(model, recipe, TOTAL, start=self.done)

    def scene(self, rebuild=None):
        probe = batch(99)[0]
        return Scene(self.learner, self.policy, self.monitor, probe, rebuild or self.rebuild)

    def switch(self, chosen=None, rebuild=None):
        self.learner, report = switch(self.scene(rebuild), self.history, chosen)
        return report
