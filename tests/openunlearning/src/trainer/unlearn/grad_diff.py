from torch.utils.data import SequentialSampler
from transformers import Trainer


class GradDiff(Trainer):
    """gamma · (−NLL of the forget rows) + alpha · NLL of the retain rows, both forward passes before one backward."""

    def __init__(self, gamma=1.0, alpha=1.0, retain_loss_type="NLL", *args, evaluators, template_args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma = gamma
        self.alpha = alpha

    def _get_train_sampler(self, *args):
        # so that a test knows the order
        return SequentialSampler(self.train_dataset)

    def forget_loss(self, model, rows):
        outputs = model(**rows)
        return -outputs.loss, outputs

    # num_items_in_batch: what the transformers of today hands over, unlike that of its pinned version
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        forget_loss, forget_outputs = self.forget_loss(model, inputs["forget"])
        loss = self.gamma * forget_loss + self.alpha * model(**inputs["retain"]).loss
        return (loss, forget_outputs) if return_outputs else loss
