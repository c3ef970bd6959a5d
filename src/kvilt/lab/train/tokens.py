"""Which token ids serve as link tokens and anchors of a checkpoint that is to be trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken

from kvilt.errors import TrainError
from kvilt.strategies.kvlink import DESCRIPTION, LLAMA3_VOCABULARY, LinkTokens

START, END, LINK = "<|documents|>", "<|/documents|>", "<|link_{slot}_{k}|>"  # names of added tokens
ANCHOR = "<|anchor_{k}|>"


def link_tokens(
    hf: Any, tokenizer: Any, reserved: tuple[int, ...], links: int, slots: int, anchors: int = 0, chunk: int = 0
) -> LinkTokens:
    """The link tokens to train: the checkpoint's own, the published Llama layout, reserved tokens, or added ones.

    Anchors are the checkpoint's own, then reserved tokens that are left, or added ones. Added tokens enlarge the
    embedding matrix of `hf`; their rows are drawn like the others. Raises TrainError when the checkpoint was already
    trained with fewer link tokens or slots."""
    described = Path(str(getattr(hf, "name_or_path", "") or "")) / DESCRIPTION
    if described.is_file():
        tokens = _enough(LinkTokens.from_json(described.read_text()), links, slots)
        if tokens.vectors:
            raise TrainError(f"its link tokens lie beside it ({tokens.vectors}): start from the model that it changes.")
    elif hf.get_input_embeddings().weight.shape[0] == LLAMA3_VOCABULARY and links:
        tokens = _enough(LinkTokens.published(links), links, slots)
    else:
        names = [START, END, *(LINK.format(slot=s, k=k) for s in range(slots) for k in range(links))]
        ids = _ids(hf, tokenizer, reserved, names)
        rows = [ids[2 + slot * links : 2 + (slot + 1) * links] for slot in range(slots if links else 0)]
        tokens = LinkTokens(tuple(rows), ids[:1], ids[1:2])
    names = [ANCHOR.format(k=k) for k in range(len(tokens.anchors), anchors)]
    more = _ids(hf, tokenizer, tokens.free(reserved), names)
    return replace(tokens, anchors=(*tokens.anchors, *more)[:anchors], chunk=chunk if anchors else 0)


def start_links(hf: Any, tokenizer: Any, tokens: LinkTokens, words: Sequence[str]) -> None:
    """Let the link tokens of every slot start near the mean embeddings of these words, one after another.

    Raises TrainError for more words than link tokens, and for a word without tokens."""
    weight, links = hf.get_input_embeddings().weight, len(tokens.ids[0]) if tokens.ids else 0
    if len(words) > links:
        raise TrainError(f"init names {len(words)} words, a slot has {links} link tokens.")
    noise = 0.1 * float(weight.detach().std())
    for k, word in enumerate(words):
        ids = tokenizer.encode(word, add_special_tokens=False)
        if not ids:
            raise TrainError(f"init: {word!r} has no tokens.")
        slots = [slot[k] for slot in tokens.ids]
        with torch.no_grad():
            generator = torch.Generator(weight.device).manual_seed(k)  # the same in every process
            drawn = torch.randn(len(slots), weight.shape[1], generator=generator, device=weight.device)
            weight[slots] = weight[ids].mean(0) + noise * drawn


def _enough(tokens: LinkTokens, links: int, slots: int) -> LinkTokens:
    known = len(tokens.ids[0]) if tokens.ids else 0
    if links and (known < links or len(tokens.ids) < slots):
        raise TrainError(f"this checkpoint has {known} link tokens in {len(tokens.ids)} slots, not {links} in {slots}.")
    return tokens


def _ids(hf: Any, tokenizer: Any, free: tuple[int, ...], names: Sequence[str]) -> tuple[int, ...]:
    """The first free tokens, or added ones of these names where there are too few."""
    if len(free) >= len(names):
        return free[: len(names)]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names], special_tokens=True)
    ids = tuple(int(i) for i in tokenizer.convert_tokens_to_ids(names))
    if max(ids) >= hf.get_input_embeddings().weight.shape[0]:
        hf.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        _draw_like_others(hf, min(ids))
    return ids


def _draw_like_others(hf: Any, first: int) -> None:
    """New rows of the embedding matrices get the mean and standard deviation of the old ones."""
    for weight in {hf.get_input_embeddings().weight, hf.get_output_embeddings().weight}:
        with torch.no_grad():
            generator = torch.Generator(weight.device).manual_seed(first)  # the same in every process
            weight[first:].normal_(float(weight[:first].mean()), float(weight[:first].std()), generator=generator)
