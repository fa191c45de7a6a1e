"""`logicrd` with a stand-in in place of DeepStream's process; for tests."""

import sys
from pathlib import Path

from pipeline import cli
from pipeline.sources import deepstream

deepstream.PYTHON = Path(sys.executable)
deepstream.CHILD = Path(__file__).with_name("graph_stand_in.py")
cli.main()
