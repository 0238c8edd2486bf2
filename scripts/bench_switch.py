"""``python scripts/bench_switch.py``: the command of ``switchlora.bench.switch``."""

from switchlora.bench.switch import main

if __name__ == "__main__":
    main()
