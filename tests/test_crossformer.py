"""CrossFormer against the authors' code (goldens), brute force and the published sizes."""

import itertools

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.attention import STAGES, controlled
from common.errors import UserError
from common.gpu import count_params
from common.loop import load_weights
from papers.crossformer import model as crossformer
from papers.crossformer.model import VARIANTS, CrossFormer, CrossFormerBlock, GroupAttention, published_name
from tests.goldens import Case, cases

CASES = cases("crossformer")
MODELS = [case for case in CASES if "embed_dim" in case.meta["constructor"]]
BLOCKS = [case for case in CASES if "dim" in case.meta["constructor"]]


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=tolerance)


def tolerance(case: Case, start: str) -> float:
    return next(value for key, value in case.meta["tolerance"].items() if key.startswith(start))


def build_model(case: Case, dtype) -> CrossFormer:
    ignored = {"img_size", "use_acl"}
    model = CrossFormer(**{k: v for k, v in case.meta["constructor"].items() if k not in ignored})
    model.load_state_dict(case.state("state."))
    return model.eval().to(dtype)


@pytest.mark.parametrize("case", MODELS, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_model(case, dtype):
    t, model = case.tensors, build_model(case, dtype)
    image = t["input"].to(dtype).requires_grad_()
    logits = model(image)
    close(logits, t[f"logits_f{torch.finfo(dtype).bits}"], tolerance(case, f"logits_f{torch.finfo(dtype).bits}"))
    (gradient,) = torch.autograd.grad((logits * t["grad_weights"].to(dtype)).sum(), image)
    close(gradient, t["input_grad_f64"], tolerance(case, "input_grad"))


@pytest.mark.parametrize("case", MODELS, ids=lambda c: c.name)
@torch.no_grad()
def test_intermediates(case):
    t, model = case.tensors, build_model(case, torch.float32)
    x, grid = model.patch_embed(t["input"])
    close(x, t["after_cel1_f32"], tolerance(case, "intermediates"))
    for s, stage in enumerate(model.layers, 1):
        x = stage(x, grid)
        if stage.downsample is not None:
            x, grid = stage.downsample(x, grid)
        close(x, t[f"after_stage{s}_f32"], tolerance(case, "intermediates"))


def build_block(case: Case, dtype) -> tuple[CrossFormerBlock, tuple[int, int]]:
    arguments = dict(case.meta["constructor"])
    grid = tuple(arguments.pop("input_resolution", None) or (case.meta["H"], case.meta["W"]))
    block = CrossFormerBlock(**arguments, lda=case.meta.get("lda_mode", "group").split(":")[0])
    block.load_state_dict(case.state("state."))
    return block.eval().to(dtype), grid


@pytest.mark.parametrize("case", BLOCKS, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_block(case, dtype):
    t, (block, grid) = case.tensors, build_block(case, dtype)
    x = t["input"].to(dtype).requires_grad_()
    y = block(x, grid)
    close(
        y,
        t["output_f64"],
        tolerance(case, "output_f64" if dtype == torch.float64 else "output in float32" if "output_f32" not in t else "output_f32"),
    )
    (gradient,) = torch.autograd.grad((y * t["grad_weights"].to(dtype)).sum(), x)
    close(gradient, t["input_grad_f64"], tolerance(case, "input_grad"))


@pytest.mark.parametrize("case", [c for c in BLOCKS if "dpb_table_f64" in c.tensors], ids=lambda c: c.name)
def test_position_bias(case):
    t, (block, _) = case.tensors, build_block(case, torch.float64)
    size = (block.group_size, block.group_size)
    offsets, index = crossformer._offsets(size, torch.device("cpu"))
    assert torch.equal(index, t["relative_position_index"])
    table = block.attn.pos.table(offsets.double())
    close(table, t["dpb_table_f64"], 1e-9)
    close(block.attn.pos(size), t["dpb_table_f64"][t["relative_position_index"]].permute(2, 0, 1), 1e-9)


# ---- who sees whom ----------------------------------------------------------------------------------------------------------------------


def seen(block: CrossFormerBlock, grid: tuple[int, int]) -> torch.Tensor:
    """(n, n): does token i's output depend on token j? Found from the gradient alone."""
    n = grid[0] * grid[1]
    x = torch.randn(1, n, block.norm1.normalized_shape[0], dtype=torch.float64)
    f = lambda x: block.attn(x, grid, **block.grouping(grid))[0].sum(-1)
    return torch.autograd.functional.jacobian(f, x)[:, 0].abs().sum(-1) > 0


@pytest.mark.parametrize("grid", [(6, 6), (7, 10), (5, 9), (3, 3), (2, 8)])
@pytest.mark.parametrize(("flag", "lda"), [(0, "group"), (1, "group"), (1, "interval")])
def test_groups_by_brute_force(grid, flag, lda):
    """The definitions of SDA and LDA, token pair by token pair; padding is seen by nobody."""
    torch.manual_seed(0)
    size, interval = 3, 2
    block = CrossFormerBlock(16, 2, size, interval, flag, lda=lda).double()
    if min(grid) <= size:
        same = lambda a, b: a // min(grid) == b // min(grid)
    elif flag == 0:
        same = lambda a, b: a // size == b // size
    elif lda == "interval":
        same = lambda a, b: a % interval == b % interval
    else:
        same = lambda a, b: a % interval == b % interval and a // (size * interval) == b // (size * interval)
    tokens = list(itertools.product(range(grid[0]), range(grid[1])))
    expected = torch.tensor([[same(a, c) and same(b, d) for c, d in tokens] for a, b in tokens])
    assert torch.equal(seen(block, grid), expected)


@pytest.mark.parametrize("grid", [(6, 6), (7, 8)])
def test_shifted_windows_by_brute_force(grid):
    """Swin's: tokens are together if they are in the rolled map's window and did not wrap around to get there."""
    torch.manual_seed(0)
    attention = GroupAttention(16, 2, None).double()
    x = torch.randn(1, grid[0] * grid[1], 16, dtype=torch.float64)
    f = lambda x: attention(x, grid, (3, 3), 1, shift=1)[0].sum(-1)
    found = torch.autograd.functional.jacobian(f, x)[:, 0].abs().sum(-1) > 0
    tokens = list(itertools.product(range(grid[0]), range(grid[1])))
    window = lambda a: (a + 2) // 3  # rolled by one, 0 wraps to the end and stays alone there
    expected = torch.tensor([[window(a) == window(c) and window(b) == window(d) for c, d in tokens] for a, b in tokens])
    assert torch.equal(found, expected)


def test_both_definitions_agree_where_the_paper_defines_them():
    block = CrossFormerBlock(32, 2, 4, 3, 1)
    x = torch.randn(2, 144, 32)
    group = block(x, (12, 12))
    block.lda = "interval"
    assert torch.equal(block(x, (12, 12)), group)


# ---- sizes, names, weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "params", "flops"), [("T", 27.777, 2.858), ("S", 30.657, 4.910), ("B", 51.972, 9.165), ("L", 91.971, 16.116)])
def test_published_sizes(name, params, flops):
    with torch.device("meta"):
        model, image = CrossFormer(**VARIANTS[name]), torch.empty(1, 3, 224, 224)
    assert count_params(model) / 1e6 == pytest.approx(params, abs=5e-4)
    with FlopCounterMode(display=False) as counter:
        model(image)
    # the authors' counter takes a multiply-add for one and leaves the position bias out in part
    assert counter.get_total_flops() / 2e9 == pytest.approx(flops, rel=0.03)


@pytest.mark.parametrize("extent", [(32, 48), (33, 46), (30, 35)])
def test_block_convolutions_are_the_convolutions(extent):
    embed = crossformer.PatchEmbed((4, 8, 16, 32), 3, 32).double()
    image = torch.randn(2, 3, *extent, dtype=torch.float64)
    for proj in embed.projs:
        close(embed.project(proj, image, (extent[0] // 4, extent[1] // 4)), proj(image), 1e-12)


def test_four_maps_at_a_size_that_needs_padding():
    model = CrossFormer(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), num_classes=0).eval()
    maps = model.forward_features(torch.randn(1, 3, 136, 200))
    assert [tuple(m.shape) for m in maps] == [(1, 32, 34, 50), (1, 64, 17, 25), (1, 128, 9, 13), (1, 256, 5, 7)]
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("size", [(3, 3), (2, 4), (4, 1), (1, 1)])
def test_offsets_against_loops(size):
    rows, columns = size
    offsets, index = crossformer.group_offsets(size), crossformer.offset_index(size)
    assert offsets.tolist() == [[dy, dx] for dy in range(1 - rows, rows) for dx in range(1 - columns, columns)]
    assert index.dtype == torch.int64
    tokens = list(itertools.product(range(rows), range(columns)))
    for i, (y, x) in enumerate(tokens):
        for j, (key_y, key_x) in enumerate(tokens):
            assert offsets[index[i, j]].tolist() == [y - key_y, x - key_x]


def test_training_works_after_an_evaluation_filled_the_caches():
    block, x = CrossFormerBlock(32, 2, 5, 3, 1), torch.randn(1, 14 * 17, 32)
    with torch.inference_mode():
        block(x, (14, 17))
    block(x, (14, 17)).sum().backward()


def test_gradients_are_finite_with_groups_of_padding_alone():
    block = CrossFormerBlock(32, 2, 3, 4, 1)
    x = torch.randn(1, 65, 32, requires_grad=True)
    block(x, (5, 13)).square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large"])
def test_registered_with_timm(name):
    with torch.device("meta"):
        model = timm.create_model(f"crossformer_{name}", num_classes=10)
    assert isinstance(model, CrossFormer) and model.head.out_features == 10
    with pytest.raises(ValueError, match="files to download"):
        timm.create_model(f"crossformer_{name}", pretrained=True)


def test_a_published_checkpoint_loads_without_its_stale_buffers(tmp_path):
    build = lambda: CrossFormer(embed_dim=32, depths=(2, 1), num_heads=(1, 2), group_size=(3, 3), crs_interval=(2, 1), mlp_ratio=(2, 2))
    source, target = build(), build()
    stale = {
        "layers.0.blocks.0.attn.biases": torch.zeros(25, 2),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9),
        "layers.0.blocks.1.attn_mask": torch.zeros(1),
    }
    torch.save({"model": source.state_dict() | stale, "epoch": 299}, tmp_path / "crossformer.pth")
    load_weights(target, tmp_path / "crossformer.pth", published_name, key="model")
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(target(image), source(image))
    with pytest.raises(UserError, match="does not fit CrossFormer"):
        load_weights(CrossFormer(embed_dim=64, depths=(1,)), tmp_path / "crossformer.pth", published_name, key="model")


def test_a_control_sees_every_block_and_an_identity_changes_nothing():
    names = []

    class Identity:
        def weights(self, site, p):
            names.append((site.layer, site.grid, tuple(p.shape)))

    for stage in set(STAGES) - {"weights"}:
        setattr(Identity, stage, lambda self, site, *tensors: None)
    model = CrossFormer(embed_dim=32, depths=(2, 1), num_heads=(1, 2), group_size=(4, 4), crs_interval=(2, 1)).eval()
    image = torch.randn(2, 3, 32, 32)
    plain = model(image)
    with controlled(model, Identity()):
        watched = model(image)
    close(watched, plain, 1e-6)
    assert names == [(0, (8, 8), (8, 1, 16, 16)), (1, (8, 8), (8, 1, 16, 16)), (2, (4, 4), (2, 2, 16, 16))]


# ---- evaluation -------------------------------------------------------------------------------------------------------------------------


def test_mean_iou_against_scikit_learn():
    from sklearn.metrics import jaccard_score

    from papers.crossformer.eval import mean_iou

    predicted, mask = torch.randint(5, (2, 4, 8, 8))
    expected = 100 * jaccard_score(mask.flatten(), predicted.flatten(), average="macro")
    assert mean_iou(predicted, mask) == pytest.approx(expected)


def test_published_weights_are_evaluated_on_imagenets_layout(tmp_path):
    """Images of a class are alike, so a network gets all or none of a class right."""
    from dataclasses import replace

    from PIL import Image

    from papers.crossformer.eval import evaluate_published
    from papers.crossformer.train import SCALES

    for name, colour in (("n01", (255, 0, 0)), ("n02", (0, 0, 255))):
        (tmp_path / "validation" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (260, 300), colour).save(tmp_path / "validation" / name / f"{i}.JPEG")
    model = CrossFormer(**VARIANTS["T"], num_classes=2)
    torch.save({"model": model.state_dict()}, tmp_path / "crossformer-t.pth")
    cfg = replace(SCALES["full"], variant="T", data=str(tmp_path), weights=tmp_path / "crossformer-t.pth", workers=0, device="cpu")
    found = evaluate_published(cfg)
    assert found["images"] == 4 and found["top1"] in (0, 50, 100)
    with pytest.raises(UserError, match="no such directory"):
        evaluate_published(replace(cfg, data=str(tmp_path / "nowhere")))
