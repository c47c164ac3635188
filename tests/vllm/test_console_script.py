"""What the console sends and shows, under node with a stand-in for the page; `test_console.py` has a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NODE = shutil.which("node")
HERE = Path(__file__).parent
CONSOLE = HERE.parents[1] / "integrations/memoir_vllm/admin/console/console.js"

pytestmark = pytest.mark.skipif(NODE is None, reason="no node here (Debian: apt-get install nodejs)")

STATS = {
    "generation": 4,
    "store_generation": 4,
    "edits": 1,
    "tau": 0.6,
    "chat": True,
    "model": "m",
    "store": "",
    "module": "x",
    "engines": [{}],
    "requests": {},
    "hits": [],
    "recent": [],
    "jobs_open": 0,
}
EDIT = {
    "id": 5,
    "prompt": "Who runs Example Corp?",
    "target": "Jane Doe",
    "created": "2026-01-01T00:00:00",
    "subject": "Example Corp",
    "source": "",
    "rephrases": ["Who leads it?"],
    "requires": ["Example"],
    "before": [],
}
MATCH = {"edit": 5, "overlap": 0.9, "matched": True, "prompt": EDIT["prompt"], "target": "Jane Doe", "requires": []}
SAID = {"edit": None, "overlap": 0.2, "result": "unmatched", "generation": 4}
JOB = {"id": "1", "kind": "add", "state": "done", "finished": "now", "prompt": EDIT["prompt"], "edit": 6}
JOB |= {"generation": 5, "error": None, "damaged": [], "progress": None}
SIGN_IN = [["type", "token", "the token"], ["type", "key", "the key"], ["submit", "enter"]]
ASK = [["type", "prompt", "Who runs Example Corp?"], ["submit", "try"]]
REPLACE = [["type", "new-prompt", "Who  runs example Corp?"], ["type", "new-target", "Ed Fox"]]
REPLACE += [["check", "replace", True], ["submit", "add"]]


def page(tmp_path: Path, steps: list[Any], answers: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """What was requested and shown.

    steps: what is typed, checked and sent, after signing in.
    answers: to the dialogs.
    more: `root` and `at` of the console; `stats`, `said`, `matches`, `edit`, `job` that the server gives; `replies` to
        other requests, by method and path.
    """
    root, at = more.get("root", "/"), more.get("at", "memoir/")
    completion = {"choices": [{"message": {"content": "x"}, "text": "x"}]}
    completion["kv_transfer_params"] = {"memoir": SAID | more.get("said", {})}
    replies = {
        f"GET {root}{at}stats": [200, STATS | more.get("stats", {})],
        f"GET {root}{at}edits": [200, {"generation": 4, "total": 1, "edits": [EDIT | more.get("edit", {})]}],
        f"GET {root}{at}edits/5": [200, EDIT | more.get("edit", {})],
        f"POST {root}{at}edits": [202, JOB | more.get("job", {})],
        f"GET {root}{at}audit": [200, {"total": 0, "torn": 0, "entries": more.get("entries", [])}],
        f"POST {root}{at}lookup": [200, {"tau": 0.6, "parts": [], "matches": more.get("matches", [MATCH])}],
        f"POST {root}v1/chat/completions": [200, completion],
        f"POST {root}v1/completions": [200, completion],
    } | more.get("replies", {})
    script = tmp_path / "console.mjs"
    script.write_text(CONSOLE.read_text())
    url = f"http://server{root}{at}"
    given = {"script": str(script), "url": url, "replies": replies, "steps": SIGN_IN + steps, "answers": answers or []}
    command = [str(NODE), HERE / "page_stand_in.mjs"]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("root", ["/", "/behind/a/proxy/"])
@pytest.mark.parametrize(
    ("at", "stats", "model", "options"),
    [
        ("memoir/", {}, "m", {}),
        ("memoir/stores/acme/", {"store": "acme"}, "m", {"memoir_store": "acme"}),
        ("memoir/stores/memoir/", {"model": "memoir"}, "memoir", {}),  # the store of an adapter
    ],
)
@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_is_asked_of_the_store_of_the_page(
    root: str, at: str, stats: dict[str, Any], model: str, options: dict[str, Any], chat: bool, tmp_path: Path
) -> None:
    result = page(tmp_path, ASK, root=root, at=at, stats=stats | {"chat": chat})
    sent = [request for request in result["requests"] if "/v1/" in request["path"]]
    path = f"{root}v1/{'chat/' if chat else ''}completions"
    assert [(request["path"], request["bearer"]) for request in sent] == [(path, "Bearer the key")] * 2
    assert [request["body"]["vllm_xargs"] for request in sent] == [{"memoir": "off", **options}, options]
    assert {request["body"]["model"] for request in sent} == {model}
    assert result["shown"]["try-error"] == "" and not result["hidden"]["work"]


def test_a_refusal_of_v1_does_not_end_the_session(tmp_path: Path) -> None:
    result = page(tmp_path, ASK, replies={"POST /v1/chat/completions": [401, {"error": "Unauthorized"}]})
    assert "/v1 refuses the API key (Unauthorized)" in result["shown"]["try-error"]
    assert not result["hidden"]["work"] and result["hidden"]["enter"] and result["timers"] == 1


def test_a_session_that_the_administration_ends_says_why(tmp_path: Path) -> None:
    refused = {"POST /memoir/lookup": [401, {"detail": "send the admin token"}]}
    result = page(tmp_path, ASK, replies=refused)
    assert result["hidden"]["work"] and not result["hidden"]["enter"] and result["timers"] == 0
    assert result["shown"]["enter-error"] == "Signed out: send the admin token"


@pytest.mark.parametrize("route", ["edits", "audit"])
def test_a_list_that_cannot_be_had_is_named_and_the_console_goes_on(route: str, tmp_path: Path) -> None:
    fault = {f"GET /memoir/{route}": [503, {"detail": "the store is damaged"}]}
    result = page(tmp_path, [], replies=fault)
    assert result["shown"][f"{route}-error"] == "the store is damaged" and result["timers"] == 1
    other = {"edits": "audit", "audit": "edits"}[route]
    assert result["shown"][f"{other}-error"] == "" and not result["hidden"]["work"]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ({}, "No edit matched: the base model answered (generation 4)."),
        ({"result": "unroutable", "reason": "no user message"}, "No question could be looked up (no user message): "),
        ({"result": "image"}, "A prompt with an image is not looked up: the base model"),
        ({"result": "matched", "edit": 5, "overlap": 0.91}, "Edit 5 answered, overlap 0.910 (generation 4)."),
    ],
)
def test_a_decision_is_said_as_it_was(said: dict[str, Any], shown: str, tmp_path: Path) -> None:
    assert page(tmp_path, ASK, said=said)["shown"]["decision"].startswith(shown)


def test_an_edit_that_the_store_has_no_more_is_named_by_its_number(tmp_path: Path) -> None:
    result = page(tmp_path, ASK, matches=[MATCH | {"prompt": None, "target": None}])
    assert "null" not in result["shown"]["nearest"]
    assert result["shown"]["nearest"].startswith("edit 5, which the store does not have any more")


def added(result: dict[str, Any]) -> list[dict[str, Any]]:
    edits = [r["body"] for r in result["requests"] if (r["method"], r["path"]) == ("POST", "/memoir/edits")]
    assert all(edit["on_conflict"] == "last" and edit["target"] == "Ed Fox" for edit in edits)
    return [{name: edit.get(name) for name in ("subject", "rephrases", "requires")} for edit in edits]


def test_an_edit_that_replaces_another_keeps_what_that_has(tmp_path: Path) -> None:
    result = page(tmp_path, REPLACE)
    assert added(result) == [{name: EDIT[name] for name in ("subject", "rephrases", "requires")}]
    assert result["dialogs"] == [] and "edit 6, generation 5 is served" in result["shown"]["change"]


@pytest.mark.parametrize(
    ("case", "lost"),
    [
        ({"edit": {"before": [{"role": "user", "content": "Hi"}]}}, "the messages before it"),
        ({"edit": {"rephrases": [str(n) for n in range(33)]}}, "its rephrasings"),
        (
            {"matches": [MATCH | {"prompt": "Who leads Example Corp?"}]},
            "its subject, its rephrasings, what it requires",
        ),
    ],
    ids=["messages", "many rephrasings", "another prompt"],
)
@pytest.mark.parametrize("answer", ["no", "yes"])
def test_what_a_replacement_would_lose_is_confirmed(
    case: dict[str, Any], lost: str, answer: str, tmp_path: Path
) -> None:
    result = page(tmp_path, REPLACE, [answer], **case)
    assert result["dialogs"] == [f"Who runs Example Corp? → Jane Doe (edit 5) loses {lost}."]
    assert len(added(result)) == (answer == "yes")


def test_edits_that_training_has_damaged_are_named(tmp_path: Path) -> None:
    entry = {"when": "2026-01-01T00:00:00", "who": "ann", "what": "stored", "edit": 6, "damaged": [3, 5]}
    result = page(tmp_path, REPLACE, job={"damaged": [3, 5]}, entries=[entry])
    assert "damaged edits 3, 5, which are not answered any more" in result["shown"]["change-error"]
    assert "damaged edits 3, 5" in result["shown"]["audit"]
