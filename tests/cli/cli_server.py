"""Forks a `kvilt` process for each request on standard input: imports are paid once. It runs no tensor work itself."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import kvilt.cli
import kvilt.cli.app
import kvilt.corpora.files
import kvilt.engine.engine
import kvilt.stores.disk

LOADED = (torch, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast)


def child(arguments: list[str], out: str, env: dict[str, str]) -> None:
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(out + suffix, os.O_CREAT | os.O_WRONLY, 0o644), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
    code = 99
    try:
        code = kvilt.cli.run(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "wait" in message:
            status = os.waitpid(message["wait"], 0)[1]
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                child(message["start"], message["out"], message["env"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
