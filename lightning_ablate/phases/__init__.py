"""What a run does with its batches: it calibrates, attributes, learns, and sweeps; one phase a file."""

from lightning_ablate.phases import learning, tuning
from lightning_ablate.phases.attribution import AttributionPhase, VerificationPhase
from lightning_ablate.phases.calibration import CalibrationPhase
from lightning_ablate.phases.evidence import ExplainedSweep
from lightning_ablate.phases.method import Epoch, MethodPhase
from lightning_ablate.phases.schedule import check_attribution, kinds_of, plan, schedule
from lightning_ablate.phases.sweep import SweepPhase
from lightning_ablate.phases.units import Explain, Units, check_explained
