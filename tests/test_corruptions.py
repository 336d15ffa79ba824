"Corruptions on images of any size, kind and process, and the classifier that is shown them"
import os
import subprocess
import sys
from unittest.mock import patch

import forks
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch.utils.data import DataLoader
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor, v2

from medclip_nb.core import InputError, content_hash
from medclip_nb.datasets import load_manifest, make_squares
from medclip_nb.embeddings import embed
from medclip_nb.evaluators import corrupted, linear_probe, robustness, robustness_curves, robustness_table, zero_shot
from medclip_nb.images import (
    ANY_IMAGE,
    CORRUPTIONS,
    SEVERITIES,
    Corrupt,
    ImageDataset,
    corrupt,
    corrupted_preprocess,
    corruption_table,
    is_gray,
    stain_matrix,
)
from medclip_nb.models import load_model


def picture(seed, size=(96, 80), grey=False):
    "Smooth shapes with some texture, never at the ends of the range"
    rng = np.random.default_rng(seed)
    pixels = gaussian_filter(rng.normal(size=(*size[::-1], 3)), (3, 3, 0)) + 0.15 * rng.normal(size=(*size[::-1], 3))
    if grey: pixels = pixels[..., :1].repeat(3, 2)
    low, high = pixels.min(), pixels.max()
    return Image.fromarray((60 + 120 * (pixels - low) / (high - low)).astype(np.uint8))


def psnr(a, b): return -10 * np.log10(1e-9 + np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2) / 255**2)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("seed", range(4))
def test_each_level_is_worse(name, seed):
    image = picture(seed, grey=name != "stain_shift" and seed % 2 == 1)
    found = [psnr(image, corrupt(image, name, level, seed)) for level in SEVERITIES]
    assert all(np.diff(found) < 0), found
    assert 15 < found[0] < 60


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 90), (3, 2), (301, 40)])
def test_any_size_and_extreme_pixels(name, size):
    for pixels in (np.zeros((*size, 3)), np.full((*size, 3), 255),
                   np.random.default_rng(0).integers(0, 256, (*size, 3))):
        image = Image.fromarray(pixels.astype(np.uint8))
        for level in (1, 5):
            out = Corrupt(name, level)(image)
            assert out.size == image.size and out.mode == "RGB"


@pytest.mark.parametrize("name", ANY_IMAGE)
def test_grey_stays_grey(name):
    image = picture(0, grey=True)
    for level in SEVERITIES: assert is_gray(corrupt(image, name, level), spread=1), level
    assert corrupt(image.convert("L"), name).mode == "L"
    assert psnr(corrupt(image.convert("L"), name).convert("RGB"), corrupt(image, name)) > 40


def test_the_same_in_every_process_and_order(tmp_path):
    "In another process with another hash seed, and in a fork"
    picture(1).save(tmp_path / "picture.png")
    code = """
import sys
import numpy as np
from PIL import Image
from medclip_nb.core import content_hash
from medclip_nb.images import CORRUPTIONS, corrupt
print(*[content_hash(np.asarray(corrupt(Image.open(sys.argv[1]), name, 3, seed=5))) for name in CORRUPTIONS])"""
    said = {subprocess.run([python, "-c", code, tmp_path / "picture.png"], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": "1"}).stdout
            for python in (sys.executable, forks.forked())}
    here = [content_hash(np.asarray(corrupt(picture(1), name, 3, seed=5))) for name in reversed(CORRUPTIONS)][::-1]
    assert [s.split() for s in said] == [here]


def test_chance_comes_from_the_image_and_the_seed():
    a, b = picture(1), picture(2)
    noise = lambda image, seed=0: np.asarray(corrupt(image, "noise", 1, seed), float) - np.asarray(image, float)
    assert (noise(a) == noise(a.copy())).all()
    assert abs(np.corrcoef(noise(a).ravel(), noise(b).ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(noise(a).ravel(), noise(a, 1).ravel())[0, 1]) < 0.05
    assert noise(a).std() == pytest.approx(255 * 0.04, rel=0.05)
    small, large = noise(a).ravel(), (np.asarray(corrupt(a, "noise", 2), float) - np.asarray(a, float)).ravel()
    assert np.corrcoef(small, large)[0, 1] > 0.99, "one noise at several strengths"


def test_lengths_are_relative_to_the_image():
    image = picture(3, (400, 400))
    small = lambda x: x.resize((100, 100), Image.Resampling.BOX)
    for name in ("blur", "pixelate"):
        assert psnr(small(corrupt(image, name, 5)), corrupt(small(image), name, 5)) > 35, name


def test_blur_is_a_gaussian():
    image = picture(4, (200, 200))
    mine, exact = np.asarray(corrupt(image, "blur", 4),
                             float), gaussian_filter(np.asarray(image, float), (0.018 * 200, 0.018 * 200, 0),
                                                     mode="nearest")
    assert np.abs(mine - exact)[20:-20, 20:-20].max() < 2


def test_stain_shift_moves_two_amounts_and_nothing_else():
    rng = np.random.default_rng(0)
    amounts = np.stack([rng.uniform(0.2, 0.9, (40, 40)), rng.uniform(0.2, 0.6, (40, 40)), np.zeros((40, 40))], -1)
    image = Image.fromarray(np.round(255 * np.exp(-amounts @ stain_matrix())).astype(np.uint8))
    separated = lambda picture: np.linalg.lstsq(stain_matrix().T,
                                                -np.log(np.maximum(np.asarray(picture, float), 1) / 255).reshape(
                                                    -1, 3).T, rcond=None)[0].T.reshape(40, 40, 3)
    before, after = separated(image), separated(corrupt(image, "stain_shift", 3))
    factors = np.log(np.median(after[..., :2] / before[..., :2], axis=(0, 1)))
    assert np.hypot(*factors) == pytest.approx(0.4, rel=0.05)
    assert np.abs(after[..., 2]).mean() < 0.02


def test_a_grey_image_has_no_stain():
    for grey in (picture(0, grey=True), picture(0, grey=True).convert("L")):
        with pytest.raises(InputError, match="no stain. Leave stain_shift out"): corrupt(grey, "stain_shift")


def test_bad_names_levels_and_modes():
    for arguments, said in ((("jpg", 3), "Did you mean 'jpeg'"), (("jpeg", 0), "levels 1 to 5"),
                            (("jpeg", 2.5), "levels 1 to 5")):
        with pytest.raises(InputError, match=said): corrupt(picture(0), *arguments)
    for mode in ("I;16", "F", "RGBA", "P"):
        with pytest.raises(InputError, match="images.read_image"): corrupt(Image.new(mode, (8, 8)), "blur")
    assert list(corruption_table().index) == list(CORRUPTIONS)


def test_the_picture_on_the_display_is_corrupted(tmp_path):
    deep = np.random.default_rng(0).integers(900, 1300, (50, 60)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    plain = Compose([Resize(48), CenterCrop(48), ToTensor()])
    worse = corrupted_preprocess(plain, Corrupt("contrast", 4))
    shown, seen = (ImageDataset([tmp_path / "deep.png"], p, window=(1100, 400))[0] for p in (plain, worse))
    assert float(seen.std() / shown.std()) == pytest.approx(0.25, abs=0.01) and abs(seen.mean() - shown.mean()) < 0.01
    loader = DataLoader(ImageDataset([tmp_path / "deep.png"] * 3, worse, window=(1100, 400)), 3, num_workers=1)
    assert torch.equal(next(iter(loader))[2], seen)


@pytest.mark.parametrize("step", [v2.ToImage, v2.PILToTensor, v2.ToTensor])
@pytest.mark.filterwarnings("ignore:The transform `ToTensor")
def test_steps_of_torchvision_v2_are_known(step):
    "The corruption comes after resizing, as with the older steps, and gives the same pixels"
    corruption, image = Corrupt("pixelate", 3), picture(0)
    size = [Resize(32), CenterCrop(32)]
    newer = corrupted_preprocess(v2.Compose([*size, step(), v2.ToDtype(torch.float32, scale=True)]), corruption)
    older = corrupted_preprocess(Compose([*size, ToTensor()]), corruption)
    assert torch.allclose(torch.as_tensor(newer(image)), older(image), atol=1e-6)


@pytest.fixture(scope="module")
def squares(tmp_path_factory): return make_squares(tmp_path_factory.mktemp("squares"), patients=12)


@pytest.fixture(scope="module")
def clip(): return load_model("starter")


def test_features_of_each_corruption_are_kept_apart(squares, clip, tmp_path):
    rows = squares.part("test")
    cases = [clip, *(corrupted(clip, c)
                     for c in (Corrupt("noise", 1), Corrupt("noise", 2), Corrupt("noise", 1, seed=1),
                               Corrupt("blur", 5)))]
    found = [embed(c, rows, tmp_path, texts=False).images for c in cases]
    for i, a in enumerate(found):
        for b in found[:i]: assert np.abs(a - b).max() > 1e-3
    with patch.object(type(clip), "encode_images", side_effect=AssertionError("computed again")):
        for c, before in zip(cases, found): assert (embed(c, rows, tmp_path, texts=False).images == before).all()


def test_clean_is_the_classifier_itself(squares, clip):
    train, valid, test = (squares.part(s) for s in ("train", "valid", "test"))
    for metric in ("accuracy", "balanced_accuracy", "auroc"):
        asked = robustness(clip, test, corruptions=["noise"], levels=[1], metric=metric, n_boot=50)
        assert asked.value(f"clean/{metric}") == pytest.approx(zero_shot(clip, test).value(metric))
    probe = robustness(clip, test, corruptions=["noise", "jpeg"], levels=[2, 1], train=train, valid=valid, n_boot=50)
    assert probe.value("clean/accuracy") == linear_probe(clip, train, test, valid=valid).value("accuracy")
    assert (list(robustness_curves(probe)["level"]) == [0, 1, 2, 1, 2]
            and set(robustness_table(probe).index) == {"noise", "jpeg"})
    again = robustness(clip, test, corruptions=["noise", "jpeg"], levels=[1, 2], train=train, valid=valid, n_boot=50)
    assert again.metrics.equals(probe.metrics) and again.predictions.equals(probe.predictions)


def test_unlabelled_rows_are_left_out(squares, clip):
    test = squares.part("test").copy()
    test.loc[test.index[:3], "label"] = None
    found = robustness(clip, test, corruptions=["blur"], levels=[5], n_boot=10)
    assert (found.metrics["n"] == len(test) - 3).all() and len(found.predictions) == 2 * (len(test) - 3)


def test_a_table_without_the_column_is_refused(squares, clip):
    with pytest.raises(InputError, match="Did you mean 'label'"): robustness(clip, squares.part("test"), label="labl")


def test_read_options_reach_the_corrupted_image(tmp_path, clip):
    for i in range(4):
        Image.fromarray((1000 + 100 * i + np.arange(64 * 64).reshape(64, 64) % 50).astype(np.uint16)).save(
            tmp_path / f"{i}.png")
    (tmp_path / "table.csv").write_text("image,label,split\n"
                                        + "".join(f"{i}.png,{'ab'[i % 2]},test\n" for i in range(4)))
    manifest = load_manifest("csv", tmp_path)
    manifest.read = {"window": (1150, 500)}
    found = embed(corrupted(clip, Corrupt("contrast", 5)), manifest, texts=False).images
    read = ImageDataset(manifest.paths(), corrupted_preprocess(clip.preprocess, Corrupt("contrast", 5)),
                        window=(1150, 500))
    assert np.abs(found - clip.encode_images(torch.stack([read[i] for i in range(4)])).numpy()).max() < 1e-5
