"""The judge as a server: any that speaks OpenAI's chat completions, its key in OPENAI_API_KEY.

Every reply is on disk before the next is asked for, so that a run that was stopped goes on. What may
pass is tried again after a growing pause; what the server refuses for good ends the run with its reason.
"""

import base64
import json
import os
import random
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from data import DataError, image_in
from hallucination.files import Bad
from hallucination.judge import append_reply, unanswered

SETTINGS = {"temperature": 0, "max_tokens": 1024}  # of a request; room for three reasons
_PASSING = (0, 408, 409, 429)  # and 5xx: worth another try; 0 is a try without a usable response
_OF_THE_ROW = (400, 413, 422)  # may be what this row asks; other refusals would meet every row
_LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for
_MOST_BYTES = 1 << 24  # of a response
_SHORTEST_SECRET = 8  # characters; "EMPTY" and "none" are stand-ins, and words of a reply
_PICTURES = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp"}


class _Outcome(NamedTuple):
    """How a try ended."""

    status: int  # of the response; 0: there was none, or none with a reply in it
    said: str  # the reply; without one, what went wrong
    retry_after: str | None = None


class _AsItIs(urllib.request.HTTPErrorProcessor):
    """Hands every response over as it is: a redirect is not followed, and takes the key nowhere."""

    def http_response(self, request, response):
        """Nothing to process."""
        return response

    https_response = http_response


def run_server(
    rows: Sequence[dict],
    base_url: str,
    model: str,
    save: Path,
    *,
    images: Path = Path("."),
    bad: Bad | None = None,
    concurrency: int = 1,
    timeout: float = 120.0,
    tries: int = 6,
    settings: Mapping[str, object] = SETTINGS,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """Ask an OpenAI-compatible server what `save` does not hold yet; yields each id once it is dealt with.

    rows: of `export` or `read_export`; `unanswered` tells beforehand how many ids will come.  base_url:
    such as http://localhost:8000/v1.  The key is that of the environment, OPENAI_API_KEY, if there is
    one.  images: the folder that image names are relative to, and must lie in.  concurrency: requests
    at once.  timeout: seconds without a byte.  tries: of one request, with growing pauses between them.
    settings: of the request; some models want other names for these.

    Raises DataError where the server refuses, or has not replied after all tries: every reply so far is
    in `save`, and a later call goes on from there.  Through `bad`: rows whose image cannot be sent, and
    rows that the server calls malformed.
    """
    bad = bad or Bad()
    url, key = _chat_url(base_url), _api_key()
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    left = _with_images(unanswered(save, rows, model), images, bad)
    saving, stopped = threading.Lock(), threading.Event()

    def pause(seconds: float) -> None:
        if stopped.is_set():
            raise DataError("stopped")
        sleep(seconds)

    def ask(item: tuple[dict, Path | None]) -> str:
        row, image = item
        body = {"model": model, "messages": _messages(row["prompt"], image), **settings}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        outcome = _try(request, timeout, tries, pause)
        said = outcome.said.replace(key, "***") if len(key) >= _SHORTEST_SECRET else outcome.said
        reason = f"{url}: {outcome.status or 'no reply'}: {_short(said)}"
        with saving:
            if outcome.status == 200:
                append_reply(save, row, said, model)
            elif outcome.status in _OF_THE_ROW:
                bad(row["id"], reason)
            else:
                raise DataError(f"{row['id']}: {reason}")
        return row["id"]

    yield from _side_by_side(ask, left, concurrency, stopped)


def _side_by_side(
    ask: Callable, items: Sequence, concurrency: int, stopped: threading.Event
) -> Iterator[str]:
    """What `ask` returns of each item, `concurrency` of them at once; `stopped` is set at the end."""
    if concurrency == 1:
        yield from map(ask, items)
        return
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            for future in as_completed([pool.submit(ask, item) for item in items]):
                yield future.result()
        finally:  # requests under way end and are saved, the others are not made
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _try(
    request: urllib.request.Request, timeout: float, tries: int, pause: Callable[[float], None]
) -> _Outcome:
    """The outcome of the last try: the first that is final."""
    for attempt in range(tries):
        outcome = _post(request, timeout)
        if not (outcome.status in _PASSING or outcome.status >= 500):
            return outcome
        if attempt + 1 < tries:
            pause(_wait(attempt, outcome.retry_after))
    return outcome._replace(said=f"after {tries} tries: {outcome.said}")


def _wait(attempt: int, retry_after: str | None) -> float:
    """Seconds before the next try: as the server asks; or doubling, with jitter against marching in step."""
    if retry_after and re.fullmatch(r"[0-9]+(\.[0-9]+)?", retry_after.strip()):
        return min(float(retry_after), _LONGEST_WAIT)
    return min(2.0**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1)


def _post(request: urllib.request.Request, timeout: float) -> _Outcome:
    """One try."""
    try:
        with urllib.request.build_opener(_AsItIs).open(request, timeout=timeout) as response:
            body = response.read(_MOST_BYTES).decode("utf-8", "replace")
            status, retry_after = response.status, response.headers.get("Retry-After")
    except (OSError, HTTPException) as error:
        return _Outcome(0, str(getattr(error, "reason", error)) or type(error).__name__)
    if status != 200:
        return _Outcome(status, _message(body), retry_after)
    try:
        reply = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        reply = 0
    if reply is None:  # nothing said within max_tokens: a reply, which counts as unread
        reply = ""
    if isinstance(reply, str):
        return _Outcome(200, reply)
    return _Outcome(0, f"200, without a reply in it: {_message(body)}")


def _message(body: str) -> str:
    """What a server says has gone wrong: its message where it gives one in JSON, else all of it."""
    said = body
    with suppress(ValueError, LookupError, TypeError, RecursionError):  # as far as it goes
        said = json.dumps(value := json.loads(body))
        said = str(value["error"]["message"])
    return said


def _short(text: str) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 300 else text[:300] + " ..."


def _messages(prompt: str, image: Path | None) -> list[dict]:
    content: str | list = prompt
    if image:
        url = f"data:image/{_kind(image)};base64,{base64.b64encode(image.read_bytes()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": prompt},
        ]
    return [{"role": "user", "content": content}]


def _with_images(rows: Sequence[dict], images: Path, bad: Bad) -> list[tuple[dict, Path | None]]:
    """(row, path of its image); all are looked at before the first request is paid for."""
    found = []
    for row in rows:
        try:
            image = image_in(images, row["image"]) if row.get("image") else None
            if image and _kind(image) is None:
                raise ValueError(f"image {image} is neither JPEG, PNG, GIF nor WebP")
        except (OSError, ValueError) as error:
            bad(row["id"], str(error))
        else:
            found.append((row, image))
    return found


def _kind(image: Path) -> str | None:
    """The format by the first bytes, whatever the file is called; no other file leaves this machine."""
    with image.open("rb") as file:
        start = file.read(4)
    return next((kind for sign, kind in _PICTURES.items() if start.startswith(sign)), None)


def _chat_url(base_url: str) -> str:
    """Where to post.  Raises DataError, without the address where it may hold a password."""
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not re.fullmatch(r"[!-~]+", base_url):
        raise DataError("base_url: must be like http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise DataError("base_url: must hold no user, password or query; OPENAI_API_KEY is the key")
    return base_url.rstrip("/") + "/chat/completions"


def _api_key() -> str:
    """The key, or nothing.  Raises DataError, without the key, for one that no header can carry."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise DataError("OPENAI_API_KEY: holds a space or a sign that no key has")
    return key
