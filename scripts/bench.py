"""``python scripts/bench.py``: the command of ``switchlora.bench.bench``."""

from switchlora.bench.bench import main

if __name__ == "__main__":
    main()
