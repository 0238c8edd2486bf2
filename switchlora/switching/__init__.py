"""Changes of the model: the switch and what comes after it. Each succeeds or is undone."""

from switchlora.switching.changes import (
    SwitchReport as SwitchReport,
    grow as grow,
    larger_ranks as larger_ranks,
    restart as restart,
    settle as settle,
    switch as switch,
    take_back as take_back,
)
from switchlora.switching.controller import (
    TRIES as TRIES,
    ChangeFailed as ChangeFailed,
    Controller as Controller,
    Phase as Phase,
    SwitchState as SwitchState,
)
from switchlora.switching.plan import (
    WHOLE as WHOLE,
    choose_ranks as choose_ranks,
    with_frozen_front as with_frozen_front,
)
from switchlora.switching.rehearsal import rehearse as rehearse
from switchlora.switching.transaction import (
    Outcome as Outcome,
    Scene as Scene,
    trained_tensors as trained_tensors,
)
