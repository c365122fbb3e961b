"""The page is offline, escaped, deterministic, and shows what it is given and nothing else."""

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from deconfound_jax.causal import describe
from deconfound_jax.report import page as report
from deconfound_jax.report import plots
from deconfound_jax.structs import Design, Roles

SCRIPT = "<script>alert('headline')</script> & more, see https://example.org/x.png"
DESIGN = Design.parse("category(week) + category(article) + endogenous(popularity ~ z)")
ROLES = Roles(text="headline", outcome="engagement")


def full_page(n=600):
    rng = np.random.default_rng(0)
    truth_n, popularity_n, noise_n = rng.normal(size=(3, n))
    week_n = np.array([f"week {w}" for w in rng.integers(0, 5, n)], object)
    rewards = {"naive": truth_n + popularity_n + noise_n, "deconfounded": truth_n + 0.3 * noise_n}
    curve = [(0.0, 0.0), (0.5, 0.2), (1.0, 0.4), (1.5, 0.45)]
    scores = [
        {"method": "naive", "share": report.Interval(0.27, 0.22, 0.33), "KL": 1.0, "pairs": 12345, "won": False},
        {"method": "covariate", "share": report.Interval(0.28, 0.2, 0.34), "KL": 1.0, "pairs": 12345, "won": None},
        {"method": "deconfounded", "share": report.Interval(0.41, 0.36, 0.45), "KL": 1.0, "pairs": 12345, "won": True},
    ]
    return report.Page(
        title="Newsroom <simulation>",
        summary="Three policies were trained on 4,000 logged headlines and compared at one nat from the reference.",
        verdict="Deconfounded wins: 1.5 times the true gain of naive, in 5 of 5 seeds.",
        equations=describe.equations(DESIGN, ROLES),
        diagram_svg=describe.svg(DESIGN, ROLES),
        mermaid=describe.mermaid(DESIGN, ROLES),
        effects=[
            plots.Effect("popularity", 3.04, 2.9, 3.2, "engagement per sd"),
            plots.Effect("week (sd of levels)", 0.52, 0.4, 0.66, "engagement"),
            plots.Effect("article (sd of levels)", 0.49, 0.44, 0.53, "engagement"),
        ],
        examples=[report.Example(SCRIPT, 1.234, -0.3, 0.11), report.Example("harbor ferry why joy", -0.2, 0.9, 0.1)],
        samples={"naive": ["secret secret why"], "deconfounded": ["harbor pier joy & fury"]},
        clouds=[
            report.Cloud("popularity", popularity_n, rewards, {"naive": 0.57, "deconfounded": -0.012}),
            report.Cloud("week", week_n, rewards, {"naive": 0.11, "deconfounded": 0.02}),
        ],
        truth=report.Truth(truth_n, rewards),
        curves=report.Curves(
            {"sft": [[(0.0, 0.0)]], "naive": [curve], "deconfounded": [[(k, 1.5 * s) for k, s in curve], curve[:3]]},
            kl=1.0,
        ),
        results=scores,
        seeds=[{"seed": s, "naive": 0.27 + s / 100, "deconfounded": 0.4 + s / 100} for s in range(2)],
        wins="deconfounded beats naive in 2 of 2 seeds",
        held_out=[{"method": "naive", "pair accuracy": 0.61, "p": 0.00001}],
        checks=[{"check": "first-stage F", "value": 812.4, "verdict": "strong"}],
        assumptions=describe.assumptions(DESIGN),
        limits=["Exclusion cannot be tested with one instrument."],
        reproduction=report.Reproduction(
            command="python -m experiments.align --preset newsroom --workdir runs/newsroom",
            machine="2 cores, no accelerator",
            versions={"jax": "0.10.2", "numpyro": "0.22.0"},
            fingerprint="0123456789abcdef",
            config='{"name": "<newsroom>"}',
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def rendered():
    return report.render(full_page())


class Tags(HTMLParser):
    """Collects tags, attributes that load something, and checks that tags close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.ids = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data", "action")]
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_nothing_is_loaded_from_outside(rendered):
    tags = Tags(rendered)
    assert tags.links and all(link.startswith(("#", "data:image/png")) for link in tags.links)
    assert not set(tags.tags) & {"script", "link", "iframe", "img", "object", "embed"}
    assert "@import" not in rendered
    assert all(url.startswith("#") for url in re.findall(r"url\(['\"]?([^)]*)", rendered))
    addresses = set(re.findall(r"https?://[^\s\"'<]+", rendered))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink", "https://example.org/x.png"}


def test_tags_close_and_ids_are_unique(rendered):
    tags = Tags(rendered)
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids))


def test_text_from_outside_is_escaped(rendered):
    assert "<script" not in rendered
    assert "&lt;script&gt;alert(&#39;headline&#39;)&lt;/script&gt; &amp; more" in rendered
    assert "<h1>Newsroom &lt;simulation&gt;</h1>" in rendered
    assert "joy &amp; fury" in rendered
    assert "&lt;newsroom&gt;" in rendered


def test_column_names_are_escaped_in_plots():
    name = "<b>price$in$ & 价格"
    svg = plots.reward_against_confounder(name, np.arange(9.0), {"naive": np.arange(9.0)}, {"naive": 1.0})
    assert "<b>" not in svg and ">&lt;b&gt;price$in$ &amp; 价格</text>" in svg


def test_equal_pages_give_equal_bytes(rendered, tmp_path):
    report.write(full_page(), tmp_path / "new" / "report.html")
    assert (tmp_path / "new" / "report.html").read_bytes() == rendered.encode()
    plots.truth_png(tmp_path / "a.png", np.arange(5.0), {"naive": np.arange(5.0) ** 2})
    plots.truth_png(str(tmp_path / "b.png"), np.arange(5.0), {"naive": np.arange(5.0) ** 2})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_sections_come_in_order(rendered):
    assert _sections(rendered) == [
        "design", "effects", "examples", "confounders", "truth", "results", "held-out", "assumptions", "limits",
        "reproduction",
    ]  # fmt: skip


def test_empty_page_has_no_section():
    text = report.render(report.Page(title="t", summary="s"))
    assert _sections(text) == []
    assert "None" not in text and "<table" not in text and 'class="verdict"' not in text


@pytest.mark.parametrize(
    ("section", "empty"),
    [
        ("design", {"equations": (), "diagram_svg": ""}),
        ("effects", {"effects": ()}),
        ("examples", {"examples": (), "samples": {}}),
        ("confounders", {"clouds": ()}),
        ("truth", {"truth": None}),
        ("results", {"results": (), "curves": None, "seeds": ()}),
        ("held-out", {"held_out": ()}),
        ("assumptions", {"checks": (), "assumptions": ()}),
        ("limits", {"limits": ()}),
        ("reproduction", {"reproduction": None}),
    ],
)
def test_absent_data_leave_their_section_out(rendered, section, empty, monkeypatch):
    for plot in ("effects", "reward_against_confounder", "reward_against_truth", "share_against_kl"):
        monkeypatch.setattr(plots, plot, lambda *_: "<svg></svg>")  # drawn in the other tests; slow
    expected = [name for name in _sections(rendered) if name != section]
    assert _sections(report.render(dataclasses.replace(full_page(20), **empty))) == expected


def test_no_examples_leave_no_text_of_the_log():
    text = report.render(dataclasses.replace(full_page(20), examples=None))
    assert "examples" not in _sections(text)
    for words in ("alert", "example.org", "harbor", "secret secret"):
        assert words not in text


def test_tables_format_by_kind(rendered):
    cells = re.findall(r"<td[^>]*>(.*?)</td>", rendered)
    for expected in ("0.270 [0.220, 0.330]", "12,345", "yes", "no", "–", "812.4", "1.0e−05", "−0.300", "strong"):
        assert expected in cells, expected
    assert '<th scope="col" class="number">share</th>' in rendered
    assert '<td class="">yes</td>' in rendered and '<td class="">–</td>' in rendered  # aligned as their column
    assert f'background:{plots.COLORS["deconfounded"]}"></span>deconfounded' in rendered


def test_rows_may_lack_a_column():
    text = report.render(report.Page(title="t", summary="s", results=[{"a": 1}, {"b": np.float32(2.5), "a": np.nan}]))
    assert re.findall(r"<td[^>]*>(.*?)</td>", text) == ["1", "–", "–", "2.500"]


def test_assumptions_stand_under_the_right_heading(rendered):
    first, second = rendered.split("Assumptions that no data can check")
    assert "<dt>A3</dt>" in first and "<dt>A6</dt>" in first
    assert "<dt>A1</dt>" in second and "<dt>A5</dt>" in second


def test_confounder_plot_shows_the_numbers_it_is_given(rendered):
    assert "naive: correlation 0.57" in rendered
    assert "deconfounded: correlation −0.01" in rendered


def test_truth_plot_counts_the_correlation():
    x_n = np.array([0.0, 1.0, 2.0, 3.0])
    svg = plots.reward_against_truth(x_n, {"up": 2 * x_n + 1, "down": -x_n, "flat": 0 * x_n})
    assert re.findall(r"(?:up|down|flat): correlation (\S+?)<", svg) == ["1.00", "−1.00", "0.00"]


def test_clouds_keep_the_page_small():
    n = 20_000
    rng = np.random.default_rng(0)
    rewards = {"naive": rng.normal(size=n), "deconfounded": rng.normal(size=n)}
    assert len(plots.reward_against_truth(rng.normal(size=n), rewards)) < 600_000


def test_plots_refuse_lengths_that_differ():
    with pytest.raises(AssertionError):
        plots.reward_against_truth(np.arange(3.0), {"naive": np.arange(4.0)})


def _sections(text):
    return re.findall(r'<section id="([\w-]+)">', text)
