"""Imported by the server of forks, for the programs that tests start there."""

import os
from pathlib import Path

from warm import warm_up

paths = os.environ["PYTHONPATH"].split(os.pathsep)
paths.remove(str(Path(__file__).parent))  # a program has no such path
os.environ["PYTHONPATH"] = os.pathsep.join(paths)
warm_up()
