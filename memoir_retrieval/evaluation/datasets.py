"""Published editing data sets by name. The files are not shipped: they lie in a folder of the user's."""

from __future__ import annotations

from pathlib import Path

from memoir_retrieval.errors import ConfigError, Reason

__all__ = ["DATA_SETS", "QUESTIONS", "STATISTICS", "TEXT", "data_file"]

DATA_SETS = {
    "zsre": "zsre/zsre_mend_edit.jsonl",
    "zsre-train": "zsre/zsre_mend_train_10000.jsonl",
    "zsre-knowedit": "zsre/knowedit_zsre_test_all.jsonl",
    "selfcheckgpt": "hallucination/hallucination-edit.jsonl",
    "temporal": "temporal/temporal-edit.jsonl",
    "counterfact": "counterfact/counterfact-edit.jsonl",
    "counterfact-neighbours": "counterfact/counterfact_portability_gpt4.jsonl",
    "wikifactdiff": "wikifactdiff/wfd-test.jsonl",
    "mquake": "mquake/MQuAKE-hard.jsonl",
    "wiki-recent": "knowedit_wiki/wiki_recent_train.jsonl",
    "wiki-counterfact": "knowedit_wiki/wiki_counterfact_train.jsonl",
    "qaedit": "qaedit/qaedit-dev.jsonl",
    "hallueditbench": "hallueditbench/meta_llama_3_8b_instruct.jsonl",
}
"""Name -> path below the folder of the data sets. `docs/how-to/evaluation.md` says what each is."""

TEXT = "text/wikitext-2-test.jsonl"
"""Unrelated text in the same folder."""

QUESTIONS = "text/nq-open-dev.jsonl"
"""Questions of people, with which `memoir bench routing` asks what no edit may answer."""

STATISTICS = "text/wikitext-2-valid.jsonl"
"""Text of which methods such as ROME take statistics; none of it is measured on."""


def data_file(name: str, folder: Path) -> Path:
    """The file that a data set's name, or a path, stands for.

    name: of the set, or a path.
    folder: of the published sets.

    Raises ConfigError where there is none.
    """
    if name in DATA_SETS:
        path = folder / DATA_SETS[name]
        if not path.is_file():
            raise ConfigError(
                f"data set '{name}' needs {path}, which is not there",
                cure="name the folder of the data sets, or give the path of an edit file instead of a name",
                reason=Reason.DATA,
            )
        return path
    if not Path(name).is_file():
        raise ConfigError(f"{name!r} is neither a file nor a data set: choose one of {', '.join(DATA_SETS)}")
    return Path(name)
