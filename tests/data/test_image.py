import io
import json
import pickle
import zipfile

import lightning
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PIL
from torch.utils.data import DataLoader

from lightning_ablate import ImageClassifier
from lightning_ablate.data import ImageData
from lightning_ablate.errors import ConfigError, DataError
from lightning_ablate.modules.vision import in_channels
from tests import tiny


class Module(lightning.LightningModule):
    def transform(self, image):
        return torch.from_numpy(np.array(image.convert("L"))).float().unsqueeze(0) / 255


PIXELS = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.parquet"
    features = Features({"image": Image(), "label": ClassLabel(num_classes=3)})
    images = [PIL.fromarray(pixels) for pixels in PIXELS]
    Dataset.from_dict({"image": images, "label": [i % 3 for i in range(30)]}, features=features).to_parquet(path)
    return str(path)


def data(name, module=None, **options):
    defaults = {"calibration_images": 10, "evaluation_images": 15, "evaluation_split": "train", "batch_size": 4}
    made = ImageData(str(name), **(defaults | options))
    made.trainer = lightning.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    made.trainer.strategy.connect(module or Module())
    made.setup("fit")
    return made


def test_images_go_through_the_targets_preprocessing(parquet):
    batch = next(iter(data(parquet, shuffle_seed=None).val_dataloader()))
    # the first ten calibrate
    torch.testing.assert_close(batch["pixel_values"][:, 0], torch.from_numpy(PIXELS[10:14]).float() / 255)
    assert batch["label"].tolist() == [1, 2, 0, 1] and batch["index"].tolist() == [0, 1, 2, 3]


def test_no_image_is_used_for_both_and_all_budgets_are_met(parquet):
    seen = {purpose: set(examples.contents) for purpose, examples in data(parquet).examples.items()}
    assert len(seen["evaluation"]) == 15 and len(seen["calibration"]) == 10
    assert not seen["evaluation"] & seen["calibration"]


def test_a_stream_gives_the_same_images(parquet):
    one, other = (data(parquet, shuffle_seed=None, streaming=streaming).describe() for streaming in (False, True))
    assert one["evaluation"]["sha256"] == other["evaluation"]["sha256"]


def test_a_folder_of_images_is_read(tmp_path):
    for number, pixels in enumerate(PIXELS):
        folder = tmp_path / "train" / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        PIL.fromarray(pixels).save(folder / f"{number:02}.png")
    examples = data(tmp_path, shuffle_seed=None, evaluation_images=20).examples["evaluation"]
    shown = {examples[i]["pixel_values"].numpy().tobytes() for i in range(20)}
    assert shown <= {(torch.from_numpy(p).float() / 255).numpy().tobytes() for p in PIXELS} and len(shown) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration_images": 31}, "gives 30 calibration images, expected 31"),
        ({"evaluation_images": 25}, "gives 20 evaluation images, expected 25"),
        ({"image_column": "picture"}, "no column 'picture', it has image, label"),
        ({"label_column": "class"}, "no column 'class'"),
    ],
)
def test_what_does_not_fit_is_refused(parquet, options, message):
    with pytest.raises(DataError, match=message):
        data(parquet, **options)


def test_labels_that_are_no_class_and_broken_images_are_refused(tmp_path):
    images = [PIL.fromarray(pixels) for pixels in PIXELS]
    named = Dataset.from_dict({"image": images, "label": ["cat"] * 30}).cast_column("image", Image())
    named.to_parquet(tmp_path / "named.parquet")
    with pytest.raises(DataError, match="holds 'cat' in 'label', expected a class index"):
        data(tmp_path / "named.parquet")
    images = [{"bytes": bytes([i]) * 20, "path": None} for i in range(30)]
    Dataset.from_dict({"image": images, "label": [0] * 30}).to_parquet(tmp_path / "broken.parquet")
    with pytest.raises(DataError, match="could not load"):
        next(iter(data(tmp_path / "broken.parquet").val_dataloader()))


def test_images_without_a_preprocessing_are_refused(parquet):
    made = data(parquet, module=lightning.LightningModule())
    with pytest.raises(ConfigError, match="transform"):
        made.examples["evaluation"][0]


RGB, GREY = (PIL.fromarray(np.random.default_rng(1).integers(0, 256, (4, 5, *n), dtype=np.uint8)) for n in ((3,), ()))


def deep(kind):
    return PIL.fromarray(np.arange(20).reshape(4, 5).astype(kind) * 1_000)


def seen_through(channels, image):
    """What a target of so many channels gets of an image, as levels ``(channels, height, width)``."""
    return np.atleast_3d(np.array(in_channels(image, channels))).transpose(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_given_in_the_targets_channels_where_nothing_is_lost(channels):
    levels = np.array(GREY)[None].repeat(channels, 0)
    clear, equal = GREY.convert("RGBA"), GREY.convert("RGB")
    for image in (GREY, equal, GREY.convert("LA"), clear, GREY.convert("P"), equal.quantize(256)):
        fitting = image.mode != "P" or np.array_equal(np.array(image.convert("L")), np.array(GREY))
        assert np.array_equal(seen_through(channels, image), levels) == fitting
    one_bit = PIL.fromarray(np.array(GREY) > 127)
    assert np.array_equal(seen_through(channels, one_bit)[0], (np.array(GREY) > 127) * 255)
    clear.putpixel((0, 0), (9, 9, 9, 128))
    keyed = GREY.copy()
    keyed.info["transparency"] = keyed.getpixel((0, 0))
    for image in (clear, keyed, deep(np.uint16), deep(np.int32), deep(np.float32)):
        with pytest.raises(ValueError, match="channels without loss"):
            seen_through(channels, image)


def test_colours_palettes_and_other_numbers_of_channels():
    assert np.array_equal(seen_through(3, RGB).transpose(1, 2, 0), np.array(RGB))
    palette, inks = RGB.quantize(256), RGB.convert("CMYK")
    for image in (palette, inks):
        assert np.array_equal(seen_through(3, image).transpose(1, 2, 0), np.array(image.convert("RGB")))
        with pytest.raises(ValueError, match=r"1 channels without loss; convert them, .* \(--data.mode L\)"):
            seen_through(1, image)
    four = RGB.convert("RGBA")
    four.putalpha(GREY)
    assert np.array_equal(seen_through(4, four).transpose(1, 2, 0), np.array(four))
    for channels, image in ((4, RGB), (2, GREY), (5, four)):
        with pytest.raises(ValueError, match=f"mode {image.mode} can't be given to a target of {channels} channels"):
            seen_through(channels, image)


class Seen(lightning.LightningModule):
    """Shows what a transform is given."""

    def transform(self, image):
        self.mode = image.mode
        return torch.from_numpy(np.array(image))


def test_datasets_decodes_also_the_orientation_and_the_mode(tmp_path):
    exif = PIL.Exif()
    exif[0x0112] = 6
    names = []
    for number, pixels in enumerate(PIXELS[:8, :, :4]):
        PIL.fromarray(pixels).save(tmp_path / f"{number}.png", exif=exif if number % 2 else PIL.Exif())
        names.append(str(tmp_path / f"{number}.png"))
    given = Dataset.from_dict({"image": names, "label": [0] * 8})
    for mode in (None, "RGB"):
        budgets = {"calibration_images": 4, "evaluation_images": 4, "shuffle_seed": None}
        made = ImageData.of(given, mode=mode, **budgets)
        made.trainer = lightning.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
        made.trainer.strategy.connect(module := Seen())
        made.setup("fit")
        for number in range(4):
            turned = PIXELS[4 + number, :, :4] if number % 2 == 0 else np.rot90(PIXELS[4 + number, :, :4], -1)
            found = made.examples["evaluation"][number]["pixel_values"].numpy()
            assert np.array_equal(found if mode is None else found[..., 0], turned)
        assert module.mode == (mode or "L")


@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_an_archive_are_read_and_rows_without_one_passed_over(tmp_path, parquet, streaming):
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for number, pixels in enumerate(PIXELS):
            PIL.fromarray(pixels).save(file := io.BytesIO(), "PNG")
            archive.writestr(f"{number}.png", file.getvalue())
        lines = [json.dumps({"file_name": f"{number}.png", "label": number % 3}) for number in range(30)]
        archive.writestr("metadata.jsonl", "\n".join(lines))
    options = {"shuffle_seed": None, "evaluation_split": None, "streaming": streaming}
    found = data(tmp_path, **options).examples["evaluation"]
    expected = data(parquet, **options).examples["evaluation"]
    for number in range(15):
        assert torch.equal(found[number]["pixel_values"], expected[number]["pixel_values"])
        assert found[number]["label"] == expected[number]["label"]
    rows = Dataset.from_parquet(parquet).to_list()
    features = Dataset.from_parquet(parquet).features
    gaps = [rows[0], {"image": None, "label": 1}, {"image": rows[1]["image"], "label": None}, *rows[1:]]
    Dataset.from_list(gaps, features=features).to_parquet(tmp_path / "gaps.parquet")
    (tmp_path / "train.zip").unlink()
    gapped = data(tmp_path / "gaps.parquet", **options).examples["evaluation"]
    assert gapped.fingerprint() == expected.fingerprint()


def test_workers_that_are_started_anew_give_the_same_and_a_torn_image_is_one_line(parquet):
    module = tiny.built(ImageClassifier("demo:vit"))
    made = data(parquet, module, evaluation_images=5, calibration_images=5)
    expected = [example for example in made.examples["evaluation"]]
    options = {"batch_size": 5, "num_workers": 1, "multiprocessing_context": "spawn"}
    (batch,) = DataLoader(made.examples["evaluation"], **options)
    assert torch.equal(batch["pixel_values"], torch.stack([one["pixel_values"] for one in expected]))
    assert len(pickle.dumps(made.examples["evaluation"])) < 100_000  # without the target and the trainer
    loaded = DataLoader(made.examples["calibration"], num_workers=1)
    image = made.examples["calibration"].rows[0][1][0]
    image.update(bytes=image["bytes"][:60], path="torn.png")
    with pytest.raises(DataError) as raised:
        list(loaded)
    assert str(raised.value).startswith("could not load 'torn.png of ") and "\n" not in str(raised.value)


def test_images_that_share_a_value_of_the_cluster_column_are_a_cluster():
    images = [PIL.fromarray(pixels) for pixels in PIXELS[:8]]
    subjects = ["a", "b", "a", None, None, "c", "c", "b"]
    given = Dataset.from_dict({"image": images, "label": [0] * 8, "subject": subjects})
    made = ImageData.of(given, cluster_column="subject", calibration_images=1, evaluation_images=7, shuffle_seed=None)
    made.setup("fit")
    assert made.examples["evaluation"].clusters == [0, 1, 2, 3, 4, 4, 0]
    assert made.describe()["evaluation"]["clusters"] == 5 and made.describe()["cluster_column"] == "subject"
    with pytest.raises(DataError, match="no column 'video'"):
        ImageData.of(given, cluster_column="video").setup("fit")
