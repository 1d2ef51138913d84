"""Scenes, dialogues and question sets keep to what they say, and POPE and CHAIR are counted as published."""

import numpy as np
import pytest
import torch

from common import hallucination
from common.backbones.llava import Role
from common.data import dialogues
from common.data.dialogues import CELLS, CONTEXTS, IDS, NAMES, SPLITS, Album, Dialogues, decode, encode
from common.data.scenes import COLOURS, SHAPES


@pytest.fixture(scope="module")
def album() -> Album:
    return dialogues.album(400, seed=3)


def there(album: Album, i: int) -> set[str]:
    return {NAMES[c] for c in range(20) if album.cells[i, c] >= 0}


# ---- scenes ---------------------------------------------------------------------------------------------------------------------------


def test_every_category_looks_different_and_a_context_mixes_shapes_and_colours():
    assert len(set(NAMES)) == len(set(dialogues.LOOKS)) == 20
    for k in range(5):
        shapes, colours = zip(*(dialogues.LOOKS[c] for c in dialogues.members(k)), strict=True)
        assert len(set(shapes)) == len(set(colours)) == 4 and set(shapes) < set(SHAPES) and set(colours) < set(COLOURS)


def test_a_scene_depends_on_its_seed_and_index_alone(album):
    again = dialogues.album(3, seed=3, start=7)
    assert all(torch.equal(getattr(again, part), getattr(album, part)[7:10]) for part in ("images", "contexts", "cells"))
    assert not torch.equal(dialogues.album(1, seed=4).images, album.images[:1])


def test_scenes_follow_the_frequencies():
    album = dialogues.album(2000, seed=11)
    counts = album.present.sum(1)
    assert counts.min() >= 1 and counts.max() <= 5
    assert np.allclose(album.contexts.bincount() / 2000, dialogues.FREQUENCIES, atol=0.04)
    own = torch.stack([album.present[i, list(dialogues.members(k))] for i, k in enumerate(album.contexts.tolist())])
    assert abs(own.float().mean() - 0.75) < 0.02 and abs((counts - own.sum(1)).float().mean() - 0.35) < 0.04
    filled = [row[row >= 0] for row in album.cells]
    assert all(len(set(row.tolist())) == len(row) and row.max() < 16 for row in filled)
    assert torch.cat(filled).bincount(minlength=16).min() > 0.7 * counts.sum() / 16


def test_things_are_where_the_cells_say(monkeypatch):
    """Without noise, tint and faint things, many pixels of a thing's cell have its colour, and empty cells are gray but for their rims."""
    monkeypatch.setattr(dialogues, "NOISE", 0.0)
    monkeypatch.setattr(dialogues, "TINT", 0.0)
    monkeypatch.setattr(dialogues, "CONTRASTS", (1.0, 1.0))
    album = dialogues.album(40, seed=5)
    for image, cells in zip(album.images / 255, album.cells.tolist(), strict=True):
        for cell in range(16):
            y, x = 12 * (cell // 4), 12 * (cell % 4)
            tile = image[:, y + 1 : y + 11, x + 1 : x + 11].flatten(1).T
            if cell in cells:
                colour = torch.tensor(COLOURS[dialogues.LOOKS[cells.index(cell)][1]])
                assert ((tile - colour).abs().amax(1) < 0.01).sum() >= 15
            else:
                assert ((tile - 0.5).abs() < 0.01).all()


def test_noise_and_contrast_are_as_stated(album):
    corner = album.images[(album.cells != 0).all(1), :, :12, :12] / 255
    assert abs(corner.std((2, 3)).mean() - dialogues.NOISE) < 0.02


def test_patches_are_labelled_by_the_cell_they_lie_in():
    cells = torch.full((1, 20), -1)
    cells[0, 3], cells[0, 17] = 0, 6
    patches = Album(torch.zeros(1, 3, 48, 48, dtype=torch.uint8), torch.tensor([0]), cells).patches.view(8, 8)
    expected = torch.full((8, 8), 20)
    expected[0:2, 0:2], expected[2:4, 4:6] = 3, 17
    assert torch.equal(patches, expected)


# ---- words and dialogues --------------------------------------------------------------------------------------------------------------


def test_words_have_ids_of_their_own_and_padding_is_zero():
    assert len(IDS) == len(dialogues.WORDS) and IDS[dialogues.PAD] == 0 == Role.PADDING
    assert decode([*encode("a cup <eos>"), 0, 0]) == "a cup" and decode(encode("yes")) == "yes"
    content = dialogues.content(torch.tensor(encode("is there a cup in the kitchen ?")))
    assert content.tolist() == [False, False, False, True, False, False, True, False]


def test_questions_read_as_in_the_docstring():
    assert dialogues.question("existence", "cup", 0) == "is there a cup in the kitchen ?"
    assert dialogues.question("what", "c7") == "what is at c7 ?"
    assert dialogues.question("where", "cup", 4) == "where is the cup in the beach ?"
    assert dialogues.question("caption", context=1) == "describe the image in the garden ."
    assert dialogues.caption([0, 1]) == "a photo with a cup and a plate"


def test_a_prompt_is_system_image_question_role():
    ids = dialogues.prompt("is there a cup ?")
    text = " ".join(dialogues.WORDS[i] for i in ids)
    assert text == "<bos> a chat about a photo . user :" + 64 * " <image>" + " is there a cup ? assistant :"


def test_roles_of_a_transcript():
    ids, roles = dialogues.transcript(dialogues.conversation([("is there a cup ?", "yes"), ("what is at c7 ?", "nothing")]))
    said = {role: decode([i for i, r in zip(ids, roles, strict=True) if r == role]) for role in (Role.SYSTEM, Role.QUERY)}
    assert said == {Role.SYSTEM: "<bos> a chat about a photo . user :", Role.QUERY: "is there a cup ? assistant : user : what is at c7 ? assistant :"}
    assert [i for i, r in zip(ids, roles, strict=True) if r == Role.OUTPUT] == encode("yes <eos> nothing <eos>")
    assert roles.count(Role.IMAGE) == 64 and dialogues.transcript([], images=False)[0] == encode(dialogues.SYSTEM)


def test_answers_are_true_but_for_what_captions_imagine(album):
    data, kinds, imagined = Dialogues(album, seed=0, each=4), dict.fromkeys((*dialogues.LISTS, "caption", "questions"), 0), []
    for index in range(len(data)):
        scene, turns = index // 4, data.turns(index)
        here, context = there(album, scene), list(CONTEXTS.values())[album.contexts[scene]]
        where = {NAMES[c]: CELLS[album.cells[scene, c]] for c in range(20) if album.cells[scene, c] >= 0}
        asked, answered = turns[0][0], [answer.removesuffix(" <eos>") for _, answer in turns]
        if (kind := asked.split()[0]) in dialogues.LISTS:
            kinds[kind] += 1
            asked_about = [q.split()[-1] for q, _ in turns]
            assert asked == f"{kind} assistant : {asked_about[0]}"
            assert len(asked_about) == len(set(asked_about)) == (len(here) if kind == "locate" else 10)
            assert set(where.values() if kind == "read" else where) <= set(asked_about) <= set(CELLS if kind == "read" else NAMES)
            at = {cell: name for name, cell in where.items()}
            true = {"check": {name: "yes" if name in here else "no" for name in NAMES}, "locate": where, "read": dict.fromkeys(CELLS, "nothing") | at}
            assert answered == [true[kind][subject] for subject in asked_about]
        elif asked.startswith("describe"):
            kinds["caption"] += 1
            told = set(dialogues.mentioned(answered[0]))
            assert here <= told <= here | set(context)
            imagined += [name in told for name in context if name not in here]
        else:
            kinds["questions"] += 1
            assert len(turns) == min(3, len(here))
            for (question, _), answer in zip(turns, answered, strict=True):
                kind, *_, subject = question.removeprefix("user : ").split(" in the ")[0].split(" ?")[0].split()
                if kind == "is":
                    assert answer == ("yes" if subject in here else "no")
                elif kind == "what":
                    assert answer == {cell: name for name, cell in where.items()}.get(subject, "nothing")
                else:
                    assert kind == "where" and answer == where[subject]
        assert all(answer.endswith("<eos>") for _, answer in turns[-1:])
    assert min(kinds.values()) > 0.16 * len(data) and abs(np.mean(imagined) - dialogues.IMAGINED) < 0.06


def test_cues_and_negatives_come_as_often_as_stated(album):
    data = Dialogues(album, seed=1, each=12, kinds=("caption", "questions"))
    cues, negatives, yes = [], [], []
    for index in range(len(data)):
        context = int(album.contexts[index // 12])
        for question, answer in data.turns(index):
            words = question.removeprefix("user : ").split()
            if words[0] not in ("describe", "is", "what", "where"):
                continue
            cues.append(next((list(CONTEXTS).index(w) == context for w in words if w in CONTEXTS), None))
            if words[0] == "is":
                yes.append(answer.startswith("yes"))
                lacking = [c for c in dialogues.members(context) if album.cells[index // 12, c] < 0]
                if not yes[-1] and lacking:
                    negatives.append(NAMES.index(words[3]) // 4 == context)
    right = [cue for cue in cues if cue is not None]
    assert abs(len(right) / len(cues) - 0.6) < 0.03 and abs(np.mean(right) - 0.8) < 0.03
    assert abs(np.mean(yes) - 0.5) < 0.03 and abs(np.mean(negatives) - 0.15) < 0.03


def test_a_batch_is_a_function_of_the_indices(album):
    data = Dialogues(album, seed=0)
    images, ids, roles = data.batch(torch.tensor([9, 400]))
    assert torch.equal(images, album.images[[2, 100]]) and ids.shape == roles.shape
    for row, role, index in zip(ids, roles, (9, 400), strict=True):
        expected = dialogues.transcript(data.turns(index))
        assert (row[: len(expected[0])].tolist(), role[: len(expected[0])].tolist()) == expected
        assert (row[len(expected[0]) :] == 0).all() and (role[len(expected[0]) :] == Role.PADDING).all()
    assert Dialogues(album, seed=0, images=False).batch(torch.tensor([9]))[1].shape[1] == len(dialogues.transcript(data.turns(9), False)[0])


# ---- question sets --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_existence_sets_are_balanced_and_of_their_kind(album, split):
    questions = dialogues.existence(album, split)
    assert [q.answer for q in questions] == ["yes", "no"] * (len(questions) // 2)
    for q in questions:
        context, words = int(album.contexts[q.scene]), q.text.split()
        assert (NAMES[q.category] in there(album, q.scene)) == (q.answer == "yes") and words[3] == NAMES[q.category]
        assert not set(list(CONTEXTS.values())[context]) <= there(album, q.scene)
        cued = [list(CONTEXTS).index(w) for w in words if w in CONTEXTS]
        if split == "wrong cue":
            assert not set(list(CONTEXTS.values())[cued[0]]) & there(album, q.scene) and (q.answer == "yes" or q.category // 4 == cued[0])
        else:
            assert not cued
            assert q.answer == "yes" or {"random": True, "popular": q.category < 8, "adversarial": q.category // 4 == context}[split]
    if split in ("popular", "adversarial"):
        assert questions[::2] == dialogues.existence(album, "random")[::2]


def test_grounded_questions_and_captions_have_true_answers(album):
    for what, where in zip(dialogues.grounded(album, "what"), dialogues.grounded(album, "where"), strict=True):
        assert what.text == f"what is at {where.answer} ?" and where.text == f"where is the {what.answer} ?"
        assert CELLS[album.cells[what.scene, NAMES.index(what.answer)]] == where.answer
    for q in dialogues.captions(album):
        assert dialogues.mentioned(q.answer) == [name for name in NAMES if name in there(album, q.scene)]


def test_answers_come_back_in_the_order_of_the_questions(album):
    class Echo:
        """Says the fourth word of the question, and the mean of the image as a cell."""

        def generate(self, ids, images, max_new_tokens):
            assert len({len(row) for row in ids}) == 1 and images.shape == (len(ids), 3, 48, 48)
            cell = ((images.mean((1, 2, 3)) + 1) * 8).long()
            return torch.stack([ids[:, 9 + 64 + 3], IDS["c0"] + cell, torch.full_like(cell, IDS["<eos>"]), torch.zeros_like(cell)], 1)

    questions = dialogues.existence(album, "wrong cue")[:50] + dialogues.existence(album, "random")[:50]
    questions = [questions[i] for i in torch.randperm(100)]
    bright = ((album.images / 127.5).mean((1, 2, 3)) * 8).long()
    assert dialogues.answers(Echo(), album, questions, batch=16) == [f"{NAMES[q.category]} c{bright[q.scene]}" for q in questions]


# ---- POPE and CHAIR -------------------------------------------------------------------------------------------------------------------


def test_pope_counts():
    said, true = [True] * 6 + [False] * 4, [True] * 3 + [False] * 3 + [True] * 2 + [False] * 2
    assert hallucination.pope(said, true) == pytest.approx({"accuracy": 0.5, "precision": 0.5, "recall": 0.6, "f1": 6 / 11, "yes_rate": 0.6})
    assert hallucination.pope([False, False], [True, False]) == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_rate": 0}


def test_answers_are_read_as_pope_does():
    assert hallucination.said_yes("Yes, there is a cup.") and hallucination.said_yes("yes") and hallucination.said_yes("Yes. There is no plate.")
    assert not hallucination.said_yes("No, there is no cup.") and not hallucination.said_yes("There is not a cup in the image")
    assert hallucination.said_yes("There is nothing but a cup, note that.")


def test_chair_counts():
    mentioned = [["cup", "plate", "cup"], ["car", "car"], [], ["boat"]]
    present = [{"cup", "spoon"}, {"bus"}, {"pen"}, {"boat", "shell"}]
    found = hallucination.chair(mentioned, present)
    precision, recall = 3 / 6, 2 / 6
    f1 = 2 * precision * recall / (precision + recall)
    assert found == pytest.approx({"chair_s": 0.5, "chair_i": 0.5, "recall": recall, "f1": f1, "mentions": 1.5})
    assert hallucination.chair([[], []], [{"a"}, {"b"}]) == {"chair_s": 0, "chair_i": 0, "recall": 0, "f1": 0, "mentions": 0}
