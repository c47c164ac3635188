"""A `Trainer` whose memories lie on the machines of a Ray cluster, a part of them on each worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memoir_retrieval.editing.cluster import connect, load_ray, loading
from memoir_retrieval.editing.trainer import Learnt, Task

if TYPE_CHECKING:
    import torch

    from memoir_retrieval.editing.editor import Editor
    from memoir_retrieval.editing.train import Trained
    from memoir_retrieval.edits.record import StoredEdit
    from memoir_retrieval.store.manifest import Manifest

__all__ = ["on_ray"]


def on_ray(address: str, workers: int, device: str) -> Callable[[Editor], RayTrainer]:
    """What `Editor` takes as `trainer`.

    Every worker loads the model, under the name that this process did, and uses as many threads.

    address: as `ray.init` takes it, "local" for a cluster of this machine alone.
    workers: how many processes train.
    device: of each.

    Raises ConfigError where Ray is missing or does not answer.
    """
    connect(load_ray(), address, "train")
    return lambda editor: RayTrainer(editor, workers, device)


class RayTrainer:
    """See `MemoryTrainer`. Memory n lies on worker n modulo their number.

    Workers learn at the same time and meet after each of their edits; what they send is the columns of one edit.
    """

    def __init__(self, editor: Editor, workers: int, device: str):
        import ray
        import torch

        self._ray, self._get = ray, ray.get
        model, threads = loading(editor.base, device), torch.get_num_threads()
        store = editor.store
        remote = ray.remote(num_cpus=threads, num_gpus=1 if device.startswith("cuda") else 0)(_TrainerWorker)
        self._workers = [
            remote.remote(model, threads, store.manifest, store.background, store.permutation) for _ in range(workers)
        ]
        self._get([worker.ready.remote() for worker in self._workers])
        self._prepared: dict[int, int] = {}  # by the edit's id, on which worker
        self.memories: dict[int, torch.Tensor] = {}

    def open(self, number: int, weight: torch.Tensor, edits: Sequence[tuple[StoredEdit, int]]) -> None:
        self._get(self._worker(number).call.remote("open", number, weight.cpu(), edits))
        self.memories[number] = weight

    def close(self, number: int) -> None:
        del self.memories[number]
        self._worker(number).call.remote("close", number)  # a worker does what it gets in order: nobody need wait

    def prepare(self, tasks: Sequence[Task]) -> list[np.ndarray]:
        self._prepared = {task.id: task.memory % len(self._workers) for task in tasks}
        for number in {*range(len(self._workers))}.difference(self._prepared.values()):
            self._workers[number].call.remote("prepare", [])  # lets go of what it has prepared
        return self._each("prepare", tasks)

    def learn(self, tasks: Sequence[Task]) -> list[Learnt]:
        elsewhere = [task for task in tasks if self._prepared[task.id] != task.memory % len(self._workers)]
        self._each("prepare", elsewhere, True)
        self._prepared |= {task.id: task.memory % len(self._workers) for task in elsewhere}
        return self._each("learn", tasks)

    def take(self, task: Task, trained: Trained) -> None:
        self._get(self._worker(task.memory).call.remote("take", task, trained))
        # Last: where the worker is gone, nothing of the edit is in the store's memory.
        self.memories[task.memory][:, trained.columns] = trained.weights.to(self.memories[task.memory].device)

    def lost(self, number: int, edits: Sequence[int]) -> list[int]:
        lost: list[int] = self._get(self._worker(number).call.remote("lost", number, edits))
        return lost

    def forget(self, edit: int) -> None:
        self._get([worker.call.remote("forget", edit) for worker in self._workers])

    def remember(self, number: int, edit: StoredEdit, masks: int) -> None:
        if number in self.memories:
            self._get(self._worker(number).call.remote("remember", number, edit, masks))

    def stop(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker)

    def _worker(self, number: int) -> Any:
        return self._workers[number % len(self._workers)]

    def _each(self, method: str, tasks: Sequence[Task], *more: Any) -> list[Any]:
        """Ask every worker for its own part of the tasks; the answers in the order of the tasks. more: arguments."""
        parts: dict[int, list[Task]] = {}
        for task in tasks:
            parts.setdefault(task.memory % len(self._workers), []).append(task)
        answers = self._get([self._workers[n].call.remote(method, part, *more) for n, part in parts.items()])
        results = {
            task.id: result
            for part, part_results in zip(parts.values(), answers, strict=True)
            for task, result in zip(part, part_results, strict=True)
        }
        return [results[task.id] for task in tasks]


class _TrainerWorker:
    """One process of the cluster, with the model in it."""

    def __init__(
        self, model: dict[str, Any], threads: int, manifest: Manifest, background: np.ndarray, permutation: np.ndarray
    ):
        import torch

        from memoir_retrieval.editing.trainer import Trainer
        from memoir_retrieval.editing.wordings import Wordings
        from memoir_retrieval.model.base import load_model
        from memoir_retrieval.question.fingerprint import Fingerprint
        from memoir_retrieval.store.settings import training_of

        torch.set_num_threads(threads)
        base = load_model(**model)
        fingerprint = Fingerprint(background, permutation, manifest.k, base.device)
        training = training_of(manifest)
        self._trainer = Trainer(base, Wordings(base, manifest, fingerprint, training), training)

    def ready(self) -> bool:
        return True

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "open":  # what arrives is a view of Ray's store, which nothing may write to
            number, weight, edits = arguments
            arguments = number, weight.clone().to(self._trainer.base.device), edits
        return getattr(self._trainer, method)(*arguments)
