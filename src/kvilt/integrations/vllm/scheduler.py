"""vLLM's scheduler with holes: runs of a prompt that are computed between reused rows, in the same step as the rest.

A hole becomes a virtual request: a partial prefill of the same tokens in the same blocks, which samples nothing and is gone
after its step. In every layer vLLM writes all new keys and values before it attends, so a later hole of the same step reads
what an earlier one wrote, which is what one pass over the plan does. Where the holes do not fit into a step, the request
waits as if for a transfer while they are computed in parts."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import count
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from kvilt.integrations.vllm.connector import KviltConnector, Loaded
from kvilt.integrations.vllm.documents import Ticket
from kvilt.integrations.vllm.scheduling import Scheduling

PATIENCE = 4  # steps that a request with holes waits for one with room, before it is computed in parts
Run = tuple[int, int]


class Part:
    """Holes that are computed over several steps."""

    def __init__(self, request: Request, ticket: Ticket, runs: list[Run]) -> None:
        self.request, self.ticket, self.runs = request, ticket, runs

    def take(self, tokens: int, seats: int) -> list[Run]:
        """The next runs that fit."""
        taken: list[Run] = []
        while self.runs and tokens > 0 and len(taken) < seats:
            start, end = self.runs.pop(0)
            stop = min(end, start + tokens)
            if stop < end:
                self.runs.insert(0, (stop, end))
            taken.append((start, stop))
            tokens -= stop - start
        return taken


class KviltScheduler(AsyncScheduler):
    """`--scheduler-cls kvilt.integrations.vllm.scheduler.KviltScheduler`."""

    max_num_scheduled_tokens: int
    max_num_active_reqs: int
    max_num_running_reqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ends: Scheduling | None = self.connector.ends if isinstance(self.connector, KviltConnector) else None
        self._parts: dict[str, Part] = {}
        self._numbers = count()
        self._silent = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """One step: vLLM's own, with less of its budget, then the holes of what it admitted."""
        ends = self.ends
        if ends is None or self.pause_state == PauseState.PAUSED_ALL:
            return super().schedule(*args, **kwargs)
        kept = self.max_num_scheduled_tokens, self.max_num_active_reqs
        tokens, seats = (0, 0) if self.num_spec_tokens else self._reserve(ends)  # no holes beside drafts
        self.max_num_scheduled_tokens -= tokens
        self.max_num_active_reqs = min(self.max_num_active_reqs, self.max_num_running_reqs - seats)
        try:
            out = super().schedule(*args, **kwargs)
        finally:
            self.max_num_scheduled_tokens, self.max_num_active_reqs = kept
        self._compute_holes(ends, out)
        return out

    def _reserve(self, ends: Scheduling) -> tuple[int, int]:
        """Tokens and seats that this step keeps for holes; grants them to waiting requests in their order."""
        tokens = max(0, self.max_num_scheduled_tokens - sum(_wanted(r) for r in self.running))
        seats = max(0, self.max_num_running_reqs - len(self.running))
        free = tokens, seats
        for part in self._parts.values():
            tokens -= min(tokens, sum(b - a for a, b in part.runs))
            seats -= min(seats, len(part.runs))
        ends.grants = {}
        for request in self.waiting:
            ticket = ends.tickets.get(request.request_id)
            if ticket is None or not ticket.placed.holes or request.num_computed_tokens:
                continue
            size, number = sum(b - a for a, b in ticket.placed.holes), len(ticket.placed.holes)
            if size < tokens and number < seats:
                tokens, seats = tokens - size, seats - number - 1
                ends.grants[request.request_id] = "now"
            elif self._is_large(size, number) or ticket.asked >= PATIENCE:
                ends.grants[request.request_id] = "parts"
        granted = sum(grant == "now" for grant in ends.grants.values())
        return free[0] - tokens, free[1] - seats - granted  # their own seats vLLM counts itself

    def _is_large(self, tokens: int, runs: int) -> bool:
        """Whether holes would fill most of a step."""
        return 2 * tokens > self.max_num_scheduled_tokens or 2 * runs > self.max_num_running_reqs

    def _compute_holes(self, ends: Scheduling, out: SchedulerOutput) -> None:
        """Add the holes of requests that were admitted in this step, then parts of others."""
        before = out.total_num_scheduled_tokens
        for request_id in ends.started:
            request, ticket = self.requests[request_id], ends.tickets[request_id]
            runs = ticket.holes
            _correct(request, ticket)
            if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                self._parts[request_id] = Part(request, ticket, runs)
                out.has_sync_kv_loads = True  # loaded before this step: holes read what is loaded
            else:
                self._add(out, request, ticket, runs)
        ends.started = []
        for part in list(self._parts.values()):
            self._advance(out, part)
        if self.defer_block_free and not before and out.total_num_scheduled_tokens:
            self.sched_step_seq += 1  # vLLM has counted a step without tokens as none

    def _advance(self, out: SchedulerOutput, part: Part) -> None:
        """Compute what fits of a request's holes; with the last of them the request may go on in the next step."""
        request, request_id = part.request, part.request.request_id
        if request.is_finished():  # aborted: its blocks were kept for the holes
            del self._parts[request_id]
            if request_id in self.requests:
                self._free_blocks(request)
            return
        if request_id in self.failed_recving_kv_req_ids:
            part.runs = []
        left = self.max_num_scheduled_tokens - out.total_num_scheduled_tokens
        virtual = sum(name not in self.requests for name in out.num_scheduled_tokens)
        seats = self.max_num_running_reqs - len(self.running) - virtual
        self._add(out, request, part.ticket, part.take(left, seats))
        if not part.runs:
            del self._parts[request_id]
            self.finished_recving_kv_req_ids.add(request_id)

    def _add(self, out: SchedulerOutput, request: Request, ticket: Ticket, runs: Iterable[Run]) -> None:
        """One virtual request for each run; the workers forget them in the next step."""
        blocks = self.kv_cache_manager.get_block_ids(request.request_id)
        for start, end in runs:
            tokens = list(ticket.placed.tokens[: end + 1])  # one more than is computed: nothing is sampled
            soft = ticket.placed.soft.among(start, end) if ticket.placed.soft else None
            hole = NewRequestData(
                req_id=f"{request.request_id}~{next(self._numbers)}",
                prompt_token_ids=tokens,
                mm_features=[],
                sampling_params=self._silent,
                pooling_params=None,
                block_ids=tuple(ids[: -(-end // self.block_size)] for ids in blocks),
                num_computed_tokens=start,
                lora_request=None,
                prompt_embeds=None if soft is None else soft[0],
                prompt_is_token_ids=None if soft is None else soft[1],
                prefill_token_ids=tokens if self.use_v2_model_runner else None,
            )
            out.scheduled_new_reqs.append(hole)
            out.num_scheduled_tokens[hole.req_id] = end - start
            out.total_num_scheduled_tokens += end - start
            self.finished_req_ids.add(hole.req_id)
        request.last_sched_seq = self.sched_step_seq

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """vLLM's own; what was loaded, and what could not be, is known before requests finish or start again."""
        connected = model_runner_output.kv_connector_output
        report = connected and connected.kv_connector_worker_meta
        if self.ends is not None and isinstance(report, Loaded):
            self.ends.note(report.requests)
            self.ends.refuse(report.failed)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _handle_invalid_blocks(self, invalid_block_ids: set[int], num_scheduled_tokens: dict[str, int]) -> set[str]:
        """Start requests again whose documents could not be loaded, without these; vLLM would compute slots as they are."""
        ends = self.ends
        if ends is None or not self.recompute_kv_load_failures:
            return super()._handle_invalid_blocks(invalid_block_ids, num_scheduled_tokens)
        waiting = [part.request for part in self._parts.values()]
        hit = [r for r in (*self.running, *waiting) if not invalid_block_ids.isdisjoint(self._blocks(r))]
        self.kv_cache_manager.evict_blocks({block for request in hit for block in self._blocks(request)})
        for request in reversed(hit):  # each goes to the front of the queue
            if request.num_output_tokens:  # a part of the answer is out: vLLM ends those of this set with an error
                self.encoder_cache_mismatch_reqs.add(request.request_id)
            else:
                self._restart(request)
                ends.receive_again(request)
        return {request.request_id for request in hit}

    def _blocks(self, request: Request) -> list[int]:
        blocks: list[int] = self.kv_cache_manager.get_block_ids(request.request_id)[0]
        return blocks

    def _restart(self, request: Request) -> None:
        """Put a request back to where it was when it arrived."""
        if self._parts.pop(request.request_id, None) is None:
            self.running.remove(request)
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)
            self.reset_preempted_req_ids.discard(request.request_id)
            request.num_preemptions -= 1
        else:
            self.kv_holding_waiting.remove_requests([request])
            self.deferred_waiting.discard(request)
            self._inflight_prefills.discard(request)
            self._free_request_blocks(request)
            request.num_computed_tokens = 0
            self.waiting.prepend_request(request)
        request.status = RequestStatus.WAITING
        self.finished_req_ids.add(request.request_id)  # workers forget it, and meet it as a new one


def _wanted(request: Request) -> int:
    """Tokens that a running request may get in this step."""
    return max(0, request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens)


def _correct(request: Request, ticket: Ticket) -> None:
    """vLLM counts all slots before the tail as cached: only reused rows are, and no more than the client's own tokens."""
    stats = request.prefill_stats
    if stats is not None:
        length = len(ticket.placed.tokens)
        computed = length - ticket.local - ticket.loaded
        reused = max(0, min(ticket.local + ticket.loaded, len(ticket.arrived.ids) - computed))
        local = min(ticket.local, reused)
        stats.set(num_prompt_tokens=length, num_local_cached_tokens=local, num_external_cached_tokens=reused - local)
