"""``python scripts/lowrank_speed.py``: the command of ``switchlora.bench.lowrank``."""

from switchlora.bench.lowrank import main

if __name__ == "__main__":
    main()
