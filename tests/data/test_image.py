import lightning
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PIL

from lightning_ablate.data import ImageData
from lightning_ablate.errors import ConfigError, DataError


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
