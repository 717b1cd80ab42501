"""CHAIR: every name resolves, every figure by hand, every form of file, the cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
from data import DataError
from hallucination import chair
from hallucination.chair import objects_in, own_synonyms, read_caption_file, score
from hallucination.coco import COCO_CATEGORIES
from hallucination.files import Bad

OWN = own_synonyms()


def plural(phrase):
    """The plural of an English noun phrase, for the words of the table."""
    *before, word = phrase.split()
    odd = {"person": "people", "child": "children", "mouse": "mice", "ox": "oxen", "goose": "geese"}
    odd |= {
        "knife": "knives",
        "calf": "calves",
        "sheep": "sheep",
        "scissors": "scissors",
        "skis": "skis",
    }
    odd |= {"shears": "shears"}
    if word in odd:
        word = odd[word]
    elif word.endswith("man"):
        word = word[:-3] + "men"
    elif word.endswith(("s", "x", "ch", "sh")):
        word += "es"
    elif word.endswith("y") and word[-2] not in "aeiou":
        word = word[:-1] + "ies"
    else:
        word += "s"
    return " ".join([*before, word])


@pytest.mark.parametrize("name", COCO_CATEGORIES)
def test_every_official_name_and_its_plural_resolves(name):
    assert objects_in(f"There is a {name} here.", OWN) == [name]
    assert objects_in(f"Two {plural(name)}, I think.", OWN) == [name]


def test_every_synonym_resolves_in_singular_and_plural():
    for phrase, category in OWN.items():
        expected = [category] if category else []
        assert objects_in(phrase, OWN) == expected, phrase
        if category:
            assert objects_in(plural(phrase), OWN) == expected, plural(phrase)


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("A man rides his bike.", ["person", "bicycle"]),
        ("Two dogs and a dog.", ["dog", "dog"]),  # repeats count
        ("A hot dog on a plate", ["hot dog"]),
        ("A baby elephant", ["elephant"]),
        ("A passenger train on train tracks", ["train"]),
        ("A player at home plate", ["person"]),
        ("A teddy bear and a bear", ["teddy bear", "bear"]),
        ("A toilet seat", ["toilet"]),
        ("He wears a bow tie", ["tie"]),
        ("Wine glasses on the dining table", ["wine glass", "dining table"]),
        ("He wears glasses", []),
        ("Two glasses of wine", ["wine glass"]),
        ("A family of elephants and their mother elephant", ["elephant", "elephant"]),
        ("A couple of dogs at a farmer's market", ["dog"]),
        ("A train of passenger cars in a train station", ["train", "train"]),
        ("He holds ski poles near the ski lift.", []),
        ("A wall painted orange, a red and orange flag", []),
        ("An orange, cat food", ["orange"]),  # a compound never spans punctuation
        ("Pizza, cutter", ["pizza"]),
        ("A hot\ndog", ["hot dog"]),  # white space of any kind parts nothing
        ("A hot\u2028dog on an ironing\tboard", ["hot dog"]),
        ("- A hot\n- dog", ["dog"]),
        ("A hot-dog, a dog\u2019s bowl", ["hot dog", "dog", "bowl"]),
        ("An orange cat eats an orange", ["cat", "orange"]),
        ("A TRAFFIC LIGHT", ["traffic light"]),
        ("", []),
        ("A beautiful day", []),
    ],
)
def test_mentions_are_in_order_and_the_longest_name_wins(caption, objects):
    assert objects_in(caption, OWN) == objects


# -- figures -----------------------------------------------------------------------------------
TRUTH = {1: {"dog", "person"}, 2: {"cat"}, 3: {"car", "bus"}}


def test_figures_by_hand():
    captions = [
        (1, "A dog and a dog with a frisbee"),  # dog dog frisbee: 3 mentions, 1 hallucinated
        (2, "A cat on a couch with a cup"),  # cat couch cup: 3 mentions, 2 hallucinated
        (3, "A sunny day"),  # names nothing
    ]
    figures = score(captions, TRUTH, OWN)
    assert figures["n"] == 3
    assert figures["chair_s"] == pytest.approx(2 / 3)
    assert figures["chair_i"] == pytest.approx(3 / 6)
    assert figures["recall"] == pytest.approx(2 / 5)  # dog, cat of person dog cat car bus
    assert figures["f1"] == pytest.approx(2 * 0.5 * 0.4 / 0.9)
    assert figures["mean_length"] == pytest.approx((8 + 8 + 3) / 3)
    assert figures["mean_mentions"] == pytest.approx(2)
    assert score(captions[::-1], TRUTH, OWN)["image_ids_sha256"] == figures["image_ids_sha256"]
    assert score(captions[:2], TRUTH, OWN)["image_ids_sha256"] != figures["image_ids_sha256"]


@pytest.mark.parametrize(
    ("captions", "nothing"),
    [
        ([], ["chair_s", "chair_i", "recall", "f1", "mean_length", "mean_mentions"]),
        ([(3, "A sunny day")], ["chair_i", "f1"]),  # no mention
        ([(3, "")], ["chair_i", "f1"]),  # an empty caption is one
        ([(4, "A dog")], ["recall", "f1"]),  # no object to find
        ([(2, "A dog")], []),  # every mention is hallucinated
    ],
)
def test_a_figure_over_nothing_is_a_dash(captions, nothing):
    figures = score(captions, TRUTH | {4: set()}, OWN)
    assert [key for key, value in figures.items() if value is None] == nothing
    assert chair.table(figures).split("\n")[1].split().count("-") == len(nothing)
    assert f"{len(captions)} captions" in chair.table(figures)


def test_an_image_without_truth_is_named():
    with pytest.raises(DataError, match="image 9"):
        score([(9, "a dog")], TRUTH, OWN)


def test_hallucinated_mentions_are_listed_by_caption():
    (row,) = chair.per_caption([(2, "a cat and a dog")], TRUTH, OWN)
    assert row == {"image_id": 2, "mentions": ["cat", "dog"], "hallucinated": ["dog"]}


# -- the official list -------------------------------------------------------------------------
def official(tmp_path):
    """A list in the official layout with its four kinds of dead entry."""
    lines = [f"{name}" for name in COCO_CATEGORIES]
    odd = {"motorcycle": "motorcycle, scooter,  motor bike", "cake": "cake,  cheesecake"}
    odd |= {"cell phone": "cell phone, iPhone", "oven": "oven, stove, stove top oven"}
    odd |= {"person": "person, man, baby, adult, mother, passenger, thief", "boat": "boat, canoe"}
    odd |= {"airplane": "airplane, plane, airbus", "cow": "cow, zebu", "dog": "dog, puppy, doggie"}
    odd |= {"tie": "tie, bow, bow tie", "laptop": "laptop, laptop computer", "chair": "chair, seat"}
    path = tmp_path / "synonyms.txt"
    path.write_text("\n".join(odd.get(line, line) for line in lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("caption", "category"),
    [
        ("a motor bike", "motorcycle"),
        ("a cheesecake", "cake"),
        ("an iPhone", "cell phone"),
    ],
)
def test_the_dead_entries_are_dead_under_strict_and_repaired_under_fixed(
    tmp_path, caption, category
):
    path = official(tmp_path)
    assert objects_in(caption, chair.read_synonyms(path, "strict")) == []
    assert objects_in(caption, chair.read_synonyms(path, "fixed")) == [category]


def test_three_words_are_one_mention_under_fixed_and_beyond_the_window_of_strict(tmp_path):
    path = official(tmp_path)
    assert objects_in("a stove top oven", chair.read_synonyms(path, "fixed")) == ["oven"]
    assert objects_in("a stove top oven", chair.read_synonyms(path, "strict")) == ["oven", "oven"]


# caption -> what it names by the list's sense, and as the published scorer reads it
@pytest.mark.parametrize(
    ("caption", "fixed", "published"),
    [
        # (i) plurals that the published rules spoil
        ("a dog on a bus", ["dog", "bus"], ["dog"]),
        ("two buses", ["bus"], ["bus"]),
        ("two ties, a tie", ["tie", "tie"], ["tie"]),
        ("canoes and a canoe", ["boat", "boat"], ["boat"]),
        ("thieves, a thief", ["person", "person"], ["person"]),
        ("doggies", ["dog"], []),
        ("an airbus, two airbuses", ["airplane", "airplane"], ["airplane"]),
        ("two zebus", ["cow"], ["cow"]),
        ("wine glasses", ["wine glass"], ["wine glass"]),
        # (ii) words that would name a person
        ("a baby animal, an adult cub", [], []),
        ("a baby bear", ["bear"], ["bear"]),
        ("a baby puppy", ["dog"], ["person", "dog"]),
        ("a mother cat", ["cat"], ["person", "cat"]),
        ("a passenger train", ["train"], ["train"]),
        (
            "a passenger bus, a passenger plane",
            ["bus", "airplane"],
            ["person", "person", "airplane"],
        ),
        # (iii) what parts words
        ("a hot\ndog", ["hot dog"], ["hot dog"]),
        ("a hot, dog", ["dog"], ["dog"]),
        ("a hot-dog, a hot dog", ["hot dog", "hot dog"], ["hot dog"]),
        ("a horse-drawn carriage", ["horse"], []),
        ("a cup/bowl", ["cup", "bowl"], []),
        ("five o'clock", [], []),
        ("a man-made lake", [], []),
        ("the dog's bowl", ["dog", "bowl"], ["dog", "bowl"]),
        ('a "dog".', ["dog"], ["dog"]),
        # the fixed list of pairs
        ("a toilet seat, a seat", ["toilet"], ["toilet"]),
        ("home plate, a train track", [], []),
        ("a laptop computer", ["laptop"], ["laptop"]),
        ("a stove top oven", ["oven"], ["oven", "oven"]),
        ("a motor bike", ["motorcycle"], []),
        ("an iPhone", ["cell phone"], []),
        ("a bow tie", ["tie"], ["tie"]),
    ],
)
def test_the_official_list_by_its_sense_and_as_it_was_published(
    tmp_path, caption, fixed, published
):
    path = official(tmp_path)
    assert objects_in(caption, chair.read_synonyms(path, "fixed")) == fixed
    assert objects_in(caption, chair.read_synonyms(path, "published")) == published


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace("zebra", "okapi"), "'okapi' is not one of"),
        (lambda text: text.replace("zebra\n", ""), "no line for zebra"),
        (lambda text: text.replace("zebra", "zebra, horse"), "names something else"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(tmp_path, change, reason):
    path = official(tmp_path)
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=reason):
        chair.read_synonyms(path)


# -- files -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        '{"image_id": 1, "caption": "a dog"}\n{"image_id": 2, "caption": "a cat"}\n',
        '[{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "a cat"}]',
        '{"overall": {"CIDEr": 1}, "imgToEval": {"1": {"image_id": 1, "caption": "a dog"}, '
        '"2": {"caption": "a cat"}}}',
        '{"annotations": [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "a cat"}]}',
        '{"image": "COCO_val2014_000000000001.jpg", "text": "a dog"}\n'
        '{"image": "000000000002.jpg", "answer": "a cat"}\n',
        '\ufeff{"image_id": 1.0, "caption": "a dog"}\r\n{"image_id": "2.0", "caption": "a cat"}\r\n',
        '{"image_id": 1, "text": "Describe it.", "caption": "a dog"}\n'
        '{"image_id": 2, "text": "Describe it.", "caption": "a cat"}\n',
        '{"image_id": 1, "caption": "people", "prediction": "a dog"}\n'
        '{"image_id": 2, "caption": "a tree", "prediction": "a cat"}\n',
    ],
)
def test_captions_are_read_in_every_published_form(tmp_path, text):
    path = tmp_path / "captions.json"
    path.write_text(text)
    assert read_caption_file(path, Bad())[0] == [(1, "a dog"), (2, "a cat")]


def test_how_captions_were_decoded_is_told_where_all_rows_say_the_same(tmp_path):
    path = tmp_path / "captions.jsonl"
    row = {"image_id": 1, "caption": "a", "max_new_tokens": 64, "temperature": 0.0}
    path.write_text(json.dumps(row) + "\n")
    assert read_caption_file(path, Bad())[1] == {"max_new_tokens": 64, "decoding": "greedy"}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "image_id": 2, "temperature": 1}))
    assert read_caption_file(path, Bad())[1] == {}
    path.write_text(json.dumps({**row, "decoding": {"name": "beam", "num_beams": 5}}))
    assert read_caption_file(path, Bad())[1]["decoding"] == "beam (num beams 5)"
    path.write_text(json.dumps({**row, "temperature": "low"}))
    assert read_caption_file(path, Bad())[1] == {"max_new_tokens": 64}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"caption": "a dog"}', "no image id"),
        ('{"image_id": 1.5, "caption": "a"}', r"no image id in 1\.5"),
        ('{"image_id": [1], "caption": "a"}', r"no image id in \[1\]"),
        ('{"image_id": 1, "caption": null}', "holds no answer"),
        ('{"image_id": 1, "caption": ["a", "b"]}', "holds no answer"),
        ('{"image_id": 1, "caption": "a", "text": "b"}', "`caption` and `text` may both hold"),
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 1, "caption": "b"}', "caption already"),
        ('{"image_id": 7, "caption": "a"}', "image 7 is not in the annotations"),
        ('[{"image_id": 1, "caption": "a"', "not JSON"),
        ('{"image_id": 1, "capt', "not JSON"),
        ("", "no usable entry"),
    ],
)
def test_captions_that_cannot_be_used_are_named(tmp_path, text, reason):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        read_caption_file(path, Bad(), known={1})


# -- annotations -------------------------------------------------------------------------------
@pytest.fixture
def coco(tmp_path):
    """A folder like COCO 2014's, its val half alone: three images, a boat, a car and an empty one."""
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    images = [
        {"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg", "width": 40, "height": 32}
        for i in (1, 2, 3)
    ]
    names = list(COCO_CATEGORIES)
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    boxes = [
        {"image_id": i, "category_id": names.index(name) + 1, "bbox": [0, 0, 9, 9]}
        for i, name in ((1, "boat"), (2, "car"))
    ]
    instances = {"images": images, "categories": categories, "annotations": boxes}
    captions = {
        "images": images,
        "annotations": [{"image_id": 1, "caption": "A man in a boat"}],
    }
    for kind, value in (("instances", instances), ("captions", captions)):
        (folder / "annotations" / f"{kind}_val2014.json").write_text(json.dumps(value))
    return folder


def test_truth_is_what_is_annotated_and_what_humans_name(coco, capsys):
    truth = chair.ground_truth(coco, OWN, Bad())
    assert truth == {1: {"boat", "person"}, 2: {"car"}, 3: set()}
    assert "instances_train2014.json" in capsys.readouterr().err  # what is missing is said


def test_the_truth_is_kept_and_read_again_only_when_something_changed(coco, monkeypatch):
    truth = chair.ground_truth(coco, OWN, Bad())
    (cache,) = coco.glob("chair_ground_truth_*.json")
    with monkeypatch.context() as patch:
        patch.setattr(chair.coco, "read_instances", lambda *_, **__: pytest.fail("read again"))
        assert chair.ground_truth(coco, OWN, Bad()) == truth
    cache.write_text(cache.read_text()[:-30])  # cut short
    assert chair.ground_truth(coco, OWN, Bad()) == truth
    file = coco / "annotations" / "captions_val2014.json"
    file.write_text(file.read_text().replace("A man in", "A dog in"))
    os.utime(file, (0, 0))
    assert chair.ground_truth(coco, OWN, Bad())[1] == {"boat", "dog"}


def test_a_folder_that_is_not_coco_is_refused(tmp_path):
    with pytest.raises(DataError, match="no complete pair"):
        chair.ground_truth(tmp_path, OWN, Bad())


# -- the command -------------------------------------------------------------------------------
def test_saved_captions_are_scored_without_importing_torch(coco, tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text(
        '{"image_id": 1, "caption": "<think> a dog </think> <answer> a boat </answer>"}\n'
    )
    figures = tmp_path / "figures.json"
    arguments = ["chair", "--coco", str(coco), "--captions", str(path), "--json", str(figures)]
    code = f"import sys, evaluate; evaluate.main({arguments}); sys.exit('torch' in sys.modules)"
    root = Path(evaluate.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, stdout=subprocess.DEVNULL)
    result = json.loads(figures.read_text())
    assert result["chair_s"] == 0 and result["recall"] == 1 / 2 and result["max_new_tokens"] is None


def test_chair_end_to_end_is_the_same_for_batch_size_1_and_16(policy, coco, tmp_path, capsys):
    from scm import Scene, Thing

    policy.save(tmp_path / "model")
    images = tmp_path / "val2014"
    images.mkdir()
    scene = Scene((Thing("boat", "red", 0.3, 0.3, 0.4),), "sea")
    for i, side in ((1, 40), (2, 64), (3, 52)):
        scene.render(side).save(images / f"COCO_val2014_{i:012d}.jpg")
    ids = tmp_path / "ids.txt"
    ids.write_text("COCO_val2014_000000000003.jpg\n1\n")
    results = []
    for size in ("1", "16"):
        asked = ["chair", "--coco", str(coco), "--images", str(images), "--image-ids", str(ids)]
        asked += ["--model", str(tmp_path / "model"), "--max-new-tokens", "8", "--batch-size", size]
        asked += ["--save", str(tmp_path / f"{size}.jsonl"), "--json", str(tmp_path / size)]
        assert evaluate.main(asked) == 0
        results.append(json.loads((tmp_path / size).read_text()))
    assert results[0] == results[1]
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "16.jsonl").read_text()
    assert results[0]["n"] == 2 and results[0]["max_new_tokens"] == 8
    assert results[0]["decoding"] == "greedy"
    assert "chair_s" in capsys.readouterr().out

    ids.write_text("7\n")
    assert evaluate.main([*asked[:-4], "--save", str(tmp_path / "other")]) == 2
    assert "image 7 is not in the annotations" in capsys.readouterr().err


def test_a_mode_of_the_official_list_needs_the_list(coco, tmp_path, capsys):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"image_id": 1, "caption": "a boat on a bus"}\n')
    argv = ["chair", "--coco", str(coco), "--captions", str(path)]
    with pytest.raises(SystemExit) as end:
        evaluate.main([*argv, "--synonyms-mode", "published"])
    assert end.value.code == 2 and "needs --synonyms" in capsys.readouterr().err
    out = tmp_path / "figures.json"
    for mode, chair_s in (("strict", 1), ("fixed", 1), ("published", 0)):
        flags = ["--synonyms", str(official(tmp_path)), "--synonyms-mode", mode, "--json", str(out)]
        assert evaluate.main([*argv, *flags]) == 0
        assert json.loads(out.read_text())["chair_s"] == chair_s


def test_the_truth_is_of_one_way_to_read(coco, tmp_path):
    path, file = official(tmp_path), coco / "annotations" / "captions_val2014.json"
    file.write_text(file.read_text().replace("A man in", "A bus by"))
    for mode, there in (("fixed", {"boat", "bus"}), ("published", {"boat"})):
        assert chair.ground_truth(coco, chair.read_synonyms(path, mode), Bad())[1] == there
