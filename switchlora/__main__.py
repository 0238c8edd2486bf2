"""``python -m switchlora``, and ``torchrun ... -m switchlora``."""

from switchlora.cli import main

main()
