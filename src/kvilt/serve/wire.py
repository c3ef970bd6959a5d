"""What requests may say. Decoded strictly: a wrong type is refused with the place where it stands, what is not served by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from kvilt.errors import UserError, did_you_mean

Stop: TypeAlias = str | Annotated[list[str], Meta(max_length=16)] | None
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)] | None
Count: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 31)] | None
Ids: TypeAlias = Annotated[list[str | dict[str, Any]], Meta(max_length=4096)]

# Fields of OpenAI's clients that change nothing here.
HARMLESS = """
user metadata store service_tier prompt_cache_key prompt_cache_retention safety_identifier parallel_tool_calls
reasoning_effort verbosity include skip_special_tokens spaces_between_special_tokens include_stop_str_in_output truncation
add_generation_prompt best_of
""".split()  # noqa: SIM905
# Fields that may be said as long as they ask for nothing.
NOTHING: dict[str, tuple[Any, ...]] = dict.fromkeys(("frequency_penalty", "presence_penalty", "top_logprobs"), (0,))
NOTHING |= dict.fromkeys(("echo", "background"), (False,))
NOTHING |= {"n": (1,), "logprobs": (False, 0), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto")}
NOTHING |= {"suffix": ("",), "modalities": (["text"],), "response_format": ({"type": "text"},)}
NOTHING |= {"text": ({"format": {"type": "text"}},)}
NAMED = """
previous_response_id conversation prompt reasoning max_tool_calls audio prediction web_search_options functions
function_call moderation
""".split()  # noqa: SIM905


class Invalid(UserError):
    """A request that is not served: `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Refused(UserError):
    """A request that gets this status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Ours(Struct, forbid_unknown_fields=True):
    """Kvilt's own options of a request."""

    strategy: str | None = None
    deadline: Annotated[float, Meta(gt=0, le=86400)] | None = None  # seconds
    encode: bool = True  # documents that are missing are encoded before the answer; else they are computed in it


class StreamOptions(Struct):
    """What a stream tells besides the text."""

    include_usage: bool | None = False


class Message(Struct):
    """One message of a chat."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    type: str = "message"


class Asked(Struct, kw_only=True):
    """What every request for an answer may say."""

    model: str | None = None
    documents: Ids | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop = None
    max_tokens: Count = None
    max_completion_tokens: Count = None
    max_output_tokens: Count = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    min_p: Share = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    ignore_eos: bool | None = False
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    kvilt: Ours | UnsetType = UNSET

    @property
    def limit(self) -> int | None:
        """Tokens of the answer."""
        return self.max_output_tokens or self.max_completion_tokens or self.max_tokens


class Chat(Asked, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]


class Completion(Asked, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[str | int]
    max_tokens: Count = 16


class Respond(Asked, kw_only=True):
    """The body of /v1/responses."""

    input: str | Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    instructions: str | None = None


class Added(Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/documents."""

    documents: Ids
    system: str | None = None
    wait: bool = False  # answer when they are encoded
    kvilt: Ours | UnsetType = UNSET


T = TypeVar("T", bound=Struct)


def decode(body: bytes, kind: type[T]) -> T:
    """A body as one of the structs above. Raises Invalid."""
    try:
        raw = msgspec.json.decode(body)
        made = msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        raise Invalid(f"{place.rstrip('`').lstrip('.') or 'body'}: {message}", place.rstrip("`").lstrip(".")) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        told = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Invalid(f"the body is not JSON: {told}.") from error
    if issubclass(kind, Asked):
        _check(raw, {field.encode_name for field in msgspec.structs.fields(kind)})
    return made


def _check(raw: dict[str, Any], served: Iterable[str]) -> None:
    """Refuse fields that ask for something this server does not do."""
    for name, value in raw.items():
        if name in served or name in HARMLESS or value is None:
            continue
        if name in NOTHING or name in NAMED:
            if value not in NOTHING.get(name, ()):
                raise Invalid(f"{name}={value!r:.60} is not served here; vLLM with Kvilt's plugin may.", name)
            continue
        raise Invalid(f"unknown field {name!r:.60}.{did_you_mean(name, [*served, *NOTHING])}", name)


def stops(stop: Stop) -> list[str]:
    """Stop strings as a list. Raises Invalid."""
    made = [stop] if isinstance(stop, str) else list(stop or ())
    if not all(made):
        raise Invalid("a stop string is empty.", "stop")
    return made
