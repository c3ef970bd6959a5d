"""Weights to start from: heads that look one and two tokens back, and heads that find what followed before.

Copying by content is a circuit of two layers that random weights find late (1.5 M tokens were not enough on a busy
machine), though its parts are known: built in, it is there from the first step, and training goes on from it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

SCALE = 0.1  # of the embeddings: with tied weights, smaller ones keep the head from being certain
PAIRS = 5  # fast rotary pairs; the slow ones cannot tell neighbours apart


def look_back(model: LlamaForCausalLM, head: int, distance: int, common: Tensor) -> None:
    """Let a head of the first layer attend `distance` tokens back, through what all embeddings share."""
    config = model.config
    dim = config.hidden_size // config.num_attention_heads
    base = float(config.rope_parameters["rope_theta"])
    angle = distance * base ** (-torch.arange(PAIRS) * 2 / dim)
    query, key = torch.zeros(dim), torch.zeros(dim)
    query[:PAIRS] = 1.0
    key[:PAIRS], key[dim // 2 : dim // 2 + PAIRS] = angle.cos(), angle.sin()
    rows = slice(head * dim, (head + 1) * dim)
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight[rows] = 1.5 * PAIRS**-0.5 * torch.outer(query, common)
    attention.k_proj.weight[rows] = 1.5 * PAIRS**-0.5 * torch.outer(key, common)


@torch.no_grad()
def copying(model: LlamaForCausalLM) -> None:
    """Write embeddings with a common direction, two look-back heads, and two heads that match and copy."""
    config = model.config
    width, dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    common = torch.nn.functional.normalize(torch.randn(width), dim=0)
    embeddings = model.model.embed_tokens.weight
    embeddings.normal_()
    embeddings.sub_(torch.outer(embeddings @ common, common)).add_(common * width**0.5).mul_(SCALE)
    first, second = (model.model.layers[layer].self_attn for layer in (0, 1))
    basis = torch.linalg.qr(torch.cat([common[:, None], torch.randn(width, 3 * dim)], 1))[0][:, 1:].T
    read, *write = (basis[k * dim : (k + 1) * dim] for k in range(3))  # [dim, width] each, orthogonal
    for head in (0, 1):
        rows = slice(head * dim, (head + 1) * dim)
        look_back(model, head, head + 1, common)
        first.v_proj.weight[rows] = read
        first.o_proj.weight[:, rows] = 0.3 * write[head].T
        # Head 0 matches this token with what a key saw one back, head 1 the token before with two back.
        second.q_proj.weight[rows] = 2.0 * (read if head == 0 else write[0])
        second.k_proj.weight[rows] = 2.0 * write[head]
        second.v_proj.weight[rows] = read
        second.o_proj.weight[:, rows] = 0.5 * read.T
