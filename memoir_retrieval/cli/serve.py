"""`memoir serve`: vLLM's OpenAI server with a store's edits."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import click

from memoir_retrieval.cli.common import notes
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.model.base import resolve
from memoir_retrieval.store.read import EditStore

__all__ = ["serve", "server_command"]

_ADDITIONAL = "--additional-config"
# What `vllm serve` alone reads. We start the server below it: of vLLM's CPU build that command does not start.
_UNREAD = ("--headless", "--api-server-count", "--data-parallel-multi-port-external-lb", "--grpc")
_SHORT = {"-asc": "--api-server-count", "-dpm": "--data-parallel-multi-port-external-lb"}


def server_command(
    model: str, store: Path, flags: Sequence[str] = (), stores: Mapping[str, Path] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of the server.

    model: name or folder of the model to serve.
    store: folder of the edits.
    flags: vLLM's own, put behind ours; one `--additional-config` among them is merged with the store's.
    stores: folders of further edits, by the name of each store.

    Raises StoreError for a store that cannot be opened, ModelError for a model that is not there, ConfigError where
    vLLM is not installed, or `flags`, or a file that they name, configure another store or what would not be read.
    """
    manifest = EditStore.open(store).manifest
    folder = resolve(model)
    if find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed: pip install 'memoir-retrieval[vllm]' (on a CPU see the Makefile)")
    flags, additional = _take_additional_config(list(flags))
    section = additional.setdefault("memoir", {})
    named = section.get("store", str(store))
    if not isinstance(named, str) or Path(named).resolve() != store.resolve():
        raise ConfigError(f"--additional-config names the store {named}, --store says {store}: give one")
    section["store"] = str(store.resolve())
    if stores:
        section["stores"] = section.get("stores", {}) | {name: str(path.resolve()) for name, path in stores.items()}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    given = _given(flags)
    if "--served-model-name" not in given:
        command += ["--served-model-name", model]
    if "--dtype" not in given:
        command += ["--dtype", manifest.dtype]  # fingerprints are surest in the dtype that they were made in
    environment = dict(os.environ) | {"VLLM_PLUGINS": _plugins(os.environ.get("VLLM_PLUGINS"))}
    if unread := next((name for name, value in given.items() if _is_unread(name, value)), None):
        raise ConfigError(
            f"{unread} is read by vLLM's own command only: VLLM_PLUGINS={environment['VLLM_PLUGINS']} vllm serve "
            f"{folder} {_ADDITIONAL} '{json.dumps(additional)}', with {unread} and the other flags"
        )
    if not _has_gpu():
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return [*command, "--additional-config", json.dumps(additional), *flags], environment


def _plugins(plugins: str | None) -> str:
    """What VLLM_PLUGINS must be. Raises ConfigError for a given list without us.

    vLLM loads all plugins while it is unset, but those that add routes only where it names them. So it names all that
    would be loaded anyway, and with our own name our routes.
    """
    if plugins is not None:
        if "memoir" not in plugins.split(","):
            raise ConfigError(f"VLLM_PLUGINS is {plugins!r}, so vLLM would load no edits: add memoir to it")
        return plugins
    groups = ("general", "platform", "io_processor", "stat_logger")
    return ",".join(sorted({point.name for group in groups for point in entry_points(group=f"vllm.{group}_plugins")}))


def _given(flags: Sequence[str]) -> dict[str, str]:
    """Names of the flags, with what follows each, and of those in a file that --config names."""
    given: dict[str, str] = {}
    for flag, following in zip(flags, [*flags[1:], ""], strict=False):
        name, has_value, value = flag.partition("=")
        given[name.replace("_", "-")] = value if has_value else following
    return (_in_file(given["--config"]) if "--config" in flags else {}) | given


def _in_file(file: str) -> dict[str, str]:
    """The flags in a file of vLLM's --config. Raises ConfigError for a file that no server takes, or with a store's
    section in it: vLLM reads a file's flags before ours, and of two takes the last."""
    import yaml  # vLLM needs it too

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file} holds no flags: write a line NAME: VALUE for each")
    for key in content:
        if _is_additional(f"--{key}"):
            raise ConfigError(f"--config {file} holds {key}, which vLLM would drop for the store's: give it as a flag")
    return {f"--{key}".replace("_", "-"): str(value) for key, value in content.items() if value is not False}


def _is_additional(name: str) -> bool:
    whole = name.replace("_", "-").partition(".")[0]
    return whole.startswith("--ad") and _ADDITIONAL.startswith(whole)


def _is_unread(name: str, value: str) -> bool:
    name = _SHORT.get(name, name)
    whole = next((flag for flag in _UNREAD if len(name) > 5 and flag.startswith(name)), "")
    return bool(whole) and not (whole == "--api-server-count" and value == "1")


def _take_additional_config(flags: list[str]) -> tuple[list[str], dict]:
    """Take the user's own --additional-config out of the flags, to be merged with ours.

    Of several vLLM takes the last, and beside one with a dot it drops the others: a store in them would be gone, and
    the server would start without edits. So every way to write the flag counts, underscores and short forms too.
    """
    rest: list[str] = []
    text: str | None = None
    after = iter(flags)
    for flag in after:
        name, has_value, value = flag.partition("=")
        if not _is_additional(name):
            rest.append(flag)
        elif "." in name:
            raise ConfigError(
                f"{flag} would make vLLM drop the store's {_ADDITIONAL}: write it as JSON, such as "
                f'{_ADDITIONAL} \'{{"memoir": {{"tau": 0.5}}}}\''
            )
        elif text is not None:
            raise ConfigError(f"{_ADDITIONAL} is given twice, and vLLM would take the last: give one")
        else:
            text = value if has_value else next(after, "")
    if text is None:
        return flags, {}
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{_ADDITIONAL} {text!r} is not a JSON object: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("memoir", {}), dict):
        raise ConfigError(f"{_ADDITIONAL} {text!r} is not a JSON object of objects")
    return rest, config


def _named(folders: Sequence[str]) -> tuple[Path, dict[str, Path]]:
    """The default store, and the others by name. Raises ConfigError unless there is one default store."""
    stores: dict[str, Path] = {}
    for folder in folders:
        name, equals, path = folder.partition("=")
        if not equals or Path(folder).exists():
            name, path = "", folder
        if name in stores:
            raise ConfigError(f"--store {folder} is a second {name or 'default'} store: give it a name, as NAME=FOLDER")
        stores[name] = Path(path)
    if "" not in stores:
        raise ConfigError("--store names no store for requests that ask for none: add --store FOLDER")
    return stores.pop(""), stores


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.option(
    "--store",
    "-s",
    "folders",
    required=True,
    multiple=True,
    help="Folder of the store; NAME=FOLDER adds one that requests ask for by name, or that of an adapter.",
)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def serve(model: str, folders: tuple[str, ...], flags: tuple[str, ...]) -> None:
    """Start vLLM's OpenAI server for MODEL with the edits of a store. FLAGS are vLLM's own.

    \b
    Example:
      memoir serve smollm2-135m --store edits --port 8000 --max-model-len 2048
    """
    store, others = _named(folders)
    command, environment = server_command(model, store, flags, others)
    also = "".join(f", {name} from {path}" for name, path in others.items())
    notes.print(f"serving {model} with the edits of {store}{also}")
    os.execvpe(command[0], command, environment)
