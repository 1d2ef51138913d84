"""MatchAttention against the authors' code (goldens), brute force over queries and sub-windows, closed forms and hand-made stereo pairs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from common.attention import controlled
from common.data import stereo as data
from common.errors import UserError
from common.gpu import count_flops, count_params
from common.pictures import as_png, from_png
from papers.match_attention import eval as evaluation
from papers.match_attention import model as ma
from papers.match_attention.eval import published_name
from papers.match_attention.model import GlobalCorrelation, MatchAttentionLayer, MatchStereo, match_attention
from papers.match_attention.train import SCALES, Config, build, match_loss, published, rounded, train
from tests.goldens import Case, cases

CASES = cases("match_attention")
OPERATOR = [case for case in CASES if "win_r" in case.meta.get("params", {})]
LAYERS = [case for case in CASES if "win_r" in case.meta.get("constructor", {})]
CORRELATION = [case for case in CASES if set(case.meta.get("constructor", {})) == {"dim"}]
NETWORKS = [case for case in CASES if "encoder_dims" in case.meta.get("constructor", {})]
BITS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


# ---- goldens ----------------------------------------------------------------------------------------------------------------------------


def heads_first(x):
    return rearrange(x, "b n h d -> b h n d")


@pytest.mark.parametrize("case", OPERATOR, ids=lambda c: c.name)
@BITS
def test_golden_operator(case: Case, dtype):
    params, t, tolerance = case.meta["params"], case.tensors, case.meta["tolerance"]
    radius, radius_y = params["win_r"]
    assert radius == radius_y
    inputs = [heads_first(t[name].to(dtype)).requires_grad_() for name in ("q", "k", "v", "offset")]
    o, weights = match_attention(*inputs, (params["H"], params["W"]), radius)
    bits = tolerance["f64"] if dtype == torch.float64 else tolerance["float32 forward"]
    close(rearrange(o, "b h n d -> b n (h d)"), t["output_f64"], bits)
    close(weights.transpose(1, 2), t["attn_f64"], bits)
    gradients = torch.autograd.grad((rearrange(o, "b h n d -> b n (h d)") * t["grad_weights"].to(dtype)).sum(), inputs)
    for name, gradient in zip(("q", "k", "v", "offset"), gradients, strict=True):
        close(gradient.transpose(1, 2), t[f"grad_{name}"], tolerance["grads"])


@pytest.mark.parametrize("case", LAYERS, ids=lambda c: c.name)
@BITS
def test_golden_layer(case: Case, dtype):
    c, t, tolerance = case.meta["constructor"], case.tensors, case.meta["tolerance"]
    layer = MatchAttentionLayer(c["dim"], c["num_head"], c["win_r"], c["mlp_ratio"], c["head_dim"]).to(dtype)
    layer.load_state_dict(case.state(case.meta["state_dict_prefix"]))
    x, self_rpos, field = (t[name].to(dtype) for name in ("x", "self_rpos", "field"))
    x.requires_grad_()
    x_out, rpos_out, field_out, both = layer(x, self_rpos, field, case.meta["stereo"])
    bits = tolerance["f64" if dtype == torch.float64 else "float32"]
    for actual, name in [(x_out, "x_out"), (rpos_out, "self_rpos_out"), (field_out, "field_out"), (both["self"], "field_after_self")]:
        close(actual, t[f"{name}_f64"], bits)
    close(both["cross"], t["field_after_cross_f64"], bits)
    assert torch.equal(ma.consistent(field, 2.0)[..., None].float(), t["noc_mask"])
    (gradient,) = torch.autograd.grad((x_out * t["grad_weights"].to(dtype)).sum() + field_out.sum(), x)
    close(gradient, t["grad_x"], tolerance["grad"])


@pytest.mark.parametrize("case", CORRELATION, ids=lambda c: c.name)
@torch.no_grad()
def test_golden_correlation(case: Case):
    module = GlobalCorrelation(case.meta["constructor"]["dim"]).double()
    module.load_state_dict(case.state(case.meta["state_dict_prefix"]))
    field, volume = module(case.tensors["x"].double(), case.meta["stereo"])
    close(field, case.tensors["flow_f64"], case.meta["tolerance"]["flow_f64"])
    close(volume, case.tensors["volume_f64"], case.meta["tolerance"]["volume"])


def build_network(c: dict) -> MatchStereo:
    return MatchStereo(c["encoder_dims"], c["encoder_depths"], c["refine_win_rs"], c["refine_nums"], c["num_heads"], c["mlp_ratios"])


@pytest.mark.parametrize("case", NETWORKS, ids=lambda c: c.name)
@BITS
@torch.no_grad()
def test_golden_network(case: Case, dtype):
    t, tolerance = case.tensors, case.meta["tolerance"]
    model = build_network(case.meta["constructor"]).to(dtype)
    model.load_state_dict({n: x for n, x in case.state(case.meta["state_dict_prefix"]).items() if published_name(n)})
    out = model(t["img0"].to(dtype), t["img1"].to(dtype), case.meta["stereo"])
    if dtype == torch.float32:
        error = (out.field_up - t["field_up"]).abs()
        assert error.max() < 5e-2 and error.mean() < 1e-3
        return
    close(out.init_flow, t["init_flow_f64"], tolerance["init_flow"])
    close(out.field_up, t["field_up"], tolerance["field_up float64"])
    close(out.self_rpos, t["self_rpos"], tolerance["field_up float64"])
    produced = {f"field_all.{i}.{kind}": field for i, fields in enumerate(out.field_all) for kind, field in fields.items()}
    assert produced.keys() == {name for name in t if name.startswith("field_all.")}
    for name, field in produced.items():
        close(field, t[name], tolerance["field_up float64"])


# ---- the operator -----------------------------------------------------------------------------------------------------------------------


def inputs(grid=(7, 9), heads=2, dim=3, batch=2, spread=12.0, dtype=torch.float64):
    """q, k, v and centres, some of them outside the map."""
    n = grid[0] * grid[1]
    q, k, v = torch.randn(3, batch, heads, n, dim, dtype=dtype)
    centre = torch.rand(batch, heads, n, 2, dtype=dtype) * spread - 1
    return q, k, v, centre


def brute_force(q, k, v, centre, grid, radius):
    """Query by query, sub-window by sub-window, softmax by softmax."""
    o, alpha = torch.zeros_like(q), torch.zeros(*q.shape[:3], 2 * radius + 2, 2 * radius + 2, dtype=q.dtype)
    keys, values = (x.unflatten(2, grid) for x in (k, v))
    for b, h, n in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        x, y = (min(max(float(c), radius), size - 1 - radius - 1e-3) for c, size in zip(centre[b, h, n], grid[::-1], strict=True))
        left, above = math.floor(x), math.floor(y)
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            share = abs(1 - dx - (x - left)) * abs(1 - dy - (y - above))
            rows, columns = slice(above - radius + dy, above + radius + 1 + dy), slice(left - radius + dx, left + radius + 1 + dx)
            s = -(q[b, h, n] - keys[b, h, rows, columns]).abs().sum(-1) / math.sqrt(q.shape[-1])
            p = share * s.flatten().softmax(0).view(s.shape)
            alpha[b, h, n, dy : dy + 2 * radius + 1, dx : dx + 2 * radius + 1] += p
            o[b, h, n] += (p[..., None] * values[b, h, rows, columns]).sum((0, 1))
    return o, alpha.flatten(-2)


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_operator_is_four_softmaxes(radius):
    given = inputs()
    o, alpha = match_attention(*given, (7, 9), radius)
    expected = brute_force(*given, (7, 9), radius)
    close(o, expected[0], 1e-10)
    close(alpha, expected[1], 1e-10)
    close(alpha.sum(-1), torch.ones_like(alpha[..., 0]), 1e-12)


def test_chunks_change_nothing(monkeypatch):
    """One query at a time, against the gather form's values and autograd's gradients."""
    given = [x.requires_grad_() for x in inputs()]
    weights = [torch.randn(2, 2, 63, 3, dtype=torch.float64), torch.randn(2, 2, 63, 16, dtype=torch.float64)]
    monkeypatch.setattr(ma, "chunks", lambda q, offsets: (slice(i, i + 1) for i in range(len(q))))
    results = []
    for operator in (match_attention, evaluation.gathered):
        out = operator(*given, (7, 9), 1)
        results.append([*out, *torch.autograd.grad(sum((o * w).sum() for o, w in zip(out, weights, strict=True)), given)])
    for chunked, straight in zip(*results, strict=True):
        close(chunked, straight, 1e-10)


def test_a_chunk_holds_a_bounded_number_of_elements():
    q, offsets = torch.empty(100_000, 8), torch.arange(16)
    sizes = [len(q[rows]) for rows in ma.chunks(q, offsets)]
    assert sum(sizes) == len(q) and max(sizes) * 8 * 16 <= 2**19 and len(sizes) < 30


@pytest.mark.parametrize("keep", [True, False])
def test_gradcheck(keep):
    given = [x.requires_grad_() for x in inputs((4, 5), 1, 2, 1, 6.0)]
    results = (lambda *x: match_attention(*x, (4, 5), 1)) if keep else (lambda *x: match_attention(*x, (4, 5), 1, keep=False)[0])
    assert torch.autograd.gradcheck(results, given, eps=1e-7, atol=1e-5)


def test_a_clamped_centre_has_no_gradient():
    q, k, v, _ = inputs()
    centre = torch.full((2, 2, 63, 2), -3.0, dtype=torch.float64)
    centre[..., 0] = 4.3
    centre.requires_grad_()
    (gradient,) = torch.autograd.grad(match_attention(q, k, v, centre, (7, 9), 1)[0].sum(), centre)
    assert (gradient[..., 1] == 0).all() and (gradient[..., 0] != 0).any()


def test_an_exact_match_is_found():
    """With keys far apart, a query equal to one key of its window takes that key's value."""
    grid, n = (6, 8), 48
    k = 1e3 * torch.arange(n, dtype=torch.float64).view(1, 1, n, 1)
    v = torch.randn(1, 1, n, 5, dtype=torch.float64).expand(1, 1, n, 5)
    where = torch.tensor([8 * y + x for y in range(1, 4) for x in range(1, 6)])  # centres that are not clamped
    q = k.clone()
    centre = torch.full((1, 1, n, 2), 2.0, dtype=torch.float64)
    centre[0, 0, where] = torch.stack([where % 8, where // 8], -1).double()
    o, alpha = match_attention(q[..., :1].expand(1, 1, n, 5), k.expand(1, 1, n, 5), v, centre, grid, 1)
    close(o[0, 0, where], v[0, 0, where], 1e-12)
    assert alpha[0, 0, where, 5].min() > 1 - 1e-12  # the middle of the nw sub-window


def test_distant_subwindows_give_no_nan():
    q, k, v, centre = inputs(dtype=torch.float32)
    k = k * 1e4
    o, alpha = match_attention(q, k, v, centre, (7, 9), 1)
    assert o.isfinite().all() and alpha.isfinite().all() and (alpha.sum(-1) <= 1 + 1e-5).all()


def test_a_small_map_is_refused():
    with pytest.raises(ValueError, match="a map of 5 x 9 is smaller than a window of radius 2: give it at least 6"):
        match_attention(*inputs((5, 9)), (5, 9), 2)


@pytest.mark.parametrize("kind", ["self", "cross"])
@torch.no_grad()
def test_a_control_sees_the_window_and_changes_nothing_else(kind):
    class Watch:
        def __init__(self):
            self.seen = {}

        def logits(self, site, s):
            self.seen["logits"] = s.shape

        def weights(self, site, p):
            self.seen["weights"] = p.sum(-1)
            self.site = site

    layer = MatchAttentionLayer(8, 2, 1, layer=3).double()
    x, rpos, field = (torch.randn(2, 6, 7, c, dtype=torch.float64) for c in (8, 4, 2))
    plain = layer(x, rpos, field, True)
    with controlled(layer, Watch(), where=lambda site: site.kind == kind) as watch:
        seen = layer(x, rpos, field, True)
    for a, b in zip(plain[:3], seen[:3], strict=True):
        close(a, b, 1e-10)
    assert watch.seen["logits"] == (2, 2, 42, 16) and watch.site.grid == (6, 7) and watch.site.layer == 3
    close(watch.seen["weights"], torch.ones(2, 2, 42), 1e-10)


@torch.no_grad()
def test_a_control_can_silence_the_cross_attention():
    class Silence:
        def heads(self, site, o, q):
            return torch.zeros_like(o)

        def weights(self, site, p):
            return torch.zeros_like(p)

    layer = MatchAttentionLayer(8, 2, 1)
    x, rpos, field = torch.randn(2, 6, 7, 8), torch.zeros(2, 6, 7, 4), torch.randn(2, 6, 7, 2)
    with controlled(layer, Silence(), where=lambda site: site.kind == "cross"):
        both = layer(x, rpos, field, False)[3]
    close(both["cross"], both["self"], 1e-6)


# ---- fields -----------------------------------------------------------------------------------------------------------------------------


def test_consistency_of_a_shift():
    """A disparity of 3: consistent but for the columns whose match lies outside."""
    field = torch.zeros(2, 4, 10, 2)
    field[0, ..., 0], field[1, ..., 0] = -3, 3
    expected = torch.ones(2, 4, 10, dtype=torch.bool)
    expected[0, :, :3] = expected[1, :, 7:] = False
    assert torch.equal(ma.consistent(field, 2.0), expected)
    field[1, ..., 0] = 6
    assert not ma.consistent(field, 2.0)[0, :, 3:].any()


def test_convex_upsampling_that_picks_a_neighbour():
    """Logits that choose the left neighbour for every fine pixel, whose value is doubled; outside the map is zero."""
    field = torch.arange(12.0).view(1, 3, 4, 1).expand(1, 3, 4, 2)
    mask = torch.zeros(1, 3, 4, 9, 2, 2)
    mask[..., 3, :, :] = 1e4
    up = ma.convex_upsample(field, mask.flatten(3), 2)
    expected = torch.nn.functional.pad(2 * field[..., 0], (1, 0))[..., :4].repeat_interleave(2, 1).repeat_interleave(2, 2)
    close(up[..., 0], expected, 1e-6)
    mask = torch.randn(1, 3, 4, 9, 4, 4)
    inner = ma.convex_upsample(torch.ones(1, 3, 4, 2), mask.flatten(3), 4)[:, 4:8, 4:12]
    close(inner, torch.full_like(inner, 4.0), 1e-5)


@pytest.mark.parametrize("stereo", [True, False])
@torch.no_grad()
def test_global_correlation_finds_a_shift(stereo):
    """Random features, the right view shifted by 3 columns (flow: and 1 row down); x projects to itself."""
    module = GlobalCorrelation(64)
    for linear in (module.q, module.k):
        linear.weight.copy_(40 * torch.eye(64))
    wide = torch.randn(9, 20, 64)
    down = 0 if stereo else 1
    left, right = wide[1:8, 3:17], wide[1 - down : 8 - down, 6:20]
    field, _ = module(torch.stack([left, right]), stereo)
    inside = (slice(2, 5), slice(5, 9))
    for view, sign in ((0, -1), (1, 1)):
        expected = sign * torch.tensor([3.0, -1.0 if not stereo else 0.0])
        close(field[view][inside], expected.expand(3, 4, 2), 0.05)


# ---- the network ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "millions", "head"), [("tiny", 8.78, 0.16), ("small", 25.2, None), ("base", 75.4, 0.51)])
def test_published_sizes(size, millions, head):
    """The published counts hold the unused classifier (coarsest width x 1000) and two unused scales per block of the last two stages."""
    with torch.device("meta"):
        model = published(size)
    widths = ma.SIZES[size]
    unused = 1001 * widths[3] + 2 * (6 * widths[2] + 2 * widths[3])
    assert (count_params(model) + unused) / 1e6 == pytest.approx(millions, rel=2e-3)
    if head:
        assert 1001 * widths[3] / 1e6 == pytest.approx(head, abs=6e-3)
    names = model.state_dict().keys()
    for name in ("encoder.downsample_layers.0.3.weight", "up_masks.4.2.bias", "match_attentions.0.layers.7.match_attention_cross.g.0.weight",
                 "up_decoders.3.conv.2.weight", "encoder.stages.2.5.token_mixer.dwconv.weight", "init_correlation_volume.k.weight"):  # fmt: skip
        assert name in names


def checkpoint(model, path):
    """As the authors save it: under "model", with the classifier and the scales that their forward pass does not use."""
    extra = {
        "encoder.head.weight": torch.zeros(1000, 160),
        "encoder.head.bias": torch.zeros(1000),
        "encoder.stages.2.0.res_scale1.scale": torch.ones(128),
    }
    torch.save({"model": model.state_dict() | extra}, path)
    return path


def test_published_checkpoint_loads(tmp_path):
    source, target = published("tiny"), published("tiny")
    evaluation.load_published(target, checkpoint(source, tmp_path / "matchstereo_tiny_fsd.pth"))
    assert all(a.equal(b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True))


def test_wrong_checkpoints_are_refused(tmp_path):
    path = checkpoint(published("tiny"), tmp_path / "tiny.pth")
    with torch.device("meta"):
        small = published("small")
    with pytest.raises(UserError, match="does not fit MatchStereo.*checkpoint of this model and size"):
        evaluation.load_published(small, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="is not a torch checkpoint"):
        evaluation.load_published(published("tiny"), path)
    with pytest.raises(UserError, match="--variant huge: take one of tiny, small, base, flow_base"):
        published("huge")


def small_network():
    return build(SCALES["smoke"], "full")


@pytest.mark.parametrize("low_res_init", [False, True])
def test_images_of_any_size_are_matched(low_res_init):
    field, reliable = evaluation.match(small_network(), *torch.randint(0, 256, (2, 3, 70, 101), dtype=torch.uint8), True, low_res_init, multiple=16)
    assert field.shape == (2, 70, 101, 2) and reliable.shape == (2, 70, 101) and field.isfinite().all() and (field[..., 1] == 0).all()


def test_a_given_first_field_replaces_the_correlation():
    model, first = small_network(), torch.full((2, 4, 5, 2), 0.5)
    out = model(*torch.zeros(2, 1, 3, 64, 80), init_flow=first)
    assert out.init_flow is first and out.init_cv is None


def test_views_are_treated_alike():
    """Mirrored and exchanged views have mirrored and exchanged fields."""
    model = small_network().double()
    for p in model.parameters():
        if p.ndim == 4:  # kernels that do not know left from right, the grid being an odd number of strides wide
            p.data = (p.data + p.data.flip(-1)) / 2
    left, right = 255 * torch.rand(2, 1, 3, 64, 80, dtype=torch.float64)
    first = model(left, right).init_flow
    again = model(right, left).init_flow
    assert first.shape == again.shape and (first[0, ..., 0] <= 0).all() and (first[1, ..., 0] >= 0).all()
    assert (again[0, ..., 0] <= 0).all() and (again[1, ..., 0] >= 0).all()


# ---- the loss, the ablations, the baseline ----------------------------------------------------------------------------------------------


def constant_fields(value):
    """A network that answers `value` full-resolution pixels everywhere, at 1/16 first."""
    field = lambda step: torch.tensor([value, 0.0]).expand(2, 64 // step, 80 // step, 2) / step
    return ma.Matched(field(1), [{"self": field(16), "cross": field(16)}, {"self": field(4)}], field(16), None, field(4))


def test_loss_is_the_closed_form():
    """Truth -2 and 2, answer 1 everywhere: errors 3 and 1, mean 2. Weights from the last field back: 1, 0.9, 0.81, 0.729."""
    target = torch.zeros(2, 64, 80, 2)
    target[0, ..., 0], target[1, ..., 0] = -2, 2
    terms = match_loss(constant_fields(1.0), target, constrained=False)
    assert terms["final"] == pytest.approx(2) and terms["fields"] == pytest.approx(0.5 * 2 * (1 + 0.9 + 0.81 + 0.729))


def test_matched_fields_are_not_judged_in_occlusions():
    """Both true fields point right, so that no pixel's match leads back: the first field and "cross" count nothing."""
    target = torch.zeros(2, 64, 80, 2)
    target[..., 0] = 2
    terms = match_loss(constant_fields(1.0), target)
    assert terms["final"] == pytest.approx(1) and terms["fields"] == pytest.approx(0.5 * (1 + 0.81))


def test_unknown_pixels_count_nothing():
    target = torch.zeros(2, 64, 80, 2)
    target[:, :, 40:] = float("nan")
    terms = match_loss(constant_fields(1.0), target)
    assert terms["final"] == pytest.approx(0.5) and terms["fields"].isfinite()


def test_rounded_centres_attend_to_whole_pixels():
    """Its windows are plain 3x3 softmaxes around the nearest pixel, and its centres get no gradient."""
    q, k, v, _ = inputs()
    centre = torch.rand(2, 2, 63, 2, dtype=torch.float64) * 2 + 2
    o, alpha = rounded(q, k, v, centre.requires_grad_(), (7, 9), 1, True)
    expected = brute_force(q, k, v, centre.detach().round(), (7, 9), 1)
    close(o, expected[0], 1e-10)
    assert not o.requires_grad and ((alpha > 0).sum(-1) == 9).all()


def test_variants_differ_where_they_should():
    cfg = SCALES["small"]
    models = {variant: build(cfg, variant) for variant in ("full", "rounded", "ungated")}
    gates = sum(p.numel() for n, p in models["full"].named_parameters() if ".g.0." in n)
    assert count_params(models["full"]) == count_params(models["rounded"]) == count_params(models["ungated"]) + gates
    operators = {variant: {m.operator for m in model.modules() if isinstance(m, ma.MatchAttention)} for variant, model in models.items()}
    assert operators == {"full": {match_attention}, "rounded": {rounded}, "ungated": {match_attention}}


@torch.no_grad()
def test_the_row_network_looks_along_rows_and_the_right_way():
    """Left fields point left and right ones right; a change in another row's features changes no match before the layers' convolutions."""
    model = build(SCALES["smoke"], "row")
    out = model(*255 * torch.rand(2, 1, 3, 64, 80))
    assert out.field_up.shape == (2, 64, 80, 2) and (out.init_flow[0, ..., 0] <= 0).all() and (out.init_flow[1, ..., 0] >= 0).all()
    assert (out.init_flow[0, :, 0] == 0).all() and (out.init_flow[1, :, -1] == 0).all()  # nothing lies beyond the edge


# ---- evaluation -------------------------------------------------------------------------------------------------------------------------


def test_errors_of_a_known_answer():
    """A network that answers 1 where the truth is 0 and 4: EPE 1 and 3 by halves; occluded where it is 4."""
    fields = torch.zeros(3, 2, 64, 80, 2)
    fields[:, 0, :, 40:, 0] = 4
    pairs = data.Pairs(*torch.zeros(2, 3, 3, 64, 80, dtype=torch.uint8), fields, fields[..., 0] == 0)

    class Answer(torch.nn.Linear):
        def forward(self, left, right, stereo_pair):
            field = torch.zeros(2 * len(left), 64, 80, 2)
            field[..., 0] = 1
            return ma.Matched(field, [{"self": field[:, ::4, ::4] / 4}], field[:, ::16, ::16] / 16, None, field)

    found = evaluation.score(Answer(1, 1), pairs)
    curve = found.pop("curve")  # at 1/16, three of the five columns in the middle of the coarse ones lie where it is 4
    assert found == {"all": 2, "visible": 1, "occluded": 3, "bad1": 0.5} and curve == pytest.approx([2.2, 2, 2])


def test_curve_labels_fit_the_curve():
    cfg = SCALES["small"]
    out = build(cfg, "full")(*torch.zeros(2, 1, 3, 64, 128))
    labels = evaluation.curve_labels(cfg)
    assert len(labels) == len(evaluation.on_the_way(out)) and labels == [
        "first", "self", "cross", "1/8", "self", "cross", "self", "cross", "1/4", "self", "cross", "1/1"
    ]  # fmt: skip


def test_exponent_of_a_power():
    assert evaluation.exponent([1, 10, 100], [3, 3e2, 3e4]) == pytest.approx(2)


def test_the_operator_is_continuous_and_whole_pixel_windows_are_not(monkeypatch):
    assert evaluation.discontinuity() < 1e-6
    monkeypatch.setattr(evaluation, "match_attention", lambda q, k, v, c, grid, radius: match_attention(q, k, v, c.floor() + 0 * c, grid, radius))
    assert evaluation.discontinuity() > 1e-2


def test_windows_are_counted():
    """Beyond what the counter sees: 2 views x tokens x heads x d x 16 cells x 5, of self and cross, on three scales of one layer each."""
    cfg = SCALES["smoke"]
    model = build(cfg, "full")
    image = torch.zeros(1, 3, 64, 80)
    seen = count_flops(lambda: model(image, image))
    tokens = [4 * 5, 8 * 10, 16 * 20]
    expected = sum(2 * 2 * n * dim * 16 * 5 for n, dim in zip(tokens, reversed(cfg.dims), strict=True))
    assert evaluation.count_operations(model, (64, 80)) - seen == expected


def test_pictures_come_back_from_text():
    array = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8).numpy()
    assert (from_png(as_png(array)) == array).all()


def kitti(root, disparity=8.0, noc_columns=64):
    """One pair whose disparity is known in the lower half, as KITTI 2015 stores it."""
    image = np.random.default_rng(0).integers(0, 256, (80, 120, 3), np.uint8)
    truth = np.zeros((80, 120), np.uint16)
    truth[40:] = 256 * disparity
    noc = truth.copy()
    noc[:, :noc_columns] = 0
    for name, array in {"image_2": image, "image_3": np.roll(image, -8, 1), "disp_occ_0": truth, "disp_noc_0": noc}.items():
        (root / "training" / name).mkdir(parents=True)
        Image.fromarray(array).save(root / "training" / name / "000000_10.png")


def test_judgement_of_a_known_answer(tmp_path):
    """Right on the pixels both views see, 2.5 pixels off on the others."""
    kitti(tmp_path)
    answer = torch.zeros(80, 120, 2)
    answer[..., 0] = -8
    answer[:, :64, 0] = -10.5
    found = evaluation.judge(lambda left, right: answer, Config(data=str(tmp_path), dataset="kitti2015"))
    share = 64 / 120
    assert found["epe_all"] == pytest.approx(2.5 * share) and found["bad2_all"] == pytest.approx(100 * share) and found["d1_all"] == 0
    assert found["bad3_all"] == found["epe_noc"] == found["bad0.5_noc"] == 0


def test_published_weights_are_judged_on_a_dataset(tmp_path):
    kitti(tmp_path / "kitti")
    weights = checkpoint(published("tiny"), tmp_path / "tiny.pth")
    with pytest.raises(UserError, match="--weights needs --data"):
        evaluation.evaluate_published(Config(weights=weights))
    found = evaluation.evaluate_published(Config(weights=weights, data=str(tmp_path / "kitti"), dataset="kitti2015"))
    assert found.keys() >= {"epe_all", "d1_noc", "bad2_all"} and all(0 <= value < 1000 for value in found.values())


def test_training_on_published_data_takes_a_step(tmp_path):
    """Scene Flow's layout, a network of the published size, one step."""
    for side in ("left", "right"):
        (tmp_path / f"Monkaa/frames_cleanpass/a/{side}").mkdir(parents=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 220, 3), np.uint8)).save(
            tmp_path / f"Monkaa/frames_cleanpass/a/{side}/0000.png"
        )
        (tmp_path / f"Monkaa/disparity/a/{side}").mkdir(parents=True)
        (tmp_path / f"Monkaa/disparity/a/{side}/0000.pfm").write_bytes(b"Pf\n220 200\n-1\n" + np.full((200, 220), 5, "<f4").tobytes())
    cfg = Config(data=str(tmp_path), out=tmp_path / "run", crop=(192, 192), steps=1, batch=1, seeds=(0,), processes=1)
    train(cfg)
    assert (tmp_path / "run/tiny/0").is_dir() and list((tmp_path / "run/tiny/0").glob("step-*.safetensors"))
    with pytest.raises(UserError, match="is smaller than --crop 256 192"):
        train(replace(cfg, crop=(256, 192), out=tmp_path / "other"))


def test_padding_repeats_the_edge_and_is_undone():
    image = torch.arange(30.0).view(1, 1, 5, 6)
    padded, (rows, columns) = evaluation.pad_to(image, 4)
    assert padded.shape == (1, 1, 8, 8) and torch.equal(padded[..., rows, columns], image)
    assert torch.equal(padded[0, 0, 0, :6], image[0, 0, 0]) and torch.equal(padded[0, 0, 3:, 7], image[0, 0, :, 5])


def test_end_point_error_keeps_the_unknown_unknown():
    error = evaluation.end_point_error(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]))
    assert error[0] == 5 and error[1].isnan()
