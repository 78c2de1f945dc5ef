"""One short epoch for debugging: `python run_epoch.py` with the options of main.py.

Takes 32 documents of each set unless `--sample_data` says otherwise, and a fresh run folder under `logs/`. What the
`--config` of a whole run says of its length and its folder does not count here.
"""

from __future__ import annotations

import sys
from typing import Any

from main import main

if __name__ == "__main__":
    short: dict[str, Any] = {"mode": "train", "epochs": 1, "sample_data": 32, "log_steps": 1, "resume": "never"}
    of_a_whole_run = dict.fromkeys(("total_steps", "eval_every", "num_warmup_steps", "output_dir"))
    sys.exit(main(description=__doc__, **short, **of_a_whole_run))
