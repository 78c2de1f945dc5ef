"""How a run goes: one transformers Trainer subclass, and what it needs around it.

- `trainer`: batches, loss, evaluation and the best model; callbacks for watch, moving average, signals and metrics
- `watch`: what ends a run before an update
- `objective`: the loss, as a sum divided by a count
- `linear_probe`: the head that a run may start from
- `memory_plan`, `piecewise`: an update in as few pieces as the memory allows
- `run_folder`, `run_checkpoints`: where a run lies, and what it goes on from
"""
