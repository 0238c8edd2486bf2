"""Published systems as yamls of conf/method: each composes, builds, and says whose it is."""

import re

import pytest
import timm
import torch

from conf_yamls import CONF, build, composed, names
from runs import make_run
from switchlora.adapters import find_targets
from switchlora.learner import Recipe
from switchlora.storage import read_record
from switchlora.sweep import readable

OWN = ("full", "full_short", "guarded", "staged", "too_early", "too_early_guarded", "update_norm")
"""methods of this project, in no paper"""


@pytest.mark.parametrize("method", names("method"))
def test_every_method_composes_builds_and_carries_its_name(method):
    config = composed(f"+method={method}", "data=digits", "model=digits")
    assert config.method == method
    policy = build(config.switch)
    assert callable(policy.criterion) and callable(policy.rank) and callable(policy.init)
    assert all(isinstance(build(recipe), Recipe) for recipe in (config.full, config.adapter))


@pytest.mark.parametrize("method", names("method"))
def test_every_method_says_what_it_is_and_names_its_paper(method):
    package, source, *_ = (CONF / "method" / f"{method}.yaml").read_text().splitlines()
    assert package == "# @package _global_"
    assert source.startswith("# ")
    assert method in OWN or re.search(r"arXiv \d{4}\.\d{5}", source)


def test_lora_divides_alpha_by_the_rank_and_rslora_by_its_root():
    lora, rslora = (build(composed(f"+method={m}").switch).scaling for m in ("lora", "rslora"))
    assert [lora(r) for r in (4, 16)] == [16 / 4, 16 / 16]
    assert [rslora(r) for r in (4, 16)] == [16 / 2, 16 / 4]


def test_a_job_is_named_after_its_method():
    assert readable("+method=lora_plus") == "lora_plus"
    assert readable("experiments=pretrained") == ""


@pytest.mark.parametrize("rank", [4, 8])
def test_lora_of_queries_and_values_trains_these_and_the_head(rank, tmp_path):
    make_run(tmp_path, "+method=lora_qv", f"switch.rank.rank={rank}", "max_updates=1")
    report = read_record(tmp_path).result["switch"]
    ranks = {"q": rank, "k": 0, "v": rank}
    assert report["ranks"] == {f"blocks.0.attn.qkv.{name}": r for name, r in ranks.items()}
    width, classes = 32, 10
    assert report["trainable_after"] == 2 * rank * 2 * width + classes * (width + 1)
    assert report["left_full"] == []


SHARES = {
    "vit_small_patch14_dinov2": (0.35, 0.69),
    "vit_base_patch16_224": (0.18, 0.35),
    "vit_large_patch16_224": (0.13, 0.26),
}


@pytest.mark.parametrize("name", SHARES)
def test_lora_of_queries_and_values_trains_less_than_a_hundredth_of_a_vit(name):
    """The shares in docs/results/pretrained.md, in percent, at rank 4 and 8."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    policy = build(composed("+method=lora_qv").switch)
    targets = find_targets(model, policy.targets, policy.split_qkv)
    adapted = [target for target in targets if not target.endswith(".k")]
    total = sum(parameter.numel() for parameter in model.parameters())
    head = 10 * (model.embed_dim + 1)
    for rank, percent in zip((4, 8), SHARES[name], strict=True):
        trained = len(adapted) * rank * 2 * model.embed_dim + head
        assert 100 * trained / total == pytest.approx(percent, abs=0.006)
