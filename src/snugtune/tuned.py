"""What a run trained, ready to answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from snugtune.data.forms import Message, Unusable, read_messages
from snugtune.data.render import Renderer
from snugtune.errors import InputError
from snugtune.folder import locate
from snugtune.memory.plan import Kept, plan_for_answers
from snugtune.methods.adapter_folder import UNSTAMPED, is_stamped
from snugtune.methods.lora import Lora
from snugtune.model.base import Base, load_base
from snugtune.model.generate import Sampling, generate
from snugtune.model.load import load_config, stored_width
from snugtune.model.source import Say, find_model, mute
from snugtune.types import NARROW

Conversation = str | Sequence[Mapping[str, str]]
"""A question, or messages of {role, content}."""


@dataclass(frozen=True)
class Tuned:
    """A base with one adapter (or fully tuned), ready to answer."""

    base: Base
    job: str | None  # None: the base's own weights were tuned
    renderer: Renderer

    def reply(
        self,
        conversation: Conversation,
        sampling: Sampling | None = None,
        on_text: Callable[[str], None] | None = None,
        **how: Any,
    ) -> str:
        """Answer a question, or a conversation of {role, content}. `how` sets fields of `Sampling`."""
        return self.replies([conversation], replace(sampling or Sampling(), **how), on_text)[0]

    def replies(
        self, conversations: Sequence[Conversation], sampling: Sampling, on_text: Callable[[str], None] | None = None
    ) -> list[str]:
        """Answer several conversations together. Raises `InputError` for one that the chat template refuses."""
        try:
            prompts = [self.renderer.prompt(_messages(conversation)) for conversation in conversations]
        except TemplateError as error:
            raise InputError(f"the chat template of '{self.base.name}' cannot render this conversation: {error}") from error
        return generate(self.base, self.job, prompts, self.renderer.stop_ids, sampling, on_text)


def _messages(conversation: Conversation) -> tuple[Message, ...]:
    """The conversation, checked. Raises `InputError`."""
    messages = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
    try:
        return read_messages(list(messages) if isinstance(messages, tuple) else messages)
    except Unusable as error:
        why = str(error).removeprefix("records ")
        raise InputError(f"cannot answer a conversation {why}; give a question, or messages of role and content") from error


def load(
    path: Path, adapter: str | None = None, say: Say = mute, trust_remote_code: bool = False, weights: str = "auto"
) -> Tuned:
    """Load a run folder (`adapter` picks a job), a PEFT adapter folder, or a model folder. Raises `InputError`.

    `weights`: the format of the base's; "auto" is that of the run, else of the checkpoint, else the one native to the device.
    What is peculiar about the base was said when a run trained on it: `say` hears it again only of what comes from elsewhere.
    """
    found = locate(path, adapter)
    found.check_trust(trust_remote_code)
    base = _load_base(found.model, found.kept, weights, say, trust_remote_code)
    job = None
    if found.adapter is not None:
        job = found.adapter.name
        Lora().load(base, job, found.adapter)
    trained_here = found.origin != found.model if found.adapter is None else is_stamped(found.adapter)
    for note in () if trained_here else base.notes:
        say(f"model: {note}")
    if found.adapter is not None and not trained_here:
        say(UNSTAMPED)
    return Tuned(base, job, Renderer(base.tokenizer))


def _load_base(model: str, kept: Kept, weights: str, say: Say, trust_remote_code: bool) -> Base:
    """The base to answer with, its weights as asked for or as they were `kept` in training."""
    source = find_model(model, say)
    stored = stored_width(source, load_config(source, trust_remote_code))
    plan, why = plan_for_answers(stored, weights, kept)
    if plan.weights in NARROW or plan.offload != "none" or weights != "auto":
        say(f"model: weights {plan.weights} ({why})")
    return load_base(source, plan, trust_remote_code)


def load_untuned(
    tuned: Tuned,
    path: Path,
    adapter: str | None = None,
    say: Say = mute,
    trust_remote_code: bool = False,
    weights: str = "auto",
) -> Tuned:
    """What `tuned` (loaded from `path`) was before: the same weights without the adapter, else the original base beside it."""
    if tuned.job is not None:
        return replace(tuned, job=None)
    found = locate(path, adapter)
    if found.origin == found.model:
        raise InputError(f"--compare: {path} does not say which model it came from; compare in the run that made it")
    found.check_trust(trust_remote_code)
    say(f"model: two in memory, the tuned one and '{found.origin}'")
    base = _load_base(found.origin, Kept(), weights, say, trust_remote_code)
    return Tuned(base, None, Renderer(base.tokenizer))
