"""Pairs about photographs: annotations tell what is there; sentences are left out, things are added."""

import json
import random

import pytest

from baselines import photos, preference
from baselines.chair_dpo import best_against_worst, chair_i
from baselines.making import Method, pairs_of, prompts
from baselines.pairs import Pair, description_pair
from baselines.photos import CATEGORIES, coco_examples, injected, named, tempted, without_false
from baselines.povid import injected_pair
from data import DataError, Example
from hallucination.coco import COCO_CATEGORIES
from model import load_policy
from runs import Settings
from scm import sample_example


def photo(*objects, answer="", vocabulary=CATEGORIES):
    return Example(None, photos.PROMPT, answer, "caption", objects, vocabulary)


def test_things_are_coco_s_by_their_synonyms_or_a_files_by_their_names():
    said = "Two men and a puppy on a couch."
    assert named(photo("dog"), said) == ["person", "dog", "couch"]
    assert named(photo("dog", vocabulary=("couch", "dog")), said) == ["couch"]
    # a caption of COCO's is judged the same by CHAIR-DPO
    assert chair_i(photo("person", "couch"), said) == pytest.approx(1 / 3)
    pair = best_against_worst(photo("dog"), ["A puppy.", "A kitten.", "It is sunny."])
    assert (pair.chosen, pair.rejected) == ("A puppy.", "A kitten.")


@pytest.mark.parametrize(
    ("said", "want"),
    [
        ("A man rides. A dog runs.", "A man rides."),
        ("A dog runs. A man rides, at 3.5 miles an hour! Nice?", "A man rides, at 3.5 miles an hour! Nice?"),
        ("A man rides.", "A man rides."),
        ("A dog runs.", None),
        ("A man and a dog.", None),  # one sentence: it goes as a whole, and nothing is left
        (
            "<think> A man. A dog. </think> <answer> A man rides. A puppy. </answer>",
            "<think> A man. </think> <answer> A man rides. </answer>",
        ),
        ("<think> A man. A dog. </think> <answer> A dog. </answer>", None),
        ("<think> A dog. </think> <answer> A man. </answer>", None),
        ("", ""),
    ],
)  # fmt: skip
def test_sentences_that_name_an_absent_thing_are_left_out_and_no_other(said, want):
    seen = photo("person")
    kept = without_false(seen, said)
    assert kept == want
    changed = want is not None and want != said
    assert description_pair(seen, said) == (Pair(seen, kept, said) if changed else None)


def test_what_tempts_is_the_absent_thing_that_stands_most_often_beside_those_there():
    shown = [
        ("cup", "fork"),
        ("cup", "fork", "knife"),
        ("cup", "knife"),
        ("fork", "knife"),
        ("cup",),
    ]
    topics = [one.topic for one in tempted([photo(*objects) for objects in [*shown, ("kite",)]])]
    # beside cup or fork: knife, 1 + 1 + 1 + 1 times; beside cup alone: fork 2, knife 2, the first by name
    assert topics == ["knife", "", "fork", "cup", "fork", ""]
    assert tempted([]) == []


def test_povids_error_is_added_to_a_humans_caption():
    seen = tempted([photo("cup", answer="A cup on a shelf. "), photo("cup", "orange")])[0]
    true, false = injected(seen)
    assert true == "<think> A cup on a shelf. </think> <answer> A cup on a shelf. </answer>"
    wrong = "A cup on a shelf and an orange."
    assert false == f"<think> {wrong} </think> <answer> {wrong} </answer>"
    assert injected_pair(seen, random.Random(0)) == Pair(seen, true, false)
    assert chair_i(seen, true) == 0 and chair_i(seen, false) == 1 / 2
    assert injected_pair(photo("cup", answer="A cup."), random.Random(0)) is None  # nothing tempts
    untrue = Example(None, "", "A cup and a dog.", "caption", ("cup",), CATEGORIES, topic="fork")
    assert injected(untrue) is None


# ---------------------------------------------------------------------------------------------
# COCO's files
# ---------------------------------------------------------------------------------------------
@pytest.fixture
def coco(tmp_path):
    """(folder, images): COCO files about twelve pictures: a boat, every second time a car beside it."""
    folder, images = tmp_path / "COCO", tmp_path / "train2014"
    (folder / "annotations").mkdir(parents=True)
    images.mkdir()
    number = {name: i for i, name in enumerate(COCO_CATEGORIES, 1)}
    rng, shown, objects, said = random.Random(0), [], [], []
    for i in range(12):
        name = f"COCO_train2014_{i:012d}.jpg"
        sample_example(rng).open_image().save(images / name)
        shown.append({"id": i, "file_name": name, "width": 48, "height": 48})
        for thing in ("boat", "car")[: 1 + i % 2]:
            objects.append({"image_id": i, "category_id": number[thing], "bbox": [0, 0, 9, 9]})
        said.append({"image_id": i, "caption": "A boat."})
        said.append({"image_id": i, "caption": "A boat beside a man."})
    shown.append({"id": 12, "file_name": shown[0]["file_name"], "width": 48, "height": 48})  # bare
    listed = [{"id": i, "name": name} for name, i in number.items()]
    tables = {
        "instances": {"images": shown, "categories": listed, "annotations": objects},
        "captions": {"images": shown, "annotations": said},
    }
    for kind, table in tables.items():
        path = folder / "annotations" / f"{kind}_train2014.json"
        path.write_text(json.dumps(table))
    return folder, images


def test_cocos_files_give_captions_to_write_with_what_is_there(coco):
    examples = coco_examples(*coco, False)
    assert len(examples) == 12  # the thirteenth has neither object nor caption
    assert [one.objects for one in examples[:2]] == [("boat", "person"), ("boat", "car", "person")]
    assert {one.answer for one in examples} == {"A boat."} and examples[0].open_image().size
    assert examples[0].vocabulary == CATEGORIES and len(CATEGORIES) == 80


def test_a_missing_photograph_is_an_error_or_dropped(coco, capsys):
    (coco[1] / "COCO_train2014_000000000003.jpg").unlink()
    with pytest.raises(DataError, match=r"000000000003.jpg.*does not exist \(--skip-bad drops"):
        coco_examples(*coco, False)
    assert len(coco_examples(*coco, True)) == 11 and "skipped" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"no image in .* has a caption and an object"):
        coco_examples(coco[0], coco[0], True)  # a folder without any


def test_every_method_makes_its_pairs_of_cocos_photographs(speaker, coco):
    talker, made = load_policy(speaker), {}
    settings = Settings(max_completion_length=40, images=coco[1])
    for name, more in (
        ("hadpo", {}),
        ("chair", {"num_samples": 4, "temperature": 1.5}),
        ("povid", {}),
        ("csr", {}),
        ("csr", {"judge": "oracle"}),
    ):
        method = Method(name, prompts_at_once=6, coco=str(coco[0]), **more)
        batches = list(prompts(method, settings))
        assert [len(batch) for batch in batches] == [6, 6]
        pairs = pairs_of(talker, batches[0], method, settings, 0)
        assert all(pair.chosen != pair.rejected for pair in pairs)
        made[name] = len(pairs)
    assert made["povid"] == 3 and made["csr"] > 0  # a car tempts where it is not


def test_the_command_learns_from_cocos_photographs(speaker, coco, tmp_path, capsys):
    flags = [
        "--pairs", "povid", "--model", str(speaker), "--coco", str(coco[0]), "--images", str(coco[1]),
        "--output", str(tmp_path / "run"), "--steps", "2", "--batch-size", "2", "--device", "cpu",
    ]  # fmt: skip
    assert preference.main(flags) == 0
    assert "6 pairs from 12 prompts" in capsys.readouterr().err
    assert load_policy(tmp_path / "run" / "checkpoint")
    assert preference.main([*flags, "--resume"]) == 0
