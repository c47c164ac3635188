"""From a file of corrections to an answer, in ten lines. `python examples/edit_and_ask.py` takes a quarter minute."""

from pathlib import Path

from memoir_retrieval import EditedModel, Editor, load_model, read_edits

corrections = Path(__file__).with_name("corrections.jsonl")
base = load_model("smollm2-135m")  # a folder, an embedded model or a Hub id
with Editor(base, "edits") as editor:  # makes the store, or goes on with it
    editor.add(read_edits(corrections))
model = EditedModel.open("edits")
for answer in model.generate(["Who runs Example Corp?", "What is the capital of France?"]):
    print(answer.edit, answer.text)
