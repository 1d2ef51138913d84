"""IP-Adapter against the authors' modules (golden cases), closed forms, and files in the published layouts."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from common import diffusion
from common.attention import STAGES, attention_logits, controlled
from common.backbones.clip import CLIPText, CLIPTextConfig, CLIPVisionConfig, CLIPVisionWithProjection
from common.backbones.sd_unet import TokenAttention, UNet2DConditionModel, UNetConfig
from common.data import scenes
from common.diffusion import Schedule
from common.errors import UserError
from common.gpu import count_params
from common.patch_codec import PatchCodec, PatchCodecConfig
from common.pretrain import tiny_clip
from common.reader import truth
from common.stable_diffusion import StableDiffusion
from papers.ip_adapter import eval as evaluation
from papers.ip_adapter import model as ip
from papers.ip_adapter import train as training
from papers.ip_adapter.model import FullProjection, ImageProjection, IPAdapter, Resampler, SimpleAdapter, load_adapter
from tests.goldens import cases
from tests.test_sd_unet import SDXL

CASES = cases("ip_adapter")
kind = lambda name: pytest.mark.parametrize("case", [case for case in CASES if name in case.meta["constructor"]], ids=lambda case: case.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=tolerance)


# ---- parity -----------------------------------------------------------------------------------------------------------------------------


def one_layer(case, dtype) -> tuple[TokenAttention, IPAdapter]:
    """A frozen cross-attention with the case's weights, and an adapter of that layer alone."""
    c = case.meta["constructor"]
    inner = c["heads"] * c["dim_head"]
    layer = TokenAttention(c["query_dim"], c["heads"], c["cross_attention_dim"])
    layer.to_q = nn.Linear(c["query_dim"], inner, bias=False)
    layer.to_k, layer.to_v = (nn.Linear(c["cross_attention_dim"], inner, bias=False) for _ in range(2))
    layer.to_out[0] = nn.Linear(inner, c["query_dim"])
    layer.load_state_dict(case.state("attn.") or case.state("param/attn."))
    adapter = IPAdapter(ImageProjection(1, c["cross_attention_dim"], c["num_tokens"]), layer)
    adapter.ip_adapter["0"].load_state_dict(case.state("processor.") or case.state("param/processor."))
    return layer.to(dtype), adapter.to(dtype)


@kind("query_dim")
@DTYPES
def test_decoupled_attention(case, dtype):
    bits, tolerance = str(dtype)[-2:], case.meta["tolerance"][str(dtype).removeprefix("torch.")]
    layer, adapter = one_layer(case, dtype)
    x, text, image, probe = (case.tensors[f"in/{name}"].to(dtype) for name in ("hidden_states", "text", "image_tokens", "probe"))
    scales = [name.split("scale_")[1] for name in case.tensors if name.startswith("out64/scale_")]
    assert scales
    for scale in scales:
        x, image, adapter.scale = x.detach().requires_grad_(), image.detach().requires_grad_(), float(scale)
        with adapter.on(layer):
            y = layer(x, torch.cat([text, image], 1))
        close(y, case.tensors[f"out{bits}/scale_{scale}"], tolerance)
        if dtype == torch.float64:
            grads = torch.autograd.grad((y * probe).sum(), [x, image])
            close(grads[0], case.tensors[f"grad64/hidden_states_scale_{scale}"], tolerance)
            close(grads[1], case.tensors[f"grad64/image_tokens_scale_{scale}"], tolerance)


@kind("query_dim")
@torch.no_grad()
def test_where_the_image_branch_looks(case):
    """Its weights sum to one over the image tokens alone."""
    layer, adapter = one_layer(case, torch.float64)
    queries = []

    class Watch:
        def heads(self, site, o, q):
            queries.append(q)

    x, image = case.tensors["in/hidden_states"].double(), case.tensors["in/image_tokens"].double()
    with adapter.on(layer), controlled(layer, Watch()):
        layer(x, torch.cat([case.tensors["in/text"].double(), image], 1))
    k = adapter.ip_adapter["0"].to_k_ip(image).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    close(attention_logits(queries[0], k).softmax(-1).flatten(0, 1), case.tensors["out64/image_attention_probs"], case.meta["tolerance"]["float64"])


@kind("ImageProjModel")
@DTYPES
@torch.no_grad()
def test_projections(case, dtype):
    c, float64 = case.meta["constructor"], dtype == torch.float64
    state = lambda prefix: case.state(prefix) or case.state("param/" + prefix)
    sizes = c["ImageProjModel"]
    plain = ImageProjection(sizes["clip_embeddings_dim"], sizes["cross_attention_dim"], sizes["clip_extra_context_tokens"])
    full = FullProjection(c["MLPProjModel"]["clip_embeddings_dim"], c["MLPProjModel"]["cross_attention_dim"])
    r = c["Resampler"]
    sizes = {"depth": r["depth"], "heads": r["heads"], "dim_head": r["dim_head"], "queries": r["num_queries"], "ff": r["ff_mult"]}
    plus = Resampler(r["embedding_dim"], r["output_dim"], r["dim"], **sizes)
    e, grid, grid_mlp = (case.tensors[f"in/{name}"].to(dtype) for name in ("image_embeds", "grid_features", "grid_features_mlp"))
    tolerance = case.meta["tolerance"]
    exact = tolerance["float64" if float64 else "float32"]
    for module, name, source, expected, within in [
        (plain, "image_proj.", e, "out64/image_proj", exact),
        (plain, "image_proj.", torch.zeros_like(e), "out64/image_proj_zero_embed", exact),
        (full, "mlp_proj.", grid_mlp, "out64/mlp_proj", exact),
        (plus, "resampler.", grid, "out_official/resampler", tolerance["resampler"] if float64 else tolerance["float32"]),
    ]:
        module.load_state_dict(state(name))
        close(module.to(dtype)(source), case.tensors[expected], within)


def write(state, path):
    """A published file: of torch, two dicts; of safetensors, flat."""
    if path.suffix == ".safetensors":
        save_file({name: t.contiguous() for name, t in state.items()}, path)
    else:
        part = lambda prefix: {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        torch.save({"image_proj": part("image_proj."), "ip_adapter": part("ip_adapter.")}, path)
    return path


@kind("unet")
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@DTYPES
@torch.no_grad()
def test_published_adapter_on_a_unet(case, suffix, dtype, tmp_path):
    unet = UNet2DConditionModel.from_config(case.meta["constructor"]["unet"])
    unet.load_state_dict(case.state("unet.") or case.state("param/unet."))
    adapter = load_adapter(unet, write(case.state("ckpt/"), tmp_path / f"adapter.{suffix}"))
    assert adapter.image_proj.tokens == case.meta["constructor"]["num_tokens"]
    order = [name.removesuffix(".processor") for name in case.meta["processor_order"]] if "processor_order" in case.meta else None
    assert order in (None, ip.published_order(unet))
    unet, adapter = unet.to(dtype), adapter.to(dtype)
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in case.state("in/").items()}
    extra = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    tolerance = case.meta["tolerance"][str(dtype).removeprefix("torch.")]
    scales = [name.split("scale_")[1] for name in case.tensors if name.startswith("out64/scale_")]
    assert scales
    for scale in scales:
        adapter.scale = float(scale)
        with adapter.on(unet):
            sample = unet(inputs["sample"], inputs["timestep"], adapter.prompt(inputs["text"], inputs["image_embeds"]), **extra)
        close(sample, case.tensors[f"out64/scale_{scale}"], tolerance)


# ---- properties -------------------------------------------------------------------------------------------------------------------------


def small_sd() -> StableDiffusion:
    """Random weights; captions of scenes, 32 x 32 pixels."""
    tokenizer = tiny_clip.tokenizer()
    text = CLIPText(CLIPTextConfig(len(tokenizer.vocab), 16, 32, 1, 2, tokenizer.length))
    nn.init.normal_(text.text_model.embeddings.token_embedding.weight)
    unet = UNetConfig(
        sample_size=8, in_channels=12, out_channels=12, block_out_channels=(16, 24), layers_per_block=1, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=16, norm_num_groups=4,
    )  # fmt: skip
    return StableDiffusion(
        UNet2DConditionModel(unet), [text], [tokenizer], PatchCodec(PatchCodecConfig()), Schedule(prediction_type="v_prediction")
    ).eval()


@pytest.fixture
def sd():
    return small_sd().requires_grad_(False)


def random_adapter(sd, tokens=3) -> IPAdapter:
    """W' unlike W."""
    adapter = IPAdapter(ImageProjection(10, 16, tokens), sd.unet)
    for p in adapter.ip_adapter.parameters():
        nn.init.normal_(p, std=0.5)
    return adapter


def inputs(sd, n=2):
    return sd.noise(n, 1), torch.tensor([3, 800])[:n], sd.condition(["a ring", "a red cross at the left"][:n])["encoder_hidden_states"]


@torch.no_grad()
def test_lambda_zero_is_the_base_bit_for_bit(sd):
    z, t, text = inputs(sd)
    adapter, plain = random_adapter(sd), sd.unet(z, t, text)
    for adapter.scale in (0.0, 1.0):
        with adapter.on(sd.unet):
            assert torch.equal(sd.unet(z, t, adapter.prompt(text, torch.randn(2, 10))), plain) == (adapter.scale == 0)
    assert torch.equal(sd.unet(z, t, text), plain)  # and it leaves nothing behind


@torch.no_grad()
def test_from_equal_weights_the_text_read_again_doubles_the_attention():
    """W' = W at the start, so that image tokens equal to the text's add the text branch once more, before W_o and its bias."""
    layer, x, text = TokenAttention(24, 3, 16).double(), torch.randn(2, 7, 24).double(), torch.randn(2, 4, 16).double()
    adapter = IPAdapter(ImageProjection(1, 16, tokens=4), layer).double()
    bias = layer.to_out[0].bias
    with adapter.on(layer):
        close(layer(x, torch.cat([text, text], 1)), 2 * (layer(x, torch.cat([text, 0 * text], 1)) - bias) + bias, 1e-12)


@torch.no_grad()
def test_the_simple_adapter_has_one_softmax_over_both(sd):
    layer, x, text, image = TokenAttention(8, 2, 16), torch.randn(1, 3, 8), torch.randn(1, 4, 16), torch.randn(1, 10)
    simple = SimpleAdapter(ImageProjection(10, 16, tokens=2))
    both = torch.cat([text, simple.image_proj(image)], 1)
    split = lambda t: t.unflatten(-1, (2, 4)).transpose(1, 2)
    q, k, v = split(layer.to_q(x)), split(layer.to_k(both)), split(layer.to_v(both))
    expected = layer.to_out((q @ k.mT / 2).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
    with simple.on(layer) as same:
        close(same(x, simple.prompt(text, image)), expected, 1e-6)


@torch.no_grad()
def test_fine_tuning_starts_from_the_base_and_leaves_it_alone(sd):
    z, t, text = inputs(sd)
    tuned, before = ip.FineTuned(ImageProjection(10, 16), sd.unet), sd.unet(z, t, text)
    with tuned.on(sd.unet) as unet:
        assert unet is not sd.unet and torch.equal(unet(z, t, text), before)
    assert tuned.prompt(text, torch.randn(2, 10)).shape == (2, 4, 16)
    assert all(p.requires_grad for p in tuned.parameters()) and not any(p.requires_grad for p in sd.unet.parameters())
    for p in tuned.unet.parameters():
        p.add_(1)
    assert torch.equal(sd.unet(z, t, text), before)


def test_sizes_of_stable_diffusion_15():
    assert evaluation.published_size() == 1024 * 4 * 768 + 4 * 768 + 2 * 768 + 2 * 768 * 12_480 == 22_319_616
    with torch.device("meta"):
        adapter = IPAdapter(ImageProjection(1024, 768), UNet2DConditionModel(UNetConfig()))
    assert list(adapter.ip_adapter) == [str(i) for i in range(1, 32, 2)]


def test_sizes_of_xl():
    with torch.device("meta"):
        unet = UNet2DConditionModel(SDXL)
        adapter = IPAdapter(ImageProjection(1280, 2048), unet)
    order = ip.published_order(unet)
    assert len(order) == 140 and list(adapter.ip_adapter) == [str(i) for i in range(1, 140, 2)]
    places = [next(i for i, name in enumerate(order) if name.startswith(part)) for part in ("down_blocks", "up_blocks", "mid_block")]
    assert places == [0, 48, 120] and all(name.endswith(("attn1", "attn2")[i % 2]) for i, name in enumerate(order))
    assert count_params(adapter) == 1280 * 8192 + 8192 + 2 * 2048 + 2 * 2048 * 83_200


@pytest.mark.parametrize("name", ["plus sd15", "plus xl", "full"])
def test_fresh_projections_have_the_published_sizes(name, monkeypatch):
    dim = 2048 if name == "plus xl" else 768
    with torch.device("meta"):
        encoder = CLIPVisionWithProjection(CLIPVisionConfig(1280, 5120, 0, 16, 224, 14, projection_dim=1024))
        unet = type("Base", (), {"unet": type("U", (), {"config": UNetConfig(cross_attention_dim=dim)})})
        monkeypatch.setattr(training, "tower", lambda _: encoder)
        monkeypatch.setattr(training, "base", lambda _: unet)
        made = training.projection(training.SCALES["full"], name.split()[0])
    shapes = {name: tuple(t.shape) for name, t in made.state_dict().items()}
    if name == "full":
        assert shapes["proj.0.weight"] == (1280, 1280) and shapes["proj.2.weight"] == (768, 1280) and made.tokens == 257
    else:
        inner, heads = {"plus sd15": (768, 12), "plus xl": (1280, 20)}[name]
        assert (
            shapes["latents"] == (1, 16, inner) and shapes["layers.3.0.to_q.weight"] == (64 * heads, inner) and "layers.4.0.to_q.weight" not in shapes
        )
        assert shapes["proj_in.weight"] == (inner, 1280) and shapes["proj_out.weight"] == (dim, inner)


# ---- training and sampling --------------------------------------------------------------------------------------------------------------


def test_what_is_dropped():
    r = (torch.arange(1000) + 0.5) / 1000
    image, text = ip.dropped(r)
    assert [(i, t) for i, t in zip(image[25::50].tolist(), text[25::50].tolist(), strict=True)] == [(True, False), (False, True), (True, True)] + [
        (False, False)
    ] * 17
    assert image.sum() == text.sum() == 100 and (image & text).sum() == 50


@torch.no_grad()
def test_no_image():
    """e = 0 leaves LN(b_p); fine features are those of zero pixels."""
    encoder = CLIPVisionWithProjection(CLIPVisionConfig(16, 32, 2, 2, 8, 4, projection_dim=10)).eval()
    proj = ImageProjection(10, 16, 3)
    close(proj(ip.no_image(encoder, fine=False)), F.layer_norm(proj.proj.bias.view(1, 3, 16), (16,)), 1e-5)
    fine = ip.no_image(encoder, fine=True)
    assert fine.shape == (1, 5, 16)
    hidden = []
    encoder.vision_model.encoder.layers[0].register_forward_hook(lambda module, args, output: hidden.append(output))
    encoder.feature(torch.zeros(1, 3, 8, 8))
    close(fine, hidden[0], 1e-6)  # the state before the last of two layers


def test_training_loss(sd, monkeypatch):
    """A sample of each kind of drop: what the U-Net reads, and the mean square against v."""
    seen, adapter, nothing = [], random_adapter(sd), torch.full((1, 10), 7.0)
    monkeypatch.setattr(torch, "rand", lambda n, device: torch.tensor([0.01, 0.06, 0.12, 0.5]))
    monkeypatch.setattr(sd.unet, "forward", lambda z, t, encoder_hidden_states: seen.append((t, encoder_hidden_states)) or torch.zeros_like(z))
    monkeypatch.setattr(torch, "randn_like", lambda z: torch.full_like(z, 2.0))
    z, captions, e = sd.noise(4, 3), ["a ring", "a cross", "a square", "a circle"], torch.randn(4, 10)
    loss = ip.training_loss(adapter, sd, z, captions, e, nothing)
    t, context = seen[0]
    texts = sd.condition(["a ring", "", "", "a circle"])["encoder_hidden_states"]
    images = adapter.image_proj(torch.stack([nothing[0], e[1], nothing[0], e[3]]))
    assert torch.equal(context, torch.cat([texts, images], 1))
    a = sd.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    close(loss, (a.sqrt() * 2 - (1 - a).sqrt() * z).square().mean(), 1e-5)


def test_long_captions_lose_their_last_words(sd):
    long = "a red circle left of a blue square " * 9
    short = ip.shortened(long, sd)
    assert short == " ".join(long.split()[:22]) and sd.tokenizers[0].length == 24
    assert ip.shortened("a  ring", sd) == "a ring" and ip.shortened("", sd) == ""


def test_only_the_adapter_learns(sd):
    adapter = random_adapter(sd)
    ip.training_loss(adapter, sd, sd.noise(4, 3), ["a ring"] * 4, torch.randn(4, 10), torch.zeros(1, 10)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in sd.parameters())


@torch.no_grad()
def test_sampling_is_guided_away_from_neither_prompt(sd):
    """Equation 7 with two calls a step instead of one."""
    adapter, e, nothing, noise, prompts = random_adapter(sd), torch.randn(2, 10), torch.zeros(1, 10), sd.noise(2, 5), ["a ring", "a cross"]
    adapter.scale = 0.7
    text, empty = (sd.condition(texts)["encoder_hidden_states"] for texts in (prompts, ["", ""]))

    def model(z, t):
        prompted = sd.unet(z, t, adapter.prompt(text, e))
        plain = sd.unet(z, t, adapter.prompt(empty, nothing.expand(2, -1)))
        return 3.5 * prompted + (1 - 3.5) * plain

    with adapter.on(sd.unet):
        expected = sd.decode(diffusion.sample(model, noise, sd.schedule, 3)).clamp(0, 1)
    close(ip.sample(adapter, sd, prompts, e, nothing, noise=noise, steps=3, guidance=3.5), expected, 1e-4)


@torch.no_grad()
def test_a_control_sees_the_resampler_and_changes_nothing():
    seen = []

    class Identity:
        def weights(self, site, p):
            seen.append((site.name, tuple(p.shape)))

    for stage in set(STAGES) - {"weights"}:
        setattr(Identity, stage, lambda self, site, *tensors: None)
    plus, e = Resampler(10, 16, 12, depth=2, heads=2, dim_head=4, queries=3), torch.randn(2, 5, 10)
    plain = plus(e)
    with controlled(plus, Identity()):
        close(plus(e), plain, 1e-5)
    assert seen == [("layers.0.0", (2, 2, 3, 8)), ("layers.1.0", (2, 2, 3, 8))]  # queries read the features and themselves


# ---- published files --------------------------------------------------------------------------------------------------------------------

PROJECTIONS = {
    "global": lambda: ImageProjection(10, 16, 3),
    "plus": lambda: Resampler(10, 16, 12, depth=2, heads=3, queries=5, ff=2),
    "full": lambda: FullProjection(10, 16),
}


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_every_kind_of_file_loads(name, suffix, sd, tmp_path):
    source = IPAdapter(PROJECTIONS[name](), sd.unet)
    loaded = load_adapter(sd.unet, write({k: t.half() for k, t in source.state_dict().items()}, tmp_path / f"x.{suffix}"))
    assert type(loaded.image_proj) is type(source.image_proj) and loaded.image_proj.tokens == source.image_proj.tokens
    for key, tensor in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor.half().float()), key


def test_hostile_files(sd, tmp_path):
    good = random_adapter(sd).state_dict()
    for name, content, message in [
        ("no.bin", None, "does not exist"),
        ("no.safetensors", None, "does not exist"),
        ("junk.bin", b"junk", "is not a torch checkpoint of plain tensors"),
        ("junk.safetensors", b"junk", "is not a whole safetensors file"),
        ("list.bin", [1, 2], "is not a torch file of the two dicts"),
        ("half.bin", {"image_proj": {"proj.weight": torch.ones(1)}}, "is not a torch file of the two dicts"),
        ("other.bin", {"image_proj": {"x": torch.ones(1)}, "ip_adapter": {}}, "has no image projection that is known here"),
        ("flat.bin", {"image_proj": {"proj.weight": torch.ones(3), "norm.weight": torch.ones(3)}, "ip_adapter": {}}, "has no image projection"),
    ]:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(UserError, match=message):
            load_adapter(sd.unet, path)
    for change, message in [
        ({"ip_adapter.1.to_k_ip.weight": torch.ones(320, 768)}, r"ip_adapter.1.to_k_ip.weight is \(320, 768\), not \(16, 16\)"),
        ({"ip_adapter.99.to_k_ip.weight": torch.ones(1)}, "ip_adapter.99.to_k_ip.weight is not in the model"),
    ]:
        with pytest.raises(UserError, match=message):
            load_adapter(sd.unet, write(good | change, tmp_path / "change.safetensors"))


# ---- images and captions on disk --------------------------------------------------------------------------------------------------------


def write_list(root, colours=("red", "blue")):
    (root / "images").mkdir(parents=True)
    for colour in colours:
        Image.new("RGB", (40, 36), colour).save(root / f"images/{colour}.jpg")
    rows = [{"image_file": f"{colour}.jpg", "text": f"a {colour} square"} for colour in colours]
    (root / "data.json").write_text(json.dumps(rows))
    return root / "data.json"


def test_the_official_list(tmp_path):
    pairs = training.ImageTextList(write_list(tmp_path), tmp_path / "images", 16, training.clip_pixels("published", 8))
    image, pixels, text = pairs[0]
    assert len(pairs) == 2 and text == "a red square" and image.shape == (3, 16, 16) and pixels.shape == (3, 8, 8)
    red = image.mean((1, 2))
    assert red[0] > 0.98 and red[1:].max() < 0.02
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    close(pixels.mean((1, 2)), (red - mean) / std, 1e-3)
    assert training.clip_pixels("tiny", 8)(torch.ones(3, 8, 8)).unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), ("{", "is not a json of"), ('[{"image": "a"}]', "is not a json of"), ("[1]", "is not a json of")]
)
def test_hostile_lists(content, message, tmp_path):
    if content is not None:
        (tmp_path / "data.json").write_text(content)
    with pytest.raises(UserError, match=message):
        training.ImageTextList(tmp_path / "data.json", tmp_path, 16, nn.Identity())


def test_broken_images(tmp_path):
    pairs = training.ImageTextList(write_list(tmp_path), tmp_path / "images", 16, nn.Identity())
    (tmp_path / "images/red.jpg").write_bytes((tmp_path / "images/red.jpg").read_bytes()[:200])
    (tmp_path / "images/blue.jpg").unlink()
    for i in range(2):
        with pytest.raises(UserError, match="cannot be read as an image"):
            pairs[i]


def write_coco(root):
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    for i, colour in enumerate(("red", "blue", "green")):
        Image.new("RGB", (50, 40), colour).save(root / f"val2017/{i:012d}.jpg")
    made = {
        "images": [{"id": 10 + i, "file_name": f"{i:012d}.jpg"} for i in range(3)],
        "annotations": [
            {"image_id": 10 + i, "id": 5 * i + j, "caption": f"a {shape}"} for j, shape in enumerate(("ring", "cross")) for i in range(3)
        ],
    }
    (root / "annotations/captions_val2017.json").write_text(json.dumps(made))
    return root


def test_coco(tmp_path):
    with pytest.raises(UserError, match="captions_val2017.json is missing"):
        evaluation.coco(tmp_path)
    pairs = evaluation.coco(write_coco(tmp_path / "coco"))
    assert [(path.name, text) for path, text in pairs] == [(f"{i:012d}.jpg", "a ring") for i in range(3)]
    for content in ("{", "[]", '{"images": [{"id": 1, "file_name": "a"}], "annotations": []}'):
        (tmp_path / "coco/annotations/captions_val2017.json").write_text(content)
        with pytest.raises(UserError, match="is not COCO's list of captions"):
            evaluation.coco(tmp_path / "coco")


@pytest.fixture
def full(sd, tmp_path):
    """The full scale with a small base on disk."""
    sd.save_pretrained(tmp_path / "base")
    return replace(
        training.SCALES["full"], base=str(tmp_path / "base"), encoder="tiny", judge="tiny", device="cpu", workers=0, precision="fp32", ddim=2
    )


@pytest.mark.parametrize("name", ["global", "plus", "full"])
def test_training_on_a_list_leaves_a_file_that_is_evaluated(name, full, tmp_path):
    cfg = replace(
        full, data=str(write_list(tmp_path)), images=str(tmp_path / "images"), projection=name, size=32, steps=2, batch=2, out=tmp_path / "run",
        depth=1, queries=3,
    )  # fmt: skip
    training.train(cfg)
    file = tmp_path / f"run/{name}/0/step-00000002.safetensors"
    if name == "full":  # the file does not say how many tokens the tower has
        assert {key.split(".")[0] for key in ip.read_adapter(file)} == {"image_proj", "ip_adapter"}
        return
    cfg = replace(full, weights=file, data=str(write_coco(tmp_path / "coco")), prompts=2, draws=2)
    found = evaluation.evaluate_published(cfg)
    assert found["images"] == 2 and all(-1 <= found[key] <= 1 for key in ("clip_i", "clip_t"))


def test_scores_of_perfect_samples(full, sd, tmp_path, monkeypatch):
    """Samples equal to the image prompt have CLIP-I 1; CLIP-T is the judge's cosine with the first caption."""
    file = write(IPAdapter(ImageProjection(64, 16), sd.unet).state_dict(), tmp_path / "x.bin")
    cfg = replace(full, weights=file, data=str(write_coco(tmp_path / "coco")), prompts=1, draws=3)
    image = evaluation.read_image(tmp_path / "coco/val2017/000000000000.jpg")
    monkeypatch.setattr(evaluation, "sample", lambda *args, **kwargs: image.expand(3, -1, -1, -1))
    found = evaluation.evaluate_published(cfg)
    judge = evaluation.CLIP.from_pretrained("tiny")
    with torch.no_grad():
        pixels = F.interpolate(image[None, :, :, 5:45], 32, mode="bilinear")  # of one colour, whatever the filter
        cosine = F.cosine_similarity(judge.image_features(2 * pixels - 1), judge.text_features(tiny_clip.tokenizer()(["a ring"]))).item()
    assert found["clip_i"] == pytest.approx(1, abs=1e-5) and found["clip_t"] == pytest.approx(cosine, abs=1e-3)
    assert found["clip_score"] == pytest.approx(2.5 * max(cosine, 0), abs=3e-3)


def test_the_tower_of_another_adapter_is_refused(full, sd, tmp_path):
    for name, make in PROJECTIONS.items():
        file = write(IPAdapter(make(), sd.unet).state_dict(), tmp_path / f"{name}.bin")
        cfg = replace(full, weights=file, data=str(write_coco(tmp_path / name)))
        with pytest.raises(UserError, match="reads features of width 10, --encoder tiny has"):
            evaluation.evaluate_published(cfg)


def test_unknown_projections_and_other_data_are_answered(full):
    with pytest.raises(UserError, match="--projection tiny: take one of global, plus, full"):
        training.projection(full, "tiny")
    with pytest.raises(UserError, match="without --data"):
        evaluation.evaluate(replace(training.SCALES["small"], data="x"))


# ---- scenes -----------------------------------------------------------------------------------------------------------------------------


def test_captions_leave_to_the_image_what_it_shall_tell():
    made = training.scene_set(60, 9)
    words = {word for caption in made.captions for word in caption.split()}
    assert not words & ({"striped", "dotted"} | set(scenes.COLOURS)) and words & set(scenes.SHAPES)
    assert all(len(scene.things) == 1 and not scene.style for scene in made.scenes)


def test_what_a_text_asks_beside_the_image():
    for i, scene in enumerate(training.scene_set(40, 9).scenes):
        other = evaluation.another(scene, i)
        text = evaluation.asked_by(other, background=True)
        shown, asked = truth([scene])[0].tolist(), truth([other])[0].tolist()
        names = list(scenes.FACTORS)
        assert all((shown[names.index(n)] != asked[names.index(n)]) for n in ("layout", "shape", "background"))
        assert all((shown[names.index(n)] == asked[names.index(n)]) for n in ("colour", "texture"))
        assert text == f"a {other.things[0].shape} at the {scenes.layout_of(other)} on a {other.background} background"


def test_framed():
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    picture, width = training.framed(images), training.WIDTH
    assert (picture[:, :, width:-width, width:-width] == 0).all() and images.sum() == 0
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[width:-width, width:-width] = False
    for image in picture:
        assert image[:, outside].unique(dim=1).flatten().tolist() == [217, 26, 153]


def test_measures_by_hand():
    found, asked = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    asked[0, 2] = 1  # colour
    asked[:, 4] = 1  # of a second thing, not asked for
    assert evaluation.right(found, asked, ("colour", "texture")) == 0.75
    assert evaluation.rank_correlation([0.1, 0.2, 0.4, 0.8, 0.9]) == pytest.approx(1)
    assert evaluation.rank_correlation([0.1, 0.4, 0.2, 0.8, 0.9]) == pytest.approx(0.9)
    assert evaluation.rank_correlation([0.5] * 5) == 0
    sweep = [{"similarity": k / 5, "text": 1 - text} for k, text in enumerate((0.1, 0.3, 0.2, 0.4, 0.5))]
    assert evaluation.trade_off(sweep) == pytest.approx(0.9)


def test_a_run_is_a_published_file(sd, tmp_path):
    """What training a claim's adapter leaves loads like a published one."""
    sd.save_pretrained(tmp_path / "base")
    cfg = replace(training.SCALES["smoke"], base=str(tmp_path / "base"), out=tmp_path / "run", steps=2, device="cpu")
    training.train_one(cfg, "decoupled", 0)
    adapter = load_adapter(training.base(cfg.base).unet, tmp_path / "run/decoupled/0/step-00000002.safetensors")
    assert adapter.image_proj.tokens == 4 and list(adapter.ip_adapter) == [str(i) for i in range(1, 14, 2)]
