"""One engine in a process of its own, for an environment that must not leak into the tests.

Reads flags and prompts as JSON from stdin; the last line of stdout is the answer.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from engines import Engine


def main() -> None:
    asked = json.load(sys.stdin)
    engine = Engine(**asked["flags"])
    try:
        replies = engine.ask(asked["prompts"], asked.get("options"), **asked.get("how", {}))
        answer = {"replies": [dataclasses.asdict(reply) for reply in replies], "stats": engine.stats()}
    finally:
        engine.close()
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
