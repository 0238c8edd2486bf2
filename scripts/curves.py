"""``python scripts/curves.py``: the command of ``switchlora.analysis.curves``."""

from switchlora.analysis.curves import main

if __name__ == "__main__":
    main()
