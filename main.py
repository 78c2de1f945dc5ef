"""ReBerta: classify documents of thousands to tens of thousands of tokens.

  python main.py --mode train --train_path data/train --val_path data/evaluation
  python main.py --mode evaluate --model_path models/saved/RUN/model.pt --test_path data/validation
  python main.py --mode predict --model_path models/saved/RUN/model.pt --input_path CORPUS --output_path OUT.csv
  python main.py --mode export --model_path models/saved/RUN/model.pt --output_dir models/saved/RUN-onnx

Exit codes: 0 done; 1 unexpected; 2 options; 3 data; 4 model or checkpoint; 5 training; 6 memory or disk;
130 Ctrl-C; 143 SIGTERM.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any

from command_line import parse_settings
from config import Settings
from processes import leave_processes, process_count, said_once, stop_at_once
from utils import (
    ConfigError,
    ReBertaError,
    StoppedError,
    clean_gpu_memory,
    expected_error,
    is_main_process,
    limit_gpu_memory,
    logger,
    quiet_libraries,
    setup_logging,
)


def dispatch(settings: Settings) -> None:
    """Run the mode. Modes are imported here, so that `--help` and a wrong option answer at once."""
    if settings.mode in ("analyze", "export") and process_count() > 1:
        raise ConfigError(f"--mode {settings.mode} is done by one process; start it without torchrun")
    if settings.mode == "evaluate":
        from evaluate import evaluate

        evaluate(settings)
    elif settings.mode == "predict":
        from predict import predict_corpus

        predict_corpus(settings)
    elif settings.mode == "analyze":
        from data_utils.analysis import analyze_corpus
        from train import load_start, with_settings_of

        model = load_start(settings)
        settings, tokenizer = with_settings_of(model, settings), model and model.tokenizer
        del model  # analysis has no use for its weights
        analyze_corpus(settings, tokenizer)
    elif settings.mode == "export":
        from models.export import export

        export(settings)
    else:
        from data_utils.paths import expand_paths
        from train import train
        from train_by_steps import train_by_steps

        if settings.mode == "train_and_evaluate":
            expand_paths(settings.test_files)  # raises where there is none, which is better known before a run begins
        elif settings.test_path is not None:
            logger.warning("--mode %s reads no --test_path; --mode evaluate does", settings.mode)
        trained = train(settings) if settings.total_steps is None else train_by_steps(settings)
        if settings.mode == "train_and_evaluate":
            from evaluate import evaluate

            if trained.signal:
                message = f"training is finished and saved, {trained.run_folder}; the test set was not evaluated"
                raise said_once(StoppedError(message, trained.signal))
            clean_gpu_memory()  # of the trainer and its optimizer
            of_best_model = {
                "model_path": str(trained.best_model / "model.pt"),
                "test_path": settings.test_files,
                "output_dir": str(trained.run_folder / "evaluation"),
            }
            evaluate(settings.model_copy(update=of_best_model))


def report(level: int, message: str, *arguments: object, traceback: bool = False) -> None:
    """Why the command ends: an error is said whatever the `--log_level`."""
    if level == logging.ERROR and not logger.isEnabledFor(level):
        level = logging.CRITICAL
    logger.log(level, message, *arguments, exc_info=traceback or logger.isEnabledFor(logging.DEBUG))


def main(argv: Sequence[str] | None = None, description: str | None = __doc__, **defaults: Any) -> int:
    """Parse, run, and turn an error into one message and an exit code; `--help` begins with the `description`."""
    setup_logging()
    before = signal.signal(signal.SIGTERM, stop_at_once)
    exit_code = 0
    try:
        settings = parse_settings(argv, description=description, **defaults)
        setup_logging(settings.log_level)
        quiet_libraries(settings.log_level)
        limit_gpu_memory(settings.gpu_memory_fraction)
        dispatch(settings)
    except ReBertaError as error:
        if is_main_process() or not isinstance(error, ConfigError):  # that one is the same in all processes
            report(error.level, "%s", error)
        exit_code = error.exit_code
    except KeyboardInterrupt:
        report(logging.ERROR, "stopped by Ctrl-C")
        exit_code = 130
    except Exception as error:
        if known := expected_error(error):
            report(known.level, "%s", known)
        else:
            report(logging.ERROR, "unexpected error; please report it with what stands above", traceback=True)
        exit_code = known.exit_code if known else 1
    finally:
        signal.signal(signal.SIGTERM, before)
    leave_processes(exit_code)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
