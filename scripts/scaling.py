"""``python scripts/scaling.py``: the command of ``switchlora.analysis.scaling``."""

from switchlora.analysis.scaling import main

if __name__ == "__main__":
    main()
