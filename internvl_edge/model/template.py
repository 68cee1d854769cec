"""The conversation format of each family of checkpoints, as data. `model.prompt` writes prompts with it.

Sources: the conversations `internvl2_5` (InternVL2.5, 3 and 3.5), `Hermes-2` and `internlm2-chat` (InternVL2) of the
original code; the chat template of native checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from internvl_edge.base.errors import CheckpointError


@dataclass(frozen=True)
class PromptTemplate:
    """The conversation format of one family of checkpoints: plain strings, stored in the bundle's manifest.

    `system` is the default system text; None means no system turn. `merges_unmarked_images` tells what happens to
    several images when the question has no `<image>` mark: True makes them share one run of image tokens (the
    original), False gives each its own run.
    """

    name: str
    system: str | None
    system_prefix: str
    user_prefix: str
    assistant_prefix: str
    turn_end: str
    image_start: str
    image_context: str
    image_end: str
    merges_unmarked_images: bool


_INTERNVL2_5 = PromptTemplate(
    name="internvl2_5",
    system=(
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    ),
    system_prefix="<|im_start|>system\n",
    user_prefix="<|im_start|>user\n",
    assistant_prefix="<|im_start|>assistant\n",
    turn_end="<|im_end|>\n",
    image_start="<img>",
    image_context="<IMG_CONTEXT>",
    image_end="</img>",
    merges_unmarked_images=True,
)
_NATIVE = replace(_INTERNVL2_5, name="internvl_native", system=None, merges_unmarked_images=False)
# InternVL2: no line end between turns.
_HERMES_2 = replace(
    _INTERNVL2_5,
    name="Hermes-2",
    system=(
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
    ),
    turn_end="<|im_end|>",
)
_INTERNLM2_CHAT = replace(_HERMES_2, name="internlm2-chat")
TEMPLATES = {template.name: template for template in (_INTERNVL2_5, _HERMES_2, _INTERNLM2_CHAT, _NATIVE)}


def template_for(name: str, system_message: str | None = None) -> PromptTemplate:
    """Return the template called `name`, with the checkpoint's own `system_message` where it has one.

    Raises:
        CheckpointError: no such template.
    """
    if name not in TEMPLATES:
        raise CheckpointError(f"prompt template is {name!r}, supported: {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    return template if system_message is None else replace(template, system=system_message)
