"""The page stands alone and shows what was logged, escaped."""

import json
import re

import pytest

import report
from data import describe_image
from scm import Scene, Thing, question_about

SCENE = Scene((Thing("boat", "red", 0.27, 0.27, 0.4),), "sea")


@pytest.fixture
def run(tmp_path):
    columns = ["step", *(name for name, *_ in report.CURVES), "rollout_seconds", "score_seconds",
               "update_seconds", "rows_scored", "scoring_token_forwards"]  # fmt: skip
    rows = [[str(i + 1), *["0.25"] * (len(columns) - 1)] for i in range(3)]
    (tmp_path / "metrics.csv").write_text(
        "\n".join(",".join(row) for row in [columns, *rows]) + "\n"
    )
    sample = {
        "step": 2, "prompt": "Is <b>it</b> there?", "answer": "yes", "reward": 1.0,
        "image": describe_image(question_about(SCENE, "caption", "")),
        "tokens": ["<think>", " a", " boat", "</think>"], "reasoning": [False, True, True, False],
        "sufficiency": [0, 0, 0.5, 0], "necessity": [0, 0, 1.0, 0],
        "causal_reward": [0, 0, 0.525, 0], "advantage": [0.1, 0.1, 0.625, 0.1],
    }  # fmt: skip
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (tmp_path / "args.json").write_text('{"seed": 0, "data": "<script>"}')
    return tmp_path


def test_the_page_needs_nothing_from_outside_and_runs_nothing(run):
    page = report.write_report(run).read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert "&lt;script&gt;" in page and "Is &lt;b&gt;it&lt;/b&gt; there?" in page
    assert page.count("data:image/png;base64,") == 1


def test_the_page_colours_reasoning_tokens_by_causal_reward(run):
    page = report.write_report(run).read_text()
    shades = re.findall(r"class=token style='--c:([\d.]+)'[^>]*>([^<]*)<", page)
    assert shades == [("0.00", " a"), ("0.75", " boat")]
    assert "causal reward 0.53" in page or "causal reward 0.52" in page
    assert page.count("<polyline") == len(report.CURVES)


def test_a_folder_that_is_no_run_gets_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
