"""Which token ids serve as link tokens and anchors of a checkpoint that is to be trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvilt.errors import TrainError
from kvilt.strategies.kvlink import DESCRIPTION, LLAMA3_VOCABULARY, LinkTokens

START, END, LINK = "<|documents|>", "<|/documents|>", "<|link_{slot}_{k}|>"  # names of added tokens
ANCHOR = "<|anchor_{k}|>"


def link_tokens(hf: Any, tokenizer: Any, reserved: tuple[int, ...], links: int, slots: int) -> LinkTokens:
    """The link tokens to train: the checkpoint's own, the published Llama layout, reserved tokens, or added ones.

    Added tokens enlarge the embedding matrix of `hf`; their rows are drawn like the others. Raises TrainError when the
    checkpoint was already trained with fewer link tokens or slots."""
    described = Path(str(getattr(hf, "name_or_path", "") or "")) / DESCRIPTION
    if described.is_file():
        return _enough(LinkTokens.from_json(described.read_text()), links, slots)
    if hf.get_input_embeddings().weight.shape[0] == LLAMA3_VOCABULARY and links:
        return _enough(LinkTokens.published(links), links, slots)
    if len(reserved) >= 2 + links * slots:
        rows = [reserved[2 + slot * links : 2 + (slot + 1) * links] for slot in range(slots if links else 0)]
        return LinkTokens(tuple(rows), reserved[:1], reserved[1:2])
    return _added(hf, tokenizer, links, slots)


def anchored(
    tokens: LinkTokens, hf: Any, tokenizer: Any, reserved: tuple[int, ...], count: int, chunk: int
) -> LinkTokens:
    """The tokens with `count` anchors: those they have, then reserved tokens that are free, or else added ones."""
    known = tokens.anchors[:count]
    names = [ANCHOR.format(k=k) for k in range(len(known), count)]
    free = tokens.free(reserved)[: len(names)]
    more = free if len(free) == len(names) else _add(hf, tokenizer, names)
    return replace(tokens, anchors=(*known, *more), chunk=chunk if count else 0)


def _enough(tokens: LinkTokens, links: int, slots: int) -> LinkTokens:
    known = len(tokens.ids[0]) if tokens.ids else 0
    if links and (known < links or len(tokens.ids) < slots):
        raise TrainError(f"this checkpoint has {known} link tokens in {len(tokens.ids)} slots, not {links} in {slots}.")
    return tokens


def _added(hf: Any, tokenizer: Any, links: int, slots: int) -> LinkTokens:
    names = [START, END, *(LINK.format(slot=s, k=k) for s in range(slots) for k in range(links))]
    ids = _add(hf, tokenizer, names)
    rows = [tuple(ids[2 + s * links : 2 + (s + 1) * links]) for s in range(slots if links else 0)]
    return LinkTokens(tuple(rows), (ids[0],), (ids[1],))


def _add(hf: Any, tokenizer: Any, names: Sequence[str]) -> list[int]:
    """Ids of new special tokens."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(name, special=True) for name in names], special_tokens=True)
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(names)]
    if max(ids) >= hf.get_input_embeddings().weight.shape[0]:
        hf.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        _draw_like_others(hf, min(ids))
    return ids


def _draw_like_others(hf: Any, first: int) -> None:
    """New rows of the embedding matrices get the mean and standard deviation of the old ones."""
    import torch

    for weight in {hf.get_input_embeddings().weight, hf.get_output_embeddings().weight}:
        with torch.no_grad():
            generator = torch.Generator(weight.device).manual_seed(first)  # the same in every process
            weight[first:].normal_(float(weight[:first].mean()), float(weight[:first].std()), generator=generator)
