"""What is left of a job that was trained: the folder of its adapter or model."""

from pathlib import Path

from snugtune.files import whole_folder
from snugtune.model.base import Base
from snugtune.training.job import Job
from snugtune.types import NARROW, Plan
from snugtune.words import counted


def save_artefact(folder: Path, base: Base, plan: Plan, job: Job) -> None:
    """Write a job's adapter or model folder, whole, with its model card and the tokenizer. Raises `StorageError`."""
    with whole_folder(folder) as made:
        job.attached.save(made)
        base.tokenizer.save_pretrained(made)
        (made / "README.md").write_text(_card(base, plan, job), encoding="utf-8")


def _card(base: Base, plan: Plan, job: Job) -> str:
    """A model card: where this comes from and how to load it."""
    c = job.config
    library = "peft" if c.method.type == "lora" else "transformers"
    data = f"{counted(c.batch_size, 'examples')}, {counted(len(job.data.train), 'training examples')}"
    about = (
        f"Fine-tuned from `{base.name}` with snugtune: method `{c.method.type}`, {counted(job.step, 'steps')} "
        f"{'driven by hand' if job.by_hand else f'of {data}'}, seed {c.seed}."
    )
    if plan.weights in NARROW:
        products = "int8" if plan.weights == "w8a8" else plan.compute
        about += f" The base's weights were kept in {plan.weights} meanwhile, and computed with in {products}."
    if c.keep_best and job.best is not None:
        about += f" The weights are those of step {job.best.step}, held-out loss {job.best.eval_loss:.4f}."
    head = ["---", f"base_model: {base.name}", f"library_name: {library}", "tags: [snugtune]", "---"]
    return "\n".join([*head, "", f"# {c.name}", "", about, "", f"Base fingerprint: `{base.fingerprint}`", ""])
