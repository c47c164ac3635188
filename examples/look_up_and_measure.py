"""What a prompt would match, and how good a store is. Run `edit_and_ask.py` first: it makes the store."""

from pathlib import Path

from memoir_retrieval import EditedModel, EditStore, Retriever, evaluate, read_edits

store = EditStore.open("edits")
print(f"{len(store.edits)} edits of {store.manifest.model}, generation {store.manifest.generation}")

retriever = Retriever.open("edits")
match = retriever.lookup("What port is the Example server on?")
if match is None:
    print("no edit matches: the base model answers")
else:
    print(f"edit {match.id}, overlap {match.overlap:.2f} >= {retriever.tau}: {match.edit.target}")

edits = read_edits(Path(__file__).with_name("corrections.jsonl"))
report = evaluate(EditedModel(retriever), store.edits, edits, tau=retriever.tau)
print(f"reliability {report.reliability:.2f}, exact answers {report.exact_match.edits:.2f}")
