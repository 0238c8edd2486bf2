"""The steps of one run: prepare, train in windows, switch, save, finish."""

from switchlora.run.agreement import (
    agree_on_data as agree_on_data,
    agree_on_settings as agree_on_settings,
    agree_on_weights as agree_on_weights,
)
from switchlora.run.finish import finish as finish, status_at_end as status_at_end
from switchlora.run.forecast import count_compiled as count_compiled
from switchlora.run.memory import (
    predict_memory as predict_memory,
    record_memory as record_memory,
)
from switchlora.run.messages import (
    MEMORY_PARTS as MEMORY_PARTS,
    eval_line as eval_line,
)
from switchlora.run.prepare import prepare as prepare, with_choices as with_choices
from switchlora.run.run import Run as Run
from switchlora.run.saving import (
    faults_explained as faults_explained,
    how_to_go_on as how_to_go_on,
    leave_if_asked as leave_if_asked,
    save as save,
    save_or_leave as save_or_leave,
    wait_until_saved as wait_until_saved,
)
from switchlora.run.snapshot import restore as restore, state_of as state_of
from switchlora.run.state import Phase as Phase
from switchlora.run.tell import (
    tell_compiler_fault as tell_compiler_fault,
    tell_refactoring as tell_refactoring,
    tell_skipped as tell_skipped,
)
from switchlora.run.windows import (
    consider_switch as consider_switch,
    end_joint_phase as end_joint_phase,
    end_window as end_window,
    guide as guide,
    look_after as look_after,
)
