from torch.nn.functional import logsigmoid
from trainer.unlearn.grad_diff import GradDiff

from ssiuu_fast import sequence_log_probs


class NPO(GradDiff):
    """With a reference of 0 for every row; like the real one it returns the outputs of (rows to prefer, to forget)."""

    def __init__(self, beta=1.0, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta = beta

    def forget_loss(self, model, rows):
        outputs = model(**rows)
        log_probs = sequence_log_probs(outputs.logits, rows["labels"])
        return -2 / self.beta * logsigmoid(-self.beta * log_probs).mean(), (None, outputs)
