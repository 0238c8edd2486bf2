"""``python scripts/systems_speed.py``: the command of ``switchlora.bench.systems``."""

from switchlora.bench.systems import main

if __name__ == "__main__":
    main()
