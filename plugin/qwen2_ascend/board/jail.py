"""Names of files below the folders that the board was started with; nothing else has a name here.

Links are resolved before a path is judged, so a link that leads out of the folders is out of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from qwen2_ascend.errors import UserError

MAX_NAME_BYTES = 4096


class Jail:
    """The folders that a board may see.

    Args:
        folders: what was given at start.

    Raises:
        UserError: one is no folder, or is given twice.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.roots: dict[str, Path] = {}
        for folder in folders:
            root = Path(os.path.realpath(folder))
            if not root.is_dir():
                raise UserError(f"{folder}: is no folder; name one that holds runs.")
            if root in self.roots.values():
                raise UserError(f"{folder}: is given twice; name each folder once.")
            self.roots[self._label(root)] = root

    def _label(self, root: Path) -> str:
        """The folder's own name, with a number where another root has it already."""
        name = root.name or "root"
        numbered = (f"{name}-{number}" for number in range(2, len(self.roots) + 3))
        return next(label for label in (name, *numbered) if label not in self.roots)

    def path(self, name: str) -> Path:
        """The path that a name of the page stands for, with all links resolved.

        Args:
            name: "FOLDER/..." as `name` gives it, or an absolute path.

        Raises:
            UserError: it is no name, or leads out of the board's folders.
        """
        if not name or "\0" in name or len(os.fsencode(name)) > MAX_NAME_BYTES:
            raise UserError("give the name of a file or folder.")
        real = Path(os.path.realpath(self._path(name)))
        if not any(real.is_relative_to(root) for root in self.roots.values()):
            shown = ", ".join(map(str, self.roots.values()))
            raise UserError(
                f"{name}: is outside of the folders of this board ({shown}); start the board with "
                "the folder that holds it."
            )
        return real

    def existing(self, name: str) -> Path:
        """The `path` of a file or folder that exists.

        Raises:
            UserError: as `path`, or there is nothing.
        """
        path = self.path(name)
        if not path.exists():
            raise UserError(f"{name}: there is no such file or folder.")
        return path

    def name(self, path: Path) -> str:
        """What the page calls a path below one of the folders."""
        label, root = next(
            (label, root) for label, root in self.roots.items() if path.is_relative_to(root)
        )
        return (Path(label) / path.relative_to(root)).as_posix()

    def holds(self, path: Path) -> bool:
        """Whether a path is below the folders, once links are resolved."""
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(root) for root in self.roots.values())

    def _path(self, name: str) -> Path:
        path = Path(name)
        if path.is_absolute():
            return path
        label, *rest = path.parts or ("",)
        if label in self.roots:
            return self.roots[label].joinpath(*rest)
        return next(iter(self.roots.values())) / path
