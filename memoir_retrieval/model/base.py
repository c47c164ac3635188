"""The base model: loading it, finding the projection that is edited, and telling one model from another."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from memoir_retrieval.errors import ModelError
from memoir_retrieval.model.adapter import adapter_digest, merge_adapter, split_adapter
from memoir_retrieval.model.places import Place, in_out, projection_of, text_blocks

if TYPE_CHECKING:
    import torch

__all__ = ["BaseModel", "Identity", "identify", "load_model", "load_tokenizer", "model_class", "resolve"]


class Identity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What must be the same at edit time and at serve time; each a sha256 in hexadecimal.

    config: of the architecture's numbers.
    layer: of the checkpoint's tensors of the edited module, rounded to bfloat16 so that a float32 and a bfloat16 copy
        of
        one model are the same model.
    tokenizer: of its vocabulary.
    adapter: of the LoRA adapter in its weights, "" for none.
    """

    config: str
    layer: str
    tokenizer: str
    adapter: str = ""


@dataclass(frozen=True)
class BaseModel:
    """A loaded Hugging Face causal language model and the one linear projection that edits act on.

    model: the model, in evaluation mode.
    tokenizer: its tokenizer.
    path: folder of its files.
    name: as it was asked for; stores and messages name it. With an adapter the folder of that is absolute.
    blocks: its decoder blocks, in order.
    layer: number of the edited block.
    module: dotted name of the edited projection.
    projection: the module itself.
    place: the part of the block that it closes.
    adapter: folder of the LoRA adapter in the weights, if there is one.
    """

    model: Any
    tokenizer: Any
    path: Path
    name: str
    blocks: Any
    layer: int
    module: str
    projection: torch.nn.Module
    place: Place = "ffn"
    adapter: Path | None = None

    @property
    def d(self) -> int:
        """Width of the projection's input: the number of mask bits."""
        return in_out(self.projection)[0]

    @property
    def h(self) -> int:
        """Width of the projection's output: the hidden size."""
        return in_out(self.projection)[1]

    @property
    def dtype(self) -> str:
        """The dtype of the weights, under the name that `load_model` takes."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the projection's weight lies."""
        return next(self.projection.parameters()).device

    @property
    def max_length(self) -> int:
        """Positions the model can take, in tokens."""
        config = self.model.config.get_text_config()
        for name in ("max_position_embeddings", "n_positions"):
            if limit := getattr(config, name, None):
                return int(limit)
        return 1 << 30

    @property
    def window(self) -> int | None:
        """How many tokens some block can look at together; None where every block looks at all of them."""
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None)
        if kinds and set(kinds) == {"full_attention"}:
            return None
        names = ("sliding_window", "attention_chunk_size", "window_size")
        return min((int(size) for name in names if (size := getattr(config, name, None))), default=None)

    @cached_property
    def blocks_return_tuples(self) -> bool:
        """Whether a block gives (hidden states, ...) and not the bare hidden states; architectures differ."""
        import torch

        seen: list[bool] = []

        def look(_module: Any, _args: Any, output: Any) -> None:
            seen.append(isinstance(output, tuple))

        handle = self.blocks[0].register_forward_hook(look)
        try:
            with torch.no_grad():
                self.model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.device), logits_to_keep=1)
        finally:
            handle.remove()
        return seen[0]

    @cached_property
    def block_adds(self) -> bool:
        """Whether what is added to the projection's output is added to the block's: not where a norm follows it."""
        import torch

        if self.place == "attention":  # the FFN reads what is added there
            return False

        outputs: list[torch.Tensor] = []
        noise: list[torch.Tensor] = []

        def keep(_module: Any, _args: Any, output: Any) -> None:
            outputs.append((output[0] if isinstance(output, tuple) else output).float())

        def add(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            random = torch.Generator().manual_seed(0)
            noise.append(torch.randn(output.shape, generator=random).to(output) * outputs[0].abs().max().to(output))
            return output + noise[0]

        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        handles = [self.blocks[self.layer].register_forward_hook(keep)]
        try:
            with torch.no_grad():
                self.model(input_ids=ids, logits_to_keep=1)
                handles.append(self.projection.register_forward_hook(add))
                self.model(input_ids=ids, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        change, expected = outputs[1] - outputs[0], noise[0].float()
        return bool((change - expected).norm() < 0.05 * expected.norm())

    @cached_property
    def identity(self) -> Identity:
        """What a store compares a model by."""
        return identify(self.path, self.module, self.adapter)

    def at(self, layer: int) -> BaseModel:
        """The same model with edits in another block.

        layer: number of the block.

        Raises ModelError where the model has no such block.
        """
        module, projection, place = _edited(self.model, self.blocks, layer, self.name, self.place)
        return replace(self, layer=layer, module=module, projection=projection, place=place)


def resolve(name: str) -> Path:
    """The local folder of a model.

    name: a path, the name of an embedded model, or a Hub id that is in the local cache; that of an adapter is left out.

    Raises ModelError where there is none.
    """
    from memoir_retrieval.model.embedded import EMBEDDED, model_folder

    name, _ = split_adapter(name)
    if name in EMBEDDED:
        folder = model_folder(name)
        if not (folder / "config.json").is_file():
            raise ModelError(f"model {name} has not been fetched: run `memoir model get {name}` first")
        return folder
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path.resolve()
    if path.exists() or name.startswith((".", "/", "~")):
        raise ModelError(f"model folder {name} has no config.json: give the folder that holds config.json")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, ignore_patterns=_NOT_READ))
    except Exception as error:
        if type(error).__name__ == "GatedRepoError":
            raise ModelError(
                f"model {name!r} is gated on the Hub: accept its terms on its page, and log in with `hf auth login`"
            ) from error
        raise ModelError(
            f"model {name!r} is neither a folder, nor one of {', '.join(EMBEDDED)}, nor can it be fetched from the Hub "
            f"({type(error).__name__}): give a folder or run `memoir model get {next(iter(EMBEDDED))}`"
        ) from error


def load_model(
    name: str | Path,
    *,
    layer: int | None = None,
    place: Place | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> BaseModel:
    """Load a language model for editing or lookup; of a vision-language model the text tower is edited.

    >>> from memoir_retrieval import load_model
    >>> base = load_model("smollm2-135m")
    >>> base.module, base.d, base.h
    ('model.layers.24.mlp.down_proj', 1536, 576)

    name: a folder, an embedded model's name or a Hub id that is in the local cache. `MODEL+FOLDER` has the LoRA adapter
        of a folder in its weights.
    layer: the block whose projection is edited; by default the preset's.
    place: the projection that closes its FFN ("ffn") or its attention ("attention"); by default the FFN's where the FFN
        is dense, else attention's.
    dtype: "float32", "bfloat16" or "float16".
    device: where the model runs, such as "cuda".

    Raises ModelError for a model that cannot be found, read or edited.
    """
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    from memoir_retrieval.model.presets import preset_for

    model_name, adapter = split_adapter(str(name))
    name = model_name if adapter is None else f"{model_name}+{adapter}"
    path = resolve(model_name)
    try:
        torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    except KeyError:
        raise ModelError(f"dtype {dtype!r} is not known: use float32, bfloat16 or float16") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ModelError(
            f"device {device!r} cannot be used ({_first_line(error)}): use another, such as cpu"
        ) from error
    transformers_logging.disable_progress_bar()
    tokenizer = load_tokenizer(path)
    try:
        kind = model_class(AutoConfig.from_pretrained(path, trust_remote_code=False))
        # What is missing or of another size is random then, and named below.
        model, report = kind.from_pretrained(
            path, dtype=torch_dtype, trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True
        )
        model = model.to(device).eval()
    except Exception as error:  # of any class: safetensors has its own, and parts that are not installed raise theirs
        raise ModelError(f"model {path} cannot be loaded: {_why(error)}") from error
    _require_weights(report, path)
    _check_spaces(tokenizer, path)
    if adapter is not None:
        merge_adapter(model, adapter)
    model.requires_grad_(False)
    blocks = text_blocks(model)
    if layer is None:
        layer = preset_for(model.config).layer
    module, projection, place = _edited(model, blocks, layer, name, place)
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        path=path,
        name=name,
        blocks=blocks,
        layer=layer,
        module=module,
        projection=projection,
        place=place,
        adapter=adapter,
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model.

    folder: of the model.

    Raises ModelError where it cannot be loaded, or a file of the folder is a pointer of Git LFS.
    """
    from transformers import AutoTokenizer

    for file in (*folder.glob("*.safetensors"), *folder.glob("tokenizer*")):
        if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            raise ModelError(f"{file} is a pointer of Git LFS, not the file: run `git lfs pull` in {folder}")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of any class, as in `load_model`
        raise ModelError(f"the tokenizer of {folder} cannot be loaded: {_why(error)}") from error


def _require_weights(report: dict[str, Any], folder: Path) -> None:
    """Raises ModelError where a checkpoint lacks tensors that its configuration asks for, or has them in another size.

    transformers makes them up at random and goes on. report: of its loading.
    """
    wrong = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if wrong:
        raise ModelError(
            f"the weights in {folder} do not fit its config.json: {len(wrong)} tensors are missing or of another size, "
            f"such as {wrong[0]}: give a folder with a whole checkpoint"
        )


def model_class(config: Any) -> Any:
    """The automatic class of transformers that loads a model: not every vision-language model is a causal one there.

    config: of the model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    causal = type(config) in AutoModelForCausalLM._model_mapping
    vision = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if vision and not causal else AutoModelForCausalLM


def _check_spaces(tokenizer: Any, folder: Path) -> None:
    """Raises ModelError for a tokenizer that loses the spaces between words, though its file keeps them.

    transformers 5 puts the pre-tokenizer of some classes over that of tokenizer.json: see
    findings/transformers-llama-class-drops-spaces.sh.
    """
    from tokenizers import Tokenizer

    text, fast = "who is it", folder / "tokenizer.json"
    ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.decode(ids).split() == text.split() or not fast.is_file():
        return
    if ids != Tokenizer.from_file(str(fast)).encode(text, add_special_tokens=False).ids:
        raise ModelError(
            f"transformers reads the tokenizer of {folder} as {type(tokenizer).__name__}, which loses the spaces "
            'between words: write "tokenizer_class": "PreTrainedTokenizerFast" into its tokenizer_config.json'
        )


def _why(error: Exception) -> str:
    """What a library says of a folder that it cannot load, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "custom code" in text:
        return "it comes with code of its own, which is not run here: choose a model that transformers knows"
    return f"{text:.300}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _edited(model: Any, blocks: Any, layer: int, name: str, place: Place | None = None) -> tuple[str, Any, Place]:
    """Path, module and place of the projection of block `layer`."""
    if not 0 <= layer < len(blocks):
        raise ModelError(f"layer {layer} does not exist: {name} has layers 0 to {len(blocks) - 1}")
    return projection_of(model, blocks[layer], place)


# Other copies of the weights, which are often as large.
_NOT_READ = ["original/*", "*.pth", "*.gguf", "*.onnx", "onnx/*", "*.bin", "*.h5", "*.msgpack"]

# ---- identity --------------------------------------------------------------------------------------------------

# Keys of config.json that change without the model changing.
_VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_commit_hash"}
_TOWERS = {"text_config", "vision_config", "audio_config", "thinker_config"}


def identify(folder: Path, module: str, adapter: Path | None = None) -> Identity:
    """Digest a checkpoint folder without loading the model.

    folder: the checkpoint's.
    module: path of the edited projection.
    adapter: folder of the LoRA adapter in the weights, if there is one.

    Raises ModelError where a part is missing.
    """
    return Identity(
        config=_config_digest(folder),
        layer=_layer_digest(folder, module),
        tokenizer=_tokenizer_digest(folder),
        adapter="" if adapter is None else adapter_digest(adapter),
    )


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {_first_line(error)}") from error


def _config_digest(folder: Path) -> str:
    return _sha(_canonical(_lasting(_read_json(folder / "config.json"))))


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what changes when it is saved again, and those of its towers, such as `text_config`."""
    return {
        key: _lasting(value) if key in _TOWERS and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _VOLATILE
    }


def _tokenizer_digest(folder: Path) -> str:
    fast = folder / "tokenizer.json"
    if fast.is_file():
        tokenizer = _read_json(fast)
        return _sha(_canonical([tokenizer.get("model"), tokenizer.get("added_tokens")]))
    for names in (["tokenizer.model"], ["vocab.json", "merges.txt"]):
        if all((folder / name).is_file() for name in names):
            return _sha(b"".join((folder / name).read_bytes() for name in names))
    raise ModelError(f"{folder} has no tokenizer.json, tokenizer.model or vocab.json: give a folder with a tokenizer")


def _checkpoint_paths(module: str) -> list[str]:
    """The names that checkpoints give a module."""
    paths = [module, module.partition(".")[2]]
    tower, rest = "model.language_model.", module.removeprefix("model.language_model.")
    if module.startswith(tower):
        paths += [f"language_model.model.{rest}", f"model.{rest}"]
    return paths


def _layer_digest(folder: Path, module: str) -> str:
    import torch
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = _read_json(index)["weight_map"]
    else:
        weight_map = {}
    # Checkpoints of some architectures leave out the first part of the module path, or name the text tower differently.
    prefixes = tuple(f"{path}." for path in _checkpoint_paths(module))
    files = {name for key, name in weight_map.items() if key.startswith(prefixes)} or {"model.safetensors"}
    digest = hashlib.sha256()
    count = 0
    for name in sorted(files):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} has no {name}: save the model as safetensors (`model.save_pretrained(folder)`)")
        with safe_open(folder / name, framework="pt") as tensors:
            for key in sorted(tensors.keys()):
                if not key.startswith(prefixes):
                    continue
                tensor = tensors.get_tensor(key)
                if tensor.dtype in (torch.float32, torch.float16):
                    tensor = tensor.to(torch.bfloat16)
                digest.update(key.rsplit(".", 1)[-1].encode() + str(tuple(tensor.shape)).encode())
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
                count += 1
    if not count:
        raise ModelError(f"{folder} holds no tensor of {module}: the checkpoint and its config.json do not fit")
    return digest.hexdigest()
