"""Prompts, codec and the whole pipeline: against transformers and diffusers, closed forms and hand-made cases."""

import json

import pytest
import torch
from einops import rearrange
from sklearn.decomposition import PCA

from common.data import scenes
from common.diffusion import Schedule
from common.errors import UserError
from common.patch_codec import PatchCodec, PatchCodecConfig
from common.pretrain import tiny_sd
from common.prompts import END, START, Tokenizer, _bpe
from common.stable_diffusion import StableDiffusion

PUBLISHED = {token: i for i, token in _bpe().decoder.items()} | {START: 49406, END: 49407}


# ---- prompts --------------------------------------------------------------------------------------------------------------------------


def test_published_ids():
    """Known ids of CLIP's vocabulary; Stable Diffusion 1 pads with the end of text, 2 with "!"."""
    assert Tokenizer(PUBLISHED, 7)(["A red  circle", ""]).tolist() == [[49406, 320, 736, 7117, 49407, 49407, 49407], [49406] + [49407] * 6]
    assert Tokenizer(PUBLISHED, 6, "!")(["a red circle"]).tolist() == [[49406, 320, 736, 7117, 49407, 0]]


def test_against_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path, END)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    prompts = [
        "",
        "a photo of sks dog, 4k!!",
        "An astronaut's ride (on the moon)\n at 12:30",
        "naïve café über 東京",
        *scenes.captioned(20, 0).captions,
    ]
    expected = theirs(prompts, padding="max_length", max_length=40).input_ids
    assert Tokenizer.from_pretrained(tmp_path, 40)(prompts).tolist() == expected


def test_compact_rows_follow_the_published_order():
    tokenizer = Tokenizer.compact(["red circle", "a"], 6)
    assert list(tokenizer.vocab) == ["a</w>", "red</w>", "circle</w>", START, END]  # 320 < 736 < 7117
    assert tokenizer(["a circle"]).tolist() == [[3, 0, 2, 4, 4, 4]]
    assert tokenizer.words == ["a", "circle", "red"]


def test_unknown_words_and_long_prompts_are_refused():
    tokenizer = Tokenizer.compact(["a red circle"], 6)
    with pytest.raises(UserError, match=r"does not know 'elephant', 'hat' in the prompt .*: its words are a circle red"):
        tokenizer(["a red circle", "a red elephant a hat"])
    with pytest.raises(UserError, match="has 5 tokens, this model takes 4: shorten it"):
        tokenizer(["a red red red circle"])


def test_places_of_a_word():
    tokenizer = Tokenizer.whole(20)
    assert tokenizer.at("a red circle left of a blue circle", "circle") == [3, 8]
    assert tokenizer.at("a photo of an axolotl", "axolotl") == [5, 6, 7, 8]  # four pieces
    with pytest.raises(ValueError, match="'ring' is not in the prompt"):
        tokenizer.at("a red circle", "ring")


def test_every_caption_fits_the_small_model():
    tokenizer, made = tiny_sd.build().tokenizers[0], scenes.captioned(1500, 7)
    captions = made.captions + [scenes.full_caption(scene) for scene in made.scenes]
    rows = tokenizer(captions)
    assert (rows[:, -1] == tokenizer.vocab[END]).all()  # none fills the row
    used = set(rows.unique().tolist())
    spare = {tokenizer.vocab[f"{word}</w>"] for word in tiny_sd.SPARE.split()}
    assert used == set(tokenizer.vocab.values()) - spare


# ---- codec ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch, kept", [(2, 5), (4, 12)])
def test_the_codec_is_the_principal_components_of_patches(patch, kept):
    images = scenes.captioned(20, 3).images / 127.5 - 1
    codec = PatchCodec(PatchCodecConfig(patch, kept)).fit(images)
    z = codec.encode(images)
    assert z.shape == (20, kept, 32 // patch, 32 // patch) and z.var(correction=0).item() == pytest.approx(1, abs=0.01)
    split, whole = "(b h w) (c i j)", "b c (h i) (w j)"
    rows = rearrange(images, f"{whole} -> {split}", i=patch, j=patch).numpy()
    pca = PCA(kept).fit(rows)
    expected = torch.from_numpy(pca.inverse_transform(pca.transform(rows)))
    expected = rearrange(expected, f"{split} -> {whole}", b=20, h=32 // patch, i=patch, j=patch)
    torch.testing.assert_close(codec.decode(z), expected, rtol=0, atol=1e-4)
    noise = torch.randn(2, kept, 3, 5)
    torch.testing.assert_close(codec.encode(codec.decode(noise)), noise, rtol=0, atol=1e-4)


def test_the_codec_of_videos_takes_several_frames_at_once():
    """Frames of one colour: 4 frames x 2 x 2 pixels x 3 channels have the 12 components of 4 frames' colours."""
    colours = torch.randn(20, 3, 8, 1, 1)
    video = colours.expand(20, 3, 8, 4, 6)
    codec = PatchCodec(PatchCodecConfig(patch=2, latent_channels=12, frames=4)).fit(video)
    z = codec.encode(video)
    assert z.shape == (20, 12, 2, 2, 3) and torch.allclose(z, z[..., :1, :1], atol=1e-4)
    torch.testing.assert_close(codec.decode(z), video, rtol=0, atol=1e-4)
    reversed_halves = torch.cat([video[:, :, 4:], video[:, :, :4]], 2)
    torch.testing.assert_close(codec.encode(reversed_halves), z.flip(2), rtol=0, atol=1e-4)


# ---- the pipeline ---------------------------------------------------------------------------------------------------------------------


def write_tokenizer(directory, pad):
    """The published layout of a tokenizer/."""
    directory.mkdir(parents=True, exist_ok=True)
    merges = sorted(_bpe().bpe_ranks, key=_bpe().bpe_ranks.get)
    (directory / "vocab.json").write_text(json.dumps(PUBLISHED))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    (directory / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": pad}, "bos_token": START, "eos_token": END}))
    return directory


def diffusers_parts(folder, context, **unet):
    """Small random parts of a pipeline of diffusers; 16 x 16 images."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": 16}
    text["max_position_embeddings"] = 12
    levels = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    parts = {
        "unet": diffusers.UNet2DConditionModel(
            sample_size=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2, cross_attention_dim=context, **levels, **unet,
        ),
        "vae": diffusers.AutoencoderKL(
            latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, sample_size=16, **levels
        ),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
        "scheduler": diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False, clip_sample=False
        ),
    }  # fmt: skip
    second = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text | {"hidden_act": "gelu"}))
    return diffusers, parts, second, lambda pad: transformers.CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=12)


@pytest.mark.parametrize("pad", [END, "!"], ids=["SD 1", "SD 2"])
def test_against_the_pipeline_of_diffusers(tmp_path, pad):
    pytest.importorskip("diffusers")
    diffusers, parts, _, tokenizer = diffusers_parts(write_tokenizer(tmp_path / "tokenizer", pad), 16)
    theirs = diffusers.StableDiffusionPipeline(
        **parts, tokenizer=tokenizer(pad), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    theirs.save_pretrained(tmp_path)
    compare(theirs, StableDiffusion.from_pretrained(tmp_path))


def test_against_the_pipeline_of_diffusers_for_xl(tmp_path):
    pytest.importorskip("diffusers")
    xl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 6, "projection_class_embeddings_input_dim": 16 + 36}
    diffusers, parts, second, tokenizer = diffusers_parts(write_tokenizer(tmp_path / "tokenizer", END), 32, **xl, use_linear_projection=True)
    write_tokenizer(tmp_path / "tokenizer_2", "!")
    theirs = diffusers.StableDiffusionXLPipeline(
        **parts, text_encoder_2=second, tokenizer=tokenizer(END), tokenizer_2=tokenizer("!"), add_watermarker=False
    )
    theirs.save_pretrained(tmp_path)
    compare(theirs, StableDiffusion.from_pretrained(tmp_path))


def compare(theirs, ours):
    prompts, noise = ["a red circle", "a photo of sks dog, 4k"], torch.randn(2, 4, 8, 8)
    theirs.set_progress_bar_config(disable=True)
    images = theirs(prompts, latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="pt").images
    assert ours.factor == 2
    torch.testing.assert_close(ours.sample(prompts, steps=4, guidance=3.0, noise=noise), images, rtol=1e-4, atol=1e-4)
    assert images.std() > 0.05  # not a blank one


def test_whole_directories_come_back(tmp_path):
    model = tiny_sd.build().eval()
    model.save_pretrained(tmp_path)
    again = StableDiffusion.from_pretrained(tmp_path)
    assert again.tokenizers[0].vocab == model.tokenizers[0].vocab and again.schedule == model.schedule
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    torch.testing.assert_close(again.sample(["a ring"], steps=2, seed=3), model.sample(["a ring"], steps=2, seed=3), rtol=0, atol=1e-4)
    assert not torch.equal(again.noise(1, 3), again.noise(1, 4))


def test_guidance_one_needs_no_empty_prompt_and_larger_ones_extrapolate():
    model = tiny_sd.build().eval()
    z, t = model.noise(2, 0), torch.tensor([500, 500])
    with torch.no_grad():
        plain, empty = model.denoiser(["a ring", "a cross"])(z, t), model.denoiser(["", ""])(z, t)
        assert not torch.allclose(plain, empty)
        torch.testing.assert_close(model.denoiser(["a ring", "a cross"], 3.0)(z, t), 3 * plain - 2 * empty, rtol=1e-4, atol=1e-4)


def test_the_noise_of_an_image_leads_back_to_it():
    """With a network that always predicts the same noise, inversion is exact."""
    model = tiny_sd.build().eval()
    model.schedule = Schedule()  # which makes the output the noise
    torch.nn.init.zeros_(model.unet.conv_out.weight)
    images = model.decode(0.2 * model.noise(2, 0))  # which the codec keeps, within the range of colours
    noise = model.invert(images, ["", ""], steps=5)
    torch.testing.assert_close(model.sample(["", ""], steps=5, guidance=1, noise=noise), images, rtol=0, atol=1e-4)


def test_incomplete_directories_are_refused(tmp_path):
    model = tiny_sd.build()
    model.save_pretrained(tmp_path)
    (tmp_path / "codec").rename(tmp_path / "kodec")
    with pytest.raises(UserError, match="has no vae, which decodes its latents: fetch the whole model"):
        StableDiffusion.from_pretrained(tmp_path)
    (tmp_path / "kodec").rename(tmp_path / "codec")
    (tmp_path / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(UserError, match=r"has no vocab\.json: give the directory of a published model"):
        StableDiffusion.from_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match="has no scheduler/scheduler_config.json"):
        StableDiffusion.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="is no directory here and cannot be had from the hub"):
        StableDiffusion.from_pretrained(tmp_path / "nowhere")
