"""What the commands that change a registry have in common on their command line."""

from argparse import ArgumentParser


def add_change_options(parser: ArgumentParser, forced: str | None = None) -> None:
    """Add the options of a change; with ``forced``, a verb, also one that overrules objections."""
    if forced is not None:
        about = f"{forced} what is refused; the log has it"
        parser.add_argument("--force", metavar="REASON", help=about)
    parser.add_argument("--why", metavar="TEXT", help="a reason for the log")
    parser.add_argument("--wandb", action="store_true", help="tell Weights & Biases too")


def check_force(force: str | None) -> None:
    """Raise ValueError for a reason without words."""
    if force is not None and not force.strip():
        raise ValueError("--force needs a reason")
