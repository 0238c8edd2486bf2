"""``python scripts/tables.py``: the command of ``switchlora.analysis.tables.table``."""

from switchlora.analysis.tables.table import main

if __name__ == "__main__":
    main()
