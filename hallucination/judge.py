"""Two models' answers compared by a third: a judge that sees the image scores both from 1 to 10.

    export    two files of saved answers -> prompts, two per pair: A's answer first, and B's answer first
    run       prompts -> replies, from any OpenAI-compatible server or a model of one's own; resumed
    import    replies -> figures

    Accuracy       how true an answer is to the image      Detailedness   how much of the image it tells
    Correctness    how rightly it settles the question

A pair counts for a criterion if both of its orders have been read, so that what a judge gives to the
place of an answer cancels. Of the pairs that count, by criterion:

    mean          of a model's scores, from 1 to 10
    win           share of pairs where its two scores sum to more than the other's; ties have their own
    order bias    mean of (score in first place - score in second place): 0 for a judge without one

Departures from the published protocols of GPT-assisted scoring: 1. every pair is asked in both orders;
2. means instead of sums; 3. what cannot be read is counted, not passed over; 4. the judge sees the final
answer of a completion that reasons in tags; 5. the wording of the prompt is our own, in judge_prompt.txt
to be edited: the published ones know no Correctness, and the wording behind the paper's is not public.
"""

import argparse
import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tqdm import tqdm

from data import DataError, Example, image_in, read_image, short
from hallucination.command import (
    Result,
    add_device,
    at_least_0,
    at_least_1,
    load_model,
    new_command,
    with_dropped,
    write_lines,
)
from hallucination.files import Bad, read_rows, read_text, repair_lines
from hallucination.judge_replies import CRITERIA, Scores, parse_reply
from hallucination.keys import answer_in, answers_in, asks, id_of
from rewards import final_answer

PROMPT = Path(__file__).with_name("judge_prompt.txt")


# ---------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_PLACEHOLDERS = ("question", "answer_1", "answer_2")
_ID_KEYS = ("id", "question_id", "image_id", "image")
_IMAGE_KEYS = ("image", "image_file", "file_name")
_TAKEN = ("win", "tie", "pairs")  # keys of the figures, beside which the names stand


class _Saved(NamedTuple):
    where: str
    question: str | None
    image: str | None
    answer: str


def export(
    template: str,
    answers_1: Path,
    answers_2: Path,
    names: tuple[str, str],
    bad: Bad,
    question: str = "Describe this image in detail.",
) -> list[dict]:
    """Rows for a judge, two per pair: {"id": "12:ab", "image": "a.jpg", "prompt", "first", "second"}.

    template: text with {question}, {answer_1} and {answer_2}, as in PROMPT.  answers_1, answers_2: files
    of saved answers, matched by id (id, question_id, image_id or image; with `file` where rows have it).
    names: of the two models, in the figures.  question: what was asked, where rows do not say.  "image"
    is left out where neither file names one.

    Raises DataError for a template with a placeholder too many or too few, and for names that cannot be
    told apart.  Through `bad`: ids that are missing, repeated or in one file only, rows without an
    answer, and pairs whose files disagree on question or image.
    """
    _check_template(template)
    _check_names(names)
    saved_1, saved_2 = (_read_saved(path, bad, question) for path in (answers_1, answers_2))
    for id_, saved in saved_2.items():
        if id_ not in saved_1:
            bad(saved.where, f"id {id_} is not in {answers_1}")
    rows = []
    for id_, one in saved_1.items():
        two = saved_2.get(id_)
        if two is None:
            bad(one.where, f"id {id_} is not in {answers_2}")
        elif one.question and two.question and one.question != two.question:
            bad(two.where, f"id {id_} is another question than in {answers_1}")
        elif one.image and two.image and one.image != two.image:
            bad(two.where, f"id {id_} is about another image than in {answers_1}")
        else:
            image = one.image or two.image
            asked = one.question or two.question or question
            for order, first, second in (("ab", 0, 1), ("ba", 1, 0)):
                texts = asked, (one, two)[first].answer, (one, two)[second].answer
                row = {"id": f"{id_}:{order}"} | ({"image": image} if image else {})
                row["prompt"] = _fill(template, dict(zip(_PLACEHOLDERS, texts, strict=True)))
                rows.append(row | {"first": names[first], "second": names[second]})
    if not rows:
        raise DataError(f"{answers_1}, {answers_2}: no question that both answer")
    return rows


def read_export(path: Path, bad: Bad) -> list[dict]:
    """Rows as `export` made them, from their file.  Raises DataError for none, or for more than two names.

    Through `bad`: rows that lack something, and repeated ids.
    """
    rows: dict[str, dict] = {}
    for where, row in read_rows(path, bad):
        lacking = [
            k for k in ("id", "prompt", "first", "second") if not isinstance(row.get(k), str)
        ]
        if lacking:
            bad(where, f"not a row of an export: no {lacking[0]}")
        elif not row["id"].endswith((":ab", ":ba")):
            bad(where, f"not a row of an export: id {row['id']}")
        elif not isinstance(row.get("image", ""), str):
            bad(where, "image is not a file name")
        elif row["id"] in rows:
            bad(where, f"id {row['id']} stands here for the second time")
        else:
            rows[row["id"]] = row
    if len({frozenset((row["first"], row["second"])) for row in rows.values()}) != 1:
        raise DataError(f"{path}: must compare one pair of models")
    _check_names(next((row["first"], row["second"]) for row in rows.values()))
    return list(rows.values())


def _read_saved(path: Path, bad: Bad, question: str) -> dict[str, _Saved]:
    """Saved answers by id; `question` was asked where rows do not say."""
    found: dict[str, _Saved] = {}
    rows = list(read_rows(path, bad))
    answers = answers_in([row for _, row in rows], [question] * len(rows))
    for (where, row), (answer, fault) in zip(rows, answers, strict=True):
        value = next((row[key] for key in _ID_KEYS if row.get(key) not in (None, "")), None)
        id_ = id_of(value)
        if id_ is None:
            among = f"no id under any of {', '.join(_ID_KEYS)}"
            bad(where, among if value is None else f"no id in {short(value)}")
            continue
        id_ = f"{row['file']}:{id_}" if "file" in row else id_
        if id_ in found:
            bad(where, f"id {id_} stands here for the second time")
        elif answer is None:
            bad(where, f"id {id_} {fault}")
        else:
            asked = _first(row, ("question", "prompt"))
            text = _first(row, ("text",))
            if asked is None and text and text != answer and asks(text):  # as in rows of POPE
                asked = text
            found[id_] = _Saved(where, asked, _first(row, _IMAGE_KEYS), final_answer(answer))
    return found


def _first(row: dict, keys: Sequence[str]) -> str | None:
    return next((row[key] for key in keys if row.get(key) and isinstance(row[key], str)), None)


def _check_names(names: Sequence[str]) -> None:
    if names[0] == names[1] or not all(names) or set(names) & set(_TAKEN):
        raise DataError(f"names {names[0]!r}, {names[1]!r}: must differ, and be none of {_TAKEN}")


def _check_template(template: str) -> None:
    there = set(_PLACEHOLDER.findall(template))
    for name in _PLACEHOLDERS:
        if name not in there:
            raise DataError(f"prompt: placeholder {{{name}}} is missing")
    for name in sorted(there.difference(_PLACEHOLDERS)):
        known = ", ".join(f"{{{known}}}" for known in _PLACEHOLDERS)
        raise DataError(f"prompt: unknown placeholder {{{name}}}; they are {known}")


def _fill(template: str, texts: Mapping[str, str]) -> str:
    """In one pass: what looks like a placeholder in an answer stays as it is."""
    return _PLACEHOLDER.sub(lambda match: texts[match[1]], template)


# ---------------------------------------------------------------------------------------------
# Replies
# ---------------------------------------------------------------------------------------------
def import_replies(
    rows: Sequence[dict], replies: Iterable[tuple[str, dict]], bad: Bad
) -> dict[str, object]:
    """The figures of a judge's replies to exported rows; None where there is nothing to average.

    rows: of `export` or `read_export`.  replies: (place, {"id", "reply"}), as `read_rows` gives them; the
    reply may also go by any name that `keys.answers_in` knows.  Through `bad`: ids that are unknown or
    repeated, rows without a reply in them, and replies to another prompt than the row's.

    names       the two models
    accuracy, correctness, detailedness     each with
        <name>  mean score         win    shares of pairs by name, and "tie"        pairs   that count
    order_bias  by criterion
    pairs       that count for at least one criterion        exported   pairs asked for
    unread      scores not to be had, of 3 for each exported row: a missing reply lacks all 3
    missing     exported rows without a reply
    """
    by_id = {row["id"]: row for row in rows}
    parsed: dict[str, Scores] = {}
    for where, reply in replies:
        fault = _fault(reply, by_id)
        if fault is None and reply["id"] in parsed:
            fault = f"id {reply['id']} stands here for the second time"
        if fault:
            bad(where, fault)
        else:
            parsed[reply["id"]] = parse_reply(_reply_in(reply))
    names = [rows[0]["first"], rows[0]["second"]]
    figures: dict[str, object] = {"names": names}
    order_bias: dict[str, float | None] = {}
    counted: set[str] = set()
    for criterion in CRITERIA:
        pairs = _both_orders(rows, parsed, criterion)
        counted.update(pairs)
        figures[criterion] = _compare(list(pairs.values()), names)
        places = [scores for pair in pairs.values() for scores in pair.values()]
        order_bias[criterion] = _mean(first - second for first, second in places)
    return figures | {
        "order_bias": order_bias,
        "pairs": len(counted),
        "exported": len({_pair_of(row) for row in rows}),
        "unread": len(CRITERIA) * len(rows) - sum(map(len, parsed.values())),
        "missing": len(rows) - len(parsed),
    }


def _both_orders(
    rows: Sequence[dict], parsed: Mapping[str, Scores], criterion: str
) -> dict[str, dict[str, tuple[float, float]]]:
    """Pair -> name in first place -> scores in first and second place, where both orders are read."""
    pairs: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for row in rows:
        if criterion in parsed.get(row["id"], {}):
            pairs[_pair_of(row)][row["first"]] = parsed[row["id"]][criterion]
    return {pair: orders for pair, orders in pairs.items() if len(orders) == 2}


def _compare(
    pairs: Sequence[Mapping[str, tuple[float, float]]], names: Sequence[str]
) -> dict[str, object]:
    """Means and wins of one criterion."""
    a, b = names
    sums = [(pair[a][0] + pair[b][1], pair[b][0] + pair[a][1]) for pair in pairs]
    winners = [  # 7.1 + 8.2 and 7.6 + 7.7 are a tie
        "tie" if math.isclose(of_a, of_b) else a if of_a > of_b else b for of_a, of_b in sums
    ]
    return {
        a: _mean(of_a / 2 for of_a, _ in sums),
        b: _mean(of_b / 2 for _, of_b in sums),
        "win": {name: _mean(winner == name for winner in winners) for name in (a, b, "tie")},
        "pairs": len(pairs),
    }


def table(figures: dict) -> str:
    """The figures of `import_replies` as text, one line per criterion."""
    names = figures["names"]
    width = max(10, *(len(name) + 7 for name in names))
    heads = [*names, *(f"{name} wins" for name in names), "tie", "order bias", "pairs"]
    lines = [f"{'':<14}" + "".join(f"{head:>{width}}" for head in heads)]
    for criterion in CRITERIA:
        of = figures[criterion]
        values = [of[names[0]], of[names[1]], *(of["win"][key] for key in (*names, "tie"))]
        values.append(figures["order_bias"][criterion])
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"{criterion:<14}" + "".join(f"{x:>{width}}" for x in [*cells, of["pairs"]]))
    lines.append(
        f"{figures['pairs']} of {figures['exported']} pairs read in both orders; {figures['unread']} "
        f"scores unread, {figures['missing']} replies missing"
    )
    return "\n".join(lines)


def _pair_of(row: dict) -> str:
    return row["id"].rpartition(":")[0]


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return fmean(values) if values else None


def _reply_in(row: dict) -> str | None:
    return row["reply"] if isinstance(row.get("reply"), str) else answer_in(row)[0]


def _fault(reply: object, by_id: Mapping[str, dict]) -> str | None:
    """Why something is not a reply to any exported row, or None."""
    if not isinstance(reply, dict) or not isinstance(reply.get("id"), str):
        return "no id"
    id_ = reply["id"]
    if id_ not in by_id:
        return f"id {id_} is not in the export"
    if reply.get("asked", _asked(by_id[id_])) != _asked(by_id[id_]):
        return f"id {id_} is a reply to another prompt than the export's"
    return f"id {id_} holds no reply" if _reply_in(reply) is None else None


# ---------------------------------------------------------------------------------------------
# The file of replies
# ---------------------------------------------------------------------------------------------
def unanswered(save: Path, rows: Sequence[dict], judge: str) -> list[dict]:
    """The exported rows to which a file of replies has none yet; all of them where there is no file.

    judge: the name of the model that replies.  A last line that was cut short is cut off the file.
    Raises DataError for a file with something else in it: of another judge or another export.
    """
    by_id, done = {row["id"]: row for row in rows}, set()
    for number, line in enumerate(repair_lines(save), 1):
        reply = json.loads(line)
        fault = _fault(reply, by_id)
        if fault is None and reply.get("judge", judge) != judge:
            fault = f"holds replies of another judge ({reply['judge']!r})"
        if fault:
            raise DataError(f"{save}:{number}: {fault}: save to another file")
        done.add(reply["id"])
    return [row for row in rows if row["id"] not in done]


def append_reply(save: Path, row: dict, reply: str, judge: str) -> None:
    """Add the reply to an exported row; it is on disk when this returns.  After `unanswered` only."""
    save.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"id": row["id"], "reply": reply, "judge": judge, "asked": _asked(row)})
    with save.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _asked(row: dict) -> str:
    """What tells prompts apart: the ids of two exports may be the same."""
    facts = [row["prompt"], row.get("image"), row["first"], row["second"]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------
def add_command(commands) -> None:
    """Add `evaluate.py judge export | run | import`."""
    actions = commands.add_parser(
        "judge",
        help="two models' answers compared by a third",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).add_subparsers(dest="action", required=True)

    command = new_command(actions, "export", run_export, "prompts from two files of answers")
    command.add_argument(
        "--answers", type=Path, nargs=2, required=True, metavar=("A", "B"), help="saved answers"
    )
    command.add_argument(
        "--names", nargs=2, default=["A", "B"], metavar=("A", "B"), help="what to call the models"
    )
    command.add_argument("--output", type=Path, required=True, help="file of prompts to write")
    command.add_argument(
        "--prompt", type=Path, default=PROMPT, help="the judge's instructions, yours to edit"
    )
    command.add_argument(
        "--question",
        default="Describe this image in detail.",
        help="asked, where answers do not say",
    )

    command = new_command(actions, "run", run_run, "have the prompts judged")
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
    command.add_argument("--concurrency", type=at_least_1, default=1, help="requests at once")
    command.add_argument("--timeout", type=at_least_0, default=120.0, help="seconds without a byte")
    command.add_argument("--max-new-tokens", type=at_least_1, default=1024, help="tokens per reply")
    command.add_argument(
        "--tokens-field",
        default="max_tokens",
        help="what the server calls them; some models want max_completion_tokens",
    )
    add_device(command)

    command = new_command(actions, "import", run_import, "figures from the judge's replies")
    command.add_argument("--prompts", type=Path, required=True, help="file written by export")
    command.add_argument(
        "--replies", type=Path, required=True, help="file written by run, or rows of id and reply"
    )


def run_export(args: argparse.Namespace) -> Result:
    """Two models' saved answers to the same questions as prompts for a judge, each pair in both orders."""
    bad = Bad(args.skip_bad)
    template = read_text(args.prompt)
    rows = export(template, *args.answers, tuple(args.names), bad, args.question)
    write_lines(args.output, rows)
    return {"prompts": len(rows), "pairs": len(rows) // 2}, f"{args.output}: {len(rows)} prompts"


def run_run(args: argparse.Namespace) -> Result:
    """Have the prompts judged, by a server (--base-url) or by a local model; resumed where it stopped."""
    from hallucination.judge_server import run_server

    bad = Bad(args.skip_bad)
    rows = read_export(args.prompts, bad)
    name = args.judge_model if args.base_url else _fingerprint(args.judge_model)
    left = unanswered(args.save, rows, name)
    if args.base_url:
        settings = {"temperature": 0, args.tokens_field: args.max_new_tokens}
        replies = run_server(
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
    missing = len(unanswered(args.save, rows, name))
    figures = {"prompts": len(rows), "replies": len(rows) - missing}
    return figures, f"{args.save}: {len(rows) - missing} of {len(rows)} prompts have a reply"


def _fingerprint(model: str) -> str:
    from hallucination.answers import fingerprint  # which imports torch

    return fingerprint(model)


def _judge_locally(args: argparse.Namespace, rows: list[dict], name: str, bad: Bad):
    """Greedy replies of a local model, yielded as they are saved; one at a time, as prompts are long."""
    policy = load_model(args.judge_model, args) if rows else None
    for row in rows:
        try:
            image = read_image(image_in(args.images, row["image"])) if row.get("image") else None
        except ValueError as error:
            bad(row["id"], str(error))
            continue
        example = Example(image, row["prompt"], "")
        (reply,) = policy.answer([example], args.max_new_tokens, think=False)
        append_reply(args.save, row, reply, name)
        yield row["id"]


def run_import(args: argparse.Namespace) -> Result:
    """A judge's replies as figures: means and wins by criterion, what could not be read, order bias."""
    bad = Bad(args.skip_bad)
    rows = read_export(args.prompts, bad)
    figures = import_replies(rows, read_rows(args.replies, bad), bad)
    return with_dropped(figures, table, bad)
