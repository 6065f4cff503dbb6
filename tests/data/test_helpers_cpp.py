"""megatron-core's C++ helpers: there, or compiled into the user's cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from commands import run_python
from qwen2_ascend.data.helpers_cpp import compile_helpers_cpp
from qwen2_ascend.errors import UserError

HIDDEN = """
import sys
import numpy as np
from qwen2_ascend.runtime import absent_triton
absent_triton.lend()
import megatron.core.datasets as package

real = list(package.__path__)[0]
package.__path__[:] = [sys.argv[1]]          # an installation without the compiled extension
from qwen2_ascend.data.helpers_cpp import ensure_helpers_cpp
try:
    import megatron.core.datasets.helpers_cpp
    sys.exit("the extension was not hidden")
except ModuleNotFoundError:
    pass
ensure_helpers_cpp()
package.__path__[:] = [real]
from megatron.core.datasets import helpers, helpers_cpp
assert sys.argv[2] in helpers_cpp.__file__, helpers_cpp.__file__
lengths = np.array([5, 3, 9], dtype=np.int32)
print(helpers.build_sample_idx(lengths, np.arange(3, dtype=np.int32), 4, 1, 17).tolist())
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_a_missing_extension_is_compiled_once_into_the_cache(tmp_path: Path, monkeypatch) -> None:
    """What Megatron's own `make` cannot do where the installation is read-only."""
    import megatron.core.datasets

    source = Path(megatron.core.datasets.__path__[0]) / "helpers.cpp"
    package = tmp_path / "package"
    package.mkdir()
    shutil.copy(source, package)
    package.chmod(0o555)
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    ended = run_python("-W", "ignore", "-c", HIDDEN, package, cache)
    # samples of 4 tokens and one more, by hand: (document, offset) where each starts
    assert ended.out.strip() == "[[0, 0], [0, 4], [2, 0], [2, 4], [2, 8]]"
    (library,) = (tmp_path / "cache" / "qwen2-ascend").glob("helpers_cpp-*")
    before = library.stat().st_mtime_ns
    assert compile_helpers_cpp(source) == library
    assert library.stat().st_mtime_ns == before


def test_no_compiler_is_said_with_a_way_out(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "helpers.cpp").write_text("int x;")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="install megatron-core from a wheel"):
        compile_helpers_cpp(tmp_path / "helpers.cpp")


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_a_failing_compiler_is_quoted(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "helpers.cpp").write_text("this is not C++")
    with pytest.raises(UserError, match=r"compiling it failed: .*error"):
        compile_helpers_cpp(tmp_path / "helpers.cpp")
    assert not list(tmp_path.rglob("helpers_cpp-*.so"))
