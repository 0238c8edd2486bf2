"""The schema of the configuration: what each key takes, checked before anything is built."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from switchlora.config import as_plain, folder_of
from switchlora.errors import check_patterns, is_number
from switchlora.process.distributed import from_primary
from switchlora.process.exits import exit_with_one_line
from switchlora.process.prescribed import tell_overruled
from switchlora.process.words import MEANT, choices_of, known_keys, near_keys

Config = Mapping[str, Any]
LARGEST = 2**31 - 1
"""of whole numbers"""
MOST_PROCESSES = 4096
"""of threads and of workers; more would take the machine down"""


class Kind(NamedTuple):
    """What a key takes: in words, and whether a value is such."""

    words: str
    fits: Callable[[Any], bool]


def number(low: float = -sys.float_info.max, high: float = sys.float_info.max) -> Kind:
    """Return the kind of a number from ``low`` to ``high``."""
    words = "a number"
    if low > -sys.float_info.max:
        words = f"a number of at least {low:g}"
    if high < sys.float_info.max:
        words = f"a number from {low:g} to {high:g}"
    return Kind(words, lambda value: is_number(value) and low <= value <= high)


def whole(low: int, high: int = LARGEST) -> Kind:
    """Return the kind of a whole number from ``low`` to ``high``."""
    words = f"a whole number of at least {low}"
    if high < LARGEST:
        words = f"a whole number from {low} to {high}"
    return Kind(words, lambda value: is_int(value) and low <= value <= high)


def is_int(value: Any) -> bool:
    """Return whether ``value`` is a whole number, and written as one."""
    return isinstance(value, int) and not isinstance(value, bool)


def one_of(*choices: str) -> Kind:
    """Return the kind of a word that is one of ``choices``."""
    return Kind(f"one of {', '.join(choices)}", lambda value: value in choices)


def or_null(kind: Kind) -> Kind:
    """Return the kind of what ``kind`` takes, and of null."""
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.fits(value))


def list_of(kind: Kind, words: str, length: int | None = None, least: int = 0) -> Kind:
    """Return the kind of a list whose elements are of ``kind``."""

    def fits(value: Any) -> bool:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return False
        has_length = len(value) >= least if length is None else len(value) == length
        return has_length and all(map(kind.fits, value))

    return Kind(words, fits)


def or_list(kind: Kind) -> Kind:
    """Return the kind of what ``kind`` takes, and of a list of such."""
    many = list_of(kind, "", least=1)
    return Kind(f"{kind.words}, or a list", lambda value: kind.fits(value) or many.fits(value))


def is_text(value: Any) -> bool:
    """Return whether ``value`` is text that names something."""
    return isinstance(value, str) and bool(value.strip())


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("text", is_text)
NAME = Kind("a name", lambda value: is_text(value) or is_int(value))
POSITIVE = Kind("a number above 0", lambda value: is_number(value) and value > 0)
SHARE = Kind("a share above 0, at most 1", lambda value: is_number(value) and 0 < value <= 1)
BELOW_ONE = Kind("a share from 0 to below 1", lambda value: is_number(value) and 0 <= value < 1)
INSIDE = Kind("a share above 0 and below 1", lambda value: is_number(value) and 0 < value < 1)
OPTIONS = Kind("options by name", lambda value: isinstance(value, Mapping))
PATTERNS = list_of(TEXT, "a list of regular expressions")
NAMES = list_of(NAME, "a list of names")
NUMBERS = list_of(number(), "a list of numbers, one a channel", least=1)
SPREADS = list_of(POSITIVE, "a list of numbers above 0, one a channel", least=1)
SIZES = or_list(whole(1))
PAIRS = list_of(
    list_of(number(0), "", length=2), "a list of pairs [share of the targets left, factor]"
)
SECTIONS_LISTED = list_of(OPTIONS, "a list of criteria", least=1)
SIGNALS = ("grad_norm", "weight_norm", "update_norm")
COMPILE = Kind(
    "auto, true, false, null, graphs, or arguments of torch.compile in quotes, "
    "'full.compile={mode: default}'",
    lambda value: value in ("auto", "graphs", None) or isinstance(value, bool | Mapping),
)
WINDOW = Kind(
    "a number of updates, or 'epoch'", lambda value: value == "epoch" or whole(1).fits(value)
)

FACTOR_LR = Kind(
    "matched, or a number above 0", lambda value: value == "matched" or POSITIVE.fits(value)
)
RANK = Kind(
    "a whole number of at least 1, or a share above 0 and below 1",
    lambda value: whole(1).fits(value) or INSIDE.fits(value),
)

KINDS: dict[str, Kind] = {
    "name": NAME,
    "method": or_null(NAME),
    "seed": whole(0),
    "epochs": whole(1),
    "length": SHARE,
    "max_updates": or_null(whole(1)),
    "max_skipped": whole(0),
    "init_checkpoint": or_null(TEXT),
    "init_adapter": or_null(TEXT),
    "resume": or_null(TEXT),
    "objectives": list_of(TEXT, "a list of keys of summary.json", least=1),
    "ema": or_null(BELOW_ONE),
    "trunk.dir": or_null(TEXT),
    "trunk.gigabytes": number(0),
    "trunk.time_share": SHARE,
    "trunk.wait": FLAG,
    "checkpoint.every_updates": or_null(whole(1)),
    "checkpoint.every_minutes": or_null(number(0)),
    "checkpoint.keep": whole(0),
    "monitor.window": WINDOW,
    "monitor.device": TEXT,
    "monitor.iterations": whole(1),
    "monitor.exact": FLAG,
    "monitor.leading": whole(1),
    "monitor.bases": FLAG,
    "system.device": TEXT,
    "system.threads": or_null(whole(0, MOST_PROCESSES)),
    "system.workers": whole(0, MOST_PROCESSES),
    "system.pin_memory": FLAG,
    "system.tf32": FLAG,
    "system.deterministic": FLAG,
    "system.parallel": one_of("ddp", "fsdp"),
    "system.compress": or_null(one_of("bf16")),
    "system.jobs_per_gpu": whole(1),
    "log.every": whole(1),
    "log.progress": FLAG,
    "log.cost_model": FLAG,
    "log.figures": FLAG,
    "log.wandb.mode": or_null(one_of("offline", "online", "disabled")),
    "log.wandb.project": or_null(NAME),
    "log.wandb.name": or_null(NAME),
    "log.wandb.group": or_null(NAME),
    "log.wandb.tags": NAMES,
    "log.sinks.mlflow.tracking_uri": or_null(TEXT),
    "log.sinks.mlflow.experiment": or_null(NAME),
    "log.sinks.mlflow.name": or_null(NAME),
    "log.sinks.mlflow.model": FLAG,
    "data.root": TEXT,
    "data.path": or_null(TEXT),
    "data.context": whole(1),
    "data.num_classes": whole(1),
    "data.in_chans": whole(1),
    "data.image_size": whole(1),
    "data.mean": NUMBERS,
    "data.std": SPREADS,
    "data.batch_size": whole(1),
    "data.val_fraction": INSIDE,
    "data.test_fraction": INSIDE,
    "data.train_size": or_null(whole(1)),
    "data.eval_size": or_null(whole(1)),
    "data.skip_unreadable": FLAG,
    "data.leakage": one_of("warn", "refuse", "off"),
    "data.crop_padding": whole(0),
    "data.hflip": number(0, 1),
    "data.train_transform": or_null(OPTIONS),
    "data.eval_transform": or_null(OPTIONS),
    "data.mixup_alpha": number(0),
    "data.cutmix_alpha": number(0),
    "data.label_smoothing": BELOW_ONE,
    "data.train.name": TEXT,
    "data.train.root": TEXT,
    "data.train.split": TEXT,
    "data.train.train": FLAG,
    "data.train.size": whole(1),
    "data.train.image_size": SIZES,
    "data.train.num_classes": whole(1),
    "data.train.random_offset": whole(0),
    "model.name": TEXT,
    "model.num_classes": whole(1),
    "model.in_chans": whole(1),
    "model.img_size": or_null(SIZES),
    "model.patch_size": SIZES,
    "model.embed_dim": SIZES,
    "model.depth": SIZES,
    "model.num_heads": SIZES,
    "model.mlp_ratio": or_list(POSITIVE),
    "model.context": whole(1),
    "model.vocabulary": whole(256),
    "full.weight_decay": number(0),
    "full.decoupled_weight_decay": FLAG,
    "full.factor_weight_decay": number(0),
    "full.lr_scale": POSITIVE,
    "full.factor_lr": FACTOR_LR,
    "full.matched_step": POSITIVE,
    "full.factor_B_lr_scale": POSITIVE,
    "full.frobenius_decay": number(0),
    "full.rewarmup_updates": or_null(whole(0)),
    "full.clip_grad": or_null(POSITIVE),
    "full.accumulation": whole(1),
    "full.precision": one_of("auto", "fp32", "bf16", "fp16"),
    "full.compile": COMPILE,
    "full.activation_checkpointing": or_null(one_of("blocks", "gelu")),
    "full.refactoring.warmup_updates": whole(0),
    "full.refactoring.interval": whole(1),
    "full.refactoring.start_balance": or_null(number(0)),
    "full.refactoring.eps": SHARE,
    "full.refactoring.reset_moments": FLAG,
    "full.refactoring.damping": POSITIVE,
    "full.refactoring.ratio": SHARE,
    "full.refactoring.frozen": whole(0),
    "full.before_ddp.patterns": PATTERNS,
    "full.optimizer.lr": number(0),
    "full.optimizer.betas": list_of(BELOW_ONE, "two shares from 0 to below 1", length=2),
    "full.optimizer.momentum": BELOW_ONE,
    "full.optimizer.nesterov": FLAG,
    "full.optimizer.eps": number(0),
    "full.optimizer.rank": RANK,
    "full.optimizer.interval": whole(1),
    "full.optimizer.scale": POSITIVE,
    "full.optimizer.scaling": one_of("channel", "tensor"),
    "full.optimizer.weight_decay": number(0),
    "full.scheduler.t_in_epochs": FLAG,
    "full.scheduler.warmup_t": whole(0),
    "full.scheduler.warmup_lr_init": number(0),
    "full.scheduler.lr_min": number(0),
    "switch.targets": PATTERNS,
    "switch.split_qkv": FLAG,
    "switch.keep": PATTERNS,
    "switch.freeze": PATTERNS,
    "switch.earliest": whole(0),
    "switch.latest": or_null(whole(0)),
    "switch.train_factors": or_null(list_of(one_of("A", "B"), "[A, B] or [B]", least=1)),
    "switch.residual_dtype": or_null(one_of("bf16", "int8", "fp8", "nf4")),
    "switch.dropout": BELOW_ONE,
    "switch.joint_epochs": number(0),
    "switch.least_gain": or_null(number(0)),
    "switch.moments": one_of("surviving", "factors", "reset"),
    "switch.remove_weight_decay": FLAG,
    "switch.max_drift": number(0),
    "switch.max_rounding_drift": number(0),
    "switch.criterion.criteria": SECTIONS_LISTED,
    "switch.criterion.epoch": number(0),
    "switch.criterion.fraction": number(0),
    "switch.criterion.patience": whole(1),
    "switch.criterion.quorum": SHARE,
    "switch.criterion.tolerance": number(),
    "switch.criterion.share": or_null(SHARE),
    "switch.criterion.slope": number(0),
    "switch.criterion.free_share": SHARE,
    "switch.criterion.least": number(0),
    "switch.criterion.tau": number(0),
    "switch.criterion.zeta": number(0),
    "switch.criterion.windows": whole(2),
    "switch.criterion.signal": one_of("weight_norm", "update_norm"),
    "switch.criterion.counter": or_null(list_of(whole(1), "two whole numbers", length=2)),
    "switch.criterion.shared_output": FLAG,
    "switch.criterion.epsilon": number(0),
    "switch.criterion.of": one_of("weight", "update"),
    "switch.criterion.relative": FLAG,
    "switch.criterion.relaxed": PAIRS,
    "switch.criterion.integer": FLAG,
    "switch.criterion.threshold": SHARE,
    "switch.criterion.delay": whole(0),
    "switch.rank.rank": whole(1),
    "switch.rank.share": SHARE,
    "switch.rank.captured": or_null(SHARE),
    "switch.rank.ratio": SHARE,
    "switch.rank.relative": FLAG,
    "switch.rank.r_min": whole(0),
    "switch.rank.r_max": or_null(whole(1)),
    "switch.rank.power_of_two": FLAG,
    "switch.rank.signal": one_of(*SIGNALS),
    "switch.rank.mode": one_of("family", "all"),
    "switch.rank.of": one_of("weight", "update"),
    "switch.rank.multiplier": number(0),
    "switch.rank.scaled": FLAG,
    "switch.rank.lowest": number(0, 1),
    "switch.rank.accumulative": or_null(SHARE),
    "switch.init.gain": POSITIVE,
    "switch.scaling.alpha": POSITIVE,
    "switch.adapter.stochastic": FLAG,
    "switch.adapter.share": SHARE,
    "switch.stages.by": one_of("target", "family", "block"),
    "switch.stages.interval": whole(0),
    "switch.stages.least": whole(1),
    "switch.stages.still": or_null(number()),
    "switch.restart.every_epochs": POSITIVE,
    "switch.restart.rewarmup_updates": or_null(whole(0)),
    "switch.restart.cutoff": SHARE,
    "switch.restart.step": SHARE,
    "switch.restart.prune": one_of("random", "magnitude", "zero"),
    "switch.restart.pruned": SHARE,
    "switch.growth.every_updates": whole(1),
    "switch.growth.earliest": whole(0),
    "switch.growth.threshold": SHARE,
    "switch.growth.buffer": whole(1),
    "switch.growth.most": SHARE,
    "switch.guard.tolerance": number(0),
    "switch.guard.patience": whole(1),
    "switch.guard.act": one_of("warn", "ranks", "full"),
    "switch.guard.growth": whole(2),
    "switch.guard.rewarmup_updates": whole(0),
    "switch.guard.most": whole(1),
}
"""what each key takes; ``ALIKE`` leads further keys to these"""
ALIKE = (
    (re.compile(r"^adapter(?=\.|$)"), "full"),
    (re.compile(r"^data\.test(?=\.|$)"), "data.train"),
    (re.compile(r"^switch\.guard\.criterion"), "switch.criterion"),
    (re.compile(r"^switch\.restart\.init"), "switch.init"),
    (re.compile(r"(\.criteria\.\d+)+"), ""),
)
BUILDERS = {"_target_": TEXT, "_partial_": FLAG, "_convert_": TEXT, "_recursive_": FLAG}
"""keys of any section that say how it is built"""
PLAIN = ("trunk", "checkpoint", "monitor", "system", "log", "log.wandb", "log.sinks")
"""sections that build nothing"""
MAY_BE_NULL = (
    *("full.refactoring", "full.before_ddp", "adapter.refactoring", "adapter.before_ddp"),
    *("switch.stages", "switch.restart", "switch.restart.init", "switch.growth"),
    *("switch.guard", "switch.guard.criterion"),
)
"""sections that a run can do without"""
OPEN = ("model", "data.train", "full.optimizer", "full.scheduler", "log.wandb")
"""sections of which the code behind them may know further keys"""
OWN = ("switchlora.", "timm.", "torch.", "torchvision.")
"""what a ``_target_`` begins with whose keys are those of ``KINDS``"""


def sections() -> Iterator[str]:
    """Yield what stands before the dots of the keys."""
    for key in KINDS:
        words = key.split(".")
        for count in range(1, len(words)):
            yield ".".join(words[:count])


SECTIONS = frozenset(sections()) | {"log.sinks.tensorboard"}
PACKAGES = {
    "switchlora.storage.TensorBoard": "tensorboard",
    "switchlora.storage.MLflow": "mlflow",
}
"""by what is built, the package that it needs and that no run needs otherwise"""


def kind_of(key: str) -> Kind | None:
    """Return what ``key`` takes; None where that is not known."""
    return KINDS.get(canonical(key))


def canonical(key: str) -> str:
    """Return the key that takes the same as ``key``.

    >>> canonical("adapter.clip_grad"), canonical("switch.criterion.criteria.0.epoch")
    ('full.clip_grad', 'switch.criterion.epoch')
    """
    for pattern, other in ALIKE:
        key = pattern.sub(other, key)
    return key


def check_values(config: Config) -> None:
    """Raise ValueError for an unknown key, a missing one, or a value that its key does not take.

    Raise it also for a key of ``full`` that the adapter phase would not follow. What a
    ``_target_`` of the user's own is called with is not checked.
    """
    check_complete(config)
    check_keys(config, "")
    check_sinks(config["log"].get("sinks") or {})
    for section in ("optimizer", "scheduler"):
        check_followed(config, section)


def check_complete(config: Config) -> None:
    """Raise ValueError for a key that every run reads and that ``config`` lacks."""
    for name in ("data", "model", "full", "adapter", "switch", "system", "log"):
        if name not in config:
            raise ValueError(f"{name} is missing: a run cannot do without it")
    for key, known in known_keys().items():
        if known.owner not in ("", "system=default", "log=default"):
            continue
        section: Any = config
        for word in key.split("."):
            if isinstance(section, Mapping) and word not in section:
                raise ValueError(f"{key} is missing: set it, or leave it as it was")
            section = section[word] if isinstance(section, Mapping) else None


def check_keys(config: Config, above: str) -> None:
    """Raise ValueError for what is wrong in a section; ``above`` stands before its keys."""
    for name, value in config.items():
        key = f"{above}{name}"
        if is_foreign(value):
            continue
        kind = BUILDERS.get(str(name)) or kind_of(key)
        if kind is not None:
            check_value(key, value, kind)
            check_listed(key, value)
        elif canonical(key) in SECTIONS:
            check_section(key, value)
        elif canonical(above.rstrip(".")) not in OPEN:
            raise ValueError(f"there is no key '{key}'; {near_keys(key)}")


def check_value(key: str, value: Any, kind: Kind) -> None:
    """Raise ValueError unless ``value`` is what ``key`` takes."""
    if kind.fits(value):
        if kind is PATTERNS:
            check_patterns(key, value)
        return
    if is_int(value) and abs(value) > LARGEST:
        raise ValueError(f"{key} is {value}: the largest number that it takes is {LARGEST}")
    if isinstance(value, str) and kind.fits([value]):
        raise ValueError(f"{key} is '{value}': give a list, [{value}]")
    verb = "choose" if kind.words.startswith("one of") else "give"
    raise ValueError(f"{key} is {written(value)}: {verb} {kind.words}")


def check_sinks(sinks: Config) -> None:
    """Raise ValueError for a sink whose package is not installed."""
    for name, section in sinks.items():
        package = PACKAGES.get(section["_target_"])
        if package is not None and find_spec(package) is None:
            raise ValueError(f"log/sinks={name} needs a package: pip install {package}")


def check_listed(key: str, value: Any) -> None:
    """Check each section of a list of them."""
    if key.endswith(".criteria"):
        for place, section in enumerate(value):
            if not is_foreign(section):
                check_keys(section, f"{key}.{place}.")


def check_section(key: str, value: Any) -> None:
    """Raise ValueError unless the value of ``key`` is a section, all of whose keys are right."""
    if isinstance(value, Mapping):
        if key not in PLAIN and "_target_" not in value:
            raise ValueError(f"{key} has no _target_, which names what it builds")
        check_keys(value, f"{key}.")
        return
    if value is None and key in MAY_BE_NULL:
        return
    group = key.replace(".", "/")
    if choices := choices_of(group, (folder_of("conf"),)):
        wanted = f"it is a group: write {group}=CHOICE, one of {', '.join(choices)}"
    elif key in MEANT:
        wanted = f"write {MEANT[key]}"
    else:
        wanted = f"it holds {', '.join(keys_in(key))}; set one of these"
    raise ValueError(f"{key} is {written(value)}: {wanted}")


def keys_in(section: str) -> list[str]:
    """Return the keys of a section."""
    inside = [key for key in KINDS if key.startswith(f"{canonical(section)}.")]
    return [key.replace(canonical(section), section, 1) for key in inside]


def check_followed(config: Config, section: str) -> None:
    """Raise ValueError for a key that a yaml adds to ``section`` of the full phase alone."""
    full, adapter = config["full"].get(section), config["adapter"].get(section)
    if not full or not adapter or full.get("_target_") != adapter.get("_target_"):
        return
    for name in full.keys() - adapter.keys():
        key = f"full.{section}.{name}"
        raise ValueError(
            f"the adapter phase does not follow {key}, which is new: set "
            f"adapter.{section}.{name} too, to a value or to '${{{key}}}'"
        )


def is_foreign(value: Any) -> bool:
    """Return whether a section is built by code that is not known here."""
    target = value.get("_target_") if isinstance(value, Mapping) else None
    return isinstance(target, str) and not target.startswith(OWN)


def written(value: Any) -> str:
    """Return a value as a command line has it, with quotes around text."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


class CheckFirst(Callback):
    """Check the configuration before the folder of the run is made: a Hydra callback."""

    new_folders: ClassVar[list[Path]] = []
    """the folder of the run, if there was none before, and those above it that are as new"""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Leave with one line for a configuration that no run can have."""
        try:
            names = [str(name) for name in config if name != "hydra"]
            settings = OmegaConf.masked_copy(config, names)
            tell_overruled(settings, config.hydra)
            check_values(as_plain(settings))
            folder = Path(config.hydra.run.dir).absolute()
        except Exception as error:
            exit_with_one_line(error)
        CheckFirst.new_folders = not_yet_there(folder)


def not_yet_there(folder: Path) -> list[Path]:
    """Return what is ``missing`` for the primary rank, before any rank makes it."""
    return from_primary(lambda: missing(folder))


def missing(folder: Path) -> list[Path]:
    """Return those of ``folder`` and the folders above it that are not there."""
    return [path for path in (folder, *folder.parents) if not path.exists()]
