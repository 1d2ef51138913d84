"""VAR against the authors' code (goldens), against the formula row by row, and what eval.py measures on models whose answers are known."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from common.attention import Site, controlled
from common.backbones.clip import CLIPVisionConfig
from common.backbones.llama import Cache, Llama, LlamaConfig
from common.backbones.llava import Llava, LlavaConfig
from common.data import dialogues
from common.errors import UserError
from papers.visual_attention_sink import eval as evaluation
from papers.visual_attention_sink import train as task
from papers.visual_attention_sink.model import (
    TAU,
    VAR,
    Implant,
    KnockOut,
    Observe,
    first_token,
    image_centric,
    redistribute,
    redistributing,
    sink_channels,
    sink_value,
)
from papers.visual_attention_sink.train import IMAGE, Config, background
from tests.controls import Record
from tests.goldens import Case, cases

CASES = cases("visual_attention_sink")
CORES = [case for case in CASES if "core_attn_in" in case.tensors]
LLAMAS = [case for case in CASES if "inputs_embeds" in case.tensors]
SITE = Site("layer", "self", 3, 4, None, None)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=tolerance)


# ---- goldens: the authors' p is the share that is kept, their rho bounds the share of the sinks ------------------------------------------


def official(call: dict, channels=(), tau=None) -> VAR:
    image = slice(call["im"], call["im"] + call["nv"])
    return VAR(image, channels, tau=tau, rho=1 - call["rho"], mass=call["summ"], p=1 - call["p"], official=True)


def rows_of(mask: torch.Tensor) -> set[tuple[int, ...]]:
    """(batch, head, query) of the chosen rows."""
    return set(map(tuple, mask[..., 0].nonzero().tolist()))


@pytest.mark.parametrize("case", CORES, ids=lambda case: case.name)
def test_golden_map(case: Case):
    t, a = case.tensors, case.tensors["core_attn_in"][None]
    var, sinks = official(case.meta["call"]), torch.zeros(1, a.shape[-1], dtype=torch.bool)
    sinks[0, t["core_sinks"]] = True
    var.begin(SITE.layer, sinks, torch.float64)
    chosen = image_centric(a, sinks[:, None, None], var.image, **var.select)
    assert rows_of(chosen) == set(map(tuple, t["core_selected_bhq"].tolist()))
    close(var.weights(SITE, a)[0], t["core_attn_out"], 1e-12)


@pytest.mark.parametrize("case", LLAMAS, ids=lambda case: case.name)
@pytest.mark.parametrize("bits", [32, 64])
@torch.no_grad()
def test_golden_llama(case: Case, bits: int):
    """Prompt and decoding steps: sinks, chosen rows, every map, all logits."""
    t, call, c = case.tensors, case.meta["call"], case.meta["constructor"]
    llama = Llama(LlamaConfig(**{name: value for name, value in c.items() if name != "max_position_embeddings"}))
    llama.load_state_dict(case.state("sd."))
    llama = llama.eval().to({32: torch.float32, 64: torch.float64}[bits])
    x = t["inputs_embeds"].to(llama.lm_head.weight.dtype)
    map_tolerance = {32: 1e-4, 64: 1e-6}[bits]
    close(llama(x)[0], t[f"base_logits_{bits}"], 1e-4)
    var, before, after, cache = official(call, call["dims"], call["tau"]), Record(), Record(), Cache()
    with controlled(llama, before), redistributing(llama, var, official=True), controlled(llama, after):
        close(llama(x, cache=cache)[0], t[f"prefill_logits_all_{bits}"], 1e-4)
        for layer in range(c["num_hidden_layers"]):
            close(after.maps[layer][0], t[f"prefill_attn_layer{layer}_{bits}"], map_tolerance)
            found = var.sinks.get(layer, torch.zeros(1, x.shape[1], dtype=torch.bool))
            assert found[0].nonzero()[:, 0].tolist() == t[f"sink_indices_layer{layer}"].tolist()
            if layer in var.sinks:
                chosen = image_centric(before.maps[layer], found[:, None, None], var.image, **var.select)
                assert rows_of(chosen) == set(map(tuple, t[f"selected_bhq_layer{layer}"].tolist()))
        for step, token in enumerate(t["decode_ids"].unbind(1)):
            after.maps.clear()
            close(llama(token[:, None], cache=cache)[0, 0], t["decode_logits_" + str(bits)][step], 1e-4)
            for name in t:
                if name.startswith(f"decode{step}_attn") and name.endswith(str(bits)):
                    layer = int(name.split("layer")[1].split("_")[0])
                    close(after.maps[layer][0], t[name], map_tolerance)


# ---- the formula, row by row ------------------------------------------------------------------------------------------------------------


def by_hand(a, sinks, image, first, tau_rho=(0.2, 0.5), p=0.6, receivers="image"):
    """Every row of a map with loops over its entries; `first` is the position of its first query."""
    mass, rho = tau_rho
    out = a.clone()
    for b, h, n in np.ndindex(*a.shape[:3]):
        row, keys = a[b, h, n].tolist(), range(a.shape[-1])
        seen = [j for j in keys if image.start <= j < image.stop]
        hot = [j for j in keys if j < sinks.shape[1] and sinks[b, j]]
        m = sum(row[j] for j in seen)
        if first + n < image.stop or m < mass or sum(row[j] for j in seen if j not in hot) / m < rho:
            continue
        to = [j for j in keys if j not in hot and {"image": j in seen, "text": j not in seen, "both": True}[receivers]]
        budget, total = p * sum(row[j] for j in hot), sum(row[j] for j in to)
        for j in keys:
            out[b, h, n, j] = (1 - p) * row[j] if j in hot else row[j] * (1 + budget / total) if j in to else row[j]
    return out


def causal_map(b, h, n, m, sharpness=2.0):
    logits = sharpness * torch.randn(b, h, n, m, dtype=torch.float64)
    return logits.masked_fill(torch.ones(n, m, dtype=torch.bool).triu(m - n + 1), -torch.inf).softmax(-1)


@pytest.mark.parametrize("receivers", ["image", "text", "both"])
@pytest.mark.parametrize("queries", [17, 1], ids=["prompt", "decoding"])
@pytest.mark.parametrize(("mass", "rho"), [(0.2, 0.5), (0.4, 0.8), (0.0, 0.0)])
def test_redistribution_row_by_row(receivers, queries, mass, rho):
    image, prompt, m = slice(3, 11), 17, 17 if queries > 1 else 20
    var = VAR(image, (0,), mass=mass, rho=rho, receivers=receivers, p=0.7)
    sinks = torch.zeros(2, prompt, dtype=torch.bool)
    sinks[0, [0, 4, 5]] = True  # the text's first token and two of the image; in the other sample one in the question
    sinks[1, [9, 13]] = True
    var.begin(SITE.layer, sinks, torch.float64)
    a = causal_map(2, 5, queries, m)
    found = var.weights(SITE, a)
    close(found, by_hand(a, sinks, image, m - queries, (mass, rho), 0.7, receivers), 1e-14)
    close(found.sum(-1), torch.ones(2, 5, queries), 1e-14)
    changed = (found != a).any(-1)
    assert changed.any() and not changed[:, :, : max(0, image.stop - (m - queries))].any()
    if rho >= 0.5:
        assert not changed.all()


def test_text_sinks_alone_are_recycled_but_not_by_the_authors_code():
    a, sinks, image = causal_map(1, 3, 9, 9), torch.zeros(1, 1, 1, 9, dtype=torch.bool), slice(2, 6)
    sinks[..., 0] = True
    assert image_centric(a, sinks, image, mass=0.0)[:, :, 6:].all()
    assert not image_centric(a, sinks, image, mass=0.0, official=True).any()


def test_nothing_moves_without_sinks_or_without_p():
    a = causal_map(1, 3, 9, 9)
    for hot, p in (([], 0.6), ([0, 3], 0.0)):
        var, sinks = VAR(slice(2, 6), (0,), p=p), torch.zeros(1, 9, dtype=torch.bool)
        sinks[0, hot] = True
        var.begin(SITE.layer, sinks, torch.float64)
        close(var.weights(SITE, a), a, 1e-15)


def test_a_budget_that_nobody_can_receive_stays():
    a, sinks = torch.tensor([[[[0.25, 0.75, 0.0, 0.0]]]]), torch.tensor([True, True, False, False])[None, None, None]
    found = redistribute(a, torch.ones(1, 1, 1, 1, dtype=torch.bool), sinks, ~sinks, 1.0)
    assert torch.equal(found, a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type_and_its_sums(dtype):
    var, a = VAR(slice(2, 12), (0,)), causal_map(1, 4, 3, 20).to(dtype)
    var.begin(SITE.layer, torch.arange(18)[None] % 6 == 0, dtype)
    found = var.weights(SITE, a)
    assert found.dtype == dtype and (found.float().sum(-1) - 1).abs().max() < 0.02 and not torch.equal(found, a)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"receivers": "images"}, "take image, text, both"), ({"p": 1.5}, "from 0 to 1"), ({"rho": -0.1}, "from 0 to 1")]
)
def test_wrong_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        VAR(slice(1, 2), (0,), **arguments)


# ---- in a model -------------------------------------------------------------------------------------------------------------------------


def small_llama(layers=5, width=32, heads=4) -> Llama:
    llama = Llama(LlamaConfig(40, width, 48, layers, heads)).double().eval()
    for name, p in llama.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    return llama


def hot_prompt(llama, image, hot, channels, b=1, n=16):
    """Embeddings in which the tokens `hot` are huge in some channels."""
    x = llama.embed(torch.randint(40, (b, n))).detach().clone()
    for j in hot:
        x[:, j, channels] = 60.0
    return x


def test_sink_value():
    x = torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    close(sink_value(x, (0, 1)), torch.tensor([4 / 2.5, 0.0]), 1e-6)
    close(sink_value(7 * x, (0, 2)), torch.tensor([3 / 2.5, 0.0]), 1e-6)
    close(sink_value(1000 * x.half(), (0, 1)), torch.tensor([4 / 2.5, 0.0]), 1e-3)
    assert sink_value(torch.eye(4096)[:1], (0,)).item() == pytest.approx(64, rel=0.01) and TAU * 64 == 20


def test_channels_of_the_first_token_are_found():
    llama = small_llama()
    llama.model.embed_tokens.weight.data[1, [7, 19]] = torch.tensor([50.0, -80.0], dtype=torch.float64)
    x = first_token(llama, 1)
    assert x.shape == (3, 32) and sink_channels(x) == (19, 7)
    with controlled(llama, Record()) as record:
        llama(torch.tensor([[1, 5, 6, 7]]))
    close(x, torch.stack(record.states[2:])[:, 0, 0], 1e-4)


@torch.no_grad()
def test_decoding_with_a_cache_is_the_pass_over_everything():
    """Sinks are found on the prompt, generated tokens are not tested and their rows change like those of the question."""
    llama, image, channels = small_llama(), slice(4, 12), [7, 19]
    x = hot_prompt(llama, image, (0, 5, 8), channels)
    new = llama.embed(torch.tensor([[3, 9, 30]])).detach()
    run = lambda: VAR(image, channels, tau=3.0, rho=0.2, mass=0.05)
    with redistributing(llama, run()):
        whole = llama(torch.cat([x, new], 1))[:, -3:]
    cache, var = Cache(), run()
    with redistributing(llama, var):
        llama(x, cache=cache)
        assert set(var.sinks) == {0, 1, 2, 3}  # all but the last
        assert all(sinks[0].nonzero()[:, 0].tolist() == [0, 5, 8] for sinks in var.sinks.values())
        steps = torch.cat([llama(token[:, None], cache=cache) for token in new.unbind(1)], 1)
    close(steps, whole, 1e-10)
    assert (whole - llama(torch.cat([x, new], 1))[:, -3:]).abs().max() > 1e-3


@torch.no_grad()
def test_a_new_prompt_has_new_sinks_and_samples_are_independent():
    llama, image, channels, var = small_llama(), slice(4, 12), [7, 19], VAR(slice(4, 12), [7, 19], tau=3.0, rho=0.2, mass=0.05)
    first, second = hot_prompt(llama, image, (0, 5, 8), channels), hot_prompt(llama, image, (0, 11), channels)
    with redistributing(llama, var):
        both = llama(torch.cat([first, second]))
        alone = [llama(first), llama(second)]
        assert var.sinks[2][0].nonzero()[:, 0].tolist() == [0, 11]
    close(both, torch.cat(alone), 1e-10)


@torch.no_grad()
def test_head_by_head_is_the_same():
    llama, image, channels = small_llama(), slice(4, 12), [7, 19]
    x, found = hot_prompt(llama, image, (0, 5), channels, b=2), []
    for control in (VAR, evaluation.HeadByHead, evaluation.Counting):
        with redistributing(llama, control(image, channels)):
            found.append(llama(x))
    close(found[0], found[1], 1e-12)
    assert torch.equal(found[0], found[2])


def test_changed_rows_are_counted():
    """One head looks at the image, the other does not; the third row has the text's first token alone to give away."""
    a = torch.zeros(1, 2, IMAGE.stop + 2, IMAGE.stop + 2)
    a[..., 0] = 1.0
    a[0, 0, IMAGE.stop, [0, IMAGE.start]] = 0.5
    var = evaluation.Counting(IMAGE, (0,))
    var.begin(SITE.layer, (torch.arange(IMAGE.stop + 2) == 0)[None], torch.float32)
    var.weights(SITE, a)
    assert var.changed == [0.25]


@torch.no_grad()
def test_knocked_out_tokens_are_not_looked_at_by_the_text_after_the_image():
    llama, image = small_llama(layers=2), slice(4, 12)
    tokens = torch.zeros(2, 1, 12, dtype=torch.bool)
    tokens[0, 0, [5, 6]] = tokens[1, 0, 9] = True
    x, cache, seen, plain = llama.embed(torch.randint(40, (1, 16))), Cache(), Record(), Record()
    with controlled(llama, plain):
        llama(x)
    with controlled(llama, KnockOut(image, tokens)), controlled(llama, seen):
        llama(x, cache=cache)
        llama(x[:, :1], cache=cache)
    close(seen.maps[0][:, :, :12], plain.maps[0][:, :, :12], 1e-14)
    expected = plain.maps[0][:, :, 12:].clone()
    expected[..., [5, 6]] = 0
    close(seen.maps[0][:, :, 12:], expected / expected.sum(-1, keepdim=True), 1e-12)
    for layer, step in ((0, 0), (1, 0), (0, 2), (1, 2)):
        late = seen.maps[layer + step][:, :, 12 if step == 0 else 0 :]
        assert ((late == 0).all((0, 1, 2)).nonzero()[:, 0].tolist()) == ([5, 6], [9])[layer]


@torch.no_grad()
def test_observations_by_hand():
    llama, image = small_llama(layers=2), slice(2, 6)
    x = llama.embed(torch.randint(40, (1, 9)))
    with controlled(llama, Record()) as record, controlled(llama, Observe(llama, image, (1, 3))) as seen:
        llama(x)
    for layer in range(2):
        block, state, a = llama.model.layers[layer], record.states[layer][0], record.maps[layer][0]
        normed = block.input_layernorm(state)
        for k, j in enumerate(range(2, 6)):
            looks, adds = [], []
            for h, i in np.ndindex(4, 3):
                w_ov = block.self_attn.v_proj.weight[8 * h : 8 * h + 8].T @ block.self_attn.o_proj.weight[:, 8 * h : 8 * h + 8].T
                looks.append(a[h, 6 + i, j].item())
                adds.append((a[h, 6 + i, j] * normed[j] @ w_ov).norm().item())
            assert seen.attention[layer][0, k].item() == pytest.approx(np.mean(looks), rel=1e-9)
            assert seen.contribution[layer][0, k].item() == pytest.approx(np.mean(adds), rel=1e-9)
            assert seen.phi[layer][0, k].item() == pytest.approx(state[j, [1, 3]].abs().max().item() / state[j].pow(2).mean().sqrt().item(), rel=1e-4)


@torch.no_grad()
def test_implants_have_a_large_phi_and_take_a_share_that_grows_with_b():
    llama, image = small_llama(), slice(4, 12)
    implant, x = Implant(llama, image, (7, 19), 10.0).double(), 0.5 * torch.randn(2, 16, 32, dtype=torch.float64)
    implant.places, taken = torch.tensor([[5, 8], [11, 4]]), []
    for b in (-50.0, 0.0, 50.0):
        implant.b.data.fill_(b)
        with controlled(llama, implant), controlled(llama, Record()) as record:
            llama(x)
        taken.append(torch.stack(implant.shares))
        a = record.maps[3][:, :, 12:, 4:12]
        by_hand = torch.stack([a[0][..., [1, 4]].sum(-1) / a[0].sum(-1), a[1][..., [7, 0]].sum(-1) / a[1].sum(-1)]).mean((0, 2))
        close(implant.shares[3], by_hand, 1e-12)
    assert taken[0].shape == (5, 4) and (taken[0] < 1e-6).all() and (taken[2] > 1 - 1e-6).all() and (taken[1] > 0.01).all()
    with controlled(llama, implant), controlled(llama, Record()) as record:
        llama(x)
    change, rms = record.states[0] - x, x.square().mean(-1).sqrt()
    assert [row.nonzero().tolist() for row in change] == [[[5, 7], [5, 19], [8, 7], [8, 19]], [[4, 7], [4, 19], [11, 7], [11, 19]]]
    close(change[0, 5, 7], 10 * rms[0, 5], 1e-12)


# ---- what is asked and measured ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> Llava:
    return Llava.from_pretrained("tiny")


def test_the_image_lies_where_the_prompts_have_it():
    ids = dialogues.prompt(dialogues.question("caption"))
    assert [i for i, token in enumerate(ids) if token == dialogues.IDS[dialogues.IMAGE]] == list(range(IMAGE.start, IMAGE.stop))


def test_answers_are_those_of_the_plain_function_and_settings_are_told_their_scenes(shipped):
    album = dialogues.album(5, 1)
    questions, told = dialogues.grounded(album, "what")[::-1], []

    @contextmanager
    def setting(scenes):
        told.append(scenes.tolist())
        yield

    assert task.ask(shipped, album, questions, setting, 2, batch=2) == dialogues.answers(shipped, album, questions, longest=2)
    assert told == [[4, 3], [2, 1], [0]]


def test_log_odds_are_those_of_the_model_and_agree_with_what_it_says(shipped):
    test = task.exam(Config(scenes=6), 3)
    asked, exists = [q for part in test.existence.values() for q in part], task.Existence(shipped, test)
    with torch.no_grad():
        ids = torch.tensor([dialogues.prompt(q.text) for q in asked])
        logits = shipped(ids, dialogues.pixels(test.album.images[[q.scene for q in asked]]))[:, -1].log_softmax(-1)
    found = exists.log_odds(task.plain)
    close(found, logits[:, dialogues.IDS["yes"]] - logits[:, dialogues.IDS["no"]], 1e-4)
    assert ["yes" if x > 0 else "no" for x in found] == dialogues.answers(shipped, test.album, asked, longest=1)
    assert exists(task.plain)["change"] == 0


def test_accuracy_weighs_the_splits_apart(monkeypatch, shipped):
    """Sure and right, but for adversarial questions, on which it says yes with 0.9."""
    test = task.exam(Config(scenes=12), 3)
    n = len(test.existence["yes"])
    exists, odds = task.Existence(shipped, test), torch.tensor([50.0] * n + [-50.0] * 2 * n + [np.log(9.0)] * n)
    exists.usual = odds - torch.tensor([2.0, -1.0] * 2 * n)
    monkeypatch.setattr(exists, "log_odds", lambda setting: odds)
    expected = {"random": 100, "popular": 100, "adversarial": 50, "accuracy": 250 / 3, "belief": (200 + 55) / 3, "change": 1.5}
    assert exists(None) == pytest.approx(expected, rel=1e-5)


def test_an_exam_asks_about_what_is_there_and_what_is_not():
    album, existence, what, captions = task.exam(Config(scenes=30), 1)
    assert set(existence) == {"yes", *task.SPLITS} and len({len(part) for part in existence.values()}) == 1
    for name, part in existence.items():
        assert all(album.present[q.scene, q.category].item() == (name == "yes") for q in part)
    assert len(what) == len(captions) == 30


def test_places_lie_on_the_background():
    album = dialogues.album(20, 5)
    places = background(album, 3, 0)
    assert (album.patches.gather(1, places - IMAGE.start) == 20).all() and (places.sort(1).values.diff(dim=1) > 0).all()
    assert not torch.equal(places, background(album, 3, 1))


def test_shuffling_keeps_the_numbers_and_what_layers_share():
    tokens = torch.rand(3, 50, 64) < 0.2
    tokens[1] = tokens[0]
    found = evaluation.shuffled(tokens, 1)
    assert torch.equal(found.sum(-1), tokens.sum(-1)) and torch.equal(found[0], found[1]) and not torch.equal(found[0], tokens[0])
    assert torch.equal((found[0] & found[2]).sum(-1), (tokens[0] & tokens[2]).sum(-1))


def test_portrait_of_a_known_scene():
    """64 tokens with φ = 0..63 / 10 and attention that doubles for the 8 largest, which lie on a thing."""
    phi = (torch.arange(64) / 10).expand(3, 1, 64)
    attention = 1 + (torch.arange(64) >= 56).float().expand(3, 1, 64) + 1e-4 * phi
    patches = torch.full((1, 64), 20)
    patches[0, 56:] = 3
    found = evaluation.portrait(evaluation.Seen(phi, attention, attention), patches, tau=6.0)
    assert found["sinks_per_image"][f"{TAU:.4g}"] == [4.0] and found["correlation"] == pytest.approx(1)
    assert found["attention_ratio"] == pytest.approx(2 / (1 + 8 / 64), rel=1e-3) and found["contribution_ratio"] == pytest.approx(2, rel=1e-3)
    assert (
        found["top_on_background"] == 0
        and found["background"] == pytest.approx(56 / 64)
        and found["top_3_attention"] == pytest.approx(6 / 72, rel=1e-3)
    )


def test_decoding_is_timed_over_as_many_tokens_for_all(shipped, monkeypatch):
    calls = []
    monkeypatch.setattr(
        type(shipped.language_model), "generate", lambda self, x, max_new_tokens: calls.append((self.config.end_tokens, max_new_tokens))
    )
    found = evaluation.decoding_time(shipped, (0, 1), tokens=5, repeats=1)
    assert len(calls) >= 3 and all(call == ([], 5) for call in calls)
    assert list(found) == ["greedy", "VAR", "VAR head by head"] and shipped.language_model.config.end_tokens == [2]


# ---- published layouts ------------------------------------------------------------------------------------------------------------------


def published_llava(directory, words):
    """A LLaVA directory with a tokenizer of whole words that begins every text with <s>."""
    names = ["<unk>", "<s>", "</s>", "<image>", *words]
    text = LlamaConfig(len(names), 32, 48, 5, 4, eos_token_id=2)
    vision = CLIPVisionConfig(24, 40, 3, 4, 16, 8)
    llava = Llava(LlavaConfig(text, vision, image_token_index=3)).eval()
    for name, p in llava.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    llava.save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names[1:4]])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return llava


def benchmark(root, lines, category="pope"):
    (root / "Questions").mkdir(parents=True, exist_ok=True)
    (root / "Images").mkdir(exist_ok=True)
    Image.new("RGB", (20, 12), (200, 30, 60)).save(root / "Images/a.jpg")
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (root / "Questions" / f"{category}-questions.jsonl").write_text(text)
    return root


def test_question_files_with_either_name_of_a_key(tmp_path):
    benchmark(tmp_path, [{"qid": 1, "image": "a.jpg", "text": "Is it?", "label": "yes"}, {"question_id": "2", "image": "a.jpg", "prompt": "Was it?"}])
    benchmark(tmp_path, [{"question_id": 7, "image": "b/c.jpg", "question": "What?", "answer": "cat"}, ""], "gqa")
    found = task.question_files(tmp_path)
    assert found == {
        "gqa": [task.Item("7", tmp_path / "Images/b/c.jpg", "What?", "cat")],
        "pope": [task.Item("1", tmp_path / "Images/a.jpg", "Is it?", "yes"), task.Item("2", tmp_path / "Images/a.jpg", "Was it?", None)],
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2 is not a json object"), ("[1]", "line 2 is not a json object"), ('{"qid": 1, "text": "x"}', "line 2 lacks image")],
)
def test_bad_question_files_are_named(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        task.question_files(benchmark(tmp_path, [{"qid": 1, "image": "a.jpg", "text": "x"}, line]))


def test_missing_question_files_and_broken_images(tmp_path):
    with pytest.raises(UserError, match="give a directory with Questions/ and Images/"):
        task.question_files(tmp_path)
    with pytest.raises(UserError, match="holds no question"):
        task.question_files(benchmark(tmp_path / "empty", ["", ""]))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    for name in ("broken.jpg", "absent.jpg"):
        with pytest.raises(UserError, match="cannot be read as an image"):
            task.picture(tmp_path / name, 16)


def test_a_picture_is_padded_to_a_square(tmp_path):
    Image.new("RGB", (40, 20), (255, 255, 255)).save(tmp_path / "wide.png")
    pixels = task.picture(tmp_path / "wide.png", 16)[0]
    assert pixels.shape == (3, 16, 16) and pixels[:, 8, 8].min() > 1.9 and pixels[:, 0].abs().max() < 0.02 and pixels[:, 15].abs().max() < 0.02


@pytest.mark.parametrize(
    ("answers", "labels", "expected"),
    [
        (["Yes, it is.", "No."], ["yes", "Yes"], {"accuracy": 0.5, "recall": 0.5}),
        (["A cat. ", "dog"], ["a cat", "cow"], {"accuracy": 0.5}),
        (["x"], [None], {}),
    ],
)
def test_scores(answers, labels, expected):
    found = task.score(answers, labels)
    assert {name: found[name] for name in expected} == expected and bool(found) == bool(expected)


def test_a_published_llava_on_question_files(tmp_path):
    """Answers are those of generation with and without VAR on the expanded prompt; all are kept."""
    llava = published_llava(tmp_path / "llava", ["USER", ":", "ASSISTANT", "is", "it", "red", "?", "yes", "no"])
    benchmark(tmp_path / "data", [{"qid": i, "image": "a.jpg", "text": text, "label": "no"} for i, text in enumerate(["is it red ?", "red ?"])])
    cfg = Config(weights=tmp_path / "llava", data=str(tmp_path / "data"), out=tmp_path / "out", max_new_tokens=4, limit=1, device="cpu")
    found = evaluation.evaluate_published(cfg)
    tokenizer = Tokenizer.from_file(str(tmp_path / "llava/tokenizer.json"))
    ids = tokenizer.encode("USER : is it red ? ASSISTANT :").ids
    ids[3:3] = [3] * 4
    with torch.no_grad():
        new = llava.generate(torch.tensor([ids]), task.picture(tmp_path / "data/Images/a.jpg", 16), max_new_tokens=4)
    said = [json.loads(line) for line in (tmp_path / "out/pope-greedy.jsonl").read_text().splitlines()]
    assert said == [{"qid": "0", "answer": tokenizer.decode(new[0].tolist()).strip()}]
    assert len((tmp_path / "out/pope-VAR.jsonl").read_text().splitlines()) == 1
    assert {"pope, greedy: accuracy", "pope, VAR: f1"} <= set(found) and len(found["D_sink"]) == 2 and len(found["pope: image sinks per layer"]) == 4
    with pytest.raises(UserError, match="tokenizer.json"):
        (tmp_path / "llava/tokenizer.json").unlink()
        evaluation.evaluate_published(cfg)
