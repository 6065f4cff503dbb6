"""Our checkpoints' `args` have what other tools read of them; see args_read.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint.toys import convert, make_hugging_face_folder, toy_config
from interop.args_read import LEFT_OUT, READERS, written
from interop.checkouts import checkouts
from interop.names_read import names_read
from qwen2_ascend.checkpoint.formats.pickles import DType
from qwen2_ascend.checkpoint.megatron_args import megatron_args
from qwen2_ascend.parallel import ParallelLayout

LAYOUTS = {
    "one rank": ParallelLayout(),
    "tp2 pp2": ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "interleaved": ParallelLayout(
        pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1
    ),
    "uneven": ParallelLayout(pipeline_model_parallel_size=2, num_layer_list=(1, 3)),
}
LEFT = frozenset().union(*LEFT_OUT.values())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_args_say_what_the_model_is(layout, dtype, tied):
    config = toy_config(num_layers=4, tie_word_embeddings=tied, attention_dropout=0.25)
    found = vars(megatron_args(config, layout, 128, dtype))
    expected = written(config, layout, 128, dtype)
    assert found == {**expected, "params_dtype": DType(expected["params_dtype"])}


@pytest.mark.parametrize(
    "reader", READERS, ids=lambda r: f"{r.versions[0]} {r.functions or r.file}"
)
def test_every_name_that_is_read_is_written_or_left_out_for_a_reason(reader):
    there = vars(megatron_args(toy_config(), ParallelLayout(), 96, "bf16")).keys() | {"ckpt_format"}
    assert not reader.required - there
    assert not reader.optional - there - LEFT
    assert not LEFT & there


def test_torch_loads_the_args_of_both_formats(tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    files = {
        "megatron": ("torch", "iter_0000001/mp_rank_00/model_optim_rng.pt"),
        "torch_dist": ("torch_dist", "iter_0000001/common.pt"),
    }
    for save_format, (ckpt_format, file) in files.items():
        convert(source, tmp_path / save_format, "--save-format", save_format).require()
        args = torch.load(tmp_path / save_format / file, weights_only=False)["args"]
        assert args.ckpt_format == ckpt_format
        assert args.params_dtype is torch.bfloat16


@pytest.mark.parametrize("tool", sorted({reader.tool for reader in READERS}))
def test_the_genuine_tools_read_these_names(tool):
    """Holds the table to the sources, where there are checkouts of its versions."""
    own = [reader for reader in READERS if reader.tool == tool]
    versions = {version for reader in own for version in reader.versions}

    def has_version(folder: Path) -> bool:
        return any(folder.name.endswith(version) for version in versions)

    what = f"a name that ends with one of {sorted(versions)}"
    found = checkouts(f"{tool}_PATH", has_version, what)
    for reader in own:
        for folder in found:
            if folder.name.endswith(reader.versions):
                read = names_read(folder / reader.file, reader.functions, reader.holders)
                assert read == reader.required | reader.optional, (folder.name, reader)
