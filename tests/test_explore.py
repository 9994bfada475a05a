"""Every widget of chapter 25 driven without a browser: what the panels show, what they refuse, and how long an answer takes."""
from __future__ import annotations

import asyncio
import datetime
import io
import random
import time

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("anywidget", reason="the panels need the extra ris_nb[explore]")

import ipywidgets as widgets

from ris_nb.contract import RISError
from ris_nb.data.tokenizer import build_vocabulary
from ris_nb.explore.answers import Remembered, Viewer, shipped
from ris_nb.explore.ask import LINES, PHOTO_SIDE, ask_panel, photo_at, refphotos, same_place
from ris_nb.explore.fill import SEES, Pointable, fill_panel, full_names, guess_word, hide_word, paint, shift
from ris_nb.models.mask_grounding import mean_below
from ris_nb.explore.losses import c3_points, loss_panel
from ris_nb.explore.page import explore as explore_
from ris_nb.explore.panel import SIDE, Panel, bars, coloured, png, scene_at, shown as shown_
from ris_nb.explore.shatter import ShatterPanel, draw_slots, shatter_panel, slot_colours, slot_names, with_slots
from ris_nb.models.c3_loss import c3_loss
from ris_nb.models.entity_slots import QuerySlots
from ris_nb.models.photo import PhotoLAVT
from ris_nb.registry import _shipped, create_model, load_model, shipped_checkpoint
from ris_nb.studies.sag import sag_for

MODELS = ("lavt_tiny", "magnet_tiny", "sag_tiny")


@pytest.fixture()
def ask():
    return ask_panel(MODELS)


@pytest.fixture(scope="module")
def photo_model():
    """A small model of photographs without training: what it marks means nothing, but it takes every step."""
    torch.manual_seed(0)
    bert = dict(model_type="bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    return PhotoLAVT(64, "bert-base-uncased", vision={"timm": "tf_efficientnet_lite0", "pretrained": False},
                     text={"hf": "small", "pretrained": False, "layers": 1, "config": bert}, threshold=0.45).eval()


@pytest.fixture()
def asked(photo_model):
    if not refphotos():
        pytest.skip("RefPhotos isn't here")
    return ask_panel({"mine": photo_model, "lavt_tiny": load_model("lavt_tiny")})


@pytest.fixture()
def fill():
    return fill_panel()


@pytest.fixture()
def shatter():
    return shatter_panel()


@pytest.fixture()
def loss():
    return loss_panel()


def pictures(panel):
    """All that a panel shows, as bytes and text, without its line of status."""
    found = {}
    for name, part in panel.parts.items():
        if isinstance(part, Pointable):
            found[name] = part.png
        elif isinstance(part, (widgets.Image, widgets.HTML)) and name != "status":
            found[name] = part.value
    return found


def changed(panel, name, value, trait="value"):
    """Set a widget, and return the names of the pictures and texts that became others."""
    before = pictures(panel)
    setattr(panel[name], trait, value)
    after = pictures(panel)
    return {name for name in before if before[name] != after[name]}


def upload(panel, content, name="photo.jpg"):
    panel["upload"].value = ({"name": name, "type": "image/jpeg", "size": len(content), "content": memoryview(content),
                              "last_modified": datetime.datetime.now()},)


def encoded(photo, kind="JPEG"):
    file = io.BytesIO()
    photo.save(file, kind)
    return file.getvalue()


# --- Ask


@pytest.mark.parametrize("name", MODELS)
def test_a_panel_marks_what_predict_marks(name):
    panel = ask_panel((name,))
    model = load_model(shipped_checkpoint(name))
    for number in (0, 3):
        panel["number"].value = number
        scene, photo, known = scene_at("val", number)
        for text in list(known)[:3]:
            panel["expression"].value = text
            output = panel.answers[name].output
            mask = model.masks(output, [scene.image.shape[:2]])[0]
            assert (mask.numpy() == model.predict([scene.image], [text])[0]).all()


def test_each_input_of_ask_changes_what_it_should(ask):
    answers = {*MODELS, *(f"{name} caption" for name in MODELS)}
    assert changed(ask, "expression", [text for text, mask in scene_at("val", 0)[2].items() if mask.any()][-1]) == answers
    assert changed(ask, "words", 1) == set(MODELS)  # the words stay, the pictures become maps
    assert changed(ask, "words", -1) == set(MODELS)
    assert {"lavt_tiny caption", "magnet_tiny caption", "sag_tiny caption"} <= changed(ask, "threshold", 0.05)
    ask["threshold"].value = 0.5
    assert changed(ask, "number", 7) == answers
    assert changed(ask, "source", "testC") == answers
    ask["clear"].click()
    assert changed(ask, "example", ask["example"].options[-1][1]) and ask["expression"].value == ask["example"].value
    number = ask["number"].value
    ask["another"].click()
    assert ask["number"].value == number + 1


def test_the_page_asks_all_shipped_models_and_says_there_is_none():
    panel = explore_().children[0]
    assert list(panel.viewers) == _shipped() and {"cris_tiny", "rela_tiny"} < set(panel.viewers)
    panel["source"].value = "val"
    panel["number"].value = 3
    nothing = next(text for text, mask in scene_at("val", 3)[2].items() if not mask.any())
    panel["expression"].value = nothing
    assert panel.said["rela_tiny"] == "there is none, right" and "there is none, right" in panel["rela_tiny caption"].value
    assert panel.said["sag_tiny"].endswith("wrong: there is none")
    below = [text.get_text() for ax in panel.figure().axes for text in ax.texts]
    assert [text.splitlines()[0] for text in below] == list(panel.said.values())


def test_a_lower_threshold_marks_more(ask):
    marked = []
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9):
        ask["threshold"].value = threshold
        marked.append([shipped(name).model.masks(ask.answers[name].output, [(64, 64)], threshold)[0].sum().item() for name in MODELS])
    assert (np.diff(marked, axis=0) <= 0).all() and (np.array(marked[0]) > marked[-1]).all()
    assert shipped("sag_tiny").model.threshold == 0.5  # as it was


def test_words_are_suggested_and_cleared(ask):
    ask["clear"].click()
    for word in ("the", "red", "circle"):
        next(button for button in ask["suggestions"].children if button.description == word).click()
    assert ask["expression"].value == "the red circle" and [label for label, _ in ask["words"].options] == ["the answer", "the", "red", "circle"]
    for name in MODELS:
        shares = ask.answers[name].shares
        assert len(shares) == 3 and shares.sum() == pytest.approx(1, abs=1e-4) and (shares >= 0).all()


def test_what_depends_on_the_picture_alone_is_computed_once(ask):
    for text in ("the red circle", "the ring", "the big one", "the leftmost thing"):
        ask["expression"].value = text
    for name in MODELS:
        before = shipped(name).encode.calls
        ask["expression"].value = f"the yellow thing above the {name[0]}"
        ask["expression"].value = "the white star"
        assert before and shipped(name).encode.calls == before


def test_remembered_knows_a_changed_question():
    calls = Remembered(lambda x, *more, **options: x.sum())
    x = torch.arange(6.0)
    assert calls(x) == calls(x) == 15 and calls.calls == 1
    x += 1
    assert calls(x) == 21 and calls.calls == 2  # the same memory, other numbers
    calls(x, 1), calls(x, 2), calls(x[:3]), calls(x, history=True)
    assert calls.calls == 6
    three = Remembered(str.upper, 3)
    assert [three(text) for text in "abacadac"] == list("ABACADAC") and three.calls == 4  # b was needed longest ago when d came
    failing = Remembered(lambda: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing()


def test_bad_input_is_a_line(ask):
    plain = png(shown_(scene_at("val", 0)[1]))
    for text in ("", "   "):
        ask["expression"].value = text
        assert "says nothing" in ask["status"].value and ask["magnet_tiny"].value == plain
    for text, told in (("🦄🦄", "🦄🦄"), ("the purple elephant and the zebra", "elephant, and, zebra"), ("the <b>ring</b>", "&lt;, b"),
                       ("the ring " * 200, "longer")):
        ask["expression"].value = text
        assert told in ask["status"].value, ask["status"].value
        assert ask.answers
    ask["expression"].value = "the ring"
    assert "never saw" not in ask["status"].value


def test_the_panel_begins_with_a_photo(asked):
    """And with two expressions about it, which only the model of photographs is asked."""
    photo, known = photo_at(0)
    assert asked["source"].value == "photos" and asked.photo is photo
    assert asked["expression"].value.splitlines() == list(known)[:2] and list(asked.answers) == ["mine", "mine 2"]
    assert all("IoU" in said for said in asked.said.values()) and list(asked.pictures) == list(asked.said)
    for text, key in zip(known, asked.answers):
        mask, = asked.viewers["mine"].model.masks(asked.answers[key].output, [photo.size[::-1]])
        assert (mask.numpy() == asked.viewers["mine"].model.predict([photo], [text])[0]).all()
        assert text in asked[f"{key} caption"].value
    assert asked["threshold"].value == 0.45  # the model's own
    assert [ax.get_title().replace("\n", " ") for ax in asked.figure().axes if ax.get_title()] == list(known)[:2]


def test_pictures_are_asked_the_models_that_fit(asked):
    asked["source"].value = "val"
    assert list(asked.answers) == ["lavt_tiny"] and "IoU" in asked.said["lavt_tiny"] and asked["threshold"].value == 0.5
    assert asked["suggestions"].layout.display is None
    asked["source"].value = "photos"
    assert list(asked.answers) == ["mine", "mine 2"] and asked["suggestions"].layout.display == "none"


def test_examples_follow_the_photo_and_typed_text_stays(asked):
    asked["another"].click()
    known = list(photo_at(1)[1])
    assert asked["number"].value == 1 and asked["expression"].value.splitlines() == known[:2]
    assert [text for _, text in asked["example"].options] == ["", *known]
    asked["example"].value = known[-1]
    assert asked["expression"].value.splitlines() == [*known[:2], known[-1]] and list(asked.answers) == ["mine", "mine 2", "mine 3"]
    asked["expression"].value = "a person who is not here"
    asked["another"].click()
    assert asked["expression"].value == "a person who is not here" and list(asked.answers) == ["mine"]
    assert asked["words"].layout.display is None and asked["words"].options[1][0] == "a"
    asked["number"].value = asked["number"].max
    asked["another"].click()
    assert asked["number"].value == 0


def test_the_photo_is_encoded_once_and_a_threshold_runs_nothing(asked):
    model, ran = asked.viewers["mine"].model, []
    hooks = [part.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, part in model.named_children()]
    try:
        moved = set().union(*(changed(asked, "threshold", threshold) for threshold in (0.05, 0.3, 0.95)))
        assert {"mine caption", "mine 2 caption"} & moved and ran == []
        asked["expression"].value += "\nthe third thing"
        assert "text" in ran and not {"vision", "photo"} & set(ran) and ran.count("text") == 1
        ran.clear()
        asked["expression"].value = "\n".join(reversed(asked["expression"].value.splitlines()))
        assert ran == [] and "the third thing" in asked["mine caption"].value
        asked["number"].value = 1
        assert ran.count("vision") == ran.count("photo") == 1
    finally:
        for hook in hooks:
            hook.remove()


def test_lines_are_expressions(asked):
    asked["expression"].value = "\n  \nthe man\n\n🦄 & <b>\n" + "word " * 500
    assert list(asked.answers) == ["mine", "mine 2", "mine 3"] and "longer" in asked["status"].value
    assert "🦄 &amp; &lt;b&gt;" in asked["mine 2 caption"].value
    asked["expression"].value = "\n".join(f"thing {i}" for i in range(LINES + 2))
    assert len(asked.answers) == LINES and "2 more" in asked["status"].value
    assert sum(len(row.children) for row in asked["answers"].children) == LINES
    asked["expression"].value = " \n"
    assert not asked.answers and "says nothing" in asked["status"].value


def test_a_photo_of_ones_own(asked):
    photo = Image.fromarray(scene_at("val", 5)[0].image).resize((300, 200))
    upload(asked, encoded(photo), "beach.jpg")
    assert asked["source"].value == "yours" and asked["source"].label == "your photo beach.jpg"
    assert asked["expression"].value == "" and "says nothing" in asked["status"].value  # the examples were about another photo
    asked["expression"].value = "the ring\nthe sea"
    assert list(asked.said) == ["mine", "mine 2"] and "IoU" not in asked["mine caption"].value
    shown = Image.open(io.BytesIO(asked["mine"].value))
    assert max(shown.size) <= PHOTO_SIDE and shown.width > shown.height
    upload(asked, encoded(photo.rotate(90, expand=True)), "tower.jpg")
    assert asked["expression"].value == "the ring\nthe sea" and asked["source"].label == "your photo tower.jpg"
    assert [source for _, source in asked["source"].options].count("yours") == 1
    asked["source"].value = "photos"
    asked["source"].value = "yours"
    assert asked.photo.size == (200, 300)


def exif_turned(photo, orientation):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    photo.save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(("name", "content", "told"), [
    ("notes.txt", b"this is no picture", "no image format"), ("empty.jpg", b"", "0 bytes"), ("<b>.png", b"\x89PNG\r\n\x1a\n", "read as an image"),
    ("half.jpg", encoded(Image.new("RGB", (90, 60), "white"))[:400], "read as an image"), ("deep.png", encoded(Image.new("I;16", (8, 8)), "PNG"), "8 bits"),
    ("huge.png", encoded(Image.new("1", (12_000, 9_000)), "PNG"), "scale it down")])
def test_a_bad_upload_is_a_line(asked, name, content, told):
    before, said = pictures(asked), asked.said
    upload(asked, content, name)
    line = asked["status"].value
    assert told in line and name.replace("<b>", "&lt;b&gt;") in line and "<br>" not in line, line
    assert pictures(asked) == before and asked.said == said and asked["source"].value == "photos"
    asked["expression"].value = "the man"  # the panel goes on
    assert asked.answers and told not in asked["status"].value
    upload(asked, encoded(Image.new("RGB", (9, 9))), "good.jpg")
    assert asked["source"].value == "yours" and asked.answers


@pytest.mark.parametrize(("name", "content", "size"), [
    ("cmyk.jpg", encoded(Image.new("CMYK", (60, 40), (0, 200, 200, 0))), (60, 40)), ("turned.jpg", exif_turned(Image.new("RGB", (60, 40), "red"), 6), (40, 60)),
    ("grey.png", encoded(Image.new("L", (60, 40)), "PNG"), (60, 40)), ("one.png", encoded(Image.new("RGB", (1, 1)), "PNG"), (1, 1)),
    ("line.png", encoded(Image.new("RGB", (3000, 1)), "PNG"), (3000, 1)), ("clear.png", encoded(Image.new("RGBA", (60, 40)), "PNG"), (60, 40)),
    ("web.gif", encoded(Image.new("P", (60, 40)), "GIF"), (60, 40))])
def test_an_odd_photo_is_answered(asked, name, content, size):
    asked["expression"].value = "the man\nthe wall"
    upload(asked, content, name)
    assert asked.photo.size == size and asked.photo.mode == "RGB" and len(asked.answers) == 2
    assert asked["status"].value.endswith('aria-live="polite"></div>'), asked["status"].value
    if name == "cmyk.jpg":
        red, green, blue = asked.photo.getpixel((30, 20))
        assert red > 200 > 100 > max(green, blue)


def test_a_photo_of_fifty_megapixels(ask):
    content = encoded(Image.effect_mandelbrot((8660, 5774), (-2, -1, 1, 1), 4).convert("RGB"))
    ask["expression"].value = "a ring"
    start = time.perf_counter()
    upload(ask, content)
    print(f"50 megapixels, {len(content) / 1e6:.1f} MB: {time.perf_counter() - start:.1f} s until the picture stands")
    assert len(ask.answers) == 3 and max(Image.open(io.BytesIO(ask["sag_tiny"].value)).size) <= PHOTO_SIDE


def test_a_photo_can_be_given(tmp_path):
    Image.new("RGB", (80, 40), "red").save(tmp_path / "red.png")
    panel = ask_panel(("magnet_tiny",), tmp_path / "red.png")
    assert panel["source"].value == "yours" and panel["source"].label == "your photo red.png"
    panel["expression"].value = "the ring"
    assert panel.answers
    with pytest.raises(RISError, match="no such image"):
        ask_panel(("magnet_tiny",), tmp_path / "none.png")


def test_rapid_typing_leaves_no_queue():
    panel = ask_panel(("magnet_tiny",))
    computed = panel.ask["magnet_tiny"].calls

    async def type_fast():
        for i in range(1, len("the yellow thing") + 1):
            panel["expression"].value = "the yellow thing"[:i]
            await asyncio.sleep(0)  # the kernel reads its next message
        await asyncio.sleep(0.2)

    asyncio.run(type_fast())
    assert panel.answers["magnet_tiny"].pieces == ["the", "yellow", "thing"]
    assert panel.ask["magnet_tiny"].calls - computed <= 2


def test_settle_does_not_wait():
    panel = loss_panel()

    async def change():
        panel["own"].value = 5
        stale = panel.values["C3"]
        assert panel.settle().values["C3"] < stale
        await asyncio.sleep(0.1)

    asyncio.run(change())


def test_pixels_read_words_and_hooks_are_removed():
    viewer = shipped("magnet_tiny")
    viewer.look(scene_at("val", 3)[1])
    batch = viewer.batch("the red circle")
    output, stages = viewer.model.word_attention(batch)
    assert [tuple(A.shape[2:]) for A in stages] == [(16, 16), (8, 8), (4, 4)]
    with torch.no_grad():
        torch.testing.assert_close(output.score, viewer.model(batch).score)
    assert not any(module._forward_pre_hooks for module in viewer.model.modules())


def test_pictures_are_small_and_text_is_escaped():
    assert shown_(Image.new("RGB", (4000, 3000), "white")).shape == (168, SIDE, 3)
    page = coloured(["the", "<red>"], [0.25, 0.75])
    assert page.index("color:black") < page.index("color:white")  # dark ground, bright letters
    assert "★" in bars("guesses", [("red", 0.5)], marked="red")


def test_models_of_your_own_are_asked(tmp_path):
    """A folder, a model in hand, and one that cuts words in another way, side by side."""
    own = load_model("sag_tiny")
    own.save_pretrained(tmp_path / "run")
    panel = ask_panel((str(tmp_path / "run"), "magnet_tiny"))
    panel["expression"].value = "the red ring"
    assert len(panel.answers) == 2 and panel["status"].value

    plain = load_model("lavt_tiny")
    other = create_model("lavt_tiny", vocabulary=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "re", "##d", "ring"])
    panel = ask_panel({"plain": plain, "other": other})
    panel["expression"].value = "the red ring"
    panel["words"].value = 2
    assert set(panel.pictures) == {"plain", "other"} and panel.answers["other"].pieces == ["the", "re", "##d", "ring"]

    tabs = explore_({"mine": own})
    assert list(tabs.children[0].viewers) == ["mine"] and tabs.children[2].viewer.model is own
    assert list(explore_({"plain": plain}).children[2].viewer.model.tokenizer.vocabulary) == load_model("sag_toys").vocabulary
    with pytest.raises(RISError):
        ask_panel(("no such model",))


def test_a_piece_is_found_where_another_model_has_it():
    assert same_place(["the", "red", "ring"], "ring", 2) == 2
    assert same_place(["the", "re", "##d", "ring"], "ring", 2) == 3
    assert same_place(["the", "re", "##d"], "ring", 2) == same_place(["the"], "the answer", -1) == -1


# --- Fill in the word


def test_mean_below_is_a_weighted_mean():
    features = torch.randn(2, 3, 4, 4)
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[0, 4:8, 8:12] = True  # one cell
    mask[0, 0:2, 0:4] = True  # half of another
    torch.testing.assert_close(mean_below(features, mask)[0, 0], (features[0, :, 1, 2] + features[0, :, 0, 0] / 2) / 1.5)
    assert (mean_below(features, mask)[1] == 0).all()


def test_only_the_guess_with_the_mask_follows_the_mask(fill):
    fill["expression"].value = full_names(scene_at("val", 0)[0])[-1]
    fill["words"].value = 2
    seen = []
    for onto in range(len(scene_at("val", 0)[0].things)):
        assert changed(fill, "onto", onto) == {"picture", "bars"}
        seen.append(fill.best)
    for name in ("words alone", "+ image"):
        assert all(best[name] == seen[0][name] for best in seen)
    assert len({tuple(best["+ image + mask"]) for best in seen}) > 1
    for rows in seen[0].values():
        assert len(rows) == 5 and sum(share for _, share in rows) <= 1 + 1e-5


def test_words_and_sliders_of_fill(fill):
    assert changed(fill, "words", 0)
    fill["right"].value = 9
    base = fill.mask.base
    assert (fill.mask.value == shift(base, 9, 0)).all()
    assert "picture" in changed(fill, "down", -4)  # "the" is guessed wherever the mask lies
    assert changed(fill, "number", 2) and fill["right"].value == fill["down"].value == 0
    fill["expression"].value = ""
    assert "says nothing" in fill["status"].value
    fill["expression"].value = "the zebra"
    assert "zebra" in fill["status"].value and not fill.mask.value.any()  # nobody knows what is meant
    assert changed(fill, "split", "testC")
    fill["example"].value = fill["example"].options[1][1]
    assert fill.mask.value.any()


def test_the_pointer_moves_paints_and_erases(fill):
    fill["onto"].value = 0
    before = fill.mask.value
    for points in ([[0.5, 0.5]], [[0.5, 0.5], [0.55, 0.5]], [[0.5, 0.5], [0.55, 0.5], [0.625, 0.4375]]):
        fill["picture"].stroke = {"id": 1, "points": points}
    assert (fill["right"].value, fill["down"].value) == (8, -4)
    assert (fill.mask.value == shift(before, 8, -4)).all()
    fill["picture"].stroke = {"id": 2, "points": [[0.2, 0.2], [0.325, 0.2]]}
    assert fill["right"].value == 16  # from where it lay
    moved = fill.mask.value
    fill["tool"].value = "paint"
    fill["picture"].stroke = {"id": 3, "points": [[0.1, 0.9]]}
    fill["picture"].stroke = {"id": 3, "points": [[0.1, 0.9], [0.5, 0.9]]}
    assert (fill.mask.value >= moved).all() and fill.mask.value[57, 10:30].all()  # a line without gaps
    fill["tool"].value = "erase"
    fill["picture"].stroke = {"id": 4, "points": [[0.1, 0.9], [0.5, 0.9]]}
    assert not fill.mask.value[57, 10:30].any()
    assert fill["picture"].alt.startswith("The scene, with a mask over")


def test_shift_and_paint():
    mask = np.zeros((4, 5), bool)
    mask[1, 1] = True
    assert np.argwhere(shift(mask, 2, 1)).tolist() == [[2, 3]] and not shift(mask, -2, 0).any()
    assert not shift(mask, 63, 63).any()
    assert paint(mask, [(0.5, 0.5)], 0.3).sum() > 1 and paint(mask, [], 0.3).sum() == 1
    assert not mask[2, 2]  # the given mask stays


@pytest.mark.parametrize(("kind", "hidden"), [("colour", 2), ("shape", 3)])
def test_the_predictor_that_ships_follows_the_mask(fill, kind, hidden):
    """On scenes that nobody trained on: the mask on a thing that differs from the one that is named in the hidden word alone decides."""
    right = {name: [] for name in SEES}
    for number in range(8):
        scene, photo, _ = scene_at("val", number)
        for thing, name in zip(scene.things, full_names(scene)):
            batch, output = hide_word(fill.game, fill.viewer, photo, name, hidden)
            for other, mask in zip(scene.things, scene.masks):
                if getattr(other, kind) != getattr(thing, kind):
                    for see, rows in guess_word(fill.game, batch, output, hidden, mask, count=1).items():
                        right[see].append(rows[0][0] == getattr(other, kind))
    told = {name: np.mean(hits) for name, hits in right.items()}
    print({name: f"{share:.0%}" for name, share in told.items()})
    assert told["+ image + mask"] > max(0.4, told["words alone"] + 0.15, told["+ image"] + 0.15)


# --- Shatter and gather


def test_random_slots_are_as_spread_out_as_all_gaussians_together(shatter):
    own, random_slots = (shatter.discoveries[kind].slots for kind in ("entity", "random"))
    drawn = own(4000, torch.randn(4000, own.count, own.width, generator=torch.Generator().manual_seed(0))).detach().flatten(0, 1)
    torch.testing.assert_close(random_slots.mu[0, 0], drawn.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(random_slots.log_sigma.exp()[0, 0], drawn.std(0), atol=0.05, rtol=0)
    assert isinstance(shatter.discoveries["query"].slots, QuerySlots)


def test_slots_have_names_and_colours():
    assert slot_names(5, 2) == ["1a", "1b", "2a", "2b", "3a"]
    colours = slot_colours(4, 2)
    assert (colours[1] >= colours[0]).all() and (colours[0] != colours[2]).any()
    picture = np.full((2, 4, 3), 200, np.uint8)
    halves = torch.stack([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])])  # two slots, two patches
    drawn = draw_slots(picture, halves, colours[[0, 2]])
    assert (drawn[:, :2] == drawn[0, 0]).all() and (drawn[:, 2:] == drawn[0, 3]).all() and (drawn[0, 0] != drawn[0, 3]).any()
    lit = draw_slots(picture, halves, colours, lit=1)
    assert lit[0, 3].sum() > lit[0, 0].sum()


def test_each_input_of_shatter_changes_what_it_should(shatter):
    slots, gathered = {"picture"}, {"mask", "relevance", "first", "second", "third"}
    assert slots <= changed(shatter, "iteration", 1)
    shatter["iteration"].value = 3
    assert changed(shatter, "slot", 4) == slots
    assert changed(shatter, "slot", -1) == slots
    moved = changed(shatter, "expression", list(scene_at("val", 0, "toys")[2])[-1])
    assert "picture" not in moved and "bars" in moved and moved & gathered
    for kind in ("random", "query", "entity"):
        assert slots <= changed(shatter, "kind", kind)
    assert slots <= changed(shatter, "number", 4)
    assert changed(shatter, "split", "testC") and changed(shatter, "example", shatter["example"].options[1][1])
    assert shatter.reads.sum().item() == pytest.approx(1, abs=1e-5)
    for A in shatter.found.maps:
        torch.testing.assert_close(A.sum(0), torch.ones_like(A[0]))


def test_only_slots_that_are_drawn_change_with_the_draw(shatter):
    for kind, drawn in (("entity", True), ("random", True), ("query", False)):
        shatter["kind"].value = kind
        before = shatter["picture"].png
        shatter["redraw"].click()
        assert (shatter["picture"].png != before) is drawn, kind


def test_the_pointer_lights_the_slot_that_won_the_patch(shatter):
    maps = shatter.found.maps[-1]
    shatter["picture"].hover = [0.99, 0.01]
    assert shatter["slot"].value == maps[:, 0, -1].argmax()
    assert shatter["slot"].label in shatter["picture"].alt
    shatter["picture"].hover = []
    assert shatter["slot"].value == -1
    shatter["picture"].hover = [1.3, -0.2]  # a pointer that slipped
    assert shatter["slot"].value == maps[:, 0, -1].argmax()


def test_the_three_slots_that_are_read_most_come_first(shatter):
    order = shatter.reads.argsort(descending=True).tolist()
    for name, k in zip(("first", "second", "third"), order):
        assert f"slot {shatter.names[k]}, read" in shatter[f"{name} caption"].value


def test_shatter_tells_what_it_cannot_read(shatter):
    shatter["expression"].value = "the unicorn"
    assert "unicorn" in shatter["status"].value
    before = shatter["mask"].value
    shatter["expression"].value = ""
    assert "says nothing" in shatter["status"].value and shatter["mask"].value == before
    with pytest.raises(RISError, match="entity"):
        with_slots(with_slots(shatter.discoveries["entity"], "query"), "random")


def test_shatter_shows_toys():
    known = {split: [scene_at(split, number, "toys")[2] for number in range(3)] for split in ("val", "testC")}
    vocabulary = build_vocabulary(text for scenes in known.values() for scene in scenes for text in scene)
    toys = ShatterPanel(Viewer(sag_for("reftoys", vocabulary, pretrained=False).eval()))
    for split, scenes in known.items():
        toys["split"].value = split
        toys["number"].value = 2
        toys["expression"].value = list(scenes[2])[-1]
        assert toys["example"].options[1][1] in scenes[2] and "IoU" in toys["mask caption"].value
        assert toys.pictures["slots"].shape == (96, 96, 3) and "UNK" not in toys["status"].value


# --- Loss lab


def test_the_lab_shows_the_library_s_losses(loss):
    for own, other, rival, temperature in ((0, 180, 180, 0.1), (40, 60, 10, 0.5), (90, 90, 90, 1.0)):
        for name, value in dict(own=own, other=other, rival=rival, temperature=temperature).items():
            loss[name].value = value
        t, z = c3_points(own, other, rival)
        assert loss.values["C3"] == pytest.approx(c3_loss(t, z, temperature=loss["temperature"].value).item(), abs=1e-5)
    assert loss.values["C3"] == pytest.approx(np.log(3), abs=1e-5)  # all alike: nothing but chance
    loss["rival"].value = 0
    worse = loss.values["C3"]
    loss["drop"].value = True
    assert loss.values["C3"] < worse and loss.shares[0, 1] == 0


@pytest.mark.parametrize("name, better", [("apart", 170), ("spread", 2)])
def test_pixels_apart_and_together_lower_the_alignment_loss(loss, name, better):
    before = dict(loss.values)
    assert changed(loss, name, better) == {"picture"}
    assert all(loss.values[term] < before[term] for term in ("inside", "outside"))
    assert "aria-label" in loss["picture"].value and f"{loss.values['inside']:.3f}" in loss["status"].value


def test_every_slider_of_the_lab_moves_the_picture(loss):
    for part in loss.parts.values():
        if isinstance(part, (widgets.FloatSlider, widgets.FloatLogSlider)):
            before = loss["picture"].value
            part.value = part.value * 1.1 if isinstance(part, widgets.FloatLogSlider) else part.value + 5
            assert loss["picture"].value != before, part.description


# --- All of them


@pytest.mark.parametrize("make", [ask_panel, fill_panel, shatter_panel, loss_panel])
def test_every_control_has_a_label_and_the_keyboard_reaches_it(make):
    panel = make()
    controls = [part for part in panel.parts.values() if isinstance(part, (widgets.ValueWidget, widgets.Button)) and not isinstance(part, (widgets.HTML, widgets.Image))]
    assert controls
    for part in controls:
        assert part.description or part.tooltip, part
        assert part.tabbable is not False and not part.disabled
    for part in panel.parts.values():
        if isinstance(part, Pointable):
            assert part.alt and "tabIndex: 0" in part._esm and "ArrowLeft" in part._esm
    figure = panel.figure()
    assert figure.data if hasattr(figure, "data") else figure.axes


def test_explore_has_four_tabs():
    tabs = explore_()
    assert list(tabs.titles) == ["Ask", "Fill in the word", "Shatter and gather", "Loss lab"]
    assert all(isinstance(panel, Panel) for panel in tabs.children)
    assert tabs.children[0].viewers["sag_toys"] is tabs.children[2].viewer  # one model for both


def random_input(panel, rng):
    """One thing that a person may do."""
    name = rng.choice([name for name, part in panel.parts.items() if not isinstance(part, (widgets.HTML, widgets.Image, widgets.Box, widgets.FileUpload))])
    part = panel[name]
    if isinstance(part, widgets.Button):
        return name, part.click
    if isinstance(part, Pointable):
        point = [rng.random(), rng.random()]
        stroke = {"id": part.stroke["id"] + 1, "points": [point, [rng.random(), rng.random()]]}
        return name, lambda: part.set_trait("stroke", stroke) if "tool" in panel.parts else part.set_trait("hover", point)
    if isinstance(part, (widgets.Text, widgets.Textarea)):
        text = rng.choice(list(scene_at("val", rng.randrange(40))[2]))
        return name, lambda: part.set_trait("value", text)
    if hasattr(part, "options"):
        value = rng.choice([option[1] if isinstance(option, tuple) else option for option in part.options if option != "photo"])
    elif isinstance(part, widgets.Checkbox):
        value = not part.value
    elif isinstance(part, widgets.FloatLogSlider):
        value = 10 ** rng.uniform(part.min, part.max)
    else:
        value = type(part.value)(rng.uniform(part.min, min(part.max, 99)))
    return name, lambda: part.set_trait("value", value)


def test_an_answer_takes_less_than_half_a_second():
    """From an input to the new picture: the 95th percentile over random inputs. Judged by processor time, which a busy machine leaves
    alone; the wall clock's is printed beside it."""
    rng, panels = random.Random(0), {"Ask": ask_panel(), "Fill": fill_panel(), "Shatter": shatter_panel(), "Loss": loss_panel()}
    torch.manual_seed(0)
    for name, panel in panels.items():
        seconds = []
        for _ in range(50):
            _, act = random_input(panel, rng)
            wall, cpu = time.perf_counter(), time.process_time()
            act()
            seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
            assert "Error" not in panel["status"].value
        cpu, wall = np.quantile(np.array(seconds), 0.95, axis=0)
        print(f"{name}: 95 % of answers within {1000 * cpu:.0f} ms of processor time, {1000 * wall:.0f} ms on the clock")
        assert cpu <= 0.5
