"""What a model must show before it is served: that moving its keys and reusing them changes nothing.

Config fields name the architectures that are known to be unfit; this finds the others, whatever their config says. What
"nothing" means is measured on the spot: a model that computes a text in two of its own ways gets logits that differ by some
noise, its floor. Kvilt's may differ by three times as much. In half precision honest models stay at about one floor (0.8 to 1.2),
and the smallest fault that was tried, keys one position off, is at ten."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from kvilt import __version__
from kvilt.errors import ModelError
from kvilt.model.attention import NAME
from kvilt.model.model import Model
from kvilt.plan import Layout
from kvilt.types import DocumentCache, Encoding, Prompt

MULTIPLE = 3.0  # floors that logits may be off
LEAST = 1e-4  # always allowed: what float32 and the angles, which are computed in it everywhere, may bring about
NOISIEST = 0.1  # a model whose floor is higher cannot be checked
LENGTH, ENCODED, AWAY = 48, 32, 9  # tokens of the trial, those encoded as a document, and how far it is moved
LONGER = 17  # tokens that the text goes on for where a model computes it in another way


class Own(NamedTuple):
    """What a model says of a text by itself: logits (tokens, vocab) float32, and its floor."""

    logits: Tensor
    floor: float


def facts(hf: Any) -> str:
    """What a passed trial holds for, beside the model's files."""
    versions = f"{__version__} {transformers.__version__} {torch.__version__}"
    return f"{versions} {type(hf).__name__} {hf.device.type} {hf.dtype}"


def deviation(tensor: Tensor, wanted: Tensor) -> float:
    """How far a tensor is from another one: root mean square of the difference, in units of that of what is wanted."""
    wanted = wanted.float()
    scale = float(wanted.square().mean().sqrt()) or 1.0
    return float((tensor.float().to(wanted.device) - wanted).square().mean().sqrt()) / scale


def tolerance(floor: float) -> float:
    """The deviation that is allowed over a floor."""
    return max(LEAST, MULTIPLE * floor)


def own(hf: Any, text: Tensor | None = None) -> Own:
    """A model's logits behind every token of a text with its own attention: ids (tokens,) or embeddings (tokens, hidden).

    The floor is the larger of two deviations from them: with another attention, and with the text as the first part of a
    longer one in a batch of two; but not below the precision of the dtype."""
    text = _trial(hf) if text is None else text
    longer = torch.cat([text, text[:LONGER]])
    wanted = logits(hf, text)
    others = [logits(hf, longer, longer.flip(0))[: len(text)]]
    with suppress(ValueError, ImportError, NotImplementedError):  # a model may have one attention only
        others.append(logits(hf, text, kind="sdpa" if _kind(hf) == "eager" else "eager"))
    return Own(wanted, max(torch.finfo(hf.dtype).eps, *(deviation(o, wanted) for o in others)))


@torch.no_grad()
def logits(hf: Any, *texts: Tensor, kind: str = "") -> Tensor:
    """Logits (tokens, vocab) float32 of the first of some texts of one length, in one pass with the model's own attention."""
    batch = torch.stack(texts).to(hf.device)
    before = hf.config._attn_implementation
    hf.set_attn_implementation(kind or _kind(hf))
    try:
        name = "inputs_embeds" if batch.is_floating_point() else "input_ids"
        return torch.as_tensor(hf(**{name: batch}, use_cache=False).logits[0]).float()
    finally:
        hf.set_attn_implementation(before)


def _kind(hf: Any) -> str:
    """The attention that a model has when Kvilt does not stand in for it."""
    kind = str(hf.config._attn_implementation)
    return kind if kind != NAME else "sdpa" if getattr(hf, "_supports_sdpa", True) else "eager"


def check(model: Model, alone: Own) -> None:
    """Raise ModelError unless encoding, moving, recomputing in part and decoding give the model's own logits."""
    name = model.hf.config.model_type
    if not alone.floor <= NOISIEST:  # NaN too
        raise ModelError(
            f"{name} is refused: two of its own ways to compute a text differ by {alone.floor:.0%}, so nothing can be proved "
            f"in {str(model.shape.dtype).removeprefix('torch.')}. Try float32."
        )
    try:
        reused, at = _reused(model, _trial(model.hf))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError) as error:
        raise ModelError(f"{name} is refused: it does not run on a cache of keys and values ({error}).") from error
    worst = deviation(reused, alone.logits[at.to(alone.logits.device)])
    if not worst <= tolerance(alone.floor):
        raise ModelError(
            f"{name} is refused: with a document moved by {AWAY} positions its logits are off by {worst:.2%} "
            f"(its own noise: {alone.floor:.2%}). Its positions or its attention are not those of a standard rotary decoder."
        )


@torch.no_grad()
def _reused(model: Model, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (rows, vocab) through a moved document, whole and recomputed in part; and which token each row stands behind."""
    cache = model.encode([ids[:ENCODED]], Encoding())[0]
    nothing = DocumentCache(ids[:0], ids[:0], 0, cache.key)
    prompt = Prompt(nothing, (cache,), ids[ENCODED:-1])
    fresh = torch.arange(ENCODED) % 3 == 1
    some = model.score(Layout(prompt).reuse(cache, fresh, at=AWAY).ask().plan())
    whole = Layout(prompt).reuse(cache, at=AWAY).ask().plan()
    rest = model.score(whole)
    with model.run(whole, room=1) as run:
        last = run.step(ids[None, -1:].to(model.shape.device))
    model.pool.clear()
    asked = torch.arange(ENCODED, LENGTH - 1)
    return torch.cat([some, rest, last]), torch.cat([fresh.nonzero()[:, 0], asked, asked, torch.tensor([LENGTH - 1])])


def _trial(hf: Any) -> Tensor:
    """Different ids, none of them special in any usual tokenizer, (LENGTH,)."""
    return (torch.arange(1, LENGTH + 1) * 7919) % int(hf.config.vocab_size)
