"""Versions of models with a way back: publish, promote, roll back, verify, and the log of it."""

from switchlora.registry.log import (
    ABOUT as ABOUT,
    CANDIDATE as CANDIDATE,
    PRODUCTION as PRODUCTION,
    Entry as Entry,
    aliases as aliases,
    entries as entries,
    existing as existing,
    productions as productions,
    read_about as read_about,
    resolve as resolve,
    versions as versions,
)
from switchlora.registry.version import (
    CHECKSUMS as CHECKSUMS,
    VersionDamaged as VersionDamaged,
    check as check,
    is_version as is_version,
)
from switchlora.registry.writing import (
    promote as promote,
    publish as publish,
    rollback as rollback,
)
