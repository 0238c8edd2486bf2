"""``python scripts/replay.py``: the command of ``switchlora.analysis.replay.replay``."""

from switchlora.analysis.replay.replay import main

if __name__ == "__main__":
    main()
