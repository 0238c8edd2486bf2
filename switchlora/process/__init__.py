"""Run as one of several processes: talk to the others, heed signals, exit with one line."""

from switchlora.process.backends import (
    exact_products as exact_products,
    set_backends as set_backends,
)
from switchlora.process.device import find_device as find_device
from switchlora.process.distributed import (
    Question as Question,
    agreed_checksum as agreed_checksum,
    any_rank as any_rank,
    from_primary as from_primary,
    full as full,
    gather as gather,
    is_primary as is_primary,
    like as like,
    lost_rank as lost_rank,
    mean_of_ranks as mean_of_ranks,
    together as together,
    total as total,
    world_size as world_size,
)
from switchlora.process.exits import (
    FAILURE as FAILURE,
    USER_ERRORS as USER_ERRORS,
    exit_with_one_line as exit_with_one_line,
    one_line as one_line,
    why_unlocated as why_unlocated,
)
from switchlora.process.prescribed import tell_overruled as tell_overruled
from switchlora.process.schema import (
    CheckFirst as CheckFirst,
    check_keys as check_keys,
    check_values as check_values,
    kind_of as kind_of,
    missing as missing,
)
from switchlora.process.signals import SIGNALS as SIGNALS, Interruption as Interruption
from switchlora.process.talking import (
    printable as printable,
    say as say,
    talk_without_risk as talk_without_risk,
    talking as talking,
)
from switchlora.process.words import (
    checked as checked,
    known_keys as known_keys,
    prepare_words as prepare_words,
)
