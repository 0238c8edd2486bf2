"""``python scripts/figures.py``: the command of ``switchlora.analysis.figures``."""

from switchlora.analysis.figures import main

if __name__ == "__main__":
    main()
