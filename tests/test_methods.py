"""Published systems as yamls of conf/method: each composes, builds, and says whose it is."""

import re

import pytest

from conf_yamls import CONF, build, composed, names
from switchlora.learner import Recipe
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
