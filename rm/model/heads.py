"""The two models that are trained: a Transformer with a head takes a micro-batch and returns sums.

Sums are never means: `loss`, the other metrics, and the `count` that all of them are to be divided by, once, over the
whole global batch. So neither the gradient nor a metric depends on micro-batches, ranks or packing.

Shapes: T tokens in a micro-batch, L labelled tokens, N prompts and R replies, K replies of the prompt that has most,
A outputs of a reward head, D width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from rm.data.batch import MicroBatch, StepBatches
from rm.model import losses
from rm.model.losses import LossSettings
from rm.model.transformer import ModelConfig, Transformer

Sums = dict[str, Tensor]


class _WithLMHead(Transformer):
    """A Transformer that may predict tokens; the LM head is the embedding where the model ties them."""

    predicts_tokens: bool
    labels: tuple[str, ...] = ()  # of a reward head's outputs
    reward_output: int | tuple[float, ...] | None = None

    def _make_lm_head(self) -> None:
        if not self.config.tie_embeddings:
            self.lm_head = nn.Linear(self.config.dim, self.config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, D)"""
        return self.embed.weight if self.config.tie_embeddings else self.lm_head.weight

    def _cross_entropy(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """The summed cross entropy of the labelled tokens: () fp32. `hidden`: (L, D)."""
        scale, softcap = self.config.logit_scale, self.config.logit_softcap
        return losses.linear_cross_entropy(hidden, self.head_weight, batch.targets, scale, softcap, batch.label_weights)


class LanguageModel(_WithLMHead):
    """Next-token prediction."""

    head = "lm"
    predicts_tokens = True
    evaluated = ("loss", "perplexity", "token_accuracy")  # what an evaluation can be the best in

    def __init__(self, config: ModelConfig, kernel: type):
        super().__init__(config, kernel)
        self._make_lm_head()

    def forward(self, batch: MicroBatch) -> Sums:
        """`loss`: summed cross entropy of the labelled tokens, () fp32; `count`: their number.

        In an evaluation also `token_accuracy`: to how many of them the model gives the highest probability.
        """
        hidden = self.hidden(batch.tokens, batch.position, batch.segments, batch.label_positions)  # (L, D)
        if not self.training:
            scale, softcap = self.config.logit_scale, self.config.logit_softcap
            loss, hits = losses.cross_entropy_and_hits(hidden, self.head_weight, batch.targets, scale, softcap)
            return {"loss": loss, "token_accuracy": hits, "count": loss.new_full((), len(batch.targets))}
        loss = self._cross_entropy(hidden, batch)
        return {"loss": loss + _zero_with_grad(hidden), "count": loss.new_full((), len(batch.targets))}

    @staticmethod
    def count(batches: StepBatches) -> int:
        """What the sums of a step are divided by: its labelled tokens."""
        return batches.num_labels


def _linear_score(dim: int, outputs: int) -> nn.Module:
    return nn.Linear(dim, outputs, bias=False)


def _score_of_two_layers(dim: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, outputs))


COMPARISONS = ("reply_table", "grade", "label", "margin", "weight", "strength")  # of a micro-batch, which losses take
SCORES = {"linear": _linear_score, "two layers": _score_of_two_layers}


class RewardModel(_WithLMHead):
    """One number for each reply: an fp32 head on the hidden state of its last token.

    There are no logits anywhere but in training with an SFT loss, for which it has an LM head as well.

    Attributes:
        labels: the names of the head's outputs, as `id2label` in config.json has them.
        reward_output: which output of a head that has several in the folder is the reward, from 0, or the weights of
            all outputs, whose sum is the reward; None: the head has one.
    """

    head = "reward"
    evaluated = ("loss", "accuracy", "margin")  # what an evaluation can be the best in
    labels: tuple[str, ...] = ("LABEL_0",)
    fp32_modules = ("score",)
    training_modules = ("lm_head",)
    forward_methods = ("rewards",)

    def __init__(self, config: ModelConfig, kernel: type, loss: LossSettings = LossSettings()):  # noqa: B008
        super().__init__(config, kernel)
        self.score = SCORES[config.score](config.dim, len(loss.attributes) or 1)
        self.predicts_tokens = loss.has_sft_loss
        if self.predicts_tokens:
            self._make_lm_head()
        self.loss = loss

    def rewards(self, batch: MicroBatch) -> Tensor:
        """The rewards of the micro-batch's replies, in order: (R,) fp32."""
        return self._outputs_and_hidden(batch, batch.reply_end)[0][:, 0]

    def forward(self, batch: MicroBatch) -> Sums:
        """Summed over prompts, all () fp32: `loss`, `accuracy` and `margin` as in `losses.agreement`, `count`.

        In a training with an SFT loss also `sft_loss`, which the loss includes; its positions are part of the one
        forward.
        """
        n, has_sft_loss = len(batch.reply_end), self.training and self.loss.has_sft_loss
        positions = torch.cat([batch.reply_end, batch.label_positions]) if has_sft_loss else batch.reply_end
        outputs, hidden = self._outputs_and_hidden(batch, positions)
        loss, pairs = self._loss_and_pairs(outputs[:, 0], **{name: getattr(batch, name) for name in COMPARISONS})
        accuracy, margin = losses.agreement(pairs)
        sums = {
            "loss": loss.sum() + _zero_with_grad(hidden),
            "accuracy": accuracy.sum(),
            "margin": margin.sum(),
            "count": loss.new_full((), len(loss)),
        }
        if has_sft_loss:
            sums["sft_loss"] = self._cross_entropy(hidden[n:], batch)
            sums["loss"] = sums["loss"] + self.loss.sft_loss_coefficient * sums["sft_loss"]
        return sums

    def measures(self, rewards: Tensor, **tables: Tensor) -> dict[str, Tensor]:
        """What an evaluation makes of rewards: loss, accuracy, margin, rewards of chosen and rejected, (N,) each.

        Args:
            rewards: (R,)
            tables: COMPARISONS, as in `rm.data.batch.MicroBatch`.
        """
        loss, pairs = self._loss_and_pairs(rewards, **tables)
        accuracy, margin = losses.agreement(pairs)
        chosen, rejected = losses.rewards_of_sides(pairs)
        return {
            "loss": loss, "accuracy": accuracy, "margin": margin, "reward_chosen": chosen, "reward_rejected": rejected,
        }  # fmt: skip

    def _loss_and_pairs(
        self,
        rewards: Tensor,
        reply_table: Tensor,
        grade: Tensor,
        label: Tensor,
        margin: Tensor,
        weight: Tensor,
        strength: Tensor,
    ) -> tuple[Tensor, losses.Pairs]:
        table = rewards[reply_table]  # (N, K)
        loss = losses.preference_loss(table, grade, label, margin, self.loss, weight, strength)
        return loss, losses.pairs_of(table, grade, label)

    def _outputs_and_hidden(self, batch: MicroBatch, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs, (R, A), and the hidden states at positions, of which the first R are those of the replies' ends."""
        hidden = self.hidden(batch.tokens, batch.position, batch.segments, positions)
        return self.score(hidden[: len(batch.reply_end)].float()), hidden

    @staticmethod
    def count(batches: StepBatches) -> int:
        """What the sums of a step are divided by: its prompts."""
        return batches.num_examples


class RegressionModel(RewardModel):
    """Several numbers for each reply, its attributes, learned by mean squared error: a reward model whose head has an
    output for each of them.
    """

    evaluated = ("loss",)

    def __init__(self, config: ModelConfig, kernel: type, loss: LossSettings):
        super().__init__(config, kernel, loss)
        self.labels = loss.attributes

    def rewards(self, batch: MicroBatch) -> Tensor:
        """The outputs for the micro-batch's replies, in order: (R, A) fp32."""
        return self._outputs_and_hidden(batch, batch.reply_end)[0]

    def forward(self, batch: MicroBatch) -> Sums:
        """`loss`: summed over texts, of which an example has one, the mean squared error of each; `count`: of texts."""
        outputs, hidden = self._outputs_and_hidden(batch, batch.reply_end)
        loss = losses.regression(outputs, batch.attributes) * batch.weight
        return {"loss": loss.sum() + _zero_with_grad(hidden), "count": loss.new_full((), len(loss))}


def reward_model(loss: LossSettings) -> type[RewardModel]:
    """The class that a loss trains."""
    return RegressionModel if loss.attributes else RewardModel


Model = LanguageModel | RewardModel


def _zero_with_grad(hidden: Tensor) -> Tensor:
    """A loss of zero that is connected to the embedding and every layer.

    An empty micro-batch has no other loss, and its backward has to issue the same collectives as the other ranks'.
    """
    return hidden[:1].float().sum() * 0
