"""vLLM's own KV offloading (distributed/kv_transfer/kv_connector/v1/offloading) beside decisions.

`OffloadingConnector` keys blocks by the hashes of a request, which hold the name of its edit once that is known. It
takes them when a request begins, before that. So a request that is not decided yet offloads nothing from the token on
from which an edit would act, loads nothing behind the beginning of its question, of which no worker has sums, and its
keys are made again once it is decided.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from memoir_retrieval.question.span import Span

if TYPE_CHECKING:
    from vllm.v1.request import Request

__all__ = ["Offloads"]


class Offloads:
    """The offloaded blocks of a scheduler's requests."""

    def __init__(self, connector: Any):
        """connector: the scheduler's OffloadingConnector, whose methods are replaced."""
        self._offloads: Any = connector.connector_scheduler
        match, offloadable = self._offloads.get_num_new_matched_tokens, self._offloads._calc_num_offloadable_tokens

        @functools.wraps(match)
        def get_num_new_matched_tokens(
            request: Request, num_computed_tokens: int, max_num_new_tokens: int | None = None
        ) -> Any:
            if span := _undecided(request):
                # Down to whole chunks: the connector would take the one that the limit lies in.
                room = max(0, span.start // self._chunk * self._chunk - num_computed_tokens)
                max_num_new_tokens = room if max_num_new_tokens is None else min(room, max_num_new_tokens)
            return match(request, num_computed_tokens, max_num_new_tokens)

        @functools.wraps(offloadable)
        def calc_num_offloadable_tokens(status: Any, num_computed_tokens: int) -> int:
            span = _undecided(status.req)
            number: int = offloadable(status, num_computed_tokens)
            return min(number, span.acts_from) if span else number

        self._offloads.get_num_new_matched_tokens = get_num_new_matched_tokens
        self._offloads._calc_num_offloadable_tokens = calc_num_offloadable_tokens

    @property
    def _chunk(self) -> int:
        return max(group.tokens_per_chunk for group in self._offloads.config.kv_group_configs)

    @staticmethod
    def hold(request: Request, span: Span) -> None:
        """Hold a request back that is not decided.

        request: which begins, or is looked up again.
        span: that is looked up of it.
        """
        request._memoir_undecided = span

    def release(self, request: Request) -> None:
        """A request is decided, and its blocks have their names.

        request: which was held back, or not.
        """
        if _undecided(request):
            del request._memoir_undecided
            self.rename(request)

    def rename(self, request: Request) -> None:
        """The blocks of a request have other names now.

        request: of which the connector may have heard.
        """
        status = self._offloads._req_status.get(request.request_id)
        if status is None:
            return
        for group in status.group_states:
            group.offload_keys.clear()
        status.update_offload_keys()


def _undecided(request: Request) -> Span | None:
    return getattr(request, "_memoir_undecided", None)
