"""``python -m switchlora``, and ``torchrun ... -m switchlora``."""

from switchlora.train import main

main()
