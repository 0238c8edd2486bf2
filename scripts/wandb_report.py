"""``python scripts/wandb_report.py``: the command of ``switchlora.analysis.wandb_report``."""

from switchlora.analysis.wandb_report import main

if __name__ == "__main__":
    main()
