"""Whether MindSpeed is taken, refused or left out; and what its activation passes to it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from commands import Ended, run_python
from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime import mindspeed
from qwen2_ascend.runtime.mindspeed import (
    Adaptor,
    Choice,
    Installed,
    Stack,
    choose,
    fault,
    inspect_folder,
)

GOOD = Installed(Path("site/mindspeed"), "0.16.0", is_placeholder=False, is_train_26=False)
STACK = Stack("0.16.1", "2.7.1", has_training=False, missing=())
NEWER = STACK._replace(megatron_core="0.18.2")
ADAPTOR = Adaptor(Path("site/megatron_adaptor"), "0.18.0", has_transformer_engine=True)


def test_by_itself_it_is_taken_where_its_documents_say_so() -> None:
    choice = choose(None, "npu", GOOD, STACK)
    assert choice.active and "0.16.0 in site/mindspeed, found" in choice.why
    older = GOOD._replace(version="0.12.1")
    assert choose(None, "npu", older, STACK._replace(megatron_core="0.12.1")).active


def test_with_another_torch_it_has_to_be_asked_for() -> None:
    stack = STACK._replace(torch="2.13.0")
    choice = choose(None, "npu", GOOD, stack)
    assert not choice.active and "names torch 2.7.1, this is 2.13.0" in choice.why
    assert choose(True, "npu", GOOD, stack).active


def test_it_can_be_refused() -> None:
    assert choose(False, "npu", GOOD, STACK) == Choice(False, "refused by --no-mindspeed")


def test_the_bring_up_page_has_every_branch() -> None:
    page = (Path(__file__).parents[2] / "docs" / "npu.md").read_text(encoding="utf-8")
    for branch in mindspeed.BRANCHES:
        rows = [line for line in page.splitlines() if line.count(" | ") == 6]
        (row,) = [line for line in rows if branch.name in line.split(" | ")[0]]
        facts = (branch.megatron_core, *branch.torch, branch.torch_npu, branch.cann, branch.python)
        assert all(fact in row for fact in facts), row


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_is_for_npus(device: str) -> None:
    assert not choose(None, device, GOOD, STACK).active
    with pytest.raises(UserError, match=f"this run is on {device}"):
        choose(True, device, GOOD, STACK)


def test_without_it_a_run_goes_on_unless_it_was_asked_for() -> None:
    assert "not installed" in choose(None, "npu", None, STACK).why
    with pytest.raises(UserError, match=r"not installed(.|\n)*core_r0\.16\.0 +0\.16\.x"):
        choose(True, "npu", None, STACK)


@pytest.mark.parametrize(
    ("changes", "core", "words"),
    [
        ({}, "0.12.1", "0.16.0 does not go with megatron-core 0.12.1"),
        ({"version": "0.12.1"}, "0.16.1", "0.12.1 does not go with megatron-core 0.16.1"),
        ({}, "0.15.3", "no MindSpeed goes with megatron-core 0.15.3"),
    ],
)
def test_a_pair_that_cannot_work_is_refused_with_those_that_can(changes, core, words) -> None:
    installed, stack = GOOD._replace(**changes), STACK._replace(megatron_core=core)
    with pytest.raises(UserError) as caught:
        choose(True, "npu", installed, stack)
    text = str(caught.value)
    assert words in text
    assert all(branch.name in text for branch in mindspeed.BRANCHES)
    left_out = choose(None, "npu", installed, stack)
    assert not left_out.active and words in left_out.why and "\n" not in left_out.why


@pytest.mark.parametrize(
    ("core", "needed"), [("0.16.1", False), ("0.17.0", True), ("0.19.2", True), ("1.0.0", True)]
)
def test_from_0_17_on_it_is_megatron_adaptor(core: str, needed: bool) -> None:
    choice = choose(True, "npu", GOOD, STACK._replace(megatron_core=core), ADAPTOR)
    assert choice.active and choice.package == ("megatron_adaptor" if needed else "mindspeed")


def test_megatron_adaptor_is_taken_only_when_it_is_asked_for() -> None:
    assert "unproven" in choose(True, "npu", None, NEWER, ADAPTOR).why
    unasked = choose(None, "npu", None, NEWER, ADAPTOR)
    assert not unasked.active and "--mindspeed takes it" in unasked.why
    assert not choose(None, "npu", GOOD, NEWER, None).active


def test_without_megatron_adaptor_a_run_that_asks_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"MegatronAdaptor of the branch core_r0\.18\.0"):
        choose(True, "npu", GOOD, NEWER, None)
    alone = ADAPTOR._replace(has_transformer_engine=False)
    with pytest.raises(UserError, match="needs TransformerEngineNPU, which is not installed"):
        choose(True, "npu", GOOD, NEWER, alone)


def test_the_newer_branches_need_megatrons_training() -> None:
    installed = GOOD._replace(version="0.12.1", is_train_26=True)
    stack = STACK._replace(megatron_core="0.12.1")
    assert "need megatron.training" in (fault(installed, stack) or "")
    assert fault(installed, stack._replace(has_training=True)) is None


def test_what_it_imports_has_to_be_there() -> None:
    told = fault(GOOD, STACK._replace(missing=("scipy", "triton"))) or ""
    assert "imports scipy, triton, which" in told and "requirements.txt" in told
    older = GOOD._replace(version="0.12.1")
    stack = STACK._replace(megatron_core="0.12.1", missing=("triton",))
    assert fault(older, stack) is None, "the older branch has no triton"


def test_the_placeholder_of_the_package_index_is_recognized(tmp_path: Path) -> None:
    folder = tmp_path / "mindspeed"
    folder.mkdir()
    installed = inspect_folder(folder, "0.0.1")
    assert installed.is_placeholder
    assert "placeholder" in (fault(installed, STACK) or "")


def test_a_checkout_says_its_version_itself(tmp_path: Path) -> None:
    folder = tmp_path / "mindspeed"
    (folder / "features_manager" / "qos").mkdir(parents=True)
    (folder / "megatron_adaptor.py").touch()
    (tmp_path / "setup.py").write_text("__version__ = '0.12.1'\n")
    installed = inspect_folder(folder, None)
    assert installed == Installed(folder, "0.12.1", is_placeholder=False, is_train_26=True)


FAKE = {
    "__init__.py": "",
    "args_utils.py": """
        import argparse
        _MINDSPEED_ARGS = None
        def get_mindspeed_args(get_defaults=False):
            if not get_defaults and _MINDSPEED_ARGS is not None:
                return _MINDSPEED_ARGS
            parser = argparse.ArgumentParser()
            parser.add_argument("--optimization-level", type=int, default=2)
            return parser.parse_args([] if get_defaults else None)
    """,
    "patch_utils.py": """
        class Patch:
            def __init__(self, is_applied): self.is_applied = is_applied
        class MindSpeedPatchesManager:
            patches_info = {"torch.compile": Patch(True), "torch.view": Patch(False)}
    """,
    "megatron_adaptor.py": """
        import sys, warnings
        from mindspeed.args_utils import get_mindspeed_args
        assert not [name for name in sys.modules if name.startswith("megatron")]
        seen, command_line = vars(get_mindspeed_args()), list(sys.argv)
        warnings.filterwarnings("once")
        warnings.warn("at length")
    """,
}


def activation(tmp_path: Path, code: str) -> Ended:
    """Runs code with a made-up MindSpeed of the genuine one's interface."""
    folder = tmp_path / "mindspeed"
    folder.mkdir()
    for name, text in FAKE.items():
        (folder / name).write_text(textwrap.dedent(text))
    words = ("-c", textwrap.dedent(code), "--tensor-model-parallel-size", "7")
    environ = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2] / 'plugin'}"}
    return run_python(*words, environ=environ)


def test_activation_tells_the_sizes_and_hides_the_command_line(tmp_path: Path) -> None:
    done = activation(
        tmp_path,
        """
        import sys, warnings
        from qwen2_ascend.runtime import mindspeed
        before, command_line = list(warnings.filters), list(sys.argv)
        assert mindspeed.activate({"tensor_model_parallel_size": 2}) == ("torch.compile",)
        from mindspeed import megatron_adaptor
        assert megatron_adaptor.seen == {"optimization_level": 2, "tensor_model_parallel_size": 2}
        assert megatron_adaptor.command_line == command_line[:1]
        assert sys.argv == command_line and len(command_line) == 3
        assert warnings.filters == before
        """,
    )
    assert done.err == ""


def test_megatron_adaptor_is_imported_before_megatron_and_sees_no_command_line(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "megatron_adaptor"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "import sys\n"
        "assert not [name for name in sys.modules if name.startswith('megatron.')]\n"
        "command_line = list(sys.argv)\n"
    )
    activation(
        tmp_path,
        """
        import sys
        from qwen2_ascend.runtime import mindspeed
        found = mindspeed.find_adaptor()
        assert found.folder.name == "megatron_adaptor" and not found.has_transformer_engine
        mindspeed.activate_adaptor()
        import megatron_adaptor
        assert megatron_adaptor.command_line == sys.argv[:1] and len(sys.argv) == 3
        """,
    )


def test_a_mindspeed_that_breaks_says_the_way_out(tmp_path: Path) -> None:
    done = activation(
        tmp_path,
        """
        import pathlib, mindspeed
        from qwen2_ascend.errors import UserError
        from qwen2_ascend.runtime.mindspeed import activate
        path = pathlib.Path(mindspeed.__file__).with_name("megatron_adaptor.py")
        path.write_text("import triton_of_ascend")
        try:
            activate({})
        except UserError as error:
            print(error)
        """,
    )
    assert "No module named 'triton_of_ascend'" in done.out
    assert "--no-mindspeed" in done.out
