"""What a card says, section by section: the same in Markdown and on a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Found = Mapping[str, Any]
Rows = list[list[str]]
"""a table; its first row is the header"""
MIB = 2**20
SHOWN_MATRIX = 20
"""classes up to which the matrix of confusions is shown"""


@dataclass(frozen=True)
class Section:
    """One part of a card."""

    key: str
    title: str
    sentences: Sequence[str]
    tables: Sequence[Rows] = ()


def sections(card: Found) -> list[Section]:
    """Return all parts of a card."""
    return [
        accuracy(card["accuracy"], card),
        against(card["against"], card["verdict"]),
        calibration(card["calibration"]),
        robustness(card["robustness"]),
        ood(card["ood"]),
        cost(card["cost"]),
        model(card),
    ]


def percent(found: Found, digits: int = 2) -> str:
    """Return a number in % with its interval."""
    value, low, high = (f"{found[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} % ({low} to {high})"


def plain(found: Found, digits: int = 4) -> str:
    """Return a number with its interval."""
    value, low, high = (f"{found[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def accuracy(found: Found, card: Found) -> Section:
    """Return the part on accuracy."""
    rows = [["", "value (95 % interval)"]]
    titles = {"top1": "top1", "top5": "top5", "macro": "mean over classes"}
    for key, title in titles.items():
        if key in found:
            rows.append([title, percent(found[key])])
    inputs = f"{card['images']:,} {card['inputs']} of {card['data']['words']}"
    if "worst" not in found:
        told = "Intervals come from resampled windows. Classes are left out: they are bytes."
        return Section("accuracy", "Accuracy", [f"On {inputs}. {told}"], [rows])
    interval = "Intervals of shares are Wilson's, that of the mean comes from resampled images."
    worst = [["class, the worst first", "images", "right (95 % interval)"]]
    for each in found["worst"]:
        worst.append([each["class"], f"{each['images']:,}", percent(each["accuracy"], 1)])
    confused = [["class, most confused first", "taken for", "images"]]
    for each in found["confusion"]["most"]:
        confused.append([each["class"], each["predicted"], f"{each['images']:,}"])
    lowest = found["worst"][0]
    named = f"The worst class is {lowest['class']}: {percent(lowest['accuracy'], 1)}."
    return Section(
        "accuracy", "Accuracy", [f"On {inputs}. {interval} {named}"], [rows, worst, confused]
    )


def against(found: Sequence[Found], verdict: Found) -> Section:
    """Return the part on the comparison with other runs."""
    title = "Against full training"
    if not found:
        return Section("against", title, [sentence(verdict["sentence"])])
    rows = [
        [
            *("run", "top1", "difference, points", "only it is right", "only this is right", "p"),
            *("churn", "smallest drop, points"),
        ]
    ]
    for each in found:
        gap = each["difference"]
        ends = f"({gap['low']:+.2f} to {gap['high']:+.2f})"
        rows.append(
            [
                each["name"],
                f"{each['top1']:.2f} %",
                f"{gap['value']:+.2f} {ends}",
                f"{each['lost']:,}",
                f"{each['won']:,}",
                f"{each['p']:.2g}",
                percent(each["churn"], 1),
                f"{each['smallest_drop']:.1f}",
            ]
        )
    tables = [rows]
    worse = [["run", "class", "images", "right there", "right here", "p after Holm"]]
    for each in found:
        for one in each["classes"]:
            numbers = [f"{one['before']:.1f} %", f"{one['after']:.1f} %", f"{one['p_holm']:.2g}"]
            worse.append([each["name"], one["class"], f"{one['images']:,}", *numbers])
    if len(worse) > 1:
        tables.append(worse)
    return Section("against", title, [RULE], tables)


RULE = (
    "A regression is a top1, or a class after Holm's correction, that is worse than in every run "
    "compared with (McNemar's exact test, p below 0.05). The smallest drop is one that the test "
    "finds four times out of five. Churn is the share of predictions that differ."
)


def calibration(found: Found) -> Section:
    """Return the part on calibration."""
    rows = [["", "as trained", "after temperature scaling"]]
    before, after = found["before"], found["after"]
    forms = {"ece": ("calibration error", percent), "nll": ("NLL, nats", plain)}
    forms["brier"] = ("Brier score", plain)
    for key, (title, form) in forms.items():
        scaled = form(after[key]) if key in after else "–"
        rows.append([title, form(before[key]), scaled])
    told = f"Expected calibration error over {found['bins']} bins of confidence."
    if found["temperature"] is None:
        told += f" Temperature scaling is {after['left_out']}."
    else:
        told += (
            f" The temperature {found['temperature']:.3f} was fitted on "
            f"{found['validation_images']:,} validation inputs, never on test."
        )
    return Section("calibration", "Calibration", [told], [rows])


def robustness(found: Found) -> Section:
    """Return the part on corruptions."""
    title = "Robustness"
    if "left_out" in found:
        return Section("robustness", title, [sentence(found["left_out"])])
    rows = [["corruption", *(f"severity {n}, %" for n in range(1, 6)), "mean, %"]]
    for each in found["corruptions"]:
        numbers = [*each["error"], each["mean"]]
        rows.append([each["corruption"], *(f"{number:.1f}" for number in numbers)])
    told = (
        f"Mean error on corrupted images: {percent(found['mean'], 1)}; on clean ones "
        f"{found['clean_error']:.1f} %. {found['images']:,} images."
    )
    sentences = [told]
    if "difference" in found:
        gap = found["difference"]
        sentences.append(
            f"That is {gap['value']:+.2f} points ({gap['low']:+.2f} to {gap['high']:+.2f}) beside "
            f"the runs compared with; mCE {shown(found['mce'])}, where 100 is as good as they are."
        )
    if "not_for_these_channels" in found:
        kinds = ", ".join(found["not_for_these_channels"])
        sentences.append(f"Left out, since they need 1 or 3 channels: {kinds}.")
    if "not_compared" in found:
        paths = ", ".join(found["not_compared"])
        sentences.append(f"Not compared here, since they see images of another size: {paths}.")
    return Section("robustness", title, sentences, [rows])


def ood(found: Found) -> Section:
    """Return the part on images of other data."""
    title = "Out-of-distribution detection"
    if "left_out" in found:
        return Section("ood", title, [sentence(found["left_out"])])
    rows = [["model", "largest probability, AUROC", "energy, AUROC"]]
    models = {"this model": found}
    for each in found["against"]:
        models[each["name"]] = each
    for name, each in models.items():
        rows.append([name, plain(each["max_softmax"], 3), plain(each["energy"], 3)])
    told = f"Telling test images from {found['images']:,} of `{found['data']}`; 0.5 is a guess."
    return Section("ood", title, [told], [rows])


def cost(found: Found) -> Section:
    """Return the part on cost in use."""
    sizes = [["on the disk", "MiB"]]
    titles = {"weights": "weights", "adapter": "adapter", "adapter_bf16": "adapter in bf16"}
    for key, title in titles.items():
        if key in found["bytes"]:
            sizes.append([title, f"{found['bytes'][key] / MIB:,.3f}"])
    sentences = [f"{found['parameters']:,} parameters."]
    if "left_out" in found["latency"]:
        return Section(
            "cost", "Cost in use", [*sentences, sentence(found["latency"]["left_out"])], [sizes]
        )
    rows = [["form", "batch", "p50, ms", "p95, ms"]]
    for each in found["latency"]:
        times = [f"{each[key]:.2f}" for key in ("p50_ms", "p95_ms")]
        rows.append([each["form"], str(each["batch"]), *times])
    sentences.append(f"Timed on {found['device']}, {found['threads']} threads; forms take turns.")
    sentences.append(f"torch.compile: {found['compile']}.")
    if "unmerged" in found:
        sentences.append(f"Unmerged adapter: {found['unmerged']['sentence']}.")
    onnx = found["onnx"]
    sentences.append(f"ONNX: {onnx.get('left_out') or onnx['sentence']}.")
    return Section("cost", "Cost in use", sentences, [rows, sizes])


def model(card: Found) -> Section:
    """Return the part on where the numbers come from."""
    found, data = card["model"], card["data"]
    rows = [["", ""]]
    rows.append(["weights", found["source"]])
    rows.append(["sha256", card["source_sha256"]])
    rows.append(["data", f"{data['name']}, {data['words']}"])
    rows.append(["digest of the test split", data["digest"] or "–"])
    for key, title in FACTS.items():
        if found.get(key) is not None:
            value = found[key]
            rows.append([title, f"{value:,}" if isinstance(value, int) else str(value)])
    rows.append(["written by", f"switchlora {card['switchlora_version']}"])
    return Section("model", "Provenance", [], [rows])


FACTS = {
    "name": "model",
    "method": "method",
    "seed": "seed",
    "status": "status of the run",
    "num_updates": "updates",
    "switch_update": "switch after update",
    "train_flops": "training FLOPs",
    "git": "commit of the run",
}
"""by key, how what is known of the run is called"""


def sentence(text: str) -> str:
    """Return a text that begins with a capital letter and ends with a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def shown(value: float | None) -> str:
    """Return a number with one digit, or a dash."""
    return "–" if value is None else f"{value:.1f}"
