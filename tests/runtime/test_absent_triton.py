"""One module of megatron-core gets a stand-in for triton while it is imported; nobody else does."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from commands import Ended, run_python

PAGED = """
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(pointer, SIZE: tl.constexpr):
        return tl.load(pointer)

    try:
        import megatron.core.guarded
    except ImportError:
        pass
"""
GUARDED = """
    try:
        import triton
        HAVE_TRITON = True
    except ImportError:
        HAVE_TRITON = False
"""
PLACES = ("transformer/moe/paged_stash.py", "transformer/moe/ops/paged_stash.py")


@pytest.fixture(params=PLACES)
def borrower(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A made-up megatron-core that imports triton where a genuine release does; that module."""
    core = tmp_path / "megatron" / "core"
    path = core / request.param
    path.parent.mkdir(parents=True)
    for folder in (core, core / "transformer", core / "transformer/moe", path.parent):
        (folder / "__init__.py").write_text("")
    path.write_text(textwrap.dedent(PAGED))
    (core / "guarded.py").write_text(textwrap.dedent(GUARDED))
    return f"megatron.core.{request.param[:-3].replace('/', '.')}"


def python(tmp_path: Path, code: str, status: int = 0) -> Ended:
    environ = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2] / 'plugin'}"}
    return run_python("-S", "-c", textwrap.dedent(code), status=status, environ=environ)


def test_without_it_the_import_fails(borrower: str, tmp_path: Path) -> None:
    done = python(tmp_path, f"import {borrower}", status=1)
    assert "No module named 'triton'" in done.err


def test_one_module_is_lent_it_and_the_ledger_says_so(borrower: str, tmp_path: Path) -> None:
    done = python(
        tmp_path,
        f"""
        import importlib, importlib.util, sys
        from qwen2_ascend.runtime import absent_triton, ledger
        absent_triton.lend()
        absent_triton.lend()
        module = importlib.import_module("{borrower}")
        assert not sys.modules["megatron.core.guarded"].HAVE_TRITON, "another module saw it"
        assert "triton" not in sys.modules and importlib.util.find_spec("triton") is None
        assert [patch.target for patch in ledger.applied_patches()] == ["{borrower}:triton"]
        try:
            module.kernel[(1,)](None, SIZE=2)
        except RuntimeError as error:
            print(error)
        """,
    )
    assert done.out == "kernel is a triton kernel, and triton is not installed.\n"


def test_a_triton_that_is_there_is_taken(borrower: str, tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("jit = lambda function: 'genuine'")
    (tmp_path / "triton" / "language.py").write_text("constexpr = object")
    python(
        tmp_path,
        f"""
        import importlib
        from qwen2_ascend.runtime import absent_triton, ledger
        absent_triton.lend()
        assert importlib.import_module("{borrower}").kernel == "genuine"
        assert not ledger.applied_patches()
        """,
    )
