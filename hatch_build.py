"""What a wheel has otherwise than the source tree: its commit, and a README that stands alone."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

COMMIT = "switchlora/COMMIT"
PICTURE = re.compile(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*")
LINK = re.compile(r"\[([^]]*)\]\((?!https?:|#)[^)]*\)")
"""a picture and a link that lead to a file of the repository"""


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


class ReadmeHook(MetadataHookInterface):
    """Gives a wheel the README without links to files that it does not have."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the README."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        alone = LINK.sub(r"\1", PICTURE.sub("", text))
        metadata["readme"] = {"content-type": "text/markdown", "text": alone}
