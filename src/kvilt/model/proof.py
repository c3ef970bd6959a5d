"""What a model must show before it is served: that moving its keys and reusing them changes nothing.

Config fields name the architectures that are known to be unfit; this finds the others, whatever their config says. What
"nothing" means is measured on the spot: a model that computes a text in two of its own ways gets logits that differ by some
noise, its floor. Kvilt's may differ by three times as much. In half precision honest models stay at about one floor (0.8 to 1.2),
and the smallest fault that was tried, keys one position off, is at ten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, eq=False)
class Own:
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


@torch.no_grad()
def own(hf: Any, text: Tensor | None = None, positions: Tensor | None = None) -> Own:
    """A model's logits behind every token of a text with its own attention: ids (tokens,) or embeddings (tokens, hidden).

    The floor is the larger of two deviations from them: with another attention, and with the text as the first part of a
    longer one in a batch of two; but not below the precision of the dtype."""
    text = _trial(hf) if text is None else text
    at = torch.arange(len(text)) if positions is None else positions
    longer = torch.cat([text, text[:LONGER]]), torch.cat([at, at[-1] + 1 + torch.arange(len(text[:LONGER]))])
    kind = hf.config._attn_implementation
    if kind == NAME:  # it was wrapped before
        kind = "sdpa" if getattr(hf, "_supports_sdpa", True) else "eager"
    logits = _logits(hf, kind, text[None], at)
    others = [_logits(hf, kind, torch.stack([longer[0], longer[0].flip(0)]), longer[1])[: len(text)]]
    with suppress(ValueError, ImportError, NotImplementedError):  # a model may have one attention only
        others.append(_logits(hf, "sdpa" if kind == "eager" else "eager", text[None], at))
    return Own(logits, max(torch.finfo(hf.dtype).eps, *(deviation(o, logits) for o in others)))


def _logits(hf: Any, kind: str, batch: Tensor, at: Tensor) -> Tensor:
    """Logits of a batch's first text, (tokens, vocab) float32."""
    name = "inputs_embeds" if batch.is_floating_point() else "input_ids"
    with _attending(hf, kind):
        places = at.expand(len(batch), -1).to(hf.device)
        logits = hf(**{name: batch.to(hf.device)}, position_ids=places, use_cache=False).logits
    return torch.as_tensor(logits[0]).float()


@contextmanager
def _attending(hf: Any, kind: str) -> Iterator[None]:
    before = hf.config._attn_implementation
    hf.set_attn_implementation(kind)
    try:
        yield
    finally:
        hf.set_attn_implementation(before)


def check(model: Model, own: Own) -> None:
    """Raise ModelError unless encoding, moving, recomputing in part and decoding give the model's own logits."""
    name = model.hf.config.model_type
    if not own.floor <= NOISIEST:  # NaN too
        raise ModelError(
            f"{name} is refused: two of its own ways to compute a text differ by {own.floor:.0%}, so nothing can be proved "
            f"in {str(model.shape.dtype).removeprefix('torch.')}. Try float32."
        )
    try:
        logits, at = _reused(model, _trial(model.hf))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError) as error:
        raise ModelError(
            f"{name} is refused: it does not run on a cache of keys and values per head ({error})."
        ) from error
    worst = deviation(logits, own.logits[at.to(own.logits.device)])
    if not worst <= tolerance(own.floor):
        raise ModelError(
            f"{name} is refused: with a document moved by {AWAY} positions its logits are off by {worst:.2%} "
            f"(its own noise: {own.floor:.2%}). Its positions or its attention are not those of a standard rotary decoder."
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
