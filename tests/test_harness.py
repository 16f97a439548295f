"""lm-evaluation-harness on an ablated model and on an exported one."""

import json

import numpy as np
import pytest
import torch

from lightning_ablate import AblationMethod, ablated
from lightning_ablate.export.shrink import shrunk
from lightning_ablate.results.bootstrap import intervals
from tests import tiny
from tests.test_export import edits_for


class Given(AblationMethod):
    """What edits put in place of neurons, as a method."""

    name, needs_batch = "given", False

    def __init__(self, edits):
        self.edits = {site.name: edit for site, edit in edits.items()}

    def prepare(self, ablation):
        return self.edits[ablation.site.name].replacement


TASK = """task: animals
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [cat, dog]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture
def scores(tmp_path):
    """Evaluates a model on a local task; whether each question was answered."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"question": f"Of number {n} every", "answer": n % 2} for n in range(40)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "animals.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.json")), encoding="utf-8")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def run(model):
        lm = HFLM(pretrained=model, tokenizer=tiny.tokenizer(), device="cpu", max_length=64)
        made = simple_evaluate(lm, tasks=["animals"], task_manager=manager, bootstrap_iters=0)
        return {sample["doc_id"]: sample["acc"] for sample in made["samples"]["animals"]}

    return run


@pytest.mark.filterwarnings("ignore")
def test_an_intact_model_scores_its_own_an_ablated_one_in_pairs_and_an_exported_one_the_same(scores, tmp_path):
    model = tiny.gpt2()
    intact, sites = scores(model), tiny.sites(model, "mlp")
    assert set(intact.values()) == {0.0, 1.0}
    with ablated(model, {site.name: torch.zeros(site.width, dtype=torch.bool) for site in sites}):
        assert scores(model) == intact
    edits = edits_for(sites)
    with ablated(model, {site.name: edit.mask for site, edit in edits.items()}, Given(edits)):
        changed = scores(model)
    difference = torch.tensor([changed[doc] - intact[doc] for doc in intact]).double().numpy()
    every = np.arange(len(difference))
    low, high = intervals(difference[None], np.ones(len(difference)), every)[:, 0]
    assert changed.keys() == intact.keys() and low <= difference.mean() <= high
    form, small = shrunk(model, edits)
    form.save(small, tmp_path / "small")
    assert scores(str(tmp_path / "small")) == changed
