"""What a wheel takes along that the source tree only knows from git: its commit."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMMIT = "switchlora/COMMIT"


class CommitHook(BuildHookInterface):
    """Writes the commit into the wheel and the source archive, as ``switchlora/COMMIT``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the file, unless the package is installed to be edited or brings it already."""
        if version == "editable" or (Path(self.root) / COMMIT).exists():
            return
        self.folder = tempfile.TemporaryDirectory()
        file = Path(self.folder.name) / "COMMIT"
        file.write_text(self._commit() + "\n")
        build_data["force_include"][str(file)] = COMMIT

    def finalize(self, version: str, build_data: dict[str, Any], artifact: str) -> None:
        """Remove the temporary file."""
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def _commit(self) -> str:
        """Return the commit, with '-dirty' for changed files; '' outside of git."""
        if not (Path(self.root) / ".git").exists():
            return ""
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            found = subprocess.run(command, cwd=self.root, capture_output=True, text=True)
        except OSError:  # no git here
            return ""
        return found.stdout.strip()
