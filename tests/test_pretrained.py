"""A model's folder is opened by transformers in one place, and no code of the folder runs."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from commands import run_python
from data.corpora import save_tokenizer
from qwen2_ascend.errors import UserError
from qwen2_ascend.pretrained import open_pretrained, open_tokenizer

ROOT = Path(__file__).parents[1]
OPENERS = {"from_pretrained", "from_config"}
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer")
OWN = {"Qwen2Config", "cls"}
"""Classes of this project with a `from_pretrained` of their own, which only reads JSON."""


def _opening_calls(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in OPENERS
        and not (isinstance(node.func.value, ast.Name) and node.func.value.id in OWN)
    ]


def _trusts_nobody(call: ast.Call) -> bool:
    values = {keyword.arg: keyword.value for keyword in call.keywords}
    value = values.get("trust_remote_code")
    return isinstance(value, ast.Constant) and value.value is False


def test_only_one_place_opens_a_folder_and_it_trusts_no_code() -> None:
    """Walks every file of the package: a new call of `from_pretrained` has to go through there."""
    allowed = {"pretrained.py": 1, "random_weights.py": 1}
    found = {}
    for path in sorted((ROOT / "plugin").rglob("*.py")):
        if calls := _opening_calls(path):
            assert all(map(_trusts_nobody, calls)), path
            found[path.name] = len(calls)
    assert found == allowed


def test_examples_and_tools_trust_no_code() -> None:
    paths = [p for name in ("examples", "launch", "tools") for p in (ROOT / name).rglob("*.py")]
    assert paths
    for path in paths:
        for call in _opening_calls(path):
            spread = [k.value for k in call.keywords if k.arg is None]
            named = [node.id for node in spread if isinstance(node, ast.Name)]
            assert _trusts_nobody(call) or named == ["safely"], path
        text = path.read_text(encoding="utf-8")
        assert "safely = {" not in text or '"trust_remote_code": False' in text


def test_transformers_auto_classes_are_given_to_the_one_place_only() -> None:
    """An opener that has another name, or is fetched by `getattr`, stands out too."""
    for path in sorted((ROOT / "plugin").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        allowed: set[ast.AST] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                allowed |= set(node.args) if node.func.id == "open_pretrained" else set()
            elif isinstance(node, ast.Attribute) and node.attr in OPENERS:
                allowed.add(node.value)  # the tests above look at these
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id.startswith(AUTO_CLASSES):
                assert node in allowed, (path, node.lineno)


TOKENIZER_CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose tokenizer and config want code that leaves a file behind."""
    folder = save_tokenizer(tmp_path / "hf")
    (folder / "own.py").write_text(TOKENIZER_CODE.format(marker=str(tmp_path / "ran")))
    return folder


def _wants(folder: Path, name: str, auto_map: object, **changes: object) -> None:
    path = folder / name
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**raw, "auto_map": auto_map, **changes}))


WISHES = {
    "tokenizer": ("tokenizer_config.json", {"AutoTokenizer": [None, "own.Own"]}, {}),
    "slow and fast": ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]}, {}),
    "old form": ("tokenizer_config.json", ["own.Own", "own.Own"], {}),
    "own class": (
        "tokenizer_config.json",
        {"AutoTokenizer": [None, "own.Own"]},
        {"tokenizer_class": "Own"},
    ),
    "config": ("config.json", {"AutoConfig": "own.Own"}, {"model_type": "own"}),
    "config's tokenizer": ("config.json", {"AutoTokenizer": "own.Own"}, {"model_type": "own"}),
}


@pytest.mark.parametrize("wish", WISHES)
def test_a_folder_that_wants_its_own_code_is_refused_and_the_code_does_not_run(
    hostile: Path, tmp_path: Path, wish: str
) -> None:
    """The standard input may answer transformers' question with yes."""
    name, auto_map, changes = WISHES[wish]
    _wants(hostile, name, auto_map, **changes)
    code = (
        "import sys\n"
        "from qwen2_ascend.errors import UserError\n"
        "from qwen2_ascend.pretrained import open_tokenizer\n"
        "try:\n    open_tokenizer(sys.argv[1])\n"
        "except UserError as error:\n    sys.exit(str(error))\n"
    )
    ended = run_python("-c", code, hostile, status=None, stdin="y\n" * 10)
    assert not (tmp_path / "ran").exists()
    assert "wants code of its own to be run (auto_map" in ended.require(1).err


def test_a_config_or_model_that_wants_its_own_code_is_refused(hostile: Path) -> None:
    from transformers import AutoConfig, Qwen2ForCausalLM

    _wants(hostile, "config.json", {"AutoConfig": "own.Own"}, model_type="qwen2")
    for auto_class in (AutoConfig, Qwen2ForCausalLM):
        with pytest.raises(UserError, match="wants code of its own"):
            open_pretrained(auto_class, hostile)


def test_code_for_what_is_not_opened_does_not_matter(hostile: Path) -> None:
    _wants(hostile, "config.json", {"AutoModelForSequenceClassification": "own.Own"})
    assert open_tokenizer(hostile)("the of").input_ids


def test_files_of_a_tokenizer_are_regular_and_its_own(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "hf")
    os.mkfifo(folder / "special_tokens_map.json")
    (folder / "additional_chat_templates").symlink_to("/etc")
    (tmp_path / "elsewhere.jinja").write_text("x")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "elsewhere.jinja")
    (folder / "vocab.json").symlink_to("/dev/zero")
    (folder / "model.safetensors").symlink_to("/dev/null")
    with pytest.raises(UserError) as caught:
        open_tokenizer(folder)
    faults = "\n".join(caught.value.faults)
    assert "special_tokens_map.json: is a FIFO, not a regular file" in faults
    assert f"additional_chat_templates: a link that leads out of {folder}, to /etc" in faults
    assert "chat_template.jinja: a link that leads out of" in faults
    assert "vocab.json: is a device, not a regular file" in faults


def test_a_pipe_in_place_of_the_tokenizer_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json: is a FIFO"):
        open_tokenizer(tmp_path)


def test_links_inside_the_folder_and_inside_the_hub_s_cache_are_followed(tmp_path: Path) -> None:
    """The Hugging Face cache keeps a model's files in `blobs` and links to them."""
    real = save_tokenizer(tmp_path / "models--a--b" / "blobs")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    for path in real.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (snapshot / "copy.json").symlink_to("tokenizer.json")
    assert open_tokenizer(snapshot)("the of").input_ids
    other = tmp_path / "other"
    other.mkdir()
    for path in real.iterdir():
        (other / path.name).symlink_to(path)
    with pytest.raises(UserError, match="a link that leads out of"):
        open_tokenizer(other)


def test_a_name_in_the_hub_s_cache_is_found_there_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder = save_tokenizer(tmp_path / "hf")
    asked = []

    def found(name: str, *, local_files_only: bool) -> str:
        asked.append((name, local_files_only))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    assert open_tokenizer("Qwen/Qwen2.5-0.5B")("the of").input_ids
    assert asked == [("Qwen/Qwen2.5-0.5B", True)]
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "own.Own"}}')
    with pytest.raises(UserError, match="wants code of its own"):
        open_tokenizer("Qwen/Qwen2.5-0.5B")
