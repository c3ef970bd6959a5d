"""Learned vectors as files: what was trained is what is loaded, and nothing else is."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import zoo
from core_kit import DOCUMENTS, QUESTION, engine_of, wrapper_file
from kvilt.errors import SpecError, WrapperError
from kvilt.strategies.wrapper import Wrapper


def made(links: bool = False, width: int = 64) -> Wrapper:
    parts = [torch.randn(n, width) for n in (3, 2, 4)]
    return Wrapper(parts[0], parts[1], links=parts[2] if links else None, metadata={"layout": "tail"})


@pytest.mark.parametrize("links", [False, True])
def test_what_is_saved_is_loaded(tmp_path: Path, links: bool) -> None:
    """Danger: vectors are rounded, swapped or lose the model they belong to."""
    before = Wrapper(**{**vars(made(links)), "model": "abc"})
    before.save(tmp_path / "w.safetensors")
    after = Wrapper.load(tmp_path / "w.safetensors")
    assert torch.equal(after.header, before.header)
    assert torch.equal(after.trailer, before.trailer)
    assert (after.links is None) == (not links)
    assert (after.model, after.metadata) == ("abc", {"layout": "tail"})


def test_ids_name_the_rows_of_one_table() -> None:
    """Danger: the trailer gets the header's vectors."""
    wrapper = made(links=True)
    encoding = wrapper.encoding()
    assert (encoding.before, encoding.after, encoding.keep) == ((-1, -2, -3), (-4, -5), True)
    assert wrapper.link_ids().tolist() == [-6, -7, -8, -9]
    assert encoding.learned is not None
    assert wrapper.links is not None
    assert torch.equal(encoding.learned[-1 - wrapper.link_ids()], wrapper.links)


def test_links_do_not_change_what_is_stored() -> None:
    """Danger: retraining links, which stand in no stored cache, throws every cache away; or trailers do not."""
    wrapper = made(links=True)
    other = Wrapper(wrapper.header, wrapper.trailer, links=torch.randn(4, 64))
    third = Wrapper(wrapper.header, wrapper.trailer + 1, links=wrapper.links)
    assert wrapper.encoding().digest == other.encoding().digest != third.encoding().digest


def test_a_wrapper_for_another_model_is_refused(tmp_path: Path) -> None:
    """Danger: vectors of another model are noise to this one, and the answers merely get worse."""
    with pytest.raises(WrapperError, match="64"):
        made(width=32).check(zoo.model_of("llama").info())
    mine = Wrapper(**{**vars(made()), "model": zoo.model_of("llama").digest})
    mine.check(zoo.model_of("llama").info())
    with pytest.raises(WrapperError, match="trained for weights"):
        mine.check(zoo.model_of("qwen2").info())
    mine.save(tmp_path / "w.safetensors")
    with pytest.raises(WrapperError, match="trained for weights"):
        engine_of(f"kv_packet:wrapper={tmp_path / 'w.safetensors'}", family="qwen2")


def test_files_that_are_no_wrappers_say_so(tmp_path: Path) -> None:
    """Danger: a traceback from a parser, or a half-read file that is used."""
    good = wrapper_file(tmp_path)
    cases = {
        "missing.safetensors": None,
        "cut.safetensors": good.read_bytes()[:-100],
        "text.safetensors": b"hello",
        "empty.safetensors": b"",
        "text.pt": b"hello",
    }
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(WrapperError, match=name.split(".")[0]):
            Wrapper.load(tmp_path / name)
    save_file({"header": torch.zeros(2, 4)}, tmp_path / "half.safetensors", {"format": "kvilt-wrapper-1"})
    save_file({"header": torch.zeros(2, 4), "trailer": torch.zeros(2, 4)}, tmp_path / "other.safetensors")
    nan = {"header": torch.full((2, 4), torch.nan), "trailer": torch.zeros(2, 4)}
    save_file(nan, tmp_path / "nan.safetensors", {"format": "kvilt-wrapper-1"})
    for name in ("half", "other", "nan"):
        with pytest.raises(WrapperError, match=name):
            Wrapper.load(tmp_path / f"{name}.safetensors")


def test_parts_of_different_width_are_refused(tmp_path: Path) -> None:
    """Danger: a header of this model and a trailer of another crash when a document is encoded, not when loaded."""
    parts = {"header": torch.zeros(2, 64), "trailer": torch.zeros(2, 32)}
    save_file(parts, tmp_path / "w.safetensors", {"format": "kvilt-wrapper-1"})
    with pytest.raises(WrapperError, match="width"):
        Wrapper.load(tmp_path / "w.safetensors")


def test_the_authors_files_load(tmp_path: Path) -> None:
    """Danger: published vectors, shipped as (1, vectors, hidden) in bfloat16, cannot be used."""
    state = {"header": torch.randn(1, 8, 64).bfloat16(), "trailer": torch.randn(1, 8, 64)}
    torch.save(state, tmp_path / "published.pt")
    wrapper = Wrapper.load(tmp_path / "published.pt")
    assert (wrapper.header.shape, wrapper.header.dtype, wrapper.model) == ((8, 64), torch.float32, "")
    assert torch.equal(wrapper.header, state["header"][0].float())
    torch.save({"something": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(WrapperError, match="something"):
        Wrapper.load(tmp_path / "other.pt")


def published(folder: Path, **more: object) -> Wrapper:
    """An authors' file with what it says of its model."""
    torch.save({"header": torch.randn(1, 8, 64), "trailer": torch.randn(1, 8, 64), **more}, folder / "published.pt")
    return Wrapper.load(folder / "published.pt")


@pytest.mark.parametrize("each", [False, True], ids=["for all channels", "for each channel"])
def test_the_authors_files_are_tied_to_their_model(tmp_path: Path, each: bool) -> None:
    """Danger U17: vectors of another model of the same width are taken, and every answer is nonsense."""
    model = zoo.model_of("llama")
    weight = model.hf.get_input_embeddings().weight.detach().float()
    own = (
        {"mean": weight.mean(0), "std": weight.std(0)} if each else {"mean": weight.mean(), "std": float(weight.std())}
    )
    wrapper = published(tmp_path, **own, train_config={"model_name": "meta-llama/Llama-3.1-8B-Instruct"})
    assert wrapper.check(model.info()) is wrapper
    assert torch.equal(copy.deepcopy(wrapper).header, wrapper.header)
    assert copy.deepcopy(wrapper).encoding().digest == wrapper.encoding().digest
    foreign = published(tmp_path, mean=0.0, std=0.013, train_config={"model_name": "meta-llama/Llama-3.1-8B-Instruct"})
    with pytest.raises(WrapperError, match=r"Llama-3\.1-8B-Instruct"):
        foreign.check(model.info())


def test_the_authors_files_that_do_not_say_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Danger U17: nobody is told that a file might belong to another model."""
    published(tmp_path).check(zoo.model_of("llama").info())
    assert "does not say which model" in caplog.text


def test_a_wrapper_file_runs_no_code(tmp_path: Path) -> None:
    """Danger: a downloaded `.pt` file is a pickle; loading it could do anything."""

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return (Path.write_text, (tmp_path / "owned", "yes"))  # type: ignore[return-value]

    torch.save({"header": Payload(), "trailer": torch.zeros(2, 4)}, tmp_path / "evil.pt")
    with pytest.raises(WrapperError, match="evil"):
        Wrapper.load(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def test_strategies_without_their_vectors_say_how_to_get_some(tmp_path: Path) -> None:
    """Danger: an untrained method answers as if it were trained."""
    with pytest.raises(SpecError, match="kvilt train packet"):
        engine_of("kv_packet")
    with pytest.raises(SpecError, match="kvilt train linked-packet"):
        engine_of("linked_packet")
    with pytest.raises(WrapperError, match="no link vectors"):
        engine_of(f"linked_packet:wrapper={wrapper_file(tmp_path)}")
    with_links = wrapper_file(tmp_path, links=4)
    assert engine_of(f"linked_packet:wrapper={with_links}").plan(QUESTION, DOCUMENTS).computed_tokens.min() < 0
    with pytest.raises(SpecError, match="layout"):
        engine_of(f"linked_packet:wrapper={with_links},layout=sideways")
