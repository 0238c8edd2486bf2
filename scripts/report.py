"""``python scripts/report.py``: the command of ``switchlora.analysis.page.page``."""

from switchlora.analysis.page.page import main

if __name__ == "__main__":
    main()
