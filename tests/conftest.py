import os
import signal
import sys
from pathlib import Path

import nbformat
import pytest

os.environ |= {"MEDCLIP_NB_BATCH": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler) # Ignored in what a shell runs in the background, and in what that starts
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def make_template():
    "Write a template: its parameters cell, then the rest"
    def make(path, parameters, *cells):
        v4 = nbformat.v4
        head = [v4.new_markdown_cell("# A stub\n\n> For tests"), v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        nbformat.write(v4.new_notebook(cells=[*head, *map(v4.new_code_cell, cells)]), path)
        return Path(path)
    return make


@pytest.fixture(scope="session")
def command():
    "The installed command `medclip-nb`"
    return str(Path(sys.executable).with_name("medclip-nb"))
