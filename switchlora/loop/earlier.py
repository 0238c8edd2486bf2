"""Read what an earlier version saved of a ``LowRankSwitch``."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from switchlora.switching import Phase, SwitchReport, SwitchState


def of_any_version(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``state`` with its phase and a report, which earlier versions did not save.

    Of such a report only the ranks are known.
    """
    if "phase" in state:
        return state
    at, until, ranks = state["switched_at"], state["joint_until"], state["ranks"]
    phase, report = Phase.FULL, None
    if at is not None:
        waiting = set(state["monitor"]["references"]) - set(ranks)
        phase = Phase.STAGED if waiting else Phase.ADAPTER
        phase = phase if until is None else Phase.JOINT
        report = asdict(SwitchReport(math.nan, None, "", 0, 0, 0, 0, math.nan, ranks, [], {}))
    joint = {"phase": phase, "joint_until": None if until == math.inf else until}
    own = {"switch_update": at, "switch_report": report, **joint}
    return {**SwitchState().state_dict(), **state, **own}
