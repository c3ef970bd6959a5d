"""Shorter texts before they are tokenised: LLMLingua-2 through the `llmlingua` package."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

from kvilt.errors import MissingExtra, ModelError, SpecError
from kvilt.types import digest_of

FAMILIES = {"bert": "bert-base-multilingual-cased", "xlm-roberta": "xlm-roberta-large"}  # what the package calls them
logger = logging.getLogger("kvilt")
REMEMBERED = 4096  # texts: an answer needs its documents' short texts again, to know their addresses


@dataclass(frozen=True, repr=False)
class LLMLingua2:
    """Keeps the share `rate` of a text's words, those its classifier finds most worth keeping (arXiv 2403.12968).

    `model` is a folder or hub name of a BERT or XLM-RoBERTa token classifier; words of `force` (joined by "|", "\\n" is a
    line end) and with `digits` all numbers stay. The rate is counted in the classifier's tokens."""

    kind: ClassVar[str] = "text"
    rate: float = 0.5
    model: str = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank"
    force: str = "\\n|?"
    digits: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise SpecError(f"option rate wants a share above 0 and up to 1, not {self.rate}.")
        if importlib.util.find_spec("llmlingua") is None:
            raise MissingExtra("llmlingua", "llmlingua")

    def __repr__(self) -> str:
        """What shapes the text: the classifier's digest, wherever it lies."""
        digest = self._classifier().digest
        return f"LLMLingua2(rate={self.rate}, force={self.force!r}, digits={self.digits}, classifier={digest[:32]})"

    def shorten(self, text: str) -> str:
        """The text with fewer words; as it is if nothing would be left. Raises ModelError."""
        return text if self.rate == 1 else _shortened(self, text)

    def _classifier(self) -> Classifier:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return _load(self.model, auto if self.device == "auto" else self.device)

    def compress(self, text: str) -> str:
        """What the package makes of a text."""
        found = self._classifier()
        force = [token.replace("\\n", "\n") for token in self.force.strip("[]").split("|") if token]
        with found.lock, torch.no_grad(), _seeds_kept():
            made = found.package.compress_prompt_llmlingua2(
                [text], rate=self.rate, force_tokens=force, force_reserve_digit=self.digits
            )
        return str(made["compressed_prompt"])


@functools.lru_cache(maxsize=REMEMBERED)
def _shortened(how: LLMLingua2, text: str) -> str:
    try:
        short = how.compress(text)
    except (IndexError, ValueError) as error:  # of the package, for a part in which its tokenizer knows no word
        logger.warning("not shortened: %r...: %s", text[:40], error)
        return text
    return short if short.strip() else text


@dataclass(frozen=True, eq=False)
class Classifier:
    """A loaded classifier in the package's hands."""

    package: Any
    digest: str  # of weights and vocabulary
    lock: threading.Lock = field(default_factory=threading.Lock)


@functools.lru_cache(maxsize=2)
def _load(name: str, device: str) -> Classifier:
    import llmlingua
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
        if kind not in FAMILIES:
            raise ValueError(f"it is of type {kind}, the package reads {', '.join(FAMILIES)}")
        package = llmlingua.PromptCompressor.__new__(llmlingua.PromptCompressor)
        package.load_model(name, device, {"trust_remote_code": False})
    except (OSError, ValueError) as error:
        raise ModelError(f"llmlingua2: the classifier {name} cannot be loaded: {error}.") from error
    weights = sorted(package.model.state_dict().items())
    vocabulary = str(sorted(package.tokenizer.get_vocab().items()))
    digest = digest_of(vocabulary, *(part for key, value in weights for part in (key, value)))
    # Its own __init__ would download GPT's tokenizer to count with, and takes nothing but the published names.
    package.model_name, package.oai_tokenizer = FAMILIES[kind], SimpleNamespace(encode=package.tokenizer.tokenize)
    with _seeds_kept():
        package.init_llmlingua2()
    return Classifier(package, digest)


@contextmanager
def _seeds_kept() -> Iterator[None]:
    """Undo what the package does to everybody's random numbers: it sets all seeds, and draws from them."""
    cudnn, python, array = torch.backends.cudnn, random.getstate(), np.random.get_state()
    flags, hashing = (cudnn.deterministic, cudnn.benchmark), os.environ.get("PYTHONHASHSEED")
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
            cudnn.deterministic, cudnn.benchmark = flags
            os.environ.pop("PYTHONHASHSEED", None)
            os.environ.update({"PYTHONHASHSEED": hashing} if hashing is not None else {})
