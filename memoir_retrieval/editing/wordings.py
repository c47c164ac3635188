"""An edit in every wording that it is trained in: as it is, rephrased, after contexts, with words replaced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from jinja2 import TemplateError

from memoir_index import unpack
from memoir_retrieval.background import background_prompts
from memoir_retrieval.editing.train import EditRows, Frozen, Wording, freeze
from memoir_retrieval.edits.record import Edit, StoredEdit, as_prompt, check_texts
from memoir_retrieval.edits.requires import check_requires, required_spans
from memoir_retrieval.errors import EditFileError, Reason
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.model.forward import FrozenPast, first_block, frozen_past
from memoir_retrieval.question.fingerprint import Fingerprint
from memoir_retrieval.question.prompts import Prompt, end_token, prompt_ids, target_ids, text_ids
from memoir_retrieval.question.span import Span, find_span
from memoir_retrieval.question.thinking import closing, prompt_ends, thinks
from memoir_retrieval.store.manifest import Manifest
from memoir_retrieval.store.settings import Training

__all__ = ["Wordings", "masked_key"]

LARGEST_KEPT = 2**30  # bytes
OTHER_QUESTIONS = ("What is {} known for?", "Where is {}?", "Who made {}?", "When did {} begin?")
"""What may be asked about an edit's subject beside its own question."""


def masked_key(edit: Edit | StoredEdit, rephrases: int) -> bytes:
    """What the rows of an edit that have masks are made of.

    edit: any.
    rephrases: how many of its rephrasings have masks.
    """
    return msgspec.json.encode((edit.prompt, edit.target, edit.before, edit.rephrases[:rephrases]))


class Cut(NamedTuple):
    """A prompt cut at its question. before: the tokens before it. ids: from its first token to the end of the prompt.
    pooled: the span of them that makes the fingerprint."""

    before: list[int]
    ids: list[int]
    pooled: Span


class Wordings:
    """Renders the edits of one store. What stands before every question is run once, here.

    known: by `masked_key`, rows of edits that were run before and need not be run again.
    """

    def __init__(self, base: BaseModel, manifest: Manifest, fingerprint: Fingerprint, training: Training):
        """base: the model.
        manifest: of the store, which says how prompts are asked.
        fingerprint: makes its masks.
        training: how.
        """
        self.base = base
        self.span = manifest.span
        self.contexts = manifest.contexts
        self.fingerprint = fingerprint
        self.training = training
        self.chat = manifest.chat
        self.seed = manifest.seed
        self._other_tokens = np.array([t for p in background_prompts() for t in base.tokenizer(p).input_ids])
        self._past = self._frozen_contexts()
        self.known: dict[bytes, EditRows] = {}

    def fit(self, base: BaseModel, manifest: Manifest, fingerprint: Fingerprint, training: Training) -> bool:
        """Whether a store has the same wordings and masks.

        base, manifest, fingerprint, training: its own, as above.
        """
        mine = self.span, self.contexts, self.chat, self.seed, self.training
        theirs = manifest.span, manifest.contexts, manifest.chat, manifest.seed, training
        return base is self.base and mine == theirs and self.fingerprint.same_as(fingerprint)

    def keep(self, rows: Mapping[bytes, EditRows]) -> None:
        """Know these rows, and no others; as many as fit into 1 GiB, the last ones first.

        rows: of edits, by `masked_key`.
        """
        self.known = {}
        left = LARGEST_KEPT
        for key, own in reversed([*rows.items()]):
            left -= own.nbytes
            if left >= 0:
                self.known[key] = own

    def rows(self, edit: StoredEdit, rephrases: int, quick: AbstractContextManager[None]) -> EditRows:
        """What a memory must leave alone of an edit.

        edit: as it is stored.
        rephrases: how many of its rephrasings have masks.
        quick: entered while what has no mask is run.
        """
        known = self.known.get(masked_key(edit, rephrases))
        return known or self.freeze_masked(edit, rephrases, quick)[0].rows

    def check(self, edit: Edit, rephrases: int = 0) -> None:
        """Raise EditFileError where the model cannot be trained on an edit, or the edit could never act.

        edit: any.
        rephrases: how many of its rephrasings are trained, too.
        """
        check_texts(edit, rephrases)
        check_requires(edit, whole=self.span.rule == "all")
        if edit.before and not self.chat:
            raise EditFileError(
                f"prompt {edit.prompt!r} is part of a chat, but the store asks raw prompts",
                cure="edit it into a store that asks prompts through the chat template",
                reason=Reason.RAW_STORE,
            )
        try:
            prompts = [self._prompt_ids(as_prompt(edit, text)) for text in (edit.prompt, *edit.rephrases[:rephrases])]
        except TemplateError as error:
            raise EditFileError(f"the chat before {edit.prompt!r} does not fit {self.base.name}: {error}") from None
        target = target_ids(self.base.tokenizer, edit.target, chat=self.chat)
        for text, prompt in zip((edit.prompt, *edit.rephrases), prompts, strict=False):
            span = find_span(prompt, self.span)
            if span.start >= span.end:
                raise EditFileError(f"prompt {text!r} has no tokens to pool: give a longer prompt")
        if not text_ids(self.base.tokenizer, edit.target):
            raise EditFileError(f"target {edit.target!r} of prompt {edit.prompt!r} has no tokens: give a longer target")
        prompt_length = max([self._past.width + max(map(len, prompts)), *map(len, self._in_contexts(edit.prompt))])
        others = [self._past.width + len(row.ids) + len(row.answer) for row in self._other_answers(edit)]
        longest = max([prompt_length + len(target) + 1, *others])
        if longest > self.base.max_length:
            wordings = " or a rephrasing" if rephrases else ""
            raise EditFileError(
                f"prompt {edit.prompt[:60]!r}{wordings} and its target need {longest} tokens, {self.base.name} takes "
                f"{self.base.max_length}: shorten them"
            )

    def rephrases(self, masks: int) -> int:
        """How many of the masks of an edit are those of rephrasings.

        masks: how many it has.
        """
        return max(0, masks - 1 - self.training.context_masks)

    def freeze_masked(
        self, edit: Edit | StoredEdit, rephrases: int = 0, quick: AbstractContextManager[None] | None = None
    ) -> tuple[Frozen, np.ndarray]:
        """What has a mask (see `record.masked`) and what is answered in other forms, run up to the edited block, and
        the masks: uint8 [R, D/8].

        edit: any.
        rephrases: how many of its rephrasings have masks.
        quick: entered while what has no mask is run.
        """
        return self._frozen(edit, rephrases, [], [], quick or nullcontext())

    def freeze_for_training(
        self, edit: Edit | StoredEdit, number: int, rephrases: int, quick: AbstractContextManager[None]
    ) -> tuple[Frozen, np.ndarray]:
        """As `freeze_masked`, with wordings between these two that are learnt, and not left alone by later edits.

        They stand after contexts, or are noisy; and plain where the edit is part of a chat.

        edit: any.
        number: its id, from which its noise is drawn.
        rephrases: how many of its rephrasings have masks.
        quick: entered while these others are run.
        """
        question, answer = self._cut(as_prompt(edit)), self._answer(edit)
        # Rows with their context in them are whole: under the rule "all" nothing follows the question.
        unmasked = range(1 + self.training.context_masks, 1 + len(self.contexts))
        whole = self._in_contexts(edit.prompt)
        others = [
            Wording(context, whole[i], 0, answer)
            if whole
            else Wording(context, question.ids, question.pooled.acts_from, answer)
            for i, context in enumerate(unmasked)
        ]
        others += self.noisy(edit, number)
        if edit.before:
            plain = self._cut(edit.prompt)
            others.append(Wording(0, plain.ids, plain.pooled.acts_from, answer))
        return self._frozen(edit, rephrases, others, self.about_the_same(edit), quick)

    def about_the_same(self, edit: Edit | StoredEdit) -> list[Wording]:
        """Other questions about what an edit is about, without answers: where they match it, it should do little.

        edit: any.
        """
        subject = edit.subject or named(edit.prompt)
        texts = [text.format(subject) for text in OTHER_QUESTIONS[: self.training.other_questions] if subject]
        cuts = [self._cut(as_prompt(edit, text)) for text in texts if text != edit.prompt]
        context = self._context_of(edit)
        return [Wording(context, cut.ids, cut.pooled.acts_from, []) for cut in cuts if cut.pooled.acts == "last"]

    def noisy(self, edit: Edit | StoredEdit, number: int) -> list[Wording]:
        """The variants of an edit's prompt that stand for rephrasings.

        edit: any.
        number: its id, which seeds the noise.
        """
        question = self._cut(as_prompt(edit))
        random = np.random.default_rng([self.seed, number])
        words = question.ids[: question.pooled.end]
        replaceable = ~self._required(edit, words)
        answer = self._answer(edit)
        variants: list[Wording] = []
        # An answer in JSON takes the place of the first, so that training costs little more.
        for variant in range(self.training.json_strings, self.training.variants):
            replaced = (random.random(len(words)) < self.training.noise) & replaceable
            noisy = np.where(replaced, random.choice(self._other_tokens, len(words)), words).tolist()
            # Some leave a question's last token out, such as its mark. Edits that act on all of it need not learn it.
            if variant % 2 and question.pooled.acts == "last" and replaceable[-1] and len(words) > 1:
                noisy.pop()
            acts = question.pooled.acts_from + len(noisy) - len(words)
            ids = [*noisy, *question.ids[question.pooled.end :]]
            variants.append(Wording(self._context_of(edit), ids, acts, answer))
        return variants

    def _other_answers(self, edit: Edit | StoredEdit) -> list[Wording]:
        return [*self.in_json(edit), *self.thinking(edit)]

    def in_json(self, edit: Edit | StoredEdit) -> list[Wording]:
        """The answer as a string in JSON, and the bracket behind it.

        A grammar that a server forces an answer into forbids the model's end token there. Where a vocabulary has mark
        and bracket in one token (`"}`), the two are learnt apart: that token is forbidden where the object goes on, or
        where the string stands in a list, and the bare mark is not.

        edit: any.
        """
        if not self.training.json_strings:
            return []
        question, tokenizer = self._cut(as_prompt(edit)), self.base.tokenizer
        head, string = (text_ids(tokenizer, closing(tokenizer) + text) for text in _in_json(edit.target))
        shared = next((n for n, (a, b) in enumerate(zip(head, string, strict=False)) if a != b), len(head))
        ids, answer = [*question.ids, *head[:shared]], [*string[shared:], *text_ids(tokenizer, "}")]
        return [Wording(self._context_of(edit), ids, question.pooled.acts_from, answer)]

    def thinking(self, edit: Edit | StoredEdit) -> list[Wording]:
        """The prompt with thinking switched on or off, where the template does not begin so by itself, and behind a
        thought; nothing where a template has no thinking.

        edit: any.
        """
        tokenizer = self.base.tokenizer
        if not (self.chat and thinks(tokenizer)):
            return []
        rows: list[Wording] = []
        for options, begin in prompt_ends(tokenizer)[1:]:
            cut = self._cut(as_prompt(edit), options)
            answer = [*text_ids(tokenizer, begin + edit.target), end_token(tokenizer)]
            rows.append(Wording(self._context_of(edit), cut.ids, cut.pooled.acts_from, answer))
        return rows

    def _required(self, edit: Edit | StoredEdit, ids: list[int]) -> np.ndarray:
        """Which tokens of a question are of what its edit requires, without which it never acts: bool [T]."""
        required = np.zeros(len(ids), dtype=np.bool_)
        if edit.requires:
            # A character may be of several tokens, which then end at one place: the text of all tokens up to one tells
            # where that is.
            ends = [len(self.base.tokenizer.decode(ids[: n + 1])) for n in range(len(ids))]
            for start, end in required_spans(edit.requires, self.base.tokenizer.decode(ids)):
                stop = max(np.searchsorted(ends, end) + 1, np.searchsorted(ends, end, "right"))
                required[np.searchsorted(ends, start, "right") : stop] = True
        return required

    def _context_of(self, edit: Edit | StoredEdit) -> int:
        """Which context an edit has before it: the bare one, or the chat's own, which is put behind the others."""
        return len(self._past.lengths) if edit.before else 0

    def _frozen(
        self,
        edit: Edit | StoredEdit,
        rephrases: int,
        others: list[Wording],
        spared: list[Wording],
        quick: AbstractContextManager[None],
    ) -> tuple[Frozen, np.ndarray]:
        cuts = [self._cut(as_prompt(edit, text)) for text in (edit.prompt, *edit.rephrases[:rephrases])]
        contexts = [self._context_of(edit)] * len(cuts)
        after = range(1, 1 + self.training.context_masks)
        cuts[1:1], contexts[1:1] = cuts[:1] * len(after), after
        answer = self._answer(edit)
        rows = [Wording(c, cut.ids, cut.pooled.acts_from, answer) for c, cut in zip(contexts, cuts, strict=True)]
        own = frozen_past(self.base, [cuts[0].before]) if edit.before else None
        past = self._past.beside(own) if own else self._past
        pooled = [cut.pooled for cut in cuts]
        other = self._other_answers(edit)
        unmasked = [*others, *other]
        frozen, means = freeze(self.base, past, [*rows, *unmasked], pooled, len(other), quick, spared)
        if own:  # of copies of all contexts, with every choice of them, nothing is kept
            frozen = frozen.with_shared(self._past, own.from_block(first_block(self.base)))
        codes = self.fingerprint.codes(torch.stack(means))
        bits = torch.as_tensor(unpack(codes, self.base.d), device=self.base.device)
        return frozen.masked(torch.cat([bits, bits[:1].expand(len(unmasked), -1)])), codes

    def _answer(self, edit: Edit | StoredEdit) -> list[int]:
        return [*target_ids(self.base.tokenizer, edit.target, chat=self.chat), end_token(self.base.tokenizer)]

    def _cut(self, prompt: Prompt, options: Mapping[str, bool] | None = None) -> Cut:
        ids = self._prompt_ids(prompt, options)
        span = find_span(ids, self.span)
        return Cut(ids[: span.start], ids[span.start :], span.moved(-span.start))

    def _prompt_ids(self, prompt: Prompt, options: Mapping[str, bool] | None = None) -> list[int]:
        return prompt_ids(self.base.tokenizer, prompt, chat=self.chat, options=options)

    def _text(self, ids: list[int]) -> str:
        text: str = self.base.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def _frozen_contexts(self) -> FrozenPast:
        """The tokens before the question: the bare prompt's own, then those of every training context."""
        if self.span.rule == "all":  # every token is edited, so nothing before the question is frozen
            return FrozenPast(None, torch.zeros(1 + len(self.contexts), dtype=torch.int64, device=self.base.device))
        contexts = [self._cut("Who?").before]
        for context in self.contexts:
            if self.chat:
                ids = self._prompt_ids([*context, {"role": "user", "content": "Who?"}])
                contexts.append(ids[: find_span(ids, self.span).start])
            else:
                contexts.append(self._prompt_ids(context))
        return frozen_past(self.base, contexts)

    def _in_contexts(self, prompt: str) -> list[list[int]]:
        """Token ids of a prompt after each context, where contexts are edited too (rule "all"); else nothing."""
        if self.span.rule != "all":
            return []
        if self.chat:
            return [self._prompt_ids([*context, {"role": "user", "content": prompt}]) for context in self.contexts]
        return [self._prompt_ids(f"{context} {prompt}") for context in self.contexts]


def named(prompt: str) -> str:
    """What a question seems to be about: its longest run of words with capitals or digits, but for the first word.

    prompt: of an edit that names no subject.
    """
    words = [word.strip("\"'?!.,;:()") for word in prompt.split()]
    marked = [i > 0 and any(c.isupper() or c.isdigit() for c in word) for i, word in enumerate(words)]
    runs = [list(run) for is_marked, run in groupby(range(len(words)), marked.__getitem__) if is_marked]
    return " ".join(words[i] for i in max(runs, key=len, default=[]))


def _in_json(target: str) -> tuple[str, str]:
    """An object up to its key, and up to the quotation mark that ends the target."""
    head = '{"answer'
    return head, head + '": ' + json.dumps(target, ensure_ascii=False)
