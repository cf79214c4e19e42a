"""Foreign weights as work directories, used and handed back."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import tiny_chameleon as tiny
from PIL import Image as Pillow

from cm3leon_jax import conversation, conversion, stages
from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data.documents import Document, Image, Text
from cm3leon_jax.interop import shards
from cm3leon_jax.interop.shards import Shards
from cm3leon_jax.sampling.engine import Precision
from cm3leon_jax.sampling.rerank import Rerank
from cm3leon_jax.sampling.sampler import Sampler
from cm3leon_jax.tokenizers.bytelevel import JsonTokenizer
from cm3leon_jax.training.checkpoint import leaf_names, load_model
from configs import chameleon_7b

WHY = "the extra `foreign` is not installed"
pytest.importorskip("tokenizers", reason=WHY)
save_file = pytest.importorskip("safetensors.numpy", reason=WHY).save_file

WHITE = np.full((20, 24, 3), 255, np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "anole"
    (tiny.write(path) / "tokenizer_config.json").write_text('{"sep_token": "x"}')
    return path


@pytest.fixture(scope="module")
def workdir(folder):
    path = folder.parent / "work"
    facts = conversion.import_chameleon(folder, path, tiny.config())
    assert facts["parameters"] == 36_256 and facts["text"] == 256, facts
    return path


@pytest.fixture(scope="module")
def model(workdir):
    return CM3Leon.load(workdir, batch=8)


# ------------------------------------------------------------------ use


def test_prompts_are_the_published_ones(model, monkeypatch):
    layout = model.layout
    h, i = layout.text_ids(model.codec.text.encode("hi"))
    (drawing,) = conversation.drawings(model.writer, ["hi"])
    bos, brk, turn = layout.bos, layout.brk, layout.turn
    full, *others = [ids.tolist() for ids in drawing.prompt.streams]
    assert full == [bos, h, i, turn, brk] and others == [[bos, brk]] * 2
    asked = []
    monkeypatch.setattr(
        model.writer, "tokens", lambda w, *_, **__: asked.extend(w) or ()
    )
    model.caption([WHITE])
    ((ids,),) = [prompt.streams for prompt in asked]
    question = layout.text_ids(model.codec.text.encode(conversation.QUESTION))
    assert ids[[0, 1, 18, -1]].tolist() == [bos, brk, layout.eoss, turn]
    assert np.isin(ids[2:18], layout.image).all()
    np.testing.assert_array_equal(ids[19:-1], question)
    with pytest.raises(ValueError, match="to go on after retrieved documents"):
        model.generate([Document((Text("hi"),))], retrieve=2)


def test_three_streams_guide_a_picture(model):
    """Greedy codes are those of u + 1.2 (image - u) + 3 (full - image), by the plain
    forward pass."""
    layout, limit = model.layout, model.decoder.config.length
    document = Document((Text("a"), Image(WHITE), Text("b")))
    (parts,) = conversation._parts(model.writer, [document])
    before = np.concatenate([[layout.bos], *parts, [layout.turn]])
    prompt = conversation.picture_prompt(layout, before, 16)
    a, b = (layout.text_ids(model.codec.text.encode(x))[0] for x in "ab")
    full, image, none = prompt.streams
    assert full[[0, 1, 2, 19, 20, 21, 22]].tolist() == [
        *(layout.bos, a, layout.brk, layout.eoss, b, layout.turn, layout.brk),
    ]
    assert image.tolist() == [i for i in full if i not in (a, b, layout.turn)]
    assert none.tolist() == [layout.bos, layout.brk]
    greedy = Sampler(temperature=0.0, guidance=(3.0, 1.2))
    (written,) = model.writer.tokens([prompt], [greedy], 0)
    forward = jax.jit(lambda model, tokens: model(tokens))
    rows = [list(stream) for stream in prompt.streams]
    for t in range(16):
        tokens = np.array([row + [layout.pad] * (limit - len(row)) for row in rows])
        logits_BLV = np.asarray(forward(model.decoder, tokens))
        f, i, u = (logits_BLV[g, len(row) - 1] for g, row in enumerate(rows))
        scores = (u + 1.2 * (i - u) + 3.0 * (f - i))[layout.image.start :][: tiny.CODES]
        assert written[t] == layout.image.start + scores.argmax(), t
        rows = [[*row, int(written[t])] for row in rows]


def test_pictures_captions_and_likelihoods(model):
    assert model.system.sampling.text_to_image.guidance == (3.0, 1.2)
    one, two = model.text_to_image(["a dog", "un café"])
    assert one.size == (tiny.SIDE, tiny.SIDE) and one != two
    (again,) = model.text_to_image(["a dog"])
    assert again == one
    captions = model.caption([WHITE, WHITE * 0], max_text=5)
    assert len(captions) == 2 and all(isinstance(text, str) for text in captions)
    assert model.caption([WHITE * 0], max_text=5, numbers=[1]) == captions[1:]
    with pytest.raises(ValueError, match="max_text=0 must be at least 1"):
        model.caption([WHITE], max_text=0)
    with pytest.raises(ValueError, match="not learnt captions .* rerank.likelihood"):
        model.text_to_image(["a"], candidates=2, rerank=Rerank(likelihood=1.0))
    document = Document((Text("hi"), Image(WHITE)))
    (found,) = model.log_likelihood([document])
    (ids,) = conversation.likelihood_rows(model.writer, [document])
    assert ids[[0, 3, -2, -1]].tolist() == [0, model.layout.brk, model.layout.eoss, 2]
    logits_LV = jax.nn.log_softmax(model.decoder(jnp.asarray(ids)[None])[0])
    wanted = sum(float(logits_LV[n, i]) for n, i in enumerate(ids[1:]))
    assert found == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(ValueError, match="has not learnt to fill in: tune it"):
        model.infill([WHITE], [(0, 0, 4, 4)])


def test_answers_are_texts_and_whole_pictures(model, monkeypatch):
    layout, calls = model.layout, []
    hi = layout.text_ids(model.codec.text.encode("hi"))
    said = [[*hi, layout.brk], [*hi, layout.eos], [*hi, layout.eos]]

    def tokens(wanted, samplers, seed, **_):
        calls.append([prompt.streams for prompt in wanted])
        for prompt in wanted:
            if prompt.scripts[0][0] == conversation.IMAGE:
                yield np.full(16, layout.image[3])
            else:
                yield np.array(said.pop(0))

    monkeypatch.setattr(model.writer, "tokens", tokens)
    documents = [Document((Text("draw"),)), Document((Image(WHITE), Text("what?")))]
    first, second = model.generate(documents, images=2, max_text=9)
    kinds = [type(s).__name__ for s in first.segments]
    assert kinds == ["Text", "Text", "Image", "Text"]
    assert [s.text for s in first.segments if isinstance(s, Text)] == [
        "draw",
        "hi",
        "hi",
    ]
    assert (first.segments[2].codes == 3).all() and second.texts == ["what?", "hi"]
    # Both speak, the first draws with three streams, and goes on after its picture.
    assert [len(call) for call in calls] == [2, 1, 1] and len(calls[1][0]) == 3
    assert calls[2][0][0][-1] == layout.eoss and calls[2][0][0][-18] == layout.brk
    (drawn,) = model.generate(documents[:1], images=1, max_text=0)
    assert [type(s).__name__ for s in drawn.segments] == ["Text", "Image"]
    with pytest.raises(ValueError, match="document 0 has 102 tokens, which fill"):
        model.generate([Document((Text("x" * 100),))])


def test_an_answer_does_not_depend_on_what_else_is_asked(model):
    begun = [Document((Text(text),)) for text in ("draw", "hi", "what?")]
    ask = functools.partial(conversation.generate, model.writer)
    how = (1, 9, Sampler(temperature=9.0), 0)
    for i, together in enumerate(ask(begun, *how)):
        (answer,) = ask(begun[i : i + 1], *how, numbers=[i])
        assert answer.texts == together.texts
        drawn, drawn_together = (
            [np.asarray(s.codes) for s in d.segments if isinstance(s, Image)]
            for d in (answer, together)
        )
        np.testing.assert_array_equal(drawn, drawn_together)


def test_talk_is_text_until_a_picture_or_the_end(model):
    layout = model.layout
    ends = set()
    for seed in range(3):
        for answer in model.writer.tokens(
            [conversation._talk(np.array([layout.bos]), 40, 40)] * 8, [Sampler()], seed
        ):
            inside = np.isin(answer, layout.text)
            length = int(inside.argmin()) if not inside.all() else len(answer)
            ends.add(int(answer[length]) if length < len(answer) else None)
            assert (answer[length + 1 :] == layout.pad).all()
    assert ends - {layout.pad, None} == {layout.brk, layout.eos}


def test_no_picture_is_begun_that_cannot_be_drawn(model, monkeypatch):
    """In a caption, without one to draw, or where the context does not hold it."""
    layout, count, said = model.layout, model.codec.image_tokens, []
    tokens = model.writer.tokens

    def kept(wanted, *options, **more):
        each = tokens(wanted, *options, **more)
        for prompt, written in zip(wanted, each, strict=True):
            said.append((prompt, written))
            yield written

    monkeypatch.setattr(model.writer, "tokens", kept)
    hot = Sampler(temperature=100.0)  # else these tokens are rare
    model.caption([WHITE] * 8, max_text=50, sampler=hot)
    document = Document((Text("hi"),))
    model.generate([document] * 8, images=0, max_text=50, sampler=hot)
    assert len(said) == 16 and not any(layout.brk in written for _, written in said)
    assert any(layout.eos in written for _, written in said)
    said.clear()
    model.generate([Document((Text("x" * 50),))] * 8, images=1, sampler=hot)
    talks = [(p, w) for p, w in said if p.scripts[0][0] != conversation.IMAGE]
    begun = [
        len(p.streams[0]) + w.tolist().index(layout.brk)
        for p, w in talks
        if layout.brk in w
    ]
    assert begun and max(begun) + count + 2 <= model.writer.limit
    (script,) = conversation._talk(np.zeros(60, int), 30, 96 - 60 - 16 - 1).scripts
    assert (script == conversation.TALK).sum() == 96 - (60 + 16 + 2) + 1


def test_words_of_special_ids_are_text(folder):
    tokenizer = JsonTokenizer(folder / "tokenizer.json")
    for text in ("", "a <eoss> b", "<racm3:break>IMGIMGAZ", " café \n🦎 "):
        pieces = tokenizer.encode(text)
        assert all(0 <= piece < tokenizer.size for piece in pieces)
        assert tokenizer.decode(pieces) == text
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode("\ud800")
    with pytest.raises(ValueError, match=r"256\.\.256 are outside \[0, 256\)"):
        tokenizer.decode([256])


# ------------------------------------------------------------------ and back


@pytest.mark.parametrize("shuffled", [False, True])
def test_round_trip_keeps_every_tensor(
    folder, workdir, tmp_path, monkeypatch, shuffled
):
    write = functools.partial(shards.write, limit=20_000)
    monkeypatch.setattr(shards, "write", write)
    if shuffled:  # the words of image codes in another order than their ids
        folder = tiny.write(tmp_path / "anole", shuffled=True)
        (folder / "tokenizer_config.json").write_text("{}")
        workdir = tmp_path / "work"
        conversion.import_chameleon(folder, workdir, tiny.config())
    conversion.export(workdir, tmp_path / "back")
    before, after = Shards(folder), Shards(tmp_path / "back")
    assert set(before.places) == set(after.places)
    assert len({place.path for place in after.places.values()}) > 3
    for name in before.places:
        np.testing.assert_array_equal(before.view(name), after.view(name), name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    old, new = (
        json.loads((p / "config.json").read_text()) for p in (folder, tmp_path / "back")
    )
    assert new["vocabulary_map"] == old["vocabulary_map"]
    assert new["vq_config"].items() >= old["vq_config"].items()
    card = (tmp_path / "back" / "README.md").read_text()
    assert (
        "| converted from | chameleon |" in card and "| parameters | 36,256 |" in card
    )
    assert "| training | converted, not trained here |" in card
    assert "optimizer" not in card
    with pytest.raises(FileExistsError, match="back exists: give a new folder"):
        conversion.export(workdir, tmp_path / "back")


def test_a_config_of_other_sizes_leaves_a_conversion_alone(workdir):
    before = (workdir / "config.json").read_text()
    other = chameleon_7b.get_config().to_dict()
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="converted with other settings"):
            stages.run(other, workdir, ["prepare_data"], overwrite)
    assert (workdir / "config.json").read_text() == before
    assert CM3Leon.load(workdir).layout.size == tiny.TOTAL


def test_bfloat16_stays_so_and_is_read_as_float32(tmp_path):
    folder = tiny.write(tmp_path / "anole")
    shards = Shards(folder)
    low = {n: np.asarray(shards.view(n), jnp.bfloat16) for n in shards.places}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(low, folder / "model.safetensors")
    facts = conversion.import_chameleon(folder, tmp_path / "work", tiny.config())
    assert facts["dtype"] == "bfloat16" and facts["bytes"] == 2 * facts["parameters"]
    model = CM3Leon.load(tmp_path / "work").decoder
    assert model.embed.get_value().dtype == np.float32
    np.testing.assert_array_equal(model.embed, low["model.embed_tokens.weight"])
    half = Precision(compute="bfloat16")
    model = CM3Leon.load(tmp_path / "work", precision=half).decoder
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}
    conversion.export(tmp_path / "work", tmp_path / "back")
    back = Shards(tmp_path / "back").view("lm_head.weight")
    np.testing.assert_array_equal(back, low["lm_head.weight"])
    conversion.export(tmp_path / "work", tmp_path / "wide", dtype="float32")
    assert Shards(tmp_path / "wide").view("lm_head.weight").dtype == np.float32


def test_transformers_reads_what_was_handed_back(workdir, model, tmp_path):
    torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
    transformers = references.module("transformers")
    conversion.export(workdir, tmp_path / "back")
    theirs = transformers.ChameleonForConditionalGeneration.from_pretrained(
        tmp_path / "back", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = np.random.default_rng(2).integers(0, tiny.TOTAL, (2, 20))
    wanted = tiny.logits(theirs, tokens)
    np.testing.assert_allclose(model.decoder(tokens), wanted, atol=1e-4)


@pytest.mark.slow
def test_command_line(folder, tmp_path):
    def convert(source, target, *more):
        command = [sys.executable, "launch/convert.py", f"--from={source}"]
        return subprocess.run(
            [*command, f"--to={tmp_path / target}", *more],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
        )

    done = convert(folder, "work")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["text"] == tiny.TEXT
    done = convert(tmp_path / "work", "back", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert Shards(tmp_path / "back").view("lm_head.weight").dtype == jnp.bfloat16
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "llama/model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")
    done = convert(tmp_path / "llama", "other")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "config.json describes a 'llama', not a 'chameleon'" in done.stderr
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------ tuning


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["anole", "lora"])
def test_tuning_a_converted_model(workdir, tmp_path, variant):
    """The head's rows of image ids, or low-rank changes: everything else stays."""
    examples, work = tmp_path / "examples", tmp_path / "work"
    examples.mkdir()
    numbers = range(15, 40)  # some of every split
    for n in numbers:
        grey = Pillow.fromarray(np.full((16, 16, 3), 6 * n, np.uint8))
        grey.save(examples / f"{n}.png")
    for task in ("text_to_image", "caption_short"):
        lines = [
            {"id": f"{n}", "fields": {"caption": f"grey {n}", "image": f"{n}.png"}}
            for n in numbers
        ]
        text = "\n".join(map(json.dumps, lines))
        (examples / f"{task}.jsonl").write_text(text)
    shutil.copytree(workdir, work)
    whole = json.loads((work / "config.json").read_text())
    sft = tiny.config(variant)["sft"] | {
        "path": str(examples),
        "packing": {"kind": "first_fit", "row_length": 96},
        "batch_size": 8,
        "loss_blocks": 1,
        "optimizer": {"peak": 1e-2, "warmup": 1, "steps": 3},
        "validation_batches": 1,
    }
    whole |= {"sft": sft, "sampling": tiny.config(variant)["sampling"]}
    stages.run(whole, work, ["prepare_tasks", "tokenize_tasks", "sft"])
    tuned = CM3Leon.load(work)
    before = load_model(work / "pretrain", tuned.decoder)
    image = tuned.layout.image
    leaves = zip(jax.tree.leaves(before), jax.tree.leaves(tuned.decoder), strict=True)
    for name, (x, y) in zip(leaf_names(before), leaves, strict=True):
        a, b = np.asarray(x), np.asarray(y)
        changed = (a != b).any()
        if variant == "lora":
            assert changed == name.startswith("blocks.w_"), name
        else:
            assert changed == (name == "unembed"), name
            if changed:
                columns = np.flatnonzero((a != b).any(axis=0))
                assert set(columns) <= set(image) and len(columns) > len(image) // 2
    (picture,) = tuned.text_to_image(["grey 20"])
    assert picture.size == (16, 16)
    conversion.export(work, tmp_path / "tuned", "sft")
    head = Shards(tmp_path / "tuned").view("lm_head.weight")
    np.testing.assert_array_equal(np.asarray(tuned.decoder.unembed[...]).T, head)
    card = (tmp_path / "tuned" / "README.md").read_text()
    rank = 16 if variant == "lora" else 0
    assert f'"rank": {rank}' in card and '"caption_short": 1.0' in card
