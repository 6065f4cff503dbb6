"""docs/from-python.md: its scripts run as they stand, and compute what transformers computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from commands import TORCHRUN, run_python
from helpers import make_tiny_hugging_face_folder, tiny_config

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "from-python.md"

pytestmark = pytest.mark.distributed


class Page(NamedTuple):
    """The scripts of the page, and the model that they are given."""

    model: Path
    train: Path
    layer_spec: Path


@pytest.fixture(scope="module", params=["untied", "tied"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("page")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    scripts = [folder / name for name in ("train.py", "layer_spec.py")]
    for script, block in zip(scripts, blocks, strict=True):
        script.write_text(block, encoding="utf-8")
    config = tiny_config(tie_word_embeddings=request.param == "tied")
    return Page(make_tiny_hugging_face_folder(folder / "hf", config), *scripts)


def test_the_script_trains_as_transformers_does(page: Page, tmp_path: Path) -> None:
    """Losses of three steps at TP2, and the weights of the Hugging Face folder made of its shards.

    A weight is where AdamW has put it within a thousandth of its way: the sign of a gradient near
    zero is chance, so the sum over all weights is compared.
    """
    import torch
    from transformers import AutoModelForCausalLM

    said = run_python(*TORCHRUN, 2, page.train, page.model, tmp_path / "out").out
    losses = [float(loss) for loss in re.findall(r"^step \d loss (\S+)$", said, re.M)]
    expected, trained = by_transformers(page.model)
    assert losses == pytest.approx(expected, abs=1e-6)

    convert = ("-m", "qwen2_ascend.cli", "convert", "--save-model-type", "hf", "--verify")
    folders = ("--load-dir", tmp_path / "out", "--save-dir", tmp_path / "merged")
    run_python(*convert, *folders, "--hf-cfg-dir", page.model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").float().state_dict()
    start = AutoModelForCausalLM.from_pretrained(page.model).float().state_dict()
    assert merged.keys() == trained.keys()
    moved = sum((trained[name] - start[name]).square().sum() for name in start)
    apart = sum((trained[name] - merged[name]).square().sum() for name in start)
    assert moved > 0 and torch.sqrt(apart / moved) < 1e-3


def by_transformers(folder: Path):
    """The same losses and weights by transformers and torch alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(3):
        text = torch.randint(model.config.vocab_size, (2, 33), generator=generator)
        logits = model(text[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def test_the_layer_spec_is_qwen2_in_a_model_of_the_users_own(page: Page, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    run_python(page.layer_spec, page.model, tmp_path / "logits.pt")
    found = torch.load(tmp_path / "logits.pt")
    model = AutoModelForCausalLM.from_pretrained(page.model).float()
    with torch.no_grad():
        expected = model(torch.arange(16)[None]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
