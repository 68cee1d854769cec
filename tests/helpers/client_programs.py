"""What real clients do to a server, run by the Python of their own environment: `client_programs.py NAME URL IMAGE`.

Prints one JSON object. This file imports nothing of the tests or the product.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

QUESTION = "What is the total?"


def _url(image: str) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(image).read_bytes()).decode()


def _content(image: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": _url(image)}}]


def snippet(url: str, image: str) -> Any:
    """The documented first use."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="none")
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id, messages=[{"role": "user", "content": _content(image)}]
    )
    return {"text": answer.choices[0].message.content, "usage": answer.usage.total_tokens}


def openai_stream(url: str, image: str) -> Any:
    import openai

    client = openai.OpenAI(base_url=url, api_key="none")
    texts, usage = [], None
    with client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": _content(image)}],
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        for chunk in stream:
            texts += [choice.delta.content or "" for choice in chunk.choices]
            usage = chunk.usage or usage
    return {"text": "".join(texts), "usage": usage.total_tokens if usage else None}


def openai_parse(url: str, image: str) -> Any:
    import openai
    from pydantic import BaseModel, Field

    class Receipt(BaseModel):
        total: str = Field(max_length=12)

    client = openai.OpenAI(base_url=url, api_key="none")
    parsed = client.chat.completions.parse(
        model="demo", messages=[{"role": "user", "content": _content(image)}], response_format=Receipt, max_tokens=200
    )
    message = parsed.choices[0].message.parsed
    return {"total": message.total if message else None}


def openai_options(url: str, image: str) -> Any:
    import openai

    client = openai.OpenAI(base_url=url, api_key="none")
    found = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Hello"}],
        n=2,
        seed=3,
        temperature=1.0,
        top_p=0.9,
        logprobs=True,
        top_logprobs=2,
        stop=["zz"],
        max_completion_tokens=5,
        user="me",
        extra_body={"top_k": 20},
    )
    return {"choices": len(found.choices), "logprobs": len(found.choices[0].logprobs.content)}


def openai_errors(url: str, image: str) -> Any:
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    found = {}
    cases: dict[str, dict[str, Any]] = {
        "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        "temperature": {"temperature": -1},
        "model": {"model": "gpt-4o"},
        "http": {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}],
                }
            ]
        },
    }
    for name, fields in cases.items():
        try:
            client.chat.completions.create(
                **{"model": "demo", "messages": [{"role": "user", "content": "Hello"}], **fields}
            )
        except openai.APIStatusError as error:
            found[name] = [type(error).__name__, error.param]
    return found


def openai_key(url: str, image: str) -> Any:
    import openai

    try:
        openai.OpenAI(base_url=url, api_key="wrong").models.list()
    except openai.AuthenticationError as error:
        return {"code": error.code}
    return {}


def langchain(url: str, image: str) -> Any:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=url, api_key="none", model="demo")
    asked = [{"role": "user", "content": _content(image)}]
    answer = model.invoke(asked)
    return {
        "text": answer.content,
        "stream": "".join(str(chunk.content) for chunk in model.stream(asked)),
        "usage": answer.usage_metadata["total_tokens"],
    }


def langchain_structured(url: str, image: str) -> Any:
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel, Field

    class Receipt(BaseModel):
        """A receipt."""

        total: str = Field(max_length=12)

    model = ChatOpenAI(base_url=url, api_key="none", model="demo", max_tokens=200)
    asked = [{"role": "user", "content": _content(image)}]
    found = model.with_structured_output(Receipt).invoke(asked)
    try:
        model.with_structured_output(Receipt, method="function_calling").invoke(asked)
    except Exception as error:  # the client's own kinds
        refused = str(error)
    else:
        refused = ""
    return {"total": found.total, "function_calling": refused}


def litellm(url: str, image: str) -> Any:
    import litellm as library

    asked = [{"role": "user", "content": _content(image)}]
    options: dict[str, Any] = {"api_base": url, "api_key": "none", "messages": asked, "max_tokens": 50}
    answer = library.completion(model="openai/demo", **options)
    stream = library.completion(model="hosted_vllm/demo", stream=True, **options)
    return {
        "text": answer.choices[0].message.content,
        "stream": "".join(chunk.choices[0].delta.content or "" for chunk in stream),
    }


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](sys.argv[2], sys.argv[3])))
