"""Our section of vLLM's configuration: what it may say, what it asks of vLLM's flags, what it changes."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
from vllm.logger import init_logger

from memoir_retrieval.errors import ConfigError, StoreError
from memoir_retrieval.lookup.masks import Decode
from memoir_retrieval.model.adapter import adapter_digest
from memoir_retrieval.model.base import identify, load_tokenizer, resolve
from memoir_retrieval.question.prompts import prompt_ids
from memoir_retrieval.question.span import ChatSpanRule, SpanRule, find_span
from memoir_retrieval.store.manifest import Manifest, library_version, read_manifest
from memoir_retrieval.store.read import EditStore

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest

__all__ = [
    "OP",
    "TOKEN_VARIABLE",
    "MemoirConfig",
    "ServedStore",
    "apply",
    "is_inline",
    "keeps_sums",
    "open_stores",
    "parse_section",
    "prefer",
    "require_template",
    "section_of",
    "served_rule",
    "served_stores",
    "token_decoder",
    "with_mode",
]

# A child of vLLM's logger, so that vLLM's logging configuration applies to it.
logger = init_logger("vllm.memoir")

OP = "vllm::memoir_residual"
"""The op in the model's graph (`worker/op.py`)."""

TOKEN_VARIABLE = "MEMOIR_ADMIN_TOKEN"
"""The environment variable of the administrator's token (`admin/tokens.py`)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# vLLM's worker class -> ours, which inherits from it. The slot takes one class by name.
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "memoir_vllm.worker.cpu.MemoirCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "memoir_vllm.worker.gpu.MemoirGPUWorker",
}


class MemoirConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `memoir` section of `--additional-config`.

    store: folder of the edits that requests get who name no store.
    stores: further folders, each by the name under which requests ask for it. One that was made on the model with a
        LoRA adapter has the adapter's name, and serves its requests. "" is another way to give `store`.
    mode: "inline" keeps chunked prefill and prefix caching, see `core/scheduler.py`; "single" decides and applies in
        the one step that holds a whole prompt, and needs both off; None: see `with_mode`.
    tau: matches from this overlap on, instead of the store's own.
    token_file: turns administration on, see `admin/tokens.py`.
    """

    store: str = ""
    stores: dict[str, Annotated[str, msgspec.Meta(min_length=1)]] = {}
    mode: Literal["inline", "single"] | None = None
    tau: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    token_file: Annotated[str, msgspec.Meta(min_length=1)] | None = None

    @property
    def folders(self) -> dict[str, str]:
        """Folder of each store by name, the default one first."""
        return {"": self.store} | self.stores


class ServedStore(NamedTuple):
    """What is known of a store where none is opened.

    rule: how its question is found in a prompt.
    adapter: digest of the adapter that it was made with; "" for a store of the model alone.
    """

    rule: SpanRule
    adapter: str

    def require(self, name: str, adapter: LoRARequest | None) -> None:
        """Raise unless the store was made on what answers.

        name: of the store.
        adapter: that answers, or None.

        Raises ConfigError for another adapter than that of the store, ModelError for one that cannot be read.
        """
        if adapter is None:
            if self.adapter:
                raise ConfigError(f"store {name!r} was made with an adapter: send the requests to the model {name!r}")
            return
        if not self.adapter:
            raise ConfigError(
                f"store {name!r} was made on the model without adapter {name!r}: give one of the two another name"
            )
        if adapter_digest(_folder_of(adapter.lora_path)) != self.adapter:
            raise ConfigError(
                f"store {name!r} was made with another adapter than {adapter.lora_path}: serve the adapter that it was "
                "made with"
            )


@functools.cache
def _folder_of(adapter: str) -> Path:
    """Where vLLM reads an adapter from."""
    from vllm.lora.utils import get_adapter_absolute_path

    return Path(get_adapter_absolute_path(adapter))


def parse_section(section: Any) -> MemoirConfig:
    """Check a section.

    section: as it was typed.

    Raises ConfigError, naming the key, for one that is not what `MemoirConfig` describes.
    """
    known = ", ".join(field.name for field in msgspec.structs.fields(MemoirConfig))
    try:
        config = msgspec.convert(section, MemoirConfig)
        fault = _fault_of(config)
    except msgspec.ValidationError as error:
        fault = str(error)
    if fault:
        raise ConfigError(f'--additional-config {{"memoir": ...}}: {fault}; known keys: {known}')
    folders = {"": config.store} | config.stores if config.store else dict(config.stores)
    # Every process of the engine must find the same folder, whatever its working directory.
    paths = {name: str(Path(path).expanduser().resolve()) for name, path in folders.items()}
    tokens = config.token_file and str(Path(config.token_file).expanduser().resolve())
    return msgspec.structs.replace(config, store=paths.pop(""), stores=paths, token_file=tokens)


def _fault_of(config: MemoirConfig) -> str:
    """What is wrong with the stores of a section, if anything."""
    if config.store and "" in config.stores:
        return 'store and stores."" are the same: give one'
    if not config.store and "" not in config.stores:
        return 'there is no store for requests that name none: add "store": DIR'
    for name in config.stores:
        if name and not _NAME.fullmatch(name):
            allowed = "letters, digits, '.', '_' and '-', at most 64, a letter or digit first"
            return f"a store is called {name!r}: use {allowed}"
    if config.stores.keys() - {""} and config.tau is not None:
        return (
            "tau is of one store, and there are several: leave it out, and set that of each by "
            "`memoir calibrate STORE FILE --write`"
        )
    return ""


def section_of(vllm_config: VllmConfig) -> MemoirConfig | None:
    """The checked section, or None.

    vllm_config: which `apply` has seen.
    """
    section = (vllm_config.additional_config or {}).get("memoir")
    return None if section is None else msgspec.convert(section, MemoirConfig)


def served_rule(manifest: Manifest) -> SpanRule:
    """How a server finds the question in a prompt: the store's rule, under which raw text has none in a chat store.

    manifest: the store's.
    """
    return _rule(msgspec.to_builtins(manifest.span), manifest.chat)


def served_stores(vllm_config: VllmConfig) -> dict[str, ServedStore]:
    """The stores by name, for processes that open none.

    vllm_config: which `apply` has seen.
    """
    stores: dict[str, Any] = vllm_config.additional_config["memoir_stores"]
    return {name: ServedStore(_rule(said["span"], said["chat"]), said["adapter"]) for name, said in stores.items()}


def _rule(span: dict[str, Any], chat: bool) -> SpanRule:
    return msgspec.convert(span, ChatSpanRule if chat else SpanRule)


def is_inline(vllm_config: VllmConfig) -> bool:
    """Whether prompts may be split and cached.

    vllm_config: which `apply` has seen.
    """
    ours = section_of(vllm_config)
    return ours is not None and ours.mode == "inline"


def keeps_sums(vllm_config: VllmConfig, kv_cache_groups: int) -> bool:
    """Whether workers keep sums per KV block, so that undecided requests may find their question in the cache.

    With several kinds of KV blocks a request's prefix may be found without all of its blocks.

    vllm_config: which `apply` has seen.
    kv_cache_groups: how many kinds of blocks there are.
    """
    return is_inline(vllm_config) and bool(vllm_config.cache_config.enable_prefix_caching) and kv_cache_groups == 1


def with_mode(config: MemoirConfig) -> MemoirConfig:
    """The section with the mode that the store needs, where it names none.

    Edits that act from a question's first token on, as in stores of 0.1.0 and under the span rule `all`,
    need the whole question in one step.

    config: the section.

    Raises ConfigError for such a store in mode `inline`, StoreError for none.
    """
    spans = {folder: read_manifest(Path(folder)).span for folder in config.folders.values()}
    folder = next((folder for folder, span in spans.items() if span.acts == "first"), None)
    if folder is None:
        return msgspec.structs.replace(config, mode=config.mode or "inline")
    retrain = f"`memoir compact {folder} --acts last` trains them again to act from the last token before the answer"
    why = "the span rule is all" if spans[folder].rule == "all" else retrain
    if config.mode == "inline":
        raise ConfigError(
            f"edits of store {folder} act from the question's first token on, which mode inline cannot serve "
            f"({why}): leave mode out, or use single"
        )
    if config.mode is None:
        logger.warning("memoir: edits act from the question's first token on, so mode single serves them; %s", why)
    return msgspec.structs.replace(config, mode="single")


def open_stores(config: MemoirConfig, vllm_config: VllmConfig) -> dict[str, EditStore]:
    """Open the stores, by name, and check that they were made on the served model, and fit together.

    config: the section.
    vllm_config: of the engine.

    Raises StoreError, ModelError or ConfigError.
    """
    model = vllm_config.model_config
    known = served_stores(vllm_config) if "memoir_stores" in vllm_config.additional_config else {}
    stores = {}
    for name, folder in config.folders.items():
        store = stores[name] = EditStore.open(folder)
        store.require_trained()
        if name in known and known[name].rule != served_rule(store.manifest):
            # The scheduler finds questions by the rule that the front end has read.
            raise StoreError(f"store {folder} has got another span rule while the engine started: start it again")
        identity = identify(resolve(model.model), store.manifest.module)
        if name and store.manifest.base.adapter:
            # Which adapter it is, is known once requests for it come.
            identity = msgspec.structs.replace(identity, adapter=store.manifest.base.adapter)
            if vllm_config.lora_config is None:
                raise ConfigError(f"store {folder} was made with an adapter: add --enable-lora and --lora-modules")
        store.require(identity, model.model)
        _fit(config.store, stores[""].manifest, folder, store.manifest)
    return stores


def _fit(first: str, ours: Manifest, second: str, theirs: Manifest) -> None:
    """Raises ConfigError where one edited layer cannot serve two stores."""
    for what, mine, other, cure in (
        ("module", ours.module, theirs.module, "edit both in one --layer"),
        ("weighting of tokens", ours.span.weighted, theirs.span.weighted, "make both with one version"),
    ):
        if mine != other:
            raise ConfigError(
                f"stores {first} and {second} have another {what} ({mine}, {other}), and one server edits one layer: "
                f"{cure}, or use two servers"
            )


def token_decoder(model: ModelConfig) -> Decode:
    """How text is read back from token ids: by the tokenizer as the library loads it, once a question needs it.

    model: which is served.
    """

    @functools.cache
    def tokenizer() -> Any:
        return load_tokenizer(resolve(model.model))

    def read(ids: Sequence[int]) -> str:
        text: str = tokenizer().decode(ids)
        return text

    return read


def require_template(config: MemoirConfig, model: str, template: str | None) -> None:
    """Raise where no question is found in a chat as a server renders it, so that no edit of a chat store would act.

    config: the section.
    model: name or folder of the served one.
    template: the server's own chat template; None for that of the model.

    Raises ConfigError, which names the store.
    """
    manifests = {folder: read_manifest(Path(folder)) for folder in config.folders.values()}
    rules = {folder: served_rule(m) for folder, m in manifests.items() if m.chat and m.span.rule == "question"}
    if not rules:
        return
    question = "Which river is it?"
    tokenizer = load_tokenizer(resolve(model))
    if template is not None:
        tokenizer.chat_template = template
    try:
        ids = prompt_ids(tokenizer, question, chat=True)
    except Exception:  # templates raise their own errors, which their clients hear of
        return
    for folder, rule in rules.items():
        span = find_span(ids, rule)
        if not rule.starts or question in tokenizer.decode(ids[span.start : span.end]):
            continue
        cure = (
            "restore it in the model's folder, or edit this model into a new store"
            if template is None
            else "leave out --chat-template, or give one with the marks of the model's own"
        )
        raise ConfigError(
            f"the chat template does not mark a user's message as it did when the edits of store {folder} were made, "
            f"so no question would be found and none of them would act: {cure}"
        )


# Of vLLM's formats those in which edits are made.
_HUGGING_FACE = {"load_format": "safetensors", "config_format": "hf", "tokenizer_mode": "hf"}


def prefer(config: MemoirConfig, args: EngineArgs) -> None:
    """Choose what we need for the flags that the user left open. `refusals.refuse` sees the others.

    In mode `single` the op must see every row of a prompt in one step. Where files in Mistral's own format lie beside
    those of Hugging Face, on which edits are made, vLLM would read the former: other weights, perhaps, and another
    tokenizer. The log says what each choice means.

    config: the section.
    args: of the engine, which are changed.
    """
    if config.mode == "single":
        if args.enable_prefix_caching is None:
            args.enable_prefix_caching = False
            logger.warning("memoir: mode single turns prefix caching off: every prompt is computed in full")
        if args.enable_chunked_prefill is None:
            args.enable_chunked_prefill = False
            logger.warning("memoir: mode single turns chunked prefill off: a long prompt holds up all other requests")

    from vllm.transformers_utils.repo_utils import is_mistral_model_repo

    left_open = [name for name in _HUGGING_FACE if getattr(args, name) == "auto"]
    if left_open and is_mistral_model_repo(str(args.model), args.revision):
        for name in left_open:
            setattr(args, name, _HUGGING_FACE[name])
        logger.warning("memoir: files in Mistral's own format are not read: edits are made on those of Hugging Face")


def apply(config: MemoirConfig, vllm_config: VllmConfig, manifests: Mapping[str, Manifest]) -> None:
    """Hand our classes to vLLM through the slots that its configuration has for them.

    config: the section.
    vllm_config: of the engine, which is changed.
    manifests: of the stores, by name.
    """
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        "memoir": msgspec.to_builtins(config),
        # vLLM hashes this dict into the key of its compile cache (VllmConfig.compute_hash): what changes the graph
        # must be here. The edits are read inside the opaque op, so a new generation needs no new compilation.
        "memoir_graph": {"version": library_version(), "module": manifests[""].module},
        "memoir_stores": {
            name: {
                "span": msgspec.to_builtins(manifest.span),
                "chat": manifest.chat,
                "adapter": manifest.base.adapter,
            }
            for name, manifest in manifests.items()
        },
    }
    kind = "MemoirAsyncScheduler" if vllm_config.scheduler_config.async_scheduling else "MemoirScheduler"
    vllm_config.scheduler_config.scheduler_cls = f"memoir_vllm.core.scheduler.{kind}"
    vllm_config.parallel_config.worker_cls = WORKERS[vllm_config.parallel_config.worker_cls]
    splits = vllm_config.compilation_config.splitting_ops
    if splits and OP not in splits:  # an empty list means that nothing is split, so nothing is captured either
        splits.append(OP)
