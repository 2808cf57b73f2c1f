"""From conversations to tokens and loss weights, through the model's own chat template.

Only what the assistant says is trained, up to and including the end-of-turn token that generation stops at. The borders
are found by rendering prefixes of the conversation: what a turn adds to the text before it is that turn. Templates that
rewrite earlier turns (Qwen3 drops old thinking) have no common text; there each assistant turn becomes its own example.

What somebody says never becomes a control token (`marks`), and calls of tools come in the form that the template takes
(`calls`).
"""

from snugtune.data.render.examples import render_all
from snugtune.data.render.template import TRAINING_DATE, Messages, Renderer, Tools, TrainOn

__all__ = ["TRAINING_DATE", "Messages", "Renderer", "Tools", "TrainOn", "render_all"]
