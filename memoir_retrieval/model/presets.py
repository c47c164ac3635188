"""Layer, k and tau: the published settings, ours for the embedded model, and a default for any other."""

from __future__ import annotations

from typing import Any, NamedTuple

from memoir_retrieval.model.places import Place

__all__ = ["PRESETS", "Preset", "preset_for"]


class Preset(NamedTuple):
    """Where edits go and when they match.

    layer: the edited block.
    k: ones in a mask.
    tau: for raw prompts.
    tau_chat: for prompts in a chat template, whose shared system prompt makes unrelated questions look a little more
        alike.
    source: whose numbers they are.
    """

    layer: int
    k: int
    tau: float
    tau_chat: float
    source: str

    def at(self, place: Place, d: int) -> Preset:
        """The preset at a place. At attention's projection k is the published share of its inputs.

        place: where edits act.
        d: inputs of the projection there.
        """
        return self if place == "ffn" else self._replace(k=max(1, d * 2 // 7), source="default")


# (model_type, hidden size H, FFN size D, blocks) -> preset. Published: arXiv 2506.07899, appendix on settings.
PRESETS: dict[tuple[str, int, int, int], Preset] = {
    ("llama", 4096, 14336, 32): Preset(27, 4096, 0.40, 0.40, "published, LLaMA-3-8B-Instruct"),
    ("llama", 4096, 11008, 32): Preset(27, 4096, 0.46, 0.46, "published, LLaMA-2-7B"),
    ("mistral", 4096, 14336, 32): Preset(27, 4096, 0.40, 0.40, "published, Mistral-7B"),
    ("gptj", 4096, 16384, 28): Preset(21, 4096, 0.45, 0.45, "published, GPT-J-6B"),
    ("llama", 576, 1536, 30): Preset(24, 438, 0.51, 0.55, "measured, SmolLM2-135M-Instruct"),
}


def preset_for(config: Any) -> Preset:
    """The preset of a model, or the default: 5/6 of the depth, k = 2/7 of D, tau .50 or .55.

    The default is the published settings' proportions (layer 27 of 32, k/D = 4096/14336) with a threshold that
    lets nothing unrelated through; measure it on your model before you rely on it (`memoir calibrate --model`).

    config: of Hugging Face.
    """
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    wide = int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden)
    blocks = int(text.num_hidden_layers)
    known = PRESETS.get((text.model_type, hidden, wide, blocks))
    return known or Preset(min(blocks - 1, blocks * 5 // 6), max(1, wide * 2 // 7), 0.50, 0.55, "default")
