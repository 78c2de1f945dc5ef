"""One short epoch for debugging: `python run_epoch.py` with the options of main.py.

Takes 32 documents of each set unless `--sample_data` says otherwise, and a fresh run folder under `logs/`.
"""

from __future__ import annotations

import sys

from main import main

if __name__ == "__main__":
    sys.exit(main(mode="train", epochs=1, sample_data=32, log_steps=1, resume="never"))
