"""vLLM's KV connector: in the scheduler it finds documents and says what is there, in the worker it loads their rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from kvilt.integrations.vllm.deployment import Checkpoint, Settings
from kvilt.integrations.vllm.documents import PARAMETER
from kvilt.integrations.vllm.loading import Load, Loader
from kvilt.integrations.vllm.scheduling import Scheduling


@dataclass
class Loads(KVConnectorMetadata):
    """What the workers load before a step."""

    loads: list[Load] = field(default_factory=list)


@dataclass
class Loaded(KVConnectorWorkerMetadata):
    """What a worker loaded: bytes and seconds of each request; and the documents (digests) that could not be read."""

    requests: dict[str, tuple[int, float]] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """All workers' bytes, the slowest worker's seconds."""
        assert isinstance(other, Loaded)
        mine, theirs = self.requests, other.requests
        both = {r: (a + theirs.get(r, (0, 0.0))[0], max(s, theirs.get(r, (0, 0.0))[1])) for r, (a, s) in mine.items()}
        return Loaded({**theirs, **both}, self.failed | other.failed)


class KviltConnector(KVConnectorBase_V1):
    """Loads stored documents into vLLM's paged cache, wherever they stand in a prompt."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = Settings.of(self._kv_transfer_config.kv_connector_extra_config)
        source = vllm_config.model_config.model
        self.scheduling: Scheduling | None = None
        self.loader: Loader | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.scheduling = Scheduling.of(settings, vllm_config)
        else:
            self.loader = Loader.of(settings, Checkpoint(source).rotation, vllm_config)
        self._loaded = Loaded()

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed on: a request that is preempted loses nothing."""
        return False

    # ------------------------------------------------------------------------------------------------------ scheduler

    @property
    def ends(self) -> Scheduling:
        """The scheduler's end."""
        if self.scheduling is None:
            raise RuntimeError("this connector belongs to a worker")
        return self.scheduling

    def on_new_request(self, request: Any) -> None:
        """Find the request's documents, lay it into slots, and salt it."""
        self.ends.receive(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many slots beyond vLLM's own cache will be there when the tail is computed, and whether that takes steps."""
        return self.ends.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request has its blocks."""
        if num_external_tokens > 0:
            self.ends.admitted.append(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """What is to be loaded before this step."""
        manager, ends = self._kv_cache_manager, self.ends
        assert manager is not None
        ends.started, ends.admitted = ends.admitted, []
        return Loads([ends.load(request_id, manager.get_block_ids(request_id)[0]) for request_id in ends.started])

    def update_connector_output(self, connector_output: Any) -> None:
        """Note what the workers loaded."""
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, Loaded):
            self.ends.note(report.requests)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The receipt."""
        receipt = self.ends.receipt(request)
        return False, None if receipt is None else {PARAMETER: receipt}

    def reset_cache(self) -> bool:
        """Look through the store again."""
        self.ends.look()
        return True

    # --------------------------------------------------------------------------------------------------------- worker

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Load what this step needs."""
        meta = self._get_connector_metadata()
        if self.loader is not None and isinstance(meta, Loads) and meta.loads:
            self.loader.start(meta.loads, forward_context.no_compile_layers)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Return once a layer is there, as far as work queued after this call can tell."""
        if self.loader is not None:
            self.loader.wait(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved: documents are encoded alone, never cut out of a prompt."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks whose rows could not be read."""
        done = None if self.loader is None else self.loader.finish()
        self._loaded = (
            Loaded() if done is None else Loaded({r: (n, done.seconds) for r, n in done.sizes.items()}, done.bad)
        )
        return set() if done is None else done.failed

    def build_connector_worker_meta(self) -> Loaded | None:
        """What was loaded in this step."""
        report, self._loaded = self._loaded, Loaded()
        return report if report.requests else None

    def shutdown(self) -> None:
        """Release the store."""
        if self.scheduling is not None:
            self.scheduling.close()
