"Pixels: formats and modes, upright and left-right, hostile files"
import os
import struct
import warnings
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image, ImageFile

from medclip_nb.core import InputError
from medclip_nb.images import (
    PLANES,
    Augment,
    ImageDataset,
    StudyPreprocess,
    laterality,
    orient,
    read_image,
    read_volume,
    stretch,
)

SHIPPED = Path(pydicom.__file__).parent / "data/test_files"
GREYS = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


@pytest.mark.parametrize("suffix, modes",
                         [("png", "1 L LA P RGB RGBA I;16"), ("jpg", "L RGB CMYK"),
                          ("tif", "1 L LA P RGB RGBA CMYK I;16 I F"),
                          ("bmp", "1 L P RGB"), ("webp", "RGB RGBA"), ("gif", "L P RGB")])
def test_every_mode_of_every_format_is_rgb_and_grey_stays_grey(tmp_path, suffix, modes):
    for mode in modes.split():
        if mode == "I;16": image = Image.fromarray(GREYS.astype(np.uint16) * 200)
        else: image = Image.fromarray(GREYS).convert(mode)
        image.save(path := tmp_path / f"x.{suffix}")
        found = np.asarray(read_image(path))
        assert found.shape == (8, 8, 3) and found.dtype == np.uint8, mode
        assert np.ptp(found.astype(int), axis=2).max() <= (3 if suffix in ("jpg", "webp") else 0), mode
        assert found[-1, -1].mean() > found[0, 0].mean() + 100, mode


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    upright = Image.new("L", (24, 16))
    upright.paste(255, (0, 0, 8, 8))
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}.get(orientation, [])
    stored = upright
    for method in undo: stored = stored.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.png"))[..., 0], np.asarray(upright))


@pytest.mark.parametrize("low, high", [(0, 4095), (0, 65535), (1000, 1255), (7, 7)])
def test_deep_greys_use_their_own_range_or_the_window(tmp_path, low, high):
    values = np.linspace(low, high, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "x.png")
    found = np.asarray(read_image(tmp_path / "x.png"))[..., 0]
    assert (found[0, 0], found[-1, -1]) == (0, 255 if high > low else 0)
    assert (np.asarray(read_image(tmp_path / "x.png", window=(70000, 2)))[..., 0] == 0).all()


def test_transparency_is_laid_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    palette = Image.new("P", (4, 4))
    palette.putpalette([0, 0, 0, 200, 10, 10])
    palette.save(tmp_path / "p.png", transparency=0)
    for name in ("a.png", "p.png"): assert read_image(tmp_path / name).getpixel((0, 0)) == (255, 255, 255)


def bomb(width, height):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_bombs_are_refused(tmp_path, side):
    (tmp_path / "x.png").write_bytes(bomb(side, side))
    with pytest.raises(InputError, match="x.png"): read_image(tmp_path / "x.png")


def test_truncated_files_only_when_asked(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:2000])
    with pytest.raises(InputError, match="x.jpg: cannot be read"): read_image(tmp_path / "x.jpg")
    assert read_image(tmp_path / "x.jpg", truncated=True).size == (64, 64)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_postscript_is_not_run(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="cannot be read as an image"): read_image(tmp_path / "x.png")


class Runs:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.mark.parametrize("suffix", ["pt", "npy", "npz"])
@pytest.mark.parametrize("read", [read_image, read_volume])
def test_pickles_never_run(tmp_path, suffix, read):
    path, ran = tmp_path / f"x.{suffix}", tmp_path / "ran"
    if suffix == "pt": torch.save(Runs(ran), path)
    else: (np.save if suffix == "npy" else np.savez)(path, np.array([Runs(ran)], dtype=object))
    with pytest.raises(InputError, match=f"x.{suffix}"): read(path)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["x.png", "x.dcm", "x.nii.gz", "x.nii", "x.pt", "x.npz", "x.npy", "x.weird"])
@pytest.mark.parametrize("content", [None, b"", b"nonsense" * 40])
def test_bad_files_are_named(tmp_path, name, content):
    if content is not None: (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name): read_image(tmp_path / name)


def test_monochrome1_is_inverted(tmp_path):
    ds = pydicom.dcmread(SHIPPED / "MR_small.dcm")
    ds.PhotometricInterpretation = "MONOCHROME1"
    ds.save_as(tmp_path / "x.dcm")
    ours, theirs = (np.asarray(read_image(p)).astype(int) for p in (tmp_path / "x.dcm", SHIPPED / "MR_small.dcm"))
    assert np.abs(255 - ours - theirs).max() <= 1 and np.ptp(theirs) > 200


def test_rescale_padding_and_name_without_suffix(tmp_path):
    ds = pydicom.dcmread(SHIPPED / "CT_small.dcm")
    ds.PixelPaddingValue = int(ds.pixel_array.max())
    ds.save_as(tmp_path / "slice")
    raw = ds.pixel_array
    expected = np.clip((raw * float(ds.RescaleSlope) + float(ds.RescaleIntercept) - (40 - 200)) / 400, 0,
                       1) * (raw != raw.max())
    assert np.abs(np.asarray(read_image(tmp_path / "slice", window=(40, 400)))[..., 0] - expected * 255).max() <= 0.51


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.dcm")), ids=lambda p: p.name)
def test_shipped_dicom_files_read_or_refuse(path):
    try: image = read_image(path)
    except InputError as error: assert path.name in str(error)
    else:
        assert image.mode == "RGB"
        ds = pydicom.dcmread(path, force=True)
        if ds.get("SamplesPerPixel") == 1 and ds.PhotometricInterpretation.startswith("MONO"):
            assert np.ptp(np.asarray(image), axis=2).max() == 0


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, 1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_left_is_right_in_the_picture(tmp_path, flips, order):
    "A mark far to the left, front and top of the patient, however the axes of the file lie"
    array, affine = np.zeros((8, 8, 8), np.float32), np.diag([2.0, 2, 2, 1])
    array[1, 6, 5] = 100 # RAS: left, front, upper half
    flipped = affine @ np.array([[f if i == j else 0 for j in range(3)] + [7 if f < 0 else 0]
                                 for i, f in enumerate(flips)] + [[0, 0, 0, 1]])
    flipped[:3, 3] = [14 if f < 0 else 0 for f in flips]
    stored, turned = array[tuple(slice(None, None, f) for f in flips)].transpose(order), flipped[:, [*order, 3]]
    nib.save(nib.Nifti1Image(np.ascontiguousarray(stored), turned), tmp_path / "x.nii.gz")
    at = {"axial": (5, (1, 6)), "coronal": (1, (2, 6)), "sagittal": (6, (2, 1))}
    for plane, (index, place) in at.items():
        pixels = np.asarray(read_image(tmp_path / "x.nii.gz", window=(50, 100), plane=plane, position=index / 7))[
            ..., 0]
        assert np.argwhere(pixels == 255).tolist() == [list(place)], plane
    volume = read_volume(tmp_path / "x.nii.gz", percentiles=None)
    assert np.argwhere(volume.array).tolist() == [[5, 1, 6]]
    for plane in PLANES: assert np.argwhere(orient(orient(volume, plane)).array).tolist() == [[5, 1, 6]]


def test_greys_stay_grey_and_sides_stay():
    batch = torch.rand(8, 1, 16, 16).repeat(1, 3, 1, 1)
    out = Augment(flip=0.5)(batch, torch.Generator().manual_seed(0))
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 0], out[:, 2])
    assert not laterality("bilateral") and laterality("LEFT lung") and not Augment().flip
    with pytest.raises(InputError, match="flip to 0"): Augment(flip=0.1).check(["right hip"])


def test_datasets_take_slices(tmp_path):
    pixels = lambda image: torch.from_numpy(np.array(image))
    data = ImageDataset([SHIPPED / "CT_small.dcm"], pixels, window="bone")
    assert torch.equal(data[0], pixels(read_image(SHIPPED / "CT_small.dcm", window="bone")))
    Image.new("L", (400, 400), 7).save(tmp_path / "x.jpg")
    assert read_image(tmp_path / "x.jpg", draft=100).size == (100, 100)


def test_gaps_warn_and_orientation_letters(tmp_path):
    with pytest.raises(InputError, match="orientation"):
        read_volume(Path(nib.__file__).parent / "tests/data/anatomical.nii", orientation="RLS")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_volume(Path(nib.__file__).parent / "tests/data/anatomical.nii", size=(16, 16, 16), spacing=(4, 4, 4))


def test_the_preprocessing_of_studies_takes_planes_and_refuses_other_words():
    for plane, letters in PLANES.items():
        steps = StudyPreprocess(orientation=plane)
        assert steps == StudyPreprocess(orientation=letters)
        assert steps.left_right == letters.find("L") - 3
    for odd in ("XYZ", "SP", "SPLA", "SSL", ""):
        with pytest.raises(InputError, match="No orientation"): StudyPreprocess(orientation=odd)


def test_only_arrays_of_bytes_are_divided_by_255(tmp_path):
    "A dim array keeps its grey; the same bytes as NIfTI have no scale of their own, and are stretched"
    dim = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    np.save(tmp_path / "dim.npy", dim)
    np.savez(tmp_path / "dim.npz", dim)
    torch.save(torch.from_numpy(dim), tmp_path / "dim.pt")
    nib.save(nib.Nifti1Image(dim.T, np.eye(4)), tmp_path / "dim.nii.gz")
    for name in ("dim.npy", "dim.npz", "dim.pt"):
        assert np.allclose(read_volume(tmp_path / name).array, dim / 255)
        assert np.asarray(read_image(tmp_path / name)).max() == dim[1].max()
    assert read_volume(tmp_path / "dim.nii.gz").array.max() == 1


@pytest.mark.parametrize("odd", [{"size": (8.5, 8, 8)}, {"size": (8, 8)}, {"percentiles": (99.5, 0.5)},
                                 {"percentiles": (5, 5)}, {"percentiles": (0, 101)}, {"percentiles": 99}])
def test_numbers_that_cannot_be_meant_are_refused(tmp_path, odd):
    np.save(tmp_path / "ct.npy", np.arange(60.).reshape(3, 4, 5))
    for call in (lambda: read_volume(tmp_path / "ct.npy", **odd), lambda: StudyPreprocess(**odd)):
        with pytest.raises(InputError, match=f"{next(iter(odd))} should be"): call()
    with pytest.raises(InputError, match="a lower and a higher one"): stretch(np.arange(9.), (90, 10))


@pytest.mark.parametrize("odd, says", [({"plane": "nonsense"}, "No plane 'nonsense'"), ({"position": 7}, "from 0 to 1"),
                                       ({"position": "middle"}, "from 0 to 1"), ({"window": "nonsense"}, "No window")])
def test_options_of_slices_are_checked_for_pictures_as_well(tmp_path, odd, says):
    Image.fromarray(GREYS).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=says): read_image(tmp_path / "a.png", **odd)
    mixed = read_image(tmp_path / "a.png", window="lung", plane="coronal", position=0.2)
    assert np.array_equal(np.asarray(mixed)[..., 0], GREYS)


@pytest.mark.parametrize("suffix", ["nii.gz", "npy", "tif", "dcm"])
def test_a_window_is_of_hounsfield_units_that_the_file_does_not_state(tmp_path, suffix):
    scan = np.random.default_rng(0).integers(-1000, 400, (4, 24, 20)).astype(np.int16)
    for name, values in (("hu", scan), ("stored", scan + 1024)):
        file = tmp_path / f"{name}.{suffix}"
        if suffix == "nii.gz": nib.save(nib.Nifti1Image(values.T, np.diag([1, 1, 3, 1])), file)
        elif suffix == "npy": np.save(file, values)
        elif suffix == "tif": Image.fromarray(values[0].astype(np.float32)).save(file)
        else:
            ds = pydicom.dcmread(SHIPPED / "CT_small.dcm")
            ds.Rows, ds.Columns, ds.PixelData, ds.RescaleIntercept = 24, 20, values[0].tobytes(), 0
            ds.save_as(file)
    pixels = lambda name, **how: np.asarray(read_image(tmp_path / f"{name}.{suffix}", window="lung", **how)).astype(int)
    assert np.abs(pixels("stored", rescale=(1, -1024)) - pixels("hu")).max() <= 1
    assert np.abs(pixels("stored") - pixels("hu")).mean() > 50
    for odd in ((0, 1), (1,), (1, np.nan), "HU"):
        with pytest.raises(InputError, match="rescale should be a slope and an intercept"): pixels("hu", rescale=odd)
