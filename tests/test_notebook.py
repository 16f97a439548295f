"""The README's example in a Jupyter kernel, and what one does next there."""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
CELLS = [
    next(block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "Trainer(" in block),
    # a second fit of the same callback and module
    "lightning.Trainer(max_epochs=1, callbacks=[callback]).fit(module, datamodule=Digits(batch_size=225))",
    "callback.results",
    'difference(other.target, other.tokenizer, "<script> שלום 😀", heads={"transformer.h.1.attn.c_proj": [0]})',
    "callback.results.plot()",
    """
from lightning_ablate import CausalLM
text = CausalLM("demo:gpt2")
text.configure_model()
ids = torch.tensor([[5, 6, 7]])
paths = [name for name, _ in text.target.named_modules() if name.endswith("attn.c_proj")]
masks = {path: torch.ones(text.target.get_submodule(path).nx, dtype=torch.bool) for path in paths}
def generated():
    return text.target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)[0].tolist()
plain = generated()
with ablated(text.target, masks):
    other = generated()
try:
    with ablated(text.target, masks):
        raise RuntimeError
except RuntimeError:
    modules = [*module.target.modules(), *text.target.modules()]
    left = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules)
    print(tuple(logits.shape), plain == generated(), plain != other, left)
""",
]


def test_the_example_runs_in_a_kernel_and_all_that_follows(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    first, second, shown, hostile, picture, generated = (cell["outputs"] for cell in notebook.cells)
    coloured, other = (cell[-1]["data"]["text/html"] for cell in (first, hostile))
    assert coloured.count('title="') > 5 and "rgba(213,94,0," in coloured and "rgba(0,114,178," in coloured
    assert "<script" not in other and "&lt;" in other and "😀" in other and "שלום" in re.sub(r"<[^>]*>", "", other)
    assert "cross_entropy_low" in str(first)
    assert all("demo:vit on digits: 449 scored positions" in str(one) for one in (first, second))
    assert "<table" in shown[-1]["data"]["text/html"] and "449 scored positions" in shown[-1]["data"]["text/html"]
    assert picture[-1]["data"]["image/png"]
    assert "".join(out["text"] for out in generated if out.get("name") == "stdout").strip() == "(1, 10) True True 0"
    assert {path.name for path in tmp_path.iterdir()} == {"lightning_logs"}
