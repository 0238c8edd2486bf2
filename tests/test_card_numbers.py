"""The numbers of a card: the same as those of libraries, and right about how sure they are."""

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    balanced_accuracy_score,
    log_loss,
    roc_auc_score,
    top_k_accuracy_score,
)
from torch.nn import functional as F

from switchlora.analysis.card.accuracy import measure_accuracy
from switchlora.analysis.card.calibration import (
    brier_scores,
    calibration,
    fit_temperature,
    measure_calibration,
)
from switchlora.analysis.card.corruptions import CORRUPTIONS, SEVERITIES
from switchlora.analysis.card.intervals import resampled_mean, wilson
from switchlora.analysis.card.ood import auroc, energy, max_softmax
from switchlora.analysis.card.paired import (
    ALPHA,
    compare,
    holm,
    sign_test,
    smallest_drop,
    verdict,
    yardstick,
)
from switchlora.analysis.card.predictions import Predictions, predictions_of
from switchlora.analysis.card.robustness import beside

CLASSES = 10
NAMES = list("abcdefghij")


def drawn(seed=0, images=600, sharpness=2.0):
    """Logits of a model that is calibrated: labels are drawn from its probabilities."""
    random = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(images, CLASSES, generator=random)
    labels = torch.multinomial(F.softmax(logits, 1), 1, generator=random).squeeze(1)
    return logits, labels


def saying(choices, labels, units=None):
    """Predictions of these classes."""
    logits = 5.0 * F.one_hot(torch.as_tensor(choices), CLASSES).float()
    return Predictions(logits, torch.as_tensor(labels), units or len(labels))


def mistaken(labels, share, random):
    """``labels``, of which a ``share`` became other classes at random."""
    wrong = random.random(len(labels)) < share
    return np.where(wrong, (labels + random.integers(1, CLASSES, len(labels))) % CLASSES, labels)


def test_calibration_and_accuracy_are_those_of_scikit_learn():
    logits, labels = drawn(sharpness=3.0)
    logits = 1.7 * logits
    predicted = Predictions(logits, labels, len(labels))
    found = calibration(predicted)
    probabilities = F.softmax(logits.double(), 1)
    confidence = probabilities.amax(1).numpy()
    accuracy, mean = calibration_curve(predicted.correct, confidence, n_bins=15)
    bins = found["reliability"]
    assert [each["accuracy"] for each in bins] == pytest.approx(accuracy.tolist())
    assert [each["confidence"] for each in bins] == pytest.approx(mean.tolist())
    shares = [each["predictions"] / len(labels) for each in bins]
    error = 100 * np.dot(shares, np.abs(accuracy - mean))
    assert found["ece"]["value"] == pytest.approx(error, abs=1e-3)
    assert found["nll"]["value"] == pytest.approx(log_loss(labels, probabilities), abs=1e-5)
    distance = (probabilities - F.one_hot(labels, CLASSES)).square().sum(1)
    torch.testing.assert_close(
        torch.from_numpy(brier_scores(logits, labels)).double(), distance, rtol=0, atol=1e-5
    )
    measured = measure_accuracy(predicted, NAMES)
    balanced = balanced_accuracy_score(labels, logits.argmax(1))
    assert measured["macro"]["value"] == pytest.approx(100 * balanced)
    top5 = top_k_accuracy_score(labels, logits, k=5)
    assert measured["top5"]["value"] == pytest.approx(100 * top5)


def test_a_temperature_is_found_and_mends_the_calibration_that_it_was_taken_from():
    validation, test = drawn(1), drawn(2)
    sharpened = [
        Predictions(3 * logits, labels, len(labels)) for logits, labels in (validation, test)
    ]
    assert fit_temperature(*validation) == pytest.approx(1.0, abs=0.15)
    found = measure_calibration(sharpened[1], sharpened[0])
    assert found["temperature"] == pytest.approx(3 * fit_temperature(*validation), abs=1e-2)
    assert found["after"]["ece"]["value"] < found["before"]["ece"]["value"] / 2
    left_out = measure_calibration(sharpened[1], "left out: why")
    assert left_out["temperature"] is None and left_out["after"] == {"left_out": "left out: why"}


def test_an_interval_of_the_calibration_error_reaches_down_to_a_calibrated_model():
    """The plug-in error is above 0 by chance alone, and more so on resampled images."""
    found = calibration(Predictions(*drawn(3), 600))["ece"]
    assert found["value"] > 1 and found["low"] < found["value"] / 2


def test_wilsons_interval_is_his_formula_and_never_leaves_0_to_100():
    z, n, share = 1.959964, 36, 30 / 36
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    found = wilson(30, 36)
    assert [found["low"], found["high"]] == pytest.approx(
        [100 * (middle - half), 100 * (middle + half)]
    )
    assert wilson(36, 36)["high"] == 100 and wilson(36, 36)["low"] < 95


def test_a_bootstrap_is_seeded_and_as_wide_as_students_interval():
    values = np.random.default_rng(0).normal(size=400)
    found = resampled_mean(values)
    assert found == resampled_mean(values)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 3), (5, 0), (6, 0), (30, 12)])
def test_mcnemars_test_sums_the_binomial_on_both_sides(lost, won):
    differ, fewer = lost + won, min(lost, won)
    expected = min(1.0, 2 * binom.cdf(fewer, differ, 0.5)) if differ else 1.0
    assert sign_test(lost, won) == pytest.approx(expected)


def test_holms_correction_multiplies_each_p_by_the_tests_that_are_left():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_the_difference_and_its_interval_agree_with_the_test():
    labels = np.zeros(100, dtype=np.int64)
    theirs = saying(np.zeros(100, dtype=np.int64), labels)
    ours = saying(np.r_[np.ones(6, dtype=np.int64), np.zeros(94, dtype=np.int64)], labels)
    found = compare(ours, theirs, NAMES)
    assert (found["lost"], found["won"], found["p"]) == (6, 0, pytest.approx(2 / 64))
    assert found["difference"]["value"] == pytest.approx(-6)
    assert found["difference"]["low"] <= -6 <= found["difference"]["high"] < 0
    assert found["churn"]["value"] == pytest.approx(6)


def test_twins_are_seldom_called_a_regression_and_a_sabotaged_class_always():
    """Over 40 pairs of models of the same quality; the class loses 40 of its points."""
    random = np.random.default_rng(0)
    labels = np.arange(1000) % CLASSES
    alarms = 0
    for number in range(40):
        ours, theirs = (mistaken(labels, 0.08, random) for _ in range(2))
        full = [saying(theirs, labels)]
        alarms += verdict(saying(ours, labels), full, NAMES, "full")["regression"]
        if number < 10:
            hit = (labels == 3) & (random.random(1000) < 0.4)
            said = verdict(saying(np.where(hit, 4, ours), labels), full, NAMES, "full")
            assert said["regression"] and "class d has" in said["sentence"]
    assert alarms <= binom.ppf(0.999, 40, ALPHA), alarms


def test_the_smallest_drop_is_one_that_is_found_four_times_out_of_five():
    random = np.random.default_rng(1)
    images, differ = 2000, 0.08
    drop = smallest_drop(images, round(images * differ), ALPHA) / 100
    lost = (differ + drop) / 2
    draws = random.multinomial(images, [lost, differ - lost, 1 - differ], size=300)
    found = np.mean([sign_test(*draw[:2]) < ALPHA for draw in draws])
    assert 0.7 < found < 0.9
    assert smallest_drop(100, 0, ALPHA) == pytest.approx(6.0, abs=1.0)


def test_beside_two_runs_only_what_is_worse_than_both_counts():
    labels = np.arange(400) % CLASSES
    good, other = saying(labels, labels), saying((labels + (labels < 3)) % CLASSES, labels)
    alone = verdict(other, [good], NAMES, "full training")
    both = verdict(other, [good, saying(other.choices, labels)], NAMES, "full training")
    assert alone["regression"] is True and both["regression"] is False
    assert "regression: top1" in alone["sentence"] and "class a has 0.0 %" in alone["sentence"]
    assert "of which the 2 runs of full training have 30.0 %" in both["sentence"]
    assert yardstick([good]) is None


def test_of_text_windows_are_counted_and_not_their_bytes():
    labels = np.zeros(400, dtype=np.int64)
    worse = np.zeros((100, 4), dtype=np.int64)
    worse[:5] = 1
    ours, theirs = saying(worse.ravel(), labels, 100), saying(labels, labels, 100)
    found = compare(ours, theirs, NAMES)
    assert (found["lost"], found["won"]) == (5, 0) and found["p"] > ALPHA, "20 bytes would be sure"
    assert found["classes"] == [] and not ours.of_images
    assert "worst" not in measure_accuracy(ours, NAMES)


def test_predictions_that_cannot_be_used_are_refused():
    logits, labels = torch.zeros(4, CLASSES), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="at least 2"):
        predictions_of(logits[:1], labels[:1], 1, "x")
    with pytest.raises(ValueError, match="x gives logits that are not finite"):
        predictions_of(logits / 0, labels, 4, "x")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28])
def test_corruptions_follow_from_a_seed_and_grow_with_severity(channels, size):
    smooth = torch.linspace(20, 235, size)
    picture = (smooth.view(-1, 1) * smooth / 235).expand(2, channels, size, size)
    images = picture.round().to(torch.uint8)
    before = torch.get_rng_state()
    for kind in CORRUPTIONS:
        distances = []
        for severity in range(1, SEVERITIES + 1):
            found = kind(images, severity)
            assert found.dtype == torch.uint8 and found.shape == images.shape, kind.name
            assert torch.equal(found, kind(images, severity)), kind.name
            distances.append((found.float() - images.float()).abs().mean().item())
        assert distances[-1] >= distances[0], kind.name
        assert distances[-1] > 0, kind.name
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [4, 8, 28])
def test_each_strength_of_blur_changes_images_of_any_size_more_than_the_one_below(size):
    images = torch.zeros(1, 1, size, size, dtype=torch.uint8)
    images[..., size // 2, size // 2] = 255
    (blur,) = (kind for kind in CORRUPTIONS if kind.name == "blur")
    distances = [0.0]
    for severity in range(1, SEVERITIES + 1):
        distances.append((blur(images, severity).float() - images).abs().sum().item())
    assert distances == sorted(set(distances))


def test_the_corruption_error_of_a_model_beside_itself_is_100_and_twice_it_is_200():
    once = {"noise": np.zeros((SEVERITIES, 40), bool), "blur": np.zeros((SEVERITIES, 40), bool)}
    for missed in once.values():
        missed[:, :10] = True
    twice = {name: np.roll(missed, 10, 1) | missed for name, missed in once.items()}
    assert beside(once, [once, once])["mce"] == pytest.approx(100)
    found = beside(twice, [once])
    assert found["mce"] == pytest.approx(200) and found["difference"]["value"] == pytest.approx(25)


def test_scores_tell_the_certain_from_the_uncertain():
    sure, unsure = 6 * torch.eye(CLASSES).repeat(5, 1), torch.zeros(50, CLASSES)
    for score in (max_softmax, energy):
        assert auroc(score(sure), score(unsure)).value == 1
    random = np.random.default_rng(0)
    known, other = random.normal(0.5, 1, 80).round(1), random.normal(0, 1, 60).round(1)
    found = auroc(known, other)
    expected = roc_auc_score(np.repeat([1, 0], [80, 60]), np.r_[known, other])
    assert found.value == pytest.approx(expected)
    assert found.low < expected < found.high
