"""Measure how much a model hallucinates, on the official files of the benchmarks.

    python evaluate.py scenes   --model runs/first/checkpoint         the scene world, truth is known
    python evaluate.py pope     --questions coco_pope_*.json --images val2014/ --model DIR
    python evaluate.py chair    --coco COCO/ --images val2014/ --model DIR
    python evaluate.py mme      --root MME_Benchmark_release_version/ --model DIR
    python evaluate.py judge    export | run | import                 two models compared by a third
    python evaluate.py saliency --model DIR --compare DIR2            where an answer comes from

Answers saved by any tool are scored without loading a model (--answers, --captions, result files).
Answers of a model are greedy unless a --temperature is given, saved as they come, and resumed.
"""

import argparse
import functools
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from data import DataError, Example, describe_image, image_in, in_words, read_image
from hallucination import chair, judge, mme, pope, scenes
from hallucination.files import Bad, answer_of, read_rows, read_text
from records import write_whole
from rewards import final_answer

SETTINGS = {"confounded": 0.9, "independent": 1 / 8}  # -> chance of a background's home category
HELD_OUT_SEED = 2508_04182
Result = tuple[dict, str]  # figures, and the table that shows them


# ---------------------------------------------------------------------------------------------
# Asking a model
# ---------------------------------------------------------------------------------------------
def ask_model(
    args: argparse.Namespace, questions: Sequence[tuple[dict, Example]], bad: Bad, load=None
) -> list[str | None]:
    """The model's completions, from its file of answers as far as that goes."""
    from answers import Settings, answer_all, answers_file, fingerprint

    if not questions:
        raise DataError("no question is left to ask")
    settings = Settings(
        fingerprint(args.model), args.max_new_tokens, args.temperature, args.seed, args.think
    )
    save = args.save or answers_file(args.command, questions, settings)
    print(f"answers: {save}", file=sys.stderr)
    load = load or functools.partial(_load, args)
    return answer_all(load, questions, settings, save, args.batch_size, bad, args.command)


def _fingerprint(model: str) -> str:
    from answers import fingerprint

    return fingerprint(model)


def _load(args: argparse.Namespace):
    import torch  # only where a model is asked
    from transformers.utils.logging import disable_progress_bar

    from model import load_policy

    disable_progress_bar()
    dtype = getattr(torch, args.dtype)
    return load_policy(args.model, args.device, dtype, args.trust_remote_code)


def answered(questions: list, texts: list[str | None]) -> tuple[list, list[str]]:
    """Without the questions whose image was dropped.  Raises DataError if none is left."""
    kept = [(q, text) for q, text in zip(questions, texts, strict=True) if text is not None]
    if not kept:
        raise DataError("no question could be asked")
    return [q for q, _ in kept], [text for _, text in kept]


def with_images(items: list, images: Path, name: Callable, bad: Bad) -> list[tuple[object, Path]]:
    """(item, path of its image); items whose image is missing, or outside the folder, are bad."""
    found = []
    for item in items:
        try:
            found.append((item, image_in(images, name(item))))
        except ValueError as error:
            bad(item if isinstance(item, str) else name(item), str(error))
    return found


# ---------------------------------------------------------------------------------------------
# The scene world
# ---------------------------------------------------------------------------------------------
def scene_questions(count: int, fog: float = 0.0) -> list[tuple[dict, Example]]:
    """All questions on `count` held-out scenes of each setting."""
    of_fog = {"fog": fog} if fog else {}
    return [
        ({"setting": setting, "question_id": i} | of_fog, probe.example)
        for setting in SETTINGS
        for i, probe in enumerate(_probes(setting, count, fog))
    ]


def score_scenes(count: int, completions: Sequence[str], fog: float = 0.0) -> dict:
    """Figures by setting.  Raises DataError where there are not as many completions as questions."""
    figures, left = {}, list(completions)
    for setting in SETTINGS:
        probes = _probes(setting, count, fog)
        figures[setting] = scenes.score(probes, left[: len(probes)])
        left = left[len(probes) :]
    return figures


@functools.cache
def _probes(setting: str, count: int, fog: float = 0.0) -> list[scenes.Probe]:
    return scenes.make_probes(count, SETTINGS[setting], HELD_OUT_SEED, fog)


def evaluate_scenes(
    policy, count: int, what: str = "evaluation", fog: float = 0.0, words: bool = False
) -> dict:
    """Figures of a model on confounded and on independent held-out scenes, or on their descriptions."""
    from answers import Settings, answer_all

    questions = scene_questions(count, fog)
    if words:
        questions = [(key, in_words(example)) for key, example in questions]
    completions = answer_all(lambda: policy, questions, Settings(what), None, 128, what=what)
    return score_scenes(count, completions, fog)


def run_scenes(args: argparse.Namespace) -> Result:
    """CHAIR, POPE, accuracy and flip rate where what is there is known."""
    bad, questions = Bad(), scene_questions(args.scenes, args.fog)
    if args.answers:
        completions = [answer_of(row) or "" for _, row in read_rows(args.answers, bad)]
        if len(completions) != len(questions):
            raise DataError(
                f"{args.answers}: {len(completions)} answers for {len(questions)} questions: give "
                f"--scenes the number they were made with"
            )
    else:
        completions = ask_model(args, questions, bad)
    figures = score_scenes(args.scenes, completions, args.fog)
    return figures, compare_table({"model": figures})


# what the table shows: heading -> key into the figures of a setting, and whether less is better
_ROWS = {
    "accuracy": ("accuracy",),
    "POPE F1, random": ("pope", "random", "f1"),
    "POPE F1, popular": ("pope", "popular", "f1"),
    "POPE F1, adversarial": ("pope", "adversarial", "f1"),
    "POPE yes-ratio, adversarial": ("pope", "adversarial", "yes_ratio"),
    "CHAIR_S  (lower is better)": ("chair_s",),
    "CHAIR_I  (lower is better)": ("chair_i",),
    "caption recall": ("recall",),
    "caption length, words": ("length",),
    "flip rate under do(L_s)  (lower is better)": ("flip_rate",),
}


def compare_rows(columns: dict[str, dict]) -> dict[str, list[tuple[str, list[str]]]]:
    """Figures side by side: setting, with its number of scenes -> (heading, a number for each column)."""

    def number(figures: dict, keys: tuple[str, ...]) -> str:
        value = functools.reduce(lambda value, key: value[key], keys, figures)
        return f"{value:.1f}" if keys == ("length",) else f"{value:.3f}"

    n = {setting: next(iter(columns.values()))[setting]["n"] for setting in SETTINGS}
    return {
        f"{setting} scenes (n = {n[setting]})": [
            (heading, [number(figures[setting], keys) for figures in columns.values()])
            for heading, keys in _ROWS.items()
        ]
        for setting in SETTINGS
    }


def compare_table(columns: dict[str, dict]) -> str:
    """Runs side by side: {heading: figures of `evaluate_scenes`} -> a table in text."""
    return rows_as_text(list(columns), compare_rows(columns))


def rows_as_text(headings: Sequence[str], found: dict[str, list[tuple[str, list[str]]]]) -> str:
    """What `compare_rows` returns, as text."""
    lines = []
    for title, rows in found.items():
        lines.append(f"{title:<44}" + "".join(f"{heading:>10}" for heading in headings))
        for heading, values in rows:
            lines.append(f"  {heading:<42}" + "".join(f"{value:>10}" for value in values))
        lines.append("")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# POPE
# ---------------------------------------------------------------------------------------------
def run_pope(args: argparse.Namespace) -> Result:
    """Existence questions from official files, answered by a model or from saved answers."""
    bad = Bad(args.skip_bad)
    questions = pope.read_questions(args.questions, bad)
    if args.answers:
        _refuse_limit(args)
        kept, texts = pope.read_answers(args.answers, questions, bad)
    else:
        by_file = itertools.groupby(questions, key=lambda question: question.file)
        questions = [q for _, of_file in by_file for q in itertools.islice(of_file, args.limit)]
        found = with_images(questions, args.images, lambda question: question.image, bad)
        asked = [
            (
                {"file": q.file, "question_id": q.id, "image": q.image, "question": q.text},
                Example(path, q.text + args.suffix, q.label, "yesno"),
            )
            for q, path in found
        ]
        kept, texts = answered([q for q, _ in found], ask_model(args, asked, bad))
    return _with_dropped(pope.score_files(kept, texts, args.parser), pope.table, bad)


def run_pope_build(args: argparse.Namespace) -> Result:
    """Existence questions from COCO's annotations, for `pope --questions` and `train.py --data`."""
    from hallucination.coco import read_instances

    bad = Bad(args.skip_bad)
    rows = pope.build(
        read_instances(args.coco, bad), args.split, args.image_count, args.pairs, args.seed
    )
    write_whole(args.output, "".join(json.dumps(row) + "\n" for row in rows))
    images = len({row["image"] for row in rows})
    return {"n": len(rows), "images": images}, (
        f"{args.output}: {len(rows)} questions about {images} images, half of them no ({args.split})"
    )


# ---------------------------------------------------------------------------------------------
# CHAIR
# ---------------------------------------------------------------------------------------------
def run_chair(args: argparse.Namespace) -> Result:
    """Objects that captions name and images do not hold, by COCO's annotations of 2014."""
    bad = Bad(args.skip_bad)
    if args.synonyms:
        synonyms = chair.read_synonyms(args.synonyms, args.synonyms_mode)
    else:
        synonyms = chair.own_synonyms()
    truth = chair.ground_truth(args.coco, synonyms, bad, Path("runs/cache"))
    decoding = {"max_new_tokens": None, "decoding": None}  # of saved captions: what their rows say
    if args.captions:
        _refuse_limit(args)
        captions, told = chair.read_caption_file(args.captions, bad, truth)
        decoding |= told
    else:
        images = _caption_images(args, truth, bad)[: args.limit]
        asked = [({"image_id": i}, Example(path, args.prompt, "", "caption")) for i, path in images]
        kept, captions = answered([i for i, _ in images], ask_model(args, asked, bad))
        captions = list(zip(kept, captions, strict=True))
        decoding["max_new_tokens"] = args.max_new_tokens
        decoding["decoding"] = f"temperature {args.temperature:g}" if args.temperature else "greedy"
    captions = [(i, final_answer(caption)) for i, caption in captions]
    if not captions:
        raise DataError("no caption to score")
    return _with_dropped(chair.score(captions, truth, synonyms) | decoding, chair.table, bad)


def _caption_images(args: argparse.Namespace, truth, bad: Bad) -> list[tuple[int, Path]]:
    """(id, path) of the images to caption: those listed, or all in the folder that COCO annotates."""
    from hallucination.coco import image_id_of

    paths = {}
    for path in sorted(args.images.iterdir()):
        if path.is_file() and any(c.isdigit() for c in path.stem):
            paths[image_id_of(path.name)] = path
    if not args.image_ids:
        return [(i, path) for i, path in sorted(paths.items()) if i in truth]
    found = {}
    for number, line in enumerate(read_text(args.image_ids).split(), 1):
        where = f"{args.image_ids}, entry {number}"
        try:
            image = image_id_of(line)
        except DataError as error:
            bad(where, str(error))
            continue
        if image in found:
            bad(where, f"image {image} is listed twice")
        elif image not in truth:
            bad(where, f"image {image} is not in the annotations")
        elif image not in paths:
            bad(where, f"image {image} is not in {args.images}")
        else:
            found[image] = paths[image]
    return list(found.items())


# ---------------------------------------------------------------------------------------------
# MME
# ---------------------------------------------------------------------------------------------
def run_mme(args: argparse.Namespace) -> Result:
    """The release folder answered by a model, or official result files."""
    bad = Bad(args.skip_bad)
    if not args.model:
        _refuse_limit(args)
        if not mme.holds_results(args.root):
            raise DataError(
                f"{args.root}: holds no result files (existence.txt, ...): give --model to answer"
            )
        kept, texts = mme.read_results(args.root, args.tasks, bad)
    else:
        questions = mme.read_release(args.root, args.tasks, bad)[: args.limit]
        asked = [
            (
                {"task": q.task, "image": q.image, "question": q.text},
                Example(args.root / q.image, q.text, q.label, "yesno"),
            )
            for q in questions
        ]
        kept, texts = answered(questions, ask_model(args, asked, bad))
    return _with_dropped(mme.score(kept, texts), mme.table, bad)


# ---------------------------------------------------------------------------------------------
# Judge
# ---------------------------------------------------------------------------------------------
def run_judge_export(args: argparse.Namespace) -> Result:
    """Two models' saved answers to the same questions as prompts for a judge, each pair in both orders."""
    bad = Bad(args.skip_bad)
    template = read_text(args.prompt)
    rows = judge.export(template, *args.answers, tuple(args.names), bad, args.question)
    write_whole(args.output, "".join(json.dumps(row) + "\n" for row in rows))
    return {"prompts": len(rows), "pairs": len(rows) // 2}, f"{args.output}: {len(rows)} prompts"


def run_judge_run(args: argparse.Namespace) -> Result:
    """Have the prompts judged, by a server (--base-url) or by a local model; resumed where it stopped."""
    bad = Bad(args.skip_bad)
    rows = judge.read_export(args.prompts, bad)
    name = args.judge_model if args.base_url else _fingerprint(args.judge_model)
    left = judge.unanswered(args.save, rows, name)
    if args.base_url:
        settings = {"temperature": 0, args.tokens_field: args.max_new_tokens}
        replies = judge.run_server(
            rows,
            args.base_url,
            name,
            args.save,
            images=args.images,
            bad=bad,
            concurrency=args.concurrency,
            timeout=args.timeout,
            settings=settings,
        )
    else:
        replies = _judge_locally(args, left, name, bad)
    known = len(rows) - len(left)
    with tqdm(total=len(rows), initial=known, desc="judge", unit="reply", leave=False) as bar:
        for _ in replies:
            bar.update()
    missing = len(judge.unanswered(args.save, rows, name))
    figures = {"prompts": len(rows), "replies": len(rows) - missing}
    return figures, f"{args.save}: {len(rows) - missing} of {len(rows)} prompts have a reply"


def _judge_locally(args: argparse.Namespace, rows: list[dict], name: str, bad: Bad):
    """Greedy replies of a local model, yielded as they are saved; one at a time, as prompts are long."""
    policy = (
        _load(argparse.Namespace(**{**vars(args), "model": args.judge_model})) if rows else None
    )
    for row in rows:
        try:
            image = read_image(image_in(args.images, row["image"])) if row.get("image") else None
        except ValueError as error:
            bad(row["id"], str(error))
            continue
        example = Example(image, row["prompt"], "")
        (reply,) = policy.answer([example], args.max_new_tokens, think=False)
        judge.append_reply(args.save, row, reply, name)
        yield row["id"]


def run_judge_import(args: argparse.Namespace) -> Result:
    """A judge's replies as figures: means and wins by criterion, what could not be read, order bias."""
    bad = Bad(args.skip_bad)
    rows = judge.read_export(args.prompts, bad)
    figures = judge.import_replies(rows, read_rows(args.replies, bad), bad)
    return _with_dropped(figures, judge.table, bad)


# ---------------------------------------------------------------------------------------------
# Saliency
# ---------------------------------------------------------------------------------------------
def run_saliency(args: argparse.Namespace) -> Result:
    """Share of the gradient of the answers that lies on the background, for one model or several."""
    from hallucination import saliency

    bad, figures, masses = Bad(args.skip_bad), {}, {}
    asked = _on_coco(args, bad) if args.questions else _on_scenes(args.scenes)[: args.limit]
    described = [in_words(q.example) for q in asked] if args.words else []
    for model in (args.model, *args.compare):
        of_model = argparse.Namespace(**{**vars(args), "model": model})
        policy = _load(of_model)
        policy.model.requires_grad_(False)  # the pixels' gradient is all that is wanted

        def answers(examples, of_model=of_model, policy=policy):
            rows = [(q.key, example) for q, example in zip(asked, examples, strict=True)]
            return ask_model(of_model, rows, bad, lambda: policy)

        texts = answers([q.example for q in asked])
        figures[model], masses[model] = saliency.score(policy, asked, texts, args.think, bad)
        if described:
            texts = answers(described)
            figures[model] |= saliency.score_words(policy, described, texts, args.think, bad)
    if args.figure:
        from report import draw_overlays

        draw_overlays(asked, masses, args.figure)
    text = saliency.table(figures)
    return _with_dropped(figures if args.compare else figures[args.model], lambda _: text, bad)


def saliency_sheet(
    policy,
    what: str,
    fog: float = 0.0,
    setting: str = "confounded",
    count: int = 30,
    shown: int = 6,
) -> dict:
    """A model's saliency on held-out scenes for a run's page: its figures, and `shown` answers in full.

    rows: question, image (the scene's latent factors), answer, share on the background, and mass, (h, w)
    numbers from 0 to 255.  Nothing at all where there is no saliency to be had.
    """
    from answers import Settings, answer_all
    from hallucination import saliency

    asked = _on_scenes(count, setting, fog)
    rows = [(question.key, question.example) for question in asked]
    texts = answer_all(lambda: policy, rows, Settings(what), None, 128, what=f"{what}: saliency")
    texts = [text if final_answer(text).strip() else None for text in texts]
    try:
        figures, masses = saliency.score(policy, asked, texts, True, Bad(skip=True))
    except DataError as error:
        print(f"{what}: no saliency: {error}", file=sys.stderr)
        return {}
    by_scene = defaultdict(list)
    for question, text, mass in zip(asked, texts, masses, strict=True):
        if mass is not None:
            by_scene[question.key["image"]].append((question, text, mass))
    chosen = [of[n % len(of)] for n, of in enumerate(by_scene.values())][:shown]
    figures["rows"] = [
        {
            "question": question.example.question,
            "image": describe_image(question.example),
            "answer": final_answer(text),
            "share": float(mass[~question.objects].sum() / mass.sum()),
            "mass": (mass * (255 / mass.max())).round().astype(int).tolist(),
        }
        for question, text, mass in chosen
    ]
    return figures


def words_sheet(policy, setting: str = "confounded", count: int = 20) -> dict:
    """A model's saliency over the words of scenes' descriptions: `saliency.score_words`."""
    from answers import Settings, answer_all
    from hallucination import saliency

    asked = _on_scenes(count, setting)
    described = [in_words(question.example) for question in asked]
    rows = [(q.key, example) for q, example in zip(asked, described, strict=True)]
    texts = answer_all(lambda: policy, rows, Settings("words"), None, 128, what="words")
    return saliency.score_words(policy, described, texts, True, Bad(skip=True))


def _on_scenes(count: int, setting: str = "confounded", fog: float = 0.0) -> list:
    """Questions about what is there on held-out scenes of a setting."""
    from hallucination.saliency import Question

    asked, numbers = [], {}
    for probe in _probes(setting, count, fog):
        example = probe.example
        if not probe.redrawn and example.answer != "no":
            image = f"scene {numbers.setdefault(example.scene, len(numbers))}"
            key = {"question_id": len(asked), "image": image}
            asked.append(Question(key, example, example.scene.mask()))
    return asked


def _on_coco(args: argparse.Namespace, bad: Bad) -> list:
    """Questions of a POPE file about COCO's images; the objects are all that are annotated."""
    from hallucination.coco import image_id_of, object_mask, read_instances
    from hallucination.saliency import Question

    instances = read_instances(args.coco, bad)
    questions = pope.read_questions([args.questions], bad)[: args.limit]
    asked = []
    for q, path in with_images(questions, args.images, lambda question: question.image, bad):
        image = image_id_of(q.image)
        if image not in instances.images:
            bad(q.image, f"is not among the images of {args.coco}")
            continue
        _, w, h = instances.images[image]
        size = (round(w * min(1, 384 / w)), max(1, round(h * min(1, 384 / w))))
        objects = object_mask(instances.objects[image], w, h, size)
        key = {"question_id": q.id, "image": q.image}
        asked.append(Question(key, Example(path, q.text, q.label, "yesno"), objects))
    return asked


# ---------------------------------------------------------------------------------------------
# What the commands share
# ---------------------------------------------------------------------------------------------
def _refuse_limit(args: argparse.Namespace) -> None:
    if args.limit is not None:
        raise DataError("--limit says how many questions a model is asked: it needs --model")


def _with_dropped(figures: dict, table: Callable[[dict], str], bad: Bad) -> Result:
    """Figures, with the number of bad entries beside them where there were any."""
    text = table(figures)
    if bad.dropped:
        text += f"\n{bad.dropped} bad entries dropped"
        figures = {**figures, "dropped": bad.dropped}
    return figures, text


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------
def _command(commands, name: str, run: Callable, help_: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help_,
        description=run.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument(
        "--skip-bad",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="drop bad entries and count them, instead of stopping at the first",
    )
    return parser


def _add_model(parser: argparse.ArgumentParser, max_new_tokens: int, batch_size: int = 16) -> None:
    """Flags of a command that can ask a model."""
    group = parser.add_argument_group("the model, if it is to be asked")
    group.add_argument("--model", help="model folder or hub name")
    group.add_argument(
        "--save", type=Path, help="file of its answers; without it, one in runs/answers/"
    )
    group.add_argument("--limit", type=_count, help="ask only the first so many questions")
    group.add_argument("--batch-size", type=_count, default=batch_size, help="answers at once")
    group.add_argument(
        "--max-new-tokens", type=_count, default=max_new_tokens, help="tokens an answer"
    )
    group.add_argument("--temperature", type=_share, default=0.0, help="of sampling; 0: greedy")
    group.add_argument("--seed", type=int, default=0, help="of sampling")
    group.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for reasoning and answer in tags, as in training",
    )
    _add_device(group)


def _add_device(group) -> None:
    group.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    group.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights"
    )
    group.add_argument(
        "--trust-remote-code",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="run code that comes with the model: only for sources you trust",
    )


def _count(text: str) -> int:
    """A flag's whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _share(text: str) -> float:
    """A flag's number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def _parser() -> argparse.ArgumentParser:
    """Every subcommand and its flags."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="\n".join(__doc__.split("\n")[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = _command(commands, "scenes", run_scenes, "the scene world, where truth is known")
    command.add_argument("--answers", type=Path, help="saved completions; no model is loaded")
    command.add_argument(
        "--scenes", type=_count, default=300, help="held-out scenes of each setting"
    )
    command.add_argument(
        "--fog", type=_share, default=0.0, help="the thickest fog in them, from 0 to 1"
    )
    _add_model(command, max_new_tokens=64, batch_size=128)

    command = _command(commands, "pope", run_pope, "existence questions: accuracy, F1, yes-ratio")
    command.add_argument(
        "--questions", type=Path, nargs="+", required=True, help="official question files"
    )
    command.add_argument(
        "--answers", type=Path, nargs="+", help="saved answers: one file for each, or one for all"
    )
    command.add_argument("--images", type=Path, help="folder of the images, for --model")
    command.add_argument(
        "--parser", choices=tuple(pope.PARSERS), default="official", help="what is a yes"
    )
    command.add_argument(
        "--suffix",
        default="",
        help="put after every question, e.g. ' Answer the question using a single word or phrase.'",
    )
    _add_model(command, max_new_tokens=128)

    command = _command(
        commands, "pope-build", run_pope_build, "existence questions from COCO's annotations"
    )
    command.add_argument("--coco", type=Path, required=True, help="instances_*.json")
    command.add_argument(
        "--split", choices=pope.SPLITS, default="adversarial", help="how absent objects are chosen"
    )
    command.add_argument("--output", type=Path, required=True, help="file of questions to write")
    command.add_argument("--image-count", type=_count, default=500, help="images to ask about")
    command.add_argument("--pairs", type=_count, default=3, help="yes/no pairs an image")
    command.add_argument("--seed", type=int, default=0, help="of the choice")

    command = _command(commands, "chair", run_chair, "captions against COCO's annotations")
    command.add_argument(
        "--coco", type=Path, required=True, help="folder of COCO 2014 with its annotations/"
    )
    command.add_argument("--captions", type=Path, help="saved captions; no model is loaded")
    command.add_argument("--images", type=Path, help="folder of the images, for --model")
    command.add_argument(
        "--image-ids", type=Path, help="ids or names of the images to caption; without it, all"
    )
    command.add_argument(
        "--prompt", default="Please describe this image in detail.", help="what the model is asked"
    )
    command.add_argument(
        "--synonyms", type=Path, help="the official synonyms.txt; without it, our own list"
    )
    command.add_argument(
        "--synonyms-mode",
        choices=("strict", "fixed"),
        default="fixed",
        help="leave the four dead entries of the official list dead, or repair them",
    )
    _add_model(command, max_new_tokens=512)

    command = _command(commands, "mme", run_mme, "yes/no pairs over fourteen tasks")
    command.add_argument(
        "--root", type=Path, required=True, help="release folder, or folder of result files"
    )
    command.add_argument("--tasks", nargs="+", metavar="TASK", help="only these; without it, all")
    _add_model(command, max_new_tokens=128)

    actions = commands.add_parser(
        "judge",
        help="two models' answers compared by a third",
        description=judge.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).add_subparsers(dest="action", required=True)

    command = _command(actions, "export", run_judge_export, "prompts from two files of answers")
    command.add_argument(
        "--answers", type=Path, nargs=2, required=True, metavar=("A", "B"), help="saved answers"
    )
    command.add_argument(
        "--names", nargs=2, default=["A", "B"], metavar=("A", "B"), help="what to call the models"
    )
    command.add_argument("--output", type=Path, required=True, help="file of prompts to write")
    command.add_argument(
        "--prompt", type=Path, default=judge.PROMPT, help="the judge's instructions, yours to edit"
    )
    command.add_argument(
        "--question",
        default="Describe this image in detail.",
        help="asked, where answers do not say",
    )

    command = _command(actions, "run", run_judge_run, "have the prompts judged")
    command.add_argument("--prompts", type=Path, required=True, help="file written by export")
    command.add_argument("--save", type=Path, required=True, help="file of replies; resumed")
    command.add_argument("--images", type=Path, default=Path("."), help="folder of the images")
    command.add_argument(
        "--judge-model",
        required=True,
        help="model folder or hub name; with --base-url, its name there",
    )
    command.add_argument(
        "--base-url", help="of an OpenAI-compatible server; its key is OPENAI_API_KEY's value"
    )
    command.add_argument("--concurrency", type=_count, default=1, help="requests at once")
    command.add_argument("--timeout", type=_share, default=120.0, help="seconds without a byte")
    command.add_argument("--max-new-tokens", type=_count, default=1024, help="tokens a reply")
    command.add_argument(
        "--tokens-field",
        default="max_tokens",
        help="what the server calls them; some models want max_completion_tokens",
    )
    _add_device(command)

    command = _command(actions, "import", run_judge_import, "figures from the judge's replies")
    command.add_argument("--prompts", type=Path, required=True, help="file written by export")
    command.add_argument(
        "--replies", type=Path, required=True, help="file written by run, or rows of id and reply"
    )

    command = _command(
        commands, "saliency", run_saliency, "share of the answers' gradient on the background"
    )
    command.add_argument(
        "--compare", nargs="+", default=[], metavar="MODEL", help="further models, side by side"
    )
    command.add_argument(
        "--scenes", type=_count, default=50, help="held-out scenes, unless --questions is given"
    )
    command.add_argument("--questions", type=Path, help="a POPE file, with --images and --coco")
    command.add_argument("--images", type=Path, help="folder of its images")
    command.add_argument("--coco", type=Path, help="instances_*.json that outlines their objects")
    command.add_argument(
        "--words",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="ask again with a description in the place of the scene: saliency over words",
    )
    command.add_argument("--figure", type=Path, help="draw overlays of the first images there")
    _add_model(command, max_new_tokens=64)
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help lists every flag with its default."""
    parser = _parser()
    args = parser.parse_args(argv)
    sources = {"scenes": "answers", "pope": "answers", "chair": "captions"}
    if args.command in sources:
        saved = sources[args.command]
        if bool(args.model) == bool(getattr(args, saved)):
            parser.error(f"{args.command}: give either --model or --{saved}")
        if args.model and args.command != "scenes" and not args.images:
            parser.error(f"{args.command}: --model needs --images")
    if args.command == "saliency":
        if not args.model:
            parser.error("saliency: --model is needed")
        if args.save and (args.compare or args.words):
            parser.error("saliency: --save names one file of answers; there are several here")
        if len({args.questions is None, args.images is None, args.coco is None}) > 1:
            parser.error("saliency: --questions, --images and --coco go together")
        if args.words and args.questions:
            parser.error("saliency: --words describes scenes; it does not go with --questions")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.  Returns the exit code: 0, or 2 for input that cannot be used."""
    args = parse_arguments(argv)
    try:
        figures, text = args.run(args)
        if args.json:
            write_whole(args.json, json.dumps(figures, indent=2) + "\n")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
