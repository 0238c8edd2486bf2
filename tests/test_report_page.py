"""The page of a sweep, on real runs."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from statistics import fmean, median

import pytest

from runs import BY_DATE, make_run
from switchlora.analysis.page.curves import MOST_POINTS, Curve, family_medians, panel
from switchlora.analysis.page.page import main, write_page
from switchlora.analysis.page.parts import changes, differing_settings, problems, rank_maps, reused
from switchlora.analysis.timeline import Change
from switchlora.storage import find_records, read_record

HOSTILE = 'stopped: <script>alert(1)</script> & "quoted" {{ 1 }}'
COMPARED = """<script>
const table = document.querySelector(".sortable");
const headers = [...table.querySelectorAll("th[scope=col]")];
const header = headers.find((each) => each.textContent.includes("val top1"));
const shown = () => [...table.tBodies[0].rows].map((r) => r.cells[header.cellIndex].dataset.value);
header.querySelector("button").click();
const rising = [header.ariaSort, shown()];
header.querySelector("button").click();
const wide = document.documentElement.scrollWidth - innerWidth;
document.title = "SEEN" + JSON.stringify({rising, falling: [header.ariaSort, shown()], wide});
</script></body>"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Full training, a switch by date with two seeds, and four jobs that came to no good end."""
    folder = tmp_path_factory.mktemp("page") / "sweep"
    make_run(folder / "full", "model.depth=2", "switch/criterion=never", "epochs=2")
    for seed in (0, 1):
        make_run(folder / f"date-{seed}", *BY_DATE, "model.depth=2", "epochs=2", f"seed={seed}")
    for name, seed in (("killed", 2), ("torn", 3), ("stopped <b>&", 4)):
        shutil.copytree(folder / "date-0", folder / name)
        config = folder / name / "config.yaml"
        config.write_text(config.read_text().replace("\nseed: 0", f"\nseed: {seed}"))
    (folder / "killed" / "summary.json").unlink()
    (folder / "torn" / "summary.json").unlink()
    log = folder / "torn" / "metrics.jsonl"
    log.write_text(log.read_text()[:-40] + "\n")
    rewrite(folder / "stopped <b>&", status=HOSTILE)
    rewrite(folder / "date-1", trunk={"folder": "t", "reused_updates": 30, "reused_seconds": 1.5})
    (folder / "dead" / ".hydra").mkdir(parents=True)
    (folder / "trunk").mkdir()
    return folder


@pytest.fixture(scope="module")
def page(sweep):
    """The text of its page."""
    return write_page(sweep, sweep / "report.html").read_text()


def rewrite(folder, **changes):
    """Change a summary."""
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Tags(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_asks_for_nothing_from_outside(page):
    tags = Tags(page).found
    assert not {tag for tag, _ in tags} & {"link", "img", "iframe", "object", "base"}
    targets = [v for _, attrs in tags for k, v in attrs.items() if k.endswith(("href", "src"))]
    assert targets and all(target.startswith("#") for target in targets)
    assert not re.search(r"@import|url\((?!#)|fetch\(|https?://(?!www\.w3\.org/)", page)


def test_every_reference_on_the_page_meets_exactly_one_id(page):
    tags = Tags(page).found
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    wanted = {v[1:] for _, attrs in tags for k, v in attrs.items() if k.endswith("href")}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", page))
    wanted |= {attrs["aria-labelledby"] for _, attrs in tags if "aria-labelledby" in attrs}
    assert wanted <= set(ids)


def test_what_runs_say_is_shown_as_text(page):
    assert "<script>alert" not in page and "<b>&<" not in page
    assert "stopped &lt;b&gt;&amp;" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;quoted&#34; {{ 1 }}" in page


def test_a_cell_shows_and_sorts_by_the_mean_over_seeds(sweep, page):
    tops = [read_record(sweep / f"date-{seed}").summary["val"]["top1"] for seed in (0, 1)]
    assert f'data-value="{fmean(tops)!r}">{fmean(tops):.2f} ± ' in page


def test_runs_without_a_good_end_are_named_with_their_reason(sweep):
    told = dict(problems(sweep, find_records([sweep])))
    assert set(told) == {"killed", "torn", "stopped <b>&", "dead"}
    assert told["killed"].endswith("killed; last event at update 40")
    assert "damaged after update" in told["torn"]
    assert told["stopped <b>&"] == HOSTILE
    assert "failed at its start" in told["dead"]


def test_a_curve_is_the_median_over_the_layers_of_a_family(sweep):
    record = read_record(sweep / "full")
    curve = family_medians(record, 0)["relative_update_norm"]["mlp.fc1"]
    for place, measured in enumerate(record.history()):
        values = [s.relative_update_norm for n, s in measured.layers.items() if "fc1" in n]
        assert curve.values[place] == pytest.approx(100 * median(values))
        assert curve.updates[place] == measured.num_updates


def test_every_chart_has_a_line_for_each_readable_run_and_a_dot_for_each_switch(page):
    charts = re.findall(r'<svg role="img" aria-label="[^"]*a line for.*?</svg>', page, re.DOTALL)
    assert len(charts) == 3 * 4 + 2 and "difference to full training" in page
    for chart in charts:
        assert len(re.findall(r'-g\d+-\d+"', chart)) == 5
        assert len(re.findall(r'-g\d+-\d+-switch"', chart)) == 4


def test_each_change_that_a_curve_reaches_has_a_mark_of_its_own():
    kinds = (("switch", 10), ("restart", 15), ("grow", 20), ("grow", 30), ("take_back", 90))
    curve = Curve(0, [5, 40], [1.0, 2.0], [Change(*each) for each in kinds])
    ids = re.findall(r'id="x-(g0[^"]*)"', panel([curve], "x", "a chart", None))
    assert ids == ["g0-0", "g0-0-switch", "g0-0-grow", "g0-0-grow-1"]


def test_all_changes_of_a_run_are_listed_by_kind(sweep, tmp_path):
    shutil.copytree(sweep / "date-0", tmp_path / "run")
    told = [{"kind": kind, "num_updates": n} for kind, n in (("switch", 9), ("take_back", 1234))]
    rewrite(tmp_path / "run", transitions=told)
    assert changes(read_record(tmp_path / "run")) == "switch 9; take back 1,234"
    page = write_page(tmp_path, tmp_path / "page.html").read_text()
    assert "all changes, updates" in page and "<td>switch 9; take back 1,234</td>" in page


def test_a_long_curve_is_thinned_but_keeps_its_ends():
    curve = Curve(0, range(10_000), [float("nan"), *range(1, 10_000)]).thinned()
    assert len(curve.values) == MOST_POINTS
    assert (curve.values[0], curve.values[-1]) == (1, 9_999)


def test_the_rank_maps_hold_every_rank_of_every_run_that_switched(sweep):
    records = find_records([sweep])
    maps = {each.family: each for each in rank_maps(records)}
    ranks = read_record(sweep / "date-1").summary["switch"]["ranks"]
    assert sum(len(each.blocks) for each in maps.values()) == len(ranks)
    row = dict(maps["attn.qkv"].rows)["at_epoch, seed 1"]
    assert [cell.text for cell in row] == [str(ranks[f"blocks.{i}.attn.qkv"]) for i in range(2)]
    assert not any("full" in name for name in dict(maps["attn.qkv"].rows))


def test_only_settings_that_differ_are_listed(sweep):
    records = [read_record(sweep / f"date-{seed}") for seed in (0, 1)]
    keys, rows = differing_settings(records)
    assert keys == ["seed"] and [values for _, values in rows] == [["0"], ["1"]]


def test_updates_taken_from_a_shared_trunk_are_told(sweep, page):
    told = reused(read_record(sweep / "date-1"))
    assert "the first 30 updates (1.5 s) come from t" in told and told in page
    assert reused(read_record(sweep / "date-0")) is None


def test_a_sweep_without_finished_runs_has_a_page(sweep, tmp_path):
    shutil.copytree(sweep / "killed", tmp_path / "killed")
    assert "No run has finished yet." in write_page(tmp_path, tmp_path / "x.html").read_text()


def test_the_command_prints_the_path_and_gives_the_same_bytes_again(
    sweep, page, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", str(sweep), "--out", "x/page.html"])
    main()
    assert capsys.readouterr().out == "x/page.html\n"
    assert (tmp_path / "x" / "page.html").read_text() == page


def test_a_folder_without_runs_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    with pytest.raises(
        SystemExit, match=r"is no run folder and holds none: give runs or a sweep$"
    ):
        main()


def test_a_click_sorts_by_number_and_the_page_is_no_wider_than_its_window(page, tmp_path):
    if (browser := shutil.which("chromium")) is None:
        pytest.skip("chromium is not on the PATH")
    (tmp_path / "page.html").write_text(page.replace("</body>", COMPARED))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    words += ["--disable-background-networking", "--disable-component-update", "--disable-quic"]
    words += [f"--user-data-dir={tmp_path / 'browser'}", "--window-size=500,900", "--dump-dom"]
    words = [browser, *words, (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    seen = json.loads(re.search(r"<title>SEEN(.*?)</title>", dom)[1])
    (up, rising), (down, falling) = seen["rising"], seen["falling"]
    assert (up, down) == ("ascending", "descending") and len(rising) == 2
    assert rising == sorted(rising, key=float) and falling == rising[::-1]
    assert seen["wide"] <= 0
