"""HEADS"""

from torch import Tensor, nn

from rm.data.batch import MicroBatch, StepBatches
from rm.model import losses
from rm.model.transformer import ModelConfig, Transformer

Sums = dict[str, Tensor]


class LanguageModel(Transformer):
    """Next-token prediction; the head is the embedding where the model ties them."""

    head = "lm"

    def __init__(self, config: ModelConfig, kernel: type):
        super().__init__(config, kernel)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, row: MicroBatch) -> Sums:
        """`loss`: summed cross entropy of the row's labelled tokens, () fp32; `count`: how many."""
        hidden = self.hidden(row.tokens, row.position, row.segments, row.label_positions)  # (L, D)
        head = self.embed if self.config.tie_embeddings else self.lm_head
        loss = losses.linear_cross_entropy(hidden, head.weight, row.targets)
        return {"loss": loss + _nothing(hidden), "count": loss.new_tensor(len(row.targets))}

    @staticmethod
    def count(work: StepBatches) -> int:
        """What a step's sums are divided by."""
        return work.labels


class RewardModel(Transformer):
    """One number a reply: a linear fp32 head on the hidden state of its last token. No logits anywhere."""

    head = "reward"

    def __init__(self, config: ModelConfig, kernel: type):
        super().__init__(config, kernel)
        self.score = nn.Linear(config.dim, 1, bias=False)
        self.loss_settings = losses.LossSettings()  # `load` puts the run's own here

    def rewards(self, row: MicroBatch) -> Tensor:
        """The rewards of the row's replies, in order: (R,) fp32."""
        return self._rewards(row)[0]

    def forward(self, row: MicroBatch) -> Sums:
        """Over the row's prompts, all () fp32: `loss`, `accuracy` and `margin` as in `losses.agreement`, `count`."""
        rewards, hidden = self._rewards(row)
        table = rewards[row.replies]  # (N, K)
        loss = losses.preference(table, row.grade, row.label, row.margin, self.loss_settings)
        accuracy, margin = losses.agreement(losses.compare(table, row.grade, row.label))
        return {
            "loss": loss.sum() + _nothing(hidden),
            "accuracy": accuracy.sum(),
            "margin": margin.sum(),
            "count": loss.new_tensor(len(loss)),
        }

    def _rewards(self, row: MicroBatch) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(row.tokens, row.position, row.segments, row.last)  # (R, D)
        return self.score(hidden.float())[:, 0], hidden

    @staticmethod
    def count(work: StepBatches) -> int:
        """What a step's sums are divided by."""
        return work.examples


def _nothing(hidden: Tensor) -> Tensor:
    """Zero, with a graph through every layer: a rank whose row is empty still meets the others in the backward."""
    return hidden[:1].float().sum() * 0
