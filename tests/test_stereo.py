"""Rendered pairs against closed forms and against themselves seen from the other side; readers on files written by hand in the published layouts."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import stereo
from common.data.stereo import StereoFolder, motorcycle, pairs, read_field, read_flo, read_pfm, render
from common.errors import UserError

# ---- rendered pairs ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("motion", ["stereo", "flow"])
def test_a_pair_is_a_function_of_seed_and_index(motion):
    several, one = render(torch.arange(4), 7, (24, 48), motion), render(torch.tensor([3]), 7, (24, 48), motion)
    for a, b in zip(several, one, strict=True):
        assert torch.equal(a[3:], b) or (a.is_floating_point() and torch.allclose(a[3:], b, atol=1e-4))
    assert not torch.equal(render(torch.tensor([3]), 8, (24, 48), motion).left, one.left)
    assert len(pairs(35, 7, (24, 48), motion).left) == 35


def one_box(rng, size, motion, textures):
    """A box of disparity 10 around (64, 32), 32 wide and 20 high, in front of a background of disparity 2."""
    centre = np.tile([64.0, 32.0], (stereo.LAYERS, 1))
    still, flat = np.zeros((stereo.LAYERS, 2, 2)), np.array([[[1 / 16, 0], [0, 1 / 10]]] * stereo.LAYERS)
    disparity = np.full(stereo.LAYERS, 10.0)
    disparity[0] = 2
    shape = stereo._around(flat, centre, 0)
    shape[0], shape[2:] = 0, 2
    layers = (
        stereo._around(still, centre, np.stack([-disparity, 0 * disparity], -1)), shape, np.ones(stereo.LAYERS, bool),
        stereo._around(flat, centre, 0), np.zeros(stereo.LAYERS, int), np.ones((stereo.LAYERS, 2, 3)),
    )  # fmt: skip
    return tuple(x.astype(np.float32) if x.dtype == np.float64 else x for x in layers)


def test_occlusion_of_a_box_is_the_closed_form(monkeypatch):
    monkeypatch.setattr(stereo, "_draw", one_box)
    made = render(torch.tensor([0]), 0, (64, 128))
    left, right = (-made.fields[0, 0, 32, :, 0]).tolist(), made.fields[0, 1, 32, :, 0].tolist()
    box = lambda first, last: [10.0 if first <= x <= last else 2.0 for x in range(128)]
    assert left == pytest.approx(box(49, 79), abs=1e-4) and right == pytest.approx(box(39, 69), abs=1e-4)
    hidden = [(~made.visible[0, view, 32]).nonzero().flatten().tolist() for view in (0, 1)]
    assert hidden == [[0, 1, *range(41, 49)], [*range(70, 78), 126, 127]]
    assert made.fields[..., 1].abs().max() == 0


@pytest.mark.parametrize(("motion", "split"), [("stereo", "train"), ("flow", "test")])
def test_visible_pixels_look_alike_and_lead_back(motion, split):
    made = pairs(24, 3, (64, 128), motion, split)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(128.0), indexing="ij")
    for view, (here, there) in enumerate([(made.left, made.right), (made.right, made.left)]):
        field, visible = made.fields[:, view], made.visible[:, view]
        column, row = (x + field[..., 0]).round().long().clamp(0, 127), (y + field[..., 1]).round().long().clamp(0, 63)
        n = torch.arange(24)[:, None, None]
        back = made.fields[n, 1 - view, row, column]
        leads_back = (field + back).abs().sum(-1) < 0.2
        assert leads_back[visible].float().mean() > 0.98 > 0.5 > leads_back[~visible].float().mean()
        difference = (here.permute(0, 2, 3, 1).float() - there[n, :, row, column].float()).abs().mean(-1)
        assert difference[visible].mean() < 8 and difference[~visible].mean() > 4 * difference[visible].mean()
    assert made.visible.float().mean() > 0.7
    if motion == "stereo":
        assert (-made.fields[:, 0, ..., 0]).max() > 12 and (made.fields[..., 1] == 0).all()
    else:
        assert made.fields[..., 1].abs().max() > 4


def test_splits_share_no_texture_and_an_unknown_one_is_refused():
    names = [set(photos) | set(grey) for photos, grey in stereo.TEXTURES.values()]
    assert not names[0] & names[1]
    with pytest.raises(ValueError, match="no split 'val'"):
        render(torch.tensor([0]), 0, (24, 48), split="val")


@pytest.mark.parametrize("shrink", [1, 4])
def test_the_real_pair_matches_along_its_disparity(shrink):
    left, right, field = motorcycle(shrink)
    assert left.shape == right.shape == (3, 500 // shrink, 741 // shrink) and field.shape[:2] == left.shape[1:]
    known = field.isfinite().all(-1)
    assert 0.7 < known.float().mean() < 1
    rows, columns = known.nonzero().T

    def difference(shift):
        match = (columns + shift).round().long()
        inside = (match >= 0) & (match < left.shape[2])
        return (left[:, rows, columns].float() - right[:, rows, match.clamp(0, left.shape[2] - 1)].float()).abs().mean(0)[inside].median()

    true = field[rows, columns, 0]
    assert -70 / shrink < true.min() and true.max() < 0
    assert difference(true) < 0.5 * difference(true * 0) and difference(true) < difference(1.3 * true)


# ---- files ------------------------------------------------------------------------------------------------------------------------------


def write_pfm(path, rows, order="<"):
    """Rows from the top."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = b"-1.0" if order == "<" else b"1"
    body = b"".join(struct.pack(f"{order}{len(row)}f", *row) for row in reversed(rows))
    path.write_bytes(b"Pf\n%d %d\n%s\n" % (len(rows[0]), len(rows), scale) + body)


@pytest.mark.parametrize("order", ["<", ">"])
def test_pfm(tmp_path, order):
    write_pfm(tmp_path / "a.pfm", [[1, 2, 3], [4, float("inf"), 6]], order)
    assert read_pfm(tmp_path / "a.pfm").tolist() == [[1, 2, 3], [4, float("inf"), 6]]
    field = read_field(tmp_path / "a.pfm")
    assert field[0, 2].tolist() == [-3, 0] and field[1, 1].isnan().all() and field.dtype == torch.float32


def test_pfm_in_colour_and_with_spaces_in_the_header(tmp_path):
    (tmp_path / "a.pfm").write_bytes(b"PF 1 2 -1e0\n" + struct.pack("<6f", 4, 5, 6, 1, 2, 3))
    assert read_pfm(tmp_path / "a.pfm").tolist() == [[[1, 2, 3]], [[4, 5, 6]]]


def test_flo(tmp_path):
    (tmp_path / "a.flo").write_bytes(b"PIEH" + struct.pack("<ii4f", 2, 1, 0.5, -1, 1e10, 0))
    assert read_flo(tmp_path / "a.flo")[0, 0].tolist() == [0.5, -1] and read_field(tmp_path / "a.flo")[0, 1, 0].isnan()


def test_kitti_disparity(tmp_path):
    Image.fromarray(np.array([[0, 256, 384]], np.uint16)).save(tmp_path / "a.png")
    field = read_field(tmp_path / "a.png")
    assert field[0, 0].isnan().all() and field[0, 1:].tolist() == [[-1, 0], [-1.5, 0]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pfm", b"P5 2 2 255\n", "is not a PFM file"),
        ("a.pfm", b"Pf\n2 2\n-1\n" + b"\0" * 12, "ends after 12 of 16 bytes"),
        ("a.flo", b"PIEF" + b"\0" * 8, "is not a .flo file"),
        ("a.flo", b"PIEH" + struct.pack("<ii", 9, 9), "ends after 0 of 648 bytes"),
        ("a.png", b"\x89PNG", "cannot be read as an image"),
        ("a.pfm", None, "cannot be read .*check the dataset"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_field(tmp_path / name)


def test_an_8_bit_picture_is_no_disparity_map(tmp_path):
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="is no disparity map"):
        read_field(tmp_path / "a.png")


# ---- published layouts ------------------------------------------------------------------------------------------------------------------

LEFT, RIGHT = np.full((2, 3, 3), 10, np.uint8), np.full((2, 3, 3), 20, np.uint8)
DISPARITY = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
NOC = [[True, False, True], [True, True, False]]


def picture(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path)


def kitti(root, left, right, occ, noc):
    picture(root / f"training/{left}/000000_10.png", LEFT)
    picture(root / f"training/{left}/000000_11.png", LEFT)
    picture(root / f"training/{right}/000000_10.png", RIGHT)
    values = (256 * np.array(DISPARITY)).astype(np.uint16)
    picture(root / f"training/{occ}/000000_10.png", values)
    picture(root / f"training/{noc}/000000_10.png", values * np.array(NOC))


def scene(root, images, truth, suffix="GT", mask=True):
    for i, array in enumerate((LEFT, RIGHT)):
        picture(root / images / f"im{i}.png", array)
    write_pfm(root / truth / f"disp0{suffix}.pfm", DISPARITY)
    if mask:
        picture(root / truth / "mask0nocc.png", np.where(NOC, 255, 128).astype(np.uint8))
    else:
        write_pfm(root / truth / "disp1.pfm", DISPARITY)


def sceneflow(root):
    base = root / "FlyingThings3D"
    for side, array in (("left", LEFT), ("right", RIGHT)):
        picture(base / f"frames_cleanpass/TRAIN/A/0000/{side}/0006.png", array)
    write_pfm(base / "disparity/TRAIN/A/0000/left/0006.pfm", DISPARITY)
    write_pfm(base / "disparity/TRAIN/A/0000/right/0006.pfm", [[-d for d in row] for row in DISPARITY])


def spring(root):
    h5py = pytest.importorskip("h5py")
    for side, array in (("left", LEFT), ("right", RIGHT)):
        picture(root / f"train/0001/frame_{side}/frame_{side}_0001.png", array)
        path = root / f"train/0001/disp1_{side}/disp1_{side}_0001.dsp5"
        path.parent.mkdir(parents=True)
        with h5py.File(path, "w") as file:
            file["disparity"] = np.array(DISPARITY, np.float32).repeat(2, 0).repeat(2, 1) * (1 if side == "left" else -1)


WRITERS = {
    "kitti2012": lambda root: kitti(root, "colored_0", "colored_1", "disp_occ", "disp_noc"),
    "kitti2015": lambda root: kitti(root, "image_2", "image_3", "disp_occ_0", "disp_noc_0"),
    "middlebury": lambda root: scene(root, "Adirondack", "Adirondack"),
    "middlebury2014": lambda root: scene(root, "train/Adirondack-perfect", "train/Adirondack-perfect", "", mask=False),
    "eth3d": lambda root: scene(root, "two_view_training/delivery_area_1l", "two_view_training_gt/delivery_area_1l"),
    "sceneflow": sceneflow,
    "spring": spring,
}


@pytest.mark.parametrize("name", WRITERS)
def test_published_layout(tmp_path, name):
    WRITERS[name](tmp_path)
    folder = StereoFolder(tmp_path, name)
    assert len(folder) == 1
    left, right, field, noc = folder[0]
    assert (left == 10).all() and (right == 20).all() and left.dtype == torch.uint8
    assert (-field[..., 0]).tolist() == DISPARITY and (field[..., 1] == 0).all()
    has_mask = stereo.LAYOUTS[name].noc is not None
    assert noc.tolist() == (NOC if has_mask else [[True] * 3] * 2)
    if stereo.LAYOUTS[name].right_field:
        assert torch.equal(folder.both_fields(0)[2], torch.stack([field, -field]))
    else:
        with pytest.raises(UserError, match="no field of the right view"):
            folder.both_fields(0)


def test_sintel_pairs_frames(tmp_path):
    for i, array in ((1, LEFT), (2, RIGHT)):
        picture(tmp_path / f"training/final/alley_1/frame_{i:04d}.png", array)
    path = tmp_path / "training/flow/alley_1/frame_0001.flo"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PIEH" + struct.pack("<ii12f", 3, 2, *range(12)))
    folder = StereoFolder(tmp_path, "sintel")
    assert len(folder) == 1
    left, right, field, noc = folder[0]
    assert (left == 10).all() and (right == 20).all() and field[1, 2].tolist() == [10, 11] and noc.all()


def test_missing_data_is_answered_with_a_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no stereo dataset 'kitti'"):
        StereoFolder(tmp_path, "kitti")
    with pytest.raises(UserError, match=r"holds no training/image_2.*get kitti2015 from"):
        StereoFolder(tmp_path / "nowhere", "kitti2015")
    WRITERS["kitti2015"](tmp_path)
    (tmp_path / "training/image_3/000000_10.png").unlink()
    with pytest.raises(UserError, match="image_3/000000_10.png cannot be read"):
        StereoFolder(tmp_path, "kitti2015")[0]
