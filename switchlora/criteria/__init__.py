"""Decide when to switch: a criterion is a pure function of the history of measurements."""

from switchlora.criteria.basic import (
    LOSS as LOSS,
    AllOf as AllOf,
    AnyOf as AnyOf,
    AtEpoch as AtEpoch,
    LossPlateau as LossPlateau,
    SwitchCriterion as SwitchCriterion,
    UpdateNorm as UpdateNorm,
    Verdict as Verdict,
    at_start as at_start,
    joined as joined,
    never as never,
)
from switchlora.criteria.prelora import (
    PreLoRA as PreLoRA,
    PublishedPreLoRA as PublishedPreLoRA,
    reads_loss as reads_loss,
)
from switchlora.criteria.price import NO_SHARE as NO_SHARE, PredictedCost as PredictedCost
from switchlora.criteria.spectra import (
    BasisStability as BasisStability,
    StableRank as StableRank,
)
