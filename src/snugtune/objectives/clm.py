"""Causal language modelling: continued pre-training on plain text, of which every token is learned."""

from typing import Literal

from snugtune.data.documents import tokenise_documents
from snugtune.objectives.sft import Sft
from snugtune.schema import Config


class ClmConfig(Config):
    """Maximise the likelihood of whole documents."""

    type: Literal["clm"] = "clm"


class Clm(Sft):
    """As `Sft`, over documents."""

    tokenise = staticmethod(tokenise_documents)
