"""The page stands alone and shows what was logged, escaped."""

import colorsys
import json
import random
import re
import shutil
from collections import Counter

import pytest
from pages import read_page

import report
from data import describe_image
from hallucination.files import Bad
from hallucination.scenes import (
    HELD_OUT,
    held_out_probes,
    read_completions,
    scene_questions,
    score_scenes,
)
from page import parts
from page.curves import CURVES, running_mean, ticks
from scm import CATEGORIES, CLEAR, Scene, Thing, demonstration, question_about

SCENE = Scene((Thing("boat", "red", 0.27, 0.27, 0.4),), "sea")


def sample(
    tokens, reasoning, causal, reward=1.0, kind="yesno", step=2, prompt="Is <b>it</b> there?"
):
    scores = [1.0 if value else 0 for value in causal]
    return {
        "step": step, "prompt": prompt, "kind": kind, "answer": "yes", "reward": reward,
        "image": describe_image(question_about(SCENE, "caption", "")),
        "tokens": tokens, "reasoning": reasoning, "sufficiency": [0.5 * x for x in scores],
        "necessity": scores, "causal_reward": causal, "advantage": [0.1 + x for x in causal],
    }  # fmt: skip


BOAT = sample(["<think>", " a", " boat", "</think>"], [False, True, True, False], [0, 0, 0.525, 0])


@pytest.fixture
def run(tmp_path):
    columns = ["step", *(name for name, *_ in CURVES), "rollout_seconds", "score_seconds",
               "update_seconds", "rows_scored", "scoring_token_forwards"]  # fmt: skip
    rows = [[str(i + 1), *["0.25"] * (len(columns) - 1)] for i in range(3)]
    (tmp_path / "metrics.csv").write_text(
        "\n".join(",".join(row) for row in [columns, *rows]) + "\n"
    )
    (tmp_path / "samples.jsonl").write_text(json.dumps(BOAT) + "\n")
    (tmp_path / "args.json").write_text('{"seed": 0, "data": "<script>"}')
    return tmp_path


def test_the_page_is_sound_needs_nothing_from_outside_and_runs_nothing(run):
    page = report.write_report(run).read_text()
    text = read_page(page)
    assert "<script>" in text and "Is <b>it</b> there?" in text
    assert page.count("data:image/png;base64,") == 1 and "a red boat, background: sea" in page


def test_reasoning_tokens_stand_on_their_causal_reward_with_a_bar_for_each_score(run):
    page = report.write_report(run).read_text()
    shown = re.findall(
        r"--above:([\d.]+);--below:([\d.]+);--of:([\d.]+)' data-tip='([^']*)'[^>]*>([^<]*)<",
        page,
    )
    assert [(above, below, text) for above, below, *_, text in shown] == [
        ("0.00", "0.00", " a"), ("0.50", "1.00", " boat"),
    ]  # fmt: skip
    assert [depth for *_, depth, _, _ in shown] == ["0.000", "0.750"]
    assert shown[1][3] == "sufficiency 0.50, necessity 1.00, causal reward 0.53, advantage 0.62"
    assert page.count("<polyline") == 2 * len(CURVES)  # each step, and the running mean


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_ink_and_bars_are_read_on_every_ground_and_the_schemes_texts_on_their_paper():
    tokens = (report.PARTS / "tokens.css").read_text()
    style = (report.PARTS / "style.css").read_text()
    light = dict(
        re.findall(r"var\(--([\w-]+), ([^()]+)\)", tokens)
    )  # unless style.css says otherwise
    assert [light[name] for name in ("more", "less")] == [
        ", ".join(map(str, hue)) for hue in (report.MORE, report.LESS)
    ]  # the terminal and the page say the same in the same colours
    for block in re.findall(r":root \{([^}]*)\}", style):  # light, then dark
        colors = light | dict(re.findall(r"--([\w-]+): (#\w+|[\d, ]+)", block))
        colors = {n: "#ffffff" if c == "#fff" else c for n, c in colors.items()}
        paper = bytes.fromhex(colors["token-paper"][1:])
        for hue in ("more", "less"):
            for depth in (0, 0.1, 0.5, 1):
                pairs = zip(paper, map(int, colors[hue].split(",")), strict=True)
                below = "#" + bytes(round(a + depth * (b - a)) for a, b in pairs).hex()
                assert contrast(colors["token-ink"], below) >= 4.5
                for mark in ("sufficient", "necessary", "token-false"):
                    assert contrast(colors[mark], below) >= 3, (mark, hue, depth)
        for name in ("ink", "soft", "curve", "false"):
            assert contrast(colors[name], colors["paper"]) >= 4.5, name
        assert contrast(colors["ink"], colors["line"]) >= 4.5  # text over the bars of a table


def test_credit_below_zero_has_a_hue_of_its_own():
    assert "copo-less' tabindex=0 style='--of:0.500'" in report.colored_tokens(
        ["a"], [-0.5], full=1.0
    )

    def hue(value):
        color = report.ground(value, 1.0)
        return colorsys.rgb_to_hsv(*(int(color[i : i + 2], 16) for i in (1, 3, 5)))[0] * 360

    assert 20 < hue(0.5) < 50 and 190 < hue(-0.5) < 230


def test_a_run_with_charged_tokens_has_both_hues_in_its_key(run):
    assert "−0.70" not in report.write_report(run).read_text()
    charged = BOAT | {"causal_reward": [0, -0.3, 0.525, 0]}
    (run / "samples.jsonl").write_text(json.dumps(charged) + "\n")
    page = report.write_report(run).read_text()
    read_page(page)
    assert "−0.70" in page and page.count("copo-less'") == 2  # in the key, and the token


def test_plain_grpo_has_no_credit_to_show(run):
    nothing = BOAT | {"causal_reward": [0, 0, 0, 0]}
    (run / "samples.jsonl").write_text(json.dumps(nothing) + "\n")
    (run / "args.json").write_text('{"seed": 0, "lambda_s": 0, "lambda_n": 0}')
    text = report.write_report(run).read_text()
    assert "No token earned a causal reward" in text and "copo-token'" not in text


def test_tokens_in_a_notebook_are_one_call_escaped_and_with_their_style():
    found = report.colored_tokens(["<a>", " b", "c"], [0.5, None, -0.25])
    assert found.startswith("<style>") and "&lt;a&gt;" in found and "data-tip='-0.25'" in found
    assert found.count("class='copo-token") == 2 and found.count("class='copo-outside'") == 1
    assert "--of:1.000" in found and "--of:0.500" in found
    with pytest.raises(ValueError):
        report.colored_tokens(["a"], [])


def test_white_space_that_earns_is_seen():
    assert ">␣<" in report.colored_tokens([" "], [1.0]) and ">↵<" in report.colored_tokens(
        ["\n"], [1]
    )


# -- before and after --------------------------------------------------------------------------
def speak(question, rng, mistakes):
    """A completion of a speaker who now and then sees one more thing."""
    things = [*question.scene.things]
    if rng.random() < mistakes:
        things.append(Thing(rng.choice(CATEGORIES), "red", 0.5, 0.5, 0.3))
    return demonstration(question, things)


@pytest.fixture
def measured(run):
    """The run, with the answers of 20 scenes of each kind before and after."""
    rng, figures = random.Random(0), {}
    for what, mistakes in (("before", 0.5), ("after", 0.2)):
        questions = scene_questions(20)
        texts = [speak(example, rng, mistakes) for _, example in questions]
        rows = [
            key | {"prompt": example.question, "text": text}
            for (key, example), text in zip(questions, texts, strict=True)
        ]
        (run / f"answers-{what}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        figures[what] = score_scenes(20, texts)
    (run / "evaluation.json").write_text(json.dumps(figures))
    about = {"parameters": 2_000_000, "trained": 500_000, "commit": "abc123", "begun": "2026-01-02"}
    (run / "about.json").write_text(json.dumps(about))
    return run


def cells(page, heading):
    """The cells of the row of a table that begins so."""
    row = re.search(rf"<th scope=row>{re.escape(heading)}[^<]*</th>(.*?)</tr>", page)[1]
    return re.findall(r"<td>(.*?)</td>", row)


def wrong_captions(folder, what, setting):
    """Of each scene's caption that was saved: does it name something absent?  By plain search."""
    rows = map(json.loads, (folder / f"answers-{what}.jsonl").read_text().splitlines())
    texts = [row["text"] for row in rows if row["setting"] == setting]
    return [
        any(name in text.split("<answer>")[1] for name in set(CATEGORIES) - set(p.example.objects))
        for text, p in zip(texts, held_out_probes(setting, 20), strict=True)
        if p.example.kind == "caption" and not p.redrawn
    ]


def test_the_counts_on_the_page_are_those_of_the_saved_answers(measured):
    page = report.write_report(measured).read_text()
    read_page(page)
    for setting in HELD_OUT:
        pair = (wrong_captions(measured, what, setting) for what in ("before", "after"))
        counts = Counter(zip(*pair, strict=True))
        expected = [counts[True, False], counts[False, True], counts[False, False],
                    counts[True, True]]  # fmt: skip
        assert sum(expected) == 20 and expected[0] > 0
        assert list(map(int, cells(page, f"{setting} scenes")[:4])) == expected
    cured, new = (int(n) for n in re.search(r": (\d+) cured, (\d+) newly wrong", page).groups())
    assert [str(cured), str(new)] == cells(page, "independent scenes")[:2]


def test_the_page_opens_with_what_was_run_and_what_came_of_it(measured):
    page = report.write_report(measured).read_text()
    first = re.sub("<[^>]*>", "", re.search(r"<p class=verdict>(.*?)</p>", page)[1])
    assert page.index("<p class=verdict>") < page.index("<h2")
    for told in ("3 steps of plain GRPO (0.0 minutes)", "the tiny LLaVA", "2.0 M parameters",
                 "25% of them trained", "seed 0", "commit abc123", "2026-01-02", "cured"):  # fmt: skip
        assert told in first
    settings = {"seed": 0, "lambda_s": 0.35, "model": "<m>"}
    (measured / "args.json").write_text(json.dumps(settings))
    text = read_page(report.write_report(measured).read_text())
    assert "3 steps of COPO" in text and "plain GRPO may cure as many" in text and "<m>" in text


def test_only_what_is_absent_is_waved_in_a_caption(measured):
    page = report.write_report(measured).read_text()
    cards = re.findall(r"<p><b>(before|after):</b> (.*?)</p>", page)
    assert len(cards) > 4
    for _, caption in cards:
        named = re.search(r"\(not there: (.*?)\)", caption)
        waved = re.findall(r"<span class=copo-false>(\w+)</span>", caption)
        assert sorted(set(waved)) == sorted(named[1].split(", ") if named else [])


def test_a_difference_has_an_interval_a_direction_and_its_n(measured):
    page = report.write_report(measured).read_text()
    *_, difference, interval, result, n = cells(page, "CHAIR_S")
    assert difference.startswith("−0.") and " to " in interval and n == "20"
    assert result in ("better", "unclear")
    (measured / "answers-after.jsonl").unlink()  # a run that has kept no answers
    page = report.write_report(measured).read_text()
    read_page(page)
    assert len(cells(page, "CHAIR_S")) == 2 and "Answers were not kept" in page
    assert re.search(r"<p class=verdict>.*CHAIR_S of <b>0\.\d+ before and 0\.\d+ after", page)


def test_saliency_is_folded_and_its_answers_are_marked(measured):
    figures = json.loads((measured / "evaluation.json").read_text())
    probe = next(p for p in held_out_probes("confounded", 30) if p.example.answer == "yes")
    for what, answer in (("before", "no"), ("after", "yes")):
        row = {"question": probe.example.question, "image": describe_image(probe.example),
               "answer": answer, "share": 0.7, "mass": [[1, 2], [3, 4]]}  # fmt: skip
        figures[what]["saliency"] = {
            "background_share": 0.7, "background_share_interval": [0.6, 0.8], "background_area": 0.8,
            "n": 1, "rows": [row],
        }  # fmt: skip
    (measured / "evaluation.json").write_text(json.dumps(figures))
    page = report.write_report(measured).read_text()
    folded = re.search(r"<details><summary>which pixels.*?</details>", page)[0]
    area = 1 - probe.example.scene.mask().mean()
    assert "no (wrong)" in folded and "yes (right)" in folded
    assert f"70% of the gradient on the background, which is {area:.0%} of the pixels" in folded
    read_page(page)
    assert page.index("<h2 id=credit>") < page.index("<summary>which pixels")


# -- two runs, and curves ------------------------------------------------------------------------
@pytest.fixture
def beside(measured, tmp_path_factory):
    """A run of COPO and, in another folder, one of GRPO that speaks without mistakes after training."""
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(measured, other, dirs_exist_ok=True)
    (measured / "args.json").write_text('{"seed": 0, "lambda_s": 0.35}')
    questions = scene_questions(20)
    texts = [speak(example, random.Random(0), 0) for _, example in questions]
    rows = [key | {"prompt": example.question, "text": text}
            for (key, example), text in zip(questions, texts, strict=True)]  # fmt: skip
    (other / "answers-after.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    figures = json.loads((measured / "evaluation.json").read_text())
    figures["after"] = score_scenes(20, texts)
    (other / "evaluation.json").write_text(json.dumps(figures))
    return measured, other


def test_another_run_beside_it_has_its_curves_its_figures_and_its_counts(beside):
    folder, other = beside
    page = report.write_report(folder, other).read_text()
    read_page(page)
    assert page.count("stroke:var(--copo)") == page.count("stroke:var(--grpo)") == 2 * len(CURVES)
    assert (
        "3 steps of COPO" in page
        and "3 steps of plain GRPO" in page
        and "may cure as many" not in page
    )
    wrong = [wrong_captions(of, what, "independent") for of, what in (
        (folder, "before"), (folder, "after"), (other, "after"))]  # fmt: skip
    for name, after in (("COPO", wrong[1]), ("GRPO", wrong[2])):
        counts = Counter(zip(wrong[0], after, strict=True))
        expected = [
            str(counts[case])
            for case in ((True, False), (False, True), (False, False), (True, True))
        ]
        assert cells(page, f"{name}, independent scenes")[:4] == expected
    together = page[page.index("One beside the other") :]
    independent = together[together.index("independent scenes (n = 20)") :]
    _, grpo, copo, difference, *_ = cells(independent, "CHAIR_S")
    assert float(grpo) == 0 and float(copo) == sum(wrong[1]) / 20 == float(difference)
    assert f"{float(copo):.3f} against 0.000" in page  # and in a sentence


def test_two_runs_are_told_in_the_terminal_as_on_the_page(beside, capsys):
    folder, other = beside
    assert report.main([str(folder), "--beside", str(other)]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == str(folder / "report.html")
    page = (folder / "report.html").read_text()
    together = page[page.index("One beside the other") :]
    for setting in ("confounded", "independent"):
        heads, *lines = text[text.index(f"{setting} scenes (n = 20)") :].splitlines()
        assert heads.split()[-8:] == ["before", "GRPO", "COPO", "COPO", "less", "GRPO,", "95", "%"]
        (line,) = (line for line in lines[:12] if "CHAIR_S  (lower" in line)
        *figures, _, between, _, _ = cells(
            together[together.index(heads[:28].strip()) :], "CHAIR_S"
        )
        assert line.split()[-6:] == [*figures, *between.split()]
    (other / "evaluation.json").write_text("{}")  # it was not measured
    assert report.main([str(folder), "--beside", str(other)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")


def test_two_runs_that_did_not_begin_alike_are_said_not_to(beside):
    folder, other = beside
    assert "did not begin alike" not in read_page(report.write_report(folder, other).read_text())
    figures = json.loads((other / "evaluation.json").read_text())
    figures["before"]["independent"]["chair_s"] += 0.05
    (other / "evaluation.json").write_text(json.dumps(figures))
    assert "did not begin alike" in read_page(report.write_report(folder, other).read_text())


def test_a_run_that_has_not_ended_stands_beside_another_in_its_curves_alone(beside):
    folder, other = beside
    figures = json.loads((other / "evaluation.json").read_text())
    (other / "evaluation.json").write_text(json.dumps({"before": figures["before"]}))
    page = report.write_report(folder, other).read_text()
    assert "the two cannot be compared" in read_page(page) and "stroke:var(--grpo)" in page
    assert "One beside the other" not in page


def test_runs_of_one_method_are_told_apart_by_folder_and_those_of_other_scenes_are_refused(
    beside, capsys
):
    folder, other = beside
    (other / "args.json").write_text('{"seed": 1, "lambda_s": 0.35}')
    assert f"COPO, {other}" in read_page(report.write_report(folder, other).read_text())
    (other / "args.json").write_text('{"seed": 1, "fog": 0.9}')
    assert report.main([str(folder), "--beside", str(other)]) == 2
    assert "different scenes" in capsys.readouterr().err
    assert report.main([str(folder), "--beside", str(folder)]) == 2
    assert "beside itself" in capsys.readouterr().err


def test_a_curve_has_round_ticks_a_running_mean_its_checkpoints_and_its_values_on_hover(run):
    assert ticks(0.67, 0.98) == [0.6, 0.7, 0.8, 0.9, 1.0] and ticks(0, 40) == [0, 10, 20, 30, 40]
    assert ticks(-3, 0.5) == [-3, -2, -1, 0, 1] and ticks(0, 0.0069)[1] == 0.002
    assert running_mean([1, 2, 3, 4, 10, 7]) == [2, 2.5, 4, 5.2, 6, 7]
    for name in ("checkpoint-2", "checkpoint-new", "checkpoint"):
        (run / name).mkdir()
    (run / "checkpoint" / "state.json").write_text('{"step": 3}')
    page = report.write_report(run).read_text()
    marked = re.findall(r"<title>[^<]*: checkpoint of step (\d+)</title>", page)
    assert marked == ["2", "3"] * len(CURVES)
    assert f"<title>step 2: {run.name} 0.25</title>" in page
    rows = (run / "metrics.csv").read_text().replace("0.25", "nan")
    (run / "metrics.csv").write_text(rows)  # of steps whose loss was not finite
    assert (
        "nan"
        not in report.write_report(run)
        .read_text()
        .partition("<h2>Cost")[0]
        .partition("Training")[2]
    )


# -- which completions, which words ------------------------------------------------------------
def test_what_is_false_is_marked_and_a_question_is_not():
    tokens = ["<think>", " a", " blue", " boat", " and", " a", " red", " car", ".", " A", " car", "?",
              "</think>"]  # fmt: skip
    card = report.credit_card(
        sample(tokens, [False, *[True] * 11, False], [0, 0, 0, 0.5, *[0] * 9])
    )
    assert re.findall(r"copo-false'[^>]*>([^<]*)<", card) == [" blue", " red", " car"]


def test_completions_are_drawn_by_chance_four_of_each_and_the_same_for_a_seed():
    samples = [
        sample(["a"], [i % 10 != 9], [0.1], reward=float(i % 2), step=i,
               kind="caption" if i % 3 == 0 else "yesno") for i in range(90)
    ]  # fmt: skip
    groups = report.choose_samples(samples)
    assert groups == report.choose_samples(samples) != report.choose_samples(samples, seed=1)
    right, wrong, captions = groups.values()
    assert [len(of) for of in groups.values()] == [4, 4, 4]
    assert all(s["reward"] == 1 and s["kind"] == "yesno" for s in right)
    assert all(s["reward"] == 0 and s["kind"] == "yesno" for s in wrong)
    assert all(s["kind"] == "caption" for s in captions)
    assert all(any(s["reasoning"]) for of in groups.values() for s in of)


def test_top_credit_is_counted_by_kind_with_ties_shared():
    tokens, inside = [" a", " red", " boat", " and", " car", "."], [True] * 6
    samples = [
        sample(tokens, inside, [0, 0, 0.5, 0, 0, 0]),
        sample(tokens, inside, [0, 0.3, 0, 0, 0.3, 0]),
        sample(tokens, inside, [0] * 6),
        sample(tokens, inside, [0, 0, 0, 0, 0, 0.1]),
    ]
    every, above, fifth, two_fifths = report.top_credit(samples).values()
    assert every == {"other": 8, "attribute": 4, "there": 4, "absent": 4, "punctuation": 4}
    assert above == {"there": 1, "attribute": 0.5, "absent": 0.5, "punctuation": 1}
    assert fifth == {"there": 1, "attribute": 0.5, "absent": 0.5}
    assert two_fifths == Counter({"there": 1})


def test_a_folder_that_is_no_run_gets_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_single_image_with_an_answer_has_a_share_and_no_interval():
    sheet = {"background_share": 0.7, "background_share_interval": None}
    assert parts._share(sheet) == "0.700"
    assert parts._share(sheet | {"background_share_interval": [0.6, 0.8]}) == (
        "0.700 (95 % interval 0.600 to 0.800)"
    )


@pytest.mark.parametrize("text", ["", "Describe the image.", "Is there a boat?", "x"])
def test_our_own_answers_are_read_as_they_are_whatever_the_model_said(tmp_path, text):
    path, questions = tmp_path / "answers.jsonl", scene_questions(2, CLEAR)
    row = {"max_new_tokens": 64, "prompt": "Describe the image.", "text": text}
    path.write_text("".join(json.dumps(row) + "\n" for _ in questions))
    assert read_completions(path, questions, Bad()) == [text] * len(questions)
