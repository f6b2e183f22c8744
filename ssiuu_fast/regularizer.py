"""The Ssiuu penalty in anybody's training loop."""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from torch import Tensor, nn

from ssiuu_fast.agreement import Agreement
from ssiuu_fast.calibration import Calibration
from ssiuu_fast.neuron_grain import NeuronGrain
from ssiuu_fast.neuron_step import NeuronStep
from ssiuu_fast.parameter_grain import ParameterGrain, ParameterStep
from ssiuu_fast.references import StateDtype, refuse_damaged, required, state_dtype_name
from ssiuu_fast.regularizer_options import refuse_options
from ssiuu_fast.share import ShareWatch
from ssiuu_fast.step import MicroBatch, NonfiniteWatch, StepStatistics, gradient_norm, norm_of_all
from ssiuu_fast.targets import check_log_probs, reference_item, target_sum
from ssiuu_fast.warn import warn_user

STATE_VERSION = 1
# METHOD, open point 5: where to start
STARTING_RELATIVE_WEIGHT = 30.0


class SSIUURegularizer:
    """Penalises the growth of suppressing attributions while a model unlearns (Ssiuu, Algorithm 1).

    With g_i = ∂/∂φ_i Σ_s T_s over the forget samples s of a step and A_i = φ_i · g_i,

        R = Σ_{i: A_i < 0} (A_i − A_i^ref)²        ∂R/∂φ_i ≈ 2 · 1[A_i < 0] · (A_i − A_i^ref) · g_i

    and λ ∂R/∂φ is added to the `.grad` of the regularised parameters, and of no other:

        regularizer = SSIUURegularizer(model, relative_weight=30)
        for forget, retain in loader:
            log_probs = sequence_log_probs(model(**forget).logits, forget["labels"])
            loss = log_probs.sum() / answer_tokens                     # −NLL of the forget set
            regularizer.backward(log_probs, loss=loss)                 # in place of loss.backward()
            retain_loss(model, retain).backward()
            regularizer.after_backward()                               # only with relative_weight
            optimizer.step(); optimizer.zero_grad()

    model_or_named_parameters: a model, or pairs of name and parameter. Build it after wrapping and freezing.
    weight: λ. The paper's 1e-4 … 1e-3 has no scale of its own: on another model prefer relative_weight.
    relative_weight: r; λ = r · median of ‖∇L‖ / ‖∂R/∂φ‖ over the first 4 regularised steps with R > 0, in which
        nothing is added. Call `after_backward` in every step. Neurons: ∂R/∂φ over all parameters that require grad,
        from the second step on, by one more backward pass in each of these steps.
    target: T_s from the log-probability ℓ_s of answer s with n_s tokens: "probability" exp(ℓ_s) (the paper),
        "log_probability" ℓ_s, "mean_token_probability" exp(ℓ_s / n_s).
    granularity: "parameter", as above, or "neuron": i is an output of a linear module, frozen or not. With its value
        h and g = ∂T/∂h, both [samples, tokens, neurons], A sums h·g over the tokens and, with "previous", the samples.
        2λ · 1[A < 0] · (A − A^ref) · g is added to the gradient at h while the loss is sent back, which must come from
        the same forward pass as log_probs; from h it flows on to all that lies below. The next backward pass through
        the graph is taken to be the loss's: no other, like autograd.grad(loss, embeddings), may come between the two;
        other regularisers may. Needs the model. Until then one tensor of each such output is kept, and frozen layers
        below build a graph too. A module outside a step's graph has A = 0; its "initial" references stay.
    reference: "previous", A of the step before (Algorithm 1), or "initial", A at the starting weights
        (`set_reference`; without it, the first step's). Neurons have their "initial" reference by sample. Of fresh LoRA
        (B = 0) every attribution is 0, and so is every "initial" reference.
    one_sided: penalise only A below its reference.
    every: regularise each k-th step, with k·λ; the others do no pass.
    parameters: glob patterns over parameter names; None takes the weights of the linear modules inside the blocks.
        Neurons: those of the linear modules whose weights match, or of all inside the blocks. Of LoRA these are A and
        B, whichever adapter is trained, and the outputs of whole adapted modules (selection.py).
    state_dtype: what the references are stored in, torch.float32, torch.bfloat16 or "8bit" (1.016 bytes an element,
        `ops.Blockwise8`); None takes the parameter's dtype (fp32 for fp16). Warns once, naming torch.float32, where
        attributions change less from step to step than few bits can show (`last_step.relative_change`). Of no use for
        neurons, whose references are small.
    offload: keep the references in host memory. On the device are then four times the largest, or 32 MiB if that is
        more, and copies run beside the backward pass. Gradients and references have the same bits; R, which two
        backward passes then sum in parts, may differ in the last bit of fp64. Refused for neurons, and under FSDP2.
    nonfinite: elements with a non-finite attribution add nothing and keep their reference; "raise" then raises
        FloatingPointError with the names of the parameters or modules (on a GPU at the next `backward`,
        `last_step` or `state_dict`, when the step was probably taken), "count" only counts them.
    process_group: the ranks whose samples are one batch; None is DistributedDataParallel's own group, the mesh of
        `fully_shard`, or else the default group.
    backend: see `ssiuu_fast.ops.penalty_` and `ssiuu_fast.ops.neuron_penalty`.

    Several processes: give the model in DistributedDataParallel, or to which fully_shard was applied. g is the sum over
    all ranks' samples, and the penalty added is equal on every rank (under FSDP2 on its shards): the mean over ranks
    that both make of the loss's gradient leaves it as it is. A plain model works too, where the loop averages `.grad`
    over the ranks; were it to sum, the penalty would count once a rank. Every rank calls `backward` in every step, with
    one sample at least; an error of one is raised on all before anything is changed. In one backward pass with the loss
    the sums of g run beside it, where all ranks come to their parameters in the same order and DDP has no hook of its
    own for communication; else after it. Under FSDP2 gradient sync stays on and every rank has as many micro-batches.
    `last_step`, λ and R are those of all ranks, the same on each.

    Neurons in several processes: attributions of the batch are summed over the ranks, those of a sample are known to
    all, so that it may come to any rank. Each rank's loss carries its own part of the penalty, times what the loop
    divides by. Under FSDP2 relative_weight and CPU offload are refused, and gradient sync may be off.

    Raises ValueError for options that make no sense, for models wrapped in a way it can't work in (engines.py) and
    where nothing is selected.
    """

    def __init__(
        self,
        model_or_named_parameters: nn.Module | Iterable[tuple[str, nn.Parameter]],
        weight: float = 1e-3,
        *,
        relative_weight: float | None = None,
        target: str = "probability",
        granularity: str = "parameter",
        reference: str = "previous",
        one_sided: bool = False,
        every: int = 1,
        parameters: Iterable[str] | None = None,
        state_dtype: StateDtype = None,
        offload: bool = False,
        nonfinite: str = "raise",
        process_group=None,
        backend: str = "auto",
    ):
        refuse_options(
            target=target,
            granularity=granularity,
            reference=reference,
            nonfinite=nonfinite,
            state_dtype=state_dtype,
            offload=offload,
            every=every,
            weight=weight,
            relative_weight=relative_weight,
        )
        common = {
            "reference": reference,
            "one_sided": one_sided,
            "backend": backend,
            "process_group": process_group,
        }
        self._grain = (
            NeuronGrain(model_or_named_parameters, parameters, calibrated=relative_weight is not None, **common)
            if granularity == "neuron"
            else ParameterGrain(
                model_or_named_parameters, parameters, state_dtype=state_dtype, offload=offload, **common
            )
        )

        self.target = target
        self.granularity = granularity
        self.reference = reference
        self.one_sided = one_sided
        self.every = every
        self.relative_weight = relative_weight
        self._literal_weight = weight if relative_weight is None else None
        self._state_dtype = state_dtype
        self._raise_nonfinite = nonfinite == "raise"
        self._warned_of_absent = False
        self._roads_told: set[str] = set()
        # how the last micro-batch given with its loss was sent back: "one backward", or "two backwards" and the reason;
        # and in one, how many of its rows had a part in g
        self.road = ""
        self.kept_rows: int | None = None
        self._start(step=0, weight=self._literal_weight, ratios=[])

    def backward(
        self,
        log_probs: Tensor,
        *,
        last: bool = True,
        scale: float = 1.0,
        token_counts: Tensor | None = None,
        sample_ids: Tensor | None = None,
        loss: Tensor | None = None,
    ) -> Tensor:
        """Adds scale · λ · ∂R/∂φ to `.grad`; call it on the live graph, before this micro-batch's loss.backward().

        At neuron granularity loss.backward() itself adds it, and `.grad` is untouched here.

        With `loss` it also does loss.backward(), in the same pass where it can: don't call that yourself. The numbers
        are those of two passes, in another order of sums; the cost is one weight-gradient product on the rows with a
        part in the target. Rows whose ∂T/∂ℓ is under 1.2e-38 (shared_backward.NEGLIGIBLE) are skipped: their A is taken
        for 0. Where ∂T/∂ℓ ÷ ∂loss/∂ℓ is the same for all rows, or there is one, it costs a scaling. The host waits once
        for two numbers a sample. Where one pass can't do it takes two: `road` says why, and so does this package's log,
        once.

        log_probs: [B] log-probabilities of the answers (`sequence_log_probs`); their graph is kept.
        last: False for the earlier micro-batches of a step: their gradient is only summed (one buffer of model
            size) and `.grad` is untouched. Neurons: refused with reference="previous", whose attributions need the
            whole batch; with "initial" each micro-batch has its own penalty, and R is their sum.
        scale: the factor on the caller's loss (GradScaler.get_scale()), the same in all micro-batches of a step. A, R
            and the references don't depend on it.
        token_counts: [B] answer tokens, for target="mean_token_probability".
        sample_ids: [B] whole numbers that name the samples, for neurons with reference="initial"; else of no use. Keep
            them on the CPU: the host has to know them, and would wait for a GPU.
        loss: a scalar, times `scale`, of the same forward pass. In one pass it must depend on the regularised
            parameters by way of one `sequence_log_probs` only, of which log_probs may be some rows: forget and retain
            rows may share a forward pass. Samples must not mix, and modules be given [samples, tokens, features] in the
            order of the log-probs, as models of transformers do. Hooks inside the model that change gradients in
            another way than by a factor (clipping them, say), and GPU streams of its modules' own, aren't seen: send
            the loss back yourself.

        Returns R of the whole batch, a scalar; 0 where last is False and in steps that `every` leaves out. Raises
        ValueError for an empty batch or log-probs that aren't numbers (on a GPU, which isn't waited for, those show as
        non-finite attributions), RuntimeError where the graph can't give the gradient, FloatingPointError as
        `nonfinite` says (at parameter grain the finite part was then added: don't take the step).
        A call that raises abandons the step (`abandon_step`); where that is in the loss's own pass, some references may
        be today's already. Of neurons, a micro-batch whose loss was sent back before
        keeps its penalty in `.grad`. After an error of your own between micro-batches, call abandon_step yourself.
        """
        try:
            with self.agreement.errors_together():
                penalty, sent_back = self._backward(log_probs, last, scale, token_counts, sample_ids, loss)
            if loss is not None and not sent_back:
                loss.backward()
            return penalty
        except BaseException:
            self._open_step = None
            self._grain.abandon()
            raise

    def _backward(
        self,
        log_probs: Tensor,
        last: bool,
        scale: float,
        token_counts: Tensor | None,
        sample_ids: Tensor | None,
        loss: Tensor | None,
    ) -> tuple[Tensor, bool]:
        """R, and whether the loss was sent back."""
        self.road, self.kept_rows = "", None
        self._check_nonfinite()
        check_log_probs(log_probs, self.target, token_counts)
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be a finite number above 0, got {scale!r}")
        sample_ids = self._grain.sample_numbers(len(log_probs), sample_ids, last)
        self._skipped = self._step % self.every != 0
        if self._skipped:
            self.agreement.pass_by(last)
            self._step += last
            return log_probs.new_zeros(()), False
        if self._awaiting_after_backward:
            raise RuntimeError(
                "after_backward() was not called in the last step: with relative_weight, call it in every step after "
                "the last loss.backward(), before clipping; or abandon_step(), where a step is given up"
            )
        step = self._open_step or self._grain.begin(scale, None if self.weight is None else self.weight * self.every)
        if scale != step.scale:
            raise ValueError(f"scale changed within a step, from {step.scale} to {scale}")
        target, underflows = target_sum(log_probs, self.target, token_counts)
        sent_back = step.add(MicroBatch(target, len(log_probs), underflows, sample_ids, last, loss))
        if loss is not None:
            self._tell_road(step.road)
            self.kept_rows = step.kept_rows
        if not last:
            self._open_step = step
            return log_probs.new_zeros(()), sent_back
        self._open_step = None
        return self._finish(step), sent_back

    def abandon_step(self) -> None:
        """Gives up the step that is under way, for loops that catch errors and go on with the next batch.

        Without it the micro-batches given so far would be summed with those of the next step. What they would still add
        to a loss's backward pass isn't added any more, and after_backward isn't waited for. What was added to `.grad`
        stays there: clear it as ever. Does nothing between two steps.
        """
        self._open_step = None
        self._awaiting_after_backward = False
        self._grain.abandon()

    def set_reference(self, log_prob_batches: Iterable[Tensor | tuple]) -> None:
        """reference="initial": takes A_ref = φ · (b/n) · Σ_s ∂T_s/∂φ over the forget set at the starting weights.

        log_prob_batches: one pass over the forget set; each item a [B] tensor of live log-probs, or with
        target="mean_token_probability" a pair (log_probs, token_counts). Each graph is freed after use. n is the
        number of samples seen, b the number of samples of the first regularised step.

        At neuron granularity A_ref is that of each sample, an item is (log_probs, token_counts or None, sample_ids)
        and `backward` then refuses samples that weren't in the pass. That is a number a neuron and sample, beside the
        weights: 3.1 MB a sample for Llama-3.2-3B.
        """
        if self.reference != "initial":
            raise ValueError(
                "set_reference is for reference='initial'; this regulariser compares with the previous step"
            )
        if self._step:
            raise RuntimeError(f"set_reference comes before the first step; {self._step} steps were taken")
        with self.agreement.errors_together():
            self._grain.set_reference(self._reference_targets(log_prob_batches))

    def _reference_targets(self, log_prob_batches: Iterable) -> Iterator[MicroBatch]:
        for item in log_prob_batches:
            log_probs, token_counts, sample_ids = reference_item(item)
            check_log_probs(log_probs, self.target, token_counts)
            sample_ids = self._grain.sample_numbers(len(log_probs), sample_ids, True)
            target, underflows = target_sum(log_probs, self.target, token_counts)
            yield MicroBatch(target, len(log_probs), underflows, sample_ids)

    def after_backward(self, scale: float = 1.0) -> None:
        """Measures ‖∇L‖ over the regularised parameters until λ is fixed; then does nothing. relative_weight only.

        Once a step and on every rank, after the last loss.backward() and, where the loop itself averages `.grad` over
        the ranks (a plain model), after that; before clipping. scale: as given to `backward`.

        Raises ValueError, on all ranks, where their gradients differ.
        """
        if self.relative_weight is None:
            raise RuntimeError("after_backward is only for relative_weight: a literal weight needs no measuring")
        if not self._awaiting_after_backward:
            return
        self._awaiting_after_backward = False
        self._grain.settle()
        if self._step == 1 and self._grain.starts_at_its_reference:
            # what differs is rounding
            return
        last = self._last_step
        norm = gradient_norm(self.regularized_parameters, self._grain.shards)
        loss_norm = norm_of_all(norm, self.agreement.ranks) / scale
        self._calibration.see(last.penalty, last.penalty_gradient_norm, loss_norm)
        self.weight = self._calibration.weight()
        if self.weight is not None and not self._grain.knows_share:
            self._share_watch.judge(self.every * self._calibration.share())

    def penalty_share(self, gradient_norm: float) -> float | None:
        """‖every · λ ∂R/∂φ‖ ÷ gradient_norm in this step, for the log; 0 in steps without a penalty.

        None where it isn't known: at neuron granularity once λ is fixed (StepStatistics.penalty_gradient_norm).

        gradient_norm: the norm of the step's whole gradient at scale 1, as clip_grad_norm_ returns it. Warns once, in
        plain words, where the penalty has been too small to matter over its first 10 steps. Neurons: by the steps
        that relative_weight is calibrated in, when λ is fixed; with a literal weight nothing is known to warn of, not
        even that 16-bit gradients swallow the penalty.
        """
        if self._skipped or self._last_step is None or not gradient_norm > 0:
            return 0.0
        added = self.last_step.added_norm
        if added is None:
            return None
        share = added / gradient_norm
        if self.weight is not None:
            self._share_watch.see(share)
        return share

    @property
    def agreement(self) -> Agreement:
        """What the ranks tell each other before a step changes anything."""
        return self._grain.agreement

    @property
    def step_was_skipped(self) -> bool:
        """Whether `every` left the last step out."""
        return self._skipped

    @property
    def last_step(self) -> StepStatistics | None:
        """Statistics of the last regularised step; None before the first."""
        self._check_nonfinite()
        return self._last_step

    @property
    def parameter_names(self) -> list[str]:
        """Names of the regularised parameters; for neurons, of all that require grad: the penalty may reach them."""
        return list(self._grain.names)

    @property
    def regularized_parameters(self) -> list[nn.Parameter]:
        """The regularised parameters, in the order of their names."""
        return self._grain.parameters

    def state_dict(self) -> dict:
        """Everything a resumed run needs: numbers, strings and tensors (one reference a parameter).

        The tensors are the live ones: save or clone them before the next step. Under FSDP2 they are this rank's shards
        and "places" says where they lie; `save_regularizer` puts them into files that any number of ranks can load.
        """
        self._check_nonfinite()
        if self._open_step is not None:
            raise RuntimeError(
                "state_dict was asked for between the micro-batches of a step: save after the step, or call "
                "abandon_step() first if it was given up"
            )
        self._grain.settle()
        return {
            "version": STATE_VERSION,
            "settings": self._settings(),
            "step": self._step,
            "weight": self.weight,
            "ratios": [] if self._calibration is None else list(self._calibration.ratios),
            **self._grain.state_dict(),
        }

    def places(self) -> dict[str, dict[str, list[int]]] | None:
        """Where this rank's shard of each parameter lies, as `state_dict` says under "places"; None for whole ones."""
        return self._grain.places() if self.granularity == "parameter" else None

    def load_state_dict(self, state: dict) -> None:
        """Takes up a saved state. One of other settings or parameters raises ValueError and changes nothing."""
        self.prepared(state)()

    def prepared(self, state: dict) -> Callable[[], None]:
        """load_state_dict in two parts, for ranks that first see that all can: this one checks, its result takes up."""
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"state version {state.get('version')!r} can't be read: this package writes {STATE_VERSION}"
            )
        refuse_damaged(state)
        settings = required(state, "settings")
        for name, ours in self._settings().items():
            saved = settings.get(name)
            if saved != ours:
                raise ValueError(f"the saved state has {name}={saved!r}, this regulariser {name}={ours!r}")
        step, weight, ratios = (required(state, key) for key in ("step", "weight", "ratios"))
        whole = self.granularity == "parameter"
        of_grain = self._grain.prepared(state) if whole else partial(self._grain.load_state_dict, state)

        def take_up() -> None:
            of_grain()
            self._start(step, weight, ratios)

        return take_up

    def _start(self, step: int, weight: float | None, ratios: list[float]) -> None:
        """Between two steps, at the beginning or where a saved run was left."""
        # λ; None until it is calibrated
        self.weight: float | None = weight
        self._step = step
        self._calibration = None if self.relative_weight is None else Calibration(self.relative_weight, ratios)
        self._awaiting_after_backward = False
        # begun and waiting for more micro-batches
        self._open_step: ParameterStep | NeuronStep | None = None
        self._skipped = False
        self._share_watch = ShareWatch(self.regularized_parameters)
        self._last_step: StepStatistics | None = None
        self._nonfinite = NonfiniteWatch()

    def _settings(self) -> dict:
        return {
            "target": self.target,
            "granularity": self.granularity,
            "reference": self.reference,
            "one_sided": self.one_sided,
            "every": self.every,
            "weight": self._literal_weight,
            "relative_weight": self.relative_weight,
            "state_dtype": state_dtype_name(self._state_dtype),
        }

    def _finish(self, step: ParameterStep | NeuronStep) -> Tensor:
        calibrating = self.weight is None
        result = step.finish()
        self._warn_of_absent(result.absent)
        self._last_step = StepStatistics(result, 0.0 if calibrating else self.weight, self.every)
        self._step += 1
        self._awaiting_after_backward = calibrating
        if self._raise_nonfinite:
            self._nonfinite.expect(result.names, result.nonfinite_counts)
        if result.nonfinite_counts.device.type == "cpu":
            self._check_nonfinite()
        return result.penalty

    def _tell_road(self, road: str) -> None:
        self.road = road
        if road not in self._roads_told:
            self._roads_told.add(road)
            logging.getLogger(__name__).info("%s", road)

    def _check_nonfinite(self) -> None:
        try:
            self._nonfinite.check()
        except FloatingPointError:
            # the step is not to be taken, so nobody will call it, or send its loss back
            self._awaiting_after_backward = False
            self._grain.abandon()
            raise

    def _warn_of_absent(self, absent: list[str]) -> None:
        if absent and not self._warned_of_absent:
            self._warned_of_absent = True
            warn_user(
                f"{absent[0]} is not in this step's graph, and so has no attribution and no penalty in it; the same of "
                f"{len(absent) - 1} others. This is said once, and `last_step.absent` counts them"
            )
