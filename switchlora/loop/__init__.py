"""The switch in a loop of one's own: the same model, optimizer and schedulers go on."""

from switchlora.loop.loop import LowRankSwitch as LowRankSwitch
from switchlora.loop.measure import History as History, WeightUpdateMonitor as WeightUpdateMonitor
