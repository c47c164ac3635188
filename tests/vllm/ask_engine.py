"""Started by tests as a process of its own: reads flags and prompts from stdin, writes the replies to stdout's last line.

An engine whose environment must not leak into the tests, or that must fail at start.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from conftest import Engine


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
