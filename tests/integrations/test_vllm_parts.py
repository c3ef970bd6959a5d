"""What Kvilt brings to vLLM, as far as it can be tested where vLLM is not installed; tests/vllm has the rest."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import core_kit as kit
import zoo
from kvilt.engine.engine import Engine
from kvilt.errors import PromptError, SpecError, UserError
from kvilt.integrations.vllm import encoding, launch
from kvilt.integrations.vllm.deployment import Checkpoint, Deployment, Settings, skeleton
from kvilt.integrations.vllm.index import Index, Watcher
from kvilt.integrations.vllm.loading import Load, Loader
from kvilt.integrations.vllm.plans import Piece, place
from kvilt.integrations.vllm.prompts import Prompts, Unknown
from kvilt.model import fit
from kvilt.model.rope import rotation_of
from kvilt.plan import ContextScaling, Plan
from kvilt.rows.rows import TensorRows
from kvilt.types import Document, DocumentCache

# ------------------------------------------------------------------------------------------------------------- plans


def cache(length: int, seed: int, keep: float = 1.0) -> DocumentCache:
    """A document of random ids, some of whose rows a press has dropped."""
    made = torch.Generator().manual_seed(seed)
    offsets = (torch.rand(length, generator=made) < keep).nonzero()[:, 0].tolist()
    return kit.fake(kit.ids(length, seed).tolist(), offsets)


def seen(plan: Plan) -> dict[tuple[int, int], set[tuple[int, int]]]:
    """For each computed row, named by segment and place, the rows that it sees under the plan."""
    names = [(i, int(p)) for i, s in enumerate(plan.segments) for p in s.places]
    visible = plan.visible()
    return {
        names[int(row)]: {names[n] for n in visible[i].nonzero()[:, 0].tolist()}
        for i, row in enumerate(plan.computed_rows)
    }


def served(plan: Plan) -> dict[tuple[int, int], set[tuple[int, int]]]:
    """The same as vLLM runs it: every slot up to its own, what is loaded and what is computed before."""
    placed, keys = place(plan, 1.0), {id(s.cache.key): i for i, s in enumerate(plan.segments) if s.cache is not None}
    shift = plan.end - 1 - (len(placed.tokens) - 1)
    slots: dict[int, tuple[int, int]] = {}
    for p in placed.pieces:
        segment = plan.segments[keys[id(p.key)]]
        assert p.base == segment.start - shift
        slots |= {p.slot + n: (keys[id(p.key)], int(segment.cache.offsets[p.first + n])) for n in range(p.count)}  # type: ignore[union-attr]
    holes = [slot for a, b in [*placed.holes, (placed.tail, len(placed.tokens))] for slot in range(a, b)]
    assert sorted([*slots, *holes]) == list(range(len(placed.tokens)))
    at = {s.start + p: (i, p) for i, s in enumerate(plan.segments) for p in s.computed.nonzero()[:, 0].tolist()}
    slots |= {slot: at[slot + shift] for slot in holes}
    return {slots[slot]: {slots[other] for other in range(slot + 1)} for slot in holes}


@pytest.mark.parametrize("seed", range(20))
def test_slots_show_every_token_what_its_plan_shows(seed: int) -> None:
    """Danger: a computed token misses rows, or sees what comes after it."""
    made = torch.Generator().manual_seed(seed)
    layout = kit.layout(kit.ids(5, 99), *(documents := [cache(30 + 7 * i, seed + i) for i in range(3)]))
    layout.compute(kit.ids(int(torch.randint(0, 4, (), generator=made)), 50), name="head")
    for n, document in enumerate(documents):
        layout.reuse(document, torch.rand(document.length, generator=made) < (0.2 if n else 0.0))
        layout.compute(kit.ids(n, 60 + n), name="links")
    plan = layout.ask().plan()
    assert served(plan) == seen(plan)


@pytest.mark.parametrize("side_by_side", [True, False])
def test_gaps_and_shared_positions_are_served_where_nothing_stands_between(side_by_side: bool) -> None:
    """Danger: pruned documents, reserved intervals or documents side by side are placed as if they were not."""
    documents = [cache(40, 1, 0.4), cache(25, 2), cache(60, 3, 0.7)]
    layout = kit.layout(kit.ids(6, 9), *documents)
    for n, document in enumerate(documents):
        layout.reuse(document, at=10 if side_by_side else 100 * n)
    plan = layout.ask().plan()
    assert served(plan) == seen(plan)
    placed = place(plan, 1.0)
    assert len(placed.tokens) == len(plan.positions)
    assert len(placed.pieces) == len(documents)


def test_what_vllm_cannot_run_is_refused() -> None:
    """Danger: links between pruned documents, weighed or mixed rows are served as something else."""
    first, second = cache(40, 1, 0.4), cache(25, 2)
    linked = kit.layout(kit.ids(3), first).reuse(second).compute(kit.ids(2)).reuse(first).ask().plan()
    weighed = kit.layout(kit.ids(3), first).reuse(first).ask().plan(context=ContextScaling(0.8, 0.9))
    mixed = dataclasses.replace(kit.layout(kit.ids(3), second).reuse(second).ask().plan(), blend=0.5)
    for plan in (linked, weighed, mixed):
        with pytest.raises(PromptError, match="vLLM"):
            place(plan, 1.0)


def test_one_token_at_least_is_left_to_vllm() -> None:
    """Danger: a prompt that is reused to its last token ends vLLM's engine."""
    document = cache(20, 1)
    placed = place(kit.layout(kit.ids(0), document).reuse(document).plan(), 1.0)
    assert placed.tail == 19
    assert placed.reused() == 19
    learned = kit.fake([-1] * 4)
    with pytest.raises(PromptError, match="learned"):
        place(kit.layout(kit.ids(0), learned).reuse(learned).plan(), 1.0)


def test_learned_vectors_are_computed_in_holes_and_reused_as_placeholders() -> None:
    """Danger: a vector's row is computed from the embedding of whatever id stands there."""
    document, vectors = kit.fake([-1, -2, 80, 81, 82, -3]), torch.randn(5, 8)
    plan = kit.layout(kit.ids(3), document).reuse(document).compute(torch.tensor([-4, -5])).ask().plan(learned=vectors)
    placed = place(plan, 1.0)
    assert placed.holes == ((6, 8),)
    assert placed.tail == 8
    assert placed.tokens[:6] == (0, 0, 80, 81, 82, 0)
    assert placed.soft is not None
    embeddings, ordinary = placed.soft.among(6, 8) or (torch.zeros(0), [])
    assert torch.equal(embeddings[6:8], vectors[3:])
    assert ordinary == [True] * 6 + [False] * 2 + [True]
    assert placed.soft.among(0, 6) is None


def test_the_fingerprint_names_everything_that_shapes_the_rows() -> None:
    """Danger: two plans over the same tokens share vLLM's blocks."""
    document, other = cache(30, 1), cache(30, 1, 0.99)
    fresh = torch.arange(30) < 4
    plans = [
        kit.layout(kit.ids(3), document).reuse(document, f, at=at).ask().plan()
        for f, at in ((None, None), (fresh, None), (None, 7))
    ]
    plans.append(kit.layout(kit.ids(3), other).reuse(dataclasses.replace(document, key=other.key)).ask().plan())
    assert len({place(plan, 1.0).fingerprint for plan in plans[:3]}) == 3
    assert place(plans[0], 1.0).fingerprint == place(plans[0], 1.0).fingerprint


# ------------------------------------------------------------------------------------------------------------- index


def indexed(*documents: Tensor, namespace: str = "shared") -> Index:
    """An index of documents."""
    index = Index()
    for n, ids in enumerate(documents):
        index.add(kit.make_key(ids, namespace=namespace), ids, f"title {n}")
    return index


def test_documents_are_found_wherever_they_stand() -> None:
    """Danger: a client that sends no documents of ours gets no reuse, or somebody else's."""
    one, two = kit.ids(40, 1), kit.ids(25, 2)
    index = indexed(one, two)
    prompt = torch.cat([kit.ids(7, 3), two, one, kit.ids(3, 4), two, kit.ids(9, 5)]).tolist()
    found = [(m.start, m.end, m.title) for m in index.matches(prompt, "shared")]
    assert found == [(7, 32, "title 1"), (32, 72, "title 0"), (75, 100, "title 1")]
    assert not index.matches(prompt, "other")
    assert not index.matches(one[:-1].tolist(), "shared")
    changed = one.clone()
    changed[20] += 1
    assert not index.matches(changed.tolist(), "shared")


def test_the_longest_document_at_a_place_is_taken() -> None:
    """Danger: of two documents that begin alike the wrong half is reused."""
    long = kit.ids(60, 1)
    index = indexed(long[:30], long)
    assert [(m.start, m.end) for m in index.matches(long.tolist(), "shared")] == [(0, 60)]
    assert [(m.start, m.end) for m in index.matches(long[:45].tolist(), "shared")] == [(0, 30)]
    index.remove(kit.make_key(long).digest)
    assert [(m.start, m.end) for m in index.matches(long.tolist(), "shared")] == [(0, 30)]


def test_short_and_foreign_documents_are_never_matched() -> None:
    """Danger: three tokens that occur everywhere, or a text that was shortened, are taken for a document."""
    short, long = kit.ids(5, 1), kit.ids(20, 2)
    index = Index()
    index.add(kit.make_key(short), short, "")
    index.add(kit.make_key(long), long[:18], "its text was shortened")
    assert not index.matches(torch.cat([short, long]).tolist(), "shared")
    assert len(index) == 2


def test_a_watcher_follows_its_store(model_dir: Path, tmp_path: Path) -> None:
    """Danger: documents that were stored or deleted meanwhile are never noticed."""
    engine = Engine.load(str(model_dir), "turborag", f"disk:path={tmp_path}", dtype="float32")
    deployment = Deployment(str(model_dir), zoo.tokenizer(), Settings(f"disk:path={tmp_path}", "turborag"))
    watcher = Watcher(deployment, index := Index())
    watcher.look()
    assert not len(index)
    engine.encode(kit.DOCUMENTS)
    watcher.look()
    prompt = torch.cat([engine.text.document_ids(d) for d in kit.DOCUMENTS])
    assert len(index.matches(prompt.tolist(), "shared")) == len(kit.DOCUMENTS)  # markers stand in no prompt
    engine.store.delete(engine.encoder.items(kit.DOCUMENTS)[0].key.digest)
    watcher.look()
    assert len(index.matches(prompt.tolist(), "shared")) == len(kit.DOCUMENTS) - 1


# ------------------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_checkpoint_is_known_without_its_weights(family: str) -> None:
    """Danger: vLLM's processes rotate otherwise than the model, or charge other costs."""
    hf = zoo.hf_model(family)
    bones = skeleton(hf.config)
    assert all(p.is_meta for p in bones.parameters())
    ours, theirs = rotation_of(bones), rotation_of(hf)
    assert torch.equal(ours.inv_freq, theirs.inv_freq)
    assert (ours.interleaved, ours.scaling) == (theirs.interleaved, theirs.scaling)
    assert fit.costs(bones) == pytest.approx(fit.costs(hf))


@pytest.mark.parametrize("spec", ["block", "block:sink=system", "kvlink:links=2", "turborag", "block:sink=4"])
@pytest.mark.parametrize("compress", ["", "int8", "keydiff:keep=0.5"])
def test_both_sides_name_documents_alike(model_dir: Path, spec: str, compress: str) -> None:
    """Danger: what `kvilt encode` stored, vLLM never finds."""
    engine = Engine.load(str(model_dir), spec, "memory", dtype="float32", compress=compress, namespace="a")
    deployment = Deployment(str(model_dir), zoo.tokenizer(), Settings("memory", spec, compress, "a"))
    prompts = Prompts(deployment, zoo.tokenizer())
    asked = prompts.asked([{"role": "user", "content": kit.QUESTION}], list(kit.DOCUMENTS), "a")
    items = engine.encoder.items(kit.DOCUMENTS)
    assert [w.key for w in asked.wanted] == [item.key for item in items]
    parts = [engine.text.system_ids(), *(i.ids for i in items), engine.text.question_ids(kit.QUESTION)]
    assert asked.ids == torch.cat(parts).tolist()
    assert [asked.ids[a:b] for a, b, *_ in asked.places] == [i.ids.tolist() for i in items]


@pytest.mark.parametrize("spec", ["full", "cacheblend", "a3", "prophetkv", "infoflow", "sam_kv", "ape"])
def test_strategies_that_need_the_model_are_refused_at_the_start(model_dir: Path, spec: str) -> None:
    """Danger: a server that starts, and then serves something else."""
    with pytest.raises(SpecError, match=spec):
        Deployment(str(model_dir), zoo.tokenizer(), Settings("memory", spec))
    with pytest.raises(SpecError, match="unknown"):
        Settings.of({"stor": "disk"})


# ------------------------------------------------------------------------------------------------------------- prompts


@pytest.fixture
def prompts(model_dir: Path, tmp_path: Path) -> Prompts:
    """Prompts of a server whose store holds the usual documents."""
    store = f"disk:path={tmp_path / 'store'}"
    Engine.load(str(model_dir), "block", store, dtype="float32").encode(kit.DOCUMENTS)
    return Prompts(Deployment(str(model_dir), zoo.tokenizer(), Settings(store, "block")), zoo.tokenizer())


def test_documents_are_named_by_id_within_their_namespace(prompts: Prompts) -> None:
    """Danger: an id guessed, or of another tenant, puts a foreign text into a prompt."""
    user = [{"role": "user", "content": kit.QUESTION}]
    by_text = prompts.asked(user, list(kit.DOCUMENTS), "shared")
    ids = [w.key.digest for w in by_text.wanted]
    by_id = prompts.asked(user, [{"id": i} for i in ids], "shared")
    assert by_id.ids == by_text.ids
    for bad, namespace in ((ids[0], "tenant"), ("0" * 64, "shared"), ("../x", "shared"), (ids[0].upper(), "shared")):
        with pytest.raises(Unknown) as error:
            prompts.asked(user, [{"id": bad}], namespace)
        assert error.value.ids == (bad,)


def test_chats_keep_their_documents_in_front(prompts: Prompts) -> None:
    """Danger: a conversation that goes on moves its documents, and reads other words than its client wrote."""
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "One?"}]
    first = prompts.asked(said, list(kit.DOCUMENTS[:2]), "shared")
    more = [
        *said,
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": [{"type": "text", "text": "Three?"}]},
    ]
    then = prompts.asked(more, list(kit.DOCUMENTS[:2]), "shared")
    assert then.places == first.places
    text = prompts.text.tokenizer.decode(then.ids)
    assert (
        text.index("Be kind.") < text.index("Ada Lorn") < text.index("One?") < text.index("Two.") < text.index("Three?")
    )
    assert first.system == "Be kind."


BAD_CHATS: list[Any] = [
    [],
    [{"role": "system", "content": "x"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": [{"type": "image_url"}]}],
    [{"role": "nobody", "content": "x"}, {"role": "user", "content": "x"}],
]


@pytest.mark.parametrize("messages", BAD_CHATS)
def test_chats_that_cannot_carry_documents_are_refused(prompts: Prompts, messages: list[Mapping[str, Any]]) -> None:
    """Danger: a traceback instead of one line."""
    with pytest.raises(PromptError):
        prompts.asked(messages, list(kit.DOCUMENTS), "shared")


# ------------------------------------------------------------------------------------------------------------- loading


class Layer:
    """An attention layer as vLLM has it, as far as the loader sees it."""

    def __init__(self, slots: int, heads: int, dim: int, device: str = "cpu") -> None:
        self.kv_cache = torch.zeros(2, slots, heads, dim, device=device)
        self.impl = self

    def do_kv_cache_update(self, layer: Layer, keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
        """Write rows (rows, heads, head_dim) into their slots; those below 0 nowhere."""
        there = slots >= 0
        cache[0, slots[there]], cache[1, slots[there]] = keys[there].to(cache), values[there].to(cache)


@dataclasses.dataclass
class Held:
    """A store of a few caches."""

    caches: list[DocumentCache]
    aside: list[str] = dataclasses.field(default_factory=list)

    def get_many(self, keys: list[Any]) -> list[DocumentCache | None]:
        return [next((c for c in self.caches if c.key == key), None) for key in keys]

    def set_aside(self, digest: str, reason: str) -> None:
        self.aside.append(digest)


def held(length: int, seed: int) -> DocumentCache:
    """A document of 3 layers and 4 heads with random rows."""
    document = kit.fake(kit.ids(length, seed).tolist())
    rows = torch.randn(3, 2, 4, length, 8, generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(document, rows=TensorRows(rows))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2), (3, 8)])
def test_rows_arrive_rotated_in_their_slots(device: str, rank: int, ranks: int) -> None:
    """Danger: rows of another layer, head or place; a gap that shifts; a block that belongs to somebody else."""
    one, two, rotation = held(20, 1), held(9, 2), zoo.model_of("llama").rotation
    rotation = type(rotation)(torch.tensor([1.0, 0.1, 0.01, 0.001]))
    loader = Loader(Held([one, two]), rotation, torch.float32, 4, rank, ranks)  # type: ignore[arg-type]
    blocks = (7, 2, 9, 4, 0, 11, 3)
    pieces = (Piece(one.key, 3, 10, 1, -2), Piece(two.key, 0, 9, 13, 30), Piece(one.key, 15, 2, 24, -2))
    heads = slice(0, 4) if ranks == 1 else slice(2, 4) if ranks == 2 else slice(1, 2)
    count = len(range(4)[heads])
    layers = {f"model.layers.{i}.attn": Layer(48, count, 8, device) for i in (2, 0, 1)}
    loader.start([Load("r", pieces, blocks)], {**layers, "model.norm": object()})
    for name in layers:
        loader.wait(name)
    done = loader.finish()
    assert done is not None
    assert not done.failed
    assert done.sizes["r"] > 0
    for i in range(3):
        written, wanted = layers[f"model.layers.{i}.attn"].kv_cache.cpu(), torch.zeros(2, 48, count, 8)
        for piece, document in zip(pieces, (one, two, one), strict=True):
            assert isinstance(document.rows, TensorRows)
            for n in range(piece.count):
                slot, row = piece.slot + n, piece.first + n
                at = blocks[slot // 4] * 4 + slot % 4
                keys, values = document.rows.data[i, :, heads, row]
                position = piece.base + row
                cos, sin = rotation.angles(torch.tensor([abs(position)]))
                sin = sin if position >= 0 else -sin
                wanted[0, at], wanted[1, at] = rotation.rotate(keys[:, None], (cos, sin))[:, 0], values
        assert torch.allclose(written, wanted, atol=1e-6)


def test_a_document_that_is_gone_fails_its_blocks_alone() -> None:
    """Danger: one lost or broken document takes the step, or its neighbours, with it."""
    good, bad, gone = held(8, 1), held(8, 2), held(8, 3)
    store = Held([good, kit.watched(bad, _break)])
    loader = Loader(store, type(zoo.model_of("llama").rotation)(torch.ones(4)), torch.float32, 4)  # type: ignore[arg-type]
    layer = {"layers.0.attn": Layer(40, 4, 8), "layers.1.attn": Layer(40, 4, 8), "layers.2.attn": Layer(40, 4, 8)}
    pieces = tuple(Piece(c.key, 0, 8, 8 * n, 8 * n) for n, c in enumerate((good, bad, gone)))
    loader.start([Load("r", pieces, tuple(range(6)))], layer)
    done = loader.finish()
    assert done is not None
    assert done.failed == {2, 3, 4, 5}
    assert done.bad == {bad.key.digest, gone.key.digest}
    assert not layer["layers.2.attn"].kv_cache[:, 8:].any()
    assert layer["layers.2.attn"].kv_cache[:, :8].any()


def _break(layers: range) -> None:
    if layers.stop > 2:
        raise OSError("the disk is gone")


# --------------------------------------------------------------------------------------------- starting and encoding


def test_the_line_that_starts_vllm(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: a server that starts without the connector, the scheduler, the routes or the embeddings it needs."""
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    settings = Settings(f"disk:path={tmp_path}", "epic:tokens=4", encode=True)
    line, environment = launch.command(str(model_dir), settings, ["--port", "8001"])
    assert environment == {"VLLM_PLUGINS": "other,kvilt"}
    transfer = json.loads(line[line.index("--kv-transfer-config") + 1])
    assert Settings.of(transfer["kv_connector_extra_config"]) == settings
    assert line[-2:] == ["--port", "8001"]
    assert "--enable-prompt-embeds" not in line
    assert launch.shown(["a b"], {"X": "c d"}) == "X='c d' 'a b'"
    wrapper = kit.wrapper_file(tmp_path, links=2)
    linked = dataclasses.replace(settings, strategy=f"linked_packet:wrapper={wrapper}")
    assert "--enable-prompt-embeds" in launch.command(str(model_dir), linked)[0]
    with pytest.raises(UserError, match="memory"):
        launch.command(str(model_dir), Settings("memory"))
    with pytest.raises(UserError, match="adapter over another model"):
        launch.command("smollm2-qa", settings)


def test_the_child_encodes_what_it_is_given(model_dir: Path, tmp_path: Path) -> None:
    """Danger: a document that cannot be encoded ends the child; one behind another system text gets the wrong key."""
    settings = Settings(f"disk:path={tmp_path}", "block:sink=system")
    jobs = [
        {"document": {"text": d.text, "title": d.title, "id": None}, "system": system, "namespace": "a"}
        for d, system in [(kit.DOCUMENTS[0], None), (kit.DOCUMENTS[1], "Be kind."), (Document("x" * 9000), None)]
    ]
    answers = io.StringIO()
    encoding.work(str(model_dir), settings, [json.dumps(jobs), json.dumps(jobs[:1])], answers)
    problems = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert [len(p) for p in problems] == [1, 0]
    prompts = Prompts(Deployment(str(model_dir), zoo.tokenizer(), settings), zoo.tokenizer())
    for system, document in ((None, kit.DOCUMENTS[0]), ("Be kind.", kit.DOCUMENTS[1])):
        (wanted,) = prompts.alone([document], system, "a")
        assert prompts.deployment.store.contains([wanted.key.digest])


def test_the_queue_is_bounded_and_takes_every_document_once(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Danger: a flood of new documents fills the memory; the same one is encoded by each of its readers."""
    monkeypatch.setattr(encoding, "QUEUED", 2)
    monkeypatch.setattr(encoding.Background, "_run", lambda self: None)
    background = encoding.Background(str(model_dir), Settings(f"disk:path={tmp_path}"))
    prompts = Prompts(Deployment(str(model_dir), zoo.tokenizer(), background.settings), zoo.tokenizer())
    wanted = prompts.alone(list(kit.DOCUMENTS), None, "shared")
    background.add(wanted[:1], None)
    background.add(wanted[:1], None)
    with pytest.raises(encoding.QueueFull):
        background.add(wanted, None)
    background.add(wanted, None, some=True)
    assert list(background._jobs) == [w.key.digest for w in wanted[:2]]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def test_a_checkpoint_says_what_it_is_not(tmp_path: Path) -> None:
    """Danger: a traceback for a folder without a model."""
    with pytest.raises(UserError):
        Checkpoint(str(tmp_path / "nothing"))
