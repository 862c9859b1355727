"""A second, small task: regression on a table. It has no code for folders, checkpoints, resume,
logs, signals or averages: the engine gives them.

    python -m tests.engine.regression --table table.csv --output_dir runs/table
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from latentvae.cli.train import run_task
from latentvae.config.run_config import JobConfig, OptimizerConfig, RunConfig
from latentvae.data import IndexSampler
from latentvae.distributed import is_main, rank, world_size
from latentvae.engine.task import Learner, Task
from latentvae.errors import UserError
from latentvae.option_marks import MayChange, Positive, Section


class TableConfig(Section):
    """The table and the network."""

    table: Annotated[str | None, MayChange()] = Field(
        default=None, description="CSV file; the last column is predicted."
    )
    width: Positive = Field(default=16, description="Width of the hidden layer.")
    dropout: float = Field(default=0.1, description="Share of hidden units dropped in training.")


class RegressionConfig(JobConfig):
    """A regression."""

    config: Annotated[str, MayChange()] = Field(
        default="", description="YAML file; flags override it."
    )
    regression: TableConfig = TableConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr_warmup_steps=2, learning_rate=1e-2)
    run: RunConfig = RunConfig()


class Regression(Task):
    """Predict the last column of a table from the others, with a mean squared error."""

    config_class = RegressionConfig
    unit, shown = "rows", ("loss/mse",)
    launch = ("-m", "tests.engine.regression")

    def open(self) -> None:
        path = self.config.regression.table
        if path is None or not Path(path).is_file():
            raise UserError(f"table '{path}' is not there; give a CSV file")
        self.table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))

    def check_processes(self, processes: int) -> None:
        self._sampler(rank=0, processes=processes, start=0)  # one batch for each of them?

    def build(self, accelerator: Accelerator, *, resumed: bool) -> None:
        options = self.config.regression
        net = nn.Sequential(
            nn.Linear(self.table.shape[1] - 1, options.width),
            nn.Tanh(),
            nn.Dropout(options.dropout),
            nn.Linear(options.width, 1),
        )
        learner = Learner.with_optimizer(net, accelerator, self.config.optimizer, averaged=net)
        self.learners = {"model": learner}

    def identity(self) -> dict[str, Any]:
        return {"rows": len(self.table)}

    def _sampler(self, *, rank: int, processes: int, start: int) -> IndexSampler:
        options = self.config.run
        return IndexSampler(
            len(self.table),
            options.train_batch_size,
            rank=rank,
            world_size=processes,
            start_step=start,
            seed=options.seed,
        )

    def batches(self, *, start_step: int) -> Iterable[Tensor]:
        sampler = self._sampler(rank=rank(), processes=world_size(), start=start_step)
        self.steps_per_epoch = sampler.steps_per_epoch
        return self._rows(sampler)

    def _rows(self, sampler: IndexSampler) -> Iterator[Tensor]:
        for places in sampler:
            yield self.table[[index for index, *_ in places]]

    def micro_step(self, batch: Tensor, update: int) -> dict[str, Tensor]:
        batch = batch.to(self.device)
        prediction = self.learners["model"].prepared(batch[:, :-1])[:, 0]
        loss = (prediction - batch[:, -1]).square().mean()
        (loss / self.config.run.gradient_accumulation_steps).backward()
        return {"loss/mse": loss.detach()}

    def validate(self, update: int) -> dict[str, float]:
        with torch.no_grad():
            table = self.table.to(self.device)
            prediction = self.learners["model"].module(table[:, :-1])[:, 0]
        error = (prediction - table[:, -1]).square().mean()
        return {"validation/mse": error.item()}

    def export(self, out: Path, *, update: int, folder: Path) -> dict[str, Any]:
        if is_main():
            out.mkdir(exist_ok=True)
            weights: Mapping[str, Tensor] = self.learners["model"].module.state_dict()
            save_file({k: v.clone() for k, v in weights.items()}, out / "net.safetensors")
        return {"export/rows": len(self.table)}

    def order(self, *, rank: int, processes: int, start: int, stop: int) -> list[Any]:
        sampler = self._sampler(rank=rank, processes=processes, start=start)
        return [step for _, step in zip(range(start, stop), sampler, strict=False)]


if __name__ == "__main__":
    run_task(Regression, sys.argv[1:], description="Fit a table.")
