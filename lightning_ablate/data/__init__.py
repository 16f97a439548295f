"""LightningDataModules: the train loader is the calibration data, the val loader the evaluation data."""

from lightning_ablate.data.base import AblationDataModule
from lightning_ablate.data.examples import ExactSampler, Examples
from lightning_ablate.data.image import ImageData
from lightning_ablate.data.labelled import LabelledTexts, TextPairs
from lightning_ablate.data.pairs import IndirectObjects, PairedTexts
from lightning_ablate.data.text import TextData
