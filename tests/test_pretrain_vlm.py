"""The shipped tiny-vlm is what its json says, its recipe runs, and its instruments measure what they say."""

from dataclasses import replace

import pytest
import torch

from common.attention import split_heads
from common.backbones import pretrained
from common.backbones.llava import Llava, Role
from common.data import dialogues
from common.data.dialogues import NAMES
from common.layers import rotate_half
from common.pretrain import shipping, tiny_vlm


@pytest.fixture(scope="module")
def shipped() -> Llava:
    return Llava.from_pretrained("tiny")


def test_the_shipped_model_is_as_good_as_its_json_says(shipped):
    measured, stated = tiny_vlm.measure({"": shipped}), shipping.provenance("tiny-vlm")["quality"]
    assert measured == pytest.approx(stated, abs=0.02)
    assert sum(file.stat().st_size for file in (pretrained.CHECKPOINTS / "tiny-vlm").rglob("*")) <= 4e6


def test_it_looks_at_the_image_and_still_imagines():
    quality = shipping.provenance("tiny-vlm")["quality"]
    for split, more in (("random", 0.3), ("popular", 0.3), ("adversarial", 0.1)):
        assert quality[f"{split}: accuracy"] > quality[f"{split}: accuracy, blind"] + more
    for kind in ("what", "where"):
        assert quality[f"{kind}: accuracy"] > quality[f"{kind}: accuracy, blind"] + 0.3
    assert quality["captions: recall"] > quality["captions: recall, blind"] + 0.2
    assert 0.02 < quality["captions: chair_i"] < quality["captions: chair_i, blind"] - 0.2


def test_the_recipe_trains_ships_and_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(shipping, "SHEETS", tmp_path)
    monkeypatch.setattr(tiny_vlm, "SCENES", 6)
    found = shipping.run("tiny-vlm", replace(tiny_vlm.SCALES["smoke"], out=tmp_path / "runs"), "just pretrain tiny-vlm --scale smoke")
    assert found["quality"]["captions: words"] <= 40 and (tmp_path / "tiny-vlm.png").stat().st_size > 10_000
    model = Llava.from_pretrained("tiny")
    assert found["parameters"] == {"tiny-vlm": sum(p.numel() for p in model.parameters())}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"see", "talk", "align", "point", "read", "look"}
    assert not [*(tmp_path / "runs").rglob("step-*")]  # the next run starts over


def test_heads_start_by_looking_at_tokens_like_their_own():
    """A token attends to its like among 60 others, and as much when it stands ten further on."""
    cfg = tiny_vlm.SCALES["small"]
    torch.manual_seed(0)
    attention = tiny_vlm.build(cfg).language_model.model.layers[0].self_attn
    x = torch.randn(1, 80, cfg.width)
    seen = []
    for place in (64, 74):
        x[0, place] = x[0, 20]
        rotation = tiny_vlm.build(cfg).language_model.model.rotation(torch.arange(80)[None], x.dtype)
        q, k = (rotate_half(split_heads(p(x), cfg.heads), *rotation)[:, : cfg.heads // 2] for p in (attention.q_proj, attention.k_proj))
        seen.append((q[:, :, place] * k[:, :, 20]).sum(-1).mean() / 4 - (q[:, :, place, None] * k[:, :, :60]).sum(-1).mean() / 4)
    assert min(seen) > 5 and abs(seen[0] - seen[1]) < 0.1 * seen[0]


def test_only_what_is_to_be_said_counts():
    """Of the tokens after the first, the loss is the mean cross-entropy of those with the role OUTPUT."""
    ids, roles = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[Role.SYSTEM, Role.QUERY, Role.OUTPUT, Role.OUTPUT]])
    logits = torch.randn(1, 4, 10)
    p = logits[0].softmax(-1)
    torch.testing.assert_close(tiny_vlm.next_token_loss(logits, ids, roles), -(p[1, 7].log() + p[2, 8].log()) / 2)


def test_gaze_is_the_attention_from_the_end_of_the_prompt_to_the_image(shipped):
    album = dialogues.album(3, 0)
    questions = dialogues.grounded(album, "where")
    maps = tiny_vlm.gaze(shipped, album, questions)
    assert maps.shape == (3, shipped.config.text_config.num_hidden_layers, 64) and (maps.sum(-1) <= 1).all()

    ids = torch.tensor([dialogues.prompt(questions[1].text)])
    layer, start = shipped.language_model.model.layers[0].self_attn, ids[0].tolist().index(dialogues.IDS["<image>"])
    with torch.no_grad():
        x = shipped.language_model.model.layers[0].input_layernorm(shipped.embed(ids, dialogues.pixels(album.images[1:2])))
        rotation = shipped.language_model.model.rotation(torch.arange(x.shape[1])[None], x.dtype)
        cos, sin = (torch.cat([part, part], -1) for part in rotation)
        turn = lambda t: t * cos + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * sin
        q, k = (turn(p(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)) for p in (layer.q_proj, layer.k_proj))
        p = (q @ k.mT / q.shape[-1] ** 0.5)[:, :, -1].softmax(-1)
    torch.testing.assert_close(maps[1, 0], p[0, :, start : start + 64].mean(0))


def test_share_on_the_target():
    cells = torch.full((1, 20), -1)
    cells[0, 3] = 5
    album = dialogues.Album(torch.zeros(1, 3, 48, 48, dtype=torch.uint8), torch.tensor([0]), cells)
    maps = torch.ones(1, 2, 8, 8)
    maps[:, 1, 2:4, 2:4] = 61
    shares = tiny_vlm.on_target(maps.flatten(2), album, [dialogues.Question(0, 3, "", "yes")])
    torch.testing.assert_close(shares, torch.tensor([[4 / 64, 244 / 304]]))


def test_the_probe_sees_what_is_drawn(monkeypatch):
    """With a tower whose patches tell their labels, it is right everywhere; with one that is blind, nowhere."""

    class Tower:
        config = tiny_vlm.build(tiny_vlm.SCALES["smoke"]).config

        def __init__(self, sharp: float):
            self.sharp = sharp

        def vision_tower(self, images, state):
            album = next(a for a in albums if len(a) == len(images) and torch.equal(dialogues.pixels(a.images), images))
            labels = torch.nn.functional.one_hot(album.patches, 21).float()
            return torch.cat([torch.zeros(len(labels), 1, 21), self.sharp * labels], 1)

    album = dialogues.album(20, 5)
    albums = [album, dialogues.album(300, tiny_vlm.TRAINING)]
    assert torch.equal(tiny_vlm.probe(Tower(1.0), album), album.present)
    assert not tiny_vlm.probe(Tower(0.0), album).any()
    assert tiny_vlm.names(album)[0] == {NAMES[c] for c in range(20) if album.cells[0, c] >= 0}
