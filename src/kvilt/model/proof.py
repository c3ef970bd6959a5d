"""What a model must show when it is loaded: that moving its keys and reusing them changes nothing.

Config fields name the architectures that are known to be unfit; this finds the others, whatever their config says."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from kvilt import __version__
from kvilt.errors import ModelError
from kvilt.model.model import Model
from kvilt.plan import Layout
from kvilt.types import DocumentCache, Encoding, Prompt

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # on logits, relative to their largest
LENGTH, ENCODED, AWAY = 8, 5, 9  # tokens of the trial, those encoded as a document, and how far it is moved


def facts(hf: Any) -> str:
    """What a passed trial holds for, beside the model's files."""
    return f"{__version__} {transformers.__version__} {torch.__version__} {hf.device.type} {hf.dtype}"


@torch.no_grad()
def own_logits(hf: Any) -> Tensor:
    """Last logits of a short text with the model's own attention, at the positions it likes best. (vocab,) float32."""
    ids = _ids(hf.config.vocab_size)[None].to(hf.device)
    return torch.as_tensor(hf(input_ids=ids, use_cache=False).logits[0, -1]).float()


@torch.no_grad()
def check(model: Model, own: Tensor) -> None:
    """Raise ModelError unless encoding, moving, running a plan and decoding give the model's own logits."""
    name, ids = model.hf.config.model_type, _ids(model.hf.config.vocab_size)
    try:
        found = _reused(model, ids)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError) as error:
        raise ModelError(
            f"{name} is refused: it does not run on a cache of keys and values per head ({error})."
        ) from error
    worst = float((found - own).abs().max()) / (float(own.abs().max()) or 1.0)
    if not worst <= 10 * TOLERANCE.get(model.shape.dtype, 1e-1):  # a NaN is refused, too
        raise ModelError(
            f"{name} is refused: with a document moved by {AWAY} positions its logits are off by {worst:.1%}. "
            "Its positions or its attention are not those of a standard rotary decoder."
        )


def _reused(model: Model, ids: Tensor) -> Tensor:
    """The same logits through a document cache that was moved, one pass over a plan, and one decoding step."""
    cache = model.encode([ids[:ENCODED]], Encoding())[0]
    none = torch.zeros(0, dtype=torch.long)
    nothing = DocumentCache(none, none, 0, cache.key)
    layout = Layout(Prompt(nothing, (cache,), ids[ENCODED:-1])).reuse(cache, at=AWAY)
    with model.run(layout.ask().plan(), room=1) as run:
        logits = run.step(ids[-1:][None].to(model.shape.device))[0]
    model.pool.clear()
    return logits


def _ids(vocabulary: int) -> Tensor:
    """A few different ids, none of them special in any usual tokenizer."""
    return (torch.arange(1, LENGTH + 1) * 7919) % vocabulary
