"""Weights to start from: heads that look back, copy, keep the last person in mind, and find what was said of them.

Copying by content and binding a value to a name are circuits of two and three layers that random weights find late
(1.5 M and more than 6 M tokens were not enough), though their parts are known. Built in roughly, they are there from
the first step; everything else (relations, wordings, companies, similar names, order in time) training has to find.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

SCALE = 0.1  # of the embeddings: with tied weights, smaller ones keep the head from being certain
FAST = 6  # rotary pairs that tell neighbours apart
NEAR = slice(5, 14)  # rotary pairs that together prefer the nearer of two names
STILL = 14  # rotary pairs from here on hardly turn within a context: there contents can be compared


@dataclass(frozen=True)
class Spaces:
    """Orthogonal parts of the residual stream, one direction [width] or several [part, width] each."""

    common: Tensor  # shared by all embeddings
    first: Tensor  # shared by first names
    after_first: Tensor  # the token before was a first name
    kind: Tensor  # shared by words that end the name of a company or college
    token: Tensor  # which token this is
    back: tuple[Tensor, Tensor]  # which tokens stood one and two before
    person: Tensor  # who was named last
    group: Tensor  # which company or college was named last


def divide(width: int) -> Spaces:
    """A random division of the residual stream."""
    basis = torch.linalg.qr(torch.randn(width, width))[0].T
    part = (width - 4) // 5
    token, one, two, person, group = basis[4 : 4 + 5 * part].view(5, part, width)
    return Spaces(basis[0], basis[1], basis[2], basis[3], token, (one, two), person, group)


@torch.no_grad()
def build_in(model: LlamaForCausalLM, first: list[int], kinds: list[int]) -> None:
    """Write the circuits into a new model, given the tokens of first names and of words such as "Labs"."""
    width = model.config.hidden_size
    spaces = divide(width)
    embed(model.model.embed_tokens.weight, spaces, first, kinds)
    token, (one, two), person, group = spaces.token, spaces.back, spaces.person, spaces.group
    for head in (0, 1):
        look_back(model, head, head + 1, spaces)
    remember(model, 0, spaces.after_first, token, one, person, spaces.common)
    remember(model, 1, spaces.kind, one, two, group, spaces.common)
    # What followed this token (or the one before) where the same person (or group) was spoken of ...
    find(model, 2, 0, [(person, person, 2.2), (token, one, 3.0)], token)
    find(model, 2, 1, [(person, person, 2.2), (one, two, 2.0)], token)
    find(model, 2, 2, [(group, group, 2.2), (token, one, 3.0)], token)
    find(model, 2, 3, [(group, group, 2.2), (one, two, 2.0)], token)
    # ... and wherever.
    find(model, 3, 0, [(token, one, 3.0), (one, two, 2.0)], token)


def embed(weight: Tensor, spaces: Spaces, first: list[int], kinds: list[int]) -> None:
    """Embeddings that say which token this is, and never look like a note about another one."""
    width = weight.shape[1]
    single = torch.stack([spaces.common, spaces.first, spaces.after_first, spaces.kind])
    notes = torch.cat([single, spaces.person, spaces.group])
    weight.normal_()
    weight.sub_(weight @ notes.T @ notes)
    weight.add_(spaces.common * width**0.5)
    weight[first] += 0.7 * spaces.first * width**0.5
    weight[kinds] += 0.7 * spaces.kind * width**0.5
    weight.mul_(SCALE)


def head_rows(model: LlamaForCausalLM, head: int) -> tuple[slice, int]:
    """The rows of a head in its projections, and its size."""
    dim = model.config.head_dim
    return slice(head * dim, (head + 1) * dim), dim


def padded(space: Tensor, dim: int) -> Tensor:
    """As much of a space as a head holds, [dim, width]."""
    kept = space[:dim]
    return torch.cat([kept, kept.new_zeros(dim - len(kept), kept.shape[1])])


def frequencies(model: LlamaForCausalLM, dim: int) -> Tensor:
    """Rotary angles per position, [dim / 2]."""
    base = float(model.config.rope_parameters["rope_theta"])
    return base ** (-torch.arange(dim // 2) * 2 / dim)


def look_back(model: LlamaForCausalLM, head: int, distance: int, spaces: Spaces) -> None:
    """Layer 0: attend `distance` tokens back and note which token stood there."""
    rows, dim = head_rows(model, head)
    attention = model.model.layers[0].self_attn
    angle = distance * frequencies(model, dim)[:FAST]
    query, key = torch.zeros(dim), torch.zeros(dim)
    query[: len(angle)] = 1.0
    key[: len(angle)], key[dim // 2 : dim // 2 + len(angle)] = angle.cos(), angle.sin()
    attention.q_proj.weight[rows] = 2.5 * FAST**-0.5 * torch.outer(query, spaces.common)
    attention.k_proj.weight[rows] = 2.5 * FAST**-0.5 * torch.outer(key, spaces.common)
    read, noted = [spaces.token], [spaces.back[head]]
    if distance == 1:
        read, noted = [*read, spaces.first[None]], [*noted, spaces.after_first[None]]
    attention.v_proj.weight[rows] = padded(torch.cat(read), dim)
    attention.o_proj.weight[:, rows] = 0.3 * padded(torch.cat(noted), dim).T


def remember(
    model: LlamaForCausalLM, head: int, mark: Tensor, one: Tensor, other: Tensor, space: Tensor, common: Tensor
) -> None:
    """Layer 1: attend to the nearest token with a mark and note two tokens of the name it belongs to."""
    rows, dim = head_rows(model, head)
    attention = model.model.layers[1].self_attn
    side = torch.zeros(dim)
    side[: dim // 2][NEAR] = 0.8
    attention.q_proj.weight[rows] = torch.outer(side, common)
    attention.k_proj.weight[rows] = torch.outer(side, mark)
    # The second token is noted upside down, so that "A B" is not "B A".
    attention.v_proj.weight[rows] = padded(one + 0.5 * other.flip(0), dim)
    attention.o_proj.weight[:, rows] = 0.3 * padded(space, dim).T


def find(
    model: LlamaForCausalLM, layer: int, head: int, pairs: list[tuple[Tensor, Tensor, float]], copied: Tensor
) -> None:
    """Attend where what a key keeps equals what this token asks for, in every pair, and copy the token there."""
    rows, dim = head_rows(model, head)
    attention = model.model.layers[layer].self_attn
    places = [place for pair in range(STILL, dim // 2) for place in (pair, pair + dim // 2)]
    share = len(places) // len(pairs)
    for projection, side in ((attention.q_proj, 0), (attention.k_proj, 1)):
        weight = torch.zeros(dim, model.config.hidden_size)
        for number, pair in enumerate(pairs):
            space, gain = (pair[0], pair[1])[side], pair[2]
            weight[places[number * share : (number + 1) * share]] = gain * padded(space, share)
        projection.weight[rows] = weight
    attention.v_proj.weight[rows] = padded(copied, dim)
    attention.o_proj.weight[:, rows] = 0.5 * padded(copied, dim).T
