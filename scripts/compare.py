"""``python scripts/compare.py``: the command of ``switchlora.analysis.compare``."""

from switchlora.analysis.compare import main

if __name__ == "__main__":
    main()
