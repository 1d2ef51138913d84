"""StyleID against the authors' code (goldens), closed forms, brute force, and files in the published layouts."""

import math
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from common import cli
from common.attention import controlled
from common.backbones.clip import CLIPText, CLIPTextConfig
from common.backbones.sd_unet import TokenAttention, UNet2DConditionModel, UNetConfig
from common.backbones.sd_unet import published_name as unet_name
from common.backbones.sd_vae import AutoencoderConfig, AutoencoderKL
from common.backbones.sd_vae import published_name as vae_name
from common.data import scenes
from common.diffusion import Schedule, ddim_timesteps, guided, sample
from common.errors import UserError
from common.pretrain import tiny_sd
from papers.style_injection import eval as evaluation
from papers.style_injection import model as styleid
from papers.style_injection import train as training
from papers.style_injection.model import Inject, Record, Setting, StyleID, adain, cfsd, colour_histogram, from_original, histogram_loss
from papers.style_injection.train import Config
from tests.goldens import Case, cases
from tests.test_sd_unet import original_names as unet_names
from tests.test_sd_vae import original_names as vae_names

CASES = cases("style_injection")
ATTENTION = [case for case in CASES if "constructor" in case.meta]
PIPELINES = [case for case in CASES if "unet_config" in case.meta]
BITS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


# ---- goldens ----------------------------------------------------------------------------------------------------------------------------


def build_attention(case: Case, dtype: torch.dtype) -> TokenAttention:
    """Whose inner width need not be that of the tokens."""
    layer, weights = TokenAttention(case.meta["constructor"]["query_dim"], case.meta["constructor"]["heads"]), case.state("w/")
    for name in ("to_q", "to_k", "to_v"):
        setattr(layer, name, nn.Linear(*weights[f"{name}.weight"].shape[::-1], bias=False))
    layer.to_out[0] = nn.Linear(*weights["to_out.0.weight"].shape[::-1])
    layer.load_state_dict(weights)
    return layer.to(dtype)


class Weights:
    """The last map."""

    def weights(self, site, p):
        self.p = p.detach()


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
@BITS
def test_golden_attention(case, dtype):
    bits = f"f{torch.finfo(dtype).bits}"
    tolerance, expected = case.meta["tolerance"][bits], lambda name: case.tensors[f"{name}_{bits}"]
    layer, config = build_attention(case, dtype), case.meta["config"]
    x = case.tensors["x"].to(dtype).requires_grad_()
    recorded = []
    with torch.no_grad():
        for image in ("x_content", "x_style"):
            with controlled(layer, Record()) as record:
                layer(case.tensors[image].to(dtype))
            recorded.append(record.features)
    ([content], [style]) = (features.values() for features in recorded)
    for name, found in {"q_content": content["q"], "k_style": style["k"], "v_style": style["v"]}.items():
        close(found[0], expected(name), tolerance)
    close(layer(x), expected("out_plain"), tolerance)

    pairs = torch.zeros(len(x), 2, dtype=torch.long)
    with controlled(layer, Inject(*recorded, pairs, config["gamma"], config["T"])), controlled(layer, Weights()) as seen:
        out = layer(x)
    close(out, expected("out_inject"), tolerance)
    close(seen.p.flatten(0, 1), expected("attn_inject"), tolerance)
    (gradient,) = torch.autograd.grad((out * case.tensors["grad_probe"].to(dtype)).sum(), x)
    close(gradient, expected("grad_x"), tolerance)
    with controlled(layer, Inject(*recorded, pairs, 0.0, config["T"])):
        close(layer(x), expected("out_kv_only"), tolerance)
    # the latents are stored in float32, but what is expected in float64 was computed before they were rounded
    z = adain(case.tensors["zT_content"].to(dtype), case.tensors["zT_style"].to(dtype))
    close(z, expected("zT_adain"), case.meta["tolerance"]["f32"])


@pytest.mark.parametrize("case", PIPELINES, ids=lambda case: case.name)
@torch.no_grad()
def test_golden_pipeline(case):
    t, config, tolerance = case.tensors, case.meta["config"], case.meta["tolerance"]["f32"]
    unet = UNet2DConditionModel.from_config(case.meta["unet_config"])
    unet.load_state_dict(case.state("w/"))
    unet.eval()
    close(unet(t["probe_x"], torch.tensor([321]), t["context"]), t["eps_probe_f32"], tolerance)
    method = StyleID(
        unet, {"encoder_hidden_states": t["context"]}, Schedule(), config["diffusers_modules"],
        steps=config["steps"], at="current", skip=config["steps"] - config["start_step"],
    )  # fmt: skip
    content, style = method.invert(t["z0_content"], "q"), method.invert(t["z0_style"], "kv")
    close(content.z, t["zT_content_f32"], tolerance)
    close(style.z, t["zT_style_f32"], tolerance)
    close(adain(content.z, style.z), t["zT_adain_f32"], tolerance)
    full = {"gamma": config["gamma"], "tau": config["T"]}
    settings = {
        "stylised": Setting(**full), "no_adain": Setting(**full, adain=False),
        "no_injection": Setting(inject=False), "reconstruction": Setting(inject=False, adain=False),
    }  # fmt: skip
    for name, setting in settings.items():
        close(method.stylise(content, style, setting=setting), t[f"z0_{name}_f32"], tolerance)


# ---- the parts in closed form -----------------------------------------------------------------------------------------------------------


def test_adain_moves_the_statistics_and_nothing_else():
    content, style = torch.randn(3, 5, 6, 4).double(), 3 * torch.randn(3, 5, 2, 7).double() + 1
    out = adain(content, style)
    close(out.mean((2, 3)), style.mean((2, 3)), 1e-12)
    close(out.std((2, 3)), style.std((2, 3)), 1e-12)
    normal = lambda z: (z - z.mean((2, 3), keepdim=True)) / z.std((2, 3), keepdim=True)
    close(normal(out), normal(content), 1e-12)
    close(adain(content, content), content, 1e-12)


@pytest.fixture
def attention():
    """A layer, and what it recorded of two contents and three styles; all in float64."""
    layer = TokenAttention(24, 3).double()
    recorded = []
    for n in (2, 3):
        with controlled(layer, Record()) as record:
            layer(torch.randn(n, 7, 24).double())
        recorded.append(record.features)
    return layer, *recorded


def injected(layer, content, style, pairs, x, **parts):
    with controlled(layer, Inject(content, style, torch.tensor(pairs), **parts)):
        return layer(x)


def test_each_sample_gets_its_own_pair_by_hand(attention):
    layer, content, style = attention
    pairs, x = [[1, 2], [0, 0], [1, 0]], torch.randn(3, 7, 24).double()
    out = injected(layer, content, style, pairs, x, gamma=0.6, tau=1.3)
    ([c], [s]) = (features.values() for features in (content, style))
    for i, (a, b) in enumerate(pairs):
        heads = []
        for h in range(3):
            q = 0.6 * c["q"][a, h] + 0.4 * (x[i] @ layer.to_q.weight.T)[:, 8 * h : 8 * h + 8]
            heads.append((1.3 * q @ s["k"][b, h].T / math.sqrt(8)).softmax(-1) @ s["v"][b, h])
        close(out[i], layer.to_out(torch.cat(heads, 1)), 1e-12)


def test_gamma_1_ignores_the_running_query_and_0_the_content(attention):
    layer, content, style = attention
    x, y, pairs = *torch.randn(2, 1, 7, 24).double(), [[0, 1]]
    assert torch.equal(injected(layer, content, style, pairs, x, gamma=1.0), injected(layer, content, style, pairs, y, gamma=1.0))
    out = injected(layer, content, style, pairs, x, gamma=0.0)
    assert torch.equal(out, injected(layer, content, style, [[1, 1]], x, gamma=0.0))
    assert not torch.allclose(out, injected(layer, content, style, pairs, y, gamma=0.0))


def test_an_image_in_its_own_style_is_left_alone_at_tau_1(attention):
    layer = attention[0]
    x = torch.randn(1, 7, 24).double()
    with controlled(layer, Record()) as record:
        plain = layer(x)
    for gamma in (0.0, 0.75, 1.0):
        close(injected(layer, record.features, record.features, [[0, 0]], x, gamma=gamma, tau=1.0), plain, 1e-12)


def test_tau_goes_from_the_mean_of_the_values_to_the_nearest_one(attention):
    layer, content, style = attention
    x, [c], [s] = torch.randn(1, 7, 24).double(), content.values(), style.values()
    merged = lambda heads: layer.to_out(heads.transpose(1, 2).flatten(2))
    v = s["v"][:1]
    close(injected(layer, content, style, [[0, 0]], x, tau=0.0), merged(v.mean(2, keepdim=True).expand_as(v)), 1e-12)
    nearest = (c["q"][:1] @ s["k"][:1].mT).argmax(-1)
    close(injected(layer, content, style, [[0, 0]], x, gamma=1.0, tau=1e6), merged(v.gather(2, nearest[..., None].expand_as(v))), 1e-9)


# ---- the pipeline -----------------------------------------------------------------------------------------------------------------------

LEVELS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}


def small_unet() -> UNet2DConditionModel:
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 6}
    return UNet2DConditionModel(UNetConfig(**sizes, **LEVELS)).eval()


def small_method(**options) -> StyleID:
    unet = small_unet()
    return StyleID(unet, {"encoder_hidden_states": torch.randn(1, 3, 6)}, Schedule(), styleid.decoder_layers(unet)[-2:], **options)


def test_the_injected_layers_of_stable_diffusion():
    """Output blocks 6 to 11 of 0 to 11, which diffusers calls up_blocks.{b // 3}.attentions.{b % 3}."""
    with torch.device("meta"):
        names = styleid.decoder_layers(UNet2DConditionModel(UNetConfig()))
    assert names == tuple(f"up_blocks.{b // 3}.attentions.{b % 3}.transformer_blocks.0.attn1" for b in range(3, 12))


class Heads:
    """The query that each injected call used."""

    def __init__(self):
        self.q = {}

    def heads(self, site, o, q):
        self.q[site.name, site.step] = q


@pytest.mark.parametrize(("at", "skip"), [("next", 0), ("current", 1)])
def test_features_meet_the_timestep_at_which_they_were_recorded(at, skip):
    """With γ = τ = 1 the query of every sampling step is the content's, recorded at the call with the same t."""
    method = small_method(steps=5, at=at, skip=skip)
    asked = []
    method.unet.register_forward_pre_hook(lambda module, args: asked.append(int(args[1][0])))
    content, style = method.invert(torch.randn(2, 4, 8, 8)), method.invert(torch.randn(1, 4, 8, 8))
    grid = ddim_timesteps(Schedule(), 5)
    assert asked == grid[::-1] * 2 and {step for _, step in content.features} == set(range(5))
    asked.clear()
    with controlled(method.unet, Heads(), method.injected) as seen:
        method.stylise(content, style, torch.tensor([[1, 0]]), Setting(gamma=1.0, tau=1.0))
    assert asked == grid[skip:] and len(seen.q) == 2 * (5 - skip)
    for key, q in seen.q.items():
        assert torch.equal(q, content.features[key]["q"][1:])


def test_only_the_injected_layers_change():
    """In the first step, all calls before the injected ones ask what they ask without them; and each part is kept only where it is wanted."""
    method = small_method(steps=2)
    content, style = method.invert(torch.randn(1, 4, 8, 8), "q"), method.invert(torch.randn(1, 4, 8, 8), "kv")
    assert {name for name, _ in content.features} == set(method.layers)
    assert all(set(kept) == {"q"} for kept in content.features.values()) and all(set(kept) == {"k", "v"} for kept in style.features.values())
    asked = []
    for inject in (True, False):
        with controlled(method.unet, Heads()) as seen:
            method.stylise(content, style, setting=Setting(inject=inject))
        asked.append({name: q for (name, step), q in seen.q.items() if step == 0})
    same = {name for name, q in asked[0].items() if torch.equal(q, asked[1][name])}
    before = [name for name in asked[0] if name.startswith(("down", "mid"))]
    assert len(before) == 6 and same >= set(before) and not same & set(method.layers)
    assert all(not layer.controls for layer in method.unet.modules() if isinstance(layer, TokenAttention))


def test_a_batch_of_pairs_is_each_pair_alone():
    method = small_method(steps=3)
    content, style = method.invert(torch.randn(2, 4, 8, 8)), method.invert(torch.randn(3, 4, 8, 8))
    pairs = torch.tensor([[0, 2], [1, 0], [1, 2]])
    together = method.stylise(content, style, pairs)
    for i in range(3):
        close(method.stylise(content, style, pairs[i : i + 1]), together[i : i + 1], 1e-4)
    assert (together[0] - together[2]).abs().max() > 1e-2 and (together[1] - together[2]).abs().max() > 1e-2


def test_without_injection_and_adain_an_image_comes_back():
    """With a network that always predicts the same noise, inversion and sampling are exact."""
    method = small_method(steps=6)
    nn.init.zeros_(method.unet.conv_out.weight)
    z0 = torch.randn(2, 4, 8, 8)
    inverted = method.invert(z0)
    close(method.stylise(inverted, inverted, torch.tensor([[0, 1], [1, 0]]), Setting(inject=False, adain=False)), z0, 1e-4)
    close(method.stylise(inverted, inverted, torch.tensor([[0, 0]])), z0[:1], 1e-4)


def test_wrong_numbers_are_refused():
    method, model = small_method(steps=2), tiny_sd.build()
    inverted = method.invert(torch.randn(1, 4, 8, 8))
    for pair in ([0, 1], [-1, 0]):
        with pytest.raises(ValueError, match="pairs must name contents below 1 and styles below 1"):
            method.stylise(inverted, inverted, torch.tensor([pair]))
    for layers in (0, 50):
        with pytest.raises(UserError, match=rf"--layers {layers}: this model's decoder has \d+ self-attentions, give 1 to"):
            StyleID.of(model, layers)
    assert len(StyleID.of(model).layers) == round(2 * len(styleid.decoder_layers(model.unet)) / 3)
    assert StyleID.of(model, 1).layers == styleid.decoder_layers(model.unet)[-1:]


# ---- measures ---------------------------------------------------------------------------------------------------------------------------


def test_the_paper_s_art_fid():
    assert styleid.art_fid(0.5055, 18.131) == pytest.approx(28.801, abs=2e-3)


def test_cfsd_by_hand():
    a, b = torch.randn(2, 2, 5, 2, 3).double()
    expected = []
    for x, y in zip(a, b, strict=True):
        total = 0.0
        p, q = (np.array([[sum(f[c].flatten()[i] * f[c].flatten()[j] for c in range(5)) / 25 for j in range(6)] for i in range(6)]) for f in (x, y))
        p, q = (np.exp(s) / np.exp(s).sum(1, keepdims=True) for s in (p, q))
        for i in range(6):
            total += sum(p[i, j] * math.log(p[i, j] / q[i, j]) for j in range(6))
        expected.append(total)
    close(cfsd(a, b), torch.tensor(expected), 1e-10)
    assert cfsd(a, a).abs().max() < 1e-12 and (cfsd(a, b) > 0).all()


def test_colour_histogram_by_hand():
    image, bins = torch.rand(1, 3, 2, 2).double(), 5
    expected = np.zeros((3, bins, bins))
    for r, g, b in image[0].flatten(1).T.tolist():
        log = lambda x, y: math.log(x + 1e-6) - math.log(y + 1e-6)
        places = [(log(r, g), log(r, b)), (log(g, r), log(g, b)), (log(b, r), log(b, g))]
        for j, (x, y) in enumerate(places):
            for k, u in enumerate(np.linspace(-3, 3, bins)):
                for m, v in enumerate(np.linspace(-3, 3, bins)):
                    weight = 1 / (1 + (abs(x - u) / 0.02) ** 2) / (1 + (abs(y - v) / 0.02) ** 2)
                    expected[j, k, m] += math.sqrt(r * r + g * g + b * b + 1e-6) * weight
    close(colour_histogram(image, bins)[0], torch.from_numpy(expected / expected.sum()), 1e-9)


def test_histogram_loss_tells_colours_apart_and_not_places():
    red, blue = torch.tensor([0.9, 0.1, 0.1])[:, None, None].expand(3, 4, 4), torch.tensor([0.1, 0.1, 0.9])[:, None, None].expand(3, 4, 4)
    half = torch.cat([red[:, :2], blue[:, :2]], 1)
    a, b, mixed, mirrored = colour_histogram(torch.stack([red, blue, half, half.flip(1)])).unbind(0)
    loss = lambda x, y: histogram_loss(x[None], y[None]).item()
    assert loss(a, a) == 0 and loss(mixed, mirrored) < 1e-3 and 0.9 < loss(a, b) <= 1
    assert loss(a, mixed) < loss(a, b)
    assert colour_histogram(red[None]).sum().item() == pytest.approx(1)


def test_edges_and_rank_correlation():
    instances = torch.zeros(1, 4, 4, dtype=torch.uint8)
    instances[0, :, 1:] = 1
    instances[0, 2:, 2:] = 2
    assert evaluation.has_edge(instances, 2).tolist() == [[True, False, True, False]]
    assert evaluation.rank_correlation((0, 1, 2), [3.0, 5.0, 4.0]) == pytest.approx(0.5)
    assert evaluation.rank_correlation((0, 1, 2), [3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert evaluation.rank_correlation((0, 1), [1.0, 1.0]) == 0


# ---- the small experiment -----------------------------------------------------------------------------------------------------------------


def test_material():
    cfg = Config(contents=3, styles=8)
    made, other = training.material(cfg, 5), training.material(cfg, 6)
    assert [scene.style for scene in made.styles.scenes] == list(scenes.STYLES) * 2
    assert len({scene.hue for scene in made.styles.scenes}) == 8
    assert all(scene.style == "" for scene in made.contents.scenes) and len(made.pairs) == 24 and made.pairs[9].tolist() == [1, 1]
    assert not torch.equal(made.contents.images, other.contents.images) and not torch.equal(made.styles.images, other.styles.images)


def test_redrawing_starts_at_its_level():
    """Under its own empty prompt guidance changes nothing: the samples are those of DDIM from the noisy content."""
    model, cfg = tiny_sd.build().eval(), Config(sampling=10, level=600)
    z0, noise = model.noise(2, 0), model.noise(2, 1)
    asked = []
    model.unet.register_forward_pre_hook(lambda module, args: asked.append(int(args[1][0])))
    with torch.no_grad():
        out = training.redrawn(cfg, model, z0, noise, model.unconditional(2))
        assert asked == ddim_timesteps(model.schedule, 10)[4:]
        a = model.schedule.alphas_cumprod[501]
        z = a.sqrt() * z0 + (1 - a).sqrt() * noise
        close(out, sample(guided(model.unet, model.unconditional(2)), z, model.schedule, 10, start=4), 1e-4)


def test_prompts_start_empty_and_are_fitted_each_to_its_image():
    model = tiny_sd.build().requires_grad_(False)
    prompts = training.LearntPrompts(model, 3)
    close(prompts.context[2:], model.unconditional(1)["encoder_hidden_states"], 1e-6)
    nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    training.prompt_loss(model)(prompts, (model.noise(2, 0), torch.tensor([0, 2]))).backward()
    assert prompts.context.grad.abs().amax((1, 2)).gt(0).tolist() == [True, False, True]
    assert all(p.grad is None for p in model.parameters())


# ---- real weights and images ------------------------------------------------------------------------------------------------------------

SMALL_VAE = AutoencoderConfig(block_out_channels=(4, 8, 16, 16), norm_num_groups=4)
SMALL_TEXT = CLIPTextConfig(hidden_size=6, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=5)
FOUR_LEVELS = UNetConfig(sample_size=8, block_out_channels=(4, 8, 8, 8), norm_num_groups=4, attention_head_dim=2, cross_attention_dim=6)


@pytest.fixture
def original():
    """Small parts, and the one file in which Stable Diffusion 1 first came: other names, an EMA, buffers, kernels instead of matrices."""
    parts = UNet2DConditionModel(FOUR_LEVELS), AutoencoderKL(SMALL_VAE), CLIPText(SMALL_TEXT)
    unet, vae, text = (part.state_dict() for part in parts)
    state = {f"model.diffusion_model.{name}": unet[unet_name(name)] for name in unet_names(FOUR_LEVELS)}
    state |= {f"model_ema.{name.replace('.', '')}": torch.zeros(1) for name in unet}
    for name in vae_names():
        weight = vae[vae_name(name)]
        state[f"first_stage_model.{name}"] = weight[..., None, None].clone() if ".attn_1." in name and weight.ndim == 2 else weight
    state |= {f"cond_stage_model.transformer.{name}": t for name, t in text.items()}
    state |= {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(5)[None], "betas": torch.zeros(3)}
    return parts, state


def trainers_checkpoint(state, path, monkeypatch):
    """As the authors' trainer pickled it, with one of its own classes inside."""
    lightning = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    lightning.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": lightning.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, lightning.__name__, lightning)
    torch.save({"epoch": 0, "callbacks": {lightning.ModelCheckpoint: {"monitor": "loss"}}, "state_dict": state}, path)
    monkeypatch.delitem(sys.modules, lightning.__name__)


@pytest.mark.parametrize("name", ["sd-v1-4.ckpt", "sd-v1-4.safetensors"])
def test_the_original_file(original, name, tmp_path, monkeypatch):
    parts, state = original
    if name.endswith(".ckpt"):
        trainers_checkpoint(state, tmp_path / name, monkeypatch)
    else:
        save_file({n: t.contiguous().clone() for n, t in state.items()}, tmp_path / name)
    model = from_original(tmp_path / name, FOUR_LEVELS, SMALL_VAE, SMALL_TEXT)
    for found, part in zip((model.unet, model.codec, model.text_encoders[0]), parts, strict=True):
        assert found.state_dict().keys() == part.state_dict().keys()
        assert all(torch.equal(t, part.state_dict()[n]) for n, t in found.state_dict().items())
    assert model.tokenizers[0](["a cat", ""]).tolist() == [[49406, 320, 2368, 49407, 49407], [49406] + [49407] * 4]
    assert model.factor == 8 and len(StyleID.of(model).layers) == 6


def test_other_files_are_refused(original, tmp_path):
    _, state = original
    path = tmp_path / "x.ckpt"
    for content, message in [
        ({"state_dict": state}, "does not fit CLIPText"),
        ({"weights": state}, "is not the original file of Stable Diffusion 1 \\('state_dict'\\): fetch"),
        ({"state_dict": state, "other": Config()}, "is not a torch checkpoint of plain tensors"),
    ]:
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            from_original(path, FOUR_LEVELS, SMALL_VAE, replace(SMALL_TEXT, num_hidden_layers=2))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="is not a torch checkpoint of plain tensors"):
        from_original(path)
    with pytest.raises(UserError, match="does not exist"):
        from_original(tmp_path / "missing.safetensors")


def test_images_are_cut_to_the_middle_square_and_resized(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (10, 200, 30)
    Image.fromarray(wide).save(tmp_path / "b.png")
    Image.fromarray(np.full((7, 7), 99, np.uint8)).save(tmp_path / "a.JPG")
    (tmp_path / "notes.txt").write_text("no image")
    found = evaluation.folder(tmp_path, 8)
    assert list(found) == ["a", "b"] and found["a"].shape == (3, 8, 8) and found["a"].unique().tolist() == [99]
    assert found["b"].flatten(1).unique(dim=1).T.tolist() == [[10, 200, 30]]
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:40])
    with pytest.raises(UserError, match=r"b\.png cannot be read as an image"):
        evaluation.folder(tmp_path, 8)
    with pytest.raises(UserError, match="holds no .png or .jpg: --data is the authors' data directory"):
        evaluation.folder(tmp_path / "nowhere", 8)


def test_the_published_path(tmp_path, capsys):
    """A directory of weights as diffusers lays it out, images as the authors', through the command line."""
    tiny_sd.build().save_pretrained(tmp_path / "sd")
    rng = np.random.default_rng(0)
    for part, names in {"cnt": ["01", "02"], "sty": ["10"]}.items():
        (tmp_path / "data" / part).mkdir(parents=True)
        for name in names:
            Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "data" / part / f"{name}.png")
    options = ["--weights", str(tmp_path / "sd"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--sampling", "2"]
    assert cli.main(["eval", "style_injection", *options]) == 0, capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out/stylised").iterdir()) == ["01_stylized_10.png", "02_stylized_10.png"]
    assert Image.open(tmp_path / "out/stylised/01_stylized_10.png").size == (32, 32)
    shown = capsys.readouterr().out
    assert "images  2" in shown and 0 < float(shown.split("histogram loss")[1].split()[0]) < 1
    assert cli.main(["eval", "style_injection", *options[:2], "--data", str(tmp_path)]) == 2
    assert "holds no .png or .jpg" in capsys.readouterr().err
