"""Versions of a registry in Weights & Biases too: ``--wandb`` of publish, promote and rollback.

A version is an artifact of type ``model``, named after the registry's folder and logged in the run
that trained it. An artifact is found again by the alias ``version-0001``: ``v1`` is W&B's own.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from switchlora.analysis.wandb_report import wandb_id
from switchlora.process import one_line
from switchlora.registry import PRODUCTION, read_about, resolve
from switchlora.storage import (
    PROJECT,
    begin_wandb,
    check_login,
    online_or_offline,
    read_config,
    read_record,
    wandb_options,
    warn,
)

TYPE = "model"


def options_of(folder: Path) -> dict[str, Any]:
    """Return mode and project in W&B: the environment's, or else those of a run or a version.

    ValueError where W&B is disabled.
    """
    given = read_config(folder)["log"]["wandb"]
    environment = "WANDB_MODE" in os.environ or "WANDB_DISABLED" in os.environ
    mode = None if environment or given["mode"] == "disabled" else given["mode"]
    options = wandb_options({"project": given["project"], "mode": mode}, {"project": PROJECT})
    if options["mode"] == "disabled":
        raise ValueError("--wandb: the environment disables W&B; unset WANDB_MODE, WANDB_DISABLED")
    return options


def log_version(registry: Path, version: str, alias: str, run: Path) -> str:
    """Log a version as an artifact with its ``alias``, and return a line on it.

    ``run`` is the folder of the run that trained it. Offline, what is to be sent later lies in
    ``registry/wandb``. ValueError where W&B does not take it.
    """
    import wandb

    registry = registry.resolve()
    known = known_id(run)
    options = {**options_of(run), **({} if known else {"job_type": "publish"})}

    def start(these: Mapping[str, Any]) -> Any:
        return begin_wandb(registry, these, known)

    with refusals(f"{version} is in {registry}, but W&B did not take it"):
        logging = online_or_offline(start, options, registry, warn)
        about = {**read_about(registry / version), "version": version}
        artifact = wandb.Artifact(name_of(registry), TYPE, metadata=about)
        artifact.add_dir(str(registry / version), policy="immutable")
        logged = logging.log_artifact(artifact, aliases=[alias, alias_of(version)])
        if not logging.offline:
            logged.wait()
        logging.finish()
    name = f"artifact {name_of(registry)}:{alias}"
    if logging.offline:
        return f"'wandb sync {logging.settings.sync_dir}' sends {version} to W&B, as {name}"
    return f"W&B has {version} as {name}"


def known_id(run: Path) -> str | None:
    """Return the id of a run in W&B, None where it has none."""
    try:
        return wandb_id(read_record(run))
    except ValueError:
        return None


def move_production(registry: Path) -> str:
    """Let the alias for production stand in W&B for what it stands for here; return a line on it.

    ValueError where W&B refuses it.
    """
    import wandb

    version = resolve(registry, PRODUCTION)
    options = options_of(registry / version)
    again = f"switchlora-runs promote {registry} {version} --wandb"
    if options["mode"] == "offline":
        return f"W&B is offline: WANDB_MODE=online {again} moves {PRODUCTION} there too"
    with refusals(f"{PRODUCTION} was not moved in W&B; {again} tries again"):
        check_login()
        place = [options["project"]] if "project" in options else []
        path = "/".join([*place, f"{name_of(registry)}:{alias_of(version)}"])
        artifact = wandb.Api().artifact(path, type=TYPE)
        ours, theirs = read_about(registry / version), artifact.metadata
        if theirs.get("weights_sha256") != ours["weights_sha256"]:
            raise ValueError(f"{path} is of other weights: another registry has this name there")
        if PRODUCTION not in artifact.aliases:
            artifact.aliases.append(PRODUCTION)
            artifact.save()
    return f"{version} is in {PRODUCTION} in W&B too"


def name_of(registry: Path) -> str:
    """Return the name of a registry's artifacts: that of its folder, as W&B takes names.

    >>> name_of(Path("models/my registry"))
    'my-registry'
    """
    return re.sub(r"[^\w.-]+", "-", registry.resolve().name, flags=re.ASCII)


def alias_of(version: str) -> str:
    """Return the alias by which the artifact of a version is found.

    >>> alias_of("v0012")
    'version-0012'
    """
    return version.replace("v", "version-")


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Raise ValueError, one line on ``what``, for whatever W&B raises."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} ({one_line(error)})") from error
