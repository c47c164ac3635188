"""MkDocs hook: the page of the Python API, made from signatures and docstrings when the site is built."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import memoir_index
import memoir_retrieval

PAGE = "reference/api.md"
FOLD = 88
# Not in `memoir_retrieval` itself, but what its functions take and return.
RELATED = (
    ("memoir_retrieval.model.base", "BaseModel"),
    ("memoir_retrieval.lookup.reference", "Answer"),
    ("memoir_retrieval.evaluation.measure", "Report"),
    ("memoir_retrieval.client.admin", "Change"),
    ("memoir_retrieval.client.admin", "TrainingProgress"),
    ("memoir_retrieval.client.admin", "EditPage"),
    ("memoir_retrieval.client.admin", "Lookup"),
    ("memoir_retrieval.client.admin", "Near"),
    ("memoir_retrieval.lookup.decision", "Decision"),
    ("memoir_retrieval.client.server", "Server"),
    ("memoir_retrieval.client.server", "Reply"),
    ("memoir_retrieval.client.server_model", "ServerModel"),
    ("memoir_retrieval.client.verify", "verify"),
    ("memoir_retrieval.client.verify", "ServerProbe"),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, PAGE, content=api_page()))
    return files


def api_page() -> str:
    """Markdown of every public name with its public methods."""
    parts = [
        "# Python API\n",
        "Every name here is typed (`py.typed`). Start with [the ten lines](../how-to/python.md).\n",
        "## memoir_retrieval\n",
        *(_entry(name, getattr(memoir_retrieval, name)) for name in memoir_retrieval.__all__),
        "## What these take and give\n",
        *(_entry(name, getattr(__import__(module, fromlist=[name]), name), module) for module, name in RELATED),
        "## memoir_index\n",
        *(_entry(name, getattr(memoir_index, name)) for name in memoir_index.__all__),
    ]
    return "\n".join(parts)


def _entry(name: str, thing: Any, module: str = "") -> str:
    title = f"### {name}\n"
    origin = f"\nIn `{module}`.\n" if module else ""
    if not callable(thing):
        return f"{title}{origin}\n`{thing!r}`\n"
    text = f"{title}{origin}\n{_code(name, thing)}\n{_prose(thing)}\n"
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        text += "".join(_methods(name, thing))
    return text


def _methods(name: str, thing: type) -> Iterator[str]:
    for key, member in vars(thing).items():
        called = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if not key.startswith("_") and (inspect.isfunction(called) or isinstance(called, property | cached_property)):
            yield f"\n{_code(f'{name}.{key}', called)}\n{_prose(called)}\n"


class _Bare(str):
    """An annotation that is shown without the quotes of a string."""

    __repr__ = str.__str__


def _code(name: str, thing: Any) -> str:
    if isinstance(thing, property | cached_property):
        return f"```python\n{name}\n```\n"
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return f"```python\n{name}\n```\n"
    shown = [_shown(p) for p in signature.parameters.values() if p.name not in ("self", "cls")]
    result = signature.return_annotation
    bare = signature.replace(parameters=shown, return_annotation=_Bare(result) if isinstance(result, str) else result)
    text = f"{name}{bare}"
    if len(text) > FOLD:
        inside = text[len(name) + 1 : text.rindex(")")]
        parts = re.split(r", (?=[*\w]+(?::|, |$)|/)", inside)
        text = f"{name}(\n    " + ",\n    ".join(parts) + ",\n" + text[text.rindex(")") :]
    return f"```python\n{text}\n```\n"


def _shown(parameter: inspect.Parameter) -> inspect.Parameter:
    if inspect.isfunction(parameter.default):  # its address would differ with every build
        parameter = parameter.replace(default=_Bare("..."))
    return (
        parameter.replace(annotation=_Bare(parameter.annotation))
        if isinstance(parameter.annotation, str)
        else parameter
    )


def _prose(thing: Any) -> str:
    """A docstring as Markdown: parameters and fields become a list, examples are kept as code."""
    text = inspect.getdoc(thing) or ""
    if inspect.isclass(thing) and (start := inspect.getdoc(thing.__init__)) and "Initialize self" not in start:
        text += f"\n\n{start}"
    return "\n\n".join(_markdown(part) for part in re.split(r"\n\n+", text)) + "\n"


def _markdown(paragraph: str) -> str:
    if paragraph.startswith(">>> "):
        return f"```pycon\n{paragraph}\n```"
    shown = paragraph.replace("*", r"\*").replace("<", "&lt;")
    entries = re.sub(r"^((?:[a-z]\w*, )*[a-z]\w*): ", r"* **\1**: ", shown, flags=re.M)
    # A list needs a blank line before its first entry.
    return re.sub(r"^(?!\* )(.*)\n(\* \*\*)", r"\1\n\n\2", entries, count=1, flags=re.M)
