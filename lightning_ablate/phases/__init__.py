"""What a run does with its batches: it calibrates, learns, and sweeps; one Phase a file."""

from lightning_ablate.phases.attribution import AttributionPhase, VerificationPhase
from lightning_ablate.phases.calibration import CalibrationPhase
from lightning_ablate.phases.phase import Done, Phase
from lightning_ablate.phases.resume import Run, Unfinished, is_unfinished
from lightning_ablate.phases.schedule import Epoch, plan, schedule
from lightning_ablate.phases.sweep import SweepPhase
