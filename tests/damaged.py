"""Damaged files of every format that the library reads, made by seed: pictures, volumes, series and tables.

`pictures` and `studies` write files into a folder and say of each what must become of it; `tables` does so for tables,
whose pictures are healthy.
"""
import gzip
import io
import json
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

LOST, FINE, OPEN = "lost", "fine", "open" # Unusable whoever looks; usable whoever looks; whatever the check says
BLOBS = np.add.outer(np.arange(40) ** 2, 3 * np.arange(48) ** 2).astype(np.uint16)
STACK = np.stack([BLOBS + 40 * z for z in range(6)]).astype(np.int16)


@dataclass(frozen=True)
class Damaged:
    "One file of the corpus"
    path: str # Below the folder
    kind: str # Such as PNG
    damage: str # What was done to it
    fate: str # LOST, FINE or OPEN


# -- whole files

def _saved(array: np.ndarray, **options) -> bytes:
    "A picture in a format of PIL"
    Image.fromarray(array).save(file := io.BytesIO(), **options)
    return file.getvalue()


def dicom(array: np.ndarray, syntax: str = ExplicitVRLittleEndian, **tags) -> bytes:
    "One image, or frames; a tag that is None is left out"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", generate_uid(None)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax == RLELossless else syntax
    ds = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *array.shape[-2:], 1, "MONOCHROME2"
    if array.ndim == 3: ds.NumberOfFrames = len(array)
    ds.BitsAllocated = ds.BitsStored = array.dtype.itemsize * 8
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(array.dtype.kind == "i")
    ds.PixelData = array.astype(array.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")).tobytes()
    ds["PixelData"].VR = "OW"
    ds.set_original_encoding(syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian)
    if syntax == RLELossless: ds.compress(RLELossless)
    for name, value in tags.items():
        if value is not None: setattr(ds, name, value)
        elif name in ds: delattr(ds, name)
    ds.save_as(file := io.BytesIO(), enforce_file_format=True)
    return file.getvalue()


def nifti(array: np.ndarray, packed: bool = False, kind: type = nib.Nifti1Image, **fields) -> bytes:
    "A volume whose header may lie"
    raw = bytearray(kind(array, np.diag([2.4, 2.4, 8, 1])).to_bytes())
    header = kind.header_class(bytes(raw[:kind.header_class.template_dtype.itemsize]), check=False)
    for name, value in fields.items(): header[name] = value
    raw[:len(header.binaryblock)] = header.binaryblock
    return gzip.compress(raw, mtime=0) if packed else bytes(raw)


def _numpy(save: Callable, *arrays: np.ndarray, **named: np.ndarray) -> bytes:
    save(file := io.BytesIO(), *arrays, **named)
    return file.getvalue()


def tensor(values: object) -> bytes:
    torch.save(values, file := io.BytesIO())
    return file.getvalue()


def whole_pictures() -> dict[str, bytes]:
    "Name -> content of a healthy picture, one for each way in which pixels are kept"
    rng = np.random.default_rng(0)
    color = np.stack([BLOBS // 40 % 256, BLOBS // 25 % 256, rng.integers(0, 256, BLOBS.shape)], -1).astype(np.uint8)
    volume = STACK.transpose(2, 1, 0)
    return {
        "color.png": _saved(color, format="PNG"), "deep.png": _saved(BLOBS, format="PNG"),
        "a.jpg": _saved(color, format="JPEG"), "steps.jpg": _saved(color, format="JPEG", progressive=True),
        "plain.tif": _saved(BLOBS, format="TIFF"),
        "lzw.tif": _saved(color, format="TIFF", compression="tiff_lzw"),
        "deflate.tif": _saved(color, format="TIFF", compression="tiff_adobe_deflate"),
        "a.bmp": _saved(color, format="BMP"), "a.gif": _saved(color[..., 0], format="GIF"),
        "lossy.webp": _saved(color, format="WEBP"), "exact.webp": _saved(color, format="WEBP", lossless=True),
        "a.jp2": _saved(color, format="JPEG2000"), "a.ppm": _saved(color, format="PPM"),
        "explicit.dcm": dicom(BLOBS), "implicit.dcm": dicom(BLOBS, ImplicitVRLittleEndian),
        "big.dcm": dicom(BLOBS, ExplicitVRBigEndian), "deflated.dcm": dicom(BLOBS, DeflatedExplicitVRLittleEndian),
        "rle.dcm": dicom(BLOBS, RLELossless), "frames.dcm": dicom(STACK),
        "a.nii": nifti(volume), "a.nii.gz": nifti(volume, True), "second.nii": nifti(volume, kind=nib.Nifti2Image),
        "a.npy": _numpy(np.save, STACK), "a.npz": _numpy(np.savez_compressed, x=STACK),
        "a.pt": tensor(torch.from_numpy(STACK)),
    }


KINDS = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG 2000", "dcm": "DICOM", "nii": "NIfTI", "gz": "NIfTI",
         "npy": "NumPy", "npz": "NumPy", "pt": "PyTorch"}


def kind_of(name: str) -> str: return KINDS.get(ending := name.rpartition(".")[2], ending.upper())


# -- damage to any file

def _flipped(raw: bytes, places: range, rng: random.Random) -> bytes:
    "Three bits turned"
    out = bytearray(raw)
    for at in rng.choices(places, k=3): out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def _zeroed(raw: bytes, start: int, stop: int) -> bytes: return raw[:start] + bytes(stop - start) + raw[stop:]


def _swapped_pairs(raw: bytes) -> bytes:
    "The other byte order"
    out = bytearray(raw[:len(raw) // 2 * 2])
    out[::2], out[1::2] = out[1::2], out[::2]
    return bytes(out)


def common(raw: bytes, rng: random.Random) -> Iterator[tuple[str, bytes, str]]:
    "Damage, what it leaves, and the fate of a file that is nothing without its last tenth"
    n = len(raw)
    yield "empty", b"", LOST
    for share in (0.02, 0.25, 0.5, 0.75, 0.9): yield f"cut at {share:.0%}", raw[:int(share * n)], LOST
    yield "its last bytes cut", raw[:-rng.randint(1, 20)], OPEN
    for k in range(2): yield f"bits of the head {k}", _flipped(raw, range(min(n, 200)), rng), OPEN
    for k in range(2): yield f"bits of the body {k}", _flipped(raw, range(min(n - 1, 200), n), rng), OPEN
    yield "numbers of the head at most", raw[:(at := rng.randrange(8, 60))] + b"\xff\xff\xff\x7f" + raw[at + 4:], OPEN
    yield "its head zeroed", _zeroed(raw, 0, min(n, 132)), OPEN
    yield "its middle zeroed", _zeroed(raw, n // 3, n // 2), OPEN
    yield "its end zeroed", _zeroed(raw, n * 3 // 4, n), OPEN
    yield "junk appended", raw + rng.randbytes(700), OPEN
    yield "bytes in the other order", _swapped_pairs(raw), LOST
    yield "another text", b"This is not an image.\n" * 40, LOST
    yield "noise", b"\xa5" + rng.randbytes(n), LOST


# -- damage to one format

def png(width: int, height: int, depth: int = 8, lines: bytes = b"") -> bytes:
    "A PNG whose header may lie"
    parts = [b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0), b"IDAT" + zlib.compress(lines),
             b"IEND"]
    framed = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def npy(shape: tuple, dtype: str = "<f4", body: bytes = b"") -> bytes:
    "An array whose header may lie"
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file := io.BytesIO(), header)
    return file.getvalue() + body


def special_pictures(whole: dict[str, bytes]) -> Iterator[tuple[str, str, bytes, str]]:
    "Name, damage, content and fate"
    nothing, volume = np.full((6, 24, 20), np.nan, np.float32), STACK.transpose(2, 1, 0)
    holes = np.where(STACK == 40, np.nan, STACK.astype(np.float32))
    for width, height in ((0, 40), (50_000, 50_000), (2**31 - 1, 1), (1, 1), (30_000, 3_000)):
        yield "size.png", f"{width} x {height} in its header", png(width, height), LOST
    yield "lines.png", "fewer lines than stated", png(20, 40, lines=bytes(21) + b"\0" + b"\7" * 20), LOST
    yield "depth.png", "a depth that there is not", png(20, 20, 7, bytes(420)), LOST
    yield "checksum.png", "a wrong checksum", whole["color.png"][:-13] + b"\0" + whole["color.png"][-12:], OPEN
    yield "tail.jpg", "zeros in place of its second half", _zeroed(whole["a.jpg"], len(whole["a.jpg"]) // 2,
                                                                   len(whole["a.jpg"])), LOST
    for name, value in (("Rows", 0), ("Columns", 60_000), ("Rows", None), ("PixelData", None), ("BitsAllocated", 7),
                        ("BitsAllocated", None), ("SamplesPerPixel", 2), ("PhotometricInterpretation", "RGB"),
                        ("PixelRepresentation", None), ("RescaleSlope", "0"), ("RescaleSlope", "nan"),
                        ("NumberOfFrames", "-3"), ("NumberOfFrames", "1000000"), ("WindowWidth", "-5"),
                        ("PixelSpacing", ["0", "0"]), ("PixelSpacing", ["1e30", "1"])):
        tags = {name: value} | ({"RescaleIntercept": 0} if name == "RescaleSlope" else {})
        usable = name in ("WindowWidth", "PixelSpacing", "PhotometricInterpretation", "PixelRepresentation")
        fate = OPEN if usable or value == "-3" else LOST
        try: yield "tag.dcm", f"{name} {'missing' if value is None else value}", dicom(BLOBS, **tags), fate
        except (TypeError, ValueError, AttributeError) as error: raise AssertionError((name, value)) from error
    yield "report.dcm", "a report, not an image", dicom(BLOBS, Rows=None, Columns=None, PixelData=None), LOST
    for dims in ((3, 0, 48, 6, 1), (3, -5, 48, 6, 1), (3, 32767, 32767, 32767, 1), (1, 40, 1, 1, 1), (9, 48, 40, 6, 1)):
        raw = bytearray(whole["a.nii"])
        raw[40:50] = struct.pack("<5h", *dims)
        yield "dims.nii", f"dimensions {dims}", bytes(raw), LOST
        yield "dims.nii.gz", f"dimensions {dims}", gzip.compress(raw, mtime=0), LOST
    yield "type.nii", "a type of numbers that there is not", nifti(volume, datatype=777), LOST
    yield "axes.nii", "axes of no length", nifti(volume, srow_x=0, srow_y=0, srow_z=0, qform_code=0, sform_code=1), LOST
    yield "scale.nii", "a slope that is no number", nifti(volume, scl_slope=np.nan), OPEN
    yield "nan.nii", "no number in it", nifti(nothing), LOST
    yield "holes.nii", "some voxels without a number", nifti(holes.transpose(2, 1, 0)), OPEN
    for name, save in (("npy", np.save), ("npz", lambda file, array: np.savez(file, x=array))):
        yield f"nan.{name}", "no number in it", _numpy(save, nothing), LOST
        yield f"holes.{name}", "some voxels without a number", _numpy(save, holes), LOST
        yield f"words.{name}", "words in place of numbers", _numpy(save, np.array([["a", "b"]] * 20)), LOST
        yield f"none.{name}", "no voxel in it", _numpy(save, np.zeros((0, 20, 20))), LOST
        yield f"six.{name}", "six dimensions", _numpy(save, np.zeros((2, 2, 2, 2, 2, 2))), LOST
    yield "huge.npy", "a size that does not fit the file", npy((40_000, 1000, 1000)), LOST
    yield "negative.npy", "a negative size", npy((-5, 20), body=bytes(400)), LOST
    yield "objects.npy", "Python objects", npy((2, 2), "|O", b"\x80\4N."), LOST
    yield "two.npz", "two arrays that could be the image", _numpy(np.savez, x=STACK, y=STACK), LOST
    yield "nan.pt", "no number in it", tensor(torch.from_numpy(nothing)), LOST
    yield "words.pt", "words in place of a tensor", tensor(["a", "b"]), LOST
    yield "number.pt", "one number", tensor(torch.tensor(5.0)), LOST


NEIGHBORS = {"color.png": "a.jpg", "a.jpg": "explicit.dcm", "explicit.dcm": "a.nii.gz", "a.nii.gz": "a.npy",
             "a.npy": "a.pt", "a.pt": "a.npz", "a.npz": "a.bmp", "a.bmp": "lzw.tif", "lzw.tif": "lossy.webp",
             "lossy.webp": "a.gif", "a.gif": "a.nii", "a.nii": "color.png"} # False name -> whose content it has


def _placed(folder: Path, whole: dict[str, bytes]) -> Iterator[Damaged]:
    "What is no file, or cannot be opened"
    outside = folder.parent / "outside.png"
    outside.write_bytes(whole["color.png"])
    for name in ("a.png", "a.dcm", "a.nii.gz"):
        (folder / f"folder-{name}").mkdir()
        yield Damaged(f"folder-{name}", kind_of(name), "a folder of that name", LOST)
        (folder / f"link-{name}").symlink_to("nowhere")
        yield Damaged(f"link-{name}", kind_of(name), "a link to nothing", LOST)
        yield Damaged(f"gone-{name}", kind_of(name), "no such file", LOST)
    (folder / "loop.png").symlink_to("loop.png")
    yield Damaged("loop.png", "PNG", "a link to itself", LOST)
    (folder / "out.png").symlink_to(outside)
    yield Damaged("out.png", "PNG", "a link out of the folder", LOST)
    os.mkfifo(folder / "pipe.png")
    yield Damaged("pipe.png", "PNG", "a pipe", LOST)
    (folder / "Case.PNG").write_bytes(whole["color.png"])
    yield Damaged("case.png", "PNG", "a name in another case", LOST)
    (folder / "locked.png").write_bytes(whole["color.png"])
    (folder / "locked.png").chmod(0)
    yield Damaged("locked.png", "PNG", "no permission", FINE if os.access(folder / "locked.png", os.R_OK) else LOST)


def pictures(folder: Path, seed: int = 0) -> list[Damaged]:
    "Write damaged pictures, and a few healthy ones of every format, into a folder"
    rng, whole, found = random.Random(seed), whole_pictures(), []
    def write(name: str, damage: str, raw: bytes, fate: str) -> None:
        path = f"{len(found)}-{name}"
        (folder / path).write_bytes(raw)
        found.append(Damaged(path, kind_of(name), damage, fate))
    for name, raw in whole.items():
        write(name, "healthy", raw, FINE)
        for damage, left, fate in common(raw, rng): write(name, damage, left, fate)
    for name, damage, raw, fate in special_pictures(whole): write(name, damage, raw, fate)
    for name, other in NEIGHBORS.items(): write(name, "a false name", whole[other], FINE)
    return found + list(_placed(folder, whole))


# -- studies

def _slice(z: int, array: np.ndarray | None = None, **tags) -> bytes:
    "One of the slices of a series"
    usual = {"PixelSpacing": ["2.4", "2.4"], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "SliceThickness": "8",
             "ImagePositionPatient": [0, 0, 8 * z], "SeriesInstanceUID": "1.2.3"}
    return dicom(STACK[z] if array is None else array, **usual | tags)


def damaged_series(rng: random.Random) -> Iterator[tuple[str, dict[int, bytes], str]]:
    "Damage to one slice or to all, the slices that differ from healthy ones, and the fate of the series"
    def tagged(at: int | None = 3, **tags) -> dict[int, bytes]:
        return {z: _slice(z, **tags) for z in (range(len(STACK)) if at is None else [at])}
    for damage, left, fate in common(_slice(3), rng): yield f"a slice: {damage}", {3: left}, fate
    yield "a slice of another size", {3: _slice(3, STACK[3, :20])}, LOST
    yield "a slice of another series", tagged(SeriesInstanceUID="9.9"), LOST
    yield "a slice of another orientation", tagged(ImageOrientationPatient=[0, 1, 0, 0, 0, 1]), LOST
    yield "a slice of another spacing", tagged(PixelSpacing=["5", "5"]), LOST
    yield "a slice at the place of another", tagged(ImagePositionPatient=[0, 0, 8]), LOST
    yield "a slice far away", tagged(ImagePositionPatient=[0, 0, 1e9]), LOST
    yield "a slice without a place", tagged(ImagePositionPatient=None), LOST
    yield "slices without a place", tagged(None, ImagePositionPatient=None), LOST
    yield "a place that is no number", tagged(ImagePositionPatient=["0", "0", "nan"]), LOST
    yield "spacing 0", tagged(None, PixelSpacing=["0", "0"]), LOST
    yield "spacing -1", tagged(None, PixelSpacing=["-1", "1"]), LOST
    yield "spacing 1e5", tagged(None, PixelSpacing=["100000", "100000"]), LOST
    yield "spacing 1e-5", tagged(None, PixelSpacing=["0.00001", "0.00001"]), OPEN
    yield "no spacing", tagged(None, PixelSpacing=None), LOST
    yield "axes of no length", tagged(None, ImageOrientationPatient=[0] * 6), LOST
    yield "a color slice", tagged(SamplesPerPixel=3, PhotometricInterpretation="RGB"), LOST
    yield "a slope of 0", tagged(RescaleSlope="0", RescaleIntercept="0"), LOST
    yield "a slice without pixels", tagged(PixelData=None), LOST
    yield "texts in place of slices", {z: b"no slice\n" for z in range(len(STACK))}, LOST


def damaged_volumes(rng: random.Random) -> Iterator[tuple[str, str, bytes, str]]:
    "Name, damage, content and fate of a series in one file"
    turned = STACK.transpose(2, 1, 0)
    for name, raw in (("a.nii.gz", nifti(turned, True)), ("a.nii", nifti(turned))):
        for damage, left, fate in common(raw, rng): yield name, damage, left, fate
    for size, fate in ((0, OPEN), (1e-5, OPEN), (-1, OPEN), (1e5, LOST), (1e30, LOST), (np.nan, LOST)):
        yield "size.nii.gz", f"voxels of {size} mm", nifti(turned, True, pixdim=[1, size, size, size, 1, 1, 1, 1],
                                                           sform_code=0, qform_code=1), fate
    for size, fate in ((0, OPEN), (1e-4, OPEN), (1e4, LOST), (np.inf, OPEN)):
        yield "row.nii.gz", f"an axis of {size} mm", nifti(turned, True, srow_x=[size, 0, 0, 0], sform_code=2), fate
    yield "four.nii.gz", "volumes in time", nifti(np.stack([turned] * 3, -1), True), OPEN
    yield "five.nii.gz", "five dimensions", nifti(np.stack([np.stack([turned] * 2, -1)] * 2, -1), True), LOST
    yield "flat.nii.gz", "one slice", nifti(turned[:, :, :1], True), OPEN
    yield "thin.nii.gz", "one row", nifti(turned[:1], True), LOST
    yield "nan.nii.gz", "no number in it", nifti(np.full(turned.shape, np.nan, np.float32), True), LOST
    yield "equal.nii.gz", "all voxels equal", nifti(np.zeros_like(turned), True), OPEN
    yield "a.png", "a picture", _saved(BLOBS, format="PNG"), LOST
    yield "a.jpg", "a picture", _saved(np.zeros((8, 8), np.uint8), format="JPEG"), LOST


def studies(folder: Path, seed: int = 1) -> list[Damaged]:
    "Write damaged series, and a few healthy ones, into a folder"
    rng, found, turned = random.Random(seed), [], STACK.transpose(2, 1, 0)
    series = [("healthy", {0: _slice(0, STACK[0] + n)}, FINE) for n in range(6)]
    for damage, slices, fate in [*series, *damaged_series(rng)]:
        (path := folder / f"{len(found)}-series").mkdir()
        for z in range(len(STACK)): (path / f"{z}.dcm").write_bytes(slices.get(z) if z in slices else _slice(z))
        found.append(Damaged(path.name, "series", damage, fate))
    for damage, gone, fate in (("no slice", range(6), LOST), ("a slice missing", [3], OPEN)):
        (path := folder / f"{len(found)}-series").mkdir()
        for z in {*range(6)} - {*gone}: (path / f"{z}.dcm").write_bytes(_slice(z))
        found.append(Damaged(path.name, "series", damage, fate))
    healthy = [("a.nii.gz", "healthy", nifti(turned + n, True), FINE) for n in range(6)]
    for name, damage, raw, fate in [*healthy, *damaged_volumes(rng)]:
        (folder / f"{len(found)}-{name}").write_bytes(raw)
        found.append(Damaged(f"{len(found)}-{name}", kind_of(name), damage, fate))
    (folder / "link").symlink_to("nowhere")
    return [*found, Damaged("link", "series", "a link to nothing", LOST), Damaged("gone", "series", "no folder", LOST)]


# -- tables

ROWS = [{"image": f"{n}.png", "caption": f"a scan of finding {n}", "label": "ab"[n % 2], "split": "test"}
        for n in range(24)]


def _json(rows: object) -> bytes: return json.dumps(rows, indent=1).encode()


def _shard(rows: list[dict], picture: bytes, packed: bool = False) -> bytes:
    "A shard of WebDataset"
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as tar:
        for n, row in enumerate(rows):
            told = json.dumps({k: v for k, v in row.items() if k != "image"}).encode()
            for ending, content in (("json", told), ("png", picture)):
                (member := tarfile.TarInfo(f"{n:03}.{ending}")).size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return gzip.compress(file.getvalue(), mtime=0) if packed else file.getvalue()


def _parquet(rows: list[dict], **options) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), file := io.BytesIO(), **options)
    return file.getvalue()


@dataclass(frozen=True)
class DamagedTable:
    "One table of the corpus"
    path: str # Below the folder
    dataset: str # The reader
    damage: str # What was done to it
    fate: str # LOST, FINE or OPEN


def whole_tables(picture: bytes) -> dict[str, tuple[str, bytes]]:
    "Name -> reader and content of a healthy table of the pictures 0.png to 23.png"
    header, lines = ",".join(ROWS[0]), [",".join(row.values()) for row in ROWS]
    text = "\n".join([header, *lines, ""]).encode()
    many = [row | {"image": f"{n % 24}.png", "caption": row["caption"] * 3} for n, row in enumerate(ROWS * 4)]
    return {
        "t.csv": ("csv", text), "t.csv.gz": ("csv", gzip.compress(text, mtime=0)),
        "t.json": ("json-pairs", _json(ROWS)),
        "t.jsonl": ("json-pairs", b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)),
        "t.parquet": ("parquet", _parquet(many, write_page_checksum=True)),
        "t.tar": ("webdataset", _shard(ROWS, picture)),
        "t.tar.gz": ("webdataset", _shard(ROWS, picture, True)),
    }


def special_tables(whole: dict[str, tuple[str, bytes]]) -> Iterator[tuple[str, str, bytes, str]]:
    "Name, damage, content and fate"
    text, lines, tar = whole["t.csv"][1], whole["t.jsonl"][1], whole["t.tar"][1]
    yield "t.csv", "a quotation mark never closed", text.replace(b"a scan of finding 5", b'"a scan of finding 5'), LOST
    yield "t.csv", "a row with more cells", text.replace(b"finding 5,", b"finding 5,x,y,"), LOST
    yield "t.csv", "bytes that are not UTF-8", text.replace(b"finding 5", b"finding \xff\xfe"), LOST
    yield "t.csv", "no column image", text.replace(b"image", b"xmage"), LOST
    yield "t.csv", "an empty path", text.replace(b"5.png", b""), LOST
    yield "t.csv", "a path out of the folder", text.replace(b"\n5.png", b"\n../5.png"), LOST
    yield "t.csv", "a header and no row", text[:text.index(b"\n") + 1], LOST
    yield "t.csv", "UTF-16 cut in a letter", text.decode().encode("utf-16")[:-1], LOST
    yield "t.csv", "another line end", text.replace(b"\n", b"\r\n"), FINE
    yield "t.csv", "zero bytes in a cell", text.replace(b"finding 5", b"finding \0"), LOST
    yield "t.json", "nested too deeply", b"[" * 100_000 + b"]" * 100_000, LOST
    yield "t.json", "a number in place of a list", b"5", LOST
    yield "t.json", "not a number", b'[{"image": NaN, "caption": "x"}]', LOST
    yield "t.json", "entries that are no objects", b'["a", "b"]', LOST
    yield "t.json", "an empty list", b"[]", LOST
    yield "t.json", "a huge number", b'[{"image": 1' + b"0" * 5000 + b', "caption": "x"}]', LOST
    yield "t.jsonl", "a line that is no JSON", lines.replace(b'{"image": "5.png"', b'{"image" "5.png"'), LOST
    yield "t.jsonl", "a list in place of an object", lines.replace(lines.split(b"\n")[5], b"[1]"), LOST
    yield "t.jsonl", "half a surrogate", lines.replace(b"finding 5", b"finding \\ud800"), LOST
    yield "t.jsonl", "a huge number", lines.replace(b'"5.png"', b"1" * 5000), LOST
    members = [n for n in range(0, len(tar), 512) if tar[n + 257:n + 262] == b"ustar"]
    yield "t.tar", "a header zeroed", _zeroed(tar, members[20], members[20] + 512), LOST
    yield "t.tar", "a sample zeroed", _zeroed(tar, members[20], members[22]), LOST
    yield "t.tar", "two shards in one", tar + tar, LOST
    yield "t.tar", "no sample", bytes(10_240), LOST
    yield "t.tar", "a member that is no JSON", tar.replace(b'"label"', b'"label,', 1), LOST
    yield "t.parquet", "a page zeroed", _zeroed(raw := whole["t.parquet"][1], 200, 260), LOST
    yield "t.parquet", "a length of its end at most", raw[:-8] + b"\xff\xff\xff\x7f" + raw[-4:], LOST


def tables(folder: Path, picture: bytes, seed: int = 2) -> list[DamagedTable]:
    "Write damaged tables, each in a folder of its own with the pictures that it names"
    rng, whole, found = random.Random(seed), whole_tables(picture), []
    def write(name: str, damage: str, raw: bytes, fate: str) -> None:
        (place := folder / str(len(found))).mkdir()
        (place / name).write_bytes(raw)
        for row in ROWS if whole[name][0] != "webdataset" else (): os.link(folder / "p.png", place / row["image"])
        found.append(DamagedTable(f"{len(found)}/{name}", whole[name][0], damage, fate))
    (folder / "p.png").write_bytes(picture)
    for name, (_, raw) in whole.items():
        write(name, "healthy", raw, FINE)
        for damage, left, fate in common(raw, rng):
            cut = damage.startswith("cut at") and name in ("t.csv", "t.jsonl")
            write(name, damage, left, OPEN if cut else fate)
    for name, damage, raw, fate in special_tables(whole): write(name, damage, raw, fate)
    return found
