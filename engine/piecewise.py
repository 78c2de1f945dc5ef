"""A Trainer that goes on when memory runs out.

- a micro-batch is worked off in `parts` pieces of documents, one after the other; their gradients add up to those of
  the whole, since the loss is a sum over documents divided by a number that counts the whole update
- out of memory: the gradients of the update are thrown away, the pieces are halved for the rest of the run, and the
  update's micro-batches so far are read again; the loss that is logged stays that of the update
- a lone document that does not fit: memory level 2, and if that does not help, an error that names it
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import Trainer

from utils import ResourceError, clean_gpu_memory, logger

Batch = dict[str, Tensor]
"""`input_ids` and `attention_mask` [B, N, W], `labels` [B] or [B, C], `index` [B]."""


class PiecewiseTrainer(Trainer):
    """Subclasses know the names of the documents, and what they noted of an update."""

    parts = 1

    def __init__(self, **options: Any) -> None:
        self._update: list[Batch] = []
        self._piece: Batch = {}
        super().__init__(**options)

    def document_name(self, index: int) -> str:
        raise NotImplementedError

    def forget_update(self) -> None:
        """Drop what was noted of the update that is at work: it starts again."""
        raise NotImplementedError

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Gradients of one micro-batch, added to those of the update; its share of the update's loss, [].

        Raises:
            ResourceError: memory ran out and nothing more can be done about it.
        """
        self._update.append(inputs)
        batches = [inputs]
        while (loss := self._attempt(model, batches, num_items_in_batch)) is None:
            self._make_room()
            model.zero_grad()
            self.forget_update()
            batches = self._update
        if self.accelerator.sync_gradients:  # the update's last one
            self._update = []
        return loss

    def _attempt(self, model: nn.Module, batches: list[Batch], num_items: Any) -> Tensor | None:
        """The loss of the last batch, or None: memory ran out at `_piece`."""
        try:
            return [self._in_pieces(model, batch, num_items) for batch in batches][-1]
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
                raise
            return None  # what is to be done waits until the traceback, and the tensors that it holds, are gone

    def _in_pieces(self, model: nn.Module, batch: Batch, num_items: Any) -> Tensor:
        parts = min(self.parts, len(batch["index"]))
        columns = [column.tensor_split(parts) for column in batch.values()]
        losses = []
        for number, piece in enumerate(zip(*columns, strict=True), 1):
            self._piece = dict(zip(batch, piece, strict=True))
            with nullcontext() if number == parts else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, self._piece, num_items))
        return sum(losses[1:], losses[0])

    def _make_room(self) -> None:
        """Halve the pieces, or raise the memory level where one document is too much."""
        clean_gpu_memory()
        index = self._piece["index"].tolist()
        windows = int(self._piece["attention_mask"].any(-1).sum(1).max())
        step = self.state.global_step + 1
        if self.args.world_size > 1:  # the other processes wait for the gradients of this attempt
            raise ResourceError(
                f"step {step}: out of memory with {len(index)} documents of up to {windows} windows. With several "
                "processes this cannot be mended on the way: plan ahead with --max_memory, or give a smaller "
                "--batch_size and as many more --gradient_accumulation_steps"
            )
        if len(index) > 1:
            self.parts *= 2
            logger.warning(
                "step %d: out of memory with %d documents of up to %d windows; the update starts again with %d such "
                "documents at a time, in %d parts a batch from now on",
                *(step, len(index), windows, -(-len(index) // 2), self.parts),
            )
        elif self.model.config.memory_level != 2:
            self.model.config.memory_level = 2
            logger.warning(
                "step %d: out of memory with one document, %s of %d windows; memory level 2 from now on",
                *(step, self.document_name(index[0]), windows),
            )
        else:
            raise ResourceError(
                f"step {step}: out of memory with one document, {self.document_name(index[0])} of {windows} windows, "
                f"at memory level 2. Train on less of it with --train_windows below {windows}, or take a smaller "
                "--window_size or encoder"
            )
