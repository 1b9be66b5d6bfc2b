"""trl's DPOTrainer as a contender: its own `train()`, with its defaults but for what both sides share.

Shared are the token ids and their order, the base's dtype and quantization, the adapter, the optimizer's numbers and
checkpointing. The data loader, the collator, gradient accumulation, the reference (the adapter switched off), the
loss, clipping, AdamW (fused, trl's default) and logging are trl's.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.contender import Gate, Work, share_adapter
from benchmarks.settings import recipe_of
from sampo_cli.config import Recipe
from sampo_cli.model import pick_device, pick_dtype


class TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer on pairs that are token ids already, and that counts positions and measures its reference pass."""

    gate: Gate
    positions = 0

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self.gate.settle(self.model.parameters())
        with self.gate.preparing("reference"):
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        self.positions += inputs["input_ids"].numel()
        return super().training_step(model, inputs, *rest)


class Turns(TrainerCallback):
    """Waits for its turn before each step, and reports the step at its end, when its loss is logged."""

    def __init__(self, trainer: TokenizedDPOTrainer) -> None:
        self.trainer, self.gate = trainer, trainer.gate

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._open()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.gate.close(logs["loss"], self.trainer.positions)
            if state.global_step < state.max_steps:
                self._open()
            else:
                self.gate.end()

    def _open(self) -> None:
        self.gate.open()
        self.trainer.positions = 0


def run(work: Work, connection: Connection) -> None:
    """Load a model as trl's users do and let `train()` take the work's steps."""
    recipe = recipe_of(work.settings, work.variant)
    device = pick_device()
    gate = TokenizedDPOTrainer.gate = Gate(connection, device)
    rows = [
        {"prompt_ids": pair.prompt.tolist(), "chosen_ids": pair.chosen.tolist(), "rejected_ids": pair.rejected.tolist()}
        for pair in work.pairs
    ]
    trainer = TokenizedDPOTrainer(
        load_model(recipe, device),
        args=config_of(work, recipe, device),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work.settings.model),
        peft_config=lora_config(recipe),
    )
    share_adapter(trainer.model, work.adapter)
    # Steps repeat pairs, epoch after epoch: the same order as ours, which a sampler of trl's own would not give.
    trainer.train_dataset = trainer.train_dataset.select([index for _, step in work.order for index in step])
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Turns(trainer))
    if not work.settings.trl_precompute:
        gate.settle(trainer.model.parameters())
    dtype = str(pick_dtype(recipe.model.dtype, device)).removeprefix("torch.")
    gate.ready({"dtype": dtype, "cached": work.settings.trl_precompute})
    trainer.train()


def load_model(recipe: Recipe, device: Any) -> Any:
    dtype = pick_dtype(recipe.model.dtype, device)
    quantization = {
        "none": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    }[recipe.model.quantization]
    options = {"quantization_config": quantization} if quantization else {}
    return AutoModelForCausalLM.from_pretrained(recipe.model.name, dtype=dtype, device_map={"": device}, **options)


def lora_config(recipe: Recipe) -> Any:
    from peft import LoraConfig

    lora = recipe.lora
    return LoraConfig(
        task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets
    )


def config_of(work: Work, recipe: Recipe, device: Any) -> DPOConfig:
    """trl's settings: everything that is not written here is trl's default."""
    settings, train = work.settings, recipe.train
    dtype = str(pick_dtype(recipe.model.dtype, device)).removeprefix("torch.")
    return DPOConfig(
        output_dir=str(work.folder),
        beta=settings.opponent_beta or recipe.method.beta,
        max_length=settings.max_length,
        per_device_train_batch_size=settings.pairs_per_microbatch,
        gradient_accumulation_steps=settings.pairs_per_step // settings.pairs_per_microbatch,
        max_steps=len(work.order),
        train_sampling_strategy="sequential",
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        gradient_checkpointing=train.checkpointing != "none",
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=device.type == "cpu",
        precompute_ref_log_probs=settings.trl_precompute,
        precompute_ref_batch_size=settings.pairs_per_microbatch,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=settings.seed,
    )
