"""A request for a LoRA adapter in a real engine: it reuses nothing, and what it computes is nobody else's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import vllm_kit
from safetensors.torch import save_file
from vllm_kit import DOCUMENTS, Reference

# An engine with adapters is another engine, and vLLM wants a process for each.
PROGRAM = """
import json, sys
import vllm_kit
from vllm.lora.request import LoRARequest

def main():
    model, store, lora = sys.argv[1:4]
    served = vllm_kit.Served(model, store, "block:sink=system", enable_lora=True, max_lora_rank=8, enable_prompt_embeds=False)
    reference = vllm_kit.Reference(model, store)
    engine = reference.engine("block:sink=system")
    prompt = reference.prompt(engine, vllm_kit.DOCUMENTS)
    served.look()

    def ask(adapter):
        out = served.llm.generate([{"prompt_token_ids": prompt}], served.greedy(), use_tqdm=False, lora_request=adapter)[0]
        return {"tokens": vllm_kit.tokens(out), **vllm_kit.receipt(out)}

    adapter = LoRARequest("own", 1, lora)
    asked = [ask(None), ask(adapter), ask(None)]
    served.llm.reset_prefix_cache()
    served.ends.documents.index = type(served.ends.documents.index)()
    print("ANSWERS " + json.dumps([*asked, ask(adapter), ask(None)]))

if __name__ == "__main__":
    main()
"""


def save(folder: Path) -> str:
    """A LoRA adapter in peft's layout that changes every answer."""
    folder.mkdir()
    width, made = vllm_kit.SHAPE["hidden_size"], torch.Generator().manual_seed(7)
    tensors = {}
    for layer in range(vllm_kit.SHAPE["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(8, width, generator=made)
        tensors[f"{name}.lora_B.weight"] = torch.randn(width, 8, generator=made)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_request_with_an_adapter_reuses_nothing(place: Path, reference: Reference, tmp_path: Path) -> None:
    """Danger: rows of the base model are served to an adapter's request, or an adapter's rows to a plain one."""
    engine = reference.engine("block:sink=system")
    engine.encode(DOCUMENTS)
    command = [sys.executable, "-c", PROGRAM, reference.model, reference.store, save(tmp_path / "lora")]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=240)
    line = next((x for x in done.stdout.splitlines() if x.startswith("ANSWERS ")), None)
    assert line is not None, done.stderr[-2000:]
    first, adapted, again, alone, plain = json.loads(line.removeprefix("ANSWERS "))
    assert first["reused_tokens"] > 300
    assert again["tokens"] == first["tokens"]
    assert "adapter" in adapted["why"]
    assert "reused_tokens" not in adapted or not adapted["reused_tokens"]
    assert adapted["tokens"] == alone["tokens"] != plain["tokens"]  # alone: with nothing stored at all
