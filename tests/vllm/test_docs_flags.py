"""Every server that the documentation starts, and its container guides, given to vLLM's own parser of flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from doc_pages import ALL, ROOT, blocks
from vllm.utils.argparse_utils import FlexibleArgumentParser

from memoir_vllm import config

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser  # since vLLM 0.33
except ImportError:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser


def servers() -> dict[str, list[str]]:
    """Where it is said -> model and flags."""
    commands = {str(line): line.arguments[1:] for line in ALL if line.words and line.arguments[:1] == ["serve"]}
    for line in ALL:
        if line.words[:2] == ["docker", "run"]:
            commands[str(line)] = line.words[line.words.index("memoir") + 1 :]
    ((_, manifest),) = blocks(ROOT / "docs/how-to/kubernetes.md", "yaml")
    deployment = next(yaml.safe_load_all("\n".join(manifest)))
    commands["kubernetes.md"] = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    return commands


@pytest.mark.parametrize(("where", "given"), servers().items(), ids=list(servers()))
def test_vllm_knows_the_flags(where: str, given: list[str]) -> None:
    model, *flags = given
    section: dict[str, Any] = {}
    while "--store" in flags:  # `memoir serve`: this one flag is ours
        at = flags.index("--store")
        name, is_named, folder = flags[at + 1].partition("=")
        if is_named:
            section.setdefault("stores", {})[name] = folder
        else:
            section["store"] = name
        flags = flags[:at] + flags[at + 2 :]
    if not section:
        section = json.loads(flags[flags.index("--additional-config") + 1])["memoir"]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model, *flags])
    assert parsed.model == model
    assert Path(config.parse_section(section).store).name == Path(section["store"]).name
