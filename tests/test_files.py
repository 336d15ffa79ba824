"What the check of a file calls fine is what can be read: damaged headers, false names, deep greys, odd geometry"
import gzip
import shutil
import struct
import tarfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medclip_nb.core import InputError
from medclip_nb.datasets import FILE_ISSUES, drop_unusable, probe
from medclip_nb.datasets.manifest import Manifest
from medclip_nb.datasets.readers.webdataset import tar_samples
from medclip_nb.evaluators.grounding import read_mask
from medclip_nb.images import StudyPreprocess, load_volume, read_image, read_volume

pytestmark = pytest.mark.filterwarnings("ignore")
BLOBS = np.add.outer(np.arange(24) ** 2, 3 * np.arange(20) ** 2).astype(np.uint16)


def write_dicom(path, array, bits=None, **tags):
    "One image, or frames (n, h, w), of unsigned or signed numbers"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *array.shape[-2:], 1, "MONOCHROME2"
    if array.ndim == 3: ds.NumberOfFrames = len(array)
    ds.BitsAllocated = array.dtype.itemsize * 8
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(array.dtype.kind == "i")
    ds.PixelData = array.tobytes()
    ds["PixelData"].VR = "OW"
    for name, value in tags.items(): setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)
    return path


def gray(path, **read): return np.asarray(read_image(path, **read))[..., 0].astype(int)


def write_tiff(path, array, photometric):
    "A plain little-endian TIFF of one strip"
    raw, (h, w), kind = array.tobytes(), array.shape, {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    tags = [(256, w), (257, h), (258, array.dtype.itemsize * 8), (259, 1), (262, photometric), (273, 8), (277, 1),
            (278, h), (279, len(raw)), (339, kind)]
    with open(path, "wb") as f:
        f.write(struct.pack("<2sHI", b"II", 42, 8 + len(raw)) + raw + struct.pack("<H", len(tags)))
        for tag, value in tags: f.write(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value))
        f.write(struct.pack("<I", 0))
    return path


# -- grey scales

@pytest.mark.parametrize("slope, intercept", [(1, 0), (-10, 3000), (1, -1024), (4, -1000), (0.01, 0)])
@pytest.mark.parametrize("photo", ["MONOCHROME1", "MONOCHROME2"])
def test_eight_bits_fill_the_greys_whatever_they_stand_for(tmp_path, slope, intercept, photo):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = write_dicom(tmp_path / "a.dcm", ramp, RescaleSlope=slope, RescaleIntercept=intercept,
                       PhotometricInterpretation=photo)
    upwards = (slope > 0) == (photo == "MONOCHROME2")
    assert np.abs(gray(path) - (ramp if upwards else 255 - ramp.astype(int))).max() <= 1


@pytest.mark.parametrize("slope, intercept", [(0, 5), ("nan", 0), (1, "inf")])
def test_values_that_make_no_sense_are_refused(tmp_path, slope, intercept):
    path = write_dicom(tmp_path / "a.dcm", BLOBS, RescaleSlope=slope, RescaleIntercept=intercept)
    for read in (read_image, read_volume):
        with pytest.raises(InputError, match=r"a\.dcm: cannot be read as DICOM .*rescale slope"): read(path)


@pytest.mark.parametrize("seed", range(6))
def test_windows_and_tables_agree_with_pydicom(tmp_path, seed):
    rng = np.random.default_rng(seed)
    array = rng.integers(-2000, 3000, (12, 10)).astype(np.int16)
    tags = {"RescaleSlope": str(round(float(rng.uniform(0.5, 3)), 3)),
            "RescaleIntercept": int(rng.integers(-1100, 100)),
            "WindowCenter": int(rng.integers(-200, 400)), "WindowWidth": int(rng.integers(2, 3000)),
            "VOILUTFunction": ["LINEAR", "LINEAR_EXACT", "SIGMOID"][seed % 3]}
    if seed > 3: # A table instead of a window
        table = Dataset()
        table.LUTDescriptor, table.LUTData = [256, 0, 12], (np.arange(256) ** 1.5).round().astype(np.uint16).tobytes()
        table["LUTData"].VR, tags["VOILUTSequence"] = "OW", Sequence([table])
    path = write_dicom(tmp_path / "a.dcm", array, **tags)
    ds = pydicom.dcmread(path)
    values = apply_modality_lut(ds.pixel_array, ds)
    expected = apply_voi_lut(values.astype(int) if seed > 3 else values, ds)
    low, high = (0, 2**12 - 1) if seed > 3 else (0, 2**16 - 1) if array.dtype.kind == "u" else (-2**15, 2**15 - 1)
    if seed <= 3: # pydicom maps a window to the range of the stored bits, after the rescale
        ends = apply_modality_lut(np.array([low, high]), ds)
        low, high = float(ends.min()), float(ends.max())
    assert np.abs(gray(path) - (expected - low) / (high - low) * 255).max() <= 1.01


def test_one_hot_pixel_does_not_darken_a_radiograph(tmp_path):
    radiograph = np.random.default_rng(0).integers(500, 3500, (128, 128)).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(radiograph).save(tmp_path / name)
        clean = gray(tmp_path / name)
        hot = radiograph.copy()
        hot[3, 3] = 65535
        Image.fromarray(hot).save(tmp_path / name)
        assert np.abs(gray(tmp_path / name) - clean).max(initial=0, where=hot == radiograph) <= 1, name
    as_dicom = gray(write_dicom(tmp_path / "a.dcm", hot))
    assert np.array_equal(gray(tmp_path / "a.tif"), as_dicom)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int16, np.int32, np.float32])
@pytest.mark.parametrize("photometric", [0, 1])
def test_tiff_of_any_depth_is_not_inverted_and_does_not_wrap(tmp_path, dtype, photometric):
    top = {1: 255, 2: 65535, 4: 2**32 - 1}[np.dtype(dtype).itemsize] if np.dtype(dtype).kind == "u" else 30_000
    ramp = (np.arange(4096) / 4095 * top).astype(dtype).reshape(64, 64)
    if np.dtype(dtype).kind == "i": ramp -= 15_000
    path = write_tiff(tmp_path / "a.tif", ramp, photometric)
    try: found = gray(path)
    except InputError as error: # PIL does not open these
        assert photometric == 0 and dtype in (np.uint32, np.int16, np.int32)
        assert str(error).startswith(f"{path}: cannot be read as an image")
        assert probe(path, "decode").kind == "unreadable image"
        return
    assert abs(found[0, 0] - (0 if photometric else 255)) <= 1 and abs(found[-1, -1] - (255 if photometric else 0)) <= 1
    assert (np.diff(found.ravel() * (1 if photometric else -1)) >= 0).all()


# -- geometry of single images

@pytest.mark.parametrize("tags", [{"PixelSpacing": [2, 1]}, {"ImagerPixelSpacing": ["0.4", "0.2"]},
                                  {"NominalScannedPixelSpacing": [1, 0.5]}, {"PixelAspectRatio": [2, 1]}])
def test_pixels_become_square_as_in_nifti(tmp_path, tags):
    array = np.zeros((64, 64), np.uint8)
    array[16:32, 16:48] = 255
    image = read_image(write_dicom(tmp_path / "a.dcm", array, **tags))
    nib.save(nib.Nifti1Image(np.stack([array.T[:, ::-1]] * 3, -1), np.diag([1, 2, 5, 1.])), tmp_path / "a.nii.gz")
    assert image.size == (64, 128) and image.info["stored_size"] == (64, 64)
    assert np.array_equal(np.asarray(image), np.asarray(read_image(tmp_path / "a.nii.gz")))
    rows, columns = np.nonzero(np.asarray(image)[..., 0] > 127)
    assert np.ptp(rows) == np.ptp(columns) == 31


def test_masks_follow_pixels_that_become_square(tmp_path):
    mask = (BLOBS > 900).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "m.png")
    image = read_image(write_dicom(tmp_path / "a.dcm", BLOBS, PixelSpacing=[2, 1]))
    found = read_mask(tmp_path / "m.png", image.size[::-1], 1, image.info["stored_size"][::-1])
    assert np.array_equal(found, mask.repeat(2, axis=0))


@pytest.mark.parametrize("tags", [{}, {"PixelSpacing": [0.2, 0.2]}, {"PixelSpacing": [0, 0]},
                                  {"PixelAspectRatio": [1, 1]}, {"PixelSpacing": ["0.1389", "0.139"]}])
def test_square_or_unknown_pixels_stay(tmp_path, tags):
    assert read_image(write_dicom(tmp_path / "a.dcm", BLOBS, **tags)).size == BLOBS.shape[::-1]


def test_frames_have_their_own_scale_and_shape(tmp_path):
    groups = []
    for slope, spacing in ((1, [1, 1]), (3, [2, 1])):
        values, measures, group = Dataset(), Dataset(), Dataset()
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = slope, -100, "US"
        measures.PixelSpacing = spacing
        group.PixelValueTransformationSequence, group.PixelMeasuresSequence = Sequence([values]), Sequence([measures])
        groups.append(group)
    path = write_dicom(tmp_path / "a.dcm", np.stack([BLOBS] * 2), PerFrameFunctionalGroupsSequence=Sequence(groups))
    assert [read_image(path, frame=i).size for i in (0, 1)] == [(20, 24), (20, 48)]
    high = [int((gray(path, frame=i, window=(1000, 2000)) == 255).sum()) for i in (0, 1)]
    assert high == [int((BLOBS - 100.0 >= 2000).sum()), high[1]] and high[1] > 0


# -- series

def write_series(folder, positions, voxel=lambda z: np.full((8, 8), 100 + 10 * z), **tags):
    folder.mkdir()
    for i, z in enumerate(positions):
        tag = {"PixelSpacing": [1, 1], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [0, 0, z],
               "SeriesInstanceUID": "1.2.3"} | tags
        write_dicom(folder / f"{i}.dcm", np.round(voxel(z)).astype(np.int16), **tag)
    return folder


@pytest.mark.parametrize("positions", [[0, 2, 4, 6, 16, 26], [0, 1, 2, 4, 5, 6], [0, 3, 5, 9, 12]])
def test_uneven_slices_lie_where_they_were_measured(tmp_path, positions):
    "Values that grow with the height stay at their height; a mean spacing would move them"
    volume = read_volume(write_series(tmp_path / "s", positions), percentiles=None)
    height = volume.affine[2, 0] * np.arange(len(volume.array)) + volume.affine[2, 3]
    assert np.abs(volume.array[:, 4, 4] - (100 + 10 * height)).max() < 0.01
    assert (height[0], height[-1]) == (positions[0], positions[-1])
    assert any("uneven distances" in note for note in volume.notes)


def test_even_slices_are_not_touched(tmp_path):
    rng = np.random.default_rng(0)
    stored = {z: rng.integers(0, 1000, (8, 8)) for z in (0.0, 2.5, 5.01, 7.5)}
    volume = read_volume(write_series(tmp_path / "s", stored, stored.get), percentiles=None)
    assert np.array_equal(volume.array, np.stack([*stored.values()])) and volume.notes == []


@pytest.mark.parametrize("tags", [{"PixelSpacing": [0, 0]}, {"ImageOrientationPatient": [0] * 6},
                                  {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, {"PixelSpacing": [-1, 1]}])
def test_series_without_room_are_refused_by_both(tmp_path, tags):
    folder = write_series(tmp_path / "s", [0, 1, 2], **tags)
    with pytest.raises(InputError, match="cannot be right"): read_volume(folder)
    found = probe(folder, "decode", folders=True)
    assert found.kind == "unreadable image" and "cannot be right" in found.message


def test_padding_does_not_stretch_the_greys(tmp_path):
    body = lambda z: np.where(np.eye(8, dtype=bool), -2000, 50 * np.arange(8)[:, None] + z)
    plain = lambda z: np.where(np.eye(8, dtype=bool), z, 50 * np.arange(8)[:, None] + z)
    padded = read_volume(write_series(tmp_path / "a", [0, 1, 2], body, PixelPaddingValue=-2000))
    assert np.abs(padded.array - read_volume(write_series(tmp_path / "b", [0, 1, 2], plain)).array).max() < 0.02


# -- NIfTI

def singular_sform(path, qform_code=1):
    image = nib.Nifti1Image(np.random.default_rng(0).normal(0, 1, (8, 9, 10)).astype(np.float32), np.eye(4))
    image.header.set_qform(np.diag([-2, 2, 3, 1.]), qform_code)
    image.header["sform_code"] = 1
    for row in ("srow_x", "srow_y", "srow_z"): image.header[row] = 0
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), path)
    return path


def test_a_singular_sform_gives_way_to_the_qform(tmp_path):
    volume = load_volume(singular_sform(tmp_path / "v.nii.gz"))
    assert np.allclose(volume.affine, np.diag([-2, 2, 3, 1])) and "qform" in volume.notes[0]
    assert probe(tmp_path / "v.nii.gz", "decode").kind == "" and read_image(tmp_path / "v.nii.gz").size == (8, 9)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(volume.array, volume.affine)).get_fdata()
    assert np.allclose(read_volume(tmp_path / "v.nii.gz", orientation="RAS", percentiles=None).array, canonical)
    singular_sform(tmp_path / "w.nii.gz", 0)
    for images in ("header", "decode"): assert "neither its sform" in probe(tmp_path / "w.nii.gz", images).message
    with pytest.raises(InputError, match="w.nii.gz.*neither its sform nor its qform"): read_image(tmp_path / "w.nii.gz")


@pytest.mark.parametrize("seed", range(4))
def test_orientation_agrees_with_nibabel(tmp_path, seed):
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ np.diag(rng.uniform(0.5, 4, 3))
    affine = np.r_[np.c_[turn, rng.normal(size=3) * 50], [[0, 0, 0, 1]]]
    image = nib.Nifti1Image(rng.integers(-1000, 1000, (5, 6, 7)).astype([">i2", "<i2"][seed % 2]), affine)
    nib.save(image, tmp_path / "v.nii.gz")
    found = read_volume(tmp_path / "v.nii.gz", orientation="RAS", percentiles=None)
    expected = nib.as_closest_canonical(image)
    assert np.array_equal(found.array, expected.get_fdata()) and np.allclose(found.affine, expected.affine, atol=1e-4)


def test_scales_that_are_no_numbers_mean_none_and_colors_are_refused(tmp_path):
    image = nib.Nifti1Image(BLOBS[..., None].astype(np.int16), np.eye(4))
    nib.save(image, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[112:120] = struct.pack("<2f", np.nan, np.nan)
    (tmp_path / "a.nii").write_bytes(raw)
    assert np.array_equal(load_volume(tmp_path / "a.nii").array, BLOBS[..., None])
    rgb = np.zeros((4, 4, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nib.save(nib.Nifti1Image(rgb, np.eye(4)), tmp_path / "rgb.nii.gz")
    nib.save(nib.Nifti1Image(np.full((4, 4, 4), np.nan), np.eye(4)), tmp_path / "nan.nii.gz")
    for name, why in (("rgb", "neither a volume nor"), ("nan", "no voxel has a finite value")):
        with pytest.raises(InputError, match=why): read_image(tmp_path / f"{name}.nii.gz")
        assert why in probe(tmp_path / f"{name}.nii.gz", "decode").message


# -- one answer, whatever the name

def test_a_false_name_means_the_same_to_the_check_and_to_the_reader(tmp_path):
    Image.fromarray(BLOBS.astype(np.uint8)).save(tmp_path / "a.png")
    write_dicom(tmp_path / "b.dcm", BLOBS)
    nib.save(nib.Nifti1Image(np.stack([BLOBS] * 3, -1).astype(np.int16), np.diag([1, 1, 3, 1.])), tmp_path / "c.nii.gz")
    (tmp_path / "d.nii").write_bytes(gzip.decompress((tmp_path / "c.nii.gz").read_bytes()))
    np.save(tmp_path / "e.npy", np.stack([BLOBS] * 3))
    np.savez(tmp_path / "f.npz", x=np.stack([BLOBS] * 3))
    torch.save(torch.zeros(3, 24, 20), tmp_path / "g.pt")
    for path in sorted(tmp_path.iterdir()):
        expected = np.asarray(read_image(path))
        for name in ("x", "x.jpg", "x.png", "x.dcm", "x.nii.gz", "x.nii", "x.npz", "x.pt", "x.txt"):
            shutil.copy(path, tmp_path / name)
            assert np.array_equal(np.asarray(read_image(tmp_path / name)), expected), (path.name, name)
            assert probe(tmp_path / name, "decode").kind in ("", "wrong suffix"), (path.name, name)
            (tmp_path / name).unlink()


def small_files(folder):
    "A small file of each kind"
    rng = np.random.default_rng(0)
    Image.fromarray(BLOBS).save(folder / "deep.png")
    Image.fromarray(rng.integers(0, 255, (24, 20, 3), np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 255, (24, 20, 3), np.uint8)).save(folder / "a.jpg", exif=Image.Exif())
    Image.fromarray(BLOBS).save(folder / "a.tif", compression="tiff_lzw")
    Image.fromarray(BLOBS.astype(np.uint8)).save(folder / "a.bmp")
    window = {"WindowCenter": 900, "WindowWidth": 1800, "PixelSpacing": ["0.5", "0.25"], "RescaleIntercept": "-1024",
              "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"], "ImagePositionPatient": ["0", "0", "1.5"],
              "RescaleSlope": "1.5", "SliceThickness": "2.5", "PixelPaddingValue": 0}
    write_dicom(folder / "a.dcm", BLOBS, **window)
    write_dicom(folder / "frames.dcm", np.stack([BLOBS] * 3), **window)
    image = nib.Nifti1Image(np.stack([BLOBS] * 4, -1).astype(np.int16), np.diag([2, 2, 3, 1.]))
    image.header.set_slope_inter(2, -100)
    for name in ("a.nii", "a.nii.gz"): nib.save(image, folder / name)
    nib.save(nib.Nifti2Image(np.stack([BLOBS] * 4, -1).astype(np.float32), np.diag([2, 2, 3, 1.])), folder / "b.nii")
    np.save(folder / "a.npy", np.stack([BLOBS] * 3))
    np.savez(folder / "a.npz", x=np.stack([BLOBS] * 3))
    torch.save(torch.zeros(3, 24, 20), folder / "a.pt")
    (folder / "a.mha").write_bytes(b"ObjectType = Image\nNDims = 2\nDimSize = 20 24\nElementType = MET_USHORT\n"
                                   b"ElementDataFile = LOCAL\n" + BLOBS.tobytes())


def damaged(raw, rng):
    "A few bits of the header turned, or the file cut, or numbers made large"
    raw = bytearray(raw)
    kind = rng.integers(0, 8)
    if kind == 0: return bytes(raw[:rng.integers(1, len(raw))])
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, min(len(raw), 1200)))
        if kind == 1: raw[at:at + 4] = b"\xff\xff\xff\x7f"
        elif kind == 2: raw[at] = 0
        else: raw[at] ^= 1 << int(rng.integers(0, 8))
    return bytes(raw)


ODD = {kind for kind, (severity, _) in FILE_ISSUES.items() if severity == "warning"} | {""}


@pytest.mark.parametrize("name", ["deep.png", "a.png", "a.jpg", "a.tif", "a.bmp", "a.dcm", "frames.dcm", "a.nii",
                                  "a.nii.gz", "b.nii", "a.npy", "a.npz", "a.pt", "a.mha"])
def test_damage_is_found_by_the_check_and_refused_by_the_reader_alike(tmp_path, name):
    "Whatever the damage: the check finds no fault where there is an image, and nowhere else"
    small_files(tmp_path)
    whole, rng, path = (tmp_path / name).read_bytes(), np.random.default_rng(zlib.crc32(name.encode())), tmp_path / name
    start, outcomes, steps = time.perf_counter(), set(), StudyPreprocess(size=(4, 16, 16))
    for n in range(60):
        path.write_bytes(whole if n == 0 else damaged(whole, rng))
        readers = {False: read_image, True: lambda p: steps({"x": p})}
        for series, read in readers.items():
            found = probe(path, "decode", hashes=True, folders=series)
            try: image, error = read(path), None
            except InputError as fault: image, error = None, str(fault)
            assert (found.kind in ODD) == (image is not None) or found.kind == "tiny image", (n, series, found, error)
            if error: assert path.name in error and "\n" not in error and "\n" not in found.message, error
            outcomes.add(image is not None)
    assert time.perf_counter() - start < 60
    assert outcomes == ({False} if name == "a.mha" else {True, False})


def test_checksums_that_a_file_carries_are_compared(tmp_path):
    "PIL, nibabel, torch and tarfile decode these without a word"
    small_files(tmp_path)
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as tar: tar.add(tmp_path / "a.png", "1.png")
    raw = {name: bytearray((tmp_path / name).read_bytes()) for name in ("a.png", "a.nii.gz", "a.pt", "s.tar.gz")}
    Image.fromarray(BLOBS.astype(np.uint8) % 3).save(tmp_path / "mask.png")
    raw["mask.png"] = bytearray((tmp_path / "mask.png").read_bytes())
    for name in ("a.png", "mask.png"): raw[name][-13] ^= 1 # The checksum of its pixels
    for name in ("a.nii.gz", "s.tar.gz"): raw[name][-8] ^= 1
    raw["a.pt"][raw["a.pt"].find(bytes(3000)) + 1500] ^= 1 # A number
    readers = {"a.png": read_image, "a.nii.gz": read_image, "a.pt": load_volume,
               "s.tar.gz": lambda path: [*tar_samples(path)], "mask.png": lambda path: read_mask(path, BLOBS.shape, 2)}
    for name, read in readers.items():
        read(tmp_path / name)
        (tmp_path / name).write_bytes(raw[name])
        with pytest.raises(InputError, match=f"{name}.*(checksum|CRC)"): read(tmp_path / name)
        if name[0] == "a": assert probe(tmp_path / name, "decode").kind == "unreadable image"


def test_a_picture_that_lacks_lines_is_not_filled_up(tmp_path):
    "A PNG whose data end properly, before the height that its header states"
    for name, height in (("whole.png", 24), ("tall.png", 40)):
        head = b"IHDR" + struct.pack(">IIBBBBB", 20, height, 8, 2, 0, 0, 0)
        lines = (b"\0" + b"\0" * 60) * 24 if name == "whole.png" else (b"\0" + b"\7" * 60) * 24
        parts = [head, b"IDAT" + zlib.compress(lines), b"IEND"]
        chunks = [struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts]
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert read_image(tmp_path / "whole.png").size == (20, 24), "black lines are lines"
    with pytest.raises(InputError, match="tall.png.*truncated"): read_image(tmp_path / "tall.png")
    assert probe(tmp_path / "tall.png", "decode").kind == "truncated image"
    assert read_image(tmp_path / "tall.png", truncated=True).size == (20, 40)


@pytest.mark.parametrize("kind", ["a.nii", "a.nii.gz", "frames.dcm", "a.npy", "a.npz"])
def test_a_billion_pixels_on_paper_take_neither_time_nor_memory(tmp_path, kind):
    import resource
    small_files(tmp_path)
    path = tmp_path / kind
    if kind.startswith("a.nii"):
        raw = bytearray((tmp_path / "a.nii").read_bytes())
        raw[40:48] = struct.pack("<4h", 3, 1000, 1000, 1000)
        path.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
    elif kind == "frames.dcm":
        ds = pydicom.dcmread(path)
        ds.NumberOfFrames, ds.Rows, ds.Columns = 40, 5000, 5000
        ds.save_as(path)
    else:
        header = {"descr": "<f4", "fortran_order": False, "shape": (1000, 1000, 1000)}
        with open(tmp_path / "a.npy", "wb") as f: np.lib.format.write_array_header_1_0(f, header)
        if kind == "a.npz":
            with zipfile.ZipFile(path, "w") as z: z.write(tmp_path / "a.npy", "x.npy")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for images in ("header", "decode"): found = probe(path, images)
    assert found.kind in ("truncated image", "huge image", "unreadable image")
    for read in (read_image, read_volume):
        with pytest.raises(InputError, match=kind): read(path)
    assert time.perf_counter() - start < 5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_bad_rows_are_left_out_and_counted(tmp_path):
    for i in range(4): write_dicom(tmp_path / f"{i}.dcm", BLOBS, RescaleSlope="1", RescaleIntercept="-1024")
    raw = (tmp_path / "2.dcm").read_bytes()
    (tmp_path / "2.dcm").write_bytes(raw.replace(b"-1024 ", b"-1p24 "))
    rows = Manifest({"image": [f"{i}.dcm" for i in range(4)]})
    rows.root = str(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept, _ = drop_unusable(rows, max_bad=0.5)
    assert kept["image"].tolist() == ["0.dcm", "1.dcm", "3.dcm"] and [s["row"] for s in kept.skipped] == [2]
    assert "2.dcm" in kept.skipped[0]["message"]


def test_shipped_files_are_read_or_refused_alike():
    for path in sorted((Path(pydicom.__file__).parent / "data/test_files").glob("*.dcm")):
        fine = probe(path, "decode").kind in ODD
        try: read_image(path)
        except InputError: assert not fine, path.name
        else: assert fine or probe(path, "decode").kind == "tiny image", path.name
